"""Rotary embedding: one launch where served, which may also store keys and values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, get_args

import torch

from ..memory.scatter import Slots
from ..overlap import can_overlap, launch_options
from .kernels import rotary_kernel
from .small import Norm, serves

Rotary = Callable[..., tuple[torch.Tensor, torch.Tensor]]

Angles = Literal["own", "first", "pair"]
ANGLES: tuple[Angles, ...] = get_args(Angles)


class Turn(NamedTuple):
    """How a model rotates: numbers of a head in pairs, by the angles of their position.

    Attributes:
        interleaved: pairs are neighbours; else the two halves of what is rotated.
        angles: "own", each number has one; "first", a pair has one, among the first half of them;
            "pair", there is one for each pair.
        partial: numbers beyond those that have angles stay as they are.
        wide: angles may be float32.
    """

    interleaved: bool = False
    angles: Angles = "own"
    partial: bool = False
    wide: bool = False

    def rotated(self, num_angles: int) -> int:
        """Numbers of a head that are rotated."""
        return num_angles * 2 if self.angles == "pair" else num_angles

    def serves(self, head_dim: int, num_angles: int) -> bool:
        """Whether that many angles may come with heads of that many numbers."""
        rotated = self.rotated(num_angles)
        return rotated % 2 == 0 and (rotated == head_dim or (self.partial and rotated < head_dim))


HALVES = Turn()
"""Most models."""


@dataclass(frozen=True, slots=True)
class Rotation:
    """Queries and keys, or either, that have still to be rotated, ``[B, H, 1, D]``, last stride 1.

    Attributes:
        q: queries, or what is rotated alone.
        k: keys; None where there is nothing else.
        cos, sin: ``[B, 1, angles]`` contiguous.
        q_out, k_out: where to, contiguous.
        turn: how.
        norms: those that ``q`` and ``k`` stand for, if they have not been written; else none.
    """

    q: torch.Tensor
    k: torch.Tensor | None
    cos: torch.Tensor
    sin: torch.Tensor
    q_out: torch.Tensor
    k_out: torch.Tensor | None
    turn: Turn = HALVES
    norms: tuple[Norm, ...] = ()

    def behind(self, norms: Sequence[Norm]) -> Rotation | None:
        """This one, of what norms have still to write; None if it is not of their results."""
        heads = [x for x in (self.q, self.k) if x is not None]
        if len(norms) != len(heads) or len({norm.more for norm in norms}) != 1:
            return None
        if not all(map(_is_of, heads, norms)):
            return None
        return replace(self, norms=tuple(norms))

    def write(self, values: torch.Tensor | None = None, slots: Slots | None = None) -> None:
        """Rotate; with ``values [B, Hkv, 1, Dv]``, also store these and the keys in ``slots``."""
        q, k, k_out = self.q, self.k, self.k_out
        # What is not used stands for what is not needed.
        num_tensors = 1 if k is None else 2
        k, k_out = (q if k is None else k), (self.q_out if k_out is None else k_out)
        strides = [q.stride(0), q.stride(1), k.stride(0), k.stride(1)]
        rows, num_q_heads, _, size = q.shape
        num_kv_heads = k.shape[1]
        heads, num_angles = max(num_q_heads, num_kv_heads), self.cos.shape[2]
        interleaved, angles, _, _ = self.turn
        pairs = self.turn.rotated(num_angles) // 2
        step, gap = (2, 1) if interleaved else (1, pairs)
        v = k if values is None else values
        v = v if v.stride(3) == 1 else v.contiguous()
        normed, more = (q, k, q, k, 0.0, 0.0), 0.0
        if self.norms:
            of_q, of_k = self.norms[0], self.norms[-1]
            q, k, more = of_q.x, of_k.x, of_q.more
            normed = (of_q.weight, of_k.weight, of_q.out, of_k.out, of_q.eps, of_k.eps)
            strides = [*of_q.layout[1:], *of_k.layout[1:]]
        overlap = can_overlap(q.device)
        with torch.cuda.device(q.device) if q.is_cuda else nullcontext():
            rotary_kernel[(rows, num_tensors)](
                q, k, *normed[:4], self.cos, self.sin, self.q_out, k_out, v,
                *((k, k, k, k, k, k) if slots is None else slots[:-1]),
                *strides, v.stride(0), v.stride(1), *normed[4:],
                HQ=num_q_heads, HKV=num_kv_heads, D=size, DV=v.shape[3],
                HEADS=1 << (heads - 1).bit_length(), HKVP=1 << (num_kv_heads - 1).bit_length(),
                DVP=1 << (v.shape[3] - 1).bit_length(), PAIRS=pairs, STEP=step, GAP=gap,
                PAIRSP=1 << (pairs - 1).bit_length(), ANGLES=num_angles,
                ANGLE_STEP=step if angles == "own" else 1, ANGLE_GAP=gap if angles == "own" else 0,
                RESTP=1 << (size - 2 * pairs - 1).bit_length() if 2 * pairs < size else 0,
                NORMED=bool(self.norms), MORE=more,
                S=1 if slots is None else slots.block_size, STORE=slots is not None,
                OVERLAP=overlap, num_warps=4, **launch_options(overlap),
            )  # fmt: skip


def _is_of(heads: torch.Tensor, norm: Norm) -> bool:
    """Whether ``heads [B, H, 1, D]`` are what ``norm`` has still to write."""
    _, count, _, size = heads.shape
    as_written = heads.stride(0) == count * size and heads.stride(1) == size
    same = heads.data_ptr() == norm.out.data_ptr() and heads.shape.numel() == norm.out.numel()
    return same and as_written and len(norm.weight) == size and norm.layout.heads == count


def make_rotary(
    theirs: Rotary, launch: Callable[[Rotation], None] = Rotation.write, turn: Turn = HALVES
) -> Rotary:
    """``theirs``, with one launch for decode steps.

    Args:
        theirs: of queries ``[B, Hq, T, D]``, keys ``[B, Hkv, T, D]``, and cosines and sines
            ``[B, T, angles]``; called wherever the kernel does not serve.
        launch: now, or before anybody reads the results.
        turn: what ``theirs`` does.
    """

    def rotary(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if args or kwargs or q.shape[2:] != k.shape[2:] or not _serves(turn, (q, k), cos, sin):
            return theirs(q, k, cos, sin, *args, **kwargs)
        out = q.new_empty(q.shape), k.new_empty(k.shape)
        launch(Rotation(q, k, cos.contiguous(), sin.contiguous(), *out, turn))
        return out

    return rotary


def make_rotary_of_one(
    theirs: Callable[..., torch.Tensor],
    launch: Callable[[Rotation], None] = Rotation.write,
    turn: Turn = HALVES,
) -> Callable[..., torch.Tensor]:
    """As :func:`make_rotary`, where queries and keys are rotated one after the other.

    Args:
        theirs: of ``x``, cosines and sines, and ``unsqueeze_dim``: 1 for ``x [B, H, T, D]``, 2 for
            ``[B, T, H, D]``.
    """

    def rotary(
        x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
    ) -> torch.Tensor:
        heads = x.transpose(1, 2) if unsqueeze_dim == 2 and x.ndim == 4 else x
        if unsqueeze_dim not in (1, 2) or not _serves(turn, (heads,), cos, sin):
            return theirs(x, cos, sin, unsqueeze_dim=unsqueeze_dim)
        out = x.new_empty(x.shape)  # of one token either way is as the other
        launch(Rotation(heads, None, cos.contiguous(), sin.contiguous(), out, None, turn))
        return out

    return rotary


def _serves(
    turn: Turn, tensors: Sequence[torch.Tensor], cos: torch.Tensor, sin: torch.Tensor
) -> bool:
    """Whether the kernel rotates ``tensors``, ``[B, H, 1, D]``, by these."""
    if not all(x.ndim == 4 and serves(x) and x.stride(-1) == 1 for x in tensors):
        return False
    rows, _, num_new, size = tensors[0].shape
    angles = (rows, 1, cos.shape[-1])
    if num_new != 1 or cos.shape != angles or sin.shape != angles:
        return False
    dtypes = {tensors[0].dtype, torch.float32} if turn.wide else {tensors[0].dtype}
    same = sin.dtype == cos.dtype and cos.dtype in dtypes
    return same and turn.serves(size, angles[2]) and len({x.dtype for x in tensors}) == 1
