"""A grammar of its own for each branch, forked and rolled back with it."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from models import build, one_thread  # noqa: F401

from hf_tree_cache import (
    BranchRunner,
    ForkAtFirstToken,
    InvalidArgument,
    Sampling,
    TreeCache,
    tree_generate,
)

xgrammar = pytest.importorskip("xgrammar")

from hf_tree_cache.generation.grammar import GrammarProcessor  # noqa: E402
from hf_tree_cache.generation.processors import BranchBatch  # noqa: E402

LETTERS = ["<pad>", "<bos>", "<eos>", *map(chr, range(97, 123)), *(f"<{i}>" for i in range(68))]


def compiled(pattern: str) -> Any:
    info = xgrammar.TokenizerInfo(LETTERS, vocab_size=97, stop_token_ids=[2])
    return xgrammar.GrammarCompiler(info).compile_regex(pattern)


def spelled(runner: BranchRunner, branch: Any) -> str:
    return "".join(LETTERS[t] for t in runner.tokens(branch, include_prompt=False))


@pytest.fixture
def runner() -> Any:
    base = build("llama")
    base.generation_config.eos_token_id = 2
    grammar = GrammarProcessor(compiled("(abc|xyz)*[0-9a-m]{9}"))
    with BranchRunner(base, processors=[grammar], seed=1, sampling=Sampling()) as runner:
        yield runner


def test_forks_also_from_the_past_stay_within_the_grammar(runner: BranchRunner) -> None:
    grammar = runner.processors[0]
    assert isinstance(grammar, GrammarProcessor)
    a, b, free = runner.add_prompts([[1, 5], [1, 6, 7], [1, 5]])
    grammar.constrain(b, compiled("[q-z]{5}"))
    grammar.constrain(free, None)
    runner.extend([a, b, free], max_new_tokens=7)
    back = runner.fork(a, 3, at=-4, distinct=True)
    more = runner.fork(b, 2, at=-2)
    turns = runner.extend([a, *back, *more], max_new_tokens=40)
    assert {turn.reason for turn in turns} == {"eos"}
    for branch in (a, *back):
        assert re.fullmatch(r"(abc|xyz)*[a-m]{9}<eos>", spelled(runner, branch))
    for branch in (b, *more):
        assert re.match(r"[q-z]{3,5}", spelled(runner, branch))
    assert not re.fullmatch(r"(abc|xyz|[a-m])*", spelled(runner, free))


def test_what_was_appended_counts(runner: BranchRunner) -> None:
    (a,) = runner.add_prompts([[1, 5]])
    runner.append(a, [LETTERS.index(letter) for letter in "xyzx"])
    runner.extend([a], max_new_tokens=2)
    assert spelled(runner, a) == "xyzxyz"
    runner.append(a, [LETTERS.index("q")])
    with pytest.raises(InvalidArgument, match="token 19 does not fit"):
        runner.extend([a], max_new_tokens=1)
    assert runner.length(a) == 9


def test_tree_generate_follows_a_grammar_too() -> None:
    base = build("llama")
    base.generation_config.eos_token_id = 2
    out = base.generate(
        torch.tensor([[1, 5]]),
        past_key_values=TreeCache(),
        custom_generate=tree_generate,
        branching=[ForkAtFirstToken(4), GrammarProcessor(compiled("[a-d][e-h][i-l]"))],
        max_new_tokens=9,
        do_sample=True,
    )
    assert len(out) == 4
    for sequence in out.sequences:
        text = "".join(LETTERS[token] for token in sequence[2:])
        assert re.fullmatch("[a-d][e-h][i-l]<eos>", text)


def test_a_token_that_the_host_knows_is_not_read_from_the_device() -> None:
    grammar = GrammarProcessor(compiled("abc"))
    scores = torch.zeros(1, len(LETTERS))

    def allowed(*last: int) -> list[str]:
        grammar.batch = BranchBatch((0,), (0,), (len(last),), (0.0,), last[-1:])
        masked = grammar(torch.empty(1, 0, dtype=torch.int64), scores)
        return [LETTERS[i] for i in (masked[0] > -torch.inf).nonzero().flatten().tolist()]

    a, b = LETTERS.index("a"), LETTERS.index("b")
    assert [allowed(), allowed(a), allowed(a, b)] == [["a"], ["b"], ["c"]]


def test_what_is_not_compiled_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="compile_regex"):
        GrammarProcessor("[a-z]+")
