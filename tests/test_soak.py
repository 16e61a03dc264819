from __future__ import annotations

import gc
import random

import psutil
import torch

from hf_tree_cache import TreeCache

STEPS = 20_000
SAMPLE_EVERY = 4_000
MAX_ROWS, MAX_BRANCHES, MAX_TOKENS = 6, 24, 400
HEADS, HEAD_DIM, BLOCK_SIZE = 1, 4, 4

SLACK = 4 << 20
"""Bytes that the process may grow by after the second sample: 350 for each step."""


def sizes(cache: TreeCache) -> dict[str, int]:
    """Whatever a cache could pile up."""
    tree = cache.tree
    return {
        "nodes": len(list(tree.nodes())),
        "tips": len(tree._tips),
        "ids": tree.allocator.num_blocks,
        "free": len(tree.allocator._free),
        "reasons": len(cache.dense_reads),
        "scratch": len(cache._plan.scratch) if cache._plan else 0,
    }


def step(cache: TreeCache, rng: random.Random, states: list[torch.Tensor]) -> None:
    """One random forward, fork, prune, selection, hold or crop, within the bounds above."""
    tree, action = cache.tree, rng.random()
    rows, branches = cache.rows, tree.branches
    if not rows or action < 0.45:
        num_new = rng.choice([1, 1, 1, 2, 5])
        new = states[(len(rows) or 1) - 1][:, :, :num_new]
        for layer in range(2):
            cache.update(new, new, layer)
    elif action < 0.6 and len(branches) < MAX_BRANCHES:
        branch = rng.choice(branches)
        at = rng.choice([None, rng.randint(0, tree.length(branch))])
        cache.fork(branch, rng.randint(1, 2), at=at)
    elif action < 0.75 and len(branches) > 1:
        cache.prune(rng.choice(branches))
    elif action < 0.88:
        most = min(MAX_ROWS, MAX_BRANCHES - len(tree.held))
        if most > 0:
            cache.select(rng.choices(range(len(rows)), k=rng.randint(1, most)))
    elif action < 0.95:
        cache.set_rows(rng.sample(branches, rng.randint(1, min(MAX_ROWS, len(branches)))))
    else:
        cache.crop(-rng.randint(0, min(7, cache.get_seq_length())))
    for branch in tree.branches:
        if tree.length(branch) > MAX_TOKENS:
            cache.prune(branch)


def test_twenty_thousand_steps_leave_nothing_behind() -> None:
    rng = random.Random(0)
    cache = TreeCache(block_size=BLOCK_SIZE)
    states = [torch.randn(rows, HEADS, 5, HEAD_DIM) for rows in range(1, MAX_ROWS + 1)]
    process = psutil.Process()
    largest: dict[str, int] = {}
    resident: list[int] = []
    objects: list[int] = []
    for done in range(1, STEPS + 1):
        step(cache, rng, states)
        if done % 50 == 0:
            cache.check_integrity()
        for name, size in sizes(cache).items():
            largest[name] = max(largest.get(name, 0), size)
        if done % SAMPLE_EVERY == 0:
            gc.collect()
            resident.append(process.memory_info().rss)
            objects.append(len(gc.get_objects()))
    assert largest["tips"] <= MAX_BRANCHES + MAX_ROWS
    # Each inner node branches or is the tip of a branch.
    assert largest["nodes"] <= 2 * largest["tips"]
    assert largest["ids"] <= (MAX_BRANCHES + MAX_ROWS) * (MAX_TOKENS // BLOCK_SIZE + 2)
    assert largest["free"] <= largest["ids"]
    assert max(resident[2:]) - resident[1] < SLACK, resident
    assert max(objects) - min(objects) < 1_000, objects
    stats = cache.stats()
    assert stats.forks > 1_000 and stats.prunes > 1_000 and stats.copies > 1_000
    cache.reset()
    after = sizes(cache)
    assert (after["nodes"], after["tips"]) == (0, 0)
    assert cache.stats().blocks == 0
    cache.check_integrity()
