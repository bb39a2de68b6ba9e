"""The data sets: one row each. A new one is a new row; `sources` reads its lists."""

import os
from collections.abc import Callable
from dataclasses import dataclass

from input_pipeline import motion_clips
from input_pipeline.transforms import Flip

PLAIN_FLIP = Flip()
# "... from left to right" and its two relatives; class indices of the official label map.
SOMETHING_FLIP = Flip(label_pairs=((86, 87), (93, 94), (166, 167)))


@dataclass(frozen=True)
class DatasetInfo:
    """What the code has to know about a data set.

    Attributes:
      num_classes: number of classes; one per head (verb, noun) as a tuple; 0 takes what the label
        map or the list says.
      list_format: of its usual lists, see `sources.open_source`.
      flip: mirroring in training, with the labels that it swaps; None where it would lie.
      sampling: a key of `sampling.PROTOCOLS`, the one of DiST for it.
      generate: writes a built-in set into a folder: train.txt, val.txt, labels.txt and the videos.
    """

    num_classes: int | tuple[int, ...]
    list_format: str
    flip: Flip | None = PLAIN_FLIP
    sampling: str = 'segment'
    generate: Callable[[str | os.PathLike], bool] | None = None


DATASETS: dict[str, DatasetInfo] = {
    'kinetics400': DatasetInfo(400, 'kinetics'),
    'kinetics600': DatasetInfo(600, 'kinetics'),
    'kinetics700': DatasetInfo(700, 'kinetics'),
    'kinetics710': DatasetInfo(710, 'kinetics'),
    # V1 numbers its classes differently and DiST gives no pairs for it: no mirroring.
    'something_v1': DatasetInfo(174, 'csv', flip=None),
    'something_v2': DatasetInfo(174, 'ssv2_json', flip=SOMETHING_FLIP),
    'ucf101': DatasetInfo(101, 'ucf101', sampling='interval'),
    'hmdb51': DatasetInfo(51, 'hmdb51', sampling='interval'),
    'epic_kitchens': DatasetInfo((97, 300), 'csv', sampling='interval'),
    # Directions are its classes.
    'motion_clips': DatasetInfo(8, 'kinetics', flip=None, generate=motion_clips.generate),
    'custom': DatasetInfo(0, 'auto'),
}
