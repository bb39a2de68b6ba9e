"""STS: 3D CNNs that are trained on images first, and then on videos with separable convolutions.

Source: Li et al., "In Defense of Image Pre-Training for Spatiotemporal Recognition", ECCV 2022,
arXiv:2205.01721, and the authors' release, which keeps each network twice: for images and for
videos. Here both are one: a picture is a clip of one frame, on which only the centre temporal taps
of the kernels have anything to read. All kernels stay in the tree, so what was trained on pictures
goes into the video model as it is.

Differs: the release's image side of R(2+1)D never trains its stem, by an oversight; ours does. Its
drop path only reaches shortcuts; `stochastic_depth` here drops residual branches. Batch statistics
are of groups of clips, see `batch_norm`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dist_jax.models import conv3d, heads
from dist_jax.models.api import Model, ParamGroup, Tree
from dist_jax.models.batch_norm import BatchNorm
from dist_jax.models.layers import (
    Dtype,
    Initializer,
    Linear,
    Pixels,
    as_pixels,
    is_settled,
    uniform,
    widened,
)
from dist_jax.models.stack import STATISTICS
from dist_jax.sharding import ShardingRule

PIXELS = Pixels((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
FORMS = ('image', 'video')
STS = (*conv3d.MODES, 'off')
REMAT = ('none', 'blocks')

PARAM_GROUPS = (
    ParamGroup(r'/kernel$', weight_decay=1.0),
    ParamGroup(r'/(bias|scale)$', weight_decay=0.0),
)

SHARDING_RULES = (
    ShardingRule(r'(conv_s|classifier|fc1)/kernel$', ('fsdp', None)),
    ShardingRule(r'/kernel$', ('fsdp',)),
    ShardingRule(r'/(bias|scale)$'),
)


@dataclasses.dataclass(frozen=True)
class UnitSpec:
    """One convolution, its batch norm and its activation.

    Attributes:
      name: of the module, as in the release.
      features: channels that come out.
      kernel: (kt, kh, kw).
      stride: along height and width.
      activation: 'relu', 'swish' or '' for none.
      depthwise: one filter a channel.
      factorised: 1 x k x k into fewer channels, norm, ReLU, then kt x 1 x 1: R(2+1)D's.
      separable: whether STS takes its place.
      squeeze: channels of a squeeze-and-excitation after the norm; 0 for none.
      norm: whether it has one.
    """

    name: str
    features: int
    kernel: tuple[int, int, int] = (1, 1, 1)
    stride: int = 1
    activation: str = 'relu'
    depthwise: bool = False
    factorised: bool = False
    separable: bool = False
    squeeze: int = 0
    norm: bool = True


Units = tuple[UnitSpec, ...]


def csn_block(stage: int, index: int, width: int, stride: int) -> Units:
    """ir-CSN: the bottleneck's convolution over space and time is depthwise."""
    del stage, index
    return (
        UnitSpec('conv1', width),
        UnitSpec('conv2', width, (3, 3, 3), stride, depthwise=True, separable=True),
        UnitSpec('conv3', 4 * width, activation=''),
    )


def slow_block(stage: int, index: int, width: int, stride: int) -> Units:
    """SlowOnly and the slow pathway: the last two stages see three frames."""
    del index
    return _bottleneck(3 if stage >= 2 else 1, width, stride)


def fast_block(stage: int, index: int, width: int, stride: int) -> Units:
    """The fast pathway: all stages see three frames."""
    del stage, index
    return _bottleneck(3, width, stride)


def _bottleneck(frames: int, width: int, stride: int) -> Units:
    return (
        UnitSpec('conv1', width, (frames, 1, 1), separable=frames > 1),
        UnitSpec('conv2', width, (1, 3, 3), stride),
        UnitSpec('conv3', 4 * width, activation=''),
    )


def r2plus1d_block(stage: int, index: int, width: int, stride: int) -> Units:
    """R(2+1)D: two factorised convolutions."""
    del stage, index
    both = {'kernel': (3, 3, 3), 'factorised': True, 'separable': True}
    return (
        UnitSpec('conv1', width, stride=stride, **both),
        UnitSpec('conv2', width, activation='', **both),
    )


def x3d_block(stage: int, index: int, width: int, stride: int) -> Units:
    """X3D: an inverted bottleneck, depthwise inside; every second block weighs its channels."""
    del stage
    inner = int(2.25 * width)
    squeeze = _squeezed(inner) if index % 2 == 0 else 0
    return (
        UnitSpec('conv1', inner),
        UnitSpec(
            *('conv2', inner, (3, 3, 3), stride, 'swish'),
            depthwise=True,
            separable=True,
            squeeze=squeeze,
        ),
        UnitSpec('conv3', width, activation=''),
    )


def _squeezed(channels: int) -> int:
    """A sixteenth of the channels as a multiple of 8, not below nine tenths of it."""
    wanted = channels / 16
    found = max(8, int(wanted + 4) // 8 * 8)
    return found + 8 if found < 0.9 * wanted else found


@dataclasses.dataclass(frozen=True)
class PathwaySpec:
    """A residual network that keeps the number of frames.

    Attributes:
      stem: its first convolutions.
      pool: whether a max pool of 3 x 3, stride 2, follows them.
      block: (stage, index, width, stride) -> units of a block; the width is the stage's.
      widths: of the stages.
      depths: blocks of the stages.
      strides: of the first block of each.
      last: units behind the stages.
      eps: of the batch norms but those inside of factorised convolutions.
      zero_last: whether blocks of a video network start as identities: their last scale is 0.
    """

    stem: Units
    pool: bool
    block: Callable[[int, int, int, int], Units]
    widths: tuple[int, ...]
    depths: tuple[int, ...]
    strides: tuple[int, ...] = (1, 2, 2, 2)
    last: Units = ()
    eps: float = 1e-5
    zero_last: bool = False


@dataclasses.dataclass(frozen=True)
class NetworkSpec:
    """A network of the table.

    Attributes:
      pathway: the only one, or the slow one.
      fast: the fast one; None where there is one.
      ratio: frames of the fast pathway for one of the slow.
      fusion_kernel: frames that the convolutions from fast to slow see.
      hidden: channels between pooling and classifier; 0 for none.
    """

    pathway: PathwaySpec
    fast: PathwaySpec | None = None
    ratio: int = 1
    fusion_kernel: int = 0
    hidden: int = 0


RESNET50 = (3, 4, 6, 3)


def _doubled(width: int, stages: int) -> tuple[int, ...]:
    return tuple(width * 2**stage for stage in range(stages))


def csn(width: int = 64, depths: tuple[int, ...] = RESNET50, stem_size: int = 7) -> NetworkSpec:
    """ir-CSN-50; the stem's kernel is 3 x 7 x 7."""
    stem = (UnitSpec('conv1', width, (3, stem_size, stem_size), 2),)
    widths = _doubled(width, len(depths))
    return NetworkSpec(PathwaySpec(stem, True, csn_block, widths, depths, eps=1e-3))


def r2plus1d(width: int = 64, depths: tuple[int, ...] = RESNET50) -> NetworkSpec:
    """R(2+1)D-34."""
    stem = (UnitSpec('conv1', width, (3, 7, 7), 2, factorised=True, separable=True),)
    widths = _doubled(width, len(depths))
    return NetworkSpec(PathwaySpec(stem, True, r2plus1d_block, widths, depths, eps=1e-3))


def slowonly(width: int = 64, depths: tuple[int, ...] = RESNET50) -> NetworkSpec:
    """SlowOnly-50."""
    return NetworkSpec(_slow(width, depths))


def _slow(width: int, depths: tuple[int, ...]) -> PathwaySpec:
    stem = (UnitSpec('conv1', width, (1, 7, 7), 2),)
    widths = _doubled(width, len(depths))
    return PathwaySpec(stem, True, slow_block, widths, depths, zero_last=True)


def slowfast(
    ratio: int,
    fusion_kernel: int,
    width: int = 64,
    fast_width: int = 8,
    depths: tuple[int, ...] = RESNET50,
) -> NetworkSpec:
    """SlowFast-50."""
    stem = (UnitSpec('conv1', fast_width, (5, 7, 7), 2),)
    widths = _doubled(fast_width, len(depths))
    fast = PathwaySpec(stem, True, fast_block, widths, depths, zero_last=True)
    return NetworkSpec(_slow(width, depths), fast, ratio, fusion_kernel)


def x3d(width: int = 24, depths: tuple[int, ...] = (3, 5, 11, 7)) -> NetworkSpec:
    """X3D-S; its depths are 2.2 times 1, 2, 5 and 3."""
    stem = (
        UnitSpec('conv1_s', width, (1, 3, 3), 2, activation='', norm=False),
        UnitSpec('conv1_t', width, (5, 1, 1), depthwise=True),
    )
    widths = _doubled(width, len(depths))
    last = (UnitSpec('conv5', int(2.25 * widths[-1])),)
    strides = (2,) * len(depths)
    pathway = PathwaySpec(stem, False, x3d_block, widths, depths, strides, last, zero_last=True)
    return NetworkSpec(pathway, hidden=2048)


# config.model.network -> network. The tiny ones are for demos and tests, and were not published.
NETWORKS: dict[str, NetworkSpec] = {
    'csn50': csn(),
    'r2plus1d34': r2plus1d(),
    'slowonly50': slowonly(),
    'slowfast50_4x16': slowfast(8, 5),
    'slowfast50_8x8': slowfast(4, 7),
    'x3d_s': x3d(),
    'csn_tiny': csn(16, (1, 1, 1), stem_size=3),
    'x3d_tiny': x3d(8, (1, 1, 1)),
}


@dataclasses.dataclass(frozen=True)
class Rules:
    """What all units of a network share.

    Attributes:
      dtype: compute dtype.
      groups: of the batch norms.
      sts: of `STS`.
      form: of `FORMS`.
    """

    dtype: Dtype
    groups: int = 1
    sts: str = 'official'
    form: str = 'video'


def build(
    *,
    num_classes: tuple[int, ...],
    num_frames: int,
    network: str = 'csn50',
    form: str = 'video',
    sts: str = 'official',
    head: str = 'linear',
    dtype: Any = jnp.bfloat16,
    dropout: float = 0.5,
    stochastic_depth: float = 0.0,
    inflate: bool = False,
    remat: str = 'none',
    batch_norm_groups: int = 1,
) -> Model:
    """A network of the table, for pictures or for videos.

    Args:
      num_classes: classes of each head.
      num_frames: T; 1 for pictures.
      network: a key of `NETWORKS`.
      form: of `FORMS`: head and initial values of the release's half for images, or for videos.
      sts: space-time separable convolutions: 'official', 'clean' (see `conv3d`), or 'off' for the
        plain ones. Parameters are the same.
      head: 'linear' only.
      dtype: compute dtype; statistics, logits and loss are float32.
      dropout: share of the features of a clip that are dropped before the classifier.
      stochastic_depth: chance that a clip passes by the last block; it grows from 0 at the first.
        Huang et al., arXiv:1603.09382.
      inflate: whether training that starts from other weights spreads the centre taps over time.
      remat: what the backward pass computes again: 'none', or 'blocks'.
      batch_norm_groups: groups of clips whose statistics are taken together; see `batch_norm`.

    Raises:
      ValueError: an option that does not fit; the message names the field.
    """
    for field, value, known in (
        ('network', network, tuple(NETWORKS)),
        ('form', form, FORMS),
        ('sts', sts, STS),
        ('remat', remat, REMAT),
        ('head', head, ('linear',)),
    ):
        if value not in known:
            raise ValueError(f'model.{field}={value!r} is not one of {", ".join(known)}')
    spec = NETWORKS[network]
    if num_frames > 1 and num_frames % spec.ratio:
        raise ValueError(
            f'data.num_frames={num_frames}: the slow pathway of model.network={network!r} sees one '
            f'frame of {spec.ratio}; choose a multiple of it, or 1 for pictures'
        )
    rules = Rules(dtype, batch_norm_groups, sts, form)
    return Model(
        net=StsNet(
            spec, rules, classifier(num_classes, spec, form), dropout, stochastic_depth, remat
        ),
        dtype=dtype,
        pixels=PIXELS,
        param_groups=PARAM_GROUPS,
        sharding_rules=SHARDING_RULES,
        # X3D's network for images has one more bias than that for videos.
        left_behind=(r'^fc1/bias$',) if form == 'video' else (),
        begin=inflated if inflate else None,
    )


def inflated(variables: Tree) -> Tree:
    """Kernels over three frames as (1/9, 1/3, 1/9) of their centre taps.

    Source: the release, where the configs say so; the taps' sum is 5/9 of the centre, not all.
    """

    def spread(leaf: jax.Array) -> jax.Array:
        if leaf.ndim != 5 or leaf.shape[0] != 3:
            return leaf
        shares = jnp.asarray([1 / 9, 1 / 3, 1 / 9], leaf.dtype).reshape(3, 1, 1, 1, 1)
        return leaf[1:2] * shares

    return jax.tree.map(spread, variables)


def classifier(num_classes: Sequence[int], spec: NetworkSpec, form: str) -> heads.Head:
    """The head of a form."""
    paths = [spec.pathway] if spec.fast is None else [spec.pathway, spec.fast]
    width = spec.hidden or sum(out_channels(path) for path in paths)
    return heads.Head('linear', tuple(num_classes), *linear_inits(width, form))


def linear_inits(fan_in: int, form: str) -> tuple[Initializer, Initializer]:
    """Of kernel and bias of a linear map: PyTorch's defaults in networks for images."""
    if form == 'image':
        return uniform(fan_in), uniform(fan_in)
    return nn.initializers.normal(0.01), nn.initializers.zeros


def out_channels(spec: PathwaySpec) -> int:
    """Channels that come out of a pathway."""
    stage = len(spec.widths) - 1
    units = spec.last or spec.block(stage, spec.depths[-1] - 1, spec.widths[-1], 1)
    return units[-1].features


class StsNet(nn.Module):
    """Pathways, a mean over all frames and places, and a linear head.

    Attributes:
      spec: the network.
      rules: what its units share.
      head: the classifier.
      dropout: before the classifier.
      stochastic_depth: of the last block.
      remat: of `REMAT`.
    """

    spec: NetworkSpec
    rules: Rules
    head: heads.Head
    dropout: float = 0.0
    stochastic_depth: float = 0.0
    remat: str = 'none'

    @nn.compact
    def __call__(
        self, inputs: Tree, *, mask: jax.Array | None = None, train: bool = False
    ) -> dict[str, Any]:
        """`video` (B, T, H, W, 3), or rows of pixels, -> `logits`, tuple of (B, num_classes), and
        `embedding`.

        The embedding (B, E) is what the classifier reads, before dropout.

        Raises:
          ValueError: STS has no meaning for frames of this size.
        """
        x = as_pixels(inputs['video'].astype(self.rules.dtype))
        spec = self.spec
        options = {
            'rules': self.rules,
            'stochastic_depth': self.stochastic_depth,
            'remat': self.remat,
        }
        if spec.fast is None:
            pooled = _pooled(pathway(spec.pathway, x, mask, train, **options)[-1])
        else:
            fast = Pathway(spec.fast, **options, name='fast_path')(x, mask, train)
            lateral = Laterals(tuple(fast[:-1]), spec.fusion_kernel, spec.ratio)
            slow = Pathway(spec.pathway, **options, name='slow_path')(
                x[:, :: spec.ratio], mask, train, lateral
            )
            pooled = jnp.concatenate([_pooled(fast[-1]), _pooled(slow[-1])], -1)
        if spec.hidden:
            form = self.rules.form
            inits = linear_inits(pooled.shape[-1], form)
            hidden = Linear(spec.hidden, form == 'image', *inits, pooled.dtype, name='fc1')
            pooled = nn.relu(hidden(pooled))
        kept = nn.Dropout(self.dropout)(pooled, deterministic=not train)
        return {'embedding': pooled, 'logits': self.head(kept, inputs)}


def _pooled(x: jax.Array) -> jax.Array:
    """(B, T, H, W, C) -> (B, C), at least float32."""
    return widened(x).mean((1, 2, 3))


@dataclasses.dataclass(frozen=True)
class Laterals:
    """What the slow pathway takes from the fast one.

    Attributes:
      outputs: of the fast pathway's stem and stages but the last.
      kernel: frames that a convolution sees.
      ratio: its stride along time.
    """

    outputs: tuple[jax.Array, ...]
    kernel: int
    ratio: int


class Pathway(nn.Module):
    """`pathway` with a name."""

    spec: PathwaySpec
    rules: Rules
    stochastic_depth: float
    remat: str

    @nn.compact
    def __call__(
        self, x: jax.Array, mask: jax.Array | None, train: bool, laterals: Laterals | None = None
    ) -> list[jax.Array]:
        options = (self.rules, self.stochastic_depth, self.remat, laterals)
        return pathway(self.spec, x, mask, train, *options)


def pathway(
    spec: PathwaySpec,
    x: jax.Array,
    mask: jax.Array | None,
    train: bool,
    rules: Rules,
    stochastic_depth: float,
    remat: str,
    laterals: Laterals | None = None,
) -> list[jax.Array]:
    """The outputs of stem and stages, (B, T, H, W, C); modules belong to who calls it.

    Args:
      spec: the pathway.
      x: (B, T, H, W, 3).
      mask: (B,) or None; see `batch_norm`.
      train: with statistics of the batch.
      rules: what units share.
      stochastic_depth: of the last block.
      remat: of `REMAT`.
      laterals: what is joined to the outputs of stem and stages but the last.
    """

    def joined(x: jax.Array, number: int) -> jax.Array:
        if laterals is None or number == len(laterals.outputs):
            return x
        fast = laterals.outputs[number]
        name = 'conv1_lateral' if number == 0 else f'layer{number}_lateral'
        unit = UnitSpec(
            name, 2 * fast.shape[-1], (laterals.kernel, 1, 1), activation='', norm=False
        )
        lateral = Unit(unit, rules, spec.eps, time_stride=laterals.ratio, name=name)
        return jnp.concatenate([x, lateral(fast, mask, train)], -1)

    def run(unit: UnitSpec, x: jax.Array) -> jax.Array:
        made = Unit(unit, rules, spec.eps, name=unit.name)
        return ACTIVATIONS[unit.activation](made(x, mask, train))

    for unit in spec.stem:
        x = run(unit, x)
    x = joined(max_pool(x) if spec.pool else x, 0)
    outputs = [x]
    block = Block
    if remat == 'blocks':
        policy = jax.checkpoint_policies.save_only_these_names(STATISTICS)
        block = nn.remat(Block, static_argnums=(3,), policy=policy)
    number, last = 0, max(sum(spec.depths) - 1, 1)
    for stage, (width, depth, stride) in enumerate(zip(spec.widths, spec.depths, spec.strides)):
        for index in range(depth):
            step = stride if index == 0 else 1
            units = spec.block(stage, index, width, step)
            x = block(
                units,
                step,
                rules,
                spec.eps,
                spec.zero_last and rules.form == 'video',
                stochastic_depth * number / last,
                name=f'layer{stage + 1}_{index}',
            )(x, mask, train)
            number += 1
        if stage == len(spec.depths) - 1:
            for unit in spec.last:
                x = run(unit, x)
        x = joined(x, stage + 1)
        outputs.append(x)
    return outputs


class Block(nn.Module):
    """Units one after another, beside a shortcut.

    Attributes:
      units: the branch.
      stride: of the shortcut.
      rules: what units share.
      eps: of the norms.
      zero_last: the last scale of the branch starts at 0.
      drop: chance that a clip passes the branch by.
    """

    units: Units
    stride: int
    rules: Rules
    eps: float
    zero_last: bool = False
    drop: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None, train: bool) -> jax.Array:
        y = x
        for spec in self.units:
            last = spec is self.units[-1]
            unit = Unit(spec, self.rules, self.eps, zero=self.zero_last and last, name=spec.name)
            y = unit(y, mask, train)
            if spec.squeeze:
                y = SqueezeExcite(spec.squeeze, self.rules, name='se_module')(y)
            y = ACTIVATIONS[spec.activation](y)
        if train and self.drop:
            kept = jax.random.bernoulli(self.make_rng('dropout'), 1 - self.drop, y.shape[:1])
            share = kept.astype(y.dtype) / (1 - self.drop)
            y = y * share.reshape(-1, *(1,) * (y.ndim - 1))
        if self.stride > 1 or x.shape[-1] != y.shape[-1]:
            shortcut = dataclasses.replace(
                self.units[-1],
                name='downsample',
                kernel=(1, 1, 1),
                stride=self.stride,
                separable=False,
            )
            x = Unit(shortcut, self.rules, self.eps, name='downsample')(x, mask, train)
        return nn.relu(x + y)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    'relu': nn.relu,
    'swish': nn.swish,
    '': lambda x: x,
}


class Unit(nn.Module):
    """Convolution `conv` and batch norm `bn`; the activation is the caller's.

    Attributes:
      spec: of it.
      rules: what units share.
      eps: of the norm.
      time_stride: of the convolution.
      zero: the scale of the norm starts at 0.
    """

    spec: UnitSpec
    rules: Rules
    eps: float
    time_stride: int = 1
    zero: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None, train: bool) -> jax.Array:
        spec, rules = self.spec, self.rules
        if spec.factorised:
            x = Factorised(spec, rules, name='conv')(x, mask, train)
        else:
            conv = Conv(
                spec.features,
                spec.kernel,
                spec.stride,
                self.time_stride,
                spec.depthwise,
                rules.sts if spec.separable else 'off',
                rules.dtype,
                name='conv',
            )
            x = conv(x)
        if not spec.norm:
            return x
        scale = nn.initializers.zeros if self.zero else nn.initializers.ones
        return BatchNorm(rules.groups, self.eps, scale_init=scale, name='bn')(x, mask, train)


class Factorised(nn.Module):
    """R(2+1)D's convolution: `conv_s` over space, `bn_s`, ReLU, `conv_t` over time.

    Tran et al., arXiv:1711.11248. As in the release, the channels between are those that give a
    kernel over three frames its number of parameters, whatever frames it sees, and `bn_s` has
    PyTorch's epsilon, not that of the network.
    """

    spec: UnitSpec
    rules: Rules

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None, train: bool) -> jax.Array:
        spec, rules = self.spec, self.rules
        frames, height, width = spec.kernel
        area, ins, outs = height * width, x.shape[-1], spec.features
        between = 3 * ins * outs * area // (ins * area + 3 * outs)
        spatial = Conv(between, (1, height, width), spec.stride, dtype=rules.dtype, name='conv_s')
        x = nn.relu(BatchNorm(rules.groups, name='bn_s')(spatial(x), mask, train))
        sts = rules.sts if spec.separable else 'off'
        return Conv(outs, (frames, 1, 1), sts=sts, dtype=rules.dtype, name='conv_t')(x)


class Conv(nn.Module):
    """The parameter `kernel` (kt, kh, kw, in / groups, out) of a convolution of `conv3d`.

    He et al., arXiv:1502.01852, over outputs, of which the release counts all in a depthwise one.
    """

    features: int
    kernel: tuple[int, int, int]
    stride: int = 1
    time_stride: int = 1
    depthwise: bool = False
    sts: str = 'off'
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (*self.kernel, 1 if self.depthwise else x.shape[-1], self.features)
        kernel = self.param('kernel', he_normal, shape).astype(self.dtype)
        if self.sts == 'off':
            return conv3d.conv3d(x, kernel, self.stride, self.time_stride)
        return conv3d.sts_conv3d(x, kernel, self.stride, self.sts)


def he_normal(key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32) -> jax.Array:
    """N(0, 2 / fan-out) of a kernel (kt, kh, kw, in, out)."""
    *window, _, features = shape
    return jax.random.normal(key, shape, dtype) * (2 / (features * math.prod(window))) ** 0.5


class SqueezeExcite(nn.Module):
    """x * sigmoid(fc2(relu(fc1(mean of x over frames and places)))); Hu et al., 1709.01507."""

    features: int
    rules: Rules

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]

        def linear(name: str, features: int, fan_in: int) -> Linear:
            _, bias = linear_inits(fan_in, self.rules.form)
            kernel = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')
            return Linear(features, True, kernel, bias, pooled.dtype, name=name)

        pooled = _pooled(x)
        hidden = nn.relu(linear('fc1', self.features, channels)(pooled))
        share = nn.sigmoid(linear('fc2', channels, self.features)(hidden))
        return x * share[:, None, None, None].astype(x.dtype)


def max_pool(x: jax.Array) -> jax.Array:
    """3 x 3, stride 2, of every frame: (B, T, H, W, C) -> (B, T, ceil(H / 2), ceil(W / 2), C)."""
    if is_settled():
        return _largest_of_three(_largest_of_three(x, 2), 3)
    frames = x.reshape(-1, *x.shape[2:])
    pooled = nn.max_pool(frames, (3, 3), (2, 2), ((1, 1), (1, 1)))
    return pooled.reshape(*x.shape[:2], *pooled.shape[1:])


def _largest_of_three(x: jax.Array, axis: int) -> jax.Array:
    """`max_pool` along one axis, without a window that converters would have to know."""
    size = x.shape[axis]
    padded = jnp.pad(x, [(int(i == axis),) * 2 for i in range(x.ndim)], constant_values=-jnp.inf)
    taps = [
        jax.lax.slice_in_dim(padded, start, start + size, stride=2, axis=axis) for start in range(3)
    ]
    return functools.reduce(jnp.maximum, taps)
