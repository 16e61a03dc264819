"""Runs the fused kernel in Triton's interpreter, on a CPU, and prints what went wrong as JSON.

A script, for a process of its own: whether a kernel is interpreted is decided when it is imported.
Programs run one after the other, so merges cannot start first here.

TRITON_INTERPRET=1 python tests/interpreted.py [NUMBER OF TREES]
"""

from __future__ import annotations

import json
import random
import sys
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pytest
import torch
import triton
import triton.language as tl
from forward_errors import (
    CASES,
    FORMS,
    LAUNCHES,
    TOLERANCE,
    draw,
    error_of,
    error_of_gated,
    error_of_gated_product,
    error_of_norm,
    error_of_rotary,
    error_of_rotary_of_one,
    launches_of,
    turns_found,
)
from interpreter import quicken
from kernel_calls import Call, Family, append, call_over, grow, make_call
from models import build
from test_expert_units import CASES as EXPERTS
from test_expert_units import ROUTED, route_and_compare
from test_expert_units import draw as draw_experts
from test_expert_units import error_of as error_of_experts
from torch._dynamo.utils import counters
from trees import SHAPES, ShadowTree

from hf_tree_cache.attention import kernel
from hf_tree_cache.attention.dispatch import run_tree_attention
from hf_tree_cache.attention.plan import Window
from hf_tree_cache.attention.tiles import Tiles, TileSet
from hf_tree_cache.forward.experts import few_rows_experts
from hf_tree_cache.forward.kernels import activate as activate_in_kernel
from hf_tree_cache.forward.linear import ACTIVATIONS, MOST_ROWS, few_rows_gated, few_rows_linear
from hf_tree_cache.forward.small import activate
from hf_tree_cache.integration.gated import GatedUnits
from hf_tree_cache.integration.linears import DecodeLinears
from hf_tree_cache.integration.small_steps import SmallSteps

WINDOWS = [None, None, Window("sliding", 7), Window("chunked", 8), Window("sliding", 100)]
FP16_FACTOR = 4.0
"""The interpreter rounds the products of half precision more coarsely than a GPU."""


def draw_family(seed: int) -> Family:
    """A family in which every feature is drawn anew."""
    rng = random.Random(seed)
    tiles = Tiles(
        m_large=rng.choice([32, 64]),
        kv_small=rng.choice([16, 64]),
        kv_large=rng.choice([16, 32, 64]),
        min_chunk=rng.choice([16, 64, 256]),
        item_cost=rng.choice([0, 20, 200]),
        waves=rng.choice([0.5, 1, 4]),
    )
    other = Tiles(min_chunk=16, item_cost=20, waves=2, kv_small=32, merge_parts=2)
    return Family(
        dtype=rng.choice([torch.float32, torch.float32, torch.float16]),
        head_dims=rng.choice([(16, 16), (64, 64), (24, 24), (32, 16)]),
        group=rng.choice([1, 2, 4, 7, 16]),
        block_size=rng.choice([4, 16, 16, 32, 64]),
        num_new=(rng.choice([1, 1, 1, 2, 5, 17]),),
        num_kv_heads=rng.choice([1, 1, 2]),
        window=rng.choice(WINDOWS),
        softcap=rng.choice([None, None, 3.0]),
        sinks=rng.random() < 0.3,
        deterministic=rng.random() < 0.2,
        fixed=rng.random() < 0.3,
        tiles=TileSet(tiles, rng.choice([tiles, other])),
        spread=rng.choice([1, 1, 64]),
    )


def complain(call: Call, got: tuple[torch.Tensor, torch.Tensor]) -> str | None:
    return call.complain(got, factor=FP16_FACTOR if call.family.dtype == torch.float16 else 1.0)


def run_tree(seed: int, seen: dict[str, set[Any]]) -> list[str]:
    """One tree, some of them for a few tokens more; what is wrong."""
    family = draw_family(seed)
    rng = random.Random(seed)
    call = make_call(family, seed, "cpu", slab_blocks=rng.choice([2, 8]))
    workspace = family.workspace("cpu")
    wrong = [complain(call, call.attend(workspace))]
    work = workspace.work
    assert work is not None
    for feature, value in {
        "dtype": str(family.dtype),
        "head dims": family.head_dims,
        "group": family.group,
        "block size": family.block_size,
        "T": call.grown.num_new,
        "window": family.window is not None and family.window.kind,
        "softcap": family.softcap is not None,
        "sinks": family.sinks,
        "spread": family.spread > 1,
        "deterministic": family.deterministic,
        "fixed": family.fixed,
        "merges": work.num_work < work.num_items,
        "many parts": bool(work.num_slots) and int(work.part_ptr[1:].max()) > 8,
        "large": work.num_large > 0,
        "blanks": min(call.plan.counts) < call.plan.num_new,
        "several slabs": call.storage.num_blocks > call.storage.slab_blocks,
    }.items():
        seen.setdefault(feature, set()).add(value)
    if call.grown.num_new == 1 and seed % 2 == 0:
        for _ in range(3):
            # Into a new block in the last of three forwards, at the latest.
            for _ in range(family.block_size // 2):
                call = append(call, [1] * call.plan.num_rows)
            wrong.append(complain(call, call.attend(workspace)))
            seen.setdefault("grew in place", set()).add(workspace.work is work)
    return [text for text in wrong if text is not None]


def run_growth() -> list[str]:
    """Buffers that grow from step to step, then over ten steps at once."""
    wrong = []
    for window in (None, Window("sliding", 7), Window("chunked", 8)):
        family = Family(torch.float32, (16, 16), 4, 16, num_kv_heads=1, window=window)
        # 22, 24 and 23 tokens.
        call = call_over(family, grow(ShadowTree(16), [20], "0 0 0", [1, 3, 2], [1, 1, 1]), "cpu")
        workspace = family.workspace("cpu")
        wrong.append(complain(call, call.attend(workspace)))
        work = workspace.work
        for _ in range(4):
            call = append(call, [1] * call.plan.num_rows)
            wrong.append(complain(call, call.attend(workspace)))
        wrong.append(None if workspace.work is work else "growth was planned anew")
        for _ in range(10):
            call = append(call, [1] * call.plan.num_rows)
        wrong.append(complain(call, call.attend(workspace)))
    return [text for text in wrong if text is not None]


def run_long_heads() -> list[str]:
    """Heads of 512 and of a little less, and of 128, whose scores small items take by halves."""
    wrong = []
    for dtype, dims, group, window, softcap in (
        (torch.float16, (512, 512), 4, None, None),
        (torch.float16, (320, 512), 8, Window("sliding", 40), None),
        (torch.float32, (128, 128), 4, None, None),
        (torch.float32, (128, 64), 8, None, 3.0),
    ):
        family = Family(dtype, dims, group, 16, num_kv_heads=1, window=window, softcap=softcap)
        tree = grow(ShadowTree(16), [150], " ".join("0" * 11), [1] * 11)
        call, workspace = call_over(family, tree, "cpu"), family.workspace("cpu")
        wrong.append(complain(call, call.attend(workspace)))
        work = workspace.work
        if work is None or not 0 < work.num_large < work.num_work < len(work.items):
            wrong.append(f"{dims}: no small or no large items, or no merges")
    return [text for text in wrong if text is not None]


def run_far_scores() -> list[str]:
    """Biases of keys put all scores far from 0: items are computed twice for wide scores only."""
    twice = []

    def find_maxima(*arguments: Any) -> Any:
        twice.append(arguments)
        return theirs(*arguments)

    wrong = []
    theirs = kernel.find_maxima
    for shift, spread in ((80, 1), (-80, 1), (80, 64), (-80, 64)):
        family = Family(torch.float32, (16, 16), 4, 16, num_kv_heads=1)
        tree = grow(ShadowTree(16), [150], " ".join("0" * 11), [1] * 11)
        call, workspace = call_over(family, tree, "cpu"), family.workspace("cpu")
        bias = (abs(shift) / call.options["scale"] / 16) ** 0.5
        call.q[::2] *= spread
        call.q.add_(bias)
        call.storage.first_planes(call.layer)[0].add_(bias if shift > 0 else -bias)
        want = call.reference()
        twice.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernel, "find_maxima", find_maxima)
            # In float32 scores so far from 0 are off by some 1e-5.
            wrong.append(call.complain(call.attend(workspace), want, factor=5.0 * spread))
        work = workspace.work
        if work is None or not (work.num_large and float(want[1].abs().median()) > 40):
            wrong.append(f"no large items, or scores are not far from 0: {want[1].median()}")
        if bool(twice) != (spread > 1):
            wrong.append(f"shift {shift}, spread {spread}: {len(twice)} items computed twice")
    return [text for text in wrong if text is not None]


def run_braids() -> list[str]:
    """Leaves that take turns, of different lengths, from different prompts, while they grow."""
    wrong = []
    cases = ((4, 16, 4, (16, 16)), (7, 16, 2, (32, 16)), (4, 32, 2, (16, 16)), (1, 4, 4, (16, 16)))
    for group, size, lanes, dims in cases:
        family = Family(torch.float32, dims, group, size, num_kv_heads=1)
        rows = [0] * 11 + [1] * 12
        private = [1 + row % 5 * 9 for row in range(len(rows))]
        tree = grow(ShadowTree(size), [20, 45], " ".join(map(str, rows)), private, [1] * len(rows))
        call = call_over(family, tree, "cpu")
        workspace = family.workspace("cpu")
        wrong.append(complain(call, call.attend(workspace)))
        work = workspace.work
        assert work is not None
        if work.lanes != lanes or 1 << int(work.items[:, 6].max()) != lanes:
            wrong.append(f"not {lanes} lanes, but {work.lanes} and {set(work.items[:, 6])}")
        for steps in (min(12, size), 1, min(9, size)):  # more than a block is planned anew
            for _ in range(steps):
                call = append(call, [1] * call.plan.num_rows)
            wrong.append(complain(call, call.attend(workspace)))
        wrong.append(None if workspace.work is work else "growth was planned anew")
    return [text for text in wrong if text is not None]


def run_blanks() -> list[str]:
    """Forwards in which no row has a new token, first of all or after others."""
    wrong = []
    for deterministic in (False, True):
        family = Family(torch.float32, (16, 16), 4, 16, deterministic=deterministic, fixed=False)
        for grows_first in (False, True):
            call = make_call(family, 3, "cpu", scale=12)
            workspace = family.workspace("cpu")
            if grows_first:
                call = append(call, [1] * call.plan.num_rows)
                wrong.append(complain(call, call.attend(workspace)))
            call = append(call, [0] * call.plan.num_rows)
            wrong.append(complain(call, call.attend(workspace)))
    return [text for text in wrong if text is not None]


def run_dispatch() -> list[str]:
    """Through the one entry of all backends; layers share the buffers."""
    wrong = []
    for seed in range(4):
        family = Family(torch.float32, (16, 16), 2, 16, (1, 2), sinks=seed % 2 > 0, fixed=False)
        call = make_call(family, seed, "cpu")
        for _ in range(2):
            out, lse = run_tree_attention(
                call.q, call.storage, call.layer, call.plan, backend="triton", **call.options
            )
            wrong.append(complain(call, (out.transpose(1, 2), lse.transpose(1, 2))))
            if len(call.plan.buffers) != 1:
                wrong.append(f"{len(call.plan.buffers)} workspaces for one kind of layer")
    return [text for text in wrong if text is not None]


@triton.jit
def activation_kernel(p_x, p_y, SIZE: tl.constexpr, ACTIVATION: tl.constexpr):
    o_n = tl.arange(0, SIZE)
    tl.store(p_y + o_n, activate_in_kernel(tl.load(p_x + o_n), ACTIVATION))


def run_activations() -> list[str]:
    """In float32, where gelu and its formula with tanh are far apart."""
    wrong = []
    x = torch.linspace(-9, 9, 512)
    for activation in ACTIVATIONS:
        y = torch.empty_like(x)
        activation_kernel[(1,)](x, y, SIZE=len(x), ACTIVATION=activation)
        error = float((y - activate(x, activation)).abs().max())
        if not error < 2e-6:
            wrong.append(f"{activation} is off by {error:.1e}")
    return wrong


def run_coverage() -> list[str]:
    """Of models whose norms, units or rotary embeddings are of a form of their own."""
    wrong = []
    for name, norms, units in (
        ("gemma3", 6, 1),
        ("phi3", 2, 1),
        ("glm", 2, 1),
        ("cohere2", 0, 1),
        ("gpt_oss", 2, 0),
    ):
        model = build(name, torch.bfloat16)
        layers = model.config.num_hidden_layers
        steps, gated = SmallSteps(model.modules()), GatedUnits(model.modules())
        found = len(steps.norms), len(gated.units), len(steps.rotaries)
        expected = norms * layers + (norms > 0), units * layers, 1
        if found != expected:
            wrong.append(f"{name}: {found} norms, units and rotary embeddings, not {expected}")
    return wrong


def run_forward() -> list[str]:
    """Few rows through linear layers, experts, norms and rotary embeddings."""
    wrong = run_activations() + run_coverage()
    for rows, widths, size in CASES:
        for bias in (False, True):
            inputs = draw(rows, widths, size, torch.float16, "cpu", bias)
            error = error_of(few_rows_linear(*inputs), *inputs)
            if not error < FP16_FACTOR * TOLERANCE[torch.float16]:
                wrong.append(f"{rows} rows, {widths} of {size}, bias {bias}: off by {error:.1e}")
        inputs = draw(rows, (widths[0],) * 2, size, torch.float16, "cpu", False)
        x, weights = inputs[0], [weight * size**-0.5 for weight in inputs[1]]
        for activation in ACTIVATIONS:
            got = few_rows_gated(x, *weights, activation)
            error = error_of_gated(got, x, *weights, activation)
            if not error < FP16_FACTOR * TOLERANCE[torch.float16]:
                wrong.append(
                    f"{rows} rows, {activation}, {widths[0]} of {size}: off by {error:.1e}"
                )
    for case in ROUTED:
        wrong += route_and_compare(*case, torch.float16, "cpu")
    for case in EXPERTS:
        inputs = draw_experts(*case, torch.float16, "cpu")
        error = error_of_experts(few_rows_experts(*inputs), *inputs)
        if not error < FP16_FACTOR * TOLERANCE[torch.float16]:
            wrong.append(f"experts {case}: off by {error:.1e}")
    for error in (error_of_norm, error_of_rotary, error_of_rotary_of_one, error_of_gated_product):
        if not error(torch.float16, "cpu") < FP16_FACTOR * TOLERANCE[torch.float16]:
            wrong.append(f"{error.__name__}: {error(torch.float16, 'cpu'):.1e}")
    with pytest.MonkeyPatch.context() as patch:
        turns = turns_found(build("llama", torch.bfloat16), patch)
    expected = {name: [turn] for name, (_, turn) in FORMS.items()}
    if turns != {**expected, "no": []}:
        wrong.append(f"rotary embeddings are taken for {turns}")
    with pytest.MonkeyPatch.context() as patch:
        launches = {name: launches_of(name, torch.float16, "cpu", patch) for name in LAUNCHES}
    if launches != LAUNCHES:
        wrong.append(f"launches of norms, and of rotations with and without: {launches}")
    return wrong


@torch.no_grad()
def run_traced() -> list[str]:
    """Linear layers as compiled layers see them: traced once for few rows, once for many."""
    wrong = []
    model = build("llama", torch.float16)
    linears = DecodeLinears(list(model.modules()), join=True)
    traced: Any = None
    counters.clear()
    for rows in (3, MOST_ROWS + 1):
        for layer in model.model.layers:
            x = torch.randn(rows, 1, model.config.hidden_size, dtype=torch.float16)
            want = layer.mlp(x)
            traced = traced or torch.compile(
                type(layer.mlp).forward, fullgraph=True, backend="eager"
            )
            with linears.switched():
                error = float((traced(layer.mlp, x) - want).abs().max() / want.abs().max())
            if not error < 1e-2:
                wrong.append(f"{rows} rows: off by {error:.1e}")
    if counters["stats"]["unique_graphs"] != 2:
        wrong.append(f"traced {counters['stats']['unique_graphs']} times")
    return wrong


def main(num_trees: int) -> None:
    quicken()
    torch.set_num_threads(1)
    seen: dict[str, set[Any]] = {}
    failures: list[str] = []
    jobs: list[tuple[str, Any]] = [
        (f"tree {seed} ({SHAPES[seed % len(SHAPES)]})", lambda seed=seed: run_tree(seed, seen))
        for seed in range(num_trees)
    ]
    jobs += [
        ("growth", run_growth),
        ("braids", run_braids),
        ("long heads", run_long_heads),
        ("far scores", run_far_scores),
        ("blanks", run_blanks),
        ("dispatch", run_dispatch),
    ]
    jobs += [("forward", run_forward), ("traced", run_traced)]
    for name, job in jobs:
        try:
            failures += [f"{name}: {text}" for text in job()]
        except Exception:
            failures.append(f"{name}: {traceback.format_exc(limit=-3)}")
    features = {name: sorted(map(str, values)) for name, values in seen.items()}
    print(json.dumps({"failures": failures, "seen": features}))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 56)
