"""Our training step beside the same in PyTorch on this machine's GPU: clips a second, peak memory.

    python -m tools.compare_gpu
    python -m tools.compare_gpu --torch /venvs/torch/bin/python --json figures.json
    python -m tools.compare_gpu --rows dist:demo evl:demo --batch 2 --steps 2  # tries it, anywhere

DiST and EVL with ViT-B/16, bfloat16, batches of 32 and 64. PyTorch's side is
`tools/gpu/torch_steps.py`: the step of the papers, plain, with autocast and SDPA; it may have an
interpreter of its own. Each measurement is a process of its own, weights and clips are random and
lie on the device. What does not fit is said, and the rest goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from rich.table import Table

from dist_jax.json_file import write_json
from input_pipeline.escape import Console
from tools import which_tpu

ROWS = ('dist:b16_8+16f_k400', 'evl:b16_8f_k400')
TORCH = Path(__file__).parent / 'gpu' / 'torch_steps.py'
SIDES = ('torch', 'ours')
MINUTES = 20  # of one measurement
Figures = dict[str, Any]


def config_of(row: str, batch_size: int) -> ConfigDict:
    """The row with so many clips in a step.

    Raises:
      ValueError: no such row.
    """
    family, _, variant = row.partition(':')
    modules = {module.__name__.rpartition('.')[2]: module for module in which_tpu.FAMILIES}
    if family not in ('dist', 'evl'):
        raise ValueError(f'--rows {row}: PyTorch has rows of dist and evl here')
    config = modules[family].get_config(variant)
    config.batch_size, config.accumulation = batch_size, 1
    return config


def size_of(config: ConfigDict, steps: int) -> dict[str, Any]:
    """What PyTorch's side is told of a row: `torch_steps.Size`."""
    from dist_jax.plan import compiling

    parts = compiling.assemble(config)
    spec = parts.backbone.spec
    return {
        'model': config.model.family,
        'batch_size': config.batch_size,
        'steps': steps,
        'num_classes': len(parts.task.labels[0]),
        'num_frames': config.data.num_frames,
        'image_size': spec.image_size,
        'patch_size': spec.patch_size,
        'width': spec.width,
        'depth': spec.depth,
        'heads': spec.num_heads,
        'embed_dim': spec.embed_dim,
        'options': config.model.to_dict(),
    }


def measure_ours(row: str, batch_size: int, steps: int) -> Figures:
    """Of the compiled step of this machine, in this process."""
    import jax

    from dist_jax.models.params import count
    from dist_jax.plan import compiling
    from tools import benchmark_step

    config = config_of(row, batch_size)
    found = benchmark_step.measure(config, steps)
    device = jax.devices()[0]
    memory = device.memory_stats() or {}
    return {
        'device': device.device_kind,
        'version': f'jax {jax.__version__}',
        'parameters': count(compiling.assemble(config).abstract_variables()['params']),
        'step_seconds': found['step_seconds_median'],
        'peak_bytes': memory.get('peak_bytes_in_use'),
    }


def run(command: Sequence[str]) -> Figures:
    """The last line of a process as JSON, or {'error': what it said last}."""
    environment = os.environ | {
        'XLA_PYTHON_CLIENT_PREALLOCATE': 'false',
        'JAX_TRACEBACK_FILTERING': 'off',  # the last line is then the error
    }
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=60 * MINUTES
        )
    except subprocess.TimeoutExpired:
        return {'error': f'not done after {MINUTES} minutes'}
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        said = (done.stderr.strip().splitlines() or ['nothing'])[-1]
        return {'error': f'ended with {done.returncode}: {said[:300]}'}
    return json.loads(lines[-1])


def measure(rows: Sequence[str], batches: Sequence[int], steps: int, python: str) -> list[Figures]:
    """Both sides of every row and batch, one after the other."""
    found = []
    for row in rows:
        for batch in batches:
            size = json.dumps(size_of(config_of(row, batch), steps))
            own = (row, str(batch), str(steps))
            commands = {
                'torch': [python, str(TORCH), size],
                'ours': [sys.executable, '-m', 'tools.compare_gpu', '--one', *own],
            }
            for side in SIDES:
                print(f'{row}, batch {batch}: {side}', flush=True)
                figures = run(commands[side])
                found.append({'row': row, 'batch': batch, 'side': side, **figures})
    return found


def table(found: Sequence[Figures]) -> Table:
    """Clips a second and GiB, and how many times PyTorch's ours are."""
    shown = Table('row', 'batch', 'side', 'clips/s', 'of torch', 'peak GiB', 'parameters', 'by')
    rates: dict[tuple[str, int], float] = {}
    for one in found:
        place = (one['row'], one['batch'])
        if 'error' in one:
            shown.add_row(one['row'], str(one['batch']), one['side'], one['error'])
            continue
        rate = one['batch'] / one['step_seconds']
        if one['side'] == 'torch':
            rates[place] = rate
        times = f'{rate / rates[place]:.2f}' if place in rates else ''
        peak = one['peak_bytes']
        shown.add_row(
            one['row'],
            str(one['batch']),
            one['side'],
            f'{rate:.1f}',
            times,
            '-' if peak is None else f'{peak / 2**30:.2f}',
            f'{one["parameters"]:,}',
            f'{one["version"]}, {one["device"]}',
        )
    return shown


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog='python -m tools.compare_gpu',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('--rows', nargs='+', default=[*ROWS], metavar='FILE:ROW')
    parser.add_argument('--batch', nargs='+', type=int, default=[32, 64], metavar='CLIPS')
    parser.add_argument('--steps', type=int, default=20, help='that are timed (%(default)s)')
    parser.add_argument('--torch', default=sys.executable, help="PyTorch's Python (this one)")
    parser.add_argument('--json', metavar='FILE', help='also write the figures there')
    parser.add_argument('--one', nargs=3, help=argparse.SUPPRESS)  # what `measure` starts
    arguments = parser.parse_args(argv)
    if arguments.one:
        row, batch, steps = arguments.one
        print(json.dumps(measure_ours(row, int(batch), int(steps))))
        return 0
    try:
        found = measure(arguments.rows, arguments.batch, arguments.steps, arguments.torch)
    except ValueError as error:
        parser.error(str(error))
    Console().print(table(found))
    if arguments.json:
        write_json(arguments.json, found)
    return int(any('error' in one for one in found))


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
