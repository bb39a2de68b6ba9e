"""Kernels of the side network's layers for TPU: taps, and branches with their norms.

Left to the compiler, what lies between the maps of a branch is written and read several times,
and the gradients of weights, biases and norms take passes of their own. Here a few frames are read
once: forward, all between input and output stays in VMEM, and backward, it is computed again there,
with the gradients of the weights summed in float32 beside it.

A branch has a plain form, which is what it means, and which runs where there is no TPU, in other
dtypes than bfloat16, where weights are split over devices, and at sizes that VMEM does not hold.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec

from dist_jax.models import kernel_costs
from dist_jax.models.batch_norm import Norm, gradient_of_norm, normalise, standardised
from dist_jax.models.kernel_costs import LANES, SUBLANES, whole
from dist_jax.models.kernels import (
    VMEM_BYTES,
    batch_axes,
    begin_to_attend,
    cost_estimate,
    finish_attending,
    group_gradient,
    group_lanes,
    grouped,
    groups_of_heads,
    heads_per_group,
    mesh_sizes,
    on_each_device,
    product,
    trained_attention,
)
from dist_jax.models.layers import (
    ACTIVATIONS,
    LAYER_NORM_EPS,
    einsum,
    fitted_gelu,
    is_portable,
    layer_norm,
)
from dist_jax.models.time_conv import depthwise
from dist_jax.sharding import TENSOR

Tree = Any
Function = Callable[..., Any]
Moments = tuple[jax.Array, jax.Array]


class Branch(NamedTuple):
    """`x + branch(norm(x))`, in two forms.

    Attributes:
      plain: (z, params) -> the branch, of (B, T, N, C) in any dtype.
      fast: (x, rows, params, interpret) -> all of it, of frames (B T, N, C); see `_rows_of`.
      gradient: (x, upstream, rows, params, interpret) -> the gradient by `norm(x)` in the dtype of
        x, its sums of a few frames, alone and times what the norm had, (n, 2, C), and the gradients
        of `params`, whose axis 0 is to be summed over.
      bytes_held: (x, params) -> what the two take of VMEM.
    """

    plain: Function
    fast: Function
    gradient: Function
    bytes_held: Callable[[jax.Array, Tree], int]


class Held(NamedTuple):
    """A stream whose gradient is finished by what made it, which reads and writes it anyway.

    A norm of a batch passes on sums over clips, which are only known when the gradient behind the
    norm is computed, everywhere. What comes back through `x` is what it would be without the norm;
    through `normed` comes the gradient of the normalised stream; through `rows`, which is zero,
    what makes one gradient of the two: see `_finished`.

    Attributes:
      x: (B, T, N, C).
      normed: x.
      rows: float32 (B, 4, C).
    """

    x: jax.Array
    normed: jax.Array
    rows: jax.Array


@jax.custom_vjp
def hold(x: jax.Array) -> Held:
    """`x`, whose gradient is finished here."""
    return _held(x)


def _held(x: jax.Array) -> Held:
    return Held(x, x, jnp.zeros((x.shape[0], 4, x.shape[-1]), jnp.float32))


hold.defvjp(
    lambda x: (_held(x), x),
    lambda x, back: (_finished_clips(x, back),),
)


def _finished(
    x: jax.Array, upstream: jax.Array, to_normed: jax.Array, rows: jax.Array
) -> jax.Array:
    """The gradient of a stream that is held, float32.

    Args:
      x: the stream.
      upstream: what came back through it.
      to_normed: the gradient of the normalised stream.
      rows: mean, and the factors of `to_normed`, of 1 and of x without mean, on axis 0.
    """
    mean, factor, constant, slope = rows
    x, upstream, to_normed = (a.astype(jnp.float32) for a in (x, upstream, to_normed))
    return upstream + factor * to_normed - constant - slope * (x - mean)


def _finished_clips(x: jax.Array, back: Held) -> jax.Array:
    """`_finished` of (B, T, N, C), in its dtype."""
    rows = jnp.moveaxis(back.rows, 1, 0)[:, :, None, None]
    return _finished(x, back.x, back.normed, rows).astype(x.dtype)


def add(branch: Branch, params: Tree, held: Held | None, x: jax.Array, norm: Norm) -> jax.Array:
    """`x + branch(norm(x))`, by kernels on TPU where they take it.

    Args:
      branch: `MLP` or `CONV`.
      params: of the branch, in the dtype in which the branch takes them.
      held: x, if it is.
      x: the stream (B, T, N, C).
      norm: of it.
    """
    if not fits(branch, x, params):
        return _plain(branch, x, norm, params)
    held = hold(x) if held is None else held._replace(x=x)
    return _add(branch, held, norm, params)


def fits(branch: Branch, x: jax.Array, params: Tree) -> bool:
    """Whether the kernels of a branch take these: `kernels_take`, and room in VMEM."""
    return kernels_take(x) and branch.bytes_held(x, params) < VMEM_BYTES


def kernels_take(x: jax.Array) -> bool:
    """Whether there are kernels for this stream: bfloat16, clips split, weights not."""
    return (
        not is_portable()
        and x.dtype == jnp.bfloat16
        and mesh_sizes().get(TENSOR, 1) == 1
        and batch_axes(x) is not None
    )


def _plain(branch: Branch, x: jax.Array, norm: Norm, params: Tree) -> jax.Array:
    return x + branch.plain(normalise(x, norm), params)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _add(branch: Branch, held: Held, norm: Norm, params: Tree) -> jax.Array:
    fast, plain = (functools.partial(form, branch) for form in (_fast, _plain))
    return jax.lax.platform_dependent(held.x, norm, params, tpu=fast, default=plain)


def _forward(branch: Branch, held: Held, *rest: Tree) -> tuple:
    return _add(branch, held, *rest), (held.x, *rest)


def _backward(branch: Branch, inputs: tuple, upstream: jax.Array) -> tuple[Held, Norm, Tree]:
    fast, plain = (functools.partial(form, branch) for form in (_fast_gradient, _plain_gradient))
    to_normed, sums, to_params = jax.lax.platform_dependent(
        *inputs, upstream, tpu=fast, default=plain
    )
    norm = inputs[1]
    factor, by_mean, by_variance, to_norm = gradient_of_norm(norm, (sums[:, 0], sums[:, 1]))
    inverse = jax.lax.rsqrt(norm.variance + norm.eps)
    rows = jnp.stack([norm.mean, factor, factor * by_mean, factor * by_variance * inverse], axis=1)
    return Held(upstream, to_normed, rows), to_norm, to_params


_add.defvjp(_forward, _backward)


def _plain_gradient(
    branch: Branch, x: jax.Array, norm: Norm, params: Tree, upstream: jax.Array
) -> tuple[jax.Array, jax.Array, Tree]:
    to_normed, to_params = jax.vjp(branch.plain, normalise(x, norm), params)[1](upstream)
    sums = [
        (to_normed.astype(jnp.float32) * factor).sum((1, 2))
        for factor in (1, standardised(x, norm))
    ]
    return to_normed, jnp.stack(sums, axis=1), to_params


def _fast(
    branch: Branch, x: jax.Array, norm: Norm, params: Tree, interpret: bool = False
) -> jax.Array:
    run = functools.partial(branch.fast, interpret=interpret)
    return on_each_device(run, _frames(x), params, beside=(_rows_of(norm),)).reshape(x.shape)


def _fast_gradient(
    branch: Branch,
    x: jax.Array,
    norm: Norm,
    params: Tree,
    upstream: jax.Array,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, Tree]:
    def run(x: jax.Array, upstream: jax.Array, rows: jax.Array, params: Tree) -> tuple:
        return branch.gradient(x, upstream, rows, params, interpret=interpret)

    to_normed, sums, to_params = on_each_device(
        run, _frames(x), params, beside=(_frames(upstream), _rows_of(norm))
    )
    sums = sums.reshape(len(x), -1, *sums.shape[1:]).sum(1)
    to_params = jax.tree.map(
        lambda leaf, parts: parts.sum(0).reshape(leaf.shape).astype(leaf.dtype), params, to_params
    )
    return to_normed.reshape(x.shape), sums, to_params


def _frames(x: jax.Array) -> jax.Array:
    """(B, T, N, C) -> (B T, N, C)."""
    return x.reshape(-1, *x.shape[2:])


def _rows_of(norm: Norm) -> jax.Array:
    """What kernels take of a norm: mean, inverse deviation, scale and bias, float32 (B, 4, C)."""
    same = (jnp.broadcast_to(v, norm.mean.shape) for v in (norm.scale, norm.bias))
    return jnp.stack([norm.mean, jax.lax.rsqrt(norm.variance + norm.eps), *same], axis=1)


def _standardised(x: jax.Array, rows: jax.Array) -> jax.Array:
    return (x.astype(jnp.float32) - rows[0:1]) * rows[1:2]


def _scaled(standardised: jax.Array, rows: jax.Array) -> jax.Array:
    return (standardised * rows[2:3] + rows[3:4]).astype(jnp.bfloat16)


def _row(vector: jax.Array) -> jax.Array:
    """A vector as a float32 row (1, n), which is what VMEM holds."""
    return vector.astype(jnp.float32).reshape(1, -1)


def _words(matrix: jax.Array) -> jax.Array:
    """Pairs of rows of a bfloat16 matrix as uint32: what `_matrix` turns back without an operation.

    bfloat16 itself lies in VMEM in halves of registers, which every product would put together.
    """
    rows, columns = matrix.shape
    pairs = matrix.astype(jnp.bfloat16).reshape(rows // 2, 2, columns)
    return jax.lax.bitcast_convert_type(pairs.swapaxes(1, 2), jnp.uint32)


def _matrix(words: jax.Array) -> jax.Array:
    return pltpu.bitcast(words, jnp.bfloat16)


def _column_sums(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32).sum(0, keepdims=True)


def _on_frames(
    kernel: Callable[..., None],
    name: str,
    frames: Sequence[jax.Array],
    clips: Sequence[jax.Array],
    weights: Sequence[jax.Array],
    outputs: Sequence[jax.ShapeDtypeStruct],
    *,
    step: int,
    of_steps: Sequence[tuple[int, int]] = (),
    sums: Sequence[tuple[int, int]] = (),
    scratch: Sequence[Any] = (),
    layer: jax.Array | None = None,
    shape: dict[str, int],
    transcendentals: int = 0,
    interpret: bool,
) -> list[jax.Array]:
    """Runs a kernel on a few frames at a time, half of them on each core.

    Args:
      kernel: (*frames, *clips, *weights, *outputs, *of_steps, *sums, *scratch) of references.
      name: in `kernel_costs`.
      frames: arrays (F, L, C), or, of layers of which one is read, (K, F, L, C).
      clips: (B, n, C), of the clip of a frame.
      weights: matrices that stay.
      outputs: like `frames`.
      step: frames at a time.
      of_steps: shapes of what every step writes, float32.
      sums: shapes of what is summed over all frames, float32.
      scratch: see `pl.pallas_call`.
      layer: which one, an int32.
      shape: as `kernel_costs` wants it.
      transcendentals: of a frame.
      interpret: run without a TPU, slowly, for tests.

    Returns:
      `outputs`, `of_steps` with an axis of steps in front, and `sums` with one of parts.
    """
    count = frames[0].shape[-3]
    parts = kernel_costs.CORES if count // step % kernel_costs.CORES == 0 else 1
    steps = count // step // parts

    def of_frames(array: jax.Array | jax.ShapeDtypeStruct) -> pl.BlockSpec:
        block = step, *array.shape[-2:]
        if len(array.shape) == 4:
            return pl.BlockSpec((None, *block), lambda p, i, at: (at[0], p * steps + i, 0, 0))
        return pl.BlockSpec(block, lambda p, i, *_: (p * steps + i, 0, 0))

    def of_clip(array: jax.Array) -> pl.BlockSpec:
        each = count // len(array) // step
        return pl.BlockSpec(
            (1, *array.shape[1:]), lambda p, i, *_: (jax.lax.div(p * steps + i, each), 0, 0)
        )

    stays = [
        pl.BlockSpec(w.shape, lambda *_: (0, 0), pipeline_mode=pl.Buffered(1)) for w in weights
    ]
    of_step = [pl.BlockSpec((1, *s), lambda p, i, *_: (p * steps + i, 0, 0)) for s in of_steps]
    summed = [pl.BlockSpec((1, *s), lambda p, i, *_: (p, 0, 0)) for s in sums]
    float32 = [(parts * steps, *s) for s in of_steps] + [(parts, *s) for s in sums]
    cost = cost_estimate(
        name,
        count,
        shape,
        transcendentals=transcendentals,
        frame_bytes=sum(map(_frame_bytes, (*frames, *outputs))),
        weight_bytes=kernel_costs.CORES * sum(w.nbytes for w in weights)
        + 4 * parts * sum(map(math.prod, sums)),
    )
    which = () if layer is None else (layer.reshape(1),)
    return pl.pallas_call(
        lambda *refs: kernel(*refs[len(which) :]),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(which),
            grid=(parts, steps),
            in_specs=[*map(of_frames, frames), *map(of_clip, clips), *stays],
            out_specs=[*map(of_frames, outputs), *of_step, *summed],
            scratch_shapes=list(scratch),
        ),
        out_shape=[*outputs, *(jax.ShapeDtypeStruct(s, jnp.float32) for s in float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=('parallel', 'arbitrary'), vmem_limit_bytes=VMEM_BYTES
        ),
        cost_estimate=cost,
        interpret=interpret,
        name=name,
    )(*which, *frames, *clips, *weights)


def _start_sums(*refs) -> None:
    """Zeros in what is summed over the frames of a core."""

    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        for ref in refs:
            ref[...] = jnp.zeros(ref.shape, ref.dtype)


def _steps(x: jax.Array, rows: jax.Array, most: int) -> int:
    """Frames at a time: the most that divide a clip."""
    frames = len(x) // len(rows)
    return max(k for k in range(1, most + 1) if frames % k == 0)


def _frame_bytes(x: jax.Array | jax.ShapeDtypeStruct) -> int:
    """A frame, the last two axes of x, in whole registers; few rows share those of others."""
    length = x.shape[-2]
    rows = length if length <= 2 else whole(length, SUBLANES)
    return rows * whole(x.shape[-1], LANES) * x.dtype.itemsize


def _like(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


# What is read of the frozen network.


def mix_fits(s: jax.Array, taps: jax.Array) -> bool:
    """Whether `mix` takes this stream (B, T, N, C) and these taps (K, B, T, N, D)."""
    return kernels_take(s) and taps.dtype == s.dtype and _mixed(s, taps) > 0


def _mixed(s: jax.Array, taps: jax.Array) -> int:
    """Frames at a time, by what the gradient holds of VMEM; 0 if not even one fits."""
    one, tapped = _frame_bytes(s), _frame_bytes(taps)
    sums = 12 * whole(s.shape[-1], LANES) * whole(taps.shape[-1], LANES)
    fitting = (k for k in (4, 2, 1) if 2 * k * (4 * one + tapped) + 4 * one + sums < VMEM_BYTES)
    return next(fitting, 0)


def mix(
    s: jax.Array, taps: jax.Array, layer: jax.Array, kernel: jax.Array, bias: jax.Array
) -> tuple[Held, Moments]:
    """`(s + taps[layer] kernel + bias) / 2`, by kernels on TPU, which read a layer where it lies.

    Args:
      s: the stream (B, T, N, C), as `mix_fits` wants it.
      taps: of all layers, (K, B, T, N, D).
      layer: an int32.
      kernel: (D, C) in the dtype of s.
      bias: (C,), likewise.

    Returns:
      (B, T, N, C), held, and mean and variance of its clips, (B, C).
    """
    held, of_frames = _mix(s, taps, layer, kernel, bias)
    return held, _clip_moments(of_frames, s.shape[0], s.shape[2])


@jax.custom_vjp
def _mix(*inputs: jax.Array) -> tuple[Held, jax.Array]:
    return _mix_forward(*inputs)[0]


def _mix_forward(*inputs: jax.Array) -> tuple:
    def plain(*inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
        u = _plain_mix(*inputs)
        return u, jax.vmap(_moments)(_frames(u))

    u, moments = jax.lax.platform_dependent(*inputs, tpu=_fast_mix, default=plain)
    return (_held(u), moments), (*inputs[1:], u)


def _plain_mix(
    s: jax.Array, taps: jax.Array, layer: jax.Array, kernel: jax.Array, bias: jax.Array
) -> jax.Array:
    tap = jax.lax.dynamic_index_in_dim(taps, layer, keepdims=False)
    return 0.5 * s + 0.5 * (einsum('...d,dc->...c', tap, kernel) + bias)


def _mix_backward(kept: tuple, back: tuple[Held, jax.Array]) -> tuple:
    """Nothing comes back through the moments. Where nobody asks for that of taps, it is dropped."""
    taps, layer, kernel, bias, u = kept

    def plain(taps: jax.Array, layer: jax.Array, u: jax.Array, back: Held) -> tuple:
        upstream = _finished_clips(u, back)
        tap = jax.lax.dynamic_index_in_dim(taps, layer, keepdims=False)
        to_kernel = einsum('...d,...c->dc', tap, upstream)
        return 0.5 * upstream, 0.5 * to_kernel, 0.5 * upstream.sum((0, 1, 2))

    to_s, to_kernel, to_bias = jax.lax.platform_dependent(
        taps, layer, u, back[0], tpu=_fast_mix_gradient, default=plain
    )
    to_tap = einsum('...c,dc->...d', to_s, kernel)
    to_taps = jax.lax.dynamic_update_index_in_dim(jnp.zeros_like(taps), to_tap, layer, 0)
    return to_s, to_taps, None, to_kernel.astype(kernel.dtype), to_bias.astype(bias.dtype)


_mix.defvjp(_mix_forward, _mix_backward)


def _on_each_device_of_layers(
    function: Function, x: jax.Array, taps: jax.Array, *whole: jax.Array, beside: Sequence = ()
) -> Tree:
    """As `on_each_device`, with taps (K, B, ...) behind x (B, ...)."""
    if math.prod(mesh_sizes().values()) == 1:
        return function(x, taps, *beside, *whole)
    clips = PartitionSpec(batch_axes(x))
    stacked = PartitionSpec(None, *clips)
    inputs = clips, stacked, *(clips for _ in beside), *(PartitionSpec() for _ in whole)
    run = jax.shard_map(function, in_specs=inputs, out_specs=clips, check_vma=False)
    return run(x, taps, *beside, *whole)


def _fast_mix(
    s: jax.Array,
    taps: jax.Array,
    layer: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    run = functools.partial(mix_forward, interpret=interpret)
    u, moments = _on_each_device_of_layers(run, s, taps, layer, kernel, bias)
    return u, moments


def _fast_mix_gradient(
    taps: jax.Array, layer: jax.Array, u: jax.Array, back: Held, interpret: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    run = functools.partial(mix_gradient, interpret=interpret)
    to_s, to_kernel, to_bias = _on_each_device_of_layers(run, u, taps, layer, beside=back)
    return to_s, 0.5 * to_kernel.sum(0).T.astype(u.dtype), 0.5 * to_bias.sum((0, 1)).astype(u.dtype)


def mix_forward(
    s: jax.Array,
    taps: jax.Array,
    layer: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """`mix` on a device: (B, T, N, C), and `_moments` (B T, 2, C)."""
    x, width = _frames(s), s.shape[-1]
    u, moments = _on_frames(
        _mix_kernel,
        'side_tap',
        (x, taps.reshape(len(taps), -1, *taps.shape[3:])),
        (),
        (_words(0.5 * kernel), 0.5 * _row(bias)),
        (_like(x), jax.ShapeDtypeStruct((len(x), 2, width), jnp.float32)),
        step=math.gcd(len(x), _mixed(x, taps)),
        layer=layer,
        shape=dict(tokens=x.shape[1], tapped=taps.shape[-1], width=width),
        interpret=interpret,
    )
    return u.reshape(s.shape), moments


def _mix_kernel(s_ref, taps_ref, kernel_ref, bias_ref, u_ref, moments_ref) -> None:
    for f in range(len(s_ref)):
        read = product(taps_ref[f], _matrix(kernel_ref[...])) + bias_ref[...]
        u_ref[f] = (0.5 * s_ref[f].astype(jnp.float32) + read).astype(u_ref.dtype)
        moments_ref[f] = _moments(u_ref[f])


def mix_gradient(
    u: jax.Array,
    taps: jax.Array,
    upstream: jax.Array,
    to_normed: jax.Array,
    rows: jax.Array,
    layer: jax.Array,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradient of `mix`, whose result is u, by the stream, and twice those of kernel and bias.

    Returns:
      (B, T, N, C) as u; transposed float32 (parts, C, D); (parts, 1, C).
    """
    x, width, tapped = _frames(u), u.shape[-1], taps.shape[-1]
    to_s, to_kernel, to_bias = _on_frames(
        _mix_gradient_kernel,
        'side_tap_gradient',
        (x, _frames(upstream), _frames(to_normed), taps.reshape(len(taps), -1, *taps.shape[3:])),
        (rows,),
        (),
        (_like(x),),
        step=_steps(x, rows, _mixed(x, taps)),
        sums=((width, tapped), (1, width)),
        layer=layer,
        shape=dict(tokens=x.shape[1], tapped=tapped, width=width),
        interpret=interpret,
    )
    return to_s.reshape(u.shape), to_kernel, to_bias


def _mix_gradient_kernel(
    u_ref, upstream_ref, to_normed_ref, taps_ref, rows_ref, to_s_ref, to_kernel_ref, to_bias_ref
) -> None:
    _start_sums(to_kernel_ref, to_bias_ref)
    rows = [rows_ref[0, i : i + 1] for i in range(4)]
    for f in range(len(u_ref)):
        upstream = _finished(u_ref[f], upstream_ref[f], to_normed_ref[f], rows)
        to_kernel_ref[0] += product(upstream.astype(u_ref.dtype), taps_ref[f], (0, 0))
        to_bias_ref[0] += _column_sums(upstream)
        to_s_ref[f] = (0.5 * upstream).astype(to_s_ref.dtype)


# Attention within frames.


def attend(
    x: jax.Array, token: jax.Array, positions: jax.Array, norm: Tree, attn: Tree
) -> tuple[Held, Moments]:
    """`x + attention(LayerNorm([x + positions | token]))`, by kernels on TPU.

    Args:
      x: the stream (B, T, N, C), as `attention_fits` wants it.
      token: what its tokens look at beside each other, (B, T, 1, C) in the dtype of x.
      positions: (N, C), likewise.
      norm: `scale` and `bias`, (C,).
      attn: see `kernels.trained_attention`.

    Returns:
      (B, T, N, C), held, and mean and variance of its clips, (B, C).
    """
    held, of_frames = _attend(
        x, token, positions, norm, jax.tree.map(lambda leaf: leaf.astype(x.dtype), attn)
    )
    return held, _clip_moments(of_frames, x.shape[0], x.shape[2])


def _clip_moments(of_frames: jax.Array, clips: int, count: int) -> Moments:
    """Of every frame its mean and the squares around it, (B T, 2, C), over `count` values."""
    mean, squares = jnp.moveaxis(of_frames.reshape(clips, -1, *of_frames.shape[1:]), 2, 0)
    joint = mean.mean(1, keepdims=True)
    return joint[:, 0], (squares / count + jnp.square(mean - joint)).mean(1)


def looks_at(
    x: jax.Array, token: jax.Array, positions: jax.Array, norm: Tree | None, attn: Tree
) -> jax.Array:
    """The branch of `attend` alone, (B, T, N, C); without a norm in front where that is None."""
    tokens = jnp.concatenate([x + positions, token], axis=2)
    if norm is not None:
        tokens = layer_norm(tokens, norm['scale'], norm['bias'])
    found = trained_attention(_frames(tokens).astype(x.dtype), attn, x.shape[2])
    return found.reshape(x.shape)


def _plain_attend(x: jax.Array, *rest: Tree) -> jax.Array:
    return x + looks_at(x, *rest)


def attention_fits(x: jax.Array, attn: Tree) -> bool:
    """Whether `attend` takes these."""
    *_, num_heads, head_dim = attn['qkv']['kernel'].shape
    fits = head_dim <= LANES and _attention_bytes(x.shape, num_heads, head_dim) < VMEM_BYTES
    return kernels_take(x) and fits


def _attention_bytes(shape: Sequence[int], num_heads: int, head_dim: int, frames: int = 1) -> int:
    """Of the gradient with so many frames (..., N, C) at a time."""
    lanes = groups_of_heads(num_heads, head_dim) * LANES
    length, width = (whole(size, LANES) for size in shape[-2:])
    weights = 2 * width * 7 * lanes + 2 * 4 * shape[-1] * 4 * lanes
    # Six arrays, twice; tokens, projections and logits. Positions and their gradient.
    arrays = 2 * 6 * 2 * whole(shape[-2], SUBLANES) * width
    between = length * (4 * width + 6 * lanes) + 9 * (1 + heads_per_group(head_dim)) * length**2
    return weights + frames * (arrays + between) + 12 * length * width


def _attended(x: jax.Array, num_heads: int, head_dim: int, clip: int = 2) -> int:
    """Frames (F, N, C) at a time, of clips of so many: two, if they fit."""
    two = _attention_bytes(x.shape, num_heads, head_dim, 2) < VMEM_BYTES
    return 2 if two and clip % 2 == len(x) % 2 == 0 else 1


@jax.custom_vjp
def _attend(*inputs: Tree) -> tuple[Held, jax.Array]:
    return _attend_forward(*inputs)[0]


def _attend_forward(*inputs: Tree) -> tuple:
    def plain(*inputs: Tree) -> tuple[jax.Array, jax.Array, jax.Array]:
        heads = jnp.zeros(_heads_shape(inputs[0], inputs[-1]), inputs[0].dtype)
        y = _plain_attend(*inputs)
        return y, heads, jax.vmap(_moments)(_frames(y))

    y, heads, moments = jax.lax.platform_dependent(*inputs, tpu=_fast_attend, default=plain)
    return (_held(y), moments), (inputs, y, heads)


def _attend_backward(kept: tuple, back: tuple[Held, jax.Array]) -> tuple:
    """Nothing comes back through the moments: whoever takes them knows what they are of."""

    def plain(inputs: tuple, y: jax.Array, heads: jax.Array, back: Held) -> tuple:
        return jax.vjp(_plain_attend, *inputs)[1](_finished_clips(y, back))

    fast = _fast_attend_gradient
    return jax.lax.platform_dependent(*kept, back[0], tpu=fast, default=plain)


_attend.defvjp(_attend_forward, _attend_backward)


def _moments(x: jax.Array) -> jax.Array:
    """Mean and sum of squares around it of the columns of (N, C): float32 (2, C)."""
    x = x.astype(jnp.float32)
    mean = x.mean(0, keepdims=True)
    return jnp.concatenate([mean, jnp.square(x - mean).sum(0, keepdims=True)])


def _heads_shape(x: jax.Array, attn: Tree) -> tuple[int, ...]:
    *_, num_heads, head_dim = attn['qkv']['kernel'].shape
    return *_frames(x).shape[:2], groups_of_heads(num_heads, head_dim) * LANES


def grouped_weights(attn: Tree) -> dict[str, jax.Array]:
    """The weights as `kernels.frame_attention` has their channels: matrices, and biases as rows."""
    qkv, out = attn['qkv'], attn['out']
    rows = jnp.moveaxis(grouped(jnp.moveaxis(out['kernel'], -1, 0)[:, None]), 0, -1)
    return {
        'qkv': grouped(qkv['kernel']),
        'qkv_bias': _row(grouped(qkv['bias'])),
        'out': rows,
        'out_bias': _row(out['bias']),
    }


def _fast_attend(
    x: jax.Array,
    token: jax.Array,
    positions: jax.Array,
    norm: Tree,
    attn: Tree,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The result, the heads (B T, N, g 128) for the gradient, and `_moments` (B T, 2, C)."""
    *_, num_heads, head_dim = attn['qkv']['kernel'].shape
    run = functools.partial(
        attend_forward, num_heads=num_heads, head_dim=head_dim, interpret=interpret
    )
    y, *rest = on_each_device(
        run,
        _frames(x),
        (positions.astype(jnp.float32), norm, grouped_weights(attn)),
        beside=(_frames(token).astype(jnp.float32),),
    )
    return y.reshape(x.shape), *rest


def _fast_attend_gradient(
    inputs: tuple, y: jax.Array, heads: jax.Array, back: Held, interpret: bool = False
) -> tuple:
    x, token, positions, norm, attn = inputs
    *_, num_heads, head_dim = attn['qkv']['kernel'].shape
    run = functools.partial(
        attend_gradient, num_heads=num_heads, head_dim=head_dim, interpret=interpret
    )
    grouped, ungroup = jax.vjp(grouped_weights, attn)
    to_x, to_token, (to_positions, to_norm, to_grouped) = on_each_device(
        run,
        _frames(x),
        (positions.astype(jnp.float32), norm, grouped),
        beside=(
            _frames(token).astype(jnp.float32),
            heads,
            *map(_frames, (y, back.x, back.normed)),
            back.rows,
        ),
    )

    def joined(leaf: jax.Array, parts: jax.Array) -> jax.Array:
        return parts.sum(0).reshape(leaf.shape).astype(leaf.dtype)

    return (
        to_x.reshape(x.shape),
        to_token.reshape(token.shape).astype(token.dtype),
        joined(positions, to_positions),
        jax.tree.map(joined, norm, to_norm),
        *ungroup(jax.tree.map(joined, grouped, to_grouped)),
    )


def attend_forward(
    x: jax.Array,
    token: jax.Array,
    weights: tuple[jax.Array, Tree, Tree],
    *,
    num_heads: int,
    head_dim: int,
    interpret: bool = False,
) -> list[jax.Array]:
    """`attend` of frames.

    Args:
      x: (F, N, C) bfloat16.
      token: (F, 1, C) float32.
      weights: positions (N, C) float32, norm, `grouped_weights`.
      num_heads: h.
      head_dim: d.
      interpret: run without a TPU, slowly, for tests.

    Returns:
      (F, N, C), the heads before they are projected, (F, N, g 128), and `_moments`, (F, 2, C).
    """
    positions, norm, grouped = weights
    frames, length, width = x.shape
    lanes = grouped['out'].shape[0]
    step = _attended(x, num_heads, head_dim)
    return _on_frames(
        functools.partial(_attend_kernel, num_heads=num_heads, head_dim=head_dim),
        'side_attention',
        (x, token),
        (),
        (
            positions,
            _row(norm['scale']),
            _row(norm['bias']),
            _words(grouped['qkv']),
            grouped['qkv_bias'],
            _words(grouped['out']),
            grouped['out_bias'],
        ),
        (
            _like(x),
            jax.ShapeDtypeStruct((frames, length, lanes), x.dtype),
            jax.ShapeDtypeStruct((frames, 2, width), jnp.float32),
        ),
        step=step,
        scratch=[pltpu.VMEM((step, length + 1, width), jnp.float32)],
        shape=dict(tokens=length, width=width, heads=num_heads, head_dim=head_dim),
        transcendentals=num_heads * length * (length + 1),
        interpret=interpret,
    )


def _standard_tokens(x: jax.Array, token_ref, positions_ref, tokens_ref) -> tuple[jax.Array, ...]:
    """The tokens of a frame, of mean 0 and variance 1, and what they were divided by, inverse."""
    length = len(x)
    tokens_ref[:length] = x.astype(jnp.float32) + positions_ref[...]
    tokens_ref[length:] = token_ref[...]
    tokens = tokens_ref[...]
    centred = tokens - tokens.mean(-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + LAYER_NORM_EPS)
    return centred * inverse, inverse


def _groups(num_heads: int, head_dim: int) -> Iterator[tuple[int, int]]:
    """Number and heads of every group that shares registers."""
    each = heads_per_group(head_dim)
    for number, start in enumerate(range(0, num_heads, each)):
        yield number, min(each, num_heads - start)


def _queries_keys_values(z: jax.Array, qkv_ref, bias_ref, number: int) -> list[jax.Array]:
    """Of a group of heads; the last token asks nothing."""
    found = []
    for i, part in enumerate((z[:-1], z, z)):
        lanes = group_lanes(3 * number + i)
        projected = product(part, _matrix(qkv_ref[:, lanes])) + bias_ref[:, lanes]
        found.append(projected.astype(z.dtype))
    return found


def _attend_kernel(
    x_ref, token_ref, positions_ref, scale_ref, shift_ref, qkv_ref, qkv_bias_ref, out_ref,
    out_bias_ref, y_ref, heads_ref, moments_ref, tokens_ref,
    *, num_heads: int, head_dim: int,
) -> None:  # fmt: skip
    """A few frames, written out: what one waits for leaves time for others."""
    frames, normed = range(len(x_ref)), []
    for f in frames:
        standard, _ = _standard_tokens(x_ref[f], token_ref.at[f], positions_ref, tokens_ref.at[f])
        normed.append((standard * scale_ref[...] + shift_ref[...]).astype(x_ref.dtype))
    found = [[] for _ in frames]
    for number, heads in _groups(num_heads, head_dim):
        projected = [_queries_keys_values(z, qkv_ref, qkv_bias_ref, number) for z in normed]
        begun = [begin_to_attend(*one, heads, head_dim) for one in projected]
        for f in frames:
            mixed = finish_attending(*begun[f], head_dim).astype(x_ref.dtype)
            heads_ref[f, :, group_lanes(number)] = mixed
            found[f].append(mixed)
    for f in frames:
        branch = product(jnp.concatenate(found[f], axis=1), _matrix(out_ref[...]))
        y_ref[f] = (x_ref[f].astype(jnp.float32) + branch + out_bias_ref[...]).astype(y_ref.dtype)
        moments_ref[f] = _moments(y_ref[f])


def attend_gradient(
    x: jax.Array,
    token: jax.Array,
    heads: jax.Array,
    y: jax.Array,
    upstream: jax.Array,
    to_normed: jax.Array,
    rows: jax.Array,
    weights: tuple[jax.Array, Tree, Tree],
    *,
    num_heads: int,
    head_dim: int,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, tuple[jax.Array, Tree, Tree]]:
    """The gradient of `attend_forward`, by x, token and weights; see there.

    Args:
      heads: that it returned.
      y: its result.
      upstream: what came back through it, as the next two, see `Held`; (F, N, C) bfloat16.
      to_normed: likewise.
      rows: (B, 4, C) float32.

    Returns:
      (F, N, C) bfloat16; (F, 1, C) float32; and float32, like `weights`, axis 0 to be summed over.
    """
    positions, norm, grouped = weights
    length, width = x.shape[1:]
    lanes = grouped['out'].shape[0]
    step = _attended(x, num_heads, head_dim, clip=len(x) // len(rows))
    to_x, to_token, to_positions, to_scale, to_bias, to_qkv, to_qkv_bias, to_out, to_out_bias = (
        _on_frames(
            functools.partial(_attend_gradient_kernel, num_heads=num_heads, head_dim=head_dim),
            'side_attention_gradient',
            (x, token, heads, y, upstream, to_normed),
            (rows,),
            (
                positions,
                _row(norm['scale']),
                _row(norm['bias']),
                _words(grouped['qkv']),
                grouped['qkv_bias'],
                _words(grouped['qkv'].T),
                _words(grouped['out'].T),
            ),
            (_like(x), _like(token)),
            step=step,
            sums=(
                (length, width),
                (1, width),
                (1, width),
                (width, 3 * lanes),
                (1, 3 * lanes),
                (width, lanes),
                (1, width),
            ),
            scratch=[
                pltpu.VMEM((step, length + 1, width), jnp.float32),
                pltpu.VMEM((step, length + 1, 3 * lanes), x.dtype),
            ],
            shape=dict(tokens=length, width=width, heads=num_heads, head_dim=head_dim),
            transcendentals=num_heads * length * (length + 1),
            interpret=interpret,
        )
    )
    to_grouped = {
        'qkv': to_qkv,
        'qkv_bias': to_qkv_bias,
        'out': to_out.swapaxes(1, 2),
        'out_bias': to_out_bias,
    }
    return to_x, to_token, (to_positions, {'scale': to_scale, 'bias': to_bias}, to_grouped)


def _attend_gradient_kernel(
    x_ref,
    token_ref,
    heads_ref,
    y_ref,
    upstream_ref,
    to_normed_ref,
    rows_ref,
    positions_ref,
    scale_ref,
    shift_ref,
    qkv_ref,
    qkv_bias_ref,
    qkv_columns_ref,
    out_columns_ref,
    to_x_ref,
    to_token_ref,
    to_positions_ref,
    to_scale_ref,
    to_shift_ref,
    to_qkv_ref,
    to_qkv_bias_ref,
    to_out_ref,
    to_out_bias_ref,
    tokens_ref,
    to_projected_ref,
    *,
    num_heads: int,
    head_dim: int,
) -> None:
    """As forward; scratch for tokens, then their gradient, and for that of the projections."""
    _start_sums(
        to_positions_ref, to_scale_ref, to_shift_ref, to_qkv_ref, to_qkv_bias_ref, to_out_ref,
        to_out_bias_ref,
    )  # fmt: skip
    rows, length = [rows_ref[0, i : i + 1] for i in range(4)], x_ref.shape[1]
    for f in range(len(x_ref)):
        whole_upstream = _finished(y_ref[f], upstream_ref[f], to_normed_ref[f], rows)
        upstream = whole_upstream.astype(x_ref.dtype)
        standard, inverse = _standard_tokens(
            x_ref[f], token_ref.at[f], positions_ref, tokens_ref.at[f]
        )
        z = (standard * scale_ref[...] + shift_ref[...]).astype(upstream.dtype)
        to_heads = product(upstream, _matrix(out_columns_ref[...])).astype(upstream.dtype)
        to_out_ref[0] += product(upstream, heads_ref[f], (0, 0))
        to_out_bias_ref[0] += _column_sums(whole_upstream)
        for number, heads in _groups(num_heads, head_dim):
            projected = _queries_keys_values(z, qkv_ref, qkv_bias_ref, number)
            upstream_of_group = to_heads[:, number * LANES : (number + 1) * LANES]
            found = group_gradient(*projected, upstream_of_group, heads, head_dim)
            for i, gradient in enumerate(found):
                lanes, count = group_lanes(3 * number + i), len(gradient)
                to_projected_ref[f, :count, lanes] = gradient.astype(upstream.dtype)
                to_qkv_bias_ref[0, :, lanes] += _column_sums(gradient)
            nothing = jnp.zeros((1, LANES), upstream.dtype)
            to_projected_ref[f, length:, group_lanes(3 * number)] = nothing
        to_projected = to_projected_ref[f]
        to_qkv_ref[0] += product(z, to_projected, (0, 0))
        to_z = product(to_projected, _matrix(qkv_columns_ref[...]))
        to_scale_ref[0] += _column_sums(to_z * standard)
        to_shift_ref[0] += _column_sums(to_z)
        to_standard = to_z * scale_ref[...]
        shared = to_standard.mean(-1, keepdims=True)
        along = (to_standard * standard).mean(-1, keepdims=True)
        tokens_ref[f] = (to_standard - shared - standard * along) * inverse
        to_token_ref[f] = tokens_ref[f, length:]
        to_tokens = tokens_ref[f, :length]
        to_positions_ref[0] += to_tokens
        to_x_ref[f] = (whole_upstream + to_tokens).astype(to_x_ref.dtype)


# Two maps with GELU between: parameters c_fc and c_proj, each with kernel and bias.


def _plain_mlp(z: jax.Array, mlp: Tree) -> jax.Array:
    fc, proj = mlp['c_fc'], mlp['c_proj']
    hidden = einsum('...i,io->...o', z.astype(fc['kernel'].dtype), fc['kernel']) + fc['bias']
    return einsum('...i,io->...o', ACTIVATIONS['gelu'](hidden), proj['kernel']) + proj['bias']


def mlp_forward(x: jax.Array, rows: jax.Array, mlp: Tree, *, interpret: bool = False) -> jax.Array:
    """`Branch.fast` of the MLP."""
    _, length, width = x.shape
    hidden = mlp['c_fc']['kernel'].shape[1]
    fc, proj = mlp['c_fc'], mlp['c_proj']
    return _on_frames(
        _mlp_kernel,
        'side_mlp',
        (x,),
        (rows,),
        (_words(fc['kernel']), _row(fc['bias']), _words(proj['kernel']), _row(proj['bias'])),
        (_like(x),),
        step=_steps(x, rows, 4),
        shape=dict(tokens=length, width=width, hidden=hidden),
        transcendentals=length * hidden,
        interpret=interpret,
    )[0]


def _mlp_kernel(x_ref, rows_ref, fc_ref, fc_bias_ref, proj_ref, proj_bias_ref, y_ref) -> None:
    rows = rows_ref[0]

    def frame(i: jax.Array, _: None) -> None:
        x = x_ref[i]
        z = _scaled(_standardised(x, rows), rows)
        hidden = fitted_gelu(product(z, _matrix(fc_ref[...])) + fc_bias_ref[...]).astype(x.dtype)
        y = x.astype(jnp.float32) + product(hidden, _matrix(proj_ref[...])) + proj_bias_ref[...]
        y_ref[i] = y.astype(y_ref.dtype)

    jax.lax.fori_loop(0, x_ref.shape[0], frame, None)


def mlp_gradient(
    x: jax.Array, upstream: jax.Array, rows: jax.Array, mlp: Tree, *, interpret: bool = False
) -> tuple[jax.Array, jax.Array, Tree]:
    """`Branch.gradient` of the MLP."""
    _, length, width = x.shape
    fc, proj = mlp['c_fc'], mlp['c_proj']
    hidden = fc['kernel'].shape[1]
    to_normed, sums, to_fc, to_fc_bias, to_proj, to_proj_bias = _on_frames(
        _mlp_gradient_kernel,
        'side_mlp_gradient',
        (x, upstream),
        (rows,),
        (
            _words(fc['kernel']),
            _row(fc['bias']),
            _words(fc['kernel'].T),
            _words(proj['kernel'].T),
        ),
        (_like(x),),
        step=_steps(x, rows, 2),
        of_steps=((2, width),),
        sums=((width, hidden), (1, hidden), (width, hidden), (1, width)),
        shape=dict(tokens=length, width=width, hidden=hidden),
        transcendentals=length * hidden,
        interpret=interpret,
    )
    gradients = {
        'c_fc': {'kernel': to_fc, 'bias': to_fc_bias},
        'c_proj': {'kernel': to_proj.swapaxes(1, 2), 'bias': to_proj_bias},
    }
    return to_normed, sums, gradients


def _mlp_gradient_kernel(
    x_ref,
    upstream_ref,
    rows_ref,
    fc_ref,
    fc_bias_ref,
    fc_columns_ref,
    proj_columns_ref,
    to_normed_ref,
    sums_ref,
    to_fc_ref,
    to_fc_bias_ref,
    to_proj_ref,
    to_proj_bias_ref,
) -> None:
    """The second map's gradient comes transposed: that has fewer rows to go through."""
    rows = rows_ref[0]
    _start_sums(to_fc_ref, to_fc_bias_ref, to_proj_ref, to_proj_bias_ref)
    sums_ref[...] = jnp.zeros(sums_ref.shape, sums_ref.dtype)

    for i in range(len(x_ref)):
        x, upstream = x_ref[i], upstream_ref[i]
        standardised = _standardised(x, rows)
        z = _scaled(standardised, rows)
        before = product(z, _matrix(fc_ref[...])) + fc_bias_ref[...]
        to_hidden = product(upstream, _matrix(proj_columns_ref[...]))
        hidden, to_before = jax.jvp(fitted_gelu, (before,), (to_hidden,))
        to_fc_bias_ref[0] += _column_sums(to_before)
        to_proj_bias_ref[0] += _column_sums(upstream)
        hidden, to_before = hidden.astype(x.dtype), to_before.astype(x.dtype)
        to_fc_ref[0] += product(z, to_before, (0, 0))
        to_proj_ref[0] += product(upstream, hidden, (0, 0))
        to_normed = product(to_before, _matrix(fc_columns_ref[...]))
        to_normed_ref[i] = to_normed.astype(to_normed_ref.dtype)
        sums_ref[0, 0:1] += _column_sums(to_normed)
        sums_ref[0, 1:2] += _column_sums(to_normed * standardised)


def _mlp_bytes(x: jax.Array, mlp: Tree) -> int:
    """Of the gradient: three arrays twice, weights, sums twice, hidden channels in float32."""
    width, hidden = mlp['c_fc']['kernel'].shape
    length = whole(x.shape[-2], SUBLANES)
    frames = 2 * 2 * 3 * _frame_bytes(x)
    weights = 3 * 2 * whole(width, LANES) * whole(hidden, LANES)
    sums = 2 * 2 * 4 * width * whole(hidden, LANES)
    return frames + weights + sums + 12 * length * hidden


MLP = Branch(_plain_mlp, mlp_forward, mlp_gradient, _mlp_bytes)


# A map, a depthwise convolution over three frames, a map: parameters pw_1, dw and pw_2.


def _plain_conv(z: jax.Array, conv: Tree) -> jax.Array:
    first, second = conv['pw_1'], conv['pw_2']
    y = einsum('...i,io->...o', z.astype(first['kernel'].dtype), first['kernel']) + first['bias']
    y = depthwise(y, conv['dw']['kernel'], conv['dw']['bias'])
    return einsum('...i,io->...o', y, second['kernel']) + second['bias']


def conv_forward(
    x: jax.Array, rows: jax.Array, conv: Tree, *, interpret: bool = False
) -> jax.Array:
    """`Branch.fast` of the convolution."""
    _, length, width = x.shape
    frames = len(x) // len(rows)
    return _on_frames(
        _conv_kernel,
        'side_conv',
        (x,),
        (rows,),
        (
            _words(conv['pw_1']['kernel']),
            _row(conv['pw_1']['bias']),
            conv['dw']['kernel'].astype(jnp.float32),
            _row(conv['dw']['bias']),
            _words(conv['pw_2']['kernel']),
            _row(conv['pw_2']['bias']),
        ),
        (_like(x),),
        step=frames,
        scratch=[pltpu.VMEM((3, length, width), jnp.float32)],
        shape=dict(tokens=length, width=width, clip=frames),
        interpret=interpret,
    )[0]


def _ring(ref, frame: int):
    """Where a frame is among the last three."""
    return ref.at[frame % 3]


def _conv_kernel(
    x_ref, rows_ref, first_ref, first_bias_ref, dw_ref, dw_bias_ref, second_ref, second_bias_ref,
    y_ref, ring_ref,
) -> None:  # fmt: skip
    """One clip, a frame after the other; the scratch has what three of them are after `pw_1`."""
    rows, frames = rows_ref[0], x_ref.shape[0]

    def expand(i: int) -> None:
        z = _scaled(_standardised(x_ref[i], rows), rows)
        _ring(ring_ref, i)[...] = product(z, _matrix(first_ref[...])) + first_bias_ref[...]

    def reduce(i: int) -> None:
        taps = (_ring(ring_ref, i + tap)[...] * dw_ref[tap + 1 : tap + 2] for tap in (-1, 0, 1))
        mixed = (sum(taps) + dw_bias_ref[...]).astype(x_ref.dtype)
        y = (
            x_ref[i].astype(jnp.float32)
            + product(mixed, _matrix(second_ref[...]))
            + second_bias_ref[...]
        )
        y_ref[i] = y.astype(y_ref.dtype)

    ring_ref[...] = jnp.zeros(ring_ref.shape, ring_ref.dtype)
    expand(0)
    for i in range(frames - 1):
        expand(i + 1)
        reduce(i)
    _ring(ring_ref, frames)[...] = jnp.zeros(ring_ref.shape[1:], ring_ref.dtype)
    reduce(frames - 1)


def conv_gradient(
    x: jax.Array, upstream: jax.Array, rows: jax.Array, conv: Tree, *, interpret: bool = False
) -> tuple[jax.Array, jax.Array, Tree]:
    """`Branch.gradient` of the convolution."""
    _, length, width = x.shape
    frames = len(x) // len(rows)
    first, dw, second = conv['pw_1'], conv['dw'], conv['pw_2']
    square, row, ring = (width, width), (1, width), pltpu.VMEM((3, length, width), jnp.float32)
    to_normed, sums, to_first, to_first_bias, to_dw, to_dw_bias, to_second, to_second_bias = (
        _on_frames(
            _conv_gradient_kernel,
            'side_conv_gradient',
            (x, upstream),
            (rows,),
            (
                _words(first['kernel']),
                _row(first['bias']),
                dw['kernel'].astype(jnp.float32),
                _row(dw['bias']),
                _words(first['kernel'].T),
                _words(second['kernel'].T),
            ),
            (_like(x),),
            step=frames,
            of_steps=((2, width),),
            sums=(square, row, (3, width), row, square, row),
            scratch=[ring, ring],
            shape=dict(tokens=length, width=width, clip=frames),
            interpret=interpret,
        )
    )
    gradients = {
        'pw_1': {'kernel': to_first, 'bias': to_first_bias},
        'dw': {'kernel': to_dw, 'bias': to_dw_bias},
        'pw_2': {'kernel': to_second, 'bias': to_second_bias},
    }
    return to_normed, sums, gradients


def _conv_gradient_kernel(
    x_ref,
    upstream_ref,
    rows_ref,
    first_ref,
    first_bias_ref,
    dw_ref,
    dw_bias_ref,
    first_columns_ref,
    second_columns_ref,
    to_normed_ref,
    sums_ref,
    to_first_ref,
    to_first_bias_ref,
    to_dw_ref,
    to_dw_bias_ref,
    to_second_ref,
    to_second_bias_ref,
    before_ref,
    behind_ref,
) -> None:
    """One clip; rings of what is before the depthwise map, and of the gradient behind it."""
    rows, frames = rows_ref[0], x_ref.shape[0]
    _start_sums(
        to_first_ref,
        to_first_bias_ref,
        to_dw_ref,
        to_dw_bias_ref,
        to_second_ref,
        to_second_bias_ref,
    )
    sums_ref[...] = jnp.zeros(sums_ref.shape, sums_ref.dtype)

    def enter(i: int) -> None:
        z = _scaled(_standardised(x_ref[i], rows), rows)
        _ring(before_ref, i)[...] = product(z, _matrix(first_ref[...])) + first_bias_ref[...]
        _ring(behind_ref, i)[...] = product(upstream_ref[i], _matrix(second_columns_ref[...]))

    def leave(i: int) -> None:
        upstream = upstream_ref[i]
        before = [_ring(before_ref, i + tap)[...] for tap in (-1, 0, 1)]
        behind = [_ring(behind_ref, i + tap)[...] for tap in (-1, 0, 1)]
        taps = [dw_ref[tap : tap + 1] for tap in range(3)]
        mixed = sum(b * tap for b, tap in zip(before, taps)) + dw_bias_ref[...]
        to_second_ref[0] += product(mixed.astype(upstream.dtype), upstream, (0, 0))
        to_second_bias_ref[0] += _column_sums(upstream)
        for tap in range(3):
            to_dw_ref[0, tap : tap + 1] += _column_sums(before[tap] * behind[1])
        to_dw_bias_ref[0] += _column_sums(behind[1])
        to_before = sum(b * tap for b, tap in zip(behind, reversed(taps)))
        to_first_bias_ref[0] += _column_sums(to_before)
        to_before = to_before.astype(upstream.dtype)
        standardised = _standardised(x_ref[i], rows)
        to_first_ref[0] += product(_scaled(standardised, rows), to_before, (0, 0))
        to_normed = product(to_before, _matrix(first_columns_ref[...]))
        to_normed_ref[i] = to_normed.astype(to_normed_ref.dtype)
        sums_ref[0, 0:1] += _column_sums(to_normed)
        sums_ref[0, 1:2] += _column_sums(to_normed * standardised)

    for ref in (before_ref, behind_ref):
        ref[...] = jnp.zeros(ref.shape, ref.dtype)
    enter(0)
    for i in range(frames - 1):
        enter(i + 1)
        leave(i)
    for ref in (before_ref, behind_ref):
        _ring(ref, frames)[...] = jnp.zeros(ref.shape[1:], ref.dtype)
    leave(frames - 1)


def _conv_bytes(x: jax.Array, conv: Tree) -> int:
    """Of the gradient: three arrays of a clip twice, weights, sums twice, and two rings."""
    width = whole(x.shape[-1], LANES)
    clips = 2 * 3 * x.shape[1] * _frame_bytes(x)
    return clips + (3 * 2 + 2 * 2 * 4) * width * width + (2 * 3 + 8) * 2 * _frame_bytes(x)


CONV = Branch(_plain_conv, conv_forward, conv_gradient, _conv_bytes)
