"""Runs the kernels of sampling in Triton's interpreter, and prints what went wrong as JSON.

A script, for a process of its own: whether a kernel is interpreted is decided when it is imported.

TRITON_INTERPRET=1 python tests/interpreted_draw.py
"""

from __future__ import annotations

import json
import math
import sys
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from draws import SAMPLINGS, kept_by_kernel, kept_by_sorting, rows
from interpreter import quicken

from hf_tree_cache.generation import draw_kernel, draw_launch, uncertainty, uncertainty_kernel
from hf_tree_cache.generation.draw_launch import draw
from hf_tree_cache.generation.options import Sampling


def options(sampling: Sampling) -> dict[str, float]:
    return {name: getattr(sampling, name) for name in ("temperature", "top_k", "top_p", "min_p")}


def check_draws(vocab: int, dtype: torch.dtype, names: Iterable[str]) -> Iterator[str]:
    """What is kept, what is drawn from a noise, its log-prob."""
    draw_launch.ROW_TILE = 2
    for name in names:
        sampling, logits = SAMPLINGS[name], rows(vocab, dtype)
        noise = torch.empty(logits.shape).exponential_()
        tokens, _, numbers, cut = draw(logits, noise, **options(sampling))
        want = kept_by_sorting(logits, sampling)
        where = f"{name}, {vocab} x {dtype}"
        if not torch.equal(kept_by_kernel(logits, sampling, numbers, cut), want):
            yield f"{where}: kept {numbers[:, 3].tolist()} from {cut.tolist()}"
        scores = (logits.float() / sampling.temperature).masked_fill(~want, -math.inf)
        if not torch.equal(tokens, (scores.softmax(-1) / noise).argmax(-1)):
            yield f"{where}: drew {tokens.tolist()}"
        known = logits.float().log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        if not torch.allclose(numbers[:, 0], known, atol=1e-5):
            yield f"{where}: log-probs {numbers[:, 0].tolist()}"


def check_wide() -> Iterator[str]:
    """Top-p that keeps most tokens, of rows made to be searched in vain."""
    draw_launch.ROW_TILE = 2
    vocab = 2_500
    logits = torch.randn(8, vocab)
    groups = torch.arange(vocab) // draw_kernel.GROUP
    sampled = groups % (groups.max() // 2) == 0
    logits[1] = (2 * logits[1]).round()
    logits[2] = (logits[2] > 0).float()
    logits[3, logits[0] > 0] = -math.inf
    logits[4] = 5.0 * sampled + 0.1 * logits[4]
    logits[5] = -5.0 * sampled + 0.1 * logits[5]
    logits[6] = torch.linspace(-4, 4, vocab)
    logits[7] *= 3
    logits = logits.bfloat16()
    noise = torch.empty(logits.shape).exponential_()
    for sampling, count in ((Sampling(top_p=0.9), 8), (Sampling(top_p=0.5, top_k=2_000), 1)):
        few = logits[:count]
        tokens, _, numbers, cut = draw(few, noise[:count], **options(sampling))
        kept = kept_by_kernel(few, sampling, numbers, cut)
        different = (kept != kept_by_sorting(few, sampling)).sum(1)
        # Where the border falls between two tokens of the same sum in float32, either may go.
        if different.max() > 1:
            yield f"{sampling}: {different.tolist()} tokens kept otherwise"
        scores = few.float().masked_fill(~kept, -math.inf)
        if not torch.equal(tokens, (scores.softmax(-1) / noise[:count]).argmax(-1)):
            yield f"{sampling}: drew {tokens.tolist()}"


def check_reads() -> Iterator[str]:
    """How often a flat row is read: in full, twice to narrow the range, in full for the race."""
    draw_launch.ROW_TILE = 64
    logits = torch.randn(1, 128_256).bfloat16()
    tile, seen = draw_kernel._tile, []

    def counted(p_x: Any, p_list: Any, i_tile: Any, *others: Any) -> Any:
        seen.append(i_tile)
        return tile(p_x, p_list, i_tile, *others)

    draw_kernel._tile = counted
    try:
        draw(logits, torch.empty(logits.shape).exponential_(), top_p=0.9)
    finally:
        draw_kernel._tile = tile
    if len(seen) > 5.5 * 16:
        yield f"a row of 16 tiles was read in {len(seen)}"


def check_ranks() -> Iterator[str]:
    """Rows that share a noise get its best, its second best and so on."""
    draw_launch.ROW_TILE = 2
    for greedy in (False, True):
        for sampling in (Sampling(), Sampling(top_k=3)) if not greedy else (Sampling(),):
            logits = torch.randn(1, 300).mul(2).round().expand(6, 300).contiguous()
            noise = torch.empty(logits.shape).exponential_()
            order = {"leaders": [0, 1, 0, 0, 0, 5], "ranks": [0, 0, 1, 2, 3, 0]}
            tokens, _, _, _ = draw(logits, None if greedy else noise, **order, **options(sampling))
            want = kept_by_sorting(logits, sampling)
            race = logits.masked_fill(~want, -math.inf)
            race = race if greedy else race.softmax(-1) / noise
            ranked = race[0].sort(dim=-1, descending=True, stable=True).indices[:4].tolist()
            if want[0].sum() < 4:
                ranked[3] = ranked[0]
            if [tokens[i].item() for i in (0, 2, 3, 4)] != ranked:
                yield f"ranks {tokens.tolist()}, not {ranked}"
            if tokens[5] != race[5].argmax():
                yield f"a row of its own drew {tokens[5]}"


def check_broken() -> Iterator[str]:
    logits = torch.randn(4, 300)
    logits[0, 7], logits[1, 7], logits[2] = math.nan, math.inf, -math.inf
    noise = torch.empty(logits.shape).exponential_()
    for name in ("as it is", "all"):
        sampling = SAMPLINGS[name]
        tokens, table, numbers, _ = draw(logits, noise, **options(sampling))
        if numbers[:, 0].isnan().tolist() != [True, True, True, False]:
            yield f"{name}: broken rows by {numbers[:, 0].tolist()}"
        if table[:2].tolist() != [tokens.tolist(), [1, 1, 1, 0]]:
            yield f"{name}: the table says {table.tolist()}"
        if not torch.equal(table[2].float(), numbers[:, 0]) and table[2, 3] != numbers[3, 0]:
            yield f"{name}: log-probs in the table {table[2].tolist()}"
        if not ((tokens >= 0) & (tokens < 300)).all():
            yield f"{name}: tokens {tokens.tolist()}"


def check_uncertainty() -> Iterator[str]:
    uncertainty_kernel.TILE_BYTES = 1 << 10
    for dtype in (torch.float32, torch.bfloat16):
        logits = rows(3_000, dtype)
        ours, want = uncertainty_kernel.measure(logits), uncertainty.measure(logits)
        if not torch.allclose(ours, want, atol=2e-4, rtol=1e-4):
            yield f"uncertainty {ours.tolist()}, not {want.tolist()}"
    logits[0, 3], logits[1, 3] = math.nan, math.inf
    if not uncertainty_kernel.measure(logits)[:2].isnan().any(1).all():
        yield "NaN and +inf were overlooked"


def main() -> None:
    quicken()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    jobs = {
        "7": check_draws(7, torch.float32, SAMPLINGS),
        "600": check_draws(600, torch.bfloat16, ["temperature", "wide top-k", "top-p", "all"]),
        "wide": check_wide(),
        "reads": check_reads(),
        "ranks": check_ranks(),
        "broken": check_broken(),
        "uncertainty": check_uncertainty(),
    }
    failures: list[str] = []
    for name, job in jobs.items():
        try:
            failures += list(job)
        except Exception:
            failures.append(f"{name}: {traceback.format_exc(limit=-3)}")
    print(json.dumps({"failures": failures}))


if __name__ == "__main__":
    main()
