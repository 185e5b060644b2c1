"""Layers of the nano model over one flat run of tokens.

Tokens of all conversations of a batch lie behind one another, [T, hidden]; only
attention needs to know where one conversation ends (``AttentionPlan``). So the
linear layers and the experts see one large matrix and nothing is padded there.
Weights of any type are used in the compute type.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.nano.config import NanoConfig
from models.nano.experts import RoutedExperts


@dataclasses.dataclass(frozen=True, slots=True)
class AttentionPlan:
    """How the flat tokens fall into conversations.

    positions: [T] int64, position of each token in its conversation.
    shapes: (B, L) of each group of conversations of similar length.
    gather: [sum of B * L] int64, rows of the flat run that make up the groups (padding
        points at row 0; causal attention never looks right, so padding at the end is
        seen by no real token).
    scatter: [T] int64, where each flat token lies in ``gather``.
    """

    positions: Tensor
    shapes: list[tuple[int, int]]
    gather: Tensor
    scatter: Tensor

    @staticmethod
    def build(lengths: list[int], device: torch.device, group_size: int = 16) -> AttentionPlan:
        starts = [0]
        for length in lengths:
            starts.append(starts[-1] + length)
        order = sorted(range(len(lengths)), key=lambda i: lengths[i])
        groups: list[list[int]] = []
        for i in order:
            # One long conversation must not make the short ones as wide as itself.
            if (
                not groups
                or len(groups[-1]) == group_size
                or (lengths[i] > 1.25 * lengths[groups[-1][0]] + 8)
            ):
                groups.append([])
            groups[-1].append(i)
        scatter = torch.empty(starts[-1], dtype=torch.int64)
        gather: list[Tensor] = []
        shapes: list[tuple[int, int]] = []
        base = 0
        for members in groups:
            # Round sizes, so that few different shapes (and kernels, see experts) occur.
            width = -(-max(lengths[i] for i in members) // 16) * 16
            rows = torch.zeros(-(-len(members) // 4) * 4, width, dtype=torch.int64)
            for row, i in enumerate(members):
                span = torch.arange(lengths[i])
                rows[row, : lengths[i]] = starts[i] + span
                scatter[starts[i] : starts[i + 1]] = base + row * width + span
            gather.append(rows.flatten())
            shapes.append((rows.shape[0], rows.shape[1]))
            base += rows.numel()
        positions = torch.cat([torch.arange(length) for length in lengths])
        gathered = torch.cat(gather).to(device)
        return AttentionPlan(positions.to(device), shapes, gathered, scatter.to(device))


class RMSNorm(nn.Module):
    """Root-mean-square norm in float32; the result has the compute type."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return F.rms_norm(x.float(), (x.shape[-1],), self.weight.float(), self.eps).to(dtype)


class Linear(nn.Module):
    """A bias-free linear layer whose weight is cast to the input's type."""

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_out, num_in))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of [T, heads, rope] whose pairs are (i, i + rope / 2)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def rotary_rows(num_blocks: int, plain: int, rope: int) -> Tensor:
    """Row order that turns DeepSeek's interleaved pairs into halves, block by block.

    A block is ``plain`` rows without position, then ``rope`` rows with pairs
    (0, 1), (2, 3), ... Sorting the rows of a weight is far cheaper than picking
    every other column of its output; queries and keys are sorted alike, so their
    products stay those of the checkpoint's layout.
    """
    block = torch.arange(plain + rope)
    block = torch.cat([block[:plain], block[plain::2], block[plain + 1 :: 2]])
    starts = torch.arange(num_blocks)[:, None] * (plain + rope)
    return (starts + block).flatten()


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B, heads, L, width] each, values of their own width, -> [B, heads, L, value width].

    Written out: for conversations of some hundred tokens torch's fused CPU kernel
    takes two to three times as long, and it pads values to the keys' width.
    """
    length = q.shape[2]
    hidden = torch.full((length, length), float("-inf"), device=q.device).triu(1)
    scores = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5 + hidden
    return torch.softmax(scores, dim=-1).to(v.dtype) @ v


class LatentAttention(nn.Module):
    """MLA: queries and keys/values go through low-rank latents; one shared rotary key."""

    q_rows: Tensor
    kv_rows: Tensor

    def __init__(self, config: NanoConfig) -> None:
        super().__init__()
        self.config = config
        heads = config.num_attention_heads
        self.q_a_proj = Linear(config.hidden_size, config.q_lora_rank)
        self.q_a_layernorm = RMSNorm(config.q_lora_rank, config.rms_norm_eps)
        self.q_b_proj = Linear(config.q_lora_rank, heads * config.qk_head_dim)
        self.kv_a_proj_with_mqa = Linear(
            config.hidden_size, config.kv_lora_rank + config.qk_rope_head_dim
        )
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank, config.rms_norm_eps)
        self.kv_b_proj = Linear(
            config.kv_lora_rank, heads * (config.qk_nope_head_dim + config.v_head_dim)
        )
        self.o_proj = Linear(heads * config.v_head_dim, config.hidden_size)
        rope = config.qk_rope_head_dim
        self.register_buffer(
            "q_rows", rotary_rows(heads, config.qk_nope_head_dim, rope), persistent=False
        )
        self.register_buffer("kv_rows", rotary_rows(1, config.kv_lora_rank, rope), persistent=False)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys [T, heads, qk_head_dim], values [T, heads, v_head_dim]."""
        config = self.config
        heads, nope = config.num_attention_heads, config.qk_nope_head_dim
        q = self.q_a_layernorm(self.q_a_proj(x), x.dtype)
        q = F.linear(q, self.q_b_proj.weight[self.q_rows].to(x.dtype))
        q = q.view(-1, heads, config.qk_head_dim)
        latent = F.linear(x, self.kv_a_proj_with_mqa.weight[self.kv_rows].to(x.dtype))
        k_rope = latent[:, None, config.kv_lora_rank :]
        kv = self.kv_b_proj(self.kv_a_layernorm(latent[:, : config.kv_lora_rank], x.dtype))
        kv = kv.view(-1, heads, nope + config.v_head_dim)
        q = torch.cat([q[..., :nope], rotate(q[..., nope:], cos, sin)], dim=-1)
        k_rope = rotate(k_rope, cos, sin).expand(-1, heads, -1)
        k = torch.cat([kv[..., :nope], k_rope], dim=-1)
        return q, k, kv[..., nope:]

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, plan: AttentionPlan) -> Tensor:
        """x [T, hidden] in the compute type -> [T, hidden]."""
        q, k, v = self.project(x, cos, sin)
        return self.mix(q, k, v, plan)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> Tensor:
        """Attention within each conversation, and the output projection: [T, hidden]."""
        # One gather for all groups: its backward pass costs the same for one as for many.
        gathered = [t.index_select(0, plan.gather) for t in (q, k, v)]
        outputs = []
        at = 0
        for batch, length in plan.shapes:
            span = slice(at, at + batch * length)
            part = [t[span].view(batch, length, *t.shape[1:]).transpose(1, 2) for t in gathered]
            outputs.append(causal_attention(*part).transpose(1, 2).reshape(batch * length, -1))
            at += batch * length
        out: Tensor = self.o_proj(torch.cat(outputs).index_select(0, plan.scatter))
        return out


class DenseMLP(nn.Module):
    """SwiGLU feed-forward: the first layer's MLP and the shared expert."""

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, width)
        self.up_proj = Linear(hidden_size, width)
        self.down_proj = Linear(width, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class MoE(nn.Module):
    """Sigmoid gate with a selection bias, routed experts and one shared expert."""

    e_score_correction_bias: Tensor
    load: Tensor

    def __init__(self, config: NanoConfig) -> None:
        super().__init__()
        self.config = config
        self.gate = Linear(config.hidden_size, config.n_routed_experts)
        self.experts = RoutedExperts(
            config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        )
        self.shared_experts = DenseMLP(
            config.hidden_size, config.moe_intermediate_size * config.n_shared_experts
        )
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts))
        # Rows each expert received since the last reset, for balancing and reports.
        self.register_buffer("load", torch.zeros(config.n_routed_experts), persistent=False)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weights [T, k] float32 and expert ids [T, k]; the bias only steers the choice."""
        scores = F.linear(x.float(), self.gate.weight.float()).sigmoid()
        ids = torch.topk(
            scores.detach() + self.e_score_correction_bias, self.config.num_experts_per_tok, dim=-1
        ).indices
        weights = scores.gather(1, ids)
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return weights * self.config.routed_scaling_factor, ids

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.route(x)
        self.load += torch.bincount(ids.flatten(), minlength=self.config.n_routed_experts)
        out: Tensor = self.experts(x, weights, ids) + self.shared_experts(x)
        return out
