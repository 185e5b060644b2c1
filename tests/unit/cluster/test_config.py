"""The config tree says what is wrong in one line, and what would be right."""

from __future__ import annotations

import pytest

from cluster.config import REPO_ROOT, MoonshardConfig, parse_config
from cluster.exceptions import ConfigError


def test_nothing_given_means_all_defaults() -> None:
    assert parse_config(None) == MoonshardConfig()
    assert parse_config({}) == MoonshardConfig()


def test_a_relative_checkpoint_starts_at_the_repository() -> None:
    config = parse_config({"model": {"path": "models/kimi-nano"}})
    assert config.model.checkpoint == REPO_ROOT / "models" / "kimi-nano"
    assert str(parse_config({"model": {"path": "/weights/k2"}}).model.checkpoint) == "/weights/k2"


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"shards": {"cuont": 2}}, "args.shards.cuont: unknown key; did you mean 'count'?"),
        ({"shard": {}}, "args.shard: unknown key; did you mean 'shards'?"),
        (
            {"router": {"autoscaling": {"max_replica": 3}}},
            "args.router.autoscaling.max_replica: unknown key; did you mean 'max_replicas'?",
        ),
        (
            {"zzz": 1},
            "args.zzz: unknown key; valid are: model, engine, shards, dispatch, router, http, "
            "gateway, ledger, costs, metrics, ray",
        ),
        ({"shards": {"count": 0}}, "args.shards.count: input should be greater than or equal to 1"),
        ({"shards": [1]}, "args.shards: input should be a valid dictionary"),
        ([], "args: expected a mapping of settings, got list"),
        ({"dispatch": {"recovery_timeout_s": 300}}, "must stay below 300"),
        (
            {"costs": {"node_usd_per_hour_by_resource": {"H100": -1}}},
            "args.costs.node_usd_per_hour_by_resource.H100: input should be greater than or equal",
        ),
        *(
            (
                {"costs": {"node_usd_per_hour": value, "node_usd_per_hour_by_resource": {"A": 1}}},
                "args.costs.node_usd_per_hour: input should be",
            )
            for value in (-1, float("inf"), float("nan"))
        ),
        (
            {"costs": {"node_usd_per_hour_by_resource": {"H100": float("nan")}}},
            "args.costs.node_usd_per_hour_by_resource.H100: input should be",
        ),
        ({"engine": {"tensor_parallel_size": 2}}, "tensor parallelism is not supported"),
        (
            {"router": {"autoscaling": {"min_replicas": 3, "max_replicas": 2}}},
            "max_replicas (2) is below min_replicas (3)",
        ),
        (
            {"router": {"graceful_shutdown_timeout_s": 5}},
            "graceful_shutdown_timeout_s (5) is below request_timeout_s",
        ),
    ],
)
def test_a_wrong_setting_is_named_in_one_line(tree: object, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(tree)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_further_mistakes_are_counted() -> None:
    with pytest.raises(ConfigError, match=r"\(and 1 more\)$"):
        parse_config({"shards": {"cuont": 2, "coutn": 3}})
