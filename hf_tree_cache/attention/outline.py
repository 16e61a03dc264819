"""From a tree to segments: who reads which blocks together. Ints on the host.

A *segment* is a run of blocks along one path and the queries that read it together, at most one
tile of them. Segments follow a path through as many nodes as their queries stay together; a query
that leaves earlier has a limit. :mod:`.schedule` cuts them into the kernel's items.
"""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from operator import attrgetter

import numpy as np
import numpy.typing as npt

from ..memory.growth import Node
from .parts import Family, Part, Segment
from .plan import TreeAttentionPlan, Window
from .tiles import Tiles

Ints = npt.NDArray[np.int32]
Longs = npt.NDArray[np.int64]

UNLIMITED = 1 << 30
"""Limit of a query that sees all up to itself, however far its row grows."""

GROWTH_TOKENS = 256
"""Tokens that a row may grow by before its work is cut anew."""

MANY_QUERIES = 128
"""Queries above which items are saved wherever that costs less than it saves."""

FAMILY = 32
"""Rows of the largest subtree that is remembered from one plan to the next as long as it stays."""

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
        row: whose tail it is, or -1; of a braid, its first leaf's.
        lanes: leaves that take turns, see :mod:`.braids`; 1 for all others.
        first_member, num_members: which of the members below are each segment's.
        member_query: row * T + column.
        member_begin: as ``begin``; leaves of a braid begin where they please.
        member_limit: tokens of the segment that the member sees at most. UNLIMITED - n for all but
            the last n tokens, however far it grows.
        member_own: tokens of the segment up to the member's own, now.
        member_lower: tokens of the segment before the member's window; None without windows.
    """

    blocks: Ints
    first_block: Longs
    begin: Longs
    tokens: Longs
    skipped: Longs
    row: Longs
    lanes: Longs
    first_member: Longs
    num_members: Longs
    member_query: Longs
    member_begin: Longs
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
    many = plan.num_rows * plan.num_new > MANY_QUERIES
    # What is remembered depends on how it was made.
    plan.families.pop((tiles, group_size, not many), None)
    families = plan.families.setdefault((tiles, group_size, many), {})
    outline = _Outline(plan, tiles, group_size, families, many)
    outline.walk()
    return _to_arrays(outline, plan, window, tiles.deterministic)


def fixed_chunk(block_size: int) -> int:
    """FIXED_CHUNK in whole blocks, in tokens."""
    return -(-FIXED_CHUNK // block_size) * block_size


def spread(widths: Longs) -> tuple[Longs, Longs]:
    """i, ``widths[i]`` times, for each i; and 0 .. ``widths[i]`` - 1 beside it."""
    index = np.arange(len(widths)).repeat(widths)
    ramp = np.arange(len(index))
    ramp -= (widths.cumsum() - widths).take(index)
    return index, ramp


Group = tuple[Segment | None, int, int]
"""A segment in the making, if any, and the range of queries that follow it, in tree order."""

Way = tuple[int | Node, int, int]
"""Where queries go below a node: a leaf's rank, or an inner child; and which queries."""


class _Outline:
    """Walks the tree once, from the root down, and collects segments.

    Rows are taken in tree order: those under one node are neighbours, a node's own leaves first.
    Queries are counted in that order. Leaves of one new token that begin a segment of their own,
    most of a wide tree, are kept apart as ``lone`` ranks, to be handled all at once.

    Where all rows get one token, a small subtree whose queries come in one group is a *family*:
    what it contributes depends on nothing else, and is kept from plan to plan while it stays.

    Args:
        families: what was known of them after the last plan, by their first nodes; then after this.
        many: whether there are so many queries that items fill the GPU several times: the fewer the
            better. Else a long item would be the last to end.

    Attributes:
        parts: what was collected, families after what is above them.
    """

    def __init__(
        self,
        plan: TreeAttentionPlan,
        tiles: Tiles,
        group_size: int,
        families: dict[Node, Family],
        many: bool,
    ) -> None:
        self.plan = plan
        self.size = plan.block_size
        self.deterministic = tiles.deterministic
        self.small_queries = 0 if tiles.deterministic else tiles.m_small // group_size
        self.large_queries = tiles.m_large // group_size
        self.large_cost, self.item_cost = tiles.large_cost, tiles.item_cost
        self.chunk_blocks = fixed_chunk(self.size) // self.size
        self.tips = plan.tree.tips()
        self.rows: list[int] = []
        self.first_query: Sequence[int] = []  # of each rank, and one more
        self.single = plan.grown is not None or set(plan.counts) == {1}
        self.parts: list[Part] = []
        self._families = families
        self._many = many
        self._begin = 0
        self._heads: list[tuple[Node, Segment | None]] | None = None  # of families, if any may be
        self.room = array("i", bytes(4 * -(-GROWTH_TOKENS // self.size)))
        self._leaves: defaultdict[Node, list[int]] = defaultdict(list)
        self._inner: dict[Node, list[Node]] = {}
        self._ranks: dict[Node, tuple[int, int]] = {}
        self._groups: dict[Node, list[Group]] = {}

    def walk(self) -> None:
        self._find_nodes()
        root = self.plan.tree.root
        if root not in self._inner:
            return
        self._number_rows(root)
        if self.single:
            self.first_query = range(len(self.rows) + 1)
            self._heads = []
        else:
            counts = map(self.plan.counts.__getitem__, self.rows)
            self.first_query = list(accumulate(counts, initial=0))
        # The root has no tokens: above a single prompt there is nothing to decide.
        above_all = root not in self._leaves and len(self._inner[root]) == 1
        self._descend(self._inner[root][0] if above_all else root, None)
        if self.single:
            self._add_families()

    def _descend(self, head: Node, segment: Segment | None) -> Part:
        """Walk the tree from ``head`` on, which all queries below it reach with ``segment``."""
        low, high = self._range(head)
        self._part = Part(low)
        self.parts.append(self._part)
        self._groups[head] = [(segment, low, high)]
        stack = [head]
        while stack:
            node = stack.pop()
            groups = self._groups.pop(node)
            if len(groups) > 1 or groups[0][2] - groups[0][1] > self.large_queries:
                groups = self._repack(node, groups)
            if self._heads is not None and self._is_family(node, groups):
                self._heads.append((node, groups[0][0]))
                continue
            self._leave(node, self._enter(node, groups))
            stack += reversed(self._inner[node])
        return self._part

    def _is_family(self, node: Node, groups: list[Group]) -> bool:
        """What is below ``node`` depends on nothing but what all come with."""
        first, last = self._ranks[node]
        if last - first > FAMILY:
            return False
        segment, low, high = groups[0]
        if segment is not None:
            return (low, high) == (first, last) and not segment.members
        return len(groups) == 1 or all(segment is None for segment, _, _ in groups)

    def _add_families(self) -> None:
        heads, self._heads = self._heads, None
        tree, known = self.plan.tree, dict(self._families)
        self._families.clear()
        for head, segment in heads or ():
            prefix = None if segment is None else (segment.start, segment.pieces)
            family = known.get(head)
            if family is not None and family.holds(head, tree.order_version, prefix):
                family.part.base = self._ranks[head][0]
                self.parts.append(family.part)
            else:
                part = self._descend(head, segment)
                family = Family(tree.topology_version, prefix, part)
            self._families[head] = family

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

    def _number_rows(self, root: Node) -> None:
        """Fills ``rows`` and the ranks below each inner node."""
        rows, leaves, inner, ranks = self.rows, self._leaves, self._inner, self._ranks
        above: list[Node] = []
        stack = [root]
        while stack:
            node = stack.pop()
            first = len(rows)
            if node in leaves:
                rows += leaves[node]
            if inner[node]:
                above.append(node)
                stack += reversed(inner[node])
            ranks[node] = first, len(rows)
        for node in reversed(above):
            ranks[node] = ranks[node][0], ranks[inner[node][-1]][1]

    def _range(self, node: Node) -> tuple[int, int]:
        first, last = self._ranks[node]
        return self.first_query[first], self.first_query[last]

    def _enter(self, node: Node, groups: list[Group]) -> list[Group]:
        """The groups, each with the whole blocks of ``node`` in its segment."""
        first = node.start // self.size
        blocks = node.blocks[: node.end // self.size - first]
        if not blocks:
            return groups
        fresh, entered = [blocks], list[Group]()
        for segment, a, b in groups:
            if segment is None:
                segment = Segment(first * self.size, fresh, len(blocks))
            else:
                segment.extend(blocks)
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
        self._begin = node.end // self.size * self.size  # of the leaves' segments
        if self.single and len(groups) == 1:
            # Most of a deep tree: ranks are queries, and one group has them all.
            segment, a, b = groups[0]
            self._share(segment, a, b, [(child, *self._ranks[child]) for child in inner], leaves)
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
                if low < a or high > b:
                    parts.append((target, max(a, low), min(b, high)))
                else:
                    parts.append(ways[way])
                if high > b:
                    break
                way += 1
            lone = range(rank + a - begin, rank + min(b, end) - begin)
            self._share(segment, a, b, parts, lone)

    def _share(
        self, segment: Segment | None, a: int, b: int, parts: list[Way], lone: range
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
        if self.deterministic:
            self._hand_all(parts, lone, self._close(segment, a, b))
            return
        small, large_cost = self.small_queries, self.large_cost
        own = large_cost if b - a > small else 1.0
        extra = len(lone) - own
        widest: Way = lone.start, a, a + 1
        width = 0 if parts else 1
        for part in parts:
            _, low, high = part
            extra += large_cost if high - low > small else 1.0
            if high - low > width:
                width, widest = high - low, part
        if (large_cost if width > small else 1.0) == own:
            self._follow(segment, widest, parts, lone)
            return
        tokens = segment.num_blocks * self.size
        if not segment.members and extra * tokens < self.item_cost * own:
            self._hand_all(parts, lone, segment)
        elif self._many:
            self._follow(segment, widest, parts, lone)
        else:
            self._close(segment, a, b)
            self._hand_all(parts, lone, None)

    def _follow(self, segment: Segment, widest: Way, parts: list[Way], lone: range) -> None:
        """Go on with most of the queries, and let the others leave: no new item."""
        if not parts:
            lone = lone[1:]
        tokens = segment.num_blocks * self.size
        for part in parts:
            if part is not widest:
                target, low, high = part
                segment.add(low, high, tokens)
                self._hand(target, None, low, high)
        if lone:
            first = self.first_query[lone[0]]
            segment.add(first, first + len(lone), tokens)
            self._part.add_lone(lone.start, lone.stop, self._begin)
        self._hand(widest[0], segment, widest[1], widest[2])

    def _hand_all(self, parts: list[Way], lone: range, segment: Segment | None) -> None:
        for target, a, b in parts:
            self._hand(target, segment and segment.copy(), a, b)
        if segment is None:
            if lone:
                self._part.add_lone(lone.start, lone.stop, self._begin)
            return
        for rank in lone:
            a = self.first_query[rank]
            self._hand(rank, segment.copy(), a, a + 1)

    def _hand(self, target: int | Node, segment: Segment | None, a: int, b: int) -> None:
        if isinstance(target, Node):
            if target in self._groups:
                self._groups[target].append((segment, a, b))
            else:
                self._groups[target] = [(segment, a, b)]
        elif segment is None and self.plan.counts[self.rows[target]] == 1:
            self._part.add_lone(target, target + 1, self._begin)
        else:
            tip = self.tips[self.rows[target]]
            if segment is None:
                segment = Segment(tip.start // self.size * self.size, [], 0)
            segment.add(a, b, UNLIMITED)
            self._part.add_tail(segment, tip.blocks, self.room, target)

    def _close(self, segment: Segment, a: int, b: int) -> Segment | None:
        """End a segment; what a fixed chunk leaves over, if anything."""
        rest = None
        if self.deterministic:
            whole = segment.num_blocks // self.chunk_blocks * self.chunk_blocks
            if whole < segment.num_blocks:
                blocks = array("i", b"".join(segment.pieces))
                left = segment.num_blocks - whole
                rest = Segment(segment.start + whole * self.size, [blocks[whole:]], left)
                segment.pieces, segment.num_blocks = [blocks[:whole]], whole
        if segment.num_blocks:
            segment.add(a, b, segment.num_blocks * self.size)
            self._part.add(segment)
        return rest


def _to_arrays(
    outline: _Outline, plan: TreeAttentionPlan, window: Window | None, deterministic: bool
) -> Segments:
    """What was collected, one after the other; those that begin at a lone leaf come last."""
    size, num_new, parts = plan.block_size, plan.num_new, outline.parts
    lengths, rows = plan.ends, np.array(outline.rows, np.int64)

    # Queries in tree order.
    query_row, first_query = rows, np.arange(len(rows) + 1)
    back: Longs | int = 1
    if not outline.single:
        first_query = np.array(outline.first_query, np.int64)
        counts = first_query[1:] - first_query[:-1]
        query_row = rows.repeat(counts)
        back = first_query[1:].repeat(counts) - np.arange(len(query_row))
    query = query_row * num_new + num_new - back
    position = lengths.take(query_row) - back

    lists = [p.segments for p in parts], [p.members for p in parts], [p.lone for p in parts]
    begin, num_blocks, places, num_members, rank = _columns(lists[0], 5)
    low, high, most = _columns(lists[1], 3)
    first, end, lone_begin = _columns(lists[2], 3)
    is_tail = rank >= 0
    if len(parts) > 1:
        base = np.array([part.base for part in parts], np.int64)
        of_segment, of_range, of_lone = (
            base.repeat([len(numbers) // width for numbers in each])
            for each, width in zip(lists, (5, 3, 3), strict=True)
        )
        rank, low, high, first, end = (
            rank + of_segment,
            low + of_range,
            high + of_range,
            first + of_lone,
            end + of_lone,
        )
    of, lone = spread(end - first)
    lone += first.take(of)

    lone_rows = rows.take(lone)
    row = np.concatenate([np.where(is_tail, rows.take(rank), -1), lone_rows])
    begin = np.concatenate([begin, lone_begin.take(of)])
    tokens = lengths.take(row) - begin
    # Of tails, the blocks that they have now and room to grow.
    all_places = (tokens + (size - 1)) // size + len(outline.room)
    inner = (~is_tail).nonzero()[0]
    tokens[inner] = num_blocks.take(inner) * size
    all_places[inner] = places.take(inner)
    places = all_places
    first_block = places.cumsum()
    first_block -= places
    here = places > 0
    if not here.all():
        # Where the one before is.
        first_block = first_block.take(np.maximum.accumulate(here * np.arange(len(here))))
    pieces = list(chain.from_iterable([part.pieces for part in parts]))
    tails = [outline.room] * (2 * len(lone))
    tips = map(outline.tips.__getitem__, lone_rows.tolist())
    tails[::2] = map(attrgetter("blocks"), tips)
    blocks = np.frombuffer(b"".join(pieces + tails), np.int32)

    # Members, ranges of queries expanded.
    of, member = spread(high - low)
    member += low.take(of)
    member = np.concatenate([member, first_query.take(lone)])
    limit = np.concatenate([most.take(of), np.full(len(lone), UNLIMITED)])
    num_members = np.concatenate([num_members, np.ones_like(lone)])
    first_member = num_members.cumsum()
    first_member -= num_members
    member_begin = begin.repeat(num_members)
    own = position.take(member) + 1 - member_begin
    if not outline.single:
        # Of a row's new tokens, a tile's last query sees those up to its own.
        tokens = np.minimum(tokens, np.maximum.reduceat(np.minimum(own, limit), first_member))
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
        lanes=np.ones_like(row),
        first_member=first_member,
        num_members=num_members,
        member_query=query.take(member),
        member_begin=member_begin,
        member_limit=limit,
        member_own=own,
        member_lower=lower,
    )


def _columns(lists: list[array[int]], width: int) -> Longs:
    """Records of ``width`` numbers, one after the other, as ``[width, n]``."""
    return np.frombuffer(b"".join(lists), np.int64).reshape(-1, width).T
