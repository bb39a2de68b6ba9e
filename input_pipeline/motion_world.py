"""A small benchmark: what is seen and how it moves, each unknown to the other.

A clip of two seconds shows a thing (one of 6 shapes x 6 colours) and a ball, the same
in all clips, over a ground with a pattern that drifts, through a camera that shakes, often behind a
bar; files have several frame rates and quantisers. The same clips have three lists: motion classes
(`MOTIONS`, 'moves right, then up'), appearance classes (`LOOKS`, 'red star'), sentences that say
both, and all that is true of a clip as classes (`ATTRIBUTES`). Opposite sides of a frame join.

Held out for zero-shot tests: the six pairs of shape and colour `NEW_LOOKS`, each shape and each
colour of which is seen in other pairs, and the four sequences `NEW_MOTIONS`, made of the words of
other sequences. Neither is in any other split, nor in the pictures.

**A single frame says nothing of the motion, even with its time known.** A clip is eight phases, all
on circles: place of the thing (right, down), its angle, its size (which grows to the largest and
starts again at the smallest), place of the ball, place of the ground. Each starts uniformly and
moves along a path that the class draws (`displacements`), to which drift and shake are added that
know nothing of the class. So at any time each phase is uniform and independent of the others,
whatever the class; bar, frame rate and quantiser are drawn without regard to it, looks and grounds
come in turn with every motion (`combination`: a small part of a list has few looks of each), and
every frame is an intra frame, which knows no other. What many frames say without their order is not
bounded: places that vary say that something moves (`tools.study` measures it as the floor).

**A single frame says all of the look**, but where a bar hides the thing.
"""

import functools
import itertools
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from input_pipeline import built_in, motion_clips, motion_images, world

SHAPES = ('disc', 'ring', 'cross', 'spark', 'needle', 'cluster')
COLOURS = ('red', 'green', 'blue', 'yellow', 'purple', 'white')
GROUNDS = ('plain', 'wavy', 'spotted', 'checkered')
SIZES = ('small', 'middle-sized', 'large')

PAIRS = tuple(itertools.product(SHAPES, COLOURS))
NEW_PAIRS = tuple(zip(SHAPES, COLOURS))
SEEN_PAIRS = tuple(pair for pair in PAIRS if pair not in NEW_PAIRS)
LOOKS = tuple(f'{colour} {shape}' for shape, colour in SEEN_PAIRS)
NEW_LOOKS = tuple(f'{colour} {shape}' for shape, colour in NEW_PAIRS)

DIRECTIONS = {'left': (-1, 0), 'right': (1, 0), 'up': (0, -1), 'down': (0, 1)}
MOTIONS = (
    *('moves left', 'moves right', 'moves up', 'moves down'),
    *('moves right, then up', 'moves up, then left'),
    *('moves left, then down', 'moves down, then right'),
    *('turns clockwise', 'turns counterclockwise', 'comes closer', 'goes away'),
    *('moves fast', 'moves slowly', 'moves with the ball', 'is passed by the ball'),
)
NEW_MOTIONS = (
    *('moves up, then right', 'moves left, then up'),
    *('moves down, then left', 'moves right, then down'),
)
# What single motions are called, 'moves up' of 'moves right, then up' too.
SINGLE_MOTIONS = tuple(motion for motion in MOTIONS if ', then ' not in motion)
ATTRIBUTES = (*COLOURS, *SHAPES, *(f'{ground} ground' for ground in GROUNDS), *SINGLE_MOTIONS)
# Turns of the circle per clip.
FAST, SLOW, TURN, GROW = 1.8, 0.5, 0.75, 0.9
DRIFT = 0.03  # of thing, ball, angle and size, either way
GROUND_DRIFT = 0.1
SHAKE = 0.015  # of the frame's side, most of either way
RADII = (0.28, 0.46)  # of the thing, smallest and largest, of the frame's side
SHADE = 0.45
BALL = 0.13
RATES = (8, 12, 16)  # frames per second
QUANTISERS = (16, 20, 24, 28)
SECONDS = 2
BAR_SHARE = 0.2  # of clips that have one

SPLITS = {  # split -> (pairs of shape and colour, motions)
    'train': (SEEN_PAIRS, MOTIONS),
    'val': (SEEN_PAIRS, MOTIONS),
    'test': (SEEN_PAIRS, MOTIONS),
    'new_looks': (NEW_PAIRS, MOTIONS),
    'new_motions': (SEEN_PAIRS, NEW_MOTIONS),
    'pictures_train': (SEEN_PAIRS, MOTIONS),
    'pictures_val': (SEEN_PAIRS, MOTIONS),
}
CLIPS = tuple(split for split in SPLITS if not split.startswith('pictures_'))
LARGE = {  # in place of the defaults of `generate`, which are the small size
    'num_train': 24000,
    'num_val': 1600,
    'num_test': 6400,
    'num_new_looks': 2880,
    'num_new_motions': 1600,
}
FORMAT_VERSION = 2  # raise when pixels or sentences change
_STREAM = 3  # other draws than those of the other built-in sets


@dataclass(frozen=True)
class Clip:
    """Everything that decides the pixels and sentences of one clip.

    Attributes:
      look: of the thing.
      ground: one of `GROUNDS`.
      motion: one of `MOTIONS` or `NEW_MOTIONS`.
      start: (8,) float64 phases at the beginning, in turns: thing right, down, clockwise, larger;
        ball right, down; ground right, down.
      drift: (8,) float64, turns that these move during the clip besides.
      ahead: radians, the direction of motions that have none of their own.
      rate: frames per second.
      quantiser: of the H.264 stream.
      appearance: seed of everything that is drawn once: tones, patterns, bar, shake.
    """

    look: world.Look
    ground: str
    motion: str
    start: np.ndarray
    drift: np.ndarray
    ahead: float
    rate: int
    quantiser: int
    appearance: int

    @property
    def size(self) -> str:
        """One of `SIZES`, of a picture: at the start."""
        return SIZES[int(self.start[3] % 1 * len(SIZES))]


def combination(seed: int, split: str, index: int) -> tuple[tuple[str, str], str, str]:
    """(shape, colour), ground and motion of a clip.

    The same come back after as many clips as there are combinations, and not before. Every run of
    as many clips as there are motions has each of them once.
    """
    pairs, motions = SPLITS[split]
    looks = list(itertools.product(pairs, GROUNDS))
    turn, motion = divmod(index, len(motions))
    rng = np.random.default_rng([seed, list(SPLITS).index(split), _STREAM])
    order = rng.permutation(len(looks))
    first = motion * len(looks) // len(motions)  # each motion begins at another look
    pair, ground = looks[order[(first + turn) % len(looks)]]
    return pair, ground, motions[motion]


def plan_clip(seed: int, split: str, index: int) -> Clip:
    """Draws a clip; nothing but `motion` itself depends on the motion.

    Args:
      seed: seed of the data set.
      split: a key of `SPLITS`.
      index: number of the clip in its split.
    """
    (shape, colour), ground, motion = combination(seed, split, index)
    rng = np.random.default_rng([seed, list(SPLITS).index(split), index, _STREAM])
    most = np.array([*[DRIFT] * 6, *[GROUND_DRIFT] * 2])
    return Clip(
        look=world.Look(shape, 'halved', colour, shade=SHADE),
        ground=ground,
        motion=motion,
        start=rng.uniform(0, 1, 8),
        drift=rng.uniform(-most, most),
        ahead=float(rng.uniform(0, 2 * np.pi)),
        rate=int(rng.choice(RATES)),
        quantiser=int(rng.choice(QUANTISERS)),
        appearance=int(rng.integers(2**31)),
    )


def displacements(motion: str, ahead: float, times: np.ndarray) -> np.ndarray:
    """How far a motion has moved thing and ball.

    Args:
      motion: one of `MOTIONS` or `NEW_MOTIONS`.
      ahead: radians, the direction where the motion has none of its own.
      times: (T,) float64, 0 to 1.

    Returns:
      (T, 6) float64 turns: thing right, down, clockwise, larger; ball right, down.
    """
    way = np.array([np.cos(ahead), np.sin(ahead)])
    moved = np.zeros((len(times), 6))
    words = motion.removeprefix('moves ').split(', then ')
    if words[0] in DIRECTIONS:
        halves = np.clip(times[:, None] * len(words) - np.arange(len(words)), 0, 1) / len(words)
        moved[:, :2] = halves @ np.array([DIRECTIONS[word] for word in words], float)
        return moved
    speeds = {
        'turns clockwise': (2, TURN),
        'turns counterclockwise': (2, -TURN),
        'comes closer': (3, GROW),
        'goes away': (3, -GROW),
    }
    if motion in speeds:
        axis, speed = speeds[motion]
        moved[:, axis] = speed * times
        return moved
    thing, ball = {
        'moves fast': (FAST, 0),
        'moves slowly': (SLOW, 0),
        'moves with the ball': (1, 1),
        'is passed by the ball': (0, 1),
    }[motion]
    moved[:, :2] = thing * times[:, None] * way
    moved[:, 4:] = ball * times[:, None] * way
    return moved


def render_clip(clip: Clip, size: int, times: np.ndarray | None = None) -> np.ndarray:
    """Draws the frames of a clip.

    Args:
      clip: what to draw.
      size: height and width of the frames in pixels.
      times: (T,) of the frames, 0 to 1 from the first to the end of the clip; None for those of
        its frame rate.

    Returns:
      (T, size, size, 3) uint8 RGB.
    """
    if times is None:
        times = np.arange(SECONDS * clip.rate) / (SECONDS * clip.rate)
    rng = np.random.default_rng(clip.appearance)
    ground = _draw_ground(rng, size, clip.ground)
    drawn_radius = 0.4 * size
    sprite = world.draw_sprite(rng, size, drawn_radius, clip.look)
    ball = _draw_ball(rng, size)
    bar = _draw_bar(rng, size)
    shake = _shake(rng, times) * size
    phases = clip.start + clip.drift * times[:, None]
    phases[:, :6] += displacements(clip.motion, clip.ahead, times)
    frames = []
    for phase, shift in zip(phases % 1, shake):
        right, down, angle, larger, ball_right, ball_down, ground_right, ground_down = phase
        picture = np.roll(ground, _pixels(ground_down, ground_right, size), (0, 1)).copy()
        _lay(picture, ball, 1.0, 0.0, ball_right * size, ball_down * size)
        radius = size * RADII[0] * (RADII[1] / RADII[0]) ** larger
        _lay(picture, sprite, radius / drawn_radius, 360 * angle, right * size, down * size)
        picture = np.roll(picture, np.rint(shift).astype(int), (0, 1))
        world.blend(picture, bar)
        frames.append((np.clip(picture, 0, 255) + 0.5).astype(np.uint8))
    return np.stack(frames)


def _pixels(down: float, right: float, size: int) -> tuple[int, int]:
    return round(down * size), round(right * size)


def _lay(
    picture: np.ndarray, sprite: np.ndarray, scale: float, degrees: float, right: float, down: float
) -> None:
    """Lays a sprite, scaled and turned clockwise, on a picture whose opposite sides join."""
    size, middle = len(picture), (len(sprite) - 1) / 2
    turn = cv2.getRotationMatrix2D((middle, middle), -degrees, scale)
    whole = np.floor([down, right]).astype(int)
    turn[:, 2] += (size - 1) / 2 - middle + np.array([right, down]) % 1
    layer = cv2.warpAffine(sprite, turn, (size, size), flags=cv2.INTER_LINEAR)
    world.blend(picture, np.roll(layer, whole, (0, 1)))


def _draw_ground(rng: np.random.Generator, size: int, name: str) -> np.ndarray:
    """(size, size, 3) float32, a pattern in two muted tones, without a seam."""
    tones = rng.uniform(60, 130, 3) + np.array([-1, 1])[:, None] * rng.uniform(8, 22, 3)
    rows, columns = np.mgrid[:size, :size] / size * 2 * np.pi
    k, m = rng.integers(1, 4, 2)
    place = rng.uniform(0, 2 * np.pi, 2)
    wave = {
        'plain': lambda: np.zeros((size, size)),
        'wavy': lambda: np.sin(k * columns + place[0] + 1.5 * np.sin(rows + place[1])),
        'spotted': lambda: (
            4 * np.cos((k + 2) * columns + place[0]) * np.cos((k + 2) * rows + place[1]) - 2
        ),
        'checkered': lambda: (
            4 * np.sin((m + 1) * columns + place[0]) * np.sin((m + 1) * rows + place[1])
        ),
    }[name]()
    blend = np.clip(wave / 2 + 0.5, 0, 1)[..., None]
    return (tones[0] * blend + tones[1] * (1 - blend)).astype(np.float32)


def _draw_ball(rng: np.random.Generator, size: int) -> np.ndarray:
    """A dark ball with a light rim, (size, size, 4) float32 RGBA."""
    del rng  # all balls are alike
    away = np.hypot(*(np.mgrid[:size, :size] - (size - 1) / 2))
    radius = BALL * size
    alpha = np.clip(radius - away + 0.5, 0, 1)
    tone = np.where(away < 0.65 * radius, 20.0, 235.0)
    return np.dstack([tone, tone, tone, alpha]).astype(np.float32)


def _draw_bar(rng: np.random.Generator, size: int) -> np.ndarray:
    """What is in front of everything, (size, size, 4) float32 RGBA; alpha 0 in some clips."""
    there, upright = rng.random() < BAR_SHARE, rng.random() < 0.5
    width, tone = rng.uniform(0.08, 0.16), rng.uniform(20, 200)
    left = int(rng.uniform(0, 1 - width) * size)
    bar = np.zeros((size, size, 4), np.float32)
    if there:
        bar[:, left : left + max(1, round(width * size))] = (tone, tone, tone, 1)
    return bar if upright else bar.swapaxes(0, 1)


def _shake(rng: np.random.Generator, times: np.ndarray) -> np.ndarray:
    """(T, 2) float64 in sides of the frame: a smooth path that knows nothing of the clip."""
    rounds, place = rng.uniform(1, 5, (3, 2)), rng.uniform(0, 2 * np.pi, (3, 2))
    return SHAKE * np.sin(2 * np.pi * rounds * times[:, None, None] + place).mean(1) * 1.5


def describe(clip: Clip) -> tuple[str, ...]:
    """Sentences about a clip, what is seen and how it moves."""
    colour, shape, ground, motion = clip.look.colour, clip.look.shape, clip.ground, clip.motion
    return (
        f'a {colour} {shape} {motion} over a {ground} ground',
        f'over a {ground} ground a {shape} that is {colour} {motion}',
        f'{colour} {shape}, {ground} ground: it {motion}',
    )


def describe_picture(clip: Clip) -> tuple[str, ...]:
    """Sentences about what the first frame of a clip shows."""
    colour, shape, ground = clip.look.colour, clip.look.shape, clip.ground
    return (
        f'{colour} {shape}',
        f'a {colour} {shape} on a {ground} ground',
        f'a photo of a {clip.size} {colour} {shape}',
        f'a {shape} that is {colour}',
    )


def attributes(clip: Clip) -> tuple[str, ...]:
    """All of `ATTRIBUTES` that a clip has, four or five."""
    first, *then = clip.motion.split(', then ')
    motions = (first, *(f'moves {way}' for way in then))
    return (clip.look.colour, clip.look.shape, f'{clip.ground} ground', *motions)


def class_names(split: str) -> tuple[Sequence[str], Sequence[str]]:
    """Names of the appearance classes and of the motion classes of a split."""
    pairs, motions = SPLITS[split]
    return [f'{colour} {shape}' for shape, colour in pairs], motions


def labels(seed: int, split: str, index: int) -> tuple[int, int]:
    """Appearance class and motion class of a clip, places in `class_names`."""
    pairs, motions = SPLITS[split]
    pair, _, motion = combination(seed, split, index)
    return pairs.index(pair), motions.index(motion)


def generate(
    out_dir: str | os.PathLike,
    num_train: int = 4800,
    num_val: int = 320,
    num_test: int = 640,
    num_new_looks: int = 288,
    num_new_motions: int = 160,
    size: int = 32,
    seed: int = 0,
    num_threads: int = 2,
    progress: built_in.Progress | None = None,
) -> bool:
    """Writes the benchmark, unless the folder already holds it.

    The same arguments give the same bytes on the same machine.

    Args:
      out_dir: folder to create, see `built_in.write_set`. Beside the clips of each split it gets
        motion_SPLIT.txt, looks_SPLIT.txt (lines of "path label"), attributes_SPLIT.csv (any number
        of labels) and captions_SPLIT.jsonl for train, val and test; looks_new.txt of the clips in
        new_looks and motion_new.txt of those in new_motions; and the names of all these classes.
      num_train, num_val, num_test: clips of these; motion classes are balanced to within one clip.
      num_new_looks, num_new_motions: clips of what is held out.
      size: height and width in pixels, a multiple of 8.
      seed: seed of all draws.
      num_threads: files written at the same time.
      progress: called with (files done, files in all) after each file.

    Returns:
      True if it wrote the set, False if the set was there.

    Raises:
      ValueError: if an argument is out of range or the folder holds something else.
    """
    world.check_size(size)
    meta = {
        'name': 'motion_world',
        'format_version': FORMAT_VERSION,
        'num_train': num_train,
        'num_val': num_val,
        'num_test': num_test,
        'num_new_looks': num_new_looks,
        'num_new_motions': num_new_motions,
        'size': size,
        'seed': seed,
    }

    def write_file(path: Path, split: str, index: int) -> None:
        clip = plan_clip(seed, split, index)
        motion_clips.write_clip(path, render_clip(clip, size), clip.rate, clip.quantiser)

    looks, motion = (functools.partial(_of_class, kind) for kind in range(2))
    texts = {
        'looks_labels.txt': _lines(LOOKS),
        'looks_new_labels.txt': _lines(NEW_LOOKS),
        'motion_labels.txt': _lines(MOTIONS),
        'motion_new_labels.txt': _lines(NEW_MOTIONS),
        'attributes_labels.txt': _lines(ATTRIBUTES),
        'looks_new.txt': _list(meta, 'new_looks', looks),
        'motion_new.txt': _list(meta, 'new_motions', motion),
    }
    for split in ('train', 'val', 'test'):
        texts |= {
            f'looks_{split}.txt': _list(meta, split, looks),
            f'motion_{split}.txt': _list(meta, split, motion),
            f'attributes_{split}.csv': f'path,labels\n{_list(meta, split, _with_attributes)}',
            f'captions_{split}.jsonl': _list(meta, split, functools.partial(_described, describe)),
        }
    suffixes = dict.fromkeys(CLIPS, '.mp4')
    return built_in.write_set(out_dir, meta, suffixes, write_file, texts, num_threads, progress)


def generate_pictures(
    out_dir: str | os.PathLike,
    num_train: int = 16000,
    num_val: int = 400,
    size: int = 32,
    seed: int = 0,
    num_threads: int = 2,
    progress: built_in.Progress | None = None,
) -> bool:
    """Writes single frames of other clips as JPEG files, with sentences about what they show.

    They are for a backbone to learn from: no motion is in them, no look that is held out, and no
    clip of the benchmark. Arguments, result and errors as of `generate`; the lists are train.jsonl
    and val.jsonl.
    """
    world.check_size(size)
    meta = {
        'name': 'motion_world_pictures',
        'format_version': FORMAT_VERSION,
        'num_train': num_train,
        'num_val': num_val,
        'size': size,
        'seed': seed,
    }

    def write_file(path: Path, split: str, index: int) -> None:
        clip = plan_clip(seed, f'pictures_{split}', index)
        motion_images.write_image(path, render_clip(clip, size, np.zeros(1))[0])

    def described(seed: int, split: str, index: int, name: str) -> str:
        return _described(describe_picture, seed, f'pictures_{split}', index, name)

    suffixes = dict.fromkeys(built_in.SPLITS, '.jpg')
    texts = {f'{split}.jsonl': _list(meta, split, described, '.jpg') for split in suffixes}
    return built_in.write_set(out_dir, meta, suffixes, write_file, texts, num_threads, progress)


def _lines(lines: Iterable[str]) -> str:
    return ''.join(f'{line}\n' for line in lines)


def _list(
    meta: Mapping[str, Any],
    split: str,
    line: Callable[[int, str, int, str], str],
    suffix: str = '.mp4',
) -> str:
    """The list of a split; line: (seed, split, index, name of the file) -> its line."""
    names = built_in.file_names(split, meta[f'num_{split}'], suffix)
    return _lines(line(meta['seed'], split, *named) for named in enumerate(names))


def _of_class(kind: int, seed: int, split: str, index: int, name: str) -> str:
    return f'{name} {labels(seed, split, index)[kind]}'


def _with_attributes(seed: int, split: str, index: int, name: str) -> str:
    return f'{name},{";".join(attributes(plan_clip(seed, split, index)))}'


def _described(
    sentences: Callable[[Clip], tuple[str, ...]], seed: int, split: str, index: int, name: str
) -> str:
    return json.dumps({'path': name, 'captions': sentences(plan_clip(seed, split, index))})
