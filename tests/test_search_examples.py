"""On the weights of examples/puzzle a search pays, and the examples around it do what they say."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import puzzle
import pytest
import reasoning
import search
import search_report
import text_level
import torch
from intervals import wilson
from puzzle import data, train
from puzzle.judge import Judge
from puzzle.merge import MergeEqual
from puzzle.task import Puzzle
from puzzle.vocabulary import encode
from transformers import AutoModelForCausalLM, LlamaConfig

from hf_tree_cache import Candidate
from hf_tree_cache.search.best_of_n import BestOfN
from hf_tree_cache.search.policy import Prune, SearchNode, SearchTree
from hf_tree_cache.search.self_consistency import SelfConsistency
from hf_tree_cache.search.step_beam import StepBeam


@pytest.fixture(scope="module")
def bench() -> search.Bench:
    return search.Bench(search.tuning_puzzles(20))


def solved(point: search.Point) -> int:
    return point.solved.count("1")


def test_weights_and_verifier_fit_into_12_mb() -> None:
    files = [path for path in puzzle.FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 12e6


def test_many_samples_and_a_guided_search_solve_more_than_one_sample(bench: search.Bench) -> None:
    runs = [
        bench.policy(SelfConsistency(1)),
        bench.policy(BestOfN(8), score=bench.judge),
        bench.guided(StepBeam(4, 4, max_steps=4)),
    ]
    (single,), (best,), (tree,) = (
        bench.measure(search.Entry(0, "", run, {"": search.by_policy})) for run in runs
    )
    assert single.share < 0.4
    assert best.solved == best.reached and solved(best) >= solved(single) + 4
    assert solved(tree) >= solved(single) + 4
    assert tree.tokens < 8 * single.tokens and tree.verifier_tokens > 0


def test_votes_and_log_probs_choose_among_the_same_samples(bench: search.Bench) -> None:
    choices = {
        "vote": search.by_vote,
        "log-prob": search.by_logprob,
        "checker": search.by_policy,
        "any": search.by_check,
    }
    run = bench.policy(BestOfN(8), score=bench.judge)
    points = bench.measure(search.Entry(200, "8", run, choices))
    assert [point.strategy for point in points] == list(choices)
    assert len({(point.reached, point.tokens) for point in points}) == 1
    for point in points:
        pairs = zip(point.solved, point.reached, strict=True)
        assert all(reached == "1" or hit == "0" for hit, reached in pairs)
    assert points[2].solved == points[3].solved == points[2].reached


def test_puzzles_that_count_have_numbers_that_nothing_was_tuned_on() -> None:
    sets = search.evaluation_puzzles(3, 25)
    assert [len(puzzles) for puzzles in sets] == [25] * 3
    # More seeds leave the first as they are.
    assert search.evaluation_puzzles(2, 25) == sets[:2]
    seen = [tuple(sorted(puzzle.numbers)) for puzzles in sets for puzzle in puzzles]
    tuned = {tuple(sorted(puzzle.numbers)) for puzzle in search.tuning_puzzles()}
    assert len(set(seen)) == len(seen) and not tuned & set(seen)
    with pytest.raises(ValueError, match="Ask for fewer"):
        search.evaluation_puzzles(1, 2_000)


def test_a_run_that_was_stopped_goes_on_behind_its_last_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[int] = []

    def run_seed(bench: search.Bench, only: str) -> list[search.Point]:
        ran.append(bench.seed)
        return [search.Point("greedy", 0, "1", bench.seed, "01", "11", 60.0, 0.0, 60.0, 1.0)]

    monkeypatch.setattr(search, "run_seed", run_seed)
    out = tmp_path / "search.json"
    search.main(["--seeds", "2", "--puzzles", "2", "--out", str(out)])
    search.main(["--seeds", "3", "--puzzles", "2", "--out", str(out)])
    assert ran == [1, 2, 3]
    assert [point["seed"] for point in json.loads(out.read_text())["points"]] == [1, 2, 3]


def test_the_verifier_tells_dead_ends_it_was_not_trained_on() -> None:
    model, _ = puzzle.load_verifier()
    found = train.verdict_quality(model, [data.verdicts(10**6, 200)])
    assert found["auc"] > 0.8


def test_the_judge_checks_what_can_be_checked_and_asks_the_verifier_for_the_rest() -> None:
    judge = Judge(*puzzle.load_verifier())
    prompt = Puzzle((25, 3, 4, 7), 66).prompt
    lines = ["25-3=22 left: 22 4 7\n", "7-4=3 left: 3 22\n", "22*3=66 left: 66\n"]

    def candidate(text: str, done: bool = False) -> Candidate:
        return Candidate(prompt, text, "", (), (), done)

    assert judge.score([candidate("".join(lines), True), candidate("".join(lines))]) == [1, 1]
    assert judge.score([candidate("25-3=21 left: 21 4 7\n")]) == [0]
    assert judge.score([candidate("".join(lines[:2]), True)]) == [0]
    assert judge.tokens == 0
    # One move before the end the four operations are tried.
    dead = "25*7=175 left: 175 3 4\n175*4=700 left: 700 3\n"
    assert judge.score([candidate("".join(lines[:2])), candidate(dead)]) == [1, 0]
    assert judge.tokens == 0
    (chance,) = judge.score([candidate(lines[0])])
    assert 0 < chance < 1 and judge.tokens == len(encode(prompt + lines[0]))


def test_equal_steps_go_on_once() -> None:
    tree = SearchTree(nodes=[SearchNode(0, None, 0)])
    for step in ("a\n", "b\n", "a\n"):
        node = tree.add(0)
        node.state, node.text, node.step = "open", step, step
    merged = MergeEqual(StepBeam(2, 2))
    assert [(action.node, type(action)) for action in merged.decide(tree)] == [(3, Prune)]
    tree.nodes[3].state = "pruned"
    assert merged.decide(tree) == StepBeam(2, 2).decide(tree)
    assert merged.conclude(tree) == StepBeam(2, 2).conclude(tree)


def test_text_and_tree_propose_the_same_candidates_one_by_one() -> None:
    model, tokenizer = puzzle.load_model()
    work = text_level.Work("puzzle", 0, width=3, expand=3, steps=3, step_tokens=24)
    prompt = Puzzle((25, 3, 4, 7), 66).prompt
    text, tree = (
        text_level.run_once(way, work, model, tokenizer, prompt).nodes[1:]
        for way in ("text", "tree")
    )
    assert len(text) == 27
    assert [node.text for node in text] == [node.text for node in tree]
    assert [node.parent for node in text] == [node.parent for node in tree]
    assert [node.score for node in text] == pytest.approx([node.score for node in tree], abs=1e-4)
    # Siblings begin apart.
    assert len({node.text for node in text[:9]}) == 9


def test_the_8b_shape_has_words_that_survive_being_sent_as_text() -> None:
    words = text_level.words(50)
    ids = [3, 49, 7, 7, 1]
    assert words(words.decode(ids)).input_ids == ids
    assert words(words.decode(ids) + words.decode([5])).input_ids == [*ids, 5]
    work = text_level.Work("8b", 20, 2, 2, 2, 4)
    assert len(words(text_level.question_of(work, words)).input_ids) == 20


def test_random_weights_in_bfloat16_propose_the_same_both_ways(
    capsys: pytest.CaptureFixture[str],
) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    text_level.clear_successors(model)
    model.lm_head = text_level.FullHead(model.lm_head)
    work = text_level.Work("8b", 20, width=2, expand=3, steps=3, step_tokens=4)
    text, tree = text_level.search_warm(work, model, text_level.words(300))
    assert text.candidates == tree.candidates and len(text.candidates) == 3 * 6
    assert text.scores == pytest.approx(tree.scores, abs=0.02)
    # The best of three continuations are surer than the others, by more than rounding.
    assert max(text.scores[:6]) - min(text.scores[:6]) > 0.1
    # Each round sends every beam again, six rows; the last of four tokens needs no forward.
    assert text.tokens == sum(6 * (20 + 4 * step) + 6 * 3 for step in range(3))
    assert tree.tokens < text.tokens / 3
    assert capsys.readouterr().out.count("the last counts") == 2
    said = json.loads(text_level.as_json(work, text, tree))
    assert said["candidates"] == {"text": 18, "tree": 18, "same": 18}
    assert said["tree"]["tokens"] == tree.tokens


def test_the_report_names_what_both_ways_did() -> None:
    text = text_level.Found(["a\n", "b\n"], [0.0, 0.0], tokens=900, seconds=3.0, memory_mb=10.0)
    tree = replace(text, candidates=["a\n", "c\n"], tokens=100, seconds=1.0)
    said = text_level.report(text, tree)
    assert "9.0 ×" in said and "3.0 ×" in said
    assert "1 of 2 candidates are the same" in said


def test_intervals_come_from_puzzles_and_from_seeds() -> None:
    alike = [[1, 0] * 10, [0, 1] * 10, [1, 0] * 10]
    apart = [[1] * 20, [1, 0] * 10, [0] * 20]
    low, high = search_report.interval(alike)
    assert 0.35 < low < 0.5 < high < 0.65
    # The same share, but it depends on the seed: all of the range is possible.
    wider = search_report.interval(apart)
    assert wider[0] < low - 0.2 and wider[1] > high + 0.2
    # More puzzles of each seed narrow it.
    many = search_report.interval([values * 10 for values in alike])
    assert many[1] - many[0] < 0.5 * (high - low)
    assert search_report.interval([[0, 0], [0, 0]]) == wilson(0, 4)


@pytest.mark.parametrize("hits", [0, 1, 7, 20])
def test_wilson_holds_the_shares_that_the_score_test_does_not_refuse(hits: int) -> None:
    low, high = wilson(hits, 20)
    assert 0 <= low <= hits / 20 <= high <= 1
    for share in (low, high):
        if 0 < share < 1:
            score = abs(hits / 20 - share) / (share * (1 - share) / 20) ** 0.5
            assert score == pytest.approx(1.96)


def test_the_comparison_page_and_figure_are_those_of_the_results() -> None:
    report = json.loads(search_report.RESULTS.read_text())
    page = search_report.PAGE.read_text()
    assert search_report.page(page, report) == page
    names = {point["strategy"] for point in report["points"]}
    assert names == set(search_report.COLORS)
    drawn = search_report.FIGURE.read_text()
    assert all(name in drawn for name in names)


@pytest.mark.parametrize(
    ("question", "answer"),
    [("Compute: 4 - 1 - 7 =", "4 - 1 = 3\n3 - 7 = -4\nThe answer is -4."), ("x: 12 + 30 =", None)],
)
def test_shots_for_chains_of_sums_are_worked_out(question: str, answer: str | None) -> None:
    assert reasoning.working(question) == (answer or "12 + 30 = 42\nThe answer is 42.")


def test_shared_beginnings_count_once_and_groups_do_not_overlap() -> None:
    assert reasoning.tree_tokens([[1, 2, 3], [1, 2, 4, 5], [1, 2, 3]]) == 5
    assert reasoning.groups(8, 4) == [range(0, 4), range(4, 8)]


def test_the_bootstrap_interval_narrows_with_more_questions() -> None:
    few, many = ([0.0, 1.0] * n for n in (5, 50))
    widths = [high - low for low, high in map(reasoning.bootstrap, (few, many))]
    assert 0.7 > widths[0] > 2 * widths[1] > 0.2
    assert reasoning.bootstrap([0.0] * 10) == wilson(0, 10)


def test_questions_are_answered_and_counted(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    smollm2: tuple[Any, Any],
    tmp_path: Path,
) -> None:
    asked = [{"question": "State the answer: 4 + 3 =", "answer": "7"}]
    shots = [(text, reasoning.working(text)) for text in ("It: 2 + 2 - 1 =", "It: 9 - 5 =")]
    monkeypatch.setattr(reasoning, "load_smollm2", lambda: smollm2)
    monkeypatch.setattr(reasoning, "task", lambda name, count: (asked, shots))
    out = tmp_path / "figures.json"
    arguments = ["--questions", "1", "--samples", "4", "--tasks", "sums", "--out", str(out)]
    (rows,) = reasoning.main(arguments).values()
    assert [row.strategy for row in rows][:2] == ["single sample", "self-consistency, 4"]
    assert rows[0].tokens < rows[1].tokens
    assert all(0 <= row.interval[0] <= row.accuracy <= row.interval[1] <= 1 for row in rows)
    assert "sums" in capsys.readouterr().out
    assert len(json.loads(out.read_text())["sums"]) == len(rows)


def test_tasks_of_reasoning_gym_bring_worked_examples() -> None:
    pytest.importorskip("reasoning_gym")
    data, shots = reasoning.task("chain_sum", 2)
    assert len(data) == 2 and int(data[0]["answer"]) == eval(data[0]["question"].split(":")[1][:-2])
    assert all(text.endswith(".") and "=" in text for _, text in shots)
