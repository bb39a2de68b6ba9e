"""Mixup and cutmix of whole clips, on device.

Source: the DiST recipe: one draw a batch, partners are the reversed batch, the mixing weight of
cutmix is corrected to the area that was pasted; box rule of the original CutMix code.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from dist_jax.models.layers import as_rows


@dataclasses.dataclass(frozen=True)
class Mixing:
    """What is mixed, and how often.

    Attributes:
      mixup_alpha: Beta parameter of mixup; 0 turns it off.
      cutmix_alpha: Beta parameter of cutmix; 0 turns it off.
      probability: chance that a batch is mixed at all.
      switch_probability: chance of cutmix where both are on.
    """

    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0
    probability: float = 1.0
    switch_probability: float = 0.5

    @property
    def enabled(self) -> bool:
        return self.probability > 0 and (self.mixup_alpha > 0 or self.cutmix_alpha > 0)


def mix(
    key: jax.Array,
    video: jax.Array,
    targets: Any,
    mask: jax.Array,
    mixing: Mixing,
) -> tuple[jax.Array, Any]:
    """Mixes each clip with its partner in the reversed batch.

    Args:
      key: random key of this step.
      video: (B, T, H, W, 3), or rows of pixels (B, T, H, 3 W), uint8 or float. Mixing commutes with
        normalisation, and partners that are exchanged between devices are a quarter the size as
        uint8.
      targets: tree of distributions (B, num_classes).
      mask: (B,) 1.0 where the clip is real. A clip whose partner is not real stays as it is.
      mixing: settings.

    Returns:
      Mixed video, float32 unless mixing is off, and targets.
    """
    if not mixing.enabled:
        return video, targets
    keys = jax.random.split(key, 6)
    use_cutmix = jnp.asarray(mixing.cutmix_alpha > 0)
    if mixing.mixup_alpha > 0:
        use_cutmix &= jax.random.bernoulli(keys[0], mixing.switch_probability)
    cut_share = _beta(keys[1], mixing.cutmix_alpha)
    blend_share = _beta(keys[2], mixing.mixup_alpha)

    own = as_rows(video)
    height, width = own.shape[2], own.shape[3] // 3
    box, kept_area = _box(keys[3], keys[4], cut_share, height, width)
    drawn = jax.random.bernoulli(keys[5], mixing.probability)
    active = (drawn & (mask[::-1] > 0)).astype(jnp.float32)  # (B,)

    # Share of the partner, for each value of each clip.
    pixel_share = jnp.where(use_cutmix, jnp.repeat(box, 3, axis=1), 1.0 - blend_share)  # (H, 3 W)
    pixel_share = (pixel_share * active[:, None, None])[:, None]
    label_share = jnp.where(use_cutmix, 1.0 - kept_area, 1.0 - blend_share) * active
    own, partner = (x.astype(jnp.float32) for x in (own, own[::-1]))
    mixed = (own * (1 - pixel_share) + partner * pixel_share).reshape(video.shape)
    share = label_share[:, None]
    return mixed, jax.tree.map(lambda t: t * (1 - share) + t[::-1] * share, targets)


def _beta(key: jax.Array, alpha: float) -> jax.Array:
    return jax.random.beta(key, alpha, alpha) if alpha > 0 else jnp.float32(1.0)


def _box(
    key_y: jax.Array, key_x: jax.Array, kept: jax.Array, height: int, width: int
) -> tuple[jax.Array, jax.Array]:
    """A box of area 1 - kept at a uniform centre, clipped: (H, W) of 0 and 1, and the area left."""
    ratio = jnp.sqrt(1.0 - kept)

    def span(key: jax.Array, size: int) -> jax.Array:
        half = (size * ratio).astype(jnp.int32) // 2
        centre = jax.random.randint(key, (), 0, size)
        position = jnp.arange(size)
        return (position >= centre - half) & (position < centre + half)

    box = (span(key_y, height)[:, None] & span(key_x, width)[None]).astype(jnp.float32)
    return box, 1.0 - box.mean()
