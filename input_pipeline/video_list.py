"""A labelled video, and lists of them in memory."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from input_pipeline.label_sets import LabelSets
from input_pipeline.packed import Objects, Texts, TextTuples

Label = int | tuple[int, ...] | frozenset[int]
Names = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Record:
    """One labelled video, or a part of one.

    Attributes:
      path: the video file, or a name that says where the video lies, for messages.
      label: class index from 0, or one per head; the set of its classes, which may be empty, where
        a video may have any number of them; () in sets of captions.
      video_id: name of the video in the data set.
      start: seconds after the first frame where the part begins; None means the beginning.
      end: seconds where it ends; None means the end.
      load: gives the bytes of the video file where `path` is not a file; raises OSError.
      captions: texts; () in sets of classes.
    """

    path: str
    label: Label
    video_id: str
    start: float | None = None
    end: float | None = None
    load: Callable[[], bytes] | None = None
    captions: tuple[str, ...] = ()


class LabelledSource(Protocol):
    """Random access to records with classes or captions.

    Attributes:
      class_names: names by class index; one tuple per head where labels are tuples; () in sets of
        captions.
      num_classes: number of classes, or one number per head; 0 in sets of captions.
      labels: (N,) or (N, heads) int, those of the records; (N, 0) in sets of captions; `LabelSets`
        where a video may have any number of classes.
    """

    class_names: Names | tuple[Names, ...]
    num_classes: int | tuple[int, ...]
    labels: np.ndarray | LabelSets

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...


class VideoList:
    """Records in memory, as columns of arrays; each record is made when it is asked for.

    Attributes:
      class_names: names by class index; one tuple per head where labels are tuples; () in sets of
        captions.
      num_classes: number of classes, or one number per head; 0 in sets of captions.
      labels: (N,) or (N, heads) int64; (N, 0) in sets of captions; `LabelSets` of records with
        sets.
    """

    def __init__(self, records: Sequence[Record], class_names: Names | tuple[Names, ...]):
        records = list(records)
        self.class_names = class_names
        heads = bool(class_names) and isinstance(class_names[0], tuple)
        self.num_classes = tuple(map(len, class_names)) if heads else len(class_names)
        labels = [record.label for record in records]
        self.labels: np.ndarray | LabelSets
        if records and isinstance(labels[0], frozenset):
            self.labels = LabelSets.pack(labels)
        else:
            self.labels = np.array(labels, np.int64)
        self._paths = Texts.pack([record.path for record in records])
        self._video_ids = Texts.pack([record.video_id for record in records])
        # (N, 2) seconds, NaN for None; most lists have none of these three.
        times = [(record.start, record.end) for record in records]
        self._times = np.array(times, np.float64) if set(times) - {(None, None)} else None
        loads = [record.load for record in records]
        self._loads = Objects(loads) if any(load is not None for load in loads) else None
        captions = [record.captions for record in records]
        self._captions = TextTuples.pack(captions) if any(captions) else None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Record:
        index = range(len(self))[index]
        label = self.labels[index]
        if isinstance(label, (np.ndarray, np.generic)):
            label = label.tolist()
        start = end = None
        if self._times is not None:
            times = self._times[index].tolist()
            start, end = (None if math.isnan(time) else time for time in times)
        return Record(
            self._paths[index],
            tuple(label) if isinstance(label, list) else label,
            self._video_ids[index],
            start,
            end,
            None if self._loads is None else self._loads[index],
            () if self._captions is None else self._captions[index],
        )
