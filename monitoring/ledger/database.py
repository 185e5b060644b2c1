"""The database under the ledger: SQLite for one process, PostgreSQL for several."""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import alembic.command
import alembic.config
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import URL, Connection, Engine, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from monitoring.ledger.exceptions import LedgerError, LedgerUnavailable
from monitoring.ledger.schema import HEAD, VERSION_TABLE

__all__ = ["Database"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

_CONNECT_TIMEOUT_S = 3
_STATEMENT_TIMEOUT_MS = 10_000
_BUSY_TIMEOUT_MS = 5_000
_POOL_SIZE = 10
_POOL_OVERFLOW = 10
_POOL_TIMEOUT_S = 5.0
_NUM_TRIES = 4

_MIGRATIONS = Path(__file__).parent / "migrations"
_MIGRATION_LOCK = 0x6D6F6F6E_00000001  # any two numbers that no other program locks by chance
_TOTALS_LOCK = 0x6D6F6F6E_00000002

_CONFLICTS = ("40001", "40P01")  # serialization failure, deadlock: simply try again
_USAGE_HINT = "use sqlite:///path/to/file or postgresql+psycopg://user@host/database"


class Database:
    """An engine and how transactions run on it. Safe to share between threads.

    Raises:
        LedgerError: the URL is not one of ours, or its file cannot be made.
    """

    def __init__(self, url: str) -> None:
        self._url = _checked_url(url)
        self.is_sqlite = self._url.get_backend_name() == "sqlite"
        # SQLite has one writer at a time. Threads that queue here are served at once when it is
        # their turn; those that queue in SQLite sleep and try again, for up to 0.1 s.
        self._writer: contextlib.AbstractContextManager[Any] = (
            threading.Lock() if self.is_sqlite else contextlib.nullcontext()
        )
        self._engine = _sqlite_engine(self._url) if self.is_sqlite else _pg_engine(self._url)

    @property
    def place(self) -> str:
        """Where the data lies, for messages; without a password."""
        if self.is_sqlite:
            return str(self._url.database)
        return f"{self._url.host or 'localhost'}/{self._url.database or ''}"

    def read(self, work: Callable[[Connection], T]) -> T:
        """Run `work` in a transaction that only reads.

        Raises:
            LedgerUnavailable: the database does not answer.
        """
        return self._run(work, "BEGIN")

    def write(self, work: Callable[[Connection], T]) -> T:
        """Run `work` in a transaction of its own; commits unless it raises.

        `work` may run more than once (after a deadlock), so it must do nothing but SQL.

        Raises:
            LedgerUnavailable: the database does not answer.
        """
        with self._writer:
            return self._run(work, "BEGIN IMMEDIATE")

    def insert(self, table: sa.Table) -> postgresql.Insert | sqlite.Insert:
        """An INSERT that knows ON CONFLICT."""
        return sqlite.insert(table) if self.is_sqlite else postgresql.insert(table)

    def lock_totals(self, connection: Connection, *, exclusive: bool) -> None:
        """Until the end of the transaction: `exclusive` waits for all that hold it shared.

        Who adds usage holds it shared; who sums usage up for a new budget row holds it
        exclusively, or would miss what is being added. Taken before any row is locked. SQLite has
        one writer anyway.
        """
        if not self.is_sqlite:
            name = "pg_advisory_xact_lock" if exclusive else "pg_advisory_xact_lock_shared"
            connection.execute(sa.select(getattr(sa.func, name)(_TOTALS_LOCK)))

    def allow_slow(self, connection: Connection, limit_s: int) -> None:
        """Let the statements of this transaction take longer than usual."""
        if not self.is_sqlite:
            connection.execute(sa.text(f"SET LOCAL statement_timeout = '{limit_s}s'"))

    def migrate(self) -> None:
        """Bring the tables to the version that this code needs. Safe in several processes at once.

        Raises:
            LedgerError: they are newer than this code, or may not be made.
            LedgerUnavailable: the database does not answer.
        """

        def upgrade(connection: Connection) -> None:
            self.allow_slow(connection, 0)
            if not self.is_sqlite:
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_MIGRATION_LOCK)))
            if _version(connection) == HEAD:
                return
            logging.getLogger("alembic").setLevel(logging.WARNING)  # a line for every step
            config = alembic.config.Config()
            config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
            config.attributes["connection"] = connection
            alembic.command.upgrade(config, "head")
            logger.info("ledger at %s: tables are at version %s", self.place, HEAD)

        version = self.read(_version)
        if version == HEAD:
            return
        if version is not None and version > HEAD:
            raise LedgerError(
                f"the ledger at {self.place} has tables of version {version}, this Moonshard knows "
                f"{HEAD}: it was used by a newer Moonshard; run that one"
            )
        try:
            with self._writer:
                self._run(upgrade, "BEGIN EXCLUSIVE")
        except DBAPIError as error:
            raise LedgerError(
                f"cannot make the ledger's tables at {self.place}: {_first_line(error)}; its user "
                "must own the database or have CREATE on its schema"
            ) from error

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    def _run(self, work: Callable[[Connection], T], begin: str) -> T:
        for is_last in (*(False,) * (_NUM_TRIES - 1), True):
            try:
                with (
                    self._engine.connect() as connection,
                    connection.execution_options(ledger_begin=begin).begin(),
                ):
                    return work(connection)
            except DBAPIError as error:
                if getattr(error.orig, "sqlstate", None) in _CONFLICTS and not is_last:
                    continue
                if _is_outage(error):
                    raise self._unavailable(error) from error
                raise
            except PoolTimeoutError as error:
                raise self._unavailable(error) from error
        raise AssertionError("unreachable")

    def _unavailable(self, error: SQLAlchemyError) -> LedgerUnavailable:
        return LedgerUnavailable(
            f"the ledger's database at {self.place} does not answer: {_first_line(error)}"
        )


def _checked_url(text: str) -> URL:
    try:
        url = make_url(text)
    except ArgumentError:
        # Not repeated in the message: there may be a password in it.
        raise LedgerError(f"the ledger's URL is not one; {_USAGE_HINT}") from None
    if url.drivername == "postgresql":
        url = url.set(drivername="postgresql+psycopg")
    if url.drivername not in ("sqlite", "sqlite+pysqlite", "postgresql+psycopg"):
        raise LedgerError(f"the ledger cannot use {url.drivername}://; {_USAGE_HINT}")
    if url.get_backend_name() == "sqlite" and (
        not url.database or url.database == ":memory:" or url.database.startswith("file:")
    ):
        raise LedgerError(f"the ledger's SQLite URL must name a file; {_USAGE_HINT}")
    return url


def _sqlite_engine(url: URL) -> Engine:
    if sqlite3.sqlite_version_info < (3, 35):
        raise LedgerError(
            f"SQLite {sqlite3.sqlite_version} is too old for the ledger: use 3.35, or PostgreSQL"
        )
    path = Path(str(url.database))
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        # Made here and not by SQLite, which would leave it readable for everyone. Its WAL takes
        # on the same mode.
        # Only if it is not there: closing it again would drop the locks that SQLite has on it
        # for another connection of this process.
        with contextlib.suppress(FileExistsError):
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
    except OSError as error:
        raise LedgerError(
            f"cannot make the ledger's file {path}: {error.strerror}; set ledger.url or "
            "ledger.state_dir to a place that can be written"
        ) from error
    engine = sa.create_engine(
        url,
        pool_size=_POOL_SIZE,
        max_overflow=_POOL_OVERFLOW,
        pool_timeout=_POOL_TIMEOUT_S,
        connect_args={"timeout": _BUSY_TIMEOUT_MS / 1000},
    )

    @sa.event.listens_for(engine, "connect")
    def _configure(connection: sqlite3.Connection, _record: object) -> None:
        # The driver would start transactions by itself, and too late: `_begin` does.
        connection.isolation_level = None
        connection.execute(f"PRAGMA busy_timeout = {_BUSY_TIMEOUT_MS}")
        connection.execute("PRAGMA journal_mode = WAL")
        # NORMAL syncs at checkpoints only. A killed process loses nothing; a power cut may lose
        # the last transactions (never half of one): usage that the routers had already handed
        # over and struck off. FULL would cost a disk flush for every request.
        connection.execute("PRAGMA synchronous = NORMAL")

    @sa.event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        connection.exec_driver_sql(connection.get_execution_options().get("ledger_begin", "BEGIN"))

    return engine


def _pg_engine(url: URL) -> Engine:
    # TCP's own limits find a host that is gone, the statement's a server that hangs.
    defaults = {
        "application_name": "moonshard",
        "connect_timeout": _CONNECT_TIMEOUT_S,
        "keepalives_idle": 5,
        "keepalives_interval": 2,
        "keepalives_count": 3,
        "tcp_user_timeout": _STATEMENT_TIMEOUT_MS,
    }
    engine = sa.create_engine(
        url,
        pool_size=_POOL_SIZE,
        max_overflow=_POOL_OVERFLOW,
        pool_timeout=_POOL_TIMEOUT_S,
        pool_pre_ping=True,
        isolation_level="READ COMMITTED",
        connect_args={name: value for name, value in defaults.items() if name not in url.query},
    )

    @sa.event.listens_for(engine, "connect")
    def _configure(connection: Any, _record: object) -> None:
        # Not by the connection's `options`, which poolers such as PgBouncer refuse.
        connection.execute(f"SET statement_timeout = {_STATEMENT_TIMEOUT_MS}")
        connection.execute(f"SET idle_in_transaction_session_timeout = {_STATEMENT_TIMEOUT_MS}")
        connection.commit()

    return engine


def _version(connection: Connection) -> str | None:
    if not sa.inspect(connection).has_table(VERSION_TABLE):
        return None
    table = sa.table(VERSION_TABLE, sa.column("version_num", sa.String))
    return connection.execute(sa.select(table.c.version_num)).scalar()


def _is_outage(error: DBAPIError) -> bool:
    """Whether the database, and not what was asked of it, is at fault."""
    kinds = (sa.exc.OperationalError, sa.exc.InterfaceError, sa.exc.InternalError)
    return error.connection_invalidated or isinstance(error, kinds)


def _first_line(error: SQLAlchemyError) -> str:
    text = str(error.orig) if isinstance(error, DBAPIError) else str(error)
    return next(iter(text.strip().splitlines()), type(error).__name__)
