"""What goes well is done in native code, with the answers that Python gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cluster.data_plane import DataPlaneServer
from cluster.kernels import build_kernel
from routing.dispatcher import Dispatcher
from routing.native_hop import NativeHop
from routing.table import ShardEndpoint
from tests.unit.routing.two_shards import (
    IDS,
    NUM_EXPERTS,
    WEIGHTS,
    Background,
    X,
    is_right,
    run,
)
from tests.unit.shards import HIDDEN, Shards, random_experts, shards, wait_until


def python_layers(made: Shards) -> int:
    return made.state.get("python_layers")


def test_the_library_is_built_and_used_once_connections_stand(tmp_path: Path) -> None:
    assert NativeHop.is_built(), "scripts/setup builds it"
    with shards(NUM_EXPERTS, 2, tmp_path / "state") as made:
        made.start()
        made.connect()
        assert is_right(run(made))
        assert python_layers(made) == 1
        for layer in (1, 2, 1, 2):
            run(made, layer)
        assert python_layers(made) == 1
        assert made.state.get("steps") == 5


def test_python_takes_over_what_native_code_does_not_serve(tmp_path: Path) -> None:
    with shards(NUM_EXPERTS, 2, tmp_path / "state") as made:
        made.start()
        dispatcher = made.connect()
        run(made)
        for x, ids in ((X.half(), IDS), (X, IDS.long()), (X[:0], IDS[:0])):
            before = python_layers(made)
            dispatcher.combine(dispatcher.dispatch(1, x, ids, WEIGHTS[: len(x)]))
            assert python_layers(made) == before + 1
        assert is_right(run(made))
        assert python_layers(made) == 4
        assert made.state.poison == 0


def test_ids_and_weights_may_be_overwritten_behind_dispatch(made: Shards) -> None:
    dispatcher = made.connect()
    run(made)
    ids, weights = IDS.clone(), WEIGHTS.clone()
    pending = dispatcher.dispatch(1, X, ids, weights)
    ids.fill_(0)
    weights.fill_(0)
    assert is_right(dispatcher.combine(pending))


def test_they_may_be_overwritten_even_when_rows_are_sent_again(made: Shards) -> None:
    dispatcher = made.connect(recovery_timeout_s=30)
    run(made)
    ids, weights = IDS.clone(), WEIGHTS.clone()
    made.stop("shard-1")
    made.start("shard-1")
    made.tables.publish(made.table())
    pending = dispatcher.dispatch(1, X, ids, weights)
    ids.fill_(0)
    weights.fill_(0)
    assert is_right(dispatcher.combine(pending))
    assert made.state.poison == 0


def test_native_code_is_used_again_after_a_shard_was_replaced_within_a_step(
    made: Shards, use_native: bool
) -> None:
    made.connect(recovery_timeout_s=30)
    run(made)
    made.stop("shard-1")
    forward = Background(lambda: run(made))
    wait_until(lambda: made.state.is_waiting, "waiting")
    made.start("shard-1")
    made.tables.publish(made.table())
    assert is_right(forward.join())
    before = python_layers(made)
    for _ in range(4):
        assert is_right(run(made))
    assert python_layers(made) - before == (0 if use_native else 4)


def with_kernel_of(dtype: torch.dtype, made: Shards) -> Dispatcher:
    """Shards that hold, and answer in, another type than rows have."""
    for name, experts in made.held.items():
        kernel = build_kernel(random_experts(experts, dtype=dtype), "torch")
        server = DataPlaneServer(kernel, host="127.0.0.1", token=None, incarnation=name)
        made.servers[name] = server
        made.endpoints[name] = ShardEndpoint(name, "127.0.0.1", server.start(), name)
    return made.connect()


@pytest.mark.parametrize("kernel_dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_answers_equal_pythons_to_the_bit(
    tmp_path: Path, kernel_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    outputs = []
    for use_native in (False, True):
        with shards(NUM_EXPERTS, 2, tmp_path / f"state-{use_native}") as made:
            made.use_native = use_native
            dispatcher = with_kernel_of(kernel_dtype, made)
            for _ in range(2):
                pending = dispatcher.dispatch(1, X.to(dtype), IDS, WEIGHTS)
                out = dispatcher.combine(pending)
            assert python_layers(made) == (1 if use_native else 2)
            assert made.state.poison == 0
            outputs.append(out)
    assert outputs[0].shape == (len(X), HIDDEN)
    assert torch.equal(*outputs)
