"""`dist_jax features`: what a model makes of videos, as arrays in files.

Each host embeds every n-th video on its own devices; nothing crosses hosts but the end. What a host
has done stands in its journal, so a run that was stopped at any moment goes on to the same bytes,
on the same devices.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from rich.table import Table

from dist_jax import paths
from dist_jax.embedding.embedder import Embedder
from dist_jax.embedding.journal import Journal
from dist_jax.embedding.runner import Item, check_same, embed_videos, find_file
from dist_jax.embedding.video import Video
from dist_jax.features import files as feature_files
from dist_jax.features.files import HOSTS, MANIFEST, SPANS, VIDEOS, FeatureStore, NpyFiles, Parts
from dist_jax.features.model import CLIP, FRAMES, TOKENS, FeatureModel, Outputs
from dist_jax.json_file import write_json
from dist_jax.search.index_model import preprocessing
from dist_jax.tasks.api import labels_of
from input_pipeline.escape import Console, terminal
from input_pipeline.label_sets import LabelSets
from input_pipeline.pipeline import EvalReader
from input_pipeline.video_list import LabelledSource
from input_pipeline.windows import ClipReader, WholeReader, WindowReader

log = logging.getLogger('dist_jax')

VERSION = 1
PACKAGES = ('dist_jax', 'jax', 'jaxlib', 'flax', 'numpy', 'av', 'opencv-python-headless')
MOST_LISTED = 50  # unreadable videos in the table
MOST_NAME = 200  # bytes of a part of a path
_ENDINGS = ('.npy', '.partial')

# Output -> axes behind the windows, pooling, norm, as the manifest and the documentation say.
MEANINGS = {
    CLIP: (
        'E',
        'mean over views; of a classifier what its head reads, else the mean of frames',
        'of a classifier none, else unit length before views are averaged',
    ),
    FRAMES: ('T, E', 'none', 'none'),
    TOKENS: ('T, L, W', 'none; class token first', 'none: the stream behind the block'),
    SPANS: ('2', 'start and end in seconds', 'none'),
}


@dataclasses.dataclass(frozen=True)
class Request:
    """What to compute of which videos.

    Attributes:
      items: the videos, of all hosts.
      labels: classes of each, from 0, an index, one a head or any number; () where nobody knows.
      class_names: of those, by head.
      source: JSON values that say where the videos come from.
      out: folder of the features.
      outputs: what is wanted, without blocks.
      blocks: of the image tower.
      reader: makes the windows.
      batch_size: windows of a step, of a host.
      form: npy, parquet or array_record.
      dtype: of what is stored, float32 or float16.
    """

    items: Sequence[Item]
    labels: Sequence[int | Sequence[int]]
    class_names: Sequence[Sequence[str]]
    source: Mapping[str, Any]
    out: str
    outputs: Outputs
    blocks: tuple[int, ...]
    reader: ClipReader
    batch_size: int
    form: str = 'npy'
    dtype: str = 'float32'


def make_reader(
    views: Callable[[bool], EvalReader],
    outputs: Outputs,
    blocks: tuple[int, ...],
    window: float,
    stride: float,
) -> ClipReader:
    """Whole videos (`window` 0) or windows, in seconds.

    Args:
      views: see `FeatureModel.views`.
      outputs: what is wanted, without blocks.
      blocks: of the image tower.
      window: seconds.
      stride: seconds.

    Raises:
      ValueError: numbers that do not fit, or frames of several views.
    """
    if window:
        return WindowReader(views(False), window, stride)
    whole = views(True)
    if whole.num_views > 1 and (outputs.frames or blocks):
        raise ValueError(
            f'--outputs: {FRAMES} and {TOKENS} are of one view, and the protocol has '
            f'{whole.num_views}; pass --window, or --config.eval.num_clips=1 '
            '--config.eval.num_crops=1'
        )
    return WholeReader(whole)


def items_of_files(names: Sequence[str]) -> list[Item]:
    """Video files; those of a folder are named from it on."""
    found: list[Item] = []
    for path, folder in _paths_and_folders(names):
        name = os.path.relpath(path, folder)
        found.append(find_file(folder, name))
    return _with_names(found)


def _paths_and_folders(names: Sequence[str]) -> Iterable[tuple[str, str]]:
    """(path, folder that its name starts from) of files, and of the videos below folders."""
    for name in names:
        for path in paths.find_videos([name]):
            yield path, name if os.path.isdir(name) else os.path.dirname(name) or '.'


def items_of_list(source: LabelledSource, root: str) -> list[Item]:
    """Records of a list, named from the root on, or of a built data set, named as in it."""
    found = []
    for number in range(len(source)):
        record = source[number]
        name = record.video_id
        if record.load is None:
            inside = os.path.relpath(record.path, root or '.')
            name = name if inside.startswith('..') else inside
        if record.load is None and not os.path.isdir(record.path):
            folder, file = os.path.split(record.path)
            video = find_file(folder, file).video
        else:
            video = Video('', 0, 0)
        found.append(Item(dataclasses.replace(video, path=name), record))
    return _with_names(found)


def labels_of_list(
    source: LabelledSource,
) -> tuple[list[int | list[int]], Sequence[Sequence[str]]]:
    """Classes of the records, and their names by head; (), () of a list of captions."""
    if not source.class_names:
        return [], ()
    if isinstance(source.labels, LabelSets):
        return [sorted(own) for own in source.labels], labels_of(source)
    if isinstance(source.num_classes, tuple):
        return source.labels.tolist(), source.class_names
    return source.labels.reshape(-1).tolist(), (source.class_names,)


def _with_names(items: Sequence[Item]) -> list[Item]:
    """Names that stay inside of a folder, each of one video alone."""
    counts: dict[str, int] = {}
    found = []
    for item in items:
        parts = [
            _short('_' * len(part) if set(part) <= {'.'} else part.replace('\0', '_'))
            for part in PurePosixPath(item.video.path).parts
            if part != '/'
        ]
        # No folder is called as the file of another video is, or as one that is being written.
        folders = [f'{part}_' if part.endswith(_ENDINGS) else part for part in parts[:-1]]
        name = '/'.join([*folders, *parts[-1:]]) or '_'
        counts[name] = counts.get(name, 0) + 1
        while counts[name] > 1:
            again = f'{name}~{counts[name]}'
            if again not in counts:
                name = again
                counts[name] = 1
            else:
                counts[name] += 1
        found.append(item._replace(video=dataclasses.replace(item.video, path=name)))
    return found


def _short(part: str) -> str:
    """A part of a path that file systems take."""
    data = os.fsencode(part)
    if len(data) <= MOST_NAME:
        return part
    return os.fsdecode(data[: MOST_NAME - 20]) + '~' + hashlib.sha256(data).hexdigest()[:16]


def run(request: Request, model: FeatureModel) -> int:
    """The command `features`; every host runs it.

    Returns:
      The exit code: 0, or 1 if no video could be read.

    Raises:
      ValueError: the folder holds something else, or what is asked for does not fit.
      InUseError: another process is at work there.
    """
    if '://' in request.out:
        raise ValueError(f'--out={request.out}: features are written to a disk; mount the bucket')
    if request.form == 'parquet':
        feature_files.import_parquet()
    out = Path(request.out)
    settings = _settings(request, model)
    manifest = feature_files.read_manifest(out)
    if manifest is not None:
        _check_complete(out, manifest['settings'], settings)
        if jax.process_index() == 0:
            shutil.rmtree(out / HOSTS, ignore_errors=True)
            Console().print(f'{out} is complete already', soft_wrap=True)
        return 0
    _check_folder(out)
    (out / HOSTS).mkdir(parents=True, exist_ok=True)
    host, hosts = jax.process_index(), jax.process_count()
    dtype = np.dtype(request.dtype)
    with Journal(str(feature_files.journal_file(out, host)), str(out)) as journal:
        if journal.settings:
            check_same(str(out), journal.settings, settings)
        else:
            journal.begin(settings)
        store = _store(request.form, out, journal, host)

        def make_embedder() -> Embedder:
            return model.embedder(request.outputs, request.blocks, request.batch_size)

        if hosts > 1:
            # Weights are read by all hosts at once, also by one that has nothing left to do.
            made = make_embedder()
        embed_videos(
            'features',
            request.items[host::hosts],
            dict(journal.videos),
            store,
            make_embedder if hosts == 1 else lambda: made,
            request.reader,
            lambda _: dtype,
        )
        store.close()
    _wait_for_all('embedded')
    readable = _finish(request, out, settings) if host == 0 else True
    _wait_for_all('written')
    return 0 if readable else 1


def _wait_for_all(point: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f'features {point}')


def _store(form: str, out: Path, journal: Journal, host: int) -> FeatureStore:
    if form == 'npy':
        return NpyFiles(out, journal, host)
    write = {
        'parquet': feature_files.write_parquet,
        'array_record': feature_files.write_array_record,
    }[form]
    return Parts(out, journal, host, form, write)


def _settings(request: Request, model: FeatureModel) -> dict[str, dict[str, Any]]:
    """JSON values that all hosts and every start of a run have in common."""
    reader = request.reader
    windows = isinstance(reader, WindowReader)
    views = reader.views
    return {
        'model': model.identity,
        'preprocessing': preprocessing(views) | {'views': [views.num_clips, views.num_crops]},
        'windows': {
            'window': reader.window if windows else 0,
            'stride': reader.stride if windows else 0,
        },
        'outputs': {
            CLIP: request.outputs.clip,
            FRAMES: request.outputs.frames,
            TOKENS: list(request.blocks),
            'dtype': request.dtype,
            'format': request.form,
        },
        'run': {
            'hosts': jax.process_count(),
            'batch_size': request.batch_size,
            'num_videos': len(request.items),
            'videos_sha256': _digest(request.items),
        },
    }


def _digest(items: Sequence[Item]) -> str:
    """Of the names, sizes and times of change of all videos."""
    digest = hashlib.sha256()
    for video, record in items:
        row = [video.path, video.size, video.time_ns, record.start, record.end]
        digest.update(json.dumps(row).encode() + b'\n')
    return digest.hexdigest()


def _check_complete(out: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Raises ValueError if features that are complete are not the ones that are asked for."""
    if any(not isinstance(old.get(part), dict) for part in new):
        raise ValueError(f'{out / MANIFEST} is damaged; name another --out')
    check_same(str(out), old, new)


def _check_folder(out: Path) -> None:
    """Raises ValueError if a folder holds something else than features that were begun."""
    if out.exists() and not out.is_dir():
        raise ValueError(f'--out={out} is a file; name a folder')
    if out.is_dir() and not (out / HOSTS).is_dir() and any(out.iterdir()):
        raise ValueError(f'--out={out} holds other files; name a new folder')


def _finish(request: Request, out: Path, settings: Mapping[str, Any]) -> bool:
    """Writes the list of videos and the manifest; whether any video could be read."""
    hosts = jax.process_count()
    found: dict[str, Video] = {}
    shapes: dict[str, Sequence[int]] = {}
    for host in range(min(hosts, len(request.items))):
        with Journal(str(feature_files.journal_file(out, host)), str(out)) as journal:
            found |= journal.videos
        with contextlib.suppress(FileNotFoundError):
            shapes = json.loads(feature_files.shapes_file(out, host).read_bytes())
    videos = [found[item.video.path] for item in request.items]
    feature_files.write_lines(out / VIDEOS, _rows(request, videos))
    bad = sum(bool(video.error) for video in videos)
    outputs = {
        name: dict(zip(('axes', 'pooling', 'norm'), MEANINGS[name.partition('_')[0]]))
        | {'shape': list(shape), 'dtype': 'float64' if name == SPANS else request.dtype}
        for name, shape in shapes.items()
    }
    manifest = {
        'format': 'dist_jax features',
        'version': VERSION,
        'settings': settings,
        'outputs': outputs,
        'num_videos': len(videos),
        'num_bad_videos': bad,
        'num_windows': sum(video.num_windows for video in videos),
        'class_names': [list(names) for names in request.class_names],
        'source': dict(request.source),
        'videos': VIDEOS,
        'devices': f'{jax.local_device_count()} x {jax.local_devices()[0].device_kind}',
        'versions': {name: _version(name) for name in PACKAGES},
    }
    write_json(out / MANIFEST, manifest)
    shutil.rmtree(out / HOSTS)
    _print(request, out, videos, shapes)
    return bad < len(videos)


def _rows(request: Request, videos: Sequence[Video]) -> Iterator[dict[str, Any]]:
    """What videos.jsonl says of each."""
    labels = request.labels or [None] * len(videos)
    for item, video, label in zip(request.items, videos, labels):
        row: dict[str, Any] = {'video': video.path, 'source': item.record.path}
        for name in ('start', 'end'):
            if getattr(item.record, name) is not None:
                row[name] = getattr(item.record, name)
        if label is not None:
            row['label'] = label
        row['num_windows'] = video.num_windows
        if video.file:
            row['file'] = video.file
        if video.error:
            row['error'] = video.error
        yield row


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ''


def _print(
    request: Request, out: Path, videos: Sequence[Video], shapes: Mapping[str, Sequence[int]]
) -> None:
    console = Console()
    bad = [video for video in videos if video.error]
    if bad:
        table = Table('video', 'cannot be read')
        for video in bad[:MOST_LISTED]:
            table.add_row(*map(terminal, (video.path, video.error)))
        console.print(table)
        if len(bad) > MOST_LISTED:
            console.print(f'and {len(bad) - MOST_LISTED} more, in {VIDEOS}')
    windows = sum(video.num_windows for video in videos)
    table = Table('output', 'shape', 'dtype')
    for name, shape in shapes.items():
        dtype = 'float64' if name == SPANS else request.dtype
        table.add_row(name, str((windows, *shape)), dtype)
    console.print(table)
    told = f'{len(videos) - len(bad)} videos, {windows} windows'
    told += f'; {len(bad)} cannot be read, see {VIDEOS}' if bad else ''
    console.print(f'features: {out} ({request.form}): {told}', soft_wrap=True)
