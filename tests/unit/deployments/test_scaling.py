"""What waits at the gateway asks for replicas like what runs."""

from __future__ import annotations

import pytest
from ray.serve._private.common import DeploymentID, ReplicaID
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

from deployments.scaling import POLICY, WAITING, desired_replicas


def context(
    num_replicas: int, running: float, waiting: dict[str, float] | None = None
) -> AutoscalingContext:
    deployment = DeploymentID("router", "app")
    replicas = [ReplicaID(str(i), deployment) for i in range(num_replicas)]
    reports = {
        WAITING: {ReplicaID(name, deployment): value for name, value in (waiting or {}).items()}
    }
    return AutoscalingContext(
        deployment_id=deployment,
        deployment_name="router",
        app_name="app",
        current_num_replicas=num_replicas,
        target_num_replicas=max(1, num_replicas),
        running_replicas=replicas,
        total_num_requests=running,
        total_queued_requests=0.0,
        aggregated_metrics=reports if waiting is not None else {},
        raw_metrics=None,
        capacity_adjusted_min_replicas=1,
        capacity_adjusted_max_replicas=8,
        policy_state={},
        last_scale_up_time=None,
        last_scale_down_time=None,
        current_time=0.0,
        config=AutoscalingConfig(target_ongoing_requests=16, min_replicas=1, max_replicas=8),
    )


@pytest.mark.parametrize(
    ("running", "waiting", "wanted"),
    [(16, None, 1), (64, {"0": 64.0}, 8), (16, {"0": 16.0, "1": 8.0}, 2), (0, {"0": 0.0}, 0)],
)
def test_running_and_waiting_requests_count_alike(
    running: float, waiting: dict[str, float] | None, wanted: float
) -> None:
    assert desired_replicas(context(2, running, waiting)) == (wanted, {})


def test_without_replicas_the_target_stands() -> None:
    assert desired_replicas(context(0, 100, {})) == (1, {})


def test_serve_finds_the_policy_by_its_name() -> None:
    policy = AutoscalingPolicy(policy_function=POLICY).get_policy()  # a copy: it travels pickled
    assert policy(context(2, 16, {"0": 16.0})) == (2, {})
