"""Convolutions along time, and the patch embedding over several frames that is one of them."""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from dist_jax.models.layers import (
    Dtype,
    Initializer,
    by_platform,
    einsum_to_float32,
    precision_of,
    trunc_normal,
    uniform,
)


class TimeConv(nn.Module):
    """'Same' convolution of axis 1 of (B, T, ..., in); parameters `kernel` (k, in, out), `bias`."""

    features: int
    kernel_size: int
    dtype: Dtype
    kernel_init: Initializer

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (self.kernel_size, x.shape[-1], self.features)
        kernel = self.param('kernel', self.kernel_init, shape).astype(self.dtype)
        bias = self.param('bias', nn.initializers.zeros, (self.features,)).astype(self.dtype)
        return conv_time(x.astype(self.dtype), kernel) + bias


# Where an accelerator has fast convolutions, the CPU has fast matrix products: XLA's gradient of a
# small convolution there takes up to a hundred times as long as that of the products written out.


def conv_time(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Zero-padded cross-correlation of axis 1 of (B, T, ..., in) with `kernel` (k, in, out).

    The taps are summed in float32 whatever the dtype is, by the products too.
    """
    return by_platform(x, kernel, cpu=_time_products, default=_time_convolution)


def _time_convolution(x: jax.Array, kernel: jax.Array) -> jax.Array:
    flat = x.reshape(*x.shape[:2], -1, x.shape[-1])
    y = jax.lax.conv_general_dilated(
        flat,
        kernel[:, None],
        (1, 1),
        'SAME',
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        precision=precision_of(flat, kernel),
    )
    return y.reshape(*x.shape[:-1], kernel.shape[-1])


def _time_products(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """A shift costs a copy, so the narrower side is shifted: inputs before, or outputs after."""
    size, channels, features = kernel.shape
    num_frames = x.shape[1]
    padding = [(0, 0)] * x.ndim
    padding[1] = (size // 2, size // 2)
    if channels <= features:
        padded = jnp.pad(x, padding)
        taps = (
            einsum_to_float32('...i,io->...o', padded[:, tap : tap + num_frames], kernel[tap])
            for tap in range(size)
        )
    else:
        joined = kernel.transpose(1, 0, 2).reshape(channels, size * features)
        padded = jnp.pad(einsum_to_float32('...i,io->...o', x, joined), padding)
        taps = (
            padded[:, tap : tap + num_frames, ..., tap * features : (tap + 1) * features]
            for tap in range(size)
        )
    return sum(taps).astype(x.dtype)


class Stem(nn.Module):
    """Patch embedding over several frames: kernel (k, p, p), stride (1, p, p), time padding k // 2.

    Patches (B, T, g*g, p*p*3), see `layers.patchify`, -> (B, T, g, g, S). Parameters `kernel`
    (k, p, p, 3, S) and `bias`.
    """

    features: int
    patch_size: int
    kernel_size: int
    dtype: Dtype
    kernel_init: Initializer = trunc_normal
    bias_init: Initializer = nn.initializers.zeros

    @nn.compact
    def __call__(self, patches: jax.Array) -> jax.Array:
        shape = (self.kernel_size, self.patch_size, self.patch_size, 3, self.features)
        kernel = self.param('kernel', self.kernel_init, shape).astype(self.dtype)
        bias = self.param('bias', self.bias_init, (self.features,)).astype(self.dtype)
        kernel = kernel.reshape(self.kernel_size, -1, self.features)
        x = conv_time(patches.astype(self.dtype), kernel) + bias
        side = math.isqrt(patches.shape[2])
        return x.reshape(*x.shape[:2], side, side, self.features)


class DepthwiseTimeConv(nn.Module):
    """Depthwise convolution of 3 frames over axis 1 of (B, T, L, C), zero padded, in float32.

    Parameters `kernel` (3, C) and `bias` (C,). The result has the dtype of `x`.
    """

    kernel_init: Initializer = uniform(3)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param('kernel', self.kernel_init, (3, x.shape[-1]))
        bias = self.param('bias', uniform(3), x.shape[-1:])
        return depthwise(x, kernel, bias)


@jax.custom_vjp
def depthwise(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """`DepthwiseTimeConv` of these parameters.

    Three shifted products: cheaper than a grouped convolution on TPU, and fast on CPU.
    """
    taps = (shifted * tap for shifted, tap in zip(_shifted(x), kernel, strict=True))
    return (sum(taps) + bias).astype(x.dtype)


def _shifted(x: jax.Array) -> tuple[jax.Array, ...]:
    """(B, T, L, C) one frame later, as it is, and one frame earlier; float32."""
    padded = jnp.pad(x, [(0, 0), (1, 1), (0, 0), (0, 0)]).astype(jnp.float32)
    return tuple(padded[:, tap : tap + x.shape[1]] for tap in range(3))


def _depthwise_forward(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> tuple:
    return depthwise(x, kernel, bias), (x, kernel)


def _depthwise_backward(kept: tuple[jax.Array, jax.Array], upstream: jax.Array) -> tuple:
    """Written out so that frames are shifted before they are widened, and nothing is kept wide."""
    x, kernel = kept
    to_x = depthwise(upstream, kernel[::-1], jnp.zeros_like(kernel[0]))
    upstream = upstream.astype(jnp.float32)
    to_kernel = jnp.stack([(shifted * upstream).sum((0, 1, 2)) for shifted in _shifted(x)])
    return to_x, to_kernel, upstream.sum((0, 1, 2))


depthwise.defvjp(_depthwise_forward, _depthwise_backward)
