"""Tree attention in plain torch: one matrix product for all rows under a run, merged by LSE."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..memory.storage import KVStorage, SlabIndex
from .plan import Run, TreeAttentionPlan, Window

MAX_SCORES = 1 << 25
"""Scores of a product held at a time (float32: 128 MB); longer extends go in pieces of columns."""


def tree_attention_torch(
    q: torch.Tensor,
    storage: KVStorage,
    layer: int,
    plan: TreeAttentionPlan,
    *,
    scale: float,
    window: Window | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`tree_attention_reference`, each run read once for all its rows.

    Partial results are merged by their log-sum-exp (Rabe and Staats, 2021; FlashInfer's cascade).
    Works in float32, or float64 for float64 inputs.
    """
    num_rows, num_q_heads, num_new, head_dim = q.shape
    num_kv_heads = storage.spec.num_kv_heads
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    grouped = (q.to(dtype) * scale).view(num_rows, num_kv_heads, -1, num_new, head_dim)
    group = grouped.shape[2]
    columns = max(1, MAX_SCORES // max(1, num_rows * num_q_heads * _longest_stretch(plan)))
    pieces = []
    for first in range(0, num_new, columns):
        piece = _Columns(plan, grouped[:, :, :, first : first + columns], first, window, softcap)
        pieces.append(piece.attend(storage, layer))
    out = torch.cat([piece[0] for piece in pieces], 3) if len(pieces) > 1 else pieces[0][0]
    lse = torch.cat([piece[1] for piece in pieces], 3) if len(pieces) > 1 else pieces[0][1]
    if sinks is not None:
        sink = sinks.to(dtype).view(1, num_kv_heads, group, 1)
        with_sink = torch.where(lse == -torch.inf, lse, torch.logaddexp(lse, sink))
        out = out * _weight(lse, with_sink)[..., None]
        lse = with_sink
    return out.flatten(1, 2).to(q.dtype), lse.flatten(1, 2).float()


def _longest_stretch(plan: TreeAttentionPlan) -> int:
    runs = (len(run.blocks) * plan.block_size for run in plan.runs)
    return max(plan.max_tail, *runs, 1)


def _weight(lse: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """``exp(lse - total)``, 0 where nothing was seen at all."""
    return (lse - total.masked_fill(total == -torch.inf, 0)).exp()


@dataclass(frozen=True, slots=True)
class _Columns:
    """Some query columns of a forward: ``q [B, Hkv, G, T, D]`` from column ``first`` on, scaled."""

    plan: TreeAttentionPlan
    q: torch.Tensor
    first: int
    window: Window | None
    softcap: float | None

    def attend(self, storage: KVStorage, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """``out [B, Hkv, G, T, Dv]`` and ``lse [B, Hkv, G, T]``."""
        out, lse = self._tails(storage, layer)
        for run in self.plan.runs:
            if self._sees(run):
                self._merge(out, lse, run, *self._run(storage, layer, run))
        return out, lse

    def _positions(self, rows: tuple[int, ...]) -> tuple[list[int], int, int]:
        """Position of the first column for each of ``rows``, and the lowest and highest of all."""
        plan, last = self.plan, self.first + self.q.shape[3] - 1
        starts = [plan.lengths[row] - plan.num_new + self.first for row in rows]
        return starts, min(starts), max(starts) + last - self.first

    def _sees(self, run: Run) -> bool:
        if self.window is None:
            return True
        _, low, _ = self._positions(run.rows)
        return run.start + len(run.blocks) * self.plan.block_size > self.window.first_visible(low)

    def _run(self, storage: KVStorage, layer: int, run: Run) -> tuple[torch.Tensor, torch.Tensor]:
        """Partial ``[R, Hkv, G, T, Dv]`` and ``[R, Hkv, G, T]`` of the R rows of ``run``."""
        index = self.plan.scratch.get(run)
        if index is None:
            index = SlabIndex.of(run.blocks, storage.slab_blocks, storage.spec.device)
            self.plan.scratch[run] = index
        k, v = (x.flatten(0, 1).to(self.q.dtype) for x in storage.gather_blocks(layer, index))
        q = self.q if len(run.rows) == self.plan.num_rows else self.q[list(run.rows)]
        num_rows, num_kv_heads, group, num_new, head_dim = q.shape
        queries = q.transpose(0, 1).reshape(num_kv_heads, -1, head_dim)
        scores = queries @ k.permute(1, 2, 0)  # [Hkv, R * G * T, L]
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        hidden = self._hidden(run, scores.device)
        if hidden is not None:
            view = scores.view(num_kv_heads, num_rows, group, num_new, -1)
            view.masked_fill_(hidden[None, :, None], -torch.inf)
        out, lse = _softmax_product(scores, v.transpose(0, 1))
        shape = (num_kv_heads, num_rows, group, num_new)
        return out.view(*shape, -1).transpose(0, 1), lse.view(shape).transpose(0, 1)

    def _hidden(self, run: Run, device: torch.device) -> torch.Tensor | None:
        """``[R, T, L]`` bool, true where the window hides a token; None when it hides none."""
        if self.window is None:
            return None
        starts, _, high = self._positions(run.rows)
        if self.window.first_visible(high) <= run.start:
            return None
        key = (run.rows, run.start, self.first, self.window)
        hidden = self.plan.scratch.get(key)
        if hidden is None:
            queries = torch.tensor(starts)[:, None] + torch.arange(self.q.shape[3])
            keys = run.start + torch.arange(len(run.blocks) * self.plan.block_size)
            hidden = (keys < self.window.first_visible(queries)[:, :, None]).to(device)
            self.plan.scratch[key] = hidden
        return hidden

    @staticmethod
    def _merge(
        out: torch.Tensor, lse: torch.Tensor, run: Run, run_out: torch.Tensor, run_lse: torch.Tensor
    ) -> None:
        """Fold the partial of some rows into the whole, in place."""
        all_rows = len(run.rows) == out.shape[0]
        rows = slice(None) if all_rows else list(run.rows)
        total = torch.logaddexp(lse[rows], run_lse)
        merged = out[rows] * _weight(lse[rows], total)[..., None]
        out[rows] = merged.add_(run_out * _weight(run_lse, total)[..., None])
        lse[rows] = total

    def _tails(self, storage: KVStorage, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """All tails, padded to the longest: ``[B, Hkv, G, T, Dv]`` and ``[B, Hkv, G, T]``."""
        num_rows, num_kv_heads, group, num_new, head_dim = self.q.shape
        tail = self._prepared_tails(storage)
        k, v = (
            x.view(num_rows, -1, *x.shape[2:]).permute(0, 2, 1, 3).to(self.q.dtype)
            for x in storage.gather_blocks(layer, tail.blocks)
        )
        # A slot that nobody wrote may hold NaN, and 0 * NaN is NaN.
        v = v.masked_fill(tail.unwritten, 0)
        scores = self.q.reshape(num_rows, num_kv_heads, -1, head_dim) @ k.transpose(2, 3)
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        view = scores.view(num_rows, num_kv_heads, group, num_new, -1)
        view.masked_fill_(tail.hidden, -torch.inf)
        out, lse = _softmax_product(scores, v)
        shape = (num_rows, num_kv_heads, group, num_new)
        return out.view(*shape, -1), lse.view(shape)

    def _prepared_tails(self, storage: KVStorage) -> _Tails:
        key = ("tails", self.first, self.window, storage.spec.device)
        tail = self.plan.scratch.get(key)
        if tail is None:
            tail = self.plan.scratch[key] = _Tails.of(self, storage)
        return tail


@dataclass(frozen=True, slots=True)
class _Tails:
    """The padded tails of a forward.

    Attributes:
        blocks: B * n blocks; short tails repeat a block that is masked out.
        unwritten: ``[B, 1, n * block_size, 1]`` bool, slots behind the row's last token.
        hidden: ``[B, 1, 1, T, n * block_size]`` bool, what a query must not see.
    """

    blocks: SlabIndex
    unwritten: torch.Tensor
    hidden: torch.Tensor

    @classmethod
    def of(cls, columns: _Columns, storage: KVStorage) -> _Tails:
        plan = columns.plan
        width = -(-max(plan.max_tail, 1) // plan.block_size)
        anything = next((blocks[0] for blocks in plan.tail_blocks if blocks), 0)
        padded = [
            block
            for blocks in plan.tail_blocks
            for block in (*blocks, *[anything] * (width - len(blocks)))
        ]
        lengths = torch.tensor(plan.lengths)[:, None]
        keys = torch.tensor(plan.tail_starts)[:, None] + torch.arange(width * plan.block_size)
        unwritten = keys >= lengths
        column = torch.arange(columns.first, columns.first + columns.q.shape[3])
        queries = lengths - plan.num_new + column
        hidden = keys[:, None, :] > queries[:, :, None]
        if columns.window is not None:
            hidden |= keys[:, None, :] < columns.window.first_visible(queries)[:, :, None]
        new = plan.num_new - torch.tensor(plan.counts)[:, None]
        hidden |= (column < new)[:, :, None]
        device = storage.spec.device
        return cls(
            SlabIndex.of(padded, storage.slab_blocks, device),
            unwritten[:, None, :, None].to(device),
            hidden[:, None, None].to(device),
        )


def _softmax_product(scores: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``softmax(scores) @ v`` and the log-sum-exp of the scores; 0 and -inf for a row of -inf."""
    peak = scores.amax(-1, keepdim=True)
    pivot = peak.masked_fill(peak == -torch.inf, 0)
    weights = scores.sub_(pivot).exp_()
    total = weights.sum(-1, keepdim=True)
    out = weights @ v
    out /= total.clamp_min(torch.finfo(total.dtype).tiny)
    return out, (total.log() + pivot).squeeze(-1)
