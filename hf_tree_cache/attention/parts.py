"""Segments as they are made; families: what a small subtree contributes, kept while it lasts."""

from __future__ import annotations

from array import array
from dataclasses import dataclass

from ..memory.growth import Node

Pieces = list["array[int]"]
"""Blocks in the order of their tokens. May be several segments': replaced, never changed."""


class Segment:
    """Blocks that some queries read together, while it is followed down the tree."""

    __slots__ = ("members", "num_blocks", "num_queries", "pieces", "start")

    def __init__(self, start: int, pieces: Pieces, num_blocks: int) -> None:
        self.start = start
        self.pieces = pieces
        self.num_blocks = num_blocks
        self.members: list[tuple[int, int, int]] = []  # first query, end, what they see
        self.num_queries = 0

    def add(self, first: int, end: int, limit: int) -> None:
        """Have these queries read it, ``limit`` tokens at most."""
        self.members.append((first, end, limit))
        self.num_queries += end - first

    def extend(self, blocks: array[int]) -> None:
        self.pieces = [*self.pieces, blocks]
        self.num_blocks += len(blocks)

    def copy(self) -> Segment:
        """The same blocks for other queries."""
        return Segment(self.start, self.pieces, self.num_blocks)


class Part:
    """Finished segments of a part of the tree, as flat int64.

    Args:
        base: the part's first query, and rank, from which its own are counted.

    Attributes:
        segments: position of the first token, whole blocks, how many of them are not those of the
            segment before, queries, and rank of the leaf whose tail it is or -1; of each segment.
        members: first query, end, what they see; of each range.
        lone: first rank, end, and where their segments begin; of each range of leaves of one new
            token that begin a segment of their own.
        pieces: the blocks but for those of lone leaves; a tail's grow with its leaf.
    """

    __slots__ = ("_last", "base", "lone", "members", "pieces", "segments")

    def __init__(self, base: int) -> None:
        self.base = base
        self.segments = array("q")
        self.members = array("q")
        self.lone = array("q")
        self.pieces: Pieces = []
        self._last: Pieces | None = None

    def add(self, segment: Segment) -> None:
        """A segment that ends within the tree."""
        # Neighbours may read the same: queries of one node that need several tiles.
        own = 0 if segment.pieces is self._last else segment.num_blocks
        if own:
            self.pieces += segment.pieces
        self._last = segment.pieces
        self._note(segment, own, -1)

    def add_tail(self, segment: Segment, blocks: array[int], room: array[int], rank: int) -> None:
        """A segment that ends with a leaf's own ``blocks``, with ``room`` to grow."""
        self.pieces += segment.pieces
        self.pieces += blocks, room
        self._last = None
        self._note(segment, segment.num_blocks, rank - self.base)

    def add_lone(self, first: int, end: int, begin: int) -> None:
        self.lone.extend((first - self.base, end - self.base, begin))

    def _note(self, segment: Segment, own: int, rank: int) -> None:
        self.segments.extend((segment.start, segment.num_blocks, own, segment.num_queries, rank))
        for first, end, limit in segment.members:
            self.members.extend((first - self.base, end - self.base, limit))


@dataclass(frozen=True, slots=True)
class Family:
    """What the rows below one node contribute, entered by all of them in one group.

    Attributes:
        version: of the tree when this was found.
        prefix: where the segment began with which they came, and its blocks; None without one.
        part: what they contribute.
    """

    version: int
    prefix: tuple[int, Pieces] | None
    part: Part

    def holds(self, head: Node, order_version: int, prefix: tuple[int, Pieces] | None) -> bool:
        """Nothing has changed since."""
        return self.version >= max(head.version, order_version) and self.prefix == prefix
