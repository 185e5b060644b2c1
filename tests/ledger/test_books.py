"""Any order of anything: the budgets are the sums of usage and reservations, always."""

from __future__ import annotations

import uuid
from collections.abc import Callable

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

from monitoring.ledger import (
    AdmissionRequest,
    BudgetState,
    Ledger,
    LimitExceeded,
    Limits,
    UsageQuery,
)
from monitoring.ledger.periods import PERIODS
from tests.ledger.accounts import (
    CACHED,
    INPUT,
    NOON,
    OUTPUT,
    REQUEST_COST,
    Clock,
    ask,
    assert_books_balance,
    key,
    record,
    tables,
)

_LIMITS = st.builds(
    Limits,
    budget_nano_usd=st.none() | st.integers(0, 6 * REQUEST_COST),
    period=st.sampled_from(PERIODS),
    is_hard=st.booleans(),
    tokens_per_minute=st.none() | st.integers(1000, 10_000),
    max_parallel=st.none() | st.integers(1, 4),
)


class Books(RuleBasedStateMachine):
    """Drives one key of one team, both new, in a database that all runs share."""

    requests = Bundle("requests")

    def __init__(self, ledger: Ledger, url: str, clock: Clock) -> None:
        super().__init__()
        clock.now_s = NOON
        self.ledger, self.url, self.clock = ledger, url, clock
        self.team = uuid.uuid4().hex
        self.principal = key(ledger, self.team)
        self.costs: dict[str, int] = {}

    @rule(limits=_LIMITS)
    def limit_key(self, limits: Limits) -> None:
        self.ledger.keys.set_limits(self.principal.key_id, limits)

    @rule(limits=_LIMITS)
    def limit_team(self, limits: Limits) -> None:
        self.ledger.teams.set(self.team, limits)

    @rule(
        target=requests,
        num_prompts=st.integers(1, 2),
        num_choices=st.integers(1, 2),
        lasts_s=st.sampled_from([1, 600, 10**6]),
    )
    def admit(self, num_prompts: int, num_choices: int, lasts_s: int) -> object:
        request = ask(
            self.principal,
            uuid.uuid4().hex,
            num_prompts=num_prompts,
            num_choices=num_choices,
            expires_at_s=self.clock.now_s + lasts_s,
        )
        before = {state.name: state for state in self._budgets()}
        try:
            admission = self.ledger.admit(request)
        except LimitExceeded:
            for state in self._budgets():  # expired reservations may have gone meanwhile
                assert state.spent_nano_usd == before[state.name].spent_nano_usd
                assert state.reserved_nano_usd <= before[state.name].reserved_nano_usd
            return multiple()
        for state in self._budgets():
            total = state.spent_nano_usd + state.reserved_nano_usd
            assert total <= state.limit_nano_usd or not state.is_hard
            assert total <= state.limit_nano_usd or admission.soft_exceeded
        return request

    @rule(target=requests)
    def never_admitted(self) -> AdmissionRequest:
        return ask(self.principal, uuid.uuid4().hex)

    @rule(request=requests, prompt_tokens=st.integers(0, 3000))
    def tighten(self, request: AdmissionRequest, prompt_tokens: int) -> None:
        self.ledger.tighten({request.request_id: prompt_tokens})

    @rule(request=requests)
    def cancel(self, request: AdmissionRequest) -> None:
        self.ledger.cancel(request.request_id)

    @rule(
        settled=st.lists(requests, min_size=1, max_size=4),
        prompt=st.integers(0, 1000),
        cached=st.integers(0, 1000),
        completion=st.integers(0, 400),
    )
    def settle(
        self, settled: list[AdmissionRequest], prompt: int, cached: int, completion: int
    ) -> None:
        cached = min(prompt, cached)
        cost = (prompt - cached) * INPUT + cached * CACHED + completion * OUTPUT
        records = [
            record(
                request,
                started_s=self.clock.now_s,
                finished_s=self.clock.now_s,
                prompt_tokens=prompt,
                cached_tokens=cached,
                completion_tokens=completion,
                reasoning_tokens=0,
            )
            for request in settled
        ]
        new = self.ledger.settle(records)
        expected = {request.request_id for request in settled} - self.costs.keys()
        assert {item.record.request_id for item in new} == expected
        assert {item.cost_nano_usd for item in new} <= {cost}
        self.costs |= dict.fromkeys(expected, cost)

    @rule(seconds=st.sampled_from([1.0, 30.0, 3600.0, 43_200.0, 86_400.0, 8 * 86_400.0]))
    def wait(self, seconds: float) -> None:
        self.clock.now_s += seconds

    @invariant()
    def books_balance(self) -> None:
        with tables(self.url) as connection:
            assert_books_balance(connection, self.team)
            assert_books_balance(connection, self.principal.key_id)
        (row,) = self.ledger.usage(UsageQuery(team=self.team))
        assert (row.requests, row.cost_nano_usd) == (len(self.costs), sum(self.costs.values()))

    def _budgets(self) -> list[BudgetState]:
        mine = (self.team, self.principal.key_id)
        return [state for state in self.ledger.budgets() if state.name in mine]


def test_any_order_of_anything_keeps_the_books(
    open_ledger: Callable[[], Ledger], ledger_url: str, clock: Clock
) -> None:
    ledger = open_ledger()
    run_state_machine_as_test(
        lambda: Books(ledger, ledger_url, clock),
        settings=settings(
            max_examples=25,
            stateful_step_count=25,
            deadline=None,
            # Without shrinking, which takes minutes where each step is several transactions.
            phases=[Phase.explicit, Phase.reuse, Phase.generate],
            suppress_health_check=list(HealthCheck),
        ),
    )
