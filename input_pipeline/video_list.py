"""A labelled video, and lists of them in memory."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

Label = int | tuple[int, ...]
Names = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Record:
    """One labelled video, or a part of one.

    Attributes:
      path: the video file, or a name that says where the video lies, for messages.
      label: class index from 0, or one per head.
      video_id: name of the video in the data set.
      start: seconds after the first frame where the part begins; None means the beginning.
      end: seconds where it ends; None means the end.
      load: gives the bytes of the video file where `path` is not a file; raises OSError.
    """

    path: str
    label: Label
    video_id: str
    start: float | None = None
    end: float | None = None
    load: Callable[[], bytes] | None = None


class LabelledSource(Protocol):
    """Random access to records with classes.

    Attributes:
      class_names: names by class index; one tuple per head where labels are tuples.
      num_classes: number of classes, or one number per head.
    """

    class_names: Names | tuple[Names, ...]
    num_classes: int | tuple[int, ...]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...


class VideoList:
    """Records in memory.

    Attributes:
      class_names: names by class index; one tuple per head where labels are tuples.
      num_classes: number of classes, or one number per head.
    """

    def __init__(self, records: Sequence[Record], class_names: Names | tuple[Names, ...]):
        self._records = list(records)
        self.class_names = class_names
        heads = bool(class_names) and isinstance(class_names[0], tuple)
        self.num_classes = tuple(map(len, class_names)) if heads else len(class_names)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        return self._records[index]
