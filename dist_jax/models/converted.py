"""Converted checkpoints on disk: one orbax directory with parameters and what they are.

    PATH/params     the tree, readable in parts and straight into shardings and dtypes: parameters
                    at the top, and beside them collections under their names
    PATH/metadata   JSON: format_version, family, name, spec, sources, source_sha256, precision,
                    params_sha256, ignored, collections (their names; absent where there are none),
                    and digests of all this, which are checked when it is read

`spec` holds the geometry, as the naming states it that the checkpoint was converted by: see
`naming.Plan`.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from dist_jax import ending
from dist_jax.models import digests
from dist_jax.models.digests import DamagedError, Digests
from dist_jax.models.params import Tree, flatten, tree_sha256, unflatten
from dist_jax.models.params import with_precision as _with_precision

log = logging.getLogger('dist_jax')

FORMAT_VERSION = 2  # since 2 with digests
COLLECTIONS = 'collections'
REQUIRED = ('family', 'name', 'spec', 'sources', 'source_sha256', 'precision', 'ignored')

# Of one piece of an array on disk. A device that needs a part of an array reads whole pieces.
CHUNK_BYTES = 16 * 2**20

# Bytes that are read before their dtype is changed: so much is held twice.
CAST_BYTES = 2**30

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


def save_converted(
    path: PathLike,
    params: Mapping[str, Any],
    metadata: Mapping[str, Any],
    *,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Writes a converted checkpoint; it appears whole or not at all.

    Args:
      path: directory to make; local or a bucket URL.
      params: nested dict of arrays; see `stored_tree`.
      metadata: JSON values with at least the keys of `REQUIRED`.
      overwrite: replace a converted checkpoint at `path`; nothing else is ever replaced.

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
        _write(path, params, metadata)
        return metadata
    staging = path.parent / f'.{path.name}.partial'
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        _remove_staging(staging)
        _write(staging, params, metadata)
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
    if not (path / 'metadata' / 'metadata').exists() or not (path / 'params').exists():
        raise ValueError(wrong)
    metadata = read_json(path / 'metadata')
    if not isinstance(metadata, dict) or 'format_version' not in metadata:
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


def stored_variables(path: PathLike) -> Tree:
    """`variables` of a converted network as `jax.ShapeDtypeStruct` leaves."""
    return variables(stored_shapes(path), load_metadata(path))


def load_variables(path: PathLike, abstract: Tree, *, verify: bool = True) -> Tree:
    """Reads `variables` of a converted network.

    Args:
      path: a converted checkpoint.
      abstract: {'params': ..., **collections} with shapes, dtypes and shardings.
      verify: see `load_params`.

    Raises:
      ValueError: as of `load_params`.
    """
    tree = stored_tree(abstract)
    found = load_params(path, list(tree), abstract=tree, verify=verify)
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
        tree is enough. A nested dict, if dtypes are to change.
      stored: digests of the tree; None for not to compare them.
      as_numpy: read into host memory; the shardings are not looked at.

    Raises:
      DamagedError: it is not what was written, or nothing that can be decoded.
      ending.AgainError: it cannot be read now.
    """
    if not item:  # orbax has no word for nothing
        return {}
    if stored is None:
        return _read_whole(folder, item, as_numpy)
    changed = {
        path: leaf
        for path, leaf in digests.tree_paths(item).items()
        if leaf.dtype != np.dtype(stored[path][0])
    }
    if not changed:
        return _read_checked(folder, item, stored, as_numpy)
    found = {}
    for group in _groups(flatten(item), changed, stored):
        part = flatten(_read_checked(folder, unflatten(group), stored, as_numpy))
        for path in group:
            leaf = part.pop(path)
            found[path] = leaf.astype(changed[path].dtype) if path in changed else leaf
    return unflatten(found)


def _groups(
    item: Mapping[str, Any], changed: Mapping[str, Any], stored: Digests
) -> Iterator[dict[str, jax.ShapeDtypeStruct]]:
    """Leaves in their stored dtype, a bounded number of bytes at a time of those that change it."""
    group = {path: leaf for path, leaf in item.items() if path not in changed}
    size = 0
    for path, leaf in changed.items():
        dtype = np.dtype(stored[path][0])
        if group and (not size or size + leaf.size * dtype.itemsize > CAST_BYTES):
            yield group
            group, size = {}, 0
        group[path] = jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding)
        size += leaf.size * dtype.itemsize
    yield group


def _read_checked(folder: epath.Path, item: Tree, stored: Digests, as_numpy: bool) -> Tree:
    for last in (False, True):
        found = _read_whole(folder, item, as_numpy)
        try:
            digests.check(folder, found, stored)
            return found
        except DamagedError:  # on disk, or on the way
            if last:
                raise
        del found


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


def _write(path: epath.Path, params: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
    # StandardSave knows no zero-dimensional numpy scalars of ml_dtypes; arrays it does.
    params = jax.tree.map(
        lambda leaf: leaf if isinstance(leaf, jax.Array) else np.asarray(leaf), params
    )
    pieces = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), params)
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(
            path,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(params, save_args=pieces),
                metadata=ocp.args.JsonSave(dict(metadata)),
            ),
        )


def _remove_staging(staging: epath.Path) -> None:
    for left in staging.parent.glob(f'{staging.name}*'):
        shutil.rmtree(left, ignore_errors=True)
