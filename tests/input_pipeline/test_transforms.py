import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from input_pipeline.transforms import (
    FILLS,
    INTERPOLATION,
    LAYOUTS,
    ROUNDING,
    CentreCrop,
    ColourJitter,
    Flip,
    Grayscale,
    MultiScaleCrop,
    RandomErasing,
    RandomResizedCrop,
    Resize,
    ViewCrops,
    apply,
)

EVL = json.loads((Path(__file__).parents[1] / 'golden' / 'evl_sampling.json').read_text())


def clip(num_frames=4, height=40, width=60):
    shape = (num_frames, height, width, 3)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def same_frames(num_frames=4):
    return np.repeat(clip(1), num_frames, 0)


ALL = (
    Resize((36,)),
    RandomResizedCrop(24),
    Flip(),
    Grayscale(0.5),
    ColourJitter(probability=1.0),
    RandomErasing(0.8, 'pixel'),
)


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
    views = ViewCrops(40)(clip())
    np.testing.assert_array_equal(views[0], clip()[:, :, 10:50])


@pytest.mark.parametrize('shape', [(4, 40, 60), (4, 60, 40), (4, 33, 33), (2, 17, 90)])
@pytest.mark.parametrize('num_crops', [1, 3])
def test_views_have_the_size_asked_for(shape, num_crops):
    assert ViewCrops(32, num_crops, (36,))(clip(*shape)).shape == (num_crops, shape[0], 32, 32, 3)


def test_three_crops_are_both_ends_and_the_centre():
    video = clip()
    views = ViewCrops(40, 3)(video)
    for view, left in zip(views, (0, 10, 20)):
        np.testing.assert_array_equal(view, video[:, :, left : left + 40])
    tall = video.transpose(0, 2, 1, 3)
    np.testing.assert_array_equal(ViewCrops(40, 3)(tall), views.transpose(0, 1, 3, 2, 4))


def test_views_rounded_down_equal_all_recorded_sizes_and_corners():
    for row in EVL['eval_spatial']:
        cut = ViewCrops(row['spatial_size'], row['num_spatial_views'], rounding='down')
        resized, corners = cut.corners(row['source_height'], row['source_width'])
        assert resized == (row['resized_height'], row['resized_width']), row
        assert [list(corner) for corner in corners] == row['offsets_top_left'], row


def test_views_rounded_to_nearest_may_lie_a_pixel_further():
    # 3/4 of 117 is 87.75.
    assert ViewCrops(60).corners(80, 117) == ((60, 88), ((0, 14),))
    assert ViewCrops(60, rounding='down').corners(80, 117) == ((60, 87), ((0, 13),))


@pytest.mark.parametrize('rounding', ['nearest', 'down'])
def test_views_are_cut_where_the_layout_says(rounding):
    video = clip(2, 45, 79)
    cut = ViewCrops(32, 3, rounding=rounding)
    (height, width), corners = cut.corners(45, 79)
    resized = cv2.resize(video[1], (width, height))
    for view, (top, left) in zip(cut(video), corners):
        np.testing.assert_array_equal(view[1], resized[top : top + 32, left : left + 32])
    centre, _ = CentreCrop(32, rounding)(video, 0, np.random.default_rng(0))
    np.testing.assert_array_equal(centre, cut(video)[1])


def test_wrong_views_are_errors():
    for transform in (ViewCrops, CentreCrop):
        with pytest.raises(ValueError, match=r"rounding='up' must be one of \('nearest', 'down', "):
            transform(32, rounding='up')
    with pytest.raises(ValueError, match='num_crops=2 must be 1 or 3'):
        ViewCrops(32, 2)
    with pytest.raises(ValueError, match=r'size=\(30,\) is smaller than image_size=32'):
        ViewCrops(32, 1, (30,))
    with pytest.raises(ValueError, match=r'size=\(30, 40\) is smaller than image_size=32'):
        CentreCrop(32, size=(30, 40))
    with pytest.raises(ValueError, match=r"layout='thirds' must be one of \('ends', 'halves'"):
        ViewCrops(32, 3, layout='thirds')
    with pytest.raises(ValueError, match="interpolation='cubic' must be one of"):
        ViewCrops(32, interpolation='cubic')


def pillow(frame, height, width, resample):
    return np.asarray(Image.fromarray(frame).resize((width, height), resample))


@pytest.mark.parametrize('interpolation', INTERPOLATION)
def test_resizing_is_that_of_the_library(interpolation):
    video = clip(2)
    expected = {
        'bilinear': lambda f: cv2.resize(f, (30, 20), interpolation=cv2.INTER_LINEAR),
        'bicubic': lambda f: cv2.resize(f, (30, 20), interpolation=cv2.INTER_CUBIC),
        'smooth_bilinear': lambda f: pillow(f, 20, 30, Image.Resampling.BILINEAR),
        'smooth_bicubic': lambda f: pillow(f, 20, 30, Image.Resampling.BICUBIC),
    }[interpolation]
    resized, label = Resize((20,), interpolation)(video, (1, 2), None)
    assert label == (1, 2)
    for frame, found in zip(video, resized):
        np.testing.assert_array_equal(found, expected(frame))
    box = (slice(None), slice(3, 33), slice(5, 45))
    np.testing.assert_array_equal(
        Resize((20, 30), interpolation).resize(video[box]),
        Resize((20, 30), interpolation).resize(np.ascontiguousarray(video[box])),
    )


def test_sizes_after_resizing():
    assert Resize((256, 320)).shape(240, 427) == (256, 320)
    assert Resize((256,)).shape(360, 640) == (256, 455)  # 455.1
    assert Resize((256,)).shape(640, 360) == (455, 256)
    # 256 * 5 / 4 is whole; 100 * 333 / 200 is 166.5.
    assert [Resize((100,), rounding=rule).shape(200, 333)[1] for rule in ROUNDING] == [
        166,
        166,
        166,
        167,
    ]
    video = clip()
    assert Resize((40,)).resize(video) is video


def test_swapped_boxes_have_both_shapes_of_a_linear_aspect():
    crop = RandomResizedCrop(24, (0.08, 0.5), (3 / 4, 4 / 3), swap=True)
    rng = np.random.default_rng(0)
    boxes = np.array([crop.draw_box(1000, 1000, rng) for _ in range(4000)])
    aspect = boxes[:, 3] / boxes[:, 2]
    assert aspect.min() > 0.74 and aspect.max() < 1.34
    # A linear draw is above 1 in 4/7 of the cases, a swapped one in 3/7: half of all.
    assert (aspect > 1).mean() == pytest.approx(0.5, abs=0.04)
    folded = np.where(aspect > 1, aspect, 1 / aspect)
    assert (folded < 1.15).mean() == pytest.approx(((1.15 - 1 / 1.15) / (7 / 12)), abs=0.04)


def test_multi_scale_boxes_are_those_of_tsn():
    crop = MultiScaleCrop(224)
    boxes = crop.boxes(256, 340)
    sides = sorted({(box[2], box[3]) for box in boxes})
    # 256, 224, 192 and 168, at most one step apart.
    assert sides == sorted(
        [(a, a) for a in (256, 224, 192, 168)]
        + [p for a, b in ((256, 224), (224, 192), (192, 168)) for p in ((a, b), (b, a))]
    )
    assert len(boxes) == 13 * len(sides)
    places = {box[:2] for box in boxes if box[2:] == (192, 192)}
    step_y, step_x = (256 - 192) // 4, (340 - 192) // 4
    quarters = {(0, 0), (0, 4), (4, 0), (4, 4), (2, 2), (0, 2), (4, 2), (2, 0), (2, 4)}
    quarters |= {(1, 1), (3, 1), (1, 3), (3, 3)}
    assert places == {(a * step_y, b * step_x) for a, b in quarters}
    for top, left, height, width in crop.boxes(225, 340) + crop.boxes(230, 225):
        assert top + height <= 230 and left + width <= 340


def test_multi_scale_crop_cuts_one_of_its_boxes():
    video, crop = clip(), MultiScaleCrop(24)
    boxes = [video[:, y : y + h, x : x + w] for y, x, h, w in crop.boxes(40, 60)]
    expected = {Resize((24, 24)).resize(box).tobytes() for box in boxes}
    found = {
        apply((crop,), video, 0, np.random.default_rng(seed))[0].tobytes() for seed in range(9)
    }
    assert found <= expected and len(found) > 5


@pytest.mark.parametrize('mode', FILLS)
def test_one_box_of_a_clip_is_erased(mode):
    video = same_frames(3)
    erasing = RandomErasing(1.0, mode, mean=(120.0, 116.4, 104.0), std=(68.0, 66.0, 70.0))
    shares, aspects = [], []
    for seed in range(150):
        found, label = apply((erasing,), video, (3, 4), np.random.default_rng(seed))
        assert label == (3, 4)
        np.testing.assert_array_equal(found[1:], found[:-1])
        changed = (found[0] != video[0]).any(-1)
        rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
        box = found[0, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert changed[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].mean() > 0.9
        colours = len(np.unique(box.reshape(-1, 3), axis=0))
        assert colours == 1 or (mode == 'pixel' and colours > 1)
        if mode == 'const':
            np.testing.assert_array_equal(box[0, 0], (120, 116, 104))
        shares.append(box.shape[0] * box.shape[1] / (40 * 60))
        aspects.append(box.shape[0] / box.shape[1])
    assert min(shares) > 0.01 and max(shares) < 0.36
    assert min(aspects) > 0.25 and max(aspects) < 3.8
    assert np.median(shares) == pytest.approx(0.17, abs=0.04)
    np.testing.assert_array_equal(video, same_frames(3))


def test_a_share_of_the_clips_is_erased():
    rng = np.random.default_rng(0)
    results = [apply((RandomErasing(0.25),), clip(1), 0, rng)[0] for _ in range(400)]
    assert 70 < sum((found != clip(1)).any() for found in results) < 130


@pytest.mark.parametrize(
    ('layout', 'size', 'corners'),
    [
        # Side4Video: 224 from 256 x 320 and from a tall frame, steps along the width.
        ('quarters', (256, 320), ((16, 0), (16, 96), (16, 48))),
        ('quarters', (256, 341), ((16, 0), (16, 116), (16, 58))),
        ('quarters', (455, 256), ((114, 0), (114, 32), (114, 16))),
        # STS cuts the short side, so that nothing is left over across.
        ('halves', (224, 341), ((0, 0), (0, 116), (0, 58))),
        ('halves', (341, 224), ((0, 0), (116, 0), (58, 0))),
        ('ends', (224, 341), ((0, 0), (0, 58), (0, 117))),
    ],
)
def test_three_crops_lie_where_the_recipe_puts_them(layout, size, corners):
    cut = ViewCrops(224, 3, size, 'down', layout=layout)
    assert cut.corners(*size) == (size, corners)
    video = np.random.default_rng(1).integers(0, 256, (1, *size, 3), dtype=np.uint8)
    for view, (top, left) in zip(cut(video), corners):
        np.testing.assert_array_equal(view, video[:, top : top + 224, left : left + 224])


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('shape', [(2, 40, 60), (2, 60, 40), (2, 33, 33)])
def test_every_layout_stays_inside(layout, shape):
    views = ViewCrops(32, 3, (36,), 'torchvision', 'smooth_bicubic', layout)(clip(*shape))
    assert views.shape == (3, 2, 32, 32, 3)


def test_centre_crops_of_an_exact_size():
    found, _ = CentreCrop(32, 'torchvision', (36, 45))(clip(), 0, np.random.default_rng(0))
    resized = np.stack([cv2.resize(frame, (45, 36)) for frame in clip()])
    np.testing.assert_array_equal(found, resized[:, 2:34, 6:38])  # 6.5 to even


@pytest.mark.parametrize(
    ('make', 'message'),
    [
        (lambda: Resize(()), r'size=\(\) must be'),
        (lambda: Resize((1, 2, 3)), 'size='),
        (lambda: Resize((8,), 'lanczos'), "interpolation='lanczos' must be one of"),
        (lambda: RandomResizedCrop(8, (0.5, 0.4)), r'area=\(0.5, 0.4\) must be two shares'),
        (lambda: RandomResizedCrop(8, ()), r'area=\(\) must be two shares'),
        (lambda: RandomResizedCrop(8, aspect=(0, 1)), 'aspect='),
        (lambda: MultiScaleCrop(8, (1.0, 1.5)), 'scales='),
        (lambda: RandomErasing(mode='white'), "mode='white' must be one of"),
    ],
)
def test_wrong_transforms_are_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
