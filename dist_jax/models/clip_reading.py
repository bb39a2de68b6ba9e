"""One query reads all tokens of a clip: kernels on TPU, forward and backward, and what they mean.

The tokens are those of a frozen block, each with a depthwise convolution over time, a vector of its
frame and one of its own, normalised. XLA writes and reads them about twenty times a layer, much of
it in float32; here a frame is worked on while it is in VMEM. What is kept for the backward pass are
the tokens before the norm, which the plain form rounds as well.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec

from dist_jax.models import kernels
from dist_jax.models.kernel_costs import LANES, SUBLANES, whole
from dist_jax.models.layers import LAYER_NORM_EPS, einsum_to_float32, layer_norm
from dist_jax.models.stack import Slot, mark
from dist_jax.sharding import BATCH

Tree = Any

MEMORY = 'memory'  # name of what the backward pass wants stored
_SUMS = 8  # rows of sums: of the norm's two gradients and of the three taps'


def fits(stack: jax.Array, num_frames: int) -> bool:
    """Whether the kernels take streams (K, B*T, L, C): bfloat16, whole clips, room in VMEM."""
    *_, length, channels = stack.shape
    frames = jax.ShapeDtypeStruct(stack.shape[1:], stack.dtype)
    return (
        kernels.fits(1, LANES, stack.dtype)
        and channels % LANES == 0
        and kernels.holds_clips(frames, num_frames)
        and 44 * whole(length, SUBLANES) * channels < kernels.VMEM_BYTES
    )


def read_clip(
    slot: Slot,
    moved: jax.Array | None,
    taps: jax.Array,
    shift: jax.Array,
    norm: dict[str, jax.Array],
    query: jax.Array,
) -> jax.Array:
    """The mixture of a clip's tokens that a query asks for, for each of its heads.

        Y[t] = taps[0] F[t - 1] + taps[1] F[t] + taps[2] F[t + 1] + shift[t] + moved[t]
        softmax over all tokens of (query . LN Y), times LN Y

    Args:
      slot: F, one of the streams (K, B*T, L, C), bfloat16, which `fits`.
      moved: float32 (B*T, R, S, C), of the tokens behind the first, R rows of S; None for nothing.
      taps: float32 (3, C).
      shift: float32 (T, C).
      norm: `scale` and `bias`, float32 (C,).
      query: (B, h, C) bfloat16.

    Returns:
      (B, h, C) bfloat16.
    """
    rows = 0 if moved is None else moved.shape[1]
    return _read_clip(rows, slot, moved, taps, shift, norm, query)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _read_clip(rows: int, *inputs: Tree) -> jax.Array:
    del rows
    return _forward(*inputs)[0].astype(inputs[-1].dtype)


def _forward(
    slot: Slot, moved: jax.Array | None, taps: jax.Array, shift: jax.Array, norm, query: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`read_clip` in float32, the tokens Y (B*T, L, C), log-sums of exponentials (B, h, 128)."""

    def fast(*inputs):
        return _on_device(_run_forward, *inputs)

    return jax.lax.platform_dependent(
        slot, moved, taps, shift, norm, query, tpu=fast, default=_plain_forward
    )


def _kept_forward(rows: int, slot: Slot, moved, taps, shift, norm, query):
    del rows
    mixed, tokens, sums = (mark(x, MEMORY) for x in _forward(slot, moved, taps, shift, norm, query))
    return mixed.astype(query.dtype), (slot, taps, shift, norm, query, mixed, tokens, sums)


def _backward(rows: int, kept, upstream: jax.Array):
    slot, taps, shift, norm, query, mixed, tokens, sums = kept
    upstream = upstream.astype(query.dtype)
    means = (upstream.astype(jnp.float32) * mixed).sum(-1, keepdims=True)
    means = jnp.broadcast_to(means, sums.shape)

    def fast(*inputs):
        return _on_device(run_backward, *inputs)

    run_backward = functools.partial(_run_backward, rows=rows)
    plain = functools.partial(_plain_backward, rows=rows)
    to_tokens, to_query, summed, to_shift, to_moved = jax.lax.platform_dependent(
        slot, taps, shift, norm, query, upstream, tokens, sums, means,
        tpu=fast, default=plain,
    )  # fmt: skip
    summed, to_shift = summed.sum(0), to_shift.sum(0)
    # Where the tower is trained too: what each token gives to itself and to its neighbours.
    frames = to_tokens.reshape(-1, shift.shape[0], *to_tokens.shape[1:])
    to_stream = _over_time(frames, taps[::-1]).reshape(to_tokens.shape)
    to_stack = Slot(jnp.zeros_like(slot.stack), slot.index).written(
        to_stream.astype(slot.stack.dtype)
    )
    return (
        Slot(to_stack, None),
        to_moved if to_moved is None else to_moved.astype(jnp.float32),
        summed[2:5],
        to_shift,
        {'scale': summed[0], 'bias': summed[1]},
        to_query.astype(query.dtype),
    )


_read_clip.defvjp(_kept_forward, _backward)


def _over_time(frames: jax.Array, taps: jax.Array) -> jax.Array:
    """The convolution of (B, T, L, C) over T, float32."""
    padded = jnp.pad(frames, [(0, 0), (1, 1), (0, 0), (0, 0)]).astype(jnp.float32)
    return sum(padded[:, k : k + frames.shape[1]] * tap for k, tap in enumerate(taps))


def _plain_forward(slot: Slot, moved, taps, shift, norm, query):
    frozen = jax.lax.dynamic_index_in_dim(slot.stack, slot.index, keepdims=False)
    frames = frozen.reshape(query.shape[0], -1, *frozen.shape[1:])
    total = _over_time(frames, taps) + shift[:, None]
    if moved is not None:
        patches = moved.reshape(len(frozen), -1, moved.shape[-1])
        total += jnp.pad(patches, [(0, 0), (1, 0), (0, 0)]).reshape(total.shape)
    tokens = total.astype(query.dtype).reshape(frozen.shape)
    mixed, sums = _plain_attention(tokens, norm, query)
    return mixed, tokens, jnp.broadcast_to(sums[..., None], (*sums.shape, LANES))


def _plain_attention(tokens: jax.Array, norm, query: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The mixture of tokens before their norm, and the logarithm of the softmax's sum (B, h)."""
    memory = layer_norm(tokens, **norm).reshape(query.shape[0], -1, query.shape[2])
    logits = einsum_to_float32('bhc,bmc->bhm', query, memory)
    weights = jax.nn.softmax(logits, axis=-1).astype(memory.dtype)
    return einsum_to_float32('bhm,bmc->bhc', weights, memory), jax.nn.logsumexp(logits, axis=-1)


def _plain_backward(slot: Slot, taps, shift, norm, query, upstream, tokens, sums, means, rows=0):
    del sums, means
    clips, clip = query.shape[0], shift.shape[0]
    _, pull = jax.vjp(lambda *x: _plain_attention(*x)[0], tokens, norm, query)
    to_tokens, to_norm, to_query = pull(upstream.astype(jnp.float32))
    frozen = jax.lax.dynamic_index_in_dim(slot.stack, slot.index, keepdims=False)
    frames, wide = (
        x.reshape(clips, clip, *x.shape[1:]).astype(jnp.float32) for x in (frozen, to_tokens)
    )
    padded = jnp.pad(frames, [(0, 0), (1, 1), (0, 0), (0, 0)])
    to_taps = [(padded[:, k : k + clip] * wide).sum((0, 1, 2)) for k in range(3)]
    summed = jnp.stack([to_norm['scale'], to_norm['bias'], *to_taps])
    summed = jnp.pad(summed, [(0, _SUMS - 5), (0, 0)])
    first = jnp.arange(clips) == 0  # sums of all clips, in the place of the first
    return (
        to_tokens,
        to_query.astype(jnp.float32),
        jnp.where(first[:, None, None], summed, 0),
        wide.sum(2),
        to_tokens[:, 1:].reshape(len(frozen), rows, -1, frozen.shape[-1]) if rows else None,
    )


def _on_device(run: Callable[..., Tree], slot: Slot, *inputs: Tree) -> Tree:
    """A kernel on the clips that a device holds, all of them where they do not divide.

    Arrays with more than two axes, and all that the kernel gives, have clips or their frames on
    the first.
    """
    sizes = jax.sharding.get_abstract_mesh().shape
    if math.prod(sizes.values()) == 1:
        return run(slot, *inputs)
    parts = math.prod(sizes[axis] for axis in BATCH)
    clips = PartitionSpec(BATCH if slot.stack.shape[1] % parts == 0 else None)
    specs = jax.tree.map(lambda x: clips if x.ndim > 2 else PartitionSpec(), inputs)
    stack = Slot(PartitionSpec(None, *clips), PartitionSpec())
    split = jax.shard_map(run, in_specs=(stack, *specs), out_specs=clips, check_vma=False)
    return split(slot, *inputs)


def _frames_of(slot: Slot, clip: int) -> list[pl.BlockSpec]:
    """The frame before, the frame itself and the one after; at an end, the frame itself."""
    *_, length, channels = slot.stack.shape

    def neighbour(step: int) -> pl.BlockSpec:
        def place(b: jax.Array, t: jax.Array, index: jax.Ref) -> tuple:
            return index[0], b * clip + jnp.clip(t + step, 0, clip - 1), 0, 0

        return pl.BlockSpec((1, 1, length, channels), place)

    return [neighbour(step) for step in (-1, 0, 1)]


def _of_frame(clip: int, rows: int, columns: int) -> pl.BlockSpec:
    return pl.BlockSpec((1, rows, columns), lambda b, t, *_: (b * clip + t, 0, 0))


def _of_clip(rows: int, columns: int) -> pl.BlockSpec:
    return pl.BlockSpec((1, rows, columns), lambda b, *_: (b, 0, 0))


def _rows_of_frame(clip: int, shape: tuple[int, ...]) -> pl.BlockSpec:
    return pl.BlockSpec((1, *shape[1:]), lambda b, t, *_: (b * clip + t, 0, 0, 0))


def _whole(x: jax.Array) -> pl.BlockSpec:
    return pl.BlockSpec(x.shape, lambda *_: (0,) * x.ndim)


def _call(
    kernel: Callable[..., None],
    name: str,
    slot: Slot,
    clip: int,
    inputs: Sequence[jax.Array],
    specs: Sequence[pl.BlockSpec],
    outputs: Sequence[jax.ShapeDtypeStruct],
    output_specs: Sequence[pl.BlockSpec],
    scratch: Sequence[Any],
    *,
    heads: int,
    interpret: bool,
) -> list[jax.Array]:
    _, frames, length, channels = slot.stack.shape

    def moved(x: Any) -> int:
        *lead, rows, columns = x.shape
        return math.prod(lead) * whole(rows, SUBLANES) * columns * x.dtype.itemsize

    return pl.pallas_call(
        lambda _, *refs: kernel(*refs),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(frames // clip, clip),
            in_specs=[*_frames_of(slot, clip), *specs],
            out_specs=list(output_specs),
            scratch_shapes=list(scratch),
        ),
        out_shape=list(outputs),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=('parallel', 'arbitrary'), vmem_limit_bytes=kernels.VMEM_BYTES
        ),
        cost_estimate=kernels.cost_estimate(
            name,
            frames,
            {'tokens': length, 'width': channels, 'heads': heads},
            transcendentals=heads * length,
            frame_bytes=round(
                # At an end of a clip, what would be the neighbour is there already.
                (3 - 2 / clip) * moved(jax.ShapeDtypeStruct((length, channels), slot.stack.dtype))
                + sum(moved(x) for x in (*inputs, *outputs) if x.ndim > 2) / frames
            ),
        ),
        interpret=interpret,
        name=name,
    )(slot.index.reshape(1), *3 * [slot.stack], *inputs)


def _run_forward(slot: Slot, moved, taps, shift, norm, query, interpret: bool = False):
    """`_forward` on one device, by the kernel."""
    _, frames, length, channels = slot.stack.shape
    clips, heads, _ = query.shape
    clip, dtype = shift.shape[0], slot.stack.dtype
    vectors = (taps, shift, *kernels.rows_of(norm['scale'], norm['bias']))
    inputs, specs = [*vectors, query], [*map(_whole, vectors), _of_clip(heads, channels)]
    if moved is not None:
        inputs.append(moved)
        specs.append(_rows_of_frame(clip, moved.shape))

    mixed, tokens, sums = _call(
        functools.partial(_forward_kernel, has_moved=moved is not None),
        'read_clip',
        slot,
        clip,
        inputs,
        specs,
        [
            jax.ShapeDtypeStruct((clips, heads, channels), jnp.float32),
            jax.ShapeDtypeStruct((frames, length, channels), dtype),
            jax.ShapeDtypeStruct((clips, heads, LANES), jnp.float32),
        ],
        [_of_clip(heads, channels), _of_frame(clip, length, channels), _of_clip(heads, LANES)],
        [
            pltpu.VMEM((length, channels), jnp.float32),
            pltpu.VMEM((heads, channels), jnp.float32),
            pltpu.VMEM((heads, LANES), jnp.float32),
            pltpu.VMEM((heads, LANES), jnp.float32),
        ],
        heads=heads,
        interpret=interpret,
    )
    return mixed, tokens, sums


def _forward_kernel(
    before_ref, here_ref, after_ref, taps_ref, shift_ref, scale_ref, bias_ref, query_ref, *refs,
    has_moved: bool,
) -> None:  # fmt: skip
    """One frame of a clip; what has been read of it so far goes on to the next."""
    moved_refs, refs = (refs[:1], refs[1:]) if has_moved else ((), refs)
    mixed_ref, tokens_ref, sums_ref, total_ref, read_ref, most_ref, sum_ref = refs
    frame, last = pl.program_id(1), pl.num_programs(1) - 1
    total = shift_ref[pl.ds(frame, 1), :] + sum(
        ref[0, 0].astype(jnp.float32) * tap
        for ref, tap in zip((before_ref, here_ref, after_ref), _taps_inside(taps_ref, frame, last))
    )
    if has_moved:
        (moved_ref,) = moved_refs
        total_ref[...] = total
        for row, place in enumerate(_places(*moved_ref.shape[1:3])):
            total_ref[place, :] += moved_ref[0, row]
        total = total_ref[...]
    tokens = total.astype(tokens_ref.dtype)
    tokens_ref[0] = tokens
    memory = layer_norm(tokens, scale_ref[...], bias_ref[...])

    @pl.when(frame == 0)
    def _() -> None:
        read_ref[...] = jnp.zeros(read_ref.shape, read_ref.dtype)
        sum_ref[...] = jnp.zeros(sum_ref.shape, sum_ref.dtype)
        most_ref[...] = jnp.full(most_ref.shape, -jnp.inf, most_ref.dtype)

    logits = kernels.product(query_ref[0], memory, (1, 1))  # (h, L)
    before = most_ref[:, :1]
    most = jnp.maximum(before, logits.max(1, keepdims=True))
    weights, rest = jnp.exp(logits - most), jnp.exp(before - most)
    read = read_ref[...] * rest + kernels.product(weights.astype(memory.dtype), memory)
    total_weight = sum_ref[:, :1] * rest + weights.sum(1, keepdims=True)
    read_ref[...] = read
    most_ref[...] = jnp.broadcast_to(most, most_ref.shape)
    sum_ref[...] = jnp.broadcast_to(total_weight, sum_ref.shape)

    @pl.when(frame == last)
    def _() -> None:
        mixed_ref[0] = read / total_weight
        sums_ref[0] = jnp.broadcast_to(most + jnp.log(total_weight), sums_ref.shape[1:])


def _places(rows: int, columns: int) -> list[pl.Slice]:
    """Where the rows of a frame's tokens are, behind the first."""
    return [pl.ds(1 + row * columns, columns) for row in range(rows)]


def _taps_inside(taps_ref, frame: jax.Array, last: jax.Array) -> list[jax.Array]:
    """The three taps, (1, C) each; 0 of a frame that is not there."""
    inside = [frame > 0, True, frame < last]
    return [jnp.where(there, taps_ref[k : k + 1, :], 0) for k, there in enumerate(inside)]


def _run_backward(
    slot: Slot,
    taps,
    shift,
    norm,
    query,
    upstream,
    tokens,
    sums,
    means,
    rows: int = 0,
    interpret: bool = False,
):
    """What `_backward` wants of one device: gradients by Y, query, vectors, shift, by clips; moved.

    Those of vectors, (B, 8, C), are of the norm's scale and bias and of the three taps.

    Args:
      rows: R of `moved`; 0 without.
    """
    del taps
    _, frames, length, channels = slot.stack.shape
    clips, heads, _ = query.shape
    clip, dtype = shift.shape[0], slot.stack.dtype
    vectors = kernels.rows_of(norm['scale'], norm['bias'])
    of_heads = 2 * [_of_clip(heads, channels)]
    of_sums = 2 * [_of_clip(heads, LANES)]
    outputs = [
        jax.ShapeDtypeStruct((frames, length, channels), dtype),
        jax.ShapeDtypeStruct((clips, heads, channels), jnp.float32),
        jax.ShapeDtypeStruct((clips, _SUMS, channels), jnp.float32),
        jax.ShapeDtypeStruct((clips, clip, channels), jnp.float32),
    ]
    output_specs = [
        _of_frame(clip, length, channels),
        _of_clip(heads, channels),
        _of_clip(_SUMS, channels),
        _of_clip(clip, channels),
    ]
    scratch = []
    if rows:
        shape = frames, rows, (length - 1) // rows, channels
        outputs.append(jax.ShapeDtypeStruct(shape, dtype))
        output_specs.append(_rows_of_frame(clip, shape))
        scratch.append(pltpu.VMEM((length, channels), jnp.float32))
    found = _call(
        functools.partial(_backward_kernel, has_moved=rows > 0),
        'read_clip_gradient',
        slot,
        clip,
        [*vectors, query, upstream, sums, means, tokens],
        [*map(_whole, vectors), *of_heads, *of_sums, _of_frame(clip, length, channels)],
        outputs,
        output_specs,
        scratch,
        heads=heads,
        interpret=interpret,
    )
    return tuple(found) if rows else (*found, None)


def _backward_kernel(
    before_ref, here_ref, after_ref, scale_ref, bias_ref, query_ref, upstream_ref, sums_ref,
    means_ref, tokens_ref, to_tokens_ref, to_query_ref, summed_ref, to_shift_ref, *refs,
    has_moved: bool,
) -> None:  # fmt: skip
    """One frame of a clip, whose sums go on to the next."""
    frame, last = pl.program_id(1), pl.num_programs(1) - 1

    @pl.when(frame == 0)
    def _() -> None:
        to_query_ref[...] = jnp.zeros(to_query_ref.shape, to_query_ref.dtype)
        summed_ref[...] = jnp.zeros(summed_ref.shape, summed_ref.dtype)

    query, upstream, scale = query_ref[0], upstream_ref[0], scale_ref[...]
    tokens = tokens_ref[0].astype(jnp.float32)
    centred = tokens - tokens.mean(1, keepdims=True)
    spread = jax.lax.rsqrt(jnp.square(centred).mean(1, keepdims=True) + LAYER_NORM_EPS)
    normed = centred * spread
    memory = (normed * scale + bias_ref[...]).astype(query.dtype)

    weights = jnp.exp(kernels.product(query, memory, (1, 1)) - sums_ref[0, :, :1])  # (h, L)
    to_logits = weights * (kernels.product(upstream, memory, (1, 1)) - means_ref[0, :, :1])
    to_logits = to_logits.astype(query.dtype)
    to_query_ref[0] += kernels.product(to_logits, memory)
    to_memory = kernels.product(weights.astype(query.dtype), upstream, (0, 0))
    to_memory += kernels.product(to_logits, query, (0, 0))

    to_normed = to_memory * scale
    along = (to_normed * normed).mean(1, keepdims=True)
    to_tokens = spread * (to_normed - to_normed.mean(1, keepdims=True) - normed * along)
    to_tokens_ref[0] = to_tokens.astype(to_tokens_ref.dtype)
    if has_moved:
        to_moved_ref, rows_ref = refs
        rows_ref[...] = to_tokens
        for row, place in enumerate(_places(*to_moved_ref.shape[1:3])):
            to_moved_ref[0, row] = rows_ref[place, :].astype(to_moved_ref.dtype)
    to_shift_ref[0, pl.ds(frame, 1), :] = to_tokens.sum(0, keepdims=True)
    summed_ref[0, :1, :] += (to_memory * normed).sum(0, keepdims=True)
    summed_ref[0, 1:2, :] += to_memory.sum(0, keepdims=True)
    for k, (ref, there) in enumerate(
        ((before_ref, frame > 0), (here_ref, True), (after_ref, frame < last)), start=2
    ):
        to_tap = (ref[0, 0].astype(jnp.float32) * to_tokens).sum(0, keepdims=True)
        summed_ref[0, k : k + 1, :] += jnp.where(there, to_tap, 0)
