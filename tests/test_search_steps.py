"""What policies ask the driver for: steps, scores, actions that do not fit."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from models import model, one_thread
from searches import QUESTION, QUESTIONS, SHORT, TOKENIZER, llama

from hf_tree_cache import BranchRunner, Budget, Sampling, SearchDriver, Stop
from hf_tree_cache.errors import InvalidArgument
from hf_tree_cache.search.policy import (
    Action,
    Conclusion,
    Expand,
    Finish,
    Policy,
    Prune,
    Score,
    SearchTree,
    conclude_best,
)
from hf_tree_cache.search.result import SearchResult
from hf_tree_cache.search.scoring import LogProbScorer
from hf_tree_cache.search.strategy import run_search
from hf_tree_cache.search.task import Limits, Step

__all__ = ["llama", "one_thread"]  # fixtures


@dataclass(frozen=True)
class Chain:
    """Expands the newest step again and again, as long as it is open."""

    count: int = 1
    to_end: bool = False
    steps: int = 6

    def decide(self, search: SearchTree) -> Sequence[Action]:
        if search.running:
            return []
        steps = [search.root] if search.root.state == "open" else search.open
        newest = [step for step in steps if step.id == len(search.nodes) - 1]
        if not newest or newest[0].depth >= self.steps:
            return []
        return [Expand(newest[0].id, self.count, to_end=self.to_end)]

    def conclude(self, search: SearchTree) -> Conclusion:
        return conclude_best(search)


class AllowOnly:
    """A logits processor that lets some letters through."""

    def __init__(self, allowed: str) -> None:
        self.ids = TOKENIZER(allowed, add_special_tokens=False)["input_ids"]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        masked = torch.full_like(scores, -torch.inf)
        masked[:, self.ids] = scores[:, self.ids]
        return masked


def searched(
    llama: Any, policy: Policy, allowed: str, questions: Sequence[str], **limits: Any
) -> list[SearchResult]:
    runner = BranchRunner(
        llama, TOKENIZER, seed=3, sampling=Sampling(2.0), processors=[AllowOnly(allowed)]
    )
    with runner:
        return SearchDriver(runner, policy, limits=Limits(**limits)).run(questions)


class TestSteps:
    def test_a_step_ends_behind_its_delimiter_and_the_next_goes_on_from_there(
        self, llama: Any
    ) -> None:
        results = searched(llama, Chain(), "ab\n", QUESTIONS, max_new_tokens=30)
        for result in results:
            steps = [node for node in result.search.nodes[1:] if node.reason == "delimiter"]
            assert len(steps) >= 3
            for node in steps:
                assert node.step.endswith("\n") and node.step.strip()
                assert node.text == "".join(step.step for step in result.search.path(node.id))
                assert "\n" not in node.step.lstrip("\n")[:-1]

    def test_blank_lines_are_no_steps(self, llama: Any) -> None:
        for result in searched(llama, Chain(), "a\n\n\n", QUESTIONS, max_new_tokens=30):
            assert all(node.step.strip() for node in result.search.nodes[1:-1])

    def test_a_delimiter_is_found_wherever_other_branches_interrupt_the_batch(
        self, llama: Any
    ) -> None:
        # Three questions take their steps at different times, so turns of the runner end anywhere,
        # also within a delimiter of one.
        policy = Chain(count=2, steps=8)
        results = searched(
            llama, policy, "abc", QUESTIONS, delimiters=("abc", "bb"), max_new_tokens=60
        )
        found = 0
        for result in results:
            for node in result.search.nodes[1:]:
                inside = node.step[:-1]
                assert "abc" not in inside and "bb" not in inside
                found += node.step.endswith(("abc", "bb"))
                assert (node.reason == "delimiter") == node.step.endswith(("abc", "bb")) or (
                    node.state == "done"
                )
        assert found > 10

    def test_a_stop_string_that_two_turns_share(self) -> None:
        search = SearchTree()
        node = search.add(0)
        node.step = "say EN"
        step = Step(node, 0, 0, 0.0, 0, 9, Stop(strings=["END", "\n"]))  # type: ignore[arg-type]
        step.begin_turn()
        assert not step.crosses("")
        assert step.crosses("D")
        step.begin_turn()
        assert not step.crosses("END"), "the runner finds what lies within its turn"
        assert not step.crosses(" more")
        node.step = ""
        step.begin_turn()
        assert not step.crosses("D")
        node.step = "\n"
        step.begin_turn()
        assert not step.crosses("said"), "the empty line was passed over when it was said"

    def test_a_step_has_its_own_bound_and_a_sequence_its_own(self, llama: Any) -> None:
        (result,) = searched(
            llama, Chain(steps=99), "ab", [QUESTION], max_step_tokens=4, max_new_tokens=10
        )
        assert [n.num_tokens for n in result.search.nodes[1:]] == [4, 4, 2]
        assert [n.state for n in result.search.nodes[1:]] == ["closed", "closed", "done"]
        assert [n.reason for n in result.search.nodes[1:]] == ["length"] * 3
        (result,) = searched(llama, Chain(to_end=True), "ab\n", [QUESTION], max_new_tokens=10)
        assert [n.num_tokens for n in result.search.nodes[1:]] == [10]

    def test_stop_strings_end_the_sequence(self, llama: Any) -> None:
        for result in searched(llama, Chain(), "abc\n", QUESTIONS, stop=("c",)):
            end = result.search.nodes[-1]
            assert (end.state, end.reason, end.text[-1]) == ("done", "stop", "c")

    def test_an_answer_is_taken_from_the_whole_text_once_it_is_complete(self, llama: Any) -> None:
        (result,) = searched(llama, Chain(), "12\n", [QUESTION], max_new_tokens=9)
        assert result.answer is not None
        assert result.answer == result.search.nodes[-1].answer
        assert all(node.answer is None for node in result.search.nodes[:-1])
        assert result.votes == {result.answer: 1.0}


@dataclass(frozen=True)
class Says:
    """A policy that begins with fixed actions."""

    actions: tuple[Any, ...]

    def decide(self, search: SearchTree) -> Sequence[Action]:
        return [] if search.root.children else list(self.actions)

    def conclude(self, search: SearchTree) -> Conclusion:
        return conclude_best(search)


WRONG_ACTIONS = {
    "a node that is not there": ((Expand(3),), "there are 1 nodes"),
    "no children": ((Expand(0, 0),), "counts start at 1"),
    "no tokens": ((Expand(0, max_new_tokens=0),), "counts start at 1"),
    "a node twice": ((Expand(0), Expand(0)), "is closed and cannot go on"),
    "a node pruned before": ((Prune(0), Expand(0)), "is pruned and cannot go on"),
    "scores without a scorer": ((Score((0,)),), "there is no scorer"),
    "something else": (("expand",), "known are Expand, Score, Prune and Finish"),
}


@pytest.mark.parametrize(("actions", "complaint"), WRONG_ACTIONS.values(), ids=WRONG_ACTIONS)
def test_an_action_that_does_not_fit_is_named(llama: Any, actions: Any, complaint: str) -> None:
    with pytest.raises(InvalidArgument, match=complaint):
        run_search(llama, TOKENIZER, [QUESTION], Says(actions), **SHORT)


def test_a_score_is_asked_for_once(llama: Any) -> None:
    with pytest.raises(InvalidArgument, match="node 0 has a score"):
        run_search(
            llama,
            TOKENIZER,
            [QUESTION],
            Says((Score((0, 0)), Score((0,)))),
            score="logprob",
            **SHORT,
        )


def test_a_policy_may_ask_for_steps_that_begin_differently(llama: Any) -> None:
    @dataclass(frozen=True)
    class Apart(Says):
        actions: tuple[Any, ...] = (Expand(0, 6, distinct=True, to_end=True),)

    (result,) = run_search(llama, TOKENIZER, [QUESTION], Apart(), sampling=Sampling(0.05), **SHORT)
    first = [node.tokens[0] for node in result.tree.nodes if not node.is_prompt]
    assert len(first) == len(set(first)) == 6


def test_finish_says_why_and_wins_over_what_else_was_asked(llama: Any) -> None:
    policy = Says((Finish("enough"), Expand(0, 3)))
    (result,) = run_search(llama, TOKENIZER, [QUESTION], policy, **SHORT)
    assert (result.ended_by, result.reason, result.tokens_generated) == ("policy", "enough", 0)


@dataclass(frozen=True)
class Anything:
    """Asks for anything that it may ask for, by chance, until a number of steps are made."""

    seed: int

    def decide(self, search: SearchTree) -> Sequence[Action]:
        chance = random.Random(f"{self.seed} {search.question} {len(search.nodes)}")
        if len(search.nodes) > 30:
            return [Finish("enough")]
        if len(search.running) > chance.randrange(4):
            return []
        open_nodes = [node for node in [search.root, *search.open] if node.state == "open"]
        asides = [n for n in search.nodes if n.state == "done" and n.kind == "kept" and not n.aside]
        actions: list[Action] = []
        for node in chance.sample(open_nodes, min(len(open_nodes), 2)):
            actions.append(
                Expand(
                    node.id,
                    chance.randint(1, 3),
                    kind=chance.choice(["step", "kept"]),
                    to_end=chance.random() < 0.2,
                    prefix=chance.choice(["", "", "so? "]),
                    max_new_tokens=chance.choice([None, 1, 5]),
                    distinct=chance.random() < 0.3,
                    keep=chance.random() < 0.6,
                    hold=True,
                )
            )
        if asides and chance.random() < 0.5:
            actions.append(Expand(chance.choice(asides).id, 2, prefix="sure? ", max_new_tokens=3))
        unscored = [node.id for node in search.open + search.done if node.score is None]
        if unscored and chance.random() < 0.5:
            actions.insert(0, Score(tuple(unscored)))
        if search.running and chance.random() < 0.3:
            actions.append(Prune(chance.choice(search.running).id))
        return actions

    def conclude(self, search: SearchTree) -> Conclusion:
        return conclude_best(search)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3_next"])
@pytest.mark.parametrize("seed", range(4))
def test_whatever_a_policy_asks_for_the_books_are_right(name: str, seed: int) -> None:
    runner = BranchRunner(model(name), TOKENIZER, seed=seed, sampling=Sampling(1.0))

    def watch(tree: Any, searches: Sequence[SearchTree]) -> None:
        tree.check_integrity()
        runner.cache.check_integrity()
        for search in searches:
            for node in search.nodes[1:]:
                before = search.nodes[node.parent or 0]
                assert node.aside or node.text == before.text + node.step or node.state == "running"

    with runner:
        searcher = SearchDriver(
            runner,
            Anything(seed),
            scorer=LogProbScorer(),
            limits=Limits(delimiters=tuple("bcde"), max_new_tokens=12),
            budget=Budget(tokens=(None, 70, 90, None)[seed]),
            watch=watch,
        )
        results = searcher.run(QUESTIONS)
    assert runner.branches == [] and runner.cache.tree.allocator.num_used == 0
    assert sum(result.tokens_generated for result in results) == runner.stats.tokens_generated
    for result in results:
        assert not any(node.state == "running" for node in result.search.nodes)
        for solution in result.solutions:
            tokens = result.tree.tokens(solution.leaf, include_prompt=False)
            assert TOKENIZER.decode(tokens, skip_special_tokens=True) == solution.text
