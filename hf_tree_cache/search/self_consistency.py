"""Self-consistency: sample many answers to one question and let them vote."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Unpack

from ..errors import InvalidArgument
from .policy import Action, Conclusion, Expand, Finish, Score, SearchNode, SearchTree, conclude_vote
from .result import Question, SearchResult
from .scoring import ScoreLike
from .statistics import leader_stays, settled
from .strategy import SearchOptions, one_or_many, run_search

Weight = Literal["probability", "score"]


@dataclass(frozen=True, slots=True)
class SelfConsistency:
    """Majority or weighted vote over sampled branches (Wang et al., "Self-Consistency Improves
    Chain of Thought Reasoning in Language Models", ICLR 2023).

    A majority vote may end early: see :func:`~.statistics.leader_stays`. A weighted one ends early
    only when the branches that are left cannot change it, as each weighs 1 at most.

    Attributes:
        num_branches: branches in all.
        stop_when: posterior probability at which the vote is settled, 0.5 to 1; None waits until
            the rest cannot change it. The branches that still run are then given up.
        weight: None counts each vote as 1; "probability" weighs it by the geometric mean of its
            token probabilities; "score" by the scorer, which must then stay within 0 and 1.
        parallel: branches that run at a time; default all. Fewer at a time lets an early stop save
            more, and uses the hardware less.
    """

    num_branches: int = 16
    stop_when: float | None = 0.95
    weight: Weight | None = None
    parallel: int | None = None

    def __post_init__(self) -> None:
        at_once = self.num_branches if self.parallel is None else self.parallel
        if not 1 <= at_once <= self.num_branches:
            raise InvalidArgument(
                f"self_consistency(num_branches={self.num_branches}, parallel={self.parallel}): "
                "give at least 1 branch, and at most all of them in parallel."
            )
        if self.stop_when is not None and not 0.5 < self.stop_when <= 1:
            raise InvalidArgument(
                f"self_consistency(stop_when={self.stop_when}): it is a probability above 0.5, or "
                "None for no early stop."
            )
        if self.weight not in (None, "probability", "score"):
            raise InvalidArgument(
                f"self_consistency(weight={self.weight!r}): give None, 'probability' or 'score'."
            )

    def decide(self, search: SearchTree) -> Sequence[Action]:
        started, running = len(search.root.children), len(search.running)
        if self.weight == "score":
            waiting = tuple(node.id for node in search.done if node.score is None)
            if waiting:
                return [Score(waiting)]
        votes = self.conclude(search).votes
        left = self.num_branches - started + running
        if settled(votes.values(), left, None if self.weight else self.stop_when):
            return [Finish(self._reason(list(votes.values()), left))]
        free = (self.parallel or self.num_branches) - running
        count = min(free, self.num_branches - started)
        if count:
            last = started + count == self.num_branches
            return [Expand(0, count, to_end=True, keep=not last)]
        return []

    def conclude(self, search: SearchTree) -> Conclusion:
        return conclude_vote(search, self._weigher(search))

    def _reason(self, counts: list[float], left: int) -> str:
        first, second = [*counts, 0, 0][:2]
        if first - second > left:
            return "settled" if left else "all voted"
        return f"settled, p = {leader_stays(int(first), int(second)):.3f}"

    def _weigher(self, search: SearchTree) -> Callable[[SearchNode], float] | None:
        def by_probability(node: SearchNode) -> float:
            return math.exp(min(0.0, search.mean_logprob(node.id)))

        def by_score(node: SearchNode) -> float:
            if node.score is not None and not 0 <= node.score <= 1:
                raise InvalidArgument(
                    f"self_consistency(weight='score'): the scorer gave {node.score:.4g}. A vote "
                    "weighs 0 to 1, so that an early stop is right: give a probability."
                )
            return node.score or 0.0

        if self.weight is None:
            return None
        return by_probability if self.weight == "probability" else by_score


@one_or_many
def self_consistency(
    model: Any,
    tokenizer: Any,
    questions: Sequence[Question],
    *,
    num_branches: int = 16,
    stop_when: float | None = 0.95,
    weight: Weight | None = None,
    parallel: int | None = None,
    score: ScoreLike | None = None,
    **options: Unpack[SearchOptions],
) -> list[SearchResult]:
    """Sample ``num_branches`` answers to each question and return the one with most votes.

    Args:
        questions: one question, or a list of them (all advance together).
        score: judges complete branches when ``weight="score"``.
        **options: see :class:`~.driver.SearchOptions`.

    For the other arguments see :class:`SelfConsistency`.

    Returns:
        A result for one question, a list of results for a list.

    Raises:
        InvalidArgument: an argument that makes no sense; nothing has run.
    """
    if (weight == "score") != (score is not None):
        raise InvalidArgument(
            f"self_consistency(weight={weight!r}, score={score!r}): a scorer and weight='score' "
            "need each other."
        )
    policy = SelfConsistency(num_branches, stop_when, weight, parallel)
    return run_search(model, tokenizer, questions, policy, score=score, **options)
