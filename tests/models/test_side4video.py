"""Side4Video: its pieces, options, initial values, sizes. See also check_parity."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dist_jax.models import clip, kernels, side4video, side_network
from dist_jax.models.backbone import Backbone, Taps
from dist_jax.models.params import flatten

SPEC = clip.ClipSpec(16, 8, 32, 5, 2, 24, 16, 1, 1, vocab_size=20, context_length=6)
BACKBONE = Backbone(clip.KIND, SPEC)
OPTIONS = {
    'num_classes': (5,),
    'num_frames': 3,
    'dtype': jnp.float32,
    'side_dim': 64,
    'tap_every': 2,
}
FORMS = {'on CLIP': False, 'on EVA': True}  # post_norm


def build(**options):
    return side4video.build(BACKBONE, **OPTIONS | options)


@pytest.fixture(scope='module')
def features():
    """What the network takes of four clips of three frames."""
    frozen = {'visual': clip.init_params(jax.random.key(0), SPEC)['visual']}
    video = jax.random.normal(jax.random.key(1), (4, 3, 16, 16, 3))
    return jax.jit(build().inputs)(frozen, {'video': video})


@pytest.fixture(scope='module')
def fresh(features):
    """Initial values of both forms."""
    return {
        post_norm: jax.jit(build(post_norm=post_norm).net.init)(jax.random.key(2), features)
        for post_norm in FORMS.values()
    }


def trained(variables):
    """Other values than where training starts: zeros and ones would hide mistakes."""
    leaves, structure = jax.tree.flatten(variables)
    keys = jax.random.split(jax.random.key(3), len(leaves))
    noisy = [x + 0.1 * jax.random.uniform(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, noisy)


@functools.cache
def program(train, **options):
    """(variables, features, mask) -> (outputs, statistics afterwards)."""
    net = build(**options).net

    @jax.jit
    def call(variables, features, mask):
        outputs, updated = net.apply(
            variables, features, mask=mask, train=train, mutable=['batch_stats']
        )
        return outputs, updated['batch_stats']

    return call


def apply(variables, features, mask=None, train=False, **options):
    return program(train, **options)(variables, features, mask)


def test_class_tokens_are_shifted_without_wrapping_around():
    token = jnp.arange(1.0, 25.0).reshape(2, 3, 4)
    shifted = side_network.shift_class_token(token)
    for t in range(3):
        ahead = token[:, t + 1, :2] if t < 2 else jnp.zeros((2, 2))
        behind = token[:, t - 1, 2:] if t else jnp.zeros((2, 2))
        np.testing.assert_array_equal(shifted[:, t], jnp.concatenate([ahead, behind], -1))
    two = side_network.shift_class_token(token[:1, :2])
    np.testing.assert_array_equal(two[0], [[5, 6, 0, 0], [0, 0, 3, 4]])
    np.testing.assert_array_equal(side_network.shift_class_token(token[:, :1]), np.zeros((2, 1, 4)))


def test_patches_ask_and_the_class_token_is_only_looked_at():
    """Two heads written out; nothing comes out in the place of the last, the class token."""
    normal = jax.nn.initializers.normal(0.2)
    attention = side_network.FrameAttention(normal, normal, normal)
    tokens = jax.random.normal(jax.random.key(0), (2, 5, 128))
    params = jax.tree.map(np.asarray, attention.init(jax.random.key(1), 128)['params'])
    found = kernels.trained_attention(tokens, params, queries=4)
    assert found.shape == (2, 4, 128)
    expected = params['out']['bias']
    for h in range(2):
        qkv = params['qkv']['kernel'][:, :, h], params['qkv']['bias'][:, h]
        q, k, v = (np.asarray(tokens) @ qkv[0][:, i] + qkv[1][i] for i in range(3))
        weights = np.exp(q[:, :4] @ k.swapaxes(1, 2) / 8)
        heads = weights / weights.sum(-1, keepdims=True) @ v
        expected = expected + heads @ params['out']['kernel'][h]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    other = kernels.trained_attention(tokens.at[:, -1].add(1.0), params, queries=4)
    assert np.abs(other - found).max() > 1e-3  # It is looked at.


def standardised(tokens):
    tokens = np.asarray(tokens, np.float64)
    centred = tokens - tokens.mean(-1, keepdims=True)
    return centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + 1e-5)


def test_every_nth_block_is_read_and_the_rest_at_the_end_is_not():
    """Class tokens apart from patches; on CLIP as the norm in front of the taps makes them."""
    frozen = {'visual': clip.init_params(jax.random.key(0), SPEC)['visual']}
    video = jax.random.normal(jax.random.key(1), (1, 2, 16, 16, 3))
    read = {2: (1, 3), 3: (2,)}  # `tap_every`: blocks

    @jax.jit
    def run(frozen, video):
        found = {
            every: build(tap_every=every, post_norm=every == 3).inputs(frozen, {'video': video})
            for every in read
        }
        return found, BACKBONE.encode_image(
            frozen['visual'], video[0], Taps(outputs=tuple(range(5)))
        )

    found, expected = run(frozen, video)
    for every, blocks in read.items():
        taps = expected['outputs'][np.array(blocks), None]
        taps = taps if every == 3 else standardised(taps)
        ours = found[every]['taps']
        np.testing.assert_allclose(ours['token'], taps[:, :, :, 0], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(ours['patches'], taps[:, :, :, 1:], rtol=1e-5, atol=1e-5)


def uniform(fan_in):
    return 'uniform', fan_in**-0.5


def normal(deviation):
    return 'normal', deviation


# What the release starts from, with C = 64, D = 32 and patches of 8 x 8 pixels. The 24 is a
# constant of it, of networks of any depth.
SHARED = {
    'stem/(kernel|bias)': uniform(9 * 8 * 8),
    'layers/tap/linear/(kernel|bias)': uniform(32),
    'layers/conv/pw_./(kernel|bias)': uniform(64),
    'layers/conv/dw/(kernel|bias)': uniform(3),
    'layers/mlp/c_fc/bias': uniform(64),
    'layers/mlp/c_proj/bias': uniform(256),
    'head/column_0/classifier/(kernel|bias)': uniform(64),
}
INITIAL = {
    False: SHARED
    | {
        'layers/attn/qkv/kernel': normal(64**-0.5),
        'layers/attn/out/kernel': normal((64 * 24) ** -0.5),
        'layers/attn/(qkv|out)/bias': ('constant', 0),
        'layers/mlp/c_fc/kernel': normal(128**-0.5),
        'layers/mlp/c_proj/kernel': normal((64 * 24) ** -0.5),
        'positional_embedding': normal(0.01),
    },
    True: SHARED
    | {
        'layers/attn/(qkv|out)/(kernel|bias)': uniform(64),
        'layers/mlp/c_fc/kernel': uniform(64),
        'layers/mlp/c_proj/kernel': uniform(256),
        'positional_embedding': normal(0.02),
    },
}
NORMS = {'.*/scale': ('constant', 1), '.*/bias': ('constant', 0)}


def check_initial(path, value, rules):
    kind, size = next(rule for name, rule in rules.items() if re.fullmatch(name, path))
    if kind == 'constant':
        np.testing.assert_array_equal(value, size, err_msg=path)
        return
    deviation = size / 3**0.5 if kind == 'uniform' else size
    # Five standard errors of a deviation.
    assert value.std() == pytest.approx(deviation, rel=5 / (2 * value.size) ** 0.5), path
    assert abs(value.mean()) < 5 * deviation / value.size**0.5, path
    if kind == 'uniform':
        assert (0.8 if value.size > 50 else 0.3) * size < np.abs(value).max() <= size, path
    elif value.size > 1000:
        assert np.abs(value).max() > 2.5 * size, path


@pytest.mark.parametrize('post_norm', FORMS.values(), ids=FORMS)
def test_initial_values(fresh, post_norm):
    for path, value in flatten(fresh[post_norm]['params']).items():
        check_initial(path, np.asarray(value), INITIAL[post_norm] | NORMS)
    for path, value in flatten(fresh[post_norm]['batch_stats']).items():
        np.testing.assert_array_equal(value, path.endswith('var'), err_msg=path)


@pytest.mark.parametrize('post_norm', FORMS.values(), ids=FORMS)
def test_masked_clips_change_nothing(features, fresh, post_norm):
    """Neither statistics nor what others become, whatever is in them."""
    variables = trained(fresh[post_norm])
    alone = {
        'patches': features['patches'][:2],
        'taps': jax.tree.map(lambda tap: tap[:, :2], features['taps']),
    }
    outputs, stats = apply(variables, alone, train=True, post_norm=post_norm)
    wild = {
        'patches': features['patches'].at[2:].mul(50.0),
        'taps': jax.tree.map(lambda tap: tap.at[:, 2:].add(3.0), features['taps']),
    }
    mask = jnp.array([1.0, 1.0, 0.0, 0.0])
    with_others, found = apply(variables, wild, mask, train=True, post_norm=post_norm)
    np.testing.assert_allclose(
        with_others['logits'][0][:2], outputs['logits'][0], rtol=1e-4, atol=1e-5
    )
    for path, value in flatten(found).items():
        np.testing.assert_allclose(value, flatten(stats)[path], rtol=2e-5, atol=2e-6, err_msg=path)
        assert np.abs(value - flatten(variables['batch_stats'])[path]).max() > 1e-3, path
    _, kept = apply(variables, wild, jnp.zeros(4), train=True, post_norm=post_norm)
    for path, value in flatten(kept).items():
        np.testing.assert_array_equal(value, flatten(variables['batch_stats'])[path])


@pytest.mark.parametrize('post_norm', FORMS.values(), ids=FORMS)
def test_recomputing_and_unrolling_change_no_number(features, fresh, post_norm):
    variables = trained(fresh[post_norm])
    stats = {'batch_stats': variables['batch_stats']}

    def run(**options):
        net = build(post_norm=post_norm, **options).net

        def loss(params):
            outputs, updated = net.apply(
                {'params': params, **stats}, features, train=True, mutable=['batch_stats']
            )
            return jnp.square(outputs['logits'][0]).mean(), updated

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(variables['params'])

    (loss, stats_after), gradients = run()
    largest = max(np.abs(x).max() for x in jax.tree.leaves(gradients))
    whole = [] if post_norm else [{'remat': 'layers', 'unroll': True}]
    for options in ({'remat': 'branches'}, *whole):
        (found, updated), ours = run(**options)
        np.testing.assert_allclose(found, loss, rtol=3e-6)
        for path, value in flatten(updated).items():
            np.testing.assert_allclose(value, flatten(stats_after)[path], rtol=1e-5, atol=1e-6)
        for path, value in flatten(ours).items():
            plain = np.asarray(flatten(gradients)[path])
            # Some are zero on paper.
            atol = max(1e-4 * np.abs(plain).max(), 1e-6 * largest)
            np.testing.assert_allclose(value, plain, rtol=0, atol=atol, err_msg=path)


def test_any_number_of_frames(features, fresh):
    """One frame is a clip of its own; frames apart from each other by more than 3 layers reach."""
    variables = trained(fresh[False])
    for frames in (1, 2):
        taps = features['taps'].items()
        cut = {
            'patches': features['patches'][:, :frames],
            'taps': {name: tap[:, :, :frames] for name, tap in taps},
        }
        outputs, _ = apply(variables, cut, num_frames=8)
        assert outputs['logits'][0].shape == (4, 5)
        assert np.isfinite(outputs['logits'][0]).all()


def test_positions_of_another_grid():
    model = build()
    table = jnp.arange(4.0)[:, None] * jnp.ones(64)
    found = model.fit('params/positional_embedding', table, (9, 64))
    assert found.shape == (9, 64)
    # Rows of patches stay rows: the middle is the mean, and it grows along both sides.
    np.testing.assert_allclose(found[4], 1.5, atol=1e-6)
    grid = found[:, 0].reshape(3, 3)
    assert (np.diff(grid, axis=0) > 0.5).all() and (np.diff(grid, axis=1) > 0.2).all()
    np.testing.assert_allclose(
        model.fit('positional_embedding', jnp.full((16, 64), 7.0), (49, 64)), 7.0, rtol=1e-6
    )
    with pytest.raises(ValueError, match='stem/kernel'):
        model.fit('params/stem/kernel', jnp.ones((3, 8)), (3, 16))


@pytest.mark.parametrize(
    ('options', 'named'),
    [
        ({'side_dim': 96}, 'model.side_dim=96 must be a multiple of 64'),
        ({'side_dim': 0}, 'model.side_dim=0'),
        ({'mlp_ratio': 0.001}, 'model.mlp_ratio=0.001 of model.side_dim=64 leaves no hidden'),
        ({'tap_every': 6}, 'model.tap_every=6: the backbone has 5 blocks'),
        ({'tap_every': 0}, 'model.tap_every=0'),
        ({'tap_every': -1}, 'model.tap_every=-1'),
        ({'head': 'text'}, "model.head='text'"),
        ({'remat': 'block'}, "model.remat='block' is not one of none, branches, layers"),
    ],
)
def test_options_that_do_not_fit(options, named):
    with pytest.raises(ValueError, match=named):
        build(**options)


def test_groups_must_divide_the_batch(features, fresh):
    with pytest.raises(ValueError, match=r'batch_norm\.groups=3 must divide the 4 clips'):
        apply(fresh[False], features, train=True, batch_norm_groups=3)


def test_parts_that_are_left_out(features, fresh):
    variables = jax.tree.map(jnp.copy, fresh[False])
    variables = {**variables, 'params': trained(variables['params'])}
    token = features['taps']['token']
    moved = features | {'taps': features['taps'] | {'token': token.at[:, :, 0].add(1.0)}}
    seen = {}
    for shift in (True, False):
        net = build(class_token_shift=shift).net
        call = jax.jit(functools.partial(net.apply, intermediates=True))
        layers = [call(variables, each)['layers'] for each in (features, moved)]
        # Of the frame whose class token changed, and of the one after it, in the first layer.
        attn = [np.asarray(layer['attn'])[0] for layer in layers]
        seen[shift] = [np.abs(attn[0] - attn[1])[:, frame].max() > 1e-6 for frame in (0, 1)]
    assert seen == {True: [False, True], False: [True, False]}
    params = jax.eval_shape(build(temporal_conv=False).net.init, jax.random.key(2), features)[
        'params'
    ]
    assert fresh[False]['params']['layers'].keys() - params['layers'].keys() == {'conv', 'bn_1'}
