"""What dead processes left goes to one living process, whole, and is removed when it is safe."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from monitoring.usage import UsageRecord
from monitoring.write_ahead import Outbox, SlotFile, UsageLog, orphans
from tests.unit.monitoring.write_ahead.records import record

REPO_ROOT = Path(__file__).resolve().parents[4]
SCAN = """
import sys
from pathlib import Path
from monitoring.write_ahead import orphans
for _ in range(50):
    for orphan in orphans(Path(sys.argv[1])):
        while records := orphan.pending(3):
            for one in records:
                print(int(one.request_id, 16), flush=True)
            orphan.acknowledge(len(records))
        orphan.remove()
"""


def numbers(records: list[UsageRecord]) -> list[int]:
    return [int(one.request_id, 16) for one in records]


def leave(folder: Path, first: int, *, finished: int, running: int) -> Path:
    """A log as a killed process leaves it; returns its file of slots."""
    others = set(folder.glob("*.slots"))
    log = UsageLog.create(folder, "dead")
    for number in range(first, first + finished):
        slot = log.open_slot(record(number))
        slot.set(prompt=1, cached=0, completion=number, reasoning=0)
        log.finish(slot, "ok")
    for number in range(first + finished, first + finished + running):
        log.open_slot(record(number)).set(prompt=1, cached=0, completion=number, reasoning=0)
    log.close()  # gives the lock up, as the end of a process does; nothing else is changed
    (slots,) = set(folder.glob("*.slots")) - others
    return slots


def deliver(folder: Path) -> list[UsageRecord]:
    delivered: list[UsageRecord] = []
    for orphan in orphans(folder):
        while batch := orphan.pending(2):
            delivered += batch
            orphan.acknowledge(len(batch))
        assert orphan.num_pending == 0
        orphan.remove()
    return delivered


def test_finished_and_running_requests_are_delivered_and_the_files_removed(tmp_path: Path) -> None:
    leave(tmp_path, 1, finished=5, running=3)
    delivered = deliver(tmp_path)
    assert numbers(delivered) == list(range(1, 9))
    assert [one.completion_tokens for one in delivered] == list(range(1, 9))
    assert [one.outcome for one in delivered] == ["ok"] * 5 + ["replica_lost"] * 3
    assert not list(tmp_path.iterdir())


def test_files_of_a_living_process_are_let_alone(tmp_path: Path) -> None:
    log = UsageLog.create(tmp_path, "alive")
    log.open_slot(record(1))
    assert orphans(tmp_path) == []
    log.close()
    assert numbers(deliver(tmp_path)) == [1]


def test_an_orphan_that_is_held_is_not_found_again_until_it_is_released(tmp_path: Path) -> None:
    leave(tmp_path, 1, finished=2, running=0)
    (held,) = orphans(tmp_path)
    assert orphans(tmp_path) == []
    held.pending(1)
    held.acknowledge(1)
    held.release()
    assert numbers(deliver(tmp_path)) == [2], "what was acknowledged is not sent again"


def test_several_processes_share_what_is_left_without_overlap(tmp_path: Path) -> None:
    for index in range(12):
        leave(tmp_path, index * 10, finished=4, running=4)
    environment = os.environ | {"PYTHONPATH": str(REPO_ROOT)}
    command = [sys.executable, "-c", SCAN, str(tmp_path)]
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(3)
    ]
    told = [line for process in processes for line in process.communicate()[0].split()]
    assert sorted(map(int, told)) == sorted(
        index * 10 + number for index in range(12) for number in range(8)
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stage", ["finished", "appended", "freed"])
def test_a_crash_while_a_request_finishes_leaves_its_record(tmp_path: Path, stage: str) -> None:
    """Between final counts, outbox and freed slot: one or two records, with the same counts."""
    log = UsageLog.create(tmp_path / "live", "r")
    slot = log.open_slot(record(1))
    slot.set(prompt=5, cached=2, completion=4, reasoning=1)
    slot.finish("client_closed")
    (slots,) = (tmp_path / "live").glob("*.slots")
    outbox = slots.with_suffix(".outbox")
    before = outbox.read_bytes()
    with_slot = slots.read_bytes()
    log.finish(slot, "client_closed")
    dead = tmp_path / "dead"
    dead.mkdir()
    shutil.copy(slots, dead)
    shutil.copy(outbox, dead)
    if stage == "finished":
        (dead / outbox.name).write_bytes(before)
    if stage != "freed":
        (dead / slots.name).write_bytes(with_slot)
    delivered = deliver(dead)
    assert len(delivered) == (2 if stage == "appended" else 1)
    for one in delivered:
        assert (one.outcome, one.prompt_tokens, one.completion_tokens) == ("client_closed", 5, 4)
        assert (one.cached_tokens, one.reasoning_tokens) == (2, 1)


def test_a_process_killed_before_it_took_a_request_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.slots").touch()
    (tmp_path / "b.slots").write_bytes(bytes(4096))
    assert deliver(tmp_path) == []
    assert not list(tmp_path.iterdir())


def test_damaged_files_are_put_aside_with_one_line_each(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    slots = leave(tmp_path, 1, finished=2, running=1)
    slots.write_bytes(b"\x07" * 4096)
    other = leave(tmp_path, 5, finished=1, running=1)
    other.with_suffix(".outbox").write_bytes(b"\x07" * 100)
    assert sorted(numbers(deliver(tmp_path))) == [1, 2, 6], "what can be read is delivered"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [f"{slots.name}.corrupt", f"{other.with_suffix('.outbox').name}.corrupt"]
    )
    assert len(caplog.records) == 2
    assert deliver(tmp_path) == []


def test_unreadable_lines_put_the_outbox_aside_when_the_rest_is_delivered(tmp_path: Path) -> None:
    slots = leave(tmp_path, 1, finished=3, running=0)
    outbox = slots.with_suffix(".outbox")
    outbox.write_bytes(outbox.read_bytes().replace(b'{"request_id"', b'["request_id"', 1))
    assert numbers(deliver(tmp_path)) == [2, 3]
    assert [path.name for path in tmp_path.iterdir()] == [f"{outbox.name}.corrupt"]


def test_a_log_that_ends_with_everything_acknowledged_leaves_no_file(tmp_path: Path) -> None:
    log = UsageLog.create(tmp_path, "r/1 #2")
    log.finish(log.open_slot(record(1)), "ok")
    log.acknowledge(len(log.pending(10)))
    log.flush()
    log.close()
    assert not list(tmp_path.iterdir())


def test_a_full_disk_keeps_records_in_their_slots_until_there_is_room(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class FullOutbox(Outbox):
        is_full = True

        def append(self, record: UsageRecord) -> None:
            if self.is_full:
                raise OSError(errno.ENOSPC, "No space left on device")
            super().append(record)

    source = UsageLog.create(tmp_path, "r")
    FullOutbox.create(tmp_path / "full.outbox").close(remove=False)
    outbox = FullOutbox(tmp_path / "full.outbox")
    log = UsageLog(source._slots, outbox)
    for number in (1, 2):
        log.finish(log.open_slot(record(number)), "ok")
    assert (log.num_pending, log.num_open, log.pending(5)) == (2, 2, [])
    outbox.is_full = False
    log.retry()
    assert (log.num_pending, log.num_open, numbers(log.pending(5))) == (2, 0, [1, 2])
    assert "cannot write" in caplog.text


@pytest.mark.parametrize("broken", ["slots", "outbox"])
def test_a_flush_that_fails_is_tried_again_and_keeps_nothing_else_from_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    flushed: list[str] = []

    def flush(name: str) -> None:
        flushed.append(name)
        if name == broken:
            raise OSError(errno.EIO, "Input/output error")

    log = UsageLog.create(tmp_path, "r")
    log.finish(log.open_slot(record(1)), "ok")
    with monkeypatch.context() as patch:
        patch.setattr(SlotFile, "flush", lambda _: flush("slots"))
        patch.setattr(Outbox, "flush", lambda _: flush("outbox"))
        for _ in range(2):
            with pytest.raises(OSError, match="Input/output"):
                log.flush()
        assert flushed == ["slots", "outbox"] * 2
        broken = ""
        log.flush()
        log.flush()
        assert flushed == ["slots", "outbox"] * 3, "there is nothing to flush"
    log.close()


@pytest.mark.parametrize("broken", [".slots", ".outbox"])
def test_files_that_cannot_be_removed_are_not_kept_from_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    leave(tmp_path, 1, finished=1, running=0)
    unlink = Path.unlink

    def fail(path: Path, *, missing_ok: bool = False) -> None:
        if path.suffix == broken:
            raise OSError(errno.EIO, "Input/output error")
        unlink(path, missing_ok=missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", fail)
        with pytest.raises(OSError, match="Input/output"):
            deliver(tmp_path)
    assert deliver(tmp_path) == []
    assert not list(tmp_path.iterdir())


def test_a_scan_that_fails_gives_back_what_it_has_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave(tmp_path, 1, finished=1, running=0)
    leave(tmp_path, 2, finished=1, running=0)
    num_opened = 0
    open_outbox = Outbox.open

    def fail(path: Path) -> Outbox:
        nonlocal num_opened
        num_opened += 1
        if num_opened == 2:
            raise MemoryError
        return open_outbox(path)

    with monkeypatch.context() as patch:
        patch.setattr(Outbox, "open", fail)
        with pytest.raises(MemoryError):
            orphans(tmp_path)
    assert sorted(numbers(deliver(tmp_path))) == [1, 2]


def test_a_process_killed_while_it_made_its_outbox_shorter_leaves_no_file(tmp_path: Path) -> None:
    slots = leave(tmp_path, 1, finished=2, running=0)
    slots.with_suffix(".outbox.new").write_bytes(b"half of it")
    assert numbers(deliver(tmp_path)) == [1, 2]
    assert not list(tmp_path.iterdir())
