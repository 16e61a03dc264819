"""Whether a way of ours does what a module or function does: asked of both with made-up values."""

from __future__ import annotations

from collections.abc import Callable

import torch


def made_up(*shape: int, like: torch.Tensor) -> torch.Tensor:
    """Values in the dtype and on the device of ``like``, the same each time, their mean not 0."""
    count = torch.Size(shape).numel()
    values = torch.arange(count, device=like.device) * 7 % 19 - 4.5
    return (values / 4).to(like.dtype).reshape(shape)


@torch.no_grad()
def agree(theirs: Callable[..., object], ours: Callable[..., object], *trial: torch.Tensor) -> bool:
    """Whether both give the same for ``trial``, but for rounding."""
    try:
        want, got = theirs(*trial), ours(*trial)
    except (RuntimeError, TypeError, ValueError):  # made for arguments of other kinds
        return False
    pairs = list(zip(_tensors(want), _tensors(got), strict=False))
    if not pairs or len(_tensors(want)) != len(_tensors(got)):
        return False
    return all(
        one.shape == other.shape
        and one.dtype == other.dtype
        and bool((one - other).abs().max() <= 4 * torch.finfo(one.dtype).eps * one.abs().max())
        for one, other in pairs
    )


def _tensors(value: object) -> list[torch.Tensor]:
    values = value if isinstance(value, tuple) else (value,)
    return [x for x in values if isinstance(x, torch.Tensor)]
