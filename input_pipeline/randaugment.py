"""RandAugment: a few random operations on a whole clip, from a policy string.

A policy is written as timm writes it, 'rand-m7-n4-mstd0.5-inc1'; see `parse`. Arithmetic follows
Pillow, on which the published recipes run: tables and blends are cut to integers as there.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np

from input_pipeline.transforms import Label, flat, luma

FILL = 128  # what comes in from outside the frame, in all three channels
MAX_LEVEL = 10.0

_LEVELS = np.arange(256)


class Op(NamedTuple):
    """One operation.

    Attributes:
      run: (video (T, H, W, 3) uint8, argument) -> video; statistics are those of each frame.
      argument: (level in [0, 10], sign -1 or 1, increasing) -> the argument of `run`.
    """

    run: Callable[[np.ndarray, float], np.ndarray]
    argument: Callable[[float, int, bool], float] = lambda level, sign, increasing: 0.0


@dataclass(frozen=True)
class RandAugment:
    """Draws operations with replacement, once for all frames of a clip.

    Attributes:
      magnitude: mean level, 0 to 10.
      num_ops: operations drawn for a clip.
      magnitude_std: standard deviation of the level, which is cut to 0 to 10; drawn per operation.
      increasing: whether a higher level always means a stronger change; otherwise Posterize and
        Solarize weaken with the level and the four enhancements run from 0.1 to 1.9.
      probability: of each drawn operation to be carried out.

    Source: Cubuk et al. 2020 with the fifteen operations and ranges of timm; EVL's recipe is
      'rand-m7-n4-mstd0.5-inc1'.
    Differs: geometric operations use OpenCV's cubic kernel (a = -0.75, rounded) where Pillow has
      a = -1, cut: 0.5 grey levels on average and at most 4 on smooth pictures, more on noise. What
      is filled is the same.
    """

    magnitude: float = 10.0
    num_ops: int = 2
    magnitude_std: float = 0.0
    increasing: bool = False
    probability: float = 0.5

    def __call__(
        self, video: np.ndarray, label: Label, rng: np.random.Generator
    ) -> tuple[np.ndarray, Label]:
        for name, argument in self.draw(rng):
            video = OPS[name].run(video, argument)
        return video, label

    def draw(self, rng: np.random.Generator) -> list[tuple[str, float]]:
        """The operations of one clip, names in `OPS` with their arguments, in order."""
        names = rng.choice(list(OPS), self.num_ops)
        fires = rng.random(self.num_ops) < self.probability
        levels = rng.normal(self.magnitude, self.magnitude_std, self.num_ops)
        signs = rng.choice((-1, 1), self.num_ops)
        return [
            (str(name), OPS[name].argument(float(level), int(sign), self.increasing))
            for name, fire, level, sign in zip(names, fires, levels.clip(0, MAX_LEVEL), signs)
            if fire
        ]


class _Part(NamedTuple):
    field: str
    kind: type
    low: float
    high: float
    text: str


_PARTS = {
    'm': _Part('magnitude', float, 0, MAX_LEVEL, 'm0 to m10 (magnitude)'),
    'n': _Part('num_ops', int, 1, 100, 'n1 to n100 (operations of a clip)'),
    'mstd': _Part('magnitude_std', float, 0, MAX_LEVEL, 'mstd0 to mstd10 (spread of magnitude)'),
    'inc': _Part('increasing', int, 0, 1, 'inc0 or inc1 (increasing set)'),
    'p': _Part('probability', float, 0, 1, 'p0 to p1 (share of operations carried out)'),
}
_NUMBERS = {int: r'\d+', float: r'\d+(\.\d+)?'}


def parse(policy: str) -> RandAugment:
    """Reads a policy string such as 'rand-m7-n4-mstd0.5-inc1'.

    Args:
      policy: 'rand', then parts in any order, joined by '-': m (magnitude, 10 if left out), n
        (operations, 2), mstd (standard deviation of the magnitude, 0), inc (1 for the increasing
        set, 0), p (probability of an operation, 0.5).

    Raises:
      ValueError: naming the part that is not understood, and what is allowed.

    Differs: timm ignores parts that it does not know and reads 'inc0' as 'inc1'; mmax and policies
      of other kinds are not offered.
    """
    kind, *parts = policy.split('-')
    allowed = '; '.join(part.text for part in _PARTS.values())
    if kind != 'rand':
        raise ValueError(
            f"rand_augment={policy!r} starts with {kind!r}, expected 'rand' and then parts joined "
            f"by '-': {allowed}"
        )
    fields: dict[str, float] = {}
    for text in parts:
        key, number = re.fullmatch(r'([a-z]*)(.*)', text, re.DOTALL).groups()
        part = _PARTS.get(key)
        if (
            part is None
            or not re.fullmatch(_NUMBERS[part.kind], number, re.ASCII)
            or not part.low <= part.kind(number) <= part.high
        ):
            raise ValueError(f'rand_augment={policy!r}: part {text!r} is none of {allowed}')
        if part.field in fields:
            raise ValueError(f'rand_augment={policy!r}: part {text!r} gives {key} a second time')
        fields[part.field] = part.kind(number)
    increasing = bool(fields.pop('increasing', False))
    return RandAugment(**fields, increasing=increasing)


def _look_up(video: np.ndarray, tables: np.ndarray) -> np.ndarray:
    """Maps levels: tables (256,) for all, (T, 256) per frame or (T, 256, 3) per channel too."""
    if tables.ndim == 1:
        return cv2.LUT(flat(video), tables).reshape(video.shape)
    changed = np.empty(video.shape, np.uint8)
    for frame, table, target in zip(video, tables, changed):
        cv2.LUT(np.ascontiguousarray(frame), table.reshape(256, 1, -1), dst=target)
    return changed


def _histograms(video: np.ndarray) -> np.ndarray:
    """Pixels of each level, (T, 256, 3) int64."""
    counts = [
        [cv2.calcHist([frame], [c], None, [256], [0, 256]).ravel() for c in range(3)]
        for frame in np.ascontiguousarray(video)
    ]
    return np.array(counts).astype(np.int64).swapaxes(1, 2)


def _auto_contrast(video: np.ndarray, unused: float) -> np.ndarray:
    """Stretches each channel of each frame to 0 to 255."""
    seen = _histograms(video) > 0
    low = seen.argmax(1)[:, None]
    high = 255 - seen[:, ::-1].argmax(1)[:, None]
    scale = 255.0 / np.maximum(high - low, 1)
    tables = np.trunc(_LEVELS[:, None] * scale - low * scale).clip(0, 255)
    return _look_up(video, np.where(high > low, tables, _LEVELS[:, None]).astype(np.uint8))


def _equalize(video: np.ndarray, unused: float) -> np.ndarray:
    """Spreads the levels of each channel of each frame evenly."""
    counts = _histograms(video)
    last = 255 - (counts > 0)[:, ::-1].argmax(1)[:, None]
    step = (counts.sum(1)[:, None] - np.take_along_axis(counts, last, 1)) // 255
    below = counts.cumsum(1) - counts
    tables = ((step // 2 + below) // np.maximum(step, 1)).clip(0, 255)
    return _look_up(video, np.where(step > 0, tables, _LEVELS[:, None]).astype(np.uint8))


def _invert(video: np.ndarray, unused: float) -> np.ndarray:
    return cv2.bitwise_not(flat(video)).reshape(video.shape)


def _posterize(video: np.ndarray, bits: float) -> np.ndarray:
    """Keeps the highest bits of each level."""
    return _look_up(video, (_LEVELS & (256 - 2 ** (8 - int(bits)))).astype(np.uint8))


def _solarize(video: np.ndarray, threshold: float) -> np.ndarray:
    """Inverts levels from the threshold on."""
    return _look_up(video, np.where(threshold > _LEVELS, _LEVELS, 255 - _LEVELS).astype(np.uint8))


def _solarize_add(video: np.ndarray, amount: float) -> np.ndarray:
    """Lifts levels below 128."""
    table = np.where(_LEVELS < 128, np.minimum(_LEVELS + amount, 255), _LEVELS)
    return _look_up(video, table.astype(np.uint8))


def _away_from(grey: np.ndarray, factor: float) -> np.ndarray:
    """Tables (..., 256) of grey + factor * (level - grey), cut to integers in float32 as Pillow."""
    grey = np.asarray(grey, np.float32)[..., None]
    moved = grey + np.float32(factor) * (_LEVELS.astype(np.float32) - grey)
    return moved.clip(0, 255).astype(np.uint8)


def _brightness(video: np.ndarray, factor: float) -> np.ndarray:
    return _look_up(video, _away_from(0, factor))


def _contrast(video: np.ndarray, factor: float) -> np.ndarray:
    """Moves levels away from the mean luma of each frame."""
    means = np.floor(luma(video).mean((1, 2)) + 0.5)
    return _look_up(video, _away_from(means, factor))


def _blend(plain: np.ndarray, picture: np.ndarray, factor: float) -> np.ndarray:
    """plain + factor * (picture - plain) on uint8, cut to integers.

    OpenCV rounds; the offset makes that a cut, and leaves room for the error of its products.
    """
    return cv2.addWeighted(picture, factor, plain, 1 - factor, -0.499)


def _colour(video: np.ndarray, factor: float) -> np.ndarray:
    """Moves colours away from grey."""
    picture = flat(video)
    grey = cv2.cvtColor(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    return _blend(grey, picture, factor).reshape(video.shape)


def _sharpness(video: np.ndarray, factor: float) -> np.ndarray:
    """Moves levels away from those of a smoothed frame; the outermost pixels stay."""
    kernel = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13
    picture = flat(video)
    smooth = cv2.filter2D(picture, -1, kernel)
    frames = smooth.reshape(video.shape)
    for edge in np.s_[:, 0], np.s_[:, -1], np.s_[:, :, 0], np.s_[:, :, -1]:
        frames[edge] = video[edge]
    return _blend(smooth, picture, factor).reshape(video.shape)


def _warp(video: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Resamples frames, cubic.

    Args:
      video: (T, H, W, 3) uint8.
      matrix: (2, 3), from (x, y, 1) of the result to (x, y) of the source, in pixels counted from
        the outer corner of the frame, so that centres of pixels lie at halves.

    Returns:
      The same shape; FILL where the source lies outside the frame.
    """
    height, width = video.shape[1:3]
    x, y = np.arange(width) + 0.5, np.arange(height)[:, None] + 0.5
    inside = np.ones((height, width), bool)
    for (by_x, by_y, offset), size in zip(matrix, (width, height)):
        place = by_x * x + by_y * y + offset
        inside &= (place >= 0) & (place < size)
    mask = inside.astype(np.uint8)
    # OpenCV counts from the centre of the first pixel.
    centred = matrix.copy()
    centred[:, 2] += matrix[:, :2].sum(1) / 2 - 0.5
    warped = np.full(video.shape, FILL, np.uint8)
    for frame, target in zip(video, warped):
        moved = cv2.warpAffine(
            np.ascontiguousarray(frame),
            centred,
            (width, height),
            flags=cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP,
            borderMode=cv2.BORDER_REPLICATE,
        )
        cv2.copyTo(moved, mask, target)
    return warped


def _rotate(video: np.ndarray, degrees: float) -> np.ndarray:
    """Turns frames about their centre, counterclockwise."""
    cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    turn = np.array([[cos, -sin], [sin, cos]])
    centre = np.array([video.shape[2], video.shape[1]]) / 2
    return _warp(video, np.column_stack([turn, centre - turn @ centre]))


def _shear_x(video: np.ndarray, slope: float) -> np.ndarray:
    return _warp(video, np.array([[1, slope, 0], [0, 1, 0]]))


def _shear_y(video: np.ndarray, slope: float) -> np.ndarray:
    return _warp(video, np.array([[1, 0, 0], [slope, 1, 0]]))


def _translate_x(video: np.ndarray, share: float) -> np.ndarray:
    return _warp(video, np.array([[1, 0, share * video.shape[2]], [0, 1, 0]]))


def _translate_y(video: np.ndarray, share: float) -> np.ndarray:
    return _warp(video, np.array([[1, 0, 0], [0, 1, share * video.shape[1]]]))


def _signed(per_level: float) -> Callable[[float, int, bool], float]:
    return lambda level, sign, increasing: sign * per_level * level


def _factor(level: float, sign: int, increasing: bool) -> float:
    return 1 + sign * 0.09 * level if increasing else 0.1 + 0.18 * level


def _bits(level: float, sign: int, increasing: bool) -> float:
    lost = int(0.4 * level)
    return 4 - lost if increasing else lost


def _threshold(level: float, sign: int, increasing: bool) -> float:
    share = int(25.6 * level)
    return 256 - share if increasing else share


OPS: dict[str, Op] = {
    'AutoContrast': Op(_auto_contrast),
    'Equalize': Op(_equalize),
    'Invert': Op(_invert),
    'Rotate': Op(_rotate, _signed(3.0)),
    'Posterize': Op(_posterize, _bits),
    'Solarize': Op(_solarize, _threshold),
    'SolarizeAdd': Op(_solarize_add, lambda level, sign, increasing: int(11 * level)),
    'Color': Op(_colour, _factor),
    'Contrast': Op(_contrast, _factor),
    'Brightness': Op(_brightness, _factor),
    'Sharpness': Op(_sharpness, _factor),
    'ShearX': Op(_shear_x, _signed(0.03)),
    'ShearY': Op(_shear_y, _signed(0.03)),
    'TranslateX': Op(_translate_x, _signed(0.045)),
    'TranslateY': Op(_translate_y, _signed(0.045)),
}
