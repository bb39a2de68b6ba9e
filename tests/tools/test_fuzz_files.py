"""The fuzz of files: what it makes, how it bounds the reader, and that checkpoints pass it."""

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest

from tools import fuzz_files
from tools.fuzzing import checkpoints, damage
from tools.fuzzing.child import BUGS, LOADED, REFUSED, Child, Input


def misbehave(path: Path) -> None:
    """Does what the file says."""
    match path.read_text():
        case 'load':
            pass
        case 'refuse':
            raise ValueError(f'{path}: no')
        case 'unclear':
            raise ValueError('no')
        case 'exception':
            raise TypeError('unexpected')
        case 'crash':
            os.abort()
        case 'hang':
            time.sleep(60)
        case 'touch':
            np.ones(48 << 20, np.uint8).sum()
        case 'ask':
            np.zeros(1 << 40, np.uint8)


def test_every_way_to_end_is_told_from_the_others(tmp_path):
    outcomes = {}
    (tmp_path / 'good').write_text('load')
    with Child(misbehave, [Input(tmp_path / 'good', 'good')], 5, 32) as child:
        for what in ('load', 'refuse', 'unclear', 'exception', 'crash', 'touch', 'ask', 'load'):
            (tmp_path / f'{what}_1').write_text(what)
            outcomes[what] = child.read(Input(tmp_path / f'{what}_1', 'test'))
        child.timeout = 0.5
        (tmp_path / 'hang_1').write_text('hang')
        outcomes['hang'] = child.read(Input(tmp_path / 'hang_1', 'test'))
    assert {what: outcome.kind for what, outcome in outcomes.items()} == {
        'load': LOADED,
        'refuse': REFUSED,
        'unclear': 'unclear',
        'exception': 'exception',
        'crash': 'crash',
        'touch': 'memory',
        'ask': 'memory',
        'hang': 'hang',
    }
    assert 40 < outcomes['touch'].mebibytes < 80 > outcomes['load'].mebibytes
    assert outcomes['crash'].message == 'SIGABRT'
    assert 'TypeError: unexpected' in outcomes['exception'].message


@pytest.mark.slow
def test_damaged_checkpoints_load_or_are_refused_by_name(tmp_path, capsys):
    report = tmp_path / 'figures.json'
    words = ['--kinds', 'checkpoint', '--inputs', '40', '--timeout', '120', '--json', str(report)]
    code = fuzz_files.main(words)
    assert code == 0, capsys.readouterr().out
    figures = json.loads(report.read_text())['checkpoint']['made_by']
    assert set(figures) == {*checkpoints.WAYS, 'all'}
    assert figures['all']['inputs'] == sum(figures['all']['outcomes'].values()) == 40
    assert figures['all']['outcomes'].keys() == {LOADED, REFUSED}
    assert figures['all']['mebibytes']['max'] < 200


@pytest.mark.slow
def test_small_files_that_ask_for_the_world_cost_little(tmp_path):
    golden = fuzz_files.GOLDEN
    good = checkpoints.prepare(tmp_path / 'good', golden)[:1]
    with Child(checkpoints.read, good, 60, 256) as child:
        for number, (name, write) in enumerate(checkpoints.HOSTILE.items()):
            folder = tmp_path / f'hostile_{number}'
            folder.mkdir()
            write(folder / 'a.pt', 20)
            outcome = child.read(Input(folder, name))
            assert outcome.kind == REFUSED, (name, outcome)


@pytest.mark.parametrize('kind', ['list', 'label_map'])
def test_lists_are_made_anew_for_a_seed(tmp_path, kind):
    made = fuzz_files.KINDS[kind]
    good = made.prepare(tmp_path / 'good')
    texts = []
    for turn in range(2):
        folder = tmp_path / str(turn)
        folder.mkdir()
        for number in range(60):
            item = made.write(good, folder / str(number), np.random.default_rng(number), number)
            files = [item.path] if item.path.is_file() else sorted(item.path.rglob('*'))
            texts.append([file.read_bytes() for file in files if file.is_file()])
    assert texts[:60] == texts[60:]
    assert len(set(map(str, texts))) > 40


def test_json_stays_text_and_changes():
    value = {'a': [1, {'b': 'c'}], 'd': None}
    made = {damage.json_of(value, np.random.default_rng(k)) for k in range(50)}
    assert len(made) > 25
    assert value == {'a': [1, {'b': 'c'}], 'd': None}


def test_a_bug_is_listed_kept_and_ends_with_1(tmp_path, capsys, monkeypatch):
    def write(seeds, path, rng, number):
        path.write_text(('load', 'exception')[number % 2])
        return Input(path, 'test')

    def prepare(folder):
        folder.mkdir()
        (folder / 'good').write_text('load')
        return [Input(folder / 'good', 'good')]

    monkeypatch.setitem(fuzz_files.KINDS, 'list', fuzz_files.Kind(prepare, write, misbehave))
    kept = tmp_path / 'kept'
    assert fuzz_files.main(['--kinds', 'list', '--inputs', '3', '--keep', str(kept)]) == 1
    assert [file.read_text() for file in kept.iterdir()] == ['exception']
    printed = capsys.readouterr().out
    assert 'list_00001 (test): exception:' in printed
    assert f'0 unclear, 1 exception, {", ".join(f"0 {kind}" for kind in BUGS[2:])}' in printed
