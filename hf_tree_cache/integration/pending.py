"""Pending: a sum or a rotation waits for the next operator, in case a kernel takes it along."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..forward.rotary import Rotation
from ..forward.small import HALF, Sum


class Pending(TorchDispatchMode):
    """Within, what waits is written when the next operator runs, or by the kernel that takes it.

    That is ``x + y`` of hidden states, which their norm takes along, and a rotation, which the
    kernel that stores its keys does. Nobody sees the difference: whatever reads the results through
    an operator comes after it.

    Args:
        sizes: of the hidden states that norms take.
    """

    def __init__(self, sizes: Collection[int]) -> None:
        super().__init__()
        self._sizes = frozenset(sizes)
        self._waiting: Sum | Rotation | None = None

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        self.write()
        if func is torch.ops.aten.add.Tensor and not kwargs and self._may_wait(*args):
            first, second = args
            out = torch.empty_like(first)
            self._waiting = Sum(first, second, out)
            return out
        return func(*args, **(kwargs or {}))

    def hold(self, rotation: Rotation) -> None:
        """Let ``rotation`` wait; what waited before is written."""
        self.write()
        self._waiting = rotation

    def take_sum(self, x: torch.Tensor) -> Sum | None:
        """The sum that ``x`` stands for, if it has still to be written: by the caller."""
        waiting = self._waiting
        if not isinstance(waiting, Sum) or waiting.out is not x:
            return None
        self._waiting = None
        return waiting

    def take_rotation(self, keys: torch.Tensor) -> Rotation | None:
        """What ``keys`` come from, if they have still to be written: by the caller."""
        waiting = self._waiting
        if not isinstance(waiting, Rotation) or waiting.k_out is not keys:
            self.write()
            return None
        self._waiting = None
        return waiting

    def write(self) -> None:
        """Write what waits."""
        if self._waiting is not None:
            waiting, self._waiting = self._waiting, None
            waiting.write()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self.write()

    def _may_wait(self, first: Any, second: Any) -> bool:
        both = first, second
        if not all(isinstance(x, torch.Tensor) and x.is_contiguous() for x in both):
            return False
        # Hidden states [B, T, N]: K and V, which kernels read without an operator, have more dims.
        return (
            first.ndim == 3
            and first.shape == second.shape
            and first.shape[2] in self._sizes
            and first.dtype == second.dtype
            and first.dtype in HALF
            and first.device == second.device
        )
