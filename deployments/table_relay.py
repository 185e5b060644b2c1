"""Carries routing tables from the controller to this replica's engine worker and guard."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

import ray
from ray.exceptions import RayError

from cluster.client import get_controller, original_error
from cluster.exceptions import MoonshardError
from routing.table import RoutingTable

__all__ = ["TableRelay", "TableSink"]

logger = logging.getLogger(__name__)

_POLL_S = 10.0
_ANSWER_MARGIN_S = 20.0
_RETRY_S = 1.0
_CLOSE_S = 0.5
_JOIN_TIMEOUT_S = 10.0


class TableSink(Protocol):
    """Where tables go."""

    def __call__(self, table: RoutingTable) -> None:
        """Take a table. Called on the relay's thread, once per version, in order."""


class TableRelay:
    """Long-polls the controller on a thread of its own.

    A thread, because starting the engine blocks the replica's event loop for as long as it loads
    and compiles, and its profile run already needs tables.

    Args:
        controller: handle of the controller.
        sinks: who is told of each table.
    """

    def __init__(self, controller: Any, sinks: list[TableSink]) -> None:
        self._controller = controller
        self._sinks = sinks
        self._version = 0
        self._changed = threading.Condition()
        self._whole = False
        self._failure: MoonshardError | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="table-relay", daemon=True)

    def start(self) -> None:
        """Begin to poll."""
        self._thread.start()

    def wait_until_whole(self, timeout_s: float, progress: Callable[[], None]) -> None:
        """Block until a table serves every expert.

        Args:
            timeout_s: give up after that.
            progress: called about every ten seconds meanwhile.

        Raises:
            MoonshardError: the shards could not be started; says why.
            TimeoutError: no whole table in time.
        """
        waited_s = 0.0
        with self._changed:
            while not self._changed.wait_for(lambda: self._whole or self._failure, _POLL_S):
                waited_s += _POLL_S
                if waited_s >= timeout_s:
                    raise TimeoutError(f"the expert shards were not ready after {timeout_s:g} s")
                progress()
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """Stop polling and join the thread. Idempotent."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(_JOIN_TIMEOUT_S)

    def _run(self) -> None:
        while not self._closing.is_set():
            try:
                self._poll()
            except MoonshardError as error:
                self._fail(error)
            except (RayError, TimeoutError) as error:
                cause = original_error(error)
                if isinstance(cause, MoonshardError):
                    self._fail(cause)
                else:
                    logger.warning("the controller did not answer; asking again (%s)", cause)
                self._controller = get_controller() or self._controller
                self._closing.wait(_RETRY_S)
            except Exception:
                logger.exception("the table relay failed; trying again")
                self._closing.wait(_RETRY_S)

    def _poll(self) -> None:
        reference = self._controller.wait_for_table.remote(self._version, _POLL_S)
        deadline = time.monotonic() + _POLL_S + _ANSWER_MARGIN_S
        while not ray.wait([reference], timeout=_CLOSE_S)[0]:
            if self._closing.is_set():
                return
            if time.monotonic() > deadline:
                raise TimeoutError("no answer to a request for tables")
        data = ray.get(reference)
        if data is None:
            return
        table = RoutingTable.from_bytes(data)
        for sink in self._sinks:
            sink(table)
        self._version = table.version
        logger.info(
            "routing table %d: %d shards, %s",
            table.version,
            len(table.shards),
            "whole" if table.is_whole else f"{len(table.missing())} experts have no shard",
        )
        with self._changed:
            self._whole = table.is_whole
            self._failure = None
            self._changed.notify_all()

    def _fail(self, error: MoonshardError) -> None:
        with self._changed:
            if self._failure is None:
                logger.error("the shards cannot be started: %s", error)
            self._failure = error
            self._changed.notify_all()
        self._closing.wait(_RETRY_S)
