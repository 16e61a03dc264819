"""What prompts share is found once, and every prompt can be put together again."""

from __future__ import annotations

import random

import pytest

from hf_tree_cache.generation.prefixes import PromptRun, find_shared_runs


def put_together(runs: list[PromptRun], end: int | None) -> tuple[int, ...]:
    if end is None:
        return ()
    return put_together(runs, runs[end].parent) + runs[end].tokens


def test_a_prompt_that_begins_another_and_equal_ones() -> None:
    runs, ends = find_shared_runs([[1, 2, 3, 4], [1, 2], [1, 2, 5], [1, 2], [9]], minimum=2)
    assert sorted((run.tokens, run.level) for run in runs) == [
        ((1, 2), 0),
        ((3, 4), 1),
        ((5,), 1),
        ((9,), 0),
    ]
    assert ends[1] == ends[3]


def test_short_beginnings_are_not_worth_a_forward() -> None:
    runs, _ = find_shared_runs([[1, 2, 3], [1, 2, 4]], minimum=3)
    assert [(run.parent, run.level) for run in runs] == [(None, 0)] * 2


@pytest.mark.parametrize("seed", range(20))
def test_runs_make_up_their_prompts(seed: int) -> None:
    numbers = random.Random(seed)
    prompts = [
        [numbers.randint(0, 1) for _ in range(numbers.randint(1, 9))]
        for _ in range(numbers.randint(1, 12))
    ]
    runs, ends = find_shared_runs(prompts, minimum=numbers.randint(1, 4))
    assert [put_together(runs, end) for end in ends] == [tuple(prompt) for prompt in prompts]
    for i, run in enumerate(runs):
        assert run.tokens
        assert run.parent is None or run.parent < i
        assert run.level == (0 if run.parent is None else runs[run.parent].level + 1)
