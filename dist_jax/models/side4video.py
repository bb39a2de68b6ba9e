"""Side4Video tells classes apart: the side network, and a linear head on its mean.

Source: Yao et al. (arXiv:2311.15769); see `side_network`, whose letters these are:

    logits = linear(mean over T and N of BN s)              post-norm: of s itself
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
from dist_jax.models.layers import uniform
from dist_jax.models.side_network import RULES, Beside, SideNetwork, fit_positions
from dist_jax.sharding import ShardingRule

# Source: the release decays every trained tensor: biases, norms and the position table too.
PARAM_GROUPS = (ParamGroup(r'.', weight_decay=1.0),)
SHARDING_RULES = (*RULES, ShardingRule(r'classifier/kernel$', ('fsdp', None)))


def build(
    backbone: Backbone,
    *,
    num_classes: tuple[int, ...],
    num_frames: int,
    head: str = 'linear',
    dtype: Any = jnp.bfloat16,
    side_dim: int = 320,
    tap_every: int = 1,
    post_norm: bool = False,
    mlp_ratio: float = 4.0,
    batch_norm_groups: int = 1,
    remat: str = 'none',
    unroll: bool = False,
    temporal_conv: bool = True,
    class_token_shift: bool = True,
) -> Model:
    """Side4Video's recognition network on a frozen backbone.

    Args:
      backbone: the frozen one.
      num_classes: classes of each head.
      num_frames: any; the backbone sees all frames.
      head: 'linear' only; the side network has no text tower.
      dtype, side_dim, tap_every, post_norm, mlp_ratio, batch_norm_groups, remat, unroll,
        temporal_conv, class_token_shift: see `side_network.Beside`.

    Raises:
      ValueError: an option that does not fit; the message names the field.
    """
    del num_frames
    if head != 'linear':
        raise ValueError(f'model.head={head!r}: Side4Video has a linear head only')
    beside = Beside(
        backbone,
        dtype,
        side_dim,
        tap_every,
        post_norm,
        mlp_ratio,
        batch_norm_groups,
        remat,
        unroll,
        temporal_conv,
        class_token_shift,
    )
    init = uniform(side_dim)
    classifier = heads.Head(head, tuple(num_classes), kernel_init=init, bias_init=init)

    def features(frozen: Tree, batch: Mapping[str, jax.Array]) -> Tree:
        return beside.features(frozen, batch['video'])

    return Model(
        net=Side4VideoNet(**beside.fields, head=classifier),
        dtype=dtype,
        pixels=backbone.kind.pixels,
        param_groups=PARAM_GROUPS,
        sharding_rules=SHARDING_RULES,
        frozen=Frozen(backbone, dtype, features),
        fit=fit_positions,
    )


class Side4VideoNet(SideNetwork):
    """The side network and a head."""

    head: heads.Head

    @nn.compact
    def __call__(
        self,
        features: Tree,
        *,
        mask: jax.Array | None = None,
        train: bool = False,
        intermediates: bool = False,
    ) -> dict[str, Any]:
        """Runs both.

        Args:
          features: see `SideNetwork.stream`.
          mask: likewise.
          train: likewise.
          intermediates: also return what was recorded there.

        Returns:
          `logits`, tuple of float32 (B, num_classes); `embedding` float32 (B, C).
        """
        s, recorded = self.stream(features, mask, train, record=intermediates)
        if not self.post_norm:
            s = self.batch_norm('post_bn', s, mask, train)
        embedding = s.astype(jnp.float32).mean((1, 2))
        return {'embedding': embedding, 'logits': self.head(embedding, features), **recorded}
