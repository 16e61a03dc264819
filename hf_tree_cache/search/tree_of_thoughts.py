"""Tree of thoughts: propose steps, value them, keep the best b; breadth first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Unpack

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
)
from .result import Question, SearchResult
from .scoring import ScoreLike
from .strategy import SearchOptions, one_or_many, run_search

VALUE = "value"
VERDICTS: Mapping[str, float] = {"sure": 20.0, "likely": 1.0, "impossible": 0.001}
"""Words that the model values a state with, and what they are worth (Yao et al., appendix)."""


@dataclass(frozen=True, slots=True)
class TreeOfThoughts:
    """Breadth-first tree of thoughts (Yao et al., "Tree of Thoughts: Deliberate Problem Solving
    with Large Language Models", NeurIPS 2023): propose, value, keep b.

    States are valued by a scorer, or by the model itself: with ``value_prompt`` a held branch is
    forked, the prompt is put behind it and the model's verdict is read off what it writes. Only the
    prompt and the verdict are computed; the state's K/V are those of the branch.

    Attributes:
        propose: thoughts sampled behind each state.
        keep: states that stay, b.
        max_steps: thoughts of a solution, T.
        value_prompt: asks the model to value what stands before it; None values by scorer.
        value_samples: verdicts of a state, added up.
        value_tokens: most tokens of a verdict.
        verdicts: worth of the words that may stand in a verdict; the last one in it counts.
    """

    propose: int = 5
    keep: int = 5
    max_steps: int = 4
    value_prompt: str | None = None
    value_samples: int = 3
    value_tokens: int = 8
    verdicts: Mapping[str, float] = field(default_factory=lambda: dict(VERDICTS))

    def __post_init__(self) -> None:
        counts = (self.propose, self.keep, self.max_steps, self.value_samples, self.value_tokens)
        if min(counts) < 1:
            raise InvalidArgument(
                f"tree_of_thoughts(propose={self.propose}, keep={self.keep}, max_steps="
                f"{self.max_steps}, value_samples={self.value_samples}, value_tokens="
                f"{self.value_tokens}): give at least 1 of each."
            )
        if self.value_prompt is not None and not (self.value_prompt and self.verdicts):
            raise InvalidArgument(
                "tree_of_thoughts(value_prompt=..., verdicts=...): both must hold something."
            )

    def decide(self, search: SearchTree) -> Sequence[Action]:
        if search.running:
            return []
        if not search.root.children:
            return [self._proposals(0)]
        states = search.open + search.done
        waiting = [node for node in states if self.worth(search, node) is None]
        if waiting and self.value_prompt is None:
            return [Score(tuple(node.id for node in waiting))]
        if waiting:
            return [self._question(node) for node in waiting]
        ranked = sorted(states, key=lambda node: (-(self.worth(search, node) or 0.0), node.id))
        kept = {node.id for node in ranked[: self.keep]}
        losers = [Prune(n.id, self._why(search, n)) for n in search.open if n.id not in kept]
        going = [node for node in search.open if node.id in kept]
        if not going or going[0].depth >= self.max_steps:
            return [*losers, Finish("max_steps" if going else "no thought left to follow")]
        return [*losers, *(self._proposals(node.id) for node in going)]

    def conclude(self, search: SearchTree) -> Conclusion:
        return conclude_best(search, lambda node: self.worth(search, node) or 0.0)

    def worth(self, search: SearchTree, node: SearchNode) -> float | None:
        """The value of a state; None before it is known."""
        if self.value_prompt is None:
            return node.score
        replies = search.children(node.id, VALUE)
        return sum(self._verdict(reply.step) for reply in replies) if replies else None

    def _verdict(self, reply: str) -> float:
        places = {word: reply.casefold().rfind(word.casefold()) for word in self.verdicts}
        last = max(places, key=lambda word: places[word])
        return self.verdicts[last] if places[last] >= 0 else 0.0

    def _proposals(self, node: int) -> Expand:
        return Expand(node, self.propose, hold=self.value_prompt is not None)

    def _question(self, node: SearchNode) -> Expand:
        return Expand(
            node.id,
            self.value_samples,
            kind=VALUE,
            prefix=self.value_prompt or "",
            max_new_tokens=self.value_tokens,
            keep=True,
        )

    def _why(self, search: SearchTree, node: SearchNode) -> str:
        return f"not among the best {self.keep}, worth {self.worth(search, node):.3g}"


@one_or_many
def tree_of_thoughts(
    model: Any,
    tokenizer: Any,
    questions: Sequence[Question],
    *,
    score: ScoreLike | None = None,
    propose: int = 5,
    keep: int = 5,
    max_steps: int = 4,
    value_prompt: str | None = None,
    value_samples: int = 3,
    value_tokens: int = 8,
    verdicts: Mapping[str, float] = VERDICTS,
    **options: Unpack[SearchOptions],
) -> list[SearchResult]:
    """Breadth-first tree of thoughts: propose, value, keep b.

    Args:
        questions: one question, or a list of them (all advance together).
        score: values a state: a function of a :class:`~.scoring.Candidate`, a
            :class:`~.scoring.Scorer`, "mean_logprob" or "logprob". Give this or ``value_prompt``.
        **options: see :class:`~.driver.SearchOptions`; ``delimiters`` says where a thought ends.

    For the other arguments see :class:`TreeOfThoughts`.

    Returns:
        A result for one question, a list of results for a list.

    Raises:
        InvalidArgument: an argument that makes no sense; nothing has run.
    """
    if (score is None) == (value_prompt is None):
        raise InvalidArgument(
            "tree_of_thoughts: give score=, which values a state, or value_prompt=, which asks the "
            "model; one of the two."
        )
    policy = TreeOfThoughts(
        propose, keep, max_steps, value_prompt, value_samples, value_tokens, verdicts
    )
    return run_search(model, tokenizer, questions, policy, score=score, **options)
