"""The strips of the demo say what was said, what is true and where the model looked."""

import dataclasses

import numpy as np
import pytest
from PIL import Image, ImageSequence

from dist_jax import drawing, filmstrips
from dist_jax.filmstrips import Clip
from tools import draw_demo

NAMES = tuple(f'does thing {i}' for i in range(16))
FRAMES, MAPS, GRID = 8, 4, 3


def clip(truth, said=None, share=0.75, attention=True):
    """Grey frames, the attention on a corner of the second map."""
    video = np.full((FRAMES, 24, 24, 3), 90, np.uint8)
    maps = np.zeros((MAPS, GRID, GRID), np.float32)
    maps[1, 0, 0] = 1
    said = truth if said is None else said
    return Clip('v.mp4', video, NAMES[said], share, NAMES[truth], maps if attention else None)


def asked(clips):
    """(clips that are shown, how many were asked for)."""
    taken = []
    stream = (taken.append(each) or each for each in clips)
    return filmstrips.choose(stream, len(NAMES)), len(taken)


def test_clips_are_the_first_of_classes_that_lie_apart():
    first = [clip(i) for i in range(16)]
    again = [clip(i) for i in range(16)]
    shown, taken = asked([*first, *again])
    assert [each.truth for each in shown] == [NAMES[i] for i in (0, 3, 6, 9, 12, 15)]
    assert taken == 32  # none is wrong, which only the last one tells
    assert all(any(each is own for own in first) for each in shown)


def test_a_clip_that_is_told_wrongly_is_the_last():
    first = [clip(i, 2 if i == 1 else i) for i in range(16)]
    shown, taken = asked([*first, clip(0)])
    assert taken == 16
    assert [each.truth for each in shown] == [NAMES[i] for i in (0, 3, 6, 9, 12, 1)]
    # One of a class that is shown takes the place of the other.
    shown, taken = asked([*map(clip, range(16)), clip(0), clip(3, 4), clip(1, 2)])
    assert taken == 18
    assert [each.truth for each in shown] == [NAMES[i] for i in (0, 6, 9, 12, 15, 3)]
    # Where one is among them already, nothing changes.
    shown, taken = asked([clip(i, 5) for i in range(16)])
    assert taken == 16 and [each.right for each in shown] == [False] * 6
    few, _ = asked(map(clip, range(3)))
    assert len(few) == 3


def test_sheet_has_two_strips_and_three_texts_a_clip():
    clips = [*map(clip, range(5)), clip(5, 7, 0.41)]
    with drawing.theme():
        figure = filmstrips.draw(clips)
        figure.canvas.draw()
        (axis,) = figure.axes
        assert len(axis.images) == 6 * 2 * MAPS
        texts = [text.get_text() for text in axis.texts]
        for i in range(5):
            assert f'✓  {NAMES[i]}' in texts and f'true: {NAMES[i]}' in texts
        assert f'✗  {NAMES[7]}' in texts and f'true: {NAMES[5]}' in texts
        assert texts.count('75 % sure') == 5 and '41 % sure' in texts
        colours = {text.get_color() for text in axis.texts if text.get_text()[0] in '✓✗'}
        assert len(colours) == 2
        page = figure.bbox
        for text in axis.texts:  # nothing is cut off
            box = text.get_window_extent()
            assert page.x0 <= box.x0 < box.x1 <= page.x1 and page.y0 <= box.y0 < box.y1 <= page.y1


def test_without_attention_there_are_plain_strips():
    clips = [clip(i, attention=False) for i in range(2)]
    with drawing.theme():
        (axis,) = filmstrips.draw(clips).axes
    assert len(axis.images) == 2 * FRAMES
    assert not any('query' in text.get_text() for text in axis.texts)


@pytest.mark.parametrize(
    ('wrong', 'said'),
    [
        ((), 'none that was looked at is'),
        ((3,), 'and one that is'),
        ((0, 3), '2 of 4 are'),
        ((0, 1, 2, 3), 'all are'),
    ],
)
def test_the_foot_says_what_is_told_wrongly(wrong, said):
    clips = [clip(i, 9 if i in wrong else i, attention=False) for i in range(4)]
    with drawing.theme():
        texts = [text.get_text() for text in filmstrips.draw(clips).axes[0].texts]
    assert f'; {said} told wrongly.' in texts[-1]


def test_attention_stays_until_the_next_frame_that_the_backbone_sees():
    plain, painted = filmstrips.frames(clip(0), 48)
    assert plain.shape == painted.shape == (FRAMES, 48, 48, 3)
    glows = [np.ptp(frame) > 60 for frame in painted]
    assert glows == [False, False, True, True, False, False, False, False]
    assert painted[2, :8, :8].mean() > painted[2, -8:, -8:].mean() + 50


def test_longest_texts_do_not_run_into_each_other():
    long = dataclasses.replace(clip(0), said='moves away, ' * 9, truth='HURRIES ' * 9)
    with drawing.theme():
        figure = filmstrips.draw([long, long])
        figure.canvas.draw()
        boxes = [text.get_window_extent() for text in figure.axes[0].texts[:-1]]
    for i, one in enumerate(boxes):
        assert not any(one.overlaps(other) for other in boxes[i + 1 :])


@pytest.mark.parametrize('attention', [True, False])
def test_animation_plays_all_frames_again_and_again(tmp_path, monkeypatch, attention):
    monkeypatch.setattr(draw_demo, '_seconds', lambda clip: 2.0)
    monkeypatch.setattr(draw_demo, 'THINNED', 30)  # the fewer, the faster
    clips = [clip(i, i + i // 5, attention=attention) for i in range(6)]
    for each in clips:
        each.video[:] += np.arange(FRAMES, dtype=np.uint8)[:, None, None, None] * 15
    path = tmp_path / 'demo.gif'
    draw_demo.write(path, clips)
    with Image.open(path) as animation:
        assert animation.info['loop'] == 0  # for ever
        assert animation.n_frames == FRAMES
        assert animation.width <= 900
        times = [frame.info['duration'] for frame in ImageSequence.Iterator(animation)]
    assert times == [250] * (FRAMES - 1) + [draw_demo.REST]
