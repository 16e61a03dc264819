"""From segments to the work list of the fused kernel. Ints on the host; launch.py moves them.

Segments (:mod:`.outline`) are cut into *items* of about equal cost, one program for each K/V head,
and a query with several items has its parts merged by a merge item.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log2

import numpy as np
import numpy.typing as npt

from .braids import braid, find_leaves, most_lanes
from .cut import choose_lanes, chunk_tokens
from .outline import (
    GROWTH_TOKENS,
    UNLIMITED,
    Ints,
    Longs,
    Segments,
    find_segments,
    fixed_chunk,
    spread,
)
from .plan import TreeAttentionPlan, Window
from .tiles import Tiles

FIELDS = 8
"""Head of a record: kind, place in the list, position of the first token, queries, first slot of
its parts or -1, tokens that all its queries see, log2 of the leaves that take turns, and whether
the tokens of the small loop's first steps, which are loaded ahead, are all old. Then follow the
queries (row * T + column), what each may see of the item (tokens), and the first block numbers.
"""

SMALL, LARGE, MERGE = 0, 1, 2

MERGES_PER_SM = 4
"""Merge programs, if there are so many queries: with more, some wait for others to end."""

LIST_PADDING = 64
"""Numbers behind the list: the kernel loads those of the next tiles ahead."""


@dataclass(frozen=True, slots=True)
class Tails:
    """Where rows grow, int64 ``[B]`` each.

    Attributes:
        item: grows with the row; -1 where a row cannot.
        base, step: block i of a row's tokens, if the row's last segment holds it, is
            ``blocks[base + step * i]``.
        room: tokens up to which ``blocks`` has room for the row.
    """

    item: Longs
    base: Longs
    step: Longs
    room: Longs

    @classmethod
    def of(
        cls,
        segments: Segments,
        growing_item: Longs,
        plan: TreeAttentionPlan,
        *,
        deterministic: bool,
    ) -> Tails:
        """Of all rows.

        Args:
            growing_item: of each segment, the item that grows with it, or -1.
        """
        size = plan.block_size
        item = np.full(plan.num_rows, -1, np.int64)
        base, step, room = np.zeros((3, plan.num_rows), np.int64)
        tails = (segments.row >= 0).nonzero()[0]
        of, lane = spread(segments.lanes.take(tails))
        tail = tails.take(of)
        row, begin = segments.row.take(tail), segments.begin.take(tail)
        lanes = segments.lanes.take(tail)
        braided = (lanes > 1).nonzero()[0]
        if len(braided):
            leaf = (segments.first_member.take(tail) + lane).take(braided)
            row[braided] = segments.member_query.take(leaf) // plan.num_new
            begin[braided] = segments.member_begin.take(leaf)
        item[row] = growing_item.take(tail)
        step[row] = lanes
        base[row] = segments.first_block.take(tail) + lane - begin // size * lanes
        # Lists have whole blocks, and GROWTH_TOKENS beyond them; fixed chunks end where they must.
        held = segments.tokens.take(tail)
        ends = begin - (-held // size) * size + GROWTH_TOKENS
        if deterministic:
            chunk = fixed_chunk(size)
            ends = np.minimum(ends, begin - (-held // chunk) * chunk)
        room[row] = ends
        return cls(item, base, step, room)


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
        lanes: leaves that an item may have at most, see :mod:`.braids`.
        merge_rows, merge_parts: queries x heads, and parts, that a merge loads at a time.
        tails: where rows grow.
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
    lanes: int
    merge_rows: int
    merge_parts: int
    tails: Tails

    @property
    def num_items(self) -> int:
        return len(self.items)

    def room_after(self, ends: Longs) -> int:
        """Tokens that every row may grow by from ``ends``, int64 ``[B]``, on."""
        return int((self.tails.room - ends).min(initial=0 if not len(ends) else GROWTH_TOKENS))


def schedule(
    plan: TreeAttentionPlan,
    tiles: Tiles,
    *,
    group_size: int,
    num_kv_heads: int,
    num_sms: int,
    window: Window | None = None,
    num_merged: int | None = None,
    small_tiles: Tiles | None = None,
) -> WorkList:
    """Cut the attention of one forward into items.

    Args:
        group_size: G, query heads of a K/V head.
        num_sms: multiprocessors that share the work.
        window: tokens that no query sees any more are left out.
        num_merged: queries that merges are shaped for; default those that have parts to merge.
        small_tiles: take these instead where nothing is shared by more than a small tile.
    """
    segments = find_segments(plan, tiles, group_size=group_size, window=window)
    most_queries = segments.num_members.max(initial=0)
    if small_tiles is not None and most_queries * group_size <= tiles.m_small:
        tiles = small_tiles
    sms_per_head = num_sms / num_kv_heads
    room = tiles.programs_per_sm * sms_per_head
    most = most_lanes(tiles, group_size, plan.block_size, window)
    if most > 1:
        leaves = find_leaves(segments)
        lanes = choose_lanes(segments, leaves, most, tiles, group_size, room)
        if lanes > 1:
            segments = braid(segments, leaves, lanes, plan.block_size)
    steps = chunk_tokens(segments, tiles, group_size, room, plan.block_size)
    may_grow = plan.grown is not None or max(plan.counts, default=0) == 1
    items = _Items.of(segments, steps, tiles, group_size, may_grow=may_grow)
    return _work_list(plan, segments, items, tiles, group_size, sms_per_head, num_merged, most)


@dataclass(frozen=True, slots=True)
class _Items:
    """Work items as arrays: stretches of segments, with those members that see any of it.

    Attributes:
        segment: which is cut.
        offset: tokens of the segment before the item.
        tokens: how many it has.
        grows: whether it ends where its row does, and grows with it.
        cost: in tokens of the small class.
        large: whether it is of the large class.
        first_member, num_members: which of the members below are each item's.
        query, begin, limit, full: of the members: row * T + column; position of the first token;
            tokens of the item that it sees at most; and that it sees now.
    """

    segment: Longs
    offset: Longs
    tokens: Longs
    grows: npt.NDArray[np.bool_]
    cost: npt.NDArray[np.float64]
    large: npt.NDArray[np.bool_]
    first_member: Longs
    num_members: Longs
    query: Longs
    begin: Longs
    limit: Longs
    full: Longs

    @classmethod
    def of(
        cls, segments: Segments, steps: Longs, tiles: Tiles, group_size: int, *, may_grow: bool
    ) -> _Items:
        """Cut each segment every ``steps`` tokens.

        Args:
            may_grow: rows may get one token each, and the list stay.
        """
        left = segments.tokens - segments.skipped
        tails = (segments.row >= 0) & may_grow
        if (left > 0).all() and (left <= steps).all():
            # Nothing is cut: each segment is an item.
            segment: Longs = np.arange(len(left))
            offset, stretch, grows, lanes = segments.skipped, left, tails, segments.lanes
            num_members = segments.num_members
            item = segment.repeat(num_members)
            query, limit, own = segments.member_query, segments.member_limit, segments.member_own
            begin = segments.member_begin
            lower = segments.member_lower
        else:
            pieces = -(-left // steps)
            segment, piece = spread(pieces)
            step = steps.take(segment)
            offset = piece * step
            offset += segments.skipped.take(segment)
            last = piece == pieces.take(segment) - 1
            stretch = np.where(last, segments.tokens.take(segment) - offset, step)
            # The last item of a tail grows with its row; the others end where the next begins.
            grows = last & tails.take(segment)
            lanes = segments.lanes.take(segment)
            num_members = segments.num_members.take(segment)
            item, member = spread(num_members)
            member += segments.first_member.take(segment).take(item)
            query, limit, own, begin = (
                values.take(member)
                for values in (
                    segments.member_query,
                    segments.member_limit,
                    segments.member_own,
                    segments.member_begin,
                )
            )
            lower = None if segments.member_lower is None else segments.member_lower.take(member)

        # Of the members, those that see any of the item: what they see of it now.
        before, reach = offset.take(item), stretch.take(item)
        now = np.minimum(limit, own) - before
        sees = now > 0
        if lower is not None:
            sees &= lower < before + reach
        if not sees.all():
            item, query, now, limit, reach, begin = (
                x[sees] for x in (item, query, now, limit, reach, begin)
            )
            num_members = np.bincount(item, minlength=len(segment))
        full = np.minimum(now, reach)
        limit = np.where(grows.take(item) & (limit > UNLIMITED // 2), limit, full)
        begin = begin + offset.take(item)

        large = num_members > (0 if tiles.deterministic else tiles.m_small // group_size)
        cost = np.where(large, tiles.large_cost, 1.0) * (stretch * lanes + tiles.item_cost)
        kept = num_members > 0
        if not kept.all():
            segment, offset, stretch = (x[kept] for x in (segment, offset, stretch))
            grows, large, cost, num_members = (
                grows[kept],
                large[kept],
                cost[kept],
                num_members[kept],
            )
        return cls(
            segment=segment,
            offset=offset,
            tokens=stretch,
            grows=grows,
            cost=cost,
            large=large,
            first_member=num_members.cumsum() - num_members,
            num_members=num_members,
            query=query,
            begin=begin,
            limit=limit,
            full=full,
        )


def _merge_shape(
    tiles: Tiles, group_size: int, sms_per_head: float, num_queries: int
) -> tuple[int, int]:
    """Rows, and parts of each, that a merge loads at a time; all heads of a query together."""
    rows, values = tiles.merge_rows, tiles.merge_rows * tiles.merge_parts
    heads = 1 << (group_size - 1).bit_length()
    if not tiles.deterministic:
        # So many queries that the merges are about MERGES_PER_SM, with two parts at least.
        each = max(1.0, num_queries / (MERGES_PER_SM * sms_per_head))
        most = min(values // 2, tiles.m_large)
        rows = max(rows, min(heads << round(log2(each)), most))
    rows = max(rows, heads)
    return rows, max(1, values // rows)


def _work_list(
    plan: TreeAttentionPlan,
    segments: Segments,
    items: _Items,
    tiles: Tiles,
    group_size: int,
    sms_per_head: float,
    num_merged: int | None,
    most_lanes: int,
) -> WorkList:
    """Order the items, give slots to parts, add blanks and merges, write the records."""
    size, num_queries = plan.block_size, plan.num_rows * plan.num_new
    # The longest first, those of the large class before all others.
    order = (-items.cost - items.large * items.cost.sum()).argsort(kind="stable")
    counts = items.num_members.take(order)
    item, place = spread(counts)
    member = place + items.first_member.take(order).take(item)
    query = items.query.take(member)
    segment, offset = items.segment.take(order), items.offset.take(order)

    # Queries that several items see have parts; so has whoever shares an item with one.
    num_seen = np.bincount(query, minlength=num_queries)
    if tiles.deterministic:
        parted = np.ones(len(order), np.bool_)
    else:
        parted = np.bincount(item, num_seen.take(query) > 1, minlength=len(order)) > 0
    slots_used = counts * parted
    first_slot = slots_used.cumsum() - slots_used
    is_part = parted.take(item).nonzero()[0]
    part_query, part_item = query.take(is_part), item.take(is_part)
    by_position = (part_query << 32 | items.begin.take(member.take(is_part))).argsort()
    part_slots = (first_slot.take(part_item) + place.take(is_part)).take(by_position)
    num_parts = np.bincount(part_query, minlength=num_queries)

    width = tiles.m_large // group_size
    small = width if tiles.deterministic else tiles.m_small // group_size
    idle, merged = (num_seen == 0).nonzero()[0], num_parts.nonzero()[0]
    shaped_for = len(merged) if num_merged is None else num_merged
    merge_rows, merge_parts = _merge_shape(tiles, group_size, sms_per_head, shaped_for)
    num_blanks, num_merges = -(-len(idle) // small), -(-len(merged) // (merge_rows // group_size))
    num_work = len(order) + num_blanks
    records = np.zeros((num_work + num_merges, FIELDS + 2 * width), np.int32)
    work = records[: len(order)]
    work[:, 0] = LARGE if tiles.deterministic else items.large[order]
    lanes = segments.lanes.take(segment)
    work[:, 1] = segments.first_block.take(segment) + offset // size * lanes
    work[:, 2] = segments.begin.take(segment) + offset
    work[:, 3] = counts
    work[:, 4] = np.where(parted, first_slot, -1)
    if len(order) and not tiles.deterministic:
        firsts = counts.cumsum() - counts
        work[:, 5] = np.minimum.reduceat(items.full.take(member), firsts)
        old = plan.ends.take(query // plan.num_new) - plan.num_new - items.begin.take(member)
        ahead = tiles.kv_small * (tiles.stages_small - 1) // lanes
        work[:, 7] = np.minimum.reduceat(old, firsts) >= np.minimum(items.tokens.take(order), ahead)
    work[:, 6] = np.log2(lanes)
    at, limits = item * records.shape[1] + (place + FIELDS), items.limit.take(member)
    records.put(at, query)
    at += width
    records.put(at, limits)
    turns = int(lanes.max(initial=1))
    if 1 < turns < most_lanes:
        # The kernel looks for the limit of a block's lane as if there were as many as may be.
        braided = (lanes.take(item) > 1).nonzero()[0]
        at, limits = at.take(braided), limits.take(braided)
        for _ in range(turns, most_lanes, turns):
            at += turns
            records.put(at, limits)
    _put_tiled(records[len(order) : num_work], LARGE if tiles.deterministic else SMALL, idle, small)
    _put_tiled(records[num_work:], MERGE, merged, merge_rows // group_size)

    tokens, grows = np.zeros((2, len(records)), np.int32)
    tokens[: len(order)] = items.tokens.take(order)
    growing_item = np.full(len(segments.row), -1, np.int64)
    grows[: len(order)] = items.grows.take(order)
    growing = grows.nonzero()[0]
    growing_item[segment.take(growing)] = growing
    tails = Tails.of(segments, growing_item, plan, deterministic=tiles.deterministic)
    part_ptr = np.zeros(num_queries + 1, np.int32)
    num_parts.cumsum(out=part_ptr[1:])
    return WorkList(
        items=records,
        tokens=tokens,
        grows=grows,
        blocks=np.concatenate([segments.blocks, np.zeros(LIST_PADDING, np.int32)]),
        part_ptr=part_ptr,
        part_slots=part_slots.astype(np.int32),
        tiles=tiles,
        num_work=num_work,
        num_slots=int(slots_used.sum()),
        num_large=int(items.large.sum()) + (num_blanks if tiles.deterministic else 0),
        lanes=most_lanes,
        merge_rows=merge_rows,
        merge_parts=merge_parts,
        tails=tails,
    )


def _put_tiled(records: Ints, kind: int, queries: Longs, width: int) -> None:
    """Write records of ``width`` of the ``queries`` each, and of what is left."""
    if not len(records):
        return
    records[:, 0] = kind
    records[:, 3] = width
    records[:, 4] = -1
    rest = len(queries) - (len(records) - 1) * width
    records[-1, 3] = rest
    records[:-1, FIELDS : FIELDS + width] = queries[: len(queries) - rest].reshape(-1, width)
    records[-1, FIELDS : FIELDS + rest] = queries[len(queries) - rest :]
