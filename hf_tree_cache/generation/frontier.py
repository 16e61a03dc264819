"""Frontier: where branches stand in a cache, and the forwards that carry them on."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import OutOfBlocks
from ..integration.cache import TreeCache
from ..memory.tree import Branch as CacheBranch
from ..naming import CACHE
from ..sending import to_device, works_ahead
from .options import RunnerStats
from .prefixes import find_shared_runs
from .step_inputs import find_constant

LOGITS_AT_ONCE = 2**26
"""Most numbers in the logits of one forward over appended tokens: 256 MB in float32."""


@dataclass(eq=False)
class Tip:
    """A place in the tree where branches stand that have not parted yet.

    Its K/V are computed and stored once, under one branch of the cache, however many stand here.
    Either the logits that follow are known, or the last token is still to be computed: a token that
    was just drawn has no K/V yet. Drawn "b" by two branches and "c" by a third, after "a"::

        Tip(cached "a", logits, users 3)   ->   Tip(cached "a" forked, pending "b", users 2)
                                                Tip(cached "a", pending "c", users 1)

    Attributes:
        cached: the branch of the cache, which nobody else uses.
        length: tokens in the cache under it.
        pending: the token behind them, not computed; None when what follows is known.
        batch: ``[R, V]`` float32, what follows in row ``row``; None while a token is pending.
        users: branches that stand here.
        taken: tokens that branches went on with from here.
    """

    cached: CacheBranch
    length: int
    pending: int | None = None
    batch: torch.Tensor | None = None
    row: int = 0
    users: int = 0
    taken: set[int] = field(default_factory=set)

    @property
    def logits(self) -> torch.Tensor:
        """``[V]`` float32, what follows; a token must not be pending."""
        assert self.batch is not None
        return self.batch[self.row]

    def keep(self, logits: torch.Tensor) -> None:
        """A copy of ``logits [V]`` is what follows, so that no batch is kept."""
        self.batch, self.row = logits[None].clone(), 0


class Frontier:
    """Runs the model over tips, in one batch whatever their lengths.

    Args:
        model: with tree attention enabled whenever a method that computes is called.
        cache: configured for ``model``.
        stats: told what was computed.
    """

    def __init__(self, model: Any, cache: TreeCache, stats: RunnerStats) -> None:
        self.model = model
        self.cache = cache
        self.stats = stats
        accepted = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in accepted
        self._takes_logits_to_keep = "logits_to_keep" in accepted
        self._constant: dict[str, Any] | None = None  # arguments that are the same in every step
        self._last: tuple[list[int], torch.Tensor] | None = None  # lengths of a step, positions

    def prefill(self, prompts: Sequence[Sequence[int]]) -> list[Tip]:
        """One tip for each prompt, the same for equal ones; shared beginnings are computed once.

        Raises:
            OutOfBlocks: no room; nothing was added.
        """
        minimum = 32 if not self.has_states else max(map(len, prompts)) + 1
        runs, ends = find_shared_runs(prompts, minimum)
        made: dict[int, Tip] = {}
        try:
            for level in range(1 + max(run.level for run in runs)):
                here = [i for i, run in enumerate(runs) if run.level == level]
                tokens = [list(runs[i].tokens) for i in here]
                if level == 0:
                    self.cache.set_rows([])
                    logits = self._compute(None, [0] * len(here), tokens)
                    made |= {
                        i: Tip(branch, len(new))
                        for i, branch, new in zip(here, self.cache.rows, tokens, strict=True)
                    }
                else:
                    for i in here:
                        parent = runs[i].parent
                        assert parent is not None
                        cached = self.cache.fork(made[parent].cached)[0]
                        made[i] = Tip(cached, made[parent].length)
                    logits = self._extend([made[i] for i in here], tokens)
                for i, row in zip(here, logits, strict=True):
                    made[i].keep(row[0])
        except BaseException:
            self.repair([])
            self.release(made.values())
            for branch in [] if made else self.cache.rows:
                self.cache.prune(branch)
            raise
        self.release([tip for i, tip in made.items() if i not in ends])
        return [made[end] for end in ends]

    @property
    def has_states(self) -> bool:
        """Whether the model has layers whose state exists only at the tip."""
        return any(self.cache.is_linear) or any(
            hasattr(layer, "recurrent_states") for layer in self.cache.layers
        )

    def logits(self, tips: Sequence[Tip]) -> torch.Tensor:
        """``[len(tips), V]`` float32, what follows each; pending tokens are computed together."""
        waiting = [tip for tip in tips if tip.pending is not None]
        tokens = [[tip.pending] for tip in waiting if tip.pending is not None]
        if waiting:
            rows = self._extend(waiting, tokens)
            last = rows[:, 0] if isinstance(rows, torch.Tensor) else torch.cat(rows)
            for i, tip in enumerate(waiting):
                tip.batch, tip.row, tip.pending = last, i, None
            if len(waiting) == len(tips):
                return last
        return torch.stack([tip.logits for tip in tips])

    def run_ahead(self, tips: Sequence[Tip], tokens: torch.Tensor) -> torch.Tensor | None:
        """Compute ``tokens [R]``, which the host has not seen yet, behind ``tips``.

        These stay as they are: :meth:`go_on` has them stand behind the tokens, :meth:`repair` has
        the cache forget those.

        Args:
            tips: different ones, each with one user.

        Returns:
            ``[R, V]`` float32, what follows. None if nothing was done: on devices that do not work
            while the host does, before a step has shown what goes into it, and without room.
        """
        if self._constant is None or self.has_states or not works_ahead(tokens.device):
            return None
        try:
            logits = self._forward(tips, tokens)
        except OutOfBlocks:
            return None
        assert isinstance(logits, torch.Tensor)
        return logits[:, 0]

    def go_on(self, tips: Sequence[Tip], logits: torch.Tensor) -> None:
        """``tips`` stand behind what :meth:`run_ahead` computed, and know what follows."""
        for i, tip in enumerate(tips):
            tip.length += 1
            tip.batch, tip.row, tip.taken = logits, i, set()

    def append(self, tips: Sequence[Tip], tokens: Sequence[Sequence[int]]) -> list[list[float]]:
        """Carry each tip on over given tokens; returns the log-prob of each of them.

        Args:
            tips: different ones, each with one user.
            tokens: for each tip, at least one.

        Raises:
            OutOfBlocks: no room; nothing was appended.
        """
        vocab = self.logits(tips).shape[1]
        size = max(1, LOGITS_AT_ONCE // (vocab * len(tips)))
        if max(map(len, tokens)) <= size and not self.has_states:
            return self._append_in_parts(tips, tokens, size)
        before = [(self.cache.fork(t.cached)[0], t.length, t.batch, t.row) for t in tips]
        try:
            logprobs = self._append_in_parts(tips, tokens, size)
        except BaseException:
            self.release(tips)
            for tip, (cached, length, batch, row) in zip(tips, before, strict=True):
                tip.cached, tip.length, tip.batch, tip.row = cached, length, batch, row
            raise
        for cached, *_ in before:
            self.cache.prune(cached)
        return logprobs

    def _append_in_parts(
        self, tips: Sequence[Tip], tokens: Sequence[Sequence[int]], size: int
    ) -> list[list[float]]:
        """As :meth:`append`, in forwards of at most ``size`` tokens a tip."""
        logprobs: list[list[float]] = [[] for _ in tips]
        for start in range(0, max(map(len, tokens)), size):
            here = [i for i, new in enumerate(tokens) if len(new) > start]
            parts = [list(tokens[i][start : start + size]) for i in here]
            rows = self._extend([tips[i] for i in here], parts, keep_all=True)
            for i, part, row in zip(here, parts, rows, strict=True):
                known = torch.cat([tips[i].logits[None], row[:-1]]).log_softmax(-1)
                index = to_device(part, known.device)[:, None]
                logprobs[i] += known.gather(1, index).squeeze(1).tolist()
                tips[i].keep(row[-1])
        return logprobs

    def fork_at(self, tip: Tip, position: int, last: int, taken: set[int]) -> Tip:
        """A tip ``position`` tokens into ``tip``; ``last`` is the token that ends there.

        Its K/V stay out, so that they are computed together with the logits behind them.

        Raises:
            UnsupportedModel: a model whose states exist only at the tip.
        """
        cached = self.cache.fork(tip.cached, at=position - 1)[0]
        return Tip(cached, position - 1, pending=last, taken=set(taken))

    def part(self, tip: Tip, tokens: Sequence[int]) -> list[Tip]:
        """As many users of ``tip`` as there are ``tokens`` go on, each with its own.

        Those with equal tokens stand at one new tip. Nothing is computed.
        """
        if tip.users == len(tokens) == 1:  # the way of most steps
            tip.pending, tip.batch, tip.taken = tokens[0], None, set()
            return [tip]
        distinct = list(dict.fromkeys(tokens))
        tip.taken.update(distinct)
        tip.users -= len(tokens)
        assert tip.users >= 0
        handles = self.cache.fork(tip.cached, len(distinct) - (tip.users == 0))
        if tip.users == 0:
            handles.insert(0, tip.cached)
        new = {
            token: Tip(cached, tip.length, pending=token)
            for token, cached in zip(distinct, handles, strict=True)
        }
        for token in tokens:
            new[token].users += 1
        return [new[token] for token in tokens]

    def split_user(self, tip: Tip) -> Tip:
        """A tip like ``tip`` for one of its users alone."""
        if tip.users == 1:
            return tip
        tip.users -= 1
        cached = self.cache.fork(tip.cached)[0]
        return Tip(cached, tip.length, tip.pending, tip.batch, tip.row, 1, set(tip.taken))

    def leave(self, tip: Tip) -> None:
        """One user of ``tip`` is gone; the last one frees its K/V."""
        tip.users -= 1
        if tip.users == 0:
            self.release([tip])

    def release(self, tips: Iterable[Tip]) -> None:
        for tip in tips:
            if tip.cached in self.cache.tree:
                self.cache.prune(tip.cached)

    def repair(self, tips: Iterable[Tip]) -> None:
        """After a forward that was cut short: the cache holds again what ``tips`` say."""
        self.cache.expect(None)
        self.cache.abandon()
        for tip in tips:
            # The forward had ended, but nobody had noted so.
            if self.cache.tree.length(tip.cached) > tip.length:
                kept = self.cache.fork(tip.cached, at=tip.length)[0]
                self.cache.prune(tip.cached)
                tip.cached = kept

    def _extend(
        self, tips: Sequence[Tip], tokens: list[list[int]], keep_all: bool = False
    ) -> torch.Tensor | list[torch.Tensor]:
        """Compute ``tokens`` behind ``tips``; for each float32 logits, ``[1, V]`` or all."""
        if self.has_states and max(map(len, tokens)) > 1:
            return self._extend_slowly(tips, tokens, keep_all)
        logits = self._forward(tips, tokens, keep_all)
        for tip, new in zip(tips, tokens, strict=True):
            tip.length += len(new)
        return logits

    def _forward(
        self, tips: Sequence[Tip], tokens: list[list[int]] | torch.Tensor, keep_all: bool = False
    ) -> torch.Tensor | list[torch.Tensor]:
        """One forward behind ``tips``, which do not change; if it fails, nor does the cache.

        Args:
            tokens: for each; or one for each, as a tensor of the device.
        """
        handles = [tip.cached for tip in tips]
        lengths = [tip.length for tip in tips]
        if self.cache.rows != handles or self.cache.get_seq_length() > max(lengths):
            self.cache.set_rows(handles)
        try:
            logits = self._compute(tips, lengths, tokens, keep_all)
        except BaseException:
            self.repair(tips)
            raise
        return logits

    def _extend_slowly(
        self, tips: Sequence[Tip], tokens: list[list[int]], keep_all: bool
    ) -> list[torch.Tensor]:
        """Token by token: recurrent states of transformers do not go on over several at once."""
        found: list[list[torch.Tensor]] = [[] for _ in tips]
        for step in range(max(map(len, tokens))):
            here = [i for i, new in enumerate(tokens) if len(new) > step]
            rows = self._extend([tips[i] for i in here], [[tokens[i][step]] for i in here])
            for i, row in zip(here, rows, strict=True):
                found[i] = [*found[i], row] if keep_all else [row]
        return [torch.cat(rows) for rows in found]

    @torch.no_grad()
    def _compute(
        self,
        tips: Sequence[Tip] | None,
        lengths: list[int],
        tokens: list[list[int]] | torch.Tensor,
        keep_all: bool = False,
    ) -> torch.Tensor | list[torch.Tensor]:
        """One forward of the cache's rows, of ``lengths`` tokens each; without tips, new rows."""
        counts = list(map(len, tokens)) if isinstance(tokens, list) else [1] * len(tokens)
        self.cache.expect(counts)
        if self._constant is not None and max(counts) == min(counts) == 1:
            prepared = {**self._constant, **self._step(lengths, tokens)}
        else:
            assert isinstance(tokens, list)
            prepared = self._prepare(lengths, counts, tokens, keep_all)
        with self.cache.lending_outputs():
            logits = self.model(**prepared, return_dict=True).logits
            if keep_all:
                ends = [row[-count:] for row, count in zip(logits, counts, strict=True)]
                kept = [end.to(copy=True, dtype=torch.float32) for end in ends]
            else:
                kept = logits[:, -1:].to(copy=True, dtype=torch.float32)
        self.stats.forwards += 1
        self.stats.tokens_computed += sum(counts)
        self.stats.peak_kv_bytes = max(self.stats.peak_kv_bytes, self.cache.kv_bytes)
        return kept

    def _step(
        self, lengths: list[int], tokens: list[list[int]] | torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """The arguments of a forward of one token a row that are not the same every time."""
        if isinstance(tokens, list):
            new = [token for (token,) in tokens]
            ids, positions = to_device([*new, *lengths], self.model.device).view(2, -1, 1)
        else:
            ids, positions = tokens[:, None], self._positions(lengths)
        self._last = lengths, positions
        inputs = {"input_ids": ids, "position_ids": positions}
        if len({*lengths}) > 1:
            inputs["attention_mask"] = _mask(positions[:, 0] + 1, max(lengths) + 1)
        return inputs

    def _positions(self, lengths: list[int]) -> torch.Tensor:
        """``[R, 1]``: the ``lengths``; made on the device where they are one more than the last."""
        if self._last is not None and [n - 1 for n in lengths] == self._last[0]:
            return self._last[1] + 1
        return to_device(lengths, self.model.device)[:, None]

    def _prepare(
        self, lengths: list[int], counts: list[int], tokens: list[list[int]], keep_all: bool
    ) -> dict[str, Any]:
        """The arguments of any forward, as the model's own function makes them."""
        device = self.model.device
        width, before = max(counts), max(lengths)
        ids = [[0] * (width - len(new)) + new for new in tokens]
        ends = to_device([n + c for n, c in zip(lengths, counts, strict=True)], device)
        inputs: dict[str, Any] = {CACHE: self.cache, "use_cache": True}
        if len({*lengths}) > 1 or len({*counts}) > 1:
            inputs["attention_mask"] = _mask(ends, before + width)
        if self._takes_positions:
            back = torch.arange(width, 0, -1, device=device)
            inputs["position_ids"] = (ends[:, None] - back).clamp_min(0)
        if self._takes_logits_to_keep and not keep_all:
            inputs["logits_to_keep"] = 1
        prepared = self.model.prepare_inputs_for_generation(
            to_device(ids, device),
            next_sequence_length=width,
            is_first_iteration=before == 0,
            **inputs,
        )
        if width == 1 and before and not keep_all:
            self._constant = find_constant(self.model, inputs, prepared)
        return prepared


def _mask(ends: torch.Tensor, columns: int) -> torch.Tensor:
    """``[R, columns]`` int64: 1 for the ``ends[R]`` last ones of each row."""
    return (torch.arange(columns, device=ends.device) >= columns - ends[:, None]).long()
