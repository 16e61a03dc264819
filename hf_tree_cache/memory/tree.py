"""BranchTree: branches over shared runs of blocks. Ints only; it decides, others move tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from itertools import islice
from typing import Any, NewType

import numpy as np
import numpy.typing as npt

from ..errors import IntegrityError, InvalidArgument, OutOfBlocks, StaleBranch
from .allocator import PhysicalKVAllocator
from .growth import STILL, AppendPlan, Clock, Grown, Growth, Longs, Node, Paused

Branch = NewType("Branch", int)
"""A leaf-to-root path that can grow. Ids are never used twice, so a stale one is always noticed."""

COUNTS = ("num_forks", "num_prunes", "num_copies", "topology_version", "order_version")
"""What else a copy takes over as it is."""


class BranchTree:
    """Branches that share prefixes block by block.

    A branch is a pointer to its tip node, so forking at the tip is one increment whatever the
    length of its context. Nothing is copied until a branch appends into a partial block that others
    still need; the last one to append writes in place. With ``block_size`` 4 and a prompt of 6
    tokens::

        a = append 6           node 0:6  blocks [0, 1]                    a at 6
        b, c = fork(a, 2)      the same node, refs 3                      a, b, c at 6
        append 1 to each       node 6:7  blocks [2]  a   copy 1 -> 2
                               node 6:7  blocks [3]  b   copy 1 -> 3
                               node 6:7  blocks [1]  c   in place, the last owner

    The batch is ``rows``: an ordered list of branches. Branches outside it are held: they keep
    their blocks and can be made rows again.

    Args:
        block_size: token slots of a block.
        allocator: where blocks come from.
    """

    def __init__(self, block_size: int, allocator: PhysicalKVAllocator) -> None:
        if block_size < 1:
            raise InvalidArgument(f"block_size={block_size}: a block holds at least one token.")
        self.block_size = block_size
        self.allocator = allocator
        self.rows: list[Branch] = []
        self.num_forks = 0
        self.num_prunes = 0
        self.num_copies = 0
        self.topology_version = 0
        """Changes whenever the set of shared nodes or the rows do; plain growth leaves it alone."""
        self.order_version = 0
        """The topology version since when no two rows have changed places."""
        self._growth: Growth | None = None
        self._paused: Paused | None = None
        self._root = Node(None, 0, 0, [])
        self._tips: dict[Branch, Node] = {}
        self._next_id = 0

    def __contains__(self, branch: object) -> bool:
        return branch in self._tips

    @property
    def root(self) -> Node:
        """The empty node above all prompts."""
        return self._root

    @property
    def branches(self) -> list[Branch]:
        """Every live branch, rows and held, oldest first."""
        return list(self._tips)

    @property
    def num_branches(self) -> int:
        return len(self._tips)

    @property
    def held(self) -> list[Branch]:
        rows = set(self.rows)
        return [branch for branch in self._tips if branch not in rows]

    @property
    def grown(self) -> Grown | None:
        """The last append, if it gave one token to every row."""
        return None if self._growth is None else self._growth.now()

    def length(self, branch: Branch) -> int:
        """Tokens stored for ``branch``."""
        return self._tip(branch).end

    def row_lengths(self) -> list[int]:
        known = self._known()
        if known is not None:
            return known.lengths.tolist()
        return [tip.end for tip in self.tips()]

    def tips(self) -> list[Node]:
        """The node where each row ends; not to be changed."""
        known = self._known()
        if known is not None:
            return known.tips
        return list(map(self._tips.__getitem__, self.rows))

    def path(self, branch: Branch) -> list[Node]:
        """Nodes of ``branch`` from the first token on, without the empty root."""
        path = []
        node = self._tip(branch)
        while node.parent is not None:
            path.append(node)
            node = node.parent
        path.reverse()
        return path

    def block_table(self, branch: Branch, length: int | None = None) -> list[int]:
        """Physical blocks of ``branch``, in the order of its tokens.

        Args:
            length: tokens whose blocks are wanted, those that a fork there would have; default all.
        """
        table: list[int] = []
        for node in self.path(branch):
            if length is not None and node.start >= length:
                break
            del table[node.start // self.block_size :]
            table.extend(node.blocks)
        return table if length is None else table[: -(-length // self.block_size)]

    def shortest_below(self) -> list[tuple[Node, int]]:
        """Every node but the root, with the tokens of the shortest branch that reads it."""
        nodes = list(self.nodes())
        shortest: dict[Node, int] = {}
        for node in reversed(nodes):
            below = [shortest[child] for child in node.children]
            shortest[node] = node.end if node.refs else min(below)
        return [(node, shortest[node]) for node in nodes]

    def add_rows(self, count: int) -> list[Branch]:
        """Append ``count`` empty branches to the batch."""
        if count < 0:
            raise InvalidArgument(f"add_rows({count}): the count cannot be negative.")
        new = [self._new_branch(self._root) for _ in range(count)]
        self.rows.extend(new)
        self._note_change()
        return new

    def fork(self, branch: Branch, count: int = 1, *, at: int | None = None) -> list[Branch]:
        """Make ``count`` branches that share the first ``at`` tokens of ``branch`` (default: all).

        The new branches are held until :meth:`set_rows` or :meth:`select` makes them rows.
        ``branch`` itself goes on unchanged. Takes no blocks.

        Args:
            at: how many tokens to share; negative counts back from the tip.

        Raises:
            InvalidArgument: a negative count, or ``at`` outside of the branch.
            StaleBranch: ``branch`` is not alive.
        """
        tip = self._tip(branch)
        if count < 0:
            raise InvalidArgument(f"fork(branch {branch}, count={count}): give 0 or more.")
        position = tip.end if at is None else at + tip.end if at < 0 else at
        if not 0 <= position <= tip.end:
            raise InvalidArgument(
                f"fork(branch {branch}, at={at}): the branch has {tip.end} tokens; "
                f"give a position from {-tip.end} to {tip.end}."
            )
        if not count:
            return []
        node = self._node_ending_at(tip, position)
        self.num_forks += count
        self._note_change()
        return [self._new_branch(node) for _ in range(count)]

    def prune(self, branch: Branch) -> None:
        """End ``branch``: out of the batch if it is a row; blocks that only it held are free."""
        node = self._tip(branch)
        if branch in self.rows:
            self.rows.remove(branch)
        self._touch(node)
        self._end(branch, node)
        self._note_change()

    def select(self, indices: Sequence[int]) -> None:
        """Make the batch ``[rows[i] for i in indices]``: the one primitive of batch surgery.

        A row named more than once is forked, a row not named is pruned; held branches stay.

        Raises:
            InvalidArgument: an index outside of the batch; nothing has changed.
        """
        num_rows = len(self.rows)
        chosen = np.array(indices, np.int64)
        if len(chosen) and not (chosen.min() >= 0 and chosen.max() < num_rows):
            raise InvalidArgument(
                f"select: indices from {min(indices)} to {max(indices)} for {num_rows} rows."
            )
        # Thousands of rows at each step of a wide beam: no calls but where something changes.
        old, tips = self.rows, self._tips
        rows = list(map(old.__getitem__, indices))
        named = np.bincount(chosen, minlength=num_rows)
        paused = self._carry_on(chosen, named > 1)
        ascends = bool((chosen[1:] >= chosen[:-1]).all())
        if not ascends:
            self.order_version = self.topology_version + 1
        if len(chosen) and named.max() > 1:
            if ascends:
                again = np.flatnonzero(chosen[1:] == chosen[:-1]) + 1
            else:
                order = chosen.argsort(kind="stable")
                again = order[1:][chosen[order[1:]] == chosen[order[:-1]]]
                again.sort()
            for row in again.tolist():
                node = tips[rows[row]]
                node.refs += 1
                rows[row] = Branch(self._next_id)
                tips[rows[row]] = node
                self._next_id += 1
                self.num_forks += 1
        self.rows = rows
        for row in np.flatnonzero(named == 0).tolist():
            node = tips.pop(old[row])
            self._touch(node)
            node.refs -= 1
            self.num_prunes += 1
            if not node.refs:
                self._tidy(node)
        self._note_change()
        self._paused = paused

    def set_rows(self, branches: Sequence[Branch]) -> None:
        """Make the batch exactly ``branches``; rows that are not among them are held, not pruned.

        Raises:
            StaleBranch: one of them is not alive; nothing has changed.
            InvalidArgument: one is named twice.
        """
        for branch in branches:
            self._tip(branch)
        if len(set(branches)) != len(branches):
            raise InvalidArgument(
                "set_rows: a branch is named twice; fork it to have it in two rows."
            )
        known, paused = self._known(), None
        row_of = {branch: row for row, branch in enumerate(self.rows)}
        chosen = np.array([row_of.pop(branch, -1) for branch in branches], np.int64)
        is_new = chosen < 0
        for row in np.flatnonzero(is_new).tolist():
            self._touch(self._tips[branches[row]])
        for branch in row_of:
            tip = self._tips[branch]
            self._touch(tip)
            # A held branch grows no more.
            tip.grow_with(STILL, tip.end)
        stayed = chosen[~is_new]
        if (stayed[1:] < stayed[:-1]).any():
            self.order_version = self.topology_version + 1
        if known is not None and not is_new.any():
            paused = self._carry_on(chosen)
        self.rows = list(branches)
        self._note_change()
        self._paused = paused

    def append(self, counts: Sequence[int]) -> AppendPlan:
        """Make room for ``counts[i]`` new tokens in row i. All or nothing.

        Raises:
            OutOfBlocks: too few blocks are left; nothing has changed.
        """
        assert len(counts) == len(self.rows)
        if counts.count(1) == len(counts):
            return self.grow()
        tips = self.tips()
        allocated = self._allocate(self._blocks_needed(enumerate(counts), tips))
        fresh = iter(allocated)
        self._growth = self._paused = None
        copies: list[tuple[int, int]] = []
        slots = [
            self._append_to(branch, count, fresh, copies) if count else []
            for branch, count in zip(self.rows, counts, strict=True)
        ]
        self.num_copies += len(copies)
        return AppendPlan(slots, allocated, copies)

    def grow(self) -> AppendPlan:
        """:meth:`append` of one token to each row. While nothing else happens, a clock ticks.

        Raises:
            OutOfBlocks: too few blocks are left; nothing has changed.
        """
        growth = self._growth
        if growth is None:
            return self._begin_growth()
        rows = growth.rows_at_bound(growth.clock.tokens)
        blocks: list[int] = []
        if len(rows):
            blocks, tips = self._allocate(len(rows)), growth.tips
            for row, block in zip(rows.tolist(), blocks, strict=True):
                tips[row].blocks.append(block)
            growth.blocks = growth.blocks.copy()
            growth.blocks[rows] = blocks
        growth.clock.tokens += 1
        return AppendPlan(growth.now(), blocks)

    def _begin_growth(self) -> AppendPlan:
        """One token to each row, some of which may have to part."""
        paused = self._paused
        if paused is None:
            growth, suspects = self._look_at_rows(), list(range(len(self.rows)))
        else:
            growth, suspects = paused.growth, np.flatnonzero(paused.suspects).tolist()
        tips, clock = growth.tips, growth.clock
        apart = [
            row
            for row in suspects
            if tips[row].refs != 1 or tips[row].children or tips[row].parent is None
        ]
        full = growth.rows_at_bound(clock.tokens).tolist()
        changed = full
        if apart:
            full = sorted(set(full).difference(apart))
            changed = sorted(full + apart)
        needed = self._blocks_needed(((row, 1) for row in apart), tips)
        allocated = self._allocate(len(full) + needed)
        fresh = iter(allocated)
        copies: list[tuple[int, int]] = []
        shared = set(apart)
        for row in changed:
            tip = tips[row]
            if row not in shared:
                tip.blocks.append(next(fresh))
                continue
            branch, end = self.rows[row], tip.end
            self._append_to(branch, 1, fresh, copies)
            tip.grow_with(STILL, end)
            tips[row] = self._tips[branch]
            tips[row].grow_with(clock, end)
        self.num_copies += len(copies)
        growth.blocks = growth.blocks.copy()
        growth.blocks[changed] = [tips[row].blocks[-1] for row in changed]
        self._growth, self._paused = growth, None
        clock.tokens += 1
        return AppendPlan(growth.now(), allocated, copies)

    def _look_at_rows(self) -> Growth:
        """All rows, on a new clock; a tip without blocks of its own has block 0 for now."""
        tips = self.tips()
        ends = [tip.end for tip in tips]
        blocks = [tip.blocks[-1] if tip.blocks else 0 for tip in tips]
        clock = Clock()
        for tip, end in zip(tips, ends, strict=True):
            tip.grow_with(clock, end)
        base = np.array(ends, np.int64)
        return Growth(clock, tips, base, np.array(blocks, np.int64), self.block_size)

    def _append_to(
        self, branch: Branch, count: int, fresh: Iterator[int], copies: list[tuple[int, int]]
    ) -> list[int]:
        """Append to one branch, with blocks of ``fresh``; the slots of its new tokens.

        Args:
            copies: where a copy on write is noted.
        """
        size, tip = self.block_size, self._tips[branch]
        start, end = tip.end, tip.end + count
        offset = start % size
        shared = tip.refs > 1 or bool(tip.children) or tip.parent is None
        head: list[int] = []
        if offset and shared and self._must_copy(tip, tip.refs):
            head = [next(fresh)]
            copies.append((tip.blocks[-1], head[0]))
        elif offset:
            head = [tip.blocks[-1]]
        blocks = head + list(islice(fresh, -(-end // size) - -(-start // size)))
        slots = [blocks[i // size] * size + i % size for i in range(offset, offset + count)]
        if not shared:
            tip.blocks.extend(blocks[len(head) :])
            tip.end = end
            return slots
        if head and head[0] == tip.blocks[-1]:
            self.allocator.acquire(head)
        node = Node(tip, start, end, blocks)
        node.refs = 1
        tip.children.add(node)
        self._touch(tip)
        self._tips[branch] = node
        tip.refs -= 1
        self._tidy(tip)
        self._note_change()
        return slots

    def truncate(self, branch: Branch, length: int) -> None:
        """Forget the tokens of ``branch`` from position ``length`` on.

        Raises:
            InvalidArgument: ``length`` is negative or beyond the branch.
        """
        tip = self._tip(branch)
        if not 0 <= length <= tip.end:
            raise InvalidArgument(
                f"truncate(branch {branch}, {length}): the branch has {tip.end} tokens."
            )
        if length == tip.end:
            return
        self._note_change()
        if tip.refs == 1 and not tip.children and length > tip.start:
            keep = -(-length // self.block_size) - tip.start // self.block_size
            self.allocator.release(tip.blocks[keep:])
            del tip.blocks[keep:]
            tip.end = length
            return
        node = self._node_ending_at(tip, length)
        node.refs += 1
        self._tips[branch] = node
        tip.refs -= 1
        self._tidy(tip)

    def clear(self) -> None:
        """End every branch, rows and held."""
        for branch, node in list(self._tips.items()):
            self._touch(node)
            self._end(branch, node)
        self.rows = []
        self._note_change()

    def nodes(self) -> Iterator[Node]:
        """Every node but the empty root, parents before children."""
        stack = list(self._root.children)
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children)

    def num_unique_tokens(self) -> int:
        return sum(node.end - node.start for node in self.nodes())

    def num_logical_tokens(self) -> int:
        """Tokens that independent sequences would store."""
        return sum(node.end for node in self._tips.values())

    def __deepcopy__(self, memo: dict[int, object]) -> BranchTree:
        twin = BranchTree.__new__(BranchTree)
        twin.__setstate__({**self.__getstate__(), "allocator": deepcopy(self.allocator, memo)})
        return twin

    def __getstate__(self) -> dict[str, Any]:
        # Flat: a chain of nodes deeper than the recursion limit is an ordinary tree.
        return {
            **self.to_state(),
            "block_size": self.block_size,
            "allocator": self.allocator,
            "next_id": self._next_id,
            "counts": {name: getattr(self, name) for name in COUNTS},
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["block_size"], state["allocator"])  # type: ignore[misc]
        self._join(state)
        self._next_id = state["next_id"]
        vars(self).update(state["counts"])

    def to_state(self) -> dict[str, Any]:
        """All of the tree as lists of ints, for :meth:`from_state`."""
        nodes = list(self.nodes())
        index = {node: i for i, node in enumerate(nodes)} | {self._root: -1}
        return {
            "nodes": [[index[n.parent], n.start, n.end, list(n.blocks)] for n in nodes if n.parent],
            "tips": [[branch, index[node]] for branch, node in self._tips.items()],
            "rows": list(self.rows),
        }

    @classmethod
    def from_state(cls, block_size: int, allocator: PhysicalKVAllocator, state: Any) -> BranchTree:
        """The tree that :meth:`to_state` described, with the same blocks and branches.

        Args:
            allocator: an unused one; it hands out the blocks ``0 .. n - 1`` that the state names.

        Raises:
            InvalidArgument: the state does not describe a tree.
        """
        tree = cls(block_size, allocator)
        try:
            owned = [block for *_, blocks in state["nodes"] for block in blocks]
            if set(owned) != set(range(len(set(owned)))):
                raise ValueError("blocks are not numbered from 0 on")
            allocator.allocate(len(set(owned)))
            allocator.acquire(owned)
            allocator.release(range(len(set(owned))))
            tree._join(state)
            tree._next_id = 1 + max(tree._tips, default=-1)
            tree.check_integrity()
        except (IntegrityError, LookupError, TypeError, ValueError) as error:
            raise InvalidArgument(f"BranchTree.from_state: this is no tree: {error}") from error
        return tree

    def _join(self, state: Any) -> None:
        """Nodes, branches and rows as :meth:`to_state` described them; no block changes hands."""
        made = [self._root]
        for parent, start, end, blocks in state["nodes"]:
            node = Node(made[parent + 1], start, end, blocks)
            made[parent + 1].children.add(node)
            made.append(node)
        for branch, node_index in state["tips"]:
            self._tips[Branch(branch)] = made[node_index + 1]
            made[node_index + 1].refs += 1
        self.rows = [Branch(branch) for branch in state["rows"]]

    def check_integrity(self) -> None:
        """Verify every invariant of the tree and of the allocator below it.

        Raises:
            IntegrityError: with the first thing that is wrong.
        """
        tips: dict[Node, int] = {}
        for node in self._tips.values():
            tips[node] = tips.get(node, 0) + 1
        owners = []
        for node in self.nodes():
            parent = node.parent
            first, last = node.start // self.block_size, -(-node.end // self.block_size)
            if parent is None or node not in parent.children or node.start != parent.end:
                raise IntegrityError(f"{node} does not continue {parent}")
            if node.end <= node.start or len(node.blocks) != last - first:
                raise IntegrityError(f"{node} has {len(node.blocks)} blocks for {first} to {last}")
            if node.refs != tips.get(node, 0):
                raise IntegrityError(f"{node} is the tip of {tips.get(node, 0)} branches")
            if node.refs == 0 and len(node.children) < 2:
                raise IntegrityError(f"{node} should have been freed or merged with its child")
            owners.append(node.blocks)
        if self._root.refs != tips.get(self._root, 0) or self._root.end != 0:
            raise IntegrityError(f"the empty root is {self._root}")
        if len(set(self.rows)) != len(self.rows) or not all(row in self._tips for row in self.rows):
            raise IntegrityError(f"rows {self.rows} are not distinct live branches")
        self._check_known()
        self.allocator.check_integrity(owners)

    def _check_known(self) -> None:
        """What is known of all rows is true."""
        known = self._known()
        if known is None:
            return
        tips = [self._tips[branch] for branch in self.rows]
        ends, blocks = [tip.end for tip in tips], [tip.blocks[-1] for tip in tips]
        if known.tips != tips or known.lengths.tolist() != ends:
            raise IntegrityError(f"rows of {known.lengths} tokens are known, those of {ends} grow")
        if known.blocks.tolist() != blocks:
            raise IntegrityError(f"rows are known to end in blocks {known.blocks}, not {blocks}")
        growing = {node for node in self.nodes() if node._clock is known.clock}
        if not {tip for tip in tips if tip.refs == 1} <= growing <= set(tips):
            raise IntegrityError(f"{len(growing)} nodes grow with {len(tips)} rows")

    def _known(self) -> Growth | None:
        """What is known of all rows, if anything is."""
        return self._growth if self._paused is None else self._paused.growth

    def _carry_on(
        self, chosen: Longs, shared: npt.NDArray[np.bool_] | None = None
    ) -> Paused | None:
        """What will be known of the rows ``chosen``, of which ``shared`` may be named twice."""
        known = self._known()
        if known is None:
            return None
        suspects = np.zeros(len(known.tips), np.bool_) if shared is None else shared
        if self._paused is not None:
            suspects = suspects | self._paused.suspects
        return Paused(known.select(chosen), suspects[chosen])

    def _touch(self, node: Node | None) -> None:
        """What was found out about the subtrees that hold ``node`` holds no longer."""
        version = self.topology_version + 1
        while node is not None and node.version < version:
            node.version = version
            node = node.parent

    def _note_change(self) -> None:
        self.topology_version += 1
        self._growth = self._paused = None

    def _tip(self, branch: Branch) -> Node:
        try:
            return self._tips[branch]
        except KeyError:
            raise StaleBranch(
                f"branch {branch} is not alive in this tree: it was pruned, or belongs to another "
                f"cache. {len(self._tips)} branches are alive."
            ) from None

    def _new_branch(self, node: Node) -> Branch:
        branch = Branch(self._next_id)
        self._next_id += 1
        self._tips[branch] = node
        node.refs += 1
        return branch

    def _end(self, branch: Branch, node: Node) -> None:
        del self._tips[branch]
        node.refs -= 1
        self.num_prunes += 1
        self._tidy(node)

    def _must_copy(self, tip: Node, refs: int) -> bool:
        """Whether an append at a shared ``tip`` with ``refs`` branches left must copy its partial
        block.

        The last branch to leave takes the block over, unless a child took it before.
        """
        partial = tip.blocks[-1]
        return refs > 1 or any(child.blocks[0] == partial for child in tip.children)

    def _blocks_needed(self, counts: Iterable[tuple[int, int]], tips: Sequence[Node]) -> int:
        """Blocks that appending to rows will allocate, copies on write included.

        Args:
            counts: row and new tokens.
        """
        size = self.block_size
        left: dict[Node, int] = {}  # branches still on a shared tip once earlier rows have moved on
        needed = 0
        for row, count in counts:
            if count < 0:
                raise InvalidArgument(f"append: {count} tokens for branch {self.rows[row]}.")
            if count == 0:
                continue
            tip = tips[row]
            start = tip.end
            needed += -(-(start + count) // size) - -(-start // size)
            if start % size and (tip.refs > 1 or tip.children):
                refs = left.get(tip, tip.refs)
                left[tip] = refs - 1
                needed += self._must_copy(tip, refs)
        return needed

    def _allocate(self, count: int) -> list[int]:
        try:
            return self.allocator.allocate(count)
        except OutOfBlocks as error:
            tokens = sorted(((node.end, b) for b, node in self._tips.items()), reverse=True)
            holders = ", ".join(f"branch {b}: {end} tokens" for end, b in tokens[:4])
            raise OutOfBlocks(
                f"append to {len(self.rows)} rows needs {count} blocks of {self.block_size} "
                f"tokens; {error.free} of {self.allocator.max_blocks} are free. {len(self._tips)} "
                f"branches ({len(self.held)} held) share the rest; longest: {holders}. "
                "The cache is unchanged: prune branches, or raise max_blocks / max_memory.",
                error.requested,
                error.free,
            ) from None

    def _node_ending_at(self, node: Node, position: int) -> Node:
        """The ancestor of ``node`` that ends before ``position``, split off if need be."""
        while position <= node.start and node.parent is not None:
            node = node.parent
        if position == node.end:
            return node
        size, first = self.block_size, node.start // self.block_size
        blocks = node.blocks
        tail = blocks[position // size - first :]
        del blocks[-(-position // size) - first :]
        parent = node.parent
        assert parent is not None
        head = Node(parent, node.start, position, blocks)
        if position % size:
            self.allocator.acquire(tail[:1])
        parent.children.remove(node)
        parent.children.add(head)
        head.children.add(node)
        node.parent, node.start, node.blocks = head, position, tail
        self._touch(node)
        self._touch(head)
        return head

    def _tidy(self, node: Node) -> None:
        """Free ``node`` if nobody needs it, and merge it with an only child; then its parents."""
        while node.refs == 0 and node.parent is not None:
            if len(node.children) > 1:
                return
            parent = node.parent
            parent.children.remove(node)
            if not node.children:
                self.allocator.release(node.blocks)
                node = parent
                continue
            (child,) = node.children
            if node.end % self.block_size:
                self.allocator.release([node.blocks.pop()])
            node.blocks.extend(child.blocks)
            child.parent, child.start, child.blocks = parent, node.start, node.blocks
            parent.children.add(child)
            self._touch(child)
            return
