"""A real Prometheus, and a real Alertmanager with somebody who listens to it.

Debian's packages `prometheus` and `prometheus-alertmanager`; a test without them is skipped with
the reason. Both are context managers and leave no process and no file behind.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self, TypeVar

import httpx
import pytest
import yaml

__all__ = ["Alertmanager", "Prometheus", "Sample", "ScrapeTarget", "require_programs"]

_PROMETHEUS = "prometheus"
_ALERTMANAGER = "prometheus-alertmanager"
_T = TypeVar("_T")
_START_TIMEOUT_S = 30.0
_STOP_TIMEOUT_S = 10.0


def require_programs(*names: str) -> None:
    """Skip the test where one of them is missing."""
    missing = [name for name in names if shutil.which(name) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)} (Debian: prometheus, prometheus-alertmanager)")


@dataclass(frozen=True, slots=True)
class ScrapeTarget:
    """What Prometheus asks for metrics.

    Attributes:
        job: its label `job`.
        addresses: `host:port`s.
        path: of the metrics there.
        bearer: sent as `Authorization: Bearer`.
        discovery_file: file of targets that Prometheus watches, as Ray writes one; instead of
            `addresses`.
        labels: put on every series.
    """

    job: str
    addresses: tuple[str, ...] = ()
    path: str = "/metrics"
    bearer: str | None = field(default=None, repr=False)
    discovery_file: Path | None = None
    labels: Mapping[str, str] = field(default_factory=dict)

    def config(self) -> dict[str, Any]:
        """As it stands under `scrape_configs`."""
        config: dict[str, Any] = {"job_name": self.job, "metrics_path": self.path}
        if self.bearer is not None:
            config["authorization"] = {"type": "Bearer", "credentials": self.bearer}
        if self.discovery_file is not None:
            files = [str(self.discovery_file)]
            config["file_sd_configs"] = [{"files": files, "refresh_interval": "1s"}]
        else:
            static = {"targets": list(self.addresses), "labels": dict(self.labels)}
            config["static_configs"] = [static]
        return config


@dataclass(frozen=True, slots=True)
class Sample:
    """One series of an answer. `values`: (Unix time, value), one for an instant query."""

    labels: Mapping[str, str]
    values: tuple[tuple[float, float], ...]

    @property
    def value(self) -> float:
        """The last one."""
        return self.values[-1][1]


class _Daemon:
    """A program with an HTTP port of its own and a folder that goes with it."""

    def __init__(self, program: str) -> None:
        require_programs(program)
        self._program = program
        self._folder = Path(tempfile.mkdtemp(prefix=f"moonshard-{program}-"))
        self._process: subprocess.Popen[bytes] | None = None
        self.address = f"127.0.0.1:{_free_port()}"
        self.http = httpx.Client(base_url=f"http://{self.address}", timeout=30, trust_env=False)

    def _start(self, *arguments: str) -> None:
        log = self._folder / "log"
        with log.open("wb") as stream:
            self._process = subprocess.Popen(
                [self._program, f"--web.listen-address={self.address}", *arguments],
                stdout=stream,
                stderr=subprocess.STDOUT,
                cwd=self._folder,
            )

        def is_ready() -> bool:
            assert self._process is not None
            if self._process.poll() is not None:
                raise RuntimeError(f"{self._program} ended:\n{log.read_text()[-4000:]}")
            try:
                return self.http.get("/-/ready").status_code == 200
            except httpx.TransportError:
                return False

        _wait_until(is_ready, _START_TIMEOUT_S, f"{self._program} is ready")

    def stop(self) -> None:
        """End it and remove its files. May be called again."""
        self.http.close()
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def __exit__(self, *_: object) -> None:
        self.stop()


class Prometheus(_Daemon):
    """Scrapes, evaluates rules, answers queries.

    Args:
        targets: what to scrape.
        rules: rule files.
        alertmanager: `host:port` of one, to send alerts to.
        interval_s: between scrapes, and between evaluations of rules.
    """

    def __init__(
        self,
        targets: Sequence[ScrapeTarget],
        *,
        rules: Sequence[Path] = (),
        alertmanager: str | None = None,
        interval_s: int = 1,
    ) -> None:
        super().__init__(_PROMETHEUS)
        interval = f"{interval_s}s"
        config: dict[str, Any] = {
            "global": {
                "scrape_interval": interval,
                "scrape_timeout": interval,
                "evaluation_interval": interval,
            },
            "rule_files": [str(path.resolve()) for path in rules],
            "scrape_configs": [target.config() for target in targets],
        }
        if alertmanager is not None:
            managers = [{"static_configs": [{"targets": [alertmanager]}]}]
            config["alerting"] = {"alertmanagers": managers}
        self._config = config

    def __enter__(self) -> Self:
        path = self._folder / "prometheus.yml"
        path.write_text(yaml.safe_dump(self._config))
        try:
            self._start(
                f"--config.file={path}",
                f"--storage.tsdb.path={self._folder / 'data'}",
                "--log.level=warn",
            )
        except BaseException:
            self.stop()
            raise
        return self

    def query(self, expr: str, at: float | None = None) -> list[Sample]:
        """Series of an expression at one time (Unix time; now).

        Raises:
            ValueError: Prometheus refused the expression.
        """
        parameters = {"query": expr} if at is None else {"query": expr, "time": str(at)}
        data = self._ask("/api/v1/query", parameters)
        if data["resultType"] == "scalar":
            return [Sample({}, (_point(data["result"]),))]
        return [Sample(one["metric"], (_point(one["value"]),)) for one in data["result"]]

    def query_range(self, expr: str, start: float, end: float, step_s: float = 1) -> list[Sample]:
        """Series of an expression over a time range.

        Raises:
            ValueError: Prometheus refused the expression.
        """
        parameters = {"query": expr, "start": str(start), "end": str(end), "step": str(step_s)}
        data = self._ask("/api/v1/query_range", parameters)
        return [Sample(one["metric"], tuple(map(_point, one["values"]))) for one in data["result"]]

    def wait_for(self, expr: str, timeout_s: float = 30) -> list[Sample]:
        """Wait until an expression returns something, and return it.

        Raises:
            TimeoutError: it did not.
        """
        return _wait_until(lambda: self.query(expr), timeout_s, f"{expr} returns something")

    def alerts(self) -> list[dict[str, Any]]:
        """Pending and firing alerts, with `labels`, `annotations`, `state`."""
        alerts: list[dict[str, Any]] = self._ask("/api/v1/alerts", {})["alerts"]
        return alerts

    def targets(self) -> list[dict[str, Any]]:
        """What is scraped, with `health` and `lastError`."""
        targets: list[dict[str, Any]] = self._ask("/api/v1/targets", {})["activeTargets"]
        return targets

    def rules(self) -> list[dict[str, Any]]:
        """All rules, with `health` and `lastError`."""
        groups = self._ask("/api/v1/rules", {})["groups"]
        return [rule for group in groups for rule in group["rules"]]

    def _ask(self, path: str, parameters: Mapping[str, str]) -> Any:
        answer = self.http.get(path, params=dict(parameters)).json()
        if answer["status"] != "success":
            raise ValueError(f"{answer.get('error')} in {parameters}")
        return answer["data"]


class Alertmanager(_Daemon):
    """Takes Prometheus's alerts and hands them to a receiver here, at once.

    Attributes:
        address: `host:port`, for `Prometheus(alertmanager=…)`.
    """

    def __init__(self) -> None:
        super().__init__(_ALERTMANAGER)
        self._receiver = _Receiver()

    def __enter__(self) -> Self:
        path = self._folder / "alertmanager.yml"
        config = {
            "route": {
                "receiver": "webhook",
                "group_by": ["..."],
                "group_wait": "0s",
                "group_interval": "1s",
                "repeat_interval": "1h",
            },
            "receivers": [{"name": "webhook", "webhook_configs": [{"url": self._receiver.url}]}],
        }
        path.write_text(yaml.safe_dump(config))
        try:
            self._start(
                f"--config.file={path}",
                f"--storage.path={self._folder / 'data'}",
                "--cluster.listen-address=",
                "--log.level=warn",
            )
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """End it and the receiver."""
        super().stop()
        self._receiver.close()

    def received(self, name: str | None = None, status: str = "firing") -> list[dict[str, Any]]:
        """Alerts that reached the receiver, in order, with `labels`, `annotations`, `status`."""
        return [
            alert
            for alert in self._receiver.alerts()
            if alert["status"] == status and name in (None, alert["labels"]["alertname"])
        ]

    def wait_for(
        self, name: str, timeout_s: float = 60, status: str = "firing"
    ) -> list[dict[str, Any]]:
        """Wait until an alert of that name has arrived.

        Raises:
            TimeoutError: none did.
        """
        return _wait_until(lambda: self.received(name, status), timeout_s, f"alert {name}")


class _Receiver:
    """An HTTP server on a thread that keeps what Alertmanager posts."""

    def __init__(self) -> None:
        lock, alerts = threading.Lock(), list[dict[str, Any]]()
        self._lock, self._alerts = lock, alerts

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                with lock:
                    alerts.extend(json.loads(body)["alerts"])
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def alerts(self) -> list[dict[str, Any]]:
        with self._lock:
            return list(self._alerts)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def _point(pair: Sequence[Any]) -> tuple[float, float]:
    return float(pair[0]), float(pair[1])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait_until(condition: Callable[[], _T], timeout_s: float, what: str) -> _T:
    deadline = time.monotonic() + timeout_s
    while not (result := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {timeout_s} s")
        time.sleep(0.1)
    return result
