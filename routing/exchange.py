"""One request to a shard and its answer."""

from __future__ import annotations

import select
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from routing.exceptions import ShardRefused, WireError
from routing.links import Link
from routing.split import RowSlice
from routing.table import ShardEndpoint
from routing.transport import remaining_s
from routing.wire import FrameHeader, FrameKind, decode_reply

__all__ = ["Exchange", "as_answered"]


@dataclass(slots=True, eq=False)
class Exchange:
    """A request under way.

    Attributes:
        endpoint: the shard as the table has it now, with its price.
    """

    link: Link
    endpoint: ShardEndpoint
    slice: RowSlice
    sequence: int
    started_s: float
    deadline: float

    def receive(self, hidden: int) -> tuple[torch.Tensor, FrameHeader]:
        """The answer, rows [m, hidden] in the connection's buffer, and its header.

        Raises:
            TransportError: none came, or another one than was asked for.
            ShardRefused: the shard says that it cannot answer.
        """
        connection = self.link.connection
        header, body = connection.receive(self.deadline)
        if header.sequence != self.sequence:
            raise WireError(f"{connection.peer} answered another request than it was asked")
        if header.kind is FrameKind.ERROR:
            raise ShardRefused(f"{connection.peer}: {body.tobytes().decode(errors='replace')}")
        rows = decode_reply(header, body)
        expected = (len(self.slice.ids), hidden)
        if rows.shape != expected:
            raise WireError(f"{connection.peer} answered {tuple(rows.shape)}, not {expected}")
        return rows, header


def as_answered(exchanges: Sequence[Exchange]) -> Iterator[tuple[Exchange | None, int]]:
    """(exchange, 0) for each whose answer has begun to arrive or whose deadline is over, in the
    order of that; (None, nanoseconds) for each wait in between."""
    poller = select.poll()
    by_descriptor = {}
    for exchange in exchanges:
        descriptor = exchange.link.connection.fileno()
        by_descriptor[descriptor] = exchange
        poller.register(descriptor, select.POLLIN)
    while by_descriptor:
        deadline = min(exchange.deadline for exchange in by_descriptor.values())
        started_ns = time.perf_counter_ns()
        ready = poller.poll(remaining_s(deadline) * 1000)
        yield None, time.perf_counter_ns() - started_ns
        now_s = time.monotonic()
        for descriptor in [d for d, _ in ready] or [
            d for d, exchange in by_descriptor.items() if exchange.deadline <= now_s
        ]:
            poller.unregister(descriptor)
            yield by_descriptor.pop(descriptor), 0
