"""Finds the tiles that are fastest on this GPU, and keeps them in the user's cache folder.

    python -m hf_tree_cache.attention.tune [--head-dim 128] [--dtype bfloat16] [--quick]

It starts from the tiles in use, and changes one thing at a time, keeping what is faster: 20 to 40
compilations of a few seconds. After `--seconds` it begins no further candidate. Times are Triton's,
of `do_bench_cudagraph`. Its `autotune` does not serve here, because that picks constants for given
arguments, and other tiles mean another work list. A second run is faster: Triton keeps what it has
compiled.

With HF_TREE_CACHE_TUNE=1 the first launch on a GPU that nobody has measured runs this by itself.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
import triton
from tqdm.auto import tqdm
from triton.testing import do_bench_cudagraph

from ..memory.allocator import PhysicalKVAllocator
from ..memory.storage import KVSpec, KVStorage
from ..memory.tree import BranchTree
from .launch import Workspace, WorkspaceKey, find_tiles, longest_heads, tiles_key
from .plan import build_plan
from .tiles import LIMITS, TUNE_VARIABLE, TUNER, Limits, Tiles, TileSet, write_tuned

BLOCK_SIZE = 16
MAX_DIFFERENCE = 1e-2
"""Between the results of two candidates, relative to their norm."""

Axis = tuple[dict[str, float], ...]
"""Alternatives, each what it changes."""


def _axis(names: str, *choices: tuple[float, ...]) -> Axis:
    return tuple(dict(zip(names.split(), choice, strict=True)) for choice in choices)


SMALL_STEPS = _axis("kv_small stages_small", (32, 2), (32, 3), (64, 2), (64, 3), (64, 4), (128, 2))
LARGE_STEPS = _axis("kv_large stages_large", (16, 3), (32, 2), (32, 3), (64, 2), (64, 3))
REGISTERS = _axis("max_registers", (0,), (128,), (168,), (256,))
WARPS = _axis("num_warps", (4,), (8,))
MERGES = _axis("merge_rows merge_parts", (4, 8), (8, 4), (8, 8), (16, 4))
WAVES = _axis("waves", (0.9,), (1.15,), (1.4,))
COSTS = _axis("large_cost", (1.0,), (1.25,), (1.75,))

QUICK = {"small": (SMALL_STEPS,), "mixed": (LARGE_STEPS, REGISTERS)}
THOROUGH = {
    "small": (SMALL_STEPS, REGISTERS, WARPS, MERGES, WAVES),
    "mixed": (LARGE_STEPS, SMALL_STEPS, REGISTERS, WARPS, MERGES, WAVES, COSTS),
}


@dataclass(frozen=True)
class Trial:
    """One candidate.

    Attributes:
        tiles: with the programs that an SM really holds.
        times: of a layer of each tree, in microseconds.
        note: what was compiled, or why it was left out.
    """

    tiles: Tiles
    times: tuple[float, ...]
    note: str

    @property
    def score(self) -> float:
        """The geometric mean of the times; infinite if it was left out."""
        return statistics.geometric_mean(self.times) if self.times else math.inf


def climb(
    name: str,
    base: Tiles,
    axes: Sequence[Axis],
    measure: Callable[[Tiles], Trial],
    seconds: float = math.inf,
) -> list[Trial]:
    """Time the choices of one axis after the other, going on from the best; that comes last.

    Args:
        seconds: after which no other choice is begun.
    """
    end = time.monotonic() + seconds
    tried = {base: measure(base)}
    best = tried[base]
    with tqdm(total=sum(map(len, axes)), desc=f"{name} tiles", unit="candidate") as bar:
        for axis in axes:
            start = replace(best.tiles, programs_per_sm=base.programs_per_sm)
            for change in axis:
                bar.update()
                tiles = replace(start, **change)  # type: ignore[arg-type]
                if tiles in tried or time.monotonic() > end:
                    continue
                tried[tiles] = measure(tiles)
                # Differences below one percent are noise.
                if tried[tiles].score < 0.99 * best.score:
                    best = tried[tiles]
    return [*(trial for trial in tried.values() if trial is not best), best]


Levels = tuple[tuple[int, int], ...]
"""Branching factor, and tokens of a node, from the root's on."""

TREES: dict[str, tuple[Levels, ...]] = {
    # a prompt with 64 branches, a tree of three levels
    "mixed": (((1, 2_000), (64, 256)), ((1, 2_048), (8, 512), (8, 256))),
    # unshared rows, one long row
    "small": (((32, 2_048),), ((1, 16_384),)),
}


def _tree(levels: Levels) -> BranchTree:
    tree = BranchTree(BLOCK_SIZE, PhysicalKVAllocator())
    tree.add_rows(1)
    for factor, tokens in levels:
        tree.select([row for row in range(len(tree.rows)) for _ in range(factor)])
        tree.append([tokens] * len(tree.rows))
    return tree


class Bench:
    """A tree with random K and V, in more layers than the L2 holds."""

    def __init__(self, levels: Levels, spec: KVSpec, group_size: int) -> None:
        self.spec, self.group_size = spec, group_size
        tree = _tree(levels)
        num_rows, num_blocks = len(tree.rows), tree.allocator.num_blocks
        cached = torch.cuda.get_device_properties(spec.device).L2_cache_size
        self.num_layers = 1 + 3 * cached // (num_blocks * spec.block_bytes(BLOCK_SIZE))
        self.plan = build_plan(tree, [1] * num_rows, 1)
        self.storage = KVStorage(spec, self.num_layers, BLOCK_SIZE, num_blocks)
        self.storage.ensure(num_blocks)
        for _ in range(self.num_layers):
            for plane in self.storage.first_planes(self.storage.add_layer()):
                plane.normal_()
        heads = spec.num_kv_heads * group_size
        device, dtype = spec.device, spec.dtype
        self.q = torch.randn(num_rows, heads, 1, spec.k_head_dim, device=device, dtype=dtype)
        self.out = self.q.new_empty(num_rows, 1, heads, spec.v_head_dim)
        self.lse = torch.empty(num_rows, 1, heads, device=device)
        self.right: torch.Tensor | None = None

    def prepare(self, tiles: Tiles) -> tuple[Callable[[], Any], Any]:
        """A function that runs all layers, and the compiled kernel."""
        workspace = Workspace(WorkspaceKey(self.spec, self.group_size, tiles=TileSet(tiles, tiles)))
        workspace.prepare(self.plan, self.storage)

        def launch(layer: int) -> Any:
            return workspace.launch(self.q, self.storage, layer, self.out, self.lse, scale=0.1)

        self.out.fill_(math.nan)
        kernel = launch(0)
        self.right = right = self.out.float() if self.right is None else self.right
        if not float((self.out - right).norm()) <= MAX_DIFFERENCE * float(right.norm()):
            raise ArithmeticError("its results differ")
        return lambda: [launch(layer) for layer in range(self.num_layers)], kernel

    def time(self, tiles: Tiles) -> float:
        """Microseconds of a layer."""
        run, _ = self.prepare(tiles)
        return 1e3 * do_bench_cudagraph(run, rep=20, return_mode="median") / self.num_layers


def measure(tiles: Tiles, benches: Sequence[Bench], limits: Limits) -> Trial:
    """Time ``tiles``, planned with as many programs as an SM really holds."""
    if fault := tiles.find_fault():
        return Trial(tiles, (), f"left out: {fault}")
    try:
        kernels = [bench.prepare(tiles)[1] for bench in benches]
        shared = [kernel.metadata.shared for kernel in kernels]
        programs = min(
            limits.resident(kernel.n_regs, size, tiles.num_warps)
            for kernel, size in zip(kernels, shared, strict=True)
        )
        tiles = replace(tiles, programs_per_sm=max(programs, 1))
        times = [bench.time(tiles) for bench in benches]
    except Exception as error:
        # Too much shared memory, most often; whatever it is, there are other candidates.
        said = str(error).strip().partition("\n")[0][:80]
        return Trial(tiles, (), f"left out: {type(error).__name__}: {said}")
    registers, spilled = (max(getattr(k, name) for k in kernels) for name in ("n_regs", "n_spills"))
    note = f"{registers} registers, {spilled} spilled, {max(shared):,} bytes, {programs} an SM"
    return Trial(tiles, tuple(times), note)


def tune(
    spec: KVSpec, group_size: int, *, quick: bool = False, seconds: float = math.inf
) -> TileSet:
    """Tune both sets for ``spec``, and print what was tried.

    Args:
        seconds: about how long it may take; a candidate that was begun is finished.
    """
    end = time.monotonic() + seconds
    base = find_tiles(WorkspaceKey(spec, group_size))
    limits = LIMITS.get(tiles_key(spec)[0]) or _limits_of(spec.device)
    best: dict[str, Tiles] = {}
    kinds = QUICK if quick else THOROUGH
    for kind, axes in kinds.items():
        share = (end - time.monotonic()) / (len(kinds) - len(best))
        benches = [Bench(levels, spec, group_size) for levels in TREES[kind]]
        first = getattr(base, kind)
        timed = partial(measure, benches=benches, limits=limits)
        trials = climb(kind, first, axes, timed, share)
        print("\n".join(describe(trial, first) for trial in trials))
        if not trials[-1].times:
            sys.exit(f"No candidate ran, so nothing was written. The first was {trials[-1].note}")
        best[kind] = trials[-1].tiles
    return TileSet(**best)


def describe(trial: Trial, base: Tiles) -> str:
    """One line of the table: times, and what differs from the tiles that tuning began with."""
    began, has = asdict(base), asdict(trial.tiles)
    changes = [f"{name}={has[name]}" for name in has if has[name] != began[name]]
    times = " ".join(f"{time:8.1f}" for time in trial.times) or "-"
    return f"{times:>17} us  {trial.note:60}  {' '.join(changes) or 'as it was'}"


def _limits_of(device: torch.device) -> Limits:
    at = torch.cuda.get_device_properties(device)
    most = getattr(at, "shared_memory_per_block_optin", at.shared_memory_per_block)
    in_all = getattr(at, "shared_memory_per_multiprocessor", most)
    return Limits(most, in_all, registers=getattr(at, "regs_per_multiprocessor", 65536))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(TUNER, description="Find the fastest tiles for this GPU.")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--group", type=int, default=4, help="query heads of a K/V head")
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--device", type=int, default=0, help="number of the GPU")
    parser.add_argument("--quick", action="store_true", help="fewer candidates, about a minute")
    parser.add_argument(
        "--seconds", type=float, help="about how long it may take; default 300, with --quick 60"
    )
    options = parser.parse_args(arguments)
    head_dim, dtype = options.head_dim, getattr(torch, options.dtype)
    longest = longest_heads(dtype)
    if not (1 <= options.group <= 16 and 1 <= head_dim <= longest):
        parser.error(
            f"in {options.dtype} the kernel serves head dims up to {longest}, and up to 16 query "
            "heads a K/V head"
        )
    if not torch.cuda.is_available():
        sys.exit(
            "The tuner times kernels on a GPU, and torch sees none here (torch.cuda.is_available() "
            "is False). Without one, the kernel is not used, and nothing needs to be tuned."
        )
    os.environ[TUNE_VARIABLE] = "0"
    device = torch.device("cuda", options.device)
    spec = KVSpec(options.kv_heads, head_dim, head_dim, dtype, device)
    with torch.cuda.device(device):
        seconds = options.seconds or (60 if options.quick else 300)
        tiles = tune(spec, options.group, quick=options.quick, seconds=seconds)
    note = f"{torch.cuda.get_device_name(device)}, triton {triton.__version__}, {vars(options)}"
    print(f"written to {write_tuned(tiles_key(spec), tiles, note)}")


if __name__ == "__main__":
    main()
