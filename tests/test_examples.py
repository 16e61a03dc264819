"""The demo and the branching example do on real weights what README says they do."""

from __future__ import annotations

from collections import Counter
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO

import branching
import pytest
import self_consistency
import torch
from self_consistency import Comparison, Report, Run


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, str]:
    """The demo at its smallest: one question, few branches, a quarter of the long prompt."""
    arguments = ["--questions", "1", "--branches", "4", "--new-tokens", "20"]
    arguments += ["--stored-new-tokens", "2"]
    arguments += ["--html", str(tmp_path_factory.mktemp("demo") / "deep" / "tree.html")]
    printed = StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        patch.setattr(self_consistency, "STORED_PROMPT", 500)
        report = self_consistency.main(arguments)
    return report, printed.getvalue()


def test_both_caches_give_the_same_samples(demo: tuple[Report, str]) -> None:
    report, printed = demo
    (found,) = report.comparisons
    assert found.same and report.same
    assert "the same samples, token for token" in printed
    assert found.tree.sequences.shape[0] == 4
    assert found.votes.total() == 4


def test_the_prompt_is_computed_once_and_takes_less_room(demo: tuple[Report, str]) -> None:
    (found,) = demo[0].comparisons
    assert found.tree.computed == found.prompt_tokens
    assert found.dynamic.computed == 4 * found.prompt_tokens
    assert found.tree.kv_bytes < found.dynamic.kv_bytes


def test_64_branches_of_500_tokens_save_95_percent(demo: tuple[Report, str]) -> None:
    stored = demo[0].stored
    assert stored is not None
    assert (stored.num_rows, stored.prefill_tokens_asked) == (64, 32_000)
    assert stored.prefill_tokens_computed == 500
    assert stored.dense_reads == {}
    assert stored.saving >= 0.95


def test_the_branched_question_is_drawn_and_written(demo: tuple[Report, str]) -> None:
    report, printed = demo
    assert report.branched is not None and report.html is not None
    report.branched.tree.check_integrity()
    assert len(report.branched) >= 1
    assert str(report.branched.tree.num_tokens) in printed
    assert report.html.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert "tree.html" in printed


def test_the_output_fits_a_terminal_of_100_columns(demo: tuple[Report, str]) -> None:
    lines = [line for line in demo[1].splitlines() if "tree.html" not in line]
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("38 + 47 = 85. Answer: 85", 85),
        ("Answer: $1,200.", 1200),
        ("Answer: -3", -3),
        ("Answer: 13.67 dollars", None),
        ("Answer: 12 / 3", 12),
        ("It is 85.", None),
    ],
)
def test_the_answer_is_the_whole_number_behind_the_word(text: str, answer: int | None) -> None:
    assert self_consistency.parse_answer(text) == answer


def test_the_vote_names_the_winner_and_says_when_it_is_wrong() -> None:
    votes = Counter({85: 3, None: 5, 75: 1})
    assert self_consistency.describe(votes, 85) == "85 ×3 75 ×1 others ×5 → 85, right"
    assert self_consistency.describe(votes, 75).endswith("85, wrong: it is 75")
    assert self_consistency.describe(Counter({None: 2}), 1) == "others ×2 → no answer"


def test_one_different_token_is_not_the_same_samples() -> None:
    run = Run(torch.zeros(2, 3, dtype=torch.int64), 1, 1, 1.0)
    other = replace(run, sequences=run.sequences.clone())
    other.sequences[1, 2] = 1
    assert Comparison("?", 1, run, run, Counter(), 0).same
    assert not Comparison("?", 1, run, other, Counter(), 0).same


def test_a_policy_of_the_users_own_forks_and_prunes(capsys: pytest.CaptureFixture[str]) -> None:
    tree = branching.main(new_tokens=44, most=2)
    tree.check_integrity()
    reasons = [node.reason or "" for node in tree.nodes if node.state == "forked"]
    assert any(reason.startswith("line ") for reason in reasons)
    pruned = [node.reason or "" for node in tree.nodes if node.state == "pruned"]
    assert all(reason.endswith(" again") for reason in pruned)
    assert capsys.readouterr().out.startswith("GenerationTree: 1 prompt")
