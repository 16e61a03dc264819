"""Small lists of integers to a device, without waiting for what it is doing."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def to_device(
    values: Sequence[int], device: torch.device, dtype: torch.dtype = torch.int64
) -> torch.Tensor:
    """``[len(values)]``. ``torch.tensor(values, device=...)`` would wait for all work before it."""
    made = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
    return made.to(device, non_blocking=True)
