"""Monte Carlo tree search over steps, with every leaf held so that the search can go back to it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Unpack

from ..errors import InvalidArgument
from .policy import (
    STEP,
    Action,
    Conclusion,
    Expand,
    Finish,
    Score,
    SearchNode,
    SearchTree,
    conclude_best,
    conclude_vote,
    score_of,
)
from .result import Question, SearchResult
from .scoring import ScoreLike
from .strategy import SearchOptions, one_or_many, run_search

Value = Literal["score", "rollout"]
Prior = Literal["uniform", "logprob"]
Select = Literal["best", "vote", "weighted"]
ROLLOUT = "rollout"


@dataclass(slots=True)
class Visits:
    """Visit counts and value sums of every node, from what was evaluated below it.

    Attributes:
        count, value: by node id; values are scaled to 0..1 by the lowest and highest so far, as in
            MuZero (Schrittwieser et al., 2020), so that ``c_puct`` means the same for any scorer.
    """

    count: list[int]
    value: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, search: SearchTree) -> Visits:
        """Back up every score to the root; children stand behind their parents in the list."""
        scores = [node.score for node in search.nodes if node.score is not None]
        low, high = min(scores, default=0.0), max(scores, default=0.0)
        visits = cls([0] * len(search.nodes), [0.0] * len(search.nodes))
        for node in reversed(search.nodes):
            if node.score is not None:
                visits.count[node.id] += 1
                visits.value[node.id] += (node.score - low) / (high - low) if high > low else 0.5
            if node.parent is not None:
                visits.count[node.parent] += visits.count[node.id]
                visits.value[node.parent] += visits.value[node.id]
        return visits

    def mean(self, node: int) -> float:
        """Q; 0 before the first visit."""
        return self.value[node] / self.count[node] if self.count[node] else 0.0


@dataclass(frozen=True, slots=True)
class MCTS:
    """PUCT (Silver et al., "Mastering the Game of Go without Human Knowledge", 2017) over steps.

    A simulation walks from the question to a leaf, taking the child of highest
    ``Q + c_puct * P * sqrt(N_parent) / (1 + N_child)``, expands the leaf into ``children`` sampled
    steps, evaluates them and backs the values up. Subtrees with nothing left to expand are passed
    over. Visit counts and values are read off the scores in the tree: the policy has no state.

    Attributes:
        simulations: leaves to expand.
        children: sampled steps of an expansion.
        c_puct: weight of exploration; values are scaled to 0..1.
        value: "score" scores the new steps themselves; "rollout" goes on from each to an end, and
            scores that. Ends of rollouts count as solutions.
        prior: P of siblings, "uniform" or the softmax of their mean log-probs.
        parallel: leaves expanded together; each that is chosen counts as a visit without value
            while the next is chosen (virtual loss; Chaslot et al., 2008).
        max_steps: depth of a solution.
        good_enough: stop at the first solution with this score; None goes on.
        select: the result is the best solution, the answer of most of them, or of most weight by
            score.
    """

    simulations: int = 16
    children: int = 4
    c_puct: float = 1.25
    value: Value = "score"
    prior: Prior = "uniform"
    parallel: int = 1
    max_steps: int = 40
    good_enough: float | None = None
    select: Select = "best"

    def __post_init__(self) -> None:
        if min(self.simulations, self.children, self.parallel, self.max_steps) < 1:
            raise InvalidArgument(
                f"mcts(simulations={self.simulations}, children={self.children}, "
                f"parallel={self.parallel}, max_steps={self.max_steps}): give at least 1 of each."
            )
        if not self.c_puct >= 0:
            raise InvalidArgument(f"mcts(c_puct={self.c_puct}): give 0 or more.")
        for name, known in (
            ("value", ("score", "rollout")),
            ("prior", ("uniform", "logprob")),
            ("select", ("best", "vote", "weighted")),
        ):
            if getattr(self, name) not in known:
                raise InvalidArgument(
                    f"mcts({name}={getattr(self, name)!r}): known are {', '.join(known)}."
                )

    def decide(self, search: SearchTree) -> Sequence[Action]:
        if search.running:
            return []
        evaluate = self._evaluate(search)
        if evaluate:
            return evaluate
        if self.good_enough is not None:
            top = max(map(score_of, search.done), default=-math.inf)
            if top >= self.good_enough:
                return [Finish(f"score {top:.3g} is good enough")]
        left = self.simulations - sum(bool(search.children(n.id, STEP)) for n in search.nodes)
        leaves = self.choose(search, min(left, self.parallel))
        if not leaves:
            return [Finish("all simulations done" if left <= 0 else "nothing left to expand")]
        return [Expand(leaf, self.children) for leaf in leaves]

    def conclude(self, search: SearchTree) -> Conclusion:
        if self.select == "best":
            return conclude_best(search)
        weight = None if self.select == "vote" else lambda node: max(0.0, score_of(node))
        return conclude_vote(search, weight)

    def choose(self, search: SearchTree, count: int) -> list[int]:
        """Up to ``count`` leaves to expand, by PUCT."""
        visits = Visits.of(search)
        chosen: list[int] = []
        while len(chosen) < count:
            alive = self._alive(search, chosen)
            if not alive[0]:
                break
            node = search.root
            path = [0]
            while steps := [s for s in search.children(node.id, STEP) if alive[s.id]]:
                node = self._best_child(search, visits, node, steps)
                path.append(node.id)
            chosen.append(node.id)
            for visited in path:
                visits.count[visited] += 1
        return chosen

    def _evaluate(self, search: SearchTree) -> list[Action]:
        """What is missing before values can be backed up."""
        actions: list[Action] = []
        judged = search.done
        if self.value == "rollout":
            starts = [n for n in search.open if n.kind == STEP and not search.children(n.id)]
            actions += [Expand(n.id, kind=ROLLOUT, to_end=True, keep=True) for n in starts]
        else:
            judged = search.open + judged
        waiting = tuple(node.id for node in judged if node.score is None)
        return [*actions, Score(waiting)] if waiting else actions

    def _alive(self, search: SearchTree, chosen: list[int]) -> list[bool]:
        """Of each node, whether something at or below it can still be expanded."""
        alive = [False] * len(search.nodes)
        for node in reversed(search.nodes):
            is_leaf = node.state == "open" and not search.children(node.id, STEP)
            if is_leaf and node.depth < self.max_steps and node.id not in chosen:
                alive[node.id] = True
            if node.parent is not None and node.kind == STEP:
                alive[node.parent] |= alive[node.id]
        return alive

    def _best_child(
        self, search: SearchTree, visits: Visits, parent: SearchNode, steps: list[SearchNode]
    ) -> SearchNode:
        priors = self._priors(search, search.children(parent.id, STEP))
        total = math.sqrt(visits.count[parent.id])

        def puct(step: SearchNode) -> float:
            explore = self.c_puct * priors[step.id] * total / (1 + visits.count[step.id])
            return visits.mean(step.id) + explore

        return max(steps, key=puct)

    def _priors(self, search: SearchTree, siblings: list[SearchNode]) -> dict[int, float]:
        if self.prior == "uniform":
            return {node.id: 1 / len(siblings) for node in siblings}
        means = [node.logprob / max(1, node.num_tokens) for node in siblings]
        weights = [math.exp(mean - max(means)) for mean in means]
        return {node.id: w / sum(weights) for node, w in zip(siblings, weights, strict=True)}


@one_or_many
def mcts(
    model: Any,
    tokenizer: Any,
    questions: Sequence[Question],
    *,
    score: ScoreLike,
    simulations: int = 16,
    children: int = 4,
    c_puct: float = 1.25,
    value: Value = "score",
    prior: Prior = "uniform",
    parallel: int = 1,
    max_steps: int = 40,
    good_enough: float | None = None,
    select: Select = "best",
    **options: Unpack[SearchOptions],
) -> list[SearchResult]:
    """Monte Carlo tree search over steps, guided by PUCT.

    Args:
        questions: one question, or a list of them (all advance together).
        score: judges steps (``value="score"``) or only solutions (``value="rollout"``): a function
            of a :class:`~.scoring.Candidate`, a :class:`~.scoring.Scorer`, "mean_logprob" or
            "logprob".
        **options: see :class:`~.driver.SearchOptions`; ``delimiters`` says where a step ends.

    For the other arguments see :class:`MCTS`.

    Returns:
        A result for one question, a list of results for a list.

    Raises:
        InvalidArgument: an argument that makes no sense; nothing has run.
    """
    policy = MCTS(
        simulations, children, c_puct, value, prior, parallel, max_steps, good_enough, select
    )
    return run_search(model, tokenizer, questions, policy, score=score, **options)
