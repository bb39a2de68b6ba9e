"""JPEG pictures by libjpeg, with Pillow's pixels, in half of FFmpeg's time.

Image recipes were published on Pillow: its decoder is libjpeg-turbo, as OpenCV's, which gives the
same pixels faster. FFmpeg's differ where colours are stored at half of the resolution, as in most
files. `docs/guides/data.md` has both in figures.
"""

import os
from collections.abc import Iterator, Sequence

import cv2
import numpy as np

from input_pipeline import jpeg_markers
from input_pipeline.decode import (
    MAX_CACHED_BYTES,
    MAX_PIXELS,
    DecodeError,
    VideoReader,
    check_scans,
    check_size,
    open_steady,
    stack,
)
from input_pipeline.regular_files import SteadyFile, describe

# What decodes single pictures. Folders of frames are videos, with FFmpeg's pixels as when built.
DECODERS = ('libjpeg', 'ffmpeg')
FPS = 25.0  # FFmpeg's for a picture: draws are the same with either decoder


class JpegReader:
    """Reads one JPEG picture; stands where a `decode.VideoReader` does.

    Attributes:
      path: the file.
      num_frames: 1.
      fps: frames per second.
      duration: seconds.
      times: (1,) float64, 0: the start of the picture in seconds.
    """

    def __init__(self, content: bytes, frame: jpeg_markers.Frame, max_pixels: int, path: str):
        """Checks the picture; nothing is decoded yet.

        Args:
          content: of the file.
          frame: that `jpeg_markers.find_frame` found in it.
          max_pixels: largest height * width to accept.
          path: of the file, for messages.

        Raises:
          DecodeError: if it is too large.
        """
        check_size(path, frame.width, frame.height, max_pixels)
        check_scans(path, content)
        self.path = path
        self.num_frames = 1
        self.fps = FPS
        self.duration = 1 / FPS
        self.times = np.zeros(1)
        self._content = content
        self._frame = frame

    def __enter__(self) -> 'JpegReader':
        return self

    def __exit__(self, *unused) -> None:
        pass

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels of what `frames` returns; decodes the picture."""
        return self.frames([0]).shape[1:3]

    def frame_range(self, start: float | None, end: float | None) -> tuple[int, int]:
        """The first frame, and the number of frames, between two times in seconds.

        Raises:
          DecodeError: if there is no frame in it.
        """
        if (start or 0) > 0 or (end is not None and end <= 0):
            reason = f'no frame from {start} to {end} s, this is a picture'
            raise DecodeError(self.path, 'zero frames', reason)
        return 0, 1

    def frames(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """The picture as (T, height, width, 3) uint8 RGB, turned upright.

        Args:
          indices: (T,) zeros.

        Raises:
          DecodeError: if it does not decode, or all together are over `decode.MAX_CLIP_BYTES`.
          IndexError: if a number is not 0.
        """
        return stack(self.path, indices, self.pictures(indices))

    def pictures(self, indices: Sequence[int] | np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """Yields (0, (height, width, 3) uint8 RGB); raises as `frames` does."""
        wanted = np.asarray(indices, np.int64)
        if not wanted.size or wanted.any():
            raise IndexError(f'{self.path}: indices {indices} of a picture')
        # OpenCV turns it by its EXIF orientation.
        picture = cv2.imdecode(np.frombuffer(self._content, np.uint8), cv2.IMREAD_COLOR_RGB)
        if picture is None or sorted(picture.shape[:2]) != sorted(self._frame):
            raise DecodeError(self.path, 'corrupt', 'the JPEG does not decode')
        yield 0, picture


def open_file(
    source: str | os.PathLike | bytes,
    max_pixels: int = MAX_PIXELS,
    name: str = '<bytes>',
    jpeg_decoder: str = 'libjpeg',
) -> JpegReader | VideoReader:
    """Opens a video, or a picture as a video of one frame.

    Args:
      source: path, or the bytes of a file. The name does not matter, the content decides.
      max_pixels: largest height * width to accept; checked before anything is allocated.
      name: of bytes, for messages.
      jpeg_decoder: one of `DECODERS`. Unusual JPEG files (CMYK, 12 bits, arithmetic codes, several
        in one file) go through FFmpeg in any case.

    Raises:
      DecodeError: if it cannot be read.
    """
    if jpeg_decoder != 'libjpeg':
        return VideoReader(source, max_pixels, name)
    if isinstance(source, bytes):
        path, content = name, source
    else:
        path, file = os.fspath(source), open_steady(source)
        content = _jpeg_content(file, path)
        if not content:
            return VideoReader(file, max_pixels, path)
    frame = jpeg_markers.find_frame(content)
    if frame is None:
        return VideoReader(content, max_pixels, path)
    return JpegReader(content, frame, max_pixels, path)


def _jpeg_content(file: SteadyFile, path: str) -> bytes:
    """The content of a JPEG file, which is closed; b'' and the file at its start for any other."""
    try:
        jpeg = file.read(len(jpeg_markers.START)) == jpeg_markers.START
        if jpeg and file.seek(0, os.SEEK_END) <= MAX_CACHED_BYTES:
            with file:
                file.seek(0)
                return file.read()
        file.seek(0)
    except OSError as error:
        file.close()
        raise DecodeError(path, 'unreadable', describe(error)) from error
    return b''
