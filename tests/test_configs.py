"""Every row of every config: it builds, its step traces, its size is the published one."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dist_jax import backbones, checkpoint, init_from, optim, recipe, step, train
from dist_jax.configs import base, dist, evl, frame_mean, side4video, side4video_retrieval, sts
from dist_jax.plan import compiling
from dist_jax.sharding import make_mesh
from dist_jax.tasks.api import labels_of
from dist_jax.tasks.classify import Classify
from input_pipeline.datasets import DATASETS
from input_pipeline.sources import open_source

SMALL = ('demo', 'world')  # our own, of no release

# Trainable parameters. The release has 26.1 M for B/16 8+16 frames on K400; published comparisons
# on SSv2 count 19 M for B/16 and 32 M for L/14.
TRAINABLE = {
    'b16_8+16f_k400': 26_105_184,
    'b16_16+32f_k400': 26_154_336,
    'b16_32+64f_k400': 26_252_640,
    'l14_32+64f_k400': 39_867_744,
    'b16_8+16f_ssv2': 19_001_184,
    'b16_16+32f_ssv2': 19_044_192,
    'b16_32+64f_ssv2': 19_130_208,
    'l14_32+64f_ssv2': 32_745_312,
    'l14_32+64f_k710': 39_867_744,
    'l14_32+64f_k710_k400': 39_867_744,
    'l14_32+64f_k710_k600': 39_867_744,
    'l14_32+64f_k710_k700': 39_867_744,
    'b16_8+16f_k710': 26_105_184,
    'b16_8+16f_k710_k400': 26_105_184,
    'b16_8+16f_k710_k600': 26_105_184,
    'b16_8+16f_k710_k700': 26_105_184,
    'eva02_l14_8+16f_k400': 39_609_696,
    'eva02_l14_32+64f_k400': 39_867_744,
    'b16_32+64f_ek100': 26_456_301,
    'demo': 175_080,
    'world': 325_696,
}
# The release counts B/16 and L/14; L/14@336 has larger tables of offsets.
EVL = {
    'b16_8f_k400': 33_183_376,
    'b16_16f_k400': 33_207_952,
    'b16_32f_k400': 33_257_104,
    'l14_8f_k400': 58_727_824,
    'l14_16f_k400': 58_760_592,
    'l14_32f_k400': 58_826_128,
    'l14_336_32f_k400': 69_049_744,
    'eva02_l14_8f_k400': 58_727_824,
    # A class is a row of 768 weights and a bias.
    'b16_8f_k710': 33_183_376 + 310 * 769,
    'b16_8f_k710_k400': 33_183_376,
    'b16_8f_k710_k600': 33_183_376 + 200 * 769,
    'b16_8f_k710_k700': 33_183_376 + 300 * 769,
    'demo': 67_592,
    'world': 172_688,
}
BASELINE = {'b16_8f_k400': 205_200, 'demo': 520, 'world': 1_040}
# The release has 23.28 M, 21.11 M and 102.1 M for 174 classes, and 183.5 M beside bigE for 400; the
# paper 4 M and 22 M for the light networks. A class is a row and a bias.
SIDE4VIDEO_SIZES = {
    'b32': (23_350_032, 321),
    'b16': (21_185_232, 321),
    'l14': (102_224_784, 513),
    'e14': (183_504_208, 577),
    'light_b16': (4_356_624, 129),
    'light_l14': (22_020_816, 321),
}
SIDE4VIDEO = {
    **{
        f'{size}_8f_{data}': count - (0 if data == 'k400' else 226 * row)
        for size, (count, row) in SIDE4VIDEO_SIZES.items()
        for data in ('k400', 'ssv1', 'ssv2')
    },
    'b16_8f_k710': 21_185_232 + 310 * 321,
    'b16_8f_k710_k400': 21_185_232,
    'b16_8f_k710_k600': 21_185_232 + 200 * 321,
    'b16_8f_k710_k700': 21_185_232 + 300 * 321,
    'demo': 102_984,
    'world': 178_640,
}
# b16: 21.3 M beside the backbone, its text tower of 63.4 M, 0.4 M of its last norm and projection,
# 0.5 M of the weights of words and frames.
RETRIEVAL = {
    'msrvtt_b32': 87_816_899,
    'msrvtt_b16': 85_652_099,
    'msrvtt_l14': 169_086_339,
    'msrvtt_e14': 423_665_987,
    'demo': 3_340_547,
    'world': 3_511_811,
}
ROWS = [
    (file, name, count)
    for file, counts in (
        (dist, TRAINABLE),
        (evl, EVL),
        (frame_mean, BASELINE),
        (side4video, SIDE4VIDEO),
        (side4video_retrieval, RETRIEVAL),
    )
    for name, count in counts.items()
]


def test_no_row_is_missing():
    assert dist.VARIANTS.keys() == TRAINABLE.keys()
    assert evl.VARIANTS.keys() == EVL.keys()
    assert frame_mean.VARIANTS.keys() == BASELINE.keys()
    assert {name.replace('_16f', '_8f') for name in side4video.VARIANTS} == SIDE4VIDEO.keys()
    for name in side4video.VARIANTS:
        if '_16f' in name:  # the release has the same files with 16 frames
            short = side4video.get_config(name.replace('_16f', '_8f'))
            short.data.num_frames = 16
            assert side4video.get_config(name) == short
    for name in side4video_retrieval.VARIANTS:
        same = side4video_retrieval.get_config(re.sub('^(msvd|vatex)_', 'msrvtt_', name))
        config = side4video_retrieval.get_config(name)
        same.data.update(name=config.data.name, sampling=config.data.sampling)
        assert config == same


@functools.cache
def abstract_run(name):
    """Parts, frozen tree and state of a row as shapes, with its optimizer's settings."""
    config = CONFIGS[name]
    assert config.data.image_size == backbones.named(config.backbone.name).spec.image_size
    parts = compiling.assemble(config)
    frozen = parts.abstract_frozen()
    settings = train.optimizer_settings(config, train.make_plan(config, 1000))
    initialise = train.state_initialiser(
        config, parts.model, parts.task, parts.train_shape, settings
    )
    return parts, frozen, jax.eval_shape(initialise, frozen), settings


def classes(config):
    number = DATASETS[config.data.name].num_classes
    return number if isinstance(number, tuple) else (number,)


def program(config):
    """What decides the program of a row, but for widths and other numbers in it.

    A row's own widths meet in its initial values, for which its network is traced. Views are rows
    of a batch to a network: two are as good as four.
    """
    frames = config.data.num_frames if config.model.family == 'dist' else 0  # at two rates
    shape = frames, config.eval.num_clips > 1, len(classes(config))
    model = {k: v for k, v in config.model.items() if not re.search('dim$|std$|ada_|dropout', k)}
    tower = re.sub(r'[0-9]+(_336)?$', '', config.backbone.name)
    often = config.accumulation > 1, config.batch_norm.groups > 1, config.optimizer.ema_decay > 0
    return repr((shape, model, tower, often, config.mixing.probability > 0))


CONFIGS = {f'{file.__name__}-{name}': file.get_config(name) for file, name, _ in ROWS}
for name, config in CONFIGS.items():
    # Layers of one row are written out; those of others are traced once and looped over.
    if name != 'dist_jax.configs.dist-b16_8+16f_k400':
        config.model.unroll = False
COUNTS = [count for _, _, count in ROWS]


@pytest.mark.parametrize(('name', 'count'), zip(CONFIGS, COUNTS), ids=CONFIGS)
def test_row_has_its_size(name, count):
    _, _, state, _ = abstract_run(name)
    assert sum(x.size for x in jax.tree.leaves(state.params)) == count


PROGRAMS = {program(config): name for name, config in reversed(CONFIGS.items())}


@pytest.mark.parametrize('name', sorted(PROGRAMS.values()))
def test_steps_of_each_program_trace(name):
    """Rows that differ in data set and schedule alone are traced once."""
    config = CONFIGS[name]
    parts, frozen, state, settings = abstract_run(name)
    model, task = parts.model, parts.task
    train_step = step.make_train_step(
        model,
        task,
        optim.of_model(model, state.params, settings),
        optim.make_schedule(settings),
        train.step_settings(config),
        make_mesh(jax.devices()[:1]),
    )
    clips = 2 * config.accumulation * config.batch_norm.groups
    batch = step.example_batch(task, (clips, *parts.train_shape))
    new_state, metrics = jax.eval_shape(train_step, state, frozen, batch)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), new_state) == jax.tree.map(
        lambda x: (x.shape, x.dtype), state
    )
    assert metrics['loss'].shape == ()
    eval_step = step.make_eval_step(model, task, make_mesh(jax.devices()[:1]))
    shape = (clips, config.eval.num_clips, *parts.test_shape)
    views = {'video': jax.ShapeDtypeStruct(shape, jnp.uint8)}
    found = jax.eval_shape(eval_step, state.eval_variables, frozen, views)
    if config.task.name == 'retrieve':
        assert found['frames'].shape[:2] == (clips, config.data.num_frames)
    else:
        assert [s.shape for s in found['scores']] == [(clips, n) for n in classes(config)]


def test_rows_follow_the_released_recipe():
    config = dist.get_config('b16_8+16f_k400')
    plan = train.make_plan(config, 240_000)
    settings = train.optimizer_settings(config, plan)
    assert config.batch_size == 256 and plan.total_steps == 36 * 240_000 // 256
    np.testing.assert_allclose(settings.warmup_steps, 6 * 240_000 / 256)
    assert (settings.peak_lr, settings.weight_decay, settings.b2) == (3.2e-4, 1e-4, 0.999)


def test_a_warm_up_that_is_most_of_a_run_is_a_warning(caplog):
    for num_epochs, warns in ((36.0, False), (10.0, True)):
        config = dist.get_config('b16_8+16f_k400')
        config.num_epochs = num_epochs
        with caplog.at_level('INFO', 'dist_jax'):
            plan = train.make_plan(config, 240_000)
            train.log_schedule(config, train.optimizer_settings(config, plan))
        assert ('optimizer.warmup_epochs=6.0 of num_epochs=10.0' in caplog.text) == warns
    assert 'learning rate: 8e-07, 0.000111 after 5625 steps of warm-up' in caplog.text


@pytest.mark.parametrize('num_steps', [0, 50])
def test_a_run_that_is_shorter_than_its_warm_up_is_refused(num_steps):
    config = dist.get_config('b16_8+16f_k400')
    config.num_epochs, config.num_steps = 5.0, num_steps
    with pytest.raises(ValueError, match=r'warmup_epochs=6\.0 is not shorter than num_epochs=5'):
        base.check(config)
    config.num_epochs = 36.0
    base.check(config)
    config.num_steps = 50  # which keeps the share
    settings = train.optimizer_settings(config, train.make_plan(config, 240_000))
    assert (settings.warmup_steps, settings.total_steps) == (pytest.approx(50 / 6), 50)


@pytest.mark.parametrize('name', CONFIGS)
def test_every_row_passes_its_own_check(name):
    base.check(CONFIGS[name])


@pytest.mark.parametrize('variant', sts.VARIANTS)
def test_rows_of_sts_pass_their_check(variant):
    base.check(sts.get_config(variant))


@pytest.mark.parametrize(
    ('field', 'value', 'message'),
    [
        ('model.dropout', 1.5, r'must be at least 0 and below 1'),
        ('model.dropout', math.nan, 'must be a finite number'),
        ('model.stochastic_depth', 1.0, r'must be at least 0 and below 1'),
        ('model.stochastic_depth', -0.5, r'must be at least 0 and below 1'),
        ('data.image_size', 0, 'must be at least 1'),
        ('init_missing', 'fresch', r"is not known; did you mean 'fresh'"),
    ],
)
def test_fields_out_of_range_are_named(field, value, message):
    config = sts.get_config('demo')
    config.update_from_flattened_dict({field: value})
    with pytest.raises(ValueError, match=rf'^{re.escape(field)}=.*{message}'):
        base.check(config)


def test_init_missing_is_chosen_from_its_table():
    assert base.CHOICES['init_missing'] == init_from.MISSING


def test_paths_are_made_absolute_where_a_run_starts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ('here.txt', 'root/train.txt', 'names/verbs.csv'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('')
    config = dist.get_config('demo')
    config.backbone.checkpoint, config.init_from = 'clip_b16', 'runs/first'
    config.data.update(root='root', train_list='train.txt', val_list='here.txt')
    config.data.label_map = 'names/verbs.csv, nouns.csv'
    recipe.resolve_paths(config)
    assert config.data.root == f'{tmp_path}/root'
    assert config.data.train_list == 'train.txt'  # from the root, wherever that is
    assert config.data.val_list == f'{tmp_path}/here.txt'
    assert config.data.label_map == f'{tmp_path}/names/verbs.csv,nouns.csv'
    assert config.backbone.checkpoint == f'{tmp_path}/clip_b16'
    assert config.init_from == f'{tmp_path}/runs/first' and config.init_label_map == ''
    before = config.to_dict()
    monkeypatch.chdir('/')
    recipe.resolve_paths(config)
    assert config.to_dict() == before
    monkeypatch.setenv('HOME', str(tmp_path))  # a shell leaves it in --config.data.root=~/root
    config.data.update(root='~/root', val_list='~/here.txt')
    recipe.resolve_paths(config)
    assert config.to_dict() == before
    config.backbone.checkpoint, config.init_from = 'random', 'gs://bucket/runs/first'
    config.data.update(root='', train_list='', label_map='')
    before = config.to_dict()
    recipe.resolve_paths(config)
    assert config.to_dict() == before


def test_a_run_from_before_its_paths_were_resolved_continues(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = dist.get_config('demo')
    config.init_from = 'runs/first'
    rest = {'class_names': [], 'train_list_sha256': '', 'backbone': {'params_sha256': ''}}
    saved = recipe.with_full_origin(base.plain(config))
    recipe.resolve_paths(config)
    checkpoint.check_same_run({'config': saved, **rest}, {'config': base.plain(config), **rest})


def test_a_name_of_two_files_is_refused(tmp_path, monkeypatch):
    (tmp_path / 'root').mkdir()
    for name in ('val.txt', 'root/val.txt'):
        (tmp_path / name).write_text('a.mp4 0\n')
    monkeypatch.chdir(tmp_path)
    config = dist.get_config('b16_8+16f_k400')
    config.data.update(name='custom', root='root', val_list='val.txt')
    with pytest.raises(
        ValueError, match=r'val\.txt is in .* and in data\.root=root; write the path'
    ):
        recipe.open_split(config, 'val')
    monkeypatch.chdir(tmp_path / 'root')  # one file, by two names
    config.data.update(root=str(tmp_path / 'root'), list_format='kinetics')
    assert len(recipe.open_split(config, 'val')) == 1


def test_a_list_with_nothing_to_learn_from_is_a_warning(tmp_path, caplog):
    (tmp_path / 'list.txt').write_text('a.mp4 0\nb.mp4 2\n')
    (tmp_path / 'labels.txt').write_text(''.join(f'class {i}\n' for i in range(15)))
    for labels, expected in (
        (15, ['no video of 13 of the 15 classes', "'class 1', 'class 3'", 'and 3 more']),
        (1, ["one class, 'class 0'"]),
    ):
        (tmp_path / 'labels.txt').write_text(''.join(f'class {i}\n' for i in range(labels)))
        if labels == 1:
            (tmp_path / 'list.txt').write_text('a.mp4 0\n')
        source = open_source(
            tmp_path / 'list.txt', 'kinetics', label_map=str(tmp_path / 'labels.txt')
        )
        caplog.clear()
        Classify(labels_of(source)).check_list(source, 'data.train_list')
        assert all(text in caplog.text for text in ['data.train_list', *expected])


def test_an_epoch_has_every_clip_of_every_video():
    config = dist.get_config('b16_8+16f_k400')
    config.data.repeats = 2
    assert train.make_plan(config, 240_000).total_steps == 36 * 2 * 240_000 // 256
    config.data.repeats_extend_epoch = False  # half of the videos, twice
    assert train.make_plan(config, 240_000).total_steps == 36 * 240_000 // 256


def test_evl_rows_follow_the_released_recipe():
    for name in evl.VARIANTS:
        if name in SMALL or 'k710' in name:
            continue
        config = evl.get_config(name)
        settings = train.optimizer_settings(config, train.make_plan(config, 240_000))
        schedule = optim.make_schedule(settings)
        assert (config.batch_size, settings.total_steps) == (256, 50_000)
        rates = [float(schedule(s)) for s in (0, 25_000, 50_000)]
        np.testing.assert_allclose(rates, [4e-4, 2e-4, 0.0], atol=1e-10)
        assert (settings.weight_decay, settings.b2, settings.clip_norm) == (0.05, 0.999, 0.0)
        data = config.data
        assert data.num_frames == int(name.split('_')[-2].removesuffix('f'))
        assert data.frame_interval == (8 if data.num_frames == 32 else 16)
        assert config.eval.num_clips * config.eval.num_crops == 3
        assert (config.eval.num_clips == 3) == (data.num_frames == 8)
        assert not (data.flip or data.grayscale or config.mixing.probability)
        assert config.optimizer.label_smoothing == 0
        reader = recipe.train_reader(config)
        assert [type(step).__name__ for step in reader.transforms] == [
            'RandAugment',
            'RandomResizedCrop',
        ]


def test_side4video_rows_follow_the_released_recipe():
    lengths = {'k400': (30, 30, 20), 'ssv1': (40, 30, 30), 'ssv2': (30, 30, 25)}
    for name in side4video.VARIANTS:
        if name in SMALL or 'k710' in name:
            continue
        size, _, data = name.removeprefix('light_').split('_')
        config = side4video.get_config(name)
        at = 'ble'.index(size[0])
        assert config.num_epochs == lengths[data][at]
        assert config.batch_size == (256 if at < 2 else 8 if data == 'k400' else 128)
        settings = train.optimizer_settings(config, train.make_plan(config, 240_000))
        schedule, steps = optim.make_schedule(settings), settings.total_steps
        middle = (settings.warmup_steps + steps) // 2
        rates = [float(schedule(s)) for s in (0, settings.warmup_steps, middle, steps)]
        peak = 1e-3 if at == 0 else 1e-4
        np.testing.assert_allclose(rates, [0, peak, peak / 2, 0], rtol=1e-4, atol=1e-9)
        assert (settings.weight_decay, settings.b2, settings.clip_norm) == (0.15, 0.999, 0.0)
        assert config.optimizer.label_smoothing == 0.1 and config.batch_norm.groups == 8
        assert config.eval.num_clips * config.eval.num_crops == (12 if data == 'k400' else 6)
        assert config.data.repeats == (1 if data == 'k400' else 2)
        assert bool(config.data.rand_augment) == (data != 'k400' or at == 2)
        assert bool(config.data.grayscale) == (data == 'k400')
        assert config.mixing.probability == 0 and recipe.train_reader(config).transforms


def test_retrieval_rows_follow_the_released_recipe():
    for name in side4video_retrieval.VARIANTS:
        if name in SMALL:
            continue
        data, size = name.split('_')
        config = side4video_retrieval.get_config(name)
        assert config.backbone.name == {'e14': 'eva02_e14'}.get(size, f'vit_{size}')
        assert (config.model.tap_every, config.model.post_norm) == (
            (2, True) if size == 'e14' else (1, False)
        )
        assert config.model.side_dim == 320 and config.model.pretrained_lr == 1e-3
        settings = train.optimizer_settings(config, train.make_plan(config, 180_000))
        steps = settings.total_steps
        assert (config.batch_size, steps) == (128, 5 * 180_000 // 128)
        schedule, tenth = optim.make_schedule(settings), settings.warmup_steps
        assert tenth == pytest.approx(steps / 10, rel=1e-3)
        # At the end of the warm-up the rate falls from the peak to where the cosine is by then.
        rates = [float(schedule(s)) for s in (0, tenth / 2, tenth - 1, tenth + 1, steps / 2, steps)]
        expected = [0, 5e-5, 1e-4, 1e-4 * (1 + np.cos(np.pi / 10)) / 2, 5e-5, 0]
        np.testing.assert_allclose(rates, expected, rtol=3e-3, atol=1e-9)
        assert settings.name == 'bertadam' and settings.weight_decay == 0.2
        assert (settings.b1, settings.b2, settings.eps) == (0.9, 0.98, 1e-6)
        assert (settings.clip_norm, settings.clip_tensor_norm) == (1, 1)
        assert config.task.to_dict() == {
            'name': 'retrieve',
            'criterion': '',
            'num_words': 32,
            'interaction': 'wti',
            'masked': 'zero',
            'positives': 'pair',
            'cdcr': 0,
        }
        assert config.batch_norm.groups == 8 and config.eval.num_clips * config.eval.num_crops == 1
        assert config.data.num_frames == 12
        assert config.data.sampling == ('block' if data == 'vatex' else 'block_start')
        assert not (config.data.flip or config.data.grayscale or config.mixing.probability)
        assert config.data.crop == 'centre' and not config.data.rand_augment


def test_fine_tuning_is_shorter_and_slower():
    for file in (dist, evl, side4video):
        rows = [name for name in file.VARIANTS if '_k710_' in name]
        assert {name.rpartition('_')[2] for name in rows} == {'k400', 'k600', 'k700'}
        for name in rows:
            before, _, own = name.rpartition('_')
            first, then = file.get_config(before), file.get_config(name)
            assert first.data.name == 'kinetics710' and then.data.name == f'kinetics{own[1:]}'
            assert then.optimizer.peak_lr == pytest.approx(first.optimizer.peak_lr / 10)
            lengths = [train.make_plan(c, 240_000).total_steps for c in (then, first)]
            assert 5 <= lengths[1] / lengths[0] <= 10
            assert then.data.num_frames == first.data.num_frames
            assert then.model == first.model and then.backbone == first.backbone


def test_backbone_reads_the_frames_of_the_name():
    for name in dist.VARIANTS:
        if name not in SMALL:
            sparse, dense = re.search(r'(\d+)\+(\d+)f_', name).groups()
            config = dist.get_config(name)
            assert config.data.num_frames == int(dense)
            assert config.data.num_frames // config.model.alpha == int(sparse)


def test_ssv2_pools_less_than_k400():
    for name in dist.VARIANTS:
        layers = dist.get_config(name).model.ada_pooling_layers
        assert layers == (1 if name in SMALL else 2 if 'ssv2' in name else 4)


def test_unknown_row_is_an_error_with_a_suggestion():
    with pytest.raises(ValueError, match="did you mean 'b16_8\\+16f_k400'"):
        dist.get_config('b16_8+16_k400')


def test_configs_are_locked():
    config = dist.get_config('demo')
    with pytest.raises(AttributeError, match='integration_dim'):
        config.model.integration_dimm = 3
