"""Dense tensors come out as they were saved; experts are skipped, broken files refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from routing.vllm_plugin.dense_reader import dense_tensors, tensor_names
from routing.vllm_plugin.exceptions import UnsupportedModelError


def test_dense_tensors_are_read_and_experts_skipped(tmp_path: Path) -> None:
    saved = {
        "a": torch.randn(3, 5),
        "b.shared_experts.up_proj.weight": torch.randn(4, 2).bfloat16(),
        "c": torch.arange(6).view(2, 3),
        "d": torch.tensor(2.5, dtype=torch.float16),
        "e": torch.empty(0, 7),
        "f": torch.tensor([True, False]),
        "model.mlp.experts.0.up_proj.weight": torch.randn(2, 2),
    }
    file = tmp_path / "x.safetensors"
    save_file(saved, file, metadata={"format": "pt"})
    read = dict(dense_tensors([file]))
    assert sorted(tensor_names([file])) == sorted(saved)
    assert sorted(read) == sorted(name for name in saved if ".experts." not in name)
    for name, tensor in read.items():
        assert tensor.dtype == saved[name].dtype
        assert torch.equal(tensor, saved[name])


@pytest.mark.parametrize("size", [4, 40, 200])
def test_a_file_that_is_cut_short_is_refused(tmp_path: Path, size: int) -> None:
    file = tmp_path / "x.safetensors"
    save_file({"a": torch.randn(100)}, file)
    os.truncate(file, size)
    with pytest.raises(UnsupportedModelError, match=r"x\.safetensors is .*cut short"):
        list(dense_tensors([file]))
