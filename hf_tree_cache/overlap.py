"""Programmatic dependent launch: kernels that start while the one ahead of them ends. Needs torch.

A kernel so launched does first what depends on nothing that came shortly before: it reads its
work list, or asks for weights. Then it waits for all kernels ahead, and only then may the next one
start. So at most two overlap, and what a kernel reads before it waits must be two launches old.
From Hopper on; CUDA graphs keep it.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch


@cache
def can_overlap(device: torch.device) -> bool:
    """Whether launches on ``device`` can begin before the kernel ahead has ended."""
    if device.type != "cuda" or torch.version.hip:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


def launch_options(overlap: bool) -> dict[str, Any]:
    """Triton's, for a kernel that waits by ``gdc_wait``."""
    return {"launch_pdl": True} if overlap else {}
