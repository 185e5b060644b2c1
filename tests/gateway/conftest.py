"""A gateway with keys: two ingress replicas in front of PostgreSQL, nodes that cost money."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from cluster.config import LedgerConfig
from monitoring.ledger import Ledger, Limits
from monitoring.prices import PriceTable
from tests.gateway.hostile import SHOWN, MakeKey
from tests.postgres import PostgresCluster, postgres_cluster, postgres_missing
from tests.serving import MOONSHARD, START_TIMEOUT_S, Server, start_server

__all__ = ["Gateway", "postgres_cluster"]

NODE_USD_PER_HOUR = 7.2
PUSH_INTERVAL_S = 0.5
RECOVERY_TIMEOUT_S = 20


Series = tuple[str, tuple[tuple[str, str], ...]]


@dataclass(frozen=True)
class Metrics:
    """A scrape: series -> value."""

    values: dict[Series, float]

    @classmethod
    def parse(cls, text: str) -> Metrics:
        return cls(
            {
                (sample.name, tuple(sorted(sample.labels.items()))): sample.value
                for family in text_string_to_metric_families(text)
                for sample in family.samples
            }
        )

    def total(self, name: str, **labels: str) -> float:
        """Sum of the series of a name that have these labels."""
        wanted = set(labels.items())
        return sum(
            value
            for (series, found), value in self.values.items()
            if series == name and wanted <= set(found)
        )

    def counters(self) -> dict[Series, float]:
        """Everything that may only grow, but for the time of idle nodes."""
        return {
            series: value
            for series, value in self.values.items()
            if series[0].endswith(("_total", "_bucket", "_count"))
            and not series[0].startswith("moonshard_infrastructure_cost")
        }


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

    def key(self, team: str, **limits: Any) -> str:
        """The secret of a new key of a team."""
        _, secret = self.ledger.keys.create(team, f"of {team}", limits=Limits(**limits))
        return secret

    def metrics(self) -> Metrics:
        """What `/metrics` says now."""
        answer = httpx.get(f"{self.server.url}/metrics", headers=self.headers, timeout=30)
        assert answer.status_code == httpx.codes.OK, answer.text
        return Metrics.parse(answer.text)

    def settled_metrics(self) -> Metrics:
        """What it says once nothing changes any more."""
        before = self.metrics()
        while True:
            time.sleep(4 * PUSH_INTERVAL_S)
            now = self.metrics()
            if now.counters() == before.counters():
                return now
            before = now

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
        # Logical: two routers, two shards and two ingresses have room, on whatever machine.
        "ray": {"num_cpus": 4},
        "http": {"num_replicas": 2},
        "gateway": {"require_keys": True, "default_max_tokens": 200, "queue_timeout_s": 120},
        "ledger": {"url": url},
        "costs": {"node_usd_per_hour": NODE_USD_PER_HOUR},
        "metrics": {"push_interval_s": PUSH_INTERVAL_S},
        "router": {
            # Below the target: what runs never asks for a second replica, only what waits does.
            "max_ongoing_requests": 8,
            "autoscaling": {
                "min_replicas": 1,
                "max_replicas": 2,
                "target_ongoing_requests": 16,
                "upscale_delay_s": 3,
                "downscale_delay_s": 5,
            },
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


@pytest.fixture
def make_key(gateway: Gateway) -> MakeKey:
    """Makes a key and returns its secret; options are those of `KeyStore.create`."""

    def make(team: str = "security", **options: Any) -> str:
        secret = gateway.ledger.keys.create(team, "test", **options)[1]
        SHOWN.append(secret)
        return secret

    return make
