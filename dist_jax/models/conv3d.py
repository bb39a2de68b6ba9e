"""Convolutions over frames, plain and space-time separable (STS).

Source: Li et al., "In Defense of Image Pre-Training for Spatiotemporal Recognition",
arXiv:2205.01721. Activations are (B, T, H, W, C), kernels (kt, kh, kw, in / groups, out) of odd
sizes; padding is (k - 1) / 2 of zeros at both ends of each axis. A clip of one frame only meets the
centre temporal taps, so that a network over frames is one over pictures there.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dist_jax.models.layers import precision_of

# How the appearance half of an STS convolution reads its temporal taps: as the released code does,
# over the flattened frame, or along rows and columns with zeros beyond the border.
MODES = ('official', 'clean')


def conv3d(x: jax.Array, kernel: jax.Array, stride: int = 1, time_stride: int = 1) -> jax.Array:
    """Convolution without bias.

    Args:
      x: (B, T, H, W, in) of any float dtype.
      kernel: (kt, kh, kw, in, out), or (kt, kh, kw, 1, in) for one filter a channel.
      stride: along height and width.
      time_stride: along time.

    Returns:
      (B, ceil(T / time_stride), ceil(H / stride), ceil(W / stride), out) in the dtype of `x`.
    """
    if x.shape[1] == 1:
        kernel, time_stride = _centre(kernel), 1
    if is_depthwise(x, kernel):
        return _depthwise(x, kernel, stride)
    kt, kh, kw = kernel.shape[:3]
    if (kh, kw) == (1, 1) and stride > 1:
        x, stride = x[:, :, ::stride, ::stride], 1
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (time_stride, stride, stride),
        [(k // 2, k // 2) for k in (kt, kh, kw)],
        dimension_numbers=('NDHWC', 'DHWIO', 'NDHWC'),
        precision=precision_of(x, kernel),
    )


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
      ValueError: the official mode has no meaning for such a frame or stride.
    """
    if is_depthwise(x, kernel):
        return _sts_depthwise(x, kernel, stride, mode)
    return _sts_temporal(x, kernel, mode)


def is_depthwise(x: jax.Array, kernel: jax.Array) -> bool:
    """Whether the kernel has one filter a channel."""
    return kernel.shape[3] == 1 and x.shape[-1] == kernel.shape[-1]


def _centre(kernel: jax.Array) -> jax.Array:
    middle = kernel.shape[0] // 2
    return kernel[middle : middle + 1]


def _depthwise(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    kt, kh, kw = kernel.shape[:3]
    t, h, w = x.shape[1:4]
    padded = jnp.pad(x, [(0, 0), *((k // 2, k // 2) for k in (kt, kh, kw)), (0, 0)])
    taps = (
        padded[:, d : d + t, a : a + h : stride, b : b + w : stride] * kernel[d, a, b, 0]
        for d in range(kt)
        for a in range(kh)
        for b in range(kw)
    )
    return sum(taps).astype(x.dtype)


def _sts_temporal(x: jax.Array, kernel: jax.Array, mode: str) -> jax.Array:
    size, out = kernel.shape[0], kernel.shape[-1]
    half = (out + 1) // 2
    quarter = (half + 1) // 2
    joined = kernel[:, 0, 0].transpose(1, 0, 2).reshape(-1, size * out)
    before, centre, after = jnp.split(
        jnp.einsum('...i,io->...o', x, joined, precision=precision_of(x, joined)), 3, -1
    )

    def part(axis: int, low: int, high: int) -> jax.Array:
        return (
            _moved(before[..., low:high], axis, 1, mode)
            + centre[..., low:high]
            + _moved(after[..., low:high], axis, -1, mode)
        )

    parts = (part(3, 0, quarter), part(2, quarter, half), part(1, half, out))
    return jnp.concatenate(parts, -1).astype(x.dtype)


def _moved(x: jax.Array, axis: int, steps: int, mode: str) -> jax.Array:
    """Every value `steps` places later on an axis; what comes in is 0 or of the next line."""
    size = x.shape[axis]
    pads = [(0, 0)] * x.ndim
    if axis > 1 and mode == 'official':
        flat = x if axis == 3 else x.swapaxes(2, 3)
        shape = flat.shape
        flat = _moved(flat.reshape(*shape[:2], -1, shape[-1]), 2, steps, 'clean').reshape(shape)
        return flat if axis == 3 else flat.swapaxes(2, 3)
    pads[axis] = (max(steps, 0), max(-steps, 0))
    return jax.lax.slice_in_dim(jnp.pad(x, pads), max(-steps, 0), max(-steps, 0) + size, axis=axis)


def _sts_depthwise(x: jax.Array, kernel: jax.Array, stride: int, mode: str) -> jax.Array:
    half = (x.shape[-1] + 1) // 2
    seen, moving = x[..., :half], x[..., half:]
    rows, middle, columns = kernel[..., :half]
    appearance = (
        _depthwise(seen, middle[None], stride)
        + _line(seen, rows, stride, mode)
        + _line(seen.swapaxes(2, 3), columns, stride, mode).swapaxes(2, 3)
    )
    motion = conv3d(moving, kernel[..., half:], stride)
    return jnp.concatenate([appearance, motion], -1)


def _line(x: jax.Array, kernel: jax.Array, stride: int, mode: str) -> jax.Array:
    """Nine taps along the rows: (B, T, H, W, C), (3, 3, 1, C) -> one value a stride."""
    taps = kernel.reshape(9, -1)
    h, w = x.shape[2:4]
    if mode == 'clean':
        return _depthwise(x[:, :, ::stride], taps[None, None, :, None], 1)[:, :, :, ::stride]
    if stride > 1 and (h % stride or w % stride):
        raise ValueError(
            f'a space-time separable convolution of stride {stride} on frames of {h} x {w}: both '
            'must be even; choose data.image_size and eval.image_size divisible by 32, or '
            'model.sts=clean'
        )
    flat = jnp.pad(x.reshape(*x.shape[:2], h * w, -1), [(0, 0), (0, 0), (4, 4), (0, 0)])
    y = sum(flat[:, :, j : j + h * w : stride * stride] * taps[j] for j in range(9))
    return y.reshape(*x.shape[:2], h // stride, w // stride, -1).astype(x.dtype)
