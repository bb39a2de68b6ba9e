"""Opens foreign checkpoints: one file or one folder in, named arrays out.

The container is recognised by its bytes, not by its extension. Arrays are read-only views of the
mapped files, so nothing is copied before it is converted.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import mmap
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from dist_jax.models import torch_zip
from dist_jax.models.foreign import MAX_AXES, MAX_TENSORS, check_tensors, read_json, shown

MAX_HEADER_BYTES = 16 << 20  # of a safetensors file: some hundred a tensor
MAX_WRAPPERS = 8

# Keys under which training code stores the network, in files that hold more than that.
WRAPPERS = ('state_dict', 'model_state', 'model_state_dict', 'model', 'module')

_DTYPES = {
    'F64': np.dtype(np.float64),
    'F32': np.dtype(np.float32),
    'F16': np.dtype(np.float16),
    'BF16': np.dtype(ml_dtypes.bfloat16),
    'I64': np.dtype(np.int64),
    'I32': np.dtype(np.int32),
    'I16': np.dtype(np.int16),
    'I8': np.dtype(np.int8),
    'U8': np.dtype(np.uint8),
    'BOOL': np.dtype(np.bool_),
}

# What a folder may hold, in the order of preference; an index names the shards of a split file.
_FOLDER_FILES = (
    'model.safetensors.index.json',
    'model.safetensors',
    'open_clip_model.safetensors',
    'open_clip_model.safetensors.index.json',
    'pytorch_model.bin.index.json',
    'pytorch_model.bin',
    'open_clip_pytorch_model.bin',
)


SUFFIXES = ('.safetensors', '.pt', '.pth', '.pyth', '.bin')  # of files of weights
JSON_BESIDE = ('config.json', 'open_clip_config.json')  # what they may have beside them


@dataclasses.dataclass(frozen=True)
class SourceFiles:
    """An opened checkpoint.

    Attributes:
      path: what the user named.
      files: the files that were read, shards included.
      tensors: name -> read-only array, `module.` and wrapper keys removed.
      config: the `config.json` beside the file (Hugging Face).
      open_clip_config: the `open_clip_config.json` beside the file.
      is_torchscript: the container is a TorchScript archive.
    """

    path: Path
    files: tuple[Path, ...]
    tensors: dict[str, np.ndarray]
    config: dict[str, Any] | None = None
    open_clip_config: dict[str, Any] | None = None
    is_torchscript: bool = False


def open_source(path: str | os.PathLike[str]) -> SourceFiles:
    """Opens a checkpoint file, or the one checkpoint in a folder.

    Raises:
      FileNotFoundError: there is no such file, or the folder lacks one, or a shard is missing.
      ValueError: several checkpoints in a folder, or a damaged, unknown or unsafe container.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f'{path}: no such file or folder')
    main = _file_in_folder(path) if path.is_dir() else path
    if not main.is_file():  # a FIFO would be waited for
        raise ValueError(f'{main}: neither a file nor a folder')
    files = _shards(main) if main.name.endswith('.index.json') else [main]
    tensors: dict[str, np.ndarray] = {}
    is_torchscript = False
    for file in files:
        if torch_zip.looks_like_zip(file):
            content = torch_zip.read_torch_zip(file)
            is_torchscript |= content.is_torchscript
            part = torch_zip.flatten_tensors(unwrap(content.root, file), file)
        elif _looks_like_safetensors(file):
            part = read_safetensors(file)
        else:
            torch_zip.read_torch_zip(file)  # Says what the file is instead, and the way out.
            raise AssertionError('unreachable')
        check_tensors(part, file)
        twice = sorted(tensors.keys() & part.keys())
        if twice:
            raise ValueError(f'{file}: tensors that another shard has already: {shown(twice)}')
        tensors |= part
    if not tensors:
        raise ValueError(f'{main}: holds no tensors')
    return SourceFiles(
        path=path,
        files=tuple(files),
        tensors=strip_prefix(tensors, 'module.'),
        config=_json_beside(main, JSON_BESIDE[0]),
        open_clip_config=_json_beside(main, JSON_BESIDE[1]),
        is_torchscript=is_torchscript,
    )


def unwrap(root: Any, path: str | os.PathLike[str]) -> Any:
    """The network inside a checkpoint that may also hold epoch, optimizer, ...

    Raises:
      ValueError: no dict of tensors at the top or under one of `WRAPPERS`, or several.
    """
    for _ in range(MAX_WRAPPERS):
        if isinstance(root, torch_zip.Module):
            return root
        if not isinstance(root, dict):
            raise ValueError(f'{path}: holds a {type(root).__name__}, not a dict of tensors')
        if any(isinstance(value, np.ndarray) for value in root.values()):
            return root
        inside = [key for key in WRAPPERS if isinstance(root.get(key), (dict, torch_zip.Module))]
        if len(inside) != 1:
            raise ValueError(
                f'{path}: top-level keys {_some_keys(root)}; expected tensors there, or '
                f'exactly one of the keys {list(WRAPPERS)}. Save only the network: '
                "`torch.save(checkpoint['<key>'], 'new.pt')`"
            )
        root = root[inside[0]]
    raise ValueError(f'{path}: more than {MAX_WRAPPERS} dicts inside each other before any tensor')


def _some_keys(root: dict) -> str:
    keys = sorted(map(shown, itertools.islice(root, 21)))
    return f'[{", ".join(keys[:20])}{", …" if len(keys) > 20 else ""}]'


def strip_prefix(tensors: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """Removes a prefix that every name carries (`module.` of data-parallel wrappers)."""
    while tensors and all(name.startswith(prefix) for name in tensors):
        tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    return tensors


def read_safetensors(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """A safetensors file as read-only views of the mapped file.

    Raises:
      ValueError: damaged file, or a dtype that is not supported.
    """
    path = Path(path)
    with open(path, 'rb') as file:
        start = 8 + int.from_bytes(file.read(8), 'little')
    size = path.stat().st_size
    if start > size or start > MAX_HEADER_BYTES:
        raise ValueError(
            f'{path}: a damaged safetensors file: a header of {start - 8} bytes, of {size} of the '
            f'file and at most {MAX_HEADER_BYTES}; fetch it again'
        )
    try:
        with safe_open(path, 'np') as checked:  # Validates header, offsets and sizes.
            names = list(checked.keys())
    except SafetensorError as error:
        raise ValueError(f'{path}: a damaged safetensors file ({error}); fetch it again') from None
    if len(names) > MAX_TENSORS:
        raise ValueError(f'{path}: {len(names)} tensors, more than {MAX_TENSORS}')
    with open(path, 'rb') as file:
        data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    header = json.loads(bytes(data[8:start]))
    tensors = {}
    for name in names:
        entry, where = header[name], f'{path}: {shown(name)}'
        if entry['dtype'] not in _DTYPES:
            raise ValueError(
                f'{where} has dtype {shown(entry["dtype"])}, not one of {sorted(_DTYPES)}'
            )
        dtype, shape = _DTYPES[entry['dtype']], entry['shape']
        begin, end = (start + offset for offset in entry['data_offsets'])
        # Empty ones can have any sizes, and of two entries of one name either may be checked above.
        if (
            len(shape) > MAX_AXES
            or max(shape, default=0) >= 1 << 48
            or not start <= begin <= end <= size
            or math.prod(shape) * dtype.itemsize != end - begin
        ):
            raise ValueError(
                f'{where} has shape {shown(shape)} and {end - begin} bytes, which no network has'
            )
        flat = np.frombuffer(data[begin:end], dtype) if end > begin else np.zeros(0, dtype)
        tensors[name] = flat.reshape(shape)
    return tensors


def file_sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes."""
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def sources_record(files: Iterable[Path]) -> tuple[list[dict[str, Any]], str]:
    """What a converted checkpoint says about its origin.

    Returns:
      One {file, bytes, sha256} for each file, and one digest for all: the file's own for a single
      file, otherwise SHA-256 over the lines '<sha256>  <file>' in the order of the names.
    """
    records = [
        {'file': file.name, 'bytes': file.stat().st_size, 'sha256': file_sha256(file)}
        for file in sorted(files)
    ]
    if len(records) == 1:
        return records, records[0]['sha256']
    lines = ''.join(f'{record["sha256"]}  {record["file"]}\n' for record in records)
    return records, hashlib.sha256(lines.encode()).hexdigest()


def _looks_like_safetensors(path: Path) -> bool:
    """Eight bytes of header length, then JSON."""
    with open(path, 'rb') as file:
        return file.read(9)[8:] == b'{'


def _file_in_folder(folder: Path) -> Path:
    return folder / main_file([file.name for file in folder.iterdir() if file.is_file()], folder)


def main_file(names: Iterable[str], where: object) -> str:
    """The file that holds the weights, or names their shards, among those of a folder.

    Args:
      names: of its files.
      where: the folder, for messages.

    Raises:
      FileNotFoundError: none or several.
    """
    names = sorted(names)
    for name in _FOLDER_FILES:
        if name in names:
            return name
    found = [name for name in names if Path(name).suffix in SUFFIXES and '/' not in name]
    if len(found) == 1:
        return found[0]
    listed = ', '.join(map(shown, found[:20])) or 'none'
    raise FileNotFoundError(
        f'{where}: expected one checkpoint (for instance {_FOLDER_FILES[1]} or '
        f'{_FOLDER_FILES[0]}), found {listed}; name the file itself'
    )


def _shards(index: Path) -> list[Path]:
    """Files named by a Hugging Face shard index, all present and beside it."""
    names = shard_names(index)
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise FileNotFoundError(f'{index}: shards that are not there: {shown(missing)}')
    return [index.parent / name for name in names]


def shard_names(index: Path) -> list[str]:
    """Files named by a Hugging Face shard index, each in its folder.

    Raises:
      ValueError: no index, or one that names files elsewhere or of other kinds.
    """
    try:
        names = sorted(set(read_json(index)['weight_map'].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f'{index}: not a shard index ({type(error).__name__}: {error})') from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f'{index}: names a shard outside of its folder: {shown(name)}')
        if Path(name).suffix not in SUFFIXES:
            raise ValueError(f'{index}: names a shard that is no file of weights: {shown(name)}')
    return names


def _json_beside(file: Path, name: str) -> dict[str, Any] | None:
    path = file.parent / name
    if not path.is_file():
        return None
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f'{path}: expected a JSON object')
    return content
