"""What the controller must remember over its own death, kept in Ray's control store."""

from __future__ import annotations

import json
import secrets
from dataclasses import asdict, dataclass, replace

from cluster.ray_adapter import kv_delete, kv_get, kv_put

__all__ = ["ControllerRecord", "cluster_token", "load_record", "next_version", "store_record"]

_RECORD, _TOKEN, _VERSION = "controller", "data_plane_token", "table_version"
TOKEN_BYTES = 32


@dataclass(frozen=True, slots=True)
class ControllerRecord:
    """Attributes:
    config_json: the config that was applied.
    application: Serve application on whose behalf; empty when none.
    established: whether all shards have been ready together once.
    """

    config_json: str
    application: str = ""
    established: bool = False

    def as_established(self) -> ControllerRecord:
        """The same, once all shards were ready."""
        return replace(self, established=True)


def load_record() -> ControllerRecord | None:
    """What was stored; None in a new cluster or after a shutdown."""
    data = kv_get(_RECORD)
    return None if data is None else ControllerRecord(**json.loads(data))


def store_record(record: ControllerRecord | None) -> None:
    """Store it; None forgets it."""
    if record is None:
        kv_delete(_RECORD)
    else:
        kv_put(_RECORD, json.dumps(asdict(record)).encode())


def cluster_token() -> bytes:
    """The data plane's secret: made on the first call in a cluster, the same ever after."""
    token = kv_get(_TOKEN)
    if token is None:
        # As text: it goes through files, whose readers take off white space.
        token = secrets.token_hex(TOKEN_BYTES).encode()
        kv_put(_TOKEN, token)
    return token


def next_version() -> int:
    """A table version above every one before it in this cluster, shutdowns included."""
    version = int(kv_get(_VERSION) or b"0") + 1
    kv_put(_VERSION, str(version).encode())
    return version
