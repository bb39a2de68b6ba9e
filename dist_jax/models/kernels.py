"""Kernels of our own for TPU, each with a form in plain JAX that means the same.

Attention within a frame: XLA's own form of it costs more than all matrix products of a ViT block,
because logits of 197 x 197 are written, read, reduced and laid out again in HBM. Here a frame is
read once and everything between stays in VMEM, with the weights: `residual_attention` and
`residual_mlp` are the two halves of a frozen block. The first also gives queries and keys where
they are tapped, the second writes the stream into the stack of taps. Where heads are split over
devices, or the weights are too large for VMEM, `frame_attention` does only the attention. Blocks
that are trained use that too (`trained_attention`), and `frame_attention_gradient` behind it,
which computes the weights once more.

The cost that a kernel declares is the time of its compiled schedule on v4, in terms of the matrix
unit, and the bytes it moves; see `kernel_costs`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import einops
import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec

from dist_jax.models import kernel_costs
from dist_jax.models.kernel_costs import LANES, SUBLANES, whole
from dist_jax.models.layers import (
    LAYER_NORM_EPS,
    attend,
    einsum,
    fitted_gelu,
    is_portable,
    layer_norm,
)
from dist_jax.models.stack import Reading, Slot
from dist_jax.sharding import BATCH, TENSOR

Tree = Any
Heads = tuple[jax.Array, jax.Array, jax.Array]
VMEM_BYTES = 16 * 2**20  # of a v4 core


def heads_per_group(head_dim: int) -> int:
    """Heads that share the lanes of a register."""
    return max(1, LANES // head_dim)


def groups_of_heads(num_heads: int, head_dim: int) -> int:
    """Registers' worth of lanes that the heads take."""
    return -(-num_heads // heads_per_group(head_dim))


def fits(num_heads: int, head_dim: int, dtype: jnp.dtype) -> bool:
    """Whether kernels take heads of this kind: bfloat16, no head wider than a register."""
    if is_portable():
        return False
    return num_heads > 0 and head_dim <= LANES and dtype == jnp.bfloat16


def whole_registers(num_heads: int, head_dim: int) -> bool:
    """Whether groups of heads fill their lanes: nothing has to be padded."""
    return num_heads * head_dim == groups_of_heads(num_heads, head_dim) * LANES


def frame_attention(
    qkv: jax.Array,
    num_heads: int,
    head_dim: int,
    queries: int | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Scaled dot-product attention within each frame, float32 softmax.

    Args:
      qkv: (N, L, 3 g 128) bfloat16, see `grouped_projection`. For every group of heads its queries,
        then its keys, then its values, each in 128 channels; channels without a head are zero.
      num_heads: h.
      head_dim: d; see `fits`.
      queries: how many tokens, from the first on, are queries; None for all.
      interpret: run without a TPU, slowly, for tests.

    Returns:
      (N, queries, g 128), the heads in their order, in groups like those of `qkv`.

    Raises:
      ValueError: the logits of one group of heads do not fit into VMEM; see `heads_tile`.
    """
    frames, length, _ = qkv.shape
    queries = queries or length
    held = 2 * 4 * _rows(length) * LANES * 2  # of a group
    room = VMEM_BYTES - groups_of_heads(num_heads, head_dim) * held
    together = 2 if 2 * _logits_bytes(length, head_dim) < room else 1
    return _on_groups(
        functools.partial(_frame_kernel, together=together),
        (qkv,),
        (jax.ShapeDtypeStruct((frames, queries, qkv.shape[-1] // 3), qkv.dtype),),
        dict(tokens=length, queries=queries, heads=num_heads, head_dim=head_dim),
        interpret=interpret,
        name='frame_attention',
    )[0]


def frame_attention_gradient(
    qkv: jax.Array, upstream: jax.Array, num_heads: int, head_dim: int, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """The gradient of `frame_attention` by `qkv`, and by what is added to all tokens of a frame.

    Args:
      qkv: as there, (N, L, 3 g 128).
      upstream: gradient of its result, (N, queries, g 128) bfloat16, zero where no head is.
      num_heads: h.
      head_dim: d.
      interpret: run without a TPU, slowly, for tests.

    Returns:
      (N, L, 3 g 128), laid out like `qkv`, zero for queries of tokens that are none and where no
      head is; and its sum over the tokens, from before it is rounded, float32 (N, 1, 3 g 128): a
      pass over all of the former costs as much as the kernel.

    Raises:
      ValueError: as `frame_attention`.
    """
    (frames, length, width), queries = qkv.shape, upstream.shape[1]
    return _on_groups(
        _frame_gradient_kernel,
        (qkv, upstream),
        (
            jax.ShapeDtypeStruct(qkv.shape, qkv.dtype),
            jax.ShapeDtypeStruct((frames, 1, width), jnp.float32),
        ),
        dict(tokens=length, queries=queries, heads=num_heads, head_dim=head_dim),
        interpret=interpret,
        name='frame_attention_gradient',
    )


def _on_groups(
    kernel: Callable[..., None],
    inputs: tuple[jax.Array, ...],
    outputs: tuple[jax.ShapeDtypeStruct, ...],
    shape: dict[str, int],
    *,
    interpret: bool,
    name: str,
) -> tuple[jax.Array, ...]:
    """Runs a kernel on frames and on the groups of heads that fit at a time."""
    frames, length, _ = inputs[0].shape
    num_heads, head_dim = shape['heads'], shape['head_dim']
    groups = groups_of_heads(num_heads, head_dim)
    arrays = (*inputs, *outputs)
    held = sum(x.shape[-1] for x in arrays if x.shape[1] > 1) // (groups * LANES)
    part = heads_tile(length, num_heads, head_dim, held)
    if part is None:
        raise ValueError(f'{name}: logits of {length} tokens do not fit into VMEM')
    parts = groups * LANES // part
    if parts > 1:  # every part is the same program: a head of zeros is one like others
        num_heads = groups // parts * heads_per_group(head_dim)
    specs = [
        pl.BlockSpec((1, x.shape[1], x.shape[-1] // parts), lambda n, p: (n, 0, p)) for x in arrays
    ]
    cost = cost_estimate(
        name,
        frames,
        shape,
        transcendentals=shape['heads'] * length * shape['queries'],
        frame_bytes=sum(_rows(x.shape[1]) * x.shape[2] * x.dtype.itemsize for x in arrays),
    )
    return pl.pallas_call(
        functools.partial(kernel, num_heads=num_heads, head_dim=head_dim),
        grid=(frames, parts),
        in_specs=specs[: len(inputs)],
        out_specs=specs[len(inputs) :],
        out_shape=outputs,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=('parallel', 'arbitrary'), vmem_limit_bytes=VMEM_BYTES
        ),
        cost_estimate=cost,
        interpret=interpret,
        name=name,
    )(*inputs)


def heads_tile(length: int, num_heads: int, head_dim: int, arrays: int = 4) -> int | None:
    """Channels of heads that `frame_attention` works on at a time, whole groups of them.

    The most that fit into VMEM; None where the logits of one group do not.

    Args:
      length: L.
      num_heads: h.
      head_dim: d.
      arrays: that hold these channels: queries, keys, values and output, and their gradients.
    """
    groups = groups_of_heads(num_heads, head_dim)
    logits = _logits_bytes(length, head_dim)
    for parts in range(1, groups + 1):
        width = groups // parts * LANES
        # Each array twice: the next part arrives meanwhile.
        if groups % parts == 0 and 2 * arrays * _rows(length) * width * 2 + logits < VMEM_BYTES:
            return width
    return None


def _logits_bytes(length: int, head_dim: int) -> int:
    """What the logits of a group of heads take of VMEM, by compiled kernels of 785 to 1601 tokens.

    Of two heads 7.1 to 8.7 bytes a logit, of four 12.8 to 13.8.
    """
    logits = _rows(length) * math.ceil(length / LANES) * LANES
    return 3 * (1 + heads_per_group(head_dim)) * logits


def each_group(body: Callable[..., None], num_heads: int, head_dim: int, together: int = 1) -> None:
    """Calls `body(number, heads)` for every group: its number and how many heads it has.

    With `together`, `body(number, heads, together)` for so many groups from `number` on.
    """
    group = heads_per_group(head_dim)
    turns, rest = divmod(num_heads // group, together)
    more = (together,) if together > 1 else ()
    # A loop, not a row of copies: memory of one group serves the next.
    jax.lax.fori_loop(0, turns, lambda turn, _: body(turn * together, group, *more), None)
    for number in range(turns * together, turns * together + rest):
        body(number, group)
    if num_heads % group:
        body(num_heads // group, num_heads % group)


def group_lanes(number: jax.Array | int) -> pl.Slice:
    """The lanes of a group of heads."""
    return pl.ds(pl.multiple_of(number * LANES, LANES), LANES)


def _frame_kernel(qkv_ref, out_ref, *, num_heads: int, head_dim: int, together: int) -> None:
    """Some heads of one frame: (1, L, 3 w) -> (1, queries, w); `together` groups at a time."""
    queries = out_ref.shape[1]

    def body(number: jax.Array | int, heads: int, count: int = 1) -> None:
        begun = []
        for group in range(count):
            q = qkv_ref[0, :queries, group_lanes(3 * (number + group))]
            k, v = (qkv_ref[0, :, group_lanes(3 * (number + group) + i)] for i in (1, 2))
            begun.append(begin_to_attend(q, k, v, heads, head_dim))
        for group, (logits, values) in enumerate(begun):
            out = finish_attending(logits, values, head_dim)
            out_ref[0, :, group_lanes(number + group)] = out.astype(out_ref.dtype)

    each_group(body, num_heads, head_dim, together)


def _frame_gradient_kernel(
    qkv_ref, upstream_ref, gradient_ref, sum_ref, *, num_heads: int, head_dim: int
) -> None:
    """Some heads of one frame: (1, L, 3 w), (1, queries, w) -> (1, L, 3 w), (1, 1, 3 w)."""
    length, queries = qkv_ref.shape[1], upstream_ref.shape[1]

    def body(number: jax.Array | int, heads: int) -> None:
        q = qkv_ref[0, :queries, group_lanes(3 * number)]
        k, v = (qkv_ref[0, :, group_lanes(3 * number + i)] for i in (1, 2))
        upstream = upstream_ref[0, :, group_lanes(number)]
        found = group_gradient(q, k, v, upstream, heads, head_dim)
        for i, gradient in enumerate(found):
            lanes, rows = group_lanes(3 * number + i), gradient.shape[0]
            gradient_ref[0, :rows, lanes] = gradient.astype(gradient_ref.dtype)
            sum_ref[0, :, lanes] = gradient.sum(0, keepdims=True)
        if queries < length:
            rest = jnp.zeros((length - queries, LANES), gradient_ref.dtype)
            gradient_ref[0, queries:, group_lanes(3 * number)] = rest

    each_group(body, num_heads, head_dim)


def begin_to_attend(
    q: jax.Array, k: jax.Array, v: jax.Array, heads: int, head_dim: int
) -> tuple[list[jax.Array], list[jax.Array]]:
    """Logits of the heads that share a register, and their values, for `finish_attending`.

    Heads narrower than a register are not cut out of it: a head's logits are the product of whole
    registers in which the query's other lanes are zero. The matrix unit is as deep as a register,
    so this costs nothing. Keys are rows of the logits: sums over them are of whole registers, and
    what is missing to whole registers of 128 lanes is missing of queries, over which nothing is
    summed. The product with the values is of their transpose, which has a head's channels as rows.

    Args:
      q, k, v: bfloat16 (Q, 128), (L, 128) twice.

    Returns:
      Of every head its logits, float32 (L, Q), and its values, bfloat16 (d, L).
    """
    logits = [product(k, only(own, q), (1, 1)) for own in lanes_of_heads(heads, head_dim)]
    return logits, list(_rows_of_heads(v, heads, head_dim))


def finish_attending(
    logits: list[jax.Array],
    values: list[jax.Array],
    head_dim: int,
    meanwhile: Sequence[Callable[[], None]] = (),
) -> jax.Array:
    """Attention of the heads that share a register, float32 (Q, 128).

    Products are issued in the order of the program, so those that need not wait for a softmax have
    to come before those that do: of other groups, of other heads, and of `meanwhile`.
    """
    weights = [exponentials(part, head_dim) for part in logits]
    waiting, found = list(meanwhile), []
    for rows, part in zip(values, weights, strict=True):
        if waiting:
            waiting.pop(0)()
        found.append(product(rows, part.astype(rows.dtype)) * (1 / part.sum(0, keepdims=True)))
    for work in waiting:
        work()
    return _rows_to_lanes(found)


def group_gradient(
    q: jax.Array, k: jax.Array, v: jax.Array, upstream: jax.Array, heads: int, head_dim: int
) -> Heads:
    """Of `finish_attending` by queries, keys and values: float32 (Q, 128), (L, 128) twice.

    A register of queries after the other; the first products of the next come before what is done
    with those of the last.
    """
    owns = list(lanes_of_heads(heads, head_dim))

    # A register more for a handful of queries is not worth it, and for one it is not compiled.
    starts = range(0, max(q.shape[0] - SUBLANES, 1), LANES)
    parts = [slice(start, start + LANES) for start in starts[:-1]] + [slice(starts[-1], None)]

    def products(some: slice) -> tuple[list[jax.Array], ...]:
        queries = [only(own, q[some]) for own in owns]
        upstreams = [only(own, upstream[some]) for own in owns]
        logits = [product(k, x, (1, 1)) for x in queries]
        return queries, upstreams, logits, [product(v, x, (1, 1)) for x in upstreams]

    dq, dk, dv = [], jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    ready = products(parts[0])
    for following in (*parts[1:], None):
        queries, upstreams, logits, dweights = ready
        if following is not None:
            ready = products(following)
        weights = [exponentials(x, head_dim) for x in logits]
        weights = [x * (1 / x.sum(0, keepdims=True)) for x in weights]
        dv += sum(product(w.astype(v.dtype), x) for w, x in zip(weights, upstreams))
        means = [(w * dw).sum(0, keepdims=True) for w, dw in zip(weights, dweights)]
        dlogits = [
            (w * (dw - mean)).astype(q.dtype) for w, dw, mean in zip(weights, dweights, means)
        ]
        dk += sum(product(dl, x) for dl, x in zip(dlogits, queries))
        keys = _rows_of_heads(k, heads, head_dim)
        dq.append(_rows_to_lanes(product(rows, dl) for rows, dl in zip(keys, dlogits)))
    return jnp.concatenate(dq) * head_dim**-0.5, dk * head_dim**-0.5, dv


def exponentials(logits: jax.Array, head_dim: int) -> jax.Array:
    """Softmax of (L, Q) over L, not divided by its sum."""
    scale = head_dim**-0.5 * math.log2(math.e)
    return jnp.exp2((logits - logits.max(0, keepdims=True)) * scale)


def lanes_of_heads(heads: int, head_dim: int) -> Iterator[jax.Array]:
    """For every head of a group, which lanes are its own: bool (1, 128)."""
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
    for start in range(0, heads * head_dim, head_dim):
        yield (lane >= start) & (lane < start + head_dim)


def only(own: jax.Array, x: jax.Array) -> jax.Array:
    """`x` with zeros in the lanes of others."""
    return jnp.where(own, x, 0).astype(x.dtype)


def _rows_of_heads(x: jax.Array, heads: int, head_dim: int) -> Iterator[jax.Array]:
    """Every head of (L, 128), transposed: (d, L)."""
    rows = x.T
    for start in range(0, heads * head_dim, head_dim):
        yield rows[start : start + head_dim]


def _rows_to_lanes(heads: Iterable[jax.Array]) -> jax.Array:
    """Heads of (d, Q) in the lanes of (Q, 128), zeros in lanes without one."""
    rows = jnp.concatenate(list(heads))
    return jnp.pad(rows, ((0, LANES - rows.shape[0]), (0, 0))).T


def product(a: jax.Array, b: jax.Array, over: tuple[int, int] = (1, 0)) -> jax.Array:
    """float32 product of two bfloat16 matrices over these axes of them."""
    return jax.lax.dot_general(
        a,
        b,
        (((over[0],), (over[1],)), ((), ())),
        precision=jax.lax.Precision.DEFAULT,  # of bfloat16: nothing is lost
        preferred_element_type=jnp.float32,
    )


def cost_estimate(
    kernel: str,
    frames: int,
    shape: dict[str, int],
    *,
    transcendentals: int,
    frame_bytes: int,
    weight_bytes: int = 0,
) -> pl.CostEstimate:
    """What a kernel declares.

    Args:
      kernel: its name in `kernel_costs`.
      frames: that it works on.
      shape: as `kernel_costs.bundles` takes it.
      transcendentals: of a frame.
      frame_bytes: read and written for a frame, in whole registers.
      weight_bytes: that are read in all.
    """
    bundles = frames * kernel_costs.bundles(kernel, **shape)
    return pl.CostEstimate(
        flops=round(bundles * kernel_costs.FLOPS_PER_BUNDLE),
        transcendentals=frames * transcendentals,
        bytes_accessed=frames * frame_bytes + weight_bytes,
    )


def residual_attention(
    x: jax.Array, norm: Tree, attn: Tree, interpret: bool = False, *, tapped: bool = False
) -> jax.Array | Heads:
    """`x + out(attention(LayerNorm(x)))` of a block, frame by frame.

    Args:
      x: the stream, bfloat16 (N, L, W).
      norm: `scale` and `bias` of the norm, (W,).
      attn: `qkv` with `kernel` (W, 3, h, d) and `bias` (3, h, d), `out` with `kernel` (h, d, W) and
        `bias` (W,); h and d as `attention_fits` wants them.
      interpret: run without a TPU, slowly, for tests.
      tapped: also give queries and keys.

    Returns:
      The stream after it, (N, L, W); if tapped, then queries and keys, (N, L, h, d).
    """
    frames, length, width = x.shape
    *_, num_heads, head_dim = attn['qkv']['kernel'].shape
    inner = num_heads * head_dim
    weights = (
        *rows_of(norm['scale'], norm['bias']),
        attn['qkv']['kernel'].astype(x.dtype).reshape(width, 3 * inner),
        *rows_of(attn['qkv']['bias']),
        attn['out']['kernel'].astype(x.dtype).reshape(inner, width),
        *rows_of(attn['out']['bias']),
    )
    found = _on_frames(
        functools.partial(_residual_attention_kernel, head_dim=head_dim),
        x,
        weights,
        [_stays(w.shape) for w in weights],
        [
            pltpu.VMEM((length, width), x.dtype),
            pltpu.VMEM((length, inner), x.dtype),
            pltpu.VMEM((3, length, LANES), jnp.float32),
        ],
        grid=(frames,),
        shape=dict(tokens=length, width=width, heads=num_heads, head_dim=head_dim),
        transcendentals=num_heads * length * length,
        interpret=interpret,
        name='tapped_attention' if tapped else 'residual_attention',
        more=2 * [inner] if tapped else (),
    )
    if not tapped:
        return found
    y, *heads = found
    return y, *(x.reshape(frames, length, num_heads, head_dim) for x in heads)


def _residual_attention_kernel(
    x_ref,
    scale_ref,
    shift_ref,
    qkv_ref,
    qkv_bias_ref,
    out_ref,
    out_bias_ref,
    y_refs,
    z_ref,
    h_ref,
    qkv_of_group_ref,
    *,
    head_dim: int,
) -> None:
    """One frame, (1, L, W) -> (1, L, W).

    Scratch for the norm of it, for the heads, and for a group's queries, keys and values. Where
    they are wanted, queries and keys follow the result.
    """
    y_ref, *tap_refs = y_refs
    inner = h_ref.shape[1]
    z_ref[...] = layer_norm(x_ref[0], scale_ref[...], shift_ref[...])

    def lanes(number: jax.Array | int, part: int = 0) -> pl.Slice:
        return pl.ds(pl.multiple_of(part * inner + number * LANES, LANES), LANES)

    def project(number: jax.Array | int, part: int) -> None:
        found = product(z_ref[...], qkv_ref[:, lanes(number, part)])
        qkv_of_group_ref[part] = found + qkv_bias_ref[:, lanes(number, part)]

    def attend_to(number: jax.Array | int, *meanwhile: Callable[[], None]) -> None:
        q, k, v = (qkv_of_group_ref[i].astype(x_ref.dtype) for i in range(3))
        for tap_ref, tap in zip(tap_refs, (q, k)):
            tap_ref[0, :, lanes(number)] = tap
        logits, values = begin_to_attend(q, k, v, heads_per_group(head_dim), head_dim)
        out = finish_attending(logits, values, head_dim, meanwhile)
        h_ref[:, lanes(number)] = out.astype(h_ref.dtype)

    def group(number: jax.Array, _: None) -> None:
        """While the matrix units project the next group, the softmax of this one is computed."""
        attend_to(number, *(functools.partial(project, number + 1, i) for i in range(3)))

    last = inner // LANES - 1
    for i in range(3):
        project(0, i)
    jax.lax.fori_loop(0, last, group, None)
    attend_to(last)
    y = x_ref[0].astype(jnp.float32) + product(h_ref[...], out_ref[...]) + out_bias_ref[...]
    y_ref[0] = y.astype(y_ref.dtype)


def residual_mlp(
    x: jax.Array,
    norm: Tree,
    mlp: Tree,
    slot: Slot | None = None,
    interpret: bool = False,
    *,
    activation: str = 'quick_gelu',
    post_norm: bool = False,
    eps: float = LAYER_NORM_EPS,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """`x + c_proj(activation(c_fc(LayerNorm(x))))` of a block, a few frames at a time.

    Args:
      x: the stream, bfloat16 (N, L, W).
      norm: `scale` and `bias` of the norm, (W,).
      mlp: `c_fc` with `kernel` (W, hidden) and `bias` (hidden,), `c_proj` with `kernel` (hidden, W)
        and `bias` (W,).
      slot: where what is read of the result goes too, of a stack (K, N, ...); that is written in
        place.
      interpret: run without a TPU, slowly, for tests.
      activation: a key of `MLP_ACTIVATIONS`.
      post_norm: `x + LayerNorm(c_proj(activation(c_fc(x))))` instead.
      eps: of the norm.

    Returns:
      The stream after it, (N, L, W); with a slot also its stack.
    """
    _, length, width = x.shape
    hidden = mlp['c_fc']['kernel'].shape[1]
    tile = mlp_tile(x.shape, hidden, post_norm, kept=slot is not None)
    name, reading = 'post_norm_mlp' if post_norm else 'residual_mlp', None
    if slot is not None:
        reading = slot.reading
        name = f'kept_{name}' if reading == Reading() else f'read_{name}'
    weights = (
        *rows_of(norm['scale'], norm['bias']),
        mlp['c_fc']['kernel'].astype(x.dtype),
        *rows_of(mlp['c_fc']['bias']),
        mlp['c_proj']['kernel'].astype(x.dtype),
        *rows_of(mlp['c_proj']['bias']),
    )
    # A part of the hidden channels: columns of the first matrix, rows of the second.
    row, columns, rows = (1, width), (width, tile.hidden), (tile.hidden, width)
    specs = [
        _stays(row),
        _stays(row),
        _part(columns, hidden, axis=1),
        _part((1, tile.hidden), hidden, axis=1),
        _part(rows, hidden, axis=0),
        _stays(row),
    ]
    shape = (tile.frames, length, width)
    normed = [] if post_norm else [pltpu.VMEM(shape, x.dtype)]
    return _on_frames(
        functools.partial(
            _residual_mlp_kernel,
            activation=MLP_ACTIVATIONS[activation],
            post_norm=post_norm,
            eps=eps,
            reading=reading,
        ),
        x,
        weights,
        specs,
        [*normed, pltpu.VMEM(shape, jnp.float32)],
        grid=(x.shape[0] // tile.frames, hidden // tile.hidden),
        shape=dict(tokens=length, width=width, hidden=hidden, part=tile.hidden),
        transcendentals=length * hidden,
        interpret=interpret,
        name=name,
        slot=slot,
    )


ROWS_TO_READ = 104  # of a stream, that become what is kept of it at a time


class MlpTile(NamedTuple):
    """What `residual_mlp` works on at a time."""

    frames: int
    hidden: int


# Where the weights do not fit, parts of them are read again for every few frames; this many tokens
# take longer than their parts need to arrive.
TOKENS_TO_STREAM = 256


def mlp_tile(
    shape: tuple[int, int, int], hidden: int, post_norm: bool = False, kept: bool = False
) -> MlpTile | None:
    """The largest tile that fits into VMEM, of streams (N, L, W); None if nothing does.

    With `kept` there is one result more, for a slot.
    """
    frames, length, width = shape
    for tile in (MlpTile(1, hidden), MlpTile(2, 512), MlpTile(1, 512), MlpTile(1, 256)):
        whole = tile.hidden == hidden
        buffers = 1 if whole else 2
        weights = buffers * 2 * width * tile.hidden * 2
        # Of all frames in, out, sum, and the norm in front; of one what products leave.
        each = (12 if post_norm else 14) + 4 * kept
        streams = length * width * (tile.frames * each + 5)
        if (
            frames % tile.frames == hidden % tile.hidden == 0
            and (whole or tile.frames * length >= TOKENS_TO_STREAM)
            and weights + streams + length * tile.hidden * 6 < VMEM_BYTES
        ):
            return tile
    return None


def _quick_gelu(h: jax.Array) -> jax.Array:
    """A sigmoid is half of 1 + tanh, which is one operation here."""
    h = 0.5 * h
    return h + h * jnp.tanh(2 * 0.851 * h)


# Of float32 hidden channels.
MLP_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    'quick_gelu': _quick_gelu,
    'gelu': fitted_gelu,
}


def _residual_mlp_kernel(
    x_ref,
    scale_ref,
    shift_ref,
    fc_ref,
    fc_bias_ref,
    proj_ref,
    proj_bias_ref,
    y_refs,
    *scratch_refs,
    activation: Callable[[jax.Array], jax.Array],
    post_norm: bool,
    eps: float,
    reading: Reading | None,
) -> None:
    """A few frames and a part of the hidden channels; scratch for a norm in front and the sum."""
    number, count = pl.program_id(1), pl.num_programs(1)
    *norm_ref, sum_ref = scratch_refs
    z_ref = norm_ref[0] if norm_ref else x_ref

    def norm(x: jax.Array) -> jax.Array:
        return layer_norm(x, scale_ref[...], shift_ref[...], eps)

    @pl.when(number == 0)
    def _() -> None:
        for frame in range(x_ref.shape[0]):
            if post_norm:
                sum_ref[frame] = jnp.broadcast_to(proj_bias_ref[...], sum_ref.shape[1:])
            else:
                z_ref[frame] = norm(x_ref[frame])
                sum_ref[frame] = x_ref[frame].astype(jnp.float32) + proj_bias_ref[...]

    for frame in range(x_ref.shape[0]):
        h = activation(product(z_ref[frame], fc_ref[...]) + fc_bias_ref[...])
        sum_ref[frame] += product(h.astype(z_ref.dtype), proj_ref[...])

    @pl.when(number == count - 1)
    def _() -> None:
        for frame in range(x_ref.shape[0]):
            y = sum_ref[frame]
            if post_norm:
                y = x_ref[frame].astype(jnp.float32) + norm(y)
            y_refs[0][frame] = y.astype(x_ref.dtype)
            if reading is not None:
                sum_ref[frame] = y  # float32 may be read from any row on
                _read_rows(sum_ref.at[frame], y_refs[1].at[frame], reading)


def _read_rows(stream_ref, read_ref, reading: Reading) -> None:
    """What is kept of a frame's stream, as many rows at a time as registers hold."""
    first = int(reading.patches)
    for start in range(0, read_ref.shape[0], ROWS_TO_READ):
        rows = min(ROWS_TO_READ, read_ref.shape[0] - start)
        stream = stream_ref[pl.ds(first + start, rows)].astype(read_ref.dtype)
        read_ref[pl.ds(start, rows)] = reading.ready(stream)


def rows_of(*vectors: jax.Array) -> list[jax.Array]:
    """Vectors as float32 rows, (1, n), which is what VMEM holds."""
    return [vector.astype(jnp.float32).reshape(1, -1) for vector in vectors]


def _rows(length: int) -> int:
    """Rows that memory holds for this many tokens: whole registers, or a single row."""
    return length if length == 1 else whole(length, SUBLANES)


def _stays(shape: tuple[int, ...]) -> pl.BlockSpec:
    """A weight that is read once."""
    return pl.BlockSpec(shape, lambda *_: (0,) * len(shape), pipeline_mode=pl.Buffered(1))


def _part(shape: tuple[int, int], full: int, axis: int) -> pl.BlockSpec:
    """A weight of which the second axis of the grid takes parts, or all of it at once."""
    if shape[axis] == full:
        return _stays(shape)
    return pl.BlockSpec(shape, lambda _, c, *__: (c, 0) if axis == 0 else (0, c))


def _on_frames(
    kernel: Callable[..., None],
    x: jax.Array,
    weights: tuple[jax.Array, ...],
    specs: list[pl.BlockSpec],
    scratch: list[Any],
    *,
    grid: tuple[int, ...],
    shape: dict[str, int],
    transcendentals: int,
    interpret: bool,
    name: str,
    slot: Slot | None = None,
    more: Sequence[int] = (),
) -> jax.Array | tuple[jax.Array, ...]:
    """Runs a kernel on (N, L, W), N cut over the first axis of the grid.

    The kernel's refs are of `x`, of the weights, of the results (a tuple: the stream, with a slot
    the place for it there, and arrays (N, L, C) for each C of `more`), of the scratch.
    """
    frames, length, width = x.shape
    block = frames // grid[0], length, width
    some = pl.BlockSpec(block, lambda n, *_: (n, 0, 0))
    inputs, outputs = [some, *specs], [some]
    arrays, shapes = (x, *weights), [jax.ShapeDtypeStruct(x.shape, x.dtype)]
    for channels in more:
        outputs.append(pl.BlockSpec((*block[:2], channels), lambda n, *_: (n, 0, 0)))
        shapes.append(jax.ShapeDtypeStruct((frames, length, channels), x.dtype))
    before, aliases = (), {}
    if slot is not None:
        # Which slot is known before the kernel starts. The stack is named, not read.
        before = (slot.index.reshape(1),)
        place = (None, block[0], *slot.stack.shape[2:])
        outputs.insert(1, pl.BlockSpec(place, lambda n, *i: (i[-1][0], n, 0, 0)))
        shapes.insert(1, jax.ShapeDtypeStruct(slot.stack.shape, slot.stack.dtype))
        inputs.append(pl.BlockSpec(memory_space=pl.ANY))
        aliases = {len(before) + len(arrays): 1}
        arrays = (*arrays, slot.stack)

    def run(*refs: Any) -> None:
        refs = refs[len(before) :]
        results = refs[len(arrays) : len(arrays) + len(outputs)]
        kernel(*refs[: 1 + len(weights)], results, *refs[len(arrays) + len(outputs) :])

    # Weights that stay are read by each core, those of which there are parts for some frames.
    times = kernel_costs.CORES if math.prod(grid) == grid[0] else grid[0]
    cost = cost_estimate(
        name,
        frames,
        shape,
        transcendentals=transcendentals,
        frame_bytes=_rows(length)
        * ((2 + (slot is not None)) * width + sum(more))
        * x.dtype.itemsize,
        weight_bytes=times * sum(w.nbytes for w in weights),
    )
    results = pl.pallas_call(
        run,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(before),
            grid=grid,
            in_specs=inputs,
            out_specs=outputs,
            scratch_shapes=scratch,
        ),
        out_shape=shapes,
        input_output_aliases=aliases,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=('parallel', 'arbitrary')[: len(grid)],
            vmem_limit_bytes=VMEM_BYTES,
        ),
        cost_estimate=cost,
        interpret=interpret,
        name=name,
    )(*before, *arrays)
    return results[0] if len(results) == 1 else tuple(results)


Rotation = Callable[[jax.Array], jax.Array]


def self_attention(
    z: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    mask: jax.Array | None = None,
    rotate: Rotation | None = None,
) -> Heads:
    """Projections and attention of a block of a frozen tower.

    On TPU, in bfloat16 and without a mask, by `frame_attention` where a frame fits into VMEM.

    Args:
      z: (N, L, W), the normalised stream.
      kernel: (W, 3, h, d), of queries, keys and values, in the dtype of `z`.
      bias: (3, h, d), likewise.
      mask: see `layers.attend`.
      rotate: of queries and of keys, (N, L, h, d), before they meet: a rotary position embedding.

    Returns:
      Output of the heads, queries and keys, each (N, L, h, d).
    """
    plain = functools.partial(_plain_heads, rotate=rotate)
    if mask is None and heads_fit(z, kernel):
        return on_tpu(functools.partial(_fast_heads, rotate=rotate), plain, z, kernel, bias)
    return plain(z, kernel, bias, mask)


def on_tpu(fast: Callable[..., Tree], plain: Callable[..., Tree], *inputs: Tree) -> Tree:
    """`fast(*inputs)` on TPU, `plain(*inputs)` elsewhere; gradients are those of `plain`."""
    run = jax.custom_vjp(fast)
    run.defvjp(
        lambda *inputs: (fast(*inputs), inputs),
        lambda inputs, upstream: jax.vjp(plain, *inputs)[1](upstream),
    )
    return jax.lax.platform_dependent(*inputs, tpu=run, default=plain)


def trained_on_tpu(
    fast: Callable[..., Tree],
    gradient: Callable[..., tuple[jax.Array, Tree]],
    plain: Callable[..., Tree],
    x: jax.Array,
    params: Tree,
) -> Tree:
    """`fast(x, params)` on TPU, `plain(x, params)` elsewhere, each with its own gradient.

    Args:
      fast: kernel on the part of `x` that a device holds.
      gradient: (x, upstream, params) -> the gradient by `x`; and by `params`, (parts, ...) of each,
        a device's or a core's part of the sum in front of at least two other axes.
      plain: what `fast` means.
      x: axis 0 is split over devices.
      params: whole on every device.
    """

    @jax.custom_vjp
    def run(x: jax.Array, params: Tree) -> Tree:
        each = functools.partial(on_each_device, fast)
        return jax.lax.platform_dependent(x, params, tpu=each, default=plain)

    def fast_gradient(x: jax.Array, params: Tree, upstream: Tree) -> tuple[jax.Array, Tree]:
        to_x, sums = on_each_device(gradient, x, params, beside=(upstream,))
        return to_x, jax.tree.map(
            lambda parts, leaf: parts.sum(0).reshape(leaf.shape).astype(leaf.dtype), sums, params
        )

    def back(inputs: tuple[jax.Array, Tree], upstream: Tree) -> tuple[jax.Array, Tree]:
        def plain_gradient(x: jax.Array, params: Tree, upstream: Tree) -> tuple[jax.Array, Tree]:
            return jax.vjp(plain, x, params)[1](upstream)

        return jax.lax.platform_dependent(
            *inputs, upstream, tpu=fast_gradient, default=plain_gradient
        )

    run.defvjp(lambda *inputs: (run(*inputs), inputs), back)
    return run(x, params)


def kept_on_tpu(
    fast: Callable[..., tuple[jax.Array, jax.Array]],
    plain: Callable[..., jax.Array],
    slot: Slot,
    x: jax.Array,
    *whole: Tree,
) -> tuple[jax.Array, jax.Array]:
    """`on_tpu` of what gives a stream, which is put into a slot too.

    Args:
      fast: (x, *whole, slot=) -> the stream and the slot's stack with it, on one device.
      plain: (x, *whole) -> the stream; its gradients are those of both.
      slot: where to put it.
      x: (N, L, W).
      whole: what every device needs all of.
    """

    def run(slot: Slot, *inputs: Tree) -> tuple[jax.Array, jax.Array]:
        return on_each_device(fast, *inputs, slot=slot)

    def both(*inputs: Tree) -> tuple[jax.Array, jax.Array]:
        y = plain(*inputs)
        return y, slot.reading.of(y)

    def backward(kept: tuple, upstream: tuple[jax.Array, jax.Array]) -> tuple:
        # Of the stack nothing is kept: in a loop that would be one for every turn.
        index, inputs = kept
        y, stack = upstream
        read = jax.lax.dynamic_index_in_dim(stack, index, keepdims=False)
        others = jax.lax.dynamic_update_index_in_dim(stack, jnp.zeros_like(read), index, 0)
        return Slot(others, None, slot.reading), *jax.vjp(both, *inputs)[1]((y, read))

    def on_cpu(slot: Slot, *inputs: Tree) -> tuple[jax.Array, jax.Array]:
        y = plain(*inputs)
        return y, slot.written(y)

    here = jax.custom_vjp(run)
    here.defvjp(lambda slot, *inputs: (run(slot, *inputs), (slot.index, inputs)), backward)
    return jax.lax.platform_dependent(slot, x, *whole, tpu=here, default=on_cpu)


def _plain_heads(
    z: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    mask: jax.Array | None = None,
    rotate: Rotation | None = None,
) -> Heads:
    q, k, v = einsum('nlw,wchd->cnlhd', z, kernel) + bias[:, None, None]
    if rotate is not None:
        q, k = rotate(q), rotate(k)
    return attend(q, k, v, mask), q, k


def _fast_heads(
    z: jax.Array, kernel: jax.Array, bias: jax.Array, rotate: Rotation | None = None
) -> Heads:
    num_heads, head_dim = kernel.shape[-2:]
    qkv = grouped_projection(z, kernel, bias)
    q, k, v = heads_of(qkv, num_heads, head_dim, arrays=3)
    if rotate is not None:
        q, k = rotate(q), rotate(k)
        qkv = grouped(jnp.stack([q, k, v], axis=2))
    run = functools.partial(frame_attention, head_dim=head_dim)
    out = _on_device_groups(run, (qkv,), num_heads, head_dim)
    return *heads_of(out, num_heads, head_dim), q, k


def trained_attention(z: jax.Array, attn: Tree, queries: int | None = None) -> jax.Array:
    """Projections and attention of a block that is trained.

    On TPU and in bfloat16, attention and its gradient are kernels where a frame fits into VMEM;
    of the attention, only queries, keys and values are kept for the gradient. Elsewhere it is
    `layers.attend`.

    Args:
      z: (N, L, C), the normalised stream.
      attn: `qkv` with `kernel` (C, 3, h, d) and `bias` (3, h, d), `out` with `kernel`
        (h, d, C') and `bias` (C',); cast to the dtype of `z`.
      queries: how many tokens, from the first on, are queries; None for all. All are keys: a class
        token that asks nothing comes last.

    Returns:
      (N, queries, C').
    """
    attn = jax.tree.map(lambda leaf: leaf.astype(z.dtype), attn)
    kernel, bias, out = attn['qkv']['kernel'], attn['qkv']['bias'], attn['out']
    num_heads, head_dim = kernel.shape[-2:]
    queries = queries or z.shape[1]
    if heads_fit(z, kernel, arrays=7):
        projected = frame_product(z, grouped(kernel))
        heads = _grouped_attention(projected, grouped(bias), queries, num_heads, head_dim)
        rows = jnp.moveaxis(grouped(jnp.moveaxis(out['kernel'], -1, 0)[:, None]), 0, -1)
        return frame_product(heads, rows) + out['bias']
    q, k, v = einsum('nlw,wchd->cnlhd', z, kernel) + bias[:, None, None]
    return einsum('nlhd,hdw->nlw', attend(q[:, :queries], k, v), out['kernel']) + out['bias']


@jax.custom_vjp
def frame_product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """(N, L, A) times (A, B) -> (N, L, B), whose gradient by the kernel is a kernel on TPU.

    That sums over frames and tokens. XLA would lay both factors out anew, with frames as lanes,
    where tokens do not fill registers.
    """
    return einsum('nla,ab->nlb', x, kernel)


def _frame_product_gradient(
    factors: tuple[jax.Array, jax.Array], upstream: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = factors
    to_x = einsum('nlb,ab->nla', upstream, kernel)

    def plain(x: jax.Array, upstream: jax.Array) -> jax.Array:
        return einsum('nla,nlb->ab', x, upstream).astype(kernel.dtype)

    def fast(x: jax.Array, upstream: jax.Array) -> jax.Array:
        sums = on_each_device(sum_of_products, x, beside=(upstream,))
        return sums.sum(0).astype(kernel.dtype)

    if not sums_fit(x, upstream):
        return to_x, plain(x, upstream)
    return to_x, jax.lax.platform_dependent(x, upstream, tpu=fast, default=plain)


frame_product.defvjp(
    lambda x, kernel: (frame_product(x, kernel), (x, kernel)), _frame_product_gradient
)


def sums_fit(a: jax.Array, b: jax.Array) -> bool:
    """Whether `sum_of_products` takes these: bfloat16, whole on a device, room in VMEM."""
    length, size = _rows(a.shape[1]), a.shape[2] * b.shape[2]
    held = 2 * 4 * size + 2 * 2 * length * (a.shape[2] + b.shape[2]) + 4 * size
    return a.dtype == b.dtype == jnp.bfloat16 and on_whole_devices(a) and held < VMEM_BYTES


def on_whole_devices(x: jax.Array) -> bool:
    """Whether a device holds whole frames of `x`, or clips, and weights, and no other the same."""
    return mesh_sizes().get(TENSOR, 1) == 1 and batch_axes(x) is not None


def sum_of_products(a: jax.Array, b: jax.Array, interpret: bool = False) -> jax.Array:
    """The sum over frames of a^T b, of each core its part.

    Args:
      a: (N, L, A) bfloat16.
      b: (N, L, B) bfloat16.
      interpret: run without a TPU, slowly, for tests.

    Returns:
      float32 (parts, A, B), whose sum over the parts it is.
    """
    frames, length, _ = a.shape
    cores = kernel_costs.CORES
    parts = cores if frames % cores == 0 else 1
    each = frames // parts
    shape = (parts, a.shape[2], b.shape[2])
    specs = [
        pl.BlockSpec((1, length, x.shape[2]), lambda p, n: (p * each + n, 0, 0)) for x in (a, b)
    ]
    lanes = sum(whole(x.shape[2], LANES) for x in (a, b))
    cost = cost_estimate(
        'sum_of_products',
        frames,
        {'tokens': length, 'rows': a.shape[2], 'columns': b.shape[2]},
        transcendentals=0,
        frame_bytes=_rows(length) * lanes * a.dtype.itemsize,
        weight_bytes=4 * math.prod(shape),
    )
    return pl.pallas_call(
        _sum_kernel,
        grid=(parts, each),
        in_specs=specs,
        out_specs=pl.BlockSpec((1, *shape[1:]), lambda p, n: (p, 0, 0)),
        out_shape=jax.ShapeDtypeStruct(shape, jnp.float32),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=('parallel', 'arbitrary'), vmem_limit_bytes=VMEM_BYTES
        ),
        cost_estimate=cost,
        interpret=interpret,
        name='sum_of_products',
    )(a, b)


def _sum_kernel(a_ref, b_ref, sum_ref) -> None:
    """One frame: (1, L, A), (1, L, B), added to (1, A, B)."""

    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        sum_ref[...] = jnp.zeros(sum_ref.shape, sum_ref.dtype)

    sum_ref[0] += product(a_ref[0], b_ref[0], (0, 0))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _grouped_attention(
    product: jax.Array, bias: jax.Array, queries: int, num_heads: int, head_dim: int
) -> jax.Array:
    """`frame_attention` of `product + bias` on TPU, its plain form elsewhere; so the gradient."""

    def fast(qkv: jax.Array) -> jax.Array:
        run = functools.partial(frame_attention, head_dim=head_dim, queries=queries)
        return _on_device_groups(run, (qkv,), num_heads, head_dim)

    def plain(qkv: jax.Array) -> jax.Array:
        return _plain_groups(qkv, queries, num_heads, head_dim)

    return jax.lax.platform_dependent(product + bias, tpu=fast, default=plain)


def _grouped_attention_gradient(
    queries: int, num_heads: int, head_dim: int, qkv: jax.Array, upstream: jax.Array
) -> tuple[jax.Array, jax.Array]:
    def fast(*inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
        run = functools.partial(frame_attention_gradient, head_dim=head_dim)
        return _on_device_groups(run, inputs, num_heads, head_dim)

    def plain(qkv: jax.Array, upstream: jax.Array) -> tuple[jax.Array, jax.Array]:
        run = jax.vjp(lambda qkv: _plain_groups(qkv, queries, num_heads, head_dim), qkv)[1]
        gradient = run(upstream)[0]
        return gradient, gradient.astype(jnp.float32).sum(1, keepdims=True)

    gradient, sums = jax.lax.platform_dependent(qkv, upstream, tpu=fast, default=plain)
    return gradient, sums.sum((0, 1)).astype(qkv.dtype)


_grouped_attention.defvjp(
    lambda product, bias, *sizes: (_grouped_attention(product, bias, *sizes), product + bias),
    _grouped_attention_gradient,
)


def _plain_groups(qkv: jax.Array, queries: int, num_heads: int, head_dim: int) -> jax.Array:
    """What `frame_attention` means."""
    q, k, v = heads_of(qkv, num_heads, head_dim, arrays=3)
    return grouped(attend(q[:, :queries], k, v)[:, :, None])


def _on_device_groups(
    function: Callable[..., Tree], inputs: tuple[jax.Array, ...], num_heads: int, head_dim: int
) -> Tree:
    """`function(*inputs, num_heads=)` on the frames and groups of heads that a device holds."""
    axis = _heads_axis(num_heads, head_dim)
    if axis:
        groups = groups_of_heads(num_heads, head_dim) // mesh_sizes()[axis]
        num_heads = groups * heads_per_group(head_dim)  # of zeros, where one is missing
    run = functools.partial(function, num_heads=num_heads)
    return on_each_device(run, inputs[0], beside=inputs[1:], split=axis)


def grouped_projection(z: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """The projection as `frame_attention` takes it, (N, L, 3 g 128), by `grouped` parameters."""
    return einsum('nlw,wc->nlc', z, grouped(kernel)) + grouped(bias)


def grouped(x: jax.Array) -> jax.Array:
    """Channels (..., c, h, d) in groups of heads, (..., g c 128), with zeros where no head is."""
    *rest, _, num_heads, head_dim = x.shape
    heads = heads_per_group(head_dim)
    none = [(0, 0)] * (len(rest) + 1)
    x = jnp.pad(x, [*none, (0, -num_heads % heads), (0, 0)])
    x = einops.rearrange(x, '... c (g i) d -> ... g c (i d)', i=heads)
    x = jnp.pad(x, [*none, (0, 0), (0, LANES - x.shape[-1])])
    return x.reshape(*rest, -1)


def heads_of(x: jax.Array, num_heads: int, head_dim: int, arrays: int = 1) -> tuple[jax.Array, ...]:
    """The heads in (N, L, g c 128), c arrays of them: each (N, L, h, d)."""
    heads = heads_per_group(head_dim)
    x = einops.rearrange(x, 'n l (g c w) -> c n l g w', c=arrays, w=LANES)
    x = einops.rearrange(x[..., : heads * head_dim], '... g (i d) -> ... (g i) d', i=heads)
    return tuple(x[..., :num_heads, :])


def heads_fit(z: jax.Array, kernel: jax.Array, arrays: int = 4) -> bool:
    """Whether `frame_attention` takes the heads of `self_attention`: `fits`, and room in VMEM."""
    num_heads, head_dim = kernel.shape[-2:]
    if not fits(num_heads, head_dim, z.dtype):
        return False
    if axis := _heads_axis(num_heads, head_dim):
        num_heads = -(-num_heads // mesh_sizes()[axis])
    return heads_tile(z.shape[1], num_heads, head_dim, arrays) is not None


def _heads_axis(num_heads: int, head_dim: int) -> str | None:
    """The axis of the mesh that groups of heads are split over, if it divides them."""
    size = mesh_sizes().get(TENSOR, 1)
    return TENSOR if size > 1 and groups_of_heads(num_heads, head_dim) % size == 0 else None


def attention_fits(x: jax.Array, attn: Tree, tapped: bool = False) -> bool:
    """Whether `residual_attention` takes these: whole registers of heads, room in VMEM."""
    *_, num_heads, head_dim = attn['qkv']['kernel'].shape
    _, length, width = x.shape
    weights = 4 * width * num_heads * head_dim * x.dtype.itemsize
    weights += 8 * length * num_heads * head_dim * tapped
    return (
        fits(num_heads, head_dim, x.dtype)
        and whole_registers(num_heads, head_dim)
        and mesh_sizes().get(TENSOR, 1) == 1
        and weights + 12 * length * width + _logits_bytes(length, head_dim) < VMEM_BYTES
    )


def mlp_fits(x: jax.Array, mlp: Tree, post_norm: bool = False, kept: bool = False) -> bool:
    """Whether `residual_mlp` takes these, with `kept` a slot too.

    That is, bfloat16, nothing split, room in VMEM.
    """
    width, hidden = mlp['c_fc']['kernel'].shape
    return (
        not is_portable()
        and x.dtype == jnp.bfloat16
        and width % LANES == hidden % LANES == 0
        and mesh_sizes().get(TENSOR, 1) == 1
        and mlp_tile(_on_device(x).shape, hidden, post_norm, kept) is not None
    )


def is_tensor_split() -> bool:
    """Whether the mesh splits channels."""
    return mesh_sizes().get(TENSOR, 1) > 1


def mesh_sizes() -> Mapping[str, int]:
    return jax.sharding.get_abstract_mesh().shape


def on_each_device(
    function: Callable[..., Tree],
    x: jax.Array,
    *whole: Tree,
    beside: Sequence[jax.Array] = (),
    stacked: Sequence[jax.Array] = (),
    split: str | None = None,
    slot: Slot | None = None,
) -> Tree:
    """A kernel on the part of (N, L, C) that a device holds: N over the batch axes.

    A program for several devices cannot split a kernel by itself. Where N does not divide, every
    device does the same work.

    Args:
      function: (x, *beside, *stacked, *whole) -> arrays whose first axis is that of `x`, or has a
        part of a sum for each device.
      x: (N, L, C).
      whole: what every device needs all of.
      beside: other arrays that are split like `x`.
      stacked: others with an axis in front of the one that is split.
      split: the axis of the mesh that C is split over, of `x` and of the result.
      slot: of a stack (K, N, L, C), which is split likewise; goes to the function by name, which
        then gives one more array, that stack.
    """
    inputs = (x, *beside, *stacked, *whole)
    if math.prod(mesh_sizes().values()) == 1:
        return function(*inputs) if slot is None else function(*inputs, slot=slot)
    spec = PartitionSpec(batch_axes(x), None, split)
    behind = PartitionSpec(None, batch_axes(x))
    specs = (
        spec,
        *(spec for _ in beside),
        *(behind for _ in stacked),
        *(PartitionSpec() for _ in whole),
    )
    on_mesh = functools.partial(jax.shard_map, check_vma=False)
    if slot is None:
        return on_mesh(function, in_specs=specs, out_specs=spec)(*inputs)
    stack = PartitionSpec(None, *spec)
    return on_mesh(
        lambda slot, *inputs: function(*inputs, slot=slot),
        in_specs=(Slot(stack, PartitionSpec(), slot.reading), *specs),
        out_specs=(spec, stack),
    )(slot, *inputs)


def batch_axes(x: jax.Array) -> tuple[str, ...] | None:
    """Axes of the mesh that N of (N, L, C) is split over; None where they do not divide it."""
    sizes = mesh_sizes()
    return BATCH if x.shape[0] % math.prod(sizes.get(axis, 1) for axis in BATCH) == 0 else None


def holds_clips(x: Any, num_frames: int) -> bool:
    """Whether a device holds whole clips of (B*T, L, ...), T frames each, and all channels."""
    frames = _on_device(x).shape[0]
    return mesh_sizes().get(TENSOR, 1) == 1 and frames % num_frames == 0


def _on_device(x: jax.Array) -> jax.ShapeDtypeStruct:
    """The part of (N, L, C) that a device holds."""
    sizes, axes = mesh_sizes(), batch_axes(x) or ()
    parts = math.prod(sizes.get(axis, 1) for axis in axes)
    return jax.ShapeDtypeStruct((x.shape[0] // parts, *x.shape[1:]), x.dtype)
