"""Errors of the cluster layer.

MoonshardError
├── ConfigError          a setting is wrong; the message names it and says what is allowed
├── CheckpointError      the checkpoint is missing, incomplete or of a kind we do not serve
├── PlacementFailedError the cluster has no room for a shard that the config asks for
└── ShardStartError      a shard process could not load or bind
"""

from __future__ import annotations

from routing.exceptions import MoonshardError

__all__ = [
    "CheckpointError",
    "ConfigError",
    "MoonshardError",
    "PlacementFailedError",
    "ShardStartError",
]


class ConfigError(MoonshardError):
    """A setting is wrong. `str(error)` is one line that names the setting and the remedy."""


class CheckpointError(MoonshardError):
    """The checkpoint is missing, incomplete, or of a kind that shards cannot serve."""


class PlacementFailedError(MoonshardError):
    """No node has room for a shard with the resources that the config asks for."""


class ShardStartError(MoonshardError):
    """A shard could not load its experts or bind its data-plane port."""
