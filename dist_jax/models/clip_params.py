"""CLIP checkpoints of other projects: their names, their geometry, their tables.

Three namings of the same network: OpenAI (also the container of its released weights), OpenCLIP
(OpenAI names, text optionally under `text.`), Hugging Face `CLIPModel`. Geometry is read from the
shapes; what shapes cannot tell, activation and head counts, comes from a config file or from the
caller, never from a guess.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Mapping
from typing import Any

from dist_jax.models.backbone import Backbone
from dist_jax.models.clip import KIND, SPECS, ClipSpec
from dist_jax.models.foreign import shown
from dist_jax.models.naming import Export, Naming, Options, Plan
from dist_jax.models.params import ALL, Row, hidden_ratio, numbered, tensor_shape
from dist_jax.models.source_files import SourceFiles
from dist_jax.models.transformer import TextSpec

log = logging.getLogger('dist_jax')

PUBLISHED_WIDTH = 256  # of the smallest tower whose heads are known to have 64 channels

# Buffers that carry no weights; OpenAI files keep the first three, other exports the rest.
OPENAI_IGNORE = ('input_resolution', 'context_length', 'vocab_size', 'attn_mask', 'text.attn_mask')
HUGGINGFACE_IGNORE = (
    'text_model.embeddings.position_ids',
    'vision_model.embeddings.position_ids',
)

OPENCLIP_CONFIG = 'open_clip_config.json'

_OPENAI_MARK = 'visual.conv1.weight'
_HUGGINGFACE_MARK = 'vision_model.embeddings.patch_embedding.weight'


def is_openai_naming(tensors: Mapping[str, Any]) -> bool:
    """OpenAI or OpenCLIP names."""
    return _OPENAI_MARK in tensors


def is_huggingface_naming(tensors: Mapping[str, Any]) -> bool:
    """Hugging Face `CLIPModel` names."""
    return _HUGGINGFACE_MARK in tensors


def openai_rows(spec: ClipSpec, text_prefix: str = '') -> list[Row]:
    """Table of the OpenAI names.

    Args:
      spec: geometry.
      text_prefix: 'text.' for OpenCLIP's custom-text models.
    """
    rows = [
        Row('visual.class_embedding', 'visual/class_embedding'),
        Row('visual.positional_embedding', 'visual/positional_embedding'),
        Row('visual.conv1.weight', 'visual/conv1/kernel', 'o i h w -> h w i o'),
        *norm_rows('visual.ln_pre', 'visual/ln_pre'),
        *norm_rows('visual.ln_post', 'visual/ln_post'),
        Row('visual.proj', 'visual/proj/kernel'),
        *openai_text_rows(spec, text_prefix),
        Row('logit_scale', 'logit_scale'),
    ]
    for i in range(spec.depth):
        rows += openai_block_rows(
            f'visual.transformer.resblocks.{i}.', 'visual/blocks/', spec.num_heads, (i,)
        )
    return rows


def openai_text_rows(spec: TextSpec, prefix: str) -> list[Row]:
    """Table of the text tower, of CLIP or of another kind that has the same.

    Args:
      spec: geometry.
      prefix: of its names: '' or 'text.'.
    """
    rows = [
        Row(f'{prefix}token_embedding.weight', 'text/token_embedding'),
        Row(f'{prefix}positional_embedding', 'text/positional_embedding'),
        *norm_rows(f'{prefix}ln_final', 'text/ln_final'),
        Row(f'{prefix}text_projection', 'text/text_projection/kernel'),
    ]
    for i in range(spec.text_depth):
        rows += openai_block_rows(
            f'{prefix}transformer.resblocks.{i}.', 'text/blocks/', spec.text_num_heads, (i,)
        )
    return rows


def openai_block_rows(
    source: str, target: str, heads: int, index: tuple[int, ...] = ()
) -> list[Row]:
    """One transformer block in OpenAI names; `in_proj` stacks q, k, v by rows."""
    return [
        *norm_rows(f'{source}ln_1', f'{target}ln_1', index),
        *norm_rows(f'{source}ln_2', f'{target}ln_2', index),
        *fused_attention_rows(f'{source}attn.', f'{target}attn/', heads, index),
        *linear_rows(f'{source}mlp.c_fc', f'{target}mlp/c_fc', index),
        *linear_rows(f'{source}mlp.c_proj', f'{target}mlp/c_proj', index),
    ]


def fused_attention_rows(
    source: str, target: str, heads: int, index: tuple[int, ...] = ()
) -> list[Row]:
    """`nn.MultiheadAttention`: in_proj_{weight (3W, W), bias (3W,)} and out_proj."""
    sizes = {'c': 3, 'h': heads}
    return [
        Row(
            f'{source}in_proj_weight',
            f'{target}qkv/kernel',
            '(c h d) w -> w c h d',
            index,
            sizes,
        ),
        Row(f'{source}in_proj_bias', f'{target}qkv/bias', '(c h d) -> c h d', index, sizes),
        *output_rows(f'{source}out_proj', f'{target}out', heads, index),
    ]


def huggingface_rows(spec: ClipSpec) -> list[Row]:
    """Table of the Hugging Face names (`pre_layrnorm` is spelt so)."""
    rows = [
        Row('vision_model.embeddings.class_embedding', 'visual/class_embedding'),
        Row('vision_model.embeddings.position_embedding.weight', 'visual/positional_embedding'),
        Row(_HUGGINGFACE_MARK, 'visual/conv1/kernel', 'o i h w -> h w i o'),
        *norm_rows('vision_model.pre_layrnorm', 'visual/ln_pre'),
        *norm_rows('vision_model.post_layernorm', 'visual/ln_post'),
        Row('visual_projection.weight', 'visual/proj/kernel', 'o i -> i o'),
        Row('text_model.embeddings.token_embedding.weight', 'text/token_embedding'),
        Row('text_model.embeddings.position_embedding.weight', 'text/positional_embedding'),
        *norm_rows('text_model.final_layer_norm', 'text/ln_final'),
        Row('text_projection.weight', 'text/text_projection/kernel', 'o i -> i o'),
        Row('logit_scale', 'logit_scale'),
    ]
    for prefix, target, depth, heads in (
        ('vision_model', 'visual', spec.depth, spec.num_heads),
        ('text_model', 'text', spec.text_depth, spec.text_num_heads),
    ):
        blocks = f'{target}/blocks'
        for i in range(depth):
            source = f'{prefix}.encoder.layers.{i}'
            rows += [
                *norm_rows(f'{source}.layer_norm1', f'{blocks}/ln_1', (i,)),
                *norm_rows(f'{source}.layer_norm2', f'{blocks}/ln_2', (i,)),
                *output_rows(f'{source}.self_attn.out_proj', f'{blocks}/attn/out', heads, (i,)),
                *linear_rows(f'{source}.mlp.fc1', f'{blocks}/mlp/c_fc', (i,)),
                *linear_rows(f'{source}.mlp.fc2', f'{blocks}/mlp/c_proj', (i,)),
            ]
            for slot, letter in enumerate('qkv'):
                name, sizes = f'{source}.self_attn.{letter}_proj', {'h': heads}
                rows += [
                    Row(
                        f'{name}.weight',
                        f'{blocks}/attn/qkv/kernel',
                        '(h d) w -> w h d',
                        (i, ALL, slot),
                        sizes,
                    ),
                    Row(
                        f'{name}.bias',
                        f'{blocks}/attn/qkv/bias',
                        '(h d) -> h d',
                        (i, slot),
                        sizes,
                    ),
                ]
    return rows


def frozen_names(tensors: Mapping[str, Any]) -> list[str]:
    """Names of a CLIP inside a larger file, exactly those of one of that depth.

    Raises:
      ValueError: a block number that no complete file can reach.
    """
    depth, text_depth = (
        numbered(tensors, prefix)
        for prefix in ('visual.transformer.resblocks.', 'transformer.resblocks.')
    )
    # Only the depths matter for the names.
    spec = ClipSpec(1, 1, 1, depth, 1, 1, 1, text_depth, 1)
    known = {row.source_name for row in openai_rows(spec)}
    return [name for name in tensors if name in known]


def frozen_geometry(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """What the image tower inside a larger file shows of its spec; see `naming.Inside`."""
    width, patch = patch_sizes(tensors, _OPENAI_MARK)
    position = 'visual.positional_embedding'
    return {
        'image_size': grid_of(position, _shape(tensors, position, 2)[0]) * patch,
        'patch_size': patch,
        'width': width,
        'depth': depth_of(tensors, 'visual.transformer.resblocks.'),
    }


def norm_rows(source: str, target: str, index: tuple[int, ...] = ()) -> list[Row]:
    """LayerNorm: weight, bias -> scale, bias."""
    return [
        Row(f'{source}.weight', f'{target}/scale', index=index),
        Row(f'{source}.bias', f'{target}/bias', index=index),
    ]


def linear_rows(source: str, target: str, index: tuple[int, ...] = ()) -> list[Row]:
    """Linear: weight (out, in), bias -> kernel (in, out), bias."""
    return [
        Row(f'{source}.weight', f'{target}/kernel', 'o i -> i o', index),
        Row(f'{source}.bias', f'{target}/bias', index=index),
    ]


def output_rows(source: str, target: str, heads: int, index: tuple[int, ...] = ()) -> list[Row]:
    """Projection of heads: weight (o, h d), bias -> kernel (h, d, o), bias."""
    return [
        Row(f'{source}.weight', f'{target}/kernel', 'o (h d) -> h d o', index, {'h': heads}),
        Row(f'{source}.bias', f'{target}/bias', index=index),
    ]


def text_prefix(tensors: Mapping[str, Any]) -> str:
    """'text.' where the text tower of OpenAI-style names sits under it, otherwise ''."""
    return 'text.' if 'text.token_embedding.weight' in tensors else ''


def text_sizes(
    tensors: Mapping[str, Any], num_heads: int | None, prefix: str, family: str
) -> dict[str, int]:
    """What a text tower in OpenAI names shows of the spec of its backbone.

    Args:
      tensors: name -> array; only shapes are read.
      num_heads: None for width / 64.
      prefix: of its names.
      family: what the file should be, for errors.

    Raises:
      ValueError: a tensor that shows a size is missing, or heads do not divide the width.
    """
    vocab_size, width = tensor_shape(tensors, f'{prefix}token_embedding.weight', 2, family)
    return {
        'text_width': width,
        'text_depth': depth_of(tensors, f'{prefix}transformer.resblocks.'),
        'text_num_heads': heads_of(num_heads, width, '--text_num_heads'),
        'vocab_size': vocab_size,
        'context_length': tensor_shape(tensors, f'{prefix}positional_embedding', 2, family)[0],
    }


def openai_spec(
    tensors: Mapping[str, Any],
    *,
    activation: str,
    num_heads: int | None = None,
    text_num_heads: int | None = None,
) -> ClipSpec:
    """Geometry of a checkpoint in OpenAI names.

    Args:
      tensors: name -> array; only shapes are read.
      activation: 'quick_gelu' or 'gelu'.
      num_heads: heads of the image tower; None for width / 64, OpenAI's rule.
      text_num_heads: heads of the text tower; None likewise.

    Raises:
      ValueError: a tensor that gives the geometry is missing (a ResNet tower, for instance), or
        shapes contradict each other.
    """
    if _OPENAI_MARK not in tensors or 'visual.proj' not in tensors:
        raise ValueError(
            'visual.conv1.weight and visual.proj are not both there; only CLIP models with a '
            'vision transformer and a projection are supported (no ResNet, no timm tower)'
        )
    prefix = text_prefix(tensors)
    return _spec_from_shapes(
        tensors,
        conv='visual.conv1.weight',
        position='visual.positional_embedding',
        hidden='visual.transformer.resblocks.0.mlp.c_fc.bias',
        depth=depth_of(tensors, 'visual.transformer.resblocks.'),
        token=f'{prefix}token_embedding.weight',
        text_position=f'{prefix}positional_embedding',
        text_hidden=f'{prefix}transformer.resblocks.0.mlp.c_fc.bias',
        text_depth=depth_of(tensors, f'{prefix}transformer.resblocks.'),
        embed_dim=_shape(tensors, 'visual.proj', 2)[1],
        activation=activation,
        num_heads=num_heads,
        text_num_heads=text_num_heads,
    )


def openclip_spec(
    tensors: Mapping[str, Any],
    config: Mapping[str, Any] | None,
    *,
    activation: str | None = None,
    num_heads: int | None = None,
    text_num_heads: int | None = None,
) -> ClipSpec:
    """Geometry of an OpenCLIP checkpoint; activation and heads from its config or the caller.

    Args:
      tensors: name -> array; only shapes are read.
      config: content of `open_clip_config.json`, or None. Of its `model_cfg`, `quick_gelu`,
        `vision_cfg` (`head_width`) and `text_cfg` (`heads`) are read.
      activation: needed where there is no config; must not contradict one.
      num_heads: of the image tower; None for the config's, or width / 64 up to width 1024.
      text_num_heads: of the text tower; None for the config's, or width / 64.

    Raises:
      ValueError: no config and no activation; a config that asks for what this CLIP is not.
    """
    file = OPENCLIP_CONFIG
    model, vision, text = openclip_sections(config)
    if config is not None:
        only_allowed(
            file,
            ('vision_cfg', vision, 'timm_model_name', (None, '')),
            ('vision_cfg', vision, 'pool_type', (None, 'tok')),
            ('vision_cfg', vision, 'attentional_pool', (None, False)),
            ('vision_cfg', vision, 'ls_init_value', (None,)),
            ('vision_cfg', vision, 'no_ln_pre', (None, False)),
            ('vision_cfg', vision, 'final_ln_after_pool', (None, False)),
            ('vision_cfg', vision, 'pos_embed_type', (None, 'learnable')),
            ('text_cfg', text, 'hf_model_name', (None, '')),
            ('text_cfg', text, 'pool_type', (None, 'argmax')),
            ('text_cfg', text, 'embed_cls', (None, False)),
            ('text_cfg', text, 'no_causal_mask', (None, False)),
            ('text_cfg', text, 'ls_init_value', (None,)),
        )
        for side, part in (('vision_cfg', vision), ('text_cfg', text)):
            for field in ('act_kwargs', 'norm_kwargs'):
                if part.get(field):
                    raise ValueError(
                        f'{file}: {side}.{field}={shown(part[field])} is not supported'
                    )
        if not isinstance(model.get('quick_gelu', False), bool):
            raise ValueError(
                f'{file}: quick_gelu={shown(model["quick_gelu"])}, expected true or false'
            )
        configured = 'quick_gelu' if model.get('quick_gelu', False) else 'gelu'
        if activation not in (None, configured):
            raise ValueError(
                f'--activation {activation} contradicts open_clip_config.json beside the file, '
                f'which says {configured}; drop the flag, or correct quick_gelu there'
            )
        activation = configured
    if activation is None:
        raise ValueError(
            'an OpenCLIP checkpoint does not say its activation: put its open_clip_config.json '
            'beside the file, or pass --activation quick_gelu (OpenAI weights and the *-quickgelu '
            'models) or --activation gelu (LAION, DataComp, CommonPool models)'
        )
    width = _shape(tensors, _OPENAI_MARK, 4)[0]
    head_width = count_in(vision, 'head_width', f'{file}: vision_cfg')
    if num_heads is None and head_width:
        num_heads = _whole(width, head_width, 'vision_cfg.head_width')
    if num_heads is None and config is None and width > 1024:
        raise ValueError(
            f'an image tower of width {width} without open_clip_config.json: from this size on '
            'OpenCLIP models have heads of 80, 88 or 104 channels instead of 64; put the config '
            'beside the file, or pass --num_heads (16 in ViT-H, ViT-g and ViT-bigG)'
        )
    if text_num_heads is None:
        text_num_heads = count_in(text, 'heads', f'{file}: text_cfg')
    return openai_spec(
        tensors, activation=activation, num_heads=num_heads, text_num_heads=text_num_heads
    )


def huggingface_spec(tensors: Mapping[str, Any], config: Mapping[str, Any] | None) -> ClipSpec:
    """Geometry of a Hugging Face checkpoint: shapes, checked against its `config.json`.

    Raises:
      ValueError: no config; an activation other than quick_gelu and gelu; towers that differ in
        activation or MLP ratio; a config that contradicts the shapes.
    """
    if config is None:
        raise ValueError(
            'a Hugging Face checkpoint needs its config.json beside it (activation and head '
            'counts stand only there)'
        )
    # Old configs leave out fields that have the defaults of CLIPVisionConfig, CLIPTextConfig.
    vision = {'hidden_act': 'quick_gelu', 'num_attention_heads': 12, 'layer_norm_eps': 1e-5}
    text = {'hidden_act': 'quick_gelu', 'num_attention_heads': 8, 'layer_norm_eps': 1e-5}
    vision |= section(config, 'vision_config', 'config.json')
    text |= section(config, 'text_config', 'config.json')
    for side, part in (('vision_config', vision), ('text_config', text)):
        if part['hidden_act'] not in ('quick_gelu', 'gelu'):
            raise ValueError(
                f'config.json: {side}.hidden_act={shown(part["hidden_act"])}; supported are '
                "'quick_gelu' and 'gelu'"
            )
        if part['layer_norm_eps'] != 1e-5:
            raise ValueError(
                f'config.json: {side}.layer_norm_eps={shown(part["layer_norm_eps"])}; only 1e-05 '
                'is supported'
            )
    if vision['hidden_act'] != text['hidden_act']:
        raise ValueError(
            f'config.json: the towers differ in hidden_act ({vision["hidden_act"]!r} and '
            f'{text["hidden_act"]!r}); one activation for both is supported'
        )
    token = 'text_model.embeddings.token_embedding.weight'
    vocab_size, eos = _shape(tensors, token, 2)[0], text.get('eos_token_id', 2)
    # 2 is what early configs say for every model; it then means the largest id of the row too.
    if eos not in (None, 2, vocab_size - 1):
        raise ValueError(
            f'config.json: text_config.eos_token_id={shown(eos)}, but the text feature is read at '
            f'the largest id ({vocab_size - 1})'
        )
    spec = _spec_from_shapes(
        tensors,
        conv=_HUGGINGFACE_MARK,
        position='vision_model.embeddings.position_embedding.weight',
        hidden='vision_model.encoder.layers.0.mlp.fc1.bias',
        depth=depth_of(tensors, 'vision_model.encoder.layers.'),
        token=token,
        text_position='text_model.embeddings.position_embedding.weight',
        text_hidden='text_model.encoder.layers.0.mlp.fc1.bias',
        text_depth=depth_of(tensors, 'text_model.encoder.layers.'),
        embed_dim=_shape(tensors, 'visual_projection.weight', 2)[0],
        activation=vision['hidden_act'],
        num_heads=count_in(vision, 'num_attention_heads', 'config.json: vision_config'),
        text_num_heads=count_in(text, 'num_attention_heads', 'config.json: text_config'),
    )
    for side, part, field, value in (
        ('vision_config', vision, 'hidden_size', spec.width),
        ('vision_config', vision, 'num_hidden_layers', spec.depth),
        ('vision_config', vision, 'image_size', spec.image_size),
        ('vision_config', vision, 'patch_size', spec.patch_size),
        ('text_config', text, 'hidden_size', spec.text_width),
        ('text_config', text, 'num_hidden_layers', spec.text_depth),
    ):
        if part.get(field, value) != value:
            raise ValueError(
                f'config.json: {side}.{field}={shown(part[field])}, but the tensors say {value}'
            )
    return spec


def _spec_from_shapes(
    tensors: Mapping[str, Any],
    *,
    conv: str,
    position: str,
    hidden: str,
    depth: int,
    token: str,
    text_position: str,
    text_hidden: str,
    text_depth: int,
    embed_dim: int,
    activation: str,
    num_heads: int | None,
    text_num_heads: int | None,
) -> ClipSpec:
    """Names of the tensors that show the geometry -> the spec."""
    width, patch = patch_sizes(tensors, conv)
    grid = grid_of(position, _shape(tensors, position, 2)[0])
    vocab_size, text_width = _shape(tensors, token, 2)
    ratio = hidden_ratio(_shape(tensors, hidden, 1)[0], width)
    text_ratio = hidden_ratio(_shape(tensors, text_hidden, 1)[0], text_width)
    if ratio != text_ratio:
        raise ValueError(
            f'the towers differ in MLP ratio ({ratio:g} and {text_ratio:g}); one for both is '
            'supported'
        )
    return ClipSpec(
        image_size=grid * patch,
        patch_size=patch,
        width=width,
        depth=depth,
        num_heads=heads_of(num_heads, width, '--num_heads'),
        embed_dim=embed_dim,
        text_width=text_width,
        text_depth=text_depth,
        text_num_heads=heads_of(text_num_heads, text_width, '--text_num_heads'),
        vocab_size=vocab_size,
        context_length=_shape(tensors, text_position, 2)[0],
        activation=activation,
        mlp_ratio=ratio,
    )


_shape = functools.partial(tensor_shape, family='CLIP (both towers)')


def patch_sizes(tensors: Mapping[str, Any], name: str) -> tuple[int, int]:
    """Width and patch size, by the kernel of the patch embedding.

    Raises:
      ValueError: it is missing, or not of square patches of three colours.
    """
    kernel = _shape(tensors, name, 4)
    if kernel[1] != 3 or kernel[2] != kernel[3]:
        raise ValueError(f'{name}: shape {kernel}, expected (width, 3, patch, patch)')
    return kernel[0], kernel[-1]


def grid_of(name: str, tokens: int) -> int:
    """Patches along one side, by the rows of a position table of this name.

    Raises:
      ValueError: the table is not of a class token and a square.
    """
    grid = math.isqrt(tokens - 1)
    if not grid or grid**2 != tokens - 1:
        raise ValueError(f'{name}: {tokens} rows are not one class token and a square grid')
    return grid


def openclip_sections(config: Mapping[str, Any] | None) -> tuple[Mapping[str, Any], ...]:
    """`model_cfg` of an OpenCLIP config, and `vision_cfg` and `text_cfg` of it; empty without one.

    Raises:
      ValueError: one of them is no object.
    """
    model = section(config or {}, 'model_cfg', OPENCLIP_CONFIG) or config or {}
    return model, *(section(model, side, OPENCLIP_CONFIG) for side in ('vision_cfg', 'text_cfg'))


def only_allowed(file: str, *fields: tuple[str, Mapping[str, Any], str, tuple[Any, ...]]) -> None:
    """Refuses what a config says of networks that are not ours.

    Args:
      file: name of the config.
      fields: (name of the section, the section, name of the field, values that it may have).

    Raises:
      ValueError: another value.
    """
    for side, part, field, allowed in fields:
        if part.get(field) not in allowed:
            raise ValueError(
                f'{file}: {side}.{field}={shown(part[field])} is not supported, '
                f'only {allowed[-1]!r}'
            )


def section(config: Mapping[str, Any], name: str, file: str) -> Mapping[str, Any]:
    """An object inside a config; empty where it is left out."""
    part = config.get(name)
    if part is not None and not isinstance(part, Mapping):
        raise ValueError(f'{file}: {name}={shown(part)}, expected a JSON object')
    return part or {}


def count_in(part: Mapping[str, Any], field: str, where: str) -> int | None:
    """A number of things in a config; None where it is left out."""
    value = part.get(field)
    if value is not None and (type(value) is not int or not 0 < value < 1 << 20):
        raise ValueError(f'{where}.{field}={shown(value)}, expected a positive whole number')
    return value


def heads_of(given: int | None, width: int, flag: str) -> int:
    """Heads of a tower: as given, else of 64 channels, which is said of small ones."""
    if given is None:
        found = _whole(width, 64, f'the head width of OpenAI models; {flag}')
        if width < PUBLISHED_WIDTH:
            log.warning(
                'the file does not say how many heads the attention of a tower of width %d has: '
                '%d, as in the published models, if there is no %s=N',
                width,
                found,
                flag,
            )
        return found
    if given < 1 or width % given:
        raise ValueError(f'{given} heads do not divide a width of {width} ({flag}, or the config)')
    return given


def depth_of(tensors: Mapping[str, Any], prefix: str) -> int:
    """How many blocks there are; raises ValueError if none."""
    depth = numbered(tensors, prefix)
    if not depth:
        raise ValueError(f'no tensor {prefix}N.…; this is no complete CLIP checkpoint')
    return depth


def _whole(width: int, head_width: int, what: str) -> int:
    if width % head_width:
        raise ValueError(
            f'width {width} is not a multiple of {head_width} ({what} decides the head count)'
        )
    return width // head_width


def spec_name(spec: ClipSpec, specs: Mapping[str, ClipSpec]) -> str:
    """Name of the published size that this geometry is, or 'clip' with its numbers.

    The activation and the vocabulary are not part of the name.
    """
    for name, known in specs.items():
        if dataclasses.replace(spec, activation=known.activation) == known:
            return name
    return f'clip_w{spec.width}_d{spec.depth}_p{spec.patch_size}_{spec.image_size}'


def _plan_openai(source: SourceFiles, options: Options) -> Plan:
    if options.activation not in (None, 'quick_gelu'):
        raise ValueError(
            f'--activation {options.activation}: the OpenAI weights were trained with quick_gelu; '
            'for other weights under these names pass --kind openclip'
        )
    known = dataclasses.asdict(options) | {'activation': 'quick_gelu'}
    return _plan_openai_names(openai_spec(source.tensors, **known), source)


def _plan_openclip(source: SourceFiles, options: Options) -> Plan:
    known = dataclasses.asdict(options)
    spec = openclip_spec(source.tensors, source.open_clip_config, **known)
    return _plan_openai_names(spec, source)


def _plan_openai_names(spec: ClipSpec, source: SourceFiles) -> Plan:
    return _plan(spec, openai_rows(spec, text_prefix(source.tensors)), source, OPENAI_IGNORE)


def _plan_huggingface(source: SourceFiles, options: Options) -> Plan:
    options.refuse('huggingface', 'config.json says it')
    spec = huggingface_spec(source.tensors, source.config)
    return _plan(spec, huggingface_rows(spec), source, HUGGINGFACE_IGNORE)


def _plan(spec: ClipSpec, rows: list[Row], source: SourceFiles, ignore: tuple[str, ...]) -> Plan:
    return Plan(
        name=spec_name(spec, SPECS),
        spec=dataclasses.asdict(spec),
        tensors=source.tensors,
        rows=rows,
        abstract=Backbone(KIND, spec).abstract_params(),
        ignore=ignore,
    )


def run_spec(model: Mapping[str, Any], backbone: Mapping[str, Any]) -> dict[str, Any]:
    """The spec of a run that trained both towers of its backbone.

    Raises:
      ValueError: that backbone is no CLIP.
    """
    if backbone.keys() != dataclasses.asdict(SPECS['vit_b16']).keys():
        raise ValueError(
            f'only towers of a CLIP go out under the names of one, and the run of model.family='
            f'{model["family"]!r} trained those of another kind of backbone'
        )
    return dict(backbone)


# OpenAI's own are told from OpenCLIP's by their container.
NAMINGS = (
    Naming(
        kind='huggingface',
        family='clip',
        matches=lambda source: is_huggingface_naming(source.tensors),
        plan=_plan_huggingface,
    ),
    Naming(
        kind='openai',
        family='clip',
        matches=lambda source: source.is_torchscript and is_openai_naming(source.tensors),
        plan=_plan_openai,
        export=Export(
            lambda spec: openai_rows(ClipSpec(**spec)),
            run_spec,
            prefix='',
            head='words',
            runs=('fine_tune',),
        ),
    ),
    Naming(
        kind='openclip',
        family='clip',
        matches=lambda source: is_openai_naming(source.tensors),
        plan=_plan_openclip,
    ),
)
