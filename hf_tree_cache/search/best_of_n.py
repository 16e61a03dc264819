"""Best of N: sample many complete answers and keep the one that a scorer likes best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Unpack

from ..errors import InvalidArgument
from .policy import Action, Conclusion, Expand, Finish, Score, SearchTree, conclude_best, score_of
from .result import Question, SearchResult
from .scoring import ScoreLike
from .strategy import SearchOptions, one_or_many, run_search


@dataclass(frozen=True, slots=True)
class BestOfN:
    """Rejection sampling against a verifier (Cobbe et al., "Training Verifiers to Solve Math Word
    Problems", 2021; the name after Stiennon et al., 2020).

    Attributes:
        num_branches: N.
        good_enough: stop at the first branch with this score; None waits for all.
    """

    num_branches: int = 16
    good_enough: float | None = None

    def __post_init__(self) -> None:
        if self.num_branches < 1:
            raise InvalidArgument(f"best_of_n(num_branches={self.num_branches}): give at least 1.")

    def decide(self, search: SearchTree) -> Sequence[Action]:
        if not search.root.children:
            return [Expand(0, self.num_branches, to_end=True)]
        if search.running and self.good_enough is None:
            return []
        waiting = tuple(node.id for node in search.done if node.score is None)
        if waiting:
            return [Score(waiting)]
        if self.good_enough is not None:
            for node in search.done:
                if score_of(node) >= self.good_enough:
                    return [Finish(f"score {node.score:.3g} is good enough")]
        return []

    def conclude(self, search: SearchTree) -> Conclusion:
        return conclude_best(search)


@one_or_many
def best_of_n(
    model: Any,
    tokenizer: Any,
    questions: Sequence[Question],
    *,
    num_branches: int = 16,
    score: ScoreLike = "mean_logprob",
    good_enough: float | None = None,
    **options: Unpack[SearchOptions],
) -> list[SearchResult]:
    """Sample ``num_branches`` answers to each question and return the best one.

    Args:
        questions: one question, or a list of them (all advance together).
        score: "mean_logprob", "logprob", a function of a :class:`~.scoring.Candidate`, or a
            :class:`~.scoring.Scorer` such as :class:`~.scoring.RewardModel`.
        **options: see :class:`~.driver.SearchOptions`.

    For the other arguments see :class:`BestOfN`.

    Returns:
        A result for one question, a list of results for a list.

    Raises:
        InvalidArgument: an argument that makes no sense; nothing has run.
    """
    policy = BestOfN(num_branches, good_enough)
    return run_search(model, tokenizer, questions, policy, score=score, **options)
