"""The fused kernel's softmax: queries meet a run of blocks; a sink joins a sum.

Names as in :mod:`.kernel`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _wait_in_loop():
    """gdc_wait, past which later versions of Triton ask for nothing, whatever it be, in advance."""
    tl.inline_asm_elementwise(
        "griddepcontrol.wait; // $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _scores(
    b_q,
    b_k,
    b_q_rest,
    b_k_rest,
    cap_scale,
    HALVES: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """[M, KV], to be multiplied by ``qk_scale``."""
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
    if HALVES:
        # Side by side: Triton makes one chain of an addition.
        b_rest = tl.dot(b_q_rest, tl.trans(b_k_rest), input_precision=PRECISION)
        b_s = tl.fma(b_s, 1.0, b_rest)
    if SOFTCAP:
        b_s = 1.0 - 2.0 / (tl.math.exp2(b_s * cap_scale) + 1.0)
    return b_s


@triton.jit
def _accumulate(
    b_q,  # [M, DK], or half of it
    b_k,  # [KV, DK]
    b_q_rest,  # and the other half
    b_k_rest,
    b_v,  # [KV, DV]
    b_acc,  # [M, DV] float32
    b_max,  # [M] running maximum of the scores, or the pivot, times log2(e)
    b_sum,  # [M] running sum, or [M, KV] by place
    b_norm,  # [M, ONES] the same of weights as the product rounds them
    b_ones,  # [KV, ONES]
    m_seen,  # [M, KV]
    is_first,
    qk_scale,
    cap_scale,
    MASKED: tl.constexpr,
    BLIND: tl.constexpr,  # a query may see nothing of a tile, and nothing before it
    FIXED: tl.constexpr,  # weights are relative to a pivot, not to a running maximum
    PIVOT: tl.constexpr,  # the first tile's maximum; else it is given
    ROUNDED: tl.constexpr,
    SPREAD: tl.constexpr,
    HALVES: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One step of softmax, base 2."""
    b_s = _scores(b_q, b_k, b_q_rest, b_k_rest, cap_scale, HALVES, SOFTCAP, PRECISION)
    if MASKED:
        b_s = tl.where(m_seen, b_s, float("-inf"))
    if FIXED:
        # Once: a product waits for it, and it need not be the largest of all.
        if PIVOT and is_first:
            b_top = tl.max(b_s, 1) * qk_scale
            b_max = tl.where(b_top == float("-inf"), 0.0, b_top) if MASKED else b_top
        b_p = tl.math.exp2(b_s * qk_scale - b_max[:, None])
        if ROUNDED:
            # As the product has them: the largest is not exact unless it is the pivot.
            b_norm = tl.dot(b_p.to(b_v.dtype), b_ones, b_norm)
        else:
            b_sum += tl.sum(b_p, 1)
    else:
        b_new = tl.maximum(b_max, tl.max(b_s, 1) * qk_scale)
        b_pivot = b_new
        if BLIND:
            b_pivot = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_p = tl.math.exp2(b_s * qk_scale - b_pivot[:, None])
        b_decay = tl.math.exp2(b_max - b_pivot)
        b_sum = b_sum * b_decay[:, None] + b_p if SPREAD else b_sum * b_decay + tl.sum(b_p, 1)
        b_acc = b_acc * b_decay[:, None]
        b_max = b_new
    b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc, input_precision=PRECISION)
    return b_acc, b_max, b_sum, b_norm


@triton.jit
def attend(
    p_k,
    p_v,
    p_ids,  # [KV] where a tile's block numbers are
    b_q,  # [M, DK], or half of it; or read in the first step
    b_q_rest,  # and the other half
    p_qs,  # [M, DK] where it is
    m_q,
    p_started,  # programs that started
    is_early,  # the first step waits for the kernel ahead
    is_counted,  # and counts this program
    b_id,  # [KV] first block numbers
    b_id_v,
    b_max,  # [M] to begin with, or the pivot
    b_limit,  # [M] tokens that each may see
    b_lower,  # [M] and those before that it may not
    b_left,  # [M, KV] if there are lanes: tokens that each may see from a token of tile 0 on
    b_end,  # [KV] and those that there are
    lane_bits,  # log2 of how many leaves take turns
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
    PIVOT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SPLIT_LIST: tl.constexpr,
    PRECISION: tl.constexpr,
    LANES: tl.constexpr,
    SPREAD: tl.constexpr,  # weights are summed by place: a sum over tokens takes three barriers
    HALVES: tl.constexpr,  # a score is the sum of two products: half the chain to wait for
    LATE_Q: tl.constexpr,  # queries are read once the first steps' K and V are on their way
):
    """Softmax over a run of blocks: sums of values [M, DV], maximum [M], sum of weights [M]."""
    PER_TILE: tl.constexpr = KV // S if KV > S else 1  # blocks of a tile
    PER_BLOCK: tl.constexpr = S // KV if S > KV else 1  # tiles of a block
    ONES: tl.constexpr = 16  # the narrowest product
    ROUNDED: tl.constexpr = FIXED and p_v.dtype.element_ty == tl.bfloat16
    o_t = tl.arange(0, KV)
    o_dk = tl.arange(0, DKP // 2 if HALVES else DKP)
    o_dv = tl.arange(0, DVP)
    o_k = (o_t % S)[:, None] * (HKV * DK) + i_head * DK + o_dk[None, :]  # [KV, DKP]
    o_v = (o_t % S)[:, None] * (HKV * DV) + i_head * DV + o_dv[None, :]  # [KV, DVP]
    b_acc = tl.zeros([M, DVP], tl.float32)
    b_sum = tl.zeros([M, KV] if SPREAD else [M], tl.float32)
    b_norm = tl.zeros([M, ONES], tl.float32)
    b_ones = tl.full([KV, ONES], 1.0, p_v.dtype.element_ty)
    i_first = i_tile
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
                b_q, b_k, b_q, b_k, b_v, b_acc, b_max, b_sum, b_norm, b_ones, None, t == 0,
                qk_scale, cap_scale, False, False, FIXED, PIVOT, ROUNDED, SPREAD, False, SOFTCAP,
                PRECISION,
            )  # fmt: skip
            b_id = b_next
            b_id_v = b_next_v
        i_tile = num_plain
    for t in tl.range(i_tile, tl.cdiv(num_tokens << lane_bits, KV), num_stages=STAGES):
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
        b_k_rest = tl.load(p_k + (o_bk[:, None] + o_k) + DK // 2) if HALVES else b_k
        if LANES > 1:
            first = (t * KV) >> lane_bits
            m_v = (b_end > first)[:, None]
            m_seen = b_left > first
        else:
            o_token = t * KV + o_t
            m_v = (o_token < num_tokens)[:, None]
            m_seen = o_token[None, :] < b_limit[:, None]
        if DV != DVP:
            m_v = m_v & (o_dv < DV)[None, :]
        b_v = tl.load(p_v + (o_bv[:, None] + o_v), mask=m_v, other=0.0)
        if WINDOW != 0:
            m_seen = m_seen & (o_token[None, :] >= b_lower[:, None])
        if LATE_Q and t == i_first:
            if is_early:
                _wait_in_loop()
                gdc_launch_dependents()
                if is_counted:
                    tl.atomic_add(p_started, 1, sem="relaxed")
            b_q = tl.load(p_qs, mask=m_q, other=0.0)
            if HALVES:
                b_q_rest = tl.load(p_qs + DK // 2, mask=m_q, other=0.0)
        b_acc, b_max, b_sum, b_norm = _accumulate(
            b_q, b_k, b_q_rest, b_k_rest, b_v, b_acc, b_max, b_sum, b_norm, b_ones, m_seen,
            t == i_first, qk_scale, cap_scale, True, WINDOW != 0, FIXED, PIVOT, ROUNDED, SPREAD,
            HALVES, SOFTCAP, PRECISION,
        )  # fmt: skip
        b_id = b_next
        b_id_v = b_next_v
    if SPREAD:
        b_sum = tl.sum(b_sum, 1)
    if ROUNDED:
        b_sum = tl.max(b_norm, 1)  # of equals
    return b_acc, b_max, b_sum


@triton.jit
def find_maxima(
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
        b_s = _scores(b_q, b_k, b_q, b_k, cap_scale, False, SOFTCAP, PRECISION)
        o_token = t * KV + o_t
        m_seen = o_token[None, :] < b_limit[:, None]
        if WINDOW != 0:
            m_seen = m_seen & (o_token[None, :] >= b_lower[:, None])
        b_max = tl.maximum(b_max, tl.max(tl.where(m_seen, b_s, float("-inf")), 1))
        b_id = tl.load(p_ids + (t + 1) // PER_BLOCK * PER_TILE)
    return b_max * qk_scale


@triton.jit
def add_sink(p_sinks, o_head, b_max, b_sum):
    """A sink joins the denominator: new maximum, factor on what was summed, new sum."""
    b_sink = tl.load(p_sinks + o_head).to(tl.float32) * LOG2E
    b_new = tl.maximum(b_max, b_sink)
    b_decay = tl.math.exp2(b_max - b_new)
    return b_new, b_decay, b_sum * b_decay + tl.math.exp2(b_sink - b_new)
