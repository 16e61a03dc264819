"""Host time of a decode step around the model: books of the tree, work list, buffers. Needs no GPU.

What a step costs before the device can start, for 64, 256 and 4,096 branches of one prompt: a plain
step, block crossings, a fork, a prune, eight of both, a row that is put aside. Twice: through the
buffers of a captured graph ("graph") and as a forward without one does it ("eager"). Copies of
blocks and launches of kernels are left out; work is cut for an H200, and sent to ``--device``. CPU
time of the thread, so that a busy machine adds less. Each line has the target first, then the least
time, the median and the 80th percentile, in microseconds, and the copies to the device. Last line:
one JSON object.

    python benchmarks/planning.py [--repeats 60] [--rows 64 256 4096] [--device cpu] [--out FILE]
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hf_tree_cache import TreeCache
from hf_tree_cache.attention import buffers, launch
from hf_tree_cache.attention.launch import Workspace, WorkspaceKey
from hf_tree_cache.attention.tiles import tiles_for
from hf_tree_cache.env import environment
from hf_tree_cache.integration import static
from hf_tree_cache.integration.static import StaticDecode
from hf_tree_cache.memory.pool import StoragePool
from hf_tree_cache.memory.tree import Branch

PROMPT, OWN = 2_000, 200
KV_HEADS, GROUP = 8, 4
MULTIPROCESSORS = 132
TARGETS = {"plain step": {256: 150}, "fork": {256: 500, 4_096: 5_000}}
TARGETS["prune"] = TARGETS["fork"]


@contextmanager
def as_on_an_h200() -> Iterator[None]:
    """Cut work for an H200 with head dim 128; leave copies of blocks out."""
    tiles = tiles_for("sm_90", 2, 128)
    with ExitStack() as stack:
        for where, name, stand_in in (
            (launch, "_num_sms", lambda device: MULTIPROCESSORS),
            (launch, "find_tiles", lambda key: tiles),
            (static, "find_obstacle", lambda *call: None),
            (static, "scatter_tokens", lambda *call: None),
            (Workspace, "launch", lambda *call, **options: None),
            (StoragePool, "copy", lambda *call: None),
        ):
            stack.enter_context(patch.object(where, name, stand_in))
        yield


class Graph:
    """The buffers that a captured decode step reads."""

    def __init__(self, cache: TreeCache, rows: int) -> None:
        self.cache, self.static, self.bucket = cache, StaticDecode(), 2 * rows
        device = cache.storages[0].spec.device
        self.query = torch.zeros(self.bucket, KV_HEADS * GROUP, 1, 8, device=device)
        self.begin()
        new = torch.zeros(2, self.bucket, KV_HEADS, 1, 8, device=device)
        kv = self.static.write(cache.storages[0], 0, *new)
        self.static.attend(kv, self.query, scale=1.0, window=None, softcap=None, sinks=None)
        self.end()

    def begin(self) -> None:
        step = self.cache.begin(len(self.cache.tree.rows), 1, padding_known=True)
        self.static.prepare(step, self.cache.storages, self.bucket)
        self.static.items()

    def end(self) -> None:
        self.static.advance()  # which a graph does
        self.static.advanced()
        self.static.release()
        self.cache.mark_written()
        self.cache.finish()

    def check(self) -> None:
        """The buffers say what others, made for this step alone, do."""
        step, storages = self.cache.step, self.cache.storages
        assert step is not None
        (reader,) = self.static._readers.values()
        check(reader.workspace, step.plan, storages[0], ahead=1)


class Eager:
    """What the first layer of a forward without a graph does, for all."""

    def __init__(self, cache: TreeCache, rows: int) -> None:
        self.cache = cache
        self.workspace = Workspace(WorkspaceKey(cache.storages[0].spec, GROUP))

    def begin(self) -> None:
        step = self.cache.begin(len(self.cache.tree.rows), 1, padding_known=True)
        step.write_index(self.cache.storages[0])
        self.workspace.prepare(step.plan, self.cache.storages[0])

    def end(self) -> None:
        self.cache.mark_written()
        self.cache.finish()

    def check(self) -> None:
        assert self.cache.step is not None
        check(self.workspace, self.cache.step.plan, self.cache.storages[0])


def check(workspace: Workspace, plan: Any, storage: Any, ahead: int = 0) -> None:
    assert workspace.work is not None
    ends = (workspace._ints["lengths"][: plan.num_rows] - ahead).tolist()
    assert ends == list(plan.lengths) == plan.tree.row_lengths(), "the buffers are behind"


def make_cache(rows: int, device: torch.device, *, staggered: bool) -> TreeCache:
    """Branches of one prompt with tokens of their own, as many each or of any number."""
    rng = random.Random(0)
    cache = TreeCache()
    cache.update(*torch.zeros(2, 1, KV_HEADS, PROMPT, 8, dtype=torch.bfloat16, device=device), 0)
    cache.finish()
    cache.select([0] * rows)
    counts = [rng.randint(OWN - 32, OWN) for _ in range(rows)] if staggered else None
    cache.begin(rows, OWN, counts=counts)
    cache.mark_written()
    cache.finish()
    return cache


def surgery(cache: TreeCache, rng: random.Random) -> dict[str, tuple[Callable[[], Any], ...]]:
    """What is drawn, what is then done, timed, and what puts the number of rows back."""
    tree = cache.tree

    def count() -> int:
        return len(tree.rows)

    def forked() -> list[int]:
        rows = list(range(count()))
        row = rng.randrange(len(rows))
        rows.insert(row, rows[row])
        return rows

    def pruned() -> list[int]:
        rows = list(range(count()))
        del rows[rng.randrange(len(rows))]
        return rows

    def churned() -> list[int]:
        kept = rng.sample(range(count()), count() - 8)
        return sorted(kept + rng.sample(kept, 8))

    def finished() -> list[Branch]:
        row = rng.randrange(count())
        return [branch for i, branch in enumerate(tree.rows) if i != row]

    def drop_held() -> None:
        for branch in tree.held:
            cache.prune(branch)
        cache.select(forked())

    return {
        "fork": (forked, cache.select, lambda: cache.select(pruned())),
        "prune": (pruned, cache.select, lambda: cache.select(forked())),
        "8 prunes and 8 forks": (churned, cache.select, lambda: None),
        "a row is put aside": (finished, cache.set_rows, drop_held),
    }


class Report:
    """Prints a line for each measurement and keeps it."""

    def __init__(self) -> None:
        self.results: list[dict[str, Any]] = []

    def add(self, path: str, name: str, rows: int, times: list[float], copies: float) -> None:
        ordered = sorted(times)
        at = {"least": 0, "median": len(ordered) // 2, "p80": int(0.8 * (len(ordered) - 1))}
        us = {key: round(ordered[index], 1) for key, index in at.items()}
        target = TARGETS.get(name, {}).get(rows)
        line = {"path": path, "name": name, "rows": rows, "target_us": target, "us": us}
        self.results.append({**line, "copies": round(copies, 2)})
        shown = "" if target is None else f"{target:,}"
        print(
            f"{path:6} {rows:>6,} {name:<28} {shown:>7} {us['least']:>9,.1f} {us['median']:>9,.1f} "
            f"{us['p80']:>9,.1f} {copies:>6.2f}",
            flush=True,
        )


class Sent:
    """Counts copies to the device."""

    def __init__(self) -> None:
        self.count = 0
        original = buffers.IntBuffer._send

        def send(this: Any, *place: int) -> None:
            self.count += 1
            original(this, *place)

        self.patched = patch.object(buffers.IntBuffer, "_send", send)


def measure(
    report: Report,
    path: type[Graph] | type[Eager],
    rows: int,
    repeats: int,
    device: torch.device,
) -> None:
    name = path.__name__.lower()
    sent = Sent()

    def timed(host: Graph | Eager, before: Callable[[], Any] | None = None) -> tuple[float, int]:
        copies = sent.count
        started = time.thread_time_ns()
        if before is not None:
            before()
        host.begin()
        taken = (time.thread_time_ns() - started) / 1_000
        host.end()
        return taken, sent.count - copies

    def plain(host: Graph | Eager) -> None:
        host.begin()
        host.end()

    with sent.patched:
        cache = make_cache(rows, device, staggered=False)
        host = path(cache, rows)
        steps: dict[str, list[tuple[float, int]]] = {"plain step": [], "all rows cross": []}
        gc.collect()
        for i in range(16 * max(4, repeats // 8)):
            crosses = cache.tree.row_lengths()[0] % 16 == 0
            steps["all rows cross" if crosses else "plain step"].append(timed(host))
            if i % 50 == 0:
                host.check()
        cache = make_cache(rows, device, staggered=True)
        host = path(cache, rows)
        plain(host)
        steps["a sixteenth of rows crosses"] = [timed(host) for _ in range(2 * repeats)]
        host.check()
        rng = random.Random(0)
        for what, (draw, do, put_back) in surgery(cache, rng).items():
            steps[what] = []
            gc.collect()
            for _ in range(repeats):
                steps[what].append(timed(host, partial(do, draw())))
                host.check()
                put_back()
                plain(host)
                plain(host)
        cache.check_integrity()
        for what, taken in steps.items():
            times, copies = zip(*taken, strict=True)
            report.add(name, what, rows, list(times), sum(copies) / len(copies))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 256, 4_096])
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    default = Path(__file__).resolve().parent / "results" / "planning.json"
    parser.add_argument("--out", type=Path, default=default)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'':42} {'target':>7} {'least':>9} {'median':>9} {'p80':>9} {'copies':>6}")
    report = Report()
    with as_on_an_h200():
        for path in (Graph, Eager):
            for rows in options.rows:
                measure(report, path, rows, options.repeats, options.device)
    done = {
        "benchmark": "planning",
        "environment": environment(),
        "load_average": round(os.getloadavg()[0], 1),
        "prompt": PROMPT,
        "own_tokens": OWN,
        "repeats": options.repeats,
        "device": str(options.device),
        "results": report.results,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(done, indent=1) + "\n")
    print(json.dumps(done))


if __name__ == "__main__":
    main()
