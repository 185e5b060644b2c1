"""The rules, by Prometheus's own checker and its unit tests for rules."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from monitoring.dashboards.expressions import expressions, metric_names
from monitoring.declaration import Kind
from monitoring.declarations import DECLARATIONS

REPO_ROOT = Path(__file__).resolve().parents[4]
RULES = REPO_ROOT / "monitoring" / "rules"
FILES = sorted(RULES.glob("*.yaml"))
UNIT_TESTS = sorted((RULES / "tests").glob("*.yaml"))
ANCHOR = "docs/dashboards.md#"

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="needs promtool (Debian: prometheus)"
)


def _rules(kind: str) -> list[dict[str, Any]]:
    return [
        rule
        for path in FILES
        for group in yaml.safe_load(path.read_text())["groups"]
        for rule in group["rules"]
        if kind in rule
    ]


ALERTS = {rule["alert"]: rule for rule in _rules("alert")}


def _alert_tests() -> list[tuple[str, bool]]:
    """Of every test of an alert: its name, and whether it must fire."""
    return [
        (case["alertname"], bool(case.get("exp_alerts")))
        for path in UNIT_TESTS
        for test in yaml.safe_load(path.read_text())["tests"]
        for case in test.get("alert_rule_test", ())
    ]


def _promtool(*arguments: str | Path) -> None:
    done = subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_the_rules_are_valid() -> None:
    _promtool("check", "rules", *FILES)


@needs_promtool
@pytest.mark.parametrize("path", UNIT_TESTS, ids=lambda path: path.stem)
def test_alerts_fire_when_they_should_and_only_then(path: Path) -> None:
    _promtool("test", "rules", path)


@pytest.mark.parametrize("alert", ALERTS)
def test_every_alert_is_tested_both_ways(alert: str) -> None:
    cases = _alert_tests()
    assert (alert, True) in cases
    assert (alert, False) in cases


def test_alert_names_are_unique() -> None:
    names = [rule["alert"] for rule in _rules("alert")]
    assert sorted(names) == sorted(set(names))


@pytest.mark.parametrize("alert", ALERTS)
def test_every_alert_says_how_bad_it_is_and_what_to_do(alert: str) -> None:
    rule = ALERTS[alert]
    assert rule["labels"]["severity"] in {"page", "ticket"}
    assert re.search(r"\$(value|labels)", rule["annotations"]["summary"])
    assert rule["annotations"]["description"]
    assert rule["annotations"]["runbook_url"] == ANCHOR + alert.lower()


@pytest.mark.parametrize("alert", ALERTS)
def test_every_runbook_is_written(alert: str) -> None:
    headings = re.findall(r"^#+ (.+)$", (REPO_ROOT / "docs/dashboards.md").read_text(), re.M)
    assert alert in headings


def test_the_docs_describe_no_alert_that_is_not_there() -> None:
    text = (REPO_ROOT / "docs/dashboards.md").read_text()
    assert set(re.findall(r"^#+ (Moonshard\w+)$", text, re.M)) == set(ALERTS)


def test_rules_read_only_declared_metrics_and_recorded_series() -> None:
    recorded = {rule["record"] for rule in _rules("record")}
    known = recorded | series_names()
    for rule in _rules("expr"):
        assert metric_names(rule["expr"]) <= known, rule


def test_every_recorded_series_is_read_by_an_alert_or_a_panel() -> None:
    read = {name for rule in _rules("expr") for name in metric_names(rule["expr"])}
    read |= {name for expression in expressions() for name in metric_names(expression.expr)}
    assert {rule["record"] for rule in _rules("record")} <= read


def test_the_bound_of_slow_first_tokens_is_a_bucket() -> None:
    (histogram,) = (d for d in DECLARATIONS if d.name == "moonshard_time_to_first_token_seconds")
    bounds = {
        float(bound)
        for rule in _rules("expr")
        for bound in re.findall(r'first_token_seconds_bucket\{le="([\d.]+)"\}', rule["expr"])
    }
    assert bounds
    assert bounds <= set(histogram.buckets)


def series_names() -> set[str]:
    """Names under which Prometheus has the declared metrics."""
    names: set[str] = set()
    for declaration in DECLARATIONS:
        if declaration.kind is Kind.HISTOGRAM:
            names |= {f"{declaration.name}_{part}" for part in ("bucket", "sum", "count")}
        else:
            names.add(declaration.name)
    return names
