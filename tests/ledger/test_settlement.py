"""Usage is written down and charged once, in the right period, whatever happens."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import sqlalchemy as sa

from monitoring.ledger import Ledger, LimitExceeded, Limits, UsageQuery
from monitoring.ledger.schema import usage
from tests.ledger.accounts import (
    CACHED,
    INPUT,
    MODEL,
    NOON,
    OUTPUT,
    PRICES,
    REQUEST_COST,
    Clock,
    ask,
    assert_books_balance,
    budget,
    key,
    record,
    tables,
)

COST = 200 * INPUT + 100 * CACHED + 50 * OUTPUT
MIDNIGHT = NOON + 12 * 3600


def test_a_settled_request_is_spent_and_no_longer_reserved(ledger: Ledger) -> None:
    ledger.teams.set("red", budget(9))
    request = ask(key(ledger, limits=budget(5)))
    ledger.admit(request)
    (settled,) = ledger.settle([record(request, expert_cost_nano_usd=77)])
    price = PRICES.price(MODEL, NOON)
    assert price is not None
    assert settled.cost_nano_usd == COST
    assert settled.expert_cost_nano_usd == 77
    assert settled.price_version == price.version
    states = ledger.budgets()
    assert [(s.scope, s.spent_nano_usd, s.reserved_nano_usd) for s in states] == [
        ("team", COST, 0),
        ("key", COST, 0),
    ]
    assert [s.limit_nano_usd for s in states] == [9 * REQUEST_COST, 5 * REQUEST_COST]


def test_a_record_is_stored_field_by_field(ledger: Ledger, ledger_url: str) -> None:
    sent = record(
        ask(key(ledger)),
        started_s=NOON + 0.25,
        finished_s=NOON + 1.5,
        outcome="client_closed",
        expert_prompt_ns=10**12,
        expert_generation_ns=10**13,
        expert_cost_nano_usd=10**11,
        replica="router-1",
    )
    ledger.settle([sent])
    with tables(ledger_url) as connection:
        row = connection.execute(sa.select(usage)).one()._asdict()
    for name in sent.__dataclass_fields__:
        assert row[name] == getattr(sent, name), name
    assert (row["cost_nano_usd"], row["recorded_at_s"]) == (COST, NOON)


def test_duplicates_are_charged_once(ledger: Ledger, ledger_url: str) -> None:
    first, second = (ask(key(ledger, limits=budget(5))) for _ in range(2))
    ledger.admit(first)
    ledger.admit(second)
    assert len(ledger.settle([record(first), record(first)])) == 1
    new = ledger.settle([record(second), record(first)])
    assert [item.record.request_id for item in new] == [second.request_id]
    assert ledger.settle([record(first), record(second)]) == []
    assert ledger.settle([]) == []
    with tables(ledger_url) as connection:
        assert_books_balance(connection)
        assert connection.execute(sa.select(sa.func.count()).select_from(usage)).scalar() == 2


def test_a_replay_after_reopening_changes_nothing(
    ledger: Ledger, open_ledger: Callable[[], Ledger]
) -> None:
    principal = key(ledger, limits=budget(5))
    requests = [ask(principal) for _ in range(3)]
    for request in requests:
        ledger.admit(request)
    ledger.settle([record(request) for request in requests[:2]])
    ledger.close()
    again = open_ledger()
    new = again.settle([record(request) for request in requests])
    assert [item.record.request_id for item in new] == [requests[2].request_id]
    (state,) = again.budgets()
    assert (state.spent_nano_usd, state.reserved_nano_usd) == (3 * COST, 0)


def test_a_request_is_charged_to_the_period_of_its_admission(
    ledger: Ledger, clock: Clock, ledger_url: str
) -> None:
    principal = key(ledger, limits=budget(1, "day"))
    request = ask(principal, expires_at_s=MIDNIGHT + 600)
    clock.now_s = MIDNIGHT - 1
    ledger.admit(request)
    clock.now_s = MIDNIGHT + 1
    # The new day's budget is whole, though the old day's request still runs.
    ledger.admit(ask(principal, "new", expires_at_s=MIDNIGHT + 600))
    ledger.settle([record(request, started_s=MIDNIGHT, finished_s=MIDNIGHT + 1)])
    (state,) = ledger.budgets()
    assert (state.spent_nano_usd, state.reserved_nano_usd) == (0, REQUEST_COST)
    clock.now_s = MIDNIGHT - 1
    (state,) = ledger.budgets()
    assert (state.spent_nano_usd, state.reserved_nano_usd) == (COST, 0)
    (row,) = ledger.usage(UsageQuery(group_by=("day",)))
    assert str(row.day) == "2026-11-24"
    with tables(ledger_url) as connection:
        assert_books_balance(connection)


def test_late_records_whose_reservation_is_gone_are_charged(
    ledger: Ledger, clock: Clock, ledger_url: str
) -> None:
    limits = Limits(budget_nano_usd=10**12, is_hard=False, tokens_per_minute=5000)
    principal = key(ledger, limits=limits)
    request = ask(principal, expires_at_s=NOON + 60)
    ledger.admit(request)
    clock.now_s = NOON + 3600
    ledger.clean_up()
    assert ledger.budgets()[0].reserved_nano_usd == 0
    assert len(ledger.settle([record(request)])) == 1
    (state,) = ledger.budgets()
    assert (state.spent_nano_usd, state.reserved_nano_usd) == (COST, 0)
    # An hour-old request is nothing to this minute's tokens.
    assert ledger.admit(ask(principal, expires_at_s=NOON + 9999)).limits.remaining_tokens == 3900
    with tables(ledger_url) as connection:
        assert_books_balance(connection)


def test_money_of_a_hard_budget_waits_a_day_for_its_record(
    ledger: Ledger, clock: Clock, ledger_url: str
) -> None:
    principal = key(ledger, limits=budget(2, "total"))
    late, lost = (ask(principal, expires_at_s=NOON + 60) for _ in range(2))
    ledger.admit(late)
    ledger.admit(lost)
    clock.now_s = NOON + 86_400
    ledger.clean_up()
    with pytest.raises(LimitExceeded):
        ledger.admit(ask(principal))
    ledger.settle([record(late)])
    (state,) = ledger.budgets()
    assert (state.spent_nano_usd, state.reserved_nano_usd) == (COST, REQUEST_COST)
    clock.now_s = NOON + 86_400 + 61
    ledger.clean_up()
    assert ledger.budgets()[0].reserved_nano_usd == 0
    with tables(ledger_url) as connection:
        assert_books_balance(connection)


def test_a_request_that_two_replicas_ran_is_charged_for_both(
    ledger: Ledger, ledger_url: str
) -> None:
    principal = key(ledger, limits=budget(5))
    request, other = ask(principal), ask(principal)
    ledger.admit(request)
    ledger.admit(other)
    first = record(request, replica="a", outcome="replica_lost", completion_tokens=0)
    second = record(request, replica="b", key_id="somebody", team="else")
    assert len(ledger.settle([first])) == 1
    (item,) = ledger.settle([second, first])
    assert (item.record.request_id, item.cost_nano_usd) == (f"{request.request_id}~b", COST)
    assert (item.record.key_id, item.record.team) == (principal.key_id, principal.team)
    both = [record(other, replica="b"), record(other, replica="c")]
    assert len(ledger.settle([*both, first, second])) == 2
    assert ledger.settle([second, first, *both]) == []
    (state,) = ledger.budgets()
    spent = 4 * COST - 50 * OUTPUT
    assert (state.spent_nano_usd, state.reserved_nano_usd) == (spent, 0)
    with tables(ledger_url) as connection:
        assert_books_balance(connection)


def test_recent_usage_without_a_reservation_counts_against_the_tokens_per_minute(
    ledger: Ledger,
) -> None:
    principal = key(ledger, limits=Limits(tokens_per_minute=5000))
    ledger.admit(ask(principal))
    ledger.settle([record(ask(principal), finished_s=NOON)])
    assert ledger.admit(ask(principal)).limits.remaining_tokens == 5000 - 2 * 1100 - 350


def test_a_new_budget_counts_what_its_period_has_cost_already(
    ledger: Ledger, ledger_url: str
) -> None:
    principal = key(ledger)
    yesterday, today = ask(principal), ask(principal)
    ledger.settle([record(yesterday, started_s=NOON - 86_400), record(today)])
    running = ask(principal)
    ledger.admit(running)
    for period, spent in (("day", COST), ("month", 2 * COST), ("day", COST), ("total", 2 * COST)):
        limits = Limits(budget_nano_usd=10**12, period=period)  # type: ignore[arg-type]
        ledger.keys.set_limits(principal.key_id, limits)
        assert ledger.budgets()[0].spent_nano_usd == spent
    # A request from before counts when it ends, in every row of its time.
    ledger.settle([record(running)])
    assert ledger.budgets()[0].spent_nano_usd == 3 * COST
    with tables(ledger_url) as connection:
        assert_books_balance(connection)


def test_spent_money_stays_spent(ledger: Ledger) -> None:
    principal = key(ledger, limits=Limits(budget_nano_usd=COST + REQUEST_COST - 1))
    request = ask(principal)
    ledger.admit(request)
    ledger.settle([record(request)])
    with pytest.raises(LimitExceeded):
        ledger.admit(ask(principal))


def test_who_was_admitted_pays(ledger: Ledger) -> None:
    payer = key(ledger, limits=budget(5))
    request = ask(payer)
    ledger.admit(request)
    ledger.settle([record(request, key_id="somebody", team="else")])
    (row,) = ledger.usage(UsageQuery(group_by=("key", "team")))
    assert (row.key_id, row.team) == (payer.key_id, payer.team)


def test_values_that_do_not_fit_block_nobody(ledger: Ledger, ledger_url: str) -> None:
    principal = key(ledger, limits=budget(5))
    odd = record(
        ask(principal, "odd"),
        team="nul\0and\ud800surrogate" + "x" * 100,
        replica="'; DROP TABLE usage; --",
        prompt_tokens=2**80,
        cached_tokens=2**81,
        completion_tokens=-5,
        reasoning_tokens=7,
        started_s=float("nan"),
        finished_s=1e300,
    )
    assert len(ledger.settle([odd, record(ask(principal))])) == 2
    with tables(ledger_url) as connection:
        assert_books_balance(connection)
        row = connection.execute(sa.select(usage).where(usage.c.request_id == "odd")).one()
    assert 0 <= row.cached_tokens <= row.prompt_tokens
    assert (row.completion_tokens, row.reasoning_tokens) == (0, 0)


def test_a_large_batch_is_one_settlement(ledger: Ledger, ledger_url: str) -> None:
    principals = [key(ledger, team=f"team-{n % 3}", limits=budget(10_000)) for n in range(5)]
    requests = [ask(principals[n % 5]) for n in range(2500)]
    for request in requests[:50]:
        ledger.admit(request)
    assert len(ledger.settle([record(request) for request in requests])) == 2500
    assert sum(state.spent_nano_usd for state in ledger.budgets()) == 2500 * COST
    with tables(ledger_url) as connection:
        assert_books_balance(connection)
