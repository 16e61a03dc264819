"""Draws a token of each row, one program a row, after top-k, top-p and min-p. Needs Triton.

A row is read once in full: its largest logit, its log-sum-exp, and the largest of every group of
128 logits. Only groups whose largest can still matter are read again. A top-k of 2, four groups::

    largest of groups   9.0  2.5  4.0  3.5      two groups reach 4.0, so two tokens do: groups 0, 2
    values in them      9.0, 8.5, 1.0 ...; 4.0, 0.5 ...         the second largest is 8.5
    groups that reach it                                                            group 0
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .sending import to_device

GROUP = 128
"""Logits of which the largest is kept."""

MAX_VOCABULARY = 1 << 19
"""Most logits of a row: the largest of its groups are looked at together."""

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

NUM_WARPS = 16
ROW_TILE = 64
"""Groups that a program reads at a time."""

NUM_STAGES = 3
"""Tiles of the full pass in flight or at work, where shared memory has room for them."""

_GROUP = tl.constexpr(GROUP)
_LOG2E = tl.constexpr(1.4426950408889634)
_LOWEST = tl.constexpr(-1e30)


@triton.jit
def _exp(x):
    return tl.exp2(x * _LOG2E)


@triton.jit
def _tile(
    p_x, p_list, i_tile, num_groups, vocab, scale,
    GROUPS: tl.constexpr, W: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """Scaled logits ``[GROUPS * 128 / W, W]`` of some groups and their ids; -inf outside."""
    SUBROWS: tl.constexpr = _GROUP // W
    o_sub = tl.arange(0, GROUPS * SUBROWS)
    o_group = i_tile * GROUPS + o_sub // SUBROWS
    m_group = o_group < num_groups
    if LISTED:
        o_group = tl.load(p_list + o_group, mask=m_group, other=0)
    o_first = o_group * _GROUP + (o_sub % SUBROWS) * W
    o_id = o_first[:, None] + tl.arange(0, W)[None, :]
    m_id = m_group[:, None] & (o_id < vocab)
    b_x = tl.load(p_x + o_id, mask=m_id, other=-float("inf")).to(tl.float32)
    return b_x * scale, o_id


@triton.jit
def _together(
    f1, f2, f3, f4, u1, u2, u3, d1, d2, d3, d4, g1, g2, g3, g4, v1, v2, v3, e1, e2, e3, e4
):
    """Sums, minima and maxima of two sets of lanes."""
    return (
        f1 + g1,
        f2 + g2,
        f3 + g3,
        f4 + g4,
        tl.minimum(u1, v1),
        tl.minimum(u2, v2),
        tl.minimum(u3, v3),
        tl.maximum(d1, e1),
        tl.maximum(d2, e2),
        tl.maximum(d3, e3),
        tl.maximum(d4, e4),
    )  # fmt: skip


@triton.jit
def _find(
    p_x, p_list, num_groups, vocab, scale, top, low, high, target,
    MASS: tl.constexpr, GROUPS: tl.constexpr, W: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """The largest value that, with all above it, has ``target``: tokens, or sums of exp(y - top).

    Values from ``low`` on are looked at, up to ``high``, the largest of all. Where they have less
    in all, ``low``. Four values at once; what is left lies between two values that exist.

    Returns:
        The value, and what all above it have.
    """
    LANES: tl.constexpr = GROUPS * (_GROUP // W)
    above = top - top
    a = low + above
    b = high
    while a < b:
        step = (b - a) * 0.25
        t1 = a + step
        t2 = a + 2 * step
        t3 = a + 3 * step
        f1 = tl.zeros([LANES], tl.float32)
        f2 = f1
        f3 = f1
        f4 = f1
        u1 = tl.full([LANES], float("inf"), tl.float32)
        u2 = u1
        u3 = u1
        d1 = -u1
        d2 = d1
        d3 = d1
        d4 = d1
        for i in range(0, tl.cdiv(num_groups, GROUPS)):
            b_y, _ = _tile(p_x, p_list, i, num_groups, vocab, scale, GROUPS, W, LISTED)
            if MASS:
                b_w = _exp(b_y - top)
            else:
                b_w = tl.full([LANES, W], 1.0, tl.float32)
            m1 = b_y >= t1
            m2 = b_y >= t2
            m3 = b_y >= t3
            m4 = b_y >= b
            f1 += tl.sum(tl.where(m1, b_w, 0.0), 1)
            f2 += tl.sum(tl.where(m2, b_w, 0.0), 1)
            f3 += tl.sum(tl.where(m3, b_w, 0.0), 1)
            f4 += tl.sum(tl.where(m4, b_w, 0.0), 1)
            u1 = tl.minimum(u1, tl.min(tl.where(m1, b_y, float("inf")), 1))
            u2 = tl.minimum(u2, tl.min(tl.where(m2, b_y, float("inf")), 1))
            u3 = tl.minimum(u3, tl.min(tl.where(m3, b_y, float("inf")), 1))
            d1 = tl.maximum(d1, tl.max(tl.where(m1, -float("inf"), b_y), 1))
            d2 = tl.maximum(d2, tl.max(tl.where(m2, -float("inf"), b_y), 1))
            d3 = tl.maximum(d3, tl.max(tl.where(m3, -float("inf"), b_y), 1))
            d4 = tl.maximum(d4, tl.max(tl.where(m4, -float("inf"), b_y), 1))
        s1, s2, s3, s4, x1, x2, x3, y1, y2, y3, y4 = tl.reduce(
            (f1, f2, f3, f4, u1, u2, u3, d1, d2, d3, d4), 0, _together
        )
        if s4 >= target:
            a = b
        elif s3 >= target:
            a = x3
            b = y4
            above = s4
        elif s2 >= target:
            a = x2
            b = y3
            above = s3
        elif s1 >= target:
            a = x1
            b = y2
            above = s2
        else:
            b = y1
            above = s1
    return a, above


@triton.jit
def _list(p_best, p_list, num_groups, bound, NGP: tl.constexpr):
    """Write down the groups whose largest is at least ``bound``; how many there are."""
    o_group = tl.arange(0, NGP)
    b_best = tl.load(p_best + o_group, mask=o_group < num_groups, other=-float("inf"))
    m_group = b_best >= bound
    o_place = tl.cumsum(m_group.to(tl.int32), 0) - 1
    # Others may still be reading the last list, and read the next one as soon as it is there.
    tl.debug_barrier()
    tl.store(p_list + o_place, o_group, mask=m_group)
    tl.debug_barrier()
    return tl.sum(m_group.to(tl.int32), 0)


@triton.jit
def _mass(p_x, p_list, num_groups, vocab, scale, top, floor, GROUPS: tl.constexpr, W: tl.constexpr):
    """Sum of exp(y - top) over what is at least ``floor``, of listed groups."""
    b_sum = tl.zeros([GROUPS * (_GROUP // W)], tl.float32)
    for i in range(0, tl.cdiv(num_groups, GROUPS)):
        b_y, _ = _tile(p_x, p_list, i, num_groups, vocab, scale, GROUPS, W, True)
        b_sum += tl.sum(tl.where(b_y >= floor, _exp(b_y - top), 0.0), 1)
    return tl.sum(b_sum, 0)


@triton.jit
def _cut(p_x, p_list, num_groups, vocab, scale, floor, keep, GROUPS: tl.constexpr, W: tl.constexpr):
    """The first id of the last ``keep`` tokens that are equal to ``floor``; 0 for all of them."""
    num_tiles = tl.cdiv(num_groups, GROUPS)
    seen = 0
    cut = 0
    for j in range(0, num_tiles):
        b_y, o_id = _tile(p_x, p_list, num_tiles - 1 - j, num_groups, vocab, scale, GROUPS, W, True)
        b_tie = (b_y == floor).to(tl.int32)
        b_count = tl.sum(b_tie, 1)
        count = tl.sum(b_count, 0)
        if (seen < keep) & (seen + count > keep):
            # Ids ascend along a tile, and the ties to drop are its first.
            b_rank = (tl.cumsum(b_count, 0) - b_count)[:, None] + tl.cumsum(b_tie, 1)
            m_first = (b_tie > 0) & (b_rank == count - (keep - seen) + 1)
            cut = tl.max(tl.max(tl.where(m_first, o_id, 0), 1), 0)
        elif (seen < keep) & (seen + count == keep):
            b_first = tl.min(tl.where(b_tie > 0, o_id, vocab), 1)
            cut = tl.min(b_first, 0)
        seen += count
    return cut


@triton.jit
def _best_of(b_race, b_id, vocab, axis: tl.constexpr):
    """The largest along an axis and its lowest id; ``vocab`` where there is only -inf."""
    b_top = tl.max(b_race, axis)
    b_first = tl.expand_dims(b_top, axis)
    m_first = (b_race == b_first) & (b_race > -float("inf"))
    return b_top, tl.min(tl.where(m_first, b_id, vocab), axis)


@triton.jit
def _better(x, x_id, y, y_id):
    """The larger of two; of equals that of the lower id."""
    m_first = (x > y) | ((x == y) & (x_id < y_id))
    return tl.where(m_first, x, y), tl.where(m_first, x_id, y_id)


@triton.jit
def _race(
    p_x, p_noise, p_list, num_groups, vocab, scale, top,
    floor, cut, log_min_p, last, last_id,
    GROUPS: tl.constexpr, W: tl.constexpr, LISTED: tl.constexpr, GREEDY: tl.constexpr,
):  # fmt: skip
    """The best of what is kept that comes behind ``last``; its id is ``vocab`` where none does.

    The largest of exp(y) / Exp(1) is a sample (the exponential race), here by its logarithm.
    """
    LANES: tl.constexpr = GROUPS * (_GROUP // W)
    b_top = tl.full([LANES], -float("inf"), tl.float32)
    b_id = tl.full([LANES], 0, tl.int32) + vocab
    for i in range(0, tl.cdiv(num_groups, GROUPS)):
        b_y, o_id = _tile(p_x, p_list, i, num_groups, vocab, scale, GROUPS, W, LISTED)
        m_kept = (b_y > floor) | ((b_y == floor) & (o_id >= cut))
        m_kept = m_kept & (b_y - top >= log_min_p) & (b_y > -float("inf"))
        if GREEDY:
            b_race = tl.where(m_kept, b_y, -float("inf"))
        else:
            b_noise = tl.load(p_noise + o_id, mask=m_kept, other=1.0)
            b_race = tl.where(m_kept, b_y * _LOG2E - tl.log2(b_noise), -float("inf"))
        m_behind = (b_race < last) | ((b_race == last) & (o_id > last_id))
        b_race = tl.where(m_behind & (o_id != last_id), b_race, -float("inf"))
        b_new, o_new = _best_of(b_race, o_id, vocab, 1)
        b_top, b_id = _better(b_top, b_id, b_new, o_new)
    return _best_of(b_top, b_id, vocab, 0)


@triton.jit
def draw_kernel(
    p_logits,  # [R, V], last stride 1
    p_noise,  # [R, V] float32, samples of Exp(1)
    p_best,  # [R, NGP] float32, for the largest of every group
    p_list,  # [R, NGP] int32, for groups that matter
    p_leader,  # [R] int32, whose noise a row uses
    p_rank,  # [R] int32, which best of it
    p_token,  # [R] int64
    p_numbers,  # [R, 4] float32: log-prob, largest, log-sum-exp, lowest value that is kept
    p_cut,  # [R] int32, ids from which on those of that value are kept
    stride_logits,
    vocab,
    scale,
    top_k,
    top_p,
    log_min_p,
    SCALED: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    MIN_P: tl.constexpr,
    GREEDY: tl.constexpr,
    RANKED: tl.constexpr,
    NGP: tl.constexpr,  # groups, padded to a power of two
    GROUPS: tl.constexpr,
    W: tl.constexpr,  # logits that a thread loads at a time
    STAGES: tl.constexpr,
):
    FILTERED: tl.constexpr = TOP_K or TOP_P or MIN_P
    SUBROWS: tl.constexpr = _GROUP // W
    LANES: tl.constexpr = GROUPS * SUBROWS
    BESTS: tl.constexpr = (NGP + 127) // 128
    i_row = tl.program_id(0).to(tl.int64)
    p_x = p_logits + i_row * stride_logits
    p_best += i_row * NGP
    p_list += i_row * NGP
    num_groups = tl.cdiv(vocab, _GROUP)
    i_leader = i_row
    rank = 0
    if RANKED:
        i_leader = tl.load(p_leader + i_row).to(tl.int64)
        rank = tl.load(p_rank + i_row)
    p_noise += i_leader * vocab

    # In full, once: NaN and +inf make the sum NaN.
    b_top = tl.full([LANES], -float("inf"), tl.float32)
    b_sum = tl.zeros([LANES], tl.float32)
    b_mass = tl.zeros([LANES], tl.float32)
    b_race = tl.full([LANES], -float("inf"), tl.float32)
    b_id = tl.full([LANES], 0, tl.int32) + vocab
    for i in tl.range(0, tl.cdiv(num_groups, GROUPS), num_stages=STAGES):
        b_x, o_id = _tile(p_x, p_list, i, num_groups, vocab, 1.0, GROUPS, W, False)
        b_max = tl.max(b_x, 1)
        b_new = tl.maximum(b_top, b_max)
        b_pivot = tl.where(b_new == -float("inf"), 0.0, b_new)
        b_x0 = b_x - b_pivot[:, None]
        b_sum = b_sum * _exp(b_top - b_pivot) + tl.sum(_exp(b_x0), 1)
        if SCALED:
            b_mass *= _exp((b_top - b_pivot) * scale)
            b_mass += tl.sum(_exp(b_x0 * scale), 1)
        b_top = b_new
        if FILTERED:
            o_group = i * GROUPS + tl.arange(0, GROUPS)
            b_group = tl.max(tl.reshape(b_max, [GROUPS, SUBROWS]), 1)
            tl.store(p_best + o_group, b_group * scale, mask=o_group < num_groups)
        else:
            if GREEDY:
                b_all = b_x
            else:
                m_id = (o_id < vocab) & (b_x > -float("inf"))
                b_noise = tl.load(p_noise + o_id, mask=m_id, other=1.0)
                b_all = b_x * scale * _LOG2E - tl.log2(b_noise)
            b_one, o_one = _best_of(b_all, o_id, vocab, 1)
            b_race, b_id = _better(b_race, b_id, b_one, o_one)
    largest = tl.max(b_top, 0)
    pivot = tl.where(largest == -float("inf"), 0.0, largest)
    total = tl.sum(b_sum * _exp(b_top - pivot), 0)
    is_fine = (total > 0) & (total < float("inf"))
    top = largest * scale
    best, token = _best_of(b_race, b_id, vocab, 0)
    floor = -float("inf")
    cut = 0
    num_listed = num_groups
    if FILTERED:
        if is_fine:
            tl.debug_barrier()
            if TOP_K:
                # As many groups reach this as tokens are wanted, so as many tokens do, too.
                bound, _ = _find(
                    p_best, p_list, BESTS, num_groups, 1.0, top, _LOWEST, top, top_k,
                    False, BESTS, 4, False,
                )  # fmt: skip
                num_listed = _list(p_best, p_list, num_groups, bound, NGP)
                floor, _ = _find(
                    p_x, p_list, num_listed, vocab, scale, top, bound, top, top_k,
                    False, GROUPS, W, True,
                )  # fmt: skip
                num_listed = _list(p_best, p_list, num_groups, floor, NGP)
            if TOP_P:
                if TOP_K:
                    mass = _mass(p_x, p_list, num_listed, vocab, scale, top, floor, GROUPS, W)
                    bound = floor
                    target = top_p * mass
                else:
                    if SCALED:
                        mass = tl.sum(b_mass * _exp((b_top - pivot) * scale), 0)
                    else:
                        mass = total
                    target = top_p * mass
                    # All below this together have less than what may be left out.
                    bound = top - tl.log(vocab / (1 - top_p)) - 1
                    bound, _ = _find(
                        p_best, p_list, BESTS, num_groups, 1.0, top, bound, top, target,
                        True, BESTS, 4, False,
                    )  # fmt: skip
                    num_listed = _list(p_best, p_list, num_groups, bound, NGP)
                floor, above = _find(
                    p_x, p_list, num_listed, vocab, scale, top, bound, top, target,
                    True, GROUPS, W, True,
                )  # fmt: skip
                num_listed = _list(p_best, p_list, num_groups, floor, NGP)
                keep = tl.ceil((target - above) / _exp(floor - top))
                keep = tl.maximum(tl.minimum(keep, vocab * 1.0), 1.0).to(tl.int32)
                cut = _cut(p_x, p_list, num_listed, vocab, scale, floor, keep, GROUPS, W)
            if MIN_P:
                # A little lower: rounded otherwise than where tokens are compared.
                bound = tl.maximum(floor, top + log_min_p - 1e-3)
                num_listed = _list(p_best, p_list, num_groups, bound, NGP)
            best, token = _race(
                p_x, p_noise, p_list, num_listed, vocab, scale, top,
                floor, cut, log_min_p, float("inf"), -1,
                GROUPS, W, True, GREEDY,
            )  # fmt: skip
    if RANKED:
        if is_fine:
            first = token
            for _ in range(0, rank):
                best, token = _race(
                    p_x, p_noise, p_list, num_listed, vocab, scale, top,
                    floor, cut, log_min_p, best, token,
                    GROUPS, W, FILTERED, GREEDY,
                )  # fmt: skip
            token = tl.where(token < vocab, token, first)
    token = tl.minimum(tl.maximum(token, 0), vocab - 1)
    logsumexp = pivot + tl.log(total)
    logprob = tl.load(p_x + token).to(tl.float32) - logsumexp
    tl.store(p_token + i_row, token.to(tl.int64))
    tl.store(p_cut + i_row, cut)
    p_numbers += i_row * 4
    tl.store(p_numbers, tl.where(is_fine, logprob, float("nan")))
    tl.store(p_numbers + 1, top)
    tl.store(p_numbers + 2, logsumexp)
    tl.store(p_numbers + 3, floor)


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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The token of each row and what it was drawn from. The host does not wait.

    Args:
        logits: ``[R, V]`` float32, float16 or bfloat16, last stride 1.
        noise: ``[R, V]`` float32 samples of Exp(1); None takes the likeliest token.
        temperature, top_k, top_p, min_p: as of :class:`~.options.Sampling`.
        leaders: for each row the one whose noise it uses; default its own.
        ranks: for each row which best of that noise it takes, 0 for the first; where fewer tokens
            are left, the first.

    Returns:
        tokens int64 ``[R]``; float32 ``[R, 4]``: log-prob of the token under the logits, NaN where
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
    scratch = (1,) if keeps_all else (num_rows, padded)
    best = torch.empty(scratch, dtype=torch.float32, device=device)
    listed = torch.empty(scratch, dtype=torch.int32, device=device)
    tokens = torch.empty(num_rows, dtype=torch.int64, device=device)
    numbers = torch.empty(num_rows, 4, dtype=torch.float32, device=device)
    cut = torch.empty(num_rows, dtype=torch.int32, device=device)
    places = listed if leaders is None else to_device(leaders, device, torch.int32)
    draw_kernel[(num_rows,)](
        logits,
        best if noise is None else noise,
        best,
        listed,
        places,
        listed if ranks is None else to_device(ranks, device, torch.int32),
        tokens,
        numbers,
        cut,
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
    return tokens, numbers, cut


def has_room(device: torch.device) -> bool:
    """Whether a program may hold 128 KB in shared memory."""
    if device.type != "cuda" or torch.version.hip:
        return False
    return torch.cuda.get_device_capability(device) in {(8, 0), (9, 0), (10, 0), (10, 3)}


def reciprocal(temperature: float) -> float:
    """What torch multiplies by where it divides float32 on a GPU by a number."""
    return float(torch.tensor(1.0) / torch.tensor(temperature, dtype=torch.float32))
