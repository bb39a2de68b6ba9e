"""Cycles of single convolutions over frames, space-time separable (STS) ones beside plain ones.

    python -m tools.benchmark_conv3d
    python -m tools.benchmark_conv3d csn50 x3d_s --batch_size=16 --mode=clean

Compiles the forward pass and both gradients of one convolution in bfloat16 for a TPU that need not
be there, at the shapes at which the networks replace theirs, and prints what the compiler expects.
Layouts of inputs and outputs are the compiler's choice, as inside a network. `matrix units` is what
the products of the plain convolution take at peak, all 128 channels of a tile used or not.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dist_jax.plan import topology as topologies
from input_pipeline.escape import Console


class Shape(NamedTuple):
    """A convolution of `channels` over frames of `size` x `size`; depthwise where `out` is 0."""

    frames: int
    size: int
    channels: int
    out: int = 0
    stride: int = 1


# Network -> a convolution of each kind that it replaces.
SHAPES = {
    'csn50': (
        Shape(32, 56, 64),
        Shape(32, 56, 128, stride=2),
        Shape(32, 28, 128),
        Shape(32, 28, 256, stride=2),
        Shape(32, 14, 256),
        Shape(32, 14, 512, stride=2),
        Shape(32, 7, 512),
    ),
    'x3d_s': (
        Shape(13, 80, 54, stride=2),
        Shape(13, 40, 54),
        Shape(13, 20, 108),
        Shape(13, 10, 216),
        Shape(13, 5, 432),
    ),
    'r2plus1d34': (
        Shape(8, 56, 144, 64),
        Shape(8, 28, 230, 128),
        Shape(8, 28, 288, 128),
        Shape(8, 14, 460, 256),
        Shape(8, 14, 576, 256),
        Shape(8, 7, 921, 512),
        Shape(8, 7, 1152, 512),
    ),
    'slowonly50': (Shape(8, 14, 1024, 256), Shape(8, 7, 2048, 512)),
    'slowfast50_fast': (
        Shape(32, 56, 32, 8),
        Shape(32, 28, 64, 16),
        Shape(32, 14, 128, 32),
        Shape(32, 7, 256, 64),
    ),
}
TILE = 128

_HEAD = ('network', 'frames', 'size', 'stride', 'channels', 'plain', 'STS', 'ratio', 'matrix units')
_LINE = '{:16} {:>6} {:>5} {:>6} {:>12} {:>7} {:>7} {:>6} {:>12}'


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('networks', nargs='*', metavar='NETWORK', help=', '.join(SHAPES))
    parser.add_argument('--batch_size', type=int, default=8, help='clips (%(default)s)')
    parser.add_argument('--topology', default='v4:1x1x1', help='one chip (%(default)s)')
    parser.add_argument('--mode', default='official', help='official or clean (%(default)s)')
    parser.add_argument('--json', help='write the rows to this file')
    arguments = parser.parse_args(argv)
    for name in arguments.networks:
        if name not in SHAPES:
            parser.error(f'no network {name!r}; there are {", ".join(SHAPES)}')
    console = Console()
    try:
        cycles = _compiler(arguments.topology, arguments.batch_size, arguments.mode)
    except (topologies.MissingCompilerError, ValueError) as error:
        console.print(str(error))
        return 1
    console.print(f'M cycles, {arguments.topology}, {arguments.batch_size} clips, {arguments.mode}')
    console.print(_LINE.format(*_HEAD))
    rows = []
    for name in arguments.networks or SHAPES:
        for row in measure(name, arguments.batch_size, cycles):
            rows.append(row)
            channels = f'{row["channels"]} -> {row["out"] or row["channels"]}'
            counts = (f'{row[key]:.2f}' for key in ('plain', 'sts', 'ratio', 'matrix'))
            facts = (row[key] for key in ('network', 'frames', 'size', 'stride'))
            console.print(_LINE.format(*facts, channels, *counts))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(rows, indent=1) + '\n', encoding='utf-8')
    return 0


def measure(
    name: str, clips: int, cycles: Callable[[Shape, bool], float]
) -> Iterator[dict[str, Any]]:
    """A row of each shape of a network: M cycles plain and separable, and their ratio."""
    for shape in SHAPES[name]:
        plain, separable = (cycles(shape, sts) / 1e6 for sts in (False, True))
        yield {
            'network': name,
            **shape._asdict(),
            'plain': plain,
            'sts': separable,
            'ratio': separable / plain,
            'matrix': _matrix_cycles(shape, clips) / 1e6,
        }


def _matrix_cycles(shape: Shape, clips: int) -> float:
    """Of the forward pass and both gradients: rows that pass through 8 units, tile by tile."""
    places = clips * shape.frames * (shape.size // shape.stride) ** 2
    tiles = math.ceil(shape.channels / TILE)
    products = 3 * tiles * math.ceil(shape.out / TILE) if shape.out else 27 * tiles
    return 3 * places * products / 8


def _compiler(topology: str, clips: int, mode: str) -> Callable[[Shape, bool], float]:
    """(shape, whether it is separable) -> cycles of forward pass and gradients."""
    chips = topologies.parse_topology(topology)
    topologies.prepare_environment()
    import jax
    import jax.numpy as jnp
    from jax.experimental.layout import Format, Layout

    from dist_jax.models.conv3d import MODES, conv3d, sts_conv3d
    from dist_jax.plan import compiling, figures, hlo

    if mode not in MODES:
        raise ValueError(f'--mode={mode!r} must be one of {", ".join(MODES)}')
    place = jax.sharding.SingleDeviceSharding(topologies.devices(chips)[0])
    chosen = Format(Layout.AUTO, place)

    def cycles(shape: Shape, separable: bool) -> float:
        def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
            if separable:
                return sts_conv3d(x, kernel, shape.stride, mode)
            return conv3d(x, kernel, shape.stride)

        def run(x: jax.Array, kernel: jax.Array, upstream: jax.Array) -> tuple:
            y, transpose = jax.vjp(convolve, x, kernel)
            return y, *transpose(upstream)

        sides = (shape.size, shape.size)
        taps = (3, 1, 1, shape.channels, shape.out) if shape.out else (3, 3, 3, 1, shape.channels)
        x = jax.ShapeDtypeStruct((clips, shape.frames, *sides, shape.channels), jnp.bfloat16)
        kernel = jax.ShapeDtypeStruct(taps, jnp.bfloat16)
        step = jax.jit(run, in_shardings=chosen, out_shardings=chosen)
        lowered = step.lower(x, kernel, jax.eval_shape(convolve, x, kernel))
        program = hlo.read_program(compiling.compile_lowered(lowered).text)
        return figures.cycles(program, chips.chip)['estimated_cycles']

    return cycles


if __name__ == '__main__':
    sys.exit(main())
