"""The shipper: every record reaches the ledger, however often that takes."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from deployments.accounting import OrphanShipper, Shipper, orphan_shipper
from monitoring.usage import UsageRecord
from monitoring.write_ahead import Orphan, UsageLog, orphans
from tests.unit.deployments.accounting.clock import Clock

DEADLINE_S = 10.0


class Ledger:
    """Takes records, unless it is told to fail; idempotent like the real one.

    Attributes:
        has: request ids, each once.
        batches: sizes of what was sent.
        failures: what the next sends do instead.
    """

    def __init__(self) -> None:
        self.has: list[str] = []
        self.batches: list[int] = []
        self.failures: list[Exception] = []
        self.takes_but_says_no = 0
        self.is_down = False

    async def send(self, records: list[UsageRecord]) -> None:
        self.batches.append(len(records))
        await asyncio.sleep(0)
        if self.is_down:
            raise ConnectionError("down")
        if self.failures:
            raise self.failures.pop(0)
        self.has += [one.request_id for one in records if one.request_id not in self.has]
        if self.takes_but_says_no:
            self.takes_but_says_no -= 1
            raise TimeoutError


def make_record(number: int, finished_s: float = 0.0) -> UsageRecord:
    return UsageRecord(
        f"{number:032x}", "k", "t", "m", "chat", finished_s, finished_s, "replica_lost"
    )


def leave(folder: Path, *numbers: int) -> None:
    """A log as a killed process leaves it."""
    dead = UsageLog.create(folder, "dead")
    for number in numbers:
        dead.finish(dead.open_slot(make_record(number)), "ok")
    dead.close()


class Set:
    """A shipper with its log, ledger and clock."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = UsageLog.create(folder, "r")
        self.ledger = Ledger()
        self.clock = Clock()
        self.shipper = Shipper(
            self.log,
            folder,
            self.ledger.send,
            sleep=self.clock.sleep,
            monotonic=self.clock,
            wall_clock=self.clock,
        )

    def finish(self, *numbers: int) -> None:
        for number in numbers:
            self.log.finish(self.log.open_slot(make_record(number)), "ok")
        self.shipper.wake()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not condition():  # noqa: ASYNC110 - what is awaited has no event
                await asyncio.sleep(0.001)


@pytest.fixture
async def ship(tmp_path: Path) -> AsyncIterator[Set]:
    made = Set(tmp_path / "write-ahead")
    yield made
    await made.shipper.close()


def ids(*numbers: int) -> list[str]:
    return [f"{number:032x}" for number in numbers]


async def test_a_record_is_sent_as_soon_as_it_is_there(ship: Set) -> None:
    ship.shipper.start()
    ship.finish(1)
    await ship.until(lambda: ship.ledger.has == ids(1))
    await ship.until(lambda: ship.shipper.backlog() == (0, 0.0))


async def test_records_that_come_while_one_is_sent_go_together(ship: Set) -> None:
    ship.finish(1)
    ship.shipper.start()
    await ship.until(lambda: len(ship.ledger.has) == 1)
    for number in range(2, 30):
        ship.finish(number)
        await asyncio.sleep(0)
    await ship.until(lambda: len(ship.ledger.has) == 29)
    assert len(ship.ledger.batches) < 15


async def test_batches_are_bounded(ship: Set) -> None:
    ship.finish(*range(1200))
    await ship.shipper.drain(DEADLINE_S)
    assert ship.ledger.batches == [500, 500, 200]
    assert ship.ledger.has == ids(*range(1200))


async def test_failures_pause_longer_and_longer_up_to_a_limit(
    ship: Set, caplog: pytest.LogCaptureFixture
) -> None:
    ship.ledger.failures = [ConnectionError("down") for _ in range(9)]
    ship.finish(1)
    ship.shipper.start()
    await ship.until(lambda: ship.ledger.has == ids(1))
    pauses = [pause for pause in ship.clock.slept if pause not in (orphan_shipper._LINGER_S, 1.0)]
    assert pauses[:9] == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0, 5.0]
    warnings = [one for one in caplog.records if one.levelname == "WARNING"]
    assert len(warnings) == 1, "each failure says so"


async def test_what_the_ledger_took_but_did_not_confirm_is_sent_again(ship: Set) -> None:
    ship.ledger.takes_but_says_no = 2
    ship.finish(1, 2, 3)
    await ship.shipper.drain(DEADLINE_S)
    assert ship.ledger.has == ids(1, 2, 3)
    assert ship.ledger.batches == [3, 3, 3]
    assert ship.shipper.backlog() == (0, 0.0)


async def test_the_backlog_tells_how_many_and_how_old(ship: Set) -> None:
    ship.ledger.is_down = True
    ship.finish(1, 2)
    oldest_s = ship.log.pending(1)[0].finished_s
    ship.shipper.start()
    await ship.until(lambda: ship.shipper.backlog()[0] == 2)
    ship.clock.now_s = oldest_s + 7.5
    num_records, age_s = ship.shipper.backlog()
    assert (num_records, round(age_s, 3)) == (2, 7.5)


async def test_asking_for_the_backlog_reads_nothing(
    ship: Set, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread may ask while a file is written or closed."""
    ship.ledger.is_down = True
    ship.finish(1, 2)
    await ship.shipper.drain(0.05)
    monkeypatch.delattr(UsageLog, "oldest")
    monkeypatch.delattr(UsageLog, "num_pending")
    assert ship.shipper.backlog()[0] == 2


async def test_asking_for_the_backlog_does_not_disturb_a_send(ship: Set) -> None:
    async def send(records: list[UsageRecord]) -> None:
        ship.shipper.backlog()
        await ship.ledger.send(records)

    ship.shipper._send = send
    ship.finish(*range(20))
    await ship.shipper.drain(DEADLINE_S)
    assert ship.ledger.has == ids(*range(20))


async def test_what_dead_replicas_left_is_shipped_and_removed(ship: Set) -> None:
    for first in (100, 200):
        dead = UsageLog.create(ship.folder, "dead")
        dead.finish(dead.open_slot(make_record(first)), "ok")
        dead.open_slot(make_record(first + 1))
        dead.close()
    ship.ledger.failures = [ConnectionError("down")]
    ship.shipper.start()
    await ship.until(lambda: sorted(ship.ledger.has) == ids(100, 101, 200, 201))
    await ship.until(lambda: not list(ship.folder.glob("dead*")))


async def test_a_busy_log_does_not_keep_orphans_waiting(ship: Set) -> None:
    leave(ship.folder, 7001)
    leave(ship.folder, 7002)
    number = 0

    async def send(records: list[UsageRecord]) -> None:
        nonlocal number
        number += 1
        if number < 100:
            ship.finish(number)  # another one waits before this one is acknowledged
        await ship.ledger.send(records)

    ship.shipper._send = send
    ship.finish(0)
    ship.shipper.start()
    await ship.until(lambda: set(ids(7001, 7002)) <= set(ship.ledger.has))
    assert number < 20
    await ship.until(lambda: not list(ship.folder.glob("dead*")))


async def test_orphans_are_delivered_after_the_log_could_not_be_read(
    ship: Set, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave(ship.folder, 7001)
    ship.finish(1)

    def pending(_: UsageLog, limit: int) -> list[UsageRecord]:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(UsageLog, "pending", pending)
        ship.shipper.start()
        await ship.until(lambda: ship.ledger.has == ids(7001))
    await ship.until(lambda: sorted(ship.ledger.has) == ids(1, 7001))


async def test_what_was_scanned_before_an_error_is_delivered_without_a_new_record(
    ship: Set, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error takes the one signal that there was."""
    leave(ship.folder, 7001)
    is_broken = True

    def next_batch() -> tuple[Orphan, list[UsageRecord]] | None:
        nonlocal is_broken
        if is_broken:
            is_broken = False
            raise OSError(5, "Input/output error")
        return original()

    original = ship.shipper._next_batch
    monkeypatch.setattr(ship.shipper, "_next_batch", next_batch)
    ship.shipper.start()
    await ship.until(lambda: ship.ledger.has == ids(7001))


@pytest.mark.parametrize("method", ["pending", "acknowledge", "remove"])
async def test_an_orphan_with_a_broken_disk_is_left_to_a_later_scan(
    ship: Set, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    leave(ship.folder, 7001)
    original = getattr(Orphan, method)
    num_failures = 2

    def fail(orphan: Orphan, *args: int) -> object:
        nonlocal num_failures
        if num_failures:
            num_failures -= 1
            raise OSError(5, "Input/output error")
        return original(orphan, *args)

    monkeypatch.setattr(Orphan, method, fail)
    ship.shipper.start()
    ship.finish(1, 2)
    await ship.until(lambda: sorted(ship.ledger.has) == ids(1, 2, 7001))
    await ship.until(lambda: not list(ship.folder.glob("dead*")))
    assert num_failures == 0


async def test_what_a_cancelled_scan_finds_is_given_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave(tmp_path, 7001)
    may_end = threading.Event()

    def slow(folder: Path) -> list[Orphan]:
        found = orphans(folder)
        may_end.wait(DEADLINE_S)
        return found

    monkeypatch.setattr(orphan_shipper, "orphans", slow)
    ship = Set(tmp_path)
    ship.shipper.start()
    await asyncio.sleep(0.05)
    asyncio.get_running_loop().call_later(0.05, may_end.set)
    await ship.shipper.close()
    assert [one.num_pending for one in orphans(tmp_path)] == [1]


async def test_orphans_are_shipped_without_a_log_of_ones_own(tmp_path: Path) -> None:
    folder = tmp_path / "not-there-yet"
    ledger, clock = Ledger(), Clock()
    shipper = OrphanShipper(
        folder, ledger.send, sleep=clock.sleep, monotonic=clock, wall_clock=clock
    )
    shipper.start()
    await asyncio.sleep(0.01)
    assert shipper.backlog() == (0, 0.0)
    ledger.is_down = True
    leave(folder, 1, 2)
    async with asyncio.timeout(DEADLINE_S):
        while shipper.backlog()[0] != 2:  # noqa: ASYNC110 - what is awaited has no event
            await asyncio.sleep(0.001)
        ledger.is_down = False
        while shipper.backlog()[0] or os.listdir(folder):  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    assert ledger.has == ids(1, 2)
    ledger.is_down = True
    leave(folder, 3)
    await shipper.drain(0.05)
    await shipper.close()
    assert [one.num_pending for one in orphans(folder)] == [1], "what is left is not given back"


async def test_replicas_that_die_later_are_found(ship: Set) -> None:
    ship.shipper.start()
    await asyncio.sleep(0.01)
    dead = UsageLog.create(ship.folder, "dead")
    dead.open_slot(make_record(7))
    dead.close()
    await ship.until(lambda: ship.ledger.has == ids(7))


async def test_draining_ships_everything_and_closing_leaves_no_file(tmp_path: Path) -> None:
    ship = Set(tmp_path)
    ship.ledger.failures = [ConnectionError("down")] * 3
    ship.shipper.start()
    ship.finish(*range(700))
    await ship.shipper.drain(DEADLINE_S)
    await ship.shipper.close()
    assert ship.ledger.has == ids(*range(700))
    assert not os.listdir(tmp_path)


async def test_what_cannot_be_shipped_in_time_is_left_for_the_next_replica(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = Set(tmp_path)
    first.ledger.is_down = True
    first.shipper.start()
    first.finish(1, 2)
    await first.shipper.drain(0.05)
    await first.shipper.close()
    assert "2 usage records wait" in caplog.text
    assert max(first.clock.slept) <= 1.0, "a replica that ends pauses too long"
    second = Set(tmp_path)
    second.shipper.start()
    await second.until(lambda: second.ledger.has == ids(1, 2))
    await second.shipper.close()
    assert not os.listdir(tmp_path)
