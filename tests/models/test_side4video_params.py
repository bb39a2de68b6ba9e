"""Side4Video files of the authors: names, the backbone inside, there and back."""

import dataclasses
import logging
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from released import assert_same_tensors, save_released
from safetensors.numpy import load_file, save_file

from dist_jax import backbone_inside, checkpoint, convert, init_from, main, step
from dist_jax.backbones import stored as stored_backbone
from dist_jax.models import clip, converted, eva, parts, side4video, side4video_params
from dist_jax.models.backbone import Backbone
from dist_jax.models.clip_params import openai_rows
from dist_jax.models.eva_params import baai_rows
from dist_jax.models.layers import resize_positions
from dist_jax.models.naming import Options, abstract_network
from dist_jax.models.params import export_tree, flatten
from dist_jax.models.source_files import open_source
from dist_jax.sharding import make_mesh
from dist_jax.step import TrainState
from tools.parity.golden import read_golden

GOLDEN = Path(__file__).parent.parent / 'golden'
CLIP = clip.ClipSpec(16, 8, 64, 2, 1, 8, 64, 1, 1, vocab_size=4, context_length=3)
ROPE = eva.EvaSpec(16, 8, 64, 5, 1, 8, 40, 64, 1, 1, vocab_size=4, context_length=3)
BIG_E = dataclasses.replace(ROPE, post_norm=True, sub_ln=False, swiglu=False, rope=False)
KINDS = {'clip': (clip.KIND, CLIP), 'eva': (eva.KIND, BIG_E), 'rope': (eva.KIND, ROPE)}
SIZES = {'side_dim': 64, 'width': 64, 'patch_size': 8, 'grid': 2, 'mlp_ratio': 2.0}
RESULTS = {'num_classes': 5, 'depth': 2}


def family(form):
    return 'clip' if form == 'clip' else 'eva'


def random_like(abstract, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), abstract)


def write_backbone(path, form, params=None, dtype=np.float32, **changes):
    """A converted backbone; its values are those of float16."""
    kind, spec = KINDS[form]
    spec = dataclasses.replace(spec, **changes)
    if params is None:
        params = random_like(Backbone(kind, spec).abstract_params())
        if form != 'clip':
            params['visual']['blocks']['attn']['qkv']['bias'][:, 1] = 0  # of the keys
        params = jax.tree.map(lambda x: x.astype(np.float16).astype(dtype), params)
    metadata = dict.fromkeys(converted.REQUIRED, '') | {
        'family': family(form),
        'name': f'{form}-random',
        'spec': dataclasses.asdict(spec),
    }
    converted.save_converted(path, params, metadata)
    return path


@pytest.fixture(scope='module')
def backbones(tmp_path_factory):
    folder = tmp_path_factory.mktemp('backbones')
    return {form: write_backbone(folder / form, form) for form in KINDS}


@pytest.fixture(scope='module')
def networks():
    """{form: (sizes, tensors under the authors' names)} of a network with random values."""
    found = {}
    for post_norm in (False, True):
        sizes = {**SIZES, **RESULTS, 'post_norm': post_norm}
        tree = random_like(side4video_params.abstract_variables(sizes))
        found[post_norm] = sizes, export_tree(tree, side4video_params.side4video_rows(sizes))
    return {form: found[form != 'clip'] for form in KINDS}


@pytest.fixture(scope='module')
def towers(backbones):
    """{form: image tower in float16 under the authors' names, as their files hold it}."""
    found = {}
    for form, path in backbones.items():
        rows = (openai_rows if form == 'clip' else baai_rows)(KINDS[form][1])
        tensors = export_tree(converted.load_params(path, as_numpy=True), rows)
        found[form] = {
            name: value.astype(np.float16)
            for name, value in tensors.items()
            if name.startswith('visual.') and name not in ('visual.proj', 'visual.ln_post.weight')
        }
        found[form].pop('visual.ln_post.bias', None)
    return found


def _main(*args):
    return main.main(['convert', *map(str, args)])


def of_training(network):
    """What the training script of the authors writes around a state dict."""
    first = next(iter(network.values()))
    optimizer = {'state': {0: {'step': 3, 'exp_avg': first}}, 'param_groups': [{'lr': 0.1}]}
    return {'epoch': 2, 'model_state_dict': network, 'optimizer_state_dict': optimizer}


@pytest.mark.parametrize('form', KINDS)
def test_a_released_file_goes_there_and_back(form, networks, towers, backbones, tmp_path, capsys):
    sizes, tensors = networks[form]
    whole = tensors | towers[form]
    source, _ = save_released(tmp_path / 'in.pt', whole, of_training)
    dest, out = tmp_path / 'net', tmp_path / 'out.safetensors'
    assert _main(source, dest, '--backbone', backbones[form]) == 0
    printed = ' '.join(capsys.readouterr().out.split())
    assert 'rounded to float16 it is the same as' in printed and 'warning' not in printed

    metadata = converted.load_metadata(dest)
    name = f'side4video_{family(form)}_p8_64x2'
    assert (metadata['family'], metadata['name']) == ('side4video', name)
    assert metadata['collections'] == ['batch_stats']
    assert metadata['spec'] == sizes | {'tap_every': 1 if form == 'clip' else 2}
    found = metadata['backbone']
    assert found['family'] == family(form) and found['compared']['differing'] == []
    assert found['geometry'].items() >= {'width': 64, 'patch_size': 8, 'image_size': 16}.items()
    assert found['dtypes'] == dict.fromkeys(towers[form], 'float16')
    stored = flatten(converted.stored_shapes(dest))
    assert stored['batch_stats/stem_bn/var'].shape == (64,)

    assert _main('--export', dest, out) == 0
    assert_same_tensors(load_file(out), tensors)
    words = ('--with_backbone', '--backbone', backbones[form], '--overwrite')
    assert _main('--export', dest, out, *words) == 0
    assert_same_tensors(load_file(out), whole)
    assert _main('--export', dest, out, '--with_backbone', '--overwrite') == 2
    assert 'pass --backbone with a converted one' in capsys.readouterr().err
    assert _main('--export', dest, out, '--backbone', backbones[form], '--overwrite') == 2
    assert _main(source, dest, '--with_backbone', '--overwrite') == 2


def test_a_file_without_a_backbone(networks, backbones, tmp_path, capsys):
    sizes, tensors = networks['eva']
    save_file(tensors, tmp_path / 'in.safetensors')
    dest = tmp_path / 'net'
    assert _main(tmp_path / 'in.safetensors', dest) == 0
    metadata = converted.load_metadata(dest)
    assert metadata['backbone'] is None and metadata['spec'] == sizes | {'tap_every': None}
    words = ('--backbone', backbones['eva'])
    assert _main(tmp_path / 'in.safetensors', tmp_path / 'other', *words) == 2
    assert 'there is none in it' in capsys.readouterr().err
    # It still can be written with one: as the released files hold it.
    out = tmp_path / 'out.safetensors'
    assert _main('--export', dest, out, '--with_backbone', *words) == 0
    names = load_file(out).keys() - tensors.keys()
    assert 'visual.head.weight' in names and not any('text' in name for name in names)


def test_a_backbone_that_does_not_fit_is_not_written(networks, backbones, tmp_path, capsys):
    save_file(networks['clip'][1], tmp_path / 'in.safetensors')
    assert _main(tmp_path / 'in.safetensors', tmp_path / 'net', '--num_heads', 0) == 2
    assert '--num_heads cannot be set for side4video' in capsys.readouterr().err
    assert _main(tmp_path / 'in.safetensors', tmp_path / 'net') == 0
    for name, path, message in (
        ('kind', backbones['eva'], 'names that files of this network do not have'),
        (
            'deeper',
            write_backbone(tmp_path / 'deeper', 'clip', depth=3),
            'inside has 3 blocks of width 64',
        ),
        (
            'larger',
            write_backbone(tmp_path / 'larger', 'clip', image_size=24),
            'images of 24 pixels',
        ),
    ):
        out = tmp_path / f'{name}.safetensors'
        words = ('--with_backbone', '--backbone', path)
        assert _main('--export', tmp_path / 'net', out, *words) == 2
        error = capsys.readouterr().err
        assert f'{tmp_path / "net"} does not fit {path}' in error and message in error
        assert not out.exists()


@pytest.mark.parametrize('form', ['clip', 'eva'])
def test_what_files_may_hold_besides(form, networks, backbones, tmp_path, monkeypatch):
    """A text tower, what is behind the last block, buffers: all back but the buffers."""
    monkeypatch.setattr(parts, 'PART_BYTES', 1000)  # every stack layer by layer
    rows = (openai_rows if form == 'clip' else baai_rows)(KINDS[form][1])
    tower = export_tree(converted.load_params(backbones[form], as_numpy=True), rows)
    buffers = {'visual.rope.freqs_cos': np.zeros((2, 2), 'f'), 'input_resolution': np.array(16)}
    whole = networks[form][1] | tower
    save_file(whole | buffers, tmp_path / 'in.safetensors')
    words = ('--backbone', backbones[form])
    assert _main(tmp_path / 'in.safetensors', tmp_path / 'net', *words) == 0
    out = tmp_path / 'out.safetensors'
    assert _main('--export', tmp_path / 'net', out, '--with_backbone', *words) == 0
    assert_same_tensors(load_file(out), whole)


def test_a_backbone_is_compared_as_float16(networks, towers, backbones, tmp_path, capsys):
    tensors = networks['clip'][1] | towers['clip']
    changed = 'visual.transformer.resblocks.1.mlp.c_fc.weight'
    tensors[changed] = tensors[changed].copy()
    tensors[changed][3, 4] += np.float16(0.01)
    save_file(tensors, tmp_path / 'in.safetensors')
    source, dest = tmp_path / 'in.safetensors', tmp_path / 'net'
    assert _main(source, dest) == 0
    printed = ' '.join(capsys.readouterr().out.split())
    assert 'not compared; --backbone DIR tells' in printed and 'warning' not in printed
    assert converted.load_metadata(dest)['backbone']['compared'] is None
    assert _main(source, dest, '--backbone', backbones['clip'], '--overwrite') == 0
    printed = ' '.join(capsys.readouterr().out.split())
    assert '1 tensors differ from' in printed and 'trained on another backbone' in printed
    assert converted.load_metadata(dest)['backbone']['compared']['differing'] == [changed]

    # Digits that float16 has not make no difference, nor what bfloat16 has lost.
    exact = converted.load_params(backbones['clip'], as_numpy=True)
    finer = jax.tree.map(lambda x: x * np.float32(1 + 1e-5), exact)
    write_backbone(tmp_path / 'finer', 'clip', finer)
    coarse = jax.tree.map(lambda x: x.astype(jnp.bfloat16), exact)
    write_backbone(tmp_path / 'coarse', 'clip', coarse)
    plan, _ = convert.read_params(open_source(source), 'side4video', Options())
    naming = convert.KINDS['side4video']
    for name in ('finer', 'coarse'):
        other = stored_backbone(str(tmp_path / name))
        found = backbone_inside.compare(naming, plan, backbone_inside.describe(naming, plan), other)
        assert found['differing'] == [changed]


def test_a_backbone_of_another_geometry_names_both(networks, towers, backbones, tmp_path, capsys):
    save_file(networks['clip'][1] | towers['clip'], tmp_path / 'in.safetensors')
    save_file(networks['rope'][1] | towers['rope'], tmp_path / 'rope.safetensors')
    deeper = write_backbone(tmp_path / 'deeper', 'clip', depth=3)
    wider = write_backbone(tmp_path / 'wider', 'clip', mlp_ratio=2.0)
    for source, path, words in (
        ('in', deeper, ('depth=2, 29 tensors', 'clip-random (clip,', 'depth=3)')),
        ('in', wider, ('c_fc.weight: (256, 64) inside, (128, 64) there',)),
        ('in', backbones['eva'], ('clip, image_size=16', 'eva-random (eva,')),
        ('rope', backbones['eva'], ('sub_ln=True, ', 'sub_ln=False')),
    ):
        source = tmp_path / f'{source}.safetensors'
        assert _main(source, tmp_path / 'net', '--backbone', path) == 2
        message = capsys.readouterr().err
        assert 'the backbone inside is ' in message and str(path) in message
        for word in words:
            assert word in message
    assert not (tmp_path / 'net').exists()


@pytest.mark.parametrize(
    ('form', 'name', 'shape', 'message'),
    [
        ('clip', 'visual.side_post_bn.running_mean', None, 'batch_stats/post_bn/mean'),
        ('eva', 'visual.side_blocks.1.attn.k_proj.bias', None, 'layers/attn/qkv/bias[1,1]'),
        ('eva', 'visual.side_post_bn.weight', (64,), 'nothing uses (1)'),
        ('clip', 'visual.transformer.resblocks.0.adapter.weight', (2,), 'nothing uses (1)'),
        ('clip', 'visual.transformer.side_transformer.0.ln_1.bias', (63,), '(63,), but layers/ln'),
        ('clip', 'fc.weight', None, 'fc.weight is missing; this is no complete Side4Video'),
        ('clip', 'visual.conv1.weight', None, 'visual.conv1.weight is missing'),
        ('clip', 'visual.transformer.resblocks.2.ln_1.bias', (64,), 'inside has 3 blocks'),
        ('clip', 'visual.transformer.side_spatial_position_embeddings', (3, 64), 'is no square'),
        (
            'clip',
            'visual.transformer.side_spatial_position_embeddings',
            (9, 64),
            'for images of 24 pixels in patches of 8, but the backbone inside has 2 blocks of '
            'width 64, for images of 16 pixels in patches of 8',
        ),
    ],
)
def test_tensors_that_are_not_right_are_named(
    form, name, shape, message, networks, towers, tmp_path, capsys
):
    tensors = networks[form][1] | towers[form]
    tensors.pop(name, None)
    if shape is not None:
        tensors[name] = np.zeros(shape, np.float32)
    save_file(tensors, tmp_path / 'in.safetensors')
    assert _main(tmp_path / 'in.safetensors', tmp_path / 'net') == 2
    error = capsys.readouterr().err
    assert message in error and 'Traceback' not in error


def test_files_are_told_from_each_other(networks, towers, backbones, tmp_path, capsys):
    for form, (_, tensors) in networks.items():
        save_file(tensors | towers[form], tmp_path / 'both.safetensors')
        assert convert.detect(open_source(tmp_path / 'both.safetensors')) == 'side4video'
        save_file(towers[form], tmp_path / 'alone.safetensors')
        kind = 'openclip' if form == 'clip' else 'eva'
        assert convert.detect(open_source(tmp_path / 'alone.safetensors')) == kind
        assert _main(tmp_path / 'alone.safetensors', tmp_path / 'x', '--kind', 'side4video') == 2
        assert 'visual.side_conv1.weight is missing' in capsys.readouterr().err


@pytest.mark.parametrize('golden', ['side4video_small', 'side4video_eva_rope_small'])
def test_recorded_names_are_those_that_are_written(golden):
    recorded = read_golden(GOLDEN / f'{golden}.safetensors')
    config = recorded.config
    frozen = recorded.section('backbone')
    form = 'rope' if config['arch'] == 'eva' else 'clip'
    spec = dataclasses.replace(KINDS[form][1], depth=config['layers'])
    rows = backbone_inside.released_rows(side4video_params.INSIDE[family(form)], spec)
    assert {row.source_name for row in rows} == frozen.keys()
    tensors = recorded.section('params') | recorded.section('buffers')
    hparams = side4video_params.infer_hparams(tensors)
    rows = side4video_params.side4video_rows(hparams)
    assert {row.source_name for row in rows} == tensors.keys()
    every = side4video_params.tap_every(tensors | frozen, hparams)
    assert every == config['layers'] // hparams['depth']


@pytest.fixture(scope='module')
def run(networks, backbones, tmp_path_factory):
    """A run beside the CLIP, at twice its image size."""
    folder = tmp_path_factory.mktemp('run') / 'run'
    tree = random_like(side4video_params.abstract_variables({**networks['clip'][0], 'grid': 4}))
    statistics = {'batch_stats': tree.pop('batch_stats')}
    state = TrainState(
        step=jnp.int32(2), params=tree, opt_state=(), ema=None, collections=statistics
    )
    stored = converted.load_metadata(backbones['clip'])
    model = {'family': 'side4video', 'head': 'linear', 'side_dim': 64}
    saved = {
        'format_version': checkpoint.FORMAT_VERSION,
        'config': {
            'model': model | {'tap_every': 1, 'post_norm': False},
            'optimizer': {'ema_decay': 0.0},
        },
        'backbone': {
            'name': stored['name'],
            'path': str(backbones['clip']),
            'params_sha256': stored['params_sha256'],
            'spec': stored['spec'] | {'image_size': 32},
        },
        'class_names': [[f'class {k}' for k in range(5)]],
    }
    checkpoints = checkpoint.Checkpoints(folder)
    checkpoints.save(state, saved)
    checkpoints.close()
    return folder


def test_a_run_is_written_with_its_backbone(run, networks, towers, tmp_path, capsys):
    out = tmp_path / 'out.safetensors'
    assert _main('--export', run, out, '--with_backbone') == 0
    written = load_file(out)
    assert written.keys() == (networks['clip'][1] | towers['clip']).keys()
    assert {value.dtype.name for value in written.values()} == {'float32'}
    assert written['visual.positional_embedding'].shape == (17, 64)  # as the run saw it
    kernel = 'visual.transformer.resblocks.1.attn.in_proj_weight'
    np.testing.assert_array_equal(written[kernel], towers['clip'][kernel])
    other = write_backbone(tmp_path / 'other', 'clip', dtype=np.float16)
    words = ('--with_backbone', '--backbone', other, '--overwrite')
    assert _main('--export', run, out, *words) == 2
    assert 'was trained on' in capsys.readouterr().err
    assert _main(out, tmp_path / 'net') == 0
    assert converted.load_metadata(tmp_path / 'net')['backbone']['geometry']['image_size'] == 32


# Starting from one.


def loaded(path, names, spec=CLIP, origin=None, **options):
    """What a run for these classes starts with, and what it would have drawn."""
    options = {'side_dim': 64, 'mlp_ratio': 2.0} | options
    model = side4video.build(
        Backbone(clip.KIND, spec),
        num_classes=(len(names),),
        num_frames=2,
        dtype=jnp.float32,
        **options,
    )
    size = spec.image_size
    abstract = converted.variables(
        abstract_network(model, (1, 2, size, size, 3), (len(names),)),
        {converted.COLLECTIONS: side4video_params.COLLECTIONS},
    )
    placed = step.place_variables(model, abstract, make_mesh())
    drawn = jax.tree.map(
        lambda leaf, like: jax.device_put(leaf, like.sharding), random_like(abstract, 1), placed
    )
    origin = init_from.Origin(str(path), **(origin or {}))
    return init_from.load_variables(origin, model, drawn, (tuple(names),)), drawn


def own(variables):
    """All but the classifier and the table of positions."""
    leaves = flatten(variables)
    keep = {k: v for k, v in leaves.items() if 'head/' not in k and 'positional' not in k}
    assert any(k.startswith('batch_stats/') for k in keep)
    return keep


def test_classes_and_statistics_come_from_a_run(run, caplog):
    """As from Kinetics-710 to one of its sets, at another image size."""
    names = ['class 4', 'class 1', 'class 3']
    with caplog.at_level(logging.INFO, 'dist_jax'):
        found, _ = loaded(run, names)
    assert '3 of 3 classes taken' in caplog.text
    stored = checkpoint.read_host_variables(checkpoint.find_checkpoint(run))
    jax.tree.map(np.testing.assert_array_equal, own(found), own(stored))
    one, other = (tree['params']['head']['column_0']['classifier'] for tree in (found, stored))
    for part in ('kernel', 'bias'):
        np.testing.assert_array_equal(one[part], other[part][..., [4, 1, 3]])
    table = stored['params']['positional_embedding']
    want = resize_positions(np.pad(table, [(1, 0), (0, 0)]), (2, 2))[1:]
    np.testing.assert_allclose(found['params']['positional_embedding'], want, atol=1e-6)


def test_a_released_file_starts_another_data_set(networks, tmp_path):
    save_file(networks['clip'][1], tmp_path / 'in.safetensors')
    path, names = tmp_path / 'net', [f'class {k}' for k in range(5)]
    convert.convert(tmp_path / 'in.safetensors', path)
    stored = converted.load_params(path, as_numpy=True)
    stored = converted.variables(stored, converted.load_metadata(path))
    found, _ = loaded(path, names)  # as `evaluate` reads it
    jax.tree.map(np.testing.assert_array_equal, found, stored)
    (tmp_path / 'names.txt').write_text('\n'.join(names))
    origin = {'label_map': str(tmp_path / 'names.txt'), 'missing': 'fresh'}
    found, drawn = loaded(path, ['class 3', 'opening', 'closing'], origin=origin)
    jax.tree.map(np.testing.assert_array_equal, own(found), own(stored))
    bias, before, fresh = (
        tree['params']['head']['column_0']['classifier']['bias'] for tree in (found, stored, drawn)
    )
    np.testing.assert_array_equal(bias, [before[3], *fresh[1:]])


@pytest.mark.parametrize(
    ('options', 'lines'),
    [
        ({'tap_every': 2}, ['params/layers/conv/dw/kernel: stored (2, 3, 64)']),
        (
            {'side_dim': 128},
            ['params/positional_embedding: stored (16, 64)', 'batch_stats/stem_bn/mean: stored'],
        ),
        (
            {'post_norm': True},
            ['params/post_bn/scale: the model has', 'batch_stats/post_bn/var: the'],
        ),
    ],
)
def test_another_network_is_listed_by_name(run, options, lines):
    with pytest.raises(ValueError, match='does not fit the model') as caught:
        loaded(run, [f'class {k}' for k in range(5)], **options)
    for line in lines:
        assert line in str(caught.value)
