"""From a config to the parts of an experiment that compute: backbone, model; data: `recipe`.

Training, evaluation and prediction all build their parts here, so they agree.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dist_jax import backbones, recipe, shipped, step
from dist_jax.configs import base
from dist_jax.init_from import Origin
from dist_jax.models import FAMILIES, Family
from dist_jax.models.api import Model, Tree
from dist_jax.models.backbone import Backbone
from dist_jax.models.frozen import ClassTexts
from dist_jax.models.params import flatten
from dist_jax.paths import SHIPPED
from dist_jax.sharding import check_batch_size, check_repeats
from dist_jax.tasks.api import Labels, Task, neutral_text

DTYPES = {'bfloat16': jnp.bfloat16, 'float32': jnp.float32}


def check(config: ConfigDict, mesh: Mesh) -> None:
    """Checks what a config says without lists and weights: fields, readers, batches on the mesh.

    Raises:
      ValueError: naming the fields that do not fit.
    """
    base.check(config)
    recipe.task_kind(config)  # checks its name
    check_batch_size(config.batch_size, mesh, 'batch_size', config.accumulation)
    check_batch_size(config.eval.batch_size, mesh, 'eval.batch_size')
    check_repeats(config.batch_size, mesh, recipe.train_reader(config).repeats)
    recipe.eval_reader(config)  # checks its fields


def check_trains(config: ConfigDict) -> None:
    """Raises ValueError for a family in which nothing is trained."""
    if not _family(config).trains:
        raise ValueError(
            f'model.family={config.model.family!r} has nothing to train; `dist_jax evaluate` with '
            'the same --config, and without --workdir, judges it as it is'
        )


def find_backbone(config: ConfigDict, workdir: str) -> Backbone | None:
    """The converted backbone of the config; one that is random or shipped is made on first use.

    Returns:
      It, at the image size of training; None for a family that stands on none.

    Raises:
      ValueError: none named, none found, or one of another geometry.
    """
    name, path = config.backbone.name, config.backbone.checkpoint
    if _family(config).reads_backbone:
        path = shipped.convert_into(workdir) if path == SHIPPED else path
        return backbones.find(name, path, config.data.image_size, workdir)
    if name or path:
        raise ValueError(
            f'model.family={config.model.family!r} stands on no backbone; leave backbone.name='
            f'{name!r} and backbone.checkpoint={path!r} empty'
        )
    return None


def sized_backbone(config: ConfigDict) -> Backbone | None:
    """The backbone that `find_backbone` would find, without weights: for checks and plans.

    Raises:
      ValueError: no such size, or one that the image size does not fit.
    """
    if not _family(config).reads_backbone:
        return None
    backbone = backbones.named(config.backbone.name)
    return backbones.sized(backbone, 'data.image_size', config.data.image_size)


def _family(config: ConfigDict) -> Family:
    name = config.model.family
    if name not in FAMILIES:
        raise ValueError(f'model.family={name!r} is not one of {", ".join(FAMILIES)}')
    return FAMILIES[name]


def origin(config: ConfigDict) -> Origin | None:
    """Where the config says that variables start; None for fresh ones."""
    if not config.init_from:
        return None
    return Origin(
        config.init_from,
        config.init_label_map,
        config.init_missing,
        recipe.dataset_info(config).class_key,
        config.checkpoint.verify,
    )


def make_task(config: ConfigDict, labels: Labels) -> Task:
    """The configured task, for these classes.

    Raises:
      ValueError: no such task, or one that cannot be learned from such a list.
    """
    options = {field: value for field, value in config.task.to_dict().items() if value != ''}
    chosen = f'task.name={options.pop("name")!r}'
    kind = recipe.task_kind(config)
    known = inspect.signature(kind).parameters
    for field, value in (
        ('optimizer.label_smoothing', config.optimizer.label_smoothing),
        ('eval.fusion', config.eval.fusion),
    ):
        name = field.partition('.')[2]
        if name in known:
            options[name] = value
        elif value:
            raise ValueError(f'{field}={value}: {chosen} has no such option; set it to 0')
    return _call(chosen, "fields that are '' are left to the task", kind, labels, **options)


def _call(chosen: str, way_out: str, build: Callable[..., Any], *parts: Any, **options: Any) -> Any:
    """Calls what a field chose with the other fields of its group.

    Raises:
      ValueError: it does not take one of them, or needs another.
    """
    group, signature = chosen.partition('.')[0], inspect.signature(build)
    known = signature.parameters
    foreign = [f'{group}.{name}' for name in options if name not in known]
    if foreign and not any(each.kind is each.VAR_KEYWORD for each in known.values()):
        raise ValueError(f'{chosen} has no option {", ".join(foreign)}; {way_out}')
    try:
        signature.bind(*parts, **options)
    except TypeError as error:
        raise ValueError(f'{chosen}: config.{group}: {error}; {way_out}') from None
    return build(*parts, **options)


def make_model(config: ConfigDict, backbone: Backbone | None, labels: Labels) -> Model:
    """The configured family on this backbone.

    Raises:
      ValueError: a field of config.model or config.batch_norm that does not fit.
    """
    family = _family(config)
    options = config.model.to_dict()
    name = options.pop('family')
    dtype = options.pop('dtype')
    for field, left in (('groups', 1), ('precise_batches', 0)):
        value = config.batch_norm[field]
        if value != left and not family.batch_statistics:
            raise ValueError(
                f'batch_norm.{field}={value}: model.family={name!r} has no batch statistics; '
                f'leave it at {left}'
            )
    if dtype not in DTYPES:
        raise ValueError(f'model.dtype={dtype!r} is not one of {", ".join(DTYPES)}')
    return _call(
        f'model.family={name!r}',
        f'a family is chosen by its file, --config=configs/{name}.py:VARIANT',
        family.build,
        *([backbone] if family.reads_backbone else []),
        num_classes=tuple(map(len, labels)),
        num_frames=config.data.num_frames,
        dtype=DTYPES[dtype],
        **({'batch_norm_groups': config.batch_norm.groups} if family.batch_statistics else {}),
        **options,
    )


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What is trained and tested, before any weights or lists are read.

    Attributes:
      task: what is learned.
      model: the network at the size of training.
      test_model: the same network at the size of evaluation, `model` itself where they are equal.
      backbone: at the size of training; None where there is none.
      texts: how class names are read, where they are.
      train_shape: of one training clip, (T, H, W, 3).
      test_shape: of one test view.
    """

    task: Task
    model: Model
    test_model: Model
    backbone: Backbone | None
    texts: ClassTexts
    train_shape: tuple[int, ...]
    test_shape: tuple[int, ...]

    def abstract_variables(self, test: bool = False) -> Tree:
        """{'params': ..., **collections} as shapes, at the size of training or of evaluation.

        Raises:
          ValueError: the network has not the outputs that the task reads.
        """
        model = self.test_model if test else self.model
        shape = self.test_shape if test else self.train_shape
        inputs = step.example_inputs(model, self.task, self.abstract_frozen(test), (1, *shape))
        outputs, variables = jax.eval_shape(model.net.init_with_output, jax.random.key(0), inputs)
        self.task.check(outputs)
        return {'params': {}, **variables}  # Flax leaves out what is empty

    def abstract_frozen(self, test: bool = False) -> Tree:
        """Shapes of the frozen tree; {} where there is none."""
        frozen = (self.test_model if test else self.model).frozen
        return {} if frozen is None else frozen.abstract(tuple(map(len, self.task.labels)))

    def load_frozen(self, mesh: Mesh, *, verify: bool) -> Tree:
        """The frozen tree of training, on the devices; {} where there is none."""
        return self._load(self.model, mesh, verify)

    def load_test_frozen(self, mesh: Mesh, *, verify: bool, trained: Tree | None = None) -> Tree:
        """That of evaluation; of the one of training, if it is there, it takes what it can."""
        if trained is None:
            return self._load(self.test_model, mesh, verify)
        if self.test_model is self.model or not trained:
            return trained
        return self.test_model.frozen.resized(trained, mesh, verify=verify)

    def _load(self, model: Model, mesh: Mesh, verify: bool) -> Tree:
        return {} if model.frozen is None else model.frozen.load(mesh, self.texts, verify=verify)


def assemble(config: ConfigDict, labels: Labels, backbone: Backbone | None) -> Experiment:
    """Task and model of a config.

    Args:
      config: of the experiment.
      labels: class names of the list; the heads of the model have those of the task.
      backbone: from `find_backbone`, or a size alone.

    Raises:
      ValueError: fields that do not fit each other.
    """
    data, size = config.data, config.eval.image_size or config.data.image_size
    task = make_task(config, labels)
    model = test_model = make_model(config, backbone, task.labels)
    if size != data.image_size:
        tested = backbone and backbones.sized(backbone, 'eval.image_size', size)
        test_model = make_model(config, tested, task.labels)
    found = Experiment(
        task,
        model,
        test_model,
        backbone,
        ClassTexts(task.labels, data.split_names, data.truncate_texts, neutral_text(task)),
        (data.num_frames, data.image_size, data.image_size, 3),
        (data.num_frames, size, size, 3),
    )
    if test_model is not model:
        _check_sizes(config, found)
    return found


def _check_sizes(config: ConfigDict, experiment: Experiment) -> None:
    """Refuses a test size for which the trained parameters would have other shapes."""
    trained, tested = (flatten(experiment.abstract_variables(test)) for test in (False, True))
    for path, leaf in trained.items():
        if leaf.shape != tested[path].shape:
            raise ValueError(
                f'eval.image_size={config.eval.image_size} is not data.image_size='
                f'{config.data.image_size}, and model.family={config.model.family!r} is made for '
                f'one size: {path.removeprefix("params/")} is {leaf.shape} there and '
                f'{tested[path].shape} here; set eval.image_size=0'
            )
