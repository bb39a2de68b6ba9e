"""DiST files of the authors: current and old names, sizes, export."""

from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from dist_jax.models import clip_params, dist_params
from dist_jax.models.params import (
    ConversionError,
    export_file,
    flatten,
    import_tree,
    outgoing,
    tree_sha256,
)
from dist_jax.models.source_files import read_safetensors

GOLDEN = Path(__file__).parent.parent / 'golden' / 'dist_small.safetensors'


@pytest.fixture(scope='module')
def released():
    """Recorded parameters."""
    return {
        name.removeprefix('params/'): value
        for name, value in read_safetensors(GOLDEN).items()
        if name.startswith('params/')
    }


@pytest.fixture(scope='module')
def frozen():
    """The copy of the backbone that released files carry."""
    return {
        name.removeprefix('backbone/'): value
        for name, value in read_safetensors(GOLDEN).items()
        if name.startswith('backbone/')
    }


def _import(tensors):
    tensors = dist_params.rename(tensors)
    hparams = dist_params.infer_hparams(tensors)
    rows = dist_params.dist_rows(hparams)
    ignore = (*clip_params.frozen_names(tensors), *clip_params.OPENAI_IGNORE)
    return import_tree(tensors, rows, dist_params.abstract_params(hparams), ignore), hparams


def _export(tree, hparams, path, **options):
    rows, prefix = dist_params.dist_rows(hparams), dist_params.RELEASE_PREFIX
    export_file(outgoing(tree, rows, prefix), path, **options)
    return load_file(path)


def test_sizes_come_from_shapes(released):
    assert dist_params.infer_hparams(released) == {
        'integration_dim': 128,
        'temporal_dim': 32,
        'num_layers': 2,
        'num_frames': 8,
        'alpha': 2,
        'patch_size': 16,
        'ada_pooling_layers': 1,
        'embed_dim': 64,
        'width': 128,
        'temporal_patch': 5,
        'temporal_kernel': 3,
        'temporal_conv_mlp_ratio': 1.0,
        'integration_mlp_ratio': 1.0,
        'integration_temporal_mlp_ratio': 0.25,
    }


def test_export_writes_the_released_names_bit_equal(released, tmp_path):
    tree, hparams = _import(released)
    path = tmp_path / 'out.safetensors'
    _export(tree, hparams, path)
    written = load_file(path)
    assert {f'backbone.base_encoder.{name}' for name in released} == set(written)
    for name, value in released.items():
        np.testing.assert_array_equal(written[f'backbone.base_encoder.{name}'], value)
    again, _ = _import(written)
    assert tree_sha256(again) == tree_sha256(tree)
    with pytest.raises(FileExistsError):
        _export(tree, hparams, path)
    _export(tree, hparams, path, overwrite=True)
    assert [file.name for file in tmp_path.iterdir()] == ['out.safetensors']


@pytest.mark.parametrize('prefix', ['', 'backbone.base_encoder.', 'module.backbone.base_encoder.'])
def test_ladder_names_and_prefixes_give_the_same_tree(released, frozen, prefix):
    old_names = {new: old for old, new in dist_params.LADDER_NAMES.items()}
    old = {}
    for name, value in released.items():
        _, first, *rest = name.split('.')
        old['.'.join([f'{prefix}ladder_net', old_names.get(first, first), *rest])] = value
    old |= {f'{prefix}{name}': value for name, value in frozen.items()}
    assert any('s2t_fuse_nets' in name for name in old)
    assert dist_params.is_dist_naming(old)
    assert tree_sha256(_import(old)[0]) == tree_sha256(_import(released)[0])


def test_the_frozen_copy_is_known_by_name_only(released, frozen):
    everything = released | frozen | {'input_resolution': np.zeros(())}
    assert set(clip_params.frozen_names(everything)) == {*frozen}
    _import(everything)
    with pytest.raises(ConversionError) as caught:
        _import(everything | {'head.linear.weight': np.zeros((5, 64))})
    assert caught.value.unused == ['head.linear.weight (5, 64)']


def test_both_namings_of_one_parameter_are_an_error(released):
    double = released | {'ladder_net.proj': released['dist_net.proj']}
    with pytest.raises(ValueError, match='both mean dist_net'):
        _import(double)


def test_gaps_are_named(released):
    partial = {n: v for n, v in released.items() if 'integration_nets.0.ln.' not in n}
    with pytest.raises(ConversionError) as caught:
        _import(partial)
    assert len(caught.value.unfilled) == 2
    assert 'layers/integration_net/ln/bias[0]' in caught.value.unfilled[0]
    with pytest.raises(ValueError, match=r'dist_net\.proj is missing'):
        _import({n: v for n, v in released.items() if n != 'dist_net.proj'})


def _hparams(**changes):
    base = {
        'integration_dim': 64,
        'temporal_dim': 4,
        'num_layers': 3,
        'num_frames': 6,
        'alpha': 3,
        'patch_size': 2,
        'ada_pooling_layers': 2,
        'embed_dim': 5,
        'width': 7,
        'temporal_patch': 3,
        'temporal_kernel': 5,
        'temporal_conv_mlp_ratio': 2.0,
        'integration_mlp_ratio': 0.5,
        'integration_temporal_mlp_ratio': 0.125,
    }
    return base | changes


@pytest.mark.parametrize(
    'hparams',
    [_hparams(), _hparams(num_layers=1), _hparams(ada_pooling_layers=0), _hparams(alpha=1)],
    ids=['odd', 'one layer', 'no pooling', 'dense'],
)
def test_other_geometries_round_trip(hparams, tmp_path):
    """A random tree of any size: out, sizes read back, in again, the same bits."""
    rng = np.random.default_rng(0)
    abstract = dist_params.abstract_params(hparams)
    tree = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), abstract)
    assert ('layers' in tree) == (hparams['num_layers'] > 1)
    tensors = _export(tree, hparams, tmp_path / 'out.safetensors')
    again, found = _import(tensors)
    assert found == hparams
    assert tree_sha256(again) == tree_sha256(tree)


def test_released_size_has_the_published_parameter_count():
    """ViT-B/16, 8+16 frames, four pooling blocks: 26.1 M trainable parameters."""
    hparams = _hparams(
        integration_dim=384,
        temporal_dim=96,
        num_layers=12,
        num_frames=16,
        alpha=2,
        patch_size=16,
        ada_pooling_layers=4,
        embed_dim=512,
        width=768,
        temporal_patch=5,
        temporal_kernel=3,
        temporal_conv_mlp_ratio=1.0,
        integration_mlp_ratio=1.0,
        integration_temporal_mlp_ratio=0.25,
    )
    abstract = dist_params.abstract_params(hparams)
    total = sum(leaf.size for leaf in flatten(abstract).values())
    assert round(total / 1e6, 1) == 26.1
    sources = {row.source_name for row in dist_params.dist_rows(hparams)}
    assert len(sources) == 9 + 12 * 27 + 4 * 25


def test_a_linear_head_has_no_place_in_the_authors_format(released, tmp_path):
    tree, hparams = _import(released)
    tree['head'] = {'column_0': {'kernel': np.zeros((64, 5), np.float32)}}
    with pytest.raises(ConversionError, match='head/column_0/kernel'):
        _export(tree, hparams, tmp_path / 'out.safetensors')
    assert not list(tmp_path.iterdir())
