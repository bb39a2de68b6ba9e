"""From an encoded video and frame numbers to pixels, with FFmpeg.

A reader opens a file and runs through its packets once without decoding (about a millisecond for
ten seconds of video), or through the index of an mp4 file that says as much, which takes a tenth.
So it knows the exact number of frames and where the key frames are. `frames` then decodes no more
than it must: it jumps to a key frame when that is cheaper than running on, and leaves out frames
that nothing refers to. The pixels are those of decoding the whole file.
"""

import array
import io
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import BinaryIO, NamedTuple

import av
import numpy as np
from av.sidedata.sidedata import Type as SideDataType
from av.stream import Disposition
from av.video.reformatter import VideoReformatter
from PIL import ExifTags, Image

from input_pipeline import jpeg_markers
from input_pipeline.regular_files import NotRegularError, SteadyFile, describe

MAX_PIXELS = 4096 * 2304  # of one frame; 4K video passes
# Long side of a frame over its short side; the widest films have 4. A frame is resized by its short
# side: of this shape, and to 224 or 256 pixels, it has about as many pixels as one of Full HD.
MAX_ASPECT = 32
MAX_PACKETS = 2**20  # of a video: 4.8 hours at 60 frames per second
MAX_BOXES = 2**20  # of an mp4 file: 35 hours in fragments of a second
# Passes over the picture of a JPEG. Encoders make about ten; each takes time, even of few bytes.
MAX_SCANS = 100
MAX_CLIP_BYTES = 2 * 2**30  # of frames that are returned at once: 75 of 4096 x 2304
# What is kept of the packets in memory; streams with more are read again.
MAX_CACHED_BYTES = 64 * 2**20
MAX_CACHED_PACKETS = 2**16  # each takes about 0.9 KiB beside its bytes
KINDS = (
    'missing',
    'unreadable',
    'empty',
    'not a video',
    'no video stream',
    'zero frames',
    'truncated',
    'corrupt',
    'too large',
)
# Playlists, numbered images and text that FFmpeg would also open (and follow to other files) are
# out. A still JPEG or PNG is a video of one frame.
_FORMATS = (
    'mov,mp4,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,gif,ivf,mxf,rm,dv,'
    'h264,hevc,m4v,obu,av1,wtv,swf,nut,jpeg_pipe,png_pipe'
)
# VP8 hides reference frames in packets of their own: packets are not frames.
_COUNT_BY_DECODING = ('vp8',)
# Codecs of which one sample of an mp4 file is one packet and one frame.
_INDEXED = ('h264', 'mpeg4', 'mjpeg')
# Decoders in which leaving out frames that are never referred to was checked to be exact.
_SKIP_UNREFERENCED = ('h264',)
_STILL = (jpeg_markers.START, b'\x89PNG\r\n\x1a\n')
# Boxes of an mp4 file that lead to what tells kind and number of samples, and these.
_MP4_TO_SAMPLES = (b'moov', b'trak', b'mdia', b'minf', b'stbl', b'moof', b'traf')
_MP4_SAMPLES = (b'hdlr', b'stsz', b'stz2', b'trun')
_MP4_LOST = b''  # stands for what follows a box that cannot be
# With one of these, the index does not hold all packets, or not the times at which they are shown.
_MP4_BEYOND_INDEX = (b'moof', b'ctts', _MP4_LOST)
_MP4_CONTENT = (b'moov', b'mdat', b'moof')
# EXIF orientation -> a display matrix of the same effect, for `turn`; others are upright.
_EXIF_MATRIX = {
    2: (-1, 0, 0, 0, 1),
    3: (-1, 0, 0, 0, -1),
    4: (1, 0, 0, 0, -1),
    5: (0, 1, 0, 1, 0),
    6: (0, 1, 0, -1, 0),
    7: (0, -1, 0, -1, 0),
    8: (0, -1, 0, 1, 0),
}
# FFmpeg decodes a first frame or more to learn the format; what does not change that is left out.
_PROBING = {'skip_loop_filter': 'all', 'skip_idct': 'all'}
_PADDING = bytes(64)  # decoders read beyond a packet; PyAV does not copy what it makes one of
_NO_TIME = -(2**63)  # FFmpeg's own, of a packet without a time stamp
_PACKETS_AT_ONCE = 8  # that are read from a file whose index is known
_SEEK_COST = 2  # a jump costs about as much as decoding this many packets


class DecodeError(ValueError):
    """A video that cannot be read.

    Attributes:
      path: the file, or the name that was given to its bytes.
      kind: one of `KINDS`, to group by.
      reason: what was found, one line.
    """

    def __init__(self, path: str, kind: str, reason: str):
        super().__init__(path, kind, reason)
        self.path = path
        self.kind = kind
        self.reason = reason

    def __str__(self) -> str:
        return f'{self.path}: {self.kind}: {self.reason}'


class _Inexact(Exception):
    """A shortcut through the file did not lead to the frame that it should."""


def stack(
    path: str,
    indices: Sequence[int] | np.ndarray,
    pictures: Iterable[tuple[int, np.ndarray]],
) -> np.ndarray:
    """Frames of one size as one array.

    Args:
      path: of the video, for messages.
      indices: (T,) frame numbers, in any order, repeats allowed.
      pictures: (number, (height, width, 3) uint8 RGB) of each of them, at least once.

    Returns:
      (T, height, width, 3) uint8 RGB, C-contiguous, in the order of `indices`.

    Raises:
      DecodeError: if all together are over `MAX_CLIP_BYTES`.
    """
    indices = np.asarray(indices, np.int64).reshape(-1)
    video = None
    for index, picture in pictures:
        if video is None:
            if len(indices) * picture.nbytes > MAX_CLIP_BYTES:
                height, width, _ = picture.shape
                reason = f'{len(indices)} frames of {width} x {height} are over 2 GiB'
                raise DecodeError(path, 'too large', reason)
            video = np.empty((len(indices), *picture.shape), np.uint8)
        video[indices == index] = picture
    return video


def open_steady(path: str | os.PathLike) -> SteadyFile:
    """Opens a file; raises DecodeError if it cannot be opened or is no regular file."""
    name = os.fspath(path)
    try:
        return SteadyFile(path)
    except NotRegularError as error:
        raise DecodeError(name, 'not a video', str(error)) from error
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DecodeError(name, 'missing', 'no such file') from error
    except OSError as error:
        raise DecodeError(name, 'unreadable', describe(error)) from error
    except ValueError as error:  # a name that no file can have
        raise DecodeError(name, 'missing', str(error)) from error


def check_size(path: str, width: int, height: int, max_pixels: int) -> None:
    """Raises DecodeError for a frame that is too large or too long, before it is allocated."""
    if width * height > max_pixels:
        reason = f'{width} x {height} is over max_pixels={max_pixels}'
        raise DecodeError(path, 'too large', reason)
    if max(width, height) > MAX_ASPECT * min(width, height) > 0:
        reason = f'{width} x {height}: one side is over {MAX_ASPECT} times the other'
        raise DecodeError(path, 'too large', reason)


def check_scans(path: str, content: bytes) -> None:
    """Raises DecodeError for a JPEG of so many scans that it would hardly end."""
    if jpeg_markers.count_scans(content) > MAX_SCANS:
        raise DecodeError(path, 'too large', f'a JPEG of more than {MAX_SCANS} scans')


class _FailingAs:
    """What goes wrong inside becomes a DecodeError. Entered for every packet: no generator."""

    __slots__ = ('kind', 'reader')

    def __init__(self, reader: 'VideoReader', kind: str):
        self.reader, self.kind = reader, kind

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            self.reader._raise_as(self.kind, error)


class VideoReader:
    """One open video; use it as a context manager.

    Attributes:
      num_frames: exact number of frames that decoding the whole file gives.
      fps: mean frames per second, from the time stamps.
      duration: seconds, num_frames / fps.
      times: (num_frames,) float64, start of each frame in seconds after the first one.
    """

    def __init__(
        self,
        source: str | os.PathLike | bytes | SteadyFile,
        max_pixels: int = MAX_PIXELS,
        name: str = '<bytes>',
    ):
        """Opens a video and counts its frames.

        Args:
          source: path, the bytes of a file, or an open one, which is closed with this reader. The
            name does not matter, the content decides.
          max_pixels: largest height * width to accept; checked before anything is allocated.
          name: of bytes and open files, for messages.

        Raises:
          DecodeError: if it cannot be read.
        """
        self.path = name if isinstance(source, (bytes, SteadyFile)) else os.fspath(source)
        self._container = None
        self._file: SteadyFile | io.BytesIO | None = None
        self._packets = []
        self._reformatter = VideoReformatter()
        self._max_pixels = max_pixels
        self._has_index = False  # whether an index may tell all about the packets
        # Of the index: time, place, bytes, whether it is a key frame, whether it is discarded.
        self._rows: np.ndarray | None = None
        self._turned: bool | None = None  # whether a frame has a display matrix; not known yet
        try:
            self._open(source, max_pixels)
            self._read_packets()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> 'VideoReader':
        return self

    def __exit__(self, *unused) -> None:
        self.close()

    def close(self) -> None:
        """Frees the file and the packets."""
        self._packets = []
        if self._container is not None:
            self._container.close()
            self._container = None
        if self._file is not None:
            self._file.close()
            self._file = None

    def _error(self, kind: str, reason: str) -> DecodeError:
        return DecodeError(self.path, kind, reason)

    def _failing_as(self, kind: str) -> '_FailingAs':
        return _FailingAs(self, kind)

    def _raise_as(self, kind: str, error: BaseException) -> None:
        if isinstance(error, DecodeError):
            return
        if isinstance(error, av.FFmpegError):
            self._check_file()
            raise self._error(kind, error.strerror or type(error).__name__) from error
        if isinstance(error, OSError):
            raise self._error('unreadable', describe(error)) from error
        if isinstance(error, (IndexError, ValueError, OverflowError, MemoryError)):
            raise self._error(kind, f'{type(error).__name__}: {error}') from error

    def _check_file(self) -> None:
        """Raises what ended the reading of the file; FFmpeg may call it damage or the end."""
        error = getattr(self._file, 'error', None)
        if error is not None:
            raise self._error('unreadable', describe(error)) from error

    def _open(self, source: str | os.PathLike | bytes | SteadyFile, max_pixels: int) -> None:
        if isinstance(source, bytes):
            file = io.BytesIO(source)
        else:
            file = source if isinstance(source, SteadyFile) else open_steady(source)
        self._file = file
        with self._failing_as('unreadable'):
            head = file.read(64)
            num_bytes = self._num_bytes = file.seek(0, os.SEEK_END)
            if not num_bytes:
                raise self._error('empty', 'the file has 0 bytes')
            declared = _declared_bytes(file, head, num_bytes)
            if declared > num_bytes:
                raise self._error('truncated', f'{num_bytes} of {declared} bytes are there')
            self._check_samples(file, head, num_bytes)
            file.seek(0)
            if head.startswith(_STILL) and num_bytes <= MAX_CACHED_BYTES:
                content = file.read()
                if head.startswith(jpeg_markers.START):
                    if not jpeg_markers.has_end(content):
                        raise self._error('truncated', 'a JPEG without its end marker')
                    check_scans(self.path, content)
                file.close()
                # FFmpeg takes the name of an image for a pattern of names: one without a name.
                self._file = file = io.BytesIO(content)
        try:
            self._container = _open_container(file, max_pixels)
        except (av.FFmpegError, ValueError, OSError) as error:
            self._check_file()
            if _starts_like_video(head):
                reason = 'starts as a video but its header or index is incomplete'
                raise self._error('truncated', reason) from error
            raise self._error('not a video', f'starts with {head[:12]!r}') from error
        streams = [
            stream
            for stream in self._container.streams.video
            if not stream.disposition & Disposition.attached_pic
        ]
        if not streams:
            kinds = sorted({stream.type for stream in self._container.streams})
            raise self._error('no video stream', f'streams found: {", ".join(kinds) or "none"}')
        self._stream = streams[0]
        context = self._stream.codec_context
        if context is None:
            raise self._error('corrupt', 'no decoder for the video stream')
        with self._failing_as('corrupt'):
            check_size(self.path, context.width, context.height, max_pixels)
            context.options = {'max_pixels': str(max_pixels)}  # also for sizes inside the stream
            context.thread_type = 'NONE'  # readers run in threads; one more level would not help
            context.thread_count = 1

    def _check_samples(self, file: BinaryIO, head: bytes, num_bytes: int) -> None:
        """Looks at what an mp4 file declares before FFmpeg makes a table of it."""
        if head[4:8] not in (b'ftyp', b'moov', b'mdat', b'free', b'wide', b'skip'):
            return
        self._has_index = True
        for samples in _declared_samples(self._counted(_boxes(file, 0, num_bytes))):
            if max(samples.size, 1) * samples.count > num_bytes:
                reason = f'declares {samples.count} samples in {num_bytes} bytes'
                raise self._error('corrupt', reason)
            if samples.handler != b'soun':  # samples of sound may be single numbers
                self._check_packets(samples.count)

    def _counted(self, boxes: Iterator[tuple[bytes, bytes]]) -> Iterator[tuple[bytes, bytes]]:
        for count, box in enumerate(boxes):
            if count == MAX_BOXES:
                raise self._error('too large', f'more than {MAX_BOXES} boxes')
            self._has_index = self._has_index and box[0] not in _MP4_BEYOND_INDEX
            yield box

    def _check_packets(self, count: int) -> None:
        if count > MAX_PACKETS:
            raise self._error('too large', f'more than {MAX_PACKETS} packets')

    def _read_packets(self) -> None:
        """Runs through the packets: the frames in order of time, the key frames, the packets."""
        self._check_packets(self._stream.frames)
        indexed = self._read_index()
        if indexed is None:
            keys, shown = self._walk()
        else:
            keys, shown = indexed, range(self._num_packets)
        if not len(shown):
            raise self._error('zero frames', 'the video stream has no packets')
        self._key_packets = np.array(keys)
        self._key_pts = self._pts[self._key_packets]
        frame_pts = np.sort(self._pts[np.array(shown)])
        distinct = (frame_pts[1:] > frame_pts[:-1]).all()
        context = self._stream.codec_context
        by_decoding = context.name in _COUNT_BY_DECODING or (
            # AVI stores no presentation times; for reordered H.264 FFmpeg's guesses are wrong.
            self._container.format.name == 'avi'
            and context.has_b_frames
            and context.name != 'mpeg4'
        )
        if by_decoding or frame_pts[0] == _NO_TIME or not distinct or not len(keys):
            # Time stamps do not tell the frames apart: number them as they come out.
            self._frame_pts = None
            stamps = [f.pts if f.pts is not None else f.dts for f in self._decode_all()]
            if not stamps:
                raise self._error('corrupt', 'no frame decodes')
            usable = None not in stamps and all(a < b for a, b in itertools.pairwise(stamps))
            self._set_times(stamps if usable else None, len(stamps))
        else:
            # Frames before the first key frame have nothing to be decoded from.
            self._frame_pts = frame_pts[frame_pts >= self._key_pts[0]]
            if not len(self._frame_pts):
                raise self._error('zero frames', 'no frame at or after the first key frame')
            self._set_times(self._frame_pts, len(self._frame_pts))

    def _walk(self) -> tuple[Sequence[int], Sequence[int]]:
        """Reads all packets; returns the numbers of key frames, and of frames that are shown."""
        packets: list[av.Packet] = []
        cached, pts, dts = 0, array.array('q'), array.array('q')
        keys, shown = array.array('q'), array.array('q')
        with self._failing_as('truncated'):
            for packet in self._container.demux(self._stream):
                if not packet.size:
                    continue
                if packet.is_corrupt:
                    raise self._error('truncated', f'packet {len(pts)} is cut off')
                pts.append(_NO_TIME if packet.pts is None else packet.pts)
                dts.append(_NO_TIME if packet.dts is None else packet.dts)
                self._check_packets(len(pts))
                if packet.is_keyframe and packet.pts is not None:
                    keys.append(len(pts) - 1)
                if not packet.is_discard:
                    shown.append(len(pts) - 1)
                cached += packet.size
                if cached <= MAX_CACHED_BYTES and len(pts) <= MAX_CACHED_PACKETS:
                    packets.append(packet)
                else:
                    packets.clear()
        self._check_file()
        self._num_packets = len(pts)
        self._packets = packets
        self._pts, self._dts = np.array(pts), np.array(dts)
        return keys, shown

    def _read_index(self) -> np.ndarray | None:
        """Numbers of the key frames by the index; None where only the packets themselves tell.

        Samples that the index puts outside of the file, that are empty or not shown, and frames in
        another order than their packets, are left to `_walk`.
        """
        context = self._stream.codec_context
        if not self._has_index or context.has_b_frames or context.name not in _INDEXED:
            return None
        # Numbers alone: objects that stay would have the garbage collector run.
        fields = (
            (entry.timestamp, entry.pos, entry.size, entry.is_keyframe, entry.is_discard)
            for entry in self._stream.index_entries
        )
        rows = np.fromiter(itertools.chain.from_iterable(fields), np.int64).reshape(-1, 5)
        stamps, places, sizes, keys, discarded = rows.T
        if not len(rows) or not sizes.all() or discarded.any():
            return None
        if places.min() < 0 or (places + sizes).max() > self._num_bytes:
            return None
        self._num_packets = len(rows)
        self._rows = rows
        self._pts = self._dts = stamps.copy()
        return np.flatnonzero(keys)

    def _set_times(self, stamps: Sequence[int] | None, num_frames: int) -> None:
        self.num_frames = num_frames
        rate = float(self._stream.average_rate or 0) or 30.0
        if stamps is None:
            self.times = np.arange(num_frames) / rate
        else:
            unit = self._stream.time_base  # not as a float: equal times are equal in any unit
            ticks = (np.asarray(stamps) - stamps[0]) * unit.numerator
            self.times = ticks / unit.denominator
        span = float(self.times[-1])
        self.fps = (num_frames - 1) / span if span > 0 else rate
        self.duration = num_frames / self.fps

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels of what `frames` returns, after rotation; decodes a frame."""
        return self.frames([0]).shape[1:3]

    @property
    def rotation(self) -> int:
        """Degrees counter-clockwise by which frames are turned: 0, 90, 180 or 270."""
        _, frame = next(self._pick(np.zeros(1, np.int64), shortcuts=False))
        return round(frame.rotation / 90) * 90 % 360

    def display_matrix(self, decoded: av.VideoFrame) -> tuple[int, ...] | None:
        """How a frame of this video is to be turned, for `turn`; None for a frame that is upright.

        Frames that no container turned are not looked at closely: PyAV ties a frame whose side data
        is read to itself, and its memory would wait for the garbage collector.
        """
        if self._turned is False and not decoded.rotation:
            return None
        try:
            matrix = decoded.side_data.get(SideDataType.DISPLAYMATRIX)
        except ValueError:  # of an enumeration of PyAV that lacks EXIF
            return self._exif_matrix()
        self._turned = self._turned or matrix is not None
        return None if matrix is None else tuple(np.frombuffer(matrix, np.int32)[:5].tolist())

    def _exif_matrix(self) -> tuple[int, ...] | None:
        """What the EXIF orientation of a picture stands for."""
        self._file.seek(0)
        try:
            with Image.open(self._file) as picture:
                orientation = picture.getexif().get(ExifTags.Base.Orientation, 1)
        except Exception as error:  # Pillow raises what it likes
            raise self._error('corrupt', f'EXIF: {error}') from error
        return _EXIF_MATRIX.get(orientation)

    def frame_range(self, start: float | None, end: float | None) -> tuple[int, int]:
        """The part of the video between two times.

        Args:
          start: seconds after the first frame; None means the beginning.
          end: seconds, not included; None means the end.

        Returns:
          The first frame of the part, and its number of frames.

        Raises:
          DecodeError: if there is no frame in it.
        """
        first = 0 if start is None else int(np.searchsorted(self.times, start))
        stop = self.num_frames if end is None else int(np.searchsorted(self.times, end))
        if stop <= first:
            reason = f'no frame from {start} to {end} s, the video lasts {self.duration:.2f} s'
            raise self._error('zero frames', reason)
        return first, stop - first

    def frames(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Decodes the frames asked for and no more than is needed for them.

        Args:
          indices: (T,) frame numbers in [0, num_frames), in any order, repeats allowed.

        Returns:
          (T, height, width, 3) uint8 RGB, C-contiguous, turned upright.

        Raises:
          DecodeError: if a frame does not decode, or all together are over `MAX_CLIP_BYTES`.
          IndexError: if a number is out of range.
        """
        return stack(self.path, indices, self.pictures(indices))

    def pictures(self, indices: Sequence[int] | np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """The frames of `frames` one after another, so that not all are in memory at once.

        Args:
          indices: (T,) frame numbers in [0, num_frames), in any order.

        Yields:
          (number, (height, width, 3) uint8 RGB) of every frame asked for, once for a repeated
          number. If a shortcut through the file fails, the pictures start again: the last of a
          number counts. A picture may share memory with the next one.

        Raises:
          DecodeError: if a frame does not decode.
          IndexError: if a number is out of range.
        """
        indices = np.asarray(indices, np.int64).reshape(-1)
        if not len(indices) or indices.min() < 0 or indices.max() >= self.num_frames:
            raise IndexError(f'{self.path}: indices {indices} outside 0 to {self.num_frames - 1}')
        wanted = np.unique(indices)
        try:
            yield from self._pictures(wanted, shortcuts=True)
        except _Inexact:
            yield from self._pictures(wanted, shortcuts=False)

    def decoded(self, first: int = 0, count: int | None = None) -> Iterator[av.VideoFrame]:
        """Frames one after the other as the decoder gives them: neither RGB nor turned upright.

        Args:
          first: number of the first frame.
          count: how many; None means all that follow.

        Yields:
          The frames in order of time.

        Raises:
          DecodeError: if a frame does not decode.
        """
        wanted = np.arange(first, self.num_frames if count is None else first + count)
        done = 0
        for shortcuts in (True, False):
            try:
                for _, frame in self._pick(wanted[done:], shortcuts):
                    done += 1
                    yield frame
            except _Inexact:
                pass
            if done == len(wanted):
                return
        raise self._error('corrupt', f'{len(wanted) - done} of {len(wanted)} frames do not decode')

    def _pictures(self, wanted: np.ndarray, shortcuts: bool) -> Iterator[tuple[int, np.ndarray]]:
        shape, count = None, 0
        for index, frame in self._pick(wanted, shortcuts):
            check_size(self.path, frame.width, frame.height, self._max_pixels)
            with self._failing_as('corrupt'):
                picture = self._reformatter.reformat(frame, format='rgb24', threads=1)
                picture = turn(_pixels(picture), self.display_matrix(frame))
            shape = shape or picture.shape
            if picture.shape != shape:
                reason = f'frame {index} has shape {picture.shape}, others {shape}'
                raise self._error('corrupt', reason)
            yield index, picture
            count += 1
        if count < len(wanted):
            if shortcuts:
                raise _Inexact
            reason = f'{len(wanted) - count} of {len(wanted)} frames do not decode'
            raise self._error('corrupt', reason)

    def _pick(self, wanted: np.ndarray, shortcuts: bool) -> Iterator[tuple[int, av.VideoFrame]]:
        """Yields (index, frame) for sorted unique indices.

        With `shortcuts` it may jump to key frames and leave out unreferenced frames.
        """
        if self._frame_pts is None:
            last, chosen = wanted[-1], set(wanted.tolist())
            for index, frame in enumerate(self._decode_all()):
                if index in chosen:
                    yield index, frame
                if index == last:
                    return
            return
        context = self._stream.codec_context
        pts = self._frame_pts[wanted]
        left = dict(zip(pts.tolist(), wanted.tolist()))  # in order of time
        # The last key frame at or before each wanted frame: a number in self._key_packets.
        entries = np.searchsorted(self._key_pts, pts, side='right') - 1
        entry_of = dict(zip(left, entries.tolist()))
        skipping, lean = shortcuts and context.name in _SKIP_UNREFERENCED, False
        context.skip_frame = 'DEFAULT'
        position = -1  # number of the next packet; -1: not started
        while left:
            entry = entry_of[next(iter(left))] if shortcuts else 0
            start = int(self._key_packets[entry])
            arrival = int(self._key_pts[entry]) if entry else None  # check what a jump leads to
            context.flush_buffers()
            for position, packet in self._feed(start):
                if skipping:
                    needed = packet is None or packet.is_keyframe or packet.pts in left
                    if needed == lean:
                        context.skip_frame = 'DEFAULT' if needed else 'NONREF'
                        lean = not needed
                with self._failing_as('corrupt'):
                    frames = context.decode(packet)
                for frame in frames:
                    if frame.pts == arrival and frame.pict_type != av.video.frame.PictureType.I:
                        raise _Inexact  # refreshed by parts: what follows is not complete yet
                    index = left.pop(frame.pts, None)
                    if index is not None:
                        yield index, frame
                if not left:
                    break
                ahead = self._key_packets[entry_of[next(iter(left))]] - position
                if shortcuts and ahead > _SEEK_COST:
                    break
            else:
                return  # all packets are through; what is left does not decode

    def _decode_all(self) -> Iterator[av.VideoFrame]:
        self._stream.codec_context.flush_buffers()
        self._stream.codec_context.skip_frame = 'DEFAULT'
        for _, packet in self._feed(0):
            with self._failing_as('corrupt'):
                frames = self._stream.codec_context.decode(packet)
            yield from frames

    def _feed(self, first: int) -> Iterator[tuple[int, av.Packet | None]]:
        """Yields (number, packet) from packet `first` on, then (number of packets, None)."""
        if self._packets:
            yield from enumerate(self._packets[first:], first)
        elif self._rows is not None:
            yield from self._feed_by_index(first)
        else:
            yield from self._feed_from_file(first)
        yield self._num_packets, None

    def _feed_by_index(self, first: int) -> Iterator[tuple[int, av.Packet]]:
        time_base = self._stream.time_base
        for start in range(first, self._num_packets, _PACKETS_AT_ONCE):
            rows = self._rows[start : start + _PACKETS_AT_ONCE].tolist()
            contents = self._read_samples(rows)
            for number, (stamp, _, size, is_key, _), content in zip(
                itertools.count(start), rows, contents
            ):
                if len(content) < size:
                    raise self._error('truncated', f'packet {number} is cut off')
                packet = av.Packet(memoryview(content + _PADDING)[:size])
                packet.pts = packet.dts = stamp
                packet.time_base = time_base
                packet.is_keyframe = bool(is_key)
                yield number, packet

    def _read_samples(self, rows: list[list[int]]) -> list[bytes]:
        """Bytes of samples of the index; in one go where they lie together, as they mostly do."""
        begin = min(place for _, place, *_ in rows)
        length = max(place + size for _, place, size, *_ in rows) - begin
        with self._failing_as('corrupt'):
            if length > 2 * sum(size for _, _, size, *_ in rows):
                return [self._read_at(place, size) for _, place, size, *_ in rows]
            block = self._read_at(begin, length)
        return [block[place - begin : place - begin + size] for _, place, size, *_ in rows]

    def _read_at(self, place: int, size: int) -> bytes:
        self._file.seek(place)
        return self._file.read(size)

    def _feed_from_file(self, first: int) -> Iterator[tuple[int, av.Packet]]:
        for start in (first, 0):
            number = None
            with self._failing_as('corrupt'):
                stamps = (self._dts[start].item(), self._pts[start].item())
                offset = next((stamp for stamp in stamps if stamp != _NO_TIME), 0)
                self._container.seek(offset, stream=self._stream)
                for packet in self._container.demux(self._stream):
                    if not packet.size:
                        continue
                    if number is None:
                        number = self._number(packet)
                        if number is None or number > first:
                            break  # landed behind the target: no index; read from the start
                    if number >= first:
                        yield number, packet
                    number += 1
                else:
                    self._check_file()
                    return
        self._check_file()
        raise self._error('corrupt', 'the file is not seekable')

    def _number(self, packet: av.Packet) -> int | None:
        pts, dts = (_NO_TIME if stamp is None else stamp for stamp in (packet.pts, packet.dts))
        found = np.flatnonzero((self._pts == pts) & (self._dts == dts))
        return found[-1].item() if len(found) else None


def _starts_like_video(head: bytes) -> bool:
    """Whether the first bytes are those of an mp4, Matroska or AVI file."""
    avi = head[:4] == b'RIFF' and head[8:11] == b'AVI'
    return avi or head[:4] == b'\x1aE\xdf\xa3' or head[4:8] in (b'ftyp', b'moov', b'mdat')


def _declared_bytes(file: BinaryIO, head: bytes, num_bytes: int) -> int:
    """Size that the headers of an mp4, AVI or Matroska file state; 0 if they state none.

    FFmpeg reads the part that is there of many such files without a word.
    """
    if head[:4] == b'RIFF' and head[8:11] == b'AVI':
        size = int.from_bytes(head[4:8], 'little')
        return size + 8 if size < 2**32 - 1 else 0
    if head[:4] == b'\x1aE\xdf\xa3':
        segment = head.find(b'\x18\x53\x80\x67') + 4  # Matroska: one element holds all the rest
        if segment < 4 or len(head) < segment + 8:
            return 0
        length = 9 - head[segment].bit_length()  # bytes of the number, by its leading zero bits
        size = int.from_bytes(head[segment : segment + length], 'big') - (1 << 7 * length)
        return segment + length + size if 0 <= size < (1 << 7 * length) - 1 else 0
    position = 0
    if head[4:8] == b'ftyp':
        for _ in range(MAX_BOXES):  # from box to box: each states its size
            if position >= num_bytes:
                break
            file.seek(position)
            box = file.read(16)
            size = int.from_bytes(box[:4], 'big')
            if size == 1:
                size = int.from_bytes(box[8:16], 'big')
            if size < 8 or (position + size > num_bytes and box[4:8] not in _MP4_CONTENT):
                return 0  # the last box goes on to the end, or something else follows
            position += size
    return position


class _Samples(NamedTuple):
    """What a track or fragment of an mp4 file declares: samples, and bytes of each (0: differ)."""

    handler: bytes
    size: int
    count: int


def _declared_samples(boxes: Iterator[tuple[bytes, bytes]]) -> Iterator[_Samples]:
    """The samples that the boxes of an mp4 file declare, as far as they can be read."""
    handler = b''
    for name, content in boxes:
        if name not in _MP4_SAMPLES:
            continue
        number = [int.from_bytes(content[k : k + 4], 'big') for k in (4, 8)]
        if name == b'hdlr':
            # QuickTime has a second one, which says where the data lie.
            handler = handler if content[4:8] == b'dhlr' else content[8:12]
        elif name == b'trun':
            yield _Samples(b'', 0, number[0])
        else:
            yield _Samples(handler, number[0] if name == b'stsz' else 0, number[1])


def _boxes(file: BinaryIO, start: int, end: int, depth: int = 0) -> Iterator[tuple[bytes, bytes]]:
    """Yields (name, first bytes) of boxes, in order; goes into those of `_MP4_TO_SAMPLES`.

    The name `_MP4_LOST` ends a part that cannot be read to its end.
    """
    while start + 8 <= end:
        file.seek(start)
        box = file.read(28)
        name, size, head = box[4:8], int.from_bytes(box[:4], 'big'), 8
        if size == 1:
            size, head = int.from_bytes(box[8:16], 'big'), 16
        if size == 0:
            size = end - start
        if size < head:
            yield _MP4_LOST, b''
            return
        yield name, box[head:]
        if name in _MP4_TO_SAMPLES and depth < len(_MP4_TO_SAMPLES):
            yield from _boxes(file, start + head, min(start + size, end), depth + 1)
        start += size


def _open_container(file: SteadyFile | io.BytesIO, max_pixels: int) -> av.container.InputContainer:
    options = {'format_whitelist': _FORMATS}
    probing = _PROBING | {'max_pixels': str(max_pixels)}
    try:
        return av.open(file, options=options, stream_options=[probing] * 16)
    except ValueError as error:
        # Formats without a list of streams (MPEG program streams) take no stream options.
        if isinstance(error, av.FFmpegError):
            raise
        file.seek(0)
        return av.open(file, options=options)


def _pixels(picture: av.VideoFrame) -> np.ndarray:
    """(h, w, 3) uint8 of an RGB frame."""
    plane = picture.planes[0]
    rows = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[: picture.height]
    return rows[:, : picture.width * 3].reshape(picture.height, picture.width, 3)


def turn(pixels: np.ndarray, matrix: tuple[int, ...] | None) -> np.ndarray:
    """Turns an image upright.

    Args:
      pixels: (h, w, ...) made of a frame, or one plane of it.
      matrix: its `VideoReader.display_matrix`.

    Returns:
      A view, (h, w, ...) or (w, h, ...); `pixels` itself where nothing is to be turned.
    """
    if matrix is None:
        return pixels
    # x' = a x + c y, y' = b x + d y; rounded to the nearest of the eight exact positions.
    a, b, _, c, d = matrix
    if abs(b) + abs(c) > abs(a) + abs(d):
        pixels = pixels.swapaxes(0, 1)
        flip_x, flip_y = c < 0, b < 0
    else:
        flip_x, flip_y = a < 0, d < 0
    if flip_y or flip_x:
        pixels = pixels[:: -1 if flip_y else 1, :: -1 if flip_x else 1]
    return pixels
