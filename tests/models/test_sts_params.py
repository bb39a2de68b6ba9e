"""Files of the authors of STS, for images and for videos: sizes, there and back, runs."""

import functools
import json
import logging
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from released import assert_same_tensors, save_released
from safetensors.numpy import load_file, save_file

from dist_jax import checkpoint, convert, init_from, main, step
from dist_jax.configs import sts as configs
from dist_jax.models import converted, sts, sts_params
from dist_jax.models.naming import Options
from dist_jax.models.params import export_tree, flatten, outgoing
from dist_jax.models.source_files import SourceFiles, open_source
from dist_jax.sharding import make_mesh
from dist_jax.step import TrainState
from tools.parity.golden import read_golden

GOLDEN = Path(__file__).parent.parent / 'golden'
RECORDED = {
    'csn': {'width': 8, 'depths': (3, 4, 6, 3), 'stem_size': 7},
    'r2plus1d': {'width': 4, 'depths': (3, 4, 6, 3)},
    'slowonly': {'width': 8, 'depths': (3, 4, 6, 3)},
    'slowfast': {
        'width': 8,
        'depths': (3, 4, 6, 3),
        'fast_width': 4,
        'fusion_kernel': 5,
        'ratio': 8,
    },
    'x3d': {'width': 8, 'depths': (3, 5, 11, 7)},
}
SMALL = {'width': 4, 'depths': (1, 1, 1, 1)}


@functools.cache
def recorded(kind, form, variant=''):
    """The parameters and statistics of a recording, named as the files of the authors are."""
    golden = read_golden(GOLDEN / f'sts_{kind}.safetensors')
    found = {}
    for section in ('params', 'buffers'):
        parts = golden.section(section)
        found |= {name: x for name, x in parts.items() if not name.startswith(('8x8/', 'v3d/'))}
        found |= golden.section(f'{section}/{variant}') if variant else {}
    if form == 'video':
        return found
    body = {
        name.replace('backbone.', 'get_feature.'): value
        for name, value in found.items()
        if name.startswith('backbone.')
    }
    return body | golden.section('params/v3d')


@functools.cache
def small(kind, form='video', **options):
    """(tree as it is stored, tensors) of a network with random values; see `recorded`."""
    sizes = {'network': None, 'form': form, 'num_classes': 5, 'kind': kind}
    sizes['options'] = SMALL | options
    rng = np.random.default_rng(0)
    abstract = sts_params.abstract_variables(sizes)
    tree = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), abstract)
    return tree, export_tree(tree, sts_params.sts_rows(sizes))


def _main(*args):
    return main.main(['convert', *map(str, args)])


@pytest.mark.parametrize('form', sts.FORMS)
@pytest.mark.parametrize('kind', RECORDED)
def test_recorded_tensors_go_there_and_back(kind, form):
    tensors = recorded(kind, form)
    source = SourceFiles(Path('in'), (), tensors)
    assert convert.detect(source) == 'sts'
    plan, tree = convert.read_params(source, 'sts', Options())
    assert plan.spec == {
        'network': None,
        'form': form,
        'num_classes': 10,
        'kind': kind,
        'options': RECORDED[kind],
    }
    tree = jax.tree.map(lambda leaf: leaf.whole(), tree)
    assert_same_tensors(export_tree(tree, plan.rows), tensors)
    # The tree is the same whatever the file was trained on, but for what X3D has before its head.
    names = flatten(tree).keys()
    assert ('fc1/bias' in names) == (kind == 'x3d' and form == 'image')
    assert not any('num_batches' in name for name in names)


def test_a_released_file_goes_there_and_back(tmp_path, capsys):
    """As training scripts write it; and the classifier reads the pathways in the other order."""
    tensors = recorded('slowfast', 'image')

    def wrap(network):
        optimizer = {'state': {0: {'step': 3}}, 'param_groups': [{'lr': 0.1}]}
        return {'epoch': 2, 'arch': 'slowfast', 'state_dict': network, 'optimizer': optimizer}

    source, counted = save_released(tmp_path / 'in.pth', tensors, wrap)
    dest, out = tmp_path / 'net', tmp_path / 'out.safetensors'
    assert _main(source, dest) == 0
    assert 'warning' not in capsys.readouterr().out
    metadata = converted.load_metadata(dest)
    assert (metadata['family'], metadata['name']) == ('sts', 'sts_slowfast_8x16_image')
    assert metadata['collections'] == ['batch_stats']
    assert metadata['spec']['form'] == 'image'
    assert metadata['ignored'] == counted
    kernel = converted.load_params(dest, ['head'], as_numpy=True)['head']['column_0']['classifier']
    slow, fast = np.split(tensors['classifier.weight'].T, [256])
    np.testing.assert_array_equal(kernel['kernel'], np.concatenate([fast, slow]))
    assert _main('--export', dest, out) == 0
    assert_same_tensors(load_file(out), tensors)


def test_slowfast_of_8x8_is_told_by_its_kernels():
    tensors = recorded('slowfast', 'video', '8x8')
    options = sts_params.infer_sizes(tensors)['options']
    assert options == RECORDED['slowfast'] | {'fusion_kernel': 7, 'ratio': 4}


@pytest.mark.parametrize('name', ['csn_tiny', 'x3d_tiny', 'slowfast50_8x8'])
def test_networks_of_the_table_are_known_by_their_sizes(name):
    sizes = sts_params.run_sizes({'network': name, 'form': 'image'}, None)
    tree = sts_params.abstract_variables(sizes)
    tensors = {each.name: each for each in outgoing(tree, sts_params.sts_rows(sizes))}
    found = sts_params.infer_sizes(tensors)
    assert (found['network'], found['form'], found['num_classes']) == (name, 'image', 1)
    from_metadata = json.loads(json.dumps(found))
    assert sts_params.network(from_metadata) == sts.NETWORKS[name]


@pytest.mark.parametrize(
    ('kind', 'form', 'name', 'shape', 'message'),
    [
        ('csn', 'video', 'backbone.conv1.conv.weight', None, 'conv1.conv.weight is missing; this'),
        ('csn', 'video', 'backbone.layer2.0.conv2.0.bn.running_var', None, '0/conv2/bn/var'),
        ('csn', 'video', 'backbone.layer2.0.conv2.bn.weight', (16,), 'nothing uses (1)'),
        ('csn', 'video', 'classifier.weight', (5, 128), 'classifier.weight (5, 128)'),
        ('csn', 'image', 'get_feature.layer6.0.conv1.bn.bias', (4,), 'layer6: more stages than 4'),
        ('csn', 'image', 'get_feature.layer1.2.conv1.bn.bias', (4,), 'layer1_2/conv1/bn/scale'),
        ('csn', 'image', 'classifier.weight', None, 'classifier.weight is missing; this is no'),
        ('csn', 'image', 'classifier.weight', (5, 64, 1), 'shape (5, 64, 1), expected 2 axes'),
        ('x3d', 'image', 'fc1.bias', None, 'fc1/bias (2048,) (from fc1.bias)'),
        ('x3d', 'video', 'cls_head.fc2.weight', None, 'cls_head.fc2.weight is missing'),
        ('x3d', 'video', 'backbone.conv1_s.conv.weight', None, 'conv1_s.conv.weight is missing'),
        (
            'x3d',
            'video',
            'backbone.layer1.0.se_module.fc1.weight',
            (8, 9, 3, 1, 1),
            "by 'o i 1 1 1 -> i o', but layer1_0/se_module/fc1/kernel needs (9, 8)",
        ),
        ('slowfast', 'image', 'get_feature.slow_path.conv1_lateral.conv.weight', None, 'missing'),
        (
            'slowfast',
            'image',
            'get_feature.slow_path.conv1_lateral.conv.weight',
            (4, 2, 3, 1, 1),
            'sees 3 frames, but only networks of 5 or 7 there are known',
        ),
        (
            'slowfast',
            'image',
            'get_feature.slow_path.layer2_lateral.conv.weight',
            (64, 32, 7, 1, 1),
            'slow_path/layer2_lateral/conv/kernel needs (5, 1, 1, 16, 32)',
        ),
    ],
)
def test_tensors_that_are_not_right_are_named(kind, form, name, shape, message, tmp_path, capsys):
    options = {'fast_width': 2, 'fusion_kernel': 5, 'ratio': 8} if kind == 'slowfast' else {}
    tensors = dict(small(kind, form, **options)[1])
    tensors.pop(name, None)
    if shape is not None:
        tensors[name] = np.zeros(shape, np.float32)
    save_file(tensors, tmp_path / 'in.safetensors')
    assert _main(tmp_path / 'in.safetensors', tmp_path / 'net') == 2
    error = capsys.readouterr().err
    assert message in error and 'Traceback' not in error
    assert not (tmp_path / 'net').exists()


def test_a_lost_stage_and_other_flags_are_named(tmp_path, capsys):
    tensors = small('csn')[1]
    rest = {name: value for name, value in tensors.items() if '.layer3.' not in name}
    save_file(rest, tmp_path / 'in.safetensors')
    assert _main(tmp_path / 'in.safetensors', tmp_path / 'net') == 2
    assert 'backbone.layer3.0 is missing' in capsys.readouterr().err
    assert _main(tmp_path / 'in.safetensors', tmp_path / 'net', '--num_heads', 2) == 2
    assert '--num_heads cannot be set for sts' in capsys.readouterr().err
    flat = tensors | {'backbone.conv1.conv.weight': np.zeros((4, 3, 7, 7), np.float32)}
    save_file(flat, tmp_path / 'flat.safetensors')  # a network over pictures with the same names
    assert _main(tmp_path / 'flat.safetensors', tmp_path / 'net') == 2
    assert 'shape (4, 3, 7, 7), expected 5 axes' in capsys.readouterr().err


def test_names_alone_make_no_deep_network():
    tensors = small('csn')[1]
    blocks = {f'backbone.layer{1 + i % 4}.{i // 4}.x': np.zeros(1) for i in range(400)}
    with pytest.raises(ValueError, match=r'backbone\.layer: 400 blocks, more than 200'):
        sts_params.infer_sizes(tensors | blocks)
    stem = {'backbone.conv1.conv.conv_t.weight': np.zeros((1, 3, 3, 1, 1))}
    with pytest.raises(ValueError, match='of one channel, no shortcut'):
        sts_params.infer_sizes(small('r2plus1d')[1] | stem)


# Runs, and starting from what was converted.


def write_run(folder, network, form):
    """A run of one step with random values; its variables."""
    sizes = sts_params.run_sizes({'network': network, 'form': form}, None) | {'num_classes': 5}
    rng = np.random.default_rng(1)
    tree = jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape).astype(np.float32),
        sts_params.abstract_variables(sizes),
    )
    params = {name: part for name, part in tree.items() if name != 'batch_stats'}
    state = TrainState(
        step=jnp.int32(1),
        params=params,
        opt_state=(),
        ema=None,
        collections={'batch_stats': tree['batch_stats']},
    )
    metadata = {
        'format_version': checkpoint.FORMAT_VERSION,
        'config': {
            'model': {'family': 'sts', 'network': network, 'form': form},
            'optimizer': {'ema_decay': 0.0},
        },
        'backbone': None,
        'class_names': [[f'class {k}' for k in range(5)]],
    }
    checkpoints = checkpoint.Checkpoints(folder)
    checkpoints.save(state, metadata)
    checkpoints.close()
    return tree


@pytest.mark.parametrize(('network', 'form'), [('csn_tiny', 'video'), ('x3d_tiny', 'image')])
def test_a_run_goes_out_under_the_names_of_its_form(network, form, tmp_path):
    tree = write_run(tmp_path / 'run', network, form)
    out = tmp_path / 'out.safetensors'
    assert _main('--export', tmp_path / 'run', out) == 0
    assert open_source(out).tensors.keys() >= (
        {'backbone.layer1.0.conv2.0.conv.weight', 'cls_head.fc_cls.bias'}
        if form == 'video'
        else {'get_feature.layer1.0.se_module.fc1.bias', 'fc1.bias', 'classifier.bias'}
    )
    assert _main(out, tmp_path / 'net') == 0
    metadata = converted.load_metadata(tmp_path / 'net')
    assert (metadata['name'], metadata['spec']['network']) == (f'sts_{network}_{form}', network)
    found = converted.load_params(tmp_path / 'net', as_numpy=True)
    jax.tree.map(np.testing.assert_array_equal, found, tree)


def loaded(path, network, **origin):
    """What a run on videos of three classes starts with, and what it would have drawn."""
    model = sts.build(num_classes=(3,), num_frames=8, network=network, dtype=jnp.float32)
    sizes = sts_params.run_sizes({'network': network, 'form': 'video'}, None) | {'num_classes': 3}
    abstract = converted.variables(
        sts_params.abstract_variables(sizes), {converted.COLLECTIONS: sts_params.COLLECTIONS}
    )
    rng = np.random.default_rng(2)
    drawn = jax.tree.map(
        lambda leaf: jax.device_put(rng.normal(size=leaf.shape).astype('f'), leaf.sharding),
        step.place_variables(model, abstract, make_mesh()),
    )
    labels = (tuple(f'class {k}' for k in range(3)),)
    return init_from.load_variables(
        init_from.Origin(str(path), **origin), model, drawn, labels
    ), drawn


@pytest.mark.parametrize('kind', ['slowfast', 'x3d'])
def test_a_network_of_pictures_starts_one_of_videos(kind, tmp_path, monkeypatch, caplog):
    made = sts_params.KINDS[kind].make(**RECORDED[kind])
    monkeypatch.setitem(sts.NETWORKS, 'recorded', made)
    save_file(recorded(kind, 'image'), tmp_path / 'in.safetensors')
    path = tmp_path / 'net'
    metadata = convert.convert(tmp_path / 'in.safetensors', path)
    assert metadata['spec']['network'] == 'recorded'
    stored = flatten(converted.variables(converted.load_params(path, as_numpy=True), metadata))
    with caplog.at_level(logging.INFO, 'dist_jax'):
        found, drawn = loaded(path, 'recorded', missing=configs.recipe()['init_missing'])
    found, drawn = flatten(found), flatten(drawn)
    assert found.keys() == stored.keys() - {'params/fc1/bias'}
    assert ('params/fc1/kernel' in found) == (kind == 'x3d')
    for name, leaf in found.items():
        np.testing.assert_array_equal(leaf, (drawn if '/head/' in name else stored)[name])
    assert ('params/fc1/bias' in caplog.text) == (kind == 'x3d')


def test_another_network_is_listed_by_name(tmp_path):
    save_file(small('csn')[1], tmp_path / 'in.safetensors')
    convert.convert(tmp_path / 'in.safetensors', tmp_path / 'net')
    with pytest.raises(ValueError, match='net does not fit the model') as caught:
        loaded(tmp_path / 'net', 'x3d_tiny', missing=configs.recipe()['init_missing'])
    for line in (
        'params/conv1/conv/kernel: the model has no such parameter',
        'params/conv1_s/conv/kernel: not in the checkpoint',
        'batch_stats/layer1_0/conv2/bn/var: stored (4,), the model needs (18,)',
    ):
        assert line in caught.value.args[0]
