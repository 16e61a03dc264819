"""The work list of the fused kernel, replayed in ints: who meets which token, and where it lies."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from trees import SHAPES, Grown, ShadowTree, grow_randomly

from hf_tree_cache.attention.outline import FIXED_CHUNK, GROWTH_TOKENS, MANY_QUERIES, UNLIMITED
from hf_tree_cache.attention.plan import TreeAttentionPlan, Window, build_plan
from hf_tree_cache.attention.schedule import FIELDS, LARGE, MERGE, SMALL, Tails, WorkList, schedule
from hf_tree_cache.attention.tiles import TABLE, Tiles, TileSet
from hf_tree_cache.memory.storage import KVSpec, KVStorage

SEEDS = 240
CORE_SEEDS = range(0, SEEDS, 21)
GROUPS = [1, 4, 7, 16]
TILES = {
    "default tiles": Tiles(),
    "tiny items": Tiles(min_chunk=16, item_cost=0, waves=4, kv_small=16, kv_large=16),
    "small items": Tiles(min_chunk=32, item_cost=20, waves=1, kv_small=32),
    "one tile size": Tiles(m_large=16, min_chunk=64, item_cost=20),
    "wide tiles": Tiles(m_small=32, m_large=128, kv_large=64, min_chunk=64, large_cost=2.5),
}
WINDOWS = [
    None,
    None,
    *(Window(kind, size) for kind in ("sliding", "chunked") for size in (1, 7, 64, 600)),  # type: ignore[arg-type]
]


@dataclass(frozen=True)
class Item:
    """A record as the kernel reads it.

    Attributes:
        kind: SMALL, LARGE or MERGE.
        start: position of its first token.
        tokens: how many it has.
        slot: of its first query's part, or -1.
        full: tokens that all its queries see.
        lanes: leaves whose blocks take turns.
        queries, limits: one of each a member; limits of lanes are also there again and again.
        blocks: ids, of as many as its tokens fill.
    """

    kind: int
    start: int
    tokens: int
    slot: int
    full: int
    lanes: int
    queries: list[int]
    limits: list[int]
    blocks: npt.NDArray[np.int64]


def read_items(work: WorkList, block_size: int) -> list[Item]:
    """The records of ``work``; a Workspace's buffers are read by :func:`read_buffers`."""
    columns = work.items[:, 1], work.items[:, 6], work.tokens
    records = zip(*(column.tolist() for column in columns), strict=True)
    blocks = [
        work.blocks[at : at + (-(-tokens // block_size) << lane_bits)].astype(np.int64)
        for at, lane_bits, tokens in records
    ]
    return _parse(work.items, work.tokens, blocks)


def read_buffers(workspace: Any, storage: KVStorage) -> list[Item]:
    """What lies in the device buffers of a Workspace, block numbers turned into ids."""
    ints, work, size = workspace._ints, workspace.work, storage.block_size
    width, first = workspace._record_shape(size)
    num_items = int(ints["sizes"][0])
    assert int(ints["sizes"][1]) == work.num_work
    record = FIELDS + 2 * width + first
    records = ints["items"][: num_items * record].numpy().reshape(num_items, record)
    numbers, tokens = ints["list"].numpy(), ints["tokens"][:num_items].numpy()
    ids = {int(number): block for block, number in enumerate(storage.block_numbers()[0])}
    blocks = []
    for row, count in zip(records, tokens.tolist(), strict=True):
        kv = workspace.tiles.kv_large if row[0] == LARGE else workspace.tiles.kv_small
        at, needed = int(row[1]), -(-count // size) << int(row[6])
        mine = numbers[at : at + needed].copy()
        if workspace.key.window is None:
            # The first tile finds its blocks in the record.
            inside = min(needed, max(1, kv // size))
            mine[:inside] = row[FIELDS + 2 * width :][:inside]
        blocks.append(np.array([ids[int(number)] for number in mine], np.int64))
    return _parse(records[:, : FIELDS + 2 * width], tokens, blocks)


def _parse(records: Any, tokens: Any, blocks: list[npt.NDArray[np.int64]]) -> list[Item]:
    width = (records.shape[1] - FIELDS) // 2
    return [
        Item(
            kind=row[0],
            start=row[2],
            tokens=count,
            slot=row[4],
            full=row[5],
            lanes=1 << row[6],
            queries=row[FIELDS : FIELDS + row[3]],
            limits=row[FIELDS + width : FIELDS + width + row[3]],
            blocks=mine,
        )
        for row, count, mine in zip(records.tolist(), tokens.tolist(), blocks, strict=True)
    ]


def visible(item: Item, member: int, plan: TreeAttentionPlan, window: Window | None) -> range:
    """Tokens of ``item`` that one of its queries sees, as the kernel masks them."""
    row, column = divmod(item.queries[member], plan.num_new)
    limit = item.limits[member]
    if limit > UNLIMITED // 2:
        limit = item.tokens - (UNLIMITED - limit) - (plan.num_new - 1 - column)
    lower = 0
    if window is not None:
        own = plan.lengths[row] - plan.num_new + column + 1
        first = own - window.size if window.kind == "sliding" else (own - 1) // window.size
        first *= 1 if window.kind == "sliding" else window.size
        lower = max(0, first - item.start)
    return range(lower, max(lower, min(limit, item.tokens)))


def check_items(
    items: Sequence[Item],
    work: WorkList,
    shadow: ShadowTree,
    plan: TreeAttentionPlan,
    tiles: Tiles,
    group: int,
    window: Window | None,
) -> None:
    """Every query meets each token that it sees once, and its parts are merged."""
    size, num_new = plan.block_size, plan.num_new
    kinds = [item.kind for item in items]
    assert set(kinds[: work.num_work]) <= {SMALL, LARGE}
    assert set(kinds[work.num_work :]) <= {MERGE}
    most = {SMALL: tiles.m_small, LARGE: tiles.m_large, MERGE: work.merge_rows}
    memory = np.full(1 + max(shadow.memory, default=0), -1)
    memory[list(shadow.memory)] = list(shadow.memory.values())

    met: dict[int, list[tuple[int, npt.NDArray[np.int64]]]] = {}
    parts: dict[int, list[tuple[int, int]]] = {}
    blanks: list[int] = []
    for item in items[: work.num_work]:
        assert 1 <= len(item.queries) <= most[item.kind] // group
        assert len(set(item.queries)) == len(item.queries)
        if not item.tokens:
            assert item.slot == -1 and item.full == 0
            blanks += item.queries
            continue
        assert item.start % size == 0 and 0 <= item.full <= item.tokens
        assert item.lanes in (1, len(item.queries)) and work.lanes % item.lanes == 0
        for member, query in enumerate(item.queries):
            seen = visible(item, member, plan, window)
            if window is None:
                assert item.full <= seen.stop, "tokens that a query does not see have no mask"
            at = np.arange(seen.start, seen.stop)
            lane, start = 0, item.start
            if item.lanes > 1:
                # Each leaf begins where it likes, and ends with its own token.
                lane, start = member, plan.lengths[query // num_new] - seen.stop
            slots = item.blocks[at // size * item.lanes + lane] * size + at % size
            met.setdefault(query, []).append((start + seen.start, memory[slots]))
            if item.slot >= 0:
                parts.setdefault(query, []).append((start, item.slot + member))

    empty = []
    for row, branch in enumerate(shadow.rows):
        tokens = shadow.tokens[branch]
        for column in range(num_new):
            query, position = row * num_new + column, len(tokens) - num_new + column
            if column < num_new - plan.counts[row]:
                empty.append(query)
                assert query not in met
                continue
            first = 0 if window is None else max(0, window.first_visible(position))
            pieces = sorted(met[query], key=lambda piece: piece[0])
            got = np.concatenate([piece for _, piece in pieces])
            assert got.tolist() == tokens[first : position + 1], f"row {row}, column {column}"
            assert len(pieces) == 1 or query in parts
            assert len(parts.get(query, pieces)) == len(pieces)
    assert sorted(blanks) == empty

    used = [slot for mine in parts.values() for _, slot in mine]
    assert sorted(used) == list(range(work.num_slots))
    for query in range(plan.num_rows * num_new):
        begin, end = work.part_ptr[query : query + 2].tolist()
        in_order = [slot for _, slot in sorted(parts.get(query, []))]
        assert work.part_slots[begin:end].tolist() == in_order
    merged = [query for item in items[work.num_work :] for query in item.queries]
    assert all(len(i.queries) <= work.merge_rows // group for i in items[work.num_work :])
    assert sorted(merged) == sorted(parts)
    assert work.num_large == kinds.count(LARGE)


@dataclass
class Case:
    """A random tree, and how its attention is cut."""

    grown: Grown
    plan: TreeAttentionPlan
    tiles: Tiles
    group: int
    num_kv_heads: int
    num_sms: int
    window: Window | None

    def schedule(self) -> WorkList:
        return schedule(
            self.plan,
            self.tiles,
            group_size=self.group,
            num_kv_heads=self.num_kv_heads,
            num_sms=self.num_sms,
            window=self.window,
        )

    def check(self, work: WorkList) -> None:
        items = read_items(work, self.plan.block_size)
        shadow, plan = self.grown.shadow, self.plan
        check_items(items, work, shadow, plan, self.tiles, self.group, self.window)


def make_case(seed: int, *, num_new: int | None = None, scale: int | None = None) -> Case:
    rng = random.Random(seed)
    grown = grow_randomly(
        rng,
        SHAPES[seed % len(SHAPES)],
        rng.choice([1, 2, 4, 16, 16, 32, 64]),
        rng.choice([1, 1, 1, 2, 3, 5, 17]) if num_new is None else num_new,
        scale=rng.choice([2, 12, 40, 150]) if scale is None else scale,
    )
    deterministic = rng.random() < 0.25
    shadow = grown.shadow
    return Case(
        grown=grown,
        plan=build_plan(shadow.tree, grown.counts, grown.num_new, deterministic=deterministic),
        tiles=replace(rng.choice(list(TILES.values())), deterministic=deterministic),
        group=rng.choice(GROUPS),
        num_kv_heads=rng.choice([1, 2, 8]),
        num_sms=rng.choice([1, 4, 132]),
        window=rng.choice(WINDOWS),
    )


def seeds(step: int = 1) -> Any:
    return pytest.mark.parametrize(
        "seed",
        [
            pytest.param(
                seed,
                id=f"{SHAPES[seed % len(SHAPES)]}, tree {seed}",
                marks=[pytest.mark.core] if seed in CORE_SEEDS else [],
            )
            for seed in range(0, SEEDS, step)
        ],
    )


@seeds()
def test_every_query_meets_every_token_that_it_sees_once(seed: int) -> None:
    case = make_case(seed)
    case.check(case.schedule())


def test_the_random_cases_are_what_they_should_be() -> None:
    seen: dict[str, set[Any]] = {}
    for seed in range(SEEDS):
        case = make_case(seed)
        work, plan = case.schedule(), case.plan
        items = read_items(work, plan.block_size)
        shared = [item for item in items if item.tokens and len(item.queries) > 1]
        for feature, value in {
            "T": plan.num_new,
            "group": case.group,
            "window": case.window,
            "deterministic": plan.deterministic,
            "large items": work.num_large > 0,
            "small items": any(item.kind == SMALL and item.tokens for item in items),
            "merges": work.num_work < work.num_items,
            "parts of a query": min(9, int(np.diff(work.part_ptr).max())),
            "blanks": any(not item.tokens for item in items[: work.num_work]),
            "a member that leaves early": any(
                0 < limit < item.tokens for item in shared for limit in item.limits
            ),
            "members that leave at different places": any(
                len(set(item.limits)) > 2 for item in shared
            ),
            "tokens without masks": any(item.full > 0 for item in shared),
            "items that grow": bool(work.grows.any()),
            "lanes": max(item.lanes for item in items) > 1,
            "lanes of different lengths": any(
                item.lanes > 1 and len(set(item.limits)) > 1 for item in items
            ),
            "parts at a time": work.merge_parts,
        }.items():
            seen.setdefault(feature, set()).add(value)
    assert seen.pop("T") == {1, 2, 3, 5, 17}
    assert seen.pop("group") == set(GROUPS)
    assert seen.pop("window") == set(WINDOWS)
    assert seen.pop("parts of a query") >= {0, 1, 2, 3, 8, 9}
    assert seen.pop("parts at a time") == {2, 4, 8}
    assert all(values == {False, True} for values in seen.values()), seen


@seeds(3)
def test_lists_have_room_for_whole_tiles_however_far_rows_grow(seed: int) -> None:
    case = make_case(seed, num_new=1)
    work, size = case.schedule(), case.plan.block_size
    first = max(1, max(case.tiles.kv_small, case.tiles.kv_large) // size)
    for i, item in enumerate(read_items(work, size)):
        kv = case.tiles.kv_large if item.kind == LARGE else case.tiles.kv_small
        at, tokens = int(work.items[i, 1]), item.tokens
        if work.grows[i]:
            rows = item.queries
            starts = np.full(len(rows), item.start)
            if item.lanes > 1:
                starts = (at + np.arange(len(rows)) - work.tails.base[rows]) // item.lanes * size
            tokens = int((work.tails.room[rows] - starts).max())
        assert at + -(-tokens * item.lanes // kv) * kv // size <= len(work.blocks)
        assert at + first <= len(work.blocks)


@seeds(5)
def test_there_are_fewer_items_than_rows_and_nodes_and_pieces(seed: int) -> None:
    case = make_case(seed)
    plan, work, tiles = case.plan, case.schedule(), case.tiles
    assert len(work.items) == work.num_items == len(work.tokens) == len(work.grows)
    width = tiles.m_large // case.group
    queries = sum(plan.counts)
    segments = sum(1 for _ in plan.tree.nodes()) + queries // max(1, width // 2) + queries + 1
    shortest = FIXED_CHUNK if plan.deterministic else tiles.min_chunk
    pieces = sum(-(-length // shortest) for length in plan.lengths) * (1 + plan.num_new)
    blanks = plan.num_rows * plan.num_new - queries
    assert work.num_work <= segments + pieces + blanks
    assert work.num_items - work.num_work <= queries
    assert work.num_slots <= work.num_work * width


def test_a_prompt_of_36_tokens_and_three_branches() -> None:
    shadow = ShadowTree(16)
    shadow.add_rows(1)
    shadow.append([36])
    shadow.select([0, 0, 0])
    shadow.append([2, 0, 1])
    shadow.append([1, 1, 1])
    plan = build_plan(shadow.tree, [1, 1, 1], 1)
    # Two queries of 7 heads fill a small tile: three go apart.
    apart = schedule(plan, Tiles(), group_size=7, num_kv_heads=2, num_sms=132)
    together = schedule(plan, Tiles(), group_size=4, num_kv_heads=2, num_sms=132)
    assert describe(together) == [
        # kind, position, tokens, what each query sees, first slot of the parts
        ("small", 0, 39, {0: "all", 1: 32, 2: 32}, 0),
        ("small", 32, 6, {2: "all"}, 3),
        ("small", 32, 5, {1: "all"}, 4),
        ("merge", 0, 0, {0: 0, 1: 0}, -1),
        ("merge", 0, 0, {2: 0}, -1),
    ]
    assert together.part_ptr.tolist() == [0, 1, 3, 5]
    assert together.part_slots.tolist() == [2, 0, 4, 1, 3]
    assert describe(apart) == [
        ("small", 0, 39, {0: "all"}, -1),
        ("small", 0, 38, {2: "all"}, -1),
        ("small", 0, 37, {1: "all"}, -1),
    ]


@pytest.mark.parametrize("past", [0, 1_000])
def test_new_tokens_are_read_as_far_as_the_last_query_of_an_item_sees(past: int) -> None:
    shadow = ShadowTree(16)
    shadow.add_rows(2)
    shadow.append([past, past])
    shadow.append([640, 100])
    plan = build_plan(shadow.tree, [640, 100], 640)
    work = schedule(plan, Tiles(), group_size=4, num_kv_heads=2, num_sms=2)
    read = 0
    for item in read_items(work, 16):
        if item.kind != MERGE and item.tokens:
            position = max(query % 640 for query in item.queries)
            length = past + (640 if item.queries[0] < 640 else 100)
            assert item.start + item.tokens <= length - (639 - position)
            read += item.tokens
    tiles = [past + end for tokens in (640, 100) for end in [*range(16, tokens, 16), tokens]]
    assert read == sum(tiles)


@pytest.mark.parametrize(("rows", "items"), [(32, 96), (49, 49), (64, 128), (98, 98)])
def test_large_items_alone_fill_their_last_round(rows: int, items: int) -> None:
    """49 places for each of 8 heads: 32 rows leave a third empty, 64 take a round and a third."""
    shadow = ShadowTree(16)
    shadow.add_rows(rows)
    shadow.append([4_096 + 16] * rows)
    plan = build_plan(shadow.tree, [16] * rows, 16)
    tiles = TABLE["sm_90", 2, 128].mixed
    work = schedule(plan, tiles, group_size=4, num_kv_heads=8, num_sms=132)
    assert work.num_large == work.num_work == items


def new_slots(plan: TreeAttentionPlan, shadow: ShadowTree) -> set[tuple[int, int]]:
    """Block and place of every new token."""
    size, slots = plan.block_size, set()
    for branch, count in zip(shadow.tree.rows, plan.counts, strict=True):
        end = shadow.tree.length(branch)
        for node in shadow.tree.path(branch):
            for position in range(max(node.start, end - count), node.end):
                block = node.blocks[position // size - node.start // size]
                slots.add((block, position % size))
    return slots


def count_early(work: WorkList, plan: TreeAttentionPlan, shadow: ShadowTree) -> tuple[int, int]:
    """Small items that are read before the kernel ahead has ended, and the others; all checked."""
    new, size, tiles = new_slots(plan, shadow), plan.block_size, work.tiles
    early = other = 0
    for record, item in zip(work.items, read_items(work, size), strict=True):
        if record[0] != SMALL or not record[7]:
            other += record[0] == SMALL
            continue
        early += 1
        assert item.tokens > 0
        ahead = min(tiles.kv_small * (tiles.stages_small - 1), item.tokens * item.lanes)
        loaded = {(int(item.blocks[i // size]), i % size) for i in range(ahead)}
        assert not loaded & new
    return early, other


@seeds()
def test_no_new_token_is_read_before_the_kernel_that_writes_it_has_ended(seed: int) -> None:
    case = make_case(seed)
    count_early(case.schedule(), case.plan, case.grown.shadow)


@pytest.mark.parametrize(("private", "early"), [(100, 0), (127, 0), (128, 16), (250, 16)])
def test_leaves_longer_than_what_is_loaded_ahead_are_read_early(private: int, early: int) -> None:
    shadow, plan = branch_out(2_000, [private] * 16)
    tiles = TABLE["sm_90", 2, 128].mixed
    work = schedule(plan, tiles, group_size=4, num_kv_heads=8, num_sms=132)
    assert count_early(work, plan, shadow) == (early, 16 - early)


def branch_out(
    prompt: int, private: list[int], block_size: int = 16
) -> tuple[ShadowTree, TreeAttentionPlan]:
    """One more token for branches that have so many of their own."""
    shadow = ShadowTree(block_size)
    shadow.add_rows(1)
    shadow.append([prompt])
    shadow.select([0] * len(private))
    shadow.append(private)
    counts = [1] * len(private)
    shadow.append(counts)
    return shadow, build_plan(shadow.tree, counts, 1)


@pytest.mark.core
def test_short_leaves_take_turns_where_they_fill_the_gpu() -> None:
    private = [9, 40, 3, 17, 22, 1, 40, 8] * 32
    shadow, plan = branch_out(2_000, private)
    work = schedule(plan, Tiles(), group_size=4, num_kv_heads=8, num_sms=132)
    items = read_items(work, 16)
    check_items(items, work, shadow, plan, Tiles(), 4, None)
    braids = [item for item in items if item.lanes > 1]
    assert work.lanes == 4 and {item.lanes for item in braids} == {4}
    # All but the 16 that go on from the prompt with the large items of their tile of queries.
    assert sum(item.lanes for item in braids) == 240
    # Neighbours in length go together, so that little is read that nobody sees.
    read = sum(item.tokens * item.lanes for item in braids)
    seen = sum(private[query] + 1 for item in braids for query in item.queries)
    assert read < 1.1 * seen
    # Nothing is left in the list of what the leaves had for themselves.
    apart = schedule(plan, Tiles(lanes=1), group_size=4, num_kv_heads=8, num_sms=132)
    assert len(work.blocks) < 1.1 * len(apart.blocks)


@pytest.mark.parametrize(
    ("prompt", "private", "group", "options", "lanes"),
    [
        (2_000, [100] * 64, 4, {}, 2),
        (2_000, [1] * 64, 4, {}, 2),
        (2_000, [100] * 64, 8, {}, 1),
        (32_768, [1] * 32, 4, {}, 1),
        (2_000, [10] * 256, 4, {}, 4),
        (2_000, [10] * 256, 8, {}, 2),
        (2_000, [10] * 256, 16, {}, 1),
        (2_000, [256] * 16, 4, {}, 1),
        (32_768, [512] * 32, 4, {}, 1),
        (32, [4_000] * 256, 4, {}, 1),
        (2_000, [10] * 256, 4, {"window": Window("sliding", 100)}, 1),
        (2_000, [10] * 256, 4, {"block_size": 64}, 1),
    ],
    ids=lambda value: f"{len(value)} x {value[0]}" if isinstance(value, list) else str(value),
)
def test_how_many_leaves_share_an_item(
    prompt: int, private: list[int], group: int, options: dict[str, Any], lanes: int
) -> None:
    """As measured on an H200: where items do not fill it, or have no room, leaves go alone."""
    options = dict(options)
    _, plan = branch_out(prompt, private, options.pop("block_size", 16))
    tiles = TABLE["sm_90", 2, 128].mixed
    work = schedule(plan, tiles, group_size=group, num_kv_heads=8, num_sms=132, **options)
    assert max(item.lanes for item in read_items(work, plan.block_size)) == lanes


def flatten(work: WorkList) -> dict[str, Any]:
    """All fields by name, those of its tails, too."""
    fields = {name: getattr(work, name) for name in WorkList.__slots__}
    tails = fields.pop("tails")
    return fields | {f"tails.{name}": getattr(tails, name) for name in Tails.__slots__}


def describe(work: WorkList) -> list[tuple[Any, ...]]:
    names = {SMALL: "small", LARGE: "large", MERGE: "merge"}
    described = []
    for item in read_items(work, 16):
        limits = ["all" if limit == UNLIMITED else limit for limit in item.limits]
        sees = dict(sorted(zip(item.queries, limits, strict=True)))
        described.append((names[item.kind], item.start, item.tokens, sees, item.slot))
    return described


def test_the_list_of_256_branches_grows_with_the_rows_and_not_with_rows_times_tokens() -> None:
    shadow = ShadowTree(16)
    shadow.add_rows(1)
    shadow.append([8000])
    shadow.select([0] * 256)
    shadow.append([1] * 256)
    plan = build_plan(shadow.tree, [1] * 256, 1)
    work = schedule(plan, Tiles(), group_size=4, num_kv_heads=8, num_sms=132)
    items = read_items(work, 16)
    check_items(items, work, shadow, plan, Tiles(), 4, None)
    assert sum(i.kind == LARGE and UNLIMITED in i.limits for i in items) == 16, "none goes on"
    tile = Tiles().m_large // 4
    room = -(-GROWTH_TOKENS // 16) + 2
    assert len(work.blocks) < (256 // tile + 1) * 8000 // 16 + 256 * room + 128
    assert work.num_work < 256 * 2
    assert work.num_slots < 256 * 16
    read = sum(item.tokens for item in items if item.kind != MERGE)
    assert read < (256 // tile + 1) * 8000 + 256 * 32


@pytest.mark.core
@pytest.mark.parametrize("deterministic", [False, True], ids=["free cuts", "fixed cuts"])
@pytest.mark.parametrize("num_new", [1, 5])
def test_a_forward_without_new_tokens_is_nothing_but_blanks(
    num_new: int, deterministic: bool
) -> None:
    shadow = ShadowTree(16)
    shadow.add_rows(3)
    shadow.append([20, 0, 7])
    counts = [0, 0, 0]
    shadow.append(counts)
    plan = build_plan(shadow.tree, counts, num_new, deterministic=deterministic)
    tiles = Tiles(deterministic=deterministic)
    work = schedule(plan, tiles, group_size=4, num_kv_heads=1, num_sms=132)
    items = read_items(work, 16)
    check_items(items, work, shadow, plan, tiles, 4, None)
    assert work.num_slots == 0 and {item.tokens for item in items} == {0}


@pytest.mark.core
def test_a_batch_without_rows_has_no_items() -> None:
    plan = build_plan(ShadowTree(16).tree, [], 1)
    work = schedule(plan, Tiles(), group_size=4, num_kv_heads=1, num_sms=132)
    assert work.num_items == work.num_slots == 0


# Growth: the buffers of a Workspace, step by step.


def make_workspace(case: Case) -> tuple[Any, KVStorage]:
    launch = pytest.importorskip("hf_tree_cache.attention.launch")
    spec = KVSpec(case.num_kv_heads, 4, 4, torch.float32, torch.device("cpu"))
    storage = KVStorage(spec, 1, case.plan.block_size, 8)
    storage.add_layer()
    storage.ensure(case.plan.tree.allocator.num_blocks)
    tiles = TileSet(case.tiles, replace(case.tiles, stages_small=2))
    key = launch.WorkspaceKey(spec, case.group, case.window, case.plan.deterministic, tiles)
    return launch.Workspace(key), storage


def step(
    workspace: Any, case: Case, storage: KVStorage, counts: list[int], num_new: int = 1
) -> Case:
    """The next forward, prepared; the buffers must say what a list cut anew would."""
    shadow, last = case.grown.shadow, case.plan
    shadow.append(counts)
    storage.ensure(shadow.tree.allocator.num_blocks)
    plan = build_plan(shadow.tree, counts, num_new, last, deterministic=last.deterministic)
    workspace.prepare(plan, storage)
    items, tiles = read_buffers(workspace, storage), workspace.tiles
    check_items(items, workspace.work, shadow, plan, tiles, case.group, case.window)
    return replace(case, plan=plan)


def grow_in_place(case: Case, steps: int) -> Iterator[tuple[Any, Case, KVStorage]]:
    """One token more for each row, again and again; the workspace after each."""
    workspace, storage = make_workspace(case)
    workspace.prepare(case.plan, storage)
    counts = [1] * len(case.grown.shadow.rows)
    for _ in range(steps):
        case = step(workspace, case, storage, counts)
        yield workspace, case, storage


@seeds(4)
def test_buffers_that_grow_in_place_say_what_a_list_cut_anew_would(seed: int) -> None:
    case = make_case(seed, num_new=1, scale=random.Random(seed).choice([2, 12, 40]))
    kept = 0
    last: WorkList | None = None
    for workspace, now, _ in grow_in_place(case, 2 * case.plan.block_size + 5):
        plan = now.plan
        ints = workspace._ints
        assert ints["lengths"][: plan.num_rows].tolist() == list(plan.lengths)
        assert not workspace._sync.any() and not workspace._arrived.any()
        kept += workspace.work is last
        last = workspace.work
    assert kept > case.plan.block_size


def test_a_plan_that_was_carried_on_is_the_one_made_of_a_copy_of_the_tree() -> None:
    """What the tree remembers of its rows changes nothing: plans are a function of the tree."""
    carried = 0
    for seed in range(30):
        case, rng = make_case(seed, num_new=1), random.Random(seed)
        tree = case.grown.shadow.tree
        for _ in range(6):
            rows = list(range(len(tree.rows)))
            if rng.random() < 0.7:
                rows = rng.choices(rows, k=rng.randint(1, 9))
            tree.select(rows)
            for _ in range(rng.randint(1, 2 * tree.block_size)):
                carried += tree._paused is not None
                tree.append([1] * len(rows))
            again = copy.deepcopy(tree)
            assert again.grown is None and tree.grown is not None
            works = [
                replace(case, plan=build_plan(one, [1] * len(rows), 1)).schedule()
                for one in (tree, again)
            ]
            mine, theirs = map(flatten, works)
            for name, values in mine.items():
                assert np.array_equal(values, theirs[name]), f"{name}, tree {seed}"
    assert carried > 100


@pytest.mark.parametrize("wide", [False, True], ids=["a few rows", "many rows"])
def test_a_list_of_remembered_subtrees_is_the_one_made_from_nothing(wide: bool) -> None:
    """Whatever happens to a tree: field by field, also for several kinds of tiles at once."""
    held = walked = 0
    for seed in range(3 if wide else 20):
        rng = random.Random(seed)
        case = make_case(seed, num_new=1)
        shadow = case.grown.shadow
        if wide:
            shadow = ShadowTree(16)
            shadow.add_rows(2)
            shadow.append([300, 40])
            shadow.select([0] * 60 + [1] * 30)
        kinds = [(case.tiles, case.group), (Tiles(deterministic=seed % 3 == 0), 4)]
        plan = None
        for _ in range(25):
            live_randomly(rng, shadow)
            counts = [1] * len(shadow.rows)
            for _ in range(rng.choice([1, 1, 2, 20])):
                shadow.append(counts)
                plan = build_plan(shadow.tree, counts, 1, plan)
            for tiles, group in kinds:
                kind = tiles, group, len(counts) > MANY_QUERIES
                known = dict(plan.families.get(kind, {}))
                options = {"group_size": group, "num_kv_heads": 2, "num_sms": 20}
                fresh = schedule(build_plan(shadow.tree, counts, 1), tiles, **options)
                work = schedule(plan, tiles, **options)
                mine, theirs = flatten(work), flatten(fresh)
                for name, values in mine.items():
                    assert np.array_equal(values, theirs[name]), f"{name}, tree {seed}"
                families = plan.families[kind]
                held += sum(known.get(node) is family for node, family in families.items())
                walked += sum(known.get(node) is not family for node, family in families.items())
        check_items(
            read_items(work, shadow.tree.block_size), work, shadow, plan, tiles, group, None
        )
    assert held > 150 and walked > 150


def test_a_remembered_subtree_whose_first_node_takes_in_its_parent_is_walked_again() -> None:
    shadow = ShadowTree(16)
    shadow.add_rows(2)
    shadow.append([64, 64])
    shadow.select([0] * 40 + [1] * 40)
    shadow.append([100] + [1] * 79)
    shadow.select([0, *range(80)])
    plan, starts = None, []
    for rows in ([*range(81)], [0, 1, *range(41, 81)]):
        shadow.select(rows)
        counts = [1] * len(rows)
        shadow.append(counts)
        plan = build_plan(shadow.tree, counts, 1, plan)
        works = [
            schedule(one, Tiles(), group_size=4, num_kv_heads=1, num_sms=132)
            for one in (plan, build_plan(shadow.tree, counts, 1))
        ]
        for name in ("items", "tokens", "blocks", "part_slots"):
            mine, theirs = (getattr(work, name).tolist() for work in works)
            assert mine == theirs, name
        (families,) = plan.families.values()
        starts.append({node: node.start for node in families})
    (node,) = starts[0].keys() & starts[1].keys()
    assert (starts[0][node], starts[1][node]) == (64, 0)


def live_randomly(rng: random.Random, shadow: ShadowTree) -> None:
    """Fork, prune, hold, bring back, cut off, mix: a few rows at a time, then all on a leaf."""
    for _ in range(rng.randint(0, 4)):
        rows, branches = shadow.rows, shadow.tree.branches
        what = rng.choice(
            ["fork", "prune", "fork", "prune", "mix", "hold", "back", "cut", "end", "at"]
        )
        branch = rng.choice(branches)
        length = shadow.tree.length(branch)
        order = list(range(len(rows)))
        if what == "fork":
            at = rng.randrange(len(order))
            shadow.select([*order[: at + 1], *order[at:]])
        elif what == "prune" and len(order) > 2:
            order.remove(rng.choice(order))
            shadow.select(order)
        elif what == "mix" and rng.random() < 0.2:
            shadow.select(rng.choices(order, k=len(order)))
        elif what == "hold" and len(rows) > 2:
            rows.remove(rng.choice(rows))
            shadow.tree.set_rows(rows)
        elif what == "back":
            for held in shadow.tree.held[:2]:
                rows.insert(rng.randint(0, len(rows)), held)
            shadow.tree.set_rows(rows)
        elif what == "cut":
            shadow.truncate(branch, rng.randint(0, length))
        elif what == "end" and len(branches) > 3 and (branch not in rows or len(rows) > 2):
            shadow.prune(branch)
        elif what == "at" and len(branches) < 150:
            new = shadow.fork(branch, 1, at=rng.randint(0, length))
            shadow.tree.set_rows(rows + new)


def test_lengths_go_up_on_the_device_alone_while_rows_grow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    buffers = pytest.importorskip("hf_tree_cache.attention.buffers")
    sent: list[int] = []
    send = buffers.IntBuffer._send

    def note(this: Any, begin: int, end: int) -> None:
        sent.append(end - begin)
        send(this, begin, end)

    monkeypatch.setattr(buffers.IntBuffer, "_send", note)
    case = replace(make_case(0, num_new=1), window=None)
    size = case.plan.block_size
    for i, (workspace, now, _) in enumerate(grow_in_place(case, 3 * size)):
        grown = now.plan.grown
        assert grown is not None
        crossed = ((grown.lengths - 1) % size == 0).any()
        if not crossed and i:
            assert not sent, "a step within blocks sends nothing"
        ends = workspace._ints["lengths"][: now.plan.num_rows].tolist()
        assert ends == list(now.plan.lengths)
        sent.clear()


def test_growth_ends_where_the_room_of_a_list_does() -> None:
    case = replace(make_case(0, num_new=1), window=None)
    lists: list[WorkList] = []
    for workspace, _, _ in grow_in_place(case, 2 * GROWTH_TOKENS + 70):
        if not lists or lists[-1] is not workspace.work:
            lists.append(workspace.work)
    assert 2 <= len(lists) <= 4


def test_a_forward_without_new_tokens_is_not_taken_for_growth() -> None:
    for seed in range(16):
        *_, (workspace, case, storage) = grow_in_place(make_case(seed, num_new=1), 2)
        step(workspace, case, storage, [0] * case.plan.num_rows)


def test_a_forward_in_which_only_some_rows_grow_is_cut_anew() -> None:
    for seed in range(24):
        rng = random.Random(seed)
        *_, (workspace, case, storage) = grow_in_place(make_case(seed, num_new=1), 2)
        for _ in range(4):
            case = step(workspace, case, storage, [rng.randint(0, 1) for _ in case.plan.counts])


def test_buffers_follow_forks_and_prunes() -> None:
    for seed in range(24):
        case = make_case(seed, num_new=1)
        rng = random.Random(seed)
        workspace, storage = make_workspace(case)
        shadow = case.grown.shadow
        for _ in range(8):
            chosen = rng.choices(range(len(shadow.rows)), k=rng.randint(1, 9))
            shadow.select(chosen)
            num_new = rng.choice([1, 1, 1, 4])
            counts = [rng.randint(1, num_new) for _ in shadow.rows]
            case = step(workspace, case, storage, counts, num_new)


# Deterministic: cuts of a row are its own.


def alone(case: Case, row: int) -> Case:
    """The same row in a batch and a tree of its own."""
    length, count = case.plan.lengths[row], case.plan.counts[row]
    shadow = ShadowTree(case.plan.block_size)
    shadow.add_rows(1)
    shadow.append([length - count])
    shadow.append([count])
    plan = build_plan(shadow.tree, [count], case.plan.num_new, deterministic=True)
    return replace(case, grown=Grown(shadow, [count], case.plan.num_new), plan=plan)


def cuts(case: Case, work: WorkList, row: int) -> list[list[tuple[int, int, int]]]:
    """Start, tokens and class of all that each new token of a row meets, in the order of merging.

    What it does not see of an item's end is not counted: it does not change a bit.
    """
    items = [item for item in read_items(work, case.plan.block_size) if item.slot >= 0]
    slots = {item.slot + i: item for item in items for i in range(len(item.queries))}
    found = []
    num_new = case.plan.num_new
    for column in range(num_new - case.plan.counts[row], num_new):
        query = row * num_new + column
        begin, end = work.part_ptr[query : query + 2].tolist()
        mine = [slots[slot] for slot in work.part_slots[begin:end].tolist()]
        ends = [visible(item, item.queries.index(query), case.plan, None).stop for item in mine]
        found.append([(i.start, stop, i.kind) for i, stop in zip(mine, ends, strict=True)])
    return found


def make_deterministic_case(seed: int, window: Window | None) -> Case:
    rng = random.Random(seed)
    scale = rng.choice([12, 150, 700])
    case = make_case(seed, num_new=rng.choice([1, 1, 3]), scale=scale)
    grown = case.grown
    plan = build_plan(grown.shadow.tree, grown.counts, grown.num_new, deterministic=True)
    return replace(case, plan=plan, tiles=replace(case.tiles, deterministic=True), window=window)


@pytest.mark.parametrize(
    "window",
    [None, Window("sliding", 600), Window("chunked", 300), Window("sliding", 7)],
    ids=["no window", "sliding window", "chunks", "a short window"],
)
@seeds(6)
def test_deterministic_cuts_of_a_row_are_those_that_it_has_alone(
    seed: int, window: Window | None
) -> None:
    case = make_deterministic_case(seed, window)
    work = case.schedule()
    case.check(work)
    for row, count in enumerate(case.plan.counts):
        if count:
            lone = alone(case, row)
            assert cuts(case, work, row) == cuts(lone, lone.schedule(), 0), f"row {row}"


def test_a_deterministic_merge_has_the_shape_that_it_has_alone() -> None:
    shapes = set()
    for length in (10, 600, 1200, 3000, 6000):
        shadow = ShadowTree(16)
        shadow.add_rows(2)
        shadow.append([length, 20])
        shadow.append([1, 1])
        plan = build_plan(shadow.tree, [1, 1], 1, deterministic=True)
        tiles = Tiles(deterministic=True)
        work = schedule(plan, tiles, group_size=4, num_kv_heads=1, num_sms=132)
        shapes.add((work.merge_rows, work.merge_parts))
    assert len(shapes) == 1, "a sum over other numbers of parts may round in another order"


@pytest.mark.parametrize(
    ("group", "num_queries", "shape"),
    [(4, 16, (8, 8)), (8, 64, (8, 8)), (4, 256, (16, 4)), (8, 256, (32, 2)), (7, 256, (32, 2))],
)
def test_merges_take_more_queries_where_there_are_many(
    group: int, num_queries: int, shape: tuple[int, int]
) -> None:
    """About four merges a multiprocessor: 132 of them, 8 K/V heads."""
    shadow = ShadowTree(16)
    shadow.add_rows(1)
    shadow.append([600])
    shadow.select([0] * num_queries)
    counts = [1] * num_queries
    shadow.append(counts)
    plan = build_plan(shadow.tree, counts, 1)
    options = {"group_size": group, "num_kv_heads": 8, "num_sms": 132}
    work = schedule(plan, Tiles(), **options)
    assert (work.merge_rows, work.merge_parts) == shape
    assert max(work.items[work.num_work :, 3]) <= shape[0] // group
    few, many = (schedule(plan, Tiles(), num_merged=n, **options) for n in (0, 4096))
    assert (few.merge_rows, few.merge_parts) == (8, 8)
    assert (many.merge_rows, many.merge_parts) == (32, 2)
    narrow = schedule(plan, Tiles(m_large=16), num_merged=4096, **options)
    assert narrow.merge_rows <= 16


@pytest.mark.parametrize(
    ("group", "merge_parts", "shape"),
    [(1, 8, (8, 8)), (7, 8, (8, 8)), (9, 8, (16, 4)), (16, 8, (16, 4)), (16, 2, (16, 1))],
    ids=["1 head", "7 heads", "9 heads", "16 heads", "16 heads and few parts"],
)
@pytest.mark.parametrize("deterministic", [False, True], ids=["free cuts", "fixed cuts"])
def test_a_merge_of_a_large_group_takes_more_rows_and_fewer_parts(
    group: int, merge_parts: int, shape: tuple[int, int], deterministic: bool
) -> None:
    shadow = ShadowTree(16)
    shadow.add_rows(1)
    shadow.append([9000])
    shadow.append([1])
    plan = build_plan(shadow.tree, [1], 1, deterministic=deterministic)
    tiles = Tiles(merge_rows=8, merge_parts=merge_parts, deterministic=deterministic)
    work = schedule(plan, tiles, group_size=group, num_kv_heads=1, num_sms=132)
    assert work.num_slots > merge_parts
    assert (work.merge_rows, work.merge_parts) == shape


def test_deterministic_cuts_do_not_depend_on_when_the_tree_last_changed() -> None:
    shadow = ShadowTree(16)
    shadow.add_rows(1)
    shadow.append([FIXED_CHUNK - 9])
    shadow.append([1])
    plan = build_plan(shadow.tree, [1], 1, deterministic=True)
    case = replace(
        make_case(0),
        grown=Grown(shadow, [1], 1),
        plan=plan,
        tiles=Tiles(deterministic=True),
        group=4,
        window=None,
    )
    for workspace, now, storage in grow_in_place(case, 40):
        items = read_buffers(workspace, storage)[: workspace.work.num_work]
        fresh = read_items(now.schedule(), 16)
        met = [(item.start, item.tokens) for item in items]
        expected = [(item.start, item.tokens) for item in fresh if item.kind != MERGE]
        assert met == expected, f"at {now.plan.lengths[0]} tokens"


def test_the_example_in_the_docs() -> None:
    """docs/tree_attention.md: a prompt of 300 tokens, six branches of 40, one more each."""
    shadow = ShadowTree(16)
    shadow.add_rows(1)
    shadow.append([300])
    shadow.select([0] * 6)
    shadow.append([40] * 6)
    shadow.append([1] * 6)
    plan = build_plan(shadow.tree, [1] * 6, 1)
    tiles = Tiles(max_registers=168, programs_per_sm=3)
    work = schedule(plan, tiles, group_size=4, num_kv_heads=8, num_sms=132)
    kinds, _, starts, counts, slots, full = work.items[:, :6].T.tolist()
    assert kinds == [1, 1] + [0] * 6 + [2, 2, 2]
    assert starts[:8] == [0, 192] + [288] * 6
    assert counts == [6, 6] + [1] * 6 + [2, 2, 2]
    assert slots[:8] == [0, 6, 12, 13, 14, 15, 16, 17]
    assert full[:8] == [192, 96] + [53] * 6
    assert work.tokens[:8].tolist() == [192, 96] + [53] * 6
    assert work.grows.tolist() == [0, 0] + [1] * 6 + [0] * 3
    assert work.part_slots[:12].tolist() == [0, 6, 12, 1, 7, 13, 2, 8, 14, 3, 9, 15]
    assert plan.num_rows * 341 == 2046 and int(work.tokens.sum()) == 606
