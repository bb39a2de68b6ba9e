"""Counts the floating-point operations of a model from its jaxpr, before any compiler sees it.

Products only (`dot_general` and convolutions), two operations a multiply-add, loops multiplied by
their length. The backward pass is not traced but derived: a product costs the same again for each
operand that a gradient flows to. So recomputation (remat) does not count, nor does what a gradient
never reaches, such as a frozen backbone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.interpreters import partial_eval

from dist_jax.models.api import Model, Tree
from dist_jax.step import example_batch, model_inputs
from dist_jax.tasks.api import Task


@dataclasses.dataclass(frozen=True)
class Flops:
    """Floating-point operations of products.

    Attributes:
      forward: of the function.
      backward: of the gradient with respect to the inputs that were named.
    """

    forward: float = 0.0
    backward: float = 0.0

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.forward + other.forward, self.backward + other.backward)

    def __mul__(self, times: float) -> Flops:
        return Flops(times * self.forward, times * self.backward)

    @property
    def total(self) -> float:
        """Forward and backward."""
        return self.forward + self.backward


def count(function: Callable[..., Any], *arguments: Tree, wrt: Sequence[int] = ()) -> Flops:
    """Products of `function(*arguments)` and of its gradient.

    Args:
      function: of arrays; what its result does not need is not counted.
      arguments: trees of arrays or shapes.
      wrt: positions of the arguments that the gradient is taken of.
    """
    closed = jax.make_jaxpr(function)(*arguments)
    flows = [
        position in wrt for position, tree in enumerate(arguments) for _ in jax.tree.leaves(tree)
    ]
    jaxpr, used = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    return _walk(jaxpr, [flow for flow, kept in zip(flows, used) if kept])[0]


def _walk(jaxpr: core.Jaxpr, flows: Sequence[bool]) -> tuple[Flops, list[bool]]:
    """Counts a jaxpr; `flows` says which inputs a gradient flows to, the result which outputs."""
    known: dict[Any, bool] = dict(zip(jaxpr.invars, flows))
    total = Flops()

    def flow(atom: Any) -> bool:
        return not isinstance(atom, core.Literal) and known.get(atom, False)

    for equation in jaxpr.eqns:
        inputs = [flow(atom) for atom in equation.invars]
        found, outputs = _equation(equation, inputs)
        total += found
        for variable, out in zip(equation.outvars, outputs):
            known[variable] = out and jnp.issubdtype(variable.aval.dtype, jnp.inexact)
    return total, [flow(atom) for atom in jaxpr.outvars]


def _equation(equation: Any, inputs: list[bool]) -> tuple[Flops, list[bool]]:
    name, params = equation.primitive.name, equation.params
    same = [any(inputs)] * len(equation.outvars)
    if name in ('dot_general', 'conv_general_dilated'):
        forward = _dot(equation) if name == 'dot_general' else _convolution(equation)
        return Flops(forward, forward * sum(inputs[:2])), same
    if name == 'stop_gradient':
        return Flops(), [False] * len(same)
    if name == 'scan':
        return _scan(params, inputs)
    if name == 'while':
        # No reverse mode, and a length that depends on data: once.
        first = params['cond_nconsts']
        return Flops(_walk(params['body_jaxpr'].jaxpr, inputs[first:])[0].forward), same
    if name == 'cond':
        branches = [_walk(b.jaxpr, inputs[1:]) for b in params['branches']]
        # Forms of one thing for several platforms: the cheapest is what the model asks for.
        choose = min if params.get('branches_platforms') else max
        counted = choose((found for found, _ in branches), key=lambda found: found.total)
        return counted, [any(flags) for flags in zip(*(flags for _, flags in branches))]
    if name == 'pallas_call':
        declared = params.get('cost_estimate')
        forward = float(declared.flops) if declared is not None else _kernel(params)
        # Its gradient is another kernel; products have two operands.
        return Flops(forward, 2 * forward * any(inputs)), same
    for key in ('jaxpr', 'call_jaxpr', 'fun_jaxpr'):
        if key in params:
            inner = getattr(params[key], 'jaxpr', params[key])
            found, flags = _walk(inner, inputs)
            times = params['mesh'].size if name == 'shard_map' else 1
            return found * times, flags
    return Flops(), same


def _scan(params: dict[str, Any], inputs: list[bool]) -> tuple[Flops, list[bool]]:
    constants, carries = params['num_consts'], params['num_carry']
    flags = list(inputs)
    while True:
        found, outputs = _walk(params['jaxpr'].jaxpr, flags)
        carried = [a or b for a, b in zip(flags[constants : constants + carries], outputs)]
        if carried == flags[constants : constants + carries]:
            return found * params['length'], outputs
        flags[constants : constants + carries] = carried


def _dot(equation: Any) -> float:
    (contracting, _), _ = equation.params['dimension_numbers']
    left = equation.invars[0].aval.shape
    return 2.0 * equation.outvars[0].aval.size * math.prod(left[d] for d in contracting)


def _convolution(equation: Any) -> float:
    kernel = equation.invars[1].aval
    features = kernel.shape[equation.params['dimension_numbers'].rhs_spec[0]]
    return 2.0 * equation.outvars[0].aval.size * kernel.size / features


def _kernel(params: dict[str, Any]) -> float:
    grid = params['grid_mapping'].grid if 'grid_mapping' in params else ()
    inner = getattr(params['jaxpr'], 'jaxpr', params['jaxpr'])
    found, _ = _walk(inner, [False] * len(inner.invars))
    return found.forward * math.prod(size for size in grid if isinstance(size, int))


@dataclasses.dataclass(frozen=True)
class ModelFlops:
    """Floating-point operations of one clip.

    Attributes:
      features: of the part that is not trained (the frozen backbone).
      forward: of the trained network.
      backward: of the gradient of its parameters.
    """

    features: float
    forward: float
    backward: float

    @property
    def total(self) -> float:
        """Of a train step, a clip."""
        return self.features + self.forward + self.backward


def count_model(model: Model, task: Task, frozen: Tree, clip_shape: tuple[int, ...]) -> ModelFlops:
    """Counts a model on one clip, as it is evaluated: statistics of a batch are no products.

    Args:
      model: of any family.
      task: what it learns.
      frozen: its frozen tree, arrays or shapes.
      clip_shape: (T, H, W, 3).
    """

    def look(frozen: Tree, batch: Tree) -> Tree:
        return model_inputs(model, task, frozen, batch)

    def net(params: Tree, collections: Tree, inputs: Tree, batch: Tree) -> Tree:
        variables = {'params': params, **collections}
        outputs = model.net.apply(variables, inputs, mask=batch['mask'])
        return task.loss(outputs, task.targets(batch), batch['mask'])

    batch = example_batch(task, (1, *clip_shape))
    inputs = jax.eval_shape(look, frozen, batch)
    variables = dict(jax.eval_shape(model.net.init, jax.random.key(0), inputs))
    params = variables.pop('params')
    features = count(look, frozen, batch)
    trained = count(net, params, variables, inputs, batch, wrt=(0,))
    return ModelFlops(features.forward, trained.forward, trained.backward)
