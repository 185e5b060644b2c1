"""The fixtures themselves: a real Prometheus and Alertmanager do what the tests rely on."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Gauge, start_http_server

from tests.prometheus import Alertmanager, Prometheus, ScrapeTarget, require_programs

RULE = """
groups:
  - name: test
    rules:
      - {record: "test:doubled", expr: "2 * test_level"}
      - {alert: LevelHigh, expr: "test_level > 10", annotations: {summary: "{{ $value }}"}}
"""


@pytest.fixture
def gauge() -> Iterator[tuple[Gauge, str]]:
    registry = CollectorRegistry()
    server, thread = start_http_server(0, "127.0.0.1", registry)
    yield Gauge("test_level", "A level.", registry=registry), f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_what_is_scraped_can_be_asked_for_and_alerts_arrive(
    gauge: tuple[Gauge, str], tmp_path: Path
) -> None:
    require_programs("prometheus", "prometheus-alertmanager")
    level, address = gauge
    level.set(3)
    rules = tmp_path / "rules.yaml"
    rules.write_text(RULE)
    targets = [ScrapeTarget("test", (address,))]
    with (
        Alertmanager() as alertmanager,
        Prometheus(targets, rules=[rules], alertmanager=alertmanager.address) as prometheus,
    ):
        (sample,) = prometheus.wait_for("test:doubled == 6")
        (series,) = prometheus.query_range(
            "test_level", sample.values[0][0] - 5, sample.values[0][0]
        )
        assert series.labels["job"] == "test"
        assert series.value == 3
        assert prometheus.alerts() == []
        with pytest.raises(ValueError, match="parse error"):
            prometheus.query("sum(")
        level.set(11)
        (alert,) = alertmanager.wait_for("LevelHigh")
        assert alert["annotations"]["summary"] == "11"


def test_targets_can_come_from_a_file_and_credentials_go_along(tmp_path: Path) -> None:
    require_programs("prometheus")
    with _guarded_exporter("Bearer secret") as address:
        found = tmp_path / "discovered.json"
        found.write_text(json.dumps([{"labels": {"job": "ray"}, "targets": [address]}]))
        targets = [
            ScrapeTarget("found", discovery_file=found, bearer="secret"),
            ScrapeTarget("stranger", (address,), bearer="wrong"),
        ]
        assert "secret" not in repr(targets)
        with Prometheus(targets) as prometheus:
            prometheus.wait_for('up{job="ray"} == 1 and on () up{job="stranger"} == 0')


@contextmanager
def _guarded_exporter(expected: str) -> Iterator[str]:
    """Metrics for those who send this `Authorization`; yields `host:port`."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            is_known = self.headers["Authorization"] == expected
            self.send_response(200 if is_known else 401)
            self.end_headers()
            self.wfile.write(b"test_level 1\n" if is_known else b"")

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()
