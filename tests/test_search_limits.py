"""Searches end early: budgets, enough answers, interrupts, failures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from models import one_thread
from searches import (
    QUESTION,
    QUESTIONS,
    SHORT,
    STRATEGIES,
    TOKENIZER,
    facts,
    few_vowels,
    llama,
    options_of,
)

from hf_tree_cache import BranchRunner, Budget, OutOfBlocks, Sampling, SearchDriver, TreeCache
from hf_tree_cache.errors import NonFiniteScores
from hf_tree_cache.search.best_of_n import BestOfN, best_of_n
from hf_tree_cache.search.policy import Action, Conclusion, Expand, Prune, SearchTree, conclude_best
from hf_tree_cache.search.scoring import LogProbScorer
from hf_tree_cache.search.self_consistency import self_consistency
from hf_tree_cache.search.step_beam import step_beam
from hf_tree_cache.search.strategy import run_search
from hf_tree_cache.search.task import Limits

__all__ = ["llama", "one_thread"]  # fixtures


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
