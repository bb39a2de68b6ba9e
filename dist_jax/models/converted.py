"""Converted checkpoints on disk: one orbax directory with parameters and what they are.

    PATH/params     the tree, readable in parts and straight into shardings and dtypes
    PATH/metadata   JSON: format_version, family, name, spec, sources, source_sha256, precision,
                    params_sha256, ignored

`spec` holds the geometry: the fields of `ClipSpec` for family 'clip', the hyper-parameters of
`dist_params.infer_hparams` for family 'dist'.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from dist_jax.models.params import Tree, flatten, map_with_path, tree_sha256, unflatten
from dist_jax.models.params import with_precision as _with_precision

FORMAT_VERSION = 1
REQUIRED = ('family', 'name', 'spec', 'sources', 'source_sha256', 'precision', 'ignored')

# Of one piece of an array on disk. A device that needs a part of an array reads whole pieces.
CHUNK_BYTES = 16 * 2**20

PathLike = str | os.PathLike[str]


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
      params: nested dict of arrays.
      metadata: JSON values with at least the keys of `REQUIRED`.
      overwrite: replace a converted checkpoint at `path`; nothing else is ever replaced.

    Returns:
      The metadata as stored, with `format_version` and `params_sha256`.

    Raises:
      FileExistsError: `path` exists and is not to be, or must not be, replaced.
      ValueError: metadata keys are missing.
    """
    path = absolute_path(path)
    missing = [key for key in REQUIRED if key not in metadata]
    if missing:
        raise ValueError(f'metadata lacks {missing}; needed are {list(REQUIRED)}')
    check_destination(path, overwrite=overwrite)
    metadata = {
        'format_version': FORMAT_VERSION,
        **metadata,
        'params_sha256': tree_sha256(params),
    }
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
      ValueError: something else than a converted checkpoint, or one of a newer format.
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
    try:
        metadata = ocp.JsonCheckpointHandler().restore(path / 'metadata')
    except (ValueError, OSError) as error:
        raise ValueError(f'{wrong} ({error})') from None
    if not isinstance(metadata, dict) or 'format_version' not in metadata:
        raise ValueError(wrong)
    if metadata['format_version'] > FORMAT_VERSION:
        raise ValueError(
            f'{path} has format_version={metadata["format_version"]}, this library reads up to '
            f'{FORMAT_VERSION}; update dist_jax or convert the source again'
        )
    return metadata


def stored_shapes(path: PathLike) -> Tree:
    """The stored tree as `jax.ShapeDtypeStruct` leaves, without reading any weights."""
    load_metadata(path)
    tree = ocp.PyTreeCheckpointHandler().metadata(absolute_path(path) / 'params').tree
    return map_with_path(lambda _, leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def load_params(
    path: PathLike,
    subtree: Sequence[str] | None = None,
    *,
    abstract: Mapping[str, Any] | None = None,
    dtype: Any = None,
    sharding: jax.sharding.Sharding | None = None,
    as_numpy: bool = False,
) -> Tree:
    """Reads parameters, or a part of them, straight to where they are needed.

    Args:
      path: a converted checkpoint.
      subtree: paths to read ('visual', 'text/blocks'); None for everything. Their keys stay in
        the result: `load_params(path, ['visual'])['visual']`.
      abstract: tree of leaves with `shape`, `dtype` and, where given, `sharding`; it decides
        dtype and placement and is checked against what is stored. It may hold more than `subtree`.
      dtype: without `abstract`: floating dtype to read into (norms and logit_scale stay float32);
        None keeps the stored one.
      sharding: placement of leaves that `abstract` does not place; None for the first local
        device, which is right for one process only.
      as_numpy: read into host memory instead of onto devices.

    Returns:
      Nested dict of `jax.Array`s (or numpy arrays).

    Raises:
      FileNotFoundError: nothing at `path`.
      ValueError: no converted checkpoint, no such subtree, or shapes other than `abstract`'s.
    """
    stored = flatten(stored_shapes(path))
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
            wanted = flatten(_with_precision(unflatten(stored), dtype))

    default = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def target(leaf: Any) -> jax.ShapeDtypeStruct:
        place = getattr(leaf, 'sharding', None) or default
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    item = unflatten({name: target(leaf) for name, leaf in wanted.items()})
    return read_tree(absolute_path(path) / 'params', item, as_numpy=as_numpy)


def read_tree(folder: epath.Path, item: Tree, *, as_numpy: bool = False) -> Tree:
    """Reads a tree that orbax saved, or a part of it.

    Args:
      folder: of the item.
      item: `jax.ShapeDtypeStruct` leaves with dtype and sharding to read into; a part of the stored
        tree is enough.
      as_numpy: read into host memory; the shardings are not looked at.
    """

    def restore_args(leaf: jax.ShapeDtypeStruct) -> ocp.RestoreArgs:
        if as_numpy:
            return ocp.RestoreArgs(restore_type=np.ndarray, dtype=leaf.dtype)
        return ocp.ArrayRestoreArgs(
            restore_type=jax.Array,
            sharding=leaf.sharding,
            global_shape=leaf.shape,
            dtype=leaf.dtype,
        )

    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        return checkpointer.restore(
            folder,
            args=ocp.args.PyTreeRestore(
                item=item,
                restore_args=jax.tree.map(restore_args, item),
                partial_restore=True,
            ),
        )


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
    params = map_with_path(
        lambda _, leaf: leaf if isinstance(leaf, jax.Array) else np.asarray(leaf), params
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
