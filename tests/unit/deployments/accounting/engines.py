"""`MoonshardAsyncLLM` over vLLM's real output processor; the engine core behind it is a script."""

from __future__ import annotations

import asyncio
import time
from copy import copy
from typing import Any

from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector
from vllm.v1.engine.parallel_sampling import ParentRequest
from vllm.v1.metrics.stats import IterationStats, PrefillStats

from deployments.engine import MoonshardAsyncLLM

__all__ = ["ScriptedEngine", "settle"]


class _Core:
    async def add_request_async(self, request: EngineCoreRequest) -> None:
        pass


class ScriptedEngine(MoonshardAsyncLLM):
    """Makes tokens when told to.

    Attributes:
        num_generation_tokens: what vLLM's counter `vllm:generation_tokens` would say.
        gate: requests enter while it is set.
        last_gate: `add_request` returns while it is set.
        is_shut_down: whether the engine core is gone.
    """

    def __init__(self) -> None:
        self._running = set()
        self._background = set()
        self.output_handler = None
        self.output_processor = OutputProcessor(None, log_stats=True)
        self.engine_core = _Core()
        self.log_requests = False
        self.is_shut_down = False
        self.num_generation_tokens = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.last_gate = asyncio.Event()
        self.last_gate.set()
        self.cached: dict[int, int] = {}

    async def add_request(
        self, request_id: str, prompt: Any, params: SamplingParams, **options: Any
    ) -> RequestOutputCollector:
        await self.gate.wait()
        request = EngineCoreRequest(
            request_id=f"{request_id}-internal",
            external_req_id=request_id,
            prompt_token_ids=list(prompt),
            mm_features=None,
            sampling_params=params,
            pooling_params=None,
            arrival_time=time.time(),
            lora_request=None,
            cache_salt=None,
            data_parallel_rank=None,
        )
        queue = RequestOutputCollector(params.output_kind, request.request_id)
        if params.n == 1:
            await self._add_request(request, None, None, 0, queue)
            return queue
        parent = ParentRequest(request)
        for index in range(params.n):
            child = copy(request)
            child.request_id, child.sampling_params = parent.get_child_info(index)
            await self._add_request(child, None, parent, index, queue)
        await self.last_gate.wait()
        return queue

    def check_admission(self, n: int = 1, request_id: str | None = None) -> None:
        pass

    def shutdown(self, timeout: float | None = None) -> None:
        self.is_shut_down = True

    async def abort(self, request_id: Any, internal: bool = False) -> None:
        ids = [request_id] if isinstance(request_id, str) else list(request_id)
        self.output_processor.abort_requests(ids, internal)

    @property
    def running_ids(self) -> list[str]:
        """Choices that may get a token, by the engine's ids, in order."""
        return sorted(self.output_processor.request_states)

    def make(self, request_id: str, token_ids: list[int], *, finished: bool = False) -> None:
        """One step of the engine's for one choice; of one that is gone nothing comes of it."""
        state = self.output_processor.request_states.get(request_id)
        stats = IterationStats()
        num_cached = self.cached.get(state.request_index, 0) if state is not None else 0
        prefill = PrefillStats()
        prefill.num_cached_tokens = num_cached
        self.output_processor.process_outputs(
            [
                EngineCoreOutput(
                    request_id=request_id,
                    new_token_ids=token_ids,
                    finish_reason=FinishReason.LENGTH if finished else None,
                    prefill_stats=prefill,
                )
            ],
            time.monotonic(),
            stats,
        )
        self.num_generation_tokens += stats.num_generation_tokens


async def settle() -> None:
    """Let every task do what it can."""
    for _ in range(12):
        await asyncio.sleep(0)
