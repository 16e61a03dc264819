"""Step beam search, and its diverse variant: keep the best partial solutions after every step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Unpack

from ..errors import InvalidArgument
from .policy import (
    Action,
    Conclusion,
    Expand,
    Finish,
    Prune,
    Score,
    SearchNode,
    SearchTree,
    conclude_best,
    conclude_vote,
)
from .result import Question, SearchResult
from .scoring import ScoreLike
from .strategy import SearchOptions, one_or_many, run_search

Aggregate = Literal["last", "min", "mean", "product"]
Select = Literal["best", "vote", "weighted"]


@dataclass(frozen=True, slots=True)
class StepBeam:
    """Beam search over steps, guided by a process reward (Snell et al., "Scaling LLM Test-Time
    Compute Optimally", 2024; Yao et al., 2023, as breadth-first search).

    ``width * expand`` first steps are sampled and scored. After every step the best ``width`` stay,
    and each is continued ``expand`` times, until those that stay are complete. The others are
    pruned, and their blocks are free at once.

    With ``diverse`` it is DVTS, diverse verifier tree search (Beeching, Tunstall and Rush, "Scaling
    Test-Time Compute with Open Models", 2024): ``width`` subtrees that never compete, of which each
    keeps its one best step.

    Attributes:
        width: partial solutions that stay.
        expand: continuations of each.
        max_steps: steps of a solution; None for no bound but that in tokens.
        diverse: keep the best of each subtree instead of the best of all.
        aggregate: the score of a solution from those of its steps.
        select: the result is the best solution, the answer of most of them, or of most weight by
            score (then scores must not be negative).
    """

    width: int = 4
    expand: int = 4
    max_steps: int | None = 40
    diverse: bool = False
    aggregate: Aggregate = "last"
    select: Select = "best"

    def __post_init__(self) -> None:
        steps = 1 if self.max_steps is None else self.max_steps
        if min(self.width, self.expand, steps) < 1 or self.width * self.expand < 2:
            raise InvalidArgument(
                f"step_beam(width={self.width}, expand={self.expand}, max_steps={self.max_steps}): "
                "give at least 1 of each, and 2 candidates a step (width * expand)."
            )
        if self.aggregate not in ("last", "min", "mean", "product"):
            raise InvalidArgument(
                f"step_beam(aggregate={self.aggregate!r}): give 'last', 'min', 'mean' or 'product'."
            )
        if self.select not in ("best", "vote", "weighted"):
            raise InvalidArgument(
                f"step_beam(select={self.select!r}): give 'best', 'vote' or 'weighted'."
            )

    def decide(self, search: SearchTree) -> Sequence[Action]:
        if not search.root.children:
            return [Expand(0, self.width * self.expand)]
        if search.running:
            return []
        standing = [*search.open, *search.done]
        waiting = tuple(node.id for node in standing if node.score is None)
        if waiting:
            return [Score(waiting)]
        kept = {node.id for group in self._groups(search, standing) for node in group}
        going = [node for node in search.open if node.id in kept]
        losers = [Prune(node.id, self._why(node)) for node in search.open if node.id not in kept]
        if not going or going[0].depth == self.max_steps:
            return [*losers, Finish("no step left to take" if not going else "max_steps")]
        return [*losers, *(Expand(node.id, self.expand) for node in going)]

    def conclude(self, search: SearchTree) -> Conclusion:
        if self.select == "best":
            return conclude_best(search, lambda node: self.value(search, node))
        if self.select == "vote":
            return conclude_vote(search)
        return conclude_vote(search, lambda node: max(0.0, self.value(search, node)))

    def value(self, search: SearchTree, node: SearchNode) -> float:
        """The score of a solution up to ``node``; -inf where its last step has none."""
        scores = [step.score for step in search.path(node.id) if step.score is not None]
        if not scores or node.score is None:
            return -math.inf
        if self.aggregate == "last":
            return scores[-1]
        if self.aggregate == "mean":
            return sum(scores) / len(scores)
        return min(scores) if self.aggregate == "min" else math.prod(scores)

    def _groups(self, search: SearchTree, standing: list[SearchNode]) -> list[list[SearchNode]]:
        """Those that stay: the best of all, or the best of each subtree."""
        ranked = sorted(standing, key=lambda node: (-self.value(search, node), node.id))
        if not self.diverse:
            return [ranked[: self.width]]
        place = {child: i // self.expand for i, child in enumerate(search.root.children)}
        subtrees: dict[int, list[SearchNode]] = {}
        for node in ranked:
            subtrees.setdefault(place[search.path(node.id)[0].id], []).append(node)
        return [nodes[:1] for nodes in subtrees.values()]

    def _why(self, node: SearchNode) -> str:
        return f"not among the best, score {node.score:.3g}"


@one_or_many
def step_beam(
    model: Any,
    tokenizer: Any,
    questions: Sequence[Question],
    *,
    score: ScoreLike,
    width: int = 4,
    expand: int = 4,
    max_steps: int | None = 40,
    diverse: bool = False,
    aggregate: Aggregate = "last",
    select: Select = "best",
    **options: Unpack[SearchOptions],
) -> list[SearchResult]:
    """Beam search over steps; with ``diverse=True`` DVTS.

    Args:
        questions: one question, or a list of them (all advance together).
        score: the process reward, of partial and complete solutions: a function of a
            :class:`~.scoring.Candidate`, a :class:`~.scoring.Scorer`, "mean_logprob" or "logprob".
        **options: see :class:`~.driver.SearchOptions`; ``delimiters`` says where a step ends.

    For the other arguments see :class:`StepBeam`.

    Returns:
        A result for one question, a list of results for a list.

    Raises:
        InvalidArgument: an argument that makes no sense; nothing has run.
    """
    policy = StepBeam(width, expand, max_steps, diverse, aggregate, select)
    return run_search(model, tokenizer, questions, policy, score=score, **options)


@one_or_many
def dvts(
    model: Any,
    tokenizer: Any,
    questions: Sequence[Question],
    *,
    score: ScoreLike,
    subtrees: int = 4,
    expand: int = 4,
    max_steps: int | None = 40,
    aggregate: Aggregate = "last",
    select: Select = "weighted",
    **options: Unpack[SearchOptions],
) -> list[SearchResult]:
    """Diverse verifier tree search: ``step_beam(width=subtrees, diverse=True)``.

    The subtrees' answers vote by their score unless ``select`` says otherwise.
    """
    policy = StepBeam(subtrees, expand, max_steps, True, aggregate, select)
    return run_search(model, tokenizer, questions, policy, score=score, **options)
