"""A key that ended works nowhere after 5 s, whatever the database does meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

import pytest

from deployments.gateway.authenticator import Authenticator
from monitoring.ledger import LedgerUnavailable, hash_secret
from monitoring.usage import Principal

ALICE = Principal(key_id="key_alice", team="t")


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Table:
    """The ledger's keys, and how it behaves."""

    def __init__(self) -> None:
        self.keys: dict[bytes, Principal] = {hash_secret("alice"): ALICE}
        self.questions: list[Sequence[bytes]] = []
        self.is_away = False
        self.gate = asyncio.Event()
        self.gate.set()

    async def lookup(self, hashes: Sequence[bytes]) -> Mapping[bytes, Principal]:
        self.questions.append(list(hashes))
        found = {digest: self.keys[digest] for digest in hashes if digest in self.keys}
        await self.gate.wait()
        if self.is_away:
            raise LedgerUnavailable("away")
        return found


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def table() -> Table:
    return Table()


@pytest.fixture
async def authenticator(table: Table, clock: Clock) -> Authenticator:
    return Authenticator(table.lookup, hash_secret, clock)


async def test_a_known_key_needs_no_question(authenticator: Authenticator, table: Table) -> None:
    assert authenticator.known("alice") is None
    assert await authenticator.principal("alice") == ALICE
    assert authenticator.known("alice") == ALICE
    assert await authenticator.principal("alice") == ALICE
    assert len(table.questions) == 1


async def test_only_hashes_are_asked_for(authenticator: Authenticator, table: Table) -> None:
    await authenticator.principal("alice")
    assert table.questions == [[hash_secret("alice")]]


async def test_the_next_refresh_ends_a_revoked_key(
    authenticator: Authenticator, table: Table, clock: Clock
) -> None:
    await authenticator.principal("alice")
    table.keys.clear()
    clock.now_s += 2
    await authenticator.refresh()
    assert authenticator.known("alice") is None
    assert await authenticator.principal("alice") is None


@pytest.mark.parametrize("failure", ["away", "slow"])
async def test_a_revoked_key_ends_within_5_s_though_no_refresh_succeeds(
    authenticator: Authenticator, table: Table, clock: Clock, failure: str
) -> None:
    await authenticator.principal("alice")
    table.keys.clear()
    refresh = None
    if failure == "away":
        table.is_away = True
        await authenticator.refresh()
    else:
        table.gate.clear()
        refresh = asyncio.ensure_future(authenticator.refresh())
        await asyncio.sleep(0)
    clock.now_s += 4.1
    assert authenticator.known("alice") is None
    table.is_away = False
    table.gate.set()
    assert await authenticator.principal("alice") is None
    if refresh is not None:
        await refresh


async def test_a_refresh_that_began_before_a_revocation_does_not_prolong_the_key(
    authenticator: Authenticator, table: Table, clock: Clock
) -> None:
    await authenticator.principal("alice")
    clock.now_s += 2
    table.gate.clear()
    refresh = asyncio.ensure_future(authenticator.refresh())
    await asyncio.sleep(0)  # it has read the key
    table.keys.clear()
    clock.now_s += 4.1
    table.gate.set()
    await refresh
    assert authenticator.known("alice") is None


async def test_a_slow_answer_does_not_bring_back_what_a_newer_one_ended(
    authenticator: Authenticator, table: Table, clock: Clock
) -> None:
    await authenticator.principal("alice")
    table.gate.clear()
    slow = asyncio.ensure_future(authenticator.refresh())
    await asyncio.sleep(0)
    table.keys.clear()
    clock.now_s += 4.1  # by now it must be asked for inline
    inline = asyncio.ensure_future(authenticator.principal("alice"))
    await asyncio.sleep(0)
    table.gate.set()
    assert await inline is None
    await slow
    assert authenticator.known("alice") is None


async def test_a_changed_principal_is_seen_at_the_next_refresh(
    authenticator: Authenticator, table: Table, clock: Clock
) -> None:
    await authenticator.principal("alice")
    table.keys[hash_secret("alice")] = Principal(key_id="key_alice", team="other")
    clock.now_s += 2
    await authenticator.refresh()
    known = authenticator.known("alice")
    assert known is not None
    assert known.team == "other"


async def test_a_wrong_key_is_remembered_for_2_s(
    authenticator: Authenticator, table: Table, clock: Clock
) -> None:
    assert await authenticator.principal("eve") is None
    assert await authenticator.principal("eve") is None
    assert len(table.questions) == 1
    table.keys[hash_secret("eve")] = ALICE
    clock.now_s += 2.1
    assert await authenticator.principal("eve") == ALICE


async def test_without_a_database_unknown_keys_are_an_error_not_a_refusal(
    authenticator: Authenticator, table: Table
) -> None:
    table.is_away = True
    with pytest.raises(LedgerUnavailable):
        await authenticator.principal("alice")
    table.is_away = False
    assert await authenticator.principal("alice") == ALICE


async def test_questions_that_come_together_go_together(
    authenticator: Authenticator, table: Table
) -> None:
    table.gate.clear()
    tasks = [asyncio.ensure_future(authenticator.principal(f"guess {n}")) for n in range(1000)]
    tasks += [asyncio.ensure_future(authenticator.principal("alice")) for _ in range(50)]
    for _ in range(3):
        await asyncio.sleep(0)
    table.gate.set()
    answers = await asyncio.gather(*tasks)
    assert answers == [None] * 1000 + [ALICE] * 50
    assert len(table.questions) <= 4


async def test_a_caller_that_hangs_up_spoils_nobody_elses_answer(
    authenticator: Authenticator, table: Table
) -> None:
    table.gate.clear()
    first = asyncio.ensure_future(authenticator.principal("alice"))
    second = asyncio.ensure_future(authenticator.principal("alice"))
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    table.gate.set()
    assert await second == ALICE


async def test_guessed_keys_do_not_fill_the_memory(
    authenticator: Authenticator, table: Table
) -> None:
    await authenticator.principal("alice")
    await asyncio.gather(*(authenticator.principal(f"guess {n}") for n in range(11_000)))
    assert len(authenticator._unknown) <= 10_000
    assert authenticator.known("alice") == ALICE


async def test_keys_that_nobody_uses_are_not_confirmed_for_ever(
    authenticator: Authenticator, table: Table, clock: Clock
) -> None:
    await authenticator.principal("alice")
    clock.now_s += 61
    await authenticator.refresh()
    assert len(table.questions) == 1


async def test_closing_ends_the_questions(authenticator: Authenticator, table: Table) -> None:
    table.gate.clear()
    task = asyncio.ensure_future(authenticator.principal("alice"))
    await asyncio.sleep(0)
    await authenticator.close()
    with pytest.raises(LedgerUnavailable):
        await task
