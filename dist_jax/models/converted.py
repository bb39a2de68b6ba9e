"""Converted checkpoints on disk: one orbax directory with parameters and what they are.

    PATH/params     the tree, readable in parts and straight into shardings and dtypes: parameters
                    at the top, and beside them collections under their names
    PATH/metadata   JSON: format_version, family, name, spec, sources, source_sha256, precision,
                    params_sha256, ignored, collections (their names; absent where there are none),
                    hub (hf://owner/name@commit of a source that was fetched from there; likewise),
                    and digests of all this, which are checked when it is read

`spec` holds the geometry, as the naming states it that the checkpoint was converted by: see
`naming.Plan`.
"""

from __future__ import annotations

import asyncio
import collections
import functools
import itertools
import logging
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath
from jax.experimental import multihost_utils

from dist_jax import ending
from dist_jax.models import digests
from dist_jax.models.digests import DamagedError, Digests
from dist_jax.models.params import Tree, flatten, tree_sha256, unflatten
from dist_jax.models.params import with_precision as _with_precision
from dist_jax.models.parts import PartedArray

log = logging.getLogger('dist_jax')

FORMAT_VERSION = 2  # since 2 with digests
COLLECTIONS = 'collections'
HUB = 'hub'  # field of the metadata: the commit that the source was fetched from
REQUIRED = ('family', 'name', 'spec', 'sources', 'source_sha256', 'precision', 'ignored')

# Of one piece of an array on disk. A device that needs a part of an array reads whole pieces.
CHUNK_BYTES = 16 * 2**20

# Of a piece of one layer, where layers are written one after the other. Devices split layers, and
# a piece of many layers has less of each: these are smaller for the same use.
LAYER_CHUNK_BYTES = 2**20

# Of parts that are on their way to the disk while the next one is made; a larger one goes alone.
BYTES_AHEAD = 2**27

# Larger arrays, and those that change their dtype, are read in slices of this size, one after the
# other: so much is held twice.
SLICE_BYTES = 2**28

# Before each further try of a read that failed in a way that may pass.
RETRY_SECONDS = (1.0, 4.0, 10.0)
# How tensorstore says what a file system or a network did; other codes are about what was read.
PASSING = re.compile(
    r'\b(UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED|RESOURCE_EXHAUSTED|PERMISSION_DENIED'
    r'|UNAUTHENTICATED|UNKNOWN|INTERNAL)\b|\[OS error'
)
MISSING = (FileNotFoundError, NotADirectoryError, IsADirectoryError)

PathLike = str | os.PathLike[str]
Found = TypeVar('Found')
Box = tuple[tuple[int, int], ...]  # (start, stop) of each axis


def save_converted(
    path: PathLike,
    params: Mapping[str, Any],
    metadata: Mapping[str, Any],
    *,
    overwrite: bool = False,
    on_bytes: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Writes a converted checkpoint; it appears whole or not at all.

    Args:
      path: directory to make; local or a bucket URL.
      params: nested dict of arrays; see `stored_tree`. A `PartedArray` is hashed, digested and
        written in parts, and never in memory as a whole.
      metadata: JSON values with at least the keys of `REQUIRED`.
      overwrite: replace a converted checkpoint at `path`; nothing else is ever replaced.
      on_bytes: called with the size of each part of a `PartedArray` that was written, for progress.

    Returns:
      The metadata as stored, with `format_version`, `params_sha256` and digests.

    Raises:
      FileExistsError: `path` exists and is not to be, or must not be, replaced.
      ValueError: metadata keys are missing, or a collection that they name.
    """
    path = absolute_path(path)
    missing = [key for key in REQUIRED if key not in metadata]
    if missing:
        raise ValueError(f'metadata lacks {missing}; needed are {list(REQUIRED)}')
    missing = [name for name in metadata.get(COLLECTIONS, ()) if name not in params]
    if missing:
        raise ValueError(f'the tree lacks the collections {missing} that the metadata names')
    check_destination(path, overwrite=overwrite)
    metadata = digests.seal(
        {
            'format_version': FORMAT_VERSION,
            **metadata,
            'params_sha256': tree_sha256(params),
            digests.DIGESTS: digests.digests(params),
        }
    )
    if '://' in os.fspath(path):
        # Orbax commits by a marker file there; a rename would copy every byte again.
        if path.exists():
            path.rmtree()
        _write(path, params, metadata, on_bytes)
        return metadata
    staging = path.parent / f'.{path.name}.partial'
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        _remove_staging(staging)
        _write(staging, params, metadata, on_bytes)
        if path.exists():
            old = path.parent / f'.{path.name}.replaced'
            shutil.rmtree(old, ignore_errors=True)
            path.rename(old)
            staging.rename(path)
            shutil.rmtree(old)
        else:
            staging.rename(path)
    finally:
        _remove_staging(staging)
    return metadata


def check_destination(path: PathLike, *, overwrite: bool = False) -> None:
    """Raises FileExistsError if `save_converted` would refuse this path."""
    path = absolute_path(path)
    if not path.exists():
        return
    if not overwrite:
        raise FileExistsError(f'{path} exists; pass --overwrite to replace it, or name another')
    try:
        load_metadata(path)
    except ValueError:
        raise FileExistsError(
            f'{path} exists and is not a converted checkpoint, so it is not replaced; name another'
        ) from None


def is_there(path: PathLike) -> bool:
    """Whether a folder looks like a converted checkpoint."""
    path = absolute_path(path)
    return (path / 'metadata' / 'metadata').exists() and (path / 'params').exists()


def load_metadata(path: PathLike) -> dict[str, Any]:
    """Metadata of a converted checkpoint.

    Raises:
      FileNotFoundError: nothing at `path`.
      ValueError: something else than a converted checkpoint, a damaged one, or one of a newer
        format.
      ending.AgainError: it cannot be read now.
    """
    path = absolute_path(path)
    if not path.exists():
        raise FileNotFoundError(f'{path}: no such directory; make it with `dist_jax convert`')
    wrong = (
        f'{path} is not a converted checkpoint; convert the downloaded file first: '
        '`dist_jax convert SOURCE DEST`'
    )
    if not is_there(path):
        raise ValueError(wrong)
    metadata = read_json(path / 'metadata')
    if not isinstance(metadata, dict) or not isinstance(metadata.get('format_version'), int):
        raise ValueError(wrong)
    digests.check_seal(path, metadata, required=metadata['format_version'] != 1)
    if metadata['format_version'] > FORMAT_VERSION:
        raise ValueError(
            f'{path} has format_version={metadata["format_version"]}, this library reads up to '
            f'{FORMAT_VERSION}; update dist_jax or convert the source again'
        )
    return metadata


def stored_tree(variables: Mapping[str, Any]) -> Tree:
    """{'params': ..., **collections} as it is stored: parameters at the top, collections beside.

    Raises:
      ValueError: a collection has the name of a parameter, or of a module with parameters.
    """
    collections = dict(variables)
    params = collections.pop('params')
    twice = sorted(params.keys() & collections.keys())
    if twice:
        raise ValueError(f'{twice} name both parameters and collections, which lie side by side')
    return {**params, **collections}


def variables(tree: Mapping[str, Any], metadata: Mapping[str, Any]) -> Tree:
    """What a network applies, {'params': ..., **collections}: the inverse of `stored_tree`.

    Args:
      tree: as stored, all of it; of arrays or shapes.
      metadata: of the checkpoint.
    """
    collections = {name: tree[name] for name in metadata.get(COLLECTIONS, ())}
    params = {name: part for name, part in tree.items() if name not in collections}
    return {'params': params, **collections}


def stored_shapes(path: PathLike) -> Tree:
    """The stored tree as `jax.ShapeDtypeStruct` leaves, without reading any weights."""
    stored = load_metadata(path).get(digests.DIGESTS)
    return unflatten(stored_leaves(absolute_path(path) / 'params', stored))


def stored_arrays(path: PathLike, names: Collection[str]) -> Tree:
    """Parameters as `PartedArray`s that read the checkpoint.

    Args:
      path: a converted checkpoint.
      names: paths of arrays; others are left out.

    Raises:
      DamagedError: they are not what was written; all of them are read once to know it.
      ending.AgainError: they cannot be read now.
    """
    folder = absolute_path(path) / 'params'
    known = load_metadata(path).get(digests.DIGESTS)
    context = ocp.type_handlers.get_ts_context(use_ocdbt=True)

    def leaf(name: str, like: jax.ShapeDtypeStruct) -> PartedArray:
        def make(start: int, stop: int) -> np.ndarray:
            rows = (slice(start, stop),) if like.shape else ()
            return patiently(folder, lambda: source()[rows].read().result())

        source = functools.cache(lambda: _open(_array_info(folder, name, context)))
        return PartedArray(tuple(like.shape), np.dtype(like.dtype), make, bool(like.shape))

    leaves = stored_leaves(folder, known).items()
    found = unflatten({name: leaf(name, like) for name, like in leaves if name in names})
    if known is not None:
        digests.check(folder, digests.digests(found), known)
    return found


def stored_variables(path: PathLike) -> Tree:
    """`variables` of a converted network as `jax.ShapeDtypeStruct` leaves."""
    return variables(stored_shapes(path), load_metadata(path))


def load_variables(path: PathLike, abstract: Tree, *, verify: bool = True) -> Tree:
    """Reads `variables` of a converted network, or some of them.

    Args:
      path: a converted checkpoint.
      abstract: {'params': ..., **collections} with shapes, dtypes and shardings; what is stored
        besides is not read.
      verify: see `load_params`.

    Raises:
      ValueError: as of `load_params`.
    """
    tree = stored_tree(abstract)
    found = load_params(path, list(flatten(tree)), abstract=tree, verify=verify)
    return variables(found, load_metadata(path))


def stored_leaves(folder: epath.Path, stored: Digests | None) -> dict[str, jax.ShapeDtypeStruct]:
    """{path: shape and dtype} of a tree that orbax saved, without reading any arrays.

    Args:
      folder: of the item.
      stored: its digests; None where an earlier version wrote it without.
    """
    if stored is not None:
        return {
            path: jax.ShapeDtypeStruct(tuple(shape), np.dtype(dtype))
            for path, (dtype, shape, _) in stored.items()
        }
    tree = patiently(folder, lambda: ocp.PyTreeCheckpointHandler().metadata(folder).tree)
    return {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        for path, leaf in digests.tree_paths(tree).items()
    }


def load_params(
    path: PathLike,
    subtree: Sequence[str] | None = None,
    *,
    abstract: Mapping[str, Any] | None = None,
    dtype: Any = None,
    sharding: jax.sharding.Sharding | None = None,
    as_numpy: bool = False,
    verify: bool = True,
) -> Tree:
    """Reads parameters, or a part of them, straight to where they are needed.

    Args:
      path: a converted checkpoint.
      subtree: paths to read ('visual', 'text/blocks'); None for everything. Their keys stay in
        the result: `load_params(path, ['visual'])['visual']`.
      abstract: tree of leaves with `shape`, `dtype` and, where given, `sharding`; it decides
        dtype and placement and is checked against what is stored. It may hold more than `subtree`.
      dtype: without `abstract`: floating dtype to read into (norms and logit_scale stay float32,
        collections what they are); None keeps the stored one.
      sharding: placement of leaves that `abstract` does not place; None for the first local
        device, which is right for one process only.
      as_numpy: read into host memory instead of onto devices.
      verify: compare what is read with its digests. With several processes all must call this.

    Returns:
      Nested dict of `jax.Array`s (or numpy arrays).

    Raises:
      FileNotFoundError: nothing at `path`.
      ValueError: no converted checkpoint, no such subtree, shapes other than `abstract`'s, or
        weights that are not what was written.
      ending.AgainError: it cannot be read now.
    """
    folder = absolute_path(path) / 'params'
    metadata = load_metadata(path)
    known = metadata.get(digests.DIGESTS)
    if known is None:
        log.info('%s has no digests, so damage would not show: convert the source again', path)
    stored = stored_leaves(folder, known)
    for part in subtree or ():
        if not any(_inside(name, part) for name in stored):
            tops = sorted({name.split('/')[0] for name in stored})
            raise ValueError(f'{path} has no parameters under {part!r}; it holds {tops}')
    if subtree is not None:
        stored = {n: leaf for n, leaf in stored.items() if any(_inside(n, p) for p in subtree)}
    if abstract is not None:
        wanted = flatten(abstract)
        if subtree is not None:
            wanted = {n: leaf for n, leaf in wanted.items() if any(_inside(n, p) for p in subtree)}
        check_same(path, stored, wanted)
    else:
        wanted = stored
        if dtype is not None:
            keep = metadata.get(COLLECTIONS, ())
            wanted = flatten(_with_precision(unflatten(stored), dtype, keep))

    default = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def target(leaf: Any) -> jax.ShapeDtypeStruct:
        place = getattr(leaf, 'sharding', None) or default
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    item = unflatten({name: target(leaf) for name, leaf in wanted.items()})
    return read_tree(folder, item, known if verify else None, as_numpy=as_numpy)


def read_tree(
    folder: epath.Path, item: Tree, stored: Digests | None, *, as_numpy: bool = False
) -> Tree:
    """Reads a tree that orbax saved, or a part of it; with several processes all must call this.

    Args:
      folder: of the item.
      item: `jax.ShapeDtypeStruct` leaves with dtype and sharding to read into; a part of the stored
        tree is enough. A nested dict, if dtypes are to change or large arrays to be read in slices.
      stored: digests of the tree; None for not to compare them.
      as_numpy: read into host memory; the shardings are not looked at.

    Raises:
      DamagedError: it is not what was written, or nothing that can be decoded.
      ending.AgainError: it cannot be read now.
    """
    if not item:  # orbax has no word for nothing
        return {}
    known = together(folder, lambda: stored_leaves(folder, stored))
    sliced = {
        path: leaf
        for path, leaf in digests.tree_paths(item).items()
        if path in known
        and (leaf.dtype != known[path].dtype or leaf.size * leaf.dtype.itemsize > SLICE_BYTES)
    }
    if not (sliced and isinstance(item, dict)):
        return _read_checked(folder, item, stored, as_numpy)
    flat = flatten(item)
    rest = unflatten({path: leaf for path, leaf in flat.items() if path not in sliced})
    found = flatten(_read_checked(folder, rest, stored, as_numpy)) if rest else {}
    context = ocp.type_handlers.get_ts_context(use_ocdbt=True)
    for path, leaf in sliced.items():
        info = _array_info(folder, path, context)
        found[path] = _read_sliced(info, path, leaf, stored, as_numpy)
    return unflatten({path: found[path] for path in flat})


def _read_checked(folder: epath.Path, item: Tree, stored: Digests | None, as_numpy: bool) -> Tree:
    def read() -> tuple[Tree, Callable[[], Digests]]:
        found = _read_whole(folder, item, as_numpy)
        return found, lambda: digests.digests(found)

    return _checked(folder, read, stored)


def _checked(
    folder: epath.Path,
    read: Callable[[], tuple[Found, Callable[[], Digests]]],
    stored: Digests | None,
) -> Found:
    """What `read` returns first, if the digests that it returns next are those that are stored."""
    for last in (False, True):
        found, digested = read()
        try:
            if stored is not None:
                digests.check(folder, digested(), stored)
            return found
        except DamagedError:  # on disk, or on the way
            if last:
                raise
        del found, digested


def _read_sliced(
    info: ocp.type_handlers.ParamInfo,
    path: str,
    leaf: jax.ShapeDtypeStruct,
    stored: Digests | None,
    as_numpy: bool,
) -> jax.Array | np.ndarray:
    """One array, read in the dtype that it is stored in and cast a slice at a time."""
    folder = info.parent_dir

    def read() -> tuple[Any, Callable[[], Digests]]:
        found, digest = together(
            folder, lambda: patiently(folder, lambda: _read_slices(info, leaf, as_numpy))
        )
        shared = [] if as_numpy or found.is_fully_addressable else [path]
        return found, lambda: digests.rows({path: digest}, shared)

    return _checked(folder, read, stored)


def _read_slices(
    info: ocp.type_handlers.ParamInfo, leaf: jax.ShapeDtypeStruct, as_numpy: bool
) -> tuple[jax.Array | np.ndarray, digests.Digest]:
    """The array, and the digest of what this process read of it first, before it was cast."""
    source = _open(info)
    digest = digests.Digest(source.dtype.numpy_dtype, source.shape)

    def read(box: Box, first: bool) -> np.ndarray:
        values = np.empty([stop - start for start, stop in box], leaf.dtype)
        for block in _slices(box, source.chunk_layout.read_chunk.shape, digest.dtype.itemsize):
            part = source[tuple(slice(*ends) for ends in block)].read().result()
            if first:
                digest.add(part, tuple(start for start, _ in block))
            inside = tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(block, box))
            with np.errstate(over='ignore', invalid='ignore'):  # as on devices
                values[inside] = part
        return values

    if as_numpy:
        return read(tuple((0, size) for size in leaf.shape), True), digest
    devices: dict[Box, list[jax.Device]] = {}
    for device, index in leaf.sharding.devices_indices_map(leaf.shape).items():
        box = tuple(part.indices(size)[:2] for part, size in zip(index, leaf.shape))
        devices.setdefault(box, []).append(device)
    process, shards = jax.process_index(), []
    for box, holders in devices.items():
        own = [device for device in holders if device.process_index == process]
        if own:
            part = read(box, own[0] is holders[0])
            shards += [jax.device_put(part, device) for device in own]
    found = jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, shards)
    return found, digest


def _array_info(folder: epath.Path, path: str, context: ts.Context) -> ocp.type_handlers.ParamInfo:
    """Where one array of a tree that orbax saved lies."""
    return ocp.type_handlers.ParamInfo(
        name=path.replace('/', '.'),
        parent_dir=folder,
        is_ocdbt_checkpoint=True,
        use_zarr3=False,
        ts_context=context,
    )


def _open(info: ocp.type_handlers.ParamInfo) -> ts.TensorStore:
    spec = ocp.type_handlers.get_json_tspec_read(info, use_ocdbt=True)
    return ts.open(ts.Spec(spec), open=True, read=True, context=info.ts_context).result()


def _slices(box: Box, pieces: Sequence[int], itemsize: int) -> Iterator[Box]:
    """A box in slices of at most `SLICE_BYTES`, or of one piece, that cut no piece on disk.

    Args:
      box: (start, stop) of each axis.
      pieces: sizes of the pieces on disk.
      itemsize: bytes of an element.
    """
    size = math.prod(stop - start for start, stop in box) * itemsize
    if size <= SLICE_BYTES:
        yield box
        return
    cuts = [-(-stop // piece) - start // piece for (start, stop), piece in zip(box, pieces)]
    axis = cuts.index(max(cuts))
    (start, stop), piece = box[axis], pieces[axis]
    step = piece * max(1, SLICE_BYTES * (stop - start) // size // piece)
    edges = [start, *range((start // step + 1) * step, stop, step), stop]
    for ends in itertools.pairwise(edges):
        yield (*box[:axis], ends, *box[axis + 1 :])


def _read_whole(folder: epath.Path, item: Tree, as_numpy: bool) -> Tree:
    def restore_args(leaf: jax.ShapeDtypeStruct) -> ocp.RestoreArgs:
        if as_numpy:
            return ocp.RestoreArgs(restore_type=np.ndarray, dtype=leaf.dtype)
        return ocp.ArrayRestoreArgs(
            restore_type=jax.Array,
            sharding=leaf.sharding,
            global_shape=leaf.shape,
            dtype=leaf.dtype,
        )

    args = ocp.args.PyTreeRestore(
        item=item, restore_args=jax.tree.map(restore_args, item), partial_restore=True
    )

    def read() -> Tree:
        # Not an ocp.Checkpointer: it waits for the other processes, and they may have failed.
        return patiently(folder, lambda: ocp.PyTreeCheckpointHandler().restore(folder, args=args))

    return together(folder, read)


def read_json(folder: epath.Path) -> Any:
    """JSON values that orbax saved.

    Raises:
      DamagedError: there are none, or no JSON.
      ending.AgainError: they cannot be read now.
    """
    return patiently(folder, lambda: ocp.JsonCheckpointHandler().restore(folder))


def patiently(folder: epath.Path, read: Callable[[], Found]) -> Found:
    """What `read` returns, which is called again after an error.

    Args:
      folder: that is read.
      read: may be called several times.

    Raises:
      DamagedError: what is there cannot be decoded, twice.
      ending.AgainError: it cannot be read now; a file system or a network fails.
    """
    waits, again = list(RETRY_SECONDS), True
    while True:
        try:
            return read()
        except (MemoryError, jax.errors.JaxRuntimeError):  # not about what is stored
            raise
        except Exception as error:  # orbax raises bare Exceptions for damaged arrays
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            broken = isinstance(error, OSError) and not isinstance(error, MISSING)
            if not broken and not PASSING.search(str(error)):
                if again:
                    again = False
                    continue
                raise DamagedError(f'{folder} cannot be read: {reason}') from error
            if not waits:
                raise ending.AgainError(
                    f'{folder} cannot be read now: {reason}. Nothing was changed; when the file '
                    'system works again, the same command continues'
                ) from error
            log.warning('%s: %s; trying again in %g s', folder, reason, waits[0])
            time.sleep(waits.pop(0))


def together(folder: epath.Path, read: Callable[[], Found]) -> Found:
    """What `read` returns; an error on one process is one on all, and every process must call it.

    Raises:
      Exception: what `read` raises here, or, in words, on another process.
    """
    errors = (DamagedError, ending.AgainError, Exception)  # the worst last
    found, error, place = None, None, 0
    try:
        found = read()
    except Exception as raised:
        error = raised
        place = 1 + next(i for i, kind in enumerate(errors) if isinstance(error, kind))
    worst = place
    if jax.process_count() > 1:
        worst = int(multihost_utils.process_allgather(np.int32(place)).max())
    if not worst:
        return found
    if place == worst:
        raise error
    kind = errors[worst - 1]
    raise (RuntimeError if kind is Exception else kind)(f'{folder}: another process cannot read it')


def check_same(path: PathLike, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises ValueError if names or shapes of two flat trees differ; the message lists all."""
    problems = [f'  {name}: not in the checkpoint' for name in wanted if name not in stored]
    problems += [f'  {name}: the model has no such parameter' for name in stored.keys() - wanted]
    problems += [
        f'  {name}: stored {tuple(stored[name].shape)}, the model needs {tuple(leaf.shape)}'
        for name, leaf in wanted.items()
        if name in stored and tuple(stored[name].shape) != tuple(leaf.shape)
    ]
    if problems:
        raise ValueError('\n'.join([f'{path} does not fit the model:', *sorted(problems)]))


def _inside(name: str, part: str) -> bool:
    return name == part or name.startswith(f'{part}/')


def absolute_path(path: PathLike) -> epath.Path:
    """A path that orbax takes: absolute, or a bucket URL as it is."""
    text = os.fspath(path)
    return epath.Path(text if '://' in text else os.path.abspath(os.path.expanduser(text)))


class _PartsHandler(ocp.type_handlers.NumpyHandler):
    """Lets orbax write `PartedArray`s as it writes numpy arrays, a part at a time."""

    def __init__(self, on_bytes: Callable[[int], None] | None):
        super().__init__()
        self._on_bytes = on_bytes or (lambda _: None)

    async def serialize(
        self,
        values: Sequence[PartedArray],
        infos: Sequence[ocp.type_handlers.ParamInfo],
        args: Sequence[ocp.SaveArgs] | None = None,
    ) -> list[ocp.future.Future]:
        """Returns one future, for all: one array after the other."""
        writing = self._write_all(values, infos, args or [ocp.SaveArgs()] * len(values))
        return [ocp.future.CommitFutureAwaitingContractedSignals(writing, name='parts')]

    async def _write_all(
        self,
        values: Sequence[PartedArray],
        infos: Sequence[ocp.type_handlers.ParamInfo],
        args: Sequence[ocp.SaveArgs],
    ) -> None:
        async def opened(value: PartedArray, info: Any, arg: ocp.SaveArgs) -> ts.TensorStore:
            await info.await_path_creation()
            spec = ocp.type_handlers.get_json_tspec_write(
                info,
                use_ocdbt=info.is_ocdbt_checkpoint,
                global_shape=value.shape,
                local_shape=value.shape,
                dtype=value.dtype,
                process_index=jax.process_index(),
                arg=arg,
            )
            return await ts.open(ts.Spec(spec), create=True, open=True, context=info.ts_context)

        # Waiting for anything flushes what was written, which takes a while however little that is.
        # Without, tensorstore gathers gigabytes for one file.
        arrays = await asyncio.gather(*map(opened, values, infos, args))
        writing: collections.deque[tuple[Any, int]] = collections.deque()
        ahead = 0
        for value, array in zip(values, arrays, strict=True):
            for part, start in value.parts():
                while writing and ahead + part.nbytes > BYTES_AHEAD:
                    ahead -= writing[0][1]
                    await self._written(*writing.popleft())
                where = array[start : start + len(part)] if part.ndim else array
                future = where.write(part, can_reference_source_data_indefinitely=True)
                writing.append((future, part.nbytes))
                ahead += part.nbytes
        for future, size in writing:
            await self._written(future, size)

    async def _written(self, future: Any, size: int) -> None:
        await future
        self._on_bytes(size)


def _write(
    path: epath.Path,
    params: Mapping[str, Any],
    metadata: Mapping[str, Any],
    on_bytes: Callable[[int], None] | None,
) -> None:
    # Orbax knows no zero-dimensional numpy scalars of ml_dtypes; arrays it does.
    params = jax.tree.map(
        lambda leaf: leaf if isinstance(leaf, (jax.Array, PartedArray)) else np.asarray(leaf),
        params,
    )
    handlers = ocp.type_handlers.create_type_handler_registry(
        *((kind, ocp.type_handlers.get_type_handler(kind)) for kind in (jax.Array, np.ndarray)),
        (PartedArray, _PartsHandler(on_bytes)),
    )
    # Of several processes the first alone writes; by default orbax waits for all of them.
    first = ocp.options.MultiprocessingOptions(
        active_processes={0}, barrier_sync_key_prefix='converted'
    )
    with ocp.Checkpointer(
        ocp.CompositeCheckpointHandler(
            params=ocp.PyTreeCheckpointHandler(
                type_handler_registry=handlers, multiprocessing_options=first
            ),
            metadata=ocp.JsonCheckpointHandler(multiprocessing_options=first),
            composite_options=ocp.CompositeOptions(multiprocessing_options=first),
        ),
        multiprocessing_options=first,
    ) as checkpointer:
        checkpointer.save(
            path,
            args=ocp.args.Composite(
                params=ocp.args.PyTreeSave(params, save_args=jax.tree.map(_pieces, params)),
                metadata=ocp.args.JsonSave(dict(metadata)),
            ),
        )


def _pieces(leaf: Any) -> ocp.SaveArgs:
    """How an array is cut on disk: a stack that is written in parts by layers, so that they fit."""
    if isinstance(leaf, PartedArray) and leaf.stacked and leaf.nbytes > CHUNK_BYTES:
        return ocp.SaveArgs(chunk_byte_size=LAYER_CHUNK_BYTES, shard_axes=(0,))
    return ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES)


def _remove_staging(staging: epath.Path) -> None:
    for left in staging.parent.glob(f'{staging.name}*'):
        shutil.rmtree(left, ignore_errors=True)
