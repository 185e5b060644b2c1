"""The nano model as it is trained: DeepSeek-V3's computation, in plain torch."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.nano.config import NanoConfig
from models.nano.layers import AttentionPlan, DenseMLP, LatentAttention, Linear, MoE, RMSNorm


class Block(nn.Module):
    """Pre-norm attention and feed-forward; the residual stream is float32."""

    def __init__(self, config: NanoConfig, index: int) -> None:
        super().__init__()
        eps = config.rms_norm_eps
        self.input_layernorm = RMSNorm(config.hidden_size, eps)
        self.self_attn = LatentAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps)
        self.mlp: DenseMLP | MoE
        if index < config.first_k_dense_replace:
            self.mlp = DenseMLP(config.hidden_size, config.intermediate_size)
        else:
            self.mlp = MoE(config)

    def attend(
        self, x: Tensor, cos: Tensor, sin: Tensor, plan: AttentionPlan, dtype: torch.dtype
    ) -> Tensor:
        """x [T, hidden] plus the attention's answer, within each conversation."""
        out: Tensor = x + self.self_attn(self.input_layernorm(x, dtype), cos, sin, plan)
        return out

    def feed_forward(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """x [T, hidden] plus the feed-forward's answer, row by row."""
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x, dtype))
        return out


class NanoModel(nn.Module):
    """Token ids of several conversations, laid end to end, to hidden rows or logits."""

    inv_freq: Tensor

    def __init__(self, config: NanoConfig, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.config = config
        self.dtype = dtype
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        # One matrix in training: what copies one word then copies every word, which a
        # short run would not see often enough. Checkpoints hold it twice, as Kimi's do.
        self.lm_head.weight = cast(nn.Parameter, self.embed_tokens.weight)
        rope = config.qk_rope_head_dim
        inv_freq = 1.0 / (config.rope_theta ** (torch.arange(0, rope, 2).float() / rope))
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Random start: outputs of blocks small, so that depth does not amplify at first."""
        for name, weight in self.named_parameters():
            if weight.ndim < 2:
                continue
            std = 0.6 * weight.shape[-1] ** -0.5
            if "embed_tokens" in name:
                std = 0.125
            elif ".gate.weight" in name:
                std = 0.02
            elif "o_proj" in name or "down_proj" in name:
                std *= 0.3
            nn.init.normal_(weight, std=std)
        self._look_back()

    @torch.no_grad()
    def _look_back(self) -> None:
        """Start head 0 of the first layer as one that sees the token before.

        Copying needs two heads in a row: one that tells each token what stood before
        it, and one that finds where the last token stood before. Neither is of use
        without the other, so a short run can pass before both are found. With the
        first given, the second is learnt at once.
        """
        config = self.config
        attn = self.blocks()[0].self_attn
        # A constant in all embeddings, for positions to be compared whatever the token.
        self.embed_tokens.weight[:, 0] = 0.5
        num_pairs, strength = 6, 1.9
        first = config.kv_lora_rank
        attn.kv_a_proj_with_mqa.weight[first:] *= 0.1
        attn.q_a_proj.weight[0] = 0.0
        attn.q_a_proj.weight[0, 0] = 1.0
        for pair in range(num_pairs):
            angle = self.inv_freq[pair]
            attn.kv_a_proj_with_mqa.weight[first + 2 * pair, 0] = strength
            row = config.qk_nope_head_dim + 2 * pair
            attn.q_b_proj.weight[row, 0] = strength * torch.cos(angle)
            attn.q_b_proj.weight[row + 1, 0] = -strength * torch.sin(angle)
        attn.o_proj.weight[:, : config.v_head_dim] *= 2.5

    def rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [T, 1, rope / 2] in the compute type."""
        angles = (positions[:, None].float() * self.inv_freq)[:, None, :]
        return angles.cos().to(self.dtype), angles.sin().to(self.dtype)

    def hidden(self, ids: Tensor, plan: AttentionPlan, rows: Tensor | None = None) -> Tensor:
        """ids [T] -> normed rows [T, hidden] in the compute type.

        rows: where only these [N] are wanted, the last feed-forward leaves out the others.
        """
        cos, sin = self.rotary(plan.positions)
        x = self.embed_tokens(ids).float()
        for index, block in enumerate(self.blocks()):
            x = block.attend(x, cos, sin, plan, self.dtype)
            if rows is not None and index == len(self.layers) - 1:
                x = x[rows]
            x = block.feed_forward(x, self.dtype)
        out: Tensor = self.norm(x, self.dtype)
        return out

    def logits(self, ids: Tensor, plan: AttentionPlan) -> Tensor:
        """ids [T] -> [T, vocab] float32."""
        out: Tensor = self.lm_head(self.hidden(ids, plan)).float()
        return out

    def loss(self, ids: Tensor, plan: AttentionPlan, rows: Tensor, targets: Tensor) -> Tensor:
        """Summed cross-entropy of ``targets`` [N] predicted at ``rows`` [N] of the flat run."""
        logits = self.lm_head(self.hidden(ids, plan, rows))
        return F.cross_entropy(logits.float(), targets, reduction="sum")

    def blocks(self) -> list[Block]:
        """The layers with their type: ``nn.ModuleList`` does not tell it."""
        return [block for block in self.layers if isinstance(block, Block)]

    def moe_layers(self) -> list[MoE]:
        return [block.mlp for block in self.blocks() if isinstance(block.mlp, MoE)]
