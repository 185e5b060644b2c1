"""Declared tools, calls, results: conversations in which the model may call."""

from __future__ import annotations

import dataclasses
import json
import random
from typing import Any

from models.data.sample import Exchange, Message, Split, Tool, say, split_of
from models.data.tool_pool import POOL, ToolKind, Value


@dataclasses.dataclass(frozen=True, slots=True)
class DeclaredTool:
    """A tool as one conversation knows it: the name and argument names that were drawn."""

    kind: ToolKind
    name: str
    arguments: tuple[str, ...]
    declaration: Tool


def _parameters(kind: ToolKind, names: tuple[str, ...], described: bool) -> dict[str, Any]:
    properties: dict[str, Any] = {}
    for slot, name in zip(kind.slots, names, strict=True):
        properties[name] = {"type": slot.type}
        if described:
            properties[name]["description"] = slot.description
    parameters: dict[str, Any] = {"type": "object", "properties": properties}
    if names:
        parameters["required"] = list(names)
    return parameters


def declare(rng: random.Random, kind: ToolKind) -> DeclaredTool:
    """Draw names and write the declaration as OpenAI clients send it, with small variations."""
    # The first name is the one people would write: it comes more often.
    name = kind.names[0] if rng.random() < 0.4 else rng.choice(kind.names)
    arguments = tuple(
        slot.names[0] if rng.random() < 0.4 else rng.choice(slot.names) for slot in kind.slots
    )
    if len(set(arguments)) < len(arguments):
        arguments = tuple(slot.names[0] for slot in kind.slots)
    function: dict[str, Any] = {"name": name}
    described = rng.random()
    if described < 0.75:
        function["description"] = kind.description
    elif described < 0.88:
        # vLLM writes out what the client left out.
        function["description"] = None
    function["parameters"] = _parameters(kind, arguments, described=rng.random() < 0.2)
    if rng.random() < 0.1:
        function["strict"] = rng.random() < 0.5
    return DeclaredTool(kind, name, arguments, {"type": "function", "function": function})


def declare_some(rng: random.Random) -> list[DeclaredTool]:
    """One to three different tools in random order."""
    kinds = rng.sample(POOL, rng.choice((1, 1, 1, 2, 2, 3)))
    declared = [declare(rng, kind) for kind in kinds]
    if len({tool.name for tool in declared}) < len(declared):
        return declare_some(rng)
    return declared


def call_message(calls: list[tuple[str, dict[str, Value]]], first: int, thought: str) -> Message:
    """An assistant turn that calls; ids count on from ``first``."""
    return {
        "role": "assistant",
        "content": "",
        "reasoning_content": thought,
        "tool_calls": [
            {
                "id": f"functions.{name}:{first + offset}",
                "type": "function",
                "function": {"name": name, "arguments": json.dumps(arguments)},
            }
            for offset, (name, arguments) in enumerate(calls)
        ],
    }


def _draw_values(rng: random.Random, kind: ToolKind) -> list[Value]:
    values: list[Value] = []
    for slot in kind.slots:
        value = slot.value(rng)
        while value in values:
            value = slot.value(rng)
        values.append(value)
    return values


def _value_sets(rng: random.Random, kind: ToolKind) -> tuple[str, list[list[Value]]]:
    """A question and the slot values of each call that it asks for."""
    values = _draw_values(rng, kind)
    if kind.twice and rng.random() < 0.35:
        other = list(values)
        while other[0] in values:
            other[0] = kind.slots[0].value(rng)
        shown = [values[0], other[0], *values[1:]]
        return rng.choice(kind.twice).format(*shown), [values, other]
    return rng.choice(kind.questions).format(*values), [values]


def _result_text(rng: random.Random, result: str) -> str:
    form = rng.random()
    if form < 0.6:
        return result
    return json.dumps({rng.choice(("result", "value", "answer")): result})


def call_exchange(
    rng: random.Random, declared: list[DeclaredTool], first: int, split: Split
) -> Exchange | None:
    """A question for one of the tools, its calls, their results and the answer.

    first: number of calls already made in the conversation. None where chance finds no
    task of ``split`` (tools without arguments have few): then other tools must do.
    """
    for _ in range(60):
        tool = rng.choice(declared)
        user, sets = _value_sets(rng, tool.kind)
        # The names of arguments vary, their values decide the split.
        key = f"tools|{tool.kind.names[0]}|{sets}"
        if not tool.kind.slots:
            # Nothing varies but the wording and the names in use.
            key += f"|{tool.name}|{user}"
        if split_of(key) == split:
            break
    else:
        return None
    calls = [(tool.name, dict(zip(tool.arguments, values, strict=True))) for values in sets]
    call = call_message(calls, first, f"call {tool.name}" + (" twice" if len(sets) > 1 else ""))
    replies: list[Message] = [call]
    sentences = []
    named = rng.random() < 0.3
    for entry, values in zip(call["tool_calls"], sets, strict=True):
        result = tool.kind.result(rng)
        reply = {
            "role": "tool",
            "tool_call_id": entry["id"],
            "content": _result_text(rng, result),
        }
        if named:
            reply["name"] = tool.name
        replies.append(reply)
        sentences.append(tool.kind.answer.format(*values, r=result))
    replies.append(say(" ".join(sentences), "tell the result"))
    return Exchange("tools", key, user, tuple(replies))
