"""Attention between patches of neighbouring frames: a kernel on TPU, plain JAX elsewhere.

Of the queries and keys of a frozen block, as `kernels.residual_attention` leaves them. What XLA
writes and reads for every head, the logits of a frame, stays in VMEM; what remains is their mean.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dist_jax.models import kernels
from dist_jax.models.kernel_costs import LANES, SUBLANES, whole
from dist_jax.models.layers import attention_weights


def neighbour_attention(queries: jax.Array, keys: jax.Array, num_frames: int) -> jax.Array:
    """Attention from patches of a frame to patches of the frames before and after it.

    Softmax over the patches of the neighbour, class token excluded; mean over heads.

    Args:
      queries: (B*T, L, h, d), class token first, not scaled.
      keys: (B*T, L, h, d).
      num_frames: T.

    Returns:
      (B, T, 2, N, N) in the dtype of the queries, N = L - 1: [b, t, 0] looks at frame t - 1,
      [b, t, 1] at frame t + 1; zero where there is no such frame.
    """
    plain = functools.partial(_plain, num_frames=num_frames)
    if not (_fits(queries) and kernels.holds_clips(queries, num_frames)):
        return plain(queries, keys)

    def fast(queries: jax.Array, keys: jax.Array) -> jax.Array:
        run = functools.partial(
            mean_attention, num_heads=queries.shape[2], head_dim=queries.shape[3], clip=num_frames
        )
        lanes = (*queries.shape[:2], -1)
        found = kernels.on_each_device(run, queries.reshape(lanes), beside=(keys.reshape(lanes),))
        return found.reshape(-1, num_frames, *found.shape[1:])

    return kernels.on_tpu(fast, plain, queries, keys)


def _fits(queries: jax.Array) -> bool:
    """Whether `mean_attention` takes these: bfloat16, whole registers of heads, room in VMEM."""
    _, length, num_heads, head_dim = queries.shape
    rows = whole(length, SUBLANES)
    blocks = 2 * 3 * 2 * rows * num_heads * head_dim  # one of queries, two of keys, twice
    weights = 4 * rows * whole(length, LANES)
    return (
        kernels.fits(num_heads, head_dim, queries.dtype)
        and kernels.whole_registers(num_heads, head_dim)
        and blocks + (4 + 3 * kernels.heads_per_group(head_dim)) * weights < kernels.VMEM_BYTES
    )


def mean_attention(
    queries: jax.Array,
    keys: jax.Array,
    *,
    num_heads: int,
    head_dim: int,
    clip: int,
    interpret: bool = False,
) -> jax.Array:
    """The kernel of `neighbour_attention`, on whole clips.

    Args:
      queries: (N, L, h d) bfloat16.
      keys: (N, L, h d) bfloat16.
      num_heads: h.
      head_dim: d.
      clip: frames of a clip.
      interpret: run without a TPU, slowly, for tests.

    Returns:
      (N, 2, L - 1, L - 1) bfloat16.
    """
    frames, length, width = queries.shape
    patches = length - 1

    def neighbour(step: int) -> pl.BlockSpec:
        """The frame before or after, or, at an end, the frame itself, which is not used."""

        def place(n: jax.Array) -> tuple[jax.Array, int, int]:
            inside = (n % clip + step >= 0) & (n % clip + step < clip)
            return jnp.where(inside, n + step, n), 0, 0

        return pl.BlockSpec((1, length, width), place)

    rows = whole(length, SUBLANES)
    return pl.pallas_call(
        functools.partial(_kernel, num_heads=num_heads, head_dim=head_dim, clip=clip),
        grid=(frames,),
        in_specs=[
            pl.BlockSpec((1, length, width), lambda n: (n, 0, 0)),
            neighbour(-1),
            neighbour(1),
        ],
        out_specs=pl.BlockSpec((1, 2, patches, patches), lambda n: (n, 0, 0, 0)),
        out_shape=jax.ShapeDtypeStruct((frames, 2, patches, patches), queries.dtype),
        scratch_shapes=[pltpu.VMEM((length, length), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=('parallel',), vmem_limit_bytes=kernels.VMEM_BYTES
        ),
        cost_estimate=kernels.cost_estimate(
            'mean_attention',
            frames,
            {'tokens': length, 'heads': num_heads, 'head_dim': head_dim},
            transcendentals=2 * num_heads * length * length,
            # At the ends of a clip, what would be the neighbour is there already.
            frame_bytes=2 * round((3 - 2 / clip) * rows * width)
            + 2 * 2 * whole(patches, SUBLANES) * whole(patches, LANES),
        ),
        interpret=interpret,
        name='mean_attention',
    )(queries, keys, keys)


def _kernel(
    q_ref, before_ref, after_ref, out_ref, sum_ref, *, num_heads: int, head_dim: int, clip: int
) -> None:
    """One frame; scratch for the sum over heads, keys as rows as in `kernels`."""
    frame = pl.program_id(0) % clip
    for side, (k_ref, inside) in enumerate(
        ((before_ref, frame > 0), (after_ref, frame < clip - 1))
    ):

        @pl.when(inside)
        def _(side: int = side, k_ref: jax.Ref = k_ref) -> None:
            sum_ref[...] = jnp.zeros(sum_ref.shape, sum_ref.dtype)

            def group(number: jax.Array | int, heads: int) -> None:
                lanes = kernels.group_lanes(number)
                q, k = q_ref[0, :, lanes], k_ref[0, :, lanes]
                owns = list(kernels.lanes_of_heads(heads, head_dim))
                logits = [kernels.product(k, kernels.only(own, q), (1, 1)) for own in owns]
                weights = [kernels.exponentials(_patches(x), head_dim) for x in logits]
                sum_ref[...] += sum(w * (1 / w.sum(0, keepdims=True)) for w in weights)

            kernels.each_group(group, num_heads, head_dim)
            mean = sum_ref[1:, :].T * (1 / num_heads)
            out_ref[0, side] = mean[1:].astype(out_ref.dtype)

        @pl.when(jnp.logical_not(inside))
        def _(side: int = side) -> None:
            out_ref[0, side] = jnp.zeros(out_ref.shape[2:], out_ref.dtype)


def _patches(logits: jax.Array) -> jax.Array:
    """Logits without those of the first key, the class token: only its register is touched."""
    first = jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, logits.shape[1]), 0) == 0
    lowest = jnp.finfo(logits.dtype).min
    return jnp.concatenate([jnp.where(first, lowest, logits[:SUBLANES]), logits[SUBLANES:]])


def _plain(queries: jax.Array, keys: jax.Array, num_frames: int) -> jax.Array:
    """One frame of all clips at a time.

    The logits of all heads, twice as many as the block's own, are never in memory together.
    """
    q, k = (x.reshape(-1, num_frames, *x.shape[1:]) for x in (queries, keys))
    is_patch = jnp.arange(q.shape[2]) > 0

    def frame(t: jax.Array) -> jax.Array:
        query = jax.lax.dynamic_index_in_dim(q, t, axis=1, keepdims=False)
        maps = []
        for neighbour in (t - 1, t + 1):
            inside = (neighbour >= 0) & (neighbour < num_frames)
            key = jax.lax.dynamic_index_in_dim(
                k, jnp.clip(neighbour, 0, num_frames - 1), axis=1, keepdims=False
            )
            # Masking the class token moves less memory than cutting it off before.
            weights = attention_weights(query, key, is_patch).mean(1)[:, 1:, 1:]
            maps.append(weights * inside)
        return jnp.stack(maps, axis=1)

    found = jax.lax.map(frame, jnp.arange(num_frames)).swapaxes(0, 1)
    return found.astype(queries.dtype)
