"""What a trained model sees in single videos: a table, pictures and JSON.

The views, the averaging and the compiled step are those of the evaluation, so that a video gets the
scores here that it gets there.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from dist_jax import commands, experiment, report, step
from dist_jax.logbook import Bar
from dist_jax.sharding import batched, make_mesh
from dist_jax.train import write_json
from input_pipeline.decode import DecodeError
from input_pipeline.sources import Record, read_label_map

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Ranking = tuple[tuple[str, float], ...]  # (class name, probability), best first

SHEET_COLUMNS = 8
SHEET_FRAMES = 16  # frames of a view that a contact sheet shows at most


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a model says about one video.

    Attributes:
      path: the video.
      top: the most probable classes of each label column; empty if the video cannot be read.
      scores: (num_classes,) probabilities of each label column; likewise.
      video: (V, T, H, W, 3) uint8 RGB, the views as the model got them; None likewise.
      error: '' or why the video cannot be read.
    """

    path: str
    top: tuple[Ranking, ...] = ()
    scores: tuple[np.ndarray, ...] = ()
    video: np.ndarray | None = None
    error: str = ''

    def summary(self) -> dict[str, Any]:
        """JSON values: path, error, and `top` as lists of {label, probability}."""
        return {
            'path': self.path,
            'error': self.error,
            'top': [
                [{'label': name, 'probability': share} for name, share in ranking]
                for ranking in self.top
            ],
        }


def predict_videos(
    trained: commands.Trained,
    config: ConfigDict,
    paths: Sequence[str | os.PathLike[str]],
    most: int = 5,
) -> Iterator[Prediction]:
    """Predicts videos one after the other.

    Args:
      trained: the model, see `commands.load_trained`.
      config: of its run; `eval` holds the views and the fusion with the frozen backbone.
      paths: video files.
      most: classes in a ranking.

    Yields:
      One prediction a path, in order. A video that cannot be read gets one with an error.

    Raises:
      ValueError: fusion is asked of a model without text features.
    """
    mesh = make_mesh()
    reader = experiment.eval_reader(config)
    eval_step = step.make_eval_step(trained.model, mesh, config.eval.fusion)
    return _predictions(trained, reader, eval_step, mesh, [os.fspath(path) for path in paths], most)


def _predictions(
    trained: commands.Trained,
    reader: Any,
    eval_step: Any,
    mesh: jax.sharding.Mesh,
    paths: Sequence[str],
    most: int,
) -> Iterator[Prediction]:
    for path in paths:
        try:
            video, _ = reader.read(Record(path, 0, path))
        except DecodeError as error:
            yield Prediction(path, error=f'{error.kind}: {error.reason}')
            continue
        # A batch has at least one row for each device.
        batch = np.zeros((mesh.size, *video.shape), np.uint8)
        batch[0] = video
        columns = eval_step(trained.variables, trained.frozen, jax.device_put(batch, batched(mesh)))
        scores = tuple(np.asarray(column)[0] for column in columns)
        top = tuple(
            tuple((names[i], float(column[i])) for i in np.argsort(-column, kind='stable')[:most])
            for names, column in zip(trained.class_names, scores)
        )
        yield Prediction(path, top, scores, video)


def run(
    config: ConfigDict,
    workdir: str,
    step_number: int | None,
    paths: Sequence[str],
    output: str = '',
    labels: str = '',
    json_file: str = '',
) -> int:
    """The command `predict`: prints a table, writes a picture of each video.

    Args:
      config: the run's, possibly with other paths or views.
      workdir: the run.
      step_number: of the checkpoint; None for the newest.
      paths: video files.
      output: folder of the pictures; '' for WORKDIR/predictions.
      labels: file of class names to choose from instead of the run's; text head only.
      json_file: where the rankings are written as JSON; '' for nowhere.

    Returns:
      The exit code: 0, or 1 if a video could not be read.

    Raises:
      ValueError: the run, the backbone or the labels do not fit.
    """
    if jax.process_count() > 1:
        raise ValueError('predict runs in one process; start it on a single host')
    class_names = (read_label_map(labels).names,) if labels else None
    trained = commands.load_trained(config, workdir, step_number, class_names)
    folder = Path(output or os.path.join(workdir, 'predictions'))
    folder.mkdir(parents=True, exist_ok=True)
    pictures = picture_names(paths)
    rows: list[dict[str, Any]] = []
    with Bar('predict', len(paths)) as bar:
        for prediction, name in zip(predict_videos(trained, config, paths), pictures):
            row = prediction.summary() | {'picture': ''}
            if not prediction.error:
                row['picture'] = os.fspath(folder / name)
                write_contact_sheet(row['picture'], prediction)
            rows.append(row)
            bar.update(len(rows))
    if json_file:
        target = Path(json_file)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_json(target, rows)
    print_predictions(rows)
    return 1 if any(row['error'] for row in rows) else 0


def picture_names(paths: Sequence[str]) -> list[str]:
    """A file name for each video, after its own, numbered where two would be the same."""
    names: list[str] = []
    for path in paths:
        stem = Path(path).stem or 'video'
        name, number = f'{stem}.png', 1
        while name in names:
            number += 1
            name = f'{stem}-{number}.png'
        names.append(name)
    return names


def print_predictions(rows: Sequence[dict[str, Any]]) -> None:
    """Prints rows of `Prediction.summary`, each with its `picture`, as one table."""
    console = Console(width=None if sys.stdout.isatty() else 140)
    columns = max((len(row['top']) for row in rows), default=1)
    table = Table()
    table.add_column('video', overflow='fold')
    for i in range(columns):
        table.add_column('class' if columns == 1 else f'label column {i}', overflow='fold')
        table.add_column('probability', justify='right', no_wrap=True)
    for row in rows:
        path = report.plain(row['path'])
        if row['error']:
            table.add_row(path, f'[bold red]cannot be read:[/] {report.plain(row["error"])}')
        else:
            cells = [path]
            for ranking in row['top']:
                cells.append('\n'.join(report.plain(entry['label']) for entry in ranking))
                cells.append('\n'.join(f'{100 * entry["probability"]:.2f} %' for entry in ranking))
            table.add_row(*cells)
        table.add_section()
    console.print(table)
    pictures = [row['picture'] for row in rows if row['picture']]
    if pictures:
        text = pictures[0] if len(pictures) == 1 else f'{os.path.dirname(pictures[0])}/*.png'
        console.print(f'pictures: {text}', soft_wrap=True, highlight=False, markup=False)


def write_contact_sheet(path: str | os.PathLike[str], prediction: Prediction) -> None:
    """Writes a PNG with the frames of a view, cropped as the model saw them, and the top classes.

    Args:
      path: file to write.
      prediction: of a video that could be read.
    """
    with report.theme():
        _sheet(prediction).savefig(path, dpi=110)


def _sheet(prediction: Prediction) -> Figure:
    from matplotlib.figure import Figure

    views, num_frames = prediction.video.shape[:2]
    view = views // 2
    shown = np.unique(np.linspace(0, num_frames - 1, min(num_frames, SHEET_FRAMES)).round())
    shown = shown.astype(int)
    down = -(-len(shown) // SHEET_COLUMNS)
    most = max(len(ranking) for ranking in prediction.top)
    cell, bar, head = 1.25, 0.42, 0.35  # inches
    width = cell * SHEET_COLUMNS
    figure = Figure(figsize=(width, head + cell * down + bar * most + 0.35), layout='constrained')
    figure.get_layout_engine().set(w_pad=0.04, h_pad=0.03, wspace=0.0, hspace=0.0)
    frames_part, bars_part = figure.subfigures(
        2, 1, height_ratios=(head + cell * down, bar * most + 0.35)
    )
    of = f'{len(shown)} of {num_frames}' if len(shown) < num_frames else f'{num_frames}'
    title = f'{os.path.basename(prediction.path)}: {of} frames'
    if views > 1:
        title += f' of view {view + 1} of {views}'
    frames_part.suptitle(report.cut(title, 110), fontsize=9.5, x=0.01, ha='left')
    grid = frames_part.subplots(down, SHEET_COLUMNS, squeeze=False)
    for axis in grid.flat:
        axis.set_axis_off()
    for axis, number in zip(grid.flat, shown):
        axis.imshow(prediction.video[view, number])
        axis.text(
            0.03,
            0.96,
            str(number),
            transform=axis.transAxes,
            va='top',
            fontsize=7,
            color='white',
            bbox={'facecolor': 'black', 'alpha': 0.55, 'pad': 1.2, 'linewidth': 0},
        )
    columns = bars_part.subplots(1, len(prediction.top), squeeze=False)[0]
    for axis, ranking in zip(columns, prediction.top):
        _draw_ranking(axis, ranking, int(130 / len(prediction.top)))
    return figure


def _draw_ranking(axis: Axes, ranking: Ranking, most_letters: int) -> None:
    """Bars from 0 to 1, the class above each, the probability after it."""
    for place, (name, share) in enumerate(ranking):
        axis.barh(place, 1, height=0.26, color='C0', alpha=0.12)
        axis.barh(place, share, height=0.26, color='C0')
        axis.text(0, place - 0.2, report.cut(name, most_letters), va='bottom', fontsize=9)
        axis.text(1.01, place, f'{100 * share:.1f} %', va='center', fontsize=9)
    axis.set_xlim(0, 1.1)
    axis.set_ylim(len(ranking) - 0.6, -0.75)
    axis.set_axis_off()
