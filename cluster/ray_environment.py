"""Environment variables that Ray reads when it is imported; so this module does not import it.

Ray hands its environment on to every process it starts.
"""

from __future__ import annotations

import os
import secrets
import sys
from pathlib import Path

from cluster.exceptions import ConfigError

__all__ = ["prepare_connection", "prepare_local_node", "token_file"]

_AUTH_MODE = "RAY_AUTH_MODE"

_LOCAL_NODE = {
    _AUTH_MODE: "token",
    # Ray starts workers at niceness 15: shards would lose against anything else on the machine.
    "RAY_worker_niceness": "0",
    # Its default kills workers at 95 % of memory; weights are meant to fill it.
    "RAY_memory_usage_threshold": "0.98",
    # Ray's name for it is about other systems; off, it binds everything to loopback.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SERVE_LOG_TO_STDERR": "0",
}
# A call after the connection has ended must fail, not start a cluster of its own.
_NO_AUTO_CONNECT = ("RAY_ENABLE_AUTO_CONNECT", "0")


def token_file() -> Path:
    """Where Ray looks for the cluster's token."""
    path = os.environ.get("RAY_AUTH_TOKEN_PATH")
    return Path(path) if path else Path.home() / ".ray" / "auth_token"


def prepare_local_node() -> None:
    """Before a node is started here: loopback only, and no one without the token gets in.

    The token is made on the first start, readable by this user only, and kept where Ray's own
    tools look for it.

    Raises:
        ConfigError: the token cannot be stored.
    """
    assert "ray" not in sys.modules, "Ray reads its environment when it is imported: too late"
    os.environ.update([*_LOCAL_NODE.items(), _NO_AUTO_CONNECT])
    # A leftover address would make Ray join that cluster instead.
    os.environ.pop("RAY_ADDRESS", None)
    if not os.environ.get("RAY_AUTH_TOKEN"):
        _ensure_token(token_file())


def prepare_connection(address: str) -> None:
    """Before a driver connects to a cluster that runs already.

    The token is used where this user has one; `RAY_AUTH_MODE` overrides that.
    """
    if os.environ.get("RAY_AUTH_TOKEN") or token_file().exists():
        os.environ.setdefault(_AUTH_MODE, "token")
    if address.startswith(("127.", "localhost:")):
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    os.environ.update([_NO_AUTO_CONNECT])
    # How many seconds a driver knocks at a cluster that is not there, or refuses it.
    os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "5")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


def _ensure_token(path: Path) -> None:
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not path.exists() or not path.read_text().strip():
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(descriptor, "w") as file:
                file.write(secrets.token_hex(32))
        path.chmod(0o600)  # Ray itself leaves it readable by everyone
    except OSError as error:
        raise ConfigError(
            f"the cluster's token cannot be kept in {path} ({error.strerror}); "
            "set RAY_AUTH_TOKEN_PATH to a file that you may write"
        ) from None
