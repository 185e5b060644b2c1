"""From the tokens of an answer back to text and tool calls."""

from __future__ import annotations

import dataclasses

from models.data.render import Renderer
from models.data.sample import Message
from models.nano.vocab import EOS_ID, IM_END_ID, SPECIAL_IDS


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """An answer taken apart. ended: the model closed its turn itself."""

    thought: str
    content: str
    tool_calls: list[Message]
    ended: bool


def parse_answer(renderer: Renderer, ids: list[int], thinking: bool) -> Answer:
    """Read what follows a prompt. Malformed calls are dropped, as a server would drop them."""
    ended = bool(ids) and ids[-1] in (IM_END_ID, EOS_ID)
    body = ids[:-1] if ended else list(ids)
    thought = ""
    if thinking:
        end = SPECIAL_IDS["</think>"]
        cut = body.index(end) if end in body else len(body)
        thought, body = renderer.decode(body[:cut]), body[cut + 1 :]
    section = SPECIAL_IDS["<|tool_calls_section_begin|>"]
    calls: list[Message] = []
    if section in body:
        cut = body.index(section)
        calls, body = _calls(renderer, body[cut + 1 :]), body[:cut]
    return Answer(thought, renderer.decode(body), calls, ended)


def _calls(renderer: Renderer, ids: list[int]) -> list[Message]:
    calls: list[Message] = []
    begin, middle, end = (
        SPECIAL_IDS[name]
        for name in ("<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>")
    )
    while begin in ids:
        ids = ids[ids.index(begin) + 1 :]
        if end not in ids:
            break
        call, ids = ids[: ids.index(end)], ids[ids.index(end) + 1 :]
        if middle not in call:
            continue
        call_id = renderer.decode(call[: call.index(middle)])
        arguments = renderer.decode(call[call.index(middle) + 1 :])
        name = call_id.removeprefix("functions.").rsplit(":", 1)[0]
        calls.append(
            {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
        )
    return calls
