"""One process at a time in a folder."""

from __future__ import annotations

import errno
import fcntl
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def locked(path: Path) -> Iterator[str | None]:
    """Holds a lock on a file; gives None, or the number of the process that holds it.

    The system lets go of the lock when the process ends, however it ends. The file may stay, and whoever holds the lock
    may remove it.
    """
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if not _lock(file, path):
                yield os.pread(file, 32, 0).decode(errors="replace").strip() or "?"
                return
            if _is(file, path):
                os.ftruncate(file, 0)
                os.pwrite(file, str(os.getpid()).encode(), 0)
                yield None
                return
        finally:
            os.close(file)


def _lock(file: int, path: Path) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        # Some network file systems have no locks; a run is worth more than the check.
        print(f"lossmeta: {path.parent} cannot be locked ({error.strerror})", file=sys.stderr)
    return True


def _is(file: int, path: Path) -> bool:
    """Whether the file still has its name: the last holder may have removed it since it was opened."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file), path.stat())
    return False
