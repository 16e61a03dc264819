"""Units: modules of a model that compute in a way of ours while steps are captured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

Forward = Callable[..., Any]


class Units:
    """Modules with a forward of ours; outside of :meth:`switched` they compute as ever.

    Args:
        found: each with what its forward of ours depends on besides its class, hashable.
        make_forward: of a class and that.

    Attributes:
        units: each module, its class, and that with our forward.
    """

    def __init__(
        self,
        found: Iterable[tuple[nn.Module, Any]],
        make_forward: Callable[[type[nn.Module], Any], Forward],
    ) -> None:
        found = list(found)
        kinds = dict.fromkeys((type(part), style) for part, style in found)
        ours = {(kind, style): _fuse(kind, make_forward(kind, style)) for kind, style in kinds}
        self.units = [(part, type(part), ours[type(part), style]) for part, style in found]

    @contextmanager
    def switched(self) -> Iterator[None]:
        """Within, they take our forwards."""
        # Classes, not forwards: a compiler makes one forward for all units of a class.
        for unit, _, ours in self.units:
            unit.__class__ = ours
        try:
            yield
        finally:
            for unit, theirs, _ in self.units:
                unit.__class__ = theirs


def _fuse(kind: type[nn.Module], forward: Forward) -> type[nn.Module]:
    """``kind`` with ``forward``."""
    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})
