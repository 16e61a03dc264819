"""GenerationNode: a run of tokens of a :class:`~.record.GenerationTree`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

NodeState = Literal["alive", "forked", "finished", "pruned"]
STATES = frozenset(get_args(NodeState))


@dataclass(slots=True)
class GenerationNode:
    """A run of tokens shared by one set of branches.

    Attributes:
        id: Index of the node in `GenerationTree.nodes`.
        parent: Id of the node that holds the tokens before this one's, None for a root.
        prompt: Index of the prompt that the node descends from.
        tokens: Token ids.
        logprobs: Log-prob of each token when it was chosen; empty for a prompt node.
        state: "alive" while it grows, "forked" once other nodes continue it, else how it ended.
        reason: Why it was forked, finished or pruned.
        start: Position of its first token in the sequence, prompt included.
        children: Ids of the nodes that continue it, the continuing branch first.
    """

    id: int
    parent: int | None
    prompt: int
    tokens: list[int]
    logprobs: list[float]
    state: NodeState
    reason: str | None
    start: int
    children: list[int] = field(default_factory=list)

    @property
    def end(self) -> int:
        """Position after its last token."""
        return self.start + len(self.tokens)

    @property
    def is_prompt(self) -> bool:
        """Whether its tokens were given, not generated."""
        return self.parent is None or len(self.tokens) > len(self.logprobs)
