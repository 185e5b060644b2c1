"""The plugin's settings: strict, and no reason to recompile."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from routing.vllm_plugin import PluginSettings, engine_overrides
from routing.vllm_plugin.exceptions import PluginSettingsError

BLOCK = {"feed": "127.0.0.1:4000", "state_path": "/dev/shm/state"}


def test_vllm_without_our_block_runs_natively() -> None:
    assert PluginSettings.of({}) is None
    assert PluginSettings.of({"gdn_prefill_backend": "triton"}) is None


def test_the_dict_form_of_the_command_line_is_read() -> None:
    parsed = PluginSettings.of(
        json.loads(json.dumps({"moonshard": BLOCK | {"request_timeout_s": 5}}))
    )
    assert parsed == PluginSettings(**BLOCK, request_timeout_s=5)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (BLOCK | {"fed": 1}, "moonshard.fed: unknown key; did you mean 'feed'?"),
        ({"feed": "127.0.0.1:4000"}, "moonshard: missing key 'state_path'"),
        (BLOCK | {"feed": "4000"}, "feed: expected host:port, got '4000'"),
        (BLOCK | {"feed": 4000}, "moonshard.feed: expected a string, got 4000"),
        (BLOCK | {"feed": "host:70000"}, "feed: expected host:port, got 'host:70000'"),
        (
            BLOCK | {"request_timeout_s": 0},
            "request_timeout_s: expected more than 0 seconds, got 0",
        ),
        (BLOCK | {"start_timeout_s": "5"}, "start_timeout_s: expected seconds, got '5'"),
        ("x", "moonshard: expected a mapping, got str"),
    ],
)
def test_a_wrong_block_is_refused_with_one_line(block: object, message: str) -> None:
    with pytest.raises(PluginSettingsError) as caught:
        PluginSettings.of({"moonshard": block})
    assert str(caught.value) == message


def test_what_changes_with_every_start_does_not_change_the_compile_key() -> None:
    first = PluginSettings(feed="127.0.0.1:4000", state_path="/a")
    second = PluginSettings(feed="127.0.0.1:4001", state_path="/b", token_file="/c")
    assert first.compute_hash() == second.compute_hash()


def test_the_token_is_read_from_a_file_that_only_its_owner_can_read(tmp_path: Path) -> None:
    file = tmp_path / "token"
    settings = PluginSettings(**BLOCK, token_file=str(file))
    with pytest.raises(PluginSettingsError, match="No such file"):
        settings.read_token()
    file.touch(mode=0o600)
    with pytest.raises(PluginSettingsError, match="it is empty"):
        settings.read_token()
    file.write_text("secret\n")
    assert settings.read_token() == b"secret"
    assert "secret" not in repr(settings)
    file.chmod(0o640)
    with pytest.raises(PluginSettingsError, match="chmod it to 600"):
        settings.read_token()


def test_no_token_file_means_no_token() -> None:
    assert PluginSettings(**BLOCK).read_token() is None


def test_overrides_name_our_loader_and_cut_cuda_graphs_around_the_experts() -> None:
    assert engine_overrides("cpu") == {
        "load_format": "moonshard",
        "tensor_parallel_size": 1,
        "worker_cls": "routing.vllm_plugin.cpu_worker.Worker",
    }
    with pytest.raises(ValueError, match="expected cpu or cuda"):
        engine_overrides("tpu")


@pytest.mark.vllm
def test_cuda_splits_graphs_at_attention_and_at_the_experts() -> None:
    compilation = engine_overrides("cuda")["compilation_config"]
    assert "vllm::unified_attention_with_output" in compilation["splitting_ops"]
    assert {"vllm::moe_forward", "vllm::moe_forward_shared"} <= set(compilation["splitting_ops"])
    assert compilation["cudagraph_mode"] == "PIECEWISE"
