"""Kinetics-710: one training list and one label space out of Kinetics-400, -600 and -700.

The three sets share most classes, under partly different names, and many videos, some of which are
training videos in one set and test videos in another. A merge reads the official tables (label,
youtube_id, time_start, time_end, split) and works in this order; every row that is dropped is
counted once, under the first reason that applies:

1. leaked: the YouTube id is in a held-out table of any of the three sets. Which tables are held out
   is the rule, see `RULES`; the published ones disagree.
2. missing: no file of this row under the video folder of its set (only where one is given).
3. broken: its file is in the report of unreadable videos of its set (only where one is given).
4. duplicate: another row with this id is kept. `DECISIONS` says which.

Class names are compared by `class_names.key`, then by `SYNONYMS`. `DECISIONS` lists what no source
defines and how it is decided here.
"""

import csv
import difflib
import hashlib
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from input_pipeline import class_names
from input_pipeline.kinetics import SYNONYMS, synonym_keys
from input_pipeline.list_formats import VIDEO_SUFFIXES
from input_pipeline.text_files import number, quoted, read_csv, read_lines

# Sets, oldest first, with their number of classes.
SETS = {'k400': 400, 'k600': 600, 'k700': 700}
NUM_CLASSES = 710


@dataclass(frozen=True)
class Rule:
    """What is done about videos that are in training and in a held-out table.

    Attributes:
      held_out: splits whose ids leave training, of all three sets.
      clean_val: the validation lists lose the ids that are in training, instead.
      source: who published it.
    """

    held_out: tuple[str, ...]
    clean_val: bool
    source: str


RULES = {
    'drop_val_and_test': Rule(
        ('val', 'test'),
        False,
        'UniFormerV2: training loses every id of a validation or test table',
    ),
    'drop_val': Rule(('val',), False, 'EVA (K-722): training loses every id of a validation table'),
    'clean_val': Rule(
        (), True, 'VideoMAEv2: training loses nothing, validation loses the ids of training'
    ),
}
DEFAULT_RULE = 'drop_val_and_test'

DECISIONS = (
    'An id in several training tables: the copy of the newest set is kept (--prefer changes it), '
    'among copies whose file is there and not broken; its window and its label count.',
    'An id several times in one training table: the earliest window is kept, for equal windows the '
    'first label in alphabetical order.',
    'Copies whose merged labels differ are counted as other_label; the label of the kept copy '
    'counts, nothing is averaged.',
    'Ids of held-out tables count whether or not their video is there.',
    'A list of one set keeps every row of its table except missing, broken and exactly repeated '
    'ones, and in training ids of its own held-out tables, so that figures can be compared; the '
    'joint validation list has every id once, chosen as for training.',
    'A name is spelled as in the synonym table, else as in the newest set that has the class.',
    'Missing and broken are of a file: another copy of the same id may still be kept.',
    'A file is named ID_START_END, six digits each, else ID; folders do not matter, except that of '
    'several such files the one in a folder of the class is taken, else the first in order.',
)

SPLITS = {'train': 'train', 'val': 'val', 'validate': 'val', 'validation': 'val', 'test': 'test'}
REASONS = ('leaked', 'missing', 'broken', 'duplicate')
_ID = r'[A-Za-z0-9_-]{11}'
_STEM = re.compile(rf'({_ID})(?:_(\d{{6}})_(\d{{6}}))?')

Progress = Callable[[str, int], None]


class Clip(NamedTuple):
    """A row of a table.

    Attributes:
      youtube_id: of the video, 11 characters.
      start: seconds, whole.
      end: likewise.
      label: class name in its set, clean; '' in a test table.
      source: 'k400', 'k600' or 'k700'.
      split: 'train', 'val' or 'test'.
      path: of its file, '' if nobody looked.
    """

    youtube_id: str
    start: int
    end: int
    label: str
    source: str
    split: str
    path: str = ''


class Dropped(NamedTuple):
    """A row that is not in a list: of which list, why, and what it lost against."""

    clip: Clip
    list_name: str
    reason: str
    because: str


@dataclass(frozen=True)
class Inputs:
    """What there is of one set.

    Attributes:
      train: annotation tables, CSV.
      val: likewise.
      test: likewise, with or without labels.
      videos: folders that hold the videos; () to go by the tables alone.
      broken: reports of unreadable videos of this set, see `read_broken`.
    """

    train: tuple[str, ...] = ()
    val: tuple[str, ...] = ()
    test: tuple[str, ...] = ()
    videos: tuple[str, ...] = ()
    broken: tuple[str, ...] = ()


@dataclass(frozen=True)
class Classes:
    """The merged label space.

    Attributes:
      names: merged names, sorted; the place is the class index.
      native: set -> its own names, sorted.
      merged: set -> own name -> merged name.
      index: set -> class index in `names` for each of its own names.
      distinct: number of different names as written, after normalisation, and merged.
      respelled: sets whose own name differs from the merged one, with both: (set, own, merged).
    """

    names: tuple[str, ...]
    native: Mapping[str, tuple[str, ...]]
    merged: Mapping[str, Mapping[str, str]]
    index: Mapping[str, tuple[int, ...]]
    distinct: Mapping[str, int]
    respelled: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True)
class Merge:
    """The outcome. Lists are sorted by id and window.

    Attributes:
      classes: the label space.
      train: the training list.
      val: the joint validation list.
      train_of: set -> its own training list, for fine-tuning.
      val_of: set -> its validation list.
      dropped: rows that are not in a list, for each list.
      report: counts and decisions, JSON values.
    """

    classes: Classes
    train: tuple[Clip, ...]
    val: tuple[Clip, ...]
    train_of: Mapping[str, tuple[Clip, ...]]
    val_of: Mapping[str, tuple[Clip, ...]]
    dropped: tuple[Dropped, ...]
    report: Mapping[str, Any]


@dataclass
class _Table:
    """Rows of the tables of one split, and how their labels are written."""

    clips: list[Clip]
    spellings: dict[str, tuple[str, str]]  # raw label -> (clean, 'file:line' of the first)


def _read_table(path: str, source: str, split: str) -> _Table:
    """Reads an official table.

    Raises:
      ValueError: naming file and line, if a column or a value is missing or wrong.
    """
    table = _Table([], {})
    by_key: dict[str, str] = {}
    wanted = 0
    found: set[str] = set()
    for where, row in _csv_rows(path, labels=split != 'test'):
        stated = row.get('split', split).lower()
        if stated not in SPLITS:
            raise ValueError(f'{where}: split {stated!r} is not one of {", ".join(SPLITS)}')
        found.add(stated)
        if SPLITS[stated] != split:
            continue
        wanted += 1
        youtube_id = row['youtube_id']
        if not re.fullmatch(_ID, youtube_id):
            raise ValueError(
                f'{where}: {youtube_id!r} is not a YouTube id (11 letters, digits, - or _); '
                'a spreadsheet may have changed it: take the original table'
            )
        start, end = (_whole(row.get(name, ''), name, where) for name in ('time_start', 'time_end'))
        label = ''
        if split != 'test':
            raw = row['label']
            if raw not in table.spellings:
                label = class_names.clean(raw)
                if not label:
                    raise ValueError(f'{where}: no label')
                other = by_key.setdefault(class_names.key(raw), raw)
                if other != raw:
                    raise ValueError(
                        f'{where}: classes {raw!r} and {other!r} differ in case, quotes, '
                        'underscores or spaces only; one table must write a class in one way'
                    )
                table.spellings[raw] = (label, where)
            label = table.spellings[raw][0]
        table.clips.append(Clip(youtube_id, start, end, label, source, split))
    if not wanted:
        what = f'found {sorted(found)}' if found else 'it has no rows'
        raise ValueError(f'{path}: no row of split {split}, {what}')
    return table


def _csv_rows(path: str, labels: bool) -> Iterator[tuple[str, dict[str, str]]]:
    """Yields ('file:line', row) with lower-case column names and stripped values."""
    rows = read_csv(Path(path))
    header = [cell.strip().lower() for cell in rows[0][1]] if rows else []
    needed = ('youtube_id', *(('label', 'time_start', 'time_end') if labels else ()))
    lacking = [name for name in needed if name not in header]
    if lacking:
        raise ValueError(
            f'{path}:1: no column {", ".join(lacking)}, found {header}; expected an official '
            'table with label, youtube_id, time_start, time_end'
        )
    for where, row in rows[1:]:
        if len(row) != len(header):
            raise ValueError(f'{where}: {len(row)} fields, the header has {len(header)}')
        yield where, {name: cell.strip() for name, cell in zip(header, row)}


def _whole(text: str, name: str, where: str) -> int:
    """Whole seconds of '12' or '12.0'; 0 where a test table has no times."""
    value = number(text or '0')
    if value is not None and value >= 0 and value == int(value):
        return int(value)
    raise ValueError(f'{where}: {name} {quoted(text)} is not a whole number of seconds')


def _read_sets(inputs: Mapping[str, Inputs], note: Progress) -> dict[tuple[str, str], _Table]:
    """Tables by (set, split); rows of several files of one split are one table."""
    tables: dict[tuple[str, str], _Table] = {}
    for source in SETS:
        for split in ('train', 'val', 'test'):
            whole = tables[source, split] = _Table([], {})
            for path in getattr(inputs[source], split):
                note(f'reading {source} {split}', 0)
                table = _read_table(path, source, split)
                whole.clips += table.clips
                for raw, found in table.spellings.items():
                    whole.spellings.setdefault(raw, found)
    return tables


def _respell(table: _Table, native: Sequence[str]) -> None:
    """Writes labels as the names of the set do."""
    names = {class_names.key(name): name for name in native}
    other = {label: names[class_names.key(label)] for label, _ in table.spellings.values()}
    if any(label != name for label, name in other.items()):
        table.clips = [clip._replace(label=other[clip.label]) for clip in table.clips]


def merge_classes(
    spellings: Mapping[str, Mapping[str, Mapping[str, tuple[str, str]]]],
    synonyms: Mapping[str, str],
    complete: bool,
) -> Classes:
    """The merged label space.

    Args:
      spellings: set -> split ('train', 'val') -> label as written -> (clean, 'file:line').
      synonyms: old name -> merged name.
      complete: whether the tables must be the whole ones: 400, 600 and 700 classes, every name of
        the synonym table, and 710 classes in the end.

    Raises:
      ValueError: two classes of one set become one, a validation label is unknown in training, or
        the tables are not complete.
    """
    keys = synonym_keys(synonyms)
    native: dict[str, dict[str, str]] = {}  # set -> key -> own name
    for source, splits in spellings.items():
        names = native[source] = {}
        for label, _ in sorted(splits['train'].values()):
            names.setdefault(class_names.key(label), label)
        for label, where in splits['val'].values():
            if class_names.key(label) not in names:
                close = difflib.get_close_matches(label, names.values(), 1, 0.6)
                hint = f'; did you mean {close[0]!r}?' if close else ''
                raise ValueError(f'{where}: {label!r} is no class of the {source} train{hint}')
        if complete and len(names) != SETS[source]:
            raise ValueError(
                f'{source}: {len(names)} classes in the training tables, expected {SETS[source]}; '
                f'check the tables, or merge parts of the sets with --any_classes'
            )
    known = {key for names in native.values() for key in names}
    lacking = [
        name
        for pair in synonyms.items()
        for name in pair
        if complete and class_names.key(name) not in known
    ]
    if lacking:
        raise ValueError(
            f'synonyms: no table has {", ".join(map(repr, lacking))}; check that the tables are '
            'the official ones, or merge parts of the sets with --any_classes'
        )

    spelled: dict[str, str] = {}  # merged key -> merged name
    for new in synonyms.values():
        spelled.setdefault(class_names.key(new), class_names.clean(new))
    merged: dict[str, dict[str, str]] = {}
    for source in reversed(SETS):  # the newest set spells
        merged[source] = {}
        owner: dict[str, str] = {}
        for key, name in sorted(native[source].items()):
            target = keys.get(key, key)
            other = owner.setdefault(target, name)
            if other != name:
                raise ValueError(
                    f'{source}: its classes {other!r} and {name!r} both become '
                    f'{spelled.get(target, target)!r}; correct the synonym table (--synonyms)'
                )
            merged[source][name] = spelled.setdefault(target, name)
    names = tuple(sorted({name for of in merged.values() for name in of.values()}))
    if complete and len(names) != NUM_CLASSES:
        raise ValueError(
            f'{len(names)} merged classes, expected {NUM_CLASSES}; check tables and synonyms, or '
            'pass --any_classes'
        )
    place = {name: k for k, name in enumerate(names)}
    own = {source: tuple(sorted(native[source].values())) for source in SETS}
    as_written = {raw for of in spellings.values() for split in of.values() for raw in split}
    return Classes(
        names=names,
        native=own,
        merged=merged,
        index={s: tuple(place[merged[s][name]] for name in own[s]) for s in SETS},
        distinct={
            'as_written': len(as_written),
            'normalised': len(known),
            'merged': len(names),
        },
        respelled=tuple(
            (source, name, merged[source][name])
            for source in SETS
            for name in own[source]
            if name != merged[source][name]
        ),
    )


def find_videos(folders: Sequence[str], note: Progress = lambda *_: None) -> dict[str, list[str]]:
    """Files by name without suffix, all folders below included; links to folders are not followed.

    Raises:
      ValueError: a folder does not exist or holds no video.
    """
    files: dict[str, list[str]] = defaultdict(list)
    total = 0
    for folder in folders:
        if not os.path.isdir(folder):
            raise ValueError(f'{folder}: no such folder of videos')
        before = total
        for place, _, names in os.walk(folder):
            for name in names:
                stem, suffix = os.path.splitext(name)
                if suffix.lower() in VIDEO_SUFFIXES:
                    files[stem].append(os.path.join(place, name))
                    total += 1
            note(f'looking for files in {folder}', total)
        if total == before:
            raise ValueError(
                f'{folder}: no videos ({", ".join(VIDEO_SUFFIXES)}); links to folders are not '
                'followed'
            )
    for paths in files.values():
        paths.sort()
    return dict(files)


def find_file(clip: Clip, files: Mapping[str, Sequence[str]]) -> str:
    """Path of a clip: 'ID_START_END' before 'ID', in a folder of its class before others; or ''."""
    found = files.get(trimmed_name(clip)) or files.get(clip.youtube_id) or ('',)
    if len(found) == 1:
        return found[0]
    label = class_names.key(clip.label)
    return min(found, key=lambda path: (class_names.key(Path(path).parent.name) != label, path))


def trimmed_name(clip: Clip) -> str:
    """Name without suffix of the file that holds just this clip."""
    return f'{clip.youtube_id}_{clip.start:06d}_{clip.end:06d}'


def read_broken(path: str) -> set[str]:
    """Names without suffix of unreadable files: 'ID_START_END' or 'ID'.

    Args:
      path: a report of `dist_jax check` or of a run (bad_videos.jsonl), or a text file with an id
        or a file name a line.

    Raises:
      ValueError: naming file and line, if there is no id in it.
    """
    names = set()
    for where, file in read_lines(Path(path)):
        if file.startswith('{'):
            try:
                file = json.loads(file)['path']
            except (ValueError, KeyError) as error:
                raise ValueError(f'{where}: not a line of a bad video report') from error
        name = os.path.basename(str(file))
        stem = name if re.fullmatch(_STEM, name) else os.path.splitext(name)[0]
        if not re.fullmatch(_STEM, stem):
            raise ValueError(f'{where}: no YouTube id in {name!r}; expected ID or ID_START_END')
        names.add(stem)
    return names


def merge(
    inputs: Mapping[str, Inputs],
    edition: int,
    rule: str = DEFAULT_RULE,
    *,
    prefer: Sequence[str] = tuple(reversed(SETS)),
    synonyms: Mapping[str, str] = SYNONYMS,
    complete: bool = True,
    note: Progress = lambda *_: None,
) -> Merge:
    """Merges the three sets; the same rows in any order give the same result.

    Args:
      inputs: set -> its tables, folders and reports; all three sets.
      edition: of Kinetics-700, 2019 or 2020: it is written into the report.
      rule: a key of `RULES`.
      prefer: the sets; of several copies of a video the one of the first set is kept.
      synonyms: old class name -> merged class name.
      complete: see `merge_classes`.
      note: called with (what is being done, how many so far).

    Raises:
      ValueError: an option or a file is wrong; the message names it.
    """
    if rule not in RULES:
        raise ValueError(f'rule={rule!r} is not one of {", ".join(RULES)}')
    if sorted(prefer) != sorted(SETS):
        raise ValueError(f'prefer={list(prefer)} must name each of {", ".join(SETS)} once')
    without = [source for source in SETS if not inputs[source].videos]
    if without and len(without) < len(SETS):
        raise ValueError(
            f'no video folder of {", ".join(without)}; pass --{without[0]} videos=DIR, or leave '
            'videos out for all three sets'
        )
    for source in SETS:
        for split in {'train', 'val', *RULES[rule].held_out}:
            if not getattr(inputs[source], split):
                raise ValueError(
                    f'no {split} table of {source}: rule {rule!r} needs it; pass '
                    f'--{source} {split}=FILE, or choose another --rule'
                )
    tables = _read_sets(inputs, note)
    classes = merge_classes(
        {s: {split: tables[s, split].spellings for split in ('train', 'val')} for s in SETS},
        synonyms,
        complete,
    )
    for (source, _), table in tables.items():
        _respell(table, classes.native[source])
    dropped: list[Dropped] = []
    merger = _Merger(inputs, RULES[rule], classes, tables, prefer, dropped, note)
    train = merger.train()
    train_of = merger.train_lists()
    val_of = merger.val_lists(clip.youtube_id for clip in train)
    val = merger.unique('val', [clip for clips in val_of.values() for clip in clips])
    report = {
        'rule': rule,
        'rule_source': RULES[rule].source,
        'k700_edition': edition,
        'prefer': list(prefer),
        'tables': {
            f'{s} {split}': {
                'rows': len(table.clips),
                'ids': len({clip.youtube_id for clip in table.clips}),
                'sha256_of_sorted_rows': _digest(table.clips),
            }
            for (s, split), table in tables.items()
            if table.clips
        },
        'classes': {
            'distinct_names': dict(classes.distinct),
            'names_of_sets': {s: len(classes.native[s]) for s in SETS},
            'respelled': [list(row) for row in classes.respelled],
            'without_training_videos': sorted(
                set(classes.names) - {merged_label(classes, clip) for clip in train}
            ),
        },
        **merger.figures(train, val, train_of, val_of),
        'decisions': list(DECISIONS),
    }
    dropped.sort()
    return Merge(classes, tuple(train), tuple(val), train_of, val_of, tuple(dropped), report)


def merged_label(classes: Classes, clip: Clip) -> str:
    """Merged class name of a row."""
    return classes.merged[clip.source][clip.label]


def _digest(clips: Iterable[Clip]) -> str:
    digest = hashlib.sha256()
    for clip in sorted(clips):
        digest.update(json.dumps(clip[:4]).encode())
    return digest.hexdigest()


@dataclass
class _Merger:
    """The steps of one merge; they note what they drop."""

    inputs: Mapping[str, Inputs]
    rule: Rule
    classes: Classes
    tables: Mapping[tuple[str, str], _Table]
    prefer: Sequence[str]
    dropped: list[Dropped]
    note: Progress

    def __post_init__(self):
        self._held_out: dict[str, str] = {}  # id -> 'k400 val', the first table that has it
        for split in self.rule.held_out:
            for source in SETS:
                for clip in self.tables[source, split].clips:
                    self._held_out.setdefault(clip.youtube_id, f'{source} {split}')
        self._files = {
            source: find_videos(self.inputs[source].videos, self.note)
            for source in SETS
            if self.inputs[source].videos
        }
        self._broken = {
            source: set().union(*map(read_broken, self.inputs[source].broken)) for source in SETS
        }
        self._duplicates: Counter[str] = Counter()

    def train(self) -> list[Clip]:
        """The training list."""
        kept = []
        for source in SETS:
            self.note(f'sorting {source} train', 0)
            for clip in self.tables[source, 'train'].clips:
                table = self._held_out.get(clip.youtube_id)
                if table:
                    self.dropped.append(Dropped(clip, 'train', 'leaked', table))
                else:
                    kept.append(clip)
        return self.unique('train', self._readable('train', kept))

    def train_lists(self) -> dict[str, tuple[Clip, ...]]:
        """The training list of each set by itself: only its own tables are held out."""
        own = {
            source: {
                clip.youtube_id: f'{source} {split}'
                for split in self.rule.held_out
                for clip in self.tables[source, split].clips
            }
            for source in SETS
        }
        return self._set_lists('train', own)

    def val_lists(self, in_training: Iterable[str]) -> dict[str, tuple[Clip, ...]]:
        """The validation list of each set."""
        leaked = dict.fromkeys(in_training if self.rule.clean_val else (), 'train')
        return self._set_lists('val', dict.fromkeys(SETS, leaked))

    def _set_lists(
        self, split: str, leaked: Mapping[str, Mapping[str, str]]
    ) -> dict[str, tuple[Clip, ...]]:
        """What is left of the tables of a split; `leaked` is set -> id -> where else it is."""
        lists = {}
        for source in SETS:
            name = f'{split}_{source}'
            kept = []
            for clip in self.tables[source, split].clips:
                table = leaked[source].get(clip.youtube_id)
                if table:
                    self.dropped.append(Dropped(clip, name, 'leaked', table))
                else:
                    kept.append(clip)
            kept = sorted(self._readable(name, kept))
            once = []
            for clip in kept:
                if once and clip == once[-1]:
                    self.dropped.append(Dropped(clip, name, 'duplicate', 'the same row'))
                else:
                    once.append(clip)
            lists[source] = tuple(once)
        return lists

    def _readable(self, list_name: str, clips: Iterable[Clip]) -> Iterator[Clip]:
        """Rows with a file that can be read, as far as that is known; their paths are filled in."""
        for clip in clips:
            files, broken = self._files.get(clip.source), self._broken[clip.source]
            if files is not None:
                path = find_file(clip, files)
                if not path:
                    self.dropped.append(Dropped(clip, list_name, 'missing', trimmed_name(clip)))
                    continue
                clip = clip._replace(path=path)
            if broken:
                stem = Path(clip.path).stem
                names = {stem} if stem else {clip.youtube_id, trimmed_name(clip)}
                if names & broken:
                    self.dropped.append(Dropped(clip, list_name, 'broken', clip.path))
                    continue
            yield clip

    def unique(self, list_name: str, clips: Iterable[Clip]) -> list[Clip]:
        """One row of each id; sorted by id."""
        rank = {source: k for k, source in enumerate(self.prefer)}
        kept: list[Clip] = []
        for clip in sorted(clips, key=lambda c: (c.youtube_id, rank[c.source], *c)):
            best = kept[-1] if kept else None
            if best is None or best.youtube_id != clip.youtube_id:
                kept.append(clip)
                continue
            how = 'same_clip'
            if merged_label(self.classes, best) != merged_label(self.classes, clip):
                how = 'other_label'
            elif (best.start, best.end) != (clip.start, clip.end):
                how = 'other_window'
            where = 'within_a_set' if best.source == clip.source else 'across_sets'
            self._duplicates[f'{list_name} {where} {how}'] += 1
            because = f'{how}: {best.source} {trimmed_name(best)} {best.label}'
            self.dropped.append(Dropped(clip, list_name, 'duplicate', because))
        return kept

    def figures(
        self,
        train: Sequence[Clip],
        val: Sequence[Clip],
        train_of: Mapping[str, Sequence[Clip]],
        val_of: Mapping[str, Sequence[Clip]],
    ) -> dict[str, Any]:
        """The counts of the report."""
        lost = Counter((d.list_name, d.clip.source, d.reason) for d in self.dropped)
        kept = {'train': Counter(c.source for c in train), 'val': Counter(c.source for c in val)}

        def counts(list_name: str, source: str, rows: int, left: int) -> dict[str, int]:
            return {
                'input': rows,
                **{reason: lost[list_name, source, reason] for reason in REASONS},
                'kept': left,
            }

        ids = {
            key: {clip.youtube_id for clip in table.clips}
            for key, table in self.tables.items()
            if table.clips
        }
        held_out = [key for split in ('val', 'test') for s in SETS if (key := (s, split)) in ids]
        return {
            'train': {
                s: counts('train', s, len(self.tables[s, 'train'].clips), kept['train'][s])
                for s in SETS
            },
            **{
                f'{split}_of_sets': {
                    s: counts(f'{split}_{s}', s, len(self.tables[s, split].clips), len(lists[s]))
                    for s in SETS
                }
                for split, lists in (('train', train_of), ('val', val_of))
            },
            'val': {s: counts('val', s, len(val_of[s]), kept['val'][s]) for s in SETS},
            'total': {'train': len(train), 'val': len(val)},
            'duplicates': dict(sorted(self._duplicates.items())),
            # Ids of training tables in held-out tables, before and after the merge.
            'ids_shared_before': {
                f'{s} train': {
                    f'{other} {split}': len(ids[s, 'train'] & ids[other, split])
                    for other, split in held_out
                }
                for s in SETS
            },
            'ids_shared_after': self._shared_after(train, val_of, ids),
        }

    def _shared_after(
        self,
        train: Sequence[Clip],
        val_of: Mapping[str, Sequence[Clip]],
        ids: Mapping[tuple[str, str], set[str]],
    ) -> dict[str, int]:
        """Ids of the training list in each validation list and in each test table."""
        training = {clip.youtube_id for clip in train}
        left = {f'{s} val': {clip.youtube_id for clip in val_of[s]} for s in SETS}
        left |= {f'{s} test': ids[s, 'test'] for s in SETS if (s, 'test') in ids}
        return {name: len(training & held) for name, held in left.items()}


LIST_COLUMNS = (
    'label',
    'youtube_id',
    'time_start',
    'time_end',
    'split',
    'source',
    'native_label',
    'merged_label',
)


def write_lists(merged: Merge, folder: str | os.PathLike, root: str = '') -> None:
    """Writes names, lists and index arrays; the same merge gives the same bytes.

    names.txt, names_SET.txt       class names, one a line
    classes.csv                    id, name, training videos by set, training and validation videos
    index.json                     merged names; for each set its names and their merged indices
    train.csv, val.csv             label is the merged name
    train_SET.csv, val_SET.csv     label is the set's own name
    *.txt                          'path index' lines of these lists, where files were looked up;
                                   *_SET_as_k710.txt has merged indices
    dropped.csv                    for each list the rows that it lost, and why

    Args:
      merged: the outcome.
      folder: an empty folder.
      root: folder that paths are written from; '' writes them as they were found.
    """
    folder, classes = Path(folder), merged.classes
    place = {name: k for k, name in enumerate(classes.names)}
    _write_lines(folder / 'names.txt', classes.names)
    index: dict[str, Any] = {'names': classes.names}
    for source in SETS:
        names = classes.native[source]
        _write_lines(folder / f'names_{source}.txt', names)
        index[source] = {'names': names, 'index': classes.index[source]}
    (folder / 'index.json').write_text(json.dumps(index, indent=0) + '\n', encoding='utf-8')
    _write_csv(
        folder / 'classes.csv',
        ('id', 'name', *SETS, 'train', 'val'),
        ((k, name, *row) for k, (name, row) in enumerate(class_counts(merged).items())),
    )

    def write(name: str, clips: Sequence[Clip], native: bool) -> None:
        paths = [os.path.relpath(c.path, root) if root else c.path for c in clips if c.path]
        rows = []
        for clip in clips:
            label = merged_label(classes, clip)
            shown = clip.label if native else label
            rows.append((shown, *clip[:3], clip.split, clip.source, clip.label, label))
        if not paths:
            _write_csv(folder / f'{name}.csv', LIST_COLUMNS, rows)
            return
        rows = [(*row, path) for row, path in zip(rows, paths)]
        _write_csv(folder / f'{name}.csv', (*LIST_COLUMNS, 'path'), rows)
        own = {s: {name: k for k, name in enumerate(classes.native[s])} for s in SETS}
        of_merged = [f'{row[-1]} {place[row[-2]]}' for row in rows]
        if native:
            _write_lines(folder / f'{name}.txt', (f'{r[-1]} {own[r[5]][r[0]]}' for r in rows))
            _write_lines(folder / f'{name}_as_k710.txt', of_merged)
        else:
            _write_lines(folder / f'{name}.txt', of_merged)

    write('train', merged.train, native=False)
    write('val', merged.val, native=False)
    for split, lists in (('train', merged.train_of), ('val', merged.val_of)):
        for source, clips in lists.items():
            write(f'{split}_{source}', clips, native=True)
    _write_csv(
        folder / 'dropped.csv',
        ('list', 'reason', 'because', 'source', 'label', 'youtube_id', 'time_start', 'time_end'),
        (
            (d.list_name, d.reason, d.because, d.clip.source, d.clip.label, *d.clip[:3])
            for d in merged.dropped
        ),
    )


def class_counts(merged: Merge) -> dict[str, tuple[int, ...]]:
    """Merged name -> training videos of each set, all training videos, validation videos."""
    train = Counter((merged_label(merged.classes, c), c.source) for c in merged.train)
    val = Counter(merged_label(merged.classes, c) for c in merged.val)
    rows = {}
    for name in merged.classes.names:
        by_set = [train[name, source] for source in SETS]
        rows[name] = (*by_set, sum(by_set), val[name])
    return rows


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    text = ''.join(f'{line}\n' for line in lines)
    path.write_text(text, encoding='utf-8', errors='surrogateescape')  # paths are bytes


def _write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence]) -> None:
    with open(path, 'w', encoding='utf-8', errors='surrogateescape', newline='') as file:
        writer = csv.writer(file, lineterminator='\n')
        writer.writerow(header)
        writer.writerows(rows)
