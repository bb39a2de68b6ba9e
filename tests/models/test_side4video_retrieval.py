"""Side4Video's retrieval network: what it starts as, its halves, gradients, groups of parameters.

See also check_parity, and test_side4video for the trunk that it shares.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dist_jax import optim
from dist_jax.models import clip, eva, side4video_retrieval, side_network
from dist_jax.models.backbone import Backbone, Taps
from dist_jax.models.params import flatten
from dist_jax.models.transformer import at_end
from dist_jax.tasks.retrieve import Retrieve

TEXT = {'vocab_size': 20, 'context_length': 6}
BACKBONES = {
    'clip': Backbone(clip.KIND, clip.ClipSpec(16, 8, 32, 1, 2, 24, 16, 1, 1, **TEXT)),
    'eva': Backbone(
        eva.KIND,
        eva.EvaSpec(
            *(16, 8, 32, 1, 2, 24, 64, 16, 1, 1),
            **TEXT,
            post_norm=True,
            sub_ln=False,
            swiglu=False,
            rope=False,
        ),
    ),
}
MASK = np.array([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1]], np.float32)
TOKENS = np.array([[1, 5, 7, 19], [1, 6, 19, 0], [1, 8, 2, 19]], np.int32)


def build(form, **options):
    options = {'num_frames': 3, 'dtype': jnp.float32, 'side_dim': 64} | options
    return side4video_retrieval.build(BACKBONES[form], post_norm=form == 'eva', **options)


@functools.cache
def started(form):
    """(frozen tree, variables at the start, inputs of three pairs)."""
    backbone, model = BACKBONES[form], build(form)

    @jax.jit
    def make():
        frozen = backbone.kind.init_params(jax.random.key(0), backbone.spec)
        video = jax.random.normal(jax.random.key(1), (3, 3, 16, 16, 3))
        inputs = model.inputs(frozen, {'video': video, 'tokens': TOKENS})
        return frozen, model.net.init(jax.random.key(2), inputs), inputs | {'video': video}

    frozen, variables, inputs = make()
    visual = {name: frozen['visual'][name] for name in backbone.kind.projection}
    taken = {'text': frozen['text'], 'visual': visual, 'logit_scale': frozen['logit_scale']}
    assert model.from_backbone.keys() == {
        *(f'visual/{name}' for name in visual),
        'text',
        'logit_scale',
    }
    return frozen, variables | {'params': variables['params'] | taken}, inputs


@functools.cache
def program(form, **options):
    return jax.jit(build(form, **options).net.apply)


@pytest.mark.parametrize('form', BACKBONES)
def test_it_starts_as_the_backbone_that_looks_at_single_frames(form):
    frozen, variables, inputs = started(form)
    outputs = program(form)(variables, inputs)
    backbone = BACKBONES[form]
    frames = inputs['video'].reshape(9, 16, 16, 3)
    encode = jax.jit(lambda p: backbone.encode_image(p, frames, Taps(embedding=True)))
    found = encode(frozen['visual'])['embedding']
    np.testing.assert_allclose(outputs['frames'].reshape(9, -1), found, rtol=1e-4, atol=1e-5)
    encode = jax.jit(lambda p: backbone.kind.encode_text(p, TOKENS, backbone.spec))
    texts = encode(frozen['text'])
    np.testing.assert_allclose(outputs['pooled'], texts, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(outputs['pooled'], at_end(outputs['words'], TOKENS))
    np.testing.assert_allclose(outputs['logit_scale'], np.full(3, np.log(100)), rtol=1e-6)
    assert {name: value.shape for name, value in outputs.items()} == {
        'frames': (3, 3, 24),
        'frame_logits': (3, 3),
        'words': (3, 4, 24),
        'word_logits': (3, 4),
        'pooled': (3, 24),
        'logit_scale': (3,),
    }


@pytest.mark.parametrize('form', BACKBONES)
def test_clips_and_sentences_alone_are_what_they_are_together(form):
    _, variables, inputs = started(form)
    together = program(form)(variables, inputs)
    sentences = program(form)(variables, {'tokens': inputs['tokens']})
    clips = program(form)(variables, {k: v for k, v in inputs.items() if k != 'tokens'})
    assert sentences.keys() | clips.keys() == together.keys()
    assert sentences.keys() & clips.keys() == {'logit_scale'}
    for name, value in (sentences | clips).items():
        np.testing.assert_allclose(value, together[name], rtol=1e-5, atol=1e-6, err_msg=name)


def gradients(form, gradient_world):
    _, variables, inputs = started(form)
    net, task = build(form, gradient_world=gradient_world).net, Retrieve(num_words=4)
    targets = {'word_mask': MASK, 'video': np.arange(3)}
    # Away from zero, where the side network would have no gradient.
    params = jax.tree.map(lambda x: x + np.float32(0.05), jax.device_get(variables['params']))

    @jax.jit
    def of_loss(params):
        outputs = net.apply(variables | {'params': params}, inputs)
        return task.loss(outputs, targets, np.ones(3, np.float32)).mean()

    return flatten(jax.grad(of_loss)(params))


def test_gradients_of_towers_are_divided_and_those_of_heads_are_not():
    whole, divided = (gradients('clip', world) for world in (1, 8))
    heads = {name for name in whole if name.startswith(('text_weight', 'video_weight', 'logit'))}
    assert len(heads) == 9 and any(name.startswith('text/') for name in whole)
    largest = max(np.abs(value).max() for value in whole.values())
    for name, value in whole.items():
        expected = value if name in heads else value / 8
        np.testing.assert_allclose(
            divided[name], expected, rtol=1e-4, atol=1e-6 * largest, err_msg=name
        )
    assert np.abs(whole['text/token_embedding']).max() > 1e-4 * largest
    assert np.abs(whole['side_proj/kernel']).max() > 1e-4 * largest


@pytest.mark.parametrize('form', BACKBONES)
def test_what_starts_as_the_backbone_learns_slowly_and_biases_do_not_decay(form):
    _, variables, _ = started(form)
    model = build(form, pretrained_lr=1e-3)
    groups = flatten(optim.assign_groups(variables['params'], model.param_groups))
    assert groups
    for name, group in groups.items():
        pretrained = name.split('/')[0] in ('text', 'visual', 'logit_scale')
        assert group.learning_rate == (1e-3 if pretrained else 1), name
        assert group.weight_decay == (0 if 'bias' in name else 1), name
    assert groups['text/ln_final/scale'].weight_decay == 1  # as in the release
    assert groups['text/token_embedding'].weight_decay == 1


@pytest.mark.parametrize('behind', [0, 1])
def test_a_class_row_behind_the_positions_stays_as_it_is(behind):
    stored = np.random.default_rng(0).normal(size=(9 + behind, 4)).astype(np.float32)
    fitted = side_network.fit_positions('positional_embedding', stored, (25 + behind, 4))
    assert fitted.shape == (25 + behind, 4)
    np.testing.assert_array_equal(fitted[25:], stored[9:])
    grid = side_network.fit_positions('positional_embedding', stored[:9], (25, 4))
    np.testing.assert_allclose(fitted[:25], grid, rtol=1e-6)
    np.testing.assert_allclose(grid[12], stored[4], rtol=1e-5)  # the middle of both


@pytest.mark.parametrize(
    ('form', 'options', 'message'),
    [
        ('clip', {'num_classes': (5,)}, r"has no classes; set task\.name='retrieve'"),
        ('clip', {'side_dim': 96}, r'model\.side_dim=96'),
    ],
)
def test_options_that_do_not_fit_are_named(form, options, message):
    with pytest.raises(ValueError, match=message):
        build(form, **options)


def test_a_backbone_without_a_text_tower_is_refused():
    spec = eva.EvaSpec(16, 8, 32, 1, 2, 24, 64, 16, 0, 1)
    with pytest.raises(ValueError, match=r'this backbone has none; take another backbone\.name'):
        side4video_retrieval.build(Backbone(eva.KIND, spec), num_frames=3)
