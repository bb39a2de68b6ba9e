"""Eight devices compare the sentences and videos of a batch as one does, and a batch in parts."""

import os
import subprocess
import sys

import pytest

SCRIPT = r"""
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dist_jax import losses, similarity, step
from dist_jax.models import clip, side4video_retrieval
from dist_jax.models.backbone import Backbone
from dist_jax.models.layers import exact_float32
from dist_jax.sharding import batched, make_mesh, on_mesh, replicated, shardings, to_global
from dist_jax.tasks.retrieve import Retrieve

assert jax.device_count() == 8
PAIRS, WORDS, FRAMES, WIDTH = 32, 5, 3, 24
rng = np.random.default_rng(0)
normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
mask = np.ones(PAIRS, np.float32)
mask[[3, 17]] = 0
outputs = {
    'words': normal(PAIRS, WORDS, WIDTH), 'word_logits': normal(PAIRS, WORDS),
    'frames': normal(PAIRS, FRAMES, WIDTH), 'frame_logits': normal(PAIRS, FRAMES),
    'pooled': normal(PAIRS, WIDTH), 'logit_scale': np.full(PAIRS, 3, np.float32)}
real_words = np.arange(WORDS) < rng.integers(2, WORDS + 1, (PAIRS, 1))
targets = {'word_mask': real_words.astype(np.float32),
           'video': rng.integers(0, 9, PAIRS).astype(np.int32)}


def learn(task, mesh):
    def loss(outputs, targets, mask):
        per_row = task.loss(outputs, targets, mask)
        return losses.masked_mean(per_row, mask, mask.sum()), per_row

    data = to_global({**outputs, **targets, 'mask': mask}, mesh)
    arguments = [{name: data[name] for name in tree} for tree in (outputs, targets)]
    learned = jax.jit(
        on_mesh(mesh, exact_float32(jax.value_and_grad(loss, has_aux=True))),
        out_shardings=((replicated(mesh), batched(mesh)), batched(mesh)))
    compiled = learned.lower(*arguments, data['mask']).compile()
    return jax.device_get(compiled(*arguments, data['mask'])), compiled.as_text()


def error(found, expected, floor=1e-6):
    return np.abs(found - expected).max() / max(np.abs(expected).max(), floor)


similarity.BLOCK_BYTES = 2 * 4 * PAIRS * WORDS * FRAMES  # two sentences of a device
meshes = [make_mesh(jax.devices()[:1]), make_mesh(), make_mesh(fsdp=2)]
for options in ({}, {'positives': 'video', 'masked': 'ignore', 'cdcr': 0.1},
                {'interaction': 'meanP', 'positives': 'video'}):
    task = Retrieve(**options)
    (expected, _), *others = (learn(task, mesh) for mesh in meshes)
    assert expected[0][0] > 1 and not expected[1]['frames'][3].any()
    for found, text in others:
        errors = jax.tree.map(error, found, expected)
        assert max(jax.tree.leaves(errors)) < 1e-6, (options, errors)
        # A device has words of its own sentences, and scores of them with all videos.
        shapes = {tuple(map(int, x.split(','))) for x in re.findall(r'f32\[([\d,]+)\]', text)}
        own = PAIRS // 8
        words = {shape for shape in shapes if np.prod(shape) >= PAIRS * WORDS * WIDTH}
        assert (own, PAIRS) in shapes and (PAIRS, PAIRS) not in shapes and not words, words
print('loss: equal')

spec = clip.ClipSpec(16, 8, 32, 1, 2, 24, 16, 1, 1, vocab_size=20, context_length=WORDS)
task = Retrieve(num_words=WORDS)
optimizer = optax.sgd(0.1, momentum=0.9)  # momentum keeps the gradients themselves
shape = (16, 2, 16, 16, 3)
raw = clip.init_params(jax.random.key(0), spec)
batch = {'video': rng.integers(0, 256, shape, dtype=np.uint8), 'mask': mask[:16],
         'label': targets['video'][:16], 'word_mask': targets['word_mask'][:16],
         'tokens': np.where(real_words[:16], rng.integers(1, 20, (16, WORDS)), 0).astype(np.int32)}
ordered = {name: np.concatenate([rows[::2], rows[1::2]]) for name, rows in batch.items()}


def model_of(groups):
    return side4video_retrieval.build(
        Backbone(clip.KIND, spec), num_frames=2, dtype=jnp.float32, side_dim=64, unroll=True,
        batch_norm_groups=groups)


@jax.jit
def start(raw):
    frozen = model_of(1).frozen.prepare(raw)
    return frozen, step.init_state(model_of(1), task, frozen, shape, 0, lambda params: optimizer)


frozen, state = jax.device_get(start(raw))
# At its start 0, this keeps gradients from all that is beside the backbone.
state.params['side_proj']['kernel'] = 0.1 * normal(64, 32)


def run(mesh, batch, groups, accumulation):
    model = model_of(groups)
    placed, towers = step.place_state(model, state, mesh), model.frozen.place(frozen, mesh)
    train = step.make_train_step(
        model, task, optimizer, lambda n: jnp.float32(0.1),
        step.StepSettings(accumulation=accumulation), mesh, placed, towers)
    return jax.device_get(train(
        jax.device_put(state, shardings(placed)), jax.device_put(frozen, shardings(towers)),
        to_global(batch, mesh)))


# Parts are every other row; the groups of batch norms are rows that follow each other.
found, metrics = run(meshes[2], batch, 1, 2)
expected, expected_metrics = run(meshes[0], ordered, 2, 1)
assert error(metrics['loss'], expected_metrics['loss']) < 1e-6
assert metrics['clips'] == 15 and error(metrics['grad_norm'], expected_metrics['grad_norm']) < 1e-6
grads, expected_grads = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(state.opt_state)])
                         for state in (found, expected))
assert np.linalg.norm(grads - expected_grads) < 1e-6 * np.linalg.norm(expected_grads)
# Biases that a softmax or a norm takes off again have gradients that are rounding alone.
errors = jax.tree.map(lambda a, b: error(a, b, 1e-2), found.params, expected.params)
assert max(jax.tree.leaves(errors)) < 1e-5, errors
print('parts: equal')
"""


@pytest.mark.slow
def test_eight_devices_compare_as_one_and_parts_as_the_whole():
    flags = os.environ.get('XLA_FLAGS', '')
    environment = os.environ | {
        'JAX_PLATFORMS': 'cpu',
        'XLA_FLAGS': f'{flags} --xla_force_host_platform_device_count=8',
    }
    found = subprocess.run(
        [sys.executable, '-c', SCRIPT],
        capture_output=True,
        text=True,
        env=environment,
        timeout=240,
    )
    assert found.returncode == 0, found.stdout + found.stderr[-4000:]
    assert found.stdout.split('\n')[:2] == ['loss: equal', 'parts: equal']
