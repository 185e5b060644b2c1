"""One request's way through the gateway: from its arrival to the end of its answer."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import Callable
from typing import Any, Literal, Protocol

from deployments.gateway.admission import Order
from deployments.gateway.fair_queue import Ticket
from deployments.gateway.telemetry import Telemetry
from monitoring.usage import Principal, TokenCount

__all__ = ["Desk", "Ending", "Passage"]

Ending = Literal["ok", "client_error", "rejected", "client_closed", "server_error", "timeout"]
"""How a request ended; label of `moonshard_requests_total`."""

_GIVEN_UP: frozenset[Ending] = frozenset({"client_closed", "timeout"})
_UNKNOWN_MODEL = "unknown"
_TIGHTEN_AFTER_S = 1.0
_LEAVE_TIMEOUT_S = 2.0


class Desk(Protocol):
    """What a passage needs of the gateway."""

    telemetry: Telemetry

    async def reserve(
        self, request_id: str, principal: Principal, order: Order, answer_headers: dict[str, str]
    ) -> bool:
        """Set aside what it may cost, and whether open requests are limited; raises `Refusal`."""

    async def place(self, team: str, order: Order) -> Ticket:
        """Wait for a place at the routers; raises `Refusal`."""

    def returned(self, ticket: Ticket) -> None:
        """Take a place back."""

    def tighten(self, request_id: str, num_prompt_tokens: int) -> None:
        """Set aside no more for the prompt than it has."""

    def cancel(self, request_id: str) -> None:
        """Set nothing aside any more."""

    def leave(self, request_id: str) -> asyncio.Task[None]:
        """Count it among the open requests no more; done when that is written down."""

    def abandon(self, request_id: str) -> asyncio.Task[None]:
        """As `leave`, for one that no router has shown a sign of."""

    async def confirm(self, digest: bytes | None) -> None:
        """Whether a key still holds; raises `Refusal`."""


class Passage:
    """Holds what one request holds, and gives all of it back at `end`, whichever way it ends.

    Args:
        desk: the gateway.
        principal: who asks.
        digest: hash of the key; None without keys.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        desk: Desk,
        principal: Principal,
        digest: bytes | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        # Ours, not the client's: two requests must never count as one.
        self.request_id = uuid.uuid4().hex
        self.principal = principal
        self._desk = desk
        self._digest = digest
        self._clock = clock
        self._arrived_at = clock()
        self._order: Order | None = None
        self._ticket: Ticket | None = None
        self._count = TokenCount()
        self._counted_at: float | None = None
        self._begun_at = 0.0
        self._is_tightened = False
        self._is_parallel_limited = False
        self._leaving: asyncio.Task[None] | None = None
        self._is_over = False

    @property
    def account(self) -> str:
        """Whom the router bills: the value of its account header."""
        return json.dumps(
            {
                "id": self.request_id,
                "key": self.principal.key_id,
                "team": self.principal.team,
            }
        )

    async def enter(self, order: Order, answer_headers: dict[str, str]) -> None:
        """Set aside what the request may cost, then wait for a place at the routers.

        Args:
            answer_headers: gets the headers about limits.

        Raises:
            Refusal: a limit, an overload, or the database is away.
        """
        self._order = order
        self._is_parallel_limited = await self._desk.reserve(
            self.request_id, self.principal, order, answer_headers
        )
        waiting_since = self._clock()
        try:
            self._ticket = await self._desk.place(self.principal.team, order)
            await self.confirm()  # the wait may have been long
        except BaseException:
            self._desk.cancel(self.request_id)
            raise
        self._desk.telemetry.queued(order.model, self._clock() - waiting_since)

    async def confirm(self) -> None:
        """Whether the key still holds.

        Raises:
            Refusal: it does not, or the database is away.
        """
        await self._desk.confirm(self._digest)

    async def leave(self) -> None:
        """Before the last byte: whoever has the whole answer may ask again at once."""
        self._start_leaving()
        if self._leaving is not None:
            await asyncio.wait({self._leaving}, timeout=_LEAVE_TIMEOUT_S)

    def take(self, item: Any) -> Any:
        """An item of the router's without the count that came with it; None for a count alone."""
        if isinstance(item, list) and item and isinstance(item[-1], list):
            count = TokenCount(*item.pop())
            self._counted(count, is_stream=bool(item))
            return item or None
        return item

    def end(self, ending: Ending, *, was_sent: bool = True) -> None:
        """The request is over. Idempotent: the first ending counts.

        Args:
            was_sent: False when no router can have got the request.
        """
        if self._is_over:
            return
        self._is_over = True
        if self._ticket is not None:
            self._desk.returned(self._ticket)
            # Else a router may have it, and its record may be late by as long as an outage lasts:
            # until it comes, or the reservation's own time is over, the money stays set aside.
            if not was_sent:
                self._desk.cancel(self.request_id)
            elif ending in _GIVEN_UP and self._count == TokenCount():
                self._leaving = self._desk.abandon(self.request_id)
        self._start_leaving()
        model = self._order.model if self._order else _UNKNOWN_MODEL
        duration_s = self._clock() - self._arrived_at
        self._desk.telemetry.ended(model, self.principal.team, ending, duration_s)

    def _start_leaving(self) -> None:
        if self._is_parallel_limited and self._leaving is None:
            self._leaving = self._desk.leave(self.request_id)

    def _counted(self, count: TokenCount, *, is_stream: bool) -> None:
        before, self._count = self._count, count
        if self._ticket is not None:
            self._ticket.served(_computed(count) - _computed(before))
        self._tighten(count.prompt, is_stream=is_stream)
        if is_stream:
            self._time(count.completion - before.completion)

    def _tighten(self, num_prompt_tokens: int, *, is_stream: bool) -> None:
        # Prompts are counted each at its own first token: of several, some may still be missing.
        is_whole = self._order is not None and self._order.num_prompts == 1
        if self._is_tightened or not is_whole or not num_prompt_tokens:
            return
        # Most streams are settled before that: it would be a transaction for nothing.
        has_run = self._counted_at is not None and (
            self._clock() - self._begun_at >= _TIGHTEN_AFTER_S
        )
        if has_run or not is_stream:
            self._is_tightened = True
            self._desk.tighten(self.request_id, num_prompt_tokens)

    def _time(self, num_new: int) -> None:
        assert self._order is not None
        now, telemetry = self._clock(), self._desk.telemetry
        if self._counted_at is None:
            telemetry.first_token(self._order.model, now - self._arrived_at)
            self._begun_at = self._counted_at = now
        elif num_new > 0:
            # Choices are generated side by side: each has a token in the time of one.
            num_parallel = self._order.num_sequences
            gap_s = (now - self._counted_at) * num_parallel / num_new
            telemetry.next_tokens(num_new, gap_s)
            self._counted_at = now


def _computed(count: TokenCount) -> int:
    return count.prompt - count.cached + count.completion
