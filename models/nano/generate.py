"""Greedy generation for many prompts at once, with key/value caches. For evaluation only."""

from __future__ import annotations

from itertools import chain

import torch
from torch import Tensor

from models.nano.layers import AttentionPlan
from models.nano.model import NanoModel
from models.nano.vocab import EOS_ID, IM_END_ID


class _Cache:
    """Keys [B, length, heads, qk] and values [B, length, heads, v] of one layer."""

    def __init__(self, model: NanoModel, batch: int, length: int) -> None:
        config = model.config
        heads = config.num_attention_heads
        device = model.inv_freq.device
        self.keys = torch.zeros(
            batch, length, heads, config.qk_head_dim, dtype=model.dtype, device=device
        )
        self.values = torch.zeros(
            batch, length, heads, config.v_head_dim, dtype=model.dtype, device=device
        )

    def keep(self, rows: Tensor) -> None:
        self.keys, self.values = self.keys[rows], self.values[rows]


def _prefill(model: NanoModel, prompts: list[list[int]], caches: list[_Cache]) -> Tensor:
    """Fill the caches; returns the next token of each prompt [B]."""
    device = model.inv_freq.device
    lengths = [len(prompt) for prompt in prompts]
    plan = AttentionPlan.build(lengths, device)
    rows = torch.repeat_interleave(torch.arange(len(prompts)), torch.tensor(lengths)).to(device)
    cos, sin = model.rotary(plan.positions)
    x = model.embed_tokens(torch.tensor(list(chain.from_iterable(prompts)), device=device)).float()
    for block, cache in zip(model.blocks(), caches, strict=True):
        q, k, v = block.self_attn.project(block.input_layernorm(x, model.dtype), cos, sin)
        cache.keys[rows, plan.positions] = k
        cache.values[rows, plan.positions] = v
        x = x + block.self_attn.mix(q, k, v, plan)
        x = block.feed_forward(x, model.dtype)
    last = torch.tensor(lengths, device=device).cumsum(0) - 1
    return _next(model, x[last])


def _next(model: NanoModel, x: Tensor) -> Tensor:
    best: Tensor = model.lm_head(model.norm(x, model.dtype)).argmax(dim=-1)
    return best


def _decode(model: NanoModel, tokens: Tensor, positions: Tensor, caches: list[_Cache]) -> Tensor:
    """One token further for each row: tokens [B] at positions [B] -> next tokens [B]."""
    batch = torch.arange(len(tokens), device=tokens.device)
    length = int(positions.max()) + 1
    unseen = torch.arange(length, device=tokens.device)[None, None, :] > positions[:, None, None]
    cos, sin = model.rotary(positions)
    x = model.embed_tokens(tokens).float()
    for block, cache in zip(model.blocks(), caches, strict=True):
        q, k, v = block.self_attn.project(block.input_layernorm(x, model.dtype), cos, sin)
        cache.keys[batch, positions], cache.values[batch, positions] = k, v
        keys, values = cache.keys[:, :length], cache.values[:, :length]
        scores = torch.einsum("bhd,blhd->bhl", q, keys).float() * q.shape[-1] ** -0.5
        weights = scores.masked_fill(unseen, float("-inf")).softmax(dim=-1).to(model.dtype)
        mixed = torch.einsum("bhl,blhd->bhd", weights, values)
        x = x + block.self_attn.o_proj(mixed.flatten(1))
        x = block.feed_forward(x, model.dtype)
    return _next(model, x)


@torch.no_grad()
def generate(model: NanoModel, prompts: list[list[int]], max_new: int) -> list[list[int]]:
    """The tokens that follow each prompt, its end token included.

    An answer whose last token is no end token was cut off at ``max_new``.
    """
    device = model.inv_freq.device
    caches = [_Cache(model, len(prompts), max(map(len, prompts)) + max_new) for _ in model.blocks()]
    answers: list[list[int]] = [[] for _ in prompts]
    alive = list(range(len(prompts)))
    positions = torch.tensor([len(prompt) for prompt in prompts], device=device)
    tokens = _prefill(model, prompts, caches)
    for _ in range(max_new):
        ended = []
        for row, token in enumerate(tokens.tolist()):
            answers[alive[row]].append(token)
            ended.append(token in (IM_END_ID, EOS_ID))
        if any(ended):
            rows = torch.tensor([row for row, end in enumerate(ended) if not end], device=device)
            if not len(rows):
                break
            alive = [alive[row] for row in rows.tolist()]
            tokens, positions = tokens[rows], positions[rows]
            for cache in caches:
                cache.keep(rows)
        tokens = _decode(model, tokens, positions, caches)
        positions = positions + 1
    return answers
