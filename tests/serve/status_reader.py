"""Prints `moonshard status` as JSON for every line that it reads: one driver for many questions.

python -m tests.serve.status_reader ADDRESS
"""

from __future__ import annotations

import json
import sys

from cluster import ray_node
from cluster.exceptions import MoonshardError
from deployments.cli.status import read_status

if __name__ == "__main__":
    ray_node.connect(sys.argv[1])
    for _ in sys.stdin:
        try:
            print(json.dumps(read_status()), flush=True)
        except MoonshardError as error:
            print(json.dumps({"error": str(error)}), flush=True)
    ray_node.disconnect()
