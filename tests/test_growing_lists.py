"""Work lists and buffers from step to step: while rows grow, fork and are pruned."""

from __future__ import annotations

import copy
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from trees import ShadowTree
from work_lists import (
    check_items,
    grow_in_place,
    make_case,
    make_workspace,
    read_items,
    seeds,
    step,
)

from hf_tree_cache.attention.outline import GROWTH_TOKENS, MANY_QUERIES
from hf_tree_cache.attention.plan import build_plan
from hf_tree_cache.attention.schedule import Tails, WorkList, schedule
from hf_tree_cache.attention.tiles import Tiles


def flatten(work: WorkList) -> dict[str, Any]:
    """All fields by name, those of its tails, too."""
    fields = {name: getattr(work, name) for name in WorkList.__slots__}
    tails = fields.pop("tails")
    return fields | {f"tails.{name}": getattr(tails, name) for name in Tails.__slots__}


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
