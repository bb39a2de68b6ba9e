"""Precise batch statistics: what is averaged, in runs that are ended in the middle of it, too."""

import conv_family
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dist_jax import checkpoint, evaluate, experiment, recipe, step, train, trained
from dist_jax.configs import base
from dist_jax.models import FAMILIES
from dist_jax.models.params import flatten
from dist_jax.sharding import make_mesh
from dist_jax.tasks.api import labels_of
from dist_jax.tasks.classify import Classify
from input_pipeline import pipeline

BATCHES = 3


def build(groups):
    return conv_family.build(
        num_classes=(3,),
        num_frames=2,
        dtype=jnp.float32,
        width=4,
        kernel_frames=3,
        batch_norm_groups=groups,
    )


def of_one_batch(model, params, batch):
    """Mean and unbiased variance of each group with real clips, (groups, 4), in float64."""
    video = model.normalize(jnp.asarray(batch['video']))
    kept = model.net.apply(
        {'params': params, 'batch_stats': {'bn': {'mean': jnp.zeros(4), 'var': jnp.ones(4)}}},
        {'video': video},
        capture_intermediates=lambda module, _: module.name == 'conv',
    )[1]['intermediates']['conv']['__call__'][0]
    rows = zip(*(np.split(np.asarray(x), model.net.groups) for x in (kept, batch['mask'])))
    real = [np.float64(x[mask > 0]).reshape(-1, 4) for x, mask in rows if mask.any()]
    if not real:
        return []
    return [np.mean([x.mean(0) for x in real], 0), np.mean([x.var(0, ddof=1) for x in real], 0)]


@pytest.mark.parametrize(('groups', 'accumulation', 'ema'), [(1, 1, False), (2, 2, True)])
def test_parts_with_real_clips_count_alike(groups, accumulation, ema):
    rng = np.random.default_rng(0)
    model, task, optimizer = build(groups), Classify((tuple('abc'),)), optax.sgd(0.1)
    shape = (8, 2, 8, 8, 3)
    state = step.init_state(model, task, {}, shape, 0, lambda p: optimizer, ema)
    masks = np.array([[1, 1, 0, 1, 1, 1, 0, 1], [1, 0, 1, 0, 1, 0, 1, 0], np.zeros(8)], np.float32)
    batches = [
        {
            'video': rng.integers(0, 256, shape, dtype=np.uint8),
            'label': np.zeros(8, np.int32),
            'mask': mask,
        }
        for mask in masks
    ]
    settings = step.StepSettings(accumulation=accumulation)
    average = step.make_statistics_step(model, task, settings, make_mesh(jax.devices()[:1]))
    if ema:  # statistics are those of what evaluation applies
        state = state.replace(ema=jax.tree.map(lambda x: 2 * x + 0.1, state.ema))
    variables = state.eval_variables
    params = variables.pop('params')
    found = step.Statistics(variables, np.float32(0))
    for number in (2, 0, 1):  # the first has no clip, and changes nothing
        found = average(params, {}, batches[number], np.int32(number), found)
        if number == 2:
            jax.tree.map(np.testing.assert_array_equal, found.mean, variables)
    parts = [
        of_one_batch(model, params, {name: x[i::accumulation] for name, x in batch.items()})
        for batch in batches
        for i in range(accumulation)
    ]
    real = [part for part in parts if part]
    assert found.parts == len(real) == (2 if accumulation == 1 else 3)
    for name, expected in zip(('mean', 'var'), np.mean(real, 0)):
        np.testing.assert_allclose(found.mean['batch_stats']['bn'][name], expected, rtol=1e-5)
    after = state.with_eval_collections(found.mean)
    for name, x in after.eval_variables['batch_stats']['bn'].items():
        np.testing.assert_array_equal(x, found.mean['batch_stats']['bn'][name])
    jax.tree.map(np.testing.assert_array_equal, after.eval_variables['params'], params)
    assert (after.collections is state.collections) == ema


@pytest.fixture(scope='module')
def config(clips):
    """Epochs of two and a quarter steps: averages after steps 3, 5 and 6."""
    config = conv_family.get_config().unlock()
    config.data.update(
        root=str(clips), train_list='train.txt', val_list='val.txt', label_map='labels.txt'
    )
    config.batch_norm.update(groups=2, precise_batches=BATCHES)
    config.task.criterion = 'bce'
    config.mixing.probability = 0.5
    config.eval.every_epochs = 100.0
    return config


@pytest.fixture(scope='module', autouse=True)
def registered():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, 'conv', conv_family.FAMILIES_ROW)
        patch.setattr('dist_jax.reports.page.write_report', lambda *_: None)
        yield


@pytest.fixture(scope='module')
def run(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp('precise')
    return workdir, train.train(config, str(workdir))


def read(workdir):
    return checkpoint.read_host_variables(checkpoint.find_checkpoint(workdir))


def test_what_is_saved_and_evaluated_has_them(run, config, tmp_path):
    workdir, summary = run
    variables = read(workdir)
    source = recipe.open_split(config, 'train')
    labels = labels_of(source)
    model = experiment.make_model(config, None, labels)
    batches = pipeline.train_batches(
        source,
        recipe.train_reader(config, model.pixels, labels),
        batch_size=8,
        seed=config.seed,
        start_step=6,
        num_steps=6 + BATCHES,
    )
    parts = [of_one_batch(model, variables['params'], batch) for batch in batches]
    for name, expected in zip(('mean', 'var'), np.mean(parts, 0)):
        np.testing.assert_allclose(variables['batch_stats']['bn'][name], expected, rtol=1e-5)
    figures, _ = evaluate.run(trained.saved_config(str(workdir)), str(workdir), None, str(tmp_path))
    assert figures['top1'] == summary['val_top1']


class Killed(Exception):
    pass


def test_a_run_that_ends_among_averages_goes_on_as_if_not(run, config, tmp_path, monkeypatch):
    make, calls = step.make_statistics_step, []

    def killed(*arguments):
        average = make(*arguments)

        def averaged(params, frozen, batch, number, before):
            calls.append(int(number))
            if len(calls) == BATCHES + 2:
                raise Killed
            return average(params, frozen, batch, number, before)

        return averaged

    with monkeypatch.context() as patch:
        patch.setattr(step, 'make_statistics_step', killed)
        with pytest.raises(Killed):
            train.train(config, str(tmp_path))
    # Those of the third step were saved with the fourth, and are not made again.
    assert calls == [3, 4, 5, 5, 6]
    assert checkpoint.find_checkpoint(tmp_path).name == '4'
    workdir, summary = run
    assert train.train(config, str(tmp_path))['params_sha256'] == summary['params_sha256']
    one, other = flatten(read(workdir)), flatten(read(tmp_path))
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def test_other_numbers_of_batches_make_another_run(run, config):
    workdir, _ = run
    saved = trained.saved_config(str(workdir)).unlock()
    assert saved.batch_norm.precise_batches == BATCHES
    rest = {'class_names': [], 'train_list_sha256': '', 'backbone': None}
    before = {'config': base.plain(saved), **rest}
    saved.batch_norm.precise_batches = 0
    with pytest.raises(ValueError, match=r'precise_batches: saved 3, now 0'):
        checkpoint.check_same_run(before, {'config': base.plain(saved), **rest})
    del saved.batch_norm.precise_batches  # of a run from before
    now = {'config': base.plain(config), **rest}
    with pytest.raises(ValueError, match=r'precise_batches: saved 0, now 3'):
        checkpoint.check_same_run({'config': base.plain(saved), **rest}, now)
