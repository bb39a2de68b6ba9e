"""Batch normalisation whose statistics belong to groups of clips, not to devices.

The releases normalise with the clips that a device happens to hold. Here `groups` says over how
many clips statistics go, so that a run gives the same numbers, up to rounding, on any mesh: 1 is
the whole batch, and as many groups as devices split a batch into is the form of the releases, for
which devices send each other nothing but the running values.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from dist_jax.models.layers import Initializer, widened
from dist_jax.models.stack import STATISTICS, mark
from dist_jax.sharding import split_batch


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=['scale', 'bias', 'mean', 'variance', 'share'],
    meta_fields=['groups', 'eps'],
)
@dataclasses.dataclass(frozen=True)
class Norm:
    """What one batch (B, ..., C) is normalised with.

    Attributes:
      scale: (C,).
      bias: (C,).
      mean: (B, C), of the group of each row.
      variance: likewise.
      share: (B, 1), of a value of each row in the mean of its group; 0 where mean and variance do
        not come from the batch.
      groups: of rows.
      eps: added to the variance.
    """

    scale: jax.Array
    bias: jax.Array
    mean: jax.Array
    variance: jax.Array
    share: jax.Array
    groups: int
    eps: float


class BatchNorm(nn.Module):
    """(x - mean) / sqrt(variance + eps) * scale + bias, each channel for itself.

    Ioffe and Szegedy, arXiv:1502.03167, as torch.nn.BatchNorm3d: a batch is normalised with its
    biased variance, and the running one is unbiased. Statistics are float32, or float64 where x is,
    and lie in `batch_stats`: `mean` and `var` (C,). Only training with that collection mutable
    changes them. Training without that collection makes it from the batch alone, which is what
    averages over batches are made of; where no clip is real, it holds zeros and ones.

    Differs: the releases store the running values of the first device; here all groups count, each
    as much as another. A group of one value has no unbiased variance, and its biased one, 0, is
    taken.

    Attributes:
      groups: of so many clips in a row as it takes; they must divide the batch, which under
        accumulation is one part of it.
      eps: added to the variance.
      keep: of the running values at every step; the rest is the new ones'.
      scale_init: of `scale` (C,).
      bias_init: of `bias` (C,).
    """

    groups: int = 1
    eps: float = 1e-5
    keep: float = 0.9
    scale_init: Initializer = nn.initializers.ones
    bias_init: Initializer = nn.initializers.zeros

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array | None = None,
        train: bool = False,
        into: Callable[[jax.Array, Norm], jax.Array] | None = None,
        moments: tuple[jax.Array, jax.Array] | None = None,
    ) -> jax.Array:
        """Normalises over all axes but the last.

        Args:
          x: (B, ..., C) of any float dtype.
          mask: (B,), above 0 where a clip is real; None where all are. Others count for nothing.
            They are normalised like the rest of their group, or, where a group has no real clip,
            with running values.
          train: with statistics of the batch, which move the running ones, instead of these.
          into: what normalises, and goes on from there: of `normalise`'s arguments.
          moments: mean and biased variance of each clip of x, (B, C), where they are known.

        Returns:
          As x in shape and dtype, or what `into` makes of x.

        Raises:
          ValueError: the groups do not divide the batch.
        """
        size, channels = x.shape[0], x.shape[-1]
        scale = self.param('scale', self.scale_init, (channels,))
        bias = self.param('bias', self.bias_init, (channels,))
        keep = self.keep if self.has_variable('batch_stats', 'mean') else 0.0
        mean = self.variable('batch_stats', 'mean', jnp.zeros, (channels,))
        variance = self.variable('batch_stats', 'var', jnp.ones, (channels,))
        into = into or normalise
        if not train or self.is_initializing():
            rows = (jnp.broadcast_to(v.value, (size, channels)) for v in (mean, variance))
            nothing = jnp.zeros((size, 1), mean.value.dtype)
            return into(x, Norm(scale, bias, *rows, nothing, 1, self.eps))
        if self.groups < 1 or size % self.groups:
            raise ValueError(
                f'batch_norm.groups={self.groups} must divide the {size} clips of a batch (of one '
                'part of it, where accumulation is above 1)'
            )
        real = jnp.ones(size, bool) if mask is None else mask > 0
        found = jax.lax.stop_gradient(moments or _clip_statistics(x))
        clips, *found = _group_statistics(*found, real, self.groups)
        found = [mark(each, STATISTICS) for each in found]
        count = clips * (x.size // (size * channels))
        old = mean.value, variance.value
        unbiased = found[0], found[1] * (count / jnp.maximum(count - 1, 1))
        mean.value, variance.value = (
            _moved(before, new, clips, keep) for before, new in zip(old, unbiased)
        )
        used = (_rows(jnp.where(clips > 0, new, before), size) for before, new in zip(old, found))
        share = real[:, None] / _rows(jnp.maximum(count, 1), size)
        return into(x, Norm(scale, bias, *used, share, self.groups, self.eps))


def _clip_statistics(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and biased variance of each clip: (B, ..., C) -> two of (B, C), in one pass.

    A value of the clip is taken off first. It lies at most sqrt(n) standard deviations from the
    mean of n values, so what squares lose against each other is bounded, however large the mean.
    """
    inner = tuple(range(1, x.ndim - 1))
    first = widened(x[:, *(slice(1) for _ in inner)])
    shifted = widened(x) - first
    offset, squares = shifted.mean(inner), jnp.square(shifted).mean(inner)
    return first.reshape(offset.shape) + offset, jnp.maximum(squares - jnp.square(offset), 0)


def _group_statistics(
    mean: jax.Array, variance: jax.Array, real: jax.Array, groups: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Joins statistics (B, C) of clips: real clips (groups, 1), mean and variance (groups, C)."""
    weights = real[:, None].astype(mean.dtype)
    clips = _group_sums(weights, groups)
    of_each = jnp.maximum(clips, 1)
    joint = _group_sums(weights * mean, groups) / of_each
    spread = variance + jnp.square(mean - _rows(joint, len(mean)))
    return clips, joint, _group_sums(weights * spread, groups) / of_each


def _group_sums(rows: jax.Array, groups: int) -> jax.Array:
    """(B, C) -> (groups, C): the sum over the rows of each."""
    return split_batch(rows.reshape(groups, -1, rows.shape[-1])).sum(1)


def _rows(values: jax.Array, size: int) -> jax.Array:
    """(groups, C) -> (size, C): what belongs to the group of each row."""
    return split_batch(jnp.repeat(values, size // len(values), axis=0))


def _moved(before: jax.Array, new: jax.Array, clips: jax.Array, keep: float) -> jax.Array:
    """Running values (C,) after those, (groups, C), of the groups with real clips, (groups, 1)."""
    valid = jnp.minimum(clips, 1)
    count = valid.sum()
    mean = (valid * new).sum(0) / jnp.maximum(count, 1)
    return jnp.where(count > 0, keep * before + (1 - keep) * mean, before)


@jax.custom_vjp
def normalise(x: jax.Array, norm: Norm) -> jax.Array:
    """Normalises (B, ..., C) with given statistics; its gradient knows that they come from x.

    Computed in the dtype of statistics, rounded to that of x. Its gradient, written by hand, keeps
    x as it is for the backward pass and goes over it twice there.
    """
    factor = _beside(jax.lax.rsqrt(norm.variance + norm.eps) * norm.scale, x)
    return ((widened(x) - _beside(norm.mean, x)) * factor + norm.bias).astype(x.dtype)


def _normalise_forward(x: jax.Array, norm: Norm) -> tuple:
    return normalise(x, norm), (x, norm)


def _normalise_backward(kept: tuple[jax.Array, Norm], upstream: jax.Array) -> tuple:
    x, norm = kept
    inner = tuple(range(1, x.ndim - 1))
    upstream = widened(upstream)
    sums = upstream.sum(inner), (upstream * standardised(x, norm)).sum(inner)
    factor, by_mean, by_variance, to_norm = gradient_of_norm(norm, sums)
    to_x = upstream - _beside(by_mean, x) - standardised(x, norm) * _beside(by_variance, x)
    return (to_x * _beside(factor, x)).astype(x.dtype), to_norm


normalise.defvjp(_normalise_forward, _normalise_backward)


def gradient_of_norm(
    norm: Norm, sums: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array, jax.Array, Norm]:
    """What the gradient of `normalise` is made of; x^ is x without mean, of variance 1.

    Args:
      norm: what was applied.
      sums: of the upstream gradient, and of it times x^, over each row of the batch, (B, C).

    Returns:
      `factor`, `by_mean` and `by_variance`, (B, C), of the gradient by x, which is
      factor * (upstream - by_mean - x^ * by_variance), and the gradient by the norm: of scale and
      bias, for the rest zeros.
    """
    # What the mean and the variance pass on to every value that is in them.
    by_mean, by_variance = (
        _rows(_group_sums(each, norm.groups), norm.mean.shape[0]) * norm.share for each in sums
    )
    factor = jax.lax.rsqrt(norm.variance + norm.eps) * norm.scale
    bias, scale = (each.sum(0).astype(norm.scale.dtype) for each in sums)
    nothing = jax.tree.map(jnp.zeros_like, norm)
    return factor, by_mean, by_variance, dataclasses.replace(nothing, scale=scale, bias=bias)


def standardised(x: jax.Array, norm: Norm) -> jax.Array:
    """x without mean and of variance 1, in the dtype of statistics."""
    inverse = jax.lax.rsqrt(norm.variance + norm.eps)
    return (widened(x) - _beside(norm.mean, x)) * _beside(inverse, x)


def _beside(rows: jax.Array, x: jax.Array) -> jax.Array:
    """(B, C) -> (B, 1, ..., 1, C), beside x."""
    return rows.reshape(x.shape[0], *[1] * (x.ndim - 2), x.shape[-1])
