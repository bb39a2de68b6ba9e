"""Augmentation and test views on uint8 clips; one random draw per clip, the same for every frame.

A transform is a frozen dataclass with `__call__(video, label, rng) -> (video, label)`, where video
is (T, H, W, 3) uint8 RGB and label the class of the clip (one per head, or a set of classes).
Pipelines are plain tuples, see `apply`. Test views draw nothing and return (crops, T, H, W, 3); see
`ViewCrops`.

Pixels are OpenCV's, and Pillow's where a recipe smooths what it shrinks: `INTERPOLATION`.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import cv2
import numpy as np
from PIL import Image

from input_pipeline import resample

Label = int | tuple[int, ...] | frozenset[int]

# OpenCV would start threads of its own inside every reader thread.
cv2.setNumThreads(1)


class Transform(Protocol):
    """What `apply` runs."""

    def __call__(
        self, video: np.ndarray, label: Label, rng: np.random.Generator
    ) -> tuple[np.ndarray, Label]: ...


def apply(
    transforms: Sequence[Transform], video: np.ndarray, label: Label, rng: np.random.Generator
) -> tuple[np.ndarray, Label]:
    """Runs transforms one after another.

    Args:
      transforms: in order.
      video: (T, H, W, 3) uint8 RGB.
      label: class index, one per head, or a set of them.
      rng: source of all draws.

    Returns:
      The clip, (T, H', W', 3) uint8 C-contiguous, and its label.
    """
    for transform in transforms:
        video, label = transform(video, label, rng)
    return np.ascontiguousarray(video), label


@dataclass(frozen=True)
class Flip:
    """Mirrors the clip left to right, and swaps labels that name a side.

    Attributes:
      probability: of mirroring a clip.
      label_pairs: pairs of labels that become each other, for Something-Something "left to right".
    """

    probability: float = 0.5
    label_pairs: tuple[tuple[int, int], ...] = ()

    def __call__(
        self, video: np.ndarray, label: Label, rng: np.random.Generator
    ) -> tuple[np.ndarray, Label]:
        if rng.random() >= self.probability:
            return video, label
        mirrored = np.empty(video.shape, np.uint8)
        for frame, target in zip(video, mirrored):
            cv2.flip(frame, 1, dst=target)
        if isinstance(label, frozenset):
            return mirrored, frozenset(map(self._swapped, label))
        return mirrored, self._swapped(label)

    def _swapped(self, label: int | tuple[int, ...]) -> int | tuple[int, ...]:
        for a, b in self.label_pairs:
            if label in (a, b):
                return a + b - label
        return label


class Rounding(NamedTuple):
    """What becomes of a fraction of a pixel.

    Attributes:
      size: of the long side after resizing.
      corner: of the corner of a centre crop.
    """

    size: Callable[[float], int]
    corner: Callable[[float], int]


ROUNDING: dict[str, Rounding] = {
    'nearest': Rounding(round, round),  # DiST
    'down': Rounding(math.floor, math.floor),  # EVL
    'torchvision': Rounding(math.floor, round),  # Side4Video
    'mmcv': Rounding(lambda size: math.floor(size + 0.5), math.floor),  # STS
}


def _opencv(flag: int) -> Callable[[np.ndarray, int, int], np.ndarray]:
    def run(video: np.ndarray, height: int, width: int) -> np.ndarray:
        resized = np.empty((len(video), height, width, 3), np.uint8)
        for frame, target in zip(video, resized):
            cv2.resize(frame, (width, height), dst=target, interpolation=flag)
        return resized

    return run


def _each(
    resize: Callable[[np.ndarray, int, int], np.ndarray | Image.Image],
) -> Callable[[np.ndarray, int, int], np.ndarray]:
    def run(video: np.ndarray, height: int, width: int) -> np.ndarray:
        resized = np.empty((len(video), height, width, 3), np.uint8)
        for frame, target in zip(video, resized):
            target[:] = resize(frame, height, width)
        return resized

    return run


def _bilinear_by_pillow(frame: np.ndarray, height: int, width: int) -> Image.Image:
    picture = Image.fromarray(np.ascontiguousarray(frame))
    return picture.resize((width, height), Image.Resampling.BILINEAR)


# (T, H, W, 3) uint8, height, width -> resized. Without smoothing a shrunken picture has aliases;
# DiST, EVL and STS train on these. Side4Video resizes as Pillow, which smooths.
INTERPOLATION: dict[str, Callable[[np.ndarray, int, int], np.ndarray]] = {
    'bilinear': _opencv(cv2.INTER_LINEAR),
    'bicubic': _opencv(cv2.INTER_CUBIC),
    'smooth_bilinear': _each(_bilinear_by_pillow),
    'smooth_bicubic': _each(resample.resize),
}


def choose(name: str, value: str, table: Mapping[str, Any]) -> Any:
    """A row of a table.

    Raises:
      ValueError: naming the argument and what it may be.
    """
    if value not in table:
        raise ValueError(f'{name}={value!r} must be one of {tuple(table)}')
    return table[value]


def _resize(video: np.ndarray, height: int, width: int, interpolation: str) -> np.ndarray:
    if video.shape[1:3] == (height, width):
        return video
    return INTERPOLATION[interpolation](video, height, width)


@dataclass(frozen=True)
class Resize:
    """Resizes the whole frame; draws nothing.

    Attributes:
      size: (short side,), which keeps the shape of the frame, or (height, width), in pixels.
      interpolation: a key of `INTERPOLATION`.
      rounding: of the long side, a key of `ROUNDING`.

    Source: Side4Video (short side 256 on Kinetics, 256 x 320 on Something-Something) and STS (short
      side 256) resize before the random crop.
    """

    size: tuple[int, ...]
    interpolation: str = 'bilinear'
    rounding: str = 'nearest'

    def __post_init__(self):
        if len(self.size) not in (1, 2) or min(self.size) < 1:
            raise ValueError(f'size={self.size} must be (short side,) or (height, width)')
        choose('interpolation', self.interpolation, INTERPOLATION)
        choose('rounding', self.rounding, ROUNDING)

    def __call__(
        self, video: np.ndarray, label: Label, rng: np.random.Generator
    ) -> tuple[np.ndarray, Label]:
        return self.resize(video), label

    def resize(self, video: np.ndarray) -> np.ndarray:
        """Resizes (T, H, W, 3) uint8."""
        return _resize(video, *self.shape(*video.shape[1:3]), self.interpolation)

    def shape(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) in pixels after resizing a frame of that size."""
        if len(self.size) == 2:
            return self.size
        (short,), shorter, whole = self.size, min(height, width), ROUNDING[self.rounding].size
        height, width = (max(short, whole(side * short / shorter)) for side in (height, width))
        return height, width


@dataclass(frozen=True)
class RandomResizedCrop:
    """Cuts one random box out of all frames and resizes it to a square.

    Attributes:
      image_size: height and width of the result in pixels.
      area: smallest and largest share of the frame's area.
      aspect: smallest and largest width / height; drawn on a log scale.
      interpolation: a key of `INTERPOLATION`.
      swap: draw the aspect on a linear scale, and exchange width and height half of the time.

    Source: the crop of Szegedy et al. 2015 as in DiST's recipe: ten tries, then the largest centre
      box of an allowed aspect. Side4Video: `swap`.
    Differs: after ten tries Side4Video resizes the short side and cuts at random.
    """

    image_size: int
    area: tuple[float, float] = (0.4, 1.0)
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: str = 'bilinear'
    swap: bool = False

    def __post_init__(self):
        if len(self.area) != 2 or not 0 < self.area[0] <= self.area[1] <= 1:
            raise ValueError(f'area={self.area} must be two shares, 0 < smallest <= largest <= 1')
        if len(self.aspect) != 2 or not 0 < self.aspect[0] <= self.aspect[1]:
            raise ValueError(f'aspect={self.aspect} must be two ratios, 0 < smallest <= largest')
        choose('interpolation', self.interpolation, INTERPOLATION)

    def __call__(
        self, video: np.ndarray, label: Label, rng: np.random.Generator
    ) -> tuple[np.ndarray, Label]:
        return self.cut(video, self.draw_box(*video.shape[1:3], rng)), label

    def cut(self, video: np.ndarray, box: tuple[int, int, int, int]) -> np.ndarray:
        """Cuts a box of `draw_box` out of (T, H, W, 3) uint8 and resizes it."""
        top, left, height, width = box
        video = video[:, top : top + height, left : left + width]
        return _resize(video, self.image_size, self.image_size, self.interpolation)

    def cut_each(
        self, pictures: Iterable[tuple[int, np.ndarray]], rng: np.random.Generator
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Does to one picture after another what a call does to the clip of them.

        Args:
          pictures: (number, (H, W, 3) uint8 RGB), all of one size.
          rng: source of all draws.

        Yields:
          (number, (image_size, image_size, 3) uint8), which may be part of the picture.
        """
        box = None
        for number, picture in pictures:
            box = box or self.draw_box(*picture.shape[:2], rng)
            yield number, self.cut(picture[None], box)[0]

    def draw_box(
        self, height: int, width: int, rng: np.random.Generator
    ) -> tuple[int, int, int, int]:
        """Draws (top, left, height, width) in pixels, inside a frame of that size."""
        for _ in range(10):
            area = height * width * rng.uniform(*self.area)
            aspect = self._draw_aspect(rng)
            box_width, box_height = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
            if 0 < box_width <= width and 0 < box_height <= height:
                top = int(rng.integers(height - box_height + 1))
                left = int(rng.integers(width - box_width + 1))
                return top, left, box_height, box_width
        box_width = min(width, max(1, round(height * self.aspect[1])))
        box_height = min(height, max(1, round(width / self.aspect[0])))
        return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width

    def _draw_aspect(self, rng: np.random.Generator) -> float:
        if not self.swap:
            return np.exp(rng.uniform(*np.log(self.aspect)))
        aspect = rng.uniform(*self.aspect)
        return aspect if rng.random() < 0.5 else 1 / aspect


@dataclass(frozen=True)
class MultiScaleCrop:
    """Cuts a box of a few sizes at a few places out of all frames and resizes it to a square.

    Attributes:
      image_size: height and width of the result in pixels; a side that misses it by less than 3
        pixels is set to it.
      scales: sides of the box as shares of the frame's short side.
      distortion: steps in `scales` that height and width may be apart.
      interpolation: a key of `INTERPOLATION`.

    Source: TSN (Wang et al. 2016) with its thirteen fixed places: corners, centre, middles of the
      sides, and four between the centre and the corners.
    """

    image_size: int
    scales: tuple[float, ...] = (1.0, 0.875, 0.75, 0.66)
    distortion: int = 1
    interpolation: str = 'bilinear'

    def __post_init__(self):
        if not self.scales or not all(0 < scale <= 1 for scale in self.scales):
            raise ValueError(f'scales={self.scales} must be shares, above 0 and at most 1')
        choose('interpolation', self.interpolation, INTERPOLATION)

    def __call__(
        self, video: np.ndarray, label: Label, rng: np.random.Generator
    ) -> tuple[np.ndarray, Label]:
        boxes = self.boxes(*video.shape[1:3])
        top, left, height, width = boxes[rng.integers(len(boxes))]
        box = video[:, top : top + height, left : left + width]
        return _resize(box, self.image_size, self.image_size, self.interpolation), label

    def boxes(self, height: int, width: int) -> list[tuple[int, int, int, int]]:
        """All boxes (top, left, height, width) of a frame of that size, equally likely."""
        sides = [int(min(height, width) * scale) for scale in self.scales]
        sides = [self.image_size if abs(side - self.image_size) < 3 else side for side in sides]
        sides = [min(side, height, width) for side in sides]
        return [
            (down * ((height - tall) // 4), right * ((width - wide) // 4), tall, wide)
            for i, tall in enumerate(sides)
            for j, wide in enumerate(sides)
            if abs(i - j) <= self.distortion
            for down, right in _PLACES
        ]


# Quarters of the way from the top left to the bottom right corner.
_PLACES = (
    *((down, right) for down in (0, 2, 4) for right in (0, 2, 4)),
    *((down, right) for down in (1, 3) for right in (1, 3)),
)


@dataclass(frozen=True)
class CentreCrop:
    """Resizes and cuts the centre, as the test view does; draws nothing.

    Attributes:
      image_size, size, rounding, interpolation: as of `ViewCrops`.
    """

    image_size: int
    rounding: str = 'nearest'
    size: tuple[int, ...] = ()
    interpolation: str = 'bilinear'

    def __post_init__(self):
        self._view()  # checks its fields

    def _view(self) -> 'ViewCrops':
        return ViewCrops(
            self.image_size,
            size=self.size,
            rounding=self.rounding,
            interpolation=self.interpolation,
        )

    def __call__(
        self, video: np.ndarray, label: Label, rng: np.random.Generator
    ) -> tuple[np.ndarray, Label]:
        return self._view()(video)[0], label


@dataclass(frozen=True)
class Grayscale:
    """Turns a whole clip grey (ITU-R 601 luma in all three channels) with some probability."""

    probability: float = 0.2

    def __call__(
        self, video: np.ndarray, label: Label, rng: np.random.Generator
    ) -> tuple[np.ndarray, Label]:
        if rng.random() >= self.probability:
            return video, label
        return greyed(video), label


@dataclass(frozen=True)
class ColourJitter:
    """Changes brightness, contrast, saturation and hue of a whole clip, in a random order.

    Attributes:
      brightness, contrast, saturation: the factor is drawn from 1 - x to 1 + x.
      hue: the shift is drawn from -x to x, in turns of the colour circle, at most 0.5.
      probability: of changing a clip; DiST carries the strengths but uses 0.
    """

    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    probability: float = 0.0

    def __call__(
        self, video: np.ndarray, label: Label, rng: np.random.Generator
    ) -> tuple[np.ndarray, Label]:
        if rng.random() >= self.probability:
            return video, label
        spread = np.array([self.brightness, self.contrast, self.saturation])
        factors = rng.uniform(np.maximum(1 - spread, 0), 1 + spread)
        shift = rng.uniform(-self.hue, self.hue)
        for step in rng.permutation(4):
            if step == 0:  # brightness
                video = cv2.LUT(flat(video), _ramp(factors[0], 0)).reshape(video.shape)
            elif step == 1:  # contrast, about the mean luma of the clip
                mean = float(luma(video).mean())
                ramp = _ramp(factors[1], mean * (1 - factors[1]))
                video = cv2.LUT(flat(video), ramp).reshape(video.shape)
            elif step == 2:  # saturation
                grey = flat(greyed(video))
                mixed = cv2.addWeighted(flat(video), factors[2], grey, 1 - factors[2], 0)
                video = mixed.reshape(video.shape)
            else:  # hue; OpenCV counts 180 steps to a turn in uint8
                hsv = cv2.cvtColor(flat(video), cv2.COLOR_RGB2HSV)
                hsv[..., 0] = (hsv[..., 0].astype(np.int16) + round(shift * 180)) % 180
                video = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB).reshape(video.shape)
        return video, label


# What a box is filled with: (height, width, mean, std, rng) -> levels, broadcast over the box.
FILLS: dict[str, Callable[..., np.ndarray]] = {
    'const': lambda height, width, mean, std, rng: mean,
    'rand': lambda height, width, mean, std, rng: mean + std * rng.normal(size=3),
    'pixel': lambda height, width, mean, std, rng: mean + std * rng.normal(size=(height, width, 3)),
}


@dataclass(frozen=True)
class RandomErasing:
    """Fills one random box, the same in all frames.

    Attributes:
      probability: of changing a clip.
      mode: a key of `FILLS`: the mean, one normal colour, or normal noise that all frames share.
      area: smallest and largest share of the frame's area.
      aspect: smallest height / width; the largest is its inverse. Drawn on a log scale.
      mean, std: of the pixels, in grey levels: what the model takes for 0 and 1.

    Source: Zhong et al. 2020 in the form of timm: ten tries for a box inside the frame.
    Differs: timm fills after normalisation; here noise ends at black and white.
    """

    probability: float = 0.25
    mode: str = 'const'
    area: tuple[float, float] = (0.02, 1 / 3)
    aspect: float = 0.3
    mean: tuple[float, float, float] = (127.5, 127.5, 127.5)
    std: tuple[float, float, float] = (64.0, 64.0, 64.0)

    def __post_init__(self):
        choose('mode', self.mode, FILLS)

    def __call__(
        self, video: np.ndarray, label: Label, rng: np.random.Generator
    ) -> tuple[np.ndarray, Label]:
        if rng.random() >= self.probability:
            return video, label
        for _ in range(10):
            area = video.shape[1] * video.shape[2] * rng.uniform(*self.area)
            aspect = np.exp(rng.uniform(np.log(self.aspect), -np.log(self.aspect)))
            height, width = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
            if 0 < height < video.shape[1] and 0 < width < video.shape[2]:
                top = int(rng.integers(video.shape[1] - height + 1))
                left = int(rng.integers(video.shape[2] - width + 1))
                fill = FILLS[self.mode](height, width, np.array(self.mean), np.array(self.std), rng)
                box = np.empty((height, width, 3), np.uint8)
                box[:] = np.rint(np.clip(fill, 0, 255))
                erased = video.copy()
                erased[:, top : top + height, left : left + width] = box
                return erased, label
        return video, label


Corners = tuple[tuple[int, int], ...]


def _along(first: int, second: int, third: int, across: int, wide: bool) -> Corners:
    places = (first, second, third)
    return tuple((across, place) if wide else (place, across) for place in places)


def _ends(down: int, right: int, corner: Callable[[float], int]) -> Corners:
    wide = right >= down
    long, across = (right, down) if wide else (down, right)
    return _along(0, corner(long / 2), long, corner(across / 2), wide)


def _halves(down: int, right: int, corner: Callable[[float], int]) -> Corners:
    wide = right >= down
    long, across = (right, down) if wide else (down, right)
    return _along(0, 2 * (long // 2), long // 2, across // 2, wide)


def _quarters(down: int, right: int, corner: Callable[[float], int]) -> Corners:
    return _along(0, 4 * (right // 4), 2 * (right // 4), 2 * (down // 4), True)


# Three crops: (rows, columns left over by a crop, rounding of a corner) -> (top, left) of each.
LAYOUTS: dict[str, Callable[[int, int, Callable[[float], int]], Corners]] = {
    'ends': _ends,  # EVL: both ends of the long side with the centre between them
    'halves': _halves,  # STS: steps of half of what is left over; ends first, then the centre
    'quarters': _quarters,  # Side4Video: steps of a quarter, always from left to right; likewise
}


@dataclass(frozen=True)
class ViewCrops:
    """Test view: resizes, and cuts one crop from the centre, or three along a side.

    Attributes:
      image_size: height and width of the crops in pixels.
      num_crops: 1 (centre) or 3.
      size: of the frame before the crop: (short side,) or (height, width) in pixels; () means
        (image_size,).
      rounding: a key of `ROUNDING`, for the long side after resizing and for the corners.
      interpolation: a key of `INTERPOLATION`.
      layout: where three crops lie, a key of `LAYOUTS`.

    Source: the recipes of DiST (short side 224, centre crop, 'nearest'), EVL (one or three crops,
      'down'; agrees with the reference on every recorded size and corner), Side4Video and STS.
    """

    image_size: int
    num_crops: int = 1
    size: tuple[int, ...] = ()
    rounding: str = 'nearest'
    interpolation: str = 'bilinear'
    layout: str = 'ends'

    def __post_init__(self):
        if self.num_crops not in (1, 3):
            raise ValueError(f'num_crops={self.num_crops} must be 1 or 3')
        self._resize()  # checks its fields
        choose('layout', self.layout, LAYOUTS)
        if self.size and min(self.size) < self.image_size:
            raise ValueError(f'size={self.size} is smaller than image_size={self.image_size}')

    def _resize(self) -> Resize:
        return Resize(self.size or (self.image_size,), self.interpolation, self.rounding)

    def corners(self, height: int, width: int) -> tuple[tuple[int, int], Corners]:
        """Where the views of a frame of that size lie, in pixels.

        Returns:
          (height, width) after resizing, and the (top, left) corner of each crop in it.
        """
        height, width = self._resize().shape(height, width)
        down, right = height - self.image_size, width - self.image_size
        corner = ROUNDING[self.rounding].corner
        if self.num_crops == 1:
            return (height, width), ((corner(down / 2), corner(right / 2)),)
        return (height, width), LAYOUTS[self.layout](down, right, corner)

    def __call__(self, video: np.ndarray) -> np.ndarray:
        """Cuts the views.

        Args:
          video: (T, H, W, 3) uint8 RGB.

        Returns:
          (num_crops, T, image_size, image_size, 3) uint8.
        """
        _, corners = self.corners(*video.shape[1:3])
        video, size = self._resize().resize(video), self.image_size
        return np.stack([video[:, y : y + size, x : x + size] for y, x in corners])


def flat(video: np.ndarray) -> np.ndarray:
    """(T, H, W, 3) as one tall picture (T * H, W, 3), which is what OpenCV works on."""
    return np.ascontiguousarray(video).reshape(-1, *video.shape[2:])


def luma(video: np.ndarray) -> np.ndarray:
    """ITU-R 601 luma of (T, H, W, 3) uint8, (T, H, W) uint8."""
    return cv2.cvtColor(flat(video), cv2.COLOR_RGB2GRAY).reshape(video.shape[:3])


def greyed(video: np.ndarray) -> np.ndarray:
    """(T, H, W, 3) uint8 with its luma in all three channels."""
    grey = cv2.cvtColor(flat(video), cv2.COLOR_RGB2GRAY)
    return cv2.cvtColor(grey, cv2.COLOR_GRAY2RGB).reshape(video.shape)


def _ramp(factor: float, offset: float) -> np.ndarray:
    return np.clip(np.rint(np.arange(256) * factor + offset), 0, 255).astype(np.uint8)
