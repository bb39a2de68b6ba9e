"""Per-example losses (B,), float32 or of wider logits float64, and their masked mean."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from dist_jax.models.layers import widened


def smooth_one_hot(labels: jax.Array, num_classes: int, smoothing: float) -> jax.Array:
    """(B,) int32 -> (B, num_classes): 1 - smoothing on the label, plus smoothing / num_classes."""
    off = smoothing / num_classes
    return jax.nn.one_hot(labels, num_classes) * (1.0 - smoothing) + off


def smooth_multi_hot(labels: jax.Array, smoothing: float) -> jax.Array:
    """(B, num_classes) of 0 and 1 -> 1 - smoothing on the labels, plus smoothing / num_classes.

    Of a row with one label it is `smooth_one_hot`.
    """
    return labels.astype(jnp.float32) * (1.0 - smoothing) + smoothing / labels.shape[-1]


def soft_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Cross entropy of (B, num_classes) logits with target distributions -> (B,)."""
    return -(targets * jax.nn.log_softmax(widened(logits))).sum(-1)


def soft_binary_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Binary cross entropy of each (B, num_classes) logit with its target, mean over classes."""
    return optax.sigmoid_binary_cross_entropy(widened(logits), targets).mean(-1)


def masked_mean(values: jax.Array, mask: jax.Array, total: jax.Array) -> jax.Array:
    """Sum of the values where the mask is 1, over `total` (at least 1)."""
    return (values * mask).sum() / jnp.maximum(total, 1.0)


def contrastive(logits: jax.Array, mask: jax.Array, right: jax.Array | None = None) -> jax.Array:
    """Loss of each pair of a batch in which row i and column i belong together, (B,).

    The mean of two cross entropies: of row i over all columns, and of column i over all rows. Its
    mean over real pairs is the loss of CLIP (Radford et al., arXiv:2103.00020, figure 3).

    Args:
      logits: (B, B).
      mask: (B,), 1 for real pairs; rows and columns of the others do not count.
      right: (B, B), symmetric, what else is right for a row beside its own column, which share it
        equally; None for nothing.
    """
    logits = widened(logits)
    real = mask > 0
    size = len(mask)
    right = jnp.eye(size, dtype=bool) if right is None else right & real[:, None] & real
    right = right | jnp.eye(size, dtype=bool)
    share = right / right.sum(1, keepdims=True)

    def entropy(axis: int) -> jax.Array:
        among = jnp.where(jnp.expand_dims(real, 1 - axis), logits, -1e30)
        return -(share * jax.nn.log_softmax(among, axis)).sum(axis)

    return (entropy(1) + entropy(0)) / 2
