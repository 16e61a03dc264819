"""The torch oracle: row by row, query by query, in float64. Slow and obvious."""

from __future__ import annotations

import torch

from ..memory.storage import KVReader
from .plan import TreeAttentionPlan, Window


def tree_attention_reference(
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
    """Attention of every new token to its row's stored tokens, itself included.

    Args:
        q: ``[B, Hq, T, Dk]``; row b's new tokens are its last ``plan.counts[b]`` columns.
        storage: holds the K/V of this forward's tokens already.
        layer: position of the layer in ``storage``.
        plan: this forward's work list.
        scale: factor on the scores.
        window: tokens that a query may look back to; None for all.
        softcap: ``softcap * tanh(score / softcap)`` on the scaled scores.
        sinks: ``[Hq]`` logits that join each softmax's denominator (gpt-oss).

    Returns:
        ``out [B, Hq, T, Dv]`` in the dtype of ``q`` and ``lse [B, Hq, T]`` float32 (natural log,
        sinks included); columns before a row's new tokens are 0 and -inf.
    """
    num_rows, num_q_heads, num_new, _ = q.shape
    group = num_q_heads // storage.spec.num_kv_heads
    out = q.new_zeros(num_rows, num_q_heads, num_new, storage.spec.v_head_dim)
    lse = torch.full((num_rows, num_q_heads, num_new), -torch.inf, device=q.device)
    for row in range(num_rows):
        slots = storage.index_slots(_row_slots(plan, row))
        k, v = (x.double().repeat_interleave(group, 1) for x in storage.gather_slots(layer, slots))
        positions = torch.arange(plan.lengths[row], device=q.device)
        for back in range(plan.counts[row], 0, -1):
            position, column = plan.lengths[row] - back, num_new - back
            scores = torch.einsum("hd,lhd->hl", q[row, :, column].double(), k) * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            first = 0 if window is None else window.first_visible(position)
            scores[:, (positions > position) | (positions < first)] = -torch.inf
            if sinks is not None:
                scores = torch.cat([scores, sinks.double()[:, None]], 1)
            row_lse = scores.logsumexp(1)
            weights = (scores - row_lse[:, None]).exp()[:, : len(positions)]
            out[row, :, column] = torch.einsum("hl,lhd->hd", weights, v).to(out.dtype)
            lse[row, :, column] = row_lse.float()
    return out, lse


def _row_slots(plan: TreeAttentionPlan, row: int) -> list[int]:
    """Slots of a row's tokens in order, put together from the plan alone."""
    size = plan.block_size
    pieces = {run.start: run.blocks for run in plan.runs if row in run.rows}
    pieces[plan.tail_starts[row]] = plan.tail_blocks[row]
    blocks: list[int] = []
    for start in sorted(pieces):
        assert len(blocks) * size == start, f"row {row} has {len(blocks)} blocks before {start}"
        blocks.extend(pieces[start])
    length = plan.lengths[row]
    assert len(blocks) == -(-length // size), f"row {row}: {len(blocks)} blocks for {length} tokens"
    return [blocks[i // size] * size + i % size for i in range(length)]
