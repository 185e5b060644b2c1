"""What tokens cost: the price table, by model and date, in whole nano-USD.

A price of at most 3 decimals in USD per 1M tokens is a whole number of nano-USD per token, so all
money here is integers and sums are exact.
"""

from __future__ import annotations

import datetime
import difflib
import fnmatch
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, Self

import yaml

__all__ = ["NANO_USD_PER_USD", "Price", "PriceError", "PriceTable"]

NANO_USD_PER_USD = 10**9

_NANO_USD_PER_TOKEN = 1000  # of a price of 1 USD per 1M tokens
_MAX_USD = 1_000_000  # per 1M tokens; above it is a typing mistake, or a sum that overflows
_AMOUNTS = ("input", "cached_input", "output")
_KEYS = ("model", "from", *_AMOUNTS)


class PriceError(Exception):
    """The price table is wrong. `str(error)` is one line: file, entry, key and remedy."""


@dataclass(frozen=True, slots=True)
class Price:
    """What one token costs, in nano-USD.

    Attributes:
        version: "<from date>/<8 hex digits>"; the digits change with anything in the entry.
        input_nano_usd: a prompt token.
        cached_input_nano_usd: a prompt token that the prefix cache already held; never dearer.
        output_nano_usd: a generated token.
    """

    version: str
    input_nano_usd: int
    cached_input_nano_usd: int
    output_nano_usd: int


@dataclass(frozen=True, slots=True)
class _Entry:
    pattern: str
    start: datetime.date
    price: Price


class PriceTable:
    """Prices by model pattern and date. Immutable; `load` reads one from a file."""

    def __init__(self, entries: Sequence[_Entry] = ()) -> None:
        self._by_pattern: dict[str, list[_Entry]] = {}
        for entry in entries:
            self._by_pattern.setdefault(entry.pattern, []).append(entry)
        for dated in self._by_pattern.values():
            dated.sort(key=lambda entry: entry.start, reverse=True)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a YAML file (see `configs/prices.yaml`).

        Raises:
            PriceError: it cannot be read, or an entry is wrong.
        """
        try:
            data: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise PriceError(f"{path}: cannot read the price table: {error.strerror}") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            problem = " ".join(str(error).split())
            raise PriceError(f"{path}: not a YAML file: {problem}") from None
        return cls.parse(data, str(path))

    @classmethod
    def parse(cls, data: Any, source: str) -> Self:
        """The table in what a YAML file holds.

        Args:
            data: the file as Python values.
            source: name of the file, for messages.

        Raises:
            PriceError: an entry is wrong.
        """
        if not isinstance(data, Mapping):
            raise PriceError(f"{source}: expected `prices:` with a list of entries")
        _check_keys(data, ("prices",), source)
        listed = data["prices"]
        if not isinstance(listed, list):
            raise PriceError(f"{source}: prices: expected a list, got {listed!r}")
        entries: list[_Entry] = []
        for index, raw in enumerate(listed):
            where = f"{source}: prices[{index}]"
            entry = _parse_entry(raw, where)
            if any((e.pattern, e.start) == (entry.pattern, entry.start) for e in entries):
                raise PriceError(
                    f"{where}: a second price of {entry.pattern!r} from {entry.start}; remove one"
                )
            entries.append(entry)
        return cls(entries)

    def price(self, model: str, at_s: float) -> Price | None:
        """The price of a model at a time.

        The first pattern, in the order of the file, that matches the model and has a price in
        force, and of its prices the newest.

        Args:
            model: as it is served.
            at_s: Unix time.
        """
        day = datetime.datetime.fromtimestamp(at_s, datetime.UTC).date()
        name = model.lower()
        for pattern, dated in self._by_pattern.items():
            if fnmatch.fnmatchcase(name, pattern):
                for entry in dated:
                    if entry.start <= day:
                        return entry.price
        return None

    @staticmethod
    def cost_nano_usd(price: Price, prompt: int, cached: int, completion: int) -> int:
        """Cost of a request in nano-USD.

        Args:
            price: of its model.
            prompt: its prompt tokens, with the cached ones.
            cached: of those, found in the prefix cache.
            completion: its generated tokens.
        """
        return (
            (prompt - cached) * price.input_nano_usd
            + cached * price.cached_input_nano_usd
            + completion * price.output_nano_usd
        )


def _check_keys(found: Mapping[Any, Any], valid: Sequence[str], where: str) -> None:
    for key in found:
        if key not in valid:
            near = difflib.get_close_matches(str(key), valid, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"valid are: {', '.join(valid)}"
            raise PriceError(f"{where}: unknown key {str(key)!r}; {hint}")
    for key in valid:
        if key not in found:
            raise PriceError(f"{where}: {key!r} is missing")


def _parse_entry(raw: Any, where: str) -> _Entry:
    if not isinstance(raw, Mapping):
        raise PriceError(f"{where}: expected {', '.join(_KEYS)}; got {raw!r}")
    _check_keys(raw, _KEYS, where)
    pattern = raw["model"]
    if not isinstance(pattern, str) or not pattern.strip():
        raise PriceError(f"{where}: model: expected a pattern such as '*kimi-k2.5*', got {raw!r}")
    where = f"{where} ({pattern})"
    start = _parse_date(raw["from"], where)
    amounts = [_parse_amount(raw[key], f"{where}: {key}") for key in _AMOUNTS]
    if amounts[1] > amounts[0]:
        # What a request may cost at most is reserved at the price of `input`.
        raise PriceError(f"{where}: cached_input: must not be above input ({raw['input']})")
    text = "|".join([pattern.lower(), start.isoformat(), *map(str, amounts)])
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return _Entry(pattern.lower(), start, Price(f"{start.isoformat()}/{digest}", *amounts))


def _parse_date(raw: Any, where: str) -> datetime.date:
    if isinstance(raw, str):
        try:
            return datetime.date.fromisoformat(raw)
        except ValueError:
            pass
    elif isinstance(raw, datetime.date) and not isinstance(raw, datetime.datetime):
        return raw
    raise PriceError(f"{where}: from: expected a date such as 2026-01-27 (UTC), got {raw!r}")


def _parse_amount(raw: Any, where: str) -> int:
    """Nano-USD per token of a price in USD per 1M tokens."""
    if isinstance(raw, bool) or not isinstance(raw, int | float):
        raise PriceError(f"{where}: expected USD per 1M tokens, got {raw!r}")
    # By way of str: the float 0.6 is meant as 0.6, not as the binary fraction nearest to it.
    amount = Decimal(str(raw))
    if not amount.is_finite() or not 0 <= amount <= _MAX_USD:
        raise PriceError(f"{where}: must lie in 0..{_MAX_USD} USD per 1M tokens, got {raw!r}")
    nano_usd = amount * _NANO_USD_PER_TOKEN
    if nano_usd != nano_usd.to_integral_value():
        raise PriceError(f"{where}: at most 3 decimals, got {raw!r}")
    return int(nano_usd)
