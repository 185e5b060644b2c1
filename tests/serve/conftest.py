"""The whole application, once per session."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from tests.serving import START_TIMEOUT_S, Server, start_server

RECOVERY_TIMEOUT_S = 30


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Who disturbs the shared server comes late, and who ends it last."""
    late = ("test_ledger_truth.py", "test_shard_loss.py", "test_scaling.py", "test_lifecycle.py")
    items.sort(key=lambda item: late.index(item.path.name) if item.path.name in late else -1)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The shipped model on two shards, one router replica that may become two."""
    changes = {
        "router": {
            "autoscaling": {
                "min_replicas": 1,
                "max_replicas": 2,
                "upscale_delay_s": 2,
                "downscale_delay_s": 5,
            }
        },
        "dispatch": {"recovery_timeout_s": RECOVERY_TIMEOUT_S},
    }
    server = start_server(tmp_path_factory.mktemp("serve"), changes)
    try:
        server.wait_until_ready(START_TIMEOUT_S)
        yield server
    finally:
        server.stop()


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return server.client()
