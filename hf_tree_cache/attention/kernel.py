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

from .merge_kernel import merge
from .softmax_kernel import LN2, add_sink, attend, find_maxima

UNLIMITED = tl.constexpr(1 << 30)
PATIENCE = tl.constexpr(1000)  # polls, of about a microsecond


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
    p_sync,
    i_query,  # [M] row * T + column
    b_limit,  # [M] tokens that each may see
    b_lane,  # [KV] if there are lanes, the same of the leaf that a tile's token is of
    b_id,  # [KV] first block numbers
    i_head,
    i_list,
    start,
    num_queries,
    i_slot,
    num_full,
    lane_bits,
    num_tokens,
    num_new,
    is_early,  # the kernel ahead is yet to be waited for
    is_counted,  # merges wait until this program has started
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
    LANES: tl.constexpr,
    SPREAD: tl.constexpr,
    HALVES: tl.constexpr,
    LATE_Q: tl.constexpr,
):
    """Up to M // G queries, all heads of one group, over one run of blocks."""
    HQ: tl.constexpr = HKV * G
    PER_TILE: tl.constexpr = KV // S if KV > S else 1  # blocks of a tile
    PER_BLOCK: tl.constexpr = S // KV if S > KV else 1  # tiles of a block
    o_m = tl.arange(0, M)
    o_t = tl.arange(0, KV)
    o_dk = tl.arange(0, DKP // 2 if HALVES else DKP)
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
    p_qs = p_qs[:, None] + o_dk[None, :]
    b_q = tl.zeros([M, DKP // 2 if HALVES else DKP], p_q.dtype.element_ty)
    b_q_rest = b_q
    if not LATE_Q:
        b_q = tl.load(p_qs, mask=m_q, other=0.0)
        if HALVES:
            b_q_rest = tl.load(p_qs + DK // 2, mask=m_q, other=0.0)
    # At the end of its row, a query sees all up to itself. Padding of the tile sees everything: it
    # is never stored, but stays finite.
    if LANES > 1:
        b_grown = num_tokens - (UNLIMITED - b_limit) - (num_new - 1 - i_new)
        b_limit = tl.where(b_limit > UNLIMITED // 2, b_grown, b_limit)
    else:
        b_limit = tl.where(b_limit == UNLIMITED, num_tokens - (num_new - 1 - i_new), b_limit)
    b_limit = tl.where(m_query, b_limit, UNLIMITED)
    b_left, b_end = b_limit, b_lane
    if LANES > 1:
        # Leaves take turns, a block of each; where there is one lane, a tile is as it was.
        o_block, last = o_t // S, (1 << lane_bits) - 1
        o_own = (o_block >> lane_bits) * S + o_t % S
        b_end = num_tokens - tl.where(lane_bits > 0, UNLIMITED - b_lane, 0) - o_own
        m_own = (o_block & last)[None, :] == (i_member & last)[:, None]
        b_left = tl.where(m_own, b_limit[:, None] - o_own[None, :], 0)
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
    # With a window, heads of 128 leave no registers for it where three programs share an SM.
    PIVOT: tl.constexpr = FIXED and (WINDOW == 0 or DKP != 128)
    b_max = tl.full([M], 0.0 if FIXED else float("-inf"), tl.float32)
    b_acc, b_max, b_sum = attend(
        p_k, p_v, p_ids, b_q, b_q_rest, p_qs, m_q, p_sync, is_early, is_counted, b_id, b_id_v,
        b_max, b_limit, b_lower, b_left, b_end, lane_bits, i_head, i_tile, num_full, num_tokens,
        v_list, qk_scale, cap_scale, HKV, DK, DV, DKP, DVP, S, M, KV, STAGES, PEEL, WINDOW, FIXED,
        PIVOT, SOFTCAP, SPLIT_LIST, PRECISION, LANES, SPREAD, HALVES, LATE_Q,
    )  # fmt: skip
    if FIXED:
        # Nothing waited for a running maximum, and no sum was scaled. Where the powers left
        # float32, once more around the true maximum.
        m_sound = (b_sum > 2.0**-64) & (b_sum < 2.0**64)
        b_peak = tl.max(tl.abs(b_acc), 1)
        m_sound = m_sound & (b_peak < 2.0**126)
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
            b_top = find_maxima(
                p_k, p_few, b_q, b_few, b_limit, b_lower, i_head, num_tokens, qk_scale, cap_scale,
                HKV, DK, DKP, S, M, FEW, WINDOW, SOFTCAP, PRECISION,
            )  # fmt: skip
            b_max = tl.where(m_sees & ~m_sound, b_top, b_max)
            b_acc, b_max, b_sum = attend(
                p_k, p_v, p_few, b_q, b_q, p_qs, m_q, p_sync, is_early, is_counted, b_few,
                b_few_v, b_max, b_limit, b_lower, b_left, b_end, 0, i_head, 0, 0, num_tokens,
                v_list, qk_scale, cap_scale, HKV, DK, DV, DKP, DVP, S, M, FEW, 1, False, WINDOW,
                True, False, SOFTCAP, SPLIT_LIST, PRECISION, 1, False, False, False,
            )  # fmt: skip
            b_peak = tl.max(tl.abs(b_acc), 1)

    m_out = m_query[:, None] & (o_dv < DV)[None, :]
    # Without parts for a merge, the item is all that its queries see.
    if (not MERGES) or i_slot < 0:
        b_decay = tl.full([M], 1.0, tl.float32)
        if SINKS:
            m_some = b_sum > 0
            b_new, b_decay, b_total = add_sink(p_sinks, o_head, b_max, b_sum)
            b_max = tl.where(m_some, b_new, b_max)
            b_sum = tl.where(m_some, b_total, b_sum)
        b_scale = tl.where(b_sum > 0, b_decay / b_sum, 0.0)
        b_lse = tl.where(b_sum > 0, (b_max + tl.math.log2(b_sum)) * LN2, float("-inf"))
        o_out = i_query.to(tl.int64) * HQ + o_head
        b_o = (b_acc * b_scale[:, None]).to(p_out.dtype.element_ty)
        tl.store(p_out + (o_out[:, None] * DV + o_dv[None, :]), b_o, mask=m_out)
        tl.store(p_lse + o_out, b_lse, mask=m_query)
    else:
        b_lse = tl.where(b_sum > 0, b_max + tl.math.log2(b_sum), float("-inf"))
        b_scale = tl.where(b_sum > 0, 1.0 / b_sum, 0.0)
        o_part = (i_slot + i_member).to(tl.int64) * HQ + o_head
        tl.store(p_part_lse + o_part * 2, b_lse, mask=m_query)
        if p_part.dtype.element_ty == tl.float16:
            # Any bfloat16 fits in float16 once its row's largest is 1.
            if not FIXED:
                b_peak = tl.max(tl.abs(b_acc), 1)
            tl.store(p_part_lse + o_part * 2 + 1, b_peak * b_scale, mask=m_query)
            b_scale = tl.where(b_peak > 2.0**-126, 1.0 / b_peak, 0.0)
        b_part = (b_acc * b_scale[:, None]).to(p_part.dtype.element_ty)
        tl.store(p_part + (o_part[:, None] * DV + o_dv[None, :]), b_part, mask=m_out)
        # Every thread's stores come before the release below.
        tl.debug_barrier()
        m_first = m_query & (o_m % G == 0)
        tl.atomic_add(p_arrived + i_query * HKV + i_head, 1, mask=m_first, sem="release")


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
    LANES: tl.constexpr,  # leaves that may take turns in a small item
    SMALL: tl.constexpr,  # the list has items of this kind
    LARGE: tl.constexpr,
    MERGES: tl.constexpr,
    REVERSED: tl.constexpr,  # start from the last item, to test what then keeps merges safe
    PEEL: tl.constexpr,
    WINDOW: tl.constexpr,  # 0 none, 1 sliding, 2 chunked
    FIXED: tl.constexpr,  # large items: powers of 2 relative to a pivot, not to a running maximum
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
    p_limits = p_record + 8 + QUERIES
    num_tokens = tl.load(p_tokens + i_item)
    p_first = p_record + 8 + 2 * QUERIES
    if SMALL:
        i_small = tl.arange(0, M_SMALL) // G
        i_query_small = tl.load(p_record + 8 + i_small)
        b_limit_small = tl.load(p_limits + i_small)
        b_id_small = tl.load(p_first + tl.arange(0, KV_SMALL) // S)
    if LARGE:
        i_large = tl.minimum(tl.arange(0, M_LARGE) // G, QUERIES - 1)
        i_query_large = tl.load(p_record + 8 + i_large)
        b_limit_large = tl.load(p_limits + i_large)
        b_id_large = tl.load(p_first + tl.arange(0, KV_LARGE) // S)
    # Work lists are older than the kernel ahead; queries and new K and V are not. Small items ask
    # for old K and V before they wait, where registers suffice for queries that come that late.
    LATE_Q: tl.constexpr = (
        OVERLAP and SMALL and LARGE and FIXED and WINDOW == 0 and DK == DKP and DKP <= 128
    )
    # Beside large items small ones have registers for it, unless blocks are tiny or heads padded.
    SPREAD: tl.constexpr = SMALL and LARGE and DK == DKP and S >= 16
    HALVES: tl.constexpr = SPREAD and FIXED and WINDOW == 0 and DK == 128
    is_early = False
    if LATE_Q:
        is_early = (kind == 0) & (tl.load(p_record + 7) > 0)
    is_counted = False
    if MERGES:
        is_counted = (kind < 2) & (num_work < num_items)
    if not is_early:
        if OVERLAP:
            gdc_wait()
            gdc_launch_dependents()
        if MERGES:
            if is_counted & (i_item < num_items):
                tl.atomic_add(p_sync, 1, sem="relaxed")
    if i_item < num_items:
        if SMALL and kind == 0:
            # In lines that were read above.
            lane_bits = tl.load(p_record + 6)
            b_lane = tl.load(p_limits + tl.arange(0, KV_SMALL) // S % LANES)
            _work(
                p_q, p_k, p_v, p_out, p_lse, p_sinks, p_list, p_lengths, p_part, p_part_lse,
                p_arrived, p_sync, i_query_small, b_limit_small, b_lane, b_id_small, i_head, i_list,
                start, num_queries, i_slot, num_full, lane_bits, num_tokens, num_new, is_early,
                is_counted, stride_qb, stride_qh, stride_qt, v_list, qk_scale, cap_scale, window,
                HKV, G, DK, DV, DKP, DVP, S, M_SMALL, KV_SMALL, STAGES_SMALL, False, WINDOW, False,
                SOFTCAP, SINKS, SPLIT_LIST, PRECISION, MERGES, LANES, SPREAD, HALVES, LATE_Q,
            )  # fmt: skip
        elif LARGE and kind == 1:
            _work(
                p_q, p_k, p_v, p_out, p_lse, p_sinks, p_list, p_lengths, p_part, p_part_lse,
                p_arrived, p_sync, i_query_large, b_limit_large, b_limit_large, b_id_large, i_head,
                i_list, start, num_queries, i_slot, num_full, 0, num_tokens, num_new, False, False,
                stride_qb, stride_qh, stride_qt, v_list, qk_scale, cap_scale, window, HKV, G, DK,
                DV, DKP, DVP, S, M_LARGE, KV_LARGE, STAGES_LARGE, PEEL, WINDOW, FIXED, SOFTCAP,
                SINKS, SPLIT_LIST, PRECISION, MERGES, 1, False, False, False,
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
                    merge(
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
