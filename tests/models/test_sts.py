"""The five networks of STS: sizes, forms, options, and what they do with single frames."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import keystr, tree_leaves_with_path

from dist_jax.models import sts

# In millions: before the head as the paper's code counts, and with 400 classes for videos.
SIZES = {
    'csn50': (12.31, 13.13),
    'r2plus1d34': (63.55, 63.76),
    'slowonly50': (31.63, 32.45),
    'slowfast50_4x16': (33.56, 34.48),
    'slowfast50_8x8': (33.64, 34.57),
    'x3d_s': (2.09, 3.79),
}
# Convolutions that STS takes the place of.
SEPARABLE = {
    'csn50': 16,
    'r2plus1d34': 33,
    'slowonly50': 9,
    'slowfast50_4x16': 25,
    'slowfast50_8x8': 25,
    'x3d_s': 26,
}


def build(network='csn_tiny', num_frames=4, **options):
    options = {'num_classes': (5,), 'dtype': jnp.float32, 'dropout': 0.0} | options
    return sts.build(network=network, num_frames=num_frames, **options)


def clip(num_frames=4, size=32, batch=2):
    video = np.random.default_rng(0).normal(size=(batch, num_frames, size, size, 3))
    return {'video': jnp.asarray(video, jnp.float32)}


def shapes(model, inputs):
    return jax.eval_shape(model.net.init, jax.random.key(0), inputs)


def _initial(model, inputs):
    # Compiled as it stands: to make it fast would take longer than to run it.
    quick = {'xla_backend_optimization_level': 0, 'xla_llvm_disable_expensive_passes': True}
    return jax.jit(model.net.init, compiler_options=quick)(jax.random.key(1), inputs)


def count(tree):
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


@pytest.fixture(scope='module', autouse=True)
def two_blocks():
    """As much of the smallest network as tests here need: the second block is strided."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sts.NETWORKS, 'csn_tiny', sts.csn(8, (1, 1), stem_size=3))
        yield


@pytest.fixture(scope='module')
def tiny(two_blocks):
    """(model, inputs, variables) of a network for videos."""
    model, inputs = build(), clip()
    return model, inputs, _initial(model, inputs)


@functools.cache
def published(network):
    """(variables of a published network, kernels of the convolutions that STS takes)."""
    taken = []

    def noted(x, kernel, stride=1, mode='official'):
        taken.append(kernel.shape)
        return sts.conv3d.conv3d(x, kernel, stride)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sts.conv3d, 'sts_conv3d', noted)
        variables = shapes(build(network, 8, num_classes=(400,)), clip(8))
    return variables, taken


@pytest.mark.parametrize('network', SIZES)
def test_parameters_are_as_many_as_published(network):
    params = published(network)[0]['params']
    behind = count(params['head']) + count(params.get('fc1', {}))
    assert (count(params) - behind) / 1e6 == pytest.approx(SIZES[network][0], abs=0.005)
    assert count(params) / 1e6 == pytest.approx(SIZES[network][1], abs=0.005)


@pytest.mark.parametrize('network', SIZES)
def test_sts_changes_no_parameter_and_takes_these_convolutions(network):
    variables, taken = published(network)
    plain = shapes(build(network, 8, num_classes=(400,), sts='off'), clip(8))
    assert jax.tree.map(jnp.shape, plain) == jax.tree.map(jnp.shape, variables)
    assert len(taken) == SEPARABLE[network]


@pytest.mark.parametrize('network', ('csn50', 'r2plus1d34', 'slowfast50_8x8', 'x3d_s'))
def test_initial_values_of_both_forms(network, monkeypatch):
    # The published ones at a tenth of their size.
    small = {
        'csn50': sts.csn(16, (1, 1)),
        'r2plus1d34': sts.r2plus1d(16, (1, 1)),
        'slowfast50_8x8': sts.slowfast(4, 7, 16, 8, (1, 1, 1)),
        'x3d_s': sts.x3d(16, (1, 1)),
    }
    monkeypatch.setitem(sts.NETWORKS, network, small[network])
    video, image = (
        _initial(build(network, 1, form=form), clip(1))['params'] for form in sts.FORMS[::-1]
    )
    head = image['head']['column_0']['classifier']
    bound = head['kernel'].shape[0] ** -0.5
    assert 0.9 * bound < float(jnp.abs(head['kernel']).max()) <= bound
    assert float(jnp.abs(head['bias']).max()) > 0
    head = video['head']['column_0']['classifier']
    assert float(head['kernel'].std()) == pytest.approx(0.01, rel=0.1)
    assert not head['bias'].any()
    for path, kernel in tree_leaves_with_path(video):
        name = keystr(path, simple=True, separator='/')
        if name.endswith('conv/kernel') and kernel.size > 4000:
            *window, _, features = kernel.shape
            deviation = (2 / (features * np.prod(window))) ** 0.5
            assert float(kernel.std()) == pytest.approx(deviation, rel=0.1), name
    blocks = {
        name: block
        for path in (video, video.get('slow_path', {}), video.get('fast_path', {}))
        for name, block in path.items()
        if name.startswith('layer') and 'lateral' not in name
    }
    zero = network in ('slowfast50_8x8', 'x3d_s')
    for block in blocks.values():
        last = block['conv3' if 'conv3' in block else 'conv2']['bn']['scale']
        assert (not last.any()) == zero
    assert all((leaf == 1).all() for leaf in _scales(image))


def _scales(tree):
    found = tree_leaves_with_path(tree)
    return [leaf for path, leaf in found if keystr(path).endswith("['scale']")]


def test_a_picture_meets_centre_taps_alone(tiny):
    _, _, variables = tiny
    picture, net = clip(1), build(sts='off', num_frames=1).net

    @jax.jit
    @jax.value_and_grad
    def loss(params):
        return net.apply(variables | {'params': params}, picture)['logits'][0].sum()

    value, gradients = loss(variables['params'])
    # What lies beside the centre may be anything.
    other = jax.tree.map(
        lambda k: k.at[0].add(1).at[-1].add(1) if k.ndim == 5 and len(k) == 3 else k,
        variables['params'],
    )
    assert loss(other)[0] == value
    kernels = [g for g in jax.tree.leaves(gradients) if g.ndim == 5 and len(g) == 3]
    assert kernels
    for gradient in kernels:
        assert not gradient[0].any() and not gradient[2].any() and gradient[1].any()


def test_inflated_kernels_are_shares_of_the_centre(tiny):
    _, _, variables = tiny
    found = build(inflate=True).begin(variables)
    for path, before in tree_leaves_with_path(variables):
        after = found
        for key in path:
            after = after[key.key]
        if before.ndim == 5 and len(before) == 3:
            for tap, share in enumerate((1 / 9, 1 / 3, 1 / 9)):
                np.testing.assert_allclose(after[tap], before[1] * share, rtol=1e-6)
        else:
            np.testing.assert_array_equal(after, before)
    assert build().begin is None


def test_blocks_that_are_computed_again_give_the_same(tiny):
    model, inputs, variables = tiny

    def value(net):
        def loss(params):
            outputs, updated = net.apply(
                variables | {'params': params}, inputs, train=True, mutable=['batch_stats']
            )
            return (outputs['logits'][0] ** 2).sum(), updated

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(variables['params'])

    expected, found = value(model.net), value(build(remat='blocks').net)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), expected, found
    )


def test_stochastic_depth_drops_branches_of_clips(tiny):
    model, inputs, variables = tiny
    block = sts.Block(sts.csn_block(0, 0, 4, 1), 1, sts.Rules(jnp.float32), 1e-3, drop=0.5)
    x = jnp.ones((64, 1, 4, 4, 16))
    made = jax.jit(block.init, static_argnums=(2, 3))(jax.random.key(0), x, None, False)
    y, _ = jax.jit(
        lambda x: block.apply(
            made, x, None, True, rngs={'dropout': jax.random.key(2)}, mutable=['batch_stats']
        )
    )(x)
    passed = (y == x).all((1, 2, 3, 4))
    assert 10 < int(passed.sum()) < 54
    # Nothing is dropped in evaluation, nor at a rate of 0, which needs no random numbers.
    still, dropping = (
        jax.jit(net.apply)(variables, inputs)
        for net in (model.net, build(stochastic_depth=0.5).net)
    )
    np.testing.assert_array_equal(still['logits'][0], dropping['logits'][0])


def test_head_reads_fast_features_before_slow_ones():
    params = published('slowfast50_4x16')[0]['params']
    assert params['head']['column_0']['classifier']['kernel'].shape == (256 + 2048, 400)
    assert params['slow_path']['conv1_lateral']['conv']['kernel'].shape == (5, 1, 1, 8, 16)


@pytest.mark.parametrize(
    'options, message',
    [
        ({'network': 'csn'}, "model.network='csn' is not one of csn50"),
        ({'form': 'still'}, "model.form='still' is not one of image, video"),
        ({'sts': 'on'}, "model.sts='on' is not one of official, clean, off"),
        ({'remat': 'layers'}, "model.remat='layers'"),
        ({'head': 'text'}, "model.head='text'"),
        ({'network': 'slowfast50_4x16', 'num_frames': 12}, 'data.num_frames=12: the slow pathway'),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_frames_of_odd_sizes_are_refused_by_name():
    # 36 pixels: 9 before the first strided block.
    for network, size in (('csn_tiny', 36), ('x3d_tiny', 36)):
        with pytest.raises(ValueError, match=r'data\.image_size and eval\.image_size'):
            shapes(build(network), clip(size=size))
        for mode in ('clean', 'off'):
            shapes(build(network, sts=mode), clip(size=size))


def test_tables_differ_in_what_the_paper_says():
    deep, tiny = sts.NETWORKS['x3d_s'].pathway, sts.NETWORKS['x3d_tiny'].pathway
    assert [unit.features for unit in deep.block(3, 0, deep.widths[3], 2)] == [432, 432, 192]
    assert [deep.block(stage, 0, deep.widths[stage], 2)[1].squeeze for stage in range(4)] == [
        *(8, 8, 16, 32)
    ]
    assert deep.block(0, 1, 24, 1)[1].squeeze == 0
    assert dataclasses.replace(deep, widths=tiny.widths, depths=tiny.depths).block is tiny.block
