from __future__ import annotations

from pathlib import Path

import pytest
from ray.serve.schema import HTTPOptionsSchema, ServeApplicationSchema, ServeDeploySchema

from cluster.exceptions import ConfigError
from deployments.cli.serve_file import APPLICATION_KEYS, HTTP_KEYS, TOP_KEYS, load_serve_file

APPLICATION = "applications:\n- name: m\n  import_path: deployments.app:build\n"


def refusal(folder: Path, text: str) -> str:
    path = folder / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_serve_file(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def test_our_keys_are_those_of_ray_serve() -> None:
    assert set(TOP_KEYS) == set(ServeDeploySchema.model_fields)
    assert set(APPLICATION_KEYS) == set(ServeApplicationSchema.model_fields)
    assert set(HTTP_KEYS) == set(HTTPOptionsSchema.model_fields)


def test_the_shipped_config_is_valid() -> None:
    file = load_serve_file(Path(__file__).parents[3] / "configs" / "nano.yaml")
    assert file.url == "http://127.0.0.1:8000"
    assert file.config.model.id == "kimi-nano"
    assert file.remote_experts


def test_an_unnamed_host_is_loopback(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(APPLICATION)
    file = load_serve_file(path)
    assert (file.host, file.port) == ("127.0.0.1", 8000)


def test_all_interfaces_are_reached_through_loopback(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("http_options: {host: 0.0.0.0, port: 81}\n" + APPLICATION)
    assert load_serve_file(path).url == "http://127.0.0.1:81"


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load_serve_file(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: [", "not valid YAML"),
        ("- 1", "expected a mapping"),
        ("http_option: {}\n" + APPLICATION, "did you mean 'http_options'?"),
        ("http_options: {prot: 1}\n" + APPLICATION, "did you mean 'port'?"),
        ("http_options: {port: 99999}\n" + APPLICATION, "1..65535"),
        ("http_options: {port: true}\n" + APPLICATION, "1..65535"),
        ("applications: []", "one entry"),
        ("applications: [3]", "expected a mapping"),
        ("applications: [{import_path: os:system}]", "import_path must be one of"),
        ("applications: [{importpath: x}]", "did you mean 'import_path'?"),
        (APPLICATION + "  runtime_env: {}\n", "serve deploy"),
        (APPLICATION + "  args: {shards: {cuont: 2}}\n", "args.shards.cuont: unknown key"),
        (APPLICATION + "  args: {shards: {count: 0}}\n", "args.shards.count"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in refusal(tmp_path, text)
