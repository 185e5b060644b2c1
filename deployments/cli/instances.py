"""Which servers run on this machine: a small file for each, so that other commands find them."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from cluster.exceptions import MoonshardError

__all__ = ["Instance", "find_instance", "registered"]


@dataclass(frozen=True, slots=True)
class Instance:
    """A running `moonshard serve`.

    Attributes:
        port: its HTTP port.
        url: where clients reach it.
        address: its Ray cluster, host:port.
        application: name of the Serve application.
        owns_node: whether it started the Ray node.
        pid, started_at: of its process; together they name it, though pids come back.
    """

    port: int
    url: str
    address: str
    application: str
    owns_node: bool
    pid: int
    started_at: float

    @property
    def process(self) -> psutil.Process | None:
        """Its process; None when it has ended."""
        try:
            process = psutil.Process(self.pid)
            return process if abs(process.create_time() - self.started_at) < 1 else None
        except psutil.NoSuchProcess:
            return None


@contextmanager
def registered(
    port: int, url: str, address: str, application: str, *, owns_node: bool
) -> Iterator[None]:
    """Be found by the other commands while the context lasts."""
    started_at = psutil.Process().create_time()
    instance = Instance(port, url, address, application, owns_node, os.getpid(), started_at)
    file = _folder() / f"{port}.json"
    # Whole or not at all: the others may read at any time.
    draft = file.with_suffix(f".{os.getpid()}")
    draft.write_text(json.dumps(asdict(instance)))
    draft.replace(file)
    try:
        yield
    finally:
        file.unlink(missing_ok=True)


def find_instance(port: int | None) -> Instance:
    """The server on `port`, or the only one that runs here.

    Raises:
        MoonshardError: there is none, or there are several and no port was given.
    """
    running = [i for i in _all() if i.process is not None and port in (None, i.port)]
    if not running:
        where = f" on port {port}" if port else ""
        raise MoonshardError(
            f"no `moonshard serve` runs here{where}; start one, or name a cluster with --address"
        )
    if len(running) > 1:
        ports = ", ".join(str(i.port) for i in running)
        raise MoonshardError(f"several run here, on ports {ports}; choose one with --port")
    return running[0]


def _all() -> list[Instance]:
    instances = []
    for file in sorted(_folder().glob("*.json")):
        with suppress(ValueError, TypeError, FileNotFoundError):  # one that has just gone
            instances.append(Instance(**json.loads(file.read_text())))
    return instances


def _folder() -> Path:
    root = os.environ.get("XDG_RUNTIME_DIR")
    folder = Path(root) / "moonshard" if root and Path(root).is_dir() else None
    folder = folder or Path(tempfile.gettempdir()) / f"moonshard-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise MoonshardError(f"{folder} belongs to another user; set XDG_RUNTIME_DIR")
    return folder
