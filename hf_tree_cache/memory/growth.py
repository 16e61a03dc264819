"""How a tree grows: runs of tokens, rows that grow together, and what an append decided."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

Longs = npt.NDArray[np.int64]


class Clock:
    """Tokens that rows have got since they began to grow together."""

    __slots__ = ("tokens",)

    def __init__(self) -> None:
        self.tokens = 0


STILL = Clock()


class Node:
    """A maximal run of tokens shared by one set of branches: positions ``start`` to ``end``.

    ``blocks[i]`` holds the tokens of logical block ``start // block_size + i`` of every branch
    below. A first block that begins before ``start`` also holds the ancestors' tokens of that
    block, either because it was copied on write or because its last owner took it over.
    """

    __slots__ = ("_base", "_clock", "blocks", "children", "parent", "refs", "start", "version")

    def __init__(self, parent: Node | None, start: int, end: int, blocks: Iterable[int]) -> None:
        self.parent = parent
        self.children: set[Node] = set()
        self.start = start
        self._base = end
        self._clock = STILL
        # Lists of work are made of many of these, joined as bytes.
        self.blocks = array("i", blocks)
        self.refs = 0  # branches whose tip this is
        self.version = 0  # of the tree when anything but growth last happened here or below

    @property
    def end(self) -> int:
        return self._base + self._clock.tokens

    @end.setter
    def end(self, end: int) -> None:
        self._base = end - self._clock.tokens

    def grow_with(self, clock: Clock, end: int) -> None:
        """End at ``end`` now, and a token later with each tick of ``clock``."""
        self._base, self._clock = end - clock.tokens, clock

    def __repr__(self) -> str:
        return f"Node({self.start}:{self.end}, refs={self.refs}, children={len(self.children)})"


class Growth:
    """Rows that get one token each at every step, while nothing else changes in the tree.

    A step then moves a clock, and touches only the rows whose last block was full. With blocks of
    four tokens and rows of 5, 8 and 7 tokens::

        clock 0   5, 8, 7 tokens
        clock 1   6, 9, 8        row 1 took a block
        clock 2   7, 10, 9       row 2 took one

    Attributes:
        clock: counts the steps.
        tips: node of each row.
        base: int64 ``[B]``, tokens of each row when the clock was at 0.
        blocks: int64 ``[B]``, the block with each row's last token; a new array when it changes.
        counts: a 1 for each row.
        mark: tells it from others without keeping nodes alive.
    """

    def __init__(
        self, clock: Clock, tips: list[Node], base: Longs, blocks: Longs, block_size: int
    ) -> None:
        self.clock = clock
        self.tips = tips
        self.base = base
        self.blocks = blocks
        self.counts = (1,) * len(tips)
        self.mark = object()
        self._size = block_size

    @property
    def lengths(self) -> Longs:
        """int64 ``[B]``, tokens of each row."""
        return self.base + self.clock.tokens

    def rows_at_bound(self, tokens: int) -> Longs:
        """Rows whose blocks are full when the clock is at ``tokens``, ascending."""
        order, bounds = self._fullness
        left = tokens % self._size
        return order[bounds[left] : bounds[left + 1]]

    @cached_property
    def _fullness(self) -> tuple[Longs, list[int]]:
        """Rows in the order in which their blocks are full, and where each token's begin there."""
        left = -self.base % self._size
        order = np.argsort(left, kind="stable")
        return order, np.searchsorted(left[order], np.arange(self._size + 1)).tolist()

    def select(self, indices: Longs) -> Growth:
        """Of the rows ``indices``, with the same clock."""
        tips = list(map(self.tips.__getitem__, indices.tolist()))
        return Growth(self.clock, tips, self.base[indices], self.blocks[indices], self._size)

    def now(self) -> Grown:
        return Grown(self, self.clock.tokens, self.blocks)


@dataclass(frozen=True, slots=True)
class Paused:
    """Rows that grew together until they were selected, and will again.

    Attributes:
        growth: of the rows as they are now.
        suspects: bool ``[B]``, which may have a tip in common with others.
    """

    growth: Growth
    suspects: npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Grown:
    """Rows after one step of a :class:`Growth`; stays as it is when they grow on.

    Equal if it is the same step of the same rows.

    Attributes:
        growth: of the rows.
        tokens: of its clock.
        blocks: int64 ``[B]``, the block of each row's new token.
    """

    growth: Growth
    tokens: int
    blocks: Longs = field(compare=False)

    @property
    def lengths(self) -> Longs:
        """int64 ``[B]``, tokens of each row."""
        return self.growth.base + self.tokens

    @property
    def offsets(self) -> Longs:
        """int64 ``[B]``, slot of each row's new token in its block."""
        return (self.growth.base + (self.tokens - 1)) % self.growth._size

    @property
    def slots(self) -> Longs:
        """int64 ``[B]``, slot of each row's new token."""
        return self.blocks * self.growth._size + self.offsets

    def rows_with_new_blocks(self, since: int) -> Longs:
        """Rows that took a block after the clock was at ``since``, at most a block ago."""
        assert 0 <= self.tokens - since <= self.growth._size
        at_bound = [self.growth.rows_at_bound(tokens) for tokens in range(since, self.tokens)]
        return at_bound[0] if len(at_bound) == 1 else np.concatenate([_NO_ROWS, *at_bound])


_NO_ROWS = np.zeros(0, np.int64)


class AppendPlan:
    """What has to be done with tensors after :meth:`BranchTree.append`.

    Args:
        new: slots of each row's new tokens, or one token more in every row.

    Attributes:
        blocks: what was allocated.
        copies: (source block, destination block) pairs to copy before anything is written.
    """

    __slots__ = ("_new", "blocks", "copies")

    def __init__(
        self,
        new: list[list[int]] | Grown,
        blocks: Sequence[int] = (),
        copies: Sequence[tuple[int, int]] = (),
    ) -> None:
        self._new = new
        self.blocks = blocks
        self.copies = list(copies)

    @property
    def slots(self) -> list[list[int]]:
        """For each row, the slots of its new tokens (``block * block_size + offset``)."""
        if isinstance(self._new, Grown):
            return [[slot] for slot in self._new.slots.tolist()]
        return self._new

    def flat_slots(self) -> Longs:
        """int64, the slots of all new tokens, row after row."""
        if isinstance(self._new, Grown):
            return self._new.slots
        return np.array([slot for row in self._new for slot in row], np.int64)
