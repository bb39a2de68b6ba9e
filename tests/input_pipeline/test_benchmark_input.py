import json

import pytest
from video_files import pictures, write_video

from tools import benchmark_input


def test_benchmark_writes_its_figures(tmp_path, monkeypatch, capsys):
    for k in range(2):
        write_video(tmp_path / f'{k}.mp4', pictures(20, 64, 80, seed=k))
    (tmp_path / 'list.txt').write_text('0.mp4 0\n1.mp4 0\n')
    report = tmp_path / 'figures.json'
    arguments = ['--list', f'{tmp_path}/list.txt', '--json', str(report)]
    assert (
        benchmark_input.main([*arguments, '--frames', '4', '--repeats', '1', '--steps', '2']) == 0
    )
    figures = json.loads(report.read_text())
    assert figures['ours_clips_per_s_per_core'] > 0
    assert figures['two_thread_scaling'] == pytest.approx(
        figures['pipeline_2_threads_clips_per_s'] / figures['pipeline_1_threads_clips_per_s']
    )
    assert 'train pipeline, 2 thread(s)' in capsys.readouterr().out
