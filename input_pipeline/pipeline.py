"""From a source of records to batches of uint8 clips, the same for any number of threads or hosts.

The training stream is a pure function of (seed, epoch, record, copy): position p of the stream,
counted over all hosts, is record `epoch_order(seed, p // N)[p % N]` with `rng = default_rng([seed,
epoch, record index])`. It is decoded once and gives S clips, its copies, which follow each other in
the batch; copy c draws from the c-th child of that generator. Nothing has to be saved to resume,
and any clip can be made again alone, see `TrainReader.read`.

A video that cannot be read stays in its place in the batch with mask 0 and its reason; nothing is
raised in a reader thread, where grain could not carry on.
"""

import functools
import numbers
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, Protocol

import cv2
import numpy as np
from numpy.typing import DTypeLike

from input_pipeline.batches import RECORD_FIELDS, Batches, HostPart, Readers
from input_pipeline.decode import MAX_PIXELS, DecodeError, VideoReader, stack
from input_pipeline.frame_folder import FrameFolder
from input_pipeline.jpeg import DECODERS, JpegReader, open_file
from input_pipeline.regular_files import describe
from input_pipeline.sampling import PROTOCOLS, REFERENCE_FPS
from input_pipeline.transforms import RandomResizedCrop, Transform, ViewCrops, apply, choose
from input_pipeline.video_list import Label, Record
from input_pipeline.workers import Element, Rows, Skipped


class Source(Protocol):
    """Random access to records; index i is the identity of a record."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...


class Annotate(Protocol):
    """What a clip brings into a batch beside its pixels and label: tokens of a text, a box.

    It goes to reader processes by pickle. A key `label` takes the place of the class; a set of
    classes has no row without.

    Attributes:
      spec: key of the batch -> shape and dtype of a row.
    """

    @property
    def spec(self) -> Mapping[str, tuple[tuple[int, ...], DTypeLike]]: ...

    def __call__(self, record: Record, label: Label, rng: np.random.Generator | None) -> Rows:
        """Makes the rows of a clip.

        Args:
          record: where the clip is from.
          label: of the clip, which a flip may have changed.
          rng: of the clip, after its transforms; None in tests, where nothing is drawn.

        Returns:
          A row for each key of the spec. Records that cannot be read and padding get zeros.
        """


def _rows(
    annotate: Annotate | None, record: Record, label: Label, rng: np.random.Generator | None = None
) -> Rows:
    """The rows of a clip: its label, and what `annotate` makes.

    Raises:
      ValueError: that is not what its spec says.
    """
    rows = _label_row(label)
    if annotate is None:
        return rows
    made = {key: np.asarray(row) for key, row in annotate(record, label, rng).items()}
    found = {key: (row.shape, row.dtype) for key, row in made.items()}
    wanted = {key: (tuple(shape), np.dtype(dtype)) for key, (shape, dtype) in annotate.spec.items()}
    if found != wanted:
        raise ValueError(
            f'annotate of the reader made rows {found} of {record.path}, its spec is {wanted}'
        )
    return rows | made


def _blank_rows(annotate: Annotate | None, label: Label | np.ndarray) -> Rows:
    """The rows where there is no clip."""
    spec = {} if annotate is None else annotate.spec
    return _label_row(label) | {key: np.zeros(shape, dtype) for key, (shape, dtype) in spec.items()}


def _label_row(label: Label | np.ndarray) -> Rows:
    return {} if isinstance(label, frozenset) else {'label': np.asarray(label, np.int32)}


def _check_reader(reader: 'TrainReader | EvalReader') -> None:
    protocol = choose('sampling', reader.sampling, PROTOCOLS)
    choose('jpeg_decoder', reader.jpeg_decoder, dict.fromkeys(DECODERS))
    for name in ('num_frames', 'image_size', 'interval'):
        if getattr(reader, name) < 1:
            raise ValueError(f'{name}={getattr(reader, name)} must be at least 1')
    # The protocol itself refuses what it cannot use: here, not in a thread.
    protocol.test(1, reader.num_frames, 1, reader.interval, REFERENCE_FPS)
    taken = {'video', *RECORD_FIELDS} & set(reader.annotate.spec if reader.annotate else ())
    if taken:
        raise ValueError(f'annotate makes {sorted(taken)}, which every batch has; rename its keys')


OpenVideo = VideoReader | JpegReader | FrameFolder


def open_video(
    record: Record, max_pixels: int = MAX_PIXELS, jpeg_decoder: str = 'libjpeg'
) -> OpenVideo:
    """Opens the video of a record, from its file, its folder of frames or from where it says.

    Args:
      record: what to read.
      max_pixels: larger frames are refused.
      jpeg_decoder: of single pictures, one of `jpeg.DECODERS`.

    Raises:
      DecodeError: if the video cannot be read.
    """
    if record.load is None:
        if os.path.isdir(record.path):
            return FrameFolder(record.path, max_pixels)
        return open_file(record.path, max_pixels, jpeg_decoder=jpeg_decoder)
    with reading(record.path):
        content = record.load()
    return open_file(content, max_pixels, record.path, jpeg_decoder)


@contextmanager
def reading(path: str) -> Iterator[None]:
    """Makes a DecodeError of what may happen to any single video between its file and its clip.

    That is trouble with its file, too little memory, and sizes that a library refuses. Other
    exceptions are mistakes in the program and pass.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise DecodeError(path, 'missing', str(error)) from error
    except OSError as error:
        raise DecodeError(path, 'unreadable', describe(error)) from error
    except MemoryError as error:
        raise DecodeError(path, 'too large', f'not enough memory: {error}') from error
    except (cv2.error, ArithmeticError) as error:
        reason = ' '.join(f'{type(error).__name__}: {error}'.split())
        raise DecodeError(path, 'unreadable', reason) from error


@dataclass(frozen=True)
class TrainReader:
    """How a record becomes training clips.

    Attributes:
      num_frames: frames per clip, T.
      image_size: height and width of the clip in pixels; the transforms must produce it.
      sampling: a key of `sampling.PROTOCOLS`.
      interval: spacing of frames where the sampling reads it; for 'interval' in frames of a 30 fps
        video, for others in frames of the file.
      transforms: run in order on the clip.
      repeats: clips of a record, S: the same frames, transformed S times with own draws.
      max_pixels: larger frames are refused.
      annotate: makes further keys of the batches.
      jpeg_decoder: of single pictures, one of `jpeg.DECODERS`.
    """

    num_frames: int
    image_size: int
    sampling: str = 'segment'
    interval: float = 1.0
    transforms: tuple[Transform, ...] = ()
    repeats: int = 1
    max_pixels: int = MAX_PIXELS
    annotate: Annotate | None = None
    jpeg_decoder: str = 'libjpeg'

    def __post_init__(self):
        _check_reader(self)
        if self.repeats < 1:
            raise ValueError(f'repeats={self.repeats} must be at least 1')

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of a clip, (T, H, W, 3)."""
        return (self.num_frames, self.image_size, self.image_size, 3)

    def read(self, record: Record, rng: np.random.Generator) -> tuple[list[np.ndarray], list[Rows]]:
        """Reads the clips of a record; decodes its frames once.

        Args:
          record: what to read.
          rng: a fresh generator, the source of all draws: the frames are drawn from it, what
            happens to copy c from its c-th child. `record_rng(seed, epoch, index)` gives the clips
            of a run.

        Returns:
          S clips (T, H, W, 3) uint8 RGB, and the rows of each: `label`, int32, which a flip may
          have changed, and those of `annotate`.

        Raises:
          DecodeError: if the video cannot be read.
        """
        with reading(record.path):
            with open_video(record, self.max_pixels, self.jpeg_decoder) as video:
                first, total = video.frame_range(record.start, record.end)
                protocol = PROTOCOLS[self.sampling]
                indices = first + protocol.train(
                    total, self.num_frames, rng, self.interval, video.fps
                )
                children = rng.spawn(self.repeats)
                frames, transforms = self._frames(video, indices, children)
            copies = [apply(transforms, frames, record.label, child) for child in children]
        return [video for video, _ in copies], [
            _rows(self.annotate, record, label, child)
            for (_, label), child in zip(copies, children)
        ]

    def _frames(
        self, video: OpenVideo, indices: np.ndarray, children: list[np.random.Generator]
    ) -> tuple[np.ndarray, tuple[Transform, ...]]:
        """Frames of a video, and the transforms that are left to do.

        A crop that comes first, and once, is done while a picture is still in the cache.
        """
        crop = next(iter(self.transforms), None)
        if self.repeats > 1 or not isinstance(crop, RandomResizedCrop):
            return video.frames(indices), self.transforms
        pictures = crop.cut_each(video.pictures(indices), children[0])
        return stack(video.path, indices, pictures), self.transforms[1:]


@dataclass(frozen=True)
class EvalReader:
    """How a record becomes its test views.

    Attributes:
      num_frames: frames per view, T.
      image_size: height and width of the views in pixels.
      sampling: a key of `sampling.PROTOCOLS`.
      interval: spacing of frames where the sampling reads it; for 'interval' in frames of a 30 fps
        video, for others in frames of the file.
      num_clips: views along time.
      num_crops: 1 view or 3 of each clip.
      size, rounding, interpolation, layout: how they are cut, see `transforms.ViewCrops`.
      max_pixels: larger frames are refused.
      annotate: makes further keys of the batches.
      jpeg_decoder: of single pictures, one of `jpeg.DECODERS`.
    """

    num_frames: int
    image_size: int
    sampling: str = 'segment'
    interval: float = 1.0
    num_clips: int = 1
    num_crops: int = 1
    size: tuple[int, ...] = ()
    rounding: str = 'nearest'
    interpolation: str = 'bilinear'
    layout: str = 'ends'
    max_pixels: int = MAX_PIXELS
    annotate: Annotate | None = None
    jpeg_decoder: str = 'libjpeg'

    def __post_init__(self):
        _check_reader(self)
        self.cut()  # checks its fields

    def cut(self) -> ViewCrops:
        """What cuts the views of a frame."""
        return ViewCrops(
            self.image_size,
            self.num_crops,
            self.size,
            self.rounding,
            self.interpolation,
            self.layout,
        )

    @property
    def num_views(self) -> int:
        """Views of one video, V = num_clips * num_crops."""
        return self.num_clips * self.num_crops

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the views of one video, (V, T, H, W, 3)."""
        return (self.num_views, self.num_frames, self.image_size, self.image_size, 3)

    def read(self, record: Record) -> tuple[np.ndarray, Rows]:
        """Reads all views of one video; decodes every frame once.

        Args:
          record: what to read.

        Returns:
          video (V, T, H, W, 3) uint8 RGB, clips outside and crops inside, and the rows: `label`,
          int32, and those of `annotate`.

        Raises:
          DecodeError: if the video cannot be read.
        """
        with self.open(record) as video:
            views = self.take(video, *video.frame_range(record.start, record.end))
        return views, _rows(self.annotate, record, record.label)

    @contextmanager
    def open(self, record: Record) -> Iterator[OpenVideo]:
        """Opens a video as this reads it.

        Raises:
          DecodeError: if it cannot be read, also by the caller.
        """
        opened = functools.partial(open_video, record, self.max_pixels, self.jpeg_decoder)
        with reading(record.path), opened() as video:
            yield video

    def take(self, video: OpenVideo, first: int, total: int) -> np.ndarray:
        """All views, (V, T, H, W, 3) uint8 RGB, of frames `first` to `first + total - 1`.

        Raises:
          DecodeError: if they cannot be read.
        """
        cut = self.cut()
        indices = self._indices(total, video.fps)
        wanted, where = np.unique(first + indices, return_inverse=True)
        size = (self.image_size, self.image_size, 3)
        crops = np.empty((self.num_crops, len(wanted), *size), np.uint8)
        # Whole frames of all clips together may not fit into memory.
        for index, picture in video.pictures(wanted):
            crops[:, np.searchsorted(wanted, index)] = cut(picture[None])[:, 0]
        return self._views(crops, where.reshape(indices.shape))

    def views_of(self, frames: np.ndarray, fps: float = REFERENCE_FPS) -> np.ndarray:
        """The views of a video that is in memory.

        Args:
          frames: (N, H, W, 3) uint8 RGB, all frames of the video. T of them are taken for a clip,
            whatever the sampling.
          fps: frames a second.

        Returns:
          (V, T, H, W, 3) uint8 RGB, as `read`.

        Raises:
          ValueError: another shape or dtype, no frame, or an `fps` that is none.
        """
        frames = np.asarray(frames)
        if not isinstance(fps, numbers.Real) or not 0 < fps < np.inf:
            raise ValueError(f'fps={fps!r} must be frames a second, a number above 0')
        if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not frames.size:
            raise ValueError(
                f'frames are (N, H, W, 3) uint8 RGB, at least one; these are {frames.shape} '
                f'{frames.dtype}'
            )
        if len(frames) == self.num_frames:
            indices = np.tile(np.arange(self.num_frames), (self.num_clips, 1))
        else:
            indices = self._indices(len(frames), fps)
        wanted, where = np.unique(indices, return_inverse=True)
        return self._views(self.cut()(frames[wanted]), where.reshape(indices.shape))

    def _indices(self, total: int, fps: float) -> np.ndarray:
        """(clips, T) frames of a video of so many."""
        protocol = PROTOCOLS[self.sampling]
        return protocol.test(total, self.num_frames, self.num_clips, self.interval, fps)

    def _views(self, crops: np.ndarray, where: np.ndarray) -> np.ndarray:
        """(crops, frames, H, W, 3) and which frames (clips, T) -> (V, T, H, W, 3)."""
        return crops[:, where].swapaxes(0, 1).reshape(self.shape)


# Of a reader, what a file may say: the others are code, and a limit of this machine.
_PROTOCOL = tuple(
    field.name for field in fields(EvalReader) if field.name not in ('annotate', 'max_pixels')
)


def protocol_of(reader: EvalReader) -> dict[str, Any]:
    """JSON values from which `reader_of` makes the reader again."""
    return {name: getattr(reader, name) for name in _PROTOCOL} | {'size': list(reader.size)}


def reader_of(protocol: Any) -> EvalReader:
    """The reader of a file's `protocol_of`.

    Raises:
      ValueError: there is no such reader.
    """
    if not isinstance(protocol, dict) or not isinstance(protocol.get('size'), list):
        raise ValueError('it is no object, or has no list `size`')
    unknown = sorted(protocol.keys() - set(_PROTOCOL))
    if unknown:
        raise ValueError(f'no field of it is {unknown[0]!a}')
    try:
        return EvalReader(**{**protocol, 'size': tuple(protocol['size'])})
    except (TypeError, OverflowError) as error:
        raise ValueError(str(error)) from error


@functools.lru_cache(maxsize=2)  # this epoch and the one that batches are made ahead of
def epoch_order(seed: int, epoch: int, num_records: int) -> np.ndarray:
    """The order of records in an epoch, (num_records,) int64."""
    return np.random.default_rng([seed, epoch]).permutation(num_records)


def record_rng(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The random numbers of one record in one epoch."""
    return np.random.default_rng([seed, epoch, index])


@dataclass(frozen=True)
class _Part:
    """Positions of one host -> positions in the stream of all hosts."""

    first: int
    of_host: int
    of_step: int

    def __getitem__(self, position: int) -> int:
        step, slot = divmod(position, self.of_host)
        return self.first + step * self.of_step + slot


@dataclass(frozen=True)
class _TrainStream:
    """The elements of `train_batches`; goes to reader processes by pickle."""

    source: Source
    reader: TrainReader
    part: _Part
    seed: int
    shuffle: bool

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.reader.repeats, *self.reader.shape)

    def place(self, position: int) -> tuple[int, int]:
        num_records = len(self.source)
        epoch, index = divmod(self.part[position], num_records)
        if self.shuffle:
            index = int(epoch_order(self.seed, epoch, num_records)[index])
        return index, epoch

    def __call__(self, position: int, failure: tuple[str, str] | None = None) -> Element:
        index, epoch = self.place(position)

        def read(record: Record) -> tuple[list[np.ndarray], list[Rows]]:
            return self.reader.read(record, record_rng(self.seed, epoch, index))

        return _element(self, read, self.source[index], index, epoch, failure)


@dataclass(frozen=True)
class _EvalStream:
    """The elements of `eval_batches`; goes to reader processes by pickle."""

    source: Source
    reader: EvalReader
    part: _Part

    @property
    def shape(self) -> tuple[int, ...]:
        return (1, *self.reader.shape)

    def place(self, position: int) -> tuple[int, int]:
        index = self.part[position]
        return (index if index < len(self.source) else -1), 0

    def __call__(self, position: int, failure: tuple[str, str] | None = None) -> Element:
        index, _ = self.place(position)
        if index >= 0:
            return _element(self, self._read, self.source[index], index, 0, failure)
        return {
            'video': list(np.zeros(self.shape, np.uint8)),
            'rows': [_blank_rows(self.reader.annotate, self._no_label())],
            'mask': 0.0,
            'index': -1,
            'epoch': 0,
            'path': '',
            'error': '',
        }

    def _read(self, record: Record) -> tuple[list[np.ndarray], list[Rows]]:
        video, rows = self.reader.read(record)
        return [video], [rows]

    def _no_label(self) -> Label | np.ndarray:
        label = self.source[0].label
        return label if isinstance(label, frozenset) else np.zeros_like(label)


def _element(
    stream: _TrainStream | _EvalStream,
    read: Callable[[Record], tuple[list[np.ndarray], list[Rows]]],
    record: Record,
    index: int,
    epoch: int,
    failure: tuple[str, str] | None,
) -> Element:
    """What becomes of one record; of one that cannot be read, blank rows with its label."""
    element = {'index': index, 'epoch': epoch, 'path': record.path}
    try:
        if failure:
            raise DecodeError(record.path, *failure)
        videos, rows = read(record)
    except DecodeError as error:
        blank = _blank_rows(stream.reader.annotate, record.label)
        return element | {
            'video': list(np.zeros(stream.shape, np.uint8)),
            'rows': [blank] * stream.shape[0],
            'mask': 0.0,
            'error': f'{error.kind}: {error.reason}',
        }
    except Exception as error:
        error.add_note(f'while reading record {index}, {record.path}')
        raise
    for video in videos:
        if video.shape != stream.shape[1:]:
            raise ValueError(
                f'the transforms made a clip of shape {video.shape} from record {index}, '
                f'{record.path}, expected {stream.shape[1:]}; image_size of the reader and of its '
                'transforms must agree'
            )
    return element | {'video': videos, 'rows': rows, 'mask': 1.0, 'error': ''}


def _host_records(batch_size: int, host_count: int, repeats: int = 1) -> int:
    """Records of a batch that one host reads."""
    if batch_size < 1 or batch_size % (host_count * repeats):
        copies = f' times repeats={repeats}' if repeats > 1 else ''
        raise ValueError(
            f'batch_size={batch_size} (of all hosts together) is not a positive multiple of '
            f'host.count={host_count}{copies}'
        )
    return batch_size // host_count // repeats


def train_batches(
    source: Source,
    reader: TrainReader,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    num_steps: int,
    host: HostPart = HostPart(),
    readers: Readers = Readers(),
    skipped: Skipped | None = None,
    shuffle: bool = True,
) -> Batches:
    """Training batches of steps `start_step` to `num_steps - 1`, for one host.

    Batch k of all hosts together is positions k * R to (k + 1) * R - 1 of the stream, where R =
    batch_size / S records of S clips; host j takes the j-th contiguous part of it. Earlier steps
    cost nothing.

    Args:
      source: the records, N of them.
      reader: makes the clips, S of a record.
      batch_size: clips in a step over all hosts; b = batch_size / host.count come out here.
      seed: of order and augmentation, not negative.
      start_step: first step, from 0.
      num_steps: steps of the whole run, the earlier ones included.
      host: which part of a step comes out here.
      readers: who reads.
      skipped: records that are not read; those over which processes end are added.
      shuffle: False keeps the order of the list in every epoch.

    Returns:
      An iterator of dicts: video (b, T, H, W, 3) uint8 RGB; label (b,) int32, or (b, heads), but
      none of sets of classes; keys of the reader's `annotate`, (b, ...); mask (b,) float32, 0 for a
      video that cannot be read (it has its label, all else is zeros); index (b,) int64, number of
      the record; epoch (b,) int64; path (b,) str; error (b,) str, '' or 'kind: reason'. The S
      copies of a record are neighbours, in order.

    Raises:
      ValueError: if an argument is out of range.
    """
    of_host = _host_records(batch_size, host.count, reader.repeats)
    of_step = of_host * host.count
    if seed < 0 or start_step < 0:
        raise ValueError(f'seed={seed} and start_step={start_step} must not be negative')
    num_records = len(source)
    if not num_records:
        raise ValueError('the source has no records')

    part = _Part(start_step * of_step + host.index * of_host, of_host, of_step)
    return Batches(
        _TrainStream(source, reader, part, seed, shuffle),
        num_batches=max(num_steps - start_step, 0),
        batch_size=of_host,
        readers=readers,
        skipped=skipped,
    )


def eval_batches(
    source: Source,
    reader: EvalReader,
    *,
    batch_size: int,
    host: HostPart = HostPart(),
    readers: Readers = Readers(),
    skipped: Skipped | None = None,
) -> Batches:
    """Every record once, in order, all views of a video together, for one host.

    All hosts get the same number of batches; what is missing in the last one is padded.

    Args:
      source: the records.
      reader: makes the views.
      batch_size: videos in a step over all hosts; b = batch_size / host.count come out here.
      host: which part of a step comes out here.
      readers: who reads.
      skipped: records that are not read; those over which processes end are added.

    Returns:
      An iterator of dicts as from `train_batches`, with video (b, V, T, H, W, 3) uint8 RGB and
      epoch 0. Padding has mask 0, index -1 and error ''; a video that cannot be read has mask 0,
      its index, and its reason in error.

    Raises:
      ValueError: if an argument is out of range.
    """
    of_host = _host_records(batch_size, host.count)
    num_records = len(source)
    if not num_records:
        raise ValueError('the source has no records')

    part = _Part(host.index * of_host, of_host, batch_size)
    return Batches(
        _EvalStream(source, reader, part),
        num_batches=-(-num_records // batch_size),
        batch_size=of_host,
        readers=readers,
        skipped=skipped,
    )
