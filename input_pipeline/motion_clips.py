"""The built-in data set: H.264 clips whose ten classes differ in the order of their frames only.

Each clip shows five independent mechanisms, each in a window of its own (five random windows of a
3 x 3 grid): an object that moves horizontally, one that moves vertically, one that turns, one that
changes size, and a lamp that flashes a disc and a ring. A mechanism m has a phase in [0, 1) that
decides its picture, and a clip of 2 S frames shows every mechanism at the S phases

    P_m = {phase_m + k * cycles_m / S mod 1 : k = 0 .. S - 1},

whole periods of it, each phase held for two frames. A class is a pair (mechanism, direction). The
mechanism of the class goes through P_m in order, upwards or downwards; each of the other four goes
through its P_m in an order drawn uniformly from all S! orders.

Why no single frame, and no unordered set of frames, says anything about the class:

1. All draws of a clip (windows, textures, phase_m, cycles_m) are independent of the class, and the
   mechanisms are independent of each other.
2. Let slot j of the clip show phase number q_m(j) of mechanism m. For the other mechanisms q_m is a
   uniform permutation of 0 .. S - 1. Let c be the mechanism of the class; q_c is the identity (or
   the reversal, whose composition with the argument below is the same). Frames as a set are the
   tuples (q_1(j), ..., q_5(j)) over j, and sorting the slots by q_c turns them into
   (q_1(q_c^-1(i)), ..., i, ..., q_5(q_c^-1(i))): for the other four mechanisms a uniform
   permutation composed with a fixed one, so again four independent uniform permutations.
3. So the set is distributed like S tuples that match five orderings of 0 .. S - 1 at random: each
   set of S tuples in which every mechanism takes every number once has probability 1 / (S!)^4. That
   law does not mention c or the direction. A classifier that ignores the order of the frames of a
   whole clip is therefore at chance, 1 / 10, whatever it computes and however it was trained.
4. The files keep this property: each slot is an intra frame at a constant quantiser and a copy that
   is predicted from it alone, so the decoded pictures are a function of the drawn one. (Prediction
   from slot to slot would fit a coherent mechanism better than a shuffled one, and its sharpness
   would give the class away.)

The statement is about samples that hold every slot equally often. Segment sampling of S of 2 S
frames takes the second frame of every slot in evaluation, so there it is exact. In training each
position is jittered inside its segment, so a slot may be missed and its neighbour be taken twice;
what a model picks up from that cannot help it in evaluation.

Single frames are uninformative for any sampling: one frame shows five independent uniform phases.
"""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
from av.video.reformatter import VideoReformatter

CLASS_NAMES = (
    'moving right',
    'moving left',
    'moving down',
    'moving up',
    'turning clockwise',
    'turning counter-clockwise',
    'approaching',
    'receding',
    'disc flash then ring flash',
    'ring flash then disc flash',
)
MECHANISMS = ('horizontal', 'vertical', 'rotation', 'zoom', 'lamp')
GRID = 3
HOLD = 2  # frames per slot
CYCLES = (1, 2)  # whole periods in a clip
FORMAT_VERSION = 1  # raise when the pixels of a clip change: sets of another version are not reused
SPLITS = ('train', 'val')


@dataclass(frozen=True)
class ClipPlan:
    """Everything that decides the pixels of one clip.

    Attributes:
      label: class, 0 to 9; mechanism `label // 2`, upwards if `label % 2 == 0`.
      phases: (5, S) float64 in [0, 1), the phase of each mechanism in each slot.
      cells: (5,) int64, the window of each mechanism, 0 to 8 in reading order, all different.
      appearance: seed of textures, shapes and colours.
    """

    label: int
    phases: np.ndarray
    cells: np.ndarray
    appearance: int


def plan_clip(seed: int, split: str, index: int, num_frames: int, label: int) -> ClipPlan:
    """Draws a clip; the draws are the same for every label, only the order of phases differs.

    Args:
      seed: seed of the data set.
      split: 'train' or 'val'.
      index: number of the clip in its split.
      num_frames: frames in the clip, a multiple of 2.
      label: class, 0 to 9.

    Returns:
      The plan of the clip, with `num_frames // 2` slots.
    """
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    num_slots = num_frames // HOLD
    start = rng.random(len(MECHANISMS))
    cycles = rng.choice(CYCLES, len(MECHANISMS))
    orders = np.stack([rng.permutation(num_slots) for _ in MECHANISMS])
    cells = rng.permutation(GRID * GRID)[: len(MECHANISMS)]
    appearance = int(rng.integers(2**31))

    upwards = np.arange(num_slots)
    orders[label // 2] = upwards if label % 2 == 0 else upwards[::-1]
    # In integer steps of the clip, so that a phase is the same number wherever it is visited.
    phases = (start[:, None] + (orders * cycles[:, None] % num_slots) / num_slots) % 1.0
    return ClipPlan(label, phases, cells, appearance)


def _texture(rng: np.random.Generator, size: int, coarse: int) -> np.ndarray:
    """Smooth coloured noise (size, size, 3) float32, roughly -1 to 1 around a random colour."""
    noise = rng.uniform(-1, 1, (coarse, coarse, 3)).astype(np.float32)
    return cv2.resize(noise, (size, size), interpolation=cv2.INTER_CUBIC)


def _sprite(rng: np.random.Generator, size: int, radius: float) -> np.ndarray:
    """A textured star-shaped object without rotational symmetry: (size, size, 4) float32 RGBA."""
    corners = int(rng.integers(5, 9))
    angles = (np.arange(corners) + rng.uniform(-0.25, 0.25, corners)) * 2 * np.pi / corners
    radii = radius * rng.uniform(0.7, 1.0, corners)
    radii[rng.integers(corners)] = radius
    points = size / 2 + radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], 1)
    # cv2 draws at 1/16 pixel; the mask is anti-aliased by drawing it four times as large.
    mask = np.zeros((4 * size, 4 * size), np.uint8)
    cv2.fillPoly(mask, [np.round(points * 64).astype(np.int32)], 255, cv2.LINE_AA, 4)
    alpha = cv2.resize(mask, (size, size), interpolation=cv2.INTER_AREA).astype(np.float32) / 255

    bright = rng.uniform(60, 255, 3)
    bright[rng.integers(3)] = 255
    dark = rng.uniform(0, 80, 3)
    turn = rng.uniform(0, 2 * np.pi)
    rows, columns = np.mgrid[:size, :size] - (size - 1) / 2
    half = np.clip((columns * np.cos(turn) + rows * np.sin(turn)) / 2 + 0.5, 0, 1)[..., None]
    colour = bright * half + dark * (1 - half) + 40 * _texture(rng, size, 6)
    return np.dstack([np.clip(colour, 0, 255), alpha]).astype(np.float32)


def _warp(sprite: np.ndarray, degrees: float, scale: float) -> np.ndarray:
    """Turns clockwise by `degrees` and scales about the centre of the window."""
    centre = (sprite.shape[0] - 1) / 2
    matrix = cv2.getRotationMatrix2D((centre, centre), -degrees, scale)
    size = sprite.shape[:2]
    return cv2.warpAffine(
        sprite, matrix, size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
    )


def _lamp(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Disc flash, ring flash and dark lamp, (size, size, 4) float32 RGBA each."""
    rows, columns = np.mgrid[:size, :size] - (size - 1) / 2
    distance = np.hypot(rows, columns)
    light = rng.uniform(200, 255, 3)
    dark = rng.uniform(20, 60, 3)
    radius = 0.42 * size
    inside = np.clip(radius - distance + 0.5, 0, 1)[..., None]
    core = np.clip(0.5 * radius - distance + 0.5, 0, 1)[..., None]
    rim = np.clip(distance - 0.65 * radius + 0.5, 0, 1)[..., None] * inside
    disc = np.dstack([dark + (light - dark) * core, inside])
    ring = np.dstack([dark + (light - dark) * rim, inside])
    off = np.dstack([np.broadcast_to(dark, (size, size, 3)), inside])
    return tuple(picture.astype(np.float32) for picture in (disc, ring, off))


def _pictures(mechanism: str, phases: np.ndarray, rng: np.random.Generator, size: int):
    """One (size, size, 4) RGBA picture per phase; the picture is a function of the phase alone."""
    if mechanism == 'lamp':
        disc, ring, off = _lamp(rng, size)
        return [disc if p < 0.25 else ring if p < 0.5 else off for p in phases]
    if mechanism == 'rotation':
        sprite = _sprite(rng, size, 0.48 * size)
        return [_warp(sprite, 360 * p, 1.0) for p in phases]
    if mechanism == 'zoom':
        sprite = _sprite(rng, size, 0.48 * size)
        return [_warp(sprite, 0, 0.25 * 4.0**p) for p in phases]
    axis = 1 if mechanism == 'horizontal' else 0
    sprite = _sprite(rng, size, 0.34 * size)
    return [np.roll(sprite, round(p * size) % size, axis) for p in phases]


def render_clip(plan: ClipPlan, size: int) -> np.ndarray:
    """Draws the slots of a clip.

    Args:
      plan: what to draw.
      size: height and width of the frames in pixels, a multiple of 6.

    Returns:
      (S, size, size, 3) uint8 RGB, one picture per slot.
    """
    rng = np.random.default_rng(plan.appearance)
    cell = size // GRID
    num_slots = plan.phases.shape[1]
    background = np.clip(rng.uniform(70, 185, 3) + 35 * _texture(rng, size, 9), 0, 255)
    background = background.astype(np.float32)
    for k in range(GRID):  # thin frames around the windows
        background[k * cell] *= 0.6
        background[:, k * cell] *= 0.6
    slots = np.repeat(background.round().astype(np.uint8)[None], num_slots, 0)
    for mechanism, phases, position in zip(MECHANISMS, plan.phases, plan.cells):
        row, column = divmod(int(position), GRID)
        # One pixel of the window frame stays visible.
        top, left, inner = row * cell + 1, column * cell + 1, cell - 1
        behind = background[top : top + inner, left : left + inner]
        pictures = np.stack(_pictures(mechanism, phases, rng, inner))
        blended = behind + (pictures[..., :3] - behind) * pictures[..., 3:]
        slots[:, top : top + inner, left : left + inner] = (blended + 0.5).astype(np.uint8)
    return slots


def write_clip(path: Path, slots: np.ndarray, fps: int) -> None:
    """Writes H.264 in an mp4, each picture for two frames: an intra frame and a copy of it.

    Args:
      path: the file to write.
      slots: (S, H, W, 3) uint8 RGB, H and W even.
      fps: frames per second.
    """
    with av.open(str(path), 'w', format='mp4') as container:
        stream = container.add_stream('libx264', rate=fps)
        stream.height, stream.width = slots.shape[1:3]
        stream.pix_fmt = 'yuv420p'
        stream.time_base = Fraction(1, fps)
        stream.codec_context.thread_count = 1
        stream.options = {'preset': 'ultrafast', 'qp': '26', 'g': str(HOLD), 'bf': '0'}
        reformatter = VideoReformatter()
        for slot, picture in enumerate(slots):
            frame = av.VideoFrame.from_ndarray(picture, format='rgb24')
            frame = reformatter.reformat(frame, format='yuv420p', threads=1)
            for k in range(HOLD):
                frame.pts = slot * HOLD + k
                container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def _is_complete(out_dir: Path, meta: dict) -> bool:
    """Whether the folder already holds this very set.

    Raises:
      ValueError: if the folder holds something else.
    """
    if not out_dir.exists() or (out_dir.is_dir() and not any(out_dir.iterdir())):
        return False
    advice = 'choose another folder or delete this one'
    try:
        found = json.loads((out_dir / 'meta.json').read_text(encoding='utf-8'))
    except (OSError, ValueError) as error:
        raise ValueError(f'{out_dir} is not empty and not a motion clips set; {advice}') from error
    if found != meta:
        fields = {k: (found.get(k), v) for k, v in meta.items() if found.get(k) != v}
        raise ValueError(f'{out_dir} holds another set, (found, wanted) = {fields}; {advice}')
    for split in SPLITS:
        count = sum(1 for _ in (out_dir / split).glob('*.mp4'))
        if count != meta[f'num_{split}']:
            raise ValueError(
                f'{out_dir}/{split} has {count} of {meta[f"num_{split}"]} clips; delete {out_dir} '
                'and generate it again'
            )
    return True


def generate(
    out_dir: str | os.PathLike,
    num_train: int = 1000,
    num_val: int = 200,
    size: int = 96,
    num_frames: int = 32,
    fps: int = 16,
    seed: int = 0,
    num_threads: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> bool:
    """Writes the data set, unless the folder already holds it.

    The folder appears whole or not at all: clips are written into a hidden folder beside it, which
    is then renamed. The same arguments give the same bytes on the same machine.

    Args:
      out_dir: folder to create; gets train/, val/, train.txt, val.txt ("path label" lines with
        paths relative to the folder), labels.txt and meta.json.
      num_train: training clips; classes are balanced to within one clip.
      num_val: validation clips.
      size: frame height and width in pixels, a multiple of 6.
      num_frames: frames per clip, a multiple of 2 and at least 8.
      fps: frames per second.
      seed: seed of all draws.
      num_threads: clips written at the same time.
      progress: called with (clips done, clips in all) after each clip.

    Returns:
      True if it wrote the set, False if the set was there.

    Raises:
      ValueError: if an argument is out of range or the folder holds something else.
    """
    if size % 6 or size < 48:
        raise ValueError(f'size={size} must be a multiple of 6 and at least 48 pixels')
    if num_frames % HOLD or num_frames < 8:
        raise ValueError(f'num_frames={num_frames} must be a multiple of {HOLD} and at least 8')
    if num_train < 1 or num_val < 1:
        raise ValueError(f'num_train={num_train} and num_val={num_val} must be at least 1')
    out_dir = Path(out_dir)
    meta = {
        'name': 'motion_clips',
        'format_version': FORMAT_VERSION,
        'num_train': num_train,
        'num_val': num_val,
        'size': size,
        'num_frames': num_frames,
        'fps': fps,
        'seed': seed,
        'class_names': list(CLASS_NAMES),
    }
    if _is_complete(out_dir, meta):
        return False
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    prefix = f'.{out_dir.name}.partial-'
    for stale in out_dir.parent.glob(f'{prefix}*'):  # left behind by a killed run
        if time.time() - stale.stat().st_mtime > 3600:
            shutil.rmtree(stale, ignore_errors=True)
    partial = Path(tempfile.mkdtemp(prefix=prefix, dir=out_dir.parent))
    try:
        _write_set(partial, meta, num_threads, progress)
        partial.chmod(0o755)
        if out_dir.exists() and not any(out_dir.iterdir()):
            out_dir.rmdir()
        try:
            partial.rename(out_dir)
        except OSError:  # another process finished first
            return not _is_complete(out_dir, meta)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return True


def _write_set(
    folder: Path, meta: dict, num_threads: int, progress: Callable[[int, int], None] | None
) -> None:
    clips = [(split, i) for split in SPLITS for i in range(meta[f'num_{split}'])]

    def write(clip: tuple[str, int]) -> str:
        split, index = clip
        # Balanced: every run of ten clips holds each class once.
        label = index % len(CLASS_NAMES)
        plan = plan_clip(meta['seed'], split, index, meta['num_frames'], label)
        name = f'{split}/{index:06d}.mp4'
        write_clip(folder / name, render_clip(plan, meta['size']), meta['fps'])
        return f'{name} {label}'

    for split in SPLITS:
        (folder / split).mkdir()
    lines = []
    with ThreadPoolExecutor(num_threads) as pool:
        for line in pool.map(write, clips):
            lines.append(line)
            if progress is not None:
                progress(len(lines), len(clips))
    for split in SPLITS:
        text = ''.join(f'{line}\n' for line in lines if line.startswith(f'{split}/'))
        (folder / f'{split}.txt').write_text(text, encoding='utf-8')
    (folder / 'labels.txt').write_text('\n'.join(CLASS_NAMES) + '\n', encoding='utf-8')
    (folder / 'meta.json').write_text(json.dumps(meta, indent=1) + '\n', encoding='utf-8')
