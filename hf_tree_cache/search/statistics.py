"""When is a vote settled? Exact, in whole numbers."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from math import comb

from ..errors import InvalidArgument


def leader_stays(first: int, second: int) -> float:
    """Probability that the leading answer is the more frequent one, given the votes so far.

    Only the two leading answers count, with a uniform prior on the share ``p`` of the first among
    them: the posterior is Beta(first + 1, second + 1), and this is the mass above one half. It is
    the "Beta" stopping criterion of Adaptive-Consistency (Aggarwal, Madaan, Yang and Mausam, "Let's
    Sample Step by Step", EMNLP 2023). For whole counts the regularised incomplete beta function is
    a binomial tail, ``P(Binomial(first + second + 1, 1/2) <= first)``, summed here as integers.

    Args:
        first: votes of the leader.
        second: votes of the runner-up; 0 where there is none.

    Raises:
        InvalidArgument: a negative count, or a leader behind the runner-up.
    """
    if not 0 <= second <= first:
        raise InvalidArgument(
            f"leader_stays({first}, {second}): give the two highest counts, the higher one first."
        )
    trials = first + second + 1
    return float(Fraction(sum(comb(trials, k) for k in range(first + 1)), 2**trials))


def settled(votes: Iterable[float], left: int, stop_when: float | None) -> bool:
    """Whether a vote is over: the rest cannot change it, or will not with ``stop_when``.

    Args:
        votes: weight of each answer, none above 1 a vote.
        left: votes still to come.
        stop_when: posterior probability of :func:`leader_stays` at which the vote counts as
            settled; None waits until the rest cannot change it. Needs whole counts.
    """
    first, second = (sorted([*votes, 0, 0], reverse=True))[:2]
    if first - second > left:
        return True
    if stop_when is None or first == second:
        return False
    return leader_stays(int(first), int(second)) >= stop_when
