"""The kernel of DiST's temporal encoder means what its plain form means."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dist_jax.models import dist, kernels, temporal_kernel


def made(clips, frames, side, channels, hidden, kernel_size):
    """x, the gradient of its result, and parameters that bfloat16 holds exactly."""
    rng = np.random.default_rng(0)

    def normal(*shape, std=1.0):
        x = jnp.asarray(std * rng.normal(size=shape), jnp.bfloat16)
        return x.astype(jnp.float32)

    x, upstream = (normal(clips, frames, side * side, channels) for _ in range(2))
    return (
        x,
        upstream,
        {
            'ln': {'scale': 1 + normal(channels, std=0.25), 'bias': normal(channels, std=0.25)},
            'c_fc1': {
                'kernel': normal(kernel_size, channels, hidden, std=channels**-0.5),
                'bias': normal(hidden, std=0.25),
            },
            'c_fc2': {
                'kernel': normal(3, 3, hidden, channels, std=hidden**-0.5 / 2),
                'bias': normal(channels, std=0.25),
            },
        },
    )


def plain(x, upstream, params, dtype):
    """Output and gradients of the plain form."""

    def form(x, params):
        return dist.temporal_net(x, params, dtype)

    y, back = jax.vjp(form, x.astype(dtype), params)
    return y, back(upstream.astype(dtype))


def kernel(x, upstream, params):
    x, upstream = x.astype(jnp.bfloat16), upstream.astype(jnp.bfloat16)
    y = temporal_kernel.temporal_net(x, params, interpret=True)
    to_x, parts = temporal_kernel.temporal_net_gradient(x, upstream, params, interpret=True)
    sums = jax.tree.map(lambda part, leaf: part.sum(0).reshape(leaf.shape), parts, params)
    return y, (to_x, sums)


def error(found, exact):
    return float(jnp.linalg.norm(found.astype(jnp.float32) - exact) / jnp.linalg.norm(exact))


@pytest.mark.parametrize(
    ('sizes', 'some'),
    [
        ((2, 4, 3, 16, 24, 3), None),
        ((1, 3, 5, 8, 8, 3), None),  # one core's part
        ((2, 12, 4, 16, 8, 3), 4),  # cut in time
        ((1, 15, 3, 8, 16, 5), 5),
    ],
)
def test_it_is_no_further_from_float32_than_bfloat16_in_plain_jax(sizes, some, monkeypatch):
    if some:
        monkeypatch.setattr(temporal_kernel, 'frames_at_a_time', lambda *_: some)
    inputs = made(*sizes)
    ours = kernel(*inputs)
    exact, usual = (
        jax.jit(functools.partial(plain, dtype=dtype))(*inputs)
        for dtype in (jnp.float32, jnp.bfloat16)
    )
    errors = jax.tree.map(
        lambda one, other, wide: (error(one, wide), error(other, wide)), ours, usual, exact
    )
    for path, (mine, theirs) in jax.tree_util.tree_leaves_with_path(
        errors, is_leaf=lambda leaf: isinstance(leaf, tuple) and isinstance(leaf[0], float)
    ):
        assert mine <= min(1.1 * theirs, 0.01), jax.tree_util.keystr(path)


def test_clips_without_room_are_cut_or_left_to_the_plain_form():
    def some(places, frames):
        return temporal_kernel.frames_at_a_time((1, frames, places, 96), 3)

    assert some(196, 16) == 16
    assert 64 > some(256, 64) > 8
    assert some(4096, 16) is None
    x, _, params = made(1, 4, 3, 16, 24, 3)
    assert temporal_kernel.fits(x.astype(jnp.bfloat16), params)
    assert not temporal_kernel.fits(x, params)  # float32
    assert not temporal_kernel.fits(x[:, :, :8].astype(jnp.bfloat16), params)  # no square


def test_gradients_are_those_of_the_plain_form_where_no_tpu_is():
    x, upstream, params = made(2, 4, 3, 16, 24, 3)
    inputs = x.astype(jnp.bfloat16), params

    @jax.jit
    def run(x, params):
        found, back = jax.vjp(
            functools.partial(
                kernels.trained_on_tpu,
                temporal_kernel.temporal_net,
                temporal_kernel.temporal_net_gradient,
                functools.partial(dist.temporal_net, dtype=jnp.bfloat16),
            ),
            x,
            params,
        )
        return found, back(upstream.astype(jnp.bfloat16))

    expected = jax.jit(functools.partial(plain, dtype=jnp.bfloat16))(x, upstream, params)
    for mine, other in zip(jax.tree.leaves(run(*inputs)), jax.tree.leaves(expected)):
        np.testing.assert_allclose(
            np.asarray(mine, np.float32), np.asarray(other, np.float32), rtol=0.02, atol=0.02
        )
