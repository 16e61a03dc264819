"""TreeSession: branches by hand, in a notebook or a terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..errors import InvalidArgument
from ..generation.options import Branch, RunnerStats, Sampling, Stop
from ..generation.output import BranchEvent
from ..generation.record import GenerationTree
from ..generation.runner import BranchRunner
from ..generation.text import CONTEXT, Prompt, TextStream
from ..generation.view_html import render_html
from ..generation.view_text import render_text
from ..integration.cache import TreeCache
from .live import LiveView, notebook_shell
from .panels import (
    BranchView,
    Panel,
    branch_panel,
    compare_panel,
    counted,
    decoded,
    in_bytes,
    kv_panel,
)

Scorer = Callable[[str], float]
"""Takes the text that a branch generated."""


class TreeSession:
    """A prompt and the branches you grow from it.

    ::

        session = TreeSession(model, tokenizer, "The capital of France is")
        left, right = session.root.fork(2)
        left.generate(max_new_tokens=64)
        left.text, left.logprob
        right.prune()
        back = left.fork(at=-20)[0]            # another way from 20 tokens ago
        session.compare(left, back)

    In Jupyter and VS Code the session draws itself, and follows what is generated in the cell that
    generates it; in a terminal it prints as text.

    Args:
        model: a decoder model of transformers in eval mode.
        tokenizer: its tokenizer; without one prompts are token ids, and ids are shown.
        prompt: a text, a list of token ids or a list of chat messages; :meth:`add` takes more.
        sampling: how tokens are drawn; default what the model's generation config says.
        seed: makes samples repeat; None draws anew each time.
        cache: an empty TreeCache with bounds of yours.
        max_branches: most live branches.
        live: follow generation in a notebook.

    Raises:
        InvalidArgument: an empty prompt, a model in train mode, messages without a chat template.

    Attributes:
        runner: what does the work; for what has no place here.
        root: the branch of the first prompt.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        prompt: Prompt,
        *,
        sampling: Sampling | None = None,
        seed: int | None = 0,
        cache: TreeCache | None = None,
        max_branches: int | None = None,
        live: bool = True,
    ) -> None:
        self.runner = BranchRunner(
            model,
            tokenizer,
            cache=cache,
            sampling=sampling,
            seed=seed,
            max_branches=max_branches,
        )
        self._branches: dict[Branch, SessionBranch] = {}
        self._view = LiveView(self._repr_html_, notebook_shell() if live else None)
        self.root = self.add(prompt)

    @property
    def branches(self) -> list[SessionBranch]:
        """Live branches, oldest first."""
        return [self._branches[branch] for branch in self.runner.branches]

    @property
    def tree(self) -> GenerationTree:
        """What happened, as data."""
        return self.runner.tree

    @property
    def stats(self) -> RunnerStats:
        """What it cost."""
        return self.runner.stats

    def add(self, prompt: Prompt) -> SessionBranch:
        """Another prompt; what it has in common with the others is not shared."""
        return self._wrap(self.runner.add_prompts([prompt]))[0]

    def generate(
        self,
        branches: Sequence[SessionBranch] | None = None,
        *,
        max_new_tokens: int = 64,
        stop: Stop | str | Sequence[str] = (),
        sampling: Sampling | None = None,
        on_token: Callable[[BranchEvent], None] | None = None,
    ) -> None:
        """Branches go on together; a notebook follows.

        Ctrl-C goes through; the tokens so far stay.

        Args:
            branches: default all live ones.
            max_new_tokens: most tokens of each.
            stop: texts that end a branch's turn, or a :class:`Stop`.
            sampling: how tokens are drawn, default the session's.
            on_token: told of every token, with its text.

        Raises:
            StaleBranch: one of them was pruned or finished.
            InvalidArgument: a branch of another session, a count below 1.
            OutOfBlocks: a bounded cache is full.
        """
        chosen = self.branches if branches is None else list(branches)
        handles = [self._own("generate", branch) for branch in chosen]
        if not isinstance(stop, Stop):
            stop = Stop(strings=[stop] if isinstance(stop, str) else list(stop))

        def follow(event: BranchEvent) -> None:
            if on_token is not None:
                on_token(event)
            self._view.follow()

        try:
            self.runner.extend(
                handles,
                max_new_tokens=max_new_tokens,
                stop=stop,
                sampling=sampling,
                on_token=follow,
            )
        finally:
            self._view.show()

    def rank(
        self, by: Scorer | None = None, branches: Sequence[SessionBranch] | None = None
    ) -> list[SessionBranch]:
        """Branches by score, the best first; each remembers its score.

        Args:
            by: scores a branch's text; default the mean log-prob of its tokens.
            branches: default all live ones.
        """
        chosen = self.branches if branches is None else list(branches)
        return sorted(chosen, key=lambda branch: branch.rate(by), reverse=True)

    def compare(self, left: SessionBranch, right: SessionBranch) -> Panel:
        """Two branches side by side: what they share folded, where they differ marked."""
        self._own("compare", left), self._own("compare", right)
        return compare_panel(left.view(), right.view(), self.runner.tokenizer)

    def kv(self) -> Panel:
        """The K/V as stored: blocks, ref counts, bytes, and what dense caches would take."""
        standing: dict[Any, list[str]] = {}
        lengths = []
        for branch in self.branches:
            cached, length = self.runner.stored(branch.handle)
            standing.setdefault(cached, []).append(branch.name)
            lengths.append(length)
        return kv_panel(self.runner.cache, standing, lengths)

    def close(self) -> None:
        """Give the model back as it was."""
        self.runner.close()

    def __enter__(self) -> TreeSession:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __str__(self) -> str:
        text = render_text(self.tree, self.runner.tokenizer, labels=self._labels())
        return f"{text}\n{self._costs()}"

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        footer = f'<div class="more">{self._costs()}</div>'
        return render_html(self.tree, self.runner.tokenizer, labels=self._labels(), footer=footer)

    def _ipython_display_(self) -> None:
        # What generate has just drawn in this cell is drawn anew, not twice.
        view = self._view if self._view.is_shown else LiveView(self._repr_html_, notebook_shell())
        if notebook_shell() is None:
            print(self)
        else:
            view.show()

    def _costs(self) -> str:
        cache, stats = self.runner.cache, self.stats
        dense = cache.dense_bytes(self.runner.stored(b)[1] for b in self.runner.branches)
        return (
            f"{stats.tokens_computed:,} tokens computed, {stats.tokens_generated:,} generated · "
            f"K/V {in_bytes(cache.kv_bytes)} in "
            f"{counted(cache.tree.allocator.num_used, 'block')}, {in_bytes(dense)} unshared"
        )

    def _labels(self) -> dict[int, str]:
        labels: dict[int, list[str]] = {}
        for branch in self.branches:
            labels.setdefault(self.runner.node(branch.handle), []).append(branch.name)
        return {
            node: ", ".join(names[:4]) + (f" and {len(names) - 4} more" if names[4:] else "")
            for node, names in labels.items()
        }

    def _wrap(self, handles: Sequence[Branch]) -> list[SessionBranch]:
        new = [SessionBranch(self, handle) for handle in handles]
        self._branches.update({branch.handle: branch for branch in new})
        return new

    def _own(self, call: str, branch: SessionBranch) -> Branch:
        if not isinstance(branch, SessionBranch) or branch.session is not self:
            raise InvalidArgument(
                f"{call}({type(branch).__name__}): give a branch of this session: session.root, or "
                "what fork, edit and add return."
            )
        return branch.handle


class SessionBranch:
    """One branch of a :class:`TreeSession`.

    Attributes:
        session: whose it is.
        handle: its id in ``session.runner``.
        name: shown in the views; give it one of your own.
        score: what it was rated last.
    """

    def __init__(self, session: TreeSession, handle: Branch) -> None:
        self.session = session
        self.handle = handle
        self.name = f"branch {handle}"
        self.score: float | None = None

    @property
    def text(self) -> str:
        """What it generated and was given, without the prompt."""
        return self.session.runner.text(self.handle)

    @property
    def tokens(self) -> list[int]:
        """Token ids, prompt included."""
        return self.session.runner.tokens(self.handle)

    @property
    def logprobs(self) -> list[float]:
        """Log-prob of every token behind the prompt, under the model."""
        return self.session.runner.logprobs(self.handle)

    @property
    def logprob(self) -> float:
        """Their sum."""
        return self.session.runner.logprob(self.handle)

    @property
    def mean_logprob(self) -> float:
        """Their mean; 0 before the first token."""
        logprobs = self.logprobs
        return sum(logprobs) / len(logprobs) if logprobs else 0.0

    @property
    def is_live(self) -> bool:
        """Whether it can go on."""
        return not self.session.runner.ended(self.handle)

    def __len__(self) -> int:
        """Tokens, prompt included."""
        return self.session.runner.length(self.handle)

    def fork(
        self, count: int = 1, *, at: int | None = None, distinct: bool = True
    ) -> list[SessionBranch]:
        """Branches that share this one's first ``at`` tokens; this one stays as it is.

        Args:
            at: tokens to share, prompt included; default all; negative counts back from the tip.
            distinct: their first tokens will differ from each other's and from those that were
                tried from there.

        Raises:
            StaleBranch: it was pruned or finished.
            InvalidArgument: ``at`` beyond its tokens, a negative count.
        """
        session = self.session
        made = session.runner.fork(self.handle, count, at=at, distinct=distinct)
        return session._wrap(made)

    def generate(self, **options: Any) -> None:
        """Go on; options as for :meth:`TreeSession.generate`."""
        self.session.generate([self], **options)

    def append(self, text: str | Sequence[int]) -> None:
        """Go on with given text or tokens."""
        self.session.runner.append(self.handle, text)

    def edit(self, at: int | str, text: str | Sequence[int]) -> SessionBranch:
        """A branch that is as this one up to ``at`` and then goes on with ``text``.

        Args:
            at: tokens to keep, as for :meth:`fork`; or words of this branch's text, in whose place
                ``text`` is put.
            text: what comes there.

        Raises:
            InvalidArgument: words that are not in the text, nothing to append.
        """
        if isinstance(at, str):
            at, lead = self._position_of(at)
            if lead:
                if not isinstance(text, str):
                    raise InvalidArgument("edit: those words begin within a token; give text.")
                text = lead + text
        edited = self.fork(at=at, distinct=False)[0]
        try:
            edited.append(text)
        except BaseException:
            edited.prune()
            raise
        return edited

    def rate(self, by: Scorer | None = None) -> float:
        """Score the branch, and remember the score.

        Args:
            by: takes its text; default the mean log-prob of its tokens.
        """
        self.score = float(self.mean_logprob if by is None else by(self.text))
        return self.score

    def compare(self, other: SessionBranch) -> Panel:
        """See :meth:`TreeSession.compare`."""
        return self.session.compare(self, other)

    def prune(self, reason: str = "") -> None:
        """Give it up and free what only it held."""
        self.session.runner.prune(self.handle, reason)

    def finish(self, reason: str = "") -> None:
        """Keep it as a result and free what only it held."""
        self.session.runner.finish(self.handle, reason)

    def view(self) -> BranchView:
        """It as data for a panel."""
        runner = self.session.runner
        node = self.session.tree.nodes[runner.node(self.handle)]
        state = f"finished ({node.reason})" if node.state == "finished" else "alive"
        state = runner.ended(self.handle) or state
        return BranchView(self.name, self.tokens, self.logprobs, state, self.score)

    def __repr__(self) -> str:
        view = self.view()
        text = decoded(
            self.session.runner.tokenizer, view.tokens[: view.start], view.tokens[view.start :]
        )
        return f"<{self.name}: {', '.join(fact for _, fact, _ in view.facts)}> {text}"

    def _repr_html_(self) -> str:
        return branch_panel(self.view(), self.session.runner.tokenizer, repr(self)).html

    def _position_of(self, words: str) -> tuple[int, str]:
        """(tokens before ``words``, the characters between the last of these and ``words``)."""
        tokenizer, tokens = self.session.runner.tokenizer, self.tokens
        start = len(tokens) - len(self.logprobs)
        offset = self.text.find(words)
        if offset < 0 or not words:
            raise InvalidArgument(
                f"edit({words!r}): these words are not in the text of {self.name}: "
                f"{self.text[:80]!r}."
            )
        stream = TextStream(tokenizer, tokens[max(0, start - CONTEXT) : start])
        position, known = start, 0
        for i, token in enumerate(tokens[start:], start):
            stream.push(token)
            if len(stream.text) > offset:
                break
            # Half a letter is no place to cut.
            if stream.is_whole:
                position, known = i + 1, len(stream.text)
        return position, self.text[known:offset]
