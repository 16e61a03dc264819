"""Short leaves that share an item: their blocks take turns, one of each, in one list.

An item of one short leaf costs more to start than to read, and its tile of queries is mostly
padding. Several leaves fill the tile, and start once.
"""

from __future__ import annotations

import numpy as np

from .outline import GROWTH_TOKENS, UNLIMITED, Longs, Segments, spread
from .plan import Window
from .tiles import Tiles

LONGEST = 1024
"""Tokens of a leaf from which on its own item is no waste."""


def most_lanes(tiles: Tiles, group_size: int, size: int, window: Window | None) -> int:
    """Leaves that an item may have: a power of two, 1 for no braids.

    Args:
        group_size: G, query heads of a K/V head.
        size: tokens of a block.
        window: with one, each leaf would need a first token of its own.
    """
    most = min(tiles.m_small // group_size, tiles.kv_small // size, tiles.lanes)
    if window is not None or tiles.deterministic or most < 2:
        return 1
    return 1 << most.bit_length() - 1


def find_leaves(segments: Segments) -> Longs:
    """Segments of one leaf each, short enough to be braided, the longest first."""
    alone = (segments.row >= 0) & (segments.num_members == 1) & (segments.tokens <= LONGEST)
    # What is left over in the end lies before those that are braided.
    leaves = alone.nonzero()[0][::-1]
    return leaves.take((-segments.tokens.take(leaves)).argsort(kind="stable"))


def braid(segments: Segments, leaves: Longs, lanes: int, size: int) -> Segments:
    """``segments``, so many ``leaves`` taken together at a time, after all others.

    What is left over stays as it is.
    """
    num_braids = len(leaves) // lanes
    leaves = leaves[: num_braids * lanes].reshape(-1, lanes)
    flat = leaves.ravel()
    is_kept = np.ones(len(segments.row), np.bool_)
    is_kept[flat] = False
    kept = is_kept.nonzero()[0]
    tokens = segments.tokens.take(flat)
    longest = tokens.reshape(-1, lanes).max(axis=1)
    # Places up to the longest leaf's end, with room: what a shorter one does not have, nobody sees.
    held = -(-int(longest.max()) // size)
    width = held - (-GROWTH_TOKENS // size)
    places = segments.first_block.take(leaves)[:, :, None] + np.arange(held)
    braided = np.zeros((num_braids, width, lanes), np.int32)
    braided[:, :held] = segments.blocks.take(places, mode="clip").transpose(0, 2, 1)
    # Lists are in the order of segments: behind the last one that is kept, all are braided.
    after = int(kept[-1]) + 1 if len(kept) else 0
    end = int(segments.first_block[after]) if after < len(is_kept) else len(segments.blocks)

    # Of a braid, what its first leaf has, but for what follows.
    order = np.concatenate([kept, leaves[:, 0]])
    first_block, own_tokens, num_members = (
        values.take(order)
        for values in (segments.first_block, segments.tokens, segments.num_members)
    )
    first_block[len(kept) :] = np.arange(end, end + braided.size, width * lanes)
    own_tokens[len(kept) :] = longest
    num_members[len(kept) :] = lanes
    own_lanes = np.ones_like(order)
    own_lanes[len(kept) :] = lanes
    of, member = spread(num_members[: len(kept)])
    member += segments.first_member.take(kept).take(of)
    num_kept = len(member)
    member = np.concatenate([member, segments.first_member.take(flat)])
    limit = segments.member_limit.take(member)
    limit[num_kept:] = UNLIMITED - (longest.repeat(lanes) - tokens)
    return Segments(
        blocks=np.concatenate([segments.blocks[:end], braided.ravel()]),
        first_block=first_block,
        begin=segments.begin.take(order),
        tokens=own_tokens,
        skipped=segments.skipped.take(order),
        row=segments.row.take(order),
        lanes=own_lanes,
        first_member=num_members.cumsum() - num_members,
        num_members=num_members,
        member_query=segments.member_query.take(member),
        member_begin=segments.member_begin.take(member),
        member_limit=limit,
        member_own=segments.member_own.take(member),
        member_lower=None,
    )
