"""Optimizers, schedules and parameter groups."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors import safe_open

from dist_jax import checkpoint, optim, step, train
from dist_jax.configs import base, frame_mean
from dist_jax.models import digests
from dist_jax.models.api import ParamGroup, TensorAxes

SETTINGS = optim.OptimizerSettings(
    peak_lr=3.2e-4, warmup_start_lr=8e-7, warmup_steps=60, total_steps=360, weight_decay=0.1
)
GROUPS = (
    ParamGroup('^slow/', learning_rate=0.1),
    ParamGroup('kernel$'),
    ParamGroup('(bias|scale)$', weight_decay=0.0),
)


def params():
    return {
        'a': {'kernel': jnp.ones((2, 2)), 'bias': jnp.ones(2)},
        'slow': {'kernel': jnp.ones((2, 2))},
    }


@pytest.mark.parametrize('step', [0, 1, 30, 59, 60, 61, 200, 359])
def test_schedule_is_the_releases(step):
    def cosine(at):
        return 3.2e-4 * 0.5 * (1 + math.cos(math.pi * at / 360))

    expected = 8e-7 + (cosine(60) - 8e-7) * step / 60 if step < 60 else cosine(step)
    np.testing.assert_allclose(optim.make_schedule(SETTINGS)(step), expected, rtol=1e-5, atol=1e-10)


def test_schedule_ends_at_end_lr():
    schedule = optim.make_schedule(dataclasses.replace(SETTINGS, end_lr=1e-6))
    np.testing.assert_allclose(schedule(360), 1e-6, rtol=1e-4)


# Of Side4Video's release: six epochs of 25 steps, two of warm-up; steps 0, 9 and 19 of each.
STEPWISE = [
    [0.0, 0.00018, 0.00038],
    [0.0005, 0.00068, 0.00088],
    [0.001, 0.0009801468428384716, 0.000913540287137281],
    [0.0008535533905932737, 0.0007408768370508576, 0.0005936906572928624],
    [0.0005, 0.0003605044469803853, 0.0002189583110739348],
    [0.00014644660940672628, 6.184665997806821e-05, 8.856374635655695e-06],
]


def test_a_rate_may_stay_for_some_steps_of_an_epoch():
    settings = optim.OptimizerSettings(
        1e-3, 0.0, 50, 150, after_warmup=True, refresh_steps=10, steps_per_epoch=25
    )
    found = jax.vmap(optim.make_schedule(settings))(jnp.arange(150))
    expected = np.repeat(STEPWISE, (9, 10, 6), axis=1).ravel()
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-12)
    assert optim.describe_schedule(settings).endswith('(cosine), renewed every 10 steps')
    smooth = optim.make_schedule(dataclasses.replace(settings, refresh_steps=1))
    np.testing.assert_allclose(smooth(jnp.array([9, 50])), [1.8e-4, 1e-3], rtol=1e-6)


def test_epochs_may_end_between_two_steps():
    settings = optim.OptimizerSettings(
        1.0, 1.0, 0, 10, end_lr=0.0, schedule='linear', refresh_steps=100, steps_per_epoch=2.5
    )
    found = jax.vmap(optim.make_schedule(settings))(jnp.arange(10))
    firsts = [0, 0, 0, 3, 3, 5, 5, 5, 8, 8]
    np.testing.assert_allclose(found, 1 - np.array(firsts) / 10, rtol=1e-6)


IMAGES = {  # of STS, on ImageNet: five epochs to the peak, a rate for each epoch
    'name': 'lamb',
    'peak_lr': 5e-3,
    'end_lr': 1e-6,
    'warmup_start_lr': 5e-6,
    'warmup_epochs': 5.0,
    'warmup': 'peak',
    'refresh_steps': 0,
}
VIDEOS = {  # and on videos: a factor from 0.1 to 1, of every step, on a cosine of every epoch
    'name': 'sgd',
    'peak_lr': 0.02,
    'end_lr': 0.0,
    'warmup_start_lr': 0.002,
    'warmup_epochs': 5.0,
    'warmup': 'scale',
    'refresh_steps': 0,
}


def image_rates(epoch):
    rising = 5e-6 + epoch * (5e-3 - 5e-6) / 5
    return np.where(
        epoch < 5, rising, 1e-6 + 0.5 * (5e-3 - 1e-6) * (1 + np.cos(np.pi * epoch / 300))
    )


def video_rates(step, steps_per_epoch, epochs):
    factor = np.minimum(0.1 + 0.9 * step / (5 * steps_per_epoch), 1)
    return factor * 0.5 * 0.02 * (1 + np.cos(np.pi * (step // steps_per_epoch) / epochs))


def settings_of(optimizer, num_epochs, num_videos=96, batch_size=8, num_steps=0):
    config = frame_mean.get_config('demo')
    config.model.unroll = False
    config.update(num_epochs=num_epochs, batch_size=batch_size, num_steps=num_steps)
    config.optimizer.update(optimizer)
    base.check(config)
    return train.optimizer_settings(config, train.make_plan(config, num_videos))


def rates(settings):
    return jax.vmap(optim.make_schedule(settings))(jnp.arange(settings.total_steps))


def test_the_schedule_of_images_has_a_rate_for_every_epoch():
    settings, step = settings_of(IMAGES, 300.0), np.arange(300 * 12)
    np.testing.assert_allclose(rates(settings), image_rates(step // 12), rtol=1e-5, atol=1e-9)
    described = '5e-06, 0.005 after 60 steps of warm-up, 1.14e-06 at step 3599 (cosine)'
    assert optim.describe_schedule(settings) == f'{described}, renewed every epoch'
    # Twelve and a half steps: an epoch begins with the first step that is wholly in it.
    found = rates(settings_of(IMAGES, 300.0, num_videos=100))
    first = np.flatnonzero(np.diff(found))[:3] + 1
    assert first.tolist() == [13, 25, 38]
    np.testing.assert_allclose(found[:60:13], image_rates(np.arange(5)), rtol=1e-5)


def test_the_schedule_of_videos_rises_with_the_cosine():
    settings, step = settings_of(VIDEOS, 50.0), np.arange(50 * 12)
    np.testing.assert_allclose(rates(settings), video_rates(step, 12, 50), rtol=1e-5, atol=2e-9)
    described = '0.002, 0.0195 after 60 steps of warm-up, 1.97e-05 at step 599 (cosine)'
    assert optim.describe_schedule(settings) == f'{described}, renewed every epoch'


def test_short_runs_keep_the_shares_of_their_epochs():
    found = rates(settings_of(IMAGES, 300.0, num_steps=60))  # five epochs a step
    np.testing.assert_allclose(found, image_rates(5.0 * np.arange(60)), rtol=1e-5, atol=1e-9)
    found = rates(settings_of(VIDEOS, 50.0, num_steps=150))
    np.testing.assert_allclose(found, video_rates(np.arange(150), 3, 50), rtol=1e-5, atol=2e-9)


def test_no_warmup():
    schedule = optim.make_schedule(dataclasses.replace(SETTINGS, warmup_steps=0))
    np.testing.assert_allclose(schedule(0), 3.2e-4, rtol=1e-6)


@pytest.mark.parametrize(
    ('name', 'rates'),
    [('linear', [0.0, 0.375, 0.75, 0.5, 0.0, 0.0]), ('constant', [0.0, 0.5, 1.0, 1.0, 1.0, 1.0])],
)
def test_other_schedules_join_their_warm_up(name, rates):
    settings = optim.OptimizerSettings(1.0, 0.0, 10, 40, schedule=name)
    found = [optim.make_schedule(settings)(step) for step in (0, 5, 10, 20, 40, 50)]
    np.testing.assert_allclose(found, rates, atol=1e-6)


@pytest.mark.parametrize(
    ('name', 'end'), [('cosine', '0.1 at'), ('linear', '0.1 at'), ('constant', '1 at')]
)
def test_the_log_says_where_a_schedule_ends(name, end):
    settings = optim.OptimizerSettings(1.0, 0.01, 0, 40, end_lr=0.1, schedule=name)
    described = f'1, 1 after 0 steps of warm-up, {end} step 40 ({name})'
    assert optim.describe_schedule(settings) == described
    warm = dataclasses.replace(settings, warmup_steps=8)
    assert optim.describe_schedule(warm).startswith('0.01, ')


def test_configs_choose_from_the_tables():
    assert base.CHOICES['optimizer.name'] == tuple(optim.OPTIMIZERS)
    assert base.CHOICES['optimizer.schedule'] == tuple(optim.SCHEDULES)
    assert base.CHOICES['optimizer.warmup'] == optim.WARMUPS


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        (
            {'name': 'adam'},
            r"optimizer\.name='adam' .*did you mean 'adamw'\? There are: adamw, sgd, lamb",
        ),
        ({'schedule': 'step'}, r"optimizer\.schedule='step' .*There are: cosine, linear, constant"),
        ({'warmup': 'peaks'}, r"optimizer\.warmup='peaks' .*did you mean 'peak'"),
        ({'warmup': 'scale', 'after_warmup': True}, r"warmup='scale' raises .*after_warmup=True"),
        ({'refresh_steps': -1}, r'optimizer\.refresh_steps=-1 must be at least 0'),
        ({'clip_tensor_norm': -1.0}, r'optimizer\.clip_tensor_norm=-1\.0 must be at least 0'),
        ({'eps': 0.0}, r'optimizer\.eps=0\.0 must be above 0'),
        ({'momentum': 1.0}, r'optimizer\.momentum=1\.0 must be at least 0 and below 1'),
        ({'nesterov': True, 'momentum': 0.0}, r'optimizer\.nesterov=True needs .*momentum'),
    ],
)
def test_wrong_fields_are_named(fields, message):
    config = frame_mean.get_config('demo')
    config.model.unroll = False
    config.optimizer.update(fields)
    with pytest.raises(ValueError, match=message):
        base.check(config)


def test_a_leaf_without_group_is_named():
    with pytest.raises(ValueError, match='slow/table'):
        optim.assign_groups(params() | {'slow': {'table': jnp.ones(2)}}, GROUPS[1:])


def test_a_group_without_leaf_is_named():
    with pytest.raises(ValueError, match='never'):
        optim.assign_groups(params(), (*GROUPS, ParamGroup('never')))


def test_first_matching_group_counts():
    assigned = optim.assign_groups(params(), GROUPS)
    assert assigned['slow']['kernel'].learning_rate == 0.1
    assert assigned['a']['bias'].weight_decay == 0.0


def test_equals_adamw_with_a_decay_mask():
    constant = dataclasses.replace(SETTINGS, warmup_steps=0, end_lr=SETTINGS.peak_lr)
    groups = (ParamGroup('kernel$'), ParamGroup('bias$', weight_decay=0.0))
    ours = optim.make_optimizer(params(), groups, constant)
    mask = jax.tree.map(lambda p: p.ndim > 1, params())
    theirs = optax.adamw(SETTINGS.peak_lr, weight_decay=0.1, mask=mask)
    p = q = params()
    state, other = ours.init(p), theirs.init(q)
    for size in (1.0, 2.0, 3.0):
        grads = jax.tree.map(lambda x, size=size: x * size - 0.3, p)
        updates, state = ours.update(grads, state, p)
        p = optax.apply_updates(p, updates)
        updates, other = theirs.update(grads, other, q)
        q = optax.apply_updates(q, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), p, q)


def test_group_multipliers_and_clipping():
    settings = dataclasses.replace(SETTINGS, warmup_steps=0, weight_decay=0.0, clip_norm=1e-3)
    optimizer = optim.make_optimizer(params(), GROUPS, settings)
    updates, _ = optimizer.update(params(), optimizer.init(params()), params())
    # Adam's first update is the sign, whatever the gradient's size.
    np.testing.assert_allclose(updates['a']['kernel'], -3.2e-4, rtol=1e-3)
    np.testing.assert_allclose(updates['slow']['kernel'], -3.2e-5, rtol=1e-3)
    # Weights below eps after clipping show that the clipping happened.
    tiny = dataclasses.replace(settings, clip_norm=1e-9)
    optimizer = optim.make_optimizer(params(), GROUPS, tiny)
    clipped, _ = optimizer.update(params(), optimizer.init(params()), params())
    assert np.abs(clipped['a']['kernel']).max() < 0.2 * 3.2e-4


# Two steps of one kernel and one bias, by the formulas of the sources in float64.
KERNEL = np.array([[0.5, -1.0], [2.0, 0.25]])
BIAS = np.array([0.3, -0.7])
GRADIENTS = [
    {'kernel': np.array([[0.3, -0.2], [0.1, 0.9]]), 'bias': np.array([0.4, -0.1])},
    {'kernel': np.array([[-0.5, 0.2], [0.7, 0.1]]), 'bias': np.array([0.2, 0.6])},
]
DECAYED = (ParamGroup('kernel$', learning_rate=0.5), ParamGroup('bias$', weight_decay=0.0))


def updated(settings):
    """Parameters after `GRADIENTS`, at a constant rate where there is no warm-up."""
    if not settings.warmup_steps:
        settings = dataclasses.replace(settings, schedule='constant')
    p = {'kernel': jnp.asarray(KERNEL), 'bias': jnp.asarray(BIAS)}
    optimizer = optim.make_optimizer(p, DECAYED, settings)
    state = optimizer.init(p)
    for gradients in GRADIENTS:
        updates, state = optimizer.update(jax.tree.map(jnp.asarray, gradients), state, p)
        p = optax.apply_updates(p, updates)
    return p


def clipped(gradients, limit):
    norm = np.sqrt(sum((g**2).sum() for g in gradients.values()))
    return {name: g * min(1.0, limit / norm) for name, g in gradients.items()}


@pytest.mark.parametrize('decay_all', [False, True])
@pytest.mark.parametrize('nesterov', [False, True])
@pytest.mark.parametrize('momentum', [0.0, 0.9])
def test_sgd_is_torchs(momentum, nesterov, decay_all):
    rate, decay, limit = 0.1, 0.05, 0.8
    expected = {}
    of_bias = decay if decay_all else 0.0
    for name, p, d, lr in (('kernel', KERNEL, decay, 0.5 * rate), ('bias', BIAS, of_bias, rate)):
        m = None
        for gradients in GRADIENTS:
            g = clipped(gradients, limit)[name] + d * p
            m = g if m is None else momentum * m + g
            p = p - lr * (g + momentum * m if nesterov else m)
        expected[name] = p
    settings = dataclasses.replace(
        SETTINGS,
        name='sgd',
        peak_lr=rate,
        warmup_steps=0,
        weight_decay=decay,
        decay_all=decay_all,
        clip_norm=limit,
        momentum=momentum,
        nesterov=nesterov,
    )
    found = updated(settings)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, expected)


@pytest.mark.parametrize('limit', [1.0, 40.0])
def test_lamb_is_that_of_the_image_recipe(limit):
    """Clipped to norm 1; u = m/(sqrt(v)+eps) + wd p, unbiased; times |p|/|u| where wd is not 0."""
    rate, decay, eps, b1, b2 = 5e-3, 0.02, 1e-6, 0.9, 0.999
    expected = {}
    for name, p, d, lr in (('kernel', KERNEL, decay, 0.5 * rate), ('bias', BIAS, 0.0, rate)):
        m = v = 0.0
        for t, gradients in enumerate(GRADIENTS, 1):
            g = clipped(gradients, limit)[name]
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
            u = (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps) + d * p
            ratio = np.linalg.norm(p) / np.linalg.norm(u) if d else 1.0
            p = p - lr * ratio * u
        expected[name] = p
    settings = optim.OptimizerSettings(
        rate, 0.0, 0, 10, weight_decay=decay, eps=eps, clip_norm=limit, name='lamb'
    )
    found = updated(settings)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6), found, expected)


def test_the_trust_ratio_has_no_bound_and_leaves_zeros_alone():
    settings = optim.OptimizerSettings(
        1.0, 0.0, 0, 10, weight_decay=1e-9, name='lamb', schedule='constant'
    )
    p = {'kernel': jnp.full((2, 2), 100.0), 'zero': {'kernel': jnp.zeros((2, 2))}}
    optimizer = optim.make_optimizer(p, (ParamGroup('kernel$'),), settings)
    updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, p), optimizer.init(p), p)
    np.testing.assert_allclose(updates['kernel'], -100.0, rtol=1e-5)
    np.testing.assert_allclose(updates['zero']['kernel'], -1.0, rtol=1e-5)


GOLDEN = Path(__file__).parent / 'golden' / 'side4video_retrieval.safetensors'


@pytest.fixture(scope='module')
def bertadam():
    """What the release's optimizer did, and its settings."""
    with safe_open(GOLDEN, 'np') as opened:
        names = [name for name in opened.keys() if name.startswith('bertadam/')]  # noqa: SIM118
        tensors = {name.removeprefix('bertadam/'): opened.get_tensor(name) for name in names}
        return tensors, json.loads(opened.metadata()['bertadam'])


def test_the_schedule_of_bertadam_is_the_releases(bertadam):
    settings = optim.OptimizerSettings(1.0, 0.0, 10, 100, warmup='peak')
    found = jax.vmap(optim.make_schedule(settings))(jnp.arange(100))
    np.testing.assert_allclose(found, bertadam[0]['multiplier_t100_w0.1'], rtol=1e-6, atol=1e-7)


def test_bertadam_is_the_releases(bertadam):
    """Two rates, no decay of biases, a global clip; that of tensors finds nothing left to do."""
    recorded, config = bertadam
    total = config['t_total']
    settings = optim.OptimizerSettings(
        config['lr'],
        0.0,
        config['warmup'] * total,
        total,
        warmup='peak',
        weight_decay=config['weight_decay']['side_w'],
        b1=config['b1'],
        b2=config['b2'],
        eps=config['eps'],
        clip_norm=config['global_clip'],
        clip_tensor_norm=config['max_grad_norm'],
        name='bertadam',
    )
    groups = (
        ParamGroup('^clip_', learning_rate=config['coef_lr_clip']),
        ParamGroup('bias$', weight_decay=0.0),
        ParamGroup('.'),
    )
    names = config['weight_decay']
    p = {name: jnp.asarray(recorded[f'{name}/init']) for name in names}
    optimizer = optim.make_optimizer(p, groups, settings)

    @jax.jit
    def advance(p, state, gradients):
        updates, state = optimizer.update(gradients, state, p)
        return optax.apply_updates(p, updates), state

    state = optimizer.init(p)
    for number in range(total):
        p, state = advance(p, state, {name: recorded[f'{name}/grads'][number] for name in names})
        for name in names:
            after = recorded[f'{name}/after'][number]
            np.testing.assert_allclose(p[name], after, rtol=0, atol=1e-6 * np.abs(after).max())


TENSORS = (
    TensorAxes('^layers/qkv/kernel', (0, 2)),
    TensorAxes('^layers/', (0,)),
)


def test_each_tensor_is_clipped_by_itself():
    """Layers of a stack, and q, k and v in one array, by their own norms; others as a whole."""
    rng = np.random.default_rng(0)
    shapes = {'layers': {'qkv': {'kernel': (2, 4, 3, 5), 'bias': (2, 3, 5)}}, 'table': (3, 4)}
    is_shape = {'is_leaf': lambda x: isinstance(x, tuple)}
    gradients = jax.tree.map(lambda shape: rng.normal(size=shape).astype('f'), shapes, **is_shape)
    gradients['layers']['qkv']['bias'][1] *= 1e-3  # short enough as it is
    gradients['scale'] = np.float32(-7)
    found, _ = optim.clip_by_tensor_norm(gradients, 1.5, TENSORS).update(gradients, ())

    def clipped(g):
        return g * min(1.0, 1.5 / np.linalg.norm(g))

    kernel, bias = (gradients['layers']['qkv'][name] for name in ('kernel', 'bias'))
    for layer in range(2):
        for slot in range(3):
            one = found['layers']['qkv']['kernel'][layer, :, slot]
            np.testing.assert_allclose(one, clipped(kernel[layer, :, slot]), rtol=1e-6)
        one = found['layers']['qkv']['bias'][layer]
        np.testing.assert_allclose(one, clipped(bias[layer]), rtol=1e-6)
    np.testing.assert_array_equal(found['layers']['qkv']['bias'][1], bias[1])
    np.testing.assert_allclose(found['table'], clipped(gradients['table']), rtol=1e-6)
    assert float(found['scale']) == -1.5
    nothing = jax.tree.map(np.zeros_like, gradients)
    found, _ = optim.clip_by_tensor_norm(gradients, 1.5, TENSORS).update(nothing, ())
    jax.tree.map(np.testing.assert_array_equal, found, nothing)


def test_the_global_norm_is_clipped_before_those_of_tensors():
    settings = dataclasses.replace(
        SETTINGS, name='sgd', momentum=0.0, weight_decay=0.0, schedule='constant', warmup_steps=0
    )
    settings = dataclasses.replace(settings, peak_lr=1.0, clip_norm=1.0, clip_tensor_norm=0.9)
    p = {'long': jnp.zeros(1), 'short': jnp.zeros(1)}
    optimizer = optim.make_optimizer(p, (ParamGroup('.'),), settings)
    gradients = {'long': jnp.array([40.0]), 'short': jnp.array([9.0])}
    updates, _ = optimizer.update(gradients, optimizer.init(p), p)
    np.testing.assert_allclose(updates['long'], [-0.9], rtol=1e-6)  # of 40/41
    np.testing.assert_allclose(updates['short'], [-9 / 41], rtol=1e-6)


@pytest.mark.parametrize(
    ('tensors', 'message'),
    [
        (
            (*TENSORS, TensorAxes('^blocks/', (0,))),
            r"match nothing: \[TensorAxes\(pattern='\^blocks",
        ),
        ((TensorAxes('layers', (1,)),), r'matches layers/bias, which has 1 axes'),
    ],
)
def test_axes_that_fit_nothing_are_named(tensors, message):
    p = {'layers': {'qkv': {'kernel': np.zeros((2, 4, 3, 5))}, 'bias': np.zeros(2)}}
    with pytest.raises(ValueError, match=message):
        optim.clip_by_tensor_norm(p, 1.0, tensors)


def test_no_parameter_exceeds_its_bound():
    """Wherever it comes from: the sum of a parameter and its update is rounded, too."""
    most, limit = math.log(100), np.float32(math.log(100))
    rng = np.random.default_rng(0)
    size = 10.0 ** rng.uniform(-3, 6, 20_000)
    before = (limit - size * rng.choice([1, 1e-6, -1e-3], size.shape)).astype('f')
    p = {'scale': jnp.asarray(before), 'free': jnp.ones(2)}
    settings = dataclasses.replace(
        SETTINGS, name='sgd', momentum=0.0, weight_decay=0.0, warmup_steps=0, schedule='constant'
    )
    bounded = optim.make_optimizer(p, (ParamGroup('.'),), settings, (), {'scale': most})
    free = optim.make_optimizer(p, (ParamGroup('.'),), settings)

    def after(optimizer):
        @jax.jit
        def advance(p, gradients):
            return optax.apply_updates(p, optimizer.update(gradients, optimizer.init(p), p)[0])

        gradients = {'scale': jnp.asarray(rates, jnp.float32), 'free': jnp.full(2, -9.0)}
        return jax.tree.map(np.asarray, advance(p, gradients))

    rates = -size * rng.uniform(0, 2, size.shape) / SETTINGS.peak_lr
    found, unbounded = after(bounded), after(free)
    assert found['scale'].max() == limit
    np.testing.assert_array_equal(found['free'], unbounded['free'])
    stays = unbounded['scale'] <= limit
    assert 0.1 < stays.mean() < 0.9
    np.testing.assert_array_equal(found['scale'][stays], unbounded['scale'][stays])
    reached = found['scale'][~stays & (before > limit / 2) & (before < limit * 2)]
    assert reached.size > 1000 and (reached == limit).all()
    with pytest.raises(ValueError, match=r"bounds of parameters that there are not: \['scales'\]"):
        optim.keep_at_most(p, {'scales': most})


PATHS = ('a/bias', 'a/kernel', 'slow/kernel')
MOMENTS = [f'1/{moment}/{name}' for moment in ('mu', 'nu') for name in PATHS]


@pytest.mark.parametrize(
    ('name', 'leaves'),
    [('adamw', ['1/count', *MOMENTS, '4/count']), ('bertadam', [*MOMENTS, '4/count'])],
)
def test_the_state_is_that_of_earlier_checkpoints(name, leaves):
    """Whatever is clipped and bounded; and without both, of the very same structure."""
    settings = dataclasses.replace(SETTINGS, name=name)
    states = []
    for norms in ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0)):
        clipped = dataclasses.replace(settings, clip_norm=norms[0], clip_tensor_norm=norms[1])
        for most in ({}, {'a/bias': 1.0}):
            optimizer = optim.make_optimizer(params(), GROUPS, clipped, most=most)
            states.append(optimizer.init(params()))
            assert sorted(digests.tree_paths(states[-1])) == leaves
    assert jax.tree.structure(states[0]) == jax.tree.structure(
        optax.chain(
            optax.identity(),
            *optim.OPTIMIZERS[name](settings, params()),
            optax.identity(),
            optax.scale_by_learning_rate(lambda _: 1.0),
        ).init(params())
    )


@pytest.mark.parametrize('name', optim.OPTIMIZERS)
def test_a_restored_state_goes_on_to_the_same_bits(name, tmp_path):
    settings = dataclasses.replace(SETTINGS, name=name)
    optimizer = optim.make_optimizer(params(), GROUPS, settings)

    @jax.jit
    def advance(state):
        grads = jax.tree.map(lambda p: p * 0.3 - state.step, state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        p = optax.apply_updates(state.params, updates)
        return state.replace(step=state.step + 1, params=p, opt_state=opt_state)

    state = step.TrainState(jnp.int32(0), params(), {}, optimizer.init(params()), None)
    state = advance(advance(state))
    checkpoints = checkpoint.Checkpoints(tmp_path)
    checkpoints.save(state, {'format_version': checkpoint.FORMAT_VERSION})
    checkpoints.wait()
    placed = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    restored, _ = checkpoints.restore_latest(placed)
    checkpoints.close()
    jax.tree.map(np.testing.assert_array_equal, advance(restored), advance(state))


def test_a_run_from_before_optimizers_had_names_continues():
    config = frame_mean.get_config('demo')
    config.model.unroll = False
    rest = {'class_names': [], 'train_list_sha256': '', 'backbone': {'params_sha256': ''}}
    saved = base.plain(config)
    fields = ('name', 'schedule', 'eps', 'momentum', 'nesterov', 'after_warmup', 'refresh_steps')
    for field in (*fields, 'warmup', 'decay_all', 'clip_tensor_norm'):
        del saved['optimizer'][field]
    del saved['task']['criterion']
    del saved['batch_norm']
    checkpoint.check_same_run({'config': saved, **rest}, {'config': base.plain(config), **rest})
    config.optimizer.name = 'sgd'
    with pytest.raises(ValueError, match=r"optimizer\.name: saved 'adamw', now 'sgd'"):
        checkpoint.check_same_run({'config': saved, **rest}, {'config': base.plain(config), **rest})


def test_a_run_with_sgd_learns_and_continues(clips, tmp_path):
    config = frame_mean.get_config('demo')
    config.model.unroll = False
    config.data.update(root=str(clips), train_list='train.txt', label_map='labels.txt')
    config.data.num_frames = 2
    config.update(batch_size=6, num_steps=4)
    config.optimizer.update(name='sgd', schedule='linear', nesterov=True, peak_lr=0.05)
    config.checkpoint.update(every_steps=2, keep=2)
    config.log.update(every_steps=1, tensorboard=False)
    run, stopped = tmp_path / 'run', tmp_path / 'stopped'
    summary = train.train(config, str(run))
    rows = [json.loads(line) for line in (run / 'metrics.jsonl').read_text().splitlines()]
    losses = [row['loss'] for row in rows if 'loss' in row]
    assert len(losses) == 4 and losses[-1] < losses[0]
    shutil.copytree(run, stopped)  # what SIGKILL after the first save leaves
    shutil.rmtree(stopped / 'checkpoints' / '4')
    (stopped / 'summary.json').unlink()
    assert train.train(config, str(stopped))['params_sha256'] == summary['params_sha256']
