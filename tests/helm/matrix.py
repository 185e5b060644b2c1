"""The releases that are tested: every values file, and the chart's switches two by two."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import allpairspy
import yaml

from tests.helm.documents import Document, Rendered
from tests.helm.helm_cli import render4, values_files
from tests.helm.switches import SWITCHES, merged

__all__ = [
    "CASES",
    "DEFAULT",
    "EVERYTHING",
    "FILE_CASES",
    "PAIR_CASES",
    "Case",
    "Documents",
    "rendered",
]

Documents = tuple[Document, ...]


@dataclass(frozen=True)
class Case:
    """A release.

    Attributes:
        name: of the test.
        values: beside the chart's own.
        given: names of objects that these say are there already.
        positions: of the switches, where it is made of these.
    """

    name: str
    values: Mapping[str, Any]
    given: frozenset[str] = field(default=frozenset())
    positions: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.name


_GIVEN = frozenset(
    f"given-{what}"
    for what in (
        *("weights", "state", "ledger", "auth", "admin", "metrics", "tests", "redis", "external"),
        *("tls", "registry", "pods", "head"),
    )
) | {"extra"}


def _is_possible(row: Sequence[str]) -> bool:
    """Whether the chart takes what is chosen so far; what it refuses has a test of its own."""
    chosen = dict(zip(SWITCHES, row, strict=False))
    # The grace period that `placed` names is that of the longest stream it can have.
    return not (chosen.get("pods") == "placed" and chosen.get("streams") == "long")


def _pairs() -> Iterator[Case]:
    switches = OrderedDict((name, list(positions)) for name, positions in SWITCHES.items())
    rows = allpairspy.AllPairs(list(switches.values()), filter_func=_is_possible)
    for number, row in enumerate(rows):
        values = merged(*(SWITCHES[name][one] for name, one in zip(SWITCHES, row, strict=True)))
        yield Case(f"pairs-{number:02d}", values, _GIVEN, tuple(row))


def _files() -> Iterator[Case]:
    for path in values_files():
        # The chart's own file is merged by Helm itself.
        own = path.name == "values.yaml"
        values = {} if own else yaml.load(path.read_text(), Loader=yaml.CSafeLoader) or {}
        yield Case(path.stem, values, _given_by(values))


def _given_by(values: Any) -> frozenset[str]:
    """Names in a values file of what must be there before the release."""
    found: set[str] = set()
    if isinstance(values, Mapping):
        for key, value in values.items():
            if key in ("existingSecret", "claimName") and value:
                found.add(value)
            found |= _given_by(value)
    elif isinstance(values, list):
        found = set().union(*map(_given_by, values))
    return frozenset(found)


FILE_CASES = tuple(_files())
PAIR_CASES = tuple(_pairs())
CASES = (*FILE_CASES, *PAIR_CASES)
DEFAULT = Case("default", {})

# With every part that has an object of its own, for what must be seen of all of them.
EVERYTHING = Case(
    "everything",
    merged(
        *(
            SWITCHES[name][position]
            for name, position in (
                ("shards", "both"),
                ("weights", "new-claim"),
                ("state", "new-claim"),
                ("ledger", "database"),
                ("ingress", "tls"),
                ("route", "on"),
            )
        )
    ),
    _GIVEN,
)


@functools.cache
def _rendered(name: str) -> Rendered:
    case = next(one for one in (*CASES, DEFAULT, EVERYTHING) if one.name == name)
    return render4(case.values)


def rendered(case: Case) -> Rendered:
    """By Helm 4, with every operator's kinds; once for each case."""
    return _rendered(case.name)
