"""The tables of the chart's README: its values, and the keys of Moonshard's configuration."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from helm.generator.kubernetes import Schema
from helm.generator.schema import CONFIG, config_schema
from helm.generator.values import Section, ValuesError, leaves

__all__ = ["readme_text"]

_LONGEST_DEFAULT = 80


def readme_text(present: str, values: Section) -> str:
    """A README with its tables as they must be.

    Args:
        present: the file, with the marks between which the tables lie.
        values: values.yaml.

    Raises:
        ValuesError: a mark is missing.
    """
    own = [("value", "default", "what it is")]
    own += [
        (f"`{value.name}`", _shown(value.default), value.description) for value in leaves(values)
    ]
    set_here = {
        value.path[1:]: value.default for value in leaves(values) if value.path[0] == CONFIG
    }
    config = [("key", "default", "what it is")]
    config += list(_config_rows(config_schema(), set_here))
    return _between(_between(present, "values", _table(own)), "config", _table(config))


def _config_rows(
    schema: Schema, set_here: dict[tuple[str, ...], Any]
) -> Iterator[tuple[str, str, str]]:
    definitions = schema["definitions"]

    def rows(node: Schema, path: tuple[str, ...]) -> Iterator[tuple[str, str, str]]:
        for key, entry in node["properties"].items():
            below = (*path, key)
            target = definitions.get(str(entry.get("$ref", "")).rpartition("/")[2])
            if target is not None and "properties" in target:
                yield from rows(target, below)
                continue
            default = set_here.get(below, entry.get("default"))
            yield f"`{'.'.join(below)}`", _shown(default), " ".join(entry["description"].split())

    yield from rows(schema, ())


def _shown(default: Any) -> str:
    text = json.dumps(default)
    if default == {} or default == [] or len(text) <= _LONGEST_DEFAULT:
        return f"`{text}`"
    return "see values.yaml"


def _table(rows: list[tuple[str, str, str]]) -> str:
    lines = [f"| {' | '.join(_cell(cell) for cell in row)} |" for row in rows]
    return "\n".join([lines[0], "|---|---|---|", *lines[1:]])


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _between(text: str, name: str, content: str) -> str:
    begin, end = f"<!-- {name}: begin, written by helm.build -->", f"<!-- {name}: end -->"
    head, found, rest = text.partition(begin)
    _, found_end, tail = rest.partition(end)
    if not found or not found_end:
        raise ValuesError(f"README.md: the marks `{begin}` and `{end}` are missing")
    return f"{head}{begin}\n\n{content}\n\n{end}{tail}"
