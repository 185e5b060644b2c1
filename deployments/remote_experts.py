"""What a router replica keeps so that its engine can use expert shards."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import ray

from cluster.client import ensure_controller
from cluster.config import MoonshardConfig
from deployments.accounting import CostWaiter
from deployments.guard import ExpertsGuard
from deployments.table_relay import TableRelay
from routing.cost_slots import CostReader, CostSlots, RequestCost
from routing.engine_state import EngineState
from routing.table_feed import TableFeedServer
from routing.vllm_plugin import PluginSettings, engine_overrides

__all__ = ["RemoteExperts"]

logger = logging.getLogger(__name__)

_CONTROLLER_TIMEOUT_S = 60.0
_COST_SLOTS = 1024
_COST_SLOTS_PER_SEQUENCE = 8
_LOOPBACK = "127.0.0.1"
_PREFIX = "moonshard-"


class RemoteExperts:
    """Controller, table relay, table feed, engine state and guard of one replica.

    Args:
        config: the whole config.
        device: cpu or cuda, where the dense model runs.
    """

    def __init__(self, config: MoonshardConfig, device: str) -> None:
        self._config = config
        self._device = device
        folder = Path("/dev/shm") if Path("/dev/shm").is_dir() else Path(tempfile.gettempdir())
        _remove_leftovers(folder)
        stem = f"{_PREFIX}{os.getpid()}-{secrets.token_hex(4)}"
        self._token_path = folder / f"{stem}.token"
        self.state = EngineState.create(folder / f"{stem}.state")
        num_slots = _COST_SLOTS + _COST_SLOTS_PER_SEQUENCE * config.engine.max_num_seqs
        self._costs = CostSlots.create(folder / f"{stem}.costs", num_slots)
        step_timeout_s = config.dispatch.recovery_timeout_s + config.dispatch.request_timeout_s
        self._cost_waiter = CostWaiter(CostReader(self._costs), step_timeout_s)
        self.guard = ExpertsGuard(self.state, step_timeout_s)
        self._feed: TableFeedServer | None = None
        self._relay: TableRelay | None = None
        self._baseline: dict[str, int] = {}

    async def start(self) -> dict[str, Any]:
        """Bring the shards up and wait until they hold every expert.

        Returns:
            Engine arguments that make vLLM use them.

        Raises:
            MoonshardError: the shards cannot be started; says why.
            TimeoutError: they were not ready in time.
        """
        return await asyncio.to_thread(self._start)

    def engine_started(self) -> None:
        """The engine has opened the files: their names may go, so that nothing can be left."""
        self._remove_files()

    async def cost_of(self, request_id: str) -> RequestCost | None:
        """What the shards spent on a request of the engine's that is over; None when nothing.

        Once only. Waits for the step that may still run for it.
        """
        return await self._cost_waiter.cost_of(request_id)

    def warmed_up(self) -> None:
        """From here on dispatches count as those of users."""
        self._baseline = self.state.snapshot()

    def counters(self) -> dict[str, int]:
        """`EngineState` fields; those that count up, since the warm-up."""
        levels = {"poison", "waiting", "table_version"}
        return {
            name: value if name in levels else value - self._baseline.get(name, 0)
            for name, value in self.state.snapshot().items()
        }

    async def close(self) -> None:
        """Give everything back. The engine must be gone. Idempotent."""
        await asyncio.to_thread(self._close)

    def _start(self) -> dict[str, Any]:
        controller = ensure_controller(self._config)
        token: bytes = ray.get(controller.data_plane_token.remote(), timeout=_CONTROLLER_TIMEOUT_S)
        self._feed = TableFeedServer(_LOOPBACK, token)
        host, port = self._feed.start()
        self._relay = TableRelay(controller, [self._feed.publish, self.guard.table_changed])
        self._relay.start()
        logger.info("waiting for the expert shards")
        self._relay.wait_until_whole(
            self._config.shards.start_timeout_s,
            lambda: logger.info("still waiting for the expert shards"),
        )
        dispatch = self._config.dispatch
        settings = PluginSettings(
            feed=f"{host}:{port}",
            state_path=str(self.state.path),
            costs_path=str(self._costs.path),
            token_file=self._write_token(token),
            recovery_timeout_s=dispatch.recovery_timeout_s,
            request_timeout_s=dispatch.request_timeout_s,
            connect_timeout_s=dispatch.connect_timeout_s,
        )
        return {"additional_config": settings, **engine_overrides(self._device)}

    def _remove_files(self) -> None:
        self.state.unlink()
        self._costs.unlink()
        self._token_path.unlink(missing_ok=True)

    def _write_token(self, token: bytes) -> str:
        descriptor = os.open(self._token_path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(token)
        return str(self._token_path)

    def _close(self) -> None:
        if self._relay is not None:
            self._relay.close()
        if self._feed is not None:
            self._feed.close()
        self._remove_files()
        self.state.close()


def _remove_leftovers(folder: Path) -> None:
    """Files of replicas that were killed while their engine started: nobody else removes them."""
    for file in folder.glob(f"{_PREFIX}*-*.*"):
        pid = file.name.removeprefix(_PREFIX).split("-")[0]
        with suppress(OSError):
            is_ours = pid.isdecimal() and file.stat().st_uid == os.getuid()
            if is_ours and not psutil.pid_exists(int(pid)):
                file.unlink()
