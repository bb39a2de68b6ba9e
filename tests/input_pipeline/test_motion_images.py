from collections import Counter

import cv2
import numpy as np
import pytest
from ml_collections import ConfigDict
from video_files import contents

from dist_jax import recipe
from dist_jax.configs import base
from dist_jax.dataset import make
from input_pipeline import built_in, motion_clips, pipeline, world
from input_pipeline.motion_images import CLASS_NAMES, LOOKS, generate, render_image
from input_pipeline.sources import open_source

NUM = len(CLASS_NAMES)
SMALL = {'num_train': 2 * NUM, 'num_val': NUM, 'size': 48}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp('data') / 'images'
    assert generate(path, **SMALL)
    return path


def config(folder) -> ConfigDict:
    found = base.get_config()
    base.demo(found)
    found.data.update(name='motion_images', num_frames=1, root=str(folder), flip=True)
    recipe.prepare_builtin_data(found, '')
    return found


def test_lists_labels_and_balance(folder):
    for split, count in (('train', 2), ('val', 1)):
        source = open_source(folder / f'{split}.txt', label_map=folder / 'labels.txt')
        assert source.class_names == CLASS_NAMES
        assert Counter(source[k].label for k in range(len(source))) == dict.fromkeys(
            range(NUM), count
        )
    assert len(set(CLASS_NAMES)) == NUM == len(set(LOOKS))
    assert CLASS_NAMES[0] == 'warm halved polygon'


def test_the_same_seed_gives_the_same_bytes_and_another_one_does_not(folder, tmp_path):
    generate(tmp_path / 'again', **SMALL, num_threads=3)
    assert contents(tmp_path / 'again') == contents(folder)
    generate(tmp_path / 'other', **SMALL, seed=1)
    other = contents(tmp_path / 'other')
    names = [name for name in other if name.endswith('.jpg')]
    assert len({other[name] for name in names} | {contents(folder)[n] for n in names}) == 6 * NUM


def test_one_set_does_not_pass_for_the_other(folder):
    with pytest.raises(ValueError, match=r"holds another set.*'motion_images', 'motion_clips'"):
        motion_clips.generate(folder)
    assert not generate(folder, **SMALL)


def test_reading_gives_clips_of_one_frame(folder):
    """What was drawn, with its label, in training (in which some are mirrored) and in testing."""
    found = config(folder)
    source = recipe.open_split(found, 'val')
    for k in range(NUM):
        drawn = render_image(0, 'val', k, 48, k).astype(int)
        views, rows = recipe.eval_reader(found).read(source[k])
        assert views.shape == (1, 1, 48, 48, 3) and rows['label'] == k
        assert np.abs(views[0, 0] - drawn).mean() < 5
        rng = pipeline.record_rng(0, 0, k)
        (clip,), (rows,) = recipe.train_reader(found).read(source[k], rng)
        assert clip.shape == (1, 48, 48, 3) and rows['label'] == k
        assert min(np.abs(clip[0] - side).mean() for side in (drawn, drawn[:, ::-1])) < 5


def test_objects_have_the_colour_of_the_class():
    for label, look in enumerate(LOOKS):
        picture = render_image(0, 'train', label, 48, label).astype(int)
        bright = picture[picture.max(2) > 230]  # none of the ground and of the dark tone is
        red, _, blue = bright.mean(0)
        assert len(bright) > 100
        assert (red > blue + 60) == (look.colour == 'warm')
        assert (blue > red + 60) == (look.colour == 'cool')


@pytest.mark.parametrize('shape', sorted({look.shape for look in LOOKS}))
def test_all_shapes_have_the_same_area_and_stay_inside_their_box(shape):
    """Otherwise how much of a picture is ground tells them apart."""
    look = next(look for look in LOOKS if look.shape == shape)
    radius = 0.2 * 96 * 1.2  # the largest, at twice the usual size
    for seed in range(20):
        alpha = world.draw_sprite(np.random.default_rng(seed), 48, radius, look)[..., 3]
        assert alpha.sum() == pytest.approx(look.area * radius**2, rel=0.06)
        border = np.concatenate([alpha[0], alpha[-1], alpha[:, 0], alpha[:, -1]])
        assert border.max() < 0.5


def test_shapes_and_textures_differ():
    """The share of an object's convex hull that it fills, and how often its tones change."""

    def solidity(points):
        points = points.astype(np.float32)
        return cv2.contourArea(points) / cv2.contourArea(cv2.convexHull(points))

    filled = {
        name: np.mean([solidity(shape(np.random.default_rng(k), 10.0)) for k in range(20)])
        for name, shape in world.SHAPES.items()
    }
    assert filled['star'] < filled['cross'] < filled['polygon'] <= filled['bar']
    along, across = np.mgrid[-12:12, -12:12] + 0.5
    changes = {
        name: [np.diff(texture(along, across, 8.0) > 0, axis=axis).sum() for axis in (0, 1)]
        for name, texture in world.TEXTURES.items()
    }
    assert changes == {'halved': [24, 0], 'striped': [120, 0], 'checked': [120, 120]}
    for texture in world.TEXTURES.values():
        assert (texture(along, across, 8.0) > 0).mean() == 0.5


def test_mean_colours_tell_little_of_the_class():
    """Least squares on them: about what knowing warm from cool gives, 2 / 24."""
    data = {
        split: [render_image(0, split, k, 48, k % NUM).mean((0, 1)) for k in range(count)]
        for split, count in zip(built_in.SPLITS, (240, 120))
    }
    train, val = (np.insert(np.stack(data[split]) / 255, 0, 1, 1) for split in built_in.SPLITS)
    weights = np.linalg.lstsq(train, np.eye(NUM)[np.arange(240) % NUM], rcond=None)[0]
    assert ((val @ weights).argmax(1) == np.arange(120) % NUM).mean() < 0.15


def test_command_writes_images_and_a_contact_sheet(tmp_path, capsys):
    out = tmp_path / 'images'
    arguments = ['--images', '--out', str(out), '--num_train', '4', '--num_val', '4']
    assert make.main(arguments) == 0
    assert 'wrote' in capsys.readouterr().out
    assert (out / 'contact_sheet.png').read_bytes()[:4] == b'\x89PNG'
    assert len(contents(out / 'train')) == 4
    with pytest.raises(SystemExit):
        make.main([*arguments, '--fps', '8'])
    assert '--fps: images have none' in capsys.readouterr().err
