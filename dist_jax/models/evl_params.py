"""EVL checkpoints of the authors: names, geometry, table.

Source: names of the released files (a pickled dict, state dict under `model`, prefix `module.`).
They hold no backbone, and neither the number of heads nor which CLIP they belong to.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from dist_jax.models import clip, evl
from dist_jax.models.backbone import Backbone
from dist_jax.models.clip_params import linear_rows, norm_rows
from dist_jax.models.naming import Export, Naming, Options, Plan, abstract_network
from dist_jax.models.params import Row, Tree, hidden_ratio, numbered, tensor_shape
from dist_jax.models.source_files import SourceFiles

RELEASE_PREFIX = 'module.'


def is_evl_naming(tensors: Mapping[str, Any]) -> bool:
    """Names of the authors' files."""
    return 'decoder.cls_token' in tensors and 'proj.2.weight' in tensors


def infer_hparams(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Every size of an EVL decoder that its tensors show.

    Args:
      tensors: names without `module.` -> array; only shapes are read.

    Returns:
      depth, width (of the CLIP), qkv_dim, mlp_ratio, num_classes; temporal_conv,
      temporal_positions, temporal_cross_attention; num_frames (None without positions) and grid
      (patches along a side, None without cross-attention). The number of heads is not in the file.

    Raises:
      ValueError: a tensor that shows a size is missing or has another shape.
    """

    shape = functools.partial(tensor_shape, tensors, family='EVL')

    (width,) = shape('decoder.cls_token', 1)
    first = 'decoder.decoder_layers.0'
    has = {
        option: any(name.startswith(f'decoder.{module}.') for name in tensors)
        for option, module in _TEMPORAL_MODULES.items()
    }
    num_frames = grid = None
    if has['temporal_positions']:
        num_frames = shape('decoder.temporal_pos_embed.0', 2)[0]
    if has['temporal_cross_attention']:
        offsets = shape('decoder.cross_attention.0.w1', 2)[0]
        side = math.isqrt(offsets)
        if side * side != offsets or side % 2 == 0:
            raise ValueError(
                f'decoder.cross_attention.0.w1 has {offsets} offsets, which is no (2 g - 1) '
                'squared; only square grids of patches are supported'
            )
        grid = (side + 1) // 2
    return {
        'depth': numbered(tensors, 'decoder.decoder_layers.'),
        'width': width,
        'qkv_dim': shape(f'{first}.attn.q_proj.weight', 2)[0],
        'mlp_ratio': hidden_ratio(shape(f'{first}.mlp.fc1.weight', 2)[0], width),
        'num_classes': shape('proj.2.weight', 2)[0],
        'num_frames': num_frames,
        'grid': grid,
        **has,
    }


_TEMPORAL_MODULES = {
    'temporal_conv': 'temporal_conv',
    'temporal_positions': 'temporal_pos_embed',
    'temporal_cross_attention': 'cross_attention',
}


def evl_rows(hparams: Mapping[str, Any]) -> list[Row]:
    """Table of the names. Reads depth and the three temporal options."""
    rows = [
        Row('decoder.cls_token', 'cls_token'),
        *norm_rows('proj.0', 'head_norm'),
        *linear_rows('proj.2', 'head/column_0/classifier'),
    ]
    for i in range(hparams['depth']):
        source, index = f'decoder.decoder_layers.{i}', (i,)
        for name in ('norm1', 'norm2', 'norm3'):
            rows += norm_rows(f'{source}.{name}', f'layers/{name}', index)
        for name in ('q', 'k', 'v', 'out'):
            rows += linear_rows(f'{source}.attn.{name}_proj', f'layers/attn/{name}', index)
        rows += linear_rows(f'{source}.mlp.fc1', 'layers/mlp/c_fc', index)
        rows += linear_rows(f'{source}.mlp.fc2', 'layers/mlp/c_proj', index)
        if hparams['temporal_conv']:
            conv, target = f'decoder.temporal_conv.{i}', 'layers/temporal/conv'
            rows.append(Row(f'{conv}.weight', f'{target}/kernel', 'c 1 t -> t c', index))
            rows.append(Row(f'{conv}.bias', f'{target}/bias', index=index))
        if hparams['temporal_positions']:
            rows.append(
                Row(f'decoder.temporal_pos_embed.{i}', 'layers/temporal/positions', index=index)
            )
        if hparams['temporal_cross_attention']:
            for side, name in enumerate(('w1', 'w2')):  # frame before, frame after
                rows.append(
                    Row(
                        f'decoder.cross_attention.{i}.{name}',
                        'layers/temporal/relative',
                        index=(i, side),
                    )
                )
    return rows


BUILD_OPTIONS = ('depth', 'qkv_dim', 'mlp_ratio', *_TEMPORAL_MODULES)


def build_options(hparams: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `evl.build` that the hyper-parameters of `infer_hparams` give."""
    return {name: hparams[name] for name in BUILD_OPTIONS}


def run_hparams(model: Mapping[str, Any], backbone: Mapping[str, Any]) -> dict[str, Any]:
    """What `evl_rows` reads, from the `model` fields and the backbone's spec of a run."""
    del backbone
    return {name: model[name] for name in ('depth', *_TEMPORAL_MODULES)}


def abstract_params(hparams: Mapping[str, Any]) -> Tree:
    """The trainable tree as float32 `jax.ShapeDtypeStruct` leaves."""
    grid, width, depth = hparams['grid'] or 1, hparams['width'], hparams['depth']
    frames = hparams['num_frames'] or 1
    model = evl.build(
        Backbone(clip.KIND, clip.ClipSpec(grid, 1, width, depth, 1, 1, 1, 1, 1)),
        num_classes=(hparams['num_classes'],),
        num_frames=frames,
        num_heads=1,  # shapes do not depend on it
        dtype=jnp.float32,
        **build_options(hparams),
    )
    return abstract_network(model, (1, frames, grid, grid, 3), (hparams['num_classes'],))


def _plan(source: SourceFiles, options: Options) -> Plan:
    options.refuse(
        'evl', 'an EVL decoder has no activation to choose; set model.num_heads to train'
    )
    hparams = infer_hparams(source.tensors)
    frames = '' if hparams['num_frames'] is None else f'_{hparams["num_frames"]}f'
    return Plan(
        name=f'evl{frames}_dec{hparams["depth"]}x{hparams["qkv_dim"]}',
        spec=hparams,
        tensors=source.tensors,
        rows=evl_rows(hparams),
        abstract=abstract_params(hparams),
    )


NAMINGS = (
    Naming(
        kind='evl',
        family='evl',
        matches=lambda source: is_evl_naming(source.tensors),
        plan=_plan,
        export=Export(evl_rows, run_hparams, prefix=RELEASE_PREFIX, head='linear'),
    ),
)
