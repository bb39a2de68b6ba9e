"""Builds the steps of a config from shapes alone and compiles them for a mesh of any devices."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from configs import base
from dist_jax import evaluate, experiment, optim, recipe, step, train
from dist_jax.models import clip
from dist_jax.models.api import Tree, VideoModel
from dist_jax.plan.gradients import with_gradients
from dist_jax.sharding import batched, check_batch_size, replicated

# The length of a run decides numbers of the schedule, not the program.
ASSUMED_VIDEOS = 100_000
ASSUMED_CLASSES = 400  # where the classes come from a list

CALIBRATION_SIZE = 8192


@dataclasses.dataclass(frozen=True)
class Step:
    """A jitted step with the shapes it is called with.

    Attributes:
      function: jitted.
      arguments: trees of `jax.ShapeDtypeStruct` with shardings, by name, in order.
      clips: clips that one call works on, over all devices.
      model: the family's model; None for the calibration.
      batches: that are on the devices together: this call's, and those sent ahead.
    """

    function: Callable[..., Any]
    arguments: dict[str, Tree]
    clips: int
    model: VideoModel | None
    batches: int = 1


def train_step(config: ConfigDict, mesh: Mesh, gradients: str = 'frozen') -> Step:
    """The train step of a config, as `train.train` would compile it, without weights or data.

    Args:
      config: of one experiment.
      mesh: the devices.
      gradients: where gradients flow; see `gradients`.

    Raises:
      ValueError: a field that does not fit, or a batch that the mesh does not divide.
    """
    base.check(config)
    check_batch_size(config.batch_size, mesh, 'batch_size', config.accumulation)
    model, frozen, state, num_classes = _model(config, mesh, gradients)
    settings = _optimizer_settings(config)
    function = step.make_train_step(
        model,
        optim.make_optimizer(state.params, model.param_groups, settings),
        optim.make_schedule(settings),
        train.step_settings(config, num_classes),
        mesh,
        state,
        frozen,
    )
    data, clips = config.data, config.batch_size
    labels = (clips, len(num_classes)) if len(num_classes) > 1 else (clips,)
    video = (clips, data.num_frames, data.image_size, data.image_size, 3)
    batch = {
        'video': jax.ShapeDtypeStruct(video, jnp.uint8),
        'label': jax.ShapeDtypeStruct(labels, jnp.int32),
        'mask': jax.ShapeDtypeStruct((clips,), jnp.float32),
    }
    arguments = {'state': state, 'frozen': frozen, 'batch': _split(batch, mesh)}
    return Step(function, arguments, clips, model, train.BATCHES_ON_DEVICE)


def eval_step(config: ConfigDict, mesh: Mesh) -> Step:
    """The evaluation step of a config: `eval.batch_size` videos in all their views.

    Raises:
      ValueError: a field that does not fit, or a batch that the mesh does not divide.
    """
    check_batch_size(config.eval.batch_size, mesh, 'eval.batch_size')
    model, frozen, state, _ = _model(config, mesh, 'frozen')
    reader = recipe.eval_reader(config)
    shape = (config.eval.batch_size, *reader.shape)
    arguments = {
        'variables': state.eval_variables,
        'frozen': frozen,
        'video': _split(jax.ShapeDtypeStruct(shape, jnp.uint8), mesh),
    }
    function = step.make_eval_step(model, mesh, config.eval.fusion, state.eval_variables, frozen)
    clips = config.eval.batch_size * reader.num_views
    return Step(function, arguments, clips, model, evaluate.BATCHES_ON_DEVICE)


def calibration_step(devices: list[Any]) -> Step:
    """A plain square bfloat16 product on one chip, whose cycles are easy to judge."""
    place = replicated(Mesh(np.asarray(devices[:1]), ('data',)))
    shape = (CALIBRATION_SIZE, CALIBRATION_SIZE)
    one = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place)
    return Step(jax.jit(jnp.matmul), {'a': one, 'b': one}, 1, None)


def _split(tree: Tree, mesh: Mesh) -> Tree:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=batched(mesh)), tree
    )


def _optimizer_settings(config: ConfigDict) -> optim.OptimizerSettings:
    return train.optimizer_settings(config, train.make_plan(config, ASSUMED_VIDEOS))


def _model(
    config: ConfigDict, mesh: Mesh, gradients: str
) -> tuple[VideoModel, Tree, step.TrainState, tuple[int, ...]]:
    """Model, frozen tree, state (both as shapes with shardings), classes of each label column."""
    classes = recipe.dataset_info(config).num_classes or ASSUMED_CLASSES
    num_classes = classes if isinstance(classes, tuple) else (classes,)
    if config.backbone.name not in clip.SPECS:
        raise ValueError(
            f'backbone.name={config.backbone.name!r} is not one of {", ".join(clip.SPECS)}'
        )
    spec = dataclasses.replace(clip.SPECS[config.backbone.name], image_size=config.data.image_size)
    model = experiment.make_model(config, spec, num_classes)
    frozen = experiment.abstract_frozen(spec, model, num_classes)
    model, frozen = with_gradients(model, frozen, gradients)
    initialise = train.state_initialiser(config, model, _optimizer_settings(config))
    state = step.place_state(model, jax.eval_shape(initialise, frozen), mesh)
    return model, experiment.place_frozen(model, frozen, mesh), state, num_classes


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of a step.

    Attributes:
      text: of the program; '' where it does not fit.
      memory: bytes on a chip: arguments, outputs, aliased (outputs in place of arguments),
        temporaries and program; empty where it does not fit.
      fits: whether the compiler found room in the HBM.
      needed_bytes: HBM that it would need, where it does not fit and said so.
      limit_bytes: HBM that it allows, likewise.
      largest: the largest allocations, likewise: (bytes, name stack, shape).
      seconds: of compilation.
    """

    text: str
    memory: dict[str, int]
    fits: bool = True
    needed_bytes: float | None = None
    limit_bytes: float | None = None
    largest: tuple[tuple[float, str, str], ...] = ()
    seconds: float = 0.0


def compile_lowered(lowered: jax.stages.Lowered) -> Compiled:
    """Compiles; a program that is too large for the HBM is a result, not an error."""
    started = time.monotonic()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        found = out_of_memory(str(error))
        if found is None:
            raise
        return dataclasses.replace(found, seconds=time.monotonic() - started)
    found = compiled.memory_analysis()
    memory = {
        'arguments': found.argument_size_in_bytes,
        'outputs': found.output_size_in_bytes,
        'aliased': found.alias_size_in_bytes,
        'temporaries': found.temp_size_in_bytes,
        'program': found.generated_code_size_in_bytes,
    }
    return Compiled(compiled.as_text(), memory, seconds=time.monotonic() - started)


_SIZE = r'([\d.]+)([KMGT]?)i?B?'
_UNITS = {'': 1, 'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}
# "the total memory required for HLO temporaries (36.10G) exceeds available HBM (30.75G)" counts
# arguments too; "Ran out of memory in memory space hbm. Used 48.1G of 30.75G hbm" comes with a list
# of the largest allocations.
_OUT_OF_MEMORY = (
    re.compile(rf'required for [\w ]+ \({_SIZE}\) exceeds available HBM \({_SIZE}\)'),
    re.compile(rf'Used {_SIZE} of {_SIZE} hbm'),
)
_ALLOCATION = re.compile(
    rf'\d+\. Size: {_SIZE}\s*\n\s*Operator: op_name="([^"]*)"\s*\n(?:\s*Shape: (\S+))?'
)


def out_of_memory(message: str) -> Compiled | None:
    """What the compiler's message says of a program that is too large; None for other errors."""
    if 'CompileTimeHbmOom' not in message and 'memory space hbm' not in message:
        return None
    needed = limit = None
    for pattern in _OUT_OF_MEMORY:
        found = pattern.search(message)
        if found:
            needed, limit = (float(found[i]) * _UNITS[found[i + 1]] for i in (1, 3))
            break
    largest = tuple(
        (float(size) * _UNITS[unit], name, shape)
        for size, unit, name, shape in _ALLOCATION.findall(message)
    )
    return Compiled('', {}, False, needed, limit, largest)
