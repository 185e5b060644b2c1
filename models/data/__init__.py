"""Conversations the nano model learns from, and the held-out ones it is judged by."""

from __future__ import annotations

from models.data.mix import FAMILIES, Conversation, conversation, heldout
from models.data.sample import Message, Sample, Split, Tool, split_of

__all__ = [
    "FAMILIES",
    "Conversation",
    "Message",
    "Sample",
    "Split",
    "Tool",
    "conversation",
    "heldout",
    "split_of",
]
