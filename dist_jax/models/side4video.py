"""Side4Video: a spatial-temporal network beside a frozen image ViT, fed from its blocks.

Source: Yao et al., "Side4Video: Spatial-Temporal Side Network for Memory-Efficient Image-to-Video
Transfer Learning" (arXiv:2311.15769), section 3; released code of the authors.

    s = BN(conv(video)), kernel (3, p, p)                   (B, T, N, C), N patches of a frame
    for every tapped block, F its frozen output (B, T, 1 + N, D):
        c, z = class token and patches of tap(F)            tap: linear(LN F), or LN(linear F)
        u = (s + z) / 2
        pre-norm (on CLIP)                                  post-norm (on EVA)
        u = u + conv_time(BN u)                             u = u + BN(conv_time(u))
        u = u + attention(LN [u + p | shift c])             u = u + LN(attention([u + p | shift c]))
        s = u + MLP(BN u)                                   s = u + BN(MLP(u))
    logits = linear(mean over T and N of BN s)              post-norm: of s itself

`p` is a table of positions, the same in every layer; `shift` moves half of the channels of a class
token one frame back and the other half one ahead; `conv_time` is two linear maps with a depthwise
convolution over 3 frames between them; attention is within a frame, with queries of patches only.

Differs: the class token lies behind the patches, where no operator is changed by it and nothing
has to be moved by a row. Batch statistics: see `batch_norm`. The release divides the learning rate
of the norms of batches by the accumulation steps; here they are trained like the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dist_jax.models import heads, kernels, transformer
from dist_jax.models.api import Model, ParamGroup, Tree
from dist_jax.models.backbone import Backbone, Taps
from dist_jax.models.batch_norm import BatchNorm
from dist_jax.models.frozen import Frozen
from dist_jax.models.layers import (
    ACTIVATIONS,
    Affine,
    Dtype,
    Initializer,
    LayerNorm,
    Linear,
    einsum,
    patchify,
    resize_positions,
    row_major,
    standardise,
    uniform,
)
from dist_jax.models.stack import STATISTICS, STREAM, mark, scan_trainable
from dist_jax.models.time_conv import DepthwiseTimeConv, Stem
from dist_jax.sharding import ShardingRule, split_batch

HEAD_DIM = 64
# What a layer keeps for its backward pass, where it computes anything again.
REMAT = {'none': (), 'branches': (STREAM, STATISTICS), 'layers': (STATISTICS,)}
STEM_FRAMES = 3

# Source: the release decays every trained tensor: biases, norms and the position table too.
PARAM_GROUPS = (ParamGroup(r'.', weight_decay=1.0),)

SHARDING_RULES = (
    *transformer.BLOCK_RULES,
    ShardingRule(r'(conv/pw_[12]|tap/linear|classifier)/kernel$', ('fsdp', None)),
    ShardingRule(r'(stem|conv/dw)/kernel$', ('fsdp',)),
    ShardingRule(r'(bias|scale|positional_embedding)$'),
)


def build(
    backbone: Backbone,
    *,
    num_classes: tuple[int, ...],
    num_frames: int,
    head: str = 'linear',
    dtype: Any = jnp.bfloat16,
    side_dim: int = 320,
    tap_every: int = 1,
    post_norm: bool = False,
    mlp_ratio: float = 4.0,
    batch_norm_groups: int = 1,
    remat: str = 'none',
    unroll: bool = False,
) -> Model:
    """Side4Video's recognition network on a frozen backbone.

    Args:
      backbone: the frozen one.
      num_classes: classes of each head.
      num_frames: any; the backbone sees all frames.
      head: 'linear' only; the side network has no text tower.
      dtype: compute dtype of both networks; norms, statistics, softmax and loss are float32.
      side_dim: C, channels of the side network; heads of its attention have 64.
      tap_every: the last of so many blocks is read: 1 for all, 2 for blocks 1, 3, 5, ...
      post_norm: norms behind the branches, and taps normalised behind their linear map, as the
        release has it on EVA.
      mlp_ratio: hidden width of the MLPs over C.
      batch_norm_groups: groups of clips whose statistics are taken together; see `batch_norm`.
      remat: what the backward pass computes again: 'none', 'branches' (convolution, attention and
        MLP, as the release does on EVA), or 'layers'.
      unroll: see `stack`.

    Raises:
      ValueError: an option that does not fit; the message names the field.
    """
    del num_frames
    if head != 'linear':
        raise ValueError(f'model.head={head!r}: Side4Video has a linear head only')
    if side_dim < HEAD_DIM or side_dim % HEAD_DIM:
        raise ValueError(
            f'model.side_dim={side_dim} must be a multiple of {HEAD_DIM}, the channels of a head'
        )
    if remat not in REMAT:
        raise ValueError(f'model.remat={remat!r} is not one of {", ".join(REMAT)}')
    mlp_hidden = round(mlp_ratio * side_dim)
    if mlp_hidden < 1:
        raise ValueError(
            f'model.mlp_ratio={mlp_ratio} of model.side_dim={side_dim} leaves no hidden channel'
        )
    spec = backbone.spec
    blocks = tuple(range(tap_every - 1, spec.depth, tap_every)) if tap_every > 0 else ()
    if not blocks:
        raise ValueError(
            f'model.tap_every={tap_every}: the backbone has {spec.depth} blocks, so none is read'
        )

    def reading(stream: jax.Array) -> dict[str, jax.Array]:
        # What no gradient changes of the norm before a tap is done once, outside of it.
        ready = stream if post_norm else standardise(stream, quick=True).astype(stream.dtype)
        return {'token': ready[:, 0], 'patches': ready[:, 1:]}

    taps = Taps(outputs=blocks, reading=reading)
    net = Side4VideoNet(
        depth=len(blocks),
        side_dim=side_dim,
        patch_size=spec.patch_size,
        mlp_hidden=mlp_hidden,
        post_norm=post_norm,
        groups=batch_norm_groups,
        head=heads.Head(
            head,
            tuple(num_classes),
            kernel_init=uniform(side_dim),
            bias_init=uniform(side_dim),
        ),
        dtype=dtype,
        remat=remat,
        unroll=unroll,
    )

    def features(frozen: Tree, batch: Mapping[str, jax.Array]) -> Tree:
        # The barrier: as DiST's, the patches are kept as they are.
        patches = jax.lax.optimization_barrier(
            patchify(batch['video'].astype(dtype), spec.patch_size)
        )
        frames = patches.reshape(-1, *patches.shape[2:])
        found = backbone.encode_image(frozen['visual'], frames, taps, unroll=unroll)
        taken = jax.tree.map(
            lambda x: x.reshape(len(blocks), *patches.shape[:2], *x.shape[2:]), found['outputs']
        )
        return {'taps': taken, 'patches': patches}

    return Model(
        net=net,
        dtype=dtype,
        pixels=backbone.kind.pixels,
        param_groups=PARAM_GROUPS,
        sharding_rules=SHARDING_RULES,
        frozen=Frozen(backbone, dtype, features),
        fit=_fit,
    )


def _fit(path: str, stored: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The position table of another grid; only that depends on the image size."""
    if not path.endswith('positional_embedding') or stored.shape[1:] != shape[1:]:
        raise ValueError(f'{path} is {stored.shape} there and {shape} here')
    # Resizing is linear in the table: this is what it does to each place alone.
    side, places = round(shape[0] ** 0.5), np.eye(stored.shape[0], dtype=np.float32)
    resized = resize_positions(np.pad(places, [(1, 0), (0, 0)]), (side, side))[1:]
    return jnp.matmul(resized, stored, precision='highest')


def shift_class_token(token: jax.Array) -> jax.Array:
    """Class tokens (B, T, C): half of the channels from the next frame, half from the one before.

    Entries from outside of the clip are 0.
    """
    half = token.shape[-1] // 2
    ahead = jnp.pad(token[:, 1:, :half], [(0, 0), (0, 1), (0, 0)])
    behind = jnp.pad(token[:, :-1, half:], [(0, 0), (1, 0), (0, 0)])
    return jnp.concatenate([ahead, behind], axis=-1)


class Tap(nn.Module):
    """Frozen tokens (..., D) -> tokens of the side network (..., C), for every leaf of a tree.

    Parameters `norm`, of D channels before the linear map or of C behind it, and `linear`. Before
    it, tokens come without mean and of variance 1 (`build`), and the affine part of the norm goes
    into the linear map.
    """

    features: int
    post_norm: bool
    dtype: Dtype

    @nn.compact
    def __call__(self, tokens: Tree) -> Tree:
        width = jax.tree.leaves(tokens)[0].shape[-1]
        init = uniform(width)
        linear = Affine((self.features,), init, init, name='linear')((width,))
        kernel, bias = linear['kernel'], linear['bias']
        norm = LayerNorm(name='norm') if self.post_norm else Scale(name='norm')(width)
        if not self.post_norm:
            kernel, bias = norm['scale'][:, None] * kernel, norm['bias'] @ kernel + bias
        kernel, bias = kernel.astype(self.dtype), bias.astype(self.dtype)

        def one(x: jax.Array) -> jax.Array:
            y = einsum('...d,dc->...c', x.astype(self.dtype), kernel) + bias
            return norm(y) if self.post_norm else y

        return jax.tree.map(one, tokens)


class TemporalConv(nn.Module):
    """Linear map, depthwise convolution over 3 frames, linear map: (B, T, N, C) -> (B, T, N, C).

    Parameters `pw_1`, `dw`, `pw_2`; nothing non-linear between them.
    """

    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        options = {
            'kernel_init': uniform(width),
            'bias_init': uniform(width),
            'dtype': self.dtype,
        }
        x = DepthwiseTimeConv(name='dw')(Linear(width, **options, name='pw_1')(x))
        return Linear(width, **options, name='pw_2')(x)


class FrameAttention(nn.Module):
    """Attention within frames: patches (n, N, C) look at patches and one more token (n, 1 + N, C).

    Parameters `qkv` with kernel (C, 3, h, d) and bias (3, h, d); `out` with kernel (h, d, C) and
    bias (C,).
    """

    qkv_init: Initializer
    out_init: Initializer
    bias_init: Initializer
    dtype: Dtype

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """(n, N + 1, C), the patches first -> (n, N, C)."""
        width = tokens.shape[-1]
        heads = (width // HEAD_DIM, HEAD_DIM)
        qkv = Affine((3, *heads), self.qkv_init, self.bias_init, name='qkv')
        out = Affine((width,), self.out_init, self.bias_init, name='out')
        attn = {'qkv': qkv((width,)), 'out': out(heads)}
        return kernels.trained_attention(tokens.astype(self.dtype), attn, tokens.shape[1] - 1)


class Scale(nn.Module):
    """The parameters of a norm: scale and bias (width,)."""

    @nn.compact
    def __call__(self, width: int) -> dict[str, jax.Array]:
        return {
            'scale': self.param('scale', nn.initializers.ones, (width,)),
            'bias': self.param('bias', nn.initializers.zeros, (width,)),
        }


class SideMlp(nn.Module):
    """Two linear maps with exact GELU between: parameters `c_fc` and `c_proj`."""

    hidden_dim: int
    kernel_inits: tuple[Initializer, Initializer]
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        first, second = (
            {'kernel_init': init, 'bias_init': uniform(fan_in), 'dtype': self.dtype}
            for init, fan_in in zip(self.kernel_inits, (width, self.hidden_dim), strict=True)
        )
        hidden = ACTIVATIONS['gelu'](Linear(self.hidden_dim, **first, name='c_fc')(x))
        return Linear(width, **second, name='c_proj')(hidden)


class SideLayer(nn.Module):
    """What the side network does beside one tapped block; the carry is the stream (B, T, N, C)."""

    mlp_hidden: int
    post_norm: bool
    groups: int
    train: bool
    record: bool
    dtype: Dtype

    @nn.compact
    def __call__(
        self, s: jax.Array, tap: Tree, positions: jax.Array, mask: jax.Array | None
    ) -> tuple[jax.Array, dict[str, jax.Array] | None]:
        """Args: stream, frozen tokens (see `Side4VideoNet`), table (N, C), mask (B,) or None.

        Returns:
          The stream and, to be recorded, what this layer did: see `Side4VideoNet`.
        """
        width = s.shape[-1]
        inits = _initial_values(width, self.mlp_hidden, self.post_norm)

        def batch_norm(name: str, x: jax.Array) -> jax.Array:
            return BatchNorm(self.groups, name=name)(x, mask, train=self.train)

        tokens = Tap(width, self.post_norm, self.dtype, name='tap')(split_batch(tap))
        u = mixed = mark(row_major(split_batch(0.5 * s + 0.5 * tokens['patches'])), STREAM)

        conv = TemporalConv(self.dtype, name='conv')
        if self.post_norm:
            moved = conv(u)
            u = mark(u + batch_norm('bn_1', moved), STREAM)
        else:
            moved = conv(batch_norm('bn_1', u))
            u = mark(row_major(u + moved), STREAM)

        shifted = shift_class_token(tokens['token'])
        memory = u + positions.astype(self.dtype)
        memory = jnp.concatenate([memory, shifted[:, :, None]], axis=2)
        norm = LayerNorm(name='ln')
        attention = FrameAttention(**inits['attn'], dtype=self.dtype, name='attn')
        memory = memory if self.post_norm else norm(memory)
        seen = attention(memory.reshape(-1, *memory.shape[2:])).reshape(u.shape)
        u = mark(row_major(u + (norm(seen) if self.post_norm else seen)), STREAM)

        mlp = SideMlp(self.mlp_hidden, inits['mlp'], self.dtype, name='mlp')
        s = row_major(
            u + (batch_norm('bn_2', mlp(u)) if self.post_norm else mlp(batch_norm('bn_2', u)))
        )
        if not self.record:
            return s, None
        recorded = {'mixed': mixed, 'conv': moved, 'attn': seen, 'stream': s}
        return s, {'class': tokens['token'], 'shifted': shifted, **recorded}


def _initial_values(width: int, hidden: int, post_norm: bool) -> dict[str, Any]:
    """Of attention and MLP. Source: what the release's rules do, on CLIP and on EVA."""
    if post_norm:
        init = uniform(width)
        attention = {'qkv_init': init, 'out_init': init, 'bias_init': init}
        return {'attn': attention, 'mlp': (init, uniform(hidden))}
    normal = nn.initializers.normal
    # Twelve layers, two branches each: a constant in the release, in ViT-L/14's networks too.
    out = normal((24 * width) ** -0.5)
    attention = {
        'qkv_init': normal(width**-0.5),
        'out_init': out,
        'bias_init': nn.initializers.zeros,
    }
    return {'attn': attention, 'mlp': (normal((2 * width) ** -0.5), out)}


class Side4VideoNet(nn.Module):
    """The trainable part. See `build` for the options and the module for the equations."""

    depth: int
    side_dim: int
    patch_size: int
    mlp_hidden: int
    post_norm: bool
    groups: int
    head: heads.Head
    dtype: Dtype
    remat: str
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
        """Runs the side network and the head.

        Args:
          features: `patches` (B, T, N, p*p*3) and `taps`: `token` (K, B, T, D) and `patches`
            (K, B, T, N, D), with pre-norm layers standardised over D.
          mask: (B,), 1 where a clip is real; the others count in no statistics.
          train: normalise by the batch, and move the running statistics.
          intermediates: also return what every layer did.

        Returns:
          `logits`, tuple of float32 (B, num_classes); `embedding` float32 (B, C). With
          `intermediates` also `stem` (B, T, N, C) and `layers`, of every layer, stacked: `class`,
          `shifted` (K, B, T, C), `mixed`, `conv`, `attn` (before a norm behind them), `stream`
          (K, B, T, N, C).
        """
        patches = features['patches']
        init = uniform(STEM_FRAMES * 3 * self.patch_size**2)
        s = Stem(
            self.side_dim,
            self.patch_size,
            STEM_FRAMES,
            self.dtype,
            kernel_init=init,
            bias_init=init,
            name='stem',
        )(patches)
        s = s.reshape(*patches.shape[:3], self.side_dim)
        s = stem = BatchNorm(self.groups, name='stem_bn')(s, mask, train=train)
        positions = self.param(
            'positional_embedding',
            nn.initializers.normal(0.02 if self.post_norm else 0.01),
            s.shape[2:],
        )
        layers = scan_trainable(
            SideLayer,
            self.depth,
            remat=self.remat != 'none',
            unroll=self.unroll,
            in_axes=(0, nn.broadcast, nn.broadcast),
            keep=REMAT[self.remat],
        )
        s, seen = layers(
            mlp_hidden=self.mlp_hidden,
            post_norm=self.post_norm,
            groups=self.groups,
            train=train,
            record=intermediates,
            dtype=self.dtype,
            name='layers',
        )(s, features['taps'], positions, mask)
        if not self.post_norm:
            s = BatchNorm(self.groups, name='post_bn')(s, mask, train=train)
        embedding = s.astype(jnp.float32).mean((1, 2))
        outputs: dict[str, Any] = {'embedding': embedding, 'logits': self.head(embedding, features)}
        return outputs | ({'stem': stem, 'layers': seen} if intermediates else {})
