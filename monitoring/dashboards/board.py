"""What a dashboard consists of, without Grafana's particulars."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Board", "Kind", "Need", "Panel", "Query", "Row", "Steps", "Variable"]

Kind = Literal["timeseries", "stat", "table", "bargauge"]

Need = Literal["", "rejection", "failure", "budget", "prices", "gpu", "prefix cache", "rules"]
"""What must have happened before a query returns anything, beyond some traffic: a refused request,
a failure of some part, a budget, prices of nodes, a GPU, a prefix cache (vLLM has none for MLA on
CPUs without AMX), recording rules that were evaluated."""

Steps = tuple[tuple[float | None, str], ...]
"""Thresholds: (from this value on, colour); the first value is None."""


@dataclass(frozen=True, slots=True)
class Query:
    """One PromQL expression of a panel.

    Attributes:
        expr: may use `$model`, `$team`, `$application`, `$__rate_interval`, `$__range`.
        legend: with `{{label}}`; in a table, the column's name.
        needs: see `Need`.
    """

    expr: str
    legend: str = ""
    needs: Need = ""


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel.

    Attributes:
        unit: Grafana's id of it, of the values.
        queries: of a `timeseries` over the range; of the other kinds at its end.
        width: of 24 columns.
        steps: thresholds; of a time series drawn as lines.
        is_stacked: of a time series, for parts of a whole.
        sort_by: of a table, the column to sort by, descending; its `legend`.
        max: of the axis or the gauge.
    """

    title: str
    description: str
    kind: Kind
    unit: str
    queries: tuple[Query, ...]
    width: int = 12
    height: int = 8
    steps: Steps = ()
    is_stacked: bool = False
    sort_by: str = ""
    max: float | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """Panels under one heading."""

    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True, slots=True)
class Variable:
    """A choice at the top of a board: the values of a label, "All" to begin with.

    Attributes:
        name: also the label's.
        metric: whose label it is.
    """

    name: str
    metric: str


@dataclass(frozen=True, slots=True)
class Board:
    """One dashboard.

    Attributes:
        uid: never changes: links and bookmarks hold it.
    """

    uid: str
    title: str
    description: str
    variables: tuple[Variable, ...]
    rows: tuple[Row, ...]

    @property
    def panels(self) -> tuple[Panel, ...]:
        """All of them, in order."""
        return tuple(panel for row in self.rows for panel in row.panels)
