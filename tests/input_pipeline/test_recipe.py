"""From the fields of a config to the readers."""

import numpy as np
import pytest

from configs import base
from dist_jax import checkpoint, experiment
from input_pipeline.randaugment import RandAugment
from input_pipeline.transforms import CentreCrop, Flip, RandomResizedCrop

POLICY = 'rand-m7-n4-mstd0.5-inc1'


def config(**data):
    found = base.get_config()
    found.lock()
    found.data.update(data)
    return found


def kinds(reader):
    return [type(transform) for transform in reader.transforms]


def test_rand_augment_sees_whole_frames_before_flip_and_crop():
    reader = experiment.train_reader(config(rand_augment=POLICY, grayscale=0.0))
    assert kinds(reader) == [RandAugment, Flip, RandomResizedCrop]
    assert reader.transforms[0] == RandAugment(7.0, 4, 0.5, True)
    assert RandAugment not in kinds(experiment.train_reader(config()))


def test_a_wrong_policy_is_refused_before_anything_is_read():
    with pytest.raises(ValueError, match="rand_augment='rand-m70'"):
        experiment.train_reader(config(rand_augment='rand-m70'))


def test_sampling_reaches_both_readers():
    changed = config(sampling='stride', frame_interval=16)
    for reader in (experiment.train_reader(changed), experiment.eval_reader(changed)):
        assert (reader.sampling, reader.interval) == ('stride', 16)


def test_rounding_reaches_every_crop_that_is_not_random():
    changed = config(crop_rounding='down', crop_area=(), flip=False, grayscale=0.0)
    assert experiment.eval_reader(changed).rounding == 'down'
    assert experiment.train_reader(changed).transforms == (CentreCrop(224, 'down'),)
    assert experiment.eval_reader(config()).rounding == 'nearest'


@pytest.mark.parametrize(
    'change',
    [
        {'sampling': 'stride'},
        {'frame_interval': 16},
        {'rand_augment': POLICY},
        {'crop_rounding': 'down'},
    ],
)
def test_a_run_is_not_continued_with_another_stream(change):
    def metadata(found):
        return {
            'config': checkpoint.plain(found),
            'class_names': [],
            'train_list_sha256': '',
            'backbone': {'params_sha256': ''},
        }

    with pytest.raises(ValueError, match=f'data.{next(iter(change))}: saved'):
        checkpoint.check_same_run(metadata(config()), metadata(config(**change)))


def test_an_augmented_clip_has_the_shape_of_the_reader():
    reader = experiment.train_reader(config(rand_augment=POLICY, num_frames=2, image_size=32))
    video = np.random.default_rng(0).integers(0, 256, (2, 40, 60, 3), dtype=np.uint8)
    for seed in range(5):
        rng = np.random.default_rng(seed)
        clip, label = video, 1
        for transform in reader.transforms:
            clip, label = transform(clip, label, rng)
        assert clip.shape == reader.shape
