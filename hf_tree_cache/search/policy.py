"""What a policy sees and what it may ask for: plain data, no tensors, no model.

A search is a tree of steps, one tree a question. With a beam of 2 and 2 proposals each, after
one step and one cut, it reads:

    id  parent  depth  state    step
    0   None    0      closed   ""             the question; its branch went on as node 1
    1   0       1      open     "3 + 4 = 7\\n"  may be expanded: its KV is held
    2   0       1      pruned   "3 - 4\\n"      given up, its blocks are free
    3   0       1      open     "7 * 2 = 14\\n"
    4   0       1      pruned   "4\\n"

A policy is a pure function from such a tree to actions; the driver carries them out, for all
questions together, and calls it again when something has changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

StepState = Literal["running", "open", "closed", "done", "cut", "pruned"]
STEP = "step"


@dataclass(slots=True)
class SearchNode:
    """One step of one branch.

    Attributes:
        id: index in :attr:`SearchTree.nodes`; a child's is higher than its parent's.
        parent: id of the step before, None for the question itself.
        depth: steps from the question.
        kind: what it was expanded as, "step" unless the policy said otherwise.
        aside: begun with a prefix, such as a question about the step before; no part of a solution.
        state: "running" while it generates; "open" when its step is over and it can be expanded;
            "closed" when its children have taken its branch over; "done" when its sequence is
            complete; "cut" when the search ended first; "pruned" when it was given up.
        text: everything generated from the question to the end of this step.
        step: the part of it that this step added.
        num_tokens: tokens that this step generated.
        logprob: sum of their log-probs, in nats.
        reason: why the step ended ("eos", "stop", "delimiter", "length"), or why it was pruned.
        score: what the scorer said, None before.
        answer: found in ``text`` once it is done, equal answers made one; None where none is.
        children: ids of the steps that follow.
    """

    id: int
    parent: int | None
    depth: int
    kind: str = STEP
    aside: bool = False
    state: StepState = "running"
    text: str = ""
    step: str = ""
    num_tokens: int = 0
    logprob: float = 0.0
    reason: str | None = None
    score: float | None = None
    answer: Hashable | None = None
    children: list[int] = field(default_factory=list)


@dataclass(slots=True)
class SearchTree:
    """All steps of the search for one question; node 0 is the question.

    Attributes:
        question: as it was asked.
        nodes: every step so far; read them, the driver changes them.
        notes: room for a policy that must remember more than the nodes say.
    """

    question: Any = None
    nodes: list[SearchNode] = field(
        default_factory=lambda: [SearchNode(0, None, 0, "question", state="open")]
    )
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def root(self) -> SearchNode:
        """The question."""
        return self.nodes[0]

    @property
    def running(self) -> list[SearchNode]:
        """Steps that are being generated, asides too."""
        return [node for node in self.nodes[1:] if node.state == "running"]

    @property
    def open(self) -> list[SearchNode]:
        """Steps that can be expanded; no asides, and not the question."""
        return [node for node in self.nodes[1:] if node.state == "open" and not node.aside]

    @property
    def done(self) -> list[SearchNode]:
        """Ends of complete sequences; no asides."""
        return [node for node in self.nodes[1:] if node.state == "done" and not node.aside]

    def children(self, node: int, kind: str | None = None) -> list[SearchNode]:
        """The steps that follow ``node``, of one kind or of any."""
        found = (self.nodes[child] for child in self.nodes[node].children)
        return [child for child in found if kind is None or child.kind == kind]

    def path(self, node: int) -> list[SearchNode]:
        """The steps from the first to ``node``, without the question."""
        steps = []
        above: int | None = node
        while above is not None and above != 0:
            steps.append(self.nodes[above])
            above = self.nodes[above].parent
        return steps[::-1]

    def num_tokens(self, node: int) -> int:
        """Tokens generated from the question to the end of ``node``."""
        return sum(step.num_tokens for step in self.path(node))

    def logprob(self, node: int) -> float:
        """Sum of their log-probs."""
        return sum(step.logprob for step in self.path(node))

    def mean_logprob(self, node: int) -> float:
        """Mean log-prob of a token; 0 where there is none."""
        count = self.num_tokens(node)
        return self.logprob(node) / count if count else 0.0

    def add(self, parent: int, kind: str = STEP, aside: bool = False) -> SearchNode:
        """A new running step behind ``parent``. For the driver, and for tests of policies."""
        node = SearchNode(len(self.nodes), parent, self.nodes[parent].depth + 1, kind, aside)
        self.nodes.append(node)
        self.nodes[parent].children.append(node.id)
        return node

    def below(self, node: int) -> list[SearchNode]:
        """``node`` and everything that follows it."""
        found, pending = [], [node]
        while pending:
            found.append(self.nodes[pending.pop()])
            pending.extend(reversed(found[-1].children))
        return found


@dataclass(frozen=True, slots=True)
class Expand:
    """Generate ``count`` steps behind an open node. They start at once, together with all others.

    Attributes:
        node: an open node (the question is one at first).
        count: how many; each samples its own tokens.
        kind: names the new nodes, for the policy's own use.
        to_end: go on to the end of the sequence, whatever delimiters come by.
        prefix: text that is put behind the node first, computed but not generated; what follows is
            an aside. A node that is done can be asked too, if it was expanded with ``hold``.
        max_new_tokens: most tokens of this step; default the driver's.
        distinct: the steps begin with different tokens; otherwise each samples freely.
        keep: the node stays open and holds its branch, to be expanded again. Otherwise the first
            new step takes the branch over.
        hold: steps that end the sequence keep their branch, so that they can be expanded with a
            prefix; otherwise their blocks are freed at once.
    """

    node: int
    count: int = 1
    kind: str = STEP
    to_end: bool = False
    prefix: str = ""
    max_new_tokens: int | None = None
    distinct: bool = False
    keep: bool = False
    hold: bool = False


@dataclass(frozen=True, slots=True)
class Score:
    """Have the scorer judge these nodes; their ``score`` is set when the policy is next asked."""

    nodes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Prune:
    """Give up a node and all that follows it. What is done stays done, without its KV."""

    node: int
    reason: str = "pruned"


@dataclass(frozen=True, slots=True)
class Finish:
    """The search for this question is over; what still runs is cut."""

    reason: str = "finished"


Action = Expand | Score | Prune | Finish


@dataclass(frozen=True, slots=True)
class Conclusion:
    """What a search came to.

    Attributes:
        answer: None where no branch has one.
        node: the step whose text best stands for it, None where nothing was generated to an end.
        votes: weight of each answer, best first.
    """

    answer: Hashable | None
    node: int | None
    votes: dict[Hashable, float] = field(default_factory=dict)


@runtime_checkable
class Policy(Protocol):
    """A search strategy: two pure functions of the search so far.

    ``decide`` is asked at the start and whenever steps ended or scores came in. An empty list means
    "wait"; when nothing runs, it ends the search. When a bound ends it, ``decide`` is asked a last
    time, for scores only. ``conclude`` is asked once, at the end, however it came: by the policy,
    by a bound or by Ctrl-C.
    """

    def decide(self, search: SearchTree) -> Sequence[Action]:
        """What to do next."""
        ...

    def conclude(self, search: SearchTree) -> Conclusion:
        """What has been found."""
        ...


def tally(
    nodes: Iterable[SearchNode], weight: Callable[[SearchNode], float] | None = None
) -> dict[Hashable, float]:
    """Votes for each answer, most first; of equals the first seen is first. None does not vote.

    Args:
        weight: of a node's vote, default 1.
    """
    votes: dict[Hashable, float] = {}
    for node in nodes:
        if node.answer is not None:
            votes[node.answer] = votes.get(node.answer, 0.0) + (weight(node) if weight else 1.0)
    return dict(sorted(votes.items(), key=lambda item: -item[1]))


def best(nodes: Iterable[SearchNode], key: Callable[[SearchNode], float]) -> SearchNode | None:
    """The node of the highest key, the earliest of equals; None where there is none."""
    return max(nodes, key=key, default=None)


def score_of(node: SearchNode) -> float:
    """The score of a node; below every other where it has none."""
    return -math.inf if node.score is None else node.score


def conclude_best(search: SearchTree, key: Callable[[SearchNode], float] = score_of) -> Conclusion:
    """The complete sequence of the highest key, those with an answer before those without."""
    done = search.done
    chosen = best([node for node in done if node.answer is not None] or done, key)
    if chosen is None:
        return Conclusion(None, None)
    return Conclusion(chosen.answer, chosen.id, tally(done))


def conclude_vote(
    search: SearchTree, weight: Callable[[SearchNode], float] | None = None
) -> Conclusion:
    """The answer with the most votes, and the likeliest of the sequences that gave it."""
    done = search.done
    votes = tally(done, weight)
    winner = next(iter(votes), None)
    backers = [node for node in done if winner is None or node.answer == winner]
    chosen = best(backers, lambda node: search.mean_logprob(node.id))
    return Conclusion(winner, chosen.id if chosen else None, votes)
