"""Builds the Serve application: `import_path: deployments.app:build` of every config file."""

from __future__ import annotations

from typing import Any

from ray import serve
from ray.llm._internal.serve.core.configs.openai_api_models import to_model_metadata
from ray.llm._internal.serve.core.server.builder import build_llm_deployment
from ray.serve import Application
from ray.serve.llm.ingress import make_fastapi_ingress

from cluster.config import MoonshardConfig, parse_config
from deployments.gateway.model_context import context_bound
from deployments.http_app import ENDPOINTS, build_http_app
from deployments.ingress import Ingress, find_gateway
from deployments.llm_config import build_llm_config
from deployments.names import INGRESS_NAME, ROUTER_NAME
from deployments.router import Router

__all__ = ["INGRESS_NAME", "build", "build_native"]

_INGRESS_MAX_ONGOING = 10_000


def build(args: dict[str, Any]) -> Application:
    """The application: ingress, router, and through the router the controller and its shards.

    Args:
        args: the tree of `MoonshardConfig`.

    Raises:
        ConfigError: a setting is wrong; one line that says which and what to do.
    """
    return _build(parse_config(args), remote_experts=True)


def build_native(args: dict[str, Any]) -> Application:
    """The same application around vLLM with its own experts: what benchmarks compare with.

    Raises:
        ConfigError: see `build`.
    """
    return _build(parse_config(args), remote_experts=False)


def _build(config: MoonshardConfig, *, remote_experts: bool) -> Application:
    llm_config = build_llm_config(config)
    name = config.model.id
    router = build_llm_deployment(
        llm_config,
        deployment_cls=Router,
        bind_kwargs={
            "config_json": _without_database(config).model_dump_json(),
            "remote_experts": remote_experts,
        },
        override_serve_options={"name": ROUTER_NAME},
    )
    http_app = build_http_app(find_gateway)
    ingress_cls = make_fastapi_ingress(Ingress, endpoint_map=ENDPOINTS, app=http_app)
    ingress = serve.deployment(
        ingress_cls,
        name=INGRESS_NAME,
        num_replicas=config.http.num_replicas,
        max_ongoing_requests=_INGRESS_MAX_ONGOING,
        graceful_shutdown_timeout_s=config.router.graceful_shutdown_timeout_s,
        ray_actor_options={
            "num_cpus": config.http.num_cpus,
            "resources": config.http.resources,
        },
    )
    return ingress.bind(
        llm_deployments={name: router},
        model_cards={name: to_model_metadata(name, llm_config)},
        config_json=config.model_dump_json(),
        max_model_len=context_bound(config),
    )


def _without_database(config: MoonshardConfig) -> MoonshardConfig:
    """For all but the ingress: where the database is and how to get in is its business alone."""
    if config.ledger.url is None:
        return config
    kind = config.ledger.url.partition(":")[0]
    ledger = config.ledger.model_copy(update={"url": f"{kind}://"})
    return config.model_copy(update={"ledger": ledger})
