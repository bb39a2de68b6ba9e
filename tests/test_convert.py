"""The converter as a command: containers in, orbax out, DiST back; nothing half-written."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from released import assert_same_tensors
from safetensors.numpy import load_file, save_file

from dist_jax import checkpoint, convert, convert_arguments, experiment, main
from dist_jax.configs import dist
from dist_jax.models import clip, clip_params, converted, digests
from dist_jax.models.backbone import Backbone
from dist_jax.models.naming import Export, Naming, Plan
from dist_jax.models.params import Row, flatten, tree_sha256
from dist_jax.step import TrainState

GOLDEN = Path(__file__).parent / 'golden'
OPENAI = GOLDEN / 'clip' / 'openai' / 'tiny.pt'
GELU = GOLDEN / 'clip' / 'openclip_gelu' / 'open_clip_model.safetensors'


def _main(*args) -> int:
    return main.main(['convert', *map(str, args)])


def backbone_of(metadata) -> Backbone:
    return Backbone(clip.KIND, clip.ClipSpec(**metadata['spec']))


@pytest.fixture(scope='module')
def openai(tmp_path_factory):
    """One converted CLIP for the tests that only read."""
    dest = tmp_path_factory.mktemp('openai') / 'clip'
    convert.convert(OPENAI, dest)
    return dest


@pytest.mark.parametrize(
    ('source', 'flags', 'activation', 'kind'),
    [
        (GOLDEN / 'clip' / 'hf', (), 'quick_gelu', 'huggingface'),
        (OPENAI, (), 'quick_gelu', 'openai'),
        (GELU, ('--activation', 'gelu'), 'gelu', 'openclip'),
        (
            GOLDEN / 'clip' / 'openclip_pt' / 'epoch_1.pt',
            ('--activation', 'gelu', '--num_heads', 2, '--text_num_heads', 1),
            'gelu',
            'openclip',
        ),
    ],
)
def test_container_becomes_a_checkpoint_with_its_facts(
    tmp_path, capsys, source, flags, activation, kind
):
    dest = tmp_path / 'clip'
    assert _main(source, dest, *flags, '--name', 'mine') == 0
    metadata = converted.load_metadata(dest)
    assert metadata['spec']['activation'] == activation
    assert (metadata['family'], metadata['kind'], metadata['name']) == ('clip', kind, 'mine')
    assert metadata['precision'] == 'float32'
    if source.is_file():
        digest = hashlib.sha256(source.read_bytes()).hexdigest()
        assert metadata['source_sha256'] == metadata['sources'][0]['sha256'] == digest
    else:
        assert len(metadata['sources']) == 3
    params = converted.load_params(dest)
    assert metadata['params_sha256'] == tree_sha256(params)
    wanted = backbone_of(metadata).abstract_params()
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, wanted)
    printed = capsys.readouterr().out
    for word in ('visual/blocks', 'total', activation, metadata['source_sha256'][:12], 'sha256'):
        assert word in printed
    assert [path.name for path in tmp_path.iterdir()] == ['clip']


def test_scalars_of_the_archive_are_listed_as_ignored(openai):
    metadata = converted.load_metadata(openai)
    assert metadata['ignored'] == ['context_length', 'input_resolution', 'vocab_size']


def test_bfloat16_halves_what_may_be_halved(tmp_path):
    dest = tmp_path / 'clip'
    assert _main(OPENAI, dest, '--precision', 'bfloat16') == 0
    dtypes = {path: leaf.dtype for path, leaf in flatten(converted.stored_shapes(dest)).items()}
    assert dtypes['visual/blocks/mlp/c_fc/kernel'] == dtypes['visual/class_embedding'] == 'bfloat16'
    assert dtypes['visual/ln_pre/bias'] == dtypes['logit_scale'] == 'float32'


def test_openclip_config_beside_the_file_is_enough(tmp_path):
    shutil.copy(GELU, tmp_path)
    config = {'model_cfg': {'embed_dim': 48, 'quick_gelu': True, 'vision_cfg': {}, 'text_cfg': {}}}
    (tmp_path / 'open_clip_config.json').write_text(json.dumps(config))
    assert _main(tmp_path, tmp_path / 'out') == 0
    assert converted.load_metadata(tmp_path / 'out')['spec']['activation'] == 'quick_gelu'
    assert _main(tmp_path, tmp_path / 'other', '--activation', 'gelu') == 2


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        ((GELU,), '--activation quick_gelu'),
        ((OPENAI, '--activation', 'gelu'), '--kind openclip'),
        ((GOLDEN / 'clip' / 'hf', '--num_heads', 2), 'config.json says it'),
        ((GOLDEN / 'none.pt',), 'no such file'),
        ((GOLDEN / 'clip' / 'hf' / 'config.json',), 'not a zip archive'),
        ((GELU, '--kind', 'huggingface'), 'config.json'),
        ((GELU, '--kind', 'dist'), 'temporal_stem.weight is missing'),
        ((GOLDEN / 'clip' / 'hf' / 'expected.safetensors',), 'names of no known kind'),
        ((OPENAI, '--export'), 'is not a converted checkpoint'),
        ((OPENAI, '--backbone', 'clip'), 'openai names hold no other network'),
    ],
)
def test_refusals_say_what_to_do_and_leave_nothing(tmp_path, capsys, args, message):
    source, *flags = args
    assert _main(source, tmp_path / 'out', *flags) == 2
    error = capsys.readouterr().err
    assert error.startswith('error: ') and message in error and 'Traceback' not in error
    assert list(tmp_path.iterdir()) == []


def test_incomplete_checkpoint_names_every_gap_and_leaves_nothing(tmp_path, capsys):
    tensors = load_file(GELU)
    del tensors['logit_scale'], tensors['visual.ln_pre.bias']
    tensors['surplus'] = np.zeros(2, np.float32)
    save_file(tensors, tmp_path / 'in.safetensors')
    assert _main(tmp_path / 'in.safetensors', tmp_path / 'out', '--activation', 'gelu') == 2
    error = capsys.readouterr().err
    for name in ('surplus (2,)', 'logit_scale', 'visual/ln_pre/bias'):
        assert name in error
    assert [path.name for path in tmp_path.iterdir()] == ['in.safetensors']


def test_overwrite_replaces_checkpoints_and_nothing_else(tmp_path, capsys):
    dest = tmp_path / 'out'
    assert _main(OPENAI, dest) == 0
    assert _main(GELU, dest, '--activation', 'gelu') == 2
    assert '--overwrite' in capsys.readouterr().err
    assert converted.load_metadata(dest)['kind'] == 'openai'
    assert _main(GELU, dest, '--activation', 'gelu', '--overwrite') == 0
    assert converted.load_metadata(dest)['kind'] == 'openclip'
    assert [path.name for path in tmp_path.iterdir()] == ['out']
    precious = tmp_path / 'precious'
    precious.mkdir()
    (precious / 'thesis.tex').write_text('x')
    assert _main(OPENAI, precious, '--overwrite') == 2
    assert (precious / 'thesis.tex').exists()


def test_failure_while_writing_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    dest = tmp_path / 'out'
    convert.convert(OPENAI, dest)
    before = converted.load_metadata(dest)

    def fail(path, *_):
        path.mkdir()
        (path / 'half').write_text('')
        raise OSError('disk full')

    monkeypatch.setattr(converted, '_write', fail)
    assert _main(GELU, dest, '--activation', 'gelu', '--overwrite') == 2
    assert converted.load_metadata(dest) == before
    assert [path.name for path in tmp_path.iterdir()] == ['out']


# Reading what was written.


def test_only_the_asked_subtree_is_read(openai):
    visual = converted.load_params(openai, ['visual'])
    assert visual.keys() == {'visual'}
    part = converted.load_params(openai, ['text/ln_final', 'logit_scale'], as_numpy=True)
    assert flatten(part).keys() == {'logit_scale', 'text/ln_final/bias', 'text/ln_final/scale'}
    assert isinstance(part['logit_scale'], np.ndarray)
    with pytest.raises(ValueError, match=r"nothing'.*'text', 'visual'"):
        converted.load_params(openai, ['nothing'])


def test_dtype_and_sharding_are_those_asked_for(openai):
    mesh = jax.make_mesh((1,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    params = converted.load_params(openai, ['visual'], dtype=jnp.bfloat16, sharding=sharding)
    kernel = params['visual']['conv1']['kernel']
    assert kernel.dtype == jnp.bfloat16 and kernel.sharding == sharding
    assert params['visual']['ln_pre']['scale'].dtype == jnp.float32
    backbone = backbone_of(converted.load_metadata(openai))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('data'))
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float16, sharding=rows if x.ndim else sharding),
        backbone.abstract_params(),
    )
    params = converted.load_params(openai, ['visual'], abstract=abstract)
    assert params['visual']['proj']['kernel'].sharding == rows
    assert params['visual']['proj']['kernel'].dtype == jnp.float16


def test_other_geometry_is_refused_before_reading(openai):
    abstract = Backbone(clip.KIND, clip.SPECS['tiny']).abstract_params()
    with pytest.raises(ValueError) as caught:
        converted.load_params(openai, ['visual'], abstract=abstract)
    message = str(caught.value)
    assert 'visual/proj/kernel: stored (128, 64), the model needs (64, 64)' in message


def with_metadata(openai, folder, **changes):
    """A copy of a converted checkpoint that says something else of itself."""
    shutil.copytree(openai, folder)
    metadata = converted.load_metadata(openai) | changes
    metadata.pop(digests.SEAL)
    (folder / 'metadata' / 'metadata').write_text(json.dumps(digests.seal(metadata)))


def test_paths_that_are_no_checkpoint(tmp_path, openai):
    with pytest.raises(FileNotFoundError, match='dist_jax convert'):
        converted.load_metadata(tmp_path / 'none')
    with pytest.raises(ValueError, match='not a converted checkpoint'):
        converted.load_params(tmp_path)
    newer = tmp_path / 'newer'
    with_metadata(openai, newer, format_version=99)
    with pytest.raises(ValueError, match='format_version=99'):
        converted.load_metadata(newer)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (
            {'family': 'dist'},
            r"checkpoint of family 'dist' where a converted backbone \(clip, eva\)",
        ),
        ({'spec': {'image_size': 32}}, 'the spec of this converted clip does not fit: .*missing'),
        ({'spec': {'layers': 1}}, "the spec of this converted clip does not fit: .*'layers'"),
    ],
)
def test_what_is_no_backbone_is_refused_as_one(openai, tmp_path, changes, message):
    with_metadata(openai, tmp_path / 'other', **changes)
    config = dist.get_config('demo')
    config.backbone.checkpoint = str(tmp_path / 'other')
    with pytest.raises(ValueError, match=message):
        experiment.find_backbone(config, '')


# DiST, there and back.


def test_dist_file_converts_and_exports_bit_equal(tmp_path, capsys):
    recorded = load_file(GOLDEN / 'dist_small.safetensors')
    released = {
        f'backbone.base_encoder.{name.split("/", 1)[1]}': value
        for name, value in recorded.items()
        if name.startswith(('params/', 'backbone/'))
    }
    save_file(released, tmp_path / 'in.safetensors')
    assert _main(tmp_path / 'in.safetensors', tmp_path / 'dist') == 0
    metadata = converted.load_metadata(tmp_path / 'dist')
    assert (metadata['family'], metadata['name']) == ('dist', 'dist_4+8f')
    assert metadata['spec']['num_layers'] == 2
    frozen = [name for name in recorded if name.startswith('backbone/')]
    assert len(metadata['ignored']) == len(metadata['backbone']['dtypes']) == len(frozen)
    out = tmp_path / 'out.safetensors'
    assert _main('--export', tmp_path / 'dist', out) == 0
    written = load_file(out)
    assert_same_tensors(written, {name: x for name, x in released.items() if 'dist_net' in name})
    assert _main('--export', tmp_path / 'dist', out) == 2
    assert '--overwrite' in capsys.readouterr().err
    assert _main('--export', tmp_path / 'dist', out, '--overwrite') == 0


def test_a_clip_is_exported_under_the_names_of_openai(tmp_path):
    source, out = tmp_path / 'clip', tmp_path / 'out.safetensors'
    assert _main(GELU, source, '--activation', 'gelu') == 0
    assert _main('--export', source, out) == 0
    assert_same_tensors(load_file(out), load_file(GELU))


def test_another_backbone_is_not_exported(tmp_path, capsys):
    fields = ('name', 'spec', 'sources', 'source_sha256', 'precision', 'ignored')
    metadata = dict.fromkeys(fields, '') | {'family': 'eva'}
    converted.save_converted(tmp_path / 'eva', {'visual': np.zeros(1)}, metadata)
    assert _main('--export', tmp_path / 'eva', tmp_path / 'out.safetensors') == 2
    assert "family 'eva'; only" in capsys.readouterr().err


def test_hostile_file_is_refused_by_the_command(tmp_path, capsys):
    import zipfile

    marker = tmp_path / 'pwned'
    command = f'touch {marker}'.encode()
    program = b'\x80\x02cos\nsystem\n(X' + len(command).to_bytes(4, 'little') + command + b'tR.'
    with zipfile.ZipFile(tmp_path / 'a.pt', 'w') as archive:
        archive.writestr('archive/data.pkl', program)
    assert _main(tmp_path / 'a.pt', tmp_path / 'out') == 2
    assert 'os.system' in capsys.readouterr().err
    assert not marker.exists() and not (tmp_path / 'out').exists()


def test_help_shows_examples(capsys):
    with pytest.raises(SystemExit) as caught:
        _main('--help')
    assert caught.value.code == 0
    assert 'ViT-B-16.pt' in capsys.readouterr().out


def test_non_finite_weights_are_named_and_recorded(tmp_path, capsys):
    tensors = load_file(GELU)
    tensors['visual.proj'][3, 4] = np.nan
    tensors['logit_scale'] = np.array(np.inf, np.float32)
    save_file(tensors, tmp_path / 'in.safetensors')
    assert _main(tmp_path / 'in.safetensors', tmp_path / 'out', '--activation', 'gelu') == 0
    printed = ' '.join(capsys.readouterr().out.split())
    assert 'warning: NaN or infinite values in visual.proj, logit_scale' in printed
    metadata = converted.load_metadata(tmp_path / 'out')
    assert metadata['non_finite'] == ['visual.proj', 'logit_scale']


def test_ignored_tensors_are_named(tmp_path, capsys):
    assert _main(OPENAI, tmp_path / 'out') == 0
    printed = capsys.readouterr().out
    assert 'context_length, input_resolution, vocab_size' in printed and 'warning' not in printed
    names = [f'visual.{k}' for k in range(20)] + ['logit_scale']
    assert convert.summed_up(names) == (
        '21 tensors: visual.… (20), logit_scale (all in the metadata)'
    )


def test_names_with_markup_are_printed_as_they_are(tmp_path, capsys):
    source = tmp_path / 'a[bold].pt'
    shutil.copy(OPENAI, source)
    assert _main(source, tmp_path / 'out', '--name', 'my[/]clip') == 0
    printed = capsys.readouterr().out
    assert 'a[bold].pt' in printed and 'my[/]clip' in printed


def test_a_hub_name_hints_at_the_download_before_jax_is_imported(tmp_path):
    code = 'import sys; from dist_jax import main; code = main.main(sys.argv[1:]);'
    code += 'print(code, "jax" in sys.modules)'
    command = [sys.executable, '-c', code, 'convert', 'openai/clip-vit-base-patch16', 'out']
    environment = os.environ | {'PYTHONPATH': str(GOLDEN.parent.parent)}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == '2 False\n'
    assert done.stderr.startswith('error: openai/clip-vit-base-patch16: no such file or folder')
    assert 'dist_jax convert hf://openai/clip-vit-base-patch16 clip_vit_base_patch16' in done.stderr


@pytest.mark.parametrize('name', ['missing.pt', 'a/sub/missing.pt', '/data/clip', 'here/x.pt'])
def test_other_missing_files_do_not_hint_at_a_download(tmp_path, capsys, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'here').mkdir()
    assert _main(name, 'out') == 2
    assert capsys.readouterr().err == f'error: {name}: no such file or folder\n'


def test_kinds_of_the_command_line_are_those_that_convert():
    assert tuple(convert.KINDS) == convert_arguments.KINDS


@pytest.mark.parametrize(
    ('family', 'head', 'wanted'), [('dist', 'linear', 'text'), ('evl', 'text', 'linear')]
)
def test_export_says_which_head_it_needs(tmp_path, monkeypatch, family, head, wanted):
    saved = {'config': {'model': {'family': family, 'head': head}}, 'backbone': {'spec': {}}}
    monkeypatch.setattr(convert, 'is_run', lambda _: True)
    monkeypatch.setattr(convert, 'find_checkpoint', lambda source, step: source)
    monkeypatch.setattr(convert, 'read_metadata', lambda _: saved)
    with pytest.raises(ValueError, match=f'the export needs head={wanted}'):
        convert.export('runs/a', tmp_path / 'out.safetensors')


# Batch statistics travel as parameters do.


class Normalised(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(use_running_average=True, name='bn')(nn.Dense(3, name='fc')(x))


def _made_up_rows(sizes):
    assert sizes == {'width': 5}
    return [
        *clip_params.linear_rows('fc', 'fc'),
        *clip_params.norm_rows('bn', 'bn'),
        Row('bn.running_mean', 'batch_stats/bn/mean'),
        Row('bn.running_var', 'batch_stats/bn/var'),
    ]


def _made_up_plan(source, options):
    spec = {'width': source.tensors['fc.weight'].shape[1]}
    shapes = jax.eval_shape(Normalised().init, jax.random.key(0), jnp.zeros((1, 5)))
    return Plan(
        name='made-up',
        spec=spec,
        tensors=source.tensors,
        rows=_made_up_rows(spec),
        abstract=converted.stored_tree(shapes),
        ignore=('*.num_batches_tracked',),
        collections=('batch_stats',),
    )


@pytest.fixture
def made_up(monkeypatch, tmp_path):
    """Tensors of a network with batch statistics in `tmp_path/in.safetensors`."""
    naming = Naming(
        kind='made_up',
        family='made_up',
        matches=lambda source: 'bn.running_mean' in source.tensors,
        plan=_made_up_plan,
        export=Export(_made_up_rows, lambda model, _: {'width': model['width']}, 'net.', 'linear'),
    )
    monkeypatch.setitem(convert.KINDS, 'made_up', naming)
    rng = np.random.default_rng(0)
    shapes = {'fc.weight': (3, 5)} | dict.fromkeys(
        ('fc.bias', 'bn.weight', 'bn.bias', 'bn.running_mean', 'bn.running_var'), (3,)
    )
    tensors = {name: rng.uniform(1, 2, shape).astype('f') for name, shape in shapes.items()}
    more = {'bn.num_batches_tracked': np.array([7])}
    save_file(tensors | more, tmp_path / 'in.safetensors')
    return tensors


def _assert_exported(path, tensors):
    written = load_file(path)
    assert_same_tensors(written, {f'net.{name}': value for name, value in tensors.items()})


def test_batch_statistics_convert_and_export_bit_equal(made_up, tmp_path):
    assert _main(tmp_path / 'in.safetensors', tmp_path / 'net') == 0
    metadata = converted.load_metadata(tmp_path / 'net')
    assert (metadata['family'], metadata['collections']) == ('made_up', ['batch_stats'])
    stored = converted.load_params(tmp_path / 'net', as_numpy=True)
    assert stored.keys() == {'fc', 'bn', 'batch_stats'}
    variables = converted.variables(stored, metadata)
    assert variables.keys() == {'params', 'batch_stats'}
    assert converted.stored_tree(variables) == stored
    x = np.linspace(0, 1, 5, dtype=np.float32)[None]
    found = Normalised().apply(variables, x)
    y = x @ made_up['fc.weight'].T + made_up['fc.bias'] - made_up['bn.running_mean']
    y = y / np.sqrt(made_up['bn.running_var'] + 1e-5) * made_up['bn.weight'] + made_up['bn.bias']
    np.testing.assert_allclose(found, y, rtol=1e-5)
    assert _main('--export', tmp_path / 'net', tmp_path / 'out.safetensors') == 0
    _assert_exported(tmp_path / 'out.safetensors', made_up)


def test_batch_statistics_keep_their_precision(made_up, tmp_path):
    assert _main(tmp_path / 'in.safetensors', tmp_path / 'net', '--precision', 'bfloat16') == 0
    stored = flatten(converted.stored_shapes(tmp_path / 'net'))
    assert stored['fc/kernel'].dtype == 'bfloat16'
    assert stored['bn/scale'].dtype == stored['batch_stats/bn/var'].dtype == 'float32'
    read = flatten(converted.load_params(tmp_path / 'net', dtype=jnp.float16))
    assert read['fc/kernel'].dtype == 'float16' and read['batch_stats/bn/mean'].dtype == 'float32'


@pytest.mark.parametrize('averaged', [False, True])
def test_batch_statistics_of_a_run_are_exported(made_up, tmp_path, averaged):
    assert _main(tmp_path / 'in.safetensors', tmp_path / 'net') == 0
    stored = converted.load_params(tmp_path / 'net', as_numpy=True)
    statistics = {'batch_stats': stored.pop('batch_stats')}
    state = TrainState(
        step=jnp.int32(2),
        params=jax.tree.map(np.zeros_like, stored) if averaged else stored,
        opt_state=(),
        ema={**stored, **statistics} if averaged else None,
        **{
            checkpoint.COLLECTIONS: jax.tree.map(np.zeros_like, statistics)
            if averaged
            else statistics
        },
    )
    saved = {
        'format_version': checkpoint.FORMAT_VERSION,
        'config': {
            'model': {'family': 'made_up', 'head': 'linear', 'width': 5},
            'optimizer': {'ema_decay': 0.9 if averaged else 0.0},
        },
        'backbone': None,
    }
    checkpoints = checkpoint.Checkpoints(tmp_path / 'run')
    checkpoints.save(state, saved)
    checkpoints.close()
    folder = checkpoint.find_checkpoint(tmp_path / 'run')
    found = checkpoint.read_host_variables(folder)
    jax.tree.map(np.testing.assert_array_equal, found, {'params': stored, **statistics})
    assert _main('--export', tmp_path / 'run', tmp_path / 'out.safetensors') == 0
    _assert_exported(tmp_path / 'out.safetensors', made_up)


def test_a_collection_that_is_not_there_or_hides_parameters_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"\['bn'\] name both parameters and collections"):
        converted.stored_tree({'params': {'bn': {}}, 'bn': {}})
    metadata = dict.fromkeys(converted.REQUIRED, 'x') | {'collections': ['batch_stats']}
    with pytest.raises(ValueError, match=r"lacks the collections \['batch_stats'\]"):
        converted.save_converted(tmp_path / 'net', {'fc': np.zeros(2)}, metadata)
