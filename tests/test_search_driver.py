"""The driver on a tiny model: what is computed, bounded, interrupted, repeated and refused."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from models import model, one_thread
from search_fakes import letters, tokens_through

from hf_tree_cache import BranchRunner, Budget, OutOfBlocks, Sampling, SearchDriver, Stop, TreeCache
from hf_tree_cache.errors import InvalidArgument, NonFiniteScores
from hf_tree_cache.notebook.live import LiveView
from hf_tree_cache.search import driver
from hf_tree_cache.search.best_of_n import BestOfN, best_of_n
from hf_tree_cache.search.entropy_branching import entropy_branching
from hf_tree_cache.search.mcts import mcts
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
from hf_tree_cache.search.scoring import LogProbScorer, RewardModel
from hf_tree_cache.search.self_consistency import SelfConsistency, self_consistency
from hf_tree_cache.search.step_beam import dvts, step_beam
from hf_tree_cache.search.strategy import run_search
from hf_tree_cache.search.task import Limits, Step
from hf_tree_cache.search.tree_of_thoughts import tree_of_thoughts

TOKENIZER = letters()
QUESTION = "what is 3 + 4 * 5?\n"
QUESTIONS = [QUESTION, "and (7 - 2) * 9?\n", "2 + 2 = ?\n"]
VOWELS = "aeiou"
SHORT = {"max_new_tokens": 24, "seed": 5, "progress": False}


__all__ = ["one_thread"]  # a fixture for all of this file


@pytest.fixture
def llama() -> Iterator[Any]:
    shared = model("llama")
    before = shared.config._attn_implementation
    yield shared
    assert shared.config._attn_implementation == before, "a search did not give its model back"


def few_vowels(candidate: Any) -> float:
    """A process reward that a random model can meet."""
    return 1 - sum(letter in VOWELS for letter in candidate.text) / max(1, len(candidate.text))


def last_letter(text: str) -> str | None:
    return text.strip()[-1:] or None


STRATEGIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "self_consistency": (self_consistency, {"num_branches": 5, "answer": last_letter}),
    "self_consistency, few in parallel": (
        self_consistency,
        {"num_branches": 6, "parallel": 2, "answer": last_letter, "stop_when": None},
    ),
    "self_consistency, weighted": (
        self_consistency,
        {"num_branches": 4, "weight": "score", "score": few_vowels, "answer": last_letter},
    ),
    "best_of_n": (best_of_n, {"num_branches": 4}),
    "step_beam": (step_beam, {"width": 2, "expand": 3, "score": few_vowels, "delimiters": "bcd"}),
    "dvts": (dvts, {"subtrees": 2, "expand": 2, "score": few_vowels, "delimiters": "bcd"}),
    "mcts": (mcts, {"simulations": 5, "children": 3, "score": few_vowels, "delimiters": "bcd"}),
    "mcts, rollouts": (
        mcts,
        {"simulations": 3, "score": few_vowels, "value": "rollout", "delimiters": "bcd"},
    ),
    "tree_of_thoughts": (
        tree_of_thoughts,
        {"propose": 3, "keep": 2, "score": few_vowels, "delimiters": "bcd"},
    ),
    "tree_of_thoughts, asking": (
        tree_of_thoughts,
        {
            "propose": 3,
            "keep": 2,
            "value_prompt": "good?",
            "verdicts": {"a": 1.0, "b": 2.0, "c": 3.0},
            "delimiters": "bcd",
        },
    ),
    "entropy_branching": (
        entropy_branching,
        {"threshold": 2.5, "max_branches": 5, "answer": last_letter},
    ),
}


def options_of(name: str) -> dict[str, Any]:
    options = {**SHORT, **STRATEGIES[name][1]}
    if isinstance(options.get("delimiters"), str):
        options["delimiters"] = list(options["delimiters"])
    return options


def facts(result: SearchResult) -> Any:
    """All of a result that a seed must repeat."""
    return (result.answer, result.votes, result.solutions, result.ended_by, result.tree.to_dict())


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name, marks=[pytest.mark.core] if name in ("dvts", "entropy_branching") else []
        )
        for name in STRATEGIES
    ],
)
def test_every_strategy_answers_questions_together_and_repeats_itself_by_seed(
    llama: Any, name: str
) -> None:
    strategy = STRATEGIES[name][0]
    results = strategy(llama, TOKENIZER, QUESTIONS, **options_of(name))
    assert [result.question for result in results] == QUESTIONS
    for result in results:
        result.tree.check_integrity()
        assert result.tree.nodes[0].tokens == TOKENIZER(result.question)["input_ids"]
        assert result.ended_by == "policy"
        assert not result.tree.leaves("alive")
        assert result.solutions and result.text in {s.text for s in result.solutions}
        for solution in result.solutions:
            tokens = result.tree.tokens(solution.leaf, include_prompt=False)
            assert TOKENIZER.decode(tokens, skip_special_tokens=True) == solution.text
            assert len(tokens) == solution.num_tokens <= 24
        assert 0 < result.tokens_generated < result.tokens_computed
        assert result.kv_bytes_peak > 0
    again = strategy(llama, TOKENIZER, QUESTIONS, **options_of(name))
    assert list(map(facts, again)) == list(map(facts, results))
    other = strategy(llama, TOKENIZER, QUESTIONS[:1], **{**options_of(name), "seed": 6})
    assert facts(other[0]) != facts(results[0])


def test_one_question_gives_one_result_and_a_list_a_list(llama: Any) -> None:
    options = {**SHORT, "num_branches": 2}
    single = best_of_n(llama, TOKENIZER, QUESTION, **options)
    assert isinstance(single, SearchResult)
    ids = TOKENIZER(QUESTION)["input_ids"]
    assert best_of_n(llama, TOKENIZER, ids, **options).text == single.text
    listed = best_of_n(llama, TOKENIZER, [QUESTION], **options)
    assert [result.text for result in listed] == [single.text]
    by_prompt = best_of_n(llama, TOKENIZER, 7, prompt=lambda n: QUESTION, **options)
    assert (by_prompt.question, by_prompt.text) == (7, single.text)


def unfollowed(result: SearchResult) -> int:
    """Sequences that nothing was generated behind: their last token has no K/V."""
    return sum(not node.children and node.num_tokens > 0 for node in result.search.nodes)


@pytest.mark.parametrize("name", ["step_beam", "mcts", "mcts, rollouts", "best_of_n"])
def test_what_is_held_is_never_computed_again(llama: Any, name: str) -> None:
    # A prompt that it would show to compute twice.
    question = QUESTION * 5
    with tokens_through(llama) as seen:
        result = STRATEGIES[name][0](llama, TOKENIZER, question, **options_of(name))
    assert sum(seen) == result.tokens_computed == result.cost.tokens_computed
    prompt, generated = len(question), result.tokens_generated
    assert generated == sum(node.num_tokens for node in result.search.nodes)
    assert result.cost.prompt_tokens == prompt
    assert result.tokens_computed <= prompt + generated - unfollowed(result)
    # Every beginning of a sequence went through the model at least once.
    known = set()
    for leaf in result.tree.leaves():
        tokens = result.tree.tokens(leaf)
        known |= {tuple(tokens[:end]) for end in range(prompt + 1, len(tokens))}
    assert result.tokens_computed >= prompt + len(known)
    if name == "best_of_n":
        assert result.tokens_computed == prompt + len(known)
    if name == "mcts":
        back = [n for n in result.search.nodes if n.children and n.children[0] > n.id + 3]
        assert back, "this search never went back to a held branch"


def test_a_prefix_is_computed_once_for_all_who_follow_it(llama: Any) -> None:
    prefix = "is that so? " * 4

    @dataclass(frozen=True)
    class Ask:
        def decide(self, search: SearchTree) -> Sequence[Action]:
            return [] if search.root.children else [Expand(0, 5, prefix=prefix, kind="reply")]

        def conclude(self, search: SearchTree) -> Conclusion:
            return conclude_best(search)

    with tokens_through(llama) as seen:
        (result,) = run_search(llama, TOKENIZER, [QUESTION], Ask(), **SHORT)
    replies = result.search.children(0, "reply")
    assert [reply.aside for reply in replies] == [True] * 5
    assert all(prefix not in reply.step and reply.text.startswith(prefix) for reply in replies)
    assert result.solutions == [] and result.answer is None and result.text == ""
    generated = sum(reply.num_tokens for reply in replies)
    assert sum(seen) <= len(QUESTION) + len(prefix) + generated - 5


class TestBudgets:
    @pytest.mark.parametrize("bound", [1, 3, 17, 50, 51])
    @pytest.mark.parametrize("name", ["step_beam", "self_consistency", "mcts, rollouts"])
    def test_tokens_are_never_exceeded(self, llama: Any, name: str, bound: int) -> None:
        options = {**options_of(name), "budget": Budget(tokens=bound)}
        for result in STRATEGIES[name][0](llama, TOKENIZER, QUESTIONS[:2], **options):
            spent = sum(node.num_tokens for node in result.search.nodes)
            assert spent == result.tokens_generated == bound
            assert result.ended_by == "tokens"
            assert {node.state for node in result.search.nodes} >= {"cut"}

    def test_what_is_complete_when_a_bound_is_met_is_still_scored(self, llama: Any) -> None:
        options = {**SHORT, "num_branches": 8, "stop": list("xyzabc"), "score": few_vowels}
        result = best_of_n(llama, TOKENIZER, QUESTION, budget=Budget(tokens=60), **options)
        assert result.ended_by == "tokens"
        assert 1 < len(result.solutions) < 8
        assert result.score == max(solution.score for solution in result.solutions)

    def test_a_bound_that_is_not_met_changes_nothing(self, llama: Any) -> None:
        options = options_of("step_beam")
        free = step_beam(llama, TOKENIZER, QUESTION, **options)
        wide = Budget(tokens=10_000, branches=500, seconds=600.0, blocks=500)
        assert facts(step_beam(llama, TOKENIZER, QUESTION, **options, budget=wide)) == facts(free)

    def test_branches_are_granted_up_to_the_bound_and_run_to_their_end(self, llama: Any) -> None:
        result = best_of_n(
            llama, TOKENIZER, QUESTION, num_branches=9, budget=Budget(branches=4), **SHORT
        )
        assert (result.branches, len(result.solutions), result.ended_by) == (4, 4, "branches")
        assert result.score is not None, "what was granted was also scored"
        result = step_beam(
            llama, TOKENIZER, QUESTION, **options_of("step_beam"), budget=Budget(branches=8)
        )
        assert (result.branches, result.ended_by) == (8, "branches")
        # All at once, the rest is asked for again when the first has ended.
        for name in ("self_consistency", "self_consistency, few in parallel"):
            result = self_consistency(
                llama, TOKENIZER, QUESTION, **{**options_of(name), "budget": Budget(branches=3)}
            )
            assert (result.branches, len(result.solutions), result.ended_by) == (3, 3, "branches")

    def test_seconds_end_all_questions_with_what_there_is(self, llama: Any) -> None:
        budget = Budget(seconds=1e-9)
        results = best_of_n(llama, TOKENIZER, QUESTIONS, num_branches=3, budget=budget, **SHORT)
        for result in results:
            assert (result.ended_by, result.answer, result.text) == ("seconds", None, "")
            assert result.tokens_generated == 3, "one token of each branch"

    def test_blocks_end_the_search_and_are_never_exceeded(self, llama: Any) -> None:
        cache = TreeCache(max_blocks=9)
        runner = BranchRunner(llama, TOKENIZER, cache=cache, seed=5, sampling=Sampling(0.8))
        with runner:
            searcher = SearchDriver(
                runner, BestOfN(8), scorer=LogProbScorer(), limits=Limits(max_new_tokens=40)
            )
            (result,) = searcher.run([QUESTION])
        assert result.ended_by == "blocks"
        assert result.tokens_generated > 8
        runner.cache.check_integrity()
        assert cache.tree.allocator.num_used == 0
        by_budget = best_of_n(
            llama, TOKENIZER, QUESTION, num_branches=8, budget=Budget(blocks=9), **SHORT
        )
        assert by_budget.ended_by == "blocks"
        with pytest.raises(OutOfBlocks):
            best_of_n(llama, TOKENIZER, QUESTION * 9, budget=Budget(blocks=2), **SHORT)


class TestEarlyStop:
    def test_a_settled_vote_gives_up_the_branches_that_still_run(self, llama: Any) -> None:
        options = {**SHORT, "num_branches": 12, "answer": lambda text: "same", "stop": list("xyz")}
        stopped = self_consistency(llama, TOKENIZER, QUESTIONS, stop_when=0.95, **options)
        full = self_consistency(llama, TOKENIZER, QUESTIONS, stop_when=1.0, **options)
        for early, late in zip(stopped, full, strict=True):
            states = [node.state for node in early.search.nodes[1:]]
            assert early.reason.startswith("settled, p = 0.9")
            assert 4 <= states.count("done") < 12
            assert states.count("cut") == 12 - states.count("done")
            assert early.answer == late.answer == "same"
            assert early.tokens_generated < late.tokens_generated
        assert stopped[0].tokens_computed < full[0].tokens_computed

    def test_a_pruned_branch_leaves_the_batch_at_the_next_token(self, llama: Any) -> None:
        @dataclass(frozen=True)
        class FirstWins:
            def decide(self, search: SearchTree) -> Sequence[Action]:
                if not search.root.children:
                    return [Expand(0, 4, to_end=True)]
                if len(search.done) == 1:
                    return [Prune(node.id, "late") for node in search.running]
                return []

            def conclude(self, search: SearchTree) -> Conclusion:
                return conclude_best(search)

        (result,) = run_search(
            llama, TOKENIZER, [QUESTION], FirstWins(), stop=list("xyzabc"), **SHORT
        )
        lengths = {node.num_tokens for node in result.search.nodes[1:]}
        assert len(lengths) == 1, "all stood at the same token when the first ended"
        assert [n.state for n in result.search.nodes[1:]].count("pruned") == 3
        assert (
            sorted(result.tree.nodes[leaf].reason for leaf in result.tree.leaves("pruned"))
            == ["late"] * 3
        )


class TestInterrupts:
    @pytest.mark.core
    def test_ctrl_c_returns_what_there_is(self, llama: Any) -> None:
        calls = []

        def watch(tree: Any, searches: Any) -> None:
            calls.append(len(tree.nodes))
            if len(calls) == 4:
                raise KeyboardInterrupt

        results = step_beam(llama, TOKENIZER, QUESTIONS, watch=watch, **options_of("step_beam"))
        assert calls == sorted(calls)
        for result in results:
            assert result.ended_by == "interrupted"
            assert result.branches >= 6
            result.tree.check_integrity()
            assert not result.tree.leaves("alive")

    def test_ctrl_c_within_a_forward_keeps_the_books_right(self, llama: Any) -> None:
        seen = []

        def interrupt(module: Any, args: Any) -> None:
            seen.append(1)
            if len(seen) == 20:
                raise KeyboardInterrupt

        hook = llama.model.layers[1].register_forward_pre_hook(interrupt)
        runner = BranchRunner(llama, TOKENIZER, seed=5, sampling=Sampling(0.8))
        try:
            with runner:
                searcher = SearchDriver(runner, BestOfN(3), limits=Limits(max_new_tokens=40))
                results = searcher.run(QUESTIONS)
        finally:
            hook.remove()
        runner.cache.check_integrity()
        assert runner.cache.tree.allocator.num_used == 0 and runner.branches == []
        for result in results:
            assert result.ended_by == "interrupted"
            assert [node.num_tokens for node in result.search.nodes[1:]] == [19] * 3
            assert result.tree.num_tokens == 3 * 19

    def test_an_error_of_a_scorer_goes_through_and_frees_everything(self, llama: Any) -> None:
        def broken(candidate: Any) -> float:
            raise ZeroDivisionError

        runner = BranchRunner(llama, TOKENIZER, seed=5, sampling=Sampling(0.8))
        mine = runner.add_prompts([QUESTION])
        with runner:
            searcher = SearchDriver(
                runner,
                BestOfN(3),
                scorer=type("Broken", (), {"score": lambda self, c: broken(c)})(),
                limits=Limits(max_new_tokens=8),
            )
            with pytest.raises(ZeroDivisionError):
                searcher.run(QUESTIONS)
            assert runner.branches == mine, "branches that were there before are left alone"

    def test_scores_that_are_not_finite_are_refused(self, llama: Any) -> None:
        with pytest.raises(NonFiniteScores, match="CallableScorer gave"):
            best_of_n(llama, TOKENIZER, QUESTION, score=lambda c: float("nan"), **SHORT)


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


WRONG_CALLS: dict[str, tuple[Any, str]] = {
    "no questions": (lambda m: best_of_n(m, TOKENIZER, []), "at least one question"),
    "no tokenizer": (lambda m: best_of_n(m, None, QUESTION), "pass a tokenizer"),
    "unknown scorer": (
        lambda m: best_of_n(m, TOKENIZER, QUESTION, score="likelihood"),
        "known are 'mean_logprob'",
    ),
    "a bare model as scorer": (
        lambda m: best_of_n(m, TOKENIZER, QUESTION, score=m),
        "RewardModel.model, tokenizer",
    ),
    "a number as scorer": (
        lambda m: best_of_n(m, TOKENIZER, QUESTION, score=3),
        "a function of a Candidate",
    ),
    "unknown option": (
        lambda m: best_of_n(m, TOKENIZER, QUESTION, samples=3),
        "best_of_n: unknown option samples; known are .*num_branches, .*max_new_tokens",
    ),
    "an option of Sampling": (
        lambda m: entropy_branching(m, TOKENIZER, QUESTION, temperature=3),
        r"known are threshold, .*Sampling takes temperature: sampling=Sampling\(\.\.\.\)",
    ),
    "unknown option of any policy": (
        lambda m: run_search(m, TOKENIZER, [QUESTION], BestOfN(), samples=3),
        "run_search: unknown option samples; known are score, seed",
    ),
    "weight without a scorer": (
        lambda m: self_consistency(m, TOKENIZER, QUESTION, weight="score"),
        "need each other",
    ),
    "two ways to value": (
        lambda m: tree_of_thoughts(m, TOKENIZER, QUESTION, score="logprob", value_prompt="?"),
        "one of the two",
    ),
    "a class in place of a policy": (
        lambda m: run_search(m, TOKENIZER, [QUESTION], BestOfN),
        "a policy is an object",
    ),
    "greedy": (
        lambda m: best_of_n(m, TOKENIZER, QUESTION, sampling=Sampling.greedy()),
        "are all the same: sample",
    ),
    "no tokens": (
        lambda m: best_of_n(m, TOKENIZER, QUESTION, max_new_tokens=0),
        "at least 1",
    ),
    "an empty delimiter": (
        lambda m: best_of_n(m, TOKENIZER, QUESTION, delimiters=[""]),
        "not empty",
    ),
    "text for a list": (
        lambda m: best_of_n(m, TOKENIZER, QUESTION, stop="END"),
        "give a list of texts",
    ),
    "two bounds on blocks": (
        lambda m: best_of_n(m, TOKENIZER, QUESTION, cache=TreeCache(), budget=Budget(blocks=5)),
        "one of the two",
    ),
    "a list as answer": (
        lambda m: best_of_n(m, TOKENIZER, QUESTION, answer=list, **SHORT),
        "cannot be counted",
    ),
    "branching on no entropy": (
        lambda m: entropy_branching(m, TOKENIZER, QUESTION, threshold=0),
        "positive number",
    ),
    "more children than branches": (
        lambda m: entropy_branching(m, TOKENIZER, QUESTION, children=5, max_branches=4),
        "no fork could",
    ),
    "branching without a question": (
        lambda m: entropy_branching(m, TOKENIZER, []),
        "at least one question",
    ),
}


@pytest.mark.parametrize(("call", "complaint"), WRONG_CALLS.values(), ids=WRONG_CALLS)
def test_a_wrong_call_is_refused_early(llama: Any, call: Any, complaint: str) -> None:
    with pytest.raises(InvalidArgument, match=complaint):
        call(llama)


@pytest.mark.parametrize("num_labels", [1, 2])
def test_a_reward_model_scores_in_batches(llama: Any, num_labels: int) -> None:
    from transformers import LlamaForSequenceClassification

    config = type(llama.config).from_dict({**llama.config.to_dict(), "num_labels": num_labels})
    torch.manual_seed(1)
    judge = LlamaForSequenceClassification(config).eval()
    reward = RewardModel(judge, TOKENIZER, batch_size=3)
    result = best_of_n(llama, TOKENIZER, QUESTION, num_branches=4, score=reward, **SHORT)
    assert result.cost.candidates_scored == 4
    for solution in result.solutions:
        inputs = TOKENIZER(QUESTION + solution.text, return_tensors="pt")
        logits = judge(**inputs).logits[0].detach()
        expected = logits[0] if num_labels == 1 else logits.softmax(-1)[-1]
        assert solution.score == pytest.approx(float(expected), abs=1e-5)
    assert result.score == max(solution.score for solution in result.solutions)
    with pytest.raises(InvalidArgument, match="labels, numbered from 0"):
        RewardModel(judge, TOKENIZER, label=num_labels)
    with pytest.raises(InvalidArgument, match="padding token"):
        RewardModel(llama, type("Bare", (), {"pad_token_id": None})())


def test_a_result_shows_itself(llama: Any) -> None:
    result = self_consistency(
        llama, TOKENIZER, QUESTION, num_branches=3, answer=lambda text: "<x>", **SHORT
    )
    text, html = repr(result), result._repr_html_()
    assert text.startswith("SearchResult(answer: <x>; votes: <x> × 3; score: –;")
    assert "3 complete of 3" in text and "all voted" in text
    assert "&lt;x&gt; × 3" in html and "<x>" not in html
    assert 'class="htc"' in html, "the tree is drawn below"


def test_a_running_search_can_be_watched(llama: Any) -> None:
    seen: list[tuple[int, list[int]]] = []

    def watch(tree: Any, searches: Sequence[SearchTree]) -> None:
        tree.check_integrity()
        seen.append((tree.num_tokens, [len(search.nodes) for search in searches]))

    step_beam(llama, TOKENIZER, QUESTIONS, watch=watch, **options_of("step_beam"))
    assert len(seen) > 3
    assert seen == sorted(seen)
    assert seen[0] == (0, [7, 7, 7])


def test_in_a_notebook_the_tree_is_drawn_as_it_grows_and_goes_with_the_search(
    llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures: list[str] = []

    class Screen(LiveView):
        def show(self) -> None:
            if self._shell is not None:
                pictures.append(self._draw())

        def follow(self) -> None:
            self.show()

    monkeypatch.setattr(driver, "LiveView", Screen)
    monkeypatch.setattr(driver, "notebook_shell", lambda: "a notebook")
    options = {"num_branches": 2, "max_new_tokens": 6}
    best_of_n(llama, TOKENIZER, QUESTION, progress=False, **options)
    assert pictures == []
    monkeypatch.setattr(driver, "tqdm", lambda **given: nullcontext(MagicMock()))
    best_of_n(llama, TOKENIZER, QUESTION, **options)
    assert len(pictures) == 7
    assert all('class="htc"' in picture for picture in pictures[:-1])
    assert len(set(pictures)) == 7 and pictures[-1] == ""


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


def test_branching_on_entropy_within_bounds(llama: Any) -> None:
    options = {**options_of("entropy_branching"), "max_tokens": 12}
    result = entropy_branching(llama, TOKENIZER, QUESTION, **options)
    assert result.ended_by == "tokens" and result.tokens_generated <= 12 + 5
    result = entropy_branching(llama, TOKENIZER, QUESTION, max_seconds=1e-9, **SHORT)
    assert result.ended_by == "seconds"
    weighted = entropy_branching(
        llama, TOKENIZER, QUESTION, weighted=True, **options_of("entropy_branching")
    )
    assert weighted.branches == 5 and 0 < sum(weighted.votes.values()) < 5
    with tokens_through(llama) as seen:
        again = entropy_branching(llama, TOKENIZER, QUESTION, **options_of("entropy_branching"))
    assert sum(seen) == again.tokens_computed


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


def test_self_consistency_is_a_policy_and_so_is_the_users(llama: Any) -> None:
    assert isinstance(SelfConsistency(), Policy)
    assert not isinstance(object(), Policy)


def test_steps_give_all_events_of_a_token_at_once_and_branches_may_leave_between(
    llama: Any,
) -> None:
    with BranchRunner(llama, TOKENIZER, seed=3) as runner:
        (root,) = runner.add_prompts([[5, 6, 7]])
        branches = [root, *runner.fork(root, 3)]
        counts = []
        for events in runner.steps(branches, max_new_tokens=4, stop=Stop(eos=False)):
            counts.append([event.kind for event in events])
            if len(counts) == 2:
                runner.prune(branches[1])
                branches += runner.fork(branches[0])
        assert counts[:3] == [["token"] * 4, ["token"] * 4, ["token"] * 3]
        assert counts[3] == ["token", "finish"] * 3
        assert len(runner.tokens(branches[-1])) == 5
        runner.cache.check_integrity()
        pieces = [
            e.text
            for es in runner.steps(branches[2:3], max_new_tokens=2, with_text=False)
            for e in es
            if e.kind == "token"
        ]
        assert not any(pieces)
