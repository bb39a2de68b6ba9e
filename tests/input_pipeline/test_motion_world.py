"""The world: a single frame says nothing of the motion, its lists say what the clips show."""

import dataclasses
import json
from collections import Counter

import av
import numpy as np
import pytest
from video_files import contents

from dist_jax.dataset import make
from input_pipeline import motion_world
from input_pipeline.datasets import DATASETS
from input_pipeline.motion_world import (
    LOOKS,
    MOTIONS,
    NEW_LOOKS,
    NEW_MOTIONS,
    SPLITS,
    combination,
    describe,
    displacements,
    generate,
    generate_pictures,
    labels,
    plan_clip,
    render_clip,
)
from input_pipeline.sources import open_source
from input_pipeline.tokenizer import tokenize_counted

SMALL = {
    'num_train': 17,
    'num_val': 16,
    'num_test': 4,
    'num_new_looks': 3,
    'num_new_motions': 4,
}
ALL_MOTIONS = (*MOTIONS, *NEW_MOTIONS)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp('data') / 'world'
    assert generate(path, **SMALL)
    return path


@pytest.mark.parametrize('time', [0.0, 0.3, 0.5, 0.99])
def test_every_frame_of_a_class_is_as_likely_in_every_other(time):
    """What a motion did until then is taken off the start, which is uniform: the same picture."""
    clip = plan_clip(0, 'test', 5)

    def frame(motion):
        moved = displacements(motion, clip.ahead, np.array([time]))[0]
        start = clip.start - np.append(moved, [0, 0])
        same = dataclasses.replace(clip, motion=motion, start=start % 1)
        return render_clip(same, 48, np.array([time]))[0].astype(int)

    expected = frame(MOTIONS[0])
    for motion in ALL_MOTIONS[1:]:
        # Rounding of a phase may move an edge by a shade.
        assert np.abs(frame(motion) - expected).max() <= 2, motion


def test_nothing_but_the_motion_of_a_clip_depends_on_it(monkeypatch):
    before = plan_clip(0, 'train', 3)
    monkeypatch.setattr(
        motion_world, 'combination', lambda *_: (('disc', 'green'), 'wavy', MOTIONS[12])
    )
    after = plan_clip(0, 'train', 3)
    for name in ('start', 'drift', 'ahead', 'rate', 'quantiser', 'appearance'):
        np.testing.assert_array_equal(getattr(before, name), getattr(after, name))
    assert before.motion != after.motion


def test_phases_are_uniform():
    starts = np.stack([plan_clip(0, 'train', k).start for k in range(600)])
    for counts in (np.histogram(phase, 10, (0, 1))[0] for phase in starts.T):
        assert counts.min() > 30 and counts.max() < 95


@pytest.mark.parametrize(
    'motion, axis, sign',
    [
        *(('moves left', 0, -1), ('moves right', 0, 1), ('moves up', 1, -1), ('moves down', 1, 1)),
        *(('turns clockwise', 2, 1), ('turns counterclockwise', 2, -1)),
        *(('comes closer', 3, 1), ('goes away', 3, -1)),
    ],
)
def test_a_motion_does_what_its_name_says(motion, axis, sign):
    moved = displacements(motion, 1.0, np.linspace(0, 1, 5))
    assert (sign * np.diff(moved[:, axis]) > 0).all()
    assert not np.delete(moved, axis, 1).any()


def test_sequences_and_pairs_do_what_their_names_say():
    times = np.linspace(0, 1, 9)
    first, second = np.split(
        np.diff(displacements('moves right, then up', 0, times)[:, :2], 1, 0), 2
    )
    assert (first[:, 0] > 0).all() and not first[:, 1].any()
    assert (second[:, 1] < 0).all() and not second[:, 0].any()
    ahead = displacements('moves with the ball', 2.0, times)
    np.testing.assert_allclose(ahead[:, :2], ahead[:, 4:])
    passed = displacements('is passed by the ball', 2.0, times)
    assert not passed[:, :4].any() and (np.diff(np.abs(passed[:, 4:]), axis=0) > 0).all()
    fast, slow = (displacements(f'moves {how}', 2.0, times) for how in ('fast', 'slowly'))
    assert np.abs(fast).max() > 3 * np.abs(slow).max()


def test_the_thing_is_where_and_how_its_phases_say():
    """Right is right, down is down, clockwise is clockwise, and larger is larger."""
    clip = plan_clip(0, 'test', 3)
    where = np.array([0, 0, 0, 0.5, 0.3, 0.3, 0, 0])

    def thing(phase, turns):
        """Places of its colour in a frame, in pixels."""
        start = where.copy()
        start[phase] = turns
        look = motion_world.world.Look('needle', 'halved', 'green', shade=0.9)
        plain = dataclasses.replace(clip, look=look, ground='plain', start=start, drift=np.zeros(8))
        picture = render_clip(plain, 96, np.zeros(1))[0].astype(int)
        green = picture[..., 1] > 1.8 * np.maximum(picture[..., 0], picture[..., 2])
        return np.argwhere(green)

    rest = thing(0, 0.0)
    assert len(rest) > 50
    moved = thing(0, 0.1).mean(0) - rest.mean(0)
    assert 6 < moved[1] < 13 and abs(moved[0]) < 2
    moved = thing(1, 0.1).mean(0) - rest.mean(0)
    assert 6 < moved[0] < 13 and abs(moved[1]) < 2
    assert len(thing(3, 0.9)) > 1.3 * len(rest)

    def heading(points):
        centred = points - points.mean(0)
        down, right = np.linalg.svd(centred, full_matrices=False)[2][0]
        return np.degrees(np.arctan2(down, right))  # clockwise, as down is positive

    turned = (heading(thing(2, 30 / 360)) - heading(rest)) % 180
    assert 20 < turned < 40


def test_held_out_looks_and_motions_are_in_no_other_split():
    assert not set(NEW_LOOKS) & set(LOOKS) and not set(NEW_MOTIONS) & set(MOTIONS)
    for shape_or_colour in {word for look in NEW_LOOKS for word in look.split()}:
        assert any(shape_or_colour in look.split() for look in LOOKS)
    words = {word.strip(',') for motion in MOTIONS for word in motion.split()}
    assert {word.strip(',') for motion in NEW_MOTIONS for word in motion.split()} <= words
    for split, (pairs, motions) in SPLITS.items():
        for index in range(0, 400, 7):
            pair, _, motion = combination(0, split, index)
            assert pair in pairs and motion in motions


def test_classes_are_balanced_and_no_combination_is_there_twice():
    clips = [combination(0, 'test', k) for k in range(640)]
    assert len(set(clips)) == 640
    found = [labels(0, 'test', k) for k in range(640)]
    assert set(Counter(motion for _, motion in found).values()) == {40}
    looks = Counter(look for look, _ in found)
    assert len(looks) == len(LOOKS) and min(looks.values()) >= 15


def test_lists_open_with_their_names(folder):
    for name, count in (('motion_world', 16), ('motion_world_looks', 30)):
        info = DATASETS[name]
        assert info.num_classes == count
        for split, files in (('train', 17), ('validation', 16), ('test', 4)):
            source = open_source(
                str(folder / info.splits[split].names[0]),
                root=str(folder),
                label_map=str(folder / info.label_files[0]),
                num_classes=count,
                usual_format=info.list_format,
            )
            assert len(source) == files
    for name in ('motion_new', 'looks_new'):
        assert (folder / f'{name}.txt').read_text().splitlines()
        names = (folder / f'{name}_labels.txt').read_text().splitlines()
        assert names == list({'motion_new': NEW_MOTIONS, 'looks_new': NEW_LOOKS}[name])
    lines = (folder / 'captions_val.jsonl').read_text().splitlines()
    for k, line in enumerate(map(json.loads, lines)):
        assert tuple(line['captions']) == describe(plan_clip(0, 'val', k))


def test_files_are_h264_of_two_seconds_at_several_rates(folder):
    rates = set()
    for path in sorted((folder / 'train').iterdir()):
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            assert stream.codec.name == 'h264' and (stream.height, stream.width) == (32, 32)
            frames = sum(1 for _ in container.decode(stream))
            rates.add(float(stream.average_rate))
            assert frames == 2 * stream.average_rate
    assert len(rates) > 2


def test_the_same_seed_gives_the_same_bytes(folder, tmp_path):
    generate(tmp_path / 'again', **SMALL, num_threads=3)
    assert contents(tmp_path / 'again') == contents(folder)
    assert not generate(folder, **SMALL)
    with pytest.raises(ValueError, match='holds another set'):
        generate(folder, **SMALL, seed=1)
    with pytest.raises(ValueError, match='num_new_looks=0 must be at least 1'):
        generate(tmp_path / 'none', num_new_looks=0)


def test_pictures_show_looks_and_say_so(tmp_path):
    generate_pictures(tmp_path / 'pictures', num_train=6, num_val=2)
    records = (tmp_path / 'pictures' / 'train.jsonl').read_text().splitlines()
    for record in map(json.loads, records):
        assert (tmp_path / 'pictures' / record['path']).exists()
        assert not any('move' in sentence or 'turn' in sentence for sentence in record['captions'])
        assert record['captions'][0] in LOOKS


def test_no_sentence_is_cut():
    sentences = [
        sentence
        for split in ('train', 'pictures_train')
        for k in range(200)
        for sentence in (
            motion_world.describe_picture if 'pictures' in split else motion_world.describe
        )(plan_clip(0, split, k))
    ]
    assert tokenize_counted([*sentences, *ALL_MOTIONS], 24, truncate=True)[1].max() <= 24


def test_the_tool_writes_it_with_a_sheet(tmp_path, capsys):
    arguments = [f'--{name}={value}' for name, value in SMALL.items()]
    assert make.main(['--world', '--out', str(tmp_path / 'w'), *arguments]) == 0
    assert (tmp_path / 'w' / 'contact_sheet.png').exists()
    assert (tmp_path / 'w' / 'motion_train.txt').exists()
