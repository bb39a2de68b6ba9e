"""The doctor: every check that fails says on which host, and the way out."""

import json
import threading

import jax
import pytest

from dist_jax import backbones, doctor, main
from dist_jax.configs import dist


@pytest.fixture
def config(clips, tmp_path):
    config = dist.get_config('demo')
    config.backbone.checkpoint = str(tmp_path / 'backbone')
    backbones.write_random(config.backbone.checkpoint, 'tiny')
    config.data.update(
        root=str(clips), train_list='train.txt', val_list='val.txt', label_map='labels.txt'
    )
    return config


def states(checks):
    return {check.name: check.state for check in checks}


def by_name(checks, name):
    (found,) = [check for check in checks if check.name == name]
    return found


def test_a_good_environment_is_all_ok_and_leaves_nothing(config, tmp_path):
    checks = doctor.run(doctor.Request(config, str(tmp_path / 'run'), jax.device_count()))
    assert set(states(checks).values()) <= {doctor.OK, doctor.WARNING}
    assert by_name(checks, 'training list').found.startswith('18 videos')
    assert by_name(checks, 'backbone').found.startswith('tiny-random')
    assert by_name(checks, 'validation list').found.startswith('10 videos')
    assert not list((tmp_path / 'run').iterdir())


def test_what_is_wrong_on_one_host_is_found(config, clips, tmp_path):
    (tmp_path / 'file').write_text('')
    config.data.train_list = 'missing.txt'
    config.data.val_list = str(tmp_path / 'val.txt')
    bad = tmp_path / 'bad.mp4'
    bad.write_bytes(b'no video')
    (tmp_path / 'val.txt').write_text(f'{bad} 0\n' * 5)
    config.backbone.checkpoint = str(clips)
    config.batch_size = 0
    request = doctor.Request(config, str(tmp_path / 'file' / 'run'), jax.device_count() + 1)
    checks = doctor.run(request)
    failed = {name for name, state in states(checks).items() if state == doctor.FAILED}
    assert failed == {
        'devices',
        'workdir',
        'batch',
        'backbone',
        'training list',
        'validation list',
    }
    assert f'expected {jax.device_count() + 1}' in by_name(checks, 'devices').found
    assert 'missing.txt' in by_name(checks, 'training list').found
    assert 'bad.mp4' in by_name(checks, 'validation list').found
    assert 'not a converted checkpoint' in by_name(checks, 'backbone').found
    assert 'batch_size=0' in by_name(checks, 'batch').found
    assert all(check.help for check in checks if check.state == doctor.FAILED)


def test_a_recipe_that_does_not_fit_is_found(config, tmp_path):
    config.data.update(rand_augment='rand-m7', auto_augment='original')
    checks = doctor.run(doctor.Request(config, str(tmp_path / 'run'), jax.device_count()))
    assert states(checks)['batch'] == doctor.FAILED
    assert 'exclude each other' in by_name(checks, 'batch').found


def test_a_backbone_of_another_geometry_fails_as_in_training(config):
    config.backbone.name = 'vit_b16'
    check = by_name(doctor.run(doctor.Request(config)), 'backbone')
    assert check.state == doctor.FAILED and 'is not a vit_b16 (backbone.name)' in check.found


@pytest.mark.parametrize(
    ('fields', 'name', 'message'),
    [
        ({'backbone.name': 'vit_b17'}, 'backbone', "backbone.name='vit_b17' is not one of"),
        ({'data.image_size': 50}, 'backbone', 'data.image_size: image_size=50 is not a multiple'),
        ({'task.name': 'clasify'}, 'batch', "task.name='clasify' is not one of"),
    ],
)
def test_what_training_would_refuse_is_found_without_weights(config, fields, name, message):
    config.update_from_flattened_dict({'backbone.checkpoint': 'random'} | fields)
    check = by_name(doctor.run(doctor.Request(config)), name)
    assert check.state == doctor.FAILED and message in check.found


def test_a_batch_that_is_larger_than_the_list_is_not_ok(config):
    config.batch_size = 256
    check = by_name(doctor.run(doctor.Request(config)), 'batch')
    assert check.state == doctor.WARNING and 'the training list has 18 videos' in check.found
    assert '--config.batch_size to 18' in check.help
    config.update(num_steps=0, num_epochs=1.0)
    config.optimizer.warmup_epochs = 0.1
    check = by_name(doctor.run(doctor.Request(config)), 'batch')
    assert check.state == doctor.FAILED and 'make no step' in check.found


def test_a_workdir_that_does_not_answer_is_told_soon(config, monkeypatch):
    silence = threading.Event()
    monkeypatch.setattr(doctor, '_try_workdir', lambda *_: silence.wait(60) and '')
    monkeypatch.setattr(doctor, 'WORKDIR_SECONDS', 0.05)
    check = by_name(doctor.run(doctor.Request(None, 'gs://bucket/run')), 'workdir')
    silence.set()
    assert check.state == doctor.FAILED and 'no answer within' in check.found
    assert 'network' in check.help and check.help.count('.') < 8


def test_batches_that_do_not_fit_into_memory_are_found(hosts, config):
    # 256 clips of 64 frames of 224 x 224 pixels: 2.3 GiB each, 8 made ahead and 3 lent.
    config.batch_size = 256
    config.data.update(num_frames=64, image_size=224, num_workers=4, val_list='')
    for row in hosts:
        row |= {'memory': 100 << 30, 'cpus': 4, 'all_cpus': 64}
    check = doctor._readers(hosts, config)
    assert check.state == doctor.OK
    assert '4 processes a host, 4 CPUs of 64' in check.found
    assert 'batches of 25.3 GiB, 100.0 GiB free' in check.found
    hosts[2]['memory'] = 40 << 30
    check = doctor._readers(hosts, config)
    assert check.state == doctor.WARNING and check.found.endswith('on 2 (h2)')
    assert 'data.buffer_size=5 (now 8)' in check.help
    hosts[2]['memory'] = 20 << 30
    assert doctor._readers(hosts, config).state == doctor.FAILED
    hosts[2]['memory'] = 5 << 30
    check = doctor._readers(hosts, config)
    assert 'buffer_size' not in check.help and '--config.batch_size' in check.help
    for row in hosts:
        row['memory'] = None
    assert doctor._readers(hosts, config).state == doctor.OK
    config.data.update(num_workers=0, num_threads=2, val_list='val.txt')
    config.eval.update(batch_size=8, num_clips=4, num_crops=3)  # 96 clips, 4 made ahead
    assert '2 threads a host' in doctor._readers(hosts, config).found
    assert 'batches of 28.1 GiB' in doctor._readers(hosts, config).found
    config.eval.image_size = 448  # four times as many pixels
    assert 'batches of 43.6 GiB' in doctor._readers(hosts, config).found


def test_one_broken_video_is_a_warning(config, clips, tmp_path):
    bad = tmp_path / 'bad.mp4'
    bad.write_bytes(b'no video')
    (tmp_path / 'val.txt').write_text(f'{(clips / "val.txt").read_text()}{bad} 0\n')
    config.data.val_list = str(tmp_path / 'val.txt')
    check = by_name(doctor.run(doctor.Request(config)), 'validation list')
    assert check.state == doctor.WARNING and 'dist_jax check' in check.help
    assert '2 of 3 looked at can be read (video 10: ' in check.found and 'bad.mp4' in check.found


def test_the_command_prints_a_table_and_the_ways_out(capsys, tmp_path):
    assert main.main(['doctor', f'--workdir={tmp_path}']) == 0
    assert 'versions' in capsys.readouterr().out
    assert main.main(['doctor', '--devices=4096']) == 1
    output = capsys.readouterr().out
    assert 'failed' in output and 'devices: Start the command on all hosts' in output


def test_training_is_stopped_by_what_failed(config, tmp_path, caplog):
    with caplog.at_level('INFO', 'dist_jax'):
        doctor.check_before_training(config, str(tmp_path))
    assert 'checked' in caplog.text
    config.data.train_list = 'missing.txt'
    with pytest.raises(doctor.NotReadyError, match=r'training list: .*missing') as error:
        doctor.check_before_training(config, str(tmp_path))
    assert '--skip_checks' in str(error.value)


@pytest.fixture
def hosts(config, tmp_path):
    """What four hosts that agree would say."""
    row = doctor._look(doctor.Request(config, str(tmp_path / 'run')), 'token')
    return [json.loads(json.dumps(row | {'host': f'h{i}', 'time': 1000.0})) for i in range(4)]


def test_hosts_that_agree_are_ok(hosts):
    lines = ('_versions', '_code', '_processes', '_clock', '_config')
    for line in lines:
        assert getattr(doctor, line)(hosts).state == doctor.OK, line
    assert doctor._workdir(hosts, [[], [], [], []], 'w').found == 'w written and read by all 4'


def test_the_host_that_is_unlike_the_others_is_named(hosts):
    hosts[2]['versions'] = {'jax': '0.1'}
    hosts[2]['code'] = 'other'
    hosts[2]['config'] = 'other'
    hosts[2]['training list'] = {'found': '17 videos'}
    hosts[2]['time'] += 60
    for check in (
        doctor._versions(hosts),
        doctor._code(hosts),
        doctor._config(hosts),
        doctor._merge(hosts, 'training list'),
    ):
        assert check.state == doctor.FAILED
        assert check.found.endswith(('another on 2 (h2)', 'others on 2 (h2)'))
        assert check.help
    clock = doctor._clock(hosts)
    assert clock.state == doctor.WARNING and '60.00 s apart: 2 (h2)' in clock.found


def test_a_workdir_that_not_all_can_use_is_told_from_one_that_is_not_shared(hosts):
    shared = [[1], [0], [], []]
    check = doctor._workdir(hosts, shared, '/w')
    assert '/w is not one folder: 0 does not see [1]; 1 does not see [0]' in check.found
    hosts[3]['workdir'] = 'Permission denied'
    check = doctor._workdir(hosts, shared, 'gs://b/w')
    assert check.found == 'cannot be used on 3 (h3): Permission denied'
    assert 'objectAdmin' in check.help
    assert 'every host can write' in doctor._workdir(hosts, shared, '/w').help


def test_files_that_one_host_lacks_are_told_from_a_wrong_field(hosts):
    hosts[1]['backbone'] = {'problem': 'no such directory'}
    check = doctor._merge(hosts, 'backbone')
    assert check.found == 'no such directory (on 1 (h1))' and 'every host' in check.help
    for row in hosts:
        row['backbone'] = {'problem': 'no such directory'}
    assert 'Correct backbone.checkpoint' in doctor._merge(hosts, 'backbone').help


def test_workers_that_did_not_start_and_chips_that_nobody_uses(hosts, monkeypatch):
    monkeypatch.setenv('TPU_WORKER_HOSTNAMES', 'a,b')
    monkeypatch.setenv('MEGASCALE_NUM_SLICES', '4')
    check = doctor._processes(hosts)
    assert check.state == doctor.FAILED and 'names 8 workers' in check.found
    hosts[0]['tpu_chips'] = True
    check = doctor._devices(hosts, 0)
    assert 'TPU chips that jax does not use on 0 (h0)' in check.found and '[tpu]' in check.help
    hosts[0]['tpu_chips'] = False
    hosts[3]['local_devices'] = 3
    assert 'other numbers on 3 (h3)' in doctor._devices(hosts, 0).found


def test_little_disk_is_a_warning(hosts):
    hosts[1]['disk'] = 0.5
    check = doctor._disk(hosts)
    assert check.state == doctor.WARNING and '0.5 GiB' in check.found and '1 (h1)' in check.found


def test_the_code_digest_follows_the_files(monkeypatch, tmp_path):
    (tmp_path / 'dist_jax' / 'configs').mkdir(parents=True)
    monkeypatch.setattr(doctor, '__file__', str(tmp_path / 'dist_jax' / 'doctor.py'))
    file = tmp_path / 'dist_jax' / 'configs' / 'a.py'
    file.write_text('a = 1\n')
    before = doctor.code_sha256()
    assert doctor.code_sha256() == before
    file.write_text('a = 2\n')
    assert doctor.code_sha256() != before
