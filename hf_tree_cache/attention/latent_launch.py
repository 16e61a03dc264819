"""Launches of the kernel over latents: what it serves, its work list, its arguments."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from triton import knobs

from ..memory.storage import KVSpec, KVStorage
from ..sending import send
from .latent_kernel import latent_kernel, merge_kernel
from .plan import TreeAttentionPlan

KV, STAGES, WARPS = 32, 2, 8
LARGE_TILE = 64
"""Queries of a tile; a row's tail has its heads alone to fill one."""

WAVES = 2
"""Programs for each multiprocessor that the work is cut into, at least."""


def serves(q: torch.Tensor, storage: KVStorage, plan: TreeAttentionPlan) -> bool:
    """Whether the kernel can take these absorbed queries ``[B, H, T, R + P]``: a decode step in
    half precision, sizes that are powers of two, a GPU whose shared memory holds a tile."""
    spec = storage.spec
    sizes = (spec.k_head_dim, spec.v_head_dim, q.shape[1])
    return (
        (q.is_cuda or knobs.runtime.interpret)
        and spec.dtype in (torch.bfloat16, torch.float16)
        and plan.num_new == 1
        and all(plan.counts)
        and all(size >= 16 and not size & (size - 1) for size in sizes)
        and not storage.block_size & (storage.block_size - 1)
        and tile_bytes(spec) <= _shared_bytes(spec.device)
    )


def tile_bytes(spec: KVSpec) -> int:
    """Shared memory of a program: its queries, and latents of the tokens in flight."""
    width = spec.k_head_dim + spec.v_head_dim
    return (LARGE_TILE + STAGES * KV) * width * spec.dtype.itemsize


@cache
def _shared_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return 1 << 20
    properties = torch.cuda.get_device_properties(device)
    # AMD has no larger size to opt in to.
    least = properties.shared_memory_per_block
    return int(getattr(properties, "shared_memory_per_block_optin", least))


@cache
def _num_sms(device: torch.device) -> int:
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


@dataclass(frozen=True)
class _Work:
    """The list of one forward on the device, and how it is cut.

    Attributes:
        shared, own: int32 ``[items, 6]``, see ``latent_kernel``: of runs, and of tails.
        rows, numbers, ptr, slots: int32.
        num_slots: parts of single queries.
    """

    shared: torch.Tensor
    own: torch.Tensor
    rows: torch.Tensor
    numbers: torch.Tensor
    ptr: torch.Tensor
    slots: torch.Tensor
    num_slots: int


def tree_attention_absorbed(
    q: torch.Tensor, storage: KVStorage, layer: int, plan: TreeAttentionPlan, *, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode attention of absorbed queries over latents, each run read once for all its rows.

    Args:
        q: ``[B, H, 1, R + P]``.
        storage: holds latents ``[.., 1, R]`` as K and rotary parts ``[.., 1, P]`` as V.

    Returns:
        ``out [B, H, 1, R]`` in q's dtype, ``lse [B, H, 1]`` float32.
    """
    num_rows, heads = q.shape[:2]
    spec, device = storage.spec, storage.spec.device
    key = "latent kernel", heads, storage.index_key
    if key not in plan.scratch:
        plan.scratch[key] = _make_work(plan, storage, heads)
    work: _Work = plan.scratch[key]
    rank = spec.k_head_dim
    q = q.contiguous()
    part = torch.empty((work.num_slots, rank), dtype=torch.float32, device=device)
    part_lse = torch.empty(work.num_slots, dtype=torch.float32, device=device)
    out = q.new_empty((num_rows, heads, 1, rank))
    lse = torch.empty((num_rows, heads, 1), dtype=torch.float32, device=device)
    latents, rotary = storage.first_planes(layer)
    # Triton launches on the current device, which need not be the layer's.
    with torch.cuda.device(device) if q.is_cuda else nullcontext():
        for items, tile in ((work.shared, LARGE_TILE), (work.own, small_tile(heads))):
            if len(items):
                latent_kernel[(len(items),)](
                    q,
                    latents,
                    rotary,
                    part,
                    part_lse,
                    items,
                    work.rows,
                    work.numbers,
                    len(work.numbers) // 2,
                    scale * math.log2(math.e),
                    H=heads,
                    R=rank,
                    P=spec.v_head_dim,
                    S=storage.block_size,
                    M=tile,
                    KV=KV,
                    STAGES=STAGES,
                    PRECISION="ieee",
                    num_warps=WARPS,
                )
        merge_kernel[(num_rows, heads)](
            part, part_lse, out, lse, work.ptr, work.slots, H=heads, R=rank, num_warps=4
        )
    return out, lse


def small_tile(heads: int) -> int:
    return min(LARGE_TILE, heads)


def _make_work(plan: TreeAttentionPlan, storage: KVStorage, heads: int) -> _Work:
    """Cut runs and tails into items.

    Three rows under a run of 600 tokens, 16 heads, chunks of 512: items of 64 queries, the second
    chunk's slots behind the first's::

        run    queries  0..47 of 48   tokens   0..511   slots  0..47
               queries  0..47         tokens 512..599   slots 48..95
        tails  queries  0..15 of 16   tokens   0..6     slots 96..111   (row 0), ...
    """
    size, device = plan.block_size, storage.spec.device
    stretches = [(run.rows, run.blocks, len(run.blocks) * size) for run in plan.runs]
    ends = zip(plan.lengths, plan.tail_starts, plan.tail_blocks, strict=True)
    tails = [((row,), blocks, end - start) for row, (end, start, blocks) in enumerate(ends)]
    tiles = sum(-(-len(rows) * heads // LARGE_TILE) * count for rows, _, count in stretches)
    chunk = max(256, -(-tiles // (WAVES * _num_sms(device))))
    chunk = -(-chunk // max(KV, size)) * max(KV, size)
    lists: tuple[list[list[int]], list[list[int]]] = [], []
    row_list: list[int] = []
    block_list: list[int] = []
    slots_of: list[list[int]] = [[] for _ in plan.lengths]
    num_slots = 0
    for kind, found, tile in (
        (0, stretches, LARGE_TILE),
        (1, tails, small_tile(heads)),
    ):
        for rows, blocks, count in found:
            queries = len(rows) * heads
            for begin in range(0, count, chunk):
                tokens = min(chunk, count - begin)
                for first in range(0, queries, tile):
                    lists[kind].append(
                        [
                            len(row_list),
                            first,
                            min(first + tile, queries),
                            len(block_list) + begin // size,
                            tokens,
                            num_slots,
                        ]
                    )
                for place, row in enumerate(rows):
                    slots_of[row].append(num_slots + place * heads)
                num_slots += queries
            row_list += rows
            block_list += blocks
    k_numbers, v_numbers = storage.numbers_of(np.array(block_list, np.int64))
    ptr = np.cumsum([0, *map(len, slots_of)])

    def to_ints(values: object) -> torch.Tensor:
        return send(torch.from_numpy(np.asarray(values, np.int32)), device)

    return _Work(
        to_ints(lists[0]),
        to_ints(lists[1]),
        to_ints(row_list),
        to_ints(np.concatenate([k_numbers, v_numbers])),
        to_ints(ptr),
        to_ints([slot for slots in slots_of for slot in slots]),
        num_slots,
    )
