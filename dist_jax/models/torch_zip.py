"""Reads PyTorch's zip containers (`.pt`, `.pth`, `.bin`) without PyTorch and without running them.

Such a file is a zip archive with a pickle program (`data.pkl`) and one raw file per storage.
`pickle.Unpickler` would import and call whatever the program names; here the program is walked by
a small interpreter that knows only the instructions PyTorch writes and builds only plain values:
numbers, strings, lists, dicts, arrays, and `Module` records for TorchScript objects and for the
command lines that training scripts save. No name in the file is ever resolved to Python code, so
there is nothing to call. Names outside a short list are refused, all of them in one message.

Storages are slices of the memory-mapped file, never copied here. Every entry that is read must be
stored uncompressed (PyTorch always does that), so no declared size can exceed the file itself.
Values are shared as the program shares them and never copied, and instructions, nodes and tensors
are counted, so that a file costs time and memory in proportion to its size.

Covered: state dicts and checkpoints around them, TorchScript archives (the container of the OpenAI
CLIP weights), float16, bfloat16, strided views, scalars. Not covered, with a message: the format
of PyTorch before 1.6, sparse and quantised tensors, custom classes, pickled Python objects.
"""

from __future__ import annotations

import dataclasses
import io
import math
import mmap
import os
import pickletools
import re
import struct
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from typing import Any

import ml_dtypes
import numpy as np

from dist_jax.models.foreign import MAX_AXES, MAX_TENSORS, check_name, shown

MAX_PICKLE_BYTES = 64 << 20
MAX_OPCODES = 1_000_000  # some forty a tensor
MAX_NODES = 200_000
MAX_DEPTH = 64
MAX_DIRECTORY_BYTES = 64 << 20  # of the zip archive: some seventy an entry

WAY_OUT = (
    'If you trust the file, open it where PyTorch is installed and save only its tensors: '
    '`safetensors.torch.save_file({k: v.contiguous() for k, v in state_dict.items()}, '
    "'new.safetensors')`."
)

_DTYPES: dict[str, np.dtype] = {
    'float64': np.dtype(np.float64),
    'float32': np.dtype(np.float32),
    'float16': np.dtype(np.float16),
    'bfloat16': np.dtype(ml_dtypes.bfloat16),
    'int64': np.dtype(np.int64),
    'int32': np.dtype(np.int32),
    'int16': np.dtype(np.int16),
    'int8': np.dtype(np.int8),
    'uint8': np.dtype(np.uint8),
    'bool': np.dtype(np.bool_),
    'uint16': np.dtype(np.uint16),
    'uint32': np.dtype(np.uint32),
    'uint64': np.dtype(np.uint64),
}
_STORAGES = {
    'DoubleStorage': 'float64',
    'FloatStorage': 'float32',
    'HalfStorage': 'float16',
    'BFloat16Storage': 'bfloat16',
    'LongStorage': 'int64',
    'IntStorage': 'int32',
    'ShortStorage': 'int16',
    'CharStorage': 'int8',
    'ByteStorage': 'uint8',
    'BoolStorage': 'bool',
}


_LITERALS = (
    *('BININT', 'BININT1', 'BININT2', 'LONG1', 'LONG4', 'BINFLOAT'),
    *('BINUNICODE', 'SHORT_BINUNICODE', 'BINUNICODE8', 'BINSTRING', 'SHORT_BINSTRING'),
    *('BINBYTES', 'SHORT_BINBYTES', 'BINBYTES8'),
)


class CheckpointFormatError(ValueError):
    """The file is not a readable PyTorch zip container: wrong format, truncated or corrupt."""


class UnsafeCheckpointError(ValueError):
    """The file asks for more than tensors and plain values; it was not executed."""


@dataclasses.dataclass
class Module:
    """A TorchScript object: its class name and the attributes that were stored."""

    class_name: str
    attributes: dict[str, Any] = dataclasses.field(default_factory=dict, repr=False)


@dataclasses.dataclass(frozen=True)
class TorchFile:
    """What a container holds.

    Attributes:
      root: nested dicts, lists, plain values, read-only numpy arrays, `Module`s.
      is_torchscript: the root is a scripted or traced module.
    """

    root: Any
    is_torchscript: bool


def read_torch_zip(path: str | os.PathLike[str]) -> TorchFile:
    """Opens a `.pt`/`.pth`/`.bin` zip container.

    Returns:
      The content; its arrays are read-only views of the mapped file.

    Raises:
      CheckpointFormatError: not such a container, or a damaged one.
      UnsafeCheckpointError: it needs names or instructions outside the allowed ones.
    """
    path = Path(path)
    archive = _Archive(path)
    root = _Interpreter(archive).run(archive.read('data.pkl', MAX_PICKLE_BYTES))
    return TorchFile(root, isinstance(root, Module))


def flatten_tensors(root: Any, path: str | os.PathLike[str] = '') -> dict[str, np.ndarray]:
    """All tensors below nested dicts and modules, by dotted name; other values are left out.

    Args:
      root: a `TorchFile.root`, or a part of it.
      path: file name for the error message.

    Raises:
      ValueError: the nesting is absurd (depth, or the number of nodes), or a name is.
    """
    tensors: dict[str, np.ndarray] = {}
    stack: list[tuple[str, Any, int]] = [('', root, 0)]
    nodes = 0
    while stack:
        prefix, node, depth = stack.pop()
        items = node.attributes if isinstance(node, Module) else node
        for key, value in items.items():
            nodes += 1
            if depth > MAX_DEPTH or nodes > MAX_NODES:
                raise CheckpointFormatError(
                    f'{path}: nested deeper than {MAX_DEPTH} levels or more than {MAX_NODES} '
                    'entries, perhaps inside itself; this is no checkpoint of a network'
                )
            if not isinstance(value, (np.ndarray, dict, Module)):
                continue
            if not isinstance(key, (str, int)):
                raise CheckpointFormatError(f'{path}: a tensor under the key {shown(key)}')
            name = f'{prefix}.{key}' if prefix else str(key)
            check_name(name, path)
            if isinstance(value, np.ndarray):
                tensors[name] = value
            else:
                stack.append((name, value, depth + 1))
    return tensors


def looks_like_zip(path: str | os.PathLike[str]) -> bool:
    """Whether the file starts like a zip archive."""
    with open(path, 'rb') as file:
        return file.read(4) == b'PK\x03\x04'


class _BoundedFile(io.FileIO):
    """A file that is never read at length: `zipfile` would take any list of entries."""

    def read(self, size: int = -1) -> bytes:
        if size > MAX_DIRECTORY_BYTES:
            raise zipfile.BadZipFile(f'its list of entries has {size} bytes')
        return super().read(size)


class _Archive:
    """Entries of the zip file as slices of one read-only mapping."""

    def __init__(self, path: Path):
        self.path = path
        if not path.is_file():
            raise FileNotFoundError(f'{path}: no such file')
        size = path.stat().st_size
        with open(path, 'rb') as file:
            head = file.read(512)
        if head[:4] != b'PK\x03\x04':
            raise CheckpointFormatError(f'{path}: {_not_a_zip(head)}')
        try:
            with _BoundedFile(path) as file, zipfile.ZipFile(file) as archive:
                entries = archive.infolist()
        except (
            zipfile.BadZipFile,
            OSError,
            ValueError,
            NotImplementedError,
            struct.error,
        ) as error:
            raise CheckpointFormatError(
                f'{path}: a damaged zip archive ({error}); the download was probably cut short, '
                'fetch it again'
            ) from None
        with open(path, 'rb') as file:
            self.data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        self.entries: dict[str, zipfile.ZipInfo] = {}
        for entry in entries:
            name = entry.filename
            parts = PurePosixPath(name).parts
            if '..' in parts or name.startswith('/') or '\\' in name or ':' in name:
                raise UnsafeCheckpointError(f'{path}: an entry is named {shown(name)}; {WAY_OUT}')
            if name in self.entries:
                raise CheckpointFormatError(f'{path}: two entries are named {shown(name)}')
            self.entries[name] = entry
        declared = sum(entry.file_size for entry in entries)
        if declared > 4 * size + (64 << 20):
            raise CheckpointFormatError(
                f'{path}: a file of {size} bytes declares {declared} bytes of content; refused'
            )
        pickles = [name for name in self.entries if re.fullmatch(r'[^/]+/data\.pkl', name)]
        if len(pickles) != 1:
            raise CheckpointFormatError(
                f'{path}: a zip archive, but not one of PyTorch: {len(pickles)} entries '
                '"<name>/data.pkl" instead of one'
            )
        self.prefix = pickles[0].removesuffix('data.pkl')
        if f'{self.prefix}byteorder' in self.entries:
            order = bytes(self.read('byteorder', 16))
            if order != b'little':
                raise CheckpointFormatError(f'{path}: byte order {order!r}; only little is read')

    def read(self, name: str, limit: int | None = None) -> memoryview:
        """Bytes of one stored entry, checked against its CRC."""
        entry = self.entries.get(self.prefix + name)
        if entry is None:
            raise CheckpointFormatError(
                f'{self.path}: entry {shown(self.prefix + name)} is missing'
            )
        where = f'{self.path}: entry {shown(entry.filename)}'
        if entry.flag_bits & 1:
            raise CheckpointFormatError(f'{where} is encrypted')
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise CheckpointFormatError(
                f'{where} is compressed, which PyTorch never does; was the archive repacked? '
                'Repack it without compression (`zip -0`)'
            )
        if limit is not None and entry.file_size > limit:
            raise CheckpointFormatError(f'{where} has {entry.file_size} bytes, limit {limit}')
        header = self.data[entry.header_offset : entry.header_offset + 30]
        if len(header) < 30 or bytes(header[:4]) != b'PK\x03\x04':
            raise CheckpointFormatError(f'{where}: its local header is damaged')
        name_length, extra_length = struct.unpack('<HH', header[26:30])
        start = entry.header_offset + 30 + name_length + extra_length
        content = self.data[start : start + entry.file_size]
        if len(content) != entry.file_size:
            raise CheckpointFormatError(
                f'{where} declares {entry.file_size} bytes, the file has {len(content)} left; '
                'it is truncated, fetch it again'
            )
        if zlib.crc32(content) != entry.CRC:
            raise CheckpointFormatError(f'{where}: wrong checksum, the file is damaged')
        return content


def _not_a_zip(head: bytes) -> str:
    """What the file is instead, with the way out."""
    if not head:
        return 'the file is empty'
    if head.startswith(b'\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19'):
        return (
            'a checkpoint in the format of PyTorch before 1.6, which is one long pickle. Open it '
            'where PyTorch is installed and save it again: '
            "`torch.save(torch.load(path, weights_only=True), 'new.pt')`, or as safetensors"
        )
    if head[:1] == b'\x80':
        return f'a bare pickle, which can run code when it is opened. {WAY_OUT}'
    if head[257:262] == b'ustar':
        return f'a tar archive (the format of PyTorch before 0.1.10). {WAY_OUT}'
    if head.startswith(b'version https://git-lfs'):
        return 'a Git LFS pointer, not the file itself; run `git lfs pull`'
    if head.lstrip()[:1] == b'<':
        return 'a web page, not a checkpoint; the download link led elsewhere'
    if head[:2] == b'\x1f\x8b':
        return 'a gzip archive; unpack it first'
    return f'not a zip archive (it starts with {head[:8]!r}), so no PyTorch checkpoint since 1.6'


# What the interpreter puts on its stack besides plain values.


@dataclasses.dataclass(frozen=True)
class _Name:
    """An allowed global; REDUCE looks it up in `_Interpreter.BUILDERS`."""

    name: str


# Classes that only hold attributes, read as `Module`s: training scripts save their command lines.
_RECORDS = ('argparse.Namespace',)


@dataclasses.dataclass(frozen=True)
class _ModuleClass:
    name: str


@dataclasses.dataclass(frozen=True)
class _StorageClass:
    dtype: np.dtype | None  # None: untyped bytes


@dataclasses.dataclass(frozen=True)
class _Storage:
    data: memoryview
    dtype: np.dtype | None
    key: str


class _Refused:
    """Stands for anything made from a name that is not allowed, so that all can be listed."""


class _Interpreter:
    """Walks a pickle program and builds plain values from it."""

    def __init__(self, archive: _Archive):
        self.archive, self.path = archive, archive.path
        self.storages: dict[str, _Storage] = {}
        self.refused: dict[str, None] = {}
        self.steps = self.tensors = 0
        self.bytes = len(archive.data)
        self.builders = {
            'collections.OrderedDict': self._ordered_dict,
            'torch.Size': self._size,
            'torch.device': lambda kind, index=None: kind,
            'torch._utils._rebuild_tensor': self._tensor,
            'torch._utils._rebuild_tensor_v2': self._tensor_v2,
            'torch._utils._rebuild_tensor_v3': self._tensor_v3,
            'torch._utils._rebuild_parameter': self._parameter,
            'torch.jit._pickle.build_intlist': self._list,
            'torch.jit._pickle.build_boollist': self._list,
            'torch.jit._pickle.build_doublelist': self._list,
            'torch.jit._pickle.build_tensorlist': self._list,
            'torch.jit._pickle.restore_type_tag': lambda value, tag: value,
        }

    def run(self, program: memoryview) -> Any:
        try:
            value = self._run(bytes(program))
        except (UnsafeCheckpointError, CheckpointFormatError):
            if not self.refused:
                raise
        except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
            if not self.refused:
                raise CheckpointFormatError(
                    f'{self.path}: data.pkl is damaged ({type(error).__name__}: '
                    f'{shown(str(error))})'
                ) from None
        if self.refused:
            names = ', '.join(list(self.refused)[:20]) + (', …' if len(self.refused) > 20 else '')
            raise UnsafeCheckpointError(
                f'{self.path}: besides tensors the file holds objects that need {names}; opening '
                f'such a pickle means running code from it, so it was refused. {WAY_OUT}'
            )
        return value

    def _unsafe(self, what: str) -> UnsafeCheckpointError:
        return UnsafeCheckpointError(f'{self.path}: {what}; refused. {WAY_OUT}')

    def _spend(self, steps: int) -> None:
        """Counts instructions, and the values that one of them goes through."""
        self.steps += steps
        if self.steps > MAX_OPCODES:
            raise CheckpointFormatError(
                f'{self.path}: data.pkl takes more than {MAX_OPCODES} steps, which no checkpoint '
                f'of a network does. {WAY_OUT}'
            )

    def _run(self, program: bytes) -> Any:
        stack: list[Any] = []
        marks: list[list[Any]] = []
        memo: dict[int, Any] = {}
        for opcode, arg, _ in pickletools.genops(program):
            self._spend(1)
            match opcode.name:
                case 'PROTO' | 'FRAME':
                    pass
                case 'STOP':
                    if len(stack) != 1 or marks:
                        raise ValueError('values left on the stack')
                    return stack[0]
                case 'NONE':
                    stack.append(None)
                case 'NEWTRUE':
                    stack.append(True)
                case 'NEWFALSE':
                    stack.append(False)
                case name if name in _LITERALS:
                    stack.append(arg)
                case 'EMPTY_TUPLE':
                    stack.append(())
                case 'EMPTY_LIST':
                    stack.append([])
                case 'EMPTY_DICT':
                    stack.append({})
                case 'EMPTY_SET':
                    stack.append(set())
                case 'MARK':
                    marks.append(stack)
                    stack = []
                case 'TUPLE':
                    items, stack = stack, marks.pop()
                    stack.append(tuple(items))
                case 'LIST':
                    items, stack = stack, marks.pop()
                    stack.append(items)
                case 'DICT':
                    items, stack = stack, marks.pop()
                    stack.append({})
                    self._set_items(stack[-1], items)
                case 'TUPLE1' | 'TUPLE2' | 'TUPLE3':
                    length = int(opcode.name[-1])
                    if len(stack) < length:
                        raise IndexError('stack too short')
                    stack[-length:] = [tuple(stack[-length:])]
                case 'APPEND':
                    value = stack.pop()
                    self._extend(stack[-1], [value])
                case 'APPENDS':
                    items, stack = stack, marks.pop()
                    self._extend(stack[-1], items)
                case 'ADDITEMS':
                    items, stack = stack, marks.pop()
                    for item in items:
                        self._check_key(item)
                    if not isinstance(stack[-1], set):
                        raise self._unsafe('ADDITEMS on something that is no set')
                    stack[-1].update(items)
                case 'SETITEM':
                    value, key = stack.pop(), stack.pop()
                    self._set_items(stack[-1], [key, value])
                case 'SETITEMS':
                    items, stack = stack, marks.pop()
                    self._set_items(stack[-1], items)
                case 'POP':
                    stack.pop()
                case 'POP_MARK':
                    stack = marks.pop()
                case 'DUP':
                    stack.append(stack[-1])
                case 'BINPUT' | 'LONG_BINPUT':
                    memo[arg] = stack[-1]
                case 'MEMOIZE':
                    memo[len(memo)] = stack[-1]
                case 'BINGET' | 'LONG_BINGET':
                    stack.append(memo[arg])
                case 'GLOBAL':
                    # genops joins the two lines by a space; neither may hold one itself.
                    module, name = arg.split(' ') if arg.count(' ') == 1 else ('', arg)
                    stack.append(self._global(module, name))
                case 'STACK_GLOBAL':
                    name, module = stack.pop(), stack.pop()
                    if not isinstance(name, str) or not isinstance(module, str):
                        raise self._unsafe('a global whose name is not a string')
                    stack.append(self._global(module, name))
                case 'BINPERSID':
                    stack.append(self._persistent(stack.pop()))
                case 'REDUCE':
                    args, function = stack.pop(), stack.pop()
                    stack.append(self._reduce(function, args))
                case 'NEWOBJ':
                    args, cls = stack.pop(), stack.pop()
                    stack.append(self._new(cls, args))
                case 'BUILD':
                    state = stack.pop()
                    self._build(stack[-1], state)
                case name:
                    raise self._unsafe(f'its pickle uses {name}, which PyTorch never writes')
        raise ValueError('no end')

    # Containers: only plain ones may grow, only plain values may be keys.

    def _extend(self, target: Any, items: list[Any]) -> None:
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, _Refused):
            raise self._unsafe('APPEND on something that is no list')

    def _set_items(self, target: Any, items: list[Any]) -> None:
        if isinstance(target, _Refused):
            return
        if not isinstance(target, dict) or len(items) % 2:
            raise self._unsafe('SETITEM on something that is no dict')
        for key, value in zip(items[::2], items[1::2]):
            self._check_key(key)
            target[key] = value

    def _check_key(self, key: Any) -> None:
        if key is not None and not isinstance(key, (str, int, float, bytes)):
            raise self._unsafe(f'a dict key of type {type(key).__name__}')
        # Python's hash of integers is no secret: long ones can be made to collide, all of them.
        if isinstance(key, int) and not -(1 << 63) <= key < 1 << 64:
            raise self._unsafe('a dict key of more than 64 bits')

    # Names, and what may be done with them.

    def _global(self, module: str, name: str) -> Any:
        full = f'{module}.{name}'
        if full in self.builders:
            return _Name(full)
        if full in _RECORDS or module == '__torch__' or module.startswith('__torch__.'):
            return _ModuleClass(full)
        if module == 'torch' and name in _STORAGES:
            return _StorageClass(_DTYPES[_STORAGES[name]])
        if module == 'torch' and name in _DTYPES:
            return name
        if full == 'torch.storage.UntypedStorage':
            return _StorageClass(None)
        if len(self.refused) <= 20:
            self.refused[shown(full)] = None
        return _Refused()

    def _reduce(self, function: Any, args: Any) -> Any:
        if isinstance(function, _Refused):
            return function
        if not isinstance(function, _Name) or not isinstance(args, tuple):
            raise self._unsafe(f'its pickle calls {_describe(function)}')
        if any(isinstance(arg, _Refused) for arg in args):
            return _Refused()
        try:
            return self.builders[function.name](*args)
        except TypeError:
            raise self._unsafe(f'its pickle calls {function.name} with odd arguments') from None

    def _new(self, cls: Any, args: Any) -> Any:
        if isinstance(cls, _Refused):
            return cls
        if not isinstance(cls, _ModuleClass) or args != ():
            raise self._unsafe(f'its pickle makes an object of {_describe(cls)}')
        return Module(cls.name)

    def _build(self, target: Any, state: Any) -> None:
        if isinstance(target, _Refused) or isinstance(state, _Refused):
            return
        if not isinstance(state, dict) or not all(
            isinstance(key, str) and not (key.startswith('__') and key.endswith('__'))
            for key in state
        ):
            raise self._unsafe(f'its pickle sets a custom state on {_describe(target)}')
        self._spend(len(state))
        if isinstance(target, Module):
            target.attributes.update(state)
        elif not isinstance(target, dict):  # A state dict carries `_metadata`: not needed.
            raise self._unsafe(f'its pickle sets attributes on {_describe(target)}')

    def _persistent(self, pid: Any) -> Any:
        if isinstance(pid, tuple) and any(isinstance(part, _Refused) for part in pid):
            return _Refused()
        match pid:
            case ('storage', _StorageClass(dtype), str(key), str(), int(numel)):
                pass
            case _:
                raise self._unsafe('a persistent id that is no storage')
        if not re.fullmatch(r'[0-9A-Za-z_]{1,64}', key):
            raise self._unsafe(f'a storage named {shown(key)}')
        itemsize = 1 if dtype is None else dtype.itemsize
        if key not in self.storages:
            self.storages[key] = _Storage(self.archive.read(f'data/{key}'), dtype, key)
        storage = self.storages[key]
        if storage.dtype != dtype or numel < 0 or numel * itemsize != len(storage.data):
            raise CheckpointFormatError(
                f'{self.path}: storage {key} has {len(storage.data)} bytes, but is declared as '
                f'{numel} elements of {dtype or "one byte"}'
            )
        return storage

    # The allowed builders.

    def _ordered_dict(self, pairs: Any = ()) -> dict:
        if not isinstance(pairs, (list, tuple)):
            raise TypeError
        self._spend(len(pairs))
        items: dict = {}
        for pair in pairs:
            if not isinstance(pair, (list, tuple)) or len(pair) != 2:
                raise TypeError
            self._set_items(items, list(pair))
        return items

    def _size(self, sizes: Any) -> tuple:
        if not isinstance(sizes, tuple):
            raise TypeError
        return sizes

    def _list(self, values: Any) -> list:
        if not isinstance(values, list):
            raise TypeError
        return values

    def _parameter(self, data: Any, requires_grad: Any = None, hooks: Any = None) -> np.ndarray:
        if not isinstance(data, np.ndarray):
            raise self._unsafe('a parameter that holds no tensor')
        return data

    def _tensor_v2(self, storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> np.ndarray:
        return self._tensor(storage, offset, size, stride)

    def _tensor_v3(
        self, storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, *rest: Any
    ) -> np.ndarray:
        if not rest or not isinstance(rest[0], str) or rest[0] not in _DTYPES:
            raise self._unsafe('a tensor of unknown type')
        return self._tensor(storage, offset, size, stride, _DTYPES[rest[0]])

    def _tensor(
        self, storage: Any, offset: Any, size: Any, stride: Any, dtype: np.dtype | None = None
    ) -> np.ndarray:
        if not isinstance(storage, _Storage):
            raise self._unsafe('a tensor that has no storage')
        dtype = dtype or storage.dtype
        if dtype is None:
            raise self._unsafe('a tensor without a type')
        if not isinstance(size, tuple) or not isinstance(stride, tuple):
            raise self._unsafe('a tensor whose size is no tuple')
        if (
            len(size) != len(stride)
            or len(size) > MAX_AXES
            or not all(type(n) is int and 0 <= n < 1 << 48 for n in (offset, *size, *stride))
        ):
            raise CheckpointFormatError(
                f'{self.path}: a tensor with offset {shown(offset)}, size {shown(size)} and stride '
                f'{shown(stride)}, which no network has'
            )
        self.tensors += 1
        if self.tensors > MAX_TENSORS:
            raise CheckpointFormatError(f'{self.path}: more than {MAX_TENSORS} tensors')
        available = len(storage.data) // dtype.itemsize
        numel = math.prod(size)
        last = offset + sum((n - 1) * step for n, step in zip(size, stride)) if numel else offset
        if last > available or (numel and last >= available):
            raise CheckpointFormatError(
                f'{self.path}: a tensor of size {tuple(size)}, stride {tuple(stride)} at offset '
                f'{offset} reaches outside its storage {storage.key} of {available} elements'
            )
        if numel * dtype.itemsize > max(self.bytes, 1 << 20):
            raise CheckpointFormatError(
                f'{self.path}: an expanded tensor of size {tuple(size)} is larger than the file'
            )
        if not numel:
            return np.zeros(size, dtype)
        flat = np.frombuffer(storage.data, dtype, available)
        steps = tuple(step * dtype.itemsize for step in stride)
        return np.lib.stride_tricks.as_strided(flat[offset:], size, steps, writeable=False)


def _describe(value: Any) -> str:
    name = getattr(value, 'name', None) or getattr(value, 'class_name', None)
    return shown(name) if name else f'a value of type {type(value).__name__}'
