"""Classification: a loss with smoothed labels, softmax scores averaged over views, top-k.

A data set may have several heads (verb and noun): a label for each, a loss that is the sum of
theirs, and scores for each.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from dist_jax import losses, metrics
from dist_jax.sharding import gather_rows
from dist_jax.tasks.api import Figures, Labels, Tree, labels_of
from dist_jax.tasks.classify_figures import classification_figures
from input_pipeline.video_list import LabelledSource

log = logging.getLogger('dist_jax')

MOST_NAMED = 10  # classes in a warning

# config.task.criterion -> (logits, targets), both (B, num_classes), -> float32 (B,). The binary one
# asks of every class by itself whether a clip is of it, as "ResNet strikes back" (Wightman et al.,
# arXiv:2110.00476) and the image recipe of STS do.
CRITERIA: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    'cross_entropy': losses.soft_cross_entropy,
    'bce': losses.soft_binary_cross_entropy,
}


@dataclasses.dataclass(frozen=True)
class Classify:
    """Tells classes apart.

    Attributes:
      labels: class names of each head.
      label_smoothing: mass spread over all classes.
      fusion: weight in evaluation of the frozen backbone's own logits (0.5 in the paper's zero-shot
        tests, 1 for the backbone alone, 0 for the trained model alone).
      criterion: a key of CRITERIA. Scores are a softmax with any: of one view it has the order of
        the logits, whose top-1 the release of STS takes.
    """

    labels: Labels
    label_smoothing: float = 0.0
    fusion: float = 0.0
    criterion: str = 'cross_entropy'

    needs_classes = True
    needs_captions = False
    annotate = eval_annotate = None
    input_keys = eval_input_keys = ()
    couples_rows = False
    mixes = True
    select_by = 'top1'

    def __post_init__(self) -> None:
        if self.criterion not in CRITERIA:
            raise ValueError(
                f'task.criterion={self.criterion!r} is not one of {", ".join(CRITERIA)}'
            )

    @property
    def element_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """`label`: class index, one for each head where there are several."""
        heads = len(self.labels)
        return {'label': jax.ShapeDtypeStruct((heads,) if heads > 1 else (), jnp.int32)}

    def check_list(self, source: LabelledSource, where: str) -> None:
        """Warns of a list with nothing to tell apart, and of classes that no video belongs to."""
        if jax.process_index() != 0:
            return
        columns = source.labels.reshape(len(source), -1).T
        for names, own in zip(labels_of(source), columns):
            if len(names) == 1:
                log.warning('%s has one class, %r: there is nothing to tell apart', where, names[0])
            empty = np.flatnonzero(np.bincount(own, minlength=len(names)) == 0)
            if len(empty):
                named = ', '.join(repr(names[k]) for k in empty[:MOST_NAMED])
                log.warning(
                    '%s has no video of %d of the %d classes: %s',
                    *(where, len(empty), len(names)),
                    named + (f' and {len(empty) - MOST_NAMED} more' * (len(empty) > MOST_NAMED)),
                )

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

    def targets(self, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, ...]:
        """Distributions (B, num_classes) of each head."""
        labels = batch['label'].reshape(len(batch['label']), -1)
        return tuple(
            losses.smooth_one_hot(labels[:, head], len(names), self.label_smoothing)
            for head, names in enumerate(self.labels)
        )

    def loss(self, outputs: Tree, targets: Tree, mask: jax.Array) -> jax.Array:
        """The criterion, summed over heads: float32 (B,)."""
        del mask
        criterion = CRITERIA[self.criterion]
        return sum(criterion(logits, wanted) for logits, wanted in zip(outputs['logits'], targets))

    def predict(self, outputs: Tree, num_views: int) -> dict[str, Tree]:
        """`scores`: for each head float32 (B, num_classes), softmax averaged over views."""
        logits = outputs['logits']
        if self.fusion:
            pairs = zip(logits, outputs['frozen_logits'])
            logits = tuple((1 - self.fusion) * a + self.fusion * b for a, b in pairs)
        scores = (jax.nn.softmax(head.astype(jnp.float32)) for head in logits)
        return {'scores': tuple(s.reshape(-1, num_views, s.shape[-1]).mean(1) for s in scores)}

    def queries(self, source: LabelledSource) -> None:
        """There are none."""

    def evaluator(self, source: LabelledSource) -> ClassifyEvaluator:
        """A fresh judge."""
        return ClassifyEvaluator(self.labels, source)


class ClassifyEvaluator:
    """Accuracies of a list; see `Figures`."""

    def __init__(self, labels: Labels, source: LabelledSource):
        self._labels = labels
        self._source = source
        self._rows: list[dict[str, Tree]] = []

    def add(self, rows: Mapping[str, Tree]) -> None:
        """Takes `index`, `label` and `scores` of some videos."""
        self._rows.append({key: rows[key] for key in ('index', 'label', 'scores')})

    def result(self) -> Figures:
        """Accuracies of all that were added on all hosts."""
        rows = gather_rows(self._rows)
        scores, labels = rows['scores'], rows['label'].reshape(len(rows['index']), -1)
        metrics.check_finite(scores, lambda row: self._source[int(rows['index'][row])].path)
        heads = [metrics.classification(s, labels[:, i]) for i, s in enumerate(scores)]
        joint = metrics.joint_top1(scores, labels) if len(heads) > 1 else None
        return classification_figures(heads, joint, self._labels)
