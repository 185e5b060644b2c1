"""The router deployment: each replica runs one vLLM engine and sends rows to the shards."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack
from typing import Any

from ray import serve
from ray.serve.llm import LLMConfig
from ray.serve.llm.deployment import LLMServer

from cluster.config import MoonshardConfig
from cluster.metrics_actor import MetricsSender
from deployments.accounting import ACCOUNT_HEADER, Accounts, RequestAccount, Shipper, metered
from deployments.batching import StreamBatcher
from deployments.engine import MoonshardEngine
from deployments.llm_config import device_of
from deployments.names import INGRESS_NAME
from deployments.remote_experts import RemoteExperts
from deployments.router_metrics import RouterMetrics
from deployments.scaling import WAITING
from deployments.warmup import warm_up
from monitoring.usage import ExpertCost, UsageRecord
from monitoring.write_ahead import UsageLog

__all__ = ["Router"]

logger = logging.getLogger(__name__)

_SEND_TIMEOUT_S = 30.0
_DRAIN_TIMEOUT_S = 10.0
_METRICS_TIMEOUT_S = 5.0


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
        self._accounts: Accounts | None = None
        self._shipper: Shipper | None = None
        self._metrics: RouterMetrics | None = None
        self._ingress: Any = None
        if remote_experts:
            self._experts = RemoteExperts(self._config, device_of(self._config))
        await self.start()

    async def start(self) -> None:
        """Shards, engine, warm-up; a replica takes requests when this returns."""
        try:
            self._start_accounting()
            if self._experts is not None:
                self._llm_config.update_engine_kwargs(**await self._experts.start())
            self.engine = MoonshardEngine(
                self._llm_config,
                self._experts.guard if self._experts else None,
                self._config.gateway.default_max_tokens,
            )
            await self._start_engine()
            if self._experts is not None:
                self._experts.engine_started()
                self.engine.client.expert_costs = self._expert_cost
                self._recovery = asyncio.create_task(
                    self._experts.guard.run(self.engine.client), name="recovery"
                )
            async with asyncio.timeout(self._config.router.start_timeout_s):
                await warm_up(self.engine, self._config.model.id)
            if self._experts is not None:
                self._experts.warmed_up()
            self._start_metrics()
        except BaseException:
            await self._close()
            raise

    async def chat(self, request: Any, raw_request_info: Any = None) -> AsyncGenerator[Any, None]:
        """See `LLMServer.chat`; with an account in the headers, as `metered` has it."""
        answer = await super().chat(request, raw_request_info)
        return self._metered(answer, "chat", raw_request_info)

    async def completions(
        self, request: Any, raw_request_info: Any = None
    ) -> AsyncGenerator[Any, None]:
        """See `LLMServer.completions`; with an account in the headers, as `metered` has it."""
        answer = await super().completions(request, raw_request_info)
        return self._metered(answer, "completions", raw_request_info)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What Ray Serve's autoscaler cannot see; `deployments.scaling` reads it."""
        return {WAITING: self._metrics.num_waiting if self._metrics is not None else 0}

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

    def _start_accounting(self) -> None:
        replica = serve.get_replica_context().replica_id.unique_id
        folder = self._config.ledger.write_ahead_path
        log = UsageLog.create(folder, replica)
        self._shipper = Shipper(log, folder, self._send_usage)
        self._accounts = Accounts(log, replica, self._config.model.id, self._shipper.wake)
        self._shipper.start()

    def _start_metrics(self) -> None:
        assert self._shipper is not None
        context = serve.get_replica_context()
        self._metrics = RouterMetrics(
            context.replica_id.unique_id,
            context.app_name,
            self._experts,
            self._shipper.backlog,
            MetricsSender().send,
            self._config.metrics.push_interval_s,
        )
        self._metrics.start()

    def _metered(
        self, answer: AsyncGenerator[Any, None], endpoint: str, raw_request_info: Any
    ) -> AsyncGenerator[Any, None]:
        headers = raw_request_info.headers if raw_request_info is not None else {}
        header = headers.get(ACCOUNT_HEADER)
        if header is None:
            return answer
        return metered(answer, lambda: self._open_account(header, endpoint))

    def _open_account(self, header: str, endpoint: str) -> RequestAccount:
        if self._accounts is None:
            raise RuntimeError("the replica has ended")
        return self._accounts.open(header, endpoint)

    async def _send_usage(self, records: list[UsageRecord]) -> None:
        if self._ingress is None:
            app_name = serve.get_replica_context().app_name
            self._ingress = serve.get_deployment_handle(INGRESS_NAME, app_name)
        async with asyncio.timeout(_SEND_TIMEOUT_S):
            await self._ingress.record_usage.remote([record.to_json() for record in records])

    async def _expert_cost(self, request_id: str) -> ExpertCost | None:
        cost = await self._experts.cost_of(request_id) if self._experts is not None else None
        if cost is None:
            return None
        prompt_ns, generation_ns, nano_usd = map(round, cost)
        return ExpertCost(prompt_ns, generation_ns, nano_usd)

    async def _close(self) -> None:
        accounts, self._accounts = self._accounts, None
        shipper, self._shipper = self._shipper, None
        # The last comes first, and each has its turn whatever became of the ones before.
        async with AsyncExitStack() as steps:
            if shipper is not None:
                steps.push_async_callback(shipper.close)
                steps.push_async_callback(shipper.drain, _DRAIN_TIMEOUT_S)
            if accounts is not None:
                steps.callback(accounts.abandon_all)
            steps.push_async_callback(self._close_engine)

    async def _close_engine(self) -> None:
        recovery, self._recovery = self._recovery, None
        engine, self.engine = self.engine, None
        metrics, self._metrics = self._metrics, None
        async with AsyncExitStack() as steps:
            steps.push_async_callback(self._close_experts)
            if metrics is not None:
                steps.push_async_callback(_close_metrics, metrics)
            if engine is not None:
                steps.push_async_callback(engine.shutdown)
            if recovery is not None:
                recovery.cancel()
                await asyncio.gather(recovery, return_exceptions=True)

    async def _close_experts(self) -> None:
        # Not before: requests that end while the engine does ask what they have cost.
        experts, self._experts = self._experts, None
        if experts is not None:
            await experts.close()


async def _close_metrics(metrics: RouterMetrics) -> None:
    try:
        async with asyncio.timeout(_METRICS_TIMEOUT_S):
            await metrics.close()
    except TimeoutError:
        logger.warning("the last metrics did not get to the metrics actor")
