"""The fused kernel: in Triton's interpreter on a CPU, and on a GPU as it is."""

from __future__ import annotations

import copy
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from kernel_calls import (
    Call,
    Family,
    append,
    call_over,
    draw_tree,
    grow,
    make_call,
    outputs,
)
from trees import SHAPES, Grown, ShadowTree

from hf_tree_cache.attention import dispatch
from hf_tree_cache.attention.dispatch import run_tree_attention
from hf_tree_cache.attention.outline import FIXED_CHUNK, GROWTH_TOKENS
from hf_tree_cache.attention.plan import Window, build_plan
from hf_tree_cache.attention.reference import tree_attention_reference
from hf_tree_cache.attention.schedule import LARGE, MERGE, schedule
from hf_tree_cache.attention.tiles import Tiles, TileSet
from hf_tree_cache.errors import InvalidArgument
from hf_tree_cache.memory.storage import KVSpec, KVStorage, SlabIndex

launch = pytest.importorskip("hf_tree_cache.attention.launch")

TESTS = Path(__file__).parent
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
INTERPRETED_TREES, MORE_TREES = 56, 192
STRESS_LAUNCHES = 10_000


# In the interpreter.


def run_script(name: str, *arguments: str, timeout: float, **environment: str) -> dict[str, Any]:
    """What a script under tests/ prints last, as JSON. A hang ends the script, and fails."""
    try:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", str(TESTS / name), *arguments],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=timeout,
        )
    except subprocess.TimeoutExpired as error:
        pytest.fail(f"{name} hangs: not ready after {timeout} s. {error.stdout or ''!r:.2000}")
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    "num_trees", [INTERPRETED_TREES, pytest.param(MORE_TREES, marks=pytest.mark.slow)]
)
def test_the_interpreted_kernel_agrees_with_the_reference_on_random_trees(num_trees: int) -> None:
    found = run_script("interpreted.py", str(num_trees), timeout=380, TRITON_INTERPRET="1")
    assert not found["failures"], "\n".join(found["failures"])
    seen = found["seen"]
    assert seen.pop("dtype") == ["torch.float16", "torch.float32"]
    assert seen.pop("head dims") == ["(16, 16)", "(24, 24)", "(32, 16)", "(64, 64)"]
    assert seen.pop("group") == ["1", "16", "2", "4", "7"]
    assert seen.pop("block size") == ["16", "32", "4", "64"]
    assert seen.pop("T") == ["1", "17", "2", "5"]
    assert seen.pop("window") == ["False", "chunked", "sliding"]
    assert all(values == ["False", "True"] for values in seen.values()), seen


# On a CPU, without running the kernel.

SMALL_ITEMS = Tiles(min_chunk=16, item_cost=0, waves=16, kv_small=16, kv_large=16)
MANY_PARTS = TileSet(SMALL_ITEMS, replace(SMALL_ITEMS, stages_small=2))


class Recorder:
    """Stands in for the kernel and notes what it is launched with."""

    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def note(*arguments: Any, **constants: Any) -> None:
            self.launches.append((grid, arguments, tuple(sorted(constants.items()))))

        return note


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(launch, "tree_attention_kernel", recorder)
    return recorder


@pytest.mark.parametrize(
    "family",
    [
        Family(BF16, (64, 64), 7, 16, tiles=MANY_PARTS),
        Family(BF16, (64, 64), 16, 16, window=Window("sliding", 300), tiles=MANY_PARTS),
        Family(FP32, (32, 32), 1, 16, deterministic=True),
    ],
    ids=str,
)
def test_a_fixed_workspace_launches_the_same_kernel_at_the_same_addresses(
    family: Family, recorder: Recorder
) -> None:
    workspace = family.workspace("cpu")
    q = torch.zeros(64, family.group * 2, 1, family.head_dims[0], dtype=family.dtype)
    out, lse = outputs(q, family.head_dims[1])
    storage = KVStorage(family.spec("cpu"), 1, 16, 1024)
    storage.add_layer()
    launches: dict[int, set[Any]] = {}
    shapes = set()
    for seed in range(40):
        scale = [2, 12, 40, 900][seed // 8 % 4]
        call = make_call(replace(family, num_new=(1,)), seed, "cpu", scale=scale)
        call.plan.tree.topology_version = 1000 + seed
        plan = replace(call.plan, topology_version=1000 + seed)
        storage.ensure(plan.tree.allocator.num_blocks)
        workspace.prepare(plan, storage)
        workspace.launch(q, storage, 0, out, lse, scale=0.5)
        grid, arguments, constants = recorder.launches[-1]
        addresses = [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in arguments]
        known = launches.setdefault(workspace.generation, set())
        known.add((grid, *addresses, constants))
        work = workspace.work
        assert work is not None
        shapes.add((work.num_large > 0, int(np.diff(work.part_ptr).max()) > 4))
    assert len(shapes) > 1
    assert len(launches) < 20
    assert {len(known) for known in launches.values()} == {1}


@pytest.mark.parametrize(
    ("arch", "version", "fixed"),
    [("sm_100", (3, 7), False), ("sm_100", (3, 8), True), ("sm_90", (3, 6), True)],
)
def test_a_running_maximum_is_kept_where_triton_needs_it(
    arch: str, version: tuple[int, int], fixed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "_arch", lambda device: arch)
    monkeypatch.setattr(launch, "_triton_version", lambda: version)
    assert Family(BF16, (128, 128), 4, 16).workspace("cpu")._is_fixed is fixed


def test_layers_of_one_kind_share_buffers_and_a_copied_plan_has_none(recorder: Recorder) -> None:
    family = Family(FP32, (32, 32), 4, 16, fixed=False)
    call = make_call(family, 1, "cpu")
    for layer in (0, 1):
        launch.tree_attention_triton(call.q, call.storage, layer, call.plan, scale=0.5)
    window = Window("sliding", 8)
    launch.tree_attention_triton(call.q, call.storage, 0, call.plan, scale=0.5, window=window)
    assert len(call.plan.buffers) == 2
    assert append(call, [1] * call.plan.num_rows).plan.buffers is call.plan.buffers
    # Blocks of a copied storage lie at other distances.
    assert not copy.deepcopy((call.plan, call.storage))[0].buffers
    first, second = (arguments for _, arguments, _ in recorder.launches[:2])
    moved = [a is not b for a, b in zip(first[6:17], second[6:17], strict=True)]
    assert not any(moved)


def _stub(
    dtype: torch.dtype, head_dims: tuple[int, int], group: int, block_size: int, device: str
) -> tuple[Any, Any]:
    spec = KVSpec(2, *head_dims, dtype, torch.device(device))
    q = SimpleNamespace(is_cuda=device == "cuda", device=device, shape=(1, 2 * group, 1, 64))
    return q, SimpleNamespace(spec=spec, block_size=block_size)


@pytest.mark.parametrize(
    ("call", "scale", "obstacle"),
    [
        ((BF16, (64, 64), 4, 16, "cuda"), 0.1, None),
        ((BF16, (512, 512), 16, 64, "cuda"), 0.1, None),
        ((BF16, (192, 128), 1, 1, "cuda"), 0.1, None),
        ((BF16, (64, 64), 4, 16, "cpu"), 0.1, "device without Triton: cpu"),
        ((torch.float64, (64, 64), 4, 16, "cuda"), 0.1, "float64"),
        ((BF16, (64, 64), 4, 3, "cuda"), 0.1, "block size 3"),
        ((BF16, (64, 64), 4, 128, "cuda"), 0.1, "block size 128"),
        ((BF16, (576, 64), 4, 16, "cuda"), 0.1, "576"),
        ((BF16, (64, 576), 4, 16, "cuda"), 0.1, "576"),
        ((FP32, (512, 512), 4, 16, "cuda"), 0.1, "more than 256"),
        ((BF16, (64, 64), 17, 16, "cuda"), 0.1, "17 query heads"),
        ((BF16, (64, 64), 4, 16, "cuda"), -0.1, "scale -0.1"),
    ],
    ids=[
        "nothing",
        "nothing at the largest sizes",
        "nothing at odd sizes",
        "a CPU",
        "float64",
        "blocks of 3",
        "blocks of 128",
        "long keys",
        "long values",
        "long heads in float32",
        "a group of 17",
        "a negative scale",
    ],
)
def test_what_the_kernel_cannot_serve_is_told(
    call: tuple[Any, ...], scale: float, obstacle: str | None
) -> None:
    found = launch.find_obstacle(*_stub(*call), scale)
    assert found is None if obstacle is None else obstacle in found


def test_asking_for_the_kernel_on_a_cpu_is_refused_with_the_device() -> None:
    call = make_call(Family(FP32, (16, 16), 4, 16), 1, "cpu")
    arguments = (call.q, call.storage, call.layer, call.plan)
    with pytest.raises(InvalidArgument, match=r"backend 'triton' needs the fused kernel.*cpu"):
        run_tree_attention(*arguments, backend="triton", scale=0.5)
    out, _ = run_tree_attention(*arguments, backend="auto", scale=0.5)
    assert out.isfinite().all()


@pytest.mark.parametrize("backend", ["auto", "triton", "torch"])
def test_deterministic_attention_on_a_cpu_is_refused(backend: str) -> None:
    call = make_call(Family(FP32, (16, 16), 4, 16, deterministic=True), 1, "cpu")
    with pytest.raises(InvalidArgument, match=r"deterministic=True needs the fused kernel"):
        run_tree_attention(call.q, call.storage, call.layer, call.plan, backend=backend, scale=0.5)


# On a GPU.

FAMILIES = [
    Family(BF16, (64, 64), 4, 16),
    Family(BF16, (64, 64), 7, 32, (2, 5, 17)),
    Family(BF16, (64, 64), 16, 64, window=Window("sliding", 100)),
    Family(BF16, (80, 80), 1, 16, (2, 5, 17)),
    Family(BF16, (96, 96), 4, 32),
    Family(BF16, (128, 128), 4, 16),
    Family(BF16, (128, 128), 4, 16, (2, 5, 17)),
    Family(BF16, (128, 128), 7, 64),
    Family(BF16, (128, 128), 16, 16, softcap=5.0),
    Family(BF16, (128, 128), 4, 32, window=Window("chunked", 64), sinks=True),
    Family(BF16, (128, 128), 4, 16, deterministic=True),
    Family(BF16, (128, 128), 1, 64, (2, 5, 17), deterministic=True),
    Family(BF16, (192, 128), 16, 64),
    Family(BF16, (192, 128), 1, 16, (2, 5, 17), window=Window("sliding", 33)),
    Family(BF16, (256, 256), 4, 16, window=Window("sliding", 200), softcap=30.0),
    Family(BF16, (256, 256), 1, 32, (2, 5, 17)),
    Family(FP16, (64, 64), 4, 16, sinks=True),
    Family(FP16, (80, 80), 7, 32, window=Window("chunked", 40)),
    Family(FP16, (128, 128), 4, 16, (2, 5, 17), sinks=True, softcap=10.0),
    Family(FP16, (256, 256), 16, 64),
    Family(FP32, (64, 64), 4, 16),
    Family(FP32, (80, 80), 7, 32, (2, 5, 17), window=Window("sliding", 50)),
    Family(FP32, (128, 128), 1, 16, sinks=True),
    Family(FP32, (64, 64), 4, 64, (2, 5, 17), deterministic=True),
    Family(BF16, (128, 128), 4, 16, spread=64),
    Family(BF16, (64, 64), 7, 32, (2, 5, 17), window=Window("sliding", 60), spread=64),
    Family(BF16, (128, 128), 4, 16, deterministic=True, sinks=True, spread=200),
    Family(BF16, (512, 512), 4, 16, (2, 5, 17)),
    Family(FP16, (512, 512), 16, 32, window=Window("sliding", 200), softcap=30.0),
    Family(BF16, (512, 512), 1, 16, deterministic=True),
]
ANY_KERNEL = [
    Family(BF16, (128, 128), 4, 16, fixed=False),
    Family(BF16, (64, 64), 1, 32, (17,), window=Window("sliding", 60), fixed=False),
]
TREES = 14
SCALES = [12, 40, 150, 500]


def family_tree(family: Family, number: int) -> Grown:
    """One of the trees of a family; a few have hundreds of tokens a node."""
    at = (FAMILIES + ANY_KERNEL).index(family)
    seed = at * TREES + number
    scale = SCALES[(at + number // 2) % len(SCALES)]
    # The reference goes from query to query.
    scale = min(scale, 150) if max(family.num_new) > 1 else scale
    return draw_tree(family, seed, scale=scale)


def family_call(family: Family, number: int) -> Call:
    return call_over(family, family_tree(family, number), "cuda")


def test_the_families_cover_what_the_kernel_serves() -> None:
    assert {family.dtype for family in FAMILIES} == {BF16, FP16, FP32}
    assert {family.head_dims for family in FAMILIES} == {
        *((dim, dim) for dim in (64, 80, 96, 128, 256, 512)),
        (192, 128),
    }
    assert {family.group for family in FAMILIES} == {1, 4, 7, 16}
    assert {family.block_size for family in FAMILIES} == {16, 32, 64}
    assert len(set(FAMILIES)) * TREES >= 300
    seen: dict[str, set[Any]] = {}
    for family in FAMILIES:
        for number in range(TREES):
            grown = family_tree(family, number)
            work = schedule(
                build_plan(
                    grown.shadow.tree,
                    grown.counts,
                    grown.num_new,
                    deterministic=family.deterministic,
                ),
                family.workspace("cpu").tiles,
                group_size=family.group,
                num_kv_heads=family.num_kv_heads,
                num_sms=132,
                window=family.window,
                num_merged=0 if family.fixed else None,
            )
            for feature, value in {
                "T": grown.num_new,
                "large items": work.num_large > 0,
                "merges": work.num_items > work.num_work,
                "merges of more than 8 parts": int(np.diff(work.part_ptr).max()) > 8,
                "blanks": bool((work.tokens[: work.num_work] == 0).any()),
                "items of many tiles": int(work.tokens.max()) > 200,
            }.items():
                seen.setdefault(feature, set()).add(value)
    assert seen.pop("T") == {1, 2, 5, 17}
    assert all(values == {False, True} for values in seen.values()), seen


class Compiler:
    """Stands in for the kernel and only compiles it."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments, **constants: self.kernel.warmup(
            *arguments, grid=grid, **constants
        )


@pytest.fixture(scope="module")
def compiled() -> Iterator[None]:
    """The kernels of all families, compiled side by side."""
    compile_side_by_side(FAMILIES + ANY_KERNEL + DETERMINISTIC, "cuda")
    yield


def compile_side_by_side(families: list[Family], device: str) -> None:
    import triton

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(8) as pool:
        patch.setattr(launch, "tree_attention_kernel", Compiler(launch.tree_attention_kernel))
        with triton.AsyncCompileMode(pool):
            for family in families:
                # One new token is a case of its own for Triton.
                for num_new in {min(family.num_new), max(family.num_new)}:
                    for seed in range(1 if family.fixed else len(SHAPES)):
                        call = make_call(
                            replace(family, num_new=(num_new,)), seed, device, scale=150
                        )
                        call.attend(family.workspace(device))


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES, ids=str)
@pytest.mark.usefixtures("compiled")
def test_random_trees_agree_with_the_reference(family: Family) -> None:
    wrong = []
    for number in range(TREES):
        call = family_call(family, number)
        wrong.append(call.complain(call.attend(family.workspace("cuda"))))
    assert not any(wrong), [f"tree {i}: {text}" for i, text in enumerate(wrong) if text]


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES[5:12:3], ids=str)
@pytest.mark.usefixtures("compiled")
def test_a_tree_agrees_while_it_grows_and_branches(family: Family) -> None:
    rng = random.Random(3)
    call = family_call(family, 1)
    workspace, kept = family.workspace("cuda"), 0
    for step in range(60):
        if step % 15 == 14:
            rows = range(call.plan.num_rows)
            call.grown.shadow.select(rng.choices(rows, k=rng.randint(2, 12)))
        num_new = rng.choice(family.num_new)
        counts = [rng.randint(1, num_new) for _ in call.grown.shadow.rows]
        call = append(call, counts, num_new)
        before = workspace.work
        complaint = call.complain(call.attend(workspace))
        assert complaint is None, f"step {step}: {complaint}"
        kept += workspace.work is before
    assert kept > 40 if family.num_new == (1,) else kept == 0


@pytest.mark.gpu
@pytest.mark.parametrize("group", [4, 8])
def test_many_branches_agree_while_they_grow(group: int) -> None:
    """Large items go on with one branch, the others' leaves take turns, and merges take several
    queries."""
    family = Family(BF16, (128, 128), group, 16, num_kv_heads=8, fixed=True)
    call = call_over(family, grow(ShadowTree(16), [500], " ".join("0" * 300), [30] * 300), "cuda")
    workspace = family.workspace("cuda")
    for step in range(40):
        call = append(call, [1] * 300)
        workspace.prepare(call.plan, call.storage, num_merged=300)
        if step % 8 == 0:
            complaint = call.complain(call.attend(workspace))
            assert complaint is None, f"step {step}: {complaint}"
    work = workspace.work
    assert work is not None and work.merge_rows > 8
    assert (work.grows.astype(bool) & (work.items[:, 0] == LARGE)).any()
    assert 1 << int(work.items[:, 6].max()) == work.lanes


@pytest.mark.gpu
@pytest.mark.parametrize("family", ANY_KERNEL, ids=str)
@pytest.mark.usefixtures("compiled")
def test_kernels_without_what_their_lists_lack_agree_too(family: Family) -> None:
    """Most lists have only small items, or no merges: their kernel has no code for the rest."""
    kinds = set()
    for number in range(TREES):
        call = family_call(family, number)
        options = {**call.options, "window": family.window}
        out, lse = launch.tree_attention_triton(
            call.q, call.storage, call.layer, call.plan, **options
        )
        complaint = call.complain((out.transpose(1, 2), lse.transpose(1, 2)))
        assert complaint is None, f"tree {number}: {complaint}"
        (workspace,) = call.plan.buffers.values()
        kinds.add((workspace.work.num_large > 0, workspace.work.num_slots > 0))
    assert len(kinds) > 1


@pytest.mark.gpu
@pytest.mark.usefixtures("compiled")
def test_merges_that_start_before_all_work_agree() -> None:
    family = FAMILIES[5]
    merges = 0
    for number in range(TREES):
        call = family_call(family, number)
        workspace = family.workspace("cuda")
        want = call.reference()
        for reverse in (True, False, True):
            complaint = call.complain(call.attend(workspace, reverse=reverse), want)
            assert complaint is None, f"tree {number}, reverse={reverse}: {complaint}"
        assert not workspace._sync.any() and not workspace._arrived.any()
        assert workspace.work is not None
        merges += int((workspace.work.items[:, 0] == MERGE).sum())
    assert merges > 0


@pytest.mark.gpu
@pytest.mark.usefixtures("compiled")
def test_queries_may_have_any_strides() -> None:
    family = ANY_KERNEL[0]
    call = family_call(family, 1)
    want = call.reference()
    wide = torch.full((*call.q.shape[:3], 2 * call.q.shape[3]), torch.nan, device="cuda")
    half = wide.to(call.q.dtype)[..., ::2]
    for q in (call.q.contiguous(), half.copy_(call.q)):
        options = {**call.options, "window": family.window}
        out, lse = launch.tree_attention_triton(q, call.storage, call.layer, call.plan, **options)
        assert call.complain((out.transpose(1, 2), lse.transpose(1, 2)), want) is None


# One launch a layer.


def device_events(function: Any) -> list[str]:
    """Names of all that ``function`` has the GPU do."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        function()
        torch.cuda.synchronize()
    return [
        event.name
        for event in recorded.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]


@pytest.mark.gpu
# The profiler warns about the machine that it finds.
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.usefixtures("compiled")
def test_each_layer_is_one_launch_and_a_plan_is_brought_up_to_date_once() -> None:
    call = family_call(ANY_KERNEL[0], 1)

    def attend(now: Call, layer: int = 1) -> None:
        run_tree_attention(now.q, now.storage, layer, now.plan, backend="auto", **now.options)

    attend(call)
    call = append(call, [1] * call.plan.num_rows)
    attend(call)
    call = append(call, [1] * call.plan.num_rows)
    device_events(lambda: None)  # the profiler's own first use
    first = device_events(lambda: attend(call))

    def attend_often() -> None:
        for layer in (0, 1, 0, 1):
            attend(call, layer)

    others = device_events(attend_often)
    assert others == ["tree_attention_kernel"] * 4, others
    assert first.count("tree_attention_kernel") == 1
    # Lengths count on by themselves: nothing is sent but where a block is full.
    uploads = [name for name in first if "HtoD" in name]
    assert len(uploads) <= 3, first
    assert len(first) <= 1 + len(uploads) + 3, first


# Captured in a CUDA graph.


def capture(run: Any) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        run()
    return graph


def addresses(workspace: Any) -> list[int]:
    ints = workspace._ints
    tensors = [ints[name] for name in ints._spans]
    tensors += [workspace._parts, workspace._part_lse, workspace._arrived, workspace._sync]
    return [tensor.data_ptr() for tensor in tensors]


@pytest.mark.gpu
@pytest.mark.parametrize("family", [FAMILIES[5], FAMILIES[9]], ids=str)
@pytest.mark.usefixtures("compiled")
def test_one_captured_launch_serves_200_tokens_of_a_tree_that_branches(family: Family) -> None:
    rng = random.Random(0)
    # The widest first: 32 rows, which share what a window shows, then hundreds of tokens apart.
    grown = grow(ShadowTree(family.block_size), [740], " ".join("0" * 32), [20] * 32, [1] * 32)
    call = call_over(family, grown, "cuda")
    workspace = family.workspace("cuda")
    workspace.prepare(call.plan, call.storage)
    call = append(append(call, [380] * 32, 380), [1] * 32)
    workspace.prepare(call.plan, call.storage)
    q, (out, lse) = call.q, outputs(call.q, family.head_dims[1])

    def run() -> None:
        workspace.launch(q, call.storage, call.layer, out, lse, **call.options)

    run()
    graph = capture(run)
    before, generation = addresses(workspace), workspace.generation
    cuts, merges, last = 0, set(), None
    for step in range(200):
        num_rows = len(call.grown.shadow.rows)
        if step % 11 == 0:
            # Prunes some, forks others.
            kept = rng.sample(range(num_rows), min(num_rows, rng.randint(1, 6)))
            call.grown.shadow.select(rng.choices(kept, k=rng.randint(1, 12)))
        call = append(call, [1] * len(call.grown.shadow.rows))
        num_rows = call.plan.num_rows
        q[:num_rows] = call.q
        out.fill_(torch.nan)
        lse.fill_(torch.nan)
        workspace.prepare(call.plan, call.storage)
        graph.replay()
        complaint = call.complain((out[:num_rows], lse[:num_rows]))
        assert complaint is None, f"step {step}: {complaint}"
        assert out[num_rows:].isnan().all() and lse[num_rows:].isnan().all()
        cuts, last = cuts + (workspace.work is not last), workspace.work
        assert last is not None
        merges.add(last.num_items > last.num_work)
    assert workspace.generation == generation and addresses(workspace) == before
    assert cuts > 10 and (True in merges or family.window is not None)
    assert len(call.storage._k_slabs) > 1


# A branch alone and among siblings.


def lonely_twin(call: Call, row: int) -> tuple[ShadowTree, KVStorage]:
    """A tree and a storage that hold one row of ``call``, and nothing else."""
    shadow, storage = call.grown.shadow, call.storage
    twin = ShadowTree(call.family.block_size)
    twin.add_rows(1)
    copied = KVStorage(storage.spec, 2, storage.block_size, 16, poison=True)
    copied.add_layer(), copied.add_layer()
    length, count = call.plan.lengths[row], call.plan.counts[row]
    for more in (length - count, count):
        follow(call, row, twin, copied, more)
    assert shadow.tree.length(shadow.rows[row]) == twin.tree.length(twin.rows[0])
    return twin, copied


def follow(call: Call, row: int, twin: ShadowTree, copied: KVStorage, count: int) -> None:
    """Append to a twin the next tokens of the row that it copies."""
    shadow, storage = call.grown.shadow, call.storage
    begin = twin.tree.length(twin.rows[0])
    theirs = shadow.slots(shadow.rows[row])[begin : begin + count]
    (mine,) = twin.append([count]).slots
    copied.ensure(twin.tree.allocator.num_blocks)
    if not count:
        return
    device = storage.spec.device
    source = SlabIndex.of(theirs, storage.slab_blocks * storage.block_size, device)
    target = SlabIndex.of(mine, copied.slab_blocks * copied.block_size, device)
    k, v = storage.gather_slots(call.layer, source)
    copied.write(call.layer, target, None, k.transpose(0, 1)[None], v.transpose(0, 1)[None])


DETERMINISTIC = [
    Family(BF16, (128, 128), 4, 16, deterministic=True, fixed=False),
    Family(BF16, (64, 64), 1, 32, (1, 17), deterministic=True, fixed=False),
    Family(BF16, (64, 64), 4, 16, window=Window("sliding", 600), deterministic=True, fixed=False),
    Family(FP32, (64, 64), 4, 16, deterministic=True, fixed=False),
]


@pytest.mark.gpu
@pytest.mark.parametrize("family", DETERMINISTIC, ids=str)
@pytest.mark.usefixtures("compiled")
def test_a_deterministic_branch_is_the_same_bit_for_bit_alone_and_among_siblings(
    family: Family,
) -> None:
    compared = 0
    for seed in range(24):
        scale = [12, 150, 700][seed // 8]
        call = make_call(family, seed, "cuda", scale=scale)
        out, lse = call.attend(family.workspace("cuda"))
        assert call.complain((out, lse)) is None
        for row in range(0, call.plan.num_rows, 3):
            count, num_new = call.plan.counts[row], call.grown.num_new
            if not count:
                continue
            twin, storage = lonely_twin(call, row)
            plan = build_plan(twin.tree, [count], num_new, deterministic=True)
            lonely = replace(call, plan=plan, storage=storage, q=call.q[row : row + 1])
            alone_out, alone_lse = lonely.attend(family.workspace("cuda"))
            assert torch.equal(alone_out[0], out[row]), f"tree {seed}, row {row}"
            assert torch.equal(alone_lse[0], lse[row]), f"tree {seed}, row {row}"
            compared += 1
    assert compared > 24


@pytest.mark.gpu
@pytest.mark.parametrize("family", DETERMINISTIC[::2] + DETERMINISTIC[-1:], ids=str)
@pytest.mark.usefixtures("compiled")
def test_a_deterministic_branch_grows_the_same_whatever_its_siblings_do(family: Family) -> None:
    rng = random.Random(1)
    # Near the end of a fixed chunk, that of another row far behind.
    grown = grow(ShadowTree(16), [FIXED_CHUNK - 60], "0 0 0", [20, 3, 4 * FIXED_CHUNK], [1, 1, 1])
    call = call_over(family, grown, "cuda")
    twin, storage = lonely_twin(call, 0)
    plan = build_plan(twin.tree, [1], 1, deterministic=True)
    workspace, lonely_workspace = (family.workspace("cuda") for _ in range(2))
    for step in range(GROWTH_TOKENS + 60):
        if step:
            others = range(1, len(call.grown.shadow.rows))
            if step % 23 == 0:
                # A sibling forks or ends; the row itself goes on.
                call.grown.shadow.select([0, *rng.choices(others, k=rng.randint(1, 5))])
            call = append(call, [1] * len(call.grown.shadow.rows))
            follow(call, 0, twin, storage, 1)
            plan = build_plan(twin.tree, [1], 1, plan, deterministic=True)
        out, lse = call.attend(workspace)
        if step % 20 == 0:
            assert call.complain((out, lse)) is None
        lonely = replace(call, plan=plan, storage=storage, q=call.q[:1])
        alone_out, alone_lse = lonely.attend(lonely_workspace)
        assert torch.equal(alone_out[0], out[0]), f"step {step}"
        assert torch.equal(alone_lse[0], lse[0]), f"step {step}"


# Stress.


@pytest.mark.gpu
@pytest.mark.timeout(300)
def test_ten_thousand_launches_give_the_same_bits_and_none_hangs() -> None:
    found = run_script("stress.py", str(STRESS_LAUNCHES), timeout=240)
    assert not found["failures"], "\n".join(found["failures"])
    assert found["launches"] == STRESS_LAUNCHES
    assert found["merges"] > STRESS_LAUNCHES // 3
    assert found["reversed"] > 500 and found["dirty"] > 50


# Dispatch.


def watch(patch: pytest.MonkeyPatch, module: Any, name: str) -> list[tuple[Any, ...]]:
    """The arguments of all calls of a function, which works as before."""
    calls: list[tuple[Any, ...]] = []
    run = getattr(module, name)

    def noted(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        return run(*arguments, **options)

    patch.setattr(module, name, noted)
    return calls


@pytest.mark.gpu
def test_auto_takes_the_kernel_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = watch(monkeypatch, launch, "tree_attention_triton")
    call = family_call(ANY_KERNEL[0], 1)
    arguments = (call.q, call.storage, call.layer, call.plan)
    for number, backend in enumerate(["auto", "triton"]):
        out, lse = run_tree_attention(*arguments, backend=backend, **call.options)
        assert call.complain((out.transpose(1, 2), lse.transpose(1, 2))) is None
        assert len(taken) == number + 1
    run_tree_attention(*arguments, backend="torch", **call.options)
    assert len(taken) == 2


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "head_dim", "group", "block_size", "reason"),
    [
        (torch.float64, 64, 4, 16, "float64"),
        (BF16, 64, 4, 3, "block size 3"),
        (BF16, 64, 17, 16, "17 query heads"),
        (BF16, 576, 4, 16, "576"),
    ],
    ids=["float64", "blocks of 3", "a group of 17", "long heads"],
)
def test_auto_falls_back_to_torch_and_triton_by_name_says_why_not(
    dtype: torch.dtype,
    head_dim: int,
    group: int,
    block_size: int,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken = watch(monkeypatch, dispatch, "tree_attention_torch")
    family = Family(dtype, (head_dim, head_dim), group, block_size, (1, 5))
    for seed in range(8):
        call = make_call(family, seed, "cuda")
        arguments = (call.q, call.storage, call.layer, call.plan)
        with pytest.raises(InvalidArgument, match=reason):
            run_tree_attention(*arguments, backend="triton", **call.options)
        out, lse = run_tree_attention(*arguments, backend="auto", **call.options)
        assert len(taken) == seed + 1
        want_out, want_lse = tree_attention_reference(*arguments, **call.options)
        torch.testing.assert_close(out, want_out, rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(lse, want_lse, rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dims", [(256, 256), (192, 128), (512, 512)], ids=str)
def test_auto_serves_long_heads_in_float32_one_way_or_the_other(
    head_dims: tuple[int, int],
) -> None:
    family = Family(FP32, head_dims, 4, 16, (1, 5))
    for seed in range(4):
        call = make_call(family, seed, "cuda")
        out, lse = run_tree_attention(
            call.q, call.storage, call.layer, call.plan, backend="auto", **call.options
        )
        assert call.complain((out.transpose(1, 2), lse.transpose(1, 2))) is None


@pytest.mark.gpu
def test_a_deterministic_plan_without_the_kernel_is_refused() -> None:
    family = Family(torch.float64, (64, 64), 4, 16, deterministic=True)
    call = make_call(family, 1, "cuda")
    with pytest.raises(InvalidArgument, match=r"deterministic=True .*float64"):
        run_tree_attention(
            call.q, call.storage, call.layer, call.plan, backend="auto", **call.options
        )


@pytest.mark.gpu
@pytest.mark.usefixtures("compiled")
def test_a_new_plan_heals_what_an_aborted_launch_left_behind() -> None:
    family = FAMILIES[5]
    workspace = family.workspace("cuda")
    call = family_call(family, 1)
    assert call.complain(call.attend(workspace)) is None
    for garbage in (1, -1, 12345):
        workspace._sync.fill_(garbage)
        workspace._arrived.fill_(garbage)
        call = append(call, [1] * call.plan.num_rows)
        assert call.complain(call.attend(workspace)) is None


@pytest.mark.gpu
@pytest.mark.usefixtures("compiled")
def test_queries_of_rows_without_tokens_may_be_anything() -> None:
    family = FAMILIES[6]
    found = 0
    for number in range(TREES):
        call = family_call(family, number)
        want = call.reference()
        for row, count in enumerate(call.plan.counts):
            call.q[row, :, : call.grown.num_new - count] = torch.nan
            found += count < call.grown.num_new
        assert call.complain(call.attend(family.workspace("cuda")), want) is None
    assert found
