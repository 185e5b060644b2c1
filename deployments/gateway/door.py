"""Who a request comes from, before anything else is done about it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from deployments.gateway.access import Access
from deployments.gateway.authenticator import Authenticator
from deployments.gateway.credentials import InvalidCredential, read_secret
from deployments.gateway.local_peers import why_not_local
from deployments.gateway.refusals import (
    forbidden,
    invalid_key,
    keyless_stranger,
    ledger_unavailable,
    missing_key,
    too_many_auth_failures,
)
from deployments.gateway.throttle import FailureThrottle
from monitoring.ledger import LedgerUnavailable
from monitoring.usage import ANONYMOUS, Principal

__all__ = ["Caller", "Door"]


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks, and the hash of the key that says so; None without keys."""

    principal: Principal
    digest: bytes | None = None


class Door:
    """Lets callers in by their keys or, without keys, this machine's own programs.

    Args:
        authenticator: knows keys; None for a gateway without keys.
        max_auth_failures: wrong keys per minute and address.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        authenticator: Authenticator | None,
        max_auth_failures: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._authenticator = authenticator
        self._throttle = FailureThrottle(max_auth_failures, clock)

    async def identify(self, scope: Mapping[str, Any], access: Access) -> Caller | None:
        """Who asks; None where everybody may.

        Args:
            scope: ASGI scope of an HTTP request.
            access: what the route wants.

        Raises:
            Refusal: the caller may not; says what is missing.
        """
        if access is Access.OPEN:
            return None
        client = scope.get("client")
        # Of the connection. X-Forwarded-For is anybody's to write, so it is not looked at.
        address = str(client[0]) if client else None
        if self._authenticator is None:
            if why := why_not_local(address, scope["headers"]):
                raise keyless_stranger(why)
            return Caller(ANONYMOUS)
        caller = await self._by_key(self._authenticator, address or "", scope["headers"])
        if access is not Access.KEY and not caller.principal.is_admin:
            raise forbidden()
        return caller

    async def confirm(self, digest: bytes | None) -> None:
        """Whether a key still holds that was let in before.

        Args:
            digest: `Caller.digest`.

        Raises:
            Refusal: it does not, or nobody can tell.
        """
        if self._authenticator is None or digest is None:
            return
        try:
            principal = await self._authenticator.confirm(digest)
        except LedgerUnavailable:
            raise ledger_unavailable() from None
        if principal is None:
            raise invalid_key()

    async def _by_key(
        self, authenticator: Authenticator, address: str, headers: list[tuple[bytes, bytes]]
    ) -> Caller:
        try:
            secret = read_secret(headers)
        except InvalidCredential:
            raise self._wrong_key(address) from None
        if secret is None:
            raise missing_key()
        if (known := authenticator.known(secret)) is not None:
            return Caller(known, authenticator.digest(secret))
        if wait_s := self._throttle.wait_s(address):
            raise too_many_auth_failures(wait_s)
        try:
            principal = await authenticator.principal(secret)
        except LedgerUnavailable:
            raise ledger_unavailable() from None
        if principal is None:
            raise self._wrong_key(address)
        return Caller(principal, authenticator.digest(secret))

    def _wrong_key(self, address: str) -> Exception:
        if wait_s := self._throttle.wait_s(address):
            return too_many_auth_failures(wait_s)
        self._throttle.failed(address)
        return invalid_key()
