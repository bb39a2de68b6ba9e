"""Runs a step over all views of the videos of a list, or over rows, each once, on all hosts.

Evaluations, and whoever else wants something of every video, get rows from here.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from dist_jax import ending
from dist_jax.models.api import Tree
from dist_jax.sharding import feed, gather_values, local_rows, to_global
from input_pipeline import pipeline
from input_pipeline.batches import RECORD_FIELDS
from input_pipeline.video_list import LabelledSource
from input_pipeline.workers import Skipped

# One is computed while the next is sent.
BATCHES_ON_DEVICE = 2

ViewStep = Callable[[Tree, Tree, dict[str, jax.Array]], dict[str, Tree]]


@dataclasses.dataclass(frozen=True)
class EvalProtocol:
    """How a list is tested.

    Attributes:
      reader: makes the views of a video.
      batch_size: videos a step over all hosts.
      readers: who reads on this host.
      max_bad_share: share of the list that may be unreadable, 0 to 1.
    """

    reader: pipeline.EvalReader
    batch_size: int
    readers: pipeline.Readers = pipeline.Readers()
    max_bad_share: float = 0.0


class Views:
    """Iterate once for the rows of this host; then ask for what was `unreadable`.

    Attributes:
      source: the list.
      protocol: how it is tested.
    """

    def __init__(
        self,
        step: ViewStep,
        variables: Tree,
        frozen: Tree,
        source: LabelledSource,
        protocol: EvalProtocol,
        mesh: Mesh,
        *,
        input_keys: tuple[str, ...] = (),
        skipped: Skipped | None = None,
        on_batch: Callable[[int], None] = lambda done: None,
        should_stop: Callable[[], bool] = lambda: False,
    ):
        """Opens the readers.

        Args:
          step: (variables, frozen, batch) -> dict of (B, ...) trees; see `step.make_eval_step`.
          variables: trainable parameters and collections.
          frozen: frozen tree.
          source: the videos.
          protocol: how they are tested.
          mesh: devices.
          input_keys: what the step reads of a batch beside `video`.
          skipped: videos that are not read; those over which reader processes end are added.
          on_batch: called with the number of batches done.
          should_stop: asked before each batch; must say the same on all hosts.
        """
        self.source, self.protocol = source, protocol
        self._run = (step, variables, frozen)
        self._mesh = mesh
        self._keys = ('video', *input_keys)
        self._part = feed(mesh)
        self._on_batch = on_batch
        self._should_stop = should_stop
        self._bad: list[tuple[int, str, str]] = []
        self._batches = pipeline.eval_batches(
            source,
            protocol.reader,
            batch_size=protocol.batch_size,
            host=self._part,
            readers=protocol.readers,
            skipped=skipped,
        )

    def __iter__(self) -> Iterator[dict[str, Tree]]:
        """Rows of one batch after the other: `index`, the label and keys of the task, and what the
        step gives; arrays of numbers, which can be gathered.

        Without padding, without unreadable videos, and without those that another host has, too.

        Raises:
          ending.StoppedError: `should_stop` said so.
        """
        step, variables, frozen = self._run
        running: tuple[dict[str, np.ndarray], dict[str, Tree]] | None = None
        done = 0
        # One step is on the devices while the next batch goes there.
        with contextlib.closing(self._batches):
            for batch in self._batches:
                if self._should_stop():
                    raise ending.StoppedError('the evaluation was stopped')
                inputs = {key: batch[key] for key in self._keys}
                del batch['video']
                found = step(variables, frozen, to_global(inputs, self._mesh))
                if running is not None:
                    yield self._rows(*running)
                    done += 1
                    self._on_batch(done)
                running = batch, found
            yield self._rows(*running)
            self._on_batch(done + 1)

    def _rows(self, batch: dict[str, Any], found: dict[str, Tree]) -> dict[str, Tree]:
        self._bad.extend(
            (int(number), str(path), str(error))
            for number, path, error in zip(batch['index'], batch['path'], batch['error'])
            if error and self._part.first
        )
        # What several hosts read is counted once.
        kept = (batch['mask'] > 0) & self._part.first
        own = {key: rows for key, rows in batch.items() if key not in RECORD_FIELDS}
        rows = {'index': batch['index']} | own | local_rows(found)
        return jax.tree.map(lambda leaf: leaf[kept], rows)

    def answers(self, step: ViewStep, rows: Mapping[str, np.ndarray]) -> Iterator[dict[str, Tree]]:
        """Runs another step over rows that every host has; each comes out on one host.

        Args:
          step: see `step.make_query_step`.
          rows: (Q, ...) arrays, which it reads.

        Yields:
          `index` (the numbers of rows), the rows and what the step gives, batch by batch.

        Raises:
          ending.StoppedError: `should_stop` said so.
        """
        _, variables, frozen = self._run
        count, batch_size = len(next(iter(rows.values()))), self.protocol.batch_size
        of_host = batch_size // self._part.count
        own = np.arange(of_host) + of_host * self._part.index
        for start in range(0, count, batch_size):
            if self._should_stop():
                raise ending.StoppedError('the evaluation was stopped')
            index = start + own
            batch = {name: leaf[np.minimum(index, count - 1)] for name, leaf in rows.items()}
            found = local_rows(step(variables, frozen, to_global(batch, self._mesh)))
            kept = (index < count) & self._part.first
            yield jax.tree.map(lambda leaf, kept=kept: leaf[kept], {'index': index} | batch | found)

    def unreadable(self) -> tuple[tuple[str, str], ...]:
        """(path, reason) of the videos of all hosts, in the order of the list.

        Every host must call it, after the last batch.
        """
        return tuple((path, reason) for _, path, reason in sorted(gather_values(self._bad)))
