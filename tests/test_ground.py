"""What every family and task may rely on, shown by one without a backbone and one with own keys."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

import conv_family
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from dist_jax import (
    backbones,
    checkpoint,
    convert,
    doctor,
    evaluate,
    experiment,
    init_from,
    losses,
    step,
    train,
    trained,
)
from dist_jax.configs import dist, evl, frame_mean
from dist_jax.models import BACKBONES, FAMILIES, Family, converted, heads
from dist_jax.models.api import Model, ParamGroup
from dist_jax.models.backbone import Kind, Taps
from dist_jax.models.frozen import ClassTexts, Frozen
from dist_jax.models.layers import Pixels, as_pixels, patchify
from dist_jax.models.params import flatten
from dist_jax.plan import compiling
from dist_jax.sharding import ShardingRule, make_mesh
from dist_jax.tasks import TASKS
from dist_jax.tasks.classify import Classify
from dist_jax.video_model import VideoModel

TIMEOUT_SECONDS = 240


@pytest.fixture(scope='module', autouse=True)
def registered():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, 'conv', conv_family.FAMILIES_ROW)
        patch.setitem(TASKS, 'spread', conv_family.Spread)
        patch.setitem(convert.KINDS, 'conv', conv_family.NAMING)
        # Tests of reports draw them, and of all that the task of this family shares with others.
        for name in ('write_report', 'write_evaluation'):
            patch.setattr(f'dist_jax.reports.page.{name}', lambda *_: None)
        yield


@pytest.fixture(scope='module')
def make_config(clips):
    def make(task='classify', **fields):
        config = conv_family.get_config(task).unlock()
        config.data.update(
            root=str(clips), train_list='train.txt', val_list='val.txt', label_map='labels.txt'
        )
        config.update_from_flattened_dict(fields)
        return config

    return make


@pytest.fixture(scope='module')
def run(make_config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp('conv')
    return workdir, train.train(make_config(**{'batch_norm.groups': 4}), str(workdir))


def read(workdir):
    folder = checkpoint.find_checkpoint(workdir)
    return flatten(checkpoint.read_host_variables(folder))


def test_a_family_without_a_backbone_trains_and_keeps_its_statistics(run):
    workdir, summary = run
    assert 0 <= summary['val_top1'] <= 1
    found = read(workdir)
    assert np.abs(found['batch_stats/bn/mean']).max() > 1e-3
    metadata = checkpoint.read_metadata(checkpoint.find_checkpoint(workdir))
    assert metadata['backbone'] is None
    assert metadata['preprocessing']['mean'] == [0.4, 0.5, 0.6]


def test_evaluation_uses_the_statistics(run, tmp_path):
    workdir, summary = run
    config = trained.saved_config(str(workdir))
    figures, _ = evaluate.run(config, str(workdir), None, str(tmp_path))
    assert figures['top1'] == summary['val_top1']
    assert json.loads((tmp_path / 'evaluation.json').read_text())['num_videos'] == 10


def test_single_videos_are_predicted(run, clips):
    workdir, _ = run
    config = trained.saved_config(str(workdir))
    found = trained.load_trained(config, str(workdir), None)
    video = next(clips.rglob('*.mp4'))
    (one,) = VideoModel(found, config).predict_all([video])
    assert not one.error and np.isclose(sum(one.scores[0]), 1, atol=1e-5)


def test_statistics_are_exported_converted_and_started_from(run, make_config, tmp_path):
    workdir, _ = run
    file, folder = tmp_path / 'conv.safetensors', tmp_path / 'conv'
    tensors = convert.export(workdir, file)
    found = read(workdir)
    np.testing.assert_array_equal(tensors['bn.running_var'], found['batch_stats/bn/var'])
    metadata = convert.convert(file, folder)
    assert metadata['collections'] == ['batch_stats']
    for origin in (workdir, folder):
        fresh = train.train(
            make_config(init_from=str(origin), **{'optimizer.peak_lr': 0.0, 'num_steps': 1}),
            str(tmp_path / f'from_{origin.name}'),
        )
        params = {
            k: v for k, v in read(tmp_path / f'from_{origin.name}').items() if 'bn/m' not in k
        }
        assert fresh['step'] == 1
        for name, leaf in params.items():
            if name.startswith('params/'):
                np.testing.assert_array_equal(leaf, found[name], err_msg=name)
    # One step with momentum 0.5 moves statistics half of the way: they did not start from zero.
    before, after = (
        found['batch_stats/bn/mean'],
        read(tmp_path / 'from_conv')['batch_stats/bn/mean'],
    )
    assert np.abs(after - before / 2).max() < np.abs(after).max() * 0.75
    evaluated, _ = evaluate.run(
        make_config(init_from=str(folder)), '', None, str(tmp_path / 'evaluated')
    )
    own, _ = evaluate.run(trained.saved_config(str(workdir)), str(workdir), None, str(tmp_path))
    assert evaluated['top1'] == own['top1']


def test_another_size_of_the_family_starts_from_a_run(run, make_config, tmp_path):
    workdir, _ = run
    fields = {'model.kernel_frames': 5, 'optimizer.peak_lr': 0.0, 'num_steps': 1}
    train.train(make_config(init_from=str(workdir), **fields), str(tmp_path))
    kernel, before = (read(w)['params/conv/kernel'] for w in (tmp_path, workdir))
    np.testing.assert_array_equal(kernel[1:4], before)
    assert not kernel[[0, 4]].any()


def test_a_test_size_of_its_own(run, make_config, tmp_path):
    workdir, _ = run
    config = trained.saved_config(str(workdir)).unlock()
    config.eval.update(image_size=32, resize=(32,))
    figures, _ = evaluate.run(config, str(workdir), None, str(tmp_path))
    assert figures['num_videos'] == 10


class Borrowing(nn.Module):
    """Trains the projection of the backbone, on its frozen class tokens."""

    embed_dim: int
    head: heads.Head

    @nn.compact
    def __call__(self, inputs, *, mask=None, train=False):
        x = nn.Dense(self.embed_dim, use_bias=False, name='proj')(inputs['cls'])
        return {'embedding': x, 'logits': self.head(x, {})}


def build_borrowing(backbone, *, num_classes, num_frames, dtype):
    last = Taps(outputs=(backbone.spec.depth - 1,))

    def read(frozen, batch):
        frames = as_pixels(batch['video'])[:, 0]
        found = backbone.encode_image(frozen['visual'], frames, last)
        return {'cls': found['outputs'][0, :, 0]}

    return Model(
        net=Borrowing(backbone.spec.embed_dim, heads.Head('linear', num_classes)),
        dtype=dtype,
        pixels=backbone.kind.pixels,
        param_groups=(ParamGroup(''),),
        sharding_rules=(ShardingRule(''),),
        frozen=Frozen(backbone, dtype, read),
        from_backbone={'proj': 'visual/proj'},
    )


def test_parameters_start_as_parts_of_the_backbone(make_config, tmp_path, monkeypatch):
    monkeypatch.setitem(FAMILIES, 'borrowing', Family(build_borrowing))
    fields = {'optimizer.peak_lr': 0.0, 'num_steps': 1, 'data.image_size': 48}
    config = make_config(**fields, **{'backbone.name': 'tiny', 'backbone.checkpoint': 'random'})
    config.model = ConfigDict({'family': 'borrowing', 'dtype': 'float32'})
    train.train(config, str(tmp_path))
    taken = converted.load_params(tmp_path / 'backbone', ['visual/proj'], as_numpy=True)
    np.testing.assert_array_equal(
        read(tmp_path)['params/proj/kernel'], taken['visual']['proj']['kernel']
    )


def test_parameters_that_are_not_there_start_as_nothing():
    params = {'proj': {'kernel': jnp.zeros((64, 64))}}
    with pytest.raises(ValueError, match="no parameters under 'projection'"):
        init_from.load_from_backbone({'projection': 'visual/proj'}, None, params, True)


def test_a_backbone_may_have_no_tables_of_positions(tmp_path):
    backbones.write_random(str(tmp_path / 'tiny'), 'tiny')
    found = backbones.named('tiny')
    kind = dataclasses.replace(found.kind, tables=())
    backbone = dataclasses.replace(found, kind=kind, path=str(tmp_path / 'tiny'))
    frozen, mesh = Frozen(backbone, jnp.bfloat16, None), make_mesh(jax.devices()[:1])
    tree = frozen.load(mesh, ClassTexts())
    assert flatten(tree).keys() == flatten(frozen.abstract(())).keys()


def test_a_backbone_that_nobody_reads_is_refused(make_config):
    config = make_config(**{'backbone.name': 'tiny'})
    with pytest.raises(ValueError, match="family='conv' stands on no backbone"):
        experiment.find_backbone(config, '')


def command(*arguments, devices=1):
    """The command with the family in it, in a process that sees so many devices."""
    flags = f'{os.environ["XLA_FLAGS"]} --xla_force_host_platform_device_count={devices}'
    root = Path(__file__).parents[1]
    environment = os.environ | {'PYTHONPATH': str(root), 'XLA_FLAGS': flags}
    program = [sys.executable, str(root / 'tests' / 'conv_family.py'), *arguments]
    return subprocess.Popen(program, env=environment, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_a_killed_run_of_eight_devices_ends_as_one_that_never_stopped(clips, tmp_path):
    """With statistics of its batches; `test_kill.py` does it on one device."""
    devices = 8

    def start(name):
        fields = {
            'data.root': clips,
            'data.train_list': 'train.txt',
            'data.label_map': 'labels.txt',
            'num_steps': 12,
            'mesh.fsdp': 2,
            'batch_norm.groups': 4,
            'batch_norm.precise_batches': 2,
            'optimizer.ema_decay': 0.5,
        }
        arguments = [f'--config.{field}={value}' for field, value in fields.items()]
        config = f'--config={conv_family.__file__}'
        return command('train', config, f'--workdir={tmp_path / name}', *arguments, devices=devices)

    straight, killed = start('straight'), start('killed')
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not (tmp_path / 'killed' / 'checkpoints' / '4' / 'metadata').exists():
        assert killed.poll() is None and time.monotonic() < deadline, killed.stderr.read()
        time.sleep(0.001)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert not (tmp_path / 'killed' / 'summary.json').exists()
    continued = start('killed')
    for process in (straight, continued):
        _, said = process.communicate(timeout=TIMEOUT_SECONDS)
        assert process.returncode == 0, said
    assert 'continuing from step' in said
    a, b = (tmp_path / name / 'summary.json' for name in ('straight', 'killed'))
    a, b = json.loads(a.read_text()), json.loads(b.read_text())
    assert a['params_sha256'] == b['params_sha256'] and a['devices'] == devices
    one, other = read(tmp_path / 'straight'), read(tmp_path / 'killed')
    for name in one:  # the statistics, too, and the average of all
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


@pytest.mark.slow
@pytest.mark.skipif(find_spec('libtpu') is None, reason='the TPU compiler is an extra')
def test_it_is_planned_for_eight_chips(tmp_path):
    plan = tmp_path / 'plan.json'
    arguments = ['plan', '--topology=v5e:2x4', '--no_eval', '--cache=', f'--json={plan}']
    process = command(*arguments, f'--config={conv_family.__file__}')
    _, said = process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == 0, said
    found = json.loads(plan.read_text())
    assert found['fits'] and found['chips'] == 8
    memory = found['hbm_bytes_per_chip']
    assert memory['other_state'] > 0 and memory['frozen'] == 0
    assert found['model_flops_parts']['features'] == 0
    assert found['model_flops_parts']['backward'] > 0


def test_its_steps_are_planned_for_one_device():
    config, mesh = conv_family.get_config(), make_mesh(jax.devices()[:1])
    for plan in (compiling.train_step, compiling.eval_step):
        one = plan(config, mesh)
        assert one.arguments['frozen'] == {} and one.flops_per_clip > 0
        one.function.lower(*one.arguments.values())
        config.batch_norm.groups = 2
        assert plan(config, mesh).flops_per_clip == one.flops_per_clip


class Steps:
    """Steps of the family on one device."""

    def __init__(self, task=None, groups=1, **settings):
        self.task = Classify((tuple('abc'),)) if task is None else task
        self.model = conv_family.build(
            num_classes=tuple(map(len, self.task.labels)),
            num_frames=2,
            dtype=jnp.float32,
            width=4,
            kernel_frames=3,
            batch_norm_groups=groups,
        )
        optimizer = optax.sgd(0.1)
        mesh = make_mesh(jax.devices()[:1])
        shape = (4, 2, 8, 8, 3)
        settings = step.StepSettings(**settings)
        ema = settings.ema_decay > 0
        self.fresh = step.init_state(self.model, self.task, {}, shape, 0, lambda p: optimizer, ema)
        self.step = step.make_train_step(
            self.model,
            self.task,
            optimizer,
            lambda n: jnp.float32(0.1),
            settings,
            mesh,
        )

    def __call__(self, batch):
        return self.step(jax.tree.map(jnp.copy, self.fresh), {}, batch)[0]


def batch_of(seed=0):
    rng = np.random.default_rng(seed)
    return {
        'video': rng.integers(0, 256, (4, 2, 8, 8, 3), dtype=np.uint8),
        'label': np.array([0, 1, 2, 0], np.int32),
        'mask': np.array([1, 1, 0, 1], np.float32),
    }


def test_statistics_ignore_masked_clips():
    steps, batch = Steps(), batch_of()
    garbage = {**batch, 'video': batch['video'].copy()}
    garbage['video'][2] = 255 - garbage['video'][2]
    a, b = steps(batch), steps(garbage)
    jax.tree.map(np.testing.assert_array_equal, a.collections, b.collections)
    real = {name: value[[0, 1, 3]] for name, value in batch.items()}
    inputs = {'video': steps.model.normalize(jnp.asarray(real['video']))}
    variables = {'params': steps.fresh.params, **steps.fresh.collections}
    _, expected = steps.model.net.apply(variables, inputs, train=True, mutable=['batch_stats'])
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5),
        a.collections['batch_stats'],
        expected['batch_stats'],
    )


def test_parts_without_a_real_clip_change_nothing():
    batch = batch_of()
    batch['mask'] = np.array([0, 1, 0, 1], np.float32)
    parts = Steps(accumulation=2)(batch)  # rows 0 and 2, rows 1 and 3
    real = {name: value[1::2] for name, value in batch.items()}
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7),
        (parts.params, parts.collections),
        (lambda state: (state.params, state.collections))(Steps()(real)),
    )
    batch['mask'][:] = 0
    steps = Steps()
    after = steps(batch)
    jax.tree.map(np.testing.assert_array_equal, after.collections, steps.fresh.collections)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after.params))


def test_a_loss_over_all_rows_has_the_gradient_of_the_whole_batch_in_parts():
    rng = np.random.default_rng(0)
    batch = batch_of() | {'hint': rng.random((4, 2), np.float32), 'place': np.arange(4)}
    del batch['label']
    # Parts are rows 0 and 2, rows 1 and 3; groups are rows that follow each other.
    ordered = {name: value[[0, 2, 1, 3]] for name, value in batch.items()}
    parts = Steps(conv_family.Spread(()), accumulation=2)
    whole = Steps(conv_family.Spread(()), groups=2)
    found, metrics = parts.step(jax.tree.map(jnp.copy, parts.fresh), {}, batch)
    expected, wanted = whole.step(jax.tree.map(jnp.copy, whole.fresh), {}, ordered)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7),
        (found.params, metrics),
        (expected.params, wanted),
    )
    # The statistics of the slices, one after the other.
    jax.tree.map(
        lambda x, y: np.testing.assert_array_equal(x, y),
        found.collections,
        Steps(accumulation=2)(batch | {'label': np.zeros(4, np.int32)}).collections,
    )


def test_the_average_holds_statistics_too():
    steps = Steps(ema_decay=0.75)
    after, before = steps(batch_of()), steps.fresh.eval_variables
    assert before.keys() == after.eval_variables.keys() == {'params', 'batch_stats'}
    jax.tree.map(
        lambda old, new, mean: np.testing.assert_allclose(
            mean, 0.75 * old + 0.25 * new, rtol=1e-6, atol=1e-7
        ),
        before,
        after.variables,
        after.eval_variables,
    )
    assert np.abs(after.eval_variables['batch_stats']['bn']['mean']).min() > 0


@pytest.mark.parametrize('mask', [(0, 0), (1, 0)], ids=['none real', 'one real'])
def test_tasks_learn_from_rows_of_zeros(mask):
    mask = jnp.array(mask, jnp.float32)
    for name, make in TASKS.items():
        task = make((('a', 'b'),))
        batch = {k: jnp.zeros((2, *row.shape), row.dtype) for k, row in task.element_spec.items()}
        outputs = {
            'embedding': jnp.zeros((2, 4)),
            'logits': (jnp.zeros((2, 2)),),
            'frames': jnp.zeros((2, 3, 4)),
            'frame_logits': jnp.zeros((2, 3)),
            'words': jnp.zeros((2, 32, 4)),
            'word_logits': jnp.zeros((2, 32)),
            'pooled': jnp.zeros((2, 4)),
            'logit_scale': jnp.zeros(2),
        }

        def loss(outputs, task=task, batch=batch):
            per_row = task.loss(outputs, task.targets(batch), mask)
            return losses.masked_mean(per_row, mask, mask.sum())

        value, gradients = jax.value_and_grad(loss)(outputs)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((value, gradients))), name
        if not mask.any():
            assert not any(leaf.any() for leaf in jax.tree.leaves((value, gradients))), name


def test_a_task_with_its_own_keys_trains_and_is_judged(make_config, tmp_path):
    config = make_config('spread', **{'mixing.probability': 0.0, 'optimizer.peak_lr': 0.01})
    summary = train.train(config, str(tmp_path / 'run'))
    assert summary['val_nearness'] < 0 and summary['best_val_nearness'] >= summary['val_nearness']
    config = trained.saved_config(str(tmp_path / 'run'))
    figures, _ = evaluate.run(config, str(tmp_path / 'run'), 'best', str(tmp_path))
    assert figures['order'] == figures['queries'] == list(range(10))
    assert figures['nearness'] == pytest.approx(summary['best_val_nearness'], rel=1e-6)
    assert 'num_classes' not in summary and not any(
        'head' in name for name in read(tmp_path / 'run')
    )
    config.unlock().data.label_map = str(tmp_path / 'others.txt')  # classes that nobody reads
    Path(config.data.label_map).write_text('\n'.join('abcdefgh'))
    again, _ = evaluate.run(config, str(tmp_path / 'run'), 'best', str(tmp_path))
    assert again['nearness'] == figures['nearness']


@dataclasses.dataclass(frozen=True)
class Halved:
    """Which half of the classes a clip is of, in the place of its class."""

    spec: ClassVar = {'label': ((), np.int32)}

    def __call__(self, record, label, rng):
        return {'label': np.int32(label // 4)}


class Halves(Classify):
    annotate = eval_annotate = Halved()

    def __init__(self, labels, *, colour='red', **options):
        super().__init__((('first', 'second'),), **options)


def test_the_network_has_the_heads_of_the_task(make_config, tmp_path, monkeypatch):
    monkeypatch.setitem(TASKS, 'halves', Halves)
    summary = train.train(make_config('halves'), str(tmp_path))
    assert summary['num_classes'] == [2]
    assert read(tmp_path)['params/head/column_0/classifier/bias'].shape == (2,)
    config = trained.saved_config(str(tmp_path))
    figures, _ = evaluate.run(config, str(tmp_path), None, str(tmp_path))
    assert figures['top1'] == summary['val_top1']
    started = make_config('halves', init_from=str(tmp_path), num_steps=1)
    assert train.train(started, str(tmp_path / 'started'))['step'] == 1


class Needy(Classify):
    def __init__(self, labels, *, threshold, label_smoothing, fusion):
        super().__init__(labels)


@pytest.mark.parametrize(
    ('task', 'fields', 'message'),
    [
        ('needy', {}, r"task.name='needy'.*missing.*threshold"),
        ('classify', {'threshold': 1}, r"task.name='classify' has no option task.threshold"),
        ('classify', {'criterion': 'mse'}, r"task.criterion='mse' .*cross_entropy, bce"),
        ('spread', {'criterion': 'bce'}, r"task.name='spread' has no option task.criterion"),
    ],
)
def test_fields_that_are_not_those_of_the_task(make_config, monkeypatch, task, fields, message):
    monkeypatch.setitem(TASKS, 'needy', Needy)
    config = make_config(task)
    config.task.update(fields)
    with pytest.raises(ValueError, match=message):
        experiment.assemble(config, (('a', 'b'),), None)


def cells(params, pixels, spec, taps, *, unroll=False, remat=False):
    """A product of patches, and their mean in the place of a class token: nothing attends."""
    if pixels.ndim == 4:
        pixels = patchify(pixels, spec.patch_size)
    x = pixels @ params['stem']['kernel'].astype(pixels.dtype)
    x = jnp.concatenate([x.mean(1, keepdims=True), x], axis=1)
    found = {'outputs': x[None]} if taps.outputs else {}
    return found | ({'embedding': x[:, 0].astype(jnp.float32)} if taps.embedding else {})


@dataclasses.dataclass(frozen=True)
class CellSpec:
    image_size: int = 48
    patch_size: int = 8
    width: int = 16
    depth: int = 1
    embed_dim: int = 16

    @property
    def grid(self):
        return self.image_size // self.patch_size

    @property
    def num_tokens(self):
        return 1 + self.grid**2


CELLS = Kind(
    specs={'cells': CellSpec()},
    spec_class=CellSpec,
    geometry=('patch_size', 'width'),
    pixels=Pixels(),
    sharding_rules=(ShardingRule(''),),
    init_params=lambda key, spec: {
        'visual': {'stem': {'kernel': jax.random.normal(key, (3 * spec.patch_size**2, spec.width))}}
    },
    tables=(),
    resize=lambda table, spec: table,
    encode_image=cells,
)


@pytest.fixture
def on_cells(make_config, monkeypatch):
    monkeypatch.setitem(BACKBONES, 'cells', CELLS)

    def make(family, **options):
        config = make_config(**{'backbone.name': 'cells', 'backbone.checkpoint': 'random'})
        config.update(num_steps=1, num_epochs=1.0)
        config.data.image_size = 48
        config.model = family.get_config('demo').model
        config.model.update(options)
        return config

    return make


@pytest.mark.parametrize('family', [frame_mean, dist])
def test_a_kind_of_backbone_without_tables_and_text(on_cells, tmp_path, family):
    config = on_cells(family, head='linear')
    summary = train.train(config, str(tmp_path))
    config = trained.saved_config(str(tmp_path)).unlock()
    figures, _ = evaluate.run(config, str(tmp_path), None, str(tmp_path))
    assert figures['top1'] == summary['val_top1']


@pytest.mark.parametrize(
    ('family', 'options', 'message'),
    [
        (dist, {'head': 'text'}, 'need a text tower, and this kind of backbone has none'),
        (evl, {}, 'reads attention of its backbone, and this kind has none'),
    ],
)
def test_what_a_kind_of_backbone_does_not_have(on_cells, family, options, message):
    config = on_cells(family, **options)
    with pytest.raises(ValueError, match=message):
        backbone = experiment.sized_backbone(config)
        experiment.assemble(config, (('a', 'b'),), backbone).abstract_variables()


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'mixing.probability': 0.5}, 'mixing.probability=0.5: this task has no targets'),
    ],
)
def test_what_would_be_another_loss_is_refused(make_config, tmp_path, fields, message):
    config = make_config('spread', **{'mixing.probability': 0.0, **fields})
    with pytest.raises(ValueError, match=message):
        train.train(config, str(tmp_path))


def test_a_list_of_captions_has_no_classes(make_config, clips, tmp_path):
    for split in ('train', 'val'):
        names = [line.split()[0] for line in (clips / f'{split}.txt').read_text().splitlines()]
        rows = [json.dumps({'path': name, 'captions': ['one', 'two']}) for name in names]
        (tmp_path / f'{split}.jsonl').write_text('\n'.join(rows))
    lists = {f'data.{split}_list': str(tmp_path / f'{split}.jsonl') for split in ('train', 'val')}
    fields = {'mixing.probability': 0.0, 'num_steps': 2, 'data.name': 'custom', **lists}
    summary = train.train(make_config('spread', **fields), str(tmp_path / 'run'))
    assert 'num_classes' not in summary and summary['val_nearness'] < 0
    config = trained.saved_config(str(tmp_path / 'run'))
    figures, _ = evaluate.run(config, str(tmp_path / 'run'), None, str(tmp_path))
    assert figures['nearness'] == summary['val_nearness']
    one = compiling.train_step(config, make_mesh(jax.devices()[:1]))
    assert 'head' not in one.arguments['state'].params


def test_a_network_without_logits_cannot_classify():
    with pytest.raises(ValueError, match=r'logits of \(\) classes for \(2,\) class names'):
        Classify((('a', 'b'),)).check({'embedding': jnp.zeros((1, 4))})


def test_the_doctor_finds_no_backbone_and_refuses_one(make_config):
    def backbone(config):
        (found,) = [c for c in doctor.run(doctor.Request(config)) if c.name == 'backbone']
        return found

    assert backbone(make_config()).found == 'none'
    refused = backbone(make_config(**{'backbone.checkpoint': 'random'}))
    assert refused.state == doctor.FAILED and 'stands on no backbone' in refused.found
