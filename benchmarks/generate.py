"""Generation on a GPU: N branches of one prompt, TreeCache beside transformers' own ways.

    python benchmarks/generate.py --out benchmarks/results/generate.json

Random weights of well-known shapes in bfloat16, sampling at temperature 1. For each workload (P
prompt tokens, N branches, T new tokens): milliseconds a decode step, which is the time of T tokens
less that of T/4, over their difference; time to the first token of every branch; the peak of memory
above the weights; tokens a second of the whole run. The floor is what a step must read, weights and
unique K/V, over the measured bandwidth. What runs out of memory, or of ``--seconds``, is left out
and said.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from ceilings import linear_read
from shapes import SHAPES, build, bytes_read, token_bytes
from transformers import (
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    PreTrainedModel,
)

from hf_tree_cache import BranchingProcessor, TreeCache, enable_tree_attention, tree_generate
from hf_tree_cache.env import environment
from hf_tree_cache.generation import loop


@dataclass(frozen=True)
class Workload:
    """P, N and T; ``churn`` forks and prunes all the time."""

    prompt: int
    rows: int
    tokens: int
    churn: bool = False

    def __str__(self) -> str:
        return f"{self.prompt:,} x {self.rows}{', forking' if self.churn else ''}"


WORKLOADS = {
    "8B": [
        Workload(2_000, 16, 64),
        Workload(2_000, 64, 256),
        Workload(2_000, 256, 128),
        Workload(32_768, 32, 64),
        Workload(2_000, 64, 128, churn=True),
    ],
    "0.5B": [Workload(2_000, 64, 128)],
    "32B": [Workload(2_000, 64, 64)],
    "30B of experts": [Workload(2_000, 64, 64)],
}


class Churn(BranchingProcessor):
    """Every ``every`` tokens the ``count`` least likely branches go, and the likeliest fork."""

    def __init__(self, rows: int, every: int = 8, count: int = 8) -> None:
        self.rows, self.every, self.count = rows, every, count
        self.step = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.step += 1
        order = sorted(range(len(scores)), key=lambda row: self.batch.logprobs[row])
        if len(scores) < self.rows:
            self.fork(order[-1], self.rows - len(scores))
        elif self.step % self.every == 0:
            for row in order[: self.count]:
                self.prune(row)
            for row in order[-self.count :]:
                self.fork(row, 1)
        return scores


def prompt_of(work: Workload) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randint(0, 120_000, (1, work.prompt), device="cuda")


def generate(model: PreTrainedModel, work: Workload, tokens: int, **options: Any) -> Any:
    ids = prompt_of(work)
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=True,
        top_k=0,
        num_return_sequences=work.rows,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        prefill_chunk_size=8_192 if work.prompt > 8_192 else None,
        **options,
    )
    sequences = getattr(out, "sequences", out)
    assert sequences.shape == (work.rows, work.prompt + tokens), sequences.shape
    return out


def with_dynamic(model: PreTrainedModel, work: Workload, tokens: int) -> None:
    generate(model, work, tokens, past_key_values=DynamicCache())


def with_static(model: PreTrainedModel, work: Workload, tokens: int) -> None:
    generate(model, work, tokens, cache_implementation="static")


def with_tree(model: PreTrainedModel, work: Workload, tokens: int) -> None:
    generate(model, work, tokens, past_key_values=TreeCache())


def with_tree_generate(model: PreTrainedModel, work: Workload, tokens: int) -> None:
    options: dict[str, Any] = {"custom_generate": tree_generate, "past_key_values": TreeCache()}
    options["max_branches"] = work.rows
    if work.churn:
        options["branching"] = [Churn(work.rows)]
    generate(model, work, tokens, **options)


def with_batching(model: PreTrainedModel, work: Workload, tokens: int) -> None:
    config = GenerationConfig(
        max_new_tokens=tokens,
        do_sample=True,
        top_k=0,
        eos_token_id=-1,
        pad_token_id=0,
        use_cuda_graph=True,
    )
    out = model.generate_batch(
        prompt_of(work).tolist() * work.rows,  # it finds equal prompts by itself
        generation_config=config,
        continuous_batching_config=ContinuousBatchingConfig(max_memory_percent=0.6),
    )
    assert len(out) == work.rows
    assert all(len(entry.generated_tokens) == tokens for entry in out.values())


@dataclass
class Method:
    """One way to generate.

    Attributes:
        run: generates T tokens.
        enable: settings of :func:`enable_tree_attention`, None to leave the model as it is.
        kv_per_row: whether each branch stores its whole prompt.
        for_churn: whether it can fork and prune.
        most_rows, most_prompt: largest workloads that are measured, for those that take minutes.
        most_seconds: rough time of one measurement at 8B, to leave out what no longer fits.
    """

    run: Callable[[PreTrainedModel, Workload, int], None]
    enable: dict[str, Any] | None = field(default_factory=dict)
    kv_per_row: bool = False
    for_churn: bool = False
    most_rows: int = 1 << 20
    most_prompt: int = 1 << 20
    most_seconds: float = 20


METHODS = {
    "tree_generate, compiled": Method(with_tree_generate, {"compile": True}, for_churn=True),
    "stock generate, TreeCache, compiled": Method(with_tree, {"compile": True}),
    "stock generate, TreeCache": Method(with_tree, {}),
    "tree_generate": Method(with_tree_generate, {}, for_churn=True),
    "stock generate, TreeCache, no graphs": Method(
        with_tree, {"cuda_graphs": False}, most_rows=64, most_prompt=2_000
    ),
    "stock generate, DynamicCache": Method(
        with_dynamic, None, kv_per_row=True, most_rows=64, most_prompt=2_000, most_seconds=45
    ),
    "continuous batching": Method(
        with_batching, None, kv_per_row=True, most_rows=64, most_prompt=2_000, most_seconds=45
    ),
    "stock generate, static cache, compiled": Method(
        with_static, None, kv_per_row=True, most_rows=16, most_prompt=2_000, most_seconds=150
    ),
}


class Waiting:
    """Time that the host spends waiting for what was drawn."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def watched(self) -> Iterator[None]:
        read = loop._Arriving.read

        def timed(drawn: Any) -> Any:
            begin = time.perf_counter()
            table = read(drawn)
            self.seconds += time.perf_counter() - begin
            return table

        loop._Arriving.read = timed
        try:
            yield
        finally:
            loop._Arriving.read = read


def measure(model: PreTrainedModel, method: Method, work: Workload) -> dict[str, float]:
    def timed(tokens: int) -> float:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        method.run(model, work, tokens)
        torch.cuda.synchronize()
        return time.perf_counter() - begin

    short = work.tokens // 4
    begin = time.perf_counter()
    timed(min(12, short))
    warm_up = time.perf_counter() - begin
    gc.collect()
    weights = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    first = timed(1)
    shorter = min(timed(short) for _ in range(2 if first < 3 else 1))
    waiting = Waiting()
    with waiting.watched():
        total = timed(work.tokens)
    peak = torch.cuda.max_memory_allocated() - weights
    result = {
        "ms_per_step": 1e3 * (total - shorter) / (work.tokens - short),
        "first_tokens_s": first,
        "total_s": total,
        "tokens_per_s": work.rows * work.tokens / total,
        "peak_above_weights_gb": peak / 1e9,
        "warm_up_s": warm_up,
    }
    if waiting.seconds:
        result["host_ms_per_step"] = 1e3 * (total - first - waiting.seconds) / work.tokens
    return result


def floor_ms(model: PreTrainedModel, work: Workload, bandwidth: float) -> float:
    """What a step at mid-run must read, over the bandwidth in TB/s."""
    unique = (work.prompt + work.rows * work.tokens // 2) * token_bytes(model.config)
    return 1e-9 * (bytes_read(model) + unique) / bandwidth


def fits(model: PreTrainedModel, method: Method, work: Workload) -> bool:
    tokens = work.rows * (work.prompt + work.tokens)
    free, _ = torch.cuda.mem_get_info()
    return not method.kv_per_row or tokens * token_bytes(model.config) < 0.8 * free


def largest(model: PreTrainedModel, prompt: int = 32_768, tokens: int = 8) -> dict[str, int]:
    """The most branches of a long prompt that fit, by doubling; beside what dense rows would."""
    most = 0
    with enable_tree_attention(model):
        for rows in (1_024, 2_048, 4_096, 8_192, 16_384):
            try:
                with_tree(model, Workload(prompt, rows, tokens), tokens)
            except (torch.OutOfMemoryError, RuntimeError) as error:
                print(f"{rows} branches: {str(error)[:120]}", flush=True)
                break
            most = rows
            torch.cuda.empty_cache()
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    dense = free // ((prompt + tokens) * token_bytes(model.config))
    return {"prompt": prompt, "tokens": tokens, "tree_rows": most, "dense_rows": int(dense)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seconds", type=float, default=3_600, help="stop starting after these")
    parser.add_argument("--append", action="store_true", help="add to the rows of --out")
    parser.add_argument("--largest", action="store_true", help="also the most branches that fit")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this benchmark needs a CUDA GPU; benchmarks/cpu_generate.py runs without")
    warnings.simplefilter("ignore")
    deadline = time.perf_counter() + arguments.seconds
    bandwidth = statistics.median(linear_read() for _ in range(3))
    print(f"ceiling: linear read {bandwidth:.2f} TB/s", flush=True)
    result: dict[str, Any] = {"environment": environment(), "linear_read_tb_s": bandwidth}
    if arguments.append:
        result = json.loads(arguments.out.read_text())
    rows: list[dict[str, Any]] = result.setdefault("rows", [])

    def save() -> None:
        if arguments.out:
            arguments.out.write_text(json.dumps(result, indent=1) + "\n")

    for shape in arguments.shapes:
        model = build(shape)
        for name in arguments.methods:
            method = METHODS[name]
            handle = None
            if method.enable is None:
                model.set_attn_implementation("sdpa")
            else:
                handle = enable_tree_attention(model, **method.enable)
            for work in WORKLOADS[shape]:
                if work.churn and not method.for_churn:
                    continue
                if work.rows > method.most_rows or work.prompt > method.most_prompt:
                    continue
                row = {
                    "shape": shape,
                    "method": name,
                    "prompt": work.prompt,
                    "rows": work.rows,
                    "tokens": work.tokens,
                    "churn": work.churn,
                    "floor_ms": floor_ms(model, work, bandwidth),
                }
                if not fits(model, method, work):
                    row["left_out"] = "memory"
                elif time.perf_counter() + method.most_seconds > deadline:
                    row["left_out"] = "time"
                else:
                    try:
                        row |= measure(model, method, work)
                    except Exception as error:
                        row["left_out"] = f"{type(error).__name__}: {str(error)[:300]}"
                if handle is not None and handle.graphs is not None:
                    row["graphs"] = str(handle.graphs)
                rows.append(row)
                print(json.dumps(row), flush=True)
                save()
                gc.collect()
                torch.cuda.empty_cache()
            if handle is not None:
                handle.disable()
        if arguments.largest and shape == "8B":
            result["largest"] = largest(model)
            print(json.dumps(result["largest"]), flush=True)
            save()
        del model
        gc.collect()
        torch.cuda.empty_cache()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
