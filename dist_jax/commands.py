"""What the console commands do once their arguments are read; see `main`."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from configs import base
from dist_jax import checkpoint, experiment, init_from, recipe, step
from dist_jax.evaluate import EvalResult, evaluate_config
from dist_jax.json_file import write_json
from dist_jax.models.api import Tree, VideoModel
from dist_jax.progress import Bar
from dist_jax.reports import page
from dist_jax.sharding import check_batch_size, make_mesh
from dist_jax.tasks.api import Figures


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained model, ready to run.

    Attributes:
      model: its family's model.
      frozen: frozen tree, with text features of `class_names` where the head reads them.
      variables: parameters (their average if there is one) and collections.
      class_names: of each head.
      step: of the checkpoint, -1 for a converted one.
    """

    model: VideoModel
    frozen: Tree
    variables: Tree
    class_names: recipe.ClassNames
    step: int


def saved_config(workdir: str, step_number: int | str | None = None) -> ConfigDict:
    """The config of a run, locked.

    Args:
      workdir: the run.
      step_number: of the checkpoint, or 'best'; None for the newest.
    """
    metadata = checkpoint.read_metadata(checkpoint.find_checkpoint(workdir, step_number))
    config = base.get_config().to_dict()
    for name, value in checkpoint.BEFORE_FIELDS.items():
        group, field = name.split('.')
        config[group][field] = value
    for name, value in metadata['config'].items():
        # Fields that are newer than the run have the values it was trained under.
        config[name] = config.get(name, {}) | value if isinstance(value, dict) else value
    return ConfigDict(_with_tuples(config)).lock()


def _with_tuples(value: Any) -> Any:
    """JSON's lists as what they were before `checkpoint.plain`: configs hold tuples alone."""
    if isinstance(value, dict):
        return {name: _with_tuples(item) for name, item in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


def load_trained(
    config: ConfigDict,
    workdir: str,
    step_number: int | str | None,
    class_names: recipe.ClassNames | None = None,
) -> Trained:
    """Builds the model of a run (or of `config.init_from`) and reads its weights.

    Args:
      config: the run's, possibly with other paths or another test protocol.
      workdir: the run; '' to take the weights from `config.init_from`.
      step_number: of the checkpoint, or 'best'; None for the newest.
      class_names: another label set, for zero-shot use of a text head; None for the run's own.

    Raises:
      ValueError: nothing to read, another backbone than the run's, or a label set that the head
        cannot take.
    """
    mesh = make_mesh(**config.mesh)
    if workdir:
        folder = checkpoint.find_checkpoint(workdir, step_number)
        metadata = checkpoint.read_metadata(folder)
        trained_names = tuple(tuple(column) for column in metadata['class_names'])
    elif config.init_from and class_names is not None:
        folder, metadata, trained_names = None, None, class_names
    else:
        raise ValueError(
            'no trained model: pass --workdir=RUN, or --config.init_from=CONVERTED together with '
            'a list to evaluate'
        )
    class_names = trained_names if class_names is None else class_names
    if class_names != trained_names and config.model.head != 'text':
        raise ValueError(
            'the label set is not the one of the run, and only model.head=text can take another; '
            'pass the label map of the run'
        )
    backbone = experiment.find_backbone(config, workdir)
    if metadata is not None and backbone.params_sha256 != metadata['backbone']['params_sha256']:
        raise ValueError(
            f'{backbone.path} is {backbone.name} with weights {backbone.params_sha256[:12]}, but '
            f'the run was trained on {metadata["backbone"]["name"]} with weights '
            f'{metadata["backbone"]["params_sha256"][:12]}; pass the right one with '
            '--config.backbone.checkpoint=FOLDER'
        )
    num_classes = tuple(map(len, class_names))
    model = experiment.make_model(config, backbone.spec, num_classes)
    data, verify = config.data, config.checkpoint.verify
    frozen = experiment.load_frozen(
        backbone,
        model,
        class_names,
        mesh,
        data.truncate_texts,
        split_names=data.split_names,
        verify=verify,
    )
    video_shape = (1, data.num_frames, data.image_size, data.image_size, 3)
    features = step.example_features(model, frozen, video_shape)
    variables = jax.eval_shape(model.net.init, jax.random.key(0), features)
    variables = step.place_variables(model, variables, mesh)
    if folder is None:
        init_from.compare_backbones(config.init_from, backbone)
        params = init_from.load_trainable(config, variables['params'], class_names)
        return Trained(model, frozen, {'params': params}, class_names, -1)
    found = checkpoint.read_variables(folder, variables, verify)
    return Trained(model, frozen, found, class_names, int(folder.name))


def run_evaluation(
    config: ConfigDict, workdir: str, step_number: int | str | None, output: str
) -> tuple[dict[str, Any], Figures]:
    """Evaluates on `config.data.val_list` and writes `evaluation.json` and `evaluation.html`.

    Returns:
      What `evaluation.json` holds, and the figures.
    """
    mesh = make_mesh(**config.mesh)
    check_batch_size(config.eval.batch_size, mesh, 'eval.batch_size')
    source = recipe.open_split(config, 'val')
    trained = load_trained(config, workdir, step_number, recipe.class_columns(source))
    eval_step = step.make_eval_step(
        trained.model, mesh, config.eval.fusion, trained.variables, trained.frozen
    )
    with Bar('evaluate', -(-len(source) // config.eval.batch_size)) as bar:
        bar.line(f'{len(source)} videos, compiling the step')
        result = evaluate_config(
            config, eval_step, trained.variables, trained.frozen, source, mesh, bar
        )
    figures = result.figures(trained.class_names)
    stored = evaluation_json(figures, result, trained, config)
    if jax.process_index() == 0:
        folder = epath.Path(output or workdir or '.')
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / 'evaluation.json', stored)
        page.write_evaluation(folder, stored, figures)
    return stored, figures


def evaluation_json(
    figures: Figures, result: EvalResult, trained: Trained, config: ConfigDict
) -> dict[str, Any]:
    """What `evaluation.json` holds: the figures, the protocol, and details."""
    return {
        **figures.scalars,
        'step': trained.step,
        'list': os.fspath(config.data.val_list),
        'views': config.eval.num_clips * config.eval.num_crops,
        'fusion': config.eval.fusion,
        'seconds': round(result.seconds, 2),
        'bad_videos': [list(pair) for pair in result.bad_videos],
        **figures.details,
    }
