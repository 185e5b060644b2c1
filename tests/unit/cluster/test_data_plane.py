"""The data-plane server answers rows, refuses what it must, and outlives what it is sent."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.data_plane import DataPlaneServer
from cluster.exceptions import ShardStartError
from cluster.kernels import ExpertKernel, build_kernel
from routing.exceptions import HandshakeRefused, PeerClosed, TransportError
from routing.table import ShardEndpoint
from routing.tcp import TcpConnection, TcpTransport
from routing.transport import deadline_after
from routing.wire import (
    ErrorCode,
    FrameHeader,
    FrameKind,
    bytes_of,
    decode_reply,
    encode_request,
)
from tests.unit.shards import (
    HIDDEN,
    dense_reference,
    random_experts,
    random_routing,
    relative_error,
    wait_until,
)

EXPERTS = (2, 5, 3)
TOKEN = b"secret"


class HeldKernel:
    """The torch kernel, stopped at a gate: what a request under way looks like."""

    def __init__(self) -> None:
        self._kernel = build_kernel(random_experts(EXPERTS), "torch")
        self.name, self.experts = self._kernel.name, self._kernel.experts
        self.layers, self.hidden = self._kernel.layers, self._kernel.hidden
        self.dtype = self._kernel.dtype
        self.gate = threading.Event()
        self.fails = False

    def __call__(
        self, layer: int, x: torch.Tensor, ids: np.ndarray, weights: np.ndarray
    ) -> torch.Tensor:
        assert self.gate.wait(30)
        if self.fails:
            raise RuntimeError("the kernel's own fault")
        return self._kernel(layer, x, ids, weights)


def _serve(kernel: ExpertKernel, token: bytes | None = TOKEN) -> tuple[DataPlaneServer, int]:
    server = DataPlaneServer(kernel, host="127.0.0.1", token=token, incarnation="life")
    return server, server.start()


@pytest.fixture
def kernel() -> HeldKernel:
    kernel = HeldKernel()
    kernel.gate.set()
    return kernel


@pytest.fixture
def server(kernel: HeldKernel) -> Iterator[tuple[DataPlaneServer, int]]:
    server, port = _serve(kernel)
    yield server, port
    kernel.gate.set()
    server.close()


def _connect(port: int, token: bytes | None = TOKEN) -> TcpConnection:
    endpoint = ShardEndpoint("shard-0", "127.0.0.1", port, "life")
    return TcpTransport().connect(endpoint, token, deadline_after(5))


def _send(
    connection: TcpConnection,
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    layer: int = 1,
) -> None:
    parts = encode_request(
        bytes_of(x), x.dtype, ids.numpy(), weights.numpy(), layer=layer, table_version=1, sequence=9
    )
    connection.send(parts, deadline_after(5))


def _case(num_rows: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x, local, weights = random_routing(num_rows, len(EXPERTS), 2, seed=num_rows)
    return x, torch.tensor(EXPERTS, dtype=torch.int32)[local], weights


def _error(connection: TcpConnection) -> tuple[ErrorCode, str]:
    header, body = connection.receive(deadline_after(10))
    assert header.kind is FrameKind.ERROR
    assert header.sequence == 9
    return ErrorCode(header.extra), body.tobytes().decode()


def test_rows_come_back_summed_and_counted(server: tuple[DataPlaneServer, int]) -> None:
    connection = _connect(server[1])
    x, ids, weights = _case()
    ids[0, 1] = -1
    for _ in range(2):
        _send(connection, x, ids, weights)
        rows = decode_reply(*connection.receive(deadline_after(10)))
        expected = dense_reference(random_experts(EXPERTS), 1, x, ids, weights)
        assert relative_error(rows, expected) < 1e-5
    wait_until(lambda: server[0].stats().requests == 2, "the count")
    stats = server[0].stats()
    assert (stats.requests, stats.rows, stats.errors, stats.connections) == (2, 8, 0, 1)
    assert (stats.layers, stats.experts) == ((1, 2), EXPERTS)
    per_expert = [2 * int((ids == expert).sum()) for expert in EXPERTS]
    assert stats.expert_rows.tolist() == [per_expert, [0, 0, 0]]
    assert stats.bytes_sent == 2 * 4 * HIDDEN * 4
    assert stats.busy_ns > 0
    connection.close()


@pytest.mark.parametrize(
    ("layer", "expert", "hidden", "code"),
    [
        (3, 5, HIDDEN, ErrorCode.NOT_HELD),
        (1, 4, HIDDEN, ErrorCode.NOT_HELD),
        (1, 6, HIDDEN, ErrorCode.NOT_HELD),
        (1, 10**9, HIDDEN, ErrorCode.NOT_HELD),
        (1, -2, HIDDEN, ErrorCode.NOT_HELD),
        (1, -(2**31), HIDDEN, ErrorCode.NOT_HELD),
        (1, 5, HIDDEN + 32, ErrorCode.BAD_REQUEST),
    ],
)
def test_what_is_not_held_is_refused_and_the_connection_goes_on(
    server: tuple[DataPlaneServer, int], layer: int, expert: int, hidden: int, code: ErrorCode
) -> None:
    connection = _connect(server[1])
    ids = torch.tensor([[5, expert]], dtype=torch.int32)
    _send(connection, torch.zeros(1, hidden), ids, torch.ones(1, 2), layer)
    assert _error(connection)[0] is code
    _send(connection, *_case())
    assert connection.receive(deadline_after(10))[0].kind is FrameKind.REPLY
    wait_until(lambda: server[0].stats().errors == 1, "the count")
    connection.close()


def test_a_failing_kernel_is_an_error_frame_with_a_traceback_in_the_log(
    server: tuple[DataPlaneServer, int], kernel: HeldKernel, caplog: pytest.LogCaptureFixture
) -> None:
    connection = _connect(server[1])
    kernel.fails = True
    _send(connection, *_case())
    code, message = _error(connection)
    assert code is ErrorCode.INTERNAL
    assert "RuntimeError" in message
    assert "the kernel's own fault" in caplog.text
    kernel.fails = False
    _send(connection, *_case())
    assert connection.receive(deadline_after(10))[0].kind is FrameKind.REPLY
    connection.close()


def test_draining_answers_what_was_accepted_and_turns_newcomers_away(
    server: tuple[DataPlaneServer, int], kernel: HeldKernel
) -> None:
    first, second = _connect(server[1]), _connect(server[1])
    kernel.gate.clear()
    _send(first, *_case())
    wait_until(lambda: server[0]._in_flight == 1, "accepting the request")
    assert not server[0].drain(0.05)
    _send(second, *_case())
    assert _error(second) == (ErrorCode.DRAINING, "this shard is draining")
    kernel.gate.set()
    assert server[0].drain(10)
    assert first.receive(deadline_after(10))[0].kind is FrameKind.REPLY
    first.close()
    second.close()


def test_requests_that_wait_for_the_kernel_are_seen(
    server: tuple[DataPlaneServer, int], kernel: HeldKernel
) -> None:
    connections = [_connect(server[1]) for _ in range(3)]
    kernel.gate.clear()
    for connection in connections:
        _send(connection, *_case())
    wait_until(lambda: server[0].stats().queued == 2, "the queue")
    kernel.gate.set()
    for connection in connections:
        assert connection.receive(deadline_after(10))[0].kind is FrameKind.REPLY
        connection.close()
    wait_until(lambda: server[0].stats().queued == 0, "the end of the queue")


def test_a_client_that_hangs_up_in_the_middle_costs_nothing(
    server: tuple[DataPlaneServer, int], kernel: HeldKernel
) -> None:
    connection = _connect(server[1])
    kernel.gate.clear()
    _send(connection, *_case(64))
    wait_until(lambda: server[0]._in_flight == 1, "accepting the request")
    connection.close()
    kernel.gate.set()
    assert server[0].drain(10)
    wait_until(lambda: server[0].stats().connections == 0, "noticing the end")


def test_a_wrong_token_is_refused_and_counted(server: tuple[DataPlaneServer, int]) -> None:
    for token in (None, b"wrong"):
        with pytest.raises(HandshakeRefused):
            _connect(server[1], token)
    wait_until(lambda: server[0].stats().refused == 1, "counting it")
    assert server[0].stats().connections == 0


def test_frames_that_lie_end_their_connection_and_nothing_else(
    server: tuple[DataPlaneServer, int],
) -> None:
    random = np.random.default_rng(11)
    good = FrameHeader(FrameKind.REQUEST, 3, 2, 9, 1, 1, 1, HIDDEN, 64 + 4 * HIDDEN)
    lies = [
        good._replace(rows=2**32 - 1),
        good._replace(rows=0),
        good._replace(extra=0),
        good._replace(topk=0),
        good._replace(topk=2**16 - 1),
        good._replace(dtype_code=200),
        good._replace(kind=FrameKind.REPLY),
        good._replace(body_bytes=2**32 - 1),
        good._replace(body_bytes=8),
    ]
    frames = [header.to_bytes() + random.bytes(min(header.body_bytes, 4096)) for header in lies]
    frames += [random.bytes(int(size)) for size in random.integers(64, 3000, size=30)]
    for frame in frames:
        connection = _connect(server[1])
        try:
            connection.send([frame], deadline_after(5))
            with pytest.raises(PeerClosed):
                connection.receive(deadline_after(5))
        except TransportError:
            continue  # cut off while sending
        finally:
            connection.close()
    wait_until(lambda: server[0].stats().connections == 0, "the end of all of them")
    assert server[0].stats().broken >= len(lies)
    connection = _connect(server[1])
    _send(connection, *_case())
    assert connection.receive(deadline_after(10))[0].kind is FrameKind.REPLY
    connection.close()


def test_random_ids_and_weights_are_answered_or_refused_never_fatal(
    server: tuple[DataPlaneServer, int],
) -> None:
    random = np.random.default_rng(5)
    connection = _connect(server[1])
    for _ in range(50):
        ids = torch.from_numpy(random.integers(-3, 9, size=(3, 2)).astype(np.int32))
        weights = torch.frombuffer(bytearray(random.bytes(24)), dtype=torch.float32).view(3, 2)
        _send(connection, torch.randn(3, HIDDEN), ids, weights)
        header, _ = connection.receive(deadline_after(10))
        is_held = all(i in (*EXPERTS, -1) for i in ids.ravel().tolist())
        assert header.kind is (FrameKind.REPLY if is_held else FrameKind.ERROR)
    connection.close()


def test_a_port_that_is_taken_is_one_clear_line(kernel: HeldKernel) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        server = DataPlaneServer(
            kernel, host="127.0.0.1", port=taken.getsockname()[1], token=None, incarnation="x"
        )
        with pytest.raises(ShardStartError, match=r"cannot listen on 127\.0\.0\.1"):
            server.start()
        server.close()


def test_neither_ray_nor_vllms_engine_is_imported() -> None:
    code = (
        "import sys, torch, cluster.data_plane, cluster.data_plane_main, routing.dispatcher\n"
        "from cluster.kernels.vllm_op import load_ops\n"
        "load_ops()\n"
        "print([m for m in sys.modules if m.split('.')[0] in ('ray', 'vllm')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "[]"


def test_a_shard_runs_alone_as_a_process_and_ends_on_sigterm(tmp_path: Path) -> None:
    from tests.checkpoints import deepseek_v3_config, write_checkpoint

    config = deepseek_v3_config(num_hidden_layers=2, n_routed_experts=4)
    write_checkpoint(tmp_path / "model", config)
    (tmp_path / "token").write_bytes(TOKEN)
    command = [sys.executable, "-m", "cluster.data_plane_main", "--experts", "1-2"]
    command += ["--checkpoint", str(tmp_path / "model"), "--token-file", str(tmp_path / "token")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        ready = json.loads(process.stdout.readline())
        assert ready["experts"] == [1, 2]
        endpoint = ShardEndpoint("x", ready["host"], ready["port"], ready["incarnation"])
        connection = TcpTransport().connect(endpoint, TOKEN, deadline_after(10))
        ids = torch.tensor([[1, 2], [2, -1]], dtype=torch.int32)
        _send(connection, torch.randn(2, 256).bfloat16(), ids, torch.ones(2, 2))
        rows = decode_reply(*connection.receive(deadline_after(30)))
        assert rows.shape == (2, 256)
        assert rows.any()
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        connection.close()


def test_a_shard_process_that_cannot_start_says_why_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cluster.data_plane_main", "--checkpoint", str(tmp_path / "x")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines() == [
        f"there is no checkpoint folder {tmp_path / 'x'}; set model.path to one"
    ]
