"""Draw a `GenerationTree` as self-contained HTML for a notebook.

A node with an only child is followed by that child at the same indentation.
"""

from __future__ import annotations

import bisect
import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

from hf_tree_cache.errors import InvalidArgument

from .view_parts import (
    CONTEXT,
    MARKERS,
    Decoder,
    Piece,
    Selection,
    context_of,
    mean_logprob,
    number_of,
    pieces_of,
    select_nodes,
    state_counts,
    visible_text,
)
from .view_text import headline, render_text, shorten

if TYPE_CHECKING:
    from hf_tree_cache.generation.node import GenerationNode
    from hf_tree_cache.generation.record import GenerationTree

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
    selection = select_nodes(tree, max_nodes)
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
    pieces = pieces_of(tokenizer, context[-CONTEXT:], tokens)
    return _spans(tokens, logprobs, 0, pieces, chosen)


def _header(tree: GenerationTree) -> str:
    counts = state_counts(tree.nodes)
    chips = [("", number_of(len(tree.roots), "prompt"), "")] if len(tree.roots) > 1 else []
    chips.append(("", number_of(tree.num_branches, "branch"), ""))
    chips += [
        (state, f"{MARKERS[state]} {number:,} {state}", "")
        for state, number in counts.items()
        if number
    ]
    unique, flat = tree.num_tokens, tree.num_tokens_flat
    chips.append(("", number_of(unique, "token"), "generated tokens, shared ones counted once"))
    if flat > unique:
        chips.append(
            ("", f"{flat / unique:.1f}× shared", f"{flat:,} tokens as independent sequences")
        )
    return head("Generation tree", chips, legend=True)


def _chip(kind: str, text: str, title: str) -> str:
    return f'<span class="chip {kind}" title="{escape(title)}">{escape(text)}</span>'


def _overview(tree: GenerationTree, selection: Selection) -> str:
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
        f'preserveAspectRatio="none" role="img" aria-label="{escape(headline(tree))}">'
        f'<path d="{"".join(links)}"/>{"".join(bars)}</svg>'
        f'<div class="axis"><span style="min-width:{margin / 10:.1f}%">prompt</span>'
        f"<span>generated</span><span>{number_of(longest, 'token')}</span></div>"
    )


def _label(node: GenerationNode) -> str:
    """A node in a few words, for a tooltip."""
    words = [f"#{node.id}", "prompt" if node.is_prompt else node.state]
    words.append(number_of(len(node.tokens), "token"))
    if node.logprobs:
        words.append(f"mean log-prob {mean_logprob(node.logprobs):z.2f}")
    if node.reason is not None:
        words.append(shorten(visible_text(node.reason), _MAX_REASON))
    return escape(" · ".join(words))


def _run(tree: GenerationTree, selection: Selection, node: int) -> list[int]:
    """A node and the only children that follow it, which are drawn at its indentation."""
    run = [node]
    while True:
        children = tree.nodes[run[-1]].children
        if len(children) != 1 or children[0] not in selection.shown:
            return run
        run.append(children[0])


def _opened(tree: GenerationTree, selection: Selection, roots: list[int]) -> set[int]:
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
    selection: Selection,
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
            note = f'<div class="more">… {number_of(hidden, "more node")}</div>' if hidden else ""
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
    endings = [state_counts([node]) for node in tree.nodes]
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
            f'<span class="{state}">{MARKERS[state]}\u2009{number:,}</span>'
            for state, number in endings.items()
            if number
        ]
    if node.reason is not None:
        reason = escape(shorten(visible_text(node.reason), _MAX_REASON))
        facts.append(f'<span class="why">{reason}</span>')
    elif node.state != "forked":
        facts.append(f'<span class="why">{node.state}</span>')
    facts.append(f'<span class="k">{len(node.tokens):,} tok</span>')
    if node.logprobs:
        mean = mean_logprob(node.logprobs)
        likely = 0.0 if math.isnan(mean) else math.exp(min(0.0, mean))
        facts.append(
            f'<span class="p" style="--p:{likely:.0%}" '
            f'title="mean log-prob; bar: the probability it stands for">{mean:z.2f}</span>'
        )
    facts.append(f'<span class="id">#{node.id}</span>')
    badge = "" if node.state == "forked" else MARKERS[node.state]
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
        return _node_spans(node, 0, pieces_of(tokenizer, context_of(tree, node), ids))
    tail = len(ids) - cap // 2
    head = cap - cap // 2
    return (
        _node_spans(node, 0, pieces_of(tokenizer, context_of(tree, node), ids[:head]))
        + f'<span class="cut"> … {number_of(tail - head, "token")} … </span>'
        + _node_spans(node, tail, pieces_of(tokenizer, ids[tail - CONTEXT : tail], ids[tail:]))
    )


def _node_spans(node: GenerationNode, offset: int, pieces: Iterable[Piece]) -> str:
    return _spans(node.tokens, None if node.is_prompt else node.logprobs, offset, pieces, set())


def _spans(
    tokens: Sequence[int],
    logprobs: Sequence[float] | None,
    offset: int,
    pieces: Iterable[Piece],
    marked: set[int],
) -> str:
    if logprobs is None:
        return "".join(escape(shorten(visible_text(piece.text), _MAX_PIECE)) for piece in pieces)
    spans = []
    for piece in pieces:
        start, stop = offset + piece.start, offset + piece.stop
        # A character spread over tokens is as likely as all of them together.
        logprob = sum(logprobs[start:stop])
        mark = " mark" if any(i in marked for i in range(start, stop)) else ""
        tint = 0 if math.isnan(logprob) else bisect.bisect(_SURPRISES, -logprob)
        text = escape(shorten(visible_text(piece.text), _MAX_PIECE))
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
