"""Eight devices do what one does: the same step, mixing, checkpoints."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

from configs import dist as dist_config
from dist_jax import checkpoint, mixup, step, train
from dist_jax.models import clip, dist
from dist_jax.sharding import check_batch_size, make_mesh, replicated, to_global

SPEC = clip.ClipSpec(16, 8, 32, 2, 1, 24, 16, 1, 1, vocab_size=20, context_length=6)
SHAPE = (8, 4, 16, 16, 3)
folder = sys.argv[1]
assert jax.device_count() == 8
model = dist.build(SPEC, num_classes=(5,), num_frames=4, dtype=jnp.float32, head='linear',
                   integration_dim=64, temporal_dim=8, ada_pooling_layers=1)
mixing = mixup.Mixing(mixup_alpha=0.8)
settings = step.StepSettings((5,), label_smoothing=0.1, mixing=mixing, ema_decay=0.5, seed=3)
# Momentum keeps the gradients themselves; Adam would hide their size.
optimizer = optax.sgd(0.1, momentum=0.9)
start = jax.jit(lambda key: model.prepare(clip.init_params(key, SPEC), ()))
frozen = jax.device_get(start(jax.random.key(0)))
init = lambda f: step.init_state(model, f, SHAPE, 0, lambda p: optimizer, ema=True)
fresh = jax.device_get(jax.jit(init)(frozen))


def batch(number):
    rng = np.random.default_rng(number)
    mask = np.ones(8, np.float32)
    mask[2] = 0  # a bad video, and its partner 5 on another device
    return {'video': rng.integers(0, 256, SHAPE, dtype=np.uint8),
            'label': rng.integers(0, 5, 8).astype(np.int32), 'mask': mask}


class Devices:
    def __init__(self, count):
        self.mesh = make_mesh(jax.devices()[:count])
        self.step = step.make_train_step(
            model, optimizer, lambda n: jnp.float32(0.1), settings, self.mesh)
        self.frozen = jax.device_put(frozen, replicated(self.mesh))

    def run(self, state, number):
        state = jax.device_put(state, replicated(self.mesh), may_alias=False)  # it is donated
        return self.step(state, self.frozen, to_global(batch(number), self.mesh))

    def continued(self, name):
        place = replicated(self.mesh)
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), fresh)
        checkpoints = checkpoint.Checkpoints(f'{folder}/{name}')
        state, _ = checkpoints.restore_latest(abstract)
        checkpoints.close()
        assert all(x.sharding == place for x in jax.tree.leaves(state))
        return self.step(state, self.frozen, to_global(batch(1), self.mesh))


def close(a, b, bound):
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b)):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        error = np.abs(x - y).max() / max(np.abs(y).max(), 1e-6)
        assert error < bound, (jax.tree_util.keystr(path), error)


one, eight = Devices(1), Devices(8)
results = {}
for name, devices in (('one', one), ('eight', eight)):
    state, metrics = devices.run(fresh, 0)
    checkpoints = checkpoint.Checkpoints(f'{folder}/{name}')
    checkpoints.save(state, {'format_version': 1}, None)
    checkpoints.close()
    results[name] = jax.device_get((state, metrics))
    if devices is eight:
        assert len(jax.tree.leaves(state.params)[0].devices()) == 8
(state1, metrics1), (state8, metrics8) = results['one'], results['eight']
assert metrics1['clips'] == 7 and metrics1['loss'] > 0 and metrics1['grad_norm'] > 0
close(metrics8['loss'], metrics1['loss'], 1e-6)
close(metrics8['grad_norm'], metrics1['grad_norm'], 1e-5)
close(state8.opt_state, state1.opt_state, 1e-5)  # the gradients
close(state8.params, state1.params, 1e-5)  # what starts at zero is gradient alone
close(state8.ema, state1.ema, 1e-5)
print('step: equal')

# Partners of the reversed batch live on other devices.
host = batch(0)
targets = (np.eye(5, dtype=np.float32)[host['label']],)
mix = jax.jit(mixup.mix, static_argnums=4)
found = []
for devices in (one, eight):
    placed = to_global({'video': host['video'].astype(np.float32), 'target': targets[0],
                        'mask': host['mask']}, devices.mesh)
    key = jax.device_put(jax.random.key(5), replicated(devices.mesh))
    found.append(jax.device_get(mix(key, placed['video'], (placed['target'],), placed['mask'],
                                    mixup.Mixing(cutmix_alpha=1.0))))
jax.tree.map(np.testing.assert_array_equal, *found)
mixed, (target,) = found[1]
assert (mixed[0] != host['video'][0]).any() and target[0].sum() == 1
np.testing.assert_array_equal(mixed[5], host['video'][5])  # its partner is a bad video
print('mixing: equal')

expected, _ = one.run(state1, 1)
for devices, name in ((eight, 'one'), (one, 'eight')):
    state, metrics = devices.continued(name)
    assert int(state.step) == 2
    close(state.params, expected.params, 1e-5)
    close(state.ema, expected.ema, 1e-5)
same, _ = eight.continued('eight')
straight, _ = eight.run(state8, 1)
jax.tree.map(np.testing.assert_array_equal, jax.device_get(same), jax.device_get(straight))
print('checkpoints: equal')


def refused(function, *texts):
    try:
        function()
    except ValueError as error:
        assert all(text in str(error) for text in texts), error
    else:
        raise AssertionError(texts)


refused(lambda: check_batch_size(12, eight.mesh, 'batch_size'), 'batch_size=12', 'multiple of 8')
check_batch_size(16, eight.mesh, 'batch_size', 2)
refused(lambda: check_batch_size(8, eight.mesh, 'batch_size', 2), '16', '2 accumulation steps')
config = dist_config.get_config('demo')
config.batch_size = 4
refused(lambda: train.train(config, f'{folder}/run'), 'batch_size=4', '8 devices')
config.update(batch_size=8)
config.eval.batch_size = 10
refused(lambda: train.train(config, f'{folder}/run'), 'eval.batch_size=10', '8 devices')
print('sizes: refused')
"""


@pytest.mark.slow
def test_eight_devices_equal_one(tmp_path):
    flags = os.environ.get('XLA_FLAGS', '')
    environment = os.environ | {
        'JAX_PLATFORMS': 'cpu',
        'XLA_FLAGS': f'{flags} --xla_force_host_platform_device_count=8',
        'PYTHONPATH': str(Path(__file__).parents[1]),
    }
    found = subprocess.run(
        [sys.executable, '-c', SCRIPT, str(tmp_path)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert found.returncode == 0, found.stdout + found.stderr[-4000:]
    done = ['step: equal', 'mixing: equal', 'checkpoints: equal', 'sizes: refused']
    assert found.stdout.splitlines() == done
    assert not (tmp_path / 'run').exists()
