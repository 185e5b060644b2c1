"""Running `moonshard` as a user does, and seeing every process that it ever had."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import yaml

from cluster.config import REPO_ROOT

__all__ = ["MOONSHARD", "Command", "nano_config", "running", "still_running"]

MOONSHARD = Path(sys.executable).with_name("moonshard")
_LOOK_S = 0.3


def nano_config(folder: Path, port: int, args: dict[str, dict[str, Any]] | None = None) -> Path:
    """configs/nano.yaml on another port, with some sections of its args changed."""
    document = yaml.safe_load((REPO_ROOT / "configs" / "nano.yaml").read_text())
    document["http_options"]["port"] = port
    tree = document["applications"][0]["args"]
    tree["ledger"] = {"state_dir": str(folder / "state")}
    for section, values in (args or {}).items():
        tree[section] = {**tree.get(section, {}), **values}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


class Command:
    """A started `moonshard serve`.

    Watches its descendants from the outside: once it is killed nobody else knows who they were.
    """

    def __init__(self, config: Path, log: Path) -> None:
        self._log = log
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [MOONSHARD, "serve", config],
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
                start_new_session=True,
            )
        self._seen: set[psutil.Process] = set()
        self._stopped = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()

    @property
    def output(self) -> str:
        """All it has said so far."""
        return self._log.read_text()

    def await_output(self, text: str, timeout_s: float) -> None:
        """Wait until it has said `text`."""
        deadline = time.monotonic() + timeout_s
        while text not in self.output:
            assert self.process.poll() is None, f"it ended:\n{self.output[-4000:]}"
            assert time.monotonic() < deadline, f"no {text!r} in:\n{self.output[-4000:]}"
            time.sleep(0.1)

    def end(self, number: int, timeout_s: float = 60.0) -> int:
        """Send a signal, wait for the exit status."""
        self.process.send_signal(number)
        return self.process.wait(timeout_s)

    def left_running(self, timeout_s: float) -> list[str]:
        """Descendants that still run after `timeout_s`."""
        self.close()
        return still_running(self._seen, timeout_s)

    def close(self) -> None:
        self._stopped.set()
        self._watcher.join(10)

    def _watch(self) -> None:
        with suppress(psutil.NoSuchProcess):
            parent = psutil.Process(self.process.pid)
            while not self._stopped.wait(_LOOK_S):
                self._seen.update(parent.children(recursive=True))


@contextmanager
def running(config: Path, log: Path) -> Iterator[Command]:
    """A `moonshard serve` that is gone afterwards, whatever happened."""
    command = Command(config, log)
    try:
        yield command
    finally:
        command.close()
        if command.process.poll() is None:
            command.process.kill()
            command.process.wait(10)
        for process in command._seen:
            with suppress(psutil.NoSuchProcess):
                process.kill()


def still_running(processes: Collection[psutil.Process], timeout_s: float) -> list[str]:
    """Which of them run after `timeout_s`."""
    _, alive = psutil.wait_procs(processes, timeout=timeout_s)
    return [_describe(process) for process in alive if _runs(process)]


def _runs(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _describe(process: psutil.Process) -> str:
    with suppress(psutil.NoSuchProcess):
        return f"{process.pid} {' '.join(process.cmdline())[:80]}"
    return str(process.pid)
