"""Metric declarations. The lowest floor: imports nothing of Moonshard's."""

from __future__ import annotations

__all__: list[str] = []
