"""BranchRunner: any set of branches of one cache goes on together; all others stay held."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from ..errors import InvalidArgument, UnsupportedModel
from ..integration.adapters import active_adapters
from ..integration.cache import TreeCache
from ..integration.enable import base_of, borrow_tree_attention, is_enabled
from ..memory.tree import Branch as CacheBranch
from .extension import Extension, Processor
from .frontier import Frontier
from .interrupt import uninterrupted
from .ledger import BranchState, Ledger
from .options import Branch, RunnerStats, Sampling, Stop, Turn
from .output import BranchEvent
from .processors import BranchingProcessor
from .record import GenerationTree
from .text import Prompt, decode_after, encode_prompt, encode_text


class BranchRunner:
    """Branches of a model that grow together, in any number, of any length, in any order.

    ::

        runner = BranchRunner(model, tokenizer, seed=0)
        root, = runner.add_prompts(["2 + 2 ="])
        children = runner.fork(root, 4)
        turns = runner.extend(children, max_new_tokens=32, stop=Stop(strings=["\\n"]))
        again, = runner.fork(children[0], at=-8)        # an alternative from 8 tokens ago

    What branches share is computed and stored once: a prompt and the beginnings of prompts, what
    stands before a fork, and also the tokens after it until two branches draw different ones. A
    branch that is not extended is held in the cache and costs nothing.

    Tree attention is enabled on the model with the first computation; :meth:`close`, or leaving a
    ``with`` block, gives the model back as it was.

    Args:
        model: a decoder model of transformers (or PEFT around one), in eval mode.
        tokenizer: for prompts and stop strings in words, and for ``text``.
        cache: an empty TreeCache with bounds or a backend of your choice; default a new one that
            keeps every token in layers with a window, too (``backtrack=None``).
        sampling: of branches that are extended without one; default the generation config's.
        seed: makes samples reproducible; default torch's global generator, as ``generate`` has it.
        processors: logits processors that see every step of every branch before it is sampled, one
            row a branch. A :class:`BranchingProcessor` is told of forks and prunes, so it can keep
            a state for each branch; its own forks and prunes are refused.
        max_branches: most live branches at a time.

    Raises:
        InvalidArgument: a model in train mode, a cache with branches, ``max_branches`` below 1.
        UnsupportedModel: an encoder-decoder, or a model without a K/V cache to share.

    Attributes:
        cache: where the K/V are. Read it; it changes through the runner only.
        tree: what happened, as data.
        stats: what it cost.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        cache: TreeCache | None = None,
        sampling: Sampling | None = None,
        seed: int | None = None,
        processors: Sequence[Processor] = (),
        max_branches: int | None = None,
    ) -> None:
        base = base_of(model)
        if not isinstance(base, PreTrainedModel):
            raise InvalidArgument(
                f"BranchRunner({type(model).__name__}): expected a transformers model."
            )
        if base.config.is_encoder_decoder:
            raise UnsupportedModel(
                f"BranchRunner: {type(base).__name__} is an encoder-decoder; use tree_generate."
            )
        if max_branches is not None and max_branches < 1:
            raise InvalidArgument(f"BranchRunner(max_branches={max_branches}): give at least 1.")
        self.model = base
        self.tokenizer = tokenizer
        # Forks at any token are what a runner is for.
        self.cache = TreeCache(base.config, backtrack=None) if cache is None else cache
        if self.cache.tree.branches:
            raise InvalidArgument(
                f"BranchRunner(cache=...): this cache holds {len(self.cache.tree.branches)} "
                "branches already, of which the runner knows nothing. Pass an empty one."
            )
        self.cache.configure(base.config)
        self.tree = GenerationTree(tokenizer)
        self.stats = RunnerStats()
        self.sampling = sampling or Sampling.of(base.generation_config)
        self.processors = list(processors)
        self.max_branches = max_branches
        self._seed = seed
        self._generator: torch.Generator | None = None
        self._give_back: Callable[[], None] | None = None  # tree attention
        self._ledger = Ledger(self.tree)
        self._frontier = Frontier(base, self.cache, self.stats)
        self._check_mode()

    @property
    def branches(self) -> list[Branch]:
        """Live branches, oldest first."""
        return self._ledger.live

    def add_prompts(self, prompts: Sequence[Prompt]) -> list[Branch]:
        """One branch for each prompt, all computed now; equal beginnings once.

        Args:
            prompts: each a text, a list of token ids, or a list of chat messages.

        Raises:
            InvalidArgument: one prompt in place of a list, an empty prompt, no tokenizer or chat
                template where one is needed.
            OutOfBlocks: no room; nothing was added.
        """
        if isinstance(prompts, (str, torch.Tensor)) or not isinstance(prompts, Sequence):
            raise InvalidArgument(
                f"add_prompts({type(prompts).__name__}): give a list of prompts, [prompt] for one."
            )
        encoded = [encode_prompt(prompt, self.tokenizer) for prompt in prompts]
        if not encoded:
            return []
        self._check_room("add_prompts", len(encoded))
        with self._working():
            tips = self._frontier.prefill(encoded)
            self.stats.prompt_tokens += sum(map(len, encoded))
            roots: dict[tuple[int, ...], int] = {}
            new = []
            for tokens, tip in zip(encoded, tips, strict=True):
                key = tuple(tokens)
                if key not in roots:
                    roots[key] = self.tree.add_prompt(tokens)
                new.append(self._ledger.add_prompt(roots[key], tip).branch)
        self._note_peak()
        return new

    def fork(
        self, branch: Branch, count: int = 1, *, at: int | None = None, distinct: bool = False
    ) -> list[Branch]:
        """``count`` branches that share the first ``at`` tokens of ``branch``, which goes on too.

        Nothing is computed or copied.

        Args:
            at: tokens to share, prompt included; default all; negative counts back from the tip.
            distinct: their first tokens will differ from each other's, and from the one that any
                other branch has gone on with from there.

        Raises:
            StaleBranch: ``branch`` has ended.
            InvalidArgument: a count below 0, ``at`` outside of the branch, ``max_branches``.
            HistoryFreed: an earlier token, beyond the ``backtrack`` of the cache.
            UnsupportedModel: an earlier token of a model with linear-attention states.
        """
        parent = self._ledger.get_live("fork", branch)
        assert parent.tip is not None
        if count < 0:
            raise InvalidArgument(f"fork({branch}, count={count}): give 0 or more.")
        length = parent.length
        position = length if at is None else at + length if at < 0 else at
        if not 1 <= position <= length:
            raise InvalidArgument(
                f"fork({branch}, at={at}): the branch has {length} tokens, prompt included; give "
                f"1 to {length}, or {1 - length} to -1 from the tip."
            )
        self._check_room("fork", count)
        if not count:
            return []
        tip = parent.tip
        if position < length:
            tokens = self._ledger.tokens(parent)
            tip = self._frontier.fork_at(tip, position, tokens[position - 1], {tokens[position]})
        children = [self._ledger.fork(parent, tip, position) for _ in range(count)]
        for child in children:
            child.apart = distinct
        self.stats.forks += count
        made = [child.branch for child in children]
        for processor in self._following():
            processor.on_fork(branch, made)
        self._note_peak()
        return made

    def prune(self, branch: Branch, reason: str = "") -> None:
        """Give a branch up: K/V that only it held are freed. Its tokens can still be read.

        Raises:
            StaleBranch: it has ended before.
        """
        self._end("prune", branch, "pruned", reason)
        self.stats.prunes += 1

    def finish(self, branch: Branch, reason: str = "") -> None:
        """Keep a branch as a result, but free its K/V: it will not go on.

        Raises:
            StaleBranch: it has ended before.
        """
        self._end("finish", branch, "finished", reason)

    def append(
        self,
        branches: Branch | Sequence[Branch],
        text: str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]],
    ) -> list[list[float]]:
        """Make branches go on with given text or tokens, computed together.

        Args:
            text: for all branches, or one for each.

        Returns:
            The log-prob of every appended token, for each branch.

        Raises:
            StaleBranch: one of the branches has ended.
            InvalidArgument: nothing to append, a branch twice, another number of texts.
            OutOfBlocks: no room; nothing was appended.
        """
        states = self._states("append", [branches] if isinstance(branches, int) else branches)
        tokens = [encode_text(part, self.tokenizer) for part in _for_each(text, len(states))]
        if not all(tokens):
            raise InvalidArgument("append: there is nothing to append.")
        if not states:
            return []
        with self._working():
            for state in states:
                assert state.tip is not None
                state.tip = self._frontier.split_user(state.tip)
            logprobs = self._frontier.append([s.tip for s in states if s.tip], tokens)
            with uninterrupted():
                for state, new, scores in zip(states, tokens, logprobs, strict=True):
                    state.apart = False
                    for token, logprob in zip(new, scores, strict=True):
                        self._ledger.append(state, token, logprob)
            self.stats.tokens_forced += sum(map(len, tokens))
        return logprobs

    def extend(
        self,
        branches: Sequence[Branch],
        *,
        max_new_tokens: int | Sequence[int],
        stop: Stop | Sequence[Stop] = Stop(),  # noqa: B008, frozen
        sampling: Sampling | Sequence[Sampling] | None = None,
        logits_processor: Processor | Sequence[Processor] | None = None,
        on_token: Callable[[BranchEvent], None] | None = None,
    ) -> list[Turn]:
        """Generate: all ``branches`` go on together, and each leaves the batch when it stops.

        Options are for all branches, or a sequence with one for each. An exception or Ctrl-C goes
        through; the tokens so far stay, and the runner can be used.

        Args:
            max_new_tokens: most tokens of this turn.
            stop: what else stops a branch.
            sampling: how tokens are drawn.
            logits_processor: called as ``(input_ids [R, L], logits [R, V])``, a row for each branch
                still going, prompts padded on the left with 0.
            on_token: told of every token, with the text that it completes, and of every stop.

        Returns:
            What each branch got, in the order of ``branches``.

        Raises:
            StaleBranch: one of the branches has ended.
            InvalidArgument: a branch twice, stop strings without a tokenizer, a count below 1, a
                model in train mode.
            NonFiniteScores: NaN, +inf or nothing but -inf among the scores of a branch.
            OutOfBlocks: no room for the next token of every branch.
        """
        extension = self._extension(
            branches, max_new_tokens, stop, sampling, logits_processor, on_token is not None
        )
        for events in self._run(extension):
            if on_token is not None:
                for event in events:
                    on_token(event)
        return extension.turns()

    def stream(
        self,
        branches: Sequence[Branch],
        *,
        max_new_tokens: int | Sequence[int],
        stop: Stop | Sequence[Stop] = Stop(),  # noqa: B008, frozen
        sampling: Sampling | Sequence[Sampling] | None = None,
        logits_processor: Processor | Sequence[Processor] | None = None,
    ) -> Iterator[BranchEvent]:
        """As :meth:`extend`, event by event; stop whenever you like."""
        for events in self.steps(
            branches,
            max_new_tokens=max_new_tokens,
            stop=stop,
            sampling=sampling,
            logits_processor=logits_processor,
        ):
            yield from events

    def steps(
        self,
        branches: Sequence[Branch],
        *,
        max_new_tokens: int | Sequence[int],
        stop: Stop | Sequence[Stop] = Stop(),  # noqa: B008, frozen
        sampling: Sampling | Sequence[Sampling] | None = None,
        logits_processor: Processor | Sequence[Processor] | None = None,
        with_text: bool = True,
    ) -> Generator[list[BranchEvent], None, None]:
        """As :meth:`stream`, all events of a token of every branch at once.

        Between two of them nothing is under way: branches may be forked, pruned and finished, and
        those that ended leave the batch.

        Args:
            with_text: events carry text; without it only those of branches with stop strings do.
        """
        yield from self._run(
            self._extension(branches, max_new_tokens, stop, sampling, logits_processor, with_text)
        )

    def logits(self, branches: Sequence[Branch]) -> torch.Tensor:
        """``[len(branches), V]`` float32: the model's raw logits of each branch's next token."""
        states = self._states("logits", branches)
        self.cache.check_adapters(active_adapters(self.model))
        if not states:
            raise InvalidArgument("logits: give at least one branch.")
        with self._working():
            tips = [state.tip for state in states if state.tip is not None]
            distinct = list(dict.fromkeys(tips))
            logits = self._frontier.logits(distinct)
            for tip, row in zip(distinct, logits, strict=True):
                tip.keep(row)
            row_of = {tip: i for i, tip in enumerate(distinct)}
            return logits[[row_of[tip] for tip in tips]]

    def tokens(self, branch: Branch, *, include_prompt: bool = True) -> list[int]:
        """Token ids of a branch, live or ended."""
        state = self._ledger.get("tokens", branch)
        tokens = self._ledger.tokens(state)
        return tokens if include_prompt else tokens[state.prompt_length :]

    def text(self, branch: Branch) -> str:
        """What a branch generated and was given, without its prompt."""
        if self.tokenizer is None:
            raise InvalidArgument("text: this runner has no tokenizer; read tokens(branch).")
        state = self._ledger.get("text", branch)
        tokens, start = self._ledger.tokens(state), state.prompt_length
        return decode_after(self.tokenizer, tokens[:start], tokens[start:])

    def logprobs(self, branch: Branch) -> list[float]:
        """Log-prob of every token behind the prompt, under the model's raw logits."""
        return self._ledger.logprobs(self._ledger.get("logprobs", branch))

    def logprob(self, branch: Branch) -> float:
        """Sum of :meth:`logprobs`."""
        return self._ledger.get("logprob", branch).logprob

    def length(self, branch: Branch) -> int:
        """Tokens of a branch, prompt included."""
        return self._ledger.get("length", branch).length

    def prompt(self, branch: Branch) -> int:
        """Which prompt a branch continues; equal prompts are one."""
        return self._ledger.get("prompt", branch).prompt

    def ended(self, branch: Branch) -> str:
        """How a branch ended, "pruned" or "finished" and why; empty while it lives."""
        return self._ledger.get("ended", branch).ended

    def stored(self, branch: Branch) -> tuple[CacheBranch, int]:
        """The branch of the cache where a live branch stands, and how many tokens it holds.

        Branches that have not parted stand at one.
        """
        tip = self._ledger.get_live("stored", branch).tip
        assert tip is not None
        return tip.cached, tip.length

    def node(self, branch: Branch) -> int:
        """The node of ``tree`` where a branch ends; before its first own token its parent's."""
        return self._ledger.get("node", branch).node

    def close(self) -> None:
        """Give the model back as it was, unless its user or other runners need tree attention.

        Harmless twice.
        """
        if self._give_back is not None:
            self._give_back()
            self._give_back = None

    def __enter__(self) -> BranchRunner:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"BranchRunner({type(self.model).__name__}, branches={len(self.branches)})"

    def _extension(
        self,
        branches: Sequence[Branch],
        max_new_tokens: int | Sequence[int],
        stop: Stop | Sequence[Stop],
        sampling: Sampling | Sequence[Sampling] | None,
        logits_processor: Processor | Sequence[Processor] | None,
        with_text: bool,
    ) -> Extension:
        states = self._states("extend", branches)
        self.cache.check_adapters(active_adapters(self.model))
        count = len(states)
        given = logits_processor or []
        return Extension(
            ledger=self._ledger,
            frontier=self._frontier,
            states=states,
            limits=_options("max_new_tokens", max_new_tokens, int, count),
            stops=_options("stop", stop, Stop, count),
            samplings=_options("sampling", sampling or self.sampling, Sampling, count),
            processors=[*self.processors, *([given] if callable(given) else given)],
            tokenizer=self.tokenizer,
            eos=self._eos(),
            generator=self._random(),
            with_text=with_text,
        )

    def _run(self, extension: Extension) -> Iterator[list[BranchEvent]]:
        while extension.going:
            with self._working():
                events = extension.step()
            yield events

    def _states(self, call: str, branches: Iterable[Branch]) -> list[BranchState]:
        if isinstance(branches, int):
            raise InvalidArgument(f"{call}({branches}): give a list of branches, [branch] for one.")
        states = [self._ledger.get_live(call, branch) for branch in branches]
        if len({state.branch for state in states}) < len(states):
            raise InvalidArgument(
                f"{call}: a branch is named twice; fork it to carry it on in two ways."
            )
        return states

    def _end(self, call: str, branch: Branch, how: str, reason: str) -> None:
        state = self._ledger.get_live(call, branch)
        assert state.tip is not None
        self._frontier.leave(state.tip)
        self._ledger.end(state, how, reason)
        for processor in self._following():
            processor.on_prune(branch)

    def _following(self) -> list[BranchingProcessor]:
        return [p for p in self.processors if isinstance(p, BranchingProcessor)]

    def _eos(self) -> frozenset[int]:
        eos = self.model.generation_config.eos_token_id
        if eos is None:
            eos = getattr(self.tokenizer, "eos_token_id", None)
        if isinstance(eos, torch.Tensor):
            eos = eos.tolist()
        return frozenset() if eos is None else frozenset([eos] if isinstance(eos, int) else eos)

    def _random(self) -> torch.Generator | None:
        if self._generator is None and self._seed is not None:
            self._generator = torch.Generator(self.model.device).manual_seed(self._seed)
        return self._generator

    def _check_mode(self) -> None:
        if self.model.training:
            raise InvalidArgument(
                f"BranchRunner: {type(self.model).__name__} is in train mode, so its dropout would "
                "make branches differ by chance. Call model.eval() first."
            )

    def _check_room(self, call: str, count: int) -> None:
        live = self._ledger.num_live
        if self.max_branches is not None and live + count > self.max_branches:
            raise InvalidArgument(
                f"{call}: {count} more than the {live} live branches would exceed max_branches="
                f"{self.max_branches}. Prune or finish some first."
            )

    def _note_peak(self) -> None:
        self.stats.peak_branches = max(self.stats.peak_branches, self._ledger.num_live)

    @contextmanager
    def _working(self) -> Iterator[None]:
        """The model ready for forwards of ours, and the time they take."""
        started = time.perf_counter()
        self._check_mode()
        if self._give_back is None or not is_enabled(self.model):
            self._give_back = borrow_tree_attention(self.model)
        try:
            yield
        finally:
            self.stats.seconds += time.perf_counter() - started


def _options(name: str, given: Any, kind: type, count: int) -> list[Any]:
    """One option for each of ``count`` branches."""
    options = [given] * count if isinstance(given, kind) else list(given)
    if len(options) != count or not all(isinstance(option, kind) for option in options):
        raise InvalidArgument(
            f"extend({name}={given!r:.60}): give one {kind.__name__} for all branches, or a list "
            f"of {count}."
        )
    return options


def _for_each(text: Any, count: int) -> list[Any]:
    """One text or list of ids for each of ``count`` branches."""
    if isinstance(text, str) or (len(text) and isinstance(text[0], int)):
        return [text] * count
    if len(text) != count:
        raise InvalidArgument(f"append: {len(text)} texts for {count} branches.")
    return list(text)
