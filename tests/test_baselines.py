"""What trained models are compared with: class texts alone, a probe, all weights trained."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from dist_jax import (
    backbones,
    checkpoint,
    convert,
    evaluate,
    main,
    optim,
    step,
    train,
    trained,
)
from dist_jax.configs import attentive_probe as attentive_probe_config
from dist_jax.configs import base
from dist_jax.configs import fine_tune as fine_tune_config
from dist_jax.configs import zero_shot as zero_shot_config
from dist_jax.models import attentive_probe, clip, converted, dist, fine_tune, zero_shot
from dist_jax.models.backbone import Backbone
from dist_jax.models.params import flatten
from dist_jax.plan import compiling
from dist_jax.sharding import AXES
from dist_jax.tasks.retrieve import Retrieve
from input_pipeline import motion_captions

SPEC = clip.ClipSpec(16, 8, 32, 2, 2, 24, 16, 1, 1, vocab_size=20, context_length=6)
BACKBONE = Backbone(clip.KIND, SPEC)
CLASSES, FRAMES = 3, 4
CLIP = {'num_classes': (CLASSES,), 'num_frames': FRAMES, 'dtype': jnp.float32}


def filled(tree, seed=0):
    """Numbers for shapes; norms do nothing."""
    rng = np.random.default_rng(seed)
    paths, structure = jax.tree_util.tree_flatten_with_path(tree)
    leaves = [
        np.ones(leaf.shape, np.float32)
        if path[-1].key == 'scale'
        else rng.normal(0, 0.1, leaf.shape).astype(np.float32)
        for path, leaf in paths
    ]
    return jax.tree.unflatten(structure, leaves)


@pytest.fixture(scope='module')
def params():
    return filled(BACKBONE.abstract_params()) | {'logit_scale': np.float32(np.log(50))}


@pytest.fixture(scope='module')
def batch():
    rng = np.random.default_rng(1)
    video = rng.normal(size=(4, FRAMES, 16, 16, 3)).astype(np.float32)
    return {'video': video, 'tokens': rng.integers(1, 20, (4, 6)).astype(np.int32)}


@pytest.fixture(scope='module')
def texts(params):
    """What a frozen tree holds of classes."""
    found = np.random.default_rng(2).normal(size=(CLASSES, SPEC.embed_dim)).astype(np.float32)
    unit = found / np.linalg.norm(found, axis=1, keepdims=True)
    return {'text': (unit,), 'logit_scale': params['logit_scale']}


@pytest.fixture(scope='module')
def frozen_outputs(params, texts, batch):
    """Of the backbone and texts alone."""
    model = zero_shot.build(BACKBONE, **CLIP)
    tree = {'visual': params['visual'], **texts}
    return jax.jit(lambda tree: model.net.apply({}, model.inputs(tree, batch)))(tree)


def fresh(model, tree, batch):
    """Parameters of a network, not those that it starts with."""
    inputs = jax.eval_shape(model.inputs, tree, batch)
    return filled(jax.eval_shape(model.net.init, jax.random.key(0), inputs)['params'], seed=3)


def starting(model, tree, batch, params):
    """Parameters with what the model takes of a backbone."""
    found = fresh(model, tree, batch)
    taken = {ours: params[theirs] for ours, theirs in model.from_backbone.items()}
    same = jax.tree.map(np.shape, {name: found[name] for name in taken})
    assert same == jax.tree.map(np.shape, taken)
    return found | taken


def grouped(model, params):
    """Path -> group of every parameter; axes and bounds are of parameters that there are."""
    settings = optim.OptimizerSettings(1e-3, 0.0, 0, 10, clip_tensor_norm=1.0)
    jax.eval_shape(optim.of_model(model, params, settings).init, params)
    return flatten(optim.assign_groups(params, model.param_groups))


def test_class_texts_alone_are_the_frozen_part_of_a_text_head(params, texts, batch, frozen_outputs):
    sizes = {'integration_dim': 64, 'temporal_dim': 8, 'ada_pooling_layers': 1}
    whole = dist.build(BACKBONE, **CLIP, **sizes, alpha=1)
    tree = {'visual': params['visual'], **texts}
    trained_part = fresh(whole, tree, batch)

    @jax.jit
    def frozen_part(tree):
        inputs = whole.inputs(tree, batch)
        return whole.net.apply({'params': trained_part}, inputs)['frozen_logits'][0]

    logits = frozen_outputs['logits'][0]
    assert logits.shape == (4, CLASSES) and np.ptp(logits) > 1
    np.testing.assert_allclose(logits, frozen_part(tree), rtol=1e-5, atol=1e-5)
    assert frozen_outputs['embedding'].shape == (4, SPEC.embed_dim)


@pytest.mark.parametrize(('head', 'class_tokens'), [('linear', False), ('text', True)])
def test_the_probe_reads_frames_in_order_and_says_where_it_looks(
    params, texts, batch, head, class_tokens
):
    model = attentive_probe.build(
        BACKBONE, **CLIP, head=head, num_heads=4, class_tokens=class_tokens
    )
    tree = {'visual': params['visual']} | (texts if head == 'text' else {})
    trained_part = fresh(model, tree, batch)
    groups = grouped(model, trained_part)
    assert groups['layer/attn/k/kernel'].weight_decay == 1
    undecayed = ('cls_token', 'layer/temporal/positions', 'head_norm/scale', 'layer/attn/k/bias')
    assert not any(groups[name].weight_decay for name in undecayed)

    @jax.jit
    def run(trained_part):
        inputs = model.inputs(tree, batch)
        turned = {**inputs, 'outputs': inputs['outputs'][:, ::-1]}
        variables = {'params': trained_part}
        outputs, other = (model.net.apply(variables, x) for x in (inputs, turned))
        return outputs, other['logits'][0], model.attention(variables, inputs)

    outputs, turned, maps = run(trained_part)
    logits = outputs['logits'][0]
    assert logits.shape == (4, CLASSES)
    assert outputs['embedding'].shape == (4, SPEC.width if head == 'linear' else SPEC.embed_dim)
    assert maps.shape == (4, FRAMES, 2, 2) and (maps >= 0).all()
    shares = maps.sum((1, 2, 3))
    np.testing.assert_allclose(shares < 0.99, class_tokens)
    assert (shares < 1.0001).all()
    assert np.abs(logits - turned).max() > 1e-3
    trained_part['layer']['temporal']['positions'] *= 0
    outputs, turned, _ = run(trained_part)  # a set of frames
    np.testing.assert_allclose(turned, outputs['logits'][0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('head', ['linear', 'text'])
def test_the_whole_tower_is_trained_from_where_the_backbone_is(
    params, texts, batch, frozen_outputs, head
):
    model = fine_tune.build(BACKBONE, **CLIP, head=head, pretrained_lr=0.1, remat=True)
    tree = texts if head == 'text' else {}
    if head == 'text':
        assert model.frozen.abstract((CLASSES,)).keys() == texts.keys()
    else:
        assert model.frozen is None
    start = starting(model, tree, batch, params)
    assert start.keys() == ({'visual', 'head'} if head == 'linear' else {'visual'})

    def loss(params):
        outputs = model.net.apply({'params': params}, model.inputs(tree, batch), train=True)
        return jnp.square(outputs['logits'][0]).sum(), outputs

    grads, outputs = jax.jit(jax.grad(loss, has_aux=True))(start)
    assert outputs['logits'][0].shape == (4, CLASSES)
    if head == 'text':
        np.testing.assert_allclose(
            outputs['embedding'], frozen_outputs['embedding'], rtol=1e-4, atol=1e-5
        )
    assert all(np.any(leaf) for leaf in jax.tree.leaves(grads))
    groups = grouped(model, start)
    assert groups['visual/blocks/mlp/c_fc/kernel'].learning_rate == 0.1
    assert groups['visual/blocks/ln_1/scale'].weight_decay == 0
    if head == 'linear':
        assert groups['head/column_0/classifier/kernel'].learning_rate == 1


def test_sentences_find_videos_as_with_the_backbone(params, batch, frozen_outputs):
    model = fine_tune.build(BACKBONE, num_frames=FRAMES, dtype=jnp.float32, head='words')
    start = starting(model, {}, batch, params)
    assert start.keys() == params.keys() and model.frozen is None
    task = Retrieve(interaction='meanP')
    targets = {'word_mask': np.ones((4, 6), np.float32), 'video': np.arange(4)}

    def loss(params):
        outputs = model.net.apply({'params': params}, model.inputs({}, batch), train=True)
        task.check(outputs)
        return task.loss(outputs, targets, jnp.ones(4)).mean(), outputs

    grads, outputs = jax.jit(jax.grad(loss, has_aux=True))(start)
    np.testing.assert_allclose(
        outputs['frames'].mean(1), frozen_outputs['embedding'], rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(outputs['logit_scale'], np.log(50), rtol=1e-6)
    assert not outputs['frame_logits'].any() and not outputs['word_logits'].any()
    assert all(np.any(leaf) for leaf in jax.tree.leaves(grads))
    assert grouped(model, start)['logit_scale'].weight_decay == 0
    assert model.most == {'logit_scale': pytest.approx(np.log(100))}


def test_the_scale_of_logits_starts_where_it_is_told(batch):
    model = fine_tune.build(
        BACKBONE, num_frames=FRAMES, dtype=jnp.float32, head='words', initial_scale=1 / 0.07
    )
    assert model.from_backbone.keys() == {'visual', 'text'}
    scale = jax.jit(lambda: model.net.init(jax.random.key(0), batch)['params']['logit_scale'])()
    np.testing.assert_allclose(scale, np.log(1 / 0.07), rtol=1e-6)
    grouped(model, fresh(model, {}, batch))


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'head': 'word'}, r"model.head='word' is not one of"),
        ({'head': 'words', 'num_classes': (3,)}, "'words' is for task.name='retrieve'"),
        ({'head': 'linear'}, "'linear' and 'text' are for classes"),
        ({'head': 'words', 'initial_scale': 200.0}, r'model.initial_scale=200.0 is at most 100'),
        ({'num_classes': (3,), 'initial_scale': 10.0}, 'model.initial_scale=10.0'),
    ],
)
def test_options_that_do_not_fit_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        fine_tune.build(BACKBONE, num_frames=1, **options)


@pytest.fixture(scope='module', autouse=True)
def without_reports():
    """Other tests show those of training and evaluation."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ('write_report', 'write_evaluation'):
            patch.setattr(f'dist_jax.reports.page.{name}', lambda *_: None)
        yield


def pictures_config(data, **fields):
    config = fine_tune_config.get_config('pictures')
    config.backbone.name = 'tiny'
    config.data.update(root=str(data), train_list='train.jsonl', image_size=48)
    rate = {'optimizer.warmup_start_lr': 1e-3}  # of the only step
    config.update_from_flattened_dict({'num_steps': 1, 'batch_size': 8, **rate, **fields})
    return config


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """Both towers after a step on single frames of `data` in it."""
    folder = tmp_path_factory.mktemp('pictures')
    motion_captions.generate(folder / 'data', num_train=3, num_val=3, size=48, num_frames=8)
    train.train(pictures_config(folder / 'data', **{'log.tensorboard': False}), str(folder))
    return folder


def test_a_trained_clip_goes_out_and_is_a_backbone_again(run, tmp_path):
    file, again, same = (tmp_path / name for name in ('clip.safetensors', 'clip', 'same'))
    assert main.main(['convert', '--export', str(run), str(file)]) == 0
    assert main.main(['convert', str(file), str(again), '--kind', 'openai']) == 0
    assert backbones.stored(str(again)).spec == clip.SPECS['tiny']
    own = flatten(checkpoint.read_host_variables(checkpoint.find_checkpoint(run))['params'])
    found = flatten(converted.load_params(again, as_numpy=True))
    assert found.keys() == own.keys()
    for path, leaf in found.items():
        np.testing.assert_array_equal(leaf, own[path], err_msg=path)
    before = converted.load_params(run / 'backbone', ['visual/proj'], as_numpy=True)
    assert np.all(before['visual']['proj']['kernel'] != found['visual/proj/kernel'])
    convert.export(again, same)  # a converted CLIP goes out as it came in
    assert same.read_bytes() == file.read_bytes()

    # A network that is its backbone needs no run to be evaluated.
    fields = {'backbone.checkpoint': str(again), 'model.initial_scale': 0.0}
    config = pictures_config(run / 'data', **fields)
    whole = trained.load_trained(config, '', None, ())
    assert whole.step == -1
    for path, leaf in flatten(whole.variables['params']).items():
        np.testing.assert_array_equal(leaf, own[path], err_msg=path)
    config.model.initial_scale = 10.0
    with pytest.raises(ValueError, match=r'no trained model.*nothing says what params/logit_scale'):
        trained.load_trained(config, '', None, ())


def test_class_texts_are_judged_without_a_run_and_never_trained(clips, tmp_path, capsys):
    config = zero_shot_config.get_config('demo')
    config.data.update(root=str(clips), val_list='val.txt', label_map='labels.txt', num_frames=2)
    config.eval.batch_size = 10
    figures, _ = evaluate.run(config, '', None, str(tmp_path / 'found'))
    assert figures['num_videos'] == 10 and figures['step'] == -1
    assert json.loads((tmp_path / 'found' / 'evaluation.json').read_text()) == figures
    assert (tmp_path / 'found' / 'backbone').is_dir()
    command = ['train', '--config=configs/zero_shot.py:demo', f'--workdir={tmp_path / "run"}']
    assert main.main(command) != 0
    assert "model.family='zero_shot' has nothing to train" in capsys.readouterr().err
    assert not (tmp_path / 'run').exists()


# Trained parameters. CLIP B/32 has 151,277,313, both towers and the scale.
ROWS = {
    (zero_shot_config, 'b16_8f_k400'): 0,
    (zero_shot_config, 'demo'): 0,
    (zero_shot_config, 'world'): 0,
    (attentive_probe_config, 'b16_8f_k400'): 7_405_456,
    (attentive_probe_config, 'demo'): 51_336,
    (attentive_probe_config, 'world'): 51_856,
    (fine_tune_config, 'b16_8f_k400'): 86_397_840,
    (fine_tune_config, 'msrvtt_b32'): 151_277_313,
    (fine_tune_config, 'demo'): 69_576,
    (fine_tune_config, 'world'): 168_784,
    (fine_tune_config, 'pictures'): 3_435_585,
}


@pytest.mark.parametrize(('file', 'name'), ROWS, ids=[f'{f.__name__}-{n}' for f, n in ROWS])
def test_rows_pass_their_check_and_have_their_size(file, name):
    config = file.get_config(name)
    base.check(config)
    parts = compiling.assemble(config)
    variables = parts.abstract_variables()
    params = variables['params']
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == ROWS[file, name]
    optim.assign_groups(params, parts.model.param_groups)
    mesh = AbstractMesh((2, 4, 2), AXES)  # most of what is trained is split
    step.place_variables(parts.model, variables, mesh)
    if name != 'demo' and parts.model.frozen:
        parts.model.frozen.place(parts.abstract_frozen(), mesh)


def test_every_row_is_checked():
    files = {file for file, _ in ROWS}
    assert ROWS.keys() == {(file, name) for file in files for name in file.VARIANTS}
