"""Depth: the only callers of scan and remat.

A stack is one tree of parameters with the layer on axis 0. Both helpers take `unroll`: False
compiles one layer and loops over it (fast compilation), True writes every layer out (longer
compilation; twice as fast a step on CPU, and faster on TPU where a loop would copy what its layers
keep for the backward pass). Parameters and results are the same.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from dist_jax.models.layers import is_portable, standardise
from dist_jax.sharding import ShardingRule, gather_params, split_batch

Tree = Any

# Names of what blocks mark.
STREAM = 'stream'
STATISTICS = 'statistics'

LONGEST_PATTERN = 4  # layers of which one is tapped, that run in one pass of a loop


@dataclasses.dataclass(frozen=True)
class Reading:
    """What is kept of a stream (N, L, W).

    Attributes:
      patches: without its first row, the class token's.
      standardised: of mean 0 and variance 1 over W, see `layers.standardise`.
    """

    patches: bool = False
    standardised: bool = False

    def of(self, x: jax.Array) -> jax.Array:
        """(N, L or L - 1, W) in the dtype of `x`."""
        return self.ready(x[:, 1:] if self.patches else x)

    def ready(self, x: jax.Array) -> jax.Array:
        """Any rows of a stream, (..., W), as they are kept."""
        return standardise(x, quick=True).astype(x.dtype) if self.standardised else x


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slot:
    """Where a layer puts what is kept of the stream behind it, beside handing that on.

    Attributes:
      stack: (K, N, ...) of the layers that are kept.
      index: int32 (), which of them.
      reading: what is kept.
    """

    stack: jax.Array
    index: jax.Array
    reading: Reading = dataclasses.field(default=Reading(), metadata={'static': True})

    def written(self, x: jax.Array) -> jax.Array:
        """The stack with what is kept of the stream `x` in this place."""
        kept = self.reading.of(x)
        return jax.lax.dynamic_update_index_in_dim(self.stack, kept, self.index, 0)


Block = Callable[
    [jax.Array, Tree, Any, Slot | None], tuple[jax.Array, jax.Array | None, dict[str, Tree]]
]


def scan_frozen(
    block: Block,
    x: jax.Array,
    stacked: Tree,
    wanted: Sequence[Any],
    *,
    kept: Sequence[bool] = (),
    reading: Reading = Reading(),
    unroll: bool,
    rules: tuple[ShardingRule, ...] = (),
) -> tuple[jax.Array, jax.Array | None, dict[str, Tree]]:
    """Runs the first layers of a stacked plain tree over the stream `x`.

    The stack is indexed in place, so a partial range neither copies nor gathers the other layers.
    On a mesh, the weights of one layer are gathered over `fsdp` inside the loop. Layers of which
    the same is wanted run in one loop, and so do those of which every second or third is tapped.

    Streams that are kept go round the loops as one stack, which layers write themselves: a kernel
    does so for nothing, where a copy of what it gives would cost as much as a product.

    Args:
      block: (x, parameters of one layer, what is wanted of it, where x behind it goes or None)
        -> (x, the stack of that slot with it, taps by name, maybe none). None in place of the
        stack leaves the writing to the loop.
      x: the stream; axis 0 is split over devices.
      stacked: parameters with the layer on axis 0.
      wanted: what is wanted of each layer that runs; any values that can be compared.
      kept: of which of these layers the stream behind it is kept; () for none.
      reading: what is kept of it.
      unroll: write the layers out instead of looping.
      rules: where the parameters of one layer lie.

    Returns:
      The stream after the last of these layers; the streams that are kept, stacked on axis 0, None
      without any; by name the taps of all layers that gave them, likewise.
    """
    wishes = list(zip(wanted, kept or [False] * len(wanted), strict=True))
    streams = None
    if any(kept):
        streams = _empty((sum(kept), *jax.eval_shape(reading.of, x).shape), x.dtype)
    found: dict[str, list[Tree]] = {}
    start = slot = 0
    while start < len(wishes):
        period, times = _pattern(wishes[start:])
        pattern = wishes[start : start + period]
        turn = functools.partial(_turn, block, stacked, rules, reading, pattern, start, slot)
        (x, streams), taps = jax.lax.scan(
            turn, (x, streams), jnp.arange(times), unroll=times if unroll else 1
        )
        for name in dict.fromkeys(name for tapped in taps for name in tapped):
            parts = [tapped[name] for tapped in taps if name in tapped]
            found.setdefault(name, []).append(_interleaved(parts))
        start += period * times
        slot += sum(keep for _, keep in pattern) * times
    taps = {
        name: parts[0]
        if len(parts) == 1
        else jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)
        for name, parts in found.items()
    }
    return x, streams, taps


def _turn(
    block: Block,
    stacked: Tree,
    rules: tuple[ShardingRule, ...],
    reading: Reading,
    pattern: Sequence[tuple[Any, bool]],
    start: int,
    slot: int,
    carry: tuple[jax.Array, jax.Array | None],
    number: jax.Array,
) -> tuple[tuple[jax.Array, jax.Array | None], list[dict[str, Tree]]]:
    """The layers of one turn of a loop of `scan_frozen`, whose first are at `start` and `slot`."""
    (x, streams), taps = carry, []
    layer = start + number * len(pattern)
    slot = slot + number * sum(keep for _, keep in pattern)
    for i, (wish, keep) in enumerate(pattern):
        one = jax.tree.map(
            lambda p, k=layer + i: jax.lax.dynamic_index_in_dim(p, k, keepdims=False), stacked
        )
        place = Slot(streams, slot, reading) if keep else None
        x, written, tapped = block(split_batch(x), gather_params(one, rules), wish, place)
        x = split_batch(x)
        if keep:
            written = place.written(x) if written is None else written
            streams, slot = split_batch(written, axis=1), slot + 1
        taps.append(tapped)
    return (x, streams), taps


def _empty(shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """An array all of which will be written: nothing is, where the compiler can be told so."""
    return (jnp.zeros if is_portable() else jax.lax.empty)(shape, dtype)


def _pattern(wanted: Sequence[Any]) -> tuple[int, int]:
    """The start of a sequence as a repeated pattern: its length, and how often it is there."""
    best = 1, 1
    for period in range(1, LONGEST_PATTERN + 1):
        times = 1
        while wanted[times * period : (times + 1) * period] == wanted[:period]:
            times += 1
        if times > 1 and times * period > best[0] * best[1]:
            best = period, times
    return best


def _interleaved(parts: Sequence[Tree]) -> Tree:
    """Taps of the places in a pattern, each (times, ...), in the order of the layers."""
    if len(parts) == 1:
        return parts[0]

    def one(*leaves: jax.Array) -> jax.Array:
        return jnp.stack(leaves, axis=1).reshape(-1, *leaves[0].shape[1:])

    return jax.tree.map(one, *parts)


def scan_trainable(
    block: type[nn.Module],
    length: int,
    *,
    remat: bool,
    unroll: bool,
    in_axes: tuple[Any, ...] = (0,),
    keep: Sequence[str] = (),
) -> type[nn.Module]:
    """A module class that runs `length` copies of `block`, each with its own parameters.

    Args:
      block: module with `__call__(carry, *inputs) -> (carry, outputs)`.
      length: number of layers.
      remat: recompute a layer's activations in the backward pass instead of storing them.
      unroll: write the layers out instead of looping.
      in_axes: of the arguments after the carry: 0 for one slice a layer, `flax.linen.broadcast`
        for all of it in every layer.
      keep: with `remat`, store what the block marked with one of these names, and recompute the
        rest; see `mark`.

    Returns:
      The lifted class; `params`, `batch_stats` and `intermediates` carry the layer on axis 0.
    """
    if remat:
        # Inside a loop the compiler cannot merge the recomputation with the forward pass; written
        # out it can, and would undo remat, so there the barrier stays.
        policy = jax.checkpoint_policies.save_only_these_names(*keep) if keep else None
        block = nn.remat(block, prevent_cse=unroll, policy=policy)
    return nn.scan(
        block,
        variable_axes={'params': 0, 'batch_stats': 0, 'intermediates': 0},
        split_rngs={'params': True, 'dropout': True},
        in_axes=in_axes,
        length=length,
        unroll=length if unroll else 1,
    )


def mark(x: jax.Array, name: str) -> jax.Array:
    """`x`, which a backward pass may find stored under this name; see `scan_trainable`."""
    return checkpoint_name(x, name)
