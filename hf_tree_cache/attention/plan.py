"""TreeAttentionPlan: which rows read which blocks in one forward. Built once, for all layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch

from ..memory.tree import BranchTree, Node

Position = TypeVar("Position", int, torch.Tensor)

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
        """First position that a query at ``position`` (an int or a tensor of them) sees."""
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
class TreeAttentionPlan:
    """One forward's work list, in token positions of each row (padding has no position).

    Every token of a row is in exactly one of its runs or in its tail; the new tokens are in the
    tail. A prompt of 36 tokens, forked in three that have 3, 1 and 2 more, with ``block_size`` 16::

        runs    rows (0, 1, 2)  start 0   blocks (0, 1)            positions  0..31, read once
        tails   row 0           start 32  blocks (3,)  length 39   positions 32..38, block copied
                row 1           start 32  blocks (4,)  length 37   positions 32..36, block copied
                row 2           start 32  blocks (2,)  length 38   positions 32..37, last owner

    Attributes:
        block_size: token slots of a block.
        num_new: T, query columns of the forward; row b uses the last ``counts[b]`` of them.
        lengths: tokens of each row, the new ones included.
        counts: new tokens of each row.
        runs: shared (or long) stretches of full blocks.
        tail_starts: position of each row's first tail token, a multiple of ``block_size``.
        tail_blocks: physical blocks of each row's tail.
        topology_version: of the tree, when the runs were made.
        scratch: what a backend derives from the plan and keeps for the other layers.
    """

    block_size: int
    num_new: int
    lengths: tuple[int, ...]
    counts: tuple[int, ...]
    runs: tuple[Run, ...]
    tail_starts: tuple[int, ...]
    tail_blocks: tuple[tuple[int, ...], ...]
    topology_version: int
    scratch: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def num_rows(self) -> int:
        return len(self.lengths)

    @property
    def max_tail(self) -> int:
        """Tokens of the longest tail."""
        ends = zip(self.lengths, self.tail_starts, strict=True)
        return max((length - start for length, start in ends), default=0)

    def tokens_read(self) -> int:
        """Tokens that one layer reads in this forward; dense attention reads ``sum(lengths)``."""
        runs = sum(len(run.blocks) * self.block_size for run in self.runs)
        return runs + sum(self.lengths) - sum(self.tail_starts)


def build_plan(
    tree: BranchTree, counts: Sequence[int], num_new: int, previous: TreeAttentionPlan | None = None
) -> TreeAttentionPlan:
    """Plan the forward whose ``counts[b]`` new tokens were just appended to each row of ``tree``.

    While only tips grow, the runs of ``previous`` are kept and only tails are read from the tree.

    Args:
        counts: new tokens of each row.
        num_new: T, columns of the forward, at least ``max(counts)``.
        previous: the plan of the forward before, if any.
    """
    size, lengths = tree.block_size, tree.row_lengths()
    if (
        previous is not None
        and previous.topology_version == tree.topology_version
        and previous.max_tail < 2 * RUN_TOKENS
    ):
        runs, starts, scratch = previous.runs, previous.tail_starts, previous.scratch
        scratch = {key: value for key, value in scratch.items() if isinstance(key[0], Run)}
        known, was = previous.tail_blocks, previous.lengths
    else:
        runs, starts = _find_runs(tree, counts)
        scratch = {}
        known, was = ((),) * len(lengths), (0,) * len(lengths)
    # A tip that grew within its last block has the blocks it had.
    tails = tuple(
        blocks
        if blocks and -(-length // size) == -(-before // size)
        else tuple(_blocks_from(tree, tip, start))
        for tip, start, length, blocks, before in zip(
            tree.tips(), starts, lengths, known, was, strict=True
        )
    )
    return TreeAttentionPlan(
        block_size=size,
        num_new=num_new,
        lengths=tuple(lengths),
        counts=tuple(counts),
        runs=runs,
        tail_starts=starts,
        tail_blocks=tails,
        topology_version=tree.topology_version,
        scratch=scratch,
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
    pieces: list[list[int]] = []
    limit = -(-node.end // size)
    while node.parent is not None and limit * size > position:
        first = node.start // size
        skip = max(0, position // size - first)
        pieces.append(node.blocks[skip : limit - first])
        limit = first
        node = node.parent
    return [block for piece in reversed(pieces) for block in piece]
