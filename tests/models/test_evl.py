"""EVL: the equations written out pair by pair, options, gradients. See also check_parity."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dist_jax.models import clip, evl, neighbour_kernel
from dist_jax.models.backbone import Backbone
from dist_jax.models.params import flatten

SPEC = clip.ClipSpec(24, 8, 32, 3, 2, 24, 16, 1, 1, vocab_size=20, context_length=6)
BACKBONE = Backbone(clip.KIND, SPEC)
OPTIONS = {
    'num_classes': (5,),
    'num_frames': 4,
    'dtype': jnp.float32,
    'depth': 2,
    'qkv_dim': 24,  # neither the backbone's width nor 64 a head
    'num_heads': 3,
    'mlp_ratio': 2.0,
    'cls_token_std': 0.02,
}


@pytest.fixture(scope='module')
def frozen():
    return {'visual': clip.init_params(jax.random.key(0), SPEC)['visual']}


def video(num_frames=4, clips=2):
    return jax.random.normal(jax.random.key(1), (clips, num_frames, 24, 24, 3))


def run(frozen, **options):
    """(model, features, variables); every parameter is random, zeros would hide mistakes."""
    options = OPTIONS | options
    model = evl.build(BACKBONE, **options)
    features = jax.jit(model.inputs)(frozen, {'video': video(options['num_frames'])})
    shapes = jax.eval_shape(model.net.init, jax.random.key(2), features)
    leaves, structure = jax.tree.flatten({'params': shapes['params']})
    keys = jax.random.split(jax.random.key(3), len(leaves))
    values = [0.3 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves)]
    return model, features, jax.tree.unflatten(structure, values)


@pytest.fixture(scope='module')
def plain(frozen):
    return run(frozen)


def logits(model, features, variables, **options):
    apply = jax.jit(lambda v, f: model.net.apply(v, f, **options))
    return np.asarray(apply(variables, features)['logits'][0])


def test_neighbour_attention_is_the_softmax_over_patches_of_the_next_frames():
    rng = np.random.default_rng(0)
    clips, frames, patches, heads, dim = 2, 3, 4, 2, 5
    q, k = rng.normal(size=(2, clips * frames, 1 + patches, heads, dim)).astype(np.float32)
    ours = np.asarray(jax.jit(evl.neighbour_attention, static_argnums=2)(q, k, frames))
    assert ours.shape == (clips, frames, 2, patches, patches)
    q, k = (x.reshape(clips, frames, 1 + patches, heads, dim)[:, :, 1:] for x in (q, k))
    for t in range(frames):
        for side, neighbour in enumerate((t - 1, t + 1)):
            if not 0 <= neighbour < frames:
                assert not ours[:, t, side].any()
                continue
            scores = np.einsum('bmhd,bnhd->bhmn', q[:, t], k[:, neighbour]) / np.sqrt(dim)
            shares = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
            np.testing.assert_allclose(ours[:, t, side], shares.mean(1), atol=1e-6)


@pytest.mark.parametrize(('length', 'num_heads', 'head_dim'), [(21, 4, 64), (130, 2, 128)])
def test_the_kernel_of_neighbour_attention_equals_the_plain_form(length, num_heads, head_dim):
    """As far from float32 as bfloat16 in plain JAX; the class token would win, if it could."""
    rng = np.random.default_rng(2)
    shape = 2 * 3, length, num_heads, head_dim
    q, k = (jnp.asarray(2 * rng.normal(size=shape), jnp.bfloat16) for _ in range(2))
    k = k.at[:, 0].set(20 * q[:, 3])
    lanes = num_heads * head_dim
    found = neighbour_kernel.mean_attention(
        *(x.reshape(*shape[:2], lanes) for x in (q, k)),
        num_heads=num_heads,
        head_dim=head_dim,
        clip=3,
        interpret=True,
    )
    exact, usual = (
        np.asarray(evl.neighbour_attention(q.astype(dtype), k.astype(dtype), 3), np.float32)
        for dtype in (jnp.float32, jnp.bfloat16)
    )
    found = np.asarray(found, np.float32).reshape(exact.shape)
    assert not found[:, 0, 0].any() and not found[:, -1, 1].any()
    assert np.abs(found - exact).mean() < 1.1 * np.abs(usual - exact).mean()
    assert np.abs(found - exact).max() < 1.5 * np.abs(usual - exact).max()


@pytest.mark.parametrize('grid', [(3, 3), (2, 4), (1, 1)])
def test_relative_sum_equals_the_sum_over_all_pairs(grid):
    rows, columns = grid
    patches, channels = rows * columns, 3
    rng = np.random.default_rng(1)
    weights = rng.normal(size=(2, 3, 2, patches, patches)).astype(np.float32)
    offsets = (2 * rows - 1) * (2 * columns - 1)
    tables = rng.normal(size=(2, offsets, channels)).astype(np.float32)
    expected = np.zeros((2, 3, patches, channels))
    for m in range(patches):
        for n in range(patches):
            down = m // columns - n // columns + rows - 1
            right = m % columns - n % columns + columns - 1
            vectors = tables[:, down * (2 * columns - 1) + right]
            expected[:, :, m] += np.einsum('bts,sc->btc', weights[..., m, n], vectors)
    ours = jax.jit(evl.relative_sum, static_argnums=2)(weights, tables, grid)
    np.testing.assert_allclose(ours.reshape(expected.shape), expected, atol=1e-5)


def test_no_array_holds_a_vector_for_every_pair_of_patches():
    rows, columns, channels = 7, 7, 96
    patches = rows * columns
    weights = jax.ShapeDtypeStruct((1, 1, 2, patches, patches), jnp.float32)
    tables = jax.ShapeDtypeStruct((2, 13 * 13, channels), jnp.float32)

    def loss(tables, weights):
        return (evl.relative_sum(weights, tables, (rows, columns)) ** 2).sum()

    jaxpr = jax.make_jaxpr(jax.grad(loss))(tables, weights)
    largest = max(np.prod(v.aval.shape, dtype=int) for eqn in jaxpr.eqns for v in eqn.outvars)
    assert largest < patches * patches * channels


def test_the_decoder_is_attention_over_projected_tokens(frozen, plain):
    """Keys and values of every token, as the paper writes it, give the same query."""
    model, features, variables = plain
    outputs = jax.jit(lambda v, f: model.net.apply(v, f, intermediates=True))(variables, features)
    params = jax.tree.map(np.asarray, variables['params'])
    layers = params['layers']

    def norm(x, p, i):
        centred = x - x.mean(-1, keepdims=True)
        return (
            centred / np.sqrt(centred.var(-1, keepdims=True) + 1e-5) * p['scale'][i] + p['bias'][i]
        )

    def linear(x, p, i):
        return x @ p['kernel'][i] + p['bias'][i]

    x = np.broadcast_to(params['cls_token'], (2, SPEC.width))
    for i in range(2):
        f = np.asarray(features['outputs'][i])
        temporal = layers['temporal']
        around = np.pad(f, [(0, 0), (1, 1), (0, 0), (0, 0)])
        y = f + sum(around[:, s : s + 4] * temporal['conv']['kernel'][i, s] for s in range(3))
        y = y + temporal['conv']['bias'][i] + temporal['positions'][i][:, None]
        moved = evl.relative_sum(features['attention'][i], temporal['relative'][i], (3, 3))
        y[:, :, 1:] += moved.reshape(*y.shape[:2], -1, y.shape[-1])
        y = norm(y, layers['norm3'], i).reshape(2, -1, SPEC.width)
        attn = layers['attn']
        split = lambda z: z.reshape(*z.shape[:-1], 3, 8)  # noqa: E731
        q = split(linear(norm(x, layers['norm1'], i), attn['q'], i))
        k, v = (split(linear(y, attn[name], i)) for name in ('k', 'v'))
        scores = np.einsum('bhe,bmhe->bhm', q, k) / np.sqrt(8)
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        mixed = np.einsum('bhm,bmhe->bhe', shares, v).reshape(2, -1)
        x = x + linear(mixed, attn['out'], i)
        hidden = linear(norm(x, layers['norm2'], i), layers['mlp']['c_fc'], i)
        hidden = hidden / (1 + np.exp(-1.702 * hidden))
        x = x + linear(hidden, layers['mlp']['c_proj'], i)
        np.testing.assert_allclose(outputs['queries'][i], x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('changed', [{'unroll': True}, {'remat': True}])
def test_scan_and_remat_change_nothing(plain, changed):
    model, features, variables = plain
    other = evl.build(BACKBONE, **OPTIONS, **changed)

    def loss(net):
        return lambda p: (net.apply(p, features)['logits'][0] ** 2).mean()

    (value, ours), (other_value, theirs) = (
        jax.jit(jax.value_and_grad(loss(m.net)))(variables) for m in (model, other)
    )
    np.testing.assert_allclose(value, other_value, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs)):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(b).max() + 1e-7)


def test_every_parameter_but_the_key_bias_is_learned(plain):
    model, features, variables = plain
    loss = lambda p: (model.net.apply(p, features)['logits'][0] ** 2).sum()  # noqa: E731
    grads = flatten(jax.jit(jax.grad(loss))(variables)['params'])
    assert {name for name, g in grads.items() if not np.any(g)} == {'layers/attn/k/bias'}


@pytest.mark.parametrize(
    ('option', 'leaf'),
    [
        ('temporal_conv', 'layers/temporal/conv/kernel'),
        ('temporal_positions', 'layers/temporal/positions'),
        ('temporal_cross_attention', 'layers/temporal/relative'),
    ],
)
def test_a_temporal_module_can_be_left_out(frozen, plain, option, leaf):
    model, features, variables = plain
    without, fewer, kept = run(frozen, **{option: False})
    assert leaf in flatten(variables['params']) and leaf not in flatten(kept['params'])
    assert ('attention' in fewer) == (option != 'temporal_cross_attention')
    # A module of zeros adds nothing, and nothing else depends on it.
    zeros = {
        name: jnp.zeros_like(p) if name.startswith(leaf.removesuffix('/kernel')) else p
        for name, p in flatten(variables['params']).items()
    }
    silent, rest = (
        {'params': _nested({n: p for n, p in zeros.items() if n in keep})}
        for keep in (zeros, flatten(kept['params']))
    )
    np.testing.assert_allclose(
        logits(model, features, silent), logits(without, fewer, rest), rtol=1e-4, atol=1e-5
    )


def _nested(flat):
    from dist_jax.models.params import unflatten

    return unflatten(flat)


def test_order_of_frames_matters_through_the_temporal_modules_alone(frozen):
    off = dict.fromkeys(('temporal_conv', 'temporal_positions', 'temporal_cross_attention'), False)
    for options, same in (({}, False), (off, True)):
        model, _, variables = run(frozen, **options)
        forwards, backwards = (
            logits(model, jax.jit(model.inputs)(frozen, {'video': v}), variables)
            for v in (video(), video()[:, ::-1])
        )
        assert np.allclose(forwards, backwards, atol=1e-4) == same


def test_one_frame_has_no_neighbours(frozen):
    model, features, variables = run(frozen, num_frames=1)
    assert not np.any(features['attention'])
    assert np.isfinite(logits(model, features, variables)).all()


def test_dropout_works_in_training_only(frozen):
    model, features, variables = run(frozen, mlp_dropout=0.5, head_dropout=0.5)
    calm = logits(model, features, variables)
    np.testing.assert_array_equal(calm, logits(model, features, variables))
    drawn = [
        logits(model, features, variables, train=True, rngs={'dropout': jax.random.key(i)})
        for i in (0, 0, 1)
    ]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert not np.allclose(drawn[0], drawn[2]) and not np.allclose(drawn[0], calm)


def test_initial_values_are_those_of_the_release(frozen):
    model = evl.build(BACKBONE, **OPTIONS | {'cls_token_std': 0.0})
    features = jax.jit(model.inputs)(frozen, {'video': video()})
    params = flatten(jax.jit(model.net.init)(jax.random.key(0), features)['params'])
    for name in ('cls_token', 'layers/temporal/positions', 'layers/temporal/relative'):
        assert not params[name].any()
    bounds = {
        'layers/temporal/conv/kernel': 3**-0.5,
        'layers/temporal/conv/bias': 3**-0.5,
        'head/column_0/classifier/kernel': 32**-0.5,
        'head/column_0/classifier/bias': 32**-0.5,
        'layers/attn/q/kernel': (6 / (32 + 24)) ** 0.5,
        'layers/mlp/c_fc/kernel': (6 / (32 + 64)) ** 0.5,
    }
    for name, bound in bounds.items():
        largest = np.abs(params[name]).max()
        assert 0.6 * bound < largest <= bound, name
    assert 0 < np.abs(params['layers/mlp/c_fc/bias']).max() < 1e-5


def test_attention_says_where_the_query_looked(frozen, plain):
    model, _, variables = plain
    look = jax.jit(lambda video: model.attention(variables, model.inputs(frozen, {'video': video})))
    shares = np.asarray(look(video()))
    assert shares.shape == (2, 4, 3, 3) and (shares >= 0).all()
    assert (shares.sum((1, 2, 3)) < 1).all()  # class tokens have the rest
    # A patch that differs from all others changes its own share most.
    other = look(video().at[0, 2, 8:16, 16:].multiply(9.0))
    change = np.abs(np.asarray(other)[0] - shares[0])
    assert np.unravel_index(change.argmax(), change.shape) == (2, 1, 2)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'head': 'text'}, 'model.head'),
        ({'depth': 4}, 'model.depth=4: the backbone has 3 blocks'),
        ({'num_heads': 5}, 'model.qkv_dim=24 is not a multiple of model.num_heads=5'),
        ({'mlp_dropout': 1.0}, 'model.mlp_dropout=1.0'),
    ],
)
def test_options_that_do_not_fit_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        evl.build(BACKBONE, **OPTIONS | options)


def test_clips_of_another_length_are_refused(frozen, plain):
    model, _, variables = plain
    shorter = evl.build(BACKBONE, **OPTIONS | {'num_frames': 2})
    features = jax.eval_shape(shorter.inputs, frozen, {'video': video(2)})
    with pytest.raises(ValueError, match='2 frames for a model of num_frames=4'):
        jax.eval_shape(model.net.apply, variables, features)
