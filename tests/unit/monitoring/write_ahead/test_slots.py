"""Counts in slots: what was stored is read back whatever happens to the process."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from monitoring.usage import TokenCount, UsageRecord
from monitoring.write_ahead import Slot, SlotFile, file_lock, orphans, read_slots
from monitoring.write_ahead.file_lock import FileLock
from tests.unit.monitoring.write_ahead.records import record

REPO_ROOT = Path(__file__).resolve().parents[4]
WRITER = Path(__file__).with_name("writer.py")
COUNTS = st.integers(0, 2**40)
KILLED_AFTER_LINES = (1, 60, 400, 2500)


@pytest.fixture
def slots(tmp_path: Path) -> SlotFile:
    return SlotFile.create(tmp_path / "a.slots")


def set_counts(slot: Slot, count: TokenCount) -> None:
    slot.set(**dataclasses.asdict(count))


def counts_of(found: UsageRecord) -> TokenCount:
    return TokenCount(
        found.prompt_tokens, found.cached_tokens, found.completion_tokens, found.reasoning_tokens
    )


def read(slots: SlotFile) -> dict[int, UsageRecord]:
    records, num_bad = read_slots(slots.path.read_bytes())
    assert not num_bad
    return {int(found.request_id, 16): found for found in records}


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(["open", "set", "finish", "free"]),
            st.integers(0, 200),
            st.tuples(COUNTS, COUNTS, COUNTS, COUNTS),
        ),
        max_size=120,
    )
)
def test_a_reader_sees_what_was_stored_last_at_any_moment(
    tmp_path_factory: pytest.TempPathFactory,
    steps: list[tuple[str, int, tuple[int, int, int, int]]],
) -> None:
    slots = SlotFile.create(tmp_path_factory.mktemp("slots") / "a.slots")
    opened: dict[int, Slot] = {}
    expected: dict[int, tuple[TokenCount, str]] = {}
    for action, number, counts in steps:
        slot = opened.get(number)
        if action == "open" and slot is None:
            opened[number] = slots.open_slot(record(number))
            expected[number] = (TokenCount(), "replica_lost")
        elif action == "set" and slot is not None and expected[number][1] == "replica_lost":
            set_counts(slot, TokenCount(*counts))
            expected[number] = (TokenCount(*counts), "replica_lost")
        elif action == "finish" and slot is not None:
            slot.finish("client_closed")
            expected[number] = (expected[number][0], "client_closed")
        elif action == "free" and slot is not None:
            slots.free(opened.pop(number))
            del expected[number]
        found = read(slots)
        assert {key: (counts_of(one), one.outcome) for key, one in found.items()} == expected
        assert slots.num_open == len(expected)
    slots.close(remove=True)


def test_a_record_names_who_asked_and_carries_all_that_was_counted(slots: SlotFile) -> None:
    slot = slots.open_slot(record(5))
    slot.set(prompt=10, cached=4, completion=7, reasoning=2)
    slot.set_cost(prompt_ns=2**50, generation_ns=3, cost_nano_usd=4)
    slot.finish("error")
    (found,) = read(slots).values()
    assert found == slot.record()
    assert found == record(
        5,
        finished_s=found.finished_s,
        outcome="error",
        prompt_tokens=10,
        cached_tokens=4,
        completion_tokens=7,
        reasoning_tokens=2,
        expert_prompt_ns=2**50,
        expert_generation_ns=3,
        expert_cost_nano_usd=4,
    )


def test_it_grows_while_slots_are_in_use(slots: SlotFile) -> None:
    opened = [slots.open_slot(record(number)) for number in range(1000)]
    for number, slot in enumerate(opened):
        slot.set(prompt=number, cached=0, completion=number + 1, reasoning=0)
    found = read(slots)
    assert {key: one.completion_tokens for key, one in found.items()} == {
        number: number + 1 for number in range(1000)
    }
    size = slots.path.stat().st_size
    for slot in opened:
        slots.free(slot)
    for number in range(1000):
        slots.open_slot(record(number))
    assert slots.path.stat().st_size == size, "free slots are not used again"


def test_a_slot_that_is_used_again_has_nothing_of_the_one_before(slots: SlotFile) -> None:
    slot = slots.open_slot(record(1, team="a rather long name of a team"))
    slot.set(prompt=9, cached=9, completion=9, reasoning=9)
    slot.set_cost(prompt_ns=9, generation_ns=9, cost_nano_usd=9)
    slot.finish("timeout")
    slots.free(slot)
    assert slots.open_slot(record(2, team="b")).index == slot.index
    (found,) = read(slots).values()
    assert found == record(2, team="b", finished_s=found.finished_s)


def test_who_asks_may_not_be_longer_than_a_slot(slots: SlotFile) -> None:
    slots.open_slot(record(1, team="t" * 1400))
    with pytest.raises(ValueError, match="too long"):
        slots.open_slot(record(2, team="t" * 2000))
    assert slots.num_open == 1


def test_the_file_takes_its_place_on_the_disk_and_only_its_owner_reads_it(slots: SlotFile) -> None:
    status = slots.path.stat()
    assert status.st_blocks * 512 >= status.st_size, "a hole: a store may be a SIGBUS"
    assert status.st_mode & 0o777 == 0o600


def test_a_file_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="not a file of slots"):
        read_slots(b"x" * 4096)


def test_a_damaged_slot_costs_that_slot_only(slots: SlotFile) -> None:
    damaged = slots.open_slot(record(1))
    slots.open_slot(record(2)).set(prompt=1, cached=0, completion=1, reasoning=0)
    data = bytearray(slots.path.read_bytes())
    start = damaged.index * 2048 + 128
    data[start : start + 20] = b"\0" * 20
    records, num_bad = read_slots(bytes(data))
    assert [int(found.request_id, 16) for found in records] == [2]
    assert num_bad == 1


def test_a_lock_ends_with_its_process_even_if_a_child_lives_on(tmp_path: Path) -> None:
    path = tmp_path / "file"
    is_ready, say_ready = os.pipe()
    may_end, say_end = os.pipe()
    parent = os.fork()
    if parent == 0:  # dies at once; its own child does not
        lock = FileLock.create(path)
        if os.fork() == 0:
            os.write(say_ready, b"x")
            os.read(may_end, 1)
        os._exit(0 if lock else 1)
    os.waitpid(parent, 0)
    os.read(is_ready, 1)
    taken = FileLock.take(path)
    os.write(say_end, b"x")
    assert taken is not None
    for descriptor in (is_ready, say_ready, may_end, say_end):
        os.close(descriptor)


def test_a_file_that_was_removed_between_opening_and_locking_is_not_taken(tmp_path: Path) -> None:
    path = tmp_path / "file"
    lock = FileLock.create(path)
    descriptor = os.open(path, os.O_RDWR)
    path.unlink()
    lock.release()
    assert not file_lock._lock(descriptor)
    os.close(descriptor)
    assert FileLock.take(path) is None


@pytest.mark.parametrize("num_lines", KILLED_AFTER_LINES)
def test_kill_9_loses_nothing_that_was_stored(tmp_path: Path, num_lines: int) -> None:
    """The writer tells each change after it has made it; at most the last one is untold."""
    command = [sys.executable, str(WRITER), str(tmp_path), str(num_lines)]
    environment = os.environ | {"PYTHONPATH": str(REPO_ROOT)}
    stored: dict[int, TokenCount] = {}
    done: set[int] = set()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        for _ in range(num_lines):
            take(process.stdout.readline(), stored, done)
        process.kill()
        for line in process.stdout.read().splitlines(keepends=True):
            if line.endswith("\n"):
                take(line, stored, done)
    (orphan,) = orphans(tmp_path)
    found: dict[int, UsageRecord] = {}
    while batch := orphan.pending(100):
        for one in batch:
            assert found.setdefault(int(one.request_id, 16), one) == one, "told twice, differently"
        orphan.acknowledge(len(batch))
    assert done <= {number for number, one in found.items() if one.outcome == "ok"}
    assert stored.keys() <= found.keys()
    untold = [number for number, one in found.items() if differs(one, stored.get(number))]
    assert len(untold) <= 1
    for number in untold:
        told = stored.get(number, TokenCount()).completion
        assert told <= found[number].completion_tokens <= told + 1
        assert found[number].reasoning_tokens <= found[number].completion_tokens
    orphan.remove()
    assert not list(tmp_path.iterdir())


def take(line: str, stored: dict[int, TokenCount], done: set[int]) -> None:
    what, number, *counts = line.split()
    if what == "done":
        done.add(int(number))
    else:
        stored[int(number)] = TokenCount(*map(int, counts))


def differs(found: UsageRecord, told: TokenCount | None) -> bool:
    return told is None or counts_of(found) != told
