"""Limits, times and lists as people write them on a command line."""

from __future__ import annotations

import argparse
import dataclasses
import re
from decimal import Decimal, InvalidOperation
from typing import Any

from cluster.exceptions import ConfigError
from deployments.gateway.usage_report import as_time
from monitoring.ledger import Limits
from monitoring.ledger.periods import PERIODS
from monitoring.prices import NANO_USD_PER_USD

__all__ = ["add_limit_options", "duration_s", "expiry", "limits_from", "listed", "show_limits"]

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}
_DURATION_PATTERN = re.compile(r"(\d{1,6})([smhdw])")
_UNLIMITED = "none"
_WHOLE_NUMBERS = ("requests_per_minute", "tokens_per_minute", "max_parallel")


def add_limit_options(parser: argparse.ArgumentParser, *, with_weight: bool) -> None:
    """Options for `limits_from`."""
    group = parser.add_argument_group("limits", f"{_UNLIMITED!r} takes one away")
    group.add_argument("--budget-usd", metavar="USD", help="money per period")
    group.add_argument("--period", choices=PERIODS, help="of the budget, in UTC (default month)")
    hardness = group.add_mutually_exclusive_group()
    hardness.add_argument("--soft", action="store_true", help="only report what exceeds the budget")
    hardness.add_argument(
        "--hard", action="store_true", help="refuse what would exceed it (default)"
    )
    group.add_argument("--requests-per-minute", metavar="N")
    group.add_argument("--tokens-per-minute", metavar="N")
    group.add_argument("--max-parallel", metavar="N", help="requests at the same time")
    if with_weight:
        group.add_argument(
            "--weight", metavar="W", help="share against other teams when places are short"
        )


def limits_from(arguments: argparse.Namespace, before: Limits) -> Limits:
    """`before`, with what the arguments name changed.

    Raises:
        ConfigError: a value is not what it should be.
    """
    changes: dict[str, Any] = {}
    if arguments.budget_usd is not None:
        changes["budget_nano_usd"] = _money("--budget-usd", arguments.budget_usd)
    if arguments.period is not None:
        changes["period"] = arguments.period
    if arguments.soft or arguments.hard:
        changes["is_hard"] = arguments.hard
    for field in _WHOLE_NUMBERS:
        text = getattr(arguments, field)
        if text is not None:
            changes[field] = _whole_number(f"--{field.replace('_', '-')}", text)
    if getattr(arguments, "weight", None) is not None:
        changes["weight"] = _weight(arguments.weight)
    return dataclasses.replace(before, **changes)


def listed(text: str | None) -> list[str]:
    """The entries of a list with commas."""
    return [entry.strip() for entry in (text or "").split(",") if entry.strip()]


def duration_s(option: str, text: str) -> int:
    """Seconds of `90s`, `15m`, `12h`, `30d`, `2w`.

    Raises:
        ConfigError: it is none.
    """
    match = _DURATION_PATTERN.fullmatch(text.strip().lower())
    if match is None:
        raise ConfigError(f"{option}: must be a time such as 12h or 30d, got {text!r}")
    return int(match[1]) * _SECONDS[match[2]]


def expiry(text: str | None, now_s: float) -> float | None:
    """Unix time of `30d` (from now), or of an ISO date; None for none.

    Raises:
        ConfigError: it is neither.
    """
    if text is None:
        return None
    if _DURATION_PATTERN.fullmatch(text.strip().lower()):
        return now_s + duration_s("--expires", text)
    try:
        return as_time(text)
    except ValueError:
        raise ConfigError(
            f"--expires: must be a time such as 30d or a date such as 2030-01-31, got {text!r}"
        ) from None


def show_limits(limits: Limits) -> str:
    """Limits for people; "" where there are none."""
    parts = []
    if limits.budget_nano_usd is not None:
        kind = "" if limits.is_hard else " (soft)"
        usd = Decimal(limits.budget_nano_usd) / NANO_USD_PER_USD
        parts.append(f"{usd:.2f} USD/{limits.period}{kind}")
    if limits.requests_per_minute is not None:
        parts.append(f"{limits.requests_per_minute} requests/min")
    if limits.tokens_per_minute is not None:
        parts.append(f"{limits.tokens_per_minute} tokens/min")
    if limits.max_parallel is not None:
        parts.append(f"{limits.max_parallel} parallel")
    if limits.weight != 1:
        parts.append(f"weight {limits.weight:g}")
    return ", ".join(parts)


def _money(option: str, text: str) -> int | None:
    if text == _UNLIMITED:
        return None
    try:
        nano_usd = Decimal(text) * NANO_USD_PER_USD
        whole = int(nano_usd)
    except (InvalidOperation, ValueError, OverflowError):
        raise _wrong(option, "an amount such as 10 or 2.50", text) from None
    if nano_usd != whole or whole < 0:
        raise _wrong(option, "0 or more, with at most 9 decimals", text)
    return whole


def _whole_number(option: str, text: str) -> int | None:
    if text == _UNLIMITED:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise _wrong(option, f"a whole number or {_UNLIMITED!r}", text)
    return int(text)


def _weight(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise _wrong("--weight", "a number above 0", text) from None


def _wrong(option: str, rule: str, text: str) -> ConfigError:
    return ConfigError(f"{option}: must be {rule}, got {text!r}")
