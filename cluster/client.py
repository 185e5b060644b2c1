"""How drivers and Serve replicas reach the controller."""

from __future__ import annotations

import logging
import time
from typing import Any

import ray
from ray import serve
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError
from ray.serve.exceptions import RayServeException

from cluster.checkpoint import ExpertCheckpoint
from cluster.config import MoonshardConfig
from cluster.controller import Controller
from cluster.exceptions import MoonshardError
from cluster.names import CONTROLLER_NAME, NAMESPACE

__all__ = [
    "CONTROLLER_NAME",
    "NAMESPACE",
    "controller_status",
    "ensure_controller",
    "get_controller",
    "original_error",
    "stop_controller",
]

logger = logging.getLogger(__name__)

_APPLY_TIMEOUT_S = 60.0
_STATUS_TIMEOUT_S = 10.0
_STOP_MARGIN_S = 30.0


def ensure_controller(config: MoonshardConfig) -> ActorHandle[Any]:
    """The cluster's controller, started if need be, with `config` applied. Idempotent.

    Called inside a Serve replica, it ties the shards to that replica's application: they go when
    the application is deleted.

    Raises:
        MoonshardError: there is no such checkpoint here, or what `Controller.apply` refuses, as it
            was raised there.
    """
    deadline = time.monotonic() + _APPLY_TIMEOUT_S
    fingerprint = ExpertCheckpoint.open(config.model.checkpoint).fingerprint()
    arguments = (config.model_dump_json(), _application(), fingerprint)
    while True:
        handle = _start()
        try:
            left_s = max(0.0, deadline - time.monotonic())
            ray.get(handle.apply.remote(*arguments), timeout=left_s)
        except RayActorError:
            # The one that was found was just on its way out, or is being restarted.
            if time.monotonic() > deadline:
                raise
            logger.info("the controller went away while it was asked; trying again")
            time.sleep(0.5)
        except RayTaskError as error:
            raise original_error(error) from None
        else:
            return handle


def get_controller() -> ActorHandle[Any] | None:
    """The cluster's controller; None where there is none."""
    try:
        return ray.get_actor(CONTROLLER_NAME, namespace=NAMESPACE)
    except ValueError:
        return None


def controller_status() -> dict[str, Any] | None:
    """The controller's status; None where there is none, or while it is being restarted."""
    handle = get_controller()
    if handle is None:
        return None
    try:
        status: dict[str, Any] = ray.get(handle.status.remote(), timeout=_STATUS_TIMEOUT_S)
    except (RayActorError, GetTimeoutError):
        return None
    return status


def stop_controller(drain_timeout_s: float = 30.0) -> None:
    """Drain and end the shards, then the controller. No error when nothing runs.

    Args:
        drain_timeout_s: `shards.drain_timeout_s` of the running config, so that the wait for
            the drain is long enough.
    """
    handle = get_controller()
    if handle is None:
        return
    try:
        ray.get(handle.shutdown.remote(), timeout=drain_timeout_s + _STOP_MARGIN_S)
    except RayActorError:
        logger.info("the controller went away by itself")
    except GetTimeoutError:
        raise MoonshardError(
            f"the shards were not stopped within {drain_timeout_s + _STOP_MARGIN_S:g} s; see the "
            "controller's log"
        ) from None
    else:
        ray.kill(handle, no_restart=True)


def original_error(error: BaseException) -> BaseException:
    """Moonshard's own error out of a failed remote call; `error` itself when it is another."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, MoonshardError) else error


def _start() -> ActorHandle[Any]:
    options: dict[str, Any] = {
        "name": CONTROLLER_NAME,
        "namespace": NAMESPACE,
        "lifetime": "detached",
        "get_if_exists": True,
        "num_cpus": 0,
        # Else it would lie in the placement group of the replica that calls, and go with it.
        "scheduling_strategy": "DEFAULT",
        "max_restarts": -1,
        "max_task_retries": 0,
    }
    return ray.remote(Controller).options(**options).remote()


def _application() -> str:
    try:
        return str(serve.get_replica_context().app_name)
    except RayServeException:
        return ""  # a driver, not a replica
