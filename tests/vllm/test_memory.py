"""The engine holds no experts: neither in memory nor by way of its reads."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import deepseek_v3_config, expert_bytes, write_checkpoint
from tests.vllm import inspection
from tests.vllm.harness import Shards, running_engine

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

LIMIT = 0.02


def config(num_experts: int) -> dict[str, Any]:
    return deepseek_v3_config(
        hidden_size=1024,
        moe_intermediate_size=1024,
        num_hidden_layers=7,
        n_routed_experts=num_experts,
    )


LARGE = config(num_experts=128)
SMALL = config(num_experts=4)


def memory_of_serving(folder: Path, model: dict[str, Any]) -> dict[str, int]:
    """Write a checkpoint, serve it from shards, and look into the engine's worker."""
    from vllm import SamplingParams

    checkpoint = write_checkpoint(folder / "model", model, num_files=8)
    shards = Shards(checkpoint, folder)
    try:
        shards.start()
        for file in checkpoint.glob("*.safetensors"):
            _drop_from_page_cache(file)
        with running_engine(checkpoint, shards.settings(), enforce_eager=True) as engine:
            sampling = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
            engine.generate([{"prompt_token_ids": [5, 6, 7]}], sampling, use_tqdm=False)
            (memory,) = engine.collective_rpc(inspection.memory_of)
        assert shards.state.poison == 0
    finally:
        shards.close()
        for file in checkpoint.glob("*.safetensors"):
            file.unlink()
    return dict(memory)


def _drop_from_page_cache(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


@pytest.mark.timeout(400)
def test_the_worker_reads_and_holds_less_than_two_percent_of_the_experts(tmp_path: Path) -> None:
    size = expert_bytes(LARGE)
    assert size >= 4e9
    # The small one first: on a fresh machine it is who reads the libraries from the disk.
    small = memory_of_serving(tmp_path / "small", SMALL)
    large = memory_of_serving(tmp_path / "large", LARGE)
    assert large["mapped_checkpoint"] < LIMIT * size
    assert large["read_bytes"] < LIMIT * size
    assert large["peak_resident"] - small["peak_resident"] < LIMIT * size
    assert large["rchar"] - small["rchar"] < LIMIT * size
