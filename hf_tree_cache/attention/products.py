"""The two products of an attention that a model does by itself, each shared run read once.

What lies between them (biases, masks, softmax) is the model's: it gets scores of every column of
every row, as it would from dense K/V, padded on the left.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..memory.storage import KVReader, SlabIndex
from ..sending import to_device
from .plan import TreeAttentionPlan


def times_keys(
    q: torch.Tensor, storage: KVReader, layer: int, plan: TreeAttentionPlan, columns: int
) -> torch.Tensor:
    """``q @ K.transpose(2, 3)``, 0 in columns of padding.

    Args:
        q: ``[B, H, M, Dk]``, as many heads as K.
        columns: L, of dense K.

    Returns:
        ``[B, H, M, L]`` in the dtype of ``q``.
    """
    layout = _layout(plan, storage, columns)
    scores = q.new_zeros((*q.shape[:3], columns))
    if layout.width:
        keys = _tails(storage.gather_slots(layer, layout.slots)[0], layout, q.dtype)
        part = q @ keys.transpose(2, 3)
        if layout.own is not None:
            part = part.masked_fill_(~layout.own, 0)
        scores[..., columns - layout.width :] = part
    for blocks, places in layout.runs:
        keys = storage.gather_blocks(layer, blocks)[0].flatten(0, 1).to(q.dtype).permute(1, 2, 0)
        for rows, first in places:
            scores[rows, :, :, first : first + keys.shape[2]] = _stacked(q[rows], keys)
    return scores


def times_values(
    weights: torch.Tensor, storage: KVReader, layer: int, plan: TreeAttentionPlan
) -> torch.Tensor:
    """``weights @ V``; what ``weights [B, H, M, L]`` holds in columns of padding has no part in it.

    Returns:
        ``[B, H, M, Dv]`` in the dtype of ``weights``.
    """
    columns, dtype = weights.shape[3], weights.dtype
    layout = _layout(plan, storage, columns)
    shape = (*weights.shape[:3], storage.spec.v_head_dim)
    out = weights.new_zeros(shape, dtype=torch.promote_types(dtype, torch.float32))
    if layout.width:
        part = weights[..., columns - layout.width :]
        if layout.own is not None:
            part = part.masked_fill(~layout.own, 0)
        out += part @ _tails(storage.gather_slots(layer, layout.slots)[1], layout, dtype)
    for blocks, places in layout.runs:
        values = storage.gather_blocks(layer, blocks)[1].flatten(0, 1).to(dtype).transpose(0, 1)
        for rows, first in places:
            part = weights[rows, :, :, first : first + values.shape[1]]
            out[rows] += _stacked(part, values)
    return out.to(dtype)


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where runs and tails stand among the columns.

    Attributes:
        runs: blocks of each run, and for its rows of equal padding their numbers and first column.
        width: columns of the longest tail; all tails end in the last column.
        slots: of the tails, width of them a row, shorter ones filled up in front.
        own: bool ``[B, 1, 1, width]``, false where filled up; None where nothing is.
    """

    runs: list[tuple[SlabIndex, list[tuple[torch.Tensor | slice, int]]]]
    width: int
    slots: SlabIndex
    own: torch.Tensor | None


def _layout(plan: TreeAttentionPlan, storage: KVReader, columns: int) -> _Layout:
    """Made once for all layers."""
    key = ("columns", columns, storage.index_key)
    if key not in plan.scratch:
        plan.scratch[key] = _make_layout(plan, storage, columns)
    layout: _Layout = plan.scratch[key]
    return layout


def _make_layout(plan: TreeAttentionPlan, storage: KVReader, columns: int) -> _Layout:
    device, size = storage.spec.device, plan.block_size
    runs = []
    for run in plan.runs:
        rows_of: dict[int, list[int]] = {}
        for row in run.rows:
            rows_of.setdefault(columns - plan.lengths[row] + run.start, []).append(row)
        places = [
            (
                slice(None) if len(rows) == plan.num_rows else to_device(rows, device),
                first,
            )
            for first, rows in rows_of.items()
        ]
        runs.append((storage.index_blocks(run.blocks), places))
    width = plan.max_tail
    # Short tails repeat a written slot: an unwritten one may hold NaN, and 0 * NaN is NaN.
    written = next((blocks[0] * size for blocks in plan.tail_blocks if blocks), 0)
    slots, own = [], []
    for start, length, blocks in zip(plan.tail_starts, plan.lengths, plan.tail_blocks, strict=True):
        tail = [block * size + i for block in blocks for i in range(size)][: length - start]
        slots += [written] * (width - len(tail)) + tail
        own.append([column >= width - len(tail) for column in range(width)])
    mask = None if all(map(all, own)) else to_device(own, device, torch.bool)[:, None, None]
    index = storage.index_slots(slots)
    return _Layout(runs, width, index, mask)


def _tails(gathered: torch.Tensor, layout: _Layout, dtype: torch.dtype) -> torch.Tensor:
    """``[B * width, H, D]`` as ``[B, H, width, D]``."""
    return gathered.unflatten(0, (-1, layout.width)).transpose(1, 2).to(dtype)


def _stacked(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """``left [R, H, M, X] @ right [H, X, Y]``, all rows in one product for each head."""
    rows = left.transpose(0, 1)
    return (rows.flatten(1, 2) @ right).unflatten(1, rows.shape[1:3]).transpose(0, 1)
