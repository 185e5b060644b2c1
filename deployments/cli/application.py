"""The Serve application of `moonshard serve`: started, watched, stopped. Imports Ray."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import httpx
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview

from cluster.client import controller_status, stop_controller
from cluster.exceptions import MoonshardError
from cluster.fleet import plan_fleet
from cluster.placement_groups import Demand, check_room
from cluster.ray_adapter import list_nodes, log_folder, serve_is_running
from deployments.app import build, build_native
from deployments.cli.progress import Progress
from deployments.cli.serve_file import ServeFile
from deployments.llm_config import replica_cpus

__all__ = ["Application", "StartFailed"]

_POLL_S = 0.5
_WATCH_S = 2.0
_MAX_MISSES = 5
_BROKEN = (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY)


class StartFailed(MoonshardError):
    """The application could not be started, or broke down later."""


class Application:
    """What one config file describes, on the cluster that this process is connected to.

    Args:
        file: the config.
        say: shows a line to the person who waits.
        owns_node: whether the Ray node goes with the application.
    """

    def __init__(self, file: ServeFile, say: Callable[[str], None], *, owns_node: bool) -> None:
        self._file = file
        self._owns_node = owns_node
        self._say = say
        self._progress = Progress(say)
        self._is_ours = False

    def start(self) -> None:
        """Deploy, and wait until it takes traffic.

        Raises:
            PlacementFailedError: the cluster is too small.
            StartFailed: it did not come up, or somebody else's has its name; says why.
        """
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        if serve_is_running() and self._overview() is not None:
            raise StartFailed(
                f"an application named {self._file.name!r} runs on this cluster already; stop it "
                "first (`moonshard stop`), or give applications[0].name another name"
            )
        self._check_room()
        self._is_ours = True
        serve.start(
            proxy_location=self._file.proxy_location,
            http_options=self._file.http_options,
            logging_config=self._file.logging_config,
        )
        builder = build if self._file.remote_experts else build_native
        target = serve.RunTarget(
            target=builder(self._file.args),
            name=self._file.name,
            route_prefix=self._file.route_prefix,
            logging_config=self._file.logging_config,
        )
        serve.run_many(
            [target],
            wait_for_ingress_deployment_creation=False,
            wait_for_applications_running=False,
        )
        self._await_ready()

    def watch(self) -> None:
        """Show what changes, for as long as the application runs.

        Raises:
            StartFailed: Ray or the application is gone.
        """
        misses = 0
        while True:
            time.sleep(_WATCH_S)
            try:
                overview = self._overview()
                self._progress.show_health(controller_status())
            except RayError as error:
                misses += 1
                if misses >= _MAX_MISSES:
                    raise StartFailed(
                        f"Ray does not answer any more: {_last_line(error)}"
                    ) from None
                continue
            misses = 0
            if overview is None:
                raise StartFailed("the application was deleted by someone else")

    def stop(self, drain_s: float) -> None:
        """Take the application down, then shards and controller; running answers get `drain_s`.

        On a cluster of others Serve goes too, unless it serves something else. Nothing is taken
        down that this process has not deployed.
        """
        if not self._is_ours:
            return
        try:
            serve.delete(self._file.name, _blocking=False)
            deadline = time.monotonic() + drain_s
            while self._overview() is not None and time.monotonic() < deadline:
                time.sleep(_POLL_S)
            is_drained = self._overview() is None
            if not is_drained:
                self._say("answers still under way are cut off")
            status = controller_status()
            if status is not None and status["application"] in ("", self._file.name):
                stop_controller(self._file.config.shards.drain_timeout_s if is_drained else 0)
            if not self._owns_node and not serve.status().applications:
                serve.shutdown()
        except (RayError, RayServeException, ConnectionError) as error:
            # An own node is taken down next, which needs no cooperation.
            self._say(f"could not be stopped in order: {_last_line(error)}")

    def _check_room(self) -> None:
        router, http = self._file.config.router, self._file.config.http
        replica = {"CPU": replica_cpus(self._file.config), "GPU": router.num_gpus}
        check_room(
            [
                *([self._shard_demand()] if self._file.remote_experts else []),
                Demand("a router replica", replica, router.autoscaling.min_replicas),
                Demand("an ingress replica", {"CPU": http.num_cpus}, http.num_replicas),
            ],
            list_nodes(),
        )

    def _shard_demand(self) -> Demand:
        shards, plan = self._file.config.shards, plan_fleet(self._file.config)
        what = f"a shard (of {shards.count})"
        return Demand(what, plan.resources, shards.count, shards.placement_strategy)

    def _await_ready(self) -> None:
        config = self._file.config
        patience_s = config.shards.start_timeout_s + config.router.start_timeout_s
        deadline = time.monotonic() + patience_s
        while time.monotonic() < deadline:
            status = controller_status()
            if status and status["state"] == "failed":
                raise StartFailed(f"the shards could not be started: {status['reason']}")
            overview = self._overview()
            if overview is not None and overview.status in _BROKEN:
                raise StartFailed(f"{_reason(overview)} (logs: {log_folder()})")
            self._progress.show_start(status, overview)
            if overview and overview.status is ApplicationStatus.RUNNING and self._answers():
                return
            time.sleep(_POLL_S)
        raise StartFailed(f"not ready within {patience_s:g} s (start_timeout_s of shards, router)")

    def _overview(self) -> ApplicationStatusOverview | None:
        return serve.status().applications.get(self._file.name)

    def _answers(self) -> bool:
        try:
            # Our own server: neither through a proxy of the environment's, nor is its certificate,
            # which is made out to the name that clients use, of interest here.
            answer = httpx.get(f"{self._file.url}/ready", timeout=5, trust_env=False, verify=False)
            return answer.status_code == httpx.codes.OK
        except httpx.HTTPError:
            return False


def _reason(overview: ApplicationStatusOverview) -> str:
    """The line that says what went wrong, out of Serve's account with its tracebacks."""
    messages = [deployment.message for deployment in overview.deployments.values()]
    for message in (*messages, overview.message):
        if "Error" in message or "failed" in message:
            return _last_line(message)
    return _last_line(overview.message) or overview.status.value


def _last_line(text: object) -> str:
    lines = [line.strip() for line in str(text).splitlines() if line.strip()]
    return lines[-1] if lines else ""
