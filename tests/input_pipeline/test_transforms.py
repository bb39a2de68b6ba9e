import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from input_pipeline.transforms import (
    CentreCrop,
    ColourJitter,
    Flip,
    Grayscale,
    RandomResizedCrop,
    ShortSideCrops,
    apply,
)

EVL = json.loads((Path(__file__).parents[1] / 'golden' / 'evl_sampling.json').read_text())


def clip(num_frames=4, height=40, width=60):
    shape = (num_frames, height, width, 3)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def same_frames(num_frames=4):
    return np.repeat(clip(1), num_frames, 0)


ALL = (Flip(), RandomResizedCrop(24), Grayscale(0.5), ColourJitter(probability=1.0))


@pytest.mark.parametrize('seed', range(8))
def test_all_frames_of_a_clip_get_the_same_draw(seed):
    video, _ = apply(ALL, same_frames(), 3, np.random.default_rng(seed))
    assert video.shape == (4, 24, 24, 3)
    assert video.dtype == np.uint8
    assert video.flags.c_contiguous
    for frame in video[1:]:
        np.testing.assert_array_equal(frame, video[0])


def test_the_same_generator_gives_the_same_clip_and_another_one_does_not():
    draws = [apply(ALL, clip(), 3, np.random.default_rng(seed))[0] for seed in (1, 1, 2)]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert (draws[0] != draws[2]).any()


def test_input_is_not_changed():
    video = clip()
    before = video.copy()
    for seed in range(4):
        apply(ALL, video, 3, np.random.default_rng(seed))
    np.testing.assert_array_equal(video, before)


def test_flip_mirrors_and_swaps_only_the_named_labels():
    flip = Flip(1.0, ((86, 87), (93, 94)))
    for label, flipped in ((86, 87), (87, 86), (94, 93), (5, 5)):
        video, new = apply((flip,), clip(), label, np.random.default_rng(0))
        np.testing.assert_array_equal(video, clip()[:, :, ::-1])
        assert new == flipped


def test_an_unflipped_clip_keeps_its_label():
    video, label = apply((Flip(0.0, ((86, 87),)),), clip(), 86, np.random.default_rng(0))
    np.testing.assert_array_equal(video, clip())
    assert label == 86


def test_half_of_the_clips_are_flipped_and_labels_go_with_pixels():
    rng = np.random.default_rng(0)
    results = [apply((Flip(0.5, ((0, 1),)),), clip(1), 0, rng) for _ in range(400)]
    flipped = [(video == clip(1)[:, :, ::-1]).all() for video, _ in results]
    assert [label == 1 for _, label in results] == flipped
    assert 150 < sum(flipped) < 250


def test_labels_of_two_heads_pass_through_a_flip():
    assert apply((Flip(1.0),), clip(), (3, 200), np.random.default_rng(0))[1] == (3, 200)


def test_boxes_have_the_area_and_aspect_asked_for():
    crop = RandomResizedCrop(24, area=(0.4, 1.0), aspect=(3 / 4, 4 / 3))
    rng = np.random.default_rng(0)
    boxes = np.array([crop.draw_box(240, 320, rng) for _ in range(2000)])
    top, left, height, width = boxes.T
    assert (top >= 0).all() and (left >= 0).all()
    assert (top + height <= 240).all() and (left + width <= 320).all()
    area, aspect = height * width / (240 * 320), width / height
    assert 0.39 < area.min() < 0.42
    assert area.max() > 0.9
    assert 0.74 < aspect.min() < 0.77
    assert 1.3 < aspect.max() < 1.35


def test_a_strip_falls_back_to_its_largest_allowed_centre_box():
    box = RandomResizedCrop(24).draw_box(10, 1000, np.random.default_rng(0))
    assert box == (0, 493, 10, 13)


def test_a_crop_is_the_box_resized():
    video = clip()
    crop = RandomResizedCrop(24)
    top, left, height, width = crop.draw_box(40, 60, np.random.default_rng(5))
    expected = cv2.resize(video[2, top : top + height, left : left + width], (24, 24))
    result, _ = apply((crop,), video, 0, np.random.default_rng(5))
    np.testing.assert_array_equal(result[2], expected)


def test_grayscale_makes_three_equal_channels_in_about_a_fifth_of_the_clips():
    rng = np.random.default_rng(0)
    grey = [
        (video[..., :1] == video).all()
        for video, _ in (apply((Grayscale(),), clip(1), 0, rng) for _ in range(500))
    ]
    assert 70 < sum(grey) < 130


def test_colour_jitter_is_off_by_default_and_changes_colours_when_on():
    off, _ = apply((ColourJitter(),), clip(), 0, np.random.default_rng(0))
    np.testing.assert_array_equal(off, clip())
    on, _ = apply((ColourJitter(probability=1.0),), clip(), 0, np.random.default_rng(0))
    assert (on != clip()).mean() > 0.5


def test_jitter_of_strength_zero_changes_next_to_nothing():
    jitter = ColourJitter(0.0, 0.0, 0.0, 0.0, probability=1.0)
    video, _ = apply((jitter,), clip(), 0, np.random.default_rng(0))
    assert np.abs(video.astype(int) - clip()).max() <= 6  # hue in 180 steps


def test_centre_crop_of_a_clip_that_has_the_short_side():
    views = ShortSideCrops(40)(clip())
    np.testing.assert_array_equal(views[0], clip()[:, :, 10:50])


@pytest.mark.parametrize('shape', [(4, 40, 60), (4, 60, 40), (4, 33, 33), (2, 17, 90)])
@pytest.mark.parametrize('num_crops', [1, 3])
def test_views_have_the_size_asked_for(shape, num_crops):
    assert ShortSideCrops(32, num_crops, 36)(clip(*shape)).shape == (num_crops, shape[0], 32, 32, 3)


def test_three_crops_are_both_ends_and_the_centre():
    video = clip()
    views = ShortSideCrops(40, 3)(video)
    for view, left in zip(views, (0, 10, 20)):
        np.testing.assert_array_equal(view, video[:, :, left : left + 40])
    tall = video.transpose(0, 2, 1, 3)
    np.testing.assert_array_equal(ShortSideCrops(40, 3)(tall), views.transpose(0, 1, 3, 2, 4))


def test_views_rounded_down_equal_all_recorded_sizes_and_corners():
    for row in EVL['eval_spatial']:
        cut = ShortSideCrops(row['spatial_size'], row['num_spatial_views'], rounding='down')
        resized, corners = cut.layout(row['source_height'], row['source_width'])
        assert resized == (row['resized_height'], row['resized_width']), row
        assert [list(corner) for corner in corners] == row['offsets_top_left'], row


def test_views_rounded_to_nearest_may_lie_a_pixel_further():
    # 3/4 of 117 is 87.75.
    assert ShortSideCrops(60).layout(80, 117) == ((60, 88), ((0, 14),))
    assert ShortSideCrops(60, rounding='down').layout(80, 117) == ((60, 87), ((0, 13),))


@pytest.mark.parametrize('rounding', ['nearest', 'down'])
def test_views_are_cut_where_the_layout_says(rounding):
    video = clip(2, 45, 79)
    cut = ShortSideCrops(32, 3, rounding=rounding)
    (height, width), corners = cut.layout(45, 79)
    resized = cv2.resize(video[1], (width, height))
    for view, (top, left) in zip(cut(video), corners):
        np.testing.assert_array_equal(view[1], resized[top : top + 32, left : left + 32])
    centre, _ = CentreCrop(32, rounding)(video, 0, np.random.default_rng(0))
    np.testing.assert_array_equal(centre, cut(video)[1])


def test_wrong_views_are_errors():
    for transform in (ShortSideCrops, CentreCrop):
        with pytest.raises(ValueError, match=r"rounding='up' must be one of \('nearest', 'down'\)"):
            transform(32, rounding='up')
    with pytest.raises(ValueError, match='num_crops=2 must be 1 or 3'):
        ShortSideCrops(32, 2)
    with pytest.raises(ValueError, match='short_side=30 is smaller than image_size=32'):
        ShortSideCrops(32, 1, 30)
