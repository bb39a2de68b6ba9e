"""Side4Video files of the authors for retrieval: names, the backbone inside, there and back."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from released import assert_same_tensors, save_released
from safetensors.numpy import load_file, save_file

from dist_jax import checkpoint, convert, init_from, main, optim, step
from dist_jax.models import (
    clip,
    converted,
    eva,
    side4video_retrieval,
    side4video_retrieval_params,
)
from dist_jax.models.backbone import Backbone
from dist_jax.models.clip_params import openai_rows
from dist_jax.models.eva_params import baai_rows
from dist_jax.models.params import export_tree, flatten, import_tree
from dist_jax.models.source_files import open_source
from dist_jax.sharding import make_mesh
from tools.parity.golden import read_golden

GOLDEN = Path(__file__).parent.parent / 'golden'
# Of the recorded towers.
CLIP = clip.ClipSpec(32, 16, 128, 2, 2, 48, 64, 2, 1, vocab_size=60, context_length=16)
BIG_E = eva.EvaSpec(
    *(56, 14, 112, 4, 2, 40, 960, 64, 2, 1),
    vocab_size=50,
    context_length=77,
    post_norm=True,
    sub_ln=False,
    swiglu=False,
    rope=False,
)
KINDS = {
    'clip': (clip.KIND, CLIP, openai_rows(CLIP)),
    'eva': (eva.KIND, BIG_E, baai_rows(BIG_E)),
}
TEXT = {'text_width': 64, 'text_depth': 2, 'text_num_heads': 1}
SIZES = {
    'clip': {'width': 128, 'patch_size': 16, 'grid': 2, 'embed_dim': 48, 'post_norm': False}
    | {'vocab_size': 60, 'context_length': 16, 'tap_every': 1},
    'eva': {'width': 112, 'patch_size': 14, 'grid': 4, 'embed_dim': 40, 'post_norm': True}
    | {'vocab_size': 50, 'context_length': 77, 'tap_every': 2},
}
SIDE = {'side_dim': 64, 'depth': 2, 'mlp_ratio': 4.0}


def random_like(abstract):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), abstract)


@dataclasses.dataclass(frozen=True)
class File:
    """Tensors of a file: of the network and of the frozen backbone beside it."""

    network: dict[str, np.ndarray]
    frozen: dict[str, np.ndarray]

    @property
    def whole(self):
        return self.network | self.frozen


def recorded(form):
    """A recorded tower as a file; that of EVA lacks what is not of its towers."""
    golden = read_golden(GOLDEN / f'side4video_retrieval_{form}_tower.safetensors')
    network, frozen = golden.section('params') | golden.section('buffers'), {}
    if form == 'clip':
        return File(network, golden.section('backbone'))
    frozen = {f'clip.{name}': value for name, value in golden.section('backbone').items()}
    network = {f'clip.{name}': value for name, value in network.items()}
    size, rng = SIZES[form]['embed_dim'], np.random.default_rng(0)
    network['clip.logit_scale'] = np.array(4.5, np.float32)
    for name in ('text_weight_fc', 'video_weight_fc'):
        shapes = {'0.weight': (size, size), '0.bias': (size,), '2.weight': (1, size), '2.bias': 1}
        for end, shape in shapes.items():
            network[f'{name}.{end}'] = rng.normal(size=shape).astype(np.float32)
    return File(network, frozen)


def network(form):
    kind, spec, _ = KINDS[form]
    return side4video_retrieval.build(
        Backbone(kind, spec),
        num_frames=2,
        dtype=jnp.float32,
        tap_every=SIZES[form]['tap_every'],
        side_dim=64,
        post_norm=form == 'eva',
    )


@pytest.fixture(scope='module')
def files():
    return {form: recorded(form) for form in KINDS}


@pytest.fixture(scope='module')
def backbones(files, tmp_path_factory):
    """The backbones that the networks were recorded on, converted."""
    folder, found = tmp_path_factory.mktemp('backbones'), {}
    for form, (kind, spec, rows) in KINDS.items():
        read = {row.source_name for row in rows}
        tensors = {name.removeprefix('clip.'): x for name, x in files[form].whole.items()}
        tensors = {name: x for name, x in tensors.items() if name in read}
        tree = import_tree(tensors, rows, Backbone(kind, spec).abstract_params())
        metadata = dict.fromkeys(converted.REQUIRED, '') | {
            'family': form,
            'name': f'{form}-recorded',
            'spec': dataclasses.asdict(spec),
        }
        converted.save_converted(folder / form, tree, metadata)
        found[form] = folder / form
    return found


def _main(*args):
    return main.main(['convert', *map(str, args)])


@pytest.mark.parametrize('form', KINDS)
def test_a_released_file_goes_there_and_back(form, files, backbones, tmp_path, capsys):
    tensors, whole = files[form].network, files[form].whole
    buffers = {'clip.visual.rope.freqs_cos': np.zeros((2, 2), 'f')} if form == 'eva' else {}
    source, _ = save_released(tmp_path / 'in.pt', whole | buffers, lambda network: network)
    dest, out = tmp_path / 'net', tmp_path / 'out.safetensors'
    assert _main(source, dest, '--backbone', backbones[form]) == 0
    printed = ' '.join(capsys.readouterr().out.split())
    assert 'rounded to float16 it is the same as' in printed and 'warning' not in printed

    metadata = converted.load_metadata(dest)
    patch = SIZES[form]['patch_size']
    name = f'side4video_retrieval_{form}_p{patch}_64x2'
    assert (metadata['family'], metadata['name']) == ('side4video_retrieval', name)
    assert metadata['collections'] == ['batch_stats']
    assert metadata['spec'] == SIDE | TEXT | SIZES[form]
    # What was trained of the backbone is of the network; compared was the rest.
    found = metadata['backbone']
    assert (found['family'], found['compared']['differing']) == (form, [])
    assert found['dtypes'].keys() == files[form].frozen.keys()

    assert _main('--export', dest, out) == 0
    assert_same_tensors(load_file(out), tensors)
    words = ('--with_backbone', '--backbone', backbones[form], '--overwrite')
    assert _main('--export', dest, out, *words) == 0
    assert_same_tensors(load_file(out), whole)


@pytest.mark.parametrize('form', KINDS)
def test_what_is_stored_starts_a_network(form, files, tmp_path):
    """Of float16, as most of a released file on CLIP, and of another order of positions."""
    halved = {
        name: x.astype(np.float16) if x.ndim > 1 else x for name, x in files[form].network.items()
    }
    save_file(halved, tmp_path / 'in.safetensors')
    assert convert.detect(open_source(tmp_path / 'in.safetensors')) == 'side4video_retrieval'
    assert _main(tmp_path / 'in.safetensors', tmp_path / 'net') == 0
    model, spec = network(form), KINDS[form][1]
    inputs = jax.eval_shape(
        lambda frozen, video: model.inputs(frozen, {'video': video}),
        model.frozen.abstract(()),
        jax.ShapeDtypeStruct((1, 2, spec.image_size, spec.image_size, 3), jnp.float32),
    )
    variables = jax.eval_shape(model.net.init, jax.random.key(0), inputs)
    placed = step.place_variables(model, variables, make_mesh())
    found = init_from.load_variables(init_from.Origin(str(tmp_path / 'net')), model, placed, ())
    leaves = flatten(found)
    assert {leaf.dtype.name for leaf in leaves.values()} == {'float32'}

    root, below = ('clip.', 'transformer.') if form == 'clip' else ('clip.text.', '')
    table = halved[f'clip.visual.{below}side_spatial_position_embeddings']
    if form == 'clip':  # the row of the class token is the last of ours
        table = np.concatenate([table[1:], table[:1]])
    for path, value in {
        'params/positional_embedding': table,
        'params/side_proj/kernel': halved['clip.visual.side_proj'],
        'params/text/token_embedding': halved[f'{root}token_embedding.weight'],
        'params/text_weight/fc2/kernel': halved['text_weight_fc.2.weight'].T,
        'params/video_weight/fc1/kernel': halved['video_weight_fc.0.weight'].T,
        'params/logit_scale': halved['clip.logit_scale'],
        'batch_stats/post_bn/var': halved['clip.visual.side_post_bn.running_var'],
    }.items():
        np.testing.assert_array_equal(leaves[path], value, err_msg=path)


@pytest.mark.parametrize(
    ('form', 'name', 'shape', 'message'),
    [
        ('clip', 'clip.visual.side_post_bn.running_mean', None, 'batch_stats/post_bn/mean'),
        ('clip', 'clip.visual.ln_post.weight', None, 'visual/ln_post/scale'),
        ('eva', 'clip.text.ln_final.bias', None, 'text/ln_final/bias'),
        ('eva', 'text_weight_fc.2.bias', None, 'text_weight/fc2/bias'),
        ('eva', 'clip.visual.side_blocks.1.attn.k_proj.bias', None, 'layers/attn/qkv/bias[1,1]'),
        ('clip', 'clip.visual.transformer.side_transformer.0.norm3.bias', (64,), 'uses (1)'),
        ('eva', 'fc.weight', (5, 64), 'nothing uses (1)'),
        ('clip', 'clip.transformer.resblocks.0.ln_1.bias', (63,), '(63,), but text/blocks/ln_1'),
        ('clip', 'clip.visual.side_proj', (128, 64), '(128, 64), but side_proj/kernel needs'),
        ('clip', 'clip.visual.proj', None, 'clip.visual.proj is missing; this is no complete'),
        ('eva', 'clip.text.token_embedding.weight', None, 'token_embedding.weight is missing'),
        ('clip', 'clip.visual.conv1.weight', None, 'visual.conv1.weight is missing'),
        ('clip', 'clip.visual.transformer.resblocks.2.ln_1.bias', (128,), 'inside has 3 blocks'),
        (
            'clip',
            'clip.visual.transformer.side_spatial_position_embeddings',
            (4, 64),
            'has 3 rows beside 1 of a class token, which is no square',
        ),
    ],
)
def test_tensors_that_are_not_right_are_named(form, name, shape, message, files, tmp_path, capsys):
    tensors = dict(files[form].whole)
    tensors.pop(name, None)
    if shape is not None:
        tensors[name] = np.zeros(shape, np.float32)
    save_file(tensors, tmp_path / 'in.safetensors')
    assert _main(tmp_path / 'in.safetensors', tmp_path / 'net') == 2
    error = capsys.readouterr().err
    assert message in error and 'Traceback' not in error


def test_heads_of_the_text_tower_may_be_given(files, tmp_path, capsys):
    save_file(files['clip'].network, tmp_path / 'in.safetensors')
    source, dest = tmp_path / 'in.safetensors', tmp_path / 'net'
    assert _main(source, dest, '--text_num_heads', 4) == 0
    metadata = converted.load_metadata(dest)
    assert metadata['spec']['text_num_heads'] == 4 and metadata['spec']['tap_every'] is None
    shapes = flatten(converted.stored_shapes(dest))
    assert shapes['text/blocks/attn/qkv/kernel'].shape == (2, 64, 3, 4, 16)
    assert _main('--export', dest, tmp_path / 'out.safetensors') == 0
    assert_same_tensors(load_file(tmp_path / 'out.safetensors'), files['clip'].network)
    assert _main(source, dest, '--overwrite', '--activation', 'gelu') == 2
    assert '--activation cannot be set for side4video_retrieval' in capsys.readouterr().err


@pytest.mark.parametrize('form', KINDS)
def test_each_of_their_tensors_is_clipped_by_itself(form, files):
    """Wherever it lies in our arrays."""
    sizes = SIDE | TEXT | SIZES[form]
    rows = side4video_retrieval_params.retrieval_rows(sizes)
    rows = [row for row in rows if not row.target_path.startswith('batch_stats/')]
    tensors = {name: x for name, x in files[form].network.items() if 'running_' not in name}
    abstract = side4video_retrieval_params.abstract_variables(sizes)
    del abstract['batch_stats']
    tree = import_tree(tensors, rows, abstract)
    clip_all = optim.clip_by_tensor_norm(tree, 1.5, network(form).tensor_axes)
    found = export_tree(jax.tree.map(np.asarray, clip_all.update(tree, ())[0]), rows)
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        expected = value * min(1, 1.5 / np.linalg.norm(value))
        np.testing.assert_allclose(found[name], expected, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize('form', KINDS)
def test_a_run_is_written_with_its_backbone(form, files, backbones, tmp_path):
    """Under exactly the recorded names, and none else."""
    sizes = SIDE | TEXT | SIZES[form]
    tree = random_like(side4video_retrieval_params.abstract_variables(sizes))
    statistics = {'batch_stats': tree.pop('batch_stats')}
    state = step.TrainState(
        step=jnp.int32(2), params=tree, opt_state=(), ema=None, collections=statistics
    )
    stored = converted.load_metadata(backbones[form])
    model = {name: sizes[name] for name in ('side_dim', 'tap_every', 'post_norm')}
    model['family'] = 'side4video_retrieval'
    saved = {
        'format_version': checkpoint.FORMAT_VERSION,
        'config': {'model': model, 'optimizer': {'ema_decay': 0.0}},
        'backbone': {
            'name': stored['name'],
            'path': str(backbones[form]),
            'params_sha256': stored['params_sha256'],
            'spec': stored['spec'],
        },
        'class_names': [],
    }
    checkpoints = checkpoint.Checkpoints(tmp_path / 'run')
    checkpoints.save(state, saved)
    checkpoints.close()
    out = tmp_path / 'out.safetensors'
    assert _main('--export', tmp_path / 'run', out, '--with_backbone') == 0
    written = load_file(out)
    assert written.keys() == files[form].whole.keys()
    for name, value in files[form].whole.items():
        assert written[name].shape == value.shape, name
    for name, value in files[form].frozen.items():
        np.testing.assert_array_equal(written[name], value, err_msg=name)
    assert _main(out, tmp_path / 'net') == 0
    again = converted.load_params(tmp_path / 'net', as_numpy=True)
    jax.tree.map(np.testing.assert_array_equal, again, tree | statistics)
