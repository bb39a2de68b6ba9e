"""Four ways to fine-tune, as runs of the command, a table, and a picture."""

import json
import subprocess
import types
from pathlib import Path

from tools import compare_sts

LAST = {
    'pictures_official': 0.625,
    'pictures_off': 0.5,
    'scratch_official': 0.375,
    'scratch_off': 0.25,
}


def test_all_are_trained_and_shown(tmp_path, monkeypatch, capsys):
    commands = []

    def run(command, check):
        commands.append(command)
        workdir = Path(command[-1].removeprefix('--workdir='))
        workdir.mkdir(parents=True)
        kind, _, seed = workdir.name.rpartition('_')
        last = LAST.get(kind, 0.625) + 0.25 * int(seed == '1')
        rows = [{'step': 1, 'loss': 2.0}, {'step': 2, 'val_top1': 0.25}]
        rows += [{'step': 4, 'val_top1': last}]
        (workdir / 'metrics.jsonl').write_text('\n'.join(map(json.dumps, rows)))
        return types.SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, 'run', run)
    assert compare_sts.main([f'--out={tmp_path}', '--seeds=2', 'config.num_steps=4']) == 0
    images, *clips = commands
    assert '--config=configs/sts.py:demo_images' in images and len(clips) == 8
    for command in clips:
        workdir = Path(command[-1].removeprefix('--workdir='))
        start, sts, seed = workdir.name.split('_')
        assert {f'--config.model.sts={sts}', f'--config.seed={seed}'} <= set(command)
        assert (f'--config.init_from={tmp_path / "images"}' in command) == (start == 'pictures')
        assert '--config.num_steps=4' in command
    shown = capsys.readouterr().out
    assert 'pictures: 62.5 %' in shown
    assert '75.0 % (62.5 to 87.5)' in shown and '37.5 % (25.0 to 50.0)' in shown
    found = json.loads((tmp_path / 'comparison.json').read_text())
    assert found['scratch_off'] == [[[2, 0.25], [4, 0.25]], [[2, 0.25], [4, 0.5]]]
    assert (tmp_path / 'comparison.png').read_bytes().startswith(b'\x89PNG')


def test_a_run_that_stopped_ends_it(tmp_path, monkeypatch):
    stopped = types.SimpleNamespace(returncode=75)
    monkeypatch.setattr(subprocess, 'run', lambda command, check: stopped)
    assert compare_sts.main([f'--out={tmp_path}']) == 75
