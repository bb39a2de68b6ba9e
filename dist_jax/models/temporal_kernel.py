"""DiST's temporal encoder in a kernel for TPU: a clip stays in VMEM, and so does what is between.

    y = quick_gelu(x + conv_space(quick_gelu(conv_time(LayerNorm x))))

XLA's form writes every step of it to memory and lays arrays out anew for the convolutions. Here one
kernel reads x and writes y, and another reads x and the gradient of y, computes everything between
once more, and writes the gradient of x; gradients of weights are summed over the clips of a core.

Frames are worked on one after the other, rows being places of a frame. A place's neighbours in time
are rows of other frames. Those in space are the rows one, or one line of the frame, before and
behind, read out of a frame that has room around it, three times: with its last column zeroed for
the neighbours to the left, as it is, and with its first one zeroed for those to the right. Such a
read begins at any row, which costs nothing as long as numbers are float32; they are rounded for the
products behind it.

Frame t of a clip needs normed frames t - p to t + p (p: half of the temporal kernel), and in the
backward pass the gradients of as many frames. Each round of the loop takes several frames one step
further. Products are issued in the order of the program, so those of one frame stand where those
of another would wait for a norm or an activation. Clips that VMEM has no room for are cut in time,
and what a part needs of its neighbours is computed there once more.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dist_jax.models import kernel_costs, kernels
from dist_jax.models.kernel_costs import LANES, SUBLANES, whole
from dist_jax.models.layers import LAYER_NORM_EPS

Tree = Any

SLOPE = 1.702  # of the sigmoid in quick_gelu


def fits(x: jax.Array, params: Tree) -> bool:
    """Whether the kernels take this: bfloat16, channels of one register, room in VMEM."""
    channels, hidden = params['c_fc1']['kernel'].shape[1:]
    return (
        kernels.fits(1, max(channels, hidden), x.dtype)
        and math.isqrt(x.shape[2]) ** 2 == x.shape[2]
        and not kernels.is_tensor_split()
        and frames_at_a_time(x.shape, params['c_fc1']['kernel'].shape[0]) is not None
    )


def frames_at_a_time(shape: tuple[int, ...], kernel_size: int) -> int | None:
    """Frames of (B, T, N, S) that the backward kernel has room for; None if not even a few.

    All of a clip, or a part of it that divides it.
    """
    _, frames, places, _ = shape
    for some in (frames // parts for parts in range(1, frames + 1) if frames % parts == 0):
        cut = some < frames
        around = 4 * (kernel_size // 2) * cut
        if some + around <= frames and _held(some, cut, places, kernel_size) < kernels.VMEM_BYTES:
            return some
    return None


def _held(frames: int, cut: bool, places: int, kernel_size: int) -> int:
    """Bytes of VMEM: blocks twice, rings, a frame with room around it six times, weights, sums."""
    half = kernel_size // 2
    around = (6 * half) * cut  # of x and its gradient
    blocks = 2 * 2 * (3 * frames + around) * whole(places, 2 * SUBLANES)
    rings = 4 * (2 * kernel_size + half + 5) * whole(places, SUBLANES)
    rims = 4 * 6 * _rim(places)[1]
    values = 4 * 30 * whole(places, SUBLANES)
    weights = (kernel_size + 9) * LANES * (2 * 2 + 2 * 4)
    return LANES * (blocks + rings + rims + values + weights)


def _rim(places: int) -> tuple[int, int]:
    """Where a frame begins in the rows that have room around it, and how many these are."""
    begin = whole(math.isqrt(places) + 1, SUBLANES)
    return begin, whole(begin + places + math.isqrt(places) + 1, SUBLANES)


def temporal_net(x: jax.Array, params: Tree, interpret: bool = False) -> jax.Array:
    """The block; see the module.

    Args:
      x: (B, T, N, S) bfloat16, N = g * g places line by line.
      params: `ln` with `scale` and `bias` (S,), `c_fc1` with `kernel` (k, S, H) and `bias` (H,),
        `c_fc2` with `kernel` (3, 3, H, S) and `bias` (S,).
      interpret: run without a TPU, slowly, for tests.

    Returns:
      (B, T, N, S).
    """
    weights = _weights(params, x.dtype)
    size = params['c_fc1']['kernel'].shape[0]
    clips, frames, places, channels = x.shape
    some = frames_at_a_time(x.shape, size)
    half = size // 2
    clip = pl.BlockSpec((1, some, places, channels), lambda b, c: (b, c, 0, 0))
    _, rows = _rim(places)
    return pl.pallas_call(
        functools.partial(_forward_kernel, frames=frames),
        grid=(clips, frames // some),
        in_specs=[_windows(some, half * (some < frames), x.shape), *map(_stays, weights)],
        out_specs=clip,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        scratch_shapes=[
            pltpu.VMEM((size, places, channels), jnp.float32),
            pltpu.VMEM((3, rows, LANES), jnp.float32),
        ],
        compiler_params=_options(),
        cost_estimate=_cost('temporal_net', x.shape, params, arrays=2),
        interpret=interpret,
        name='temporal_net',
    )(x, *weights)


def temporal_net_gradient(
    x: jax.Array, upstream: jax.Array, params: Tree, interpret: bool = False
) -> tuple[jax.Array, Tree]:
    """The gradients of `temporal_net` by x and by the parameters.

    Args:
      x: as there.
      upstream: gradient of its result, (B, T, N, S).
      params: as there.
      interpret: run without a TPU, slowly, for tests.

    Returns:
      (B, T, N, S) in the dtype of x; and a tree like `params`, float32, with an axis in front:
      each core's part of the sum; vectors as rows.
    """
    weights = (
        *_weights(params, x.dtype),
        jnp.swapaxes(params['c_fc1']['kernel'], 1, 2).astype(x.dtype),
        _taps(jnp.swapaxes(params['c_fc2']['kernel'], 2, 3)).astype(x.dtype),
    )
    size, channels, hidden = params['c_fc1']['kernel'].shape
    clips, frames, places, _ = x.shape
    some, half = frames_at_a_time(x.shape, size), size // 2
    cut = some < frames
    parts = kernel_costs.CORES if clips % kernel_costs.CORES == 0 else 1
    each = clips // parts
    sums = [(size, hidden, channels), (9, hidden, channels), (1, channels), (1, channels)]
    sums += [(1, hidden), (1, channels)]
    _, rows = _rim(places)

    def at(windows: pl.BlockSpec) -> pl.BlockSpec:
        index = windows.index_map
        return pl.BlockSpec(windows.block_shape, lambda p, b, c: index(p * each + b, c))

    dx, of_time, of_space, scale, shift, bias_time, bias_space = pl.pallas_call(
        functools.partial(_gradient_kernel, frames=frames),
        grid=(parts, each, frames // some),
        in_specs=[
            at(_windows(some, 2 * half * cut, x.shape)),
            at(_windows(some, half * cut, x.shape)),
            *map(_stays, weights),
        ],
        out_specs=[
            pl.BlockSpec((1, some, places, channels), lambda p, b, c: (p * each + b, c, 0, 0)),
            *(
                pl.BlockSpec((1, *shape), lambda p, b, c, n=shape: (p, *(0 for _ in n)))
                for shape in sums
            ),
        ],
        out_shape=[
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            *(jax.ShapeDtypeStruct((parts, *shape), jnp.float32) for shape in sums),
        ],
        scratch_shapes=[
            pltpu.VMEM((size + 1, places, channels), jnp.float32),
            pltpu.VMEM((places, hidden), jnp.float32),
            pltpu.VMEM((places, hidden), jnp.float32),
            pltpu.VMEM((3, rows, LANES), jnp.float32),
            pltpu.VMEM((3, rows, LANES), jnp.float32),
            pltpu.VMEM((size, places, hidden), jnp.float32),
            pltpu.VMEM((half + 2, places, channels), jnp.float32),
        ],
        compiler_params=_options(3),
        cost_estimate=_cost('temporal_net_gradient', x.shape, params, arrays=3),
        interpret=interpret,
        name='temporal_net_gradient',
    )(x, upstream, *weights)
    return dx, {
        'ln': {'scale': scale, 'bias': shift},
        'c_fc1': {'kernel': jnp.swapaxes(of_time, 2, 3), 'bias': bias_time},
        'c_fc2': {
            'kernel': of_space.reshape(parts, 3, 3, hidden, channels),
            'bias': bias_space,
        },
    }


def _weights(params: Tree, dtype: Any) -> tuple[jax.Array, ...]:
    time, space = params['c_fc1'], params['c_fc2']
    return (
        *kernels.rows_of(params['ln']['scale'], params['ln']['bias']),
        time['kernel'].astype(dtype),
        *kernels.rows_of(time['bias']),
        _taps(space['kernel']).astype(dtype),
        *kernels.rows_of(space['bias']),
    )


def _taps(kernel: jax.Array) -> jax.Array:
    """(3, 3, a, b) -> (9, a, b)."""
    return kernel.reshape(9, *kernel.shape[2:])


def _windows(some: int, around: int, shape: tuple[int, ...]) -> pl.BlockSpec:
    """`some` frames of a clip, with so many around them if the clip is cut."""
    _, frames, places, channels = shape
    if not around:
        return pl.BlockSpec((1, some, places, channels), lambda b, c: (b, c, 0, 0))
    window = some + 2 * around
    return pl.BlockSpec(
        tuple(map(pl.Element, (1, window, places, channels))),
        lambda b, c: (b, _window_start(c * some, window, frames, around), 0, 0),
    )


def _window_start(start: jax.Array | int, window: int, frames: int, around: int) -> jax.Array | int:
    """First frame of the window around those from `start` on: all of it lies in the clip."""
    return jnp.clip(start - around, 0, frames - window) if window < frames else 0


def _stays(weight: jax.Array) -> pl.BlockSpec:
    rank = weight.ndim
    return pl.BlockSpec(weight.shape, lambda *_: (0,) * rank, pipeline_mode=pl.Buffered(1))


def _options(axes: int = 2) -> pltpu.CompilerParams:
    return pltpu.CompilerParams(
        dimension_semantics=('parallel', 'arbitrary', 'arbitrary')[:axes],
        vmem_limit_bytes=kernels.VMEM_BYTES,
    )


def _cost(kernel: str, shape: tuple[int, ...], params: Tree, arrays: int) -> pl.CostEstimate:
    """Of so many arrays like (B, T, N, S); of parts of clips their neighbours are read as well."""
    clips, frames, places, channels = shape
    size, _, hidden = params['c_fc1']['kernel'].shape
    sizes = {
        'places': places,
        'channels': channels,
        'hidden': hidden,
        'kernel_size': size,
        'of_clip': frames,
    }
    some = frames_at_a_time(shape, size)
    around = sum(range(1, arrays)) * 2 * (size // 2) * (some < frames)
    matrices = (size + 9) * whole(hidden, SUBLANES) * LANES
    each = 2 if arrays == 2 else 2 * 2 + 4  # weights in bfloat16, sums in float32
    return kernels.cost_estimate(
        kernel,
        clips * frames,
        sizes,
        transcendentals=places * (channels + hidden),
        frame_bytes=round((arrays + around / some) * whole(places, SUBLANES) * LANES * 2),
        weight_bytes=kernel_costs.CORES * each * matrices,
    )


def _forward_kernel(
    x_ref,
    scale_ref,
    shift_ref,
    time_ref,
    time_bias_ref,
    space_ref,
    space_bias_ref,
    y_ref,
    z_ref,
    a_ref,
    *,
    frames: int,
) -> None:
    """Frames of a clip (1, F, N, S); rings of normed frames, and a frame with room around."""
    size, (some, places) = time_ref.shape[0], y_ref.shape[1:3]
    half = size // 2
    start = pl.program_id(1) * some
    side = math.isqrt(places)
    a_ref[...] = jnp.zeros(a_ref.shape, a_ref.dtype)

    x_of = functools.partial(_frame_of, x_ref, start, some, frames)

    def norm(t: jax.Array | int) -> None:
        inside = (start + t >= 0) & (start + t < frames)
        x = x_of(t)
        scale, shift = (jnp.where(inside, one[...], 0) for one in (scale_ref, shift_ref))
        z_ref[jnp.remainder(t, size)] = _standardise(x)[0] * scale + shift

    def activate(t: jax.Array | int) -> None:
        h = _time_conv(z_ref, time_ref, t, half) + time_bias_ref[...]
        _write_rim(a_ref, _quick_gelu(h), side)

    for t in range(-half, half + 1):
        norm(t)
    activate(0)
    norm(half + 1)

    def frame(t: jax.Array, _: None) -> None:
        c = _space_conv(a_ref, space_ref, side, places) + space_bias_ref[...]
        y_ref[0, t] = _quick_gelu(x_of(t) + c).astype(y_ref.dtype)
        activate(t + 1)
        norm(t + 2 + half)

    jax.lax.fori_loop(0, some, frame, None)


def _gradient_kernel(
    x_ref,
    upstream_ref,
    scale_ref,
    shift_ref,
    time_ref,
    time_bias_ref,
    space_ref,
    space_bias_ref,
    time_back_ref,
    space_back_ref,
    dx_ref,
    dtime_ref,
    dspace_ref,
    dscale_ref,
    dshift_ref,
    dtime_bias_ref,
    dspace_bias_ref,
    z_ref,
    a_ref,
    slope_ref,
    a_rim_ref,
    ds_rim_ref,
    dh_ref,
    ds_ref,
    *,
    frames: int,
) -> None:
    """Frames of a clip; `d_ref` is as `a_ref`, of gradients, which `dh_ref` and `ds_ref` keep."""
    size, (some, places) = time_ref.shape[0], dx_ref.shape[1:3]
    half = size // 2
    cut = some < frames
    start = pl.program_id(2) * some
    side = math.isqrt(places)
    sums = (dtime_ref, dspace_ref, dscale_ref, dshift_ref, dtime_bias_ref, dspace_bias_ref)

    @pl.when((pl.program_id(1) == 0) & (pl.program_id(2) == 0))
    def _() -> None:
        for one in sums:
            one[...] = jnp.zeros(one.shape, one.dtype)

    for one in (a_rim_ref, ds_rim_ref, dh_ref, ds_ref):
        one[...] = jnp.zeros(one.shape, one.dtype)

    x_of = functools.partial(_frame_of, x_ref, start, some, frames)

    def norm(t: jax.Array | int) -> None:
        inside = (start + t >= 0) & (start + t < frames)
        x = x_of(t)
        scale, shift = (jnp.where(inside, one[...], 0) for one in (scale_ref, shift_ref))
        z_ref[jnp.remainder(t, size + 1)] = _standardise(x)[0] * scale + shift

    def activated(t: jax.Array | int) -> tuple[jax.Array, jax.Array]:
        """The first activation of frame t, and its slope."""
        return _quick_gelu_and_slope(_time_conv(z_ref, time_ref, t, half) + time_bias_ref[...])

    def keep_activated(found: tuple[jax.Array, jax.Array]) -> None:
        a_ref[...], slope_ref[...] = found
        _write_rim(a_rim_ref, found[0], side)

    def gradient(t: jax.Array | int) -> jax.Array:
        """In front of the second activation of frame t."""
        c = _space_conv(a_rim_ref, space_ref, side, places) + space_bias_ref[...]
        ds = _frame_of(upstream_ref, start, some, frames, t)
        ds *= _quick_gelu_and_slope(x_of(t) + c)[1]
        return jnp.where((start + t >= 0) & (start + t < frames), ds, 0) if cut else ds

    def keep_gradient(t: jax.Array | int, ds: jax.Array) -> None:
        ds_ref[jnp.remainder(t, half + 2)] = ds
        _write_rim(ds_rim_ref, ds, side)

    def own(t: jax.Array, x: jax.Array) -> jax.Array:
        """Weights get nothing from the frames of neighbours."""
        return jnp.where((t >= 0) & (t < some), x, 0) if cut else x

    def back_through_space(t: jax.Array) -> jax.Array:
        """The gradient by the first activation; and by the weights behind it."""
        transposed = own(t, a_ref[...]).T.astype(time_ref.dtype)
        da = jnp.zeros(a_ref.shape, jnp.float32)
        for tap, neighbours in enumerate(_neighbours(ds_rim_ref, side, places, dx_ref.shape[3])):
            # What lies one to the right of a place has it on its left.
            neighbours = neighbours.astype(time_ref.dtype)
            da += kernels.product(neighbours, space_back_ref[8 - tap])
            dspace_ref[0, 8 - tap] += kernels.product(transposed, neighbours)
        return da

    def back_through_time(t: jax.Array, dh: jax.Array) -> None:
        """By the weights and biases in front of the first activation."""
        dh_ref[jnp.remainder(t, size)] = dh
        dh, ds = own(t, dh), own(t, ds_ref[jnp.remainder(t, half + 2)])
        dspace_bias_ref[0] += ds.sum(0, keepdims=True)
        dtime_bias_ref[0] += dh.sum(0, keepdims=True)
        transposed = dh.T.astype(time_ref.dtype)
        for tap in range(size):
            z = z_ref[jnp.remainder(t + tap - half, size + 1)].astype(time_ref.dtype)
            dtime_ref[0, tap] += kernels.product(transposed, z)

    def finish(t: jax.Array | int) -> None:
        """The gradient by frame t, which has all that it takes now; nothing for t below 0."""
        dz = jnp.zeros(dx_ref.shape[2:], jnp.float32)
        for tap in range(size):
            dh = dh_ref[jnp.remainder(t + half - tap, size)].astype(time_ref.dtype)
            dz += kernels.product(dh, time_back_ref[tap])
        dz = jnp.where(t >= 0, dz, 0)
        z, scale = _standardise(x_of(t))
        dscale_ref[0] += (dz * z).sum(0, keepdims=True)
        dshift_ref[0] += dz.sum(0, keepdims=True)
        dz = dz * scale_ref[...]
        mean, along = dz.mean(-1, keepdims=True), (dz * z).mean(-1, keepdims=True)
        dx = ds_ref[jnp.remainder(t, half + 2)] + (dz - mean - z * along) * scale
        dx_ref[0, jnp.maximum(t, 0)] = dx.astype(dx_ref.dtype)

    first = -half * cut
    for t in range(first - half, first + half + 1):
        norm(t)
    keep_activated(activated(first))
    keep_gradient(first, gradient(first))
    norm(first + half + 1)

    def frame(t: jax.Array, _: None) -> None:
        following = activated(t + 1)
        slope = slope_ref[...]
        da = back_through_space(t)
        keep_activated(following)
        ds = gradient(t + 1)
        back_through_time(t, da * slope)
        finish(t - half)
        keep_gradient(t + 1, ds)
        norm(t + 2 + half)

    jax.lax.fori_loop(first, some + half * cut, frame, None)
    if not cut:
        for t in range(some, some + half):
            dh_ref[t % size] = jnp.zeros(dh_ref.shape[1:], jnp.float32)
            finish(t - half)


def _frame_of(
    window_ref, start: jax.Array | int, some: int, frames: int, t: jax.Array | int
) -> jax.Array:
    """Frame `t` behind `start` of a window, float32; the nearest one where there is none."""
    window = window_ref.shape[1]
    first = _window_start(start, window, frames, (window - some) // 2) if window > some else start
    return window_ref[0, jnp.clip(start - first + t, 0, window - 1)].astype(jnp.float32)


def _standardise(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rows of mean 0 and variance 1, and what they were multiplied with."""
    centred = x - x.mean(-1, keepdims=True)
    variance = jnp.square(centred).mean(-1, keepdims=True)
    scale = jnp.exp2(-0.5 / math.log(2) * jnp.log(variance + LAYER_NORM_EPS))  # rsqrt takes longer
    return centred * scale, scale


def _quick_gelu(x: jax.Array) -> jax.Array:
    """A sigmoid is half of 1 + tanh, which is one operation here."""
    h = 0.5 * x
    return h + h * jnp.tanh(SLOPE * h)


def _quick_gelu_and_slope(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    h = 0.5 * x
    g = SLOPE * h
    tanh = jnp.tanh(g)
    part = 1 + tanh
    return h * part, 0.5 * part * (1 + g - g * tanh)


def _time_conv(z_ref, kernel_ref, t: jax.Array | int, half: int) -> jax.Array:
    """Frame t of the convolution over the ring of normed frames, float32."""
    return sum(
        kernels.product(
            z_ref[jnp.remainder(t + tap - half, z_ref.shape[0])].astype(kernel_ref.dtype),
            kernel_ref[tap],
        )
        for tap in range(kernel_ref.shape[0])
    )


def _write_rim(rim_ref, x: jax.Array, side: int) -> None:
    """A frame for `_neighbours`: without its last column, whole, without its first."""
    (places, channels), (begin, _) = x.shape, _rim(x.shape[0])
    for copy in range(3):
        rim_ref[copy, pl.ds(begin, places), pl.ds(0, channels)] = x
    none = jnp.zeros((side, rim_ref.shape[2]), rim_ref.dtype)
    rim_ref.at[0][pl.ds(begin + side - 1, side, side)] = none
    rim_ref.at[2][pl.ds(begin, side, side)] = none


def _neighbours(rim_ref, side: int, places: int, channels: int) -> Iterator[jax.Array]:
    """The nine neighbours of all places, line above first, each (N, C) float32."""
    begin, _ = _rim(places)
    for line in (-1, 0, 1):
        for column in (-1, 0, 1):
            rows = pl.ds(begin + line * side + column, places)
            yield rim_ref[column + 1, rows, pl.ds(0, channels)]


def _space_conv(rim_ref, kernel_ref, side: int, places: int) -> jax.Array:
    return sum(
        kernels.product(neighbours.astype(kernel_ref.dtype), kernel_ref[tap])
        for tap, neighbours in enumerate(_neighbours(rim_ref, side, places, kernel_ref.shape[1]))
    )
