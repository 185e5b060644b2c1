"""What is declared is consistent, documented, and bounded."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest
from prometheus_client.parser import text_string_to_metric_families

from monitoring.aggregator import Aggregator
from monitoring.declaration import ROLES
from monitoring.declarations import DECLARATIONS, Dimensions, Domain, Kind, declared_by, max_series
from monitoring.messages import ExpertRows, Push, SourceId
from monitoring.metrics_doc import DOCUMENT, LARGE, metrics_document
from tests.unit.monitoring.pushes import rows_of

NUM_EXPERTS = 384


def test_no_two_metrics_have_the_same_name() -> None:
    assert len({d.name for d in DECLARATIONS}) == len(DECLARATIONS)
    assert len({d.attribute for d in DECLARATIONS}) == len(DECLARATIONS)


@pytest.mark.parametrize("declaration", DECLARATIONS, ids=lambda d: d.name)
def test_names_follow_prometheus(declaration) -> None:  # type: ignore[no-untyped-def]
    assert re.fullmatch(r"moonshard_[a-z0-9]+(_[a-z0-9]+)*", declaration.name)
    assert declaration.name.endswith("_total") == (declaration.kind is Kind.COUNTER)
    assert "\n" not in declaration.help
    assert declaration.help.endswith(".")
    assert list(declaration.buckets) == sorted(set(declaration.buckets))
    assert bool(declaration.buckets) == (declaration.kind is Kind.HISTOGRAM)


def test_every_role_counts_something() -> None:
    assert sum(len(declared_by(role)) for role in ROLES) == len(DECLARATIONS)
    assert all(declared_by(role) for role in ROLES)


def test_the_document_is_fresh() -> None:
    assert DOCUMENT.read_text() == metrics_document(), "run python -m monitoring.metrics_doc"


def _values(domain: tuple[str, ...] | Domain, size: Dimensions) -> list[str]:
    if not isinstance(domain, Domain):
        return list(domain)
    counts = {
        Domain.MODEL: size.models,
        Domain.TEAM: size.teams,
        Domain.SHARD: size.shards,
        Domain.REPLICA: size.routers,
    }
    return [f"{domain.name.lower()}-{i}" for i in range(counts.get(domain, 1))]


def _everything(role: str, size: Dimensions) -> Push:
    """All series that processes of a role could ever have, in one message."""
    counts, gauges = {}, {}
    for declaration in declared_by(role):  # type: ignore[arg-type]
        keys: list[tuple[str, ...]] = [()]
        for domain in declaration.labels.values():
            keys = [(*key, value) for key in keys for value in _values(domain, size)]
        if Domain.BUDGET_NAME in declaration.labels.values():
            keys = [("team", f"team-{i}") for i in range(size.teams)]
            keys += [("key", f"key-{i}") for i in range(size.keys)]
        if declaration.kind is Kind.GAUGE:
            gauges[declaration.attribute] = dict.fromkeys(keys, 1.0)
        else:
            counts[declaration.attribute] = dict.fromkeys(keys, (1.0,) * declaration.num_values)
    source = SourceId(role, role, "epoch")  # type: ignore[arg-type]
    return Push(source, 1, 1.0, True, False, counts, gauges, None)


def _series(aggregator: Aggregator) -> dict[str, int]:
    families = text_string_to_metric_families(aggregator.snapshot())
    return {family.name: len(family.samples) for family in families}


@pytest.mark.parametrize("excess", [1, 2], ids=["as large as stated", "twice as many names"])
def test_the_number_of_series_is_bounded(excess: int) -> None:
    size = Dimensions(
        models=LARGE.models,
        teams=LARGE.teams * excess,
        keys=LARGE.keys * excess,
        shards=LARGE.shards,
        routers=LARGE.routers,
        layers=LARGE.layers,
        top_experts=LARGE.top_experts,
    )
    aggregator = Aggregator(top_experts=size.top_experts)
    for role in ("gateway", "router", "controller"):
        aggregator.apply(_everything(role, size))
    layers = tuple(range(1, size.layers + 1))
    held = NUM_EXPERTS // size.shards
    for index in range(size.shards):
        experts = tuple(range(index * held, (index + 1) * held))
        rows = ExpertRows(layers, experts, NUM_EXPERTS, rows_of(layers, experts))
        everything = _everything("shard", Dimensions(shards=1))
        aggregator.apply(
            Push(
                SourceId("shard", f"shard-{index}", "epoch"),
                *(1, 1.0, True, False),
                {
                    name: {(f"shard-{index}", *key[1:]): value for key, value in series.items()}
                    for name, series in everything.counts.items()
                },
                {
                    name: {(f"shard-{index}", *key[1:]): value for key, value in series.items()}
                    for name, series in everything.gauges.items()
                },
                rows,
            )
        )
    found = _series(aggregator)
    for declaration in DECLARATIONS:
        name = declaration.name.removesuffix("_total")
        assert 0 < found[name] <= declaration.max_series(LARGE), declaration.name
    assert found["moonshard_layer_balancedness"] == 2 * size.layers
    assert found["moonshard_hottest_expert_share"] == size.top_experts
    assert sum(found.values()) <= max_series(LARGE)
    # The bound is no wild guess: all but `other` is there.
    assert sum(found.values()) > 0.7 * max_series(LARGE)


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_promtool_finds_nothing_wrong() -> None:
    aggregator = Aggregator()
    size = Dimensions()
    for role in ("gateway", "router", "shard", "controller"):
        aggregator.apply(_everything(role, size))
    done = subprocess.run(
        ["promtool", "check", "metrics"],
        input=aggregator.snapshot(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
