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

import os
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from input_pipeline import built_in, world

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
FORMAT_VERSION = 2  # raise when the pixels of a clip change: sets of another version are not reused


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
    rng = np.random.default_rng([seed, built_in.SPLITS.index(split), index])
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


def render_clip(
    plan: ClipPlan,
    size: int,
    draw: Callable[[np.random.Generator, int], np.ndarray] = world.draw_picture,
) -> np.ndarray:
    """Draws the frames of a clip.

    Args:
      plan: what to draw.
      size: height and width of the frames in pixels, as in the plan.
      draw: (rng, size) -> the picture that moves, (size, size, 3) uint8 RGB.

    Returns:
      (num_frames, size, size, 3) uint8 RGB.
    """
    picture = draw(np.random.default_rng(plan.appearance), size)
    return np.stack([np.roll(picture, (down, right), (0, 1)) for right, down in plan.shifts])


def write_clip(path: Path, frames: np.ndarray, fps: int, quantiser: int = 26) -> None:
    """Writes H.264 in an mp4: intra frames only, constant quantiser, one thread.

    Args:
      path: the file to write.
      frames: (T, H, W, 3) uint8 RGB, H and W even.
      fps: frames per second.
      quantiser: of H.264, 0 (best) to 51.
    """
    with av.open(str(path), 'w', format='mp4') as container:
        stream = container.add_stream('libx264', rate=fps)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = 'yuv420p'
        stream.time_base = Fraction(1, fps)
        stream.codec_context.thread_count = 1
        stream.options = {'preset': 'ultrafast', 'qp': str(quantiser), 'g': '1', 'bf': '0'}
        reformatter = VideoReformatter()
        for picture in frames:
            frame = av.VideoFrame.from_ndarray(picture, format='rgb24')
            frame = reformatter.reformat(frame, format='yuv420p', threads=1)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def check_shape(num_frames: int, size: int) -> None:
    """Raises ValueError, naming it, of a number of frames or a size that a clip cannot have."""
    world.check_size(size)
    if num_frames % 4 or num_frames < 8:
        raise ValueError(f'num_frames={num_frames} must be a multiple of 4 and at least 8')


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
    """Writes the data set, unless the folder already holds it.

    The same arguments give the same bytes on the same machine.

    Args:
      out_dir: folder to create, see `built_in.write_set`.
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
    check_shape(num_frames, size)
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

    def write_file(path: Path, split: str, index: int) -> None:
        label = built_in.class_of(index, CLASS_NAMES)
        plan = plan_clip(seed, split, index, num_frames, size, label)
        write_clip(path, render_clip(plan, size), fps)

    suffixes = dict.fromkeys(built_in.SPLITS, '.mp4')
    lists = built_in.class_lists(meta, '.mp4', CLASS_NAMES)
    return built_in.write_set(out_dir, meta, suffixes, write_file, lists, num_threads, progress)
