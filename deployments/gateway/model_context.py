"""How long a model's context can be, without an engine."""

from __future__ import annotations

import json

from cluster.config import MoonshardConfig
from cluster.exceptions import ConfigError

__all__ = ["context_bound"]


def context_bound(config: MoonshardConfig) -> int:
    """Upper bound, in tokens, of the context that the engines have.

    Raises:
        ConfigError: neither the config nor the checkpoint says.
    """
    if config.model.max_model_len is not None:
        return config.model.max_model_len
    path = config.model.checkpoint / "config.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        data = data.get("text_config") or data
        length = int(data["max_position_embeddings"])
        scaling = data.get("rope_scaling") or {}
        original = int(scaling.get("original_max_position_embeddings") or length)
        return max(length, int(original * float(scaling.get("factor") or 1)))
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        raise ConfigError(
            f"args.model.max_model_len: {path} does not say how long the context is; set it"
        ) from None
