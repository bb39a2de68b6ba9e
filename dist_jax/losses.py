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


def soft_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Cross entropy of (B, num_classes) logits with target distributions -> (B,)."""
    return -(targets * jax.nn.log_softmax(widened(logits))).sum(-1)


def soft_binary_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Binary cross entropy of each (B, num_classes) logit with its target, mean over classes."""
    return optax.sigmoid_binary_cross_entropy(widened(logits), targets).mean(-1)


def masked_mean(values: jax.Array, mask: jax.Array, total: jax.Array) -> jax.Array:
    """Sum of the values where the mask is 1, over `total` (at least 1)."""
    return (values * mask).sum() / jnp.maximum(total, 1.0)
