"""DiST's integration block as kernels for TPU: forward, and backward with all its gradients.

    M = F W_in + b + R
    U = M + [class row | conv_alpha(X)]
    X' = X + repeat_alpha(M[patches] W_it + b)
    R' = FFN(LN U) + TemporalFFN(LN U)

A grid step works on one frame: everything between stays in VMEM, with the weights. What a
convolution along time needs of neighbours is kept in rings of frames, and what needs them runs some
steps behind; so all frames of a core follow each other, whatever clip they are of, and one
schedule holds independent work of several frames. Nothing but X, M and the frozen outputs is kept
for the gradient; the frozen outputs get none.

Both norms have the same statistics. What is linear around them and around quick_gelu is folded into
the weights, in plain JAX, so that the gradient of that folding gives those of the parameters:
scales and biases of the norms, the mean of a row (weights without their mean over channels leave
it out), 0.851 and 1 / 1.702 of quick_gelu, of which v + v tanh(v) is left.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dist_jax.models import kernel_costs, kernels
from dist_jax.models.kernel_costs import LANES, SUBLANES, whole
from dist_jax.models.kernels import product
from dist_jax.models.layers import LAYER_NORM_EPS, is_portable
from dist_jax.models.stack import mark

Tree = Any
Refs = Mapping[str, Any]

MIXED = 'mixed'  # the name under which M is kept, see `stack.mark`
# Scratch of rows as products want them, see `_words`.
WORDS = ('shifted', 'upstream', 'z', 'dz', 'g', 'da', 'dg', 'dm')
SPILLED = 2**20  # bytes of VMEM that compiled kernels take besides what they ask for
# Stages of the kernels in turn, each of which goes on from where it was. The matrix units work in
# this order: between two parts of a stage, where the vector unit computes what the second begins
# with, they have others. What an earlier step left is read before it is written anew.
FORWARD = ('mixing', 'time', 'within', 'mixing', 'time', 'mixing', 'within')
BACKWARD = (
    *('first map', 'norms', 'first map', 'within', 'within', 'mixing', 'time', 'within', 'within'),
    *('within', 'mixing', 'time', 'mixing', 'first map', 'mixing', 'mixing'),
)
STEEP = 0.851  # quick_gelu(x) = (v + v tanh v) / (2 STEEP) for v = STEEP x


class Sizes(NamedTuple):
    """Of a block.

    Attributes:
      clip: t, frames of a clip.
      alpha: frames of X for each.
      tokens: L, 1 + N.
      width: W.
      channels: C.
      hidden: of the feed-forward within a frame.
      taps: of the convolution along time, odd.
      temporal: S.
      temporal_hidden: of the feed-forward along time.
    """

    clip: int
    alpha: int
    tokens: int
    width: int
    channels: int
    hidden: int
    taps: int
    temporal: int
    temporal_hidden: int

    @property
    def reach(self) -> int:
        """How many frames a convolution along time looks back, and ahead."""
        return self.taps // 2

    @property
    def ring(self) -> int:
        """Frames kept for such a convolution: a power of two, by which no division is needed."""
        return _power_of_two(self.taps + 1)


def _power_of_two(n: int) -> int:
    """The least that is not below `n`."""
    return 1 << (n - 1).bit_length()


class Lags(NamedTuple):
    """How many steps after its first a frame comes to the stages of the backward kernel.

    Each stage waits for neighbours of the one before.

    Attributes:
      time: the one along time.
      mixing: the norms, and what is in front of them.
      sums: the sum for the first map.
    """

    time: int
    mixing: int
    sums: int

    @staticmethod
    def of(sizes: Sizes) -> Lags:
        return Lags(sizes.reach, 2 * sizes.reach, 2 * sizes.reach + 1)


def sizes_of(x: jax.Array, r: jax.Array, taps: jax.Array, params: Tree) -> Sizes:
    """Sizes of a call of `integration`."""
    temporal = params['integration_net']['temporal_ffn']['c_fc2']['kernel']
    return Sizes(
        clip=r.shape[1],
        alpha=x.shape[1] // r.shape[1],
        tokens=r.shape[2],
        width=taps.shape[3],
        channels=r.shape[3],
        hidden=params['integration_net']['ffn']['c_fc']['kernel'].shape[1],
        taps=temporal.shape[0],
        temporal=x.shape[3],
        temporal_hidden=temporal.shape[2],
    )


def fits(x: jax.Array, r: jax.Array, taps: jax.Array, params: Tree) -> bool:
    """Whether the kernels take these: bfloat16, whole on a device, room in VMEM."""
    if is_portable() or not x.dtype == r.dtype == taps.dtype == jnp.bfloat16:
        return False
    sizes = sizes_of(x, r, taps, params)
    filled = all(n % LANES == 0 for n in (sizes.width, sizes.channels, sizes.hidden))
    narrow = max(sizes.temporal, sizes.temporal_hidden) <= LANES
    even = sizes.temporal % 16 == sizes.temporal_hidden % 16 == 0
    return (
        filled
        and narrow
        and even
        and kernels.on_whole_devices(r)
        and max(_held(sizes, last=False)) + SPILLED < kernels.VMEM_BYTES
    )


def _held(sizes: Sizes, last: bool) -> tuple[int, int]:
    """Bytes of VMEM that the kernels hold, forward and backward, without what they spill."""
    c, h, k, rows = sizes.channels, sizes.hidden, sizes.taps, sizes.tokens
    narrow = (sizes.alpha + 2) * c * LANES + k * LANES**2
    weights = sizes.width * c + 2 * c * h + narrow, 3 * c * h + 2 * narrow
    x = sizes.alpha * rows * LANES  # arrived and awaited, in and out
    blocks = rows * (sizes.width + 3 * c) + 2 * x, rows * (sizes.width + 4 * c) + 3 * x
    sums = {name: shape for name, (shape, _) in _sums(sizes, last).items()}
    scratch = _forward_scratch(sizes), _backward_scratch(sizes) | sums
    numbers = [sum(map(_stored, tables.values())) for tables in scratch]
    return tuple(2 * w + 4 * b + 4 * n for w, b, n in zip(weights, blocks, numbers))


def _stored(shape: tuple[int, ...]) -> int:
    """Numbers of 32 bits that VMEM holds for an array, in whole registers."""
    *outer, rows, lanes = shape
    return math.prod(outer) * (whole(rows, SUBLANES) if rows > 1 else 1) * whole(lanes, LANES)


def integration(
    x: jax.Array,
    r: jax.Array,
    taps: jax.Array,
    index: jax.Array | int,
    params: Tree,
    *,
    enter: Callable[..., jax.Array],
    join: Callable[..., tuple[jax.Array, jax.Array]],
    last: bool,
) -> tuple[jax.Array, jax.Array]:
    """The block where `fits`: kernels on TPU, `join(x, enter(tap, r, params), params)` elsewhere.

    Args:
      x: X behind the temporal net, (B, alpha t, N, S).
      r: R (B, t, 1 + N, C).
      taps: frozen outputs of all layers (K, B*t, 1 + N, W); they get no gradient.
      index: which is this layer's.
      params: of `input_linear`, `temporal2integration`, `integration_net` and, unless `last`,
        `integration2temporal`.
      enter: (tap (B*t, 1 + N, W), r, params) -> M like `r`.
      join: (x, m, params) -> what this returns.
      last: no layer follows: U is wanted instead of X'.

    Returns:
      X' like `x`, or U like `r`, and R'.
    """
    index = jnp.asarray(index, jnp.int32)

    def plain(x, r, taps, index, params):
        tap = jax.lax.dynamic_index_in_dim(taps, index, keepdims=False)
        m = enter(tap, r, params)
        return *join(x, m, params), m

    def plain_gradient(x, m, taps, index, params, upstream):
        tap = jax.lax.dynamic_index_in_dim(taps, index, keepdims=False)
        dx, dm, of_join = jax.vjp(join, x, m, params)[1](upstream)
        of_enter = jax.vjp(lambda params: enter(tap, jnp.zeros_like(m), params), params)[1](dm)[0]
        return dx, dm, jax.tree.map(jnp.add, of_join, of_enter)

    fast = functools.partial(forward, last=last)
    fast_gradient = functools.partial(backward, last=last)

    def both(*inputs):
        return jax.lax.platform_dependent(*inputs, tpu=fast, default=plain)

    def run_forward(x, r, taps, index, params):
        out, new, m = both(x, r, taps, index, params)
        return (out, new), (x, mark(m, MIXED), taps, index, params)

    def run_backward(kept, upstream):
        dx, dr, gradients = jax.lax.platform_dependent(
            *kept, upstream, tpu=fast_gradient, default=plain_gradient
        )
        return dx, dr, None, None, gradients

    run = jax.custom_vjp(lambda *inputs: both(*inputs)[:2])
    run.defvjp(run_forward, run_backward)
    return run(x, r, taps, index, params)


def fold(params: Tree, last: bool) -> dict[str, jax.Array]:
    """Weights as the kernels take them, float32; narrow channels filled up to a register's."""
    net, t2i = params['integration_net'], params['temporal2integration']
    ffn, temporal = net['ffn'], net['temporal_ffn']

    def behind_norm(norm: Tree, linear: Tree, factor: float) -> tuple[jax.Array, jax.Array]:
        kernel = norm['scale'][:, None] * linear['kernel']
        bias = norm['bias'] @ linear['kernel'] + linear['bias']
        return factor * (kernel - kernel.mean(0)), factor * bias

    w1, b1 = behind_norm(net['ln'], ffn['c_fc'], STEEP)
    wt1, bt1 = behind_norm(net['ln_temporal'], temporal['c_fc1'], 1.0)
    weights = {
        'w_in': params['input_linear']['kernel'],
        'b_in': params['input_linear']['bias'],
        'k': _fill(t2i['kernel'], -2),
        'bk': t2i['bias'],
        'cls': t2i['cls_token'],
        'w1': w1,
        'b1': b1,
        'w2': ffn['c_proj']['kernel'] / (2 * STEEP),
        'b2': ffn['c_proj']['bias'] + temporal['c_proj']['bias'],
        'wt1': _fill(wt1, -1),
        'bt1': _fill(bt1, -1),
        'wc': _fill(_fill(STEEP * temporal['c_fc2']['kernel'], -1), -2),
        'bc': _fill(STEEP * temporal['c_fc2']['bias'], -1),
        'wt2': _fill(temporal['c_proj']['kernel'] / (2 * STEEP), -2),
    }
    if not last:
        weights['w_it'] = _fill(params['integration2temporal']['kernel'], -1)
        weights['b_it'] = _fill(params['integration2temporal']['bias'], -1)
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), weights)


def _fill(x: jax.Array, axis: int) -> jax.Array:
    """`x` with zeros behind it on this axis, up to whole registers."""
    missing = [(0, 0)] * x.ndim
    missing[axis] = (0, -x.shape[axis] % LANES)
    return jnp.pad(x, missing)


def _words(x: jax.Array) -> jax.Array:
    """(..., K, N) -> uint32 (..., K / 2, N): two rows, in bfloat16, in a word.

    So a matrix lies in memory as a product wants it; narrower numbers would be packed at every use.
    """
    pairs = x.astype(jnp.bfloat16).reshape(*x.shape[:-2], -1, 2, x.shape[-1])
    halves = jax.lax.bitcast_convert_type(pairs, jnp.uint16).astype(jnp.uint32)
    return halves[..., 0, :] | halves[..., 1, :] << 16


def _matrix(words: jax.Array) -> jax.Array:
    """What `_words` was of."""
    return pltpu.bitcast(words, jnp.bfloat16)


def _transposed(x: jax.Array) -> jax.Array:
    return jnp.swapaxes(x, -1, -2)


def forward(
    x: jax.Array,
    r: jax.Array,
    taps: jax.Array,
    index: jax.Array,
    params: Tree,
    *,
    last: bool,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """X' (or U), R' and M, see `integration`; on the part of the clips that a device holds."""
    sizes = sizes_of(x, r, taps, params)
    folded = fold(params, last)
    names = ('w_in', 'k', 'w1', 'w2', 'wt1', 'wc', 'wt2') + (() if last else ('w_it',))
    weights = {name: _words(folded[name]) for name in names}
    weights |= _rows_of(folded, 'b_in', 'bk', 'b1', 'b2', 'bt1', 'bc')
    weights |= {} if last else _rows_of(folded, 'b_it')
    weights['cls'] = folded['cls'][:, None]
    run = functools.partial(_forward_on_device, sizes=sizes, last=last, interpret=interpret)
    return kernels.on_each_device(run, x, index[None], weights, beside=(r,), stacked=(taps,))


def backward(
    x: jax.Array,
    m: jax.Array,
    taps: jax.Array,
    index: jax.Array,
    params: Tree,
    upstream: tuple[jax.Array, jax.Array],
    *,
    last: bool,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, Tree]:
    """The gradient by X, R and the parameters, from that by the results, see `integration`."""
    sizes = sizes_of(x, m, taps, params)
    folded, unfold = jax.vjp(functools.partial(fold, last=last), params)
    weights = {name: _words(folded[name]) for name in ('k', 'w1', 'wt1', 'wc')}
    names = ('k', 'w1', 'w2', 'wt1', 'wc', 'wt2') + (() if last else ('w_it',))
    weights |= {name + '^T': _words(_transposed(folded[name])) for name in names}
    weights |= _rows_of(folded, 'bk', 'b1', 'bt1', 'bc')
    weights['cls'] = folded['cls'][:, None]
    run = functools.partial(_backward_on_device, sizes=sizes, last=last, interpret=interpret)
    dx, dr, sums = kernels.on_each_device(
        run, x, index[None], weights, beside=(m, *upstream), stacked=(taps,)
    )
    sums = jax.tree.map(lambda leaf: leaf.sum(0), sums)
    return dx, dr, unfold(_gradients(sums, folded))[0]


def _rows_of(folded: Mapping[str, jax.Array], *names: str) -> dict[str, jax.Array]:
    return {name: folded[name].reshape(1, -1) for name in names}


def _gradients(
    sums: Mapping[str, jax.Array], folded: Mapping[str, jax.Array]
) -> dict[str, jax.Array]:
    """What `_backward_on_device` sums, as a tree like `fold`'s."""
    found = {}
    for name, like in folded.items():
        if name + '^T' in sums:
            leaf = _transposed(sums[name + '^T'])
        elif name == 'bk':  # of patches: of all tokens less class tokens
            leaf = sums['bu'][0] - sums['cls'].sum((0, 1))
        else:
            leaf = sums[name]
        missing = [(0, a - b) for a, b in zip(like.shape, leaf.shape)] if like.ndim > 1 else None
        if name == 'cls':
            leaf = leaf[:, 0]
        elif missing is not None:
            leaf = jnp.pad(leaf, missing)
        found[name] = leaf.reshape(like.shape)
    return found


# Calls of the kernels.


def _grid(sizes: Sizes, frames: int) -> tuple[int, int]:
    """Parts, one for each core, and frames of each: whole clips."""
    cores = kernel_costs.CORES
    parts = cores if frames // sizes.clip % cores == 0 else 1
    return parts, frames // parts


class _Blocks(NamedTuple):
    """Block specs of arrays with one row for every frame; `each` frames a core."""

    each: int

    def frame(self, x: jax.Array | jax.ShapeDtypeStruct, lag: int = 0) -> pl.BlockSpec:
        """One frame of (frames, ...), `lag` steps late."""
        rest = (0,) * (x.ndim - 1)
        return pl.BlockSpec((1, *x.shape[1:]), lambda p, i, _: (self._number(p, i, lag), *rest))

    def tap(self, x: jax.Array, lag: int = 0) -> pl.BlockSpec:
        """One frame of the layer's own tap."""
        return pl.BlockSpec(
            (1, 1, *x.shape[2:]), lambda p, i, index: (index[0], self._number(p, i, lag), 0, 0)
        )

    def _number(self, part: jax.Array, step: jax.Array, lag: int) -> jax.Array:
        return part * self.each + jnp.clip(step - lag, 0, self.each - 1)


def _by_frame(x: jax.Array, sizes: Sizes) -> jax.Array:
    """(B, alpha t, N, S) -> (B*t, alpha, N, S)."""
    return x.reshape(-1, sizes.alpha, *x.shape[2:])


def _forward_on_device(
    x: jax.Array,
    r: jax.Array,
    taps: jax.Array,
    index: jax.Array,
    weights: dict[str, jax.Array],
    *,
    sizes: Sizes,
    last: bool,
    interpret: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    by_frame, flat = _by_frame(x, sizes), r.reshape(-1, *r.shape[2:])
    frames = flat.shape[0]
    parts, each = _grid(sizes, frames)
    blocks = _Blocks(each)
    lag = sizes.reach + 1
    out = flat if last else by_frame
    outputs = {'out': (out, 0), 'new': (flat, 1 + lag), 'm': (flat, 0)}
    inputs = {'x': by_frame, 'r': flat, 'tap': taps}
    in_specs = [blocks.frame(by_frame), blocks.frame(flat), blocks.tap(taps)]
    cost = kernels.cost_estimate(
        'integration',
        frames,
        _shape(sizes),
        transcendentals=sizes.tokens * (sizes.hidden + sizes.temporal_hidden),
        frame_bytes=_bytes(sizes, wide=4 if last else 3, narrow=1 if last else 2),
        weight_bytes=kernel_costs.CORES * sum(w.nbytes for w in weights.values()),
    )
    found = _call(
        functools.partial(_forward_kernel, sizes=sizes, last=last, each=each),
        'integration',
        index,
        inputs,
        weights,
        in_specs,
        {name: jax.ShapeDtypeStruct(y.shape, y.dtype) for name, (y, _) in outputs.items()},
        [blocks.frame(y, lag) for y, lag in outputs.values()],
        _forward_scratch(sizes),
        (parts, each + 1 + lag),
        cost,
        interpret,
    )
    like = r if last else x
    return found[0].reshape(like.shape), found[1].reshape(r.shape), found[2].reshape(r.shape)


def _forward_scratch(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    rows, wide = sizes.tokens, (sizes.tokens, sizes.channels)
    return {
        'shift': (sizes.alpha, rows, LANES),
        'shift_back': (rows, LANES),
        'u': wide,
        'f': (sizes.reach + 1, *wide),
        'g': (sizes.ring + 1, whole(rows, 2 * SUBLANES) // 2, LANES),
    }


def _shape(sizes: Sizes) -> dict[str, int]:
    """As `kernel_costs` takes it."""
    names = ('tokens', 'width', 'channels', 'hidden', 'alpha')
    return {name: getattr(sizes, name) for name in names}


def _bytes(sizes: Sizes, wide: int, narrow: int) -> int:
    """Read and written for a frame: a tap, and arrays like R and like X."""
    rows = whole(sizes.tokens, SUBLANES)
    x = sizes.alpha * whole(sizes.tokens - 1, SUBLANES) * LANES
    return 2 * (rows * sizes.width + wide * rows * sizes.channels + narrow * x)


def _call(
    kernel: Callable[[Refs], None],
    name: str,
    index: jax.Array,
    inputs: dict[str, jax.Array],
    weights: dict[str, jax.Array],
    in_specs: list[pl.BlockSpec],
    outputs: dict[str, jax.ShapeDtypeStruct],
    out_specs: list[pl.BlockSpec],
    scratch: dict[str, tuple[int, ...]],
    grid: tuple[int, int],
    cost: pl.CostEstimate,
    interpret: bool,
    in_place: tuple[str, str] | None = None,
) -> list[jax.Array]:
    """Calls a kernel with references by name, `NAME!` to what it writes.

    With `in_place`, an output takes the place of an input.

    Weights are copied by hand before the first step: blocks that stay where they are cost every
    step the question whether they do.
    """
    whole = pl.BlockSpec(memory_space=pl.ANY)
    names = (*inputs, *(f'{name}?' for name in weights), *(f'{name}!' for name in outputs))

    aliases = {}
    if in_place:
        source, target = in_place
        aliases = {1 + list(inputs).index(source): list(outputs).index(target)}

    def body(_, *refs) -> None:
        *refs, arrived = refs
        found = dict(zip((*names, *weights, *scratch), refs, strict=True))

        @pl.when(pl.program_id(1) == 0)
        def _() -> None:
            copies = [
                pltpu.make_async_copy(found[f'{name}?'], found[name], arrived) for name in weights
            ]
            for copy in copies:
                copy.start()
            for copy in copies:
                copy.wait()

        kernel(found)

    return pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=grid,
            in_specs=[*in_specs, *[whole] * len(weights)],
            out_specs=out_specs,
            scratch_shapes=[
                *(pltpu.VMEM(w.shape, w.dtype) for w in weights.values()),
                *(
                    pltpu.VMEM(shape, jnp.uint32 if name in WORDS else jnp.float32)
                    for name, shape in scratch.items()
                ),
                pltpu.SemaphoreType.DMA,
            ],
        ),
        out_shape=list(outputs.values()),
        input_output_aliases=aliases,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=('parallel', 'arbitrary'),
            vmem_limit_bytes=kernels.VMEM_BYTES,
            disable_bounds_checks=True,
        ),
        cost_estimate=cost,
        interpret=interpret,
        name=name,
    )(index, *inputs.values(), *weights.values())


# Inside of the kernels.


def _forward_kernel(refs: Refs, *, sizes: Sizes, last: bool, each: int) -> None:
    """One step: what a frame needs of itself alone, and the temporal FFN of one before it."""
    step = pl.program_id(1)
    lag = sizes.reach + 1

    @pl.when(step == 0)
    def _() -> None:
        refs['shift'][...] = jnp.zeros(refs['shift'].shape, jnp.float32)
        refs['g'][sizes.ring] = jnp.zeros(refs['g'].shape[1:], jnp.uint32)

    stages = {
        # Steps behind the last frame write its U and M again.
        'mixing': _forward_mixing(refs, jnp.minimum(step, each - 1), sizes, last),
        'within': _forward_within_frame(refs, step - 1, sizes),
        'time': _forward_along_time(refs, step - 1 - lag, sizes),
    }
    for name in FORWARD:
        next(stages[name])


def _forward_mixing(refs: Refs, frame: jax.Array, sizes: Sizes, last: bool) -> Iterator[None]:
    """M, U and X'."""
    m = product(refs['tap'][0, 0], _matrix(refs['w_in'][...])) + refs['b_in'][...]
    m = m + refs['r'][0].astype(jnp.float32)
    refs['m!'][0] = _narrow(m)
    yield
    shifted = [_shifted(refs['shift'].at[a], refs['x'][0, a], sizes) for a in range(sizes.alpha)]
    u = m + _exchanged(refs, shifted, frame, sizes)
    refs['u'][...] = u
    yield
    if last:
        refs['out!'][0] = _narrow(u)
    else:
        given = product(_narrow(m), _matrix(refs['w_it'][...])) + refs['b_it'][...]
        refs['shift_back'][...] = given
        change = refs['shift_back'][1:, : sizes.temporal]
        for a in range(sizes.alpha):
            refs['out!'][0, a] = _narrow(refs['x'][0, a].astype(jnp.float32) + change)
    yield


def _forward_within_frame(refs: Refs, frame: jax.Array, sizes: Sizes) -> Iterator[None]:
    """The feed-forward within a frame, and the first map of the one along time."""
    normed = _narrow(_standardised(refs['u'][...])[0])
    hidden = product(normed, _matrix(refs['w1'][...])) + refs['b1'][...]
    active = hidden + hidden * jnp.tanh(hidden)
    narrow = product(normed, _matrix(refs['wt1'][...])) + refs['bt1'][...]
    refs['g'][_modulo(frame, sizes.ring)] = _to_words(narrow)
    yield
    out = product(_narrow(active), _matrix(refs['w2'][...])) + refs['b2'][...]
    refs['f'][_modulo(frame, sizes.reach + 1)] = out
    yield


def _forward_along_time(refs: Refs, frame: jax.Array, sizes: Sizes) -> Iterator[None]:
    """The rest of the feed-forward along time, and R'."""
    convolved = _convolved(refs, frame, sizes)
    active = convolved + convolved * jnp.tanh(convolved)
    yield
    change = product(_narrow(active), _matrix(refs['wt2'][...]))
    before = refs['f'][_modulo(frame, sizes.reach + 1)]
    refs['new!'][0] = _narrow(before + change[: sizes.tokens])
    yield


def _to_words(x: jax.Array) -> jax.Array:
    """Rows, filled up with zeros, in bfloat16, two in a word: what `_matrix` reads."""
    missing = -x.shape[0] % (2 * SUBLANES)
    if missing:
        x = jnp.concatenate([x, jnp.zeros((missing, x.shape[1]), x.dtype)])
    return pltpu.bitcast(_narrow(x), jnp.uint32)


def _narrow(x: jax.Array) -> jax.Array:
    return x.astype(jnp.bfloat16)


def _shifted(ref, x: jax.Array, sizes: Sizes) -> jax.Array:
    """Patches (N, S) as rows of tokens, float32 (L, 128); zeros elsewhere are there already."""
    ref[1:, : sizes.temporal] = x.astype(jnp.float32)
    return _narrow(ref[...])


def _exchanged(refs: Refs, shifted: list[jax.Array], frame: jax.Array, sizes: Sizes) -> jax.Array:
    """What the temporal stream gives to the integration branch, (L, C)."""
    bias, cls = refs['bk'][...], refs['cls'][_modulo(frame, sizes.clip)]
    given = bias
    for a, x in enumerate(shifted):
        given = given + product(x, _matrix(refs['k'][a]))
    first = given[:SUBLANES]  # the class row is in it, to which patches give nothing
    row = jax.lax.broadcasted_iota(jnp.int32, first.shape, 0)
    return jnp.concatenate([jnp.where(row == 0, cls, first), given[SUBLANES:]])


def _standardised(u: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rows of mean 0 and variance 1, and by what they were multiplied, (L, 1)."""
    centred = u - u.mean(-1, keepdims=True)
    variance = jnp.square(centred).mean(-1, keepdims=True) + LAYER_NORM_EPS
    factor = jnp.exp2(jnp.log(variance) * (-0.5 / math.log(2)))  # `rsqrt` takes longer
    return centred * factor, factor


def _neighbours(ring, frame: jax.Array, offset: int, sizes: Sizes) -> jax.Array:
    """What a ring holds of the frame `offset` from this one, zeros outside of its clip."""
    place = _modulo(frame, sizes.clip) + offset
    slot = _modulo(frame + offset, sizes.ring)
    return _matrix(ring[jnp.where((place >= 0) & (place < sizes.clip), slot, sizes.ring)])


def _modulo(x: jax.Array, of: int) -> jax.Array:
    """`x` modulo `of`, also of an `x` a little below nothing; divisions are slow."""
    return x & (of - 1) if of & (of - 1) == 0 else jax.lax.rem(x + SUBLANES * of, of)


def _convolved(refs: Refs, frame: jax.Array, sizes: Sizes) -> jax.Array:
    """The convolution along time for a frame, (L, 128)."""
    out = refs['bc'][...]
    for tap in range(sizes.taps):
        rows = _neighbours(refs['g'], frame, tap - sizes.reach, sizes)
        out = out + product(rows, _matrix(refs['wc'][tap]))
    return out


def _backward_on_device(
    x: jax.Array,
    m: jax.Array,
    of_out: jax.Array,
    of_new: jax.Array,
    taps: jax.Array,
    index: jax.Array,
    weights: dict[str, jax.Array],
    *,
    sizes: Sizes,
    last: bool,
    interpret: bool,
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    by_frame, flat = _by_frame(x, sizes), m.reshape(-1, *m.shape[2:])
    of_out = of_out.reshape(flat.shape if last else by_frame.shape)
    of_new = of_new.reshape(flat.shape)
    frames = flat.shape[0]
    parts, each = _grid(sizes, frames)
    blocks = _Blocks(each)
    lags = Lags.of(sizes)
    inputs = {
        'x': (by_frame, 0),
        'm': (flat, 0),
        'new': (of_new, 0),
        'out': (of_out, lags.mixing),
        **({} if last else {'later m': (flat, lags.mixing)}),
    }
    in_specs = [blocks.frame(y, lag) for y, lag in inputs.values()]
    sums = _sums(sizes, last)
    outputs = {'dr': flat, 'dx': by_frame}
    shapes = {name: jax.ShapeDtypeStruct(y.shape, y.dtype) for name, y in outputs.items()}
    shapes |= {
        name: jax.ShapeDtypeStruct((parts, *shape), jnp.float32)
        for name, (shape, _) in sums.items()
    }
    scratch = _backward_scratch(sizes) | {f'{name}+': shape for name, (shape, _) in sums.items()}
    cost = kernels.cost_estimate(
        'integration_gradient',
        frames,
        _shape(sizes),
        transcendentals=sizes.tokens * (sizes.hidden + sizes.temporal_hidden),
        frame_bytes=_bytes(sizes, wide=4, narrow=2 if last else 3),
        weight_bytes=kernel_costs.CORES * sum(w.nbytes for w in weights.values()),
    )
    found = _call(
        functools.partial(_backward_kernel, sizes=sizes, last=last, sums=sums, each=each),
        'integration_gradient',
        index,
        {name: y for name, (y, _) in inputs.items()} | {'tap': taps},
        weights,
        [*in_specs, blocks.tap(taps, lags.sums)],
        shapes,
        [blocks.frame(y, lags.mixing) for y in outputs.values()]
        + [pl.BlockSpec(memory_space=pl.ANY)] * len(sums),
        scratch,
        (parts, each + lags.sums),
        cost,
        interpret,
        # A frame is read before it is written; in a loop, one would be copied to the other.
        in_place=('new', 'dr'),
    )
    dr, dx, *found = found
    return dx.reshape(x.shape), dr.reshape(m.shape), dict(zip(sums, found, strict=True))


def _backward_scratch(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    narrow = (sizes.tokens, LANES)
    half = whole(sizes.tokens, 2 * SUBLANES) // 2
    words, few = (half, sizes.channels), (half, LANES)
    lags = Lags.of(sizes)
    kept = _power_of_two(lags.mixing + 2)
    return {
        'shift': (sizes.alpha, *narrow),
        'shift_out': narrow,
        'shift_back': (sizes.alpha, *narrow),
        'shifted': (kept, sizes.alpha, *few),
        'z': (kept, *words),
        'factor': (kept, sizes.tokens, 1),
        'dz': (kept, *words),
        'g': (sizes.ring + 1, *few),
        'upstream': (_power_of_two(lags.time + 1), *words),
        'da': (_power_of_two(lags.time + 1), *few),
        'dg': (sizes.ring + 1, *few),
        'dm': words,
    }


def _sums(sizes: Sizes, last: bool) -> dict[str, tuple[tuple[int, ...], int]]:
    """What the backward kernel sums over frames: its shape, and how late it begins to."""
    c, h, s, k = sizes.channels, sizes.hidden, sizes.temporal, sizes.taps
    narrow, lags = sizes.temporal_hidden, Lags.of(sizes)
    sums = {
        'w1': ((c, h), 0),
        'b1': ((1, h), 0),
        'w2': ((h, c), 0),
        'b2': ((1, c), 0),
        'wc^T': ((k, narrow, LANES), lags.time),
        'bc': ((1, LANES), lags.time),
        'wt2': ((narrow, c), lags.time),
        'wt1^T': ((narrow, c), lags.mixing),
        'bt1': ((1, LANES), lags.mixing),
        'k': ((sizes.alpha, s, c), lags.mixing),
        'bu': ((1, c), lags.mixing),
        'cls': ((sizes.clip, 1, c), lags.mixing),
        'w_in^T': ((c, sizes.width), lags.sums),
        'b_in': ((1, c), lags.mixing),
    }
    if not last:
        sums |= {'w_it^T': ((s, c), lags.mixing), 'b_it': ((1, LANES), lags.mixing)}
    return sums


def _backward_kernel(
    refs: Refs,
    *,
    sizes: Sizes,
    last: bool,
    sums: Mapping[str, tuple[tuple[int, ...], int]],
    each: int,
) -> None:
    """One step: parts of several frames, each of which waits for neighbours of the part before.

    The compiler overlaps what is near: the sums for weights, which nothing waits for, come between
    what keeps the vector unit busy.
    """
    part, step = pl.program_id(0), pl.program_id(1)
    lags = Lags.of(sizes)
    starts = sorted({start for _, start in sums.values()})

    # What came before the first frame is thrown away, and what comes after the last not read. A
    # branch costs every step, so there is one around all that is rare.
    @pl.when(step <= starts[-1])
    def _() -> None:
        for start in starts:

            @pl.when(step == start)
            def _(start: int = start) -> None:
                for name, (shape, begins) in sums.items():
                    if begins == start:
                        refs[f'{name}+'][...] = jnp.zeros(shape, jnp.float32)

        @pl.when(step == 0)
        def _() -> None:
            for name in ('shift', 'shift_out'):
                refs[name][...] = jnp.zeros(refs[name].shape, jnp.float32)
            for name in ('g', 'dg'):
                refs[name][sizes.ring] = jnp.zeros(refs[name].shape[1:], jnp.uint32)

    # The last step but one writes the last frame, and the last the same again.
    left = jnp.minimum(step - lags.mixing, each - 1)
    stages = {
        'first map': _sums_of_first_map(refs, sizes),
        'norms': _normed_again(refs, step, sizes),
        'within': _backward_within_frame(refs, step),
        'time': _backward_along_time(refs, step - lags.time, sizes),
        'mixing': _backward_mixing(refs, left, sizes, last),
    }
    for name in BACKWARD:
        next(stages[name])

    @pl.when(step >= each - 1)
    def _() -> None:
        for start in starts:

            @pl.when(step == each - 1 + start)
            def _(start: int = start) -> None:
                for name, (_, begins) in sums.items():
                    if begins == start:
                        pltpu.sync_copy(refs[f'{name}+'], refs[f'{name}!'].at[part])


def _sums_of_first_map(refs: Refs, sizes: Sizes) -> Iterator[None]:
    """The gradient by the first weights, of the frame that the step before has left."""
    size = whole(math.ceil(sizes.width / 3), LANES)
    for start in range(0, 3 * size, size):
        if start < sizes.width:
            lanes = slice(start, min(start + size, sizes.width))
            dm = _matrix(refs['dm'][...])[: sizes.tokens]
            refs['w_in^T+'][:, lanes] += product(dm, refs['tap'][0, 0, :, lanes], (0, 0))
        yield


def _slot(ring, frame: jax.Array) -> jax.Array:
    """Where a ring holds a frame."""
    return _modulo(frame, ring.shape[0])


def _normed_again(refs: Refs, frame: jax.Array, sizes: Sizes) -> Iterator[None]:
    """The norm of U, and what its rows were multiplied by."""
    shifted = [_shifted(refs['shift'].at[a], refs['x'][0, a], sizes) for a in range(sizes.alpha)]
    u = refs['m'][0].astype(jnp.float32) + _exchanged(refs, shifted, frame, sizes)
    z, factor = _standardised(u)
    for a, rows in enumerate(shifted):
        refs['shifted'][_slot(refs['shifted'], frame), a] = _to_words(rows)
    slot = _slot(refs['z'], frame)
    refs['z'][slot] = _to_words(z)
    refs['factor'][slot] = factor
    yield


def _backward_within_frame(refs: Refs, frame: jax.Array) -> Iterator[None]:
    """The gradient of the feed-forward within a frame, and what that along time begins with."""
    wide = refs['new'][0].astype(jnp.float32)
    words = _to_words(wide)
    refs['upstream'][_slot(refs['upstream'], frame)] = words
    upstream = _matrix(words)
    refs['b2+'][...] += wide.sum(0, keepdims=True)
    dactive = product(upstream, _matrix(refs['w2^T'][...]))
    da = product(upstream, _matrix(refs['wt2^T'][...]))
    refs['da'][_slot(refs['da'], frame)] = _to_words(da)
    yield
    normed = _matrix(refs['z'][_slot(refs['z'], frame)])
    hidden = product(normed, _matrix(refs['w1'][...])) + refs['b1'][...]
    narrow = product(normed, _matrix(refs['wt1'][...])) + refs['bt1'][...]
    refs['g'][_modulo(frame, refs['g'].shape[0] - 1)] = _to_words(narrow)
    active, slope = _activated(hidden)
    dhidden = dactive * slope
    refs['b1+'][...] += dhidden.sum(0, keepdims=True)
    dhidden = _narrow(dhidden)
    yield
    refs['w2+'][...] += product(_narrow(active), upstream, (0, 0))
    yield
    dz = product(dhidden, _matrix(refs['w1^T'][...]))
    refs['dz'][_slot(refs['dz'], frame)] = _to_words(dz)
    yield
    refs['w1+'][...] += product(normed, dhidden, (0, 0))
    yield


def _activated(v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """v + v tanh(v), and its derivative."""
    bend = jnp.tanh(v)
    part = v * bend
    return v + part, (1 + bend) * (1 + v - part)


def _backward_along_time(refs: Refs, frame: jax.Array, sizes: Sizes) -> Iterator[None]:
    """The gradient of the convolution along time by its result, and by its weights."""
    own = slice(sizes.temporal_hidden)
    active, slope = _activated(_convolved(refs, frame, sizes))
    gradient = _matrix(refs['da'][_slot(refs['da'], frame)]).astype(jnp.float32) * slope
    narrow = _narrow(gradient)
    refs['bc+'][...] += gradient.sum(0, keepdims=True)
    refs['dg'][_modulo(frame, sizes.ring)] = pltpu.bitcast(narrow, jnp.uint32)
    yield
    upstream = _matrix(refs['upstream'][_slot(refs['upstream'], frame)])
    refs['wt2+'][...] += product(_narrow(active)[:, own], upstream, (0, 0))
    for tap in range(sizes.taps):
        rows = _neighbours(refs['g'], frame, tap - sizes.reach, sizes)
        refs['wc^T+'][tap] += product(narrow[:, own], rows, (0, 0))
    yield


def _backward_mixing(refs: Refs, frame: jax.Array, sizes: Sizes, last: bool) -> Iterator[None]:
    """Through both norms to the gradients by X and R; for the next step, that by M."""
    s, own, tokens = sizes.temporal, slice(sizes.temporal_hidden), slice(sizes.tokens)
    given = 0.0
    if not last:
        upstream = sum(refs['out'][0, a].astype(jnp.float32) for a in range(sizes.alpha))
        shifted = _shifted(refs['shift_out'], upstream, sizes)
        given = product(shifted, _matrix(refs['w_it^T'][...]))
        refs['w_it^T+'][...] += product(shifted[:, :s], refs['later m'][0], (0, 0))
        refs['b_it+'][...] += refs['shift_out'][...].sum(0, keepdims=True)
    yield
    dg = jnp.zeros((1, LANES), jnp.float32)
    for tap in range(sizes.taps):
        rows = _neighbours(refs['dg'], frame, sizes.reach - tap, sizes)
        dg = dg + product(rows, _matrix(refs['wc^T'][tap]))
    refs['bt1+'][...] += dg.sum(0, keepdims=True)
    dg = _narrow(dg)
    yield
    normed = _matrix(refs['z'][_slot(refs['z'], frame)])
    dz = _matrix(refs['dz'][_slot(refs['dz'], frame)]).astype(jnp.float32)[tokens]
    dz = dz + product(dg, _matrix(refs['wt1^T'][...]))[tokens]
    refs['wt1^T+'][...] += product(dg[:, own], normed, (0, 0))
    z = normed.astype(jnp.float32)[tokens]
    factor = refs['factor'][_slot(refs['factor'], frame)]
    du = factor * (dz - z * (dz * z).mean(-1, keepdims=True))
    if last:
        du = du + refs['out'][0].astype(jnp.float32)
    yield
    narrow, slot = _narrow(du), _slot(refs['shifted'], frame)
    refs['bu+'][...] += du.sum(0, keepdims=True)
    refs['cls+'][_modulo(frame, sizes.clip)] += du[:1]
    for a in range(sizes.alpha):
        refs['shift_back'][a] = product(narrow, _matrix(refs['k^T'][a]))
        dx = refs['shift_back'][a, 1:, :s]
        if not last:
            dx = dx + refs['out'][0, a].astype(jnp.float32)
        refs['dx!'][0, a] = _narrow(dx)
        rows = _matrix(refs['shifted'][slot, a])[tokens, :s]
        refs['k+'][a] += product(rows, narrow, (0, 0))
    dm = du + given
    refs['dr!'][0] = _narrow(dm)
    refs['b_in+'][...] += dm.sum(0, keepdims=True)
    yield
    refs['dm'][...] = _to_words(dm)
    yield
