"""The frozen CLIP image and text towers, as functions over a plain parameter tree.

Source: Radford et al. 2021 (arXiv:2103.00020), section 2.4 and the released weights.

The tree (W width, D depth, h heads, d head dim, p patch size, g = image_size / p, E embed_dim):

    visual/conv1/kernel (p, p, 3, W)
    visual/class_embedding (W,)             visual/positional_embedding (1 + g*g, W)
    visual/ln_pre/{scale,bias} (W,)
    visual/blocks/                          stacked, the layer on axis 0
        ln_1/{scale,bias} (D, W)            ln_2/{scale,bias} (D, W)
        attn/qkv/{kernel (D, W, 3, h, d), bias (D, 3, h, d)}
        attn/out/{kernel (D, h, d, W), bias (D, W)}
        mlp/c_fc/{kernel (D, W, 4W), bias}  mlp/c_proj/{kernel (D, 4W, W), bias}
    visual/ln_post/{scale,bias} (W,)        visual/proj/kernel (W, E)
    text/token_embedding (V, Wt)            text/positional_embedding (S, Wt)
    text/blocks/...                         text/ln_final/{scale,bias}
    text/text_projection/kernel (Wt, E)
    logit_scale ()                          stored as a logarithm
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp

from dist_jax.models import kernels, layers
from dist_jax.models.backbone import Kind, Taps
from dist_jax.models.layers import Pixels
from dist_jax.models.stack import scan_frozen
from dist_jax.sharding import ShardingRule, gather_params

Tree = dict[str, Any]

PIXELS = Pixels(mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711))


@dataclasses.dataclass(frozen=True)
class ClipSpec:
    """Geometry of one CLIP model; it travels with the converted checkpoint."""

    image_size: int
    patch_size: int
    width: int
    depth: int
    num_heads: int
    embed_dim: int
    text_width: int
    text_depth: int
    text_num_heads: int
    vocab_size: int = 49408
    context_length: int = 77
    activation: str = 'quick_gelu'
    mlp_ratio: float = 4.0

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size:
            raise ValueError(
                f'image_size={self.image_size} is not a multiple of patch_size={self.patch_size}'
            )
        if self.activation not in layers.ACTIVATIONS:
            raise ValueError(
                f'activation={self.activation!r} is not one of {sorted(layers.ACTIVATIONS)}'
            )
        for width, heads in (
            ('width', 'num_heads'),
            ('text_width', 'text_num_heads'),
        ):
            if getattr(self, width) % getattr(self, heads):
                raise ValueError(
                    f'{width}={getattr(self, width)} is not a multiple of '
                    f'{heads}={getattr(self, heads)}'
                )

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def num_tokens(self) -> int:
        """Tokens of one frame, the class token included."""
        return 1 + self.grid**2


SPECS: dict[str, ClipSpec] = {
    'vit_b32': ClipSpec(224, 32, 768, 12, 12, 512, 512, 12, 8),
    'vit_b16': ClipSpec(224, 16, 768, 12, 12, 512, 512, 12, 8),
    'vit_l14': ClipSpec(224, 14, 1024, 24, 16, 768, 768, 12, 12),
    'vit_l14_336': ClipSpec(336, 14, 1024, 24, 16, 768, 768, 12, 12),
    'tiny': ClipSpec(48, 8, 64, 1, 1, 64, 64, 1, 1),  # demo and tests
}


def _block(
    x: jax.Array,
    params: Tree,
    activation: str,
    mask: jax.Array | None = None,
    tapped: bool = False,
) -> tuple[jax.Array, Tree]:
    """One pre-norm block: the stream (N, L, W) and, if tapped, its `queries` and `keys`."""
    taps = {}
    with jax.named_scope('attention'):
        halves = x, params['ln_1'], params['attn']
        if tapped or mask is not None or not kernels.attention_fits(x, params['attn']):
            x, q, k = _attention(*halves, mask)
            taps = {'queries': q, 'keys': k} if tapped else {}
        else:
            fast = functools.partial(kernels.on_each_device, kernels.residual_attention)
            x = kernels.on_tpu(fast, lambda *inputs: _attention(*inputs)[0], *halves)
    with jax.named_scope('mlp'):
        halves = x, params['ln_2'], params['mlp']
        plain = functools.partial(_mlp, activation=activation)
        if activation != 'quick_gelu' or not kernels.mlp_fits(x, params['mlp']):
            return plain(*halves), taps
        fast = functools.partial(kernels.on_each_device, kernels.residual_mlp)
        return kernels.on_tpu(fast, plain, *halves), taps


def _attention(
    x: jax.Array, norm: Tree, attn: Tree, mask: jax.Array | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """First half of a block: the stream after it, and queries and keys (N, L, h, d)."""
    dtype = x.dtype
    qkv, out = attn['qkv'], attn['out']
    heads, q, k = kernels.self_attention(
        layers.layer_norm(x, **norm), qkv['kernel'].astype(dtype), qkv['bias'].astype(dtype), mask
    )
    y = layers.einsum('nlhd,hdw->nlw', heads, out['kernel'].astype(dtype))
    return x + y + out['bias'].astype(dtype), q, k


def _mlp(x: jax.Array, norm: Tree, mlp: Tree, activation: str) -> jax.Array:
    """Second half of a block: the stream after it."""
    z = layers.ACTIVATIONS[activation](_linear(layers.layer_norm(x, **norm), mlp['c_fc']))
    return x + _linear(z, mlp['c_proj'])


def _linear(x: jax.Array, params: Tree) -> jax.Array:
    kernel, bias = params['kernel'].astype(x.dtype), params['bias'].astype(x.dtype)
    return layers.einsum('nli,io->nlo', x, kernel) + bias


@jax.named_scope('patch_embedding')
def _embed_patches(params: Tree, patches: jax.Array, spec: ClipSpec) -> jax.Array:
    """Patches (N, g*g, p*p*3) -> the stream (N, L, W) after `ln_pre`."""
    dtype = patches.dtype
    kernel = params['conv1']['kernel'].reshape(-1, spec.width).astype(dtype)
    x = layers.einsum('npi,iw->npw', patches, kernel)
    cls = jnp.broadcast_to(params['class_embedding'].astype(dtype), (x.shape[0], 1, spec.width))
    x = jnp.concatenate([cls, x], axis=1) + params['positional_embedding'].astype(dtype)
    return layers.layer_norm(x, **params['ln_pre'])


@jax.named_scope('image_tower')
def encode_image(
    params: Tree,
    pixels: jax.Array,
    spec: ClipSpec,
    taps: Taps,
    *,
    unroll: bool = False,
) -> dict[str, jax.Array]:
    """Runs the image tower as far as the taps need it.

    Args:
      params: the `visual` subtree.
      pixels: (N, H, W, 3), normalised (see `layers.Pixels`), or `layers.patchify` of them
        (N, g*g, p*p*3); their dtype is the compute dtype.
      spec: geometry; H = W = spec.image_size.
      taps: what to return.
      unroll: see `stack`.

    Returns:
      Only what was asked for, of: `stem` (N, L, W); `outputs` (K, N, L, W); `queries` and `keys`
      (K, N, L, h, d), or `attention` (K, ...) where the taps have a summary of them; `embedding`
      (N, E), not L2-normalised. L = 1 + g*g, class token first, patches row-major.

    Raises:
      ValueError: the image size is not the spec's, or a tap names a block that is not there.
    """
    patches = pixels
    if pixels.ndim == 4:
        if pixels.shape[1:3] != (spec.image_size, spec.image_size):
            raise ValueError(
                f'frames of {pixels.shape[1]}x{pixels.shape[2]} pixels for a backbone of '
                f'image_size={spec.image_size}; set data.image_size or resize the position table'
            )
        patches = layers.patchify(pixels, spec.patch_size)
    params = _gather_unstacked(params)
    x = _embed_patches(params, patches, spec)
    stem = {'stem': x} if taps.stem else {}

    def block(x: jax.Array, one: Tree, wanted: tuple[bool, bool]) -> tuple[jax.Array, Tree]:
        output, attention = wanted
        x, tapped = _block(x, one, spec.activation, tapped=attention)
        if attention and taps.summary:
            tapped = {'attention': taps.summary(tapped['queries'], tapped['keys'])}
        return x, tapped | ({'outputs': x} if output else {})

    wanted = [
        (i in taps.outputs, i in taps.attention) for i in range(taps.blocks_needed(spec.depth))
    ]
    x, tapped = scan_frozen(block, x, params['blocks'], wanted, unroll=unroll, rules=SHARDING_RULES)
    result = stem | tapped
    if taps.embedding:
        result['embedding'] = project_image(params, x[:, 0])
    return result


def project_image(params: Tree, class_token: jax.Array) -> jax.Array:
    """`ln_post` and projection of class tokens (N, W) of the last block -> float32 (N, E)."""
    z = layers.layer_norm(class_token, **params['ln_post'])
    kernel = params['proj']['kernel'].astype(z.dtype)
    return layers.einsum('nw,we->ne', z, kernel).astype(jnp.float32)


@jax.named_scope('text_tower')
def encode_text(
    params: Tree,
    tokens: jax.Array,
    spec: ClipSpec,
    *,
    dtype: Any = jnp.float32,
    unroll: bool = False,
) -> jax.Array:
    """Runs the text tower.

    Args:
      params: the `text` subtree.
      tokens: (n, S) int32, S at most spec.context_length; zero padded.
      spec: geometry.
      dtype: compute dtype.
      unroll: see `stack`.

    Returns:
      (n, E) float32, the projected feature at the end-of-text position (the largest id of the
      row), not L2-normalised.
    """
    length = tokens.shape[1]
    if length > spec.context_length:
        raise ValueError(f'{length} tokens, but the text tower reads at most {spec.context_length}')
    params = _gather_unstacked(params)
    x = params['token_embedding'][tokens] + params['positional_embedding'][:length]
    causal = jnp.tril(jnp.ones((length, length), bool))

    def block(x: jax.Array, one: Tree, _: None) -> tuple[jax.Array, Tree]:
        return _block(x, one, spec.activation, causal)[0], {}

    x, _ = scan_frozen(
        block,
        x.astype(dtype),
        params['blocks'],
        [None] * spec.text_depth,
        unroll=unroll,
        rules=SHARDING_RULES,
    )
    end = jnp.take_along_axis(x, tokens.argmax(-1)[:, None, None], axis=1)[:, 0]
    z = layers.layer_norm(end, **params['ln_final'])
    kernel = params['text_projection']['kernel'].astype(dtype)
    return layers.einsum('nw,we->ne', z, kernel).astype(jnp.float32)


def _gather_unstacked(params: Tree) -> Tree:
    """A tower with all but its blocks gathered over `fsdp`; the blocks are, one at a time."""
    unstacked = {name: part for name, part in params.items() if name != 'blocks'}
    return params | gather_params(unstacked, SHARDING_RULES)


def init_params(key: jax.Array, spec: ClipSpec, logit_scale: float = math.log(100.0)) -> Tree:
    """A random tower of this geometry, for tests, the demo and shape checks.

    Standard deviations follow the initialisation of the CLIP paper's code: width^-0.5 for
    attention, (2 width)^-0.5 for the first MLP matrix, both shrunk by (2 depth)^-0.5 on the way
    back to the stream.
    """
    keys = (jax.random.fold_in(key, i) for i in itertools.count())

    def normal(shape: tuple[int, ...], std: float) -> jax.Array:
        return std * jax.random.normal(next(keys), shape, jnp.float32)

    def norm(*shape: int) -> Tree:
        return {'scale': jnp.ones(shape), 'bias': jnp.zeros(shape)}

    def blocks(depth: int, width: int, heads: int) -> Tree:
        head_dim, hidden = width // heads, int(width * spec.mlp_ratio)
        shrink = (2 * depth) ** -0.5
        return {
            'ln_1': norm(depth, width),
            'attn': {
                'qkv': {
                    'kernel': normal((depth, width, 3, heads, head_dim), width**-0.5),
                    'bias': jnp.zeros((depth, 3, heads, head_dim)),
                },
                'out': {
                    'kernel': normal((depth, heads, head_dim, width), width**-0.5 * shrink),
                    'bias': jnp.zeros((depth, width)),
                },
            },
            'ln_2': norm(depth, width),
            'mlp': {
                'c_fc': {
                    'kernel': normal((depth, width, hidden), (2 * width) ** -0.5),
                    'bias': jnp.zeros((depth, hidden)),
                },
                'c_proj': {
                    'kernel': normal((depth, hidden, width), width**-0.5 * shrink),
                    'bias': jnp.zeros((depth, width)),
                },
            },
        }

    width, text_width, p = spec.width, spec.text_width, spec.patch_size
    return {
        'visual': {
            'conv1': {'kernel': normal((p, p, 3, width), (p * p * 3) ** -0.5)},
            'class_embedding': normal((width,), width**-0.5),
            'positional_embedding': normal((spec.num_tokens, width), width**-0.5),
            'ln_pre': norm(width),
            'blocks': blocks(spec.depth, width, spec.num_heads),
            'ln_post': norm(width),
            'proj': {'kernel': normal((width, spec.embed_dim), width**-0.5)},
        },
        'text': {
            'token_embedding': normal((spec.vocab_size, text_width), 0.02),
            'positional_embedding': normal((spec.context_length, text_width), 0.01),
            'blocks': blocks(spec.text_depth, text_width, spec.text_num_heads),
            'ln_final': norm(text_width),
            'text_projection': {'kernel': normal((text_width, spec.embed_dim), text_width**-0.5)},
        },
        'logit_scale': jnp.asarray(logit_scale, jnp.float32),
    }


# Of raw and prepared trees, whole or one layer. Heads and hidden channels are split in the first
# product of a branch and summed in the second, so a block needs two sums over `tensor`.
SHARDING_RULES = (
    ShardingRule(r'attn/qkv/kernel$', ('fsdp', None, 'tensor', None)),
    ShardingRule(r'attn/qkv/bias$', (None, 'tensor', None)),
    ShardingRule(r'attn/out/kernel$', ('tensor', None, 'fsdp')),
    ShardingRule(r'mlp/c_fc/kernel$', ('fsdp', 'tensor')),
    ShardingRule(r'mlp/c_fc/bias$', ('tensor',)),
    ShardingRule(r'mlp/c_proj/kernel$', ('tensor', 'fsdp')),
    ShardingRule(r'(conv1/kernel|token_embedding)$', ('fsdp',)),
    ShardingRule(r'proj(ection)?/kernel$', ('fsdp', None)),
    ShardingRule(r'(bias|scale|embedding)$'),
    ShardingRule(r'^text/\d+$'),  # features of class names
)


KIND = Kind(
    specs=SPECS,
    spec_class=ClipSpec,
    geometry=('patch_size', 'width', 'depth', 'num_heads'),
    pixels=PIXELS,
    sharding_rules=SHARDING_RULES,
    init_params=init_params,
    tables=('visual/positional_embedding',),
    resize=lambda table, spec: layers.resize_positions(table, (spec.grid,) * 2),
    encode_image=encode_image,
    encode_text=encode_text,
)
