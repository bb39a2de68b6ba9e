"""Full fine-tuning: every weight of the image tower is trained, for sentences the text tower too.

A frame is embedded by itself and a clip is the mean of its frames, so that nothing sees their
order:

    linear    classifier on the mean of the embeddings, as `frame_mean` on frozen ones
    text      cosine of the mean of unit embeddings with the texts of the frozen text tower, from
              where `zero_shot` is
    words     no classes: frames, words and the scale of logits for `task.name='retrieve'`

Source: with sentences and `task.interaction='meanP'` this is CLIP4Clip with mean pooling (Luo et
al., arXiv:2104.08860, section 3.2), whose frames are of unit length before their mean is taken;
with one frame a clip it is the training of CLIP itself (Radford et al. 2021, arXiv:2103.00020,
section 2.3). With classes it is the image part of ViFi-CLIP (Rasheed et al., arXiv:2212.03640).

Differs: CLIP4Clip's release keeps patch and token embeddings and positions as they are, and decays
norms; ViFi-CLIP trains the text tower for class texts, too. Nothing was compared with their code.

The towers start as the backbone's (`Model.from_backbone`) and nothing of it is held beside them. A
run on a CLIP with `words` is a CLIP again: `dist_jax convert --export` writes it as one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dist_jax.models import heads, transformer
from dist_jax.models.api import Model, ParamGroup, TensorAxes, Tree
from dist_jax.models.backbone import Backbone
from dist_jax.models.frozen import TEXT, Frozen
from dist_jax.models.layers import Dtype, l2_normalize
from dist_jax.models.params import in_precision
from dist_jax.sharding import ShardingRule

IMAGE_TOWER, TEXT_TOWER, LOGIT_SCALE = 'visual', 'text', 'logit_scale'
WORDS = 'words'  # in place of a head
MAX_SCALE = 100.0  # Source: CLIP, section 2.5


def build(
    backbone: Backbone,
    *,
    num_classes: tuple[int, ...] = (),
    num_frames: int,
    head: str = 'linear',
    dtype: Any = jnp.bfloat16,
    pretrained_lr: float = 1.0,
    initial_scale: float = 0.0,
    remat: bool = False,
    unroll: bool = False,
) -> Model:
    """Towers that start as those of a backbone.

    Args:
      backbone: what they start as.
      num_classes: classes of each head; () with `words`.
      num_frames: any.
      head: 'linear', 'text' or 'words'.
      dtype: compute dtype; parameters, norms, softmax and loss are float32.
      pretrained_lr: learning rate of what starts as the backbone's, a share of a classifier's.
      initial_scale: of the logits with `words`, at the start; 0 for the backbone's.
      remat: the backward pass computes what is inside of a block again.
      unroll: see `stack`.

    Raises:
      ValueError: an option that does not fit; the message names the field.
    """
    del num_frames
    kind = backbone.kind
    if head not in (*heads.HEADS, WORDS):
        raise ValueError(f'model.head={head!r} is not one of {(*heads.HEADS, WORDS)}')
    if (head == WORDS) == bool(num_classes):
        raise ValueError(
            f"model.head={head!r} with {num_classes or 'no'} classes: 'words' is for "
            "task.name='retrieve', 'linear' and 'text' are for classes"
        )
    if initial_scale and (head != WORDS or not 0 < initial_scale <= MAX_SCALE):
        raise ValueError(
            f'model.initial_scale={initial_scale} is at most {MAX_SCALE:g}, and of model.head='
            f"'words' alone; 0 for that of the backbone"
        )
    taken: list[str] = [IMAGE_TOWER]
    own: tuple[ParamGroup, ...] = ()
    towers = {'backbone': backbone, 'dtype': dtype, 'remat': remat, 'unroll': unroll}
    if head == WORDS:
        backbone.check_trained_text('fine_tune')
        taken += [TEXT_TOWER] if initial_scale else [TEXT_TOWER, LOGIT_SCALE]
        net = Matcher(**towers, initial_scale=initial_scale)
        own = (ParamGroup(f'^{LOGIT_SCALE}$', 0.0, pretrained_lr),)
    else:
        if head == 'linear':
            own = ParamGroup('^head/.*bias$', 0.0), ParamGroup('^head/')
        net = Classifier(**towers, head=heads.Head(head, tuple(num_classes)))

    def texts(frozen: Tree, batch: Mapping[str, jax.Array]) -> Tree:
        return {'video': batch['video']} | {name: frozen[name] for name in TEXT}

    of_backbone = rf'^({IMAGE_TOWER}|{TEXT_TOWER})/'
    return Model(
        net=net,
        dtype=dtype,
        pixels=kind.pixels,
        param_groups=(
            ParamGroup(rf'{of_backbone}.*(bias|scale|embedding)$', 0.0, pretrained_lr),
            ParamGroup(of_backbone, 1.0, pretrained_lr),
            *own,
        ),
        sharding_rules=(
            ShardingRule('^head/.*kernel$', ('fsdp', None)),
            ShardingRule('^head/'),
            *kind.sharding_rules,
        ),
        tensor_axes=(TensorAxes(rf'^({IMAGE_TOWER}|{TEXT_TOWER})/blocks/', (0,)),),
        most={LOGIT_SCALE: math.log(MAX_SCALE)} if head == WORDS else {},
        frozen=Frozen(backbone, dtype, texts, reads_classes=True, reads_images=False)
        if head == 'text'
        else None,
        from_backbone={name: name for name in taken},
    )


class Towers(nn.Module):
    """Towers as parameters, of the structure that the backbone has them in."""

    backbone: Backbone
    dtype: Dtype
    remat: bool
    unroll: bool

    def part(self, name: str) -> Tree:
        """A subtree of the backbone as a parameter."""
        kind, spec = self.backbone.kind, self.backbone.spec
        return self.param(name, lambda key: kind.init_params(key, spec)[name])

    def frames(self, video: jax.Array) -> jax.Array:
        """Clips (B, T, H, W, 3) -> float32 (B, T, E), of any length."""
        # Rounded once, as a frozen tower is when it is read.
        tower = in_precision({IMAGE_TOWER: self.part(IMAGE_TOWER)}, self.dtype)[IMAGE_TOWER]
        return self.backbone.embed_frames(
            tower, video.astype(self.dtype), unroll=self.unroll, remat=self.remat
        )


class Classifier(Towers):
    """The image tower and a head."""

    head: heads.Head

    @nn.compact
    def __call__(
        self, features: Tree, *, mask: jax.Array | None = None, train: bool = False
    ) -> dict[str, Any]:
        """Tells clips apart.

        Args:
          features: `video` (B, T, H, W, 3), and for a text head `text` and `logit_scale`.
          mask, train: accepted for the common interface; there are no statistics and no dropout.

        Returns:
          `logits`, tuple of float32 (B, num_classes); `embedding` float32 (B, E), the mean that the
          module names.
        """
        del mask, train
        frames = self.frames(features['video'])
        embedding = (l2_normalize(frames) if self.head.kind == 'text' else frames).mean(1)
        return {'embedding': embedding, 'logits': self.head(embedding, features)}


class Matcher(Towers):
    """Both towers and the scale of logits."""

    initial_scale: float

    @nn.compact
    def __call__(
        self, features: Tree, *, mask: jax.Array | None = None, train: bool = False
    ) -> dict[str, Any]:
        """Embeds clips, sentences, or both.

        Args:
          features: of clips `video` (B, T, H, W, 3); of sentences `tokens` (B, S) int32.
          mask, train: accepted for the common interface; there are no statistics and no dropout.

        Returns:
          What `side4video_retrieval.RetrievalNet` returns. Frames are of unit length. All words and
          all frames have the same weight, as nothing learns others.
        """
        del mask, train
        if self.initial_scale:
            start = nn.initializers.constant(math.log(self.initial_scale))
            logit_scale = self.param(LOGIT_SCALE, start, ())
        else:
            logit_scale = self.part(LOGIT_SCALE)
        outputs: dict[str, Any] = {}
        if 'video' in features:
            frames = l2_normalize(self.frames(features['video']))
            outputs |= {
                'frames': frames.astype(self.dtype),
                'frame_logits': jnp.zeros(frames.shape[:2]),
            }
        if 'tokens' in features:
            tokens = features['tokens']
            words = self.backbone.kind.encode_words(
                self.part(TEXT_TOWER),
                tokens,
                self.backbone.spec,
                dtype=self.dtype,
                unroll=self.unroll,
                remat=self.remat,
            )
            outputs |= {
                'words': words,
                'word_logits': jnp.zeros(words.shape[:2]),
                'pooled': transformer.at_end(words, tokens),
            }
        rows = jax.tree.leaves(outputs)[0].shape[:1]
        return outputs | {'logit_scale': jnp.broadcast_to(logit_scale, rows)}
