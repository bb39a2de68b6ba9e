"""EVL: a learned query reads the last blocks of a frozen CLIP through a light decoder.

Source: Lin et al., "Frozen CLIP Models are Efficient Video Learners", ECCV 2022
(arXiv:2208.03550), section 3; released code of the authors.

    x = cls token                                          (B, C)
    for the last `depth` blocks, F the frozen output (B, T, L, C), q and k from inside the block:
        Y = F + conv_time(F) + positions + relative(q, k)  local temporal modules
        x = x + attention of LN x over all tokens of LN Y
        x = x + FC2 dropout(quick_gelu(FC1 LN x))
    logits = linear(dropout(LN x))

`relative` weighs learned vectors of the 2-D offset between patches of neighbouring frames with the
frozen attention between them, mean over heads (paper section 3.3, "temporal cross attention").

Differs: with one query a clip, the key projection is applied to the query and the value projection
to the mixture, so no token is projected; the key bias then drops out exactly. Relative sums are
matrix products, see `relative_sum`. In bfloat16 mode memory tokens are rounded to bfloat16, where
the release keeps float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dist_jax.models import clip_reading, heads
from dist_jax.models.api import Model, ParamGroup, Tree
from dist_jax.models.backbone import Backbone, Taps
from dist_jax.models.frozen import Frozen
from dist_jax.models.layers import (
    Affine,
    Dtype,
    LayerNorm,
    Linear,
    einsum,
    einsum_to_float32,
    layer_norm,
    query_attention,
    quick_gelu,
    read_memory,
    uniform,
)
from dist_jax.models.neighbour_kernel import neighbour_attention
from dist_jax.models.stack import Slot, scan_trainable
from dist_jax.models.time_conv import depthwise
from dist_jax.sharding import ShardingRule, split_batch

# Source: the release decays every trained tensor: biases, norms, tables and the class token too.
PARAM_GROUPS = (ParamGroup(r'.', weight_decay=1.0),)

SHARDING_RULES = (
    ShardingRule(r'attn/[qkv]/kernel$', ('fsdp', 'tensor')),
    ShardingRule(r'attn/[qkv]/bias$', ('tensor',)),
    ShardingRule(r'attn/out/kernel$', ('tensor', 'fsdp')),
    ShardingRule(r'mlp/c_fc/kernel$', ('fsdp', 'tensor')),
    ShardingRule(r'mlp/c_fc/bias$', ('tensor',)),
    ShardingRule(r'mlp/c_proj/kernel$', ('tensor', 'fsdp')),
    ShardingRule(r'classifier/kernel$', ('fsdp', None)),
    ShardingRule(r'temporal/(conv/kernel|relative|positions)$', ('fsdp',)),
    ShardingRule(r'(bias|scale|cls_token)$'),
)

xavier_uniform = nn.initializers.xavier_uniform()


def build(
    backbone: Backbone,
    *,
    num_classes: tuple[int, ...],
    num_frames: int,
    head: str = 'linear',
    dtype: Any = jnp.bfloat16,
    depth: int = 4,
    qkv_dim: int = 768,
    num_heads: int = 12,
    mlp_ratio: float = 4.0,
    mlp_dropout: float = 0.5,
    head_dropout: float = 0.5,
    temporal_conv: bool = True,
    temporal_positions: bool = True,
    temporal_cross_attention: bool = True,
    cls_token_std: float = 0.0,
    remat: bool = False,
    unroll: bool = False,
) -> Model:
    """EVL on a frozen backbone.

    Args:
      backbone: the frozen one.
      num_classes: classes of each head.
      num_frames: T, frames of a clip; the backbone sees all.
      head: 'linear' only; EVL has no text tower.
      dtype: compute dtype of both networks; norms, softmax, sums, query and loss are float32.
      depth: D, decoder layers; they read the last D blocks of the backbone, shallow to deep.
      qkv_dim: E, width of the decoder's attention.
      num_heads: of the decoder's attention.
      mlp_ratio: hidden width of the decoder's MLPs over the backbone's width.
      mlp_dropout: inside the decoder's MLPs.
      head_dropout: before the classifier.
      temporal_conv: add the depthwise convolution over time.
      temporal_positions: add a table of frame positions.
      temporal_cross_attention: add the relative sums over neighbouring frames.
      cls_token_std: of the initial query; the release starts from zeros (its routine for 0.02 is
        never called).
      remat: recompute a layer in the backward pass.
      unroll: see `stack`.

    Raises:
      ValueError: an option that does not fit; the message names the field.
    """
    if head != 'linear':
        raise ValueError(f'model.head={head!r}: EVL has a linear head only')
    spec = backbone.spec
    if not 1 <= depth <= spec.depth:
        raise ValueError(
            f'model.depth={depth}: the backbone has {spec.depth} blocks to read, and a decoder '
            'layer reads one'
        )
    if num_heads < 1 or qkv_dim % num_heads:
        raise ValueError(
            f'model.qkv_dim={qkv_dim} is not a multiple of model.num_heads={num_heads}'
        )
    for name, rate in (('mlp_dropout', mlp_dropout), ('head_dropout', head_dropout)):
        if not 0 <= rate < 1:
            raise ValueError(f'model.{name}={rate} must be at least 0 and below 1')
    blocks = tuple(range(spec.depth - depth, spec.depth))

    def neighbours(queries: jax.Array, keys: jax.Array) -> jax.Array:
        return neighbour_attention(queries, keys, num_frames)

    taps = Taps(
        outputs=blocks,
        attention=blocks if temporal_cross_attention else (),
        summary=neighbours,
    )
    net = EvlNet(
        depth=depth,
        num_frames=num_frames,
        grid=(spec.grid, spec.grid),
        qkv_dim=qkv_dim,
        num_heads=num_heads,
        mlp_hidden=round(mlp_ratio * spec.width),
        mlp_dropout=mlp_dropout,
        head_dropout=head_dropout,
        temporal_conv=temporal_conv,
        temporal_positions=temporal_positions,
        temporal_cross_attention=temporal_cross_attention,
        cls_token_std=cls_token_std,
        head=heads.Head(
            head,
            tuple(num_classes),
            kernel_init=uniform(spec.width),
            bias_init=uniform(spec.width),
        ),
        dtype=dtype,
        remat=remat,
        unroll=unroll,
    )

    def features(frozen: Tree, batch: Mapping[str, jax.Array]) -> Tree:
        patches = backbone.patches(batch['video'].astype(dtype))
        frames = patches.reshape(-1, *patches.shape[2:])
        found = backbone.encode_image(frozen['visual'], frames, taps, unroll=unroll)
        stream = found['outputs']
        found['outputs'] = stream.reshape(depth, patches.shape[0], -1, *stream.shape[2:])
        return found

    def attention(variables: Tree, inputs: Tree) -> jax.Array:
        _, seen = net.apply(variables, inputs, mutable=['intermediates'])
        weights = seen['intermediates']['layers']['attn']['weights'][0]  # (D, B, h, T*L)
        return patch_shares(weights.mean((0, 2)), num_frames, spec.grid)

    return Model(
        net=net,
        dtype=dtype,
        pixels=backbone.kind.pixels,
        param_groups=PARAM_GROUPS,
        sharding_rules=SHARDING_RULES,
        frozen=Frozen(backbone, dtype, features),
        attention=attention,
    )


def patch_shares(shares: jax.Array, num_frames: int, grid: int) -> jax.Array:
    """`Model.attention` from the shares of all tokens of a clip.

    Args:
      shares: float32 (B, T * M), M tokens of a frame, of which the last are the patches.
      num_frames: T.
      grid: patches along one side.
    """
    frames = shares.reshape(len(shares), num_frames, -1)[..., -(grid**2) :]
    return frames.reshape(*frames.shape[:2], grid, grid)


def relative_sum(attention: jax.Array, tables: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """Sums of learned vectors of the offset between two patches, weighted by attention.

    X[m] = sum over directions s and key patches n of attention[s, m, n] tables[s, offset(m, n)],
    offset(m, n) = (i_m - i_n + rows - 1) (2 columns - 1) + (j_m - j_n + columns - 1).

    Never builds the (N, N, C) vectors of all pairs. A product with constant zeros and ones moves
    the weights of a row of keys to their column offsets, (columns) -> (2 columns - 1); for one row
    of queries the rows of keys are then neighbouring rows of the table, so that what is left is
    one product a row with a slice of the table.

    Args:
      attention: (B, T, 2, N, N), N = rows * columns, row-major.
      tables: (2, (2 rows - 1) (2 columns - 1), C).
      grid: (rows, columns).

    Returns:
      float32 (B, T, rows, columns, C).
    """
    rows, columns = grid
    dtype, channels = attention.dtype, tables.shape[-1]
    width = 2 * columns - 1
    # Tables reversed in both axes: the key's position minus the query's then counts upwards.
    place = np.zeros((columns, rows, columns, rows, width), np.float32)
    query, row, key = np.indices((columns, rows, columns))
    place[query, row, key, row, key - query + columns - 1] = 1
    place = place.reshape(columns, rows * columns, rows * width)
    weights = attention.reshape(*attention.shape[:2], 2, rows, columns, rows * columns)
    weights = einsum('btsijn,jno->btsijo', weights, jnp.asarray(place, dtype))
    tables = tables[:, ::-1].reshape(2, 2 * rows - 1, width, channels).astype(dtype)
    slices = jnp.stack([tables[:, rows - 1 - i : 2 * rows - 1 - i] for i in range(rows)], axis=1)
    slices = slices.reshape(2, rows, rows * width, channels)
    return einsum_to_float32('btsijo,sioc->btijc', weights, slices)


class Terms(NamedTuple):
    """What a decoder layer adds to the frozen tokens of a block.

    Attributes:
      conv: `kernel` (3, C) and `bias` (C,) of the depthwise convolution over time; None without.
      positions: (T, C), of frames; None without.
      moved: float32 (B, T, rows, columns, C), relative sums, of patches; None without.
    """

    conv: Tree | None
    positions: jax.Array | None
    moved: jax.Array | None


class TemporalModules(nn.Module):
    """What a decoder layer adds to the frozen tokens of a block.

    Parameters: `conv` with kernel (3, C) and bias (C,); `positions` (T, C); `relative` (2, M, C),
    of the frame before and the frame after.
    """

    grid: tuple[int, int]
    conv: bool
    positions: bool
    cross_attention: bool

    @nn.compact
    def __call__(self, num_frames: int, channels: int, attention: jax.Array | None) -> Terms:
        """Args: T, C, and with cross-attention that between neighbours (B, T, 2, N, N)."""
        conv = positions = moved = None
        if self.conv:
            conv = Affine((channels,), uniform(3), uniform(3), name='conv')((3,))
        if self.positions:
            positions = self.param('positions', nn.initializers.zeros, (num_frames, channels))
        if self.cross_attention:
            rows, columns = self.grid
            shape = (2, (2 * rows - 1) * (2 * columns - 1), channels)
            tables = self.param('relative', nn.initializers.zeros, shape)
            moved = relative_sum(attention, tables, self.grid)
        return Terms(conv, positions, moved)


def memory_of(frozen: jax.Array, terms: Terms, norm: Tree) -> jax.Array:
    """Frozen tokens (B, T, L, C) -> the memory of a decoder layer (B, T*L, C).

    Without relative sums, which have no row for it, the class token may be left out.
    """
    dtype, frozen = frozen.dtype, frozen.astype(jnp.float32)
    # All terms read the frozen tokens, none another term.
    total = frozen
    if terms.conv is not None:
        total += depthwise(frozen, **terms.conv)
    if terms.positions is not None:
        total += terms.positions[:, None]
    if terms.moved is not None:
        moved = terms.moved.reshape(*total.shape[:2], -1, total.shape[-1])
        total += jnp.pad(moved, [(0, 0), (0, 0), (1, 0), (0, 0)])  # no class row
    memory = layer_norm(total.astype(dtype), **norm)
    return memory.reshape(memory.shape[0], -1, memory.shape[-1])


def read_frames(query: jax.Array, slot: Slot, terms: Terms, norm: Tree) -> jax.Array:
    """`layers.read_memory` of `memory_of` a slot of (K, B*T, L, C), which `clip_reading` fits."""
    channels = slot.stack.shape[-1]
    taps = jnp.zeros((3, channels)).at[1].set(1)
    shift = jnp.zeros((slot.stack.shape[1] // query.shape[0], channels))
    if terms.conv is not None:
        taps, shift = taps + terms.conv['kernel'], shift + terms.conv['bias']
    if terms.positions is not None:
        shift += terms.positions
    moved = terms.moved
    if moved is not None:
        moved = moved.reshape(-1, *moved.shape[2:])
    return clip_reading.read_clip(slot, moved, taps, shift, norm, query)


class Norm(nn.Module):
    """The parameters of a norm of that many channels, `scale` and `bias`."""

    @nn.compact
    def __call__(self, channels: int) -> Tree:
        return {
            'scale': self.param('scale', nn.initializers.ones, (channels,)),
            'bias': self.param('bias', nn.initializers.zeros, (channels,)),
        }


class DecoderAttention(nn.Module):
    """Attention of one query a clip, (B, C), over memory tokens -> (B, C).

    The memory is (B, M, C), or what `read` takes in its place; see `layers.query_attention`.
    Parameters `q`, `k`, `v` with kernel (C, E) and bias (E,), heads being contiguous channels;
    `out` with kernel (E, C) and bias (C,). Sows `weights`, float32 (B, h, M), into 'intermediates'.
    """

    qkv_dim: int
    num_heads: int
    dtype: Dtype

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        memory: Any,
        read: Callable[[jax.Array, Any], tuple[jax.Array, Any]] = read_memory,
    ) -> jax.Array:
        width = x.shape[-1]
        q_kernel, q_bias = self._projection('q', width)
        k_kernel, _ = self._projection('k', width)
        v_kernel, v_bias = self._projection('v', width)
        q = einsum('bc,che->bhe', x.astype(self.dtype), q_kernel) + q_bias
        v, weights = query_attention(q, memory, k_kernel, v_kernel, v_bias, read)
        if weights is not None:
            self.sow('intermediates', 'weights', weights)
        out = Linear(width, kernel_init=xavier_uniform, dtype=self.dtype, name='out')
        return out(v.reshape(v.shape[0], self.qkv_dim))

    def _projection(self, name: str, width: int) -> tuple[jax.Array, jax.Array]:
        """Kernel (C, h, e) and bias (h, e) in the compute dtype."""
        found = Affine((self.qkv_dim,), xavier_uniform, name=name)((width,))
        kernel, bias = (found[part].astype(self.dtype) for part in ('kernel', 'bias'))
        return kernel.reshape(width, self.num_heads, -1), bias.reshape(self.num_heads, -1)


class DecoderMlp(nn.Module):
    """Two linear maps with QuickGELU and dropout between: parameters `c_fc` and `c_proj`."""

    hidden_dim: int
    dropout: float
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        options = {
            'kernel_init': xavier_uniform,
            'bias_init': nn.initializers.normal(1e-6),
            'dtype': self.dtype,
        }
        hidden = quick_gelu(Linear(self.hidden_dim, **options, name='c_fc')(x))
        hidden = nn.Dropout(self.dropout, deterministic=not train)(hidden)
        return Linear(x.shape[-1], **options, name='c_proj')(hidden)


class DecoderLayer(nn.Module):
    """One decoder layer beside one frozen block; the carry is the query x (B, C) float32."""

    grid: tuple[int, int]
    qkv_dim: int
    num_heads: int
    mlp_hidden: int
    mlp_dropout: float
    temporal_conv: bool
    temporal_positions: bool
    temporal_cross_attention: bool
    train: bool
    dtype: Dtype

    @nn.compact
    def __call__(
        self, x: jax.Array, index: jax.Array, features: Tree
    ) -> tuple[jax.Array, jax.Array]:
        """x, number of the layer, features of all (see `EvlNet`) -> x twice: carry and output."""
        x = split_batch(x)
        outputs = features['outputs'].astype(self.dtype)
        _, _, num_frames, _, channels = outputs.shape
        stack = outputs.reshape(outputs.shape[0], -1, *outputs.shape[3:])
        # Kernels keep no weights, which somebody may want to see.
        looked_at = self.is_mutable_collection('intermediates')
        fast = clip_reading.fits(stack, num_frames) and not looked_at
        maps = features.get('attention')
        if maps is not None:
            maps = jax.lax.dynamic_index_in_dim(maps, index, keepdims=False)
        terms = TemporalModules(
            self.grid,
            self.temporal_conv,
            self.temporal_positions,
            self.temporal_cross_attention,
            name='temporal',
        )(num_frames, channels, maps)
        norm = Norm(name='norm3')(channels)
        query = LayerNorm(name='norm1')(x)
        attention = DecoderAttention(self.qkv_dim, self.num_heads, self.dtype, name='attn')
        if fast:
            memory = Slot(stack, index), terms, norm
            x = x + attention(query, memory, lambda q, m: (read_frames(q, *m), None))
        else:
            frozen = jax.lax.dynamic_index_in_dim(outputs, index, keepdims=False)
            x = x + attention(query, memory_of(frozen, terms, norm))
        mlp = DecoderMlp(self.mlp_hidden, self.mlp_dropout, self.dtype, name='mlp')
        x = x + mlp(LayerNorm(name='norm2')(x), train=self.train)
        return x, x


class EvlNet(nn.Module):
    """The trainable part of EVL. See `build` for the options and the module for the equations."""

    depth: int
    num_frames: int
    grid: tuple[int, int]
    qkv_dim: int
    num_heads: int
    mlp_hidden: int
    mlp_dropout: float
    head_dropout: float
    temporal_conv: bool
    temporal_positions: bool
    temporal_cross_attention: bool
    cls_token_std: float
    head: heads.Head
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
        """Runs the decoder and the head.

        Args:
          features: `outputs` (D, B, T, L, C), and with cross-attention `attention`
            (D, B, T, 2, N, N), see `neighbour_attention`.
          mask: accepted for the common interface; EVL has no statistics.
          train: dropout on; needs the rng 'dropout'.
          intermediates: also return the query after every layer.

        Returns:
          `logits`, tuple of float32 (B, num_classes); `embedding` float32 (B, C), after the head's
          norm; with `intermediates` also `queries` (D, B, C).
        """
        del mask
        batch, num_frames, _, width = features['outputs'].shape[1:]
        if num_frames != self.num_frames:
            raise ValueError(
                f'a clip of {num_frames} frames for a model of num_frames={self.num_frames}'
            )
        init = nn.initializers.normal(self.cls_token_std)
        query = self.param('cls_token', init, (width,))
        x = jnp.broadcast_to(query, (batch, width))
        layers = scan_trainable(
            DecoderLayer,
            self.depth,
            remat=self.remat,
            unroll=self.unroll,
            in_axes=(0, nn.broadcast),
            keep=(clip_reading.MEMORY,),
        )
        x, queries = layers(
            grid=self.grid,
            qkv_dim=self.qkv_dim,
            num_heads=self.num_heads,
            mlp_hidden=self.mlp_hidden,
            mlp_dropout=self.mlp_dropout,
            temporal_conv=self.temporal_conv,
            temporal_positions=self.temporal_positions,
            temporal_cross_attention=self.temporal_cross_attention,
            train=train,
            dtype=self.dtype,
            name='layers',
        )(x, jnp.arange(self.depth), features)
        embedding = LayerNorm(name='head_norm')(x)
        kept = nn.Dropout(self.head_dropout, deterministic=not train)(embedding)
        outputs: dict[str, Any] = {'embedding': embedding, 'logits': self.head(kept, features)}
        return outputs | ({'queries': queries} if intermediates else {})
