"""Local files and folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dist_jax import ending


@contextmanager
def appearing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A name beside the file to write to; inside the context the file is as it was.

    What was written gets the name of the file at the end, and after an exception it is removed.
    """
    path = Path(path)
    partial = path.with_name(f'.{path.name}.partial')
    try:
        yield partial
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def folder_appearing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """An empty folder beside a place, which gets that place's name at the end.

    After an exception it is removed; what a killed process left of one is removed before.

    Raises:
      ending.AgainError: another process is at it.
      OSError: at the end, there is something at that place by now.
    """
    path = Path(path).absolute()
    partial = path.with_name(f'.{path.name}.partial')
    lock = _locked_folder(partial, path)
    try:
        for entry in list(partial.iterdir()):
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        yield partial
        partial.replace(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def _locked_folder(partial: Path, path: Path) -> int:
    """A descriptor that no other process has, on disks with locks, until it is closed."""
    while True:
        partial.mkdir(parents=True, exist_ok=True)
        lock = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise ending.AgainError(
                f'{path} is being made by another process; wait for it, or name another folder'
            ) from None
        except OSError:  # a disk without locks
            return lock
        # Another process may have been done with it in the meantime, and have moved it.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock), os.stat(partial)):
                return lock
        os.close(lock)
