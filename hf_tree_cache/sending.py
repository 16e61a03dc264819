"""Numbers to a device and back, without waiting for more than they need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

AHEAD_ON = ("cuda",)
"""Devices that work while the host does: there a step begins before the last one is booked."""


def works_ahead(device: torch.device) -> bool:
    """Whether the host gains by launching what comes next before it reads what was drawn."""
    return device.type in AHEAD_ON


def to_device(
    values: Sequence[Any], device: torch.device, dtype: torch.dtype = torch.int64
) -> torch.Tensor:
    """Numbers, or lists of them, as a tensor on ``device``, by :func:`send`."""
    return send(torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda"), device)


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """``tensor``, which is on the host, on ``device``.

    ``tensor.to(device)``, like ``torch.tensor(values, device=...)``, waits for all work before it.
    """
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.contiguous().pin_memory().to(device, non_blocking=True)


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
