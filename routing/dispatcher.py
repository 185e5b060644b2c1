"""The dispatcher: sends a layer's rows to the shards that hold their experts and sums the answers.

Runs inside the vLLM worker, on the thread of its forward pass. Two promises shape it. A dead
shard is not a failed request: its rows are sent again, to another replica or to whoever the next
table names, for experts have no state. And never a wrong token: when that takes longer than
`recovery_timeout_s` the answer is zeros, no exception leaves (one would kill the engine core), and
the poison counter is raised before anybody can use them.
"""

from __future__ import annotations

import logging
import time

import numpy as np
import torch

from routing.dispatch_settings import DispatcherSettings
from routing.engine_state import EngineState
from routing.exceptions import TransportError
from routing.exchange import Exchange, as_answered
from routing.expert_costs import RowCosts
from routing.links import ShardLinks
from routing.native_hop import NativeHop
from routing.pending import PendingCombine
from routing.split import UNSERVED, Owners, RowSlice, choose_owners, split_by_owner
from routing.table import RoutingTable, ShardEndpoint
from routing.table_feed import TableSource
from routing.tcp import TcpTransport
from routing.throttle import LogThrottle
from routing.transport import Transport, deadline_after, remaining_s
from routing.wire import encode_request

__all__ = ["Dispatcher", "DispatcherSettings", "PendingCombine"]

logger = logging.getLogger(__name__)

_TABLE_POLL_S = 0.1
# What an exchange is given at least, also when the step's recovery time is over: without it a
# healthy shard that has just come back would be taken for one that hangs.
_GRACE_S = 1.0


class ExpertsUnavailable(Exception):
    """Experts stayed unreachable for the whole recovery time. Never leaves the dispatcher."""


class Dispatcher:
    """Dispatches layers, one at a time. Not thread-safe: one forward pass uses it.

    Args:
        settings: times and token.
        tables: where routing tables come from.
        state: where poison, waiting and the counters go.
        transport: how rows travel.
        use_native: let native code do what goes well, where it was built and rows travel by TCP.

    Attributes:
        counting: whether dispatches are counted; switch it off for profile and warm-up runs.
    """

    def __init__(
        self,
        settings: DispatcherSettings,
        tables: TableSource,
        state: EngineState,
        transport: Transport | None = None,
        *,
        use_native: bool = True,
    ) -> None:
        self.counting = True
        self._settings = settings
        self._tables = tables
        self._state = state
        self._links = ShardLinks(
            transport or TcpTransport(), settings.token, settings.connect_timeout_s
        )
        self._native = NativeHop.load() if use_native and transport is None else None
        if use_native and self._native is None:
            logger.warning("the native hop was not built: rows go through Python, more slowly")
        # Dispatchers with different salts spread over the replicas of an expert.
        self._salt = int.from_bytes(np.random.default_rng().bytes(2), "little")
        self._table: RoutingTable | None = None
        self._owners: dict[int, Owners] = {}
        self._open: PendingCombine | None = None
        self._sequence = 0
        self._last_layer = -1
        self._recovery_deadline: float | None = None
        self._is_recovering = False
        self._gave_up_at: int | None = None
        self._is_closed = False
        self._throttles = {level: LogThrottle(1.0) for level in (logging.ERROR, logging.WARNING)}

    def dispatch(
        self,
        layer: int,
        x: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        num_rows_counted: int | None = None,
        costs: RowCosts | None = None,
    ) -> PendingCombine:
        """Send the rows to all shards that they need; waits for none of them. Never raises.

        Args:
            layer: checkpoint layer id.
            x: [n, H] bfloat16, float16 or float32, on the CPU. Must stay as it is until
                `combine` returns: rows may be sent again. The others are copied.
            topk_ids: [n, k] int32 or int64 logical expert ids; -1 asks for nobody.
            topk_weights: [n, k] float32.
            num_rows_counted: rows that the counters see (without padding); all when None.
            costs: of these n rows; `combine` adds what the shards spent on them.
        """
        started_ns = time.perf_counter_ns()
        self._abandon(self._open)
        pending = PendingCombine(layer, x, costs, is_counted=self.counting)
        try:
            self._begin(layer)
            self._open = pending
            if not self._send_natively(pending, topk_ids, topk_weights):
                pending.take_in(topk_ids, topk_weights)
                self._send_wave(pending)
                self._count(pending, "python_layers", 1)
        except Exception:
            logger.exception("dispatching layer %d failed", layer)
            pending.is_failed = True
        if self.counting:
            self._state.add("steps")
            self._state.add("rows", len(x) if num_rows_counted is None else num_rows_counted)
            self._state.add("dispatch_ns", time.perf_counter_ns() - started_ns)
        return pending

    def combine(self, pending: PendingCombine) -> torch.Tensor:
        """Wait for the answers and sum them: [n, H] like `x`, in its type, a new tensor.

        Never raises. When it cannot give the right answer it gives zeros, after it has raised
        `EngineState.poison`.
        """
        started_ns = time.perf_counter_ns()
        answer = None
        try:
            if not pending.is_failed:
                answer = self._gather(pending)
        except ExpertsUnavailable as error:
            self._log(logging.ERROR, pending.layer, f"{error}; the step ends with zeros")
        except Exception:
            logger.exception("combining layer %d failed", pending.layer)
        finally:
            self._abandon(pending)
            self._is_recovering = False
            self._state.set("waiting", 0)
        if answer is None:
            self._state.add("poison")
            answer = torch.zeros_like(pending.x)
        self._count(pending, "combine_ns", time.perf_counter_ns() - started_ns)
        return answer

    def close(self) -> None:
        """Close all connections; what is dispatched later is answered with poison. Idempotent."""
        self._is_closed = True
        self._links.close()

    def _begin(self, layer: int) -> None:
        if self._is_closed:
            raise ExpertsUnavailable("the dispatcher is closed")
        if layer <= self._last_layer:
            self._recovery_deadline = None  # a new step: it may wait anew
        self._last_layer = layer
        table = self._tables.current()
        if table is not None and table is not self._table:
            self._adopt(table)

    def _adopt(self, table: RoutingTable) -> None:
        # Nothing is under way. Shards that are named no more, dead ones above all, are forgotten.
        self._links.retain(table.shards)
        self._table = table
        self._owners.clear()
        self._state.set("table_version", table.version)

    def _send_natively(
        self, pending: PendingCombine, ids: torch.Tensor, weights: torch.Tensor
    ) -> bool:
        """The whole layer at once, while every shard is well; False when it is not for that."""
        table = self._table
        if self._native is None or table is None or not self._links.are_all_well:
            return False
        owners, deadline = self._owners_of(table, pending.layer), self._exchange_deadline()
        asked = self._native.send(
            pending, ids, weights, table, owners, self._links, self._sequence, deadline
        )
        if asked < 0:
            return False
        self._sequence = (self._sequence + asked) & 0xFFFFFFFF
        pending.native_deadline = deadline
        return True

    def _receive_natively(self, native: NativeHop, pending: PendingCombine) -> torch.Tensor | None:
        """The layer's answer; None when some rows are left, which are then in `pending.todo`."""
        table, deadline = self._table, pending.native_deadline
        assert table is not None and deadline is not None  # noqa: PT018
        answer = torch.empty_like(pending.x)
        is_whole = native.receive(answer, deadline, pending.costs)
        pending.native_deadline = None
        for name, amount in native.counts().items():
            self._count(pending, name, amount)
        if is_whole:
            self._gave_up_at = None
            return answer
        pending.take_in(*native.asked())
        pending.next_row = len(pending.x)
        pending.sum = native.answered()
        failures = native.failures()
        started_s = deadline - self._settings.request_timeout_s
        for part in split_by_owner(pending.whole, self._owners_of(table, pending.layer)):
            if part.owner in failures:
                endpoint, error = table.shards[part.owner], failures[part.owner]
                self._lost(pending, endpoint, part.slice, error, started_s)
        return None

    def _send_wave(self, pending: PendingCombine) -> None:
        """Send as many further rows as frames may hold; most steps are one wave."""
        wave = pending.next_wave()
        if wave is not None:
            self._send(pending, wave)

    def _send(self, pending: PendingCombine, wanted: RowSlice) -> None:
        """Send each shard its part; what cannot be sent now is left in `pending.todo`."""
        table = self._table
        if table is None:
            pending.todo.append(wanted)
            return
        for part in split_by_owner(wanted, self._owners_of(table, pending.layer)):
            # A lost shard costs its time to connect: where a newer table has come, ask that first.
            is_outdated = self._is_recovering and self._tables.current() is not table
            if part.owner == UNSERVED or is_outdated:
                pending.todo.append(part.slice)
            else:
                self._post(pending, table, table.shards[part.owner], part.slice)

    def _owners_of(self, table: RoutingTable, layer: int) -> Owners:
        if self._links.are_all_well and layer in self._owners:
            return self._owners[layer]
        avoided = np.array([self._links.is_avoided(s) for s in table.shards], dtype=np.bool_)
        replicas = table.replicas[table.layers.index(layer)]
        owners = choose_owners(replicas, avoided, self._salt)
        if self._links.are_all_well:
            self._owners[layer] = owners
        return owners

    def _post(
        self,
        pending: PendingCombine,
        table: RoutingTable,
        endpoint: ShardEndpoint,
        wanted: RowSlice,
    ) -> None:
        if any(exchange.endpoint == endpoint for exchange in pending.exchanges):
            pending.todo.append(wanted)  # a connection carries one request at a time
            return
        self._sequence = (self._sequence + 1) & 0xFFFFFFFF
        rows = pending.row_bytes
        parts = encode_request(
            rows if wanted.rows is None else rows.take(wanted.rows, axis=0),
            pending.x.dtype,
            wanted.ids,
            wanted.weights,
            layer=pending.layer,
            table_version=table.version,
            sequence=self._sequence,
            is_counted=pending.is_counted,
        )
        started_s = time.monotonic()
        try:
            deadline = self._exchange_deadline()
            link = self._links.get(endpoint, deadline)
            link.connection.send(parts, deadline)
        except TransportError as error:
            self._lost(pending, endpoint, wanted, error, started_s)
            return
        exchange = Exchange(link, endpoint, wanted, self._sequence, started_s, deadline)
        pending.exchanges.append(exchange)
        self._count(pending, "bytes_sent", sum(map(len, parts)))

    def _exchange_deadline(self) -> float:
        deadline = deadline_after(self._settings.request_timeout_s)
        if self._is_recovering and self._recovery_deadline is not None:
            return min(deadline, max(self._recovery_deadline, deadline_after(_GRACE_S)))
        return deadline

    def _gather(self, pending: PendingCombine) -> torch.Tensor:
        if self._native is not None and pending.native_deadline is not None:
            answer = self._receive_natively(self._native, pending)
            if answer is not None:
                return answer
        while True:
            self._receive_all(pending)
            if pending.todo:
                self._send_again(pending)
            elif pending.next_row < len(pending.x):
                self._send_wave(pending)
            else:
                break
        return pending.answer()

    def _receive_all(self, pending: PendingCombine) -> None:
        for exchange, waited_ns in as_answered(list(pending.exchanges)):
            if exchange is None:
                self._count(pending, "wait_ns", waited_ns)
            else:
                self._receive(pending, exchange)

    def _receive(self, pending: PendingCombine, exchange: Exchange) -> None:
        try:
            rows, header = exchange.receive(pending.x.shape[1])
        except TransportError as error:
            pending.exchanges.remove(exchange)
            self._lost(pending, exchange.endpoint, exchange.slice, error, exchange.started_s)
            return
        pending.exchanges.remove(exchange)
        self._count(pending, "bytes_received", header.body_bytes)
        self._links.answered(exchange.link)
        if self._links.are_all_well:
            self._gave_up_at = None
        pending.add(exchange, rows, header.busy_ns)

    def _lost(
        self,
        pending: PendingCombine,
        endpoint: ShardEndpoint,
        wanted: RowSlice,
        error: TransportError,
        started_s: float,
    ) -> None:
        """A shard did not answer: its rows are to be sent again, and it may be left alone."""
        pending.todo.append(wanted)
        self._links.lost(endpoint, error, time.monotonic() - started_s)
        self._log(logging.WARNING, pending.layer, f"rows will be sent again: {error}")

    def _log(self, level: int, layer: int, message: str) -> None:
        held_back = self._throttles[level].admit()
        if held_back is not None:
            logger.log(level, "layer %d: %s (%d more not logged)", layer, message, held_back)

    def _send_again(self, pending: PendingCombine) -> None:
        """Send what is left to do, waiting for somebody who serves it.

        Raises:
            ExpertsUnavailable: nobody did within the step's recovery time.
        """
        if self._recovery_deadline is None:
            has_given_up = self._gave_up_at == self._version
            timeout_s = 0.0 if has_given_up else self._settings.recovery_timeout_s
            self._recovery_deadline = deadline_after(timeout_s)
        self._is_recovering = True
        while True:
            wanted, pending.todo = pending.todo, []
            reconnects = self._links.num_reconnects
            for one in wanted:
                self._send(pending, one)
            self._count(pending, "retries", len(pending.exchanges))
            self._count(pending, "reconnects", self._links.num_reconnects - reconnects)
            if pending.exchanges or not pending.todo:
                return
            self._wait_for_change(self._recovery_deadline)

    def _wait_for_change(self, deadline: float) -> None:
        timeout_s = remaining_s(deadline)
        if timeout_s == 0 or self._is_closed:
            self._gave_up_at = self._version
            raise ExpertsUnavailable(
                f"experts stayed unreachable (table {self._version}); see the shards' logs"
            )
        self._state.set("waiting", 1)
        newer = self._tables.wait_newer(self._version, min(timeout_s, _TABLE_POLL_S))
        if newer is not None:
            self._adopt(newer)

    @property
    def _version(self) -> int:
        return self._table.version if self._table is not None else 0

    def _abandon(self, pending: PendingCombine | None) -> None:
        """Forget a layer. Connections that still owe it an answer are closed, or the next request
        would read that one."""
        if pending is None:
            return
        for exchange in pending.exchanges:
            self._links.drop(exchange.endpoint)
        pending.exchanges.clear()
        if pending.native_deadline is not None and self._native and self._table:
            for index in self._native.waiting():
                self._links.drop(self._table.shards[index])
            pending.native_deadline = None
        pending.is_failed = True  # what was under way is gone: it has no answer any more
        if self._open is pending:
            self._open = None

    def _count(self, pending: PendingCombine, name: str, amount: int) -> None:
        if pending.is_counted:
            self._state.add(name, amount)
