"""Kernels for what surrounds attention in a decode step, where a batch has a few rows.

Prefixes as in :mod:`..attention.kernel`. OVERLAP: the kernel ahead may still run, see
:mod:`..overlap`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


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
    ACTIVATION: tl.constexpr,  # of the first, times the second, [rows, N_0]; None for neither
    PRECISION: tl.constexpr,
    OVERLAP: tl.constexpr,
    AHEAD: tl.constexpr,  # columns of the weight, asked for before the wait
):
    """Linear layers: bound by reading their weights, which are read once, in order.

    One program makes the outputs of a few rows of a weight, over all of its columns, so that
    nothing is added up between programs.
    """
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
    o_w = tl.minimum(o_n, n - 1).to(tl.int64)[:, None] * K
    p_ws = p_w + o_w + o_k[None, :]
    p_us = p_w_1 + o_w + o_k[None, :]
    p_xs = p_x + o_row[:, None] * K + o_k[None, :]
    b_y = tl.zeros([ROWS, TILE_N], tl.float32)
    b_up = tl.zeros([ROWS, TILE_N], tl.float32)
    if OVERLAP:
        if AHEAD <= K:
            _ask(p_w + o_w, AHEAD)
            if ACTIVATION is not None:
                _ask(p_w_1 + o_w, AHEAD)
        gdc_wait()
        gdc_launch_dependents()
    for k in tl.range(0, K, TILE_K, num_stages=STAGES):
        if K % TILE_K == 0:
            b_w = tl.load(p_ws, eviction_policy="evict_first")  # [TILE_N, TILE_K]
            if ACTIVATION is not None:
                b_u = tl.load(p_us, eviction_policy="evict_first")
            b_x = tl.load(p_xs, mask=m_row, other=0.0)  # [ROWS, TILE_K]
        else:
            m_k = (k + o_k < K)[None, :]
            b_w = tl.load(p_ws, mask=m_k, other=0.0, eviction_policy="evict_first")
            if ACTIVATION is not None:
                b_u = tl.load(p_us, mask=m_k, other=0.0, eviction_policy="evict_first")
            b_x = tl.load(p_xs, mask=m_row & m_k, other=0.0)
        b_y = tl.dot(b_x, tl.trans(b_w), b_y, input_precision=PRECISION)
        if ACTIVATION is not None:
            b_up = tl.dot(b_x, tl.trans(b_u), b_up, input_precision=PRECISION)
        p_ws += TILE_K
        p_us += TILE_K
        p_xs += TILE_K
    if ACTIVATION is not None:
        b_y = activate(b_y, ACTIVATION) * b_up
    m_n = o_n < n
    if BIAS:
        b_y += tl.load(p_b + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    p_ys = p_y + o_row[:, None] * (n_0 + n_1 + n_2) + start + o_n[None, :]
    tl.store(p_ys, b_y.to(p_y.dtype.element_ty), mask=m_row & m_n[None, :])


@triton.jit
def activate(b_x, ACTIVATION: tl.constexpr):
    """silu, gelu, or gelu by its formula with tanh (Hendrycks and Gimpel, arXiv:1606.08415)."""
    if ACTIVATION == "gelu":
        b_share = 0.5 + 0.5 * tl.math.erf(b_x * 0.7071067811865476)
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh(z)) / 2 is the logistic function of 2 z.
        b_share = tl.sigmoid(1.5957691216057308 * (b_x + 0.044715 * b_x * b_x * b_x))
    else:
        b_share = tl.sigmoid(b_x)
    return b_x * b_share


@triton.jit
def _ask(p_rows, COLUMNS: tl.constexpr):
    """Have the first columns of rows ``[N, 1]``, of two bytes each, brought to L2."""
    LINE: tl.constexpr = 64  # numbers of a line of 128 bytes
    p_lines = p_rows + tl.arange(0, COLUMNS // LINE)[None, :] * LINE
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [p_lines.to(tl.int64)],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def rms_norm_kernel(
    p_x,  # [rows, SIZE], in groups of HEADS rows
    p_first_weight,  # [SIZE]; x is normed first, and added then, if FIRST
    p_first,  # [rows, SIZE]
    p_other,  # [rows, SIZE], added, if ADD
    p_factor,  # [1], of the sum, if SCALED
    p_sum,  # [rows, SIZE]
    p_weight,  # [SIZE]; of what is there then, if LAST
    p_y,  # [rows, SIZE]
    stride_x,  # between groups
    stride_h,  # between rows of a group
    first_eps,
    eps,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    HEADS: tl.constexpr,
    FIRST: tl.constexpr,
    ADD: tl.constexpr,
    SCALED: tl.constexpr,
    LAST: tl.constexpr,
    FIRST_MORE: tl.constexpr,  # than the weight
    MORE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """A program a row, in float32; what is kept on the way is rounded as it is kept."""
    o_n = tl.arange(0, PADDED)
    m_n = o_n < SIZE
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    i_row = tl.program_id(0).to(tl.int64)
    p_row = i_row * SIZE + o_n
    p_from = p_x + i_row // HEADS * stride_x + i_row % HEADS * stride_h + o_n
    b_x = tl.load(p_from, mask=m_n, other=0.0).to(tl.float32)
    if FIRST:
        b_weight = tl.load(p_first_weight + o_n, mask=m_n, other=0.0).to(tl.float32) + FIRST_MORE
        b_first = normed(b_x, b_weight, first_eps, SIZE).to(p_first.dtype.element_ty)
        tl.store(p_first + p_row, b_first, mask=m_n)
        b_x = b_first.to(tl.float32)
    if ADD:
        b_x += tl.load(p_other + p_row, mask=m_n, other=0.0).to(tl.float32)
        b_sum = b_x.to(p_sum.dtype.element_ty)
        if SCALED:
            b_x = b_sum.to(tl.float32) * tl.load(p_factor).to(tl.float32)
            b_sum = b_x.to(p_sum.dtype.element_ty)
        tl.store(p_sum + p_row, b_sum, mask=m_n)
        b_x = b_sum.to(tl.float32)
    if LAST:
        b_weight = tl.load(p_weight + o_n, mask=m_n, other=0.0).to(tl.float32) + MORE
        b_y = normed(b_x, b_weight, eps, SIZE).to(p_y.dtype.element_ty)
        tl.store(p_y + p_row, b_y, mask=m_n)


@triton.jit
def normed(b_x, b_weight, eps, SIZE: tl.constexpr):
    """By the root of the mean square of its SIZE numbers; others are 0."""
    return b_x * tl.math.rsqrt(tl.sum(b_x * b_x, 0) / SIZE + eps) * b_weight


@triton.jit
def gated_product_kernel(
    p_gate,  # [rows, SIZE], any stride between rows
    p_up,
    p_activated,  # [rows, SIZE], if KEPT
    p_y,  # [rows, SIZE]
    stride_gate,
    stride_up,
    SIZE: tl.constexpr,
    TILE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    KEPT: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """activation(gate) * up; a program a row and tile. What is kept on the way is rounded."""
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    i_row = tl.program_id(0).to(tl.int64)
    o_n = tl.program_id(1) * TILE + tl.arange(0, TILE)
    m_n = o_n < SIZE
    b_gate = tl.load(p_gate + i_row * stride_gate + o_n, mask=m_n, other=0.0).to(tl.float32)
    b_up = tl.load(p_up + i_row * stride_up + o_n, mask=m_n, other=0.0).to(tl.float32)
    b_activated = activate(b_gate, ACTIVATION)
    if KEPT:
        b_kept = b_activated.to(p_activated.dtype.element_ty)
        tl.store(p_activated + i_row * SIZE + o_n, b_kept, mask=m_n)
        b_activated = b_kept.to(tl.float32)
    b_y = b_activated * b_up
    tl.store(p_y + i_row * SIZE + o_n, b_y.to(p_y.dtype.element_ty), mask=m_n)


@triton.jit
def rotary_kernel(
    p_q,  # [rows, Hq, D], any strides but 1 for the last
    p_k,  # [rows, Hkv, D]
    p_q_weight,  # [D]; of norms that come first, if NORMED
    p_k_weight,
    p_q_normed,  # [rows, Hq, D]
    p_k_normed,
    p_cos,  # [rows, ANGLES]
    p_sin,
    p_q_out,  # [rows, Hq, D]
    p_k_out,
    p_v,  # [rows, Hkv, DV]; this and what follows as in :mod:`..memory.scatter`, if STORE
    p_k_plane,
    p_v_plane,
    p_num_rows,
    p_k_blocks,
    p_v_blocks,
    p_offsets,
    stride_qb,
    stride_qh,
    stride_kb,
    stride_kh,
    stride_vb,
    stride_vh,
    q_eps,
    k_eps,
    HQ: tl.constexpr,
    HKV: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    HEADS: tl.constexpr,  # the larger number of heads, padded
    HKVP: tl.constexpr,  # padded
    DVP: tl.constexpr,
    PAIRS: tl.constexpr,  # of numbers of a head that are rotated against each other
    PAIRSP: tl.constexpr,  # padded
    STEP: tl.constexpr,  # from the first number of a pair to that of the next
    GAP: tl.constexpr,  # from the first number of a pair to its second
    ANGLES: tl.constexpr,
    ANGLE_STEP: tl.constexpr,
    ANGLE_GAP: tl.constexpr,  # 0 where both have the same
    RESTP: tl.constexpr,  # D - 2 * PAIRS, numbers that stay as they are, padded; 0 for none
    NORMED: tl.constexpr,
    MORE: tl.constexpr,  # than the weight
    S: tl.constexpr,
    STORE: tl.constexpr,  # keys, and values as they are
    OVERLAP: tl.constexpr,
):
    """Rotates pairs of numbers of each head, normed or as it is; a program a row and tensor."""
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    i_row = tl.program_id(0).to(tl.int64)
    is_q = tl.program_id(1) == 0
    o_h = tl.arange(0, HEADS)[:, None]
    o_pair = tl.arange(0, PAIRSP)[None, :]
    o_d = o_pair * STEP
    num_heads = tl.where(is_q, HQ, HKV)
    m_d = o_pair < PAIRS
    m_x = (o_h < num_heads) & m_d
    p_head = tl.where(is_q, p_q + i_row * stride_qb, p_k + i_row * stride_kb)
    p_head = p_head + o_h * tl.where(is_q, stride_qh, stride_kh)
    p_to = (i_row * num_heads + o_h) * D
    p_y = tl.where(is_q, p_q_out, p_k_out) + p_to
    p_angle = i_row * ANGLES + o_pair * ANGLE_STEP
    b_first = tl.load(p_head + o_d, mask=m_x, other=0.0).to(tl.float32)
    b_second = tl.load(p_head + o_d + GAP, mask=m_x, other=0.0).to(tl.float32)
    if RESTP:
        o_rest = 2 * PAIRS + tl.arange(0, RESTP)[None, :]
        m_rest = (o_h < num_heads) & (o_rest < D)
        b_rest = tl.load(p_head + o_rest, mask=m_rest, other=0.0)
    if NORMED:
        p_w = tl.where(is_q, p_q_weight, p_k_weight)
        p_n = tl.where(is_q, p_q_normed, p_k_normed) + p_to
        dtype = p_q_normed.dtype.element_ty
        b_square = tl.sum(b_first * b_first + b_second * b_second, 1)
        if RESTP:
            b_square += tl.sum(b_rest.to(tl.float32) * b_rest.to(tl.float32), 1)
        b_scale = tl.math.rsqrt(b_square / D + tl.where(is_q, q_eps, k_eps))[:, None]
        # Rounded as they are kept.
        b_w = tl.load(p_w + o_d, mask=m_d, other=0.0).to(tl.float32) + MORE
        b_n = (b_first * b_scale * b_w).to(dtype)
        tl.store(p_n + o_d, b_n, mask=m_x)
        b_first = b_n.to(tl.float32)
        b_w = tl.load(p_w + o_d + GAP, mask=m_d, other=0.0).to(tl.float32) + MORE
        b_n = (b_second * b_scale * b_w).to(dtype)
        tl.store(p_n + o_d + GAP, b_n, mask=m_x)
        b_second = b_n.to(tl.float32)
        if RESTP:
            b_w = tl.load(p_w + o_rest, mask=o_rest < D, other=0.0).to(tl.float32) + MORE
            b_rest = (b_rest.to(tl.float32) * b_scale * b_w).to(dtype)
            tl.store(p_n + o_rest, b_rest, mask=m_rest)
    b_cos = tl.load(p_cos + p_angle, mask=m_d, other=0.0).to(tl.float32)
    b_sin = tl.load(p_sin + p_angle, mask=m_d, other=0.0).to(tl.float32)
    b_y = (b_first * b_cos - b_second * b_sin).to(p_q_out.dtype.element_ty)
    tl.store(p_y + o_d, b_y, mask=m_x)
    if ANGLE_GAP:
        b_cos = tl.load(p_cos + p_angle + ANGLE_GAP, mask=m_d, other=0.0).to(tl.float32)
        b_sin = tl.load(p_sin + p_angle + ANGLE_GAP, mask=m_d, other=0.0).to(tl.float32)
    b_z = (b_second * b_cos + b_first * b_sin).to(p_q_out.dtype.element_ty)
    tl.store(p_y + o_d + GAP, b_z, mask=m_x)
    if RESTP:
        tl.store(p_y + o_rest, b_rest, mask=m_rest)
    if STORE:
        num_rows = tl.load(p_num_rows)
        if (tl.program_id(1) == 1) & (i_row < num_rows):
            k_block = tl.load(p_k_blocks + i_row).to(tl.int64)
            v_block = tl.load(p_v_blocks + i_row).to(tl.int64)
            offset = tl.load(p_offsets + i_row)
            p_keys = p_k_plane + (k_block * S + offset) * (HKV * D) + o_h * D
            tl.store(p_keys + o_d, b_y, mask=m_x)
            tl.store(p_keys + o_d + GAP, b_z, mask=m_x)
            if RESTP:
                tl.store(p_keys + o_rest, b_rest, mask=m_rest)
            o_v = tl.arange(0, HKVP)[:, None]
            o_dv = tl.arange(0, DVP)[None, :]
            m_v = (o_v < HKV) & (o_dv < DV)
            b_v = tl.load(p_v + i_row * stride_vb + o_v * stride_vh + o_dv, mask=m_v)
            p_values = p_v_plane + (v_block * S + offset) * (HKV * DV) + o_v * DV + o_dv
            tl.store(p_values, b_v, mask=m_v)
