"""Finds videos in folders and tar files by the names that lists give them, and reads them."""

import os
import tarfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from etils import epath

from input_pipeline.decode import DecodeError
from input_pipeline.encode import join_jpegs
from input_pipeline.list_formats import IMAGE_SUFFIXES
from input_pipeline.regular_files import SteadyFile, describe, open_regular, read_regular


class AmbiguousName(ValueError):
    """More than one video has the name."""


@dataclass(frozen=True)
class VideoFile:
    """Where a video lies.

    Attributes:
      path: a file, a folder of frames, or a tar file.
      parts: (offset, size) in the tar file: one of a video, one per frame of a folder of frames.
      frames: whether it is a folder of frames.
    """

    path: str
    parts: tuple[tuple[int, int], ...] = ()
    frames: bool = False

    def open(self, frame_rate: float) -> str | bytes:
        """What `VideoReader` can read: the path where there is a file, else bytes.

        Args:
          frame_rate: frames per second of a folder of frames.

        Raises:
          DecodeError: if it cannot be read.
        """
        try:
            if not self.frames:
                if '://' in self.path:
                    return epath.Path(self.path).read_bytes()
                return self._read_parts()[0] if self.parts else self.path
            return join_jpegs(self._read_parts() if self.parts else self._read_frames(), frame_rate)
        except DecodeError:
            raise
        except OSError as error:
            raise DecodeError(self.path, 'unreadable', describe(error)) from error
        except ValueError as error:
            raise DecodeError(self.path, 'unreadable', str(error)) from error

    def read(self, frame_rate: float) -> bytes:
        """The bytes of a video file; arguments and errors as of `open`."""
        source = self.open(frame_rate)
        if isinstance(source, bytes):
            return source
        try:
            return read_regular(source)
        except OSError as error:
            raise DecodeError(source, 'unreadable', describe(error)) from error

    def _read_parts(self) -> list[bytes]:
        with SteadyFile(self.path) as file:
            contents = []
            for offset, size in self.parts:
                file.seek(offset)
                contents.append(file.read(size))
        return contents

    def _read_frames(self) -> list[bytes]:
        files = [file for file in epath.Path(self.path).iterdir() if _is_frame(file.name)]
        in_bucket = '://' in self.path
        return [file.read_bytes() if in_bucket else read_regular(file) for file in sorted(files)]


def _is_frame(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES)


class VideoFiles:
    """Videos in several places; the first place that has a name wins."""

    def __init__(self, places: Sequence[str | os.PathLike]):
        """Opens folders and tar files.

        Args:
          places: folders with videos in any depth, or with tar files; tar files; folders in a
            bucket.

        Raises:
          ValueError: if a place is not there or a tar file is damaged or compressed.
        """
        self._places: list[_Folder | _Tar | _Bucket] = []
        for place in places:
            if '://' in os.fspath(place):
                self._places.append(_Bucket(os.fspath(place)))
                continue
            place = Path(place)
            if place.is_dir():
                self._places += [_Tar(file) for file in sorted(place.glob('*.tar'))]
                self._places.append(_Folder(place))
            elif place.is_file():
                self._places.append(_Tar(place))
            else:
                raise ValueError(f'{place}: no such folder or tar file of videos')

    def find(self, name: str) -> VideoFile | None:
        """The video of a name.

        Args:
          name: path from a place, or the end of one: 'b/c.mp4' is found as 'a/b/c.mp4'.

        Raises:
          AmbiguousName: if several videos in one place end in it.
        """
        for place in self._places:
            found = place.find(name)
            if found is not None:
                return found
        return None

    def exists(self, name: str) -> bool:
        """Whether there is a video of this name, or several."""
        try:
            return self.find(name) is not None
        except AmbiguousName:
            return True


class _Folder:
    def __init__(self, path: Path):
        self._path = path
        self._by_end: dict[str, list[str]] | None = None  # made when a name is not found directly

    def find(self, name: str) -> VideoFile | None:
        path = os.path.join(self._path, name)  # an absolute name stays as it is
        if not os.path.exists(path):
            if self._by_end is None:
                self._by_end = defaultdict(list)
                for folder, folders, files in os.walk(self._path):
                    folders.sort()
                    for file in (*folders, *sorted(files)):
                        self._by_end[file].append(os.path.join(folder, file))
            path = _only(self._by_end.get(os.path.basename(name), ()), name)
        if path is None:
            return None
        return VideoFile(os.path.abspath(path), frames=os.path.isdir(path))


class _Bucket:
    def __init__(self, url: str):
        self._by_end: dict[str, list[str]] = defaultdict(list)
        self._frames: set[str] = set()
        scheme = url.split('://')[0]
        for folder, folders, files in epath.Path(url).walk():
            # epath gives '/bucket/name' for 'gs://bucket/name' here.
            place = f'{scheme}://{os.fspath(folder).split("://")[-1].lstrip("/")}'
            if any(map(_is_frame, files)):
                self._frames.add(place)
            for name in (*folders, *files):
                self._by_end[name].append(f'{place}/{name}')

    def find(self, name: str) -> VideoFile | None:
        found = _only(self._by_end.get(os.path.basename(name), ()), name)
        return VideoFile(found, frames=found in self._frames) if found else None


class _Tar:
    def __init__(self, path: Path):
        self._path = os.path.abspath(path)
        self._parts: dict[str, list[tuple[int, int]]] = defaultdict(list)
        self._by_end: dict[str, list[str]] = defaultdict(list)
        self._frames: set[str] = set()
        frames = []
        try:
            with open_regular(path) as file, tarfile.open(fileobj=file, mode='r:') as archive:
                for member in archive:
                    if not member.isreg():
                        continue
                    name = member.name.removeprefix('./')
                    self._add(name, member)
                    if _is_frame(name) and '/' in name:
                        frames.append((name, member))
        except (tarfile.TarError, OSError) as error:
            raise ValueError(
                f'{path}: not a tar file that can be read at random ({error}); unpack compressed '
                'ones first: gunzip FILE.tar.gz'
            ) from error
        for name, member in sorted(frames, key=lambda pair: pair[0]):
            folder = os.path.dirname(name)
            self._frames.add(folder)
            self._add(folder, member)

    def _add(self, name: str, member: tarfile.TarInfo) -> None:
        if name not in self._parts:
            self._by_end[os.path.basename(name)].append(name)
        self._parts[name].append((member.offset_data, member.size))

    def find(self, name: str) -> VideoFile | None:
        found = _only(self._by_end.get(os.path.basename(name), ()), name)
        if found is None:
            return None
        return VideoFile(self._path, tuple(self._parts[found]), found in self._frames)


def _only(paths: Sequence[str], name: str) -> str | None:
    """The path that is the name or ends in it."""
    found = [path for path in paths if path == name or path.endswith(f'/{name}')]
    if name in found:
        return name
    if len(found) > 1:
        raise AmbiguousName(f'{found[0]} and {found[1]}')
    return found[0] if found else None
