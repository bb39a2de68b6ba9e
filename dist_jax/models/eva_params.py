"""EVA-02-CLIP checkpoints of other projects: their names, their geometry, their tables.

Two namings of the same networks: the authors' (BAAI), and OpenCLIP's releases, whose image tower is
the one of timm. The text towers have OpenAI's names. Geometry is read from the shapes. They do not
tell the heads: of 64 channels, but 16 of 112 in bigE. Nor the place of norms and the rotary
positions: they follow from separate projections of queries, keys and values, which all of B and L
have and bigE has not.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from dist_jax.models.backbone import Backbone
from dist_jax.models.clip_params import (
    OPENAI_IGNORE,
    OPENCLIP_CONFIG,
    count_in,
    depth_of,
    grid_of,
    heads_of,
    linear_rows,
    norm_rows,
    only_allowed,
    openai_text_rows,
    openclip_sections,
    output_rows,
    patch_sizes,
    text_prefix,
    text_sizes,
)
from dist_jax.models.eva import KIND, SPECS, EvaSpec
from dist_jax.models.naming import Naming, Options, Plan
from dist_jax.models.params import ALL, Row, numbered, tensor_shape
from dist_jax.models.source_files import SourceFiles

# Buffers that carry no weights: tables of rotary positions beside those of the text tower.
IGNORE = (*OPENAI_IGNORE, '*.freqs_cos', '*.freqs_sin', 'visual.trunk.rope.*')

HEADS = {1792: 16}  # by the width of the image tower, where they do not have 64 channels
EVA01_WIDTH = 1408


@dataclasses.dataclass(frozen=True)
class Names:
    """What namings of the image tower do not share.

    Attributes:
      prefix: of all its names.
      bias: of separate projections of queries and values, without the letter.
      inner_norm: sub-LN of attention.
      gate: the map of SwiGLU that goes through silu.
      value: the other one.
      hidden_norm: sub-LN of the MLP.
      last: the map of SwiGLU back to the stream.
    """

    prefix: str
    bias: str
    inner_norm: str
    gate: str
    value: str
    hidden_norm: str
    last: str


BAAI = Names('visual.', '_bias', 'inner_attn_ln', 'w1', 'w2', 'ffn_ln', 'w3')
TIMM = Names('visual.trunk.', '_proj.bias', 'norm', 'fc1_g', 'fc1_x', 'norm', 'fc2')


def has_tower(tensors: Mapping[str, Any], names: Names) -> bool:
    """Whether there is an image tower of EVA under these names; biases of queries are its mark."""
    block = f'{names.prefix}blocks.0.attn.'
    return f'{names.prefix}cls_token' in tensors and (
        f'{block}q_bias' in tensors or f'{block}q{names.bias}' in tensors
    )


def baai_rows(spec: EvaSpec, text_prefix: str = 'text.', scale: str = 'logit_scale') -> list[Row]:
    """Table of the authors' names.

    Args:
      spec: geometry; without a text tower, the table is `visual_rows`.
      text_prefix: '' where the text tower has none.
      scale: name of the logit scale.
    """
    return visual_rows(spec, BAAI) + text_rows(spec, text_prefix, scale)


def openclip_rows(spec: EvaSpec, text_prefix: str = 'text.') -> list[Row]:
    """Table of the names of OpenCLIP's releases."""
    return visual_rows(spec, TIMM) + text_rows(spec, text_prefix)


def text_rows(spec: EvaSpec, prefix: str = 'text.', scale: str = 'logit_scale') -> list[Row]:
    """Table of the text tower and the scale; empty without one."""
    if not spec.text_depth:
        return []
    return [*openai_text_rows(spec, prefix), Row(scale, 'logit_scale')]


def visual_rows(spec: EvaSpec, names: Names = BAAI) -> list[Row]:
    """Table of the image tower."""
    prefix = names.prefix
    rows = [
        Row(f'{prefix}cls_token', 'visual/class_embedding', '1 1 w -> w'),
        Row(f'{prefix}pos_embed', 'visual/positional_embedding', '1 l w -> l w'),
        Row(
            f'{prefix}patch_embed.proj.weight',
            'visual/patch_embed/kernel',
            'o i h w -> h w i o',
        ),
        Row(f'{prefix}patch_embed.proj.bias', 'visual/patch_embed/bias'),
        *norm_rows(f'{prefix}norm', 'visual/norm'),
        *linear_rows(f'{prefix}head', 'visual/head'),
    ]
    for i in range(spec.depth):
        source, target, index = f'{prefix}blocks.{i}.', 'visual/blocks/', (i,)
        rows += [
            *norm_rows(f'{source}norm1', f'{target}norm1', index),
            *norm_rows(f'{source}norm2', f'{target}norm2', index),
            *_attention_rows(f'{source}attn.', f'{target}attn/', spec, names, i),
            *_mlp_rows(f'{source}mlp.', f'{target}mlp/', spec, names, index),
        ]
    return rows


def _attention_rows(source: str, target: str, spec: EvaSpec, names: Names, i: int) -> list[Row]:
    """Attention of block `i`. No file has a bias of the keys: it is 0."""
    kernel, bias, sizes = f'{target}qkv/kernel', f'{target}qkv/bias', {'h': spec.num_heads}
    rows = output_rows(f'{source}proj', f'{target}out', spec.num_heads, (i,))
    if spec.sub_ln:
        rows += norm_rows(f'{source}{names.inner_norm}', f'{target}inner_attn_ln', (i,))
        rows += [
            Row(f'{source}{letter}_proj.weight', kernel, '(h d) w -> w h d', (i, ALL, slot), sizes)
            for slot, letter in enumerate('qkv')
        ]
    else:
        pattern = '(c h d) w -> w c h d'
        rows.append(Row(f'{source}qkv.weight', kernel, pattern, (i,), {'c': 3, **sizes}))
    end = names.bias if spec.sub_ln else BAAI.bias
    return [
        *rows,
        Row(f'{source}q{end}', bias, '(h d) -> h d', (i, 0), sizes),
        Row(None, bias, index=(i, 1), fill=0.0),
        Row(f'{source}v{end}', bias, '(h d) -> h d', (i, 2), sizes),
    ]


def _mlp_rows(
    source: str, target: str, spec: EvaSpec, names: Names, index: tuple[int, ...]
) -> list[Row]:
    maps = {'fc1': 'fc1', 'fc2': 'fc2'}
    if spec.swiglu:
        maps = {names.gate: 'w1', names.value: 'w2', names.last: 'w3'}
    rows = [
        row
        for theirs, ours in maps.items()
        for row in linear_rows(f'{source}{theirs}', f'{target}{ours}', index)
    ]
    if spec.sub_ln:
        rows += norm_rows(f'{source}{names.hidden_norm}', f'{target}ffn_ln', index)
    return rows


def eva_spec(
    tensors: Mapping[str, Any],
    names: Names = BAAI,
    *,
    num_heads: int | None = None,
    text_num_heads: int | None = None,
) -> EvaSpec:
    """Geometry of a checkpoint, of an image tower alone where there is no text tower.

    Args:
      tensors: name -> array; only shapes are read.
      names: of the image tower.
      num_heads: heads of the image tower; None for those of the published sizes.
      text_num_heads: heads of the text tower; None for width / 64.

    Raises:
      ValueError: a tensor that gives the geometry is missing, or shapes contradict each other.
    """
    prefix = names.prefix
    width, patch = patch_sizes(tensors, f'{prefix}patch_embed.proj.weight')
    position = f'{prefix}pos_embed'
    grid = grid_of(position, _shape(tensors, position, 3)[1])
    block = f'{prefix}blocks.0.'
    sub_ln = f'{block}attn.q_proj.weight' in tensors
    swiglu = f'{block}mlp.{names.gate}.weight' in tensors
    rotary = [name for name in tensors if name.startswith(prefix) and name.endswith('.freqs_cos')]
    if rotary and not sub_ln:
        raise ValueError(
            f'{rotary[0]} is there, but {block}attn.q_proj.weight is not: rotary positions, which '
            'B and L have, and the attention of bigE, which has none; this is no EVA-02-CLIP'
        )
    hidden = f'{block}mlp.{names.gate if swiglu else "fc1"}.bias'
    text = text_prefix(tensors)
    sizes = {'text_width': 0, 'text_depth': 0, 'text_num_heads': 1}
    if f'{text}token_embedding.weight' in tensors:
        sizes = text_sizes(tensors, text_num_heads, text, _FAMILY)
    return EvaSpec(
        image_size=grid * patch,
        patch_size=patch,
        width=width,
        depth=depth_of(tensors, f'{prefix}blocks.'),
        num_heads=_image_heads(num_heads, width, sub_ln),
        embed_dim=_shape(tensors, f'{prefix}head.weight', 2)[0],
        mlp_hidden=_shape(tensors, hidden, 1)[0],
        post_norm=not sub_ln,
        sub_ln=sub_ln,
        swiglu=swiglu,
        rope=sub_ln,
        **sizes,
    )


_FAMILY = 'EVA-02-CLIP'
_shape = functools.partial(tensor_shape, family=_FAMILY)


def _image_heads(given: int | None, width: int, sub_ln: bool) -> int:
    if not sub_ln and width == EVA01_WIDTH:
        raise ValueError(
            f'an image tower of width {width} is that of EVA-01, whose blocks have their norms '
            f'elsewhere than those of EVA-02; supported are {_published()}'
        )
    if given is None and not sub_ln and width not in HEADS:
        raise ValueError(
            f'an image tower of width {width} with the attention of bigE, which has width '
            f'{min(HEADS)}: pass --num_heads, if it is of another size'
        )
    known = None if sub_ln else HEADS.get(width)
    return heads_of(known if given is None else given, width, '--num_heads')


def _published() -> str:
    return ', '.join(name for name in SPECS if 'tiny' not in name)


def frozen_names(tensors: Mapping[str, Any]) -> list[str]:
    """Names of an EVA-02-CLIP inside a larger file, exactly those of one of that depth.

    Raises:
      ValueError: a block number that no complete file can reach.
    """
    depth, text_depth = (
        numbered(tensors, prefix) for prefix in ('visual.blocks.', 'text.transformer.resblocks.')
    )
    # Only the depths and the form of the blocks matter for the names.
    sub_ln = _has_sub_ln(tensors)
    form = {'sub_ln': sub_ln, 'swiglu': sub_ln, 'rope': False}
    spec = EvaSpec(1, 1, 1, depth, 1, 1, 1, 1, max(text_depth, 1), 1, **form)
    known = {row.source_name for row in baai_rows(spec)}
    return [name for name in tensors if name in known]


def frozen_geometry(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """What the image tower inside a larger file shows of its spec; see `naming.Inside`."""
    width, patch = patch_sizes(tensors, f'{BAAI.prefix}patch_embed.proj.weight')
    position = f'{BAAI.prefix}pos_embed'
    return {
        'image_size': grid_of(position, _shape(tensors, position, 3)[1]) * patch,
        'patch_size': patch,
        'width': width,
        'depth': depth_of(tensors, f'{BAAI.prefix}blocks.'),
        'sub_ln': _has_sub_ln(tensors),
    }


def _has_sub_ln(tensors: Mapping[str, Any]) -> bool:
    return f'{BAAI.prefix}blocks.0.attn.q_proj.weight' in tensors


def spec_name(spec: EvaSpec) -> str:
    """Name of the published size that this geometry is, or 'eva' with its numbers."""
    numbers = f'eva_w{spec.width}_d{spec.depth}_p{spec.patch_size}_{spec.image_size}'
    return next((name for name, known in SPECS.items() if known == spec), numbers)


def _plan_baai(source: SourceFiles, options: Options) -> Plan:
    # Dumps from before the text tower was a module of its own have neither prefix.
    scale = 'text.logit_scale' if 'text.logit_scale' in source.tensors else 'logit_scale'
    spec = _whole_spec(source, BAAI, options)
    return _plan(spec, baai_rows(spec, text_prefix(source.tensors), scale), source)


def _plan_openclip(source: SourceFiles, options: Options) -> Plan:
    model, vision, text = openclip_sections(source.open_clip_config)
    only_allowed(
        OPENCLIP_CONFIG,
        ('model_cfg', model, 'quick_gelu', (None, False)),
        ('vision_cfg', vision, 'timm_pool', (None, 'token')),
        ('vision_cfg', vision, 'timm_proj', ('', None)),
        ('text_cfg', text, 'hf_model_name', ('', None)),
        ('text_cfg', text, 'pool_type', (None, 'argmax')),
        ('text_cfg', text, 'no_causal_mask', (None, False)),
    )
    if options.text_num_heads is None:
        heads = count_in(text, 'heads', f'{OPENCLIP_CONFIG}: text_cfg')
        options = dataclasses.replace(options, text_num_heads=heads)
    spec = _whole_spec(source, TIMM, options)
    return _plan(spec, openclip_rows(spec, text_prefix(source.tensors)), source)


def _whole_spec(source: SourceFiles, names: Names, options: Options) -> EvaSpec:
    heads = {'num_heads': options.num_heads, 'text_num_heads': options.text_num_heads}
    others = dataclasses.replace(options, num_heads=None, text_num_heads=None)
    others.refuse('EVA-02-CLIP', 'its activations are always the same')
    spec = eva_spec(source.tensors, names, **heads)
    if not spec.text_depth:
        raise ValueError(
            'text.token_embedding.weight is missing; an image tower without its text tower is no '
            'complete EVA-02-CLIP checkpoint'
        )
    return spec


def _plan(spec: EvaSpec, rows: list[Row], source: SourceFiles) -> Plan:
    return Plan(
        name=spec_name(spec),
        spec=dataclasses.asdict(spec),
        tensors=source.tensors,
        rows=rows,
        abstract=Backbone(KIND, spec).abstract_params(),
        ignore=IGNORE,
    )


NAMINGS = (
    Naming(
        kind='eva',
        family='eva',
        matches=lambda source: has_tower(source.tensors, BAAI),
        plan=_plan_baai,
    ),
    Naming(
        kind='eva_openclip',
        family='eva',
        matches=lambda source: has_tower(source.tensors, TIMM),
        plan=_plan_openclip,
    ),
)
