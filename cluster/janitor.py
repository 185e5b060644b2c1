"""A small process that cleans up after its parent should that be killed with -9.

Ray's daemons follow their parent by themselves, what they started follows them within a while;
some of Ray's agents stay. So this one remembers every descendant of its parent, and ends those
that still run some seconds after the parent has gone. Run as `python -m cluster.janitor`.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from contextlib import suppress
from types import TracebackType

import psutil

__all__ = ["Janitor"]

_LOOK_S = 1.0
_GRACE_S = 5.0
_EXIT_TIMEOUT_S = 5.0
_DISMISSED = b"."


class Janitor:
    """Context: while it lasts, descendants of this process do not outlive a `kill -9` of it."""

    def __enter__(self) -> Janitor:
        # A pipe tells of our end, whatever ends us; its own session keeps Ctrl-C away from it.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "cluster.janitor", str(os.getpid())],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        return self

    @property
    def pid(self) -> int:
        """Of the janitor's process."""
        return self._process.pid

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with suppress(BrokenPipeError, subprocess.TimeoutExpired):
            self._process.communicate(_DISMISSED, timeout=_EXIT_TIMEOUT_S)


def _watch(parent: psutil.Process) -> set[psutil.Process]:
    """All descendants seen until the parent is gone; none when it dismissed us."""
    seen: set[psutil.Process] = set()
    while True:
        with suppress(psutil.NoSuchProcess):
            seen.update(parent.children(recursive=True))
        readable, _, _ = select.select([sys.stdin.fileno()], [], [], _LOOK_S)
        if readable:
            return set() if os.read(sys.stdin.fileno(), 1) == _DISMISSED else seen


def _main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    parent_pid = int(sys.argv[1])
    if os.getppid() != parent_pid:
        return  # it has died already; whoever is our parent now is not ours to watch
    seen = _watch(psutil.Process(parent_pid)) - {psutil.Process()}
    _, left = psutil.wait_procs(seen, timeout=_GRACE_S)
    for process in left:
        with suppress(psutil.NoSuchProcess):  # psutil knows when a pid has a new owner
            process.kill()


if __name__ == "__main__":
    _main()
