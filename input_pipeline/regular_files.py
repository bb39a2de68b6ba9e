"""Opens regular files and nothing else: a FIFO would wait for ever, a device may have no end."""

import errno
import os
import stat
import time
from typing import BinaryIO

RETRY_SECONDS = 0.1  # before a file whose reading failed is opened once more

_KINDS = {
    stat.S_IFDIR: 'a directory',
    stat.S_IFIFO: 'a FIFO',
    stat.S_IFSOCK: 'a socket',
    stat.S_IFCHR: 'a character device',
    stat.S_IFBLK: 'a block device',
}


class NotRegularError(OSError):
    """What a path leads to is no regular file; the message says what it is."""


# What does not pass by itself.
_LASTING = (NotRegularError, FileNotFoundError, NotADirectoryError, PermissionError)


def open_regular(path: str | os.PathLike, buffering: int = -1) -> BinaryIO:
    """Opens a regular file to read its bytes; never waits for a writer.

    Args:
      path: the file, or a link to one.
      buffering: as of `open`.

    Raises:
      NotRegularError: it is a directory, a FIFO, a socket or a device.
      OSError: it cannot be opened.
    """
    # Before it is opened, which may wind a tape, and after: the name may lead elsewhere by then.
    _check(os.stat(path))
    return open(path, 'rb', buffering, opener=_open_checked)


def _open_checked(path: str, flags: int) -> int:
    fd = os.open(path, flags | os.O_NONBLOCK)
    try:
        _check(os.fstat(fd))
    except OSError:
        os.close(fd)
        raise
    return fd


def _check(found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        kind = _KINDS.get(stat.S_IFMT(found.st_mode), 'of an unknown kind')
        raise NotRegularError(f'is {kind}, not a regular file')


def describe(error: OSError) -> str:
    """One line: the name and text of the error number, where there is one."""
    if error.errno is None:
        return str(error)
    return f'{errno.errorcode.get(error.errno, error.errno)}: {os.strerror(error.errno)}'


class SteadyFile:
    """A regular file that is opened once more when opening it, or a read, fails.

    A stale handle or a hiccup of a network disk ends there. What fails twice stays: FFmpeg, which
    reads through this, may take a failed read for the end of the file and go on.

    Attributes:
      name: the path.
      error: of the read that failed twice; None while all is well.
    """

    def __init__(self, path: str | os.PathLike):
        """Opens the file; raises as `open_regular` does."""
        self.name = os.path.abspath(path)
        self.error: OSError | None = None
        try:
            self._file = open_regular(path, buffering=0)
        except _LASTING:
            raise
        except OSError:
            time.sleep(RETRY_SECONDS)
            self._file = open_regular(path, buffering=0)

    def __enter__(self) -> 'SteadyFile':
        return self

    def __exit__(self, *unused) -> None:
        self.close()

    def read(self, size: int = -1) -> bytes:
        """Reads up to `size` bytes, or all that is left."""
        position = self._file.tell()
        try:
            return self._file.read(size)
        except OSError:
            time.sleep(RETRY_SECONDS)
        try:
            self._file.close()
            self._file = open_regular(self.name, buffering=0)
            self._file.seek(position)
            return self._file.read(size)
        except OSError as error:
            self.error = error
            raise

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Moves to a place; returns it, in bytes from the beginning."""
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        """The place in bytes from the beginning."""
        return self._file.tell()

    def close(self) -> None:
        """Closes the file; may be called again."""
        self._file.close()


def read_regular(path: str | os.PathLike) -> bytes:
    """The content of a regular file; raises as `open_regular` and `SteadyFile.read` do."""
    with SteadyFile(path) as file:
        return file.read()
