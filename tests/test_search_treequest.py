"""treequest's own algorithms over held branches; needs the optional extra."""

from __future__ import annotations

from typing import Any

import pytest
from models import model
from search_fakes import letters

pytest.importorskip("treequest", reason="the optional extra: pip install hf_tree_cache[treequest]")

import treequest

from hf_tree_cache.search.ask_tell import treequest_search

TOKENIZER = letters()


def few_vowels(candidate: Any) -> float:
    return 1 - sum(letter in "aeiou" for letter in candidate.text) / max(1, len(candidate.text))


@pytest.mark.parametrize(
    ("algorithm", "parallel"),
    [
        (treequest.StandardMCTS(samples_per_action=2), 2),
        (treequest.TreeOfThoughtsBFSAlgo(breadth_limit=2, size_limit=3), 3),
        (treequest.ABMCTSA(), 1),
    ],
    ids=["MCTS", "tree of thoughts", "AB-MCTS"],
)
def test_an_algorithm_of_treequest_searches(algorithm: Any, parallel: int) -> None:
    results = treequest_search(
        model("llama"),
        TOKENIZER,
        ["2 + 2 = ?\n", "3 * 3 = ?\n"],
        algorithm=algorithm,
        score=few_vowels,
        trials=8,
        parallel=parallel,
        delimiters=list("bcdfgh"),
        max_new_tokens=16,
        seed=1,
    )
    for result in results:
        assert result.reason == "all trials done"
        steps = result.search.nodes[1:]
        assert 1 <= len(steps) <= 8
        told = algorithm.get_state_score_pairs(result.search.notes["state"])
        assert {(node.id, node.score) for node in steps} >= set(told)
        assert len(told) >= len(steps) - parallel
        # AB-MCTS draws on NumPy's global generator whether it goes wider or deeper.
        assert any(node.parent for node in steps) or isinstance(algorithm, treequest.ABMCTSA)
