"""Usage summed up, and budgets for the gauges."""

from __future__ import annotations

import datetime

import pytest

from monitoring.ledger import BudgetState, Ledger, Limits, TooManyRowsError, UsageQuery
from tests.ledger.accounts import (
    CACHED,
    INPUT,
    NOON,
    OUTPUT,
    REQUEST_COST,
    Clock,
    ask,
    budget,
    key,
    record,
)

DAY = 86_400
COST = 200 * INPUT + 100 * CACHED + 50 * OUTPUT


@pytest.fixture
def filled(ledger: Ledger) -> Ledger:
    red, blue = key(ledger, "red"), key(ledger, "blue")
    records = [
        record(ask(red)),
        record(ask(red), started_s=NOON - DAY),
        record(ask(red, model="free")),
        record(ask(blue), expert_cost_nano_usd=5, expert_prompt_ns=6, expert_generation_ns=7),
    ]
    ledger.settle(records)
    return ledger


def test_without_groups_there_is_one_row(filled: Ledger) -> None:
    (row,) = filled.usage(UsageQuery())
    assert (row.key_id, row.team, row.model, row.day) == (None, None, None, None)
    assert (row.requests, row.prompt_tokens, row.cached_tokens) == (4, 1200, 400)
    assert (row.completion_tokens, row.reasoning_tokens) == (200, 80)
    assert (row.cost_nano_usd, row.expert_cost_nano_usd) == (3 * COST, 5)
    assert (row.expert_prompt_ns, row.expert_generation_ns) == (6, 7)
    assert isinstance(row.cost_nano_usd, int)


def test_nothing_sums_to_nothing(ledger: Ledger) -> None:
    (row,) = ledger.usage(UsageQuery())
    assert (row.requests, row.prompt_tokens, row.cost_nano_usd) == (0, 0, 0)
    assert ledger.usage(UsageQuery(group_by=("team",))) == []


def test_groups_come_in_any_combination_and_sorted(filled: Ledger) -> None:
    today, yesterday = datetime.date(2026, 11, 24), datetime.date(2026, 11, 23)
    by_day = filled.usage(UsageQuery(group_by=("day", "team")))
    assert [(row.day, row.team, row.requests) for row in by_day] == [
        (yesterday, "red", 1),
        (today, "blue", 1),
        (today, "red", 2),
    ]
    by_model = filled.usage(UsageQuery(group_by=("model",)))
    assert [(row.model, row.requests, row.cost_nano_usd) for row in by_model] == [
        ("free", 1, 0),
        ("kimi-test", 3, 3 * COST),
    ]
    assert len(filled.usage(UsageQuery(group_by=("key", "team", "model", "day")))) == 4
    with pytest.raises(ValueError, match="not by 'replica'"):
        filled.usage(UsageQuery(group_by=("replica",)))  # type: ignore[arg-type]


def test_a_report_that_is_too_long_is_refused(filled: Ledger) -> None:
    query = UsageQuery(group_by=("key", "team", "model", "day"))
    assert len(filled.usage(query, max_rows=4)) == 4
    with pytest.raises(TooManyRowsError, match="narrow"):
        filled.usage(query, max_rows=3)


def test_filters_narrow_the_sum(filled: Ledger) -> None:
    def requests(query: UsageQuery) -> int:
        return filled.usage(query)[0].requests

    (red,) = filled.usage(UsageQuery(group_by=("key",), team="red"))
    assert requests(UsageQuery(key_id=red.key_id)) == 3
    assert requests(UsageQuery(team="blue", model="free")) == 0
    assert requests(UsageQuery(start=NOON)) == 3
    assert requests(UsageQuery(end=NOON)) == 1
    assert requests(UsageQuery(start=NOON - DAY, end=NOON - DAY + 1)) == 1


def test_budgets_show_teams_and_working_keys_that_have_one(ledger: Ledger, clock: Clock) -> None:
    ledger.teams.set("red", budget(3, "day", is_hard=False))
    ledger.teams.set("blue", Limits(requests_per_minute=5))
    with_budget = key(ledger, limits=budget(2))
    key(ledger)
    ledger.keys.revoke(key(ledger, limits=budget(2)).key_id)
    ledger.keys.create("red", "old", limits=budget(2), expires_at=NOON + 1)
    ledger.admit(ask(with_budget))
    clock.now_s = NOON + 2
    assert ledger.budgets() == [
        BudgetState("team", "red", 3 * REQUEST_COST, 0, REQUEST_COST, "day", False),
        BudgetState("key", with_budget.key_id, 2 * REQUEST_COST, 0, REQUEST_COST, "month", True),
    ]
    clock.now_s = NOON + DAY  # nobody has asked yet
    assert ledger.budgets()[0] == BudgetState("team", "red", 3 * REQUEST_COST, 0, 0, "day", False)
