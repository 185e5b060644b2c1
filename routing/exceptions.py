"""Errors of the routing layer, and the root of all of Moonshard's own errors.

MoonshardError
├── PlacementError        experts and shards do not fit each other
├── TableError            a routing table is malformed (built wrong, or bytes that are none)
├── StateFileError        an engine-state file is missing or of another layout
└── TransportError        something between two processes failed
    ├── HandshakeRefused  the other side wants another token (or any, or none)
    ├── WireError         the bytes that arrived are not a frame of ours
    ├── PeerClosed        the other side closed the connection
    ├── ShardRefused      a shard answered a request with an error frame
    └── DeadlineExceeded  the other side did not answer in time
"""

from __future__ import annotations

__all__ = [
    "DeadlineExceeded",
    "HandshakeRefused",
    "MoonshardError",
    "PeerClosed",
    "PlacementError",
    "ShardRefused",
    "StateFileError",
    "TableError",
    "TransportError",
    "WireError",
]


class MoonshardError(Exception):
    """Root of Moonshard's errors. `str(error)` is one line for the person who reads it."""


class PlacementError(MoonshardError, ValueError):
    """Experts and shards do not fit each other; the message says what to change."""


class TableError(MoonshardError, ValueError):
    """A routing table is malformed."""


class StateFileError(MoonshardError):
    """An engine-state file is missing, too short, or of another layout."""


class TransportError(MoonshardError):
    """Something between two processes failed; the work can be tried elsewhere."""


class HandshakeRefused(TransportError):
    """The two sides do not hold the same token."""


class WireError(TransportError):
    """The bytes that arrived are not a frame of ours, or break its limits."""


class PeerClosed(TransportError):
    """The other side closed the connection (a killed process closes its own)."""


class ShardRefused(TransportError):
    """A shard answered a request with an error frame; its connection is fine."""


class DeadlineExceeded(TransportError):
    """The other side did not answer in time."""
