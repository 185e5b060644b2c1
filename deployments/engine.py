"""The vLLM engine of a router replica: Ray Serve LLM's, with the guard and exact parsing in it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from typing import Any

from ray.llm._internal.serve.engines.vllm.vllm_engine import (
    VLLMEngine,
    _clear_current_platform_cache,
)
from ray.serve.llm import LLMConfig
from vllm.outputs import STREAM_FINISHED
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.executor.abstract import Executor
from vllm.v1.executor.uniproc_executor import UniProcExecutor
from vllm.v1.metrics.ray_wrappers import RayPrometheusStatLogger

from deployments import chat_renderer
from deployments.answers import Answers
from deployments.engine_start import one_line_on_failure
from deployments.exact_parser import exact
from deployments.guard import ExpertsGuard

__all__ = ["MoonshardAsyncLLM", "MoonshardEngine"]

logger = logging.getLogger(__name__)

_DRAIN_TIMEOUT_S = 30.0
_SHUTDOWN_TIMEOUT_S = 10.0


class MoonshardAsyncLLM(AsyncLLM):  # type: ignore[misc]
    """AsyncLLM that asks the guard, and that sees aborted requests to their final output."""

    guard: ExpertsGuard | None = None

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._running: set[Any] = set()
        self._drains: set[asyncio.Task[None]] = set()

    async def generate(
        self, prompt: Any, sampling_params: SamplingParams, request_id: str, **options: Any
    ) -> AsyncGenerator[Any, None]:
        """See `AsyncLLM.generate`.

        Raises:
            ExpertsUnavailable: the answer cannot be given, or what was given cannot go on.
        """
        guard = self.guard
        admitted = guard.admit() if guard else 0
        collector = await self.add_request(request_id, prompt, sampling_params, **options)
        self._running.add(collector)
        finished = False
        try:
            while not finished:
                output = collector.get_nowait() or await collector.get()
                finished = output.finished
                if guard:
                    guard.check(admitted)
                if output is not STREAM_FINISHED:
                    yield output
        except EngineDeadError:
            finished = True  # nobody is left to abort at
            raise
        finally:
            collector.close()
            if finished:
                self._running.discard(collector)
            else:
                task = asyncio.get_running_loop().create_task(self._drain(collector))
                self._drains.add(task)
                task.add_done_callback(self._drains.discard)

    async def abort_all(self) -> None:
        """End every running request. Each gets a final output, which the guard then refuses."""
        await self.abort([collector.request_id for collector in self._running], internal=True)

    async def close(self) -> None:
        """Shut the engine down; requests that are left end."""
        for task in self._drains:
            task.cancel()
        await asyncio.gather(*self._drains, return_exceptions=True)
        if self.output_handler is not None:
            # It would take the end of the engine's process for a failure.
            self.output_handler.cancel()
            await asyncio.gather(self.output_handler, return_exceptions=True)
        await asyncio.to_thread(self.shutdown, _SHUTDOWN_TIMEOUT_S)

    async def _drain(self, collector: Any) -> None:
        # Tokens may have been made since the caller was last served: the final output has them.
        try:
            async with asyncio.timeout(_DRAIN_TIMEOUT_S):
                await self.abort(collector.request_id, internal=True)
                while not (await collector.get()).finished:
                    pass
        except (TimeoutError, EngineDeadError) as error:
            logger.warning("request %s had no final output: %r", collector.request_id, error)
        finally:
            self._running.discard(collector)


class MoonshardEngine(VLLMEngine):  # type: ignore[misc]
    """Ray Serve LLM's engine with our client, renderer, parser and answers."""

    def __init__(self, llm_config: LLMConfig, guard: ExpertsGuard | None) -> None:
        super().__init__(llm_config)
        self._guard = guard
        self._answers = Answers()

    @property
    def client(self) -> MoonshardAsyncLLM:
        """The running engine."""
        assert isinstance(self._engine_client, MoonshardAsyncLLM)
        return self._engine_client

    async def start(self) -> None:
        """Start the engine."""
        chat_renderer.register()
        await super().start()
        self._answers = Answers(max_model_len=self.client.model_config.max_model_len)
        serving = self._oai_serving_chat
        if serving is not None and serving.parser_cls is not None:
            serving.parser_cls = exact(serving.parser_cls)

    async def shutdown(self) -> None:
        """End the engine's processes."""
        await super().shutdown()
        if self._engine_client is not None:
            await self.client.close()

    async def chat(self, request: Any, raw_request_info: Any = None) -> AsyncGenerator[Any, None]:
        """See `VLLMEngine.chat`; answers as `Answers` shapes them."""
        stream = super().chat(request, raw_request_info)
        async for item in self._answers.shape(stream, self._guard):
            yield item

    async def completions(
        self, request: Any, raw_request_info: Any = None
    ) -> AsyncGenerator[Any, None]:
        """See `VLLMEngine.completions`; answers as `Answers` shapes them."""
        stream = super().completions(request, raw_request_info)
        async for item in self._answers.shape(stream, self._guard):
            yield item

    def _start_async_llm_engine(
        self, vllm_engine_args: Any, vllm_engine_config: Any, placement_group: Any
    ) -> MoonshardAsyncLLM:
        _clear_current_platform_cache()  # as the base class does
        parallel_config = vllm_engine_config.parallel_config
        parallel_config.placement_group = placement_group
        if parallel_config.distributed_executor_backend == "mp":
            # One rank on a CPU needs no worker process beside the engine core's: without it a step
            # is not handed from process to process, and nothing polls in between. vLLM asks for
            # "mp" to set OpenMP up per worker; our environment (`llm_config`) already has.
            parallel_config.distributed_executor_backend = UniProcExecutor
        loggers = [RayPrometheusStatLogger] if self.llm_config.log_engine_metrics else None
        with one_line_on_failure():
            engine = MoonshardAsyncLLM(
                vllm_config=vllm_engine_config,
                executor_class=Executor.get_class(vllm_engine_config),
                log_requests=vllm_engine_args.enable_log_requests,
                log_stats=not vllm_engine_args.disable_log_stats,
                stat_loggers=loggers,
            )
        engine.guard = self._guard
        return engine
