"""A process that hangs says where, and ends with the code that asks for another start."""

import subprocess
import sys
import time

import pytest

from dist_jax.watching import stall

START = """
import ctypes, faulthandler, os, sys, threading, time
from dist_jax import ending
from dist_jax.watching import stall
stall.LEAVE_SECONDS, stall.KILL_SECONDS = 0.3, float(sys.argv[2])
ending.listen(continues=True)

def hang_here():
    {hang}

with stall.Watch(sys.argv[1], 1.0) as watch:
    {first}
    hang_here()
print('came through')
"""
HANGS = {
    'sleeps': 'time.sleep(60)',
    'waits for a thread in C': 'threading.Thread(target=lambda: os.read(os.pipe()[0], 1)).start(); '
    'threading.Event().wait()',
    # No thread of Python runs meanwhile.
    'holds the lock of Python': 'ctypes.PyDLL(None).sleep(60)',
}
QUICK = {
    'makes progress': 'for _ in range(20): time.sleep(0.1); watch.progress()',
    'is spared': 'with watch.spared(): time.sleep(2)',
}


def start(folder, hang, first='pass', kill_seconds=1.0):
    script = START.format(hang=hang, first=first)
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, '-c', script, str(folder), str(kill_seconds)],
        capture_output=True,
        text=True,
        timeout=50,
    )
    return done, time.monotonic() - begun


@pytest.mark.parametrize('how', HANGS)
def test_a_hang_writes_the_stacks_and_ends_with_75(tmp_path, how):
    done, _ = start(tmp_path, HANGS[how], QUICK['is spared'])
    assert done.returncode == 75 and 'came through' not in done.stdout, done.stderr
    written = (tmp_path / stall.FILE).read_text()
    for said in (done.stderr, written):
        assert 'no progress for 1 s (pod.stall_timeout)' in said and 'in hang_here' in said
    if how != 'holds the lock of Python':
        assert 'the same command continues' in done.stderr


def test_progress_and_what_is_spared_keep_a_process(tmp_path):
    done, _ = start(tmp_path, QUICK['makes progress'], QUICK['is spared'])
    assert (done.returncode, done.stdout) == (0, 'came through\n'), done.stderr
    assert not list(tmp_path.iterdir())


def test_a_program_that_is_no_command_is_left_alone(tmp_path):
    with stall.Watch(tmp_path, 0.05) as watch:
        watch.progress()
        time.sleep(0.2)
    assert not list(tmp_path.iterdir())
