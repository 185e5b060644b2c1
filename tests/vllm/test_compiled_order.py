"""The compiler keeps the shared expert between dispatch and combine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.checkpoints import deepseek_v3_config, write_checkpoint
from tests.vllm.harness import Shards

pytestmark = pytest.mark.vllm

LAYER = 1
HIDDEN = 256


@pytest.fixture
def running_dispatcher(tmp_path: Path) -> Iterator[Shards]:
    """A dispatcher in this process."""
    from routing.vllm_plugin import runtime

    checkpoint = write_checkpoint(tmp_path / "model", deepseek_v3_config())
    shards = Shards(checkpoint, tmp_path)
    shards.start()
    runtime.start(shards.settings()).wait_for_experts({1, 2, 3}, 16, 4)
    yield shards
    runtime.stop()
    shards.close()


def moe_layer(
    x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    """A MoE layer as the plugin's method writes it, with a norm before and a sum behind."""
    from routing.vllm_plugin import ops

    x = x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6).to(x.dtype)
    weights, ids = torch.topk((x @ gate).float().softmax(-1), 4)
    ops.dispatch(x, weights, ids.to(torch.int32), None, LAYER)
    shared = torch.nn.functional.silu(x @ up) @ down
    return shared + ops.combine(x, shared, LAYER)


def test_generated_code_dispatches_first_and_combines_last(running_dispatcher: Shards) -> None:
    from torch._inductor.utils import run_and_get_code

    generator = torch.Generator().manual_seed(3)
    shapes = ((9, HIDDEN), (HIDDEN, 16), (HIDDEN, 128), (128, HIDDEN))
    tensors = [torch.randn(shape, generator=generator).bfloat16() / 16 for shape in shapes]
    with torch.inference_mode():
        expected = moe_layer(*tensors)
        compiled = torch.compile(moe_layer, fullgraph=True, dynamic=True)
        output, (code,) = run_and_get_code(compiled, *tensors)
    call = code[code.index("def call(") :]
    order = [
        call.index("moonshard.dispatch.default("),
        *(call.index("extern_kernels.mm(", start) for start in _matmuls_behind_gate(call)),
        call.index("moonshard.combine.default("),
    ]
    assert order == sorted(order)
    torch.testing.assert_close(output, expected, rtol=2e-2, atol=2e-2)
    assert running_dispatcher.state.poison == 0


def _matmuls_behind_gate(call: str) -> list[int]:
    starts = []
    position = -1
    while (position := call.find("extern_kernels.mm(", position + 1)) >= 0:
        starts.append(position)
    assert len(starts) == 3  # gate, up, down
    return starts[1:]
