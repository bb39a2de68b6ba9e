"""From a listed video to a record: the same function on one machine and on many."""

import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2

from dist_jax.dataset.building.plan import Entry, Options
from input_pipeline.bad_videos import check_frames
from input_pipeline.decode import VideoReader
from input_pipeline.encode import transcode
from input_pipeline.escape import terminal
from input_pipeline.jpeg import open_file
from input_pipeline.records import FACTS, SETS_FEATURE
from input_pipeline.video_list import Names


@dataclass(frozen=True)
class Video:
    """An encoded video as it is stored.

    Attributes:
      content: the bytes of a video file.
      facts: by the names of `records.FACTS`.
      crc32: of the content.
    """

    content: bytes
    facts: dict[str, int | float]
    crc32: int


class VideoMaker:
    """Makes the stored form of videos; keeps the file open while parts of it are cut out."""

    def __init__(self, options: Options):
        self._options = options
        self._source: str | bytes = ''
        self._reader: VideoReader | None = None

    def make(self, entry: Entry) -> Video:
        """Reads a video, encodes it anew if that was asked for, and checks what is stored.

        Raises:
          DecodeError: if it cannot be read.
        """
        options = self._options
        if entry.start is None and entry.end is None:
            if options.short_side:
                content = self._transcode(entry.file.open(options.frame_rate))
            else:
                content = entry.file.read(options.frame_rate)
        else:
            source = entry.file.open(options.frame_rate)
            if self._reader is None or source != self._source:
                self.close()
                self._source, self._reader = source, VideoReader(source, name=entry.name)
            content = self._transcode(self._reader, start=entry.start, end=entry.end)
        with open_file(content, name=entry.name) as video:
            full = options.full_check and not options.short_side
            check_frames(video, 0, video.num_frames, full)
            height, width = video.size
            facts = dict(zip(FACTS, (video.num_frames, video.fps, video.duration, height, width)))
        return Video(content, facts, zlib.crc32(content))

    def _transcode(self, source: str | bytes | VideoReader, **part: float | None) -> bytes:
        options = self._options
        return transcode(
            source,
            options.short_side,
            options.keyframe_interval,
            options.crf,
            options.codec,
            **part,
        )

    def close(self) -> None:
        """Closes the file that is still open."""
        if self._reader is not None:
            self._reader.close()
        self._reader = None


def label_names(num_heads: int) -> tuple[str, ...]:
    """Names of the label features: label, label_2 and so on, as in CSV lists."""
    return tuple(f'label_{head}' if head > 1 else 'label' for head in range(1, num_heads + 1))


def make_features(
    class_names: Sequence[Names], several: bool = False
) -> tfds.features.FeaturesDict:
    """The features of a record.

    Args:
      class_names: of each head; () for a set of captions.
      several: a video has any number of classes of the one head.
    """
    fields = {
        'video': tfds.features.Text(doc='an encoded video, the bytes of a file'),
        'video_id': tfds.features.Text(doc='name in the original data set'),
        'source': tfds.features.Text(doc='path in the original list'),
        'split': tfds.features.Text(doc='of the original data set'),
        'num_frames': tfds.features.Scalar(np.int64),
        'fps': tfds.features.Scalar(np.float32),
        'duration': tfds.features.Scalar(np.float32, doc='seconds'),
        'height': tfds.features.Scalar(np.int64, doc='pixels, turned upright'),
        'width': tfds.features.Scalar(np.int64, doc='pixels, turned upright'),
    }
    labels = [
        tfds.features.ClassLabel(names=[terminal(name) for name in names]) for names in class_names
    ]
    if several:
        fields[SETS_FEATURE] = tfds.features.Sequence(labels[0])
    else:
        fields |= zip(label_names(len(labels)), labels)
    if not class_names:
        fields['captions'] = tfds.features.Sequence(tfds.features.Text())
    return tfds.features.FeaturesDict(fields)


def serialize(
    features: tfds.features.FeaturesDict, split: str, entry: Entry, video: Video
) -> bytes:
    """A record as TFDS stores it, a `tf.train.Example`."""
    fields = {
        'video': video.content,
        'video_id': os.fsencode(entry.video_id),
        'source': os.fsencode(entry.name),
        'split': split,
        **video.facts,
    }
    if SETS_FEATURE in features:
        fields[SETS_FEATURE] = list(entry.label)
    elif entry.label:
        fields |= zip(label_names(len(entry.label)), entry.label)
    else:
        fields['captions'] = list(entry.captions)
    # A message writes its map in an order that differs from process to process.
    example = tf_example_pb2.Example.FromString(features.serialize_example(fields))
    return example.SerializeToString(deterministic=True)
