"""Absorbed attention over latents in Triton: K is a latent and its rotary part, V the latent.

A program is a tile of queries (rows x heads, which all share the one K/V head) over a chunk of
tokens; a second kernel adds up the parts of each query. Prefixes as in :mod:`.kernel`.
"""

from __future__ import annotations

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def latent_kernel(
    p_q,  # [B, H, R + P]
    p_latents,  # of this layer's block 0, see KVStorage.block_numbers
    p_rotary,
    p_part,  # [slots, R] float32
    p_part_lse,  # [slots] float32, base 2
    p_items,  # [items, 6]: rows at, first query, end, blocks at, tokens, slot of query 0
    p_rows,  # row numbers
    p_list,  # numbers of blocks of latents, then those of rotary parts
    half,  # where the latter begin
    scale,  # times log2(e)
    H: tl.constexpr,
    R: tl.constexpr,
    P: tl.constexpr,
    S: tl.constexpr,
    M: tl.constexpr,
    KV: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    p_item = p_items + tl.program_id(0) * 6
    i_rows, i_first, i_end = tl.load(p_item), tl.load(p_item + 1), tl.load(p_item + 2)
    i_blocks, n_tokens, i_slot = tl.load(p_item + 3), tl.load(p_item + 4), tl.load(p_item + 5)
    o_r, o_p = tl.arange(0, R), tl.arange(0, P)
    i_query = i_first + tl.arange(0, M)  # [M] of the stretch's rows x heads
    m_query = i_query < i_end
    b_row = tl.load(p_rows + i_rows + i_query // H, mask=m_query, other=0).to(tl.int64)
    o_q = (b_row * H + i_query % H) * (R + P)
    b_q = tl.load(p_q + o_q[:, None] + o_r[None, :], mask=m_query[:, None], other=0.0)  # [M, R]
    b_turn = tl.load(p_q + o_q[:, None] + R + o_p[None, :], mask=m_query[:, None], other=0.0)
    b_max = tl.full([M], float("-inf"), tl.float32)
    b_sum = tl.zeros([M], tl.float32)
    b_acc = tl.zeros([M, R], tl.float32)
    for i_token in tl.range(0, n_tokens, KV, num_stages=STAGES):
        o_t = i_token + tl.arange(0, KV)
        m_t = o_t < n_tokens
        p_block = p_list + i_blocks + o_t // S
        b_block = tl.load(p_block, mask=m_t, other=0).to(tl.int64)
        b_other = tl.load(p_block + half, mask=m_t, other=0).to(tl.int64)
        o_latent = (b_block * S + o_t % S) * R
        o_rotary = (b_other * S + o_t % S) * P
        # Slots that nobody wrote may hold NaN, and 0 * NaN is NaN.
        b_latent = tl.load(  # [KV, R]
            p_latents + o_latent[:, None] + o_r[None, :], mask=m_t[:, None], other=0.0
        )
        b_rotary = tl.load(  # [KV, P]
            p_rotary + o_rotary[:, None] + o_p[None, :], mask=m_t[:, None], other=0.0
        )
        b_s = tl.dot(b_q, tl.trans(b_latent), input_precision=PRECISION)
        b_s = tl.dot(b_turn, tl.trans(b_rotary), b_s, input_precision=PRECISION)
        b_s = tl.where(m_t[None, :], b_s * scale, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 1))
        b_p = tl.math.exp2(b_s - b_new[:, None])
        b_decay = tl.math.exp2(b_max - b_new)
        b_sum = b_sum * b_decay + tl.sum(b_p, 1)
        b_acc = tl.dot(
            b_p.to(b_latent.dtype), b_latent, b_acc * b_decay[:, None], input_precision=PRECISION
        )
        b_max = b_new
    o_slot = (i_slot + i_query).to(tl.int64)
    b_acc = b_acc / b_sum[:, None]
    tl.store(p_part + o_slot[:, None] * R + o_r[None, :], b_acc, mask=m_query[:, None])
    tl.store(p_part_lse + o_slot, b_max + tl.math.log2(b_sum), mask=m_query)


@triton.jit
def merge_kernel(
    p_part,  # [slots, R] float32
    p_part_lse,  # [slots] float32, base 2
    p_out,  # [B, H, R]
    p_lse,  # [B, H] float32, natural
    p_ptr,  # [B + 1]: which of p_slots are each row's
    p_slots,  # slots of a row's head 0
    H: tl.constexpr,
    R: tl.constexpr,
):
    i_row, i_head = tl.program_id(0), tl.program_id(1)
    o_r = tl.arange(0, R)
    b_max = float("-inf")
    b_sum = 0.0
    b_acc = tl.zeros([R], tl.float32)
    i_part = tl.load(p_ptr + i_row)
    i_end = tl.load(p_ptr + i_row + 1)
    while i_part < i_end:
        i_slot = (tl.load(p_slots + i_part) + i_head).to(tl.int64)
        b_lse = tl.load(p_part_lse + i_slot)
        b_new = tl.maximum(b_max, b_lse)
        b_decay = tl.math.exp2(b_max - b_new)
        b_weight = tl.math.exp2(b_lse - b_new)
        b_acc = b_acc * b_decay + b_weight * tl.load(p_part + i_slot * R + o_r)
        b_sum = b_sum * b_decay + b_weight
        b_max = b_new
        i_part += 1
    o_out = i_row.to(tl.int64) * H + i_head
    tl.store(p_out + o_out * R + o_r, (b_acc / b_sum).to(p_out.dtype.element_ty))
    tl.store(p_lse + o_out, (b_max + tl.math.log2(b_sum)) * LN2)
