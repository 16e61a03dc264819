"""The driver on a tiny model: what is computed, repeated, refused and shown."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from models import one_thread
from search_fakes import tokens_through
from searches import QUESTION, QUESTIONS, SHORT, STRATEGIES, TOKENIZER, facts, llama, options_of

from hf_tree_cache import BranchRunner, Budget, Sampling, Stop, TreeCache
from hf_tree_cache.errors import InvalidArgument
from hf_tree_cache.notebook.live import LiveView
from hf_tree_cache.search import driver
from hf_tree_cache.search.best_of_n import BestOfN, best_of_n
from hf_tree_cache.search.entropy_branching import entropy_branching
from hf_tree_cache.search.policy import (
    Action,
    Conclusion,
    Expand,
    Policy,
    SearchTree,
    conclude_best,
)
from hf_tree_cache.search.result import SearchResult
from hf_tree_cache.search.scoring import RewardModel
from hf_tree_cache.search.self_consistency import SelfConsistency, self_consistency
from hf_tree_cache.search.step_beam import step_beam
from hf_tree_cache.search.strategy import run_search
from hf_tree_cache.search.tree_of_thoughts import tree_of_thoughts

__all__ = ["llama", "one_thread"]  # fixtures


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
