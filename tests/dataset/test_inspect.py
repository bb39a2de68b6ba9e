"""Figures, pictures and the check of built data sets."""

import json
import shutil

import cv2
import numpy as np
import pytest

from dist_jax.dataset import build, inspect
from input_pipeline.records import BuiltSplit


@pytest.fixture(scope='module')
def built(clips, tmp_path_factory):
    """The motion clips as a built data set; as a function that copies it."""
    out = tmp_path_factory.mktemp('built') / 'motion'
    words = ['motion_clips', '--annotations', clips, '--videos', clips, '--out', out]
    words += ['--records_per_shard', 6, '--workers', 0]
    assert build.main(list(map(str, words))) == 0
    return out


def test_figures_and_pictures_of_every_class(built, tmp_path, capsys):
    words = ['--out', str(tmp_path), '--videos', '2']
    assert inspect.main([str(built), *words]) == 0
    assert 'all 28 records are right' in capsys.readouterr().out
    figures = json.loads((tmp_path / 'statistics.json').read_text())
    train = figures['train']
    assert (train['records'], train['shards'], train['frames']) == (18, 3, 18 * 16)
    assert train['sizes'] == {'48 x 48': 18}
    assert train['duration'] == {'min': 1, 'median': 1, 'max': 1}
    assert train['classes of head 1']['number'] == 8
    assert train['classes of head 1']['most videos'] == 3
    assert (tmp_path / 'check.jsonl').read_text() == ''
    assert cv2.imread(str(tmp_path / 'statistics.png')) is not None
    for split in ('train', 'validation'):
        sheets = sorted((tmp_path / split).glob('*.png'))
        assert [sheet.name[:4] for sheet in sheets] == [f'{k:04d}' for k in range(8)]
    # A frame of the first video of class 0 is on its sheet.
    sheet = cv2.imread(str(sheets[0]))
    assert sheet.shape[1] == 800
    assert len(np.unique(sheet.reshape(-1, 3), axis=0)) > 100


def test_sheets_are_as_high_as_their_frames_and_constants_have_no_axes(built, tmp_path):
    source = BuiltSplit(built, 'train')
    inspect.draw_sheet(source, 'square', [0, 1], tmp_path / 'square.png')
    inspect.draw_statistics([source], tmp_path / 'statistics.png')
    sheet, statistics = (cv2.imread(str(tmp_path / f'{n}.png')) for n in ('square', 'statistics'))
    assert (sheet.min(axis=2) > 250).mean() < 1 / 3  # white
    # Of four figures one varies: a panel of two thirds of the width is all there is.
    assert statistics.shape[1] == 864


def test_the_title_of_a_set_of_one_video_is_whole(built, tmp_path):
    source = BuiltSplit(built, 'train')
    source.index.facts['duration'][:] = 10.027
    source.index.facts['fps'][:] = 29.97
    source.index.num_bytes[:] = 123_456
    inspect.draw_statistics([source], tmp_path / 'statistics.png')
    picture = cv2.imread(str(tmp_path / 'statistics.png'))
    for axis in (0, 1):
        ink = np.flatnonzero((picture.min(axis=2) < 200).any(axis=1 - axis))
        assert ink[0] > 2 and ink[-1] < picture.shape[axis] - 2


def test_every_kind_of_damage_is_found(built, tmp_path, capsys):
    folder = tmp_path / 'damaged'
    shutil.copytree(built, folder)
    train, validation = (BuiltSplit(folder, name) for name in ('train', 'validation'))
    shards = [folder / name for name in train.index.shards]
    shards[0].write_bytes(shards[0].read_bytes()[:66_000])  # records 0 to 5
    shards[1].unlink()  # records 6 to 11
    # Another shard in the place of one: intact, and not what the index says.
    shutil.copy(folder / validation.index.shards[0], shards[2])  # records 12 to 17
    words = [str(folder), '--out', f'{tmp_path}/look', '--videos', '1']
    assert inspect.main(words) == 1
    lines = (tmp_path / 'look/check.jsonl').read_text().splitlines()
    kinds = {entry['index']: entry['kind'] for entry in map(json.loads, lines)}
    assert kinds == dict.fromkeys(range(12), 'unreadable') | dict.fromkeys(
        range(12, 18), 'checksum'
    )
    assert '18 of 28 records are bad' in ' '.join(capsys.readouterr().out.split())


def test_sets_of_captions_and_odd_names(clips, tmp_path):
    entries = [
        {'path': f'{k:06d}.mp4', 'captions': [f'costs $5 or ${k}_ \\frac{{', 'two']}
        for k in range(3)
    ]
    (tmp_path / 'train.jsonl').write_text('\n'.join(map(json.dumps, entries)))
    words = ['custom', '--list', f'train={tmp_path}/train.jsonl', '--videos', f'{clips}/train']
    assert build.main([*words, '--out', f'{tmp_path}/built', '--workers', '0']) == 0
    assert inspect.main([f'{tmp_path}/built', '--videos', '2', '--full']) == 0
    figures = json.loads((tmp_path / 'built/inspection/statistics.json').read_text())
    assert figures['train']['captions'] == 6
    sheets = sorted((tmp_path / 'built/inspection/train').iterdir())
    assert [sheet.name for sheet in sheets] == ['000000.png', '000002.png']


def test_another_folder_is_an_error(tmp_path, built, capsys):
    assert inspect.main([str(tmp_path)]) == 2
    assert inspect.main([str(built), '--splits', 'test']) == 2
    assert 'it has train, validation' in ' '.join(capsys.readouterr().out.split())
