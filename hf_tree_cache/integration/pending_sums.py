"""PendingSums: a sum waits for the next operator, in case that is a norm that takes it along."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..forward.small import HALF, Sum


class PendingSums(TorchDispatchMode):
    """Within, ``x + y`` of hidden states is written when the next operator runs, or by its norm.

    Nobody sees the difference: whatever reads the sum through an operator comes after it.

    Args:
        sizes: of the hidden states that norms take.
    """

    def __init__(self, sizes: Collection[int]) -> None:
        super().__init__()
        self._sizes = frozenset(sizes)
        self._pending: Sum | None = None

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
            self._pending = Sum(first, second, torch.empty_like(first))
            return self._pending.out
        return func(*args, **(kwargs or {}))

    def take(self, x: torch.Tensor) -> Sum | None:
        """The sum that ``x`` stands for, if it has still to be written: by the caller."""
        if self._pending is None or self._pending.out is not x:
            return None
        pending, self._pending = self._pending, None
        return pending

    def write(self) -> None:
        """Write what waits."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.write()

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
