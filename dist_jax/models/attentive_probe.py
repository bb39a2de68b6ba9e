"""The attentive probe: one learned query pools the last tokens of a frozen tower.

Source: Bardes et al., "Revisiting Feature Prediction for Learning Visual Representations from
Video" (V-JEPA, arXiv:2404.08471), frozen evaluation, after the attentional pooling of Yu et al.,
"CoCa" (arXiv:2205.01917), section 3.2. F are the frozen tokens behind the last block:

    Y = F + positions (T, C)                        a learned row for each frame
    x = query + attention of LN query over all tokens of LN Y
    x = x + FC2 quick_gelu(FC1 LN x)
    logits = linear(LN x), or the cosine of (LN x) P with class texts

The tower sees single frames, so the table is what tells their order. The layer is EVL's without its
other temporal modules (`evl.DecoderLayer`): one implementation of a query over frozen tokens.

Differs from V-JEPA's: QuickGELU in place of GELU, a norm of the query and one before the head, the
table, and projections that start Xavier-uniform. No code of the authors was run beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dist_jax.models import evl, heads
from dist_jax.models.api import Model, ParamGroup, Tree
from dist_jax.models.backbone import Backbone, Taps
from dist_jax.models.frozen import TEXT, Frozen
from dist_jax.models.layers import Dtype, LayerNorm, Linear, trunc_normal
from dist_jax.sharding import ShardingRule

PARAM_GROUPS = (
    ParamGroup(r'kernel$', weight_decay=1.0),
    ParamGroup(r'(bias|scale|positions|cls_token)$', weight_decay=0.0),
)

SHARDING_RULES = (ShardingRule(r'^proj/kernel$', ('fsdp', None)), *evl.SHARDING_RULES)


def build(
    backbone: Backbone,
    *,
    num_classes: tuple[int, ...],
    num_frames: int,
    head: str = 'linear',
    dtype: Any = jnp.bfloat16,
    num_heads: int = 12,
    mlp_ratio: float = 4.0,
    class_tokens: bool = False,
    temporal_positions: bool = True,
    unroll: bool = False,
) -> Model:
    """The probe on a frozen backbone.

    Args:
      backbone: the frozen one.
      num_classes: classes of each head.
      num_frames: T, frames of a clip; the backbone sees all.
      head: 'linear' or 'text' (cosine with class names).
      dtype: compute dtype of both networks; norms, softmax, query and loss are float32.
      num_heads: of the query's attention, whose width is the backbone's.
      mlp_ratio: hidden width of the MLP over the backbone's width.
      class_tokens: the class token of each frame is among what the query looks at.
      temporal_positions: add the table; without, a clip is a set of frames.
      unroll: see `stack`.

    Raises:
      ValueError: an option that does not fit; the message names the field.
    """
    heads.check_kind(head)
    spec = backbone.spec
    if num_heads < 1 or spec.width % num_heads:
        raise ValueError(
            f'model.num_heads={num_heads} does not divide the width {spec.width} of the backbone'
        )
    net = ProbeNet(
        grid=(spec.grid, spec.grid),
        num_heads=num_heads,
        mlp_hidden=round(mlp_ratio * spec.width),
        temporal_positions=temporal_positions,
        embed_dim=spec.embed_dim if head == 'text' else 0,
        head=heads.Head(head, tuple(num_classes)),
        dtype=dtype,
    )
    last = Taps(outputs=(spec.depth - 1,))

    def features(frozen: Tree, batch: Mapping[str, jax.Array]) -> Tree:
        patches = backbone.patches(batch['video'].astype(dtype))
        frames = patches.reshape(-1, *patches.shape[2:])
        (tokens,) = backbone.encode_image(frozen['visual'], frames, last, unroll=unroll)['outputs']
        tokens = tokens.reshape(*patches.shape[:2], *tokens.shape[1:])
        texts = {name: frozen[name] for name in TEXT if name in frozen}
        return texts | {'outputs': tokens if class_tokens else tokens[:, :, 1:]}

    def attention(variables: Tree, inputs: Tree) -> jax.Array:
        _, seen = net.apply(variables, inputs, mutable=['intermediates'])
        weights = seen['intermediates']['layer']['attn']['weights'][0]  # (B, h, T*M)
        return evl.patch_shares(weights.mean(1), num_frames, spec.grid)

    return Model(
        net=net,
        dtype=dtype,
        pixels=backbone.kind.pixels,
        param_groups=PARAM_GROUPS,
        sharding_rules=SHARDING_RULES,
        frozen=Frozen(backbone, dtype, features, reads_classes=head == 'text'),
        attention=attention,
    )


class ProbeNet(nn.Module):
    """The query, its layer and the head. See `build` and the module."""

    grid: tuple[int, int]
    num_heads: int
    mlp_hidden: int
    temporal_positions: bool
    embed_dim: int  # of the texts that it is compared with; 0 for none
    head: heads.Head
    dtype: Dtype

    @nn.compact
    def __call__(
        self, features: Tree, *, mask: jax.Array | None = None, train: bool = False
    ) -> dict[str, Any]:
        """Pools the tokens of a clip.

        Args:
          features: `outputs` (B, T, M, C), M tokens of a frame, and for a text head `text` and
            `logit_scale`.
          mask: accepted for the common interface; there are no statistics.
          train: likewise; there is no dropout.

        Returns:
          `logits`, tuple of float32 (B, num_classes); `embedding` float32 (B, C), after the last
          norm, or (B, E) for a text head.
        """
        del mask
        batch, _, _, width = features['outputs'].shape
        query = self.param('cls_token', trunc_normal, (width,))
        x, _ = evl.DecoderLayer(
            grid=self.grid,
            qkv_dim=width,
            num_heads=self.num_heads,
            mlp_hidden=self.mlp_hidden,
            mlp_dropout=0.0,
            temporal_conv=False,
            temporal_positions=self.temporal_positions,
            temporal_cross_attention=False,
            train=train,
            dtype=self.dtype,
            name='layer',
        )(jnp.broadcast_to(query, (batch, width)), 0, {'outputs': features['outputs'][None]})
        embedding = LayerNorm(name='head_norm')(x)
        if self.embed_dim:
            init = nn.initializers.normal(width**-0.5)
            embedding = Linear(self.embed_dim, use_bias=False, kernel_init=init, name='proj')(
                embedding
            )
        return {'embedding': embedding, 'logits': self.head(embedding, features)}
