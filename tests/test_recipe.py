"""From the fields of a config to the readers."""

import cv2
import numpy as np
import pytest
from video_files import decode_everything, pictures, write_video

from dist_jax import checkpoint, experiment, recipe
from dist_jax.configs import base, dist, evl, frame_mean
from dist_jax.configs.inputs import INPUTS
from dist_jax.models import clip
from dist_jax.models.frozen import ClassTexts
from input_pipeline.datasets import DATASETS
from input_pipeline.pipeline import record_rng
from input_pipeline.randaugment import AutoAugment, RandAugment, Warp
from input_pipeline.sampling import PROTOCOLS
from input_pipeline.transforms import (
    CentreCrop,
    ColourJitter,
    Flip,
    Grayscale,
    MultiScaleCrop,
    RandomErasing,
    RandomResizedCrop,
    Resize,
)
from input_pipeline.video_list import Record

POLICY = 'rand-m7-n4-mstd0.5-inc1'


def config(**data):
    found = base.get_config()
    found.lock()
    found.data.update(data)
    return found


def published(name, **fields):
    found = base.get_config()
    found.lock()
    found.update_from_flattened_dict(INPUTS[name] | fields)
    return found


def kinds(reader):
    return [type(transform) for transform in reader.transforms]


def test_rand_augment_sees_whole_frames_before_the_crop_and_mirroring_the_cropped_ones():
    reader = recipe.train_reader(config(rand_augment=POLICY, grayscale=0.0))
    assert kinds(reader) == [RandAugment, RandomResizedCrop, Flip]
    assert reader.transforms[0] == RandAugment(7.0, 4, 0.5, True)
    assert RandAugment not in kinds(recipe.train_reader(config()))
    after = config(rand_augment=POLICY, augment_after_crop=True, augment_fill=(1, 2, 3))
    reader = recipe.train_reader(after)
    assert kinds(reader) == [RandomResizedCrop, RandAugment, Flip, Grayscale]
    assert reader.transforms[1].warp == Warp('bicubic', (1, 2, 3))


def test_everything_at_once_is_in_order():
    reader = recipe.train_reader(
        config(
            auto_augment='original-mstd0.5',
            augment_interpolation='bilinear',
            resize=(256, 320),
            resize_interpolation='bicubic',
            crop='multi_scale',
            colour_jitter=0.8,
            erase=0.25,
            erase_mode='pixel',
            repeats=2,
        ),
        clip.PIXELS,
    )
    assert kinds(reader) == [
        AutoAugment,
        Resize,
        MultiScaleCrop,
        Flip,
        ColourJitter,
        Grayscale,
        RandomErasing,
    ]
    assert reader.transforms[0] == AutoAugment('original', 0.5, Warp('bilinear'))
    assert reader.transforms[1] == Resize((256, 320), 'bicubic')
    np.testing.assert_allclose(reader.transforms[-1].mean, 255 * np.array(clip.PIXELS.mean))
    assert reader.repeats == 2


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'rand_augment': 'rand-m70'}, "rand_augment='rand-m70'"),
        ({'auto_augment': 'v0'}, "auto_augment='v0' starts with 'v0'"),
        ({'auto_augment': 'original', 'rand_augment': POLICY}, 'exclude each other'),
        ({'augment_interpolation': 'cubic'}, 'data.augment_interpolation.*bicubic'),
        ({'augment_fill': (0, 0)}, 'data.augment_fill.*three levels'),
        ({'resize': (1, 2, 3)}, r'data.resize.*size=\(1, 2, 3\)'),
        ({'resize': (256,), 'resize_interpolation': 'area'}, 'data.resize_interpolation.*area'),
        ({'crop': 'random'}, 'data.crop=.random. is not one of random_resized, multi_scale'),
        ({'crop_area': ()}, r'data.crop_area.*area=\(\) must be two shares'),
        ({'crop_interpolation': 'area'}, 'data.crop_interpolation.*area'),
        ({'crop': 'multi_scale', 'crop_scales': (2.0,)}, 'data.crop_scales.*scales='),
        ({'crop': 'centre', 'resize': (200,)}, 'data.resize.*smaller than image_size=224'),
        ({'crop': 'centre', 'crop_rounding': 'up'}, 'data.crop_rounding.*rounding='),
        ({'erase': 0.1, 'erase_mode': 'black'}, 'data.erase_mode.*black'),
        ({'sampling': 'dense'}, "data.sampling.*sampling='dense'"),
        ({'sampling': 'stride', 'frame_interval': 0}, 'data.frame_interval.*interval=0'),
        ({'repeats': 0}, 'data.repeats.*repeats=0'),
        ({'grayscale': 20.0}, 'data.grayscale=20.0 must be a share'),
        ({'erase': -0.1}, 'data.erase=-0.1 must be a share'),
    ],
)
def test_wrong_fields_are_named_before_anything_is_read(fields, message):
    found = base.get_config()
    with pytest.raises(ValueError, match=message):
        found.update_from_flattened_dict({f'data.{k}': v for k, v in fields.items()})
        recipe.train_reader(found)


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'eval.num_crops': 10}, 'config.eval.*num_crops=10 must be 1 or 3'),
        ({'eval.crop_layout': 'corners'}, "layout='corners' must be one of"),
        ({'eval.resize': (200,)}, 'smaller than image_size=224'),
        ({'eval.image_size': 256, 'eval.resize': (240,)}, 'smaller than image_size=256'),
    ],
)
def test_wrong_test_views_are_named_before_anything_is_read(fields, message):
    found = base.get_config()
    found.update_from_flattened_dict(fields)
    with pytest.raises(ValueError, match=message):
        recipe.eval_reader(found)


@pytest.mark.parametrize('family', [dist, frame_mean])
def test_another_test_size_changes_the_test_model_alone(family):
    found = family.get_config('demo')
    found.data.image_size, found.eval.image_size = 48, 64
    parts = experiment.assemble(found, (('a', 'b'),), experiment.sized_backbone(found))
    assert (parts.train_shape[1:], parts.test_shape[1:]) == ((48, 48, 3), (64, 64, 3))
    assert parts.abstract_variables() == parts.abstract_variables(test=True)
    for test, tokens in ((False, 1 + 6 * 6), (True, 1 + 8 * 8)):
        frozen = parts.abstract_frozen(test)
        assert frozen['visual']['positional_embedding'].shape[0] == tokens
    found.eval.image_size = 48
    parts = experiment.assemble(found, (('a', 'b'),), experiment.sized_backbone(found))
    assert parts.test_model is parts.model


def test_another_test_size_is_refused_where_parameters_have_the_size():
    found = evl.get_config('demo')
    found.data.image_size, found.eval.image_size = 48, 64
    with pytest.raises(ValueError) as error:
        experiment.assemble(found, (('a', 'b'),), experiment.sized_backbone(found))
    message = str(error.value)
    assert 'eval.image_size=64 is not data.image_size=48' in message
    assert 'layers/temporal/relative is (1, 2, 121, 64) there' in message
    assert 'set eval.image_size=0' in message


def test_sampling_reaches_both_readers():
    changed = config(sampling='stride', frame_interval=16)
    for reader in (recipe.train_reader(changed), recipe.eval_reader(changed)):
        assert (reader.sampling, reader.interval) == ('stride', 16)


def test_rounding_reaches_every_crop_that_is_not_random():
    changed = config(crop_rounding='down', crop='centre', flip=False, grayscale=0.0)
    assert recipe.eval_reader(changed).rounding == 'down'
    assert recipe.train_reader(changed).transforms == (CentreCrop(224, 'down'),)
    assert recipe.eval_reader(config()).rounding == 'nearest'


@pytest.mark.parametrize(
    'change',
    [
        {'sampling': 'stride'},
        {'frame_interval': 16},
        {'rand_augment': POLICY},
        {'crop_rounding': 'down'},
        {'repeats': 2},
        {'resize': (256,)},
    ],
)
def test_a_run_is_not_continued_with_another_stream(change):
    def metadata(found):
        saved = base.plain(found)
        saved['model']['family'] = 'frame_mean'  # which has no fields of its own
        return {
            'config': saved,
            'class_names': [],
            'train_list_sha256': '',
            'backbone': {'params_sha256': ''},
        }

    with pytest.raises(ValueError, match=f'data.{next(iter(change))}: saved'):
        checkpoint.check_same_run(metadata(config()), metadata(config(**change)))
    before = metadata(config())  # of a run that is older than the field
    del before['config']['data']['split_names']
    checkpoint.check_same_run(before, metadata(config(split_names=False)))
    with pytest.raises(ValueError, match=r'data\.split_names: saved False, now True'):
        checkpoint.check_same_run(before, metadata(config()))


def test_an_augmented_clip_has_the_shape_of_the_reader():
    reader = recipe.train_reader(config(rand_augment=POLICY, num_frames=2, image_size=32))
    video = np.random.default_rng(0).integers(0, 256, (2, 40, 60, 3), dtype=np.uint8)
    for seed in range(5):
        rng = np.random.default_rng(seed)
        frames, label = video, 1
        for transform in reader.transforms:
            frames, label = transform(frames, label, rng)
        assert frames.shape == reader.shape


@pytest.fixture(scope='module')
def record(tmp_path_factory):
    path = tmp_path_factory.mktemp('video') / 'video.mp4'
    return Record(str(write_video(path, pictures(90, 264, 352))), 86, 'video')


@pytest.mark.parametrize('name', INPUTS)
def test_every_recipe_reads_a_video(name, record):
    found = published(name)
    found.data.name = 'something_v2' if 'ssv2' in name else 'kinetics400'
    train, test = recipe.train_reader(found), recipe.eval_reader(found)
    seen = set()
    for epoch in range(4):
        clips, rows = train.read(record, record_rng(0, epoch, 5))
        assert len(clips) == len(rows) == found.data.repeats
        for video in clips:
            assert video.shape == (found.data.num_frames, 224, 224, 3)
        seen.update(int(row['label']) for row in rows)
        again = train.read(record, record_rng(0, epoch, 5))[0]
        np.testing.assert_array_equal(clips, again)
    # Something-Something's labels of sides swap with the flip, others never change.
    assert seen == ({86, 87} if name.endswith('ssv2') and found.data.flip else {86})
    views, _ = test.read(record)
    size = found.eval.image_size or 224
    count = found.eval.num_clips * found.eval.num_crops
    assert views.shape == (count, found.data.num_frames, size, size, 3)


def test_recipes_follow_their_papers():
    ss = recipe.train_reader(published('side4video_ssv2', **{'data.name': 'something_v2'}))
    assert kinds(ss) == [RandAugment, Resize, RandomResizedCrop, Flip]
    assert ss.transforms[1] == Resize((256, 320), 'smooth_bicubic', 'torchvision')
    assert ss.transforms[2].swap and ss.transforms[2].area == (0.08, 1.0)
    assert ss.transforms[3].label_pairs == ((86, 87), (93, 94), (166, 167))
    k400 = recipe.train_reader(published('side4video_k400'))
    assert kinds(k400) == [Resize, RandomResizedCrop, Flip, Grayscale]
    sts = recipe.train_reader(published('sts_k400'))
    assert kinds(sts) == [Resize, RandomResizedCrop, Flip]
    assert recipe.eval_reader(published('sts_k400')).num_views == 30
    assert kinds(recipe.train_reader(published('sts_ssv2'))) == [Resize, RandomResizedCrop]
    assert kinds(recipe.train_reader(published('evl_k400'))) == [RandAugment, RandomResizedCrop]
    image = recipe.train_reader(published('sts_imagenet'))
    assert kinds(image) == [RandomResizedCrop, RandAugment, Flip]
    policy = RandAugment(7.0, 2, 0.5, True, 0.5, 10.0, Warp('bicubic', (124, 116, 104)))
    assert (image.transforms[1], image.num_frames, image.repeats) == (policy, 1, 3)
    retrieval = recipe.train_reader(published('side4video_retrieval'))
    assert kinds(retrieval) == [CentreCrop]


@pytest.mark.parametrize(
    ('name', 'names', 'pairs'),
    [
        ('something_v2', (), ((86, 87), (93, 94), (166, 167))),
        ('something_v2', (('0', '1', '2'),), ((86, 87), (93, 94), (166, 167))),
        ('something_v2', (('push right', 'hold', 'push left'),), ((0, 2),)),
        ('custom', (('turn left', 'turn right'),), ((0, 1),)),
        ('kinetics400', (('archery', 'bowling'),), ()),
        ('epic_kitchens', (('take', 'put'), ('cup', 'left hand')), ()),
    ],
)
def test_a_mirrored_clip_swaps_the_labels_that_its_class_names_say(name, names, pairs):
    reader = recipe.train_reader(config(name=name), labels=names)
    (flip,) = (step for step in reader.transforms if isinstance(step, Flip))
    assert flip.label_pairs == pairs


def test_what_a_mirrored_clip_swaps_is_said(caplog):
    caplog.set_level('INFO', 'dist_jax')
    recipe.train_reader(config(name='something_v2'), labels=(('0', '1'),))
    assert 'numbers and no names: mirrored clips swap the labels ((86, 87)' in caplog.text
    recipe.train_reader(config(name='something_v2'), labels=(('push right', 'push left'),))
    assert 'swap the labels of: push right / push left (0, 1)' in caplog.text
    assert 'not the pairs of the official label map' in caplog.text
    with pytest.raises(ValueError, match=r'data\.flip=false'):
        recipe.train_reader(config(name='custom'), labels=(('a', 'b'), ('left hand', 'right hand')))


def test_prompts_of_a_text_head_are_words():
    names = ('ApplyEyeMakeup', 'YoYo')
    quoted = ('play "tag"', 'TaiChi')

    def tokens(*names, split_names=False):
        (found,) = ClassTexts((names,), split_names).tokens(16)
        return found.tolist()

    assert tokens(*names, split_names=True) == tokens('Apply Eye Makeup', 'Yo Yo')
    assert tokens(*names) != tokens('Apply Eye Makeup', 'Yo Yo')
    assert tokens(*quoted, split_names=True) == tokens('play tag', 'TaiChi')


def test_side4video_views_are_frames_and_crops_of_the_video(record):
    found = published('side4video_ssv2', **{'eval.resize': (264, 352)})  # as it is
    views, _ = recipe.eval_reader(found).read(record)
    everything = decode_everything(record.path)
    indices = PROTOCOLS['split'].test(90, 8, 2, 1, 30)
    for k, (frames, left) in enumerate((i, x) for i in indices for x in (0, 128, 64)):
        expected = everything[frames][:, 20 : 20 + 224, left : left + 224]
        np.testing.assert_array_equal(views[k], expected)


@pytest.mark.parametrize('protocol', PROTOCOLS)
def test_a_picture_is_a_video_of_one_frame(protocol, tmp_path):
    path = write_video(tmp_path / 'picture.mp4', pictures(1, 264, 352))
    found = config(num_frames=1, sampling=protocol, frame_interval=1, crop='centre', flip=False)
    found.data.grayscale = 0.0
    found.eval.num_clips = 1
    picture = Record(str(path), 3, 'picture')
    (video,), (rows,) = recipe.train_reader(found).read(picture, record_rng(0, 0, 0))
    views, _ = recipe.eval_reader(found).read(picture)
    assert video.shape == (1, 224, 224, 3) and rows['label'] == 3
    np.testing.assert_array_equal(views[0], video)


def test_a_still_image_is_a_video_of_one_frame(tmp_path):
    path = tmp_path / 'picture.jpg'
    cv2.imwrite(str(path), pictures(1, 264, 352)[0])
    picture = Record(str(path), 3, 'picture')
    found = published('sts_imagenet')
    clips, rows = recipe.train_reader(found).read(picture, record_rng(0, 0, 0))
    assert [video.shape for video in clips] == [(1, 224, 224, 3)] * 3
    assert [row['label'] for row in rows] == [3] * 3
    assert (clips[0] != clips[1]).any()
    views, _ = recipe.eval_reader(found).read(picture)
    assert views.shape == (1, 1, 224, 224, 3)


def test_flip_rules_of_the_data_sets():
    assert DATASETS['something_v2'].flip.label_pairs
    assert not DATASETS['kinetics400'].flip.label_pairs
    for name, expected in (('kinetics400', 1), ('something_v1', 1), ('motion_clips', 0)):
        reader = recipe.train_reader(config(name=name))
        assert sum(isinstance(step, Flip) for step in reader.transforms) == expected
