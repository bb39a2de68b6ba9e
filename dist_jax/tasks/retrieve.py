"""Text-video retrieval: sentences and videos of a batch find each other.

Source: Yao et al. (arXiv:2311.15769) and the retrieval code of Side4Video's release. The loss is
that of the whole batch over all devices, and so is its gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from dist_jax import losses
from dist_jax.sharding import everywhere
from dist_jax.similarity import INTERACTIONS, MASKED, Texts, Videos, decorrelation, similarity
from dist_jax.tasks.api import Labels, Tree
from dist_jax.tasks.retrieve_evaluator import RetrieveEvaluator
from input_pipeline.captions import CaptionPairs, CaptionTokens, check_captions, sentence_rows
from input_pipeline.tokenizer import CONTEXT_LENGTH
from input_pipeline.video_list import LabelledSource

# What is right for a sentence: its own clip, as in the release, in which other clips of the same
# video are wrong; or all clips of its video.
POSITIVES = ('pair', 'video')


class Retrieve:
    """Matches sentences and videos.

    Args:
      labels: of the list; nothing is read of them.
      num_words: S, tokens of a sentence, start and end included; longer ones are cut.
      interaction: one of `similarity.INTERACTIONS`.
      masked: one of `similarity.MASKED`.
      positives: one of `POSITIVES`.
      cdcr: weight of the channel decorrelation of matched words and frames; 0 for none, as in all
        published scripts; the release's, where it is asked for, is 0.001.

    Raises:
      ValueError: naming the field of config.task that is out of range.
    """

    labels: Labels = ()
    needs_classes = False
    needs_captions = True
    eval_annotate = None
    input_keys = ('tokens',)
    eval_input_keys = ()
    couples_rows = True
    mixes = False
    select_by = 't2v_r1'

    def __init__(
        self,
        labels: Labels = (),
        *,
        num_words: int = 32,
        interaction: str = 'wti',
        masked: str = 'zero',
        positives: str = 'pair',
        cdcr: float = 0.0,
    ):
        del labels
        for field, value, choices in (
            ('interaction', interaction, INTERACTIONS),
            ('masked', masked, MASKED),
            ('positives', positives, POSITIVES),
        ):
            if value not in choices:
                raise ValueError(f'task.{field}={value!r} is not one of {", ".join(choices)}')
        if not 2 <= num_words <= CONTEXT_LENGTH:
            raise ValueError(
                f'task.num_words={num_words} must be 2, for start and end, to {CONTEXT_LENGTH}, '
                'which text towers read'
            )
        if cdcr and interaction != 'wti':
            raise ValueError(
                f'task.cdcr={cdcr} is about words and frames, and task.interaction={interaction!r} '
                "compares none; set task.cdcr=0 or task.interaction='wti'"
            )
        self.annotate = CaptionTokens(num_words)
        self._similarity = functools.partial(similarity, interaction=interaction, masked=masked)
        self._masked, self._positives, self._cdcr = masked, positives, cdcr
        self._num_words = num_words

    @property
    def element_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """`tokens` and `word_mask` (S,), and `label`, the number of the video in its list."""
        made = {
            name: jax.ShapeDtypeStruct(shape, dtype)
            for name, (shape, dtype) in self.annotate.spec.items()
        }
        return made | {'label': jax.ShapeDtypeStruct((), jnp.int32)}

    def check_list(self, source: LabelledSource, where: str) -> None:
        """Raises ValueError for a list without captions; logs how many are cut."""
        check_captions(source, where, self._num_words)

    def samples(self, source: LabelledSource) -> LabelledSource:
        """Pairs of a video and one of its sentences."""
        return CaptionPairs(source)

    def check(self, outputs: Tree) -> None:
        """Raises ValueError if there are no embeddings of words and frames."""
        missing = [name for name in ('words', 'frames', 'logit_scale') if name not in outputs]
        if missing:
            raise ValueError(
                f"task.name='retrieve' reads {', '.join(missing)} of a network, and this one has "
                'none; take a config for retrieval, as --config=side4video_retrieval:ROW'
            )

    def targets(self, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Which words are real, and of which video each clip is."""
        return {'word_mask': batch['word_mask'], 'video': batch['label']}

    def loss(self, outputs: Tree, targets: Tree, mask: jax.Array) -> jax.Array:
        """Mean of the cross entropies of sentences over videos and of videos over sentences.

        Rows with mask 0 are no candidates. Of real rows the mean is the loss of the batch.
        """
        texts = Texts(
            outputs['words'], targets['word_mask'], outputs['word_logits'], outputs['pooled']
        )
        own = Videos(
            outputs['frames'], jnp.ones_like(outputs['frame_logits']), outputs['frame_logits']
        )
        scale = jnp.exp(outputs['logit_scale'])[:, None]
        logits = scale * self._similarity(texts, own)
        right = None
        if self._positives == 'video':
            right = targets['video'][:, None] == everywhere(targets['video'])
        loss = losses.contrastive(logits, mask, right)
        return loss + self._cdcr * decorrelation(texts, own, mask) if self._cdcr else loss

    def predict(self, outputs: Tree, num_views: int) -> dict[str, Tree]:
        """`frames` float32 (B, views * T, E) and `frame_logits` (B, views * T) of all views."""
        frames, logits = outputs['frames'].astype(jnp.float32), outputs['frame_logits']
        return {
            'frames': frames.reshape(-1, num_views * frames.shape[1], frames.shape[2]),
            'frame_logits': logits.reshape(-1, num_views * logits.shape[1]),
        }

    def queries(self, source: LabelledSource) -> Mapping[str, np.ndarray]:
        """All sentences of the list: `tokens` and `word_mask` (Q, S)."""
        return sentence_rows(source, self._num_words)[0]

    def predict_queries(self, outputs: Tree) -> dict[str, Tree]:
        """`words` (Q, S, E), `word_logits` (Q, S) and `pooled` (Q, E), float32."""
        return {
            name: outputs[name].astype(jnp.float32) for name in ('words', 'word_logits', 'pooled')
        }

    def evaluator(self, source: LabelledSource) -> RetrieveEvaluator:
        """A fresh judge."""
        return RetrieveEvaluator(source, self._similarity, CaptionPairs(source).labels)
