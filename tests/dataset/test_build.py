"""Original annotation files and videos to shards, through the command."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
import zlib

import cv2
import numpy as np
import psutil
import pytest
import tensorflow_datasets as tfds
from buckets import stand_in_for_buckets
from etils import epath
from PIL import Image
from video_files import pictures, write_video

from dist_jax import recipe
from dist_jax.configs import base
from dist_jax.configs.inputs import INPUTS
from dist_jax.dataset import build as command
from dist_jax.dataset.building.shards import ShardBuilder
from input_pipeline.datasets import DATASETS
from input_pipeline.decode import VideoReader
from input_pipeline.pipeline import train_batches
from input_pipeline.records import BuiltSplit


@pytest.fixture(scope='session')
def video(tmp_path_factory):
    """The bytes of a small video of 12 frames."""
    path = tmp_path_factory.mktemp('video') / 'v.mp4'
    return write_video(path, pictures(12, 32, 48)).read_bytes()


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def build(name, folder, *arguments, code=0):
    words = [name, '--out', f'{folder}/out', '--workers', '0', *map(str, arguments)]
    assert command.main(words) == code
    return folder / 'out'


def numbered(count):
    return [f'class {k:03d}' for k in range(count)]


def kinetics(count):
    def make(folder, video):
        header = 'label,youtube_id,time_start,time_end,split\n'
        for split, file in (('train', 'train'), ('validate', 'val')):
            lines = [f'{n},id_{split}{k:06d},3,13,{split}' for k, n in enumerate(numbered(count))]
            put(folder / 'lists' / f'{file}.csv', header + '\n'.join(lines))
            for k in (2, 5):
                name = f'id_{split}{k:06d}_000003_000013.mp4'
                put(folder / 'videos' / split / numbered(count)[k] / name, video)
        return {'train': [2, 5], 'validation': [2, 5]}

    return make


def kinetics710(folder, video):
    names = numbered(710)[::-1]
    put(folder / 'lists/names.txt', '\n'.join(names))
    header = 'label,youtube_id,time_start,time_end,split,source\n'
    # As merge-kinetics writes it: with the file, of two of this name.
    text = f'{header.strip()},path\n{names[7]},abc,0,10,train,k600,k600/abc_000000_000010.mp4\n'
    put(folder / 'lists/train.csv', text)
    put(folder / 'videos/k400/abc_000000_000010.mp4', b'another')
    put(folder / 'lists/val.csv', f'{header}{names[0]},def,0,10,val,k400\n')
    put(folder / 'videos/k600/abc_000000_000010.mp4', video)
    put(folder / 'videos/k400/def_000000_000010.mp4', video)
    return {'train': [7], 'validation': [0]}


def something_v1(folder, video):
    names = [*numbered(173), 'Putting one, two and three']
    put(folder / 'lists/something-something-v1-labels.csv', '\n'.join(names))
    put(folder / 'lists/something-something-v1-train.csv', f'100;{names[173]}\n101;class 001\n')
    put(folder / 'lists/something-something-v1-validation.csv', '102;class 003\n')
    for name in ('100', '101', '102'):
        for k, picture in enumerate(pictures(5, 32, 48, int(name)), 1):
            jpeg = cv2.imencode('.jpg', picture)[1].tobytes()
            put(folder / 'videos' / name / f'{k:05d}.jpg', jpeg)
    return {'train': [173, 1], 'validation': [3]}


def something_v2(folder, video):
    labels = {name: str(k) for k, name in enumerate(numbered(174))}
    put(folder / 'lists/something-something-v2-labels.json', json.dumps(labels))
    for split, template in (('train', 'class [004]'), ('validation', 'class [000]')):
        entries = [{'id': f'{split}1', 'template': template, 'label': 'x', 'placeholders': []}]
        put(folder / f'lists/something-something-v2-{split}.json', json.dumps(entries))
        put(folder / f'videos/{split}1.webm', video)
    return {'train': [4], 'validation': [0]}


def ucf101(folder, video):
    names = [f'Class{k:03d}' for k in range(101)]
    put(folder / 'lists/classInd.txt', '\n'.join(f'{k} {n}' for k, n in enumerate(names, 1)))
    for fold in (1, 2, 3):
        line = f'Class{fold:03d}/v_Class{fold:03d}_g01_c01.avi'
        put(folder / f'lists/trainlist0{fold}.txt', f'{line} {fold + 1}\n')
        put(folder / f'lists/testlist0{fold}.txt', f'{line}\n')
        put(folder / 'videos' / line, video)
    return {f'{kind}{fold}': [fold] for fold in (1, 2, 3) for kind in ('train', 'test')}


def hmdb51(folder, video):
    for k in range(51):
        for fold in (1, 2, 3):
            lines = [f'v{j}.avi {1 + (j == fold) if j else 0}' for j in range(4)]
            put(folder / f'lists/act{k:02d}_test_split{fold}.txt', '\n'.join(lines))
    for j in range(1, 4):
        put(folder / f'videos/act07/v{j}.avi', video)
    found = {f'train{fold}': [7, 7] for fold in (1, 2, 3)}
    return found | {f'test{fold}': [7] for fold in (1, 2, 3)}


def epic_kitchens(folder, video):
    for kind, count, edition in (('verb', 97, ''), ('noun', 300, '_v2')):
        lines = [f'{k},{kind}{k},"[\'{kind}{k}\']"' for k in range(count)]
        text = 'id,key,instances\n' + '\n'.join(lines)
        put(folder / f'lists/EPIC_100_{kind}_classes{edition}.csv', text)
    header = (
        'narration_id,participant_id,video_id,start_timestamp,stop_timestamp,verb_class,noun_class'
    )
    for split in ('train', 'validation'):
        lines = [
            'P01_01_0,P01,P01_01,00:00:00.10,00:00:00.30,3,250',
            'P01_01_1,P01,P01_01,00:00:00.20,00:00:00.40,4,1',
        ]
        put(folder / f'lists/EPIC_100_{split}.csv', '\n'.join([header, *lines]))
    put(folder / 'videos/P01/videos/P01_01.MP4', video)
    return {'train': [(3, 250), (4, 1)], 'validation': [(3, 250), (4, 1)]}


def msrvtt(folder, video):
    splits = ('train', 'train', 'validate', 'test')
    content = {
        'videos': [{'video_id': f'video{k}', 'split': s, 'id': k} for k, s in enumerate(splits)],
        'sentences': [
            {'caption': f'text {j} of {k}', 'video_id': f'video{k}', 'sen_id': 2 * k + j}
            for k in range(4)
            for j in range(2)
        ],
    }
    put(folder / 'lists/MSRVTT_data.json', json.dumps(content))
    put(folder / 'lists/MSRVTT_train.9k.csv', 'video_id\nvideo0\nvideo2\n')
    text = 'key,vid_key,video_id,sentence\nret0,msr1,video3,"one, two"\n'
    put(folder / 'lists/MSRVTT_JSFUSION_test.csv', text)
    for k in range(4):
        put(folder / f'videos/video{k}.mp4', video)
    both = [(f'text 0 of {k}', f'text 1 of {k}') for k in range(4)]
    return {
        'train': both[:2],
        'validation': both[2:3],
        'test': both[3:],
        'train_9k': [both[0], both[2]],
        'test_1k': [('one, two',)],
    }


def msvd(folder, video):
    text = '# MSR Video Description Corpus\na_1_2 a cat sits\na_1_2 a cat\nb_0_9 a dogés day\n'
    put(folder / 'lists/AllVideoDescriptions.txt', text)
    put(folder / 'lists/train_list.txt', 'a_1_2\n')
    put(folder / 'lists/test_list.txt', 'b_0_9\n')
    put(folder / 'videos/a_1_2.avi', video)
    put(folder / 'videos/b_0_9.avi', video)
    return {'train': [('a cat sits', 'a cat')], 'test': [('a dogés day',)]}


def vatex(folder, video):
    for split, file in (('a', 'training_v1.0'), ('b', 'public_test_english_v1.1')):
        name = f'id-{split}_000001_000011'
        entries = [{'videoID': name, 'enCap': [f'{split} one', 'two'], 'chCap': ['一']}]
        put(folder / f'lists/vatex_{file}.json', json.dumps(entries))
        put(folder / f'videos/{name}.mp4', video)
    return {'train': [('a one', 'two')], 'test': [('b one', 'two')]}


def imagenet1k(folder, video):
    for split in ('train', 'val'):
        for k in range(1000):
            (folder / 'lists' / split / f'n{k:08d}').mkdir(parents=True)
    picture = cv2.imencode('.jpg', pictures(1)[0])[1].tobytes()
    put(folder / 'lists/train/n00000017/n00000017_1.JPEG', picture)
    put(folder / 'lists/train/n00000999/n00000999_1.JPEG', picture)
    put(folder / 'lists/val/n00000001/ILSVRC2012_val_1.JPEG', picture)
    (folder / 'videos').mkdir()
    return {'train': [17, 999], 'validation': [1]}


def charades(folder, video):
    lists = folder / 'lists'
    put(lists / 'Charades_v1_classes.txt', ''.join(f'c{k:03d} Class {k}\n' for k in range(157)))
    header = 'id,subject,scene,script,objects,descriptions,actions,length\n'
    rows = {
        'train': 'AAAAA,S1,Kitchen,"A, then\nB",cup;door,"He sits; then leaves.",'
        'c092 11.90 21.20;c147 0.00 12.60;c092 1 2,30\nBBBBB,S2,Hall,C,,D,,20.5\n',
        'test': 'CCCCC,S3,Hall,E,,F,c156 0.00 9.00,12.1\n',
    }
    for split, text in rows.items():
        put(lists / f'Charades_v1_{split}.csv', header + text)
    for name in ('AAAAA', 'BBBBB', 'CCCCC'):
        put(folder / f'videos/Charades_v1_480/{name}.mp4', video)
    return {'train': [frozenset({92, 147}), frozenset()], 'test': [frozenset({156})]}


SETS = {
    'kinetics400': kinetics(400),
    'kinetics600': kinetics(600),
    'kinetics700': kinetics(700),
    'kinetics700_2020': kinetics(700),
    'kinetics710': kinetics710,
    'something_v1': something_v1,
    'something_v2': something_v2,
    'ucf101': ucf101,
    'hmdb51': hmdb51,
    'epic_kitchens': epic_kitchens,
    'charades': charades,
    'msrvtt': msrvtt,
    'msvd': msvd,
    'vatex': vatex,
    'imagenet1k': imagenet1k,
}


def test_every_set_with_original_files_is_covered():
    original = {name for name, info in DATASETS.items() if info.splits and info.generate is None}
    assert set(SETS) == original


@pytest.mark.parametrize('name', SETS)
def test_builds_from_the_original_files(tmp_path, name, video):
    expected = SETS[name](tmp_path, video)
    encode = ['--short_side', 32] if name == 'epic_kitchens' else []
    out = build(
        name,
        tmp_path,
        '--annotations',
        tmp_path / 'lists',
        '--videos',
        tmp_path / 'videos',
        *encode,
    )
    builder = tfds.builder_from_directory(out)
    assert set(builder.info.splits) == set(expected)
    for split, wanted in expected.items():
        source, examples = BuiltSplit(out, split), builder.as_data_source(split)
        captions = DATASETS[name].captions
        found = [source[k].captions if captions else source[k].label for k in range(len(source))]
        assert found == wanted
        assert len(examples) == len(wanted)
        for k, example in enumerate(examples):
            content = source[k].load()
            assert content == example['video']
            assert zlib.crc32(content) == source.index.crc32[k]
            assert source[k].video_id == example['video_id'].decode()
            assert example['split'].decode() == split
            if captions:
                assert tuple(text.decode() for text in example['captions']) == wanted[k]
            elif isinstance(wanted[k], frozenset):
                assert sorted(wanted[k]) == list(example['labels'])
            else:
                labels = [example[n] for n in ('label', 'label_2') if n in example]
                assert labels == np.atleast_1d(wanted[k]).tolist()
            with VideoReader(content) as reader:
                assert reader.num_frames == example['num_frames']
                assert reader.num_frames == source.index.facts['num_frames'][k]
                assert reader.size == (example['height'], example['width'])
                assert reader.fps == pytest.approx(example['fps'])
    if not encode and name not in ('something_v1', 'imagenet1k'):
        assert content == video
    if name == 'something_v1':
        assert reader.num_frames == 5
        assert reader.fps == 12


def test_pictures_give_the_same_clips_from_folders_and_shards(tmp_path):
    imagenet1k(tmp_path, b'')
    picture = Image.fromarray(pictures(1)[0])
    exif = Image.Exif()
    exif[0x0112] = 6
    unlike = {'turned': ('JPEG', {'exif': exif}), 'png': ('PNG', {}), 'cmyk': ('JPEG', {})}
    for name, (kind, options) in unlike.items():
        file = tmp_path / f'lists/train/n00000500/{name}.JPEG'
        picture.convert('CMYK' if name == 'cmyk' else 'RGB').save(file, kind, **options)
    put(tmp_path / 'lists/train/n00000500/half.JPEG', file.read_bytes()[:300])
    folders = tmp_path / 'lists'
    out = build('imagenet1k', tmp_path, '--annotations', folders, '--videos', tmp_path / 'videos')
    (problem,) = json.loads((out / 'report.json').read_text())['train']['videos']
    assert problem['kind'] == 'truncated' and 'half.JPEG' in json.dumps(problem)
    (folders / 'train/n00000500/half.JPEG').unlink()

    config = base.get_config()
    config.update_from_flattened_dict(INPUTS['sts_imagenet'])
    config.data.update(name='imagenet1k', image_size=32)
    clips = {}
    for place in (folders / 'train', out):
        config.data.train_list = str(place)
        source = recipe.open_split(config, 'train')
        assert source.class_names[500] == 'n00000500'
        (batch,) = train_batches(
            source, recipe.train_reader(config), batch_size=15, seed=3, num_steps=1
        )
        assert batch['mask'].all()
        clips[place] = batch
    for key in ('video', 'label', 'index'):
        np.testing.assert_array_equal(clips[folders / 'train'][key], clips[out][key])


def test_frame_folders_keep_their_pictures(tmp_path, video):
    something_v1(tmp_path, video)
    out = build('something_v1', tmp_path, '--annotations', tmp_path / 'lists', '--videos', tmp_path)
    with VideoReader(BuiltSplit(out, 'validation')[0].load()) as reader:
        frames = reader.frames(range(5))
    for k, frame in enumerate(frames, 1):
        with VideoReader(tmp_path / f'videos/102/{k:05d}.jpg') as picture:
            np.testing.assert_array_equal(picture.frames([0])[0], frame)


def test_segments_are_the_frames_of_their_time(tmp_path, video):
    epic_kitchens(tmp_path, video)
    places = ('--annotations', tmp_path / 'lists', '--videos', tmp_path / 'videos')
    build('epic_kitchens', tmp_path, *places, code=2)  # files cannot be cut as they are
    out = build('epic_kitchens', tmp_path, *places, '--short_side', 32, '--crf', 5)
    source = BuiltSplit(out, 'train')
    with VideoReader(video) as whole:
        for k, (start, end) in enumerate([(0.1, 0.3), (0.2, 0.4)]):
            first, count = whole.frame_range(start, end)
            with VideoReader(source[k].load()) as part:
                assert part.num_frames == count == 6
                difference = whole.frames(range(first, first + 6)).astype(int) - part.frames(
                    range(6)
                )
                assert np.abs(difference).mean() < 6


@pytest.mark.parametrize(('codec', 'crf'), [('h264', 23), ('mpeg4', 3), ('jpeg', 4)])
def test_each_codec_has_a_quality_of_its_own(tmp_path, video, codec, crf):
    put(tmp_path / 'videos/v.mp4', video)
    put(tmp_path / 'train.csv', 'path,label\nv.mp4,a')
    words = ['--videos', tmp_path / 'videos', '--list', f'train={tmp_path}/train.csv']
    words += ['--short_side', 32, '--codec', codec]
    found = [
        build('custom', tmp_path / name, *words, *more).glob('*array_record*')
        for name, more in (('usual', []), ('said', ['--crf', crf]))
    ]
    usual, said = (one.read_bytes() for [one] in map(list, found))
    assert usual == said


@pytest.fixture
def listed(tmp_path, video):
    """A custom list of 23 videos with troubles, as (folder, arguments)."""
    lines = ['path,label']
    for k in range(23):
        lines.append(f'v{k:02d}.mp4,{"abc"[k % 3]}')
        put(tmp_path / f'videos/v{k:02d}.mp4', video)
    put(tmp_path / 'videos/v03.mp4', b'')
    put(tmp_path / 'videos/v05.mp4', b'<html>This video is private</html>')
    put(tmp_path / 'videos/v07.mp4', video[: len(video) // 2])
    damaged = bytearray(video)
    damaged[len(video) // 3 : len(video) // 2] = bytes(len(video) // 2 - len(video) // 3)
    put(tmp_path / 'videos/v09.mp4', bytes(damaged))
    (tmp_path / 'videos/v11.mp4').unlink()
    (tmp_path / 'videos/v12.mp4').unlink()
    put(tmp_path / 'videos/a/v12.mp4', video)
    put(tmp_path / 'videos/b/v12.mp4', video)
    put(tmp_path / 'train.csv', '\n'.join(lines))
    arguments = ['--list', f'train={tmp_path}/train.csv', '--videos', f'{tmp_path}/videos']
    return tmp_path, [*arguments, '--records_per_shard', 4]


def test_missing_and_broken_videos_are_left_out_and_reported(listed):
    folder, arguments = listed
    out = build('custom', folder, *arguments)
    report = json.loads((out / 'report.json').read_text())['train']
    kinds = {problem['video_id']: problem['kind'] for problem in report['videos']}
    assert kinds == {
        'v03': 'empty',
        'v05': 'not a video',
        'v07': 'truncated',
        'v09': 'corrupt',
        'v11': 'missing',
        'v12': 'ambiguous',
    }
    assert (report['listed'], report['stored']) == (23, 17)
    assert sum(report['dropped'].values()) == 6
    text = (out / 'report.txt').read_text()
    assert '23 listed, 17 stored' in text
    assert 'v05.mp4\tnot a video' in text
    assert json.loads((out / 'labels.json').read_text())['train'] == {
        'label': {'a': 5, 'b': 7, 'c': 5}
    }
    assert cv2.imread(str(out / 'labels.png')) is not None
    source = BuiltSplit(out)
    assert source.index.shard_lengths.tolist() == [3, 2, 2, 3, 4, 3]
    assert not (out / 'build').exists()


def test_a_shard_without_any_good_video_is_empty(tmp_path, video):
    put(tmp_path / 'train.csv', 'path,label\na.mp4,0\nb.mp4,0\nc.mp4,0\n')
    put(tmp_path / 'videos/c.mp4', video)
    arguments = ['--list', f'train={tmp_path}/train.csv', '--videos', tmp_path / 'videos']
    out = build('custom', tmp_path, *arguments, '--records_per_shard', 1)
    assert BuiltSplit(out)[0].load() == video
    assert tfds.builder_from_directory(out).as_data_source('train')[0]['video'] == video


@pytest.mark.parametrize('encode', [[], ['--short_side', 32]])
def test_what_is_no_file_and_a_failing_disk_are_left_out(tmp_path, video, encode):
    put(tmp_path / 'train.csv', 'path,label\na.mp4,0\nb.mp4,0\nc.mp4,0\n')
    put(tmp_path / 'videos/a.mp4', video)
    os.mkfifo(tmp_path / 'videos/b.mp4')
    (tmp_path / 'videos/c.mp4').symlink_to('/proc/self/mem')  # reading it is an I/O error
    arguments = ['--list', f'train={tmp_path}/train.csv', '--videos', tmp_path / 'videos']
    out = build('custom', tmp_path, *arguments, *encode, '--workers', 0)
    report = json.loads((out / 'report.json').read_text())['train']
    assert report['stored'] == 1
    reasons = [problem['reason'] for problem in report['videos']]
    assert reasons == ['is a FIFO, not a regular file', 'EIO: Input/output error']


def checksums(out):
    """Bytes of all files of a data set, without what names its place."""
    return {
        path.name: zlib.crc32(path.read_bytes())
        for path in out.iterdir()
        if path.name not in ('manifest.json', 'report.json', 'report.txt', 'labels.png')
    }


def test_any_number_of_workers_gives_the_same_bytes(listed):
    folder, arguments = listed
    arguments += ['--short_side', 24, '--keyframe_interval', 4]
    one = build('custom', folder, *arguments)
    words = ['custom', '--out', f'{folder}/two', '--workers', '2', *map(str, arguments)]
    assert command.main(words) == 0
    assert checksums(one) == checksums(folder / 'two')


@pytest.mark.slow
def test_a_killed_build_continues_to_the_same_bytes(listed):
    folder, arguments = listed
    arguments += ['--short_side', 24]
    expected = build('custom', folder, *arguments)
    out = folder / 'killed'
    words = ['custom', '--out', str(out), '--workers', '0', *map(str, arguments)]
    # More workers than one may write when the build is killed.
    started = [sys.executable, '-m', 'dist_jax', 'dataset', 'build', *words, '--workers', '2']
    kills = 0
    for number in (1, 3):
        process = subprocess.Popen(started, stdout=subprocess.DEVNULL)
        while len(list(out.glob('build/done/*.json'))) < number and process.poll() is None:
            time.sleep(0.002)
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
        assert not psutil.wait_procs(children, timeout=20)[1]  # they end with it
        for shard in out.glob('*array_record*'):  # whatever has its name is whole
            assert shard.read_bytes() == (expected / shard.name).read_bytes()
    assert kills
    assert not (out / 'index.json').exists()
    # Other arguments are refused, and change nothing.
    assert command.main([*words, '--crf', '30']) == 2
    assert command.main(words) == 0
    assert checksums(out) == checksums(expected)
    before = (out / 'manifest.json').stat().st_mtime_ns
    assert command.main(words) == 0  # complete already
    assert (out / 'manifest.json').stat().st_mtime_ns == before


def test_two_builds_in_one_folder_are_refused(listed, monkeypatch, capsys):
    folder, arguments = listed
    build_shard = ShardBuilder.build
    codes = []

    def meanwhile(self, *rest):
        monkeypatch.setattr(ShardBuilder, 'build', build_shard)
        words = ['custom', '--out', f'{folder}/out', '--workers', '0', *map(str, arguments)]
        codes.append(command.main(words))
        return build_shard(self, *rest)

    monkeypatch.setattr(ShardBuilder, 'build', meanwhile)
    build('custom', folder, *arguments)
    assert codes == [2]
    assert 'another build is at work' in capsys.readouterr().out


def test_changed_arguments_and_lists_are_named(listed, capsys):
    folder, arguments = listed
    build('custom', folder, *arguments)
    build('custom', folder, *arguments, '--short_side', 24, code=2)
    assert 'short_side: 0, now 24' in capsys.readouterr().out
    with open(folder / 'train.csv', 'a') as file:
        file.write('\nv00.mp4,a\n')
    build('custom', folder, *arguments, code=2)
    assert 'sha256' in capsys.readouterr().out


def test_a_damaged_or_foreign_folder_is_refused(listed, capsys):
    folder, arguments = listed
    put(folder / 'out/thesis.tex', 'do not lose me')
    build('custom', folder, *arguments, code=2)
    assert 'holds thesis.tex' in capsys.readouterr().out
    (folder / 'out/thesis.tex').unlink()
    out = build('custom', folder, *arguments)
    next(out.glob('*array_record*')).write_bytes(b'')
    build('custom', folder, *arguments, code=2)
    assert 'of another size' in capsys.readouterr().out


def test_videos_in_tar_files_give_the_same_set(listed):
    folder, arguments = listed
    expected = build('custom', folder, *arguments)
    for number in range(2):
        with tarfile.open(folder / f'part_{number}.tar', 'w') as archive:
            for path in sorted((folder / 'videos').rglob('*.mp4'))[number::2]:
                archive.add(path, f'./train/{path.relative_to(folder / "videos")}')
    arguments[arguments.index('--videos') + 1] = str(folder / 'part_0.tar')
    words = ['custom', '--out', f'{folder}/tar', '--workers', '0', *map(str, arguments)]
    words.insert(words.index(f'{folder}/part_0.tar') + 1, f'{folder}/part_1.tar')
    assert command.main(words) == 0
    # The two files of one name lie in different tar files now: the first wins.
    same = {name for name in checksums(expected) if 'array_record' in name}
    same = {name for name in same if 'array_record-00003' not in name}
    assert {n: checksums(folder / 'tar')[n] for n in same} == {
        n: checksums(expected)[n] for n in same
    }


def test_frame_folders_in_a_tar_file(tmp_path, video):
    something_v1(tmp_path, video)
    with tarfile.open(tmp_path / 'v1.tar', 'w') as archive:
        archive.add(tmp_path / 'videos', '20bn-something-something-v1')
    places = ('--annotations', tmp_path / 'lists', '--videos')
    expected = build('something_v1', tmp_path, *places, tmp_path / 'videos')
    (tmp_path / 'tar').mkdir()
    out = build('something_v1', tmp_path / 'tar', *places, tmp_path / 'v1.tar')
    assert checksums(out) == checksums(expected)


def test_a_compressed_tar_file_is_an_error_that_says_what_to_do(listed, capsys):
    folder, arguments = listed
    with tarfile.open(folder / 'a.tar.gz', 'w:gz') as archive:
        archive.addfile(tarfile.TarInfo('v.mp4'), io.BytesIO())
    arguments[arguments.index('--videos') + 1] = str(folder / 'a.tar.gz')
    build('custom', folder, *arguments, code=2)
    assert 'gunzip' in capsys.readouterr().out


@pytest.mark.slow
def test_a_video_that_kills_or_hangs_its_process_is_left_out(listed, monkeypatch):
    folder, arguments = listed
    # Real processes, which die or sleep at a video: what a decoder's fault looks like from outside.
    (folder / 'sitecustomize.py').write_text(
        'import os, time\n'
        'from dist_jax.dataset.building import examples\n'
        'make = examples.VideoMaker.make\n'
        'def hostile(self, entry):\n'
        "    if entry.video_id == 'v02':\n"
        '        os.abort()\n'
        "    if entry.video_id == 'v20':\n"
        '        time.sleep(1000)\n'
        '    return make(self, entry)\n'
        'examples.VideoMaker.make = hostile\n'
    )
    monkeypatch.setenv('PYTHONPATH', f'{folder}:{os.environ.get("PYTHONPATH", "")}:{os.getcwd()}')
    words = ['custom', '--out', f'{folder}/out', *map(str, arguments)]
    started = [sys.executable, '-m', 'dist_jax', 'dataset', 'build', *words, '--workers', '2']
    subprocess.run([*started, '--timeout', '5'], check=True, stdout=subprocess.DEVNULL)
    report = json.loads((folder / 'out/report.json').read_text())['train']
    reasons = {problem['video_id']: problem for problem in report['videos']}
    assert reasons['v02']['kind'] == 'crashed'
    assert 'SIGABRT' in reasons['v02']['reason']
    assert reasons['v20']['kind'] == 'timed out'
    assert report['stored'] == 15


def test_wrong_arguments_say_what_to_do(tmp_path, video, capsys):
    something_v2(tmp_path, video)
    videos = ('--videos', tmp_path / 'videos')
    lists = ('--annotations', tmp_path / 'lists')
    for arguments, message in [
        ((*lists, '--videos', tmp_path / 'nowhere'), 'no such folder or tar file'),
        ((*lists, '--videos', tmp_path / 'lists'), 'none of the 2 videos was found'),
        (('--annotations', tmp_path / 'videos', *videos), 'something-something-v2-train.json'),
        ((*lists, *videos, '--splits', 'test'), 'has train, validation, not test'),
        ((*lists, *videos, '--list', 'train'), 'expected SPLIT=FILE'),
        ((*lists, *videos, '--short_side', 64, '--crf', 60), 'crf=60 must be in 0 to 51'),
        ((*lists, *videos, '--', '--runner=DirectRunner'), 'is for --beam'),
    ]:
        build('something_v2', tmp_path, *arguments, code=2)
        assert message in ' '.join(capsys.readouterr().out.split())
        assert not (tmp_path / 'out').exists()


@pytest.mark.slow
def test_beam_gives_the_bytes_of_the_local_build(listed):
    folder, arguments = listed
    arguments += ['--short_side', 24]
    expected = build('custom', folder, *arguments)
    words = ['custom', '--out', f'{folder}/beam', *map(str, arguments), '--beam', '--']
    words += ['--runner=DirectRunner', '--direct_num_workers=2']
    assert command.main([*words, '--direct_running_mode=multi_processing']) == 0
    assert checksums(folder / 'beam') == checksums(expected)
    assert (folder / 'beam/report.json').read_bytes() == (expected / 'report.json').read_bytes()


def test_videos_and_the_set_may_lie_in_a_bucket(listed, monkeypatch):
    stand_in_for_buckets(monkeypatch)
    folder, arguments = listed
    expected = build('custom', folder, *arguments)
    for path in (folder / 'videos').rglob('*.mp4'):
        url = f'gs://bucket/videos/{path.relative_to(folder / "videos")}'
        epath.Path(url).write_bytes(path.read_bytes())
    arguments[arguments.index('--videos') + 1] = 'gs://bucket/videos'
    words = ['custom', '--out', 'gs://bucket/out', '--workers', '0', *map(str, arguments)]
    whole = ShardBuilder.build

    def interrupted(self, task, *rest):
        if task.number == 3:
            raise KeyboardInterrupt
        return whole(self, task, *rest)

    monkeypatch.setattr(ShardBuilder, 'build', interrupted)
    assert command.main(words) == 130
    monkeypatch.setattr(ShardBuilder, 'build', whole)
    assert command.main(words) == 0
    assert command.main(words) == 0
    assert checksums(epath.Path('gs://bucket/out')) == checksums(expected)
