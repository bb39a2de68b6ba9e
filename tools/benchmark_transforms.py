"""Measures what augmentation costs: each transform on the host, and what a TPU would take for it.

  python -m tools.benchmark_transforms
  python -m tools.benchmark_transforms --frames 32 --height 320 --width 426 --json figures.json
  python -m tools.benchmark_transforms --device v4:2x2x1

Host figures are milliseconds of CPU time for one clip on one thread, the median of a few runs, when
the transform fires; recipes draw as in training. With --device libtpu compiles normalisation, the
cut into patches and one further operation for one chip of this topology, with as many clips as
--clips says; its cycles are the compiler's, nothing runs. libtpu comes with the tpu extra.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from rich.progress import track
from rich.table import Table

from dist_jax.configs import base
from dist_jax.configs.inputs import INPUTS
from input_pipeline.escape import Console
from input_pipeline.randaugment import KERNELS, OPS, Warp
from input_pipeline.transforms import (
    FILLS,
    INTERPOLATION,
    CentreCrop,
    ColourJitter,
    Flip,
    Grayscale,
    MultiScaleCrop,
    RandomErasing,
    RandomResizedCrop,
    Resize,
    Transform,
    apply,
)

SIZE, PATCH = 224, 16
LEVEL = 7.0


def make_clip(num_frames: int, height: int, width: int) -> np.ndarray:
    """A smooth clip, (T, H, W, 3) uint8."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (num_frames, height // 8, width // 8, 3), dtype=np.uint8)
    return np.stack([cv2.resize(n, (width, height), interpolation=cv2.INTER_CUBIC) for n in noise])


def cpu_ms(run: Callable[[int], object], repeats: int) -> float:
    """Median CPU time of `run(k)`, k from 0, in milliseconds."""
    run(0)
    spent = []
    for k in range(repeats):
        start = time.process_time()
        run(k)
        spent.append(time.process_time() - start)
    return 1e3 * float(np.median(spent))


def host_figures(video: np.ndarray, repeats: int) -> dict[str, float]:
    """Milliseconds a clip of every transform that fires."""
    whole: dict[str, Transform] = {
        f'resize to 256 x 320, {name}': Resize((256, 320), name) for name in INTERPOLATION
    }
    whole |= {
        f'random resized crop, {name}': RandomResizedCrop(SIZE, (0.4, 1.0), interpolation=name)
        for name in INTERPOLATION
    }
    whole |= {
        'multi-scale crop': MultiScaleCrop(SIZE),
        'centre crop': CentreCrop(SIZE),
        'flip before the crop': Flip(1.0),
    }
    cropped: dict[str, Transform] = {
        'flip': Flip(1.0),
        'grayscale': Grayscale(1.0),
        'colour jitter': ColourJitter(probability=1.0),
        **{f'erasing, {mode}': RandomErasing(1.0, mode) for mode in FILLS},
    }
    square = CentreCrop(SIZE)(video, 0, np.random.default_rng(0))[0]
    tasks: dict[str, Callable[[int], object]] = {}
    for frames, transforms in ((video, whole), (square, cropped)):
        for name, transform in transforms.items():
            tasks[name] = lambda k, t=transform, f=frames: apply(
                (t,), f, 0, np.random.default_rng(k)
            )
    for name, op in OPS.items():
        argument = op.argument(LEVEL, 1, True)
        for kernel in KERNELS if op.geometric else ('',):
            warp = Warp(kernel) if kernel else Warp()
            label = f'{name}, {kernel}' if kernel else name
            tasks[label] = lambda k, o=op, a=argument, w=warp: o.run(video, a, w)
    tasks['normalise to float32'] = lambda k: (square.astype(np.float32) - 118.0) * (1 / 68.0)
    return {name: cpu_ms(run, repeats) for name, run in track(tasks.items(), 'host')}


def recipe_figures(video: np.ndarray, repeats: int) -> dict[str, float]:
    """Milliseconds a clip of the transforms of every recipe: the mean over draws."""
    from dist_jax.models import clip
    from dist_jax.recipe import train_reader

    figures = {}
    for name, fields in track(INPUTS.items(), 'recipes'):
        config = base.get_config()
        config.update_from_flattened_dict(fields)
        transforms = train_reader(config, clip.PIXELS).transforms
        start = time.process_time()
        for k in range(5 * repeats):
            apply(transforms, video, 0, np.random.default_rng(k))
        figures[name] = 1e3 * (time.process_time() - start) / (5 * repeats)
    return figures


def device_figures(topology: str, clips: int, num_frames: int) -> dict[str, float]:
    """Millions of cycles of programs that normalise, cut into patches and do one thing more.

    The last ones also multiply with the patch embedding, from clips that arrive in other shapes.
    """
    from dist_jax.plan.topology import devices, parse_topology, prepare_environment

    prepare_environment()
    import jax
    import jax.numpy as jnp
    from jax.sharding import Mesh

    from dist_jax.mixup import Mixing, mix
    from dist_jax.models import clip
    from dist_jax.models.layers import patchify
    from dist_jax.plan import compiling, figures, hlo
    from dist_jax.sharding import replicated

    def coin(key: jax.Array, probability: float) -> jax.Array:
        return jax.random.bernoulli(key, probability, (clips, 1, 1, 1, 1))

    def flip(key: jax.Array, video: jax.Array) -> jax.Array:
        return jnp.where(coin(key, 0.5), video[..., ::-1, :], video)

    def grayscale(key: jax.Array, video: jax.Array) -> jax.Array:
        weights = jnp.asarray([0.299, 0.587, 0.114])
        luma = (video.astype(jnp.float32) * weights).sum(-1, keepdims=True)
        return jnp.where(coin(key, 0.2), luma.round().astype(video.dtype), video)

    def erase(key: jax.Array, video: jax.Array) -> jax.Array:
        def span(key: jax.Array) -> jax.Array:
            size, place = jax.random.uniform(key, (2, clips, 1))
            size = SIZE * (0.1 + 0.5 * size)
            start = place * (SIZE - size)
            return (jnp.arange(SIZE) >= start) & (jnp.arange(SIZE) < start + size)

        rows, columns = (span(k) for k in jax.random.split(key))
        box = rows[:, None, :, None, None] & columns[:, None, None, :, None]
        return jnp.where(box, jnp.asarray([123, 117, 104], video.dtype), video)

    def mixed(key: jax.Array, video: jax.Array) -> jax.Array:
        return mix(key, video, (), jnp.ones(clips), Mixing(0.8, 1.0))[0]

    def program(*operations: Callable) -> Callable:
        def run(video: jax.Array, seed: jax.Array) -> jax.Array:
            keys = jax.random.split(jax.random.key(seed), max(len(operations), 1))
            for key, operation in zip(keys, operations):
                video = operation(key, video)
            pixels = clip.PIXELS.normalize(video, jnp.bfloat16)
            return patchify(pixels.reshape(-1, SIZE, SIZE, 3), PATCH)

        return run

    grid, width = SIZE // PATCH, 3 * PATCH * PATCH

    def embedded(video: jax.Array, kernel: jax.Array) -> jax.Array:
        return program()(video, jnp.uint32(0)) @ kernel

    def standardise(video: jax.Array) -> jax.Array:
        repeats = video.shape[-1] // 3
        mean, std = (
            np.tile(np.float32(row), repeats) for row in (clip.PIXELS.mean, clip.PIXELS.std)
        )
        scale = 1 / (255 * std)
        return (video.astype(jnp.float32) * scale - mean / std).astype(jnp.bfloat16)

    def embedded_rows(video: jax.Array, kernel: jax.Array) -> jax.Array:
        rows = standardise(video).reshape(-1, grid, PATCH, grid, 3 * PATCH)
        return rows.transpose(0, 1, 3, 2, 4).reshape(-1, grid * grid, width) @ kernel

    def embedded_patches(video: jax.Array, kernel: jax.Array) -> jax.Array:
        return standardise(video) @ kernel

    found = parse_topology(topology)
    place = replicated(Mesh(np.asarray(devices(found)[:1]), ('data',)))

    def argument(shape: tuple[int, ...], dtype: Any = jnp.uint8) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    pixels = (clips, num_frames, SIZE, SIZE, 3)
    seed, kernel = argument((), jnp.uint32), argument((width, 768), jnp.bfloat16)
    programs = {
        'normalise': (),
        'normalise, flip': (flip,),
        'normalise, grayscale': (grayscale,),
        'normalise, erase': (erase,),
        'normalise, mix': (mixed,),
        'normalise, flip, mix': (flip, mixed),
        'normalise, mix, erase': (mixed, erase),
        'normalise, flip, grayscale, mix, erase': (flip, grayscale, mixed, erase),
    }
    lowered = {
        name: jax.jit(program(*operations)).lower(argument(pixels), seed)
        for name, operations in programs.items()
    }
    shapes = {
        '(B, T, H, W, 3) to the embedding': (embedded, pixels),
        '(B, T, H, 3 W) to the embedding': (embedded_rows, (*pixels[:3], 3 * SIZE)),
        'patches to the embedding': (embedded_patches, (clips * num_frames, grid * grid, width)),
    }
    lowered |= {
        name: jax.jit(run).lower(argument(shape), kernel) for name, (run, shape) in shapes.items()
    }
    cycles = {}
    for name, each in track(lowered.items(), 'compiling'):
        compiled = compiling.compile_lowered(each)
        program_figures = figures.cycles(hlo.read_program(compiled.text), found.chip)
        cycles[name] = program_figures['estimated_cycles'] / 1e6
    return cycles


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog='python -m tools.benchmark_transforms',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('--frames', type=int, default=16, help='of a clip (default %(default)s)')
    parser.add_argument('--height', type=int, default=256, help='of the video (%(default)s)')
    parser.add_argument('--width', type=int, default=340, help='of the video (%(default)s)')
    parser.add_argument('--repeats', type=int, default=9, help='runs of each (%(default)s)')
    parser.add_argument('--device', metavar='TOPOLOGY', help='also compile for this TPU: v4:2x2x1')
    parser.add_argument('--clips', type=int, default=32, help='on a chip (%(default)s)')
    parser.add_argument('--json', metavar='FILE', help='also write the figures there')
    arguments = parser.parse_args(argv)

    tables: dict[str, dict[str, float]] = {}
    if arguments.device:
        what = f'M cycles of {arguments.clips} clips on a chip of {arguments.device}'
        tables[what] = device_figures(arguments.device, arguments.clips, arguments.frames)
    video = make_clip(arguments.frames, arguments.height, arguments.width)
    size = f'{arguments.frames} frames {arguments.height} x {arguments.width}'
    tables[f'host, ms a clip: {size}'] = host_figures(video, arguments.repeats)
    tables[f'recipes, ms a clip: {size}'] = recipe_figures(video, arguments.repeats)

    console = Console()
    for title, figures in tables.items():
        table = Table('what', 'figure', title=title)
        for name, figure in figures.items():
            table.add_row(name, f'{figure:.2f}')
        console.print(table)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(tables, indent=1) + '\n', encoding='utf-8')
    return 0


if __name__ == '__main__':
    sys.exit(main())
