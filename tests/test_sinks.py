"""Services that get the figures of a run, and steps that are traced; the services are stand-ins."""

import json
import logging
import time

import fake_services
import jax
import pytest
from fake_services import calls

from dist_jax import main, train
from dist_jax.configs import frame_mean
from dist_jax.watching import sinks


@pytest.fixture(autouse=True)
def services(monkeypatch):
    fake_services.install(monkeypatch)


def config_of(clips, **log):
    config = frame_mean.get_config('demo')
    config.model.unroll = False
    config.update(batch_size=4, num_steps=8)
    config.data.update(
        root=str(clips),
        train_list='train.txt',
        val_list='val.txt',
        label_map='labels.txt',
        num_frames=4,
        image_size=48,
    )
    config.eval.batch_size = 8
    config.log.update(every_steps=2, tensorboard=False, **log)
    return config


def test_a_run_and_its_restart_are_one_run_of_each_service(clips, tmp_path, monkeypatch):
    config = config_of(clips, report_to='wandb, mlflow,trackio', profile=2)
    workdir = tmp_path / 'mine'
    evaluate = train._Loop._evaluate

    def broken(*_):
        raise OSError('no')

    monkeypatch.setattr(train._Loop, '_evaluate', broken)
    with pytest.raises(OSError, match='no'):
        train.train(config, str(workdir))
    ids = json.loads((workdir / sinks.FILE).read_text())
    assert set(ids) == set(sinks.SINKS)
    assert calls('wandb', 'finish')[-1][-1] == {'exit_code': 1}
    assert calls('mlflow', 'set_terminated')[-1] == (ids['mlflow'], 'FAILED')
    monkeypatch.setattr(train._Loop, '_evaluate', evaluate)
    summary = train.train(config, str(workdir))
    assert json.loads((workdir / sinks.FILE).read_text()) == ids
    # The same run, by its id, with the fields of the config under their names.
    first, second = (values[-1] for values in calls('wandb', 'init'))
    assert first['id'] == second['id'] == ids['wandb'] and first['resume'] == 'allow'
    assert first['config']['data.num_frames'] == 4 and first['name'] == 'mine'
    assert [values[-1]['name'] for values in calls('trackio', 'init')] == [ids['trackio']] * 2
    assert len(calls('mlflow', 'create_run')) == 1
    assert calls('mlflow', 'update_run')[0] == (ids['mlflow'], {'status': 'RUNNING'})
    # Each step with its figures.
    rows = [values[0] for values in calls('wandb', 'log')]
    assert [row['step'] for row in rows if 'loss' in row] == [2, 4, 6, 8]
    assert [values[-1]['step'] for values in calls('trackio', 'log')][:4] == [2, 4, 6, 8]
    batches = [values[-1] for values in calls('mlflow', 'log_batch')]
    names = {row[0] for batch in batches for row in batch.get('metrics', ())}
    assert {'loss', 'val_top1', 'final_val_top1'} <= names
    # Steps of the first start were traced; the second had none left.
    (file,) = workdir.glob('profile/plugins/profile/*/*.xplane.pb')
    planes = jax.profiler.ProfileData.from_file(str(file)).planes
    events = [event for plane in planes for line in plane.lines for event in line.events]
    steps = [dict(event.stats).get('step_num') for event in events if event.name == 'train']
    assert sorted(map(int, steps)) == [3, 4]
    # And the report.
    ((found,),) = calls('wandb summary', 'update')
    assert found['val_top1'] == summary['val_top1'] and 'params_sha256' not in found
    assert '<html' in rows[-1]['report'] and '<html' in calls('mlflow', 'log_text')[0][1]
    assert calls('wandb', 'finish')[-1][-1] == {'exit_code': 0}
    assert calls('mlflow', 'set_terminated')[-1] == (ids['mlflow'], 'FINISHED')


def test_a_service_that_fails_is_one_warning(clips, tmp_path, caplog, monkeypatch):
    monkeypatch.setitem(sinks.FINISH_SECONDS, sinks.DONE, 0.3)

    def slow(run):
        time.sleep(1)
        raise AssertionError('nobody waits for this')

    monkeypatch.setitem(sinks.SINKS, 'trackio', slow)
    fake_services.Recorder.broken = {'log', 'create_run', 'summary'}
    config = config_of(clips, report_to='wandb,mlflow,trackio')
    with caplog.at_level(logging.WARNING), sinks.watched(config, tmp_path) as watchers:
        watchers.open({'seed': 0})
        for step in range(5):
            watchers.scalars(step, {'loss': float('nan') if step == 3 else 1.0})
    told = [record.getMessage() for record in caplog.records if 'report_to' in record.getMessage()]
    assert sorted(text.split(': ')[1] for text in told) == ['mlflow', 'trackio', 'wandb'], told
    assert any('wandb is not in reach' in text and 'The run goes on' in text for text in told)
    assert calls('wandb', 'finish') and ({'step': 3},) in calls('wandb', 'log')


def test_a_service_that_wants_to_exit_is_one_warning(clips, tmp_path, caplog, monkeypatch):
    def leaves(run):
        raise SystemExit(1)

    monkeypatch.setitem(sinks.SINKS, 'trackio', leaves)
    config = config_of(clips, report_to='trackio')
    with caplog.at_level(logging.WARNING), sinks.watched(config, tmp_path) as watchers:
        watchers.open({'seed': 0})
        watchers.scalars(1, {'loss': 1.0})
    assert 'trackio: 1. The run goes on without it' in caplog.text


def test_services_that_are_not_there_are_told_before_anything_starts(clips, tmp_path, monkeypatch):
    for name, text in (('wadnb', 'not one of wandb, mlflow'), ('wandb', r'dist_jax\[wandb\]')):
        if name == 'wandb':
            monkeypatch.setattr(sinks.importlib.util, 'find_spec', lambda _: None)
        with pytest.raises(ValueError, match=text):
            train.train(config_of(clips, report_to=name), str(tmp_path / 'run'))
    assert not (tmp_path / 'run' / 'checkpoints').exists()


def test_steps_to_trace_are_a_number(clips, tmp_path, capsys):
    arguments = ['train', '--config=frame_mean:demo', f'--workdir={tmp_path}', '--profile=-1']
    assert main.main(arguments) == 2
    assert 'log.profile=-1 must be at least 0' in capsys.readouterr().err
