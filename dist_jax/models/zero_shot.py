"""A converted backbone with class texts, and nothing trained: what a text head starts from.

Source: zero-shot classification of CLIP (Radford et al. 2021, arXiv:2103.00020, section 3.1), with
the mean over frames that DiST's release takes for its zero-shot tests. It is the backbone's own
part of `eval.fusion=1` of a family with a text head, without a run.

Differs: the bare class name is the text, without templates around it, as everywhere here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dist_jax.models import heads
from dist_jax.models.api import Model, Tree
from dist_jax.models.backbone import Backbone
from dist_jax.models.frozen import TEXT, Frozen
from dist_jax.models.layers import l2_normalize


def build(
    backbone: Backbone,
    *,
    num_classes: tuple[int, ...],
    num_frames: int,
    dtype: Any = jnp.bfloat16,
    unroll: bool = False,
) -> Model:
    """The backbone, frame by frame.

    Args:
      backbone: with a text tower.
      num_classes: classes of each head.
      num_frames: any.
      dtype: compute dtype of the image tower; texts are float32.
      unroll: see `stack`.

    Raises:
      ValueError: the backbone has no text tower.
    """
    del num_classes, num_frames

    def features(frozen: Tree, batch: Mapping[str, jax.Array]) -> Tree:
        video = batch['video'].astype(dtype)
        frames = backbone.embed_frames(frozen['visual'], video, unroll=unroll)
        return {'frames': frames} | {name: frozen[name] for name in TEXT}

    return Model(
        net=ZeroShot(),
        dtype=dtype,
        pixels=backbone.kind.pixels,
        param_groups=(),
        sharding_rules=(),
        frozen=Frozen(backbone, dtype, features, reads_classes=True),
    )


class ZeroShot(nn.Module):
    """No parameters."""

    @nn.compact
    def __call__(
        self, features: Tree, *, mask: jax.Array | None = None, train: bool = False
    ) -> dict[str, Any]:
        """`frames` (B, T, E) and class texts -> `logits` and `embedding`.

        Returns:
          `logits`, tuple of float32 (B, num_classes), exp(logit_scale) times the cosine with each
          class, mean over frames; `embedding` float32 (B, E), mean of unit frames.
        """
        del mask, train
        frames, *texts = (features[name] for name in ('frames', *TEXT))
        return {
            'embedding': l2_normalize(frames).mean(1),
            'logits': heads.mean_cosine_logits(frames, *texts),
        }
