"""Training from start to end: what a run writes, how it stops, and that it continues exactly."""

import json
import logging
import math
import os
import shutil
import signal
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from dist_jax import backbones, checkpoint, evaluate, main, train, trained
from dist_jax.configs import base, dist
from dist_jax.metric_writer import read_metrics
from dist_jax.models import converted, digests
from dist_jax.models.params import tree_sha256
from dist_jax.step import TrainState
from input_pipeline import pipeline
from input_pipeline.bad_videos import TooManyBadVideos
from input_pipeline.motion_clips import CLASS_NAMES

NUM_STEPS = 6
SAVE_EVERY = 2


@pytest.fixture(scope='module')
def backbone(tmp_path_factory):
    path = str(tmp_path_factory.mktemp('backbone') / 'tiny')
    backbones.write_random(path, 'tiny')
    return path


@pytest.fixture(scope='module')
def make_config(clips, backbone):
    """Config of the runs here: mixing, accumulation, averaging; a save every second step."""

    def make(**fields):
        config = dist.get_config('demo')
        config.backbone.checkpoint = backbone
        config.data.update(
            root=str(clips),
            train_list='train.txt',
            val_list='val.txt',
            label_map='labels.txt',
            num_frames=4,
            image_size=48,
        )
        config.model.update(temporal_dim=8, head='linear', unroll=False)
        config.update(batch_size=4, num_steps=NUM_STEPS, accumulation=2)
        config.mixing.probability = 1.0
        config.optimizer.ema_decay = 0.5
        config.eval.update(batch_size=4, every_epochs=100.0)
        config.checkpoint.update(every_steps=SAVE_EVERY, keep=2)
        config.log.update(every_steps=1, tensorboard=False)
        config.update_from_flattened_dict(fields)
        return config

    return make


@pytest.fixture(scope='module')
def straight(make_config, tmp_path_factory):
    """(workdir, summary) of a run that nothing interrupted, with every checkpoint kept."""
    workdir = tmp_path_factory.mktemp('straight')
    fields = {'checkpoint.keep': 10, 'log.tensorboard': True}
    return workdir, train.train(make_config(**fields), str(workdir))


class Interruption(Exception):
    pass


def interrupted_train(config, workdir, batches, act):
    """Trains, but calls `act` when batch number `batches` (from 0) is asked for."""
    original = pipeline.train_batches

    class Interrupted:
        def __init__(self, *args, **kwargs):
            self.inner = original(*args, **kwargs)
            self.position = kwargs['start_step']

        def __next__(self):
            if self.position == batches:
                act()
            self.position += 1
            return next(self.inner)

        def close(self):
            self.inner.close()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, 'train_batches', Interrupted)
        return train.train(config, str(workdir))


def fail():
    raise Interruption


@pytest.fixture(scope='module')
def stopped_run(make_config, tmp_path_factory):
    """Workdir of a run that died in its sixth step: steps 1 to 5 logged, 2 and 4 saved."""
    workdir = tmp_path_factory.mktemp('stopped')
    with pytest.raises(Interruption):
        interrupted_train(make_config(), workdir, 5, fail)
    return workdir


@pytest.fixture
def stopped(stopped_run, tmp_path, monkeypatch):
    """A copy of the stopped run; its report is not drawn, the straight run shows that."""
    monkeypatch.setattr('dist_jax.reports.page.write_report', lambda *_: None)
    return shutil.copytree(stopped_run, tmp_path / 'run')


def steps_of(workdir, folder=checkpoint.FOLDER):
    return sorted(int(p.name) for p in (workdir / folder).iterdir() if p.name.isdigit())


def losses(workdir):
    return {row['step']: row['loss'] for row in rows(workdir, 'loss')}


def seconds_at(workdir, step):
    return checkpoint.read_metadata(checkpoint.find_checkpoint(workdir, step))['seconds']


def rows(workdir, figure):
    return [row for row in read_metrics(workdir / 'metrics.jsonl') if figure in row]


def figures(summary):
    """A summary without the time it took."""
    return {name: value for name, value in summary.items() if name != 'seconds'}


@pytest.mark.slow
def test_a_run_writes_its_files(straight, clips, backbone):
    workdir, summary = straight
    assert json.loads((workdir / 'summary.json').read_text()) == summary
    assert summary['step'] == summary['total_steps'] == NUM_STEPS
    assert summary['interrupted'] is False and summary['num_bad_videos'] == 0
    assert summary['num_classes'] == [8] and summary['devices'] == jax.device_count()
    assert summary['val_top1'] in np.arange(11) / 10 and summary['seconds'] > 0
    assert summary['val_top1'] <= summary['val_top5'] <= 1
    assert len(summary['params_sha256']) == 64

    logged = rows(workdir, 'loss')
    assert [row['step'] for row in logged] == list(range(1, NUM_STEPS + 1))
    for row in logged:
        assert row['clips'] == 4 and 0 < row['loss'] < 20 and row['grad_norm'] > 0
        assert row['clips_per_second'] > 0
        assert row['data_wait_seconds'] >= 0 and row['compute_seconds'] > 0
        assert row['step_seconds'] == pytest.approx(
            row['data_wait_seconds'] + row['compute_seconds']
        )
        assert row['epoch'] == pytest.approx(row['step'] * 4 / 18)
    (validated,) = rows(workdir, 'val_top1')  # nothing but the last step was due
    assert validated['step'] == NUM_STEPS
    for name in ('val_top1', 'val_top5', 'val_mean_class_accuracy'):
        assert validated[name] == summary[name]
    assert validated['val_num_videos'] == 10

    assert json.loads((workdir / 'config.json').read_text())['batch_size'] == 4
    overview = (workdir / 'parameters.txt').read_text()
    assert f'{summary["trainable_parameters"]:,}' in overview and 'frozen' in overview
    page = (workdir / 'report.html').read_text()
    assert '</html>' in page and CLASS_NAMES[0] in page
    assert list((workdir / 'tensorboard').iterdir())
    assert not (workdir / 'bad_videos.jsonl').exists()


@pytest.mark.slow
def test_a_checkpoint_says_what_the_next_person_needs(straight, make_config, backbone):
    workdir, summary = straight
    assert steps_of(workdir) == [2, 4, 6]
    folder = checkpoint.find_checkpoint(workdir)
    metadata = checkpoint.read_metadata(folder)
    assert metadata['class_names'] == [list(CLASS_NAMES)]
    frozen = converted.load_metadata(backbone)
    assert metadata['backbone']['name'] == 'tiny-random'
    assert metadata['backbone']['params_sha256'] == frozen['params_sha256']
    assert metadata['backbone']['spec']['patch_size'] == 8
    assert metadata['preprocessing']['mean'] == pytest.approx([0.481, 0.458, 0.408], abs=1e-3)
    assert metadata['preprocessing']['std'] == pytest.approx([0.269, 0.261, 0.276], abs=1e-3)
    views = metadata['views']
    assert (views['num_frames'], views['image_size']) == (4, 48)
    assert (views['num_clips'], views['num_crops'], views['sampling']) == (1, 1, 'segment')
    assert metadata['config'] == base.plain(
        make_config(**{'checkpoint.keep': 10, 'log.tensorboard': True})
    )
    # The frozen tree is not saved again.
    files = Path(folder / 'state').rglob('*')
    saved = sum(file.stat().st_size for file in files if file.is_file())
    assert saved < 1.2 * 4 * 4 * summary['trainable_parameters']  # parameters, two moments, EMA


@pytest.mark.slow
def test_the_average_follows_the_parameters(straight):
    workdir, summary = straight
    saved = {step: restored(workdir, step) for step in (4, 6)}
    assert tree_sha256(saved[6]['params']) == summary['params_sha256']
    # Two updates of decay 0.5 between the saves: a quarter of the old average is left.
    leaves = [jax.tree.leaves(saved[s][name]) for s, name in ((4, 'ema'), (6, 'ema'))]
    last = jax.tree.leaves(saved[6]['params'])
    moved = 0
    for before, after, params in zip(*leaves, last):
        between = (after - 0.25 * before - 0.5 * params) / 0.25  # parameters of step 5
        assert np.abs(between - params).max() < 0.05
        moved += np.abs(after - params).max() > 0
    assert moved > len(last) / 2


def restored(workdir, step):
    import orbax.checkpoint as ocp

    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        return checkpointer.restore((workdir / checkpoint.FOLDER / str(step) / 'state').resolve())


@pytest.mark.slow
def test_an_interrupted_run_ends_as_if_nothing_had_happened(stopped, straight, make_config):
    assert steps_of(stopped) == [2, 4] and max(losses(stopped)) == 5
    assert not (stopped / 'summary.json').exists()
    # What a killed save leaves, and fields that may differ.
    leftover = stopped / 'checkpoints' / '6.orbax-checkpoint-tmp'
    shutil.copytree(stopped / 'checkpoints' / '4', leftover)
    (leftover / 'metadata' / 'metadata').write_text('{"fo')
    (stopped / '.summary.json.partial').write_text('{')
    free = {'data.num_threads': 1, 'data.buffer_size': 2, 'checkpoint.every_steps': 5}
    before = seconds_at(stopped, 4)
    summary = train.train(make_config(**free), str(stopped))
    assert figures(summary) == figures(straight[1])
    assert summary['seconds'] > seconds_at(stopped, 5) > before > 0  # of both starts
    assert steps_of(stopped) == [5, 6]
    assert not list((stopped / 'checkpoints').glob('*tmp*'))
    assert not (stopped / 'checkpoints-broken').exists()
    logged = [row['step'] for row in rows(stopped, 'loss')]
    assert logged == list(range(1, NUM_STEPS + 1))
    assert losses(stopped) == losses(straight[0])


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_is_set_aside(stopped, straight, make_config, caplog):
    damage(stopped / 'checkpoints' / '4' / 'state')
    (stopped / 'checkpoints' / '5').mkdir()  # named like a step, and nothing in it
    with caplog.at_level(logging.ERROR, 'dist_jax'):
        summary = train.train(make_config(), str(stopped))
    assert figures(summary) == figures(straight[1])
    assert steps_of(stopped, 'checkpoints-broken') in ([4], [4, 5])
    assert 'checkpoints/4 cannot be read' in caplog.text
    assert losses(stopped) == losses(straight[0])
    assert steps_of(stopped) == [4, 6]


def damage(folder):
    """Overwrites the largest file of a checkpoint."""
    largest = max((p for p in folder.rglob('*') if p.is_file()), key=lambda p: p.stat().st_size)
    largest.write_bytes(b'\x00' * largest.stat().st_size)


@pytest.mark.slow
@pytest.mark.parametrize(
    ('where', 'name'), [(train._Loop, '_evaluate'), (checkpoint.Checkpoints, 'add_score')]
)
def test_a_step_is_saved_before_its_evaluation_which_the_next_start_makes_up_for(
    stopped, straight, make_config, where, name
):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(where, name, lambda *_: fail())
        with pytest.raises(Interruption):
            train.train(make_config(), str(stopped))
    assert steps_of(stopped) == [4, 6]
    assert checkpoint.Checkpoints(stopped).best() is None
    summary = train.train(make_config(), str(stopped))
    assert figures(summary) == figures(straight[1])
    (validated,) = rows(stopped, 'val_num_videos')
    assert validated['step'] == summary['best_step'] == NUM_STEPS
    assert validated['val_top1'] == summary['best_val_top1']
    assert checkpoint.find_checkpoint(stopped, 'best').name == str(NUM_STEPS)


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_continues(make_config, straight, tmp_path):
    handler = signal.getsignal(signal.SIGTERM)
    workdir = tmp_path / 'run'
    summary = interrupted_train(
        make_config(), workdir, 2, lambda: os.kill(os.getpid(), signal.SIGTERM)
    )
    assert signal.getsignal(signal.SIGTERM) is handler
    assert summary['interrupted'] is True and summary['step'] == 3
    assert steps_of(workdir) == [2, 3]
    assert not (workdir / 'summary.json').exists() and not (workdir / 'report.html').exists()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('dist_jax.reports.page.write_report', lambda *_: None)
        summary = train.train(make_config(), str(workdir))
    assert figures(summary) == figures(straight[1])
    assert losses(workdir) == losses(straight[0])


@pytest.mark.slow
def test_a_stop_takes_effect_between_two_batches_of_an_evaluation(make_config, straight, tmp_path):
    workdir, batches = tmp_path / 'run', []

    def make_eval_step(*_):
        def eval_step(variables, frozen, batch):
            batches.append(len(batch['video']))
            os.kill(os.getpid(), signal.SIGTERM)
            return {'scores': (jnp.full((batches[-1], straight[1]['num_classes'][0]), 0.125),)}

        return eval_step

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.step, 'make_eval_step', make_eval_step)
        summary = train.train(make_config(), str(workdir))
    assert summary['interrupted'] is True and len(batches) == 1
    assert steps_of(workdir)[-1] == summary['step'] and not rows(workdir, 'val_top1')
    assert not (workdir / 'summary.json').exists()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('dist_jax.reports.page.write_report', lambda *_: None)
        summary = train.train(make_config(), str(workdir))
    assert summary['params_sha256'] == straight[1]['params_sha256']
    assert losses(workdir) == losses(straight[0])


@pytest.mark.slow
def test_another_test_size_is_seen_by_evaluations_alone(stopped, straight, make_config, tmp_path):
    make_eval_step, seen = train.step.make_eval_step, []

    def recording(*arguments):
        inner = make_eval_step(*arguments)

        def eval_step(variables, frozen, batch):
            found = inner(variables, frozen, batch)
            seen.append((batch['video'].shape, np.asarray(found['scores'][0])))
            return found

        return eval_step

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.step, 'make_eval_step', recording)
        summary = train.train(make_config(**{'eval.image_size': 32}), str(stopped))
        inside, seen = seen, []
        evaluate.run(trained.saved_config(str(stopped)), str(stopped), None, str(tmp_path))
    assert summary['params_sha256'] == straight[1]['params_sha256']
    assert losses(stopped) == losses(straight[0])
    assert len(inside) == len(seen) == 3
    for (shape, scores), (_, expected) in zip(inside, seen):
        assert shape == (4, 1, 4, 32, 96)
        np.testing.assert_array_equal(scores, expected)


@pytest.mark.slow
def test_a_finished_run_repeats_its_summary(straight, make_config, tmp_path):
    workdir = shutil.copytree(straight[0], tmp_path / 'run')
    summary = train.train(make_config(), str(workdir))
    assert summary == straight[1]  # the duration too
    assert json.loads((workdir / 'summary.json').read_text()) == summary
    assert losses(workdir) == losses(straight[0])
    assert len(rows(workdir, 'val_top1')) == 1
    assert steps_of(workdir)[-1] == NUM_STEPS


@pytest.mark.slow
def test_other_settings_are_refused_by_name(stopped, make_config, tmp_path):
    before = (stopped / 'config.json').read_text()
    changed = {
        'seed': 1,
        'batch_size': 8,
        'optimizer.peak_lr': 1.0,
        'data.num_threads': 1,  # free
        'log.every_steps': 3,  # free
        'eval.every_epochs': 1.0,  # free
    }
    with pytest.raises(ValueError) as error:
        train.train(make_config(**changed), str(stopped))
    assert named(error) == ['batch_size', 'optimizer.peak_lr', 'seed']
    assert 'saved 4, now 8' in str(error.value) and '--workdir' in str(error.value)
    assert '(--config.batch_size=4 --config.optimizer.peak_lr=' in str(error.value)

    other = str(tmp_path / 'other')
    backbones.write_random(other, 'tiny', seed=1)
    with pytest.raises(ValueError) as error:
        train.train(make_config(**{'backbone.checkpoint': other}), str(stopped))
    assert named(error) == ['backbone.checkpoint'] and 'tiny-random' in str(error.value)

    assert (stopped / 'config.json').read_text() == before
    assert steps_of(stopped) == [2, 4]


def named(error):
    """The fields that the message of a refused run lists."""
    lines = str(error.value).splitlines()[1:-1]
    return sorted(line.strip().partition(':')[0] for line in lines)


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'data.repeats': 3}, r'batch_size=4 must be a multiple of 3 \(data.repeats=3'),
        ({'data.crop': 'middle'}, "data.crop='middle' is not one of"),
        ({'data.rand_augment': 'rand-x1'}, "rand_augment='rand-x1'"),
        ({'eval.crop_layout': 'corners'}, "layout='corners'"),
    ],
)
def test_a_recipe_that_does_not_fit_stops_a_run_before_it_reads(
    make_config, fields, message, tmp_path
):
    config = make_config(**fields, **{'data.train_list': 'nowhere.txt'})
    with pytest.raises(ValueError, match=message):
        train.train(config, str(tmp_path))


def with_old_names(workdir):
    """Renames the fields in saved configs to what earlier versions called them."""
    for file in workdir.glob('checkpoints/*/metadata/metadata'):
        metadata = json.loads(file.read_text())
        del metadata[digests.SEAL]
        for before, now in base.RENAMED_FIELDS.items():
            (group, old), (_, new) = before.split('.'), now.split('.')
            metadata['config'][group][old] = metadata['config'][group].pop(new)
        file.write_text(json.dumps(digests.seal(metadata)))


@pytest.mark.slow
def test_a_run_with_several_clips_of_a_video_continues_bit_for_bit(
    make_config, tmp_path, monkeypatch
):
    for name in ('write_report', 'write_evaluation'):
        monkeypatch.setattr(f'dist_jax.reports.page.{name}', lambda *_: None)
    fields = {'data.crop': 'random_resized', 'num_steps': 4, 'data.val_list': ''}
    config = make_config(**fields, **{'data.repeats': 2})
    straight = train.train(config, str(tmp_path / 'straight'))
    with pytest.raises(Interruption):
        interrupted_train(config, tmp_path / 'stopped', 3, fail)
    assert steps_of(tmp_path / 'stopped') == [2]

    with_old_names(tmp_path / 'stopped')
    assert trained.saved_config(str(tmp_path / 'stopped')).data.repeats == 2
    arguments = [f'--workdir={tmp_path}/stopped', '--config.data.val_list=val.txt']
    assert main.main(['evaluate', *arguments]) == 0
    with pytest.raises(ValueError, match=r'\(--config\.data\.repeats=2\)'):
        train.train(make_config(**fields), str(tmp_path / 'stopped'))
    continued = train.train(config, str(tmp_path / 'stopped'))
    assert continued['params_sha256'] == straight['params_sha256']
    (last,) = [row for row in rows(tmp_path / 'stopped', 'loss') if row['step'] == 4]
    assert last['epoch'] == pytest.approx(4 * 4 / (2 * 18)) and last['clips'] == 4


@pytest.mark.slow
def test_another_training_list_is_refused(stopped, make_config, clips, tmp_path):
    lines = (clips / 'train.txt').read_text().splitlines(keepends=True)
    other = tmp_path / 'other.txt'
    other.write_text(''.join(lines[1:] + lines[:1]))  # the same videos in another order
    with pytest.raises(ValueError) as error:
        train.train(make_config(**{'data.train_list': str(other)}), str(stopped))
    assert named(error) == ['train_list_sha256']
    # A copy of the list elsewhere is the same list.
    other.write_text(''.join(lines))
    config = make_config(**{'data.train_list': str(other)})
    with pytest.raises(Interruption):
        interrupted_train(config, stopped, 4, fail)


@pytest.mark.slow
def test_a_loss_that_is_no_number_stops_the_run(make_config, tmp_path, monkeypatch):
    make_train_step = train.step.make_train_step

    def spoiled(*args):
        inner = make_train_step(*args)

        def train_step(state, frozen, batch):
            number = int(state.step)
            state, metrics = inner(state, frozen, batch)
            if number == 3:
                params = jax.tree.map(lambda x: x * jnp.nan, state.params)
                state = state.replace(params=params)
                metrics |= {'loss': jnp.float32('nan'), 'finite': jnp.asarray(False)}
            return state, metrics

        return train_step

    monkeypatch.setattr(train.step, 'make_train_step', spoiled)
    config = make_config(**{'log.every_steps': 0})  # nobody looks at the loss in between
    with pytest.raises(train.NonFiniteError) as error:
        train.train(config, str(tmp_path))
    message = str(error.value)
    assert 'step 3' in message and 'loss nan' in message
    order = pipeline.epoch_order(config.seed, 0, 18)[12:16]
    for index in order:
        assert f"'{index} " in message
    assert steps_of(tmp_path) == [2]
    assert np.isfinite(jax.tree.leaves(restored(tmp_path, 2)['params'])[0]).all()
    assert not (tmp_path / 'summary.json').exists()


@pytest.fixture
def broken_clips(clips, tmp_path):
    """Makes a copy of the clips in which training videos of these numbers are broken."""

    def make(*numbers):
        folder = shutil.copytree(clips, tmp_path / 'clips')
        paths = [line.rsplit(maxsplit=1)[0] for line in (folder / 'train.txt').open()]
        for number in numbers:
            (folder / paths[number]).write_bytes(b'no video')
        return folder, [paths[number] for number in numbers]

    return make


@pytest.mark.slow
def test_a_bad_video_is_masked_and_named(make_config, broken_clips, tmp_path, monkeypatch):
    monkeypatch.setattr('dist_jax.reports.page.write_report', lambda *_: None)
    order = pipeline.epoch_order(0, 0, 18)
    folder, (path,) = broken_clips(int(order[6]))  # a clip of the second batch
    workdir = tmp_path / 'run'
    config = make_config(**{'data.root': str(folder), 'data.val_list': ''})
    summary = train.train(config, str(workdir))
    assert summary['num_bad_videos'] == 1 and summary['val_top1'] is None
    (entry,) = map(json.loads, (workdir / 'bad_videos.jsonl').read_text().splitlines())
    assert entry['index'] == order[6] and entry['path'].endswith(path)
    assert entry['kind'] and entry['reason']
    clips_seen = {row['step']: row['clips'] for row in rows(workdir, 'loss')}
    assert clips_seen[2] == 3 and clips_seen[1] == clips_seen[3] == 4
    assert np.isfinite(list(losses(workdir).values())).all()


@pytest.mark.slow
def test_a_video_that_hung_before_a_restart_is_not_read_again(make_config, tmp_path):
    order = pipeline.epoch_order(0, 0, 18)
    entry = {'index': int(order[6]), 'path': 'v.mp4', 'kind': 'timed out', 'reason': '', 'epoch': 0}
    (tmp_path / 'bad_videos.jsonl').write_text(json.dumps(entry) + '\n')
    train.train(make_config(**{'data.val_list': '', 'num_steps': 2}), str(tmp_path))
    assert {row['step']: row['clips'] for row in rows(tmp_path, 'loss')} == {1: 4, 2: 3}


@pytest.mark.slow
def test_too_many_bad_videos_stop_the_run(make_config, broken_clips, tmp_path):
    order = pipeline.epoch_order(0, 0, 18)
    folder, paths = broken_clips(int(order[1]), int(order[2]))
    with pytest.raises(TooManyBadVideos) as error:
        train.train(make_config(**{'data.root': str(folder)}), str(tmp_path / 'run'))
    assert all(path in str(error.value) for path in paths)
    assert len((tmp_path / 'run' / 'bad_videos.jsonl').read_text().splitlines()) == 2
    assert not (tmp_path / 'run' / 'summary.json').exists()


@pytest.fixture
def quick(monkeypatch):
    """Steps that learn nothing and compile nothing; `scores[n]` spoils those of evaluation n."""
    scores = {}

    def make_train_step(*_):
        names = ('loss', 'grad_norm', 'learning_rate', 'clips', 'finite')
        return lambda state, *_: (state.replace(step=state.step + 1), dict.fromkeys(names, 1.0))

    def make_eval_step(*_):
        calls = []

        def eval_step(variables, frozen, batch):
            calls.append(1)
            evaluation = (len(calls) - 1) // 3  # of 10 videos, 4 a step
            value = scores.get(evaluation, 0.125)
            found = jnp.full((len(batch['video']), 8), value)
            return {'scores': (found.at[:, len(calls) % 8].add(0.1),)}

        return eval_step

    monkeypatch.setattr(train.step, 'make_train_step', make_train_step)
    monkeypatch.setattr(train.step, 'make_eval_step', make_eval_step)
    monkeypatch.setattr('dist_jax.reports.page.write_report', lambda *_: None)
    return scores


EVERY_SECOND = 4 * 2 / 18  # epochs in two steps


@pytest.mark.slow
def test_an_evaluation_without_numbers_fails_and_the_run_goes_on(
    quick, make_config, tmp_path, caplog
):
    quick[1] = np.nan  # of three
    config = make_config(**{'eval.every_epochs': EVERY_SECOND})
    with caplog.at_level(logging.ERROR, 'dist_jax'):
        summary = train.train(config, str(tmp_path))
    assert summary['step'] == NUM_STEPS and summary['val_top1'] is not None
    assert 'val_error' not in summary
    assert [row['step'] for row in rows(tmp_path, 'val_top1')] == [2, 6]
    assert [row['step'] for row in rows(tmp_path, 'val_failed')] == [4]
    assert 'evaluation failed: 10 of 10 videos' in caplog.text and '.mp4' in caplog.text
    assert checkpoint.Checkpoints(tmp_path).best()[0] in (2, 6)


@pytest.mark.slow
def test_a_last_evaluation_without_numbers_leaves_no_accuracy(quick, make_config, tmp_path):
    quick[1] = np.inf
    config = make_config(**{'eval.every_epochs': EVERY_SECOND, 'num_steps': 4})
    summary = train.train(config, str(tmp_path))
    assert summary['step'] == 4 and summary['val_top1'] is None
    assert '10 of 10 videos have scores that are not finite' in summary['val_error']
    assert json.loads((tmp_path / 'summary.json').read_text()) == summary
    # The same command evaluates again, and does nothing else.
    again = train.train(config, str(tmp_path))
    assert again['val_top1'] is not None and 'val_error' not in again
    assert again['seconds'] == summary['seconds']
    assert [row['step'] for row in rows(tmp_path, 'val_top1')] == [2, 4]
    assert not rows(tmp_path, 'val_failed')


@pytest.mark.slow
@pytest.mark.parametrize('num_bad', [1, 2])
def test_unreadable_validation_videos_are_tolerated_up_to_a_share(
    quick, make_config, clips, tmp_path, caplog, num_bad
):
    folder = shutil.copytree(clips, tmp_path / 'clips')
    paths = [line.rsplit(maxsplit=1)[0] for line in (folder / 'val.txt').open()][:num_bad]
    for path in paths:
        (folder / path).write_bytes(b'no video')
    config = make_config(
        **{'data.root': str(folder), 'eval.every_epochs': EVERY_SECOND, 'num_steps': 4}
    )
    with caplog.at_level(logging.WARNING, 'dist_jax'):
        summary = train.train(config, str(tmp_path / 'run'))
    assert summary['step'] == 4 and steps_of(tmp_path / 'run') == [2, 4]
    assert all(path in caplog.text for path in paths)
    found = rows(tmp_path / 'run', 'val_num_bad_videos')
    if num_bad == 1:  # data.max_bad_share=0.01 of 10 allows one
        assert [(row['val_num_bad_videos'], row['val_num_videos']) for row in found] == [(1, 9)] * 2
        assert summary['val_top1'] is not None
        assert caplog.text.count(paths[0]) == 1  # named once
    else:
        assert not found and len(rows(tmp_path / 'run', 'val_failed')) == 2
        assert summary['val_top1'] is None
        assert '2 of 10 videos cannot be read, 1 are allowed' in summary['val_error']
    # They do not count with those of the training list.
    assert summary['num_bad_videos'] == 0


@pytest.mark.slow
def test_zero_means_never_but_at_the_end(quick, make_config, tmp_path):
    every = {'eval.every_epochs': 0.0, 'checkpoint.every_steps': 0, 'log.every_steps': 0}
    summary = train.train(make_config(**every), str(tmp_path))
    assert summary['step'] == NUM_STEPS and summary['val_top1'] is not None
    assert [row['step'] for row in rows(tmp_path, 'loss')] == [NUM_STEPS]
    assert [row['step'] for row in rows(tmp_path, 'val_top1')] == [NUM_STEPS]
    assert steps_of(tmp_path) == [NUM_STEPS]


@pytest.mark.slow
def test_what_takes_long_is_said_and_compilation_counts_in_no_figure(
    quick, make_config, tmp_path, monkeypatch, caplog, capsys
):
    make_train_step = train.step.make_train_step

    def slow_at_first(*arguments):
        inner, waits = make_train_step(*arguments), [0.6]

        def train_step(*arguments):
            time.sleep(waits.pop() if waits else 0.0)
            return inner(*arguments)

        return train_step

    monkeypatch.setattr(train.step, 'make_train_step', slow_at_first)
    config = make_config(**{'num_steps': 2, 'log.every_steps': 1})
    with caplog.at_level(logging.INFO, 'dist_jax'):
        train.train(config, str(tmp_path))
    first, _ = rows(tmp_path, 'loss')
    assert first['compute_seconds'] < 0.5
    assert 'loading the backbone' in caplog.text
    assert 'learning rate: ' in caplog.text and 'steps of warm-up' in caplog.text
    lines = capsys.readouterr().err.splitlines()
    assert 'train 0/2 compiling the step' in lines
    assert 'evaluate 0/3 10 videos, compiling the step' in lines


@pytest.mark.slow
def test_a_run_starts_from_another(straight, make_config, tmp_path, monkeypatch):
    seen = []

    def look(self, state):
        seen.append(jax.device_get(state))
        raise Interruption

    monkeypatch.setattr(train._Loop, '__call__', look)
    with pytest.raises(Interruption):
        train.train(make_config(init_from=str(straight[0]), seed=5), str(tmp_path / 'run'))
    (state,) = seen
    assert int(state.step) == 0
    averaged = tree_sha256(restored(straight[0], NUM_STEPS)['ema'])
    assert tree_sha256(state.params) == tree_sha256(state.ema) == averaged
    moments = jax.tree.leaves(state.opt_state)
    assert not any(np.any(leaf) for leaf in moments)  # of the optimizer, nothing is taken over


@pytest.mark.parametrize(
    ('every', 'steps', 'expected'),
    [(20, 9999, 20), (20, 60, 20), (20, 50, 5), (20, 3, 1), (2, 8, 2), (1, 500, 1), (0, 5, 0)],
)
def test_a_short_run_has_lines_of_figures_too(make_config, every, steps, expected):
    assert train.log_every(make_config(**{'log.every_steps': every}), steps) == expected


def tiny_state(step):
    params = {'a': jnp.arange(6.0) + step, 'b': {'c': jnp.full((2, 3), float(step))}}
    return TrainState(
        step=jnp.int32(step), params=params, collections={}, opt_state=(jnp.zeros(3),), ema=None
    )


@pytest.fixture(scope='module')
def saved_steps(tmp_path_factory):
    """A folder with checkpoints 1 and 2 of a state of three arrays."""
    workdir = tmp_path_factory.mktemp('saved')
    checkpoints = checkpoint.Checkpoints(workdir, keep=2)
    for step in (1, 2):
        checkpoints.save(tiny_state(step), {'format_version': 1, 'step': step})
    checkpoints.close()
    return workdir


def abstract_state():
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tiny_state(0)
    )


@pytest.mark.parametrize('how', ['missing', 'empty', 'half', 'noise'])
def test_damage_to_any_file_falls_back_or_does_not_matter(saved_steps, tmp_path, how):
    files = [p for p in (saved_steps / 'checkpoints' / '2').rglob('*') if p.is_file()]
    assert len(files) > 3
    kept, failures = 0, {}
    for number, file in enumerate(files):
        workdir = shutil.copytree(saved_steps, tmp_path / str(number))
        name = str(file.relative_to(saved_steps))
        spoil(workdir / name, how)
        checkpoints = checkpoint.Checkpoints(workdir, keep=2)
        try:
            state, metadata = checkpoints.restore_latest(abstract_state())
        except Exception as error:
            failures[name] = repr(error)[:200]
            continue
        finally:
            checkpoints.close()
        step = int(state.step)
        assert step in (1, 2), name
        np.testing.assert_array_equal(state.params['a'], np.arange(6.0) + step, err_msg=name)
        np.testing.assert_array_equal(state.params['b']['c'], np.full((2, 3), step))
        assert metadata['step'] == step
        assert (workdir / 'checkpoints-broken' / '2').exists() == (step == 1)
        kept += step == 2
    assert not failures
    assert kept < len(files)


def spoil(path, how):
    content = path.read_bytes()
    if how == 'missing':
        path.unlink()
    elif how == 'noise':
        path.write_bytes(np.random.default_rng(0).bytes(len(content)))
    else:
        path.write_bytes(content[: len(content) // 2 if how == 'half' else 0])


def test_nothing_readable_is_an_error_and_not_a_new_run(saved_steps, tmp_path):
    workdir = shutil.copytree(saved_steps, tmp_path / 'run')
    for step in ('1', '2'):
        damage(workdir / 'checkpoints' / step / 'state')
    checkpoints = checkpoint.Checkpoints(workdir)
    with pytest.raises(RuntimeError, match='checkpoints-broken'):
        checkpoints.restore_latest(abstract_state())
    checkpoints.close()
    assert steps_of(workdir, 'checkpoints-broken') == [1, 2]


def test_a_bare_folder_is_no_checkpoint(saved_steps, tmp_path):
    workdir = shutil.copytree(saved_steps, tmp_path / 'run')
    (workdir / 'checkpoints' / '7').mkdir()
    assert checkpoint.find_checkpoint(workdir).name == '2'
    checkpoints = checkpoint.Checkpoints(workdir, keep=2)
    assert checkpoints.latest_metadata()['step'] == 2
    assert int(checkpoints.restore_latest(abstract_state())[0].step) == 2
    checkpoints.save(tiny_state(7), {'format_version': 1, 'step': 7})
    checkpoints.close()
    assert checkpoint.read_metadata(checkpoint.find_checkpoint(workdir))['step'] == 7


def test_the_newest_and_the_best_are_kept(tmp_path):
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=1)
    for step, top1 in ((1, 0.2), (2, 0.9), (3, None), (4, 0.5), (5, None)):
        checkpoints.save(tiny_state(step), {'format_version': 1})
        if top1 is not None:
            checkpoints.add_score(step, 'top1', top1)
    checkpoints.wait()
    assert checkpoints.best() == (2, 0.9)
    checkpoints.close()
    assert steps_of(tmp_path) == [2, 5]


def test_a_checkpoint_of_a_newer_format_is_refused(tmp_path):
    checkpoints = checkpoint.Checkpoints(tmp_path)
    checkpoints.save(tiny_state(1), {'format_version': checkpoint.FORMAT_VERSION + 1})
    checkpoints.close()
    with pytest.raises(ValueError, match='update dist_jax'):
        checkpoint.read_metadata(checkpoint.find_checkpoint(tmp_path))
    with pytest.raises(ValueError, match=r'no checkpoint of step 3; it has \[1\]'):
        checkpoint.find_checkpoint(tmp_path, 3)
    with pytest.raises(ValueError, match='holds no checkpoint that was written'):
        checkpoint.find_checkpoint(tmp_path / 'none')


def test_what_may_change_between_sessions():
    def metadata(**fields):
        config = ConfigDict(base.plain(dist.get_config('demo')))
        config.update_from_flattened_dict(fields)
        return {
            'config': base.plain(config),
            'class_names': [['a']],
            'train_list_sha256': '0',
            'backbone': {'params_sha256': '1' * 64, 'name': 'tiny'},
        }

    saved = metadata()
    free = {
        'data.root': '/elsewhere',
        'data.num_threads': 3,
        'checkpoint.keep': 4,
        'log.every_steps': 3,
        'eval.num_clips': 5,
    }
    checkpoint.check_same_run(saved, metadata(**free))
    for field, value in {
        'num_steps': 7,
        'accumulation': 2,
        'data.num_frames': 8,
        'data.name': 'ucf101',
        'model.temporal_dim': 1,
        'mixing.mixup_alpha': 0.5,
        'optimizer.ema_decay': 0.5,
        'batch_norm.groups': 4,
    }.items():
        with pytest.raises(ValueError) as error:
            checkpoint.check_same_run(saved, metadata(**{field: value}))
        assert named(error) == [field]
    with pytest.raises(ValueError, match=r'num_steps: saved 0, now 900[^$]*config\.init_from=RUN'):
        checkpoint.check_same_run(saved, metadata(num_steps=900))
    older = metadata()
    del older['config']['model']['temporal_branch']  # of DiST, younger than its first runs
    checkpoint.check_same_run(older, saved)
    with pytest.raises(ValueError, match='temporal_branch: saved True, now False'):
        checkpoint.check_same_run(older, metadata(**{'model.temporal_branch': False}))
    with pytest.raises(ValueError, match='class_names'):
        checkpoint.check_same_run(saved, metadata() | {'class_names': [['b']]})


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        (
            {'num_steps': 0, 'num_epochs': 0.1, 'optimizer.warmup_epochs': 0.0},
            'make no step; set num_steps',
        ),
        ({'batch_size': 0}, 'batch_size=0 must be a positive multiple'),
        ({'accumulation': 3}, r'batch_size=4 must be a positive multiple of 3 .*accumulation'),
        ({'batch_norm.groups': 0}, r'batch_norm\.groups=0 must be at least 1'),
        (
            {'batch_norm.groups': 3},
            r'groups=3 must divide the 2 clips of batch_size=4 / accumulation=2',
        ),
        ({'batch_norm.groups': 2}, r"groups=2: model\.family='dist' has no batch statistics"),
        (
            {'batch_norm.precise_batches': 2},
            r"precise_batches=2: model\.family='dist' has no batch statistics; leave it at 0",
        ),
        ({'backbone.checkpoint': ''}, r'backbone\.checkpoint is empty'),
        ({'backbone.name': 'tiny2'}, r"backbone\.name='tiny2' is not one of"),
        ({'model.family': 'dits'}, r"model\.family='dits' is not one of"),
        ({'model.dtype': 'float16'}, r"model\.dtype='float16' is not one of"),
        ({'data.name': 'kinetics'}, r"data\.name='kinetics' is not one of"),
        ({'accumulation': 0}, 'accumulation=0 must be at least 1'),
        ({'num_epochs': 0.0}, r'num_epochs=0\.0 must be above 0'),
        ({'num_steps': -1}, 'num_steps=-1 must be at least 0'),
        ({'checkpoint.keep': 0}, r'checkpoint\.keep=0 must be at least 1'),
        ({'checkpoint.every_steps': -1}, r'checkpoint\.every_steps=-1 must be at least 0'),
        ({'log.every_steps': -5}, r'log\.every_steps=-5 must be at least 0'),
        ({'eval.every_epochs': -1.0}, r'eval\.every_epochs=-1\.0 must be at least 0'),
        ({'eval.every_epochs': math.nan}, r'eval\.every_epochs=nan must be a finite number'),
        ({'optimizer.peak_lr': math.inf}, r'optimizer\.peak_lr=inf must be a finite number'),
        ({'data.crop_area': (math.nan, 1.0)}, r'data\.crop_area=nan must be a finite number'),
        ({'data.max_bad_share': 1.5}, r'data\.max_bad_share=1\.5 must be at most 1'),
        ({'seed': 10**20}, r'seed=1.* must be at most 4294967295'),
        ({'num_steps': 2**31}, r'num_steps=2147483648 must be at most 2147483647'),
        ({'batch_size': 10**8}, r'batch_size=100000000 must be at most 1048576'),
        ({'data.num_frames': 10**8}, r'data\.num_frames=100000000 must be at most 4096'),
        ({'data.image_size': 10**6}, r'data\.image_size=1000000 must be at most 4096'),
        ({'data.image_size': 50}, r'data\.image_size: .*=50 is not a multiple of patch_size=8'),
        ({'data.num_threads': 10**5}, r'data\.num_threads=100000 must be at most 1024'),
        ({'model.alpha': 0}, r'model\.alpha=0 must be at least 1'),
        ({'model.temporal_dim': -1}, r'model\.temporal_dim=-1 must be at least 1'),
        ({'model.integration_mlp_ratio': -1.0}, r'integration_mlp_ratio=-1\.0 must be above 0'),
        ({'eval.num_clips': 0}, r'eval\.num_clips=0 must be at least 1'),
        ({'data.resize': (64.5,)}, r'data\.resize=64\.5 must be whole pixels'),
        ({'model.family': 'frame_mean'}, r"model\.family='frame_mean' has no option model\."),
        ({'data.record_timeout': 0.0}, r'data\.record_timeout=0\.0 must be above 0'),
        ({'optimizer.ema_decay': 1.0}, r'optimizer\.ema_decay=1\.0 must be at least 0 and below 1'),
        (
            {'num_steps': 0, 'num_epochs': 2.0, 'optimizer.warmup_epochs': 6.0},
            r'optimizer\.warmup_epochs=6\.0 is not shorter than num_epochs=2\.0.*=0\.33',
        ),
    ],
)
def test_wrong_fields_are_named(make_config, tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        train.train(make_config(**fields), str(tmp_path / 'run'))
    assert not (tmp_path / 'run' / 'checkpoints').exists()
