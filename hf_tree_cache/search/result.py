"""SearchResult: what a search found and what it cost."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any, Literal

from ..generation.record import GenerationTree
from .policy import Conclusion, SearchTree

Question = str | Sequence[int] | Sequence[Mapping[str, Any]]
"""A text, token ids or chat messages."""

EndedBy = Literal["policy", "tokens", "branches", "seconds", "blocks", "interrupted"]


@dataclass(slots=True)
class SearchCost:
    """What one call cost, all its questions together.

    Attributes:
        prompt_tokens: tokens of the prompts.
        tokens_generated: tokens drawn, each shared one once.
        tokens_computed: tokens that went through the model, prompts and prefixes included. What
            several branches share, and what is held and taken up again, counts once. On a GPU
            a branch's last token may be among them, computed before the branch was seen to end.
        forwards: calls of the model.
        candidates_scored: branches that the scorer judged.
        kv_bytes_peak: most bytes of K/V in use at a time.
        seconds: wall time.
    """

    prompt_tokens: int = 0
    tokens_generated: int = 0
    tokens_computed: int = 0
    forwards: int = 0
    candidates_scored: int = 0
    kv_bytes_peak: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Solution:
    """One complete sequence.

    Attributes:
        text: what was generated.
        answer: found in it; None where there is none.
        score: the scorer's; None where it was not asked.
        mean_logprob: of a token, in nats.
        num_tokens: how many it has.
        reason: why it ended: "eos", "stop" or "length".
        leaf: its node in :attr:`SearchResult.tree`.
    """

    text: str
    answer: Hashable | None
    score: float | None
    mean_logprob: float
    num_tokens: int
    reason: str | None
    leaf: int


@dataclass(slots=True)
class SearchResult:
    """What the search for one question found.

    Attributes:
        question: as it was asked.
        answer: None where no branch has one.
        text: the sequence that best stands for it; empty where none is complete.
        votes: weight of each answer, most first.
        score: of ``text``; None where the scorer was not asked.
        solutions: every complete sequence, in the order in which their last steps began.
        tree: everything that was generated for this question.
        leaf: the node of ``tree`` where ``text`` ends; None where none is complete.
        ended_by: "policy", the bound that was met ("tokens", "branches", "seconds", "blocks"), or
            "interrupted"; "branches" also where the policy came to an end after some were refused.
        reason: the policy's own words.
        tokens_generated: for this question; a token that branches share counts once.
        branches: started for this question.
        cost: of the whole call, with all its questions.
        search: the steps, as the policy saw them.
    """

    question: Any
    answer: Hashable | None
    text: str
    votes: dict[Hashable, float]
    score: float | None
    solutions: list[Solution]
    tree: GenerationTree
    leaf: int | None
    ended_by: EndedBy
    reason: str
    tokens_generated: int
    branches: int
    cost: SearchCost
    search: SearchTree = field(repr=False)

    @property
    def tokens_computed(self) -> int:
        """Tokens that went through the model, of the whole call."""
        return self.cost.tokens_computed

    @property
    def kv_bytes_peak(self) -> int:
        """Most bytes of K/V in use at a time, of the whole call."""
        return self.cost.kv_bytes_peak

    @property
    def seconds(self) -> float:
        """Wall time of the whole call."""
        return self.cost.seconds

    def summary(self) -> list[tuple[str, str]]:
        """What a reader wants to know first, as names and values."""
        votes = ", ".join(f"{a} × {w:.4g}" for a, w in list(self.votes.items())[:5])
        more = len(self.votes) - 5
        ended = self.reason if self.ended_by == "policy" else f"bound on {self.ended_by}"
        cost = self.cost
        return [
            ("answer", "none found" if self.answer is None else str(self.answer)),
            ("votes", f"{votes}, {more} more" if more > 0 else votes or "none"),
            ("score", "–" if self.score is None else f"{self.score:.4g}"),
            ("branches", f"{len(self.solutions)} complete of {self.branches}"),
            ("ended", "interrupted" if self.ended_by == "interrupted" else ended),
            ("tokens", f"{self.tokens_generated:,} generated, {cost.tokens_computed:,} computed"),
            ("K/V peak", f"{cost.kv_bytes_peak / 1e6:,.1f} MB"),
            ("seconds", f"{cost.seconds:.2f}"),
        ]

    def __repr__(self) -> str:
        return f"SearchResult({'; '.join(f'{name}: {value}' for name, value in self.summary())})"

    def _repr_html_(self) -> str:
        rows = "".join(
            f'<tr><th style="text-align:left">{escape(name)}</th>'
            f'<td style="text-align:left">{escape(value)}</td></tr>'
            for name, value in self.summary()
        )
        return f"<div><table>{rows}</table>{self.tree.to_html()}</div>"


def make_result(
    search: SearchTree,
    found: Conclusion,
    tree: GenerationTree,
    leaves: Mapping[int, int],
    *,
    ended_by: EndedBy,
    reason: str,
    tokens_generated: int,
    branches: int,
    cost: SearchCost,
) -> SearchResult:
    """Gather a result.

    Args:
        leaves: for every node of ``search`` that is done, its leaf in ``tree``.
    """
    solutions = [
        Solution(
            text=node.text,
            answer=node.answer,
            score=node.score,
            mean_logprob=search.mean_logprob(node.id),
            num_tokens=search.num_tokens(node.id),
            reason=node.reason,
            leaf=leaves[node.id],
        )
        for node in search.done
    ]
    chosen = None if found.node is None else search.nodes[found.node]
    return SearchResult(
        question=search.question,
        answer=found.answer,
        text="" if chosen is None else chosen.text,
        votes=found.votes,
        score=None if chosen is None else chosen.score,
        solutions=solutions,
        tree=tree,
        leaf=None if chosen is None else leaves.get(chosen.id),
        ended_by=ended_by,
        reason=reason,
        tokens_generated=tokens_generated,
        branches=branches,
        cost=cost,
        search=search,
    )
