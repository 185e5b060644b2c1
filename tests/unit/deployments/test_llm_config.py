"""What Moonshard's config becomes for Ray Serve LLM and vLLM."""

from __future__ import annotations

from typing import Any

import pytest
from ray.llm._internal.serve.core.protocol import RawRequestInfo
from starlette.requests import Request

from cluster.config import REPO_ROOT, parse_config
from cluster.exceptions import ConfigError
from deployments.app import build, build_native
from deployments.ingress import without_credentials
from deployments.llm_config import build_llm_config, device_of


def config_of(**sections: dict[str, Any]) -> Any:
    return build_llm_config(parse_config(sections))


def test_unfit_defaults_of_serve_are_set() -> None:
    options = config_of(
        router={
            "request_timeout_s": 100,
            "graceful_shutdown_timeout_s": 120,
            "max_ongoing_requests": 7,
            "autoscaling": {"max_replicas": 3, "target_ongoing_requests": 4, "upscale_delay_s": 3},
        }
    ).deployment_config
    scaling = options["autoscaling_config"]
    assert options["graceful_shutdown_timeout_s"] == 120
    assert options["max_ongoing_requests"] == 7
    assert (scaling["max_replicas"], scaling["target_ongoing_requests"]) == (3, 4)
    assert scaling["downscale_delay_s"] < 600
    assert scaling["metrics_interval_s"] < scaling["look_back_period_s"] <= 3


def test_the_engine_gets_its_settings() -> None:
    llm_config = config_of(model={"max_model_len": 512}, engine={"max_num_seqs": 9})
    arguments = llm_config.engine_kwargs
    assert (arguments["max_model_len"], arguments["max_num_seqs"]) == (512, 9)
    assert arguments["enable_auto_tool_choice"]
    assert arguments["reasoning_parser"] == "kimi_k2"
    assert llm_config.model_loading_config.model_source == str(REPO_ROOT / "models" / "kimi-nano")
    assert llm_config.runtime_env["env_vars"]["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"


def test_parsers_can_be_switched_off() -> None:
    arguments = config_of(model={"tool_call_parser": None, "reasoning_parser": None}).engine_kwargs
    assert not arguments["enable_auto_tool_choice"]
    assert "tool_call_parser" not in arguments
    assert arguments["reasoning_parser"] == ""


def test_further_engine_arguments_pass() -> None:
    assert config_of(engine={"extra_args": {"seed": 5}}).engine_kwargs["seed"] == 5


def test_the_device_follows_the_gpus() -> None:
    assert device_of(parse_config({})) == "cpu"
    assert device_of(parse_config({"router": {"num_gpus": 1}})) == "cuda"
    llm_config = config_of(router={"num_gpus": 1})
    assert llm_config.placement_group_config["bundles"][0]["GPU"] == 1
    assert "OMP_NUM_THREADS" not in llm_config.runtime_env["env_vars"]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"engine": {"extra_args": {"no_such": 1}}}, "extra_args.*no_such"),
        ({"engine": {"extra_args": {"dtype": "float32"}}}, "extra_args.dtype: another setting"),
        ({"engine": {"device": "cuda"}}, "num_gpus: an engine on cuda needs a GPU"),
        ({"rooter": {}}, "rooter: unknown key; did you mean 'router'"),
    ],
)
@pytest.mark.parametrize("builder", [build, build_native])
def test_a_bad_config_is_one_clear_line(
    builder: Any, sections: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        builder(sections)
    assert "\n" not in str(caught.value)


def test_the_router_never_sees_credentials() -> None:
    headers = {
        "authorization": "Bearer secret",
        "x-api-key": "secret",
        "cookie": "secret",
        "x-data-parallel-rank": "1",
        "x-request-id": "id-1",
    }
    scope = {
        "type": "http",
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
    }
    passed = RawRequestInfo.from_starlette_request(without_credentials(Request(scope)))
    assert passed.headers == {"x-request-id": "id-1"}
