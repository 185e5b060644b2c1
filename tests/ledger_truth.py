"""What the ledger says against what clients saw and what the engine counted."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import sqlalchemy as sa

from tests.mixed_load import Asked
from tests.serving import RAY_METRICS_PERIOD_S, Server, wait_until

__all__ = ["Book", "generated_tokens", "read_usage"]

_METRIC = "ray_vllm_generation_tokens_total"
_SETTLE_TIMEOUT_S = 90.0


def generated_tokens(server: Server) -> int:
    """vLLM's own count of generated tokens, of all engines, once it stands still."""
    before = -1
    deadline = time.monotonic() + _SETTLE_TIMEOUT_S
    while (now := int(server.ray_metric(_METRIC))) != before:
        assert time.monotonic() < deadline, "tokens are still being generated"
        before = now
        time.sleep(4 * RAY_METRICS_PERIOD_S)
    return now


@dataclass
class Book:
    """The ledger's usage table, read as an auditor would.

    Attributes:
        engine: on the ledger's database.
    """

    engine: sa.Engine

    @classmethod
    def open(cls, url: str) -> Book:
        return cls(sa.create_engine(url, poolclass=sa.NullPool))

    def rows(self) -> dict[str, dict[str, Any]]:
        """All of it by request id, which the table says is unique."""
        with self.engine.connect() as connection:
            found = connection.execute(sa.text("SELECT * FROM usage")).mappings().all()
        rows = {row["request_id"]: dict(row) for row in found}
        assert len(rows) == len(found)
        return rows

    def wait_for(self, request_ids: Iterable[str]) -> dict[str, dict[str, Any]]:
        """The rows, once these requests are among them."""
        wanted = set(request_ids)
        wait_until(lambda: wanted <= self.rows().keys(), _SETTLE_TIMEOUT_S, "records are missing")
        return self.rows()

    def check(
        self, asked: Sequence[Asked], *, is_killed: bool = False
    ) -> dict[str, dict[str, Any]]:
        """Every answer that began is in it, with at least what was delivered, and exactly what the
        client was told. Returns the rows of these requests.

        Where the router was killed, that may have been between the last token and the end.
        """
        answered = [one for one in asked if one.request_id and one.status == 200]
        assert len({one.request_id for one in answered}) == len(answered)
        rows = self.wait_for(one.request_id for one in answered)
        for one in answered:
            row = rows[one.request_id]
            # An event with text holds at least one token.
            assert row["completion_tokens"] >= one.num_events, one
            if one.is_whole:
                assert row["outcome"] in ("ok", "replica_lost" if is_killed else "ok"), one
            if one.usage is not None:
                self._check_usage(one, row)
        return {one.request_id: rows[one.request_id] for one in answered}

    @staticmethod
    def _check_usage(one: Asked, row: dict[str, Any]) -> None:
        assert one.usage is not None
        assert row["prompt_tokens"] == one.usage["prompt_tokens"], one
        assert row["completion_tokens"] == one.usage["completion_tokens"], one
        if (details := one.usage.get("completion_tokens_details")) is not None:
            assert row["reasoning_tokens"] == details["reasoning_tokens"], one
        details = one.usage.get("prompt_tokens_details")
        # Of several choices vLLM tells what the last found in the cache: the first one's blocks.
        if details is not None and one.body.get("n", 1) == 1 and one.kind != "two prompts":
            assert row["cached_tokens"] == details["cached_tokens"], one


def read_usage(url: str, headers: dict[str, str], **query: str) -> list[dict[str, Any]]:
    """The rows of `GET /v1/usage`."""
    answer = httpx.get(f"{url}/v1/usage", headers=headers, params=query, timeout=30)
    assert answer.status_code == httpx.codes.OK, answer.text
    rows: list[dict[str, Any]] = answer.json()["data"]
    return rows
