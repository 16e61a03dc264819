"""How long items are, and how many leaves share one: so that they end together, on a model.

The model is a GPU that runs so many programs at a time, in the order of the list, each as long as
its tokens and the cost of an item.
"""

from __future__ import annotations

from heapq import heapify, heapreplace

import numpy as np
import numpy.typing as npt

from .outline import Longs, Segments, fixed_chunk
from .tiles import Tiles

Bools = npt.NDArray[np.bool_]

AROUND = np.array([[0.7], [0.8], [0.9], [1.0], [1.1], [1.2], [1.3], [1.4]])
"""What is tried around ``Tiles.waves``."""

MOST_SIMULATED = 128
"""Segments up to which the model is run; many segments even out by themselves."""

GROWING = 64
"""Tokens that leaves may have grown by, about, before the list is cut anew."""

LAST = 0.25
"""How much of the longest item runs after the others, about."""

MOST_LARGE = 0.6
"""Of the cost of all, if few braids start beside large items."""

PIECES = 4
"""Of a large segment, about."""

ROUNDS = 0.9
"""One more piece of every large segment must take less than this of the time: it adds merges."""

CLOSE = 1.01
"""A cut is as good as the best if the model ends it within this factor."""


def chunk_tokens(
    segments: Segments, tiles: Tiles, group_size: int, room: float, size: int
) -> Longs:
    """Tokens of each segment's items; the whole of a braid.

    Args:
        room: programs that run at a time, for each K/V head.
        group_size: G, query heads of a K/V head.
        size: tokens of a block.
    """
    left = segments.tokens - segments.skipped
    if tiles.deterministic:
        return np.full(len(left), fixed_chunk(size), np.int64)
    large = _is_large(segments, tiles, group_size)
    cutter = _Cutter(
        left, segments.lanes, large, tiles, room, max(tiles.kv_small, tiles.kv_large, size)
    )
    best = cutter.cut(tiles.waves)
    # Where work is split at all, a few more or fewer pieces decide whether the last ones run alone.
    if (best < left).any() and len(left) <= MOST_SIMULATED:
        cuts = {steps.tobytes(): steps for steps in cutter.cut(tiles.waves * AROUND)}
        ends: dict[bytes, float] = {}
        for key, steps in cuts.items():
            limit = CLOSE * min(ends.values(), default=float("inf"))
            ends[key] = cutter.end(steps, limit)
        # Of those that end about first, the fewest items: less to merge.
        bound = CLOSE * min(ends.values())
        best = next(cuts[key] for key, end in ends.items() if end <= bound)
    if large.all() and room < 2 * len(left) <= 2 * MOST_SIMULATED:
        # A little more than a round of programs takes two, a little less leaves places empty.
        bound = ROUNDS * cutter.end(best, float("inf"))
        for pieces in (2, 3):
            steps = cutter.cut(pieces * len(left) / room)
            end = cutter.end(steps, bound)
            if end < bound:
                best, bound = steps, ROUNDS * end
    return best


def choose_lanes(
    segments: Segments, leaves: Longs, most: int, tiles: Tiles, group_size: int, room: float
) -> int:
    """How many leaves a braid should have, a power of two; 1 for none.

    Args:
        leaves: segments that may be braided, the longest first.
        most: leaves of a braid.
        group_size: G, query heads of a K/V head.
        room: programs that run at a time, for each K/V head.
    """
    tokens = segments.tokens
    longest = float(tokens.take(leaves).max(initial=0) + GROWING)
    wide = tokens[_is_large(segments, tiles, group_size)]
    wide_cost = tiles.large_cost * float((wide + tiles.item_cost).sum())
    num_others = len(tokens) - len(leaves) - len(wide)
    reading = wide_cost + float(tokens.sum() - wide.sum() + GROWING * len(leaves))
    best, best_end = 1, float("inf")
    lanes = 1
    while lanes <= min(most, len(leaves)):
        items = num_others + len(leaves) // lanes + len(leaves) % lanes
        whole = reading + items * tiles.item_cost
        end = whole / room + LAST * (longest * lanes + tiles.item_cost)
        # Fewer than fill the GPU must all find a place beside the large items: if they start when
        # those end, they are the last to end.
        beside = items + PIECES * len(wide) <= room and wide_cost < MOST_LARGE * whole
        if end < best_end and (lanes == 1 or items >= room or (lanes == 2 and beside)):
            best, best_end = lanes, end
        lanes *= 2
    return best


def _is_large(segments: Segments, tiles: Tiles, group_size: int) -> Bools:
    return segments.num_members * group_size > tiles.m_small


class _Cutter:
    """Segments on the model.

    Args:
        left: tokens of each, of one lane.
        lanes: leaves that take turns in it.
        large: of the large class.
        room: programs that run at a time, for each K/V head.
        quantum: tokens that a piece is a multiple of.
    """

    def __init__(
        self, left: Longs, lanes: Longs, large: Bools, tiles: Tiles, room: float, quantum: int
    ) -> None:
        self._left, self._lanes, self._large = left, lanes, large
        self._item_cost, self._room, self._quantum = tiles.item_cost, room, quantum
        self._rate = np.where(large, tiles.large_cost, 1.0)
        self._whole = float((self._rate * (left * lanes + tiles.item_cost)).sum()) / room
        self._share = left * self._rate / max(self._whole, 1.0)
        self._most = np.where(lanes > 1, 1, np.maximum(left // tiles.min_chunk, 1))

    def cut(self, waves: npt.NDArray[np.float64] | float) -> Longs:
        """Tokens of the pieces of each, for so many ``waves`` of programs."""
        pieces = (self._share * waves + 0.5).astype(np.int64)
        pieces = np.minimum(np.maximum(pieces, 1), self._most)
        return np.maximum(-(-self._left // (pieces * self._quantum)), 1) * self._quantum

    def end(self, steps: Longs, limit: float) -> float:
        """When the last item ends, in tokens, cut every ``steps`` tokens.

        Anything above ``limit``, where it cannot end earlier.
        """
        pieces = -(-self._left // steps)
        cost = self._rate * (np.minimum(steps, self._left) * self._lanes + self._item_cost)
        room = max(1, int(self._room))
        least = float((cost * pieces).sum()) / room
        if least > limit:
            return least
        order = np.lexsort((-cost, ~self._large))
        in_order = cost.take(order).repeat(pieces.take(order)).tolist()
        ends = in_order[:room]
        last: float = max(ends, default=0.0)
        heapify(ends)
        for each in in_order[room:]:
            end = ends[0] + each
            heapreplace(ends, end)
            if end > last:
                last = end
                if last > limit:
                    break
        return last
