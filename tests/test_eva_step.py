"""Families on EVA: one step with each moves what is trained, and nothing else."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dist_jax import optim, step
from dist_jax.models import dist, eva, evl
from dist_jax.models.backbone import Backbone
from dist_jax.sharding import make_mesh
from dist_jax.tasks.classify import Classify

TASK = Classify((tuple('abcde'),), label_smoothing=0.1)
OPTIMIZER = optim.OptimizerSettings(1e-3, 0.0, 0, 100)
VIDEO = (4, 4, 16, 16, 3)
SIZES = {'image_size': 16, 'vocab_size': 20, 'context_length': 6}
ROTARY = dataclasses.replace(eva.SPECS['eva_tiny_rope'], **SIZES)
POST_NORM = dataclasses.replace(eva.SPECS['eva_tiny'], **SIZES)
OPTIONS = {'num_classes': (5,), 'num_frames': 4, 'dtype': jnp.float32}
DIST = {'integration_dim': 64, 'temporal_dim': 8, 'ada_pooling_layers': 1}
EVL = {'depth': 2, 'qkv_dim': 64, 'num_heads': 2, 'cls_token_std': 0.02}
# The map of DiST's last layer feeds nothing, and no softmax sees a bias of keys: by design.
UNUSED = {f'last_layer/integration2temporal/{name}' for name in ('kernel', 'bias')}


@pytest.mark.parametrize(
    ('spec', 'build', 'options', 'still'),
    [
        (ROTARY, dist.build, {**DIST, 'head': 'text'}, UNUSED),
        (POST_NORM, dist.build, {**DIST, 'head': 'linear'}, UNUSED),
        (ROTARY, evl.build, EVL, {'layers/attn/k/bias'}),
    ],
    ids=['dist text', 'dist linear', 'evl'],
)
def test_one_step(spec, build, options, still):
    model = build(Backbone(eva.KIND, spec), **OPTIONS, **options)
    tokens = jax.random.randint(jax.random.key(3), (5, 6), 1, 20)
    texts = (tokens,) if model.frozen.reads_classes else ()
    params = eva.init_params(jax.random.key(0), spec)
    frozen = jax.jit(model.frozen.prepare)(params, texts)
    rng = np.random.default_rng(0)
    batch = {
        'video': rng.integers(0, 256, VIDEO, dtype=np.uint8),
        'label': np.arange(4, dtype=np.int32),
        'mask': np.ones(4, np.float32),
    }
    make = lambda p: optim.make_optimizer(p, model.param_groups, OPTIMIZER)  # noqa: E731
    fresh = jax.jit(lambda f: step.init_state(model, TASK, f, VIDEO, 0, make))(frozen)
    before = jax.device_get((frozen, fresh.params))
    mesh = make_mesh(jax.devices()[:1])
    schedule = optim.make_schedule(OPTIMIZER)
    train_step = step.make_train_step(
        model, TASK, make(fresh.params), schedule, step.StepSettings(), mesh
    )
    state, metrics = train_step(fresh, frozen, batch)
    assert np.isfinite(metrics['loss'])
    jax.tree.map(np.testing.assert_array_equal, before[0], jax.device_get(frozen))
    same = jax.tree.map(np.array_equal, before[1], jax.device_get(state.params))
    paths = jax.tree_util.tree_leaves_with_path(same)
    assert still == {
        jax.tree_util.keystr(path, simple=True, separator='/') for path, equal in paths if equal
    }
