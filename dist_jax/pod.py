"""Several processes as one run: how they find each other, and how they end together.

One process a host, all started with the same command:

    TPU VM slice, GKE     nothing to set; jax reads the addresses from the machine
    srun, mpirun          nothing to set where jax knows them (Slurm, Open MPI 4)
    anywhere else         JAX_COORDINATOR_ADDRESS=HOST:PORT (of process 0), JAX_NUM_PROCESSES,
                          JAX_PROCESS_ID

jax ends the processes that are left when one dies, but late (by default after 100 s), by abort, and
an error on one host leaves the others in a collective operation until then. So every process sends
the coordinator a heartbeat every few seconds, which says where it is, and process 0 looks at the
health of all:

    a process is silent for DIST_JAX_LOST_SECONDS (60)   the others name it and exit with 75
    a process ends with an error                         the others repeat it, same exit code
    a process is asked to stop (SIGTERM, Ctrl-C)         all stop at the same place; see `ending`
    a process makes no progress for pod.stall_timeout    all write their stacks and exit with 75
    process 0 does not answer for as long, or is gone    the others say so and exit with 75

Exit code 75 (EX_TEMPFAIL) everywhere means: not at the end, start the same command again.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import glob
import json
import logging
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dist_jax import ending

log = logging.getLogger('dist_jax')

AGAIN = ending.AGAIN
KEY = 'dist_jax'
POLL_SECONDS = 0.5
GOOGLE = '0x1ae0'  # as a vendor on the PCI bus
# What an error says when it only repeats that another process is gone.
LOST_PEER = re.compile(
    r'^(UNKNOWN|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED)\b'
    r'|gloo|closed by peer|reset by peer|heartbeat|barrier (failed|timed out)',
    re.IGNORECASE,
)
CONTINUE = 'Start the same command again on all hosts; it continues from the newest checkpoint.'


@dataclasses.dataclass(frozen=True)
class Address:
    """How `jax.distributed.initialize` is called; None where jax finds it out.

    Attributes:
      coordinator: HOST:PORT of process 0.
      num_processes: of the run.
      process_id: own number.
      certain: there are others; otherwise it takes asking to know.
    """

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    certain: bool = dataclasses.field(default=True, compare=False)


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
    if numbers[0] == '1' and not coordinator:
        return None
    if any(numbers) and not (coordinator and all(numbers)):
        raise ValueError(
            'JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES=N and JAX_PROCESS_ID=0..N-1 '
            f'belong together; found {coordinator!r}, {numbers[0]!r}, {numbers[1]!r}'
        )
    if coordinator:
        if not all(numbers):
            return _launched(environment, coordinator) or Address(coordinator)
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
    launched = _launched(environment, None)
    if launched is not None:
        return launched
    hosts = environment.get('TPU_PROCESS_ADDRESSES') or environment.get('TPU_WORKER_HOSTNAMES')
    if int(environment.get('MEGASCALE_NUM_SLICES') or 1) > 1 or (hosts and ',' in hosts):
        return Address()
    # A TPU VM slice sets no variables: jax asks the metadata server, which one host answers too.
    wants_tpu = environment.get('JAX_PLATFORMS', 'tpu') in ('', 'tpu', 'tpu,cpu')
    if on_tpu_vm and wants_tpu and not hosts and 'TPU_SKIP_MDS_QUERY' not in environment:
        return Address(certain=False)
    return None


# What jax reads of Slurm, and how many tasks were started together.
_SLURM = ('SLURM_JOB_ID', 'SLURM_STEP_NODELIST', 'SLURM_NTASKS', 'SLURM_PROCID', 'SLURM_LOCALID')


def _launched(environment: Mapping[str, str], coordinator: str | None) -> Address | None:
    """How a task of `mpirun` or `srun` joins the others; None if it is the only one.

    The variables of a Slurm job are in its batch script and in the shell of `salloc` too, which run
    once. Only a task of `srun` knows a step.

    Raises:
      ValueError: there are others, and neither jax nor the variables say where.
    """
    count = environment.get('OMPI_COMM_WORLD_SIZE', '')
    if count.isdigit() and int(count) > 1:
        if 'OMPI_MCA_orte_hnp_uri' in environment:
            return Address(coordinator)
        if coordinator:
            return Address(coordinator, int(count), int(environment['OMPI_COMM_WORLD_RANK']))
        raise _not_joined(f'OMPI_COMM_WORLD_SIZE={count}', 'Open MPI 5 does not tell jax where')
    number = environment.get('SLURM_PROCID', '')
    count = environment.get('SLURM_STEP_NUM_TASKS', '')
    if not count and ('SLURM_STEP_ID' in environment or number not in ('', '0')):
        count = environment.get('SLURM_NTASKS', '')
    if number and count.isdigit() and int(count) > 1:
        missing = [name for name in _SLURM if name not in environment]
        if not missing:
            return Address(coordinator)
        if coordinator:
            return Address(coordinator, int(count), int(number))
        raise _not_joined(f'{count} tasks of Slurm', f'{", ".join(missing)} are not set')
    return None


def _not_joined(found: str, reason: str) -> ValueError:
    return ValueError(
        f'this process is one of several ({found}), and {reason}: set JAX_COORDINATOR_ADDRESS='
        'HOST:PORT, of the host of the first one, for all of them; or JAX_NUM_PROCESSES=1 if each '
        'is a run of its own'
    )


def has_tpu(root: str = '/') -> bool:
    """Whether this machine has TPU chips, without starting jax.

    Devices under /dev/vfio may be of any kind. Google's on the PCI bus are also network cards and
    disks, of class 1 and 2.
    """
    if glob.glob(f'{root}/dev/accel[0-9]*'):
        return True
    if not glob.glob(f'{root}/dev/vfio/[0-9]*'):
        return False
    for vendor in Path(root, 'sys/bus/pci/devices').glob('*/vendor'):
        with contextlib.suppress(OSError):
            kind = vendor.with_name('class').read_text().strip()
            if vendor.read_text().strip() == GOOGLE and kind[:4] not in ('0x01', '0x02'):
                return True
    return False


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


_write_stacks: Callable[[], None] | None = None


def on_stall(write_stacks: Callable[[], None] | None) -> None:
    """Says how this process writes the stacks of its threads, when another one has stalled."""
    global _write_stacks
    _write_stacks = write_stacks


def leave_stalled(message: str, seconds: int) -> None:
    """Ends this process, which has stalled, and the others with it. Does not return.

    Args:
      message: a line for the log.
      seconds: without progress.
    """
    if _member is not None:
        _member.leave_stalled(message, seconds)
    ending.leave_now(AGAIN, message)


def stops_at(point: int) -> bool:
    """Whether this run stops here, since this process or another was asked to; the same on all.

    Args:
      point: number of this place in the loop, one more than of the last; the same on all processes.
    """
    if _member is not None:
        return _member.stops_at(point)
    return bool(ending.asked())


def join() -> None:
    """Joins the other processes, if there are any. Call it before anything else of jax.

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
    # It would take SIGTERM away from `ending`, and know nothing of Ctrl-C.
    jax.config.update('jax_enable_preemption_service', False)
    who = 'this process' if address.process_id is None else f'process {address.process_id}'
    where = f' at {address.coordinator}' if address.coordinator else ''

    def give_up() -> None:
        whom = 'the other processes' if address.process_id == 0 else f'process 0{where}'
        ending.leave_now(
            AGAIN,
            f'dist_jax: {who} has waited {patience:.0f} s for {whom}. Was the same command started '
            'on every host, and can the hosts reach each other on this port? '
            'DIST_JAX_JOIN_SECONDS sets the time.',
        )

    from dist_jax import jax_internals

    state = jax_internals.distributed_state()
    timer = threading.Timer(patience, give_up)
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            address.coordinator,
            address.num_processes,
            address.process_id,
            initialization_timeout=int(patience) + 30,  # jax would abort; the timer speaks first
            heartbeat_timeout_seconds=int(2 * lost_after) + 10,  # `_guard` is earlier
        )
    except Exception as error:
        if address.certain or state.coordinator_address:
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        log.warning(
            'this machine has TPU chips and does not say whether it is one of several (%s): this '
            'process goes on alone',
            reason,
        )
        return
    finally:
        timer.cancel()
    if jax.process_count() > 1:
        _member = Member(
            state.client,
            state.process_id,
            state.num_processes,
            lost_after,
            state.coordinator_address or '',
        )
        _member.start()


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
    _catch_abort(None)
    return code


_abort_handler: Any = None  # C calls it; it must live


def _catch_abort(leave: Callable[[], None] | None) -> None:
    """Calls `leave` when jax aborts this process; None: it ends as usual.

    jax does so on a thread of its own as soon as it hears that the coordinator or another process
    is gone, and offers no other way. An abort in the main thread is something else and stays one.
    """
    global _abort_handler

    def handle(_: int) -> None:
        if threading.current_thread() is not threading.main_thread():
            leave()

    libc = ctypes.CDLL(None)
    libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(handle) if leave is not None else None
    libc.signal(signal.SIGABRT, ctypes.cast(handler, ctypes.c_void_p) if handler else None)
    _abort_handler = handler


class Member:
    """One process among several: its heartbeat, and what it hears of the others."""

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
        self._sending = threading.Lock()
        self._state: dict[str, Any] = {'doing': 'starting', 'step': -1}
        self._changed = time.monotonic()
        self._heartbeats = self._exchanges = 0
        self._ending = threading.Event()  # the main thread has an error of its own, or is done
        self._verdict: dict[str, Any] | None = None
        self._heard = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name='pod', daemon=True)
        self._answered = time.monotonic()  # when the coordinator last did
        self._guard_thread = threading.Thread(target=self._guard, name='guard', daemon=True)
        # The place where all stop: the last one that anybody has come to, plus one.
        self._points = threading.Condition()
        self._point = 0
        self._agreeing = False
        self._stop_point: int | None = None
        self._others: dict[int, dict[str, Any]] = {}
        self._health = _Health(num_processes, lost_after) if process_id == 0 else None
        self._last_words: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts the thread that sends heartbeats."""
        own = f'process {self.process_id} of {self.num_processes} on {socket.gethostname()}'
        text = (
            f'dist_jax: {own} ended without a word of its own: it was killed, perhaps for memory. '
            f'{CONTINUE}'
        )
        # Says the text when the pipe closes before 'done' has come through it: after a SIGKILL
        # nothing of this process can.
        script = 'trap "" TERM INT HUP; read word; [ "$word" = done ] || printf "%s\\n" "$1" >&2'
        with contextlib.suppress(OSError):
            self._last_words = subprocess.Popen(
                ['/bin/sh', '-c', script, 'sh', text],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
            )
        _catch_abort(self._aborted)
        ending.leave_with(self._leave_all)
        self._thread.start()
        if self.process_id:
            self._guard_thread.start()

    def note(self, **figures: Any) -> None:
        """Changes what the next heartbeat says."""
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

    def stops_at(self, point: int) -> bool:
        """See the function `stops_at`."""
        with self._points:
            # Those who are ahead wait here until all have said where they are; their threads do.
            self._points.wait_for(lambda: not self._agreeing)
            self._point = point
            return self._stop_point is not None and point >= self._stop_point

    def slowest(self, figure: str) -> tuple[float, str] | None:
        """The largest value of a figure of `note`, and whose it is; on process 0."""
        rows = [(row[figure], i, row['host']) for i, row in self._others.items() if figure in row]
        if not rows:
            return None
        value, i, host = max(rows)
        return value, f'process {i} ({host})'

    def suspect(self, error: BaseException) -> bool:
        """Whether this error repeats that a process is gone; if so, that is found out sooner."""
        # A file system may say that its own peer reset the connection.
        again = isinstance(error, ending.AgainError)
        found = not again and LOST_PEER.search(str(error)) is not None
        if found and self._health is not None:
            self._health.suspect()
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
            self._send_heartbeat()
        while self._health is not None and not self._all_done():
            time.sleep(POLL_SECONDS / 5)
        self._ending.set()
        # A thread inside a call of jax would abort the process when the interpreter ends.
        self._stop.set()
        self._thread.join()
        ending.leave_with(ending.leave_now)

    def _all_done(self) -> bool:
        try:
            rows = self.client.key_value_dir_get(f'{KEY}/heartbeat/')
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
        ending.before_exit.insert(0, self._last_moment)  # called last
        ending.leave_now(code, message)

    def _last_moment(self) -> None:
        if self.process_id == 0:
            time.sleep(4 * POLL_SECONDS)  # the others hear of it before the coordinator goes
        self.say_done()

    def _leave_all(self, code: int, message: str) -> None:
        """Ends this process on behalf of a signal, and the others with it."""
        # They continue where a second Ctrl-C here ends it at once.
        self._end_all(code, message, {'code': AGAIN, 'stopped': ending.asked()})

    def leave_stalled(self, message: str, seconds: int) -> None:
        """See the function `leave_stalled`."""
        self._end_all(AGAIN, message, {'code': AGAIN, 'stalled': seconds, **self._state})

    def _end_all(self, code: int, message: str, verdict: dict[str, Any]) -> None:
        self._ending.set()
        verdict = {**verdict, 'process': self.process_id}
        # A coordinator that hangs would hold this up.
        teller = threading.Thread(target=self._tell, args=(verdict,), daemon=True)
        teller.start()
        teller.join(ending.HOOK_SECONDS)
        self._end(code, message)

    def _aborted(self) -> None:
        """jax ends this process; it has said why above."""
        lost = 'another process was lost or has started again; see their logs'
        if self.process_id:
            lost = f'process 0, the coordinator at {self._coordinator}, or another was lost'
        self._end(
            AGAIN,
            f'dist_jax: process {self.process_id} of {self.num_processes} on '
            f'{socket.gethostname()} is ended by jax: {lost}. {CONTINUE}',
        )

    def _guard(self) -> None:
        """Ends this process when the coordinator does not answer, before jax aborts it."""
        patience = self.lost_after - self._every
        looked = time.monotonic()
        while not self._stop.wait(POLL_SECONDS):
            now = time.monotonic()
            if now - looked > self.lost_after / 2:  # this process slept
                self._answered = now
            looked = now
            if now - self._answered > patience:
                self._end(
                    AGAIN,
                    f'dist_jax: process 0 of {self.num_processes}, the coordinator at '
                    f'{self._coordinator}, has not answered for {now - self._answered:.0f} s: it '
                    'hangs, or the network does. This process ends too (exit code '
                    f'{AGAIN}). {CONTINUE}',
                )

    def _send_heartbeat(self) -> None:
        with self._sending:  # what the thread saw before the end must not come after it
            self._heartbeats += 1
            state = self._state | {
                'heartbeat': self._heartbeats,
                'host': socket.gethostname(),
                'since': round(time.monotonic() - self._changed, 1),
            }
            self.client.key_value_set(
                f'{KEY}/heartbeat/{self.process_id}', json.dumps(state), allow_overwrite=True
            )

    def _tell(self, verdict: dict[str, Any]) -> None:
        """The first to tell is believed."""
        verdict = {'host': socket.gethostname(), **verdict}
        with contextlib.suppress(Exception):
            self.client.key_value_set(f'{KEY}/news/verdict', json.dumps(verdict))

    def _hear(self) -> dict[str, Any] | None:
        """The verdict, if there is one; a wish to stop is seen to."""
        news = self.client.key_value_dir_get(f'{KEY}/news/')
        found = {key.rpartition('/')[2]: text for key, text in news}
        asked = ending.asked_of_loop()
        if asked and 'stop' not in found:
            self.client.key_value_set(f'{KEY}/news/stop', asked, allow_overwrite=True)
        elif 'stop' in found and not ending.asked():
            ending.ask(found['stop'])
        if 'stop' in found and self._stop_point is None:
            self._agree()
        return json.loads(found['verdict']) if 'verdict' in found else None

    def _agree(self) -> None:
        """Says where this process is and waits for it; once all have, it knows where all stop."""
        with self._points:
            if not self._agreeing:
                self._agreeing = True
                self.client.key_value_set(f'{KEY}/points/{self.process_id}', str(self._point))
            points = [int(text) for _, text in self.client.key_value_dir_get(f'{KEY}/points/')]
            if len(points) == self.num_processes:
                self._stop_point = max(points) + 1
                self._agreeing = False
                self._points.notify_all()

    def _watch(self) -> None:
        last_heartbeat = 0.0
        while not self._stop.wait(POLL_SECONDS / 5 if self._agreeing else POLL_SECONDS):
            try:
                now = time.monotonic()
                if now - last_heartbeat >= self._every:
                    last_heartbeat = now
                    self._send_heartbeat()
                    if self._health is not None:
                        self._check_health()
                verdict = self._hear()
                self._answered = time.monotonic()
            except Exception:  # the coordinator is gone: jax or the guard ends this process
                continue
            if verdict is not None:
                self._verdict = verdict
                self._heard.set()
                if verdict['process'] != self.process_id:
                    # All hosts often have the same error at the same time: each says its own.
                    if not self._ending.is_set():
                        self._ending.wait(2 * POLL_SECONDS)
                    if not self._ending.is_set():
                        if 'stalled' in verdict and _write_stacks is not None:
                            _write_stacks()
                        self._end(
                            verdict['code'],
                            f'dist_jax: {_sentence(verdict, self.num_processes)}',
                        )
                return

    def _check_health(self) -> None:
        rows = self.client.key_value_dir_get(f'{KEY}/heartbeat/')
        self._others = {int(key.rpartition('/')[2]): json.loads(row) for key, row in rows}
        lost = self._health.lost(self._others, time.monotonic())
        if lost is not None:
            self._tell(lost)
        elif not self._ending.is_set():
            text = self._health.stalled(self._others)
            if text:
                log.warning('%s', text)


class _Health:
    """Who is lost and who is slow, from the heartbeats; process 0 looks at it."""

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
            self._seen = {i: (heartbeat, now) for i, (heartbeat, _) in self._seen.items()}
        self._asked = now
        silent = []
        for i, (heartbeat, since) in self._seen.items():
            row = rows.get(i, {'heartbeat': 0})
            if row['heartbeat'] != heartbeat:
                self._seen[i] = (row['heartbeat'], now)
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
            row.get('doing') in ('averaging', 'evaluating', 'saving', 'starting')
            for row in rows.values()
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
    if 'stopped' in verdict:
        return (
            f'{who} was stopped ({verdict["stopped"]}), so this one ends too (exit code {AGAIN}). '
            f'{CONTINUE}'
        )
    if 'stalled' in verdict:
        return (
            f'{who} made no progress for {verdict["stalled"]} s ({verdict["doing"]}, after step '
            f'{verdict["step"]}), so this one ends too (exit code {AGAIN}); the stacks of both are '
            f'in their logs. {CONTINUE}'
        )
    if 'error' in verdict:
        return f'{who} ended with an error, so this one ends too: {verdict["error"]}'
    step = f', last seen at step {verdict["step"]}' if verdict['step'] >= 0 else ''
    return (
        f'{who} is lost: no heartbeat for {verdict["silent"]} s{step}. This process ends too '
        f'(exit code {AGAIN}). {CONTINUE}'
    )
