"""The generated files: what they must hold, and whether they do."""

from __future__ import annotations

from pathlib import Path

from helm.generator.readme import readme_text
from helm.generator.schema import schema_text
from helm.generator.values import read_values

__all__ = ["CHART", "REPO_ROOT", "outputs", "stale", "write"]

REPO_ROOT = Path(__file__).resolve().parents[2]
CHART = REPO_ROOT / "helm" / "moonshard"
"""The chart's folder."""

# Folder in `monitoring/` -> folder in the chart. Tests of rules stay where they are.
_COPIES = {
    "dashboards/json/*.json": "files/dashboards",
    "rules/*.yaml": "files/rules",
}


def outputs(root: Path = REPO_ROOT) -> dict[Path, str | None]:
    """Every generated file with its text; None for one that must go.

    Raises:
        ValuesError: values.yaml or README.md cannot be used.
    """
    chart = root / "helm" / "moonshard"
    values = read_values(chart / "values.yaml")
    readme = chart / "README.md"
    wanted: dict[Path, str | None] = {
        chart / "values.schema.json": schema_text(values),
        readme: readme_text(readme.read_text(encoding="utf-8"), values),
    }
    for pattern, folder in _COPIES.items():
        left_over = set((chart / folder).glob("*"))
        for source in sorted((root / "monitoring").glob(pattern)):
            target = chart / folder / source.name
            wanted[target] = source.read_text(encoding="utf-8")
            left_over.discard(target)
        wanted |= dict.fromkeys(sorted(left_over))
    return wanted


def stale(wanted: dict[Path, str | None]) -> list[Path]:
    """Those that do not hold what they must."""
    return [path for path, text in wanted.items() if _present(path) != text]


def write(wanted: dict[Path, str | None], paths: list[Path]) -> None:
    """Make some of them what they must be."""
    for path in paths:
        text = wanted[path]
        if text is None:
            path.unlink()
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def _present(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None
