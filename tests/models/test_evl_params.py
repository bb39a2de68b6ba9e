"""EVL files of the authors: sizes, options, there and back."""

from pathlib import Path

import jax
import numpy as np
import pytest
from released import assert_same_tensors
from safetensors.numpy import load_file

from dist_jax import main
from dist_jax.models import converted, evl_params
from dist_jax.models.params import export_tree, import_tree, tree_sha256
from dist_jax.models.source_files import read_safetensors
from tools.fuzzing.torch_files import save_state_dict

GOLDEN = Path(__file__).parent.parent / 'golden' / 'evl_small.safetensors'
SIZES = {
    'depth': 2,
    'width': 16,
    'qkv_dim': 24,
    'mlp_ratio': 2.5,
    'num_classes': 3,
    'num_frames': 4,
    'grid': 3,
    'temporal_conv': True,
    'temporal_positions': True,
    'temporal_cross_attention': True,
}


@pytest.fixture(scope='module')
def released():
    """Recorded parameters."""
    return {
        name.removeprefix('params/'): np.array(value)
        for name, value in read_safetensors(GOLDEN).items()
        if name.startswith('params/')
    }


def _main(*args):
    return main.main(['convert', *map(str, args)])


def test_sizes_come_from_shapes(released):
    assert evl_params.is_evl_naming(released)
    assert evl_params.infer_hparams(released) == {
        'depth': 2,
        'width': 128,
        'qkv_dim': 128,
        'mlp_ratio': 2.0,
        'num_classes': 7,
        'num_frames': 4,
        'grid': 4,
        'temporal_conv': True,
        'temporal_positions': True,
        'temporal_cross_attention': True,
    }


def test_released_file_converts_and_exports_bit_equal(released, tmp_path, capsys):
    """A pickled dict, state dict under `model`, `module.` before the names, no backbone."""
    released = {f'module.{name}': value for name, value in released.items()}
    source = save_state_dict(tmp_path / 'evl.pth', released, lambda net: {'model': net})
    assert _main(source, tmp_path / 'evl') == 0
    metadata = converted.load_metadata(tmp_path / 'evl')
    assert (metadata['family'], metadata['name']) == ('evl', 'evl_4f_dec2x128')
    assert metadata['ignored'] == []
    assert _main('--export', tmp_path / 'evl', tmp_path / 'out.safetensors') == 0
    written = load_file(tmp_path / 'out.safetensors')
    assert_same_tensors(written, released)
    assert _main(source, tmp_path / 'other', '--num_heads', '2') == 2
    assert 'model.num_heads' in capsys.readouterr().err


@pytest.mark.parametrize(
    'changed',
    [
        {},
        {'temporal_conv': False},
        {'temporal_positions': False, 'num_frames': None},
        {'temporal_cross_attention': False, 'grid': None},
        {'depth': 1, 'num_frames': 1, 'grid': 1},
    ],
)
def test_other_geometries_round_trip(changed):
    sizes = SIZES | changed
    rng = np.random.default_rng(0)
    tree = jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape).astype(np.float32),
        evl_params.abstract_params(sizes),
    )
    tensors = export_tree(tree, evl_params.evl_rows(sizes))
    assert evl_params.infer_hparams(tensors) == sizes
    abstract = evl_params.abstract_params(sizes)
    again = import_tree(tensors, evl_params.evl_rows(sizes), abstract)
    assert tree_sha256(again) == tree_sha256(tree)


@pytest.mark.parametrize(
    ('name', 'value', 'message'),
    [
        ('decoder.cls_token', None, 'decoder.cls_token is missing'),
        ('decoder.cross_attention.0.w1', np.zeros((48, 128)), '48 offsets'),
        ('decoder.decoder_layers.0.attn.q_proj.weight', np.zeros(3), 'expected 2 axes'),
        ('decoder.decoder_layers.77777.x', np.zeros(1), 'more blocks than tensors'),
    ],
)
def test_incomplete_files_are_named(released, name, value, message):
    tensors = dict(released)
    if value is None:
        del tensors[name]
    else:
        tensors[name] = value
    with pytest.raises(ValueError, match=message):
        evl_params.infer_hparams(tensors)
