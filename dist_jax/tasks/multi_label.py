"""Any number of classes a video: a sigmoid for each, and mean average precision.

What is right for a clip is a row of zeros and ones, which may be all zeros.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping

import jax
import numpy as np

from dist_jax import losses, metrics
from dist_jax.sharding import gather_rows
from dist_jax.tasks.api import Figures, Tree, labels_of
from dist_jax.tasks.classifier import Classifier, warn_of_empty_classes
from dist_jax.tasks.multi_label_figures import multi_label_figures
from input_pipeline.label_sets import LabelSets, MultiHot
from input_pipeline.video_list import LabelledSource

log = logging.getLogger('dist_jax')


@dataclasses.dataclass(frozen=True)
class MultiLabel(Classifier):
    """Tells of every class by itself whether a clip is of it; one head.

    Text heads compare a clip with a class name and with `neutral_text`: the logit is the
    difference. A cosine alone would be some 25 for all classes before anything is learned, where a
    sigmoid is 1, and runs know the text that they were trained with.
    """

    label_sets = True
    neutral_text = 'a video'
    select_by = 'map'

    def __post_init__(self) -> None:
        if len(self.labels) != 1:
            raise ValueError(
                f"task.name='multi_label' has one head, and the list has {len(self.labels)}"
            )

    @property
    def annotate(self) -> MultiHot:
        """Makes `label`, 1 for the classes of a clip."""
        return MultiHot(len(self.labels[0]))

    @property
    def eval_annotate(self) -> MultiHot:
        """The same."""
        return self.annotate

    @property
    def element_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """`label` (num_classes,) uint8, 0 and 1."""
        return {
            name: jax.ShapeDtypeStruct(shape, dtype)
            for name, (shape, dtype) in self.annotate.spec.items()
        }

    def check_list(self, source: LabelledSource, where: str) -> None:
        """Warns of classes that no video belongs to; raises ValueError if that is all of them."""
        (names,) = labels_of(source)
        sets: LabelSets = source.labels
        counts = sets.counts(len(names))
        if not counts.any():
            raise ValueError(
                f'{where}: none of its {len(source)} videos has a class; nothing can be learned of '
                'it, and no mean average precision found'
            )
        if jax.process_index() == 0:
            warn_of_empty_classes(where, names, counts)
            log.info(
                '%s: %.2f classes a video, at most %d; %d of %d videos have none',
                *(where, sets.sizes.mean(), sets.sizes.max()),
                *((sets.sizes == 0).sum(), len(source)),
            )

    def targets(self, batch: Mapping[str, jax.Array]) -> tuple[jax.Array]:
        """Smoothed rows of zeros and ones (B, num_classes)."""
        return (losses.smooth_multi_hot(batch['label'], self.label_smoothing),)

    def loss(self, outputs: Tree, targets: Tree, mask: jax.Array) -> jax.Array:
        """Binary cross entropy, mean over classes: float32 (B,)."""
        del mask
        return losses.soft_binary_cross_entropy(outputs['logits'][0], targets[0])

    def predict(self, outputs: Tree, num_views: int) -> dict[str, Tree]:
        """`scores`: float32 (B, num_classes), sigmoid averaged over views."""
        return self._scores(outputs, num_views, jax.nn.sigmoid)

    def evaluator(self, source: LabelledSource) -> MultiLabelEvaluator:
        """A fresh judge."""
        return MultiLabelEvaluator(self.labels[0], source)


class MultiLabelEvaluator:
    """Average precisions of a list; see `Figures`."""

    def __init__(self, names: tuple[str, ...], source: LabelledSource):
        self._names = names
        self._source = source
        self._rows: list[dict[str, Tree]] = []

    def add(self, rows: Mapping[str, Tree]) -> None:
        """Takes `index`, `label` and `scores` of some videos."""
        (scores,) = rows['scores']
        self._rows.append({'index': rows['index'], 'label': rows['label'], 'scores': scores})

    def result(self) -> Figures:
        """Average precisions of all that were added on all hosts."""
        rows = gather_rows(self._rows)
        metrics.check_finite(
            [rows['scores']], lambda row: self._source[int(rows['index'][row])].path
        )
        found = metrics.multi_label(rows['scores'], np.asarray(rows['label'], bool))
        return multi_label_figures(found, self._names, len(rows['index']))
