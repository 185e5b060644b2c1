"""Says in one line why an engine did not start.

vLLM's engine runs in processes of its own; when one fails, the replica only hears that something
did ("See root cause above"). Their output goes where the replica's own goes: the cause is there.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.exceptions import MoonshardError

__all__ = ["EngineStartError", "find_cause", "one_line_on_failure"]

_CAUSE_PATTERN = re.compile(r"ERROR [^\]]*\] (?:\w+\.)*(\w+(?:Error|Exception): .+)")
_MAX_OUTPUT_BYTES = 4 * 2**20


class EngineStartError(MoonshardError):
    """The engine did not start; says why and where more of it stands."""


@contextmanager
def one_line_on_failure() -> Iterator[None]:
    """Around the start of an engine.

    Raises:
        EngineStartError: in place of the RuntimeError that tells nothing.
    """
    output = _own_output()
    start = output.stat().st_size if output else 0
    try:
        yield
    except RuntimeError as error:
        cause = find_cause(_read_from(output, start)) if output else None
        if cause is None:
            raise
        raise EngineStartError(f"the engine did not start: {cause}") from error


def find_cause(output: str) -> str | None:
    """The first exception in the log of an engine's processes; later ones follow from it."""
    match = _CAUSE_PATTERN.search(output)
    return match.group(1).strip() if match else None


def _own_output() -> Path | None:
    # Ray writes a worker's output to a file; on a terminal or a pipe there is nothing to read.
    path = Path(os.readlink("/proc/self/fd/1")) if Path("/proc/self/fd/1").exists() else None
    return path if path is not None and path.is_file() else None


def _read_from(path: Path, start: int) -> str:
    with path.open("rb") as file:
        file.seek(start)
        return file.read(_MAX_OUTPUT_BYTES).decode(errors="replace")
