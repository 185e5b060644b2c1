"""The state file is seen by another process at once, and by nobody else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from routing.engine_state import FIELDS, EngineState
from routing.exceptions import StateFileError


def test_what_one_handle_writes_another_reads(tmp_path: Path) -> None:
    created = EngineState.create(tmp_path / "state")
    opened = EngineState.open(tmp_path / "state")
    assert set(created.snapshot()) == set(FIELDS)
    assert not any(created.snapshot().values())
    opened.add("poison")
    opened.add("rows", 2**40)
    opened.set("waiting", 1)
    assert created.poison == 1
    assert created.get("rows") == 2**40
    assert created.is_waiting


def test_another_process_writes_into_the_same_fields(tmp_path: Path) -> None:
    state = EngineState.create(tmp_path / "state")
    code = (
        "import sys; from routing.engine_state import EngineState;"
        "s = EngineState.open(sys.argv[1]); s.add('poison', 3); s.close()"
    )
    subprocess.run([sys.executable, "-c", code, state.path], check=True, timeout=60)
    assert state.poison == 3


def test_the_file_belongs_to_its_owner_and_is_replaced_not_reused(tmp_path: Path) -> None:
    first = EngineState.create(tmp_path / "state")
    first.add("poison")
    second = EngineState.create(tmp_path / "state")
    assert second.poison == 0
    assert first.poison == 1
    assert second.path.stat().st_mode & 0o777 == 0o600


def test_files_that_are_no_state_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StateFileError, match="cannot open"):
        EngineState.open(tmp_path / "missing")
    (tmp_path / "short").write_bytes(b"x")
    with pytest.raises(StateFileError, match="not an engine-state file"):
        EngineState.open(tmp_path / "short")
    (tmp_path / "wrong").write_bytes(bytes(8 * (1 + len(FIELDS))))
    with pytest.raises(StateFileError, match="not an engine-state file"):
        EngineState.open(tmp_path / "wrong")


def test_closing_and_unlinking_twice_is_fine(tmp_path: Path) -> None:
    state = EngineState.create(tmp_path / "state")
    for _ in range(2):
        state.close()
        state.unlink()
    assert not state.path.exists()
