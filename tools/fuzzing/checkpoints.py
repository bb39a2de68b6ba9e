"""Checkpoints for the fuzz: recorded ones damaged, and small ones that ask for the world."""

from __future__ import annotations

import itertools
import json
import os
import pickletools
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tools.fuzzing import damage
from tools.fuzzing.child import Input
from tools.fuzzing.damage import Rng
from tools.fuzzing.torch_files import (
    Build,
    Global,
    New,
    Pairs,
    Persistent,
    Raw,
    Reduce,
    Tensor,
    assemble,
    program,
    save_state_dict,
    write_zip,
)

CONFIGS = ('config.json', 'open_clip_config.json')


def read(path: Path) -> None:
    """Opens a checkpoint as `dist_jax convert` does, and makes all that it would write."""
    from dist_jax import convert
    from dist_jax.models.naming import Options
    from dist_jax.models.params import tree_sha256
    from dist_jax.models.source_files import open_source

    source = open_source(path)
    _, params = convert.read_params(source, convert.detect(source), Options())
    tree_sha256(params)


def prepare(folder: Path, golden: Path) -> list[Input]:
    """Writes good checkpoints of every kind, each a folder, from the recorded ones of the tests."""
    from safetensors.numpy import load_file, save_file

    os.environ.setdefault('JAX_PLATFORMS', 'cpu')  # of the child, too
    clip = golden / 'clip'
    config = {'model_cfg': {'quick_gelu': False, 'vision_cfg': {'head_width': 64}, 'text_cfg': {}}}
    seeds = {
        'hf': {
            file.name: file.read_bytes()
            for file in (clip / 'hf').iterdir()
            if file.name != 'expected.safetensors'
        },
        'openai': {'model.pt': (clip / 'openai' / 'tiny.pt').read_bytes()},
        'openclip': {
            'open_clip_model.safetensors': (
                clip / 'openclip_gelu' / 'open_clip_model.safetensors'
            ).read_bytes(),
            'open_clip_config.json': json.dumps(config).encode(),
        },
        'openclip_pt': {
            'model.pt': (clip / 'openclip_pt' / 'epoch_1.pt').read_bytes(),
            'open_clip_config.json': json.dumps(config).encode(),
        },
    }
    for name, files in seeds.items():
        (folder / name).mkdir(parents=True)
        for file, content in files.items():
            (folder / name / file).write_bytes(content)
    for name, parts in (('dist', ('params/', 'backbone/')), ('evl', ('params/',))):
        recorded = load_file(golden / f'{name}_small.safetensors')
        tensors = {k.split('/', 1)[1]: v for k, v in recorded.items() if k.startswith(parts)}
        (folder / name).mkdir()
        if name == 'dist':
            save_file(tensors, folder / name / 'model.safetensors')
        else:
            save_state_dict(folder / name / 'model.pth', tensors, lambda t: {'model': t})
    return [Input(path, path.name) for path in sorted(folder.iterdir())]


def write(seeds: list[Input], folder: Path, rng: Rng, number: int) -> Input:
    """Writes one bad checkpoint into a folder; a kind of damage after the other."""
    names = list(WAYS)
    origin = names[number % len(names)]
    folder.mkdir()
    WAYS[origin](seeds, folder, rng, number // len(names))
    return Input(folder, origin)


# The ways: (good checkpoints, an empty folder, rng, how often the way was taken before).


def _copy(seed: Input, folder: Path) -> list[Path]:
    """A good checkpoint to damage; its files."""
    files = []
    for file in sorted(seed.path.iterdir()):
        (folder / file.name).write_bytes(file.read_bytes())
        files.append(folder / file.name)
    return files


def _pick(seeds: list[Input], rng: Rng, suffix: str) -> Input:
    having = [seed for seed in seeds if any(seed.path.glob(f'*{suffix}'))]
    return having[rng.integers(len(having))]


def _damage_bytes(seeds: list[Input], folder: Path, rng: Rng, turn: int) -> None:
    files = _copy(seeds[turn % len(seeds)], folder)
    file, other = (files[k] for k in rng.integers(len(files), size=2))
    file.write_bytes(damage.bytes_of(file.read_bytes(), other.read_bytes(), rng))


def _damage_json(seeds: list[Input], folder: Path, rng: Rng, turn: int) -> None:
    files = [file for file in _copy(_pick(seeds, rng, '.json'), folder) if file.suffix == '.json']
    file = files[rng.integers(len(files))]
    file.write_bytes(damage.json_of(json.loads(file.read_text()), rng))


def _damage_header(seeds: list[Input], folder: Path, rng: Rng, turn: int) -> None:
    """The JSON of a safetensors file, with the right length before it or a wrong one."""
    files = _copy(_pick(seeds, rng, '.safetensors'), folder)
    files = [file for file in files if file.suffix == '.safetensors']
    file = files[rng.integers(len(files))]
    data = file.read_bytes()
    end = 8 + int.from_bytes(data[:8], 'little')
    header = json.loads(data[8:end])
    if rng.random() < 0.5:  # the shapes, offsets and dtype of one tensor
        entry = header[list(header)[rng.integers(len(header))]]
        at = list(entry)[rng.integers(len(entry))]
        other = [[0, 2**64 - 1], [2**40], [0] * 10**5, [4, 4], [0, 0], 'F8_E4M3', 'I64', [], -1]
        entry[at] = other[rng.integers(len(other))]
        text = json.dumps(header).encode()
    else:
        text = damage.json_of(header, rng)
    length = len(text)
    if rng.random() < 0.3:
        length = int(rng.choice([0, 1, length - 1, 2**20, 2**31, 2**53, 2**62]))
    file.write_bytes(length.to_bytes(8, 'little') + text + data[end:])


def _damage_tensors(seeds: list[Input], folder: Path, rng: Rng, turn: int) -> None:
    """Names and shapes of some tensors are others; the container is sound."""
    from safetensors.numpy import save_file

    from dist_jax.models.source_files import open_source

    seed = seeds[turn % len(seeds)]
    tensors = dict(open_source(seed.path).tensors)
    names = list(tensors)
    for _ in range(rng.integers(1, 4)):
        name = names[rng.integers(len(names))]
        value = tensors.pop(name, None)
        if value is None or rng.random() < 0.2:
            continue
        shape = tuple(int(n) for n in rng.choice([0, 1, 2, 3, 64, 128], int(rng.integers(6))))
        number = next((part for part in name.split('.') if part.isdecimal()), 'x')
        what = rng.integers(7)
        if what == 0:
            tensors[name] = np.zeros(shape, value.dtype)
        elif what == 1:
            tensors[name] = np.swapaxes(value, 0, -1) if value.ndim else value[None]
        elif what == 2:
            tensors[name] = value.reshape(-1)
        elif what == 3:
            tensors[name] = np.full(value.shape, np.nan, np.float32)
        elif what == 4:
            far = str(rng.choice(['1', '7', '999', '99999', '9' * 400, '٣', '-1']))
            tensors[name.replace(f'.{number}.', f'.{far}.')] = value
        elif what == 5:
            tensors[name] = np.zeros(value.shape, np.int8)
        else:
            tensors[damage.WORDS[rng.integers(len(damage.WORDS))]] = value
    for config in CONFIGS:
        if (seed.path / config).exists():
            (folder / config).write_bytes((seed.path / config).read_bytes())
    tensors = {name: np.array(value, order='C') for name, value in tensors.items()}
    if rng.random() < 0.5:
        save_file(tensors, folder / 'model.safetensors')
    else:
        save_state_dict(folder / 'model.pt', tensors)


def _entries(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def _repack(path: Path, entries: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, 'w') as archive:
        for name, content in entries.items():
            archive.writestr(name, content)


def _torch_file(seeds: list[Input], folder: Path, rng: Rng) -> Path:
    files = _copy(_pick(seeds, rng, '.pt*'), folder)
    return next(file for file in files if file.suffix.startswith('.pt'))


def _damage_pickle(seeds: list[Input], folder: Path, rng: Rng, turn: int) -> None:
    """Bytes of the program, in an archive that is sound."""
    path = _torch_file(seeds, folder, rng)
    entries = _entries(path)
    name = next(name for name in entries if name.endswith('data.pkl'))
    entries[name] = damage.bytes_of(entries[name], program({'a': [1, 2]}), rng)
    _repack(path, entries)


def _shuffle_pickle(seeds: list[Input], folder: Path, rng: Rng, turn: int) -> None:
    """Whole instructions are missing, doubled, moved or new."""
    path = _torch_file(seeds, folder, rng)
    entries = _entries(path)
    name = next(name for name in entries if name.endswith('data.pkl'))
    code = entries[name]
    places = [position for _, _, position in pickletools.genops(code)] + [len(code)]
    parts = [code[a:b] for a, b in itertools.pairwise(places)]
    for _ in range(rng.integers(1, 6)):
        a, b = sorted(rng.integers(len(parts), size=2).tolist())
        what = rng.integers(4)
        if what == 0:
            del parts[a : min(b, a + 5)]
        elif what == 1:
            parts[a:a] = parts[b : b + int(rng.integers(1, 20))]
        elif what == 2:
            parts[a], parts[b] = parts[b], parts[a]
        else:
            parts.insert(a, _instruction(rng))
    entries[name] = b''.join(parts)
    _repack(path, entries)


def _random_pickle(seeds: list[Input], folder: Path, rng: Rng, turn: int) -> None:
    """A program of random instructions, those that PyTorch writes before others."""
    code = b''.join(_instruction(rng) for _ in range(int(rng.integers(5, 300))))
    write_zip(folder / 'a.pt', b'\x80\x02' + code + b'.', {'0': bytes(16)})


def _instruction(rng: Rng) -> bytes:
    common = (
        *(b'N', b'\x88', b')', b']', b'}', b'\x8f', b'(', b't', b'l', b'd', b'\x85', b'\x86'),
        *(
            b'\x87',
            b'a',
            b'e',
            b's',
            b'u',
            b'0',
            b'1',
            b'2',
            b'2',
            b'R',
            b'\x81',
            b'b',
            b'Q',
            b'\x94',
        ),
        *(b'q\x00', b'q\x01', b'h\x00', b'h\x00', b'h\x01', b'j\xff\xff\xff\xff', b'\x90'),
        *(assemble(v) for v in (0, 1, -1, 2**40, 1.5, 'a', 'x' * 300, 'storage', '0', 'cpu')),
        *(
            assemble(Global('torch._utils', f'_rebuild_{what}'))
            for what in ('tensor', 'tensor_v2', 'tensor_v3', 'parameter')
        ),
        *(
            assemble(Global(module, name))
            for module, name in (
                ('collections', 'OrderedDict'),
                ('torch', 'Size'),
                ('torch', 'device'),
                ('torch', 'FloatStorage'),
                ('torch.jit._pickle', 'build_intlist'),
                ('torch.jit._pickle', 'restore_type_tag'),
                ('__torch__.a', 'B'),
                ('os', 'system'),
            )
        ),
        assemble(Tensor('0', 'float32', 4, 0, (2, 2), (2, 1))),
        assemble(Persistent(('storage', Global('torch', 'FloatStorage'), '0', 'cpu', 4))),
        assemble(Tensor('0', 'float32', 4, 0, (2, 2), (2, 1))),
    )
    if rng.random() < 0.9:
        return common[rng.integers(len(common))]
    opcode = pickletools.opcodes[rng.integers(len(pickletools.opcodes))]
    return opcode.code.encode('latin-1') + rng.bytes(int(rng.choice([0, 1, 2, 4, 8])))


def _lie_in_zip(seeds: list[Input], folder: Path, rng: Rng, turn: int) -> None:
    """Sizes, offsets and counts of the archive's records are others."""
    path = _torch_file(seeds, folder, rng)
    data = bytearray(path.read_bytes())
    for _ in range(rng.integers(1, 4)):
        mark = (b'PK\x01\x02', b'PK\x01\x02', b'PK\x03\x04', b'PK\x05\x06')[rng.integers(4)]
        places, at = [], data.find(mark)
        while at >= 0:
            places.append(at)
            at = data.find(mark, at + 1)
        width = int(rng.choice([2, 4]))
        at = places[rng.integers(len(places))] + 4 + 2 * int(rng.integers(21))
        value = int(rng.choice([0, 1, 8, 2**15, 2**16 - 1, 2**31, 2**32 - 1, len(data)]))
        if at + width <= len(data):
            data[at : at + width] = (value % 2 ** (8 * width)).to_bytes(width, 'little')
    path.write_bytes(data)


def _foreign(seeds: list[Input], folder: Path, rng: Rng, turn: int) -> None:
    """Something else under the name of a checkpoint."""
    good = seeds[turn % len(seeds)].path
    name = ('a.pt', 'model.safetensors', 'pytorch_model.bin', 'model.safetensors.index.json')[
        rng.integers(4)
    ]
    path = folder / name
    match turn % 8:
        case 0:
            os.mkfifo(path)
        case 1:
            path.symlink_to(path)
        case 2:
            path.mkdir()
        case 3:
            path.symlink_to('/dev/zero')
        case 4:
            path.write_bytes(b'')
        case 5:
            path.write_bytes(rng.bytes(int(rng.integers(1, 10_000))))
        case 6:
            path.write_bytes((b'<html>', b'\x1f\x8b', b'\x80\x02.', b'PK\x03\x04')[rng.integers(4)])
        case _:
            os.mkfifo(folder / CONFIGS[rng.integers(2)])
            (folder / 'model.pt').write_bytes(next(good.glob('*')).read_bytes())


def _hostile(seeds: list[Input], folder: Path, rng: Rng, turn: int) -> None:
    name = list(HOSTILE)[turn % len(HOSTILE)]
    HOSTILE[name](folder / 'a.pt', int(rng.choice([20, 40, 60])))


WAYS: dict[str, Callable[[list[Input], Path, Rng, int], None]] = {
    'bytes of a file': _damage_bytes,
    'configs and index': _damage_json,
    'safetensors header': _damage_header,
    'names and shapes': _damage_tensors,
    'bytes of a pickle': _damage_pickle,
    'instructions moved': _shuffle_pickle,
    'random program': _random_pickle,
    'zip records': _lie_in_zip,
    'no checkpoint': _foreign,
    'hostile program': _hostile,
}


# Programs of a few hundred bytes: (file to write, levels).


def _doubled(pair: bytes, levels: int, first: bytes) -> bytes:
    """`first`, then at every level `pair` around twice the one below."""
    return first + b''.join(b'2' + pair for _ in range(levels))


def _nested(value: Any, levels: int) -> Any:
    for _ in range(levels * 1000):
        value = Raw(assemble(value) + b'\x85')  # TUPLE1
    return value


def _reduce(name: str, *args: bytes) -> bytes:
    module, _, function = name.rpartition('.')
    return assemble(Global(module, function)) + b'(' + b''.join(args) + b'tR'


def _save(value: Any, storages: dict[str, bytes] | None = None):
    """A maker of files with that value, or with what it is for a number of levels."""

    def write_file(path: Path, levels: int) -> None:
        content = value(levels) if callable(value) else value
        write_zip(path, Raw(content) if isinstance(content, bytes) else content, storages)

    return write_file


_TENSOR = assemble(Tensor('0', 'float32', 4, 0, (4,), (1,)))
_STORAGE = assemble(Persistent(('storage', Global('torch', 'FloatStorage'), '0', 'cpu', 4)))
_ONE = {'0': bytes(16)}


def _tensor(offset: bytes, size: bytes, stride: bytes) -> bytes:
    return _reduce('torch._utils._rebuild_tensor_v2', _STORAGE, offset, size, stride, b'\x89', b'}')


def _twice(levels: int) -> bytes:
    return _doubled(b'\x86', levels, assemble((1,)))


def _doubled_modules(levels: int) -> bytes:
    """Modules that print as 2 ** levels of them."""
    code = assemble(Build(New(Global('__torch__.a', 'B')), {'a': 1})) + b'q\x00'
    for _ in range(levels):
        code += b'0' + assemble(New(Global('__torch__.a', 'B')))
        code += b'}(' + assemble('a') + b'h\x00' + assemble('b') + b'h\x00ubq\x00'
    return code


def _doubled_dicts(levels: int, key: str) -> bytes:
    code = b'}(' + assemble('w') + _TENSOR + b'uq\x00'
    for _ in range(levels):
        code += b'0}(' + assemble(f'{key}a') + b'h\x00' + assemble(f'{key}b') + b'h\x00uq\x00'
    return b'}(' + assemble('w') + _TENSOR + assemble('state_dict') + code + b'u'


def _wrapped_in_itself(key: str) -> bytes:
    return b'}q\x00(' + assemble(key) + b'h\x00u'


def _copies(name: str, argument: bytes) -> Callable[[int], bytes]:
    """One call after the other over the same large argument."""
    module, _, function = name.rpartition('.')
    call = assemble(Global(module, function)) + b'q\x01' + argument + b'\x85q\x02'
    return lambda levels: call + b'h\x01h\x02R' * (levels * 1000)


def _colliding(levels: int) -> bytes:
    """Keys of one hash."""
    keys = (assemble((k + 1) * (2**61 - 1) * 2**40) for k in range(levels * 500))
    return b'}(' + b''.join(key + b'N' for key in keys) + b'u'


def _headers(path: Path, text: str, length: int | None = None, data: bytes = b'') -> None:
    raw = text.encode()
    length = len(raw) if length is None else length
    path.with_name('model.safetensors').write_bytes(struct.pack('<Q', length) + raw + data)


def _zip_of_zeros(path: Path, levels: int) -> None:
    value = {'w': Tensor('0', 'uint8', levels << 20, 0, (levels << 20,), (1,))}
    write_zip(path, value, {'0': bytes(levels << 20)}, compression=zipfile.ZIP_DEFLATED)


def _two_entries(path: Path, levels: int) -> None:
    with zipfile.ZipFile(path, 'w') as archive:
        for _ in range(levels):
            archive.writestr('a/data.pkl', program({}))
            archive.filelist[-1].filename = 'a/data.pkl'
            archive.NameToInfo.clear()


def _many_entries(path: Path, levels: int) -> None:
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('a/data.pkl', program({}))
        for k in range(levels * 200):
            archive.writestr(f'a/data/{k}', b'')


def _many_blocks(path: Path, levels: int) -> None:
    """One real block of a tower and thousands that a stacked leaf would be made for."""
    one = np.zeros((64, 64), np.float32)
    tensors = {
        'visual.conv1.weight': np.zeros((64, 3, 2, 2), np.float32),
        'visual.proj': one,
        'visual.positional_embedding': np.zeros((5, 64), np.float32),
        'token_embedding.weight': one,
        'positional_embedding': one,
        'visual.transformer.resblocks.0.mlp.c_fc.weight': np.zeros((256, 64), np.float32),
        'visual.transformer.resblocks.0.mlp.c_fc.bias': np.zeros(256, np.float32),
        'transformer.resblocks.0.mlp.c_fc.bias': np.zeros(256, np.float32),
    }
    for k in range(levels * 100):
        tensors[f'visual.transformer.resblocks.{k}.x'] = np.zeros(1, np.float32)
    save_state_dict(path, tensors)
    config = {'model_cfg': {'quick_gelu': True, 'vision_cfg': {}, 'text_cfg': {}}}
    path.with_name('open_clip_config.json').write_text(json.dumps(config))


HOSTILE: dict[str, Callable[[Path, int], None]] = {
    'dict in itself': _save(_wrapped_in_itself('a')),
    'model in itself': _save(_wrapped_in_itself('model')),
    'state_dict in itself': _save(_wrapped_in_itself('state_dict')),
    'module in itself': _save(
        assemble(New(Global('__torch__.a', 'B'))) + b'q\x00}(' + assemble('a') + b'h\x00ub'
    ),
    'list in itself': _save(b']q\x00h\x00a'),
    'list in a tuple in itself': _save(b']q\x00h\x00\x85a'),
    'list in itself as a size': _save(
        lambda levels: _tensor(b'K\x00', b']q\x05h\x05a', assemble((1,))), _ONE
    ),
    'tuples doubled': _save(_twice),
    'tuples doubled as a device': _save(lambda n: _reduce('torch.device', _twice(n))),
    'text doubled as devices': _save(
        lambda n: (
            assemble(Global('torch', 'device'))
            + b'q\x01'
            + assemble('x' * 100)
            + b'q\x02'
            + b'0' * 2
            + b'h\x02q\x02'
            + b''.join(b'h\x01h\x02h\x02\x86Rq\x02' for _ in range(n))
        )
    ),
    'tuples doubled as a size': _save(
        lambda n: _tensor(b'K\x00', _twice(n), assemble((1, 1))), _ONE
    ),
    'tuples doubled as an offset': _save(
        lambda n: _tensor(_twice(n), assemble((1,)), assemble((1,))), _ONE
    ),
    'tuples doubled as a key': _save(lambda n: b'}' + _twice(n) + b'Ns'),
    'tuples doubled as an id': _save(lambda n: _twice(n) + b'Q'),
    'tuples doubled as a call': _save(lambda n: _twice(n) + b')R'),
    'tuples doubled as pairs': _save(lambda n: _reduce('collections.OrderedDict', _twice(n))),
    'modules doubled as an offset': _save(
        lambda n: _tensor(_doubled_modules(n), assemble((1,)), assemble((1,))), _ONE
    ),
    'deep tuples': _save(lambda n: _nested(1, 1) if n else None),
    'deep tuples as a device': _save(lambda n: _reduce('torch.device', assemble(_nested(1, 1)))),
    'deep lists': _save(lambda n: b']' * (n * 1000) + b'a' * (n * 1000 - 1)),
    'deep dicts': _save(lambda n: b'}' + (assemble('a') + b'}') * n + b's' * n, _ONE),
    'dicts doubled': _save(lambda n: _doubled_dicts(n, ''), _ONE),
    'dicts doubled, long names': _save(lambda n: _doubled_dicts(min(n, 18), 'x' * 20_000), _ONE),
    'copies of an integer list': _save(
        _copies('torch.jit._pickle.build_intlist', b'](' + b'K\x00' * 20_000 + b'e')
    ),
    'copies of a size': _save(_copies('torch.Size', b'(' + b'K\x00' * 20_000 + b't')),
    'copies of text as a list': _save(
        _copies('torch.jit._pickle.build_intlist', assemble('x' * 200_000))
    ),
    'copies of pairs': _save(
        _copies(
            'collections.OrderedDict',
            b'](' + b''.join(assemble(k) + b'N\x86' for k in range(10_000)) + b'e',
        )
    ),
    'copies of attributes': _save(
        lambda n: (
            assemble({f'a{k}': None for k in range(5000)})
            + b'q\x01'
            + (assemble(New(Global('__torch__.a', 'B'))) + b'h\x01b') * (n * 100)
        )
    ),
    'keys of one hash': _save(_colliding),
    'set of one hash': _save(lambda n: b'\x8f(' + _colliding(n)[2:-1].replace(b'N', b'') + b'\x90'),
    'long integers': _save(
        lambda n: (b'\x8b' + struct.pack('<I', n << 14) + b'\x7f' * (n << 14)) * 4
    ),
    'long integer as a size': _save(
        lambda n: _tensor(
            b'K\x00', b'(\x8b\x00\x40\x00\x00' + b'\x7f' * 0x4000 + b't', b'K\x01\x85'
        ),
        _ONE,
    ),
    'long integer as a key': _save(
        lambda n: b'}\x8b\x00\x40\x00\x00' + b'\x7f' * 0x4000 + _TENSOR + b's', _ONE
    ),
    'length of a long integer': _save(b'\x8b\xff\xff\xff\x7f'),
    'length of text': _save(b'X\xff\xff\xff\xff'),
    'length of bytes': _save(b'\x8e\xff\xff\xff\xff\xff\xff\xff\x7f'),
    'memo far away': _save(b'Nr\xff\xff\xff\xffj\xff\xff\xff\xff'),
    'memo that is not there': _save(b'h\x07'),
    'stack ends': _save(b'0000'),
    'marks end': _save(b'tttt'),
    'many marks': _save(lambda n: b'(' * (n * 10_000)),
    'many sets': _save(lambda n: b'\x8f' * (n * 10_000)),
    'endless program': _save(lambda n: b'N0' * (n * 50_000)),
    'many tensors': _save(
        lambda n: (
            assemble(Global('torch._utils', '_rebuild_tensor_v2'))
            + b'q\x01('
            + _STORAGE
            + assemble(0)
            + assemble((4,))
            + assemble((1,))
            + b'\x89}tq\x02'
            + b'h\x01h\x02R' * (n * 3000)
        ),
        _ONE,
    ),
    'strides of nothing': _save(
        lambda n: {'w': Tensor('0', 'uint8', 1, 0, (10**12,), (0,))}, {'0': b'x'}
    ),
    'many views of a storage': _save(
        lambda n: {f'w{k}': Tensor('0', 'uint8', 1, 0, (1 << 20,), (0,)) for k in range(n * 20)},
        {'0': b'x'},
    ),
    'empty and huge': _save(
        lambda n: {'w': Tensor('0', 'float32', 4, 0, (0, 2**47, 2**47), (1, 1, 1))}, _ONE
    ),
    'storage that is larger': _save({'w': Tensor('0', 'float32', 2**40, 0, (4,), (1,))}, _ONE),
    'names of control signs': _save({'\x1b[2J\r': Tensor('0', 'float32', 4, 0, (4,), (1,))}, _ONE),
    'names of half a sign': _save(
        lambda n: b'}(X\x03\x00\x00\x00\xed\xa0\x80' + _TENSOR + b'u', _ONE
    ),
    'prefix a thousand times': _save(
        lambda n: {'module.' * (n * 1000) + 'w': Tensor('0', 'float32', 4, 0, (4,), (1,))}, _ONE
    ),
    'many names of code': _save(
        lambda n: Pairs([(k, Reduce(Global('a' * 500, f'b{k}'), ())) for k in range(n * 100)])
    ),
    'compressed': _zip_of_zeros,
    'two entries of a name': _two_entries,
    'many entries': _many_entries,
    'many blocks': _many_blocks,
    'header without end': lambda path, n: _headers(path, '{', 2**62),
    'header of a gigabyte': lambda path, n: _headers(path, '{', 2**30),
    'header of spaces': lambda path, n: _headers(path, '{}' + ' ' * (n << 19)),
    'header of many tensors': lambda path, n: _headers(
        path,
        json.dumps(
            {str(k): {'dtype': 'U8', 'shape': [0], 'data_offsets': [0, 0]} for k in range(n * 3000)}
        ),
    ),
    'deep header': lambda path, n: _headers(path, '{"a":' * 5000 + '1' + '}' * 5000),
    'header of one name twice': lambda path, n: _headers(
        path,
        '{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},'
        '"a":{"dtype":"F32","shape":[1,9],"data_offsets":[0,4]}}',
        None,
        bytes(4),
    ),
    'overlapping tensors': lambda path, n: _headers(
        path,
        '{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},'
        '"b":{"dtype":"U8","shape":[4],"data_offsets":[2,6]}}',
        None,
        bytes(6),
    ),
    'empty and huge header': lambda path, n: _headers(
        path, '{"a":{"dtype":"U8","shape":[0,18446744073709551615],"data_offsets":[0,0]}}'
    ),
    'rank of a thousand': lambda path, n: _headers(
        path,
        '{"a":{"dtype":"U8","shape":[%s1],"data_offsets":[0,1]}}' % ('1,' * 1000),
        None,
        b'x',
    ),
}
