"""Algorithms of treequest (optional extra) as policies over held branches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Unpack

from ..errors import InvalidArgument
from .policy import Action, Conclusion, Expand, Finish, Score, SearchTree, conclude_best
from .result import Question, SearchResult
from .scoring import ScoreLike
from .strategy import SearchOptions, one_or_many, run_search

_ACTION = "step"


@dataclass(frozen=True, slots=True)
class AskTell:
    """Any ask/tell algorithm of treequest (Sakana AI; AB-MCTS is of Inoue et al., "Wider or Deeper?
    Scaling LLM Inference-Time Compute with Adaptive Branching Tree Search", 2025).

    What the algorithm calls the state of a node is the id of a step here. Every step keeps its
    branch, since such algorithms come back to any node. A complete solution that the algorithm
    wants to expand counts as its own continuation. treequest wants scores between 0 and 1.

    Attributes:
        algorithm: such as ``treequest.StandardMCTS()`` or ``treequest.ABMCTSA()``.
        trials: expansions in all.
        parallel: asked for together.
    """

    algorithm: Any
    trials: int = 32
    parallel: int = 1

    def __post_init__(self) -> None:
        missing = [x for x in ("init_tree", "ask_batch", "tell") if not hasattr(self.algorithm, x)]
        if missing or min(self.trials, self.parallel) < 1:
            raise InvalidArgument(
                f"treequest_search(algorithm={type(self.algorithm).__name__}, trials={self.trials},"
                f" parallel={self.parallel}): give an algorithm of treequest (missing here: "
                f"{', '.join(missing) or 'nothing'}) and at least 1 trial."
            )

    def decide(self, search: SearchTree) -> Sequence[Action]:
        if search.running:
            return []
        steps = search.open + search.done
        waiting = tuple(node.id for node in steps if node.score is None)
        if waiting:
            return [Score(waiting)]
        notes = search.notes
        state = notes.setdefault("state", self.algorithm.init_tree())
        asked: list[Any] = notes.pop("asked", [])
        new = [node for node in search.nodes[1:] if node.id > notes.get("told", 0)]
        for trial, node in zip(asked, new, strict=False):
            state = self._tell(state, trial.trial_id, node.id, node.score)
        notes["told"] = search.nodes[-1].id
        actions: list[Action] = []
        while not actions:
            left = self.trials - notes.get("trials", 0)
            if left < 1:
                return [Finish("all trials done")]
            state, trials = self.algorithm.ask_batch(state, min(left, self.parallel), [_ACTION])
            notes["trials"] = notes.get("trials", 0) + len(trials)
            for trial in trials:
                node = search.nodes[trial.parent_state or 0]
                if node.state == "done":
                    state = self._tell(state, trial.trial_id, node.id, node.score)
                else:
                    notes.setdefault("asked", []).append(trial)
                    actions.append(Expand(node.id, keep=True))
        notes["state"] = state
        return actions

    def conclude(self, search: SearchTree) -> Conclusion:
        return conclude_best(search)

    def _tell(self, state: Any, trial_id: str, node: int, score: float | None) -> Any:
        if score is None or not 0 <= score <= 1:
            raise InvalidArgument(
                f"treequest_search: the scorer gave {score}, and treequest wants 0 to 1."
            )
        return self.algorithm.tell(state, trial_id, (node, score))


@one_or_many
def treequest_search(
    model: Any,
    tokenizer: Any,
    questions: Sequence[Question],
    *,
    algorithm: Any,
    score: ScoreLike,
    trials: int = 32,
    parallel: int = 1,
    **options: Unpack[SearchOptions],
) -> list[SearchResult]:
    """Search with an algorithm of treequest (``pip install hf_tree_cache[treequest]``).

    Args:
        questions: one question, or a list of them (all advance together).
        algorithm: such as ``treequest.StandardMCTS()``.
        score: judges steps, 0 to 1: a function of a :class:`~.scoring.Candidate` or a
            :class:`~.scoring.Scorer`.
        **options: see :class:`~.driver.SearchOptions`; ``delimiters`` says where a step ends.

    For the other arguments see :class:`AskTell`.

    Returns:
        A result for one question, a list of results for a list.

    Raises:
        InvalidArgument: an argument that makes no sense, or a score outside of 0 to 1.
    """
    policy = AskTell(algorithm, trials, parallel)
    return run_search(model, tokenizer, questions, policy, score=score, **options)
