"""Arrays that are never whole in memory: made a few rows at a time, whenever they are read.

A converted backbone can have leaves of many gigabytes, the layers of a stack on axis 0. Hashing,
checking and writing need such a leaf in order and once each, and nobody needs all of it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

PART_BYTES = 64 * 2**20  # of one part; a single layer may be larger


@dataclasses.dataclass(frozen=True, eq=False)
class PartedArray:
    """An array that is made in parts.

    Attributes:
      shape: of the whole.
      dtype: of its elements.
      make: (start, stop) -> rows start:stop of axis 0, a new array each time. What cannot be cut is
        asked for as a whole.
      stacked: whether it can be cut along axis 0.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[int, int], np.ndarray]
    stacked: bool

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    @property
    def length(self) -> int:
        """Of axis 0; 1 without axes."""
        return self.shape[0] if self.shape else 1

    def whole(self) -> np.ndarray:
        """All of it, in memory."""
        return self.make(0, self.length)

    def parts(self) -> Iterator[tuple[np.ndarray, int]]:
        """(rows, number of the first) in order, each part at most `PART_BYTES` or one row."""
        rows = self.length
        if self.stacked and self.nbytes > PART_BYTES:
            rows = max(1, PART_BYTES * self.length // self.nbytes)
        for start in range(0, self.length, rows):
            yield self.make(start, min(start + rows, self.length)), start


def parts_of(leaf: Any) -> Iterator[tuple[np.ndarray, int]]:
    """`PartedArray.parts`; any other array as one part."""
    if isinstance(leaf, PartedArray):
        yield from leaf.parts()
    else:
        yield np.asarray(leaf), 0
