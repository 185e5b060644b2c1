"""The one actor that adds up the metrics of all processes, and how they reach it."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayActorError, RayError

from cluster.names import METRICS_NAME, NAMESPACE
from cluster.ray_adapter import kv_delete, kv_get, kv_put
from monitoring.aggregator import Aggregator
from monitoring.declaration import Role
from monitoring.messages import Ack, Push

__all__ = [
    "MetricsActor",
    "MetricsSender",
    "ensure_metrics_actor",
    "get_metrics_actor",
    "stop_metrics_actor",
]

logger = logging.getLogger(__name__)

_SAVED = "metrics_totals"
_TICK_S = 1.0
_SAVE_INTERVAL_S = 5.0
_CALL_TIMEOUT_S = 5.0


class MetricsActor:
    """Runs the aggregator. Its totals lie in Ray's control store, too, some seconds old.

    Args:
        top_experts: `metrics.top_experts` of the config.
    """

    # Ray awaits it before the first call; typing knows no such constructor.
    async def __init__(self, top_experts: int) -> None:  # type: ignore[misc]
        logging.basicConfig(level=logging.INFO)
        self._aggregator = await asyncio.to_thread(_restored, top_experts)
        self._is_ending = False
        self._settled = asyncio.Event()
        self._note_settled()
        self._saving = asyncio.Lock()
        self._task = asyncio.create_task(self._run(), name="tick")

    async def push(self, push: Push) -> Ack:
        """Count a message of a process."""
        ack = self._aggregator.apply(push)
        self._note_settled()
        return ack

    async def snapshot(self) -> str:
        """All metrics in Prometheus's text format (`monitoring.exposition.CONTENT_TYPE`)."""
        await self._settled.wait()
        return self._aggregator.snapshot()

    async def experts(self) -> dict[str, Any]:
        """The load of every expert, JSON-able."""
        await self._settled.wait()
        return self._aggregator.experts()

    async def depart(self, role: Role, name: str) -> None:
        """A process is known to have ended."""
        self._aggregator.depart(role, name)

    async def close(self) -> None:
        """Forget what was saved: the actor is not to be started again."""
        self._is_ending = True
        async with self._saving:
            await asyncio.to_thread(kv_delete, _SAVED)

    def _note_settled(self) -> None:
        if self._aggregator.is_settled:
            self._settled.set()

    async def _run(self) -> None:
        saved_s = 0.0
        is_due = True  # at once: what was counted must know these totals again
        while not self._is_ending:
            await asyncio.sleep(_TICK_S)
            try:
                is_due |= self._aggregator.tick()
                self._note_settled()
                if is_due or time.monotonic() - saved_s >= _SAVE_INTERVAL_S:
                    await self._save()
                    is_due, saved_s = False, time.monotonic()
            except Exception:
                logger.exception("metrics go on after")

    async def _save(self) -> None:
        async with self._saving:
            if not self._is_ending:
                await asyncio.to_thread(kv_put, _SAVED, self._aggregator.save())
                self._aggregator.saved()


class MetricsSender:
    """Delivers messages to the actor; finds it again when it was started anew. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._handle: ActorHandle[Any] | None = None

    async def send(self, push: Push) -> Ack:
        """For a process with an event loop.

        Raises:
            ConnectionError: the actor is not there, or does not answer.
        """
        handle = await asyncio.to_thread(self._find)
        try:
            return await asyncio.wait_for(_result(handle.push.remote(push)), _CALL_TIMEOUT_S)
        except (RayActorError, TimeoutError) as error:
            raise self._lost(error) from None

    def send_blocking(self, push: Push) -> Ack:
        """For a process with threads.

        Raises:
            ConnectionError: the actor is not there, or does not answer.
        """
        try:
            ack: Ack = ray.get(self._find().push.remote(push), timeout=_CALL_TIMEOUT_S)
        except (RayActorError, GetTimeoutError) as error:
            raise self._lost(error) from None
        return ack

    def _find(self) -> ActorHandle[Any]:
        with self._lock:
            if self._handle is None:
                self._handle = get_metrics_actor()
            if self._handle is None:
                raise ConnectionError("the metrics actor does not run")
            return self._handle

    def _lost(self, error: BaseException) -> ConnectionError:
        self._handle = None
        reason = " ".join(str(error).split())[:200]
        return ConnectionError(reason or "the metrics actor does not answer")


def ensure_metrics_actor(top_experts: int) -> ActorHandle[Any]:
    """The cluster's metrics actor, started if need be. Idempotent."""
    options: dict[str, Any] = {
        "name": METRICS_NAME,
        "namespace": NAMESPACE,
        "lifetime": "detached",
        "get_if_exists": True,
        "num_cpus": 0,
        "scheduling_strategy": "DEFAULT",
        "max_restarts": -1,
        "max_task_retries": 0,  # a message without an answer is the sender's to repeat
    }
    return ray.remote(MetricsActor).options(**options).remote(top_experts)


def get_metrics_actor() -> ActorHandle[Any] | None:
    """The cluster's metrics actor; None where there is none."""
    try:
        return ray.get_actor(METRICS_NAME, namespace=NAMESPACE)
    except ValueError:
        return None


def stop_metrics_actor() -> None:
    """End the actor and forget its totals. No error when none runs."""
    handle = get_metrics_actor()
    if handle is not None:
        try:
            ray.get(handle.close.remote(), timeout=_CALL_TIMEOUT_S)
        except RayError as error:
            logger.warning("the metrics actor is ended all the same: %s", error)
        ray.kill(handle, no_restart=True)
    # Again: one that did not answer, or had died, has not done it.
    kv_delete(_SAVED)


def _restored(top_experts: int) -> Aggregator:
    aggregator = Aggregator(top_experts)
    try:
        data = kv_get(_SAVED)
        if data is not None and not aggregator.restore(data):
            logger.warning("the saved totals are of another version, and are left aside")
    except Exception:
        # A constructor that raised would never be called again, and all metrics would stop.
        logger.exception("the saved totals cannot be read; they begin anew")
        return Aggregator(top_experts)
    return aggregator


async def _result(ref: Any) -> Any:
    return await ref
