"""From an API key to who it is: a short memory in front of the ledger's table of keys.

Only hashes are kept, and a key is found by its hash: no comparison's duration tells how much of a
guess was right. What was found is confirmed in the background, every `_REFRESH_S`, and not used
once the last confirmation is `_MAX_AGE_S` old. So a revocation, an expiry or a rotation holds
everywhere within 5 s, however slow the database is.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from monitoring.ledger import LedgerUnavailable
from monitoring.usage import Principal

__all__ = ["Authenticator"]

logger = logging.getLogger(__name__)

Lookup = Callable[[Sequence[bytes]], Awaitable[Mapping[bytes, Principal]]]
"""Hashes -> the principals of those that are valid now; raises LedgerUnavailable."""

_REFRESH_S = 2.0
_MAX_AGE_S = 4.0
_MAX_NEGATIVE_AGE_S = 2.0
_IDLE_S = 60.0
_MAX_ENTRIES = 10_000
_MAX_BATCH = 500


@dataclass(slots=True)
class _Entry:
    """Attributes:
    confirmed_at: when the lookup that last found the key began.
    used_at: when a request last came with it.
    """

    principal: Principal
    confirmed_at: float
    used_at: float


class Authenticator:
    """Knows keys by their hashes. For one event loop.

    Args:
        lookup: asks the ledger.
        hash_secret: the ledger's hash of a key.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        lookup: Lookup,
        hash_secret: Callable[[str], bytes],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._lookup = lookup
        self._hash = hash_secret
        self._clock = clock
        self._known: OrderedDict[bytes, _Entry] = OrderedDict()
        self._unknown: OrderedDict[bytes, float] = OrderedDict()
        self._asked: dict[bytes, asyncio.Future[Principal | None]] = {}
        self._asker: asyncio.Task[None] | None = None

    def known(self, secret: str) -> Principal | None:
        """Who the key is, if that needs no question."""
        return self._cached(self._hash(secret))

    def digest(self, secret: str) -> bytes:
        """What a key is kept as."""
        return self._hash(secret)

    async def principal(self, secret: str) -> Principal | None:
        """Who the key is; None for a key that is not valid.

        Raises:
            LedgerUnavailable: it is not known, and the database does not answer.
        """
        return await self.confirm(self._hash(secret))

    async def confirm(self, digest: bytes) -> Principal | None:
        """Who the key with this digest is now; see `principal`."""
        if (found := self._cached(digest)) is not None:
            return found
        if self._clock() - self._unknown.get(digest, float("-inf")) <= _MAX_NEGATIVE_AGE_S:
            return None
        return await self._ask(digest)

    async def run(self) -> None:
        """Confirm what is known, until cancelled."""
        while True:
            await asyncio.sleep(_REFRESH_S)
            await self.refresh()

    async def refresh(self) -> None:
        """Confirm now; keys that nobody used for a minute are forgotten instead."""
        started = self._clock()
        for digest in [d for d, e in self._known.items() if started - e.used_at > _IDLE_S]:
            del self._known[digest]
        digests = list(self._known)
        for at in range(0, len(digests), _MAX_BATCH):
            batch = digests[at : at + _MAX_BATCH]
            started = self._clock()
            try:
                found = await self._lookup(batch)
            except LedgerUnavailable as error:
                logger.warning("API keys cannot be confirmed right now: %s", error)
                return
            except Exception:
                # Process boundary: without this task every request would have to ask.
                logger.exception("API keys could not be confirmed")
                return
            for digest in batch:
                self._note(digest, found.get(digest), started)

    async def close(self) -> None:
        """Stop asking."""
        if self._asker is not None:
            self._asker.cancel()
            await asyncio.gather(self._asker, return_exceptions=True)
        for answer in self._asked.values():
            _fail(answer, LedgerUnavailable("the gateway shuts down"))
        self._asked.clear()

    def _cached(self, digest: bytes) -> Principal | None:
        entry = self._known.get(digest)
        now = self._clock()
        if entry is None or now - entry.confirmed_at > _MAX_AGE_S:
            return None
        entry.used_at = now
        self._known.move_to_end(digest)
        return entry.principal

    async def _ask(self, digest: bytes) -> Principal | None:
        # Questions that come together go together: guessing keys costs few queries.
        answer = self._asked.get(digest)
        if answer is None:
            answer = self._asked[digest] = asyncio.get_running_loop().create_future()
            answer.add_done_callback(_retrieve)
            if self._asker is None or self._asker.done():
                self._asker = asyncio.create_task(self._ask_all(), name="key lookup")
        return await asyncio.shield(answer)

    async def _ask_all(self) -> None:
        while self._asked:
            batch = list(self._asked)[:_MAX_BATCH]
            started = self._clock()
            try:
                found = await self._lookup(batch)
            except Exception as error:  # noqa: BLE001 - whoever asked gets it
                for digest in batch:
                    _fail(self._asked.pop(digest), error)
                continue
            for digest in batch:
                self._note(digest, found.get(digest), started, is_used=True)
                _answer(self._asked.pop(digest), found.get(digest))

    def _note(
        self, digest: bytes, principal: Principal | None, at: float, *, is_used: bool = False
    ) -> None:
        entry = self._known.get(digest)
        if entry is not None and entry.confirmed_at > at:
            return  # asked later, and answered before
        if principal is None:
            self._known.pop(digest, None)
            self._unknown[digest] = at
            self._unknown.move_to_end(digest)
            if len(self._unknown) > _MAX_ENTRIES:
                self._unknown.popitem(last=False)
            return
        self._unknown.pop(digest, None)
        if entry is not None:
            entry.principal, entry.confirmed_at = principal, at
            entry.used_at = self._clock() if is_used else entry.used_at
        elif is_used:
            self._known[digest] = _Entry(principal, at, self._clock())
            if len(self._known) > _MAX_ENTRIES:
                self._known.popitem(last=False)


def _answer(future: asyncio.Future[Principal | None], principal: Principal | None) -> None:
    if not future.done():
        future.set_result(principal)


def _fail(future: asyncio.Future[Principal | None], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)


def _retrieve(future: asyncio.Future[Principal | None]) -> None:
    # Whoever asked may have hung up: then asyncio would complain that nobody looked.
    if not future.cancelled():
        future.exception()
