"""EVL through the commands: train, stop, continue, evaluate, predict, export, start from a file."""

import json
import shutil

import pytest
from safetensors.numpy import load_file

from dist_jax import main


@pytest.fixture(scope='module')
def arguments(clips):
    """Of `train`, but for the workdir: two layers of dropout, four frames, multi-view tests."""
    return [
        '--config=configs/evl.py:demo',
        f'--config.data.root={clips}',
        *(
            f'--config.data.{name}={file}'
            for name, file in (
                ('train_list', 'train.txt'),
                ('val_list', 'val.txt'),
                ('label_map', 'labels.txt'),
                ('rand_augment', 'rand-m7-n4-mstd0.5-inc1'),
                ('sampling', 'stride'),
                ('num_frames', '4'),
                ('frame_interval', '3'),
            )
        ),
        '--config.model.mlp_dropout=0.5',
        '--config.model.head_dropout=0.5',
        '--config.model.unroll=false',
        '--config.batch_size=4',
        '--config.num_steps=4',
        '--config.eval.batch_size=4',
        '--config.eval.num_clips=2',
        '--config.eval.num_crops=3',
        '--config.eval.every_epochs=100.0',
        '--config.checkpoint.every_steps=2',
        '--config.log.tensorboard=false',
    ]


@pytest.fixture(scope='module')
def run(arguments, tmp_path_factory):
    workdir = tmp_path_factory.mktemp('evl') / 'run'
    assert main.main(['train', f'--workdir={workdir}', *arguments]) == 0
    return workdir


def _summary(workdir):
    return json.loads((workdir / 'summary.json').read_text())


def test_a_stopped_run_ends_with_the_same_parameters(run, arguments, tmp_path):
    """Dropout, augmentation and frames are drawn again as they were."""
    # The same run up to its first save; the second command sees what SIGKILL would have left.

    stopped = tmp_path / 'stopped'
    shutil.copytree(run, stopped)
    shutil.rmtree(stopped / 'checkpoints' / '4')
    (stopped / 'summary.json').unlink()
    assert main.main(['train', f'--workdir={stopped}', *arguments]) == 0
    assert _summary(stopped)['params_sha256'] == _summary(run)['params_sha256']


def test_views_are_averaged(run, capsys):
    assert main.main(['evaluate', f'--workdir={run}']) == 0
    figures = json.loads((run / 'evaluation.json').read_text())
    assert figures['views'] == 6
    assert figures['top1'] == pytest.approx(_summary(run)['val_top1'])


def test_another_test_size_is_refused(run, arguments, tmp_path, capsys):
    size = '--config.eval.image_size=64'
    for command in (['evaluate', f'--workdir={run}'], ['train', f'--workdir={tmp_path}']):
        assert main.main([*command, *(arguments if command[0] == 'train' else []), size]) == 2
        message = capsys.readouterr().err
        assert 'eval.image_size=64 is not data.image_size=' in message
        assert 'layers/temporal/relative is (' in message and 'set eval.image_size=0' in message
    assert not (tmp_path / 'checkpoints').exists()


def test_a_video_is_predicted_with_the_place_where_the_query_looked(run, clips, tmp_path):
    video = clips / (clips / 'val.txt').read_text().split()[0]
    output = tmp_path / 'pictures'
    command = ['predict', f'--workdir={run}', f'--output={output}', '--attention', str(video)]
    assert main.main(command) == 0
    suffixes = sorted(path.suffix for path in output.iterdir())
    assert suffixes == ['.gif', '.png', '.png']


def test_a_run_goes_out_and_comes_back_under_the_authors_names(run, arguments, tmp_path):
    out, again = tmp_path / 'evl.safetensors', tmp_path / 'converted'
    assert main.main(['convert', '--export', str(run), str(out)]) == 0
    tensors = load_file(out)
    assert all(name.startswith('module.') for name in tensors)
    assert main.main(['convert', str(out), str(again)]) == 0
    figures = tmp_path / 'figures'
    command = [
        'evaluate',
        f'--config.init_from={again}',
        f'--output={figures}',
        f'--config.backbone.checkpoint={run / "backbone"}',
        *arguments,
    ]
    assert main.main(command) == 0
    released = json.loads((figures / 'evaluation.json').read_text())
    assert released['top1'] == pytest.approx(_summary(run)['val_top1'])
