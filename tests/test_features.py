"""`dist_jax features`: the arrays, formats, lists, resuming, hosts and refusals."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import text_run
from array_record.python.array_record_module import ArrayRecordReader
from tensorflow_datasets.proto import tf_example_pb2
from video_files import pictures, write_video

import dist_jax
from dist_jax import backbones, main
from dist_jax.dataset import build
from dist_jax.features import files as feature_files
from dist_jax.features.run import items_of_files
from input_pipeline.pipeline import open_video
from input_pipeline.video_list import Record

WINDOWS = ['--window=4', '--stride=2', '--fps=8', '--config.data.num_frames=2', '--batch_size=4']
ALL = '--outputs=clip,frames,tokens:-1,tokens:0'


def run(*arguments):
    try:
        return main.main(['features', *map(str, arguments)])
    except SystemExit as exit:
        return exit.code


@pytest.fixture(scope='module')
def backbone(tmp_path_factory):
    path = tmp_path_factory.mktemp('backbone') / 'tiny'
    backbones.write_random(str(path), 'tiny')
    return path


@pytest.fixture(scope='module')
def videos(tmp_path_factory):
    """Five videos in two depths, one without a UTF-8 name; one that cannot be read."""
    folder = tmp_path_factory.mktemp('features') / 'videos'
    (folder / 'b').mkdir(parents=True)
    for seed, name in enumerate(['a.mp4', 'b/c.mp4', 'b/d.mkv', os.fsdecode(b'\xe9.mp4'), 'f.mp4']):
        write_video(folder / name, pictures(8 + 5 * seed, seed=seed), fps=10)
    (folder / 'b' / 'broken.mp4').write_bytes(b'no video')
    return folder


@pytest.fixture(scope='module')
def made(videos, backbone, tmp_path_factory):
    out = tmp_path_factory.mktemp('made') / 'out'
    assert run(videos, f'--backbone={backbone}', '--out', out, *WINDOWS, ALL) == 0
    return out


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A run of DiST and its clips."""
    return text_run.train_in(tmp_path_factory.mktemp('run'), num_val=4)


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob('*')
        if path.is_file()
    }


def listed(out):
    return [json.loads(line) for line in (out / 'videos.jsonl').read_text().splitlines()]


def test_arrays_are_those_of_the_python_interface(made, videos, backbone):
    rows = listed(made)
    names = [row['video'] for row in rows]
    assert names == [item.video.path for item in items_of_files([str(videos)])] and len(names) == 6
    (bad,) = [row for row in rows if 'error' in row]
    assert bad['video'] == 'b/broken.mp4' and bad['error'].startswith('not a video')
    model = dist_jax.load(backbone, overrides={'data.num_frames': 2})
    for name in ('a.mp4', 'b/d.mkv'):
        arrays = {
            key: np.load(made / key / f'{name}.npy')
            for key in ('spans', 'clip', 'frames', 'tokens_0')
        }
        spans = arrays['spans']
        assert (spans[:, 1] - spans[:, 0] <= 0.5 + 1e-9).all() and spans[1, 0] == 0.25
        assert {len(array) for array in arrays.values()} == {len(spans)}
        assert arrays['frames'].shape[1:] == (2, 64) and arrays['tokens_0'].shape[1:] == (2, 37, 64)
        with open_video(Record(str(videos / name), (), '')) as video:
            frames = np.stack([frame for _, frame in video.pictures(np.arange(len(video.times)))])
        window = frames[int(spans[1, 0] * 10 + 0.999) : round(spans[1, 1] * 10)]
        np.testing.assert_allclose(arrays['clip'][1], model.embed(window, fps=10), atol=2e-2)
        mean = arrays['frames'].mean(1)
        mean /= np.linalg.norm(mean, axis=1, keepdims=True)
        np.testing.assert_allclose(arrays['clip'], mean, atol=1e-5)
    manifest = json.loads((made / 'manifest.json').read_text())
    assert manifest['outputs']['tokens_0']['shape'] == [2, 37, 64]
    assert manifest['settings']['model']['sha256'] and manifest['num_bad_videos'] == 1
    assert not (made / '.hosts').exists()


def test_a_run_gives_whole_videos_what_embed_gives_them(trained, tmp_path):
    clips, workdir = trained
    options = [f'--workdir={workdir}', '--list', clips / 'val.txt', '--label_map']
    assert run(*options, clips / 'labels.txt', '--out', tmp_path / 'out') == 0
    model = dist_jax.load(workdir)
    assert model.views(str(clips / 'val/000000.mp4')).shape[0] == 2
    rows = listed(tmp_path / 'out')
    for row in rows:
        found = np.load(tmp_path / 'out' / 'clip' / f'{row["video"]}.npy')
        np.testing.assert_allclose(found[0], model.embed(row['source']), rtol=1e-4, atol=1e-5)
    manifest = json.loads((tmp_path / 'out' / 'manifest.json').read_text())
    (names,) = manifest['class_names']
    assert names == list(model.labels[0]) and {row['label'] for row in rows} <= set(range(8))


@pytest.mark.parametrize('form', ['parquet', 'array_record'])
def test_other_formats_hold_the_same(made, videos, backbone, tmp_path, form, monkeypatch):
    monkeypatch.setattr(feature_files, 'PART_BYTES', 40_000)
    out = tmp_path / 'out'
    assert (
        run(videos, f'--backbone={backbone}', '--out', out, *WINDOWS, ALL, f'--format={form}') == 0
    )
    rows = listed(out)
    files = sorted({row['file'] for row in rows if 'file' in row})
    assert len(files) > 1 and files == sorted(p.name for p in out.glob(f'*.{form}'))
    for row in rows:
        if 'error' in row:
            assert 'file' not in row
            continue
        expected = {
            name: np.load(made / name / f'{row["video"]}.npy')
            for name in ('spans', 'clip', 'frames', 'tokens_0')
        }
        found = {'parquet': of_parquet, 'array_record': of_array_record}[form](out, row)
        for name, array in expected.items():
            np.testing.assert_allclose(found[name], array.reshape(found[name].shape), atol=1e-6)


def of_parquet(out, row):
    table = pyarrow.parquet.read_table(out / row['file'])
    own = [name == feature_files.text(row['video']) for name in table['video'].to_pylist()]
    found = {
        name: np.stack(table[name].to_numpy(zero_copy_only=False)[own])
        for name in ('clip', 'frames', 'tokens_0')
    }
    assert json.loads(table.schema.field('frames').metadata[b'shape']) == [2, 64]
    spans = np.stack([table['start'].to_numpy()[own], table['end'].to_numpy()[own]], 1)
    return found | {'spans': spans}


def of_array_record(out, row):
    reader = ArrayRecordReader(str(out / row['file']))
    for record in reader.read_all():
        feature = tf_example_pb2.Example.FromString(record).features.feature
        if feature['video'].bytes_list.value[0] == os.fsencode(row['video']):
            break
    found = {
        name: np.reshape(feature[name].float_list.value, feature[f'{name}/shape'].int64_list.value)
        for name in ('clip', 'frames', 'tokens_0')
    }
    times = [feature[name].int64_list.value for name in ('start_us', 'end_us')]
    return found | {'spans': np.transpose(times) / 1e6}


@pytest.mark.parametrize('form', ['npy', 'parquet'])
def test_a_run_that_breaks_off_anywhere_goes_on_to_the_same_bytes(
    videos, backbone, tmp_path, monkeypatch, form
):
    monkeypatch.setattr(feature_files, 'PART_BYTES', 40_000)
    command = [videos, f'--backbone={backbone}', *WINDOWS, f'--format={form}', '--outputs=tokens:0']
    assert run(*command, '--out', tmp_path / 'whole') == 0
    expected = contents(tmp_path / 'whole')
    out = tmp_path / 'out'
    monkeypatch.setattr(feature_files, 'write_lines', lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(*command, '--out', out)
    monkeypatch.undo()
    monkeypatch.setattr(feature_files, 'PART_BYTES', 40_000)
    journal = out / '.hosts' / '00000'
    content = journal.read_bytes()
    for share in (0.95, 0.6, 0.3):
        cut = tmp_path / f'cut{share}'
        shutil.copytree(out, cut)
        (cut / '.hosts' / '00000').write_bytes(content[: int(share * len(content))])
        assert run(*command, '--out', cut) == 0
        assert contents(cut) == expected
    journal.write_bytes(content)


@pytest.mark.slow
def test_killed_it_continues_to_the_same_bytes(made, videos, backbone, tmp_path):
    out = tmp_path / 'out'
    command = [sys.executable, '-m', 'dist_jax', 'features', str(videos), '--out', str(out)]
    command += [f'--backbone={backbone}', *WINDOWS, ALL]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while process.poll() is None and not list(out.glob('spans/**/*.npy')):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not (out / 'manifest.json').exists()
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert contents(out) == contents(made)


def start_two(command):
    """Two hosts of one machine."""
    with socket.socket() as found:
        found.bind(('localhost', 0))
        address = f'localhost:{found.getsockname()[1]}'
    same = {'JAX_COORDINATOR_ADDRESS': address, 'JAX_NUM_PROCESSES': '2', 'JAX_PLATFORMS': 'cpu'}
    same['DIST_JAX_LOST_SECONDS'] = '6'
    pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.STDOUT, 'text': True}
    return [
        subprocess.Popen(command, env=os.environ | same | {'JAX_PROCESS_ID': str(number)}, **pipes)
        for number in range(2)
    ]


@pytest.mark.slow
def test_two_hosts_embed_each_video_once_and_one_may_be_killed(made, videos, backbone, tmp_path):
    command = [sys.executable, '-m', 'dist_jax', 'features', str(videos)]
    command += [f'--backbone={backbone}', *WINDOWS, ALL, '--out']
    out = tmp_path / 'out'
    hosts = start_two([*command, str(out)])
    said = [host.communicate(timeout=300)[0] for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], said
    assert listed(out) == listed(made)
    for path in made.rglob('*.npy'):  # but for the rounding of other places in a batch
        found = np.load(out / path.relative_to(made))
        np.testing.assert_allclose(found, np.load(path), atol=2e-2)

    killed = tmp_path / 'killed'
    hosts = start_two([*command, str(killed)])
    while hosts[1].poll() is None and not list(killed.glob('spans/**/*.npy')):
        time.sleep(0.002)
    hosts[1].send_signal(signal.SIGKILL)
    said = [host.communicate(timeout=300)[0] for host in hosts]
    assert [host.returncode for host in hosts] == [75, -signal.SIGKILL], said
    # One host alone does not go on with what two have begun.
    before = contents(killed)
    assert run(*command[4:], killed) == 2
    assert contents(killed) == before
    hosts = start_two([*command, str(killed)])
    said = [host.communicate(timeout=300)[0] for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], said
    assert contents(killed) == contents(out)


def test_shards_and_lists_of_parts_are_read(videos, backbone, tmp_path, capsys):
    rows = [f'{videos}/b/d.mkv,x', f'{videos}/f.mp4,y']
    (tmp_path / 'list.csv').write_text('path,label\n' + '\n'.join(rows) + '\n')
    words = ['custom', '--list', f'train={tmp_path}/list.csv', '--videos', videos]
    assert build.main([*map(str, words), '--out', f'{tmp_path}/built', '--workers', '0']) == 0
    options = [f'--backbone={backbone}', '--config.data.num_frames=2']
    found = []
    for number, list_path in enumerate(('list.csv', 'built')):
        out = tmp_path / f'out{number}'
        assert run('--list', tmp_path / list_path, '--out', out, *options) == 0
        table = listed(out)
        assert [row['label'] for row in table] == [0, 1]
        found.append([np.load(out / 'clip' / f'{row["video"]}.npy') for row in table])
    np.testing.assert_allclose(*found, atol=1e-2)


def test_names_stay_inside_and_are_of_one_video(videos, backbone, tmp_path):
    copy = tmp_path / 'other' / 'a.mp4'
    copy.parent.mkdir()
    shutil.copy(videos / 'a.mp4', copy)
    items = items_of_files([str(videos / 'a.mp4'), str(copy), str(copy.parent)])
    assert [item.video.path for item in items] == ['a.mp4', 'a.mp4~2', 'a.mp4~3']
    odd = tmp_path / 'odd'  # a folder is called as the file of another video
    for name in ('a.mp4', 'a.mp4.npy/b.mp4', 'a.mp4.npy_/b.mp4'):
        (odd / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(videos / 'a.mp4', odd / name)
    items = items_of_files([str(odd)])
    names = [item.video.path for item in items]
    assert names == ['a.mp4', 'a.mp4.npy_/b.mp4', 'a.mp4.npy_/b.mp4~2']
    rows = [f'{tmp_path}/{"x" * 300}/../../etc/a.mp4,0', '../../b.mp4,1']
    (tmp_path / 'list.csv').write_text('path,label\n' + '\n'.join(rows) + '\n')
    out = tmp_path / 'deep' / 'out'
    command = ['--list', tmp_path / 'list.csv', f'--backbone={backbone}', '--out', out]
    assert run(*command) == 1  # none of them is there
    assert {path.name for path in out.iterdir()} == {'manifest.json', 'videos.jsonl'}
    assert all('..' not in row['video'] for row in listed(out))


def test_complete_features_are_not_made_again(made, videos, backbone, capsys):
    before = contents(made)
    command = [videos, f'--backbone={backbone}', '--out', made, *WINDOWS]
    assert run(*command, ALL) == 0
    assert 'complete already' in capsys.readouterr().out
    assert run(*command) == 2
    assert 'was made with another model or other settings' in capsys.readouterr().err
    assert contents(made) == before


@pytest.mark.parametrize(
    ('arguments', 'expected'),
    [
        ([], 'pass --workdir=RUN, or --backbone'),
        (['--backbone=B'], 'name videos and folders, or a --list'),
        (['--backbone=B', 'V', '--fps=4'], 'go with --window'),
        (['--backbone=B', 'V', '--window=2', '--fps=0'], 'must be above 0'),
        (['--backbone=B', 'V', '--window=x'], 'is no length of time'),
        (['--backbone=B', 'V', '--window='], 'is no length of time'),
        (['--backbone=B', 'V', '--window=-1s'], 'is no length of time'),
        (['--backbone=B', 'V', '--window=0s'], 'must be more than 0'),
        (['--backbone=B', 'V', '--window=2s', '--stride=0.001s'], 'must be at least'),
        (['--backbone=B', 'V', '--stride=1s'], 'go with --window'),
        (['--backbone=B', 'V', '--outputs=tokens'], "'tokens' is not clip, frames or tokens:BLOCK"),
        (['--backbone=B', 'V', '--outputs=,'], '--outputs is empty'),
        (['--backbone=B', 'V', '--window=2s', '--outputs=tokens:3'], 'has blocks 0 to 0'),
        (['--backbone=B', 'V', '--config.eval.num_clips=2', '--outputs=frames'], 'are of one view'),
        (['--backbone=B', 'V', '--out=gs://bucket/x'], 'are written to a disk'),
        (['--backbone=B', 'V', '--out=V'], 'holds other files'),
        (['--backbone=B', 'none.mp4'], 'no file or folder none.mp4'),
        (['--backbone=V', 'V'], 'is not a converted checkpoint'),
        (['--workdir=B', 'V'], 'is no run'),
    ],
)
def test_wrong_usage_is_explained(arguments, expected, videos, backbone, tmp_path, capsys):
    places = {'B': str(backbone), 'V': str(videos)}
    words = ['='.join(places.get(part, part) for part in word.split('=')) for word in arguments]
    out = [] if any(word.startswith('--out=') for word in words) else [f'--out={tmp_path}/x']
    assert run(*words, *out) == 2
    said = capsys.readouterr().err
    assert expected in said and 'Traceback' not in said
    assert not (tmp_path / 'x' / 'manifest.json').exists()


def test_a_foreign_manifest_is_refused(videos, backbone, tmp_path, capsys):
    for number, text in enumerate(('[' * 100_000, '{}', '{"format": "dist_jax features"}', 'x')):
        out = tmp_path / str(number)
        out.mkdir()
        Path(out / 'manifest.json').write_text(text)
        assert run(videos, f'--backbone={backbone}', '--out', out) == 2
        assert 'no manifest of `dist_jax features`' in capsys.readouterr().err
