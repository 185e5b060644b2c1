"""Opening, migrating and losing the database."""

from __future__ import annotations

import stat
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

import monitoring.ledger
from monitoring.ledger import Ledger, LedgerError, LedgerUnavailable
from monitoring.ledger.schema import HEAD, VERSION_TABLE, metadata, usage
from tests.ledger.accounts import PRICES, ask, budget, key, record, tables
from tests.postgres import PostgresCluster

REPO_ROOT = Path(__file__).resolve().parents[2]

_OPEN = """
import sys
from monitoring.ledger import Ledger
from monitoring.prices import PriceTable
print("ready", flush=True)
sys.stdin.readline()
Ledger.open(sys.argv[1], PriceTable()).close()
"""


def test_the_migrations_make_the_tables_that_the_code_uses(ledger: Ledger, ledger_url: str) -> None:
    with tables(ledger_url) as connection:
        options = {"version_table": VERSION_TABLE, "compare_type": True}
        context = MigrationContext.configure(connection, opts=options)
        assert compare_metadata(context, metadata) == []
        assert context.get_current_revision() == HEAD
    scripts = ScriptDirectory(str(Path(monitoring.ledger.__file__).parent / "migrations"))
    assert scripts.get_heads() == [HEAD]


def test_opening_again_keeps_everything(ledger: Ledger, open_ledger: Callable[[], Ledger]) -> None:
    key(ledger)
    assert open_ledger().keys.list() == ledger.keys.list() != []


def test_several_processes_may_open_a_new_ledger_at_once(ledger_url: str) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _OPEN, ledger_url],
            cwd=REPO_ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    outcomes = [process.communicate("go\n", timeout=60) for process in processes]
    assert [(p.returncode, e) for p, (_, e) in zip(processes, outcomes, strict=True)] == [
        (0, "")
    ] * 4
    with tables(ledger_url) as connection:
        assert connection.execute(sa.text(f"SELECT count(*) FROM {VERSION_TABLE}")).scalar() == 1


def test_several_threads_may_open_a_new_ledger_at_once(
    ledger_url: str, open_ledger: Callable[[], Ledger]
) -> None:
    with ThreadPoolExecutor(8) as threads:
        opened = list(threads.map(lambda _: open_ledger(), range(8)))
    assert [it.keys.list() for it in opened] == [[]] * 8


def test_tables_of_a_newer_version_are_left_alone(ledger: Ledger, ledger_url: str) -> None:
    with tables(ledger_url) as connection:
        connection.exec_driver_sql(f"UPDATE {VERSION_TABLE} SET version_num = '9999'")
    with pytest.raises(LedgerError, match=r"version 9999.*newer Moonshard"):
        Ledger.open(ledger_url, PRICES)


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE usage SET cost_nano_usd = 0",
        "UPDATE usage SET cost_nano_usd = 0 WHERE request_id = 'kept'",
        "DELETE FROM usage",
    ],
)
def test_usage_cannot_be_changed_or_deleted(
    ledger: Ledger, ledger_url: str, statement: str
) -> None:
    sent = record(ask(key(ledger), "kept"))
    ledger.settle([sent])
    with (
        pytest.raises(sa.exc.DBAPIError, match="append-only"),
        tables(ledger_url) as connection,
    ):
        connection.exec_driver_sql(statement)
    with tables(ledger_url) as connection:
        assert connection.execute(sa.select(usage.c.prompt_tokens)).scalars().all() == [300]


def test_usage_cannot_be_truncated_on_postgresql(postgresql_url: str) -> None:
    Ledger.open(postgresql_url, PRICES).close()
    with (
        pytest.raises(sa.exc.DBAPIError, match="append-only"),
        tables(postgresql_url) as connection,
    ):
        connection.exec_driver_sql("TRUNCATE usage")


def test_usage_cannot_be_replaced_on_sqlite(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'ledger.db'}"
    ledger = Ledger.open(url, PRICES)
    ledger.settle([record(ask(key(ledger), "kept"))])
    ledger.close()
    with tables(url) as connection:
        values = dict(connection.execute(sa.select(usage)).mappings().one())
        names = ", ".join(values)
        marks = ", ".join("?" for _ in values)
        values["prompt_tokens"] = 1
        connection.exec_driver_sql(
            f"INSERT OR REPLACE INTO usage ({names}) VALUES ({marks})", tuple(values.values())
        )
        assert connection.execute(sa.select(usage.c.prompt_tokens)).scalars().all() == [300]


def test_the_sqlite_file_is_for_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "made" / "ledger.db"
    ledger = Ledger.open(f"sqlite:///{path}", PRICES)
    key(ledger)
    files = sorted(path.parent.iterdir())
    assert [file.name for file in files] == ["ledger.db", "ledger.db-shm", "ledger.db-wal"]
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    with tables(f"sqlite:///{path}") as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 1
    ledger.close()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("mysql://root:hunter2@host/db", r"cannot use mysql://; use sqlite:///"),
        ("postgresql+asyncpg://host/db", r"cannot use postgresql\+asyncpg://"),
        ("sqlite+aiosqlite:///x.db", r"cannot use sqlite\+aiosqlite://"),
        ("sqlite://", "must name a file"),
        ("sqlite:///:memory:", "must name a file"),
        ("sqlite:///file:x?mode=memory&uri=true", "must name a file"),
        ("hunter2", "is not one"),
        ("", "is not one"),
        ("sqlite:////proc/none/ledger.db", "cannot make the ledger's file /proc/none"),
        ("postgresql://u:hunter2@127.0.0.1:1/db", "127.0.0.1/db does not answer"),
    ],
)
def test_a_url_that_cannot_be_used_is_refused_in_one_line(url: str, message: str) -> None:
    with pytest.raises(LedgerError, match=message) as caught:
        Ledger.open(url, PRICES)
    assert "\n" not in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_a_user_without_rights_is_told_so(postgres_cluster: PostgresCluster) -> None:
    url = postgres_cluster.create_database()
    with tables(url) as connection:
        connection.exec_driver_sql("CREATE ROLE guest LOGIN")
    with pytest.raises(LedgerError, match=r"permission denied.*CREATE on its schema"):
        Ledger.open(url.replace("postgres@", "guest@"), PRICES)


def test_a_restarted_server_is_found_again(postgres_cluster: PostgresCluster) -> None:
    ledger = Ledger.open(postgres_cluster.create_database(), PRICES)
    principal = key(ledger, limits=budget(5))
    request = ask(principal)
    ledger.admit(request)
    postgres_cluster.stop()
    try:
        with pytest.raises(LedgerUnavailable, match="does not answer"):
            ledger.admit(ask(principal))
        with pytest.raises(LedgerUnavailable):
            ledger.settle([record(request)])
        with pytest.raises(LedgerUnavailable):
            ledger.keys.list()
    finally:
        postgres_cluster.start()
    assert len(ledger.settle([record(request)])) == 1
    ledger.admit(ask(principal))
    ledger.close()


def test_a_locked_sqlite_file_makes_the_ledger_unavailable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("monitoring.ledger.database._BUSY_TIMEOUT_MS", 50)
    url = f"sqlite:///{tmp_path / 'ledger.db'}"
    ledger = Ledger.open(url, PRICES)
    principal = key(ledger, limits=budget(5))
    with tables(url) as connection:
        connection.exec_driver_sql("DELETE FROM rate_buckets")
        with pytest.raises(LedgerUnavailable, match="locked"):
            ledger.admit(ask(principal))
        assert ledger.keys.list()  # readers are not kept waiting
    ledger.admit(ask(principal))
    ledger.close()
