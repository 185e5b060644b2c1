"""Keeps one shard alive: places it, starts it, watches it, and tells the controller."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorUnavailableError, RayActorError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.config import ShardsConfig
from cluster.names import NAMESPACE, SHARD_PREFIX, actor_name
from cluster.placement_groups import (
    NodeChoice,
    choose_node,
    create_group,
    explain_no_room,
    forbidden_nodes,
)
from cluster.ray_adapter import ActorInfo, GroupInfo, actor_info, list_groups, list_nodes
from cluster.reconcile import (
    Phase,
    ShardReport,
    ShardView,
    after_closed_connection,
    after_death,
    after_report,
    after_unplaced,
    next_restart_delay_s,
)
from cluster.shard import ExpertShard, ShardSpec
from cluster.watch import ConnectionWatch

__all__ = ["ShardKeeper", "ShardPlan"]

logger = logging.getLogger(__name__)

_REPORT_TIMEOUT_S = 10.0
_MAX_SILENT = 6
_BUSY_PAUSE_S = 0.2
_CALM_PAUSE_S = 1.0


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """A wanted shard: what it holds, what Ray reserves for it, and the settings it runs under."""

    spec: ShardSpec
    resources: Mapping[str, float]
    config: ShardsConfig


class ShardKeeper:
    """The task that owns one shard.

    Args:
        plan: the wanted shard.
        placing: shared by all keepers, so that each sees where the one before went.
        on_change: called with every new view, on the event loop.
    """

    def __init__(
        self, plan: ShardPlan, placing: asyncio.Lock, on_change: Callable[[ShardView], None]
    ) -> None:
        self.plan = plan
        self.view = ShardView(plan.spec.shard_id)
        self._placing = placing
        self._on_change = on_change
        self._handle: ActorHandle[Any] | None = None
        self._watch = ConnectionWatch(plan.spec.token, self._connection_closed)
        self._wake = asyncio.Event()
        self._has_process = False
        self._failures = 0
        self._num_silent = 0
        self._not_ready_since = time.monotonic()

    async def run(self) -> None:
        """Look, act, pause; until cancelled."""
        try:
            while True:
                try:
                    await self._step()
                except Exception:
                    # One bad look must not end the watch over a shard that may be serving.
                    logger.exception("%s: looking after it failed", self.view.shard_id)
                await self._pause()
        finally:
            self._watch.close()

    async def drain(self, deadline_s: float) -> None:
        """Let the shard finish what it has accepted; a dead one is drained."""
        if self._handle is None or self.view.phase in (Phase.DEAD, Phase.PLACING):
            return
        try:
            await asyncio.wait_for(_result(self._handle.drain.remote(deadline_s)), deadline_s + 5)
        except (RayActorError, TimeoutError) as error:
            logger.warning("%s was not drained: %s", self.view.shard_id, _one_line(error))

    async def _step(self) -> None:
        if self._handle is None:
            self._handle = await asyncio.to_thread(self._find)
        if self._handle is None:
            await self._create()
            return
        info = await asyncio.to_thread(actor_info, self._handle._actor_id.hex())
        self._has_process = info is not None and info.state == "ALIVE"
        if info is None or info.state == "DEAD":
            cause = info.death_cause if info else "Ray has forgotten it"
            self._watch.close()
            self._see(after_death(self.view, final=True, reason=cause))
        elif info.state == "ALIVE":
            await self._ask(info)
        else:
            await self._await_process(info)
        await self._check_deadline()

    def _find(self) -> ActorHandle[Any] | None:
        try:
            return ray.get_actor(actor_name(self.view.shard_id), namespace=NAMESPACE)
        except ValueError:
            return None

    async def _create(self) -> None:
        async with self._placing:
            work = asyncio.ensure_future(asyncio.to_thread(self._place_and_start))
            try:
                self._handle, reason = await asyncio.shield(work)
            except asyncio.CancelledError:
                # The thread goes on: whoever takes the shards down must see what it has made.
                await asyncio.gather(work, return_exceptions=True)
                raise
        self._see(after_unplaced(self.view, reason))

    def _place_and_start(self) -> tuple[ActorHandle[Any], str]:
        name = actor_name(self.view.shard_id)
        groups = list_groups()
        reason = "waits for its process"
        if name in groups:
            group = groups[name].group
        else:
            choice = self._choose(groups)
            if choice is None:
                # Ask all the same: a pending group is what makes an autoscaler add a node.
                reason = self._no_room(groups)
                strategy = self.plan.config.placement_strategy
                choice = NodeChoice("", forbidden_nodes(strategy, _occupants(groups)))
            group = create_group(name, self.plan.resources, choice)
            if not group.wait(2):
                logger.info("%s: its placement group is pending", self.view.shard_id)
        return self._start_actor(name, group), reason

    def _choose(self, groups: Mapping[str, GroupInfo]) -> NodeChoice | None:
        strategy = self.plan.config.placement_strategy
        return choose_node(strategy, self.plan.resources, list_nodes(), _occupants(groups))

    def _no_room(self, groups: Mapping[str, GroupInfo]) -> str:
        return explain_no_room(
            self.view.shard_id,
            self.plan.config.placement_strategy,
            self.plan.resources,
            list_nodes(),
            _occupants(groups),
        )

    def _start_actor(self, name: str, group: Any) -> ActorHandle[Any]:
        config, wanted = self.plan.config, dict(self.plan.resources)
        options: dict[str, Any] = {
            "name": name,
            "namespace": NAMESPACE,
            "lifetime": "detached",  # must outlive a controller that dies
            "get_if_exists": True,
            "num_cpus": wanted.pop("CPU", 0),
            "num_gpus": wanted.pop("GPU", 0),
            "memory": wanted.pop("memory", None),
            "resources": wanted,
            "max_restarts": config.max_restarts,
            "max_task_retries": 0,
            "max_concurrency": 4,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(group, 0),
            "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(config.num_threads)}},
        }
        return ray.remote(ExpertShard).options(**options).remote(self.plan.spec)

    async def _ask(self, info: ActorInfo) -> None:
        assert self._handle is not None
        try:
            report: ShardReport = await asyncio.wait_for(
                _result(self._handle.report.remote()), _REPORT_TIMEOUT_S
            )
        except ActorUnavailableError as error:
            if self._watch.is_open:
                # Ray cannot reach it just now, but we can: it goes on serving.
                logger.warning("%s: %s", self.view.shard_id, _one_line(error))
                return
            self._see(after_death(self.view, final=False, reason=_one_line(error)))
            return
        except RayActorError as error:
            self._see(after_death(self.view, final=False, reason=_one_line(error)))
            return
        except TimeoutError:
            await self._bear_silence()
            return
        self._num_silent = 0
        connected = report.phase is Phase.READY and await self._watch.connect(
            self.view.shard_id, report
        )
        view = after_report(self.view, report, connected=connected)
        self._see(_with_restarts(view, info))

    async def _bear_silence(self) -> None:
        """It does not report. Slow is not dead: whether rows get through is for the connections to
        say. But one that stays silent hangs, and takes rows that it will never answer."""
        self._num_silent += 1
        waited_s = self._num_silent * _REPORT_TIMEOUT_S
        logger.warning("%s has not reported for %g s", self.view.shard_id, waited_s)
        if self.view.phase is Phase.UNKNOWN or self._num_silent >= _MAX_SILENT:
            self._watch.close()
            self._see(after_death(self.view, final=False, reason="it does not report"))
        if self._num_silent >= _MAX_SILENT and self._handle is not None:
            self._num_silent = 0
            await asyncio.to_thread(ray.kill, self._handle, no_restart=False)

    async def _await_process(self, info: ActorInfo) -> None:
        view = _with_restarts(self.view, info)
        if info.state == "RESTARTING" and self.view.phase is not Phase.PLACING:
            view = after_death(view, final=False, reason="Ray is starting it again")
        groups = await asyncio.to_thread(list_groups)
        group = groups.get(actor_name(self.view.shard_id))
        if group is not None and not group.node_id:
            reason = "waits for its placement group"
            if await asyncio.to_thread(self._choose, groups) is None:
                reason = await asyncio.to_thread(self._no_room, groups)
            view = after_unplaced(view, reason)
        self._see(view)

    async def _check_deadline(self) -> None:
        """A shard that cannot load is started again, later and later; so is one that hangs."""
        if self.view.phase is Phase.READY:
            self._failures, self._not_ready_since = 0, time.monotonic()
            return
        waited_s = time.monotonic() - self._not_ready_since
        late = waited_s > self.plan.config.start_timeout_s
        if late and self.view.phase not in (Phase.DEAD, Phase.DRAINING, Phase.FAILED):
            timeout_s = self.plan.config.start_timeout_s
            reason = f"not ready within shards.start_timeout_s ({timeout_s:g} s)"
            reason += f": {self.view.reason}"
            self._see(replace(self.view, phase=Phase.FAILED, reason=reason))
        if self.view.phase is Phase.FAILED:
            await self._restart_failed()

    async def _restart_failed(self) -> None:
        delay_s = next_restart_delay_s(self._failures)
        self._failures += 1
        shard_id, reason = self.view.shard_id, self.view.reason
        logger.error("%s failed (%s); trying again in %g s", shard_id, reason, delay_s)
        await asyncio.sleep(delay_s)
        self._not_ready_since = time.monotonic()
        if self._handle is not None and self._has_process:
            await asyncio.to_thread(ray.kill, self._handle, no_restart=False)

    def _connection_closed(self) -> None:
        self._see(after_closed_connection(self.view))
        self._wake.set()

    def _see(self, view: ShardView) -> None:
        changed = _public(view) != _public(self.view)
        if changed and view.phase is not self.view.phase:
            logger.info("%s: %s -> %s %s", view.shard_id, self.view.phase, view.phase, view.reason)
        self.view = view
        if changed:
            self._on_change(view)

    async def _pause(self) -> None:
        calm = self.view.phase in (Phase.READY, Phase.DEAD)
        try:
            await asyncio.wait_for(self._wake.wait(), _CALM_PAUSE_S if calm else _BUSY_PAUSE_S)
        except TimeoutError:
            return
        self._wake.clear()


def _public(view: ShardView) -> tuple[object, ...]:
    """What others must hear of when it changes: where it is, and which life of it."""
    report = view.report
    life = (report.incarnation, report.host, report.port) if report else None
    return view.phase, view.reason, life


def _occupants(groups: Mapping[str, GroupInfo]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name, group in groups.items():
        if name.startswith(SHARD_PREFIX) and group.node_id:
            counts[group.node_id] = counts.get(group.node_id, 0) + 1
    return counts


def _with_restarts(view: ShardView, info: ActorInfo) -> ShardView:
    return replace(view, num_restarts=info.num_restarts)


async def _result(ref: Any) -> Any:
    return await ref


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
