"""What a naming is: the names under which some project stores a network, and how to convert them.

A family's `*_params.py` brings its namings as values; `dist_jax.models.NAMINGS` lists them, and
`dist_jax convert` asks them. Nothing else knows a foreign name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dist_jax.models.api import Model
from dist_jax.models.converted import stored_tree
from dist_jax.models.params import Row, Tree, with_precision
from dist_jax.models.source_files import SourceFiles


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command line says beyond the file; None where it says nothing."""

    activation: str | None = None
    num_heads: int | None = None
    text_num_heads: int | None = None

    def refuse(self, kind: str, reason: str) -> None:
        """Flags that `kind` does not take are an error, not ignored."""
        given = [
            f'--{name}' for name, value in dataclasses.asdict(self).items() if value is not None
        ]
        if given:
            raise ValueError(f'{", ".join(given)} cannot be set for {kind}: {reason}')


@dataclasses.dataclass(frozen=True)
class Inside:
    """How files of a network hold the frozen backbone that it stands on.

    Attributes:
      names: tensors of a file -> names of those that are of a backbone of this kind: exactly the
        names of one of that depth, nothing that merely looks like them.
      geometry: the same tensors -> fields of the spec that they show; raises ValueError, if one
        that shows a size is missing.
      rows: spec -> table of all names that there may be.
      left_out: subtrees of the backbone that the released files do not hold.
    """

    names: Callable[[Mapping[str, Any]], list[str]]
    geometry: Callable[[Mapping[str, Any]], dict[str, Any]]
    rows: Callable[[Any], list[Row]]
    left_out: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a naming says of one file: everything that a conversion needs besides it.

    Attributes:
      name: of the network in the metadata, where the user gives none.
      spec: JSON values; the geometry.
      tensors: of the file, under the names that `rows` read.
      rows: the table.
      abstract: what the table fills, as it is stored; see `converted.stored_tree`.
      ignore: names of tensors that may stay unused; `fnmatch` patterns.
      collections: subtrees at the top of `abstract` that are no parameters, such as 'batch_stats'.
      backbone: kind of the backbone that a file with these names may hold besides, a key of
        `Naming.inside`; '' where there is no place for one.
    """

    name: str
    spec: dict[str, Any]
    tensors: Mapping[str, np.ndarray]
    rows: list[Row]
    abstract: Tree
    ignore: tuple[str, ...] = ()
    collections: tuple[str, ...] = ()
    backbone: str = ''


@dataclasses.dataclass(frozen=True)
class Export:
    """How a family goes back under these names.

    Attributes:
      rows: sizes, of `Plan.spec` or `run_sizes` -> table.
      run_sizes: the `model` fields and the backbone's spec of a run, None without one -> sizes.
      prefix: of the names in the released files.
      head: the one that their names have a place for; '' for networks without a choice of heads.
      runs: other families whose runs hold such a network.
    """

    rows: Callable[[Mapping[str, Any]], list[Row]]
    run_sizes: Callable[[Mapping[str, Any], Mapping[str, Any] | None], dict[str, Any]]
    prefix: str
    head: str
    runs: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Naming:
    """One naming of one family.

    Attributes:
      kind: what `--kind` calls it.
      family: of the networks that are stored so.
      matches: whether an opened checkpoint has these names.
      plan: raises ValueError, if it is incomplete or options are missing.
      export: the way back; None where there is none.
      inside: family of a backbone, as converted ones name it -> how files hold one of it; empty
        where they hold none.
    """

    kind: str
    family: str
    matches: Callable[[SourceFiles], bool]
    plan: Callable[[SourceFiles, Options], Plan]
    export: Export | None = None
    inside: Mapping[str, Inside] = dataclasses.field(default_factory=dict)


def abstract_network(
    model: Model, video_shape: tuple[int, ...], num_classes: tuple[int, ...]
) -> Tree:
    """Parameters and statistics of a model on a backbone as they are stored: shapes in float32.

    Args:
      model: of any family.
      video_shape: (B, T, H, W, 3) of any small batch.
      num_classes: of each head.
    """
    inputs = jax.eval_shape(
        lambda frozen, video: model.inputs(frozen, {'video': video}),
        model.frozen.abstract(num_classes),
        jax.ShapeDtypeStruct(video_shape, model.dtype),
    )
    variables = jax.eval_shape(model.net.init, jax.random.key(0), inputs)
    return with_precision(stored_tree(variables), jnp.float32)
