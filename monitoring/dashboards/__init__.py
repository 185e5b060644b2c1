"""Grafana dashboards as code: `python -m monitoring.dashboards.build` writes `json/`.

A board is data (`board.py`); one module each. `panels.py` turns it into Grafana's JSON with
grafana-foundation-sdk, which only the build needs; `expressions.py` lists what the boards ask.
"""

from __future__ import annotations

__all__: list[str] = []
