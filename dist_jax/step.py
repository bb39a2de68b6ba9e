"""One train step and one eval step for every family and task. No name of one appears here."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from dist_jax import losses
from dist_jax.mixup import Mixing, mix
from dist_jax.models import converted
from dist_jax.models.api import Model, Tree
from dist_jax.models.layers import exact_float32
from dist_jax.optim import Schedule
from dist_jax.sharding import (
    batched,
    check_replicated_share,
    compiler_options,
    gather_params,
    on_mesh,
    place,
    place_like,
    place_whole,
    replicated,
    shardings,
    split_batch,
)
from dist_jax.tasks.api import Task

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
Network = Callable[[Tree], tuple[Tree, Tree]]  # parameters -> outputs, collections


class TrainState(flax.struct.PyTreeNode):
    """Everything a step changes.

    Attributes:
      step: updates done, int32.
      params: trainable parameters, float32.
      collections: others of the network (batch statistics); often empty.
      opt_state: of the optimizer.
      ema: moving average of `params`, and beside them of `collections` under their names; or None.
        Averaged parameters need the statistics of what they compute, as timm's ModelEmaV2 keeps
        them.
    """

    step: jax.Array
    params: Tree
    collections: Tree
    opt_state: optax.OptState
    ema: Tree | None

    @property
    def variables(self) -> Tree:
        """What training applies."""
        return {'params': self.params, **self.collections}

    @property
    def eval_variables(self) -> Tree:
        """What evaluation applies: averages where there are any."""
        if self.ema is None:
            return self.variables
        return converted.variables(self.ema, {converted.COLLECTIONS: self.collections})

    def with_eval_collections(self, collections: Tree) -> TrainState:
        """With these in the place of the collections that evaluation applies."""
        if self.ema is None:
            return self.replace(collections=collections)
        return self.replace(ema={**self.ema, **collections})


class Statistics(flax.struct.PyTreeNode):
    """The plain average of what parts of batches give, one after the other.

    Attributes:
      mean: collections of the network; what stood there before, until a part has real clips.
      parts: with real clips so far, float32.
    """

    mean: Tree
    parts: jax.Array


@dataclasses.dataclass(frozen=True)
class StepSettings:
    """The part of a recipe that lives in the compiled step.

    Attributes:
      mixing: mixup and cutmix.
      accumulation: parts the batch is processed in, one after the other.
      ema_decay: of the average of parameters and statistics; 0 for none.
      seed: of the random numbers of mixing and dropout.
    """

    mixing: Mixing = dataclasses.field(default_factory=Mixing)
    accumulation: int = 1
    ema_decay: float = 0.0
    seed: int = 0


def example_batch(task: Task, video_shape: tuple[int, ...]) -> Batch:
    """The shapes of a batch of uint8 clips (B, ..., H, W, 3), as `sharding.to_global` has them."""
    size, *lead, width, channels = video_shape
    return {
        'video': jax.ShapeDtypeStruct((size, *lead, width * channels), jnp.uint8),
        'mask': jax.ShapeDtypeStruct((size,), jnp.float32),
        **{
            name: jax.ShapeDtypeStruct((size, *row.shape), row.dtype)
            for name, row in task.element_spec.items()
        },
    }


def model_inputs(model: Model, task: Task, frozen: Tree, batch: Batch) -> Tree:
    """What the network reads of a batch as training has it, see `make_train_step`."""
    seen = {name: batch[name] for name in task.input_keys}
    return model.inputs(frozen, {'video': model.normalize(batch['video']), **seen})


def example_inputs(model: Model, task: Task, frozen: Tree, video_shape: tuple[int, ...]) -> Tree:
    """Abstract inputs of the network for uint8 clips of this shape (B, T, H, W, 3)."""
    batch = example_batch(task, video_shape)
    return jax.eval_shape(lambda f, b: model_inputs(model, task, f, b), frozen, batch)


def init_state(
    model: Model,
    task: Task,
    frozen: Tree,
    video_shape: tuple[int, ...],
    seed: int,
    make_optimizer: Callable[[Tree], optax.GradientTransformation],
    ema: bool = False,
) -> TrainState:
    """A fresh state; call under jit with `out_shardings`, or under eval_shape for shapes alone.

    Args:
      model: the family's model.
      task: what it learns.
      frozen: its frozen tree, arrays or shapes.
      video_shape: (B, T, H, W, 3) of any small batch.
      seed: of the initial parameters.
      make_optimizer: parameters -> optimizer.
      ema: whether the average is kept.

    Raises:
      ValueError: the network has not the outputs that the task reads.
    """
    inputs = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
        example_inputs(model, task, frozen, video_shape),
    )
    outputs, variables = model.net.init_with_output(jax.random.key(seed), inputs)
    task.check(outputs)
    collections = dict(variables)
    params = collections.pop('params')
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        collections=collections,
        opt_state=make_optimizer(params).init(params),
        ema=fresh_average(variables) if ema else None,
    )


def fresh_average(variables: Tree) -> Tree:
    """`TrainState.ema` before the first step."""
    return jax.tree.map(jnp.copy, converted.stored_tree(variables))


def place_variables(model: Model, variables: Tree, mesh: Mesh) -> Tree:
    """{'params': ..., **collections} as placed `jax.ShapeDtypeStruct` leaves.

    Raises:
      ValueError: the mesh would leave too much of the parameters whole.
    """
    collections = dict(variables)
    params = place(collections.pop('params'), model.sharding_rules, mesh)
    check_replicated_share(params, mesh, 'trainable parameters')
    return {'params': params, **place_whole(collections, mesh)}


def place_state(model: Model, state: TrainState, mesh: Mesh) -> TrainState:
    """A state, arrays or shapes, as placed `jax.ShapeDtypeStruct` leaves.

    Moments and averages lie as the parameter that they belong to.

    Raises:
      ValueError: the mesh would leave too much of the parameters whole.
    """
    params = place_variables(model, {'params': state.params}, mesh)['params']
    return TrainState(
        step=place_whole(state.step, mesh),
        params=params,
        collections=place_whole(state.collections, mesh),
        opt_state=place_like(state.opt_state, params, mesh),
        ema=None if state.ema is None else place_like(state.ema, params, mesh),
    )


def make_train_step(
    model: Model,
    task: Task,
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    settings: StepSettings,
    mesh: Mesh,
    state: TrainState | None = None,
    frozen: Tree | None = None,
) -> Callable[[TrainState, Tree, Batch], tuple[TrainState, Metrics]]:
    """The jitted step: (state, frozen, batch) -> (state, metrics).

    State and frozen tree have the shardings of the leaves of `state` and `frozen`, arrays or
    shapes; None: every device holds all. The state is donated. The frozen tree is an argument of
    its own: neither donated, nor differentiated, nor known to the optimizer. Batch: `video`
    (B, T, H, W, 3) uint8, or rows of pixels (B, T, H, 3 W), see `layers.as_rows`; `mask` (B,)
    float32; and the task's `element_spec` with B before each shape. Metrics are scalars: `loss`,
    `grad_norm`, `learning_rate`, `clips` (unmasked rows), and `finite`, whether loss and gradients
    are.

    Raises:
      ValueError: the task cannot be trained with these settings.
    """
    if settings.mixing.enabled and not task.mixes:
        raise ValueError(
            f'mixing.probability={settings.mixing.probability}: this task has no targets that '
            'could be mixed; set mixing.probability=0'
        )

    def step(state: TrainState, frozen: Tree, batch: Batch) -> tuple[TrainState, Metrics]:
        mix_key, dropout_key = _step_keys(settings.seed, state.step)
        mask = batch['mask']
        total = mask.sum()
        mixed, targets = mix(mix_key, batch['video'], task.targets(batch), mask, settings.mixing)
        video, targets = split_batch((model.normalize(mixed), targets))

        def network(collections: Tree, part: Tree, index: jax.Array) -> Network:
            # The cut: what is frozen is outside of what is differentiated.
            inputs = jax.lax.stop_gradient(model.inputs(frozen, part['inputs']))
            key = jax.random.fold_in(dropout_key, index)
            return lambda params: model.net.apply(
                {'params': gather_params(params, model.sharding_rules), **collections},
                inputs,
                mask=part['mask'],
                train=True,
                rngs={'dropout': key},
                mutable=list(collections),
            )

        def loss_of(outputs: Tree, rows: Tree) -> jax.Array:
            per_row = task.loss(outputs, rows['targets'], rows['mask'])
            return losses.masked_mean(per_row, rows['mask'], total)

        inputs = {'video': video} | {name: batch[name] for name in task.input_keys}
        parts = {'inputs': inputs, 'targets': targets, 'mask': mask}
        coupled = task.couples_rows and settings.accumulation > 1
        (loss, collections), grads = (_accumulate_coupled if coupled else _accumulate)(
            network, loss_of, state.params, state.collections, parts, settings.accumulation
        )
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema is not None:
            new = converted.stored_tree({'params': params, **collections})
            ema = optax.incremental_update(new, ema, 1.0 - settings.ema_decay)
        grad_norm = optax.global_norm(grads)
        metrics = {
            'loss': loss,
            'grad_norm': grad_norm,
            'learning_rate': schedule(state.step),
            'clips': total,
            'finite': jnp.isfinite(loss) & jnp.isfinite(grad_norm),
        }
        new_state = TrainState(
            step=state.step + 1,
            params=params,
            collections=collections,
            opt_state=opt_state,
            ema=ema,
        )
        return new_state, metrics

    whole = replicated(mesh)
    of_state, of_frozen = _shardings(state, mesh), _shardings(frozen, mesh)
    return jax.jit(
        on_mesh(mesh, exact_float32(step)),
        in_shardings=(of_state, of_frozen, batched(mesh)),
        out_shardings=(of_state, whole),
        donate_argnums=0,
        compiler_options=compiler_options(mesh),
    )


def make_statistics_step(
    model: Model,
    task: Task,
    settings: StepSettings,
    mesh: Mesh,
    params: Tree | None = None,
    frozen: Tree | None = None,
) -> Callable[[Tree, Tree, Batch, jax.Array, Statistics], Statistics]:
    """The jitted average of statistics: (params, frozen, batch, step, before) -> after.

    A forward pass as in training, over the parts of a batch of step `step`, int32, but of clips
    that are not mixed: evaluation sees none that are. Batch statistics take the place of running
    ones, all groups count alike, and so do all parts; parts without a real clip do not count.

    Source: Precise BN, as PySlowFast and mmaction2 have it. Differs: theirs average on each device
    by itself, and mmaction2 in STS's release passes test views.

    Args:
      model: the family's model, all of whose collections are statistics that training makes.
      task: says what the network reads beside the clips.
      settings: `accumulation` and `seed` of the train step.
      mesh: the devices.
      params: leaves with the shardings of this argument; None: every device holds all.
      frozen: likewise.
    """

    def step(
        params: Tree, frozen: Tree, batch: Batch, number: jax.Array, before: Statistics
    ) -> Statistics:
        _, dropout_key = _step_keys(settings.seed, number)
        clips = {'video': split_batch(model.normalize(batch['video']))}
        clips |= {name: batch[name] for name in task.input_keys}

        def body(before: Statistics, part: tuple[Tree, jax.Array]) -> tuple[Statistics, None]:
            rows, index = part
            rows = split_batch(rows)
            _, found = model.net.apply(
                {'params': gather_params(params, model.sharding_rules)},
                model.inputs(frozen, rows['clips']),
                mask=rows['mask'],
                train=True,
                rngs={'dropout': jax.random.fold_in(dropout_key, index)},
                mutable=list(before.mean),
            )
            real = rows['mask'].sum() > 0
            count = before.parts + real

            def move(mean: jax.Array, new: jax.Array) -> jax.Array:
                moved = jnp.where(count == 1, new, mean + (new - mean) / jnp.maximum(count, 1))
                return jnp.where(real, moved, mean)

            return Statistics(jax.tree.map(move, before.mean, found), count), None

        parts = settings.accumulation
        sliced = _sliced({'clips': clips, 'mask': batch['mask']}, parts)
        return jax.lax.scan(body, before, (sliced, jnp.arange(parts)))[0]

    whole = replicated(mesh)
    return jax.jit(
        on_mesh(mesh, exact_float32(step)),
        in_shardings=(
            _shardings(params, mesh),
            _shardings(frozen, mesh),
            batched(mesh),
            whole,
            whole,
        ),
        out_shardings=whole,
        compiler_options=compiler_options(mesh),
    )


def _step_keys(seed: int, step: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of the mixing and the dropout of a step."""
    mix_key, dropout_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), step))
    return mix_key, dropout_key


def _shardings(placed: Tree | None, mesh: Mesh) -> Tree:
    return replicated(mesh) if placed is None else shardings(placed)


def _accumulate(
    network: Callable[[Tree, Tree, jax.Array], Network],
    loss_of: Callable[[Tree, Tree], jax.Array],
    params: Tree,
    collections: Tree,
    batch: Tree,
    parts: int,
) -> tuple[tuple[jax.Array, Tree], Tree]:
    """Sums loss and gradients over `parts` slices of the batch, with one slice in memory.

    Collections go from slice to slice: running statistics move once in each, and the groups of
    `batch_norm` are of the rows of a slice.

    Args:
      network: (collections, slice, its number) -> the network on it.
      loss_of: (outputs, the same rows) -> their part of the loss.
      params: of the network.
      collections: before the first slice.
      batch: trees of (B, ...).
      parts: B / parts rows each.

    Returns:
      (loss, collections after the last slice), gradients.
    """

    def gradients(collections: Tree, rows: Tree, index: jax.Array) -> tuple[Any, Tree]:
        run = network(collections, rows, index)

        def loss_fn(params: Tree) -> tuple[jax.Array, Tree]:
            outputs, updated = run(params)
            return loss_of(outputs, rows), updated

        return jax.value_and_grad(loss_fn, has_aux=True)(params)

    if parts == 1:
        return gradients(collections, batch, jnp.int32(0))
    sliced = _sliced(batch, parts)

    def body(carry: tuple[Any, Tree, Tree], part: tuple[Tree, jax.Array]) -> tuple[Any, None]:
        loss, collections, total = carry
        rows, index = part
        (part_loss, collections), grads = gradients(collections, split_batch(rows), index)
        return (loss + part_loss, collections, jax.tree.map(jnp.add, total, grads)), None

    start = (jnp.zeros(()), collections, jax.tree.map(jnp.zeros_like, params))
    (loss, collections, grads), _ = jax.lax.scan(body, start, (sliced, jnp.arange(parts)))
    return (loss, collections), grads


def _accumulate_coupled(
    network: Callable[[Tree, Tree, jax.Array], Network],
    loss_of: Callable[[Tree, Tree], jax.Array],
    params: Tree,
    collections: Tree,
    batch: Tree,
    parts: int,
) -> tuple[tuple[jax.Array, Tree], Tree]:
    """As `_accumulate`, of a loss that compares all rows of the batch.

    A first pass keeps the outputs of all slices, whose loss is that of the whole batch; a second
    one makes each slice again and sends the gradient of its outputs back. So the memory is that of
    a slice and of all outputs, and everything but the backward pass is computed twice.

    Source: Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup"
    (arXiv:2101.06983).
    """
    sliced = _sliced(batch, parts), jnp.arange(parts)

    def forward(collections: Tree, part: tuple[Tree, jax.Array]) -> tuple[Tree, Tree]:
        rows, index = part
        outputs, collections = network(collections, split_batch(rows), index)(params)
        return collections, outputs

    _, outputs = jax.lax.scan(forward, collections, sliced)
    together = jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), outputs)
    loss, upstream = jax.value_and_grad(loss_of)(split_batch(together), batch)

    def backward(carry: tuple[Tree, Tree], part: tuple[Any, Tree]) -> tuple[Any, None]:
        (collections, total), ((rows, index), upstream) = carry, part
        run = network(collections, split_batch(rows), index)
        _, pull, collections = jax.vjp(run, params, has_aux=True)
        (grads,) = pull(split_batch(upstream))
        return (collections, jax.tree.map(jnp.add, total, grads)), None

    start = collections, jax.tree.map(jnp.zeros_like, params)
    (collections, grads), _ = jax.lax.scan(backward, start, (sliced, _sliced(upstream, parts)))
    return (loss, collections), grads


def _sliced(batch: Tree, parts: int) -> Tree:
    """(B, ...) -> (parts, B / parts, ...): slice i has rows i, i + parts, ...

    So every device keeps working on rows that it holds.
    """
    return jax.tree.map(
        lambda x: x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1), batch
    )


def make_eval_step(
    model: Model,
    task: Task,
    mesh: Mesh,
    variables: Tree | None = None,
    frozen: Tree | None = None,
) -> Callable[[Tree, Tree, Batch], dict[str, Tree]]:
    """The jitted evaluation: (variables, frozen, batch) -> what the task predicts, (B, ...) leaves.

    The batch has `video` (B, V, T, H, W, 3) uint8, or rows of pixels (B, V, T, H, 3 W), V views of
    each, and the task's `eval_input_keys`.

    Args:
      model: the family's model.
      task: says what the outputs for the views of a video mean together.
      mesh: the devices.
      variables: leaves with the shardings of this argument; None: every device holds all.
      frozen: likewise.
    """

    return jit_on_rows(eval_function(model, task), mesh, variables, frozen)


def eval_function(model: Model, task: Task) -> Callable[[Tree, Tree, Batch], dict[str, Tree]]:
    """What `make_eval_step` jits, for whoever compiles it otherwise; see `exact_float32`."""

    def step(variables: Tree, frozen: Tree, batch: Batch) -> dict[str, Tree]:
        views = batch['video'].shape[1]
        clips = {name: jnp.repeat(batch[name], views, axis=0) for name in task.eval_input_keys} | {
            'video': clips_of_views(model, batch['video'])
        }
        gathered = gather_params(variables['params'], model.sharding_rules)
        outputs = model.net.apply({**variables, 'params': gathered}, model.inputs(frozen, clips))
        return task.predict(outputs, views)

    return step


def make_query_step(
    model: Model,
    task: Task,
    mesh: Mesh,
    variables: Tree | None = None,
    frozen: Tree | None = None,
) -> Callable[[Tree, Tree, Batch], dict[str, Tree]]:
    """The jitted answers to `Task.queries`: (variables, frozen, rows) -> (Q, ...) leaves.

    Arguments are those of `make_eval_step`.
    """

    def step(variables: Tree, frozen: Tree, rows: Batch) -> dict[str, Tree]:
        gathered = gather_params(variables['params'], model.sharding_rules)
        outputs = model.net.apply({**variables, 'params': gathered}, model.inputs(frozen, rows))
        return task.predict_queries(outputs)

    return jit_on_rows(step, mesh, variables, frozen)


def clips_of_views(model: Model, video: jax.Array) -> jax.Array:
    """(B, V, T, H, W, 3) uint8, or rows -> (B * V, T, ...) as `Model.inputs` takes it."""
    return split_batch(model.normalize(video.reshape(-1, *video.shape[2:])))


def jit_on_rows(
    function: Callable[[Tree, Tree, Tree], Tree],
    mesh: Mesh,
    variables: Tree | None = None,
    frozen: Tree | None = None,
) -> Callable[[Tree, Tree, Tree], Tree]:
    """Jits (variables, frozen, batch) -> results, axis 0 of all leaves of both being rows.

    Args:
      function: of plain arrays.
      mesh: the devices.
      variables: leaves with the shardings of this argument; None: every device holds all.
      frozen: likewise.
    """
    split = batched(mesh)
    return jax.jit(
        on_mesh(mesh, exact_float32(function)),
        in_shardings=(_shardings(variables, mesh), _shardings(frozen, mesh), split),
        out_shardings=split,
        compiler_options=compiler_options(mesh),
    )
