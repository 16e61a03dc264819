"""Pictures among the arguments of a forward: what one of several equal rows has of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

NAMES = frozenset(
    {
        "pixel_values",
        "pixel_attention_mask",
        "image_grid_thw",
        "image_sizes",
        "pixel_values_videos",
        "video_grid_thw",
        "mm_encoder_outputs",  # encoded by generate already, from transformers 5.23 on
    }
)
"""Arguments that list the pictures of all rows, those of the first row first."""


def of_one_row(kwargs: Mapping[str, Any], num_rows: int) -> dict[str, Any] | None:
    """The arguments of :data:`NAMES` as one row alone would have them.

    Only the model knows which picture belongs to which row. But where all rows have equal tokens
    and the list of pictures is ``num_rows`` times the same, each of them has it once.

    Args:
        kwargs: of a forward whose ``num_rows`` rows have equal tokens.

    Returns:
        Replacements; None where that cannot be said.
    """
    cut = {k: _cut(v, num_rows) for k, v in kwargs.items() if k in NAMES and v is not None}
    return None if any(value is None for value in cut.values()) else cut


def _cut(value: Any, num_rows: int) -> Any:
    """The first ``num_rows``-th of ``value``, None where the others differ from it."""
    if isinstance(value, Mapping):
        parts = {key: _cut_encoded(part, num_rows) for key, part in value.items()}
        return None if any(part is None for part in parts.values()) else parts
    if not isinstance(value, (torch.Tensor, list, tuple)) or not len(value):
        return None
    size, rest = divmod(len(value), num_rows)
    if rest or (isinstance(value, torch.Tensor) and not _repeats(value, num_rows)):
        return None
    if not isinstance(value, torch.Tensor):
        pairs = ((item, value[i % size]) for i, item in enumerate(value))
        if not all(a is b or (_are_tensors(a, b) and torch.equal(a, b)) for a, b in pairs):
            return None
    return value[:size]


def _cut_encoded(output: Any, num_rows: int) -> Any:
    """As :func:`_cut`, of what an encoder gave: the parts that models read."""
    if output is None or getattr(output, "pooler_output", None) is None:
        return None
    parts = {"pooler_output": _cut(output.pooler_output, num_rows)}
    deep = getattr(output, "deepstack_features", None)
    if deep is not None:
        layers = [_cut(layer, num_rows) for layer in deep]
        parts["deepstack_features"] = None if any(x is None for x in layers) else layers
    return None if any(part is None for part in parts.values()) else type(output)(**parts)


def _repeats(value: torch.Tensor, num_rows: int) -> bool:
    rows = value.unflatten(0, (num_rows, -1))
    return bool((rows == rows[:1]).all())


def _are_tensors(*values: Any) -> bool:
    return all(isinstance(value, torch.Tensor) for value in values)
