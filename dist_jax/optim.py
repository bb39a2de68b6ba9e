"""Learning-rate schedule and AdamW with parameter groups."""

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
    """AdamW, its schedule and what goes with them.

    Attributes:
      peak_lr: of the cosine at step 0; the warm-up joins the cosine where it ends.
      warmup_start_lr: at step 0.
      warmup_steps: linear warm-up.
      total_steps: length of the cosine, warm-up included.
      end_lr: at the last step.
      weight_decay: decoupled, times the group's multiplier.
      b1, b2, eps: of Adam.
      clip_norm: global gradient norm above which gradients are scaled down; 0 for off.
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


def make_schedule(settings: OptimizerSettings) -> Schedule:
    """Step -> learning rate: linear warm-up into a cosine over the whole run.

    Source: the DiST release evaluates, at every step's fractional epoch, a cosine over all epochs;
    the warm-up rises linearly to the cosine's value at the end of the warm-up, not to its peak.
    """
    peak, end = settings.peak_lr, settings.end_lr

    def cosine(step: jax.Array) -> jax.Array:
        progress = jnp.minimum(step / settings.total_steps, 1.0)
        return end + (peak - end) * 0.5 * (1.0 + jnp.cos(jnp.pi * progress))

    def schedule(step: jax.Array) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        if not settings.warmup_steps:
            return cosine(step)
        start = settings.warmup_start_lr
        top = cosine(jnp.float32(settings.warmup_steps))
        rising = start + (top - start) * step / settings.warmup_steps
        return jnp.where(step < settings.warmup_steps, rising, cosine(step))

    return schedule


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


def make_optimizer(
    params: Tree, groups: Sequence[ParamGroup], settings: OptimizerSettings
) -> optax.GradientTransformation:
    """AdamW over `params` (only its structure and paths are read)."""
    assigned = assign_groups(params, groups)
    decay = jax.tree.map(lambda g: g.weight_decay * settings.weight_decay, assigned)
    speed = jax.tree.map(lambda g: g.learning_rate, assigned)

    def add_decay(updates: Tree, params: Tree) -> Tree:
        return jax.tree.map(lambda u, p, d: u + d * p if d else u, updates, params, decay)

    def scale_groups(updates: Tree, _: Tree) -> Tree:
        return jax.tree.map(lambda u, s: u * s if s != 1.0 else u, updates, speed)

    return optax.chain(
        optax.clip_by_global_norm(settings.clip_norm) if settings.clip_norm else optax.identity(),
        optax.scale_by_adam(settings.b1, settings.b2, settings.eps),
        optax.stateless(add_decay),
        optax.stateless(scale_groups),
        optax.scale_by_learning_rate(make_schedule(settings)),
    )
