"""The outbox: every whole line once, in order, until it is acknowledged."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monitoring.usage import UsageRecord
from monitoring.write_ahead import Outbox
from tests.unit.monitoring.write_ahead.records import record

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 8)),
        st.tuples(st.just("ship"), st.integers(1, 12)),
    ),
    max_size=40,
)


def numbers(records: list[UsageRecord]) -> list[int]:
    return [int(one.request_id, 16) for one in records]


def pending_in_a_copy(outbox: Outbox) -> list[int]:
    """What another process finds if this one is killed now."""
    copy = outbox.path.with_name("copy")
    shutil.copy(outbox.path, copy)
    opened = Outbox.open(copy)
    found = numbers(opened.pending(10_000))
    assert opened.num_pending == len(found)
    opened.close(remove=True)
    return found


@settings(max_examples=30)
@given(steps=STEPS, compact_bytes=st.sampled_from([1, 2000, 2**30]))
def test_at_any_moment_the_file_holds_what_is_not_acknowledged(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int]], compact_bytes: int
) -> None:
    path = tmp_path_factory.mktemp("outbox") / "a.outbox"
    outbox = Outbox.create(path, compact_bytes)
    expected: list[int] = []
    number = 0
    for action, count in steps:
        if action == "append":
            for _ in range(count):
                number += 1
                outbox.append(record(number))
                expected.append(number)
        else:
            batch = outbox.pending(count)
            assert numbers(batch) == expected[:count]
            outbox.append(record(number := number + 1))  # while the batch is on its way
            expected.append(number)
            outbox.acknowledge(len(batch) // 2)
            outbox.acknowledge(len(batch) - len(batch) // 2)
            del expected[: len(batch)]
        assert outbox.num_pending == len(expected)
        assert pending_in_a_copy(outbox) == expected
        oldest = outbox.oldest()
        assert (numbers([oldest]) if oldest else []) == expected[:1]
    outbox.close(remove=False)


def test_records_come_back_as_they_were(tmp_path: Path) -> None:
    outbox = Outbox.create(tmp_path / "a.outbox")
    first = record(1, prompt_tokens=3, outcome="ok", team="ünï\ncode")
    outbox.append(first)
    assert outbox.pending(5) == [first]


def test_a_line_cut_anywhere_is_dropped_and_the_ones_before_stay(tmp_path: Path) -> None:
    outbox = Outbox.create(tmp_path / "a.outbox")
    outbox.append(record(1))
    whole = outbox.path.read_bytes()
    outbox.append(record(2))
    data = outbox.path.read_bytes()
    for end in range(len(whole), len(data)):
        torn = tmp_path / "torn"
        torn.write_bytes(data[:end])
        opened = Outbox.open(torn)
        assert numbers(opened.pending(10)) == [1]
        assert opened.num_pending == 1
        opened.acknowledge(1)
        assert opened.pending(10) == []
        opened.close(remove=True)


def test_a_file_killed_while_it_was_made_is_empty(tmp_path: Path) -> None:
    outbox = Outbox.create(tmp_path / "a.outbox")
    header = outbox.path.read_bytes()
    for end in range(len(header) + 1):
        path = tmp_path / "torn"
        path.write_bytes(header[:end])
        assert Outbox.open(path).pending(1) == []


def test_an_unreadable_line_is_passed_over_and_counted(tmp_path: Path) -> None:
    outbox = Outbox.create(tmp_path / "a.outbox")
    for number in (1, 2, 3, 4):
        outbox.append(record(number))
    lines = outbox.path.read_bytes().split(b"\n")
    lines[1] = b"\0" * len(lines[1])
    outbox.path.write_bytes(b"\n".join(lines))
    opened = Outbox.open(outbox.path)
    assert numbers(opened.pending(10)) == [1]
    opened.acknowledge(1)
    assert numbers(opened.pending(1)) == [3]
    opened.acknowledge(1)
    assert numbers(opened.pending(10)) == [4]
    opened.acknowledge(1)
    assert (opened.num_pending, opened.num_bad) == (0, 1)


def test_it_does_not_grow_while_records_come_and_go(tmp_path: Path) -> None:
    outbox = Outbox.create(tmp_path / "a.outbox", compact_bytes=4000)
    for number in range(500):
        outbox.append(record(number))
        if number >= 5:
            outbox.pending(1)
            outbox.acknowledge(1)
    assert outbox.path.stat().st_size < 10_000
    outbox.pending(5)
    outbox.acknowledge(5)
    assert outbox.path.stat().st_size < 100


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.outbox"
    path.write_bytes(b"not an outbox at all")
    with pytest.raises(ValueError, match="not an outbox"):
        Outbox.open(path)
