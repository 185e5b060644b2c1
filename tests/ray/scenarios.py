"""What a driver on one of the hosts does.

    python -m tests.ray.scenarios ADDRESS CHECKPOINT NAME...

Plays the named scenarios in order and prints a line of JSON behind each: {name: what the tests
then judge}. A driver needs a raylet beside it, so the tests themselves, which run on the machine
and not on a host, cannot be one; and one driver plays many, since its start takes seconds.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import ray
import torch
from ray import serve
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.checkpoint import ExpertCheckpoint
from cluster.client import ensure_controller, get_controller, original_error, stop_controller
from cluster.config import MoonshardConfig, parse_config
from cluster.exceptions import ConfigError
from cluster.names import NAMESPACE
from cluster.ray_adapter import list_groups, list_nodes
from cluster.ray_node import connect
from routing.dispatcher import Dispatcher, DispatcherSettings
from routing.engine_state import EngineState
from routing.exceptions import HandshakeRefused
from routing.table import RoutingTable
from routing.table_feed import StaticTables
from routing.tcp import TcpTransport
from routing.transport import deadline_after
from tests.unit.shards import dense_reference, relative_error

WAIT_S = 90.0
NUM_SHARDS = 3
NUM_ROWS = 24
TOPK = 4


def config(path: str, **shards: Any) -> MoonshardConfig:
    wanted = {"count": NUM_SHARDS, "num_cpus": 0.25, "memory_bytes": 2**30, **shards}
    return parse_config({"model": {"id": "tiny", "path": path}, "shards": wanted})


class Cluster:
    """The controller as a router sees it."""

    def __init__(self, path: str, **shards: Any) -> None:
        self.config = config(path, **shards)
        self.controller = ensure_controller(self.config)
        self.version = 0

    def next_table(self) -> RoutingTable:
        """The next table; asks again while the controller is being restarted."""
        deadline = time.monotonic() + WAIT_S
        while time.monotonic() < deadline:
            try:
                data = ray.get(self.controller.wait_for_table.remote(self.version, 10), timeout=20)
            except ray.exceptions.RayActorError:
                time.sleep(0.2)
                continue
            if data is not None:
                table = RoutingTable.from_bytes(data)
                assert table.version > self.version, "versions must grow"
                self.version = table.version
                return table
        raise TimeoutError("no newer table came")

    def whole_table(self) -> RoutingTable:
        while not (table := self.next_table()).is_whole:
            pass
        return table

    def status(self) -> dict[str, Any]:
        return ray.get(self.controller.status.remote(), timeout=20)

    def shard(self, shard_id: str) -> dict[str, Any]:
        return next(s for s in self.status()["shards"] if s["shard_id"] == shard_id)

    def shard_at(self, table: RoutingTable, shard_id: str) -> dict[str, Any]:
        """The shard's status once it speaks of the same life as the table."""
        wanted = next(s.incarnation for s in table.shards if s.shard_id == shard_id)
        deadline = time.monotonic() + WAIT_S
        while (shard := self.shard(shard_id))["incarnation"] != wanted:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        return shard


def kill_process(pid: int, node_id: str) -> None:
    """kill -9 on whichever host it is."""
    strategy = NodeAffinitySchedulingStrategy(node_id, soft=False)
    task = ray.remote(_kill).options(num_cpus=0, scheduling_strategy=strategy)
    ray.get(task.remote(pid), timeout=60)


def _kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def dispatch_error(cluster: Cluster, table: RoutingTable, token: bytes | None = None) -> float:
    """Largest relative error over the layers of what the shards answer to random rows.

    token: asked of the controller when not given.
    """
    checkpoint = ExpertCheckpoint.open(cluster.config.model.checkpoint)
    weights = checkpoint.load_experts(range(checkpoint.num_experts))
    if token is None:
        token = ray.get(cluster.controller.data_plane_token.remote(), timeout=20)
    folder = tempfile.mkdtemp()
    state = EngineState.create(Path(folder) / "state")
    dispatcher = Dispatcher(DispatcherSettings(token=token), StaticTables(table), state)
    worst = 0.0
    try:
        for layer in checkpoint.layers:
            generator = torch.Generator().manual_seed(layer)
            x = torch.randn(NUM_ROWS, checkpoint.hidden, generator=generator).bfloat16()
            order = torch.rand(NUM_ROWS, checkpoint.num_experts, generator=generator)
            ids = order.argsort(dim=1)[:, :TOPK].int()
            scale = torch.rand(NUM_ROWS, TOPK, generator=generator)
            answer = dispatcher.combine(dispatcher.dispatch(layer, x, ids, scale))
            expected = dense_reference(weights, layer, x, ids, scale)
            worst = max(worst, relative_error(answer, expected))
        assert state.poison == 0
    finally:
        dispatcher.close()
        state.close()
        state.unlink()
    return worst


def leftovers() -> dict[str, Any]:
    """What is left of us in the cluster."""
    actors = ray.util.list_named_actors(all_namespaces=True)
    return {
        "actors": [a["name"] for a in actors if a["namespace"] == NAMESPACE],
        "groups": list(list_groups()),
    }


def spread(path: str) -> dict[str, Any]:
    """Shards on every host; rows answered right, each shard taking part."""
    cluster = Cluster(path)
    table = cluster.whole_table()
    error = dispatch_error(cluster, table)
    deadline = time.monotonic() + WAIT_S
    while True:  # load figures come with the next report
        status = cluster.status()
        rows = [s["load"].get("rows", 0) for s in status["shards"]]
        if all(rows) or time.monotonic() > deadline:
            break
        time.sleep(0.2)
    return {"error": error, "rows": rows, "status": status, "hosts": [s.host for s in table.shards]}


def lose_shard(path: str) -> dict[str, Any]:
    """kill -9 a shard: a table without it, then one with its next life."""
    cluster = Cluster(path)
    before = cluster.whole_table()
    victim = cluster.shard_at(before, "shard-1")
    started = time.monotonic()
    kill_process(victim["pid"], victim["node_id"])
    without = cluster.next_table()
    without_s = time.monotonic() - started
    after = cluster.whole_table()
    return {
        "versions": [before.version, without.version, after.version],
        "shards_without": [s.shard_id for s in without.shards],
        "missing": len(without.missing()),
        "incarnations": [{s.shard_id: s.incarnation for s in t.shards} for t in (before, after)],
        "restarts": cluster.shard_at(after, "shard-1")["num_restarts"],
        "error": dispatch_error(cluster, after),
        "seconds": [without_s, time.monotonic() - started],
    }


def lose_controller(path: str) -> dict[str, Any]:
    """kill -9 the controller: shards go on, it comes back with the same shards."""
    cluster = Cluster(path)
    before = cluster.whole_table()
    place = cluster.status()["controller"]
    token = ray.get(cluster.controller.data_plane_token.remote(), timeout=20)
    kill_process(place["pid"], place["node_id"])
    error_meanwhile = dispatch_error(cluster, before, token)
    after = cluster.whole_table()
    return {
        "versions": [before.version, after.version],
        "is_whole": after.is_whole,
        "same_shards": before.shards == after.shards,
        "new_pid": cluster.status()["controller"]["pid"] != place["pid"],
        "error_meanwhile": error_meanwhile,
    }


def lose_host(path: str) -> dict[str, Any]:
    """Waits until somebody kills the third host; its shard moves to another one."""
    cluster = Cluster(path)
    before = cluster.whole_table()
    third = sorted({s.host for s in before.shards})[-1]
    print(json.dumps({"host": third}), flush=True)
    # Where the controller died too, the first table of its next life may be whole already.
    after = cluster.whole_table()
    return {
        "lost": [s.shard_id for s in before.shards if s.host == third],
        "hosts_after": [s.host for s in after.shards],
        "error": dispatch_error(cluster, after),
    }


def too_small(path: str) -> dict[str, Any]:
    """A shard that no host can hold."""
    stop_controller()
    cluster = Cluster(path, num_cpus=64, start_timeout_s=3)
    try:
        cluster.whole_table()
    except ray.exceptions.RayTaskError as error:
        reason = str(original_error(error))
    else:
        reason = ""
    state = cluster.status()["state"]
    left = leftovers()
    stop_controller()
    return {"reason": reason, "state": state, "left": left}


def other_config(path: str) -> dict[str, Any]:
    """Another number of shards while some run."""
    Cluster(path).whole_table()
    try:
        ensure_controller(config(path, count=2))
    except ConfigError as error:
        return {"type": type(error).__name__, "reason": str(error)}
    return {"type": "", "reason": ""}


def strangers(path: str) -> dict[str, Any]:
    """The data plane without the token, and with a wrong one."""
    cluster = Cluster(path)
    endpoint = cluster.whole_table().shards[0]
    refused = []
    for token in (None, b"x" * 32):
        try:
            TcpTransport().connect(endpoint, token, deadline_after(5)).close()
        except HandshakeRefused as error:
            refused.append(str(error))
    return {"refused": refused}


def strict_spread(path: str) -> dict[str, Any]:
    """As many shards as there are hosts, which may not share; they have room for all on one."""
    stop_controller()
    strict = {"placement_strategy": "STRICT_SPREAD", "start_timeout_s": 40}
    Cluster(path, **strict).whole_table()
    groups = list_groups().values()
    nodes = {group.node_id for group in groups}
    stop_controller()
    return {"nodes": len(nodes), "shards": len(groups)}


def stop(path: str) -> dict[str, Any]:
    """Everything goes."""
    cluster = Cluster(path)
    cluster.whole_table()
    stop_controller()
    deadline = time.monotonic() + WAIT_S
    while (left := leftovers())["actors"] and time.monotonic() < deadline:
        time.sleep(0.1)
    while not (is_free := _is_free()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return {"left": left, "controller": get_controller() is not None, "free": is_free}


def _is_free() -> bool:
    return all(n.available.get("CPU") == n.total.get("CPU") for n in list_nodes())


class Replica:
    """A Serve replica that wants shards, in a placement group as Serve LLM's replicas are."""

    def __init__(self, path: str) -> None:
        ensure_controller(config(path))

    def pid(self) -> int:
        return os.getpid()


def delete_application(path: str) -> dict[str, Any]:
    """Shards outlive the replica that asked for them, and go with its application."""
    stop_controller()
    serve.start(proxy_location="Disabled")
    options = {"placement_group_bundles": [{"CPU": 0.1}], "ray_actor_options": {"num_cpus": 0.1}}
    application = serve.deployment(**options)(Replica).bind(path)
    handle = serve.run(application, name="asks-for-shards", route_prefix=None)
    cluster = Cluster(path)
    before = cluster.whole_table()
    controller = cluster.status()["controller"]
    replica = handle.pid.remote().result(timeout_s=30)
    shard_nodes = {shard["node_id"] for shard in cluster.status()["shards"]}
    for node_id in shard_nodes:
        kill_process_if_replica(replica, node_id)
    deadline = time.monotonic() + WAIT_S
    while not _answers_anew(handle, replica):
        assert time.monotonic() < deadline, "no new replica answers"
        time.sleep(0.1)
    is_same = cluster.status()["controller"] == controller
    after = RoutingTable.from_bytes(ray.get(cluster.controller.wait_for_table.remote(0, 5)))
    serve.delete("asks-for-shards")
    deadline = time.monotonic() + WAIT_S
    while (left := leftovers())["actors"] and time.monotonic() < deadline:
        time.sleep(0.1)
    serve.shutdown()
    return {"same_controller": is_same, "same_shards": before.shards == after.shards, "left": left}


def kill_process_if_replica(pid: int, node_id: str) -> None:
    """Pids are a host's own: the same number may be somebody else elsewhere."""
    strategy = NodeAffinitySchedulingStrategy(node_id, soft=False)
    task = ray.remote(_kill_replica).options(num_cpus=0, scheduling_strategy=strategy)
    ray.get(task.remote(pid), timeout=60)


def _kill_replica(pid: int) -> None:
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        if "ServeReplica" in " ".join(process.cmdline()):
            process.kill()


def _answers_anew(handle: Any, old_pid: int) -> bool:
    try:
        return bool(handle.pid.remote().result(timeout_s=5) != old_pid)
    except (ray.exceptions.RayError, TimeoutError):
        return False


SCENARIOS: dict[str, Callable[[str], dict[str, Any]]] = {
    function.__name__: function
    for function in (
        spread,
        lose_shard,
        lose_controller,
        lose_host,
        too_small,
        other_config,
        strangers,
        strict_spread,
        delete_application,
        stop,
    )
}

if __name__ == "__main__":
    address, checkpoint_path, *names = sys.argv[1:]
    connect(address)
    for name in names:
        try:
            told = SCENARIOS[name](checkpoint_path)
        except Exception:  # noqa: BLE001 - the test that wants it says so
            told = {"failed": traceback.format_exc()}
        print(json.dumps({name: told}), flush=True)
