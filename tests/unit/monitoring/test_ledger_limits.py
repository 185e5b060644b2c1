"""Token buckets and budget periods, without a database."""

from __future__ import annotations

import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from monitoring.ledger.limits import Bucket, RateLimits, tightest
from monitoring.ledger.periods import PERIODS, SECONDS_PER_DAY, Period, day_of, period_bounds


def _s(text: str) -> int:
    return int(datetime.datetime.fromisoformat(text).replace(tzinfo=datetime.UTC).timestamp())


@pytest.mark.parametrize(
    ("period", "at", "start", "end"),
    [
        ("day", "2026-11-24T23:59:59", "2026-11-24", "2026-11-25"),
        ("day", "2026-11-25T00:00:00", "2026-11-25", "2026-11-26"),
        ("week", "2026-11-24T12:00:00", "2026-11-23", "2026-11-30"),
        ("week", "2026-11-23T00:00:00", "2026-11-23", "2026-11-30"),
        ("week", "2026-11-29T23:59:59", "2026-11-23", "2026-11-30"),
        ("month", "2026-12-31T23:59:59", "2026-12-01", "2027-01-01"),
        ("month", "2028-02-29T00:00:00", "2028-02-01", "2028-03-01"),
        ("month", "2026-01-01T00:00:00", "2026-01-01", "2026-02-01"),
    ],
)
def test_periods_follow_the_calendar_of_utc(period: Period, at: str, start: str, end: str) -> None:
    assert period_bounds(period, _s(at)) == (_s(start), _s(end))


@given(period=st.sampled_from(PERIODS), at_s=st.floats(0, 2**37))
def test_periods_hold_their_times_and_meet_without_a_gap(period: Period, at_s: float) -> None:
    start_s, end_s = period_bounds(period, at_s)
    assert start_s <= at_s < end_s
    assert start_s % SECONDS_PER_DAY == end_s % SECONDS_PER_DAY == 0
    assert period_bounds(period, start_s) == period_bounds(period, end_s - 1) == (start_s, end_s)
    if period != "total":
        assert period_bounds(period, end_s)[0] == end_s
    assert start_s <= day_of(at_s) * SECONDS_PER_DAY < end_s


_BUCKETS = st.builds(Bucket, st.integers(1, 10**9), st.floats(-1e9, 1e9)).map(
    lambda bucket: bucket.refilled(0)
)


@given(bucket=_BUCKETS, elapsed_s=st.floats(-100, 1e6))
def test_a_bucket_refills_up_to_a_minutes_worth(bucket: Bucket, elapsed_s: float) -> None:
    later = bucket.refilled(elapsed_s)
    assert bucket.level <= later.level <= bucket.per_minute
    if elapsed_s <= 0:
        assert later == bucket
    assert bucket.refilled(bucket.reset_s).level == pytest.approx(bucket.per_minute)


@given(bucket=_BUCKETS, amount=st.integers(0, 10**9))
def test_who_waits_as_told_gets_it(bucket: Bucket, amount: int) -> None:
    wait_s = bucket.wait_s(amount)
    if amount > bucket.per_minute:
        assert wait_s is None
        return
    assert wait_s is not None
    assert (wait_s == 0) == (bucket.level >= amount)
    assert bucket.refilled(wait_s).level == pytest.approx(max(bucket.level, amount), abs=1e-3)


@given(bucket=_BUCKETS)
def test_what_remains_can_be_taken(bucket: Bucket) -> None:
    assert bucket.remaining >= 0
    if bucket.remaining:
        assert bucket.wait_s(bucket.remaining) == 0


def test_the_emptiest_bucket_of_each_kind_is_shown() -> None:
    assert tightest([], []) == RateLimits()
    shown = tightest([Bucket(60, 30.5), Bucket(10, 4.0)], [Bucket(600, -60.0)])
    assert shown == RateLimits(10, 4, 36.0, 600, 0, 66.0)
