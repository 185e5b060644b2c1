"""The router deployment: each replica runs one vLLM engine and sends rows to the shards."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from typing import Any

from ray.serve.llm import LLMConfig
from ray.serve.llm.deployment import LLMServer

from cluster.config import MoonshardConfig
from deployments.batching import StreamBatcher
from deployments.engine import MoonshardEngine
from deployments.llm_config import device_of
from deployments.remote_experts import RemoteExperts
from deployments.warmup import warm_up

__all__ = ["Router"]

logger = logging.getLogger(__name__)


class Router(LLMServer):  # type: ignore[misc]
    """Ray Serve LLM's server with Moonshard's engine.

    Args:
        llm_config: what `build_llm_config` made.
        config_json: the `MoonshardConfig` as JSON.
        remote_experts: False lets vLLM load and run the experts itself (benchmarks compare).
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, llm_config: LLMConfig, *, config_json: str, remote_experts: bool = True
    ) -> None:
        logging.getLogger("deployments").setLevel(logging.INFO)
        self._init_shared(llm_config)
        self.engine: MoonshardEngine | None
        self._config = MoonshardConfig.model_validate_json(config_json)
        self._batcher = StreamBatcher()
        self._experts: RemoteExperts | None = None
        self._recovery: asyncio.Task[None] | None = None
        if remote_experts:
            self._experts = RemoteExperts(self._config, device_of(self._config))
        await self.start()

    async def start(self) -> None:
        """Shards, engine, warm-up; a replica takes requests when this returns."""
        try:
            if self._experts is not None:
                self._llm_config.update_engine_kwargs(**await self._experts.start())
            self.engine = MoonshardEngine(
                self._llm_config, self._experts.guard if self._experts else None
            )
            await self._start_engine()
            if self._experts is not None:
                self._experts.engine_started()
                self._recovery = asyncio.create_task(
                    self._experts.guard.run(self.engine.client), name="recovery"
                )
            async with asyncio.timeout(self._config.router.start_timeout_s):
                await warm_up(self.engine, self._config.model.id)
            if self._experts is not None:
                self._experts.warmed_up()
        except BaseException:
            await self._close()
            raise

    async def readiness(self) -> dict[str, Any]:
        """{ready, reason}: whether this replica takes requests; why not, or ''."""
        reason = self._experts.guard.refusal() if self._experts else None
        return {"ready": reason is None, "reason": reason or ""}

    async def counters(self) -> dict[str, int]:
        """What the dispatcher counted since the warm-up; empty with vLLM's own experts."""
        return self._experts.counters() if self._experts else {}

    async def check_health(self) -> None:
        """Raises when the replica must be replaced."""
        await super().check_health()
        if self._experts is not None:
            self._experts.guard.check_health()

    async def __del__(self) -> None:
        # Serve calls this when a replica ends, and awaits it.
        await self._close()

    def _batch_output_stream(
        self, generator: AsyncGenerator[Any, None]
    ) -> AsyncGenerator[list[Any], None]:
        return self._batcher.batches(generator)

    async def _close(self) -> None:
        if self._recovery is not None:
            self._recovery.cancel()
            await asyncio.gather(self._recovery, return_exceptions=True)
            self._recovery = None
        engine, self.engine = self.engine, None
        if engine is not None:
            await engine.shutdown()
        experts, self._experts = self._experts, None
        if experts is not None:
            await experts.close()
