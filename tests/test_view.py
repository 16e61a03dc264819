from __future__ import annotations

import re
from collections.abc import Callable
from html import unescape
from html.parser import HTMLParser

import pytest

from hf_tree_cache.errors import InvalidArgument
from hf_tree_cache.generation import view_html
from hf_tree_cache.generation.record import GenerationTree
from hf_tree_cache.generation.view_text import shorten

VOID_TAGS = {"rect", "path"}


class Bytes:
    """A tokenizer whose tokens are UTF-8 bytes, so that characters span tokens."""

    def decode(self, token_ids: list[int]) -> str:
        return bytes(token_ids).decode("utf-8", errors="replace")


class Words:
    """A tokenizer that drops the space in front of a text, as sentencepiece ones do."""

    def __init__(self, *words: str) -> None:
        self.words = words

    def decode(self, token_ids: list[int]) -> str:
        return "".join(self.words[i % len(self.words)] for i in token_ids).removeprefix(" ")


class Page(HTMLParser):
    """Checks that tags nest, and collects what a test asks about."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.depth = 0
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID_TAGS or tag == "rect":
            self.open.append(tag)
            self.depth = max(self.depth, len(self.open))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1] not in ("style", "title"):
            self.text.append(data)

    def all_text(self) -> str:
        return "".join(self.text)


def grow(tree: GenerationTree, node: int, tokens: bytes | list[int], logprob: float = -0.2) -> None:
    for token in tokens:
        tree.append(node, token, logprob)


def small_tree() -> GenerationTree:
    tree = GenerationTree(Bytes())
    left, right = tree.fork(tree.open_branch(tree.add_prompt(list(b"17 * 23 ="))), 2)
    grow(tree, left, b" 391")
    grow(tree, right, b" 381", -1.5)
    third = tree.fork_at(left, 11)
    grow(tree, third, b"40 \n0")
    tree.finish(left, "eos")
    tree.prune(right, "below -1.2")
    return tree


def chain(depth: int) -> GenerationTree:
    tree = GenerationTree()
    node = tree.open_branch(tree.add_prompt([1]))
    for token in range(depth):
        tree.append(node, token, -0.1)
        (node,) = tree.fork(node, 1)
    return tree


def comb(depth: int) -> GenerationTree:
    tree = GenerationTree()
    node = tree.open_branch(tree.add_prompt([1]))
    for token in range(depth):
        tree.append(node, token, -0.1)
        node, dropped = tree.fork(node, 2)
        tree.append(dropped, token, -3.0)
        tree.prune(dropped, "low")
    return tree


def star(branches: int, length: int = 3) -> GenerationTree:
    tree = GenerationTree()
    for leaf in tree.fork(tree.open_branch(tree.add_prompt([1, 2])), branches):
        grow(tree, leaf, list(range(length)))
        tree.finish(leaf, "eos")
    return tree


def prompts(count: int) -> GenerationTree:
    tree = GenerationTree()
    for i in range(count):
        grow(tree, tree.open_branch(tree.add_prompt([i, i])), [i])
    return tree


SHAPES: dict[str, Callable[[], GenerationTree]] = {
    "no prompt": GenerationTree,
    "a prompt alone": lambda: prompts_without_branches(),
    "a small tree": small_tree,
    "a chain of 2000": lambda: chain(2000),
    "a comb of 2000": lambda: comb(2000),
    "a star of 1000": lambda: star(1000),
    "1500 prompts": lambda: prompts(1500),
    "an empty prompt": lambda: empty_prompt(),
}


def prompts_without_branches() -> GenerationTree:
    tree = GenerationTree()
    tree.add_prompt([1, 2, 3])
    return tree


def empty_prompt() -> GenerationTree:
    tree = GenerationTree()
    for leaf in tree.fork(tree.open_branch(tree.add_prompt([])), 2):
        grow(tree, leaf, [1])
    return tree


def test_the_text_of_a_small_tree() -> None:
    assert str(small_tree()).splitlines() == [
        "GenerationTree: 1 prompt, 3 branches (1 alive, 1 finished, 1 pruned), "
        "13 tokens (15 unshared)",
        "                tok   logp",
        "◆ 17 * 23 =       9",
        "├─┬  3            2  -0.20",
        "│ ├─✓ 91          2  -0.20  eos",
        "│ └─● 40 ⏎0       5  -0.20",
        "└─✗  381          4  -1.50  below -1.2",
    ]


def test_without_a_tokenizer_token_ids_are_shown() -> None:
    tree = small_tree()
    tree.tokenizer = None
    assert "✓  57 49 " in tree.to_text()
    assert " 57" in Page(tree.to_html()).all_text()
    assert "✓ 91" in tree.to_text(Bytes())


def test_an_only_child_stands_below_its_parent_at_the_same_indentation() -> None:
    lines = str(chain(2)).splitlines()[2:]
    assert [line[:2] for line in lines] == ["◆ ", "┬ ", "┬ ", "● "]


@pytest.mark.parametrize("width", [40, 60, 100])
@pytest.mark.parametrize("shape", SHAPES)
def test_no_line_of_text_is_wider_than_asked(shape: str, width: int) -> None:
    tree = SHAPES[shape]()
    lines = tree.to_text(max_width=width, max_nodes=300).splitlines()
    rows = [line for line in lines[1:] if "left out" not in line]
    assert max(map(len, rows), default=0) <= width
    assert len(lines) <= 2 * 300 + 4


def test_wide_characters_count_as_two_columns() -> None:
    tree = GenerationTree(Words("数学", "é", "abc"))
    leaf = tree.open_branch(tree.add_prompt([2]))
    grow(tree, leaf, [0] * 80 + [1] * 5)
    prompt, branch = tree.to_text(max_width=60).splitlines()[2:]
    assert branch.index("…") < 20
    assert len(branch) + branch.count("数") + branch.count("学") == 59  # half a character is none
    assert prompt.endswith("1")


@pytest.mark.parametrize(
    ("text", "width", "expected"),
    [
        ("abcdef", 6, "abcdef"),
        ("abcdefg", 6, "abc…fg"),
        ("abcdefg", 3, "a…g"),
        ("abcdefg", 1, "…"),
        ("数学数学", 8, "数学数学"),
        ("数学数学", 7, "数…学"),
        ("x" * 10_000 + "y", 5, "xx…xy"),
        ("", 4, ""),
    ],
)
def test_text_is_shortened_in_its_middle(text: str, width: int, expected: str) -> None:
    assert shorten(text, width) == expected


def test_text_cannot_break_a_line_or_steer_the_terminal() -> None:
    tree = GenerationTree(Words("a\nb", "\tc", "\x1b[2J", "\u202ed", "\u2028", "\ud800", "\x00"))
    leaf = tree.open_branch(tree.add_prompt([0]))
    grow(tree, leaf, [0, 1, 2, 3, 4, 5, 6])
    tree.finish(leaf, "stop\n\x1b[0m")
    text = tree.to_text()
    assert len(text.splitlines()) == 4
    assert r"a⏎b⇥c\x1b[2J\u202ed \ud800\x00" in text
    assert r"stop⏎\x1b[0m" in text
    tree.to_html().encode()


def test_a_node_of_spaces_can_be_seen() -> None:
    tree = GenerationTree(Words("a", "  "))
    grow(tree, tree.open_branch(tree.add_prompt([0])), [1, 1])
    assert "● ␣␣␣␣ " in tree.to_text()


def test_a_node_keeps_the_space_in_front_of_its_first_word() -> None:
    tree = GenerationTree(Words(" two", " words"))
    leaf = tree.open_branch(tree.add_prompt([0, 1]))
    grow(tree, leaf, [1, 0])
    assert "◆ two words" in tree.to_text()
    assert "●  words two" in tree.to_text()
    assert ">two words</span>" in tree.to_html()
    assert "> words</i>" in tree.to_html()
    assert "> two</i>" in tree.to_html()


@pytest.mark.parametrize("render", [GenerationTree.to_text, GenerationTree.to_html])
def test_what_is_left_out_is_counted(render: Callable[..., str]) -> None:
    text = unescape(re.sub(r"<[^>]*>", "", render(star(500), max_nodes=100)))
    assert "… 401 more nodes" in text
    assert "… 401 of 501 nodes left out (max_nodes=100)" in text
    assert "left out" not in render(star(99), max_nodes=100)
    assert "1,490 more prompts" in render(prompts(1500), max_nodes=10)
    assert "… 1 more node" in render(chain(2), max_nodes=3)


def test_left_out_nodes_come_after_the_drawn_ones() -> None:
    lines = star(5).to_text(max_nodes=5).splitlines()
    assert [line[:4] for line in lines[3:]] == ["├─✓ "] * 4 + ["└─… ", "… 1 "]


@pytest.mark.parametrize(
    "arguments", [{"max_width": 39}, {"max_nodes": 0}, {"max_width": -1, "max_nodes": -1}]
)
def test_impossible_sizes_are_refused(arguments: dict[str, int]) -> None:
    with pytest.raises(InvalidArgument, match="max_nodes >= 1"):
        small_tree().to_text(**arguments)
    with pytest.raises(InvalidArgument, match="max_nodes=0"):
        small_tree().to_html(max_nodes=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_html_is_well_formed_bounded_and_needs_nothing_from_outside(shape: str) -> None:
    tree = SHAPES[shape]()
    html = tree.to_html()
    page = Page(html)
    assert len(html.encode()) < 1_500_000
    assert page.depth < 100
    assert "script" not in page.tags
    names = {name for name, _ in page.attributes}
    assert not names & {"id", "href", "src", "onclick"}
    assert "url(" not in html
    assert "http" not in html
    assert "@import" not in html
    assert html == tree._repr_html_()


def test_without_its_style_html_shows_the_text_alone() -> None:
    tree = small_tree()
    html = tree.to_html()
    plain = re.search(r'<pre class="plain">(.*?)</pre>', html, re.DOTALL)
    assert plain is not None and unescape(plain[1]) == tree.to_text()
    assert html.count('<div class="view" hidden style="display:none">') == 1
    # The style turns both around; bootstrap and Jupyter hide what is hidden with force.
    assert ".htc>.plain{display:none!important}" in html
    assert ".htc>.view{display:block!important}" in html


@pytest.mark.parametrize("shape", ["a chain of 2000", "a comb of 2000", "a star of 1000"])
def test_html_draws_each_node_once(shape: str) -> None:
    html = SHAPES[shape]().to_html()
    drawn = re.findall(r'<span class="id">#(\d+)</span>', html)
    assert len(drawn) == len(set(drawn)) == 1000


def test_the_size_stays_bounded_with_long_tokens_and_reasons() -> None:
    tree = GenerationTree(Words(*(f"{'<&' * 500}{i}" for i in range(7))))
    for _ in range(2):
        prompt = tree.add_prompt(list(range(5000)))
        for leaf in tree.fork(tree.open_branch(prompt), 600):
            grow(tree, leaf, list(range(40)))
            tree.prune(leaf, "because " * 100)
    assert len(tree.to_html().encode()) < 4_000_000
    tree.tokenizer = Words(" unbelievable", " internationalisation")
    assert len(tree.to_html().encode()) < 1_500_000


def test_token_text_and_reasons_are_escaped() -> None:
    attack = "<script>alert('1')</script>\"><img src=x onerror=alert(2)>"
    tree = GenerationTree(Words(attack[:30], attack[30:]))
    for leaf in tree.fork(tree.open_branch(tree.add_prompt([0, 1])), 2):
        grow(tree, leaf, [0, 1])
        tree.prune(leaf, attack)
    page = Page(tree.to_html())
    assert not {"script", "img"} & set(page.tags)
    assert page.all_text().count("<script>alert('1')</script>") >= 3


def test_a_token_shows_its_text_id_and_log_prob_and_is_tinted_by_it() -> None:
    tree = GenerationTree(Words("yes", "no"))
    leaf = tree.open_branch(tree.add_prompt([0]))
    tree.append(leaf, 0, -0.01)
    tree.append(leaf, 1, -2.0)
    tree.append(leaf, 1, float("-inf"))
    tree.append(leaf, 0, float("nan"))
    html = tree.to_html()
    assert '<i class=t0 title="yes&#10;-0.01 (99%) · id 0">yes</i>' in html
    assert '<i class=t4 title="no&#10;-2.00 (13.5%) · id 1">no</i>' in html
    assert '<i class=t6 title="no&#10;-inf (0%) · id 1">no</i>' in html
    assert '<i class=t0 title="yes&#10;nan (?) · id 0">yes</i>' in html


def test_a_character_of_several_tokens_is_one_piece() -> None:
    tree = GenerationTree(Bytes())
    grow(tree, tree.open_branch(tree.add_prompt([65])), "é🙂a".encode())
    html = tree.to_html()
    ids = " ".join(map(str, "🙂".encode()))
    assert f'title="🙂&#10;-0.80 (44.9%) · id {ids}">🙂</i>' in html
    assert "\ufffd" not in html


def test_bytes_that_are_no_character_do_not_swallow_the_rest() -> None:
    tree = GenerationTree(Bytes())
    grow(tree, tree.open_branch(tree.add_prompt([65])), b"\xff" * 40 + b"end")
    text = Page(tree.to_html()).all_text()
    assert "end" in text
    # In the view, and in the text that stands in for it.
    assert text.count("\ufffd") == 2 * 40


def test_a_long_node_shows_its_first_and_last_tokens() -> None:
    tree = GenerationTree()
    grow(tree, tree.open_branch(tree.add_prompt([7])), list(range(10_000, 15_000)))
    text = Page(tree.to_html()).all_text()
    assert " 10000 10001 " in text
    assert " 14998 14999" in text
    assert "… 4,700 tokens …" in text
    assert "12500" not in text
    assert "· id 14999" in tree.to_html()


def test_short_nodes_leave_their_share_of_the_tokens_to_long_ones() -> None:
    tree = GenerationTree()
    for i, leaf in enumerate(tree.fork(tree.open_branch(tree.add_prompt([1])), 300)):
        grow(tree, leaf, [7] * (i % 100))
    assert 5000 < tree.to_html().count("· id 7") <= 6000
    for leaf in tree.leaves()[:200]:
        grow(tree, leaf, [7] * 400)
    assert 5000 < tree.to_html().count("· id 7") <= 6000


def test_a_small_tree_starts_unfolded_and_a_large_one_folded_below_its_first_levels() -> None:
    small, large = small_tree().to_html(), comb(400).to_html()
    assert small.count("<details") == small.count('<details class="n" open>') == 2
    assert large.count("<details") == 400
    assert 10 < large.count(" open>") < 60
    assert star(500).to_html().count(" open>") == 1


def test_what_nests_too_deep_goes_on_further_down_in_the_same_order() -> None:
    tree = GenerationTree()
    tops = tree.fork(tree.open_branch(tree.add_prompt([1])), 2)
    for node in tops:
        for _ in range(40):
            grow(tree, node, [5])
            node, _other = tree.fork(node, 2)
    html = tree.to_html()
    cut = re.findall(r"↴ #(\d+) continues below", html)
    continued = re.findall(r"↳ continues #(\d+)", html)
    assert len(cut) == 4
    assert sorted(cut) == sorted(continued)
    assert cut[0] == continued[0]
    assert html.index(f"↳ continues #{cut[0]}<") < html.index(f"↳ continues #{cut[1]}<")


def test_the_overview_draws_a_line_per_branch_and_is_left_out_for_one_branch() -> None:
    assert small_tree().to_html().count("<rect") == 5
    assert "<svg" not in chain(3).to_html()
    states = re.findall(r'<rect class="(\w+)"', small_tree().to_html())
    assert states == ["prompt", "forked", "finished", "alive", "pruned"]


def test_themes_of_notebooks_override_the_one_of_the_browser() -> None:
    style = small_tree().to_html()
    assert "@media (prefers-color-scheme:dark)" in style
    assert 'body:not([data-jp-theme-light="true"]):not(.vscode-light):not(' in style
    for theme in ('body[data-jp-theme-light="false"] .htc', "body.vscode-dark .htc"):
        assert theme in style


def test_every_style_rule_stays_inside_the_view() -> None:
    style = re.sub(r"@media[^{]*\{(.*?\})\}", r"\1", view_html._STYLE, flags=re.S)
    selectors = re.findall(r"([^{}]+)\{[^{}]*\}", style)
    assert len(selectors) > 40
    assert all(".htc" in part for selector in selectors for part in selector.split(","))
