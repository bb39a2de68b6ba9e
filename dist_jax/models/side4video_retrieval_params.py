"""Side4Video checkpoints of the authors for retrieval: names, geometry, table.

Source: names of the released files (a bare state dict, maybe with the prefix `module.`). All but
the weights of words and frames are below `clip.`: the side network in its place in the image tower,
as in the files for recognition, and the CLIP that it stands on. Of that, the text tower, the scale
and what is behind the last image block were trained: they belong to the network, and the rest is
the frozen backbone. On CLIP most of it is float16.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from dist_jax.models import clip, eva, eva_params, side4video_params, side4video_retrieval
from dist_jax.models.backbone import Backbone
from dist_jax.models.clip_params import linear_rows, text_sizes
from dist_jax.models.naming import Export, Inside, Naming, Options, Plan, abstract_network
from dist_jax.models.params import Row, Tree, tensor_shape
from dist_jax.models.side4video_params import COLLECTIONS, Names
from dist_jax.models.source_files import SourceFiles

_ROOT = 'clip.'
_FAMILY = 'Side4Video retrieval'

ON_CLIP = dataclasses.replace(
    side4video_params.ON_CLIP,
    visual=f'{_ROOT}visual.',
    norms=('norm1', 'norm2'),
    convs=('pw_conv1', 'dw_conv1', 'pw_conv2'),
)
ON_EVA = dataclasses.replace(side4video_params.ON_EVA, visual=f'{_ROOT}visual.')

# Of the names of a backbone: all but the image tower is trained, and of that what these start.
_IMAGE = 'visual.'
_TRAINED = ('visual.ln_post.', 'visual.proj', 'visual.norm.', 'visual.head.')

# Sizes of the text tower, fields of the spec of a backbone.
_TEXT_SIZES = ('text_width', 'text_depth', 'text_num_heads', 'vocab_size', 'context_length')


def _is_trained(name: str) -> bool:
    return not name.startswith(_IMAGE) or name.startswith(_TRAINED)


def _below_root(row: Row) -> Row:
    name = row.source_name
    return row if name is None else dataclasses.replace(row, source_name=f'{_ROOT}{name}')


def _of_backbone(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """What is below `clip.`, without that."""
    inside = (name for name in tensors if name.startswith(_ROOT))
    return {name.removeprefix(_ROOT): tensors[name] for name in inside}


def _frozen_part(inside: Inside) -> Inside:
    """How these files hold what is frozen of such a backbone."""

    def names(tensors: Mapping[str, Any]) -> list[str]:
        found = inside.names(_of_backbone(tensors))
        return [f'{_ROOT}{name}' for name in found if not _is_trained(name)]

    def rows(spec: Any) -> list[Row]:
        frozen = (row for row in inside.rows(spec) if not _is_trained(row.source_name or _IMAGE))
        return [_below_root(row) for row in frozen]

    return Inside(names, lambda tensors: inside.geometry(_of_backbone(tensors)), rows)


INSIDE = {kind: _frozen_part(inside) for kind, inside in side4video_params.INSIDE.items()}


def _names(hparams: Mapping[str, Any]) -> Names:
    return ON_EVA if hparams['post_norm'] else ON_CLIP


def infer_hparams(tensors: Mapping[str, Any], text_num_heads: int | None = None) -> dict[str, Any]:
    """Every size of a network that its tensors show.

    Args:
      tensors: names without `module.` -> array; only shapes are read.
      text_num_heads: heads of the text tower; None for width / 64.

    Returns:
      What `side4video_params.side_sizes` returns, embed_dim, and the sizes of the text tower.

    Raises:
      ValueError: a tensor that shows a size is missing or has another shape.
    """
    if ON_EVA.positions in tensors:
        sizes = side4video_params.side_sizes(tensors, ON_EVA)
        prefix = f'{_ROOT}text.'
        embed_dim = tensor_shape(tensors, f'{ON_EVA.visual}head.weight', 2, _FAMILY)[0]
    else:
        sizes = side4video_params.side_sizes(tensors, ON_CLIP, class_rows=1)
        prefix = _ROOT
        embed_dim = tensor_shape(tensors, f'{ON_CLIP.visual}proj', 2, _FAMILY)[1]
    text = text_sizes(tensors, text_num_heads, prefix, _FAMILY)
    return sizes | {'embed_dim': embed_dim} | text


def retrieval_rows(hparams: Mapping[str, Any]) -> list[Row]:
    """Table of the names. Reads side_dim, depth, post_norm and the sizes of the text tower."""
    names = _names(hparams)
    backbone = side4video_params.INSIDE[side4video_params.kind_of(hparams)]
    return [
        *side4video_params.side_rows(hparams, names),
        *side4video_params.post_norm_rows(names),
        # The class token of our streams is behind the patches.
        Row(names.positions, 'positional_embedding', roll=0 if names.post_norm else -1),
        Row(f'{names.visual}side_proj', 'side_proj/kernel'),
        *(
            _below_root(row)
            for row in backbone.rows(_spec(hparams))
            if row.source_name and _is_trained(row.source_name)
        ),
        *(
            row
            for weights in side4video_retrieval.WEIGHTS
            for theirs, ours in (('0', 'fc1'), ('2', 'fc2'))
            for row in linear_rows(f'{weights}_fc.{theirs}', f'{weights}/{ours}')
        ),
    ]


def _spec(hparams: Mapping[str, Any]) -> clip.ClipSpec | eva.EvaSpec:
    """Of a backbone with these sizes, as far as there are any, whose heads and MLPs are unknown."""
    sizes = {name: hparams.get(name, 1) for name in ('patch_size', 'width', 'embed_dim')}
    sizes |= {name: hparams[name] for name in ('depth', *_TEXT_SIZES)}
    sizes |= {'image_size': hparams.get('grid', 1) * sizes['patch_size'], 'num_heads': 1}
    if not hparams['post_norm']:
        return clip.ClipSpec(**sizes)
    form = {'post_norm': True, 'sub_ln': False, 'swiglu': False, 'rope': False}
    return eva.EvaSpec(**sizes, mlp_hidden=1, **form)


def run_hparams(model: Mapping[str, Any], backbone: Mapping[str, Any]) -> dict[str, Any]:
    """What `retrieval_rows` reads, from the `model` fields and the backbone's spec of a run."""
    side = side4video_params.run_hparams(model, backbone)
    return side | {name: backbone[name] for name in _TEXT_SIZES}


def abstract_variables(hparams: Mapping[str, Any]) -> Tree:
    """Parameters and statistics as they are stored, float32 `jax.ShapeDtypeStruct` leaves."""
    spec = _spec(hparams)
    model = side4video_retrieval.build(
        Backbone(eva.KIND if hparams['post_norm'] else clip.KIND, spec),
        num_frames=1,
        dtype=jnp.float32,
        **side4video_params.build_options(hparams),
    )
    return abstract_network(model, (1, 1, spec.image_size, spec.image_size, 3), ())


def _plan(source: SourceFiles, options: Options) -> Plan:
    others = dataclasses.replace(options, text_num_heads=None)
    others.refuse('side4video_retrieval', 'all other sizes are in its files')
    tensors = source.tensors
    hparams = infer_hparams(tensors, options.text_num_heads)
    hparams['tap_every'] = side4video_params.tap_every(tensors, hparams, INSIDE)
    return Plan(
        name=f'side4video_retrieval_{side4video_params.sizes_name(hparams)}',
        spec=hparams,
        tensors=tensors,
        rows=retrieval_rows(hparams),
        abstract=abstract_variables(hparams),
        ignore=('*.num_batches_tracked', *(f'{_ROOT}{name}' for name in eva_params.IGNORE)),
        collections=COLLECTIONS,
        backbone=side4video_params.kind_of(hparams),
    )


NAMINGS = (
    Naming(
        kind='side4video_retrieval',
        family='side4video_retrieval',
        matches=lambda source: ON_CLIP.stem in source.tensors,  # as that of ON_EVA
        plan=_plan,
        export=Export(retrieval_rows, run_hparams, prefix='', head=''),
        inside=INSIDE,
    ),
)
