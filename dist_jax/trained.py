"""Trained models, as `evaluate` and `predict` take them from a run or a converted checkpoint."""

from __future__ import annotations

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from configs import base
from dist_jax import checkpoint, experiment, init_from, step
from dist_jax.models.api import Model, Tree
from dist_jax.sharding import make_mesh
from dist_jax.tasks.api import Labels, Task


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained model, ready to run.

    Attributes:
      task: what it learned, for the classes that it is asked for.
      model: its family's model, at the size of evaluation.
      frozen: frozen tree, with text features of these classes where the head reads them.
      variables: parameters (their average if there is one) and collections.
      step: of the checkpoint, -1 for a converted one.
    """

    task: Task
    model: Model
    frozen: Tree
    variables: Tree
    step: int


def saved_config(workdir: str, step_number: int | str | None = None) -> ConfigDict:
    """The config of a run, locked.

    Args:
      workdir: the run.
      step_number: of the checkpoint, or 'best'; None for the newest.
    """
    metadata = checkpoint.read_metadata(checkpoint.find_checkpoint(workdir, step_number))
    config = base.get_config().to_dict()
    for name, value in base.BEFORE_FIELDS.items():
        group, field = name.split('.')
        config[group][field] = value
    for name, value in metadata['config'].items():
        # Fields that are newer than the run have the values it was trained under.
        config[name] = config.get(name, {}) | value if isinstance(value, dict) else value
    return ConfigDict(_with_tuples(config)).lock()


def _with_tuples(value: Any) -> Any:
    """JSON's lists as what they were before `base.plain`: configs hold tuples alone."""
    if isinstance(value, dict):
        return {name: _with_tuples(item) for name, item in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


def load_trained(
    config: ConfigDict,
    workdir: str,
    step_number: int | str | None,
    labels: Labels | None = None,
) -> Trained:
    """Builds the model of a run (or of `config.init_from`) and reads its weights.

    Args:
      config: the run's, possibly with other paths or another test protocol.
      workdir: the run; '' to take the weights from `config.init_from`.
      step_number: of the checkpoint, or 'best'; None for the newest.
      labels: another label set, for zero-shot use of a text head; None for the run's own.

    Raises:
      ValueError: nothing to read, another backbone than the run's, or a label set that the head
        cannot take.
    """
    mesh = make_mesh(**config.mesh)
    if workdir:
        folder = checkpoint.find_checkpoint(workdir, step_number)
        metadata = checkpoint.read_metadata(folder)
        trained_labels = tuple(map(tuple, metadata['class_names']))
    elif config.init_from and labels is not None:
        folder, metadata, trained_labels = None, None, labels
    else:
        raise ValueError(
            'no trained model: pass --workdir=RUN, or --config.init_from=CONVERTED together with '
            'a list to evaluate'
        )
    backbone = experiment.find_backbone(config, workdir)
    if metadata is not None and backbone is not None:
        own, theirs = backbone.identity(), metadata['backbone']
        if checkpoint.backbone_sha256(theirs) != backbone.params_sha256:
            raise ValueError(
                f'{backbone.path} has {checkpoint.describe_backbone(own)}, but the run was trained '
                f'on {checkpoint.describe_backbone(theirs)}; pass the right one with '
                '--config.backbone.checkpoint=FOLDER'
            )
    parts = experiment.assemble(config, trained_labels if labels is None else labels, backbone)
    reads_classes = parts.model.frozen is not None and parts.model.frozen.reads_classes
    if metadata is not None and parts.task.labels != trained_labels and not reads_classes:
        raise ValueError(
            'the label set is not the one of the run, and only model.head=text can take another; '
            'pass the label map of the run'
        )
    verify = config.checkpoint.verify
    frozen = parts.load_test_frozen(mesh, verify=verify)
    variables = step.place_variables(parts.test_model, parts.abstract_variables(), mesh)
    if folder is None:
        init_from.compare_backbones(config.init_from, backbone)
        origin = experiment.origin(config)
        found = init_from.load_variables(origin, parts.test_model, variables, parts.task.labels)
        return Trained(parts.task, parts.test_model, frozen, found, -1)
    found = checkpoint.read_variables(folder, variables, verify)
    return Trained(parts.task, parts.test_model, frozen, found, int(folder.name))
