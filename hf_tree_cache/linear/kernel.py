"""A linear layer over few rows: bound by reading its weight, which is read once, in order.

One program makes the outputs of a few rows of the weight, over all of its columns, so that nothing
is added up between programs. Prefixes as in :mod:`..attention.kernel`.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def few_rows_kernel(
    p_x,  # [rows, K]
    p_w_0,  # [N_0, K], and so on: weights of layers that have the same input
    p_w_1,
    p_w_2,
    p_b_0,  # [N_0]
    p_b_1,
    p_b_2,
    p_y,  # [rows, N_0 + N_1 + N_2]
    p_next,  # what will be read next, as lines of 128 bytes
    num_lines,
    num_rows,
    n_0,
    n_1,
    n_2,
    K: tl.constexpr,
    ROWS: tl.constexpr,  # num_rows padded
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    STAGES: tl.constexpr,
    BIAS: tl.constexpr,
    LINES: tl.constexpr,  # of what is read next, that each program asks for
    PRECISION: tl.constexpr,
):
    i_tile = tl.program_id(0)
    after_0 = tl.cdiv(n_0, TILE_N)
    after_1 = after_0 + tl.cdiv(n_1, TILE_N)
    is_0, is_2 = i_tile < after_0, i_tile >= after_1
    p_w = tl.where(is_0, p_w_0, tl.where(is_2, p_w_2, p_w_1))
    p_b = tl.where(is_0, p_b_0, tl.where(is_2, p_b_2, p_b_1))
    n = tl.where(is_0, n_0, tl.where(is_2, n_2, n_1))
    first = tl.where(is_0, 0, tl.where(is_2, after_1, after_0))
    start = tl.where(is_0, 0, tl.where(is_2, n_0 + n_1, n_0))
    o_n = (i_tile - first) * TILE_N + tl.arange(0, TILE_N)
    o_row = tl.arange(0, ROWS)
    o_k = tl.arange(0, TILE_K)
    m_row = o_row[:, None] < num_rows
    # Rows of the weight beyond its last are that one again: a mask would cost more.
    p_ws = p_w + tl.minimum(o_n, n - 1).to(tl.int64)[:, None] * K + o_k[None, :]
    p_xs = p_x + o_row[:, None] * K + o_k[None, :]
    b_y = tl.zeros([ROWS, TILE_N], tl.float32)
    for k in tl.range(0, K, TILE_K, num_stages=STAGES):
        if K % TILE_K == 0:
            b_w = tl.load(p_ws, eviction_policy="evict_first")  # [TILE_N, TILE_K]
            b_x = tl.load(p_xs, mask=m_row, other=0.0)  # [ROWS, TILE_K]
        else:
            m_k = (k + o_k < K)[None, :]
            b_w = tl.load(p_ws, mask=m_k, other=0.0, eviction_policy="evict_first")
            b_x = tl.load(p_xs, mask=m_row & m_k, other=0.0)
        b_y = tl.dot(b_x, tl.trans(b_w), b_y, input_precision=PRECISION)
        p_ws += TILE_K
        p_xs += TILE_K
    if LINES > 0:
        # Memory is busy from here until the next weight is read, whatever lies between: lines on
        # their way to L2 outlive the program.
        o_line = tl.minimum(i_tile * LINES + tl.arange(0, LINES), num_lines - 1)
        p_line = p_next.to(tl.pointer_type(tl.int8)) + o_line.to(tl.int64) * 128
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [p_line.to(tl.int64)],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    m_n = o_n < n
    if BIAS:
        b_y += tl.load(p_b + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    p_ys = p_y + o_row[:, None] * (n_0 + n_1 + n_2) + start + o_n[None, :]
    tl.store(p_ys, b_y.to(p_y.dtype.element_ty), mask=m_row & m_n[None, :])
