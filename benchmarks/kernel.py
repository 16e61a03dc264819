"""The fused kernel on trees: one decode step, its ceilings, and other kernels beside it.

Needs one CUDA GPU; peers that are not installed are left out. Ceilings first, then a line for each
case, which must agree with float64 or the exit status is 1. Results are written after each case.
Last line: one JSON object.

    python benchmarks/kernel.py [--only W1_64,W2] [--no-peers] [--skip-done] [--out FILE]
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import ceilings
import workloads
from cases import AIM_US, BLOCK_SIZE, MAIN_CASES, MUST_US, OTHER_CASES, Case, Data, Step, Visible
from peers import PEERS, Peer, Problem, Unavailable

from hf_tree_cache.attention.launch import Workspace
from hf_tree_cache.attention.plan import build_plan
from hf_tree_cache.attention.schedule import schedule
from hf_tree_cache.env import environment, version_of
from hf_tree_cache.memory.storage import KVStorage

RESULTS = Path(__file__).resolve().parent / "results"
MAX_ERROR, MAX_PEER_ERROR = 3e-3, 1e-2
MAX_LSE_ERROR = 2.0**-8
"""Large items sum weights as bfloat16 rounds them: so far off where few tokens have all weight."""

PLANNINGS = 20
COMPILE_SECONDS = 240
FLEX_CASES = ("W1_64, 32/8 heads", "W3, 32/8 heads")
"""It is compiled for every tree, which takes long, and is the slowest by far."""


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip()[:300]}"


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


def quantiles(times: Sequence[float]) -> dict[str, float]:
    ordered = sorted(times)
    at = {"median": 0.5, "p20": 0.2, "p80": 0.8}
    return {name: round(ordered[int(q * (len(ordered) - 1))], 2) for name, q in at.items()}


def measure_limits(cases: list[Case]) -> dict[str, float]:
    limits = {
        "read_tb_per_s": ceilings.linear_read(),
        "copy_tb_per_s": ceilings.copy(),
        "matmul_tflops": ceilings.matmul(),
    }
    if any(case.dtype == "float32" for case in cases):
        limits["matmul_float32_tflops"] = ceilings.matmul(torch.float32)
    return {name: round(limit, 2) for name, limit in limits.items()}


def describe(step: Step, limits: dict[str, float]) -> dict[str, Any]:
    """What is asked for, and the least time that it can take."""
    case = step.case
    visible = Visible.of(step.tree, case.num_new, case.look_back)
    slot_bytes = case.spec.block_bytes(1)
    flop = 4 * case.num_q_heads * case.head_dim * visible.pairs
    rate = limits["matmul_float32_tflops" if case.dtype == "float32" else "matmul_tflops"]
    reading = visible.unique * slot_bytes / limits["read_tb_per_s"] / 1e6
    return {
        "name": case.name,
        **{name: getattr(case, name) for name in Case.__dataclass_fields__},
        "is_main": case.is_main,
        "branches": step.num_rows,
        "block_size": BLOCK_SIZE,
        "num_layers": step.data.num_layers,
        "unique_bytes": visible.unique * slot_bytes,
        "logical_bytes": visible.logical * slot_bytes,
        "flop": flop,
        "floor_us": round(max(reading, flop / rate / 1e6), 2),
        "must_us": MUST_US[case.num_q_heads][case.workload] if case.is_main else None,
        "aim_us": AIM_US[case.workload] if case.is_main else None,
    }


def measure_gather(step: Step) -> float:
    case, data = step.case, step.data
    blocks = Visible.of(step.tree, case.num_new, case.look_back).blocks
    gather = ceilings.make_gather(data.blocks(0), data.blocks(1), blocks)
    return round(statistics.median(ceilings.time_layers(gather, data.num_layers)), 2)


def measure_kernel(step: Step) -> dict[str, Any]:
    """Our kernel, timed in a graph whose launches overlap, its results checked afterwards."""
    case, data = step.case, step.data
    workspace = Workspace(case.key, overlap=True)
    workspace.prepare(step.plan, data.storage)
    shape = (step.num_rows, case.num_new, case.num_q_heads)
    out = [q.new_full((*shape, case.head_dim), math.nan) for q in step.q]
    lse = [torch.full(shape, math.nan, device=q.device) for q in step.q]

    def run(layer: int) -> Any:
        return workspace.launch(
            step.q[layer], data.storage, layer, out[layer], lse[layer], scale=case.scale
        )

    compiled = run(0)
    times = ceilings.time_layers(run, data.num_layers)
    error = max(relative_error(out[layer], want) for layer, (want, _) in step.checked.items())
    lse_error = max(
        float((lse[layer].double() - want).abs().max()) for layer, (_, want) in step.checked.items()
    )
    finite = all(bool(x.isfinite().all()) for x in (*out, *lse))
    # Written so that a NaN fails, too.
    is_right = finite and error <= MAX_ERROR and lse_error <= MAX_LSE_ERROR
    work, tiles = workspace.work, workspace.tiles
    assert work is not None
    parts = (workspace._parts, workspace._part_lse)
    return {
        "ok": is_right,
        "reason": ""
        if is_right
        else f"error {error:.1e} (at most {MAX_ERROR:.0e}), of the log-sum-exp {lse_error:.1e} "
        f"(at most {MAX_LSE_ERROR:.0e}), all finite: {finite}",
        "us": quantiles(times),
        "error": float(f"{error:.2e}"),
        "lse_error": float(f"{lse_error:.2e}"),
        "items": work.num_items,
        "work_items": work.num_work,
        "large_items": work.num_large,
        "programs": work.num_items * case.num_kv_heads,
        "parts": work.num_slots,
        "part_bytes": work.num_slots * sum(x[0].nbytes for x in parts),
        "tiles": repr(tiles),
        "registers": getattr(compiled, "n_regs", None),
        "spills": getattr(compiled, "n_spills", None),
        "shared_bytes": getattr(getattr(compiled, "metadata", None), "shared", None),
    }


def measure_planning(case: Case) -> dict[str, Any]:
    """Host microseconds: plan and schedule alone; all of a new plan after a fork; of one token."""
    tree = case.build()
    rows = list(tree.rows)
    spec, num_rows = case.spec, len(rows)
    room = tree.allocator.num_blocks + 8 * (num_rows + 1) + 64
    storage = KVStorage(spec, 1, BLOCK_SIZE, room)
    storage.add_layer()
    storage.ensure(room)
    workspace = Workspace(case.key)
    plan = build_plan(tree, [1] * num_rows, 1, deterministic=case.deterministic)
    workspace.prepare(plan, storage)
    sms = 1
    if torch.cuda.is_available():
        sms = torch.cuda.get_device_properties(spec.device).multi_processor_count

    def cut() -> None:
        schedule(
            build_plan(tree, [1] * num_rows, 1, deterministic=case.deterministic),
            workspace.tiles,
            group_size=case.group_size,
            num_kv_heads=spec.num_kv_heads,
            num_sms=sms,
            window=case.look_back,
        )

    def prepare() -> None:
        nonlocal plan
        counts = [1] * len(tree.rows)
        plan = build_plan(tree, counts, 1, plan, deterministic=case.deterministic)
        workspace.prepare(plan, storage)

    def fork() -> None:
        tree.set_rows([*rows, *tree.fork(rows[0])])
        tree.append([1] * len(tree.rows))

    def unfork() -> None:
        tree.prune(tree.rows[-1])

    def nothing() -> None:
        pass

    result = {
        "plan_us": timed(nothing, cut, nothing),
        "fork_us": timed(fork, prepare, unfork),
    }
    tree.set_rows(rows)
    tree.append([1] * num_rows)
    prepare()
    result["token_us"] = timed(lambda: tree.append([1] * num_rows), prepare, nothing)
    return result


def timed(
    before: Callable[[], object], call: Callable[[], object], after: Callable[[], object]
) -> dict[str, float]:
    """Microseconds of ``call``, after two that warm up; ``before`` and ``after`` are not timed."""
    gc.collect()
    times = []
    for _ in range(PLANNINGS + 2):
        before()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        started = time.perf_counter_ns()
        call()
        times.append((time.perf_counter_ns() - started) / 1_000)
        after()
    return quantiles(times[2:])


def measure_peer(peer: Peer, step: Step, problem: Problem) -> dict[str, Any]:
    """A peer's time and way, or the reason why it has none."""
    result: dict[str, Any] = {"version": peer.version}
    try:
        problem = fitting(peer, problem)
        run = peer.prepare(problem)
        times = ceilings.time_layers(run, problem.num_layers)
        error = max(
            relative_error(run(layer), want[:, 0])
            for layer, (want, _) in step.checked.items()
            if layer < problem.num_layers
        )
        if not error <= MAX_PEER_ERROR:
            return result | {"reason": f"wrong: error {error:.1e}, way {run.way!r}"}
        return result | {
            "us": quantiles(times),
            "way": run.way,
            "error": float(f"{error:.2e}"),
            "num_layers": problem.num_layers,
        }
    except Unavailable as error:
        return result | {"reason": str(error)[:400]}
    except Exception as error:
        return result | {"reason": _said(error)}


def fitting(peer: Peer, problem: Problem) -> Problem:
    """As many layers as dense copies have room for, if the peer makes any."""
    if not peer.name.startswith("SDPA"):
        return problem
    tokens = problem.num_rows * max(map(len, problem.tables)) * problem.block_size
    layer = 2 * tokens * problem.num_kv_heads * problem.head_dim * problem.dtype.itemsize
    free, _ = torch.cuda.mem_get_info()
    return problem.first_layers(max(1, min(problem.num_layers, int(0.9 * free / layer) - 3)))


def find_variant(case: Case) -> tuple[object, ...]:
    """What the kernel is compiled for, as far as we know: equal ones are compiled once."""
    step = Step(case, Data.of(case, num_layers=1))
    workspace = Workspace(case.key, overlap=True)
    workspace.prepare(step.plan, step.data.storage)
    work = workspace.work
    assert work is not None
    tiles = workspace.tiles
    shapes = (tiles.m_small, tiles.kv_small, tiles.stages_small, tiles.m_large, tiles.kv_large)
    return (
        case.key,
        (*shapes, tiles.stages_large, tiles.num_warps, tiles.max_registers),
        (work.merge_rows, work.merge_parts),
        (work.num_large < work.num_work, work.num_large > 0, work.num_work < work.num_items),
        (case.num_new == 1, case.num_new % 16),
    )


def compile_kernel(case: Case) -> str:
    """In a process of its own: launch once, so that Triton's cache on the disk has the kernel."""
    started = time.perf_counter()
    try:
        step = Step(case, Data.of(case, num_layers=1))
        workspace = Workspace(case.key, overlap=True)
        workspace.prepare(step.plan, step.data.storage)
        shape = (step.num_rows, case.num_new, case.num_q_heads)
        out = step.q[0].new_empty((*shape, case.head_dim))
        lse = torch.empty(shape, device=out.device)
        workspace.launch(step.q[0], step.data.storage, 0, out, lse, scale=case.scale)
        torch.cuda.synchronize()
    except Exception as error:
        return f"  {case.name}: {_said(error)}"
    return f"  {case.name}: {time.perf_counter() - started:.1f} s"


def compile_gather(case: Case) -> str:
    data = Data.of(case, num_layers=1)
    ceilings.make_gather(data.blocks(0), data.blocks(1), range(64))
    return f"  gather of {data.blocks(0)[0][0].nbytes:,} bytes a block"


def compile_all(cases: list[Case], workers: int) -> None:
    """Compile in ``workers`` processes what the cases need."""
    variants: dict[tuple[object, ...], Case] = {}
    gathers: dict[int, Case] = {}
    for case in cases:
        gathers.setdefault(case.spec.block_bytes(BLOCK_SIZE), case)
        try:
            variants.setdefault(find_variant(case), case)
        except Exception as error:
            print(f"  {case.name}: {_said(error)}")
    release()
    jobs = [(compile_kernel, case) for case in variants.values()]
    jobs += [(compile_gather, case) for case in gathers.values()]
    with multiprocessing.get_context("spawn").Pool(min(workers, len(jobs))) as pool:
        results = [pool.apply_async(job, (case,)) for job, case in jobs]
        deadline = time.perf_counter() + COMPILE_SECONDS
        for result in results:
            try:
                print(result.get(max(1.0, deadline - time.perf_counter())), flush=True)
            except multiprocessing.TimeoutError:
                print("  a compilation is late: it is left to the run itself", flush=True)
            except Exception as error:
                print(f"  {_said(error)}", flush=True)


def release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Results:
    """Rows by name, written to a file after each change."""

    def __init__(self, path: Path, header: dict[str, Any], *, keep: bool) -> None:
        self.path, self.header = path, header
        self.rows: dict[str, dict[str, Any]] = {}
        if keep and path.exists():
            known = json.loads(path.read_text(encoding="utf-8"))["rows"]
            self.rows = {row["name"]: row for row in known}

    def put(self, row: dict[str, Any]) -> None:
        self.rows[row["name"]] = row
        order = {case.name: i for i, case in enumerate([*MAIN_CASES, *OTHER_CASES])}
        rows = sorted(self.rows.values(), key=lambda row: order.get(row["name"], len(order)))
        text = json.dumps({**self.header, "rows": rows}, indent=1) + "\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(".tmp")
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, self.path)


HEADINGS = (
    f"{'µs a layer':<36} {'floor':>6} {'gather':>6} {'must':>5} {'aim':>4} {'median':>7} "
    f"{'p20':>7} {'p80':>7} {'×floor':>6} {'×gath.':>6} {'error':>7} {'items':>5} {'parts':>8} "
    f"{'plan':>6} {'fork':>6} {'token':>6}"
)


def line_of(row: dict[str, Any]) -> str:
    name = f"{row['name']:<36}"
    if "us" not in row:
        return f"{name} FAILED: {row['reason']}"
    us = row["us"]
    host = "".join(
        f" {row[key]['median']:>6.0f}" for key in ("plan_us", "fork_us", "token_us") if key in row
    )
    return (
        f"{name} {row['floor_us']:>6.1f} {row['gather_us']:>6.1f} {row['must_us'] or '':>5} "
        f"{row['aim_us'] or '':>4} {us['median']:>7.2f} {us['p20']:>7.2f} {us['p80']:>7.2f} "
        f"{row['over_floor']:>6.2f} {row['over_gather']:>6.2f} {row['error']:>7.0e} "
        f"{row['items']:>5} {row['part_bytes'] / 1e6:>5.1f} MB{host}"
        f"{verdict(row)}"
    )


def verdict(row: dict[str, Any]) -> str:
    if not row["ok"]:
        return f"  FAILED: {row['reason']}"
    if row["must_us"] is None:
        return ""
    met = [name for name in ("aim", "must") if row["us"]["median"] <= row[f"{name}_us"]]
    return f"  {met[0] if met else 'MISSED'}"


def run_ours(cases: list[Case], limits: dict[str, float], results: Results) -> None:
    """Every case with our kernel; K and V are kept for the next case where it has the same."""
    made: tuple[Any, Data] | None = None
    gathers: dict[Any, float] = {}
    for case in cases:
        key = (case.workload, case.spec, case.allocated, case.shift)
        try:
            if made is None or made[0] != key:
                made = None
                release()
                made = (key, Data.of(case))
            step = Step(case, made[1])
            row = describe(step, limits)
        except Exception as error:
            made = None
            row = {"name": case.name, "workload": case.workload}
            row |= {"ok": False, "reason": _said(error)}
            print(line_of(row), flush=True)
            results.put(row)
            continue
        try:
            seen = (*key, case.window)
            if seen not in gathers:
                gathers[seen] = measure_gather(step)
            row["gather_us"] = gathers[seen]
            row |= measure_kernel(step)
            row["over_floor"] = round(row["us"]["median"] / row["floor_us"], 2)
            row["over_gather"] = round(row["us"]["median"] / row["gather_us"], 2)
            if case.is_main:
                row |= measure_planning(case)
        except Exception as error:
            row |= {"ok": False, "reason": _said(error)}
            row.pop("us", None)
        print(line_of(row), flush=True)
        peers = results.rows.get(case.name, {}).get("peers", {})
        commit = results.header["environment"]["commit"]
        results.put(row | {"peers": peers, "commit": commit})


def run_peers(cases: list[Case], results: Results, *, slow: bool) -> None:
    """Peers on the main cases, one at a time: those that are slow to compile, or all others."""
    for case in cases:
        if not case.is_main:
            continue
        row = results.rows.get(case.name) or {}
        done = row.get("peers", {})
        wanted = [peer for peer in PEERS if "us" not in done.get(peer.name, {})]
        wanted = [peer for peer in wanted if peer.name.startswith("flex") == slow]
        if slow and case.name not in FLEX_CASES:
            continue
        if not wanted or "is_main" not in row:
            continue
        try:
            step = Step(case, Data.of(case))
            problem = step.problem()
            problem.check()
        except Exception as error:
            print(f"{case.name}: no peers, {_said(error)}", flush=True)
            continue
        for peer in wanted:
            started = time.perf_counter()
            done[peer.name] = measured = measure_peer(peer, step, problem)
            said = measured.get("reason", "")
            if "us" in measured:
                said = f"{measured['us']['median']:>8.1f}  {measured['way']}"
            took = time.perf_counter() - started
            print(f"{case.name:<18} {peer.name:<32} {took:>5.1f} s  {said}", flush=True)
            results.put(row | {"peers": done})
            if peer.name.startswith("flex"):
                # Compiled code keeps copies of K and V alive.
                torch.compiler.reset()
            release()
        del step, problem
        release()


def summary(results: Results, cases: list[Case]) -> dict[str, Any]:
    """The key figures of a run."""
    rows = [results.rows[case.name] for case in cases if case.name in results.rows]
    measured = [row for row in rows if row["ok"]]
    best = {}
    for row in measured:
        times = {name: peer["us"]["median"] for name, peer in row["peers"].items() if "us" in peer}
        if times:
            name = min(times, key=times.__getitem__)
            best[row["name"]] = [times[name], name]
    return {
        "benchmark": "kernel",
        **results.header,
        "us": {row["name"]: row["us"]["median"] for row in measured},
        "gather_us": {row["name"]: row["gather_us"] for row in measured},
        "best_peer": best,
        "missed": [
            row["name"]
            for row in measured
            if row["must_us"] and row["us"]["median"] > row["must_us"]
        ],
        "failed": [row["name"] for row in rows if not row["ok"]],
    }


def chosen_cases(only: str | None) -> list[Case]:
    """All cases, or those of the workloads in ``only``.

    Raises:
        ValueError: a name that is no workload.
    """
    cases = [*MAIN_CASES, *OTHER_CASES]
    if only is None:
        return cases
    names = [name for name in only.split(",") if name]
    unknown = [name for name in names if name not in workloads.WORKLOADS]
    if unknown or not names:
        raise ValueError(
            f"{only!r} names {', '.join(unknown) or 'nothing'}; "
            f"the workloads are {', '.join(workloads.WORKLOADS)}"
        )
    return [case for case in cases if case.workload in names]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=RESULTS / "kernel.json")
    parser.add_argument("--only", help="workloads, such as W1_64,W2")
    parser.add_argument("--no-peers", action="store_true", help="our kernel alone")
    parser.add_argument("--skip-done", action="store_true", help="go on with what --out lacks")
    parser.add_argument("--compile-workers", type=int, default=16)
    options = parser.parse_args(argv)
    try:
        cases = chosen_cases(options.only)
    except ValueError as error:
        parser.error(f"--only {error}")
    if not torch.cuda.is_available():
        print(
            f"benchmarks/kernel.py times a CUDA kernel; torch {torch.__version__} sees no CUDA GPU "
            "here. Run it on a machine with one, or `make bench` for what a CPU can measure.",
            file=sys.stderr,
        )
        return 2
    started = time.perf_counter()
    machine = environment() | {"flashinfer": version_of("flashinfer-python")}
    for name, value in machine.items():
        print(f"{name:<16}  {value}")
    limits = measure_limits(cases)
    release()
    print(f"ceilings: {limits}", flush=True)
    results = Results(
        options.out, {"environment": machine, "ceilings": limits}, keep=options.skip_done
    )
    todo = [case for case in cases if not results.rows.get(case.name, {}).get("ok")]
    print(f"{time.perf_counter() - started:.0f} s; compiling", flush=True)
    if todo and options.compile_workers > 1:
        compile_all(todo, options.compile_workers)
    print(f"{time.perf_counter() - started:.0f} s; ours, right to {MAX_ERROR:.0e} of float64")
    print(HEADINGS, flush=True)
    run_ours(todo, limits, results)
    if not options.no_peers:
        print(f"{time.perf_counter() - started:.0f} s; peers, right to {MAX_PEER_ERROR:.0e}")
        for slow in (False, True):
            run_peers(cases, results, slow=slow)
    print(f"{time.perf_counter() - started:.0f} s in all")
    said = summary(results, cases)
    print(json.dumps(said))
    return 1 if said["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
