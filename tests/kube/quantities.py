"""Kubernetes's quantities (`500m`, `2Gi`), as whole numbers."""

from __future__ import annotations

import math
import re
from decimal import Decimal

__all__ = ["whole"]

_QUANTITY = re.compile(r"([0-9.]+(?:[eE][-+]?[0-9]+)?)([numkMGTPE]|[KMGTPE]i)?")
_FACTORS = {
    "": Decimal(1),
    **{unit: Decimal(1000) ** power for power, unit in enumerate("num", start=-3)},
    **{unit: Decimal(1000) ** power for power, unit in enumerate("kMGTPE", start=1)},
    **{f"{unit}i": Decimal(1024) ** power for power, unit in enumerate("KMGTPE", start=1)},
}


def whole(quantity: str | float) -> int:
    """The quantity, rounded up: what Go's `Quantity.Value()` says."""
    found = _QUANTITY.fullmatch(str(quantity))
    if found is None:
        raise ValueError(f"{quantity!r} is no quantity")
    return math.ceil(Decimal(found[1]) * _FACTORS[found[2] or ""])
