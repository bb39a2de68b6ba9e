"""Pictures of attention show it at the patch and in the frame that got it."""

import cv2
import numpy as np
import pytest
from PIL import Image, ImageSequence

from dist_jax import attention_map

GRID, FRAMES, SIDE = 4, 6, 64


def hot(frame, row, column, num_maps=3):
    """All attention on one patch."""
    maps = np.zeros((num_maps, GRID, GRID), np.float32)
    maps[frame, row, column] = 1
    return maps


def grey_video(level=90):
    return np.full((FRAMES, SIDE, SIDE, 3), level, np.uint8)


def brightest(frame):
    """(row, column) of the patch where a picture (H, W, 3) is brightest."""
    light = cv2.resize(frame.astype(np.float32).mean(-1), (GRID, GRID), cv2.INTER_AREA)
    return np.unravel_index(light.argmax(), light.shape)


@pytest.mark.parametrize('frame, row, column', [(0, 0, 0), (1, 3, 0), (2, 1, 2)])
def test_overlay_glows_at_the_patch_and_nowhere_else(frame, row, column):
    painted = attention_map.overlay(grey_video()[:3], hot(frame, row, column))
    assert brightest(painted[frame]) == (row, column)
    ground = painted[(frame + 1) % 3]
    assert np.ptp(ground) == 0  # the other frames stay as they are
    far = painted[frame].copy()
    far[max(0, 16 * (row - 2)) : 16 * (row + 3), max(0, 16 * (column - 2)) : 16 * (column + 3)] = (
        ground[0, 0]
    )
    np.testing.assert_array_equal(far, ground)


def test_even_attention_does_not_glow():
    even = np.full((3, GRID, GRID), 0.9 / (3 * GRID * GRID), np.float32)
    painted = attention_map.overlay(grey_video()[:3], even)
    assert np.ptp(painted) == 0
    # Nearly even attention is not blown up to the full scale.
    even[1, 1, 1] *= 1.2
    nearly = attention_map.overlay(grey_video()[:3], even)
    full = attention_map.overlay(grey_video()[:3], hot(1, 1, 1))
    assert np.abs(nearly - painted.astype(int)).max() < np.abs(full - painted.astype(int)).max() / 2


def test_one_scale_serves_all_frames():
    maps = 0.75 * hot(0, 1, 1) + 0.25 * hot(2, 1, 1)
    painted = attention_map.overlay(grey_video()[:3], maps).astype(int)
    strong, weak = painted[0, 24, 24].sum(), painted[2, 24, 24].sum()
    assert strong > weak > painted[1, 24, 24].sum()


def test_maps_belong_to_the_frames_that_the_backbone_sees():
    assert list(attention_map.seen_frames(16, 8)) == list(range(0, 16, 2))
    assert list(attention_map.seen_frames(8, 8)) == list(range(8))
    assert list(attention_map.seen_frames(8, 1)) == [0]


def test_animation_shows_each_seen_frame_beside_its_map(tmp_path):
    video = np.stack([np.full((SIDE, SIDE, 3), 30 * i, np.uint8) for i in range(FRAMES)])
    path = tmp_path / 'a.gif'
    attention_map.write_animation(path, video, hot(1, 2, 3))
    with Image.open(path) as animation:
        assert animation.info['loop'] == 0  # for ever
        frames = [np.asarray(f.convert('RGB')) for f in ImageSequence.Iterator(animation)]
        assert animation.info['duration'] == 250
    assert len(frames) == 3
    side = frames[0].shape[1] // 2 - 3
    for i, frame in enumerate(frames):
        plain, painted = frame[:side, :side], frame[:side, -side:]
        assert np.abs(plain.astype(int) - 60 * i).max() <= 6  # frames 0, 2 and 4
        assert (np.ptp(painted) > 60) == (i == 1)
    assert brightest(frames[1][:side, -side:]) == (2, 3)


@pytest.mark.parametrize('num_frames, num_maps', [(1, 1), (16, 8), (64, 32)])
def test_sheet_differs_where_attention_moved(tmp_path, num_frames, num_maps):
    video = np.full((num_frames, SIDE, SIDE, 3), 90, np.uint8)
    sheets = []
    for column in (0, 3):
        path = tmp_path / f'{column}.png'
        attention_map.write_sheet(
            path, video, hot(0, 1, column, num_maps), '$name$ ' + 'long ' * 30
        )
        sheets.append(cv2.imread(str(path)).astype(int))
    changed = np.abs(sheets[0] - sheets[1]).sum(-1) > 0
    rows, columns = np.nonzero(changed)
    # In the first frame, a grid of eight to a row.
    assert columns.max() < changed.shape[1] / 8 + 5
    assert np.ptp(columns) > changed.shape[1] / 8 / 2 > np.ptp(rows) / 2
    assert sheets[0].shape[1] > 800
