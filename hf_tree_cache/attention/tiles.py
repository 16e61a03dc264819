"""Tiles: the sizes that a launch of the fused kernel is compiled for, and planned with."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Tiles:
    """One compilation of the kernel, and how work is cut for it.

    Attributes:
        m_small, m_large: rows (queries x heads of a group) of the two tile classes.
        kv_small, kv_large: tokens of a step of their loops.
        stages_small, stages_large: how many steps are loaded ahead.
        num_warps: warps of a program.
        max_registers: of a thread; 0 leaves it to the compiler.
        programs_per_sm: resident at a time, with these registers and stages.
        merge_rows, merge_parts: queries x heads, and parts, that a merge loads at a time; twice and
            half of that where no query has many parts.
        waves: how many times over the programs of split work should fill the GPU.
        min_chunk: tokens below which work is not split.
        item_cost: what starting an item costs, in tokens of the small class.
        large_cost: a token of the large class, in tokens of the small class.
        deterministic: cuts and arithmetic of a row do not depend on what else is in the batch.
    """

    m_small: int = 16
    m_large: int = 64
    kv_small: int = 64
    kv_large: int = 32
    stages_small: int = 3
    stages_large: int = 3
    num_warps: int = 4
    max_registers: int = 0
    programs_per_sm: int = 2
    merge_rows: int = 8
    merge_parts: int = 8
    waves: float = 1.15
    min_chunk: int = 128
    item_cost: int = 200
    large_cost: float = 1.25
    deterministic: bool = False


@dataclass(frozen=True, slots=True)
class TileSet:
    """Tiles of one GPU, dtype and head size.

    Attributes:
        mixed: for lists with both classes of items.
        small: for lists without large ones: nothing is shared by more than a small tile.
    """

    mixed: Tiles
    small: Tiles


TABLE: dict[tuple[str, int, int], TileSet] = {
    ("sm_90", 2, 128): TileSet(
        mixed=Tiles(max_registers=168, programs_per_sm=3),
        small=Tiles(stages_small=2, programs_per_sm=4),
    ),
}
"""By architecture, bytes of an element, and the larger head dim, padded to a power of two."""


def tiles_for(arch: str, itemsize: int, head_dim: int) -> TileSet:
    """The tiles of ``arch``, or of the nearest one that we know."""
    return TABLE[("sm_90", 2, 128)]
