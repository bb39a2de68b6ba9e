"""What a trained model says of single videos (`VideoModel.predict_all`): table, pictures, JSON."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
from ml_collections import ConfigDict
from rich.table import Table

from dist_jax import attention_map, contact_sheet, drawing
from dist_jax.json_file import write_json
from dist_jax.progress import Bar
from dist_jax.trained import load_trained
from dist_jax.video_model import Prediction, Ranking, VideoModel
from input_pipeline.escape import Console, file_name, styled, terminal
from input_pipeline.label_maps import read_label_map

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# What `run` writes of a video, after its name: the field of the JSON row and the ending.
PICTURES = {'picture': '.png'}
ATTENTION_PICTURES = {'attention': '-attention.png', 'attention_animation': '-attention.gif'}


def run(
    config: ConfigDict,
    workdir: str,
    step_number: int | str | None,
    paths: Sequence[str],
    output: str = '',
    labels: str = '',
    json_file: str = '',
    attention: bool = False,
) -> int:
    """The command `predict`: prints a table, writes pictures of each video.

    Args:
      config: the run's, possibly with other paths or views.
      workdir: the run.
      step_number: of the checkpoint, or 'best'; None for the newest.
      paths: video files.
      output: folder of the pictures; '' for WORKDIR/predictions.
      labels: file of class names to choose from instead of the run's; text head only.
      json_file: where the rankings are written as JSON; '' for nowhere.
      attention: also draw where the model's query looked, as a sheet and an animation.

    Returns:
      The exit code: 0, or 1 if there is a video without a prediction.

    Raises:
      ValueError: the run, the backbone or the labels do not fit, or the model has no attention to
        draw.
    """
    model = load_model(config, workdir, step_number, labels)
    predictions = model.predict_all(paths, attention=attention)
    folder = output_folder(workdir, output)
    endings = PICTURES | (ATTENTION_PICTURES if attention else {})
    stems = picture_stems(paths, tuple(endings.values()))
    if json_file:  # a folder that cannot be made is found before the work
        Path(json_file).parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    with Bar('predict', len(paths)) as bar:
        bar.line(f'{len(paths)} videos, compiling the step')
        for prediction, stem in zip(predictions, stems):
            files = {field: '' for field in PICTURES | ATTENTION_PICTURES}
            if not prediction.error:
                files |= {field: os.fspath(folder / (stem + end)) for field, end in endings.items()}
                write_contact_sheet(files['picture'], prediction)
                if attention:
                    write_attention(files['attention'], files['attention_animation'], prediction)
            row = prediction.summary() | files
            rows.append(row)
            bar.update(len(rows))
    if json_file:
        write_json(Path(json_file), rows)
    print_predictions(rows)
    return 1 if any(row['error'] for row in rows) else 0


def load_model(
    config: ConfigDict, workdir: str, step_number: int | str | None, labels: str
) -> VideoModel:
    """The model of a run, for other classes where there is a file of them; arguments as of `run`.

    Raises:
      ValueError: the run, the backbone or the labels do not fit, or there are several processes.
    """
    if jax.process_count() > 1:
        raise ValueError('predict runs in one process; start it on a single host')
    class_names = (read_label_map(labels).names,) if labels else None
    return VideoModel(load_trained(config, workdir, step_number, class_names), config)


def output_folder(workdir: str, output: str) -> Path:
    """Where files about videos are written, made: locally, also those of a run in a bucket."""
    folder = Path(output or os.path.join('' if '://' in workdir else workdir, 'predictions'))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def picture_stems(paths: Sequence[str], endings: Sequence[str]) -> list[str]:
    """What the file names of each video start with: its own name, one that no other video has.

    Videos of one name get the folders in front that tell them apart, as `opening a door-0001`;
    those that even so share a name are numbered.

    Args:
      paths: videos.
      endings: what follows, for each file of a video.
    """
    parts = [Path(os.path.abspath(path)).with_suffix('').parts[1:] for path in paths]
    alike: dict[str, list[tuple[str, ...]]] = {}
    for own in parts:
        alike.setdefault(own[-1], []).append(own)
    # As many folders as tell the most apart, and no more.
    depths = {
        stem: max(range(1, 5), key=lambda d: (len({own[-d:] for own in group}), -d))
        for stem, group in alike.items()
    }
    names = [file_name('-'.join(own[-depths[own[-1]] :])) for own in parts]
    stems: list[str] = []
    taken: set[str] = set()
    for name in names:
        stem, number = name, 1
        while not taken.isdisjoint(stem + ending for ending in endings):
            number += 1
            stem = f'{name}-{number}'
        stems.append(stem)
        taken.update(stem + ending for ending in endings)
    return stems


def print_predictions(rows: Sequence[dict[str, Any]]) -> None:
    """Prints rows of `Prediction.summary`, each with its pictures, as one table."""
    console = Console()
    columns = max((len(row['top']) for row in rows), default=1)
    table = Table()
    table.add_column('video', overflow='fold')
    for i in range(columns):
        table.add_column('class' if columns == 1 else f'head {i}', overflow='fold')
        table.add_column('probability', justify='right', no_wrap=True)
    for row in rows:
        path = row['path']
        if row['error']:
            table.add_row(path, styled((row['error'], 'bold red')))
        else:
            cells = [path]
            for ranking in row['top']:
                cells.append('\n'.join(terminal(entry['label']) for entry in ranking))
                cells.append('\n'.join(f'{100 * entry["probability"]:.2f} %' for entry in ranking))
            table.add_row(*cells)
        table.add_section()
    console.print(table)
    for title, fields in (('pictures', PICTURES), ('attention', ATTENTION_PICTURES)):
        for field, ending in fields.items():
            files = [row[field] for row in rows if row[field]]
            if files:
                several = f'{os.path.dirname(files[0])}/*{ending}'
                text = files[0] if len(files) == 1 else several
                console.print(f'{title}: {text}', soft_wrap=True)


def write_contact_sheet(path: str | os.PathLike[str], prediction: Prediction) -> None:
    """Writes a PNG with the frames of a view, cropped as the model saw them, and the top classes.

    Args:
      path: file to write.
      prediction: of a video that could be read.
    """
    with drawing.theme():
        _sheet(prediction).savefig(path, dpi=110)


def write_attention(
    sheet: str | os.PathLike[str], animation: str | os.PathLike[str], prediction: Prediction
) -> None:
    """Draws where the model's query looked in the view that `write_contact_sheet` shows.

    Args:
      sheet: PNG to write.
      animation: GIF to write.
      prediction: with attention.
    """
    view = shown_view(prediction)
    video, maps = prediction.video[view], prediction.attention[view]
    attention_map.write_sheet(sheet, video, maps, _name(prediction))
    attention_map.write_animation(animation, video, maps)


def shown_view(prediction: Prediction) -> int:
    """The view that pictures show: the one in the middle."""
    return len(prediction.video) // 2


def _name(prediction: Prediction) -> str:
    """What a picture says it shows."""
    name = drawing.cut(os.path.join(*Path(prediction.path).parts[-2:]), 60)
    views = len(prediction.video)
    return name if views == 1 else f'{name}, view {shown_view(prediction) + 1} of {views}'


def _sheet(prediction: Prediction) -> Figure:
    from matplotlib.figure import Figure

    video = prediction.video[shown_view(prediction)]
    shown = contact_sheet.choose(len(video))
    most = max(len(ranking) for ranking in prediction.top)
    heights = (contact_sheet.height(len(shown)), 0.42 * most + 0.35)  # inches
    figure = Figure(figsize=(contact_sheet.WIDTH, sum(heights)), layout='constrained')
    figure.get_layout_engine().set(w_pad=0.04, h_pad=0.03, wspace=0.0, hspace=0.0)
    frames_part, bars_part = figure.subfigures(2, 1, height_ratios=heights)
    title = f'{_name(prediction)}: {contact_sheet.count(len(shown), len(video))}'
    contact_sheet.draw(frames_part, title, video[shown], shown)
    columns = bars_part.subplots(1, len(prediction.top), squeeze=False)[0]
    for axis, ranking in zip(columns, prediction.top):
        _draw_ranking(axis, ranking, int(130 / len(prediction.top)))
    return figure


def _draw_ranking(axis: Axes, ranking: Ranking, most_letters: int) -> None:
    """Bars from 0 to 1, the class above each, the probability after it."""
    for place, (name, share) in enumerate(ranking):
        axis.barh(place, 1, height=0.26, color='C0', alpha=0.12)
        axis.barh(place, share, height=0.26, color='C0')
        axis.text(0, place - 0.2, drawing.cut(name, most_letters), va='bottom', fontsize=9)
        axis.text(1.01, place, f'{100 * share:.1f} %', va='center', fontsize=9)
    axis.set_xlim(0, 1.1)
    axis.set_ylim(len(ranking) - 0.6, -0.75)
    axis.set_axis_off()
