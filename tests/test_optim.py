"""Schedule and parameter groups."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dist_jax import optim
from dist_jax.models.api import ParamGroup

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


def test_no_warmup():
    schedule = optim.make_schedule(dataclasses.replace(SETTINGS, warmup_steps=0))
    np.testing.assert_allclose(schedule(0), 3.2e-4, rtol=1e-6)


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
