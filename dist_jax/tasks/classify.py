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
from dist_jax.tasks.classifier import Classifier, warn_of_empty_classes
from dist_jax.tasks.classify_figures import classification_figures
from input_pipeline.video_list import LabelledSource

log = logging.getLogger('dist_jax')

# config.task.criterion -> (logits, targets), both (B, num_classes), -> float32 (B,). The binary one
# asks of every class by itself whether a clip is of it, as "ResNet strikes back" (Wightman et al.,
# arXiv:2110.00476) and the image recipe of STS do.
CRITERIA: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    'cross_entropy': losses.soft_cross_entropy,
    'bce': losses.soft_binary_cross_entropy,
}


@dataclasses.dataclass(frozen=True)
class Classify(Classifier):
    """Tells classes apart.

    Attributes:
      criterion: a key of CRITERIA. Scores are a softmax with any: of one view it has the order of
        the logits, whose top-1 the release of STS takes.
    """

    criterion: str = 'cross_entropy'

    annotate = eval_annotate = None
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
            warn_of_empty_classes(where, names, np.bincount(own, minlength=len(names)))

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
        return self._scores(outputs, num_views, jax.nn.softmax)

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
