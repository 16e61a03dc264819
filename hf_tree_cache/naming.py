"""What transformers calls a cache among the arguments of a model, and where these have a batch."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from transformers import GenerationMixin

NAMES = "cache", "past_key_values"
"""From 5.24 on, and before; models take the older name still, with a warning."""

CACHE = next(
    name
    for name in NAMES
    if name in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
)
"""In the transformers that is installed."""


def cache_name(kwargs: Mapping[str, Any]) -> str:
    """Under which name ``kwargs`` hold a cache; that of transformers if they hold none."""
    return next((name for name in NAMES if kwargs.get(name) is not None), CACHE)


def batch_dim(name: str, num_dims: int) -> int:
    """Of an argument called ``name``; positions of several kinds are ``[3, B, T]``."""
    return 1 if name == "position_ids" and num_dims == 3 else 0
