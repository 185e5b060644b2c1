"""A release of the chart whose pods run here, each on a host of its own."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import yaml

from tests.cluster_hosts import Host, Hosts
from tests.helm.documents import Document, find, pods
from tests.helm.helm_cli import CHART, render4
from tests.helm.switches import merged
from tests.kube.containers import Container, Kubelet, kubelet, wait_for
from tests.kube.operator_pods import KubePod, head_service, ray_pods
from tests.kube.pod_environment import secret_value

__all__ = ["NUM_HOSTS", "Release", "redis_pod", "rendered_release", "running_release"]

NUM_HOSTS = 5
"""One for each pod, and one where a head may come back."""
_START_S = 60.0
_DEPLOY_S = 180.0
_STATUS_S = 60.0
_MAX_RESTARTS = 3
_PORT = 8000
_DASHBOARD_PORT = 8265


def rendered_release(values: Mapping[str, Any]) -> tuple[Document, ...]:
    """What Helm makes of the laptop's values and these."""
    laptop = yaml.safe_load((CHART.parent / "values" / "laptop.yaml").read_text())
    return render4(merged(laptop, values)).documents


def redis_pod(documents: tuple[Document, ...]) -> KubePod:
    """The pod of the chart's own Redis."""
    [pod] = [one for one in pods(documents) if one.role == "redis"]
    document = find(documents, "StatefulSet", "redis")
    name, namespace = (document["metadata"][key] for key in ("name", "namespace"))
    return KubePod("redis", f"{name}-0", namespace, pod.labels, pod.spec)


@dataclass
class Release:
    """Its pods, and what clients and the operator do with it.

    Attributes:
        documents: what Helm rendered.
        hosts: of Redis, of the head, of the workers, and a spare one.
        machine: starts containers.
        pods: by their role.
        containers: those that run, by the role of their pod.
        places: where the pods are.
        num_restarts: of containers that ended though nobody ended them.
    """

    documents: tuple[Document, ...]
    hosts: Hosts
    machine: Kubelet
    pods: dict[str, KubePod]
    containers: dict[str, Container] = field(default_factory=dict)
    places: dict[str, Host] = field(default_factory=dict)
    num_restarts: int = 0

    def start(self, role: str, host: Host) -> None:
        """Start the pod of a role, and have its Service lead to it."""
        service = {"redis": find(self.documents, "Service", "redis")["metadata"]["name"]}
        service["head"] = head_service(self.documents)
        if role in service:
            self.machine.know(service[role], host.ip)
        self.places[role] = host
        self.containers[role] = self.machine.start(host, self.pods[role])

    def revive(self) -> None:
        """Start containers that have ended anew, as the kubelet does: on a busy machine Ray gives
        up waiting for itself."""
        for role, container in self.containers.items():
            pod = self.pods[role]
            if not container.is_running and pod.spec.get("restartPolicy", "Always") == "Always":
                assert self.num_restarts < _MAX_RESTARTS, self.outputs()
                self.num_restarts += 1
                self.containers[role] = self.machine.run(self.places[role], pod, pod.container)

    def address(self, role: str) -> str:
        """Of the pod of a role."""
        return self.places[role].ip

    @property
    def admin_key(self) -> str:
        return secret_value(
            self.documents, find(self.documents, "Secret", "admin-key")["metadata"]["name"], "key"
        )

    @property
    def token(self) -> str:
        """Ray's."""
        name = find(self.documents, "RayService")["spec"]["rayClusterConfig"]["authOptions"][
            "secretName"
        ]
        return secret_value(self.documents, name, "auth_token")

    @property
    def url(self) -> str:
        """The router pod's proxy."""
        return f"http://{self.address('router')}:{_PORT}"

    def client(self, key: str | None = None) -> openai.OpenAI:
        """OpenAI's client of it, without retries: a failed request must be seen."""
        key = self.admin_key if key is None else key
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)

    def applications(self, token: str | None = None) -> httpx.Response:
        """What the dashboard tells the operator about the applications."""
        return httpx.get(
            f"http://{self.address('head')}:{_DASHBOARD_PORT}/api/serve/applications/",
            params={"api_type": "declarative"},
            headers=_authorization(self.token if token is None else token),
            timeout=10,
        )

    def deploy(self) -> None:
        """As the operator does: `updateServeDeployment` of its `rayservice_controller.go`, and
        `UpdateDeployments` of `utils/dashboardclient/dashboard_httpclient.go`."""
        config = yaml.safe_load(find(self.documents, "RayService")["spec"]["serveConfigV2"])
        answer = httpx.put(
            f"http://{self.address('head')}:{_DASHBOARD_PORT}/api/serve/applications/",
            json=config,
            headers=_authorization(self.token),
            timeout=60,
        )
        assert answer.is_success, f"{answer.status_code} {answer.text}"

    def dashboard_answers(self) -> bool:
        """Whether the operator can ask the dashboard."""
        try:
            return self.applications().is_success
        except httpx.HTTPError:
            return False

    def is_deployed(self) -> bool:
        """Whether the operator would say that the application runs."""
        try:
            answer = self.applications()
        except httpx.HTTPError:
            return False
        if not answer.is_success:
            return False
        state = answer.json()["applications"].get("moonshard", {})
        assert state.get("status") != "DEPLOY_FAILED", state
        return bool(state.get("status") == "RUNNING")

    def is_ready(self) -> bool:
        """What the router pod's startup probe asks."""
        try:
            return httpx.get(f"{self.url}/ready", timeout=5).is_success
        except httpx.HTTPError:
            return False

    def status(self) -> dict[str, Any]:
        """`moonshard status` in the router pod, as the documentation has it."""
        command = ["moonshard", "status", "--json", "--address", "auto"]
        done = self.containers["router"].run(command, _STATUS_S)
        assert done.stdout, done.stderr[-4000:]
        told: dict[str, Any] = json.loads(done.stdout)
        return told

    def actors(self, role: str, title: str) -> dict[int, str]:
        """Processes of a pod whose title begins so, by the machine's process ids."""
        lines = self.containers[role].command_lines()
        return {pid: line for pid, line in lines.items() if line.startswith(title)}

    def outputs(self) -> str:
        """The end of what every container has said."""
        said = (f"--- {one.name}\n{one.output()}" for one in self.machine.started[-6:])
        return "\n".join(said)


@contextmanager
def running_release(
    folder: Path, hosts: Hosts, documents: tuple[Document, ...]
) -> Iterator[Release]:
    """A release that takes requests; gone afterwards."""
    found = {pod.role: pod for pod in ray_pods(documents)} | {"redis": redis_pod(documents)}
    with kubelet(folder, documents) as machine:
        release = Release(documents, hosts, machine, found)
        for role, host in zip(
            ("redis", "head", "shards-cpu", "router"), hosts.members, strict=False
        ):
            release.start(role, host)
        wait_for(release.dashboard_answers, _START_S, release.outputs)
        release.deploy()

        def is_deployed() -> bool:
            release.revive()
            return release.is_deployed()

        wait_for(is_deployed, _DEPLOY_S, release.outputs)
        wait_for(release.is_ready, _START_S, release.outputs)
        yield release


def _authorization(token: str) -> dict[str, str]:
    return {"x-ray-authorization": f"Bearer {token}"} if token else {}
