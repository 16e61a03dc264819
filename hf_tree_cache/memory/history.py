"""WindowHistory: layers with a window forget tokens that no branch can see any more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import HistoryFreed, IntegrityError
from .growth import Node
from .places import BlockPlaces
from .storage import KVStorage
from .tree import Branch, BranchTree

PASS_BLOCKS = 4
"""Blocks that every row has grown by, about, between two passes over the tree."""


class WindowHistory:
    """Decides which blocks storages with a window let go, and where branches can still go back to.

    A block goes once it lies before the window of every branch that reads it, each at its own tip,
    rows and held ones. A pass over the nodes finds such blocks. It is made only when as many tokens
    have come as there are branches, and PASS_BLOCKS in each row: its cost for each new token does
    not depend on the tree, and what is kept too long is at most that many tokens.

    Args:
        backtrack: tokens that every branch can be taken back by at any time; None for all, in
            storages of which none has a window.
    """

    def __init__(self, backtrack: int | None) -> None:
        self.backtrack = backtrack
        self._new_tokens = 0
        self._passed: dict[BlockPlaces, dict[Node, tuple[int, int]]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> WindowHistory:
        return WindowHistory(self.backtrack)

    def note(self, num_tokens: int) -> None:
        """So many tokens were appended."""
        self._new_tokens += num_tokens

    def is_due(self, tree: BranchTree) -> bool:
        worth = PASS_BLOCKS * tree.block_size
        return self._new_tokens >= max(len(tree.rows) * worth, tree.num_branches)

    def forget(self, tree: BranchTree, storages: Sequence[KVStorage]) -> bool:
        """Let go what no branch sees any more; whether there was anything."""
        self._new_tokens = 0
        forgetful = [storage for storage in storages if storage.may_forget]
        if not forgetful:
            return False
        shortest = tree.shortest_below()
        some = False
        for storage in forgetful:
            some |= storage.release(self._fallen(tree, storage, shortest))
        return some

    def reset(self) -> None:
        """The tree was cleared."""
        self._new_tokens = 0
        self._passed.clear()

    def check(
        self,
        call: str,
        tree: BranchTree,
        storages: Sequence[KVStorage],
        branch: Branch,
        length: int,
    ) -> None:
        """``branch`` can go on after its first ``length`` tokens.

        Raises:
            HistoryFreed: a layer's window reaches into what was let go.
        """
        for storage in storages:
            places, size = storage.places, tree.block_size
            if places is None:
                continue
            first = _first_needed(storage, length, size)
            if not places.lack(tree.block_table(branch, length)[first // size :]):
                continue
            assert storage.window is not None
            whole = tree.block_table(branch)
            gone = max(i for i, block in enumerate(whole) if places.lack([block]))
            back = (gone + 1) * size + storage.window - 1
            raise HistoryFreed(
                f"{call}: layers with a window of {storage.window} tokens have let go what the "
                f"next token there would look at. Branch {branch} has {tree.length(branch)} tokens "
                f"and can go back to {back}, or to 0. TreeCache(backtrack=...), now "
                f"{self.backtrack}, says how many tokens every branch can be taken back by; "
                "backtrack=None keeps them all."
            )

    def check_integrity(self, tree: BranchTree, storages: Sequence[KVStorage]) -> None:
        """Raises:
        IntegrityError: a storage lacks what a branch sees, or its books do not add up.
        """
        used = sorted({block for node in tree.nodes() for block in node.blocks})
        for storage in storages:
            if storage.places is None:
                continue
            storage.places.check_integrity(used)
            for branch in tree.branches:
                first = _first_needed(storage, tree.length(branch), tree.block_size)
                if storage.places.lack(tree.block_table(branch)[first // tree.block_size :]):
                    raise IntegrityError(f"branch {branch} lacks blocks within {storage.window}")

    def _fallen(
        self, tree: BranchTree, storage: KVStorage, shortest: Sequence[tuple[Node, int]]
    ) -> list[int]:
        """Blocks of ``storage`` that lie before every window, since the last time."""
        assert storage.window is not None and storage.places is not None
        assert self.backtrack is not None
        size, reach = tree.block_size, storage.window - 1 + self.backtrack
        before = self._passed.get(storage.places, {})
        after: dict[Node, tuple[int, int]] = {}
        fallen: list[int] = []
        for node, length in shortest:
            end = min((length - reach) // size, -(-node.end // size))
            first = node.start // size
            if end <= first:
                continue
            start, done = before.get(node, (node.start, first))
            # A node that begins earlier than it did was merged with its parent: look at all of it.
            begin = max(first, done) if start <= node.start else first
            parent = node.parent
            if begin == first and node.start % size and parent and parent.blocks:
                # A block that is the parent's, too, goes with the parent, which needs it longer.
                begin += parent.blocks[-1] == node.blocks[0]
            fallen += node.blocks[begin - first : end - first]
            after[node] = node.start, max(begin, end)
        self._passed[storage.places] = after
        return fallen


def _first_needed(storage: KVStorage, length: int, block_size: int) -> int:
    """The first token that a branch of ``length`` tokens needs to go on."""
    assert storage.window is not None
    return max(0, min(length - storage.window + 1, length // block_size * block_size))
