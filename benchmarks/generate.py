"""Generation on a GPU: N branches of one prompt, TreeCache beside transformers' own ways.

    python benchmarks/generate.py --out benchmarks/results

Random weights of well-known shapes in bfloat16, sampling at temperature 1. For each workload (P
prompt tokens, N branches, T new tokens): milliseconds a decode step, from token T/4 to token T;
time to the first token of every branch; the peak of memory above the weights; tokens a second of
the whole run. The floor is what a step must read, weights and unique K/V, over the measured
bandwidth. What runs out of memory, or of ``--seconds``, is left out and said.

The results of a card are in a file of their own, ``generate_<card>.json``, written after each row.
``--keep`` begins with those of an earlier run on the same card.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from capacity import LARGEST, most_branches
from cards import card_of
from ceilings import linear_read
from prompts import PROMPTS, different_prompts, prefill
from shapes import SHAPES, build, bytes_read, token_bytes, unique_bytes, weight_bytes
from steps import peak_memory, watched
from transformers import PreTrainedModel
from ways import WAYS, Way, Workload, with_tree_generate

from hf_tree_cache import enable_tree_attention
from hf_tree_cache.env import environment

WORKLOADS = {
    "8B": [
        Workload(2_000, 16, 64),
        Workload(2_000, 64, 256),
        Workload(2_000, 256, 128),
        Workload(32_768, 32, 64, chunk=8_192),
        Workload(2_000, 64, 128, churn=True),
    ],
    "0.5B": [Workload(2_000, 64, 128)],
    "14B": [Workload(2_000, 64, 64)],
    "32B": [Workload(2_000, 64, 64)],
    "30B of experts": [Workload(2_000, 64, 64)],
    "4B, Gemma": [Workload(2_000, 64, 64)],
    "E4B, Gemma 4": [Workload(2_000, 64, 64)],
    "9B, GLM": [Workload(2_000, 64, 64)],
    "tiny": [
        Workload(40, 4, 12),
        Workload(70, 3, 12, chunk=32),
        Workload(40, 6, 20, churn=True),
    ],
}
SECTIONS: dict[str, tuple[float, Callable[[PreTrainedModel, str], Any]]] = {
    "prefill": (30, prefill),
    "different_prompts": (15, different_prompts),
    "largest": (60, lambda model, shape: most_branches(model, *LARGEST[shape])),
}
"""Measured once a shape: rough seconds, and how."""

FEW = list(WAYS)[:5]
ORDER = [*FEW, "prefill", "different_prompts", *list(WAYS)[5:8], "largest", *list(WAYS)[8:]]
"""What is measured first matters most; of shapes but 8B, only FEW unless asked for."""


def measure(model: PreTrainedModel, way: Way, work: Workload) -> dict[str, Any]:
    """One row of the results."""
    tokens = min(work.tokens, way.most_tokens)
    row: dict[str, Any] = {}
    if way.warm_up:
        begin = time.perf_counter()
        way.run(model, work, way.warm_up)
        row["warm_up_s"] = time.perf_counter() - begin
    gc.collect()
    with peak_memory() as peak:
        runs = [way.run(model, work, tokens) for _ in range(way.repeats)]
        row["peak_above_weights_gb"] = peak()
    best = min(runs, key=lambda run: run.ms_per_step)
    row |= {
        "ms_per_step": best.ms_per_step,
        "all_ms_per_step": [run.ms_per_step for run in runs],
        "first_tokens_s": min(run.tokens[0] for run in runs),
        "total_s": best.total,
        "tokens_per_s": work.rows * tokens / best.total,
        **best.notes,
    }
    if way.enable is not None:
        with watched() as watch:
            way.run(model, work, min(tokens, 64))
        row["profile"] = watch.profile()
    return row


def floor_ms(
    model: PreTrainedModel, work: Workload, tokens: int, bandwidth: float, share_of_experts: float
) -> float:
    """What a step in the middle of ``tokens`` must read, over the bandwidth in TB/s."""
    unique = unique_bytes(model.config, work.prompt, work.rows, tokens // 2)
    return 1e-9 * (bytes_read(model, share_of_experts) + unique) / bandwidth


def share_of_experts(model: PreTrainedModel, work: Workload) -> float:
    """How many of the experts the rows of a decode step hit, on average; 1.0 without experts."""
    layers = [part for name, part in model.named_modules() if name.endswith(".experts")]
    shares: list[float] = []

    def count(experts: Any, args: tuple[torch.Tensor, ...]) -> None:
        if len(args[0]) == work.rows:
            shares.append(args[1].unique().numel() / experts.num_experts)

    if not layers:
        return 1.0
    handles = [layer.register_forward_pre_hook(count) for layer in layers]
    try:
        with enable_tree_attention(model, cuda_graphs=False):
            with_tree_generate(model, work, 8)
    finally:
        for handle in handles:
            handle.remove()
    return statistics.mean(shares)


def fits(model: PreTrainedModel, way: Way, work: Workload) -> bool:
    if not way.kv_per_row or model.device.type != "cuda":
        return True
    tokens = work.rows * (work.prompt + min(work.tokens, way.most_tokens))
    free, _ = torch.cuda.mem_get_info()
    return tokens * token_bytes(model.config) < 0.8 * free


def missing_room(shape: str) -> str | None:
    """Why the weights of a shape do not fit, with 5 GB of work beside them; None if they do."""
    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    need = weight_bytes(shape)
    if need + 5e9 < free:
        return None
    return f"{need / 1e9:.0f} GB of weights on a card of {total / 1e9:.0f}"


class Results:
    """What was measured on one card, on disk after every change.

    Args:
        folder: where ``generate_<card>.json`` is written; None for nowhere.
        where: the environment of this run.
        bandwidth: TB/s of a linear read in this run.
        keep: a file of an earlier run; ignored where it is of another card.
    """

    def __init__(
        self, folder: Path | None, where: dict[str, str], bandwidth: float, keep: Path | None = None
    ) -> None:
        self.path = folder and folder / f"generate_{card_of(where)}.json"
        self.data: dict[str, Any] = {"rows": []}
        if keep is not None and keep.exists():
            earlier = json.loads(keep.read_text(encoding="utf-8"))
            if earlier["environment"]["gpu"] == where["gpu"]:
                self.data = earlier
            else:
                print(f"{keep.name} is of another card: not kept", flush=True)
        now = datetime.datetime.now(datetime.UTC)
        self.data |= {
            "environment": where,
            "linear_read_tb_s": bandwidth,
            "measured": now.isoformat(timespec="minutes"),
        }

    def put(self, row: dict[str, Any]) -> None:
        """Add a row, or replace the one of the same work; a gap replaces nothing."""
        key = _key(row)
        before = [other for other in self.data["rows"] if _key(other) == key]
        if "left_out" in row and any("left_out" not in other for other in before):
            return
        rest = [other for other in self.data["rows"] if _key(other) != key]
        self.data["rows"] = [*rest, row | {"commit": self.data["environment"]["commit"]}]
        self.save()

    def save(self) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.data, indent=1) + "\n", encoding="utf-8")
        part.replace(self.path)


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in ("shape", "method", "prompt", "rows", "churn"))


def measure_way(
    model: PreTrainedModel,
    shape: str,
    name: str,
    results: Results,
    deadline: float,
    shares: dict[Workload, float],
) -> None:
    """Every workload of a shape in one way.

    Args:
        shares: of the experts that each workload's rows hit.
    """
    way = WAYS[name]
    handle = None
    if way.enable is None:
        model.set_attn_implementation("sdpa")
    else:
        # Without a GPU, which --tiny does not need, there is nothing to compile for.
        options = way.enable if model.device.type == "cuda" else {}
        handle = enable_tree_attention(model, **options)
    for work in WORKLOADS[shape]:
        if not way.takes(work):
            continue
        tokens = min(work.tokens, way.most_tokens)
        row: dict[str, Any] = {
            "shape": shape,
            "method": name,
            "prompt": work.prompt,
            "rows": work.rows,
            "tokens": tokens,
            "churn": work.churn,
            "floor_ms": floor_ms(
                model, work, tokens, results.data["linear_read_tb_s"], shares[work]
            ),
        }
        if not fits(model, way, work):
            row["left_out"] = "memory"
        elif time.perf_counter() + way.most_seconds > deadline:
            row["left_out"] = "time"
        else:
            if way.around is not None:
                way.around(model)
            try:
                row |= measure(model, way, work)
            except Exception as error:
                row["left_out"] = f"{type(error).__name__}: {str(error)[:300]}"
            if way.around is not None:
                way.around(model)
        if handle is not None and handle.graphs is not None:
            row["graphs"] = str(handle.graphs)
        print(json.dumps(row), flush=True)
        results.put(row)
        _collect()
    if handle is not None:
        handle.disable()


def measure_section(
    model: PreTrainedModel, shape: str, name: str, results: Results, deadline: float
) -> None:
    """One of :data:`SECTIONS`."""
    seconds, run = SECTIONS[name]
    if time.perf_counter() + seconds > deadline:
        print(f"{name}: no time left", flush=True)
        return
    found = run(model, shape)
    if isinstance(found, list):
        found = [row | {"commit": results.data["environment"]["commit"]} for row in found]
    print(json.dumps({name: found}), flush=True)
    results.data[name] = found
    results.save()
    _collect()


def _collect() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for generate_<card>.json")
    parser.add_argument("--keep", type=Path, help="begin with the rows of this file")
    parser.add_argument("--shapes", nargs="*", choices=list(SHAPES))
    parser.add_argument("--only", nargs="*", choices=ORDER, help="ways and sections")
    parser.add_argument("--seconds", type=float, default=3_600, help="stop starting after these")
    parser.add_argument("--tiny", action="store_true", help="try the benchmark itself, anywhere")
    arguments = parser.parse_args(argv)
    on_gpu = torch.cuda.is_available()
    if not (on_gpu or arguments.tiny):
        parser.error("this benchmark needs a CUDA GPU; benchmarks/cpu_generate.py runs without")
    warnings.simplefilter("ignore")
    deadline = time.perf_counter() + arguments.seconds
    bandwidth = statistics.median(linear_read() for _ in range(3)) if on_gpu else 1.0
    _collect()
    print(f"ceiling: linear read {bandwidth:.2f} TB/s", flush=True)
    results = Results(arguments.out, environment(), bandwidth, arguments.keep)
    chosen = arguments.shapes or [shape for shape in SHAPES if shape != "tiny"]
    for shape in ["tiny"] if arguments.tiny else chosen:
        reason = missing_room(shape)
        if reason is not None:
            print(f"{shape}: {reason}", flush=True)
            results.put({"shape": shape, "left_out": reason})
            continue
        model = build(shape, "cuda" if on_gpu else "cpu")
        shares = {work: share_of_experts(model, work) for work in WORKLOADS[shape]}
        for name in arguments.only or (ORDER if shape in PROMPTS else FEW):
            if name in WAYS:
                measure_way(model, shape, name, results, deadline, shares)
            elif shape in PROMPTS:
                measure_section(model, shape, name, results, deadline)
        del model
        _collect()
    print(json.dumps(results.data))


if __name__ == "__main__":
    main()
