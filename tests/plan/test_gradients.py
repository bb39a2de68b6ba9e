"""Training the backbone, for plans: gradients flow where they are said to, sizes grow."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dist_jax.configs import dist, frame_mean
from dist_jax.models import clip
from dist_jax.models.backbone import Backbone
from dist_jax.models.params import count
from dist_jax.plan import compiling, gradients
from dist_jax.sharding import make_mesh

SPEC = clip.SPECS['tiny']


@pytest.fixture(scope='module')
def baseline():
    """(model, frozen tree, batch) of the frame-only baseline."""
    model = compiling.assemble(frame_mean.get_config('demo')).model
    params = clip.init_params(jax.random.key(0), SPEC)
    video = jax.random.randint(jax.random.key(1), (1, 2, 48, 48, 3), 0, 255, jnp.uint8)
    return model, model.frozen.prepare(params), {'video': model.normalize(video)}


def test_nothing_changes_without_being_asked(baseline):
    model, frozen, _ = baseline
    assert gradients.with_gradients(model, frozen, 'frozen') == (model, frozen)


@pytest.mark.parametrize('mode', ['through_backbone', 'full'])
def test_the_same_outputs_with_gradients_through_the_backbone(baseline, mode):
    model, frozen, batch = baseline
    inputs = model.inputs(frozen, batch)
    head = model.net.init(jax.random.key(2), inputs)['params']
    expected = model.net.apply({'params': head}, inputs)['logits'][0]
    whole, kept = gradients.with_gradients(model, frozen, mode)
    params = jax.eval_shape(whole.net.init, jax.random.key(3), whole.inputs(kept, batch))
    params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), params['params'])
    params = {**params, gradients.NET: head}
    if mode == 'full':
        assert kept == {}
        params['backbone'] = frozen['visual']

    @jax.jit
    @jax.grad
    def gradient(params):
        outputs = whole.net.apply({'params': params}, whole.inputs(kept, batch), train=True)
        return (outputs['logits'][0] ** 2).sum()

    outputs = whole.net.apply({'params': params}, whole.inputs(kept, batch))
    np.testing.assert_allclose(outputs['logits'][0], expected, rtol=1e-5, atol=1e-5)
    grads = gradient(params)
    assert np.any(grads[gradients.NET]['head']['column_0']['classifier']['kernel'])
    backbone = grads['backbone'] if mode == 'full' else grads['pixel_offset']
    assert all(np.any(leaf) for leaf in jax.tree.leaves(backbone))


def test_what_is_trained_is_what_the_optimizer_holds():
    sizes = {}
    for mode in gradients.MODES:
        config = dist.get_config('demo')
        one = compiling.train_step(config, make_mesh(jax.devices()[:1]), mode)
        state = one.arguments['state']
        sizes[mode] = sum(leaf.size for leaf in jax.tree.leaves(state.params))
        moments = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state))
        assert moments >= 2 * sizes[mode]
        assert {leaf.dtype.name for leaf in jax.tree.leaves(state.params)} == {'float32'}
    tower = count(Backbone(clip.KIND, SPEC).abstract_params()['visual'])
    assert sizes['through_backbone'] == sizes['frozen'] + 3
    assert sizes['full'] == sizes['frozen'] + tower


def test_another_way_of_training_is_an_error(baseline):
    model, frozen, _ = baseline
    with pytest.raises(ValueError, match='through_backbone, full'):
        gradients.with_gradients(model, frozen, 'half')
    with pytest.raises(ValueError, match='no frozen image tower'):
        gradients.with_gradients(dataclasses.replace(model, frozen=None), {}, 'full')
