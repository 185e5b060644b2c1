"""Engines and shards that the tests of one module share: a start compiles, which takes long."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.checkpoints import qwen3_moe_config, write_checkpoint
from tests.vllm.harness import Shards, running_engine

if TYPE_CHECKING:
    from vllm import LLM

NANO = Path(__file__).resolve().parents[2] / "models" / "kimi-nano"


@pytest.fixture(scope="session")
def nano() -> Path:
    """The shipped checkpoint."""
    return NANO


@pytest.fixture(scope="session")
def nano_shards(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shards]:
    """Two shard processes with the nano model's experts, published to their feed."""
    shards = Shards(NANO, tmp_path_factory.mktemp("nano-shards"))
    shards.start()
    yield shards
    shards.close()


@pytest.fixture(scope="session")
def remote_nano(nano_shards: Shards) -> Iterator[LLM]:
    """The nano model with remote experts, in vLLM's default compile mode."""
    settings = nano_shards.settings()
    with running_engine(NANO, settings) as engine:
        yield engine


@pytest.fixture(scope="session")
def native_nano() -> Iterator[LLM]:
    """The nano model as vLLM runs it alone, in the same environment and compile mode."""
    with running_engine(NANO) as engine:
        yield engine


@pytest.fixture(scope="session")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3-MoE checkpoint."""
    return write_checkpoint(tmp_path_factory.mktemp("qwen"), qwen3_moe_config())


@pytest.fixture(scope="session")
def qwen_shards(qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shards]:
    """Two shard processes with the Qwen model's experts."""
    shards = Shards(qwen, tmp_path_factory.mktemp("qwen-shards"))
    shards.start()
    yield shards
    shards.close()


@pytest.fixture(scope="session")
def remote_qwen(qwen: Path, qwen_shards: Shards) -> Iterator[LLM]:
    """The Qwen model with remote experts; gives up on lost ones soon."""
    settings = qwen_shards.settings(recovery_timeout_s=4.0, request_timeout_s=20.0)
    with running_engine(qwen, settings) as engine:
        yield engine
