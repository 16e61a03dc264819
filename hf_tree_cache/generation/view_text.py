"""Draw a `GenerationTree` as text for a terminal.

A node with an only child is followed by that child at the same indentation.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from hf_tree_cache.errors import InvalidArgument

from .view_parts import (
    CONTEXT,
    JOINERS,
    MARKERS,
    Decoder,
    Selection,
    context_of,
    decode_after,
    mean_logprob,
    number_of,
    select_nodes,
    state_counts,
    visible_text,
)

if TYPE_CHECKING:
    from hf_tree_cache.generation.node import GenerationNode
    from hf_tree_cache.generation.record import GenerationTree


def render_text(
    tree: GenerationTree,
    tokenizer: Decoder | None = None,
    max_width: int = 100,
    max_nodes: int = 200,
    labels: Mapping[int, str] | None = None,
) -> str:
    """Draw a tree with lines for a terminal.

    A row holds the node's state (◆ prompt, ┬ forked, ● alive, ✓ finished, ✗ pruned), its text,
    how many tokens it has, their mean log-prob and the reason of its state.

    Args:
        tree: What to draw.
        tokenizer: Decodes the tokens; without one their ids are shown.
        max_width: Columns of a row, at least 40.
        max_nodes: Nodes to draw, those nearest to the roots; the rest is counted.
        labels: Names of nodes, by id, in front of their reasons.

    Returns:
        Lines joined by newlines.
    """
    if max_width < 40 or max_nodes < 1:
        raise InvalidArgument(
            f"render_text(max_width={max_width}, max_nodes={max_nodes}): a row needs 40 columns "
            "and a tree one node. Pass max_width >= 40 and max_nodes >= 1."
        )
    selection = select_nodes(tree, max_nodes)
    labels = labels or {}
    facts = {i: _facts(tree.nodes[i], max_width // 5, labels.get(i, "")) for i in selection.shown}
    room = max_width - 2 - max((len(fact) for fact in facts.values()), default=0)
    rows: list[tuple[str, str]] = []
    # However deep a node hangs, ten columns of its text stay.
    for lead, i in _text_rows(tree, selection, min(max_width // 2, room - 10)):
        if i is None:
            rows.append((lead, ""))
        else:
            text = _text_of(tree, tree.nodes[i], tokenizer, room - len(lead))
            rows.append((lead + text, facts[i]))
    column = max((_columns(left) for left, right in rows if right), default=0)
    lines = [headline(tree)]
    if rows:
        lines.append(f"{' ' * column}     tok   logp")
    for left, right in rows:
        lines.append(f"{left}{' ' * (column - _columns(left))}  {right}" if right else left)
    if selection.num_hidden:
        lines.append(
            f"… {selection.num_hidden:,} of {len(tree.nodes):,} nodes left out "
            f"(max_nodes={max_nodes})"
        )
    return "\n".join(lines)


def shorten(text: str, width: int) -> str:
    """Cut text in its middle to at most `width` terminal columns."""
    if len(text) <= 2 * width and _columns(text) <= width:
        return text
    front, back = text[:width], text[-width:]
    tail_width = (width - 1) // 2
    head = _take(front, width - 1 - tail_width)
    tail = _take(back[::-1], tail_width)[::-1]
    return f"{head}…{tail}"


def _columns(text: str) -> int:
    """How many terminal columns a text takes."""
    if text.isascii():
        return len(text)
    return sum(_char_columns(char) for char in text)


def _char_columns(char: str) -> int:
    if unicodedata.combining(char) or char in JOINERS:
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def _take(text: str, width: int) -> str:
    """The longest start of a text that fits into `width` columns."""
    used = 0
    for i, char in enumerate(text):
        used += _char_columns(char)
        if used > width:
            return text[:i]
    return text


def headline(tree: GenerationTree) -> str:
    counts = state_counts(tree.nodes)
    states = ", ".join(f"{number:,} {state}" for state, number in counts.items() if number)
    branches = number_of(tree.num_branches, "branch") + (f" ({states})" if states else "")
    tokens = f"{number_of(tree.num_tokens, 'token')} ({tree.num_tokens_flat:,} unshared)"
    return f"GenerationTree: {number_of(len(tree.roots), 'prompt')}, {branches}, {tokens}"


def _facts(node: GenerationNode, reason_width: int, label: str = "") -> str:
    """What stands behind a node's text in a terminal row."""
    mean = f"{mean_logprob(node.logprobs):z.2f}" if node.logprobs else ""
    words = " · ".join(word for word in (label, node.reason) if word)
    reason = shorten(visible_text(words), reason_width)
    return f"{len(node.tokens):6d} {mean:>6}  {reason}".rstrip()


def _text_of(
    tree: GenerationTree, node: GenerationNode, tokenizer: Decoder | None, width: int
) -> str:
    """A node's text on one line of at most `width` columns."""
    ids, context = node.tokens, context_of(tree, node)
    if len(ids) <= 2 * width + CONTEXT:
        text = visible_text(decode_after(tokenizer, context, ids))
    else:
        front = decode_after(tokenizer, context, ids[:width])
        back = decode_after(tokenizer, ids[-width - CONTEXT : -width], ids[-width:])
        text = visible_text(f"{front}…{back}")
    return shorten(text, width) if text.strip() else "␣" * min(len(text), width)


def _text_rows(
    tree: GenerationTree, selection: Selection, lead_width: int
) -> Iterator[tuple[str, int | None]]:
    """Yield (what stands before the text, node); node None for a line about left-out nodes."""

    def fit(lead: str) -> str:
        return lead if len(lead) <= lead_width else "…" + lead[1 - lead_width :]

    # An entry is what to draw (a node, or how many are left out), the lines in front of it, and
    # the lines in front of what hangs below it.
    roots = [root for root in tree.roots if root in selection.shown]
    pending: list[tuple[int | None, int, str, str]] = [(root, 0, "", "") for root in roots[::-1]]
    while pending:
        i, left_out, lead, below = pending.pop()
        if i is None:
            yield f"{fit(lead)}… {number_of(left_out, 'more node')}", None
            continue
        node = tree.nodes[i]
        yield f"{fit(lead)}{'◆' if node.is_prompt else MARKERS[node.state]} ", i
        children: list[int | None] = [*selection.children(node)]
        if len(node.children) == 1 and children:
            pending.append((children[0], 0, below, below))
            continue
        left_out = selection.hidden.get(i, 0)
        if left_out:
            children.append(None)
        # Only the end of a deep indentation is drawn, so no more of it is kept.
        kept = below[-lead_width:]
        for child in reversed(children):
            last = child == children[-1]
            pending.append(
                (child, left_out, kept + ("└─" if last else "├─"), kept + ("  " if last else "│ "))
            )
    if selection.hidden_prompts:
        yield f"… {number_of(selection.hidden_prompts, 'more prompt')}", None
