"""What frozen towers of tokens share: the way through an image tower, and CLIP's pre-norm blocks.

The blocks are those of CLIP's image tower and of the text tower, which other kinds have as well. A
stack of them (W width, D depth, h heads, d head dim):

    ln_1/{scale,bias} (D, W)                ln_2/{scale,bias} (D, W)
    attn/qkv/{kernel (D, W, 3, h, d), bias (D, 3, h, d)}
    attn/out/{kernel (D, h, d, W), bias (D, W)}
    mlp/c_fc/{kernel (D, W, hidden), bias}  mlp/c_proj/{kernel (D, hidden, W), bias}
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from dist_jax.models import kernels, layers
from dist_jax.models.backbone import Spec, Taps, check_image_size
from dist_jax.models.stack import Slot, scan_frozen
from dist_jax.sharding import ShardingRule, gather_params

Tree = dict[str, Any]
Normal = Callable[[tuple[int, ...], float], jax.Array]


class TextSpec(Protocol):
    """Geometry of a text tower."""

    text_width: int
    text_depth: int
    text_num_heads: int
    embed_dim: int
    vocab_size: int
    context_length: int

    @property
    def activation(self) -> str:
        """Of its blocks; a key of `layers.ACTIVATIONS`."""


def check_heads(spec: Any) -> None:
    """Raises ValueError unless patches divide the image, and heads the widths of both towers."""
    if spec.image_size % spec.patch_size:
        raise ValueError(
            f'image_size={spec.image_size} is not a multiple of patch_size={spec.patch_size}'
        )
    for width, heads in (
        ('width', 'num_heads'),
        ('text_width', 'text_num_heads'),
    ):
        if getattr(spec, width) % getattr(spec, heads):
            raise ValueError(
                f'{width}={getattr(spec, width)} is not a multiple of '
                f'{heads}={getattr(spec, heads)}'
            )


def image_patches(pixels: jax.Array, spec: Spec) -> jax.Array:
    """Pixels (N, H, W, 3), or patches already -> `layers.patchify` of them (N, g*g, p*p*3).

    Raises:
      ValueError: the image size is not the spec's.
    """
    if pixels.ndim == 3:
        return pixels
    check_image_size(*pixels.shape[1:3], spec)
    return layers.patchify(pixels, spec.patch_size)


def embed_patches(
    patches: jax.Array,
    kernel: jax.Array,
    class_embedding: jax.Array,
    positions: jax.Array,
    bias: jax.Array | None = None,
) -> jax.Array:
    """The stream before the first block, or before a norm there.

    Args:
      patches: (N, g*g, p*p*3).
      kernel: (p, p, 3, W).
      class_embedding: (W,).
      positions: (1 + g*g, W).
      bias: (W,), where the patches have one.

    Returns:
      (N, L, W) in the dtype of the patches, class token first.
    """
    dtype, width = patches.dtype, kernel.shape[-1]
    x = layers.einsum('npi,iw->npw', patches, kernel.reshape(-1, width).astype(dtype))
    if bias is not None:
        x += bias.astype(dtype)
    cls = jnp.broadcast_to(class_embedding.astype(dtype), (x.shape[0], 1, width))
    return jnp.concatenate([cls, x], axis=1) + positions.astype(dtype)


@jax.named_scope('image_tower')
def encode_image(
    params: Tree,
    pixels: jax.Array,
    spec: Spec,
    taps: Taps,
    *,
    embed: Callable[[Tree, jax.Array], jax.Array],
    block: Callable[[jax.Array, Tree, bool, Slot | None], tuple[jax.Array, jax.Array | None, Tree]],
    project: Callable[[Tree, jax.Array], jax.Array],
    rules: tuple[ShardingRule, ...],
    unroll: bool,
    remat: bool,
) -> dict[str, jax.Array]:
    """Runs an image tower as far as the taps need it; see `clip.encode_image`.

    Args:
      params: the `visual` subtree, its blocks stacked under `blocks`.
      pixels: as there.
      spec: geometry.
      taps: what to return.
      embed: (params, patches (N, g*g, p*p*3)) -> the stream (N, L, W) before the first block.
      block: (stream, parameters of one block, whether its attention is tapped, slot of the stream
        behind it or None) -> the stream after it, the stack of that slot with it or None, see
        `stack.scan_frozen`, and, if tapped, its `queries` and `keys`, (N, L, h, d) each.
      project: (params, class tokens (N, W) of the last block) -> float32 (N, E).
      rules: where the parameters lie.
      unroll: see `stack`.
      remat: the backward pass computes what is inside of a block again.
    """
    patches = image_patches(pixels, spec)
    params = gather_unstacked(params, rules)
    x = embed(params, patches)

    def one_block(
        x: jax.Array, one: Tree, wanted: tuple[bool, bool], slot: Slot | None
    ) -> tuple[jax.Array, jax.Array | None, Tree]:
        read, attention = wanted
        x, streams, tapped = block(x, one, attention, slot)
        if attention and taps.summary:
            tapped = {'attention': taps.summary(tapped['queries'], tapped['keys'])}
        if read and taps.apart:
            tapped['token'] = taps.reading.ready(x[:, 0])
        return x, streams, tapped

    found = {'stem': x} if taps.stem else {}
    blocks = range(taps.blocks_needed(spec.depth))
    kept = [i in taps.outputs for i in blocks]
    wanted = [(kept[i], i in taps.attention) for i in blocks]
    if remat:
        one_block = jax.checkpoint(one_block, prevent_cse=unroll, static_argnums=2)
    x, streams, tapped = scan_frozen(
        one_block,
        x,
        params['blocks'],
        wanted,
        kept=kept,
        reading=taps.reading,
        unroll=unroll,
        rules=rules,
    )
    if taps.apart and streams is not None:
        streams = {'token': tapped.pop('token'), 'patches': streams}
    found |= tapped
    if streams is not None:
        found['outputs'] = streams
    if taps.class_token:
        found['class_token'] = x[:, 0]
    if taps.embedding:
        found['embedding'] = project(params, x[:, 0])
    return found


def block(
    x: jax.Array,
    params: Tree,
    activation: str,
    mask: jax.Array | None = None,
    tapped: bool = False,
    slot: Slot | None = None,
) -> tuple[jax.Array, jax.Array | None, Tree]:
    """One pre-norm block; arguments and results as `encode_image` takes them.

    Returns:
      The stream (N, L, W), the stack of the slot with it or None, and, if tapped, its `queries` and
      `keys`.
    """
    taps = {}
    with jax.named_scope('attention'):
        halves = x, params['ln_1'], params['attn']
        if mask is not None or not kernels.attention_fits(x, params['attn'], tapped):
            x, *heads = attention(*halves, mask)
        elif tapped:
            fast = functools.partial(kernels.residual_attention, tapped=True)
            fast = functools.partial(kernels.on_each_device, fast)
            x, *heads = kernels.on_tpu(fast, attention, *halves)
        else:
            fast = functools.partial(kernels.on_each_device, kernels.residual_attention)
            x = kernels.on_tpu(fast, lambda *inputs: attention(*inputs)[0], *halves)
        if tapped:
            taps = dict(zip(('queries', 'keys'), heads, strict=True))
    with jax.named_scope('mlp'):
        halves = x, params['ln_2'], params['mlp']
        plain = functools.partial(mlp, activation=activation)
        if activation != 'quick_gelu' or not kernels.mlp_fits(x, params['mlp']):
            return plain(*halves), None, taps
        if slot is None or not kernels.mlp_fits(x, params['mlp'], kept=True):
            fast = functools.partial(kernels.on_each_device, kernels.residual_mlp)
            return kernels.on_tpu(fast, plain, *halves), None, taps
        return *kernels.kept_on_tpu(kernels.residual_mlp, plain, slot, *halves), taps


def attention(
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


def mlp(x: jax.Array, norm: Tree, mlp: Tree, activation: str) -> jax.Array:
    """Second half of a block: the stream after it."""
    z = layers.ACTIVATIONS[activation](linear(layers.layer_norm(x, **norm), mlp['c_fc']))
    return x + linear(z, mlp['c_proj'])


def linear(x: jax.Array, params: Tree) -> jax.Array:
    """Affine map of the last axis of (n, L, i), in the dtype of `x`."""
    kernel, bias = params['kernel'].astype(x.dtype), params['bias'].astype(x.dtype)
    return layers.einsum('nli,io->nlo', x, kernel) + bias


@jax.named_scope('text_tower')
def encode_text(
    params: Tree,
    tokens: jax.Array,
    spec: TextSpec,
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
    params = gather_unstacked(params, SHARDING_RULES)
    x = _text_stream(params, tokens, spec, dtype, unroll)
    return _project_text(params, at_end(x, tokens)).astype(jnp.float32)


@jax.named_scope('text_tower')
def encode_words(
    params: Tree,
    tokens: jax.Array,
    spec: TextSpec,
    *,
    dtype: Any = jnp.float32,
    unroll: bool = False,
    remat: bool = False,
) -> jax.Array:
    """As `encode_text`, but the projected feature of every token: (n, S, E) in `dtype`.

    Args:
      remat: the backward pass computes what is inside of a block again.
    """
    params = gather_unstacked(params, SHARDING_RULES)
    return _project_text(params, _text_stream(params, tokens, spec, dtype, unroll, remat))


def at_end(x: jax.Array, tokens: jax.Array) -> jax.Array:
    """The row of (n, S, ...) at the end of each text (n, S), its largest token."""
    return jnp.take_along_axis(x, tokens.argmax(-1)[:, None, None], axis=1)[:, 0]


def _text_stream(
    params: Tree,
    tokens: jax.Array,
    spec: TextSpec,
    dtype: Any,
    unroll: bool,
    remat: bool = False,
) -> jax.Array:
    """The stream (n, S, Wt) behind the last block."""
    length = tokens.shape[1]
    if length > spec.context_length:
        raise ValueError(f'{length} tokens, but the text tower reads at most {spec.context_length}')
    x = params['token_embedding'][tokens] + params['positional_embedding'][:length]
    causal = jnp.tril(jnp.ones((length, length), bool))

    def run(x: jax.Array, one: Tree) -> jax.Array:
        return block(x, one, spec.activation, causal)[0]

    run = jax.checkpoint(run, prevent_cse=unroll) if remat else run
    x, *_ = scan_frozen(
        lambda x, one, *_: (run(x, one), None, {}),
        x.astype(dtype),
        params['blocks'],
        [None] * spec.text_depth,
        unroll=unroll,
        rules=SHARDING_RULES,
    )
    return x


def _project_text(params: Tree, x: jax.Array) -> jax.Array:
    """The last norm and the projection of (..., Wt) -> (..., E)."""
    z = layers.layer_norm(x, **params['ln_final'])
    kernel = params['text_projection']['kernel'].astype(z.dtype)
    return layers.einsum('...w,we->...e', z, kernel)


def gather_unstacked(params: Tree, rules: tuple[ShardingRule, ...]) -> Tree:
    """A tower with all but its blocks gathered over `fsdp`; the blocks are, one at a time."""
    unstacked = {name: part for name, part in params.items() if name != 'blocks'}
    return params | gather_params(unstacked, rules)


def normals(key: jax.Array) -> Normal:
    """(shape, standard deviation) -> float32 numbers, others at every call."""
    keys = (jax.random.fold_in(key, i) for i in itertools.count())

    def normal(shape: tuple[int, ...], std: float) -> jax.Array:
        return std * jax.random.normal(next(keys), shape, jnp.float32)

    return normal


def init_norm(*shape: int) -> Tree:
    """A norm that does nothing yet."""
    return {'scale': jnp.ones(shape), 'bias': jnp.zeros(shape)}


def init_linear(normal: Normal, std: float, *shape: int) -> Tree:
    """A stack of linear maps (D, i, o) without a bias yet."""
    return {'kernel': normal(shape, std), 'bias': jnp.zeros((*shape[:-2], shape[-1]))}


def init_attention(normal: Normal, depth: int, width: int, heads: int) -> Tree:
    """Projections of a stack of blocks; see `init_blocks`."""
    head_dim = width // heads
    return {
        'qkv': {
            'kernel': normal((depth, width, 3, heads, head_dim), width**-0.5),
            'bias': jnp.zeros((depth, 3, heads, head_dim)),
        },
        'out': {
            'kernel': normal((depth, heads, head_dim, width), _way_back(depth, width)),
            'bias': jnp.zeros((depth, width)),
        },
    }


def _way_back(depth: int, width: int) -> float:
    return width**-0.5 * (2 * depth) ** -0.5


def init_blocks(normal: Normal, depth: int, width: int, heads: int, hidden: int) -> Tree:
    """Random blocks.

    Standard deviations follow the initialisation of the CLIP paper's code: width^-0.5 for
    attention, (2 width)^-0.5 for the first MLP matrix, both shrunk by (2 depth)^-0.5 on the way
    back to the stream.
    """
    return {
        'ln_1': init_norm(depth, width),
        'attn': init_attention(normal, depth, width, heads),
        'ln_2': init_norm(depth, width),
        'mlp': {
            'c_fc': init_linear(normal, (2 * width) ** -0.5, depth, width, hidden),
            'c_proj': init_linear(normal, _way_back(depth, width), depth, hidden, width),
        },
    }


def init_text(normal: Normal, spec: TextSpec, hidden: int) -> Tree:
    """A random text tower."""
    width = spec.text_width
    return {
        'token_embedding': normal((spec.vocab_size, width), 0.02),
        'positional_embedding': normal((spec.context_length, width), 0.01),
        'blocks': init_blocks(normal, spec.text_depth, width, spec.text_num_heads, hidden),
        'ln_final': init_norm(width),
        'text_projection': {'kernel': normal((width, spec.embed_dim), width**-0.5)},
    }


# Heads and hidden channels are split in the first product of a branch and summed in the second, so
# a block needs two sums over `tensor`.
BLOCK_RULES = (
    ShardingRule(r'attn/qkv/kernel$', ('fsdp', None, 'tensor', None)),
    ShardingRule(r'attn/qkv/bias$', (None, 'tensor', None)),
    ShardingRule(r'attn/out/kernel$', ('tensor', None, 'fsdp')),
    ShardingRule(r'mlp/c_fc/kernel$', ('fsdp', 'tensor')),
    ShardingRule(r'mlp/c_fc/bias$', ('tensor',)),
    ShardingRule(r'mlp/c_proj/kernel$', ('tensor', 'fsdp')),
)

# Of raw and prepared trees, whole or one layer.
SHARDING_RULES = (
    *BLOCK_RULES,
    ShardingRule(r'token_embedding$', ('fsdp',)),
    ShardingRule(r'proj(ection)?/kernel$', ('fsdp', None)),
    ShardingRule(r'(bias|scale|embedding)$'),
    ShardingRule(r'^text/\d+$'),  # features of class names
)
