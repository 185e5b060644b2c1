"""vLLM's CPU expert op (`cpu_fused_moe`), loaded without vLLM's Python."""

from __future__ import annotations

import functools
import importlib.util
import logging
import platform
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from cluster.checkpoint import ExpertWeights, LayerWeights
from cluster.kernels.threads import limit_threads

__all__ = ["VllmKernel", "load_ops", "why_not"]

logger = logging.getLogger(__name__)

_ALIGNMENT = 32
# The op computes offsets into weights and scratch memory in int32, and does not check them.
_MAX_WEIGHT_ELEMENTS = 2**31 - 1
_MAX_SCRATCH_BYTES = 256 * 2**20
# Its scratch memory belongs to the process: two calls at once would write over each other.
_op_lock = threading.Lock()


@functools.cache
def load_ops() -> str | None:
    """Register vLLM's CPU ops; None, or the reason why they cannot be had.

    Loads the shared library alone: `import vllm._custom_ops` takes seconds and brings vLLM's
    configuration and logging with it.
    """
    if platform.machine() not in ("x86_64", "AMD64"):
        return f"vLLM's expert op is not used on {platform.machine()}"
    if not torch.cpu._is_avx512_supported():
        return "the CPU has no AVX-512"
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        return "vLLM is not installed"
    has_bf16 = torch.cpu._is_avx512_bf16_supported()
    name = "_C.abi3.so" if has_bf16 else "_C_AVX512.abi3.so"
    library = Path(spec.submodule_search_locations[0]) / name
    try:
        torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]
    except OSError as error:
        return f"{library} cannot be loaded: {error}"
    if not hasattr(torch.ops._C, "cpu_fused_moe"):
        return f"{library} has no cpu_fused_moe (not a CPU build of vLLM)"
    return None


def why_not(weights: ExpertWeights) -> str | None:
    """None when the op can serve these weights here, else the reason."""
    reason = load_ops()
    if reason is not None:
        return reason
    _, hidden, width = next(iter(weights.layers.values())).w2.shape
    if hidden % _ALIGNMENT or width % _ALIGNMENT:
        return f"hidden {hidden} and expert width {width} must be multiples of {_ALIGNMENT}"
    if 2 * width * hidden > _MAX_WEIGHT_ELEMENTS:
        return "one expert has more weights than the op can address"
    return None


def _pick_isa(dtype: torch.dtype) -> str:
    """amx or vec. A process that uses AMX must ask the kernel for it first, or it dies of an
    illegal instruction."""
    if dtype != torch.bfloat16 or not torch.cpu._is_amx_tile_supported():
        return "vec"
    return "amx" if torch.cpu._init_amx() else "vec"


class _PackedGroup:
    """A run of local ids whose weights one call of the op can address."""

    def __init__(self, held: LayerWeights, first: int, stop: int, isa: str) -> None:
        self.first = first
        self.stop = stop
        self.w13 = _pack(held.w13[first:stop], isa)
        self.w2 = _pack(held.w2[first:stop], isa)


def _pack(weight: torch.Tensor, isa: str) -> torch.Tensor:
    packed = torch.empty_like(weight)
    torch.ops._C.prepack_moe_weight(weight, packed, isa)
    return packed


class VllmKernel:
    """The op wants every slot filled (it uses ids as indices, unchecked), while a shard's rows
    have slots for experts held elsewhere. A single row's slots are closed up; else every
    (row, expert) pair becomes a row of its own with one slot, and the pairs' results are summed
    in float32. Neither computes anything that was not asked for.

    Takes the layers out of `weights` as it packs them, so that no more than one layer is held
    twice at a time.
    """

    def __init__(self, weights: ExpertWeights, num_threads: int) -> None:
        count, hidden, width = next(iter(weights.layers.values())).w2.shape
        self.dtype = next(iter(weights.layers.values())).w2.dtype
        self._isa = _pick_isa(self.dtype)
        self.name = f"vllm-cpu-{self._isa}"
        self.experts = weights.experts
        self.layers = tuple(weights.layers)
        self.hidden = hidden
        self._activation = weights.activation
        self._num_threads = num_threads
        self._op = torch.ops._C.cpu_fused_moe.default  # the packet would look it up in every call
        pair_bytes = width * self.dtype.itemsize + 4 * hidden
        self._max_pairs = max(1, _MAX_SCRATCH_BYTES // pair_bytes)
        group_size = _MAX_WEIGHT_ELEMENTS // (2 * width * hidden)
        self._groups = {
            layer: [
                _PackedGroup(held, first, min(count, first + group_size), self._isa)
                for first in range(0, count, group_size)
            ]
            for layer, held in _take_out(weights.layers)
        }

    def __call__(
        self,
        layer: int,
        x: torch.Tensor,
        local_ids: npt.NDArray[np.int32],
        weights: npt.NDArray[np.float32],
    ) -> torch.Tensor:
        """Run a layer; see `ExpertKernel`."""
        x = x.to(self.dtype)
        topk = local_ids.shape[1]
        groups = self._groups[layer]
        # Flat: indexing by one array costs a fraction of what indexing by two does.
        ids, flat_weights = local_ids.reshape(-1), weights.reshape(-1)
        asked = np.flatnonzero(ids >= 0)
        if len(groups) == 1 and 0 < len(asked) <= self._max_pairs:
            if len(asked) == ids.size:
                return self._run(groups[0], x, local_ids, weights)
            if len(x) == 1:
                return self._run(groups[0], x, ids[asked][None], flat_weights[asked][None])
        total = torch.zeros(x.shape, dtype=torch.float32)
        for group in groups:
            here = asked
            if len(groups) > 1:
                here = asked[(ids[asked] >= group.first) & (ids[asked] < group.stop)]
            for start in range(0, len(here), self._max_pairs):
                pairs = here[start : start + self._max_pairs]
                rows = torch.from_numpy(pairs // topk)
                pair_ids = ids[pairs] - np.int32(group.first)
                pair_weights = flat_weights[pairs]
                out = self._run(group, x[rows], pair_ids[:, None], pair_weights[:, None])
                total.index_add_(0, rows, out.float())
        return total.to(self.dtype)

    def _run(
        self,
        group: _PackedGroup,
        x: torch.Tensor,
        ids: npt.NDArray[np.int32],
        weights: npt.NDArray[np.float32],
    ) -> torch.Tensor:
        out = torch.empty_like(x)
        with _op_lock:
            limit_threads(self._num_threads)
            self._op(
                out,
                x,
                group.w13,
                group.w2,
                None,
                None,
                torch.from_numpy(weights),
                torch.from_numpy(ids),
                False,
                self._activation,
                self._isa,
            )
        return out


def _take_out(layers: dict[int, LayerWeights]) -> Iterator[tuple[int, LayerWeights]]:
    while layers:
        layer = next(iter(layers))
        yield layer, layers.pop(layer)
