"""Measures memory and time of converting a large backbone, and of loading it.

    python -m tools.measure_convert make big.pt --name eva02_e14 \\
        --table dist_jax.models.eva_params:baai_rows
    python -m tools.measure_convert run convert big.pt big
    python -m tools.measure_convert load big --fsdp 8

`make` writes random weights in half precision, as safetensors or, where the name ends in .pt, as
PyTorch does; nothing is ever whole in memory. `run` runs a `dist_jax` command, `load` reads the
image tower in bfloat16 onto virtual CPU devices. Both print the peak of anonymous memory: what the
process holds itself, without pages of files, which the system takes back when it needs them.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import json
import math
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

SAMPLES_PER_SECOND = 20
BLOCK = 2**22 + 1  # random values that are repeated; longer than what compression looks back

LOAD = """
import sys, time
import jax, jax.numpy as jnp
from dist_jax.models import BACKBONES, converted
from dist_jax.models.frozen import TOWER
from dist_jax.models.params import with_precision
from dist_jax.sharding import make_mesh, place
path, fsdp = sys.argv[1], int(sys.argv[2])
kind = BACKBONES[converted.load_metadata(path)['family']]
tree = with_precision({TOWER: converted.stored_shapes(path)[TOWER]}, jnp.bfloat16)
placed = place(tree, kind.sharding_rules, make_mesh(fsdp=fsdp))
found = jax.block_until_ready(converted.load_params(path, [TOWER], abstract=placed))
held = sum(s.data.nbytes for x in jax.tree.leaves(found) for s in x.addressable_shards)
print(f'{held / 2**30:.2f} GiB on {len(jax.devices())} devices')
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest='command', required=True)
    make = commands.add_parser('make')
    make.add_argument('file', type=Path)
    make.add_argument('--name', required=True, help='published size to start from')
    make.add_argument('--set', nargs='*', default=(), metavar='FIELD=VALUE', help='of its spec')
    make.add_argument('--table', default='dist_jax.models.clip_params:openai_rows')
    run = commands.add_parser('run')
    run.add_argument('arguments', nargs=argparse.REMAINDER)
    load = commands.add_parser('load')
    load.add_argument('folder')
    load.add_argument('--fsdp', type=int, default=8)
    args = parser.parse_args(argv)
    if args.command == 'make':
        changes = dict(pair.split('=', 1) for pair in args.set)
        size = make_file(args.file, args.name, changes, args.table)
        print(f'{size / 1e9:.2f} GB in {args.file}')
        return 0
    if args.command == 'run':
        code, figures = measured([sys.executable, '-m', 'dist_jax', *args.arguments], {})
    else:
        flags = f'{os.environ.get("XLA_FLAGS", "")} --xla_force_host_platform_device_count='
        code, figures = measured(
            [sys.executable, '-c', LOAD, args.folder, str(args.fsdp)],
            {'XLA_FLAGS': f'{flags}{args.fsdp}', 'JAX_PLATFORMS': 'cpu'},
        )
    print(json.dumps(figures))
    return code


def make_file(path: Path, name: str, changes: dict[str, str], table: str) -> int:
    """Writes a checkpoint of random weights; returns its bytes.

    Args:
      path: ends in .pt, or it is a safetensors file.
      name: of a published backbone.
      changes: fields of its spec -> JSON values.
      table: MODULE:FUNCTION, from a spec to the rows of a naming.
    """
    from dist_jax import backbones
    from dist_jax.models.params import flatten

    backbone = backbones.named(name)
    changed = {field: json.loads(value) for field, value in changes.items()}
    backbone = dataclasses.replace(backbone, spec=dataclasses.replace(backbone.spec, **changed))
    module, function = table.split(':')
    rows = getattr(importlib.import_module(module), function)(backbone.spec)
    leaves = flatten(backbone.abstract_params())
    shapes = {row.source_name: _source_shape(row, leaves) for row in rows if row.source_name}
    write = _write_torch if path.suffix == '.pt' else _write_safetensors
    write(path, shapes)
    return path.stat().st_size


def _source_shape(row: Any, leaves: dict[str, Any]) -> tuple[int, ...]:
    slot = np.broadcast_to(np.uint8(0), leaves[row.target_path].shape)[row.index]
    return row.backward(slot).shape


def _values(shapes: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, Iterator[bytes]]]:
    block = (np.random.default_rng(0).standard_normal(BLOCK, np.float32) * 0.02).astype(np.float16)

    def pieces(size: int) -> Iterator[bytes]:
        for start in range(0, size, BLOCK):
            yield block[: size - start].tobytes()

    for name, shape in shapes.items():
        yield name, pieces(math.prod(shape))
        block = np.roll(block, 12345)


def _write_safetensors(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {'dtype': 'F16', 'shape': shape, 'data_offsets': (start, end)}
    text = json.dumps(header).encode()
    text += b' ' * (-len(text) % 8)
    with open(path, 'wb') as file:
        file.write(len(text).to_bytes(8, 'little') + text)
        for _, pieces in _values(shapes):
            file.writelines(pieces)


def _write_torch(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    from tools.fuzzing.torch_files import Tensor, program

    tensors = {}
    for key, (name, shape) in enumerate(shapes.items()):
        stride = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
        tensors[name] = Tensor(str(key), 'float16', math.prod(shape), 0, shape, stride)
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('archive/data.pkl', program({'state_dict': tensors}))
        for key, (_, pieces) in enumerate(_values(shapes)):
            with archive.open(f'archive/data/{key}', 'w', force_zip64=True) as entry:
                for piece in pieces:
                    entry.write(piece)


def measured(command: Sequence[str], environment: dict[str, str]) -> tuple[int, dict[str, float]]:
    """Runs a command.

    Returns:
      The exit code; seconds, peak_anonymous_gib, and peak_file_gib of mapped files.
    """
    start, peaks = time.monotonic(), {'RssAnon': 0, 'RssFile': 0}
    child = subprocess.Popen(command, env=os.environ | environment)
    while child.poll() is None:
        with contextlib.suppress(OSError):
            for line in Path(f'/proc/{child.pid}/status').read_text().splitlines():
                field, _, value = line.partition(':')
                if field in peaks:
                    peaks[field] = max(peaks[field], int(value.split()[0]))
        time.sleep(1 / SAMPLES_PER_SECOND)
    return child.returncode, {
        'seconds': round(time.monotonic() - start, 1),
        'peak_anonymous_gib': round(peaks['RssAnon'] / 2**20, 2),
        'peak_file_gib': round(peaks['RssFile'] / 2**20, 2),
    }


if __name__ == '__main__':
    sys.exit(main())
