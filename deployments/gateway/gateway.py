"""The gateway of one ingress replica: keys, limits, fair sharing, the ledger, metrics."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, TypeVar

from cluster.config import MoonshardConfig
from deployments.errors import bad_request
from deployments.gateway.admission import Order
from deployments.gateway.authenticator import Authenticator
from deployments.gateway.database_rules import check_database
from deployments.gateway.door import Door
from deployments.gateway.fair_queue import (
    FairQueue,
    QueueClosed,
    QueueFull,
    QueueTimeout,
    Ticket,
)
from deployments.gateway.ledger_calls import LedgerCalls
from deployments.gateway.passage import Passage
from deployments.gateway.rate_headers import rate_headers
from deployments.gateway.refusals import ledger_unavailable, limit_exceeded, overloaded
from deployments.gateway.settlement import Settlement
from deployments.gateway.soft_budgets import SoftBudgets
from deployments.gateway.telemetry import Telemetry
from monitoring.ledger import (
    Admission,
    AdmissionRequest,
    BudgetState,
    Ledger,
    LedgerUnavailable,
    LimitExceeded,
    TooManyRowsError,
    UsageQuery,
    UsageRow,
    hash_secret,
)
from monitoring.messages import Ack, Push, SourceId
from monitoring.prices import PriceTable
from monitoring.push import MetricsPusher
from monitoring.usage import Principal

__all__ = ["Gateway"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

_ADMIT_TIMEOUT_S = 4.0
_KEYS_TIMEOUT_S = 3.0
_BUDGETS_TIMEOUT_S = 10.0
_TIDY_TIMEOUT_S = 10.0
_SETTLE_TIMEOUT_S = 15.0
_REPORT_TIMEOUT_S = 30.0
_MAX_REPORT_ROWS = 100_000
_OPEN_TIMEOUT_S = 60.0
_BUDGETS_INTERVAL_S = 5.0
_CLOSE_TIMEOUT_S = 5.0
# Beyond the request's own end: time for its record to come in.
_EXPIRY_MARGIN_S = 60.0
# A call that was cancelled on its way may never have reached a router, and then leaves no record.
# One that did leaves it within seconds, unless its node is cut off from this one for so long.
_ABANDONED_HOLD_S = 60.0
_TIGHTEN_LINGER_S = 0.25
_FIRST_MEAN_TOKENS = 256.0
_MEAN_SHARE = 0.05
_TIDYING = "tidying"


class Gateway:
    """Owned by the ingress replica, for its event loop. `open` makes one.

    Args:
        config: the whole configuration.
        ledger: open; the gateway closes it.
        send: hands metrics on; None keeps them here.
        name: of this replica.
        app: the Serve application that it belongs to.
    """

    def __init__(
        self,
        config: MoonshardConfig,
        ledger: Ledger,
        send: Callable[[Push], Awaitable[Ack]] | None = None,
        name: str = "ingress",
        app: str = "",
    ) -> None:
        self._config = config
        self._ledger = ledger
        self.telemetry = Telemetry(config.model.id)
        self._calls = LedgerCalls(self.telemetry.ledger_failed)
        self._settlement = Settlement(ledger, self.telemetry)
        self._soft_budgets = SoftBudgets()
        self._authenticator = Authenticator(self._lookup, hash_secret)
        self.door = Door(
            self._authenticator if config.gateway.require_keys else None,
            config.gateway.max_auth_failures,
        )
        self._places = min(config.router.max_ongoing_requests, config.engine.max_num_seqs)
        self.queue = FairQueue(
            capacity=self._places,
            # Without keys there is one team, which would keep places free for nobody.
            reserved_share=config.gateway.reserved_share if config.gateway.require_keys else 0.0,
            max_queued=config.gateway.max_queued_requests,
            timeout_s=config.gateway.queue_timeout_s,
        )
        self._weights: dict[str, float] = {}
        self._mean_tokens = _FIRST_MEAN_TOKENS
        self._pusher = (
            MetricsPusher(
                self.telemetry.metrics,
                SourceId.new("gateway", name, app),
                send,
                config.metrics.push_interval_s,
            )
            if send is not None
            else None
        )
        self._counted_prompts: dict[str, int] = {}
        self._tasks: set[asyncio.Task[Any]] = set()

    @classmethod
    async def open(
        cls,
        config: MoonshardConfig,
        send: Callable[[Push], Awaitable[Ack]] | None = None,
        name: str = "ingress",
        app: str = "",
    ) -> Gateway:
        """Open the ledger, and start.

        Raises:
            LedgerError, PriceError, ConfigError: it cannot be used; one line says what to do.
        """
        prices = PriceTable.load(config.ledger.prices_path)
        url = config.ledger.database_url
        check_database(url, config.http.num_replicas)
        calls = LedgerCalls(lambda: None)
        secret = config.gateway.admin_secret

        def open_ledger() -> Ledger:
            ledger = Ledger.open(url, prices)
            if secret is not None and ledger.keys.ensure_admin(secret):
                logger.info("made the administrator's key that gateway.admin_key names")
            return ledger

        try:
            ledger = await calls.run("requests", open_ledger, _OPEN_TIMEOUT_S)
        finally:
            calls.close()
        gateway = cls(config, ledger, send, name, app)
        gateway.start()
        return gateway

    def start(self) -> None:
        """Start what runs beside the requests."""
        self._spawn(self._authenticator.run(), "keys")
        self._spawn(self._watch_budgets(), "budgets")
        if self._pusher is not None:
            self._spawn(self._pusher.run(), "metrics")
            self._spawn(self._follow_cluster(), "capacity")

    async def close(self) -> None:
        """Send away who waits, hand on what was counted, and end."""
        self.queue.close()
        await asyncio.sleep(0)  # who was sent away now cancels what was set aside
        if tidying := {task for task in self._tasks if task.get_name() == _TIDYING}:
            await asyncio.wait(tidying, timeout=_CLOSE_TIMEOUT_S)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._authenticator.close()
        if self._pusher is not None:
            self._note_places()
            try:
                async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                    await self._pusher.flush()
            except TimeoutError:
                logger.warning("the last metrics could not be handed on")
        self._calls.close()
        await asyncio.to_thread(self._ledger.close)

    def rejected(self, reason: str) -> None:
        """Count a refusal."""
        self.telemetry.rejected(reason)

    def arrived(self, principal: Principal, digest: bytes | None = None) -> Passage:
        """A request begins its way through."""
        self.telemetry.arrived(principal.team)
        return Passage(self, principal, digest)

    async def record_usage(self, lines: Sequence[str]) -> int:
        """Write usage records of the routers down; how many were new.

        Raises:
            LedgerUnavailable: send them again.
        """
        return await self._calls.run(
            "requests", lambda: self._settlement.record(lines), _SETTLE_TIMEOUT_S
        )

    async def usage(self, query: UsageQuery, build: Callable[[list[UsageRow]], T]) -> T:
        """What `build` makes of sums of usage, on a thread.

        Raises:
            Refusal: the database does not answer.
            ApiError: the report is too long.
        """
        try:
            return await self._calls.run(
                "reports",
                lambda: build(self._ledger.usage(query, _MAX_REPORT_ROWS)),
                _REPORT_TIMEOUT_S,
            )
        except TooManyRowsError:
            raise bad_request(
                f"The report has more than {_MAX_REPORT_ROWS} rows: narrow it, or group by less."
            ) from None
        except LedgerUnavailable:
            raise ledger_unavailable() from None

    # What passages need (`passage.Desk`).

    async def reserve(
        self, request_id: str, principal: Principal, order: Order, answer_headers: dict[str, str]
    ) -> bool:
        """Set aside what a request may cost; whether its owners' open requests are limited.

        Raises:
            Refusal: a limit, or the database is away.
        """
        request = AdmissionRequest(
            request_id=request_id,
            principal=principal,
            model=order.model,
            endpoint=order.endpoint,
            num_prompts=order.num_prompts,
            num_choices=order.num_choices,
            body_bytes=order.body_bytes,
            prompt_bound_tokens=order.prompt_bound_tokens,
            max_tokens=order.max_tokens,
            expires_at_s=time.time() + self._config.router.request_timeout_s + _EXPIRY_MARGIN_S,
        )
        is_wanted = threading.Event()
        is_wanted.set()

        def admit() -> Admission:
            admission = self._ledger.admit(request)
            if not is_wanted.is_set():
                self._ledger.cancel(request_id)
            return admission

        try:
            admission = await self._calls.run("requests", admit, _ADMIT_TIMEOUT_S)
        except LimitExceeded as limit:
            answer_headers |= rate_headers(limit.limits)
            raise limit_exceeded(limit) from None
        except BaseException as error:
            # Whoever asked is gone, or was told no, but the call may be under way or done.
            is_wanted.clear()
            self.cancel(request_id)
            if isinstance(error, LedgerUnavailable):
                raise ledger_unavailable() from None
            raise
        answer_headers |= rate_headers(admission.limits)
        if admission.soft_exceeded:
            answer_headers["x-moonshard-budget-exceeded"] = "true"
        return admission.is_parallel_limited

    async def place(self, team: str, order: Order) -> Ticket:
        """Wait for a place at the routers, for each of its answers.

        Raises:
            Refusal: too many wait, or for too long.
        """
        expected = min(order.total_tokens, self._mean_tokens)
        try:
            ticket = await self.queue.acquire(
                team, self._weights.get(team, 1.0), expected, order.num_sequences
            )
        except (QueueFull, QueueClosed):
            raise overloaded("queue_full") from None
        except QueueTimeout:
            raise overloaded("queue_timeout") from None
        finally:
            self._note_places()
        return ticket

    def returned(self, ticket: Ticket) -> None:
        """Take a place back."""
        if served := ticket.num_served:
            self._mean_tokens += _MEAN_SHARE * (served - self._mean_tokens)
        ticket.release()
        self._note_places()

    def tighten(self, request_id: str, num_prompt_tokens: int) -> None:
        """Set aside no more for the prompt than it has; in the background, with those of the
        next moments."""
        if not self._counted_prompts:
            self._spawn(self._tighten_soon(), _TIDYING)
        self._counted_prompts[request_id] = num_prompt_tokens

    def cancel(self, request_id: str) -> None:
        """Set nothing aside any more; in the background."""
        self._tidy(lambda: self._ledger.cancel(request_id))

    def leave(self, request_id: str) -> asyncio.Task[None]:
        """Count it among the open requests no more; in the background."""
        return self._tidy(lambda: self._ledger.end(request_id))

    def abandon(self, request_id: str) -> asyncio.Task[None]:
        """Count it among the open requests no more, and wait for its record only so long."""
        return self._tidy(lambda: self._ledger.abandon(request_id, _ABANDONED_HOLD_S))

    async def confirm(self, digest: bytes | None) -> None:
        """Whether a key still holds.

        Raises:
            Refusal: it does not, or nobody can tell.
        """
        await self.door.confirm(digest)

    def _tidy(self, call: Callable[[], None]) -> asyncio.Task[None]:
        return self._spawn(self._change_reservations(call), _TIDYING)

    async def _tighten_soon(self) -> None:
        await asyncio.sleep(_TIGHTEN_LINGER_S)
        prompts, self._counted_prompts = self._counted_prompts, {}
        await self._change_reservations(lambda: self._ledger.tighten(prompts))

    async def _change_reservations(self, call: Callable[[], None]) -> None:
        try:
            await self._calls.run("requests", call, _TIDY_TIMEOUT_S)
        except LedgerUnavailable:
            # Too much stays set aside, until the request's record comes or it expires.
            logger.warning("a reservation could not be changed: the database is away")

    async def _lookup(self, hashes: Sequence[bytes]) -> dict[bytes, Principal]:
        return await self._calls.run(
            "keys", lambda: self._ledger.keys.lookup(hashes), _KEYS_TIMEOUT_S
        )

    async def _watch_budgets(self) -> None:
        while True:
            try:
                states = await self._calls.run("budgets", self._read_budgets, _BUDGETS_TIMEOUT_S)
                teams = await self._calls.run(
                    "budgets", self._ledger.teams.list, _BUDGETS_TIMEOUT_S
                )
            except LedgerUnavailable as error:
                logger.warning("budgets cannot be read right now: %s", error)
            except Exception:
                # Process boundary: it goes on with the next look.
                logger.exception("budgets could not be read")
            else:
                self.telemetry.budgets(states)
                self._soft_budgets.report(states, time.time())
                self._weights = {team.name: team.limits.weight for team in teams}
                self.telemetry.teams(self._weights)
            await asyncio.sleep(_BUDGETS_INTERVAL_S)

    def _read_budgets(self) -> list[BudgetState]:
        self._ledger.clean_up()
        return self._ledger.budgets()

    async def _follow_cluster(self) -> None:
        assert self._pusher is not None
        while True:
            if (view := self._pusher.view) is not None:
                places = self._places * max(1, view.num_routers)
                self.queue.set_capacity(max(1, places // max(1, view.num_gateways)))
            self._note_places()
            await asyncio.sleep(self._config.metrics.push_interval_s)

    def _note_places(self) -> None:
        self.telemetry.places(self.queue.num_queued, self.queue.num_running)

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("the gateway's task %r failed", task.get_name(), exc_info=error)
