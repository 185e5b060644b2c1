"""Every expert kernel computes what float32 torch computes, for all types and activations."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from cluster.exceptions import ShardStartError
from cluster.kernels import ExpertKernel, build_kernel
from cluster.kernels.vllm_op import VllmKernel, load_ops
from tests.unit.shards import dense_reference, random_experts, random_routing, relative_error

EXPERTS = (3, 9, 4, 7, 12)
BOUNDS = {torch.bfloat16: 6e-3, torch.float16: 1e-3, torch.float32: 1e-5}
needs_vllm_op = pytest.mark.skipif(load_ops() is not None, reason=str(load_ops()))
KERNELS = [pytest.param("vllm", marks=needs_vllm_op), "torch"]


def _routing(num_rows: int, topk: int, skipped: float) -> tuple[torch.Tensor, ...]:
    x, ids, weights = random_routing(num_rows, len(EXPERTS), topk, seed=num_rows)
    is_skipped = torch.rand(ids.shape, generator=torch.Generator().manual_seed(1)) < skipped
    return x, torch.where(is_skipped, -1, ids), weights


def _run(
    kernel: ExpertKernel, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    return kernel(1, x, ids.numpy(), weights.numpy())


def _expected(
    x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, activation: str, dtype: torch.dtype
) -> torch.Tensor:
    held = random_experts(EXPERTS, dtype=dtype, activation=activation)
    logical = torch.where(ids >= 0, torch.tensor(EXPERTS)[ids.clamp(min=0)], -1)
    return dense_reference(held, 1, x, logical, weights)


@pytest.mark.parametrize("preference", KERNELS)
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", list(BOUNDS))
@pytest.mark.parametrize("skipped", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("num_rows", [0, 1, 2, 33])
def test_a_kernel_agrees_with_float32(
    preference: str, activation: str, dtype: torch.dtype, skipped: float, num_rows: int
) -> None:
    kernel = build_kernel(
        random_experts(EXPERTS, dtype=dtype, activation=activation),
        preference,  # type: ignore[arg-type]
    )
    x, ids, weights = _routing(num_rows, 3, skipped)
    x = x.to(dtype)
    out = _run(kernel, x, ids, weights)
    assert out.shape == x.shape
    assert out.dtype == dtype
    assert out.is_contiguous()
    assert relative_error(out, _expected(x, ids, weights, activation, dtype)) < BOUNDS[dtype]


@pytest.mark.parametrize("preference", KERNELS)
def test_rows_of_another_type_are_converted(preference: str) -> None:
    weights = random_experts(EXPERTS, dtype=torch.bfloat16)
    kernel = build_kernel(weights, preference)  # type: ignore[arg-type]
    x, ids, scale = _routing(5, 2, 0.3)
    out = _run(kernel, x.half(), ids, scale)
    assert out.dtype == torch.bfloat16
    assert relative_error(out, _expected(x, ids, scale, "silu", torch.bfloat16)) < 1e-2


@needs_vllm_op
def test_more_pairs_than_scratch_memory_go_in_pieces() -> None:
    kernel = build_kernel(random_experts(EXPERTS), "vllm")
    assert isinstance(kernel, VllmKernel)
    x, ids, weights = _routing(40, 3, 0.4)
    whole = _run(kernel, x, ids, weights)
    kernel._max_pairs = 7
    assert relative_error(_run(kernel, x, ids, weights), whole) < 1e-6
    all_asked = _routing(40, 3, 0.0)
    expected = _expected(*all_asked, "silu", torch.float32)
    assert relative_error(_run(kernel, *all_asked), expected) < 1e-5


@needs_vllm_op
def test_experts_beyond_what_one_call_addresses_are_grouped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one_expert = 2 * 32 * 64
    monkeypatch.setattr("cluster.kernels.vllm_op._MAX_WEIGHT_ELEMENTS", 2 * one_expert)
    kernel = build_kernel(random_experts(EXPERTS), "vllm")
    for skipped in (0.0, 0.5):
        x, ids, weights = _routing(20, 4, skipped)
        expected = _expected(x, ids, weights, "silu", torch.float32)
        assert relative_error(_run(kernel, x, ids, weights), expected) < 1e-5


@pytest.mark.parametrize("preference", KERNELS)
def test_a_kernel_may_be_called_from_several_threads(preference: str) -> None:
    kernel = build_kernel(random_experts(EXPERTS), preference)  # type: ignore[arg-type]
    cases = [_routing(n, 3, 0.4) for n in (1, 5, 17, 30)]
    expected = [_run(kernel, *case) for case in cases]
    wrong: list[int] = []

    def work(index: int) -> None:
        for _ in range(20):
            if not torch.allclose(_run(kernel, *cases[index]), expected[index], atol=1e-6):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(cases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong


def test_shapes_that_the_op_does_not_serve_fall_back_to_torch_and_say_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    weights = random_experts(EXPERTS, width=24)
    kernel = build_kernel(weights)
    assert kernel.name == "torch"
    assert "expert kernel torch" in caplog.text
    x, ids, scale = _routing(4, 2, 0.0)
    assert _run(kernel, x, ids, scale).any()
    with pytest.raises(ShardStartError, match="set it to auto"):
        build_kernel(random_experts(EXPERTS, width=24), "vllm")


@needs_vllm_op
def test_the_op_is_what_a_cpu_that_has_it_gets() -> None:
    kernel = build_kernel(random_experts(EXPERTS, dtype=torch.bfloat16))
    assert kernel.name in ("vllm-cpu-amx", "vllm-cpu-vec")
    assert kernel.experts == EXPERTS
    assert kernel.layers == (1, 2)


@needs_vllm_op
def test_sums_over_experts_are_rounded_once_per_expert_at_most() -> None:
    """The pairs' way, against float32: no worse than a few bfloat16 roundings."""
    kernel = build_kernel(random_experts(EXPERTS, dtype=torch.bfloat16), "vllm")
    x, ids, weights = _routing(64, 4, 0.5)
    x = x.bfloat16()
    expected = _expected(x, ids, weights, "silu", torch.bfloat16)
    assert relative_error(_run(kernel, x, ids, weights), expected) < 4e-3
    assert np.isfinite(expected.numpy()).all()
