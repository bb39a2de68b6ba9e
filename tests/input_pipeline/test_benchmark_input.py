import json

import pytest
from video_files import pictures, write_video

from tools import benchmark_input


@pytest.mark.slow
def test_benchmark_writes_its_figures(tmp_path, capsys):
    for k in range(2):
        write_video(tmp_path / f'{k}.mp4', pictures(20, 64, 80, seed=k))
    (tmp_path / 'list.txt').write_text('0.mp4 0\n1.mp4 0\n')
    report, picture = tmp_path / 'figures.json', tmp_path / 'figures.png'
    arguments = ['--list', f'{tmp_path}/list.txt', '--json', str(report), '--plot', str(picture)]
    assert benchmark_input.main(['--quick', *arguments]) == 0
    figures = json.loads(report.read_text())
    published = figures['published_style_clips_per_s']
    assert published > 0
    for kind in ('original', 'transcoded'):
        rate = figures[f'ours_{kind}_clips_per_s']
        assert figures[f'{kind}_ratio'] == pytest.approx(rate / published)
    wall = figures['scaling']['original']
    assert figures['two_worker_scaling'] == pytest.approx(wall['2 workers'] / wall['1 workers'])
    assert len(figures['rss_mib']) == 40 and min(figures['rss_mib']) > 50
    growth = benchmark_input.memory_growth(figures['rss_mib'])
    assert figures['rss_growth_mib'] == pytest.approx(growth)
    assert figures['list']['long list']['own_mib'] > 0
    assert set(figures['stage_ms']) == {'original', *benchmark_input.TRANSCODED}
    assert picture.read_bytes().startswith(b'\x89PNG')
    assert 'of published style' in capsys.readouterr().out


def test_growth_of_memory_is_from_the_second_fifth_to_the_last():
    assert benchmark_input.memory_growth([9, 9, 1, 1, 5, 5, 5, 5, 4, 4]) == 3


def test_a_host_needs_fewer_cores_when_clips_are_cheaper():
    needs = benchmark_input.host_needs(clips_per_core=50.0, scaling=2.0, trainer_ms=0.5)
    assert needs['needed_clips_per_s'] == 720
    assert needs['workers'] == 15 and needs['workers_at_half_speed'] == 29
    assert needs['trainer_cores'] == pytest.approx(0.36)
