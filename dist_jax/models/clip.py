"""The frozen CLIP image and text towers, as functions over a plain parameter tree.

Source: Radford et al. 2021 (arXiv:2103.00020), section 2.4 and the released weights.

The tree (W width, D depth, h heads, d head dim, p patch size, g = image_size / p, E embed_dim):

    visual/conv1/kernel (p, p, 3, W)
    visual/class_embedding (W,)             visual/positional_embedding (1 + g*g, W)
    visual/ln_pre/{scale,bias} (W,)
    visual/blocks/...                       stacked; see `transformer`
    visual/ln_post/{scale,bias} (W,)        visual/proj/kernel (W, E)
    text/token_embedding (V, Wt)            text/positional_embedding (S, Wt)
    text/blocks/...                         text/ln_final/{scale,bias}
    text/text_projection/kernel (Wt, E)
    logit_scale ()                          stored as a logarithm
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from dist_jax.models import layers, transformer
from dist_jax.models.backbone import Kind, Taps
from dist_jax.models.layers import Pixels
from dist_jax.models.stack import Slot
from dist_jax.sharding import ShardingRule

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
        if self.activation not in layers.ACTIVATIONS:
            raise ValueError(
                f'activation={self.activation!r} is not one of {sorted(layers.ACTIVATIONS)}'
            )
        transformer.check_heads(self)

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
    'tiny': ClipSpec(48, 8, 64, 1, 1, 64, 64, 1, 1),  # tests
    # Comes with the package (`dist_jax.shipped`).
    'tiny_clip': ClipSpec(32, 8, 64, 3, 4, 64, 64, 2, 4, context_length=24),
}


@jax.named_scope('patch_embedding')
def _embed_patches(params: Tree, patches: jax.Array) -> jax.Array:
    """Patches (N, g*g, p*p*3) -> the stream (N, L, W) after `ln_pre`."""
    x = transformer.embed_patches(
        patches,
        params['conv1']['kernel'],
        params['class_embedding'],
        params['positional_embedding'],
    )
    return layers.layer_norm(x, **params['ln_pre'])


def encode_image(
    params: Tree,
    pixels: jax.Array,
    spec: ClipSpec,
    taps: Taps,
    *,
    unroll: bool = False,
    remat: bool = False,
) -> dict[str, jax.Array]:
    """Runs the image tower as far as the taps need it.

    Args:
      params: the `visual` subtree.
      pixels: (N, H, W, 3), normalised (see `layers.Pixels`), or `layers.patchify` of them
        (N, g*g, p*p*3); their dtype is the compute dtype.
      spec: geometry; H = W = spec.image_size.
      taps: what to return.
      unroll: see `stack`.
      remat: of a tower that is trained: the backward pass computes what is inside of a block again.

    Returns:
      Only what was asked for, of: `stem` (N, L, W); `outputs` (K, N, L, W); `queries` and `keys`
      (K, N, L, h, d), or `attention` (K, ...) where the taps have a summary of them;
      `class_token` (N, W); `embedding` (N, E), not L2-normalised. L = 1 + g*g, class token first,
      patches row-major.

    Raises:
      ValueError: the image size is not the spec's, or a tap names a block that is not there.
    """

    def block(
        x: jax.Array, one: Tree, tapped: bool, slot: Slot | None
    ) -> tuple[jax.Array, jax.Array | None, Tree]:
        return transformer.block(x, one, spec.activation, tapped=tapped, slot=slot)

    return transformer.encode_image(
        params,
        pixels,
        spec,
        taps,
        embed=_embed_patches,
        block=block,
        project=project_image,
        rules=SHARDING_RULES,
        unroll=unroll,
        remat=remat,
    )


def project_image(params: Tree, class_token: jax.Array) -> jax.Array:
    """`ln_post` and projection of class tokens (N, W) of the last block -> float32 (N, E)."""
    z = layers.layer_norm(class_token, **params['ln_post'])
    kernel = params['proj']['kernel'].astype(z.dtype)
    return layers.einsum('nw,we->ne', z, kernel).astype(jnp.float32)


def init_params(key: jax.Array, spec: ClipSpec, logit_scale: float = math.log(100.0)) -> Tree:
    """A random tower of this geometry, for tests, the demo and shape checks."""
    normal, width, p = transformer.normals(key), spec.width, spec.patch_size
    hidden, text_hidden = (int(w * spec.mlp_ratio) for w in (width, spec.text_width))
    return {
        'visual': {
            'conv1': {'kernel': normal((p, p, 3, width), (p * p * 3) ** -0.5)},
            'class_embedding': normal((width,), width**-0.5),
            'positional_embedding': normal((spec.num_tokens, width), width**-0.5),
            'ln_pre': transformer.init_norm(width),
            'blocks': transformer.init_blocks(normal, spec.depth, width, spec.num_heads, hidden),
            'ln_post': transformer.init_norm(width),
            'proj': {'kernel': normal((width, spec.embed_dim), width**-0.5)},
        },
        'text': transformer.init_text(normal, spec, text_hidden),
        'logit_scale': jnp.asarray(logit_scale, jnp.float32),
    }


SHARDING_RULES = (ShardingRule(r'conv1/kernel$', ('fsdp',)), *transformer.SHARDING_RULES)

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
    projection=('ln_post', 'proj'),
    project_image=project_image,
    encode_text=transformer.encode_text,
    encode_words=transformer.encode_words,
)
