"""CEL rules of CRDs, evaluated by cel-python as an API server would."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

import celpy

__all__ = ["evaluate", "sample"]

# Kubernetes writes these names, which CEL reserves, with underscores around.
_RESERVED = frozenset(
    {"true", "false", "null", "in", "as", "break", "const", "continue", "else", "for", "function"}
    | {"if", "import", "let", "loop", "package", "namespace", "return", "var", "void", "while"}
)
_TEXTS = ("a", "1s", "/a", "A", "1")


@functools.cache
def _environment() -> Any:
    return celpy.Environment()


@functools.cache
def _program(rule: str) -> Any:
    return _environment().program(_environment().compile(rule))


def evaluate(rule: str, value: Any, old: Any = None) -> bool:
    """Whether a value obeys a rule.

    Raises:
        celpy.CELEvalError, celpy.CELParseError: the rule cannot be evaluated here.
    """
    names = {"self": celpy.json_to_cel(_escaped(value))}
    if old is not None:
        names["oldSelf"] = celpy.json_to_cel(_escaped(old))
    return bool(_program(rule).evaluate(names))


def _escaped(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {
            f"__{key}__" if key in _RESERVED else key: _escaped(one) for key, one in value.items()
        }
    if isinstance(value, list):
        return [_escaped(one) for one in value]
    return value


def sample(schema: Mapping[str, Any]) -> Any:
    """A value with everything that a schema names, to try a rule on."""
    if "default" in schema:
        return schema["default"]
    if "enum" in schema:
        return schema["enum"][0]
    kind = schema.get("type")
    if kind == "object":
        return {name: sample(one) for name, one in schema.get("properties", {}).items()}
    if kind == "array":
        return [sample(schema.get("items", {}))]
    if kind == "boolean":
        return True
    if kind in ("integer", "number"):
        return schema.get("minimum", 1)
    pattern = schema.get("pattern", "")
    return next((text for text in _TEXTS if re.search(pattern, text)), "a")
