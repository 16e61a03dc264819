"""Draw a `GenerationTree`: text for a terminal, self-contained HTML for a notebook.

Both views walk the tree with explicit stacks (a chain may be thousands of nodes deep) and
show a bounded part of it: the nodes nearest to the roots, with a line where others are left
out. A node with an only child is followed by that child at the same indentation.
"""

from __future__ import annotations

import bisect
import math
import unicodedata
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any, Protocol

from hf_tree_cache.errors import InvalidArgument

if TYPE_CHECKING:
    from hf_tree_cache.generation.record import GenerationNode, GenerationTree

_MARKERS = {"alive": "●", "finished": "✓", "pruned": "✗", "forked": "┬"}
# Tokens in front of a piece that is decoded: tokenizers drop a leading space at the start of a
# text, and a character may be spread over several tokens.
_CONTEXT = 4
_LONGEST_CHARACTER = 8
_JOINERS = "\u200c\u200d"

# Bounds of the HTML view: a thousand nodes stay below 1.5 MB, and below the 512 nested elements
# where browsers stop nesting.
_MAX_TOKENS = 6000
_MAX_NODE_TOKENS = 300
_MAX_PIECE = 40
_MAX_REASON = 60
_MAX_DEPTH = 16
_OPEN_ALL = 80
_OPEN_ROWS = 60
_PLAIN_NODES = 100

# Surprise (-log-prob) at which a token gets the next tint: p = 0.9, 0.7, 0.5, 0.25, 0.1, 0.01.
_SURPRISES = (0.105, 0.357, 0.693, 1.386, 2.303, 4.605)


class Decoder(Protocol):
    """What the views need of a tokenizer."""

    def decode(self, token_ids: list[int], /) -> Any:
        """Return the text of token ids."""


@dataclass(frozen=True, slots=True)
class _Selection:
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
class _Piece:
    """A run of tokens that decodes to whole characters, mostly one token."""

    text: str
    start: int
    stop: int


def shorten(text: str, width: int) -> str:
    """Cut text in its middle to at most `width` terminal columns."""
    if len(text) <= 2 * width and _columns(text) <= width:
        return text
    front, back = text[:width], text[-width:]
    tail_width = (width - 1) // 2
    head = _take(front, width - 1 - tail_width)
    tail = _take(back[::-1], tail_width)[::-1]
    return f"{head}…{tail}"


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
    selection = _select(tree, max_nodes)
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
    lines = [_headline(tree)]
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


def render_html(
    tree: GenerationTree,
    tokenizer: Decoder | None = None,
    max_nodes: int = 1000,
    labels: Mapping[int, str] | None = None,
    footer: str = "",
) -> str:
    """Draw a tree as one piece of HTML that needs nothing from outside.

    On top an overview of the whole shape (across: token position; a line: a branch), below it
    the nodes as an outline that folds, each token tinted by how unlikely it was. Styles follow
    the theme of the browser, JupyterLab or VS Code; there are no scripts and no ids, so any
    number of trees can stand in one page.

    Args:
        tree: What to draw.
        tokenizer: Decodes the tokens; without one their ids are shown.
        max_nodes: Nodes to draw, those nearest to the roots; the rest is counted.
        labels: Names of nodes, by id, beside their numbers.
        footer: HTML to put below the tree.

    Returns:
        A `<div>` element.
    """
    if max_nodes < 1:
        raise InvalidArgument(
            f"render_html(max_nodes={max_nodes}): there must be a node to draw. Pass "
            "max_nodes >= 1."
        )
    selection = _select(tree, max_nodes)
    parts = [_header(tree)]
    parts.append(_overview(tree, selection))
    parts.append('<div class="htc-body">')
    parts.extend(_outline(tree, selection, tokenizer, labels or {}))
    if selection.hidden_prompts:
        parts.append(f'<div class="more">… {selection.hidden_prompts:,} more prompts</div>')
    parts.append("</div>")
    if selection.num_hidden:
        parts.append(
            f'<div class="more">… {selection.num_hidden:,} of {len(tree.nodes):,} nodes left out '
            f"(max_nodes={max_nodes})</div>"
        )
    plain = render_text(tree, tokenizer, 100, min(max_nodes, _PLAIN_NODES), labels)
    return frame("".join(parts) + footer, plain)


def frame(body: str, plain: str, style: str = "") -> str:
    """HTML in the colours and letters of these views, in a `<div>` that needs nothing else.

    Where styles are taken out, as of a notebook that JupyterLab does not trust yet, the text is
    seen instead.

    Args:
        body: What to show; its classes are those of this module's style.
        plain: The same as text.
        style: More rules, for elements within ".htc".
    """
    # JupyterLab takes out `hidden`, other readers of notebooks the style of an element.
    return (
        f'<div class="htc"><style>{_STYLE}{style}</style><pre class="plain">{escape(plain)}</pre>'
        f'<div class="view" hidden style="display:none">{body}</div></div>'
    )


def head(title: str, chips: Iterable[tuple[str, str, str]], legend: bool = False) -> str:
    """The first line of a view.

    Args:
        title: Its name.
        chips: (kind, text, tooltip) of short facts; the kind is a node's state or empty.
        legend: Explain the tints of tokens.
    """
    shown = "".join(_chip(*chip) for chip in chips)
    swatches = "".join(f"<i class=t{i}>&nbsp;&nbsp;</i>" for i in range(len(_SURPRISES) + 1))
    tints = f'<span class="legend">likely {swatches} unlikely token</span>' if legend else ""
    return f'<div class="head"><span class="title">{escape(title)}</span>{shown}{tints}</div>'


def tokens_html(
    tokens: Sequence[int],
    logprobs: Sequence[float] | None,
    tokenizer: Decoder | None,
    context: Sequence[int] = (),
    marked: Iterable[int] = (),
) -> str:
    """The text of tokens, each in the tint of its surprise.

    Args:
        tokens: Token ids.
        logprobs: Of each token; None for tokens that were given.
        tokenizer: Decodes them; without one their ids are shown.
        context: Tokens before them.
        marked: Indices of tokens to mark.
    """
    chosen = set(marked)
    pieces = _pieces(tokenizer, context[-_CONTEXT:], tokens)
    return _spans(tokens, logprobs, 0, pieces, chosen)


def _columns(text: str) -> int:
    """How many terminal columns a text takes."""
    if text.isascii():
        return len(text)
    return sum(_char_columns(char) for char in text)


def _char_columns(char: str) -> int:
    if unicodedata.combining(char) or char in _JOINERS:
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


def _visible(text: str) -> str:
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
    if char.isprintable() or char in _JOINERS:
        return char
    return char.encode("unicode_escape").decode("ascii")


def _decode(tokenizer: Decoder | None, ids: Sequence[int]) -> str:
    if tokenizer is None:
        return "".join(f" {token}" for token in ids)
    return str(tokenizer.decode(list(ids)))


def _decode_after(tokenizer: Decoder | None, context: Sequence[int], ids: Sequence[int]) -> str:
    """The text of `ids` where they stand behind `context`."""
    before = _decode(tokenizer, context)
    whole = _decode(tokenizer, [*context, *ids])
    return whole[len(before) :] if whole.startswith(before) else _decode(tokenizer, ids)


def _pieces(
    tokenizer: Decoder | None, context: Sequence[int], ids: Sequence[int]
) -> Iterator[_Piece]:
    """Split the text of `ids` at token boundaries that are character boundaries too."""
    done = 0
    for stop in range(1, len(ids) + 1):
        text = _decode_after(tokenizer, context, ids[done:stop])
        if text.endswith("\ufffd") and stop < len(ids) and stop - done < _LONGEST_CHARACTER:
            continue
        yield _Piece(text, done, stop)
        context = ids[done:stop]
        done = stop


def _context(tree: GenerationTree, node: GenerationNode) -> list[int]:
    """The last tokens before a node."""
    tokens: list[int] = []
    while node.parent is not None and len(tokens) < _CONTEXT:
        node = tree.nodes[node.parent]
        tokens = node.tokens[-_CONTEXT:] + tokens
    return tokens[-_CONTEXT:]


def _mean(logprobs: Sequence[float]) -> float:
    return sum(logprobs) / len(logprobs) if logprobs else math.nan


def _count(number: int, noun: str) -> str:
    plural = "es" if noun.endswith("ch") else "s"
    return f"{number:,} {noun}{'' if number == 1 else plural}"


def _select(tree: GenerationTree, max_nodes: int) -> _Selection:
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
    return _Selection(shown, hidden, max(0, len(roots) - max_nodes), len(tree.nodes) - len(shown))


def _state_counts(nodes: Iterable[GenerationNode]) -> dict[str, int]:
    counts = {"alive": 0, "finished": 0, "pruned": 0}
    for node in nodes:
        if node.state != "forked":
            counts[node.state] += 1
    return counts


def _headline(tree: GenerationTree) -> str:
    counts = _state_counts(tree.nodes)
    states = ", ".join(f"{number:,} {state}" for state, number in counts.items() if number)
    branches = _count(tree.num_branches, "branch") + (f" ({states})" if states else "")
    tokens = f"{_count(tree.num_tokens, 'token')} ({tree.num_tokens_flat:,} unshared)"
    return f"GenerationTree: {_count(len(tree.roots), 'prompt')}, {branches}, {tokens}"


def _facts(node: GenerationNode, reason_width: int, label: str = "") -> str:
    """What stands behind a node's text in a terminal row."""
    mean = f"{_mean(node.logprobs):z.2f}" if node.logprobs else ""
    words = " · ".join(word for word in (label, node.reason) if word)
    reason = shorten(_visible(words), reason_width)
    return f"{len(node.tokens):6d} {mean:>6}  {reason}".rstrip()


def _text_of(
    tree: GenerationTree, node: GenerationNode, tokenizer: Decoder | None, width: int
) -> str:
    """A node's text on one line of at most `width` columns."""
    ids, context = node.tokens, _context(tree, node)
    if len(ids) <= 2 * width + _CONTEXT:
        text = _visible(_decode_after(tokenizer, context, ids))
    else:
        front = _decode_after(tokenizer, context, ids[:width])
        back = _decode_after(tokenizer, ids[-width - _CONTEXT : -width], ids[-width:])
        text = _visible(f"{front}…{back}")
    return shorten(text, width) if text.strip() else "␣" * min(len(text), width)


def _text_rows(
    tree: GenerationTree, selection: _Selection, lead_width: int
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
            yield f"{fit(lead)}… {_count(left_out, 'more node')}", None
            continue
        node = tree.nodes[i]
        yield f"{fit(lead)}{'◆' if node.is_prompt else _MARKERS[node.state]} ", i
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
        yield f"… {_count(selection.hidden_prompts, 'more prompt')}", None


def _header(tree: GenerationTree) -> str:
    counts = _state_counts(tree.nodes)
    chips = [("", _count(len(tree.roots), "prompt"), "")] if len(tree.roots) > 1 else []
    chips.append(("", _count(tree.num_branches, "branch"), ""))
    chips += [
        (state, f"{_MARKERS[state]} {number:,} {state}", "")
        for state, number in counts.items()
        if number
    ]
    unique, flat = tree.num_tokens, tree.num_tokens_flat
    chips.append(("", _count(unique, "token"), "generated tokens, shared ones counted once"))
    if flat > unique:
        chips.append(
            ("", f"{flat / unique:.1f}× shared", f"{flat:,} tokens as independent sequences")
        )
    return head("Generation tree", chips, legend=True)


def _chip(kind: str, text: str, title: str) -> str:
    return f'<span class="chip {kind}" title="{escape(title)}">{escape(text)}</span>'


def _overview(tree: GenerationTree, selection: _Selection) -> str:
    """An SVG of the whole shape: a line is a branch, across is the position in the sequence.

    The first child continues its parent's line. Prompts are drawn at one width, whatever their
    length, so that generated tokens of one position stand above each other.
    """
    order = [i for i in tree.walk() if i in selection.shown]
    prompt_end = [0] * len(tree.roots)
    for i in order:
        node = tree.nodes[i]
        if node.is_prompt:
            prompt_end[node.prompt] = max(prompt_end[node.prompt], node.end)
    lanes: dict[int, int] = {}
    num_lanes = 0
    for i in order:
        lanes[i] = num_lanes
        num_lanes += not selection.children(tree.nodes[i])
    if num_lanes < 2:
        return ""
    longest = max(tree.nodes[i].end - prompt_end[tree.nodes[i].prompt] for i in order)
    margin = 1000 * min(0.12, max(prompt_end) / max(1, max(prompt_end) + longest))
    scale = (1000 - margin) / max(1, longest)
    lane_height = min(14.0, max(240.0, min(360.0, 0.6 * num_lanes)) / num_lanes)
    bar_height = lane_height * (0.6 if lane_height >= 3 else 1.0)

    def x(position: int, prompt: int) -> float:
        generated = position - prompt_end[prompt]
        if generated < 0:
            return margin * position / prompt_end[prompt]
        return margin + generated * scale

    bars, links = [], []
    for i in order:
        node = tree.nodes[i]
        left, right = x(node.start, node.prompt), x(node.end, node.prompt)
        top = lanes[i] * lane_height
        kind = "prompt" if node.is_prompt else node.state
        bars.append(
            f'<rect class="{kind}" x="{left:.1f}" y="{top + (lane_height - bar_height) / 2:.1f}" '
            f'width="{max(1.0, right - left):.1f}" height="{bar_height:.1f}">'
            f"<title>{_label(node)}</title></rect>"
        )
        children = selection.children(node)
        if children and lanes[children[-1]] > lanes[i]:
            bottom = (lanes[children[-1]] + 0.5) * lane_height
            links.append(f"M{right:.1f} {top + lane_height / 2:.1f}V{bottom:.1f}")
    height = num_lanes * lane_height
    return (
        f'<svg class="overview" viewBox="0 0 1000 {height:.1f}" height="{height:.0f}" '
        f'preserveAspectRatio="none" role="img" aria-label="{escape(_headline(tree))}">'
        f'<path d="{"".join(links)}"/>{"".join(bars)}</svg>'
        f'<div class="axis"><span style="min-width:{margin / 10:.1f}%">prompt</span>'
        f"<span>generated</span><span>{_count(longest, 'token')}</span></div>"
    )


def _label(node: GenerationNode) -> str:
    """A node in a few words, for a tooltip."""
    words = [f"#{node.id}", "prompt" if node.is_prompt else node.state]
    words.append(_count(len(node.tokens), "token"))
    if node.logprobs:
        words.append(f"mean log-prob {_mean(node.logprobs):z.2f}")
    if node.reason is not None:
        words.append(shorten(_visible(node.reason), _MAX_REASON))
    return escape(" · ".join(words))


def _run(tree: GenerationTree, selection: _Selection, node: int) -> list[int]:
    """A node and the only children that follow it, which are drawn at its indentation."""
    run = [node]
    while True:
        children = tree.nodes[run[-1]].children
        if len(children) != 1 or children[0] not in selection.shown:
            return run
        run.append(children[0])


def _opened(tree: GenerationTree, selection: _Selection, roots: list[int]) -> set[int]:
    """Runs that start unfolded: all of a small tree, else a lone prompt and the first levels."""
    opened: set[int] = set()
    rows = len(roots)
    pending = deque(roots)
    while pending:
        first = pending.popleft()
        run = _run(tree, selection, first)
        children = selection.children(tree.nodes[run[-1]])
        more = len(run) - 1 + len(children)
        small = len(selection.shown) <= _OPEN_ALL or rows + more <= _OPEN_ROWS
        if small or roots == [first]:
            opened.add(first)
            rows += more
            pending.extend(children)
    return opened


def _outline(
    tree: GenerationTree,
    selection: _Selection,
    tokenizer: Decoder | None,
    labels: Mapping[int, str],
) -> Iterator[str]:
    """Yield the nodes as nested, foldable elements.

    What would nest deeper than `_MAX_DEPTH` is drawn at the left again, after the root's other
    nodes, under the number of the node that it continues.
    """
    roots = [root for root in tree.roots if root in selection.shown]
    opened = _opened(tree, selection, roots)
    endings = _count_endings(tree)
    drawn = [tree.nodes[i] for i in selection.shown]
    prompt_cap = _tokens_per_node(node for node in drawn if node.is_prompt)
    cap = _tokens_per_node(node for node in drawn if not node.is_prompt)

    def row(i: int) -> str:
        node = tree.nodes[i]
        room = prompt_cap if node.is_prompt else cap
        return _row(tree, node, tokenizer, room, endings[i], labels.get(i, ""))

    sections: deque[tuple[int | None, list[int]]] = deque((None, [root]) for root in roots)
    while sections:
        source, nodes = sections.popleft()
        deeper: list[tuple[int | None, list[int]]] = []
        # Text is a closing tag to yield once the nodes above it on the stack are drawn.
        pending: list[tuple[int, int] | str] = [(i, 0) for i in reversed(nodes)]
        if source is not None:
            yield f'<div class="more">↳ continues #{source}</div><div class="kids">'
        while pending:
            item = pending.pop()
            if isinstance(item, str):
                yield item
                continue
            first, depth = item
            run = _run(tree, selection, first)
            last = run[-1]
            children = selection.children(tree.nodes[last])
            hidden = selection.hidden.get(last, 0)
            note = f'<div class="more">… {_count(hidden, "more node")}</div>' if hidden else ""
            if len(run) == 1 and not children and not hidden:
                yield f'<div class="n">{row(first)}</div>'
                continue
            state = " open" if first in opened else ""
            yield f'<details class="n"{state}><summary>{row(first)}</summary>'
            for i in run[1:]:
                yield row(i)
            if children and depth + 1 == _MAX_DEPTH:
                deeper.append((last, children))
                yield f'<div class="more">↴ #{last} continues below</div>{note}</details>'
                continue
            yield '<div class="kids">'
            pending.append(f"{note}</div></details>")
            pending.extend((child, depth + 1) for child in reversed(children))
        if source is not None:
            yield "</div>"
        sections.extendleft(reversed(deeper))


def _count_endings(tree: GenerationTree) -> list[dict[str, int]]:
    """For each node, how many branches below it are in each state."""
    endings = [_state_counts([node]) for node in tree.nodes]
    for i in reversed(list(tree.walk())):
        parent = tree.nodes[i].parent
        if parent is not None:
            for state, number in endings[i].items():
                endings[parent][state] += number
    return endings


def _tokens_per_node(nodes: Iterable[GenerationNode]) -> int:
    """The most tokens to draw of one node, so that all together stay within the budget."""
    lengths = sorted(len(node.tokens) for node in nodes)
    budget = _MAX_TOKENS
    for i, length in enumerate(lengths):
        share = budget // (len(lengths) - i)
        if length > share:
            return min(max(2, share), _MAX_NODE_TOKENS)
        budget -= length
    return _MAX_NODE_TOKENS


def _row(
    tree: GenerationTree,
    node: GenerationNode,
    tokenizer: Decoder | None,
    cap: int,
    endings: dict[str, int],
    label: str,
) -> str:
    kind = "prompt" if node.is_prompt else node.state
    facts = [f'<span class="name">{escape(label)}</span>'] if label else []
    if node.state == "forked":
        facts += [
            f'<span class="{state}">{_MARKERS[state]}\u2009{number:,}</span>'
            for state, number in endings.items()
            if number
        ]
    if node.reason is not None:
        reason = escape(shorten(_visible(node.reason), _MAX_REASON))
        facts.append(f'<span class="why">{reason}</span>')
    elif node.state != "forked":
        facts.append(f'<span class="why">{node.state}</span>')
    facts.append(f'<span class="k">{len(node.tokens):,} tok</span>')
    if node.logprobs:
        mean = _mean(node.logprobs)
        likely = 0.0 if math.isnan(mean) else math.exp(min(0.0, mean))
        facts.append(
            f'<span class="p" style="--p:{likely:.0%}" '
            f'title="mean log-prob; bar: the probability it stands for">{mean:z.2f}</span>'
        )
    facts.append(f'<span class="id">#{node.id}</span>')
    badge = "" if node.state == "forked" else _MARKERS[node.state]
    return (
        f'<div class="r {kind}"><b>{badge}</b><span class="x">'
        f"{_token_spans(tree, node, tokenizer, cap)}</span>"
        f'<span class="m">{"".join(facts)}</span></div>'
    )


def _token_spans(
    tree: GenerationTree, node: GenerationNode, tokenizer: Decoder | None, cap: int
) -> str:
    """A node's text, each token in its tint; of a long node the first and the last tokens."""
    ids = node.tokens
    if len(ids) <= cap:
        return _node_spans(node, 0, _pieces(tokenizer, _context(tree, node), ids))
    tail = len(ids) - cap // 2
    head = cap - cap // 2
    return (
        _node_spans(node, 0, _pieces(tokenizer, _context(tree, node), ids[:head]))
        + f'<span class="cut"> … {_count(tail - head, "token")} … </span>'
        + _node_spans(node, tail, _pieces(tokenizer, ids[tail - _CONTEXT : tail], ids[tail:]))
    )


def _node_spans(node: GenerationNode, offset: int, pieces: Iterable[_Piece]) -> str:
    return _spans(node.tokens, None if node.is_prompt else node.logprobs, offset, pieces, set())


def _spans(
    tokens: Sequence[int],
    logprobs: Sequence[float] | None,
    offset: int,
    pieces: Iterable[_Piece],
    marked: set[int],
) -> str:
    if logprobs is None:
        return "".join(escape(shorten(_visible(piece.text), _MAX_PIECE)) for piece in pieces)
    spans = []
    for piece in pieces:
        start, stop = offset + piece.start, offset + piece.stop
        # A character spread over tokens is as likely as all of them together.
        logprob = sum(logprobs[start:stop])
        mark = " mark" if any(i in marked for i in range(start, stop)) else ""
        tint = 0 if math.isnan(logprob) else bisect.bisect(_SURPRISES, -logprob)
        text = escape(shorten(_visible(piece.text), _MAX_PIECE))
        ids = " ".join(map(str, tokens[start:stop]))
        name = f'"t{tint}{mark}"' if mark else f"t{tint}"
        spans.append(
            f'<i class={name} title="{text}&#10;{logprob:z.2f} ({_percent(logprob)})'
            f' · id {ids}">{text}</i>'
        )
    return "".join(spans)


def _percent(logprob: float) -> str:
    return "?" if math.isnan(logprob) else f"{100 * math.exp(min(0.0, logprob)):.3g}%"


_DARK = """color-scheme:dark;
--bg:#16181d;--box:#1e2128;--hover:#262a33;--text:#e4e6eb;--muted:#9aa3b2;--line:#3b414d;
--alive:#6ea8ff;--finished:#4cc38a;--pruned:#f08070;--forked:#8b96a8;--prompt:#b79cf0;
--tint:255,150,60"""

_STYLE = (
    """
.htc{color-scheme:light;--bg:#fbfbfc;--box:#fff;--hover:#f3f5f8;--text:#1d2129;--muted:#667085;--line:#d3d8e0;
--alive:#2563c9;--finished:#157f4a;--pruned:#b93a2c;--forked:#7b8798;--prompt:#6d4bc0;
--tint:240,120,20;
color:var(--text);background:var(--bg);border:1px solid var(--line);border-radius:10px;
padding:12px 14px;margin:4px 0;font:13px/1.45 system-ui,-apple-system,"Segoe UI",sans-serif;
text-align:left}
@media (prefers-color-scheme:dark){
body:not([data-jp-theme-light="true"]):not(.vscode-light):not(.vscode-high-contrast-light)
.htc{DARK}}
body[data-jp-theme-light="false"] .htc,body.vscode-dark .htc,
body.vscode-high-contrast:not(.vscode-high-contrast-light) .htc,
html[data-theme="dark"] .htc,html[theme="dark"] .htc{DARK}
.htc *{box-sizing:border-box}
.htc>.plain{display:none!important}.htc>.view{display:block!important}
.htc .head{display:flex;flex-wrap:wrap;align-items:center;gap:6px;margin-bottom:10px}
.htc .title{font-weight:650;font-size:14px;margin-right:6px}
.htc .chip{padding:1px 9px;border-radius:99px;border:1px solid var(--line);
background:var(--box);font-size:12px;font-variant-numeric:tabular-nums}
.htc .alive{--c:var(--alive)}.htc .finished{--c:var(--finished)}.htc .pruned{--c:var(--pruned)}
.htc .forked{--c:var(--forked)}.htc .prompt{--c:var(--prompt)}
.htc .chip.alive,.htc .chip.finished,.htc .chip.pruned{color:var(--c);border-color:var(--c)}
.htc .legend{margin-left:auto;color:var(--muted);font-size:11px}
.htc .overview{display:block;width:100%;overflow:visible}
.htc .overview rect{fill:var(--c);rx:1px}
.htc .overview rect:hover{fill:var(--text)}
.htc .overview path{fill:none;stroke:var(--forked);vector-effect:non-scaling-stroke}
.htc .axis{display:flex;color:var(--muted);font-size:10.5px;margin:3px 0 10px}
.htc .axis :first-child{padding-right:8px}.htc .axis :nth-child(2){flex:1}
.htc .htc-body{max-height:36rem;overflow:auto}
.htc .n{position:relative;margin:3px 0}
.htc .kids{margin-left:8px;padding-left:15px}
.htc .kids>*{position:relative}
.htc .kids>*::before{content:"";position:absolute;left:-15px;top:-3px;bottom:0;
border-left:1px solid var(--line)}
.htc .kids>*::after{content:"";position:absolute;left:-15px;top:14px;width:15px;
border-top:1px solid var(--line)}
.htc .kids>:last-child::before{bottom:auto;height:17px}
.htc summary{list-style:none;cursor:pointer;display:block}
.htc summary::-webkit-details-marker{display:none}
.htc .r{display:flex;flex-wrap:wrap;align-items:baseline;gap:0 9px;padding:3px 9px 3px 6px;
background:var(--box);border:1px solid var(--line);border-left:3px solid var(--c);
border-radius:6px}
.htc details>.r{margin-top:3px}
.htc summary:hover>.r{background:var(--hover)}
.htc .r>b{color:var(--c);flex:none;width:1.1em;text-align:center;font-weight:600}
.htc details>.r>b:empty::before{content:"↓"}
.htc summary>.r>b::before,.htc .kids summary>.r>b::before{content:"▸"}
.htc details[open]>summary>.r>b::before{content:"▾"}
.htc .x{flex:1 1 15em;min-width:0;white-space:pre-wrap;overflow-wrap:anywhere;
font:12.5px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}
.htc .prompt>.x{color:var(--muted)}
.htc i{font-style:normal;border-radius:2px;unicode-bidi:isolate}
.htc .x i:hover{outline:1px solid var(--text)}
.htc .cut{color:var(--muted);font-style:italic}
.htc .m{flex:none;margin-left:auto;display:flex;gap:9px;align-items:baseline;
color:var(--muted);font-size:11.5px;font-variant-numeric:tabular-nums;white-space:nowrap}
.htc .m .alive,.htc .m .finished,.htc .m .pruned,.htc .why{color:var(--c)}
.htc .forked>.m>.why{color:var(--muted)}
.htc .why{max-width:24em;overflow:hidden;text-overflow:ellipsis}
.htc .k{min-width:4.2em;text-align:right}
.htc .p{min-width:3.2em;padding-bottom:2px;text-align:right;
background:linear-gradient(var(--forked),var(--forked)) right bottom/var(--p) 2px no-repeat}
.htc .name{color:var(--text);font-weight:600}
.htc .id{min-width:3.2em;text-align:right;opacity:.8}
.htc i.mark{box-shadow:inset 0 -2px var(--alive)}
.htc .more{color:var(--muted);font-size:12px;padding:3px 9px}
.htc .t1{background:rgba(var(--tint),.10)}.htc .t2{background:rgba(var(--tint),.19)}
.htc .t3{background:rgba(var(--tint),.29)}.htc .t4{background:rgba(var(--tint),.40)}
.htc .t5{background:rgba(var(--tint),.52)}.htc .t6{background:rgba(var(--tint),.66)}
"""
).replace("DARK", _DARK)
