"""Families on EVA: one step with each moves what is trained, and nothing else."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dist_jax import optim, step
from dist_jax.models import dist, eva, evl, side4video
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
SIDE4VIDEO = {'side_dim': 64, 'tap_every': 2, 'batch_norm_groups': 2}
# Gradients that are zero on paper. The map of DiST's last layer feeds nothing, and no softmax sees
# a bias of keys. Batch norms take off what is the same everywhere: a bias right before one, and in
# the last layer, the only one here, what nothing but later ones would see.
UNUSED = {f'last_layer/integration2temporal/{name}' for name in ('kernel', 'bias')}
KEYS = {'layers/attn/k/bias'}
CENTRED = {'stem/bias', 'layers/mlp/c_proj/bias', 'layers/attn/out/bias'}
CENTRED_POST_NORM = {
    f'{name}/bias' for name in ('stem', 'layers/mlp/c_proj', 'layers/conv/dw', 'layers/conv/pw_2')
}


@pytest.mark.parametrize(
    ('spec', 'build', 'options', 'zero'),
    [
        (ROTARY, dist.build, {**DIST, 'head': 'text'}, UNUSED),
        (POST_NORM, dist.build, {**DIST, 'head': 'linear'}, UNUSED),
        (ROTARY, evl.build, EVL, KEYS),
        (ROTARY, side4video.build, SIDE4VIDEO, CENTRED),
        (
            POST_NORM,
            side4video.build,
            {**SIDE4VIDEO, 'post_norm': True, 'remat': 'branches'},
            CENTRED_POST_NORM,
        ),
    ],
    ids=['dist text', 'dist linear', 'evl', 'side4video rotary', 'side4video post norm'],
)
def test_one_step(spec, build, options, zero):
    model = build(Backbone(eva.KIND, spec), **OPTIONS, **options)
    tokens = jax.random.randint(jax.random.key(3), (5, 6), 1, 20)
    texts = (tokens,) if model.frozen.reads_classes else ()
    rng = np.random.default_rng(0)
    batch = {
        'video': rng.integers(0, 256, VIDEO, dtype=np.uint8),
        'label': np.arange(4, dtype=np.int32),
        'mask': np.ones(4, np.float32),
    }
    make = lambda p: optim.of_model(model, p, OPTIMIZER)  # noqa: E731

    @jax.jit
    def start(key):
        frozen = model.frozen.prepare(eva.init_params(key, spec), texts)
        return frozen, step.init_state(model, TASK, frozen, VIDEO, 0, make)

    frozen, fresh = start(jax.random.key(0))
    before = jax.device_get((frozen, fresh.params))
    mesh = make_mesh(jax.devices()[:1])
    schedule = optim.make_schedule(OPTIMIZER)
    train_step = step.make_train_step(
        model, TASK, make(fresh.params), schedule, step.StepSettings(), mesh
    )
    state, metrics = train_step(fresh, frozen, batch)
    assert np.isfinite(metrics['loss'])
    jax.tree.map(np.testing.assert_array_equal, before[0], jax.device_get(frozen))
    same = names(jax.tree.map(np.array_equal, before[1], jax.device_get(state.params)))
    moments = [m for _, m in optax.tree_utils.tree_get_all_with_path(state.opt_state, 'mu')]
    sizes = {name: np.abs(x).max() for m in moments for name, x in names(m).items()}
    assert sizes.keys() == same.keys()
    largest = max(sizes.values())
    assert zero == {name for name, size in sizes.items() if size < 1e-6 * largest}
    assert zero >= {name for name, equal in same.items() if equal}


def names(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(p, simple=True, separator='/'): leaf for p, leaf in leaves}
