"""Drawing a token of each row: one launch of :mod:`.draw_kernel`. Needs Triton."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import torch
import triton

from ..sending import to_device
from .draw_kernel import GROUP, draw_kernel

MAX_VOCABULARY = 1 << 19
"""Most logits of a row: the largest of its groups are looked at together."""

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

NUM_WARPS = 16
ROW_TILE = 64
"""Groups that a program reads at a time."""

NUM_STAGES = 3
"""Tiles of the full pass in flight or at work, where shared memory has room for them."""


def draw(
    logits: torch.Tensor,
    noise: torch.Tensor | None,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    leaders: Sequence[int] | None = None,
    ranks: Sequence[int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The token of each row and what it was drawn from. The host does not wait.

    Args:
        logits: ``[R, V]`` float32, float16 or bfloat16, last stride 1.
        noise: ``[R, V]`` float32 samples of Exp(1); None takes the likeliest token.
        temperature, top_k, top_p, min_p: as of :class:`~.options.Sampling`.
        leaders: for each row the one whose noise it uses; default its own.
        ranks: for each row which best of that noise it takes, 0 for the first; where fewer tokens
            are left, the first.

    Returns:
        tokens int64 ``[R]``; float64 ``[3, R]`` for the host: tokens, 1 where a row is broken,
        log-probs; float32 ``[R, 4]``: log-prob of the token under the logits, NaN where
        they hold NaN, +inf or nothing but -inf, the largest scaled logit, log-sum-exp of the
        logits, the lowest scaled logit that top-k and top-p keep; int32 ``[R]``: of tokens equal to
        that those from this id on are kept.
    """
    num_rows, vocab = logits.shape
    assert logits.stride(1) == 1 and vocab <= MAX_VOCABULARY
    assert noise is None or (noise.is_contiguous() and noise.shape == logits.shape)
    device = logits.device
    padded = triton.next_power_of_2(triton.cdiv(vocab, GROUP))
    keeps_all = (not top_k or top_k >= vocab) and top_p >= 1 and min_p <= 0
    tokens = torch.empty(num_rows, dtype=torch.int64, device=device)
    table = torch.empty(3, num_rows, dtype=torch.float64, device=device)
    numbers = torch.empty(num_rows, 4, dtype=torch.float32, device=device)
    cut = torch.empty(num_rows, dtype=torch.int32, device=device)
    # What is not used stands for what is not needed.
    best, listed = numbers, cut
    if not keeps_all:
        best = torch.empty(num_rows, padded, dtype=torch.float32, device=device)
        listed = torch.empty(num_rows, padded, dtype=torch.int32, device=device)
    near = torch.empty_like(best) if top_p < 1 else best
    places = listed if leaders is None else to_device(leaders, device, torch.int32)
    draw_kernel[(num_rows,)](
        logits,
        best if noise is None else noise,
        best,
        near,
        listed,
        places,
        listed if ranks is None else to_device(ranks, device, torch.int32),
        tokens,
        numbers,
        cut,
        table,
        logits.stride(0),
        vocab,
        reciprocal(temperature),
        float(top_k),
        top_p,
        math.log(min_p) if min_p > 0 else -math.inf,
        SCALED=temperature != 1,
        TOP_K=0 < top_k < vocab,
        TOP_P=top_p < 1,
        MIN_P=min_p > 0,
        GREEDY=noise is None,
        RANKED=ranks is not None,
        NGP=padded,
        GROUPS=ROW_TILE,
        W=16 // logits.element_size(),
        STAGES=NUM_STAGES if has_room(device) else 1,
        num_warps=NUM_WARPS,
    )
    return tokens, table, numbers, cut


@cache
def has_room(device: torch.device) -> bool:
    """Whether a program may hold 128 KB in shared memory."""
    if device.type != "cuda" or torch.version.hip:
        return False
    return torch.cuda.get_device_capability(device) in {(8, 0), (9, 0), (10, 0), (10, 3)}


@cache
def reciprocal(temperature: float) -> float:
    """What torch multiplies by where it divides float32 on a GPU by a number."""
    return float(torch.tensor(1.0) / torch.tensor(temperature, dtype=torch.float32))
