"""Log-sum-exp, entropy and varentropy of rows of logits in one pass. Needs Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TILE_BYTES = 1 << 14


@triton.jit
def uncertainty_kernel(
    p_logits,  # [R, V], last stride 1
    p_out,  # [R, 3] float32: log-sum-exp, entropy, varentropy
    stride_logits,
    vocab,
    LANES: tl.constexpr,
    W: tl.constexpr,  # logits that a thread loads at a time
    STAGES: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    p_x = p_logits + i_row * stride_logits
    o_in = tl.arange(0, LANES)[:, None] * W + tl.arange(0, W)[None, :]
    # Sums of w, w d and w d^2 with d = x - pivot and w = exp(d); pivots are finite.
    b_top = tl.full([LANES], -1e30, tl.float32)
    b_s0 = tl.zeros([LANES], tl.float32)
    b_s1 = tl.zeros([LANES], tl.float32)
    b_s2 = tl.zeros([LANES], tl.float32)
    for i in tl.range(0, tl.cdiv(vocab, LANES * W), num_stages=STAGES):
        o_id = i * (LANES * W) + o_in
        b_x = tl.load(p_x + o_id, mask=o_id < vocab, other=-float("inf")).to(tl.float32)
        b_new = tl.maximum(b_top, tl.max(b_x, 1))
        b_back = b_top - b_new
        b_scale = tl.exp(b_back)
        b_d = b_x - b_new[:, None]
        b_w = tl.exp(b_d)
        b_d = tl.where(b_d > -float("inf"), b_d, 0.0)
        b_wd = b_w * b_d
        b_s2 = b_scale * (b_s2 + b_back * (2 * b_s1 + b_back * b_s0)) + tl.sum(b_wd * b_d, 1)
        b_s1 = b_scale * (b_s1 + b_back * b_s0) + tl.sum(b_wd, 1)
        b_s0 = b_scale * b_s0 + tl.sum(b_w, 1)
        b_top = b_new
    top = tl.max(b_top, 0)
    b_back = b_top - top
    b_scale = tl.exp(b_back)
    s2 = tl.sum(b_scale * (b_s2 + b_back * (2 * b_s1 + b_back * b_s0)), 0)
    s1 = tl.sum(b_scale * (b_s1 + b_back * b_s0), 0)
    s0 = tl.sum(b_scale * b_s0, 0)
    mean = s1 / s0
    p_out += i_row * 3
    tl.store(p_out, top + tl.log(s0))
    tl.store(p_out + 1, tl.log(s0) - mean)
    tl.store(p_out + 2, tl.maximum(s2 / s0 - mean * mean, 0.0))


def measure(logits: torch.Tensor) -> torch.Tensor:
    """float32 ``[R, 3]``; ``logits [R, V]`` of DTYPES with a last stride of 1."""
    num_rows, vocab = logits.shape
    out = torch.empty(num_rows, 3, dtype=torch.float32, device=logits.device)
    uncertainty_kernel[(num_rows,)](
        logits,
        out,
        logits.stride(0),
        vocab,
        LANES=TILE_BYTES // 16,
        W=16 // logits.element_size(),
        STAGES=2 if logits.is_cuda else 1,
        num_warps=16,
    )
    return out
