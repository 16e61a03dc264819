"""Few rows through one or several linear layers at a time: what the kernel serves, one launch."""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache

import torch
from torch import nn
from triton import knobs

from .kernels import few_rows_kernel

MOST_ROWS = 64
"""With more rows a product is no longer bound by reading the weight."""

MOST_WEIGHTS = 3

TILE_K = 128
MOST_STAGES = 5
MOST_SHARED = 164 << 10
"""Bytes of a program; small GPUs have less."""

WIDE_TILE = 64
NARROW_TILE = 32
MOST_NARROW_TILES = 512
"""Outputs are cut into narrow tiles up to this number of them, to occupy the GPU."""


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
    size = weights[0].shape[1]
    rows = x.reshape(-1, size)
    widths = [len(weight) for weight in weights]
    y = x.new_empty(*x.shape[:-1], sum(widths))
    tile = NARROW_TILE if sum(widths) <= MOST_NARROW_TILES * NARROW_TILE else WIDE_TILE
    padded = max(16, 1 << (len(rows) - 1).bit_length())
    stage = (padded + tile) * TILE_K * x.element_size()
    missing = MOST_WEIGHTS - len(weights)
    w = weights + [weights[0]] * missing
    b = (biases + [biases[0]] * missing) if biases else w
    n = widths + [0] * missing
    grid = sum(-(-width // tile) for width in widths)
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
            TILE_N=tile,
            TILE_K=TILE_K,
            STAGES=min(MOST_STAGES, _shared_bytes(x.device) // stage),
            BIAS=bool(biases),
            PRECISION="ieee",
            num_warps=4,
        )
    return y


@cache
def _shared_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return MOST_SHARED
    properties = torch.cuda.get_device_properties(device)
    return min(MOST_SHARED, getattr(properties, "shared_memory_per_block_optin", 48 << 10))


@few_rows_linear.register_fake
def _(
    x: torch.Tensor,
    weights: list[torch.Tensor],
    biases: list[torch.Tensor],
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], sum(len(weight) for weight in weights))
