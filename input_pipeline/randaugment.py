"""RandAugment and AutoAugment: a few random operations on a whole clip, from a policy string.

A policy is written as timm writes it, 'rand-m7-n4-mstd0.5-inc1' or 'original-mstd0.5'; see
`parse_rand` and `parse_auto`. Arithmetic follows Pillow, on which the published recipes run: tables
and blends are cut to integers as there.
"""

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import cv2
import numpy as np

from input_pipeline.transforms import Label, choose, flat, greyed, luma

MAX_LEVEL = 10.0

_LEVELS = np.arange(256)

# How geometric operations resample.
KERNELS: dict[str, int] = {
    'nearest': cv2.INTER_NEAREST,
    'bilinear': cv2.INTER_LINEAR,
    'bicubic': cv2.INTER_CUBIC,
}


@dataclass(frozen=True)
class Warp:
    """How geometric operations resample.

    Attributes:
      interpolation: a key of `KERNELS`.
      fill: what comes in from outside the frame, (red, green, blue) 0 to 255. Grey in EVL and
        Side4Video; timm's image training takes the mean of the data set.
    """

    interpolation: str = 'bicubic'
    fill: tuple[int, int, int] = (128, 128, 128)

    def __post_init__(self):
        choose('interpolation', self.interpolation, KERNELS)
        if len(self.fill) != 3 or not all(0 <= level <= 255 for level in self.fill):
            raise ValueError(f'fill={self.fill} must be three levels from 0 to 255')


class Op(NamedTuple):
    """One operation.

    Attributes:
      change: (video (T, H, W, 3) uint8, argument) -> video, with statistics of each frame; of a
        geometric operation (height, width, argument) -> matrix of `_warp`.
      argument: (level in [0, 10], sign -1 or 1, increasing) -> the argument of `change`.
      geometric: whether it moves pixels.
    """

    change: Callable[..., np.ndarray]
    argument: Callable[[float, int, bool], float] = lambda level, sign, increasing: 0.0
    geometric: bool = False

    def run(self, video: np.ndarray, argument: float, warp: Warp = Warp()) -> np.ndarray:
        """The operation on all frames."""
        if self.geometric:
            return _warp(video, self.change(*video.shape[1:3], argument), warp)
        return self.change(video, argument)


def _run(video: np.ndarray, draws: list[tuple[str, float]], warp: Warp) -> np.ndarray:
    for name, argument in draws:
        video = OPS[name].run(video, argument, warp)
    return video


@dataclass(frozen=True)
class RandAugment:
    """Draws operations with replacement, once for all frames of a clip.

    Attributes:
      magnitude: mean level, 0 to 10.
      num_ops: operations drawn for a clip.
      magnitude_std: standard deviation of the level, which is cut to 0 to `magnitude_max`; drawn
        per operation.
      increasing: whether a higher level always means a stronger change; otherwise Posterize and
        Solarize weaken with the level and the four enhancements run from 0.1 to 1.9.
      probability: of each drawn operation to be carried out.
      magnitude_max: highest level.
      warp: of the geometric operations.

    Source: Cubuk et al. 2020 with the fifteen operations and ranges of timm; EVL and Side4Video
      train with 'rand-m7-n4-mstd0.5-inc1', STS with 'rand-m7-mstd0.5-inc1' on ImageNet.
    Differs: geometric operations use OpenCV's cubic kernel (a = -0.75, rounded) where Pillow has
      a = -1, cut: 0.5 grey levels on average and at most 4 on smooth pictures, more on noise. What
      is filled is the same.
    """

    magnitude: float = 10.0
    num_ops: int = 2
    magnitude_std: float = 0.0
    increasing: bool = False
    probability: float = 0.5
    magnitude_max: float = MAX_LEVEL
    warp: Warp = Warp()

    def __call__(
        self, video: np.ndarray, label: Label, rng: np.random.Generator
    ) -> tuple[np.ndarray, Label]:
        return _run(video, self.draw(rng), self.warp), label

    def draw(self, rng: np.random.Generator) -> list[tuple[str, float]]:
        """The operations of one clip, names in `OPS` with their arguments, in order."""
        names = rng.choice(list(OPS), self.num_ops)
        fires = rng.random(self.num_ops) < self.probability
        levels = rng.normal(self.magnitude, self.magnitude_std, self.num_ops)
        signs = rng.choice((-1, 1), self.num_ops)
        return [
            (str(name), OPS[name].argument(float(level), int(sign), self.increasing))
            for name, fire, level, sign in zip(
                names, fires, levels.clip(0, self.magnitude_max), signs
            )
            if fire
        ]


@dataclass(frozen=True)
class AutoAugment:
    """Draws one of the pairs of operations that were found to help, once for all frames of a clip.

    Attributes:
      policy: a key of `POLICIES`.
      magnitude_std: standard deviation of the levels about those of the table.
      warp: of the geometric operations.

    Source: Cubuk et al. 2019; `magnitude_std` is timm's.
    """

    policy: str = 'original'
    magnitude_std: float = 0.0
    warp: Warp = Warp()

    def __call__(
        self, video: np.ndarray, label: Label, rng: np.random.Generator
    ) -> tuple[np.ndarray, Label]:
        return _run(video, self.draw(rng), self.warp), label

    def draw(self, rng: np.random.Generator) -> list[tuple[str, float]]:
        """The operations of one clip, names in `OPS` with their arguments, in order."""
        pairs = POLICIES[self.policy]
        pair = pairs[rng.integers(len(pairs))]
        fires = rng.random(len(pair))
        spread = rng.normal(0, self.magnitude_std, len(pair))
        signs = rng.choice((-1, 1), len(pair))
        return [
            (
                name,
                AUTO_OPS[name].argument(min(max(level + more, 0.0), MAX_LEVEL), int(sign), False),
            )
            for (name, probability, level), fire, more, sign in zip(pair, fires, spread, signs)
            if fire < probability
        ]


class _Part(NamedTuple):
    field: str
    kind: type
    low: float
    high: float
    text: str


_SPREAD = _Part('magnitude_std', float, 0, MAX_LEVEL, 'mstd0 to mstd10 (spread of magnitude)')
_RAND_PARTS = {
    'm': _Part('magnitude', float, 0, MAX_LEVEL, 'm0 to m10 (magnitude)'),
    'n': _Part('num_ops', int, 1, 100, 'n1 to n100 (operations of a clip)'),
    'mstd': _SPREAD,
    'mmax': _Part('magnitude_max', float, 0, MAX_LEVEL, 'mmax0 to mmax10 (highest magnitude)'),
    'inc': _Part('increasing', int, 0, 1, 'inc0 or inc1 (increasing set)'),
    'p': _Part('probability', float, 0, 1, 'p0 to p1 (share of operations carried out)'),
}
_AUTO_PARTS = {'mstd': _SPREAD}
_NUMBERS = {int: r'\d+', float: r'\d+(\.\d+)?'}


def parse_rand(policy: str, warp: Warp = Warp()) -> RandAugment:
    """Reads a policy string such as 'rand-m7-n4-mstd0.5-inc1'.

    Args:
      policy: 'rand', then parts in any order, joined by '-': m (magnitude, 10 if left out), n
        (operations, 2), mstd (standard deviation of the magnitude, 0), mmax (highest magnitude,
        10), inc (1 for the increasing set, 0), p (probability of an operation, 0.5).
      warp: of the geometric operations.

    Raises:
      ValueError: naming the part that is not understood, and what is allowed.

    Differs: timm ignores parts that it does not know and reads 'inc0' as 'inc1'; weights of
      operations (w) are not offered.
    """
    _, fields = _parse('rand_augment', policy, ('rand',), _RAND_PARTS)
    increasing = bool(fields.pop('increasing', False))
    return RandAugment(**fields, increasing=increasing, warp=warp)


def parse_auto(policy: str, warp: Warp = Warp()) -> AutoAugment:
    """Reads a policy string such as 'original' or 'original-mstd0.5'.

    Args:
      policy: a key of `POLICIES`, then mstd (standard deviation of the magnitudes, 0 if left out).
      warp: of the geometric operations.

    Raises:
      ValueError: naming the part that is not understood, and what is allowed.
    """
    kind, fields = _parse('auto_augment', policy, tuple(POLICIES), _AUTO_PARTS)
    return AutoAugment(kind, **fields, warp=warp)


def _parse(
    name: str, policy: str, kinds: tuple[str, ...], allowed: dict[str, _Part]
) -> tuple[str, dict[str, Any]]:
    """The kind of a policy and the fields that its parts set."""
    kind, *parts = policy.split('-')
    texts = '; '.join(part.text for part in allowed.values())
    if kind not in kinds:
        expected = ' or '.join(map(repr, kinds))
        raise ValueError(
            f'{name}={policy!r} starts with {kind!r}, expected {expected} and then parts joined '
            f"by '-': {texts}"
        )
    fields: dict[str, float] = {}
    for text in parts:
        key, number = re.fullmatch(r'([a-z]*)(.*)', text, re.DOTALL).groups()
        part = allowed.get(key)
        if (
            part is None
            or not re.fullmatch(_NUMBERS[part.kind], number, re.ASCII)
            or not part.low <= part.kind(number) <= part.high
        ):
            raise ValueError(f'{name}={policy!r}: part {text!r} is none of {texts}')
        if part.field in fields:
            raise ValueError(f'{name}={policy!r}: part {text!r} gives {key} a second time')
        fields[part.field] = part.kind(number)
    return kind, fields


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
    return _blend(flat(greyed(video)), picture, factor).reshape(video.shape)


def _sharpness(video: np.ndarray, factor: float) -> np.ndarray:
    """Moves levels away from those of a smoothed frame; the outermost pixels stay."""
    kernel = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13
    picture = flat(video)
    smooth = cv2.filter2D(picture, -1, kernel)
    frames = smooth.reshape(video.shape)
    for edge in np.s_[:, 0], np.s_[:, -1], np.s_[:, :, 0], np.s_[:, :, -1]:
        frames[edge] = video[edge]
    return _blend(smooth, picture, factor).reshape(video.shape)


@functools.lru_cache(maxsize=4)  # sizes hardly change, and to fill three levels in turn is slow
def _filled(height: int, width: int, levels: tuple[int, int, int]) -> np.ndarray:
    """A picture of one colour; not to be changed."""
    return np.tile(np.array(levels, np.uint8), (height, width, 1))


def _warp(video: np.ndarray, matrix: np.ndarray, warp: Warp) -> np.ndarray:
    """Resamples frames.

    Args:
      video: (T, H, W, 3) uint8.
      matrix: (2, 3), from (x, y, 1) of the result to (x, y) of the source, in pixels counted from
        the outer corner of the frame, so that centres of pixels lie at halves.
      warp: the kernel, and what is where the source lies outside the frame.

    Returns:
      The same shape.
    """
    height, width = video.shape[1:3]
    x, y = np.arange(width) + 0.5, np.arange(height)[:, None] + 0.5
    outside = np.zeros((height, width), bool)
    for (by_x, by_y, offset), size in zip(matrix, (width, height)):
        # A row or a column where one of the terms is zero.
        place = (by_x * x if by_x else 0.0) + (by_y * y if by_y else 0.0) + offset
        outside |= (place < 0) | (place >= size)
    mask = outside.astype(np.uint8)
    fill = _filled(height, width, warp.fill)
    # OpenCV counts from the centre of the first pixel.
    centred = matrix.copy()
    centred[:, 2] += matrix[:, :2].sum(1) / 2 - 0.5
    warped = np.empty(video.shape, np.uint8)
    for frame, target in zip(video, warped):
        cv2.warpAffine(
            np.ascontiguousarray(frame),
            centred,
            (width, height),
            dst=target,
            flags=KERNELS[warp.interpolation] | cv2.WARP_INVERSE_MAP,
            borderMode=cv2.BORDER_REPLICATE,
        )
        cv2.copyTo(fill, mask, target)
    return warped


def _rotate(height: int, width: int, degrees: float) -> np.ndarray:
    """Turns frames about their centre, counterclockwise."""
    cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    turn = np.array([[cos, -sin], [sin, cos]])
    centre = np.array([width, height]) / 2
    return np.column_stack([turn, centre - turn @ centre])


def _shear_x(height: int, width: int, slope: float) -> np.ndarray:
    return np.array([[1, slope, 0], [0, 1, 0]])


def _shear_y(height: int, width: int, slope: float) -> np.ndarray:
    return np.array([[1, 0, 0], [slope, 1, 0]])


def _translate_x(height: int, width: int, share: float) -> np.ndarray:
    return np.array([[1, 0, share * width], [0, 1, 0]])


def _translate_y(height: int, width: int, share: float) -> np.ndarray:
    return np.array([[1, 0, 0], [0, 1, share * height]])


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
    'Rotate': Op(_rotate, _signed(3.0), geometric=True),
    'Posterize': Op(_posterize, _bits),
    'Solarize': Op(_solarize, _threshold),
    'SolarizeAdd': Op(_solarize_add, lambda level, sign, increasing: int(11 * level)),
    'Color': Op(_colour, _factor),
    'Contrast': Op(_contrast, _factor),
    'Brightness': Op(_brightness, _factor),
    'Sharpness': Op(_sharpness, _factor),
    'ShearX': Op(_shear_x, _signed(0.03), geometric=True),
    'ShearY': Op(_shear_y, _signed(0.03), geometric=True),
    'TranslateX': Op(_translate_x, _signed(0.045), geometric=True),
    'TranslateY': Op(_translate_y, _signed(0.045), geometric=True),
}
# AutoAugment keeps 4 to 8 bits.
AUTO_OPS = OPS | {'Posterize': Op(_posterize, lambda level, sign, increasing: 4 + int(0.4 * level))}

# Name -> pairs of (operation, probability, level). 'original': Cubuk et al. 2019, table 9, the
# policy for ImageNet.
POLICIES: dict[str, tuple[tuple[tuple[str, float, float], ...], ...]] = {
    'original': (
        (('Posterize', 0.4, 8), ('Rotate', 0.6, 9)),
        (('Solarize', 0.6, 5), ('AutoContrast', 0.6, 5)),
        (('Equalize', 0.8, 8), ('Equalize', 0.6, 3)),
        (('Posterize', 0.6, 7), ('Posterize', 0.6, 6)),
        (('Equalize', 0.4, 7), ('Solarize', 0.2, 4)),
        (('Equalize', 0.4, 4), ('Rotate', 0.8, 8)),
        (('Solarize', 0.6, 3), ('Equalize', 0.6, 7)),
        (('Posterize', 0.8, 5), ('Equalize', 1.0, 2)),
        (('Rotate', 0.2, 3), ('Solarize', 0.6, 8)),
        (('Equalize', 0.6, 8), ('Posterize', 0.4, 6)),
        (('Rotate', 0.8, 8), ('Color', 0.4, 0)),
        (('Rotate', 0.4, 9), ('Equalize', 0.6, 2)),
        (('Equalize', 0.0, 7), ('Equalize', 0.8, 8)),
        (('Invert', 0.6, 4), ('Equalize', 1.0, 8)),
        (('Color', 0.6, 4), ('Contrast', 1.0, 8)),
        (('Rotate', 0.8, 8), ('Color', 1.0, 2)),
        (('Color', 0.8, 8), ('Solarize', 0.8, 7)),
        (('Sharpness', 0.4, 7), ('Invert', 0.6, 8)),
        (('ShearX', 0.6, 5), ('Equalize', 1.0, 9)),
        (('Color', 0.4, 0), ('Equalize', 0.6, 3)),
        (('Equalize', 0.4, 7), ('Solarize', 0.2, 4)),
        (('Solarize', 0.6, 5), ('AutoContrast', 0.6, 5)),
        (('Invert', 0.6, 4), ('Equalize', 1.0, 8)),
        (('Color', 0.6, 4), ('Contrast', 1.0, 8)),
        (('Equalize', 0.8, 8), ('Equalize', 0.6, 3)),
    ),
}
