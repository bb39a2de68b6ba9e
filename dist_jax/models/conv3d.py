"""Convolutions over frames, plain and space-time separable (STS).

Source: Li et al., "In Defense of Image Pre-Training for Spatiotemporal Recognition",
arXiv:2205.01721. Activations are (B, T, H, W, C), kernels (kt, kh, kw, in / groups, out) of odd
sizes; padding is (k - 1) / 2 of zeros at both ends of each axis. A clip of one frame only meets the
centre temporal taps, so that a network over frames is one over pictures there.

Forms differ between devices. A TPU is fastest with convolutions, even of one filter a channel,
which it does as products of 128 channels a tap: XLA's shifted products on its vector unit take four
times as long. XLA's CPU takes up to a hundred times as long for the gradients of convolutions over
three axes, or of groups, as for the same work as convolutions of pictures and shifted products.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dist_jax.models.layers import (
    by_platform,
    einsum,
    einsum_to_float32,
    is_settled,
    precision_of,
    widened,
)

# How the appearance half of an STS convolution reads its temporal taps: as the released code does,
# over the flattened frame, or along rows and columns with zeros beyond the border.
MODES = ('official', 'clean')

# A temporal slice of 3 x 3 weights is read as a line of 9 taps, and reaches this far to each side.
_REACH = 4

_LANES = 128  # channels of a register of a TPU

# Lines of an axis that are as long get their neighbours' ends; for shorter ones it takes a TPU less
# to flatten the frame, turned for columns.
_LONG = {3: 32, 2: 28}


# Networks have few shapes and many layers of each: one trace, and one gradient, of each shape.
def _traced_once(
    function: Callable[..., jax.Array], settings: Sequence[str]
) -> Callable[..., jax.Array]:
    """Jitted, but where `portable` settles the platform, which is nothing that a kept trace has."""
    jitted = jax.jit(function, static_argnames=settings)

    @functools.wraps(function)
    def run(*inputs: Any, **options: Any) -> jax.Array:
        return (function if is_settled() else jitted)(*inputs, **options)

    return run


@functools.partial(_traced_once, settings=('stride', 'time_stride'))
def conv3d(x: jax.Array, kernel: jax.Array, stride: int = 1, time_stride: int = 1) -> jax.Array:
    """Convolution without bias, summed in float32 or wider.

    Args:
      x: (B, T, H, W, in) of any float dtype.
      kernel: (kt, kh, kw, in, out), or (kt, kh, kw, 1, in) for one filter a channel; dtype of `x`.
      stride: along height and width.
      time_stride: along time.

    Returns:
      (B, ceil(T / time_stride), ceil(H / stride), ceil(W / stride), out) in the dtype of `x`.
    """
    if x.shape[1] == 1:
        kernel, time_stride = _centre(kernel), 1
    strides = (time_stride, stride, stride)
    if is_depthwise(x, kernel):
        return _filter_channels(x, kernel, strides, [size // 2 for size in kernel.shape[:3]])
    if kernel.shape[1:3] == (1, 1):
        x, strides = x[:, :, ::stride, ::stride], (time_stride, 1, 1)
    # Over three axes, the gradient of a strided kernel takes a TPU five times as long.
    pictures = kernel.shape[0] == 1 and strides[1] > 1
    return _widened_on_cpu(
        x, kernel, _convolve_pictures, _convolve_pictures if pictures else _convolve_frames, strides
    )


@functools.partial(_traced_once, settings=('stride', 'mode'))
def sts_conv3d(
    x: jax.Array, kernel: jax.Array, stride: int = 1, mode: str = 'official'
) -> jax.Array:
    """Space-time separable convolution: half of the output channels never mix frames.

    Args:
      x: (B, T, H, W, in) of any float dtype.
      kernel: (3, 1, 1, in, out), or (3, 3, 3, 1, in) for one filter a channel; as of `conv3d`.
      stride: along height and width, of the depthwise form only.
      mode: of `MODES`.

    Returns:
      (B, T, ceil(H / stride), ceil(W / stride), out) in the dtype of `x`, the appearance channels
      first.

    Raises:
      ValueError: the official mode has no meaning for frames of this size and this stride.
    """
    if not is_depthwise(x, kernel):
        return _sts_temporal(mode, x, kernel[:, 0, 0])
    h, w = x.shape[2:4]
    if mode == 'official' and (h % stride or w % stride):
        raise ValueError(
            f'a space-time separable convolution of stride {stride} on frames of {h} x {w}: both '
            'must be even; choose data.image_size and eval.image_size divisible by 32, or '
            'model.sts=clean'
        )
    # To take half of the lanes of a register costs a TPU more than to filter them with zeros.
    half = (x.shape[-1] + 1) // 2
    lanes = x.shape[-1] if x.shape[-1] <= _LANES else half
    form = functools.partial(_sts_depthwise, stride, mode)
    return by_platform(
        x, kernel, cpu=functools.partial(form, half), default=functools.partial(form, lanes)
    )


def _sts_depthwise(
    stride: int, mode: str, lanes: int, x: jax.Array, kernel: jax.Array
) -> jax.Array:
    """All channels at once; lines, which appearance has beside a 3 x 3 filter, of the first."""
    channels = x.shape[-1]
    rows, centre, columns = kernel
    seen = jnp.arange(channels) < (channels + 1) // 2
    moving = jnp.stack([jnp.where(seen, 0, rows), centre, jnp.where(seen, 0, columns)])
    rows, columns = (jnp.where(seen, taps, 0)[..., :lanes] for taps in (rows, columns))
    first = x[..., :lanes]
    lines = _line(first, rows, stride, mode, 3) + _line(first, columns, stride, mode, 2)
    return conv3d(x, moving, stride) + jnp.pad(lines, [(0, 0)] * 4 + [(0, channels - lanes)])


def is_depthwise(x: jax.Array, kernel: jax.Array) -> bool:
    """Whether the kernel has one filter a channel."""
    return kernel.shape[3] == 1 and x.shape[-1] == kernel.shape[-1]


def _centre(kernel: jax.Array) -> jax.Array:
    middle = kernel.shape[0] // 2
    return kernel[middle : middle + 1]


def _widened_on_cpu(
    x: jax.Array,
    kernel: jax.Array,
    on_cpu: Callable[..., jax.Array],
    elsewhere: Callable[..., jax.Array],
    *settings: Sequence[int],
) -> jax.Array:
    def wide(x: jax.Array, kernel: jax.Array) -> jax.Array:
        # Gradients of a shifted array are summed in its dtype, without a matrix unit.
        return on_cpu(widened(x), widened(kernel), *settings).astype(x.dtype)

    return by_platform(
        x, kernel, cpu=wide, default=lambda x, kernel: elsewhere(x, kernel, *settings)
    )


def _convolve_frames(x: jax.Array, kernel: jax.Array, strides: Sequence[int]) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        strides,
        [(size // 2, size // 2) for size in kernel.shape[:3]],
        dimension_numbers=('NDHWC', 'DHWIO', 'NDHWC'),
        precision=precision_of(x, kernel),
    )


def _convolve_pictures(x: jax.Array, kernel: jax.Array, strides: Sequence[int]) -> jax.Array:
    """`_convolve_frames` with the frames of the temporal taps side by side as channels."""
    kt, kh, kw, _, out = kernel.shape
    b, t, h, w, _ = x.shape
    padded = jnp.pad(x, [(0, 0), (kt // 2, kt // 2), (0, 0), (0, 0), (0, 0)])
    frames = jnp.concatenate([padded[:, d : d + t : strides[0]] for d in range(kt)], -1)
    if (kh, kw) == (1, 1):
        return einsum('...i,io->...o', frames, kernel.reshape(-1, out))
    y = jax.lax.conv_general_dilated(
        frames.reshape(-1, h, w, frames.shape[-1]),
        kernel.transpose(1, 2, 0, 3, 4).reshape(kh, kw, -1, out),
        strides[1:],
        [(kh // 2, kh // 2), (kw // 2, kw // 2)],
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        precision=precision_of(x, kernel),
    )
    return y.reshape(b, -1, *y.shape[1:])


def _filter_channels(
    x: jax.Array, kernel: jax.Array, strides: Sequence[int], padding: Sequence[int]
) -> jax.Array:
    """One filter (kt, kh, kw, 1, C) a channel, `padding` zeros at both ends of the three axes."""
    return _widened_on_cpu(x, kernel, _filter_by_shifts, _filter_by_groups, strides, padding)


def _filter_by_groups(
    x: jax.Array, kernel: jax.Array, strides: Sequence[int], padding: Sequence[int]
) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        strides,
        [(size, size) for size in padding],
        dimension_numbers=('NDHWC', 'DHWIO', 'NDHWC'),
        feature_group_count=x.shape[-1],
        precision=precision_of(x, kernel),
    )


def _filter_by_shifts(
    x: jax.Array, kernel: jax.Array, strides: Sequence[int], padding: Sequence[int]
) -> jax.Array:
    padded = jnp.pad(x, [(0, 0), *((size, size) for size in padding), (0, 0)])
    kernel = kernel[..., 0, :]

    def shifted(start: tuple[int, ...]) -> jax.Array:
        ends = (
            size - kernel_size + first + 1
            for size, kernel_size, first in zip(padded.shape[1:4], kernel.shape, start)
        )
        window = (slice(*bounds) for bounds in zip(start, ends, strides))
        return padded[:, *window]

    return sum(shifted(start) * kernel[start] for start in np.ndindex(kernel.shape[:3]))


def _line(x: jax.Array, kernel: jax.Array, stride: int, mode: str, axis: int) -> jax.Array:
    """Nine taps (3, 3, 1, C) along axis 3 or 2 of frames; official lines go on in the next one."""
    length = kernel.shape[0] * kernel.shape[1]

    def taps(axis: int) -> jax.Array:
        return kernel.reshape(*(length if i == axis else 1 for i in (1, 2, 3)), *kernel.shape[2:])

    padding = [_REACH if i == axis else 0 for i in (1, 2, 3)]
    if mode == 'clean':
        return _filter_channels(x, taps(axis), (1, stride, stride), padding)
    if stride == 1 and x.shape[axis] >= _LONG[axis]:
        # The ends of the lines beside, moved by one, are what comes before and after.
        size, other = x.shape[axis], 5 - axis
        before = jax.lax.slice_in_dim(x, size - _REACH, size, axis=axis)
        after = jax.lax.slice_in_dim(x, 0, _REACH, axis=axis)
        parts = _moved(before, {other: (1, -1)}), x, _moved(after, {other: (-1, 1)})
        return _filter_channels(jnp.concatenate(parts, axis), taps(axis), (1, 1, 1), (0, 0, 0))
    if axis == 2:
        return _line(x.swapaxes(2, 3), kernel, stride, mode, 3).swapaxes(2, 3)
    b, t, h, w, _ = x.shape
    flat = x.reshape(b, t, 1, h * w, -1)
    y = _filter_channels(flat, taps(3), (1, 1, stride * stride), (0, 0, _REACH))
    return y.reshape(b, t, h // stride, w // stride, -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sts_temporal(mode: str, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Products (B, T, H, W, in) x (3, in, out) of each tap, which are then moved."""
    before, centre, after = (einsum_to_float32('...i,io->...o', x, tap) for tap in kernel)
    return (_neighbour(before, 1, mode) + centre + _neighbour(after, -1, mode)).astype(x.dtype)


def _sts_temporal_forward(mode: str, x: jax.Array, kernel: jax.Array) -> tuple:
    return _sts_temporal(mode, x, kernel), (x, kernel)


def _sts_temporal_backward(
    mode: str, kept: tuple[jax.Array, jax.Array], upstream: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """To move by a step the other way is the transpose of moving."""
    x, kernel = kept
    moved = (_neighbour(upstream, -1, mode), upstream, _neighbour(upstream, 1, mode))
    to_x = sum(
        einsum_to_float32('...o,io->...i', one, tap) for one, tap in zip(moved, kernel, strict=True)
    )
    to_kernel = jnp.stack([einsum_to_float32('bthwi,bthwo->io', x, one) for one in moved])
    return to_x.astype(x.dtype), to_kernel.astype(kernel.dtype)


_sts_temporal.defvjp(_sts_temporal_forward, _sts_temporal_backward)


def _neighbour(x: jax.Array, step: int, mode: str) -> jax.Array:
    """What comes `step` (1 or -1) before each place on the line of its channel.

    The first quarter of the channels has lines along rows, the second along columns, the half along
    time. Beyond its ends there are zeros, or, officially, the row or column beside.
    """
    _, _, h, w, channels = x.shape
    half = (channels + 1) // 2
    number = jnp.arange(channels)
    one = (step, -step)
    rows, columns = _moved(x, {3: one}), _moved(x, {2: one})
    if mode == 'official':
        rows += _moved(x, {2: one, 3: (step - step * w, step * w - step)})
        columns += _moved(x, {2: (step - step * h, step * h - step), 3: one})
    in_frame = jnp.where(number < (half + 1) // 2, rows, columns)
    return jnp.where(number < half, in_frame, _moved(x, {1: one}))


def _moved(x: jax.Array, by: dict[int, tuple[int, int]]) -> jax.Array:
    """Zeros before and after axes, or so many values less where negative."""
    config = [(*by.get(axis, (0, 0)), 0) for axis in range(x.ndim)]
    return jax.lax.pad(x, jnp.zeros((), x.dtype), config)
