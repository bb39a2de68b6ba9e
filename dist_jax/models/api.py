"""What a model family offers to the train step, and the letters used for shapes.

B clips     T input frames      t frames the frozen backbone sees      H, W pixels
L tokens of a frame (class token first)     K tapped blocks     h heads     d head dim
C channels of the trainable network         E embedding of a clip
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dist_jax.sharding import ShardingRule

Tree = Any


@dataclasses.dataclass(frozen=True)
class Pixels:
    """How a model wants its pixels: RGB in [0, 1], minus the mean, over the standard deviation."""

    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    @jax.named_scope('normalize')
    def normalize(self, video: jax.Array, dtype: Any = jnp.float32) -> jax.Array:
        """RGB (..., H, W, 3), 0 to 255, uint8 or float -> standardised pixels in `dtype`."""
        std = np.asarray(self.std, np.float32)
        scale = 1.0 / (255.0 * std)
        shift = np.asarray(self.mean, np.float32) / std
        return (video.astype(jnp.float32) * scale - shift).astype(dtype)


@dataclasses.dataclass(frozen=True)
class ParamGroup:
    """How the parameters whose path matches `pattern` are optimised.

    Attributes:
      pattern: regular expression searched in 'a/b/kernel' paths; the first matching group counts.
      weight_decay: multiplier of the recipe's weight decay.
      learning_rate: multiplier of the schedule.
    """

    pattern: str
    weight_decay: float = 1.0
    learning_rate: float = 1.0


@dataclasses.dataclass(frozen=True)
class VideoModel:
    """One model family at one size. The train and eval steps call these and nothing else.

    Attributes:
      net: the trainable network. `net.apply(variables, features, train=...)` returns a dict with
        at least `logits`, a tuple of float32 (B, num_classes), one entry a head, and `embedding`.
      prepare: (converted backbone tree, class tokens) -> frozen tree. Run once, before training:
        picks what the steps need, casts it, computes text features. Class tokens are a tuple of
        (num_classes, S) int32, one entry a head.
      features: (frozen tree, video (B, T, H, W, 3) normalised) -> inputs of `net`, cut from the
        gradient.
      normalize: pixels 0 to 255, uint8 or float -> pixels of the backbone in the compute dtype.
      reads: top-level subtrees of the converted backbone that `prepare` reads.
      param_groups: must cover every trainable parameter.
      sharding_rules: likewise; where they lie on a mesh.
      frozen_rules: likewise, of the converted backbone tree and of the frozen tree.
      frozen_logits: (frozen tree, result of `features`) -> tuple of (B, num_classes), the
        backbone's own prediction for fusion; None where the family has no text features.
      attention: (variables of `net`, frozen tree, video as for `features`) -> float32
        (B, t, g, g), the share of the query's attention on each patch of each frame that the
        backbone sees. Non-negative; the sum over (t, g, g) is at most 1, class tokens have the
        rest. t divides T, and map i belongs to input frame i * T // t. None where no query looks
        at patches.
    """

    net: nn.Module
    prepare: Callable[[Tree, tuple[jax.Array, ...]], Tree]
    features: Callable[[Tree, jax.Array], Tree]
    normalize: Callable[[jax.Array], jax.Array]
    reads: tuple[str, ...]
    param_groups: tuple[ParamGroup, ...]
    sharding_rules: tuple[ShardingRule, ...]
    frozen_rules: tuple[ShardingRule, ...]
    frozen_logits: Callable[[Tree, Tree], tuple[jax.Array, ...]] | None = None
    attention: Callable[[Tree, Tree, jax.Array], jax.Array] | None = None
