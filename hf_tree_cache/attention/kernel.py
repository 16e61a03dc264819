"""The fused kernel: block gather, GQA, online softmax, split-KV and the merge over the tree.

One launch a layer. Programs are (item, K/V head) pairs, heads fastest. An item's record says what
it is (:mod:`.schedule` writes it):

* small, large: a tile of queries meets a run of blocks; only the tile sizes differ;
* merge: waits until all parts of a few queries are there, then adds them up.

docs/tree_attention.md explains the stages, what each costs, and why a merge can never wait forever.
Prefixes: ``p_`` pointer, ``i_`` index, ``o_`` offsets, ``b_`` values of a block, ``m_`` mask.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
UNLIMITED = tl.constexpr(1 << 30)
PATIENCE = tl.constexpr(1000)  # polls, of about a microsecond


@triton.jit
def _scores(b_q, b_k, cap_scale, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr):
    """[M, KV], to be multiplied by ``qk_scale``."""
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
    if SOFTCAP:
        b_s = 1.0 - 2.0 / (tl.math.exp2(b_s * cap_scale) + 1.0)
    return b_s


@triton.jit
def _accumulate(
    b_q,  # [M, DK]
    b_k,  # [KV, DK]
    b_v,  # [KV, DV]
    b_acc,  # [M, DV] float32
    b_max,  # [M] running maximum of the scores, or the fixed pivot, times log2(e)
    b_sum,  # [M] running sum
    b_norm,  # [M, ONES] the same of weights as the product rounds them
    b_ones,  # [KV, ONES]
    m_seen,  # [M, KV]
    qk_scale,
    cap_scale,
    MASKED: tl.constexpr,
    BLIND: tl.constexpr,  # a query may see nothing of a tile, and nothing before it
    FIXED: tl.constexpr,
    ROUNDED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One step of softmax, base 2."""
    b_s = _scores(b_q, b_k, cap_scale, SOFTCAP, PRECISION)
    if FIXED:
        b_p = tl.math.exp2(b_s * qk_scale - b_max[:, None])
        if MASKED:
            b_p = tl.where(m_seen, b_p, 0.0)
        if ROUNDED:
            # As the product has them: the largest is not exact, as it is relative to a maximum.
            b_norm = tl.dot(b_p.to(b_v.dtype), b_ones, b_norm)
        else:
            b_sum += tl.sum(b_p, 1)
    else:
        if MASKED:
            b_s = tl.where(m_seen, b_s, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 1) * qk_scale)
        b_pivot = b_new
        if BLIND:
            b_pivot = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_p = tl.math.exp2(b_s * qk_scale - b_pivot[:, None])
        b_decay = tl.math.exp2(b_max - b_pivot)
        b_sum = b_sum * b_decay + tl.sum(b_p, 1)
        b_acc = b_acc * b_decay[:, None]
        b_max = b_new
    b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc, input_precision=PRECISION)
    return b_acc, b_max, b_sum, b_norm


@triton.jit
def _attend(
    p_k,
    p_v,
    p_ids,  # [KV] where a tile's block numbers are
    b_q,  # [M, DK]
    b_id,  # [KV] first block numbers
    b_id_v,
    b_max,  # [M] the pivot, if it is fixed
    b_limit,  # [M] tokens that each may see
    b_lower,  # [M] and those before that it may not
    i_head,
    i_tile,
    num_full,
    num_tokens,
    v_list,
    qk_scale,
    cap_scale,
    HKV: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    DKP: tl.constexpr,
    DVP: tl.constexpr,
    S: tl.constexpr,
    M: tl.constexpr,
    KV: tl.constexpr,
    STAGES: tl.constexpr,
    PEEL: tl.constexpr,
    WINDOW: tl.constexpr,
    FIXED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SPLIT_LIST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Softmax over a run of blocks: sums of values [M, DV], maximum [M], sum of weights [M]."""
    PER_TILE: tl.constexpr = KV // S if KV > S else 1  # blocks of a tile
    PER_BLOCK: tl.constexpr = S // KV if S > KV else 1  # tiles of a block
    ONES: tl.constexpr = 16  # the narrowest product
    ROUNDED: tl.constexpr = FIXED and p_v.dtype.element_ty == tl.bfloat16
    o_t = tl.arange(0, KV)
    o_dk = tl.arange(0, DKP)
    o_dv = tl.arange(0, DVP)
    o_k = (o_t % S)[:, None] * (HKV * DK) + i_head * DK + o_dk[None, :]  # [KV, DKP]
    o_v = (o_t % S)[:, None] * (HKV * DV) + i_head * DV + o_dv[None, :]  # [KV, DVP]
    b_acc = tl.zeros([M, DVP], tl.float32)
    b_sum = tl.zeros([M], tl.float32)
    b_norm = tl.zeros([M, ONES], tl.float32)
    b_ones = tl.full([KV, ONES], 1.0, p_v.dtype.element_ty)
    if PEEL:
        # Tokens that all queries see: no masks.
        num_plain = num_full // KV
        for t in tl.range(0, num_plain, num_stages=STAGES):
            b_next = tl.load(p_ids + (t + 1) // PER_BLOCK * PER_TILE)
            if SPLIT_LIST:
                b_next_v = tl.load(p_ids + v_list + (t + 1) // PER_BLOCK * PER_TILE)
            else:
                b_next_v = b_next
            o_inner = (t % PER_BLOCK) * KV
            o_bk = b_id.to(tl.int64) * (S * HKV * DK) + o_inner * (HKV * DK)
            o_bv = b_id_v.to(tl.int64) * (S * HKV * DV) + o_inner * (HKV * DV)
            if DK == DKP:
                b_k = tl.load(p_k + (o_bk[:, None] + o_k))
            else:
                b_k = tl.load(p_k + (o_bk[:, None] + o_k), mask=(o_dk < DK)[None, :], other=0.0)
            if DV == DVP:
                b_v = tl.load(p_v + (o_bv[:, None] + o_v))
            else:
                b_v = tl.load(p_v + (o_bv[:, None] + o_v), mask=(o_dv < DV)[None, :], other=0.0)
            b_acc, b_max, b_sum, b_norm = _accumulate(
                b_q, b_k, b_v, b_acc, b_max, b_sum, b_norm, b_ones, None, qk_scale, cap_scale,
                False, False, FIXED, ROUNDED, SOFTCAP, PRECISION,
            )  # fmt: skip
            b_id = b_next
            b_id_v = b_next_v
        i_tile = num_plain
    for t in tl.range(i_tile, tl.cdiv(num_tokens, KV), num_stages=STAGES):
        b_next = tl.load(p_ids + (t + 1) // PER_BLOCK * PER_TILE)
        if SPLIT_LIST:
            b_next_v = tl.load(p_ids + v_list + (t + 1) // PER_BLOCK * PER_TILE)
        else:
            b_next_v = b_next
        o_inner = (t % PER_BLOCK) * KV
        o_bk = b_id.to(tl.int64) * (S * HKV * DK) + o_inner * (HKV * DK)
        o_bv = b_id_v.to(tl.int64) * (S * HKV * DV) + o_inner * (HKV * DV)
        # Scores of unwritten slots are masked, whatever they are; 0 times an unwritten value is not
        # always 0, so those are not read.
        if DK == DKP:
            b_k = tl.load(p_k + (o_bk[:, None] + o_k))
        else:
            b_k = tl.load(p_k + (o_bk[:, None] + o_k), mask=(o_dk < DK)[None, :], other=0.0)
        o_token = t * KV + o_t
        m_v = (o_token < num_tokens)[:, None]
        if DV != DVP:
            m_v = m_v & (o_dv < DV)[None, :]
        b_v = tl.load(p_v + (o_bv[:, None] + o_v), mask=m_v, other=0.0)
        m_seen = o_token[None, :] < b_limit[:, None]
        if WINDOW != 0:
            m_seen = m_seen & (o_token[None, :] >= b_lower[:, None])
        b_acc, b_max, b_sum, b_norm = _accumulate(
            b_q, b_k, b_v, b_acc, b_max, b_sum, b_norm, b_ones, m_seen, qk_scale, cap_scale,
            True, WINDOW != 0, FIXED, ROUNDED, SOFTCAP, PRECISION,
        )  # fmt: skip
        b_id = b_next
        b_id_v = b_next_v
    if ROUNDED:
        b_sum = tl.max(b_norm, 1)  # of equals
    return b_acc, b_max, b_sum


@triton.jit
def _find_maxima(
    p_k,
    p_ids,
    b_q,
    b_id,
    b_limit,
    b_lower,
    i_head,
    num_tokens,
    qk_scale,
    cap_scale,
    HKV: tl.constexpr,
    DK: tl.constexpr,
    DKP: tl.constexpr,
    S: tl.constexpr,
    M: tl.constexpr,
    KV: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The largest score of each query over a run of blocks, times log2(e): [M]."""
    PER_TILE: tl.constexpr = KV // S if KV > S else 1
    PER_BLOCK: tl.constexpr = S // KV if S > KV else 1
    o_t = tl.arange(0, KV)
    o_dk = tl.arange(0, DKP)
    o_k = (o_t % S)[:, None] * (HKV * DK) + i_head * DK + o_dk[None, :]
    b_max = tl.full([M], float("-inf"), tl.float32)
    for t in tl.range(0, tl.cdiv(num_tokens, KV), num_stages=1):
        o_bk = b_id.to(tl.int64) * (S * HKV * DK) + (t % PER_BLOCK) * KV * (HKV * DK)
        b_k = tl.load(p_k + (o_bk[:, None] + o_k), mask=(o_dk < DK)[None, :], other=0.0)
        b_s = _scores(b_q, b_k, cap_scale, SOFTCAP, PRECISION)
        o_token = t * KV + o_t
        m_seen = o_token[None, :] < b_limit[:, None]
        if WINDOW != 0:
            m_seen = m_seen & (o_token[None, :] >= b_lower[:, None])
        b_max = tl.maximum(b_max, tl.max(tl.where(m_seen, b_s, float("-inf")), 1))
        b_id = tl.load(p_ids + (t + 1) // PER_BLOCK * PER_TILE)
    return b_max * qk_scale


@triton.jit
def _add_sink(p_sinks, o_head, b_max, b_sum):
    """A sink joins the denominator: new maximum, factor on what was summed, new sum."""
    b_sink = tl.load(p_sinks + o_head).to(tl.float32) * LOG2E
    b_new = tl.maximum(b_max, b_sink)
    b_decay = tl.math.exp2(b_max - b_new)
    return b_new, b_decay, b_sum * b_decay + tl.math.exp2(b_sink - b_new)


@triton.jit
def _work(
    p_q,
    p_k,
    p_v,
    p_out,
    p_lse,
    p_sinks,
    p_list,
    p_lengths,
    p_part,
    p_part_lse,
    p_arrived,
    i_query,  # [M] row * T + column
    b_limit,  # [M] tokens that each may see
    b_id,  # [KV] first block numbers
    i_head,
    i_list,
    start,
    num_queries,
    i_slot,
    num_full,
    num_tokens,
    num_new,
    stride_qb,
    stride_qh,
    stride_qt,
    v_list,
    qk_scale,
    cap_scale,
    window,
    HKV: tl.constexpr,
    G: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    DKP: tl.constexpr,
    DVP: tl.constexpr,
    S: tl.constexpr,
    M: tl.constexpr,
    KV: tl.constexpr,
    STAGES: tl.constexpr,
    PEEL: tl.constexpr,
    WINDOW: tl.constexpr,
    FIXED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
    SPLIT_LIST: tl.constexpr,
    PRECISION: tl.constexpr,
    MERGES: tl.constexpr,
):
    """Up to M // G queries, all heads of one group, over one run of blocks."""
    HQ: tl.constexpr = HKV * G
    PER_TILE: tl.constexpr = KV // S if KV > S else 1  # blocks of a tile
    PER_BLOCK: tl.constexpr = S // KV if S > KV else 1  # tiles of a block
    o_m = tl.arange(0, M)
    o_t = tl.arange(0, KV)
    o_dk = tl.arange(0, DKP)
    o_dv = tl.arange(0, DVP)
    i_member = o_m // G
    m_query = i_member < num_queries
    i_row = i_query // num_new
    i_new = i_query - i_row * num_new
    o_head = i_head * G + o_m % G
    p_qs = p_q + i_row.to(tl.int64) * stride_qb + o_head * stride_qh + i_new * stride_qt
    m_q = m_query[:, None]
    if DK != DKP:
        m_q = m_q & (o_dk < DK)[None, :]
    b_q = tl.load(p_qs[:, None] + o_dk[None, :], mask=m_q, other=0.0)
    # At the end of its row, a query sees all up to itself. Padding of the tile sees everything: it
    # is never stored, but stays finite.
    b_limit = tl.where(b_limit == UNLIMITED, num_tokens - (num_new - 1 - i_new), b_limit)
    b_limit = tl.where(m_query, b_limit, UNLIMITED)
    o_id = o_t // S  # zeros where a block holds several tiles
    p_ids = p_list + i_list + o_id
    i_tile = 0
    b_lower = b_limit
    if WINDOW != 0:
        b_own = tl.load(p_lengths + i_row, mask=m_query, other=UNLIMITED) - num_new + i_new + 1
        if WINDOW == 1:  # sliding
            b_lower = b_own - window - start
        else:  # chunked
            b_lower = (b_own - 1) // window * window - start
        i_tile = tl.maximum(tl.min(b_lower, 0), 0) // KV
        i_tile = tl.minimum(i_tile, tl.maximum(num_tokens, 0) // KV)
        b_id = tl.load(p_ids + i_tile // PER_BLOCK * PER_TILE)
    b_id_v = b_id
    if SPLIT_LIST:
        b_id_v = tl.load(p_ids + v_list + i_tile // PER_BLOCK * PER_TILE)
    b_max = tl.full([M], 0.0 if FIXED else float("-inf"), tl.float32)
    b_acc, b_max, b_sum = _attend(
        p_k, p_v, p_ids, b_q, b_id, b_id_v, b_max, b_limit, b_lower, i_head, i_tile, num_full,
        num_tokens, v_list, qk_scale, cap_scale, HKV, DK, DV, DKP, DVP, S, M, KV, STAGES, PEEL,
        WINDOW, FIXED, SOFTCAP, SPLIT_LIST, PRECISION,
    )  # fmt: skip
    if FIXED:
        # Nothing waited for a maximum, and no sum was scaled. Where the powers left float32, once
        # more around the true maximum.
        m_sound = (b_sum > 2.0**-64) & (b_sum < 2.0**64)
        m_sound = m_sound & (tl.max(tl.abs(b_acc), 1) < float("inf"))
        b_first = tl.maximum(b_lower, 0) if WINDOW != 0 else b_lower * 0
        m_sees = m_query & (tl.minimum(b_limit, num_tokens) > b_first)
        if tl.max((m_sees & ~m_sound).to(tl.int32), 0) > 0:
            # Rare, so with few registers: small steps, one after the other.
            FEW: tl.constexpr = 16
            p_few = p_list + i_list + tl.arange(0, FEW) // S
            b_few = tl.load(p_few)
            b_few_v = b_few
            if SPLIT_LIST:
                b_few_v = tl.load(p_few + v_list)
            b_top = _find_maxima(
                p_k, p_few, b_q, b_few, b_limit, b_lower, i_head, num_tokens, qk_scale, cap_scale,
                HKV, DK, DKP, S, M, FEW, WINDOW, SOFTCAP, PRECISION,
            )  # fmt: skip
            b_max = tl.where(m_sees & ~m_sound, b_top, 0.0)
            b_acc, b_max, b_sum = _attend(
                p_k, p_v, p_few, b_q, b_few, b_few_v, b_max, b_limit, b_lower, i_head, 0, 0,
                num_tokens, v_list, qk_scale, cap_scale, HKV, DK, DV, DKP, DVP, S, M, FEW, 1, False,
                WINDOW, True, SOFTCAP, SPLIT_LIST, PRECISION,
            )  # fmt: skip

    m_out = m_query[:, None] & (o_dv < DV)[None, :]
    # Without parts for a merge, the item is all that its queries see.
    if (not MERGES) or i_slot < 0:
        b_decay = tl.full([M], 1.0, tl.float32)
        if SINKS:
            m_some = b_sum > 0
            b_new, b_decay, b_total = _add_sink(p_sinks, o_head, b_max, b_sum)
            b_max = tl.where(m_some, b_new, b_max)
            b_sum = tl.where(m_some, b_total, b_sum)
        b_scale = tl.where(b_sum > 0, b_decay / b_sum, 0.0)
        b_lse = tl.where(b_sum > 0, (b_max + tl.math.log2(b_sum)) * LN2, float("-inf"))
        o_out = i_query.to(tl.int64) * HQ + o_head
        b_o = (b_acc * b_scale[:, None]).to(p_out.dtype.element_ty)
        tl.store(p_out + (o_out[:, None] * DV + o_dv[None, :]), b_o, mask=m_out)
        tl.store(p_lse + o_out, b_lse, mask=m_query)
    else:
        b_part = b_acc * tl.where(b_sum > 0, 1.0 / b_sum, 0.0)[:, None]
        b_lse = tl.where(b_sum > 0, b_max + tl.math.log2(b_sum), float("-inf"))
        o_part = (i_slot + i_member).to(tl.int64) * HQ + o_head
        if p_part.dtype.element_ty == tl.float16:
            # Any bfloat16 fits in float16 once its row's largest is 1.
            b_scale = tl.max(tl.abs(b_part), 1)
            b_part = b_part * tl.where(b_scale > 0, 1.0 / b_scale, 0.0)[:, None]
            tl.store(p_part_lse + o_part * 2 + 1, b_scale, mask=m_query)
        p_parts = p_part + (o_part[:, None] * DV + o_dv[None, :])
        tl.store(p_parts, b_part.to(p_part.dtype.element_ty), mask=m_out)
        tl.store(p_part_lse + o_part * 2, b_lse, mask=m_query)
        # Every thread's stores come before the release below.
        tl.debug_barrier()
        m_first = m_query & (o_m % G == 0)
        tl.atomic_add(p_arrived + i_query * HKV + i_head, 1, mask=m_first, sem="release")


@triton.jit
def _merge(
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
        b_max, b_decay, b_sum = _add_sink(p_sinks, o_head, b_max, b_sum)
    o_out = i_query.to(tl.int64) * HQ + o_head
    b_o = (b_acc * (b_decay / b_sum)[:, None]).to(p_out.dtype.element_ty)
    m_out = m_query[:, None] & (o_dv < DV)[None, :]
    tl.store(p_out + (o_out[:, None] * DV + o_dv[None, :]), b_o, mask=m_out)
    tl.store(p_lse + o_out, (b_max + tl.math.log2(b_sum)) * LN2, mask=m_query)
    # Ready for the next layer.
    tl.store(p_count, tl.zeros([ROWS], tl.int32), mask=m_query & (o_r % G == 0))


@triton.jit(do_not_specialize=["v_list", "window"])
def tree_attention_kernel(
    p_q,  # [B, Hq, T, Dk], any strides but 1 for the last
    p_k,  # K of this layer's block 0, see KVStorage.block_numbers
    p_v,
    p_out,  # [B, T, Hq, Dv]
    p_lse,  # [B, T, Hq] float32, natural log
    p_sinks,  # [Hq]
    p_items,  # [items, RECORD] int32, see schedule.py
    p_list,  # block numbers of all items, int32; those of V from v_list on where they differ
    p_tokens,  # [items] int32, tokens of each item
    p_lengths,  # [B] int32, tokens of each row, the new ones included
    p_sizes,  # [2] int32, items in use, and how many of them are not merges
    p_part,  # [slots, Hq, Dv] float16 or float32, normalised parts
    p_part_lse,  # [slots, Hq, 2] float32, log-sum-exp in base 2, and scale of a float16 part
    p_arrived,  # [B * T, Hkv] int32, parts that are there; 0 between launches
    p_sync,  # int32, 0 between launches: work programs that started, merge programs that started,
    # merges put off, and a flag for each that was
    p_part_ptr,  # [B * T + 1] int32, where each query's slots begin
    p_part_slots,  # int32, slots of each query
    num_new,  # T
    stride_qb,
    stride_qh,
    stride_qt,
    v_list,
    qk_scale,  # scale * log2(e), or softcap * log2(e)
    cap_scale,  # 2 * log2(e) * scale / softcap
    window,
    HKV: tl.constexpr,
    G: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    DKP: tl.constexpr,  # head dims padded to powers of two
    DVP: tl.constexpr,
    S: tl.constexpr,  # block size, a power of two
    RECORD: tl.constexpr,
    QUERIES: tl.constexpr,
    M_SMALL: tl.constexpr,
    KV_SMALL: tl.constexpr,
    STAGES_SMALL: tl.constexpr,
    M_LARGE: tl.constexpr,
    KV_LARGE: tl.constexpr,
    STAGES_LARGE: tl.constexpr,
    MERGE_ROWS: tl.constexpr,
    MERGE_PARTS: tl.constexpr,
    SMALL: tl.constexpr,  # the list has items of this kind
    LARGE: tl.constexpr,
    MERGES: tl.constexpr,
    REVERSED: tl.constexpr,  # start from the last item, to test what then keeps merges safe
    PEEL: tl.constexpr,
    WINDOW: tl.constexpr,  # 0 none, 1 sliding, 2 chunked
    FIXED: tl.constexpr,  # large items: powers of 2 as they are, not relative to a running maximum
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
    SPLIT_LIST: tl.constexpr,
    PRECISION: tl.constexpr,
    OVERLAP: tl.constexpr,  # the kernel ahead may still run, see :mod:`..overlap`
):
    i_program = tl.program_id(0)
    if REVERSED:
        i_program = tl.num_programs(0) - 1 - i_program
    i_item = i_program // HKV
    i_head = i_program % HKV
    # All that the first loads of K and V need is read at once.
    p_record = p_items + i_item * RECORD
    num_items = tl.load(p_sizes)
    num_work = tl.load(p_sizes + 1)
    kind = tl.load(p_record)
    i_list = tl.load(p_record + 1)
    start = tl.load(p_record + 2)
    num_queries = tl.load(p_record + 3)
    i_slot = tl.load(p_record + 4)
    num_full = tl.load(p_record + 5)
    num_tokens = tl.load(p_tokens + i_item)
    p_first = p_record + 8 + 2 * QUERIES
    if SMALL:
        i_small = tl.arange(0, M_SMALL) // G
        i_query_small = tl.load(p_record + 8 + i_small)
        b_limit_small = tl.load(p_record + 8 + QUERIES + i_small)
        b_id_small = tl.load(p_first + tl.arange(0, KV_SMALL) // S)
    if LARGE:
        i_large = tl.minimum(tl.arange(0, M_LARGE) // G, QUERIES - 1)
        i_query_large = tl.load(p_record + 8 + i_large)
        b_limit_large = tl.load(p_record + 8 + QUERIES + i_large)
        b_id_large = tl.load(p_first + tl.arange(0, KV_LARGE) // S)
    if OVERLAP:
        # Work lists are older; queries and new K and V are not.
        gdc_wait()
        gdc_launch_dependents()
    if i_item < num_items:
        if MERGES and kind < 2 and num_work < num_items:
            tl.atomic_add(p_sync, 1, sem="relaxed")
        if SMALL and kind == 0:
            _work(
                p_q, p_k, p_v, p_out, p_lse, p_sinks, p_list, p_lengths, p_part, p_part_lse,
                p_arrived, i_query_small, b_limit_small, b_id_small, i_head, i_list, start,
                num_queries, i_slot, num_full, num_tokens, num_new, stride_qb, stride_qh,
                stride_qt, v_list, qk_scale, cap_scale, window, HKV, G, DK, DV, DKP, DVP, S,
                M_SMALL, KV_SMALL, STAGES_SMALL, False, WINDOW, False, SOFTCAP, SINKS, SPLIT_LIST,
                PRECISION, MERGES,
            )  # fmt: skip
        elif LARGE and kind == 1:
            _work(
                p_q, p_k, p_v, p_out, p_lse, p_sinks, p_list, p_lengths, p_part, p_part_lse,
                p_arrived, i_query_large, b_limit_large, b_id_large, i_head, i_list, start,
                num_queries, i_slot, num_full, num_tokens, num_new, stride_qb, stride_qh,
                stride_qt, v_list, qk_scale, cap_scale, window, HKV, G, DK, DV, DKP, DVP, S,
                M_LARGE, KV_LARGE, STAGES_LARGE, PEEL, WINDOW, FIXED, SOFTCAP, SINKS, SPLIT_LIST,
                PRECISION, MERGES,
            )  # fmt: skip
        elif MERGES and kind == 2:
            # Waiting is safe once all work has started: it never waits, so it will end. A merge
            # that starts long before is put off, and done by the merge that decides last: so at
            # most one program of a launch waits while work has yet to start. Atomics, not loads:
            # all threads must see the same.
            num_merges = (num_items - num_work) * HKV
            i_merge = i_program - num_work * HKV
            p_put_off = p_sync + 3
            missing = num_work * HKV - tl.atomic_add(p_sync, 0, sem="relaxed")
            polls = 0
            while (missing > 0) & (polls < PATIENCE):
                missing = num_work * HKV - tl.atomic_add(p_sync, 0, sem="relaxed")
                polls += 1
            if missing > 0:
                tl.store(p_put_off + i_merge, 1)
                tl.atomic_add(p_sync + 2, 1, sem="relaxed")
                tl.debug_barrier()
            is_last = tl.atomic_add(p_sync + 1, 1, sem="acq_rel") == num_merges - 1
            i_begin = i_merge
            i_end = i_merge + (missing <= 0).to(tl.int32)
            if is_last:
                if tl.atomic_add(p_sync + 2, 0, sem="relaxed") > 0:
                    i_begin = i_merge * 0
                    i_end = num_merges
            for i in tl.range(i_begin, i_end, num_stages=1):
                put_off = tl.load(p_put_off + i, volatile=True)
                if (put_off > 0) | (i == i_merge):
                    p_merge = p_items + (num_work + i // HKV) * RECORD
                    _merge(
                        p_out, p_lse, p_sinks, p_merge, p_part, p_part_lse, p_arrived,
                        p_part_ptr, p_part_slots, i % HKV, tl.load(p_merge + 3),
                        HKV, G, DV, DVP, MERGE_ROWS, MERGE_PARTS, SINKS,
                    )  # fmt: skip
                    tl.store(p_put_off + i, 0)
            if is_last:
                # All have decided, so nobody reads these any more; all work must have added to it.
                missing = 1
                while missing > 0:
                    missing = num_work * HKV - tl.atomic_add(p_sync, 0, sem="relaxed")
                tl.store(p_sync, 0)
                tl.store(p_sync + 1, 0)
                tl.store(p_sync + 2, 0)
