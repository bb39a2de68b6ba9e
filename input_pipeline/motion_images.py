"""The built-in still images: what the motion clips show, with classes of what is seen.

A picture is drawn like a frame of a clip (`world`: four textured objects over a plain ground,
shifted at random), but all its objects have the shape, the texture and the colour of its class:
'warm striped star'. Place, size, turn, ground and the exact tones are drawn.

What the colours of the pixels tell without their places: warm or cool, and little else, as each
texture has as much of one tone as of the other, and all shapes have the same area, which only the
drawn radius varies. Least squares over the default set, 24 classes, chance 4.2 %: the mean colour
gets 7.5 % of the validation pictures right, with its squares and products 8.5 %, a histogram of
48 bins 15.0 %. Knowing warm from cool, and nothing else, is 8.3 %.
"""

import itertools
import os
from pathlib import Path

import cv2
import numpy as np

from input_pipeline import built_in, world

SHAPES = ('polygon', 'star', 'cross', 'bar')
TEXTURES = ('halved', 'striped', 'checked')
COLOURS = ('warm', 'cool')
AREA = 1.4  # of an object in squares of its radius: the most that all shapes have room for
LOOKS = tuple(world.Look(*look, area=AREA) for look in itertools.product(SHAPES, TEXTURES, COLOURS))
CLASS_NAMES = tuple(f'{look.colour} {look.texture} {look.shape}' for look in LOOKS)
FORMAT_VERSION = 1  # raise when the pixels of a picture change, as for the clips
# Colours at full resolution: halved, they would be paler the finer a texture is.
JPEG = (
    *(cv2.IMWRITE_JPEG_QUALITY, 95),
    *(cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444),
)
_STREAM = 1  # other draws than those of the clip of the same number


def render_image(seed: int, split: str, index: int, size: int, label: int) -> np.ndarray:
    """Draws a picture.

    Args:
      seed: seed of the data set.
      split: 'train' or 'val'.
      index: number of the picture in its split.
      size: height and width of the picture in pixels.
      label: class, a place in `LOOKS`.

    Returns:
      (size, size, 3) uint8 RGB.
    """
    rng = np.random.default_rng([seed, built_in.SPLITS.index(split), index, _STREAM])
    shift = rng.integers(size, size=2)
    return np.roll(world.draw_picture(rng, size, LOOKS[label]), shift, (0, 1))


def write_image(path: Path, picture: np.ndarray) -> None:
    """Writes a picture (H, W, 3) uint8 RGB as JPEG."""
    coded = cv2.imencode('.jpg', cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), JPEG)[1]
    path.write_bytes(coded.tobytes())


def generate(
    out_dir: str | os.PathLike,
    num_train: int = 2400,
    num_val: int = 480,
    size: int = 48,
    seed: int = 0,
    num_threads: int = 2,
    progress: built_in.Progress | None = None,
) -> bool:
    """Writes the data set as JPEG files, unless the folder already holds it.

    The same arguments give the same bytes on the same machine.

    Args:
      out_dir: folder to create, see `built_in.write_set`.
      num_train: training pictures; classes are balanced to within one picture.
      num_val: validation pictures.
      size: height and width in pixels, a multiple of 8.
      seed: seed of all draws.
      num_threads: pictures written at the same time.
      progress: called with (pictures done, pictures in all) after each picture.

    Returns:
      True if it wrote the set, False if the set was there.

    Raises:
      ValueError: if an argument is out of range or the folder holds something else.
    """
    world.check_size(size)
    meta = {
        'name': 'motion_images',
        'format_version': FORMAT_VERSION,
        'num_train': num_train,
        'num_val': num_val,
        'size': size,
        'seed': seed,
        'class_names': list(CLASS_NAMES),
    }

    def write_file(path: Path, split: str, index: int) -> None:
        label = built_in.class_of(index, CLASS_NAMES)
        write_image(path, render_image(seed, split, index, size, label))

    suffixes = dict.fromkeys(built_in.SPLITS, '.jpg')
    lists = built_in.class_lists(meta, '.jpg', CLASS_NAMES)
    return built_in.write_set(out_dir, meta, suffixes, write_file, lists, num_threads, progress)
