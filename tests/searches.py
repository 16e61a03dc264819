"""Searches with a tiny model, for several tests: questions, strategies, policies."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from models import model
from search_fakes import letters

from hf_tree_cache.search.best_of_n import best_of_n
from hf_tree_cache.search.entropy_branching import entropy_branching
from hf_tree_cache.search.mcts import mcts
from hf_tree_cache.search.result import SearchResult
from hf_tree_cache.search.self_consistency import self_consistency
from hf_tree_cache.search.step_beam import dvts, step_beam
from hf_tree_cache.search.tree_of_thoughts import tree_of_thoughts

TOKENIZER = letters()
QUESTION = "what is 3 + 4 * 5?\n"
QUESTIONS = [QUESTION, "and (7 - 2) * 9?\n", "2 + 2 = ?\n"]
VOWELS = "aeiou"
SHORT = {"max_new_tokens": 24, "seed": 5, "progress": False}


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
