"""What one request has used so far.

The ingress names whom to bill in a header. The account made from it is what `generate` finds in
its context, whatever vLLM has put in between (tasks, merged generators), and it writes every count
into a slot of the write-ahead log before the tokens leave. It ends when the answer has ended and
every `generate` call of the request has seen its final output, and leaves exactly one record.
"""

from __future__ import annotations

import contextvars
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from deployments.accounting.reasoning import ReasoningCounter, ReasoningRule
from monitoring.usage import ExpertCost, Outcome, TokenCount, UsageRecord
from monitoring.write_ahead import UsageLog

__all__ = ["ACCOUNT_HEADER", "Accounts", "CallCounter", "RequestAccount", "current_account"]

logger = logging.getLogger(__name__)

ACCOUNT_HEADER = "x-moonshard-account"
"""From the ingress: {"id": request id, "key": key id, "team": team}. Requests without it are our
own (warm-up) and not billed."""

_current: contextvars.ContextVar[RequestAccount | None] = contextvars.ContextVar(
    "moonshard_account", default=None
)


def current_account() -> RequestAccount | None:
    """The account of the request that this code runs for; None for one of our own."""
    return _current.get()


class RequestAccount:
    """The account of one request. `Accounts.open` makes them.

    Args:
        log: holds its slot.
        identity: who asks for what since when.
        on_finished: called once, when its record is in the log's outbox.
    """

    def __init__(
        self, log: UsageLog, identity: UsageRecord, on_finished: Callable[[RequestAccount], None]
    ) -> None:
        self._log = log
        self._slot = log.open_slot(identity)
        self._on_finished = on_finished
        self._request_id = identity.request_id
        self._outcome: Outcome | None = None
        self._is_finished = False
        self._num_calls = 0
        self._prompt = self._cached = self._completion = self._reasoning = 0
        self._expert_prompt_ns = self._expert_generation_ns = self._cost_nano_usd = 0

    @property
    def count(self) -> TokenCount:
        """Tokens so far."""
        return TokenCount(self._prompt, self._cached, self._completion, self._reasoning)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Code inside runs for this request, and so do the tasks that it creates."""
        token = _current.set(self)
        try:
            yield
        finally:
            _current.reset(token)

    def begin_call(
        self,
        *,
        is_delta: bool,
        rule: ReasoningRule | None = None,
        template_variables: Mapping[str, Any] | None = None,
    ) -> CallCounter:
        """One more `generate` call works for this request; the account stays open until its end.

        Args:
            is_delta: its outputs hold new tokens only, not all.
            rule: what thoughts are; None counts none.
            template_variables: see `ReasoningRule.counter`.

        Raises:
            RuntimeError: the request is over.
        """
        if self._outcome is not None:
            raise RuntimeError(f"request {self._request_id} is over")
        self._num_calls += 1
        return CallCounter(self, is_delta, rule, template_variables)

    def end_response(self, outcome: Outcome) -> None:
        """The answer has ended. Calls that still drain may add to the counts."""
        if self._outcome is None:
            self._outcome = outcome
            self._finish_if_over()

    def abandon(self, outcome: Outcome) -> None:
        """The process ends: what is counted is final."""
        self._outcome = self._outcome or outcome
        self._num_calls = 0
        self._finish_if_over()

    def add(self, *, prompt: int, cached: int, completion: int, reasoning: int) -> None:
        """Count, and store it where the end of this process cannot take it."""
        if self._is_finished:
            return
        self._prompt += prompt
        self._cached += cached
        self._completion += completion
        self._reasoning += reasoning
        self._slot.set(
            prompt=self._prompt,
            cached=self._cached,
            completion=self._completion,
            reasoning=self._reasoning,
        )

    def add_cost(self, cost: ExpertCost) -> None:
        """Add what the shards spent."""
        if self._is_finished:
            return
        self._expert_prompt_ns += cost.prompt_ns
        self._expert_generation_ns += cost.generation_ns
        self._cost_nano_usd += cost.cost_nano_usd
        self._slot.set_cost(
            prompt_ns=self._expert_prompt_ns,
            generation_ns=self._expert_generation_ns,
            cost_nano_usd=self._cost_nano_usd,
        )

    def end_call(self) -> None:
        """One `generate` call has seen its final output."""
        if self._is_finished:
            return
        self._num_calls -= 1
        self._finish_if_over()

    def _finish_if_over(self) -> None:
        if self._outcome is None or self._num_calls or self._is_finished:
            return
        self._is_finished = True
        self._log.finish(self._slot, self._outcome)
        self._on_finished(self)


class CallCounter:
    """Counts the outputs of one `generate` call. `RequestAccount.begin_call` makes them."""

    def __init__(
        self,
        account: RequestAccount,
        is_delta: bool,
        rule: ReasoningRule | None,
        template_variables: Mapping[str, Any] | None,
    ) -> None:
        self._account = account
        self._is_delta = is_delta
        self._rule = rule
        self._variables = template_variables
        self._num_seen: dict[int, int] = {}
        self._reasoning: dict[int, ReasoningCounter] = {}
        self._has_prompt = False
        self._has_ended = False

    def count(self, output: Any, num_cached_tokens: int | None = None) -> None:
        """Count an output of vLLM's, before it is handed on.

        The prompt counts once, with the first token of any choice.

        Args:
            output: a `RequestOutput`.
            num_cached_tokens: of the prompt, as the first choice found it: the others find in the
                cache what the first has just computed. By default what the output says.
        """
        completion = reasoning = 0
        for choice in output.outputs:
            new_ids = choice.token_ids
            if not self._is_delta:
                num_seen = self._num_seen.get(choice.index, 0)
                self._num_seen[choice.index] = len(new_ids)
                new_ids = new_ids[num_seen:]
            if new_ids:
                completion += len(new_ids)
                reasoning += self._count_thoughts(choice.index, new_ids, output.prompt_token_ids)
        if not completion:
            return
        prompt = cached = 0
        if not self._has_prompt:
            self._has_prompt = True
            prompt = len(output.prompt_token_ids)
            cached = output.num_cached_tokens if num_cached_tokens is None else num_cached_tokens
        self._account.add(
            prompt=prompt, cached=cached or 0, completion=completion, reasoning=reasoning
        )

    def add_cost(self, cost: ExpertCost) -> None:
        """See `RequestAccount.add_cost`."""
        self._account.add_cost(cost)

    def end(self) -> None:
        """There is no more output. Idempotent."""
        if not self._has_ended:
            self._has_ended = True
            self._account.end_call()

    def _count_thoughts(self, index: int, new_ids: Any, prompt_ids: Any) -> int:
        if self._rule is None:
            return 0
        counter = self._reasoning.get(index)
        if counter is None:
            counter = self._reasoning[index] = self._rule.counter(prompt_ids, self._variables)
        return counter.add(new_ids)


class Accounts:
    """The accounts of a router replica.

    Args:
        log: write-ahead log of this replica.
        replica: its id, for the reader of a record.
        model: name of the model that it serves.
        on_record: called whenever a record is in the log's outbox.
    """

    def __init__(
        self, log: UsageLog, replica: str, model: str, on_record: Callable[[], None]
    ) -> None:
        self._log = log
        self._replica = replica
        self._model = model
        self._on_record = on_record
        self._open: set[RequestAccount] = set()

    def open(self, header: str, endpoint: str) -> RequestAccount:
        """An account for a request.

        Args:
            header: value of `ACCOUNT_HEADER`.
            endpoint: "chat" or "completions".

        Raises:
            ValueError: the header is not the ingress's.
            OSError: its counts cannot be kept; the request must not be served.
        """
        identity = _identity(header, endpoint, self._model, self._replica)
        account = RequestAccount(self._log, identity, self._finished)
        self._open.add(account)
        return account

    def abandon_all(self) -> None:
        """The replica ends: what its open accounts have counted is final."""
        for account in list(self._open):
            account.abandon("error")

    def _finished(self, account: RequestAccount) -> None:
        self._open.discard(account)
        self._on_record()


def _identity(header: str, endpoint: str, model: str, replica: str) -> UsageRecord:
    fields: Any = json.loads(header)
    if not isinstance(fields, dict) or not all(
        isinstance(fields.get(name), str) for name in ("id", "key", "team")
    ):
        raise ValueError(f"{ACCOUNT_HEADER} must name id, key and team")
    now_s = time.time()
    return UsageRecord(
        request_id=fields["id"],
        key_id=fields["key"],
        team=fields["team"],
        model=model,
        endpoint=endpoint,
        started_s=now_s,
        finished_s=now_s,
        outcome="replica_lost",
        replica=replica,
    )
