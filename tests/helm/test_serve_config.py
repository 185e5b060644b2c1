"""Moonshard's settings arrive at Moonshard as they stand in the values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.config import MoonshardConfig
from tests.helm.documents import find
from tests.helm.helm_cli import REPO_ROOT, render3, render4
from tests.helm.matrix import Documents
from tests.helm.serve_config import arguments, moonshard_config, node_types, serve_tree
from tests.helm.switches import SWITCHES, merged

# Where the image has the repository.
IMAGE_FOLDER = Path("/opt/moonshard")

Render = Callable[[Mapping[str, Any]], Documents]


@pytest.fixture(params=["helm3", "helm4"])
def render(request: pytest.FixtureRequest) -> Render:
    if request.param == "helm3":
        return render3
    return lambda values: render4(values).documents


def config_of(render: Render, config: Mapping[str, Any]) -> Any:
    return arguments(render({"config": config}))


def test_without_settings_they_are_moonshards_own_but_for_what_kubernetes_needs() -> None:
    own = MoonshardConfig().model_dump()
    made = moonshard_config(render4().documents).model_dump()
    different = {
        f"{section}.{key}"
        for section, keys in own.items()
        for key, value in keys.items()
        if made[section][key] != value
    }
    assert different == {
        "gateway.admin_key",
        "gateway.require_keys",
        "http.resources",
        "ledger.state_dir",
        "model.path",
        "router.resources",
        "shards.resources",
    }


def test_every_setting_arrives(render: Render) -> None:
    config = MoonshardConfig().model_dump()
    config["gateway"]["require_keys"] = True
    config["model"] |= {"max_model_len": 262144, "path": "/models/a b", "tool_call_parser": None}
    config["engine"] |= {"kv_cache_memory_bytes": 42949672960, "extra_args": {"seed": 7}}
    config["shards"] |= {"memory_bytes": 2**40, "num_cpus": 0.125, "max_restarts": -1}
    config["shards"]["resources"] = {"moonshard_shard_cpu": 1}
    config["costs"]["node_usd_per_hour_by_resource"] = {"H100": 2.5, "moonshard_router": 1e-9}
    assert config_of(render, config) == config


def test_null_is_a_value(render: Render) -> None:
    """Helm itself takes it for `as if it were not there`, and Moonshard for `off`."""
    made = config_of(render, {"engine": {"kv_cache_memory_bytes": None}})
    assert made["engine"] == {"kv_cache_memory_bytes": None}


ODD = (
    *("yes", "no", "on", "010", "1e3", "null", "~", "1:30", "2026-01-01", "", " a ", "#a", "- a"),
    *("a: b", '"', "'", "a\nb", "a\n", "{{ .Values }}", "${NAME}", "$(NAME)", "é世", "%s", "\\n"),
)


def test_odd_texts_arrive(render: Render) -> None:
    texts = {f"key{number}": text for number, text in enumerate(ODD)}
    made = config_of(render, {"engine": {"extra_args": {"a": texts, "b": [*ODD]}}})
    assert made["engine"]["extra_args"] == {"a": texts, "b": [*ODD]}


def test_large_numbers_stay_whole(render: Render) -> None:
    text = find(render({"config": {"engine": {"kv_cache_memory_bytes": 2**45}}}), "RayService")[
        "spec"
    ]["serveConfigV2"]
    assert f"kv_cache_memory_bytes: {2**45}\n" in text


def test_weights_decide_the_path_unless_it_is_given() -> None:
    paths = {
        position: arguments(render4(values).documents)["model"].get("path")
        for position, values in SWITCHES["weights"].items()
    }
    assert paths == {
        "image": str(IMAGE_FOLDER / "models/kimi-nano"),
        "claim": "/models/k2",
        "new-claim": "/models",
        "host": "/models/kimi/k2",
    }
    values = merged(SWITCHES["weights"]["claim"], {"config": {"model": {"path": "/own"}}})
    assert arguments(render4(values).documents)["model"]["path"] == "/own"


def test_the_images_folder_is_the_images() -> None:
    assert str(IMAGE_FOLDER) in (REPO_ROOT / "Dockerfile").read_text()
    assert (REPO_ROOT / "models" / "kimi-nano" / "config.json").is_file()


def test_the_databases_url_comes_from_the_environment() -> None:
    documents = render4(SWITCHES["ledger"]["database"]).documents
    assert arguments(documents)["ledger"]["url"] == "${MOONSHARD_LEDGER_URL}"
    for group in find(documents, "RayService")["spec"]["rayClusterConfig"]["workerGroupSpecs"]:
        env = group["template"]["spec"]["containers"][0]["env"]
        found = [one["valueFrom"] for one in env if one["name"] == "MOONSHARD_LEDGER_URL"]
        reference = {"secretKeyRef": {"name": "given-ledger", "key": "dsn"}}
        assert found == ([reference] if group["groupName"] == "router" else [])


def test_an_own_price_table_is_mounted_as_it_is() -> None:
    documents = render4(SWITCHES["ledger"]["prices"]).documents
    path = arguments(documents)["ledger"]["prices"]
    config = find(documents, "ConfigMap", "prices")
    source = yaml.safe_load((REPO_ROOT / "configs" / "prices.yaml").read_text())
    assert yaml.safe_load(config["data"][path.rpartition("/")[2]]) == source


def test_the_application_is_that_of_the_shipped_config_file() -> None:
    shipped = yaml.safe_load((REPO_ROOT / "configs" / "nano.yaml").read_text())
    tree = serve_tree(render4().documents)
    for key in ("name", "route_prefix", "import_path"):
        assert tree["applications"][0][key] == shipped["applications"][0][key]
    assert tree["proxy_location"] == "EveryNode"


def test_the_autoscaler_sees_what_each_group_offers() -> None:
    types = node_types(render4(SWITCHES["shards"]["both"]).documents)
    assert types["headgroup"]["resources"]["CPU"] == 0
    assert types["router"]["resources"]["moonshard_router"] == 1
    assert types["shards-cpu"]["resources"]["moonshard_shard_cpu"] == 1
    assert types["shards-gpu"]["resources"]["moonshard_shard_gpu"] == 1
    assert types["shards-gpu"]["resources"]["GPU"] == 1
    assert types["router"]["min_workers"] == 1
    assert types["router"]["max_workers"] == 2


def test_by_default_no_second_cluster_is_ever_started() -> None:
    service = find(render4().documents, "RayService")
    assert service["spec"]["upgradeStrategy"] == {"type": "None"}


def test_the_proxies_port_is_one_everywhere() -> None:
    documents = render4({"serve": {"httpPort": 9000}}).documents
    assert serve_tree(documents)["http_options"]["port"] == 9000
    cluster = find(documents, "RayService")["spec"]["rayClusterConfig"]
    templates = [cluster["headGroupSpec"]["template"]]
    templates += [
        group["template"] for group in cluster["workerGroupSpecs"] if group["groupName"] == "router"
    ]
    for template in templates:
        ports = template["spec"]["containers"][0]["ports"]
        assert [p["containerPort"] for p in ports if p["name"] == "serve"] == [9000]
