"""The launch scripts, with commands of the cloud that only write down how they were called."""

import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

FOLDER = Path(__file__).parents[2] / 'tools' / 'launch'
SCRIPTS = ('common.sh', 'tpu_vm.sh', 'gke.sh', 'worker.sh')

RECORDER = """#!/usr/bin/env bash
until mkdir "$RECORD.lock" 2>/dev/null; do sleep 0.01; done # slices are called at the same time
{ printf '%s\\n' "${0##*/}" "$@"; printf -- '---\\n'; } >>"$RECORD"
rmdir "$RECORD.lock"
answers="$ANSWERS/${0##*/}"
if [[ "$*" == *"--format=value(state.state)"* || "$*" == *"running || tail"* ]]; then
  answers+=.$([[ "$*" == *format* ]] && echo state || echo probe)
  if [[ -s $answers ]]; then
    head -n 1 "$answers"
    [[ $(wc -l <"$answers") -gt 1 ]] && sed -i 1d "$answers"
  else
    exit 1
  fi
fi
[[ "$*" == *tar.gz* || "$*" != *apply* ]] || cat >>"$RECORD.yaml"
exit 0
"""


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    """Stubs of gcloud, kubectl and xpk on the PATH; `calls()` are their argument lists."""

    class Cloud:
        record = tmp_path / 'calls'
        answers = tmp_path / 'answers'

        def run(self, script, *arguments):
            return subprocess.run(
                ['bash', str(FOLDER / script), *arguments],
                capture_output=True,
                text=True,
                timeout=60,
            )

        def calls(self):
            if not self.record.exists():
                return []
            blocks = self.record.read_text().split('---\n')
            return [block.splitlines() for block in blocks if block]

        def answer(self, name, *lines):
            (self.answers / name).write_text(''.join(f'{line}\n' for line in lines))

    folder = tmp_path / 'bin'
    folder.mkdir()
    (tmp_path / 'answers').mkdir()
    for name in ('gcloud', 'kubectl', 'xpk'):
        (folder / name).write_text(RECORDER)
        (folder / name).chmod(0o755)
    monkeypatch.setenv('PATH', f'{folder}:{os.environ["PATH"]}')
    monkeypatch.setenv('RECORD', str(tmp_path / 'calls'))
    monkeypatch.setenv('ANSWERS', str(tmp_path / 'answers'))
    return Cloud()


@pytest.mark.parametrize('script', SCRIPTS)
def test_scripts_are_clean(script):
    subprocess.run(['bash', '-n', str(FOLDER / script)], check=True)
    text = (FOLDER / script).read_text()
    assert script == 'common.sh' or 'set -euo pipefail' in text
    assert max(map(len, text.splitlines())) < 400
    if shutil.which('shellcheck'):
        subprocess.run(
            ['shellcheck', '-x', str(FOLDER / script)], check=True, cwd=FOLDER.parents[1]
        )


def slices():
    text = (FOLDER / 'common.sh').read_text().partition("SLICES='")[2].partition("'")[0]
    return [line.split() for line in text.splitlines() if line]


def test_the_table_of_slices_is_consistent():
    assert len(slices()) > 20
    for name, topology, chips, chips_a_host, label, runtime in slices():
        assert math.prod(map(int, topology.split('x'))) == int(chips), name
        cores = 2 if name.startswith(('v4', 'v5p')) else 1  # what the number in the name counts
        assert int(name.rpartition('-')[2]) == int(chips) * cores
        assert int(chips) % int(chips_a_host) == 0
        assert label.startswith('tpu-v') and runtime.endswith(('base', 'lite', 'v5', 'v6e'))


# TPU VMs.

NAMED = ('--name=one', '--zone=z')


def test_create_asks_for_one_slice_and_waits_for_it(cloud):
    cloud.answer('gcloud.state', 'WAITING_FOR_RESOURCES', 'PROVISIONING', 'ACTIVE')
    result = cloud.run('tpu_vm.sh', 'create', *NAMED, '--type=v4-32', '--poll_seconds=0.01')
    assert result.returncode == 0, result.stderr
    first, *rest = cloud.calls()
    assert first == [
        *('gcloud', 'compute', 'tpus', 'queued-resources', 'create', 'one', '--zone=z'),
        *('--accelerator-type=v4-32', '--runtime-version=tpu-ubuntu2204-base', '--node-id=one'),
    ]
    assert len(rest) == 3
    assert 'WAITING_FOR_RESOURCES' in result.stderr and 'PROVISIONING' in result.stderr
    assert '1 x v4-32 (2x2x4), 16 chips on 4 hosts' in result.stderr


def test_create_asks_for_spot_slices(cloud):
    cloud.answer('gcloud.state', 'ACTIVE')
    options = ('--type=v5litepod-64', '--slices=3', '--spot', '--valid_for=6h', '--project=p')
    assert cloud.run('tpu_vm.sh', 'create', *NAMED, *options).returncode == 0
    call = cloud.calls()[0]
    assert {'--node-count=3', '--node-prefix=one', '--spot', '--project=p'} < set(call)
    assert '--valid-until-duration=6h' in call and '--runtime-version=v2-alpha-tpuv5-lite' in call


def test_create_fails_where_the_request_failed(cloud):
    cloud.answer('gcloud.state', 'FAILED')
    result = cloud.run('tpu_vm.sh', 'create', *NAMED, '--type=v4-8')
    assert result.returncode == 1 and 'one is FAILED; see: gcloud' in result.stderr


def test_setup_copies_what_is_committed_to_every_slice(cloud):
    result = cloud.run('tpu_vm.sh', 'setup', *NAMED, '--type=v4-32', '--slices=2')
    assert result.returncode == 0, result.stderr
    copies = [call for call in cloud.calls() if 'scp' in call]
    assert [call[6] for call in copies] == ['one-0:dist_jax.tar.gz', 'one-1:dist_jax.tar.gz']
    installs = [call for call in cloud.calls() if 'ssh' in call]
    assert sorted(call[5] for call in installs) == ['one-0', 'one-1']
    assert all('--worker=all' in call for call in copies + installs)
    assert all('[tpu]' in call[-1] and '--python=3.11' in call[-1] for call in installs)


@pytest.fixture
def worker_home(tmp_path, monkeypatch):
    """A home folder as `setup` leaves it; its dist_jax writes its arguments down and succeeds."""
    home = tmp_path / 'home'
    (home / '.venv' / 'bin').mkdir(parents=True)
    (home / 'dist_jax' / 'tools' / 'launch').mkdir(parents=True)
    shutil.copy(FOLDER / 'worker.sh', home / 'dist_jax' / 'tools' / 'launch')
    program = home / '.venv' / 'bin' / 'dist_jax'
    program.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@" >~/arguments\nsleep 0.3\n')
    program.chmod(0o755)
    monkeypatch.setenv('HOME', str(home))
    monkeypatch.setenv('DIST_JAX_NOTICE_SECONDS', '0')
    return home


def until(moment, seconds=20):
    deadline = time.monotonic() + seconds
    while not moment():
        assert time.monotonic() < deadline
        time.sleep(0.02)


ARGUMENTS = (
    '--config=a.py:b',
    '--config.data.root=/a b',
    "--config.x=it's",
    '--config.y=$HOME "z"',
)


def test_train_runs_detached_with_the_same_arguments_on_every_worker(cloud, worker_home):
    result = cloud.run('tpu_vm.sh', 'train', *NAMED, '--type=v4-32', '--slices=2', '--', *ARGUMENTS)
    assert result.returncode == 0, result.stderr
    calls = cloud.calls()
    assert sorted(call[5] for call in calls) == ['one-0', 'one-1']
    (line,) = {call[-1].removeprefix('--command=') for call in calls}
    subprocess.run(['bash', '-c', line], check=True, cwd=worker_home, timeout=30)
    log = worker_home / 'dist_jax.log'
    assert (worker_home / 'dist_jax.pid').exists()
    until(lambda: 'worker.sh: done' in log.read_text())
    assert (worker_home / 'arguments').read_text().splitlines() == ['train', *ARGUMENTS]


def test_a_second_start_is_refused_while_the_first_runs(cloud, worker_home):
    cloud.run('tpu_vm.sh', 'train', *NAMED, '--type=v4-8', '--', *ARGUMENTS)
    line = cloud.calls()[0][-1].removeprefix('--command=')
    (worker_home / 'dist_jax.pid').write_text(f'{os.getpid()}\n')
    again = subprocess.run(
        ['bash', '-c', line], cwd=worker_home, capture_output=True, text=True, timeout=30
    )
    assert again.returncode == 1 and 'it runs already: tpu_vm.sh stop' in again.stderr
    assert not (worker_home / 'arguments').exists()


def test_doctor_logs_stop_status_and_delete(cloud):
    common = (*NAMED, '--type=v4-32', '--slices=2')
    assert cloud.run('tpu_vm.sh', 'doctor', *common, '--', '--workdir=gs://b').returncode == 0
    assert '--devices=32 --workdir=gs://b' in cloud.calls()[0][-1]
    for action in ('logs', 'stop', 'delete'):
        assert cloud.run('tpu_vm.sh', action, *common).returncode == 0
    texts = [' '.join(call) for call in cloud.calls()[2:]]
    assert 'ssh one-0 --zone=z --worker=0 --command=tail -n 100 -F dist_jax.log' in texts[0]
    assert 'kill -TERM' in texts[1] and 'kill -TERM' in texts[2]
    assert 'queued-resources delete one --zone=z --force --quiet' in texts[3]
    cloud.answer('gcloud.state', 'ACTIVE')
    assert 'ACTIVE' in cloud.run('tpu_vm.sh', 'status', *common).stdout


def test_a_dry_run_calls_nothing_and_prints_what_a_shell_takes(cloud):
    options = ('--type=v4-32', '--slices=2', '--spot', '--dry_run')
    result = cloud.run('tpu_vm.sh', 'keep', *NAMED, *options, '--', *ARGUMENTS)
    assert result.returncode == 0 and not cloud.calls()
    lines = [shlex.split(line) for line in result.stdout.splitlines()]
    assert [line[4] for line in lines if line[0] == 'gcloud'] == [
        *('create', 'scp', 'scp', 'ssh', 'ssh', 'ssh', 'ssh')
    ]
    inner = shlex.split(lines[-1][-1].partition('worker.sh -- ')[2].partition(' >>')[0])
    assert inner == ['../.venv/bin/dist_jax', 'train', *ARGUMENTS]


KEEP = (*NAMED, '--type=v4-8', '--spot', '--poll_seconds=0.05')


def actions(cloud):
    return [call[4] for call in cloud.calls() if '--format=value(state.state)' not in call]


def test_keep_makes_a_preempted_slice_again_until_the_run_is_done(cloud):
    # SUSPENDED: preempted. NONE: gcloud knows no such request any more.
    cloud.answer('gcloud.state', 'SUSPENDED', 'NONE', 'ACTIVE', 'ACTIVE')
    cloud.answer('gcloud.probe', 'running', 'running', '... worker.sh: done')
    result = cloud.run('tpu_vm.sh', 'keep', *KEEP, '--', '--config=a')
    assert result.returncode == 0, result.stderr
    assert 'SUSPENDED: made again' in result.stderr and 'the run is done' in result.stderr
    assert actions(cloud) == ['delete', 'create', 'scp', 'ssh', 'ssh', 'ssh', 'ssh', 'ssh']


def test_keep_starts_workers_again_that_rebooted(cloud):
    cloud.answer('gcloud.state', 'ACTIVE')
    cloud.answer('gcloud.probe', 'step 12', 'worker.sh: done')
    result = cloud.run('tpu_vm.sh', 'keep', *KEEP, '--', '--config=a')
    assert result.returncode == 0 and 'not all workers run; started again' in result.stderr
    assert 'worker.sh' in cloud.calls()[2][-1]


def test_keep_ends_where_the_run_gave_up(cloud):
    cloud.answer('gcloud.state', 'ACTIVE')
    cloud.answer('gcloud.probe', 'worker.sh: 3 failures in a row: not started again')
    result = cloud.run('tpu_vm.sh', 'keep', *KEEP, '--', '--config=a')
    assert result.returncode == 1 and 'the run gave up' in result.stderr


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ((), 'name an action'),
        (('destroy',), "no action 'destroy'"),
        (('create', '--zone=z', '--type=v4-8'), '--name=NAME is missing'),
        (('create', '--name=one', '--type=v4-8'), '--zone=ZONE is missing'),
        (('create', *NAMED), '--type=TYPE is missing'),
        (('create', *NAMED, '--type=v4-7'), '--type=v4-7 is not one of: v4-8 v4-16'),
        (('create', *NAMED, '--type=v4-8', '--slices=0'), '--slices=0 must be'),
        (('create', *NAMED, '--type=v4-8', '--spt'), 'unknown option --spt'),
        (('train', *NAMED, '--type=v4-8'), 'pass the arguments of dist_jax after --'),
    ],
)
def test_wrong_arguments_of_tpu_vm_are_named(cloud, arguments, message):
    result = cloud.run('tpu_vm.sh', *arguments)
    assert result.returncode == 2 and message in result.stderr and not cloud.calls()


def test_a_local_workdir_on_several_workers_is_warned_of(cloud):
    arguments = ('train', *NAMED, '--dry_run', '--type=v4-32', '--', '--workdir=runs/a')
    assert 'must be on a disk that all 4 workers share' in cloud.run('tpu_vm.sh', *arguments).stderr


# GKE.

POD = ('--name=run1', '--image=i:1', '--type=v5litepod-16')


def jobset(cloud, *arguments):
    result = cloud.run('gke.sh', *arguments)
    assert result.returncode == 0, result.stderr
    return yaml.safe_load(result.stdout)


def test_the_jobset_has_a_job_a_slice_and_a_pod_a_host(cloud):
    found = jobset(cloud, 'train', *POD, '--slices=2', '--dry_run', '--', *ARGUMENTS)
    assert not cloud.calls()
    assert (found['kind'], found['metadata']['name']) == ('JobSet', 'run1')
    (slices_of,) = found['spec']['replicatedJobs']
    job = slices_of['template']['spec']
    assert slices_of['replicas'] == 2
    assert job['parallelism'] == job['completions'] == 4 and job['backoffLimit'] == 0
    pod = job['template']['spec']
    assert pod['nodeSelector'] == {
        'cloud.google.com/gke-tpu-accelerator': 'tpu-v5-lite-podslice',
        'cloud.google.com/gke-tpu-topology': '4x4',
    }
    assert 'tolerations' not in pod and 'serviceAccountName' not in pod
    (container,) = pod['containers']
    assert container['command'] == ['dist_jax', 'train', *ARGUMENTS]
    assert container['resources']['limits'] == {'google.com/tpu': 4}


def test_wrong_arguments_fail_the_jobset_and_all_else_starts_again(cloud):
    found = jobset(cloud, 'train', *POD, '--max_restarts=7', '--dry_run', '--', *ARGUMENTS)
    policy = found['spec']['failurePolicy']
    assert policy['maxRestarts'] == 7
    assert policy['rules'][0]['action'] == 'FailJobSet'
    assert policy['rules'][0]['onJobFailureReasons'] == ['PodFailurePolicy']
    job = found['spec']['replicatedJobs'][0]['template']['spec']
    (rule,) = job['podFailurePolicy']['rules']
    assert rule['onExitCodes']['values'] == [2]
    pod = job['template']['spec']
    assert rule['onExitCodes']['containerName'] == pod['containers'][0]['name']
    assert pod['restartPolicy'] == 'Never'  # podFailurePolicy needs it


def test_spot_and_service_account(cloud):
    options = ('--spot', '--service_account=ks', '--grace_seconds=25', '--dry_run')
    found = jobset(cloud, 'train', *POD, *options, '--', *ARGUMENTS)
    pod = found['spec']['replicatedJobs'][0]['template']['spec']['template']['spec']
    assert pod['nodeSelector']['cloud.google.com/gke-spot'] == 'true'
    assert pod['tolerations'][0]['key'] == 'cloud.google.com/gke-spot'
    assert pod['serviceAccountName'] == 'ks' and pod['terminationGracePeriodSeconds'] == 25


def test_gke_applies_shows_and_deletes(cloud):
    assert cloud.run('gke.sh', 'train', *POD, '--', *ARGUMENTS).returncode == 0
    assert cloud.calls() == [['kubectl', 'apply', '-f', '-']]
    assert yaml.safe_load(Path(f'{cloud.record}.yaml').read_text())['kind'] == 'JobSet'
    for action in ('logs', 'status', 'stop'):
        assert cloud.run('gke.sh', action, '--name=run1', '--namespace=n').returncode == 0
    assert [call[1] for call in cloud.calls()[1:]] == ['logs', 'get', 'get', 'delete']
    assert all('n' in call for call in cloud.calls()[1:])


def test_doctor_runs_once_and_expects_all_devices(cloud):
    found = jobset(cloud, 'doctor', *POD, '--slices=2', '--dry_run', '--', '--workdir=gs://b')
    assert found['metadata']['name'] == 'run1-doctor'
    assert found['spec']['failurePolicy']['maxRestarts'] == 0
    pod = found['spec']['replicatedJobs'][0]['template']['spec']['template']['spec']
    assert pod['containers'][0]['command'] == [
        *('dist_jax', 'doctor', '--devices=32', '--workdir=gs://b')
    ]


def test_xpk_gets_the_same_command(cloud):
    assert cloud.run('gke.sh', 'xpk', *POD, '--cluster=c', '--', *ARGUMENTS).returncode == 0
    (call,) = cloud.calls()
    assert call[:3] == ['xpk', 'workload', 'create'] and '--tpu-type=v5litepod-16' in call
    assert shlex.split(call[-1].removeprefix('--command=')) == ['dist_jax', 'train', *ARGUMENTS]


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (('train', '--name=Run_1'), '--name=Run_1 must be lower-case letters'),
        (('train', '--name=run1'), '--image=IMAGE is missing'),
        (('train', '--name=run1', '--image=i'), '--type=TYPE is missing'),
        (('train', *POD), 'pass the arguments of dist_jax after --'),
        (('train', *POD, '--', '--workdir=/runs'), 'use a bucket'),
        (('xpk', *POD, '--', '--config=a'), '--cluster=NAME is missing'),
    ],
)
def test_wrong_arguments_of_gke_are_named(cloud, arguments, message):
    result = cloud.run('gke.sh', *arguments)
    assert result.returncode == 2 and message in result.stderr and not cloud.calls()


# The worker.

# A shell in the background ignores SIGINT, and so would all that it starts. Not preexec_fn: it runs
# Python in a fork of this process, whose many threads are not there, and that may abort.
HEEDING_SIGINT = (
    'import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); '
    'os.execvp(sys.argv[1], sys.argv[1:])'
)


@pytest.fixture
def worker(tmp_path, monkeypatch):
    """Runs worker.sh around a command that ends with these exit codes, one after the other."""
    monkeypatch.setenv('DIST_JAX_PAUSE_SECONDS', '0.01')
    monkeypatch.setenv('DIST_JAX_NOTICE_SECONDS', '0')
    program = tmp_path / 'program'
    program.write_text(
        '#!/usr/bin/env bash\n'
        f'cd {shlex.quote(str(tmp_path))}\n'
        'printf "%s\\n" "$*" >>starts\n'
        'trap "echo term >>starts; exit 75" TERM\n'
        'code=$(head -n 1 codes); sed -i 1d codes\n'
        '[[ $code == wait ]] && { touch waiting; while :; do sleep 0.02; done; }\n'
        'exit "$code"\n'
    )
    program.chmod(0o755)

    class Worker:
        def start(self, *codes, **variables):
            (tmp_path / 'codes').write_text(''.join(f'{code}\n' for code in codes))
            command = ['bash', str(FOLDER / 'worker.sh'), '--', str(program), 'a b', 'c']
            return subprocess.Popen(
                [sys.executable, '-c', HEEDING_SIGINT, *command],
                stderr=subprocess.PIPE,
                text=True,
                env=os.environ | variables,
            )

        def run(self, *codes, **variables):
            process = self.start(*codes, **variables)
            _, self.text = process.communicate(timeout=60)
            return process.returncode

        def starts(self):
            return (tmp_path / 'starts').read_text().splitlines()

        def waits(self):
            return (tmp_path / 'waiting').exists()

    return Worker()


def test_what_was_interrupted_starts_again_until_it_is_done(worker):
    assert worker.run(75, 134, 1, 143, 1, 137, 75, 0) == 0
    assert worker.starts() == ['a b c'] * 8
    assert 'another process was lost' in worker.text and 'done' in worker.text


def test_a_full_disk_is_named_and_not_tried_for_ever(worker):
    assert worker.run(74, 0) == 0
    assert 'exit code 74: a disk is full' in worker.text
    assert worker.run(*[74] * 5) == 74


def test_wrong_arguments_are_not_tried_again(worker):
    assert worker.run(2, 0) == 2 and len(worker.starts()) == 1
    assert 'wrong arguments or config' in worker.text


def test_an_error_that_comes_again_and_again_is_the_last(worker):
    assert worker.run(1, 75, 1, 1, 1, 0) == 1 and len(worker.starts()) == 5
    assert '3 failures in a row: not started again' in worker.text


def test_the_number_of_starts_has_an_end(worker):
    assert worker.run(*[75] * 9, DIST_JAX_ATTEMPTS='4') == 75 and len(worker.starts()) == 4


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on_and_ends_it(worker, number):
    process = worker.start('wait', 0)
    until(worker.waits)
    process.send_signal(number)
    assert process.wait(20) == 75
    assert worker.starts() == ['a b c', 'term']


def test_a_preemption_notice_is_passed_on(worker, tmp_path):
    (tmp_path / 'curl').write_text('#!/bin/sh\nprintf TRUE\n')
    (tmp_path / 'curl').chmod(0o755)
    variables = {
        'PATH': f'{tmp_path}:{os.environ["PATH"]}',
        'DIST_JAX_NOTICE_SECONDS': '0.1',
        'DIST_JAX_ATTEMPTS': '1',
    }
    assert worker.run('wait', **variables) == 75, worker.text
    assert worker.starts() == ['a b c', 'term'] and 'this machine is preempted' in worker.text


def test_without_a_command_it_says_so():
    result = subprocess.run(
        ['bash', str(FOLDER / 'worker.sh'), '--'], capture_output=True, text=True
    )
    assert result.returncode == 2 and 'pass the command' in result.stderr


@pytest.mark.parametrize('script', ['tpu_vm.sh', 'gke.sh'])
def test_help_is_the_head_of_the_script(script):
    done = subprocess.run([FOLDER / script, '--help'], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr
    assert f'{script} train' in done.stdout and '--dry_run' in done.stdout
    assert 'set -euo' not in done.stdout and not done.stdout.startswith('#')


SKY = yaml.safe_load((FOLDER / 'sky.yaml').read_text())


def sky_run(folder, **variables):
    """Runs the job of sky.yaml with a stand-in for dist_jax that says how it was called."""
    command = folder / 'dist_jax_venv' / 'bin' / 'dist_jax'
    command.parent.mkdir(parents=True, exist_ok=True)
    command.write_text('#!/bin/sh\nprintf "%s\\n" "$@"; env | grep ^JAX_ | sort; exit 75\n')
    command.chmod(0o755)
    environment = {'PATH': os.environ['PATH'], 'HOME': str(folder), **SKY['envs'], **variables}
    return subprocess.run(
        ['bash', '-c', SKY['run']], env=environment, capture_output=True, text=True
    )


def test_sky_starts_again_what_asks_for_it(tmp_path):
    recovery = SKY['resources']['job_recovery']
    assert 75 in recovery['recover_on_exit_codes'] and 2 not in recovery['recover_on_exit_codes']
    done = sky_run(tmp_path, ARGUMENTS="--config=dist:demo '--workdir=gs://b/a run'")
    assert done.returncode == 75
    assert done.stdout.splitlines() == ['train', '--config=dist:demo', '--workdir=gs://b/a run']
    assert sky_run(tmp_path).returncode == 2


def test_sky_tells_machines_with_gpus_of_each_other(tmp_path):
    nodes = {
        'SKYPILOT_NUM_NODES': '2',
        'SKYPILOT_NODE_IPS': '10.0.0.1\n10.0.0.2',
        'SKYPILOT_NODE_RANK': '1',
        'ARGUMENTS': '--config=dist:demo',
    }
    assert 'JAX_' not in sky_run(tmp_path, **nodes).stdout  # a TPU slice knows
    said = sky_run(tmp_path, **nodes, EXTRA='cuda').stdout.splitlines()
    assert said[2:] == [
        'JAX_COORDINATOR_ADDRESS=10.0.0.1:8476',
        'JAX_NUM_PROCESSES=2',
        'JAX_PROCESS_ID=1',
    ]
    assert subprocess.run(['bash', '-n', '-c', SKY['setup']]).returncode == 0
