"""Host cost of the branch tree: forks, selections and the books of a decode step. Needs no GPU.

Each line has the target or the ceiling first, then the median and the 20th and 80th percentile. The
ceiling of a fork is one entry in a dict; what copying a block list would cost stands beside it.
Last line: one JSON object.

    python benchmarks/memory.py [--repeats 200] [--out benchmarks/results/memory.json]
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hf_tree_cache import TreeCache
from hf_tree_cache.attention.plan import build_plan
from hf_tree_cache.env import environment
from hf_tree_cache.memory.allocator import PhysicalKVAllocator
from hf_tree_cache.memory.storage import SlabIndex
from hf_tree_cache.memory.tree import BranchTree

BLOCK_SIZE = 16
CONTEXTS = [128, 1_024, 8_192, 32_768, 131_072]
ROWS = [16, 64, 256, 1_024]
SLAB_SLOTS = 1_024 * BLOCK_SIZE
CPU = torch.device("cpu")
PARTS = ("append", "plan kept", "index", "step", "plan made anew")


def check_tokens() -> None:
    """Random surgery on a small cache: every branch must hold its own tokens, on sound books."""
    rng = random.Random(0)
    cache = TreeCache(block_size=4, poison=True)
    rows: list[list[int]] = [[]]
    written = 0
    for _ in range(300):
        num_new = rng.choice([1, 1, 2, 5])
        for row in rows:
            row += range(written, written + num_new)
            written += num_new
        new = torch.tensor([row[-num_new:] for row in rows], dtype=torch.float32)[:, None, :, None]
        cache.update(new, -new, 0)
        chosen = rng.choices(range(len(rows)), k=rng.randint(1, 6))
        cache.select(chosen)
        rows = [list(rows[index]) for index in chosen]
        (early,) = cache.fork(cache.rows[0], at=rng.randint(0, len(rows[0])))
        cache.prune(early)
        cache.check_integrity()
        want = torch.tensor(rows, dtype=torch.float32)[:, None, :, None]
        assert torch.equal(cache.layers[0].keys, want), "a branch lost its tokens"
        assert torch.equal(cache.layers[0].values, -want), "a branch lost its tokens"


def grown(tokens: int, rows: int = 1) -> BranchTree:
    """Branches of one prompt, on their own from its end on."""
    tree = BranchTree(BLOCK_SIZE, PhysicalKVAllocator())
    tree.add_rows(1)
    tree.append([tokens])
    tree.select([0] * rows)
    return tree


def timed(call: Callable[[], Any], after: Callable[[Any], Any], repeats: int) -> dict[str, float]:
    """Microseconds of ``call``; ``after`` gets its result and puts things back, untimed."""
    times = []
    gc.collect()
    for _ in range(repeats):
        started = time.perf_counter_ns()
        result = call()
        times.append((time.perf_counter_ns() - started) / 1_000)
        after(result)
    return quantiles(times)


def quantiles(times: list[float]) -> dict[str, float]:
    ordered = sorted(times)
    at = {"median": 0.5, "p20": 0.2, "p80": 0.8}
    return {name: round(ordered[int(q * (len(ordered) - 1))], 3) for name, q in at.items()}


class Report:
    """Prints a line for each measurement and keeps it."""

    def __init__(self) -> None:
        self.results: list[dict[str, Any]] = []

    def add(
        self, name: str, us: dict[str, float], *, ceiling_us: float, target_us: float | None = None
    ) -> None:
        met = None if target_us is None else us["median"] <= target_us
        self.results.append(
            {"name": name, "target_us": target_us, "ceiling_us": ceiling_us, "us": us, "met": met}
        )
        target = "" if target_us is None else f"{target_us:,.0f}"
        verdict = {None: "", True: "met", False: "MISSED"}[met]
        print(
            f"{name:<46} {target:>8} {ceiling_us:>9,.2f} {us['median']:>10,.2f} "
            f"{us['p20']:>10,.2f} {us['p80']:>10,.2f}  {verdict}",
            flush=True,
        )


def measure_forks(report: Report, repeats: int) -> None:
    entries: dict[int, int] = {}
    ceiling = timed(lambda: entries.update({0: 0}), lambda _: entries.clear(), repeats)["median"]
    for tokens in CONTEXTS:
        tree = grown(tokens)
        (branch,) = tree.rows
        target = 20 if tokens == CONTEXTS[-1] else None

        def put_back(forks: list, tree: BranchTree = tree) -> None:
            for fork in forks:
                tree.prune(fork)

        for at in (None, -20):
            us = timed(lambda at=at: tree.fork(branch, at=at), put_back, repeats)  # noqa: B023
            where = "at the tip" if at is None else f"at={at}"
            report.add(f"fork {where}, {tokens:,} tokens", us, ceiling_us=ceiling, target_us=target)
        table = tree.block_table(branch)
        counts = [1] * len(table)

        def copy_blocks(table: list[int] = table, counts: list[int] = counts) -> list[int]:
            for block in table:
                counts[block] += 1
            return list(table)

        us = timed(copy_blocks, lambda _: None, repeats)
        report.add(f"  for comparison: copy its {len(table):,} blocks", us, ceiling_us=ceiling)
        tree.check_integrity()
    tokens = CONTEXTS[-1]
    tree = grown(tokens)
    (branch,) = tree.rows

    def one_by_one() -> list:
        return [fork for _ in range(256) for fork in tree.fork(branch)]

    def prune_all(forks: list) -> None:
        for fork in forks:
            tree.prune(fork)

    for name, call in [
        ("256 forks in one call", lambda: tree.fork(branch, 256)),
        ("256 forks one by one", one_by_one),
    ]:
        us = timed(call, prune_all, repeats)
        report.add(f"{name}, {tokens:,} tokens", us, ceiling_us=256 * ceiling, target_us=1_000)
    tree.check_integrity()


def measure_select(report: Report, repeats: int) -> None:
    rng = random.Random(0)
    rows = 5_000
    ceiling = timed(lambda: list(range(rows)), lambda _: None, repeats)["median"]
    everyone = range(rows)
    for name, draw in [
        ("like a beam", lambda: rng.choices(everyone, k=rows)),
        ("in another order", lambda: rng.sample(everyone, rows)),
        ("from one row", lambda: [0] * rows),
    ]:
        tree = grown(1_000, rows)
        selects, appends = [], []
        gc.collect()
        for _ in range(max(20, repeats // 5)):
            indices = draw()
            marks = [time.perf_counter_ns()]
            tree.append([1] * rows)
            marks.append(time.perf_counter_ns())
            tree.select(indices)
            marks.append(time.perf_counter_ns())
            appends.append((marks[1] - marks[0]) / 1_000)
            selects.append((marks[2] - marks[1]) / 1_000)
        us = quantiles(selects)
        report.add(f"select of {rows:,} rows, {name}", us, ceiling_us=ceiling, target_us=10_000)
        report.add(f"  append after a select {name}", quantiles(appends[1:]), ceiling_us=ceiling)
        tree.check_integrity()


def measure_decode(report: Report, repeats: int) -> None:
    """Rows of a shared prompt of 4,096 tokens with 256 tokens of their own, one new token each."""
    for rows in ROWS:
        tree = grown(4_096, rows)
        counts = [1] * rows
        tree.append([256] * rows)
        plan = build_plan(tree, [256] * rows, 256)
        ceiling = timed(lambda: torch.tensor(counts), lambda _: None, repeats)["median"]  # noqa: B023
        times: dict[str, list[float]] = {part: [] for part in PARTS}
        for _ in range(max(20, repeats // 2)):
            marks = [time.perf_counter_ns()]
            appended = tree.append(counts)
            marks.append(time.perf_counter_ns())
            plan = build_plan(tree, counts, 1, plan)
            marks.append(time.perf_counter_ns())
            SlabIndex.of([slot for row in appended.slots for slot in row], SLAB_SLOTS, CPU)
            marks.append(time.perf_counter_ns())
            for i, part in enumerate(PARTS[:3]):
                times[part].append((marks[i + 1] - marks[i]) / 1_000)
            times["step"].append((marks[3] - marks[0]) / 1_000)
            build_plan(tree, counts, 1)
            # After a fork, a prune or a selection the plan cannot be kept.
            times["plan made anew"].append((time.perf_counter_ns() - marks[3]) / 1_000)
        for part in PARTS:
            name = "decode step, in all" if part == "step" else f"  {part}"
            report.add(f"{name}, {rows:,} rows", quantiles(times[part]), ceiling_us=ceiling)
        tree.check_integrity()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=200)
    default = Path(__file__).resolve().parent / "results" / "memory.json"
    parser.add_argument("--out", type=Path, default=default)
    options = parser.parse_args()
    check_tokens()
    print("tokens of every branch are right; microseconds:")
    print(f"{'':<46} {'target':>8} {'ceiling':>9} {'median':>10} {'p20':>10} {'p80':>10}")
    report = Report()
    measure_forks(report, options.repeats)
    measure_select(report, options.repeats)
    measure_decode(report, options.repeats)
    done = {
        "benchmark": "memory",
        "environment": environment(),
        "load_average": round(os.getloadavg()[0], 1),
        "block_size": BLOCK_SIZE,
        "repeats": options.repeats,
        "results": report.results,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(done, indent=1) + "\n")
    print(json.dumps(done))


if __name__ == "__main__":
    main()
