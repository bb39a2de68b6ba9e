"""Views of videos that strangers send, made in a process of its own: it may crash or hang.

A process that does is ended, and another one takes its place. Nothing that it says is unpickled.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from multiprocessing.connection import Connection

import numpy as np

from input_pipeline.decode import DecodeError
from input_pipeline.pipeline import EvalReader
from input_pipeline.video_list import Record
from input_pipeline.workers import KINDS, START_SECONDS

CRASHED, TIMED_OUT = KINDS
_READY, _VIEWS, _ERROR = b'r', b'v', b'e'


class DecoderProcess:
    """A process that makes views, one video after the other; of one thread at a time."""

    def __init__(self, reader: EvalReader, seconds: float):
        """Starts nothing yet.

        Args:
          reader: makes the views.
          seconds: that a video may take.
        """
        self._reader, self._seconds = reader, seconds
        self._process: multiprocessing.process.BaseProcess | None = None
        self._connection: Connection | None = None

    def read(self, path: str | os.PathLike[str]) -> np.ndarray:
        """The views of a video, uint8 (V, T, H, W, 3).

        Raises:
          DecodeError: it cannot be read, the process died over it, or it took too long.
        """
        path = os.fspath(path)
        try:
            self.start()
            self._connection.send_bytes(os.fsencode(path))
            if not self._connection.poll(self._seconds):
                self.close()
                raise DecodeError(path, TIMED_OUT, f'no views of it after {self._seconds:g} s')
            answer = self._connection.recv_bytes()
        except (EOFError, ConnectionError):
            self.close()
            raise DecodeError(path, CRASHED, 'the process that read it died') from None
        if answer[:1] == _ERROR:
            raise DecodeError(path, *json.loads(answer[1:]))
        return np.frombuffer(answer, np.uint8, offset=1).reshape(self._reader.shape)

    def start(self) -> None:
        """Starts the process, if none runs, and waits until it is ready.

        Raises:
          RuntimeError: it does not get there.
        """
        if self._process is not None and self._process.is_alive():
            return
        self.close()  # of one that died meanwhile, over no video
        context = multiprocessing.get_context('spawn')  # a fork would have locks of its parent
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self._reader), daemon=True)
        self._process.start()
        theirs.close()
        try:
            ready = self._connection.poll(START_SECONDS) and self._connection.recv_bytes() == _READY
        except (EOFError, ConnectionError):
            ready = False
        if not ready:
            self.close()
            raise RuntimeError('the process that decodes does not start')

    def close(self) -> None:
        """Ends the process; the next video starts another one."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._connection.close()
        self._process = None


def _serve(connection: Connection, reader: EvalReader) -> None:
    """Answers paths until the other side is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the server
    connection.send_bytes(_READY)
    while True:
        try:
            path = os.fsdecode(connection.recv_bytes())
        except EOFError:
            return
        try:
            answer = _VIEWS + reader.read(Record(path, 0, path))[0].tobytes()
        except DecodeError as error:
            answer = _ERROR + json.dumps([error.kind, error.reason]).encode()
        connection.send_bytes(answer)
