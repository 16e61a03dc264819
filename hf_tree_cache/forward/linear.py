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

ACTIVATIONS = ("silu", "gelu_tanh", "gelu")
"""Of gated units; the second is the third by its formula with tanh."""

MOST_SHARED = 200 << 10
"""Bytes of a program; small GPUs have less."""

AHEAD = 256
"""Columns of a weight that a program asks for while the kernel ahead ends."""


class Tile(NamedTuple):
    """What a program takes at a time, and how many such steps are on the way.

    Attributes:
        rows: of the batch, padded.
        n: outputs, of each weight.
        k: inputs.
    """

    rows: int
    n: int
    k: int
    stages: int

    def shared_bytes(self, weights: int = 1) -> int:
        return (self.rows + weights * self.n) * self.k * 2 * self.stages


TILES = {
    # for up to 16, 32 and 64 rows; measured on an H200, see docs/log.md
    "narrow": (Tile(16, 32, 256, 6), Tile(64, 16, 256, 4), Tile(64, 16, 256, 4)),
    "alone": (Tile(16, 32, 256, 6), Tile(64, 32, 128, 6), Tile(64, 32, 128, 6)),
    "large": (Tile(16, 64, 128, 6), Tile(64, 64, 128, 6), Tile(64, 64, 128, 6)),
    "wide": (Tile(16, 128, 128, 5), Tile(32, 128, 128, 4), Tile(64, 128, 128, 4)),
    "gated": (Tile(16, 64, 128, 5), Tile(32, 64, 128, 4), Tile(64, 64, 128, 4)),
    "uneven": (Tile(16, 64, 64, 4), Tile(32, 64, 64, 4), Tile(64, 64, 64, 4)),
}
"""By kind of layer: a program of 16, of 32, or of 64 outputs to a multiprocessor at most; more.
Gated ones, and those of them that would keep only some multiprocessors busy a second time, so that
two programs must fit one."""

UNEVEN = 1.5
"""Programs to a multiprocessor, up to which a second wave is mostly idle."""

FEW_STAGES = 3


def find_obstacle(layer: nn.Linear) -> str | None:
    """Why the kernel cannot serve ``layer``; None if it can, for up to :data:`MOST_ROWS` rows."""
    weight, bias = layer.weight, layer.bias
    if bias is not None and (bias.dtype != weight.dtype or not bias.is_contiguous()):
        return "its bias has another dtype or is not contiguous"
    return find_weight_obstacle(weight)


def find_weight_obstacle(weight: torch.Tensor) -> str | None:
    """As :func:`find_obstacle`, of a ``[..., N, K]`` weight alone."""
    if weight.device.type != "cuda" and not knobs.runtime.interpret:
        return f"its weight is on {weight.device.type}"
    if weight.dtype not in (torch.bfloat16, torch.float16):
        return f"its weight is {weight.dtype}"
    if not weight.is_contiguous() or weight.shape[-1] % 8 or weight.data_ptr() % 16:
        return "rows of its weight are not aligned to 16 bytes"
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
def few_rows_gated(
    x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str = "silu"
) -> torch.Tensor:
    """``activation(x gate^T) * (x up^T)``, rounded once.

    Args:
        x: ``[..., K]``, of at most :data:`MOST_ROWS` rows.
        gate, up: ``[N, K]`` contiguous, bfloat16 or float16.
        activation: one of :data:`ACTIVATIONS`.

    Returns:
        ``[..., N]``.
    """
    y = x.new_empty(*x.shape[:-1], len(gate))
    _launch(x, y, [gate, up], [], activation=activation)
    return y


def _launch(
    x: torch.Tensor,
    y: torch.Tensor,
    weights: list[torch.Tensor],
    biases: list[torch.Tensor],
    *,
    activation: str | None = None,
) -> None:
    gated = activation is not None
    size = weights[0].shape[1]
    rows = x.reshape(-1, size)
    widths = [len(weight) for weight in weights]
    if gated:
        widths[1] = 0
    tile = choose_tile(len(rows), sum(widths), size, gpu_of(x.device), gated=gated)
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
            ROWS=tile.rows,
            TILE_N=tile.n,
            TILE_K=tile.k,
            STAGES=tile.stages,
            BIAS=bool(biases),
            ACTIVATION=activation,
            PRECISION="ieee",
            OVERLAP=overlap,
            AHEAD=AHEAD,
            num_warps=4,
            **launch_options(overlap),
        )


class Gpu(NamedTuple):
    """What tiles depend on.

    Attributes:
        processors: multiprocessors.
        shared: bytes of shared memory that a program may have.
        multiplies_64: it has products of 64 rows, which cost no more than those of 32.
    """

    processors: int
    shared: int
    multiplies_64: bool = True


def choose_tile(rows: int, width: int, size: int, gpu: Gpu, *, gated: bool = False) -> Tile:
    """For 1 to :data:`MOST_ROWS` rows, ``width`` outputs and ``size`` inputs."""
    narrow, alone, large = (TILES[kind][-1].n for kind in ("narrow", "alone", "large"))
    if gated:
        programs = -(-width // TILES["gated"][0].n)
        is_uneven = gpu.processors < programs <= UNEVEN * gpu.processors
        kind = "uneven" if is_uneven else "gated"
    else:
        kinds = {narrow: "narrow", alone: "alone", large: "large"}
        kind = next((k for n, k in kinds.items() if width <= gpu.processors * n), "wide")
    padded = max(16, 1 << (rows - 1).bit_length())
    tile = TILES[kind][{16: 0, 32: 1, 64: 2}[padded]]
    if not gpu.multiplies_64:
        tile = tile._replace(rows=padded)
    return fit(tile, size, gpu.shared, weights=1 + gated)


def fit(tile: Tile, size: int, shared: int, *, weights: int = 1) -> Tile:
    """``tile``, or less of it, for ``size`` inputs of so many weights in so many bytes."""
    while tile.k > 64 and size % tile.k:
        # As many bytes on the way as before, and no more programs to a multiprocessor.
        tile = tile._replace(k=tile.k // 2, stages=tile.stages * 2)
    while tile.shared_bytes(weights) > shared:
        if tile.stages > FEW_STAGES:
            tile = tile._replace(stages=tile.stages - 1)
        elif tile.k > 64:
            tile = tile._replace(k=tile.k // 2)
        else:
            tile = tile._replace(n=tile.n // 2)
    return tile


@cache
def gpu_of(device: torch.device) -> Gpu:
    """Of ``device``; without one, as an H200."""
    if device.type != "cuda":
        return Gpu(132, MOST_SHARED)
    properties = torch.cuda.get_device_properties(device)
    shared = getattr(properties, "shared_memory_per_block_optin", 48 << 10)
    is_hopper = properties.major == 9
    return Gpu(properties.multi_processor_count, min(MOST_SHARED, shared), is_hopper)


@few_rows_linear.register_fake
def _(
    x: torch.Tensor,
    weights: list[torch.Tensor],
    biases: list[torch.Tensor],
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], sum(len(weight) for weight in weights))


@few_rows_gated.register_fake
def _(
    x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str = "silu"
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], len(gate))
