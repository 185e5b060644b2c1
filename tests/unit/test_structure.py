"""The rules of the house that a reviewer would otherwise check by hand."""

from __future__ import annotations

import ast
import importlib
import pkgutil
from pathlib import Path

import pytest

REPO_ROOT = Path(__file__).resolve().parents[2]
FLOORS = ("monitoring", "routing", "cluster", "deployments")
SOURCES = sorted(
    path
    for folder in (*FLOORS, "models", "bench", "tests")
    for path in (REPO_ROOT / folder).rglob("*.py")
)
MAX_LINES = 400


def _imported_packages(path: Path) -> set[str]:
    packages = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            packages |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            packages.add(node.module.split(".")[0])
    return packages


@pytest.mark.parametrize("floor", FLOORS)
def test_imports_point_down_the_four_floors(floor: str) -> None:
    above = set(FLOORS[FLOORS.index(floor) + 1 :]) | {"models", "bench", "tests"}
    offenders = {
        str(path.relative_to(REPO_ROOT)): sorted(wrong)
        for path in (REPO_ROOT / floor).rglob("*.py")
        if (wrong := _imported_packages(path) & above)
    }
    assert not offenders


def test_no_file_is_longer_than_a_reader_can_hold() -> None:
    long = {
        str(path.relative_to(REPO_ROOT)): lines
        for path in SOURCES
        if (lines := len(path.read_text().splitlines())) > MAX_LINES
    }
    assert not long


def test_no_module_is_called_utils() -> None:
    assert not [path for path in SOURCES if path.stem in {"utils", "util", "helpers", "common"}]


@pytest.mark.parametrize("floor", FLOORS)
def test_every_package_declares_what_it_offers(floor: str) -> None:
    package = importlib.import_module(floor)
    names = [floor] + [
        info.name
        for info in pkgutil.walk_packages(package.__path__, prefix=f"{floor}.")
        if info.ispkg
    ]
    for name in names:
        module = importlib.import_module(name)
        assert isinstance(getattr(module, "__all__", None), list), f"{name} declares no __all__"
        missing = [entry for entry in module.__all__ if not hasattr(module, entry)]
        assert not missing, f"{name}.__all__ names what it lacks: {missing}"
