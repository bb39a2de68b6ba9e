"""Evaluation: the answers to a list, judged as a whole; and the command that does that."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Sequence
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from dist_jax import recipe, step
from dist_jax.json_file import write_json
from dist_jax.progress import Bar
from dist_jax.reports import page
from dist_jax.sharding import check_batch_size, make_mesh
from dist_jax.tasks.api import Figures, Table, Task, labels_of
from dist_jax.trained import load_trained
from dist_jax.views import Views, ViewStep
from input_pipeline import bad_videos


class BadVideosError(RuntimeError):
    """Videos of an evaluation list cannot be read and the settings do not allow that."""


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Outcome of one evaluation.

    Attributes:
      figures: what the task's evaluator found, and how many videos they are of.
      num_videos: videos that were judged.
      bad_videos: (path, reason) of those that could not be read, of all hosts in the order of the
        list; they are in no figure.
      seconds: duration.
    """

    figures: Figures
    num_videos: int
    bad_videos: tuple[tuple[str, str], ...]
    seconds: float


def with_videos(
    figures: Figures, num_videos: int, bad_videos: Sequence[tuple[str, str]]
) -> Figures:
    """Figures with how many videos they are of, and which could not be read: (path, reason)."""
    counts = {'num_videos': num_videos, 'num_bad_videos': len(bad_videos)}
    sections = figures.sections
    if bad_videos:
        title = f'Unreadable videos: {len(bad_videos)}, in no figure'
        sections = (*sections, Table(title, ('path', 'reason'), bad_videos))
    return dataclasses.replace(figures, scalars={**figures.scalars, **counts}, sections=sections)


def evaluate(views: Views, task: Task, query_step: ViewStep) -> Evaluation:
    """Judges what a step says of a list.

    Args:
      views: of the list, fresh.
      task: what the step does.
      query_step: see `step.make_query_step`; not called where the task has no queries.

    Raises:
      ending.StoppedError: it was stopped.
      BadVideosError: naming the videos, if there are more than the protocol allows or none is left.
      NonFiniteScoresError: naming the videos, if predictions are NaN or infinite.
    All are raised on all hosts alike.
    """
    source = views.source
    start = time.monotonic()
    queries, evaluator = task.queries(source), task.evaluator(source)
    for rows in views:
        evaluator.add(rows)
    if queries is not None:
        for rows in views.answers(query_step, queries):
            evaluator.add_queries(rows)
    unreadable = views.unreadable()
    limit = bad_videos.allowed(views.protocol.max_bad_share, len(source))
    if len(unreadable) > limit or len(unreadable) == len(source):
        named = '\n'.join(f'  {path}: {reason}' for path, reason in unreadable[:50])
        if len(unreadable) == len(source):
            raise BadVideosError(
                f'none of the {len(source)} videos can be read. Repair the list (`dist_jax check` '
                f'names all), or data.root.\n{named}'
            )
        raise BadVideosError(
            f'{len(unreadable)} of {len(source)} videos cannot be read, {limit} are allowed, so '
            'the accuracy would not be of the whole list. Repair the list (`dist_jax check` names '
            f'all), or pass --config.eval.allow_bad_videos=true to leave them out.\n{named}'
        )
    num_videos = len(source) - len(unreadable)
    return Evaluation(
        figures=with_videos(evaluator.result(), num_videos, unreadable),
        num_videos=num_videos,
        bad_videos=unreadable,
        seconds=time.monotonic() - start,
    )


def run(
    config: ConfigDict, workdir: str, step_number: int | str | None, output: str
) -> tuple[dict[str, Any], Figures]:
    """Evaluates on `config.data.val_list` and writes `evaluation.json` and `evaluation.html`.

    Args:
      config: of the experiment.
      workdir: the run; '' for what `load_trained` takes without one. Then a built-in data set, if
        no list is named, and a random backbone are made where the report is.
      step_number: of the checkpoint, or 'best'; None for the newest.
      output: folder of the report; '' for the run's, or else the current one.

    Returns:
      What `evaluation.json` holds, and the figures.
    """
    output = output or workdir or '.'
    config = ConfigDict(config)
    if not workdir:
        with config.unlocked():
            recipe.prepare_builtin_data(config, output)
    mesh = make_mesh(**config.mesh)
    check_batch_size(config.eval.batch_size, mesh, 'eval.batch_size')
    source = recipe.open_split(config, 'val')
    trained = load_trained(config, workdir, step_number, labels_of(source), output)
    trained.task.check_list(source, 'data.val_list')
    parts = (trained.model, trained.task, mesh, trained.variables, trained.frozen)
    eval_step, query_step = step.make_eval_step(*parts), step.make_query_step(*parts)
    with Bar('evaluate', -(-len(source) // config.eval.batch_size)) as bar:
        bar.line(f'{len(source)} videos, compiling the step')
        views = Views(
            eval_step,
            trained.variables,
            trained.frozen,
            source,
            recipe.eval_protocol(config, trained.task.eval_annotate),
            mesh,
            input_keys=trained.task.eval_input_keys,
            on_batch=bar.update,
        )
        result = evaluate(views, trained.task, query_step)
    stored = {
        **result.figures.scalars,
        'step': trained.step,
        'list': os.fspath(config.data.val_list),
        'views': config.eval.num_clips * config.eval.num_crops,
        'fusion': config.eval.fusion,
        'seconds': round(result.seconds, 2),
        'bad_videos': [list(pair) for pair in result.bad_videos],
        **result.figures.details,
    }
    if jax.process_index() == 0:
        folder = epath.Path(output)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / 'evaluation.json', stored)
        page.write_evaluation(folder, stored, result.figures)
    return stored, result.figures
