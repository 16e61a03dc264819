"""Policies as pure functions: from batches to actions, from actions to the next batch."""

from __future__ import annotations

import math

import pytest
import torch

from hf_tree_cache import (
    BranchBatch,
    ForkAtDelimiter,
    ForkAtFirstToken,
    ForkAtPositions,
    ForkOnEntropy,
    ForkOnVarentropy,
    InvalidArgument,
    NonFiniteScores,
    PruneBelow,
    PruneByRank,
)
from hf_tree_cache.generation.decide import decide
from hf_tree_cache.generation.processors import Fork, Prune


def batch(lengths, logprobs=None, prompts=None, branches=None) -> BranchBatch:
    count = len(lengths)
    return BranchBatch(
        tuple(branches or range(10, 10 + count)),
        tuple(prompts or [0] * count),
        tuple(lengths),
        tuple(logprobs or [0.0] * count),
    )


def actions_of(processor, rows: BranchBatch, scores=None, ids=None):
    count = len(rows.branches)
    scores = torch.zeros(count, 8) if scores is None else scores
    ids = torch.zeros(count, 4, dtype=torch.int64) if ids is None else ids
    processor.begin(rows)
    assert processor(ids, scores) is scores
    return processor.take_actions()


def test_survivors_keep_their_order_and_children_follow():
    rows = decide([Fork(2, 1), Prune(1, "low"), Fork(0, 2)], 4, budget=10)
    assert rows.parents == [0, 2, 3, 0, 0, 2]
    assert rows.forks == [(0, [3, 4], True, "fork"), (1, [5], True, "fork")]
    assert rows.pruned == [(1, "low")]
    assert rows.refused == 0


def test_a_prune_wins_over_a_fork_of_the_same_row():
    rows = decide([Fork(0, 3), Prune(0)], 2, budget=10)
    assert rows.parents == [1]
    assert rows.forks == []


def test_a_short_budget_goes_to_the_highest_priority_and_prunes_add_to_it():
    actions = [Fork(0, 2, priority=1.0), Fork(1, 2, priority=5.0), Prune(2)]
    rows = decide(actions, 3, budget=2)
    assert rows.parents == [0, 1, 1, 1, 0]
    assert rows.refused == 1


def test_the_widest_of_several_forks_of_a_row_counts():
    assert decide([Fork(0, 1), Fork(0, 3), Fork(0, 2)], 1, budget=9).parents == [0, 0, 0, 0]


def test_no_budget_refuses_and_does_not_raise():
    rows = decide([Fork(0, 5)], 1, budget=0)
    assert (rows.parents, rows.forks, rows.refused) == ([0], [], 5)


def test_forks_at_given_positions_only():
    processor = ForkAtPositions([0, 3], children=3)
    found = actions_of(processor, batch([3, 2, 0, 4]))
    assert [(a.row, a.count) for a in found] == [(0, 2), (2, 2)]
    assert [a.row for a in actions_of(ForkAtFirstToken(2), batch([0, 1]))] == [0]


def test_entropy_is_in_nats_and_becomes_the_priority():
    scores = torch.full((3, 8), -torch.inf)
    scores[0, :8] = 0.0
    scores[1, 0] = 0.0
    scores[2, :4] = 1.5
    found = actions_of(ForkOnEntropy(1.0), batch([1, 1, 1]), scores)
    assert [a.row for a in found] == [0, 2]
    assert [a.priority for a in found] == pytest.approx([math.log(8), math.log(4)])


def test_varentropy_is_zero_for_uniform_and_certain_rows():
    scores = torch.full((3, 4), -torch.inf)
    scores[0] = 0.0
    scores[1, 2] = 0.0
    scores[2] = torch.tensor([0.9, 0.1 / 3, 0.1 / 3, 0.1 / 3]).log()
    surprisal = torch.tensor([0.9, 0.1]).log().neg() + torch.tensor([0.0, math.log(3)])
    expected = (0.9 * 0.1) * (surprisal[1] - surprisal[0]) ** 2
    found = actions_of(ForkOnVarentropy(1e-3), batch([1, 1, 1]), scores)
    assert [a.row for a in found] == [2]
    assert found[0].priority == pytest.approx(expected.item(), rel=1e-4)


def test_a_gap_is_kept_by_a_branch_and_by_its_children():
    processor = ForkOnEntropy(0.5, min_gap=3)
    uniform = torch.zeros(1, 8)
    assert actions_of(processor, batch([4], branches=[7]), uniform)
    processor.on_fork(7, [8])
    assert not actions_of(processor, batch([6, 6], branches=[7, 8]), torch.zeros(2, 8))
    processor.on_prune(7)
    found = actions_of(processor, batch([7, 6], branches=[8, 9]), torch.zeros(2, 8))
    assert [a.row for a in found] == [0, 1]


def test_a_delimiter_forks_behind_it_but_not_at_the_prompt():
    ids = torch.tensor([[1, 9], [1, 2], [1, 9]])
    found = actions_of(ForkAtDelimiter([9]), batch([5, 5, 0]), ids=ids)
    assert [a.row for a in found] == [0]


def test_the_best_branch_of_a_prompt_is_never_pruned_for_a_low_mean():
    rows = batch([10, 10, 10, 4], [-30.0, -20.0, -5.0, -30.0], prompts=[0, 0, 1, 1])
    found = actions_of(PruneBelow(-1.0, after=8), rows)
    assert [a.row for a in found] == [0]


def test_rank_is_by_prompt_and_only_every_so_many_tokens():
    rows = batch([16, 16, 16, 16], [-1.0, -3.0, -2.0, -9.0], prompts=[0, 0, 0, 1])
    assert [a.row for a in actions_of(PruneByRank(2), rows)] == [1]
    assert actions_of(PruneByRank(2), batch([15, 15, 15])) == []
    assert actions_of(PruneByRank(5), rows) == []


def test_a_scorer_sees_generated_tokens_and_must_be_finite():
    ids = torch.arange(24).view(3, 8)
    seen = []

    def score(rows):
        seen.extend(rows)
        return [len(seen), 0.0, 1.0]

    found = actions_of(PruneByRank(1, every=2, score=score), batch([2, 2, 2]), ids=ids)
    assert seen == [[6, 7], [14, 15], [22, 23]]
    assert sorted(a.row for a in found) == [1, 2]
    with pytest.raises(NonFiniteScores, match="none of them NaN"):
        actions_of(PruneByRank(1, every=2, score=lambda r: [math.nan] * 3), batch([2, 2, 2]))


@pytest.mark.parametrize(
    "make",
    [
        lambda: ForkAtFirstToken(1),
        lambda: ForkAtPositions([-1]),
        lambda: ForkOnEntropy(1.0, children=0),
        lambda: ForkOnEntropy(1.0, min_gap=0),
        lambda: ForkAtDelimiter([]),
        lambda: PruneBelow(0.5),
        lambda: PruneBelow(float("nan")),
        lambda: PruneBelow(-1.0, after=0),
        lambda: PruneByRank(0),
        lambda: PruneByRank(1, every=0),
    ],
)
def test_senseless_settings_are_refused(make):
    with pytest.raises(InvalidArgument, match=r"\(.*=.*\)|ForkAtPositions"):
        make()


def test_actions_need_a_loop_and_a_row_that_exists():
    processor = ForkAtFirstToken(2)
    with pytest.raises(InvalidArgument, match="custom_generate"):
        processor.fork(0)
    processor.begin(batch([0]))
    with pytest.raises(InvalidArgument, match="there are 1 rows"):
        processor.prune(1)
    with pytest.raises(InvalidArgument, match="at least 1"):
        processor.fork(0, 0)
