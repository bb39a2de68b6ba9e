"""The network of Side4Video: spatial-temporal, beside a frozen image ViT, fed from its blocks.

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

What follows the stream is what it is trained for: `side4video` tells classes apart,
`side4video_retrieval` matches videos and sentences.

`p` is a table of positions, the same in every layer; `shift` moves half of the channels of a class
token one frame back and the other half one ahead; `conv_time` is two linear maps with a depthwise
convolution over 3 frames between them; attention is within a frame, with queries of patches only.

Differs: the class token lies behind the patches, where no operator is changed by it and nothing
has to be moved by a row. Batch statistics: see `batch_norm`. The release divides the learning rate
of the norms of batches by the accumulation steps; here they are trained like the rest.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dist_jax.models import kernels, side_kernel, transformer
from dist_jax.models.api import Tree
from dist_jax.models.backbone import Backbone, Taps
from dist_jax.models.batch_norm import BatchNorm
from dist_jax.models.layers import (
    Affine,
    Dtype,
    Initializer,
    einsum,
    layer_norm,
    resize_positions,
    row_major,
    uniform,
)
from dist_jax.models.stack import STATISTICS, STREAM, mark, scan_trainable
from dist_jax.models.time_conv import Stem
from dist_jax.sharding import ShardingRule, split_batch

HEAD_DIM = 64
# What a layer keeps for its backward pass, where it computes anything again.
REMAT = {'none': (), 'branches': (STREAM, STATISTICS), 'layers': (STATISTICS,)}
STEM_FRAMES = 3

RULES = (
    *transformer.BLOCK_RULES,
    ShardingRule(r'(conv/pw_[12]|tap/linear)/kernel$', ('fsdp', None)),
    ShardingRule(r'(stem|conv/dw)/kernel$', ('fsdp',)),
    ShardingRule(r'(bias|scale|positional_embedding)$'),
)


@dataclasses.dataclass(frozen=True)
class Beside:
    """Which side network stands beside a backbone, and what it reads of it.

    Attributes:
      backbone: the frozen one.
      dtype: compute dtype of both networks; norms, statistics and softmax are float32.
      side_dim: C, channels of the side network; heads of its attention have 64.
      tap_every: the last of so many blocks is read: 1 for all, 2 for blocks 1, 3, 5, ...
      post_norm: norms behind the branches, and taps normalised behind their linear map, as the
        release has it on EVA.
      mlp_ratio: hidden width of the MLPs over C.
      batch_norm_groups: groups of clips whose statistics are taken together; see `batch_norm`.
      remat: what the backward pass computes again: 'none', 'branches' (convolution, attention and
        MLP, as the release does on EVA), or 'layers'.
      unroll: see `stack`.
      temporal_conv: u = u + conv_time(BN u) is there.
      class_token_shift: attention sees the shifted class token; else the frame's own.

    Raises:
      ValueError: an option that does not fit; the message names the field.
    """

    backbone: Backbone
    dtype: Any
    side_dim: int
    tap_every: int
    post_norm: bool
    mlp_ratio: float
    batch_norm_groups: int
    remat: str
    unroll: bool
    temporal_conv: bool = True
    class_token_shift: bool = True

    def __post_init__(self) -> None:
        if self.side_dim < HEAD_DIM or self.side_dim % HEAD_DIM:
            raise ValueError(
                f'model.side_dim={self.side_dim} must be a multiple of {HEAD_DIM}, the channels of '
                'a head'
            )
        if self.remat not in REMAT:
            raise ValueError(f'model.remat={self.remat!r} is not one of {", ".join(REMAT)}')
        if self.mlp_hidden < 1:
            raise ValueError(
                f'model.mlp_ratio={self.mlp_ratio} of model.side_dim={self.side_dim} leaves no '
                'hidden channel'
            )
        if not self.blocks:
            raise ValueError(
                f'model.tap_every={self.tap_every}: the backbone has {self.backbone.spec.depth} '
                'blocks, so none is read'
            )

    @property
    def mlp_hidden(self) -> int:
        """Hidden width of the MLPs."""
        return round(self.mlp_ratio * self.side_dim)

    @property
    def blocks(self) -> tuple[int, ...]:
        """Blocks of the backbone that are read."""
        every = self.tap_every
        return tuple(range(every - 1, self.backbone.spec.depth, every)) if every > 0 else ()

    @property
    def fields(self) -> dict[str, Any]:
        """Those of `SideNetwork`."""
        return {
            'depth': len(self.blocks),
            'side_dim': self.side_dim,
            'patch_size': self.backbone.spec.patch_size,
            'mlp_hidden': self.mlp_hidden,
            'post_norm': self.post_norm,
            'groups': self.batch_norm_groups,
            'dtype': self.dtype,
            'remat': self.remat,
            'unroll': self.unroll,
            'temporal_conv': self.temporal_conv,
            'class_token_shift': self.class_token_shift,
        }

    def features(
        self, frozen: Tree, video: jax.Array, *, class_token: bool = False
    ) -> dict[str, Tree]:
        """What the side network reads, see `SideNetwork.stream`, of clips (B, T, H, W, 3).

        With `class_token` also that, (B, T, D) behind the last block.
        """
        # What no gradient changes of the norm before a tap is done once, outside of it.
        taps = Taps(
            outputs=self.blocks,
            apart=True,
            standardised=not self.post_norm,
            class_token=class_token,
        )
        # The barrier: as DiST's, the patches are kept as they are.
        patches = jax.lax.optimization_barrier(self.backbone.patches(video.astype(self.dtype)))
        clips = patches.shape[:2]
        frames = patches.reshape(-1, *patches.shape[2:])
        found = self.backbone.encode_image(frozen['visual'], frames, taps, unroll=self.unroll)
        taken = jax.tree.map(
            lambda x: x.reshape(len(self.blocks), *clips, *x.shape[2:]), found['outputs']
        )
        read = {'taps': taken, 'patches': patches}
        return read | (
            {'class_token': found['class_token'].reshape(*clips, -1)} if class_token else {}
        )


def fit_positions(path: str, stored: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The position table of another grid; only that depends on the image size.

    A row behind those of a grid, the class token's, stays as it is.
    """
    if not path.endswith('positional_embedding') or stored.shape[1:] != shape[1:]:
        raise ValueError(f'{path} is {stored.shape} there and {shape} here')
    (there, behind), (side, _) = (_grid(rows) for rows in (stored.shape[0], shape[0]))
    # Resizing is linear in the table: this is what it does to each place alone.
    places = np.eye(there * there, dtype=np.float32)
    resized = resize_positions(np.pad(places, [(1, 0), (0, 0)]), (side, side))[1:]
    table = jnp.matmul(resized, stored[: there * there], precision='highest')
    return jnp.concatenate([table, stored[there * there :]]) if behind else table


def _grid(rows: int) -> tuple[int, int]:
    """The side of the square grid that a table is of, and the rows behind it."""
    side = math.isqrt(rows)
    return side, rows - side * side


def _kept(u: jax.Array) -> jax.Array:
    """The stream (B, T, N, C) as kernels take it.

    A layout is asked for on each device: the partitioner does not split it by itself, and gave
    each of 64 chips all clips.
    """
    return kernels.on_each_device(row_major, split_batch(u))


def shift_class_token(token: jax.Array) -> jax.Array:
    """Class tokens (B, T, C): half of the channels from the next frame, half from the one before.

    Entries from outside of the clip are 0.
    """
    half = token.shape[-1] // 2
    ahead = jnp.pad(token[:, 1:, :half], [(0, 0), (0, 1), (0, 0)])
    behind = jnp.pad(token[:, :-1, half:], [(0, 0), (1, 0), (0, 0)])
    return jnp.concatenate([ahead, behind], axis=-1)


class Tap(nn.Module):
    """What reads frozen tokens (..., D) as tokens of the side network (..., C); see `read`.

    Parameters `norm`, of D channels before the linear map or of C behind it, and `linear`. Before
    it, tokens come without mean and of variance 1 (`build`), and the affine part of the norm goes
    into the linear map.
    """

    features: int
    post_norm: bool
    kernel_init: Initializer
    bias_init: Initializer
    dtype: Dtype

    @nn.compact
    def __call__(self, width: int) -> Tree:
        linear = Affine((self.features,), self.kernel_init, self.bias_init, name='linear')((width,))
        kernel, bias = linear['kernel'], linear['bias']
        norm = Scale(name='norm')(self.features if self.post_norm else width)
        if not self.post_norm:
            kernel, bias = norm['scale'][:, None] * kernel, norm['bias'] @ kernel + bias
        linear = {'kernel': kernel.astype(self.dtype), 'bias': bias.astype(self.dtype)}
        return linear | ({'norm': norm} if self.post_norm else {})


def read(tap: Tree, tokens: jax.Array) -> jax.Array:
    """Frozen tokens by what `Tap` gives."""
    y = einsum('...d,dc->...c', tokens.astype(tap['kernel'].dtype), tap['kernel']) + tap['bias']
    return layer_norm(y, **tap['norm']) if 'norm' in tap else y


class TemporalConv(nn.Module):
    """The parameters of a linear map, a depthwise convolution over 3 frames and a linear map.

    They are `pw_1`, `dw`, `pw_2`; nothing non-linear lies between them. See `side_kernel`.
    """

    kernel_init: Initializer
    depthwise_init: Initializer
    dtype: Dtype

    @nn.compact
    def __call__(self, width: int) -> Tree:
        def linear(name: str) -> Tree:
            affine = Affine((width,), self.kernel_init, uniform(width), name=name)((width,))
            return jax.tree.map(lambda leaf: leaf.astype(self.dtype), affine)

        dw = Affine((width,), self.depthwise_init, uniform(STEM_FRAMES), name='dw')
        return {'pw_1': linear('pw_1'), 'dw': dw((STEM_FRAMES,)), 'pw_2': linear('pw_2')}


class FrameAttention(nn.Module):
    """The parameters of attention of patches to patches and one more token; see `side_kernel`.

    `qkv` with kernel (C, 3, h, d) and bias (3, h, d); `out` with kernel (h, d, C) and bias (C,).
    """

    qkv_init: Initializer
    out_init: Initializer
    bias_init: Initializer

    @nn.compact
    def __call__(self, width: int) -> Tree:
        heads = (width // HEAD_DIM, HEAD_DIM)
        qkv = Affine((3, *heads), self.qkv_init, self.bias_init, name='qkv')
        out = Affine((width,), self.out_init, self.bias_init, name='out')
        return {'qkv': qkv((width,)), 'out': out(heads)}


class Scale(nn.Module):
    """The parameters of a norm: scale and bias (width,)."""

    @nn.compact
    def __call__(self, width: int) -> dict[str, jax.Array]:
        return {
            'scale': self.param('scale', nn.initializers.ones, (width,)),
            'bias': self.param('bias', nn.initializers.zeros, (width,)),
        }


class SideMlp(nn.Module):
    """The parameters of two linear maps with exact GELU between: `c_fc` and `c_proj`.

    See `side_kernel`.
    """

    hidden_dim: int
    kernel_inits: tuple[Initializer, Initializer]
    bias_inits: tuple[Initializer, Initializer]
    dtype: Dtype

    @nn.compact
    def __call__(self, width: int) -> Tree:
        names, sizes = ('c_fc', 'c_proj'), (width, self.hidden_dim, width)
        mlp = {
            name: Affine((outputs,), *inits, name=name)((inputs,))
            for name, inputs, outputs, *inits in zip(
                names, sizes, sizes[1:], self.kernel_inits, self.bias_inits
            )
        }
        return jax.tree.map(lambda leaf: leaf.astype(self.dtype), mlp)


class SideLayer(nn.Module):
    """What the side network does beside one tapped block; the carry is the stream (B, T, N, C)."""

    mlp_hidden: int
    post_norm: bool
    groups: int
    train: bool
    record: bool
    retrieval: bool
    temporal_conv: bool
    class_token_shift: bool
    dtype: Dtype

    @nn.compact
    def __call__(
        self,
        s: jax.Array,
        tapped: Tree,
        positions: jax.Array,
        mask: jax.Array | None,
        taps: jax.Array | None,
    ) -> tuple[jax.Array, dict[str, jax.Array] | None]:
        """Does it.

        Args:
          s: the stream.
          tapped: frozen tokens, see `SideNetwork`, of this layer; instead of `patches`, `layer`,
            its number, where there are `taps`.
          positions: table (N or N + 1, C).
          mask: (B,) or None.
          taps: the patches of all layers, (K, B, T, N, D), or None.

        Returns:
          The stream and, to be recorded, what this layer did: see `SideNetwork`.
        """
        width, places = s.shape[-1], s.shape[2]
        inits = self._initial_values(width, tapped['token'].shape[-1])

        def batch_norm(name: str, x: jax.Array, *options: Any) -> jax.Array:
            return BatchNorm(self.groups, name=name)(x, mask, self.train, *options)

        def add(
            name: str,
            branch: side_kernel.Branch,
            params: Tree,
            x: jax.Array,
            held: side_kernel.Held | None = None,
            moments: side_kernel.Moments | None = None,
        ) -> tuple[jax.Array, jax.Array | None]:
            """x plus a branch, its norm before or behind it; and, to be recorded, the branch."""
            if self.post_norm:
                found = branch.plain(x, params)
                return x + batch_norm(name, found), found
            if self.record:
                found = branch.plain(batch_norm(name, x), params)
                return x + found, found
            into = functools.partial(side_kernel.add, branch, params, held)
            return batch_norm(name, x, into, moments), None

        tap = Tap(width, self.post_norm, **inits['tap'], dtype=self.dtype, name='tap')(
            tapped['token'].shape[-1]
        )
        token = read(tap, split_batch(tapped['token']))
        held = moments = None
        if taps is None:
            u = 0.5 * s + 0.5 * read(tap, split_batch(tapped['patches']))
        else:
            held, moments = side_kernel.mix(s, taps, tapped['layer'], tap['kernel'], tap['bias'])
            u = held.x
        u = mixed = mark(_kept(u), STREAM)

        moved = None
        if self.temporal_conv:
            conv = TemporalConv(**inits['conv'], dtype=self.dtype, name='conv')(width)
            u, moved = add('bn_1', side_kernel.CONV, conv, u, held, moments)
            u = mark(_kept(u), STREAM)

        shifted = shift_class_token(token) if self.class_token_shift else token
        positions = positions.astype(self.dtype)
        looked_at = shifted[:, :, None]
        if len(positions) > places:
            looked_at = looked_at + positions[places:]
        norm = Scale(name='ln')(width)
        attn = FrameAttention(**inits['attn'], name='attn')(width)
        looking, seen, held, moments = (u, looked_at, positions[:places]), None, None, None
        if self.post_norm:
            seen = side_kernel.looks_at(*looking, None, attn)
            u = u + layer_norm(seen, norm['scale'], norm['bias'])
        elif self.record or not side_kernel.attention_fits(u, attn):
            seen = side_kernel.looks_at(*looking, norm, attn)
            u = u + seen
        else:
            held, moments = side_kernel.attend(*looking, norm, attn)
            u = held.x
        u = mark(_kept(u), STREAM)

        mlp = SideMlp(self.mlp_hidden, **inits['mlp'], dtype=self.dtype, name='mlp')(width)
        s = _kept(add('bn_2', side_kernel.MLP, mlp, u, held, moments)[0])
        if not self.record:
            return s, None
        recorded = {'mixed': mixed, 'conv': moved, 'attn': seen, 'stream': s}
        return s, {'class': token, 'shifted': shifted, **recorded}

    def _initial_values(self, width: int, tap_width: int) -> dict[str, dict[str, Any]]:
        """Source: what the release's rules do, on EVA, and on CLIP for either use."""
        normal, zeros = nn.initializers.normal, nn.initializers.zeros
        fan_ins = uniform(width), uniform(self.mlp_hidden)
        by_fan_in = {
            'tap': {'kernel_init': uniform(tap_width), 'bias_init': uniform(tap_width)},
            'conv': {'kernel_init': uniform(width), 'depthwise_init': uniform(STEM_FRAMES)},
        }
        if self.post_norm:
            return by_fan_in | {
                'attn': dict.fromkeys(('qkv_init', 'out_init', 'bias_init'), uniform(width)),
                'mlp': {'kernel_inits': fan_ins, 'bias_inits': fan_ins},
            }
        attention = {'qkv_init': normal(width**-0.5), 'bias_init': zeros}
        if self.retrieval:
            small = normal(0.02)
            return {
                'tap': {'kernel_init': small, 'bias_init': zeros},
                'conv': {'kernel_init': small, 'depthwise_init': normal(width**-0.5)},
                'attn': attention | {'out_init': small},
                'mlp': {'kernel_inits': (small, small), 'bias_inits': (zeros, zeros)},
            }
        # Twelve layers, two branches each: a constant in the release, in ViT-L/14's networks too.
        out = normal((24 * width) ** -0.5)
        return by_fan_in | {
            'attn': attention | {'out_init': out},
            'mlp': {'kernel_inits': (normal((2 * width) ** -0.5), out), 'bias_inits': fan_ins},
        }


class SideNetwork(nn.Module):
    """The trunk of the trainable part; see `Beside` for the options and the module for equations.

    Networks are classes that inherit from it and say what follows the stream.
    """

    depth: int
    side_dim: int
    patch_size: int
    mlp_hidden: int
    post_norm: bool
    groups: int
    dtype: Dtype
    remat: str
    unroll: bool
    temporal_conv: bool
    class_token_shift: bool

    def stream(
        self,
        features: Tree,
        mask: jax.Array | None,
        train: bool,
        *,
        record: bool = False,
        retrieval: bool = False,
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Runs the side network; for the compact `__call__` of a class.

        Args:
          features: `patches` (B, T, N, p*p*3) and `taps`: `token` (K, B, T, D) and `patches`
            (K, B, T, N, D), with pre-norm layers standardised over D.
          mask: (B,), 1 where a clip is real; the others count in no statistics.
          train: normalise by the batch, and move the running statistics.
          record: also return what every layer did.
          retrieval: initial values are those for retrieval, and pre-norm the shifted class token
            has a position, too, the last row of the table.

        Returns:
          The stream (B, T, N, C), before any last norm, and what was recorded: `stem`
          (B, T, N, C) and `layers`, of every layer, stacked: `class`, `shifted` (K, B, T, C),
          `mixed`, `conv`, `attn` (before a norm behind them), `stream` (K, B, T, N, C).
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
        s = stem = self.batch_norm('stem_bn', s, mask, train)
        places = s.shape[2] + (retrieval and not self.post_norm)
        positions = self.param(
            'positional_embedding',
            nn.initializers.normal(0.02 if self.post_norm else 0.01),
            (places, self.side_dim),
        )
        taps, stacked = features['taps'], None
        if not self.post_norm and side_kernel.mix_fits(s, taps['patches']):
            stacked = taps['patches']
            taps = {'token': taps['token'], 'layer': jnp.arange(self.depth)}
        layers = scan_trainable(
            SideLayer,
            self.depth,
            remat=self.remat != 'none',
            unroll=self.unroll,
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
            keep=REMAT[self.remat],
        )
        s, seen = layers(
            mlp_hidden=self.mlp_hidden,
            post_norm=self.post_norm,
            groups=self.groups,
            train=train,
            record=record,
            retrieval=retrieval,
            temporal_conv=self.temporal_conv,
            class_token_shift=self.class_token_shift,
            dtype=self.dtype,
            name='layers',
        )(s, taps, positions, mask, stacked)
        return s, {'stem': stem, 'layers': seen} if record else {}

    def batch_norm(self, name: str, x: jax.Array, mask: jax.Array | None, train: bool) -> jax.Array:
        """A norm by the batch, of this name."""
        return BatchNorm(self.groups, name=name)(x, mask, train=train)
