"""Eight devices, in any mesh, do what one does: steps, mixing, weights, checkpoints, scores."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = r"""
import dataclasses
import gc
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dist_jax.configs import dist as dist_config
from conv_family import build as build_conv
from dist_jax import checkpoint, mixup, step, train
from dist_jax.models import (
    clip, converted, digests, dist, eva, evl, frame_mean, frozen, heads, side4video,
    side_network, sts)
from dist_jax.models.backbone import Backbone, Taps
from dist_jax.models.batch_norm import BatchNorm
from dist_jax.sharding import (
    batched, check_batch_size, make_mesh, on_mesh, place, replicated, shardings, to_global,
    to_host)
from dist_jax.tasks.classify import Classify

gc.set_threshold(100_000)  # as in conftest.py
SPEC = clip.ClipSpec(16, 8, 64, 3, 8, 24, 16, 1, 1, vocab_size=20, context_length=6)
SHAPE = (8, 4, 16, 16, 3)
BACKBONE = Backbone(clip.KIND, SPEC)
TASK = Classify((tuple('abcde'),), label_smoothing=0.1)
folder = sys.argv[1]
assert jax.device_count() == 8
OPTIONS = {'num_classes': (5,), 'num_frames': 4, 'dtype': jnp.float32, 'head': 'linear'}
sts.NETWORKS['two_blocks'] = sts.csn(16, (1, 1), stem_size=3)  # the second of them strided
MODELS = {
    'dist': dist.build(BACKBONE, integration_dim=128, temporal_dim=8, ada_pooling_layers=1,
                       **OPTIONS),
    'evl': evl.build(BACKBONE, depth=2, qkv_dim=64, num_heads=8, cls_token_std=0.02,
                     mlp_dropout=0.1, head_dropout=0.1, remat=True, **OPTIONS),
    'frame_mean': frame_mean.build(BACKBONE, **OPTIONS),
    'conv': build_conv(num_classes=(5,), num_frames=4, dtype=jnp.float32, width=8,
                       kernel_frames=3, batch_norm_groups=4),
    'side4video': side4video.build(BACKBONE, side_dim=128, batch_norm_groups=4, remat='layers',
                                   **OPTIONS),
    'sts': sts.build(network='two_blocks', batch_norm_groups=8, **OPTIONS),
}
MESHES = {
    'dist': [(1, 8, 1), (1, 1, 8), (2, 2, 2)],
    'evl': [(1, 8, 1), (1, 1, 8), (2, 2, 2)],
    'frame_mean': [(8, 1, 1)],
    'conv': [(8, 1, 1), (2, 2, 2)],
    'side4video': [(2, 2, 2)],
    'sts': [(2, 4, 1)],
}
mixing = mixup.Mixing(mixup_alpha=0.8)
# Momentum keeps the gradients themselves; Adam would hide their size.
optimizer = optax.sgd(0.1, momentum=0.9)
raw = clip.init_params(jax.random.key(0), SPEC)


def batch(number):
    rng = np.random.default_rng(number)
    mask = np.ones(8, np.float32)
    mask[2] = 0  # a bad video, and its partner 5 on another device
    return {'video': rng.integers(0, 256, SHAPE, dtype=np.uint8),
            'label': rng.integers(0, 5, 8).astype(np.int32), 'mask': mask}


class Family:
    def __init__(self, name):
        self.name, self.model = name, MODELS[name]
        frozen = self.model.frozen
        self.frozen = jax.device_get(jax.jit(frozen.prepare)(raw)) if frozen else {}
        self.init = lambda f: step.init_state(
            self.model, TASK, f, SHAPE, 0, lambda p: optimizer, ema=True)
        self.fresh = jax.device_get(jax.jit(self.init)(self.frozen))


class Devices:
    def __init__(self, family, *sizes, accumulation=1):
        self.family, self.model = family, family.model
        self.mesh = make_mesh(jax.devices()[:np.prod(sizes)], *sizes)
        self.abstract = step.place_state(self.model, family.fresh, self.mesh)
        frozen = self.model.frozen
        self.placed = frozen.place(family.frozen, self.mesh) if frozen else {}
        settings = step.StepSettings(mixing=mixing, ema_decay=0.5, seed=3,
                                     accumulation=accumulation)
        train_step = step.make_train_step(
            self.model, TASK, optimizer, lambda n: jnp.float32(0.1), settings, self.mesh,
            self.abstract, self.placed)
        self.step = train_step.lower(
            self.abstract, self.placed, to_global(batch(0), self.mesh)).compile()
        self.frozen = jax.device_put(family.frozen, shardings(self.placed))

    def run(self, state, number):
        # It is donated.
        state = jax.device_put(state, shardings(self.abstract), may_alias=False)
        return self.step(state, self.frozen, to_global(batch(number), self.mesh))

    def statistics(self, state, number):
        average = step.make_statistics_step(
            self.model, TASK, step.StepSettings(seed=3), self.mesh, self.abstract.params,
            self.placed)
        params = jax.device_put(state.params, shardings(self.abstract.params))
        found = step.Statistics(state.collections, np.float32(0))
        for n in range(2):
            found = average(params, self.frozen, to_global(batch(number), self.mesh),
                            np.int32(n), found)
        return jax.device_get(found)

    def restored(self, name):
        checkpoints = checkpoint.Checkpoints(f'{folder}/{name}')
        state, _ = checkpoints.restore_latest(self.abstract)
        checkpoints.close()
        same_places(state, self.abstract)
        return state

    def continued(self, name):
        return self.step(self.restored(name), self.frozen, to_global(batch(1), self.mesh))


def same_places(tree, abstract):
    jax.tree.map(lambda x, y: assert_equal(x.sharding, y.sharding), tree, abstract)


def assert_equal(a, b):
    assert a == b, (a, b)


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, to_host(a), to_host(b))


def close(a, b, bound, floor=1e-6):
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b)):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        error = np.abs(x - y).max() / max(np.abs(y).max(), floor)
        assert error < bound, (jax.tree_util.keystr(path), error)


def close_together(a, b, bound):
    a, b = (np.concatenate([np.ravel(x).astype(np.float64) for x in jax.tree.leaves(t)])
            for t in (a, b))
    error = np.linalg.norm(a - b) / np.linalg.norm(b)
    assert error < bound, error


def check_step(found, expected, floor=1e-6, slack=1):
    (state, metrics), (state1, metrics1) = found, expected
    assert metrics1['clips'] == 7 and metrics1['loss'] > 0 and metrics1['grad_norm'] > 0
    close(metrics['loss'], metrics1['loss'], 1e-6)
    close(metrics['grad_norm'], metrics1['grad_norm'], 1e-6)
    close_together(state.opt_state, state1.opt_state, slack * 1e-6)  # the gradients
    close(state.opt_state, state1.opt_state, slack * 1e-5, floor)  # every one of them
    close(state.params, state1.params, 1e-5)  # what starts at zero is gradient alone
    close(state.ema, state1.ema, 1e-5)
    close(state.collections, state1.collections, 1e-5)  # of all real clips, on every device


families = {name: Family(name) for name in MODELS}
meshes, results = {}, {}
for name, family in families.items():
    one = Devices(family, 1, 1, 1)
    results[name] = jax.device_get(one.run(family.fresh, 0))
    meshes[name, 'one'] = one
    if name == 'conv':
        averaged = one.statistics(family.fresh, 0)
        assert averaged.parts == 2 and averaged.mean['batch_stats']['bn']['mean'].any()
    for size in MESHES[name]:
        devices = meshes[name, size] = Devices(family, *size)
        state, metrics = devices.run(family.fresh, 0)
        same_places(state, devices.abstract)
        # Biases right before batch norms have gradients that are rounding alone.
        floor = 1e-2 if name == 'side4video' else 1e-6
        slack = 5 if name == 'sts' else 1  # of norms over as little as four values
        check_step(jax.device_get((state, metrics)), results[name], floor, slack)
        if name == 'conv':
            close(devices.statistics(family.fresh, 0), averaged, 1e-5)
        if name == 'dist' and size in ((1, 8, 1), (2, 2, 2)):
            # Gradients and averages lie as parameters do.
            params = state.params
            assert digests.digests(params) == digests.digests(jax.device_get(params))
            checkpoints = checkpoint.Checkpoints(f'{folder}/{size[1]}')
            checkpoints.save(state, {'format_version': 1})
            checkpoints.close()
print('steps: equal')

# Devices that hold whole groups tell each other gradients and running values, in one message.
rng = np.random.default_rng(0)
data = {'x': rng.normal(3, 1, (16, 2, 3, 3, 8)).astype(np.float32), 'mask': np.ones(16, np.float32)}
data |= {'upstream': rng.normal(size=data['x'].shape).astype(np.float32)}
data['mask'][[3, 4, 5]] = 0
variables = BatchNorm().init(jax.random.key(0), data['x'])
mesh = make_mesh(fsdp=2)
for groups in (1, 2, 8):
    def gradients(variables, data):
        def loss(params, x):
            y, changed = BatchNorm(groups).apply(
                {**variables, 'params': params}, x, data['mask'], True, mutable=['batch_stats'])
            return (y * data['upstream']).sum(), (y, changed)
        return jax.grad(loss, (0, 1), has_aux=True)(variables['params'], data['x'])
    whole, split = replicated(mesh), batched(mesh)
    compiled = jax.jit(
        on_mesh(mesh, gradients), in_shardings=(whole, split),
        out_shardings=((whole, split), (split, whole)),
    ).lower(variables, data).compile()
    found = compiled(jax.device_put(variables, whole), jax.device_put(data, split))
    close(found, jax.jit(gradients)(variables, data), 1e-5)
    sent = re.findall(r' (all-\w+|reduce-scatter|collective-\w+)(?:-start)?\(', compiled.as_text())
    assert groups != 8 or sent == ['all-reduce'], sent
print('groups: equal')

# Every device holds an eighth of what rules split, and one layer is gathered at a time.
family = families['dist']
split = meshes['dist', (1, 8, 1)]
kernel = split.frozen['visual']['blocks']['mlp']['c_fc']['kernel']
assert kernel.addressable_data(0).size * 8 == kernel.size == 3 * 64 * 256
gathers = [line for line in split.step.as_text().splitlines() if ' all-gather(' in line]
inside = [line for line in gathers if 'image_tower/while/body' in line]
stack = r'f32\[3,(64,256|256,64|64,3,8,8|8,8,64)\]'
assert len(inside) >= 4 and not [line for line in gathers if re.search(stack, line)], gathers
print('layers: gathered one at a time')

# With half of the batch at a time, loss and gradients are the same sums.
small = families['frame_mean']
check_step(jax.device_get(Devices(small, 2, 2, 1, accumulation=2).run(small.fresh, 0)),
           results['frame_mean'])
print('accumulation: equal')

# Fresh parameters do not depend on the mesh.
evl_split = meshes['evl', (1, 8, 1)]
drawn = jax.jit(
    evl_split.family.init, out_shardings=shardings(evl_split.abstract))(evl_split.frozen)
same_places(drawn, evl_split.abstract)
same(drawn, evl_split.family.fresh)
print('initial values: equal')

# A classifier for other classes lies where one drawn for them would.
head, found = drawn.params['head'], np.array([4, -1, 0])
fresh = jax.tree.map(
    lambda x: jax.device_put(np.full(x.shape, 7, np.float32), x.sharding),
    heads.with_classes(head, (3,)))
taken = heads.take_classes(head, (found,), fresh)
same_places(taken, fresh)
kernel = taken['column_0']['classifier']['kernel']
assert kernel.addressable_data(0).shape == (8, 3) and kernel.shape == (64, 3)
before = evl_split.family.fresh.params['head']['column_0']['classifier']['kernel']
expected = np.where(found < 0, 7, before[:, found])
np.testing.assert_array_equal(to_host(kernel), expected)
print('classes: taken')

# Partners of the reversed batch live on other devices.
host = batch(0)
targets = (np.eye(5, dtype=np.float32)[host['label']],)
mix = jax.jit(mixup.mix, static_argnums=4)
found = []
for devices in (meshes['dist', 'one'], meshes['dist', (2, 2, 2)]):
    placed = to_global({'video': host['video'].astype(np.float32), 'target': targets[0],
                        'mask': host['mask']}, devices.mesh)
    key = jax.device_put(jax.random.key(5), replicated(devices.mesh))
    found.append(jax.device_get(mix(key, placed['video'], (placed['target'],), placed['mask'],
                                    mixup.Mixing(cutmix_alpha=1.0))))
jax.tree.map(np.testing.assert_array_equal, *found)
mixed, (target,) = found[1]
rows = host['video'].reshape(mixed.shape)
assert (mixed[0] != rows[0]).any() and target[0].sum() == 1
np.testing.assert_array_equal(mixed[5], rows[5])  # its partner is a bad video
print('mixing: equal')

one, mixed = (meshes['dist', size] for size in ('one', (2, 2, 2)))
expected, _ = one.run(results['dist'][0], 1)
for devices, name in ((one, 8), (split, 2), (mixed, 8)):
    state, _ = devices.continued(name)
    assert int(state.step) == 2
    close(state.params, expected.params, 1e-5)
    close(state.ema, expected.ema, 1e-5)
same(mixed.restored(8), one.restored(8))  # the values themselves
straight, _ = mixed.run(mixed.restored(2), 1)
same(mixed.continued(2)[0], straight)
print('checkpoints: equal')

# Weights are read, resized, cast and made features of on any mesh.
names = (tuple('abcde'), tuple('fgh'))
frozen.tokenize = lambda texts, *_: np.array([[1, ord(t) % 19, 19, 0, 0, 0] for t in texts])
converted.CHUNK_BYTES = converted.SLICE_BYTES = 4096  # several pieces and slices an array
converted.save_converted(
    f'{folder}/backbone', jax.device_get(raw), dict.fromkeys(converted.REQUIRED, ''))
backbone = Backbone(clip.KIND, SPEC, f'{folder}/backbone').at(24)
text = dist.build(backbone, integration_dim=128, temporal_dim=8, ada_pooling_layers=1,
                  **{**OPTIONS, 'num_classes': (5, 3), 'head': 'text', 'dtype': jnp.bfloat16})
found = [text.frozen.load(devices.mesh, frozen.ClassTexts(names))
         for devices in (one, split, mixed)]
assert found[0]['visual']['positional_embedding'].shape == (10, 64)
for devices, tree in zip((split, mixed), found[1:]):
    same_places(tree, place(tree, text.frozen.rules, devices.mesh))
    same(tree['visual'], found[0]['visual'])
    close(to_host(tree['text']), to_host(found[0]['text']), 1e-5)
assert not found[2]['visual']['blocks']['mlp']['c_fc']['kernel'].is_fully_replicated
print('weights: equal')

# Towers of another kind: norms over split heads and hidden channels, positions that turn.
pixels, tokens = jnp.float32(batch(0)['video'][:, 0]) / 255, jnp.arange(12).reshape(2, 6)
small = {'image_size': 16, 'vocab_size': 20, 'context_length': 6}
for name in ('eva_tiny', 'eva_tiny_rope'):
    spec = dataclasses.replace(eva.SPECS[name], **small)
    weights = eva.init_params(jax.random.key(0), spec)
    encode = lambda p: (eva.KIND.encode_text(p['text'], tokens, spec), eva.encode_image(
        p['visual'], pixels, spec, Taps(outputs=(0,), attention=(1,), embedding=True)))
    expected = jax.jit(encode)(weights)
    placed = shardings(place(weights, eva.SHARDING_RULES, mixed.mesh))
    found = jax.jit(on_mesh(mixed.mesh, encode))(jax.device_put(weights, placed))
    close(to_host(found), expected, 1e-5)
print('towers: equal')

views = np.repeat(batch(0)['video'][:, None], 2, axis=1)
scores = []
for devices in (one, mixed):
    variables = {'params': family.fresh.params}
    variables = jax.device_put(
        variables, shardings(step.place_variables(family.model, variables, devices.mesh)))
    evaluate = step.make_eval_step(family.model, TASK, devices.mesh, variables, devices.frozen)
    found = evaluate(variables, devices.frozen, to_global({'video': views}, devices.mesh))
    scores.append(found['scores'])
close(to_host(scores[1]), to_host(scores[0]), 1e-5)
print('scores: equal')

# The partitioner cannot split a layout, and would bring all clips to every device.
mesh = make_mesh(jax.devices(), data=8, fsdp=1, tensor=1)
stream = jax.ShapeDtypeStruct((16, 4, 5, 6), jnp.float32, sharding=batched(mesh))
kept = jax.jit(on_mesh(mesh, side_network._kept), out_shardings=batched(mesh))
text = kept.lower(stream).compile().as_text()
assert not re.search('all-(gather|reduce)', text), text
print('streams: split')


def refused(function, *texts):
    try:
        function()
    except ValueError as error:
        assert all(text in str(error) for text in texts), error
    else:
        raise AssertionError(texts)


refused(lambda: check_batch_size(12, split.mesh, 'batch_size'), 'batch_size=12', 'multiple of 8')
refused(lambda: check_batch_size(6, mixed.mesh, 'batch_size'), 'batch_size=6', 'multiple of 4',
        'mesh.data=2 x mesh.fsdp=2', '8 devices')
check_batch_size(16, split.mesh, 'batch_size', 2)
refused(lambda: check_batch_size(8, split.mesh, 'batch_size', 2), '16', '2 accumulation steps')
config = dist_config.get_config('demo')
config.batch_size = 4
refused(lambda: train.train(config, f'{folder}/run'), 'batch_size=4', '8 devices')
config.update(batch_size=8)
config.eval.batch_size = 10
refused(lambda: train.train(config, f'{folder}/run'), 'eval.batch_size=10', '8 devices')
config.update(mesh={'fsdp': 3})
refused(lambda: train.train(config, f'{folder}/run'), 'mesh.fsdp=3', '8 devices')
print('sizes: refused')
"""


@pytest.mark.slow
def test_eight_devices_in_any_mesh_equal_one(tmp_path):
    flags = os.environ.get('XLA_FLAGS', '')
    environment = os.environ | {
        'JAX_PLATFORMS': 'cpu',
        'XLA_FLAGS': f'{flags} --xla_force_host_platform_device_count=8',
        'PYTHONPATH': os.pathsep.join(map(str, Path(__file__).parents[:2])),
    }
    found = subprocess.run(
        [sys.executable, '-c', SCRIPT, str(tmp_path)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=600,
    )
    assert found.returncode == 0, found.stdout + found.stderr[-4000:]
    assert [line.split(':')[0] for line in found.stdout.splitlines()] == [
        'steps',
        'groups',
        'layers',
        'accumulation',
        'initial values',
        'classes',
        'mixing',
        'checkpoints',
        'weights',
        'towers',
        'scores',
        'streams',
        'sizes',
    ]
    assert not (tmp_path / 'run').exists()
