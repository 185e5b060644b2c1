"""What a shard counted outlives its process, and is found by its next life only."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from cluster.shard_counters import ShardCounters, abandoned, node_folder

LAYERS, EXPERTS = (3, 4), (1, 5, 6)
ROWS = np.array([1, 0, 2])


def create(
    folder: Path, shard_id: str = "shard-1", incarnation: str = "a", token: bytes = b"t"
) -> ShardCounters:
    return ShardCounters.create(folder, token, shard_id, incarnation, LAYERS, EXPERTS, 8)


def count(counters: ShardCounters) -> None:
    counters.add(1, rows=2, busy_ns=9, bytes_received=10, bytes_sent=20, rows_per_expert=ROWS)


@pytest.fixture(params=["file", "memory"])
def counters(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ShardCounters]:
    if request.param == "memory":
        yield ShardCounters.in_memory(LAYERS, EXPERTS)
    else:
        made = create(tmp_path)
        yield made
        made.remove()


def test_all_that_is_counted_can_be_read(counters: ShardCounters) -> None:
    for _ in range(3):
        count(counters)
    counters.add_error()
    figures = counters.figures()
    assert (figures.requests, figures.errors, figures.rows) == (3, 1, 6)
    assert (figures.busy_ns, figures.bytes_received, figures.bytes_sent) == (27, 30, 60)
    assert figures.expert_rows.tolist() == [[0, 0, 0], [3, 0, 6]]


def test_figures_are_a_copy(counters: ShardCounters) -> None:
    figures = counters.figures()
    count(counters)
    assert figures.expert_rows.sum() == 0


def test_the_next_life_finds_what_a_dead_one_left(tmp_path: Path) -> None:
    dead = create(tmp_path)
    dead.history = "f00d"
    count(dead)
    dead.release()
    (found,) = abandoned(tmp_path, b"t", "shard-1")
    assert (found.shard_id, found.incarnation, found.history) == ("shard-1", "a", "f00d")
    assert (found.layers, found.experts, found.num_experts) == (LAYERS, EXPERTS, 8)
    assert found.figures().expert_rows.tolist() == [[0, 0, 0], [1, 0, 2]]
    found.remove()
    assert list(tmp_path.iterdir()) == []


def test_what_a_living_one_counts_is_not_taken_from_it(tmp_path: Path) -> None:
    living = create(tmp_path)
    assert list(abandoned(tmp_path, b"t", "shard-1")) == []
    living.remove()


def test_other_shards_and_other_clusters_are_strangers(tmp_path: Path) -> None:
    for stranger in (create(tmp_path, "shard-12"), create(tmp_path, token=b"another")):
        stranger.release()
    assert list(abandoned(tmp_path, b"t", "shard-1")) == []
    assert len(list(tmp_path.iterdir())) == 2


def test_files_that_nobody_wants_any_more_go_after_an_hour(tmp_path: Path) -> None:
    old, used = create(tmp_path, token=b"another"), create(tmp_path, "shard-2")
    old.release()
    assert old.path is not None
    assert used.path is not None
    for path in (old.path, used.path):
        os.utime(path, (time.time() - 4000,) * 2)
    assert list(abandoned(tmp_path, b"t", "shard-1")) == []
    assert list(tmp_path.iterdir()) == [used.path]


def test_a_file_that_is_none_of_ours_is_left_alone(tmp_path: Path) -> None:
    dead = create(tmp_path)
    dead.release()
    assert dead.path is not None
    dead.path.write_bytes(b"\xff" * 300)
    assert list(abandoned(tmp_path, b"t", "shard-1")) == []


def test_a_full_disk_is_an_error_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", no_room)
    with pytest.raises(OSError, match="No space"):
        create(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_files_are_for_their_owner_only(tmp_path: Path) -> None:
    counters = create(tmp_path)
    assert counters.path is not None
    assert counters.path.stat().st_mode & 0o777 == 0o600
    counters.remove()


def test_the_folder_outlives_processes() -> None:
    assert node_folder().is_dir()
