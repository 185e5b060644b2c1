"""How often an address may show a wrong key."""

from __future__ import annotations

import ipaddress
import math
import time
from collections import OrderedDict
from collections.abc import Callable

__all__ = ["FailureThrottle", "subject_of"]

_WINDOW_S = 60.0
_MAX_ADDRESSES = 4096
_IPV6_PREFIX = 64


class FailureThrottle:
    """Counts failures per address and minute, in a table of bounded size.

    Args:
        limit: failures per minute after which an address must wait.
        clock: monotonic seconds.
        max_addresses: size of the table; the addresses that failed longest ago are forgotten.
    """

    def __init__(
        self,
        limit: int,
        clock: Callable[[], float] = time.monotonic,
        max_addresses: int = _MAX_ADDRESSES,
    ) -> None:
        self._limit = limit
        self._clock = clock
        self._max_addresses = max_addresses
        self._windows: OrderedDict[str, tuple[float, int]] = OrderedDict()

    def wait_s(self, address: str) -> int:
        """Whole seconds before this address may try again; 0 when it may now."""
        started, count = self._windows.get(subject_of(address), (0.0, 0))
        left_s = started + _WINDOW_S - self._clock()
        return math.ceil(left_s) if count >= self._limit and left_s > 0 else 0

    def failed(self, address: str) -> None:
        """Count a wrong key."""
        subject, now = subject_of(address), self._clock()
        started, count = self._windows.pop(subject, (now, 0))
        if now - started >= _WINDOW_S:
            started, count = now, 0
        self._windows[subject] = (started, count + 1)
        while len(self._windows) > self._max_addresses:
            self._windows.popitem(last=False)


def subject_of(address: str) -> str:
    """Whom an address stands for: itself, or its /64, which one IPv6 host has all of."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is None:
        return str(ipaddress.ip_network((ip, _IPV6_PREFIX), strict=False))
    return str(ip)
