"""Optimizers and learning-rate schedules by name, groups of parameters, clipping and bounds."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dist_jax.models.api import Model, ParamGroup, TensorAxes, Tree

Schedule = Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
    """An optimizer, its schedule and what goes with them.

    Attributes:
      peak_lr: of the schedule where it starts.
      warmup_start_lr: at step 0.
      warmup_steps: linear warm-up.
      warmup: one of `WARMUPS`, what rises on that line.
      total_steps: length of the schedule, warm-up included.
      after_warmup: whether the schedule starts where the warm-up ends; else at step 0.
      refresh_steps: steps for which a rate stays; 1 for one of its own for every step, 0 for one
        for every epoch.
      steps_per_epoch: that `refresh_steps` are counted in.
      end_lr: at the last step; a constant schedule does not read it.
      weight_decay: times the group's multiplier.
      decay_all: every group's multiplier is 1.
      b1, b2, eps: of AdamW, LAMB and BertAdam.
      clip_norm: global gradient norm above which gradients are scaled down; 0 for off.
      clip_tensor_norm: norm above which the gradient of a tensor is scaled down, after that; 0 for
        off.
      name: a key of `OPTIMIZERS`.
      schedule: a key of `SCHEDULES`.
      momentum, nesterov: of SGD.
    """

    peak_lr: float
    warmup_start_lr: float
    warmup_steps: float
    total_steps: int
    end_lr: float = 0.0
    warmup: str = 'join'
    weight_decay: float = 1e-4
    decay_all: bool = False
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    clip_norm: float = 0.0
    clip_tensor_norm: float = 0.0
    name: str = 'adamw'
    schedule: str = 'cosine'
    after_warmup: bool = False
    refresh_steps: int = 1
    steps_per_epoch: float = 1.0
    momentum: float = 0.9
    nesterov: bool = False


def cosine(progress: jax.Array, peak: float, end: float) -> jax.Array:
    """Half a wave from `peak` to `end`, `progress` from 0 to 1."""
    return end + (peak - end) * 0.5 * (1.0 + jnp.cos(jnp.pi * progress))


def linear(progress: jax.Array, peak: float, end: float) -> jax.Array:
    """A line from `peak` to `end`, `progress` from 0 to 1."""
    return peak + (end - peak) * progress


def constant(progress: jax.Array, peak: float, end: float) -> jax.Array:
    """Stays at `peak`."""
    return jnp.full_like(progress, peak)


SCHEDULES: dict[str, Callable[[jax.Array, float, float], jax.Array]] = {
    'cosine': cosine,
    'linear': linear,
    'constant': constant,
}

# What a warm-up raises: the rate to where the schedule is when it ends, the rate to the schedule's
# peak, or the peak of the schedule, which runs meanwhile.
WARMUPS = ('join', 'peak', 'scale')


def make_schedule(settings: OptimizerSettings) -> Schedule:
    """Step -> learning rate: linear warm-up into a schedule over the whole run.

    Source: the DiST release evaluates, at every step's fractional epoch, a cosine over all epochs;
    the warm-up rises linearly to the cosine's value at the end of the warm-up, not to its peak. The
    Side4Video release's cosine starts at the end of the warm-up (`after_warmup`), and its rate is
    that of the newest step that began an epoch or completed ten of its steps (`refresh_steps`).
    The cosine of BertAdam (the Side4Video release for retrieval) runs from step 0 and is not moved
    to where the warm-up ends: the rate falls from the peak to the cosine there ('peak').
    STS renews the rate with the epoch alone (`refresh_steps` 0): on images (timm) the warm-up
    rises to the peak, 'peak'; on videos (mmcv) the cosine runs meanwhile and is multiplied, at
    every step, by a factor that rises to 1, 'scale'.
    """
    shape, refresh_steps = SCHEDULES[settings.schedule], settings.refresh_steps
    start, peak = settings.warmup_start_lr, settings.peak_lr
    # Times are counted in steps, or, where a rate is that of an epoch, in epochs: exactly.
    unit = 1 if refresh_steps else settings.steps_per_epoch
    warmup, total = settings.warmup_steps / unit, settings.total_steps / unit
    begin = warmup if settings.after_warmup else 0

    def curve(time: jax.Array, peak: float | jax.Array = peak) -> jax.Array:
        progress = jnp.minimum((time - begin) / (total - begin), 1.0)
        return shape(progress, peak, settings.end_lr)

    def line(time: jax.Array, top: float | jax.Array) -> jax.Array:
        return start + (top - start) * time / warmup

    def refreshed(step: jax.Array) -> jax.Array:
        epoch = jnp.floor(step / settings.steps_per_epoch)
        if not refresh_steps:
            return epoch
        first = jnp.ceil(epoch * settings.steps_per_epoch)
        done = jnp.floor((step - first + 1) / refresh_steps) * refresh_steps
        return first + jnp.maximum(done - 1, 0)

    def schedule(step: jax.Array) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        time = step if refresh_steps == 1 else refreshed(step)
        if not warmup:
            return curve(time)
        if settings.warmup == 'scale':
            now = step / unit
            return curve(time, jnp.where(now < warmup, line(now, peak), peak))
        top = curve(jnp.float32(warmup)) if settings.warmup == 'join' else peak
        rising = line(time, top)
        return jnp.where(time < warmup, rising, curve(time))

    return schedule


def describe_schedule(settings: OptimizerSettings) -> str:
    """What the learning rate will do, as a line of the log."""
    rate, stays = make_schedule(settings), settings.refresh_steps != 1
    # A rate that stays is not asked for in between, and never comes to the schedule's end.
    joined = math.ceil(settings.warmup_steps) if stays else settings.warmup_steps
    end = settings.total_steps - stays
    first, top, last = (float(rate(s)) for s in (0, joined, end))
    every = f'{settings.refresh_steps} steps' if settings.refresh_steps else 'epoch'
    return (
        f'{first:.3g}, {top:.3g} after {settings.warmup_steps:.4g} steps of warm-up, '
        f'{last:.3g} at step {end} ({settings.schedule})' + f', renewed every {every}' * stays
    )


def assign_groups(params: Tree, groups: Sequence[ParamGroup]) -> Tree:
    """The group of every leaf: the first whose pattern is found in its path.

    Raises:
      ValueError: a leaf that no group matches, or a group that matches nothing.
    """
    used: set[str] = set()
    missing: list[str] = []

    def find(path: tuple[Any, ...], _: Any) -> ParamGroup | None:
        name = jax.tree_util.keystr(path, simple=True, separator='/')
        for group in groups:
            if re.search(group.pattern, name):
                used.add(group.pattern)
                return group
        missing.append(name)
        return None

    assigned = jax.tree_util.tree_map_with_path(find, params)
    if missing:
        raise ValueError(f'parameters that no group in {groups} matches: {missing}')
    unused = [group.pattern for group in groups if group.pattern not in used]
    if unused:
        raise ValueError(f'parameter groups that match nothing: {unused}')
    return assigned


Parts = tuple[optax.GradientTransformation, ...]


def adamw(settings: OptimizerSettings, decay: Tree) -> Parts:
    """Adam, and decay beside it (Loshchilov and Hutter, arXiv:1711.05101)."""
    return optax.scale_by_adam(settings.b1, settings.b2, settings.eps), _add_decay(decay)


def sgd(settings: OptimizerSettings, decay: Tree) -> Parts:
    """SGD with momentum; decay is part of the gradient and goes through the momentum.

    Source: torch.optim.SGD without dampening, which the recipes of video networks (mmaction2,
    PySlowFast) mean by their weight decay: g += decay * p, then m = momentum * m + g, and the
    update is m, with Nesterov g + momentum * m.
    """
    return _add_decay(decay), optax.trace(settings.momentum, settings.nesterov)


def lamb(settings: OptimizerSettings, decay: Tree) -> Parts:
    """AdamW's update u, times the norm of the parameter over that of u.

    You et al., arXiv:1904.00962, with bias correction and no bound on the ratio, as timm's Lamb
    that STS and "ResNet strikes back" train with (there with clip_norm=1 and eps=1e-6). As there,
    what is not decayed is not scaled either: biases and norms take Adam's update, and without
    weight decay everything does. Layers stacked in one array have one ratio.
    """
    decayed = jax.tree.map(bool, decay)
    return *adamw(settings, decay), optax.masked(optax.scale_by_trust_ratio(), decayed)


class Moments(NamedTuple):
    """Running means of gradients and of their squares, of the parameters' structure."""

    mu: Tree
    nu: Tree


def bertadam(settings: OptimizerSettings, decay: Tree) -> Parts:
    """Adam without bias correction: u = m / (sqrt(v) + eps) + decay * p.

    Source: the optimizer of BERT's pre-training (Devlin et al., arXiv:1810.04805), which CLIP4Clip
    and the Side4Video release for retrieval train with. Differs: there each parameter counts its
    own steps, all the same. For the two norms that it clips to see `make_optimizer`.
    """

    def init(params: Tree) -> Moments:
        return Moments(optax.tree.zeros_like(params), optax.tree.zeros_like(params))

    def update(updates: Tree, state: Moments, params: Tree | None = None) -> tuple[Tree, Moments]:
        del params
        mu = optax.tree.update_moment(updates, state.mu, settings.b1, 1)
        nu = optax.tree.update_moment_per_elem_norm(updates, state.nu, settings.b2, 2)
        scaled = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + settings.eps), mu, nu)
        return scaled, Moments(mu, nu)

    return optax.GradientTransformation(init, update), _add_decay(decay)


OPTIMIZERS: dict[str, Callable[[OptimizerSettings, Tree], Parts]] = {
    'adamw': adamw,
    'sgd': sgd,
    'lamb': lamb,
    'bertadam': bertadam,
}


def _add_decay(decay: Tree) -> optax.GradientTransformation:
    def add(updates: Tree, params: Tree) -> Tree:
        return jax.tree.map(lambda u, p, d: u + d * p if d else u, updates, params, decay)

    return optax.stateless(add)


def clip_by_tensor_norm(
    params: Tree, max_norm: float, tensors: Sequence[TensorAxes] = ()
) -> optax.GradientTransformation:
    """Scales the gradient of each tensor down to a norm of at most `max_norm`.

    Args:
      params: whose structure, paths and numbers of axes are read.
      max_norm: above 0.
      tensors: see `Model.tensor_axes`.

    Raises:
      ValueError: an entry that matches nothing, or an array without such an axis.
    """
    used = set()

    def others(path: tuple[Any, ...], leaf: Any) -> tuple[int, ...]:
        name = jax.tree_util.keystr(path, simple=True, separator='/')
        found = next((each for each in tensors if re.search(each.pattern, name)), None)
        own = found.axes if found else ()
        used.add(found)
        if not set(own) <= set(range(leaf.ndim)):
            raise ValueError(f'{found} matches {name}, which has {leaf.ndim} axes')
        return tuple(axis for axis in range(leaf.ndim) if axis not in own)

    def clip(gradient: jax.Array, axes: tuple[int, ...]) -> jax.Array:
        norm = jnp.sqrt(jnp.square(gradient).sum(axes, keepdims=True))
        return gradient * jnp.minimum(1.0, max_norm / norm)

    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    axes = [others(path, leaf) for path, leaf in leaves]
    unused = [each for each in tensors if each not in used]
    if unused:
        raise ValueError(f'axes of tensors that match nothing: {unused}')

    def clip_all(updates: Tree, _: Tree) -> Tree:
        return structure.unflatten(map(clip, structure.flatten_up_to(updates), axes))

    return optax.stateless(clip_all)


def keep_at_most(params: Tree, most: Mapping[str, float]) -> optax.GradientTransformation:
    """Updates after which no element of a parameter exceeds its bound, in its own dtype.

    Args:
      params: whose paths are read.
      most: see `Model.most`.

    Raises:
      ValueError: a bound of a parameter that there is not.
    """
    names = jax.tree_util.tree_map_with_path(
        lambda path, _: jax.tree_util.keystr(path, simple=True, separator='/'), params
    )
    unknown = most.keys() - set(jax.tree.leaves(names))
    if unknown:
        raise ValueError(f'bounds of parameters that there are not: {sorted(unknown)}')

    def bound(name: str, update: jax.Array, param: jax.Array) -> jax.Array:
        if name not in most:
            return update
        limit = jnp.asarray(most[name], param.dtype)
        # The difference may have been rounded up, and the sum with it.
        room = limit - param
        room = jnp.where(param + room > limit, jnp.nextafter(room, -jnp.inf), room)
        return jnp.minimum(update, room)

    return optax.stateless(lambda updates, params: jax.tree.map(bound, names, updates, params))


def make_optimizer(
    params: Tree,
    groups: Sequence[ParamGroup],
    settings: OptimizerSettings,
    tensors: Sequence[TensorAxes] = (),
    most: Mapping[str, float] | None = None,
) -> optax.GradientTransformation:
    """The optimizer over `params` (only its structure, paths and numbers of axes are read).

    Gradients are clipped before all else, to a global norm and then, as BertAdam does itself, each
    tensor to its own; groups scale the update at the end, and bounds hold after that.

    Args:
      params: arrays or shapes.
      groups: see `Model.param_groups`.
      settings: of the recipe.
      tensors: see `Model.tensor_axes`.
      most: see `Model.most`.

    Raises:
      ValueError: a parameter without a group; a group, a bound or axes of no parameter.
    """
    assigned = assign_groups(params, groups)
    decay = jax.tree.map(
        lambda g: settings.weight_decay * (1.0 if settings.decay_all else g.weight_decay), assigned
    )
    speed = jax.tree.map(lambda g: g.learning_rate, assigned)

    def scale_groups(updates: Tree, _: Tree) -> Tree:
        return jax.tree.map(lambda u, s: u * s if s != 1.0 else u, updates, speed)

    clips = []
    if settings.clip_norm:
        clips.append(optax.clip_by_global_norm(settings.clip_norm))
    if settings.clip_tensor_norm:
        clips.append(clip_by_tensor_norm(params, settings.clip_tensor_norm, tensors))
    # Stored states are named by their place here: all clipping has one, and bounds are the last.
    return optax.chain(
        optax.chain(*clips) if len(clips) > 1 else (clips or [optax.identity()])[0],
        *OPTIMIZERS[settings.name](settings, decay),
        optax.stateless(scale_groups),
        optax.scale_by_learning_rate(make_schedule(settings)),
        *([keep_at_most(params, most)] if most else []),
    )


def of_model(
    model: Model, params: Tree, settings: OptimizerSettings
) -> optax.GradientTransformation:
    """`make_optimizer` as a model wants its parameters optimised."""
    return make_optimizer(params, model.param_groups, settings, model.tensor_axes, model.most)
