"""Depth: the only callers of scan and remat.

A stack is one tree of parameters with the layer on axis 0. Both helpers take `unroll`: False
compiles one layer and loops over it (fast compilation, the choice on TPU), True writes every layer
out (twice as fast a step on CPU, longer compilation). Parameters and results are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

from dist_jax.sharding import ShardingRule, gather_params, split_batch

Tree = Any


def scan_frozen(
    block: Callable[[jax.Array, Tree], tuple[jax.Array, Tree]],
    x: jax.Array,
    stacked: Tree,
    start: int,
    stop: int,
    *,
    unroll: bool,
    rules: tuple[ShardingRule, ...] = (),
) -> tuple[jax.Array, Tree]:
    """Runs layers start..stop-1 of a stacked plain tree over the stream `x`.

    The stack is indexed in place, so a partial range neither copies nor gathers the other layers.
    On a mesh, the weights of one layer are gathered over `fsdp` inside the loop.

    Args:
      block: (x, parameters of one layer) -> (x, taps); taps may be an empty tree.
      x: the stream; axis 0 is split over devices.
      stacked: parameters with the layer on axis 0.
      start: first layer.
      stop: one past the last layer.
      unroll: write the layers out instead of looping.
      rules: where the parameters of one layer lie.

    Returns:
      The stream after the last layer, and the taps stacked on axis 0.
    """

    def step(x: jax.Array, layer: jax.Array) -> tuple[jax.Array, Tree]:
        one = jax.tree.map(
            lambda p: jax.lax.dynamic_index_in_dim(p, layer, keepdims=False), stacked
        )
        x, taps = block(split_batch(x), gather_params(one, rules))
        return split_batch(x), taps

    layers = jax.numpy.arange(start, stop)
    return jax.lax.scan(step, x, layers, unroll=stop - start if unroll else 1)


def scan_trainable(
    block: type[nn.Module],
    length: int,
    *,
    remat: bool,
    unroll: bool,
    in_axes: tuple[Any, ...] = (0,),
) -> type[nn.Module]:
    """A module class that runs `length` copies of `block`, each with its own parameters.

    Args:
      block: module with `__call__(carry, *inputs) -> (carry, outputs)`.
      length: number of layers.
      remat: recompute a layer's activations in the backward pass instead of storing them.
      unroll: write the layers out instead of looping.
      in_axes: of the arguments after the carry: 0 for one slice a layer, `flax.linen.broadcast`
        for all of it in every layer.

    Returns:
      The lifted class; `params`, `batch_stats` and `intermediates` carry the layer on axis 0.
    """
    if remat:
        # Inside a loop the compiler cannot merge the recomputation with the forward pass; written
        # out it can, and would undo remat, so there the barrier stays.
        block = nn.remat(block, prevent_cse=unroll)
    return nn.scan(
        block,
        variable_axes={'params': 0, 'batch_stats': 0, 'intermediates': 0},
        split_rngs={'params': True, 'dropout': True},
        in_axes=in_axes,
        length=length,
        unroll=length if unroll else 1,
    )
