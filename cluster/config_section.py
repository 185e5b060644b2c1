"""What the sections of the configuration share."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict

__all__ = ["KIB", "MIB", "REPO_ROOT", "Section"]

REPO_ROOT = Path(__file__).resolve().parent.parent
"""The folder that holds the packages; relative `model.path`s start here on every node."""

KIB, MIB = 2**10, 2**20


class Section(BaseModel):
    """Strict and immutable; the text under a field documents it."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
