"""Kernels for sparse experts of a few rows. Prefixes as in :mod:`.kernels`.

A pair is of a row and an expert that it chose; there are TOP of them for each row, in order. An
item is of up to ROWS pairs of one expert, which are computed together.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def route_kernel(
    p_logits,  # [rows, E]
    p_shares,  # [rows, TOP]
    p_chosen,  # [rows, TOP]
    num_experts,
    EXPERTS: tl.constexpr,  # num_experts padded
    TOP: tl.constexpr,
    TOP_PADDED: tl.constexpr,
    NORMED: tl.constexpr,  # shares of what was chosen, not of all
    OVERLAP: tl.constexpr,
):
    """A program a row: softmax in float32, and the TOP largest, the first of equal ones first."""
    i_row = tl.program_id(0).to(tl.int64)
    o_expert = tl.arange(0, EXPERTS)
    o_top = tl.arange(0, TOP_PADDED)
    m_expert = o_expert < num_experts
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    p_row = p_logits + i_row * num_experts + o_expert
    b_logits = tl.load(p_row, mask=m_expert, other=-float("inf")).to(tl.float32)
    b_left = tl.exp(b_logits - tl.max(b_logits, 0))
    total = tl.sum(b_left, 0)
    b_left = tl.where(m_expert, b_left, -1.0)
    b_shares = tl.zeros([TOP_PADDED], tl.float32)
    b_chosen = tl.zeros([TOP_PADDED], tl.int32)
    for i_top in tl.static_range(TOP):
        largest, i_expert = tl.max(b_left, 0, return_indices=True)
        b_shares = tl.where(o_top == i_top, largest, b_shares)
        b_chosen = tl.where(o_top == i_top, i_expert, b_chosen)
        b_left = tl.where(o_expert == i_expert, -1.0, b_left)
    # Where all is NaN, any: but one that there is.
    b_chosen = tl.minimum(b_chosen, num_experts - 1)
    if NORMED:
        total = tl.sum(b_shares, 0)
    b_shares = b_shares / total
    p_tops = i_row * TOP + o_top
    tl.store(p_shares + p_tops, b_shares.to(p_shares.dtype.element_ty), mask=o_top < TOP)
    tl.store(p_chosen + p_tops, b_chosen.to(p_chosen.dtype.element_ty), mask=o_top < TOP)


@triton.jit
def list_items_kernel(
    p_chosen,  # [pairs] the expert of each
    p_pairs,  # [pairs] those of one expert after those of another
    p_items,  # [items, 3] expert, its first place in p_pairs, how many
    p_num_items,  # [1]
    num_pairs,
    num_experts,
    PAIRS: tl.constexpr,  # num_pairs padded
    EXPERTS: tl.constexpr,  # more than num_experts
    ROWS: tl.constexpr,
    ITEMS: tl.constexpr,  # of one expert, padded
    OVERLAP: tl.constexpr,
):
    """A program an expert, which looks through all pairs: a sort would take longer."""
    i_expert = tl.program_id(0)
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    o_pair = tl.arange(0, PAIRS)
    b_chosen = tl.load(p_chosen + o_pair, mask=o_pair < num_pairs, other=num_experts)
    b_counts = tl.histogram(b_chosen.to(tl.int32), EXPERTS)
    o_expert = tl.arange(0, EXPERTS)
    b_counts = tl.where(o_expert < num_experts, b_counts, 0)
    m_before = o_expert < i_expert
    b_items = (b_counts + ROWS - 1) // ROWS
    start = tl.sum(tl.where(m_before, b_counts, 0), 0)
    i_item = tl.sum(tl.where(m_before, b_items, 0), 0)
    tl.store(p_num_items, tl.sum(b_items, 0))  # of all programs the same
    m_mine = b_chosen == i_expert
    b_mine = m_mine.to(tl.int32)
    tl.store(p_pairs + start + tl.cumsum(b_mine, 0) - 1, o_pair, mask=m_mine)
    count = tl.sum(b_mine, 0)
    o_item = tl.arange(0, ITEMS)
    m_item = o_item * ROWS < count
    p_mine = p_items + (i_item + o_item) * 3
    tl.store(p_mine, i_expert + o_item * 0, mask=m_item)
    tl.store(p_mine + 1, start + o_item * ROWS, mask=m_item)
    tl.store(p_mine + 2, tl.minimum(count - o_item * ROWS, ROWS), mask=m_item)


@triton.jit
def experts_kernel(
    p_x,  # [rows, K]; or, if not GATED, [pairs, K]
    p_w,  # [E, 2 N, K], gates first; or [E, N, K]
    p_pairs,
    p_items,
    p_num_items,
    p_shares,  # [pairs] what the expert's output is multiplied with, if not GATED
    p_y,  # [pairs, N]
    N: tl.constexpr,
    K: tl.constexpr,
    TOP: tl.constexpr,
    ROWS: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    STAGES: tl.constexpr,
    GATED: tl.constexpr,  # silu(first half) * second half
    PRECISION: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One projection of all experts: bound by reading the weights of those that were chosen.

    One program makes a few outputs of one item, over all of their inputs, so that nothing is added
    up between programs. Those of one expert's items run at about the same time: memory is read
    once.
    """
    i_item = tl.program_id(1)
    o_n = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    o_k = tl.arange(0, TILE_K)
    o_row = tl.arange(0, ROWS)
    # Rows of a weight beyond its last are that one again: a mask would cost more.
    o_w = tl.minimum(o_n, N - 1)[:, None] * K + o_k[None, :]
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    if i_item >= tl.load(p_num_items):
        return
    i_expert = tl.load(p_items + i_item * 3).to(tl.int64)
    first = tl.load(p_items + i_item * 3 + 1)
    m_row = o_row < tl.load(p_items + i_item * 3 + 2)
    b_pair = tl.load(p_pairs + first + o_row, mask=m_row, other=0)
    b_from = b_pair // TOP if GATED else b_pair
    p_xs = p_x + b_from[:, None] * K + o_k[None, :]
    p_ws = p_w + i_expert * (N * K * (2 if GATED else 1)) + o_w
    p_us = p_ws + N * K
    b_y = tl.zeros([ROWS, TILE_N], tl.float32)
    b_up = tl.zeros([ROWS, TILE_N], tl.float32)
    for k in tl.range(0, K, TILE_K, num_stages=STAGES):
        if K % TILE_K == 0:
            b_w = tl.load(p_ws)  # [TILE_N, TILE_K]
            if GATED:
                b_u = tl.load(p_us)
            b_x = tl.load(p_xs, mask=m_row[:, None], other=0.0)  # [ROWS, TILE_K]
        else:
            m_k = (k + o_k < K)[None, :]
            b_w = tl.load(p_ws, mask=m_k, other=0.0)
            if GATED:
                b_u = tl.load(p_us, mask=m_k, other=0.0)
            b_x = tl.load(p_xs, mask=m_row[:, None] & m_k, other=0.0)
        b_y = tl.dot(b_x, tl.trans(b_w), b_y, input_precision=PRECISION)
        if GATED:
            b_up = tl.dot(b_x, tl.trans(b_u), b_up, input_precision=PRECISION)
        p_ws += TILE_K
        p_us += TILE_K
        p_xs += TILE_K
    if GATED:
        b_y = b_y * tl.sigmoid(b_y) * b_up
    else:
        b_y *= tl.load(p_shares + b_pair, mask=m_row, other=0.0).to(tl.float32)[:, None]
    p_ys = p_y + b_pair[:, None] * N + o_n[None, :]
    tl.store(p_ys, b_y.to(p_y.dtype.element_ty), mask=m_row[:, None] & (o_n < N)[None, :])


@triton.jit
def add_up_kernel(
    p_parts,  # [rows, TOP, N]
    p_y,  # [rows, N]
    N: tl.constexpr,
    TOP: tl.constexpr,
    TILE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """A program a row and tile, always in the same order."""
    i_row = tl.program_id(0)
    o_n = tl.program_id(1) * TILE + tl.arange(0, TILE)
    m_n = o_n < N
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    b_y = tl.zeros([TILE], tl.float32)
    for i_top in tl.static_range(TOP):
        b_y += tl.load(p_parts + (i_row * TOP + i_top) * N + o_n, mask=m_n, other=0.0)
    tl.store(p_y + i_row * N + o_n, b_y.to(p_y.dtype.element_ty), mask=m_n)
