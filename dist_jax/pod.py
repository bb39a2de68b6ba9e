"""Several processes as one run: how they find each other, and how they end together.

One process a host, all started with the same command:

    TPU VM slice, GKE     nothing to set; jax reads the addresses from the machine
    anywhere else         JAX_COORDINATOR_ADDRESS=HOST:PORT (of process 0), JAX_NUM_PROCESSES,
                          JAX_PROCESS_ID

jax ends the processes that are left when one dies, but late (by default after 100 s), by abort, and
an error on one host leaves the others in a collective operation until then. So every process tells
the coordinator every few seconds that it lives and where it is, and process 0 looks at that:

    a process is silent for DIST_JAX_LOST_SECONDS (60)   the others name it and exit with 75
    a process ends with an error                         the others repeat it, same exit code
    process 0 itself is gone                             jax aborts the others at once (134);
                                                         a shell beside them says what happened

Exit code 75 (EX_TEMPFAIL) everywhere means: not at the end, start the same command again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import json
import logging
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

log = logging.getLogger('dist_jax')

AGAIN = 75  # exit code: stopped before the end, the same command continues
KEY = 'dist_jax'
POLL_SECONDS = 0.5
# What an error says when it only repeats that another process is gone.
LOST_PEER = re.compile(
    r'^(UNKNOWN|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED)\b'
    r'|gloo|closed by peer|reset by peer|heartbeat|barrier (failed|timed out)',
    re.IGNORECASE,
)
CONTINUE = 'Start the same command again on all hosts; it continues from the newest checkpoint.'


@dataclasses.dataclass(frozen=True)
class Address:
    """How `jax.distributed.initialize` is called; None where jax finds it out."""

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None


def find_address(environment: Mapping[str, str], on_tpu_vm: bool) -> Address | None:
    """How this process joins others, or None where it is the only one.

    Args:
      environment: variables of the process.
      on_tpu_vm: whether the machine has TPU chips.

    Raises:
      ValueError: variables that contradict each other.
    """
    coordinator = environment.get('JAX_COORDINATOR_ADDRESS')
    names = ('JAX_NUM_PROCESSES', 'JAX_PROCESS_ID')
    numbers = [environment.get(name) for name in names]
    if any(numbers) and not (coordinator and all(numbers)):
        raise ValueError(
            'JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES=N and JAX_PROCESS_ID=0..N-1 '
            f'belong together; found {coordinator!r}, {numbers[0]!r}, {numbers[1]!r}'
        )
    if coordinator:
        if not all(numbers):
            return Address(coordinator)  # Slurm, MPI: jax knows the rest
        if ':' not in coordinator:
            raise ValueError(f'JAX_COORDINATOR_ADDRESS={coordinator!r} must be HOST:PORT')
        try:
            count, own = map(int, numbers)
        except ValueError:
            raise ValueError(f'{names} = {numbers} must be whole numbers') from None
        if not 0 <= own < count:
            raise ValueError(
                f'JAX_PROCESS_ID={own} must be in 0 to JAX_NUM_PROCESSES - 1 = {count - 1}'
            )
        return Address(coordinator, count, own)
    hosts = environment.get('TPU_PROCESS_ADDRESSES') or environment.get('TPU_WORKER_HOSTNAMES')
    if int(environment.get('MEGASCALE_NUM_SLICES') or 1) > 1 or (hosts and ',' in hosts):
        return Address()
    # A TPU VM slice sets no variables: jax asks the metadata server, which one host answers too.
    wants_tpu = environment.get('JAX_PLATFORMS', 'tpu') in ('', 'tpu', 'tpu,cpu')
    if on_tpu_vm and wants_tpu and not hosts and 'TPU_SKIP_MDS_QUERY' not in environment:
        return Address()
    return None


def has_tpu() -> bool:
    """Whether this machine has TPU chips, without starting jax."""
    return bool(glob.glob('/dev/accel[0-9]*') or glob.glob('/dev/vfio/[0-9]*'))


def _seconds(name: str, default: float) -> float:
    text = os.environ.get(name, '')
    try:
        value = float(text) if text else default
    except ValueError:
        value = 0.0
    if value <= 0:
        raise ValueError(f'{name}={text!r} must be a number of seconds above 0')
    return value


_member: Member | None = None


def current() -> Member | None:
    """This process among several, or None where it is alone."""
    return _member


def note(**figures: Any) -> None:
    """Says where this process is ('step', 'doing', ...), for the others; costs nothing."""
    if _member is not None:
        _member.note(**figures)


def suspect(error: BaseException) -> None:
    """Tells that an error may come from the loss of a process, before cleaning up after it."""
    if _member is not None:
        _member.suspect(error)


def join(stops_on_sigterm: bool = False) -> None:
    """Joins the other processes, if there are any. Call it before anything else of jax.

    Args:
      stops_on_sigterm: SIGTERM to one process is passed on to all, for a loop that asks
        `reached_preemption_sync_point`; otherwise it ends the process.

    Raises:
      ValueError: environment variables that contradict each other.
    """
    global _member
    address = find_address(os.environ, has_tpu())
    if address is None:
        return
    lost_after = _seconds('DIST_JAX_LOST_SECONDS', 60)
    patience = _seconds('DIST_JAX_JOIN_SECONDS', 300)
    import jax

    if jax.distributed.is_initialized():
        return
    jax.config.update('jax_enable_preemption_service', stops_on_sigterm)
    who = 'this process' if address.process_id is None else f'process {address.process_id}'
    where = f' at {address.coordinator}' if address.coordinator else ''

    def give_up() -> None:
        whom = 'the other processes' if address.process_id == 0 else f'process 0{where}'
        print(
            f'dist_jax: {who} has waited {patience:.0f} s for {whom}. Was the same command started '
            'on every host, and can the hosts reach each other on this port? '
            'DIST_JAX_JOIN_SECONDS sets the time.',
            file=sys.stderr,
        )
        _exit(AGAIN)

    timer = threading.Timer(patience, give_up)
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            address.coordinator,
            address.num_processes,
            address.process_id,
            initialization_timeout=int(patience) + 30,  # jax would abort; the timer speaks first
            heartbeat_timeout_seconds=int(2 * lost_after) + 10,  # for a process 0 that hangs
        )
    finally:
        timer.cancel()
    if jax.process_count() > 1:
        # The key-value store of the coordinator has no public name in jax 0.10.
        from jax._src import distributed

        state = distributed.global_state
        _member = Member(
            state.client,
            state.process_id,
            state.num_processes,
            lost_after,
            state.coordinator_address or '',
        )
        _member.start()


def _exit(code: int) -> None:
    """Ends this process without waiting for any other, as `sys.exit` would."""
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def leave(code: int, error: BaseException | None = None, message: str = '') -> int:
    """Ends the command on all processes together; returns the exit code.

    With an error it does not return where there are other processes: they are told, `message` is
    printed, or what happened to another process if that was the reason, and nobody is waited for.
    """
    if _member is None:
        return code
    if error is not None:
        _member.fail(code, error, message)
    _member.finish()
    import jax

    jax.distributed.shutdown()  # waits for the others
    _member.say_done()
    return code


class Member:
    """One process among several: its signs of life, and what it hears of the others."""

    def __init__(
        self, client: Any, process_id: int, num_processes: int, lost_after: float, coordinator: str
    ):
        """Prepares.

        Args:
          client: of jax's coordination service.
          process_id: own number.
          num_processes: of the run.
          lost_after: seconds of silence after which a process counts as lost.
          coordinator: address of process 0.
        """
        self.process_id, self.num_processes = process_id, num_processes
        self.lost_after = lost_after
        self.client = client
        self._coordinator = coordinator
        self._every = min(max(lost_after / 6, POLL_SECONDS), 10.0)
        self._state: dict[str, Any] = {'doing': 'starting', 'step': -1}
        self._changed = time.monotonic()
        self._beats = self._exchanges = 0
        self._ending = threading.Event()  # the main thread has an error of its own, or is done
        self._verdict: dict[str, Any] | None = None
        self._heard = threading.Event()
        self._stop = threading.Event()
        self._last = threading.Lock()
        self._thread = threading.Thread(target=self._watch, name='pod', daemon=True)
        self._others: dict[int, dict[str, Any]] = {}
        self._judge = _Judge(num_processes, lost_after) if process_id == 0 else None
        self._last_words: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts the thread of signs of life."""
        own = f'process {self.process_id} of {self.num_processes} on {socket.gethostname()}'
        lost = 'another process was lost or has started again; see their logs'
        if self.process_id:
            lost = f'process 0, the coordinator at {self._coordinator}, was lost'
        text = (
            f'dist_jax: {own} ended without a word of its own. If jax wrote above that it ends '
            f'this process, {lost}. Otherwise it was killed, perhaps for memory. {CONTINUE}'
        )
        # Says the text when the pipe closes before 'done' has come through it: after an abort or a
        # SIGKILL nothing of this process can.
        script = 'trap "" TERM INT HUP; read word; [ "$word" = done ] || printf "%s\\n" "$1" >&2'
        with contextlib.suppress(OSError):
            self._last_words = subprocess.Popen(
                ['/bin/sh', '-c', script, 'sh', text],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
            )
        self._thread.start()

    def note(self, **figures: Any) -> None:
        """Changes what the next sign of life says."""
        if figures.get('step', self._state['step']) != self._state['step']:
            self._changed = time.monotonic()
        self._state = self._state | figures

    def exchange(self, name: str, timeout: float, text: str = '') -> list[str]:
        """Texts of all processes, by number; every process must call it. It computes nothing.

        Args:
          name: of this exchange.
          timeout: seconds that the slowest process may take to come here.
          text: of this process.

        Raises:
          RuntimeError: a process did not come.
        """
        self._exchanges += 1
        key = f'{KEY}/exchange/{self._exchanges}-{name}'
        self.client.key_value_set(f'{key}/{self.process_id}', text or ' ')
        try:
            self.client.wait_at_barrier(key, int(timeout * 1000))
        except Exception as error:
            here = {int(k.rpartition('/')[2]) for k, _ in self.client.key_value_dir_get(f'{key}/')}
            missing = sorted(set(range(self.num_processes)) - here)
            raise RuntimeError(
                f'processes {missing[:8]} of {self.num_processes} did not come to {name!r} within '
                f'{timeout:.0f} s; look at their logs'
            ) from error
        found = {int(k.rpartition('/')[2]): v for k, v in self.client.key_value_dir_get(f'{key}/')}
        return [found[i].strip() for i in range(self.num_processes)]

    def slowest(self, figure: str) -> tuple[float, str] | None:
        """The largest value of a figure of `note`, and whose it is; on process 0."""
        rows = [(row[figure], i, row['host']) for i, row in self._others.items() if figure in row]
        if not rows:
            return None
        value, i, host = max(rows)
        return value, f'process {i} ({host})'

    def suspect(self, error: BaseException) -> bool:
        """Whether this error repeats that a process is gone; if so, that is found out sooner."""
        found = LOST_PEER.search(str(error)) is not None
        if found and self._judge is not None:
            self._judge.suspect()
        return found

    def fail(self, code: int, error: BaseException, message: str) -> None:
        """Tells the others of an error and ends; an error that is theirs is left to them."""
        self._ending.set()
        text = str(error) or type(error).__name__
        verdict = None
        if self.suspect(error):
            # Somebody is gone, and soon somebody says who.
            code = 1
            self._heard.wait(self.lost_after + 3 * self._every)
            verdict = self._verdict
        if verdict is None or verdict['process'] == self.process_id:
            first_line = text.splitlines()[0][:500]
            self._tell({'process': self.process_id, 'code': code, 'error': first_line})
            self._end(code, message)
        self._end(verdict['code'], f'dist_jax: {_sentence(verdict, self.num_processes)}')

    def finish(self) -> None:
        """The command is at its end: silence means nothing from now on.

        Process 0 waits here for the others, so that one that is lost this late is named too.
        """
        self.note(done=True)
        with contextlib.suppress(Exception):
            self._beat()
        while self._judge is not None and not self._all_done():
            time.sleep(POLL_SECONDS / 5)
        self._ending.set()
        # A thread inside a call of jax would abort the process when the interpreter ends.
        self._stop.set()
        self._thread.join()

    def _all_done(self) -> bool:
        try:
            rows = self.client.key_value_dir_get(f'{KEY}/alive/')
        except Exception:
            return True
        done = [key for key, row in rows if json.loads(row).get('done')]
        return len(done) == self.num_processes

    def say_done(self) -> None:
        """Lets the shell beside this process end without a word."""
        if self._last_words is not None:
            with contextlib.suppress(OSError):
                self._last_words.stdin.write(b'done\n')
                self._last_words.stdin.close()

    def _end(self, code: int, message: str) -> None:
        self._last.acquire()  # of two threads, one speaks; it is never released
        print(message, file=sys.stderr, flush=True)
        if self.process_id == 0:
            time.sleep(4 * POLL_SECONDS)  # the others hear of it before the coordinator goes
        self.say_done()
        _exit(code)

    def _beat(self) -> None:
        self._beats += 1
        state = self._state | {
            'beat': self._beats,
            'host': socket.gethostname(),
            'since': round(time.monotonic() - self._changed, 1),
        }
        self.client.key_value_set(
            f'{KEY}/alive/{self.process_id}', json.dumps(state), allow_overwrite=True
        )

    def _tell(self, verdict: dict[str, Any]) -> None:
        """The first to tell is believed."""
        verdict = {'host': socket.gethostname(), **verdict}
        with contextlib.suppress(Exception):
            self.client.key_value_set(f'{KEY}/verdict/first', json.dumps(verdict))

    def _hear(self) -> dict[str, Any] | None:
        found = dict(self.client.key_value_dir_get(f'{KEY}/verdict/'))
        return json.loads(next(iter(found.values()))) if found else None

    def _watch(self) -> None:
        last_beat = 0.0
        while not self._stop.wait(POLL_SECONDS):
            try:
                now = time.monotonic()
                if now - last_beat >= self._every:
                    last_beat = now
                    self._beat()
                    if self._judge is not None:
                        self._look()
                verdict = self._hear()
            except Exception:  # the coordinator is gone: jax ends this process
                continue
            if verdict is not None:
                self._verdict = verdict
                self._heard.set()
                if verdict['process'] != self.process_id:
                    # All hosts often have the same error at the same time: each says its own.
                    if not self._ending.is_set():
                        self._ending.wait(2 * POLL_SECONDS)
                    if not self._ending.is_set():
                        self._end(
                            verdict['code'],
                            f'dist_jax: {_sentence(verdict, self.num_processes)}',
                        )
                return

    def _look(self) -> None:
        rows = self.client.key_value_dir_get(f'{KEY}/alive/')
        self._others = {int(key.rpartition('/')[2]): json.loads(row) for key, row in rows}
        lost = self._judge.lost(self._others, time.monotonic())
        if lost is not None:
            self._tell(lost)
        elif not self._ending.is_set():
            text = self._judge.stalled(self._others)
            if text:
                log.warning('%s', text)


class _Judge:
    """Who is lost and who is slow, from the signs of life."""

    def __init__(self, num_processes: int, lost_after: float):
        self._patience = self._lost_after = lost_after
        now = time.monotonic()
        self._seen = {i: (None, now) for i in range(1, num_processes)}
        self._asked = now
        self._warned = lost_after

    def suspect(self) -> None:
        """Something is known to be gone: a third of the silence is enough."""
        self._patience = self._lost_after / 3

    def lost(self, rows: Mapping[int, dict[str, Any]], now: float) -> dict[str, Any] | None:
        """The verdict on a process that is silent for too long."""
        if now - self._asked > self._lost_after / 2:  # this process slept, not the others
            self._seen = {i: (beat, now) for i, (beat, _) in self._seen.items()}
        self._asked = now
        silent = []
        for i, (beat, since) in self._seen.items():
            row = rows.get(i, {'beat': 0})
            if row['beat'] != beat:
                self._seen[i] = (row['beat'], now)
            elif now - since > self._patience and not row.get('done'):
                silent.append((now - since, i))
        if not silent:
            return None
        seconds, i = max(silent)
        row = rows.get(i, {})
        return {
            'process': i,
            'host': row.get('host', 'unknown host'),
            'silent': round(seconds),
            'step': row.get('step', -1),
            'code': AGAIN,
        }

    def stalled(self, rows: Mapping[int, dict[str, Any]]) -> str:
        """A line about who keeps the others waiting, at doubling intervals; '' for none."""
        steps = [row.get('step', -1) for row in rows.values()]
        quiet = min((row.get('since', 0) for row in rows.values()), default=0)
        busy = any(
            row.get('doing') in ('evaluating', 'saving', 'starting') for row in rows.values()
        )
        if not steps or max(steps) < 1 or busy or quiet < self._lost_after:
            self._warned = self._lost_after
            return ''
        if quiet < self._warned:
            return ''
        self._warned *= 2
        groups: dict[str, list[str]] = {}
        for i, row in sorted(rows.items()):
            step = f'after step {row["step"]}' if row['step'] >= 0 else 'before its first step'
            where = f'{row["doing"]} {step}'
            groups.setdefault(where, []).append(f'{i} ({row.get("host")})')
        rare = sorted(groups.items(), key=lambda group: len(group[1]))
        named = '; '.join(
            f'process {", ".join(who[:8])}{" ..." if len(who) > 8 else ""}: {where}'
            for where, who in rare
        )
        return f'no step for {quiet:.0f} s, and all processes live. {named}'


def _sentence(verdict: Mapping[str, Any], num_processes: int) -> str:
    who = f'process {verdict["process"]} of {num_processes} on {verdict["host"]}'
    if 'error' in verdict:
        return f'{who} ended with an error, so this one ends too: {verdict["error"]}'
    step = f', last seen at step {verdict["step"]}' if verdict['step'] >= 0 else ''
    return (
        f'{who} is lost: no sign of life for {verdict["silent"]} s{step}. This process ends too '
        f'(exit code {AGAIN}). {CONTINUE}'
    )
