"""The controller: one detached Ray actor that keeps wanted and live shards the same."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import ray
from ray import serve
from ray.actor import exit_actor

from cluster.config import MoonshardConfig
from cluster.controller_metrics import ControllerMetrics, ControllerState
from cluster.exceptions import ConfigError, ShardStartError
from cluster.fleet import Fleet, FleetPlan, plan_fleet, remove_leftovers
from cluster.node_prices import with_prices
from cluster.ray_adapter import list_nodes, serve_is_running
from cluster.reconcile import ClusterState, ShardView, Verdict, judge, serving
from cluster.records import (
    ControllerRecord,
    cluster_token,
    load_record,
    next_version,
    store_record,
)
from cluster.status import build_status
from routing.placement import build_table
from routing.table import RoutingTable, ShardEndpoint

__all__ = ["Controller"]

logger = logging.getLogger(__name__)

_APPLICATION_CHECK_S = 2.0
_ABSENT_CHECKS = 2
_TAKE_UP_RETRY_S = 5.0


class Controller:
    """Places, starts and heals the shards, and publishes who holds what.

    All that it must remember lies in Ray's control store, so that it may die at any time: Ray
    starts it again, it finds its shards by name, asks each, and publishes the next table. The
    shards go on serving meanwhile.
    """

    # Ray awaits it before the first call; typing knows no such constructor.
    async def __init__(self) -> None:  # type: ignore[misc]
        logging.basicConfig(level=logging.INFO)
        self._lock = asyncio.Lock()  # one apply, stop or failure at a time
        self._changed = asyncio.Condition()  # a new table, or the end
        self._dirty = asyncio.Event()
        self._fleet: Fleet | None = None
        self._metrics = ControllerMetrics(self._metrics_state)
        self._config: MoonshardConfig | None = None  # prices may differ from the fleet's own
        self._record: ControllerRecord | None = None
        self._failure = ""
        self._table: RoutingTable | None = None
        self._published: dict[str, tuple[ShardEndpoint, float]] | None = None  # with their prices
        self._is_ending = False
        self._token = await asyncio.to_thread(cluster_token)
        self._record = await asyncio.to_thread(load_record)
        # Watched also while there are no shards (a start that failed): nobody else ends this actor.
        self._application = self._record.application if self._record else ""
        self._tasks = [
            asyncio.create_task(self._take_up(), name="take up"),
            asyncio.create_task(self._for_ever(self._publish_when_dirty), name="publish"),
            asyncio.create_task(self._for_ever(self._watch_application), name="application"),
        ]

    async def apply(self, config_json: str, application: str = "", fingerprint: str = "") -> None:
        """Make the shards be as the config says. Idempotent; returns before they are ready.

        Args:
            config_json: a `MoonshardConfig` as JSON.
            application: Serve application on whose behalf; the shards go when it is deleted.
            fingerprint: of the caller's copy of the checkpoint (`ExpertCheckpoint.fingerprint`).

        Raises:
            ConfigError: shards run already, for another model or with other settings.
            CheckpointError, PlacementError: the config and the checkpoint do not fit.
        """
        config = MoonshardConfig.model_validate_json(config_json)
        async with self._lock:
            if self._is_ending:
                exit_actor()  # the caller sees it go, and asks the next one
            if self._fleet is None and self._record is not None:
                await self._start(self._record)  # its shards may be serving
            if self._fleet is not None:
                _refuse_change(self._fleet.plan, config, fingerprint)
                await self._belong_to(application, config_json)
                return
            self._application = application
            await asyncio.to_thread(remove_leftovers)
            await self._start(ControllerRecord(config_json, application))

    async def wait_for_table(self, after_version: int, timeout_s: float) -> bytes | None:
        """The current table once its version exceeds `after_version`; None when none came.

        Tables that are not whole are returned too: the caller must know at once which experts
        are gone.

        Raises:
            ShardStartError: the shards could not be started; says why.
        """
        async with self._changed:
            try:
                await asyncio.wait_for(
                    self._changed.wait_for(lambda: self._failure or self._is_newer(after_version)),
                    timeout_s,
                )
            except TimeoutError:
                return None
        if self._failure:
            raise ShardStartError(self._failure)
        assert self._table is not None
        return self._table.to_bytes()

    async def data_plane_token(self) -> bytes:
        """The secret that dispatchers and shards share."""
        return self._token

    async def status(self) -> dict[str, Any]:
        """See `cluster.status.build_status`; `controller` says where this process runs."""
        nodes = await asyncio.to_thread(list_nodes)
        fleet, record = self._fleet, self._record
        node_id = ray.get_runtime_context().get_node_id()
        status = build_status(
            self._verdict(),
            fleet.plan if fleet else None,
            fleet.views if fleet else [],
            self._table,
            nodes,
            record.application if record else "",
        )
        return status | {"controller": {"pid": os.getpid(), "node_id": node_id}}

    async def shutdown(self) -> None:
        """Drain and end the shards, remove their placement groups, forget the config."""
        async with self._lock:
            self._is_ending = True
            await self._stop(drain=True)

    async def _take_up(self) -> None:
        """After a death: look after the shards again. A constructor that raised would not be
        called again by Ray, so this goes on until it works."""
        while self._record is not None and self._fleet is None:
            try:
                async with self._lock:
                    if self._record is not None and self._fleet is None:
                        logger.info("back again; looking for the shards")
                        await self._start(self._record)
            except Exception:
                logger.exception("the shards could not be taken up; trying again")
                await asyncio.sleep(_TAKE_UP_RETRY_S)

    async def _belong_to(self, application: str, config_json: str) -> None:
        """The shards go with the application that asked for them last, at its prices."""
        record = self._record
        assert record is not None
        self._application = application or record.application
        adopted = replace(record, application=self._application, config_json=config_json)
        if adopted == record:
            return
        self._record = adopted
        await asyncio.to_thread(store_record, adopted)
        self._config = MoonshardConfig.model_validate_json(config_json)
        await self._metrics.start(self._config)
        self._dirty.set()

    async def _start(self, record: ControllerRecord) -> None:
        config = MoonshardConfig.model_validate_json(record.config_json)
        plan = await asyncio.to_thread(plan_fleet, config)
        await asyncio.to_thread(store_record, record)
        self._record, self._failure, self._config = record, "", config
        await self._metrics.start(config)
        self._fleet = Fleet(plan, self._token, self._shard_changed)
        self._fleet.start()
        logger.info("wanted: %d shards of %s", len(plan.held), config.model.id)

    async def _stop(self, *, drain: bool) -> None:
        if (fleet := self._fleet) is not None:
            await fleet.stop(fleet.plan.config.shards.drain_timeout_s if drain else 0)
        else:
            await asyncio.to_thread(remove_leftovers)
        await self._metrics.stop()  # behind the shards, which hand on their last counts
        await asyncio.to_thread(store_record, None)
        self._fleet = self._record = None
        self._table = self._published = None

    def _metrics_state(self) -> ControllerState:
        fleet, table = self._fleet, self._table
        return ControllerState(fleet.views if fleet else [], table.version if table else 0)

    def _shard_changed(self, view: ShardView) -> None:
        self._dirty.set()

    def _verdict(self) -> Verdict:
        if self._failure:
            return Verdict(ClusterState.FAILED, self._failure)
        if self._record is None:
            return Verdict(ClusterState.STOPPED, "no shards were asked for")
        if self._fleet is None:
            return Verdict(ClusterState.STARTING, "the controller looks for its shards")
        return judge(self._fleet.views, established=self._record.established)

    def _is_newer(self, version: int) -> bool:
        return self._table is not None and self._table.version > version

    async def _for_ever(self, step: Callable[[], Awaitable[None]]) -> None:
        while True:
            try:
                await step()
            except Exception:
                logger.exception("the controller goes on after")
                await asyncio.sleep(1)

    async def _publish_when_dirty(self) -> None:
        await self._dirty.wait()
        self._dirty.clear()
        async with self._lock:
            try:
                await self._publish()
            except BaseException:
                self._dirty.set()  # views that do not change would not ask for it again
                raise

    async def _publish(self) -> None:
        fleet, record, verdict = self._fleet, self._record, self._verdict()
        config = self._config
        if fleet is None or record is None or config is None:
            return
        if verdict.state is ClusterState.FAILED:
            await self._fail(verdict.reason)
            return
        if verdict.state is ClusterState.READY and not record.established:
            self._record = record.as_established()
            await asyncio.to_thread(store_record, self._record)
        views = fleet.views
        endpoints = serving(views)
        if endpoints is None:
            return
        nodes = await asyncio.to_thread(list_nodes)
        endpoints = with_prices(endpoints, views, nodes, config.costs)
        priced = {name: (endpoint, endpoint.usd_per_hour) for name, endpoint in endpoints.items()}
        if priced == self._published:
            return
        table = await asyncio.to_thread(_make_table, fleet.plan, endpoints)
        logger.info(
            "table %d: %d of %d shards", table.version, len(endpoints), len(fleet.plan.held)
        )
        self._table, self._published = table, priced
        async with self._changed:
            self._changed.notify_all()

    async def _fail(self, reason: str) -> None:
        logger.error("the shards could not be started: %s", reason)
        await self._stop(drain=False)
        self._failure = reason
        async with self._changed:
            self._changed.notify_all()

    async def _watch_application(self) -> None:
        """End all when the Serve application for which this was started is gone."""
        absent = 0
        while absent < _ABSENT_CHECKS:
            await asyncio.sleep(_APPLICATION_CHECK_S)
            name = self._application
            gone = bool(name) and not await asyncio.to_thread(_application_exists, name)
            absent = absent + 1 if gone else 0
        logger.info("the application is gone; so go the shards and the controller")
        await self.shutdown()
        ray.kill(ray.get_runtime_context().current_actor, no_restart=True)


def _make_table(plan: FleetPlan, endpoints: dict[str, ShardEndpoint]) -> RoutingTable:
    return build_table(next_version(), plan.layers, plan.num_experts, endpoints, plan.held)


def _application_exists(name: str) -> bool:
    return serve_is_running() and name in serve.status().applications


def _refuse_change(plan: FleetPlan, wanted: MoonshardConfig, fingerprint: str) -> None:
    running = plan.config
    for section in ("model", "shards"):
        old, new = getattr(running, section), getattr(wanted, section)
        for name in type(old).model_fields:
            before, after = getattr(old, name), getattr(new, name)
            if before != after:
                raise ConfigError(
                    f"{section}.{name} is {after!r}, but the shards that run were started with "
                    f"{before!r}; stop them first (`moonshard stop`)"
                )
    if fingerprint and fingerprint != plan.fingerprint:
        raise ConfigError(
            f"the checkpoint {wanted.model.path} on this node is not the one that the shards were "
            "started with; make the copies equal, or stop the shards first (`moonshard stop`)"
        )
