"""Pictures as those of ImageNet, and the pipeline of published image recipes on them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from dist_jax.models import sts
from input_pipeline.pipeline import TrainReader
from input_pipeline.randaugment import RandAugment
from input_pipeline.transforms import Flip, RandomResizedCrop

WIDTH, HEIGHT = 500, 375
QUALITY = 95  # about 110 kB, as the mean of ImageNet's training pictures
# Across the picture -> strength in grey levels, of the noise that pictures are the sum of.
_NOISE = {8: 60, 32: 35, 125: 20, 250: 10}


def write_picture(path: Path, seed: int) -> None:
    """Writes noise of several scales, mostly grey, with sensor noise: a JPEG, colours halved."""
    rng = np.random.default_rng(seed)
    picture = 120 + rng.normal(0, 4, (HEIGHT, WIDTH, 1))
    for across, strength in _NOISE.items():
        noise = rng.normal(0, 1, (max(2, HEIGHT * across // WIDTH), across, 3))
        noise = 1.2 * noise.mean(2, keepdims=True) + 0.3 * noise
        size = (WIDTH, HEIGHT)
        picture = picture + strength * cv2.resize(noise, size, interpolation=cv2.INTER_CUBIC)
    Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8)).save(path, quality=QUALITY)


def _warp(matrix: Callable[[float, int, int], tuple[float, ...]]) -> Callable[..., Image.Image]:
    def run(picture: Image.Image, argument: float, fill: tuple[int, int, int]) -> Image.Image:
        return picture.transform(
            picture.size,
            Image.Transform.AFFINE,
            matrix(argument, *picture.size),
            Image.Resampling.BICUBIC,
            fillcolor=fill,
        )

    return run


def _enhance(kind: Callable[[Image.Image], object]) -> Callable[..., Image.Image]:
    return lambda picture, argument, fill: kind(picture).enhance(argument)


# The operations of `randaugment.OPS` by Pillow: (picture, argument, fill) -> picture.
_OPS: dict[str, Callable[..., Image.Image]] = {
    'AutoContrast': lambda picture, argument, fill: ImageOps.autocontrast(picture),
    'Equalize': lambda picture, argument, fill: ImageOps.equalize(picture),
    'Invert': lambda picture, argument, fill: ImageOps.invert(picture),
    'Rotate': lambda picture, argument, fill: picture.rotate(
        argument, Image.Resampling.BICUBIC, fillcolor=fill
    ),
    'Posterize': lambda picture, argument, fill: ImageOps.posterize(picture, int(argument)),
    'Solarize': lambda picture, argument, fill: ImageOps.solarize(picture, argument),
    'SolarizeAdd': lambda picture, argument, fill: picture.point(
        [min(255, level + int(argument)) if level < 128 else level for level in range(256)] * 3
    ),
    'Color': _enhance(ImageEnhance.Color),
    'Contrast': _enhance(ImageEnhance.Contrast),
    'Brightness': _enhance(ImageEnhance.Brightness),
    'Sharpness': _enhance(ImageEnhance.Sharpness),
    'ShearX': _warp(lambda slope, width, height: (1, slope, 0, 0, 1, 0)),
    'ShearY': _warp(lambda slope, width, height: (1, 0, 0, slope, 1, 0)),
    'TranslateX': _warp(lambda share, width, height: (1, 0, share * width, 0, 1, 0)),
    'TranslateY': _warp(lambda share, width, height: (1, 0, 0, 0, 1, share * height)),
}


def augment_with_pillow(path: str, rng: np.random.Generator, recipe: TrainReader) -> Image.Image:
    """Opens a picture and transforms it by the recipe's own draws, all by Pillow."""
    picture = Image.open(path).convert('RGB')
    for transform in recipe.transforms:
        if isinstance(transform, RandomResizedCrop):
            width, height = picture.size
            top, left, height, width = transform.draw_box(height, width, rng)
            picture = picture.crop((left, top, left + width, top + height))
            size = (transform.image_size, transform.image_size)
            picture = picture.resize(size, Image.Resampling.BICUBIC)
        elif isinstance(transform, RandAugment):
            for name, argument in transform.draw(rng):
                picture = _OPS[name](picture, argument, transform.warp.fill)
        elif isinstance(transform, Flip):
            if rng.random() < transform.probability:
                picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        else:
            raise TypeError(f'{transform} is not of the recipe that was published on Pillow')
    return picture


def read_with_pillow(path: str, rng: np.random.Generator, recipe: TrainReader) -> list[np.ndarray]:
    """As torchvision and timm: Pillow, then float32. Every copy is decoded, as timm's sampler does.

    Returns:
      (3, H, W) float32, normalised, for every copy.
    """
    mean, std = (np.array(values, np.float32) for values in (sts.PIXELS.mean, sts.PIXELS.std))
    made = []
    for child in rng.spawn(recipe.repeats):
        levels = np.asarray(augment_with_pillow(path, child, recipe)).astype(np.float32) / 255
        made.append(np.ascontiguousarray(((levels - mean) / std).transpose(2, 0, 1)))
    return made
