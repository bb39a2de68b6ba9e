"""DiST: a frozen CLIP sees few frames, a light temporal encoder all, a third branch joins them.

Source: Qing et al., "Disentangling Spatial and Temporal Learning for Efficient Image-to-Video
Transfer Learning", ICCV 2023 (arXiv:2309.07911), section 3; released code of the authors.

    X = stem(video)                                        (B, T, g*g, S)    temporal encoder
    R = 0                                                  (B, t, 1 + g*g, C) integration branch
    for every selected block, F its frozen output (B, t, 1 + g*g, W):
        X = quick_gelu(X + conv_space(quick_gelu(conv_time(LN X))))
        M = F W_in + b + R
        U = M + [class rows | conv_alpha(X)]               temporal -> integration
        X = X + repeat_alpha(M[patches] W_it + b)          integration -> temporal
        R = FFN(LN U) + TFFN(LN U)
    video embedding = LN(adaptive pooling of R + U, plus the mean frozen class token) P

Differs: patch embeddings are matrix products over patches; layers are stacked on axis 0 for scan,
the last one apart, because its integration-to-temporal map feeds nothing.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dist_jax.models import heads, integration_kernel, kernels, temporal_kernel
from dist_jax.models.api import Model, ParamGroup, Tree
from dist_jax.models.backbone import Backbone, Taps
from dist_jax.models.frozen import Frozen
from dist_jax.models.layers import (
    Affine,
    Dtype,
    Initializer,
    LayerNorm,
    Linear,
    Mlp,
    QueryAttention,
    by_platform,
    einsum,
    einsum_to_float32,
    layer_norm,
    precision_of,
    quick_gelu,
)
from dist_jax.models.stack import scan_trainable
from dist_jax.models.time_conv import Stem, TimeConv, conv_time
from dist_jax.sharding import ShardingRule, split_batch

ADA_POOLING_HEAD_DIM = 64
ADA_POOLING_MLP_RATIO = 4


def build(
    backbone: Backbone,
    *,
    num_classes: tuple[int, ...],
    num_frames: int,
    head: str = 'text',
    dtype: Any = jnp.bfloat16,
    alpha: int = 2,
    selected_layers: tuple[int, ...] = (),
    integration_dim: int = 384,
    temporal_dim: int = 96,
    temporal_patch: int = 5,
    temporal_kernel: int = 3,
    temporal_conv_mlp_ratio: float = 1.0,
    integration_mlp_ratio: float = 1.0,
    integration_temporal_mlp_ratio: float = 0.25,
    ada_pooling_layers: int = 4,
    spatial_branch: bool = True,
    temporal_branch: bool = True,
    integration_branch: bool = True,
    init_std: float = 0.02,
    remat: bool = False,
    unroll: bool = False,
) -> Model:
    """DiST on a frozen backbone.

    Args:
      backbone: the frozen one.
      num_classes: classes of each head.
      num_frames: T, frames of a clip; the backbone sees every alpha-th.
      head: 'text' (cosine with class names) or 'linear'.
      dtype: compute dtype of both networks; norms, softmax, pooled output and loss are float32.
      alpha: sparsity of the frames that the backbone sees.
      selected_layers: blocks of the backbone that are read, increasing; empty for all.
      integration_dim: C, a multiple of 64.
      temporal_dim: S.
      temporal_patch: frames of the stem's kernel, odd.
      temporal_kernel: frames of the other temporal kernels, odd.
      temporal_conv_mlp_ratio: hidden width of the temporal encoder over S.
      integration_mlp_ratio: hidden width of the feed-forward over C.
      integration_temporal_mlp_ratio: hidden width of the temporal feed-forward over C.
      ada_pooling_layers: blocks of adaptive pooling (4 on K400, 2 on SSv2).
      spatial_branch: F is read, and the mean class token; else both are 0.
      temporal_branch: X is there; else U = M.
      integration_branch: R is there, and what it gives to X; else M and X meet in the last U alone.
      init_std: standard deviation of initial matrices, tables and queries; the classifiers of a
        linear head keep theirs.
      remat: recompute a layer in the backward pass.
      unroll: see `stack`.

    Raises:
      ValueError: an option that does not fit; the message names the field.
    """
    heads.check_kind(head)
    if num_frames % alpha:
        raise ValueError(
            f'num_frames={num_frames} is not a multiple of alpha={alpha}; set data.num_frames'
        )
    if integration_dim % ADA_POOLING_HEAD_DIM:
        raise ValueError(
            f'model.integration_dim={integration_dim} is not a multiple of {ADA_POOLING_HEAD_DIM}'
        )
    for name, size in (('temporal_patch', temporal_patch), ('temporal_kernel', temporal_kernel)):
        if size % 2 == 0:
            raise ValueError(f'model.{name}={size} must be odd')
    if not (spatial_branch or temporal_branch):
        raise ValueError(
            'model.spatial_branch=False and model.temporal_branch=False: nothing reads the video'
        )
    spec = backbone.spec
    selected = tuple(selected_layers) or tuple(range(spec.depth))
    # The embedding serves zero-shot logits only: where they are not asked, nothing computes it.
    taps = Taps(outputs=selected, embedding=head == 'text')
    taps.blocks_needed(spec.depth)

    net = DistNet(
        num_layers=len(selected),
        num_frames=num_frames,
        alpha=alpha,
        patch_size=spec.patch_size,
        integration_dim=integration_dim,
        temporal_dim=temporal_dim,
        temporal_patch=temporal_patch,
        temporal_kernel=temporal_kernel,
        temporal_hidden=int(temporal_dim * temporal_conv_mlp_ratio),
        ffn_hidden=int(integration_dim * integration_mlp_ratio),
        temporal_ffn_hidden=int(integration_dim * integration_temporal_mlp_ratio),
        ada_pooling_layers=ada_pooling_layers,
        spatial=spatial_branch,
        temporal=temporal_branch,
        integration=integration_branch,
        embed_dim=spec.embed_dim,
        head=heads.Head(head, tuple(num_classes)),
        init_std=init_std,
        dtype=dtype,
        remat=remat,
        unroll=unroll,
    )

    def frozen_view(patches: jax.Array) -> jax.Array:
        """What the backbone sees of (B, T, g*g, p*p*3): every alpha-th frame, (B*t, ...)."""
        return patches[:, ::alpha].reshape(-1, *patches.shape[2:])

    def features(frozen: Tree, batch: Mapping[str, jax.Array]) -> Tree:
        # Both networks begin with the same patches. The barrier has them kept for the backward pass
        # as they are: the compiler would keep rows of 48 values padded to 128, and patchify again.
        patches = jax.lax.optimization_barrier(backbone.patches(batch['video'].astype(dtype)))
        found = backbone.encode_image(frozen['visual'], frozen_view(patches), taps, unroll=unroll)
        inputs = {'taps': found['outputs'], 'patches': patches}
        if head == 'text':
            texts = {name: frozen[name] for name in ('text', 'logit_scale')}
            inputs |= texts | {'embedding': found['embedding']}
        return inputs

    def attention(variables: Tree, inputs: Tree) -> jax.Array:
        _, sown = net.apply(variables, inputs, mutable=['intermediates'])
        return pooling_attention(sown['intermediates'][f'adapooling_{ada_pooling_layers - 1}'])

    return Model(
        net=net,
        dtype=dtype,
        pixels=backbone.kind.pixels,
        param_groups=PARAM_GROUPS if temporal_branch and integration_branch else PARAM_GROUPS[1:],
        sharding_rules=SHARDING_RULES,
        frozen=Frozen(backbone, dtype, features, reads_classes=head == 'text'),
        attention=attention if ada_pooling_layers else None,
    )


# Source: recipe of the release. Tables and queries are not decayed, like norms and biases; the
# last integration-to-temporal map gets no gradient, and decay alone would shrink it.
PARAM_GROUPS = (
    ParamGroup(r'^last_layer/integration2temporal/', weight_decay=0.0),
    ParamGroup(r'/(kernel)$', weight_decay=1.0),
    ParamGroup(r'(bias|scale|cls_token|positional_embedding)$', weight_decay=0.0),
)


SHARDING_RULES = (
    ShardingRule(r'attn/qkv/kernel$', ('fsdp', None, 'tensor', None)),
    ShardingRule(r'attn/qkv/bias$', (None, 'tensor', None)),
    ShardingRule(r'attn/out/kernel$', ('tensor', None, 'fsdp')),
    # The first map of the temporal feed-forward stays whole over `tensor`: its second mixes all
    # hidden channels.
    ShardingRule(r'temporal_ffn/c_fc1/kernel$', ('fsdp', None)),
    ShardingRule(r'temporal_ffn/c_fc1/bias$'),
    ShardingRule(r'temporal_ffn/c_fc2/kernel$', ('fsdp', 'tensor')),
    ShardingRule(r'temporal_ffn/c_fc2/bias$', ('tensor',)),
    ShardingRule(r'/(c_fc|c_fc1)/kernel$', ('fsdp', 'tensor')),
    ShardingRule(r'/(c_fc|c_fc1)/bias$', ('tensor',)),
    ShardingRule(r'/(c_proj|c_fc2)/kernel$', ('tensor', 'fsdp')),
    ShardingRule(r'(temporal_stem|temporal2integration)/kernel$', ('fsdp',)),
    ShardingRule(r'kernel$', ('fsdp', None)),
    ShardingRule(r'(bias|scale|cls_token|positional_embedding)$'),
)


def conv_space(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """3 x 3 'same' convolution of (B, T, g, g, in) with `kernel` (3, 3, in, out)."""
    return by_platform(x, kernel, cpu=_space_products, default=_space_convolution)


def _space_convolution(x: jax.Array, kernel: jax.Array) -> jax.Array:
    y = jax.lax.conv_general_dilated(
        x.reshape(-1, *x.shape[2:]),
        kernel,
        (1, 1),
        'SAME',
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        precision=precision_of(x, kernel),
    )
    return y.reshape(*x.shape[:-1], kernel.shape[-1])


def _space_products(x: jax.Array, kernel: jax.Array) -> jax.Array:
    rows, columns = x.shape[2:4]
    padded = jnp.pad(x, [(0, 0), (0, 0), (1, 1), (1, 1), (0, 0)])
    # Three neighbours of a row side by side, then one product a row of the kernel.
    wide = jnp.concatenate([padded[:, :, :, j : j + columns] for j in range(3)], axis=-1)
    taps = kernel.reshape(3, -1, kernel.shape[-1])
    summed = sum(
        einsum_to_float32('...i,io->...o', wide[:, :, i : i + rows], taps[i]) for i in range(3)
    )
    return summed.astype(x.dtype)


class TemporalNet(nn.Module):
    """One block of the temporal encoder on (B, T, g*g, S)."""

    hidden_dim: int
    kernel_size: int
    dtype: Dtype
    kernel_init: Initializer

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        time = Affine((self.hidden_dim,), self.kernel_init, name='c_fc1')
        space = Affine((channels,), self.kernel_init, name='c_fc2')
        params = {
            'ln': LayerNorm(name='ln').parameters(channels),
            'c_fc1': time((self.kernel_size, channels)),
            'c_fc2': space((3, 3, self.hidden_dim)),
        }
        if x.dtype != self.dtype or not temporal_kernel.fits(x, params):
            return temporal_net(x, params, self.dtype)
        return kernels.trained_on_tpu(
            temporal_kernel.temporal_net,
            temporal_kernel.temporal_net_gradient,
            functools.partial(temporal_net, dtype=self.dtype),
            x,
            params,
        )


def temporal_net(x: jax.Array, params: Tree, dtype: Dtype) -> jax.Array:
    """What `temporal_kernel` means."""
    side = math.isqrt(x.shape[2])
    (time, time_bias), (space, space_bias) = (
        (params[name]['kernel'].astype(dtype), params[name]['bias'].astype(dtype))
        for name in ('c_fc1', 'c_fc2')
    )
    y = quick_gelu(conv_time(layer_norm(x, **params['ln']).astype(dtype), time) + time_bias)
    y = conv_space(y.reshape(*y.shape[:2], side, side, -1), space).reshape(x.shape) + space_bias
    return quick_gelu(x + y)


class Temporal2Integration(nn.Module):
    """(B, T, g*g, S) -> (B, t, 1 + g*g, C): a stride-alpha convolution and a learned class row."""

    features: int
    alpha: int
    dtype: Dtype
    kernel_init: Initializer

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        b, frames, _, channels = x.shape
        t = frames // self.alpha
        kernel = self.param('kernel', self.kernel_init, (self.alpha, channels, self.features))
        bias = self.param('bias', nn.initializers.zeros, (self.features,)).astype(self.dtype)
        cls = self.param('cls_token', self.kernel_init, (t, self.features)).astype(self.dtype)
        grouped = x.astype(self.dtype).reshape(b, t, self.alpha, -1, channels)
        patches = einsum('btans,asc->btnc', grouped, kernel.astype(self.dtype)) + bias
        cls = jnp.broadcast_to(cls[None, :, None], (b, t, 1, self.features))
        return jnp.concatenate([cls, patches], axis=2)


class Integration2Temporal(nn.Module):
    """(B, t, N, C) -> (B, alpha t, N, S): a linear map, each frame alpha times.

    Parameters `kernel` (C, S) and `bias` (S,).
    """

    features: int
    alpha: int
    dtype: Dtype
    kernel_init: Initializer

    @nn.compact
    def __call__(self, m: jax.Array) -> jax.Array:
        kernel = self.param('kernel', self.kernel_init, (m.shape[-1], self.features))
        bias = self.param('bias', nn.initializers.zeros, (self.features,)).astype(self.dtype)
        y = by_platform(
            m.astype(self.dtype),
            kernel.astype(self.dtype),
            cpu=self._repeated,
            default=self._transposed,
        )
        return y + bias

    def _repeated(self, m: jax.Array, kernel: jax.Array) -> jax.Array:
        return jnp.repeat(einsum('btni,io->btno', m, kernel), self.alpha, axis=1)

    def _transposed(self, m: jax.Array, kernel: jax.Array) -> jax.Array:
        """A convolution of stride 1 / alpha: on TPU repeating a result costs more than products."""
        taps = jnp.broadcast_to(kernel, (self.alpha, 1, *kernel.shape))
        return jax.lax.conv_general_dilated(
            m,
            taps,
            (1, 1),
            [(self.alpha - 1, self.alpha - 1), (0, 0)],
            lhs_dilation=(self.alpha, 1),
            dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
            precision=precision_of(m, kernel),
        )


class TemporalFeedForward(nn.Module):
    """Per-token feed-forward along time on (B, t, L, C)."""

    hidden_dim: int
    kernel_size: int
    dtype: Dtype
    kernel_init: Initializer

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        options = {'kernel_init': self.kernel_init, 'dtype': self.dtype}
        y = Linear(self.hidden_dim, **options, name='c_fc1')(x)
        y = TimeConv(self.hidden_dim, self.kernel_size, **options, name='c_fc2')(y)
        return Linear(x.shape[-1], **options, name='c_proj')(quick_gelu(y))


class IntegrationNet(nn.Module):
    """R = FFN(LN U) + TFFN(LN U) on (B, t, L, C)."""

    ffn_hidden: int
    temporal_ffn_hidden: int
    kernel_size: int
    dtype: Dtype
    kernel_init: Initializer

    @nn.compact
    def __call__(self, u: jax.Array) -> jax.Array:
        options = {'kernel_init': self.kernel_init, 'dtype': self.dtype}
        frame = Mlp(self.ffn_hidden, **options, name='ffn')(LayerNorm(name='ln')(u))
        time = TemporalFeedForward(
            self.temporal_ffn_hidden, self.kernel_size, **options, name='temporal_ffn'
        )(LayerNorm(name='ln_temporal')(u))
        return frame + time


class DistLayer(nn.Module):
    """One step of the temporal encoder and the integration branch, beside one frozen block.

    The carry is X (B, T, g*g, S), None without the temporal branch, and R (B, t, 1 + g*g, C).
    Reads its own frozen output out of the stack of all: a stack without the last one, for the loop,
    would be a copy of it.

    Attributes:
      last: nothing follows, so that both branches meet here, if nowhere else.
      outputs: also return what came up on the way; the rest are sizes and branches, see `build`.
    """

    alpha: int
    integration_dim: int
    temporal_dim: int
    temporal_hidden: int
    ffn_hidden: int
    temporal_ffn_hidden: int
    temporal_kernel: int
    spatial: bool
    temporal: bool
    integration: bool
    dtype: Dtype
    kernel_init: Initializer
    last: bool
    outputs: bool

    @nn.compact
    def __call__(
        self, carry: tuple[jax.Array | None, jax.Array], index: jax.Array | int, taps: jax.Array
    ) -> tuple[tuple[jax.Array | None, jax.Array], dict[str, jax.Array]]:
        """(X, R), number of the layer, frozen outputs (K, B*t, L, W) -> (X', R), outputs."""
        options = {'kernel_init': self.kernel_init, 'dtype': self.dtype}
        x, r = split_batch(carry)
        if self.temporal:
            x = TemporalNet(
                self.temporal_hidden, self.temporal_kernel, **options, name='temporal_net'
            )(x)
        if not (self.integration or self.last):
            return (x, r), {}
        branches = self.spatial and self.temporal and self.integration
        if branches and (self.last or not self.outputs) and not self.is_initializing():
            params = self.variables['params']
            if integration_kernel.fits(x, r, taps, params):
                return self._in_one(x, r, index, taps, params)
        call = self._parts()
        m = r
        if self.spatial:
            tap = jax.lax.dynamic_index_in_dim(taps, index, keepdims=False)
            m = _entered(call, tap, r)
        u = m + call['temporal2integration'](x) if self.temporal else m
        if self.integration:
            r = call['integration_net'](u)
        seen = {'temporal': x, 'integration': r, 'integration_input': u} if self.outputs else {}
        if self.integration and self.temporal:
            # Nobody reads the sum of the last layer; the compiler then drops this product too.
            x = x + call['integration2temporal'](m[:, :, 1:])
        return (x, r), seen

    def _parts(self, **where: None) -> dict[str, nn.Module]:
        """What is behind the temporal net, by name; with `parent=None` apart from this module."""
        options = {'kernel_init': self.kernel_init, 'dtype': self.dtype, **where}
        channels = self.integration_dim
        widths = (self.ffn_hidden, self.temporal_ffn_hidden, self.temporal_kernel)
        parts = (
            Linear(channels, **options, name='input_linear'),
            Temporal2Integration(channels, self.alpha, **options, name='temporal2integration'),
            IntegrationNet(*widths, **options, name='integration_net'),
            Integration2Temporal(
                self.temporal_dim, self.alpha, **options, name='integration2temporal'
            ),
        )
        return {part.name: part for part in parts}

    def _in_one(
        self, x: jax.Array, r: jax.Array, index: jax.Array | int, taps: jax.Array, params: Tree
    ) -> tuple[tuple[jax.Array, jax.Array], dict[str, jax.Array]]:
        """What is behind the temporal net, where all branches are there, as one kernel."""
        parts = self._parts(parent=None)
        if self.last:
            del parts['integration2temporal']
        enter, join = plain_forms(parts, self.last)
        out, r = integration_kernel.integration(
            x,
            r,
            taps,
            index,
            {name: params[name] for name in parts},
            enter=enter,
            join=join,
            last=self.last,
        )
        if self.last:
            return (x, r), {'temporal': x, 'integration': r, 'integration_input': out}
        return (out, r), {}


def _entered(
    call: Mapping[str, Callable[..., jax.Array]], tap: jax.Array, r: jax.Array
) -> jax.Array:
    """M = F W_in + b + R of a frozen output (B*t, L, W)."""
    return call['input_linear'](tap).reshape(r.shape) + r


def plain_forms(
    parts: Mapping[str, nn.Module], last: bool
) -> tuple[Callable[..., jax.Array], Callable[..., tuple[jax.Array, jax.Array]]]:
    """`enter` and `join` of `integration_kernel.integration`, by modules that are bound nowhere."""

    def calls(params: Tree) -> dict[str, Callable[..., jax.Array]]:
        return {
            name: functools.partial(part.apply, {'params': params[name]})
            for name, part in parts.items()
        }

    def enter(tap: jax.Array, r: jax.Array, params: Tree) -> jax.Array:
        return _entered(calls(params), tap, r)

    def join(x: jax.Array, m: jax.Array, params: Tree) -> tuple[jax.Array, jax.Array]:
        call = calls(params)
        u = m + call['temporal2integration'](x)
        new = call['integration_net'](u)
        return (u if last else x + call['integration2temporal'](m[:, :, 1:])), new

    return enter, join


class AdaptivePooling(nn.Module):
    """One block that pools tokens over space, frame by frame, then over time.

    Attributes:
      dtype: compute dtype.
      kernel_init: of matrices but the packed ones, and of the table.
    """

    dtype: Dtype
    kernel_init: Initializer

    @nn.compact
    def __call__(
        self, clip_query: jax.Array, frame_query: jax.Array, tokens: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Updates the queries.

        Args:
          clip_query: a (B, C).
          frame_query: s (B*t, C).
          tokens: Z (B*t, L, C).

        Returns:
          The new clip and frame queries.
        """
        batch, width = clip_query.shape[0], tokens.shape[-1]
        options = {'kernel_init': self.kernel_init, 'dtype': self.dtype}
        s = frame_query + CrossAttention(**options, name='spatial_transformer')(frame_query, tokens)
        s = s + self._feed_forward('spatial_cls_token', 'spat_cls_token', s)
        table = (s.shape[0] // batch, width)
        positions = self.param('positional_embedding', self.kernel_init, table)
        frames = s.reshape(batch, -1, width) + positions.astype(self.dtype)
        a = clip_query + CrossAttention(**options, name='temporal_transformer')(clip_query, frames)
        return a + self._feed_forward('cls_token', 'temp_cls_token', a), s

    def _feed_forward(self, map_name: str, norm_name: str, x: jax.Array) -> jax.Array:
        hidden = ADA_POOLING_MLP_RATIO * x.shape[-1]
        normed = LayerNorm(name=f'ln_out_{norm_name}')(x)
        return Mlp(hidden, self.dtype, self.kernel_init, name=f'output_map_{map_name}')(normed)


def pooling_attention(sown: Tree) -> jax.Array:
    """Where one block of adaptive pooling looks.

    A frame's share in the clip query, times a patch's share in the frame's query; means over heads.

    Args:
      sown: the 'intermediates' of an `AdaptivePooling`, for L = 1 + g*g tokens.

    Returns:
      float32 (B, t, g, g); the class tokens have what is left to a sum of 1.
    """
    frames = sown['temporal_transformer']['attn']['weights'][0].mean(1)  # (B, t)
    patches = sown['spatial_transformer']['attn']['weights'][0].mean(1)[:, 1:]  # (B*t, g*g)
    side = math.isqrt(patches.shape[-1])
    return frames[:, :, None, None] * patches.reshape(*frames.shape, side, side)


class CrossAttention(nn.Module):
    """(N, C) queries over (N, M, C) memories -> (N, C); one norm serves both."""

    dtype: Dtype
    kernel_init: Initializer

    @nn.compact
    def __call__(self, query: jax.Array, memory: jax.Array) -> jax.Array:
        norm = LayerNorm(name='ln_1')
        num_heads = query.shape[-1] // ADA_POOLING_HEAD_DIM
        attention = QueryAttention(num_heads, self.dtype, self.kernel_init, name='attn')
        return attention(norm(query), norm(memory))


class DistNet(nn.Module):
    """The trainable part of DiST. See `build` for the options and the module for the equations."""

    num_layers: int
    num_frames: int
    alpha: int
    patch_size: int
    integration_dim: int
    temporal_dim: int
    temporal_patch: int
    temporal_kernel: int
    temporal_hidden: int
    ffn_hidden: int
    temporal_ffn_hidden: int
    ada_pooling_layers: int
    spatial: bool
    temporal: bool
    integration: bool
    embed_dim: int
    head: heads.Head
    init_std: float
    dtype: Dtype
    remat: bool
    unroll: bool

    @nn.compact
    def __call__(
        self,
        features: Tree,
        *,
        mask: jax.Array | None = None,
        train: bool = False,
        intermediates: bool = False,
    ) -> dict[str, Any]:
        """Runs both branches and the head.

        Args:
          features: `taps` (K, B*t, L, W), `patches` (B, T, g*g, p*p*3) of the normalised video, and
            for a text head `text`, `logit_scale` and the frozen `embedding` (B*t, E).
          mask, train: accepted for the common interface; DiST has no statistics and no dropout.
          intermediates: also return the tensors of every layer, stacked on axis 0; needs all
            branches.

        Returns:
          `logits`, tuple of float32 (B, num_classes); `embedding` float32 (B, E), not normalised;
          with a text head `frozen_logits`, those of the backbone alone, mean over its frames; with
          `intermediates` also `stem`, `temporal`, `integration` and `pooling`.
        """
        del mask, train
        taps, patches = features['taps'], features['patches']
        b, num_frames = patches.shape[:2]
        if num_frames != self.num_frames:
            raise ValueError(
                f'a clip of {num_frames} frames for a model of num_frames={self.num_frames}'
            )
        t = num_frames // self.alpha
        init = nn.initializers.normal(self.init_std)
        x = stem = None
        if self.temporal:
            stem = Stem(
                self.temporal_dim,
                self.patch_size,
                self.temporal_patch,
                self.dtype,
                init,
                name='temporal_stem',
            )(patches)
            x = stem.reshape(*patches.shape[:3], self.temporal_dim)
        r = jnp.zeros((b, t, taps.shape[2], self.integration_dim), self.dtype)
        layer = {
            'alpha': self.alpha,
            'integration_dim': self.integration_dim,
            'temporal_dim': self.temporal_dim,
            'temporal_hidden': self.temporal_hidden,
            'ffn_hidden': self.ffn_hidden,
            'temporal_ffn_hidden': self.temporal_ffn_hidden,
            'temporal_kernel': self.temporal_kernel,
            'spatial': self.spatial,
            'temporal': self.temporal,
            'integration': self.integration,
            'dtype': self.dtype,
            'kernel_init': init,
        }
        seen: list[Tree] = []
        if self.num_layers > 1:
            scanned = scan_trainable(
                DistLayer,
                self.num_layers - 1,
                remat=self.remat,
                unroll=self.unroll,
                in_axes=(0, nn.broadcast),
                keep=(integration_kernel.MIXED,),
            )
            (x, r), inner = scanned(**layer, last=False, outputs=intermediates, name='layers')(
                (x, r), jnp.arange(self.num_layers - 1), taps
            )
            seen.append(inner)
        (_, r), last = DistLayer(**layer, last=True, outputs=True, name='last_layer')(
            (x, r), self.num_layers - 1, taps
        )
        seen.append(jax.tree.map(lambda y: y[None], last))

        width = self.integration_dim
        tokens = (r + last['integration_input']).reshape(b * t, -1, width)
        clip_query = self.param('aggregated_cls_token', init, (width,))
        frame_query = self.param('aggregated_spatial_cls_token', init, (width,))
        a = jnp.broadcast_to(clip_query.astype(self.dtype), (b, width))
        s = jnp.broadcast_to(frame_query.astype(self.dtype), (b * t, width))
        pooled = []
        for i in range(self.ada_pooling_layers):
            a, s = AdaptivePooling(self.dtype, init, name=f'adapooling_{i}')(a, s, tokens)
            pooled.append(a)

        v = a.astype(jnp.float32)
        if self.spatial:
            frozen_cls = taps[-1, :, 0].astype(jnp.float32).reshape(b, t, -1).mean(1)
            v = v + Linear(width, kernel_init=init, name='proj_spatial_cls_token')(frozen_cls)
        v = LayerNorm(name='ln_post')(v)
        proj_init = nn.initializers.normal(width**-0.5)
        v = Linear(self.embed_dim, use_bias=False, kernel_init=proj_init, name='proj')(v)
        outputs: dict[str, Any] = {'embedding': v, 'logits': self.head(v, features)}
        if 'text' in features:
            frames = features['embedding'].reshape(b, -1, self.embed_dim)
            outputs['frozen_logits'] = heads.mean_cosine_logits(
                frames, features['text'], features['logit_scale']
            )
        if intermediates:
            outputs |= {
                'stem': stem,
                'temporal': _join(seen, 'temporal').reshape(-1, *stem.shape),
                'integration': _join(seen, 'integration'),
                'pooling': jnp.stack(pooled) if pooled else None,
            }
        return outputs


def _join(seen: list[Tree], name: str) -> jax.Array:
    return jnp.concatenate([part[name] for part in seen])
