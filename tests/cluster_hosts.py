"""Several hosts on one machine: network namespaces on a bridge, each with a raylet of its own.

A host has its own address, its own processes (killing its first one kills it), its own /dev/shm
and /tmp/ray (two raylets that share those disturb each other). The machine itself sits on the
bridge too, so that a test can speak HTTP with a host.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

__all__ = ["Host", "Hosts", "hosts", "hosts_or_skip"]

REPO_ROOT = Path(__file__).resolve().parents[1]
GCS_PORT = 6379
_MIB = 2**20
_START_TIMEOUT_S = 90.0
_RAY_ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",
    "RAY_worker_niceness": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_AUTO_CONNECT": "0",
    # A dead host is noticed within seconds, and yet a busy machine not taken for one.
    "RAY_health_check_initial_delay_ms": "0",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "3",
    "OMP_NUM_THREADS": "1",
}


@contextmanager
def hosts_or_skip(count: int, ray: bool = True) -> Iterator[Hosts]:
    """`hosts`; skips the test, with the reason, on a machine that cannot have them."""
    reason = _why_no_hosts()
    if reason:
        pytest.skip(reason)
    with hosts(count, ray) as group:
        yield group


def _why_no_hosts() -> str:
    """Why this machine cannot have them; empty when it can."""
    missing = [tool for tool in ("ip", "unshare", "nsenter") if shutil.which(tool) is None]
    if missing:
        return f"needs {', '.join(missing)} (iproute2, util-linux)"
    if os.geteuid() != 0:
        return "needs root: network namespaces"
    name = f"mst{secrets.token_hex(2)}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode != 0:
        return f"no network namespaces here: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", name], check=True)
    return ""


@dataclass(slots=True)
class Host:
    """One of them.

    Attributes:
        name: of its network namespace.
        link: the machine's end of its cable.
        ip: its address.
        init: its first process (as the machine sees it); None while it is down.
    """

    name: str
    link: str
    ip: str
    folder: Path
    init: subprocess.Popen[bytes] | None = None


@dataclass(slots=True)
class Hosts:
    """The hosts of one test, the first of which is Ray's head."""

    members: list[Host]
    folder: Path
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def ray_address(self) -> str:
        """host:port of Ray's control store."""
        return f"{self.members[0].ip}:{GCS_PORT}"

    def boot(self, index: int) -> None:
        """Start the host's first process: namespaces and private folders, nothing else."""
        host = self.members[index]
        script = (
            "mount -t tmpfs -o size=600m tmpfs /dev/shm && "
            f"mount --bind {host.folder} /tmp/ray && exec sleep infinity"
        )
        host.folder.mkdir(exist_ok=True)
        Path("/tmp/ray").mkdir(exist_ok=True)
        isolate = ["unshare", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child"]
        host.init = subprocess.Popen(
            ["ip", "netns", "exec", host.name, *isolate, "sh", "-c", script],
            stdin=subprocess.DEVNULL,
        )
        _poll(lambda: self.run(index, ["mountpoint", "-q", "/tmp/ray"]).returncode == 0)

    def start_ray(
        self, index: int, num_cpus: float = 2, memory_mib: int = 6000, dashboard: bool = False
    ) -> None:
        """Start the host's raylet; the first host's is the head, with a dashboard if asked."""
        host = self.members[index]
        role = ["--head", f"--port={GCS_PORT}", f"--include-dashboard={str(dashboard).lower()}"]
        if index > 0:
            role = [f"--address={self.ray_address}"]
        command = [
            _script("ray"),
            "start",
            *role,
            f"--node-ip-address={host.ip}",
            f"--num-cpus={num_cpus}",
            f"--memory={memory_mib * _MIB}",
            f"--object-store-memory={80 * _MIB}",
        ]
        started = self.run(index, command, timeout_s=_START_TIMEOUT_S)
        if started.returncode != 0:
            raise RuntimeError(f"no raylet on {host.name}: {started.stdout}{started.stderr}")

    def run(
        self,
        index: int,
        command: Sequence[str],
        timeout_s: float = 60.0,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on a host, in the repository, with the cluster's environment."""
        return subprocess.run(
            [*self._enter(index), *command],
            cwd=REPO_ROOT,
            env={**os.environ, **self.environment, **(env or {})},
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )

    def start(
        self, index: int, command: Sequence[str], env: Mapping[str, str] | None = None
    ) -> subprocess.Popen[str]:
        """Start a command on a host; stdout and stderr come through one pipe."""
        return subprocess.Popen(
            [*self._enter(index), *command],
            cwd=REPO_ROOT,
            env={**os.environ, **self.environment, **(env or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def kill(self, index: int) -> None:
        """Lose the host: all its processes at once. `boot` brings an empty one back."""
        init = self.members[index].init
        if init is not None:
            subprocess.run(["kill", "-9", str(_child(init.pid))], check=False)
            init.kill()
            init.wait(10)
            self.members[index].init = None

    def cut(self, index: int) -> None:
        """Pull the host's cable."""
        _ip("link", "set", self.members[index].link, "down")

    def mend(self, index: int) -> None:
        """Plug it in again."""
        _ip("link", "set", self.members[index].link, "up")

    def _enter(self, index: int) -> list[str]:
        init = self.members[index].init
        assert init is not None, f"{self.members[index].name} is down"
        return ["nsenter", "-t", str(_child(init.pid)), "-m", "-n", "-p", "--wd=."]


@contextmanager
def hosts(count: int, ray: bool = True) -> Iterator[Hosts]:
    """`count` hosts, with a Ray cluster over them unless `ray` is False; all gone afterwards."""
    tag = secrets.token_hex(2)
    subnet = f"198.18.{secrets.randbelow(250)}"  # set apart for such tests: RFC 2544
    folder = Path(tempfile.mkdtemp(prefix="msh-"))
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    members = [
        Host(f"ms{tag}h{i}", f"ms{tag}v{i}", f"{subnet}.{i + 1}", folder / f"ray{i}")
        for i in range(count)
    ]
    group = Hosts(members, folder, _RAY_ENVIRONMENT | {"RAY_AUTH_TOKEN_PATH": str(token)})
    bridge = f"ms{tag}br"
    try:
        _wire(bridge, subnet, members)
        for index in range(count):
            group.boot(index)
            if ray:
                group.start_ray(index)
        yield group
    finally:
        for index in range(count):
            group.kill(index)
        _unwire(bridge, members)
        shutil.rmtree(folder, ignore_errors=True)


def _wire(bridge: str, subnet: str, members: Sequence[Host]) -> None:
    _ip("link", "add", bridge, "type", "bridge")
    _ip("addr", "add", f"{subnet}.254/24", "dev", bridge)
    _ip("link", "set", bridge, "up")
    for host in members:
        _ip("netns", "add", host.name)
        _ip("link", "add", host.link, "type", "veth", "peer", "name", "eth0", "netns", host.name)
        _ip("link", "set", host.link, "master", bridge, "up")
        _ip("-n", host.name, "addr", "add", f"{host.ip}/24", "dev", "eth0")
        _ip("-n", host.name, "link", "set", "eth0", "up")
        _ip("-n", host.name, "link", "set", "lo", "up")
        _ip("-n", host.name, "route", "add", "default", "via", f"{subnet}.254")


def _unwire(bridge: str, members: Sequence[Host]) -> None:
    for host in members:
        subprocess.run(["ip", "netns", "del", host.name], capture_output=True)
        subprocess.run(["ip", "link", "del", host.link], capture_output=True)
    subprocess.run(["ip", "link", "del", bridge], capture_output=True)


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


def _child(pid: int) -> int:
    """The first process inside the new namespaces: what `unshare --fork` started."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(children[0]) if children else pid


def _script(name: str) -> str:
    return str(Path(sys.executable).parent / name)


def _poll(is_true: object, timeout_s: float = 10.0) -> None:
    assert callable(is_true)
    deadline = time.monotonic() + timeout_s
    while not is_true():
        if time.monotonic() > deadline:
            raise TimeoutError("a host did not come up")
        time.sleep(0.05)
