"""CLIP tables: every recorded container, every published size, and what is refused."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dist_jax.models import clip, clip_params, source_files
from dist_jax.models.backbone import Backbone
from dist_jax.models.params import ConversionError, export_tree, flatten, import_tree
from dist_jax.models.source_files import open_source
from tools.fuzzing.torch_files import save_state_dict

GOLDEN = Path(__file__).parent.parent / 'golden' / 'clip'


def abstract_params(spec):
    return Backbone(clip.KIND, spec).abstract_params()


def _opened(kind):
    """Container -> (tensors, spec, rows, ignore), as the converter goes about it."""
    if kind == 'hf':
        source = open_source(GOLDEN / 'hf')
        spec = clip_params.huggingface_spec(source.tensors, source.config)
        rows, ignore = clip_params.huggingface_rows(spec), clip_params.HUGGINGFACE_IGNORE
    else:
        file = {'openai': 'tiny.pt', 'openclip_pt': 'epoch_1.pt'}.get(kind, '')
        source = open_source(GOLDEN / kind / file) if file else _gelu_safetensors()
        activation = 'quick_gelu' if kind == 'openai' else 'gelu'
        spec = clip_params.openai_spec(source.tensors, activation=activation)
        rows, ignore = clip_params.openai_rows(spec), clip_params.OPENAI_IGNORE
    return source.tensors, spec, rows, ignore


def _gelu_safetensors():
    return open_source(GOLDEN / 'openclip_gelu' / 'open_clip_model.safetensors')


@pytest.mark.parametrize('kind', ['hf', 'openai', 'openclip_gelu', 'openclip_pt'])
def test_recorded_container_converts_there_and_back(kind):
    tensors, spec, rows, ignore = _opened(kind)
    tree = import_tree(tensors, rows, abstract_params(spec), ignore)
    back = export_tree(tree, rows)
    for name in tensors.keys() - set(ignore):
        np.testing.assert_array_equal(back[name], tensors[name].astype(np.float32))
        assert back[name].shape == tensors[name].shape


@pytest.mark.parametrize('kind', ['hf', 'openai', 'openclip_gelu', 'openclip_pt'])
def test_geometry_is_the_recorded_one(kind):
    _, spec, _, _ = _opened(kind)
    with source_files.safe_open(GOLDEN / kind / 'expected.safetensors', 'np') as file:
        config = json.loads(file.metadata()['config'])
    config['text_num_heads'] = config.pop('text_heads')
    for field, value in dataclasses.asdict(spec).items():
        assert config.get(field, value) == value


@pytest.mark.parametrize('name', clip.SPECS)
@pytest.mark.parametrize('rows_of', [clip_params.openai_rows, clip_params.huggingface_rows])
def test_tables_cover_every_published_size(name, rows_of):
    full = clip.SPECS[name]
    # Fewer blocks and words: the same rows, without hundreds of megabytes.
    spec = dataclasses.replace(full, depth=2, text_depth=2, vocab_size=7)
    abstract = abstract_params(spec)
    tree = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), abstract)
    assert sum(x.size for x in export_tree(tree, rows_of(spec)).values()) == sum(
        leaf.size for leaf in flatten(abstract).values()
    )
    assert len(rows_of(full)) - len(rows_of(spec)) == (full.depth + full.text_depth - 4) * (
        (len(rows_of(spec)) - 14) // 4
    )


def test_hugging_face_and_openai_names_mean_the_same():
    """One set of weights under both names gives one tree."""
    tensors, spec, rows, ignore = _opened('hf')
    tree = import_tree(tensors, rows, abstract_params(spec), ignore)
    openai = export_tree(tree, clip_params.openai_rows(spec))
    assert openai['visual.transformer.resblocks.1.attn.in_proj_weight'].shape == (384, 128)
    np.testing.assert_array_equal(
        openai['visual.transformer.resblocks.1.attn.in_proj_weight'][128:256],
        tensors['vision_model.encoder.layers.1.self_attn.k_proj.weight'],
    )
    again = clip_params.openai_spec(openai, activation='quick_gelu')
    assert again == spec
    for a, b in zip(
        jax.tree.leaves(import_tree(openai, clip_params.openai_rows(spec), abstract_params(spec))),
        jax.tree.leaves(tree),
    ):
        np.testing.assert_array_equal(a, b)


def test_custom_text_models_keep_their_text_under_a_prefix():
    tensors = dict(_gelu_safetensors().tensors)
    plain = clip_params.openai_spec(tensors, activation='gelu')
    moved = {
        f'text.{name}' if not name.startswith('visual.') and name != 'logit_scale' else name: value
        for name, value in tensors.items()
    }
    moved['text.attn_mask'] = np.zeros((20, 20), np.float32)
    assert clip_params.text_prefix(moved) == 'text.'
    spec = clip_params.openclip_spec(moved, None, activation='gelu')
    assert spec == plain
    rows = clip_params.openai_rows(spec, 'text.')
    import_tree(moved, rows, abstract_params(spec), clip_params.OPENAI_IGNORE)


@pytest.mark.parametrize(
    ('config', 'activation', 'heads'),
    [
        ({'model_cfg': {'quick_gelu': True}}, 'quick_gelu', (2, 1)),
        ({'model_cfg': {'vision_cfg': {'head_width': 32}}}, 'gelu', (4, 1)),
        ({'model_cfg': {'text_cfg': {'heads': 2}}, 'preprocess_cfg': {}}, 'gelu', (2, 2)),
        ({'quick_gelu': True, 'vision_cfg': {}, 'text_cfg': {}}, 'quick_gelu', (2, 1)),
    ],
)
def test_openclip_config_decides_activation_and_heads(config, activation, heads):
    spec = clip_params.openclip_spec(_gelu_safetensors().tensors, config)
    assert (spec.activation, (spec.num_heads, spec.text_num_heads)) == (activation, heads)


@pytest.mark.parametrize(
    ('config', 'flags', 'message'),
    [
        (None, {}, '--activation gelu'),
        ({'model_cfg': {'quick_gelu': True}}, {'activation': 'gelu'}, 'contradicts'),
        ({'model_cfg': {'vision_cfg': {'timm_model_name': 'vit'}}}, {}, 'timm_model_name'),
        ({'model_cfg': {'vision_cfg': {'head_width': 60}}}, {}, 'not a multiple of 60'),
        ({'model_cfg': {'text_cfg': {'hf_model_name': 'roberta'}}}, {}, 'hf_model_name'),
        ({'model_cfg': {'vision_cfg': {'norm_kwargs': {'eps': 1e-6}}}}, {}, 'norm_kwargs'),
        ({'model_cfg': [1]}, {}, r'model_cfg=\[1\], expected a JSON object'),
        ({'model_cfg': {'vision_cfg': 3}}, {}, 'vision_cfg=3, expected a JSON object'),
        ({'model_cfg': {'vision_cfg': {'head_width': '64'}}}, {}, "head_width='64', expected"),
        ({'model_cfg': {'text_cfg': {'heads': 1.5}}}, {}, r'heads=1\.5, expected a positive'),
        ({'model_cfg': {'quick_gelu': 'no'}}, {}, "quick_gelu='no', expected true or false"),
        ({}, {'num_heads': -2}, '-2 heads do not divide'),
    ],
)
def test_openclip_never_guesses(config, flags, message):
    with pytest.raises(ValueError, match=message):
        clip_params.openclip_spec(_gelu_safetensors().tensors, config, **flags)


def test_openclip_of_a_large_width_asks_for_heads():
    tensors = dict(_gelu_safetensors().tensors)
    tensors['visual.conv1.weight'] = np.broadcast_to(np.float32(0), (1280, 3, 16, 16))
    with pytest.raises(ValueError, match='--num_heads'):
        clip_params.openclip_spec(tensors, None, activation='gelu')


def _hf_config(**changes):
    config = json.loads((GOLDEN / 'hf' / 'config.json').read_text())
    for path, value in changes.items():
        side, _, field = path.partition('__')
        config[f'{side}_config'][field] = value
    return config


@pytest.mark.parametrize(
    ('config', 'message'),
    [
        (None, 'needs its config.json'),
        (_hf_config(vision__hidden_act='relu'), "hidden_act='relu'"),
        (_hf_config(text__hidden_act='gelu'), 'the towers differ'),
        (_hf_config(vision__layer_norm_eps=1e-6), 'layer_norm_eps'),
        (_hf_config(vision__patch_size=32), 'patch_size=32, but the tensors say 16'),
        (_hf_config(vision__num_hidden_layers=12), 'num_hidden_layers=12'),
        (_hf_config(text__eos_token_id=7), 'eos_token_id=7'),
        ({'vision_config': [1]}, r'config\.json: vision_config=\[1\], expected a JSON object'),
        ({'text_config': 'clip'}, "text_config='clip', expected a JSON object"),
        (_hf_config(vision__hidden_act=5), 'hidden_act=5'),
        (_hf_config(vision__hidden_act=['gelu']), r"hidden_act=\['gelu'\]"),
        (_hf_config(vision__num_attention_heads='2'), "num_attention_heads='2', expected a pos"),
        (_hf_config(vision__num_attention_heads=0), 'num_attention_heads=0, expected a positive'),
        (_hf_config(text__num_attention_heads=True), 'num_attention_heads=True'),
        (_hf_config(vision__num_attention_heads=3), '3 heads do not divide a width of 128'),
    ],
)
def test_hugging_face_config_is_checked(config, message):
    tensors = open_source(GOLDEN / 'hf').tensors
    with pytest.raises(ValueError, match=message):
        clip_params.huggingface_spec(tensors, config)


def test_hugging_face_gelu_and_heads_come_from_the_config():
    tensors = open_source(GOLDEN / 'hf').tensors
    config = _hf_config(vision__hidden_act='gelu', text__hidden_act='gelu')
    config['vision_config']['num_attention_heads'] = 4
    config['text_config']['eos_token_id'] = 2
    spec = clip_params.huggingface_spec(tensors, config)
    assert (spec.activation, spec.num_heads) == ('gelu', 4)


def test_a_missing_and_an_extra_tensor_are_named():
    tensors, spec, rows, ignore = _opened('openclip_gelu')
    tensors = dict(tensors) | {'visual.something': np.zeros(3, np.float32)}
    del tensors['visual.transformer.resblocks.0.ln_2.bias'], tensors['logit_scale']
    with pytest.raises(ConversionError) as caught:
        import_tree(tensors, rows, abstract_params(spec), ignore)
    assert caught.value.unused == ['visual.something (3,)']
    assert sorted(caught.value.unfilled) == [
        'logit_scale () (from logit_scale)',
        'visual/blocks/ln_2/bias[0] (from visual.transformer.resblocks.0.ln_2.bias)',
    ]


@pytest.mark.parametrize(
    ('name', 'change', 'message'),
    [
        ('visual.proj', None, 'no ResNet'),
        ('token_embedding.weight', None, 'token_embedding.weight is missing'),
        ('visual.positional_embedding', np.zeros((18, 128)), 'square grid'),
        ('visual.conv1.weight', np.zeros((128, 1, 16, 16)), 'expected'),
        ('visual.transformer.resblocks.0.mlp.c_fc.bias', np.zeros(640), 'MLP ratio'),
        ('visual.transformer.resblocks.99999.x', np.zeros(1), 'more blocks than tensors'),
        ('visual.proj', np.zeros(128), 'expected 2 axes'),
        ('visual.positional_embedding', np.zeros(()), 'expected 2 axes'),
        ('token_embedding.weight', np.zeros((0, 64)), 'none of them empty'),
    ],
)
def test_geometry_that_is_no_clip(name, change, message):
    tensors = dict(_gelu_safetensors().tensors)
    if change is None:
        del tensors[name]
    else:
        tensors[name] = change
    with pytest.raises(ValueError, match=message):
        clip_params.openai_spec(tensors, activation='gelu')


def test_published_sizes_are_named():
    assert clip_params.spec_name(clip.SPECS['vit_l14'], clip.SPECS) == 'vit_l14'
    gelu = dataclasses.replace(clip.SPECS['vit_b32'], activation='gelu')
    assert clip_params.spec_name(gelu, clip.SPECS) == 'vit_b32'
    other = dataclasses.replace(gelu, depth=13)
    assert clip_params.spec_name(other, clip.SPECS) == 'clip_w768_d13_p32_224'


# Opening files and folders.


def test_wrappers_and_prefixes_are_removed(tmp_path):
    tensors = {'module.a.weight': np.ones(2, np.float32), 'module.b': np.zeros((), np.float16)}
    for i, wrap in enumerate(
        (
            None,
            lambda t: {'state_dict': t, 'epoch': 1, 'optimizer': {'state': {}}},
            lambda t: {'model_state': t, 'cfg': 'TRAIN: {}', 'epoch': 2},
            lambda t: {'model': {'state_dict': t}},
        )
    ):
        source = open_source(save_state_dict(tmp_path / f'{i}.pt', tensors, wrap))
        assert source.tensors.keys() == {'a.weight', 'b'} and not source.is_torchscript


def test_wrapper_that_is_not_known(tmp_path):
    path = save_state_dict(
        tmp_path / 'a.pt', {'w': np.ones(1, np.float32)}, lambda t: {'net': t, 'epoch': 1}
    )
    with pytest.raises(ValueError, match=r"'epoch', 'net'"):
        open_source(path)


def test_container_is_recognised_by_its_bytes(tmp_path):
    path = tmp_path / 'weights.bin'
    save_file({'w': np.ones(2, np.float32)}, path)
    assert open_source(path).tensors['w'].tolist() == [1, 1]
    moved = save_state_dict(tmp_path / 'x.safetensors', {'w': np.ones(2, np.float32)})
    assert open_source(moved).tensors['w'].tolist() == [1, 1]


def test_hugging_face_bin_folders(tmp_path):
    """The same weights as .bin, whole and sharded."""
    tensors = open_source(GOLDEN / 'hf').tensors
    shutil.copy(GOLDEN / 'hf' / 'config.json', tmp_path)
    save_state_dict(tmp_path / 'pytorch_model.bin', tensors)
    whole = open_source(tmp_path)
    (tmp_path / 'pytorch_model.bin').unlink()
    names = sorted(tensors)
    parts = {'one.bin': names[:30], 'two.bin': names[30:]}
    for file, part in parts.items():
        save_state_dict(tmp_path / file, {name: tensors[name] for name in part})
    index = {'weight_map': {name: file for file, part in parts.items() for name in part}}
    (tmp_path / 'pytorch_model.bin.index.json').write_text(json.dumps(index))
    sharded = open_source(tmp_path)
    assert whole.config == sharded.config and len(sharded.files) == 2
    for name, value in tensors.items():
        np.testing.assert_array_equal(whole.tensors[name], value)
        np.testing.assert_array_equal(sharded.tensors[name], value)
    (tmp_path / 'two.bin').unlink()
    with pytest.raises(FileNotFoundError, match=r'two\.bin'):
        open_source(tmp_path)


@pytest.mark.parametrize('name', ['config.json', 'open_clip_config.json'])
@pytest.mark.parametrize(
    ('content', 'message'),
    [
        ('{"a":' * 50_000 + '1' + '}' * 50_000, 'nested too deeply'),
        ('{"a": %s}' % ('9' * 5000), 'not JSON'),
        ('\xff\xfe{', 'not JSON'),
        ('[1]', 'expected a JSON object'),
    ],
    ids=['deep', 'long number', 'no UTF-8', 'list'],
)
def test_config_beside_a_checkpoint_is_refused_by_name(tmp_path, name, content, message):
    shutil.copy(GOLDEN / 'openclip_gelu' / 'open_clip_model.safetensors', tmp_path)
    (tmp_path / name).write_text(content, encoding='latin-1')
    with pytest.raises(ValueError, match=message) as caught:
        open_source(tmp_path)
    assert str(tmp_path / name) in str(caught.value)


def test_a_fifo_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / 'model.pt')
    with pytest.raises(ValueError, match=r'model\.pt: neither a file nor a folder'):
        open_source(tmp_path / 'model.pt')
    with pytest.raises(FileNotFoundError, match='found none'):
        open_source(tmp_path)


@pytest.mark.parametrize(
    ('shape', 'size', 'message'),
    [
        ([0, 2**64 - 1], 0, 'which no network has'),
        ([1] * 100, 1, 'which no network has'),
        ([2**40], 2**40, 'damaged safetensors'),
    ],
)
def test_sizes_that_no_tensor_has(tmp_path, shape, size, message):
    entry = {'dtype': 'U8', 'shape': shape, 'data_offsets': [0, size]}
    text = json.dumps({'w': entry}).encode()
    path = tmp_path / 'a.safetensors'
    path.write_bytes(len(text).to_bytes(8, 'little') + text + bytes(min(size, 1)))
    with pytest.raises(ValueError, match=message):
        open_source(path)


def test_header_of_another_length_than_the_file(tmp_path):
    path = tmp_path / 'a.safetensors'
    path.write_bytes((2**62).to_bytes(8, 'little') + b'{}')
    with pytest.raises(
        ValueError, match=r'a\.safetensors: .* a header of 4611686018427387904 bytes'
    ):
        open_source(path)


@pytest.mark.parametrize(
    ('index', 'message'),
    [
        ('{"weight_map": {"a": "../../etc/passwd"}}', 'outside of its folder'),
        ('{"weight_map": {"a": 3}}', 'outside of its folder'),
        ('{"weight_map": 3}', 'not a shard index'),
        ('{', 'not a shard index'),
        ('[' * 50_000, 'nested too deeply'),
    ],
)
def test_shard_index_cannot_point_elsewhere(tmp_path, index, message):
    (tmp_path / 'model.safetensors.index.json').write_text(index)
    with pytest.raises(ValueError, match=message):
        open_source(tmp_path)


def test_folder_with_several_checkpoints(tmp_path):
    for name in ('a.pt', 'b.pt'):
        save_state_dict(tmp_path / name, {'w': np.ones(1, np.float32)})
    with pytest.raises(FileNotFoundError, match=r"'a\.pt', 'b\.pt'"):
        open_source(tmp_path)


def test_safetensors_views_and_damage(tmp_path):
    path = tmp_path / 'a.safetensors'
    tensors = {'w': np.arange(6, dtype=np.float16).reshape(2, 3), 'e': np.zeros((0, 3), np.int8)}
    save_file(tensors, path)
    read = source_files.read_safetensors(path)
    for name, value in load_file(path).items():
        np.testing.assert_array_equal(read[name], value)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match='damaged safetensors'):
        open_source(path)


def test_digest_of_one_and_of_several_files(tmp_path):
    for name in ('b', 'a'):
        (tmp_path / name).write_text(name)
    records, digest = source_files.sources_record([tmp_path / 'a'])
    assert digest == records[0]['sha256'] == source_files.file_sha256(tmp_path / 'a')
    records, both = source_files.sources_record([tmp_path / 'b', tmp_path / 'a'])
    assert [record['file'] for record in records] == ['a', 'b'] and both != digest
