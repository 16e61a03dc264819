"""Experts while ``generate`` decodes: their grouped products stay, where copies would be read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

EQUAL_IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
"""Transformers' own, whose results are the same but for rounding."""

FEWEST_ROWS = 2
"""Rows from which grouped products beat products over copies, as measured (docs/log.md)."""


def with_grouped_experts(
    model: PreTrainedModel, rows: Callable[[], int]
) -> Callable[[], AbstractContextManager[None]]:
    """``generate``'s preparation for decoding, but experts keep their grouped products.

    On GPUs transformers changes "grouped_mm" to "batched_mm" while it decodes, which copies the
    weights of each pair of token and expert before it reads them.

    Args:
        rows: of the TreeCache that the model was last called with; 0 if it was another cache.
    """
    prepare = model._optimize_model_for_decode

    def choose() -> AbstractContextManager[None]:
        stays = rows() >= FEWEST_ROWS and _are_grouped_on_device(model)
        return nullcontext() if stays else prepare()

    return choose


def _are_grouped_on_device(model: PreTrainedModel) -> bool:
    """Whether all experts have grouped products that a GPU does without asking the host."""
    if "grouped_mm" not in model.get_experts_implementation().values():
        return False
    weights = list(_expert_weights(model))
    return bool(weights) and all(map(_is_served, weights))


def _expert_weights(model: nn.Module) -> Iterator[torch.Tensor]:
    for module in model.modules():
        # As transformers' decorator of experts marks them.
        if isinstance(getattr(module, "has_gate", None), bool):
            weight: Any = getattr(module, "down_proj", None)
            if isinstance(weight, torch.Tensor):
                yield weight


def _is_served(weight: torch.Tensor) -> bool:
    # Other dtypes, and older GPUs, go through a loop over the experts on the host.
    if weight.dtype != torch.bfloat16 or weight.device.type != "cuda":
        return False
    return torch.cuda.get_device_capability(weight.device) >= (8, 0)
