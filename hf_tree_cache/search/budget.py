"""Budget: the bounds of a search."""

from __future__ import annotations

from dataclasses import dataclass, fields

from ..errors import InvalidArgument


@dataclass(frozen=True, slots=True)
class Budget:
    """What a search may spend; None is without bound. The first bound that is met ends it.

    A question that meets a bound of its own ends, the others go on; a bound of the whole run ends
    all. The result says which it was, and holds what had been found.

    Attributes:
        tokens: tokens that a question may generate. Never exceeded.
        branches: branches that a question may start, over the whole search. Those that run when it
            is met still go on to their end.
        seconds: wall time of the run. Looked at every few tokens, so exceeded by some steps.
        blocks: KV blocks that the run may hold at a time. Never exceeded.
    """

    tokens: int | None = None
    branches: int | None = None
    seconds: float | None = None
    blocks: int | None = None

    def __post_init__(self) -> None:
        for bound in fields(self):
            value = getattr(self, bound.name)
            if value is not None and not value > 0:
                raise InvalidArgument(
                    f"Budget({bound.name}={value}): give a positive number, or None for no bound."
                )
