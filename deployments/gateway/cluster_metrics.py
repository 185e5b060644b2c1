"""The cluster's metrics, asked of the one actor that adds them up."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from ray.exceptions import RayError

from cluster.metrics_actor import get_metrics_actor
from deployments.errors import RETRY_AFTER_S, ApiError

__all__ = ["ClusterMetrics"]

logger = logging.getLogger(__name__)

_TIMEOUT_S = 10.0


class ClusterMetrics:
    """Asks; finds the actor again when it was started anew."""

    def __init__(self) -> None:
        self._handle: Any = None

    async def snapshot(self) -> str:
        """All metrics in Prometheus's text format.

        Raises:
            ApiError: 503, there is no answer.
        """
        return str(await self._ask("snapshot"))

    async def experts(self) -> dict[str, Any]:
        """The load of every expert.

        Raises:
            ApiError: 503, there is no answer.
        """
        return dict(await self._ask("experts"))

    async def _ask(self, method: str) -> Any:
        try:
            if self._handle is None:
                self._handle = await asyncio.to_thread(get_metrics_actor)
            if self._handle is None:
                raise _unavailable()
            return await asyncio.wait_for(getattr(self._handle, method).remote(), _TIMEOUT_S)
        except (RayError, TimeoutError) as error:
            logger.warning("the metrics actor does not answer: %s", type(error).__name__)
            self._handle = None
            raise _unavailable() from None


def _unavailable() -> ApiError:
    return ApiError(
        503,
        "Metrics are not there right now. Try again shortly.",
        "metrics_unavailable",
        retry_after_s=RETRY_AFTER_S,
    )
