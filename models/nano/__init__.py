"""The nano model: its shape, tokenizer, training form and checkpoint."""

from __future__ import annotations
