"""A video that was embedded, as journals, indexes and features hold it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np


@dataclasses.dataclass(frozen=True)
class Video:
    """A video and its windows.

    Attributes:
      path: from its folder on, with `/`; or another name that no other video of the run has.
      size: of its file in bytes; 0 where it is no file of its own.
      time_ns: when that was changed last, in nanoseconds; likewise.
      error: '', or 'kind: reason' why it could not be read; then it has no windows.
      num_windows: how many it has.
      read: gives `spans` (n, 2) float64, start and end in seconds, and what was embedded, (n, ...)
        arrays by name; {} where they lie elsewhere.
      file: where they lie; '' where `read` gives them.
    """

    path: str
    size: int
    time_ns: int
    error: str = ''
    num_windows: int = 0
    read: Callable[[], Mapping[str, np.ndarray]] = dict
    file: str = ''
