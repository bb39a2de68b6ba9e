"""DiST's integration block by kernels means what its modules mean, gradients too."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.experimental import pallas as pl

from dist_jax.models import clip, dist, integration_kernel
from dist_jax.models.backbone import Backbone

CLIPS, LAYERS = 2, 2


def block(dtype, *, alpha, temporal, temporal_hidden, kernel, last):
    return dist.DistLayer(
        alpha=alpha,
        integration_dim=128,
        temporal_dim=temporal,
        temporal_hidden=8,
        ffn_hidden=256,
        temporal_ffn_hidden=temporal_hidden,
        temporal_kernel=kernel,
        spatial=True,
        temporal=True,
        integration=True,
        dtype=dtype,
        kernel_init=nn.initializers.normal(0.08),
        last=last,
        outputs=last,
    )


def errors(found, usual, exact):
    """Distances from the exact, ours and the usual, as shares of the exact."""

    def one(*leaves):
        ours, theirs, exact = (np.asarray(leaf, np.float64) for leaf in leaves)
        size = np.linalg.norm(exact)
        return np.linalg.norm(ours - exact) / size, np.linalg.norm(theirs - exact) / size

    trees = (jax.tree.leaves(tree) for tree in (found, usual, exact))
    return np.array([one(*leaves) for leaves in zip(*trees, strict=True)])


@pytest.mark.parametrize(
    ('frames', 'tokens', 'options'),
    [
        (3, 10, dict(alpha=2, temporal=32, temporal_hidden=48, kernel=3, last=False)),
        (2, 17, dict(alpha=3, temporal=96, temporal_hidden=16, kernel=5, last=False)),
        (3, 5, dict(alpha=1, temporal=16, temporal_hidden=32, kernel=3, last=True)),
    ],
)
def test_kernels_equal_the_plain_form(frames, tokens, options):
    """No further from float32, of the same rounded numbers, than bfloat16 in plain JAX."""
    alpha, temporal, last = (options[name] for name in ('alpha', 'temporal', 'last'))
    rng = np.random.default_rng(0)

    def array(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.bfloat16)

    x, r = array(CLIPS, alpha * frames, tokens - 1, temporal), array(CLIPS, frames, tokens, 128)
    taps = array(LAYERS, CLIPS * frames, tokens, 128)
    upstream = jax.tree.map(lambda like: array(*like.shape), (r if last else x, r))
    layers = {dtype: block(dtype, **options) for dtype in (jnp.float32, jnp.bfloat16)}
    init = functools.partial(layers[jnp.bfloat16].init, jax.random.key(0))
    params = jax.eval_shape(init, (x, r), 0, taps)['params']
    del params['temporal_net']
    if last:
        del params['integration2temporal']
    params = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.1, jnp.float32), params
    )
    for norm in ('ln', 'ln_temporal'):
        params['integration_net'][norm]['scale'] += 1
    assert integration_kernel.fits(x, r, taps, params)

    @functools.partial(jax.jit, static_argnums=0)
    def plain(dtype, x, r, taps, params, upstream):
        parts = layers[dtype]._parts(parent=None)
        enter, join = dist.plain_forms({name: parts[name] for name in params}, last)

        def whole(x, r, params):
            return join(x, enter(taps[1], r, params), params)

        out, pull = jax.vjp(whole, x, r, params)
        return out, pull(upstream)

    @jax.jit
    def kernels(x, r, taps, params, upstream):
        index = jnp.asarray(1)
        *out, m = integration_kernel.forward(x, r, taps, index, params, last=last, interpret=True)
        gradients = integration_kernel.backward(
            x, m, taps, index, params, upstream, last=last, interpret=True
        )
        return tuple(out), gradients

    found = kernels(x, r, taps, params, upstream)
    usual = plain(jnp.bfloat16, x, r, taps, params, upstream)
    widened = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), (x, r, taps, params, upstream))
    ours, theirs = errors(found, usual, plain(jnp.float32, *widened)).T
    assert np.all(ours < 1.1 * theirs)
    assert np.all(ours < 0.02)


SPEC = clip.ClipSpec(16, 8, 128, 3, 2, 24, 16, 1, 1, vocab_size=20, context_length=6)


def test_the_network_trains_through_kernels(monkeypatch):
    """Loops, recomputation and all: gradients no further from float32 than in plain bfloat16."""
    rng = np.random.default_rng(0)
    features = {
        'taps': jnp.asarray(rng.normal(size=(3, 16, 5, 128)), jnp.bfloat16),
        'patches': jnp.asarray(rng.normal(size=(8, 4, 4, 192)), jnp.bfloat16),
    }

    def net(dtype, remat=False):
        return dist.build(
            Backbone(clip.KIND, SPEC),
            num_classes=(4,),
            num_frames=4,
            head='linear',
            dtype=dtype,
            integration_dim=128,
            temporal_dim=32,
            ada_pooling_layers=1,
            init_std=0.1,
            remat=remat,
        ).net

    params = jax.jit(net(jnp.float32).init)(jax.random.key(0), features)

    def gradient(net, features):
        def loss(params):
            return jnp.square(net.apply(params, features)['logits'][0]).mean()

        found = jax.device_get(jax.jit(jax.grad(loss))(params))
        return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(found)])

    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), features)
    exact = gradient(net(jnp.float32), wide)
    usual = gradient(net(jnp.bfloat16), features)
    called, call = set(), pl.pallas_call

    def interpreted(*arguments, **options):
        called.add(options['name'])
        return call(*arguments, **options | {'interpret': True})

    def on_tpu(*inputs, default, tpu=None, cpu=None):
        return (tpu or cpu or default)(*inputs)

    monkeypatch.setattr(pl, 'pallas_call', interpreted)
    monkeypatch.setattr(jax.lax, 'platform_dependent', on_tpu)
    found = gradient(net(jnp.bfloat16, remat=True), features)
    forward = {'integration', 'temporal_net'}
    assert called >= forward | {f'{name}_gradient' for name in forward}
    away = [np.linalg.norm(each - exact) for each in (found, usual)]
    assert away[0] < 1.1 * away[1]
    assert away[0] < 0.05 * np.linalg.norm(exact)
