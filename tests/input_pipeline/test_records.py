"""Built data sets as sources: lazy, picklable, and clear about damage."""

import contextlib
import dataclasses
import io
import json
import pickle
import shutil
import sys
import time

import numpy as np
import pytest

from dist_jax import main, recipe
from dist_jax.configs import frame_mean
from dist_jax.dataset import build
from dist_jax.tasks.classify import Classify
from input_pipeline import check, records
from input_pipeline.decode import DecodeError
from input_pipeline.packed import Texts, TextTuples
from input_pipeline.pipeline import EvalReader, TrainReader, eval_batches, open_video, train_batches
from input_pipeline.records import BuiltSplit, SplitIndex
from input_pipeline.sources import open_source


@pytest.fixture(scope='module')
def built(clips, tmp_path_factory):
    """The motion clips as a built data set, 4 records a shard."""
    out = tmp_path_factory.mktemp('built') / 'motion'
    words = ['motion_clips', '--annotations', clips, '--videos', clips, '--out', out]
    words += ['--records_per_shard', 4, '--workers', 0]
    assert build.main(list(map(str, words))) == 0
    return out


@pytest.fixture
def damaged(built, tmp_path):
    """A copy whose training shards 1, 2 and 3 are flipped, cut and gone; as (folder, shards)."""
    folder = tmp_path / 'damaged'
    shutil.copytree(built, folder)
    shards = [folder / name for name in BuiltSplit(folder, 'train').index.shards]
    content = bytearray(shards[1].read_bytes())
    video = BuiltSplit(built, 'train')[5].load()
    content[content.index(video[5000:5100]) + 50] ^= 255
    shards[1].write_bytes(content)
    shards[2].write_bytes(shards[2].read_bytes()[:66_000])
    shards[3].unlink()
    return folder, shards


def test_gives_the_records_of_the_list_it_was_built_from(built, clips):
    for split, name in (('train', 'train'), ('validation', 'val')):
        listed = open_source(clips / f'{name}.txt', label_map=clips / 'labels.txt')
        source = open_source(built, subset=split)
        assert len(source) == len(listed)
        assert source.class_names == listed.class_names
        assert source.num_classes == listed.num_classes
        assert recipe.list_sha256(source) == recipe.list_sha256(listed)
        for k in range(len(source)):
            with open(listed[k].path, 'rb') as file:
                assert source[k].load() == file.read()


def test_batches_are_those_of_the_list(built, clips):
    listed = open_source(clips / 'train.txt', label_map=clips / 'labels.txt')
    source = open_source(built, subset='train')
    for make, reader, options in (
        (train_batches, TrainReader(4, 48), {'seed': 3, 'num_steps': 5}),
        (eval_batches, EvalReader(4, 48), {}),
    ):
        ours = make(source, reader, batch_size=6, **options)
        for batch, other in zip(ours, make(listed, reader, batch_size=6, **options), strict=True):
            for name in ('video', 'label', 'mask', 'index', 'epoch'):
                np.testing.assert_array_equal(batch[name], other[name])


def test_records_pickle_small_and_open_their_shard_where_they_run(built):
    record = open_source(built, subset='train')[5]
    content = pickle.dumps(record)
    assert len(content) < 1000
    assert pickle.loads(content).load() == record.load()


def test_opening_and_listing_reads_no_shard(built, tmp_path):
    shutil.copytree(built, tmp_path / 'copy', ignore=shutil.ignore_patterns('*array_record*'))
    source = open_source(tmp_path / 'copy', subset='train')
    assert len(recipe.list_sha256(source)) == 64


def test_half_a_million_records_open_in_seconds(built, tmp_path):
    count = 500_000
    small = BuiltSplit(built, 'train').index
    index = SplitIndex(
        video_ids=Texts.pack([f'abcdefghijk_{k:06d}_{k + 10:06d}' for k in range(count)]),
        labels=np.zeros((count, 1), np.int32),
        facts={name: np.zeros(count, kind) for name, kind in records.FACTS.items()},
        num_bytes=np.zeros(count, np.int64),
        crc32=np.zeros(count, np.uint32),
        captions=TextTuples.pack([()] * count),
        shards=small.shards[:2],
        shard_lengths=np.array([count // 2] * 2),
    )
    shutil.copytree(built, tmp_path / 'large')
    (tmp_path / 'large/train.index.npz').write_bytes(index.to_bytes())
    start = time.process_time()
    source = open_source(tmp_path / 'large', subset='train')
    assert len(source) == count
    assert source[count - 1].video_id == 'abcdefghijk_499999_500009'
    assert time.process_time() - start < 3


def test_a_damaged_shard_is_named_with_its_records(damaged):
    folder, shards = damaged
    source = open_source(folder, subset='train')
    found = {}
    for k in range(len(source)):
        try:
            open_video(source[k]).close()
        except DecodeError as error:
            found[k] = error
    assert {k: error.kind for k, error in found.items()} == (
        {5: 'unreadable'}
        | dict.fromkeys(range(8, 12), 'unreadable')
        | dict.fromkeys(range(12, 16), 'missing')
    )
    assert f'{shards[1]} (records train 4 to 7): record 1 of the shard' in found[5].reason
    assert f'{shards[3]} (records train 12 to 15): no such shard' in found[12].reason
    with pytest.raises(OSError, match='records train 4 to 7'):
        source[5].load()


def test_swapped_and_stale_shards_are_named_when_a_record_is_read(built, tmp_path):
    folder = tmp_path / 'swapped'
    shutil.copytree(built, folder)
    shards = [folder / name for name in BuiltSplit(folder, 'train').index.shards]
    first = shards[0].read_bytes()
    shards[0].write_bytes(shards[1].read_bytes())
    shards[1].write_bytes(first)
    source = open_source(folder, subset='train')
    for index, shard in ((0, shards[0]), (5, shards[1])):
        with pytest.raises(
            DecodeError, match=r'not the one of the index.*build the set again'
        ) as e:
            open_video(source[index])
        assert f'{shard} (records train' in e.value.reason
    open_video(source[9]).close()


@pytest.mark.parametrize(
    'change', [{'video_id': 'another'}, {'labels': (3,)}, {'crc32': 1}, {'labels': ()}]
)
def test_a_record_must_be_the_one_of_the_index(built, change):
    load = open_source(built, subset='train')[2].load
    other = dataclasses.replace(load, expected=dataclasses.replace(load.expected, **change))
    assert load()
    with pytest.raises(OSError, match='record 2 of the shard is not the one of the index'):
        other()


def test_a_damaged_index_is_a_value_error(built, tmp_path):
    folder = tmp_path / 'copy'
    shutil.copytree(built, folder)
    index = folder / 'train.index.npz'
    whole = index.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(150):
        content = bytearray(whole)
        for place in rng.integers(0, len(content), rng.integers(1, 30)):
            content[place] = rng.integers(256)
        index.write_bytes(content[: rng.integers(len(content) // 2, 2 * len(content))])
        with contextlib.suppress(ValueError):
            source = open_source(folder, subset='train')
            assert [source[k].path for k in range(len(source))]
    with np.load(io.BytesIO(whole)) as arrays:
        fields = dict(arrays)
    for name, value in {
        'shard_lengths': np.array([10**12]),
        'shards': np.array(['../../../etc/passwd'] * len(fields['shards'])),
        'labels': np.zeros((18, 1), np.float64),
        'video_id_ends': fields['video_id_ends'][::-1],
        'crc32': fields['crc32'][:3],
    }.items():
        np.savez(index, **fields | {name: value})
        with pytest.raises(ValueError, match=r'train\.index\.npz: damaged index'):
            open_source(folder, subset='train')
    np.savez(index, **fields | {'labels': fields['labels'] + 7})
    with pytest.raises(ValueError, match='labels that are no classes'):
        open_source(folder, subset='train')
    np.savez_compressed(index, **fields)
    with pytest.raises(ValueError, match='it is compressed'):
        open_source(folder, subset='train')
    for splits, names in ((['../x'], [['a']]), ('train', [['a']]), (['train'], [[1, 2]])):
        text = json.dumps({'format': 1, 'name': 'x', 'splits': splits, 'class_names': names})
        (folder / 'index.json').write_text(text)
        with pytest.raises(ValueError, match=r'index\.json: .* build it again'):
            open_source(folder, subset='train')


def test_check_reads_a_built_set(built, damaged, tmp_path, capsys):
    report = tmp_path / 'bad.jsonl'
    words = ['--subset', 'train', '--report', str(report), '--threads', '2']
    assert check.main(['--list', str(built), *words]) == 0
    assert check.main(['--list', str(damaged[0]), *words]) == 1
    assert len(report.read_text().splitlines()) == 9
    capsys.readouterr()
    assert check.main(['--list', str(built)]) == 2
    assert 'it has train, validation' in ' '.join(capsys.readouterr().out.split())


def test_wrong_uses_are_errors_that_say_so(built, clips, tmp_path):
    for arguments, message in [
        ({'subset': 'test'}, "no split 'test', it has train, validation"),
        ({'subset': 'train', 'num_classes': 400}, '8 classes, expected num_classes=400'),
        ({'subset': 'train', 'label_map': clips / 'labels.txt'}, 'leave label_map empty'),
    ]:
        with pytest.raises(ValueError, match=message):
            open_source(built, **arguments)
    with pytest.raises(ValueError, match='mount it or copy'):
        open_source('gs://bucket/built')
    for name, content in (('train.index.npz', b'PK junk'), ('index.json', b'{"format": 99}')):
        copy = tmp_path / name
        shutil.copytree(built, copy)
        (copy / name).write_bytes(content)
        with pytest.raises(ValueError, match='build'):
            open_source(copy, subset='train')


def test_captions_are_no_classes(tmp_path, clips, monkeypatch):
    entries = [{'path': '000000.mp4', 'captions': ['one', 'two']}]
    (tmp_path / 'train.jsonl').write_text('\n'.join(map(json.dumps, entries)))
    listed = open_source(tmp_path / 'train.jsonl', label_map=clips / 'labels.txt', num_classes=8)
    words = ['custom', '--list', f'train={tmp_path}/train.jsonl', '--videos', f'{clips}/train']
    assert build.main([*words, '--out', f'{tmp_path}/built', '--workers', '0']) == 0
    built = open_source(tmp_path / 'built', num_classes=8)
    for source in (listed, pickle.loads(pickle.dumps(listed)), built):
        assert (source.class_names, source.num_classes, source.labels.shape) == ((), 0, (1, 0))
        assert (source[0].captions, source[0].label) == (('one', 'two'), ())
    assert recipe.list_sha256(listed) == recipe.list_sha256(built)
    config = frame_mean.get_config('demo')
    config.model.unroll = False
    for path in ('train.jsonl', 'built'):
        config.data.update(name='custom', train_list=str(tmp_path / path))
        with pytest.raises(ValueError, match=f'{path}: has captions and no classes'):
            recipe.open_split(config, 'train')
        with monkeypatch.context() as patch:
            patch.setattr(Classify, 'needs_classes', False)
            assert len(recipe.open_split(config, 'train')) == 1


def test_no_tensorflow_is_imported(built):
    open_source(built, subset='train')[0].load()
    assert 'tensorflow' not in sys.modules


@pytest.mark.slow
def test_train_and_evaluate_read_a_built_set(built, tmp_path):
    fields = {
        'data.train_list': built,
        'data.val_list': built,
        'num_steps': 2,
        'batch_size': 4,
        'eval.batch_size': 4,
        'data.num_frames': 4,
        'log.tensorboard': False,
    }
    words = [f'--config.{name}={value}' for name, value in fields.items()]
    workdir = f'--workdir={tmp_path}/run'
    assert main.main(['train', f'--config={frame_mean.__file__}:demo', workdir, *words]) == 0
    summary = json.loads((tmp_path / 'run/summary.json').read_text())
    assert summary['step'] == 2
    assert 0 <= summary['val_top1'] <= 1
    assert summary['num_bad_videos'] == 0
    assert main.main(['evaluate', workdir]) == 0
