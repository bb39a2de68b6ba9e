"""Side4Video matches videos and sentences: the side network, and CLIP's own text tower, trained.

Source: Yao et al. (arXiv:2311.15769), section 3 and the retrieval code of the release; see
`side_network`, whose letters these are. `x` is the class token behind the last frozen block,
(B, T, D), `E` the width of CLIP's embedding:

    y = x + (mean over N of BN s) P         P (C, D) starts at 0
    frames = CLIP's last norm and projection of y               (B, T, E)
    words = CLIP's text tower, all tokens, projected            (B, S, E)
    word_logits, frame_logits = linear(relu(linear))            one each, of words and of frames

So at the start a frame has CLIP's own embedding. What the frames and words of a pair are worth
together is the task's to say (`similarity`). The norm and projection of images, the text tower and
the scale of logits start as the backbone's and are trained; the rest of the backbone is frozen.

Differs: parameters of the text tower are float32, as are Adam's moments: in the release on CLIP
they are float16, where updates of 1e-7 are lost.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dist_jax.models import transformer
from dist_jax.models.api import Model, ParamGroup, TensorAxes, Tree
from dist_jax.models.backbone import Backbone
from dist_jax.models.frozen import Frozen
from dist_jax.models.layers import einsum, uniform
from dist_jax.models.side_network import RULES, Beside, SideNetwork, fit_positions
from dist_jax.sharding import ShardingRule

TEXT, VISUAL, LOGIT_SCALE = 'text', 'visual', 'logit_scale'
WEIGHTS = ('text_weight', 'video_weight')
MAX_LOGIT_SCALE = math.log(100.0)

# Source: BertAdam in the release decays everything whose name does not hold "bias", norms and
# tables too.
_PRETRAINED = rf'^({TEXT}/|{VISUAL}/|{LOGIT_SCALE}$)'

# Tensors of the release: layers, and on EVA queries, keys and values, have one each.
_STACKED = (TensorAxes(rf'^(layers|{TEXT}/blocks)/', (0,)),)
_SEPARATE = (
    TensorAxes('^layers/attn/qkv/kernel$', (0, 2)),
    TensorAxes('^layers/attn/qkv/bias$', (0, 1)),
)


def build(
    backbone: Backbone,
    *,
    num_classes: tuple[int, ...] = (),
    num_frames: int,
    dtype: Any = jnp.bfloat16,
    side_dim: int = 320,
    tap_every: int = 1,
    post_norm: bool = False,
    mlp_ratio: float = 4.0,
    pretrained_lr: float = 1e-3,
    gradient_world: int = 1,
    batch_norm_groups: int = 1,
    remat: str = 'none',
    unroll: bool = False,
) -> Model:
    """Side4Video's retrieval network on a backbone with a text tower.

    Args:
      backbone: its image tower is frozen but for the last norm and projection.
      num_classes: ().
      num_frames: any; the backbone sees all frames.
      dtype, side_dim, tap_every, post_norm, mlp_ratio, batch_norm_groups, remat, unroll: see
        `side_network.Beside`; with any `remat` the text tower computes its blocks again.
      pretrained_lr: learning rate of what starts as the backbone's, a share of that of the rest.
      gradient_world: gradients of both towers are divided by this, those of the weights of words
        and frames and of the logit scale are not. The release averages gradients over so many
        devices whose loss is the global one, of which each sends its own rows back; 1 for the
        gradient of the loss.

    Raises:
      ValueError: an option that does not fit; the message names the field.
    """
    del num_frames
    kind = backbone.kind
    if num_classes:
        raise ValueError(
            "model.family='side4video_retrieval' matches sentences and has no classes; set "
            "task.name='retrieve', or take model.family='side4video'"
        )
    backbone.check_trained_text('side4video_retrieval')
    beside = Beside(
        backbone, dtype, side_dim, tap_every, post_norm, mlp_ratio, batch_norm_groups, remat, unroll
    )

    def features(frozen: Tree, batch: Mapping[str, jax.Array]) -> Tree:
        read = {'tokens': batch['tokens']} if 'tokens' in batch else {}
        if 'video' in batch:
            read |= beside.features(frozen, batch['video'], class_token=True)
        return read

    projection = tuple(f'{VISUAL}/{name}' for name in kind.projection)
    return Model(
        net=RetrievalNet(**beside.fields, backbone=backbone, gradient_world=gradient_world),
        dtype=dtype,
        pixels=kind.pixels,
        param_groups=(
            ParamGroup(rf'{_PRETRAINED}.*bias', 0.0, pretrained_lr),
            ParamGroup(_PRETRAINED, 1.0, pretrained_lr),
            ParamGroup('bias', 0.0),
            ParamGroup('.'),
        ),
        sharding_rules=(
            *RULES,
            ShardingRule(rf'^({"|".join(WEIGHTS)})/fc1/kernel$', ('fsdp', None)),
            ShardingRule(rf'^({"|".join(WEIGHTS)})/fc2/kernel$'),
            *kind.sharding_rules,
        ),
        tensor_axes=(*(_SEPARATE if post_norm else ()), *_STACKED),
        most={LOGIT_SCALE: MAX_LOGIT_SCALE},
        frozen=Frozen(backbone, dtype, features),
        from_backbone={path: path for path in (*projection, TEXT, LOGIT_SCALE)},
        fit=fit_positions,
    )


class RetrievalNet(SideNetwork):
    """The side network, the text tower and the weights of words and frames."""

    backbone: Backbone
    gradient_world: int

    @nn.compact
    def __call__(
        self,
        features: Tree,
        *,
        mask: jax.Array | None = None,
        train: bool = False,
        intermediates: bool = False,
    ) -> dict[str, Any]:
        """Embeds clips, sentences, or both.

        Args:
          features: of clips what `SideNetwork.stream` reads and `class_token` (B, T, D); of
            sentences `tokens` (B, S) int32.
          mask: (B,), 1 where a clip is real; the others count in no statistics.
          train: normalise by the batch, and move the running statistics.
          intermediates: also return what was recorded.

        Returns:
          Of clips `frames` (B, T, E) and `frame_logits` float32 (B, T); of sentences `words`
          (B, S, E), `word_logits` float32 (B, S) and `pooled` (B, E), the word at the end;
          `logit_scale` float32 (B,), the same in all rows. Embeddings have the compute dtype and
          any length.
        """
        kind, spec = self.backbone.kind, self.backbone.spec

        def of_backbone(key: jax.Array) -> Tree:
            return kind.init_params(key, spec)

        text = self.param(TEXT, lambda key: of_backbone(key)[TEXT])
        projection = self.param(
            VISUAL, lambda key: {name: of_backbone(key)[VISUAL][name] for name in kind.projection}
        )
        logit_scale = self.param(LOGIT_SCALE, lambda key: of_backbone(key)[LOGIT_SCALE])
        init = functools.partial(_init_weights, width=spec.embed_dim, by_fan_in=self.post_norm)
        of_words, of_frames = (self.param(name, init) for name in WEIGHTS)

        outputs: dict[str, Any] = {}
        if 'taps' in features:
            s, recorded = self.stream(features, mask, train, record=intermediates, retrieval=True)
            s = self.batch_norm('post_bn', s, mask, train)
            class_token = features['class_token']
            side_proj = self.param('side_proj', _init_side_proj, self.side_dim, spec.width)
            added = einsum(
                'btc,cd->btd',
                s.astype(jnp.float32).mean(2).astype(self.dtype),
                side_proj['kernel'].astype(self.dtype),
            )
            y = class_token + added
            frames = kind.project_image(projection, y.reshape(-1, spec.width))
            frames = frames.reshape(*y.shape[:2], -1).astype(self.dtype)
            frames = scale_gradient(frames, 1 / self.gradient_world)
            outputs |= {'frames': frames, 'frame_logits': weigh(of_frames, frames), **recorded}
        if 'tokens' in features:
            tokens = features['tokens']
            words = kind.encode_words(
                text,
                tokens,
                spec,
                dtype=self.dtype,
                unroll=self.unroll,
                remat=self.remat != 'none',
            )
            words = scale_gradient(words, 1 / self.gradient_world)
            outputs |= {
                'words': words,
                'word_logits': weigh(of_words, words),
                'pooled': transformer.at_end(words, tokens),
            }
        rows = jax.tree.leaves(outputs)[0].shape[:1]
        return outputs | {'logit_scale': jnp.broadcast_to(logit_scale, rows)}


def _init_side_proj(key: jax.Array, side_dim: int, width: int) -> Tree:
    del key
    return {'kernel': jnp.zeros((side_dim, width))}


def _init_weights(key: jax.Array, width: int, by_fan_in: bool) -> Tree:
    """Source: N(0, 0.02) and biases 0 on CLIP, U(1 / sqrt(fan in)) on EVA."""
    kernel = uniform(width) if by_fan_in else nn.initializers.normal(0.02)
    bias = uniform(width) if by_fan_in else nn.initializers.zeros
    first, second, *biases = jax.random.split(key, 4)
    return {
        'fc1': {'kernel': kernel(first, (width, width)), 'bias': bias(biases[0], (width,))},
        'fc2': {'kernel': kernel(second, (width, 1)), 'bias': bias(biases[1], (1,))},
    }


def weigh(params: Tree, x: jax.Array) -> jax.Array:
    """Logits (B, n) of the weights of (B, n, E), float32."""
    dtype = x.dtype
    hidden = jax.nn.relu(transformer.linear(x, params['fc1']))
    logits = einsum('nli,io->nlo', hidden, params['fc2']['kernel'].astype(dtype))
    return logits[..., 0].astype(jnp.float32) + params['fc2']['bias']


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def scale_gradient(x: jax.Array, scale: float) -> jax.Array:
    """`x`, whose gradient is multiplied by `scale`."""
    del scale
    return x


scale_gradient.defvjp(lambda x, scale: (x, None), lambda scale, _, upstream: (upstream * scale,))
