"""The recipes as the documentation shows them, and their picture."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from dist_jax.configs.inputs import INPUTS
from dist_jax.dataset import augmentations
from tools import benchmark_transforms

PAGE = (Path(__file__).parents[2] / 'docs' / 'guides' / 'augmentation.md').read_text()


def test_the_documentation_shows_the_recipes_as_they_are():
    assert augmentations.table() in PAGE
    for name in INPUTS:
        assert f'{name}:\n\n```sh\n{augmentations.flags(name)}\n```' in PAGE


def test_a_sheet_has_all_clips_and_views(tmp_path, capsys):
    output = tmp_path / 'sheet.png'
    arguments = ['--recipes', 'side4video_ssv2', 'evl_k400', '--draws', '1']
    assert augmentations.main([*arguments, '--output', str(output)]) == 0
    assert '5 rows' in capsys.readouterr().out  # two copies and the views; one and the views
    assert cv2.imread(str(output)).std() > 10


def test_a_sheet_of_many_rows_is_wider_than_high(tmp_path):
    frames = [np.full((8, 8, 3), 99, np.uint8)] * 2
    for count, columns in ((3, 1), (12, 2)):
        path = tmp_path / f'{count}.png'
        augmentations.draw_sheet([('row', frames, [0, 1])] * count, path)
        height, width = cv2.imread(str(path)).shape[:2]
        assert width == 800 * columns and height < width


def test_fields_can_be_changed(tmp_path):
    config = augmentations.recipe_config('dist_k400', ['data.resize=(64, 80)', 'data.crop=x'])
    assert (config.data.resize, config.data.crop) == ((64, 80), 'x')
    with pytest.raises(ValueError, match=r'--set data.flip: expected group.field=value'):
        augmentations.recipe_config('dist_k400', ['data.flip'])


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--set', 'data.crop=middle'], "data.crop='middle' is not one of"),
        (['--set', 'data.ease=1'], '--set data.ease=1'),
        (['nowhere.mp4'], 'nowhere.mp4'),
    ],
)
def test_wrong_arguments_are_explained(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert augmentations.main([*arguments, '--recipes', 'dist_k400']) == 1
    assert message in capsys.readouterr().err.replace('\n', ' ')
    assert not list(tmp_path.iterdir())


def test_every_transform_is_timed(tmp_path):
    video = benchmark_transforms.make_clip(1, 64, 80)
    assert video.shape == (1, 64, 80, 3)
    figures = benchmark_transforms.host_figures(video, 1)
    assert {'flip', 'erasing, pixel', 'Rotate, bicubic'} <= figures.keys()
    assert benchmark_transforms.recipe_figures(video, 1).keys() == INPUTS.keys()
