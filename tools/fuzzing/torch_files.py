"""Writes PyTorch-like zip files by hand, good and bad ones, without PyTorch.

A small assembler for pickle programs: plain values, plus records for the instructions that make
pickle dangerous.
"""

from __future__ import annotations

import dataclasses
import math
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

STORAGES = {
    'float64': 'DoubleStorage',
    'float32': 'FloatStorage',
    'float16': 'HalfStorage',
    'bfloat16': 'BFloat16Storage',
    'int64': 'LongStorage',
    'int32': 'IntStorage',
    'int16': 'ShortStorage',
    'int8': 'CharStorage',
    'uint8': 'ByteStorage',
    'bool': 'BoolStorage',
}


@dataclasses.dataclass
class Global:
    module: str
    name: str


@dataclasses.dataclass
class Reduce:
    function: Any
    args: Any


@dataclasses.dataclass
class New:
    cls: Any
    args: Any = ()


@dataclasses.dataclass
class Build:
    target: Any
    state: Any


@dataclasses.dataclass
class Persistent:
    pid: Any


@dataclasses.dataclass
class Raw:
    code: bytes


@dataclasses.dataclass
class Pairs:
    """A dict whose keys may be records."""

    items: list[tuple[Any, Any]]


@dataclasses.dataclass
class Tensor:
    """A view: storage key, dtype name, offset, size, stride; `numel` of the storage."""

    key: str
    dtype: str
    numel: int
    offset: int = 0
    size: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()


def assemble(value: Any) -> bytes:
    """Value -> instructions that push it."""
    match value:
        case None:
            return b'N'
        case True:
            return b'\x88'
        case False:
            return b'\x89'
        case int():
            if -(2**31) <= value < 2**31:
                return b'J' + struct.pack('<i', value)
            raw = value.to_bytes(value.bit_length() // 8 + 1, 'little', signed=True)
            return b'\x8a' + bytes([len(raw)]) + raw
        case float():
            return b'G' + struct.pack('>d', value)
        case str():
            raw = value.encode()
            return b'X' + struct.pack('<I', len(raw)) + raw
        case tuple():
            return b'(' + b''.join(map(assemble, value)) + b't'
        case list():
            return b'](' + b''.join(map(assemble, value)) + b'e'
        case dict():
            return assemble(Pairs(list(value.items())))
        case Pairs(items):
            return b'}(' + b''.join(assemble(k) + assemble(v) for k, v in items) + b'u'
        case Global(module, name):
            return b'c' + module.encode() + b'\n' + name.encode() + b'\n'
        case Reduce(function, args):
            return assemble(function) + assemble(args) + b'R'
        case New(cls, args):
            return assemble(cls) + assemble(args) + b'\x81'
        case Build(target, state):
            return assemble(target) + assemble(state) + b'b'
        case Persistent(pid):
            return assemble(pid) + b'Q'
        case Raw(code):
            return code
        case Tensor():
            storage = Persistent(
                ('storage', Global('torch', STORAGES[value.dtype]), value.key, 'cpu', value.numel)
            )
            hooks = Reduce(Global('collections', 'OrderedDict'), ())
            args = (storage, value.offset, value.size, value.stride, False, hooks)
            return assemble(Reduce(Global('torch._utils', '_rebuild_tensor_v2'), args))
    raise TypeError(type(value))


def program(value: Any) -> bytes:
    """A whole pickle, protocol 2."""
    return b'\x80\x02' + assemble(value) + b'.'


def write_zip(
    path: Path,
    value: Any,
    storages: dict[str, bytes] | None = None,
    *,
    prefix: str = 'archive/',
    extra: dict[str, bytes] | None = None,
    compression: int = zipfile.ZIP_STORED,
) -> Path:
    """A container around `value` (bytes: the pickle itself) and its storages."""
    pickle_bytes = value if isinstance(value, bytes) else program(value)
    with zipfile.ZipFile(path, 'w', compression) as archive:
        archive.writestr(f'{prefix}data.pkl', pickle_bytes)
        archive.writestr(f'{prefix}version', b'3\n')
        for key, content in (storages or {}).items():
            archive.writestr(f'{prefix}data/{key}', content)
        for name, content in (extra or {}).items():
            archive.writestr(name, content)
    return path


class Saver:
    """Collects arrays as storages; `tensor` gives the record to put into the value."""

    def __init__(self) -> None:
        self.storages: dict[str, bytes] = {}

    def tensor(self, array: np.ndarray) -> Tensor:
        key = str(len(self.storages))
        self.storages[key] = np.ascontiguousarray(array).tobytes()
        stride = tuple(math.prod(array.shape[axis + 1 :]) for axis in range(array.ndim))
        return Tensor(key, array.dtype.name, array.size, 0, tuple(array.shape), stride)

    def save(self, path: Path, value: Any, **kwargs: Any) -> Path:
        return write_zip(path, value, self.storages, **kwargs)


def save_state_dict(path: Path, tensors: dict[str, np.ndarray], wrap: Any = None) -> Path:
    """Arrays -> a `.pt` file; `wrap` puts the dict of records into a larger value."""
    saver = Saver()
    records = {name: saver.tensor(array) for name, array in tensors.items()}
    return saver.save(path, wrap(records) if wrap else records)
