"""Models with their weights: of a run, of a converted checkpoint, or a backbone as it is."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dist_jax import backbones, checkpoint, experiment, init_from, shipped, step
from dist_jax.configs import base, zero_shot
from dist_jax.hub import release
from dist_jax.models import plain
from dist_jax.models.api import Model, Tree
from dist_jax.models.backbone import Backbone
from dist_jax.models.frozen import ClassTexts
from dist_jax.models.params import flatten
from dist_jax.paths import is_release
from dist_jax.sharding import make_mesh
from dist_jax.tasks.api import Labels, Task

NO_MODEL = (
    'no trained model: pass --workdir=RUN, or --config.init_from=CONVERTED together with a list to '
    'evaluate'
)


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained model, ready to run.

    Attributes:
      task: what it learned, for the classes that it is asked for; None for a backbone as it is.
      model: its family's model, at the size of evaluation.
      frozen: frozen tree, with text features of these classes where the head reads them.
      variables: parameters (their average if there is one) and collections.
      step: of the checkpoint, -1 for a converted one and for a backbone.
    """

    task: Task | None
    model: Model
    frozen: Tree
    variables: Tree
    step: int


def saved_config(workdir: str, step_number: int | str | None = None) -> ConfigDict:
    """The config of a run, locked.

    Args:
      workdir: the run, or a release of one.
      step_number: of the checkpoint, or 'best'; None for the newest.
    """
    if is_release(workdir):
        return release.read(workdir, step_number).config
    metadata = checkpoint.read_metadata(checkpoint.find_checkpoint(workdir, step_number))
    return base.restored(metadata['config'])


def load_trained(
    config: ConfigDict,
    workdir: str,
    step_number: int | str | None,
    labels: Labels | None = None,
    output: str = '',
    mesh: Mesh | None = None,
) -> Trained:
    """Builds the model of a run (or of `config.init_from`) and reads its weights.

    With neither, the model is what its backbone makes of it before it is trained, where that is
    all: a network without parameters, or one whose parameters all start as the backbone's.

    Args:
      config: the run's, possibly with other paths or another test protocol.
      workdir: the run, or a release of one; '' to take the weights from `config.init_from` or the
        backbone.
      step_number: of the checkpoint, or 'best'; None for the newest.
      labels: another label set, for zero-shot use of a text head; None for the run's own.
      output: where a random backbone lies without a run.
      mesh: where the weights go; None for the one of the config, of all devices.

    Raises:
      ValueError: nothing to read, another backbone than the run's, or a label set that the head
        cannot take.
    """
    mesh = make_mesh(**config.mesh) if mesh is None else mesh
    released = release.read(workdir, step_number) if is_release(workdir) else None
    if released is not None:
        folder, metadata, trained_labels = None, released.metadata, released.labels
        config = released.with_backbone(config)
    elif workdir:
        folder = checkpoint.find_checkpoint(workdir, step_number)
        metadata = checkpoint.read_metadata(folder)
        trained_labels = tuple(map(tuple, metadata['class_names']))
    elif labels is not None:
        folder, metadata, trained_labels = None, None, labels
    else:
        raise ValueError(NO_MODEL)
    backbone = experiment.find_backbone(config, workdir or output)
    if metadata is not None and backbone is not None:
        own, theirs = backbone.identity(), metadata['backbone']
        if checkpoint.backbone_sha256(theirs) != backbone.params_sha256:
            raise ValueError(
                f'{backbone.path} has {checkpoint.describe_backbone(own)}, but the run was trained '
                f'on {checkpoint.describe_backbone(theirs)}; pass the right one with '
                '--config.backbone.checkpoint=FOLDER'
            )
    with released.blamed() if released is not None else contextlib.nullcontext():
        parts = experiment.assemble(config, trained_labels if labels is None else labels, backbone)
    reads_classes = parts.model.frozen is not None and parts.model.frozen.reads_classes
    if metadata is not None and parts.task.labels != trained_labels and not reads_classes:
        raise ValueError(
            'the label set is not the one of the run, and only model.head=text can take another; '
            'pass the label map of the run'
        )
    verify = config.checkpoint.verify
    if released is not None:
        return _released(released, parts, mesh, verify)
    frozen = parts.load_test_frozen(mesh, verify=verify)
    variables = step.place_variables(parts.test_model, parts.abstract_variables(), mesh)
    if folder is not None:
        found = checkpoint.read_variables(folder, variables, verify)
        return Trained(parts.task, parts.test_model, frozen, found, int(folder.name))
    if origin := experiment.origin(config):
        init_from.compare_backbones(origin.path, backbone)
        found = init_from.load_variables(origin, parts.test_model, variables, parts.task.labels)
    else:
        found = _of_backbone(config, parts, variables)
    return Trained(parts.task, parts.test_model, frozen, found, -1)


def identity(config: ConfigDict, folder: epath.Path) -> dict[str, Any]:
    """JSON values that say which weights a step of a run has.

    Args:
      config: the run's.
      folder: of the step.

    Raises:
      ValueError: an earlier version wrote it, without digests.
    """
    backbone = checkpoint.read_metadata(folder)['backbone']
    return {
        'kind': 'run',
        'name': config.model.family,
        'step': int(folder.name),
        'sha256': checkpoint.variables_sha256(folder),
        'backbone_sha256': checkpoint.backbone_sha256(backbone),
        'dtype': config.model.dtype,
    }


def backbone_config(path: str) -> ConfigDict:
    """What stands for the config of a run where a converted backbone is used as it is, locked.

    Args:
      path: its folder, or 'tiny_clip'.

    Raises:
      ValueError: there is no converted backbone.
    """
    path = shipped.folder_of(path)
    stored = backbones.stored(path)
    config = zero_shot.get_config()
    config.backbone.checkpoint = path
    config.backbone.name = stored.name.removesuffix(backbones.OF_RANDOM)
    config.data.image_size = stored.spec.image_size
    return config.lock()


def backbone_of(config: ConfigDict) -> Backbone:
    """The converted backbone of `backbone_config`, at the size that the config says."""
    stored = backbones.stored(config.backbone.checkpoint)
    return backbones.sized(stored, 'data.image_size', config.data.image_size)


def load_backbone(config: ConfigDict, mesh: Mesh | None = None) -> Trained:
    """A converted backbone as it is, without classes.

    Args:
      config: of `backbone_config`, possibly changed.
      mesh: see `load_trained`.
    """
    mesh = make_mesh(**config.mesh) if mesh is None else mesh
    model = plain.build(backbone_of(config), dtype=experiment.DTYPES[config.model.dtype])
    frozen = model.frozen.load(mesh, ClassTexts(), verify=config.checkpoint.verify)
    return Trained(None, model, frozen, plain.VARIABLES, -1)


def _released(
    released: release.Release, parts: experiment.Experiment, mesh: Mesh, verify: bool
) -> Trained:
    with released.blamed():
        variables = step.place_variables(parts.test_model, parts.abstract_variables(), mesh)
    found = released.read_variables(variables, verify)
    frozen = parts.load_test_frozen(mesh, verify=verify)
    return Trained(parts.task, parts.test_model, frozen, found, released.step)


def _of_backbone(config: ConfigDict, parts: experiment.Experiment, variables: Tree) -> Tree:
    """What a network is before it is trained.

    Raises:
      ValueError: it has variables that its backbone does not give.
    """
    taken = parts.test_model.from_backbone
    starts = tuple(f'params/{path}/' for path in taken)
    own = [path for path in flatten(variables) if not f'{path}/'.startswith(starts)]
    if own:
        raise ValueError(
            f'{NO_MODEL}. model.family={config.model.family!r} is not made of its backbone alone: '
            f'nothing says what {own[0]} is'
        )
    params, verify = variables['params'], config.checkpoint.verify
    return {'params': init_from.load_from_backbone(taken, parts.backbone, params, verify)}
