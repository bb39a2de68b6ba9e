"""Videos with any number of classes: their sets in few arrays, and as rows of zeros and ones."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import DTypeLike


class LabelSets:
    """The classes of videos, a set each, none or many; a sequence of frozensets.

    Attributes:
      classes: (M,) int32, the class indices of all videos one after the other, each once and
        ascending in its set.
      ends: (N,) int64, where each set ends in them.
    """

    def __init__(self, classes: np.ndarray, ends: np.ndarray):
        """Takes the arrays; see `pack`."""
        self.classes, self.ends = classes, ends

    @classmethod
    def pack(cls, sets: Sequence[Iterable[int]]) -> 'LabelSets':
        """Puts sets one after the other."""
        own = [sorted(set(each)) for each in sets]
        classes = np.array([label for each in own for label in each], np.int32)
        return cls(classes, np.cumsum([len(each) for each in own], dtype=np.int64))

    def check(self) -> None:
        """Raises ValueError if these arrays are not sets as `pack` puts them."""
        ascending = np.diff(self.classes) > 0
        first = self.ends[(self.ends > 0) & (self.ends < len(self.classes))] - 1
        ascending[first] = True  # from one set to the next
        if not ascending.all() or len(self.classes) != (self.ends[-1] if len(self.ends) else 0):
            raise ValueError('the classes of a video are not ascending, or belong to none')

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> frozenset[int]:
        index = range(len(self))[index]
        start = self.ends[index - 1] if index else 0
        return frozenset(self.classes[start : self.ends[index]].tolist())

    @property
    def sizes(self) -> np.ndarray:
        """(N,) int64, classes of each video."""
        return np.diff(self.ends, prepend=0)

    def counts(self, num_classes: int) -> np.ndarray:
        """(num_classes,) int64, videos of each class."""
        return np.bincount(self.classes, minlength=num_classes)

    def members(self, label: int) -> np.ndarray:
        """Numbers of the videos of a class, int64, ascending."""
        return np.searchsorted(self.ends, np.flatnonzero(self.classes == label), side='right')


@dataclass(frozen=True)
class MultiHot:
    """Makes the labels of a batch of sets: 1 for the classes of a clip, for `pipeline.Annotate`.

    Attributes:
      num_classes: length of a row, C.
    """

    num_classes: int

    @property
    def spec(self) -> Mapping[str, tuple[tuple[int, ...], DTypeLike]]:
        """`label` (C,) uint8."""
        return {'label': ((self.num_classes,), np.uint8)}

    def __call__(self, record, label: frozenset[int], rng) -> dict[str, np.ndarray]:
        """The row of a clip, whose label a flip may have changed."""
        del record, rng
        row = np.zeros(self.num_classes, np.uint8)
        row[sorted(label)] = 1
        return {'label': row}
