import json
import os
from collections import Counter

import numpy as np
import pytest
from video_files import contents, decode_everything

from dist_jax.dataset import make
from input_pipeline import sampling
from input_pipeline.motion_clips import CLASS_NAMES, generate, plan_clip, render_clip, write_clip
from input_pipeline.sources import open_source

SMALL = {'num_train': 16, 'num_val': 8, 'size': 48, 'num_frames': 8}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp('data') / 'clips'
    assert generate(path, **SMALL)
    return path


def test_lists_labels_and_balance(folder):
    for split, count in (('train', 16), ('val', 8)):
        source = open_source(folder / f'{split}.txt', label_map=folder / 'labels.txt')
        assert len(source) == count
        assert source.class_names == CLASS_NAMES
        assert set(Counter(source[k].label for k in range(count)).values()) == {count // 8}
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


@pytest.mark.parametrize(('num_frames', 'size'), [(32, 48), (24, 56)])
def test_all_classes_show_the_same_set_of_frames(num_frames, size):
    """The whole clip, and what test-time sampling takes of it."""
    sampled = sampling.segment_test(num_frames, num_frames // 2, 1)[0]
    clips = [
        render_clip(plan_clip(3, 'train', 5, num_frames, size, label), size) for label in range(8)
    ]
    assert len({clip.tobytes() for clip in clips}) == 8
    for chosen in (np.arange(num_frames), sampled):
        assert (
            len({tuple(sorted(frame.tobytes() for frame in clip[chosen])) for clip in clips}) == 1
        )


@pytest.mark.parametrize('label', range(8))
def test_the_place_in_any_single_frame_is_uniform(label):
    """A fixed shift of a uniform start: the shift from frame 0 does not depend on the clip."""
    plans = [plan_clip(0, 'val', index, 32, 48, label) for index in range(400)]
    shifts = np.stack([plan.shifts for plan in plans])
    relative = (shifts - shifts[:, :1]) % 48
    assert (relative == relative[0]).all()
    others = [plan_clip(0, 'val', index, 32, 48, 0) for index in range(400)]
    np.testing.assert_array_equal(shifts[:, 0], [plan.shifts[0] for plan in others])
    assert [plan.appearance for plan in plans] == [plan.appearance for plan in others]
    counts = np.stack([np.bincount(column // 12, minlength=4) for column in shifts[:, 0].T])
    assert (np.abs(counts - 100) < 40).all()


@pytest.mark.parametrize(('label', 'name'), enumerate(CLASS_NAMES))
def test_objects_move_as_the_class_says(label, name):
    """On the pixels: the shift between neighbouring frames by correlation."""
    frames = render_clip(plan_clip(0, 'train', 1, 32, 48, label), 48).astype(float).sum(3)
    spectra = np.fft.fft2(frames - frames.mean((1, 2), keepdims=True))
    correlation = np.fft.ifft2(spectra[1:] * spectra[:-1].conj()).real.reshape(31, -1)
    steps = np.stack(np.divmod(correlation.argmax(1), 48), 1)
    steps = (steps + 24) % 48 - 24  # (31, 2), down and right
    step = {'right': (0, 3), 'left': (0, -3), 'down': (3, 0), 'up': (-3, 0)}
    first, second = name.removeprefix('moves ').split(', then ')
    # Frame 16 is the start again: the step to it still belongs to the first act.
    assert steps[:16].tolist() == [list(step[first])] * 16
    assert steps[16:].tolist() == [list(step[second])] * 15


def test_a_decoded_frame_depends_on_the_drawn_frame_alone(tmp_path):
    """Otherwise compression would tell where the objects came from."""
    frames = render_clip(plan_clip(0, 'train', 0, 16, 48, 0), 48)
    order = np.random.default_rng(0).permutation(16)
    write_clip(tmp_path / 'a.mp4', frames, 16)
    write_clip(tmp_path / 'b.mp4', frames[order], 16)
    decoded = decode_everything(tmp_path / 'a.mp4')
    np.testing.assert_array_equal(decoded[order], decode_everything(tmp_path / 'b.mp4'))


def test_decoded_frames_are_what_was_drawn(folder):
    drawn = render_clip(plan_clip(0, 'val', 3, 8, 48, 3), 48)
    decoded = decode_everything(folder / 'val' / '000003.mp4')
    assert decoded.shape == drawn.shape == (8, 48, 48, 3)
    assert np.abs(decoded.astype(int) - drawn).mean() < 12


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
    with pytest.raises(ValueError, match='not empty and no built-in set'):
        generate(tmp_path, **SMALL)
    assert (tmp_path / 'notes.txt').read_text() == 'mine'
    for text in ('[]', '3', '{'):
        (tmp_path / 'meta.json').write_text(text)
        with pytest.raises(ValueError, match='choose another folder or delete this one'):
            generate(tmp_path, **SMALL)


def test_lost_clips_are_noticed(tmp_path):
    generate(tmp_path / 'clips', **SMALL)
    (tmp_path / 'clips' / 'val' / '000004.mp4').unlink()
    with pytest.raises(ValueError, match='7 of 8 files'):
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
    [
        ({'size': 50}, 'size=50'),
        ({'num_frames': 10}, 'num_frames=10'),
        ({'num_val': 0}, 'num_val=0'),
        ({'size': 10**6}, 'size=1000000 must be .* 32 to 4096'),
        ({'seed': -1}, 'seed=-1 must be at least 0'),
        ({'num_threads': 0}, 'num_threads=0 must be at least 1'),
    ],
)
def test_wrong_arguments_are_errors(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        generate(tmp_path / 'clips', **(SMALL | change))
    assert not (tmp_path / 'clips').exists()


def test_command_writes_the_set_and_a_contact_sheet(tmp_path, capsys):
    out = tmp_path / 'clips'
    arguments = ['--out', str(out), '--num_train', '8', '--num_val', '8', '--size', '48']
    assert make.main([*arguments, '--frames', '16']) == 0
    assert (out / 'contact_sheet.png').read_bytes()[:4] == b'\x89PNG'
    assert 'wrote' in capsys.readouterr().out
    assert make.main([*arguments, '--frames', '16']) == 0
    assert 'found a complete set' in capsys.readouterr().out
    assert make.main([*arguments, '--frames', '8']) == 1
    assert 'holds another set' in capsys.readouterr().out
