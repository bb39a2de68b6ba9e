"""Ways to train the demo of retrieval, as runs of the command and a table."""

import json
import subprocess
import types
from pathlib import Path

import pytest

from configs import base, side4video_retrieval
from tools import compare_retrieval


def workdir_of(command):
    (option,) = (part for part in command if part.startswith('--workdir='))
    return Path(option.removeprefix('--workdir='))


def test_all_are_trained_and_shown(tmp_path, monkeypatch, capsys):
    commands = []

    def run(command, check):
        commands.append(command)
        workdir = workdir_of(command)
        workdir.mkdir(parents=True)
        recall = 0.5 if workdir.name == 'wti_1' else 0.25
        names = (*compare_retrieval.SHARES, compare_retrieval.RANK)
        found = {f'val_{name}': 3.0 if 'rank' in name else recall for name in names}
        (workdir / 'summary.json').write_text(json.dumps(found))
        return types.SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, 'run', run)
    options = [f'--out={tmp_path}', '--seeds=2', 'config.batch_size=8']
    assert compare_retrieval.main(options) == 0
    names = [kind.replace(' ', '_') for kind in compare_retrieval.KINDS]
    expected = [f'{name}_{seed}' for seed in (0, 1) for name in names]
    assert [workdir_of(command).name for command in commands] == expected
    for command in commands:
        assert f'--config.seed={workdir_of(command).name[-1]}' in command
        assert '--config.batch_size=8' in command
    shown = capsys.readouterr().out
    assert '37.5 % (25.0 to 50.0)' in shown and 'untrained' in shown
    found = json.loads((tmp_path / 'comparison.json').read_text())
    assert [run['t2v_r1'] for run in found['wti']] == [0.25, 0.5]


def test_fields_are_those_of_the_demo():
    known = base.flat(side4video_retrieval.get_config('demo'))
    for fields in compare_retrieval.KINDS.values():
        assert {field.removeprefix('config.').partition('=')[0] for field in fields} <= set(known)


def test_what_stops_or_is_unknown_ends_it(tmp_path, monkeypatch, capsys):
    stopped = types.SimpleNamespace(returncode=75)
    monkeypatch.setattr(subprocess, 'run', lambda command, check: stopped)
    assert compare_retrieval.main([f'--out={tmp_path}', '--kinds=wti']) == 75
    with pytest.raises(SystemExit):
        compare_retrieval.main([f'--out={tmp_path}', '--kinds=wti,max'])
    assert 'no max; there are: wti, meanP' in capsys.readouterr().err
