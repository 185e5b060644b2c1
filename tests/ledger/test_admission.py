"""Budgets and rates: what is admitted, what is refused, and what is set aside."""

from __future__ import annotations

import pytest

from monitoring.ledger import Ledger, LimitExceeded, Limits, RateLimits
from monitoring.ledger.database import Database
from monitoring.ledger.limits_cache import MAX_AGE_S, LimitsCache
from monitoring.usage import ANONYMOUS
from tests.ledger.accounts import (
    INPUT,
    NOON,
    OUTPUT,
    REQUEST_COST,
    Clock,
    ask,
    assert_books_balance,
    budget,
    key,
    record,
    tables,
)


def _reserved(ledger: Ledger, scope: str) -> int:
    return sum(state.reserved_nano_usd for state in ledger.budgets() if state.scope == scope)


def _refusal(ledger: Ledger, request: object) -> LimitExceeded:
    with pytest.raises(LimitExceeded) as caught:
        ledger.admit(request)  # type: ignore[arg-type]
    return caught.value


def test_a_hard_budget_admits_what_it_covers_and_no_more(ledger: Ledger) -> None:
    principal = key(ledger, limits=budget(2))
    ledger.admit(ask(principal))
    ledger.admit(ask(principal))
    refused = _refusal(ledger, ask(principal))
    assert refused.reason == "insufficient_quota"
    assert refused.retry_after_s is None
    assert _reserved(ledger, "key") == 2 * REQUEST_COST


def test_the_teams_budget_binds_all_of_its_keys(ledger: Ledger) -> None:
    ledger.teams.set("red", budget(2))
    ledger.admit(ask(key(ledger)))
    ledger.admit(ask(key(ledger)))
    assert "team 'red'" in str(_refusal(ledger, ask(key(ledger))))
    ledger.admit(ask(key(ledger, team="blue")))


def test_a_refusal_takes_nothing_from_anyone(ledger: Ledger, ledger_url: str) -> None:
    ledger.teams.set("red", budget(0))
    limits = Limits(budget_nano_usd=10**12, requests_per_minute=5, tokens_per_minute=10_000)
    principal = key(ledger, limits=limits)
    _refusal(ledger, ask(principal))
    assert _reserved(ledger, "key") == _reserved(ledger, "team") == 0
    ledger.teams.set("red", Limits())
    assert ledger.admit(ask(principal)).limits.remaining_requests == 4
    with tables(ledger_url) as connection:
        assert_books_balance(connection)


def test_a_soft_budget_only_reports(ledger: Ledger) -> None:
    principal = key(ledger, limits=budget(1, is_hard=False))
    assert not ledger.admit(ask(principal)).soft_exceeded
    assert ledger.admit(ask(principal)).soft_exceeded
    assert _reserved(ledger, "key") == 2 * REQUEST_COST


def test_every_choice_of_every_prompt_is_reserved(ledger: Ledger) -> None:
    principal = key(ledger, limits=budget(1000))
    request = ask(principal, num_prompts=3, num_choices=2, prompt_bound_tokens=900, max_tokens=100)
    ledger.admit(request)
    assert _reserved(ledger, "key") == 2 * 900 * INPUT + 3 * 2 * 100 * OUTPUT
    ledger.tighten({request.request_id: 90})
    assert _reserved(ledger, "key") == 90 * INPUT + 3 * 2 * 100 * OUTPUT
    ledger.tighten({request.request_id: 10_000})
    assert _reserved(ledger, "key") == 90 * INPUT + 3 * 2 * 100 * OUTPUT


def test_what_was_tightened_can_be_reserved_by_others(ledger: Ledger) -> None:
    limits = Limits(budget_nano_usd=2 * REQUEST_COST - 1, tokens_per_minute=2199)
    principal = key(ledger, limits=limits)
    first = ask(principal)
    ledger.admit(first)
    _refusal(ledger, ask(principal))
    ledger.tighten({first.request_id: 999})
    ledger.admit(ask(principal))


def test_a_cancelled_request_leaves_no_trace(ledger: Ledger) -> None:
    limits = Limits(
        budget_nano_usd=REQUEST_COST,
        requests_per_minute=1,
        tokens_per_minute=1100,
        max_parallel=1,
    )
    principal = key(ledger, limits=limits)
    for _ in range(3):
        request = ask(principal)
        ledger.admit(request)
        _refusal(ledger, ask(principal))
        ledger.cancel(request.request_id)
        ledger.cancel(request.request_id)
        ledger.cancel("never admitted")
    assert _reserved(ledger, "key") == 0


def test_the_same_request_is_admitted_once(ledger: Ledger) -> None:
    principal = key(ledger, limits=Limits(budget_nano_usd=10**12, requests_per_minute=10))
    request = ask(principal)
    first, second = ledger.admit(request), ledger.admit(request)
    assert first.limits.remaining_requests == second.limits.remaining_requests == 9
    assert _reserved(ledger, "key") == REQUEST_COST


def test_requests_per_minute_come_back_evenly(ledger: Ledger, clock: Clock) -> None:
    principal = key(ledger, limits=Limits(requests_per_minute=6))
    for left in (5, 4, 3, 2, 1, 0):
        assert ledger.admit(ask(principal)).limits == RateLimits(6, left, (6 - left) * 10.0)
    refused = _refusal(ledger, ask(principal))
    assert (refused.reason, refused.retry_after_s) == ("rate_limit_requests", 10.0)
    assert refused.limits == RateLimits(6, 0, 60.0)
    clock.now_s += 9.9
    _refusal(ledger, ask(principal))
    clock.now_s += 0.2
    ledger.admit(ask(principal))
    _refusal(ledger, ask(principal))


def test_a_clock_that_is_behind_gains_no_requests(ledger: Ledger, clock: Clock) -> None:
    principal = key(ledger, limits=Limits(requests_per_minute=2))
    ledger.admit(ask(principal))
    for now_s in (NOON - 30, NOON):  # another host's, and the first one's again
        clock.now_s = now_s
        if now_s < NOON:
            ledger.admit(ask(principal))
        else:
            _refusal(ledger, ask(principal))


def test_tokens_are_charged_as_reserved_and_corrected_at_the_end(
    ledger: Ledger, clock: Clock
) -> None:
    principal = key(ledger, limits=Limits(tokens_per_minute=2000))
    request = ask(principal)
    assert ledger.admit(request).limits.remaining_tokens == 900
    refused = _refusal(ledger, ask(principal))
    assert (refused.reason, refused.retry_after_s) == ("rate_limit_tokens", 6.0)
    ledger.settle([record(request)])
    assert ledger.admit(ask(principal)).limits.remaining_tokens == 2000 - 350 - 1100


def test_a_request_larger_than_the_limit_itself_is_told_so(ledger: Ledger) -> None:
    principal = key(ledger, limits=Limits(tokens_per_minute=1000))
    refused = _refusal(ledger, ask(principal))
    assert refused.reason == "rate_limit_tokens"
    assert refused.retry_after_s is None
    assert "1100 tokens, more than the 1000 per minute" in str(refused)


def test_the_tighter_of_key_and_team_is_shown(ledger: Ledger) -> None:
    ledger.teams.set("red", Limits(requests_per_minute=100, tokens_per_minute=5000))
    principal = key(ledger, limits=Limits(requests_per_minute=10, tokens_per_minute=50_000))
    shown = ledger.admit(ask(principal)).limits
    assert (shown.limit_requests, shown.remaining_requests) == (10, 9)
    assert (shown.limit_tokens, shown.remaining_tokens) == (5000, 3900)


def test_only_open_requests_count_as_parallel(ledger: Ledger) -> None:
    principal = key(ledger, limits=Limits(max_parallel=2))
    first = ask(principal)
    ledger.admit(first)
    ledger.admit(ask(principal))
    assert _refusal(ledger, ask(principal)).reason == "rate_limit_parallel"
    ledger.settle([record(first)])
    ledger.admit(ask(principal))
    _refusal(ledger, ask(principal))


def test_what_nobody_settled_is_given_back_when_its_time_is_over(
    ledger: Ledger, clock: Clock
) -> None:
    limits = Limits(
        budget_nano_usd=REQUEST_COST, is_hard=False, max_parallel=1, tokens_per_minute=1500
    )
    principal = key(ledger, limits=limits)
    ledger.admit(ask(principal, expires_at_s=NOON + 3))
    _refusal(ledger, ask(principal))
    clock.now_s = NOON + 3  # before the next regular clean-up
    ledger.admit(ask(principal))


def test_who_has_the_answer_may_ask_again_though_the_record_is_not_there_yet(
    ledger: Ledger,
) -> None:
    principal = key(ledger, limits=Limits(budget_nano_usd=10**12, max_parallel=1))
    first = ask(principal)
    assert ledger.admit(first).is_parallel_limited
    _refusal(ledger, ask(principal))
    ledger.end(first.request_id)
    ledger.end("never admitted")
    ledger.admit(ask(principal))
    _refusal(ledger, ask(principal))
    assert _reserved(ledger, "key") == 2 * REQUEST_COST
    assert not ledger.admit(ask(key(ledger, "blue", budget(5)))).is_parallel_limited


def test_who_left_before_a_sign_of_life_holds_money_for_a_moment_only(
    ledger: Ledger, clock: Clock
) -> None:
    principal = key(ledger, limits=Limits(budget_nano_usd=10**12, max_parallel=1))
    lost, late = ask(principal), ask(principal)
    for request in (lost, late):
        ledger.admit(request)
        ledger.abandon(request.request_id, hold_s=60)
    ledger.abandon("never admitted", hold_s=60)
    ledger.abandon(late.request_id, hold_s=10**6)  # never longer than it was
    assert _reserved(ledger, "key") == 2 * REQUEST_COST
    (settled,) = ledger.settle([record(late)])
    assert _reserved(ledger, "key") == REQUEST_COST
    clock.now_s = NOON + 61
    ledger.clean_up()
    assert _reserved(ledger, "key") == 0
    ledger.settle([record(lost)])  # even later: charged all the same
    spent = next(one for one in ledger.budgets() if one.scope == "key").spent_nano_usd
    assert spent == 2 * settled.cost_nano_usd


def test_an_expired_parallel_request_counts_no_more_though_its_money_is_held(
    ledger: Ledger, clock: Clock
) -> None:
    principal = key(ledger, limits=Limits(budget_nano_usd=10**12, max_parallel=1))
    ledger.admit(ask(principal, expires_at_s=NOON + 3))
    clock.now_s = NOON + 3
    ledger.admit(ask(principal))
    assert _reserved(ledger, "key") == 2 * REQUEST_COST


def test_an_expired_reservation_shows_in_no_budget(ledger: Ledger, clock: Clock) -> None:
    ledger.admit(ask(key(ledger, limits=budget(5, is_hard=False)), expires_at_s=NOON + 60))
    assert _reserved(ledger, "key") == REQUEST_COST
    clock.now_s = NOON + 61
    ledger.clean_up()
    assert _reserved(ledger, "key") == 0


def test_who_has_no_limits_reserves_nothing(ledger: Ledger, ledger_url: str) -> None:
    ledger.teams.set("red", Limits(weight=3))
    request = ask(key(ledger))
    assert ledger.admit(request).limits == RateLimits()
    ledger.admit(ask(ANONYMOUS))
    with tables(ledger_url) as connection:
        for table in ("reservations", "rate_buckets", "budget_periods"):
            assert connection.exec_driver_sql(f"SELECT count(*) FROM {table}").scalar() == 0
    ledger.tighten({request.request_id: 10})
    ledger.cancel(request.request_id)
    assert len(ledger.settle([record(request)])) == 1


def test_a_limit_holds_at_once_here_and_soon_elsewhere(ledger: Ledger, ledger_url: str) -> None:
    now_s = 0.0
    elsewhere = LimitsCache(Database(ledger_url), lambda: now_s)
    principal = key(ledger)
    ledger.admit(ask(principal))
    assert elsewhere.owners(principal) == ()
    ledger.keys.set_limits(principal.key_id, budget(0))
    _refusal(ledger, ask(principal))
    now_s = MAX_AGE_S - 0.01
    assert elsewhere.owners(principal) == ()
    now_s = MAX_AGE_S
    (owner,) = elsewhere.owners(principal)
    assert owner.limits == budget(0)
    elsewhere.forget()
    ledger.teams.set("red", budget(7))
    assert [it.scope for it in elsewhere.owners(principal)] == ["key", "team"]


def test_a_model_without_a_price_costs_nothing(ledger: Ledger) -> None:
    principal = key(ledger, limits=budget(0))
    request = ask(principal, model="unknown")
    ledger.admit(request)
    (settled,) = ledger.settle([record(request)])
    assert (settled.cost_nano_usd, settled.price_version) == (0, "")


@pytest.mark.parametrize("huge", [{"num_choices": 10**30}, {"max_tokens": 2**62}])
def test_absurd_sizes_are_refused_like_any_other(ledger: Ledger, huge: dict[str, int]) -> None:
    principal = key(ledger, limits=Limits(budget_nano_usd=2**53))
    assert _refusal(ledger, ask(principal, **huge)).reason == "insufficient_quota"
    ledger.keys.set_limits(principal.key_id, Limits(tokens_per_minute=2**53))
    assert _refusal(ledger, ask(principal, **huge)).reason == "rate_limit_tokens"


def test_negative_counts_are_a_programming_error() -> None:
    with pytest.raises(ValueError, match="negative"):
        ask(ANONYMOUS, max_tokens=-1)


def test_a_budget_row_that_a_restored_database_lacks_is_made_again(
    ledger: Ledger, ledger_url: str
) -> None:
    principal = key(ledger, limits=budget(5))
    ledger.admit(ask(principal))
    with tables(ledger_url) as connection:
        connection.exec_driver_sql("DELETE FROM budget_periods")
    _refusal(ledger, ask(principal))
    ledger.admit(ask(principal))
