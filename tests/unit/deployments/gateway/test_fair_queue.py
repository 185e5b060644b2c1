"""Places go to teams by tokens served and weight; nobody starves, nothing leaks."""

from __future__ import annotations

import asyncio
import itertools
import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.gateway.fair_queue import (
    FairQueue,
    QueueClosed,
    QueueFull,
    QueueTimeout,
    Ticket,
)


def make_queue(
    capacity: int, share: float = 0.0, max_queued: int = 1000, timeout_s: float = 60
) -> FairQueue:
    return FairQueue(
        capacity=capacity, reserved_share=share, max_queued=max_queued, timeout_s=timeout_s
    )


async def settle() -> None:
    for _ in range(3):
        await asyncio.sleep(0)


@dataclass
class Load:
    """A team that keeps `backlog` requests waiting or running, of random lengths."""

    team: str
    weight: float
    backlog: int
    lengths: tuple[int, int] = (1, 60)
    tokens: int = 0
    served: int = 0
    pending: list[asyncio.Task[Ticket]] = field(default_factory=list)
    running: list[tuple[Ticket, int]] = field(default_factory=list)


async def simulate(queue: FairQueue, loads: list[Load], num_steps: int, seed: int = 0) -> None:
    """Each step every running request is served one token."""
    dice = random.Random(seed)
    for _ in range(num_steps):
        for load in loads:
            while len(load.pending) + len(load.running) < load.backlog:
                expected = sum(load.lengths) / 2
                load.pending.append(
                    asyncio.ensure_future(queue.acquire(load.team, load.weight, expected))
                )
        await settle()
        for load in loads:
            for task in [task for task in load.pending if task.done()]:
                load.pending.remove(task)
                load.running.append((task.result(), dice.randint(*load.lengths)))
            for ticket, length in load.running[:]:
                ticket.served(1)
                load.tokens += 1
                if ticket.num_served >= length:
                    ticket.release()
                    load.running.remove((ticket, length))
                    load.served += 1
    for load in loads:
        for task in load.pending:
            task.cancel()
        await asyncio.gather(*load.pending, return_exceptions=True)
        for ticket, _ in load.running:
            ticket.release()


@pytest.mark.parametrize("lengths", [((1, 60), (1, 60)), ((1, 10), (50, 150))])
@pytest.mark.parametrize(("weights", "share"), [((1, 1), 1.0), ((1, 3), 3.0), ((5, 1), 0.2)])
async def test_two_saturating_teams_split_tokens_by_weight(
    weights: tuple[float, float], share: float, lengths: tuple[tuple[int, int], tuple[int, int]]
) -> None:
    queue = make_queue(16, share=0.125)
    loads = [
        Load("a", weights[0], 40, lengths[0]),
        Load("b", weights[1], 40, lengths[1]),
    ]
    await simulate(queue, loads, 2500)
    assert loads[1].tokens / loads[0].tokens == pytest.approx(share, rel=0.1)


async def test_more_requests_do_not_buy_more_tokens() -> None:
    queue = make_queue(8)
    flooder, modest = Load("flooder", 1, 300, (5, 5)), Load("modest", 1, 10, (40, 40))
    await simulate(queue, [flooder, modest], 2000)
    assert modest.tokens / flooder.tokens == pytest.approx(1, rel=0.1)


async def test_a_team_alone_gets_all_but_the_reserve_and_all_of_that_all_the_time() -> None:
    queue = make_queue(16, share=0.125)
    load = Load("a", 1, 40)
    await simulate(queue, [load], 500)
    assert load.tokens == 500 * 14


async def test_the_reserve_of_a_small_place_is_nothing() -> None:
    queue = make_queue(2, share=0.4)
    load = Load("a", 1, 10)
    await simulate(queue, [load], 100)
    assert load.tokens == 200


async def test_a_light_team_finds_a_place_at_once_while_another_floods() -> None:
    queue = make_queue(16, share=0.125)
    flood = [asyncio.ensure_future(queue.acquire("flooder", 1, 50)) for _ in range(100)]
    await settle()
    assert queue.num_running == 14
    light = await asyncio.wait_for(queue.acquire("light", 1, 50), 0.5)
    light.release()
    for task in flood:
        task.cancel()
    await asyncio.gather(*flood, return_exceptions=True)


async def test_idle_time_earns_no_credit() -> None:
    queue = make_queue(4)
    busy = Load("busy", 1, 20, (10, 10))
    await simulate(queue, [busy], 1000)
    returned = Load("idle", 1, 20, (10, 10))
    busy = Load("busy", 1, 20, (10, 10))
    await simulate(queue, [busy, returned], 400)
    assert returned.tokens / busy.tokens == pytest.approx(1, rel=0.15)


async def test_nobody_starves_whatever_the_weights() -> None:
    queue = make_queue(4)
    loads = [Load("tiny", 0.01, 5, (5, 5)), Load("huge", 100, 50, (5, 5))]
    await simulate(queue, loads, 60)
    assert loads[0].served > 0


async def test_within_a_team_first_come_is_first_served() -> None:
    queue = make_queue(1)
    first = await queue.acquire("a", 1, 1)
    order: list[int] = []

    async def wait(number: int) -> None:
        with await queue.acquire("a", 1, 1):
            order.append(number)

    tasks = [asyncio.ensure_future(wait(number)) for number in range(5)]
    await settle()
    first.release()
    await asyncio.gather(*tasks)
    assert order == list(range(5))


async def test_a_request_that_used_less_than_expected_is_refunded() -> None:
    queue = make_queue(1)
    holder = await queue.acquire("x", 1, 0)
    a, b = (asyncio.ensure_future(queue.acquire(team, 1, 1000)) for team in "ab")
    await settle()
    holder.release()
    await settle()
    (await a).served(10)
    later = asyncio.ensure_future(queue.acquire("a", 1, 1000))
    await settle()
    (await a).release()
    await settle()
    assert b.done()
    (await b).served(500)
    waiting_b = asyncio.ensure_future(queue.acquire("b", 1, 1000))
    await settle()
    (await b).release()
    await settle()
    assert later.done()
    assert not waiting_b.done()
    waiting_b.cancel()


async def test_a_full_queue_refuses_at_once() -> None:
    queue = make_queue(1, max_queued=2)
    tickets = [asyncio.ensure_future(queue.acquire("a", 1, 1)) for _ in range(3)]
    await settle()
    with pytest.raises(QueueFull):
        await queue.acquire("a", 1, 1)
    assert queue.num_queued == 2
    for task in tickets:
        task.cancel()
    await asyncio.gather(*tickets, return_exceptions=True)


async def test_who_floods_the_queue_makes_room_for_others() -> None:
    queue = make_queue(1, max_queued=4)
    flood = [asyncio.ensure_future(queue.acquire("flooder", 1, 1)) for _ in range(5)]
    await settle()
    light = asyncio.ensure_future(queue.acquire("light", 1, 1))
    await settle()
    assert not light.done()
    assert isinstance(flood[-1].exception(), QueueFull)
    assert queue.num_queued == 4
    for task in [*flood[:-1], light]:
        task.cancel()
    await asyncio.gather(*flood, light, return_exceptions=True)


async def test_no_queue_means_no_waiting() -> None:
    queue = make_queue(1, max_queued=0)
    ticket = await queue.acquire("a", 1, 1)
    with pytest.raises(QueueFull):
        await queue.acquire("b", 1, 1)
    ticket.release()
    (await queue.acquire("b", 1, 1)).release()


async def test_waiting_ends() -> None:
    queue = make_queue(1, timeout_s=0.01)
    with await queue.acquire("a", 1, 1), pytest.raises(QueueTimeout):
        await queue.acquire("a", 1, 1)
    assert (queue.num_queued, queue.num_running) == (0, 0)


async def test_a_place_given_to_a_caller_that_just_left_goes_to_the_next() -> None:
    queue = make_queue(1)
    holder = await queue.acquire("a", 1, 1)
    leaving = asyncio.ensure_future(queue.acquire("a", 1, 1))
    next_one = asyncio.ensure_future(queue.acquire("a", 1, 1))
    await settle()
    holder.release()  # the place is `leaving`'s now, but it has not heard yet
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    await settle()
    assert next_one.done()
    next_one.result().release()
    assert queue.num_running == 0


async def test_a_waiter_that_left_before_its_turn_leaves_no_hole() -> None:
    queue = make_queue(1)
    holder = await queue.acquire("a", 1, 1)
    tasks = [asyncio.ensure_future(queue.acquire("a", 1, 1)) for _ in range(300)]
    await settle()
    for task in tasks[:-1]:
        task.cancel()
    holder.release()  # before any of them has run its cancellation
    await asyncio.gather(*tasks[:-1], return_exceptions=True)
    assert (await tasks[-1]) is not None
    assert (queue.num_queued, queue.num_running) == (0, 1)


async def test_new_routers_take_what_waits() -> None:
    queue = make_queue(1)
    tasks = [asyncio.ensure_future(queue.acquire("a", 1, 1)) for _ in range(4)]
    await settle()
    queue.set_capacity(3)
    await settle()
    assert [task.done() for task in tasks] == [True, True, True, False]
    queue.set_capacity(1)
    tasks[0].result().release()
    await settle()
    assert not tasks[3].done()
    tasks[1].result().release()
    tasks[2].result().release()
    (await tasks[3]).release()


async def test_closing_sends_everybody_away() -> None:
    queue = make_queue(1)
    ticket = await queue.acquire("a", 1, 1)
    waiting = asyncio.ensure_future(queue.acquire("a", 1, 1))
    await settle()
    queue.close()
    with pytest.raises(QueueClosed):
        await waiting
    with pytest.raises(QueueClosed):
        await queue.acquire("a", 1, 1)
    ticket.release()
    ticket.release()
    assert (queue.num_queued, queue.num_running) == (0, 0)


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["acquire", "release", "cancel", "capacity", "serve"]),
        st.integers(0, 9),
    ),
    max_size=80,
)


@settings(max_examples=50, deadline=None)
@given(operations=OPERATIONS, share=st.sampled_from([0.0, 0.125, 0.5]), room=st.integers(0, 6))
def test_places_are_never_lost_nor_left_free(
    operations: list[tuple[str, int]], share: float, room: int
) -> None:
    async def run() -> None:
        capacity = 4
        queue = make_queue(capacity, share, max_queued=room)
        tasks: list[asyncio.Task[Ticket]] = []
        teams: dict[asyncio.Task[Ticket], str] = {}
        held: list[tuple[str, Ticket]] = []
        numbers = itertools.count()
        for name, number in operations:
            if name == "acquire":
                team = f"t{number % 3}"
                task = asyncio.ensure_future(queue.acquire(team, 1 + number % 2, next(numbers)))
                tasks.append(task)
                teams[task] = team
            elif name == "release" and held:
                held.pop(number % len(held))[1].release()
            elif name == "cancel" and tasks:
                tasks[number % len(tasks)].cancel()
            elif name == "serve" and held:
                held[number % len(held)][1].served(number)
            elif name == "capacity":
                capacity = number
                queue.set_capacity(capacity)
            await settle()
            for task in [task for task in tasks if task.done()]:
                tasks.remove(task)
                if not task.cancelled() and task.exception() is None:
                    held.append((teams[task], task.result()))
            limit = max(1, capacity - int(capacity * share))
            running = {team: sum(t == team for t, _ in held) for team in teams.values()}
            assert queue.num_running == len(held)
            assert queue.num_queued == len(tasks) <= room
            if len(held) < capacity:
                assert all(running[teams[task]] >= limit for task in tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for _, ticket in held:
            ticket.release()
        assert (queue.num_queued, queue.num_running) == (0, 0)

    asyncio.run(run())


async def test_a_request_takes_as_many_places_as_it_has_answers() -> None:
    queue = make_queue(8, share=0.25)
    large = await queue.acquire("a", 1, 10, num_places=4)
    second = asyncio.ensure_future(queue.acquire("a", 1, 10, num_places=3))
    await settle()
    assert not second.done()  # a team may have 6 places
    other = await queue.acquire("b", 1, 10, num_places=2)
    large.release()
    await second
    assert (queue.num_running, queue._num_taken) == (2, 5)
    (await second).release()
    other.release()
    huge = await queue.acquire("a", 1, 10, num_places=1000)
    assert queue._num_taken == 6
    huge.release()
    assert (queue.num_running, queue._num_taken) == (0, 0)


async def test_small_requests_do_not_starve_a_large_one_nor_wait_for_it_without_need() -> None:
    queue = make_queue(8)
    small = [await queue.acquire("b", 1, 100) for _ in range(6)]
    large = asyncio.ensure_future(queue.acquire("a", 1, 1, num_places=6))
    await settle()
    third = asyncio.ensure_future(queue.acquire("c", 1, 1))
    await settle()
    assert not large.done()
    assert not third.done()
    for ticket in small[:5]:
        ticket.release()
    await settle()
    assert large.done()
    assert third.done()
    more = asyncio.ensure_future(queue.acquire("c", 1, 1))
    await settle()
    assert not more.done()
    more.cancel()


async def test_who_comes_to_a_busy_server_is_lifted_to_who_runs() -> None:
    queue = make_queue(4)
    running = await queue.acquire("a", 1, 10)
    running.served(1000)  # long after it was given its place
    await queue.acquire("b", 1, 10)
    assert queue._teams["b"].counter == 1010
    running.served(500)
    await queue.acquire("c", 1, 10)
    assert queue._teams["c"].counter == 1020  # the lowest of those that run


async def test_who_comes_to_an_idle_server_is_lifted_to_whom_it_served_last() -> None:
    queue = make_queue(4)
    ticket = await queue.acquire("a", 1, 10)
    ticket.served(1000)
    ticket.release()
    await queue.acquire("b", 1, 10)
    assert queue._teams["b"].counter == 1010
