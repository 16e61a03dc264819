"""Thousands of launches of the fused kernel over changing trees, beside other work on the GPU.

A script, for a process of its own: a merge that waits for ever would take its process along.

python tests/stress.py [NUMBER OF LAUNCHES]
"""

from __future__ import annotations

import json
import random
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from kernel_calls import Family, make_call, outputs

NUM_TREES = 48
FAMILY = Family(torch.bfloat16, (64, 64), 4, 16, num_kv_heads=4)
REVERSED_EVERY = 12
"""Of these launches one starts its merges first, which costs a millisecond."""

DIRTY_EVERY = 97
"""Launches until a launch is taken for aborted, with counters that it left anyhow."""


def main(num_launches: int) -> None:
    rng = random.Random(0)
    calls = []
    for seed in range(NUM_TREES):
        call = make_call(FAMILY, seed, "cuda", scale=rng.choice([12, 40, 150, 400]))
        # Plans of one cache never share a version unless they share a tree.
        call.plan.tree.topology_version = 1000 + seed
        call.plan = replace(call.plan, topology_version=1000 + seed)
        calls.append(call)
    workspace = FAMILY.workspace("cuda")
    wrong = []
    first = []
    for number, call in enumerate(calls):
        results = [call.attend(workspace, reverse=reverse) for reverse in (False, True)]
        want = call.reference()
        for reverse, got in enumerate(results):
            text = call.complain(got, want)
            if text is not None:
                wrong.append(f"tree {number}, {'last' if reverse else 'first'} item first: {text}")
        first.append(results)

    side = torch.cuda.Stream()
    left, right = torch.randn(2, 2048, 2048, device="cuda", dtype=torch.bfloat16)
    different = torch.zeros(NUM_TREES, 2, dtype=torch.int64, device="cuda")
    buffers = [outputs(call.q, FAMILY.head_dims[1]) for call in calls]
    torch.cuda.synchronize()
    num_merges = num_reversed = num_dirty = 0
    number = last = NUM_TREES - 1
    for i in range(num_launches):
        if i % 3 == 0:
            number = rng.randrange(NUM_TREES)
        if i % 20 == 0:
            with torch.cuda.stream(side):
                torch.mm(left, right)
        if i % DIRTY_EVERY == 0:
            workspace._sync.fill_(rng.choice([1, -1, 12345]))
            workspace._arrived.fill_(rng.choice([1, -1, 12345]))
            # Another plan heals.
            number = (last + 1) % NUM_TREES
            num_dirty += 1
        last = number
        call, (out, lse) = calls[number], buffers[number]
        reverse = i % REVERSED_EVERY == 0
        workspace.prepare(call.plan, call.storage)
        assert workspace.work is not None
        num_merges += workspace.work.num_items > workspace.work.num_work
        num_reversed += reverse
        out.fill_(float("nan"))
        lse.fill_(float("nan"))
        workspace.launch(
            call.q, call.storage, call.layer, out, lse, reverse=reverse, **call.options
        )
        for new, expected in zip((out, lse), first[number][reverse], strict=True):
            different[number, int(reverse)] += (new != expected).any()
        if i % 500 == 499:
            torch.cuda.synchronize()
    torch.cuda.synchronize()
    for number, reverse in different.nonzero().tolist():
        count = int(different[number, reverse])
        wrong.append(f"tree {number}, reverse={bool(reverse)}: {count} launches gave other bits")
    counts = {"merges": num_merges, "reversed": num_reversed, "dirty": num_dirty}
    print(json.dumps({"failures": wrong, "launches": num_launches, **counts}))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000)
