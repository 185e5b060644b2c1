"""Which databases a number of ingress replicas can share."""

from __future__ import annotations

from cluster.exceptions import ConfigError

__all__ = ["check_database"]


def check_database(url: str, num_replicas: int, where: str = "args") -> None:
    """Refuse one SQLite file for several ingress replicas.

    Args:
        url: of the ledger, with its variables filled in.
        num_replicas: `http.num_replicas`.
        where: prefix of the key in the message.

    Raises:
        ConfigError: they cannot share it.
    """
    if num_replicas > 1 and url.lstrip().lower().startswith("sqlite"):
        raise ConfigError(
            f"{where}.ledger.url: is SQLite, which serves one ingress replica, not "
            f"{num_replicas} (http.num_replicas); use PostgreSQL"
        )
