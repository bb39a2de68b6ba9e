"""The frozen EVA-02-CLIP image and text towers, as functions over a plain parameter tree.

Source: Sun et al. 2023 (arXiv:2303.15389), Fang et al. 2023 (arXiv:2303.11331) and the released
weights. Two kinds of image tower: B and L have norms before each half of a block, norms inside
both (sub-LN), SwiGLU and rotary positions; bigE has a norm after each half, and GELU. Both add a
table of positions as well. The text tower is CLIP's, with exact GELU.

The tree (W width, D depth, h heads, d head dim, p patch size, g = image_size / p, H mlp_hidden,
E embed_dim):

    visual/patch_embed/{kernel (p, p, 3, W), bias (W,)}
    visual/class_embedding (W,)             visual/positional_embedding (1 + g*g, W)
    visual/blocks/                          stacked, the layer on axis 0
        norm1/{scale,bias} (D, W)           norm2/{scale,bias} (D, W)
        attn/qkv/{kernel (D, W, 3, h, d), bias (D, 3, h, d)}    the keys' bias is 0
        attn/inner_attn_ln/{scale,bias} (D, W)                  with sub-LN
        attn/out/{kernel (D, h, d, W), bias (D, W)}
        mlp/fc1/{kernel (D, W, H), bias}    mlp/fc2/{kernel (D, H, W), bias}
        mlp/{w1,w2}/... as fc1              mlp/w3/... as fc2, instead of both with SwiGLU
        mlp/ffn_ln/{scale,bias} (D, H)                          with sub-LN
    visual/norm/{scale,bias} (W,)           visual/head/{kernel (W, E), bias (E,)}
    text/..., logit_scale ()                see `clip`; not in the tree of an image tower alone
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dist_jax.models import kernels, layers, transformer
from dist_jax.models.backbone import Kind, Taps
from dist_jax.models.clip import PIXELS
from dist_jax.models.stack import Slot
from dist_jax.sharding import ShardingRule

Tree = dict[str, Any]

NORM_EPS = 1e-6  # of all norms of the image tower
ROPE_BASE = 10_000.0


@dataclasses.dataclass(frozen=True)
class EvaSpec:
    """Geometry of one EVA-02-CLIP model; it travels with the converted checkpoint.

    Attributes:
      mlp_hidden: hidden width of the image tower's MLPs.
      text_width: 0, and text_depth too, for an image tower alone.
      post_norm: the norm of each half of a block follows it, inside the residual branch.
      sub_ln: a norm of the heads before their projection, and of the hidden channels.
      swiglu: hidden channels are silu(w1) * w2 instead of gelu(fc1).
      rope: queries and keys of patches turn with their place.
      rope_grid: places are numbers from 0 to this, whatever the grid.
    """

    image_size: int
    patch_size: int
    width: int
    depth: int
    num_heads: int
    embed_dim: int
    mlp_hidden: int
    text_width: int
    text_depth: int
    text_num_heads: int
    vocab_size: int = 49408
    context_length: int = 77
    post_norm: bool = False
    sub_ln: bool = True
    swiglu: bool = True
    rope: bool = True
    rope_grid: int = 16

    def __post_init__(self) -> None:
        transformer.check_heads(self)
        if self.rope and self.head_dim % 4:
            raise ValueError(
                f'width={self.width} with num_heads={self.num_heads}: rotary positions need heads '
                f'of a multiple of 4 channels, not of {self.head_dim}'
            )

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def num_tokens(self) -> int:
        """Tokens of one frame, the class token included."""
        return 1 + self.grid**2

    @property
    def head_dim(self) -> int:
        """Channels of a head of the image tower."""
        return self.width // self.num_heads

    @property
    def activation(self) -> str:
        """Of the text tower."""
        return 'gelu'


_E14 = EvaSpec(
    image_size=224,
    patch_size=14,
    width=1792,
    depth=64,
    num_heads=16,
    embed_dim=1024,
    mlp_hidden=15360,
    text_width=1024,
    text_depth=24,
    text_num_heads=16,
    post_norm=True,
    sub_ln=False,
    swiglu=False,
    rope=False,
)
_L14 = EvaSpec(224, 14, 1024, 24, 16, 768, 2730, 768, 12, 12)
_TINY = EvaSpec(48, 8, 64, 2, 2, 64, 170, 64, 1, 1)

SPECS: dict[str, EvaSpec] = {
    'eva02_b16': EvaSpec(224, 16, 768, 12, 12, 512, 2048, 512, 12, 8),
    'eva02_l14': _L14,
    'eva02_l14_336': dataclasses.replace(_L14, image_size=336),
    'eva02_e14': _E14,
    'eva02_e14_plus': dataclasses.replace(_E14, text_width=1280, text_depth=32, text_num_heads=20),
    # Tests: blocks as those of bigE, and as those of B and L.
    'eva_tiny': dataclasses.replace(
        _TINY, mlp_hidden=256, post_norm=True, sub_ln=False, swiglu=False, rope=False
    ),
    'eva_tiny_rope': _TINY,
}

_norm = functools.partial(layers.layer_norm, eps=NORM_EPS)


def _block(
    x: jax.Array, params: Tree, tapped: bool, slot: Slot | None, spec: EvaSpec
) -> tuple[jax.Array, None, Tree]:
    """One block: the stream (N, L, W), None, and, if tapped, its `queries` and `keys`."""
    del slot  # the loop writes it
    with jax.named_scope('attention'):
        z, q, k = _attention(_before(x, params['norm1'], spec), params['attn'], spec)
        x = x + _behind(z, params['norm1'], spec)
    with jax.named_scope('mlp'):
        x = _second_half(x, params['norm2'], params['mlp'], spec)
    return x, None, {'queries': q, 'keys': k} if tapped else {}


def _before(x: jax.Array, norm: Tree, spec: EvaSpec) -> jax.Array:
    return x if spec.post_norm else _norm(x, **norm)


def _behind(z: jax.Array, norm: Tree, spec: EvaSpec) -> jax.Array:
    return _norm(z, **norm) if spec.post_norm else z


def _attention(z: jax.Array, attn: Tree, spec: EvaSpec) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What attention gives for (N, L, W); queries and keys (N, L, h, d) as their product is taken.

    The latter are turned where the tower has rotary positions.
    """
    dtype, out = z.dtype, attn['out']
    kernel, bias = attn['qkv']['kernel'].astype(dtype), attn['qkv']['bias'].astype(dtype)
    rotate = functools.partial(_rotate, spec=spec) if spec.rope else None
    heads, q, k = kernels.self_attention(z, kernel, bias, rotate=rotate)
    if spec.sub_ln:
        normed = _norm(heads.reshape(z.shape), **attn['inner_attn_ln'])
        heads = normed.reshape(heads.shape)
    y = layers.einsum('nlhd,hdw->nlw', heads, out['kernel'].astype(dtype))
    return y + out['bias'].astype(dtype), q, k


def _second_half(x: jax.Array, norm: Tree, mlp: Tree, spec: EvaSpec) -> jax.Array:
    """The stream (N, L, W) after the second half of a block; a kernel on TPU, if it takes these."""

    def plain(x: jax.Array, norm: Tree, mlp: Tree) -> jax.Array:
        return x + _behind(_mlp(_before(x, norm, spec), mlp, spec), norm, spec)

    def fast(x: jax.Array, norm: Tree, mlp: Tree) -> jax.Array:
        kernel = functools.partial(
            kernels.residual_mlp, activation='gelu', post_norm=spec.post_norm, eps=NORM_EPS
        )
        return kernels.on_each_device(kernel, x, norm, _as_clip(mlp))

    # Of SwiGLU and norms inside there is no kernel.
    if spec.swiglu or spec.sub_ln or not kernels.mlp_fits(x, _as_clip(mlp), spec.post_norm):
        return plain(x, norm, mlp)
    return kernels.on_tpu(fast, plain, x, norm, mlp)


def _as_clip(mlp: Tree) -> Tree:
    """Under the names that kernels know."""
    return {'c_fc': mlp['fc1'], 'c_proj': mlp['fc2']}


def _mlp(z: jax.Array, mlp: Tree, spec: EvaSpec) -> jax.Array:
    """What the second half of a block adds, without its norm."""
    if spec.swiglu:
        first, last = transformer.linear(z, mlp['w1']), mlp['w3']
        hidden = jax.nn.silu(first) * transformer.linear(z, mlp['w2'])
    else:
        hidden, last = layers.ACTIVATIONS['gelu'](transformer.linear(z, mlp['fc1'])), mlp['fc2']
    if spec.sub_ln:
        hidden = _norm(hidden, **mlp['ffn_ln'])
    return transformer.linear(hidden, last)


def _rotate(x: jax.Array, spec: EvaSpec) -> jax.Array:
    """Queries or keys (N, L, h, d), turned by the place of their patch."""
    cosine, sine = rotary_tables(spec.grid, spec.head_dim, spec.rope_grid)
    even = np.arange(x.shape[-1]) % 2 == 0
    x32 = x.astype(jnp.float32)
    # Neighbours by whole shifts: pairs on an axis of their own would fill a register each on TPU.
    neighbour = jnp.where(even, -jnp.roll(x32, -1, axis=-1), jnp.roll(x32, 1, axis=-1))
    return (x32 * cosine[:, None] + neighbour * sine[:, None]).astype(x.dtype)


def rotary_tables(grid: int, head_dim: int, rope_grid: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine of every token's angles, float32 (1 + grid*grid, head_dim).

    The first half of the channels turns with the row, the second with the column, both stretched to
    `rope_grid` places. Channels 2j and 2j + 1 of a half are the two coordinates of what turns by
    place * 10000^(-4j / head_dim). The class token does not turn.
    """
    half = head_dim // 2
    places = np.arange(grid) / grid * rope_grid
    angles = places[:, None] * ROPE_BASE ** (-np.arange(0, half, 2) / half)
    angles = np.repeat(angles, 2, axis=-1)
    shape = grid, grid, half
    rows, columns = (np.broadcast_to(x, shape) for x in (angles[:, None], angles[None]))
    patches = np.concatenate([rows, columns], axis=-1).reshape(-1, head_dim)
    tokens = np.concatenate([np.zeros((1, head_dim)), patches])
    return np.cos(tokens).astype(np.float32), np.sin(tokens).astype(np.float32)


@jax.named_scope('patch_embedding')
def _embed_patches(params: Tree, patches: jax.Array) -> jax.Array:
    """Patches (N, g*g, p*p*3) -> the stream (N, L, W) before the first block."""
    return transformer.embed_patches(
        patches,
        params['patch_embed']['kernel'],
        params['class_embedding'],
        params['positional_embedding'],
        params['patch_embed']['bias'],
    )


def encode_image(
    params: Tree,
    pixels: jax.Array,
    spec: EvaSpec,
    taps: Taps,
    *,
    unroll: bool = False,
    remat: bool = False,
) -> dict[str, jax.Array]:
    """Runs the image tower as far as the taps need it.

    Arguments, result and errors are those of `clip.encode_image`. Queries and keys are those whose
    product the attention takes: with rotary positions, already turned.
    """
    return transformer.encode_image(
        params,
        pixels,
        spec,
        taps,
        embed=_embed_patches,
        block=functools.partial(_block, spec=spec),
        project=project_image,
        rules=SHARDING_RULES,
        unroll=unroll,
        remat=remat,
    )


def project_image(params: Tree, class_token: jax.Array) -> jax.Array:
    """`norm` and `head` of class tokens (N, W) of the last block -> float32 (N, E)."""
    z, head = _norm(class_token, **params['norm']), params['head']
    y = layers.einsum('nw,we->ne', z, head['kernel'].astype(z.dtype))
    return (y + head['bias'].astype(z.dtype)).astype(jnp.float32)


def init_params(key: jax.Array, spec: EvaSpec, logit_scale: float = math.log(100.0)) -> Tree:
    """A random tower of this geometry, for tests and shape checks."""
    normal, width, p = transformer.normals(key), spec.width, spec.patch_size
    tree = {
        'visual': {
            'patch_embed': {
                'kernel': normal((p, p, 3, width), (p * p * 3) ** -0.5),
                'bias': jnp.zeros(width),
            },
            'class_embedding': normal((width,), width**-0.5),
            'positional_embedding': normal((spec.num_tokens, width), width**-0.5),
            'blocks': _init_blocks(normal, spec),
            'norm': transformer.init_norm(width),
            'head': transformer.init_linear(normal, width**-0.5, width, spec.embed_dim),
        }
    }
    if spec.text_depth:
        tree['text'] = transformer.init_text(normal, spec, 4 * spec.text_width)
        tree['logit_scale'] = jnp.asarray(logit_scale, jnp.float32)
    return tree


def _init_blocks(normal: transformer.Normal, spec: EvaSpec) -> Tree:
    depth, width, hidden = spec.depth, spec.width, spec.mlp_hidden
    first, last = (('w1', 'w2'), 'w3') if spec.swiglu else (('fc1',), 'fc2')
    attn = transformer.init_attention(normal, depth, width, spec.num_heads)
    mlp = {
        name: transformer.init_linear(normal, (2 * width) ** -0.5, depth, width, hidden)
        for name in first
    }
    mlp[last] = transformer.init_linear(normal, hidden**-0.5, depth, hidden, width)
    if spec.sub_ln:
        attn['inner_attn_ln'] = transformer.init_norm(depth, width)
        mlp['ffn_ln'] = transformer.init_norm(depth, hidden)
    return {
        'norm1': transformer.init_norm(depth, width),
        'attn': attn,
        'norm2': transformer.init_norm(depth, width),
        'mlp': mlp,
    }


# As those of `transformer`, which follow, for the names that the image tower has instead.
SHARDING_RULES = (
    ShardingRule(r'mlp/(fc1|w1|w2)/kernel$', ('fsdp', 'tensor')),
    ShardingRule(r'mlp/(fc1|w1|w2)/bias$', ('tensor',)),
    ShardingRule(r'mlp/(fc2|w3)/kernel$', ('tensor', 'fsdp')),
    ShardingRule(r'patch_embed/kernel$', ('fsdp',)),
    ShardingRule(r'head/kernel$', ('fsdp', None)),
    *transformer.SHARDING_RULES,
)

KIND = Kind(
    specs=SPECS,
    spec_class=EvaSpec,
    geometry=(
        'patch_size',
        'width',
        'depth',
        'num_heads',
        'mlp_hidden',
        'post_norm',
        'sub_ln',
        'swiglu',
        'rope',
    ),
    pixels=PIXELS,
    sharding_rules=SHARDING_RULES,
    init_params=init_params,
    tables=('visual/positional_embedding',),
    resize=lambda table, spec: layers.resize_positions(table, (spec.grid,) * 2),
    encode_image=encode_image,
    projection=('norm', 'head'),
    project_image=project_image,
    encode_text=transformer.encode_text,
    encode_words=transformer.encode_words,
)
