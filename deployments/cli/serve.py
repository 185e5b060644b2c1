"""`moonshard serve`: check, start, show progress, serve, and take everything down again."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.janitor import Janitor
from cluster.processes import adopt_orphans, end_descendants
from deployments.cli.instances import registered
from deployments.cli.interrupts import Interrupted, catch_interrupts, ignore_interrupts
from deployments.cli.preflight import check_ledger, check_model, check_port, check_prices
from deployments.cli.serve_file import ServeFile, load_serve_file
from deployments.gateway.local_peers import check_exposure

if TYPE_CHECKING:
    from deployments.cli.application import Application

__all__ = ["serve_command"]

# Long enough for an answer that is nearly done; whoever cannot wait presses Ctrl-C again.
_DRAIN_S = 15.0
_PATIENCE_S = 5.0


def serve_command(path: Path, address: str | None) -> int:
    """Serve what the file says until a signal arrives; the exit status.

    Raises:
        MoonshardError: it cannot be started, or broke down; nothing is left running.
    """
    catch_interrupts()
    file = load_serve_file(path)
    _say(f"serving {file.config.model.id} ({file.config.model.checkpoint})")
    needs_keys = file.config.gateway.require_keys
    check_exposure(file.host, require_keys=needs_keys, where=f"{file.path}: args")
    check_port(file.host, file.port)
    check_model(file.config)
    check_prices(file.config)
    check_ledger(file.config)
    if not needs_keys:
        _say("no API keys are asked for: programs on this machine may do everything")
    with _ray(file, address) as cluster_address:
        application = _application(file, owns_node=address is None)
        with registered(file.port, file.url, cluster_address, file.name, owns_node=address is None):
            return _run(application, file)


def _application(file: ServeFile, *, owns_node: bool) -> Application:
    # Imports Ray, which has its environment now, and vLLM, whose chatter tells nobody anything.
    logging.disable(logging.WARNING)
    try:
        from deployments.cli.application import Application
    finally:
        logging.disable(logging.NOTSET)
    return Application(file, _say, owns_node=owns_node)


def _run(application: Application, file: ServeFile) -> int:
    started = time.monotonic()
    is_ready = False
    try:
        application.start()
        is_ready = True
        _say(f"ready in {time.monotonic() - started:.0f} s")
        _explain(file)
        application.watch()
    except KeyboardInterrupt as error:
        interrupt = Interrupted.of(error)
        _refuse_dead_node(interrupt)
        _say(f"{interrupt}: stopping (up to {_DRAIN_S:.0f} s; once more: at once)")
        _stop(application)
        return 0 if is_ready else 128 + interrupt.number
    except BaseException:
        _stop(application)
        raise
    return 0


def _refuse_dead_node(interrupt: Interrupted) -> None:
    from deployments.cli.node_watch import NODE_LOST, NodeLost

    if interrupt.number == NODE_LOST:
        # Nothing can be stopped in order any more; what is left of the node is killed next.
        raise NodeLost("Ray died (killed, or out of memory?); everything else is taken down")


def _stop(application: Application) -> None:
    try:
        application.stop(_DRAIN_S)
    except KeyboardInterrupt:
        _say("stopping at once")


@contextmanager
def _ray(file: ServeFile, address: str | None) -> Iterator[str]:
    """A cluster to serve on; when it is our own, nothing of it outlives the context."""
    from cluster import ray_node

    if address is not None:
        ray_node.connect(address)
        try:
            yield ray_node.current_address()
        finally:
            ray_node.disconnect()
        return
    adopt_orphans()
    with _everything_ends() as janitor_pid:
        cluster_address = ray_node.start_local_node(file.config.ray)
        catch_interrupts()
        _say(f"Ray is started ({cluster_address})")
        from deployments.cli.node_watch import NodeWatch  # imports Ray

        with NodeWatch({janitor_pid}):
            yield cluster_address


@contextmanager
def _everything_ends() -> Iterator[int]:
    """No process that is started in the context outlives it, or a kill -9 of this one.

    Yields:
        pid of the process that sees to the latter.
    """
    from cluster import ray_node

    try:
        with Janitor() as janitor:
            try:
                yield janitor.pid
            finally:
                ignore_interrupts()
                ray_node.disconnect()
    finally:
        killed = end_descendants(_PATIENCE_S)
        if killed:
            _say(f"had to kill {', '.join(killed)}")
        _say("stopped; nothing is left running")


def _explain(file: ServeFile) -> None:
    model, url = file.config.model.id, file.url
    port = f" --url {url}" if file.port != 8000 else ""
    needs_keys = file.config.gateway.require_keys
    key = "os.environ['MOONSHARD_API_KEY']" if needs_keys else '"none"'
    header = ' -H "Authorization: Bearer $MOONSHARD_API_KEY"' if needs_keys else ""
    make_key = (
        f"make a key once: export MOONSHARD_API_KEY=$(moonshard keys bootstrap "
        f"--config {file.path})\n"
        if needs_keys
        else ""
    )
    _say(
        f"""{make_key}ask it something:
  curl {url}/v1/chat/completions -H 'Content-Type: application/json'{header} \\
    -d '{{"model": "{model}", "messages": [{{"role": "user", "content": "What is 12 + 7?"}}]}}'
or in Python:
  from openai import OpenAI
  client = OpenAI(base_url="{url}/v1", api_key={key})
  messages = [{{"role": "user", "content": "What is 12 + 7?"}}]
  print(client.chat.completions.create(model="{model}", messages=messages).choices[0].message)
or in another terminal:
  moonshard chat{port}
  moonshard status
Ctrl-C ends it."""
    )


def _say(text: str) -> None:
    try:
        print(f"moonshard: {text}", flush=True)
    except BrokenPipeError:
        # Whoever read our progress is gone; that is no reason to leave processes behind.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
