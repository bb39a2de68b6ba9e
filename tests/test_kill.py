"""SIGKILL and SIGTERM to the real command: the run ends with the same parameters, bit for bit."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dist_jax import backbones, pod
from dist_jax.metric_writer import read_metrics

TIMEOUT_SECONDS = 240
NUM_STEPS = 24


class Run:
    """A run of the command in a process of its own, started again and again in one workdir."""

    def __init__(self, workdir, command, environment):
        self.workdir = workdir
        self.command = [*command, f'--workdir={workdir}']
        self.environment = environment

    def start(self, workers=0):
        """Starts it with so many reader processes; 0 for threads."""
        self.workdir.mkdir(exist_ok=True)
        command = [*self.command, f'--config.data.num_workers={workers}']
        with (self.workdir / 'output.log').open('a') as output:
            return subprocess.Popen(command, stdout=output, stderr=output, env=self.environment)

    def until(self, process, moment):
        """Waits for a moment; the process must not end before."""
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while not moment():
            alive = process.poll() is None and time.monotonic() < deadline
            assert alive, (self.workdir / 'output.log').read_text()[-3000:]
            time.sleep(0.001)

    def finish(self):
        assert self.start().wait(TIMEOUT_SECONDS) == 0, self.output()
        return json.loads((self.workdir / 'summary.json').read_text())

    def output(self):
        return (self.workdir / 'output.log').read_text()

    def logged(self):
        path = self.workdir / 'metrics.jsonl'
        rows = read_metrics(path) if path.exists() else []
        return [row['step'] for row in rows if 'loss' in row]

    def unfinished(self):
        return list((self.workdir / 'checkpoints').glob('*.orbax-checkpoint-tmp'))

    def saved(self):
        names = [p.name for p in (self.workdir / 'checkpoints').glob('*')]
        return max((int(name) for name in names if name.isdigit()), default=0)


@pytest.fixture(scope='module')
def make_run(clips, tmp_path_factory):
    folder = tmp_path_factory.mktemp('kill')
    backbone = str(folder / 'backbone')
    backbones.write_random(backbone, 'tiny')
    overrides = {
        'backbone.checkpoint': backbone,
        'data.root': clips,
        'data.train_list': 'train.txt',
        'data.label_map': 'labels.txt',
        'data.num_frames': 4,
        'mixing.probability': 1.0,
        'optimizer.ema_decay': 0.5,
        'batch_size': 4,
        'num_steps': NUM_STEPS,
        'checkpoint.every_steps': 3,
        'log.every_steps': 1,
        'log.tensorboard': 'false',
    }
    # Of the families, the one that compiles quickest; what is random or averaged it has too.
    command = [sys.executable, '-m', 'dist_jax.main', 'train']
    command += ['--config=configs/frame_mean.py:demo']
    command += [f'--config.{name}={value}' for name, value in overrides.items()]
    environment = os.environ | {'PYTHONPATH': str(Path(__file__).parents[1])}
    return lambda name: Run(folder / name, command, environment)


@contextlib.contextmanager
def ended(process):
    """Leaves no process behind, whatever fails."""
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def kill_between_steps(run):
    with ended(run.start(workers=2)) as process:
        run.until(process, lambda: len(run.logged()) >= 5)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL


def kill_inside_a_save(run):
    before = run.saved()
    with ended(run.start()) as process:
        while True:
            run.until(process, run.unfinished)
            # Held still, so that the save cannot end between the look and the kill.
            process.send_signal(signal.SIGSTOP)
            os.waitpid(process.pid, os.WUNTRACED)
            if run.unfinished() and run.saved() > before:
                break
            process.send_signal(signal.SIGCONT)
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert run.unfinished()


def terminate(run):
    before = max(run.logged())
    with ended(run.start(workers=1)) as process:
        run.until(process, lambda: max(run.logged(), default=0) > before)
        process.send_signal(signal.SIGTERM)
        assert process.wait(TIMEOUT_SECONDS) == pod.AGAIN, run.output()


@pytest.mark.slow
def test_a_killed_run_ends_as_one_that_never_stopped(make_run):
    straight = make_run('straight').finish()
    assert straight['step'] == NUM_STEPS

    run = make_run('killed')
    kill_between_steps(run)
    assert run.saved() in (0, 3, 6)
    kill_inside_a_save(run)
    assert not (run.workdir / 'summary.json').exists()

    terminate(run)
    last = run.saved()
    assert f'SIGTERM: saved step {last}' in run.output()
    assert last == max(run.logged()) < NUM_STEPS
    assert not run.unfinished()
    assert not (run.workdir / 'summary.json').exists()

    summary = run.finish()
    assert f'continuing from step {last}' in run.output()
    assert summary['params_sha256'] == straight['params_sha256']
    assert summary['step'] == NUM_STEPS and summary['interrupted'] is False
    assert run.logged() == list(range(1, NUM_STEPS + 1))
    assert not (run.workdir / 'checkpoints-broken').exists()
