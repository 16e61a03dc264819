"""The puzzle's checker and solver agree, held-out puzzles stay so, the training script runs."""

from __future__ import annotations

import json
import random
from itertools import permutations, product
from pathlib import Path

import pytest
from puzzle import data, train, vocabulary
from puzzle.task import (
    TARGETS,
    Puzzle,
    answer,
    check,
    held_out,
    held_out_puzzles,
    heuristic,
    moves,
    random_trace,
    reachable,
    solve,
)

PUZZLE = Puzzle((25, 3, 4, 7), 66)
SOLUTION = "25-3=22 left: 22 4 7\n7-4=3 left: 3 22\n22*3=66 left: 66\n"


def test_a_solution_is_recognised_step_by_step() -> None:
    found = check(PUZZLE, SOLUTION)
    assert found.solved and not found.error
    assert (found.left, found.steps, found.expression) == ((66,), 3, "((25-3)*(7-4))")
    assert check(PUZZLE, SOLUTION[:30]).left == (22, 4, 7)
    assert Puzzle.parse(PUZZLE.prompt + SOLUTION) == PUZZLE


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("25-3=21 left: 21 4 7\n", "wrong result"),
        ("3-25=22 left: 22 4 7\n", "wrong result"),
        ("25-5=20 left: 20 4 7\n", "not among"),
        ("25-25=0 left: 0 3 4 7\n", "not among"),
        ("25-3=22 left: 22 4 4\n", "the numbers left are 22 4 7"),
        ("25-3=22 left: 22 4\n", "the numbers left are 22 4 7"),
        ("25 - 3 = 22\n", "not a step"),
        ("\n", "not a step"),
        (SOLUTION + "66/66=1 left: 1\n", "after the last one"),
    ],
)
def test_a_wrong_line_is_refused_with_its_reason(text: str, why: str) -> None:
    found = check(PUZZLE, text)
    assert why in found.error
    assert not found.solved and found.expression is None
    assert heuristic(PUZZLE, text) == 0


def test_a_line_without_its_end_is_not_looked_at() -> None:
    assert check(PUZZLE, "25-3=22 left: 22 4 7\n7-9") == check(PUZZLE, "25-3=22 left: 22 4 7\n")


def test_the_wrong_target_is_valid_but_not_solved() -> None:
    found = check(Puzzle(PUZZLE.numbers, 67), SOLUTION)
    assert not found.error and found.expression and not found.solved


def brute_force(numbers: tuple[int, ...]) -> set[int]:
    """What three numbers can make: all orders, operations and both ways to bracket."""
    made = set()
    for a, b, c in permutations(numbers):
        for p, q in product("+-*/", repeat=2):
            left, right = f"({a}{p}{b})", f"({b}{q}{c})"
            for inner, whole in ((left, left + q + str(c)), (right, str(a) + p + right)):
                try:
                    values = eval(inner), eval(whole)
                except ZeroDivisionError:
                    continue
                if all(0 < value <= 999 and value == int(value) for value in values):
                    made.add(int(values[1]))
    return made


def test_reachable_is_what_brute_force_makes() -> None:
    rng = random.Random(0)
    for _ in range(20):
        numbers = tuple(rng.randint(1, 25) for _ in range(3))
        assert reachable(numbers) == brute_force(numbers)


@pytest.mark.parametrize("count", [3, 4])
def test_solve_finds_what_is_reachable_and_nothing_else(count: int) -> None:
    rng = random.Random(count)
    for _ in range(20):
        puzzle = Puzzle(tuple(rng.randint(1, 25) for _ in range(count)), rng.choice(TARGETS))
        found = solve(puzzle)
        assert (found is not None) == (puzzle.target in reachable(puzzle.numbers))
        if found is not None:
            assert check(puzzle, found).solved


def test_every_move_passes_the_checker() -> None:
    for numbers in ((7, 7, 3), (1, 24, 12, 2)):
        for move in moves(numbers):
            assert not check(Puzzle(numbers, 10), f"{move}\n").error


def test_training_never_sees_the_numbers_of_a_held_out_puzzle() -> None:
    rng = random.Random(0)
    seen = [random_trace(rng, 3 + i % 3) for i in range(600)]
    assert all(check(puzzle, trace).solved for puzzle, trace in seen)
    assert not any(held_out(puzzle.numbers) for puzzle, _ in seen)
    kept = held_out_puzzles(20, 4)
    assert kept == held_out_puzzles(20, 4) and kept != held_out_puzzles(20, 4, seed=1)
    assert all(held_out(p.numbers) and solve(p) for p in kept)
    assert held_out((1, 2, 3)) == held_out((3, 1, 2))


def test_the_heuristic_knows_the_last_move_and_prefers_what_is_near() -> None:
    assert heuristic(PUZZLE, SOLUTION) == heuristic(PUZZLE, "".join(SOLUTION[:45])) == 1
    assert heuristic(PUZZLE, "25*3=75 left: 75 4 7\n75*4=300 left: 300 7\n") == 0
    # 75 - 7 is 2 away; from 22, 4 and 7 the nearest is 88.
    near, far = "25*3=75 left: 75 4 7\n", "25-3=22 left: 22 4 7\n"
    assert heuristic(PUZZLE, near) == 1 / 4 > heuristic(PUZZLE, far) > 0


def test_answers_are_the_same_whatever_the_order_of_steps_and_operands() -> None:
    other = "7-4=3 left: 3 25 3\n25-3=22 left: 22 3\n3*22=66 left: 66\n"
    assert answer(SOLUTION) == answer(other) != answer(SOLUTION.replace("7-4=3", "4+7=11"))
    assert answer("25-3=22 left: 22 4 7\n") is None and answer("") is None


def test_the_tokenizer_gives_the_ids_that_training_uses(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    vocabulary.tokenizer().save_pretrained(tmp_path)
    words = AutoTokenizer.from_pretrained(tmp_path)
    text = PUZZLE.prompt + SOLUTION
    assert words(text).input_ids == vocabulary.encode(text)
    assert words.decode(vocabulary.encode(text)) == text
    assert words.padding_side == "left"


def test_batches_ask_for_the_solution_and_not_for_the_puzzle() -> None:
    words = vocabulary.tokenizer()
    batch = data.solutions(0, 8)
    for ids, targets in zip(batch.ids, batch.targets, strict=True):
        asked = targets >= 0
        assert (ids[1:] == targets[:-1])[asked[:-1]].all()
        puzzle = Puzzle.parse(words.decode(ids))
        assert check(puzzle, words.decode(targets[asked])).solved
        assert targets[asked][-1] == words.eos_token_id


def test_verdicts_are_what_the_solver_says_behind_each_line() -> None:
    words, verdicts = vocabulary.tokenizer(), set()
    batch = data.verdicts(0, 30)
    for ids, targets in zip(batch.ids, batch.targets, strict=True):
        for end in (targets >= 0).nonzero()[0]:
            prompt, _, steps = words.decode(ids[: end + 1]).partition("\n")
            puzzle = Puzzle.parse(prompt)
            found = check(puzzle, steps)
            can = not found.error and puzzle.target in reachable(found.left)
            assert bool(targets[end]) == can
            verdicts.add((can, bool(found.error)))
    assert verdicts == {(True, False), (False, False), (False, True)}


def test_batches_do_not_depend_on_the_number_of_workers() -> None:
    alone = data.stream(data.solutions, 4, seed=3, workers=0)
    first, second = next(alone), next(alone)
    assert (first.ids.shape != second.ids.shape) or (first.ids != second.ids).any()
    again = data.stream(data.solutions, 4, seed=3, workers=0)
    assert (next(again).ids == first.ids).all() and (next(again).ids == second.ids).all()


def test_the_training_script_runs_and_what_it_saves_loads(tmp_path: Path) -> None:
    report = train.main(["--smoke", "--out", str(tmp_path)])
    assert json.loads((tmp_path / "training.json").read_text())["held_out"].keys() == {
        "greedy",
        "temperature 1",
    }
    assert report["model"]["log"][-1]["step"] == 10

    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert sum(p.numel() for p in model.parameters()) == report["model"]["parameters"]
    verifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "verifier")
    assert verifier.config.num_labels == 1
