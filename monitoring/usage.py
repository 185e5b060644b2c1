"""What one request used: counted by the router replica, priced and kept by the ledger."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, Literal, Self

__all__ = ["ANONYMOUS", "ExpertCost", "Outcome", "Principal", "TokenCount", "UsageRecord"]

Outcome = Literal["ok", "client_closed", "error", "timeout", "replica_lost"]
"""How a request ended at the router. `replica_lost`: the replica died before it could tell."""


@dataclass(frozen=True, slots=True)
class Principal:
    """Who asks.

    Attributes:
        key_id: public id of the API key; never the secret.
        team: team that pays.
        name: name of the key.
        is_admin: may see and change everything.
        models: models that it may use; empty allows all.
    """

    key_id: str
    team: str
    name: str = ""
    is_admin: bool = False
    models: tuple[str, ...] = ()


ANONYMOUS = Principal(key_id="anonymous", team="anonymous", name="anonymous", is_admin=True)
"""Every caller of a gateway without keys, which listens on loopback only."""


@dataclass(frozen=True, slots=True)
class TokenCount:
    """Tokens of one request so far. The router sends it, as a list, with what it streams.

    Attributes:
        prompt: tokens of all its prompts, once each, however many choices; 0 until a prompt's
            first token is generated.
        cached: of those, found in the prefix cache.
        completion: generated tokens of all choices.
        reasoning: of those, thoughts.
    """

    prompt: int = 0
    cached: int = 0
    completion: int = 0
    reasoning: int = 0

    def to_list(self) -> list[int]:
        """In the order of the attributes: Ray sends it for a fraction of what an object costs."""
        return [self.prompt, self.cached, self.completion, self.reasoning]


@dataclass(frozen=True, slots=True)
class UsageRecord:
    """One request's usage, final. Written to the ledger once, whatever happens.

    Attributes:
        request_id: the gateway's id of the request (32 hexadecimal digits), unique.
        key_id, team: see `Principal`.
        model: as it is served.
        endpoint: "chat" or "completions".
        started_s, finished_s: Unix time, at the router replica.
        outcome: how it ended.
        prompt_tokens, cached_tokens, completion_tokens, reasoning_tokens: see `TokenCount`.
        expert_prompt_ns, expert_generation_ns: time that shards spent on its rows, of its prompt
            and of its generated tokens.
        expert_cost_nano_usd: that time at the price of each shard.
        replica: of the router, for the reader of the record.
    """

    request_id: str
    key_id: str
    team: str
    model: str
    endpoint: str
    started_s: float
    finished_s: float
    outcome: Outcome
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    expert_prompt_ns: int = 0
    expert_generation_ns: int = 0
    expert_cost_nano_usd: int = 0
    replica: str = ""

    def to_json(self) -> str:
        """One line."""
        return json.dumps(dataclasses.asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """The inverse of `to_json`.

        Raises:
            ValueError: not such a line; keys that a newer version added are ignored.
        """
        data: Any = json.loads(text)
        if not isinstance(data, dict):
            raise ValueError("a usage record is a JSON object")
        known = {field.name for field in dataclasses.fields(cls)}
        try:
            return cls(**{name: value for name, value in data.items() if name in known})
        except TypeError as error:
            raise ValueError(f"a usage record lacks a field: {error}") from None


@dataclass(frozen=True, slots=True)
class ExpertCost:
    """What the shards spent on one request of the engine's.

    Attributes:
        prompt_ns, generation_ns: their time, on rows of its prompt and of its generated tokens.
        cost_nano_usd: that time at the price of each shard.
    """

    prompt_ns: int = 0
    generation_ns: int = 0
    cost_nano_usd: int = 0
