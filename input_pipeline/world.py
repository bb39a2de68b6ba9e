"""What the built-in data sets show: four textured objects, or a single one, over a plain ground.

Opposite sides of a picture join, so that it may be shifted by any number of pixels: what leaves it
at one side comes back at the other.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np

NUM_OBJECTS = 4
MAX_SIZE = 4096  # pixels; beyond, a slip that would fill the memory


@dataclass(frozen=True)
class Look:
    """What the objects of a picture have in common; all else about them is drawn.

    Attributes:
      shape: a key of `SHAPES`.
      texture: a key of `TEXTURES`.
      colour: a key of `COLOURS`.
      area: of each object in squares of its radius; 0 for what its shape has.
      shade: the darker of its two tones, a share of the brighter one; 0 for one that is drawn.
    """

    shape: str = 'polygon'
    texture: str = 'halved'
    colour: str = 'any'
    area: float = 0.0
    shade: float = 0.0


def check_size(size: int) -> None:
    """Refuses sizes of a picture, in pixels, in which objects cannot be told or files not coded.

    Raises:
      ValueError: naming the size.
    """
    if size % 8 or not 32 <= size <= MAX_SIZE:
        raise ValueError(f'size={size} must be a multiple of 8, and 32 to {MAX_SIZE} pixels')


def draw_picture(rng: np.random.Generator, size: int, look: Look = Look()) -> np.ndarray:
    """Draws objects on a plain ground.

    Args:
      rng: source of ground, places, sizes and whatever the look leaves open.
      size: height and width of the picture in pixels, see `check_size`.
      look: what the objects have in common.

    Returns:
      (size, size, 3) uint8 RGB.
    """
    picture = _ground(rng, size)
    box = size // 2
    for k in range(NUM_OBJECTS):  # one in each quarter, off its centre
        radius = 0.2 * size * rng.uniform(0.9, 1.2)
        sprite = draw_sprite(rng, box, radius, look)
        corner = np.array(divmod(k, 2)) * box + rng.uniform(-0.08, 0.08, 2) * size
        _lay(sprite, picture, corner)
    return (picture + 0.5).astype(np.uint8)


def draw_object(rng: np.random.Generator, size: int, look: Look) -> np.ndarray:
    """Draws one object in the middle of a plain ground; arguments as of `draw_picture`.

    Returns:
      (size, size, 3) uint8 RGB.
    """
    picture = _ground(rng, size)
    box = 5 * size // 8
    radius = 0.25 * size * rng.uniform(0.9, 1.2)
    _lay(draw_sprite(rng, box, radius, look), picture, np.full(2, (size - box) / 2))
    return (picture + 0.5).astype(np.uint8)


def _ground(rng: np.random.Generator, size: int) -> np.ndarray:
    picture = np.empty((size, size, 3), np.float32)
    picture[:] = rng.uniform(50, 130, 3)
    return picture


def _lay(sprite: np.ndarray, picture: np.ndarray, corner: np.ndarray) -> None:
    """Lays an object on a picture, its upper left corner at (row, column), rounded to pixels."""
    box, size = len(sprite), len(picture)
    layer = np.zeros((size, size, 4), np.float32)
    layer[:box, :box] = sprite
    blend(picture, np.roll(layer, np.rint(corner).astype(int), (0, 1)))


def blend(picture: np.ndarray, layer: np.ndarray) -> None:
    """Puts a layer (H, W, 4), RGB and alpha 0 to 1, on a picture (H, W, 3); both float32."""
    picture += (layer[..., :3] - picture) * layer[..., 3:]


def draw_sprite(rng: np.random.Generator, size: int, radius: float, look: Look) -> np.ndarray:
    """An object in two tones, without rotational symmetry, in the middle of nothing.

    Args:
      rng: source of whatever the look leaves open.
      size: height and width of the result in pixels.
      radius: of the object in pixels.
      look: of the object.

    Returns:
      (size, size, 4) float32 RGBA, alpha 0 to 1.
    """
    points = SHAPES[look.shape](rng, radius)
    if look.area:
        points *= radius * np.sqrt(look.area / cv2.contourArea(points.astype(np.float32)))
    points += size / 2
    # cv2 draws at 1/16 pixel; the mask is anti-aliased by drawing it four times as large.
    mask = np.zeros((4 * size, 4 * size), np.uint8)
    cv2.fillPoly(mask, [np.round(points * 64).astype(np.int32)], 255, cv2.LINE_AA, 4)
    alpha = cv2.resize(mask, (size, size), interpolation=cv2.INTER_AREA).astype(np.float32) / 255

    bright = COLOURS[look.colour](rng)
    dark = rng.uniform(0, 80, 3)
    if look.shade:
        dark = look.shade * bright
    turn = rng.uniform(0, 2 * np.pi)
    rows, columns = np.mgrid[:size, :size] - (size - 1) / 2
    along = columns * np.cos(turn) + rows * np.sin(turn)
    across = rows * np.cos(turn) - columns * np.sin(turn)
    blend = np.clip(TEXTURES[look.texture](along, across, size / 3) / 2 + 0.5, 0, 1)[..., None]
    colour = bright * blend + dark * (1 - blend) + 40 * _noise(rng, size, 6)
    return np.dstack([np.clip(colour, 0, 255), alpha]).astype(np.float32)


def _noise(rng: np.random.Generator, size: int, coarse: int) -> np.ndarray:
    """Smooth coloured noise (size, size, 3) float32, roughly -1 to 1."""
    noise = rng.uniform(-1, 1, (coarse, coarse, 3)).astype(np.float32)
    return cv2.resize(noise, (size, size), interpolation=cv2.INTER_CUBIC)


def _polygon(rng: np.random.Generator, radius: float) -> np.ndarray:
    corners = int(rng.integers(5, 9))
    angles = (np.arange(corners) + rng.uniform(-0.25, 0.25, corners)) * 2 * np.pi / corners
    radii = radius * rng.uniform(0.7, 1.0, corners)
    radii[rng.integers(corners)] = radius
    return radii[:, None] * _directions(angles)


def _star(rng: np.random.Generator, radius: float) -> np.ndarray:
    corners = 2 * int(rng.integers(5, 8))
    angles = np.arange(corners) * 2 * np.pi / corners + rng.uniform(0, 2 * np.pi)
    radii = radius * rng.uniform(0.9, 1.0, corners)
    radii[::2] *= 0.5
    return radii[:, None] * _directions(angles)


def _cross(rng: np.random.Generator, radius: float) -> np.ndarray:
    arm = rng.uniform(0.25, 0.33)
    quarter = radius * np.array([[1, -arm], [1, arm], [arm, arm]])
    turns = rng.uniform(0, 2 * np.pi) + np.arange(4) * np.pi / 2
    return np.concatenate([quarter @ _rotation(turn) for turn in turns])


def _bar(
    rng: np.random.Generator, radius: float, half_width: tuple[float, float] = (0.4, 0.5)
) -> np.ndarray:
    half = rng.uniform(*half_width)
    points = radius * np.array([[-1, -half], [1, -half], [1, half], [-1, half]])
    return points @ _rotation(rng.uniform(0, 2 * np.pi))


def _disc(rng: np.random.Generator, radius: float) -> np.ndarray:
    del rng  # all discs are alike
    return radius * _directions(np.arange(32) * np.pi / 16)


def _ring(rng: np.random.Generator, radius: float) -> np.ndarray:
    outline = _directions(np.linspace(0, 2 * np.pi, 33))  # around, inwards, and back
    return radius * np.concatenate([outline, rng.uniform(0.6, 0.65) * outline[::-1]])


def _thin_star(rng: np.random.Generator, radius: float) -> np.ndarray:
    angles = np.arange(8) * np.pi / 4 + rng.uniform(0, 2 * np.pi)
    return radius * np.where(np.arange(8) % 2, 0.28, 1.0)[:, None] * _directions(angles)


def _cluster(rng: np.random.Generator, radius: float) -> np.ndarray:
    """Three spots, from one to the next through the middle."""
    spot = 0.33 * radius * _directions(np.linspace(0, 2 * np.pi, 17))
    places = 0.67 * radius * _directions(np.arange(3) * 2 * np.pi / 3 + rng.uniform(0, 2 * np.pi))
    return np.concatenate([np.concatenate([np.zeros((1, 2)), place + spot]) for place in places])


def _directions(angles: np.ndarray) -> np.ndarray:
    return np.stack([np.cos(angles), np.sin(angles)], 1)


def _rotation(turn: float) -> np.ndarray:
    return _directions(np.array([turn, turn + np.pi / 2]))


# Corners in order around the centre, (corners, 2) float64 pixels, within a radius in pixels.
SHAPES: dict[str, Callable[[np.random.Generator, float], np.ndarray]] = {
    'polygon': _polygon,
    'star': _star,
    'cross': _cross,
    'bar': _bar,
    'disc': _disc,
    'ring': _ring,
    'spark': _thin_star,
    'needle': functools.partial(_bar, half_width=(0.16, 0.2)),
    'cluster': _cluster,
}


def _wave(place: np.ndarray, period: float) -> np.ndarray:
    # As tall as makes the pixels between the tones as few as those of the one border of 'halved'.
    return 3 * np.sin(place * 2 * np.pi / period)


# How far on the bright side of a border between the tones, in pixels near it, places are that lie
# so many pixels along and across a direction; and a period in pixels. One half of the plane is
# bright, whatever the texture.
TEXTURES: dict[str, Callable[[np.ndarray, np.ndarray, float], np.ndarray]] = {
    'halved': lambda along, across, period: along,
    'striped': lambda along, across, period: _wave(along, period),
    'checked': lambda along, across, period: _wave(along, period) * _wave(across, period),
}


def _any(rng: np.random.Generator) -> np.ndarray:
    bright = rng.uniform(60, 255, 3)
    bright[rng.integers(3)] = 255
    return bright


# The brighter of the two tones, (3,) float64 RGB.
COLOURS: dict[str, Callable[[np.random.Generator], np.ndarray]] = {
    'any': _any,
    'warm': lambda rng: rng.uniform((255, 60, 60), (255, 255, 130)),
    'cool': lambda rng: rng.uniform((60, 60, 255), (130, 255, 255)),
    # By their names, all apart from each other whatever is drawn.
    'red': lambda rng: rng.uniform((225, 10, 10), (255, 50, 50)),
    'green': lambda rng: rng.uniform((20, 190, 20), (60, 230, 60)),
    'blue': lambda rng: rng.uniform((20, 60, 235), (60, 100, 255)),
    'yellow': lambda rng: rng.uniform((235, 215, 10), (255, 245, 50)),
    'purple': lambda rng: rng.uniform((160, 30, 200), (190, 60, 240)),
    'white': lambda rng: rng.uniform(235, 255, 3),
}
