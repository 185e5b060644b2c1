"""A gateway with keys: two ingress replicas in front of PostgreSQL, nodes that cost money."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from cluster.config import LedgerConfig
from monitoring.ledger import Ledger
from monitoring.prices import PriceTable
from tests.postgres import PostgresCluster, postgres_cluster, postgres_missing
from tests.serving import MOONSHARD, START_TIMEOUT_S, Server, start_server

__all__ = ["Gateway", "postgres_cluster"]

NODE_USD_PER_HOUR = 7.2
RECOVERY_TIMEOUT_S = 20


@dataclass
class Gateway:
    """The server, its database, and what an administrator has.

    Attributes:
        server: as for any test; its key is the administrator's.
        postgres: where its ledger is.
        database_url: of the ledger.
        ledger: the same database, opened by the test.
    """

    server: Server
    postgres: PostgresCluster
    database_url: str
    ledger: Ledger

    @property
    def headers(self) -> dict[str, str]:
        """An administrator's."""
        return {"Authorization": f"Bearer {self.server.key}"}

    def command(self, *arguments: str) -> str:
        """stdout of a `moonshard` command on this ledger."""
        done = subprocess.run(
            [MOONSHARD, *arguments, "--config", str(self.server.config)],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()


@pytest.fixture(scope="session")
def gateway(
    tmp_path_factory: pytest.TempPathFactory, postgres_cluster: PostgresCluster
) -> Iterator[Gateway]:
    """One router replica that may become two, two shards, two ingress replicas."""
    assert postgres_missing() is None
    url = postgres_cluster.create_database()
    changes = {
        "http": {"num_replicas": 2},
        "gateway": {"require_keys": True, "default_max_tokens": 200, "queue_timeout_s": 120},
        "ledger": {"url": url},
        "costs": {"node_usd_per_hour": NODE_USD_PER_HOUR},
        "metrics": {"push_interval_s": 0.5},
        "router": {
            "autoscaling": {
                "min_replicas": 1,
                "max_replicas": 2,
                "upscale_delay_s": 3,
                "downscale_delay_s": 5,
            }
        },
        "dispatch": {"recovery_timeout_s": RECOVERY_TIMEOUT_S},
    }
    server = start_server(tmp_path_factory.mktemp("gateway"), changes)
    prices = PriceTable.load(LedgerConfig().prices_path)
    ledger = Ledger.open(url, prices)
    try:
        found = Gateway(server, postgres_cluster, url, ledger)
        server.key = found.command("keys", "bootstrap")
        server.wait_until_ready(START_TIMEOUT_S)
        yield found
    finally:
        ledger.close()
        server.stop()
