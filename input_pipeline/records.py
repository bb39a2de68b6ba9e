"""Data sets built by `dist_jax dataset build`: encoded videos in shards, and an index beside them.

The shards are ArrayRecord files of `tf.train.Example` messages in the layout of TFDS, which reads
them without TensorFlow: `tfds.builder_from_directory(folder).as_data_source(split)`. The index,
`index.json` and one file of arrays a split, has all but the videos: opening a split, going through
its ids and labels or reading its captions opens no shard. A record gets its bytes when asked.
"""

import functools
import io
import os
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from input_pipeline.escape import json_text
from input_pipeline.label_sets import LabelSets
from input_pipeline.list_formats import choose_split
from input_pipeline.packed import Texts, TextTuples
from input_pipeline.regular_files import open_regular
from input_pipeline.text_files import quoted, read_json
from input_pipeline.video_list import Label, Names, Record

INDEX = 'index.json'
FORMAT = 1  # of the index
SETS_FORMAT = 2  # of one whose videos have any number of classes
# One number a video, in the index and in its Example.
FACTS = {
    'num_frames': np.int32,
    'fps': np.float64,
    'duration': np.float64,
    'height': np.int32,
    'width': np.int32,
}
SETS_FEATURE = 'labels'  # of an Example that has any number of classes
_MAX_OPEN_SHARDS = 128  # of a process: each takes a file descriptor
_READER_OPTIONS = 'readahead_buffer_size:0,max_parallelism:0'  # random access


class ShardError(OSError):
    """A shard, or a record in it, that cannot be read."""


@dataclass(frozen=True)
class SplitIndex:
    """What the index knows of a split, N records in S shards.

    Attributes:
      video_ids: N names.
      labels: (N, heads) int32; no heads in sets of captions. `LabelSets` where a video may have any
        number of classes.
      facts: arrays (N,) by the names of `FACTS`.
      num_bytes: (N,) int64, of the encoded video.
      crc32: (N,) uint32, of the encoded video.
      captions: N tuples, all () in sets of classes.
      shards: S file names.
      shard_lengths: (S,) int64, records of each.
    """

    video_ids: Texts
    labels: np.ndarray | LabelSets
    facts: Mapping[str, np.ndarray]
    num_bytes: np.ndarray
    crc32: np.ndarray
    captions: TextTuples
    shards: tuple[str, ...]
    shard_lengths: np.ndarray

    def to_bytes(self) -> bytes:
        """The content of its file: a numpy archive."""
        file = io.BytesIO()
        labels = {'labels': self.labels}
        if isinstance(self.labels, LabelSets):
            labels = {'labels': self.labels.classes, _LABEL_ENDS: self.labels.ends}
        np.savez(
            file,
            video_ids=self.video_ids.content,
            video_id_ends=self.video_ids.ends,
            **labels,
            num_bytes=self.num_bytes,
            crc32=self.crc32,
            captions=self.captions.texts.content,
            caption_text_ends=self.captions.texts.ends,
            caption_ends=self.captions.ends,
            shards=np.array(self.shards),
            shard_lengths=self.shard_lengths,
            **self.facts,
        )
        return file.getvalue()

    @classmethod
    def from_file(cls, path: Path) -> 'SplitIndex':
        """Reads what `to_bytes` gave; raises ValueError if the file is damaged."""
        try:
            with open_regular(path) as file, np.load(file, allow_pickle=False) as arrays:
                _refuse_compressed(arrays.zip)
                index = cls(
                    video_ids=Texts(arrays['video_ids'], arrays['video_id_ends']),
                    labels=_read_labels(arrays),
                    facts={name: arrays[name] for name in FACTS},
                    num_bytes=arrays['num_bytes'],
                    crc32=arrays['crc32'],
                    captions=TextTuples(
                        Texts(arrays['captions'], arrays['caption_text_ends']),
                        arrays['caption_ends'],
                    ),
                    shards=tuple(arrays['shards'].tolist()),
                    shard_lengths=arrays['shard_lengths'],
                )
            index.check()
        except FileNotFoundError as error:
            raise ValueError(
                f'{path}: the index of this split is missing; build it again'
            ) from error
        except Exception as error:  # numpy and zipfile raise what they like
            raise ValueError(f'{path}: damaged index ({error}); build the set again') from error
        return index

    def check(self) -> None:
        """Raises ValueError if the arrays are not of the kinds and lengths that belong together."""
        count = len(self.labels)
        columns = {**self.facts, 'num_bytes': self.num_bytes, 'crc32': self.crc32}
        for name, column in columns.items():
            if column.shape != (count,) or column.dtype.kind not in 'iuf':
                raise ValueError(f'{name} has shape {column.shape}, not {(count,)}')
        labels, ndim = self.labels, 2
        if isinstance(labels, LabelSets):
            _check_ends('labels', labels.ends, count, len(labels.classes))
            labels.check()
            labels, ndim = labels.classes, 1
        if labels.ndim != ndim or labels.dtype.kind != 'i':
            raise ValueError(f'labels have shape {labels.shape}')
        captions = self.captions.texts
        for name, texts, length in (
            ('video_ids', self.video_ids, count),
            ('captions', captions, len(captions)),
        ):
            if texts.content.dtype != np.uint8 or texts.content.ndim != 1 or len(texts) != length:
                raise ValueError(f'{name} are {len(texts)} texts, expected {length}')
            _check_ends(name, texts.ends, length, len(texts.content))
        _check_ends('captions', self.captions.ends, count, len(captions))
        # UnicodeDecodeError is a ValueError; ids are names of files, which may be any bytes.
        captions.content.tobytes().decode()
        if self.shard_lengths.shape != (len(self.shards),) or self.shard_lengths.dtype.kind != 'i':
            raise ValueError(f'{len(self.shards)} shards, {self.shard_lengths.shape} lengths')
        if (self.shard_lengths < 0).any() or self.shard_lengths.sum() != count:
            raise ValueError(f'the shards do not hold {count} records together')
        for shard in self.shards:
            if not isinstance(shard, str) or os.path.basename(shard) != shard or not shard:
                raise ValueError(f'{quoted(shard)} is not the name of a shard')


_LABEL_ENDS = 'label_ends'


def _read_labels(arrays: Mapping[str, np.ndarray]) -> np.ndarray | LabelSets:
    labels = arrays['labels']
    return LabelSets(labels, arrays[_LABEL_ENDS]) if _LABEL_ENDS in arrays else labels


def _refuse_compressed(archive: zipfile.ZipFile) -> None:
    """An index is stored as it is: no array is larger than the file."""
    if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
        raise ValueError('it is compressed')


def _check_ends(name: str, ends: np.ndarray, count: int, total: int) -> None:
    if ends.shape != (count,) or ends.dtype.kind not in 'iu':
        raise ValueError(f'the ends of {name} have shape {ends.shape}, not {(count,)}')
    if count and (ends[0] < 0 or (np.diff(ends) < 0).any() or ends[-1] > total):
        raise ValueError(f'the ends of {name} are not in order')


class BuiltSplit:
    """A split of a built data set; a source of records.

    Attributes:
      folder: of the data set.
      name: of the split.
      class_names: names by class index; one tuple per head where labels are tuples; () in sets of
        captions.
      num_classes: number of classes, or one number per head; 0 in sets of captions.
      labels: (N, heads) int32; `LabelSets` where a video may have any number of classes.
      index: all that is known of the records.
    """

    def __init__(
        self, folder: str | os.PathLike, name: str = '', purpose: str = '', several: bool = False
    ):
        """Reads the index of a split.

        Args:
          folder: of the data set.
          name: of the split; '' for the only one, or the one that the purpose means.
          purpose: see `sources.open_source`.
          several: likewise: records have sets of classes, of one each where the set has labels.

        Raises:
          ValueError: if it has no such split or the index is damaged.
        """
        self.folder = Path(folder)
        content = read_index(self.folder)
        splits = content['splits']
        if not name:
            name = choose_split(splits, str(folder), name, purpose)
        if not name and len(splits) == 1:
            name = splits[0]
        if name not in splits:
            raise ValueError(
                f'{self.folder}: no split {name!r}, it has {", ".join(splits)}; name one as subset'
            )
        self.name = name
        heads = tuple(map(tuple, content['class_names']))
        self.class_names: Names | tuple[Names, ...] = heads if len(heads) > 1 else sum(heads, ())
        sizes = tuple(map(len, heads))
        self.num_classes = sizes if len(heads) > 1 else sum(sizes)
        self.index = SplitIndex.from_file(self.folder / index_file(name))
        self.labels = labels = self.index.labels
        sets = isinstance(labels, LabelSets)
        known = labels.classes[:, None] if sets else labels
        fits = known.shape[1] == len(heads) and sets == (content['format'] == SETS_FORMAT)
        if not fits or ((known < 0) | (known >= sizes)).any():
            raise ValueError(
                f'{self.folder / index_file(name)}: has labels that are no classes of {INDEX}; '
                'build the set again'
            )
        if several and len(heads) > 1:
            raise ValueError(
                f'{self.folder}: has a label for each of {len(heads)} heads, where any number of '
                'classes of one head is expected'
            )
        if several and heads and not sets:
            self.labels = LabelSets(labels[:, 0], np.arange(1, len(labels) + 1))
        self._starts = np.concatenate([[0], np.cumsum(self.index.shard_lengths)])

    def __len__(self) -> int:
        return len(self.index.labels)

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(f'record {index} of {len(self)} in {self.folder}, {self.name}')
        shard, position = self.place(index)
        path = os.fspath(self.folder / self.index.shards[shard])
        first, stop = self._starts[shard : shard + 2].tolist()
        return Record(
            f'{path}[{position}]',
            _plain(self.labels[index]),
            self.index.video_ids[index],
            load=_Load(path, position, f'{self.name} {first} to {stop - 1}', self.expected(index)),
            captions=self.index.captions[index],
        )

    def expected(self, index: int) -> 'Identity':
        """What the record must be, by the index."""
        own = self.index.labels[index]
        return Identity(
            self.index.video_ids[index],
            tuple(sorted(own) if isinstance(own, frozenset) else own.tolist()),
            int(self.index.crc32[index]),
        )

    def place(self, index: int) -> tuple[int, int]:
        """Number of the shard of a record, and the position of the record in it."""
        shard = int(np.searchsorted(self._starts, index, side='right')) - 1
        return shard, index - int(self._starts[shard])


def _plain(labels: np.ndarray | frozenset[int]) -> Label:
    """The label of a record: numbers that may go into JSON."""
    if isinstance(labels, frozenset):
        return labels
    heads = labels.tolist()
    return heads[0] if len(heads) == 1 else tuple(heads)


@dataclass(frozen=True, slots=True)
class Identity:
    """By what a record is recognised.

    Attributes:
      video_id: name in the data set.
      labels: class index per head, or all classes, ascending.
      crc32: of the encoded video.
    """

    video_id: str
    labels: tuple[int, ...]
    crc32: int

    @classmethod
    def of_example(cls, example: Mapping) -> 'Identity':
        """Of a record, as `read_example` gives it."""
        heads = [name for name in ('label', 'label_2') if name in example]
        labels = [example[name].int64_list.value[0] for name in heads]
        if SETS_FEATURE in example:
            labels = example[SETS_FEATURE].int64_list.value
        return cls(
            os.fsdecode(example['video_id'].bytes_list.value[0]),
            tuple(labels),
            zlib.crc32(example['video'].bytes_list.value[0]),
        )


@dataclass(frozen=True, slots=True)
class _Load:
    """Gives the encoded video of a record; pickles as it is, and opens the shard where it runs.

    A shard from another build, or under another's name, would give videos with labels that are not
    theirs: what the record says of itself must be what the index says.

    Attributes:
      shard: file.
      position: of the record in it.
      span: the records of the shard, for messages.
      expected: what the index says of the record.
    """

    shard: str
    position: int
    span: str
    expected: Identity

    def __call__(self) -> bytes:
        example = read_example(self.shard, self.position, self.span)
        try:
            found = Identity.of_example(example)
        except (KeyError, IndexError) as error:
            found = f'no record of a data set ({error!r})'
        if found != self.expected:
            raise ShardError(
                f'{self.shard} (records {self.span}): record {self.position} of the shard is not '
                f'the one of the index: it has {found}, the index {self.expected}. The shard is '
                "another build's or was renamed: copy it again, with index.json and the .npz "
                'files of the same build, or build the set again'
            )
        return example['video'].bytes_list.value[0]


def read_example(shard: str, position: int, span: str = ''):
    """Reads a record of a shard.

    Args:
      shard: file.
      position: of the record in it, from 0.
      span: the records of the shard, for messages.

    Returns:
      Features of a `tf.train.Example` by name.

    Raises:
      ShardError: naming the shard, if it cannot be read.
    """
    # TFDS takes half a second to import; who reads lists of files does not need it.
    from tensorflow_datasets.proto import tf_example_pb2

    if not os.path.isfile(shard):  # nor a FIFO, which would be waited for
        raise FileNotFoundError(f'{shard} (records {span}): no such shard')
    try:
        content = _open_shard(shard).read([position])[0]
        return tf_example_pb2.Example.FromString(content).features.feature
    except Exception as error:  # ArrayRecord and protobuf raise what they like
        reason = ' '.join(str(error).split()) or type(error).__name__
        raise ShardError(
            f'{shard} (records {span}): record {position} of the shard cannot be read: {reason}'
        ) from error


@functools.lru_cache(maxsize=_MAX_OPEN_SHARDS)
def _open_shard(shard: str) -> ArrayRecordReader:
    open_regular(shard).close()  # the library would wait for a FIFO
    return ArrayRecordReader(shard, _READER_OPTIONS)


def index_file(split: str) -> str:
    """Name of the file with the arrays of a split."""
    return f'{split}.index.npz'


def is_built(path: str | os.PathLike) -> bool:
    """Whether a path is the folder of a built data set."""
    return (Path(path) / INDEX).is_file()


def read_index(folder: Path) -> dict:
    """The content of index.json: name, splits, class_names.

    Raises:
      ValueError: if it is damaged or of another version.
    """
    path = folder / INDEX
    content = read_json(path)
    known = (FORMAT, SETS_FORMAT)
    if not isinstance(content, dict) or content.get('format') not in known:
        raise ValueError(
            f'{path}: not the index of a data set in format {FORMAT} or {SETS_FORMAT}; build it '
            'again'
        )
    splits, heads = content.get('splits'), content.get('class_names')
    if not _are_texts(splits) or not all(split.isidentifier() for split in splits):
        raise ValueError(f'{path}: splits must be names, found {quoted(splits)}; build it again')
    if not isinstance(heads, list) or not all(_are_texts(names) for names in heads):
        raise ValueError(f'{path}: class_names must be lists of names; build it again')
    return content


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def index_text(
    name: str, splits: Sequence[str], class_names: Sequence[Names], several: bool = False
) -> str:
    """What belongs into index.json; it completes a data set and is written last."""
    content = {
        'format': SETS_FORMAT if several else FORMAT,
        'name': name,
        'splits': list(splits),
        'class_names': list(map(list, class_names)),
    }
    return json_text(content, indent=1) + '\n'


def open_built(
    folder: str | os.PathLike,
    subset: str = '',
    num_classes: int | tuple[int, ...] = 0,
    purpose: str = '',
    several: bool = False,
) -> BuiltSplit:
    """Opens a split of a built data set.

    Args:
      folder: of the data set.
      subset: name of the split; '' for the only one.
      num_classes: expected number of classes, one per head; 0 for whatever comes. Nothing is
        expected of captions.
      several: see `BuiltSplit`.
      purpose: see `sources.open_source`.

    Raises:
      ValueError: if there is no such split, or it has other classes.
    """
    source = BuiltSplit(folder, subset, purpose, several)
    if source.class_names and num_classes and source.num_classes != num_classes:
        raise ValueError(
            f'{folder}: {source.num_classes} classes, expected num_classes={num_classes}; name the '
            'data set that it was built from, or use the data set "custom"'
        )
    return source
