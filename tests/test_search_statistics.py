"""The vote's statistics against quadrature and simulation; answers and their classes."""

from __future__ import annotations

import random
from fractions import Fraction
from math import comb

import pytest

from hf_tree_cache.errors import InvalidArgument
from hf_tree_cache.search import answers
from hf_tree_cache.search.answers import AnswerClasses, extract_answer, same_answer
from hf_tree_cache.search.statistics import leader_stays, settled


def by_quadrature(first: int, second: int) -> float:
    """Mass of Beta(first + 1, second + 1) above one half, by the midpoint rule."""
    steps = 4000
    density = [p**first * (1 - p) ** second for p in ((i + 0.5) / steps for i in range(steps))]
    return sum(density[steps // 2 :]) / sum(density)


@pytest.mark.parametrize(("first", "second"), [(0, 0), (1, 0), (4, 0), (3, 1), (7, 5), (40, 25)])
def test_the_posterior_is_the_upper_half_of_a_beta(first: int, second: int) -> None:
    assert leader_stays(first, second) == pytest.approx(by_quadrature(first, second), abs=1e-5)


def test_known_values_are_exact() -> None:
    assert leader_stays(0, 0) == 0.5
    assert leader_stays(3, 0) == 15 / 16
    assert leader_stays(4, 0) == 31 / 32
    assert leader_stays(2, 1) == 11 / 16
    tail = Fraction(sum(comb(1001, k) for k in range(521)), 2**1001)
    assert leader_stays(520, 480) == float(tail)


def test_the_posterior_is_how_often_a_leader_is_right() -> None:
    # Shares drawn from the prior, votes from the shares: of the votes that stand at 4 to 2, the
    # leader must be the more frequent answer as often as the posterior says.
    draw = random.Random(7)
    right = seen = 0
    for _ in range(60_000):
        share = draw.random()
        votes = sum(draw.random() < share for _ in range(6))
        if votes in (2, 4):
            seen += 1
            right += (share > 0.5) == (votes == 4)
    expected = leader_stays(4, 2)
    error = (expected * (1 - expected) / seen) ** 0.5
    assert abs(right / seen - expected) < 4 * error


def test_of_the_votes_that_were_stopped_no_more_than_allowed_elect_the_rarer_answer() -> None:
    draw = random.Random(11)
    stopped = wrong = 0
    for _ in range(4000):
        share, counts = draw.random(), [0, 0]
        for cast in range(64):
            counts[draw.random() >= share] += 1
            if settled(counts, 64 - cast - 1, stop_when=0.9):
                stopped += 1
                wrong += (counts[0] > counts[1]) != (share > 0.5)
                break
    assert stopped > 3000
    assert 0.04 < wrong / stopped <= 0.1


def test_votes_settle_by_posterior_or_because_the_rest_cannot_change_them() -> None:
    assert not settled([3], left=10, stop_when=0.95)
    assert settled([4], left=10, stop_when=0.95)
    assert not settled([4], left=10, stop_when=None)
    assert settled([5, 1], left=3, stop_when=None)
    assert not settled([4, 1], left=3, stop_when=None)
    assert not settled([2, 2], left=0, stop_when=0.95)
    assert not settled([], left=4, stop_when=0.95)


@pytest.mark.parametrize("votes", [(1, 2), (-1, -2), (0, 1)])
def test_counts_in_the_wrong_order_are_refused(votes: tuple[int, int]) -> None:
    with pytest.raises(InvalidArgument, match="two highest counts"):
        leader_stays(*votes)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{\frac{1}{2}} it is, not 7", r"\frac{1}{2}"),
        (r"\boxed{3} then \boxed{x^{2}} and \boxed{4", r"x^{2}"),
        ("The answer is 42. I am 100% sure.", "42"),
        ("First, answer: 7.\nNo: the answer is: **1,234**.", "1,234"),
        ("The final answer is Paris.", "Paris"),
        ("3 + 4 = 7, 7 * 2 = 14.", "14"),
        ("it is -0.5", "-0.5"),
        ("a half, 1/2, that is", "1/2"),
        ("no idea", None),
        ("", None),
    ],
)
def test_the_answer_of_a_text(text: str, answer: str | None) -> None:
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("42", " 42. ", True),
        ("1,234", "1234", True),
        ("0.5", "1/2", True),
        ("$3", "3.0", True),
        ("−5", "-5", True),
        ("Paris", "paris", True),
        ("Paris", "Rome", False),
        ("42", "43", False),
        ("1/0", "1", False),
        ((1, 2), (1, 2), True),
        (3, "3", False),
    ],
)
def test_plain_equality_needs_no_extra(
    monkeypatch: pytest.MonkeyPatch, a: object, b: object, same: bool
) -> None:
    monkeypatch.setattr(answers, "has_math_verify", lambda: False)
    assert same_answer(a, b) is same
    assert same_answer(b, a) is same


def test_without_math_verify_a_fraction_in_latex_is_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(answers, "has_math_verify", lambda: False)
    assert not same_answer(r"\frac{1}{2}", "0.5")


def test_with_math_verify_equal_mathematics_is_the_same_answer() -> None:
    pytest.importorskip("math_verify", reason="the optional extra: pip install hf_tree_cache[math]")
    assert same_answer(r"\frac{1}{2}", "0.5")
    assert same_answer(r"2\sqrt{2}", r"\sqrt{8}")
    assert not same_answer(r"\frac{1}{2}", r"\frac{1}{3}")


def test_the_first_of_equal_answers_stands_for_all() -> None:
    classes = AnswerClasses()
    assert [classes.of(answer) for answer in ("0.5", "7", "1/2", None, "7.0")] == [
        "0.5",
        "7",
        "0.5",
        None,
        "7",
    ]
    by_length = AnswerClasses(same=lambda a, b: len(a) == len(b))
    assert [by_length.of(a) for a in ("ab", "cd", "e")] == ["ab", "ab", "e"]
    with pytest.raises(InvalidArgument, match="a list, which cannot be counted"):
        classes.of(["3"])
