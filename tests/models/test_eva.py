"""The frozen EVA-02 towers: against recorded runs, taps, rotary positions, precision."""

import functools
import math
from pathlib import Path

import jax
import numpy as np

from dist_jax.models import eva, eva_params
from dist_jax.models.backbone import Backbone, Taps
from dist_jax.models.params import import_tree
from tools.parity.golden import read_golden

GOLDEN = Path(__file__).parent.parent / 'golden'
SPECS = {
    'post norm': eva.EvaSpec(
        32,
        8,
        32,
        3,
        2,
        16,
        48,
        24,
        2,
        2,
        vocab_size=50,
        context_length=8,
        post_norm=True,
        sub_ln=False,
        swiglu=False,
        rope=False,
    ),
    'rotary': eva.EvaSpec(32, 8, 32, 3, 2, 16, 42, 24, 2, 2, vocab_size=50, context_length=8),
}


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
