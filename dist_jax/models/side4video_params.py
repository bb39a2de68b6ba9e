"""Side4Video checkpoints of the authors: names, geometry, tables.

Source: names of the released recognition files (a pickled dict, state dict under
`model_state_dict`, maybe with the prefix `module.`). Networks beside CLIP and beside EVA have other
names and another form. The files hold the whole frozen image tower too; those tensors are
recognised by name and left out. What files for retrieval share with them is here, the rest in
`side4video_retrieval_params`.
"""

from __future__ import annotations

import dataclasses
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


@dataclasses.dataclass(frozen=True)
class Names:
    """What names of the side network do not share.

    Attributes:
      visual: prefix of the image tower, in which it is.
      root: of all but the stem and the last norm, below `visual`.
      blocks: below `root`.
      norms: of a block, before or behind the convolutions and the MLP.
      convs: of a block: linear map, convolution in time, linear map.
      mlp: of a block: the two linear maps.
      post_norm: the form that goes with EVA.
    """

    visual: str
    root: str
    blocks: str
    norms: tuple[str, str]
    convs: tuple[str, str, str]
    mlp: tuple[str, str]
    post_norm: bool

    @property
    def stem(self) -> str:
        """The kernel of the first convolution, which no other network has."""
        return f'{self.visual}side_conv1.weight'

    @property
    def rest(self) -> str:
        """Before all names but those of the stem and the last norm."""
        return f'{self.visual}{self.root}'

    @property
    def positions(self) -> str:
        """The table of positions."""
        return f'{self.rest}side_spatial_position_embeddings'


_NORMS, _CONVS = ('bn_1', 'bn_2'), ('conv.0', 'conv.1', 'conv.2')
ON_CLIP = Names(
    'visual.',
    'transformer.',
    'side_transformer',
    _NORMS,
    _CONVS,
    ('mlp.fc1', 'mlp.fc2'),
    post_norm=False,
)
ON_EVA = Names('visual.', '', 'side_blocks', _NORMS, _CONVS, ('mlp.0', 'mlp.2'), post_norm=True)


def infer_hparams(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Every size of a recognition network that its tensors show.

    Args:
      tensors: names without `module.` -> array; only shapes are read.

    Returns:
      What `side_sizes` returns, and num_classes.

    Raises:
      ValueError: a tensor that shows a size is missing or has another shape.
    """
    names = ON_EVA if ON_EVA.positions in tensors else ON_CLIP
    sizes = side_sizes(tensors, names)
    return sizes | {'num_classes': tensor_shape(tensors, 'fc.weight', 2, 'Side4Video')[0]}


def side_sizes(tensors: Mapping[str, Any], names: Names, class_rows: int = 0) -> dict[str, Any]:
    """Sizes of the side network.

    Args:
      tensors: names without `module.` -> array; only shapes are read.
      names: of this form.
      class_rows: rows of class tokens in the table of positions.

    Returns:
      side_dim, depth (of the side network), width (of the backbone), patch_size, grid (patches
      along a side), mlp_ratio, post_norm (the form that goes with EVA).

    Raises:
      ValueError: a tensor that shows a size is missing or has another shape.
    """
    shape = functools.partial(tensor_shape, tensors, family='Side4Video')
    side_dim, _, _, patch_size, _ = shape(names.stem, 5)
    patches = shape(names.positions, 2)[0] - class_rows
    grid = math.isqrt(patches)
    if grid * grid != patches:
        beside = f' beside {class_rows} of a class token' * bool(class_rows)
        raise ValueError(
            f'{names.positions} has {patches} rows{beside}, which is no square; only square grids '
            'of patches are supported'
        )
    hidden = shape(f'{names.rest}{names.blocks}.0.{names.mlp[0]}.weight', 2)[0]
    return {
        'side_dim': side_dim,
        'depth': numbered(tensors, f'{names.rest}side_linears.'),
        'width': shape(f'{names.rest}side_linears.0.weight', 2)[1],
        'patch_size': patch_size,
        'grid': grid,
        'mlp_ratio': hidden_ratio(hidden, side_dim),
        'post_norm': names.post_norm,
    }


def side4video_rows(hparams: Mapping[str, Any]) -> list[Row]:
    """Table of the names. Reads side_dim, depth and post_norm."""
    names = ON_EVA if hparams['post_norm'] else ON_CLIP
    rows = [
        *side_rows(hparams, names),
        Row(names.positions, 'positional_embedding'),
        *linear_rows('fc', 'head/column_0/classifier'),
    ]
    return rows if names.post_norm else rows + post_norm_rows(names)


def post_norm_rows(names: Names) -> list[Row]:
    """The norm behind the last layer."""
    return batch_norm_rows(f'{names.visual}side_post_bn', 'post_bn')


def side_rows(hparams: Mapping[str, Any], names: Names) -> list[Row]:
    """Stem and layers. Reads side_dim and depth."""
    num_heads = hparams['side_dim'] // side_network.HEAD_DIM
    rows = [
        Row(names.stem, 'stem/kernel', 'o i t h w -> t h w i o'),
        Row(f'{names.visual}side_conv1.bias', 'stem/bias'),
        *batch_norm_rows(f'{names.visual}side_pre_bn3d', 'stem_bn'),
    ]
    for i in range(hparams['depth']):
        source, index = f'{names.rest}{names.blocks}.{i}', (i,)
        rows += norm_rows(f'{names.rest}side_lns.{i}', 'layers/tap/norm', index)
        rows += linear_rows(f'{names.rest}side_linears.{i}', 'layers/tap/linear', index)
        for theirs, ours in zip(names.norms, ('bn_1', 'bn_2'), strict=True):
            rows += batch_norm_rows(f'{source}.{theirs}', f'layers/{ours}', index)
        for theirs, ours, pattern in zip(
            names.convs,
            ('pw_1', 'dw', 'pw_2'),
            ('o i 1 1 1 -> i o', 'c 1 t 1 1 -> t c', 'o i 1 1 1 -> i o'),
            strict=True,
        ):
            conv, target = f'{source}.{theirs}', f'layers/conv/{ours}'
            rows.append(Row(f'{conv}.weight', f'{target}/kernel', pattern, index))
            rows.append(Row(f'{conv}.bias', f'{target}/bias', index=index))
        rows += norm_rows(f'{source}.ln_1', 'layers/ln', index)
        if names.post_norm:
            rows += _separate_attention_rows(f'{source}.attn', 'layers/attn', num_heads, index)
        else:
            rows += fused_attention_rows(f'{source}.attn.', 'layers/attn/', num_heads, index)
        for theirs, ours in zip(names.mlp, ('c_fc', 'c_proj'), strict=True):
            rows += linear_rows(f'{source}.{theirs}', f'layers/mlp/{ours}', index)
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


def tap_every(
    tensors: Mapping[str, Any],
    hparams: Mapping[str, Any],
    backbones: Mapping[str, Inside] = INSIDE,
) -> int | None:
    """`tap_every` of `side4video.build`, by the backbone inside a file; None without one.

    Args:
      tensors: names without `module.` -> array; only shapes are read.
      hparams: of `infer_hparams`.
      backbones: by kind, see `naming.Naming.inside`.

    Raises:
      ValueError: the backbone inside has other patches, or another width or depth, than the
        network reads.
    """
    inside = backbones[kind_of(hparams)]
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


def kind_of(hparams: Mapping[str, Any]) -> str:
    """The kind of backbone that this form goes with, a key of `INSIDE`."""
    return 'eva' if hparams['post_norm'] else 'clip'


def sizes_name(hparams: Mapping[str, Any]) -> str:
    """The sizes of the side network and its kind of backbone, for the name of a checkpoint."""
    sizes = f'p{hparams["patch_size"]}_{hparams["side_dim"]}x{hparams["depth"]}'
    return f'{kind_of(hparams)}_{sizes}'


def _sizes(found: Mapping[str, int]) -> str:
    return (
        f'width {found["width"]}, for images of {found["image_size"]} pixels in patches of '
        f'{found["patch_size"]}'
    )


def _plan(source: SourceFiles, options: Options) -> Plan:
    options.refuse('side4video', 'all sizes are in its files')
    tensors = source.tensors
    hparams = infer_hparams(tensors)
    hparams['tap_every'] = tap_every(tensors, hparams)
    return Plan(
        name=f'side4video_{sizes_name(hparams)}',
        spec=hparams,
        tensors=tensors,
        rows=side4video_rows(hparams),
        abstract=abstract_variables(hparams),
        ignore=('*.num_batches_tracked', *eva_params.IGNORE),
        collections=COLLECTIONS,
        backbone=kind_of(hparams),
    )


NAMINGS = (
    Naming(
        kind='side4video',
        family='side4video',
        matches=lambda source: ON_CLIP.stem in source.tensors,  # as that of ON_EVA
        plan=_plan,
        export=Export(side4video_rows, run_hparams, prefix='', head='linear'),
        inside=INSIDE,
    ),
)
