"""How commands end: signals at any moment, exit codes, a full disk."""

import errno
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from dist_jax import ending, main, train, workdir_lock

TIMEOUT_SECONDS = 120

# A command in the place of `train` or `check`: what a signal meets, without jax.
COMMAND = """
import hashlib, sys, time
from dist_jax import ending, main

def inside_a_library():
    hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)  # minutes in C, as a compilation is

def wait(what):
    print(what, flush=True)
    time.sleep(0.05)

def start(_):
    wait('ready')
    inside_a_library()

def loop(_):
    while True:
        ending.hold(lambda: None)
        if ending.asked():
            ending.stopping()
            wait('saving')
            time.sleep(float(sys.argv[3]))
            wait('saved')
            return ending.AGAIN
        wait('ready')

def hang(_):
    ending.hold(lambda: wait('earlier saves are whole'))
    wait('ready')
    inside_a_library()

def polite(_):
    try:
        wait('ready')
        time.sleep(1000)
    finally:
        wait('cleaned')

ending.PATIENCE_SECONDS = 0.5
ending.before_exit.append(lambda: print('hook', flush=True))
main.COMMANDS[sys.argv[1]].run = globals()[sys.argv[2]]
sys.exit(main.main([sys.argv[1]]))
"""


@pytest.fixture
def start():
    """Starts such a command and waits until it is busy."""
    started = []

    def run(command, what, *arguments, through=()):
        process = subprocess.Popen(
            [*through, sys.executable, '-c', COMMAND, command, what, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {'PYTHONPATH': str(Path(main.__file__).parents[1])},
        )
        started.append(process)
        assert process.stdout.readline() == 'ready\n', process.stderr.read()
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()


def ended(process):
    out, error = process.communicate(timeout=TIMEOUT_SECONDS)
    assert 'Traceback' not in error
    return process.returncode, out, error


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_before_there_is_something_to_save_a_signal_ends_training_at_once(start, number):
    process = start('train', 'start')
    process.send_signal(number)
    code, out, error = ended(process)
    assert code == ending.AGAIN and out.endswith('hook\n')
    assert 'nothing has to be saved' in error and 'start the same command again' in error
    assert error.startswith(f'dist_jax: {ending.NAMES[number]}: ')


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_loop_saves_first(start, number):
    process = start('train', 'loop', '0')
    process.send_signal(number)
    code, out, error = ended(process)
    assert code == ending.AGAIN and 'saved' in out and 'hook' not in out
    assert f'{ending.NAMES[number]}: saving, then exit code 75' in error
    assert ('again leaves at once' in error) == (number == signal.SIGINT)
    assert len(error.splitlines()) == 1


def test_a_second_ctrl_c_leaves_at_once(start):
    process = start('train', 'loop', '1000')
    process.send_signal(signal.SIGINT)
    while process.stdout.readline() != 'saving\n':
        pass
    process.send_signal(signal.SIGTERM)  # no more than a repetition
    process.send_signal(signal.SIGINT)
    code, out, error = ended(process)
    assert code == ending.INTERRUPTED and 'saved' not in out
    assert error.splitlines()[-1] == 'dist_jax: Ctrl-C again: left at once'


def test_a_loop_that_hangs_is_left_in_the_end(start):
    process = start('train', 'hang')
    process.send_signal(signal.SIGTERM)
    code, out, error = ended(process)
    assert code == ending.AGAIN and 'earlier saves are whole\nhook\n' in out
    assert 'nothing has ended for' in error and 'the newest checkpoint' in error


def test_other_commands_end_at_once_and_clean_up_after_ctrl_c(start):
    process = start('check', 'start')
    process.send_signal(signal.SIGTERM)
    code, _, error = ended(process)
    assert code == ending.AGAIN and 'not at its end' in error
    process = start('check', 'polite')
    process.send_signal(signal.SIGINT)
    code, out, error = ended(process)
    assert code == ending.INTERRUPTED and 'cleaned' in out
    assert error == 'dist_jax check: Ctrl-C\n'


def test_what_a_shell_put_into_the_background_stays_deaf_to_ctrl_c(start):
    deaf = ('sh', '-c', 'trap "" INT; exec "$@"', 'sh')
    process = start('train', 'loop', '0', through=deaf)
    process.send_signal(signal.SIGINT)
    for _ in range(3):
        assert process.stdout.readline() == 'ready\n'
    process.send_signal(signal.SIGTERM)
    assert ended(process)[0] == ending.AGAIN


def test_the_handlers_of_a_program_are_given_back():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    fd = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(fd)
    assert ending.listen(continues=True) and not ending.listen(continues=True)
    ending.stop_listening()
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before
    assert signal.set_wakeup_fd(fd) == fd
    assert not ending.asked()


def failing(monkeypatch, capsys, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(train, 'train', fail)
    code = main.main(['train', '--workdir=w', '--config=configs/dist.py:demo'])
    return code, capsys.readouterr().err


def wrapped(text, kind=ValueError):
    """As orbax and tensorstore tell of it."""
    error = kind(text)
    error.__cause__ = RuntimeError('Error while saving')
    return error


@pytest.mark.parametrize(
    'make',
    [
        lambda path: OSError(errno.ENOSPC, 'No space left on device', str(path)),
        lambda path: OSError(errno.EDQUOT, 'Disk quota exceeded', str(path)),
        lambda path: wrapped(f'UNKNOWN: Error writing "{path}": [OS error 28: ENOSPC]'),
        lambda path: wrapped(f'{path}: write failed: No space left on device', RuntimeError),
        lambda path: KeyError(f"file_io: '{path}' no space left on device"),
    ],
)
def test_a_full_disk_is_one_line_with_a_code_of_its_own(make, tmp_path, monkeypatch, capsys):
    path = tmp_path / 'checkpoints' / '4' / 'state'
    code, text = failing(monkeypatch, capsys, make(path))
    assert code == ending.DISK_FULL != ending.WRONG
    (line,) = [line for line in text.splitlines() if 'dist_jax train:' in line]
    assert text.splitlines()[-1] == line
    assert re.search(rf'the disk is full: {path} \(\d+\.\d MiB free\)', line)
    assert 'start the same command again' in line


def test_of_the_disks_that_a_command_names_the_full_one_is_said(tmp_path, monkeypatch):
    free = {str(tmp_path): 1e9, f'{tmp_path}/other/new': 0.0}
    (tmp_path / 'other').mkdir()
    monkeypatch.setattr(ending, '_free', lambda path: free.get(path, 2e9))
    places = [str(tmp_path), f'{tmp_path}/other/new', 'clip', '0.2s', f'{tmp_path}/none/x']
    text = ending.full_disk(OSError(errno.ENOSPC, 'No space left'), places)
    assert f'the disk is full: {tmp_path}/other/new (0.0 MiB free)' in text


def test_a_full_disk_deep_in_an_error_is_found(tmp_path):
    full = OSError(errno.ENOSPC, 'No space left on device', str(tmp_path))
    try:
        try:
            raise full
        except OSError as error:
            raise ValueError('cannot save') from error
    except ValueError as error:
        assert ending.code_of(error) == ending.DISK_FULL
    text = ending.full_disk(OSError(errno.ENOSPC, 'No space left'), ['nowhere', str(tmp_path)])
    assert f'the disk is full: {tmp_path}' in text or tempfile.gettempdir() in text
    assert ending.code_of(ExceptionGroup('saves', [full])) == ending.DISK_FULL
    assert ending.code_of(OSError(errno.EACCES, 'Permission denied')) == ending.ERROR
    assert ending.code_of(ValueError('no space')) == ending.WRONG


def test_a_workdir_in_use_is_worth_another_try(monkeypatch, capsys):
    code, text = failing(monkeypatch, capsys, workdir_lock.InUseError('w is in use: by p'))
    assert code == ending.AGAIN and 'w is in use: by p' in text


def test_a_signal_is_heard_while_time_passes_in_this_process():
    assert ending.listen(continues=True, exits=False)
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        deadline = time.monotonic() + 10
        while not ending.asked():
            assert time.monotonic() < deadline
        assert ending.asked() == 'SIGTERM'
    finally:
        ending.stop_listening()
