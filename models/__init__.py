"""The shipped nano checkpoint, the data it learnt from and the code that trained it."""

from __future__ import annotations
