"""EVA tables: both namings there and back, every published size, and what is refused."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from dist_jax import backbones, convert
from dist_jax.models import clip, clip_params, converted, eva, eva_params
from dist_jax.models.backbone import Backbone
from dist_jax.models.naming import Options
from dist_jax.models.params import ConversionError, export_tree, flatten, import_tree
from dist_jax.models.source_files import open_source
from tools.fuzzing.torch_files import save_state_dict

WORDS = {'vocab_size': 20, 'context_length': 6}
ROTARY = eva.EvaSpec(32, 8, 64, 2, 1, 24, 41, 64, 2, 1, **WORDS)
POST_NORM = dataclasses.replace(
    ROTARY, num_heads=2, mlp_hidden=96, post_norm=True, sub_ln=False, swiglu=False, rope=False
)
ROWS = {'eva': eva_params.baai_rows, 'eva_openclip': eva_params.openclip_rows}
PREFIX = {'eva': 'visual.', 'eva_openclip': 'visual.trunk.'}


def options(spec):
    """What shapes cannot tell of it."""
    return Options(num_heads=None if spec.sub_ln else spec.num_heads)


def random_tree(spec, dtype=np.float32):
    """Leaves that differ; biases of keys are 0."""
    rng = np.random.default_rng(0)
    abstract = Backbone(eva.KIND, spec).abstract_params()
    tree = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(dtype), abstract)
    tree['visual']['blocks']['attn']['qkv']['bias'][:, 1] = 0
    return tree


@pytest.fixture(params=[ROTARY, POST_NORM], ids=['rotary', 'post norm'])
def spec(request):
    return request.param


def released(spec, kind='eva', dtype=np.float32):
    """Tensors of a file in this naming."""
    return export_tree(random_tree(spec, dtype), ROWS[kind](spec))


def converted_file(tmp_path, tensors, spec=ROTARY, wrap=None):
    """(metadata, tree) of a file with these tensors."""
    save_state_dict(tmp_path / 'in.pt', tensors, wrap)
    metadata = convert.convert(tmp_path / 'in.pt', tmp_path / 'out', options=options(spec))
    return metadata, converted.load_params(tmp_path / 'out', as_numpy=True)


def assert_same(found, expected):
    found, expected = flatten(found), flatten(expected)
    assert found.keys() == expected.keys()
    for path, leaf in expected.items():
        np.testing.assert_array_equal(found[path], leaf, err_msg=path)


@pytest.mark.parametrize('kind', ROWS)
def test_a_file_converts_there_and_back(tmp_path, spec, kind):
    tensors = released(spec, kind)
    metadata, tree = converted_file(tmp_path, tensors, spec)
    assert (metadata['family'], metadata['kind'], metadata['ignored']) == ('eva', kind, [])
    assert metadata['name'] == 'eva_w64_d2_p8_32' and metadata['spec'] == dataclasses.asdict(spec)
    assert_same(tree, random_tree(spec))
    back = export_tree(tree, ROWS[kind](spec))
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(back[name], tensor, err_msg=name)


def test_names_are_those_of_the_releases():
    names = {kind: released(ROTARY, kind).keys() for kind in ROWS}
    for kind, attn, mlp in (
        (
            'eva',
            ('q_proj.weight', 'q_bias', 'v_bias', 'inner_attn_ln.bias', 'proj.bias'),
            ('w1.weight', 'w2.bias', 'ffn_ln.weight', 'w3.weight'),
        ),
        (
            'eva_openclip',
            ('k_proj.weight', 'q_proj.bias', 'v_proj.bias', 'norm.bias', 'proj.weight'),
            ('fc1_g.weight', 'fc1_x.bias', 'norm.weight', 'fc2.weight'),
        ),
    ):
        blocks = f'{PREFIX[kind]}blocks.1.'
        wanted = {*(f'{blocks}attn.{x}' for x in attn), *(f'{blocks}mlp.{x}' for x in mlp)}
        wanted |= {f'{PREFIX[kind]}{x}' for x in ('cls_token', 'pos_embed', 'head.bias')}
        wanted |= {'text.transformer.resblocks.1.attn.in_proj_weight', 'logit_scale'}
        assert wanted <= names[kind]
    fused = {'blocks.0.attn.qkv.weight', 'blocks.0.attn.q_bias', 'blocks.0.mlp.fc1.weight'}
    for kind in ROWS:
        assert {PREFIX[kind] + name for name in fused} <= released(POST_NORM, kind).keys()


@pytest.mark.parametrize(
    'wrap',
    [
        lambda tensors: {'model': tensors},
        lambda tensors: {'module': tensors},
        lambda tensors: {'state_dict': {f'module.{k}': v for k, v in tensors.items()}, 'epoch': 1},
    ],
    ids=['model', 'module', 'state_dict'],
)
def test_wrappers_prefixes_and_half_precision(tmp_path, wrap):
    tensors = released(ROTARY, dtype=np.float16)
    _, tree = converted_file(tmp_path, tensors, wrap=wrap)
    assert_same(tree, random_tree(ROTARY, np.float16))


@pytest.mark.parametrize('scale', ['logit_scale', 'text.logit_scale'])
def test_older_dumps_and_tables_of_rotary_positions(tmp_path, scale):
    """Text at the top level, buffers stored with the weights."""
    tensors = {name.removeprefix('text.'): value for name, value in released(ROTARY).items()}
    tensors[scale] = tensors.pop('logit_scale')
    buffers = ('visual.rope.freqs_cos', 'visual.blocks.0.attn.rope.freqs_sin', 'attn_mask')
    tensors |= {name: np.zeros((16, 32), np.float32) for name in buffers}
    metadata, tree = converted_file(tmp_path, tensors)
    assert metadata['ignored'] == sorted(buffers)
    assert_same(tree, random_tree(ROTARY))


@pytest.mark.parametrize('kind', ROWS)
def test_every_tensor_counts(spec, kind, tmp_path):
    tensors = released(spec, kind)
    gone, other = f'{PREFIX[kind]}blocks.1.norm2.bias', f'{PREFIX[kind]}blocks.1.attn.q_bias'
    other = other if other in tensors else f'{PREFIX[kind]}blocks.1.attn.q_proj.bias'
    del tensors[gone]
    tensors[other] = tensors[other][:-1]
    tensors['visual.surplus'] = np.zeros(3, np.float32)
    with pytest.raises(ConversionError) as caught:
        converted_file(tmp_path, tensors, spec)
    error = caught.value
    assert error.unused == ['visual.surplus (3,)']
    assert error.unfilled == [f'visual/blocks/norm2/bias[1] (from {gone})']
    assert len(error.mismatched) == 1 and error.mismatched[0].startswith(f'{other} (63,)')
    assert not (tmp_path / 'out').exists()


def test_a_bias_of_keys_has_no_place_in_a_file():
    tree = random_tree(ROTARY)
    tree['visual']['blocks']['attn']['qkv']['bias'][0, 1, 0, 0] = 1
    with pytest.raises(ConversionError, match=r'qkv/bias\[0,1\] has no place in the file'):
        export_tree(tree, eva_params.baai_rows(ROTARY))


def detected(tmp_path, tensors):
    save_file(tensors, tmp_path / 'in.safetensors')
    return convert.detect(open_source(tmp_path / 'in.safetensors'))


@pytest.mark.parametrize('kind', ROWS)
def test_kinds_are_told_apart(tmp_path, spec, kind):
    tensors = released(spec, kind)
    assert detected(tmp_path, tensors) == kind
    with pytest.raises(ValueError, match=r'visual.conv1.weight and visual.proj'):
        clip_params.openai_spec(tensors, activation='gelu')
    other = {'eva': eva_params.TIMM, 'eva_openclip': eva_params.BAAI}[kind]
    with pytest.raises(ValueError, match=r'patch_embed.proj.weight is missing'):
        eva_params.eva_spec(tensors, other)


def test_a_clip_is_no_eva(tmp_path):
    small = clip.ClipSpec(16, 8, 64, 1, 1, 24, 64, 1, 1, vocab_size=20, context_length=6)
    tree = jax.device_get(clip.init_params(jax.random.key(0), small))
    tensors = export_tree(tree, clip_params.openai_rows(small))
    assert detected(tmp_path, tensors) == 'openclip'
    with pytest.raises(ValueError, match=r'visual.patch_embed.proj.weight is missing'):
        eva_params.eva_spec(tensors)


def shapes(spec, kind):
    """name -> shape of what a file of this size holds, without memory for it."""
    leaves = flatten(Backbone(eva.KIND, spec).abstract_params())
    found = {}
    for row in ROWS[kind](spec):
        if row.source_name is None:
            continue
        leaf, index = leaves[row.target_path], row.index
        inner = [n for a, n in enumerate(leaf.shape) if a >= len(index) or index[a] == slice(None)]
        value = row.backward(np.broadcast_to(np.int8(0), inner))
        found[row.source_name] = jax.ShapeDtypeStruct(value.shape, np.float16)
    return found


PUBLISHED = [name for name in eva.SPECS if 'tiny' not in name]


@pytest.mark.parametrize('name', PUBLISHED)
def test_published_sizes_are_known_by_their_shapes(name):
    spec = eva.SPECS[name]
    for kind, names in (('eva', eva_params.BAAI), ('eva_openclip', eva_params.TIMM)):
        assert eva_params.eva_spec(shapes(spec, kind), names) == spec
    assert eva_params.spec_name(spec) == name
    assert eva_params.spec_name(dataclasses.replace(spec, depth=2)).startswith('eva_w')


def test_image_tower_alone(spec):
    """As it lies in files of networks that stand on one."""
    tensors = {name: x for name, x in released(spec).items() if name.startswith('visual.')}
    tensors |= {'visual.side_conv1.bias': np.zeros(3)}
    found = eva_params.eva_spec(tensors, num_heads=options(spec).num_heads)
    assert found == dataclasses.replace(
        spec,
        text_width=0,
        text_depth=0,
        text_num_heads=1,
        vocab_size=49408,
        context_length=77,
    )
    tree = import_tree(
        tensors,
        eva_params.baai_rows(found),
        Backbone(eva.KIND, found).abstract_params(),
        ['visual.side_*'],
    )
    assert_same(tree, {'visual': random_tree(spec)['visual']})


def test_image_tower_alone_is_no_backbone(tmp_path):
    tensors = {name: x for name, x in released(ROTARY).items() if name.startswith('visual.')}
    with pytest.raises(ValueError, match=r'text.token_embedding.weight is missing'):
        converted_file(tmp_path, tensors)


@pytest.mark.parametrize(
    ('name', 'shape', 'message'),
    [
        ('visual.patch_embed.proj.weight', (64, 3, 8, 4), r'expected \(width, 3, patch, patch\)'),
        ('visual.pos_embed', (1, 18, 64), 'square grid'),
        ('visual.pos_embed', (17, 64), 'expected 3 axes'),
        ('visual.pos_embed', (1, 1, 64), '1 rows are not one class token and a square grid'),
        ('visual.head.weight', None, 'head.weight is missing'),
        ('visual.blocks.99999.x', (1,), 'more blocks than tensors'),
        ('visual.patch_embed.proj.weight', (96, 3, 8, 8), 'width 96 is not a multiple of 64'),
    ],
)
def test_geometry_that_is_no_eva(name, shape, message):
    tensors = released(ROTARY)
    tensors[name] = np.zeros(shape or ())
    if shape is None:
        del tensors[name]
    with pytest.raises(ValueError, match=message):
        eva_params.eva_spec(tensors)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'visual.patch_embed.proj.weight': (1408, 3, 14, 14)}, 'width 1408 is that of EVA-01'),
        ({}, 'width 64 with the attention of bigE, which has width 1792: pass --num_heads'),
        ({'visual.rope.freqs_cos': (16, 32)}, 'freqs_cos is there, but .* is not'),
    ],
)
def test_what_follows_from_fused_projections(changes, message):
    tensors = released(POST_NORM) | {name: np.zeros(shape) for name, shape in changes.items()}
    with pytest.raises(ValueError, match=message):
        eva_params.eva_spec(tensors)


@pytest.mark.parametrize(
    ('config', 'flags', 'message'),
    [
        (None, {'activation': 'gelu'}, r'--activation cannot be set for EVA-02-CLIP'),
        (None, {'num_heads': 3}, '3 heads do not divide a width of 64'),
        (None, {'num_heads': 0}, '0 heads do not divide a width of 64'),
        ({'vision_cfg': {'timm_pool': 'avg'}}, {}, "timm_pool='avg' is not supported"),
        ({'model_cfg': {'quick_gelu': True}}, {}, 'quick_gelu=True is not supported'),
        ({'text_cfg': {'heads': 5}}, {}, '5 heads do not divide a width of 64'),
    ],
)
def test_flags_and_configs_that_say_something_else(tmp_path, config, flags, message):
    save_file(released(ROTARY, 'eva_openclip'), tmp_path / 'open_clip_model.safetensors')
    if config:
        (tmp_path / 'open_clip_config.json').write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        convert.convert(tmp_path, tmp_path / 'out', options=Options(**flags))


def test_published_config_beside_the_file(tmp_path):
    save_file(released(ROTARY, 'eva_openclip'), tmp_path / 'open_clip_model.safetensors')
    vision = {'image_size': 224, 'timm_model_name': 'eva02_large_patch14_clip_224'}
    vision |= {'timm_model_pretrained': False, 'timm_pool': 'token', 'timm_proj': None}
    text = {'context_length': 77, 'vocab_size': 49408, 'width': 64, 'heads': 2, 'layers': 2}
    model = {'embed_dim': 24, 'vision_cfg': vision, 'text_cfg': text, 'custom_text': True}
    (tmp_path / 'open_clip_config.json').write_text(json.dumps({'model_cfg': model}))
    metadata = convert.convert(tmp_path, tmp_path / 'out')
    assert metadata['spec'] == dataclasses.asdict(dataclasses.replace(ROTARY, text_num_heads=2))


def test_a_run_that_names_another_kind_or_size_is_told_both(tmp_path):
    path = str(tmp_path / 'backbone')
    backbones.write_random(path, 'eva_tiny')
    assert backbones.find('eva_tiny', path, 48, '').spec == eva.SPECS['eva_tiny']
    with pytest.raises(ValueError, match='eva_tiny-random, another kind of backbone than tiny'):
        backbones.find('tiny', path, 48, '')
    with pytest.raises(ValueError, match=r"is not a eva_tiny_rope .*'mlp_hidden': \(170, 256\)"):
        backbones.find('eva_tiny_rope', path, 48, '')
