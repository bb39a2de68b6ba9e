"""The frozen EVA-02 towers: against recorded runs, taps, rotary positions, precision."""

import dataclasses
import functools
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dist_jax.models import eva, eva_params
from dist_jax.models.backbone import Backbone, Taps
from dist_jax.models.frozen import Frozen
from dist_jax.models.params import flatten, import_tree
from dist_jax.sharding import check_replicated_share, place
from tools.parity.golden import read_golden

GOLDEN = Path(__file__).parent.parent / 'golden'
ROTARY = eva.EvaSpec(32, 8, 32, 3, 2, 16, 42, 24, 2, 2, vocab_size=50, context_length=8)
POST_NORM = dataclasses.replace(ROTARY, post_norm=True, sub_ln=False, swiglu=False, rope=False)


def recorded(name, num_heads=None):
    """A recorded run: its file, the geometry that shapes give, the tree, frames (B * T, ...)."""
    golden = read_golden(GOLDEN / f'{name}.safetensors')
    tensors = {
        key: value
        for key, value in {**golden.section('backbone'), **golden.section('params')}.items()
        if key.startswith(('visual.', 'text.')) and 'side' not in key
    }
    if 'text.ln_final.bias' in tensors:
        tensors['logit_scale'] = np.zeros((), np.float32)
    spec = eva_params.eva_spec(tensors, num_heads=num_heads)
    tree = import_tree(
        tensors, eva_params.baai_rows(spec), Backbone(eva.KIND, spec).abstract_params()
    )
    video = golden.tensors['inputs/video']
    return golden, spec, tree, video.reshape(-1, *video.shape[2:])


@functools.partial(jax.jit, static_argnames=('spec', 'taps', 'unroll'))
def encode(params, pixels, spec, taps, unroll=False):
    return eva.encode_image(params['visual'], pixels, spec, taps, unroll=unroll)


def off(found, expected):
    """Largest error, relative to the largest value."""
    return np.abs(found - expected).max() / np.abs(expected).max()


def streams(name, num_heads=None):
    golden, spec, tree, frames = recorded(name, num_heads)
    found = encode(tree, frames, spec, Taps(outputs=tuple(range(spec.depth))))['outputs']
    values = [golden.tensors[f'eval/backbone_tokens/{i}'] for i in range(spec.depth)]
    return np.asarray(found), [value.reshape(found[0].shape) for value in values], tree, frames


def test_recorded_tower_with_rotary_positions():
    found, expected, _, _ = streams('side4video_eva_rope_small')
    for ours, theirs in zip(found, expected, strict=True):
        assert off(ours, theirs) < 1e-5


def exact(params, frames, spec_heads):
    """The post-norm tower once more, by other means: numpy in float64, frame by frame."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params['visual'])
    erf = np.vectorize(math.erf)

    def norm(x, scale, bias):
        deviation = np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return (x - x.mean(-1, keepdims=True)) / deviation * scale + bias

    kernel = p['patch_embed']['kernel']
    size, width = kernel.shape[0], kernel.shape[-1]
    outputs = []
    for frame in frames.astype(np.float64):
        grid = frame.shape[0] // size
        x = [p['class_embedding']]
        for i, j in np.ndindex(grid, grid):
            patch = frame[i * size : (i + 1) * size, j * size : (j + 1) * size]
            x.append(np.tensordot(patch, kernel, 3) + p['patch_embed']['bias'])
        x = np.stack(x) + p['positional_embedding']
        outputs.append([])
        for layer in range(len(p['blocks']['norm1']['scale'])):
            b = jax.tree.map(lambda leaf, i=layer: leaf[i], p['blocks'])
            qkv, heads = b['attn']['qkv'], []
            for h in range(spec_heads):
                q, k, v = (x @ qkv['kernel'][:, c, h] + qkv['bias'][c, h] for c in range(3))
                weights = np.exp(q @ k.T / np.sqrt(q.shape[-1]))
                heads.append(weights / weights.sum(-1, keepdims=True) @ v)
            out = b['attn']['out']['kernel'].reshape(-1, width)
            y = np.concatenate(heads, -1) @ out + b['attn']['out']['bias']
            x = x + norm(y, **b['norm1'])
            z = x @ b['mlp']['fc1']['kernel'] + b['mlp']['fc1']['bias']
            z = z * (1 + erf(z / np.sqrt(2))) / 2
            x = x + norm(z @ b['mlp']['fc2']['kernel'] + b['mlp']['fc2']['bias'], **b['norm2'])
            outputs[-1].append(x)
    return np.stack(outputs, 1)


def test_recorded_tower_with_post_norm():
    """Norms after each half blow rounding up, also that of the recording: see its last block."""
    found, expected, tree, frames = streams('side4video_eva_small', num_heads=2)
    for layer, truth in enumerate(exact(tree, frames, 2)):
        ours, theirs = off(found[layer], truth), off(expected[layer], truth)
        assert ours < 1e-5 or ours <= theirs
        assert off(found[layer], expected[layer]) < (1e-5 if layer < 3 else 5e-5)


def test_recorded_text_tower():
    golden, spec, tree, _ = recorded('side4video_retrieval_eva_tower', num_heads=2)
    found = eva.KIND.encode_text(tree['text'], golden.tensors['inputs/input_ids'], spec)
    assert off(found, golden.tensors['eval/text_eot']) < 1e-5


@pytest.fixture(scope='module')
def pixels():
    return jax.random.normal(jax.random.key(1), (3, 32, 32, 3))


@pytest.fixture(scope='module', params=[ROTARY, POST_NORM], ids=['rotary', 'post norm'])
def tower(request, pixels):
    """Geometry, tree and all taps of a small tower."""
    spec = request.param
    params = eva.init_params(jax.random.key(0), spec)
    blocks = tuple(range(spec.depth))
    taps = Taps(outputs=blocks, attention=blocks, stem=True, embedding=True)
    return spec, params, encode(params, pixels, spec, taps)


def test_shapes_of_all_taps(tower):
    shapes = {name: value.shape for name, value in tower[2].items()}
    assert shapes == {
        'stem': (3, 17, 32),
        'outputs': (3, 3, 17, 32),
        'queries': (3, 3, 17, 2, 16),
        'keys': (3, 3, 17, 2, 16),
        'embedding': (3, 16),
    }


@pytest.mark.parametrize('unroll', [False, True])
@pytest.mark.parametrize(
    'taps', [Taps(outputs=(1,)), Taps(outputs=(0, 2), attention=(1,), stem=True)]
)
def test_any_taps_equal_the_slices_of_all(tower, pixels, taps, unroll):
    spec, params, everything = tower
    chosen = {'outputs': taps.outputs, 'queries': taps.attention, 'keys': taps.attention}
    found = encode(params, pixels, spec, taps, unroll)
    assert found.keys() == set(taps.names())
    for name, value in found.items():
        expected = everything[name]
        if name in chosen:
            expected = expected[np.array(chosen[name])]
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-5, err_msg=name)


def test_the_embedding_is_the_head_of_the_normed_class_token(tower):
    _, params, found = tower
    x = np.asarray(found['outputs'][-1][:, 0], np.float64)
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    expected = x @ np.asarray(params['visual']['head']['kernel'])
    np.testing.assert_allclose(found['embedding'], expected, atol=1e-5)


def test_tapped_queries_are_turned():
    """The product of two patches, of equal content, depends on how far they are apart alone."""
    spec = dataclasses.replace(ROTARY, depth=1)
    visual = jax.tree.map(jnp.zeros_like, eva.init_params(jax.random.key(0), spec)['visual'])
    bias = jax.random.normal(jax.random.key(1), (1, 3, 2, 16))
    visual['blocks']['attn']['qkv']['bias'] = bias
    found = encode({'visual': visual}, jnp.zeros((1, 32, 32, 3)), spec, Taps(attention=(0,)))
    q, k = np.asarray(found['queries'][0, 0]), np.asarray(found['keys'][0, 0])
    np.testing.assert_array_equal(q[0], bias[0, 0])  # the class token
    product = np.einsum('ahd,bhd->hab', q[1:], k[1:]).reshape(2, 4, 4, 4, 4)
    for down, right in ((0, 1), (1, 0), (2, 1)):
        pairs = [product[:, i, j, i + down, j + right] for i in range(2) for j in range(3)]
        np.testing.assert_allclose(pairs, np.broadcast_to(pairs[0], np.shape(pairs)), rtol=1e-4)
    assert np.ptp(product[0, 0, 0]) > 0.1


@pytest.mark.parametrize('grid', [16, 24])
def test_rotary_tables_are_turns_in_the_plane(grid):
    rng = np.random.default_rng(0)
    spec = eva.EvaSpec(grid * 14, 14, 64, 1, 1, 16, 42, 0, 0, 1)
    x = rng.normal(size=(1 + grid**2, 64))
    turned = np.asarray(eva._rotate(jnp.asarray(x[None, :, None], jnp.float32), spec))[0, :, 0]
    np.testing.assert_array_equal(turned[0], x[0].astype(np.float32))
    for row, column in ((0, 0), (1, 0), (3, 11), (grid - 1, grid - 1)):
        token = 1 + row * grid + column
        pairs = x[token].reshape(2, 16, 2) @ [1, 1j]
        angles = [place * 16 / grid * 10_000 ** (-np.arange(16) / 16) for place in (row, column)]
        pairs = pairs * np.exp(1j * np.array(angles))
        expected = np.stack([pairs.real, pairs.imag], -1).reshape(-1)
        np.testing.assert_allclose(turned[token], expected, atol=1e-5)


def test_another_image_size_resizes_the_table_and_follows_the_grid(tower):
    spec, params, _ = tower
    larger = dataclasses.replace(spec, image_size=48)
    table = eva.KIND.resize(params['visual']['positional_embedding'], larger)
    assert table.shape == (37, 32)
    np.testing.assert_array_equal(table[0], params['visual']['positional_embedding'][0])
    params = {'visual': params['visual'] | {'positional_embedding': table}}
    found = encode(params, jnp.ones((1, 48, 48, 3)), larger, Taps(embedding=True))
    assert np.isfinite(found['embedding']).all()
    with pytest.raises(ValueError, match='image_size=32'):
        eva.encode_image(params['visual'], jnp.ones((1, 48, 48, 3)), spec, Taps(embedding=True))


def test_bfloat16_keeps_norms_in_float32(tower, pixels):
    spec, params, everything = tower
    reader = Frozen(Backbone(eva.KIND, spec), jnp.bfloat16, lambda *_: None)
    cast = reader.prepare(params)
    for path, leaf in flatten(cast).items():
        norm = 'norm' in path or '_ln/' in path
        assert leaf.dtype == (jnp.float32 if norm else jnp.bfloat16), path
    found = encode(cast, pixels.astype(jnp.bfloat16), spec, Taps(outputs=(2,), embedding=True))
    assert found['outputs'].dtype == jnp.bfloat16 and found['embedding'].dtype == jnp.float32
    assert off(found['embedding'], everything['embedding']) < 0.05


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def test_published_sizes():
    counts = {}
    for name, spec in eva.SPECS.items():
        tree = Backbone(eva.KIND, spec).abstract_params()
        keys = spec.depth * spec.width  # their biases, which no file has
        counts[name] = count(tree['visual']) - keys, count(tree) - keys
    assert counts['eva02_e14'][0] == counts['eva02_e14_plus'][0] == 4_350_556_928
    # Millions, of both towers, as OpenCLIP's table of models has them.
    assert {
        name: round(both / 1e6, 2) for name, (_, both) in counts.items() if 'tiny' not in name
    } == {
        'eva02_b16': 149.69,
        'eva02_l14': 427.76,
        'eva02_l14_336': 428.08,
        'eva02_e14': 4704.59,
        'eva02_e14_plus': 5044.89,
    }


def test_every_rule_is_used():
    used = set()
    for name in ('eva_tiny', 'eva_tiny_rope'):
        tree = flatten(Backbone(eva.KIND, eva.SPECS[name]).abstract_params())
        for path in (*tree, 'text/0'):
            used.add(next(rule for rule in eva.SHARDING_RULES if re.search(rule.pattern, path)))
    assert used == set(eva.SHARDING_RULES)


@pytest.mark.parametrize('sizes', [(2, 1), (4, 2), (8, 4), (16, 8)], ids='{0[0]}x{0[1]}'.format)
def test_the_largest_is_split_nearly_whole(sizes):
    fsdp, tensor = sizes
    mesh = jax.sharding.AbstractMesh((1, fsdp, tensor), ('data', 'fsdp', 'tensor'))
    tree = Backbone(eva.KIND, eva.SPECS['eva02_e14']).abstract_params()['visual']
    placed = place({'visual': tree}, eva.SHARDING_RULES, mesh)
    check_replicated_share(placed, mesh, 'weights', ('fsdp', 'tensor'), small_bytes=0)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'patch_size': 7}, 'patch_size=7'),
        ({'num_heads': 3}, 'num_heads=3'),
        ({'text_num_heads': 5}, 'text_num_heads=5'),
        ({'num_heads': 16}, 'rotary positions need heads of a multiple of 4'),
    ],
)
def test_bad_geometry_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(ROTARY, **changes)
