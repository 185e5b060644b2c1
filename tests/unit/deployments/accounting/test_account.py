"""Accounts: every token once, whatever the kind of output, and exactly one record."""

from __future__ import annotations

from typing import Any

import pytest
from vllm.outputs import STREAM_FINISHED, CompletionOutput, RequestOutput

from deployments.accounting import ReasoningRule, current_account
from monitoring.usage import ExpertCost, TokenCount
from tests.unit.deployments.accounting.book import Book

PROMPT = [1, 2, 3, 4, 5]
RULE = ReasoningRule(start=100, ends=frozenset({101}), uncounted=frozenset({100, 101, 102}))


def output(
    choices: dict[int, list[int]], *, cached: int = 2, finished: bool = False
) -> RequestOutput:
    completions = [
        CompletionOutput(index, "", ids, None, None, finish_reason="stop" if finished else None)
        for index, ids in choices.items()
    ]
    return RequestOutput("r", None, PROMPT, None, completions, finished, num_cached_tokens=cached)


def test_deltas_add_up_and_the_prompt_counts_once(book: Book) -> None:
    account = book.open()
    call = account.begin_call(is_delta=True)
    for ids in ([7], [8, 9], [], [10]):
        call.count(output({0: ids}))
    assert account.count == TokenCount(5, 2, 4, 0)


def test_a_whole_answer_counts_at_its_end(book: Book) -> None:
    account = book.open()
    call = account.begin_call(is_delta=False)
    call.count(output({0: [7, 8, 9]}, finished=True))
    assert account.count == TokenCount(5, 2, 3, 0)


def test_cumulative_outputs_count_what_is_new(book: Book) -> None:
    account = book.open()
    call = account.begin_call(is_delta=False)
    for ids in ([7], [7, 8], [7, 8], [7, 8, 9]):
        call.count(output({0: ids}))
    assert account.count.completion == 3


@pytest.mark.parametrize("is_delta", [True, False])
def test_choices_of_one_prompt_share_it(book: Book, is_delta: bool) -> None:
    account = book.open()
    call = account.begin_call(is_delta=is_delta)
    call.count(output({0: [7, 8], 1: [9]}), num_cached_tokens=1)
    call.count(output({2: [10, 11, 12]}, cached=4))
    assert account.count == TokenCount(5, 1, 6, 0)


def test_each_prompt_of_a_request_counts(book: Book) -> None:
    account = book.open(endpoint="completions")
    for _ in range(3):
        call = account.begin_call(is_delta=True)
        call.count(output({0: [7]}))
        call.count(output({0: [8]}))
    assert account.count == TokenCount(15, 6, 6, 0)


def test_nothing_is_billed_before_the_first_token(book: Book) -> None:
    account = book.open()
    call = account.begin_call(is_delta=True)
    call.count(output({0: []}, finished=True))
    call.count(STREAM_FINISHED)
    call.end()
    account.end_response("client_closed")
    assert book.record.outcome == "client_closed"
    assert (book.record.prompt_tokens, book.record.completion_tokens) == (0, 0)


def test_thoughts_are_counted_per_choice(book: Book) -> None:
    account = book.open()
    call = account.begin_call(is_delta=True, rule=RULE, template_variables={})
    call.count(output({0: [7, 101], 1: [7]}))
    call.count(output({0: [8], 1: [8, 101, 9]}))
    assert account.count == TokenCount(5, 2, 7, 3)


def test_a_count_is_in_the_slot_before_it_is_told(book: Book) -> None:
    account = book.open()
    call = account.begin_call(is_delta=True)
    call.count(output({0: [7]}))
    call.add_cost(ExpertCost(11, 12, 13))
    stored: Any = account._slot.record()
    assert (stored.prompt_tokens, stored.cached_tokens, stored.completion_tokens) == (5, 2, 1)
    assert (stored.expert_prompt_ns, stored.expert_generation_ns) == (11, 12)
    assert stored.expert_cost_nano_usd == 13


def test_the_record_waits_for_the_answer_and_for_every_call(book: Book) -> None:
    account = book.open()
    calls = [account.begin_call(is_delta=True) for _ in range(2)]
    calls[0].end()
    account.end_response("client_closed")
    assert book.records == []
    calls[1].count(output({0: [7]}))
    calls[1].add_cost(ExpertCost(1, 2, 3))
    calls[1].end()
    assert book.record.completion_tokens == 1
    assert book.record.expert_cost_nano_usd == 3
    assert book.wakes == 1


def test_there_is_one_record_however_often_an_account_ends(book: Book) -> None:
    account = book.open()
    call = account.begin_call(is_delta=True)
    call.end()
    call.end()
    account.end_response("ok")
    account.end_response("error")
    account.abandon("error")
    call.count(output({0: [7]}))
    assert book.record.outcome == "ok"
    assert book.record.completion_tokens == 0


def test_the_record_says_who_asked_for_what(book: Book) -> None:
    book.open("b", "completions").end_response("error")
    record = book.record
    assert (record.request_id, record.key_id, record.team) == ("b", "key-b", "team-b")
    assert (record.model, record.endpoint, record.replica) == (
        *("kimi-nano", "completions"),
        "replica-1",
    )
    assert record.started_s <= record.finished_s + 1e-6


def test_accounts_that_are_open_when_the_replica_ends_keep_what_they_counted(book: Book) -> None:
    running, closed = book.open("a"), book.open("b")
    running.begin_call(is_delta=True).count(output({0: [7, 8]}))
    closed.begin_call(is_delta=True)
    closed.end_response("client_closed")
    book.accounts.abandon_all()
    assert {(one.request_id, one.outcome, one.completion_tokens) for one in book.records} == {
        ("a", "error", 2),
        ("b", "client_closed", 0),
    }


def test_no_call_begins_after_the_end(book: Book) -> None:
    account = book.open()
    account.end_response("ok")
    with pytest.raises(RuntimeError, match="is over"):
        account.begin_call(is_delta=True)


@pytest.mark.parametrize("header", ["", "[]", "{}", '{"id": 1, "key": "k", "team": "t"}'])
def test_a_header_that_is_not_the_gateways_is_refused(book: Book, header: str) -> None:
    with pytest.raises(ValueError, match=r".*"):
        book.accounts.open(header, "chat")
    assert book.log.num_open == 0


def test_only_code_inside_runs_for_the_request(book: Book) -> None:
    account = book.open()
    with account.active():
        assert current_account() is account
    assert current_account() is None
