"""Numbers to a device and back, without waiting for more than they need."""

from __future__ import annotations

from collections.abc import Sequence

import torch

AHEAD_ON = ("cuda",)
"""Devices that work while the host does: there a step begins before the last one is booked."""


def works_ahead(device: torch.device) -> bool:
    """Whether the host gains by launching what comes next before it reads what was drawn."""
    return device.type in AHEAD_ON


def to_device(
    values: Sequence[int], device: torch.device, dtype: torch.dtype = torch.int64
) -> torch.Tensor:
    """``[len(values)]``. ``torch.tensor(values, device=...)`` would wait for all work before it."""
    made = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
    return made.to(device, non_blocking=True)


class Arriving:
    """Numbers on their way to the host: a table of float64, which holds token ids exactly."""

    def __init__(self, table: torch.Tensor) -> None:
        self._event = torch.cuda.Event() if table.is_cuda else None
        self._table = table.to("cpu", non_blocking=True)
        if self._event is not None:
            self._event.record()

    def read(self) -> list[list[float]]:
        """The rows of the table. Waits for them, not for what runs after them."""
        if self._event is not None:
            self._event.synchronize()
        return self._table.tolist()
