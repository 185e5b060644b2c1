"""Real processes: who outlives whom."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import psutil

# A parent with a grandchild whose own parent has ended, as Ray's workers may be.
PARENT = """
import subprocess, sys, time
from cluster.janitor import Janitor
from cluster.processes import adopt_orphans, end_descendants
adopt_orphans()
CHILD = "import os, time; pid = os.fork(); print(pid, flush=True) if pid else time.sleep(600)"
def leave_orphan():
    subprocess.run([sys.executable, "-c", CHILD])
"""
PATIENT = (
    PARENT
    + """
leave_orphan()
print(end_descendants(5), flush=True)
"""
)
KILLED = (
    PARENT
    + """
with Janitor():
    leave_orphan()
    time.sleep(600)
"""
)
CLEAN = (
    PARENT
    + """
with Janitor() as janitor:
    pass
print(janitor._process.returncode)
"""
)


def wait_gone(pid: int, timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while psutil.pid_exists(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not psutil.pid_exists(pid)


def test_orphans_of_descendants_are_found_and_ended() -> None:
    done = subprocess.run([sys.executable, "-c", PATIENT], capture_output=True, text=True)
    pid, killed = done.stdout.split(maxsplit=1)
    assert killed.strip() == "[]", "a SIGTERM should have been enough"
    assert wait_gone(int(pid), 1)


def test_descendants_do_not_outlive_a_killed_parent() -> None:
    with subprocess.Popen([sys.executable, "-c", KILLED], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        time.sleep(3)  # the janitor takes a while to start, then looks once a second
        assert psutil.pid_exists(pid)
        parent.send_signal(signal.SIGKILL)
    assert wait_gone(pid, 20)


def test_a_janitor_that_is_not_needed_leaves() -> None:
    done = subprocess.run([sys.executable, "-c", CLEAN], capture_output=True, text=True)
    assert done.stdout.strip() == "0", done.stderr
