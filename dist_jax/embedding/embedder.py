"""Windows over videos through a model: batches of clips in, named rows of numbers out.

The batches hold windows of several videos, one after the other, so that short videos leave no part
of a batch empty. What comes out is in the order of the videos.

What a row becomes depends on its clip and on its place in the batch, not on its neighbours. Whoever
goes on after some videos and starts at the place where they ended (`Done.next_row`) gets the bits
that one run over all videos gives, on the same devices.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dist_jax.models.api import Tree
from dist_jax.sharding import check_batch_size, local_rows, to_global
from dist_jax.similarity import unit
from dist_jax.views import ViewStep
from input_pipeline.video_list import Record
from input_pipeline.windows import ClipReader, End, Window, read_windows

# Outputs of a network for clips, (B, ...) leaves -> what is wanted of them, by name.
Reading = Callable[[Tree], Mapping[str, jax.Array]]


class Row(NamedTuple):
    """What became of a window: `start` and `end` in seconds, `values` by name, each of one row."""

    start: float
    end: float
    values: dict[str, np.ndarray]


class Done(NamedTuple):
    """After the last row of a video.

    Attributes:
      error: '', or 'kind: reason' why it cannot be read; then its rows count for nothing.
      next_row: of a batch, where the next video begins.
    """

    error: str
    next_row: int


@dataclasses.dataclass(frozen=True)
class Embedding:
    """Stands where `make_eval_step` takes a task, for whoever wants something else of a network.

    Attributes:
      reading: takes what is wanted of the outputs for clips.
    """

    reading: Reading
    eval_input_keys: tuple[str, ...] = ()

    def predict(self, outputs: Tree, num_views: int) -> dict[str, jax.Array]:
        """Means over the views of a video."""
        found = self.reading(outputs)
        return {
            name: leaf.reshape(-1, num_views, *leaf.shape[1:]).mean(1) if num_views > 1 else leaf
            for name, leaf in found.items()
        }


def clip_embedding(outputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """What a network says of a whole clip.

    Returns:
      `clip` (B, E) float32: what a classifier's head reads, as it is; where there are frames alone,
      of a backbone or of a model of retrieval, their mean, of unit length.
    """
    if 'embedding' in outputs:
        return {'clip': outputs['embedding'].astype(jnp.float32)}
    return {'clip': unit(outputs['frames'].astype(jnp.float32).mean(1))}


class Embedder:
    """A step that embeds windows, in one process and on its devices.

    Attributes:
      batch_size: windows of a step.
    """

    def __init__(self, step: ViewStep, variables: Tree, frozen: Tree, mesh: Mesh, batch_size: int):
        """Takes the parts.

        Args:
          step: (variables, frozen, {'video': (B, V, T, H, W, 3) uint8}) -> (B, ...) leaves by name;
            see `step.make_eval_step`. It is compiled when it is first used.
          variables: parameters and collections of the network, on the mesh.
          frozen: its frozen tree, likewise.
          mesh: the devices, of this process alone, over which rows are split.
          batch_size: windows of a step.

        Raises:
          ValueError: the devices do not divide the batch.
        """
        check_batch_size(batch_size, mesh, 'batch_size')
        self.batch_size = batch_size
        self._mesh = mesh
        self._tree = (variables, frozen)
        self._step = step

    def embed(
        self,
        records: Iterable[Record],
        reader: ClipReader,
        *,
        first_row: int = 0,
        num_threads: int = 2,
    ) -> Iterator[tuple[int, Row | Done]]:
        """Embeds all windows of videos.

        Args:
          records: the videos.
          reader: makes the windows.
          first_row: where in a batch the first window stands.
          num_threads: videos that are read at the same time.

        Yields:
          (number of the record, row), all of a video in order of time, then its `Done`; videos in
          the order of the records.
        """
        row = first_row % self.batch_size
        running: tuple[list[_Event], dict[str, jax.Array]] | None = None
        with contextlib.closing(read_windows(records, reader, num_threads)) as items:
            for events, clips in self._batches(items, reader.shape, row):
                found = {}
                if not all(isinstance(item, Done) for _, item, _ in events):
                    views = clips.reshape(len(clips), -1, *clips.shape[-4:])
                    batch = to_global({'video': views}, self._mesh)
                    found = self._step(*self._tree, batch)
                # One step is on the devices while the next batch is read.
                if running is not None:
                    yield from _in_order(*running)
                running = events, found
        if running is not None:
            yield from _in_order(*running)

    def _batches(
        self,
        items: Iterable[tuple[int, Window | End]],
        shape: tuple[int, ...],
        row: int,
    ) -> Iterator[tuple[list[_Event], np.ndarray]]:
        """Fills batches (B, ...) of what the reader gives; zeros where there is no window."""
        clips = np.zeros((self.batch_size, *shape), np.uint8)
        waiting: list[_Event] = []
        for number, item in items:
            if isinstance(item, End):
                waiting.append((number, Done(item.error, row), row))
                continue
            clips[row] = item.clip
            waiting.append((number, (item.start, item.end), row))
            row += 1
            if row == self.batch_size:
                yield waiting, clips
                # A new one: on a CPU, devices may share the memory of the last.
                clips, waiting, row = np.zeros_like(clips), [], 0
        if waiting:
            yield waiting, clips


# Number of the record, its end or the times of a window, row of the batch.
_Event = tuple[int, Done | tuple[float, float], int]


def _in_order(
    events: list[_Event], found: Mapping[str, jax.Array]
) -> Iterator[tuple[int, Row | Done]]:
    rows = local_rows(found)
    for number, item, row in events:
        if isinstance(item, Done):
            yield number, item
        else:
            yield number, Row(*item, {name: leaf[row] for name, leaf in rows.items()})
