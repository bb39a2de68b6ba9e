"""Pieces that several models share: norms, activations, attention, tables of weights.

Functions serve the frozen backbones (plain trees); the Flax modules serve the trainable networks.
Both compute normalisation and softmax in float32 whatever the activation dtype is.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint

LAYER_NORM_EPS = 1e-5  # CLIP's value; Flax's own default is 1e-6.

Dtype = Any
Initializer = Callable[..., jax.Array]

# `trunc_normal_` of the releases cuts at -2 and 2, a hundred standard deviations: nothing is cut.
trunc_normal = nn.initializers.normal(0.02)


def uniform(fan_in: int) -> Initializer:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)) for any shape: the default of the releases."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -(fan_in**-0.5), fan_in**-0.5)

    return init


@dataclasses.dataclass(frozen=True)
class Pixels:
    """How a model wants its pixels: RGB in [0, 1], minus the mean, over the standard deviation."""

    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    @jax.named_scope('normalize')
    def normalize(self, video: jax.Array, dtype: Any = jnp.float32) -> jax.Array:
        """RGB (..., H, W, 3), 0 to 255, uint8 or float -> standardised pixels in `dtype`.

        Or rows of pixels (..., H, 3 W), see `as_rows`.
        """
        std = np.asarray(self.std, np.float32)
        scale = 1.0 / (255.0 * std)
        shift = np.asarray(self.mean, np.float32) / std
        scale, shift = (np.tile(level, video.shape[-1] // 3) for level in (scale, shift))
        return (video.astype(jnp.float32) * scale - shift).astype(dtype)


def exact_float32(function: Callable[..., Any]) -> Callable[..., Any]:
    """Makes products of float32 arrays exact, where accelerators round them otherwise.

    TPUs round the factors to bfloat16, GPUs to TF32. A cosine times 100, for one, is a logit that a
    product rounded to bfloat16 moves by 0.4. Products that say their precision, as `einsum` does of
    narrower arrays, keep it.
    """

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        with jax.default_matmul_precision('highest'):
            return function(*args)

    return run


def einsum(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """`jnp.einsum` that is exact, under `exact_float32`, where its arrays are float32 only."""
    return jnp.einsum(subscripts, a, b, precision=precision_of(a, b))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def einsum_to_float32(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """`einsum` whose result is not rounded to the dtype of `a` and `b`, but its gradient is.

    Products of float64 stay float64. What comes back is a factor of two products; in float32 both
    would have to be of float32 arrays.
    """
    wide = jnp.promote_types(jnp.result_type(a, b), jnp.float32)
    return jnp.einsum(subscripts, a, b, precision=precision_of(a, b), preferred_element_type=wide)


def _einsum_forward(subscripts: str, a: jax.Array, b: jax.Array) -> tuple[jax.Array, tuple]:
    return einsum_to_float32(subscripts, a, b), (a, b)


def _einsum_backward(subscripts: str, factors: tuple, upstream: jax.Array) -> tuple:
    rounded = upstream.astype(jnp.result_type(*factors))
    return jax.vjp(functools.partial(einsum, subscripts), *factors)[1](rounded)


einsum_to_float32.defvjp(_einsum_forward, _einsum_backward)


def widened(x: jax.Array) -> jax.Array:
    """`x` as float32; of float64, in which a network may be checked, it stays."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def precision_of(*operands: jax.Array) -> jax.lax.Precision | None:
    """For a product of these: what is asked for around it, or, of narrower arrays, the quick one.

    Nothing is lost in a product of bfloat16 arrays on a matrix unit, but a GPU takes a request for
    more at its word.
    """
    return None if jnp.result_type(*operands) == jnp.float32 else jax.lax.Precision.DEFAULT


def quick_gelu(x: jax.Array) -> jax.Array:
    """x * sigmoid(1.702 x), the activation of the OpenAI CLIP weights."""
    return x * jax.nn.sigmoid(1.702 * x)


# Phi(x) is about (1 + tanh(x P(x^2))) / 2; P fitted so that x Phi(x) is off by at most 2.6e-5.
_GELU = (0.797507884, 0.0370056461, -0.000351516806)
_GELU_END = 6.0  # beyond, P would fall; Phi is 0 or 1 there


def gelu(x: jax.Array) -> jax.Array:
    """x Phi(x), the Gaussian error linear unit (arXiv:1606.08415) in its exact form.

    Differs: of arrays narrower than float32 by a fit whose error, 2.6e-5, is lost in their
    rounding; the error function costs an accelerator more than the products around it.
    """
    return jax.nn.gelu(x, approximate=False) if x.dtype.itemsize >= 4 else fitted_gelu(x)


@jax.custom_jvp
def fitted_gelu(x: jax.Array) -> jax.Array:
    """What `gelu` is of arrays narrower than float32; of any."""
    x32, _, bend = _bent(x)
    half = 0.5 * x32
    return (half + half * bend).astype(x.dtype)


@fitted_gelu.defjvp
def _fitted_gelu_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple:
    (x,), (tangent,) = primals, tangents
    x32, square, bend = _bent(x)
    slope = _GELU[0] + square * (3 * _GELU[1] + square * (5 * _GELU[2]))
    derivative = 0.5 + 0.5 * (bend + x32 * (1 - bend * bend) * slope)
    return fitted_gelu(x), (derivative * tangent).astype(x.dtype)


def _bent(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`x` and its square, not beyond the end of the fit, and 2 Phi(x) - 1; float32."""
    x32 = x.astype(jnp.float32)
    square = jnp.minimum(x32 * x32, _GELU_END**2)
    bend = jnp.tanh(x32 * (_GELU[0] + square * (_GELU[1] + square * _GELU[2])))
    return x32, square, bend


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    'quick_gelu': quick_gelu,
    'gelu': gelu,
}


def layer_norm(
    x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float = LAYER_NORM_EPS
) -> jax.Array:
    """LayerNorm over the last axis with float32 statistics; the result has the dtype of `x`."""
    return (standardise(x, eps) * scale + bias).astype(x.dtype)


def standardise(x: jax.Array, eps: float = LAYER_NORM_EPS, *, quick: bool = False) -> jax.Array:
    """`layer_norm` without its affine map: float32, of mean 0 and variance 1 over the last axis.

    Args:
      x: (..., C).
      eps: added to the variance.
      quick: both moments in one pass. The variance then loses what is lost already where `x` has
        been rounded to bfloat16; wider arrays are read twice all the same.
    """
    x32 = x.astype(jnp.float32)
    mean = x32.mean(-1, keepdims=True)
    centred = x32 - mean
    if quick and x.dtype.itemsize < 4:
        variance = jnp.maximum(jnp.square(x32).mean(-1, keepdims=True) - jnp.square(mean), 0)
    else:
        variance = jnp.square(centred).mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt(variance + eps)


def attend(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None = None
) -> jax.Array:
    """Scaled dot-product attention with a float32 softmax.

    Args:
      query: (N, Q, h, d).
      key: (N, L, h, d).
      value: (N, L, h, d).
      mask: broadcastable to (N, h, Q, L), True where attention is allowed; None for everywhere.

    Returns:
      (N, Q, h, d) in the dtype of `value`.
    """
    return weighted_values(attention_weights(query, key, mask), value)


def attention_weights(query: jax.Array, key: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """The float32 softmax of `attend`: (N, h, Q, L), of sum 1 over L. Arguments as there."""
    logits = einsum_to_float32('nqhd,nlhd->nhql', query * query.shape[-1] ** -0.5, key)
    if mask is not None:
        logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
    return jax.nn.softmax(logits, axis=-1)


def weighted_values(weights: jax.Array, value: jax.Array) -> jax.Array:
    """The product of `attend`: weights (N, h, Q, L), value (N, L, h, d) -> (N, Q, h, d)."""
    return einsum('nhql,nlhd->nqhd', weights.astype(value.dtype), value)


def as_rows(clips: Any) -> Any:
    """Clips (B, T, H, W, 3), jax or numpy -> the same bytes as (B, T, H, 3 W); rows stay so.

    Clips are on devices like this: of three channels, TPUs fill three lanes of 128.
    """
    return clips.reshape(*clips.shape[:3], -1)


def as_pixels(clips: jax.Array) -> jax.Array:
    """Clips in either form, see `as_rows`, -> (B, T, H, W, 3)."""
    return clips.reshape(*clips.shape[:3], -1, 3)


def patchify(pixels: jax.Array, patch_size: int) -> jax.Array:
    """(..., H, W, 3) -> (..., H/p * W/p, p * p * 3): patches row-major, their pixels too.

    A stride-p convolution is a matrix product over these.
    """
    return _cut_rows(pixels.reshape(*pixels.shape[:-2], -1), patch_size)


def clip_patches(clips: jax.Array, patch_size: int) -> jax.Array:
    """`patchify` of clips in either form, see `as_rows`: (B, T, H/p * W/p, p * p * 3)."""
    return _cut_rows(as_rows(clips), patch_size)


@jax.named_scope('patch_embedding')
def _cut_rows(rows: jax.Array, patch_size: int) -> jax.Array:
    *lead, height, width = rows.shape
    p, of_patch = patch_size, 3 * patch_size
    grid = (height // p, width // of_patch)
    # A row of a patch is one axis: three channels apart would fill a register each on TPU.
    bands = rows.reshape(-1, grid[0], p, grid[1], of_patch)
    patches = bands.transpose(0, 1, 3, 2, 4)
    return patches.reshape(*lead, grid[0] * grid[1], p * of_patch)


# The platform that is traced for alone; '' for all, None where nothing has to be portable.
_PORTABLE: contextvars.ContextVar[str | None] = contextvars.ContextVar('portable', default=None)


@contextlib.contextmanager
def portable(platform: str = '') -> Iterator[None]:
    """What is traced inside has no kernel of ours, and says of no array how it is stored.

    So the program is made of operations that StableHLO keeps readable for years, and takes axes
    whose sizes are not known.

    Args:
      platform: 'cpu', for instance: `by_platform` leaves no choice; '' leaves it to who compiles.
    """
    token = _PORTABLE.set(platform)
    try:
        yield
    finally:
        _PORTABLE.reset(token)


def is_portable() -> bool:
    """Whether this is traced inside `portable`."""
    return _PORTABLE.get() is not None


def is_settled() -> bool:
    """Whether `by_platform` has no choice here."""
    return bool(_PORTABLE.get())


def by_platform(*inputs: Any, default: Callable[..., Any], **forms: Callable[..., Any]) -> Any:
    """`jax.lax.platform_dependent` that `portable` can settle."""
    if platform := _PORTABLE.get():
        return forms.get(platform, default)(*inputs)
    return jax.lax.platform_dependent(*inputs, default=default, **forms)


def row_major(x: jax.Array) -> jax.Array:
    """`x`, stored in the order of its axes, its gradient too.

    Left alone, the TPU compiler may store another axis last but one, where that fills registers
    better, and then has to transpose before and behind every kernel of ours.
    """
    if is_portable():
        return x
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


def l2_normalize(x: jax.Array) -> jax.Array:
    """Rows of unit length, in float32."""
    x = x.astype(jnp.float32)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def resize_positions(table: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Resizes a learned position table to another patch grid; the class row is untouched.

    Bicubic with a = -0.75, half-pixel centres, clamped borders and no antialiasing, which is what
    the published CLIP code base does when it interpolates its tables.

    Args:
      table: (1 + g*g, W) float, class row first, patches row-major over a square grid.
      grid: (rows, columns) of the new grid.

    Returns:
      (1 + rows*columns, W) float32.

    Raises:
      ValueError: the table is not a class row plus a square grid.
    """
    table = np.asarray(table, np.float32)
    side = round((table.shape[0] - 1) ** 0.5)
    if side * side + 1 != table.shape[0]:
        raise ValueError(
            f'position table has {table.shape[0]} rows, which is not 1 + a square; '
            'only square grids with a class token can be resized'
        )
    if (side, side) == tuple(grid):
        return table
    patches = table[1:].reshape(side, side, -1)
    rows, columns = (_cubic_matrix(side, size) for size in grid)
    resized = np.einsum('ri,cj,ijw->rcw', rows, columns, patches)
    return np.concatenate([table[:1], resized.reshape(-1, table.shape[1])]).astype(np.float32)


def _cubic_matrix(source: int, target: int, a: float = -0.75) -> np.ndarray:
    """(target, source) interpolation weights of the Keys cubic kernel."""
    centres = (np.arange(target) + 0.5) * source / target - 0.5
    matrix = np.zeros((target, source))
    for row, centre in enumerate(centres):
        first = int(np.floor(centre)) - 1
        for tap in range(first, first + 4):
            d = abs(centre - tap)
            near = ((a + 2) * d - (a + 3)) * d * d + 1
            far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
            matrix[row, min(max(tap, 0), source - 1)] += near if d <= 1 else far
    return matrix


class LayerNorm(nn.Module):
    """Flax face of `layer_norm`; parameters `scale` and `bias` of shape (channels,)."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return layer_norm(x, **self.parameters(x.shape[-1]))

    @nn.compact
    def parameters(self, channels: int) -> dict[str, jax.Array]:
        """The parameters alone, for callers that do not apply the norm as it stands."""
        return {
            'scale': self.param('scale', nn.initializers.ones, (channels,)),
            'bias': self.param('bias', nn.initializers.zeros, (channels,)),
        }


class Linear(nn.Module):
    """Affine map of the last axis: parameters `kernel` (in, out) and `bias` (out,) if asked for."""

    features: int
    use_bias: bool = True
    kernel_init: Initializer = trunc_normal
    bias_init: Initializer = nn.initializers.zeros
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param('kernel', self.kernel_init, (x.shape[-1], self.features))
        x = einsum('...i,io->...o', x.astype(self.dtype), kernel.astype(self.dtype))
        if self.use_bias:
            bias = self.param('bias', self.bias_init, (self.features,))
            x = x + bias.astype(self.dtype)
        return x


class Affine(nn.Module):
    """The parameters of a linear map, for callers that do not apply it as it stands.

    `kernel` (*inputs, *outputs) and `bias` (*outputs,).
    """

    outputs: tuple[int, ...]
    kernel_init: Initializer
    bias_init: Initializer = nn.initializers.zeros

    @nn.compact
    def __call__(self, inputs: tuple[int, ...]) -> dict[str, jax.Array]:
        shape = (*inputs, *self.outputs)
        return {
            'kernel': self.param('kernel', self.kernel_init, shape),
            'bias': self.param('bias', self.bias_init, self.outputs),
        }


class Mlp(nn.Module):
    """Two linear maps with QuickGELU between: parameters `c_fc` and `c_proj`."""

    hidden_dim: int
    dtype: Dtype
    kernel_init: Initializer

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        options = {'kernel_init': self.kernel_init, 'dtype': self.dtype}
        hidden = Linear(self.hidden_dim, **options, name='c_fc')(x)
        return Linear(x.shape[-1], **options, name='c_proj')(quick_gelu(hidden))


def read_memory(query: jax.Array, memory: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What queries (N, h, C) find in a memory (N, M, C): a mixture of it, and the weights of that.

    Returns:
      (N, h, C) in the dtype of `memory`, and float32 (N, h, M).
    """
    logits = einsum_to_float32('nhc,nmc->nhm', query, memory)
    weights = jax.nn.softmax(logits, axis=-1)
    return einsum('nhm,nmc->nhc', weights.astype(memory.dtype), memory), weights


def query_attention(
    query: jax.Array,
    memory: Any,
    key_kernel: jax.Array,
    value_kernel: jax.Array,
    value_bias: jax.Array,
    read: Callable[[jax.Array, Any], tuple[jax.Array, Any]] = read_memory,
) -> tuple[jax.Array, Any]:
    """Attention of one query over a memory, without projecting the memory.

    The key projection is applied to the query and the value projection to the mixture: the same
    result for a fraction of the products. The key bias adds the same to every logit, which softmax
    does not see.

    Args:
      query: (N, h, d), projected, not scaled.
      memory: (N, M, C), or what `read` takes in its place.
      key_kernel: (C, h, d).
      value_kernel: (C, h, d).
      value_bias: (h, d).
      read: as `read_memory`.

    Returns:
      (N, h, d) in the dtype of `memory`, and the weights, float32 (N, h, M), or what `read` gives
      for them.
    """
    query = einsum('nhd,chd->nhc', query * query.shape[-1] ** -0.5, key_kernel)
    mixed, weights = read(query, memory)
    return einsum('nhc,chd->nhd', mixed, value_kernel) + value_bias, weights


class QueryAttention(nn.Module):
    """Attention of one query, (N, C), over a memory of equal width, (N, M, C) -> (N, C).

    The three input projections are one parameter, `qkv/kernel` (C, 3, h, d), as in the packed
    layout of the checkpoints it is filled from; `out` follows. Sows `weights`, float32 (N, h, M),
    into 'intermediates': nothing is kept for it unless a caller makes that mutable.
    """

    num_heads: int
    dtype: Dtype
    out_init: Initializer

    @nn.compact
    def __call__(self, query: jax.Array, memory: jax.Array) -> jax.Array:
        width = query.shape[-1]
        init = nn.initializers.variance_scaling(
            1.0, 'fan_avg', 'uniform', in_axis=0, out_axis=(1, 2, 3)
        )
        shape = (3, self.num_heads, width // self.num_heads)
        qkv = Affine(shape, init, name='qkv')((width,))
        kernel, bias = (qkv[name].astype(self.dtype) for name in ('kernel', 'bias'))
        q = einsum('nc,chd->nhd', query.astype(self.dtype), kernel[:, 0]) + bias[0]
        out, weights = query_attention(
            q, memory.astype(self.dtype), kernel[:, 1], kernel[:, 2], bias[2]
        )
        self.sow('intermediates', 'weights', weights)
        return _MergeHeads(width, self.dtype, self.out_init, name='out')(out)


class _MergeHeads(nn.Module):
    features: int
    dtype: Dtype
    kernel_init: Initializer

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param('kernel', self.kernel_init, (*x.shape[-2:], self.features))
        bias = self.param('bias', nn.initializers.zeros, (self.features,))
        merged = einsum('...hd,hdc->...c', x.astype(self.dtype), kernel.astype(self.dtype))
        return merged + bias.astype(self.dtype)


class LinearHead(nn.Module):
    """Classifier on a clip embedding (B, E) -> logits (B, num_classes), at least float32."""

    num_classes: int
    kernel_init: Initializer = trunc_normal
    bias_init: Initializer = nn.initializers.zeros

    @nn.compact
    def __call__(self, embedding: jax.Array) -> jax.Array:
        embedding = widened(embedding)
        classifier = Linear(
            self.num_classes,
            kernel_init=self.kernel_init,
            bias_init=self.bias_init,
            dtype=embedding.dtype,
            name='classifier',
        )
        return classifier(embedding)
