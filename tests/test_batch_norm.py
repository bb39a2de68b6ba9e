"""Batch normalisation: statistics of groups, masks, gradients, and what devices tell each other."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dist_jax.models.batch_norm import BatchNorm
from dist_jax.models.stack import scan_trainable

EPS = 1e-5
SHAPE = (8, 2, 3, 3, 5)
MASKS = {
    'all': None,
    'some': np.array([1, 0, 1, 1, 0, 1, 1, 1], np.float32),
    'a group without': np.array([0, 0, 1, 1, 0, 1, 1, 1], np.float32),
    'none': np.zeros(8, np.float32),
}


def make(seed=0, mean=3.0, shape=SHAPE):
    rng = np.random.default_rng(seed)
    x = (mean + rng.normal(size=shape) * rng.uniform(0.5, 2, shape[-1])).astype(np.float32)
    channels = shape[-1]

    def draw(low, high):
        return rng.uniform(low, high, channels).astype(np.float32)

    variables = {
        'params': {'scale': draw(0.5, 2), 'bias': draw(-1, 1)},
        'batch_stats': {'mean': draw(-1, 1), 'var': draw(0.5, 2)},
    }
    return x, variables


def exact(x, variables, mask, groups, keep=0.9):
    """The same in float64, one group after the other: result, running mean, running variance."""
    x = np.asarray(x, np.float64)
    mask = np.ones(len(x)) if mask is None else mask
    stats = {k: np.asarray(v, np.float64) for k, v in variables['batch_stats'].items()}
    params = variables['params']
    out, means, variances = np.empty_like(x), [], []
    axes = tuple(range(x.ndim - 1))
    for rows in np.split(np.arange(len(x)), groups):
        real = x[rows[mask[rows] > 0]]
        mean, var = stats['mean'], stats['var']
        if len(real):
            mean, var, n = real.mean(axes), real.var(axes), real[..., 0].size
            means.append(mean)
            variances.append(var * n / max(n - 1, 1))
        out[rows] = (x[rows] - mean) / np.sqrt(var + EPS) * params['scale'] + params['bias']
    if means:
        stats['mean'] = keep * stats['mean'] + (1 - keep) * np.mean(means, 0)
        stats['var'] = keep * stats['var'] + (1 - keep) * np.mean(variances, 0)
    return out, stats['mean'], stats['var']


def plain(params, stats, x, mask, groups):
    """The same for automatic differentiation."""
    mask = jnp.ones(len(x)) if mask is None else jnp.asarray(mask)
    parts = []
    for rows in np.split(np.arange(len(x)), groups):
        part, weights = x[rows], mask[rows].reshape(-1, *[1] * (x.ndim - 1))
        axes, real = tuple(range(x.ndim - 1)), weights.sum() > 0
        count = jnp.maximum(weights.sum(), 1) * np.prod(x.shape[1:-1])
        mean = (weights * part).sum(axes) / count
        var = (weights * (part - mean) ** 2).sum(axes) / count
        mean, var = jnp.where(real, mean, stats['mean']), jnp.where(real, var, stats['var'])
        parts.append((part - mean) / jnp.sqrt(var + EPS) * params['scale'] + params['bias'])
    return jnp.concatenate(parts)


def trained(x, variables, mask=None, groups=1, **fields):
    net = BatchNorm(groups=groups, **fields)
    y, changed = net.apply(variables, x, mask, True, mutable=['batch_stats'])
    return y, changed['batch_stats']['mean'], changed['batch_stats']['var']


@pytest.mark.parametrize('groups', [1, 4])
@pytest.mark.parametrize('mask', MASKS.values(), ids=MASKS)
def test_groups_and_masks(groups, mask):
    x, variables = make()
    for got, want in zip(trained(x, variables, mask, groups), exact(x, variables, mask, groups)):
        np.testing.assert_allclose(got, want, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize('groups', [1, 4])
@pytest.mark.parametrize('mask', MASKS.values(), ids=MASKS)
def test_gradients_are_those_of_the_formula(groups, mask):
    x, variables = make()
    stats, factor = variables['batch_stats'], np.random.default_rng(1).normal(size=SHAPE)

    def loss(params, x):
        y, _ = BatchNorm(groups=groups).apply(
            {'params': params, 'batch_stats': stats}, x, mask, True, mutable=['batch_stats']
        )
        return (jnp.sin(y) * factor).sum()  # masked rows have a gradient here, too

    got = jax.jit(jax.grad(loss, (0, 1)))(variables['params'], x)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), (variables['params'], x))
        want = jax.grad(
            lambda p, x: (jnp.sin(plain(p, stats, x, mask, groups)) * factor).sum(), (0, 1)
        )(*wide)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5), got, want)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(got))


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_values_far_from_zero(dtype):
    x, variables = make(mean=1000.0)
    x = jnp.asarray(x, dtype)
    got, want = trained(x, variables, groups=2), exact(x, variables, None, 2)
    assert got[0].dtype == dtype and got[1].dtype == got[2].dtype == jnp.float32
    precision = 1e-3 if dtype == jnp.float32 else 2e-2
    for a, b in zip(got, want):
        np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=precision, atol=precision)


def test_values_of_64_bits_keep_them():
    x, variables = make()
    mask, factor = MASKS['some'], np.random.default_rng(1).normal(size=SHAPE)
    with jax.enable_x64(True):
        x, variables = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), (x, variables))
        found, expected = trained(x, variables, mask, 4), exact(x, variables, mask, 4)
        for got, want in zip(found, expected):
            assert got.dtype == jnp.float64
            np.testing.assert_allclose(got, want, rtol=1e-13, atol=1e-13)

        def gradients(function):
            def loss(params, x):
                return (jnp.sin(function(params, x)) * factor).sum()

            return jax.grad(loss, (0, 1))(variables['params'], x)

        stats = variables['batch_stats']
        got = gradients(lambda p, x: trained(x, {'params': p, 'batch_stats': stats}, mask, 4)[0])
        want = gradients(lambda p, x: plain(p, stats, x, mask, 4))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9), got, want)


@pytest.mark.parametrize('mask', MASKS.values(), ids=MASKS)
def test_without_running_values_those_of_the_batch_are_taken(mask):
    x, variables = make()
    kept = {'mean': np.zeros(5), 'var': np.ones(5)}
    _, mean, var = exact(x, {**variables, 'batch_stats': kept}, mask, 4, keep=0)
    _, *found = trained(x, {'params': variables['params']}, mask, 4)
    for got, want in zip(found, (mean, var)):
        np.testing.assert_allclose(got, want, rtol=2e-6, atol=2e-6)


class Layer(nn.Module):
    """A layer of a stack, in training."""

    @nn.compact
    def __call__(self, x):
        return BatchNorm(name='bn')(x, None, True), None


@pytest.mark.parametrize('remat', [False, True])
def test_layers_of_a_stack_give_those_of_the_batch_too(remat):
    x, _ = make()
    layers = scan_trainable(Layer, 2, remat=remat, unroll=False, in_axes=())()
    params = layers.init(jax.random.key(0), x)['params']
    _, changed = layers.apply({'params': params}, x, mutable=['batch_stats'])
    found = changed['batch_stats']['bn']
    assert found['mean'].shape == found['var'].shape == (2, 5)
    np.testing.assert_allclose(found['mean'][0], x.mean((0, 1, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(found['mean'][1], 0, atol=1e-5)


def test_masked_clips_count_for_nothing():
    x, variables = make()
    other, mask = x.copy(), MASKS['some']
    other[mask == 0] = 1e6
    a, b = (trained(each, variables, mask, 4) for each in (x, other))
    np.testing.assert_array_equal(a[0][mask > 0], b[0][mask > 0])
    jax.tree.map(np.testing.assert_array_equal, a[1:], b[1:])


def test_rows_alone():
    x, variables = make(shape=(4, 5))
    for groups in (1, 4):
        got, want = trained(x, variables, None, groups), exact(x, variables, None, groups)
        for a, b in zip(got, want):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_evaluation_reads_running_values():
    x, variables = make()
    y = BatchNorm(groups=3).apply(variables, x)  # groups are of training
    stats, params = variables['batch_stats'], variables['params']
    want = (x - stats['mean']) / np.sqrt(stats['var'] + EPS) * params['scale'] + params['bias']
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)


def test_fresh_values_do_not_depend_on_the_batch():
    x, _ = make()
    variables = BatchNorm(groups=3).init(jax.random.key(0), x, train=True)
    assert {k: float(v[0]) for k, v in variables['batch_stats'].items()} == {'mean': 0, 'var': 1}
    assert {k: float(v[0]) for k, v in variables['params'].items()} == {'scale': 1, 'bias': 0}


@pytest.mark.parametrize('groups', [0, 3])
def test_groups_that_do_not_divide_the_batch(groups):
    x, variables = make()
    with pytest.raises(ValueError, match=f'batch_norm.groups={groups} must divide the 8 clips'):
        trained(x, variables, groups=groups)
