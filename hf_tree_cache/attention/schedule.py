"""From a tree to the work list of the fused kernel. Ints on the host; launch.py moves them.

A *segment* is a run of blocks along one path and the queries that read it together, at most one
tile of them. Segments follow a path through as many nodes as their queries stay together; a query
that leaves earlier has a limit. Segments are cut into *items* of about equal cost, one program for
each K/V head, and a query with several items has its parts merged by a merge item.
"""

from __future__ import annotations

from dataclasses import dataclass
from heapq import heapreplace
from itertools import accumulate, chain

import numpy as np
import numpy.typing as npt

from ..memory.tree import Node
from .plan import TreeAttentionPlan, Window
from .tiles import Tiles

Ints = npt.NDArray[np.int32]
Longs = npt.NDArray[np.int64]

FIELDS = 8
"""Head of a record: kind, place in the list, position of the first token, queries, first slot of
its parts or -1, tokens that all its queries see. Then follow the queries (row * T + column), what
each may see of the item (tokens), and the first block numbers."""

SMALL, LARGE, MERGE = 0, 1, 2
UNLIMITED = 1 << 30
"""Limit of a query that sees all up to itself, however far its row grows."""

GROWTH_TOKENS = 256
"""Tokens that a row may grow by before its work is cut anew."""

FIXED_CHUNK = 512
"""Tokens of an item when cuts must not depend on the rest of the batch."""

AROUND = (0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.4)
"""What is tried around ``Tiles.waves``, on a model of the GPU."""

MOST_SIMULATED = 128
"""Segments up to which the cut is chosen by simulation; many segments even out by themselves."""

CLOSE = 1.03
"""A cut is as good as the best if the model ends it within this factor."""

LIST_PADDING = 64
"""Numbers behind the list: the kernel loads those of the next tiles ahead."""


@dataclass(frozen=True, slots=True)
class WorkList:
    """What one launch does.

    Attributes:
        items: int32 ``[n, FIELDS + 2 * queries]``: records, all but the first block numbers, which
            are those of ``blocks[items[:, 1] + i]``.
        blocks: int32, block ids of all items.
        part_ptr: int32 ``[B * T + 1]``, where each query's slots begin in ``part_slots``.
        part_slots: int32, slots of each query's parts, by position.
        tokens: int32 ``[n]``, tokens of each item, with which the queries end that see all.
        grows: int32 ``[n]``, 1 where ``tokens`` grows with its row.
        tiles: what the items are made for.
        num_work: items before the first merge.
        num_slots: parts in all.
        num_large: items of the large class.
        merge_rows, merge_parts: queries x heads, and parts, that a merge loads at a time.
        tail_item: int64 ``[B]``, the item that grows with a row; -1 where a row cannot.
        tail_base: int64 ``[B]``; block i of a row's tokens, if the row's last segment holds it, is
            ``blocks[tail_base + i]``.
        tail_room: int64 ``[B]``, tokens up to which ``blocks`` has room for a row to grow.
    """

    items: Ints
    tokens: Ints
    grows: Ints
    blocks: Ints
    part_ptr: Ints
    part_slots: Ints
    tiles: Tiles
    num_work: int
    num_slots: int
    num_large: int
    merge_rows: int
    merge_parts: int
    tail_item: Longs
    tail_base: Longs
    tail_room: Longs

    @property
    def num_items(self) -> int:
        return len(self.items)


class _Segment:
    """Blocks that some queries read together, while it is followed down the tree."""

    __slots__ = ("blocks", "members", "start")

    def __init__(self, start: int, blocks: list[int]) -> None:
        self.start = start
        self.blocks = blocks
        self.members: list[tuple[int, int, int]] = []  # first and last query, what they see

    def copy(self) -> _Segment:
        return _Segment(self.start, list(self.blocks))


Group = tuple[_Segment | None, int, int]
"""A segment in the making, if any, and the range of queries that follow it, in tree order."""


def schedule(
    plan: TreeAttentionPlan,
    tiles: Tiles,
    *,
    group_size: int,
    num_kv_heads: int,
    num_sms: int,
    window: Window | None = None,
    fixed: bool = False,
    small_tiles: Tiles | None = None,
) -> WorkList:
    """Cut the attention of one forward into items.

    Args:
        group_size: G, query heads of a K/V head.
        num_sms: multiprocessors that share the work.
        window: tokens that no query sees any more are left out.
        fixed: merges have the same shape whatever the plan.
        small_tiles: take these instead where nothing is shared by more than a small tile.
    """
    outline = _Outline(plan, tiles, group_size)
    outline.walk()
    segments = _Segments.of(outline, plan, window, tiles)
    most_queries = np.diff(segments.member_ptr).max(initial=0)
    if small_tiles is not None and most_queries * group_size <= tiles.m_small:
        tiles = small_tiles
    steps = _chunk_tokens(segments, tiles, group_size, num_sms / num_kv_heads, plan.block_size)
    items = _Items.of(segments, steps, tiles, group_size)
    return _work_list(plan, segments, items, tiles, group_size, fixed)


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
        self.chunk_blocks = _fixed_chunk(self.size) // self.size
        self.tips = plan.tree.tips()
        self.rows: list[int] = []
        self.first_query: list[int] = []  # of each rank, and one more
        self.segments: list[tuple[_Segment, int]] = []  # and the row whose tail it is, or -1
        self.lone: list[int] = []
        self._leaves: dict[Node, list[int]] = {}
        self._inner: dict[Node, list[Node]] = {}
        self._ranks: dict[Node, tuple[int, int]] = {}
        self._groups: dict[Node, list[Group]] = {}

    def walk(self) -> None:
        self._find_nodes()
        root = self.plan.tree.root
        if root not in self._inner:
            return
        order = self._number_rows(root)
        counts = self.plan.counts
        self.first_query = [0, *accumulate(counts[row] for row in self.rows)]
        low, high = self._range(root)
        self._groups[root] = [(None, low, high)]
        for node in order:
            self._leave(node, self._enter(node))

    def _find_nodes(self) -> None:
        """Rows with new tokens that hang on each node, and its inner children that lead to any."""
        leaves, inner = self._leaves, self._inner
        for row, (tip, count) in enumerate(zip(self.tips, self.plan.counts, strict=True)):
            if not count:
                continue
            child = tip.parent
            assert child is not None
            mine = leaves.get(child)
            if mine is not None:
                mine.append(row)
                continue
            leaves[child] = [row]
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
        fresh = self._pack(*self._ranks[node])
        if len(groups) > len(fresh) or groups[0][2] - groups[0][1] > self.large_queries:
            rest = None
            for segment, a, b in groups:
                rest = segment and self._close(segment, a, b)
            groups = [(rest and rest.copy(), a, b) for a, b in fresh]
        first = node.start // self.size
        blocks = node.blocks[: node.end // self.size - first]
        if not blocks:
            return groups
        entered: list[Group] = []
        for segment, a, b in groups:
            segment = segment or _Segment(first * self.size, [])
            segment.blocks += blocks
            entered.append((segment, a, b))
        return entered

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
        lone_end = at[leaves.stop] if at[leaves.stop] - at[rank] == len(leaves) else at[rank]
        ways: list[Way] = []
        if lone_end == at[rank]:
            ways += [(leaf, at[leaf], at[leaf + 1]) for leaf in leaves]
        ways += [(child, *self._range(child)) for child in inner]
        way = 0
        for segment, a, b in groups:
            lone = range(a, min(b, lone_end))
            parts: list[Way] = []
            while way < len(ways) and ways[way][1] < b:
                target, begin, end = ways[way]
                parts.append((target, max(a, begin), min(b, end)))
                if end > b:
                    break
                way += 1
            self._part(
                segment,
                a,
                b,
                parts,
                range(rank + a - at[rank], rank + lone.stop - at[rank]) if lone else range(0),
            )

    def _part(
        self, segment: _Segment | None, a: int, b: int, parts: list[Way], lone: range
    ) -> None:
        """Where the queries of one group go different ways, decide what becomes of its segment.

        Args:
            a, b: the queries.
            parts: where they go.
            lone: ranks of leaves of one query, the first ones from ``a`` on.
        """
        num_parts = len(parts) + len(lone)
        if segment is None:
            self._hand_all(parts, lone, None)
            return
        if num_parts == 1:
            for target, _, _ in parts or [(lone[0], a, b)]:
                self._hand(target, segment, a, b)
            return
        own, tokens = self._cost(b - a), len(segment.blocks) * self.size
        rest: _Segment | None = None
        if not self.deterministic:
            best = max(parts, key=lambda part: part[2] - part[1], default=None)
            if best is None:
                best, lone = (lone[0], a, a + 1), lone[1:]
            if self._cost(best[2] - best[1]) == own:
                # Going on with most of them costs no more than ending here: no new item.
                others = [part for part in parts if part is not best]
                segment.members += [(low, high, tokens) for _, low, high in others]
                if lone:
                    first = self.first_query[lone[0]]
                    segment.members.append((first, first + len(lone), tokens))
                self._hand_all(others, lone, None)
                self._hand(best[0], segment, best[1], best[2])
                return
            if best not in parts:
                lone = range(lone.start - 1, lone.stop)
            extra = sum(self._cost(high - low) for _, low, high in parts) + len(lone) - own
            if not segment.members and extra * tokens < self.item_cost * own:
                rest = segment
        if rest is None:
            rest = self._close(segment, a, b)
        self._hand_all(parts, lone, rest)

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
            self._groups.setdefault(target, []).append((segment, a, b))
        elif segment is None and self.plan.counts[self.rows[target]] == 1:
            self.lone.append(target)
        else:
            row = self.rows[target]
            tip = self.tips[row]
            segment = segment or _Segment(tip.start // self.size * self.size, [])
            segment.blocks += tip.blocks
            segment.members.append((a, b, UNLIMITED))
            self.segments.append((segment, row))

    def _close(self, segment: _Segment, a: int, b: int) -> _Segment | None:
        """End a segment; what a fixed chunk leaves over, if anything."""
        rest = None
        if self.deterministic:
            whole = len(segment.blocks) // self.chunk_blocks * self.chunk_blocks
            if whole < len(segment.blocks):
                rest = _Segment(segment.start + whole * self.size, segment.blocks[whole:])
                del segment.blocks[whole:]
        if segment.blocks:
            segment.members.append((a, b, len(segment.blocks) * self.size))
            self.segments.append((segment, -1))
        return rest


@dataclass(frozen=True, slots=True)
class _Segments:
    """All segments as arrays.

    Attributes:
        blocks: block ids, segment after segment, tails with room to grow.
        first_block: where each segment's begin.
        begin, tokens: position of the first token, and how many there are.
        skipped: tokens at the front that no query's window reaches.
        row: whose tail it is, or -1.
        member_ptr: where each segment's members begin.
        member_query: row * T + column.
        member_limit: tokens of the segment that the member sees at most.
        member_own: tokens of the segment up to the member's own, now.
        member_lower: tokens of the segment before the member's window.
    """

    blocks: Longs
    first_block: Longs
    begin: Longs
    tokens: Longs
    skipped: Longs
    row: Longs
    member_ptr: Longs
    member_query: Longs
    member_limit: Longs
    member_own: Longs
    member_lower: Longs

    @classmethod
    def of(
        cls, outline: _Outline, plan: TreeAttentionPlan, window: Window | None, tiles: Tiles
    ) -> _Segments:
        size, num_new = plan.block_size, plan.num_new
        lengths = np.array(plan.lengths, np.int64)
        room = -(-GROWTH_TOKENS // size)

        # Queries in tree order.
        rows = np.array(outline.rows, np.int64)
        first_query = np.array(outline.first_query or [0], np.int64)
        counts = np.diff(first_query)
        query_row = np.repeat(rows, counts)
        back = np.repeat(first_query[1:], counts) - np.arange(len(query_row))
        query = query_row * num_new + num_new - back
        position = lengths[query_row] - back

        lone_ranks = np.array(outline.lone, np.int64)
        lone_rows = rows[lone_ranks]
        tips = [outline.tips[row] for row in lone_rows.tolist()]
        row_of = np.array([row for _, row in outline.segments], np.int64)
        row_of = np.concatenate([row_of, lone_rows])
        begin = np.array(
            [segment.start for segment, _ in outline.segments]
            + [tip.start // size * size for tip in tips],
            np.int64,
        )
        lists = [segment.blocks for segment, _ in outline.segments] + [tip.blocks for tip in tips]
        num_blocks = np.fromiter(map(len, lists), np.int64, len(lists))
        places = num_blocks + np.where(row_of >= 0, room, 0)
        first_block = np.cumsum(places) - places
        blocks = np.zeros(places.sum(), np.int64)
        blocks[_ramps(num_blocks) + np.repeat(first_block, num_blocks)] = np.fromiter(
            chain.from_iterable(lists), np.int64, num_blocks.sum()
        )
        tokens = np.array([len(s.blocks) * size for s, _ in outline.segments], np.int64)
        tokens = np.concatenate([tokens, np.zeros(len(tips), np.int64)])
        is_tail = row_of >= 0
        tokens[is_tail] = lengths[row_of[is_tail]] - begin[is_tail]

        # Members, ranges of queries expanded.
        ranges = [
            (a, b, limit) for segment, _ in outline.segments for a, b, limit in segment.members
        ]
        spans = np.array(ranges, np.int64).reshape(-1, 3)
        widths = spans[:, 1] - spans[:, 0]
        shared = _ramps(widths) + np.repeat(spans[:, 0], widths)
        lone = first_query[lone_ranks]
        member = np.concatenate([shared, lone])
        limit = np.concatenate([np.repeat(spans[:, 2], widths), np.full(len(lone), UNLIMITED)])
        per_segment = np.array([len(s.members) for s, _ in outline.segments], np.int64)
        num_members = (
            np.add.reduceat(np.append(widths, 0), np.cumsum(per_segment) - per_segment)
            if len(per_segment)
            else per_segment
        )
        num_members = np.concatenate([num_members, np.ones(len(lone), np.int64)])
        member_ptr = np.concatenate([[0], np.cumsum(num_members)])
        member_begin = np.repeat(begin, num_members)
        own = position[member] + 1 - member_begin
        lower = np.zeros_like(own)
        skipped = np.zeros_like(tokens)
        if window is not None:
            lower = window.first_visible(position[member]) - member_begin
            nearest = np.minimum.reduceat(lower, member_ptr[:-1]) if len(member) else lower
            unit = _fixed_chunk(size) if tiles.deterministic else size
            skipped = np.minimum(np.maximum(nearest, 0) // unit * unit, tokens)
        return cls(
            blocks, first_block, begin, tokens, skipped,
            row_of, member_ptr, query[member], limit, own, lower,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Items:
    """Work items as arrays: stretches of segments, with those members that see any of it.

    Attributes:
        segment: which is cut.
        offset: tokens of the segment before the item.
        tokens: how many it has.
        grows: whether it ends where its row does.
        cost: in tokens of the small class.
        large: whether it is of the large class.
        member_ptr: where each item's members begin.
        query, limit, full: of the members: row * T + column; tokens of the item that it sees at
            most; and that it sees now.
    """

    segment: Longs
    offset: Longs
    tokens: Longs
    grows: npt.NDArray[np.bool_]
    cost: npt.NDArray[np.float64]
    large: npt.NDArray[np.bool_]
    member_ptr: Longs
    query: Longs
    limit: Longs
    full: Longs

    @classmethod
    def of(cls, segments: _Segments, steps: Longs, tiles: Tiles, group_size: int) -> _Items:
        """Cut each segment every ``steps`` tokens."""
        left = segments.tokens - segments.skipped
        pieces = -(-left // steps)
        segment = np.repeat(np.arange(len(left)), pieces)
        piece = _ramps(pieces)
        offset = segments.skipped[segment] + piece * steps[segment]
        last = piece == pieces[segment] - 1
        end = np.where(last, segments.tokens[segment], offset + steps[segment])

        # Every member of the segment, then only those that see any of the item.
        widths = np.diff(segments.member_ptr)[segment]
        item = np.repeat(np.arange(len(segment)), widths)
        member = _ramps(widths) + np.repeat(segments.member_ptr[segment], widths)
        sees = segments.member_limit[member] > offset[item]
        sees &= segments.member_own[member] > offset[item]
        sees &= segments.member_lower[member] < end[item]
        item, member = item[sees], member[sees]
        num_members = np.bincount(item, minlength=len(segment))
        limit = segments.member_limit[member] - offset[item]
        now = np.minimum(limit, segments.member_own[member] - offset[item])
        stretch = end - offset
        # The last item of a tail grows with its row; the others end where the next begins.
        grows = last & (segments.row[segment] >= 0)
        full = np.minimum(now, stretch[item])
        to_the_end = grows[item] & (segments.member_limit[member] == UNLIMITED)
        limit = np.where(to_the_end, UNLIMITED, full)

        large = num_members * group_size > (0 if tiles.deterministic else tiles.m_small)
        cost = np.where(large, tiles.large_cost, 1.0) * (stretch + tiles.item_cost)
        kept = num_members > 0
        if not kept.all():
            segment, offset, stretch, grows = (x[kept] for x in (segment, offset, stretch, grows))
            cost, large, num_members = cost[kept], large[kept], num_members[kept]
        member_ptr = np.concatenate([[0], np.cumsum(num_members)])
        return cls(
            segment, offset, stretch, grows, cost, large, member_ptr,
            segments.member_query[member], limit, full,
        )  # fmt: skip


def _chunk_tokens(
    segments: _Segments, tiles: Tiles, group_size: int, sms_per_head: float, size: int
) -> Longs:
    """Tokens of each segment's items: so many that they end together, as far as can be known."""
    left = segments.tokens - segments.skipped
    if tiles.deterministic:
        return np.full(len(left), _fixed_chunk(size), np.int64)
    quantum = max(tiles.kv_small, tiles.kv_large, size)
    large = np.diff(segments.member_ptr) * group_size > tiles.m_small
    rate = np.where(large, tiles.large_cost, 1.0)
    room = tiles.programs_per_sm * sms_per_head
    wave = float((rate * (left + tiles.item_cost)).sum()) / room
    most = np.maximum(left // tiles.min_chunk, 1)

    def cut(waves: float) -> Longs:
        pieces = (left * rate * waves / max(wave, 1.0) + 0.5).astype(np.int64)
        return (-(-left // (pieces.clip(1, most) * quantum))).clip(1) * quantum

    best = cut(tiles.waves)
    # Where work is split at all, a few more or fewer pieces decide whether the last ones run alone.
    if (best < left).any() and len(left) <= MOST_SIMULATED:
        cuts = {
            tuple(steps.tolist()): steps for steps in map(cut, (tiles.waves * x for x in AROUND))
        }
        ends = {
            key: _makespan(left, steps, rate, large, tiles.item_cost, int(room))
            for key, steps in cuts.items()
        }
        # Of those that end about first, the fewest items: less to merge.
        bound = CLOSE * min(ends.values())
        best = next(cuts[key] for key, end in ends.items() if end <= bound)
    return best


def _makespan(
    left: Longs,
    steps: Longs,
    rate: npt.NDArray[np.float64],
    large: npt.NDArray[np.bool_],
    item_cost: int,
    room: int,
) -> float:
    """When the last item ends, in tokens, if ``room`` of them run at a time in the list's order."""
    pieces = -(-left // steps)
    costs = np.repeat(rate * (np.minimum(steps, left) + item_cost), pieces)
    order = np.lexsort((-costs, ~np.repeat(large, pieces)))
    ends = [0.0] * max(1, room)
    last = 0.0
    for cost in costs[order].tolist():
        end = ends[0] + cost
        heapreplace(ends, end)
        last = max(last, end)
    return last


def _work_list(
    plan: TreeAttentionPlan,
    segments: _Segments,
    items: _Items,
    tiles: Tiles,
    group_size: int,
    fixed: bool,
) -> WorkList:
    """Order the items, give slots to parts, add blanks and merges, write the records."""
    size, num_queries = plan.block_size, plan.num_rows * plan.num_new
    # The longest first, those of the large class before all others.
    order = np.lexsort((-items.cost, ~items.large))
    counts = np.diff(items.member_ptr)[order]
    member = _ramps(counts) + np.repeat(items.member_ptr[:-1][order], counts)
    query, place = items.query[member], _ramps(counts)
    item = np.repeat(np.arange(len(order)), counts)
    segment, offset = items.segment[order], items.offset[order]

    # Queries that several items see have parts; so has whoever shares an item with one.
    num_seen = np.bincount(query, minlength=num_queries)
    parted = np.full(len(order), tiles.deterministic)
    np.logical_or.at(parted, item, num_seen[query] > 1)
    slots_used = np.where(parted, counts, 0)
    first_slot = np.cumsum(slots_used) - slots_used
    is_part = parted[item]
    part_query = query[is_part]
    by_position = np.lexsort(((segments.begin[segment] + offset)[item][is_part], part_query))
    part_slots = (first_slot[item] + place)[is_part][by_position]
    num_parts = np.bincount(part_query, minlength=num_queries)

    width = tiles.m_large // group_size
    small = width if tiles.deterministic else tiles.m_small // group_size
    blanks = _tiled(np.flatnonzero(num_seen == 0), small)
    merge_rows, merge_parts = tiles.merge_rows, tiles.merge_parts
    adapts = not (fixed or tiles.deterministic)
    if adapts and 2 * num_parts.max(initial=0) <= merge_parts:
        merge_rows, merge_parts = 2 * merge_rows, merge_parts // 2
    merge_rows = max(merge_rows, 1 << (group_size - 1).bit_length())
    merges = _tiled(np.flatnonzero(num_parts), merge_rows // group_size)
    num_work = len(order) + len(blanks)
    records = np.zeros((num_work + len(merges), FIELDS + 2 * width), np.int32)
    work = records[: len(order)]
    work[:, 0] = LARGE if tiles.deterministic else items.large[order]
    work[:, 1] = segments.first_block[segment] + offset // size
    work[:, 2] = segments.begin[segment] + offset
    work[:, 3] = counts
    work[:, 4] = np.where(parted, first_slot, -1)
    if len(order) and not tiles.deterministic:
        first_member = np.cumsum(counts) - counts
        work[:, 5] = np.minimum.reduceat(items.full[member], first_member).clip(0)
    work[item, FIELDS + place] = query
    work[item, FIELDS + width + place] = items.limit[member]
    for kind, first, tiled in (
        (LARGE if tiles.deterministic else SMALL, len(order), blanks),
        (MERGE, num_work, merges),
    ):
        rows = records[first : first + len(tiled)]
        rows[:, 0] = kind
        rows[:, 3] = (tiled >= 0).sum(1)
        rows[:, 4] = -1
        rows[:, FIELDS : FIELDS + tiled.shape[1]] = tiled.clip(0)

    tokens, grows = np.zeros((2, len(records)), np.int32)
    tokens[: len(order)] = items.tokens[order]
    tail_item, tail_base = np.full((2, plan.num_rows), -1, np.int64)
    tail_room = np.zeros(plan.num_rows, np.int64)
    if max(plan.counts, default=0) == 1:
        grows[: len(order)] = items.grows[order]
        tails = np.flatnonzero(segments.row >= 0)
        row, begin = segments.row[tails], segments.begin[tails]
        growing = np.flatnonzero(grows)
        tail_item[segments.row[segment[growing]]] = growing
        tail_base[row] = segments.first_block[tails] - begin // size
        # Lists have whole blocks, and GROWTH_TOKENS beyond them; fixed chunks end where they must.
        tail_room[row] = begin - (-segments.tokens[tails] // size) * size + GROWTH_TOKENS
        if tiles.deterministic:
            chunk = _fixed_chunk(size)
            tail_room[row] = np.minimum(
                tail_room[row], begin - (-segments.tokens[tails] // chunk) * chunk
            )
    return WorkList(
        items=records,
        tokens=tokens,
        grows=grows,
        blocks=np.concatenate([segments.blocks, np.zeros(LIST_PADDING, np.int64)]).astype(np.int32),
        part_ptr=np.concatenate([[0], np.cumsum(num_parts)]).astype(np.int32),
        part_slots=part_slots.astype(np.int32),
        tiles=tiles,
        num_work=num_work,
        num_slots=int(slots_used.sum()),
        num_large=int((records[:num_work, 0] == LARGE).sum()),
        merge_rows=merge_rows,
        merge_parts=merge_parts,
        tail_item=tail_item,
        tail_base=tail_base,
        tail_room=tail_room,
    )


def _fixed_chunk(block_size: int) -> int:
    """FIXED_CHUNK in whole blocks, in tokens."""
    return -(-FIXED_CHUNK // block_size) * block_size


def _ramps(widths: Longs) -> Longs:
    """0 .. w - 1 for each of ``widths``, one after the other."""
    ends = np.cumsum(widths)
    return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - widths, widths)


def _tiled(values: Longs, width: int) -> Longs:
    """``values`` in rows of ``width``, the last one filled up with -1."""
    tiled = np.full((-(-len(values) // width), width), -1, np.int64)
    tiled.flat[: len(values)] = values
    return tiled
