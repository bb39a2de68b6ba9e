"""Multi-view evaluation: every video once, all of its views together."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dist_jax import ending, metrics, recipe
from dist_jax.models.api import Tree
from dist_jax.progress import Bar
from dist_jax.sharding import feed, to_global
from dist_jax.tasks.api import Figures, Labels, Table
from dist_jax.tasks.classify_figures import classification_figures
from input_pipeline import bad_videos, pipeline
from input_pipeline.video_list import LabelledSource
from input_pipeline.workers import Skipped

# One is computed while the next is sent.
BATCHES_ON_DEVICE = 2

EvalStep = Callable[[Tree, Tree, jax.Array], tuple[jax.Array, ...]]


class BadVideosError(RuntimeError):
    """Videos of an evaluation list cannot be read and the settings do not allow that."""


@dataclasses.dataclass(frozen=True)
class EvalResult:
    """Outcome of one evaluation.

    Attributes:
      columns: `metrics.classification` of each head.
      top1: of the list; with several heads, the share with all of them right.
      top5: of the first head.
      mean_class_accuracy: of the first head.
      num_videos: videos that were scored.
      bad_videos: (path, reason) of those that could not be read, of all hosts in the order of the
        list; they are in no figure.
      seconds: duration.
      scores: (N, num_classes) probabilities of each head, in the order of `index`.
      index: (N,) record numbers.
    """

    columns: tuple[dict[str, Any], ...]
    top1: float
    top5: float
    mean_class_accuracy: float
    num_videos: int
    bad_videos: tuple[tuple[str, str], ...]
    seconds: float
    scores: tuple[np.ndarray, ...]
    index: np.ndarray

    def figures(self, labels: Labels) -> Figures:
        """What logs, files and pages show; `labels` are the class names of each head."""
        joint = self.top1 if len(self.columns) > 1 else None
        found = classification_figures(self.columns, joint, labels)
        return with_videos(found, self.num_videos, self.bad_videos)


def with_videos(
    figures: Figures, num_videos: int, bad_videos: Sequence[tuple[str, str]]
) -> Figures:
    """Figures with how many videos they are of, and which could not be read: (path, reason)."""
    counts = {'num_videos': num_videos, 'num_bad_videos': len(bad_videos)}
    sections = figures.sections
    if bad_videos:
        title = f'Unreadable videos: {len(bad_videos)}, in no figure'
        sections = (*sections, Table(title, ('path', 'reason'), bad_videos))
    return dataclasses.replace(figures, scalars={**figures.scalars, **counts}, sections=sections)


def evaluate(
    eval_step: EvalStep,
    variables: Tree,
    frozen: Tree,
    source: LabelledSource,
    reader: pipeline.EvalReader,
    mesh: Mesh,
    *,
    batch_size: int,
    readers: pipeline.Readers = pipeline.Readers(),
    max_bad_share: float = 0.0,
    skipped: Skipped | None = None,
    on_batch: Callable[[int, int], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> EvalResult:
    """Scores a list of videos.

    Args:
      eval_step: from `step.make_eval_step`.
      variables: trainable parameters and collections.
      frozen: frozen tree.
      source: the videos.
      reader: their test views.
      mesh: devices.
      batch_size: videos a step over all hosts.
      readers: who reads on this host.
      max_bad_share: share of the list that may be unreadable, 0 to 1; these are left out.
      skipped: videos that are not read; those over which reader processes end are added.
      on_batch: called with (batches done, batches in all).
      should_stop: asked before each batch; must say the same on all hosts.

    Raises:
      ending.StoppedError: `should_stop` said so.
      BadVideosError: naming the videos, if there are more than allowed or none is left.
      NonFiniteScoresError: naming the videos, if scores are NaN or infinite.
    All are raised on all hosts alike.
    """
    start = time.monotonic()
    part = feed(mesh)
    batches = pipeline.eval_batches(
        source,
        reader,
        batch_size=batch_size,
        host=part,
        readers=readers,
        skipped=skipped,
    )
    kept: list[tuple[np.ndarray, ...]] = []
    bad: list[tuple[int, str, str]] = []

    def collect(batch: dict[str, np.ndarray], probabilities: tuple[jax.Array, ...]) -> None:
        local = [_local_rows(column) for column in probabilities]
        # What several hosts read is counted once.
        rows = (batch['mask'] > 0) & part.first
        labels = batch['label'].reshape(len(rows), -1)
        kept.append((batch['index'][rows], labels[rows], *(column[rows] for column in local)))
        bad.extend(
            (int(number), str(path), str(error))
            for number, path, error in zip(batch['index'], batch['path'], batch['error'])
            if error and part.first
        )
        if on_batch is not None:
            on_batch(len(kept), len(batches))

    # One step is on the devices while the next batch goes there.
    running: tuple[dict[str, np.ndarray], tuple[jax.Array, ...]] | None = None
    with contextlib.closing(batches):
        for batch in batches:
            if should_stop is not None and should_stop():
                raise ending.StoppedError('the evaluation was stopped')
            video = to_global({'video': batch.pop('video')}, mesh)['video']
            probabilities = eval_step(variables, frozen, video)
            if running is not None:
                collect(*running)
            running = batch, probabilities
        collect(*running)
    unreadable = tuple((path, reason) for _, path, reason in sorted(_gather_values(bad)))
    limit = bad_videos.allowed(max_bad_share, len(source))
    if len(unreadable) > limit or len(unreadable) == len(source):
        named = '\n'.join(f'  {path}: {reason}' for path, reason in unreadable[:50])
        raise BadVideosError(
            f'{len(unreadable)} of {len(source)} videos cannot be read, {limit} are allowed, so '
            'the accuracy would not be of the whole list. Repair the list (`dist_jax check` names '
            f'all), or pass --config.eval.allow_bad_videos=true to leave them out.\n{named}'
        )
    index, labels, *scores = _gather([np.concatenate(parts) for parts in zip(*kept)])
    metrics.check_finite(scores, lambda row: str(source[int(index[row])].path))
    columns = tuple(metrics.classification(column, labels[:, i]) for i, column in enumerate(scores))
    return EvalResult(
        columns=columns,
        top1=columns[0]['top1'] if len(columns) == 1 else metrics.joint_top1(scores, labels),
        top5=columns[0]['top5'],
        mean_class_accuracy=columns[0]['mean_class_accuracy'],
        num_videos=len(index),
        bad_videos=unreadable,
        seconds=time.monotonic() - start,
        scores=tuple(scores),
        index=index,
    )


def evaluate_config(
    config: ConfigDict,
    eval_step: EvalStep,
    variables: Tree,
    frozen: Tree,
    source: LabelledSource,
    mesh: Mesh,
    bar: Bar,
    max_bad_share: float = 0.0,
    skipped: Skipped | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> EvalResult:
    """`evaluate` with the views, the batch size and the rules of a config, moving a bar.

    With `config.eval.allow_bad_videos`, any number of videos may be unreadable.
    """
    return evaluate(
        eval_step,
        variables,
        frozen,
        source,
        recipe.eval_reader(config),
        mesh,
        batch_size=config.eval.batch_size,
        readers=recipe.eval_readers(config),
        max_bad_share=1.0 if config.eval.allow_bad_videos else max_bad_share,
        skipped=skipped,
        on_batch=lambda done, _: bar.update(done),
        should_stop=should_stop,
    )


def _local_rows(array: jax.Array) -> np.ndarray:
    """This host's rows of an array that is split over devices on axis 0."""
    shards = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
    return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])


def _gather_values(values: list[Any]) -> list[Any]:
    """JSON values of all hosts, one host's after the other's."""
    if jax.process_count() == 1:
        return values
    text = np.frombuffer(json.dumps(values).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(len(text)))
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: len(text)] = text
    texts = multihost_utils.process_allgather(padded)
    return [value for row, n in zip(texts, lengths) for value in json.loads(row[:n].tobytes())]


def _gather(arrays: list[np.ndarray]) -> list[np.ndarray]:
    """Rows of all hosts, in the order of the list. Hosts may hold different numbers of rows."""
    if jax.process_count() > 1:
        lengths = multihost_utils.process_allgather(np.int32(len(arrays[0])))
        longest = int(lengths.max())
        padded = [
            np.concatenate([a, np.zeros((longest - len(a), *a.shape[1:]), a.dtype)]) for a in arrays
        ]
        arrays = [
            np.concatenate(
                [host[:n] for host, n in zip(multihost_utils.process_allgather(a), lengths)]
            )
            for a in padded
        ]
    order = np.argsort(arrays[0], kind='stable')
    return [a[order] for a in arrays]
