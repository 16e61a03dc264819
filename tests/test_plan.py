from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from trees import SHAPES, Grown, ShadowTree, grow_randomly

from hf_tree_cache.attention import plan as plan_module
from hf_tree_cache.attention.plan import Run, TreeAttentionPlan, Window, build_plan

SEEDS = 320
THRESHOLDS = {  # (RUN_TOKENS, FOLD_TOKENS)
    "everything a run": (1, 1),
    "some of each": (24, 8),
    "as shipped": (plan_module.RUN_TOKENS, plan_module.FOLD_TOKENS),
    "everything in tails": (10**9, 10**9),
}


def draw(seed: int) -> Grown:
    rng = random.Random(seed)
    return grow_randomly(
        rng,
        SHAPES[seed % len(SHAPES)],
        rng.choice([1, 3, 4, 16]),
        rng.choice([1, 1, 2, 5, 17]),
        scale=rng.choice([2, 12, 40]),
    )


def plan_of(grown: Grown, previous: TreeAttentionPlan | None = None) -> TreeAttentionPlan:
    return build_plan(grown.shadow.tree, grown.counts, grown.num_new, previous)


def set_thresholds(monkeypatch: pytest.MonkeyPatch, which: str) -> None:
    run_tokens, fold_tokens = THRESHOLDS[which]
    monkeypatch.setattr(plan_module, "RUN_TOKENS", run_tokens)
    monkeypatch.setattr(plan_module, "FOLD_TOKENS", fold_tokens)


def check_plan(plan: TreeAttentionPlan, shadow: ShadowTree, counts: Sequence[int]) -> None:
    """Every token of each row is met exactly once, in its slot, the new ones in the tail."""
    size, rows = plan.block_size, shadow.rows
    assert plan.lengths == tuple(len(shadow.tokens[row]) for row in rows)
    assert plan.counts == tuple(counts)
    assert plan.num_rows == len(rows) == len(plan.tail_starts) == len(plan.tail_blocks)
    met: list[list[int | None]] = [[None] * length for length in plan.lengths]

    def meet(row: int, position: int, slot: int) -> None:
        assert met[row][position] is None, f"row {row} meets token {position} twice"
        met[row][position] = shadow.memory[slot]

    for run in plan.runs:
        assert run.blocks and run.start % size == 0
        assert list(run.rows) == sorted(set(run.rows))
        for row in run.rows:
            assert run.start + len(run.blocks) * size <= plan.lengths[row] - plan.counts[row]
            for i in range(len(run.blocks) * size):
                meet(row, run.start + i, run.blocks[i // size] * size + i % size)
    for row, (start, blocks) in enumerate(zip(plan.tail_starts, plan.tail_blocks, strict=True)):
        assert start % size == 0
        assert start <= plan.lengths[row] - plan.counts[row]
        assert len(blocks) == -(-(plan.lengths[row] - start) // size)
        for i in range(plan.lengths[row] - start):
            meet(row, start + i, blocks[i // size] * size + i % size)
    assert met == [shadow.tokens[row] for row in rows]
    runs = sum(len(run.blocks) for run in plan.runs) * size
    assert plan.tokens_read() == runs + sum(plan.lengths) - sum(plan.tail_starts)
    assert plan.tokens_read() <= sum(plan.lengths)


def test_the_example_in_its_docstring() -> None:
    shadow = ShadowTree(16)
    shadow.add_rows(1)
    shadow.append([36])
    shadow.select([0, 0, 0])
    shadow.append([3, 1, 2])
    plan = build_plan(shadow.tree, [3, 1, 2], 3)
    assert plan.runs == (Run(rows=(0, 1, 2), start=0, blocks=(0, 1)),)
    assert plan.tail_starts == (32, 32, 32)
    assert plan.tail_blocks == ((3,), (4,), (2,))
    assert plan.lengths == (39, 37, 38)
    assert plan.max_tail == 7
    assert plan.tokens_read() == 32 + 7 + 5 + 6


def test_a_shared_stretch_that_saves_too_little_joins_the_tails() -> None:
    shadow = ShadowTree(16)
    shadow.add_rows(1)
    shadow.append([36])
    shadow.select([0, 0])
    shadow.append([1, 1])
    plan = build_plan(shadow.tree, [1, 1], 1)
    assert plan.runs == ()
    assert plan.tail_blocks == ((0, 1, 3), (0, 1, 2))


def test_a_long_past_of_a_single_row_is_a_run_and_a_short_one_is_not() -> None:
    for length, num_runs in [(plan_module.RUN_TOKENS, 0), (plan_module.RUN_TOKENS + 1, 1)]:
        shadow = ShadowTree(16)
        shadow.add_rows(1)
        shadow.append([length - 1])
        shadow.append([1])
        plan = build_plan(shadow.tree, [1], 1)
        assert len(plan.runs) == num_runs
        check_plan(plan, shadow, [1])


@pytest.mark.parametrize("thresholds", THRESHOLDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_row_meets_each_of_its_tokens_once(
    shape: str, thresholds: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_thresholds(monkeypatch, thresholds)
    for seed in range(SHAPES.index(shape), SEEDS, len(SHAPES)):
        grown = draw(seed)
        grown.shadow.check()
        check_plan(plan_of(grown), grown.shadow, grown.counts)


def test_the_random_trees_are_what_they_should_be() -> None:
    seen = set()
    for seed in range(SEEDS):
        grown = draw(seed)
        tree = grown.shadow.tree
        paths = [tree.path(row) for row in tree.rows]
        nodes = [node for path in paths for node in path]
        seen |= {
            "held branches" if tree.held else "no held branches",
            f"T = {grown.num_new}",
            f"blocks of {tree.block_size}",
            "a single row" if len(tree.rows) == 1 else "many rows",
            "more than sixteen rows" if len(tree.rows) > 16 else "",
            "deep" if max(map(len, paths)) > 4 else "",
            "several roots" if len({path[0] for path in paths if path}) > 1 else "",
            "no sharing" if len(nodes) == len(set(nodes)) > 1 else "",
            "one-token nodes" if any(node.end - node.start == 1 for node in nodes) else "",
            "rows of different lengths" if len(set(tree.row_lengths())) > 1 else "",
            "fewer new tokens than T" if min(grown.counts) < grown.num_new else "",
            "a row without new tokens" if 0 in grown.counts else "",
            "an empty row" if 0 in tree.row_lengths() else "",
        }
    assert seen - {""} == {
        "held branches",
        "no held branches",
        *("T = 1", "T = 2", "T = 5", "T = 17"),
        *("blocks of 1", "blocks of 3", "blocks of 4", "blocks of 16"),
        "a single row",
        "many rows",
        "more than sixteen rows",
        "deep",
        "several roots",
        "no sharing",
        "one-token nodes",
        "rows of different lengths",
        "fewer new tokens than T",
        "a row without new tokens",
        "an empty row",
    }


@pytest.mark.parametrize("thresholds", THRESHOLDS)
@pytest.mark.parametrize("seed", range(24))
def test_a_plan_kept_over_growth_meets_the_same_tokens_as_a_fresh_one(
    seed: int, thresholds: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_thresholds(monkeypatch, thresholds)
    rng = random.Random(seed)
    grown = draw(seed)
    shadow, previous = grown.shadow, plan_of(grown)
    check_plan(previous, shadow, grown.counts)
    for _ in range(30):
        version = shadow.tree.topology_version
        if rng.random() < 0.1:
            shadow.fork(rng.choice(shadow.rows))
        elif rng.random() < 0.1:
            shadow.select(rng.choices(range(len(shadow.rows)), k=len(shadow.rows)))
        elif rng.random() < 0.1 and shadow.tree.held:
            shadow.prune(shadow.tree.held[0])
        elif rng.random() < 0.1:
            row = rng.choice(shadow.rows)
            shadow.truncate(row, rng.randint(0, shadow.tree.length(row)))
        num_new = rng.choice([1, 1, 1, 2, 5])
        counts = [rng.choice([0, num_new, num_new]) for _ in shadow.rows]
        shadow.append(counts)
        plan = build_plan(shadow.tree, counts, num_new, previous)
        check_plan(plan, shadow, counts)
        check_plan(build_plan(shadow.tree, counts, num_new), shadow, counts)
        grew = shadow.tree.topology_version == version == previous.topology_version
        if grew and previous.max_tail < 2 * plan_module.RUN_TOKENS:
            assert plan.runs is previous.runs
            assert plan.tail_starts is previous.tail_starts
        previous = plan


def test_plain_growth_keeps_the_runs_until_a_tail_is_too_long() -> None:
    shadow = ShadowTree(16)
    shadow.add_rows(1)
    shadow.append([100])
    shadow.select([0, 0])
    shadow.append([1, 1])
    plan = build_plan(shadow.tree, [1, 1], 1)
    check_plan(plan, shadow, [1, 1])
    made = 0
    for _ in range(3 * plan_module.RUN_TOKENS):
        shadow.append([1, 1])
        after = build_plan(shadow.tree, [1, 1], 1, plan)
        made += after.runs is not plan.runs
        plan = after
    check_plan(plan, shadow, [1, 1])
    assert 1 <= made <= 3
    assert plan.max_tail <= 2 * plan_module.RUN_TOKENS
    assert len(plan.runs) == 3


def test_eight_rows_of_a_long_prompt_read_it_once() -> None:
    shadow = ShadowTree(16)
    shadow.add_rows(1)
    shadow.append([4096])
    shadow.select([0] * 8)
    shadow.append([1] * 8)
    plan = build_plan(shadow.tree, [1] * 8, 1)
    assert plan.tokens_read() == 4096 + 8
    assert sum(plan.lengths) == 8 * 4097


@pytest.mark.parametrize(
    ("window", "first"),
    [
        (Window("sliding", 1), [0, 1, 2, 3, 4, 5, 6]),
        (Window("sliding", 3), [-2, -1, 0, 1, 2, 3, 4]),
        (Window("chunked", 1), [0, 1, 2, 3, 4, 5, 6]),
        (Window("chunked", 3), [0, 0, 0, 3, 3, 3, 6]),
    ],
    ids=["sliding 1", "sliding 3", "chunks of 1", "chunks of 3"],
)
def test_a_window_begins_where_it_should(window: Window, first: list[int]) -> None:
    assert [window.first_visible(position) for position in range(7)] == first
