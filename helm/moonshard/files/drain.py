"""Ends a router pod without cutting an answer off: runs before Kubernetes stops its containers.

The pod's Ray node is declared to be leaving. Ray Serve then starts replacements of its replicas
elsewhere, ends these once the replacements run, or in time for their streams, and lets the pod's
proxy go when nobody is served through it any more. This returns when all of them have gone, and
Kubernetes then tells Ray to stop.

Ray can drain by itself when it is told so, but then waits for everything on the node, Moonshard's
controller among it, which goes on elsewhere only once this node has gone.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

_POLL_S = 2.0
_ASK_TIMEOUT_S = 30.0
# A head that is replaced is back by then. If it is not, the whole cluster is being deleted.
_HEAD_PATIENCE_S = 180.0
_SERVING = (b"ray::ServeReplica", b"ray::ProxyActor")
_NODE_ID = b"--node_id="


def main() -> None:
    """Drain, and wait."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, required=True, help="how long this may take")
    seconds = parser.parse_args().seconds
    started = time.monotonic()
    is_leaving = False
    while _is_serving():
        spent_s = time.monotonic() - started
        if spent_s >= seconds:
            _say("time is up; what is still served is cut off")
            return
        is_leaving = is_leaving or _leave(seconds - spent_s)
        if not is_leaving and spent_s > _HEAD_PATIENCE_S:
            _say("no head to ask; going all the same")
            return
        time.sleep(_POLL_S)
    _say(f"nothing serves here after {time.monotonic() - started:.0f} s")


def _leave(left_s: float) -> bool:
    """Tell the cluster that this node goes within some seconds; whether it has heard it."""
    node_id = _node_id()
    if node_id is None:
        return False
    command = ["ray", "drain-node", "--node-id", node_id]
    command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "its pod ends"]
    command += ["--deadline-remaining-seconds", str(int(left_s))]
    try:
        done = subprocess.run(command, check=False, timeout=min(_ASK_TIMEOUT_S, left_s))
    except subprocess.TimeoutExpired:
        return False
    if done.returncode == 0:
        _say(f"node {node_id} is leaving; up to {left_s:.0f} s for what it serves")
    return done.returncode == 0


def _is_serving() -> bool:
    return any(line.startswith(_SERVING) for line in _command_lines())


def _node_id() -> str | None:
    for line in _command_lines():
        for argument in line.split(b"\0"):
            if argument.startswith(_NODE_ID):
                return argument.removeprefix(_NODE_ID).decode()
    return None


def _command_lines() -> Iterator[bytes]:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            yield path.read_bytes()
        except OSError:
            continue  # it has just ended


def _say(text: str) -> None:
    # Into the container's log: nobody sees what a preStop command prints.
    try:
        with Path("/proc/1/fd/1").open("a", encoding="utf-8") as log:
            log.write(f"drain: {text}\n")
    except OSError:
        print(f"drain: {text}", file=sys.stderr)


if __name__ == "__main__":
    main()
