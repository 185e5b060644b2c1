"""Shards, their checkpoint and kernels, and the controller that keeps them alive.

Names are imported from their modules: importing this package must stay cheap, since the data
plane and the kernels run without Ray.
"""

from __future__ import annotations

__all__: list[str] = []
