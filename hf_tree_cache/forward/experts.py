"""Few rows through sparse experts: who chooses, four launches, and what they serve."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton

from ..overlap import can_overlap, launch_options
from .experts_kernel import add_up_kernel, experts_kernel, list_items_kernel, route_kernel
from .linear import Tile, find_weight_obstacle, fit, gpu_of

MOST_PAIRS = 4096
"""Of a row and an expert that it chose; a program looks through all of them."""

MOST_EACH = 64
"""Pairs of an expert, on average, up to which reading its weight takes longer than multiplying."""

MANY_EACH = 16
"""From here on products take larger tiles."""

TILES = {
    # up to MANY_EACH pairs of an expert, on average; more. Measured on an H200, see docs/log.md
    "gated": (Tile(32, 64, 128, 3), Tile(64, 64, 64, 4)),
    "down": (Tile(32, 128, 128, 3), Tile(64, 128, 64, 4)),
}

MOST_ROUTED, MOST_TOP = 1024, 32
"""Experts that a program holds, and that it chooses one after the other."""

ADDED = 1024
"""Numbers of a row that a program adds up."""


def find_obstacle(gate_up: torch.Tensor, down: torch.Tensor) -> str | None:
    """Why the kernels cannot serve experts with these weights; None if they can."""
    for weight in (gate_up, down):
        obstacle = find_weight_obstacle(weight)
        if obstacle is not None or weight.ndim != 3:
            return obstacle or f"a weight has {weight.ndim} dimensions"
    experts, width, size = down.shape
    if gate_up.shape != (experts, 2 * size, width) or gate_up.dtype != down.dtype:
        return f"weights of {tuple(gate_up.shape)} and {tuple(down.shape)} do not match"
    if 2 * size * width >= 1 << 31:
        return "an expert has too many weights"
    return None


@torch.library.custom_op("hf_tree_cache::route", mutates_args=())
def route(
    logits: torch.Tensor, top: int, normed: bool, wide: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The experts of largest softmax for each row, and their shares.

    Args:
        logits: ``[rows, E]`` contiguous, of at most :data:`MOST_ROUTED` experts.
        top: experts for each row, at most :data:`MOST_TOP`.
        normed: shares of those that are chosen sum up to 1.
        wide: shares in float32, else in the dtype of ``logits``.

    Returns:
        Shares ``[rows, top]``, the largest first; int64 ``[rows, top]``.
    """
    rows, num_experts = logits.shape
    shares = logits.new_empty(rows, top, dtype=torch.float32 if wide else logits.dtype)
    chosen = logits.new_empty(rows, top, dtype=torch.int64)
    overlap = can_overlap(logits.device)
    with torch.cuda.device(logits.device) if logits.is_cuda else nullcontext():
        route_kernel[(rows,)](
            logits, shares, chosen, num_experts,
            EXPERTS=triton.next_power_of_2(num_experts), TOP=top,
            TOP_PADDED=triton.next_power_of_2(top), NORMED=normed, OVERLAP=overlap, num_warps=1,
            **launch_options(overlap),
        )  # fmt: skip
    return shares, chosen


@torch.library.custom_op("hf_tree_cache::few_rows_experts", mutates_args=())
def few_rows_experts(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    chosen: torch.Tensor,
    shares: torch.Tensor,
) -> torch.Tensor:
    """Each row through the experts that it chose, weighted and added up in float32.

    Args:
        x: ``[rows, H]``, bfloat16 or float16 as the weights.
        gate_up: ``[E, 2 I, H]`` contiguous, gates first; their activation is silu.
        down: ``[E, H, I]`` contiguous.
        chosen: ``[rows, top]`` integers below E, as many as :func:`is_small` allows.
        shares: ``[rows, top]``.

    Returns:
        ``[rows, H]``.
    """
    rows, top = chosen.shape
    num_experts, width, size = down.shape
    num_pairs = rows * top
    tiles = choose_tiles(num_pairs, num_experts, width, size, gpu_of(x.device).shared)
    (each,) = {tile.rows for tile in tiles}
    most = num_items(num_pairs, num_experts, each)
    ints = chosen.new_empty(1 + num_pairs + 3 * most, dtype=torch.int32)
    count, pairs, items = ints.split([1, num_pairs, 3 * most])
    hidden = x.new_empty(num_pairs, size)
    parts = x.new_empty(num_pairs, width, dtype=torch.float32)
    y = x.new_empty(rows, width)
    overlap = can_overlap(x.device)
    options = launch_options(overlap)
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        list_items_kernel[(num_experts,)](
            chosen.contiguous(), pairs, items, count, num_pairs, num_experts,
            PAIRS=max(16, triton.next_power_of_2(num_pairs)),
            EXPERTS=triton.next_power_of_2(num_experts + 1), ROWS=each,
            ITEMS=triton.next_power_of_2(triton.cdiv(num_pairs, each)), OVERLAP=overlap,
            num_warps=4, **options,
        )  # fmt: skip
        for rows_in, weight, out, tile in zip(
            (x.contiguous(), hidden), (gate_up, down), (hidden, parts), tiles, strict=True
        ):
            experts_kernel[(triton.cdiv(out.shape[1], tile.n), most)](
                rows_in, weight, pairs, items, count, shares.contiguous(), out,
                N=out.shape[1], K=rows_in.shape[1], TOP=top, ROWS=each, TILE_N=tile.n,
                TILE_K=tile.k, STAGES=tile.stages, GATED=out is hidden, PRECISION="ieee",
                OVERLAP=overlap, num_warps=4, **options,
            )  # fmt: skip
        add_up_kernel[(rows, triton.cdiv(width, ADDED))](
            parts, y, N=width, TOP=top, TILE=ADDED, OVERLAP=overlap, num_warps=4, **options
        )
    return y


def is_small(num_pairs: int, num_experts: int) -> bool:
    """Whether so many pairs are few enough for the kernels to be the faster way."""
    return num_pairs <= min(MOST_PAIRS, MOST_EACH * num_experts)


def num_items(num_pairs: int, num_experts: int, each: int) -> int:
    """Most items of up to ``each`` pairs of one expert."""
    hit = min(num_pairs, num_experts)
    return hit + (num_pairs - hit) // each


def choose_tiles(
    num_pairs: int, num_experts: int, width: int, size: int, shared: int
) -> tuple[Tile, Tile]:
    """Of both projections, in so many bytes of shared memory for a program."""
    are_many = num_pairs >= MANY_EACH * num_experts
    gated, down = (tiles[are_many] for tiles in TILES.values())
    return fit(gated, width, shared, weights=2), fit(down, size, shared)


@few_rows_experts.register_fake
def _(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    chosen: torch.Tensor,
    shares: torch.Tensor,
) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@route.register_fake
def _(
    logits: torch.Tensor, top: int, normed: bool, wide: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = len(logits), top
    dtype = torch.float32 if wide else logits.dtype
    return logits.new_empty(shape, dtype=dtype), logits.new_empty(shape, dtype=torch.int64)
