"""Writes what is generated in the chart.

python -m helm.build            write what is stale
python -m helm.build --check    write nothing; fail when something is
"""

from __future__ import annotations

import argparse
import sys

from helm.generator import REPO_ROOT, ValuesError, outputs, stale, write

__all__ = ["main"]


def main() -> int:
    """The command; its exit status."""
    parser = argparse.ArgumentParser(prog="python -m helm.build")
    parser.add_argument("--check", action="store_true", help="write nothing; fail when stale")
    is_check = parser.parse_args().check
    try:
        wanted = outputs()
    except ValuesError as error:
        print(f"helm.build: {error}", file=sys.stderr)
        return 2
    found = stale(wanted)
    for path in found:
        print(f"{path.relative_to(REPO_ROOT)}: {'stale' if is_check else 'written'}")
    if is_check and found:
        print("run `python -m helm.build`", file=sys.stderr)
        return 1
    write(wanted, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
