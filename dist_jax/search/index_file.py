"""The index of a folder of videos: one safetensors file, as docs/guides/search.md says.

What is read may be anybody's: it is checked before it is used, nothing in it is run, and memory
goes with what a file really holds, most of which stays on the disk.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from dist_jax.embedding.video import Video
from dist_jax.models.params import safetensors_header
from dist_jax.models.source_files import read_safetensors
from input_pipeline.escape import terminal
from input_pipeline.regular_files import describe, open_regular

FORMAT, VERSION = 'dist_jax index', 1
VECTORS = np.dtype(np.float16)  # half of float32's place; cosines move by 5e-5
MOST_SECONDS = 1e9  # 32 years of video
MOST_SETTINGS = 2**20  # bytes of the JSON in a file

# Tensor -> dtype and number of axes. `vectors` has one more, and `weights` is there, where windows
# have a vector for each frame.
_TENSORS = {
    'vectors': (VECTORS, 2),
    'weights': (np.dtype(np.float32), 2),
    'spans': (np.dtype(np.float64), 2),
    'video': (np.dtype(np.int32), 1),
    'sizes': (np.dtype(np.int64), 1),
    'times_ns': (np.dtype(np.int64), 1),
    'paths': (np.dtype(np.uint8), 1),
    'path_ends': (np.dtype(np.int64), 1),
    'errors': (np.dtype(np.uint8), 1),
    'error_ends': (np.dtype(np.int64), 1),
}

PathLike = str | os.PathLike[str]


class IndexFileError(ValueError):
    """No index, a damaged one, or one that this version does not read."""


@dataclasses.dataclass(frozen=True)
class Index:
    """An index that was read and checked, but for its vectors, which stay on the disk.

    Attributes:
      path: of the file.
      places: where things were when it was written, absolute paths: `folder` of the videos, and
        `model`, a run or a converted backbone.
      settings: JSON values that say what the vectors are: `model`, `preprocessing`, `windows`.
      spans: (W, 2) float64, start and end of each window in seconds.
      video: (W,) int32, number of its video, increasing.
      vectors: (W, E) or (W, T, E) float16.
      weights: (W, T) float32, shares of the frames; None with (W, E).
      first: (N + 1,) int64, where the windows of each video begin, and their number.
      sizes: (N,) int64, bytes of the files.
      times_ns: (N,) int64, when they were changed last.
    """

    path: str
    places: dict[str, str]
    settings: dict[str, Any]
    spans: np.ndarray
    video: np.ndarray
    vectors: np.ndarray
    weights: np.ndarray | None
    first: np.ndarray
    sizes: np.ndarray
    times_ns: np.ndarray
    _paths: _Texts
    _errors: _Texts

    @property
    def num_videos(self) -> int:
        """Videos of the folder, those that cannot be read included."""
        return len(self.sizes)

    def name(self, number: int) -> str:
        """Path of a video from the folder on."""
        return os.fsdecode(self._paths[number])

    def error(self, number: int) -> str:
        """Why a video could not be read; '' for those that could."""
        return self._errors[number].decode('utf-8', 'replace')

    def unreadable(self) -> list[tuple[str, str]]:
        """(path, reason) of the videos that could not be read."""
        numbers = np.flatnonzero(self._errors.lengths()).tolist()
        return [(self.name(number), self.error(number)) for number in numbers]

    def videos(self) -> list[Video]:
        """All of them, as `write` takes them."""
        return [self._video(number) for number in range(self.num_videos)]

    def _video(self, number: int) -> Video:
        rows = slice(*self.first[number : number + 2].tolist())

        def read() -> dict[str, np.ndarray]:
            found = {'spans': self.spans[rows], 'vectors': self.vectors[rows]}
            return found if self.weights is None else found | {'weights': self.weights[rows]}

        return Video(
            self.name(number),
            int(self.sizes[number]),
            int(self.times_ns[number]),
            self.error(number),
            rows.stop - rows.start,
            read,
        )


@dataclasses.dataclass(frozen=True)
class _Texts:
    """Byte strings end to end."""

    content: np.ndarray
    ends: np.ndarray

    def __getitem__(self, number: int) -> bytes:
        start = self.ends[number - 1] if number else 0
        return self.content[start : self.ends[number]].tobytes()

    def lengths(self) -> np.ndarray:
        return np.diff(self.ends, prepend=0)


def read(path: PathLike) -> Index:
    """Opens an index.

    Raises:
      FileNotFoundError: nothing there.
      IndexFileError: something else, a damaged index, or one of a newer version.
    """
    path = os.fspath(path)
    try:
        open_regular(path).close()
    except FileNotFoundError:
        raise FileNotFoundError(
            f'{path}: no such file; `dist_jax index FOLDER --out {path}` makes an index'
        ) from None
    except OSError as error:
        raise IndexFileError(f'{path} cannot be read: {describe(error)}') from None
    try:
        tensors = read_safetensors(path)
        with safe_open(path, 'np') as file:
            metadata = file.metadata() or {}
    except (ValueError, SafetensorError, OSError, RecursionError):
        raise IndexFileError(
            f'{path} is no index, or a damaged one; `dist_jax index` makes another'
        ) from None
    if metadata.get('format') != FORMAT:
        raise IndexFileError(f'{path} is a safetensors file, but no index of `dist_jax index`')
    if metadata.get('version') != str(VERSION):
        raise IndexFileError(
            f'{path} is an index of version {terminal(metadata.get("version"))[:20]}, this library '
            f'reads {VERSION}; update dist_jax, or make the index again'
        )
    try:
        return _checked(path, tensors, metadata)
    except (KeyError, TypeError, ValueError, IndexError, RecursionError) as error:
        raise IndexFileError(f'{path} is a damaged index ({error}); make it again') from None


def _checked(path: str, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> Index:
    """Raises anything that `read` catches."""
    settings, places = _json(metadata, 'settings'), _json(metadata, 'places')
    for part in ('model', 'preprocessing', 'windows'):
        if not isinstance(settings[part], dict):
            raise ValueError(f'settings without {part}')
    for part in ('folder', 'model'):
        if not isinstance(places[part], str) or '\0' in places[part]:
            raise ValueError(f'places without {part}')
        os.fsencode(places[part])  # of half a character nothing can be
    weighted = 'weights' in tensors
    axes = {name: count for name, (_, count) in _TENSORS.items()} | {'vectors': 2 + weighted}
    for name, (dtype, _) in _TENSORS.items():
        if name == 'weights' and not weighted:
            continue
        if tensors[name].dtype != dtype or tensors[name].ndim != axes[name]:
            raise ValueError(f'{name} is {tensors[name].dtype} {tensors[name].shape}')
    spans, video, vectors = (tensors[name] for name in ('spans', 'video', 'vectors'))
    num_windows, num_videos = len(spans), len(tensors['sizes'])
    paths = _texts(tensors, 'path', num_videos)
    times = spans.shape[1] == 2 and ((spans >= 0) & (spans < MOST_SECONDS)).all()
    if not times or (spans[:, 0] > spans[:, 1]).any():
        raise ValueError('spans that are no times')
    if len(video) != num_windows or len(vectors) != num_windows or not math.prod(vectors.shape[1:]):
        raise ValueError(f'{num_windows} spans, vectors {vectors.shape}, video {video.shape}')
    if num_windows and not (video[0] >= 0 and video[-1] < num_videos and _increasing(video)):
        raise ValueError('numbers of videos out of order')
    if len(tensors['times_ns']) != num_videos:
        raise ValueError('times_ns of another number of videos')
    weights = tensors.get('weights')
    if weights is not None and (
        weights.shape != vectors.shape[:2] or not np.isfinite(weights).all() or (weights < 0).any()
    ):
        raise ValueError(f'weights {weights.shape} that are no shares')
    found = Index(
        path,
        places,
        settings,
        spans,
        video,
        vectors,
        weights,
        np.searchsorted(video, np.arange(num_videos + 1)),
        tensors['sizes'],
        tensors['times_ns'],
        paths,
        _texts(tensors, 'error', num_videos),
    )
    for number in range(num_videos):
        name = found.name(number)
        if not name or '\0' in name or os.path.isabs(name) or '..' in name.split('/'):
            raise ValueError(f'a path that leads elsewhere: {terminal(name)[:80]}')
    return found


def _json(metadata: Mapping[str, str], name: str) -> dict[str, Any]:
    text = metadata[name]
    if len(text) > MOST_SETTINGS:
        raise ValueError(f'{name} of {len(text)} characters')
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError(f'{name} that are no object')
    return found


def _increasing(numbers: np.ndarray) -> bool:
    return not (numbers[1:] < numbers[:-1]).any()


def _texts(tensors: Mapping[str, np.ndarray], name: str, count: int) -> _Texts:
    content, ends = tensors[f'{name}s'], tensors[f'{name}_ends']
    if len(ends) != count or not _increasing(ends) or (count and ends[0] < 0):
        raise ValueError(f'{name}_ends {ends.shape} out of order')
    if len(content) != (ends[-1] if count else 0):
        raise ValueError(f'{name}s of {len(content)} bytes')
    return _Texts(content, ends)


def write(
    path: PathLike,
    places: Mapping[str, str],
    settings: Mapping[str, Any],
    videos: Sequence[Video],
) -> None:
    """Writes an index; it appears whole or not at all. The same content makes the same bytes.

    Args:
      path: file to write; it is replaced.
      places: see `Index`.
      settings: likewise.
      videos: in order; those with windows are read one after the other, so that memory goes with
        the longest. At least one has windows.

    Raises:
      IndexFileError: they have vectors of different sizes; nothing is written.
    """
    path = Path(path)
    count = sum(video.num_windows for video in videos)
    example = next(video for video in videos if video.num_windows).read()
    own: dict[str, np.ndarray] = {
        'video': np.repeat(np.arange(len(videos)), [video.num_windows for video in videos]),
        'sizes': np.array([video.size for video in videos]),
        'times_ns': np.array([video.time_ns for video in videos]),
    }
    texts = {
        'path': [os.fsencode(video.path) for video in videos],
        'error': [video.error.encode('utf-8', 'replace') for video in videos],
    }
    for name, each in texts.items():
        own[f'{name}s'] = np.frombuffer(b''.join(each), np.uint8)
        own[f'{name}_ends'] = np.cumsum([len(text) for text in each])
    leaves = {name: (leaf.shape, _TENSORS[name][0]) for name, leaf in own.items()} | {
        name: ((count, *leaf.shape[1:]), _TENSORS[name][0]) for name, leaf in example.items()
    }
    metadata = {
        'format': FORMAT,
        'places': _json_text(places),
        'settings': _json_text(settings),
        'version': str(VERSION),
    }
    header, tensors = safetensors_header(leaves, metadata)

    def parts(name: str) -> Iterable[np.ndarray]:
        if name in own:
            yield own[name]
            return
        row = leaves[name][0][1:]
        for video in videos:
            if video.num_windows:
                part = video.read().get(name, np.empty(0))
                if part.shape != (video.num_windows, *row):
                    raise IndexFileError(
                        f'{path}: {name} of {terminal(video.path)} have the shape {part.shape}, '
                        f'others {row} for each of {video.num_windows} windows: the index or its '
                        'journal is damaged; delete both and make it again'
                    )
                yield part

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f'.{path.name}.new')
    try:
        with open(partial, 'wb') as file:
            file.write(header)
            for name in tensors:
                for part in parts(name):
                    file.write(np.ascontiguousarray(part, _TENSORS[name][0]).tobytes())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _json_text(value: Mapping[str, Any]) -> str:
    """ASCII, also of names that are not UTF-8; the same for dicts of any order."""
    return json.dumps(value, sort_keys=True, separators=(',', ':'))
