"""A PostgreSQL cluster of a test's own: in a temporary folder, reached by a Unix socket only.

Use it as a fixture (`from tests.postgres import postgres_cluster`, with the name in the suite's
conftest), or as a context manager (`running_postgres()`).
"""

from __future__ import annotations

import contextlib
import itertools
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

__all__ = ["PostgresCluster", "postgres_cluster", "postgres_missing", "running_postgres"]

_BINARIES = Path("/usr/lib/postgresql/15/bin")
_USER = "postgres"
_TIMEOUT_S = 60
_PORT = 5432  # names the socket's file only; nothing listens on TCP

_SETTINGS = (
    "listen_addresses=''",
    "fsync=off",
    "full_page_writes=off",
    "max_connections=100",
    "shared_buffers=32MB",
)


def postgres_missing() -> str | None:
    """Why no PostgreSQL can be started here; None if it can."""
    if not (_BINARIES / "initdb").exists():
        return f"needs PostgreSQL 15 ({_BINARIES}): apt install postgresql-15"
    if os.getuid() == 0:
        if shutil.which("runuser") is None:
            return "needs runuser: PostgreSQL refuses to run as root"
        try:
            pwd.getpwnam(_USER)
        except KeyError:
            return f"needs the user {_USER}: PostgreSQL refuses to run as root"
    return None


class PostgresCluster:
    """A server that can be stopped and started again.

    Attributes:
        folder: its data, its log and its socket.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._numbers = itertools.count()

    def create(self) -> None:
        """Make the data folder."""
        if os.getuid() == 0:
            shutil.chown(self.folder, _USER, _USER)
        self._run("initdb", "-D", str(self._data), "-U", _USER, "-A", "trust", "--no-sync")

    def start(self) -> None:
        """Start, and wait until it answers."""
        options = " ".join(f"-c {setting}" for setting in _SETTINGS)
        options += f" -c unix_socket_directories={self.folder} -p {_PORT}"
        log = str(self.folder / "log")
        self._pg_ctl("start", "-l", log, "-o", options)

    def stop(self, mode: str = "immediate") -> None:
        """Stop and wait. `immediate` is like a crash; `fast` closes connections in order."""
        self._pg_ctl("stop", "-m", mode)

    def restart(self, mode: str = "fast") -> None:
        """Stop, and start again."""
        self.stop(mode)
        self.start()

    def create_database(self) -> str:
        """A new, empty database. Returns its SQLAlchemy URL."""
        name = f"moonshard_{os.getpid()}_{next(self._numbers)}"
        address = f"host={self.folder} port={_PORT} user={_USER} dbname={_USER}"
        with psycopg.connect(address, autocommit=True) as connection:
            connection.execute(f'CREATE DATABASE "{name}"')
        return self.url(name)

    def url(self, database: str) -> str:
        """SQLAlchemy URL of a database."""
        return f"postgresql+psycopg://{_USER}@/{database}?host={self.folder}&port={_PORT}"

    @property
    def _data(self) -> Path:
        return self.folder / "data"

    def _pg_ctl(self, command: str, *arguments: str) -> None:
        wait = ("-w", "-t", str(_TIMEOUT_S))
        self._run("pg_ctl", command, "-D", str(self._data), *wait, *arguments)

    def _run(self, program: str, *arguments: str) -> None:
        user = ["runuser", "-u", _USER, "--"] if os.getuid() == 0 else []
        # Not a pipe for the output: the server inherits it, and reading would wait for its end.
        with tempfile.TemporaryFile() as output:
            done = subprocess.run(
                [*user, str(_BINARIES / program), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=2 * _TIMEOUT_S,
                cwd="/",
                env={"PATH": os.environ.get("PATH", ""), "LC_ALL": "C.UTF-8"},
                check=False,
            )
            output.seek(0)
            text = output.read().decode(errors="replace")
        assert done.returncode == 0, f"{program} {' '.join(arguments)} failed:\n{text}"


@contextlib.contextmanager
def running_postgres() -> Iterator[PostgresCluster]:
    """A cluster that runs, and is gone afterwards."""
    # Not below pytest's folder, into which the server's user may not look; and a short path,
    # because a socket's has at most 107 bytes.
    folder = Path(tempfile.mkdtemp(prefix="moonshard-pg-", dir="/tmp"))
    cluster = PostgresCluster(folder)
    try:
        cluster.create()
        cluster.start()
        try:
            yield cluster
        finally:
            cluster.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def postgres_cluster() -> Iterator[PostgresCluster]:
    """A cluster for the whole run; every user makes a database of its own in it."""
    reason = postgres_missing()
    if reason is not None:
        pytest.skip(reason)
    with running_postgres() as cluster:
        yield cluster
