"""DiST: shapes, options, gradients. Agreement with the authors is tested through check_parity."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dist_jax import optim
from dist_jax.models import clip, dist, time_conv
from dist_jax.models.backbone import Backbone, Taps
from dist_jax.models.layers import l2_normalize, patchify

SPEC = clip.ClipSpec(16, 8, 32, 3, 1, 24, 16, 1, 1, vocab_size=20, context_length=6)
BACKBONE = Backbone(clip.KIND, SPEC)
INIT = jax.nn.initializers.normal(0.02)
OPTIONS = {
    'num_classes': (4,),
    'num_frames': 4,
    'dtype': jnp.float32,
    'integration_dim': 64,
    'temporal_dim': 8,
    'ada_pooling_layers': 1,
}


@pytest.fixture(scope='module')
def backbone():
    return jax.jit(clip.init_params, static_argnums=1)(jax.random.key(0), SPEC)


def video(num_frames=4, clips=2):
    return jax.random.normal(jax.random.key(1), (clips, num_frames, 16, 16, 3))


def tokens(*counts):
    return tuple(
        jax.random.randint(jax.random.key(i), (count, 6), 1, 20) for i, count in enumerate(counts)
    )


def run(backbone, **options):
    """(model, frozen, features, variables, outputs) of a build with these options."""
    options = OPTIONS | options
    model = dist.build(BACKBONE, **options)

    @jax.jit
    def made(backbone, texts, video):
        frozen = model.frozen.prepare(backbone, texts)
        features = model.inputs(frozen, {'video': video})
        outputs, variables = model.net.init_with_output(jax.random.key(2), features)
        return frozen, features, variables, outputs

    return model, *made(backbone, tokens(*options['num_classes']), video(options['num_frames']))


@pytest.fixture(scope='module')
def plain(backbone):
    return run(backbone)


def loss_and_gradients(model, features, variables):
    loss = lambda p: (model.net.apply(p, features)['logits'][0] ** 2).mean()  # noqa: E731
    return jax.jit(jax.value_and_grad(loss))(variables)


@pytest.fixture(scope='module')
def plain_gradients(plain):
    model, _, features, variables, _ = plain
    return loss_and_gradients(model, features, variables)


def test_outputs(plain):
    *_, outputs = plain
    assert outputs['embedding'].shape == (2, 24)
    assert [logits.shape for logits in outputs['logits']] == [(2, 4)]
    assert outputs['logits'][0].dtype == jnp.float32
    # Cosine times the scale of 100.
    assert np.abs(outputs['logits'][0]).max() <= 100.01


@pytest.mark.parametrize(
    'changed', [{'unroll': True}, {'remat': True}, {'unroll': True, 'remat': True}]
)
def test_scan_and_remat_change_nothing(plain, plain_gradients, changed):
    _, _, features, variables, _ = plain
    value, ours = plain_gradients
    other = dist.build(BACKBONE, **OPTIONS, **changed)
    other_value, theirs = loss_and_gradients(other, features, variables)
    np.testing.assert_allclose(value, other_value, rtol=1e-5)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs)):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(b).max() + 1e-7)


def test_selected_layers_read_those_blocks(backbone, plain):
    _, _, all_features, _, _ = plain
    _, _, features, variables, _ = run(backbone, selected_layers=(0, 2))
    np.testing.assert_allclose(features['taps'], all_features['taps'][np.array([0, 2])], atol=1e-5)
    assert variables['params']['layers']['input_linear']['kernel'].shape[0] == 1


def test_one_layer_has_no_stack(backbone):
    *_, variables, outputs = run(backbone, selected_layers=(1,))
    assert 'layers' not in variables['params'] and 'last_layer' in variables['params']
    assert np.isfinite(outputs['logits'][0]).all()


def test_backbone_sees_every_alpha_th_frame(plain):
    model, frozen, features, *_ = plain
    other = video().at[:, 1::2].set(0.0)
    again = jax.jit(model.inputs)(frozen, {'video': other})
    np.testing.assert_array_equal(features['taps'], again['taps'])
    assert features['taps'].shape[:2] == (3, 2 * 2)


def test_only_the_last_integration_map_has_no_gradient(plain_gradients):
    _, grads = plain_gradients
    silent = {
        jax.tree_util.keystr(path, simple=True, separator='/')
        for path, g in jax.tree_util.tree_leaves_with_path(jax.device_get(grads['params']))
        if not np.any(g)
    }
    assert silent == {
        'last_layer/integration2temporal/kernel',
        'last_layer/integration2temporal/bias',
    }


def test_order_of_frames_matters(plain):
    model, frozen, _, variables, outputs = plain
    reversed_features = jax.jit(model.inputs)(frozen, {'video': video()[:, ::-1]})
    other = jax.jit(model.net.apply)(variables, reversed_features)
    assert np.abs(other['embedding'] - outputs['embedding']).max() > 1e-4


def test_linear_and_two_heads(backbone):
    *_, variables, outputs = run(backbone, head='linear', num_classes=(3, 5))
    assert [logits.shape for logits in outputs['logits']] == [(2, 3), (2, 5)]
    assert variables['params']['head']['column_1']['classifier']['kernel'].shape == (24, 5)
    _, frozen, *_, outputs = run(backbone, num_classes=(3, 5))
    assert [text.shape for text in frozen['text']] == [(3, 24), (5, 24)]
    assert [logits.shape for logits in outputs['logits']] == [(2, 3), (2, 5)]


def test_frozen_logits_are_the_mean_cosine_of_the_frames(backbone, plain):
    *_, outputs = plain
    frames = video()[:, ::2].reshape(-1, 16, 16, 3)

    @jax.jit
    def cosines(backbone):
        seen = clip.encode_image(backbone['visual'], frames, SPEC, Taps(embedding=True))
        text = l2_normalize(clip.KIND.encode_text(backbone['text'], tokens(4)[0], SPEC))
        return l2_normalize(seen['embedding']) @ text.T

    expected = 100 * np.asarray(cosines(backbone)).reshape(2, 2, 4).mean(1)
    (found,) = outputs['frozen_logits']
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('size', [(5, 3), (3, 5)])
def test_time_conv_equals_a_convolution(size):
    kernel_size, frames = size
    x = jax.random.normal(jax.random.key(0), (2, frames, 3, 4))
    conv = time_conv.TimeConv(6, kernel_size, jnp.float32, INIT)
    variables = conv.init(jax.random.key(1), x)
    kernel = variables['params']['kernel']
    expected = jax.lax.conv_general_dilated(
        x, kernel[:, None], (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )
    np.testing.assert_allclose(conv.apply(variables, x), expected, rtol=1e-5, atol=1e-6)


def test_space_conv_equals_a_convolution():
    x = jax.random.normal(jax.random.key(0), (2, 3, 5, 4, 6))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 6, 7))
    expected = jax.lax.conv_general_dilated(
        x.reshape(6, 5, 4, 6), kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )
    found = dist.conv_space(x, kernel).reshape(6, 5, 4, 7)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'num_frames': 5}, 'num_frames=5'),
        ({'integration_dim': 100}, 'integration_dim=100'),
        ({'temporal_kernel': 4}, 'temporal_kernel=4'),
        ({'head': 'cosine'}, "head='cosine'"),
        ({'selected_layers': (0, 3)}, 'blocks 0..2'),
    ],
)
def test_options_that_do_not_fit_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        dist.build(BACKBONE, **(OPTIONS | options))


def test_clip_of_another_length_is_named(plain):
    model, _, features, variables, _ = plain
    with pytest.raises(ValueError, match='num_frames=4'):
        model.net.apply(variables, features | {'patches': patchify(video(8), 8)})


def test_initial_weights_have_the_spread_of_the_release():
    """Sigma 0.02 for all but the projection, and the packed queries, keys and values."""
    spec = clip.ClipSpec(16, 8, 192, 3, 3, 96, 16, 1, 1, vocab_size=20, context_length=6)
    backbone = Backbone(clip.KIND, spec)
    model = dist.build(backbone, **OPTIONS | {'integration_dim': 128, 'temporal_dim': 32})
    shapes = {
        'taps': jnp.zeros((3, 2, 5, 192)),
        'patches': jnp.zeros((1, 4, 4, 192)),
        'text': (jnp.zeros((4, 96)),),
        'logit_scale': jnp.zeros(()),
        'embedding': jnp.zeros((2, 96)),
    }
    params = jax.device_get(jax.jit(model.net.init)(jax.random.key(0), shapes)['params'])
    pooled = []
    for path, value in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator='/')
        if name.endswith('bias'):
            assert not np.any(value), name
        elif name.endswith('scale'):
            assert np.all(value == 1), name
        elif name == 'proj/kernel':
            assert np.std(value) == pytest.approx(128**-0.5, rel=0.05)
        elif name.endswith('qkv/kernel'):  # Xavier over (C, 3 C)
            assert np.abs(value).max() == pytest.approx((6 / 512) ** 0.5, rel=0.01)
        else:
            assert np.std(value) == pytest.approx(0.02, rel=6 / (2 * value.size) ** 0.5), name
            pooled.append(np.ravel(value))
    assert np.std(np.concatenate(pooled)) == pytest.approx(0.02, rel=0.01)


@pytest.mark.parametrize('form', [time_conv._time_products, time_conv._time_convolution])
@pytest.mark.parametrize(('channels', 'features'), [(96, 16), (16, 16)])
def test_taps_over_time_are_summed_in_float32(form, channels, features):
    """The result in bfloat16 is the exact one, rounded once."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 6, 9, channels)), jnp.bfloat16)
    kernel = jnp.asarray(rng.normal(size=(5, channels, features)), jnp.bfloat16)
    exact = np.asarray(form(x.astype(jnp.float32), kernel.astype(jnp.float32)))
    found = np.asarray(jax.jit(form)(x, kernel), np.float32)
    np.testing.assert_allclose(found, exact, rtol=2**-8, atol=1e-4)


def parameters(**branches):
    """Names of the parts that a network has: in its layers, in the last one, beside them."""
    model = dist.build(BACKBONE, **OPTIONS, **branches)
    frozen = jax.eval_shape(model.frozen.prepare, BACKBONE.abstract_params(), tokens(4))
    features = jax.eval_shape(model.inputs, frozen, {'video': video()})
    outputs, variables = jax.eval_shape(model.net.init_with_output, jax.random.key(2), features)
    assert outputs['logits'][0].shape == (2, 4)
    params = variables['params']
    settings = optim.OptimizerSettings(1e-3, 0.0, 0, 10)
    jax.eval_shape(optim.of_model(model, params, settings).init, params)  # groups match
    return set(params.get('layers', ())), set(params['last_layer']), set(params)


TEMPORAL = {'temporal_net', 'temporal2integration', 'integration2temporal'}


def test_a_branch_that_is_left_out_has_no_parameters():
    layer, last, beside = parameters()
    assert layer == last
    for branches, gone, gone_beside in (
        ({'spatial_branch': False}, {'input_linear'}, {'proj_spatial_cls_token'}),
        ({'temporal_branch': False}, TEMPORAL, {'temporal_stem'}),
    ):
        found = parameters(**branches)
        assert found == (layer - gone, layer - gone, beside - gone_beside)
    inner, outer, around = parameters(integration_branch=False)
    assert inner == {'temporal_net'} and around == beside
    assert outer == last - {'integration_net', 'integration2temporal'}
    with pytest.raises(ValueError, match='nothing reads the video'):
        dist.build(BACKBONE, **OPTIONS, spatial_branch=False, temporal_branch=False)


def test_without_the_temporal_branch_other_frames_change_nothing(backbone):
    model, frozen, _, variables, outputs = run(backbone, temporal_branch=False)
    changed = video().at[:, 1::2].add(1.0)
    features = jax.jit(model.inputs)(frozen, {'video': changed})
    again = jax.jit(model.net.apply)(variables, features)
    np.testing.assert_array_equal(again['logits'][0], outputs['logits'][0])


def test_init_std_is_of_all_matrices_and_tables(plain, backbone):
    """Five times as large, but for what has an initial value of its own."""
    wide, usual = jax.device_get((run(backbone, init_std=0.1)[3], plain[3]))
    own = {'proj', 'qkv'}
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(wide), jax.tree.leaves(usual)):
        names = [part.key for part in path]
        if names[-1] not in ('scale', 'bias'):  # these start as 1 and 0
            ratio = np.std(a) / np.std(b)
            np.testing.assert_allclose(ratio, 1 if own & set(names) else 5, rtol=1e-5)
