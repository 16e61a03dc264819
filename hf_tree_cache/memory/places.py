"""BlockPlaces: where a storage that forgets keeps the blocks of a tree. Ints only."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import IntegrityError

Longs = npt.NDArray[np.int64]

BLANK = 0
"""The place that every forgotten block has: zeros, never written."""


class BlockPlaces:
    """From block ids of a tree to the blocks of one storage, for those that it still keeps.

    Layers with a window need only the last tokens of every branch, so their storage has fewer
    blocks than the tree. Places are handed out lowest first; block 0 is :data:`BLANK`::

        take([7, 8])      7 -> 1, 8 -> 2
        release([7])      7 -> BLANK, forgotten      free [1]
        take([9])         9 -> 1

    Attributes:
        version: changes whenever a block lost its place: what was looked up before is void.
    """

    def __init__(self) -> None:
        self.version = 0
        self._table: Longs = np.full(64, BLANK, np.int64)
        self._free: list[int] = []
        self._end = BLANK + 1

    @property
    def num_blocks(self) -> int:
        """Blocks that the storage needs room for, the blank one included."""
        return self._end

    @property
    def num_used(self) -> int:
        """Blocks that have a place."""
        return self._end - 1 - len(self._free)

    def of(self, blocks: Sequence[int] | Longs) -> Longs:
        """The place of each block."""
        return self._table[blocks]

    def take(self, blocks: Iterable[int]) -> None:
        """Give a place to each of ``blocks`` that has none."""
        for block in blocks:
            if block >= len(self._table):
                more = np.full(max(len(self._table), block + 1 - len(self._table)), BLANK)
                self._table = np.concatenate([self._table, more])
            if self._table[block] == BLANK:
                if self._free:
                    self._table[block] = heapq.heappop(self._free)
                else:
                    self._table[block] = self._end
                    self._end += 1

    def release(self, blocks: Sequence[int]) -> list[int]:
        """Take their places from ``blocks``; those that became free."""
        ids = np.array(blocks, np.int64)
        ids = ids[ids < len(self._table)]
        freed: list[int] = self._table[ids][self._table[ids] != BLANK].tolist()
        if freed:
            self._table[ids] = BLANK
            self.version += 1
            for place in freed:
                heapq.heappush(self._free, place)
        return freed

    def trim(self) -> None:
        """Forget free places at the end, so that the storage need not have room for them."""
        free = set(self._free)
        while self._end - 1 in free:
            self._end -= 1
        self._free = [place for place in self._free if place < self._end]
        heapq.heapify(self._free)

    def lack(self, blocks: Sequence[int] | Longs) -> bool:
        """Whether any of ``blocks`` was forgotten."""
        return bool((self._table[blocks] == BLANK).any()) if len(blocks) else False

    def __deepcopy__(self, memo: dict[int, Any]) -> BlockPlaces:
        twin = BlockPlaces()
        twin.version, twin._end = self.version, self._end
        twin._table, twin._free = self._table.copy(), list(self._free)
        return twin

    def check_integrity(self, used: Sequence[int]) -> None:
        """Compare with ``used``, the blocks that the tree has.

        Raises:
            IntegrityError: a place with two blocks, none and not free, or of a block that is free.
        """
        held = np.flatnonzero(self._table != BLANK)
        stray = np.setdiff1d(held, np.array(used, np.int64))
        if len(stray):
            raise IntegrityError(f"blocks {stray[:8].tolist()} have a place, but are free")
        places = sorted([*self._table[held].tolist(), *self._free])
        if places != list(range(1, self._end)):
            raise IntegrityError(f"places {places[:8]} are not those from 1 to {self._end}")
