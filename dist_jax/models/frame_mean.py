"""The frame-only baseline: what a classifier gets from frozen frames without their order.

Differs: no paper; it measures how much of a data set single frames give away.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dist_jax.models import heads
from dist_jax.models.api import Model, ParamGroup, Tree
from dist_jax.models.backbone import Backbone
from dist_jax.models.frozen import Frozen
from dist_jax.sharding import ShardingRule

PARAM_GROUPS = (
    ParamGroup(r'/kernel$', weight_decay=1.0),
    ParamGroup(r'/bias$', weight_decay=0.0),
)

SHARDING_RULES = (
    ShardingRule(r'/kernel$', ('fsdp', None)),
    ShardingRule(r'/bias$'),
)


def build(
    backbone: Backbone,
    *,
    num_classes: tuple[int, ...],
    num_frames: int,
    head: str = 'linear',
    dtype: Any = jnp.bfloat16,
    unroll: bool = False,
) -> Model:
    """A linear head on the mean of the frozen embeddings of all frames.

    Args:
      backbone: the frozen one.
      num_classes: classes of each head.
      num_frames: any.
      head: 'linear' only; the backbone alone, with class texts, is `eval.fusion=1` of another
        family.
      dtype: compute dtype of the backbone.
      unroll: see `stack`.

    Raises:
      ValueError: another head.
    """
    del num_frames
    if head != 'linear':
        raise ValueError(f'model.head={head!r}: frame_mean has a linear head only')

    def features(frozen: Tree, batch: Mapping[str, jax.Array]) -> Tree:
        video = batch['video'].astype(dtype)
        return {'embedding': backbone.embed_frames(frozen['visual'], video, unroll=unroll).mean(1)}

    return Model(
        net=FrameMean(heads.Head(head, tuple(num_classes))),
        dtype=dtype,
        pixels=backbone.kind.pixels,
        param_groups=PARAM_GROUPS,
        sharding_rules=SHARDING_RULES,
        frozen=Frozen(backbone, dtype, features),
    )


class FrameMean(nn.Module):
    """The head alone."""

    head: heads.Head

    @nn.compact
    def __call__(
        self, features: Tree, *, mask: jax.Array | None = None, train: bool = False
    ) -> dict[str, Any]:
        """`embedding` (B, E) -> `logits`, tuple of (B, num_classes), and the embedding."""
        del mask, train
        embedding = features['embedding']
        return {'embedding': embedding, 'logits': self.head(embedding, features)}
