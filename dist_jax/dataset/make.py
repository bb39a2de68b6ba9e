"""Writes a built-in data set, motion clips or others of their world, and a contact sheet of it.

dist_jax dataset make --out data/motion_clips
dist_jax dataset make --out /tmp/small --num_train 100 --num_val 20 --seed 1
dist_jax dataset make --images --out data/motion_images
dist_jax dataset make --captions --out data/motion_captions
dist_jax dataset make --world --out data/motion_world
dist_jax dataset make --large_world --out data/motion_world_large
"""

import argparse
import dataclasses
import functools
import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from input_pipeline import motion_captions, motion_clips, motion_images, motion_world
from input_pipeline.escape import Console, terminal

COLUMNS = 16  # pictures of a row on the contact sheet
DESCRIBED = 16  # clips with captions on it

Pictures = Sequence[np.ndarray]


@dataclass(frozen=True)
class BuiltIn:
    """A built-in data set.

    Attributes:
      noun: what its files are.
      generate: writes it.
      titles: arguments of `generate` -> a text for each row of the contact sheet.
      examples: (the same arguments, row) -> at most `COLUMNS` validation pictures.
      caption: the same arguments -> what those pictures are.
      config: that trains on it.
    """

    noun: str
    generate: Callable[..., bool]
    titles: Callable[[Mapping[str, Any]], Sequence[str]]
    examples: Callable[[Mapping[str, Any], int], Pictures]
    caption: Callable[[Mapping[str, Any]], str]
    config: str

    @property
    def defaults(self) -> dict[str, Any]:
        """Arguments of `generate` that have a default."""
        parameters = inspect.signature(self.generate).parameters
        return {k: p.default for k, p in parameters.items() if p.default is not p.empty}


def _classes(names: Sequence[str], meta: Mapping[str, Any]) -> Sequence[str]:
    return [f'{label}  {name}' for label, name in enumerate(names[: meta['num_val']])]


def _described(meta: Mapping[str, Any]) -> range:
    """Clips with captions, each of another look, and of another motion than the one before."""
    step = len(motion_captions.MOTIONS) + 1
    return range(0, meta['num_val'], step)[:DESCRIBED]


def _sentences(meta: Mapping[str, Any]) -> Sequence[str]:
    described = (motion_captions.combination(meta['seed'], 'val', k) for k in _described(meta))
    return ['\n'.join(motion_captions.describe(*clip)) for clip in described]


def _shown(meta: Mapping[str, Any]) -> range:
    return range(0, meta['num_frames'], max(1, meta['num_frames'] // COLUMNS))


def _frames(meta: Mapping[str, Any], label: int) -> Pictures:
    """Frames of one clip."""
    size = meta['size']
    plan = motion_clips.plan_clip(meta['seed'], 'val', label, meta['num_frames'], size, label)
    return motion_clips.render_clip(plan, size)[list(_shown(meta))]


def _object_frames(meta: Mapping[str, Any], row: int) -> Pictures:
    """Frames of one clip with captions."""
    size, index = meta['size'], _described(meta)[row]
    clip = motion_captions.render_clip(meta['seed'], 'val', index, meta['num_frames'], size)
    return clip[list(_shown(meta))]


def _stills(meta: Mapping[str, Any], label: int) -> Pictures:
    """The first pictures of a class."""
    places = range(label, meta['num_val'], len(motion_images.CLASS_NAMES))[:COLUMNS]
    return [motion_images.render_image(meta['seed'], 'val', k, meta['size'], label) for k in places]


def _world_sentences(meta: Mapping[str, Any]) -> Sequence[str]:
    clips = (motion_world.plan_clip(meta['seed'], 'val', k) for k in range(meta['num_val']))
    return [motion_world.describe(clip)[0] for clip in itertools.islice(clips, DESCRIBED)]


def _world_frames(meta: Mapping[str, Any], row: int) -> Pictures:
    """Frames of one clip, at equal times."""
    clip = motion_world.plan_clip(meta['seed'], 'val', row)
    return motion_world.render_clip(clip, meta['size'], np.arange(COLUMNS) / COLUMNS)


def _caption(meta: Mapping[str, Any]) -> str:
    shown = _shown(meta)
    return f'frames {shown[0]}, {shown[1]} .. {shown[-1]} of {meta["num_frames"]}'


CLIPS = BuiltIn(
    'clips',
    motion_clips.generate,
    functools.partial(_classes, motion_clips.CLASS_NAMES),
    _frames,
    _caption,
    'dist:demo',
)
IMAGES = BuiltIn(
    'images',
    motion_images.generate,
    functools.partial(_classes, motion_images.CLASS_NAMES),
    _stills,
    lambda meta: 'first validation images of each class',
    'sts:demo_images',
)
CAPTIONS = BuiltIn(
    'clips',
    motion_captions.generate,
    _sentences,
    _object_frames,
    _caption,
    'side4video_retrieval:demo',
)
WORLD = BuiltIn(
    'clips',
    motion_world.generate,
    _world_sentences,
    _world_frames,
    lambda meta: f'{COLUMNS} moments of the first validation clips',
    'evl:world',
)
LARGE_WORLD = dataclasses.replace(
    WORLD, generate=functools.partial(motion_world.generate, **motion_world.LARGE)
)


def draw_contact_sheet(out_dir: Path, built_in: BuiltIn, meta: Mapping[str, Any]) -> Path:
    """Draws validation pictures, a row for each class or clip.

    Args:
      out_dir: folder of the data set.
      built_in: which set it is.
      meta: arguments of its `generate`.

    Returns:
      The PNG that was written, OUT/contact_sheet.png.
    """
    titles = built_in.titles(meta)
    rows = [built_in.examples(meta, row) for row in range(len(titles))]
    columns = max(map(len, rows))
    above = 0.1 + 0.15 * (1 + titles[0].count('\n'))  # inches of a title
    height = 0.4 + (1.2 + above) * len(titles)
    figure = Figure(figsize=(1.2 * max(columns, 4), height))
    figure.subplots_adjust(0.01, 0.1 / height, 0.99, 1 - (0.3 + above) / height, 0.05, above / 1.2)
    axes = figure.subplots(len(titles), columns, squeeze=False)
    for title, pictures, row in zip(titles, rows, axes):
        for axis, picture in zip(row, pictures):
            axis.imshow(picture)
        for axis in row:
            axis.set_axis_off()
        row[0].set_title(title, loc='left', fontsize=9)
    figure.suptitle(built_in.caption(meta), y=1 - 0.1 / height, fontsize=9)
    path = out_dir / 'contact_sheet.png'
    figure.savefig(path, dpi=110)
    return path


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog='dist_jax dataset make',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument('--out', required=True, metavar='DIR', help='folder to create')
    found.set_defaults(built_in=CLIPS)
    kinds = found.add_mutually_exclusive_group()
    for flag, built_in, text in (
        ('--images', IMAGES, 'still images whose classes are shape, texture and colour'),
        ('--captions', CAPTIONS, 'clips of one object, with sentences in place of classes'),
        ('--world', WORLD, 'the benchmark: looks, motions and sentences of the same clips'),
        ('--large_world', LARGE_WORLD, 'the same, ten times as large'),
    ):
        kinds.add_argument(flag, dest='built_in', action='store_const', const=built_in, help=text)
    for name, text in {
        'num_train': 'training files',
        'num_val': 'validation files',
        'num_test': 'test files',
        'num_new_looks': 'files of looks that are held out',
        'num_new_motions': 'files of motions that are held out',
        'size': 'frame height and width in pixels, a multiple of 8',
        'num_frames': 'frames per clip, a multiple of 4',
        'fps': 'frames per second',
        'seed': 'seed of all draws',
        'num_threads': 'files written at the same time',
    }.items():
        flags = [f'--{name}'] + (['--frames'] if name == 'num_frames' else [])
        sets = {'clips': CLIPS, 'images': IMAGES, 'world': WORLD, 'large_world': LARGE_WORLD}
        defaults = {key: each.defaults[name] for key, each in sets.items() if name in each.defaults}
        same = len(set(defaults.values())) == 1
        each = ', '.join(f'{value} of {key}' for key, value in defaults.items())
        text += f' (default {next(iter(defaults.values())) if same else each})'
        found.add_argument(*flags, dest=name, type=int, default=argparse.SUPPRESS, help=text)
    return found


def main(argv: Sequence[str]) -> int:
    """Runs the command line; returns the exit code."""
    arguments = vars(parser().parse_args(argv))
    out_dir, built_in = Path(arguments.pop('out')), arguments.pop('built_in')
    foreign = [f'--{name}' for name in arguments if name not in built_in.defaults]
    if foreign:
        parser().error(f'{", ".join(foreign)}: {built_in.noun} have none; leave it out')

    console = Console()
    columns = (
        TextColumn(built_in.noun),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    try:
        with Progress(*columns, console=console) as progress:
            task = progress.add_task(built_in.noun, total=None)
            written = built_in.generate(
                out_dir,
                **arguments,
                progress=lambda done, total: progress.update(task, completed=done, total=total),
            )
    except (ValueError, OSError) as error:
        console.print(f'error: {error}', style='red', soft_wrap=True)
        return 1
    sheet = draw_contact_sheet(out_dir, built_in, built_in.defaults | arguments)
    what = 'wrote' if written else 'found a complete set in'
    console.print(f'{what} {out_dir}; see {sheet}', soft_wrap=True)
    console.print(
        f'train on it: dist_jax train --config={built_in.config} '
        f'--config.data.root={terminal(str(out_dir))} --workdir=RUN',
        soft_wrap=True,
    )
    return 0
