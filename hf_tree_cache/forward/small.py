"""RMS norm and gated product: one launch each where served, else torch's way."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

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


@dataclass(frozen=True, slots=True)
class Sum:
    """``first + second``, of one shape, contiguous, that has still to be written to ``out``."""

    first: torch.Tensor
    second: torch.Tensor
    out: torch.Tensor

    def write(self) -> None:
        torch.add(self.first, self.second, out=self.out)


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
    if not serves(x) or x.dtype != weight.dtype or len(weight) > MOST_SIZE:
        if added is not None:
            added.write()
        if more:
            wide = torch.promote_types(x.dtype, torch.float32)
            scale = weight.to(wide) + more
            return nn.functional.rms_norm(x.to(wide), weight.shape, scale, eps).to(x.dtype)
        return nn.functional.rms_norm(x, weight.shape, weight, eps)
    size = len(weight)
    heads, stride = 1, size
    if x.ndim == 4 and x.shape[1] == 1 and x.stride()[2:] == (size, 1) and added is None:
        heads, stride = x.shape[2], x.stride(0)  # of a product for more than these heads
    else:
        x = x.contiguous()
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    overlap = can_overlap(x.device)
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        rms_norm_kernel[(x.numel() // size,)](
            *((x, x) if added is None else (added.first, added.second)), weight, x, y, stride, eps,
            SIZE=size, PADDED=1 << (size - 1).bit_length(), HEADS=heads, ADD=added is not None,
            MORE=more, OVERLAP=overlap, num_warps=8 if size > 1024 else 4 if size > 256 else 1,
            **launch_options(overlap),
        )  # fmt: skip
    return y


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
    same = gate.shape == up.shape and gate.dtype == up.dtype and gate.ndim == 3
    if not same or gate.shape[1] != 1 or not (serves(gate) and gate.stride(2) == up.stride(2) == 1):
        return activate(gate, activation) * up
    rows, _, size = gate.shape
    y = gate.new_empty(gate.shape)
    overlap = can_overlap(gate.device)
    with torch.cuda.device(gate.device) if gate.is_cuda else nullcontext():
        gated_product_kernel[(rows, -(-size // TILE))](
            gate, up, y, gate.stride(0), up.stride(0), SIZE=size, TILE=TILE,
            ACTIVATION=activation, OVERLAP=overlap, num_warps=4, **launch_options(overlap),
        )  # fmt: skip
    return y


def serves(x: torch.Tensor) -> bool:
    """Whether kernels take ``x``: half precision, where Triton runs."""
    return x.dtype in HALF and (x.is_cuda or knobs.runtime.interpret)
