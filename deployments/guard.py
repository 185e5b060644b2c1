"""Never a wrong token: what a replica may take on and hand out while experts come and go.

The engine worker raises a poison counter (`EngineState.poison`) before a forward pass returns
that had to put zeros in the place of an expert's answer. Every request remembers the value that
it was admitted under; each output is handed out only while the counter still has it. So a raised
counter ends every running request and refuses new ones, until `ExpertsGuard.run` has seen all of
them out of the engine, the prefix cache emptied (blocks computed since are wrong as well) and the
value acknowledged.
"""

from __future__ import annotations

import asyncio
import logging
import time
from http import HTTPStatus
from typing import Protocol

from vllm.exceptions import GenerationError

from routing.engine_state import EngineState
from routing.table import RoutingTable

__all__ = ["ExpertsGuard", "ExpertsUnavailable", "GuardedEngineClient"]

logger = logging.getLogger(__name__)

_POLL_S = 0.1
_RECOVERY_MARGIN_S = 60.0


class ExpertsUnavailable(GenerationError):  # type: ignore[misc]
    """The engine must not answer this request. vLLM ends a stream on it without a finish."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
        # vLLM wants an enum here, not a number: it asks for its `value`.
        self.status_code = HTTPStatus.SERVICE_UNAVAILABLE


class GuardedEngineClient(Protocol):
    """What recovery needs of the engine."""

    async def abort_all(self) -> None:
        """End every running request."""

    async def reset_prefix_cache(self) -> bool:
        """Forget cached blocks; False while some are still in use."""


class ExpertsGuard:
    """Decides which requests may enter and which outputs may leave.

    Args:
        state: shared with the engine worker, which writes it.
        step_timeout_s: longest time for which a step may still wait for experts: until then
            blocks of aborted requests are in use.
    """

    def __init__(self, state: EngineState, step_timeout_s: float = 60.0) -> None:
        self._state = state
        self._recovery_timeout_s = step_timeout_s + _RECOVERY_MARGIN_S
        self._acknowledged = 0
        self._table_reason = "its experts are still loading"
        self._failure = ""
        self._num_withdrawals = 0

    @property
    def num_withdrawals(self) -> int:
        """Times that running requests were ended because experts were unreachable."""
        return self._num_withdrawals

    def table_changed(self, table: RoutingTable) -> None:
        """Take note of a new table. Any thread."""
        missing = len(table.missing())
        self._table_reason = "" if table.is_whole else f"{missing} experts have no shard"

    def refusal(self) -> str | None:
        """Why no request may enter now; None when one may."""
        if self._failure:
            return self._failure
        if self._state.poison != self._acknowledged:
            return "answers computed without all experts are being withdrawn"
        if self._table_reason:
            return self._table_reason
        if self._state.is_waiting:
            return "running requests wait for experts"
        return None

    def admit(self) -> int:
        """Let a request in; returns what `check` wants of it.

        Raises:
            ExpertsUnavailable: it may not enter.
        """
        if reason := self.refusal():
            raise ExpertsUnavailable(reason)
        return self._acknowledged

    def check(self, admitted: int) -> None:
        """Before an output is handed out: is it right?

        Raises:
            ExpertsUnavailable: it may not be; the request must end.
        """
        if self._state.poison != admitted:
            raise ExpertsUnavailable("experts were unreachable while it was being answered")

    def check_health(self) -> None:
        """Raises RuntimeError when recovery failed for good: the replica must be replaced."""
        if self._failure:
            raise RuntimeError(self._failure)

    async def run(self, engine: GuardedEngineClient) -> None:
        """Recover whenever the counter rises; ends only by cancellation or failure."""
        while True:
            if self._state.poison != self._acknowledged:
                try:
                    await self._recover(engine)
                except Exception as error:
                    logger.exception("the replica cannot recover and must be replaced")
                    self._failure = "its prefix cache could not be emptied after an outage"
                    raise RuntimeError(self._failure) from error
            await asyncio.sleep(_POLL_S)

    async def _recover(self, engine: GuardedEngineClient) -> None:
        started = time.monotonic()
        self._num_withdrawals += 1
        async with asyncio.timeout(self._recovery_timeout_s):
            logger.error(
                "experts were unreachable: ending all requests and emptying the prefix cache"
            )
            while True:
                poison = self._state.poison
                await engine.abort_all()
                if await engine.reset_prefix_cache() and self._state.poison == poison:
                    break
                # Blocks of an aborted request stay in use until its step has ended.
                await asyncio.sleep(_POLL_S)
        self._acknowledged = poison
        logger.info("answers are right again after %.1f s", time.monotonic() - started)
