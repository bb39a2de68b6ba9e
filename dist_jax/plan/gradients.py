"""The same model trained in other ways, to see what keeping the backbone frozen saves.

For plans only: nothing here is meant to train. The step, the optimizer and the family's network
are the real ones; what differs is where gradients flow.

- 'frozen': as the family does it. No activation of the backbone is kept.
- 'through_backbone': the backbone is not updated, but a parameter sits below it (an offset of the
  pixels' channels, in place of prompts or adapters), so gradients flow through all of it.
- 'full': the backbone is trained as well: float32 weights, their gradients and AdamW's moments.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dist_jax.models.api import Model, ParamGroup, Tree
from dist_jax.models.frozen import TOWER
from dist_jax.sharding import ShardingRule

MODES = ('frozen', 'through_backbone', 'full')
BACKBONE = 'backbone'  # parameter that is trained in its place
OFFSET = 'pixel_offset'  # parameter below the backbone
NET = 'net'  # name that the family's network gets inside the whole


def with_gradients(model: Model, frozen: Tree, mode: str) -> tuple[Model, Tree]:
    """A model whose gradients flow as `mode` says, and its frozen tree.

    Args:
      model: of any family that reads an image tower.
      frozen: its frozen tree, as shapes.
      mode: one of `MODES`.

    Raises:
      ValueError: no such mode, or a family without an image tower.
    """
    if mode not in MODES:
        raise ValueError(f'--gradients={mode!r} is not one of {", ".join(MODES)}')
    if mode == 'frozen':
        return model, frozen
    if TOWER not in frozen:
        raise ValueError(f'--gradients={mode}: this family has no frozen image tower')
    rest = {name: part for name, part in frozen.items() if name != TOWER}
    trained = mode == 'full'
    net = _Whole(
        net=model.net,
        features=model.frozen.apply,
        tower=_Shapes.of(frozen[TOWER]) if trained else None,
    )
    whole = dataclasses.replace(
        model,
        net=net,
        frozen=dataclasses.replace(
            model.frozen, apply=lambda kept, batch: {'frozen': kept, 'batch': batch}
        ),
        # Who is decayed, clipped or bounded changes neither memory nor time.
        param_groups=(ParamGroup(''),),
        tensor_axes=(),
        most={},
        sharding_rules=(
            *(
                dataclasses.replace(rule, pattern=rf'^{BACKBONE}/.*(?:{rule.pattern})')
                for rule in model.frozen.rules
            ),
            ShardingRule(f'^{OFFSET}$'),
            *model.sharding_rules,
        ),
    )
    return whole, rest if trained else frozen


@dataclasses.dataclass(frozen=True)
class _Shapes:
    """A tree of shapes that can be an attribute of a module."""

    leaves: tuple[tuple[tuple[int, ...], Any], ...]
    structure: Any

    @classmethod
    def of(cls, tree: Tree) -> _Shapes:
        leaves, structure = jax.tree.flatten(tree)
        return cls(tuple((leaf.shape, leaf.dtype) for leaf in leaves), structure)

    def master(self) -> Tree:
        """Zeros in float32, the weights an optimizer updates."""
        return jax.tree.unflatten(
            self.structure, [jnp.zeros(shape, jnp.float32) for shape, _ in self.leaves]
        )

    def cast(self, tree: Tree) -> Tree:
        """The dtypes that the model computes in."""
        leaves = zip(jax.tree.leaves(tree), self.leaves)
        return jax.tree.unflatten(
            self.structure, [leaf.astype(dtype) for leaf, (_, dtype) in leaves]
        )


class _Whole(nn.Module):
    """Backbone and network as one differentiated module."""

    net: nn.Module
    features: Callable[[Tree, Tree], Tree]
    tower: _Shapes | None

    @nn.compact
    def __call__(self, inputs: Tree, *, mask: jax.Array | None = None, train: bool = False) -> Any:
        frozen, video = inputs['frozen'], inputs['batch']['video']
        if self.tower is None:
            offset = self.param(OFFSET, nn.initializers.zeros, (3,)).astype(video.dtype)
            video = video + jnp.tile(offset, video.shape[-1] // 3)
        else:
            tower = self.param(BACKBONE, lambda _: self.tower.master())
            frozen = {**frozen, TOWER: self.tower.cast(tower)}
        features = self.features(frozen, {**inputs['batch'], 'video': video})
        return self.net(features, mask=mask, train=train)
