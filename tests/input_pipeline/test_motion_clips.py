import json
import os
from collections import Counter

import numpy as np
import pytest
from video_files import decode_everything

from input_pipeline import motion_clips, sampling
from input_pipeline.motion_clips import CLASS_NAMES, generate, plan_clip, render_clip, write_clip
from input_pipeline.sources import open_source
from tools import make_motion_clips

SMALL = {'num_train': 20, 'num_val': 10, 'size': 48, 'num_frames': 8}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp('data') / 'clips'
    assert generate(path, **SMALL)
    return path


def contents(folder):
    files = sorted(path for path in folder.rglob('*') if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_lists_labels_and_balance(folder):
    for split, count in (('train', 20), ('val', 10)):
        source = open_source(folder / f'{split}.txt', label_map=folder / 'labels.txt')
        assert len(source) == count
        assert source.class_names == CLASS_NAMES
        assert set(Counter(source[k].label for k in range(count)).values()) == {count // 10}
        assert all(os.path.exists(source[k].path) for k in range(count))
    assert json.loads((folder / 'meta.json').read_text())['seed'] == 0


def test_the_same_seed_gives_the_same_bytes_and_another_one_does_not(folder, tmp_path):
    generate(tmp_path / 'again', **SMALL, num_threads=3)
    assert contents(tmp_path / 'again') == contents(folder)
    generate(tmp_path / 'other', **SMALL, seed=1)
    assert contents(tmp_path / 'other')['val/000000.mp4'] != contents(folder)['val/000000.mp4']


def test_train_and_val_clips_differ(folder):
    files = contents(folder)
    assert files['train/000000.mp4'] != files['val/000000.mp4']


@pytest.mark.parametrize('index', range(5))
def test_the_set_of_states_of_every_mechanism_does_not_depend_on_the_class(index):
    plans = [plan_clip(3, 'train', index, 32, label) for label in range(10)]
    for plan in plans[1:]:
        # Exactly: the same draws in another order.
        np.testing.assert_array_equal(np.sort(plan.phases), np.sort(plans[0].phases))
        np.testing.assert_array_equal(plan.cells, plans[0].cells)
        assert plan.appearance == plans[0].appearance


def test_only_the_mechanism_of_the_class_plays_in_order():
    for label in range(10):
        for index in range(20):
            phases = plan_clip(0, 'val', index, 32, label).phases
            steps = np.diff(phases, axis=1) % 1.0
            in_order = [np.ptp(row) < 1e-9 for row in steps]
            assert in_order == [k == label // 2 for k in range(5)]
            # Upwards is one or two sixteenths of a turn per slot, downwards the rest of the turn.
            assert (steps[label // 2] < 0.5).all() == (label % 2 == 0)


def test_how_the_mechanisms_meet_in_a_slot_has_the_same_law_for_all_classes():
    """Slots as a set, two mechanisms: which phases come together is a uniform matching."""
    num_slots = 4
    for label in (0, 3, 8):
        matchings = Counter()
        for index in range(8000):
            phases = plan_clip(1, 'train', index, 2 * num_slots, label).phases[[0, 4]]
            if all(len(set(row)) == num_slots for row in phases):  # one cycle: phases are distinct
                ranks = phases.argsort(1).argsort(1)
                matchings[tuple(ranks[1][ranks[0].argsort()])] += 1
        expected = matchings.total() / 24
        assert expected > 60
        assert len(matchings) == 24
        chi_squared = sum((n - expected) ** 2 / expected for n in matchings.values())
        assert chi_squared < 56  # 23 degrees of freedom: one in 10,000 is above


def test_decoded_frames_depend_on_the_picture_of_their_slot_alone(tmp_path):
    """Otherwise compression would tell what moves smoothly."""
    slots = render_clip(plan_clip(0, 'train', 0, 32, 0), 48)
    order = np.random.default_rng(0).permutation(16)
    write_clip(tmp_path / 'a.mp4', slots, 16)
    write_clip(tmp_path / 'b.mp4', slots[order], 16)
    decoded, shuffled = (
        decode_everything(tmp_path / name).reshape(16, 2, *slots.shape[1:])
        for name in ('a.mp4', 'b.mp4')
    )
    np.testing.assert_array_equal(decoded[order], shuffled)
    np.testing.assert_array_equal(decoded[:, 0], decoded[:, 1])


def test_decoded_frames_are_what_was_drawn(folder):
    drawn = render_clip(plan_clip(0, 'val', 3, 8, 3), 48)
    decoded = decode_everything(folder / 'val' / '000003.mp4')
    assert decoded.shape == (8, 48, 48, 3)
    assert drawn.shape == (4, 48, 48, 3)
    assert np.abs(decoded[::2].astype(int) - drawn).mean() < 10


def test_test_sampling_of_half_the_frames_takes_every_state_once():
    indices = sampling.segment_test(32, 16, 1)[0]
    assert sorted(indices // motion_clips.HOLD) == list(range(16))


def test_objects_move_as_the_class_says():
    """Follows the bright window of the class through the clip, on plain numbers."""
    right = plan_clip(0, 'train', 1, 32, 0)
    frames = render_clip(right, 96).astype(float)
    row, column = divmod(int(right.cells[0]), 3)
    window = frames[:, row * 32 + 1 : row * 32 + 32, column * 32 + 1 : column * 32 + 32]
    moving = np.abs(window - np.median(window, 0)).sum((1, 3))  # (slots, columns)
    angle = np.angle((moving * np.exp(2j * np.pi * np.arange(31) / 31)).sum(1))
    steps = np.angle(np.exp(1j * np.diff(angle)))
    assert (steps > 0).all()
    assert abs(steps.sum()) > 5  # nearly a whole turn of the torus, or two


def test_a_complete_set_is_not_written_again(folder):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob('*')}
    assert not generate(folder, **SMALL)
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob('*')}


def test_another_set_in_the_folder_is_an_error_and_stays(folder, tmp_path):
    before = contents(folder)
    with pytest.raises(ValueError, match=r"holds another set.*'seed': \(0, 5\)"):
        generate(folder, **SMALL, seed=5)
    assert contents(folder) == before
    (tmp_path / 'notes.txt').write_text('mine')
    with pytest.raises(ValueError, match='not empty and not a motion clips set'):
        generate(tmp_path, **SMALL)
    assert (tmp_path / 'notes.txt').read_text() == 'mine'


def test_lost_clips_are_noticed(tmp_path):
    generate(tmp_path / 'clips', **SMALL)
    (tmp_path / 'clips' / 'val' / '000004.mp4').unlink()
    with pytest.raises(ValueError, match='9 of 10 clips'):
        generate(tmp_path / 'clips', **SMALL)


def test_an_interrupted_generation_leaves_nothing_that_looks_whole(tmp_path):
    class Interrupt(Exception):
        pass

    def stop(done, total):
        if done == 12:
            raise Interrupt

    with pytest.raises(Interrupt):
        generate(tmp_path / 'clips', **SMALL, progress=stop)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ('change', 'message'),
    [({'size': 50}, 'size=50'), ({'num_frames': 9}, 'num_frames=9'), ({'num_val': 0}, 'num_val=0')],
)
def test_wrong_arguments_are_errors(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        generate(tmp_path / 'clips', **(SMALL | change))
    assert not (tmp_path / 'clips').exists()


def test_command_writes_the_set_and_a_contact_sheet(tmp_path, capsys):
    out = tmp_path / 'clips'
    arguments = ['--out', str(out), '--num_train', '10', '--num_val', '10', '--size', '48']
    assert make_motion_clips.main([*arguments, '--frames', '16']) == 0
    assert (out / 'contact_sheet.png').read_bytes()[:4] == b'\x89PNG'
    assert 'wrote' in capsys.readouterr().out
    assert make_motion_clips.main([*arguments, '--frames', '16']) == 0
    assert 'found a complete set' in capsys.readouterr().out
    assert make_motion_clips.main([*arguments, '--frames', '8']) == 1
    assert 'holds another set' in capsys.readouterr().out
