"""Whether kernels of ours compute all of a decoder layer, so that nothing is left to compile."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from torch import nn

from .linears import DecodeLinears
from .small_steps import SmallSteps
from .units import Units

INACTIVE = (nn.Identity, nn.Dropout)
"""What does nothing in a decode step."""


def is_served(
    layer: nn.Module, linears: DecodeLinears, steps: SmallSteps, units: Iterable[Units]
) -> bool:
    """Whether all that ``layer`` holds, and its rotary embedding, have a way of ours."""
    files = {file for file, _, _ in steps.rotaries}
    if sys.modules.get(type(layer).__module__) not in files:
        return False
    served: set[nn.Module] = {norm for norm, _ in steps.norms} | set(linears.layers)
    for kind in units:
        for unit, _, _ in kind.units:
            served.update(unit.modules())
    leaves = [part for part in layer.modules() if next(part.children(), None) is None]
    return all(part in served or isinstance(part, INACTIVE) for part in leaves)
