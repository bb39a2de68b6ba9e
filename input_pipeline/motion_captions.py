"""The built-in set of captions: one object on a plain ground, what it looks like and how it moves.

A clip moves as a motion clip does (`motion_clips`: once around the frame to one side, once around
it up or down, in one order or the other), but shows a single object whose colour, texture and shape
have names: "a striped red star moves left, then up". The sentences of a clip, `NUM_WORDINGS` of
them, say all of that in different words. There are 6 x 3 x 4 looks and 8 motions: 576 clips that
sentences can tell apart.

Of each 8 clips that follow each other all have one look, and each has another motion; the next 8
have another look. So a validation split of at most 576 clips has no sentence twice, and its right
clip is found neither by look nor by motion alone: of the 200 of the default, the 25 looks leave 8
clips each and the 8 motions 25 each. Whoever sees single frames, or frames without their order,
knows the look at best (`motion_clips` says why) and finds the right clip first in 1 of 8 searches;
whoever sees the motion alone, in 1 of 25; chance is 1 of 200. The training split has the same looks
and motions; its clips are drawn anew.

Named is what is drawn at random from a range without overlap (`world.COLOURS`); ground, size, turn,
the darker tone of the object and where it starts are free and not in a sentence.
"""

import functools
import itertools
import json
import os
from pathlib import Path

import numpy as np

from input_pipeline import built_in, motion_clips, world

COLOURS = ('red', 'green', 'blue', 'yellow', 'purple', 'white')
TEXTURES = {  # as an adjective, and after "with"
    'halved': ('half-dark', 'one dark half'),
    'striped': ('striped', 'dark stripes'),
    'checked': ('checkered', 'dark checks'),
}
SHAPES = ('disc', 'star', 'cross', 'bar')
LOOKS = tuple(
    world.Look(shape, texture, colour, area=1.4)
    for shape, texture, colour in itertools.product(SHAPES, TEXTURES, COLOURS)
)
MOTIONS = motion_clips.CLASS_NAMES
NUM_WORDINGS = 4
# Words of a direction, in an order that goes with that of the wordings.
DIRECTIONS = {
    'right': ('right', 'to the right', 'goes right', 'travels to the right'),
    'left': ('left', 'to the left', 'goes left', 'travels to the left'),
    'down': ('down', 'downwards', 'goes down', 'sinks'),
    'up': ('up', 'upwards', 'goes up', 'rises'),
}
FORMAT_VERSION = 1  # raise when pixels or sentences change, as for the clips
_STREAM = 2  # other draws than those of clips and pictures


def describe(look: world.Look, motion: int) -> tuple[str, ...]:
    """The sentences of a clip.

    Args:
      look: one of `LOOKS`.
      motion: a place in `MOTIONS`.

    Returns:
      `NUM_WORDINGS` sentences.
    """
    shape, colour = look.shape, look.colour
    adjective, noun = TEXTURES[look.texture]
    first, second = MOTIONS[motion].removeprefix('moves ').split(', then ')
    ways = list(zip(DIRECTIONS[first], DIRECTIONS[second]))
    return (
        'a {} {} {} moves {}, then {}'.format(adjective, colour, shape, *ways[0]),
        'a {} {} with {} slides {} and then {}'.format(colour, shape, noun, *ways[1]),
        'the {} is {} and has {}: first it {}, after that it {}'.format(
            shape, colour, noun, *ways[2]
        ),
        'a {}, {} and {}, {} before it {}'.format(shape, colour, adjective, *ways[3]),
    )


def combination(seed: int, split: str, index: int) -> tuple[world.Look, int]:
    """Look of a clip, and its motion, a place in `MOTIONS`; arguments as of `render_clip`."""
    rng = np.random.default_rng([seed, built_in.SPLITS.index(split), 0, _STREAM])
    turn, motion = divmod(index, len(MOTIONS))
    return LOOKS[rng.permutation(len(LOOKS))[turn % len(LOOKS)]], motion


def render_clip(seed: int, split: str, index: int, num_frames: int, size: int) -> np.ndarray:
    """Draws a clip.

    Args:
      seed: seed of the data set.
      split: 'train' or 'val'.
      index: number of the clip in its split.
      num_frames: frames in the clip, a multiple of 4.
      size: height and width of the frames in pixels.

    Returns:
      (num_frames, size, size, 3) uint8 RGB.
    """
    look, motion = combination(seed, split, index)
    plan = motion_clips.plan_clip(seed, split, index, num_frames, size, motion)
    return motion_clips.render_clip(plan, size, functools.partial(world.draw_object, look=look))


def generate(
    out_dir: str | os.PathLike,
    num_train: int = 1000,
    num_val: int = 200,
    size: int = 48,
    num_frames: int = 32,
    fps: int = 16,
    seed: int = 0,
    num_threads: int = 2,
    progress: built_in.Progress | None = None,
) -> bool:
    """Writes the data set, unless the folder already holds it; as `motion_clips.generate`.

    Its lists are train.jsonl and val.jsonl, objects with `path` and `captions`. There are at most
    as many validation clips as looks and motions.

    Raises:
      ValueError: if an argument is out of range or the folder holds something else.
    """
    motion_clips.check_shape(num_frames, size)
    most = len(LOOKS) * len(MOTIONS)
    if num_val > most:
        raise ValueError(f'num_val={num_val} is more than the {most} clips that sentences tell')
    meta = {
        'name': 'motion_captions',
        'format_version': FORMAT_VERSION,
        'num_train': num_train,
        'num_val': num_val,
        'size': size,
        'num_frames': num_frames,
        'fps': fps,
        'seed': seed,
    }

    def write_file(path: Path, split: str, index: int) -> None:
        motion_clips.write_clip(path, render_clip(seed, split, index, num_frames, size), fps)

    def line(name: str, split: str, index: int) -> str:
        captions = describe(*combination(seed, split, index))
        return json.dumps({'path': name, 'captions': captions}) + '\n'

    lists = {
        f'{split}.jsonl': ''.join(
            line(name, split, index)
            for index, name in enumerate(built_in.file_names(split, count, '.mp4'))
        )
        for split, count in zip(built_in.SPLITS, (num_train, num_val))
    }
    suffixes = dict.fromkeys(built_in.SPLITS, '.mp4')
    return built_in.write_set(out_dir, meta, suffixes, write_file, lists, num_threads, progress)
