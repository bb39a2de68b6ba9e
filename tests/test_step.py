"""The train and eval step, on a model small enough to look at."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dist_jax import optim, step
from dist_jax.mixup import Mixing
from dist_jax.models import clip, dist
from dist_jax.models.backbone import Backbone
from dist_jax.models.layers import as_rows
from dist_jax.sharding import make_mesh, to_global
from dist_jax.tasks.classify import Classify

SPEC = clip.ClipSpec(16, 8, 32, 2, 1, 24, 16, 1, 1, vocab_size=20, context_length=6)
CLASSES = 5
TASK = Classify((tuple('abcde'),), label_smoothing=0.1)
SETTINGS = step.StepSettings()
OPTIMIZER = optim.OptimizerSettings(1e-3, 0.0, 0, 100)
VIDEO = (4, 4, 16, 16, 3)


@pytest.fixture(scope='module')
def model():
    return dist.build(
        Backbone(clip.KIND, SPEC),
        num_classes=(CLASSES,),
        num_frames=4,
        dtype=jnp.float32,
        integration_dim=64,
        temporal_dim=8,
        ada_pooling_layers=1,
    )


@pytest.fixture(scope='module')
def frozen(model):
    tokens = jax.random.randint(jax.random.key(3), (CLASSES, 6), 1, 20)
    init = lambda key: model.frozen.prepare(clip.init_params(key, SPEC), (tokens,))  # noqa: E731
    return jax.jit(init)(jax.random.key(0))


@pytest.fixture(scope='module')
def batch():
    rng = np.random.default_rng(0)
    return {
        'video': rng.integers(0, 256, VIDEO, dtype=np.uint8),
        'label': np.arange(4, dtype=np.int32),
        'mask': np.ones(4, np.float32),
    }


class Runner:
    """Steps of one compiled program from the same fresh state."""

    def __init__(self, model, frozen, settings=SETTINGS, optimizer=OPTIMIZER, ema=False):
        make = lambda p: optim.of_model(model, p, optimizer)  # noqa: E731
        self.frozen = frozen
        init = jax.jit(lambda f: step.init_state(model, TASK, f, VIDEO, 0, make, ema))
        self.fresh = jax.device_get(init(frozen))
        schedule = optim.make_schedule(optimizer)
        mesh = make_mesh(jax.devices()[:1])
        self.step = step.make_train_step(
            model, TASK, make(self.fresh.params), schedule, settings, mesh
        )

    def placed(self):
        """The fresh state, to donate."""
        return jax.device_put(self.fresh, may_alias=False)

    def __call__(self, *batches):
        state = self.placed()
        for batch in batches:
            state, metrics = self.step(state, self.frozen, batch)
        return state, metrics


@pytest.fixture(scope='module')
def runner(model, frozen):
    return Runner(model, frozen)


@pytest.fixture(scope='module')
def mixing_runner(model, frozen):
    """It keeps an average, too."""
    settings = dataclasses.replace(SETTINGS, mixing=Mixing(0.8, 1.0), ema_decay=0.9)
    return Runner(model, frozen, settings, ema=True)


@pytest.fixture(scope='module')
def features(model, frozen, batch):
    """Of the batch."""
    return jax.jit(lambda f, b: step.model_inputs(model, TASK, f, b))(frozen, batch)


def assert_trees_close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def test_frozen_stays_and_every_trainable_leaf_moves(runner, frozen, batch):
    before = jax.tree.map(np.asarray, frozen)
    state, metrics = runner(batch)
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, frozen))
    still = {
        jax.tree_util.keystr(path, simple=True, separator='/')
        for (path, a), b in zip(
            jax.tree_util.tree_leaves_with_path(runner.fresh.params), jax.tree.leaves(state.params)
        )
        if np.array_equal(a, b)
    }
    # The map of the last layer feeds nothing, by design.
    assert still == {
        'last_layer/integration2temporal/kernel',
        'last_layer/integration2temporal/bias',
    }
    assert int(state.step) == 1 and bool(metrics['finite'])


def test_the_state_holds_no_frozen_weights(runner):
    widths = {x.shape for x in jax.tree.leaves(runner.fresh)}
    assert (SPEC.num_tokens, SPEC.width) not in widths  # the position table of the backbone


def test_rows_of_pixels_are_the_same_clips(model, frozen, features, batch, mixing_runner):
    rows = batch | {'video': as_rows(batch['video'])}
    assert rows['video'].shape == (4, 4, 16, 48)
    for form in (batch, rows):
        placed = to_global(form, make_mesh(jax.devices()[:1]))['video']
        np.testing.assert_array_equal(placed, rows['video'])
    of_rows = jax.jit(lambda f, b: step.model_inputs(model, TASK, f, b))(frozen, rows)
    jax.tree.map(np.testing.assert_array_equal, features, of_rows)
    (_, of_pixels), (_, metrics) = mixing_runner(batch), mixing_runner(rows)
    jax.tree.map(np.testing.assert_array_equal, of_pixels, metrics)


def test_loss_is_smoothed_cross_entropy(model, runner, features, batch):
    logits = jax.jit(model.net.apply)({'params': runner.fresh.params}, features)['logits'][0]
    log_p = np.asarray(jax.nn.log_softmax(logits))
    own = log_p[np.arange(4), batch['label']]
    expected = -(0.9 * own + 0.1 * log_p.mean(1)).mean()
    _, metrics = runner(batch)
    np.testing.assert_allclose(metrics['loss'], expected, rtol=1e-4)


def test_a_masked_clip_counts_for_nothing(runner, batch):
    masked = batch | {'mask': np.array([1, 1, 0, 1], np.float32)}
    garbage = masked['video'].copy()
    garbage[2] = 255 - garbage[2]
    other = masked | {'video': garbage, 'label': np.array([0, 1, 0, 3], np.int32)}
    (a, metrics), (b, other_metrics) = runner(masked), runner(other)
    jax.tree.map(np.testing.assert_array_equal, a.params, b.params)
    assert float(metrics['clips']) == 3
    assert float(metrics['loss']) == float(other_metrics['loss'])
    assert float(metrics['loss']) != float(runner(batch)[1]['loss'])


def test_an_empty_batch_changes_no_number_to_nan(runner, batch):
    state, metrics = runner(batch | {'mask': np.zeros(4, np.float32)})
    assert bool(metrics['finite']) and float(metrics['loss']) == 0
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.params))


def test_accumulation_equals_one_pass(model, frozen, mixing_runner, batch):
    mixing = Mixing(0.8, 1.0)
    parts = Runner(model, frozen, dataclasses.replace(SETTINGS, mixing=mixing, accumulation=2))
    masked = batch | {'mask': np.array([1, 1, 0, 1], np.float32)}
    (_, a), (_, b) = mixing_runner(masked), parts(masked)
    np.testing.assert_allclose(a['loss'], b['loss'], rtol=1e-5)
    np.testing.assert_allclose(a['grad_norm'], b['grad_norm'], rtol=1e-4)


def test_the_average_follows_the_parameters(mixing_runner, batch):
    run = mixing_runner
    state, _ = run(batch)
    after = jax.device_get(state.params)
    expected = jax.tree.map(lambda a, b: 0.9 * a + 0.1 * b, run.fresh.params, after)
    assert_trees_close(state.ema, expected, rtol=1e-4, atol=1e-7)
    assert_trees_close(state.eval_variables, {'params': state.ema}, rtol=0)


def test_steps_are_repeatable_and_differ_in_their_draws(mixing_runner, batch):
    (a, first), (b, again) = mixing_runner(batch, batch), mixing_runner(batch, batch)
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert float(first['loss']) == float(again['loss'])


def test_a_loss_that_is_no_number_is_flagged(runner, batch):
    broken = jax.tree.map(lambda x: np.full_like(x, np.nan), runner.fresh.params)
    _, metrics = runner.step(runner.placed().replace(params=broken), runner.frozen, batch)
    assert not bool(metrics['finite'])


def test_evaluation_averages_the_views(model, runner, frozen, batch):
    mesh = make_mesh(jax.devices()[:1])
    evaluate = step.make_eval_step(model, TASK, mesh)
    variables = runner.fresh.eval_variables
    views = batch['video'].reshape(2, 2, *VIDEO[1:])
    (together,) = evaluate(variables, frozen, {'video': views})['scores']
    (apart,) = evaluate(variables, frozen, {'video': batch['video'][:, None]})['scores']
    np.testing.assert_allclose(together, apart.reshape(2, 2, -1).mean(1), rtol=1e-4)
    np.testing.assert_allclose(together.sum(-1), 1.0, rtol=1e-5)


def test_fusion_mixes_logits(model, runner, frozen, features, batch):
    mesh = make_mesh(jax.devices()[:1])
    variables, views = runner.fresh.eval_variables, {'video': batch['video'][:, None]}
    tasks = (dataclasses.replace(TASK, fusion=fusion) for fusion in (0.0, 0.5, 1.0))
    own, half, backbone = (
        np.log(step.make_eval_step(model, task, mesh)(variables, frozen, views)['scores'][0])
        for task in tasks
    )
    mean = (own + backbone) / 2
    np.testing.assert_allclose(
        half - half.mean(1, keepdims=True), mean - mean.mean(1, keepdims=True), atol=1e-3
    )
    outputs = jax.jit(model.net.apply)(variables, features)
    expected = jax.nn.log_softmax(outputs['frozen_logits'][0])
    np.testing.assert_allclose(backbone, expected, atol=1e-3)


def test_no_gradient_flows_into_what_is_frozen(model, runner, frozen, batch):
    """The step cuts it, not the family: through the family alone there would be one."""
    floats = jax.tree.map(jnp.asarray, frozen)

    def loss_of_family(frozen):
        inputs = step.model_inputs(model, TASK, frozen, batch)
        return model.net.apply({'params': runner.fresh.params}, inputs)['logits'][0].sum()

    def loss_of_step(frozen):
        return runner.step(runner.placed(), frozen, batch)[1]['loss']

    through = jax.jit(jax.grad(loss_of_family))(floats)
    assert any(np.any(leaf) for leaf in jax.tree.leaves(jax.device_get(through['visual'])))
    cut = jax.jit(jax.grad(loss_of_step))(floats)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(jax.device_get(cut['visual'])))


def test_a_task_that_a_network_cannot_do_is_refused(model, frozen):
    task = Classify((tuple('abc'),))
    init = lambda f: step.init_state(model, task, f, VIDEO, 0, lambda p: optax.sgd(1.0))  # noqa: E731
    with pytest.raises(ValueError, match=r'logits of \(5,\) classes for \(3,\) class names'):
        jax.eval_shape(init, frozen)
