"""STS through the commands: train on pictures, on to videos, stop, continue, evaluate, predict."""

import json
import shutil

import jax
import numpy as np
import optax
import pytest

from dist_jax import checkpoint, experiment, main, recipe, step
from dist_jax.configs import sts as configs
from dist_jax.models import sts
from dist_jax.models.params import flatten
from dist_jax.tasks.api import labels_of
from input_pipeline import motion_images

STEPS = 4
FIELDS = {
    'data.image_size': 32,
    'data.train_list': 'train.txt',
    'data.val_list': 'val.txt',
    'data.label_map': 'labels.txt',
    'batch_size': 4,
    'num_steps': STEPS,
    'eval.batch_size': 4,
    'eval.every_epochs': 100.0,
    'checkpoint.every_steps': 2,
    'checkpoint.keep': 2,
    'log.tensorboard': False,
}


@pytest.fixture(scope='module')
def stages(clips, tmp_path_factory):
    """(workdir, row of the config, its fields) of both; the second starts from the first."""
    folder = tmp_path_factory.mktemp('sts')
    pictures = folder / 'pictures'
    motion_images.generate(pictures, num_train=24, num_val=24)
    images = FIELDS | {'data.root': str(pictures)}
    videos = FIELDS | {'data.root': str(clips), 'data.num_frames': 4}
    return (
        (folder / 'images', 'demo_images', images),
        (folder / 'videos', 'demo', videos | {'init_from': str(folder / 'images')}),
    )


def train(workdir, row, fields):
    given = [f'--config.{name}={value}' for name, value in fields.items()]
    command = ['train', f'--workdir={workdir}', f'--config=configs/sts.py:{row}', *given]
    assert main.main(command) == 0


@pytest.fixture(scope='module', autouse=True)
def small():
    """Two narrow blocks, and no reports: other tests show them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sts.NETWORKS, 'csn_tiny', sts.csn(8, (1, 1), stem_size=3))
        patch.setattr('dist_jax.reports.page.write_report', lambda *_: None)
        yield


@pytest.fixture(scope='module')
def runs(stages):
    for stage in stages:
        train(*stage)
    return tuple(workdir for workdir, _, _ in stages)


def variables(workdir):
    folder = checkpoint.find_checkpoint(workdir)
    return flatten(checkpoint.read_host_variables(folder))


def initial(row, fields):
    """The parameters that a run begins with, flat."""
    config = configs.get_config(row)
    config.update_from_flattened_dict(fields)
    labels = labels_of(recipe.open_split(config, 'train'))
    parts = experiment.assemble(config, labels, None)

    def draw():
        shape = (1, *parts.train_shape)
        made = step.init_state(
            parts.model, parts.task, {}, shape, config.seed, lambda _: optax.identity()
        )
        return made.variables

    return flatten(jax.device_get(jax.jit(draw)()))


def test_pictures_only_shrink_the_outer_taps(stages, runs):
    """Their gradient is zero; what LAMB's weight decay does is one factor a kernel."""
    before, after = initial(*stages[0][1:]), variables(runs[0])
    outer = [name for name, leaf in before.items() if leaf.ndim == 5 and len(leaf) == 3]
    assert len(outer) == 3  # the stem and one of each block
    for name in outer:
        old, new = before[name][[0, 2]], after[name][[0, 2]]
        factor = np.vdot(old, new) / np.vdot(old, old)
        assert 0.99 < factor < 1
        np.testing.assert_allclose(new, factor * old, rtol=1e-5)
        moved = after[name][1] - factor * before[name][1]
        assert np.linalg.norm(moved) > 1e-3 * np.linalg.norm(before[name][1])


@pytest.mark.parametrize('stage', [0, 1], ids=['images', 'videos'])
def test_a_killed_run_ends_with_the_same_parameters_and_statistics(stages, runs, stage, tmp_path):
    run, killed = runs[stage], tmp_path / 'run'
    # The second command sees what SIGKILL in the third step would have left.
    shutil.copytree(run, killed)
    shutil.rmtree(killed / 'checkpoints' / str(STEPS))
    (killed / 'summary.json').unlink()
    train(killed, *stages[stage][1:])
    before, after = variables(run), variables(killed)
    assert before.keys() == after.keys()
    assert np.abs(before['batch_stats/layer1_0/conv2/bn/mean']).min() > 0
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value, err_msg=name)


def test_it_is_evaluated_and_predicts(runs, clips, tmp_path):
    _, run = runs
    assert main.main(['evaluate', f'--workdir={run}', f'--output={tmp_path}']) == 0
    summary = json.loads((run / 'summary.json').read_text())
    assert json.loads((tmp_path / 'evaluation.json').read_text())['top1'] == summary['val_top1']
    video = clips / (clips / 'val.txt').read_text().split()[0]
    assert main.main(['predict', f'--workdir={run}', f'--output={tmp_path}', str(video)]) == 0
    assert list(tmp_path.glob('*.png'))
