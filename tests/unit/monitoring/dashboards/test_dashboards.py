"""The committed dashboards: fresh, valid, complete, and asking for metrics that exist."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from monitoring.dashboards.board import Board
from monitoring.dashboards.boards import BOARDS
from monitoring.dashboards.build import JSON_FOLDER, main, render
from monitoring.dashboards.expressions import expressions, metric_names
from monitoring.declaration import Kind
from monitoring.declarations import DECLARATIONS

REPO_ROOT = Path(__file__).resolve().parents[4]
SCHEMA = REPO_ROOT.parent / "shared" / "grafana" / "dashboard.jsonschema.json"
SITE_PACKAGES = Path(sysconfig.get_paths()["purelib"])
VLLM_METRICS = SITE_PACKAGES / "vllm" / "v1" / "metrics"
RAY_METRICS = (
    SITE_PACKAGES / "ray" / "serve",
    SITE_PACKAGES / "ray" / "dashboard" / "modules" / "reporter",
)
HISTOGRAM_PARTS = ("_bucket", "_sum", "_count")

boards = pytest.mark.parametrize("board", BOARDS, ids=lambda board: board.uid)


def _panels(board: Board) -> list[dict[str, Any]]:
    panels: list[dict[str, Any]] = json.loads(render(board))["panels"]
    return panels


def _recorded() -> set[str]:
    rules = yaml.safe_load((REPO_ROOT / "monitoring/rules/recording.yaml").read_text())
    return {rule["record"] for group in rules["groups"] for rule in group["rules"]}


def _declared() -> set[str]:
    names: set[str] = set()
    for declaration in DECLARATIONS:
        if declaration.kind is Kind.HISTOGRAM:
            names |= {declaration.name + part for part in HISTOGRAM_PARTS}
        else:
            names.add(declaration.name)
    return names


def _asked_for(prefix: str) -> set[str]:
    return {
        name
        for expression in expressions()
        for name in metric_names(expression.expr)
        if name.startswith(prefix)
    }


def test_what_is_committed_is_what_the_code_builds(tmp_path: Path) -> None:
    main(tmp_path)
    built = {path.name: path.read_text() for path in tmp_path.iterdir()}
    committed = {path.name: path.read_text() for path in JSON_FOLDER.iterdir()}
    assert committed == built, "run python -m monitoring.dashboards.build"


@boards
def test_grafanas_schema_accepts_it(board: Board) -> None:
    if not SCHEMA.is_file():
        pytest.skip(f"needs Grafana's published schema at {SCHEMA}")
    validator = jsonschema.Draft7Validator(json.loads(SCHEMA.read_text()))
    assert [error.message for error in validator.iter_errors(json.loads(render(board)))] == []


def test_uids_and_titles_are_unique() -> None:
    assert len({board.uid for board in BOARDS}) == len(BOARDS)
    assert len({board.title for board in BOARDS}) == len(BOARDS)
    assert all(8 <= len(board.uid) <= 40 for board in BOARDS)


@boards
def test_panels_are_numbered_and_do_not_overlap(board: Board) -> None:
    panels = _panels(board)
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [cell for panel in panels for cell in _cells(panel["gridPos"])]
    assert len(set(cells)) == len(cells)
    assert all(x < 24 for x, _ in cells)


def _cells(position: dict[str, int]) -> Iterator[tuple[int, int]]:
    for x in range(position["w"]):
        for y in range(position["h"]):
            yield position["x"] + x, position["y"] + y


@boards
def test_every_panel_explains_itself(board: Board) -> None:
    titles = [panel.title for panel in board.panels]
    for panel in _panels(board):
        if panel["type"] == "row":
            continue
        assert panel["title"]
        assert panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["datasource"]["uid"] == "${datasource}"
        assert panel["targets"], panel["title"]
        if panel["type"] == "timeseries":
            assert all(target["legendFormat"] for target in panel["targets"]), panel["title"]
    assert len(titles) >= 10


@boards
def test_every_variable_is_used_and_every_used_one_is_there(board: Board) -> None:
    used = {
        name
        for panel in board.panels
        for query in panel.queries
        for name in re.findall(r"\$(?!__)(\w+)", query.expr)
    }
    assert used == {variable.name for variable in board.variables}


def test_an_unknown_variable_in_an_expression_would_be_seen() -> None:
    assert len(expressions()) == sum(len(p.queries) for b in BOARDS for p in b.panels)
    assert not any("$" in expression.expr for expression in expressions())


def test_every_expression_is_valid_promql(tmp_path: Path) -> None:
    if shutil.which("promtool") is None:
        pytest.skip("needs promtool (Debian: prometheus)")
    rules = [
        {"record": f"expression:{number}", "expr": expression.expr}
        for number, expression in enumerate(expressions())
    ]
    path = tmp_path / "rules.yaml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "expressions", "rules": rules}]}))
    done = subprocess.run(["promtool", "check", "rules", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_moonshards_metrics_in_panels_are_declared_or_recorded() -> None:
    assert _asked_for("moonshard_") <= _declared()
    assert _asked_for("moonshard:") | _asked_for("llm_") <= _recorded()


def test_every_declared_metric_is_on_a_dashboard() -> None:
    shown = _asked_for("moonshard_")
    missing = [
        declaration.name
        for declaration in DECLARATIONS
        if not {declaration.name, f"{declaration.name}_bucket"} & shown
    ]
    assert missing == []


def test_vllms_metrics_in_panels_exist_in_the_installed_vllm() -> None:
    source = "".join(path.read_text() for path in VLLM_METRICS.rglob("*.py"))
    for name in _asked_for("ray_vllm_"):
        spellings = _spellings(name.removeprefix("ray_vllm_"))
        assert any(f'"vllm:{own}"' in source for own in spellings), name


def test_rays_metrics_in_panels_exist_in_the_installed_ray() -> None:
    source = "".join(path.read_text() for folder in RAY_METRICS for path in folder.rglob("*.py"))
    for name in _asked_for("ray_") - _asked_for("ray_vllm_"):
        spellings = _spellings(name.removeprefix("ray_"))
        assert any(f'"{own}"' in source for own in spellings), name


def _spellings(name: str) -> set[str]:
    """As it is, and without what Prometheus's format adds to a counter or a histogram."""
    return {name} | {name.removesuffix(suffix) for suffix in ("_total", *HISTOGRAM_PARTS)}


def test_no_panel_has_one_series_per_expert() -> None:
    """60 x 384 experts would drown a Prometheus: only the hottest have series."""
    by_expert = [e.expr for e in expressions() if "expert)" in e.expr]
    assert by_expert
    assert all("hottest" in expr for expr in by_expert)
