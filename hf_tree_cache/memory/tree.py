"""BranchTree: branches over shared runs of blocks. Ints only; it decides, others move tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, NewType

from ..errors import IntegrityError, InvalidArgument, OutOfBlocks, StaleBranch
from .allocator import PhysicalKVAllocator

Branch = NewType("Branch", int)
"""A leaf-to-root path that can grow. Ids are never used twice, so a stale one is always noticed."""


class Node:
    """A maximal run of tokens shared by one set of branches: positions ``start`` to ``end``.

    ``blocks[i]`` holds the tokens of logical block ``start // block_size + i`` of every branch
    below. A first block that begins before ``start`` also holds the ancestors' tokens of that
    block, either because it was copied on write or because its last owner took it over.
    """

    __slots__ = ("blocks", "children", "end", "parent", "refs", "start")

    def __init__(self, parent: Node | None, start: int, end: int, blocks: list[int]) -> None:
        self.parent = parent
        self.children: set[Node] = set()
        self.start = start
        self.end = end
        self.blocks = blocks
        self.refs = 0  # branches whose tip this is

    def __repr__(self) -> str:
        return f"Node({self.start}:{self.end}, refs={self.refs}, children={len(self.children)})"


@dataclass(frozen=True, slots=True)
class AppendPlan:
    """What has to be done with tensors after :meth:`BranchTree.append`.

    Attributes:
        slots: for each row, the slots of its new tokens (``block * block_size + offset``).
        blocks: what was allocated.
        copies: (source block, destination block) pairs to copy before anything is written.
    """

    slots: list[list[int]]
    blocks: list[int]
    copies: list[tuple[int, int]] = field(default_factory=list)


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

    def length(self, branch: Branch) -> int:
        """Tokens stored for ``branch``."""
        return self._tip(branch).end

    def row_lengths(self) -> list[int]:
        tips = self._tips
        return [tips[branch].end for branch in self.rows]

    def tips(self) -> list[Node]:
        """The node where each row ends."""
        tips = self._tips
        return [tips[branch] for branch in self.rows]

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
        self.topology_version += 1
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
        self.topology_version += 1
        return [self._new_branch(node) for _ in range(count)]

    def prune(self, branch: Branch) -> None:
        """End ``branch``: out of the batch if it is a row; blocks that only it held are free."""
        node = self._tip(branch)
        if branch in self.rows:
            self.rows.remove(branch)
        self._end(branch, node)
        self.topology_version += 1

    def select(self, indices: Sequence[int]) -> None:
        """Make the batch ``[rows[i] for i in indices]``: the one primitive of batch surgery.

        A row named more than once is forked, a row not named is pruned; held branches stay.

        Raises:
            InvalidArgument: an index outside of the batch; nothing has changed.
        """
        num_rows = len(self.rows)
        if indices and not (min(indices) >= 0 and max(indices) < num_rows):
            raise InvalidArgument(
                f"select: indices from {min(indices)} to {max(indices)} for {num_rows} rows."
            )
        # Thousands of rows at each step of a wide beam: no calls but where something is freed.
        old, tips, next_id = self.rows, self._tips, self._next_id
        named = bytearray(num_rows)
        rows: list[Branch] = []
        for index in indices:
            branch = old[index]
            if named[index]:
                node = tips[branch]
                node.refs += 1
                branch = Branch(next_id)
                tips[branch] = node
                next_id += 1
            named[index] = 1
            rows.append(branch)
        self.num_forks += next_id - self._next_id
        self._next_id, self.rows = next_id, rows
        for branch, kept in zip(old, named, strict=True):
            if not kept:
                node = tips.pop(branch)
                node.refs -= 1
                self.num_prunes += 1
                if not node.refs:
                    self._tidy(node)
        self.topology_version += 1

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
        self.rows = list(branches)
        self.topology_version += 1

    def append(self, counts: Sequence[int]) -> AppendPlan:
        """Make room for ``counts[i]`` new tokens in row i. All or nothing.

        Raises:
            OutOfBlocks: too few blocks are left; nothing has changed.
        """
        assert len(counts) == len(self.rows)
        grown = self._grow_tips() if all(count == 1 for count in counts) else None
        if grown is not None:
            return grown
        allocated = self._allocate(self._blocks_needed(counts))
        fresh = iter(allocated)
        size, tips, allocator = self.block_size, self._tips, self.allocator
        slots: list[list[int]] = []
        copies: list[tuple[int, int]] = []
        for branch, count in zip(self.rows, counts, strict=True):
            if count == 0:
                slots.append([])
                continue
            tip = tips[branch]
            start, end = tip.end, tip.end + count
            offset = start % size
            shared = tip.refs > 1 or bool(tip.children) or tip.parent is None
            head = []
            if offset and shared and self._must_copy(tip, tip.refs):
                head = [next(fresh)]
                copies.append((tip.blocks[-1], head[0]))
            elif offset:
                head = [tip.blocks[-1]]
            blocks = head + [next(fresh) for _ in range(-(-end // size) - -(-start // size))]
            slots.append(
                [blocks[0] * size + offset]
                if count == 1
                else [blocks[i // size] * size + i % size for i in range(offset, offset + count)]
            )
            if not shared:
                tip.blocks.extend(blocks[len(head) :])
                tip.end = end
                continue
            if head and head[0] == tip.blocks[-1]:
                allocator.acquire(head)
            node = Node(tip, start, end, blocks)
            node.refs = 1
            tip.children.add(node)
            tips[branch] = node
            tip.refs -= 1
            self._tidy(tip)
            self.topology_version += 1
        self.num_copies += len(copies)
        return AppendPlan(slots, allocated, copies)

    def _grow_tips(self) -> AppendPlan | None:
        """:meth:`append` of one token to each row where all tips are their own; None elsewhere."""
        tips, size = self.tips(), self.block_size
        if any(tip.refs != 1 or tip.children or tip.parent is None for tip in tips):
            return None
        full = [tip for tip in tips if not tip.end % size]
        blocks = self._allocate(len(full))
        for tip, block in zip(full, blocks, strict=True):
            tip.blocks.append(block)
        slots = [[tip.blocks[-1] * size + tip.end % size] for tip in tips]
        for tip in tips:
            tip.end += 1
        return AppendPlan(slots, blocks)

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
        self.topology_version += 1
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
        for branch in list(self._tips):
            self._end(branch, self._tips[branch])
        self.rows = []
        self.topology_version += 1

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
        # By hand: a chain of nodes deeper than the recursion limit is an ordinary tree.
        twin = BranchTree(self.block_size, deepcopy(self.allocator, memo))
        twins = {self._root: twin._root}
        for node in self.nodes():
            assert node.parent is not None
            parent = twins[node.parent]
            twins[node] = Node(parent, node.start, node.end, list(node.blocks))
            parent.children.add(twins[node])
        for node, copy in twins.items():
            copy.refs = node.refs
        twin._tips = {branch: twins[node] for branch, node in self._tips.items()}
        twin._next_id, twin.rows = self._next_id, list(self.rows)
        twin.num_forks, twin.num_prunes = self.num_forks, self.num_prunes
        twin.num_copies, twin.topology_version = self.num_copies, self.topology_version
        return twin

    def to_state(self) -> dict[str, Any]:
        """All of the tree as lists of ints, for :meth:`from_state`."""
        nodes = list(self.nodes())
        index = {node: i for i, node in enumerate(nodes)} | {self._root: -1}
        return {
            "nodes": [[index[n.parent], n.start, n.end, n.blocks] for n in nodes if n.parent],
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
            made = [tree._root]
            for parent, start, end, blocks in state["nodes"]:
                node = Node(made[parent + 1], start, end, list(blocks))
                made[parent + 1].children.add(node)
                made.append(node)
            allocator.acquire(owned)
            allocator.release(range(len(set(owned))))
            for branch, node_index in state["tips"]:
                tree._tips[Branch(branch)] = made[node_index + 1]
                made[node_index + 1].refs += 1
            tree.rows = [Branch(branch) for branch in state["rows"]]
            tree._next_id = 1 + max(tree._tips, default=-1)
            tree.check_integrity()
        except (IntegrityError, LookupError, TypeError, ValueError) as error:
            raise InvalidArgument(f"BranchTree.from_state: this is no tree: {error}") from error
        return tree

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
        self.allocator.check_integrity(owners)

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

    def _blocks_needed(self, counts: Sequence[int]) -> int:
        """Blocks that ``append(counts)`` will allocate, copies on write included."""
        size, tips = self.block_size, self._tips
        left: dict[Node, int] = {}  # branches still on a shared tip once earlier rows have moved on
        needed = 0
        for branch, count in zip(self.rows, counts, strict=True):
            if count < 0:
                raise InvalidArgument(f"append: {count} tokens for branch {branch}.")
            if count == 0:
                continue
            tip = tips[branch]
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
            return
