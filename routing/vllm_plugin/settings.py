"""Settings of the plugin: what a router replica tells the engine worker that it starts."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import math
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from routing.vllm_plugin.exceptions import PluginSettingsError

__all__ = ["BLOCK", "LOAD_FORMAT", "PluginSettings"]

BLOCK = "moonshard"
"""Key of our block when `additional_config` is a dict."""

LOAD_FORMAT = "moonshard"
"""Name of our weight loader (`load_format`)."""


@dataclass(frozen=True, kw_only=True)
class PluginSettings:
    """Give it to vLLM as `additional_config=PluginSettings(...)`.

    vLLM hashes `additional_config` into the key of its compile cache. Of an object it takes
    `compute_hash()`, of a dict the JSON text; ports and paths that change with every start would
    recompile every start. Hence an object; the dict form `{"moonshard": {...}}` with the same
    keys is for the command line (`--additional-config`).

    Attributes:
        feed: "host:port" of the table feed of the replica.
        state_path: file made by `EngineState.create`.
        costs_path: file made by `CostSlots.create`; None where nobody wants to know what requests
            cost.
        token_file: file (mode 600) with the cluster's token; None where shards take none. Only
            its path passes through vLLM, which logs its config.
        recovery_timeout_s: how long a step waits for experts that nobody serves.
        request_timeout_s: longest time for one exchange with a shard.
        connect_timeout_s: longest time to connect to a shard.
        start_timeout_s: how long the engine's start waits for the first whole table.
    """

    feed: str
    state_path: str
    costs_path: str | None = None
    token_file: str | None = None
    recovery_timeout_s: float = 60.0
    request_timeout_s: float = 30.0
    connect_timeout_s: float = 2.0
    start_timeout_s: float = 60.0

    def __post_init__(self) -> None:
        host, _, port = self.feed.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise PluginSettingsError(f"feed: expected host:port, got {self.feed!r}")
        for name in _SECONDS:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise PluginSettingsError(f"{name}: expected seconds, got {value!r}")
            if not math.isfinite(value) or value <= 0:
                raise PluginSettingsError(f"{name}: expected more than 0 seconds, got {value!r}")

    @classmethod
    def parse(cls, block: Any) -> Self:
        """Read the dict form.

        Raises:
            PluginSettingsError: not a mapping, an unknown or missing key, or a bad value.
        """
        if not isinstance(block, dict):
            raise PluginSettingsError(f"{BLOCK}: expected a mapping, got {type(block).__name__}")
        types = typing.get_type_hints(cls)
        for key, value in block.items():
            if key not in types:
                raise PluginSettingsError(f"{BLOCK}.{key}: unknown key; {_hint(str(key), types)}")
            if types[key] is not float and not isinstance(value, types[key]):
                raise PluginSettingsError(f"{BLOCK}.{key}: expected a string, got {value!r}")
        required = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING]
        missing = [name for name in required if name not in block]
        if missing:
            raise PluginSettingsError(f"{BLOCK}: missing key {missing[0]!r}")
        return cls(**block)

    @classmethod
    def of(cls, additional_config: Any) -> Self | None:
        """Our settings in a `VllmConfig.additional_config`; None when vLLM runs natively."""
        if isinstance(additional_config, cls):
            return additional_config
        if isinstance(additional_config, dict) and BLOCK in additional_config:
            return cls.parse(additional_config[BLOCK])
        return None

    def read_token(self) -> bytes | None:
        """The cluster's token, or None where there is none.

        Raises:
            PluginSettingsError: the file cannot be read, is empty, or others can read it.
        """
        if self.token_file is None:
            return None
        path = Path(self.token_file)
        try:
            mode = path.stat().st_mode
            token = path.read_bytes().strip()
        except OSError as error:
            raise PluginSettingsError(f"token_file {path}: {error.strerror}") from None
        if mode & 0o077:
            raise PluginSettingsError(f"token_file {path}: others can read it; chmod it to 600")
        if not token:
            raise PluginSettingsError(f"token_file {path}: it is empty")
        return token

    def compute_hash(self) -> str:
        """vLLM's `SupportsHash`. Nothing in here changes the compiled code, its presence does."""
        return hashlib.sha256(b"moonshard remote experts").hexdigest()


_SECONDS = tuple(f.name for f in dataclasses.fields(PluginSettings) if f.name.endswith("_s"))


def _hint(key: str, known: typing.Iterable[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"valid are: {', '.join(known)}"
