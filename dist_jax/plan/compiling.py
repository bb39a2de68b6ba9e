"""Builds the steps of a config from shapes alone and compiles them for a mesh of any devices."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dist_jax import experiment, optim, step, train
from dist_jax.models import clip
from dist_jax.models.api import Tree, VideoModel
from dist_jax.sharding import check_batch_size

# Length of a run decides only numbers of the schedule, not the program.
ASSUMED_VIDEOS = 100_000
ASSUMED_CLASSES = 400  # for data sets whose classes come from a list


@dataclasses.dataclass(frozen=True)
class Step:
    """A jitted step with the shapes it is called with.

    Attributes:
      function: jitted.
      arguments: trees of `jax.ShapeDtypeStruct`, by name, in order.
      clips: clips that one call works on, over all devices.
      model: the family's model.
      num_classes: of each label column.
    """

    function: Callable[..., Any]
    arguments: dict[str, Tree]
    clips: int
    model: VideoModel
    num_classes: tuple[int, ...]


def train_step(config: ConfigDict, mesh: Mesh) -> Step:
    """The train step of a config, as `train.train` would compile it, without weights or data.

    Raises:
      ValueError: a field that does not fit, or a batch that the mesh does not divide.
    """
    check_batch_size(config.batch_size, mesh, 'batch_size', config.accumulation)
    model, frozen, num_classes = _model(config)
    settings = train.optimizer_settings(config, train.make_plan(config, ASSUMED_VIDEOS))
    state = jax.eval_shape(train.state_initialiser(config, model, settings), frozen)
    function = step.make_train_step(
        model,
        optim.make_optimizer(state.params, model.param_groups, settings),
        optim.make_schedule(settings),
        train.step_settings(config, num_classes),
        mesh,
    )
    arguments = {'state': state, 'frozen': frozen, 'batch': _batch(config, num_classes)}
    return Step(function, arguments, config.batch_size, model, num_classes)


def eval_step(config: ConfigDict, mesh: Mesh) -> Step:
    """The evaluation step of a config: `eval.batch_size` videos in all their views.

    Raises:
      ValueError: a field that does not fit, or a batch that the mesh does not divide.
    """
    check_batch_size(config.eval.batch_size, mesh, 'eval.batch_size')
    model, frozen, num_classes = _model(config)
    settings = train.optimizer_settings(config, train.make_plan(config, ASSUMED_VIDEOS))
    state = jax.eval_shape(train.state_initialiser(config, model, settings), frozen)
    data, views = config.data, config.eval.num_clips * config.eval.num_crops
    shape = (config.eval.batch_size, views, data.num_frames, data.image_size, data.image_size, 3)
    arguments = {
        'variables': state.eval_variables,
        'frozen': frozen,
        'video': jax.ShapeDtypeStruct(shape, jnp.uint8),
    }
    function = step.make_eval_step(model, mesh, config.eval.fusion)
    return Step(function, arguments, config.eval.batch_size * views, model, num_classes)


def _model(config: ConfigDict) -> tuple[VideoModel, Tree, tuple[int, ...]]:
    classes = experiment.dataset_info(config).num_classes or ASSUMED_CLASSES
    num_classes = classes if isinstance(classes, tuple) else (classes,)
    if config.backbone.name not in clip.SPECS:
        raise ValueError(
            f'backbone.name={config.backbone.name!r} is not one of {", ".join(clip.SPECS)}'
        )
    spec = dataclasses.replace(clip.SPECS[config.backbone.name], image_size=config.data.image_size)
    model = experiment.make_model(config, spec, num_classes)
    return model, experiment.abstract_frozen(spec, model, num_classes), num_classes


def _batch(config: ConfigDict, num_classes: tuple[int, ...]) -> Tree:
    data, clips = config.data, config.batch_size
    labels = (clips, len(num_classes)) if len(num_classes) > 1 else (clips,)
    video = (clips, data.num_frames, data.image_size, data.image_size, 3)
    return {
        'video': jax.ShapeDtypeStruct(video, jnp.uint8),
        'label': jax.ShapeDtypeStruct(labels, jnp.int32),
        'mask': jax.ShapeDtypeStruct((clips,), jnp.float32),
    }


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of a step.

    Attributes:
      text: of the program; '' where it does not fit.
      memory: bytes on a chip: arguments, outputs, aliased (outputs in place of arguments),
        temporaries and program; empty where it does not fit.
      needed_bytes: HBM that the compiler would need, where it does not fit.
      limit_bytes: HBM that the compiler allows, where it said so.
      seconds: of compilation.
    """

    text: str
    memory: dict[str, int]
    needed_bytes: float | None = None
    limit_bytes: float | None = None
    seconds: float = 0.0


def compile_step(one: Step) -> Compiled:
    """Compiles a step; a program that is too large for the HBM is a result, not an error."""
    started = time.monotonic()
    lowered = one.function.lower(*one.arguments.values())
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        sizes = out_of_memory(str(error))
        if sizes is None:
            raise
        return Compiled('', {}, *sizes, seconds=time.monotonic() - started)
    found = compiled.memory_analysis()
    memory = {
        'arguments': found.argument_size_in_bytes,
        'outputs': found.output_size_in_bytes,
        'aliased': found.alias_size_in_bytes,
        'temporaries': found.temp_size_in_bytes,
        'program': found.generated_code_size_in_bytes,
    }
    return Compiled(compiled.as_text(), memory, seconds=time.monotonic() - started)


_SIZE = r'([\d.]+)([KMGT]?)'
_UNITS = {'': 1, 'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}
# "the total memory required for HLO temporaries (36.10G) exceeds available HBM (30.75G)", and in
# other versions "Ran out of memory in memory space hbm. Used 48.1G of 30.75G hbm".
_OUT_OF_MEMORY = (
    re.compile(rf'required for [\w ]+ \({_SIZE}i?B?\) exceeds available HBM \({_SIZE}i?B?\)'),
    re.compile(rf'Used {_SIZE}i?B? of {_SIZE}i?B? hbm'),
)


def out_of_memory(message: str) -> tuple[float, float] | None:
    """(bytes needed, bytes allowed) of the compiler's message; None for any other error."""
    if 'RESOURCE_EXHAUSTED' not in message and 'HbmOom' not in message:
        return None
    for pattern in _OUT_OF_MEMORY:
        found = pattern.search(message)
        if found:
            used, used_unit, limit, limit_unit = found.groups()
            return float(used) * _UNITS[used_unit], float(limit) * _UNITS[limit_unit]
    return None
