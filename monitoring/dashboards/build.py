"""Writes the dashboards: `python -m monitoring.dashboards.build`."""

from __future__ import annotations

from pathlib import Path

from grafana_foundation_sdk.cog.encoder import JSONEncoder

from monitoring.dashboards.board import Board
from monitoring.dashboards.boards import BOARDS
from monitoring.dashboards.panels import build_dashboard

__all__ = ["JSON_FOLDER", "main", "render"]

JSON_FOLDER = Path(__file__).parent / "json"


def render(board: Board) -> str:
    """The dashboard as Grafana imports it."""
    encoder = JSONEncoder(indent=2, sort_keys=True, ensure_ascii=False)
    return encoder.encode(build_dashboard(board)) + "\n"


def main(folder: Path = JSON_FOLDER) -> None:
    """Write every dashboard to `<uid>.json`, and remove files of boards that are no more."""
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("*.json"):
        stale.unlink()
    for board in BOARDS:
        (folder / f"{board.uid}.json").write_text(render(board), encoding="utf-8")


if __name__ == "__main__":
    main()
