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

from dist_jax import experiment, optim, recipe, step, train, views
from dist_jax.configs import base
from dist_jax.models.api import Model, Tree
from dist_jax.plan import flops
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
      model_flops: of one clip; None for the calibration.
      flops_per_clip: those of them that this step does.
      batches: that are on the devices together: this call's, and those sent ahead.
    """

    function: Callable[..., Any]
    arguments: dict[str, Tree]
    clips: int
    model_flops: flops.ModelFlops | None = None
    flops_per_clip: float = 0.0
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
    experiment.check_trains(config)
    check_batch_size(config.batch_size, mesh, 'batch_size', config.accumulation)
    parts = assemble(config)
    model, frozen = with_gradients(parts.model, parts.abstract_frozen(), gradients)
    settings = _optimizer_settings(config)
    initialise = train.state_initialiser(config, model, parts.task, parts.train_shape, settings)
    state = step.place_state(model, jax.eval_shape(initialise, frozen), mesh)
    frozen = _place_frozen(model, frozen, mesh)
    function = step.make_train_step(
        model,
        parts.task,
        optim.of_model(model, state.params, settings),
        optim.make_schedule(settings),
        train.step_settings(config),
        mesh,
        state,
        frozen,
    )
    clips = config.batch_size
    batch = step.example_batch(parts.task, (clips, *parts.train_shape))
    arguments = {'state': state, 'frozen': frozen, 'batch': _split(batch, mesh)}
    counted = flops.count_model(model, parts.task, frozen, parts.train_shape)
    return Step(function, arguments, clips, counted, counted.total, train.BATCHES_ON_DEVICE)


def eval_step(config: ConfigDict, mesh: Mesh) -> Step:
    """The evaluation step of a config: `eval.batch_size` videos in all their views.

    Raises:
      ValueError: a field that does not fit, or a batch that the mesh does not divide.
    """
    check_batch_size(config.eval.batch_size, mesh, 'eval.batch_size')
    parts, videos = assemble(config), config.eval.batch_size
    model, task = parts.test_model, parts.task
    frozen = _place_frozen(model, parts.abstract_frozen(test=True), mesh)
    variables = step.place_variables(model, parts.abstract_variables(), mesh)
    reader = recipe.eval_reader(config)
    batch = step.example_batch(task, (videos, *reader.shape))
    batch = {name: batch[name] for name in ('video', *task.eval_input_keys)}
    arguments = {'variables': variables, 'frozen': frozen, 'batch': _split(batch, mesh)}
    function = step.make_eval_step(model, task, mesh, variables, frozen)
    counted = flops.count_model(model, task, frozen, parts.test_shape)
    clips, each = videos * reader.num_views, counted.features + counted.forward
    return Step(function, arguments, clips, counted, each, views.BATCHES_ON_DEVICE)


def calibration_step(devices: list[Any]) -> Step:
    """A plain square bfloat16 product on one chip, whose cycles are easy to judge."""
    place = replicated(Mesh(np.asarray(devices[:1]), ('data',)))
    shape = (CALIBRATION_SIZE, CALIBRATION_SIZE)
    one = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place)
    return Step(jax.jit(jnp.matmul), {'a': one, 'b': one}, 1)


def _split(tree: Tree, mesh: Mesh) -> Tree:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=batched(mesh)), tree
    )


def _optimizer_settings(config: ConfigDict) -> optim.OptimizerSettings:
    return train.optimizer_settings(config, train.make_plan(config, ASSUMED_VIDEOS))


def assemble(config: ConfigDict) -> experiment.Experiment:
    """The parts of a config whose lists nobody has: classes, if any, have numbers for names."""
    classes = recipe.dataset_info(config).num_classes or ASSUMED_CLASSES
    sizes = classes if isinstance(classes, tuple) else (classes,)
    labels = tuple(tuple(map(str, range(size))) for size in sizes)
    if not recipe.task_kind(config).needs_classes:
        labels = ()
    return experiment.assemble(config, labels, experiment.sized_backbone(config))


def _place_frozen(model: Model, frozen: Tree, mesh: Mesh) -> Tree:
    return frozen if model.frozen is None else model.frozen.place(frozen, mesh)


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
    signs = ('CompileTimeHbmOom', 'memory space hbm', 'out of memory on HBM')
    if not any(sign in message for sign in signs):
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
