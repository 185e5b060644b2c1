"""The Ray node that `moonshard serve` starts for itself, and connecting to one that runs.

Ray is imported inside the functions: it reads its environment on import.
"""

from __future__ import annotations

import sys

from cluster.config import RayConfig
from cluster.exceptions import MoonshardError
from cluster.names import NAMESPACE
from cluster.ray_environment import prepare_connection, prepare_local_node

__all__ = ["ClusterUnreachable", "connect", "current_address", "disconnect", "start_local_node"]


class ClusterUnreachable(MoonshardError):
    """There is no such Ray cluster, or it does not take this user's token."""


def start_local_node(config: RayConfig) -> str:
    """Start a Ray node in the background of this process; returns its address.

    It lives as long as this process: Ray's daemons ask the kernel to be killed with it. It
    listens on loopback only and wants the user's token.

    Raises:
        ConfigError: the token cannot be stored.
    """
    prepare_local_node()
    import ray

    context = ray.init(
        address="local",
        num_cpus=config.num_cpus,
        object_store_memory=config.object_store_memory_bytes,
        include_dashboard=False,
        namespace=NAMESPACE,
        log_to_driver=False,
        configure_logging=False,
    )
    return str(context.address_info["gcs_address"])


def connect(address: str) -> None:
    """Make this process a driver of a cluster that runs.

    Args:
        address: host:port of its control store, or `auto`.

    Raises:
        ClusterUnreachable: says why and what to do.
    """
    prepare_connection(address)
    import ray
    from ray.exceptions import AuthenticationError

    try:
        ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, configure_logging=False)
    except (AuthenticationError, ConnectionError, RuntimeError, ValueError) as error:
        # Ray wraps it, once as a cause and once more as text.
        if isinstance(error, AuthenticationError) or "InvalidAuthToken" in str(error.__cause__):
            raise ClusterUnreachable(
                f"the Ray cluster at {address} refused this user's token; set RAY_AUTH_TOKEN or "
                "RAY_AUTH_TOKEN_PATH to the cluster's own"
            ) from None
        reason = " ".join(str(error).split())[:200]
        raise ClusterUnreachable(f"no Ray cluster at {address}: {reason}") from None


def current_address() -> str:
    """Address of the cluster that this process is connected to."""
    import ray

    return str(ray.get_runtime_context().gcs_address)


def disconnect() -> None:
    """Leave the cluster; a node that this process started ends. Idempotent."""
    if "ray" in sys.modules:
        import ray

        ray.shutdown()
