import json

import numpy as np
import pytest
from PIL import Image
from video_files import pictures, write_video

from dist_jax.models import sts
from input_pipeline.pipeline import TrainReader, record_rng
from input_pipeline.randaugment import RandAugment, Warp
from input_pipeline.transforms import Flip, RandomResizedCrop
from input_pipeline.video_list import Record
from tools import benchmark_input
from tools.benchmarking import images


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


@pytest.mark.slow
def test_pictures_are_measured_beside_pillow(tmp_path, capsys):
    for k in range(2):
        folder = tmp_path / f'pictures/n0000000{k}'
        folder.mkdir(parents=True)
        Image.fromarray(pictures(1, 96, 128, seed=k)[0]).save(folder / 'a.JPEG')
    report = tmp_path / 'figures.json'
    arguments = ['--images', '--list', f'{tmp_path}/pictures', '--json', str(report)]
    assert benchmark_input.main(['--quick', *arguments]) == 0
    figures = json.loads(report.read_text())
    rates = figures['clips_per_s']
    assert figures['ratio'] == pytest.approx(rates['ours'] / rates['Pillow, float32'])
    assert set(figures['scaling']['pictures']) >= {'1 workers', '2 workers', '1 threads'}
    assert 'of Pillow, float32' in capsys.readouterr().out
    with pytest.raises(SystemExit):
        benchmark_input.main(['--images', '--plot', 'figures.png'])


def test_both_pipelines_make_the_same_pixels_of_a_picture(tmp_path):
    paths = [str(tmp_path / f'{k}.JPEG') for k in range(3)]
    for k, path in enumerate(paths):
        images.write_picture(path, k)
    policy = RandAugment(7.0, 2, 0.5, True, warp=Warp('bicubic', (124, 116, 104)))
    crop = RandomResizedCrop(64, (0.08, 1.0), interpolation='smooth_bicubic')
    recipe = TrainReader(1, 64, transforms=(crop, policy, Flip()), repeats=2)
    benchmark_input.check_pictures(paths, recipe)
    for k in range(24):
        path = paths[k % 3]
        ours, _ = recipe.read(Record(path, 0, ''), record_rng(0, 0, k))
        theirs = images.read_with_pillow(path, record_rng(0, 0, k), recipe)
        for clip, levels in zip(ours, theirs):
            expected = sts.PIXELS.normalize(clip[0]).transpose(2, 0, 1)
            assert np.abs(levels - expected).mean() < 0.03  # two grey levels


def test_growth_of_memory_is_from_the_second_fifth_to_the_last():
    assert benchmark_input.memory_growth([9, 9, 1, 1, 5, 5, 5, 5, 4, 4]) == 3


def test_a_host_needs_fewer_cores_when_clips_are_cheaper():
    needs = benchmark_input.host_needs(clips_per_core=50.0, scaling=2.0, trainer_ms=0.5)
    assert needs['needed_clips_per_s'] == 720
    assert needs['workers'] == 15 and needs['workers_at_half_speed'] == 29
    assert needs['trainer_cores'] == pytest.approx(0.36)
