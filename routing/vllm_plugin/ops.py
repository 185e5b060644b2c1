"""Custom ops: the two halves of a remote MoE layer, opaque to the compiler.

`moonshard::dispatch` sends, `moonshard::combine` waits and sums; what vLLM traces between them
(the shared expert) runs while the shards work. A compiler may move whatever no data flow holds in
place, so the order is data flow:

- dispatch declares that it writes to the rows and to the shared expert's input (it does not).
  Functionalisation then hands every later reader, the shared expert and combine among them, the
  version "after dispatch"; no copy is made.
- combine takes the shared expert's output as an argument that it does not read. It reads the rows,
  so their buffer is not reused before: rows may have to be sent again until then.

Called without the compiler (eager mode; CUDA, where vLLM's MoE op is opaque as a whole) the order
is the program's.
"""

from __future__ import annotations

import torch
from vllm.platforms import current_platform
from vllm.utils.torch_utils import direct_register_custom_op

from routing.vllm_plugin import runtime

__all__ = ["combine", "dispatch"]

_LIBRARY = torch.library.Library("moonshard", "DEF")  # type: ignore[no-untyped-call]


def _dispatch(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    shared_input: torch.Tensor | None,
    layer: int,
) -> None:
    runtime.current().dispatch(layer, x, topk_ids, topk_weights)


def _dispatch_fake(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    shared_input: torch.Tensor | None,
    layer: int,
) -> None:
    return None


def _combine(x: torch.Tensor, after: torch.Tensor | None, layer: int) -> torch.Tensor:
    return runtime.current().combine(layer, x)


def _combine_fake(x: torch.Tensor, after: torch.Tensor | None, layer: int) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


for _name, _function, _fake, _mutated in (
    ("dispatch", _dispatch, _dispatch_fake, ["x", "shared_input"]),
    ("combine", _combine, _combine_fake, []),
):
    direct_register_custom_op(
        op_name=_name,
        op_func=_function,
        mutates_args=_mutated,
        fake_impl=_fake,
        target_lib=_LIBRARY,
        dispatch_key=current_platform.dispatch_key,
    )


def dispatch(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    shared_input: torch.Tensor | None,
    layer: int,
) -> None:
    """Send a layer's rows to the shards of their experts.

    Args:
        x: [n, hidden], the rows.
        topk_weights: float32 [n, k].
        topk_ids: int32 [n, k], logical expert ids.
        shared_input: the shared expert's input where that is another tensor than `x`; its readers
            stay behind this call.
        layer: checkpoint layer id.
    """
    torch.ops.moonshard.dispatch(x, topk_weights, topk_ids, shared_input, layer)


def combine(x: torch.Tensor, after: torch.Tensor | None, layer: int) -> torch.Tensor:
    """Wait for the layer's answers.

    Args:
        x, layer: as given to `dispatch`, x unchanged since.
        after: a tensor that is computed before the wait (the shared expert's output).

    Returns:
        [n, hidden] in x's dtype: per row the weighted sum over its experts.
    """
    output: torch.Tensor = torch.ops.moonshard.combine(x, after, layer)
    return output
