"""What the dashboards ask of Prometheus, ready to be executed. Needs no Grafana."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from monitoring.dashboards.board import Kind, Need
from monitoring.dashboards.boards import BOARDS

__all__ = ["Expression", "Source", "expressions", "metric_names"]

Source = Literal["moonshard", "ray", "vllm"]
"""Whose exporter must have been scraped before the expression can return data."""

_METRIC = re.compile(r"\b(?:moonshard[_:]|ray_|llm_)[a-zA-Z0-9_:]+")


@dataclass(frozen=True, slots=True)
class Expression:
    """One query of one panel.

    Attributes:
        dashboard: its uid.
        panel: its title.
        expr: PromQL without variables.
        kind: of the panel; a `timeseries` is asked for over a range, the others at an instant.
        legend: with `{{label}}`s that every returned series must have.
        source: see `Source`.
        needs: see `board.Need`; with "", some traffic suffices.
    """

    dashboard: str
    panel: str
    expr: str
    kind: Kind
    legend: str
    source: Source
    needs: Need

    @property
    def labels(self) -> tuple[str, ...]:
        """Labels that the legend shows."""
        return tuple(re.findall(r"\{\{(\w+)\}\}", self.legend))


def expressions(
    rate_interval: str = "1m",
    time_range: str = "1h",
    *,
    model: str = ".*",
    team: str = ".*",
    application: str = ".*",
) -> list[Expression]:
    """Every query of every panel, in order.

    Args:
        rate_interval: for `$__rate_interval`; at least four scrape intervals, as in Grafana.
        time_range: for `$__range`.
        model, team, application: regular expressions for the variables.
    """
    values = {
        "$__rate_interval": rate_interval,
        "$__range": time_range,
        "$model": model,
        "$team": team,
        "$application": application,
    }
    return [
        Expression(
            board.uid,
            panel.title,
            _substitute(query.expr, values),
            panel.kind,
            query.legend,
            _source(query.expr),
            query.needs,
        )
        for board in BOARDS
        for panel in board.panels
        for query in panel.queries
    ]


def metric_names(expr: str) -> set[str]:
    """Metrics and recorded series that a PromQL expression reads, as far as they are Moonshard's,
    Ray's or vLLM's."""
    return set(_METRIC.findall(expr))


def _substitute(expr: str, values: dict[str, str]) -> str:
    for name, value in values.items():
        expr = expr.replace(name, value)
    if "$" in expr:
        raise ValueError(f"unknown variable in {expr}")
    return expr


def _source(expr: str) -> Source:
    names = metric_names(expr)
    if any(name.startswith("ray_vllm_") for name in names):
        return "vllm"
    return "ray" if any(name.startswith("ray_") for name in names) else "moonshard"
