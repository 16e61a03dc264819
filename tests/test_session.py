"""TreeSession: branches by hand, and what a notebook and a terminal show of them."""

from __future__ import annotations

import re
import sys
import types
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from typing import Any

import pytest
from models import build, one_thread  # noqa: F401

from hf_tree_cache import (
    InvalidArgument,
    Sampling,
    SessionBranch,
    StaleBranch,
    Stop,
    TreeSession,
)
from hf_tree_cache.notebook import live
from hf_tree_cache.notebook.panels import compare_panel, in_bytes


class Letters:
    """A tokenizer of one letter a token: ids 3 to 28 are a to z, others a dot."""

    eos_token_id = None
    chat_template = None

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [1] * add_special_tokens + [ord(c) - 94 for c in text]}

    def decode(self, tokens: Sequence[int], **options: Any) -> str:
        return "".join(chr(94 + t) if t < 29 else "." for t in tokens if t > 2)


@pytest.fixture
def session() -> Iterator[TreeSession]:
    with TreeSession(build("llama"), Letters(), "start") as session:
        yield session


class Balanced(HTMLParser):
    """Every element that is opened is closed, in order."""

    VOID = ("meta", "br", "rect", "path")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def check_html(html: str) -> str:
    """It is well-formed and needs nothing from outside; its words."""
    Balanced(html)
    assert "<script" not in html
    assert not re.search(r"""(?:src|href)=|url\(|@import""", html)
    for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL):
        ET.fromstring(svg)
    return re.sub(r"<style>.*?</style>|<[^>]*>", "", html)


def test_the_design_example(session: TreeSession) -> None:
    left, right = session.root.fork(2)
    left.generate(max_new_tokens=64)
    assert len(left.logprobs) == 64
    assert left.text == Letters().decode(left.tokens[6:])
    assert left.logprob == pytest.approx(sum(left.logprobs))
    assert left.mean_logprob == pytest.approx(left.logprob / 64)
    right.prune()
    (back,) = left.fork(at=-20)
    assert back.tokens == left.tokens[:-20]
    back.generate(max_new_tokens=1)
    assert back.tokens[-1] != left.tokens[-20]  # an alternative, not the same again
    assert session.branches == [session.root, left, back]
    assert not right.is_live
    assert (len(left), len(back)) == (70, 51)


def test_several_go_on_together_and_stop_at_a_text(session: TreeSession) -> None:
    a, b, c = session.root.fork(3)
    before = session.stats.forwards
    session.generate([a, b], max_new_tokens=9)
    assert session.stats.forwards - before == 8
    assert c.text == ""
    assert a.tokens[6] != b.tokens[6]
    mark = c.fork()[0]
    heard: list[Any] = []
    session.generate(
        max_new_tokens=40, stop=Stop(tokens=list(range(29, 97))), on_token=heard.append
    )
    assert len(session.branches) == 5
    assert all(branch.text.endswith(".") or len(branch) == 49 for branch in (c, mark))
    assert {event.branch for event in heard} == {branch.handle for branch in session.branches}
    session.generate([a], stop=".", max_new_tokens=60)
    assert a.text.endswith(".") or len(a.text) > 60


def test_edit_and_continue_from_a_position_or_from_words(session: TreeSession) -> None:
    session.root.append("quickbrownfox")
    by_words = session.root.edit("brown", "red")
    by_position = session.root.edit(-3, "dog")
    assert by_words.text == "quickred"
    assert by_position.text == "quickbrowndog"
    assert session.root.text == "quickbrownfox"
    by_words.generate(max_new_tokens=2)
    assert len(by_words.text) == 10
    with pytest.raises(InvalidArgument, match="not in the text"):
        session.root.edit("white", "red")
    with pytest.raises(InvalidArgument, match="nothing to append"):
        session.root.edit(-3, "")
    assert len(session.branches) == 3


def test_words_that_begin_within_a_token_keep_its_head(smollm2: tuple[Any, Any]) -> None:
    with TreeSession(*smollm2, "Two cities:") as session:
        session.root.append(" Paris and Ürümqi, far away")
        edited = session.root.edit("rümqi", "ber-Lyon")
        assert edited.text == " Paris and Über-Lyon"
        assert session.root.edit("and", "or").text == " Paris or"


def test_branches_are_ranked_by_log_prob_or_by_what_you_say(session: TreeSession) -> None:
    branches = session.root.fork(4)
    session.generate(branches, max_new_tokens=5, sampling=Sampling(temperature=2.0))
    ranked = session.rank(branches=branches)
    assert [b.score for b in ranked] == sorted((b.mean_logprob for b in branches), reverse=True)
    ranked = session.rank(by=lambda text: text.count("."), branches=branches)
    assert ranked[0].score == max(b.text.count(".") for b in branches)
    assert f"score {ranked[0].score:.3g}" in check_html(ranked[0]._repr_html_())


def test_the_session_draws_itself(session: TreeSession) -> None:
    left, right = session.root.fork(2)
    left.name, right.name = "the <left> one", "right"
    session.generate([left, right], max_new_tokens=20)
    right.prune("worse")
    words = check_html(session._repr_html_())
    assert "the &lt;left&gt; one" in words
    assert "worse" in words
    assert "44 tokens computed" in words  # 6 + 2 x 19, the last ones pending
    text = str(session)
    assert repr(session) == text
    assert "the <left> one" in text
    assert "✗" in text
    assert "44 tokens computed, 40 generated" in text


def test_a_branch_shows_its_tokens_and_their_probabilities(session: TreeSession) -> None:
    session.root.generate(max_new_tokens=3)
    words = check_html(session.root._repr_html_())
    assert "prompt: 6 tokens" in words
    assert f"log-prob {session.root.logprob:.2f}" in words
    assert f"({100 * 2.718281828 ** session.root.logprobs[1]:.3g}%)" in session.root._repr_html_()
    assert repr(session.root).startswith("<branch 0: alive, 3 tokens, log-prob ")


def test_two_branches_stand_side_by_side(session: TreeSession) -> None:
    session.root.append("shared")
    left, right = session.root.fork(2)
    left.append("abcdefxyz")
    right.append("qbcdefxyzr")
    panel = session.compare(left, right)
    words = check_html(panel.html)
    assert "in common: 12 tokens … startshared" in words
    marked = re.findall(r'class="t\d mark"[^>]*>(.)</i>', panel.html)
    assert marked == ["a", "q", "r"]
    assert "abcdefxyz" in repr(panel)
    assert left.compare(right).html == panel.html
    other = TreeSession(build("llama"), Letters(), "x")
    with pytest.raises(InvalidArgument, match="of this session"):
        session.compare(left, other.root)
    other.close()


def test_a_branch_can_be_compared_with_itself_and_with_its_parent(session: TreeSession) -> None:
    session.root.generate(max_new_tokens=4)
    child = session.root.fork(at=-2)[0]
    for other in (session.root, child):
        check_html(session.root.compare(other).html)
    assert "8 tokens in common" in repr(compare_panel(session.root.view(), child.view(), None))


def test_kv_is_shown_block_by_block(session: TreeSession) -> None:
    branches = session.root.fork(3)
    session.generate(branches, max_new_tokens=40)
    panel = session.kv()
    check_html(panel.html)
    cache = session.runner.cache
    drawn = {int(block) for block in re.findall(r"block (\d+) ·", panel.html)}
    used = {block for node in cache.tree.nodes() for block in node.blocks}
    assert drawn == used
    assert f"{len(used)} blocks of 16 tokens" in repr(panel)
    dense = (3 * 45 + 6) * cache.token_bytes
    assert f"{in_bytes(dense)} unshared" in repr(panel)
    assert "read by 4 branches" in panel.html


@pytest.mark.parametrize(
    ("number", "shown"), [(0, "0 B"), (999, "999 B"), (1234, "1.2 kB"), (2.5e8, "250 MB")]
)
def test_bytes_are_short(number: float, shown: str) -> None:
    assert in_bytes(number) == shown


def test_a_session_without_anything_generated_can_be_drawn(session: TreeSession) -> None:
    session.root.fork(2)
    for html in (session._repr_html_(), session.kv().html, session.root._repr_html_()):
        check_html(html)
    assert "branch 0, branch 1, branch 2" in session._repr_html_()
    assert "branch 0" in str(session)


def test_a_session_of_token_ids() -> None:
    with TreeSession(build("llama"), None, [5, 6, 7]) as session:
        session.root.generate(max_new_tokens=3)
        tokens = session.root.tokens
        assert " ".join(map(str, tokens[3:])) in repr(session.root)
        check_html(session._repr_html_())


class FakeDisplay(types.ModuleType):
    """IPython.display, as far as the live view needs it: what each picture showed, in order."""

    def __init__(self) -> None:
        super().__init__("IPython.display")
        self.pictures: list[list[str]] = []

    def HTML(self, html: str) -> str:  # IPython's name
        return html

    def display(self, html: str, display_id: bool = False) -> Any:
        self.pictures.append([html])
        return types.SimpleNamespace(update=self.pictures[-1].append)


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch) -> tuple[FakeDisplay, Any]:
    shell = types.SimpleNamespace(kernel=object(), execution_count=1)
    fake, root = FakeDisplay(), types.ModuleType("IPython")
    root.get_ipython = lambda: shell  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", root)
    monkeypatch.setitem(sys.modules, "IPython.display", fake)
    monkeypatch.setattr(live, "LEAST", 0.0)
    monkeypatch.setattr(live, "SHARE", 1e9)
    return fake, shell


def test_a_notebook_follows_in_one_picture_a_cell(notebook: tuple[FakeDisplay, Any]) -> None:
    fake, shell = notebook
    with TreeSession(build("llama"), Letters(), "start") as session:
        assert fake.pictures == []
        session.root.generate(max_new_tokens=5)
        session.root.generate(max_new_tokens=2)
        session._ipython_display_()
        assert len(fake.pictures) == 1
        assert len(fake.pictures[0]) >= 8
        assert fake.pictures[0][-1] == session._repr_html_()
        assert len(set(fake.pictures[0])) > 5  # it moves
        shell.execution_count = 2
        session._ipython_display_()
        assert len(fake.pictures) == 2


def test_pictures_wait_so_that_drawing_takes_little_time(
    notebook: tuple[FakeDisplay, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake, _ = notebook
    monkeypatch.setattr(live, "LEAST", 1e9)
    with TreeSession(build("llama"), Letters(), "start") as session:
        session.root.generate(max_new_tokens=30)
        assert len(fake.pictures[0]) <= 2  # the first token, and the end


def test_a_terminal_is_left_alone(capsys: pytest.CaptureFixture[str], session: TreeSession) -> None:
    session.root.generate(max_new_tokens=5)
    assert capsys.readouterr().out == ""
    session._ipython_display_()
    assert "GenerationTree" in capsys.readouterr().out


CARELESS = {
    "an empty prompt": lambda s: TreeSession(s.runner.model, Letters(), []),
    "messages without a template": lambda s: s.add([{"role": "user", "content": "hi"}]),
    "a fork beyond the tip": lambda s: s.root.fork(at=7),
    "a branch of nobody": lambda s: s.generate([SessionBranch(None, 0)]),
    "a handle in place of a branch": lambda s: s.generate([0]),
    "no tokens": lambda s: s.root.generate(max_new_tokens=0),
    "train mode": lambda s: TreeSession(build("llama").train(), Letters(), "a"),
    "an empty stop": lambda s: s.root.generate(stop=""),
}


@pytest.mark.parametrize("use", CARELESS.values(), ids=CARELESS)
def test_careless_use_is_refused_and_harms_nothing(session: TreeSession, use: Any) -> None:
    with pytest.raises(InvalidArgument):
        use(session)
    session.root.generate(max_new_tokens=2)
    assert len(session.root) == 8


def test_a_pruned_branch_says_so(session: TreeSession) -> None:
    child = session.root.fork()[0]
    child.generate(max_new_tokens=3)
    child.prune("dull")
    for use in (child.generate, child.fork, child.prune, child.finish):
        with pytest.raises(StaleBranch, match=r"pruned \(dull\)"):
            use()
    assert len(child.text) == 3
    check_html(child._repr_html_())
    assert "pruned (dull)" in repr(child)
