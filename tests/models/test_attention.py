"""Maps of attention that leave a network through its families' `attention`."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dist_jax.models import clip, dist, frame_mean, layers
from dist_jax.models.backbone import Backbone

SPEC = clip.ClipSpec(32, 8, 32, 2, 1, 24, 16, 1, 1, vocab_size=20, context_length=6)
BACKBONE = Backbone(clip.KIND, SPEC)
FRAMES, GRID = 8, 4
OPTIONS = {
    'num_classes': (3,),
    'num_frames': FRAMES,
    'head': 'linear',
    'dtype': jnp.float32,
    'integration_dim': 64,  # one head in the queries' attention
    'temporal_dim': 8,
    'ada_pooling_layers': 2,
}


@pytest.fixture(scope='module')
def built():
    """(model, frozen, variables)"""
    model = dist.build(BACKBONE, **OPTIONS)
    model = dataclasses.replace(model, attention=jax.jit(model.attention))
    init = lambda key: model.frozen.prepare(clip.init_params(key, SPEC))  # noqa: E731
    frozen = jax.jit(init)(jax.random.key(0))
    features = jax.eval_shape(model.inputs, frozen, {'video': jnp.zeros((1, FRAMES, 32, 32, 3))})
    features = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), features)
    return model, frozen, jax.jit(model.net.init)(jax.random.key(1), features)


def attention(model):
    """(variables, frozen, video) -> maps."""
    return lambda variables, *read: model.attention(variables, inputs(model, *read))


def inputs(model, frozen, video):
    return model.inputs(frozen, {'video': video})


def test_shares_of_each_clip_sum_to_at_most_one(built):
    model, frozen, variables = built
    video = jax.random.normal(jax.random.key(2), (3, FRAMES, 32, 32, 3))
    maps = attention(model)(variables, frozen, video)
    assert maps.shape == (3, FRAMES // 2, GRID, GRID) and maps.dtype == jnp.float32
    assert maps.min() >= 0
    total = maps.sum((1, 2, 3))
    assert total.max() < 1 and total.min() > 0.8  # one class token beside 16 patches
    alone = attention(model)(variables, frozen, video[1:2])
    np.testing.assert_allclose(alone[0], maps[1], atol=1e-6)


def test_weights_are_sown_only_where_asked_for(built):
    model, frozen, variables = built
    assert list(variables) == ['params']
    features = model.inputs(frozen, {'video': jnp.ones((1, FRAMES, 32, 32, 3))})
    sowing = functools.partial(model.net.apply, mutable=['intermediates'])
    outputs, sown = jax.jit(sowing)(variables, features)
    np.testing.assert_array_equal(
        jax.jit(model.net.apply)(variables, features)['logits'][0], outputs['logits'][0]
    )
    blocks = sown['intermediates']
    assert sorted(blocks) == ['adapooling_0', 'adapooling_1']
    (weights,) = blocks['adapooling_1']['spatial_transformer']['attn']['weights']
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)


def still(variables):
    """Nothing but the frozen tokens is left to tell patches and frames apart."""

    def change(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator='/')
        moving = ('temporal2integration', 'temporal_ffn', 'positional_embedding')
        return jnp.zeros_like(leaf) if any(part in name for part in moving) else leaf

    return jax.tree_util.tree_map_with_path(change, variables)


def sharpened(variables, frame_factor, clip_factor):
    """Multiplies the queries of the last block."""
    params = jax.tree.map(lambda leaf: leaf, variables['params'])
    for name, factor in (
        ('spatial_transformer', frame_factor),
        ('temporal_transformer', clip_factor),
    ):
        packed = params['adapooling_1'][name]['attn']['qkv']
        packed['kernel'] = packed['kernel'].at[:, 0].multiply(factor)
        packed['bias'] = packed['bias'].at[0].multiply(factor)
    return {'params': params}


@pytest.mark.parametrize('frame, row, column', [(0, 3, 1), (4, 0, 2), (6, 2, 2)])
def test_the_patch_that_differs_stands_out_in_its_place(built, frame, row, column):
    model, frozen, variables = built
    visual = dict(frozen['visual'])
    visual['positional_embedding'] = jnp.zeros_like(visual['positional_embedding'])
    spot = jax.random.normal(jax.random.key(3), (8, 8, 3))
    video = jnp.zeros((1, FRAMES, 32, 32, 3))
    video = video.at[0, frame, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8].set(3 * spot)

    def look(frame_factor, clip_factor):
        changed = sharpened(still(variables), frame_factor, clip_factor)
        return np.asarray(attention(model)(changed, {'visual': visual}, video)[0])

    place = frame // 2, row, column
    # A query may be drawn to what differs or turn away; one of two opposite queries is drawn.
    maps = [look(a, b) for a in (-1e3, 1e3) for b in (-1e3, 1e3)]
    found = [np.unravel_index(each.argmax(), each.shape) for each in maps]
    assert place in found
    best = maps[found.index(place)]
    assert best[place] > 5 * np.delete(best.ravel(), np.ravel_multi_index(place, best.shape)).max()
    # The last block's map is of that block: one that nothing draws is even over the other frames.
    others = np.delete(look(1, 1), frame // 2, axis=0)
    np.testing.assert_allclose(others, others.mean(), rtol=1e-4)


def test_frames_that_the_backbone_does_not_see_are_no_part_of_the_maps(built):
    model, frozen, variables = built
    video = jax.random.normal(jax.random.key(4), (1, FRAMES, 32, 32, 3))
    changed = video.at[:, 1::2].set(0)
    maps, others = (attention(model)(still(variables), frozen, each) for each in (video, changed))
    np.testing.assert_allclose(maps, others, rtol=1e-6)


def test_no_map_without_a_query():
    assert dist.build(BACKBONE, **OPTIONS | {'ada_pooling_layers': 0}).attention is None
    assert frame_mean.build(BACKBONE, num_classes=(3,), num_frames=4).attention is None


def test_attention_is_weights_times_values():
    keys = jax.random.split(jax.random.key(5), 3)
    query, key, value = (jax.random.normal(k, (2, n, 3, 4)) for k, n in zip(keys, (5, 7, 7)))
    mask = jnp.arange(7) > 1
    weights = layers.attention_weights(query, key, mask)
    assert weights.shape == (2, 3, 5, 7) and not weights[..., :2].any()
    np.testing.assert_array_equal(
        layers.weighted_values(weights, value), layers.attend(query, key, value, mask)
    )
    half = [x.astype(jnp.bfloat16) for x in (query, key, value)]
    assert layers.attention_weights(*half[:2]).dtype == jnp.float32
    assert layers.attend(*half).dtype == jnp.bfloat16
