"""Shows what a recipe makes of a video: training clips and test views on one contact sheet.

  dist_jax dataset augmentations
  dist_jax dataset augmentations clip.mp4 --recipes side4video_ssv2 evl_k400 --draws 4
  dist_jax dataset augmentations --recipes dist_k400 --set data.erase=1 data.flip=False
  dist_jax dataset augmentations --flags side4video_ssv2

Recipes are rows of configs/inputs.py. Without a video a drawn one is used, in which left and right
differ. --flags prints the fields of a recipe as they are passed to `dist_jax train`; --table prints
the table of docs/guides/augmentation.md.
"""

import argparse
import ast
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import av
import cv2
import numpy as np
from matplotlib.figure import Figure
from ml_collections import ConfigDict
from rich.progress import track

from dist_jax import contact_sheet, recipe
from dist_jax.configs import base
from dist_jax.configs.inputs import INPUTS
from dist_jax.drawing import theme
from dist_jax.models import clip
from input_pipeline.escape import Console
from input_pipeline.pipeline import TrainReader, record_rng
from input_pipeline.video_list import Record

HEIGHT, WIDTH, FPS, NUM_FRAMES = 256, 340, 30, 120
SHAPE = 1.4  # width over height of a sheet
LABEL = 86  # "moving something to the left" or like it: its flip changes the label


def draw_video(path: Path) -> None:
    """Writes 4 s of a ball that crosses a coloured scene with a word and numbered frames."""
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    scene = np.stack([columns * 255 // WIDTH, rows * 255 // HEIGHT, 90 + 0 * rows], -1)
    scene = scene.astype(np.uint8)
    cv2.rectangle(scene, (20, 150), (110, 240), (40, 90, 200), -1)
    cv2.putText(scene, 'LEFT', (24, 206), cv2.FONT_HERSHEY_SIMPLEX, 1.1, (255, 255, 255), 3)
    for x in range(0, WIDTH, 20):
        cv2.line(scene, (x, 0), (x, HEIGHT), (60, 60, 60), 1)
    with av.open(str(path), 'w') as container:
        stream = container.add_stream('libx264', rate=FPS)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, 'yuv420p'
        for k in range(NUM_FRAMES):
            picture = scene.copy()
            x = 30 + (WIDTH - 60) * k // NUM_FRAMES
            cv2.circle(picture, (x, 80), 26, (230, 60, 40), -1)
            cv2.putText(
                picture, str(k), (x - 18, 90), cv2.FONT_HERSHEY_SIMPLEX, 0.8, (255, 255, 255), 2
            )
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format='rgb24')))
        container.mux(stream.encode(None))


def recipe_config(name: str, changes: Sequence[str] = ()) -> ConfigDict:
    """The config of a recipe; Something-Something's labels for its rows.

    Args:
      name: a key of `configs/inputs.py`'s INPUTS.
      changes: 'group.field=value' texts; values as in Python, or plain words.

    Raises:
      ValueError: naming a change that is not one.
    """
    config = base.get_config()
    config.data.name = 'something_v2' if name.endswith('ssv2') else 'kinetics400'
    config.lock()
    config.update_from_flattened_dict(INPUTS[name])
    for change in changes:
        field, equals, text = change.partition('=')
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text
        try:
            if not equals:
                raise ValueError('expected group.field=value')
            config.update_from_flattened_dict({field: value})
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f'--set {change}: {error}') from error
    return config


def operations(reader: TrainReader, draw: int, copy: int) -> str:
    """What a policy that comes first does in a copy: 'Rotate -21.0, Invert'."""
    first = reader.transforms[0] if reader.transforms else None
    if not hasattr(first, 'draw'):
        return ''
    rng = record_rng(0, draw, 0).spawn(reader.repeats)[copy]
    return ', '.join(
        f'{name} {argument:.3g}' if argument else name for name, argument in first.draw(rng)
    )


def clips_of(
    name: str, config: ConfigDict, record: Record, draws: int
) -> list[tuple[str, list[np.ndarray], list[int]]]:
    """Title, frames and their numbers of each row of a recipe's part of the sheet."""
    reader = recipe.train_reader(config, clip.PIXELS)
    clips = []
    for draw in range(draws):
        for copy, (video, rows) in enumerate(zip(*reader.read(record, record_rng(0, draw, 0)))):
            done = operations(reader, draw, copy)
            title = f'{name}, draw {draw}, copy {copy}, label {LABEL} -> {rows["label"]}'
            clips.append((title + (f': {done}' if done else ''), video))
    if reader.num_frames == 1:  # images: side by side
        title = f'{name}, {draws} draws with {reader.repeats} copies each'
        rows = [(title, [video[0] for _, video in clips], list(range(len(clips))))]
    else:
        rows = []
        for title, video in clips:
            shown = contact_sheet.choose(len(video), contact_sheet.COLUMNS)
            rows.append((title, [video[k] for k in shown], list(shown)))
    test = recipe.eval_reader(config)
    views, _ = test.read(record)
    shown = contact_sheet.choose(len(views), contact_sheet.COLUMNS)
    middle = test.num_frames // 2
    title = (
        f'{name}, test: frame {middle} of the views, {test.num_clips} clips x {test.num_crops} '
        f'crops of {test.image_size} pixels'
    )
    rows.append((title, [views[k, middle] for k in shown], list(shown)))
    return rows


def draw_sheet(rows: Sequence[tuple[str, list[np.ndarray], list[int]]], path: Path) -> None:
    """Writes the rows as one PNG, in as many columns as make it a little wider than high."""
    heights = [contact_sheet.height(len(frames)) for _, frames, _ in rows]
    across = max(1, round((SHAPE * sum(heights) / contact_sheet.WIDTH) ** 0.5))
    columns: list[list[int]] = [[]]
    for k, height in enumerate(heights):
        filled = sum(heights[i] for i in columns[-1])
        if filled + height / 2 > sum(heights) / across and len(columns) < across:
            columns.append([])
        columns[-1].append(k)
    tallest = max(sum(heights[k] for k in column) for column in columns)
    with theme():
        figure = Figure(figsize=(contact_sheet.WIDTH * len(columns), tallest), layout='constrained')
        figure.get_layout_engine().set(w_pad=0.04, h_pad=0.03, wspace=0.0, hspace=0.0)
        for column, part in zip(columns, np.atleast_1d(figure.subfigures(1, len(columns)))):
            own = [heights[k] for k in column]
            own.append(max(tallest - sum(own), 1e-3))
            places = part.subfigures(len(own), 1, height_ratios=own)
            for place, k in zip(places, column):
                title, frames, numbers = rows[k]
                contact_sheet.draw(place, title, frames, numbers)
        figure.savefig(path, dpi=80)


def flags(name: str) -> str:
    """The fields of a recipe as they are passed to `dist_jax train`."""
    return ' \\\n'.join(
        f"    '--config.{field}={value}'"
        if isinstance(value, tuple)
        else f'    --config.{field}={value}'
        for field, value in sorted(INPUTS[name].items())
    )


def table() -> str:
    """Recipes side by side, a field a row; empty where a recipe keeps the default."""
    defaults = base.get_config()
    fields = sorted({field for row in INPUTS.values() for field in row})
    lines = ['| field | default | ' + ' | '.join(f'`{name}`' for name in INPUTS) + ' |']
    lines.append('|---' * (len(INPUTS) + 2) + '|')
    for field in fields:
        group, name = field.split('.')
        cells = [str(row[field]) if field in row else '' for row in INPUTS.values()]
        default = str(defaults[group][name]) or "''"
        lines.append(f'| `{field}` | {default} | ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines)


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog='dist_jax dataset augmentations',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument('video', nargs='?', help='any video file (default: a drawn one)')
    found.add_argument(
        '--recipes',
        nargs='+',
        choices=INPUTS,
        default=list(INPUTS),
        metavar='NAME',
        help=f'some of {", ".join(INPUTS)} (default: all)',
    )
    found.add_argument('--draws', type=int, default=2, help='training clips (%(default)s)')
    found.add_argument('--set', nargs='+', default=[], metavar='FIELD=VALUE', help='changes')
    found.add_argument('--output', default='augmentations.png', help='PNG file (%(default)s)')
    found.add_argument('--flags', choices=INPUTS, metavar='NAME', help='print a recipe')
    found.add_argument('--table', action='store_true', help='print all recipes')
    return found


def main(argv: Sequence[str]) -> int:
    """Runs the command line; returns the exit code."""
    arguments = parser().parse_args(argv)
    if arguments.flags or arguments.table:
        sys.stdout.write((flags(arguments.flags) if arguments.flags else table()) + '\n')
        return 0

    with tempfile.TemporaryDirectory() as folder:
        path = Path(arguments.video or f'{folder}/drawn.mp4')
        if not arguments.video:
            draw_video(path)
        record = Record(str(path), LABEL, path.name)
        rows = []
        try:
            for name in track(arguments.recipes, 'recipes'):
                config = recipe_config(name, arguments.set)
                rows += clips_of(name, config, record, arguments.draws)
        except ValueError as error:
            Console(stderr=True).print(f'error: {error}', style='red', soft_wrap=True)
            return 1
    draw_sheet(rows, Path(arguments.output))
    Console().print(f'{arguments.output}: {len(rows)} rows')
    return 0
