"""PhysicalKVAllocator: which blocks exist, which are free, and how many owners each has."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence

from ..errors import IntegrityError, InvalidArgument, OutOfBlocks


class PhysicalKVAllocator:
    """Reference-counted block ids, in plain ints.

    A block is a run of ``block_size`` token slots; the same id is used by every layer's storage.
    Ids are handed out lowest first, so that what is allocated together tends to lie together. The
    pool of ids grows on demand up to ``max_blocks``; tensors behind them are the storage's affair.

    ::

        allocate(2) -> [0, 1]      ref counts  0:1 1:1        free []
        acquire([1])               ref counts  0:1 1:2        free []
        release([0, 1])            ref counts      1:1        free [0]
        allocate(2) -> [0, 2]      ref counts  0:1 1:1 2:1    free []

    Args:
        max_blocks: most blocks in use at a time; None for no bound.
        track_freed: remember freed ids for :meth:`take_freed` (used to poison released blocks).
    """

    def __init__(self, max_blocks: int | None = None, *, track_freed: bool = False) -> None:
        if max_blocks is not None and max_blocks < 1:
            raise InvalidArgument(
                f"max_blocks={max_blocks}: give at least 1, or None for no bound."
            )
        self.max_blocks = max_blocks
        self._ref_counts: list[int] = []
        self._free: list[int] = []
        self._freed: list[int] | None = [] if track_freed else None

    @property
    def num_blocks(self) -> int:
        """Ids ever handed out: a storage that can hold this many can hold every live block."""
        return len(self._ref_counts)

    @property
    def num_used(self) -> int:
        return len(self._ref_counts) - len(self._free)

    @property
    def used(self) -> list[int]:
        """Every block with an owner, in order."""
        return [block for block, count in enumerate(self._ref_counts) if count]

    @property
    def num_free(self) -> int | None:
        """Blocks that could still be allocated; None when there is no bound."""
        return None if self.max_blocks is None else max(0, self.max_blocks - self.num_used)

    def ref_count(self, block: int) -> int:
        return self._ref_counts[block]

    def allocate(self, count: int) -> list[int]:
        """Hand out ``count`` free blocks, each with one owner. All or nothing.

        Raises:
            OutOfBlocks: fewer than ``count`` are left; nothing has changed.
        """
        if count < 0:
            raise InvalidArgument(f"allocate({count}): the count cannot be negative.")
        free = self.num_free
        if free is not None and count > free:
            raise OutOfBlocks(
                f"allocate({count}) found {free} of {self.max_blocks} blocks free.", count, free
            )
        fresh = count - len(self._free)
        blocks = [heapq.heappop(self._free) for _ in range(min(count, len(self._free)))]
        for block in blocks:
            self._ref_counts[block] = 1
        if fresh > 0:
            first = len(self._ref_counts)
            self._ref_counts.extend([1] * fresh)
            blocks.extend(range(first, first + fresh))
        return blocks

    def acquire(self, blocks: Iterable[int]) -> None:
        """Add an owner to each live block."""
        for block in blocks:
            assert self._ref_counts[block] > 0, f"block {block} is free"
            self._ref_counts[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """Take an owner from each block; one without owners is free."""
        for block in blocks:
            count = self._ref_counts[block] - 1
            assert count >= 0, f"block {block} is released more often than owned"
            self._ref_counts[block] = count
            if count == 0:
                heapq.heappush(self._free, block)
                if self._freed is not None:
                    self._freed.append(block)

    def trim(self) -> None:
        """Forget free ids at the end of the range, so that storages need not have room for them."""
        while self._ref_counts and self._ref_counts[-1] == 0:
            self._ref_counts.pop()
        self._free = [block for block in self._free if block < len(self._ref_counts)]
        heapq.heapify(self._free)

    def take_freed(self) -> list[int]:
        """Blocks that became free since the last call and are still free."""
        if not self._freed:
            return []
        freed = [block for block in dict.fromkeys(self._freed) if self._is_free(block)]
        self._freed = []
        return freed

    def _is_free(self, block: int) -> bool:
        return block < len(self._ref_counts) and self._ref_counts[block] == 0

    def check_integrity(self, owners: Sequence[Iterable[int]]) -> None:
        """Compare the books with ``owners``, the block lists of everyone who holds blocks.

        Raises:
            IntegrityError: a block with more or fewer owners than its ref count, or free and owned.
        """
        counted = [0] * self.num_blocks
        for blocks in owners:
            for block in blocks:
                counted[block] += 1
        if counted != self._ref_counts:
            wrong = [
                f"block {block}: {have} owners, ref count {booked}"
                for block, (have, booked) in enumerate(zip(counted, self._ref_counts, strict=True))
                if have != booked
            ]
            raise IntegrityError("; ".join(wrong[:8]))
        free = {block for block, count in enumerate(counted) if count == 0}
        if len(self._free) != len(free) or set(self._free) != free:
            raise IntegrityError(f"free list {sorted(self._free)[:8]} is not {sorted(free)[:8]}")
        if self.max_blocks is not None and self.num_used > self.max_blocks:
            raise IntegrityError(f"{self.num_used} blocks used of {self.max_blocks}")
