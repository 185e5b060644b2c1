"""Many at once: never over budget, nothing charged twice, nobody stuck."""

from __future__ import annotations

import dataclasses
import multiprocessing
import random
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import pytest
import sqlalchemy as sa

from monitoring.ledger import AdmissionRequest, BootstrapError, Ledger, LimitExceeded, Limits
from monitoring.ledger.schema import reservations, usage
from tests.ledger.accounts import (
    REQUEST_COST,
    Clock,
    admit_many,
    ask,
    assert_books_balance,
    budget,
    key,
    record,
    tables,
)


def _admitted(ledger: Ledger, request: AdmissionRequest) -> bool:
    try:
        ledger.admit(request)
    except LimitExceeded:
        return False
    return True


@pytest.mark.parametrize("scope", ["key", "team"])
def test_64_at_once_on_two_ledgers_share_a_budget_for_10(
    open_ledger: Callable[[], Ledger], ledger_url: str, scope: str
) -> None:
    ledgers = [open_ledger(), open_ledger()]
    principals = [key(ledgers[0], limits=Limits(tokens_per_minute=10**6)) for _ in range(4)]
    if scope == "team":
        ledgers[0].teams.set("red", budget(10))
    else:
        principals = [key(ledgers[0], limits=budget(10))]
    requests = [ask(principals[n % len(principals)]) for n in range(64)]
    with ThreadPoolExecutor(64) as threads:
        results = threads.map(
            lambda n: _admitted(ledgers[n % 2], requests[n]), range(len(requests))
        )
        assert sum(results) == 10
    (state,) = ledgers[0].budgets()
    assert state.reserved_nano_usd == 10 * REQUEST_COST == state.limit_nano_usd
    with tables(ledger_url) as connection:
        assert_books_balance(connection)
        count = sa.select(sa.func.count()).select_from(reservations)
        assert connection.execute(count).scalar() == 10


def test_processes_share_a_budget(ledger: Ledger, ledger_url: str) -> None:
    principal = key(ledger, limits=budget(10))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(3, mp_context=context) as processes:
        counts = processes.map(admit_many, [ledger_url] * 3, [principal] * 3, [12] * 3)
        assert sum(counts) == 10


@pytest.mark.parametrize(
    "limits",
    [
        Limits(requests_per_minute=10),
        Limits(tokens_per_minute=11_000),
        Limits(max_parallel=10),
    ],
)
def test_rates_are_not_exceeded_by_concurrency(
    open_ledger: Callable[[], Ledger], limits: Limits
) -> None:
    ledgers = [open_ledger(), open_ledger()]
    principal = key(ledgers[0], limits=limits)
    with ThreadPoolExecutor(16) as threads:
        results = threads.map(lambda n: _admitted(ledgers[n % 2], ask(principal)), range(32))
        assert sum(results) == 10


def test_duplicates_settled_at_once_are_charged_once(
    open_ledger: Callable[[], Ledger], ledger_url: str
) -> None:
    ledgers = [open_ledger(), open_ledger()]
    principal = key(ledgers[0], limits=budget(100))
    requests = [ask(principal) for _ in range(20)]
    for request in requests[:10]:
        ledgers[0].admit(request)

    def settle(seed: int) -> list[str]:
        mine = [record(request) for request in requests]
        random.Random(seed).shuffle(mine)
        settled = [*ledgers[seed % 2].settle(mine[:12]), *ledgers[seed % 2].settle(mine[8:])]
        return [item.record.request_id for item in settled]

    with ThreadPoolExecutor(8) as threads:
        new = [request_id for ids in threads.map(settle, range(8)) for request_id in ids]
    assert sorted(new) == sorted(request.request_id for request in requests)
    with tables(ledger_url) as connection:
        assert_books_balance(connection)


def test_a_budget_that_is_set_while_usage_arrives_misses_none_of_it(
    open_ledger: Callable[[], Ledger], ledger_url: str
) -> None:
    ledgers = [open_ledger(), open_ledger()]
    principal = key(ledgers[0])

    def settle(n: int) -> None:
        ledgers[n % 2].settle([record(ask(principal)) for _ in range(3)])

    with ThreadPoolExecutor(8) as threads:
        settling = [threads.submit(settle, n) for n in range(60)]
        for period in ("day", "week", "month", "total"):
            ledgers[0].teams.set("red", Limits(10**12, period))  # type: ignore[arg-type]
            ledgers[1].keys.set_limits(principal.key_id, Limits(10**12, period))  # type: ignore[arg-type]
        for future in settling:
            future.result()
    with tables(ledger_url) as connection:
        assert_books_balance(connection)
        count = sa.select(sa.func.count()).select_from(usage)
        assert connection.execute(count).scalar() == 180


def test_everything_at_once_keeps_the_books(
    open_ledger: Callable[[], Ledger], ledger_url: str, clock: Clock
) -> None:
    ledgers = [open_ledger(), open_ledger()]
    limits = Limits(40 * REQUEST_COST, "day", True, 10_000, 10**7, 50)
    for team in ("red", "blue"):
        ledgers[0].teams.set(team, dataclasses.replace(limits, budget_nano_usd=10**12))
    principals = [key(ledgers[0], team, limits) for team in ("red", "blue", "red")]

    def work(seed: int) -> None:
        chance = random.Random(seed)
        ledger = ledgers[seed % 2]
        open_requests: list[AdmissionRequest] = []
        for _ in range(15):
            expires_at_s = clock.now_s + chance.choice([-1, 600])
            request = ask(chance.choice(principals), expires_at_s=expires_at_s)
            if _admitted(ledger, request):
                open_requests.append(request)
            for other in chance.sample(open_requests, min(2, len(open_requests))):
                action = chance.randrange(3)
                if action == 0:
                    ledger.tighten({other.request_id: 300})
                elif action == 1:
                    ledger.cancel(other.request_id)
                else:
                    sample = chance.sample(open_requests, len(open_requests))
                    ledger.settle([record(it) for it in sample])

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(work, range(8)))
    with tables(ledger_url) as connection:
        assert_books_balance(connection)
        assert connection.execute(sa.select(sa.func.count()).select_from(usage)).scalar()


def test_two_bootstraps_at_once_make_one_administrator(
    open_ledger: Callable[[], Ledger],
) -> None:
    ledgers = [open_ledger(), open_ledger()]

    def bootstrap(n: int) -> bool:
        try:
            ledgers[n % 2].keys.bootstrap()
        except BootstrapError:
            return False
        return True

    with ThreadPoolExecutor(8) as threads:
        assert sum(threads.map(bootstrap, range(8))) == 1
