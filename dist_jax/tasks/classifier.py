"""What tasks share that score every class of a list."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dist_jax.tasks.api import Labels, Tree
from input_pipeline.video_list import LabelledSource

log = logging.getLogger('dist_jax')

MOST_NAMED = 10  # classes in a warning


@dataclasses.dataclass(frozen=True)
class Classifier:
    """Gives classes scores.

    Attributes:
      labels: class names of each head.
      label_smoothing: mass spread over all classes.
      fusion: weight in evaluation of the frozen backbone's own logits (0.5 in the paper's zero-shot
        tests, 1 for the backbone alone, 0 for the trained model alone).
    """

    labels: Labels
    label_smoothing: float = 0.0
    fusion: float = 0.0

    needs_classes = True
    needs_captions = False
    input_keys = eval_input_keys = ()
    couples_rows = False
    mixes = True

    def samples(self, source: LabelledSource) -> LabelledSource:
        """The videos of the list."""
        return source

    def check(self, outputs: Tree) -> None:
        """Raises ValueError if there are no logits of these classes, or none to fuse with."""
        sizes = tuple(logits.shape[-1] for logits in outputs.get('logits', ()))
        if sizes != tuple(map(len, self.labels)):
            raise ValueError(
                f'logits of {sizes} classes for {tuple(map(len, self.labels))} class names'
            )
        if self.fusion and 'frozen_logits' not in outputs:
            raise ValueError(
                f'eval.fusion={self.fusion} needs class texts: it works with model.head=text only'
            )

    def queries(self, source: LabelledSource) -> None:
        """There are none."""

    def _scores(
        self, outputs: Tree, num_views: int, probabilities: Callable[[jax.Array], jax.Array]
    ) -> dict[str, Tree]:
        """`scores`: for each head float32 (B, num_classes), probabilities averaged over views."""
        logits = outputs['logits']
        if self.fusion:
            pairs = zip(logits, outputs['frozen_logits'])
            logits = tuple((1 - self.fusion) * a + self.fusion * b for a, b in pairs)
        scores = (probabilities(head.astype(jnp.float32)) for head in logits)
        return {'scores': tuple(s.reshape(-1, num_views, s.shape[-1]).mean(1) for s in scores)}


def warn_of_empty_classes(where: str, names: Sequence[str], counts: np.ndarray) -> None:
    """Names the classes of a list that no video belongs to; counts (num_classes,) of videos."""
    empty = np.flatnonzero(counts == 0)
    if len(empty):
        named = ', '.join(repr(names[k]) for k in empty[:MOST_NAMED])
        log.warning(
            '%s has no video of %d of the %d classes: %s',
            *(where, len(empty), len(names)),
            named + (f' and {len(empty) - MOST_NAMED} more' * (len(empty) > MOST_NAMED)),
        )
