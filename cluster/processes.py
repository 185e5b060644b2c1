"""Leaving no process behind: every descendant is known, and ended at the end."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
from contextlib import suppress

import psutil

__all__ = ["adopt_orphans", "end_descendants", "reap_orphans"]

logger = logging.getLogger(__name__)

_PR_SET_CHILD_SUBREAPER = 36
_MAX_KILLS = 6


def adopt_orphans() -> None:
    """Become the parent of descendants whose parents die, so that they can be found.

    A worker whose raylet was killed would otherwise belong to init and look like anyone's.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        logger.warning("orphans cannot be adopted: %s", os.strerror(ctypes.get_errno()))


def end_descendants(patience_s: float) -> list[str]:
    """Wait for all descendants to end, then kill those left; returns the names of the killed.

    Args:
        patience_s: how long they may take by themselves after a SIGTERM.
    """
    left = _signal(signal.SIGTERM)
    _, slow = psutil.wait_procs(left, timeout=patience_s)
    killed = [_name(process) for process in slow]
    # Bounded: one that waits for a dead disk cannot be killed.
    for _ in range(_MAX_KILLS):
        if not (left := _signal(signal.SIGKILL)):
            break
        psutil.wait_procs(left, timeout=5)
    _reap()
    return killed


def reap_orphans(spared: set[int]) -> None:
    """Collect the exit codes of children that have ended, or those adopted would stay as zombies.

    Args:
        spared: pids whose exit code somebody else in this process waits for.
    """
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess, ChildProcessError):
            if child.pid not in spared and child.status() == psutil.STATUS_ZOMBIE:
                os.waitpid(child.pid, os.WNOHANG)


def _signal(number: signal.Signals) -> list[psutil.Process]:
    """Sends a signal to every living descendant; returns them."""
    reached = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                process.send_signal(number)
                reached.append(process)
    return reached


def _name(process: psutil.Process) -> str:
    try:
        return f"{process.name()} ({process.pid})"
    except psutil.NoSuchProcess:
        return str(process.pid)


def _reap() -> None:
    """Collect the exit codes of adopted children, so that no zombie stays."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
