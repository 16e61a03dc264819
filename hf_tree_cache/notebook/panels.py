"""HTML of a session besides its tree: one branch, two branches side by side, the K/V as stored."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from html import escape
from typing import Any

from ..generation.view_html import frame, head, tokens_html
from ..integration.cache import TreeCache
from ..memory.growth import Node
from ..memory.tree import Branch as CacheBranch

MAX_CELLS = 6000
"""Blocks that are drawn one by one; a thousand take 200 kB of HTML."""

ALIKE = 3
"""Tokens in a row that both of two branches must have, to count as the same passage."""


@dataclass(frozen=True, slots=True)
class Panel:
    """HTML that a notebook shows, and the text that a terminal does."""

    html: str
    text: str

    def _repr_html_(self) -> str:
        return self.html

    def __repr__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class BranchView:
    """What a panel needs of a branch.

    Attributes:
        name: how the user calls it.
        tokens: ids, prompt included.
        logprobs: of the tokens behind the prompt.
        state: "alive", or how it ended.
        score: the user's, if any.
    """

    name: str
    tokens: Sequence[int]
    logprobs: Sequence[float]
    state: str
    score: float | None = None

    @property
    def start(self) -> int:
        """Where the generated tokens begin."""
        return len(self.tokens) - len(self.logprobs)

    @property
    def facts(self) -> list[tuple[str, str, str]]:
        """Chips."""
        count, total = len(self.logprobs), sum(self.logprobs)
        kind = self.state.split(" ")[0]
        chips = [(kind, self.state, ""), ("", counted(count, "token"), "generated")]
        if count:
            chips.append(("", f"log-prob {total:z.2f}", f"{total / count:z.3f} a token"))
        if self.score is not None:
            chips.append(("", f"score {self.score:.3g}", ""))
        return chips


def branch_panel(view: BranchView, tokenizer: Any, text: str) -> Panel:
    """One branch: its prompt folded, its tokens tinted by their log-probs."""
    html = frame(
        head(view.name, view.facts, legend=True)
        + _folded("prompt", view.tokens[: view.start], tokenizer)
        + f'<div class="x text">{_tinted(view, view.start, tokenizer)}</div>',
        text,
        _STYLE,
    )
    return Panel(html, text)


def compare_panel(left: BranchView, right: BranchView, tokenizer: Any) -> Panel:
    """Two branches side by side: what they share folded, what only one of them says marked."""
    shared = 0
    for a, b in zip(left.tokens, right.tokens, strict=False):
        if a != b:
            break
        shared += 1
    tails = left.tokens[shared:], right.tokens[shared:]
    matcher = SequenceMatcher(None, *tails, autojunk=False)
    only: tuple[list[int], list[int]] = ([], [])
    for kind, a, b, c, d in matcher.get_opcodes():
        if kind != "equal" or b - a < ALIKE:
            only[0].extend(range(a, b))
            only[1].extend(range(c, d))
    columns = "".join(
        f'<div class="side">{head(view.name, view.facts)}'
        f'<div class="x text">{_tinted(view, shared, tokenizer, marked)}</div></div>'
        for view, marked in zip((left, right), only, strict=True)
    )
    title = f"{left.name} and {right.name}"
    chips = [("", f"{counted(shared, 'token')} in common", "prompt included")]
    lines = [f"{title}: {counted(shared, 'token')} in common"]
    for view in (left, right):
        lines.append(f"--- {view.name} ({', '.join(text for _, text, _ in view.facts)})")
        context = view.tokens[max(0, shared - 8) : shared]
        lines.append(decoded(tokenizer, context, view.tokens[shared:]))
    text = "\n".join(lines)
    html = frame(
        head(title, chips, legend=True)
        + _folded("in common", left.tokens[:shared], tokenizer, ending=True)
        + f'<div class="sides">{columns}</div>',
        text,
        _STYLE,
    )
    return Panel(html, text)


def kv_panel(
    cache: TreeCache, standing: Mapping[CacheBranch, Sequence[str]], lengths: Sequence[int]
) -> Panel:
    """Every block once, as high as the number of branches that read it.

    Args:
        standing: names of the branches at each branch of the cache.
        lengths: tokens in the cache of every branch, for what dense storage would take.
    """
    stats = cache.stats()
    dense = cache.dense_bytes(lengths)
    saved = 1 - stats.kv_bytes / dense if dense > stats.kv_bytes else 0.0
    chips = [
        ("", f"{counted(stats.blocks, 'block')} of {stats.block_size} tokens", ""),
        ("", f"{in_bytes(stats.kv_bytes)} of K/V", "all layers"),
        ("", f"{in_bytes(dense)} unshared", "as one dense cache for each branch"),
        ("finished" if saved else "", f"{saved:.0%} saved", ""),
        ("", f"{stats.copies:,} copies on write", "partial blocks copied so far"),
    ]
    text = f"K/V: {', '.join(text for _, text, _ in chips)}"
    html = frame(head("K/V as stored", chips) + _icicle(cache, standing), text, _STYLE)
    return Panel(html, text)


def in_bytes(number: float) -> str:
    """A number of bytes as one reads it."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000 or unit == "GB":
            break
        number /= 1000
    return f"{number:.0f} {unit}" if number >= 100 or unit == "B" else f"{number:.1f} {unit}"


def counted(number: int, noun: str) -> str:
    """A number and its noun."""
    plural = "es" if noun.endswith("ch") else "s"
    return f"{number:,} {noun}{'' if number == 1 else plural}"


def decoded(tokenizer: Any, context: Sequence[int], tokens: Sequence[int]) -> str:
    """Text of ``tokens`` behind ``context``; ids where there is no tokenizer."""
    if tokenizer is None:
        return " ".join(map(str, tokens))
    before = tokenizer.decode(list(context))
    whole = tokenizer.decode([*context, *tokens])
    return whole[len(before) :] if whole.startswith(before) else tokenizer.decode(list(tokens))


def _folded(what: str, tokens: Sequence[int], tokenizer: Any, ending: bool = False) -> str:
    if not tokens:
        return ""
    body = tokens_html(tokens, None, tokenizer)
    count = counted(len(tokens), "token")
    if ending:
        count += f" … {tokens_html(tokens[-12:], None, tokenizer, tokens[-20:-12])}"
    return (
        f'<details class="fold"><summary>{what}: {count}</summary>'
        f'<div class="x text prompt">{body}</div></details>'
    )


def _tinted(view: BranchView, start: int, tokenizer: Any, marked: Iterable[int] = ()) -> str:
    """Tokens of ``view`` from ``start`` on; indices in ``marked`` count from there."""
    given = max(0, view.start - start)
    context = view.tokens[max(0, start - 8) : start]
    html = tokens_html(view.tokens[start : start + given], None, tokenizer, context)
    first = start + given
    return html + tokens_html(
        view.tokens[first:],
        view.logprobs[first - view.start :],
        tokenizer,
        view.tokens[max(0, first - 8) : first],
        [i - given for i in marked],
    )


def _icicle(cache: TreeCache, standing: Mapping[CacheBranch, Sequence[str]]) -> str:
    """An SVG: across the token positions, down the branches; a block spans all that read it."""
    tree, size = cache.tree, cache.block_size
    names: dict[Node, list[str]] = {}
    for cached, here in standing.items():
        path = tree.path(cached)
        names.setdefault(path[-1] if path else tree.root, []).extend(here)
    nodes = list(tree.nodes())
    below = {node: len(names.get(node, ())) for node in nodes}
    for node in reversed(nodes):
        if node.parent in below:
            below[node.parent] += below[node]
    lanes = sum(below[node] for node in nodes if node.parent is tree.root)
    longest = max((node.end for node in nodes), default=0)
    if not lanes or not longest:
        return '<div class="more">nothing is stored</div>'
    if (count := sum(len(node.blocks) for node in nodes)) > MAX_CELLS:
        return f'<div class="more">{count:,} blocks: too many to draw one by one</div>'
    lane = min(18.0, max(0.5, 360 / lanes))
    wide = 1000 / (-(-longest // size) * size)
    cells: list[str] = []
    first: dict[Node, float] = {tree.root: 0.0}
    used: dict[Node, float] = {tree.root: 0.0}
    for node in sorted(nodes, key=lambda n: n.start):
        assert node.parent is not None
        top = first[node.parent] + used[node.parent]
        height = below[node] * lane
        used[node.parent] += height
        first[node], used[node] = top, 0.0
        for i, block in enumerate(node.blocks):
            start = (node.start // size + i) * size
            left, right = max(start, node.start), min(start + size, node.end)
            refs = cache.tree.allocator.ref_count(block)
            readers = below[node]
            title = (
                f"block {block} · tokens {left}–{right - 1} · ref count {refs} · "
                f"read by {counted(readers, 'branch')}"
            )
            shade = "shared" if readers > 1 else "own"
            kind = f"{shade} copied" if left > start else shade
            cells.append(
                f'<rect class="{kind}" x="{left * wide:.1f}" y="{top:.1f}" '
                f'width="{(right - left) * wide:.1f}" height="{height:.1f}">'
                f"<title>{title}</title></rect>"
            )
            if height >= 12 and (right - left) * wide >= 14:
                cells.append(
                    f'<text x="{(left + right) / 2 * wide:.1f}" y="{top + height / 2 + 3.5:.1f}">'
                    f"{readers}</text>"
                )
        if names.get(node) and lane >= 10:
            text = escape(", ".join(names[node]))
            cells.append(
                f'<text class="tip" x="{min(node.end * wide + 4, 1004):.1f}" '
                f'y="{top + height - lane / 2 + 3.5:.1f}">{text}</text>'
            )
    height = lanes * lane
    return (
        f'<svg class="kv" viewBox="0 0 1080 {height:.0f}" width="100%" '
        f'style="max-height:{height * 1.3:.0f}px;--w:{min(1.5, lane / 6):.2f}" role="img" '
        f'aria-label="blocks of the cache">'
        f"{''.join(cells)}</svg>"
        '<div class="more">across: tokens; a box is one block of all layers, as high as the '
        "branches that read it, whose number it shows; framed: copied on write; more in its "
        "tooltip</div>"
    )


_STYLE = """
.htc .text{display:block;padding:6px 8px;border:1px solid var(--line);border-radius:6px;
background:var(--box);max-height:28rem;overflow:auto}
.htc .text.prompt{color:var(--muted);margin-bottom:6px}
.htc .fold>summary{color:var(--muted);font-size:12px;padding:0 0 6px;cursor:pointer;
display:list-item;list-style:disclosure-closed inside}
.htc .fold[open]>summary{list-style-type:disclosure-open}
.htc .sides{display:grid;grid-template-columns:repeat(auto-fit,minmax(18em,1fr));gap:10px}
.htc .side{min-width:0}.htc .side>.head{margin-bottom:5px}
.htc .kv{display:block}
.htc .kv rect{stroke:var(--bg);stroke-width:var(--w);fill:var(--alive);fill-opacity:.35}
.htc .kv rect.shared{fill:var(--finished);fill-opacity:.55}
.htc .kv rect.copied{stroke:var(--prompt)}
.htc .kv rect:hover{fill-opacity:1}
.htc .kv text{font:10px system-ui,sans-serif;text-anchor:middle;fill:var(--text);
pointer-events:none}
.htc .kv text.tip{text-anchor:start;fill:var(--muted)}
"""
