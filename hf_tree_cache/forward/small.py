"""RMS norm, also of a sum, and gated product: one launch where served, else torch's way."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from triton import knobs

from ..overlap import can_overlap, launch_options
from .kernels import gated_product_kernel, rms_norm_kernel

MOST_SIZE = 1 << 14
"""Numbers of a row that one program holds."""

TILE = 2048
"""Numbers that a program of a gated product takes."""

HALF = (torch.bfloat16, torch.float16)


class Layout(NamedTuple):
    """Where the rows of a tensor lie whose last stride is 1.

    Attributes:
        heads: rows of a group.
        stride: between groups.
        head_stride: between rows of a group.
    """

    heads: int
    stride: int
    head_stride: int

    @classmethod
    def of(cls, x: torch.Tensor) -> Layout | None:
        """Of one token a group, ``[B, 1, N]``, ``[B, 1, H, N]`` or ``[B, H, 1, N]``, or of all."""
        size = x.shape[-1]
        if x.stride(-1) == 1 and x.ndim == 3 and x.shape[1] == 1:
            return cls(1, x.stride(0), size)
        if x.stride(-1) == 1 and x.ndim == 4 and 1 in x.shape[1:3]:
            dim = 2 if x.shape[1] == 1 else 1
            return cls(x.shape[dim], x.stride(0), x.stride(dim))
        return cls(1, size, size) if x.is_contiguous() else None


@dataclass(frozen=True, slots=True)
class Norm:
    """An RMS norm that has still to be written to ``out``, contiguous and shaped as ``x``."""

    x: torch.Tensor
    layout: Layout
    weight: torch.Tensor
    eps: float
    more: float
    out: torch.Tensor

    def write(self, added: Sum | None = None) -> None:
        """With the sum that it is of, if that has not been written."""
        _launch(added, self)


@dataclass(frozen=True, slots=True)
class Sum:
    """``first + second``, of one shape, contiguous, that has still to be written to ``out``.

    Attributes:
        normed: the norm that ``second`` stands for, if that has not been written.
        factor: of one number, which the sum is multiplied by once it is rounded.
    """

    first: torch.Tensor
    second: torch.Tensor
    out: torch.Tensor
    normed: Norm | None = None
    factor: torch.Tensor | None = None

    def write(self) -> None:
        if self.normed is not None:
            _launch(self, None)
            return
        torch.add(self.first, self.second, out=self.out)
        if self.factor is not None:
            self.out.mul_(self.factor)


@dataclass(frozen=True, slots=True)
class Activated:
    """``activation(x)``, ``[rows, 1, N]``, that has still to be written to ``out``."""

    x: torch.Tensor
    activation: str
    out: torch.Tensor

    def write(self) -> None:
        if self.activation == "silu":
            torch.ops.aten.silu.out(self.x, out=self.out)
        else:
            by = "tanh" if self.activation == "gelu_tanh" else "none"
            torch.ops.aten.gelu.out(self.x, approximate=by, out=self.out)

    def times(self, up: torch.Tensor) -> torch.Tensor:
        """Written, and multiplied by ``up`` as it was rounded."""
        return _launch_gated(self.x, up, self.activation, kept=self.out)


def make_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, more: float) -> Norm | None:
    """Of the last dimension of ``x``, times ``weight [N] + more``; None where it is not served."""
    if not serves(x) or x.dtype != weight.dtype or len(weight) > MOST_SIZE:
        return None
    layout = Layout.of(x)
    if layout is None:
        x, layout = x.contiguous(), Layout(1, len(weight), len(weight))
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    return Norm(x, layout, weight, eps, more, out)


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    more: float = 0.0,
    added: Sum | None = None,
) -> torch.Tensor:
    """Of the last dimension of ``x``, times ``weight [N] + more``; in float32, rounded once.

    Args:
        added: the sum that ``x`` stands for, if it has not been written; this does.
    """
    norm = make_norm(x, weight, eps, more)
    if norm is not None:
        norm.write(added)
        return norm.out
    if added is not None:
        added.write()
    if more:
        wide = torch.promote_types(x.dtype, torch.float32)
        scale = weight.to(wide) + more
        return nn.functional.rms_norm(x.to(wide), weight.shape, scale, eps).to(x.dtype)
    return nn.functional.rms_norm(x, weight.shape, weight, eps)


def _launch(added: Sum | None, last: Norm | None) -> None:
    """A norm, a sum, or both, and the norm before the sum: whatever of these is to be written."""
    first = None if added is None else added.normed
    # What is not used stands for what is not needed.
    if first is not None:
        x, layout, any_norm = first.x, first.layout, first
    else:
        assert last is not None
        x, layout, any_norm = last.x, last.layout, last
        x = x if added is None else added.second
    size = len(any_norm.weight)
    before, after = first or any_norm, last or any_norm
    factor = None if added is None else added.factor
    overlap = can_overlap(x.device)
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        rms_norm_kernel[(x.numel() // size,)](
            x, before.weight, before.out,
            x if added is None else added.first, x if factor is None else factor,
            x if added is None else added.out, after.weight, after.out,
            layout.stride, layout.head_stride, before.eps, after.eps,
            SIZE=size, PADDED=1 << (size - 1).bit_length(), HEADS=layout.heads,
            FIRST=first is not None, ADD=added is not None, SCALED=factor is not None,
            LAST=last is not None, FIRST_MORE=before.more, MORE=after.more, OVERLAP=overlap,
            num_warps=8 if size > 1024 else 4 if size > 256 else 1, **launch_options(overlap),
        )  # fmt: skip


def activate(x: torch.Tensor, activation: str) -> torch.Tensor:
    """One of :data:`.linear.ACTIVATIONS`, by torch."""
    if activation == "silu":
        return nn.functional.silu(x)
    return nn.functional.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def gated_product(gate: torch.Tensor, up: torch.Tensor, activation: str = "silu") -> torch.Tensor:
    """``activation(gate) * up``, rounded once; ``[rows, 1, N]`` each.

    Args:
        activation: one of :data:`.linear.ACTIVATIONS`.
    """
    if not can_multiply(gate, up):
        return activate(gate, activation) * up
    return _launch_gated(gate, up, activation)


def can_multiply(gate: torch.Tensor, up: torch.Tensor) -> bool:
    """Whether one launch serves their gated product."""
    same = gate.shape == up.shape and gate.dtype == up.dtype and gate.device == up.device
    tokens = same and gate.ndim == 3 and gate.shape[1] == 1
    return tokens and serves(gate) and gate.stride(2) == up.stride(2) == 1


def _launch_gated(
    gate: torch.Tensor, up: torch.Tensor, activation: str, *, kept: torch.Tensor | None = None
) -> torch.Tensor:
    rows, _, size = gate.shape
    y = gate.new_empty(gate.shape)
    overlap = can_overlap(gate.device)
    with torch.cuda.device(gate.device) if gate.is_cuda else nullcontext():
        gated_product_kernel[(rows, -(-size // TILE))](
            gate, up, y if kept is None else kept, y, gate.stride(0), up.stride(0),
            SIZE=size, TILE=TILE, ACTIVATION=activation, KEPT=kept is not None, OVERLAP=overlap,
            num_warps=4, **launch_options(overlap),
        )  # fmt: skip
    return y


def serves(x: torch.Tensor) -> bool:
    """Whether kernels take ``x``: half precision, where Triton runs."""
    return x.dtype in HALF and (x.is_cuda or knobs.runtime.interpret)
