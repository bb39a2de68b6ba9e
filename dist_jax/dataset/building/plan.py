"""What will be built: every video of every split, cut into shards before anything is read.

A shard is a fixed stretch of the list, whether its videos can be read or not, so what comes out
does not depend on how many processes work or in which order they finish.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from dist_jax.dataset.building.videos import AmbiguousName, VideoFile, VideoFiles
from input_pipeline.datasets import DATASETS, SplitFile
from input_pipeline.encode import check_options
from input_pipeline.escape import json_text
from input_pipeline.list_formats import FORMATS, guess_format
from input_pipeline.sources import count_heads, find_classes, find_labels, read_rows
from input_pipeline.video_list import Names


@dataclass(frozen=True)
class Options:
    """What the bytes of a built data set depend on, beside lists and videos.

    Attributes:
      records_per_shard: listed videos of a shard.
      short_side: pixels of the encoded videos; 0 keeps the files as they are.
      keyframe_interval: frames, see `encode.transcode`.
      crf: quality, likewise.
      codec: likewise.
      full_check: decode every frame of a video that is kept as it is, not a sample of 8.
      frame_rate: of folders of frames, per second.
    """

    records_per_shard: int = 256
    short_side: int = 0
    keyframe_interval: int = 8
    crf: int = 23
    codec: str = 'h264'
    full_check: bool = False
    frame_rate: float = 0.0

    def __post_init__(self):
        if self.records_per_shard < 1:
            raise ValueError(f'records_per_shard={self.records_per_shard} must be at least 1')
        if self.short_side:
            check_options(self.short_side, self.keyframe_interval, self.crf, self.codec)


@dataclass(frozen=True)
class Entry:
    """A listed video.

    Attributes:
      where: line of the list.
      name: path in the list.
      video_id: name in the data set.
      label: class index per head, or all its classes; () in sets of captions.
      captions: texts; () in sets of classes.
      start: seconds, see `Record`; None: the beginning.
      end: seconds; None: the end.
      file: where it lies; None if it was not found.
      problem: (kind, reason) why it cannot be built; None if it may.
    """

    where: str
    name: str
    video_id: str
    label: tuple[int, ...]
    captions: tuple[str, ...]
    start: float | None
    end: float | None
    file: VideoFile | None
    problem: tuple[str, str] | None

    @classmethod
    def from_json(cls, line: str) -> 'Entry':
        """Reads what `to_json` wrote."""
        fields = json.loads(line)
        if fields['file'] is not None:
            parts = tuple(map(tuple, fields['file']['parts']))
            fields['file'] = VideoFile(**fields['file'] | {'parts': parts})
        for name in ('label', 'captions', 'problem'):
            fields[name] = None if fields[name] is None else tuple(fields[name])
        return cls(**fields)

    def to_json(self) -> str:
        """One line."""
        return json_text(asdict(self))


@dataclass(frozen=True)
class Plan:
    """What will be built.

    Attributes:
      name: of the data set.
      class_names: of each head; () in sets of captions.
      splits: entries by split, in the order of the lists.
      several: a video has any number of classes of the one head.
    """

    name: str
    class_names: tuple[Names, ...]
    splits: Mapping[str, tuple[Entry, ...]]
    several: bool = False


def find_lists(
    name: str, annotations: str, splits: Sequence[str], lists: Mapping[str, str]
) -> dict[str, tuple[Path, SplitFile]]:
    """The annotation file of every split.

    Args:
      name: a key of `DATASETS`.
      annotations: folder of the original files; '' if `lists` has all.
      splits: the splits to build; () for all whose files are there.
      lists: files by split, where they are not the original ones.

    Returns:
      Split -> file and how to read it.

    Raises:
      ValueError: if a file is missing.
    """
    known = DATASETS[name].splits
    found: dict[str, tuple[Path, SplitFile]] = {}
    for split, path in lists.items():
        if not split.isidentifier():
            raise ValueError(f'--list {split}={path}: a split is named by letters, digits and _')
        default = known.get(split, SplitFile((), 'auto'))
        if not Path(path).exists():
            raise ValueError(f'--list {split}={path}: no such file')
        found[split] = (Path(path), default)
    if annotations:
        folder = Path(annotations)
        if not folder.is_dir():
            raise ValueError(f'--annotations: {folder} is not a folder')
        for split in splits or known:
            if split not in known and split not in found:
                raise ValueError(f'--splits: {name} has {", ".join(known) or "none"}, not {split}')
            files = [folder / file for file in known[split].names] if split not in found else []
            there = next((file for file in files if file.exists()), None)
            if there is not None:
                found[split] = (there, known[split])
            elif splits and split not in found:
                names = ' or '.join(known[split].names)
                raise ValueError(f'{folder}: no {names} for split {split}; or --list {split}=FILE')
    if not found:
        wanted = ', '.join(' or '.join(file.names) for file in known.values())
        raise ValueError(f'no annotation file of {name}: {wanted or "pass --list train=FILE"}')
    return {split: found[split] for split in splits or found if split in found}


def find_label_maps(name: str, annotations: str, label_map: Sequence[str]) -> list[str]:
    """The files of class names; [] if the data set has none.

    Raises:
      ValueError: if one is missing.
    """
    if label_map:
        return list(label_map)
    maps = []
    for alternatives in DATASETS[name].label_files:
        files = [Path(annotations, file) for file in alternatives.split('|')]
        there = next((file for file in files if annotations and file.exists()), None)
        if there is None:
            raise ValueError(
                f'no class names: {name} wants {alternatives.replace("|", " or ")} in '
                '--annotations, or --label_map FILE'
            )
        maps.append(os.fspath(there))
    return maps


def make_plan(
    name: str,
    lists: Mapping[str, tuple[Path, SplitFile]],
    label_maps: Sequence[str],
    videos: VideoFiles,
    options: Options,
    list_format: str = '',
) -> Plan:
    """Reads the lists and finds the videos.

    Args:
      name: a key of `DATASETS`.
      lists: from `find_lists`.
      label_maps: from `find_label_maps`.
      videos: where videos are looked for.
      options: of the build.
      list_format: a key of `FORMATS` for all lists; '' for the data set's own.

    Raises:
      ValueError: if a list is wrong, its labels do not fit, or nothing at all was found.
    """
    info = DATASETS[name]
    rows, formats = {}, {}
    for split, (path, file) in lists.items():
        form = list_format or file.list_format
        # A list of another name than the original may have another format, too.
        if form == 'auto' or (not list_format and path.name not in file.names and path.is_file()):
            form = guess_format(path, file.list_format)
        if form not in FORMATS:
            raise ValueError(f'--format {form!r} must be one of {", ".join(FORMATS)}')
        rows[split] = read_rows(
            path,
            form,
            videos.exists,
            file.subset if form == file.list_format else '',
            split,
            count_heads(label_maps, info.num_classes),
        )
        formats[split] = form
    everything = [row for split_rows in rows.values() for row in split_rows]
    several = everything[0].several
    kinds = {'any' if row.several else (len(row.labels), bool(row.captions)) for row in everything}
    if len(kinds) > 1:
        raise ValueError(
            'the lists differ: all need one label, two labels, any number of labels, or captions'
        )
    first = next(iter(lists))
    heads = []
    if everything[0].labels or several:
        heads = find_classes(
            lists[first][0], formats[first], everything, label_maps or '', info.num_classes
        )
    splits = {}
    for split, split_rows in rows.items():
        entries = []
        for row in split_rows:
            label = find_labels(heads, row)
            file, problem = _find(videos, row.path)
            video_id = row.video_id or Path(row.path).stem
            entries.append(
                Entry(
                    row.where,
                    row.path,
                    video_id,
                    label,
                    row.captions,
                    row.start,
                    row.end,
                    file,
                    problem,
                )
            )
        splits[split] = tuple(entries)
    _check_plan(splits, options)
    return Plan(name, tuple(classes.names for classes in heads), splits, several)


def _find(videos: VideoFiles, name: str) -> tuple[VideoFile | None, tuple[str, str] | None]:
    try:
        file = videos.find(name)
    except AmbiguousName as error:
        return None, ('ambiguous', str(error))
    return file, None if file else ('missing', 'no such file')


def _check_plan(splits: Mapping[str, Sequence[Entry]], options: Options) -> None:
    entries = [entry for split in splits.values() for entry in split]
    if all(entry.file is None for entry in entries):
        raise ValueError(
            f'none of the {len(entries)} videos was found, for instance {entries[0].name}; set '
            '--videos to the folder or the tar files that hold them'
        )
    for entry in entries:
        if (entry.start, entry.end) != (None, None) and not options.short_side:
            raise ValueError(
                f'{entry.where}: is a part of a longer video; parts are cut by encoding them anew: '
                'pass --short_side'
            )
        if entry.file is not None and entry.file.frames and not options.frame_rate:
            raise ValueError(f'{entry.where}: is a folder of frames; pass --frame_rate')


def digest(paths: Sequence[Path | str]) -> dict[str, str]:
    """SHA-256 of files by path; of a folder, of the names in it."""
    found = {}
    for path in map(Path, paths):
        if path.is_dir():
            names = os.fsencode('\n'.join(sorted(os.listdir(path))))
            found[os.fspath(path)] = hashlib.sha256(names).hexdigest()
        else:
            with open(path, 'rb') as file:
                found[os.fspath(path)] = hashlib.file_digest(file, 'sha256').hexdigest()
    return found
