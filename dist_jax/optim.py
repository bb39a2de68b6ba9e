"""Optimizers and learning-rate schedules by name, and groups of parameters."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dist_jax.models.api import ParamGroup, Tree

Schedule = Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
    """An optimizer, its schedule and what goes with them.

    Attributes:
      peak_lr: of the schedule where it starts; the warm-up joins the schedule where it ends.
      warmup_start_lr: at step 0.
      warmup_steps: linear warm-up.
      total_steps: length of the schedule, warm-up included.
      after_warmup: whether the schedule starts where the warm-up ends; else at step 0.
      refresh_steps: steps for which a rate stays; 1 for one of its own for every step.
      steps_per_epoch: that `refresh_steps` are counted in.
      end_lr: at the last step; a constant schedule does not read it.
      weight_decay: times the group's multiplier.
      b1, b2, eps: of AdamW and LAMB.
      clip_norm: global gradient norm above which gradients are scaled down; 0 for off.
      name: a key of `OPTIMIZERS`.
      schedule: a key of `SCHEDULES`.
      momentum, nesterov: of SGD.
    """

    peak_lr: float
    warmup_start_lr: float
    warmup_steps: float
    total_steps: int
    end_lr: float = 0.0
    weight_decay: float = 1e-4
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    clip_norm: float = 0.0
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


def make_schedule(settings: OptimizerSettings) -> Schedule:
    """Step -> learning rate: linear warm-up into a schedule over the whole run.

    Source: the DiST release evaluates, at every step's fractional epoch, a cosine over all epochs;
    the warm-up rises linearly to the cosine's value at the end of the warm-up, not to its peak. The
    Side4Video release's cosine starts at the end of the warm-up (`after_warmup`), and its rate is
    that of the newest step that began an epoch or completed ten of its steps (`refresh_steps`).
    """
    shape = SCHEDULES[settings.schedule]
    begin = settings.warmup_steps if settings.after_warmup else 0

    def after_warmup(step: jax.Array) -> jax.Array:
        progress = jnp.minimum((step - begin) / (settings.total_steps - begin), 1.0)
        return shape(progress, settings.peak_lr, settings.end_lr)

    def refreshed(step: jax.Array) -> jax.Array:
        first = jnp.ceil(jnp.floor(step / settings.steps_per_epoch) * settings.steps_per_epoch)
        done = jnp.floor((step - first + 1) / settings.refresh_steps) * settings.refresh_steps
        return first + jnp.maximum(done - 1, 0)

    def schedule(step: jax.Array) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        if settings.refresh_steps > 1:
            step = refreshed(step)
        if not settings.warmup_steps:
            return after_warmup(step)
        start = settings.warmup_start_lr
        top = after_warmup(jnp.float32(settings.warmup_steps))
        rising = start + (top - start) * step / settings.warmup_steps
        return jnp.where(step < settings.warmup_steps, rising, after_warmup(step))

    return schedule


def describe_schedule(settings: OptimizerSettings) -> str:
    """What the learning rate will do, as a line of the log."""
    rate = make_schedule(settings)
    first, top, last = (float(rate(s)) for s in (0, settings.warmup_steps, settings.total_steps))
    return (
        f'{first:.3g}, {top:.3g} after {settings.warmup_steps:.4g} steps of warm-up, '
        f'{last:.3g} at step {settings.total_steps} ({settings.schedule})'
        + (f', renewed every {settings.refresh_steps} steps' * (settings.refresh_steps > 1))
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


OPTIMIZERS: dict[str, Callable[[OptimizerSettings, Tree], Parts]] = {
    'adamw': adamw,
    'sgd': sgd,
    'lamb': lamb,
}


def _add_decay(decay: Tree) -> optax.GradientTransformation:
    def add(updates: Tree, params: Tree) -> Tree:
        return jax.tree.map(lambda u, p, d: u + d * p if d else u, updates, params, decay)

    return optax.stateless(add)


def make_optimizer(
    params: Tree, groups: Sequence[ParamGroup], settings: OptimizerSettings
) -> optax.GradientTransformation:
    """The optimizer over `params` (only its structure and paths are read).

    Gradients are clipped before all else; groups scale the update at the end.
    """
    assigned = assign_groups(params, groups)
    decay = jax.tree.map(lambda g: g.weight_decay * settings.weight_decay, assigned)
    speed = jax.tree.map(lambda g: g.learning_rate, assigned)

    def scale_groups(updates: Tree, _: Tree) -> Tree:
        return jax.tree.map(lambda u, s: u * s if s != 1.0 else u, updates, speed)

    return optax.chain(
        optax.clip_by_global_norm(settings.clip_norm) if settings.clip_norm else optax.identity(),
        *OPTIMIZERS[settings.name](settings, decay),
        optax.stateless(scale_groups),
        optax.scale_by_learning_rate(make_schedule(settings)),
    )
