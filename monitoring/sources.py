"""The processes that push, what each has counted, and which of their messages count."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum

import numpy as np

from monitoring.declaration import Role
from monitoring.messages import Counts, ExpertRows, Push, SourceId, longest_silence_s

__all__ = ["News", "Source", "Sources", "Standing"]

_REMEMBERED_S = 3600.0
_MAX_FORGOTTEN = 10_000


class Standing(Enum):
    """What a message is to the aggregator."""

    NEW = "new"  # to be counted
    REPEATED = "repeated"  # counted before
    GAP = "gap"  # messages before it are missing


@dataclass(slots=True)
class Source:
    """A process.

    Attributes:
        sequence: of its last message that was counted.
        seen_s: when it was heard last.
        silence_s: longer without a word, and it is gone.
        counts, experts: all that was counted of it.
        gauges: as of its last message.
        is_live: it has neither ended nor fallen silent.
        is_awaited: it lived when the totals were saved, and has not been heard since.
    """

    sequence: int
    seen_s: float
    silence_s: float = longest_silence_s(0.0)
    counts: Counts = field(default_factory=dict)
    gauges: Mapping[str, Mapping[tuple[str, ...], float]] = field(default_factory=dict)
    experts: ExpertRows | None = None
    is_live: bool = True
    is_awaited: bool = False


@dataclass(frozen=True, slots=True)
class News:
    """What a message adds to the totals.

    Attributes:
        counts, experts: the growth.
        is_history: of before the aggregator's start: no rate may be made of it.
    """

    counts: Counts
    experts: ExpertRows | None
    is_history: bool


class Sources:
    """All processes that were heard, by `SourceId`.

    One that has gone is remembered for an hour, so that it may come back without being counted
    twice; of older ones only the name is kept, and what they say when they come back counts from
    then on.
    """

    def __init__(self) -> None:
        self._known: dict[SourceId, Source] = {}
        self._forgotten: OrderedDict[SourceId, None] = OrderedDict()
        self._has_ended = False

    def items(self) -> Iterable[tuple[SourceId, Source]]:
        """Those that are remembered."""
        return self._known.items()

    @property
    def forgotten(self) -> Iterable[SourceId]:
        """Those of which only the name is kept, oldest first."""
        return self._forgotten.keys()

    def live(self, role: Role | None = None) -> Iterator[tuple[SourceId, Source]]:
        """Those that live, of a role or of all."""
        for name, source in self._known.items():
            if source.is_live and role in (None, name.role):
                yield name, source

    def standing(self, push: Push) -> Standing:
        """Whether the message counts."""
        source = self._known.get(push.source)
        if source is None:
            return Standing.NEW if push.is_full else Standing.GAP
        if push.sequence <= source.sequence:
            return Standing.REPEATED
        is_next = push.is_full or push.sequence == source.sequence + 1
        return Standing.NEW if is_next else Standing.GAP

    def hear(self, push: Push, now_s: float) -> News | None:
        """Take a message in; None when there is nothing in it to count."""
        standing = self.standing(push)
        if standing is Standing.GAP:
            return None
        if standing is Standing.REPEATED:
            source = self._known[push.source]
            if push.sequence == source.sequence and source.is_live:
                source.seen_s, source.gauges = now_s, push.gauges
            return None
        return self._take(push, now_s)

    def depart(self, role: Role, name: str) -> bool:
        """A process has ended; whether it was there."""
        gone = [source for key, source in self.live(role) if key.name == name]
        for source in gone:
            self._end(source)
        return bool(gone)

    def expire(self, now_s: float) -> bool:
        """End those that have fallen silent, forget those gone for long.

        Returns:
            Whether any has ended since the last call, in whichever way.
        """
        silent = [s for _, s in self.live() if now_s - s.seen_s > s.silence_s]
        for source in silent:
            self._end(source)
        for name, source in list(self._known.items()):
            if not source.is_live and now_s - source.seen_s > _REMEMBERED_S:
                del self._known[name]
                self._forgotten[name] = None
        while len(self._forgotten) > _MAX_FORGOTTEN:
            self._forgotten.popitem(last=False)
        has_ended, self._has_ended = self._has_ended, False
        return has_ended

    def restore(self, name: SourceId, source: Source) -> None:
        """Know a source of before a restart; it is awaited if it lived."""
        source.is_awaited = source.is_live
        self._known[name] = source

    def restore_forgotten(self, names: Iterable[SourceId]) -> None:
        """Know the names of those that were forgotten before a restart."""
        self._forgotten = OrderedDict.fromkeys(names)

    @property
    def is_awaiting(self) -> bool:
        """Whether a source of before a restart has not been heard since."""
        return any(source.is_awaited for _, source in self.live())

    def _take(self, push: Push, now_s: float) -> News:
        source = self._known.get(push.source)
        if source is None:
            source = self._known[push.source] = Source(0, now_s)
            if not push.is_last:
                self._replace_lives_before(push.source)
            is_known, is_history = push.source in self._forgotten, push.sequence > 1
            self._forgotten.pop(push.source, None)
        else:
            is_known = is_history = False
        growth = _counts_beyond(push.counts, source.counts) if push.is_full else push.counts
        rows = _rows_beyond(push.experts, source.experts) if push.is_full else push.experts
        _add_counts(source.counts, growth)
        source.experts = _sum_of_rows(source.experts, rows)
        source.sequence, source.seen_s, source.gauges = push.sequence, now_s, push.gauges
        source.silence_s = longest_silence_s(push.interval_s)
        source.is_live, source.is_awaited = True, False
        if push.is_last:
            self._end(source)
        return News({}, None, is_history) if is_known else News(growth, rows, is_history)

    def _replace_lives_before(self, new: SourceId) -> None:
        """A process that starts anew under the same name is the sign of the other's end."""
        for name, source in self.live(new.role):
            if name.name == new.name and name != new:
                self._end(source)

    def _end(self, source: Source) -> None:
        source.is_live, source.is_awaited, source.gauges = False, False, {}
        self._has_ended = True


def _counts_beyond(totals: Counts, known: Counts) -> Counts:
    """How far totals exceed what is known; never below 0, whatever rounding has done."""
    return {
        name: {
            key: _growth(numbers, known.get(name, {}).get(key)) for key, numbers in series.items()
        }
        for name, series in totals.items()
    }


def _growth(numbers: tuple[float, ...], known: tuple[float, ...] | None) -> tuple[float, ...]:
    if known is None:
        return numbers
    return tuple(max(0.0, a - b) for a, b in zip(numbers, known, strict=True))


def _add_counts(to: Counts, growth: Counts) -> None:
    for name, series in growth.items():
        mine = to.setdefault(name, {})
        for key, numbers in series.items():
            old = mine.get(key)
            mine[key] = (
                numbers if old is None else tuple(a + b for a, b in zip(old, numbers, strict=True))
            )


def _rows_beyond(totals: ExpertRows | None, known: ExpertRows | None) -> ExpertRows | None:
    if totals is None or known is None:
        return totals
    rows = np.maximum(totals.rows - known.rows, 0)
    return ExpertRows(totals.layers, totals.experts, totals.num_experts, rows)


def _sum_of_rows(known: ExpertRows | None, growth: ExpertRows | None) -> ExpertRows | None:
    if known is None or growth is None:
        return growth if known is None else known
    return ExpertRows(known.layers, known.experts, known.num_experts, known.rows + growth.rows)
