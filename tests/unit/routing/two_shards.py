"""A layer over two shards, with the answer that it must have; for tests of what may go wrong."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch

from tests.unit.shards import (
    Shards,
    dense_reference,
    random_experts,
    random_routing,
    relative_error,
)

NUM_EXPERTS = 6
X, _, WEIGHTS = random_routing(8, NUM_EXPERTS, 3)
# Every row asks both shards (0..2 and 3..5).
IDS = torch.tensor([[i % 3, 3 + i % 3, (i + 1) % 3] for i in range(8)], dtype=torch.int32)
EXPECTED = dense_reference(random_experts(range(NUM_EXPERTS)), 1, X, IDS, WEIGHTS)


def run(made: Shards, layer: int = 1) -> torch.Tensor:
    assert made.dispatcher is not None
    return made.dispatcher.combine(made.dispatcher.dispatch(layer, X, IDS, WEIGHTS))


def is_right(out: torch.Tensor) -> bool:
    return relative_error(out, EXPECTED) < 1e-5


class Background:
    """A forward that runs on its own thread, as in the vLLM worker."""

    def __init__(self, run: Callable[[], torch.Tensor]) -> None:
        self.out: torch.Tensor | None = None
        self._thread = threading.Thread(target=self._run, args=(run,))
        self._thread.start()

    def _run(self, run: Callable[[], torch.Tensor]) -> None:
        self.out = run()

    def join(self) -> torch.Tensor:
        self._thread.join(30)
        assert self.out is not None, "the forward did not end"
        return self.out
