from __future__ import annotations

import random
import sys
from collections.abc import Callable
from typing import Any

import pytest
from copies import WAYS
from trees import ShadowTree, step_randomly

from hf_tree_cache.errors import IntegrityError, InvalidArgument, OutOfBlocks, StaleBranch
from hf_tree_cache.memory.allocator import PhysicalKVAllocator
from hf_tree_cache.memory.tree import Branch, BranchTree


def grown(*lengths: int, block_size: int = 4, max_blocks: int | None = None) -> ShadowTree:
    """One unshared row of each length."""
    shadow = ShadowTree(block_size, max_blocks)
    shadow.add_rows(len(lengths))
    shadow.append(lengths)
    return shadow


def spans(tree: BranchTree, branch: Branch) -> list[tuple[int, int, list[int]]]:
    return [(node.start, node.end, list(node.blocks)) for node in tree.path(branch)]


def blocks_in_use(shadow: ShadowTree) -> int:
    return shadow.tree.allocator.num_used


def test_the_example_in_its_docstring() -> None:
    shadow = grown(6)
    tree, a = shadow.tree, shadow.rows[0]
    assert spans(tree, a) == [(0, 6, [0, 1])]
    b, c = shadow.fork(a, 2)
    (node,) = tree.nodes()
    assert node.refs == 3
    assert [tree.length(branch) for branch in (a, b, c)] == [6, 6, 6]
    tree.set_rows([a, b, c])
    done = shadow.append([1, 1, 1])
    assert done.copies == [(1, 2), (1, 3)]
    assert done.slots == [[2 * 4 + 2], [3 * 4 + 2], [1 * 4 + 2]]
    assert [spans(tree, branch)[1:] for branch in (a, b, c)] == [
        [(6, 7, [2])],
        [(6, 7, [3])],
        [(6, 7, [1])],
    ]
    assert tree.block_table(c) == [0, 1]
    shadow.check()


def test_a_branch_grows_in_place_and_across_blocks() -> None:
    shadow = grown(3)
    tree, a = shadow.tree, shadow.rows[0]
    version = tree.topology_version
    assert shadow.append([1]).slots == [[3]]
    assert shadow.append([1]).slots == [[4]]
    assert shadow.append([7]).slots == [[5, 6, 7, 8, 9, 10, 11]]
    assert spans(tree, a) == [(0, 12, [0, 1, 2])]
    assert tree.topology_version == version
    shadow.check()


@pytest.mark.parametrize("block_size", [1, 3, 16])
@pytest.mark.parametrize(
    ("blocks", "more"),
    [(0, 0), (0, 1), (1, -1), (1, 0), (1, 1), (5, 0)],
    ids=["nothing", "1 token", "S - 1 tokens", "S tokens", "S + 1 tokens", "5 S tokens"],
)
def test_forks_at_the_tip_cost_nothing_and_part_on_write(
    block_size: int, blocks: int, more: int
) -> None:
    shadow = grown(blocks * block_size + more, block_size=block_size)
    before = blocks_in_use(shadow)
    branches = shadow.rows + shadow.fork(shadow.rows[0], 16)
    assert blocks_in_use(shadow) == before
    shadow.tree.set_rows(branches)
    for count in (1, block_size, 2):
        shadow.append([count] * 17)
        shadow.check()


@pytest.mark.parametrize("block_size", [1, 3, 4, 16])
def test_forks_at_every_earlier_token_share_exactly_that_much(block_size: int) -> None:
    for at in range(14):
        shadow = grown(13, block_size=block_size)
        root = shadow.rows[0]
        before = blocks_in_use(shadow)
        fork, again = shadow.fork(root, 2, at=at)
        assert blocks_in_use(shadow) == before
        assert shadow.tree.length(fork) == at
        shadow.check()
        shadow.tree.set_rows([fork, root, again])
        done = shadow.append([2, 3, 0])
        shadow.check()
        # At the tip, root too leaves a partial block that a held fork still needs.
        copied = 2 if at == 13 else 1
        assert len(done.copies) == (copied if at % block_size else 0)
        shadow.prune(root)
        shadow.check()


def test_negative_at_counts_back_from_the_tip() -> None:
    shadow = grown(10)
    root = shadow.rows[0]
    for at, length in [(-1, 9), (-10, 0), (-4, 6), (0, 0), (10, 10), (None, 10)]:
        (fork,) = shadow.fork(root, at=at)
        assert shadow.tree.length(fork) == length
    shadow.check()


def test_a_fork_of_a_fork_at_a_token_of_its_ancestor() -> None:
    shadow = grown(10)
    root = shadow.rows[0]
    (child,) = shadow.fork(root, at=7)
    shadow.tree.set_rows([child])
    shadow.append([5])
    (early,) = shadow.fork(child, at=-9)
    assert shadow.tree.length(early) == 3
    shadow.check()
    assert len(shadow.tree.path(child)) == 3


def test_forking_nothing_changes_no_node() -> None:
    shadow = grown(10)
    assert shadow.fork(shadow.rows[0], 0) == []
    assert shadow.fork(shadow.rows[0], 0, at=5) == []
    assert len(list(shadow.tree.nodes())) == 1
    shadow.check()


def test_the_last_owner_of_a_partial_block_writes_in_place() -> None:
    shadow = grown(6)
    a = shadow.rows[0]
    b, held = shadow.fork(a, 2)
    shadow.tree.set_rows([a, b])
    assert shadow.append([1, 1]).copies == [(1, 2), (1, 3)]
    shadow.tree.set_rows([held])
    assert shadow.append([1]).copies == []
    assert shadow.tree.num_copies == 2
    shadow.check()


def test_whoever_forks_before_a_taken_block_copies_it() -> None:
    shadow = grown(6)
    root = shadow.rows[0]
    (fork,) = shadow.fork(root, at=5)
    shadow.tree.set_rows([fork])
    assert shadow.append([1]).copies == [(1, 2)]
    shadow.check()


def test_a_block_taken_over_can_be_taken_again_after_its_taker_is_gone() -> None:
    shadow = grown(6)
    a = shadow.rows[0]
    b, held = shadow.fork(a, 2)
    shadow.tree.set_rows([a])
    shadow.append([1])
    shadow.tree.set_rows([b])
    shadow.append([1])
    shadow.tree.set_rows([held])
    shadow.append([1])
    taker = next(x for x in (a, b, held) if shadow.tree.block_table(x)[1] == 1)
    (late,) = shadow.fork(a, at=6)
    shadow.prune(taker)
    shadow.tree.set_rows([late])
    assert shadow.append([1]).copies == []
    shadow.check()


def test_no_copy_when_the_shared_tokens_fill_their_blocks() -> None:
    shadow = grown(8)
    shadow.select([0] * 5)
    assert shadow.append([1] * 5).copies == []
    assert blocks_in_use(shadow) == 2 + 5
    shadow.check()


def test_rows_without_new_tokens_stay_where_they_are() -> None:
    shadow = grown(6)
    shadow.select([0, 0, 0])
    before = [shadow.tree.block_table(row) for row in shadow.rows]
    done = shadow.append([0, 2, 0])
    assert done.slots == [[], [2 * 4 + 2, 2 * 4 + 3], []]
    assert [shadow.tree.block_table(shadow.rows[i]) for i in (0, 2)] == before[:2]
    assert shadow.append([0, 0, 0]).slots == [[], [], []]
    shadow.check()


def test_rows_of_different_lengths_grow_by_different_counts() -> None:
    shadow = grown(0, 1, 3, 4, 5)
    for counts in ([5, 1, 1, 1, 0], [0, 0, 0, 0, 0], [1, 2, 3, 4, 5]):
        shadow.append(counts)
        shadow.check()
    assert shadow.tree.row_lengths() == [6, 4, 7, 9, 10]


def test_select_repeats_reorders_and_drops() -> None:
    shadow = grown(3, 4, 5, 6)
    a, b, c, d = shadow.rows
    shadow.select([3, 1, 1, 3, 3])
    rows = shadow.rows
    assert (rows[0], rows[1]) == (d, b)
    assert len(set(rows)) == 5 and not {a, c} & set(rows)
    assert shadow.tree.row_lengths() == [6, 4, 4, 6, 6]
    assert (shadow.tree.num_forks, shadow.tree.num_prunes) == (3, 2)
    shadow.check()
    shadow.append([1] * 5)
    shadow.check()
    for gone in (a, c):
        assert gone not in shadow.tree


def test_selecting_nothing_prunes_every_row_but_no_held_branch() -> None:
    shadow = grown(6, 2)
    (held,) = shadow.fork(shadow.rows[0], at=5)
    shadow.select([])
    assert shadow.tree.branches == [held]
    assert blocks_in_use(shadow) == 2
    shadow.check()
    shadow.prune(held)
    assert blocks_in_use(shadow) == 0


def test_held_branches_keep_their_blocks_and_come_back() -> None:
    shadow = grown(6)
    root = shadow.rows[0]
    left, right = shadow.fork(root, 2)
    shadow.tree.set_rows([left])
    shadow.append([9])
    assert shadow.tree.held == [root, right]
    shadow.prune(root)
    shadow.tree.set_rows([right, left])
    shadow.append([1, 1])
    shadow.check()
    assert shadow.tree.row_lengths() == [7, 16]


@pytest.mark.parametrize("block_size", [1, 3, 4, 16])
def test_truncating_to_every_length_frees_what_is_no_longer_needed(block_size: int) -> None:
    for shared in (False, True):
        for length in range(14):
            shadow = grown(7, block_size=block_size)
            root = shadow.rows[0]
            shadow.select([0, 0])
            shadow.append([6, 6])
            other = shadow.rows[1]
            if not shared:
                shadow.prune(other)
            shadow.truncate(root, length)
            shadow.check()
            if not shared:
                assert blocks_in_use(shadow) == -(-length // block_size)
            shadow.tree.set_rows([root])
            shadow.append([3])
            shadow.check()


def test_truncating_to_the_present_length_changes_nothing() -> None:
    shadow = grown(6)
    before = shadow.state()
    shadow.truncate(shadow.rows[0], 6)
    assert shadow.state() == before


def test_pruning_a_sibling_merges_what_is_left() -> None:
    shadow = grown(6)
    shadow.select([0, 0])
    shadow.append([3, 3])
    keep, drop = shadow.rows
    assert len(shadow.tree.path(keep)) == 2
    shadow.prune(drop)
    assert [(start, end) for start, end, _ in spans(shadow.tree, keep)] == [(0, 9)]
    assert blocks_in_use(shadow) == 3
    shadow.check()


def test_clear_ends_rows_and_held_branches() -> None:
    shadow = grown(6, 20)
    kept = shadow.fork(shadow.rows[0], 3, at=2)
    shadow.tree.clear()
    shadow.tokens.clear()
    assert blocks_in_use(shadow) == 0
    assert kept[0] not in shadow.tree
    shadow.check()
    shadow.add_rows(1)
    shadow.append([2])
    shadow.check()


REFUSALS: dict[str, Callable[[ShadowTree], object]] = {
    "one block too many for one row": lambda shadow: shadow.append([0, 0, 0, 12]),
    "too many over all rows": lambda shadow: shadow.append([3, 3, 3, 3]),
    "the copies on write do not fit": lambda shadow: shadow.append([2, 2, 2, 4]),
    "far too many": lambda shadow: shadow.append([10_000, 0, 0, 0]),
}


@pytest.mark.parametrize("refused", REFUSALS)
def test_a_refused_append_leaves_the_tree_as_it_was(refused: str) -> None:
    shadow = grown(6, 1, max_blocks=5)
    shadow.select([0, 0, 0, 1])
    before = shadow.state()
    with pytest.raises(OutOfBlocks, match="The cache is unchanged") as error:
        REFUSALS[refused](shadow)
    assert shadow.state() == before
    assert error.value.free == 2 < error.value.requested
    shadow.check()
    shadow.append([2, 2, 2, 3])
    shadow.check()


def test_the_refusal_says_what_was_asked_what_is_free_and_who_holds_most() -> None:
    shadow = grown(6, 17, max_blocks=8)
    shadow.fork(shadow.rows[0])
    with pytest.raises(OutOfBlocks) as error:
        shadow.append([5, 5])
    message = str(error.value)
    for part in (
        "append to 2 rows needs 3 blocks of 4 tokens",
        "1 of 8 are free",
        "3 branches (1 held)",
        "longest: branch 1: 17 tokens, branch 2: 6 tokens, branch 0: 6 tokens",
    ):
        assert part in message


BAD_CALLS: dict[str, tuple[Callable[[BranchTree, Branch], object], type[Exception], str]] = {
    "a negative number of rows": (
        lambda tree, branch: tree.add_rows(-1),
        InvalidArgument,
        r"add_rows\(-1\)",
    ),
    "a negative number of forks": (
        lambda tree, branch: tree.fork(branch, -2),
        InvalidArgument,
        "count=-2",
    ),
    "a fork beyond the tip": (
        lambda tree, branch: tree.fork(branch, at=11),
        InvalidArgument,
        "at=11.*has 10 tokens.*from -10 to 10",
    ),
    "a fork before the first token": (
        lambda tree, branch: tree.fork(branch, at=-11),
        InvalidArgument,
        "at=-11",
    ),
    "a selected row that is not there": (
        lambda tree, branch: tree.select([0, 2]),
        InvalidArgument,
        "from 0 to 2 for 2 rows",
    ),
    "a negative selected row": (
        lambda tree, branch: tree.select([0, -1]),
        InvalidArgument,
        "from -1 to 0",
    ),
    "a branch in two rows": (
        lambda tree, branch: tree.set_rows([branch, branch]),
        InvalidArgument,
        "named twice",
    ),
    "an append of fewer than no tokens": (
        lambda tree, branch: tree.append([3, -1]),
        InvalidArgument,
        "-1 tokens",
    ),
    "a truncation below nothing": (
        lambda tree, branch: tree.truncate(branch, -1),
        InvalidArgument,
        "has 10 tokens",
    ),
    "a truncation that would lengthen": (
        lambda tree, branch: tree.truncate(branch, 11),
        InvalidArgument,
        "has 10 tokens",
    ),
    "a stale branch made a row": (
        lambda tree, branch: tree.set_rows([branch, Branch(99)]),
        StaleBranch,
        "branch 99 is not alive.*2 branches are alive",
    ),
    "a fork of a stale branch": (
        lambda tree, branch: tree.fork(Branch(99)),
        StaleBranch,
        "branch 99",
    ),
    "a stale branch pruned": (lambda tree, branch: tree.prune(Branch(99)), StaleBranch, "99"),
    "the length of a stale branch": (
        lambda tree, branch: tree.length(Branch(99)),
        StaleBranch,
        "99",
    ),
    "a stale branch truncated": (
        lambda tree, branch: tree.truncate(Branch(99), 0),
        StaleBranch,
        "99",
    ),
    "the blocks of a stale branch": (
        lambda tree, branch: tree.block_table(Branch(99)),
        StaleBranch,
        "99",
    ),
}


@pytest.mark.parametrize("what", BAD_CALLS)
def test_a_bad_call_is_refused_with_its_numbers_and_changes_nothing(what: str) -> None:
    call, error, message = BAD_CALLS[what]
    shadow = grown(10, 3)
    before = shadow.state()
    with pytest.raises(error, match=message):
        call(shadow.tree, shadow.rows[0])
    assert shadow.state() == before
    shadow.check()


def test_a_pruned_branch_is_stale_for_good() -> None:
    shadow = grown(4)
    (fork,) = shadow.fork(shadow.rows[0])
    shadow.prune(fork)
    shadow.fork(shadow.rows[0], 3)
    with pytest.raises(StaleBranch, match="was pruned, or belongs to another cache"):
        shadow.tree.length(fork)


@pytest.mark.parametrize("block_size", [0, -1])
def test_a_block_holds_at_least_one_token(block_size: int) -> None:
    with pytest.raises(InvalidArgument, match=f"block_size={block_size}"):
        BranchTree(block_size, PhysicalKVAllocator())


def test_the_topology_version_tells_growth_from_change() -> None:
    shadow = grown(6)
    tree = shadow.tree

    def changed() -> bool:
        nonlocal version
        version, before = tree.topology_version, version
        return version != before

    version = tree.topology_version
    shadow.append([3])
    assert not changed()
    (fork,) = shadow.fork(shadow.rows[0], at=5)
    assert changed()
    tree.set_rows([fork, *shadow.rows])
    assert changed()
    shadow.append([1, 1])
    assert changed()
    shadow.append([5, 5])
    assert not changed()
    shadow.truncate(fork, 6)
    assert changed()
    shadow.select([1, 0])
    assert changed()
    shadow.prune(fork)
    assert changed()
    tree.clear()
    assert changed()


def beam(shadow: ShadowTree, rng: random.Random, width: int, steps: int) -> list[tuple[int, int]]:
    """Random re-parenting as in beam search; depth of the deepest row and nodes after each step."""
    shadow.select([0] * width)
    seen = []
    for _ in range(steps):
        shadow.append([1] * width)
        shadow.select(rng.choices(range(width), k=width))
        depth = max(len(shadow.tree.path(row)) for row in shadow.rows)
        seen.append((depth, len(list(shadow.tree.nodes()))))
    return seen


@pytest.mark.parametrize("width", [2, 3, 8])
def test_chains_merge_so_that_depth_and_nodes_stay_bounded(width: int) -> None:
    shadow = grown(5)
    seen = beam(shadow, random.Random(width), width, 1000)
    # Every inner node branches, so there are at most width - 1 of them.
    assert max(depth for depth, _ in seen) <= width
    assert max(nodes for _, nodes in seen) <= 2 * width - 1
    shadow.check()


@pytest.mark.parametrize("seed", range(3))
def test_eight_beams_over_512_tokens_stay_within_1_3_times_their_unique_tokens(seed: int) -> None:
    shadow = grown(67, block_size=16)
    rng = random.Random(seed)
    shadow.select([0] * 8)
    ratios = []
    for _ in range(512):
        shadow.append([1] * 8)
        shadow.select(rng.choices(range(8), k=8))
        ratios.append(blocks_in_use(shadow) * 16 / shadow.tree.num_unique_tokens())
    shadow.check()
    assert ratios[-1] <= 1.3
    # Eight tips of up to two blocks weigh more while there is little else.
    assert max(ratios[256:]) <= 1.5


def wasted_blocks(shadow: ShadowTree) -> float:
    """Blocks in use beyond the unique tokens, to each live branch."""
    size = shadow.tree.block_size
    unique = shadow.tree.num_unique_tokens()
    return (blocks_in_use(shadow) - unique / size) / max(1, len(shadow.tokens))


@pytest.mark.parametrize("length", [1, 15, 16, 17])
def test_branches_of_one_prompt_waste_less_than_two_partial_blocks_each(length: int) -> None:
    shadow = grown(length, block_size=16)
    assert wasted_blocks(shadow) < 1
    shadow.select([0] * 64)
    for _ in range(40):
        shadow.append([1] * 64)
        # One copied on write, one not full yet.
        assert wasted_blocks(shadow) < (1 if length == 16 else 2)
    shadow.check()


@pytest.mark.parametrize("seed", range(60))
@pytest.mark.parametrize("block_size", [1, 2, 5, 16])
def test_random_surgery_against_lists_of_tokens(block_size: int, seed: int) -> None:
    rng = random.Random(1000 * block_size + seed)
    shadow = ShadowTree(block_size)
    for _ in range(60):
        step_randomly(rng, shadow)
        shadow.check()
        # Two for each branch as above, one for an inner node whose block nobody took over.
        assert wasted_blocks(shadow) < 3
        if len(shadow.tokens) > 24:
            for branch in rng.sample(shadow.tree.branches, 16):
                shadow.prune(branch)
    for branch in shadow.tree.branches:
        shadow.prune(branch)
    assert blocks_in_use(shadow) == 0
    assert not list(shadow.tree.nodes())
    shadow.check()


@pytest.mark.parametrize("seed", range(40))
def test_random_surgery_within_a_bound_refuses_without_a_trace(seed: int) -> None:
    rng = random.Random(seed)
    shadow = ShadowTree(3, max_blocks=8)
    refused = 0
    for _ in range(80):
        before = shadow.state()
        try:
            step_randomly(rng, shadow)
        except OutOfBlocks:
            refused += 1
            assert shadow.state() == before
            shadow.prune(rng.choice(shadow.tree.branches))
        shadow.check()
        assert blocks_in_use(shadow) <= 8
        if len(shadow.tokens) > 12:
            shadow.prune(shadow.tree.branches[0])
    assert refused


@pytest.mark.parametrize("duplicate", WAYS)
def test_a_copy_goes_its_own_way(duplicate: Any) -> None:
    rng = random.Random(3)
    shadow = ShadowTree(4)
    for _ in range(80):
        step_randomly(rng, shadow)
    twin = duplicate(shadow)
    before = shadow.state()
    assert twin.state() == before
    twin.check()
    for _ in range(80):
        step_randomly(rng, twin)
        twin.check()
    assert shadow.state() == before
    shadow.check()


@pytest.mark.parametrize("duplicate", WAYS)
def test_a_tree_deeper_than_the_recursion_limit_copies_checks_and_ends(duplicate: Any) -> None:
    depth = 3000
    assert depth > sys.getrecursionlimit()
    shadow = grown(1)
    for _ in range(depth):
        shadow.tree.fork(shadow.rows[0])
        shadow.append([1])
    tree = shadow.tree
    assert len(tree.path(shadow.rows[0])) == depth + 1
    twin = duplicate(tree)
    twin.check_integrity()
    assert twin.block_table(shadow.rows[0]) == tree.block_table(shadow.rows[0])
    assert twin.fork(shadow.rows[0], at=1)
    twin.clear()
    assert twin.allocator.num_used == 0
    del twin
    tree.clear()
    tree.check_integrity()


def test_integrity_notices_damage() -> None:
    def damage(change: Callable[[BranchTree, Branch, Branch], object]) -> str:
        shadow = grown(6)
        shadow.select([0, 0])
        shadow.append([1, 2])
        shadow.check()
        change(shadow.tree, *shadow.rows)
        with pytest.raises(IntegrityError) as error:
            shadow.tree.check_integrity()
        return str(error.value)

    assert "blocks for" in damage(lambda tree, a, b: tree.tips()[0].blocks.append(0))
    assert "does not continue" in damage(lambda tree, a, b: setattr(tree.tips()[0], "start", 5))
    assert "is the tip of" in damage(lambda tree, a, b: setattr(tree.tips()[0], "refs", 2))
    assert "not distinct" in damage(lambda tree, a, b: tree.rows.append(a))
    assert "ref count" in damage(lambda tree, a, b: tree.allocator.acquire([0]))
    assert "should have been freed" in damage(
        lambda tree, a, b: tree.path(a)[0].children.discard(tree.tips()[1])
    )


def test_rows_that_grow_together_cost_work_only_where_a_block_is_full() -> None:
    shadow = grown(5, 8, 7)
    tree = shadow.tree
    tips, version = tree.tips(), tree.topology_version
    shadow.append([1, 1, 1])
    bases = [tip._base for tip in tips]
    for step in range(9):
        before = [len(tip.blocks) for tip in tips]
        full = [tip.end % 4 == 0 for tip in tips]
        shadow.append([1, 1, 1])
        assert [tip._base for tip in tips] == bases, "only the clock moves"
        assert [len(tip.blocks) - n for tip, n in zip(tips, before, strict=True)] == full, step
        shadow.check()
    assert tree.topology_version == version
    assert tree.row_lengths() == [15, 18, 17]


def test_what_a_step_knows_of_its_rows_stays_when_they_grow_on() -> None:
    shadow = grown(3, 4)
    shadow.append([1, 1])
    first = shadow.tree.grown
    assert first is not None
    slots = first.slots.tolist()
    for _ in range(6):
        shadow.append([1, 1])
    now = shadow.tree.grown
    assert now is not None and now != first
    assert (first.slots.tolist(), first.lengths.tolist()) == (slots, [4, 5])
    assert now.lengths.tolist() == [10, 11]


def test_held_rows_stand_still_while_the_others_grow() -> None:
    shadow = grown(6)
    shadow.select([0, 0, 0])
    shadow.append([1, 1, 1])
    a, b, c = shadow.rows
    tree = shadow.tree
    tree.set_rows([c, a])
    for _ in range(5):
        shadow.append([1, 1])
        shadow.check()
    assert [tree.length(branch) for branch in (a, b, c)] == [12, 7, 12]
    tree.set_rows([b, a])
    for _ in range(5):
        shadow.append([1, 1])
        shadow.check()
    assert [tree.length(branch) for branch in (a, b, c)] == [17, 12, 12]


def test_an_append_without_room_leaves_rows_that_grew_together_as_they_were() -> None:
    shadow = grown(4, 3, max_blocks=3)
    shadow.append([1, 1])
    shadow.select([1, 0])
    state, version = shadow.tree.to_state(), shadow.tree.topology_version
    with pytest.raises(OutOfBlocks):
        shadow.tree.append([1, 1])
    assert (shadow.tree.to_state(), shadow.tree.topology_version) == (state, version)
    shadow.check()
