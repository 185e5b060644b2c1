"""`moonshard stop`: ends what `moonshard serve` started."""

from __future__ import annotations

import time

import psutil

from cluster import ray_node
from cluster.exceptions import MoonshardError
from deployments.cli.instances import find_instance

__all__ = ["stop_command"]

_STOP_TIMEOUT_S = 60.0
_POLL_S = 0.5


def stop_command(port: int | None, address: str | None) -> int:
    """Stop the server on this machine, or, with `address`, the one on that cluster.

    Raises:
        MoonshardError: there is none, or it does not stop.
    """
    if address is not None:
        return _stop_on_cluster(address)
    instance = find_instance(port)
    process = instance.process
    if process is None:
        print("moonshard: it has just ended")
        return 0
    process.terminate()
    try:
        process.wait(_STOP_TIMEOUT_S)
    except psutil.TimeoutExpired:
        raise MoonshardError(
            f"process {instance.pid} did not stop within {_STOP_TIMEOUT_S:g} s; "
            "look at its output, then end it with kill -9"
        ) from None
    print(f"moonshard: stopped the server on port {instance.port}")
    return 0


def _stop_on_cluster(address: str) -> int:
    ray_node.connect(address)
    try:
        from ray import serve

        from cluster.client import controller_status, stop_controller

        status = controller_status()
        if status is None:
            raise MoonshardError(f"nothing of Moonshard's runs on {address}")
        if name := status["application"]:
            serve.delete(name, _blocking=False)
            deadline = time.monotonic() + _STOP_TIMEOUT_S
            while name in serve.status().applications:
                if time.monotonic() > deadline:
                    raise MoonshardError(
                        f"the application {name!r} still answers requests after "
                        f"{_STOP_TIMEOUT_S:g} s; it ends with the last of them, its shards after it"
                    )
                time.sleep(_POLL_S)
        stop_controller()
    finally:
        ray_node.disconnect()
    print(f"moonshard: stopped the application on {address}")
    return 0
