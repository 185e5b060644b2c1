"""Releases of the chart on a fake API server, by either Helm: install, upgrade, rollback, removal.

Rendering alone finds no object in the cluster (`lookup`); these do, as a real installation would.
Hooks are left out: nothing here would run them.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import helm_python
from helm_python import _native

from tests.helm.fake_kube import FakeKube
from tests.helm.helm_cli import CHART, HelmRefused, helm3_environment, helm3_program

__all__ = ["Helm3", "Helm4", "Releases"]

_TIMEOUT_S = 60


class Releases(Protocol):
    """One way to bring releases into a cluster."""

    def install(self, name: str, values: Mapping[str, Any]) -> None:
        """Make a release."""

    def upgrade(self, name: str, values: Mapping[str, Any]) -> None:
        """Change it to other values."""

    def rollback(self, name: str, revision: int) -> None:
        """Change it back to what it was."""

    def uninstall(self, name: str) -> None:
        """Remove it."""


class Helm4:
    """Helm 4, in this process. It keeps its records in memory.

    Raises, in all that it does:
        HelmRefused: Helm did not do it.
    """

    def __init__(self, kube: FakeKube, namespace: str, folder: Path) -> None:
        path = folder / "kubeconfig"
        path.write_text(kube.kubeconfig(namespace))
        self._config = helm_python.Config(
            kubeconfig_path=path, namespace=namespace, storage_driver="memory"
        )
        self._chart = helm_python.Chart.load(CHART)

    def install(self, name: str, values: Mapping[str, Any]) -> None:
        self._call("helm_install", name, values)

    def upgrade(self, name: str, values: Mapping[str, Any]) -> None:
        self._call("helm_upgrade", name, values)

    def rollback(self, name: str, revision: int) -> None:
        options = {"version": revision, "wait": "hookOnly", "disable_hooks": True}
        handle = self._config._raw()
        try:
            _native.call_status("helm_rollback", handle, name, json.dumps(options))
        except helm_python.HelmError as error:
            raise HelmRefused(str(error)) from error

    def uninstall(self, name: str) -> None:
        try:
            _native.call_string(
                "helm_uninstall", self._config._raw(), name, json.dumps({"disable_hooks": True})
            )
        except helm_python.HelmError as error:
            raise HelmRefused(str(error)) from error

    def _call(self, function: str, name: str, values: Mapping[str, Any]) -> None:
        # The library takes the last two options, its Python wrapper does not.
        options = {
            "wait": "hookOnly",
            "timeout_seconds": _TIMEOUT_S,
            "disable_openapi_validation": True,
            "disable_hooks": True,
        }
        try:
            _native.call_string(
                function,
                self._config._raw(),
                _native.HANDLE(0),
                self._chart._raw(),
                None,
                name,
                json.dumps(dict(values)),
                json.dumps(options),
            )
        except helm_python.HelmError as error:
            raise HelmRefused(str(error)) from error


class Helm3:
    """Helm 3, the program. It keeps its records in the cluster.

    Raises, in all that it does:
        HelmRefused: Helm did not do it.
    """

    def __init__(self, kube: FakeKube, namespace: str, folder: Path) -> None:
        self._folder = folder
        self._kubeconfig = folder / "kubeconfig"
        self._kubeconfig.write_text(kube.kubeconfig(namespace))
        self._kubeconfig.chmod(0o600)
        self._program = helm3_program()

    def install(self, name: str, values: Mapping[str, Any]) -> None:
        self._change("install", name, values)

    def upgrade(self, name: str, values: Mapping[str, Any]) -> None:
        self._change("upgrade", name, values)

    def rollback(self, name: str, revision: int) -> None:
        self._run("rollback", name, str(revision), "--no-hooks")

    def uninstall(self, name: str) -> None:
        self._run("uninstall", name, "--no-hooks")

    def _change(self, action: str, name: str, values: Mapping[str, Any]) -> None:
        path = self._folder / "values.yaml"
        path.write_text(json.dumps(dict(values)))
        self._run(
            *(action, name, str(CHART), "--values", str(path)),
            *("--no-hooks", "--disable-openapi-validation"),
        )

    def _run(self, *arguments: str) -> None:
        done = subprocess.run(
            [self._program, *arguments, "--kubeconfig", str(self._kubeconfig)],
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            env=helm3_environment(),
            check=False,
        )
        if done.returncode != 0:
            raise HelmRefused(done.stdout + done.stderr)
