"""From a tree to segments: who reads which blocks together. Ints on the host.

A *segment* is a run of blocks along one path and the queries that read it together, at most one
tile of them. Segments follow a path through as many nodes as their queries stay together; a query
that leaves earlier has a limit. :mod:`.schedule` cuts them into the kernel's items.
"""

from __future__ import annotations

from array import array
from collections import defaultdict
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from ..memory.growth import Node
from .plan import TreeAttentionPlan, Window
from .tiles import Tiles

Ints = npt.NDArray[np.int32]
Longs = npt.NDArray[np.int64]

UNLIMITED = 1 << 30
"""Limit of a query that sees all up to itself, however far its row grows."""

GROWTH_TOKENS = 256
"""Tokens that a row may grow by before its work is cut anew."""

FIXED_CHUNK = 512
"""Tokens of an item when cuts must not depend on the rest of the batch."""


@dataclass(frozen=True, slots=True)
class Segments:
    """All segments of a plan as arrays, int64 where nothing else is said.

    Attributes:
        blocks: int32, block ids, segment after segment, tails with room to grow.
        first_block: where each segment's begin.
        begin, tokens: position of the first token, and how many there are.
        skipped: tokens at the front that no query's window reaches.
        row: whose tail it is, or -1.
        first_member, num_members: which of the members below are each segment's.
        member_query: row * T + column.
        member_limit: tokens of the segment that the member sees at most.
        member_own: tokens of the segment up to the member's own, now.
        member_lower: tokens of the segment before the member's window; None without windows.
    """

    blocks: Ints
    first_block: Longs
    begin: Longs
    tokens: Longs
    skipped: Longs
    row: Longs
    first_member: Longs
    num_members: Longs
    member_query: Longs
    member_limit: Longs
    member_own: Longs
    member_lower: Longs | None


def find_segments(
    plan: TreeAttentionPlan, tiles: Tiles, *, group_size: int, window: Window | None = None
) -> Segments:
    """The segments of one forward.

    Args:
        group_size: G, query heads of a K/V head.
        window: tokens that no query sees any more are skipped.
    """
    outline = _Outline(plan, tiles, group_size)
    outline.walk()
    return _to_arrays(outline, plan, window, tiles.deterministic)


def fixed_chunk(block_size: int) -> int:
    """FIXED_CHUNK in whole blocks, in tokens."""
    return -(-FIXED_CHUNK // block_size) * block_size


def spread(widths: Longs) -> tuple[Longs, Longs]:
    """i, ``widths[i]`` times, for each i; and 0 .. ``widths[i]`` - 1 beside it."""
    index = np.repeat(np.arange(len(widths)), widths)
    ramp = np.arange(len(index))
    ramp -= (np.cumsum(widths) - widths).take(index)
    return index, ramp


class _Segment:
    """Blocks that some queries read together, while it is followed down the tree."""

    __slots__ = ("blocks", "members", "num_queries", "start")

    def __init__(self, start: int, blocks: array[int]) -> None:
        self.start = start
        self.blocks = blocks  # may be another's too: replaced, never changed
        self.members: list[tuple[int, int, int]] = []  # first query, end, what they see
        self.num_queries = 0

    def add(self, first: int, end: int, limit: int) -> None:
        """Have these queries read it, ``limit`` tokens at most."""
        self.members.append((first, end, limit))
        self.num_queries += end - first

    def copy(self) -> _Segment:
        """The same blocks for other queries."""
        return _Segment(self.start, self.blocks)


Group = tuple[_Segment | None, int, int]
"""A segment in the making, if any, and the range of queries that follow it, in tree order."""

Way = tuple[int | Node, int, int]
"""Where queries go below a node: a leaf's rank, or an inner child; and which queries."""


class _Outline:
    """Walks the tree once, from the root down, and collects segments.

    Rows are taken in tree order: those under one node are neighbours, a node's own leaves first.
    Queries are counted in that order. Leaves of one new token that begin a segment of their own,
    most of a wide tree, are kept apart as ``lone`` ranks, to be handled all at once.
    """

    def __init__(self, plan: TreeAttentionPlan, tiles: Tiles, group_size: int) -> None:
        self.plan = plan
        self.size = plan.block_size
        self.deterministic = tiles.deterministic
        self.small_queries = 0 if tiles.deterministic else tiles.m_small // group_size
        self.large_queries = tiles.m_large // group_size
        self.large_cost, self.item_cost = tiles.large_cost, tiles.item_cost
        self.chunk_blocks = fixed_chunk(self.size) // self.size
        self.tips = plan.tree.tips()
        self.rows: list[int] = []
        self.first_query: list[int] = []  # of each rank, and one more
        self.segments: list[tuple[_Segment, int]] = []  # and the row whose tail it is, or -1
        self.lone: list[int] = []
        self._leaves: defaultdict[Node, list[int]] = defaultdict(list)
        self._inner: dict[Node, list[Node]] = {}
        self._ranks: dict[Node, tuple[int, int]] = {}
        self._groups: dict[Node, list[Group]] = {}

    def walk(self) -> None:
        self._find_nodes()
        root = self.plan.tree.root
        if root not in self._inner:
            return
        order = self._number_rows(root)
        if self.plan.grown is None:
            counts = map(self.plan.counts.__getitem__, self.rows)
            self.first_query = list(accumulate(counts, initial=0))
        else:
            self.first_query = list(range(len(self.rows) + 1))
        low, high = self._range(root)
        self._groups[root] = [(None, low, high)]
        for node in order:
            self._leave(node, self._enter(node))

    def _find_nodes(self) -> None:
        """Rows with new tokens that hang on each node, and its inner children that lead to any."""
        leaves, inner = self._leaves, self._inner
        grown = self.plan.grown is not None
        for row, tip in enumerate(self.tips):
            if grown or self.plan.counts[row]:
                leaves[tip.parent].append(row)  # type: ignore[index]
        for child in leaves:
            if child in inner:
                continue
            inner[child] = []
            parent = child.parent
            while parent is not None:
                known = inner.get(parent)
                if known is not None:
                    known.append(child)
                    break
                inner[parent] = [child]
                child, parent = parent, parent.parent

    def _number_rows(self, root: Node) -> list[Node]:
        """Inner nodes, parents first; fills ``rows`` and the ranks below each."""
        order, firsts, stack = [], [], [root]
        while stack:
            node = stack.pop()
            order.append(node)
            firsts.append(len(self.rows))
            self.rows += self._leaves.get(node, ())
            stack.extend(reversed(self._inner[node]))
        for node, first in zip(reversed(order), reversed(firsts), strict=True):
            inner = self._inner[node]
            last = self._ranks[inner[-1]][1] if inner else first + len(self._leaves[node])
            self._ranks[node] = first, last
        return order

    def _range(self, node: Node) -> tuple[int, int]:
        first, last = self._ranks[node]
        return self.first_query[first], self.first_query[last]

    def _cost(self, num_queries: int) -> float:
        return 1.0 if num_queries <= self.small_queries else self.large_cost

    def _enter(self, node: Node) -> list[Group]:
        """The groups that read ``node``, each with the node's whole blocks in its segment."""
        groups = self._groups.pop(node)
        if len(groups) > 1 or groups[0][2] - groups[0][1] > self.large_queries:
            groups = self._repack(node, groups)
        first = node.start // self.size
        blocks = node.blocks[: node.end // self.size - first]
        if not blocks:
            return groups
        entered: list[Group] = []
        for segment, a, b in groups:
            if segment is None:
                segment = _Segment(first * self.size, blocks)
            else:
                segment.blocks = segment.blocks + blocks
            entered.append((segment, a, b))
        return entered

    def _repack(self, node: Node, groups: list[Group]) -> list[Group]:
        """Fewer, or smaller, groups, if the queries below ``node`` fill them better."""
        fresh = self._pack(*self._ranks[node])
        if len(groups) <= len(fresh) and groups[0][2] - groups[0][1] <= self.large_queries:
            return groups
        rest = None
        for segment, a, b in groups:
            rest = segment and self._close(segment, a, b)
        return [(rest and rest.copy(), a, b) for a, b in fresh]

    def _pack(self, first: int, last: int) -> list[tuple[int, int]]:
        """Ranges of queries of at most one large tile; a row is cut only if it must be."""
        most, at = self.large_queries, self.first_query
        begin, end = at[first], at[last]
        if end - begin == last - first:
            return [(a, min(a + most, end)) for a in range(begin, end, most)]
        ranges = []
        for rank in range(first, last):
            if at[rank + 1] - begin > most:
                if at[rank] > begin:
                    ranges.append((begin, at[rank]))
                    begin = at[rank]
                while at[rank + 1] - begin > most:
                    ranges.append((begin, begin + most))
                    begin += most
        return [*ranges, (begin, end)]

    def _leave(self, node: Node, groups: list[Group]) -> None:
        """Hand the groups on to what hangs on ``node``."""
        rank = self._ranks[node][0]
        leaves = range(rank, rank + len(self._leaves.get(node, ())))
        at, inner = self.first_query, self._inner[node]
        if self.plan.grown is not None and len(groups) == 1:
            # Most of a deep tree: ranks are queries, and one group has them all.
            segment, a, b = groups[0]
            self._part(segment, a, b, [(child, *self._ranks[child]) for child in inner], leaves)
            return
        begin, end = at[rank], at[leaves.stop]
        ways: list[Way] = []
        if end - begin > len(leaves):
            ways += [(leaf, at[leaf], at[leaf + 1]) for leaf in leaves]
            end = begin
        ways += [(child, *self._range(child)) for child in inner]
        way = 0
        for segment, a, b in groups:
            parts: list[Way] = []
            while way < len(ways) and ways[way][1] < b:
                target, low, high = ways[way]
                parts.append((target, max(a, low), min(b, high)))
                if high > b:
                    break
                way += 1
            lone = range(rank + a - begin, rank + min(b, end) - begin)
            self._part(segment, a, b, parts, lone)

    def _part(
        self, segment: _Segment | None, a: int, b: int, parts: list[Way], lone: range
    ) -> None:
        """Where the queries of one group go different ways, decide what becomes of its segment.

        Args:
            a, b: the queries.
            parts: where they go.
            lone: ranks of leaves of one query, the first ones from ``a`` on.
        """
        if segment is None:
            self._hand_all(parts, lone, None)
            return
        if len(parts) + len(lone) == 1:
            self._hand(parts[0][0] if parts else lone[0], segment, a, b)
            return
        rest: _Segment | None = None
        if not self.deterministic:
            if not parts:
                widest: Way = (lone[0], a, a + 1)
            elif len(parts) == 1:
                widest = parts[0]
            else:
                widest = max(parts, key=_width)
            own = self._cost(b - a)
            if b - a <= self.small_queries or self._cost(_width(widest)) == own:
                self._follow(segment, widest, parts, lone)
                return
            extra = sum(self._cost(_width(part)) for part in parts) + len(lone) - own
            tokens = len(segment.blocks) * self.size
            if not segment.members and extra * tokens < self.item_cost * own:
                rest = segment
        self._hand_all(parts, lone, rest or self._close(segment, a, b))

    def _follow(self, segment: _Segment, widest: Way, parts: list[Way], lone: range) -> None:
        """Go on with most of the queries where that costs no more than to end: no new item."""
        if not parts:
            lone = lone[1:]
        tokens = len(segment.blocks) * self.size
        for part in parts:
            if part is not widest:
                target, low, high = part
                segment.add(low, high, tokens)
                self._hand(target, None, low, high)
        if lone:
            first = self.first_query[lone[0]]
            segment.add(first, first + len(lone), tokens)
            self.lone += lone
        self._hand(widest[0], segment, widest[1], widest[2])

    def _hand_all(self, parts: list[Way], lone: range, segment: _Segment | None) -> None:
        for target, a, b in parts:
            self._hand(target, segment and segment.copy(), a, b)
        if segment is None:
            self.lone += lone
            return
        for rank in lone:
            a = self.first_query[rank]
            self._hand(rank, segment.copy(), a, a + 1)

    def _hand(self, target: int | Node, segment: _Segment | None, a: int, b: int) -> None:
        if isinstance(target, Node):
            groups = self._groups.get(target)
            if groups is None:
                self._groups[target] = [(segment, a, b)]
            else:
                groups.append((segment, a, b))
        elif segment is None and self.plan.counts[self.rows[target]] == 1:
            self.lone.append(target)
        else:
            row = self.rows[target]
            tip = self.tips[row]
            if segment is None:
                segment = _Segment(tip.start // self.size * self.size, tip.blocks)
            else:
                segment.blocks = segment.blocks + tip.blocks
            segment.add(a, b, UNLIMITED)
            self.segments.append((segment, row))

    def _close(self, segment: _Segment, a: int, b: int) -> _Segment | None:
        """End a segment; what a fixed chunk leaves over, if anything."""
        rest = None
        if self.deterministic:
            whole = len(segment.blocks) // self.chunk_blocks * self.chunk_blocks
            if whole < len(segment.blocks):
                rest = _Segment(segment.start + whole * self.size, segment.blocks[whole:])
                segment.blocks = segment.blocks[:whole]
        if segment.blocks:
            segment.add(a, b, len(segment.blocks) * self.size)
            self.segments.append((segment, -1))
        return rest


def _width(way: Way) -> int:
    return way[2] - way[1]


def _to_arrays(
    outline: _Outline, plan: TreeAttentionPlan, window: Window | None, deterministic: bool
) -> Segments:
    """What was collected, one after the other; those that begin at a lone leaf come last."""
    size, num_new = plan.block_size, plan.num_new
    lengths = plan.ends

    # Queries in tree order.
    first_query = np.array(outline.first_query, np.int64)
    query_row = np.array(outline.rows, np.int64)
    back: Longs | int = 1
    if plan.grown is None:
        counts = first_query[1:] - first_query[:-1]
        query_row = np.repeat(query_row, counts)
        back = np.repeat(first_query[1:], counts) - np.arange(len(query_row))
    query = query_row * num_new + num_new - back
    position = lengths[query_row] - back

    shared = [segment for segment, _ in outline.segments]
    lone = np.array(outline.lone, np.int64)
    lone_rows = [outline.rows[rank] for rank in outline.lone]
    tips = list(map(outline.tips.__getitem__, lone_rows))
    row = np.array([row for _, row in outline.segments] + lone_rows, np.int64)
    starts = [segment.start for segment in shared] + [tip.start for tip in tips]
    begin = np.array(starts, np.int64) // size * size
    lists = [segment.blocks for segment in shared] + [tip.blocks for tip in tips]
    num_blocks = np.array(list(map(len, lists)), np.int64)
    is_tail = row >= 0
    tokens = np.where(is_tail, lengths[row] - begin, num_blocks * size)
    blocks, first_block = _join(lists, num_blocks, len(shared), is_tail, size)

    # Members, ranges of queries expanded.
    ranges = [member for segment in shared for member in segment.members]
    low, high, most = np.array(ranges, np.int64).reshape(-1, 3).T
    widths = high - low
    of, member = spread(widths)
    member = np.concatenate([member + low.take(of), first_query.take(lone)])
    limit = np.concatenate([most.take(of), np.full(len(lone), UNLIMITED)])
    num_members = np.ones(len(row), np.int64)
    num_members[: len(shared)] = [segment.num_queries for segment in shared]
    first_member = np.cumsum(num_members) - num_members
    member_begin = np.repeat(begin, num_members)
    own = position.take(member) + 1 - member_begin
    lower, skipped = None, np.zeros_like(tokens)
    if window is not None and len(member):
        lower = window.first_visible(position[member]) - member_begin
        unit = fixed_chunk(size) if deterministic else size
        nearest = np.minimum.reduceat(lower, first_member).clip(0)
        skipped = np.minimum(nearest // unit * unit, tokens)
    return Segments(
        blocks=blocks,
        first_block=first_block,
        begin=begin,
        tokens=tokens,
        skipped=skipped,
        row=row,
        first_member=first_member,
        num_members=num_members,
        member_query=query.take(member),
        member_limit=limit,
        member_own=own,
        member_lower=lower,
    )


def _join(
    lists: list[array[int]],
    num_blocks: Longs,
    num_shared: int,
    is_tail: npt.NDArray[np.bool_],
    size: int,
) -> tuple[Ints, Longs]:
    """All blocks one after the other, tails with room to grow; where each list begins.

    Args:
        num_shared: lists before those of lone leaves; neighbours may be the same object.
    """
    room = -(-GROWTH_TOKENS // size)
    empty = array("i", bytes(room * 4))
    pieces: list[array[int]] = []
    places = num_blocks + room * is_tail
    back: list[int] = []  # lists that are where the one before is
    last = None
    for i, (blocks, tail) in enumerate(zip(lists[:num_shared], is_tail.tolist(), strict=False)):
        if blocks is last:
            back.append(i)
        else:
            pieces.append(blocks)
            if tail:
                pieces.append(empty)
        last = None if tail else blocks
    for blocks in lists[num_shared:]:
        pieces += blocks, empty
    places[back] = 0
    first_block = np.cumsum(places) - places
    if back:
        here = np.ones(len(lists), np.bool_)
        here[back] = False
        first_block = first_block[np.maximum.accumulate(here * np.arange(len(lists)))]
    return np.frombuffer(b"".join(pieces), np.int32), first_block
