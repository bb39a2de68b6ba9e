"""Runs of several real processes: the same result as one, and nobody waits for the dead."""

import contextlib
import hashlib
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import jax
import numpy as np
import pytest

from dist_jax import backbones, checkpoint, pod
from dist_jax.metric_writer import read_metrics
from dist_jax.models.params import flatten
from dist_jax.plan import topology
from input_pipeline import pipeline
from input_pipeline.sources import open_source

TIMEOUT_SECONDS = 240
LOST_SECONDS = 6  # of silence
NUM_STEPS = 24  # of 4 clips, 18 in the list: epochs end inside a step


# Who is lost, without processes.


SLURM = {
    'SLURM_JOB_ID': '7',
    'SLURM_STEP_ID': '0',
    'SLURM_STEP_NODELIST': 'node[1-2]',
    'SLURM_NTASKS': '4',
    'SLURM_PROCID': '2',
    'SLURM_LOCALID': '0',
}
OPEN_MPI = {'OMPI_COMM_WORLD_SIZE': '4', 'OMPI_COMM_WORLD_RANK': '2'}


@pytest.mark.parametrize(
    ('environment', 'on_tpu_vm', 'expected'),
    [
        ({}, False, None),
        ({'TPU_WORKER_HOSTNAMES': 'localhost'}, True, None),
        ({'TPU_WORKER_HOSTNAMES': 'a,b'}, True, pod.Address()),
        ({'TPU_WORKER_HOSTNAMES': 'a', 'MEGASCALE_NUM_SLICES': '2'}, True, pod.Address()),
        ({}, True, pod.Address()),  # a TPU VM slice sets no variables
        ({'TPU_SKIP_MDS_QUERY': '1'}, True, None),
        ({'JAX_PLATFORMS': 'cpu'}, True, None),
        ({'JAX_COORDINATOR_ADDRESS': 'a:1'}, False, pod.Address('a:1')),
        (SLURM, False, pod.Address()),
        (SLURM | {'JAX_COORDINATOR_ADDRESS': 'a:1'}, False, pod.Address('a:1')),
        (SLURM | {'SLURM_STEP_NUM_TASKS': '4'}, False, pod.Address()),
        # The shell of salloc, the batch script, a shell in a step of its own, one task.
        ({'SLURM_JOB_ID': '7', 'SLURM_NTASKS': '4'}, False, None),
        ({'SLURM_JOB_ID': '7', 'SLURM_NTASKS': '4', 'SLURM_PROCID': '0'}, False, None),
        (SLURM | {'SLURM_PROCID': '0', 'SLURM_STEP_NUM_TASKS': '1'}, False, None),
        (SLURM | {'SLURM_PROCID': '0', 'SLURM_NTASKS': '1'}, False, None),
        (SLURM | {'JAX_NUM_PROCESSES': '1'}, False, None),  # each on its own
        (OPEN_MPI | {'OMPI_MCA_orte_hnp_uri': '4096.0;tcp://10.0.0.1:9'}, False, pod.Address()),
        (OPEN_MPI | {'JAX_COORDINATOR_ADDRESS': 'a:1'}, False, pod.Address('a:1', 4, 2)),
        (OPEN_MPI | {'OMPI_COMM_WORLD_SIZE': '1'}, False, None),
        (
            {
                'JAX_COORDINATOR_ADDRESS': 'a:1',
                'JAX_NUM_PROCESSES': '4',
                'JAX_PROCESS_ID': '3',
                'TPU_WORKER_HOSTNAMES': 'a,b',
            },
            True,
            pod.Address('a:1', 4, 3),
        ),
    ],
)
def test_how_a_process_finds_the_others(environment, on_tpu_vm, expected):
    assert pod.find_address(environment, on_tpu_vm) == expected


@pytest.mark.parametrize(
    ('coordinator', 'count', 'own', 'message'),
    [
        ('', '2', '0', 'JAX_COORDINATOR_ADDRESS=HOST:PORT'),
        ('a:1', '2', '', 'belong together'),
        ('a', '2', '0', "'a' must be HOST:PORT"),
        ('a:1', '2', '2', r'JAX_PROCESS_ID=2 must be in 0 to JAX_NUM_PROCESSES - 1 = 1'),
        ('a:1', 'two', '0', 'must be whole numbers'),
    ],
)
def test_variables_that_do_not_fit_are_named(coordinator, count, own, message):
    variables = {
        'JAX_COORDINATOR_ADDRESS': coordinator,
        'JAX_NUM_PROCESSES': count,
        'JAX_PROCESS_ID': own,
    }
    with pytest.raises(ValueError, match=message):
        pod.find_address({k: v for k, v in variables.items() if v}, False)


@pytest.mark.parametrize(
    ('environment', 'found'),
    [
        ({'SLURM_NTASKS': '4', 'SLURM_PROCID': '1'}, '4 tasks of Slurm'),
        (OPEN_MPI, 'OMPI_COMM_WORLD_SIZE=4'),
    ],
)
def test_tasks_that_cannot_find_each_other_do_not_run_alone(environment, found):
    with pytest.raises(ValueError, match=found) as error:
        pod.find_address(environment, False)
    assert 'set JAX_COORDINATOR_ADDRESS=HOST:PORT' in str(error.value)
    assert 'JAX_NUM_PROCESSES=1' in str(error.value)


def machine(root, device, vendor='0x1ae0', kind='0xff0000'):
    """Files of a machine with one device."""
    (root / 'dev' / device).parent.mkdir(parents=True)
    (root / 'dev' / device).touch()
    pci = root / 'sys' / 'bus' / 'pci' / 'devices' / '0000:00:04.0'
    pci.mkdir(parents=True)
    (pci / 'vendor').write_text(f'{vendor}\n')
    (pci / 'class').write_text(f'{kind}\n')
    return str(root)


def test_only_devices_of_google_are_tpus(tmp_path):
    assert pod.has_tpu(machine(tmp_path / 'v5e', 'vfio/0'))
    assert pod.has_tpu(machine(tmp_path / 'v4', 'accel0'))
    assert not pod.has_tpu(machine(tmp_path / 'gpu', 'vfio/12', vendor='0x10de', kind='0x030200'))
    assert not pod.has_tpu(machine(tmp_path / 'gvnic', 'vfio/1', kind='0x020000'))
    assert not pod.has_tpu(machine(tmp_path / 'no_group', 'vfio/vfio'))


def test_a_machine_that_seems_to_have_tpus_and_cannot_join_goes_on_alone(monkeypatch, caplog):
    def initialize(*_, **__):
        raise ConnectionError('metadata.google.internal: no such host')

    monkeypatch.setattr(jax.distributed, 'initialize', initialize)
    for name in ('JAX_PLATFORMS', *topology.ENVIRONMENT):  # planning sets them for its process
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pod, 'has_tpu', lambda: True)
    pod.join()
    assert pod.current() is None
    assert 'no such host' in caplog.text and 'goes on alone' in caplog.text
    monkeypatch.setenv('TPU_WORKER_HOSTNAMES', 'a,b')
    with pytest.raises(ConnectionError):
        pod.join()


def rows(*heartbeats, **fields):
    return {
        i: {'heartbeat': number, 'host': f'h{i}', 'step': 5} | fields
        for i, number in enumerate(heartbeats)
    }


def test_a_silent_process_is_lost_and_one_that_is_done_is_not():
    health = pod._Health(3, 12.0)
    start = health._asked
    assert health.lost(rows(1, 1, 1), start) is None
    for second in range(5, 15, 5):
        assert health.lost(rows(second, second, 1), start + second) is None
    verdict = health.lost(rows(15, 15, 1), start + 15)
    assert (verdict['process'], verdict['host'], verdict['code']) == (2, 'h2', pod.AGAIN)
    assert 'process 2 of 3 on h2 is lost: no heartbeat for 15 s, last seen at step 5' in (
        pod._sentence(verdict, 3)
    )
    health = pod._Health(2, 12.0)
    for second in range(0, 60, 5):
        assert health.lost(rows(second, 1, done=True), health._asked + 5) is None


def test_a_process_that_never_speaks_is_lost():
    health = pod._Health(2, 6.0)
    start = health._asked
    found = [health.lost({0: rows(1)[0]}, start + second) for second in range(0, 10, 2)]
    assert found[2] is None and found[4]['process'] == 1


def test_a_sleep_of_process_zero_is_not_the_silence_of_others():
    health = pod._Health(2, 12.0)
    start = health._asked
    health.lost(rows(1, 1), start)
    assert health.lost(rows(1, 1), start + 100) is None
    assert health.lost(rows(1, 2), start + 105) is None


def test_a_suspicion_shortens_the_wait():
    health = pod._Health(2, 12.0)
    start = health._asked
    health.lost(rows(1, 1), start)
    health.suspect()
    assert health.lost(rows(1, 1), start + 3) is None
    assert health.lost(rows(1, 1), start + 5)['process'] == 1


def test_the_process_that_keeps_the_others_waiting_is_named_at_doubling_intervals():
    health = pod._Health(4, 10.0)

    def at(seconds):
        table = rows(*range(4), since=seconds, doing='computing')
        table[2] |= {'doing': 'reading', 'step': 4}
        return health.stalled(table)

    assert at(5) == ''
    line = at(11)
    assert line.startswith('no step for 11 s') and 'process 2 (h2): reading after step 4' in line
    assert line.index('2 (h2)') < line.index('0 (h0)')
    assert at(15) == '' and at(21) and not at(30)
    assert at(1) == '' and at(11)  # it went on, and stalls again
    assert health.stalled(rows(1, 1, since=100, doing='evaluating')) == ''


# Processes.


def free_port():
    with socket.socket() as listener:
        listener.bind(('127.0.0.1', 0))
        return listener.getsockname()[1]


class Group:
    """The same command in several processes, each with a log of its own."""

    def __init__(self, command, count, folder, environment, present=None, extra=()):
        folder.mkdir(parents=True, exist_ok=True)
        self.logs = [folder / f'process_{i}.log' for i in range(count)]
        address = f'127.0.0.1:{free_port()}'
        self.processes = []
        for i in range(count if present is None else present):
            variables = {
                'JAX_COORDINATOR_ADDRESS': address,
                'JAX_NUM_PROCESSES': str(count),
                'JAX_PROCESS_ID': str(i),
            }
            with self.logs[i].open('a') as output:
                self.processes.append(
                    subprocess.Popen(
                        [*command, *(extra[i] if extra else ())],
                        stdout=output,
                        stderr=output,
                        env=os.environ | environment | (variables if count > 1 else {}),
                        start_new_session=True,
                    )
                )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with what it started
            process.wait()

    def until(self, moment):
        """Waits for a moment; no process may end before."""
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while not moment():
            alive = all(process.poll() is None for process in self.processes)
            assert alive and time.monotonic() < deadline, self.output()[-4000:]
            time.sleep(0.005)

    def codes(self):
        return [process.wait(TIMEOUT_SECONDS) for process in self.processes]

    def text(self, number):
        return self.logs[number].read_text()

    def output(self):
        return '\n'.join(log.read_text() for log in self.logs if log.exists())


@pytest.fixture(scope='module')
def environment(tmp_path_factory):
    return {
        'PYTHONPATH': str(Path(__file__).parents[1]),
        # Compilation is most of such a run; runs share it.
        'JAX_COMPILATION_CACHE_DIR': str(tmp_path_factory.mktemp('compiled')),
        'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
        'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1',
        'DIST_JAX_LOST_SECONDS': str(LOST_SECONDS),
        'DIST_JAX_JOIN_SECONDS': '120',
        'PYTHONUNBUFFERED': '1',
    }


MEMBER = """
import logging, sys, time
import jax
from dist_jax import ending, pod
from dist_jax.watching import stall
logging.basicConfig(format='%(message)s')
ending.listen(continues=True)
pod.join()
print('ready', flush=True)
if sys.argv[1] == 'loop':
    point = 0
    while True:
        point += 1
        ending.hold(lambda: None)
        if pod.stops_at(point):
            ending.stopping()
            print('stops at', point, flush=True)
            sys.exit(pod.leave(pod.AGAIN))
        time.sleep(0.001 * (1 + jax.process_index()))
if sys.argv[1] == 'stall':
    time.sleep(1 - jax.process_index())
    with stall.Watch(sys.argv[3], 3.0):
        pod.note(step=7, doing='reading' if jax.process_index() else 'computing')
        time.sleep(60)
if sys.argv[1] == 'error' and jax.process_index() == 1:
    pod.leave(2, ValueError('data.root: no folder /nowhere'), 'my own words')
for step in range(int(sys.argv[2]) * 20):
    if sys.argv[1] != 'slow' or step < 4:
        pod.note(step=step, doing='reading' if jax.process_index() else 'computing')
    time.sleep(0.05)
sys.exit(pod.leave(0))
"""


@pytest.fixture
def members(environment, tmp_path):
    """Starts two processes that join, say where they are, and do nothing."""

    def start(how, seconds=TIMEOUT_SECONDS, **variables):
        present = variables.pop('present', None)
        command = [sys.executable, '-c', MEMBER, how, str(seconds), str(tmp_path)]
        return Group(command, 2, tmp_path, environment | variables, present)

    return start


def test_hosts_that_do_not_agree_are_told_before_anything_is_compiled(environment, clips, tmp_path):
    backbone = str(tmp_path / 'backbone')
    backbones.write_random(backbone, 'tiny')
    command = [sys.executable, '-m', 'dist_jax.main', 'train', '--config=configs/dist.py:demo']
    command += [f'--config.backbone.checkpoint={backbone}', f'--config.data.root={clips}']
    command += ['--config.data.train_list=train.txt', '--config.data.label_map=labels.txt']
    extra = [(f'--workdir={tmp_path}/one',), (f'--workdir={tmp_path}/two', '--config.seed=7')]
    with Group(command, 2, tmp_path / 'logs', environment, extra=extra) as group:
        assert group.codes() == [1, 1], group.output()
    for number in (0, 1):
        text = group.text(number)
        assert 'the environment is not ready' in text and '--skip_checks' in text
        assert re.search(r'config: another on \d', text)
        assert 'is not one folder: 0 does not see [1]; 1 does not see [0]' in text
        assert 'backbone:' not in text and 'training list:' not in text
    assert not list((tmp_path / 'one').iterdir())


def ready(group):
    return lambda: all('ready' in log.read_text() for log in group.logs)


def test_no_heartbeat_from_before_the_end_comes_after_it():
    """One that was on its way when the process was done would tell of a silent process."""
    stored, waiting, free = [], threading.Event(), threading.Event()

    def key_value_set(key, value, allow_overwrite):
        if not waiting.is_set():
            waiting.set()
            free.wait(10)
        stored.append(json.loads(value))

    client = types.SimpleNamespace(key_value_set=key_value_set)
    member = pod.Member(client, 1, 2, 6.0, 'host:1')
    early = threading.Thread(target=member._send_heartbeat)
    early.start()
    waiting.wait(10)
    member.note(done=True)
    late = threading.Thread(target=member._send_heartbeat)
    late.start()
    late.join(0.2)
    free.set()
    early.join(10)
    late.join(10)
    assert [row.get('done', False) for row in stored] == [False, True]


def test_a_process_that_hangs_is_named_and_the_other_ends(members):
    with members('hang') as group:
        group.until(ready(group))
        time.sleep(2 * LOST_SECONDS / 6 + 1)  # a heartbeat with a step in it
        group.processes[1].send_signal(signal.SIGSTOP)
        start = time.monotonic()
        assert group.processes[0].wait(TIMEOUT_SECONDS) == pod.AGAIN
        assert LOST_SECONDS / 2 < time.monotonic() - start < LOST_SECONDS + 15
        text = group.text(0)
        assert 'process 1 of 2 on ' in text and 'is lost: no heartbeat' in text
        assert 'last seen at step' in text and 'Start the same command again' in text
        assert 'without a word' not in text


def test_when_one_stalls_all_write_where_they_are_and_end(members, tmp_path):
    with members('stall') as group:
        assert group.codes() == [pod.AGAIN] * 2, group.output()
    for number in (0, 1):
        assert 'no progress for 3 s (pod.stall_timeout)' in group.text(number)
        assert '<module>' in (tmp_path / f'stacks_{number}.txt').read_text()
    told = [number for number in (0, 1) if 'so this one ends too' in group.text(number)]
    assert told in ([0], [1], []), group.output()  # both may notice in the same second
    for number in told:
        doing = 'computing' if number else 'reading'
        said = rf'made no progress for \d+ s \({doing}, after step 7\)'
        assert re.search(said, group.text(number))


def test_an_error_on_one_host_ends_all_with_its_message_and_code(members):
    with members('error') as group:
        start = time.monotonic()
        assert group.codes() == [2, 2]
        assert time.monotonic() - start < 60
        assert 'my own words' in group.text(1)
        assert 'process 1 of 2 on ' in group.text(0)
        assert 'ended with an error' in group.text(0)
        assert 'data.root: no folder /nowhere' in group.text(0)


def test_without_process_zero_the_others_end_and_say_so(members):
    with members('hang') as group:
        group.until(ready(group))
        group.processes[0].kill()
        start = time.monotonic()
        assert group.processes[1].wait(TIMEOUT_SECONDS) == pod.AGAIN, group.output()
        assert time.monotonic() - start < LOST_SECONDS + 15
        assert 'is ended by jax: process 0, the coordinator at 127.0.0.1:' in group.text(1)
        assert 'without a word' not in group.text(1)
        deadline = time.monotonic() + 10
        while 'without a word of its own' not in group.text(0):  # the shell beside it
            assert time.monotonic() < deadline, group.output()
            time.sleep(0.05)


def test_a_frozen_process_zero_ends_the_others_before_jax_does(members):
    with members('hang') as group:
        group.until(ready(group))
        group.processes[0].send_signal(signal.SIGSTOP)
        start = time.monotonic()
        assert group.processes[1].wait(TIMEOUT_SECONDS) == pod.AGAIN, group.output()
        assert time.monotonic() - start < LOST_SECONDS + 5  # jax: twice that and 10 s
        text = group.text(1)
        assert 'process 0 of 2, the coordinator at 127.0.0.1:' in text
        assert 'has not answered for' in text and 'Start the same command again' in text
        assert 'without a word' not in text and '@  ' not in text


@pytest.mark.parametrize('number', [0, 1])
def test_before_training_a_signal_to_one_process_ends_all(members, number):
    with members('hang') as group:
        group.until(ready(group))
        group.processes[number].send_signal(signal.SIGTERM)
        start = time.monotonic()
        assert group.codes() == [pod.AGAIN] * 2, group.output()
        assert time.monotonic() - start < 20
        assert 'SIGTERM: nothing has to be saved' in group.text(number)
        other = group.text(1 - number)
        assert f'process {number} of 2 on ' in other and 'was stopped (SIGTERM)' in other


@pytest.mark.parametrize('numbers', [[1], [0, 1]])
def test_processes_at_different_places_stop_at_the_same(members, numbers):
    with members('loop') as group:
        group.until(ready(group))
        for number in numbers:
            group.processes[number].send_signal(signal.SIGINT)
        assert group.codes() == [pod.AGAIN] * 2, group.output()
        points = [re.search(r'stops at (\d+)', group.text(i)).group(1) for i in (0, 1)]
        assert points[0] == points[1]
        for number in (0, 1):
            assert 'Ctrl-C: saving, then exit code 75' in group.text(number)


def test_a_process_that_finds_nobody_gives_up(members):
    with members('hang', present=1, DIST_JAX_JOIN_SECONDS='2') as group:
        assert group.codes() == [pod.AGAIN]
        assert 'process 0 has waited 2 s for the other processes' in group.text(0)


def test_a_slow_host_is_named_and_waited_for(members):
    with members('slow', seconds=LOST_SECONDS + 4) as group:
        assert group.codes() == [0, 0], group.output()
        assert re.search(
            r'no step for \d+ s, and all processes live. process \d \(.*\): ', group.text(0)
        )
        assert '): reading after step 3' in group.text(0)
        assert '): computing after step 3' in group.text(0)


def test_processes_that_end_together_end_quietly(members):
    with members('end', seconds=1) as group:
        assert group.codes() == [0, 0]
        assert 'dist_jax:' not in group.output()


# Training.


class Run:
    """A run in a workdir, started again and again, with any number of processes."""

    def __init__(self, workdir, command, environment):
        self.workdir = workdir
        self.command = [*command, f'--workdir={workdir}']
        self.environment = environment

    def start(self, count, around=(), **variables):
        command = [*around, *self.command]
        return Group(command, count, self.workdir, self.environment | variables)

    def finish(self, count):
        with self.start(count) as group:
            assert group.codes() == [0] * count, group.output()[-4000:]
        return json.loads((self.workdir / 'summary.json').read_text())

    def losses(self):
        path = self.workdir / 'metrics.jsonl'
        found = read_metrics(path) if path.exists() else []
        return {row['step']: row['loss'] for row in found if 'loss' in row}

    def unreadable(self):
        """Validation videos that could not be read, in each evaluation."""
        found = read_metrics(self.workdir / 'metrics.jsonl')
        return [row['val_num_bad_videos'] for row in found if 'val_num_bad_videos' in row]

    def saved(self):
        names = [p.name for p in (self.workdir / 'checkpoints').glob('*')]
        return max((int(name) for name in names if name.isdigit()), default=0)

    def params(self):
        """Trained parameters of the newest checkpoint, flat."""
        folder = checkpoint.find_checkpoint(self.workdir)
        tree = checkpoint.read_host_variables(folder)['params']
        return {name: np.asarray(leaf) for name, leaf in flatten(tree).items()}


@pytest.fixture(scope='module')
def make_run(clips, environment, tmp_path_factory):
    folder = tmp_path_factory.mktemp('processes')
    backbone = str(folder / 'backbone')
    backbones.write_random(backbone, 'tiny')

    # 10 videos, 4 a step; one is broken and one may be. Of two hosts, the second reads it.
    lines = (clips / 'val.txt').read_text().splitlines()
    lines[3] = f'nowhere.mp4 {lines[3].rpartition(" ")[2]}'
    (folder / 'val.txt').write_text('\n'.join(lines))

    def make(name, **changes):
        overrides = {
            'backbone.checkpoint': backbone,
            'data.root': clips,
            'data.train_list': 'train.txt',
            'data.val_list': folder / 'val.txt',
            'data.label_map': 'labels.txt',
            'data.num_frames': 2,
            'mixing.probability': 1.0,
            'optimizer.ema_decay': 0.5,
            'batch_size': 4,
            'num_steps': NUM_STEPS,
            'eval.batch_size': 4,
            'eval.every_epochs': 2.0,
            'checkpoint.every_steps': 4,
            'log.every_steps': 1,
            'log.tensorboard': 'false',
            'model.unroll': 'false',
        } | changes
        # Of the families, the one that compiles quickest.
        command = [sys.executable, '-m', 'dist_jax.main', 'train']
        command += ['--config=configs/frame_mean.py:demo']
        command += [f'--config.{field}={value}' for field, value in overrides.items()]
        return Run(folder / name, command, environment)

    return make


@pytest.fixture(scope='module')
def alone(make_run):
    """(run, summary) of one process."""
    run = make_run('alone')
    return run, run.finish(1)


@pytest.fixture(scope='module')
def pair(make_run):
    """(run, summary) of two processes that nothing interrupted."""
    run = make_run('pair')
    return run, run.finish(2)


def check_same_result(run, summary, alone):
    expected_run, expected = alone
    for name in ('step', 'num_bad_videos', 'val_top1', 'val_top5', 'trainable_parameters'):
        assert summary[name] == expected[name], name
    assert run.unreadable() == expected_run.unreadable() and set(run.unreadable()) == {1}
    losses, expected_losses = run.losses(), expected_run.losses()
    assert list(losses) == list(expected_losses) == list(range(1, NUM_STEPS + 1))
    np.testing.assert_allclose(
        list(losses.values()), list(expected_losses.values()), rtol=1e-4, atol=1e-4
    )
    params, wanted = run.params(), expected_run.params()
    assert params.keys() == wanted.keys()
    for name, value in wanted.items():
        # Adam divides by the root of small second moments: rounding grows where gradients are ~0.
        np.testing.assert_allclose(params[name], value, rtol=1e-3, atol=1e-3, err_msg=name)


@pytest.mark.slow
def test_two_processes_train_as_one(pair, alone):
    check_same_result(*pair, alone)
    assert pair[1]['devices'] == 2


@pytest.mark.slow
def test_a_pair_that_lost_one_starts_again_and_ends_as_one_that_never_did(pair, make_run):
    run = make_run('killed')
    script = Path(__file__).parents[1] / 'tools' / 'launch' / 'worker.sh'
    # Long enough for the other to notice; shorter is fine too, jax then ends it.
    wait = {'DIST_JAX_PAUSE_SECONDS': str(LOST_SECONDS + 6), 'DIST_JAX_NOTICE_SECONDS': '0'}
    with run.start(2, ('bash', str(script), '--'), **wait) as group:
        group.until(lambda: len(run.losses()) >= 5 and run.saved() >= 4)
        shell = group.processes[1].pid
        (child,) = Path(f'/proc/{shell}/task/{shell}/children').read_text().split()
        os.kill(int(child), signal.SIGKILL)
        start = time.monotonic()
        group.until(lambda: 'process 1 of 2 on ' in group.text(0))
        assert time.monotonic() - start < 60
        saved = run.saved()
        assert group.text(0).count('is lost') == 1
        assert not (run.workdir / 'summary.json').exists()
        assert group.codes() == [0, 0], group.output()[-4000:]
    assert 'exit code 75: interrupted' in group.text(0)
    assert 'exit code 137: killed' in group.text(1)
    assert f'continuing from step {saved}' in group.text(1)
    summary = json.loads((run.workdir / 'summary.json').read_text())
    assert summary['params_sha256'] == pair[1]['params_sha256']
    assert run.losses() == pair[0].losses()
    assert not (run.workdir / 'checkpoints-broken').exists()


@pytest.mark.slow
def test_sigterm_to_one_process_saves_the_same_step_on_all(make_run):
    run = make_run('stopped', num_steps=2000, **{'eval.every_epochs': 1000.0})
    with run.start(2) as group:
        group.until(lambda: len(run.losses()) >= 2)
        group.processes[1].send_signal(signal.SIGTERM)
        assert group.codes() == [pod.AGAIN] * 2, group.output()
    step = run.saved()
    assert 2 < step == max(run.losses()) < 2000
    assert f'SIGTERM: saved step {step}' in group.text(0)
    assert not list((run.workdir / 'checkpoints').glob('*tmp*'))
    assert not (run.workdir / 'summary.json').exists()
    assert run.params()  # it can be read


@pytest.mark.slow
def test_bad_videos_of_all_hosts_count_together(make_run, clips, tmp_path):
    # One bad video on each host; one is allowed.
    folder = tmp_path / 'clips'
    subprocess.run(['cp', '-r', str(clips), str(folder)], check=True)
    order = pipeline.epoch_order(0, 0, 18)
    paths = [line.rsplit(maxsplit=1)[0] for line in (folder / 'train.txt').open()]
    for position in (4, 7):  # host 0 reads 4 and 5 of the second step, host 1 reads 6 and 7
        (folder / paths[order[position]]).write_bytes(b'no video')
    run = make_run('bad', **{'data.root': folder, 'data.val_list': ''})
    with run.start(2) as group:
        assert group.codes() == [1, 1], group.output()[-4000:]
    for number in (0, 1):
        assert '2 of 18 videos cannot be read, 1 are allowed' in group.text(number)
    assert [len((run.workdir / f'bad_videos_{i}.jsonl').read_text().splitlines()) for i in (0, 1)]
    assert max(run.losses()) < NUM_STEPS


BATCHES = """
import hashlib, json, sys
import jax
from dist_jax import backbones, pod
from dist_jax.sharding import feed, make_mesh, replicated, to_global
from input_pipeline import pipeline
from input_pipeline.sources import open_source
pod.join()
backbone = backbones.find('tiny', backbones.RANDOM, 48, sys.argv[2])
mesh = make_mesh()
part = feed(mesh)
folder, target = sys.argv[1:]
source = open_source(f'{folder}/train.txt', root=folder)
reader = pipeline.TrainReader(4, 48, transforms=())
batches = pipeline.train_batches(
    source, reader, batch_size=4, seed=3, num_steps=6, host=part
)
total = jax.jit(lambda x: x.astype('int32').sum(), out_shardings=replicated(mesh))
found, sums = [], []
for batch in batches:
    found.append([hashlib.sha256(video.tobytes()).hexdigest() + f' {index}' for video, index in
                  zip(batch['video'], batch['index'])])
    sums.append(int(total(to_global({'video': batch['video']}, mesh)['video'])))
json.dump((backbone.params_sha256, sums, found), open(f'{target}/{part.index}.json', 'w'))
sys.exit(pod.leave(0))
"""


def test_batches_and_backbone_of_four_processes_are_those_of_one(clips, environment, tmp_path):
    """Every process reads its part, and computes with the others on the whole."""
    count, expected, totals = 4, [], []
    for batch in pipeline.train_batches(
        open_source(f'{clips}/train.txt', root=str(clips)),
        pipeline.TrainReader(4, 48, transforms=()),
        batch_size=4,
        seed=3,
        num_steps=6,
    ):
        expected.append(
            [
                f'{hashlib.sha256(video.tobytes()).hexdigest()} {index}'
                for video, index in zip(batch['video'], batch['index'])
            ]
        )
        totals.append(int(batch['video'].sum(dtype=np.int64)))
    command = [sys.executable, '-c', BATCHES, str(clips), str(tmp_path)]
    with Group(command, count, tmp_path / 'logs', environment) as group:
        assert group.codes() == [0] * count, group.output()[-4000:]
    backbone = backbones.find('tiny', backbones.RANDOM, 48, str(tmp_path / 'alone'))
    found = [json.loads((tmp_path / f'{i}.json').read_text()) for i in range(count)]
    hashes, sums, parts = zip(*found)
    assert hashes == (backbone.params_sha256,) * count
    assert list(sums) == [totals] * count
    assert [list(itertools.chain(*step)) for step in zip(*parts)] == expected
