"""A converted backbone as it is: a model in which nothing is trained.

Differs: no paper; it is what trained models are compared with, and embeds frames without them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dist_jax.models.api import Model, Tree
from dist_jax.models.backbone import Backbone
from dist_jax.models.frozen import Frozen

VARIABLES: Tree = {'params': {}}  # what its network is applied with


def build(backbone: Backbone, *, dtype: Any = jnp.float32, unroll: bool = False) -> Model:
    """The image tower on every frame.

    Args:
      backbone: the converted one; its image size is that of the frames.
      dtype: compute dtype.
      unroll: see `stack`.

    Returns:
      A model whose outputs are `frames`, float32 (B, T, E): the embedding of each frame, not of
      unit length.
    """

    def frames(frozen: Tree, batch: Mapping[str, jax.Array]) -> Tree:
        return {'frames': backbone.embed_frames(frozen['visual'], batch['video'], unroll=unroll)}

    return Model(
        net=_Outputs(),
        dtype=dtype,
        pixels=backbone.kind.pixels,
        param_groups=(),
        sharding_rules=(),
        frozen=Frozen(backbone, dtype, frames),
    )


class _Outputs(nn.Module):
    """Gives its inputs."""

    @nn.compact
    def __call__(self, inputs: Tree, *, mask: jax.Array | None = None, train: bool = False) -> Tree:
        del mask, train
        return inputs
