"""docs/search: the policy of own_policy.md runs, and the pages say what the code does."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
from models import model, one_thread
from search_fakes import letters

import hf_tree_cache
from hf_tree_cache import GenerationTree
from hf_tree_cache.search.statistics import leader_stays
from hf_tree_cache.search.strategy import SearchOptions

__all__ = ["one_thread"]  # a fixture for all of this file

DOCS = Path(__file__).resolve().parents[1] / "docs" / "search"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


CALL = re.compile(r"= (\w+)\(\s*model, tokenizer,(.*?)\)$", re.MULTILINE | re.DOTALL)


def few_vowels(candidate: Any) -> float:
    return 1 - sum(letter in "aeiou" for letter in candidate.text) / max(1, len(candidate.text))


def test_the_policy_of_the_page_runs_and_takes_fewer_than_40_lines() -> None:
    code = BLOCK.findall((DOCS / "own_policy.md").read_text(encoding="utf-8"))[0]
    assert len(code.splitlines()) < 40
    questions = ["what is 3 + 4?\n", "name a letter\n", "2 * 2 = ?\n"]
    namespace: dict[str, Any] = {
        "model": model("llama"),
        "tokenizer": letters(),
        "questions": questions,
        "reward": few_vowels,
    }
    code = code.replace("Backtrack()", "Backtrack(bound=0.95)").replace(
        "max_new_tokens=64", "max_new_tokens=24, delimiters=list('bcdfgh'), progress=False"
    )
    exec(compile(code, "own_policy.md", "exec"), namespace)
    results = namespace["results"]
    assert [result.question for result in results] == questions
    assert any(result.reason == "found" and result.score >= 0.95 for result in results)
    backtracked = [node for r in results for node in r.search.nodes if len(node.children) > 1]
    assert backtracked, "no question made it go back"
    assert all(isinstance(result.tree, GenerationTree) for result in results)


def test_every_call_on_the_pages_has_arguments_that_exist() -> None:
    options, calls = set(SearchOptions.__annotations__), 0
    for page in DOCS.glob("*.md"):
        for code in BLOCK.findall(page.read_text(encoding="utf-8")):
            for name, arguments in CALL.findall(code):
                calls += 1
                known = set(inspect.signature(getattr(hf_tree_cache, name)).parameters) | options
                used = set(re.findall(r"\b(\w+)=(?!=)", arguments))
                inner = {"tokens"} if "Budget(" in arguments else set()
                assert used - inner <= known, f"{page.name}: {name}"
    assert calls >= 9


def test_the_pages_link_to_what_exists_and_quote_right_numbers() -> None:
    for page in DOCS.glob("*.md"):
        links = re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text(encoding="utf-8"))
        assert [link for link in links if not (page.parent / link).exists()] == [], page.name
    text = (DOCS / "self_consistency.md").read_text(encoding="utf-8")
    assert f"{leader_stays(4, 0):.3f} at 4 to 0" in text
    assert f"{leader_stays(5, 1):.3f} at 5 to 1" in text


@pytest.mark.parametrize("option", sorted(SearchOptions.__annotations__))
def test_every_option_is_in_the_table(option: str) -> None:
    assert f"| `{option}` |" in (DOCS / "README.md").read_text(encoding="utf-8")
