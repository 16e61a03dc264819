"""Few rows through one or several linear layers at a time: what the kernel serves, one launch."""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache
from typing import NamedTuple

import torch
from torch import nn
from triton import knobs

from ..overlap import can_overlap, launch_options
from .kernels import few_rows_kernel

MOST_ROWS = 64
"""With more rows a product is no longer bound by reading the weight."""

MOST_WEIGHTS = 3

MOST_SHARED = 200 << 10
"""Bytes of a program; small GPUs have less."""

AHEAD = 256
"""Columns of a weight that a program asks for while the kernel ahead ends."""


class Tile(NamedTuple):
    """Outputs and inputs that a program takes at a time, and how many such steps are on the way."""

    n: int
    k: int
    stages: int

    def shared_bytes(self, rows: int, weights: int = 1) -> int:
        return (rows + weights * self.n) * self.k * 2 * self.stages


TILES = {
    # for up to 16, 32 and 64 rows; measured on an H200, see docs/log.md
    "alone": (Tile(32, 256, 6), Tile(32, 256, 5), Tile(32, 128, 6)),
    "narrow": (Tile(32, 128, 5), Tile(32, 128, 5), Tile(32, 128, 4)),
    "wide": (Tile(128, 128, 3), Tile(128, 128, 3), Tile(128, 64, 4)),
    "gated": (Tile(64, 64, 4), Tile(64, 64, 4), Tile(64, 64, 4)),
}
"""By width: a program to a multiprocessor at most, a few, or so many that all are busy."""

NARROW = 512
"""Programs up to which a layer is narrow."""

FEW_STAGES = 3


def find_obstacle(layer: nn.Linear) -> str | None:
    """Why the kernel cannot serve ``layer``; None if it can, for up to :data:`MOST_ROWS` rows."""
    weight, bias = layer.weight, layer.bias
    if weight.device.type != "cuda" and not knobs.runtime.interpret:
        return f"its weight is on {weight.device.type}"
    if weight.dtype not in (torch.bfloat16, torch.float16):
        return f"its weight is {weight.dtype}"
    if not weight.is_contiguous() or weight.shape[1] % 8 or weight.data_ptr() % 16:
        return "rows of its weight are not aligned to 16 bytes"
    if bias is not None and (bias.dtype != weight.dtype or not bias.is_contiguous()):
        return "its bias has another dtype or is not contiguous"
    if torch.version.hip or (
        weight.is_cuda and torch.cuda.get_device_capability(weight.device)[0] < 8
    ):
        return "it is on a GPU where this was not tried"
    return None


@torch.library.custom_op("hf_tree_cache::few_rows_linear", mutates_args=())
def few_rows_linear(
    x: torch.Tensor,
    weights: list[torch.Tensor],
    biases: list[torch.Tensor],
) -> torch.Tensor:
    """``x`` through linear layers with the same input, side by side.

    Args:
        x: ``[..., K]``, of at most :data:`MOST_ROWS` rows.
        weights: one to three, each ``[N_i, K]`` contiguous, bfloat16 or float16.
        biases: as many, each ``[N_i]``; or none.

    Returns:
        ``[..., sum of N_i]``, accumulated in float32.
    """
    y = x.new_empty(*x.shape[:-1], sum(len(weight) for weight in weights))
    _launch(x, y, weights, biases)
    return y


@torch.library.custom_op("hf_tree_cache::few_rows_gated", mutates_args=())
def few_rows_gated(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """``silu(x gate^T) * (x up^T)``, rounded once.

    Args:
        x: ``[..., K]``, of at most :data:`MOST_ROWS` rows.
        gate, up: ``[N, K]`` contiguous, bfloat16 or float16.

    Returns:
        ``[..., N]``.
    """
    y = x.new_empty(*x.shape[:-1], len(gate))
    _launch(x, y, [gate, up], [], gated=True)
    return y


def _launch(
    x: torch.Tensor,
    y: torch.Tensor,
    weights: list[torch.Tensor],
    biases: list[torch.Tensor],
    *,
    gated: bool = False,
) -> None:
    size = weights[0].shape[1]
    rows = x.reshape(-1, size)
    widths = [len(weight) for weight in weights]
    padded = max(16, 1 << (len(rows) - 1).bit_length())
    if gated:
        widths[1] = 0
    tile = choose_tile(padded, sum(widths), size, _gpu(x.device), gated=gated)
    missing = MOST_WEIGHTS - len(weights)
    w = weights + [weights[0]] * missing
    b = (biases + [biases[0]] * missing) if biases else w
    n = widths + [0] * missing
    grid = sum(-(-width // tile.n) for width in widths)
    overlap = can_overlap(x.device)
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        few_rows_kernel[(grid,)](
            rows.contiguous(),
            *w,
            *b,
            y,
            len(rows),
            *n,
            K=size,
            ROWS=padded,
            TILE_N=tile.n,
            TILE_K=tile.k,
            STAGES=tile.stages,
            BIAS=bool(biases),
            GATED=gated,
            PRECISION="ieee",
            OVERLAP=overlap,
            AHEAD=AHEAD,
            num_warps=4,
            **launch_options(overlap),
        )


class Gpu(NamedTuple):
    """Multiprocessors, and bytes of shared memory that a program may have."""

    processors: int
    shared: int


def choose_tile(rows: int, width: int, size: int, gpu: Gpu, *, gated: bool = False) -> Tile:
    """For ``rows`` (16, 32 or 64), ``width`` outputs and ``size`` inputs."""
    if gated:
        kind = "gated"
    elif width <= NARROW * TILES["narrow"][0].n:
        kind = "alone" if width <= gpu.processors * TILES["alone"][0].n else "narrow"
    else:
        kind = "wide"
    tile = TILES[kind][{16: 0, 32: 1, 64: 2}[rows]]
    while tile.k > 64 and size % tile.k:
        tile = Tile(tile.n, tile.k // 2, tile.stages)
    weights = 1 + gated
    while tile.shared_bytes(rows, weights) > gpu.shared:
        if tile.stages > FEW_STAGES:
            tile = tile._replace(stages=tile.stages - 1)
        elif tile.k > 64:
            tile = tile._replace(k=tile.k // 2)
        else:
            tile = tile._replace(n=tile.n // 2)
    return tile


@cache
def _gpu(device: torch.device) -> Gpu:
    if device.type != "cuda":
        return Gpu(132, MOST_SHARED)
    properties = torch.cuda.get_device_properties(device)
    shared = getattr(properties, "shared_memory_per_block_optin", 48 << 10)
    return Gpu(properties.multi_processor_count, min(MOST_SHARED, shared))


@few_rows_linear.register_fake
def _(
    x: torch.Tensor,
    weights: list[torch.Tensor],
    biases: list[torch.Tensor],
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], sum(len(weight) for weight in weights))


@few_rows_gated.register_fake
def _(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], len(gate))
