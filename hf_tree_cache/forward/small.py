"""RMS norm, rotary embedding, gated product: one launch each where served, else torch's way."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from triton import knobs

from ..memory.scatter import Slots
from ..overlap import can_overlap, launch_options
from .kernels import gated_product_kernel, rms_norm_kernel, rotary_kernel

MOST_SIZE = 1 << 14
"""Numbers of a row that one program holds."""

TILE = 2048
"""Numbers that a program of a gated product takes."""

HALF = (torch.bfloat16, torch.float16)

Rotary = Callable[..., tuple[torch.Tensor, torch.Tensor]]


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
    if not _serves(x) or x.dtype != weight.dtype or len(weight) > MOST_SIZE:
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
    if (
        not same
        or gate.shape[1] != 1
        or not (_serves(gate) and gate.stride(2) == up.stride(2) == 1)
    ):
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


@dataclass(frozen=True, slots=True)
class Rotation:
    """Queries and keys that have still to be rotated, ``[B, H, 1, D]``, last stride 1.

    Attributes:
        cos, sin: ``[B, 1, D]`` contiguous.
        q_out, k_out: where to, contiguous.
    """

    q: torch.Tensor
    k: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    q_out: torch.Tensor
    k_out: torch.Tensor

    def write(self, values: torch.Tensor | None = None, slots: Slots | None = None) -> None:
        """Rotate; with ``values [B, Hkv, 1, Dv]``, also store these and the keys in ``slots``."""
        q, k = self.q, self.k
        rows, num_q_heads, _, size = q.shape
        num_kv_heads = k.shape[1]
        heads = max(num_q_heads, num_kv_heads)
        v = k if values is None else values
        v = v if v.stride(3) == 1 else v.contiguous()
        overlap = can_overlap(q.device)
        with torch.cuda.device(q.device) if q.is_cuda else nullcontext():
            rotary_kernel[(rows, 2)](
                q, k, self.cos, self.sin, self.q_out, self.k_out, v,
                *((k, k, k, k, k, k) if slots is None else slots[:-1]),
                q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
                HQ=num_q_heads, HKV=num_kv_heads, D=size, DV=v.shape[3],
                HEADS=1 << (heads - 1).bit_length(), HKVP=1 << (num_kv_heads - 1).bit_length(),
                HALF=1 << (size // 2 - 1).bit_length(), DVP=1 << (v.shape[3] - 1).bit_length(),
                S=1 if slots is None else slots.block_size, STORE=slots is not None,
                OVERLAP=overlap, num_warps=4, **launch_options(overlap),
            )  # fmt: skip


def make_rotary(theirs: Rotary, launch: Callable[[Rotation], None] = Rotation.write) -> Rotary:
    """``theirs``, with one launch for a decode step that rotates whole heads by halves.

    Args:
        theirs: of queries ``[B, Hq, T, D]``, keys ``[B, Hkv, T, D]``, and cosines and sines
            ``[B, T, D]``; called wherever the kernel does not serve.
        launch: now, or before anybody reads the results.
    """

    def rotary(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if args or kwargs or not all(_serves(x) and x.stride(-1) == 1 for x in (q, k, cos, sin)):
            return theirs(q, k, cos, sin, *args, **kwargs)
        rows, _, num_new, size = q.shape
        angles = (rows, 1, size)
        same = num_new == 1 and cos.shape == angles and sin.shape == angles
        if not same or k.shape[2:] != q.shape[2:] or size % 2:
            return theirs(q, k, cos, sin)
        if {q.dtype, k.dtype, cos.dtype, sin.dtype} != {q.dtype}:
            return theirs(q, k, cos, sin)
        out = q.new_empty(q.shape), k.new_empty(k.shape)
        launch(Rotation(q, k, cos.contiguous(), sin.contiguous(), *out))
        return out

    return rotary


def _serves(x: torch.Tensor) -> bool:
    return x.dtype in HALF and (x.is_cuda or knobs.runtime.interpret)
