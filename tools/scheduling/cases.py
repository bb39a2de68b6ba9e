"""Kernels and the shapes at which configs call them; a new kernel adds one entry."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from dist_jax.models import (
    clip_reading,
    integration_kernel,
    kernel_costs,
    kernels,
    neighbour_kernel,
    patch_kernel,
    side_kernel,
    temporal_kernel,
)
from dist_jax.models.kernel_costs import LANES
from dist_jax.models.params import Tree
from dist_jax.models.stack import Reading, Slot

FRAMES = 256  # on a chip; a schedule's first and last frame count for little
B32, B16, L14, L14_336 = (50, 768, 12), (197, 768, 12), (257, 1024, 16), (577, 1024, 16)
B16_336, B16_448 = (442, 768, 12), (785, 768, 12)
BIG_E = (257, 1792, 16)
# Side networks: B/32 and B/16, L/14, E/14, and the light ones.
SIDES = tuple(
    {'tokens': tokens, 'queries': tokens - 1, 'heads': heads, 'head_dim': 64}
    for tokens, heads in ((50, 5), (197, 5), (257, 8), (257, 9), (197, 2), (257, 5))
)

# Decoders of clips of eight frames: B/16, L/14.
READERS = tuple(
    {'tokens': tokens, 'width': width, 'heads': heads} for tokens, width, heads in (B16, L14)
)

Arguments = tuple[Tree, ...]  # of arrays without values


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel.

    Attributes:
      build: (frames, **shape) -> the function that calls it, and its arguments.
      shapes: as `kernel_costs.WORK` takes them.
    """

    build: Callable[..., tuple[Callable[..., Any], Arguments]]
    shapes: tuple[dict[str, int], ...]


def _array(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _norm(width: int) -> Tree:
    return {name: _array(width, dtype=jnp.float32) for name in ('scale', 'bias')}


def _dense(inputs: tuple[int, ...], outputs: tuple[int, ...]) -> Tree:
    return {'kernel': _array(*inputs, *outputs), 'bias': _array(*outputs)}


def _frame_attention(frames: int, tokens: int, queries: int, heads: int, head_dim: int):
    def function(qkv: jax.Array) -> jax.Array:
        return kernels.frame_attention(qkv, heads, head_dim, queries)

    return function, (_array(frames, tokens, 3 * _lanes(heads, head_dim)),)


def _frame_attention_gradient(frames: int, tokens: int, queries: int, heads: int, head_dim: int):
    def function(qkv: jax.Array, upstream: jax.Array) -> tuple[jax.Array, jax.Array]:
        return kernels.frame_attention_gradient(qkv, upstream, heads, head_dim)

    lanes = _lanes(heads, head_dim)
    return function, (_array(frames, tokens, 3 * lanes), _array(frames, queries, lanes))


def _lanes(heads: int, head_dim: int) -> int:
    return kernels.groups_of_heads(heads, head_dim) * kernels.LANES


def _residual_attention(
    frames: int, tokens: int, width: int, heads: int, head_dim: int, tapped: bool = False
):
    attn = {
        'qkv': _dense((width,), (3, heads, head_dim)),
        'out': _dense((heads, head_dim), (width,)),
    }
    function = functools.partial(kernels.residual_attention, tapped=tapped)
    return function, (_array(frames, tokens, width), _norm(width), attn)


def _mean_attention(frames: int, tokens: int, heads: int, head_dim: int):
    sizes = {'num_heads': heads, 'head_dim': head_dim, 'clip': 8}
    function = functools.partial(neighbour_kernel.mean_attention, **sizes)
    return function, 2 * (_array(frames, tokens, heads * head_dim),)


def _read_clip(frames: int, tokens: int, width: int, heads: int, gradient: bool = False):
    clips, clip, side = frames // 8, 8, math.isqrt(tokens - 1)
    slot = Slot(_array(2, frames, tokens, width), _array(dtype=jnp.int32))
    taps, shift = (_array(n, width, dtype=jnp.float32) for n in (3, clip))
    query, sums = _array(clips, heads, width), _array(clips, heads, LANES, dtype=jnp.float32)
    if gradient:
        rest = query, query, _array(frames, tokens, width), sums, sums
        function = functools.partial(clip_reading._run_backward, rows=side)
        return function, (slot, taps, shift, _norm(width), *rest)
    moved = _array(frames, side, side, width, dtype=jnp.float32)
    return clip_reading._run_forward, (slot, moved, taps, shift, _norm(width), query)


def _residual_mlp(
    frames: int,
    tokens: int,
    width: int,
    hidden: int,
    part: int,
    post_norm: bool = False,
    reading: Reading | None = None,
):
    x, kept = _array(frames, tokens, width), reading is not None
    if kernels.mlp_tile(x.shape, hidden, post_norm, kept).hidden != part:
        raise ValueError(f'residual_mlp does not take {part} of {hidden} channels at a time')
    mlp = {'c_fc': _dense((width,), (hidden,)), 'c_proj': _dense((hidden,), (width,))}
    activation = 'gelu' if post_norm else 'quick_gelu'
    function = functools.partial(
        kernels.residual_mlp, activation=activation, post_norm=post_norm, eps=1e-6
    )
    if not kept:
        return function, (x, _norm(width), mlp)
    stack = _array(2, *jax.eval_shape(reading.of, x).shape)
    return function, (x, _norm(width), mlp, Slot(stack, _array(dtype=jnp.int32), reading))


def _mlp_shapes(kept: bool = False) -> tuple[dict[str, int], ...]:
    return tuple(
        {
            'tokens': tokens,
            'width': width,
            'hidden': 4 * width,
            'part': kernels.mlp_tile((FRAMES, tokens, width), 4 * width, kept=kept).hidden,
        }
        for tokens, width, _ in (B32, B16, L14, L14_336, B16_336)
    )


def _sum_of_products(frames: int, tokens: int, rows: int, columns: int):
    factors = (_array(frames, tokens, rows), _array(frames, tokens, columns))
    return kernels.sum_of_products, factors


def _sums(side: dict[str, int]) -> tuple[dict[str, int], ...]:
    """What the two projections of a side network's attention take."""
    width, lanes = side['heads'] * side['head_dim'], _lanes(side['heads'], side['head_dim'])
    return (
        {'tokens': side['tokens'], 'rows': width, 'columns': 3 * lanes},
        {'tokens': side['queries'], 'rows': lanes, 'columns': width},
    )


def _cut_patches(frames: int, size: int, patch: int):
    function = functools.partial(patch_kernel.cut_patches, patch_size=patch)
    return function, (_array(frames, size, 3 * size),)


def _temporal_net(
    frames: int, places: int, channels: int, hidden: int, kernel_size: int, of_clip: int
):
    x = _array(frames // of_clip, of_clip, places, channels)
    params = {
        'ln': _norm(channels),
        'c_fc1': _wide((kernel_size, channels), hidden),
        'c_fc2': _wide((3, 3, hidden), channels),
    }
    return temporal_kernel.temporal_net, (x, params)


def _temporal_net_gradient(frames: int, **shape: int):
    _, (x, params) = _temporal_net(frames, **shape)
    return temporal_kernel.temporal_net_gradient, (x, x, params)


def _wide(inputs: tuple[int, ...], outputs: int) -> Tree:
    """As it is trained."""
    return {
        'kernel': _array(*inputs, outputs, dtype=jnp.float32),
        'bias': _array(outputs, dtype=jnp.float32),
    }


# DiST of B/32, B/16, L/14 with 16 frames and with 64.
TEMPORAL_NETS = tuple(
    {'places': places, 'channels': 96, 'hidden': 96, 'kernel_size': 3, 'of_clip': of_clip}
    for places, of_clip in ((49, 16), (196, 16), (196, 64), (256, 16), (256, 64))
)


CLIP, TEMPORAL, CHANNELS = 8, 96, 384  # of DiST: frames, channels of both branches


def _integration(frames: int, tokens: int, width: int, channels: int, hidden: int, alpha: int):
    x, r, taps, params = _block(frames, tokens, width, channels, hidden, alpha)
    return functools.partial(integration_kernel.forward, last=False), (
        x,
        r,
        taps,
        _array(dtype=jnp.int32),
        params,
    )


def _integration_gradient(
    frames: int, tokens: int, width: int, channels: int, hidden: int, alpha: int
):
    x, r, taps, params = _block(frames, tokens, width, channels, hidden, alpha)
    function = functools.partial(integration_kernel.backward, last=False)
    return function, (x, r, taps, _array(dtype=jnp.int32), params, (x, r))


def _block(
    frames: int, tokens: int, width: int, channels: int, hidden: int, alpha: int
) -> Arguments:
    """Both streams, two layers' frozen outputs, and the parameters of DiST's integration block."""
    clips, narrow = frames // CLIP, channels // 4

    def linear(*shape: int) -> Tree:
        kernel, bias = (_array(*size, dtype=jnp.float32) for size in (shape, shape[-1:]))
        return {'kernel': kernel, 'bias': bias}

    params = {
        'input_linear': linear(width, channels),
        'temporal2integration': linear(alpha, TEMPORAL, channels)
        | {'cls_token': _array(CLIP, channels, dtype=jnp.float32)},
        'integration_net': {
            'ln': _norm(channels),
            'ln_temporal': _norm(channels),
            'ffn': {'c_fc': linear(channels, hidden), 'c_proj': linear(hidden, channels)},
            'temporal_ffn': {
                'c_fc1': linear(channels, narrow),
                'c_fc2': linear(3, narrow, narrow),
                'c_proj': linear(narrow, channels),
            },
        },
        'integration2temporal': linear(channels, TEMPORAL),
    }
    return (
        _array(clips, alpha * CLIP, tokens - 1, TEMPORAL),
        _array(clips, CLIP, tokens, channels),
        _array(2, frames, tokens, width),
        params,
    )


INTEGRATION = tuple(
    {'tokens': tokens, 'width': width, 'channels': CHANNELS, 'hidden': CHANNELS, 'alpha': 2}
    for tokens, width, _ in (B16, L14)
)


def _of_side_network(
    function: Callable[..., Any], arrays: int, frames: int, clip: int, params: Tree, *size: int
):
    """A kernel of `side_kernel`, of as many arrays of frames."""
    rows = _array(frames // clip, 4, size[1], dtype=jnp.float32)
    return function, (*(_array(frames, *size),) * arrays, rows, params)


def _side_mlp(frames: int, tokens: int, width: int, hidden: int, gradient: bool = False):
    mlp = {'c_fc': _dense((width,), (hidden,)), 'c_proj': _dense((hidden,), (width,))}
    function = side_kernel.mlp_gradient if gradient else side_kernel.mlp_forward
    return _of_side_network(function, 1 + gradient, frames, CLIP, mlp, tokens, width)


def _side_conv(frames: int, tokens: int, width: int, clip: int, gradient: bool = False):
    dw = jax.tree.map(lambda x: _array(*x.shape, dtype=jnp.float32), _dense((3,), (width,)))
    conv = {'pw_1': _dense((width,), (width,)), 'dw': dw, 'pw_2': _dense((width,), (width,))}
    function = side_kernel.conv_gradient if gradient else side_kernel.conv_forward
    return _of_side_network(function, 1 + gradient, frames, clip, conv, tokens, width)


def _side_attention(
    frames: int, tokens: int, width: int, heads: int, head_dim: int, gradient: bool = False
):
    attn = {
        'qkv': _dense((width,), (3, heads, head_dim)),
        'out': _dense((heads, head_dim), (width,)),
    }
    weights = (
        _array(tokens, width, dtype=jnp.float32),
        _norm(width),
        jax.eval_shape(side_kernel.grouped_weights, attn),
    )
    x, token = _array(frames, tokens, width), _array(frames, 1, width, dtype=jnp.float32)
    size = {'num_heads': heads, 'head_dim': head_dim}
    if not gradient:
        return functools.partial(side_kernel.attend_forward, **size), (x, token, weights)
    found = _array(frames, tokens, _lanes(heads, head_dim))
    function = functools.partial(side_kernel.attend_gradient, **size)
    rows = _array(frames // CLIP, 4, width, dtype=jnp.float32)
    return function, (x, token, found, x, x, x, rows, weights)


def _side_tap(frames: int, tokens: int, tapped: int, width: int, gradient: bool = False):
    s = _array(frames // CLIP, CLIP, tokens, width)
    taps = _array(2, frames // CLIP, CLIP, tokens, tapped)
    layer = _array(dtype=jnp.int32)
    if gradient:
        rows = _array(frames // CLIP, 4, width, dtype=jnp.float32)
        return side_kernel.mix_gradient, (s, taps, s, s, rows, layer)
    return side_kernel.mix_forward, (s, taps, layer, _array(tapped, width), _array(width))


# B/32 and B/16, and the light one.
SIDE_MLPS = tuple(
    {'tokens': tokens, 'width': width, 'hidden': 4 * width}
    for tokens, width in ((49, 320), (196, 320), (196, 128))
)
SIDE_CONVS = tuple(
    {'tokens': size['tokens'], 'width': size['width'], 'clip': CLIP} for size in SIDE_MLPS
)

SIDE_ATTENTIONS = tuple(
    {'tokens': tokens, 'width': 64 * heads, 'heads': heads, 'head_dim': 64}
    for tokens, heads in ((49, 5), (196, 5), (196, 2), (256, 5))
)

SIDE_TAPS = tuple(
    {'tokens': tokens, 'tapped': tapped, 'width': width}
    for tokens, tapped, width in (
        (49, 768, 320), (196, 768, 320), (256, 1024, 512), (196, 768, 128), (256, 1024, 320)
    )
)  # fmt: skip

KERNELS: dict[str, Kernel] = {
    'frame_attention': Kernel(
        _frame_attention,
        (
            *(
                {'tokens': tokens, 'queries': tokens, 'heads': heads, 'head_dim': width // heads}
                for tokens, width, heads in (B32, B16, L14, L14_336, B16_336, B16_448, BIG_E)
            ),
            *SIDES,
        ),
    ),
    'frame_attention_gradient': Kernel(_frame_attention_gradient, SIDES),
    'residual_attention': Kernel(
        _residual_attention,
        tuple(
            {'tokens': tokens, 'width': width, 'heads': heads, 'head_dim': width // heads}
            for tokens, width, heads in (B32, B16, L14, B16_336)
        ),
    ),
    'tapped_attention': Kernel(
        functools.partial(_residual_attention, tapped=True),
        tuple(
            {'tokens': tokens, 'width': width, 'heads': heads, 'head_dim': width // heads}
            for tokens, width, heads in (B16, L14)
        ),
    ),
    'mean_attention': Kernel(
        _mean_attention,
        tuple(
            {'tokens': tokens, 'heads': heads, 'head_dim': width // heads}
            for tokens, width, heads in (B16, L14)
        ),
    ),
    'read_clip': Kernel(_read_clip, READERS),
    'read_clip_gradient': Kernel(functools.partial(_read_clip, gradient=True), READERS),
    'residual_mlp': Kernel(_residual_mlp, _mlp_shapes()),
    'kept_residual_mlp': Kernel(
        functools.partial(_residual_mlp, reading=Reading()), _mlp_shapes(kept=True)
    ),
    'read_residual_mlp': Kernel(
        functools.partial(_residual_mlp, reading=Reading(patches=True, standardised=True)),
        _mlp_shapes(kept=True),
    ),
    'post_norm_mlp': Kernel(
        functools.partial(_residual_mlp, post_norm=True),
        ({'tokens': 257, 'width': 1792, 'hidden': 15360, 'part': 512},),
    ),
    'integration': Kernel(_integration, INTEGRATION),
    'integration_gradient': Kernel(_integration_gradient, INTEGRATION),
    'sum_of_products': Kernel(
        _sum_of_products, tuple(shape for side in SIDES for shape in _sums(side))
    ),
    'cut_patches': Kernel(
        _cut_patches,
        tuple(
            {'size': size, 'patch': patch}
            for size, patch in ((224, 32), (224, 16), (224, 14), (336, 14))
        ),
    ),
    'temporal_net': Kernel(_temporal_net, TEMPORAL_NETS),
    'temporal_net_gradient': Kernel(_temporal_net_gradient, TEMPORAL_NETS),
    'side_tap': Kernel(_side_tap, SIDE_TAPS),
    'side_tap_gradient': Kernel(functools.partial(_side_tap, gradient=True), SIDE_TAPS),
    'side_attention': Kernel(_side_attention, SIDE_ATTENTIONS),
    'side_attention_gradient': Kernel(
        functools.partial(_side_attention, gradient=True), SIDE_ATTENTIONS
    ),
    'side_mlp': Kernel(_side_mlp, SIDE_MLPS),
    'side_mlp_gradient': Kernel(functools.partial(_side_mlp, gradient=True), SIDE_MLPS),
    'side_conv': Kernel(_side_conv, SIDE_CONVS),
    'side_conv_gradient': Kernel(functools.partial(_side_conv, gradient=True), SIDE_CONVS),
}


def declared(kernel: str, shape: dict[str, int]) -> tuple[float, float]:
    """Bundles and bytes of a frame by the cost that the kernel itself declares."""
    function, arguments = KERNELS[kernel].build(FRAMES, **shape)
    cost = _cost(jax.make_jaxpr(function)(*arguments).jaxpr, kernel)
    return cost.flops / kernel_costs.FLOPS_PER_BUNDLE / FRAMES, cost.bytes_accessed / FRAMES


def _cost(jaxpr: Any, kernel: str) -> pl.CostEstimate:
    for equation in jaxpr.eqns:
        if 'cost_estimate' in equation.params and kernel in str(equation.params['name']):
            return equation.params['cost_estimate']
    raise ValueError(f'{kernel}: there is no kernel of this name that declares a cost')
