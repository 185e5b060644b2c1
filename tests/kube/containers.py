"""A pod's containers as processes, with mounts, process ids and a network of their own.

A container sees what its pod mounts, and the machine's files otherwise, read-only where the chart
says so; its first process is its command, as for a container runtime. It has the capabilities and
the environment that the chart gives it. What it does not have is the pod's user: a checkout's files
may be root's alone.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from cluster.config import REPO_ROOT
from tests.cluster_hosts import Host
from tests.helm.documents import Document, of_kind
from tests.kube.operator_pods import KubePod
from tests.kube.pod_environment import image_environment, resolved
from tests.kube.quantities import whole

__all__ = ["Container", "Kubelet", "kubelet", "wait_for"]

_STAGE = "/mnt"
_END_S = 15.0
_EXEC_S = 60.0


@dataclass
class Container:
    """One that runs.

    Attributes:
        name: pod and container.
        process: `unshare`, whose only child is the container's first process.
        log: what it prints.
        environment: its own.
        restrict: command that takes the privileges away that the container does not have.
    """

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    environment: Mapping[str, str]
    restrict: Sequence[str]

    @property
    def first(self) -> psutil.Process:
        """Its first process."""
        [child] = psutil.Process(self.process.pid).children()
        return child

    @property
    def is_running(self) -> bool:
        return self.process.poll() is None

    def output(self) -> str:
        """The end of what it has printed."""
        return self.log.read_text(errors="replace")[-6000:]

    def command_lines(self) -> dict[int, str]:
        """Its processes, by id (as the machine sees them)."""
        found = {}
        for process in self.first.children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                found[process.pid] = " ".join(process.cmdline())
        return found

    def start(self, command: Sequence[str], **options: Any) -> subprocess.Popen[str]:
        """Start a command in it, as `kubectl exec` and a pod's lifecycle hooks do."""
        enter = ["nsenter", "-t", str(self.first.pid), "-m", "-n", "-p", "-u"]
        enter += ["env", f"--chdir={REPO_ROOT}"]
        return subprocess.Popen(
            [*enter, *self.restrict, *command], env=dict(self.environment), text=True, **options
        )

    def run(
        self, command: Sequence[str], timeout_s: float = _EXEC_S
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in it."""
        process = self.start(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            output, errors = process.communicate(timeout=timeout_s)
        finally:
            if process.poll() is None:
                process.kill()
                process.communicate()
        return subprocess.CompletedProcess(command, process.returncode, output, errors)

    def stop(self, timeout_s: float) -> bool:
        """SIGTERM to its first process; whether it ended in time."""
        with suppress(psutil.NoSuchProcess, ValueError):
            self.first.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout_s)
        return not self.is_running

    def kill(self) -> None:
        """`kill -9` of its first process, with which the kernel ends the others."""
        with suppress(psutil.NoSuchProcess, ValueError):
            self.first.kill()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(_END_S)
        self.process.kill()  # takes its child along
        self.process.wait(_END_S)


@dataclass
class Kubelet:
    """Starts containers; with names that all of them know.

    Attributes:
        folder: volumes and logs.
        documents: what Helm rendered.
        names: addresses by the names of pods and Services.
        started: every container that it ever had.
    """

    folder: Path
    documents: tuple[Document, ...]
    names: dict[str, str] = field(default_factory=dict)
    started: list[Container] = field(default_factory=list)

    def know(self, name: str, address: str) -> None:
        """Have a name stand for an address from now on, for containers that run as well."""
        self.names[name] = address
        lines = ["127.0.0.1 localhost", *(f"{ip} {name}" for name, ip in self.names.items())]
        # Written in place: containers have mounted this very file.
        with (self.folder / "hosts").open("w") as stream:
            stream.write("\n".join(lines) + "\n")

    def start(self, host: Host, pod: KubePod) -> Container:
        """Run the pod's init containers to their end, and start its first container."""
        self.know(pod.name, host.ip)
        for one in pod.spec.get("initContainers") or []:
            container = self.run(host, pod, one)
            try:
                status = container.process.wait(_EXEC_S)
            finally:
                container.kill()
            if status != 0:
                raise RuntimeError(f"{container.name}: {container.output()}")
        return self.run(host, pod, pod.container)

    def run(self, host: Host, pod: KubePod, container: Mapping[str, Any]) -> Container:
        """Run a container of a pod."""
        number = len(self.started)
        name = f"{pod.name}.{container['name']}"
        environment = resolved(container.get("env") or [], pod, self.documents, host.ip)
        environment = image_environment() | environment
        security = container.get("securityContext") or {}
        restrict = _restriction(security)
        command = [*(container.get("command") or []), *(container.get("args") or [])]
        lines = self._mounts(pod, container, bool(security.get("readOnlyRootFilesystem")))
        lines.append(f"hostname {pod.name}")
        lines.append(f"exec {shlex.join([*restrict, *command])}")
        script = self.folder / f"{number}.sh"
        script.write_text("set -e\n" + "\n".join(lines) + "\n")
        apart = ["unshare", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child", "--uts"]
        process = subprocess.Popen(
            ["ip", "netns", "exec", host.name, *apart, "/bin/sh", str(script)],
            env=environment,
            cwd=REPO_ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        log = self.folder / f"{number}-{name}.log"
        started = Container(name, process, log, environment, restrict)
        self.started.append(started)
        # A pipe, as a container runtime has it, not the file itself: who opens it anew in /proc
        # must not cut it off.
        threading.Thread(target=_copy, args=(process, log), daemon=True).start()
        return started

    def _mounts(self, pod: KubePod, container: Mapping[str, Any], is_read_only: bool) -> list[str]:
        """Shell lines that make what the container sees: the machine's files below a layer of its
        own, in which mount points can be made, and its volumes."""
        root = f"{_STAGE}/root"
        layers = f"lowerdir=/,upperdir={_STAGE}/upper,workdir={_STAGE}/work"
        lines = [
            f"mount -t tmpfs tmpfs {_STAGE}",
            f"mkdir {root} {_STAGE}/upper {_STAGE}/work",
            f"mount -t overlay overlay -o {layers} {root}",
        ]
        lines += [f"mount --rbind {path} {root}{path}" for path in ("/dev", "/proc", "/sys")]
        # Without these where they are on file systems of their own.
        lines += [
            f"mount --rbind {path} {root}{path}"
            for path in map(shlex.quote, _apart(REPO_ROOT, Path(sys.prefix)))
        ]
        volumes = {volume["name"]: volume for volume in pod.spec.get("volumes") or []}
        for mount in sorted(container.get("volumeMounts") or [], key=lambda m: m["mountPath"]):
            target = shlex.quote(root + mount["mountPath"])
            lines.append(f"mkdir -p {target}")
            lines.append(f"{self._mount(pod, volumes[mount['name']], mount)} {target}")
            if mount.get("readOnly"):
                lines.append(f"mount -o remount,bind,ro {target}")
        # Who asks for what the first file does not say (an IPv6 address) is refused at once, as by
        # a cluster's DNS, and does not wait for a server that is not there.
        (self.folder / "resolv.conf").write_text("nameserver 127.0.0.1\n")
        for name in ("hosts", "resolv.conf"):
            lines.append(f"mount --bind {self.folder}/{name} {root}/etc/{name}")
        if is_read_only:
            lines.append(f"mount -o remount,bind,ro {root}")
        lines += [f"cd {root}", f"pivot_root . .{_STAGE}", f"umount -l {_STAGE}"]
        return [*lines, f"cd {shlex.quote(str(REPO_ROOT))}"]

    def _mount(self, pod: KubePod, volume: Mapping[str, Any], mount: Mapping[str, Any]) -> str:
        empty = volume.get("emptyDir")
        if empty is not None and empty.get("medium") == "Memory":
            return f"mount -t tmpfs -o size={whole(empty['sizeLimit'])},mode=1777 tmpfs"
        source = self._source(pod, volume) / str(mount.get("subPath", ""))
        return f"mount --bind {shlex.quote(str(source))}"

    def _source(self, pod: KubePod, volume: Mapping[str, Any]) -> Path:
        """Folder of the machine that is the volume."""
        name = volume["name"]
        if "hostPath" in volume:
            return Path(str(volume["hostPath"]["path"]))
        if "persistentVolumeClaim" in volume:
            folder = self.folder / "claims" / str(volume["persistentVolumeClaim"]["claimName"])
        else:
            folder = self.folder / pod.name / str(name)
        folder.mkdir(parents=True, exist_ok=True)
        if "configMap" in volume:
            [document] = [
                one
                for one in of_kind(self.documents, "ConfigMap")
                if one["metadata"]["name"] == volume["configMap"]["name"]
            ]
            for key, text in document["data"].items():
                (folder / key).write_text(text)
        elif "emptyDir" not in volume and "persistentVolumeClaim" not in volume:
            raise NotImplementedError(f"{pod.name}: volume {volume}")
        return folder


@contextmanager
def kubelet(folder: Path, documents: Iterable[Document]) -> Iterator[Kubelet]:
    """One whose containers are gone afterwards."""
    one = Kubelet(folder, tuple(documents))
    try:
        yield one
    finally:
        for container in reversed(one.started):
            container.kill()


def _restriction(security: Mapping[str, Any]) -> list[str]:
    command = ["setpriv"]
    if not security.get("allowPrivilegeEscalation", True):
        command.append("--no-new-privs")
    capabilities = security.get("capabilities") or {}
    if "ALL" in (capabilities.get("drop") or []) and not capabilities.get("add"):
        command += ["--inh-caps=-all", "--bounding-set=-all"]
    return command if len(command) > 1 else []


def _apart(*folders: Path) -> list[str]:
    """Those on another file system than the root's."""
    return [str(one) for one in folders if one.stat().st_dev != Path("/").stat().st_dev]


def _copy(process: subprocess.Popen[bytes], log: Path) -> None:
    assert process.stdout is not None
    with log.open("wb", buffering=0) as stream:
        while chunk := os.read(process.stdout.fileno(), 65536):
            stream.write(chunk)


def wait_for(condition: Callable[[], bool], timeout_s: float, message: Callable[[], str]) -> None:
    """Poll until the condition holds; the message is made only when it does not in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, message()
        time.sleep(0.3)
