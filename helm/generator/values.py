"""Reads values.yaml with its comments: what every value is, and what it may be."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

__all__ = ["Section", "Value", "ValuesError", "leaves", "read_values"]

_DESCRIPTION = "# -- "
_SCHEMA = "# @schema "


class ValuesError(Exception):
    """A comment is missing or wrong; the message names the value."""


@dataclass(frozen=True)
class Value:
    """A value that a user sets as a whole.

    Attributes:
        path: its keys.
        default: what values.yaml says.
        description: the text behind `# --`, on one line.
        schema: what stands behind `# @schema`; empty where there is none.
    """

    path: tuple[str, ...]
    default: Any
    description: str
    schema: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Its keys with dots between them."""
        return ".".join(self.path)


@dataclass(frozen=True)
class Section:
    """A mapping whose entries are described one by one, in their order."""

    path: tuple[str, ...]
    entries: dict[str, Section | Value]


def read_values(path: Path) -> Section:
    """The whole tree.

    Raises:
        ValuesError: a value has no `# --` line, or its `# @schema` line cannot be read.
    """
    text = path.read_text(encoding="utf-8")
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    if not isinstance(root, yaml.MappingNode):
        raise ValuesError(f"{path}: is no mapping")
    return _section(root, (), text.splitlines())


def leaves(section: Section) -> Iterator[Value]:
    """All values below a section, in their order."""
    for entry in section.entries.values():
        if isinstance(entry, Section):
            yield from leaves(entry)
        else:
            yield entry


def _section(node: yaml.MappingNode, path: tuple[str, ...], lines: list[str]) -> Section:
    entries: dict[str, Section | Value] = {}
    for key, value in node.value:
        name = (*path, str(key.value))
        description, schema = _comment(name, key.start_mark.line, lines)
        if description:
            entries[name[-1]] = Value(name, _construct(value), description, schema)
        elif isinstance(value, yaml.MappingNode) and value.value and not schema:
            entries[name[-1]] = _section(value, name, lines)
        else:
            raise ValuesError(f"{'.'.join(name)}: has no line that begins with `# --`")
    return Section(path, entries)


def _comment(name: tuple[str, ...], line: int, lines: list[str]) -> tuple[str, dict[str, Any]]:
    """Description and schema in the comment right above a line."""
    first = line
    while first > 0 and lines[first - 1].lstrip().startswith("#"):
        first -= 1
    description: list[str] = []
    schema: dict[str, Any] = {}
    for comment in (text.strip() for text in lines[first:line]):
        if comment.startswith(_SCHEMA):
            schema = _parse_schema(name, comment.removeprefix(_SCHEMA))
        elif comment.startswith(_DESCRIPTION):
            description = [comment.removeprefix(_DESCRIPTION)]
        elif description:
            description.append(comment.removeprefix("#").strip())
    return " ".join(description), schema


def _parse_schema(name: tuple[str, ...], text: str) -> dict[str, Any]:
    try:
        schema = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValuesError(f"{'.'.join(name)}: `# @schema` is no YAML: {error}") from None
    if not isinstance(schema, dict):
        raise ValuesError(f"{'.'.join(name)}: `# @schema` needs a mapping, `{{...}}`")
    return schema


def _construct(node: yaml.Node) -> Any:
    return yaml.safe_load(yaml.serialize(node, Dumper=yaml.SafeDumper))
