import cv2
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from input_pipeline.randaugment import (
    AUTO_OPS,
    KERNELS,
    OPS,
    POLICIES,
    AutoAugment,
    RandAugment,
    Warp,
    parse_auto,
    parse_rand,
)

EVL = 'rand-m7-n4-mstd0.5-inc1'
GEOMETRIC = {
    'ShearX': lambda w, h, a: (1, a, 0, 0, 1, 0),
    'ShearY': lambda w, h, a: (1, 0, 0, a, 1, 0),
    'TranslateX': lambda w, h, a: (1, 0, a * w, 0, 1, 0),
    'TranslateY': lambda w, h, a: (1, 0, 0, 0, 1, a * h),
}
FILL = 128
CUBIC = {'resample': Image.Resampling.BICUBIC, 'fillcolor': (FILL,) * 3}


def lifted(picture, amount):
    return picture.point([min(k + amount, 255) if k < 128 else k for k in range(256)] * 3)


PILLOW = {
    'AutoContrast': lambda picture, _: ImageOps.autocontrast(picture),
    'Equalize': lambda picture, _: ImageOps.equalize(picture),
    'Invert': lambda picture, _: ImageOps.invert(picture),
    'Rotate': lambda picture, degrees: picture.rotate(degrees, **CUBIC),
    'Posterize': lambda picture, bits: ImageOps.posterize(picture, int(bits)),
    'Solarize': ImageOps.solarize,
    'SolarizeAdd': lifted,
    'Color': lambda picture, factor: ImageEnhance.Color(picture).enhance(factor),
    'Contrast': lambda picture, factor: ImageEnhance.Contrast(picture).enhance(factor),
    'Brightness': lambda picture, factor: ImageEnhance.Brightness(picture).enhance(factor),
    'Sharpness': lambda picture, factor: ImageEnhance.Sharpness(picture).enhance(factor),
} | {
    name: lambda picture, a, matrix=matrix: picture.transform(
        picture.size, Image.Transform.AFFINE, matrix(*picture.size, a), **CUBIC
    )
    for name, matrix in GEOMETRIC.items()
}
# Largest difference in grey levels on a smooth picture, 0 for what is not named. 1: luma
# in 15 instead of 16 bits, and blends next to an integer, in few pixels. 4: another cubic kernel,
# and Pillow cuts where OpenCV rounds.
BOUND = {'Color': 1, 'Sharpness': 1, 'Rotate': 4} | dict.fromkeys(GEOMETRIC, 4)
SHARE = dict.fromkeys(('Color', 'Sharpness'), 0.01)


def clip(num_frames=3, height=60, width=81):
    """Smooth pictures with levels from about 10 to 240, another range in each channel."""
    rng = np.random.default_rng(0)
    frames = []
    for noise in rng.normal(size=(num_frames, height, width, 3)).astype(np.float32):
        blurred = cv2.GaussianBlur(noise, (0, 0), 3)
        low, span = blurred.min((0, 1)), np.ptp(blurred, (0, 1))
        frames.append(10 + (blurred - low) / span * rng.uniform(150, 230, 3))
    return np.stack(frames).astype(np.uint8)


def extremes():
    """One frame of a single level, one of two levels, one of noise."""
    noise = np.random.default_rng(1).integers(0, 256, (20, 31, 3), dtype=np.uint8)
    return np.stack([np.full_like(noise, 77), np.where(noise < 30, 3, 201).astype(np.uint8), noise])


@pytest.mark.parametrize('name', OPS)
@pytest.mark.parametrize('increasing', [True, False])
def test_an_operation_is_that_of_pillow(name, increasing):
    video = clip()
    for level in (0.0, 2.6, 5.0, 7.1, 9.9):
        for sign in (-1, 1):
            argument = OPS[name].argument(level, sign, increasing)
            if name == 'Posterize' and argument == 0:
                continue  # Pillow refuses to keep no bit at all
            found = OPS[name].run(video, argument)
            assert found.shape == video.shape and found.dtype == np.uint8
            expected = np.stack(
                [np.asarray(PILLOW[name](Image.fromarray(frame), argument)) for frame in video]
            )
            difference = np.abs(found.astype(int) - expected)
            assert difference.max() <= BOUND.get(name, 0), (level, argument)
            assert (difference > 0).mean() <= SHARE.get(name, 1.0), (level, argument)


@pytest.mark.parametrize('name', sorted(PILLOW.keys() - GEOMETRIC.keys() - {'Rotate'}))
def test_an_operation_is_that_of_pillow_on_extreme_frames(name):
    video = extremes()
    argument = OPS[name].argument(7.1, 1, True)
    expected = [np.asarray(PILLOW[name](Image.fromarray(frame), argument)) for frame in video]
    difference = np.abs(OPS[name].run(video, argument).astype(int) - np.stack(expected))
    assert difference.max() <= BOUND.get(name, 0)


@pytest.mark.parametrize('name', ['Rotate', *GEOMETRIC])
def test_what_comes_from_outside_is_filled(name):
    white = np.full((1, 60, 81, 3), 255, np.uint8)
    argument = OPS[name].argument(7.0, -1, True)
    found = OPS[name].run(white, argument)
    expected = np.asarray(PILLOW[name](Image.fromarray(white[0]), argument))
    assert set(np.unique(found)) == {FILL, 255}
    assert (found[0] != expected).mean() < 0.001


@pytest.mark.parametrize('interpolation', KERNELS)
def test_the_fill_and_the_kernel_are_a_choice(interpolation):
    warp = Warp(interpolation, (124, 116, 104))
    kernel = Image.Resampling[interpolation.upper()]
    for frame in clip(2):
        found = OPS['ShearX'].run(frame[None], 0.2, warp)[0]
        expected = np.asarray(
            Image.fromarray(frame).transform(
                (81, 60),
                Image.Transform.AFFINE,
                GEOMETRIC['ShearX'](81, 60, 0.2),
                kernel,
                fillcolor=warp.fill,
            )
        )
        outside = (expected == warp.fill).all(-1)
        assert outside.sum() > 300
        assert (found[outside] == warp.fill).mean() > 0.999
        assert np.abs(found.astype(int) - expected).mean() < 1


def test_a_policy_hands_its_fill_to_the_operations():
    white = np.full((1, 60, 81, 3), 255, np.uint8)
    policy = parse_rand('rand-m9-n4-p1-inc1', Warp('nearest', (1, 2, 3)))
    seen = np.concatenate(
        [
            np.unique(white_changed.reshape(-1, 3), axis=0)
            for white_changed in (
                OPS[name].run(white, argument, policy.warp)
                for seed in range(20)
                for name, argument in policy.draw(np.random.default_rng(seed))
                if OPS[name].geometric
            )
        ]
    )
    assert {tuple(colour) for colour in seen} == {(255, 255, 255), (1, 2, 3)}
    video, _ = policy(white, 0, np.random.default_rng(3))
    assert video.shape == white.shape


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'interpolation': 'lanczos'}, "interpolation='lanczos' must be one of"),
        ({'fill': (0, 0, 256)}, 'fill=.*three levels from 0 to 255'),
        ({'fill': (0, 0)}, 'three levels'),
    ],
)
def test_a_wrong_warp_is_an_error(change, message):
    with pytest.raises(ValueError, match=message):
        Warp(**change)


def test_keeping_no_bit_is_black():
    assert not OPS['Posterize'].run(clip(), OPS['Posterize'].argument(10.0, 1, True)).any()


@pytest.mark.parametrize(
    ('name', 'increasing', 'level', 'expected'),
    [
        ('Rotate', True, 7.0, -21.0),
        ('ShearX', True, 7.0, -0.21),
        ('TranslateY', False, 10.0, -0.45),
        ('Posterize', True, 7.4, 2),
        ('Posterize', False, 7.6, 3),
        ('Solarize', True, 7.0, 77),
        ('Solarize', False, 7.0, 179),
        ('SolarizeAdd', True, 7.05, 77),
        ('Color', True, 7.0, 0.37),
        ('Sharpness', False, 7.0, 1.36),
    ],
)
def test_arguments_follow_the_published_ranges(name, increasing, level, expected):
    assert OPS[name].argument(level, -1, increasing) == pytest.approx(expected)


def test_all_frames_of_a_clip_get_the_same_draw_and_the_label_stays():
    video = np.repeat(clip(1), 4, 0)
    for seed in range(12):
        changed, label = parse_rand(EVL)(video, (3, 5), np.random.default_rng(seed))
        assert label == (3, 5)
        assert changed.shape == video.shape
        for frame in changed[1:]:
            np.testing.assert_array_equal(frame, changed[0])


def test_statistics_are_those_of_each_frame():
    dark = (clip(1) // 4).astype(np.uint8)
    for name in ('AutoContrast', 'Equalize', 'Contrast'):
        argument = OPS[name].argument(7.0, 1, True)
        alone = OPS[name].run(dark, argument)
        np.testing.assert_array_equal(
            OPS[name].run(np.concatenate([clip(1), dark]), argument)[1:], alone
        )


def test_the_same_generator_gives_the_same_clip_and_the_input_is_not_changed():
    video = clip()
    before = video.copy()
    different = False
    for seed in range(12):
        first, second = (
            parse_rand(EVL)(video, 0, np.random.default_rng(seed))[0] for _ in range(2)
        )
        np.testing.assert_array_equal(first, second)
        different |= (first != before).any()
    assert different
    np.testing.assert_array_equal(video, before)


@pytest.mark.parametrize('name', OPS)
def test_views_of_larger_arrays_can_be_changed(name):
    video = clip()[:, ::-1, 5:-5]
    argument = OPS[name].argument(7.0, 1, True)
    np.testing.assert_array_equal(
        OPS[name].run(video, argument), OPS[name].run(np.ascontiguousarray(video), argument)
    )


def test_draws_have_the_published_distribution():
    rng = np.random.default_rng(0)
    policy = parse_rand(EVL)
    draws = [policy.draw(rng) for _ in range(4000)]
    counts = np.array([len(draw) for draw in draws])
    np.testing.assert_allclose(
        np.bincount(counts, minlength=5) / 4000, np.array([1, 4, 6, 4, 1]) / 16, atol=0.03
    )
    names = [name for draw in draws for name, _ in draw]
    shares = np.array([names.count(name) for name in OPS]) / len(names)
    np.testing.assert_allclose(shares, 1 / 15, atol=0.015)
    degrees = np.array([a for draw in draws for name, a in draw if name == 'Rotate'])
    assert np.abs(degrees).mean() == pytest.approx(21, abs=0.3)
    assert np.abs(degrees).std() == pytest.approx(1.5, abs=0.2)
    assert (degrees > 0).mean() == pytest.approx(0.5, abs=0.1)


def test_levels_stay_in_range():
    policy = RandAugment(magnitude=9.0, num_ops=400, magnitude_std=9.0, increasing=True)
    draw = policy.draw(np.random.default_rng(0))
    degrees = [abs(a) for name, a in draw if name == 'Rotate']
    assert max(degrees) == pytest.approx(30)
    assert all(0.09 < a < 1.91 for name, a in draw if name in ('Color', 'Contrast', 'Sharpness'))


def test_a_policy_is_read():
    assert parse_rand(EVL) == RandAugment(7.0, 4, 0.5, True, 0.5)
    assert parse_rand('rand-inc0-p1-m9-n3') == RandAugment(9.0, 3, 0.0, False, 1.0)
    assert parse_rand('rand-m2.5-p0.25') == RandAugment(magnitude=2.5, probability=0.25)
    assert parse_rand('rand-m9-mstd3-mmax9.5') == RandAugment(9.0, 2, 3.0, magnitude_max=9.5)
    assert parse_rand('rand') == RandAugment()


@pytest.mark.parametrize(
    ('policy', 'part'),
    [
        ('rand-m7-x4', "part 'x4' is none of m0 to m10"),
        ('rand-m11', "part 'm11'"),
        ('rand-mmax11', "part 'mmax11'"),
        ('rand-w0', "part 'w0'"),
        ('rand-m', "part 'm'"),
        ('rand-m-7', "part 'm'"),
        ('rand-m1e1', "part 'm1e1'"),
        ('rand-n2.0', "part 'n2.0'"),
        ('rand-n0', "part 'n0'"),
        ('rand-inc2', "part 'inc2' .* inc0 or inc1"),
        ('rand-mstdinf', "part 'mstdinf'"),
        ('rand-p1.5', "part 'p1.5'"),
        ('rand-m7-', "part ''"),
        ('rand-m7-m8', "part 'm8' gives m a second time"),
        ('original-mstd0.5', "starts with 'original', expected 'rand'"),
        ('', "starts with '', expected 'rand'"),
    ],
)
def test_a_wrong_policy_is_an_error_that_names_the_part(policy, part):
    with pytest.raises(ValueError, match=f"^rand_augment='{policy}'.*{part}"):
        parse_rand(policy)


def test_the_highest_magnitude_is_a_bound():
    policy = RandAugment(9.0, 400, 5.0, True, magnitude_max=9.5)
    draw = policy.draw(np.random.default_rng(0))
    assert max(abs(a) for name, a in draw if name == 'Rotate') == pytest.approx(28.5)


def test_auto_augment_draws_pairs_of_its_policy_at_their_levels():
    policy, rng = parse_auto('original'), np.random.default_rng(0)
    draws = [policy.draw(rng) for _ in range(6000)]
    assert max(map(len, draws)) == 2
    names = {name for draw in draws for name, _ in draw}
    assert names == {name for pair in POLICIES['original'] for name, _, _ in pair}
    # Rotate comes with probability .6 .8 .2 .8 .4 .8 in six of the 25 pairs.
    degrees = [a for draw in draws for name, a in draw if name == 'Rotate']
    assert len(degrees) / 6000 == pytest.approx(3.6 / 25, abs=0.015)
    assert {round(abs(a)) for a in degrees} == {9, 24, 27}
    assert np.mean(np.array(degrees) > 0) == pytest.approx(0.5, abs=0.06)
    bits = {a for draw in draws for name, a in draw if name == 'Posterize'}
    assert bits == {6, 7}
    spread = [a for _ in range(3000) for n, a in parse_auto('original-mstd1').draw(rng)]
    assert len(set(spread)) > 1000


def test_auto_augment_is_one_draw_for_a_clip():
    video = np.repeat(clip(1), 3, 0)
    changed = 0
    for seed in range(20):
        found, label = parse_auto('original-mstd0.5')(video, 7, np.random.default_rng(seed))
        assert label == 7 and found.shape == video.shape
        np.testing.assert_array_equal(found[1:], found[:-1])
        changed += (found != video).any()
    assert changed > 10


def test_every_pair_names_operations():
    for pairs in POLICIES.values():
        assert len(pairs) == 25
        assert all(
            name in AUTO_OPS and 0 <= share <= 1 and 0 <= level <= 10
            for pair in pairs
            for name, share, level in pair
        )


@pytest.mark.parametrize(
    ('policy', 'message'),
    [
        ('v1', "starts with 'v1', expected 'original'"),
        ('rand-m7', "starts with 'rand', expected 'original'"),
        ('original-m7', "part 'm7' is none of mstd0 to mstd10"),
        ('original-mstd', "part 'mstd'"),
    ],
)
def test_a_wrong_auto_policy_is_an_error_that_names_the_part(policy, message):
    with pytest.raises(ValueError, match=f"^auto_augment='{policy}'.*{message}"):
        parse_auto(policy)
    assert parse_auto('original-mstd0.5') == AutoAugment('original', 0.5)
