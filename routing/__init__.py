"""Routing: which shard holds which expert, and how token rows get there and back."""

from __future__ import annotations

__all__: list[str] = []
