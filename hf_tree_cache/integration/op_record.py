"""OpRecord: what a forward asks of the device, to tell whether a CUDA graph could repeat it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

SYNCHRONISING = frozenset({"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select"})
"""Operators whose result the host waits for, or whose shape depends on values."""


class OpRecord(TorchDispatchMode):
    """Within, every operator is noted with the shapes of its tensors and its other arguments.

    Two decode steps with equal records do the same work on whatever their inputs hold, so that one
    may be replayed for the other. A length that found its way into a shape or a number shows as a
    difference.

    Attributes:
        ops: one entry an operator.
        blocked: the first operator that a graph cannot hold, if any.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[tuple[Any, ...]] = []
        self.blocked: str | None = None

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        result = func(*args, **kwargs)
        waits = name in SYNCHRONISING or _selects_by_value(name, args) or _crosses(args, result)
        if waits and self.blocked is None:
            self.blocked = name
        described = tuple(_describe(arg) for arg in args)
        named = tuple((key, _describe(value)) for key, value in kwargs.items())
        self.ops.append((str(func), described, named))
        return result


def first_difference(one: OpRecord, other: OpRecord) -> str | None:
    """What differs first between two records; None if nothing does."""
    for before, after in zip(one.ops, other.ops, strict=False):
        if before != after:
            return f"{before[0]} with {before[1]}, then {after[0]} with {after[1]}"
    if len(one.ops) != len(other.ops):
        return f"{len(one.ops)} operators, then {len(other.ops)}"
    return None


def _selects_by_value(name: str, args: Sequence[Any]) -> bool:
    """Whether this is ``x[mask]``."""
    if name != "aten::index":
        return False
    return any(index is not None and index.dtype == torch.bool for index in args[1])


def _crosses(args: Sequence[Any], result: Any) -> bool:
    """Whether data goes from one device to another."""
    tensors = [x for x in (*args, result) if isinstance(x, torch.Tensor) and x.ndim]
    return len({x.device for x in tensors}) > 1


def _describe(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.dtype, value.device.type
    if isinstance(value, (list, tuple)):
        return tuple(_describe(item) for item in value)
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device)):
        return value
    return type(value).__name__
