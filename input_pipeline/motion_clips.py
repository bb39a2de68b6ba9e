"""The built-in data set: H.264 clips whose eight classes differ in the order of their frames only.

A clip shows four textured objects that move together over a plain ground; what leaves the frame at
one side comes back at the other. It has two acts of n frames each: the objects go once around the
frame to the right or to the left, and once around it down or up. A class says which way, and which
act comes first: 'moves right, then down', 'moves down, then right', and so on. A clip is drawn in
three steps:

    picture, start (x, y)      drawn without regard to the class, x and y uniform over the columns
                               and rows of the frame
    horizontal act, frame k    the picture shifted by (x +- k * size / n, y),  k = 0 .. n - 1
    vertical act, frame k      the picture shifted by (x, y +- k * size / n)

(modulo the size, the multiples of size / n rounded to pixels).

What is uninformative, exactly:

1. The unordered set of frames. An act is a whole turn, so that both directions visit the same n
   shifts, once each, and the next act begins at the start again. The 2 n frames are therefore the
   same pictures for all eight classes, whatever the draws. A classifier that ignores the order of
   the frames, such as one on the mean of their features, sees eight identical clips with eight
   labels: it is at chance, 1 / 8, whatever it computes and however it was trained.
2. The frames that evaluation samples. Segment sampling of n of 2 n frames takes the odd k of each
   act, and k -> n - k maps odd to odd (n is even): again the same pictures for all classes.
3. Every single frame, even with its time known. At any time the shift is the uniform start plus a
   constant modulo the size: uniform, whatever the class.
4. The files. Every frame is an intra frame coded at a constant quantiser, so the decoded picture
   is a function of the drawn one alone. (Predicted frames would be sharper or softer by the motion
   that leads to them.)

Not covered: in training each position is jittered inside its segment, so the sampled frames of one
clip differ at random between epochs. By 3 each of them alone says nothing, and what a classifier
makes of their combination without the order cannot help it in evaluation, by 2. Two frames whose
times are known do tell the class: that is the task.
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
    'moves right, then down',
    'moves down, then right',
    'moves right, then up',
    'moves up, then right',
    'moves left, then down',
    'moves down, then left',
    'moves left, then up',
    'moves up, then left',
)
NUM_OBJECTS = 4
FORMAT_VERSION = 2  # raise when the pixels of a clip change: sets of another version are not reused
SPLITS = ('train', 'val')


@dataclass(frozen=True)
class ClipPlan:
    """Everything that decides the pixels of one clip.

    Attributes:
      label: class, 0 to 7: 4 * leftwards + 2 * upwards + whether the vertical act comes first.
      shifts: (num_frames, 2) int64, right and down, in pixels modulo the size of the frame.
      appearance: seed of shapes, textures, colours and places.
    """

    label: int
    shifts: np.ndarray
    appearance: int


def plan_clip(
    seed: int, split: str, index: int, num_frames: int, size: int, label: int
) -> ClipPlan:
    """Draws a clip; the draws are the same for every label, only the order of shifts differs.

    Args:
      seed: seed of the data set.
      split: 'train' or 'val'.
      index: number of the clip in its split.
      num_frames: frames in the clip, a multiple of 4.
      size: height and width of the frames in pixels.
      label: class, 0 to 7.

    Returns:
      The plan of the clip.
    """
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    start = rng.integers(size, size=2)
    appearance = int(rng.integers(2**31))

    turn = num_frames // 2
    acts = np.zeros((2, turn, 2), np.int64)
    for axis, backwards in enumerate((label & 4, label & 2)):
        steps = np.arange(turn)
        # Rounded after the sign is taken off, so that both directions visit the same pixels.
        steps = -steps % turn if backwards else steps
        acts[axis, :, axis] = np.rint(steps * size / turn).astype(np.int64)
    ordered = acts[::-1] if label & 1 else acts
    return ClipPlan(label, (start + ordered.reshape(num_frames, 2)) % size, appearance)


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


def _picture(rng: np.random.Generator, size: int) -> np.ndarray:
    """Objects on a plain ground, (size, size, 3) uint8; opposite sides of the picture join."""
    picture = np.empty((size, size, 3), np.float32)
    picture[:] = rng.uniform(50, 130, 3)
    box = size // 2
    for k in range(NUM_OBJECTS):  # one in each quarter, off its centre
        radius = 0.2 * size * rng.uniform(0.9, 1.2)
        layer = np.zeros((size, size, 4), np.float32)
        layer[:box, :box] = _sprite(rng, box, radius)
        corner = np.array(divmod(k, 2)) * box + rng.uniform(-0.08, 0.08, 2) * size
        layer = np.roll(layer, np.rint(corner).astype(int), (0, 1))
        picture += (layer[..., :3] - picture) * layer[..., 3:]
    return (picture + 0.5).astype(np.uint8)


def render_clip(plan: ClipPlan, size: int) -> np.ndarray:
    """Draws the frames of a clip.

    Args:
      plan: what to draw.
      size: height and width of the frames in pixels, as in the plan.

    Returns:
      (num_frames, size, size, 3) uint8 RGB.
    """
    picture = _picture(np.random.default_rng(plan.appearance), size)
    return np.stack([np.roll(picture, (down, right), (0, 1)) for right, down in plan.shifts])


def write_clip(path: Path, frames: np.ndarray, fps: int) -> None:
    """Writes H.264 in an mp4: intra frames only, constant quantiser, one thread.

    Args:
      path: the file to write.
      frames: (T, H, W, 3) uint8 RGB, H and W even.
      fps: frames per second.
    """
    with av.open(str(path), 'w', format='mp4') as container:
        stream = container.add_stream('libx264', rate=fps)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = 'yuv420p'
        stream.time_base = Fraction(1, fps)
        stream.codec_context.thread_count = 1
        stream.options = {'preset': 'ultrafast', 'qp': '26', 'g': '1', 'bf': '0'}
        reformatter = VideoReformatter()
        for picture in frames:
            frame = av.VideoFrame.from_ndarray(picture, format='rgb24')
            frame = reformatter.reformat(frame, format='yuv420p', threads=1)
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
    size: int = 48,
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
      size: frame height and width in pixels, a multiple of 8.
      num_frames: frames per clip, a multiple of 4 and at least 8.
      fps: frames per second.
      seed: seed of all draws.
      num_threads: clips written at the same time.
      progress: called with (clips done, clips in all) after each clip.

    Returns:
      True if it wrote the set, False if the set was there.

    Raises:
      ValueError: if an argument is out of range or the folder holds something else.
    """
    if size % 8 or size < 32:
        raise ValueError(f'size={size} must be a multiple of 8 and at least 32 pixels')
    if num_frames % 4 or num_frames < 8:
        raise ValueError(f'num_frames={num_frames} must be a multiple of 4 and at least 8')
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
        # Balanced: every run of eight clips holds each class once.
        label = index % len(CLASS_NAMES)
        plan = plan_clip(meta['seed'], split, index, meta['num_frames'], meta['size'], label)
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
