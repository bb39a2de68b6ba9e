"""Videos that cannot be read: counted, named once, written down, and not too many of them.

The report is a JSON Lines file with one object per record: index, path, kind, reason, epoch. The
log of a training run and a check beforehand write the same.
"""

import errno
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from etils import epath

from input_pipeline import sampling
from input_pipeline.decode import MAX_PIXELS, DecodeError, VideoReader
from input_pipeline.jpeg import JpegReader
from input_pipeline.pipeline import Source, open_video, reading
from input_pipeline.video_list import Record
from input_pipeline.workers import ATTEMPTS, KINDS, Skipped

NUM_CHECK_FRAMES = 8


class TooManyBadVideos(RuntimeError):
    """More records than allowed cannot be read; the message lists them."""


def allowed(max_share: float, total: int) -> int:
    """How many of `total` records may be unreadable: at least one, unless the share is 0."""
    return max(1, math.floor(max_share * total)) if max_share else 0


class BadVideoLog:
    """Counts records that cannot be read and stops the run when there are too many.

    Each record counts once, however often it comes up, also across restarts: the file is read when
    the log opens. The run stops when more than `max(1, floor(max_share * total))` records are bad,
    so one bad video never stops a run, unless `max_share` is 0, which allows none.

    With several hosts each has a report and finds a part of the bad records. What a host learns of
    the others counts with its own; it then stops where `check` is called, not in `add`, so that all
    hosts stop at the same step.

    A record over which reader processes ended (`workers.KINDS`) is not read again in the run. What
    is in the report counts after a restart too, from the epoch on in which it was found, so that
    the run goes on as it would have. Transient trouble is forgotten when its line is taken out.

    Attributes:
      path: the report.
      limit: bad records that are allowed.
      found: numbers of the records that were found by this object, in order.
      skipped: the records that are not read again, for `pipeline.train_batches`.
      num_shared: for the caller: how many of all hosts it has passed to `learn`.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        max_share: float,
        total: int,
        others: Sequence[str | os.PathLike] = (),
        alone: bool = True,
    ):
        """Opens a report, continuing one that is there.

        Args:
          path: JSON Lines file, local or in a bucket; created with the first bad video.
          max_share: allowed share of bad records in the source, 0 to 1.
          total: records in the source.
          others: reports of other hosts or of earlier runs; what is in them is known.
          alone: False where several hosts read; `add` then leaves it to `check` to stop.

        Raises:
          ValueError: if `max_share` is not in 0 to 1.
        """
        if not 0 <= max_share <= 1:
            raise ValueError(f'max_share={max_share} must be in 0 to 1')
        self.path = epath.Path(path)
        self._total = total
        self._alone = alone
        self.limit = allowed(max_share, total)
        self.found: list[int] = []
        self.num_shared = 0
        reports = [_read_report(epath.Path(other))[0] for other in others]
        self._known: set[int] = set().union(*reports)  # of other hosts
        self._entries: dict[int, dict[str, Any]] = {}
        if self.path.exists():
            self._entries, whole, cut = _read_report(self.path)
            if cut:  # the run was killed while it wrote the last line
                self.path.write_bytes(whole)
        self._rule_told = False
        self.skipped = _skipped([*reports, self._entries])
        if len(self.skipped):
            self._tell_rule()

    def __len__(self) -> int:
        return len(self._known | self._entries.keys())

    def learn(self, indices: Iterable[int]) -> None:
        """Records that other hosts found."""
        self._known.update(indices)

    def check(self) -> None:
        """Raises TooManyBadVideos if there are more than allowed, on all hosts together."""
        if len(self) > self.limit:
            raise TooManyBadVideos(self._message())

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
            kind, _, reason = str(batch['error'][position]).partition(': ')
            known = index in self._entries or index in self._known
            # A video that could not be read may hang the next time: that is remembered as well.
            worse = kind in KINDS and self._entries.get(index, {}).get('kind', kind) not in KINDS
            if known and not worse:
                continue
            entry = {
                'index': index,
                'path': str(batch['path'][position]),
                'kind': kind,
                'reason': reason,
                'epoch': int(batch['epoch'][position]),
            }
            logging.warning('cannot read video %d, %s: %s: %s', *list(entry.values())[:4])
            self._entries[index] = entry
            self._write(entry)
            if kind in KINDS:
                self._tell_rule()
            if not known:
                self.found.append(index)
                new += 1
        if self._alone:
            self.check()
        return new

    def _tell_rule(self) -> None:
        if not self._rule_told:
            logging.warning(
                'a video over which %d reader processes ended or waited (data.record_timeout) is '
                'not read again in this run, nor after a restart; to have it read again, stop the '
                'run, take its line out of %s and start again',
                ATTEMPTS,
                self.path,
            )
        self._rule_told = True

    def _write(self, entry: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if '://' in os.fspath(self.path):  # objects cannot be appended to
            lines = ''.join(json.dumps(each) + '\n' for each in self._entries.values())
            self.path.write_bytes(lines.encode())
            return
        with open(self.path, 'a', encoding='utf-8') as file:
            file.write(json.dumps(entry) + '\n')

    def counts(self) -> Counter:
        """Number of bad records by kind."""
        return Counter(entry['kind'] for entry in self._entries.values())

    def _message(self) -> str:
        lines = [
            f'  {entry["index"]} {entry["path"]}: {entry["kind"]}: {entry["reason"]}'
            for entry in list(self._entries.values())[:50]
        ]
        if len(self) > len(lines):
            more = f'  and {len(self) - len(lines)} more, see {self.path}'
            lines.append(more if self._alone else f'{more} and those of the other hosts beside it')
        gone = sum(self.counts()[kind] for kind in ('missing', 'unreadable'))
        advice = (
            'Repair the list (`dist_jax check` names all bad videos) or raise data.max_bad_share.'
        )
        if 2 * gone > len(self._entries):
            advice = (
                f'{gone} of them are missing or their files cannot be read: is data.root right, '
                f'and is its disk mounted on this machine? {advice}'
            )
        return (
            f'{len(self)} of {self._total} videos cannot be read, {self.limit} are allowed. '
            f'{advice}\n' + '\n'.join(lines)
        )


def _read_report(path: epath.Path) -> tuple[dict[int, dict[str, Any]], bytes, bool]:
    """Entries by record, the whole lines, and whether a last line is cut off."""
    text = path.read_bytes()
    whole = text[: text.rfind(b'\n') + 1]
    entries = {}
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            entry = json.loads(line)
            entries[int(entry['index'])] = entry
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f'{path}:{number}: not a line of a bad video report; move the file away'
            ) from error
    return entries, whole, len(whole) < len(text)


def _skipped(reports: Iterable[Mapping[int, Mapping[str, Any]]]) -> Skipped:
    """The records of reports that are not read again, each from the first epoch that any names."""
    found: dict[int, tuple[int, str, str]] = {}
    for index, entry in (pair for report in reports for pair in report.items()):
        kind, epoch = entry.get('kind'), entry.get('epoch', 0)
        if kind in KINDS and (index not in found or epoch < found[index][0]):
            found[index] = (epoch, kind, entry.get('reason', ''))
    return Skipped(found)


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
    with reading(record.path), open_video(record, max_pixels) as video:
        first, total = video.frame_range(record.start, record.end)
        check_frames(video, first, total, full)


def check_frames(
    video: VideoReader | JpegReader, first: int, total: int, full: bool = False
) -> None:
    """Decodes frames of an open video: all of a part, or an 8-frame sample of segments.

    Raises:
      DecodeError: if they do not decode.
    """
    if not full:
        video.frames(first + sampling.segment_test(total, NUM_CHECK_FRAMES, 1)[0])
        return
    for _ in video.pictures(np.arange(first, first + total)):
        pass  # a whole video may not fit into memory


def open_report(report: str | os.PathLike) -> Path:
    """The file that a report is written to before it takes its name; raises OSError, early."""
    report = Path(report)
    if report.is_dir():
        raise IsADirectoryError(errno.EISDIR, 'the report would be a folder', str(report))
    report.parent.mkdir(parents=True, exist_ok=True)
    partial = report.with_name(report.name + '.partial')
    with open(partial, 'a', encoding='utf-8'):
        return partial


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

    partial = open_report(report)
    bad = []
    with ThreadPoolExecutor(num_threads) as pool:
        for done, entry in enumerate(pool.map(check, range(len(source))), 1):
            if entry is not None:
                bad.append(entry)
            if progress is not None:
                progress(done, len(source), len(bad))
    partial.write_text(''.join(json.dumps(entry) + '\n' for entry in bad), encoding='utf-8')
    partial.replace(report)
    return CheckResult(len(source), tuple(bad))
