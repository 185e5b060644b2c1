"""PromQL that several panels share."""

from __future__ import annotations

__all__ = ["increase", "mean", "quantile", "rate", "ratio"]

_INTERVAL = "$__rate_interval"
_RANGE = "$__range"


def rate(metric: str, by: str = "", where: str = "") -> str:
    """Per second, summed over all labels but `by` (comma-separated)."""
    return f"{_sum(by)} (rate({_select(metric, where)}[{_INTERVAL}]))"


def increase(metric: str, by: str = "", where: str = "") -> str:
    """Over the dashboard's time range, summed over all labels but `by`."""
    return f"{_sum(by)} (increase({_select(metric, where)}[{_RANGE}]))"


def ratio(part: str, whole: str, by: str = "") -> str:
    """`part / whole`, both with the labels `by`: 0 where the part has no series yet, nothing where
    the whole is 0 (a share of nothing)."""
    zero = f"0 * {whole}"
    on = f"on ({by})" if by else "on ()"
    return f"({part} or {on} {zero}) / {on} ({whole} > 0)"


def mean(metric: str, by: str = "", where: str = "") -> str:
    """Mean of a histogram's observations."""
    return ratio(rate(f"{metric}_sum", by, where), rate(f"{metric}_count", by, where), by)


def quantile(q: float, metric: str, by: str = "", where: str = "") -> str:
    """Quantile of a histogram."""
    labels = f"le, {by}" if by else "le"
    return f"histogram_quantile({q}, {rate(f'{metric}_bucket', labels, where)})"


def _sum(by: str) -> str:
    return f"sum by ({by})" if by else "sum"


def _select(metric: str, where: str) -> str:
    return f"{metric}{{{where}}}" if where else metric
