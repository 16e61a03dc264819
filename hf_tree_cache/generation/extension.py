"""Extension: one turn of a set of branches, step by step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import InvalidArgument
from ..sending import Arriving, to_device
from .frontier import Frontier, Tip
from .interrupt import uninterrupted
from .ledger import BranchState, Ledger
from .options import Sampling, Stop, Turn
from .output import BranchEvent
from .processors import BranchBatch, run_processors
from .sampling import check_drawn, draw_tokens
from .text import CONTEXT, TextStream, decode_after

Processor = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""``(input_ids [R, L], logits [R, V]) -> logits``, as transformers' LogitsProcessor."""


@dataclass(eq=False)
class _Row:
    """One branch on its way."""

    state: BranchState
    limit: int
    stop: Stop
    sampling: Sampling
    context: list[int]
    stream: TextStream | None
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    reason: str = ""
    met: str | None = None


@dataclass(frozen=True, slots=True)
class _Ahead:
    """What was computed before the host knew the last tokens.

    Attributes:
        logits: ``[R, V]``, as the tips have them.
    """

    tips: list[Tip]
    logits: torch.Tensor

    def is_what_follows(self, tips: list[Tip]) -> bool:
        """Of just these, and nothing was appended to them since."""
        return tips == self.tips and all(tip.batch is self.logits for tip in tips)


class Extension:
    """Carries ``states`` on, a token a step each, until all of them have stopped.

    Args:
        limits, stops, samplings: for each state.
        processors: change the logits before they are sampled.
        tokenizer: for stop strings and the text of events.
        eos: tokens that end a text.
        generator: draws the samples.
        with_text: events carry text.
    """

    def __init__(
        self,
        ledger: Ledger,
        frontier: Frontier,
        states: Sequence[BranchState],
        limits: Sequence[int],
        stops: Sequence[Stop],
        samplings: Sequence[Sampling],
        processors: Sequence[Processor],
        tokenizer: Any,
        eos: frozenset[int],
        generator: torch.Generator | None,
        with_text: bool,
    ) -> None:
        if min(limits, default=1) < 1:
            raise InvalidArgument(f"extend(max_new_tokens={min(limits)}): give at least 1.")
        if tokenizer is None and any(stop.strings for stop in stops):
            raise InvalidArgument(
                "extend: stop strings need a tokenizer. Pass one to the runner, or give "
                "Stop(tokens=...)."
            )
        self._ledger = ledger
        self._frontier = frontier
        self._processors = processors
        self._tokenizer = tokenizer
        self._eos = eos
        self._generator = generator
        self._rows = []
        for state, limit, stop, sampling in zip(states, limits, stops, samplings, strict=True):
            context = ledger.tokens(state)[-CONTEXT:]
            decodes = tokenizer is not None and (with_text or stop.strings)
            stream = TextStream(tokenizer, context) if decodes else None
            self._rows.append(_Row(state, limit, stop, sampling, context, stream))
        self._live = list(self._rows)
        self._ahead: _Ahead | None = None
        self._ids = self._read_ids() if processors else None
        self._steps = 0

    @property
    def going(self) -> bool:
        """Whether a branch has not stopped yet."""
        return bool(self._live)

    def turns(self) -> list[Turn]:
        """What each branch got so far."""
        return [
            Turn(
                branch=row.state.branch,
                tokens=tuple(row.tokens),
                logprobs=tuple(row.logprobs),
                text=""
                if self._tokenizer is None
                else decode_after(self._tokenizer, row.context, row.tokens),
                reason=row.reason,
                stop=row.met,
            )
            for row in self._rows
        ]

    @torch.no_grad()
    def step(self) -> list[BranchEvent]:
        """One token for every branch that still goes; returns what happened. One synchronisation.

        Raises:
            NonFiniteScores, OutOfBlocks: no branch got a token.
        """
        rows = self._drop_ended()
        if not rows:
            return []
        tips = [_tip(row) for row in rows]
        place = {tip: i for i, tip in enumerate(dict.fromkeys(tips))}
        logits = self._logits(list(place))
        if len(place) < len(rows):
            logits = logits[to_device([place[tip] for tip in tips], logits.device)]
        batch = self._view(rows)
        scores, groups = self._keep_apart(rows, self._process(batch, logits))
        drawn = draw_tokens(
            logits,
            scores,
            [row.sampling for row in rows],
            groups,
            self._generator,
            batch.uncertainty,
        )
        arriving = Arriving(drawn.table)
        try:
            ahead = self._run_ahead(rows, tips, drawn.tokens)
            tokens, broken, logprobs = arriving.read()
            check_drawn(broken, batch.branches)
        except BaseException:
            self._frontier.repair(tips)  # the cache may be ahead
            raise
        with uninterrupted():
            if ahead is not None:
                self._frontier.go_on(tips, ahead)
                self._ahead = _Ahead(tips, ahead)
            events = self._advance(rows, [int(token) for token in tokens], logprobs)
            if self._ids is not None:
                going = [i for i, row in enumerate(rows) if not row.reason]
                self._ids = torch.cat([self._ids, drawn.tokens[:, None].to(self._ids.device)], 1)[
                    going
                ]
        return events

    def _drop_ended(self) -> list[_Row]:
        """Let branches go that somebody pruned or finished since the last step."""
        left = [i for i, row in enumerate(self._live) if row.state.tip is not None]
        if len(left) < len(self._live):
            for row in self._live:
                row.reason = row.state.ended if row.state.tip is None else ""
            self._live = [self._live[i] for i in left]
            self._ids = None if self._ids is None else self._ids[left]
        return self._live

    def _view(self, rows: list[_Row]) -> BranchBatch:
        states = [row.state for row in rows]
        return BranchBatch(
            tuple(state.branch for state in states),
            tuple(state.prompt for state in states),
            tuple(state.length - state.prompt_length for state in states),
            tuple(state.logprob for state in states),
            tuple(row.tokens[-1] for row in rows if row.tokens) if self._processors else (),
        )

    def _process(self, batch: BranchBatch, logits: torch.Tensor) -> torch.Tensor:
        if not self._processors:
            return logits
        assert self._ids is not None
        scores, actions = run_processors(self._processors, self._ids, logits, batch)
        if actions:
            raise InvalidArgument(
                f"A processor of extend asked for {type(actions[0]).__name__} "
                f"({actions[0].reason}). Fork and prune through the runner between two extends, or "
                "use tree_generate."
            )
        return scores

    def _keep_apart(
        self, rows: list[_Row], scores: torch.Tensor
    ) -> tuple[torch.Tensor, list[list[int]]]:
        """Rule out what siblings took already; and which rows must now differ among themselves."""
        groups: dict[Tip, list[int]] = {}
        for i, row in enumerate(rows):
            if row.state.apart:
                groups.setdefault(_tip(row), []).append(i)
        taken = {tip: group for tip, group in groups.items() if tip.taken}
        scores = scores.clone() if taken else scores
        for tip, group in taken.items():
            here = to_device(group, scores.device)
            known = scores[here]
            left = known.index_fill(1, to_device(sorted(tip.taken), scores.device), -torch.inf)
            # With nothing left a sibling's token has to do.
            some = (left > -torch.inf).any(-1, keepdim=True)
            scores[here] = torch.where(some, left, known)
        return scores, [group for group in groups.values() if len(group) > 1]

    def _logits(self, tips: list[Tip]) -> torch.Tensor:
        """``[len(tips), V]``; as they were computed ahead, if that is still what follows."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead.is_what_follows(tips):
            return ahead.logits
        return self._frontier.logits(tips)

    def _run_ahead(
        self, rows: list[_Row], tips: list[Tip], tokens: torch.Tensor
    ) -> torch.Tensor | None:
        """Compute what was drawn before the host knows it, so that the GPU need not wait.

        Where a branch turns out to have stopped, its last token is computed already.
        """
        parts = any(tip.users > 1 for tip in tips)  # by what was drawn
        if parts or all(len(row.tokens) + 1 >= row.limit for row in rows):
            return None
        return self._frontier.run_ahead(tips, tokens)

    def _advance(
        self, rows: list[_Row], tokens: list[int], logprobs: list[float]
    ) -> list[BranchEvent]:
        """Books of one step: tips, record, stops."""
        self._steps += 1
        at: dict[Tip, list[int]] = {}
        for i, row in enumerate(rows):
            if self._ahead is None:
                at.setdefault(_tip(row), []).append(i)
        for tip, here in at.items():
            for i, new in zip(
                here, self._frontier.part(tip, [tokens[i] for i in here]), strict=True
            ):
                rows[i].state.tip = new
            if tip.users:
                _keep_alone(tip)
        events = []
        for row, token, logprob in zip(rows, tokens, logprobs, strict=True):
            self._ledger.append(row.state, token, logprob)
            row.state.apart = False
            row.tokens.append(token)
            row.logprobs.append(logprob)
            piece = None if row.stream is None else row.stream.push(token)
            branch = row.state.branch
            row.reason, row.met = self._why_stop(row, token, piece or "")
            if self._ahead is not None and row.reason:
                _keep_alone(_tip(row))
            if row.reason and row.stream is not None:
                piece = (piece or "") + row.stream.flush()
            events.append(
                BranchEvent("token", branch, self._steps, token, logprob, (), None, piece)
            )
            if row.reason == "eos":
                self._ledger.mark_finished(row.state, "eos")
            if row.reason:
                events.append(BranchEvent("finish", branch, self._steps, reason=row.reason))
        self._frontier.stats.tokens_generated += len(rows)
        self._live = [row for row in rows if not row.reason]
        return events

    def _why_stop(self, row: _Row, token: int, piece: str) -> tuple[str, str | None]:
        if row.stop.eos and token in self._eos:
            return "eos", None
        if token in row.stop.tokens:
            return "stop", None
        if piece and row.stop.strings and row.stream is not None:
            met = row.stop.find(row.stream.text, len(piece))
            if met is not None:
                return "stop", met
        return ("length", None) if len(row.tokens) >= row.limit else ("", None)

    def _read_ids(self) -> torch.Tensor:
        """``[R, L]`` int64 tokens of every branch, padded on the left with 0."""
        tokens = [self._ledger.tokens(row.state) for row in self._rows]
        width = max(map(len, tokens), default=0)
        padded = [[0] * (width - len(ids)) + ids for ids in tokens]
        return to_device(padded, self._frontier.model.device)


def _keep_alone(tip: Tip) -> None:
    """Its logits were a row of the whole batch, and would keep that."""
    if tip.batch is not None:
        tip.keep(tip.logits)


def _tip(row: _Row) -> Tip:
    assert row.state.tip is not None
    return row.state.tip
