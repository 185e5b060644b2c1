"""Muon for hidden matrices, AdamW for the rest.

Muon steps along the nearest orthogonal matrix of the momentum, which here reaches
a given loss in about half the tokens AdamW needs. Stacked experts are matrices of
their own; all matrices of one shape go through Newton-Schulz in one batch.
"""

from __future__ import annotations

from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from models.nano.model import NanoModel

_NS_COEFFICIENTS = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)

# Matrices that one thread orthogonalizes at a time: 32 of 256 x 128 stay in its cache.
MAX_BATCH = 32


@torch.no_grad()
def orthogonalize(matrices: Tensor) -> Tensor:
    """Newton-Schulz on [B, rows, columns]: singular values go to about one. bfloat16 out."""
    x = matrices.to(torch.bfloat16)
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.transpose(1, 2)
    x = x / (x.float().norm(dim=(1, 2), keepdim=True) * 1.01 + 1e-7).to(x.dtype)
    for a, b, c in _NS_COEFFICIENTS:
        gram = torch.bmm(x, x.transpose(1, 2))
        poly = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, poly, x, beta=a)
    return x.transpose(1, 2) if tall else x


def as_matrices(name: str, tensor: Tensor) -> Tensor:
    """View of a weight as [B, rows, columns]; gate and up projections are two matrices."""
    if name.endswith("gate_up_proj"):
        experts, rows, columns = tensor.shape
        return tensor.view(2 * experts, rows // 2, columns)
    return tensor if tensor.ndim == 3 else tensor[None]


class NanoOptimizer:
    """Both optimizers of a model behind one step with one learning-rate factor."""

    def __init__(
        self,
        model: NanoModel,
        muon_lr: float = 0.02,
        adam_lr: float = 0.003,
        momentum: float = 0.95,
        weight_decay: float = 0.02,
    ) -> None:
        self.muon_lr, self.momentum, self.weight_decay = muon_lr, momentum, weight_decay
        self.matrices: dict[str, torch.nn.Parameter] = {}
        others: list[dict[str, Any]] = []
        for name, parameter in model.named_parameters():
            fixed = parameter.ndim < 2 or any(
                part in name for part in ("embed_tokens", ".gate.weight")
            )
            if fixed:
                others.append({"params": [parameter], "lr": adam_lr, "base_lr": adam_lr})
            else:
                self.matrices[name] = parameter
        self.buffers = {name: torch.zeros_like(p) for name, p in self.matrices.items()}
        self.adam = torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    @torch.no_grad()
    def step(self, factor: float, pool: ThreadPoolExecutor) -> None:
        """Apply the gradients with learning rates times ``factor``, and drop them."""
        for group in self.adam.param_groups:
            group["lr"] = group["base_lr"] * factor
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        batches: dict[torch.Size, list[tuple[str, Tensor]]] = defaultdict(list)
        for name, parameter in self.matrices.items():
            if parameter.grad is None:
                continue
            buffer = self.buffers[name]
            buffer.lerp_(parameter.grad, 1 - self.momentum)
            nesterov = as_matrices(name, parameter.grad.lerp_(buffer, self.momentum))
            batches[nesterov.shape[1:]].append((name, nesterov))
            parameter.grad = None
        lr = self.muon_lr * factor
        for shape, members in batches.items():
            stacked = torch.cat([matrices for _, matrices in members])
            update = torch.cat(list(pool.map(orthogonalize, torch.split(stacked, MAX_BATCH))))
            scale = max(1.0, shape[0] / shape[1]) ** 0.5
            at = 0
            for name, matrices in members:
                target = as_matrices(name, self.matrices[name].data)
                target.mul_(1 - lr * self.weight_decay)
                part = update[at : at + len(matrices)]
                target.add_(part.to(target.dtype), alpha=-lr * scale)
                at += len(matrices)

    def state_dict(self) -> dict[str, Any]:
        return {"buffers": self.buffers, "adam": self.adam.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, buffer in state["buffers"].items():
            self.buffers[name].copy_(buffer)
        rates = [group["base_lr"] for group in self.adam.param_groups]
        self.adam.load_state_dict(state["adam"])
        for group, rate in zip(self.adam.param_groups, rates, strict=True):
            group["base_lr"] = rate
