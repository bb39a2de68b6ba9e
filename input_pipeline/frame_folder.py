"""A video that lies as a folder of numbered pictures, as Something-Something V1 is given out."""

import os
import re
from collections.abc import Iterator, Sequence

import numpy as np

from input_pipeline.decode import DecodeError, VideoReader, stack
from input_pipeline.label_maps import is_hidden
from input_pipeline.list_formats import IMAGE_SUFFIXES
from input_pipeline.sampling import REFERENCE_FPS

MAX_FRAMES = 100_000  # over an hour of video


class FrameFolder:
    """Reads clips from a folder of pictures; stands where a `decode.VideoReader` does.

    Only the pictures that are asked for are opened. Nothing says how fast they follow each other:
    they count as `sampling.REFERENCE_FPS` a second, so that a spacing in frames is one in pictures,
    and a part from second to second is refused.

    Attributes:
      path: the folder.
      num_frames: pictures in it.
      fps: frames per second.
      duration: seconds.
      times: (num_frames,) float64, start of each frame in seconds after the first one.
    """

    def __init__(self, path: str | os.PathLike, max_pixels: int):
        """Lists the pictures, in the order of the last number in their names.

        Args:
          path: the folder; files that are no pictures are passed over.
          max_pixels: largest height * width of a picture to accept.

        Raises:
          DecodeError: if it cannot be read, has no pictures, too many, or two of one number.
        """
        self.path = os.fspath(path)
        self._max_pixels = max_pixels
        self._files = self._find()
        self.num_frames = len(self._files)
        self.fps = float(REFERENCE_FPS)
        self.duration = self.num_frames / self.fps
        self.times = np.arange(self.num_frames) / self.fps

    def __enter__(self) -> 'FrameFolder':
        return self

    def __exit__(self, *unused) -> None:
        pass

    def close(self) -> None:
        """Nothing stays open."""

    def _find(self) -> list[str]:
        found: dict[int, str] = {}
        try:
            with os.scandir(self.path) as entries:
                for entry in entries:
                    stem, suffix = os.path.splitext(entry.name)
                    if suffix.lower() not in IMAGE_SUFFIXES or is_hidden(entry.name):
                        continue
                    digits = re.findall('[0-9]+', stem)
                    if not digits or len(digits[-1]) > 18:
                        reason = f'a folder of pictures, and {entry.name!r} has no number'
                        raise DecodeError(self.path, 'not a video', reason)
                    number = int(digits[-1])
                    if number in found:
                        reason = f'{found[number]!r} and {entry.name!r} have the same number'
                        raise DecodeError(self.path, 'corrupt', reason)
                    if len(found) == MAX_FRAMES:
                        reason = f'a folder of more than {MAX_FRAMES} pictures'
                        raise DecodeError(self.path, 'too large', reason)
                    found[number] = entry.name
        except OSError as error:
            raise DecodeError(self.path, 'unreadable', str(error)) from error
        if not found:
            raise DecodeError(self.path, 'not a video', 'a folder without JPEG or PNG pictures')
        return [os.path.join(self.path, found[number]) for number in sorted(found)]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels; decodes a picture."""
        return self.frames([0]).shape[1:3]

    def frame_range(self, start: float | None, end: float | None) -> tuple[int, int]:
        """The first frame, and the number of frames.

        Raises:
          DecodeError: if a part in seconds is asked for.
        """
        if (start, end) != (None, None):
            reason = f'a folder of pictures has no times, and {start} to {end} s were asked for'
            raise DecodeError(self.path, 'not a video', reason)
        return 0, self.num_frames

    def frames(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Decodes the frames asked for.

        Args:
          indices: (T,) frame numbers in [0, num_frames), in any order, repeats allowed.

        Returns:
          (T, height, width, 3) uint8 RGB, C-contiguous, turned upright.

        Raises:
          DecodeError: if a picture does not decode or has another size than the others, or all
            together are over `decode.MAX_CLIP_BYTES`.
          IndexError: if a number is out of range.
        """
        return stack(self.path, indices, self.pictures(indices))

    def pictures(self, indices: Sequence[int] | np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """The frames of `frames` one after another, so that not all are in memory at once.

        Args:
          indices: (T,) frame numbers in [0, num_frames), in any order.

        Yields:
          (number, (height, width, 3) uint8 RGB) of every frame asked for, in order, once for a
          repeated number.

        Raises:
          DecodeError: if a picture does not decode or has another size than the others.
          IndexError: if a number is out of range.
        """
        wanted = np.unique(np.asarray(indices, np.int64))
        if not len(wanted) or wanted[0] < 0 or wanted[-1] >= self.num_frames:
            raise IndexError(f'{self.path}: indices {indices} outside 0 to {self.num_frames - 1}')
        shape = None
        for index in wanted:
            with VideoReader(self._files[index], self._max_pixels) as picture:
                (pixels,) = picture.frames([0])
            if pixels.shape != (shape or pixels.shape):
                reason = f'{self._files[index]} has shape {pixels.shape}, others {shape}'
                raise DecodeError(self.path, 'corrupt', reason)
            shape = pixels.shape
            yield int(index), pixels
