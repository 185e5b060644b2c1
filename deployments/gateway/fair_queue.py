"""Fair sharing between teams while the routers are full: a virtual token counter (VTC).

After Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024): every team has a
counter of the tokens it was served, divided by its weight; a free place goes to the waiting team
whose counter is lowest. So teams that always have something waiting are served tokens in the ratio
of their weights, whatever the size and number of their requests. A team that begins to wait is
lifted to the lowest counter of those that wait already, or else of those that run: time in which
it asked for nothing earns it nothing.

A request takes as many places as it has answers. While the first in line waits for enough of them,
others may start in those that it leaves over.

Tokens served are prompt tokens that were computed (those from the prefix cache cost nearly
nothing) and generated tokens, at one and the same weight: it is what the split is stated in.
A request is charged what it is expected to use when it starts, then corrected as its tokens come.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field

__all__ = ["FairQueue", "QueueClosed", "QueueFull", "QueueTimeout", "Ticket"]


class QueueFull(Exception):
    """As many requests wait as may, and this team has its share of them."""


class QueueTimeout(Exception):
    """No place came free in time."""


class QueueClosed(Exception):
    """The gateway shuts down."""


@dataclass(slots=True)
class _Team:
    """Attributes:
    counter: tokens served so far by weight, plus what running requests are charged for.
    num_taken: places of its requests that run.
    """

    name: str
    counter: float = 0.0
    num_taken: int = 0
    waiting: deque[_Waiter] = field(default_factory=deque)


@dataclass(slots=True, eq=False)
class _Waiter:
    weight: float
    expected_tokens: float
    num_places: int
    place: asyncio.Future[Ticket]


class Ticket:
    """Places of one request at the routers. Ends with `release`; also usable as a context."""

    def __init__(
        self, queue: FairQueue, team: _Team, weight: float, charged: float, num_places: int
    ) -> None:
        self._queue = queue
        self._team = team
        self._num_places = num_places
        self._weight = weight
        self._charged = charged
        self._served = 0.0
        self._is_held = True

    @property
    def num_served(self) -> float:
        """Tokens served so far."""
        return self._served

    def served(self, num_tokens: float) -> None:
        """That many more tokens were served."""
        self._served += num_tokens
        if self._is_held and self._served > self._charged:
            self._team.counter += (self._served - self._charged) / self._weight
            self._charged = self._served

    def release(self) -> None:
        """Give the place back, and what it was charged too much. Idempotent."""
        if not self._is_held:
            return
        self._is_held = False
        self._team.counter -= (self._charged - self._served) / self._weight
        self._queue._released(self._team, self._num_places)

    def __enter__(self) -> Ticket:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class FairQueue:
    """Where requests wait for a place at the routers. For one event loop.

    Args:
        capacity: places, i.e. answers that the routers generate at once.
        reserved_share: share of the places that a single team may not fill.
        max_queued: most requests that wait.
        timeout_s: longest wait.
    """

    def __init__(
        self, *, capacity: int, reserved_share: float, max_queued: int, timeout_s: float
    ) -> None:
        self._capacity = capacity
        self._reserved_share = reserved_share
        self._max_queued = max_queued
        self._timeout_s = timeout_s
        self._teams: dict[str, _Team] = {}
        self._num_running = 0
        self._num_taken = 0
        self._num_queued = 0
        self._last_started = _Team("")
        self._is_closed = False

    @property
    def num_queued(self) -> int:
        """Requests that wait."""
        return self._num_queued

    @property
    def num_running(self) -> int:
        """Requests that have a place."""
        return self._num_running

    def set_capacity(self, capacity: int) -> None:
        """Change the number of places. Requests that run keep theirs."""
        self._capacity = capacity
        self._dispatch()

    def close(self) -> None:
        """Send everybody away who waits."""
        self._is_closed = True
        for team in self._teams.values():
            for waiter in team.waiting:
                _refuse(waiter, QueueClosed())
            team.waiting.clear()
        self._num_queued = 0

    async def acquire(
        self, team: str, weight: float, expected_tokens: float, num_places: int = 1
    ) -> Ticket:
        """Wait for a place, or for several at once.

        Args:
            team: whose request it is.
            weight: the team's; with twice the weight it is served twice the tokens.
            expected_tokens: what the request will probably use.
            num_places: how many it takes; at most as many as a team may have.

        Raises:
            QueueFull: too many wait.
            QueueTimeout: the wait was too long.
            QueueClosed: the queue was closed.
        """
        if self._is_closed:
            raise QueueClosed
        place: asyncio.Future[Ticket] = asyncio.get_running_loop().create_future()
        waiter = _Waiter(weight, expected_tokens, num_places, place)
        self._enqueue(team, waiter)
        self._dispatch()
        if not place.done() and self._num_queued > self._max_queued:
            self._drop_from_longest(team)
        try:
            async with asyncio.timeout(self._timeout_s):
                return await place
        except TimeoutError:
            self._withdraw(team, waiter)
            raise QueueTimeout from None
        except BaseException:
            self._withdraw(team, waiter)
            raise

    def _enqueue(self, name: str, waiter: _Waiter) -> None:
        team = self._teams.get(name)
        if team is None:
            team = self._teams[name] = _Team(name)
        if not team.waiting:
            team.counter = max(team.counter, self._floor(team))
        team.waiting.append(waiter)
        self._num_queued += 1

    def _floor(self, newcomer: _Team) -> float:
        """The counter below which nobody begins to wait."""
        others = [team for team in self._teams.values() if team is not newcomer]
        waiting = [team.counter for team in others if team.waiting]
        running = [team.counter for team in others if team.num_taken]
        return min(waiting or running, default=self._last_started.counter)

    def _dispatch(self) -> None:
        """Fill the free places."""
        while self._num_queued and self._num_taken < self._capacity:
            limit = self._team_limit()
            candidates = sorted(
                (
                    team
                    for team in self._teams.values()
                    if team.waiting and team.num_taken + self._size(team) <= limit
                ),
                key=lambda team: team.counter,
            )
            team = next((team for team in candidates if self._fits(team, candidates[0])), None)
            if team is None:
                return
            self._start(team)

    def _size(self, team: _Team) -> int:
        """Places of the team's next request."""
        return min(team.waiting[0].num_places, self._team_limit())

    def _fits(self, team: _Team, first: _Team) -> bool:
        """Whether the team's next request may start and not delay the first in line."""
        num_free = self._capacity - self._num_taken
        if team is not first:
            left_over = self._capacity - self._size(first)
            num_free = min(num_free, left_over - (self._num_taken - first.num_taken))
        return self._size(team) <= num_free

    def _start(self, team: _Team) -> None:
        num_places = self._size(team)
        waiter = team.waiting.popleft()
        self._num_queued -= 1
        if waiter.place.done():
            return  # given up just now
        self._last_started = team
        team.counter += waiter.expected_tokens / waiter.weight
        team.num_taken += num_places
        self._num_taken += num_places
        self._num_running += 1
        ticket = Ticket(self, team, waiter.weight, waiter.expected_tokens, num_places)
        waiter.place.set_result(ticket)

    def _team_limit(self) -> int:
        return max(1, self._capacity - int(self._capacity * self._reserved_share))

    def _drop_from_longest(self, newcomer: str) -> None:
        # Else a team that floods would also fill the waiting room, and the others never get in.
        longest = max(self._teams.values(), key=lambda team: len(team.waiting))
        if len(longest.waiting) <= len(self._teams[newcomer].waiting):
            longest = self._teams[newcomer]
        _refuse(longest.waiting.pop(), QueueFull())
        self._num_queued -= 1

    def _withdraw(self, name: str, waiter: _Waiter) -> None:
        team = self._teams.get(name)
        if team is not None and waiter in team.waiting:
            team.waiting.remove(waiter)
            self._num_queued -= 1
            self._forget_idle(team)
        elif (
            waiter.place.done()
            and not waiter.place.cancelled()
            and waiter.place.exception() is None
        ):
            waiter.place.result().release()  # it had just been given a place
        # With the waiter another team may now be first in line.
        self._dispatch()

    def _released(self, team: _Team, num_places: int) -> None:
        team.num_taken -= num_places
        self._num_taken -= num_places
        self._num_running -= 1
        self._dispatch()
        self._forget_idle(team)

    def _forget_idle(self, team: _Team) -> None:
        # One that is behind the others is lifted when it comes back: its counter says nothing.
        if not team.waiting and not team.num_taken and team.counter <= self._floor(team):
            self._teams.pop(team.name, None)


def _refuse(waiter: _Waiter, error: Exception) -> None:
    if not waiter.place.done():
        waiter.place.set_exception(error)
