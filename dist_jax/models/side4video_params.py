"""Side4Video checkpoints of the authors: names, geometry, tables.

Source: names of the released recognition files (a pickled dict, state dict under
`model_state_dict`, maybe with the prefix `module.`). Networks beside CLIP and beside EVA have other
names and another form. The files hold the whole frozen image tower too; those tensors are
recognised by name and left out.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from dist_jax.models import clip, clip_params, eva_params, side4video, side_network
from dist_jax.models.backbone import Backbone
from dist_jax.models.clip_params import fused_attention_rows, linear_rows, norm_rows, output_rows
from dist_jax.models.naming import Export, Inside, Naming, Options, Plan, abstract_network
from dist_jax.models.params import ALL, Row, Tree, hidden_ratio, numbered, tensor_shape
from dist_jax.models.source_files import SourceFiles

COLLECTIONS = ('batch_stats',)

_STEM = 'visual.side_conv1.weight'
# Root of all but the stem, and the blocks below it.
_ON_CLIP = ('visual.transformer.', 'side_transformer')
_ON_EVA = ('visual.', 'side_blocks')


_RETRIEVAL = 'clip.'


def is_side4video_naming(tensors: Mapping[str, Any]) -> bool:
    """Names of the authors' files, without `module.`; those for retrieval too, to say so."""
    return _STEM in tensors or f'{_RETRIEVAL}{_STEM}' in tensors


def infer_hparams(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Every size of a recognition network that its tensors show.

    Args:
      tensors: names without `module.` -> array; only shapes are read.

    Returns:
      side_dim, depth (of the side network), width (of the backbone), patch_size, grid (patches
      along a side), mlp_ratio, num_classes, post_norm (the form that goes with EVA).

    Raises:
      ValueError: a tensor that shows a size is missing or has another shape.
    """

    shape = functools.partial(tensor_shape, tensors, family='Side4Video')

    post_norm = f'{_ON_EVA[0]}side_spatial_position_embeddings' in tensors
    root, blocks = _ON_EVA if post_norm else _ON_CLIP
    side_dim, _, _, patch_size, _ = shape(_STEM, 5)
    patches = shape(f'{root}side_spatial_position_embeddings', 2)[0]
    grid = math.isqrt(patches)
    if grid * grid != patches:
        raise ValueError(
            f'{root}side_spatial_position_embeddings has {patches} rows, which is no square; only '
            'square grids of patches are supported'
        )
    hidden = shape(f'{root}{blocks}.0.mlp.{"0" if post_norm else "fc1"}.weight', 2)[0]
    return {
        'side_dim': side_dim,
        'depth': numbered(tensors, f'{root}side_linears.'),
        'width': shape(f'{root}side_linears.0.weight', 2)[1],
        'patch_size': patch_size,
        'grid': grid,
        'mlp_ratio': hidden_ratio(hidden, side_dim),
        'num_classes': shape('fc.weight', 2)[0],
        'post_norm': post_norm,
    }


def side4video_rows(hparams: Mapping[str, Any]) -> list[Row]:
    """Table of the names. Reads side_dim, depth and post_norm."""
    post_norm = hparams['post_norm']
    root, blocks = _ON_EVA if post_norm else _ON_CLIP
    num_heads = hparams['side_dim'] // side_network.HEAD_DIM
    rows = [
        Row(_STEM, 'stem/kernel', 'o i t h w -> t h w i o'),
        Row('visual.side_conv1.bias', 'stem/bias'),
        *batch_norm_rows('visual.side_pre_bn3d', 'stem_bn'),
        Row(f'{root}side_spatial_position_embeddings', 'positional_embedding'),
        *linear_rows('fc', 'head/column_0/classifier'),
    ]
    if not post_norm:
        rows += batch_norm_rows('visual.side_post_bn', 'post_bn')
    for i in range(hparams['depth']):
        source, index = f'{root}{blocks}.{i}', (i,)
        rows += norm_rows(f'{root}side_lns.{i}', 'layers/tap/norm', index)
        rows += linear_rows(f'{root}side_linears.{i}', 'layers/tap/linear', index)
        for name in ('bn_1', 'bn_2'):
            rows += batch_norm_rows(f'{source}.{name}', f'layers/{name}', index)
        for number, name, pattern in (
            (0, 'pw_1', 'o i 1 1 1 -> i o'),
            (1, 'dw', 'c 1 t 1 1 -> t c'),
            (2, 'pw_2', 'o i 1 1 1 -> i o'),
        ):
            conv, target = f'{source}.conv.{number}', f'layers/conv/{name}'
            rows.append(Row(f'{conv}.weight', f'{target}/kernel', pattern, index))
            rows.append(Row(f'{conv}.bias', f'{target}/bias', index=index))
        rows += norm_rows(f'{source}.ln_1', 'layers/ln', index)
        if post_norm:
            rows += _separate_attention_rows(f'{source}.attn', 'layers/attn', num_heads, index)
        else:
            rows += fused_attention_rows(f'{source}.attn.', 'layers/attn/', num_heads, index)
        first, second = ('0', '2') if post_norm else ('fc1', 'fc2')
        rows += linear_rows(f'{source}.mlp.{first}', 'layers/mlp/c_fc', index)
        rows += linear_rows(f'{source}.mlp.{second}', 'layers/mlp/c_proj', index)
    return rows


def batch_norm_rows(source: str, target: str, index: tuple[int, ...] = ()) -> list[Row]:
    """`nn.BatchNorm`: scale and bias among the parameters, running values in `batch_stats`."""
    return [
        *norm_rows(source, target, index),
        Row(f'{source}.running_mean', f'{COLLECTIONS[0]}/{target}/mean', index=index),
        Row(f'{source}.running_var', f'{COLLECTIONS[0]}/{target}/var', index=index),
    ]


def _separate_attention_rows(
    source: str, target: str, num_heads: int, index: tuple[int, ...]
) -> list[Row]:
    """Projections q, k, v with a matrix each, and `proj`."""
    rows, sizes = [], {'h': num_heads}
    for slot, name in enumerate(('q_proj', 'k_proj', 'v_proj')):
        kernel, bias = f'{target}/qkv/kernel', f'{target}/qkv/bias'
        place = (*index, ALL, slot)
        rows.append(Row(f'{source}.{name}.weight', kernel, '(h d) c -> c h d', place, sizes))
        rows.append(Row(f'{source}.{name}.bias', bias, '(h d) -> h d', (*index, slot), sizes))
    return rows + output_rows(f'{source}.proj', f'{target}/out', num_heads, index)


BUILD_OPTIONS = ('side_dim', 'post_norm', 'mlp_ratio')


def build_options(hparams: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `side4video.build` that the hyper-parameters of `infer_hparams` give."""
    return {name: hparams[name] for name in BUILD_OPTIONS}


def run_hparams(model: Mapping[str, Any], backbone: Mapping[str, Any]) -> dict[str, Any]:
    """What `side4video_rows` reads, from the `model` fields and the backbone's spec of a run."""
    return {
        'side_dim': model['side_dim'],
        'depth': backbone['depth'] // model['tap_every'],
        'post_norm': model['post_norm'],
    }


def abstract_variables(hparams: Mapping[str, Any]) -> Tree:
    """Parameters and statistics as they are stored, float32 `jax.ShapeDtypeStruct` leaves."""
    size = hparams['grid'] * hparams['patch_size']
    spec = clip.ClipSpec(
        size, hparams['patch_size'], hparams['width'], hparams['depth'], 1, 1, 1, 1, 1
    )
    model = side4video.build(
        Backbone(clip.KIND, spec),
        num_classes=(hparams['num_classes'],),
        num_frames=1,
        dtype=jnp.float32,
        **build_options(hparams),
    )
    return abstract_network(model, (1, 1, size, size, 3), (hparams['num_classes'],))


# Source: neither tower of text nor what is behind the last block is in the released files, but on
# EVA the last norm and the map to the embedding are.
_TEXT = ('text', 'logit_scale')
INSIDE = {
    'clip': Inside(
        clip_params.frozen_names,
        clip_params.frozen_geometry,
        clip_params.openai_rows,
        left_out=(*_TEXT, 'visual/ln_post', 'visual/proj'),
    ),
    'eva': Inside(
        eva_params.frozen_names, eva_params.frozen_geometry, eva_params.baai_rows, left_out=_TEXT
    ),
}


def tap_every(tensors: Mapping[str, Any], hparams: Mapping[str, Any]) -> int | None:
    """`tap_every` of `side4video.build`, by the backbone inside a file; None without one.

    Args:
      tensors: names without `module.` -> array; only shapes are read.
      hparams: of `infer_hparams`.

    Raises:
      ValueError: the backbone inside has other patches, or another width or depth, than the
        network reads.
    """
    inside = INSIDE['eva' if hparams['post_norm'] else 'clip']
    if not inside.names(tensors):
        return None
    found, depth = inside.geometry(tensors), hparams['depth']
    every = found['depth'] // (depth + 1) + 1
    ours = {field: hparams[field] for field in ('width', 'patch_size')}
    ours['image_size'] = hparams['grid'] * hparams['patch_size']
    theirs = {field: found[field] for field in ours}
    if found['depth'] // every != depth or theirs != ours:
        raise ValueError(
            f'a network of {depth} layers beside blocks of {_sizes(ours)}, but the backbone inside '
            f'has {found["depth"]} blocks of {_sizes(theirs)}'
        )
    return every


def _sizes(found: Mapping[str, int]) -> str:
    return (
        f'width {found["width"]}, for images of {found["image_size"]} pixels in patches of '
        f'{found["patch_size"]}'
    )


def _plan(source: SourceFiles, options: Options) -> Plan:
    options.refuse('side4video', 'all sizes are in its files')
    tensors = source.tensors
    if _STEM not in tensors and f'{_RETRIEVAL}{_STEM}' in tensors:
        raise ValueError(
            f'its names start with {_RETRIEVAL!r}, as those of Side4Video for retrieval do; files '
            'for retrieval are not read yet, those for recognition are'
        )
    hparams = infer_hparams(tensors)
    hparams['tap_every'] = tap_every(tensors, hparams)
    backbone = 'eva' if hparams['post_norm'] else 'clip'
    sizes = f'p{hparams["patch_size"]}_{hparams["side_dim"]}x{hparams["depth"]}'
    return Plan(
        name=f'side4video_{backbone}_{sizes}',
        spec=hparams,
        tensors=tensors,
        rows=side4video_rows(hparams),
        abstract=abstract_variables(hparams),
        ignore=('*.num_batches_tracked', *eva_params.IGNORE),
        collections=COLLECTIONS,
        backbone=backbone,
    )


NAMINGS = (
    Naming(
        kind='side4video',
        family='side4video',
        matches=lambda source: is_side4video_naming(source.tensors),
        plan=_plan,
        export=Export(side4video_rows, run_hparams, prefix='', head='linear'),
        inside=INSIDE,
    ),
)
