"""Who owns a file: the kernel's answer, which ends with the process however that ends.

No process id is written anywhere, so neither a reused id nor another host can be mistaken.
"""

from __future__ import annotations

import fcntl
import os
import weakref
from pathlib import Path
from typing import Self

__all__ = ["FileLock"]


class FileLock:
    """An exclusive `flock` of one file. Make one with `create` or `take`.

    Its descriptor is for nothing else: a mapping made from it would hold the lock as well, in a
    forked child (vLLM's engine core may be one) beyond the end of this process.
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor = descriptor
        _held.add(self)

    @classmethod
    def create(cls, path: Path) -> Self:
        """A new file, empty, readable by its owner only, and locked.

        Raises:
            FileExistsError: there is one of this name, or a scan took the new one away at once.
        """
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        if _lock(descriptor):
            return cls(path, descriptor)
        os.close(descriptor)
        raise FileExistsError(path)

    @classmethod
    def take(cls, path: Path) -> Self | None:
        """Lock a file whose owner is gone; None when it is not, or when the file is.

        Raises:
            OSError: the file cannot be opened.
        """
        try:
            descriptor = os.open(path, os.O_RDWR)
        except FileNotFoundError:
            return None
        if _lock(descriptor):
            return cls(path, descriptor)
        os.close(descriptor)
        return None

    def release(self) -> None:
        """Give it up. Idempotent."""
        if self in _held:
            _held.discard(self)
            os.close(self._descriptor)


_held: weakref.WeakSet[FileLock] = weakref.WeakSet()


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    # Between opening and locking, another process may have locked, delivered and removed it.
    return os.fstat(descriptor).st_nlink > 0


def _release_in_child() -> None:
    for lock in list(_held):
        lock.release()


os.register_at_fork(after_in_child=_release_in_child)
