from __future__ import annotations

import gc
import random
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import psutil
import pytest
import torch
from models import build, one_thread, prompts

from hf_tree_cache import (
    ForkOnEntropy,
    OutOfBlocks,
    PruneByRank,
    TreeCache,
    enable_tree_attention,
    tree_generate,
)

__all__ = ["one_thread"]  # a fixture for all of this file

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


class Broken(RuntimeError):
    pass


def fails_at(call: int) -> Callable[..., Any]:
    """A hook or a processor that raises when it is called for the n-th time."""
    left = iter(range(call - 1, -1, -1))

    def fail(*arguments: Any) -> Any:
        if next(left, 1) == 0:
            raise Broken
        return arguments[1] if len(arguments) == 2 else None

    return fail


def failing_processor(model: Any, inputs: Any, **options: Any) -> None:
    model.generate(**inputs, logits_processor=[fails_at(5)], **options)


def failing_layer(model: Any, inputs: Any, **options: Any) -> None:
    handle = model.model.layers[1].mlp.register_forward_hook(fails_at(4))
    try:
        model.generate(**inputs, **options)
    finally:
        handle.remove()


def too_few_blocks(model: Any, inputs: Any, **options: Any) -> None:
    model.generate(**inputs, **{**options, "past_key_values": TreeCache(max_blocks=9)})


def failing_policy(model: Any, inputs: Any, **options: Any) -> None:
    model.generate(
        **inputs,
        **options,
        custom_generate=tree_generate,
        branching=[ForkOnEntropy(0.5, children=2), PruneByRank(3, every=3)],
        logits_processor=[fails_at(6)],
        max_branches=6,
    )


def branching(model: Any, inputs: Any, **options: Any) -> None:
    model.generate(
        **inputs,
        **options,
        custom_generate=tree_generate,
        branching=[ForkOnEntropy(0.5, children=2), PruneByRank(3, every=3)],
        max_branches=6,
    )


def plain(model: Any, inputs: Any, **options: Any) -> None:
    model.generate(**inputs, **options)


CALLS: list[tuple[Callable[..., None], type[Exception] | None, dict[str, Any]]] = [
    (plain, None, {"do_sample": True, "num_return_sequences": 3}),
    (failing_processor, Broken, {"do_sample": True, "num_return_sequences": 3}),
    (plain, None, {"num_beams": 3, "do_sample": False}),
    (failing_layer, Broken, {"num_beams": 3, "do_sample": False}),
    (branching, None, {"do_sample": True}),
    (failing_policy, Broken, {"do_sample": True}),
    (too_few_blocks, OutOfBlocks, {"do_sample": True, "num_return_sequences": 3}),
]


ROUNDS = 10
"""70 calls, of which the first two rounds warm up the allocators and caches below us."""

FEW_ROUNDS = 8
LEFT_BEHIND = 28
"""Objects that a round may leave; a call that keeps its cache leaves more."""


def generate_on_and_on(model: Any, inputs: Any, cache: TreeCache | None) -> None:
    """Each of `CALLS` once, most of them failing in the middle.

    Args:
        cache: used for all of them, reset in between; else each has one of its own.
    """
    for call, error, options in CALLS:
        used = TreeCache() if cache is None else cache
        options = {"max_new_tokens": 8, "past_key_values": used, **options}
        with nullcontext() if error is None else pytest.raises(error):
            call(model, inputs, **options)
        used.check_integrity()
        used.reset()
        assert used.stats().blocks == 0


@pytest.mark.parametrize("rounds", [FEW_ROUNDS, pytest.param(ROUNDS, marks=pytest.mark.slow)])
@pytest.mark.parametrize("reused", [False, True], ids=["a cache each", "one cache"])
def test_generates_with_errors_in_the_middle_leave_nothing_behind(
    reused: bool, rounds: int
) -> None:
    process, model, inputs = psutil.Process(), build("llama"), prompts()
    cache = TreeCache() if reused else None
    resident, objects, tensors = [], [], []
    with enable_tree_attention(model):
        for _ in range(rounds):
            generate_on_and_on(model, inputs, cache)
            gc.collect()
            kinds = list(map(type, gc.get_objects()))
            objects.append(len(kinds))
            tensors.append(sum(issubclass(kind, torch.Tensor) for kind in kinds))
            resident.append(process.memory_info().rss)
    assert max(tensors[2:]) == tensors[2], tensors
    assert max(objects[2:]) - objects[2] < LEFT_BEHIND * (rounds - 3), objects
    assert max(resident[2:]) - resident[2] < SLACK, resident


@pytest.mark.gpu
@pytest.mark.parametrize("reused", [False, True], ids=["a cache each", "one cache"])
def test_generates_with_errors_in_the_middle_hold_device_memory(reused: bool) -> None:
    model = build("llama").cuda()
    inputs = {key: value.cuda() for key, value in prompts().items()}
    cache = TreeCache() if reused else None
    allocated, reserved = [], []
    with enable_tree_attention(model):
        for _ in range(ROUNDS):
            generate_on_and_on(model, inputs, cache)
            gc.collect()
            allocated.append(torch.cuda.memory_allocated())
            reserved.append(torch.cuda.memory_reserved())
    assert max(allocated[2:]) == allocated[2], allocated
    assert max(reserved[2:]) == reserved[2], reserved
