"""TreeAttentionPlan: which rows read which blocks in one forward. Built once, for all layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from ..memory.growth import Grown, Longs, Node
from ..memory.tree import BranchTree

Position = TypeVar("Position", int, torch.Tensor, npt.NDArray[np.int64])

RUN_TOKENS = 512
"""A stretch of one row from here on has a product of its own, not a place in the padded tails."""

FOLD_TOKENS = 64
"""Reading a shared stretch once must save at least this many token reads, or it joins the tails."""


@dataclass(frozen=True, slots=True)
class Window:
    """What a query may look back to.

    Attributes:
        kind: "sliding": the last ``size`` tokens, itself included; "chunked": those of its own
            chunk of ``size`` tokens, counted from the row's first token.
        size: in tokens.
    """

    kind: Literal["sliding", "chunked"]
    size: int

    def first_visible(self, position: Position) -> Position:
        """First position that a query at ``position`` (an int, or an array) sees."""
        if self.kind == "sliding":
            return position - (self.size - 1)
        return position // self.size * self.size


@dataclass(frozen=True, slots=True)
class Run:
    """Full blocks that the same rows read, all tokens visible to all their queries but for a
    window.

    Attributes:
        rows: ascending row numbers.
        start: position of the first token.
        blocks: physical blocks in the order of the tokens.
    """

    rows: tuple[int, ...]
    start: int
    blocks: tuple[int, ...]


@dataclass(frozen=True)
class _Stretches:
    """Runs and tails, see :class:`TreeAttentionPlan`; ``lengths`` of when they were made."""

    runs: tuple[Run, ...]
    tail_starts: tuple[int, ...]
    tail_blocks: tuple[tuple[int, ...], ...]
    lengths: tuple[int, ...]

    @property
    def max_tail(self) -> int:
        ends = zip(self.lengths, self.tail_starts, strict=True)
        return max((length - start for length, start in ends), default=0)


class Buffers(dict[Any, Any]):
    """What a backend keeps from one plan to the next. A copy of the cache starts anew."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Buffers:
        return Buffers()


@dataclass(frozen=True)
class TreeAttentionPlan:
    """One forward's work list, in token positions of each row (padding has no position).

    Every token of a row is in exactly one of its runs or in its tail; the new tokens are in the
    tail. A prompt of 36 tokens, forked in three that have 3, 1 and 2 more, with ``block_size`` 16::

        runs    rows (0, 1, 2)  start 0   blocks (0, 1)            positions  0..31, read once
        tails   row 0           start 32  blocks (3,)  length 39   positions 32..38, block copied
                row 1           start 32  blocks (4,)  length 37   positions 32..36, block copied
                row 2           start 32  blocks (2,)  length 38   positions 32..37, last owner

    Runs and tails are found when a backend first asks for them; the fused kernel cuts the tree in
    its own way and never does. Either reads ``tree``, so a plan serves only until the tree changes.

    Attributes:
        tree: as it is during this forward.
        num_new: T, query columns of the forward; row b uses the last ``counts[b]`` of them.
        counts: new tokens of each row.
        ended: tokens of each row, the new ones included, where not every row got one.
        grown: the rows where every one of them got one token.
        topology_version: of the tree during this forward.
        deterministic: a row's result must not depend on the other rows, bit for bit.
        scratch: what a backend derives from the plan and keeps for the other layers.
        buffers: what a backend keeps from one plan of a cache to the next.
        families: what is remembered of small subtrees from one plan to the next, see
            :mod:`.outline`.
    """

    tree: BranchTree = field(repr=False, compare=False)
    num_new: int
    counts: tuple[int, ...]
    ended: tuple[int, ...] | None
    grown: Grown | None
    topology_version: int
    deterministic: bool = False
    scratch: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)
    buffers: Buffers = field(default_factory=Buffers, repr=False, compare=False)
    families: Buffers = field(default_factory=Buffers, repr=False, compare=False)
    _kept: _Stretches | None = field(default=None, repr=False, compare=False)

    @property
    def block_size(self) -> int:
        """Token slots of a block."""
        return self.tree.block_size

    @property
    def num_rows(self) -> int:
        return len(self.counts)

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each row, the new ones included."""
        return tuple(self.ends.tolist()) if self.ended is None else self.ended

    @property
    def ends(self) -> Longs:
        """``lengths`` as int64 ``[B]``."""
        return np.array(self.ended, np.int64) if self.grown is None else self.grown.lengths

    @property
    def runs(self) -> tuple[Run, ...]:
        """Shared (or long) stretches of full blocks."""
        return self._stretches.runs

    @property
    def tail_starts(self) -> tuple[int, ...]:
        """Position of each row's first tail token, a multiple of ``block_size``."""
        return self._stretches.tail_starts

    @property
    def tail_blocks(self) -> tuple[tuple[int, ...], ...]:
        """Physical blocks of each row's tail."""
        return self._stretches.tail_blocks

    @property
    def max_tail(self) -> int:
        """Tokens of the longest tail."""
        return self._stretches.max_tail

    def tokens_read(self) -> int:
        """Tokens that one layer reads in this forward; dense attention reads ``sum(lengths)``."""
        runs = sum(len(run.blocks) * self.block_size for run in self.runs)
        return runs + sum(self.lengths) - sum(self.tail_starts)

    def check_fresh(self) -> None:
        """The tree is still the one that was planned for."""
        assert self.tree.topology_version == self.topology_version, "the tree has changed"
        if self.grown is None:
            assert tuple(self.tree.row_lengths()) == self.ended, "the rows have grown"
        else:
            assert self.tree.grown == self.grown, "the rows have grown"

    @cached_property
    def _stretches(self) -> _Stretches:
        self.check_fresh()
        size, lengths, kept = self.block_size, self.lengths, self._kept
        if kept is not None and kept.max_tail < 2 * RUN_TOKENS:
            runs, starts = kept.runs, kept.tail_starts
            known, was = kept.tail_blocks, kept.lengths
        else:
            runs, starts = _find_runs(self.tree, self.counts)
            known, was = ((),) * len(lengths), (0,) * len(lengths)
        # A tip that grew within its last block has the blocks it had.
        tails = tuple(
            blocks
            if blocks and -(-length // size) == -(-before // size)
            else tuple(_blocks_from(self.tree, tip, start))
            for tip, start, length, blocks, before in zip(
                self.tree.tips(), starts, lengths, known, was, strict=True
            )
        )
        return _Stretches(runs, starts, tails, lengths)


def build_plan(
    tree: BranchTree,
    counts: Sequence[int] | None,
    num_new: int,
    previous: TreeAttentionPlan | None = None,
    *,
    deterministic: bool = False,
) -> TreeAttentionPlan:
    """Plan the forward whose ``counts[b]`` new tokens were just appended to each row of ``tree``.

    While only tips grow, the runs of ``previous`` are kept and only tails are read from the tree.

    Args:
        counts: new tokens of each row; None for one each.
        num_new: T, columns of the forward, at least ``max(counts)``.
        previous: the plan of the forward before, if any.
        deterministic: a row's result must not depend on the other rows, bit for bit.
    """
    kept, scratch = None, {}
    if previous is not None and previous.topology_version == tree.topology_version:
        kept = previous.__dict__.get("_stretches", previous._kept)
        if kept is not None and kept.max_tail < 2 * RUN_TOKENS:
            scratch = {k: v for k, v in previous.scratch.items() if isinstance(k[0], Run)}
    grown = tree.grown
    assert grown is not None or counts is not None
    return TreeAttentionPlan(
        tree=tree,
        num_new=num_new,
        counts=tuple(counts or ()) if grown is None else grown.growth.counts,
        ended=tuple(tree.row_lengths()) if grown is None else None,
        grown=grown,
        topology_version=tree.topology_version,
        deterministic=deterministic,
        scratch=scratch,
        buffers=Buffers() if previous is None else previous.buffers,
        families=Buffers() if previous is None else previous.families,
        _kept=kept,
    )


def _find_runs(tree: BranchTree, counts: Sequence[int]) -> tuple[tuple[Run, ...], tuple[int, ...]]:
    """The stretches worth reading apart, and where each row's tail begins behind them."""
    size = tree.block_size
    paths = [tree.path(branch) for branch in tree.rows]
    rows_of: dict[Node, list[int]] = {}
    for row, path in enumerate(paths):
        for node in path:
            rows_of.setdefault(node, []).append(row)

    def stretch(node: Node) -> tuple[int, int]:
        # A node with children was left by all that append: only leaves hold new tokens.
        new = 0 if node.children else max(counts[row] for row in rows_of[node])
        return node.start // size * size, (node.end - new) // size * size

    kept: set[Node] = set()
    for node, rows in rows_of.items():
        start, end = stretch(node)
        if (len(rows) - 1) * (end - start) >= FOLD_TOKENS or end - start >= RUN_TOKENS:
            while node.parent is not None and node not in kept:
                kept.add(node)
                node = node.parent

    runs = []
    for node, rows in rows_of.items():
        start, end = stretch(node)
        if node in kept and start < end:
            runs.append(Run(tuple(rows), start, tuple(node.blocks[: (end - start) // size])))
    starts = tuple(
        max((stretch(node)[1] for node in path if node in kept), default=0) for path in paths
    )
    return tuple(runs), starts


def _blocks_from(tree: BranchTree, node: Node, position: int) -> list[int]:
    """Blocks on the path of ``node`` that hold the tokens from ``position`` (block-aligned) on."""
    size = tree.block_size
    pieces: list[Sequence[int]] = []
    limit = -(-node.end // size)
    while node.parent is not None and limit * size > position:
        first = node.start // size
        skip = max(0, position // size - first)
        pieces.append(node.blocks[skip : limit - first])
        limit = first
        node = node.parent
    return [block for piece in reversed(pieces) for block in piece]
