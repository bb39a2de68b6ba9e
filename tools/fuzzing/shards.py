"""Built data sets for the fuzz: their index, its arrays and the shards damaged."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np

from tools.fuzzing import damage
from tools.fuzzing.child import Input
from tools.fuzzing.damage import Rng

SPLIT = 'train'
_ARRAYS = f'{SPLIT}.index.npz'


def read(path: Path) -> None:
    """Opens the split and reads every record; raises the first error of a record at the end."""
    from input_pipeline.records import open_built

    source = open_built(path, SPLIT)
    first = None
    for k in range(len(source)):
        record = source[k]
        try:
            record.load()
        except OSError as error:  # such a record counts as unreadable, the others are read
            first = first or error
        if k == 1000:  # an index may claim more records than there is time for
            break
    if first is not None:
        raise first


def prepare(folder: Path) -> list[Input]:
    """Builds a small data set."""
    from dist_jax.dataset import build
    from input_pipeline import motion_clips

    clips, out = folder / 'clips', folder / 'built'
    folder.mkdir(parents=True)
    motion_clips.generate(clips, num_train=18, num_val=10, size=48, num_frames=16)
    words = ['motion_clips', '--annotations', clips, '--videos', clips, '--out', out]
    words += ['--records_per_shard', 4, '--workers', 0]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        code = build.main(list(map(str, words)))
    if code:
        raise RuntimeError(f'the data set could not be built: {printed.getvalue()}')
    return [Input(out, 'built')]


def write(seeds: list[Input], folder: Path, rng: Rng, number: int) -> Input:
    """Writes a copy of the data set and damages it; a kind of damage after the other."""
    shutil.copytree(seeds[0].path, folder)
    origin = list(WAYS)[number % len(WAYS)]
    WAYS[origin](folder, rng)
    return Input(folder, origin)


def _index(folder: Path, rng: Rng) -> None:
    path = folder / 'index.json'
    if rng.random() < 0.3:
        path.write_bytes(damage.bytes_of(path.read_bytes(), b'', rng))
    else:
        path.write_bytes(damage.json_of(json.loads(path.read_text()), rng))


def _array_bytes(folder: Path, rng: Rng) -> None:
    path = folder / _ARRAYS
    path.write_bytes(damage.bytes_of(path.read_bytes(), b'', rng))


def _arrays(folder: Path, rng: Rng) -> None:
    """One array of the index has other values, another type or shape, or is missing."""
    with np.load(folder / _ARRAYS) as archive:
        arrays = dict(archive)
    name = list(arrays)[rng.integers(len(arrays))]
    array = arrays[name]
    match rng.integers(9):
        case 0:
            del arrays[name]
        case 1:
            arrays[name] = array[: len(array) // 2]
        case 2:
            kinds = ['S8', 'U9'] if array.dtype.kind == 'U' else ['f4', 'S8', 'U9', 'i1', 'u8', '?']
            arrays[name] = array.astype(rng.choice(kinds))
        case 3:
            arrays[name] = array.reshape(-1, 1, 1)
        case 4:
            arrays[name] = np.array(3)
        case 5:
            arrays[name] = np.array([None, {'a': 1}], object)
        case 6:
            arrays[name] = np.concatenate([array, array])
        case 7:
            arrays[name] = array[::-1]
        case _:
            if array.dtype.kind in 'iu' and array.size:
                kind = np.iinfo(array.dtype)
                values = [0, -1, 1, 10**6, kind.max, kind.min, kind.max // 2]
                wanted = int(rng.choice(values))
                array.flat[rng.integers(array.size)] = max(kind.min, min(kind.max, wanted))
            elif array.dtype.kind == 'U':
                array[0] = rng.choice(['../../etc/passwd', '/dev/zero', '', 'a\x1bb', '.'])
    file = io.BytesIO()
    np.savez(file, **arrays)
    (folder / _ARRAYS).write_bytes(file.getvalue())


def _array_headers(folder: Path, rng: Rng) -> None:
    """The header of an array says another shape or type than its bytes have."""
    path = folder / _ARRAYS
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    name = list(entries)[rng.integers(len(entries))]
    data = entries[name]
    end = data.index(b'}') + 1
    shapes = ('(1000000000000,)', '(0, 5)', '(-1,)', '()', '(18446744073709551615,)', '(9' * 40)
    kinds = ('|O', '<f8', '<U100000000', '<i8', 'x', '|V1')
    what = f"'shape': {shapes[rng.integers(len(shapes))]}, "
    if rng.random() < 0.5:
        text = data[:end].decode('latin-1')
        start = text.index("'shape'")
        text = text[:start] + what + '}'
    else:
        text = data[:end].decode('latin-1')
        start, stop = text.index("'descr': '"), text.index("', 'fortran")
        text = text[:start] + f"'descr': '{kinds[rng.integers(len(kinds))]}" + text[stop:]
    head = text.encode('latin-1')[10:]
    head += b' ' * (-(len(head) + 11) % 64) + b'\n'
    entries[name] = (
        data[:8] + len(head).to_bytes(2, 'little') + head + data[data.index(b'\n') + 1 :]
    )
    compression = zipfile.ZIP_DEFLATED if rng.random() < 0.5 else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, 'w', compression) as archive:
        for entry, content in entries.items():
            archive.writestr(entry, content)


def _shards(folder: Path) -> list[Path]:
    return sorted(folder.glob(f'*{SPLIT}*array_record*'))


def _shard_bytes(folder: Path, rng: Rng) -> None:
    shards = _shards(folder)
    shard, other = (shards[k] for k in rng.integers(len(shards), size=2))
    shard.write_bytes(damage.bytes_of(shard.read_bytes(), other.read_bytes(), rng))


def _shard_numbers(folder: Path, rng: Rng) -> None:
    """Sizes near the ends of a shard, where its own index lies, are others."""
    shards = _shards(folder)
    shard = shards[rng.integers(len(shards))]
    data = bytearray(shard.read_bytes())
    for _ in range(rng.integers(1, 6)):
        near = int(rng.integers(min(len(data) - 8, 400)))
        at = near if rng.random() < 0.5 else len(data) - 8 - near
        value = int(rng.choice([0, 1, 2**31, 2**32, 2**62, len(data)]))
        data[at : at + 8] = value.to_bytes(8, 'little')
    shard.write_bytes(data)


def _shard_files(folder: Path, rng: Rng) -> None:
    """Shards are gone, empty, swapped, or something else."""
    shards = _shards(folder)
    shard, other = (shards[k] for k in rng.integers(len(shards), size=2))
    what = rng.integers(6)
    content = other.read_bytes()
    shard.unlink()
    if what == 1:
        shard.touch()
    elif what == 2:
        shard.write_bytes(content)
    elif what == 3:
        shard.mkdir()
    elif what == 4:
        os.mkfifo(shard)
    elif what == 5:
        shard.symlink_to(shard)


WAYS = {
    'index.json': _index,
    'bytes of the arrays': _array_bytes,
    'arrays': _arrays,
    'headers of the arrays': _array_headers,
    'bytes of a shard': _shard_bytes,
    'numbers in a shard': _shard_numbers,
    'files of shards': _shard_files,
}
