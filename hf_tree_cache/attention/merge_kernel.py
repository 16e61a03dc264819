"""The fused kernel's merge: it waits until all parts of a few queries are there, and adds them up.

Names as in :mod:`.kernel`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .softmax_kernel import LN2, add_sink


@triton.jit
def merge(
    p_out,
    p_lse,
    p_sinks,
    p_record,
    p_part,
    p_part_lse,
    p_arrived,
    p_part_ptr,
    p_part_slots,
    i_head,
    num_queries,
    HKV: tl.constexpr,
    G: tl.constexpr,
    DV: tl.constexpr,
    DVP: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    SINKS: tl.constexpr,
):
    """Wait for all parts of up to ROWS // G queries, then merge them by their log-sum-exp."""
    HQ: tl.constexpr = HKV * G
    o_r = tl.arange(0, ROWS)
    o_p = tl.arange(0, PARTS)
    o_dv = tl.arange(0, DVP)
    i_member = o_r // G
    m_query = i_member < num_queries
    i_query = tl.load(p_record + 8 + i_member, mask=m_query, other=0)
    o_head = i_head * G + o_r % G
    i_begin = tl.load(p_part_ptr + i_query, mask=m_query, other=0)
    num_parts = tl.load(p_part_ptr + i_query + 1, mask=m_query, other=0) - i_begin
    most_parts = tl.max(num_parts, 0)
    m_part = o_p[None, :] < num_parts[:, None]  # [ROWS, PARTS]
    b_slot = tl.load(p_part_slots + i_begin[:, None] + o_p[None, :], mask=m_part, other=0)
    p_count = p_arrived + i_query * HKV + i_head
    missing = 1
    while missing > 0:
        b_arrived = tl.atomic_add(p_count, tl.zeros([ROWS], tl.int32), mask=m_query, sem="acquire")
        missing = tl.max(tl.where(m_query, num_parts - b_arrived, 0), 0)
    # What one thread acquired, all may read.
    tl.debug_barrier()
    b_acc = tl.zeros([ROWS, DVP], tl.float32)
    b_max = tl.full([ROWS], float("-inf"), tl.float32)
    b_sum = tl.zeros([ROWS], tl.float32)
    m_dv = (o_dv < DV)[None, None, :]
    for j in tl.range(0, most_parts, PARTS, num_stages=1):
        o_part = b_slot.to(tl.int64) * HQ + o_head[:, None]
        b_lse = tl.load(
            p_part_lse + o_part * 2, mask=m_part, other=float("-inf"), cache_modifier=".cg"
        )
        b_part = tl.load(
            p_part + (o_part[:, :, None] * DV + o_dv[None, None, :]),
            mask=m_part[:, :, None] & m_dv,
            other=0.0,
            cache_modifier=".cg",
        ).to(tl.float32)
        b_scale = tl.full([ROWS, PARTS], 1.0, tl.float32)
        if p_part.dtype.element_ty == tl.float16:
            b_scale = tl.load(
                p_part_lse + o_part * 2 + 1, mask=m_part, other=0.0, cache_modifier=".cg"
            )
        m_part = j + PARTS + o_p[None, :] < num_parts[:, None]
        p_slots = p_part_slots + i_begin[:, None] + j + PARTS + o_p[None, :]
        b_slot = tl.load(p_slots, mask=m_part, other=0)
        b_new = tl.maximum(b_max, tl.max(b_lse, 1))
        b_pivot = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_decay = tl.math.exp2(b_max - b_pivot)
        b_weight = tl.math.exp2(b_lse - b_pivot[:, None])
        b_acc = b_acc * b_decay[:, None] + tl.sum(b_part * (b_weight * b_scale)[:, :, None], 1)
        b_sum = b_sum * b_decay + tl.sum(b_weight, 1)
        b_max = b_new
    b_decay = tl.full([ROWS], 1.0, tl.float32)
    if SINKS:
        b_max, b_decay, b_sum = add_sink(p_sinks, o_head, b_max, b_sum)
    o_out = i_query.to(tl.int64) * HQ + o_head
    b_o = (b_acc * (b_decay / b_sum)[:, None]).to(p_out.dtype.element_ty)
    m_out = m_query[:, None] & (o_dv < DV)[None, :]
    tl.store(p_out + (o_out[:, None] * DV + o_dv[None, :]), b_o, mask=m_out)
    tl.store(p_lse + o_out, (b_max + tl.math.log2(b_sum)) * LN2, mask=m_query)
    # Ready for the next layer.
    tl.store(p_count, tl.zeros([ROWS], tl.int32), mask=m_query & (o_r % G == 0))
