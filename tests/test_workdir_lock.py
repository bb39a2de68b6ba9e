"""One trainer a workdir: who is refused, who takes over and when."""

import dataclasses
import json
import subprocess
import sys

import buckets
import pytest

from dist_jax import ending, workdir_lock
from dist_jax.workdir_lock import FILE, InUseError, locked


@pytest.fixture
def quick(monkeypatch):
    """Waits of this test are short."""
    for name in ('DEATH_SECONDS', 'SETTLE_SECONDS', 'POLL_SECONDS'):
        monkeypatch.setattr(workdir_lock, name, 0.02)
    monkeypatch.setattr(workdir_lock, 'STALE_SECONDS', 1.0)


def content(workdir):
    return json.loads((workdir / FILE).read_bytes())


def leave_behind(workdir, **changes):
    """A lock as another process would have left it; fields of its process are changed."""
    with locked(workdir):
        found = content(workdir)
    found['token'] = 'another'
    found['time'] -= changes.pop('silent', 0)
    found['host'] = changes.pop('host', found['host'])
    found['process'] |= changes
    (workdir / FILE).write_text(json.dumps(found))
    return found


def test_a_second_trainer_is_refused_and_told_who_trains(tmp_path, quick):
    with locked(tmp_path / 'run'):
        holder = content(tmp_path / 'run')
        with pytest.raises(InUseError, match='trains there') as error, locked(tmp_path / 'run'):
            pass
        assert content(tmp_path / 'run') == holder
    for name in ('host', 'started'):
        assert holder[name] in str(error.value)
    assert f'in use: process {holder["process"]["pid"]} ' in str(error.value)
    assert ending.code_of(error.value) == ending.AGAIN
    assert not list((tmp_path / 'run').iterdir())


def test_the_lock_of_a_dead_process_is_taken_at_once(tmp_path, caplog):
    dead = subprocess.Popen([sys.executable, '-c', ''])
    dead.wait()
    leave_behind(tmp_path, pid=dead.pid)
    with locked(tmp_path):
        assert content(tmp_path)['token'] != 'another'
    assert 'has ended without a word; taken over' in caplog.text
    assert 'waiting' not in caplog.text


def test_a_process_number_that_came_again_is_not_the_holder(tmp_path, caplog):
    start = workdir_lock._Process.own().start
    leave_behind(tmp_path, start=start - 1)
    with locked(tmp_path):
        assert content(tmp_path)['process']['start'] == start
    assert 'waiting' not in caplog.text


@pytest.mark.parametrize('elsewhere', [{'boot': 'another'}, {'namespace': 'pid:[1]'}, {'boot': ''}])
def test_the_lock_of_another_machine_or_container_is_waited_for(elsewhere, tmp_path, quick, caplog):
    # Its number is that of this process, and its host's name is the same.
    leave_behind(tmp_path, **elsewhere)
    with locked(tmp_path):
        assert content(tmp_path)['token'] != 'another'
    assert 'waiting up to' in caplog.text and 'taken over' in caplog.text


def test_a_beat_from_elsewhere_is_a_sign_of_life(tmp_path, quick, monkeypatch):
    found = leave_behind(tmp_path, boot='another')

    def beat(seconds):
        (tmp_path / FILE).write_text(json.dumps(found | {'beat': found['beat'] + 1}))

    monkeypatch.setattr(workdir_lock.time, 'sleep', beat)
    with pytest.raises(InUseError), locked(tmp_path):
        pass
    assert content(tmp_path)['token'] == 'another'


def test_a_process_of_this_machine_that_is_silent_loses_its_lock_at_once(tmp_path, caplog):
    leave_behind(tmp_path, silent=61)
    with locked(tmp_path):
        assert content(tmp_path)['token'] != 'another'
    assert 'waiting' not in caplog.text


def test_a_holder_that_lost_its_lock_ends_and_leaves_it(tmp_path, quick, monkeypatch):
    monkeypatch.setattr(workdir_lock, 'BEAT_SECONDS', 0.02)
    left = []
    monkeypatch.setattr(ending, 'leave_now', lambda *told: left.append(told))
    with locked(tmp_path):
        before = content(tmp_path)
        while content(tmp_path)['beat'] == before['beat']:
            pass
        (tmp_path / FILE).write_text(json.dumps(before | {'token': 'another'}))
        while not left:
            pass
        (tmp_path / FILE).write_text(json.dumps(before | {'token': 'another'}))
    assert left[0][0] == ending.AGAIN and 'was taken over by process' in left[0][1]


@pytest.mark.parametrize('time', [None, 'noon', []])
def test_what_is_no_lock_is_replaced(tmp_path, time):
    found = leave_behind(tmp_path)
    text = '{"host": 3' if time is None else json.dumps(found | {'time': time})
    (tmp_path / FILE).write_text(text)
    with locked(tmp_path):
        assert content(tmp_path)['beat'] == 1


def test_a_bucket_is_locked_too(monkeypatch, quick):
    buckets.stand_in_for_buckets(monkeypatch)
    with locked('gs://bucket/run'):
        (name,) = buckets.Objects.store
        assert name.endswith(FILE)
        other = json.loads(buckets.Objects.store[name].getvalue())
        with pytest.raises(InUseError, match='trains there'), locked('gs://bucket/run'):
            pass
    assert not buckets.Objects.store
    # Two that write in the same moment: one is left.
    monkeypatch.setattr(
        workdir_lock.time,
        'sleep',
        lambda _: buckets.Objects().pipe_file(name, json.dumps(other).encode()),
    )
    with pytest.raises(InUseError), locked('gs://bucket/run'):
        pass


def test_a_process_that_ends_or_was_never_there_is_not_alive():
    own = workdir_lock._Process.own()
    assert own.here() and own.alive()
    assert not dataclasses.replace(own, start=own.start + 1).alive()
    child = subprocess.Popen([sys.executable, '-c', ''], stdout=subprocess.PIPE)
    child.stdout.read()  # it closes it last; it stays a zombie
    while workdir_lock._start_ticks(child.pid) is not None:
        pass
    child.wait()
    assert workdir_lock._start_ticks(child.pid) is None
