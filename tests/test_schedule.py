"""The work list of the fused kernel, replayed in ints: who meets which token, and where it lies."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from trees import ShadowTree
from work_lists import GROUPS, SEEDS, WINDOWS, check_items, make_case, read_items, seeds

from hf_tree_cache.attention.outline import FIXED_CHUNK, GROWTH_TOKENS, UNLIMITED
from hf_tree_cache.attention.plan import TreeAttentionPlan, Window, build_plan
from hf_tree_cache.attention.schedule import LARGE, MERGE, SMALL, WorkList, schedule
from hf_tree_cache.attention.tiles import TABLE, Tiles


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
