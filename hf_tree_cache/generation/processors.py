"""BranchingProcessor: a LogitsProcessor that can also fork and prune the rows it sees."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import torch
from transformers import LogitsProcessor

from ..errors import InvalidArgument, NonFiniteScores
from .uncertainty import Uncertainty


@dataclass(frozen=True, slots=True)
class BranchBatch:
    """What a processor may know about its rows besides their tokens.

    Attributes:
        branches: branch of each row; a branch keeps its id while it lives, wherever its row is.
        prompts: prompt that each row continues.
        lengths: tokens generated so far in each row.
        logprobs: sum of their log-probs under the model.
        last_tokens: last token of each row, where the loop knows it.
        uncertainty: measures scores once for all processors of a step.
    """

    branches: tuple[int, ...]
    prompts: tuple[int, ...]
    lengths: tuple[int, ...]
    logprobs: tuple[float, ...]
    last_tokens: tuple[int, ...] = ()
    uncertainty: Uncertainty = field(default_factory=Uncertainty, repr=False, compare=False)

    def mean_logprob(self, row: int) -> float:
        """Mean log-prob of the generated tokens of ``row``; 0 before the first."""
        return self.logprobs[row] / self.lengths[row] if self.lengths[row] else 0.0


@dataclass(frozen=True, slots=True)
class Fork:
    """``count`` more branches continue ``row``, besides its own.

    Attributes:
        distinct: the row and its new branches get different next tokens; else each samples its own.
        priority: forks of higher priority are granted first when ``max_branches`` is short.
    """

    row: int
    count: int
    distinct: bool = True
    priority: float = 0.0
    reason: str = "fork"


@dataclass(frozen=True, slots=True)
class Prune:
    """``row`` ends here. Wins over any fork of the same row."""

    row: int
    reason: str = "prune"


Action = Fork | Prune


class BranchingProcessor(LogitsProcessor):
    """A processor that branches: override ``__call__``, call :meth:`fork` and :meth:`prune`.

    Within ``tree_generate`` a call sees one row for each live branch. Actions are queued, and
    applied after all processors have run. State kept by branch id survives: the id of a row is
    ``self.batch.branches[row]``, :meth:`on_fork` and :meth:`on_prune` tell what became of it.

    Attributes:
        batch: the rows of the current call.
    """

    batch: BranchBatch
    _actions: list[Action]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """``input_ids [R, L]``, ``scores [R, V]``; returns the scores to go on with."""
        raise NotImplementedError

    def begin(self, batch: BranchBatch) -> None:
        """Called by the loop before each ``__call__``."""
        self.batch = batch
        self._actions = []

    def take_actions(self) -> list[Action]:
        """What was queued since :meth:`begin`; called by the loop after each ``__call__``."""
        actions, self._actions = self._actions, []
        return actions

    def fork(
        self,
        row: int,
        count: int = 1,
        *,
        distinct: bool = True,
        priority: float = 0.0,
        reason: str | None = None,
    ) -> None:
        """Queue a :class:`Fork`."""
        self._check_row("fork", row)
        if count < 1:
            raise InvalidArgument(f"fork(row={row}, count={count}): give at least 1.")
        reason = reason or type(self).__name__
        self._actions.append(Fork(row, count, distinct, priority, reason))

    def prune(self, row: int, *, reason: str | None = None) -> None:
        """Queue a :class:`Prune`."""
        self._check_row("prune", row)
        self._actions.append(Prune(row, reason or type(self).__name__))

    def on_fork(self, parent: int, children: Sequence[int]) -> None:
        """Branch ``parent`` goes on, and ``children`` start where it stands."""

    def on_prune(self, branch: int) -> None:
        """``branch`` is gone: pruned, or finished."""

    def _check_row(self, action: str, row: int) -> None:
        if not hasattr(self, "_actions"):
            raise InvalidArgument(
                f"{action}(row={row}) outside of tree_generate: pass this processor to "
                "model.generate(..., custom_generate=tree_generate, branching=[...])."
            )
        if not 0 <= row < len(self.batch.branches):
            raise InvalidArgument(
                f"{action}(row={row}): there are {len(self.batch.branches)} rows."
            )


def run_processors(
    processors: Sequence[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]],
    input_ids: torch.Tensor,
    logits: torch.Tensor,
    batch: BranchBatch,
) -> tuple[torch.Tensor, list[Action]]:
    """The scores after all processors, one after the other, and what was queued.

    Args:
        input_ids: ``[R, L]``.
        logits: ``[R, V]``.
    """
    scores: torch.Tensor = logits
    actions: list[Action] = []
    for processor in processors:
        if not isinstance(processor, BranchingProcessor):
            scores = processor(input_ids, scores)
            continue
        processor.begin(batch)
        scores = processor(input_ids, scores)
        actions += processor.take_actions()
    return scores, actions


def _check_children(name: str, children: int) -> None:
    if children < 2:
        raise InvalidArgument(f"{name}(children={children}): a fork makes at least 2 of one.")


class ForkAtPositions(BranchingProcessor):
    """Fork every branch once it has generated given numbers of tokens.

    Args:
        positions: numbers of generated tokens, 0 for before the first.
        children: branches that go on from one, itself included.
        distinct: they get different next tokens.
    """

    def __init__(
        self, positions: Collection[int], children: int = 2, *, distinct: bool = True
    ) -> None:
        _check_children(type(self).__name__, children)
        if any(position < 0 for position in positions):
            raise InvalidArgument(f"ForkAtPositions({list(positions)}): positions start at 0.")
        self.positions = frozenset(positions)
        self.children = children
        self.distinct = distinct

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        for row, length in enumerate(self.batch.lengths):
            if length in self.positions:
                self.fork(row, self.children - 1, distinct=self.distinct, reason=f"at {length}")
        return scores


class ForkAtFirstToken(ForkAtPositions):
    """Start ``children`` branches that differ in their first token (Wang and Zhou, 2024)."""

    def __init__(self, children: int, *, distinct: bool = True) -> None:
        super().__init__([0], children, distinct=distinct)


class _ForkOnUncertainty(BranchingProcessor):
    """Fork where a statistic of the next-token distribution exceeds a threshold."""

    def __init__(
        self, threshold: float, children: int = 2, *, distinct: bool = True, min_gap: int = 1
    ) -> None:
        _check_children(type(self).__name__, children)
        if min_gap < 1:
            raise InvalidArgument(f"{type(self).__name__}(min_gap={min_gap}): give at least 1.")
        self.threshold = threshold
        self.children = children
        self.distinct = distinct
        self.min_gap = min_gap
        self._forked_at: dict[int, int] = {}

    statistic: int
    """Which of what :func:`~.uncertainty.measure` finds."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        for row, found in enumerate(self.batch.uncertainty.read(scores)):
            value = found[self.statistic]
            branch, length = self.batch.branches[row], self.batch.lengths[row]
            gap = length - self._forked_at.get(branch, -self.min_gap)
            if value > self.threshold and gap >= self.min_gap:
                self._forked_at[branch] = length
                self.fork(
                    row,
                    self.children - 1,
                    distinct=self.distinct,
                    priority=value,
                    reason=f"{type(self).__name__} {value:.2f}",
                )
        return scores

    def on_fork(self, parent: int, children: Sequence[int]) -> None:
        if parent in self._forked_at:
            self._forked_at.update(dict.fromkeys(children, self._forked_at[parent]))

    def on_prune(self, branch: int) -> None:
        self._forked_at.pop(branch, None)


class ForkOnEntropy(_ForkOnUncertainty):
    """Fork where the next token is uncertain: entropy in nats above ``threshold``.

    Args:
        threshold: nats; the uniform distribution over V tokens has ``ln V``.
        children: branches that go on from one, itself included.
        distinct: they get different next tokens.
        min_gap: tokens between two forks of a branch.
    """

    statistic = 1


class ForkOnVarentropy(_ForkOnUncertainty):
    """Fork where the information of the next token varies: variance of ``-log p`` above it.

    Arguments as of :class:`ForkOnEntropy`; the threshold is in nats squared.
    """

    statistic = 2


class ForkAtDelimiter(BranchingProcessor):
    """Fork behind a step delimiter: when the last token is one of ``token_ids``.

    Args:
        token_ids: tokens that end a step, such as those that hold a newline.
        children: branches that go on from one, itself included.
        distinct: they get different next tokens.
    """

    def __init__(
        self, token_ids: Collection[int], children: int = 2, *, distinct: bool = True
    ) -> None:
        _check_children(type(self).__name__, children)
        if not token_ids:
            raise InvalidArgument("ForkAtDelimiter(token_ids=[]): give at least one token id.")
        self.token_ids = frozenset(token_ids)
        self.children = children
        self.distinct = distinct

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        for row, token in enumerate(self.batch.last_tokens or input_ids[:, -1].tolist()):
            if token in self.token_ids and self.batch.lengths[row]:
                self.fork(row, self.children - 1, distinct=self.distinct)
        return scores


class PruneBelow(BranchingProcessor):
    """Prune branches whose mean log-prob a token falls below a bound; the best of a prompt stays.

    Args:
        logprob: the bound, in nats a token (negative).
        after: tokens that a branch has generated before it is judged.
    """

    def __init__(self, logprob: float, *, after: int = 8) -> None:
        if not logprob < 0:
            raise InvalidArgument(f"PruneBelow(logprob={logprob}): mean log-probs are negative.")
        if after < 1:
            raise InvalidArgument(f"PruneBelow(after={after}): give at least 1.")
        self.logprob = logprob
        self.after = after

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        batch = self.batch
        for rows in _rows_by_prompt(batch):
            best = max(rows, key=batch.mean_logprob)
            for row in rows:
                mean = batch.mean_logprob(row)
                if row != best and batch.lengths[row] >= self.after and mean < self.logprob:
                    self.prune(row, reason=f"mean log-prob {mean:.2f}")
        return scores


class PruneByRank(BranchingProcessor):
    """Keep only the best branches of each prompt.

    Args:
        keep: branches of a prompt that stay.
        every: generated tokens between two cuts.
        score: ranks the rows, higher is better: gets the generated ids of each row of one prompt
            and returns a number for each; default their mean log-prob.
    """

    def __init__(
        self,
        keep: int,
        *,
        every: int = 16,
        score: Callable[[list[list[int]]], Sequence[float]] | None = None,
    ) -> None:
        if keep < 1 or every < 1:
            raise InvalidArgument(f"PruneByRank(keep={keep}, every={every}): give at least 1.")
        self.keep = keep
        self.every = every
        self.score = score

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        batch = self.batch
        for rows in _rows_by_prompt(batch):
            rows = [row for row in rows if batch.lengths[row] % self.every == 0]
            if len(rows) <= self.keep or not batch.lengths[rows[0]]:
                continue
            values = self._values(rows, input_ids)
            ranked = sorted(zip(rows, values, strict=True), key=lambda pair: -pair[1])
            for rank, (row, value) in enumerate(ranked[self.keep :], self.keep + 1):
                self.prune(row, reason=f"rank {rank}, score {value:.3g}")
        return scores

    def _values(self, rows: list[int], input_ids: torch.Tensor) -> list[float]:
        if self.score is None:
            return [self.batch.mean_logprob(row) for row in rows]
        longest = max(self.batch.lengths[row] for row in rows)
        tails = input_ids[rows, -longest:].tolist()
        generated = [
            tail[-self.batch.lengths[row] :] for row, tail in zip(rows, tails, strict=True)
        ]
        values = [float(value) for value in self.score(generated)]
        if len(values) != len(rows) or any(value != value for value in values):
            raise NonFiniteScores(
                f"PruneByRank(score=...) got {values[:8]} for {len(rows)} branches: return one "
                "number for each, none of them NaN."
            )
        return values


def _rows_by_prompt(batch: BranchBatch) -> list[list[int]]:
    rows: dict[int, list[int]] = {}
    for row, prompt in enumerate(batch.prompts):
        rows.setdefault(prompt, []).append(row)
    return list(rows.values())
