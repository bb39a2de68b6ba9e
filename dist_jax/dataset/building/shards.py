"""The folder of a build: plan, finished shards, and how a shard comes to be.

    OUT/manifest.json                 arguments of the build, then counts and checksums
    OUT/NAME-SPLIT.array_record-...   finished shards
    OUT/build/plan/SPLIT-00000.jsonl  what belongs into a shard, one `Entry` a line
    OUT/build/done/SPLIT-00000.json   what came out of it; written after the shard has its name
    OUT/build/partial/                what is being written

OUT may be in a bucket (gs://...). A file appears under its final name whole or not at all. A shard
counts as built when its entry in `done` is there and the shard has the size that the entry says.
"""

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any

from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from etils import epath

from dist_jax.dataset.building.examples import VideoMaker, make_features, serialize
from dist_jax.dataset.building.plan import Entry, Options, Plan
from input_pipeline.decode import DecodeError
from input_pipeline.escape import json_text
from input_pipeline.pipeline import reading

MANIFEST = 'manifest.json'
# One record a group, for random access; videos do not compress.
_WRITER_OPTIONS = 'group_size:1,uncompressed'


class ChangedArguments(ValueError):
    """The folder holds a build with other arguments."""


@dataclass(frozen=True, order=True)
class Task:
    """One shard to build."""

    split: str
    number: int

    def __str__(self) -> str:
        return f'{self.split}-{self.number:05d}'


class BuildFolder:
    """A folder that holds a data set or becomes one.

    Attributes:
      path: the folder.
      manifest: content of its manifest.
      options: of the build.
    """

    def __init__(self, path: str | os.PathLike):
        """Opens a folder with a manifest.

        Raises:
          ValueError: if it has none.
        """
        self.path = epath.Path(path)
        try:
            self.manifest = json.loads((self.path / MANIFEST).read_bytes())
            known = {field.name for field in fields(Options)}
            arguments = self.manifest['arguments']
            self.options = Options(**{k: v for k, v in arguments.items() if k in known})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f'{self.path / MANIFEST}: not the manifest of a build: {error}'
            ) from error

    @property
    def name(self) -> str:
        """Of the data set."""
        return self.manifest['name']

    @property
    def class_names(self) -> tuple[tuple[str, ...], ...]:
        """Of each head; () in sets of captions."""
        return tuple(map(tuple, self.manifest['class_names']))

    @property
    def several(self) -> bool:
        """Whether a video has any number of classes."""
        return self.manifest.get('several', False)

    @property
    def splits(self) -> dict[str, int]:
        """Number of shards by split."""
        return {name: split['num_shards'] for name, split in self.manifest['splits'].items()}

    def tasks(self) -> list[Task]:
        """All shards."""
        return [Task(split, k) for split, count in self.splits.items() for k in range(count)]

    def shard_name(self, task: Task) -> str:
        """File name of a shard, as TFDS wants it."""
        of = self.splits[task.split]
        return f'{self.name}-{task.split}.array_record-{task.number:05d}-of-{of:05d}'

    def entries(self, task: Task) -> list[Entry]:
        """What belongs into a shard."""
        lines = (_plan_folder(self.path) / f'{task}.jsonl').read_bytes().decode().split('\n')
        return [Entry.from_json(line) for line in lines if line]

    def result(self, task: Task) -> dict[str, Any] | None:
        """What came out of a shard; None if it is not built."""
        path = self.path / 'build' / 'done' / f'{task}.json'
        try:
            result = json.loads(path.read_bytes())
            size = (self.path / self.shard_name(task)).stat().length
        except (OSError, ValueError):
            return None
        return result if size == result['file_bytes'] else None

    def results(self, tasks: Sequence[Task]) -> list[dict[str, Any] | None]:
        """The `result` of each; many at a time, for buckets answer slowly."""
        with ThreadPoolExecutor(16) as pool:
            return list(pool.map(self.result, tasks))

    def write(self, name: str, text: str | bytes) -> None:
        """Puts a file in place, whole or not at all; `name` is relative to the folder."""
        write_whole(self.path / name, text)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keeps other builds out, where the file system can.

        Raises:
          ValueError: if one is at work.
        """
        if _in_bucket(self.path):
            yield
            return
        with open(self.path / 'build' / 'lock', 'w') as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ValueError(f'{self.path}: another build is at work in this folder') from error
            yield


def _plan_folder(path: epath.Path) -> epath.Path:
    return path / 'build' / 'plan'


def _in_bucket(path: epath.Path) -> bool:
    return '://' in os.fspath(path)


def write_whole(path: epath.Path, text: str | bytes) -> None:
    """Writes a file and gives it its name when all of it is on disk."""
    content = text.encode() if isinstance(text, str) else text
    if _in_bucket(path):  # an object is whole or not there
        path.write_bytes(content)
        return
    partial = path.with_name(f'.{path.name}.{uuid.uuid4().hex}')
    with open(partial, 'wb') as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def start_folder(path: epath.Path, arguments: Mapping[str, Any], plan: Plan) -> BuildFolder:
    """Writes plan and manifest of a new build.

    Args:
      path: a folder that is not there, is empty, or was left by a start that was cut off.
      arguments: what the result depends on; JSON.
      plan: what to build.

    Raises:
      ValueError: if something else is in the folder.
    """
    found = {entry.name for entry in path.iterdir()} if path.exists() else set()
    strange = sorted(found - {'build'})
    if strange:
        raise ValueError(f'{path}: holds {strange[0]} and no build; name a new or empty folder')
    if (path / 'build').exists():
        (path / 'build').rmtree()
    for name in ('plan', 'done', 'partial'):
        (path / 'build' / name).mkdir(parents=True)
    size = arguments['records_per_shard']
    splits = {}
    for split, entries in plan.splits.items():
        count = -(-len(entries) // size)
        splits[split] = {'num_listed': len(entries), 'num_shards': count}
        for number in range(count):
            lines = [entry.to_json() + '\n' for entry in entries[number * size :][:size]]
            file = _plan_folder(path) / f'{Task(split, number)}.jsonl'
            file.write_bytes(''.join(lines).encode())
    manifest = {
        'name': plan.name,
        'complete': False,
        'arguments': dict(arguments),
        'class_names': plan.class_names,
        **({'several': True} if plan.several else {}),
        'splits': splits,
    }
    write_whole(path / MANIFEST, json_text(manifest, indent=1) + '\n')
    return BuildFolder(path)


def continue_folder(path: epath.Path, arguments: Mapping[str, Any]) -> BuildFolder | None:
    """Opens the build of a folder if its arguments are these.

    Returns:
      The folder; None if no build was started in it.

    Raises:
      ChangedArguments: naming what differs.
    """
    if not (path / MANIFEST).exists():
        return None
    folder = BuildFolder(path)
    before, now = folder.manifest['arguments'], json.loads(json.dumps(arguments))
    changed = [
        f'  {name}: {before.get(name)!r}, now {now.get(name)!r}'
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name)
    ]
    if changed:
        raise ChangedArguments(
            f'{path}: was begun with other arguments:\n' + '\n'.join(changed) + '\nGive the same '
            'ones to continue, another --out for another data set, or delete the folder.'
        )
    return folder


class ShardBuilder:
    """Builds shards of a folder, one after the other."""

    def __init__(self, path: str | os.PathLike):
        """Opens the folder; everything else is read from it, on any machine that sees it."""
        self._folder = BuildFolder(path)
        self._features = make_features(self._folder.class_names, self._folder.several)

    def build(
        self,
        task: Task,
        given_up: Mapping[int, tuple[str, str]] | None = None,
        progress: Callable[[int], None] = lambda position: None,
    ) -> dict[str, Any]:
        """Builds a shard, or finds it built.

        Args:
          task: which one.
          given_up: videos that are left out, position in the plan -> (kind, reason).
          progress: called with the position of a video before it is read.

        Returns:
          What came out: the content of its file in `done`.
        """
        folder = self._folder
        result = folder.result(task)
        if result is not None:
            return result
        with self._room() as room:
            partial = os.path.join(room, f'{task}.{uuid.uuid4().hex}')
            rows, problems = self._write(partial, task, given_up or {}, progress)
            stored = ArrayRecordReader(partial).num_records()
            if stored != len(rows):
                raise OSError(
                    f'{partial}: holds {stored} of {len(rows)} records; is the disk full?'
                )
            with open(partial, 'rb+') as file:
                os.fsync(file.fileno())
                checksum = hashlib.file_digest(file, 'sha256').hexdigest()
                size = file.tell()
            shard = folder.path / folder.shard_name(task)
            if _in_bucket(shard):
                with open(partial, 'rb') as source, shard.open('wb') as target:
                    shutil.copyfileobj(source, target, 2**22)
            else:
                os.replace(partial, shard)
        result = {'file_bytes': size, 'sha256': checksum, 'rows': rows, 'problems': problems}
        text = json_text(result)
        folder.write(f'build/done/{task}.json', text)
        return json.loads(text)

    @contextmanager
    def _room(self) -> Iterator[str]:
        """A local folder for a shard that is being written; a shard is moved from it if it can."""
        if not _in_bucket(self._folder.path):
            yield os.fspath(self._folder.path / 'build' / 'partial')
            return
        with tempfile.TemporaryDirectory(prefix='build_dataset_') as room:
            yield room

    def _write(
        self,
        partial: str,
        task: Task,
        given_up: Mapping[int, tuple[str, str]],
        progress: Callable[[int], None],
    ) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
        """Writes the videos of a shard; returns rows for the index, and what is left out."""
        rows, problems = [], []
        maker = VideoMaker(self._folder.options)
        writer = ArrayRecordWriter(partial, _WRITER_OPTIONS)
        try:
            for position, entry in enumerate(self._folder.entries(task)):
                progress(position)
                problem = given_up.get(position, entry.problem)
                if problem is None:
                    try:
                        with reading(entry.name):
                            video = maker.make(entry)
                    except DecodeError as error:
                        problem = error.kind, error.reason
                        maker.close()  # the next part of the same file may have more luck
                if problem is not None:
                    problems.append(_problem(entry, *problem))
                    continue
                writer.write(serialize(self._features, task.split, entry, video))
                rows.append(
                    {
                        'video_id': entry.video_id,
                        'label': entry.label,
                        'captions': entry.captions,
                        'num_bytes': len(video.content),
                        'crc32': video.crc32,
                        **video.facts,
                    }
                )
        finally:
            maker.close()
            writer.close()
        return rows, problems


def _problem(entry: Entry, kind: str, reason: str) -> dict[str, str]:
    fields_ = asdict(entry)
    return {name: fields_[name] for name in ('where', 'video_id', 'name')} | {
        'kind': kind,
        'reason': reason,
    }
