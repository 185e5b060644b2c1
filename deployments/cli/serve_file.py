"""Reading the config file: Ray Serve's own format, checked before anything starts."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cluster.config import MoonshardConfig, parse_config
from cluster.exceptions import ConfigError

__all__ = ["APPLICATION_KEYS", "HTTP_KEYS", "TOP_KEYS", "ServeFile", "load_serve_file"]

# The keys of Ray Serve's schemas, which ignore what they do not know. A test compares them.
TOP_KEYS = (
    "proxy_location",
    "http_options",
    "grpc_options",
    "controller_options",
    "logging_config",
    "tracing_config",
    "applications",
    "target_capacity",
)
HTTP_KEYS = (
    "host",
    "port",
    "root_path",
    "request_timeout_s",
    "keep_alive_timeout_s",
    "ssl_keyfile",
    "ssl_certfile",
    "ssl_keyfile_password",
    "ssl_ca_certs",
)
APPLICATION_KEYS = (
    "name",
    "route_prefix",
    "import_path",
    "runtime_env",
    "host",
    "port",
    "deployments",
    "autoscaling_policy",
    "args",
    "logging_config",
    "external_scaler_enabled",
)
IMPORT_PATHS = {"deployments.app:build": True, "deployments.app:build_native": False}
"""Builders that are served -> whether experts are remote (the other one is for benchmarks)."""
# What `moonshard serve` hands on. The rest means something to `serve deploy` only.
_SERVED_TOP_KEYS = ("proxy_location", "http_options", "logging_config", "applications")
_SERVED_APPLICATION_KEYS = ("name", "route_prefix", "import_path", "args", "logging_config")


@dataclass(frozen=True, slots=True)
class ServeFile:
    """A checked config file.

    Attributes:
        name, route_prefix: of the Serve application.
        args: what its builder takes, as it stands in the file.
        config: the same, checked.
        http_options: Serve's, with host and port filled in.
        remote_experts: whether there are shards.
        proxy_location: Serve's; None for its default.
        logging_config: Serve's; None for its default.
    """

    path: Path
    name: str
    route_prefix: str
    args: dict[str, Any]
    config: MoonshardConfig
    http_options: dict[str, Any]
    remote_experts: bool = True
    proxy_location: str | None = None
    logging_config: dict[str, Any] | None = None

    @property
    def host(self) -> str:
        """Address at which clients are served."""
        return str(self.http_options["host"])

    @property
    def port(self) -> int:
        """Port at which clients are served."""
        return int(self.http_options["port"])

    @property
    def url(self) -> str:
        """Where a client on this machine finds the application."""
        host = "127.0.0.1" if self.host in ("0.0.0.0", "::") else self.host
        scheme = "https" if self.http_options.get("ssl_certfile") else "http"
        root = str(self.http_options.get("root_path", "")).rstrip("/")
        prefix = root + self.route_prefix.rstrip("/")
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{self.port}{prefix}"


def load_serve_file(path: Path) -> ServeFile:
    """Read and check a config file.

    Raises:
        ConfigError: one line with the file, the key and the remedy.
    """
    document = _mapping(_read(path), str(path))
    _check_keys(document, TOP_KEYS, _SERVED_TOP_KEYS, str(path))
    application = _only_application(document, path)
    http = _mapping(document.get("http_options") or {}, f"{path}: http_options")
    _check_keys(http, HTTP_KEYS, HTTP_KEYS, f"{path}: http_options")
    args = application.get("args") or {}
    return ServeFile(
        path=path,
        name=str(application.get("name", "moonshard")),
        route_prefix=str(application.get("route_prefix", "/")),
        args=args,
        config=parse_config(args, where=f"{path}: args"),
        http_options={**http, "host": http.get("host", "127.0.0.1"), "port": _port(http, path)},
        remote_experts=IMPORT_PATHS[application["import_path"]],
        proxy_location=document.get("proxy_location"),
        logging_config=application.get("logging_config") or document.get("logging_config"),
    )


def _read(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; name a config file that exists") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not a text file in UTF-8") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "cannot be read"
        raise ConfigError(f"{path}{place}: not valid YAML: {problem}") from None


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: expected a mapping of settings, got {type(value).__name__}")
    return value


def _check_keys(
    mapping: dict[str, Any], known: Iterable[str], served: Iterable[str], where: str
) -> None:
    for key in map(str, mapping):
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"valid are: {', '.join(known)}"
            raise ConfigError(f"{where}: unknown key {key!r}; {hint}")
        if key not in served:
            raise ConfigError(
                f"{where}: `moonshard serve` does not take {key!r}; leave it out, or use "
                "`serve deploy`"
            )


def _only_application(document: dict[str, Any], path: Path) -> dict[str, Any]:
    applications = document.get("applications")
    if not isinstance(applications, list) or len(applications) != 1:
        raise ConfigError(f"{path}: applications must be a list with one entry")
    application = _mapping(applications[0], f"{path}: applications[0]")
    _check_keys(application, APPLICATION_KEYS, _SERVED_APPLICATION_KEYS, f"{path}: applications[0]")
    if application.get("import_path") not in IMPORT_PATHS:
        raise ConfigError(
            f"{path}: applications[0].import_path must be one of {', '.join(IMPORT_PATHS)}, "
            f"got {application.get('import_path')!r}"
        )
    return application


def _port(http: dict[str, Any], path: Path) -> int:
    port = http.get("port", 8000)
    if not isinstance(port, int) or isinstance(port, bool) or not 1 <= port <= 65535:
        raise ConfigError(f"{path}: http_options.port must be within 1..65535, got {port!r}")
    return port
