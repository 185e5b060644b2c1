"""The vLLM engine of a router replica: Ray Serve LLM's, with the guard and exact parsing in it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from ray.llm._internal.serve.engines.vllm.vllm_engine import (
    VLLMEngine,
    _clear_current_platform_cache,
)
from ray.serve.llm import LLMConfig
from vllm.outputs import STREAM_FINISHED
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.executor.abstract import Executor
from vllm.v1.executor.uniproc_executor import UniProcExecutor
from vllm.v1.metrics.ray_wrappers import RayPrometheusStatLogger

from deployments import chat_renderer
from deployments.accounting import CallCounter, ReasoningRule, counting, current_account
from deployments.answers import Answers
from deployments.engine_start import one_line_on_failure
from deployments.exact_parser import exact
from deployments.guard import ExpertsGuard, ExpertsUnavailable
from monitoring.usage import ExpertCost

__all__ = ["ExpertCosts", "MoonshardAsyncLLM", "MoonshardEngine"]

logger = logging.getLogger(__name__)

ExpertCosts = Callable[[str], ExpertCost | Awaitable[ExpertCost | None] | None]
"""What the shards spent on a request of the engine's that is over, by its id there."""

_DRAIN_TIMEOUT_S = 30.0
_SETTLE_TIMEOUT_S = 10.0
_SHUTDOWN_TIMEOUT_S = 10.0


@dataclass
class _Call:
    """One call of `generate`.

    Attributes:
        admitted: what the guard wants back.
        request_ids: of its choices in the engine, once they are known.
        counter: of the request's account; None for a request of our own.
        collector: gets its outputs, once it is in the engine.
        first_choice: vLLM's state of it.
    """

    admitted: int
    counter: CallCounter | None
    request_ids: list[str] = field(default_factory=list)
    collector: Any = None
    first_choice: Any = None


class MoonshardAsyncLLM(AsyncLLM):  # type: ignore[misc]
    """AsyncLLM that asks the guard, sees aborted requests to their final output, and counts.

    Attributes:
        guard: None lets everything in and out.
        expert_costs: what the shards spent on a request of the engine's (a choice each); asked
            once, after its final output.
        reasoning_rule: which tokens are thoughts; None counts none.
    """

    guard: ExpertsGuard | None = None
    expert_costs: ExpertCosts | None = None
    reasoning_rule: ReasoningRule | None = None

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._running: set[Any] = set()
        self._background: set[asyncio.Task[None]] = set()

    async def generate(
        self, prompt: Any, sampling_params: SamplingParams, request_id: str, **options: Any
    ) -> AsyncGenerator[Any, None]:
        """See `AsyncLLM.generate`. Every output is counted before it is handed on.

        What the caller leaves behind is counted too, for it was made for him. An output that the
        guard refuses is not: nobody gets it, and the caller is not to blame.

        Raises:
            ExpertsUnavailable: the answer cannot be given, or what was given cannot go on.
        """
        guard = self.guard
        call = _Call(guard.admit() if guard else 0, self._counter(sampling_params, options))
        adding = asyncio.create_task(
            self.add_request(request_id, prompt, sampling_params, **options)
        )
        try:
            # A caller that leaves just now must not leave a request behind that nobody counts.
            self._added(call, await asyncio.shield(adding), sampling_params)
        except asyncio.CancelledError:
            self._spawn(self._drain_when_added(call, adding, sampling_params))
            raise
        except BaseException:
            self._end(call)
            raise
        collector = call.collector
        finished = False
        try:
            while not finished:
                output = collector.get_nowait() or await collector.get()
                finished = output.finished
                if guard:
                    guard.check(call.admitted)
                if output is not STREAM_FINISHED:
                    self._count(call, output)
                    yield output
        except EngineDeadError:
            finished = True  # nobody is left to abort at
            raise
        finally:
            collector.close()
            if finished:
                self._running.discard(collector)
                self._end(call)
            else:
                self._spawn(self._drain(call))

    async def abort_all(self) -> None:
        """End every running request. Each gets a final output, which the guard then refuses."""
        await self.abort([collector.request_id for collector in self._running], internal=True)

    async def close(self) -> None:
        """Shut the engine down; requests that are left end."""
        await self._end_background()
        if self.output_handler is not None:
            # It would take the end of the engine's process for a failure.
            self.output_handler.cancel()
            await asyncio.gather(self.output_handler, return_exceptions=True)
        await asyncio.to_thread(self.shutdown, _SHUTDOWN_TIMEOUT_S)

    async def _add_request(
        self, request: Any, prompt: Any, parent_req: Any, index: int, queue: Any
    ) -> None:
        await super()._add_request(request, prompt, parent_req, index, queue)
        if index == 0:
            # When the last choice is in, the first may be over, and its state gone.
            queue.first_choice = self.output_processor.request_states.get(request.request_id)

    async def _end_background(self) -> None:
        """Let drains and costs come to their end: what they find out belongs in the records."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_SETTLE_TIMEOUT_S):
                while self._background:
                    await asyncio.wait(self._background)
        while self._background:  # a drain that ends may leave a cost to be found out
            # Tasks that have just been made see what there is to count when they first run.
            await asyncio.sleep(0)
            for task in self._background:
                task.cancel()
            await asyncio.gather(*self._background, return_exceptions=True)

    def _counter(
        self, sampling_params: SamplingParams, options: dict[str, Any]
    ) -> CallCounter | None:
        account = current_account()
        if account is None:
            return None
        # The chat endpoint passes these on; a bare prompt has none.
        chat = options.get("reasoning_parser_kwargs")
        return account.begin_call(
            is_delta=sampling_params.output_kind == RequestOutputKind.DELTA,
            rule=self.reasoning_rule,
            template_variables=None if chat is None else chat["chat_template_kwargs"],
        )

    def _added(self, call: _Call, collector: Any, sampling_params: SamplingParams) -> None:
        call.collector = collector
        self._running.add(collector)
        own_id, num_choices = collector.request_id, sampling_params.n
        if num_choices == 1:
            call.request_ids = [own_id]
        else:
            call.request_ids = [f"{index}_{own_id}" for index in range(num_choices)]
        call.first_choice = getattr(collector, "first_choice", None)

    def _count(self, call: _Call, output: Any) -> None:
        if call.counter is None:
            return
        first = call.first_choice
        is_known = first is not None and not first.is_prefilling
        call.counter.count(output, first.num_cached_tokens if is_known else None)

    async def _drain(self, call: _Call) -> None:
        # Tokens may have been made since the caller was last served: the final output has them.
        # They are billed, unless experts were missing while they were made.
        collector = call.collector
        try:
            async with asyncio.timeout(_DRAIN_TIMEOUT_S):
                await self.abort(collector.request_id, internal=True)
                while not self._drain_one(call, await collector.get()):
                    pass
        except (TimeoutError, EngineDeadError) as error:
            logger.warning("request %s had no final output: %r", collector.request_id, error)
        finally:
            with suppress(Exception):  # an output may be an error of the engine's, in a log by now
                while output := collector.get_nowait():
                    self._drain_one(call, output)
            self._running.discard(collector)
            self._end(call)

    def _drain_one(self, call: _Call, output: Any) -> bool:
        """Count an output that nobody gets; whether it was the last."""
        if output is not STREAM_FINISHED:
            with suppress(ExpertsUnavailable):
                if self.guard:
                    self.guard.check(call.admitted)
                self._count(call, output)
        return bool(output.finished)

    async def _drain_when_added(
        self, call: _Call, adding: asyncio.Task[Any], sampling_params: SamplingParams
    ) -> None:
        try:
            self._added(call, await adding, sampling_params)
        except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - nobody is left to tell
            logger.info("a request that was given up did not enter: %r", error)
            self._end(call)
            return
        await self._drain(call)

    def _end(self, call: _Call) -> None:
        """The call has seen its final output."""
        found: list[Any] = []
        if self.expert_costs is not None:
            try:
                found = [self.expert_costs(request_id) for request_id in call.request_ids]
            except Exception:
                # Whatever is wrong there, the record of the request must be written.
                logger.exception("what the experts cost is not known")
        if any(isinstance(cost, Awaitable) for cost in found):
            self._spawn(self._settle(call, found))
        else:
            self._settle_now(call, found)

    async def _settle(self, call: _Call, found: list[Any]) -> None:
        pending = [cost for cost in found if isinstance(cost, Awaitable)]
        known = [cost for cost in found if not isinstance(cost, Awaitable)]
        try:
            known += await asyncio.gather(*pending, return_exceptions=True)
        finally:
            self._settle_now(call, known)

    def _settle_now(self, call: _Call, costs: list[Any]) -> None:
        if call.counter is None:
            return
        for cost in costs:
            if isinstance(cost, ExpertCost):
                call.counter.add_cost(cost)
            elif isinstance(cost, Exception):
                logger.error("what the experts cost is not known", exc_info=cost)
        call.counter.end()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)


class MoonshardEngine(VLLMEngine):  # type: ignore[misc]
    """Ray Serve LLM's engine with our client, renderer, parser and answers."""

    def __init__(
        self, llm_config: LLMConfig, guard: ExpertsGuard | None, default_max_tokens: int
    ) -> None:
        super().__init__(llm_config)
        self._guard = guard
        self._default_max_tokens = default_max_tokens
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
        if serving is not None:
            # Not by `max_new_tokens` of the generation config: that caps what requests ask for.
            defaults = serving.default_sampling_params
            own = defaults.get("max_tokens", self._default_max_tokens)
            defaults["max_tokens"] = min(own, self._default_max_tokens)
        if serving is not None and serving.parser_cls is not None:
            serving.parser_cls = exact(serving.parser_cls)
            if name := self.llm_config.engine_kwargs.get("reasoning_parser"):
                self._count_thoughts(serving, name)

    def _count_thoughts(self, serving: Any, parser_name: str) -> None:
        rule = ReasoningRule.of(self.client.get_tokenizer(), parser_name)
        self.client.reasoning_rule = rule
        if rule is not None:
            serving.parser_cls = counting(serving.parser_cls, rule)

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
