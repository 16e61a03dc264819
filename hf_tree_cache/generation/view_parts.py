"""What views of a `GenerationTree` share: which nodes they show, and their tokens as text.

Trees are walked with explicit stacks (a chain may be thousands of nodes deep), and a bounded part
of them is shown: the nodes nearest to the roots, with a line where others are left out.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from hf_tree_cache.generation.node import GenerationNode
    from hf_tree_cache.generation.record import GenerationTree

MARKERS = {"alive": "●", "finished": "✓", "pruned": "✗", "forked": "┬"}

# Tokens in front of a piece that is decoded: tokenizers drop a leading space at the start of a
# text, and a character may be spread over several tokens.
CONTEXT = 4
_LONGEST_CHARACTER = 8
JOINERS = "\u200c\u200d"


class Decoder(Protocol):
    """What the views need of a tokenizer."""

    def decode(self, token_ids: list[int], /) -> Any:
        """Return the text of token ids."""


@dataclass(frozen=True, slots=True)
class Selection:
    """The part of a tree that a view shows.

    Attributes:
        shown: Ids of the nodes to draw; a node's parent is always among them.
        hidden: How many nodes are left out below each drawn node, where any are.
        hidden_prompts: Prompts that are left out whole.
        num_hidden: All nodes that are left out.
    """

    shown: set[int]
    hidden: dict[int, int]
    hidden_prompts: int
    num_hidden: int

    def children(self, node: GenerationNode) -> list[int]:
        """The children of a node that are drawn."""
        return [child for child in node.children if child in self.shown]


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of tokens that decodes to whole characters, mostly one token."""

    text: str
    start: int
    stop: int


def select_nodes(tree: GenerationTree, max_nodes: int) -> Selection:
    """Choose the `max_nodes` nodes nearest to the roots."""
    roots = tree.roots
    shown: set[int] = set(roots[:max_nodes])
    pending = deque(roots[:max_nodes])
    while pending:
        for child in tree.nodes[pending.popleft()].children[: max_nodes - len(shown)]:
            shown.add(child)
            pending.append(child)
    hidden: dict[int, int] = {}
    if len(shown) < len(tree.nodes):
        below = [0] * len(tree.nodes)
        for i in reversed(list(tree.walk())):
            parent = tree.nodes[i].parent
            if i not in shown and parent is not None:
                below[parent] += below[i] + 1
        hidden = {i: below[i] for i in shown if below[i]}
    return Selection(shown, hidden, max(0, len(roots) - max_nodes), len(tree.nodes) - len(shown))


def state_counts(nodes: Iterable[GenerationNode]) -> dict[str, int]:
    counts = {"alive": 0, "finished": 0, "pruned": 0}
    for node in nodes:
        if node.state != "forked":
            counts[node.state] += 1
    return counts


def number_of(number: int, noun: str) -> str:
    plural = "es" if noun.endswith("ch") else "s"
    return f"{number:,} {noun}{'' if number == 1 else plural}"


def mean_logprob(logprobs: Sequence[float]) -> float:
    return sum(logprobs) / len(logprobs) if logprobs else math.nan


def visible_text(text: str) -> str:
    """Replace what would break a line or steer a terminal by something that can be read."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(map(_visible_char, text))


def _visible_char(char: str) -> str:
    if char in "\n\r":
        return "⏎"
    if char == "\t":
        return "⇥"
    if char.isspace():
        return " "
    if char.isprintable() or char in JOINERS:
        return char
    return char.encode("unicode_escape").decode("ascii")


def _decode(tokenizer: Decoder | None, ids: Sequence[int]) -> str:
    if tokenizer is None:
        return "".join(f" {token}" for token in ids)
    return str(tokenizer.decode(list(ids)))


def decode_after(tokenizer: Decoder | None, context: Sequence[int], ids: Sequence[int]) -> str:
    """The text of `ids` where they stand behind `context`."""
    before = _decode(tokenizer, context)
    whole = _decode(tokenizer, [*context, *ids])
    return whole[len(before) :] if whole.startswith(before) else _decode(tokenizer, ids)


def pieces_of(
    tokenizer: Decoder | None, context: Sequence[int], ids: Sequence[int]
) -> Iterator[Piece]:
    """Split the text of `ids` at token boundaries that are character boundaries too."""
    done = 0
    for stop in range(1, len(ids) + 1):
        text = decode_after(tokenizer, context, ids[done:stop])
        if text.endswith("\ufffd") and stop < len(ids) and stop - done < _LONGEST_CHARACTER:
            continue
        yield Piece(text, done, stop)
        context = ids[done:stop]
        done = stop


def context_of(tree: GenerationTree, node: GenerationNode) -> list[int]:
    """The last tokens before a node."""
    tokens: list[int] = []
    while node.parent is not None and len(tokens) < CONTEXT:
        node = tree.nodes[node.parent]
        tokens = node.tokens[-CONTEXT:] + tokens
    return tokens[-CONTEXT:]
