"""What is generated in the chart; `python -m helm.build` writes it.

values.schema.json and the tables of README.md come from the comments of values.yaml and from
`MoonshardConfig`; dashboards and rules are copied from `monitoring/`, for Helm reads nothing
outside the chart.
"""

from helm.generator.outputs import CHART, REPO_ROOT, outputs, stale, write
from helm.generator.values import ValuesError

__all__ = ["CHART", "REPO_ROOT", "ValuesError", "outputs", "stale", "write"]
