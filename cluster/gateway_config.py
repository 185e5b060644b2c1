"""Sections of the configuration about the gateway: callers, usage, money, metrics."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated

from pydantic import Field

from cluster.config_section import KIB, MIB, REPO_ROOT, Section
from cluster.exceptions import ConfigError

__all__ = ["CostsConfig", "GatewayConfig", "HttpConfig", "LedgerConfig", "MetricsConfig"]


_Price = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class HttpConfig(Section):
    """Limits at the ingress. Address and port are Ray Serve's own `http_options`."""

    max_body_bytes: int = Field(default=4 * MIB, ge=KIB)
    """Largest request body; a larger one is answered with 413."""

    body_timeout_s: float = Field(default=60, gt=0)
    """Longest time in which a request's body must have arrived; a slower one gets 408."""

    num_replicas: int = Field(default=1, ge=1)
    """Ingress replicas. More than one needs a PostgreSQL `ledger.url`."""

    num_cpus: float = Field(default=0.25, ge=0)
    """Logical CPUs that Ray reserves for an ingress replica."""

    resources: dict[str, float] = Field(default_factory=dict)
    """Custom Ray resources of an ingress replica, e.g. to keep it to a group of nodes."""


class GatewayConfig(Section):
    """Who may ask, and how much at once. Keys, teams, budgets and limits live in the ledger's
    database (`moonshard keys`, `moonshard teams`)."""

    require_keys: bool = False
    """Ask every caller for an API key. Without keys only callers on this machine are served, each
    with an administrator's rights."""

    admin_key: str | None = Field(default=None, pattern=r"^\$\{\w+\}$")
    """`${NAME}`, the environment variable with the secret of an administrator's key (`sk-ms-` and
    at least 32 random characters), which the gateway makes as it starts unless there is one.
    Unset, `moonshard keys bootstrap` makes the first key."""

    default_max_tokens: int = Field(default=4096, ge=1)
    """Longest answer, in tokens, of a chat request that sets no limit itself."""

    max_queued_requests: int = Field(default=256, ge=0)
    """Requests that wait at an ingress replica while the routers are full; more get 503."""

    queue_timeout_s: float = Field(default=60, gt=0)
    """Longest wait there, before 503."""

    reserved_share: float = Field(default=0.125, ge=0, lt=1)
    """Share of the routers' places that no single team may fill, so that another team's first
    request finds one free."""

    max_auth_failures: int = Field(default=60, ge=1)
    """Wrong keys per minute and client address, before its requests get 429."""

    @property
    def admin_secret(self) -> str | None:
        """What `admin_key` stands for.

        Raises:
            ConfigError: it names a variable that the environment does not have.
        """
        return None if self.admin_key is None else _expanded(self.admin_key, "gateway.admin_key")


class LedgerConfig(Section):
    """Where usage and money are written down."""

    url: str | None = None
    """Database as an SQLAlchemy URL: `postgresql+psycopg://user@host/db`, or `sqlite:///path` for
    one ingress replica; unset, a SQLite file in `state_dir`. `${NAME}` is replaced from the
    environment, so that no password stands in a config file."""

    state_dir: str = "~/.moonshard"
    """Folder, on every node, for the SQLite file and for the router replicas' write-ahead files.
    Counts that are not yet in the database lie there: it must survive the process."""

    prices: str = "configs/prices.yaml"
    """Price table; absolute, or relative to the folder that holds Moonshard's packages."""

    @property
    def state_path(self) -> Path:
        """`state_dir` made absolute."""
        return Path(self.state_dir).expanduser().absolute()

    @property
    def write_ahead_path(self) -> Path:
        """Folder of the router replicas' write-ahead files."""
        return self.state_path / "write-ahead"

    @property
    def prices_path(self) -> Path:
        """`prices` made absolute (relative paths start at `REPO_ROOT`)."""
        path = Path(self.prices).expanduser()
        return path if path.is_absolute() else REPO_ROOT / path

    @property
    def database_url(self) -> str:
        """`url`, or the SQLite file's.

        Raises:
            ConfigError: it names a variable that the environment does not have.
        """
        if self.url is None:
            return f"sqlite:///{self.state_path / 'ledger.db'}"
        return _expanded(self.url, "ledger.url")

    @property
    def is_sqlite(self) -> bool:
        """Whether the database is a file."""
        return self.url is None or self.url.startswith("sqlite")


class CostsConfig(Section):
    """What the machines cost, in USD per hour, for infrastructure cost and cost by experts."""

    node_usd_per_hour: _Price = 0
    """A node of the cluster that no entry below names."""

    node_usd_per_hour_by_resource: dict[str, _Price] = Field(default_factory=dict)
    """The price of nodes that have this Ray resource (`H100`, or a custom one); the first entry
    that fits a node counts."""


class MetricsConfig(Section):
    """Metrics at the gateway's `/metrics`."""

    push_interval_s: float = Field(default=1, gt=0)
    """How often every process hands on what it has counted."""

    top_experts: int = Field(default=20, ge=0)
    """How many of the hottest (layer, expert) have a series of their own."""


def _expanded(text: str, where: str) -> str:
    def value(match: re.Match[str]) -> str:
        found = os.environ.get(match[1])
        if found is None:
            raise ConfigError(f"{where}: the environment has no variable {match[1]}; set it")
        return found

    return re.sub(r"\$\{(\w+)\}", value, text)
