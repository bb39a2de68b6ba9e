"""Side4Video through the commands: train, evaluate, export, convert, on to other classes."""

import json

import numpy as np
import pytest

from dist_jax import checkpoint, main
from dist_jax.models import converted
from dist_jax.models.params import flatten


@pytest.fixture(scope='module')
def arguments(clips):
    """Of `train`, but for the workdir: groups, parts, two clips a video, averages, 4 x 3 views."""
    fields = {
        'data.root': clips,
        'data.train_list': 'train.txt',
        'data.val_list': 'val.txt',
        'data.label_map': 'labels.txt',
        'data.num_frames': 4,
        'data.repeats': 2,
        'data.rand_augment': 'rand-m7-n4-mstd0.5-inc1',
        'model.unroll': 'false',
        'model.remat': 'layers',
        'batch_norm.groups': 2,
        'accumulation': 2,
        'batch_size': 8,
        'num_steps': 3,
        'optimizer.ema_decay': 0.5,
        'eval.batch_size': 4,
        'eval.num_clips': 4,
        'eval.num_crops': 3,
        'eval.crop_layout': 'quarters',
        'eval.every_epochs': 100.0,
        'log.tensorboard': 'false',
    }
    given = [f'--config.{name}={value}' for name, value in fields.items()]
    return ['--config=configs/side4video.py:demo', *given]


@pytest.fixture(scope='module')
def run(arguments, tmp_path_factory):
    workdir = tmp_path_factory.mktemp('side4video') / 'run'
    assert main.main(['train', f'--workdir={workdir}', *arguments]) == 0
    return workdir


def read(workdir):
    folder = checkpoint.find_checkpoint(workdir)
    return flatten(checkpoint.read_host_variables(folder))


def figures(folder):
    return json.loads((folder / 'evaluation.json').read_text())


def test_statistics_are_evaluated_exported_and_converted(run, arguments, tmp_path):
    assert main.main(['evaluate', f'--workdir={run}', f'--output={tmp_path}']) == 0
    own = figures(tmp_path)
    assert own['views'] == 12
    assert own['top1'] == json.loads((run / 'summary.json').read_text())['val_top1']

    out, again = tmp_path / 'side4video.safetensors', tmp_path / 'converted'
    assert main.main(['convert', '--export', str(run), str(out)]) == 0
    assert main.main(['convert', str(out), str(again)]) == 0
    stored = converted.load_params(again, as_numpy=True)
    stored = flatten(converted.variables(stored, converted.load_metadata(again)))
    trained = read(run)
    assert stored.keys() == trained.keys()
    for name, value in trained.items():
        np.testing.assert_array_equal(stored[name], value, err_msg=name)
    assert np.abs(trained['batch_stats/stem_bn/mean']).min() > 0

    start = [f'--config.init_from={again}', f'--config.backbone.checkpoint={run / "backbone"}']
    folder = tmp_path / 'released'
    assert main.main(['evaluate', f'--output={folder}', *start, *arguments]) == 0
    released = figures(folder)
    assert (released['top1'], released['top5']) == (own['top1'], own['top5'])


def test_a_run_goes_on_to_other_classes(run, clips, arguments, tmp_path):
    """As from Kinetics-710 to one of its sets: statistics come along, the head by class name."""
    names = (clips / 'labels.txt').read_text().splitlines()
    chosen = [names[k] for k in (5, 0, 3)]
    (tmp_path / 'labels.txt').write_text('\n'.join(chosen))
    for split in ('train', 'val'):
        rows = [line.rsplit(' ', 1) for line in (clips / f'{split}.txt').read_text().splitlines()]
        kept = [(path, names[int(k)]) for path, k in rows if names[int(k)] in chosen]
        text = '\n'.join(f'{path} {chosen.index(name)}' for path, name in kept)
        (tmp_path / f'{split}.txt').write_text(text)
    fields = {
        'data.name': 'custom',
        'init_from': run,
        'backbone.checkpoint': run / 'backbone',
        'data.train_list': tmp_path / 'train.txt',
        'data.val_list': tmp_path / 'val.txt',
        'data.label_map': tmp_path / 'labels.txt',
        'optimizer.peak_lr': 0.0,
        'optimizer.warmup_start_lr': 0.0,
        'optimizer.ema_decay': 0.0,
        'num_steps': 1,
        'eval.num_clips': 1,
        'eval.num_crops': 1,
    }
    given = [f'--config.{name}={value}' for name, value in fields.items()]
    workdir = tmp_path / 'run'
    assert main.main(['train', f'--workdir={workdir}', *arguments, *given]) == 0
    before, after = read(run), read(workdir)
    for name, value in after.items():
        expected = before[name]
        if '/head/' in name:
            expected = expected[..., [5, 0, 3]]
        if name.startswith('params/'):
            np.testing.assert_array_equal(value, expected, err_msg=name)
    # Two parts of a batch keep 0.81 of what they started from.
    moved = after['batch_stats/stem_bn/var'] - 0.81 * before['batch_stats/stem_bn/var']
    assert (moved > 0).all()


def test_what_a_run_does_not_do(run, clips, arguments, tmp_path, capsys):
    groups = '--config.batch_norm.groups=4'
    assert main.main(['train', f'--workdir={run}', *arguments, groups]) == 2
    assert 'batch_norm.groups' in capsys.readouterr().err
    video = clips / (clips / 'val.txt').read_text().split()[0]
    command = ['predict', f'--workdir={run}', f'--output={tmp_path}', str(video)]
    assert main.main([*command, '--attention']) == 2
    assert 'attention' in capsys.readouterr().err
    assert main.main(command) == 0
    assert [path.suffix for path in tmp_path.iterdir()] == ['.png']
