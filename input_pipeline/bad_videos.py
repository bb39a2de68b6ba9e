"""Videos that cannot be read: counted, named once, written down, and not too many of them.

The report is a JSON Lines file with one object per record: index, path, kind, reason, epoch. The
log of a training run and a check beforehand write the same.
"""

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from input_pipeline import sampling
from input_pipeline.decode import MAX_PIXELS, DecodeError, VideoReader
from input_pipeline.pipeline import Source
from input_pipeline.sources import Record

NUM_CHECK_FRAMES = 8


class TooManyBadVideos(RuntimeError):
    """More records than allowed cannot be read; the message lists them."""


class BadVideoLog:
    """Counts records that cannot be read and stops the run when there are too many.

    Each record counts once, however often it comes up, also across restarts: the file is read when
    the log opens. The run stops when more than `max(1, floor(max_share * total))` records are bad,
    so one bad video never stops a run, unless `max_share` is 0, which allows none.

    Attributes:
      path: the report.
      limit: bad records that are allowed.
    """

    def __init__(self, path: str | os.PathLike, max_share: float, total: int):
        """Opens a report, continuing one that is there.

        Args:
          path: JSON Lines file; created with the first bad video.
          max_share: allowed share of bad records in the source, 0 to 1.
          total: records in the source.

        Raises:
          ValueError: if `max_share` is not in 0 to 1.
        """
        if not 0 <= max_share <= 1:
            raise ValueError(f'max_share={max_share} must be in 0 to 1')
        self.path = Path(path)
        self._total = total
        self.limit = max(1, math.floor(max_share * total)) if max_share else 0
        self._entries: dict[int, dict[str, Any]] = {}
        if self.path.exists():
            self._resume()

    def __len__(self) -> int:
        return len(self._entries)

    def _resume(self) -> None:
        text = self.path.read_bytes()
        whole = text[: text.rfind(b'\n') + 1]
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                entry = json.loads(line)
                self._entries[int(entry['index'])] = entry
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f'{self.path}:{number}: not a line of a bad video report; move the file away'
                ) from error
        if len(whole) < len(text):  # the run was killed while it wrote the last line
            os.truncate(self.path, len(whole))

    def add(self, batch: Mapping[str, np.ndarray]) -> int:
        """Takes note of the bad records of a batch.

        Args:
          batch: from `pipeline`; its index, path, error and epoch are read.

        Returns:
          The number of records that were not known to be bad.

        Raises:
          TooManyBadVideos: if the limit is passed; the report is written first.
        """
        new = 0
        for position in np.flatnonzero(batch['error'] != ''):
            index = int(batch['index'][position])
            if index in self._entries:
                continue
            kind, _, reason = str(batch['error'][position]).partition(': ')
            entry = {
                'index': index,
                'path': str(batch['path'][position]),
                'kind': kind,
                'reason': reason,
                'epoch': int(batch['epoch'][position]),
            }
            logging.warning('cannot read video %d, %s: %s: %s', *list(entry.values())[:4])
            self._entries[index] = entry
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, 'a', encoding='utf-8') as file:
                file.write(json.dumps(entry) + '\n')
            new += 1
        if len(self._entries) > self.limit:
            raise TooManyBadVideos(self._message())
        return new

    def counts(self) -> Counter:
        """Number of bad records by kind."""
        return Counter(entry['kind'] for entry in self._entries.values())

    def _message(self) -> str:
        lines = [
            f'  {entry["index"]} {entry["path"]}: {entry["kind"]}: {entry["reason"]}'
            for entry in list(self._entries.values())[:50]
        ]
        if len(self._entries) > len(lines):
            lines.append(f'  and {len(self._entries) - len(lines)} more, see {self.path}')
        return (
            f'{len(self)} of {self._total} videos cannot be read, {self.limit} are allowed. Repair '
            'the list (`dist_jax check` names all bad videos) or raise max_share.\n'
            + '\n'.join(lines)
        )


@dataclass(frozen=True)
class CheckResult:
    """Outcome of `check_source`.

    Attributes:
      total: records that were looked at.
      bad: the entries of the report, in the order of the list.
    """

    total: int
    bad: tuple[dict[str, Any], ...]

    @property
    def counts(self) -> Counter:
        """Number of bad records by kind, most frequent first."""
        return Counter(entry['kind'] for entry in self.bad)


def check_record(record: Record, full: bool = False, max_pixels: int = MAX_PIXELS) -> None:
    """Reads one video as training would.

    Args:
      record: what to read.
      full: decode every frame, not only those of an 8-frame sample of segments.
      max_pixels: larger frames are refused.

    Raises:
      DecodeError: if it cannot be read.
    """
    with VideoReader(record.path, max_pixels) as video:
        first, total = video.frame_range(record.start, record.end)
        if not full:
            video.frames(first + sampling.segment_test(total, NUM_CHECK_FRAMES, 1)[0])
            return
        for start in range(first, first + total, 64):  # a whole video may not fit into memory
            video.frames(np.arange(start, min(start + 64, first + total)))


def check_source(
    source: Source,
    report: str | os.PathLike,
    *,
    full: bool = False,
    num_threads: int = 2,
    max_pixels: int = MAX_PIXELS,
    progress: Callable[[int, int, int], None] | None = None,
) -> CheckResult:
    """Reads every video of a list and writes the report of those that cannot be read.

    Args:
      source: the records.
      report: JSON Lines file, replaced when all is read; empty if nothing is bad.
      full: decode every frame.
      num_threads: videos read at the same time.
      max_pixels: larger frames are refused.
      progress: called with (done, total, bad so far) after each video.

    Returns:
      What was found.
    """

    def check(index: int) -> dict[str, Any] | None:
        record = source[index]
        try:
            check_record(record, full, max_pixels)
        except DecodeError as error:
            found = {'kind': error.kind, 'reason': error.reason, 'epoch': 0}
            return {'index': index, 'path': record.path} | found
        return None

    bad = []
    with ThreadPoolExecutor(num_threads) as pool:
        for done, entry in enumerate(pool.map(check, range(len(source))), 1):
            if entry is not None:
                bad.append(entry)
            if progress is not None:
                progress(done, len(source), len(bad))
    report = Path(report)
    report.parent.mkdir(parents=True, exist_ok=True)
    partial = report.with_name(report.name + '.partial')
    partial.write_text(''.join(json.dumps(entry) + '\n' for entry in bad), encoding='utf-8')
    partial.replace(report)
    return CheckResult(len(source), tuple(bad))
