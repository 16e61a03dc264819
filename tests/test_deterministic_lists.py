"""With deterministic=True, cuts and merges of a row are those that it has alone."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from trees import Grown, ShadowTree
from work_lists import Case, grow_in_place, make_case, read_buffers, read_items, seeds, visible

from hf_tree_cache.attention.outline import FIXED_CHUNK
from hf_tree_cache.attention.plan import Window, build_plan
from hf_tree_cache.attention.schedule import MERGE, WorkList, schedule
from hf_tree_cache.attention.tiles import Tiles


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
