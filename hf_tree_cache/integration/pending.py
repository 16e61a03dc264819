"""Pending: small steps wait for the next operator, in case a kernel takes them along."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..forward.rotary import Rotation
from ..forward.small import HALF, Activated, Norm, Sum, can_multiply, make_norm, rms_norm

_Kind = TypeVar("_Kind", Norm, Sum, Rotation, Activated)

READ_NOTHING = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten._unsafe_view.default,
}
"""Operators beside views that look at no values."""


class Pending(TorchDispatchMode):
    """Within, what waits is written when the next operator runs, or by the kernel that takes it.

    - ``x + y`` of hidden states, with the norm of ``y``, if that waits: their own norm takes both;
    - norms of queries and keys: a rotation takes them;
    - a rotation: the kernel that stores its keys takes it;
    - such a sum times one number, in place: as the sum;
    - an activation: the product with something of its shape takes it.

    Each is written somewhere in any case, and nobody sees the difference: whatever reads the
    results through an operator comes after it. Views may be taken before.

    Args:
        sizes: of the hidden states that norms take.
    """

    def __init__(self, sizes: Collection[int]) -> None:
        super().__init__()
        self._sizes = frozenset(sizes)
        self._waiting: list[Norm | Sum | Rotation | Activated] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if getattr(func, "is_view", False) or func in READ_NOTHING:
            return func(*args, **(kwargs or {}))
        joined = self._join(func, args, kwargs or {})
        if joined is not None:
            return joined
        self.write()
        return func(*args, **(kwargs or {}))

    def norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float, more: float) -> torch.Tensor:
        """As :func:`rms_norm`; may wait."""
        added = self._take(Sum, x)
        norm = make_norm(x, weight, eps, more)
        if norm is None:
            return rms_norm(x, weight, eps, more=more, added=added)
        if added is not None:
            norm.write(added)
            return norm.out
        if not self._may_join(norm):
            self.write()
        self._waiting.append(norm)
        return norm.out

    def hold(self, rotation: Rotation) -> None:
        """Let ``rotation`` wait, with the norms before it; what else waited before is written."""
        behind = rotation.behind([each for each in self._waiting if isinstance(each, Norm)])
        if behind is None:
            self.write()
        self._waiting = [behind or rotation]

    def take_rotation(self, keys: torch.Tensor) -> Rotation | None:
        """What ``keys`` come from, if they have still to be written: by the caller."""
        rotation = self._take(Rotation, keys)
        if rotation is None:
            self.write()
        return rotation

    def write(self) -> None:
        """Write what waits."""
        waiting, self._waiting = self._waiting, []
        for each in waiting:
            each.write()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self.write()

    def _join(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> torch.Tensor | None:
        """The result of an operator that waits, or that takes along what does."""
        aten = torch.ops.aten
        if func is aten.silu.default:
            return self._hold_activation(args[0], "silu")
        if func is aten.gelu.default:
            with_tanh = kwargs.get("approximate") == "tanh"
            return self._hold_activation(args[0], "gelu_tanh" if with_tanh else "gelu")
        if kwargs or len(args) != 2 or not all(isinstance(x, torch.Tensor) for x in args):
            return None
        if func is aten.add.Tensor and self._may_wait(*args):
            return self._hold_sum(*args)
        if func is aten.mul_.Tensor:
            return self._scale(*args)
        return self._multiply(*args) if func is aten.mul.Tensor else None

    def _hold_activation(self, x: torch.Tensor, activation: str) -> torch.Tensor | None:
        if not can_multiply(x, x):
            return None
        self.write()
        out = x.new_empty(x.shape)
        self._waiting = [Activated(x, activation, out)]
        return out

    def _multiply(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor | None:
        """The product, if one of both is an activation that waits."""
        for one, other in ((first, second), (second, first)):
            if first is second or not can_multiply(one, other):
                break
            activated = self._take(Activated, one)
            if activated is not None:
                return activated.times(other)
        return None

    def _scale(self, x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor | None:
        """``x``, if it is a sum that waits: now for its product with ``factor``."""
        fits = factor.numel() == 1 and factor.dtype == x.dtype and factor.device == x.device
        added = self._take(Sum, x) if fits else None
        if added is None:
            return None
        if added.factor is not None:
            added.write()
            return x.mul_(factor)
        self._waiting = [replace(added, factor=factor)]
        return x

    def _take(self, kind: type[_Kind], result: torch.Tensor) -> _Kind | None:
        """What ``result`` stands for, if that waits, alone, and is of that kind."""
        for each in self._waiting if len(self._waiting) == 1 else []:
            if isinstance(each, kind) and _result(each) is result:
                self._waiting = []
                return each
        return None

    def _hold_sum(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        normed = None
        if first is not second:
            normed = self._take(Norm, second)
            if normed is None and (normed := self._take(Norm, first)) is not None:
                first, second = second, first
        self.write()
        out = torch.empty_like(first)
        self._waiting = [Sum(first, second, out, normed)]
        return out

    def _may_join(self, norm: Norm) -> bool:
        """Whether ``norm`` may wait beside what does: that of other heads of the same token."""
        return norm.x.ndim == 4 and all(
            isinstance(each, Norm) and each.x.ndim == 4 and not _share_memory(each.out, norm.x)
            for each in self._waiting
        )

    def _may_wait(self, first: torch.Tensor, second: torch.Tensor) -> bool:
        if not (first.is_contiguous() and second.is_contiguous()):
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


def _result(waiting: Norm | Sum | Rotation | Activated) -> torch.Tensor | None:
    """What somebody who takes it along is given; of a rotation, the keys."""
    return waiting.k_out if isinstance(waiting, Rotation) else waiting.out


def _share_memory(x: torch.Tensor, y: torch.Tensor) -> bool:
    return x.untyped_storage().data_ptr() == y.untyped_storage().data_ptr()
