"""One train step and one eval step for every model family. No family name appears here."""

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
from dist_jax.models.api import Tree, VideoModel
from dist_jax.models.layers import exact_float32
from dist_jax.optim import Schedule
from dist_jax.sharding import (
    batched,
    check_replicated_share,
    gather_params,
    on_mesh,
    place,
    place_like,
    place_whole,
    replicated,
    shardings,
    split_batch,
)

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


class TrainState(flax.struct.PyTreeNode):
    """Everything a step changes.

    Attributes:
      step: updates done, int32.
      params: trainable parameters, float32.
      extra: other collections of the network (batch statistics); often empty.
      opt_state: of the optimizer.
      ema: moving average of `params`, or None.
    """

    step: jax.Array
    params: Tree
    extra: Tree
    opt_state: optax.OptState
    ema: Tree | None

    @property
    def eval_variables(self) -> Tree:
        """What evaluation applies: averaged parameters where there are any."""
        return {'params': self.params if self.ema is None else self.ema, **self.extra}


@dataclasses.dataclass(frozen=True)
class StepSettings:
    """The part of a recipe that lives in the compiled step.

    Attributes:
      num_classes: of each label column.
      label_smoothing: mass spread over all classes.
      mixing: mixup and cutmix.
      accumulation: parts the batch is processed in, one after the other.
      ema_decay: of the parameter average; 0 for none.
      seed: of the random numbers of mixing and dropout.
    """

    num_classes: tuple[int, ...]
    label_smoothing: float = 0.0
    mixing: Mixing = dataclasses.field(default_factory=Mixing)
    accumulation: int = 1
    ema_decay: float = 0.0
    seed: int = 0


def example_features(model: VideoModel, frozen: Tree, video_shape: tuple[int, ...]) -> Tree:
    """Abstract inputs of the network for uint8 clips of this shape (B, T, H, W, 3)."""
    video = jax.ShapeDtypeStruct(video_shape, jnp.uint8)
    return jax.eval_shape(lambda f, v: model.features(f, model.normalize(v)), frozen, video)


def init_state(
    model: VideoModel,
    frozen: Tree,
    video_shape: tuple[int, ...],
    seed: int,
    make_optimizer: Callable[[Tree], optax.GradientTransformation],
    ema: bool = False,
) -> TrainState:
    """A fresh state; call under jit with `out_shardings`, or under eval_shape for shapes alone.

    Args:
      model: the family's model.
      frozen: its frozen tree, arrays or shapes.
      video_shape: (B, T, H, W, 3) of any small batch.
      seed: of the initial parameters.
      make_optimizer: parameters -> optimizer.
      ema: whether the average is kept.
    """
    features = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), example_features(model, frozen, video_shape)
    )
    variables = dict(model.net.init(jax.random.key(seed), features))
    params = variables.pop('params')
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        extra=variables,
        opt_state=make_optimizer(params).init(params),
        ema=jax.tree.map(jnp.copy, params) if ema else None,
    )


def place_variables(model: VideoModel, variables: Tree, mesh: Mesh) -> Tree:
    """{'params': ..., **collections} as placed `jax.ShapeDtypeStruct` leaves.

    Raises:
      ValueError: the mesh would leave too much of the parameters whole.
    """
    collections = dict(variables)
    params = place(collections.pop('params'), model.sharding_rules, mesh)
    check_replicated_share(params, mesh, 'trainable parameters')
    return {'params': params, **place_whole(collections, mesh)}


def place_state(model: VideoModel, state: TrainState, mesh: Mesh) -> TrainState:
    """A state, arrays or shapes, as placed `jax.ShapeDtypeStruct` leaves.

    Moments and averages lie as the parameter that they belong to.

    Raises:
      ValueError: the mesh would leave too much of the parameters whole.
    """
    params = place_variables(model, {'params': state.params}, mesh)['params']
    return TrainState(
        step=place_whole(state.step, mesh),
        params=params,
        extra=place_whole(state.extra, mesh),
        opt_state=place_like(state.opt_state, params, mesh),
        ema=None if state.ema is None else place_like(state.ema, params, mesh),
    )


def make_train_step(
    model: VideoModel,
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
    (B, T, H, W, 3) uint8, `label` (B,) or (B, columns) int32, `mask` (B,) float32. Metrics are
    scalars: `loss`, `grad_norm`, `learning_rate`, `clips` (unmasked rows), and `finite`, whether
    loss and gradients are.
    """

    def loss_fn(
        params: Tree, extra: Tree, features: Tree, part: Tree, key: jax.Array, total: jax.Array
    ) -> tuple[jax.Array, Tree]:
        outputs, updated = model.net.apply(
            {'params': gather_params(params, model.sharding_rules), **extra},
            features,
            train=True,
            rngs={'dropout': key},
            mutable=list(extra),
        )
        per_example = sum(
            losses.soft_cross_entropy(logits, targets)
            for logits, targets in zip(outputs['logits'], part['targets'])
        )
        return losses.masked_mean(per_example, part['mask'], total), updated

    def step(state: TrainState, frozen: Tree, batch: Batch) -> tuple[TrainState, Metrics]:
        mix_key, dropout_key = jax.random.split(
            jax.random.fold_in(jax.random.key(settings.seed), state.step)
        )
        mask = batch['mask']
        total = mask.sum()
        labels = batch['label'].reshape(mask.shape[0], -1)
        targets = tuple(
            losses.smooth_one_hot(labels[:, column], classes, settings.label_smoothing)
            for column, classes in enumerate(settings.num_classes)
        )
        mixed, targets = mix(mix_key, batch['video'], targets, mask, settings.mixing)
        video, targets = split_batch((model.normalize(mixed), targets))

        def part_gradients(extra: Tree, part: Tree, index: jax.Array) -> tuple[Any, Tree]:
            features = model.features(frozen, part['video'])
            key = jax.random.fold_in(dropout_key, index)
            return jax.value_and_grad(loss_fn, has_aux=True)(
                state.params, extra, features, part, key, total
            )

        whole = {'video': video, 'targets': targets, 'mask': mask}
        (loss, extra), grads = _accumulate(
            part_gradients, state.extra, whole, settings.accumulation, state.params
        )
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema is not None:
            ema = optax.incremental_update(params, ema, 1.0 - settings.ema_decay)
        grad_norm = optax.global_norm(grads)
        metrics = {
            'loss': loss,
            'grad_norm': grad_norm,
            'learning_rate': schedule(state.step),
            'clips': total,
            'finite': jnp.isfinite(loss) & jnp.isfinite(grad_norm),
        }
        new_state = TrainState(
            step=state.step + 1, params=params, extra=extra, opt_state=opt_state, ema=ema
        )
        return new_state, metrics

    whole = replicated(mesh)
    of_state, of_frozen = _shardings(state, mesh), _shardings(frozen, mesh)
    return jax.jit(
        on_mesh(mesh, exact_float32(step)),
        in_shardings=(of_state, of_frozen, batched(mesh)),
        out_shardings=(of_state, whole),
        donate_argnums=0,
    )


def _shardings(placed: Tree | None, mesh: Mesh) -> Tree:
    return replicated(mesh) if placed is None else shardings(placed)


def _accumulate(
    gradients: Callable[[Tree, Tree, jax.Array], tuple[Any, Tree]],
    extra: Tree,
    batch: Tree,
    parts: int,
    params: Tree,
) -> tuple[tuple[jax.Array, Tree], Tree]:
    """Sums loss and gradients over `parts` slices of the batch, with one slice in memory."""
    if parts == 1:
        return gradients(extra, batch, jnp.int32(0))
    # Slice i takes rows i, i + parts, ...: every device keeps working on rows that it holds.
    sliced = jax.tree.map(
        lambda x: x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1), batch
    )

    def body(carry: tuple[Any, Tree, Tree], part: tuple[Tree, jax.Array]) -> tuple[Any, None]:
        loss, extra, total = carry
        rows, index = part
        (part_loss, extra), grads = gradients(extra, split_batch(rows), index)
        return (loss + part_loss, extra, jax.tree.map(jnp.add, total, grads)), None

    start = (jnp.zeros(()), extra, jax.tree.map(jnp.zeros_like, params))
    (loss, extra, grads), _ = jax.lax.scan(body, start, (sliced, jnp.arange(parts)))
    return (loss, extra), grads


def make_eval_step(
    model: VideoModel,
    mesh: Mesh,
    fusion: float = 0.0,
    variables: Tree | None = None,
    frozen: Tree | None = None,
) -> Callable[[Tree, Tree, jax.Array], tuple[jax.Array, ...]]:
    """The jitted evaluation: (variables, frozen, video) -> class probabilities.

    `video` is (B, V, T, H, W, 3) uint8; the softmax scores of the V views are averaged. Returns
    float32 (B, num_classes), one entry a label column.

    Args:
      model: the family's model.
      mesh: the devices.
      fusion: weight of the frozen backbone's own logits (0.5 in the paper's zero-shot tests, 1 for
        the backbone alone, 0 for the trained model alone).
      variables: leaves with the shardings of this argument; None: every device holds all.
      frozen: likewise.

    Raises:
      ValueError: fusion is asked of a model without text features.
    """
    if fusion and model.frozen_logits is None:
        raise ValueError(
            f'eval.fusion={fusion} needs class texts: it works with model.head=text only'
        )

    def step(variables: Tree, frozen: Tree, video: jax.Array) -> tuple[jax.Array, ...]:
        clips, views = video.shape[:2]
        pixels = split_batch(model.normalize(video.reshape(-1, *video.shape[2:])))
        gathered = gather_params(variables['params'], model.sharding_rules)
        features = model.features(frozen, pixels)
        columns = model.net.apply({**variables, 'params': gathered}, features)['logits']
        if fusion:
            own = model.frozen_logits(frozen, features)
            columns = tuple((1 - fusion) * a + fusion * b for a, b in zip(columns, own))
        scores = (jax.nn.softmax(logits.astype(jnp.float32)) for logits in columns)
        return tuple(s.reshape(clips, views, -1).mean(1) for s in scores)

    return jit_on_clips(step, mesh, variables, frozen)


def jit_on_clips(
    function: Callable[[Tree, Tree, jax.Array], Tree],
    mesh: Mesh,
    variables: Tree | None = None,
    frozen: Tree | None = None,
) -> Callable[[Tree, Tree, jax.Array], Tree]:
    """Jits (variables, frozen, video) -> results, axis 0 of video and results being clips.

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
    )
