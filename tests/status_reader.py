"""Prints `moonshard status` as JSON for every line that it reads: one driver for many questions.

python -m tests.status_reader ADDRESS

Beside it, `ray_metrics`: where Ray's own metrics can be scraped on each node.
"""

from __future__ import annotations

import json
import sys

from cluster import ray_node
from cluster.exceptions import MoonshardError
from deployments.cli.status import read_status


def ray_metrics() -> list[str]:
    """host:port of the metrics agent of every node."""
    import ray  # after the connection: it reads its environment when it is imported

    return [
        f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}"
        for node in ray.nodes()
        if node["Alive"]
    ]


if __name__ == "__main__":
    ray_node.connect(sys.argv[1])
    for _ in sys.stdin:
        try:
            print(json.dumps(read_status() | {"ray_metrics": ray_metrics()}), flush=True)
        except MoonshardError as error:
            print(json.dumps({"error": str(error)}), flush=True)
    ray_node.disconnect()
