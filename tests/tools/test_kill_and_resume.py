"""The command as README prints it."""

import subprocess

import pytest

from tools import kill_and_resume


def test_it_needs_no_arguments(tmp_path, monkeypatch, capsys):
    commands = []

    def run(command, check):
        commands.append(command)
        raise RuntimeError('far enough')

    monkeypatch.setattr(subprocess, 'run', run)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RuntimeError, match='far enough'):
        kill_and_resume.main([])
    assert '--workdir=runs/kill_and_resume/straight' in commands[0]
    (tmp_path / 'runs/kill_and_resume').mkdir(parents=True)
    with pytest.raises(SystemExit):
        kill_and_resume.main([])
    assert 'name a folder that does not: --workdir=FOLDER' in capsys.readouterr().err
