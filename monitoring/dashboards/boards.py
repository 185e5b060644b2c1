"""All dashboards."""

from __future__ import annotations

from monitoring.dashboards import capacity, experts, overview, tokens_cost
from monitoring.dashboards.board import Board

__all__ = ["BOARDS"]

BOARDS: tuple[Board, ...] = (overview.BOARD, experts.BOARD, tokens_cost.BOARD, capacity.BOARD)
