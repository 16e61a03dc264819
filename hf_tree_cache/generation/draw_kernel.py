"""Draws a token of each row, one program a row, after top-k, top-p and min-p. Needs Triton.

A row is read once in full: its largest logit, its log-sum-exp, and the largest of every group of
128 logits. Only groups whose largest can still matter are read again. A top-k of 2, four groups::

    largest of groups   9.0  2.5  4.0  3.5      two groups reach 4.0, so two tokens do: groups 0, 2
    values in them      9.0, 8.5, 1.0 ...; 4.0, 0.5 ...         the second largest is 8.5
    groups that reach it                                                            group 0

Top-p keeps most tokens of a flat row, so every group matters. Two passes that only add up then
leave a narrow range of values, and the few groups that hold any.
"""

from __future__ import annotations

import triton
import triton.language as tl

GROUP = 128
"""Logits of which the largest is kept."""

_GROUP = tl.constexpr(GROUP)
_LOG2E = tl.constexpr(1.4426950408889634)
_LOWEST = tl.constexpr(-1e30)

_FEW_TILES = tl.constexpr(4)
"""Up to as many tiles of groups are searched as they are."""

_HALVINGS = tl.constexpr(10)
_DEVIATIONS = tl.constexpr(5.0)
"""How far from a sample's guess the value is expected at most, in standard deviations."""

_PASSES = tl.constexpr(6)
"""Most passes to narrow a range; two are enough where values are spread smoothly."""


@triton.jit
def _exp(x):
    return tl.exp2(x * _LOG2E)


@triton.jit
def _over(x, y):
    """``x / y``, a millionth off at most, in three instructions: a quotient takes eight."""
    b_root = tl.math.rsqrt(y)
    return x * b_root * b_root


@triton.jit
def _tile(
    p_x, p_list, i_tile, num_groups, vocab, scale,
    GROUPS: tl.constexpr, W: tl.constexpr, LISTED: tl.constexpr, stride=1,
):  # fmt: skip
    """Scaled logits ``[GROUPS * 128 / W, W]`` of some groups and their ids; -inf outside."""
    SUBROWS: tl.constexpr = _GROUP // W
    o_sub = tl.arange(0, GROUPS * SUBROWS)
    o_group = (i_tile * GROUPS + o_sub // SUBROWS) * stride
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
    p_x, p_list, num_groups, vocab, scale, top, low, high, beyond, above, target,
    MASS: tl.constexpr, GROUPS: tl.constexpr, W: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """The largest value that, with all above it, has ``target``: tokens, or sums of exp(y - top).

    Values from ``low`` to ``high`` are looked at; those from ``beyond`` on have ``above``, listed
    or not. Where all have less, ``low``. Four values at once; what is left lies between two values
    that exist.

    Returns:
        The value, and what all above it have.
    """
    LANES: tl.constexpr = GROUPS * (_GROUP // W)
    zero = top - top
    rest = above + zero
    above = rest
    a = low + zero
    b = high + zero
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
            b_w = _exp(b_y - top) if MASS else 1.0
            b_w = tl.where(b_y < beyond, b_w, 0.0)
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
        if rest + s4 >= target:
            a = b
        elif rest + s3 >= target:
            a = x3
            b = y4
            above = rest + s4
        elif rest + s2 >= target:
            a = x2
            b = y3
            above = rest + s3
        elif rest + s1 >= target:
            a = x1
            b = y2
            above = rest + s2
        else:
            b = y1
            above = rest + s1
    return a, above


@triton.jit
def _guess(b_y, b_w, low, high, target):
    """Roughly the value that, with all above it, has ``target`` of the weights ``b_w``."""
    a = low + target * 0
    b = high + target * 0
    for _ in range(0, _HALVINGS):
        middle = a + 0.5 * (b - a)
        is_low = tl.sum(tl.sum(tl.where(b_y >= middle, b_w, 0.0), 1), 0) >= target
        a = tl.where(is_low, middle, a)
        b = tl.where(is_low, b, middle)
    return a


@triton.jit
def _narrow(
    p_x, p_near, p_list, num_groups, vocab, scale, top, low, mass, target,
    NGP: tl.constexpr, GROUPS: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """A range around the value that :func:`_find` would find, and the groups with values in it.

    A tile of groups from all over guesses three values around it. A pass adds up what all groups
    have above each, and so do the next ones for three values close to where a straight line
    between those sums meets the target, until it lies between them. Only sums decide: a bad guess
    leaves a wide range and a long list.

    Returns:
        The value is at least the first of these, and below the second; what is not below that has
        the third. The length of the list, which has been cut down.
    """
    SUBROWS: tl.constexpr = _GROUP // W
    LANES: tl.constexpr = GROUPS * SUBROWS
    every = num_groups // GROUPS
    b_y, _ = _tile(p_x, p_list, 0, num_groups, vocab, scale, GROUPS, W, True, every)
    b_w = tl.where(b_y >= low, _exp(b_y - top), 0.0)
    share = target / mass
    sample = tl.sum(tl.sum(b_w, 1), 0)
    deviation = tl.sqrt(share * (1 - share) * tl.sum(tl.sum(b_w * b_w, 1), 0))
    # Not all of the sample: far below the least value nothing can be told apart.
    most = tl.minimum(share * sample + _DEVIATIONS * deviation, (0.9 + 0.1 * share) * sample)
    t1 = _guess(b_y, b_w, low, top, most)
    t3 = _guess(b_y, b_w, low, top, share * sample - _DEVIATIONS * deviation)
    t2 = 0.5 * (t1 + t3)
    a = low + (top - top)
    b = top - top + float("inf")
    reached = mass
    above = top - top
    width = 1 / 32 + (top - top)
    left = _PASSES
    while left > 0:
        f1 = tl.zeros([LANES], tl.float32)
        f2 = f1
        f3 = f1
        for i in range(0, tl.cdiv(num_groups, GROUPS)):
            b_y, _ = _tile(p_x, p_list, i, num_groups, vocab, scale, GROUPS, W, True)
            b_w = tl.where(b_y < b, _exp(b_y - top), 0.0)
            f1 += tl.sum(tl.where(b_y >= t1, b_w, 0.0), 1)
            f2 += tl.sum(tl.where(b_y >= t2, b_w, 0.0), 1)
            f3 += tl.sum(tl.where(b_y >= t3, b_w, 0.0), 1)
            # The largest below t3: where it is in the range, the group is.
            b_near = tl.max(tl.where(b_y >= t3, -float("inf"), b_y), 1)
            b_near = tl.max(tl.reshape(b_near, [GROUPS, SUBROWS]), 1)
            o_place = i * GROUPS + tl.arange(0, GROUPS)
            tl.store(p_near + o_place, b_near, mask=o_place < num_groups)
        s1 = above + tl.sum(f1, 0)
        s2 = above + tl.sum(f2, 0)
        s3 = above + tl.sum(f3, 0)
        is_between = (s1 >= target) & (s3 < target)
        if s3 >= target:
            a = t3
            reached = s3
        elif s2 >= target:
            a = t2
            b = t3
            reached = s2
            above = s3
        elif s1 >= target:
            a = t1
            b = t2
            reached = s1
            above = s2
        else:
            b = t1
            above = s1
        if is_between:
            tl.debug_barrier()
            num_groups = _list(p_near, p_list, num_groups, a, NGP, True)
        end = tl.minimum(b, top)
        # Wider after a miss: a line between sums that are far apart is a bad guess.
        width = tl.where(is_between, 1 / 32, 4 * width)
        t2 = a + (end - a) * (reached - target) / (reached - above)
        t1 = tl.maximum(t2 - (end - a) * width, a)
        t3 = tl.minimum(t2 + (end - a) * width, end)
        # Nothing between the three: few values, which _find tells apart at once.
        is_done = (s1 == s3) | (num_groups <= _FEW_TILES * GROUPS)
        left = tl.where(is_done, 0, left - 1)
    return a, b, above, num_groups


@triton.jit
def _list(p_best, p_list, num_groups, bound, NGP: tl.constexpr, LISTED: tl.constexpr):
    """Write down the groups, of all or of the list, whose best is at least ``bound``; how many."""
    o_group = tl.arange(0, NGP)
    m_group = o_group < num_groups
    b_best = tl.load(p_best + o_group, mask=m_group, other=-float("inf"))
    if LISTED:
        o_group = tl.load(p_list + o_group, mask=m_group, other=0)
    m_group = m_group & (b_best >= bound)
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
    j = tl.cdiv(num_groups, GROUPS) - 1
    seen = 0
    cut = 0
    while (j >= 0) & (seen < keep):
        b_y, o_id = _tile(p_x, p_list, j, num_groups, vocab, scale, GROUPS, W, True)
        b_tie = (b_y == floor).to(tl.int32)
        b_count = tl.sum(b_tie, 1)
        count = tl.sum(b_count, 0)
        if seen + count >= keep:
            # Ids ascend along a tile, and the ties to drop are its first.
            b_rank = (tl.cumsum(b_count, 0) - b_count)[:, None] + tl.cumsum(b_tie, 1)
            m_first = (b_tie > 0) & (b_rank == count - (keep - seen) + 1)
            cut = tl.max(tl.max(tl.where(m_first, o_id, 0), 1), 0)
        seen += count
        j -= 1
    return cut


@triton.jit
def _best_of(b_race, b_id, vocab, nothing, axis: tl.constexpr):
    """The largest along an axis and its lowest id; ``vocab`` where all is ``nothing``."""
    b_top = tl.max(b_race, axis)
    b_first = tl.expand_dims(b_top, axis)
    b_id = tl.min(tl.where(b_race == b_first, b_id, vocab), axis)
    return b_top, tl.where(b_top > nothing, b_id, vocab)


@triton.jit
def _better(x, x_id, y, y_id):
    """The larger of two; of equals that of the lower id."""
    m_first = (x > y) | ((x == y) & (x_id < y_id))
    return tl.where(m_first, x, y), tl.where(m_first, x_id, y_id)


@triton.jit
def _race(
    p_x, p_noise, p_list, num_groups, vocab, scale, top,
    floor, cut, log_min_p, last, last_id,
    GROUPS: tl.constexpr, W: tl.constexpr,
    LISTED: tl.constexpr, MIN_P: tl.constexpr, GREEDY: tl.constexpr, RANKED: tl.constexpr,
):  # fmt: skip
    """The best of what is kept; its id is ``vocab`` where nothing is.

    Of ranked ones the best that comes behind ``last``.

    The largest of exp(y) / Exp(1) is a sample (the exponential race).
    """
    LANES: tl.constexpr = GROUPS * (_GROUP // W)
    nothing = -float("inf") if GREEDY else 0.0
    b_top = tl.full([LANES], nothing, tl.float32)
    b_id = tl.full([LANES], 0, tl.int32) + vocab
    for i in range(0, tl.cdiv(num_groups, GROUPS)):
        b_y, o_id = _tile(p_x, p_list, i, num_groups, vocab, scale, GROUPS, W, LISTED)
        m_kept = (b_y > floor) | ((b_y == floor) & (o_id >= cut))
        if MIN_P:
            m_kept = m_kept & (b_y - top >= log_min_p)
        if GREEDY:
            b_race = b_y
        else:
            # Whole subrows, so that a load is of 16 bytes.
            m_noise = tl.max(m_kept.to(tl.int32), 1)[:, None] > 0
            b_noise = tl.load(p_noise + o_id, mask=m_noise & (o_id < vocab), other=1.0)
            b_race = _over(_exp(b_y - top), b_noise)
        if RANKED:
            m_behind = (b_race < last) | ((b_race == last) & (o_id > last_id))
            m_kept = m_kept & m_behind & (o_id != last_id)
        b_race = tl.where(m_kept, b_race, nothing)
        b_new, o_new = _best_of(b_race, o_id, vocab, nothing, 1)
        b_top, b_id = _better(b_top, b_id, b_new, o_new)
    return _best_of(b_top, b_id, vocab, nothing, 0)


@triton.jit
def draw_kernel(
    p_logits,  # [R, V], last stride 1
    p_noise,  # [R, V] float32, samples of Exp(1)
    p_best,  # [R, NGP] float32, for the largest of every group
    p_near,  # [R, NGP] float32, for the largest below some value in those that matter
    p_list,  # [R, NGP] int32, for groups that matter
    p_leader,  # [R] int32, whose noise a row uses
    p_rank,  # [R] int32, which best of it
    p_token,  # [R] int64
    p_numbers,  # [R, 4] float32: log-prob, largest, log-sum-exp, lowest value that is kept
    p_cut,  # [R] int32, ids from which on those of that value are kept
    p_table,  # [3, R] float64: token, whether the row is broken, log-prob
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
    p_near += i_row * NGP
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
    nothing = -float("inf") if GREEDY else 0.0
    b_race = tl.full([LANES], nothing, tl.float32)
    b_id = tl.full([LANES], 0, tl.int32) + vocab
    for i in tl.range(0, tl.cdiv(num_groups, GROUPS), num_stages=STAGES):
        b_x, o_id = _tile(p_x, p_list, i, num_groups, vocab, 1.0, GROUPS, W, False)
        b_max = tl.max(b_x, 1)
        b_new = tl.maximum(b_top, b_max)
        b_pivot = tl.where(b_new == -float("inf"), 0.0, b_new)
        b_x0 = b_x - b_pivot[:, None]
        b_w = _exp(b_x0)
        b_shrunk = _exp(b_top - b_pivot)
        b_sum = b_sum * b_shrunk + tl.sum(b_w, 1)
        if SCALED:
            b_w = _exp(b_x0 * scale)
            b_shrunk = _exp((b_top - b_pivot) * scale)
            b_mass = b_mass * b_shrunk + tl.sum(b_w, 1)
        b_top = b_new
        if FILTERED:
            o_group = i * GROUPS + tl.arange(0, GROUPS)
            b_group = tl.max(tl.reshape(b_max, [GROUPS, SUBROWS]), 1)
            tl.store(p_best + o_group, b_group * scale, mask=o_group < num_groups)
        else:
            if GREEDY:
                b_all = b_x
            else:
                # As in _race, but relative to the largest so far.
                b_noise = tl.load(p_noise + o_id, mask=o_id < vocab, other=1.0)
                b_all = _over(b_w, b_noise)
                b_race *= b_shrunk
            b_one, o_one = _best_of(b_all, o_id, vocab, nothing, 1)
            b_race, b_id = _better(b_race, b_id, b_one, o_one)
    largest = tl.max(b_top, 0)
    pivot = tl.where(largest == -float("inf"), 0.0, largest)
    total = tl.sum(b_sum * _exp(b_top - pivot), 0)
    is_fine = (total > 0) & (total < float("inf"))
    top = largest * scale
    if not GREEDY:
        b_race *= _exp((b_top - pivot) * scale)
    best, token = _best_of(b_race, b_id, vocab, nothing, 0)
    inf = float("inf")
    floor = -inf
    cut = 0
    num_listed = num_groups
    if FILTERED:
        if is_fine:
            tl.debug_barrier()
            if TOP_K:
                # As many groups reach this as tokens are wanted, so as many tokens do, too.
                bound, _ = _find(
                    p_best, p_list, BESTS, num_groups, 1.0, top, _LOWEST, top, inf, 0.0, top_k,
                    False, BESTS, 4, False,
                )  # fmt: skip
                num_listed = _list(p_best, p_list, num_groups, bound, NGP, False)
                floor, _ = _find(
                    p_x, p_list, num_listed, vocab, scale, top, bound, top, inf, 0.0, top_k,
                    False, GROUPS, W, True,
                )  # fmt: skip
                num_listed = _list(p_best, p_list, num_groups, floor, NGP, False)
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
                        p_best, p_list, BESTS, num_groups, 1.0, top, bound, top, inf, 0.0, target,
                        True, BESTS, 4, False,
                    )  # fmt: skip
                    num_listed = _list(p_best, p_list, num_groups, bound, NGP, False)
                beyond = top - top + inf
                above = top - top
                if num_listed > _FEW_TILES * GROUPS:
                    bound, beyond, above, num_listed = _narrow(
                        p_x, p_near, p_list, num_listed, vocab, scale, top, bound, mass, target,
                        NGP, GROUPS, W,
                    )  # fmt: skip
                floor, above = _find(
                    p_x, p_list, num_listed, vocab, scale, top,
                    bound, tl.minimum(beyond, top), beyond, above, target,
                    True, GROUPS, W, True,
                )  # fmt: skip
                keep = tl.ceil((target - above) / _exp(floor - top))
                keep = tl.maximum(tl.minimum(keep, vocab * 1.0), 1.0).to(tl.int32)
                cut = _cut(p_x, p_list, num_listed, vocab, scale, floor, keep, GROUPS, W)
                num_listed = _list(p_best, p_list, num_groups, floor, NGP, False)
            if MIN_P:
                # A little lower: rounded otherwise than where tokens are compared.
                bound = tl.maximum(floor, top + log_min_p - 1e-3)
                num_listed = _list(p_best, p_list, num_groups, bound, NGP, False)
            best, token = _race(
                p_x, p_noise, p_list, num_listed, vocab, scale, top,
                floor, cut, log_min_p, 0.0, 0,
                GROUPS, W, True, MIN_P, GREEDY, False,
            )  # fmt: skip
    if RANKED:
        if is_fine:
            first = token
            for _ in range(0, rank):
                best, token = _race(
                    p_x, p_noise, p_list, num_listed, vocab, scale, top,
                    floor, cut, log_min_p, best, token,
                    GROUPS, W, FILTERED, MIN_P, GREEDY, True,
                )  # fmt: skip
            token = tl.where(token < vocab, token, first)
    token = tl.minimum(tl.maximum(token, 0), vocab - 1)
    logsumexp = pivot + tl.log(total)
    logprob = tl.load(p_x + token).to(tl.float32) - logsumexp
    logprob = tl.where(is_fine, logprob, float("nan"))
    tl.store(p_token + i_row, token.to(tl.int64))
    tl.store(p_cut + i_row, cut)
    p_table += i_row
    tl.store(p_table, token.to(tl.float64))
    tl.store(p_table + tl.num_programs(0), tl.where(is_fine, 0.0, 1.0).to(tl.float64))
    tl.store(p_table + 2 * tl.num_programs(0), logprob.to(tl.float64))
    p_numbers += i_row * 4
    tl.store(p_numbers, logprob)
    tl.store(p_numbers + 1, top)
    tl.store(p_numbers + 2, logsumexp)
    tl.store(p_numbers + 3, floor)
