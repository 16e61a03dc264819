"""TreeMemory: a tree, the storages behind its blocks and what windows let go, kept in step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from ..errors import IntegrityError, InvalidArgument, OutOfBlocks
from .allocator import PhysicalKVAllocator
from .growth import AppendPlan
from .history import WindowHistory
from .pool import StoragePool
from .storage import KVSpec, KVStorage
from .tree import Branch, BranchTree


class TreeMemory:
    """What a cache remembers: which blocks a branch has, and K/V of those that are still needed.

    Args:
        block_size: token slots of a block.
        max_blocks, max_memory, backtrack, poison: see :class:`hf_tree_cache.TreeCache`.

    Attributes:
        tree: who shares what.
        pool: the storages.
    """

    def __init__(
        self,
        block_size: int,
        *,
        max_blocks: int | None,
        max_memory: int | None,
        backtrack: int | None,
        poison: bool,
    ) -> None:
        if backtrack is not None and (not isinstance(backtrack, int) or backtrack < 0):
            raise InvalidArgument(
                f"backtrack={backtrack!r}: give a number of tokens, or None to keep everything."
            )
        self.tree = BranchTree(block_size, PhysicalKVAllocator(max_blocks, track_freed=True))
        self.pool = StoragePool(block_size, max_memory=max_memory, poison=poison)
        self._history = WindowHistory(backtrack)
        self._max_blocks = max_blocks

    def append(self, counts: Sequence[int] | None) -> AppendPlan:
        """:meth:`BranchTree.append`, after what no branch sees any more was let go.

        Args:
            counts: new tokens of each row; None is one for each, :meth:`BranchTree.grow`.

        Raises:
            OutOfBlocks: too few blocks are left; what is still needed has not changed.
        """
        self.let_go()
        if self._history.is_due(self.tree):
            self._history.forget(self.tree, self.pool.storages)
        self._set_bound()
        try:
            appended = self._append(counts)
        except OutOfBlocks:
            if not self._history.forget(self.tree, self.pool.storages):
                raise
            self._set_bound()
            appended = self._append(counts)
        self._history.note(len(self.tree.rows) if counts is None else sum(counts))
        return appended

    def make_room(self, appended: AppendPlan) -> None:
        """Have the storages follow :meth:`append`: grow, and copy shared partial blocks.

        Raises:
            OutOfBlocks: a device has no memory left; nothing was copied.
        """
        self.pool.ensure(appended.blocks, self.tree.allocator.num_blocks)
        self.pool.copy(appended.copies)

    def let_go(self) -> None:
        """Have the storages follow what the tree has freed."""
        self.pool.release(self.tree.allocator.take_freed())

    def trim(self) -> None:
        """Forget free blocks at the end of every range: growth that failed is not needed."""
        self.let_go()
        self.tree.allocator.trim()
        for storage in self.pool.storages:
            if storage.places is not None:
                storage.places.trim()

    def clear(self) -> None:
        """End every branch."""
        self.tree.clear()
        self._history.reset()
        self.let_go()

    def check_history(self, call: str, branch: Branch, length: int) -> None:
        """``branch`` can go on after its first ``length`` tokens.

        Raises:
            HistoryFreed: a layer's window reaches into what was let go.
        """
        self._history.check(call, self.tree, self.pool.storages, branch, length)

    def attach(
        self, spec: KVSpec, num_alike: int, window: int | None, blocks: Sequence[int] | None = None
    ) -> tuple[KVStorage, int]:
        """A place for a new layer, see :meth:`StoragePool.attach`, that keeps ``blocks``.

        Args:
            window: tokens that the layer looks back to, where that is known.
            blocks: default all that are in use.

        Raises:
            InvalidArgument: a layer that never lets go is to keep some of the blocks only, or one
                other blocks than its like.
            OutOfBlocks: no room; nothing has changed.
        """
        allocator = self.tree.allocator
        window = None if self._history.backtrack is None else window
        used = allocator.used
        kept = set(used if blocks is None else blocks)
        if not kept <= set(used) or (window is None and len(kept) < len(used)):
            raise InvalidArgument(
                f"K/V of {len(kept)} blocks are there for a layer whose tree has {len(used)}. If "
                "others were let go, its config must name its window, and backtrack must not be "
                "None."
            )
        storage, position = self.pool.attach(
            spec, num_alike, sorted(kept), allocator.num_blocks, window
        )
        if not all(map(storage.keeps, kept)):
            raise InvalidArgument(
                f"Layers with a window of {window} keep different blocks: the file is damaged."
            )
        self._set_bound()
        return storage, position

    @property
    def kept_bytes(self) -> int:
        """Bytes of what all layers keep of the blocks in use."""
        num_used = self.tree.allocator.num_used
        return sum(s.num_kept(num_used) * s.attached_block_bytes for s in self.pool.storages)

    def dense_bytes(self, lengths: Iterable[int]) -> int:
        """Bytes of K/V that sequences of ``lengths`` tokens hold, each for itself.

        Layers that let go hold no more than their window, as with transformers' own cache.
        """
        counts = Counter(lengths)
        total = 0
        for storage in self.pool.storages:
            most = max(counts, default=0) if storage.window is None else storage.window
            tokens = sum(min(length, most) * count for length, count in counts.items())
            total += tokens * storage.attached_block_bytes // self.tree.block_size
        return total

    def restore(self, state: Any) -> None:
        """Become the tree that :meth:`BranchTree.to_state` described, of which no K/V are there.

        Raises:
            InvalidArgument: it describes none.
        """
        self.tree = BranchTree.from_state(self.tree.block_size, self.tree.allocator, state)
        self.tree.allocator.take_freed()

    def check_integrity(self) -> None:
        """Verify every invariant of the tree, its allocator and the storages.

        Raises:
            IntegrityError: with the first thing that is wrong.
        """
        self.let_go()
        self.tree.check_integrity()
        for storage in self.pool.storages:
            needed = storage.room_for(self.tree.allocator.num_blocks)
            if storage.num_blocks < needed:
                raise IntegrityError(f"{needed} blocks, room for {storage.num_blocks}")
        self._history.check_integrity(self.tree, self.pool.storages)

    def _append(self, counts: Sequence[int] | None) -> AppendPlan:
        return self.tree.grow() if counts is None else self.tree.append(counts)

    def _set_bound(self) -> None:
        """How many blocks ``max_memory`` allows depends on how many are still kept."""
        allocator = self.tree.allocator
        room = self.pool.room(allocator.num_used)
        if room is not None:
            bounds = [b for b in (self._max_blocks, allocator.num_used + room) if b is not None]
            allocator.max_blocks = min(bounds)
