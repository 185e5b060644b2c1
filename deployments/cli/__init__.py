"""The `moonshard` command."""

from __future__ import annotations

from deployments.cli.main import main

__all__ = ["main"]
