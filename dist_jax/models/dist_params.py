"""DiST checkpoints of the authors: names, geometry, table.

Source: names of the released `.pyth` files (`model_state`, prefix `backbone.base_encoder.`), and
the older `ladder_net` names, which differ in the first two components only.

A file also holds a copy of the frozen CLIP; those tensors are recognised by name and left out.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from dist_jax.models import clip, dist
from dist_jax.models.backbone import Backbone
from dist_jax.models.clip_params import (
    OPENAI_IGNORE,
    frozen_geometry,
    frozen_names,
    fused_attention_rows,
    linear_rows,
    norm_rows,
    openai_rows,
)
from dist_jax.models.naming import Export, Inside, Naming, Options, Plan, abstract_network
from dist_jax.models.params import Row, Tree, hidden_ratio, numbered, tensor_shape
from dist_jax.models.source_files import SourceFiles

RELEASE_PREFIX = 'backbone.base_encoder.'

# Component after `ladder_net.` -> component after `dist_net.`; what is not listed kept its name.
LADDER_NAMES = {
    'input_map_feat_nets': 'input_linears',
    's2t_fuse_nets': 'integration2temporal_nets',
    't2s_fuse_nets': 'temporal2integration_nets',
    'spatial_nets': 'integration_nets',
    'final_temporal_nets': 'adapooling_nets',
}


def is_dist_naming(tensors: Mapping[str, Any]) -> bool:
    """Names of the authors' files, current or old."""
    return any(name.startswith('dist_net.') for name in current_names(tensors).values())


def current_names(names: Mapping[str, Any]) -> dict[str, str]:
    """Name in a file -> current name without prefix."""
    renamed = {}
    for name in names:
        new = name.removeprefix('module.').removeprefix(RELEASE_PREFIX)
        if new.startswith('ladder_net.'):
            first, dot, rest = new.removeprefix('ladder_net.').partition('.')
            new = f'dist_net.{LADDER_NAMES.get(first, first)}{dot}{rest}'
        renamed[name] = new
    return renamed


def rename(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Tensors under their current names.

    Raises:
      ValueError: two tensors of the file mean the same parameter.
    """
    result: dict[str, np.ndarray] = {}
    origin: dict[str, str] = {}
    for old, new in current_names(tensors).items():
        if new in result:
            raise ValueError(f'{old} and {origin[new]} both mean {new}; remove one of them')
        result[new], origin[new] = tensors[old], old
    return result


def infer_hparams(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Every size of a DiST network that its tensors show.

    Args:
      tensors: current names (see `rename`) -> array; only shapes are read.

    Returns:
      integration_dim, temporal_dim, num_layers, num_frames, alpha, patch_size,
      ada_pooling_layers, embed_dim, width (of the CLIP that it was trained on),
      temporal_conv_mlp_ratio, integration_mlp_ratio, integration_temporal_mlp_ratio,
      temporal_patch, temporal_kernel. Which CLIP blocks were selected is not in the file unless
      it is all of them.

    Raises:
      ValueError: a tensor that shows a size is missing or has another rank.
    """

    shape = functools.partial(tensor_shape, tensors, family='DiST')

    stem = shape('dist_net.temporal_stem.weight', 5)
    temporal_dim, _, temporal_patch, _, patch_size = stem
    integration_dim, width = shape('dist_net.input_linears.0.weight', 2)
    alpha = shape('dist_net.temporal2integration_nets.0.linear_fuse.weight', 5)[2]
    frozen_frames = shape('dist_net.temporal2integration_nets.0.cls_token', 4)[2]
    temporal = shape('dist_net.temporal_nets.0.temporal_net.c_fc1.weight', 5)
    ffn = shape('dist_net.integration_nets.0.ffn.c_fc.weight', 2)
    temporal_ffn = shape('dist_net.integration_nets.0.temporal_ffn.c_fc2.weight', 5)
    if temporal[2] != temporal_ffn[2]:
        raise ValueError(
            f'temporal kernels of {temporal[2]} and {temporal_ffn[2]} frames in one network; '
            'one size for both is supported'
        )
    return {
        'integration_dim': integration_dim,
        'temporal_dim': temporal_dim,
        'num_layers': numbered(tensors, 'dist_net.input_linears.'),
        'num_frames': frozen_frames * alpha,
        'alpha': alpha,
        'patch_size': patch_size,
        'ada_pooling_layers': numbered(tensors, 'dist_net.adapooling_nets.'),
        'embed_dim': shape('dist_net.proj', 2)[1],
        'width': width,
        'temporal_patch': temporal_patch,
        'temporal_kernel': temporal[2],
        'temporal_conv_mlp_ratio': hidden_ratio(temporal[0], temporal_dim),
        'integration_mlp_ratio': hidden_ratio(ffn[0], integration_dim),
        'integration_temporal_mlp_ratio': hidden_ratio(temporal_ffn[0], integration_dim),
    }


def dist_rows(hparams: Mapping[str, Any]) -> list[Row]:
    """Table of the current names. Reads integration_dim, num_layers, ada_pooling_layers."""
    conv = 'o i t h w -> t h w i o'
    pointwise = 'o i 1 1 1 -> i o'
    along_time = 'o i t 1 1 -> t i o'
    rows = [
        Row('dist_net.temporal_stem.weight', 'temporal_stem/kernel', conv),
        Row('dist_net.temporal_stem.bias', 'temporal_stem/bias'),
        Row('dist_net.aggregated_cls_token', 'aggregated_cls_token', '1 1 c -> c'),
        Row('dist_net.aggregated_spatial_cls_token', 'aggregated_spatial_cls_token', '1 1 c -> c'),
        *linear_rows('dist_net.proj_spatial_cls_token', 'proj_spatial_cls_token'),
        *norm_rows('dist_net.ln_post', 'ln_post'),
        Row('dist_net.proj', 'proj/kernel'),
    ]
    num_layers = hparams['num_layers']
    for i in range(num_layers):
        # The last layer feeds nothing back into the temporal encoder and lives apart.
        target, index = ('layers', (i,)) if i < num_layers - 1 else ('last_layer', ())

        def weights(source: str, name: str, pattern: str, target=target, index=index) -> list[Row]:
            return [
                Row(f'{source}.weight', f'{target}/{name}/kernel', pattern, index),
                Row(f'{source}.bias', f'{target}/{name}/bias', index=index),
            ]

        temporal = f'dist_net.temporal_nets.{i}'
        to_integration = f'dist_net.temporal2integration_nets.{i}'
        integration = f'dist_net.integration_nets.{i}'
        rows += [
            *norm_rows(f'{temporal}.ln', f'{target}/temporal_net/ln', index),
            *weights(f'{temporal}.temporal_net.c_fc1', 'temporal_net/c_fc1', along_time),
            *weights(
                f'{temporal}.temporal_net.c_fc2', 'temporal_net/c_fc2', 'o i 1 h w -> h w i o'
            ),
            *linear_rows(f'dist_net.input_linears.{i}', f'{target}/input_linear', index),
            *linear_rows(
                f'dist_net.integration2temporal_nets.{i}.linear_fuse',
                f'{target}/integration2temporal',
                index,
            ),
            *weights(f'{to_integration}.linear_fuse', 'temporal2integration', along_time),
            Row(
                f'{to_integration}.cls_token',
                f'{target}/temporal2integration/cls_token',
                '1 1 t c -> t c',
                index,
            ),
            *norm_rows(f'{integration}.ln', f'{target}/integration_net/ln', index),
            *norm_rows(
                f'{integration}.ln_temporal', f'{target}/integration_net/ln_temporal', index
            ),
            *linear_rows(f'{integration}.ffn.c_fc', f'{target}/integration_net/ffn/c_fc', index),
            *linear_rows(
                f'{integration}.ffn.c_proj', f'{target}/integration_net/ffn/c_proj', index
            ),
        ]
        for name, pattern in (('c_fc1', pointwise), ('c_fc2', along_time), ('c_proj', pointwise)):
            rows += weights(
                f'{integration}.temporal_ffn.{name}',
                f'integration_net/temporal_ffn/{name}',
                pattern,
            )
    heads = hparams['integration_dim'] // dist.ADA_POOLING_HEAD_DIM
    for j in range(hparams['ada_pooling_layers']):
        source, target = f'dist_net.adapooling_nets.{j}', f'adapooling_{j}'
        rows.append(
            Row(
                f'{source}.positional_embedding',
                f'{target}/positional_embedding',
                '1 t c -> t c',
            )
        )
        for name in ('spatial_transformer', 'temporal_transformer'):
            rows += norm_rows(f'{source}.{name}.ln_1', f'{target}/{name}/ln_1')
            rows += fused_attention_rows(f'{source}.{name}.attn.', f'{target}/{name}/attn/', heads)
        for name in ('ln_out_spat_cls_token', 'ln_out_temp_cls_token'):
            rows += norm_rows(f'{source}.{name}', f'{target}/{name}')
        for name in ('output_map_spatial_cls_token', 'output_map_cls_token'):
            for part in ('c_fc', 'c_proj'):
                rows += linear_rows(f'{source}.{name}.{part}', f'{target}/{name}/{part}')
    return rows


BUILD_OPTIONS = (
    'num_frames',
    'alpha',
    'integration_dim',
    'temporal_dim',
    'temporal_patch',
    'temporal_kernel',
    'temporal_conv_mlp_ratio',
    'integration_mlp_ratio',
    'integration_temporal_mlp_ratio',
    'ada_pooling_layers',
)


def build_options(hparams: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `dist.build` among the hyper-parameters of `infer_hparams`."""
    return {name: hparams[name] for name in BUILD_OPTIONS}


def run_hparams(model: Mapping[str, Any], backbone: Mapping[str, Any]) -> dict[str, Any]:
    """What `dist_rows` reads, from the `model` fields and the backbone's spec of a run."""
    return {
        'integration_dim': model['integration_dim'],
        'num_layers': len(model['selected_layers']) or backbone['depth'],
        'ada_pooling_layers': model['ada_pooling_layers'],
    }


def abstract_params(hparams: Mapping[str, Any]) -> Tree:
    """The trainable tree of a text-head DiST as float32 `jax.ShapeDtypeStruct` leaves."""
    width, patch = hparams['width'], hparams['patch_size']
    spec = clip.ClipSpec(
        image_size=patch,
        patch_size=patch,
        width=width,
        depth=hparams['num_layers'],
        num_heads=1,
        embed_dim=hparams['embed_dim'],
        text_width=1,
        text_depth=1,
        text_num_heads=1,
    )
    model = dist.build(
        Backbone(clip.KIND, spec), num_classes=(1,), dtype=jnp.float32, **build_options(hparams)
    )
    return abstract_network(model, (1, hparams['num_frames'], patch, patch, 3), (1,))


def _plan(source: SourceFiles, options: Options) -> Plan:
    options.refuse('dist', 'a DiST network has neither')
    tensors = rename(source.tensors)
    hparams = infer_hparams(tensors)
    return Plan(
        name=f'dist_{hparams["num_frames"] // hparams["alpha"]}+{hparams["num_frames"]}f',
        spec=hparams,
        tensors=tensors,
        rows=dist_rows(hparams),
        abstract=abstract_params(hparams),
        ignore=OPENAI_IGNORE,
        backbone='clip',
    )


NAMINGS = (
    Naming(
        kind='dist',
        family='dist',
        matches=lambda source: is_dist_naming(source.tensors),
        plan=_plan,
        export=Export(dist_rows, run_hparams, prefix=RELEASE_PREFIX, head='text'),
        inside={'clip': Inside(frozen_names, frozen_geometry, openai_rows)},
    ),
)
