"""One module per version of the schema. A released one is never changed."""

from __future__ import annotations

__all__: list[str] = []
