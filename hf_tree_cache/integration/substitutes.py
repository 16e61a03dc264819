"""All of a model that computes in ways of ours while steps are captured."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager

from torch import nn

from .expert_units import ExpertUnits
from .gated import GatedUnits
from .linears import DecodeLinears
from .pending import Pending
from .routers import Routers
from .small_steps import SmallSteps
from .units import Units

UNITS: dict[str, Callable[[Iterable[nn.Module]], Units]] = {
    "gated units": GatedUnits,
    "experts": ExpertUnits,
    "routers": Routers,
}

INACTIVE = (nn.Identity, nn.Dropout)
"""What does nothing in a decode step."""


class Substitutes:
    """Linear layers, units, norms and rotary embeddings of ``model`` with a way of ours.

    None before :meth:`find`. Outside of :meth:`switched` the model computes as ever.

    Args:
        compiled: layers that are compiled: their neighbouring linears share a weight, and their
            small steps are the compiler's.
    """

    def __init__(self, model: nn.Module, *, compiled: Collection[nn.Module] = ()) -> None:
        self._model, self._compiled = model, compiled
        self.linears = DecodeLinears((), join=False)
        self.units: dict[str, Units] = {}
        self.steps = SmallSteps(())

    def find(self) -> None:
        """Look at the model as it is now; linears that are joined stay so."""
        parts = list(self._model.modules())
        if not (self.linears and self.linears.intact):
            self.linears = DecodeLinears(parts, join=bool(self._compiled))
        self.units = {name: kind(parts) for name, kind in UNITS.items()}
        self.steps = SmallSteps(parts, besides=_parts(self._compiled))

    @property
    def names(self) -> list[str]:
        """Kinds of which there are any."""
        found = {
            "linears": self.linears.layers,
            "norms": self.steps.norms,
            "rotary": self.steps.rotaries,
            **{name: units.units for name, units in self.units.items()},
        }
        return [name for name, parts in found.items() if parts]

    @contextmanager
    def switched(self) -> Iterator[Pending | None]:
        """Within, ours compute; what waits does so in what this yields."""
        with ExitStack() as stack:
            stack.enter_context(self.linears.switched())
            for units in self.units.values():
                stack.enter_context(units.switched())
            yield stack.enter_context(self.steps.switched())

    def serve(self, layers: Collection[nn.Module]) -> bool:
        """Whether all that ``layers`` hold, and their rotary embeddings, have a way of ours."""
        steps = SmallSteps(_parts(layers))
        files = {file for file, _, _ in steps.rotaries}
        served: set[nn.Module] = {norm for norm, _ in steps.norms} | set(self.linears.layers)
        for kind in self.units.values():
            for unit, _, _ in kind.units:
                served.update(unit.modules())
        return all(
            sys.modules.get(type(layer).__module__) in files
            and all(part in served or isinstance(part, INACTIVE) for part in _leaves(layer))
            for layer in layers
        )

    def release(self) -> None:
        """Leave the model as it was found."""
        self.linears.release()


def _parts(layers: Iterable[nn.Module]) -> list[nn.Module]:
    return [part for layer in layers for part in layer.modules()]


def _leaves(layer: nn.Module) -> Iterator[nn.Module]:
    return (part for part in layer.modules() if next(part.children(), None) is None)
