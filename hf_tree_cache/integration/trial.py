"""Whether a way of ours does what a module or function does: asked of both with made-up values.

In float64, and with made-up weights, where that can be: in half precision, and with the weights
that a model happens to have, ways that differ can be as close as rounding.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

WITHIN = 1e-4
"""Of the largest, where both compute in float64, or in float32 for a part."""


def is_untouched(module: nn.Module) -> bool:
    """Whether it computes what its class does: no hooks, no forward of its own."""
    return not ("forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks)


def twin(module: nn.Module, **weights: torch.Tensor) -> Any:
    """``module`` with other weights in the place of all of its own; what it lacks stays missing."""
    made: Any = copy.copy(module)
    missing = dict.fromkeys(name for name, x in module._parameters.items() if x is None)
    made._parameters = {**missing, **weights}
    return made


def made_up(*shape: int, like: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Values on the device of ``like``, and in its dtype if not said; the same each time.

    Their mean is not 0.
    """
    count = torch.Size(shape).numel()
    values = torch.arange(count, device=like.device) * 7 % 19 - 4.5
    return (values / 4).to(dtype or like.dtype).reshape(shape)


@torch.no_grad()
def agree(
    theirs: Callable[..., object],
    ours: Callable[..., object],
    *trial: torch.Tensor,
    within: float | None = None,
) -> bool:
    """Whether both give the same for ``trial``.

    Args:
        within: of the largest; four roundings if not said.
    """
    try:
        want = theirs(*trial)
    except Exception:  # whatever a module made for arguments of other kinds does with these
        return False
    try:
        got = ours(*trial)
    except (RuntimeError, TypeError, ValueError):
        return False
    pairs = list(zip(_tensors(want), _tensors(got), strict=False))
    if not pairs or len(_tensors(want)) != len(_tensors(got)):
        return False
    return all(
        one.shape == other.shape
        and one.dtype == other.dtype
        and bool((one - other).abs().max() <= _share(one, within) * one.abs().max())
        for one, other in pairs
    )


def _share(x: torch.Tensor, within: float | None) -> float:
    return 4 * torch.finfo(x.dtype).eps if within is None else within


def _tensors(value: object) -> list[torch.Tensor]:
    values = value if isinstance(value, tuple) else (value,)
    return [x for x in values if isinstance(x, torch.Tensor)]
