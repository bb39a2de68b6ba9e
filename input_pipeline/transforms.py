"""Augmentation and test views on uint8 clips; one random draw per clip, the same for every frame.

A transform is a frozen dataclass with `__call__(video, label, rng) -> (video, label)`, where video
is (T, H, W, 3) uint8 RGB and label the class of the clip (or one per head). Pipelines are plain
tuples, see `apply`. Test views draw nothing and return (crops, T, H, W, 3); see `ShortSideCrops`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import cv2
import numpy as np

Label = int | tuple[int, ...]

# What becomes of a fraction of a pixel in the test views. DiST: 'nearest'; EVL: 'down'.
ROUNDING: dict[str, Callable[[float], int]] = {'nearest': round, 'down': math.floor}

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
      label: class index, or one per head.
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
        for a, b in self.label_pairs:
            if label in (a, b):
                return mirrored, a + b - label
        return mirrored, label


@dataclass(frozen=True)
class RandomResizedCrop:
    """Cuts one random box out of all frames and resizes it to a square, bilinear.

    Attributes:
      image_size: height and width of the result in pixels.
      area: smallest and largest share of the frame's area.
      aspect: smallest and largest width / height; drawn on a log scale.

    Source: the crop of Szegedy et al. 2015 as in DiST's recipe: ten tries, then the largest centre
      box of an allowed aspect.
    """

    image_size: int
    area: tuple[float, float] = (0.4, 1.0)
    aspect: tuple[float, float] = (3 / 4, 4 / 3)

    def __call__(
        self, video: np.ndarray, label: Label, rng: np.random.Generator
    ) -> tuple[np.ndarray, Label]:
        top, left, height, width = self.draw_box(*video.shape[1:3], rng)
        box = video[:, top : top + height, left : left + width]
        return _resize(box, self.image_size, self.image_size), label

    def draw_box(
        self, height: int, width: int, rng: np.random.Generator
    ) -> tuple[int, int, int, int]:
        """Draws (top, left, height, width) in pixels, inside a frame of that size."""
        for _ in range(10):
            area = height * width * rng.uniform(*self.area)
            aspect = np.exp(rng.uniform(*np.log(self.aspect)))
            box_width, box_height = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
            if 0 < box_width <= width and 0 < box_height <= height:
                top = int(rng.integers(height - box_height + 1))
                left = int(rng.integers(width - box_width + 1))
                return top, left, box_height, box_width
        box_width = min(width, max(1, round(height * self.aspect[1])))
        box_height = min(height, max(1, round(width / self.aspect[0])))
        return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


@dataclass(frozen=True)
class CentreCrop:
    """Resizes the short side and cuts the centre, as the test view does; draws nothing.

    Attributes:
      image_size: height and width of the result in pixels.
      rounding: as of the test view.
    """

    image_size: int
    rounding: str = 'nearest'

    def __post_init__(self):
        ShortSideCrops(self.image_size, rounding=self.rounding)  # checks its fields

    def __call__(
        self, video: np.ndarray, label: Label, rng: np.random.Generator
    ) -> tuple[np.ndarray, Label]:
        return ShortSideCrops(self.image_size, rounding=self.rounding)(video)[0], label


@dataclass(frozen=True)
class Grayscale:
    """Turns a whole clip grey (ITU-R 601 luma in all three channels) with some probability."""

    probability: float = 0.2

    def __call__(
        self, video: np.ndarray, label: Label, rng: np.random.Generator
    ) -> tuple[np.ndarray, Label]:
        if rng.random() >= self.probability:
            return video, label
        return np.repeat(luma(video)[..., None], 3, -1), label


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
                grey = np.repeat(luma(video)[..., None], 3, -1)
                mixed = cv2.addWeighted(flat(video), factors[2], flat(grey), 1 - factors[2], 0)
                video = mixed.reshape(video.shape)
            else:  # hue; OpenCV counts 180 steps to a turn in uint8
                hsv = cv2.cvtColor(flat(video), cv2.COLOR_RGB2HSV)
                hsv[..., 0] = (hsv[..., 0].astype(np.int16) + round(shift * 180)) % 180
                video = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB).reshape(video.shape)
        return video, label


@dataclass(frozen=True)
class ShortSideCrops:
    """Test view: resizes the short side and cuts one centre crop, or three along the long side.

    Attributes:
      image_size: height and width of the crops in pixels.
      num_crops: 1 (centre) or 3 (both ends and centre, in order along the long side).
      short_side: short side after resizing in pixels; None means `image_size`.
      rounding: a key of `ROUNDING`, for the long side after resizing and for the corners.

    Source: the recipes of DiST (short side 224, centre crop, 'nearest') and of EVL (one or three
      crops, 'down'; agrees with the reference on every recorded size and corner).
    """

    image_size: int
    num_crops: int = 1
    short_side: int | None = None
    rounding: str = 'nearest'

    def __post_init__(self):
        if self.num_crops not in (1, 3):
            raise ValueError(f'num_crops={self.num_crops} must be 1 or 3')
        if self.short_side is not None and self.short_side < self.image_size:
            raise ValueError(
                f'short_side={self.short_side} is smaller than image_size={self.image_size}'
            )
        if self.rounding not in ROUNDING:
            raise ValueError(f'rounding={self.rounding!r} must be one of {tuple(ROUNDING)}')

    def layout(
        self, height: int, width: int
    ) -> tuple[tuple[int, int], tuple[tuple[int, int], ...]]:
        """Where the views of a frame of that size lie, in pixels.

        Returns:
          (height, width) after resizing, and the (top, left) corner of each crop in it.
        """
        whole = ROUNDING[self.rounding]
        short, shorter = self.short_side or self.image_size, min(height, width)
        height, width = (max(short, whole(side * short / shorter)) for side in (height, width))
        size = self.image_size
        top, left = whole((height - size) / 2), whole((width - size) / 2)
        if self.num_crops == 1:
            return (height, width), ((top, left),)
        if width >= height:
            return (height, width), ((top, 0), (top, left), (top, width - size))
        return (height, width), ((0, left), (top, left), (height - size, left))

    def __call__(self, video: np.ndarray) -> np.ndarray:
        """Cuts the views.

        Args:
          video: (T, H, W, 3) uint8 RGB.

        Returns:
          (num_crops, T, image_size, image_size, 3) uint8.
        """
        resized, corners = self.layout(*video.shape[1:3])
        video, size = _resize(video, *resized), self.image_size
        return np.stack([video[:, y : y + size, x : x + size] for y, x in corners])


def flat(video: np.ndarray) -> np.ndarray:
    """(T, H, W, 3) as one tall picture (T * H, W, 3), which is what OpenCV works on."""
    return np.ascontiguousarray(video).reshape(-1, *video.shape[2:])


def luma(video: np.ndarray) -> np.ndarray:
    """ITU-R 601 luma of (T, H, W, 3) uint8, (T, H, W) uint8."""
    return cv2.cvtColor(flat(video), cv2.COLOR_RGB2GRAY).reshape(video.shape[:3])


def _ramp(factor: float, offset: float) -> np.ndarray:
    return np.clip(np.rint(np.arange(256) * factor + offset), 0, 255).astype(np.uint8)


def _resize(video: np.ndarray, height: int, width: int) -> np.ndarray:
    if video.shape[1:3] == (height, width):
        return video
    resized = np.empty((len(video), height, width, 3), np.uint8)
    for frame, target in zip(video, resized):
        cv2.resize(frame, (width, height), dst=target, interpolation=cv2.INTER_LINEAR)
    return resized
