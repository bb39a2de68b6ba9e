"""The frozen towers: taps, ranges, precision, position tables, text."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dist_jax.models import clip, stack
from dist_jax.models.backbone import Backbone, Taps
from dist_jax.models.frozen import Frozen
from dist_jax.models.layers import resize_positions

SPEC = clip.ClipSpec(32, 8, 32, 5, 2, 16, 24, 2, 2, vocab_size=50, context_length=8)


@pytest.fixture(scope='module')
def params():
    return clip.init_params(jax.random.key(0), SPEC)


@pytest.fixture(scope='module')
def pixels():
    return jax.random.normal(jax.random.key(1), (3, 32, 32, 3))


@pytest.fixture(scope='module')
def everything(params, pixels):
    blocks = tuple(range(SPEC.depth))
    taps = Taps(outputs=blocks, attention=blocks, stem=True, embedding=True)
    return encode(params, pixels, SPEC, taps)


@functools.partial(jax.jit, static_argnames=('spec', 'taps', 'unroll'))
def encode(params, pixels, spec, taps, unroll=False):
    return clip.encode_image(params['visual'], pixels, spec, taps, unroll=unroll)


def test_shapes_of_all_taps(everything):
    shapes = {name: value.shape for name, value in everything.items()}
    assert shapes == {
        'stem': (3, 17, 32),
        'outputs': (5, 3, 17, 32),
        'queries': (5, 3, 17, 2, 16),
        'keys': (5, 3, 17, 2, 16),
        'embedding': (3, 16),
    }


@pytest.mark.parametrize('unroll', [False, True])
@pytest.mark.parametrize(
    'taps',
    [
        Taps(outputs=(4,)),
        Taps(outputs=(0, 2, 3), attention=(1, 3)),
        Taps(outputs=(1, 3), attention=(1, 3), embedding=True),
        Taps(attention=(0,), stem=True),
        Taps(embedding=True),
        Taps(stem=True),
    ],
)
def test_any_taps_equal_the_slices_of_all(params, pixels, everything, taps, unroll):
    found = encode(params, pixels, SPEC, taps, unroll)
    expected = {
        'outputs': everything['outputs'][np.array(taps.outputs)] if taps.outputs else None,
        'queries': everything['queries'][np.array(taps.attention)] if taps.attention else None,
        'keys': everything['keys'][np.array(taps.attention)] if taps.attention else None,
        'stem': everything['stem'] if taps.stem else None,
        'embedding': everything['embedding'] if taps.embedding else None,
    }
    assert found.keys() == {name for name, value in expected.items() if value is not None}
    for name, value in found.items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ('tapped', 'loops'),
    [('tt.tt.', 1), ('.t.t.t.t', 1), ('tt.tt.tt', 2), ('....tttt', 2), ('t...tttt', 3)],
)
def test_layers_with_repeated_taps_run_in_one_loop(tapped, loops):
    def run(x, layers):
        def block(x, one, wish, slot):
            assert slot is None
            x = x + one
            return x, None, {'sum': x} if wish == 't' else {}

        return stack.scan_frozen(block, x, layers, list(tapped), unroll=False)

    layers = jnp.arange(1.0, 9.0)
    x, kept, found = run(jnp.zeros(1), layers[: len(tapped)])
    sums = np.cumsum(np.asarray(layers))[: len(tapped)]
    wanted = [value for value, wish in zip(sums, tapped) if wish == 't']
    np.testing.assert_array_equal(found['sum'][:, 0], wanted)
    assert x[0] == sums[-1] and kept is None
    assert str(jax.make_jaxpr(run)(jnp.zeros(1), layers)).count(' scan[') == loops


@pytest.mark.parametrize('writes', [True, False], ids=['block', 'loop'])
@pytest.mark.parametrize(
    'kept', ['kk.kk.', '.k.k.k.k', 'kk.kk.kk', '....kkkk', 'k...kkkk', '.....k']
)
def test_streams_that_are_kept_lie_in_the_order_of_their_layers(kept, writes):
    """Whoever writes them, and however the layers are grouped; gradients reach every layer."""
    wanted = [place == 'k' for place in kept]
    layers = jnp.arange(1.0, 1.0 + len(kept))

    @functools.partial(jax.jit, static_argnums=1)
    def run(layers, unroll):
        def block(x, one, _, slot):
            x = x + one
            return x, slot.written(x) if writes and slot else None, {}

        nothing = [None] * len(kept)
        x, streams, taps = stack.scan_frozen(
            block, jnp.zeros((2, 3)), layers, nothing, kept=wanted, unroll=unroll
        )
        assert not taps
        return x, streams

    sums = np.cumsum(layers)
    for unroll in (False, True):
        x, streams = run(layers, unroll)
        assert streams.shape == (sum(wanted), 2, 3)
        np.testing.assert_array_equal(streams[:, 1, 2], sums[np.array(wanted)])
        assert x[0, 0] == sums[-1]
    gradient = jax.grad(lambda layers: run(layers, False)[1][:, 0, 0].sum())(layers)
    after = np.cumsum(wanted[::-1])[::-1]  # streams that a layer is in
    np.testing.assert_array_equal(gradient, after)


def test_blocks_after_the_last_tap_do_not_run(params, pixels):
    def flops(taps):
        run = jax.jit(lambda p, x: clip.encode_image(p, x, SPEC, taps, unroll=True))
        return run.lower(params['visual'], pixels).compile().cost_analysis()['flops']

    assert flops(Taps(outputs=(0,))) < 0.35 * flops(Taps(outputs=(4,)))


@pytest.mark.parametrize(
    ('taps', 'message'),
    [
        (Taps(outputs=(5,)), 'blocks 0..4'),
        (Taps(attention=(-1,)), 'blocks 0..4'),
        (Taps(outputs=(2, 1)), 'increasing'),
    ],
)
def test_wrong_taps_are_named(params, pixels, taps, message):
    with pytest.raises(ValueError, match=message):
        clip.encode_image(params['visual'], pixels, SPEC, taps)


def test_wrong_image_size_is_named(params):
    with pytest.raises(ValueError, match='image_size=32'):
        clip.encode_image(params['visual'], jnp.zeros((1, 48, 48, 3)), SPEC, Taps(embedding=True))


def test_bfloat16_keeps_norms_in_float32(params, pixels, everything):
    reader = Frozen(Backbone(clip.KIND, SPEC), jnp.bfloat16, lambda *_: None, reads_classes=True)
    cast = reader.prepare(params, (jnp.ones((2, 8), jnp.int32),))
    assert cast['visual']['ln_pre']['bias'].dtype == jnp.float32
    assert cast['visual']['blocks']['ln_1']['scale'].dtype == jnp.float32
    assert cast['visual']['blocks']['attn']['qkv']['bias'].dtype == jnp.bfloat16
    assert cast['logit_scale'].dtype == cast['text'][0].dtype == jnp.float32
    taps = Taps(outputs=(4,), embedding=True)
    found = encode(cast, pixels.astype(jnp.bfloat16), SPEC, taps)
    assert found['outputs'].dtype == jnp.bfloat16 and found['embedding'].dtype == jnp.float32
    scale = np.abs(everything['embedding']).max()
    assert np.abs(found['embedding'] - everything['embedding']).max() < 0.05 * scale


def test_normalize_is_clips_standardisation():
    video = jnp.asarray([[[[0, 128, 255]]]], jnp.uint8)
    expected = (np.array([0, 128, 255]) / 255 - clip.PIXELS.mean) / clip.PIXELS.std
    np.testing.assert_allclose(clip.PIXELS.normalize(video)[0, 0, 0], expected, rtol=1e-5)


def test_gelu_and_quick_gelu_differ(params, pixels, everything):
    exact = dataclasses.replace(SPEC, activation='gelu')
    taps = Taps(embedding=True)
    found = encode(params, pixels, exact, taps)['embedding']
    assert np.abs(found - everything['embedding']).max() > 1e-3


def test_text_reads_the_end_token_and_ignores_what_follows(params):
    tokens = jnp.asarray([[1, 5, 49, 0, 0, 0, 0, 0], [1, 6, 7, 49, 0, 0, 0, 0]])
    found = clip.KIND.encode_text(params['text'], tokens, SPEC)
    padded_differently = tokens.at[0, 3:].set(3)
    again = clip.KIND.encode_text(params['text'], padded_differently, SPEC)
    assert found.shape == (2, 16)
    np.testing.assert_allclose(found[0], again[0], rtol=1e-5, atol=1e-6)
    shorter = clip.KIND.encode_text(params['text'], tokens[:, :4], SPEC)
    np.testing.assert_allclose(found, shorter, rtol=1e-5, atol=1e-6)


def test_too_long_text_is_an_error(params):
    with pytest.raises(ValueError, match='at most 8'):
        clip.KIND.encode_text(params['text'], jnp.zeros((1, 9), jnp.int32), SPEC)


def test_resized_positions_keep_class_row_and_planes():
    rows, columns = np.mgrid[:4, :4]
    plane = np.stack([rows, columns], -1).reshape(16, 2).astype(np.float32)
    table = np.concatenate([[[7.0, -7.0]], plane]).astype(np.float32)
    same = resize_positions(table, (4, 4))
    np.testing.assert_array_equal(same, table)
    larger = resize_positions(table, (8, 6))
    assert larger.shape == (49, 2)
    np.testing.assert_array_equal(larger[0], table[0])
    grid = larger[1:].reshape(8, 6, 2)
    # What torch's interpolate(mode='bicubic', align_corners=False) gives for a ramp: with
    # a = -0.75 the kernel does not reproduce it exactly.
    np.testing.assert_allclose(grid[3:5, 2, 0], [1.296875, 1.703125], atol=1e-6)
    constant = resize_positions(np.full((17, 3), 2.5), (7, 7))
    np.testing.assert_allclose(constant, 2.5, rtol=1e-6)


def test_positions_of_no_square_are_refused():
    with pytest.raises(ValueError, match='1 \\+ a square'):
        resize_positions(np.zeros((18, 3)), (4, 4))


def test_published_sizes():
    def count(spec):
        params = Backbone(clip.KIND, spec).abstract_params()
        return sum(x.size for x in jax.tree.leaves(params))

    # Image and text tower of the released models.
    assert {name: count(spec) for name, spec in clip.SPECS.items() if name != 'tiny'} == {
        'vit_b32': 151_277_313,
        'vit_b16': 149_620_737,
        'vit_l14': 427_616_513,
        'vit_l14_336': 427_944_193,
        'tiny_clip': 3_435_585,  # ours
    }


def test_bad_geometry_is_named():
    with pytest.raises(ValueError, match='patch_size=7'):
        dataclasses.replace(SPEC, patch_size=7)
    with pytest.raises(ValueError, match='activation'):
        dataclasses.replace(SPEC, activation='relu')
    with pytest.raises(ValueError, match='num_heads=3'):
        dataclasses.replace(SPEC, num_heads=3)
