"""Routed experts, grouped: all rows of one expert are computed together.

One expert's rows of a training batch fit the processor's second-level cache, so
gathering, both matrix products and the weighted scatter run expert by expert.
Autograd would keep a graph of some ten nodes per expert; the backward pass is
written out instead.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Rows of an expert are filled up to a multiple of this. oneDNN builds a kernel for
# every new shape, which costs more than the few rows of nothing.
ROW_MULTIPLE = 64


class _GroupedExperts(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        weights: Tensor,
        gate_up: Tensor,
        down: Tensor,
        tokens: Tensor,
        bounds: list[int],
    ) -> Tensor:
        """x [T, H], weights [P] float32, gate_up [E, 2I, H], down [E, H, I] -> [T, H].

        tokens: [P] rows of x, those of expert e at bounds[e]:bounds[e + 1]; rows that
        only fill up have weight zero.
        """
        out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        width = down.shape[2]
        for expert in range(len(bounds) - 1):
            low, high = bounds[expert], bounds[expert + 1]
            if low == high:
                continue
            rows = tokens[low:high]
            hidden = x[rows] @ gate_up[expert].t()
            inner = F.silu(hidden[:, :width]) * hidden[:, width:]
            y = (inner @ down[expert].t()).float() * weights[low:high, None]
            out.index_add_(0, rows, y)
        ctx.save_for_backward(x, weights, gate_up, down, tokens)
        ctx.bounds = bounds
        return out.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> Any:  # type: ignore[override]
        x, weights, gate_up, down, tokens = ctx.saved_tensors
        bounds: list[int] = ctx.bounds
        width = down.shape[2]
        grad_x = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        grad_weights = torch.zeros_like(weights)
        grad_gate_up = torch.zeros_like(gate_up)
        grad_down = torch.zeros_like(down)
        for expert in range(len(bounds) - 1):
            low, high = bounds[expert], bounds[expert + 1]
            if low == high:
                continue
            rows = tokens[low:high]
            part = x[rows]
            # Recomputed rather than kept: cheaper than writing it to memory and back.
            hidden = part @ gate_up[expert].t()
            gate, up = hidden[:, :width], hidden[:, width:]
            sigmoid = torch.sigmoid(gate)
            silu = gate * sigmoid
            inner = silu * up
            grad_y = grad_out[rows]
            unweighted = grad_y @ down[expert]
            grad_weights[low:high] = (unweighted.float() * inner.float()).sum(dim=1)
            scale = weights[low:high, None].to(x.dtype)
            torch.mm((grad_y * scale).t(), inner, out=grad_down[expert])
            grad_inner = unweighted * scale
            grad_gate = grad_inner * up * (sigmoid + silu * (1 - sigmoid))
            grad_hidden = torch.cat([grad_gate, grad_inner * silu], dim=1)
            torch.mm(grad_hidden.t(), part, out=grad_gate_up[expert])
            grad_x.index_add_(0, rows, (grad_hidden @ gate_up[expert]).float())
        return grad_x.to(x.dtype), grad_weights, grad_gate_up, grad_down, None, None


class RoutedExperts(nn.Module):
    """E SwiGLU experts in stacked weights: gate_up [E, 2I, H] (gate rows first), down [E, H, I]."""

    def __init__(self, num_experts: int, hidden_size: int, width: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * width, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, width))

    def forward(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        """x [T, H], weights [T, k] float32, ids [T, k] -> weighted sum [T, H]."""
        flat = ids.flatten()
        order = torch.argsort(flat, stable=True)
        counts = torch.bincount(flat, minlength=self.num_experts)
        filled = (counts + ROW_MULTIPLE - 1) // ROW_MULTIPLE * ROW_MULTIPLE
        ends, filled_ends = counts.cumsum(0), filled.cumsum(0)
        # How far the fill of the experts before it pushes each (token, choice) pair back.
        shift = ((filled_ends - filled) - (ends - counts))[flat[order]]
        slots = torch.arange(len(order), device=x.device) + shift
        bounds = [0, *filled_ends.tolist()]
        tokens = order.new_zeros(bounds[-1]).index_copy(0, slots, order // ids.shape[1])
        slot_weights = weights.new_zeros(bounds[-1]).index_copy(0, slots, weights.flatten()[order])
        out: Tensor = _GroupedExperts.apply(  # type: ignore[no-untyped-call]
            x,
            slot_weights,
            self.gate_up_proj.to(x.dtype),
            self.down_proj.to(x.dtype),
            tokens,
            bounds,
        )
        return out
