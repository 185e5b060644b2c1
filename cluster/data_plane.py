"""The data-plane server of a shard: takes rows, runs its experts on them, answers.

Stateless: a request names layer, rows, expert ids and weights, and any replica may answer it.
Imports neither Ray nor vLLM's engine, so that it runs and is tested alone.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from cluster.exceptions import ShardStartError
from cluster.kernels.base import ExpertKernel
from cluster.shard_counters import ShardCounters
from routing.listener import Listener
from routing.tcp import TcpConnection
from routing.throttle import LogThrottle
from routing.transport import deadline_after, remaining_s
from routing.wire import (
    UNCOUNTED,
    ErrorCode,
    FrameHeader,
    RequestBody,
    decode_request,
    encode_error,
    encode_reply,
)

__all__ = ["DataPlaneServer", "DataPlaneStats"]

logger = logging.getLogger(__name__)

_SEND_TIMEOUT_S = 60.0
_NOT_HELD = -3
_NOBODY = np.empty(0, dtype=np.int32)


@dataclass(frozen=True, slots=True)
class DataPlaneStats:
    """Load of a shard since it started. Picklable.

    Attributes:
        requests: requests answered with rows.
        errors: requests answered with an error frame.
        rows: token rows of them.
        bytes_received: bodies of requests.
        bytes_sent: bodies of replies.
        busy_ns: time in the kernel.
        queued: requests that were accepted and are not in the kernel now.
        connections: open, admitted connections.
        refused: connections without the right token.
        broken: connections closed because of what they sent.
        layers: checkpoint layer ids, the rows of `expert_rows`.
        experts: logical expert ids, the columns of `expert_rows`.
        expert_rows: int64 [num_layers, num_held], rows computed per layer and expert.
    """

    requests: int
    errors: int
    rows: int
    bytes_received: int
    bytes_sent: int
    busy_ns: int
    queued: int
    connections: int
    refused: int
    broken: int
    layers: tuple[int, ...]
    experts: tuple[int, ...]
    expert_rows: npt.NDArray[np.int64]


class _Refusal(Exception):
    """A request that is answered with an error frame."""

    def __init__(self, code: ErrorCode, message: str) -> None:
        super().__init__(message)
        self.code = code


class _Work(NamedTuple):
    """A computation that was done."""

    out: torch.Tensor
    local_ids: npt.NDArray[np.int32]
    busy_ns: int


class DataPlaneServer:
    """Serves a kernel over TCP, a thread per connection, one computation at a time.

    Args:
        kernel: the experts.
        host: address to bind.
        port: port to bind; 0 takes a free one.
        token: what dispatchers must hold; None admits everybody (loopback only).
        incarnation: random id of this start of the shard, told to every dispatcher.
        counters: where to count, for the kernel's layers and experts; in memory by default.
    """

    def __init__(
        self,
        kernel: ExpertKernel,
        *,
        host: str,
        port: int = 0,
        token: bytes | None,
        incarnation: str,
        counters: ShardCounters | None = None,
    ) -> None:
        self._kernel = kernel
        self._host = host
        self._layer_index = {layer: index for index, layer in enumerate(kernel.layers)}
        self._local_ids = _local_id_table(kernel.experts)
        self._compute = threading.Lock()
        # Guards the figures below; also signals that `_in_flight` fell to 0.
        self._idle = threading.Condition()
        self._in_flight = 0
        self._is_draining = False
        self._counters = counters or ShardCounters.in_memory(kernel.layers, kernel.experts)
        self._throttle = LogThrottle()
        self._listener = Listener("data-plane", host, port, token, incarnation, self._serve)

    def start(self) -> int:
        """Bind and serve; returns the port.

        Raises:
            ShardStartError: the address cannot be bound.
        """
        try:
            return self._listener.start()
        except OSError as error:
            raise ShardStartError(
                f"the data plane cannot listen on {self._host}: {error.strerror or error}"
            ) from None

    def stats(self) -> DataPlaneStats:
        """A snapshot."""
        with self._idle:
            figures = self._counters.figures()
            return DataPlaneStats(
                requests=figures.requests,
                errors=figures.errors,
                rows=figures.rows,
                bytes_received=figures.bytes_received,
                bytes_sent=figures.bytes_sent,
                busy_ns=figures.busy_ns,
                queued=max(0, self._in_flight - self._compute.locked()),
                connections=self._listener.num_connections,
                refused=self._listener.num_refused,
                broken=self._listener.num_broken,
                layers=self._kernel.layers,
                experts=self._kernel.experts,
                expert_rows=figures.expert_rows,
            )

    def drain(self, deadline_s: float) -> bool:
        """Finish what was accepted and turn newcomers away, with an error frame each.

        Args:
            deadline_s: seconds to wait.

        Returns:
            Whether everything accepted was answered in time. Connections stay open: `close`.
        """
        deadline = deadline_after(deadline_s)
        with self._idle:
            self._is_draining = True
            return self._idle.wait_for(lambda: self._in_flight == 0, remaining_s(deadline))

    def close(self) -> None:
        """End all connections and threads. Idempotent."""
        self._listener.close()

    def _serve(self, connection: TcpConnection) -> None:
        while True:
            header, body = connection.receive(deadline=None)
            request = decode_request(header, body)
            if not self._accept():
                refusal = encode_error(header, ErrorCode.DRAINING, "this shard is draining")
                connection.send(refusal, deadline_after(_SEND_TIMEOUT_S))
                continue
            work = None
            try:
                work = self._compute_or_refuse(header, request)
                if isinstance(work, _Refusal):
                    answer = encode_error(header, work.code, str(work))
                else:
                    answer = encode_reply(header, work.out, work.busy_ns)
                connection.send(answer, deadline_after(_SEND_TIMEOUT_S))
            finally:
                # Counted behind the answer, so that nobody waits for the counting.
                self._finish(header, work)

    def _accept(self) -> bool:
        with self._idle:
            if self._is_draining:
                self._counters.add_error()
                return False
            self._in_flight += 1
            return True

    def _finish(self, header: FrameHeader, work: _Work | _Refusal | None) -> None:
        with self._idle:
            self._in_flight -= 1
            if self._in_flight == 0:
                self._idle.notify_all()
            if isinstance(work, _Work):
                is_counted = not header.flags & UNCOUNTED
                asked = work.local_ids[work.local_ids >= 0] if is_counted else _NOBODY
                self._counters.add(
                    self._layer_index[header.layer],
                    rows=header.rows if is_counted else 0,
                    busy_ns=work.busy_ns,
                    bytes_received=header.body_bytes,
                    bytes_sent=work.out.nbytes,
                    rows_per_expert=np.bincount(asked, minlength=len(self._kernel.experts)),
                )
            else:
                self._counters.add_error()

    def _compute_or_refuse(self, header: FrameHeader, request: RequestBody) -> _Work | _Refusal:
        try:
            return self._run(header, request)
        except _Refusal as error:
            refusal = error
        except Exception as error:
            # The kernel's fault, not the connection's: the dispatcher is to hear of it.
            logger.exception("layer %d: %d rows failed", header.layer, header.rows)
            name = type(error).__name__
            refusal = _Refusal(ErrorCode.INTERNAL, f"the kernel failed: {name}")
        held_back = self._throttle.admit()
        if held_back is not None:
            logger.warning("a request was refused: %s (%d more not logged)", refusal, held_back)
        return refusal

    def _run(self, header: FrameHeader, request: RequestBody) -> _Work:
        if header.layer not in self._layer_index:
            raise _Refusal(ErrorCode.NOT_HELD, f"layer {header.layer} is not served here")
        if header.extra != self._kernel.hidden:
            raise _Refusal(
                ErrorCode.BAD_REQUEST,
                f"rows of {header.extra} elements; the model's have {self._kernel.hidden}",
            )
        local_ids = self._to_local(request.ids)
        with self._compute:  # one at a time, so that connections do not fight over the cores
            started_ns = time.perf_counter_ns()
            out = self._kernel(header.layer, request.rows, local_ids, request.weights)
            return _Work(out, local_ids, time.perf_counter_ns() - started_ns)

    def _to_local(self, ids: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        """Logical ids to local ones. The kernel uses them as indices, so all are checked here."""
        try:
            # Unsigned, so that ids below -1 are out of bounds instead of counting from the end.
            local_ids = self._local_ids.take((ids + np.int32(1)).view(np.uint32))
        except IndexError:
            raise _Refusal(ErrorCode.NOT_HELD, "an expert id is not served here") from None
        if ids.size and local_ids.min() == _NOT_HELD:
            raise _Refusal(ErrorCode.NOT_HELD, "an expert id is not served here")
        return local_ids


def _local_id_table(experts: tuple[int, ...]) -> npt.NDArray[np.int32]:
    """[1 + logical id] -> local id; `_NOT_HELD` for experts of others, -1 for id -1."""
    table = np.full(max(experts) + 2, _NOT_HELD, dtype=np.int32)
    table[np.array(experts) + 1] = np.arange(len(experts), dtype=np.int32)
    table[0] = -1
    return table
