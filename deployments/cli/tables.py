"""Plain tables for terminals."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["show_table"]


def show_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns as wide as their widest cell; numbers to the right."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]
    numeric = [all(isinstance(row[at], int | float) for row in rows) for at in range(len(head))]
    lines = []
    for line in [list(head), *cells]:
        padded = [
            cell.rjust(width) if is_number and rows else cell.ljust(width)
            for cell, width, is_number in zip(line, widths, numeric, strict=True)
        ]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)
