"""Tree attention in plain torch: each run read once for all its rows, partials merged by LSE."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import torch

from ..memory.storage import KVReader, SlabIndex
from ..sending import send, to_device
from .plan import Run, TreeAttentionPlan, Window

STRETCH_TOKENS = 256
"""What lies in pieces of so many tokens on average is read where it lies, piece by piece; what lies
in smaller ones is copied together."""

PIECE_TOKENS = 1_024
"""What a CPU's threads get of one head, at least, where there are too few heads for them."""

QUERIES_AT_A_TIME = 32
"""Of one head, that torch's CPU kernel gives one thread."""

MAX_SCORES = 1 << 25
"""Scores of a product held at a time (float32: 128 MB); longer extends go in pieces of columns."""


Partial = tuple[torch.Tensor, torch.Tensor]
"""An output, and its log-sum-exp."""


def tree_attention_torch(
    q: torch.Tensor,
    storage: KVReader,
    layer: int,
    plan: TreeAttentionPlan,
    *,
    scale: float,
    window: Window | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`tree_attention_reference`, each run read once for all its rows.

    Partial results are merged by their log-sum-exp (Rabe and Staats, 2021; FlashInfer's cascade),
    in float32, or in float64 for float64 inputs.
    """
    num_rows, num_q_heads, num_new, _ = q.shape
    only = num_new == 1 and plan.counts == (1,) and sinks is None
    if only and _is_fused(q, storage.spec.k_head_dim, storage.spec.v_head_dim, softcap):
        return _attend_alone(q, storage, layer, plan, scale, window)
    per_column = num_rows * num_q_heads * _longest_stretch(plan)
    step = max(1, MAX_SCORES // max(1, per_column))
    pieces = []
    for first in range(0, num_new, step):
        columns = q[:, :, first : first + step].unflatten(1, (storage.spec.num_kv_heads, -1))
        pieces.append(_Columns(plan, columns, first, scale, window, softcap).attend(storage, layer))
    out, lse = pieces[0]
    if len(pieces) > 1:
        out, lse = (torch.cat(parts, 3) for parts in zip(*pieces, strict=True))
    if sinks is not None:
        sink = sinks.to(lse.dtype).unflatten(0, lse.shape[1:3])[None, :, :, None]
        with_sink = torch.where(lse == -torch.inf, lse, torch.logaddexp(lse, sink))
        out, lse = out * (lse - sink).sigmoid_().unsqueeze(-1), with_sink
    return out.flatten(1, 2).to(q.dtype), lse.flatten(1, 2).float()


def _attend_alone(
    q: torch.Tensor,
    storage: KVReader,
    layer: int,
    plan: TreeAttentionPlan,
    scale: float,
    window: Window | None,
) -> Partial:
    """The only query of the only row, on a CPU: all it sees at once where that lies in one piece.

    With little around the product, which counts in small models.
    """
    key = ("alone", storage.index_key, window)
    indices = plan.scratch.get(key)
    if indices is None:
        indices = plan.scratch[key] = _find_alone(plan, storage, window)
    grouped = q.reshape(1, storage.spec.num_kv_heads, -1, q.shape[3])
    parts = list[Partial]()
    for index in indices:
        k, v = (x.transpose(0, 1)[None] for x in storage.gather_slots(layer, index))
        parts += _in_pieces(grouped, k, v, scale, plan)
    out, lse = reduce(_merge, parts)
    return out.reshape(q.shape).to(q.dtype), lse.reshape(q.shape[:3]).float()


def _find_alone(
    plan: TreeAttentionPlan, storage: KVReader, window: Window | None
) -> tuple[SlabIndex, ...]:
    """Where the tokens are that the only query sees."""
    plan.check_fresh()
    size, (end,), (branch,) = plan.block_size, plan.lengths, plan.tree.rows
    first = 0 if window is None else max(0, window.first_visible(end - 1))
    places, table = np.arange(first, end), np.array(plan.tree.block_table(branch), np.int64)
    slots = table.take(places // size) * size + places % size
    return storage.index_stretches(slots, STRETCH_TOKENS, slots=True)


def _longest_stretch(plan: TreeAttentionPlan) -> int:
    runs = (len(run.blocks) * plan.block_size for run in plan.runs)
    return max(plan.max_tail, *runs, 1)


def _merge(one: Partial, other: Partial) -> Partial:
    """Of all that either has seen; NaN where that is nothing."""
    (out, lse), (part, part_lse) = one, other
    weight = (part_lse - lse).sigmoid_().unsqueeze(-1)
    return torch.lerp(out, part, weight), torch.logaddexp(lse, part_lse)


def _is_fused(q: torch.Tensor, k_dim: int, v_dim: int, softcap: float | None) -> bool:
    """Whether :func:`_fused_product` serves."""
    return q.device.type == "cpu" and softcap is None and k_dim == v_dim


def _in_pieces(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, plan: TreeAttentionPlan
) -> list[Partial]:
    """``q [1, H, M, D]`` attends to all of ``k`` and ``v [1, H, L, D]``, in as many parts as keep
    all threads of a CPU busy."""
    pieces, again = _count_pieces(q.shape[1], q.shape[2], k.shape[2]), None
    if pieces > 1:
        q, k, v = q.expand(pieces, -1, -1, -1), _overlapping(k, pieces), _overlapping(v, pieces)
        key = ("again", pieces, k.shape[2], k.stride(0) // k.stride(2))
        again = plan.scratch.get(key)
        if again is None:
            again = plan.scratch[key] = _find_again(*key[1:])
    out, lse = _fused_product(q, k, v, scale, again)
    out = out.to(lse.dtype)
    return [(out, lse)] if pieces == 1 else list(zip(out.split(1), lse.split(1), strict=True))


def _count_pieces(num_heads: int, num_queries: int, num_tokens: int) -> int:
    """In how many pieces tokens are to be read, so that threads end together."""
    threads = torch.get_num_threads()
    tasks = num_heads * -(-num_queries // QUERIES_AT_A_TIME)
    return max(1, min(threads // math.gcd(tasks, threads), num_tokens // PIECE_TOKENS))


def _overlapping(x: torch.Tensor, pieces: int) -> torch.Tensor:
    """``x [1, H, L, D]`` as a view ``[pieces, H, n, D]``, equal in length, so some begin early."""
    _, num_heads, length, width = x.shape
    own = -(-length // pieces)
    own += (length - own) % (pieces - 1)
    step = (length - own) // (pieces - 1) * x.stride(2)
    shape, strides = (pieces, num_heads, own, width), (step, *x.stride()[1:])
    return x.as_strided(shape, strides, x.storage_offset())


@dataclass(frozen=True, slots=True)
class _Hidden:
    """What some queries must not see.

    Attributes:
        keys: bool, true on hidden keys, broadcast to ``[X, 1, M, L]``.
        queries: bool ``[X, 1, M]``, true where all keys are hidden; None where that cannot be.
    """

    keys: torch.Tensor
    queries: torch.Tensor | None


def _find_again(pieces: int, length: int, step: int) -> _Hidden:
    """What pieces of :func:`_overlapping` have in common is of the later one alone."""
    keys = torch.zeros(pieces, 1, 1, length, dtype=torch.bool)
    keys[:-1, :, :, step:] = True
    return _Hidden(keys, None)


@dataclass(frozen=True, slots=True)
class _Columns:
    """Some query columns of a forward: ``q [B, Hkv, G, T, D]``, from column ``first`` on."""

    plan: TreeAttentionPlan
    q: torch.Tensor
    first: int
    scale: float
    window: Window | None
    softcap: float | None

    def attend(self, storage: KVReader, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """``out [B, Hkv, G, T, Dv]`` and ``lse [B, Hkv, G, T]``."""
        whole = self._tails(storage, layer)
        for run in self.plan.runs:
            if not self._sees(run):
                continue
            rows = self._rows(run, storage)
            for part in self._run(storage, layer, run):
                if len(run.rows) == self.plan.num_rows:
                    whole = _merge(whole, part)
                    continue
                out, lse = whole
                out[rows], lse[rows] = _merge((out[rows], lse[rows]), part)
        out, lse = whole
        padding = self._padding(storage)
        if padding is not None:
            out.masked_fill_(padding.unsqueeze(-1), 0)
            lse.masked_fill_(padding, -torch.inf)
        return out, lse

    def _tails(self, storage: KVReader, layer: int) -> Partial:
        """All tails, padded to the longest: ``[B, Hkv, G, T, Dv]`` and ``[B, Hkv, G, T]``."""
        if not self.plan.max_tail:
            shape, dtype = self.q.shape[:4], torch.promote_types(self.q.dtype, torch.float32)
            lse = self.q.new_full(shape, -torch.inf, dtype=dtype)
            return lse.new_zeros((*shape, storage.spec.v_head_dim)), lse
        slots, hidden = self._remember(("tails", storage.index_key), _read_tails, storage)
        k, v = (
            x.unflatten(0, (len(self.q), -1)).transpose(1, 2)
            for x in storage.gather_slots(layer, slots)
        )
        out, lse = self._product(self.q.flatten(2, 3), k, v, hidden)
        return out.unflatten(2, self.q.shape[2:4]), lse.unflatten(2, self.q.shape[2:4])

    def _run(self, storage: KVReader, layer: int, run: Run) -> list[Partial]:
        """Of the R rows of ``run``: ``[R, Hkv, G, T, Dv]`` and ``[R, Hkv, G, T]``."""
        run, hidden = self._within(run), None
        if self.window is not None:
            key = (run.rows, run.start, storage.spec.device)
            hidden = self._remember(key, _read_run, storage, run)
        # Plans hand indices of whole runs on to the next; a window moves, and lets blocks go.
        first = (run,) if self.window is None and not storage.forgets else ("run", run)
        place = (*first, storage.index_key, hidden is None)
        indices = self.plan.scratch.get(place)
        if indices is None:
            least = -(-STRETCH_TOKENS // self.plan.block_size)
            indices = (
                storage.index_stretches(run.blocks, least)
                if hidden is None
                else (storage.index_blocks(run.blocks),)
            )
            self.plan.scratch[place] = indices
        q = self.q[self._rows(run, storage)].transpose(0, 1).flatten(1, 3)[None]
        parts = list[Partial]()
        for index in indices:
            gathered = storage.gather_blocks(layer, index)
            k, v = (x.flatten(0, 1).transpose(0, 1)[None] for x in gathered)
            # One new token a row: threads may lack queries.
            if hidden is None and self.q.shape[3] == 1 and self._is_fused(k, v):
                parts += _in_pieces(q, k, v, self.scale, self.plan)
            else:
                parts.append(self._product(q, k, v, hidden))
        shape = (len(run.rows), *self.q.shape[2:4])
        return [
            (out[0].unflatten(1, shape).transpose(0, 1), lse[0].unflatten(1, shape).transpose(0, 1))
            for out, lse in parts
        ]

    def _rows(self, run: Run, storage: KVReader) -> slice | torch.Tensor:
        """Of ``run``, as an index that no layer has to send to the device again."""
        first, count = run.rows[0], len(run.rows)
        if run.rows[-1] - first == count - 1:
            return slice(first, first + count)
        return self._remember((run.rows, storage.spec.device), _read_rows, storage, run)

    def _product(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, hidden: _Hidden | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``q [X, H, M, D]`` attends to ``k [X, H, L, D]``, ``v [X, H, L, Dv]``: out and LSE."""
        if self._is_fused(k, v):
            out, lse = _fused_product(q, k, v, self.scale, hidden)
        else:
            out, lse = _plain_product(q, k, v, self.scale, self.softcap, hidden)
        if hidden is not None and hidden.queries is not None:
            lse = lse.masked_fill(hidden.queries, -torch.inf)
        return out.to(lse.dtype), lse

    def _is_fused(self, k: torch.Tensor, v: torch.Tensor) -> bool:
        return _is_fused(self.q, k.shape[3], v.shape[3], self.softcap)

    def _sees(self, run: Run) -> bool:
        end = run.start + len(run.blocks) * self.plan.block_size
        return end > self._first_visible(run)

    def _within(self, run: Run) -> Run:
        """``run`` without the blocks before the window of all its rows."""
        hidden = (self._first_visible(run) - run.start) // self.plan.block_size
        if hidden <= 0:
            return run
        start = run.start + hidden * self.plan.block_size
        return Run(run.rows, start, run.blocks[hidden:])

    def _first_visible(self, run: Run) -> int:
        """The first position that any query of the rows of ``run`` sees."""
        if self.window is None:
            return 0
        lowest = min(self.plan.lengths[row] for row in run.rows) - self.plan.num_new + self.first
        return self.window.first_visible(lowest)

    def positions(self, rows: tuple[int, ...]) -> torch.Tensor:
        """``[R, T]`` int64, position of each query of ``rows``; padding lies before its row."""
        ends = torch.tensor([self.plan.lengths[row] for row in rows])[:, None]
        return ends - self.plan.num_new + self.first + torch.arange(self.q.shape[3])

    def _padding(self, storage: KVReader) -> torch.Tensor | None:
        """``[B, 1, 1, T]`` bool, true on columns before a row's new tokens; None where none is."""
        if min(self.plan.counts) == self.plan.num_new:
            return None
        return self._remember(("padding", storage.spec.device), _read_padding, storage)

    def _remember(self, key: tuple[Any, ...], make: Callable[..., Any], *arguments: Any) -> Any:
        """What ``make`` gives, once for all layers of this window and group size.

        Layers with other heads may cut the same forward into wider or narrower columns.
        """
        key = (*key, self.first, self.window, self.q.shape[2:4])
        if key not in self.plan.scratch:
            self.plan.scratch[key] = make(self, *arguments)
        return self.plan.scratch[key]


def _read_tails(columns: _Columns, storage: KVReader) -> tuple[SlabIndex, _Hidden | None]:
    """Slots of the padded tails, B * L of them, and what their queries must not see."""
    plan, size, device = columns.plan, columns.plan.block_size, storage.spec.device
    width = plan.max_tail
    # Short tails repeat a written slot: an unwritten one may hold NaN, and 0 * NaN is NaN.
    written = next(blocks[0] for blocks in plan.tail_blocks if blocks)
    most = -(-width // size)
    padded = [(*blocks, *[written] * most)[:most] for blocks in plan.tail_blocks]
    starts, place = torch.tensor(plan.tail_starts)[:, None], torch.arange(width)
    slots = torch.tensor(padded)[:, place // size] * size + place % size
    beyond = place >= torch.tensor(plan.lengths)[:, None] - starts
    slots = slots.masked_fill_(beyond, written * size).flatten()
    keys = starts + place
    queries = columns.positions(tuple(range(plan.num_rows)))
    hidden = keys[:, None, :] > queries[:, :, None]
    if columns.window is not None:
        hidden |= keys[:, None, :] < columns.window.first_visible(queries)[:, :, None]
    index = storage.index_slots(slots)
    if not bool(hidden.any()):
        return index, None
    # A query sees itself, so only padding sees nothing, and that is blanked in the end.
    return index, _Hidden(send(_for_groups(hidden, columns.q.shape[2]), device), None)


def _read_run(columns: _Columns, storage: KVReader, run: Run) -> _Hidden | None:
    """What the window hides of ``run``; None when nothing."""
    assert columns.window is not None
    queries = columns.positions(run.rows)
    keys = run.start + torch.arange(len(run.blocks) * columns.plan.block_size)
    hidden = keys < columns.window.first_visible(queries)[:, :, None]
    if not bool(hidden.any()):
        return None
    grouped = send(_for_groups(hidden, columns.q.shape[2]), storage.spec.device)
    stacked = grouped.transpose(0, 1).flatten(1, 2)[None]
    return _Hidden(stacked, stacked.all(-1))


def _read_rows(columns: _Columns, storage: KVReader, run: Run) -> torch.Tensor:
    return to_device(run.rows, storage.spec.device)


def _read_padding(columns: _Columns, storage: KVReader) -> torch.Tensor:
    new = columns.plan.num_new - torch.tensor(columns.plan.counts)[:, None]
    column = columns.first + torch.arange(columns.q.shape[3])
    return send((column < new)[:, None, None], storage.spec.device)


def _for_groups(hidden: torch.Tensor, group: int) -> torch.Tensor:
    """``[B, T, L]`` as ``[B, 1, G * T, L]``."""
    return hidden[:, None].expand(-1, group, -1, -1).flatten(1, 2)[:, None]


def _fused_product(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, hidden: _Hidden | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The CPU flash attention behind scaled_dot_product_attention, which knows the LSE."""
    bias = None
    if hidden is not None:
        bias = torch.zeros(hidden.keys.shape, dtype=q.dtype).masked_fill_(hidden.keys, -torch.inf)
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, False, attn_mask=bias, scale=scale
    )


def _plain_product(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    softcap: float | None,
    hidden: _Hidden | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two matrix products and a softmax, in float32 or float64."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    scores = _matmul(q, k.transpose(2, 3), dtype).mul_(scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if hidden is not None:
        scores = scores.masked_fill_(hidden.keys, -torch.inf)
    peak = scores.amax(-1, keepdim=True)
    pivot = peak.masked_fill(peak == -torch.inf, 0)
    weights = scores.sub_(pivot).exp_()
    total = weights.sum(-1, keepdim=True)
    out = _matmul(weights, v, dtype)
    out /= total.clamp_min(torch.finfo(dtype).tiny)
    return out, (total.log() + pivot).squeeze(-1)


def _matmul(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``a @ b`` in ``dtype``, of ``[X, H, ., .]``.

    On a GPU numbers of half precision go to its tensor cores as they are, and are summed in
    float32; a copy of K or V in float32 would cost more than the product.
    """
    if b.is_cuda and b.dtype in (torch.bfloat16, torch.float16) and dtype == torch.float32:
        pair = a.to(b.dtype).flatten(0, 1), b.flatten(0, 1)
        return torch.bmm(*pair, out_dtype=torch.float32).unflatten(0, a.shape[:2])
    return a.to(dtype) @ b.to(dtype)
