"""What rows cost: the formulas, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dist_jax.tasks.classify import CRITERIA, Classify

LABELS = (('a', 'b', 'c'), ('d', 'e'))


def cross_entropy(x, y):
    return -(y * (x - np.log(np.exp(x).sum(-1, keepdims=True)))).sum(-1)


def binary_cross_entropy(x, y):
    p = 1 / (1 + np.exp(-x))
    return -(y * np.log(p) + (1 - y) * np.log(1 - p)).mean(-1)


@pytest.mark.parametrize(
    ('criterion', 'formula'), [('cross_entropy', cross_entropy), ('bce', binary_cross_entropy)]
)
def test_criteria_of_mixed_targets(criterion, formula):
    rng = np.random.default_rng(0)
    task = Classify(LABELS, criterion=criterion)
    outputs = {'logits': tuple(jnp.asarray(rng.normal(0, 3, (4, len(n)))) for n in LABELS)}
    labels = np.array([[0, 1], [2, 0], [1, 1], [0, 0]], np.int32)
    own, partner = (task.targets({'label': jnp.asarray(rows)}) for rows in (labels, labels[::-1]))
    targets = tuple(0.7 * a + 0.3 * b for a, b in zip(own, partner))
    found = task.loss(outputs, targets, jnp.ones(4))
    pairs = zip(outputs['logits'], targets)
    expected = sum(formula(*(np.asarray(part, np.float64) for part in pair)) for pair in pairs)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), (outputs, targets))
        np.testing.assert_allclose(task.loss(*wide, jnp.ones(4)), expected, rtol=1e-12)


@pytest.mark.parametrize('criterion', CRITERIA)
def test_sure_logits_have_finite_losses(criterion):
    logits, targets = jnp.array([[200.0, -200.0]], jnp.bfloat16), jnp.array([[0.0, 1.0]])
    loss, gradient = jax.value_and_grad(lambda x: CRITERIA[criterion](x, targets)[0])(logits)
    assert 100 < loss < 500 and np.isfinite(np.asarray(gradient, np.float32)).all()


def test_cross_entropy_is_the_default():
    assert Classify(LABELS) == Classify(LABELS, criterion='cross_entropy')
