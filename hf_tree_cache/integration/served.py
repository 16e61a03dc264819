"""Whether kernels of ours compute all of decoder layers, so that nothing is left to compile."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator

from torch import nn

from .linears import DecodeLinears
from .small_steps import SmallSteps
from .units import Units

INACTIVE = (nn.Identity, nn.Dropout)
"""What does nothing in a decode step."""


def are_served(
    layers: Iterable[nn.Module], linears: DecodeLinears, steps: SmallSteps, units: Iterable[Units]
) -> bool:
    """Whether all that ``layers`` hold, and their rotary embeddings, have a way of ours."""
    files = {file for file, _, _ in steps.rotaries}
    served: set[nn.Module] = {norm for norm, _ in steps.norms} | set(linears.layers)
    for kind in units:
        for unit, _, _ in kind.units:
            served.update(unit.modules())
    return all(
        sys.modules.get(type(layer).__module__) in files
        and all(part in served or isinstance(part, INACTIVE) for part in _leaves(layer))
        for layer in layers
    )


def _leaves(layer: nn.Module) -> Iterator[nn.Module]:
    return (part for part in layer.modules() if next(part.children(), None) is None)
