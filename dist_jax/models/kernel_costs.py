"""What kernels cost on a v4 core: their compiled schedules, and a formula for other shapes.

`kernel_costs.json` is written by `python -m tools.kernel_schedule --write`: for the shapes of the
configs the bundles (cycles of one core, waiting for memory left out) of a frame, and for every
kernel how many bundles a unit of its work takes, fitted to them.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Mapping
from importlib import resources
from typing import Any

LANES = 128  # of a vector register, and the side of the matrix unit
SUBLANES = 8
MATRIX_UNITS = 4  # of a v4 core
CORES = 2  # of a v4 chip
FLOPS_PER_BUNDLE = MATRIX_UNITS * LANES * LANES * 2

FILE = 'kernel_costs.json'
Work = Mapping[str, float]


def bundles(kernel: str, **shape: int) -> float:
    """Bundles of a frame of a kernel.

    Args:
      kernel: its name.
      **shape: the arguments of its entry in `WORK`.

    Returns:
      The compiled schedule where the table has the shape, else by the formula; the products alone
      of a kernel that was never measured.
    """
    entry = table()['kernels'].get(kernel)
    if entry is None:
        return WORK[kernel](**shape).get('products', 0.0)
    for row in entry['rows']:
        if row['shape'] == shape:
            return row['bundles']
    return by_formula(entry['bundles_per_unit_of_work'], WORK[kernel](**shape))


def by_formula(per_unit: Work, work: Work) -> float:
    """Bundles of this much work."""
    return sum(per_unit[name] * amount for name, amount in work.items())


@functools.cache
def table() -> dict[str, Any]:
    """The file: `libtpu`, `jax`, and of each of `kernels` its rows and its formula."""
    text = resources.files(__package__).joinpath(FILE).read_text(encoding='utf-8')
    return json.loads(text)


def whole(size: int, of: int) -> int:
    """The least multiple of `of` that is not below `size`."""
    return math.ceil(size / of) * of


def _products(rows: int, *matrices: tuple[int, int]) -> float:
    """Bundles at peak of rows times matrices; a row of 128 x 128 takes a unit one cycle."""
    tiles = sum(math.ceil(a / LANES) * math.ceil(b / LANES) for a, b in matrices)
    return whole(rows, 2 * SUBLANES) * tiles / MATRIX_UNITS


def _registers(rows: int, columns: int) -> int:
    """Registers that float32 (rows, columns) takes."""
    return math.ceil(rows / SUBLANES) * math.ceil(columns / LANES)


def _attention(
    tokens: int, queries: int, heads: int, head_dim: int, passes: int = 1
) -> dict[str, float]:
    """`passes` products have a row for every token, one has a row for every channel of a head.

    The forward pass has one of the former (logits), the gradient four. A group of heads that share
    a register begins and ends on its own.
    """
    by_token = passes * _products(tokens, (LANES, queries))
    return {
        'products': heads * (by_token + _products(head_dim, (tokens, queries))),
        'groups': math.ceil(heads / (LANES // head_dim)),
    }


def _mean_attention(tokens: int, heads: int, head_dim: int) -> Work:
    """Logits of two neighbours, no values; every head's weights are added to those before."""
    return {
        'products': 2 * heads * _products(tokens, (head_dim, tokens)),
        'weights': 2 * heads * _registers(tokens, tokens),
    }


def _frame_attention(tokens: int, queries: int, heads: int, head_dim: int) -> Work:
    """Two groups at a time, where they have room."""
    work = _attention(tokens, queries, heads, head_dim)
    return {'products': work['products'], 'turns': math.ceil(work['groups'] / 2)}


def _residual_attention(tokens: int, width: int, heads: int, head_dim: int) -> Work:
    inner = heads * head_dim
    work = _attention(tokens, tokens, heads, head_dim)
    work['products'] += _products(tokens, (width, 3 * inner), (inner, width))
    return work


def _residual_mlp(tokens: int, width: int, hidden: int, part: int) -> Work:
    """The weights are brought into the matrix units once a frame, parts are summed."""
    return {
        'products': _products(tokens, (width, hidden), (hidden, width)),
        'weights': 2 * math.ceil(width / LANES) * math.ceil(hidden / LANES),
        'sums': hidden / part * _registers(tokens, width),
    }


def _read_residual_mlp(tokens: int, width: int, hidden: int, part: int) -> Work:
    """What is read is standardised beside it."""
    return _residual_mlp(tokens, width, hidden, part) | {'values': _registers(tokens, width)}


def _sum_of_products(tokens: int, rows: int, columns: int) -> Work:
    """Products over tokens, in whole registers; a frame begins and ends on its own."""
    return {'products': _products(rows, (tokens, columns)), 'frame': 1}


def _temporal_net(
    places: int, channels: int, hidden: int, kernel_size: int, of_clip: int, backward: bool = False
) -> Work:
    """Rows of places; of weight gradients rows of hidden channels, and places what is summed."""
    matrices = kernel_size + 9
    products = (1 + backward) * _products(places, *[(channels, hidden)] * matrices)
    if backward:
        products += _products(hidden, *[(places, channels)] * matrices)
    return {
        'products': products,
        'registers': _registers(places, channels) + _registers(places, hidden),
        'clip': 1 / of_clip,
    }


def _integration(tokens: int, width: int, channels: int, hidden: int, alpha: int) -> Work:
    """DiST's integration block; the narrow channels of its temporal parts are one tile each."""
    own = _exchange(channels, hidden, alpha)
    matrices = ((width, channels), *own, (hidden, channels), *_NARROW, (LANES, channels))
    return {
        'products': _products(tokens, *matrices, (channels, LANES)),
        'registers': _registers(tokens, channels),
    }


def _integration_gradient(tokens: int, width: int, channels: int, hidden: int, alpha: int) -> Work:
    """Some products again, and of every matrix but the first the gradient by what it was times."""
    own = (*_exchange(channels, hidden, alpha), *_NARROW)
    narrow, back = (channels, LANES), (*own, (hidden, channels), (LANES, channels))
    sums = (width, hidden, hidden, *[LANES] * (alpha + 3))
    products = _products(tokens, *own, *back, narrow)
    products += sum(_products(size, (tokens, channels)) for size in sums)
    products += _products(3 * LANES, (tokens, LANES))
    return {'products': products, 'registers': _registers(tokens, channels)}


_NARROW = ((LANES, LANES),) * 3  # taps of the convolution along time


def _exchange(channels: int, hidden: int, alpha: int) -> tuple[tuple[int, int], ...]:
    """From the temporal stream, and the first maps of both feed-forwards."""
    return (*((LANES, channels),) * alpha, (channels, hidden), (channels, LANES))


def _cut_patches(size: int, patch: int) -> Work:
    """What is read and written, and rows of patches that are put side by side, two to a word."""
    side = size // patch
    return {
        'registers': _registers(size, 3 * size) + _registers(side * side, 3 * patch**2),
        'pieces': whole(side, 2 * SUBLANES) / (2 * SUBLANES) * side * patch,
    }


def _side_mlp(tokens: int, width: int, hidden: int) -> Work:
    maps = _products(tokens, (width, hidden), (hidden, width))
    return {'products': maps, 'hidden': _registers(tokens, hidden)}


def _side_mlp_gradient(tokens: int, width: int, hidden: int) -> Work:
    """One of the maps again, both backward, and the two sums over tokens."""
    maps = _products(tokens, (width, hidden), (width, hidden), (hidden, width))
    sums = 2 * _products(width, (tokens, hidden))
    return {'products': maps + sums, 'hidden': _registers(tokens, hidden)}


def _side_conv(tokens: int, width: int, clip: int) -> Work:
    """Of a clip of so many frames, that begins and ends on its own."""
    return {'products': 2 * _products(tokens, (width, width)), 'ends': 1 / clip}


def _side_conv_gradient(tokens: int, width: int, clip: int) -> Work:
    products = 3 * _products(tokens, (width, width)) + 2 * _products(width, (tokens, width))
    return {'products': products, 'ends': 1 / clip}


def _side_attention(tokens: int, width: int, heads: int, head_dim: int) -> Work:
    """Projections to and from registers of heads, with a token that asks nothing."""
    work = _attention(tokens + 1, tokens, heads, head_dim)
    inner = math.ceil(heads / (LANES // head_dim)) * LANES
    return work | {'maps': _products(tokens + 1, (width, 3 * inner), (inner, width))}


def _side_attention_gradient(tokens: int, width: int, heads: int, head_dim: int) -> Work:
    """Projected again, the gradients of both maps, and the two sums over tokens."""
    work = _attention(tokens + 1, tokens, heads, head_dim, passes=4)
    inner = math.ceil(heads / (LANES // head_dim)) * LANES
    maps = _products(tokens + 1, (width, 6 * inner), (width, inner))
    return work | {'maps': maps + _products(width, (tokens + 1, 4 * inner))}


def _side_tap(tokens: int, tapped: int, width: int) -> Work:
    """A frame begins and ends on its own."""
    return {'products': _products(tokens, (tapped, width)), 'frame': 1}


def _side_tap_gradient(tokens: int, tapped: int, width: int) -> Work:
    return {'products': _products(width, (tokens, tapped)), 'frame': 1}


def _read_clip(tokens: int, width: int, heads: int, gradient: bool = False) -> Work:
    """A few rows, one a head, meet the tokens; the rest is a norm and sums of every token."""
    to_heads = _products(tokens, (width, heads)) + _products(heads, (tokens, width))
    back = _products(tokens, (width, heads), (heads, width), (heads, width))
    return {
        'products': to_heads + back * gradient,
        'values': _registers(tokens, width),
    }


# Kernel -> its shape -> the work of a frame that its time is proportional to, by kind.
WORK: dict[str, Callable[..., Work]] = {
    'frame_attention': _frame_attention,
    'frame_attention_gradient': functools.partial(_attention, passes=4),
    'residual_attention': _residual_attention,
    'tapped_attention': _residual_attention,
    'mean_attention': _mean_attention,
    'residual_mlp': _residual_mlp,
    'post_norm_mlp': _residual_mlp,
    'kept_residual_mlp': _residual_mlp,
    'read_residual_mlp': _read_residual_mlp,
    'read_clip': _read_clip,
    'read_clip_gradient': functools.partial(_read_clip, gradient=True),
    'sum_of_products': _sum_of_products,
    'cut_patches': _cut_patches,
    'temporal_net': _temporal_net,
    'temporal_net_gradient': functools.partial(_temporal_net, backward=True),
    'integration': _integration,
    'integration_gradient': _integration_gradient,
    'side_attention': _side_attention,
    'side_attention_gradient': _side_attention_gradient,
    'side_tap': _side_tap,
    'side_tap_gradient': _side_tap_gradient,
    'side_mlp': _side_mlp,
    'side_mlp_gradient': _side_mlp_gradient,
    'side_conv': _side_conv,
    'side_conv_gradient': _side_conv_gradient,
}
