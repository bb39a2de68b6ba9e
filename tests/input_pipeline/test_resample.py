"""The smoothing resize is Pillow's, in every pixel."""

import numpy as np
import pytest
from PIL import Image
from video_files import pictures

from input_pipeline.resample import resize


def by_pillow(picture, height, width):
    image = Image.fromarray(np.ascontiguousarray(picture))
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))


def test_all_pixels_are_those_of_pillow():
    rng = np.random.default_rng(0)
    for k in range(120):
        h, w, height, width = rng.integers(1, 90, 4).tolist()
        # Noise, edges as hard as they can be, and what lies on borders between two levels.
        most = (256, 2, 4)[k % 3]
        picture = (rng.integers(0, most, (h, w, 3)) * (255 // (most - 1))).astype(np.uint8)
        np.testing.assert_array_equal(
            resize(picture, height, width), by_pillow(picture, height, width)
        )


@pytest.mark.parametrize('size', [(1000, 40), (30, 1000), (600, 600)])
def test_strong_smoothing_and_parts_of_larger_frames(size):
    picture = pictures(1, *size)[0]
    part = picture[3:-2, 5:-7]  # not contiguous
    for source in (picture, part):
        np.testing.assert_array_equal(resize(source, 24, 32), by_pillow(source, 24, 32))


def test_a_side_that_stays_is_left_alone():
    picture = pictures(1, 48, 64)[0]
    for size in ((48, 64), (48, 20), (20, 64)):
        np.testing.assert_array_equal(resize(picture, *size), by_pillow(picture, *size))
