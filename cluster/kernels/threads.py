"""Thread counts of compute threads."""

from __future__ import annotations

import threading

import torch

__all__ = ["limit_threads"]

_limits = threading.local()


def limit_threads(num_threads: int) -> None:
    """Let kernels that the calling thread runs use `num_threads`.

    OpenMP keeps this number per thread: a thread that has not been told takes every core.
    """
    if getattr(_limits, "num_threads", None) != num_threads:
        torch.set_num_threads(num_threads)
        _limits.num_threads = num_threads
