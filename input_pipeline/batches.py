"""From the elements of a stream to batches: in threads of this process, or in reader processes."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from input_pipeline.workers import Element, ReaderPool, Skipped, Stream, usual_number

# What all rows of a record share.
RECORD_FIELDS = {
    'mask': np.float32,
    'index': np.int64,
    'epoch': np.int64,
    'path': object,
    'error': object,
}


@dataclass(frozen=True)
class Readers:
    """Who reads on a host. The batches do not depend on it.

    Except for videos that a process dies of or takes too long over.

    Attributes:
      num_threads: reader threads, each of which makes whole batches; 0 reads in `next`.
      num_workers: reader processes, which take the place of threads; 0 for threads, -1 for as many
        as `workers.usual_number` says.
      buffer_size: batches that are made ahead.
      record_timeout: seconds that a reader process may take over a record.
    """

    num_threads: int = 2
    num_workers: int = 0
    buffer_size: int = 4
    record_timeout: float = 60.0

    def __post_init__(self):
        if self.num_workers < -1 or not self.record_timeout > 0:
            raise ValueError(
                f'num_workers={self.num_workers} must be -1 or more and record_timeout='
                f'{self.record_timeout} more than 0 s'
            )

    @property
    def num_processes(self) -> int:
        """Reader processes on this machine, 0 where threads read."""
        return usual_number() if self.num_workers == -1 else self.num_workers


@dataclass(frozen=True)
class HostPart:
    """Which part of every batch a host reads.

    Attributes:
      index: of the part, from 0.
      count: of all parts.
    """

    index: int = 0
    count: int = 1

    def __post_init__(self):
        if not 0 <= self.index < self.count:
            raise ValueError(f'host.index={self.index} must be in 0 to {self.count - 1}')


class Batches:
    """An iterator over batches, dicts of numpy arrays; `len()` is the number of all its batches.

    An error that is not about a video (a wrong transform, say) is raised by `next`, naming the
    record.
    """

    def __init__(
        self,
        stream: Stream,
        *,
        num_batches: int,
        batch_size: int,
        readers: Readers,
        skipped: Skipped | None = None,
    ):
        """Starts reading.

        Args:
          stream: makes the elements.
          num_batches: batches in all.
          batch_size: elements of a batch.
          readers: who makes them.
          skipped: records that are not read; those over which processes end are added.

        Raises:
          ValueError: if the stream cannot be sent to processes.
        """
        self._num_batches = num_batches
        self._pool = None
        skipped = Skipped() if skipped is None else skipped
        num_processes = readers.num_processes
        if not num_batches:
            self._iterator = iter(())
        elif num_processes:
            self._iterator = self._pool = ReaderPool(
                stream,
                _join,
                num_batches=num_batches,
                batch_size=batch_size,
                num_workers=num_processes,
                buffer_size=readers.buffer_size,
                record_timeout=readers.record_timeout,
                skipped=skipped,
            )
        else:
            make = _caught(stream, skipped)
            self._iterator = _in_threads(make, num_batches, batch_size, readers)

    @property
    def worker_pids(self) -> list[int]:
        """Process numbers of the readers; none where threads read."""
        return self._pool.pids if self._pool else []

    @property
    def num_restarts(self) -> int:
        """Reader processes that died or hung and were replaced."""
        return self._pool.restarts if self._pool else 0

    def __len__(self) -> int:
        return self._num_batches

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        if self._iterator is None:
            raise StopIteration
        try:
            batch = next(self._iterator)
        except BaseException:
            self.close()
            raise
        if isinstance(batch, Exception):
            self.close()
            raise batch
        return batch

    def close(self) -> None:
        """Stops the readers; no batch comes after it."""
        if self._iterator is not None and hasattr(self._iterator, 'close'):
            self._iterator.close()
        self._iterator = None


def _in_threads(
    make: Callable[[int], Element | Exception],
    num_batches: int,
    batch_size: int,
    readers: Readers,
) -> Iterator[dict[str, np.ndarray] | Exception]:
    import grain  # brings jax, which must not come into the reader processes

    dataset = grain.MapDataset.range(num_batches * batch_size).map(make)
    dataset = dataset.batch(batch_size, batch_fn=_stack)
    options = grain.ReadOptions(
        num_threads=readers.num_threads,
        prefetch_buffer_size=max(readers.buffer_size, readers.num_threads),
    )
    return iter(dataset.to_iter_dataset(options))


def _caught(stream: Stream, skipped: Skipped) -> Callable[[int], Element | Exception]:
    def caught(position: int) -> Element | Exception:
        try:
            return stream(int(position), skipped.find(stream, int(position)))
        except Exception as error:  # grain would lose the rest of the stream
            return error

    return caught


def _stack(elements: list[Element | Exception]) -> dict[str, np.ndarray] | Exception:
    if any(isinstance(element, Exception) for element in elements):
        return _join(elements, np.empty(0))
    return _join(elements, np.stack([video for element in elements for video in element['video']]))


def _join(
    elements: list[Element | Exception], video: np.ndarray
) -> dict[str, np.ndarray] | Exception:
    """A batch of elements whose videos lie in one array, or the first error among them."""
    for element in elements:
        if isinstance(element, Exception):
            return element
    rows = [row for element in elements for row in element['rows']]
    counts = [len(element['rows']) for element in elements]
    of_record = {
        key: np.repeat(np.array([e[key] for e in elements], dtype), counts)
        for key, dtype in RECORD_FIELDS.items()
    }
    return {
        'video': video,
        **{key: np.stack([row[key] for row in rows]) for key in rows[0]},
        **of_record,
    }
