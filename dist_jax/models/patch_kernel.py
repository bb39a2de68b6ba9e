"""Cuts frames into patches in a kernel on TPU.

XLA cuts a row of 672 values into 14 of 48 in memory, where each takes the room of 128, and copies
that twice to get rows of a patch side by side. Here a frame is read and written once, and what
moves between lanes does so in VMEM, two rows of patches to a word.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dist_jax.models.kernel_costs import LANES, SUBLANES, whole
from dist_jax.models.kernels import VMEM_BYTES, cost_estimate, on_each_device, on_tpu
from dist_jax.models.layers import as_rows, clip_patches, is_portable

NAME = 'cut_patches'
PACKED = 2 * SUBLANES  # rows of a bfloat16 register


def patches_of(clips: jax.Array, patch_size: int) -> jax.Array:
    """`layers.clip_patches`; on TPU, in bfloat16, by `cut_patches` where a frame fits into VMEM."""
    rows = as_rows(clips)
    frames = rows.reshape(-1, *rows.shape[2:])
    if not fits(frames, patch_size):
        return clip_patches(rows, patch_size)
    fast = functools.partial(on_each_device, functools.partial(cut_patches, patch_size=patch_size))
    found = on_tpu(fast, functools.partial(_plain, patch_size=patch_size), frames)
    return found.reshape(*rows.shape[:2], *found.shape[1:])


def _plain(frames: jax.Array, patch_size: int) -> jax.Array:
    return clip_patches(frames[None], patch_size)[0]


def fits(frames: jax.Array, patch_size: int) -> bool:
    """Whether `cut_patches` takes (N, H, 3 W): bfloat16, square, room in VMEM."""
    _, height, width = frames.shape
    square = 3 * height == width and height % patch_size == 0
    if is_portable() or frames.dtype != jnp.bfloat16 or not square:
        return False
    lanes, of_patch = whole(width, LANES), whole(3 * patch_size**2, LANES)
    side = whole(height // patch_size, PACKED)
    scratch = 4 * side * (quick_stride(patch_size) * lanes + quick_stride(side) * of_patch)
    blocks = 2 * 2 * (whole(height, PACKED) * lanes + side**2 * of_patch)
    return scratch + blocks < VMEM_BYTES * 3 // 4


def cut_patches(frames: jax.Array, patch_size: int, interpret: bool = False) -> jax.Array:
    """Rows of pixels (N, H, 3 H) bfloat16 -> patches (N, g*g, p*p*3), see `layers.patchify`.

    Args:
      frames: see `fits`.
      patch_size: p.
      interpret: run without a TPU, slowly, for tests.
    """
    count, height, width = frames.shape
    p, side = patch_size, height // patch_size
    shape = (side * side, 3 * p * p)
    lanes = tuple(whole(x, LANES) for x in (width, shape[1]))
    frame_bytes = 2 * (whole(height, SUBLANES) * lanes[0] + whole(shape[0], SUBLANES) * lanes[1])
    deep = whole(side, PACKED)
    return pl.pallas_call(
        functools.partial(_kernel, patch_size=p),
        grid=(count,),
        in_specs=[pl.BlockSpec((1, height, width), lambda n: (n, 0, 0))],
        out_specs=pl.BlockSpec((1, *shape), lambda n: (n, 0, 0)),
        out_shape=jax.ShapeDtypeStruct((count, *shape), frames.dtype),
        scratch_shapes=[
            *_columns(deep * quick_stride(p), lanes[0]),
            *_columns(deep * quick_stride(side), lanes[1]),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=('parallel',), vmem_limit_bytes=VMEM_BYTES
        ),
        cost_estimate=cost_estimate(
            NAME,
            count,
            {'size': height, 'patch': p},
            transcendentals=0,
            frame_bytes=frame_bytes,
        ),
        interpret=interpret,
        name=NAME,
    )(frames)


def quick_stride(size: int) -> int:
    """The least number that is not below, and no multiple of 4: v4 moves rows at it at once."""
    return size + (size % 4 == 0)


def _columns(rows: int, lanes: int) -> list[Any]:
    return [pltpu.VMEM((rows, LANES), jnp.float32)] * (lanes // LANES)


def _bands(count: int, size: int, stride: int) -> Iterator[tuple[slice, slice]]:
    """Rows in bands of `size`, and where they lie where bands are `stride` apart."""
    if size == stride:
        yield slice(0, count), slice(0, count)
        return
    for band in range(count // size):
        start = band * stride
        yield slice(band * size, (band + 1) * size), slice(start, start + size)


def _kernel(frame_ref, patches_ref, *scratch, patch_size: int) -> None:
    """One frame; scratch holds it in columns of 128 lanes, of which strided rows are read."""
    height, width = frame_ref.shape[1:]
    p, side = patch_size, height // patch_size
    columns = -(-width // LANES)
    rows_refs, out_refs = scratch[:columns], scratch[columns:]
    stride, across = quick_stride(p), quick_stride(side)
    deep = rows_refs[0].shape[0] // stride
    for tile, ref in enumerate(rows_refs):
        lanes = slice(tile * LANES, min((tile + 1) * LANES, width))
        pixels = frame_ref[0, :, lanes].astype(jnp.float32)
        for place, rows in _bands(height, p, stride):
            ref[rows, : pixels.shape[1]] = pixels[place]
    # Row i of every row of patches, as words of two: (deep / 2, 3 H).
    words = []
    for i in range(p):
        tiles = [ref[pl.ds(i, deep, stride=stride), :] for ref in rows_refs]
        packed = [pltpu.bitcast(tile.astype(jnp.bfloat16), jnp.uint32) for tile in tiles]
        words.append(jnp.concatenate(packed, axis=1))
    for j in range(side):
        begin = 3 * p * j
        patch = jnp.concatenate([row[:, begin : begin + 3 * p] for row in words], axis=1)
        for tile, ref in enumerate(out_refs):
            part = patch[:, tile * LANES : (tile + 1) * LANES]
            part = pltpu.bitcast(part, jnp.bfloat16).astype(jnp.float32)
            ref[pl.ds(j, deep, stride=across), : part.shape[1]] = part
    for tile, ref in enumerate(out_refs):
        lanes = slice(tile * LANES, min((tile + 1) * LANES, patches_ref.shape[2]))
        for place, rows in _bands(side * side, side, across):
            part = ref[rows, : lanes.stop - lanes.start]
            patches_ref[0, place, lanes] = part.astype(patches_ref.dtype)
