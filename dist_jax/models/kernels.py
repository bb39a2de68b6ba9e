"""Kernels of our own for TPU, each with a form in plain JAX that means the same.

Attention within a frame: XLA's own form of it costs more than all matrix products of a ViT block,
because logits of 197 x 197 are written, read, reduced and laid out again in HBM. Here the queries,
keys and values of a frame come as the projection leaves them and everything else stays in VMEM.

The cost that a kernel declares is the time of its compiled schedule on v4, in terms of the matrix
unit: it is bound by vector operations on the logits, at about 9 bundles for every 8 x 128 of them
(5,436 bundles for a frame of 197 tokens and 12 heads; 12,231 for 257 tokens and 16 heads).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import einops
import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec

from dist_jax.models.layers import attend
from dist_jax.sharding import BATCH, TENSOR

LANES = 128  # of a vector register, and the side of the matrix unit
SUBLANES = 8
BUNDLES_PER_REGISTER = 9  # of logits, measured (see above)
FLOPS_PER_BUNDLE = 4 * LANES * LANES * 2  # of the matrix units of one v4 core


def heads_per_group(head_dim: int) -> int:
    """Heads that share the lanes of a register."""
    return max(1, LANES // head_dim)


def fits(num_heads: int, head_dim: int, dtype: jnp.dtype) -> bool:
    """Whether `frame_attention` takes heads of this kind: bfloat16, whole registers."""
    group = heads_per_group(head_dim)
    whole = head_dim * group == LANES and num_heads % group == 0
    return whole and dtype == jnp.bfloat16


def frame_attention(
    qkv: jax.Array, num_heads: int, head_dim: int, interpret: bool = False
) -> jax.Array:
    """Scaled dot-product attention within each frame, float32 softmax.

    Args:
      qkv: (N, L, 3 h d) bfloat16. The channels are groups of 128: for every group of heads its
        queries, then its keys, then its values.
      num_heads: h.
      head_dim: d; see `fits`.
      interpret: run without a TPU, slowly, for tests.

    Returns:
      (N, L, h d), the heads in their order.
    """
    frames, length, _ = qkv.shape
    width = num_heads * head_dim
    registers = num_heads * math.ceil(length / SUBLANES) * math.ceil(length / LANES)
    cost = pl.CostEstimate(
        flops=frames * registers * BUNDLES_PER_REGISTER * FLOPS_PER_BUNDLE,
        transcendentals=frames * num_heads * length * length,
        bytes_accessed=4 * frames * length * width * qkv.dtype.itemsize,
    )
    return pl.pallas_call(
        functools.partial(_frame_kernel, head_dim=head_dim),
        grid=(frames,),
        in_specs=[pl.BlockSpec((1, length, 3 * width), lambda n: (n, 0, 0))],
        out_specs=pl.BlockSpec((1, length, width), lambda n: (n, 0, 0)),
        out_shape=jax.ShapeDtypeStruct((frames, length, width), qkv.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel',)),
        cost_estimate=cost,
        interpret=interpret,
        name='frame_attention',
    )(qkv)


def _frame_kernel(qkv_ref, out_ref, *, head_dim: int) -> None:
    """One frame: (1, L, 3 W) -> (1, L, W).

    Heads narrower than a register are not cut out of it: a head's logits are the product of whole
    registers in which the query's other lanes are zero, and of the product with the values only
    its own lanes are kept. The matrix unit is as deep as a register, so this costs nothing.
    """
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
    scale = head_dim**-0.5 * math.log2(math.e)
    for group in range(out_ref.shape[2] // LANES):
        q, k, v = (qkv_ref[0, :, pl.ds((3 * group + i) * LANES, LANES)] for i in range(3))
        out = jnp.zeros(q.shape, jnp.float32)
        for start in range(0, LANES, head_dim):
            own = (lane >= start) & (lane < start + head_dim)
            logits = jax.lax.dot_general(
                jnp.where(own, q, 0).astype(q.dtype),
                k,
                (((1,), (1,)), ((), ())),
                precision=jax.lax.Precision.DEFAULT,  # of bfloat16: nothing is lost
                preferred_element_type=jnp.float32,
            )
            weights = jnp.exp2((logits - logits.max(-1, keepdims=True)) * scale)
            total = weights.sum(-1, keepdims=True)
            product = jnp.dot(
                weights.astype(v.dtype),
                v,
                precision=jax.lax.Precision.DEFAULT,
                preferred_element_type=jnp.float32,
            )
            out = jnp.where(own, product * (1 / total), out)
        out_ref[0, :, pl.ds(group * LANES, LANES)] = out.astype(out_ref.dtype)


def self_attention(
    z: jax.Array, kernel: jax.Array, bias: jax.Array, mask: jax.Array | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Projections and attention of a block of a frozen tower.

    On TPU, in bfloat16 and without a mask, by `frame_attention`; its gradient is that of the plain
    form.

    Args:
      z: (N, L, W), the normalised stream.
      kernel: (W, 3, h, d), of queries, keys and values, in the dtype of `z`.
      bias: (3, h, d), likewise.
      mask: see `layers.attend`.

    Returns:
      Output of the heads, queries and keys, each (N, L, h, d).
    """
    if mask is None and fits(*kernel.shape[-2:], z.dtype):
        return jax.lax.platform_dependent(z, kernel, bias, tpu=_fast, default=_plain)
    return _plain(z, kernel, bias, mask)


Heads = tuple[jax.Array, jax.Array, jax.Array]


def _plain(
    z: jax.Array, kernel: jax.Array, bias: jax.Array, mask: jax.Array | None = None
) -> Heads:
    q, k, v = jnp.einsum('nlw,wchd->cnlhd', z, kernel) + bias[:, None, None]
    return attend(q, k, v, mask), q, k


@jax.custom_vjp
def _fast(z: jax.Array, kernel: jax.Array, bias: jax.Array) -> Heads:
    num_heads, head_dim = kernel.shape[-2:]
    qkv, q, k = grouped_projection(z, kernel, bias)

    def one_device(qkv: jax.Array) -> jax.Array:
        return frame_attention(qkv, qkv.shape[-1] // (3 * head_dim), head_dim)

    out = _on_each_device(one_device, qkv, num_heads // heads_per_group(head_dim))
    return out.reshape(*out.shape[:2], num_heads, head_dim), q, k


def grouped_projection(z: jax.Array, kernel: jax.Array, bias: jax.Array) -> Heads:
    """The projection as `frame_attention` takes it, (N, L, 3 h d); queries and keys out of it."""
    head_dim = kernel.shape[-1]
    split = {'c': 3, 'i': heads_per_group(head_dim), 'd': head_dim}
    kernel = einops.rearrange(kernel, 'w c (g i) d -> w (g c i d)', **split)
    bias = einops.rearrange(bias, 'c (g i) d -> (g c i d)', **split)
    qkv = jnp.einsum('nlw,wc->nlc', z, kernel) + bias
    q, k, _ = einops.rearrange(qkv, 'n l (g c i d) -> c n l (g i) d', **split)
    return qkv, q, k


def _fast_forward(*inputs: jax.Array) -> tuple[Heads, tuple[jax.Array, ...]]:
    return _fast(*inputs), inputs


def _fast_backward(inputs: tuple[jax.Array, ...], upstream: Heads) -> tuple[jax.Array, ...]:
    return jax.vjp(_plain, *inputs)[1](upstream)


_fast.defvjp(_fast_forward, _fast_backward)


def _on_each_device(
    function: Callable[[jax.Array], jax.Array], x: jax.Array, groups: int
) -> jax.Array:
    """A kernel on the part of (N, L, C) that a device holds: N over the batch axes, C over tensor.

    A program for several devices cannot split a kernel by itself. Where an axis does not divide
    what it should split, every device along it does the same work.
    """
    sizes = jax.sharding.get_abstract_mesh().shape
    if math.prod(sizes.values()) == 1:
        return function(x)
    batch = BATCH if x.shape[0] % math.prod(sizes[axis] for axis in BATCH) == 0 else None
    tensor = TENSOR if groups % sizes[TENSOR] == 0 else None
    spec = PartitionSpec(batch, None, tensor)
    return jax.shard_map(function, in_specs=spec, out_specs=spec, check_vma=False)(x)
