"""Stock generate on a CPU: TreeCache beside DynamicCache, SmolLM2-135M, same prompts, same tokens.

Each run is a process of its own, so that its peak memory is its own. Last line: one JSON object.

    python benchmarks/cpu_generate.py [--prompts 200 1000] [--branches 8 16 32] [--new-tokens 64]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

from hf_tree_cache import TreeCache, enable_tree_attention
from hf_tree_cache.env import environment

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

TEXT = (
    "A reasoning model thinks in trees: it proposes a step, follows it for a while, notices that "
    "it leads nowhere, goes back and tries another. Every branch shares its beginning. "
)


def run_once(kind: str, prompt: int, branches: int, new_tokens: int) -> dict:
    """Generate once with one kind of cache and measure it, in this process."""
    from weights import load_smollm2

    model, tokenizer = load_smollm2()
    ids = tokenizer(TEXT * (prompt // 20), return_tensors="pt").input_ids[:, :prompt]
    assert ids.shape[1] == prompt
    cache = None
    if kind == "tree":
        enable_tree_attention(model)
        cache = TreeCache()
    arguments = dict(do_sample=True, num_return_sequences=branches, eos_token_id=None)
    arguments |= dict(pad_token_id=0, return_dict_in_generate=True, past_key_values=cache)
    model.generate(ids[:, :8], **(arguments | dict(past_key_values=None)), max_new_tokens=2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    torch.manual_seed(0)
    started = time.perf_counter()
    out = model.generate(ids, **arguments, max_new_tokens=new_tokens)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if cache is None:
        pairs = ((layer.keys, layer.values) for layer in out.past_key_values.layers)
        kv_bytes = sum(x.nbytes for pair in pairs for x in pair)
        prefill = prompt * branches
    else:
        cache.check_integrity()
        kv_bytes, prefill = cache.stats().kv_bytes, cache.stats().prefill_tokens_computed
        assert not cache.stats().dense_reads, cache.stats().dense_reads
    return {
        "seconds": round(seconds, 2),
        "prefill_tokens": prefill,
        "kv_bytes": kv_bytes,
        "peak_rss_mb": round(peak / 1024),
        "rss_before_mb": round(before / 1024),
        "tokens": hashlib.sha256(out.sequences.numpy().tobytes()).hexdigest()[:16],
    }


def ceilings() -> dict:
    """What this machine does at best: float32 matrix products and reads from memory."""
    a = torch.randn(1024, 1024)
    big = torch.randn(64 << 20)

    def best(call, repeats: int) -> float:
        times = []
        for _ in range(repeats):
            started = time.perf_counter()
            call()
            times.append(time.perf_counter() - started)
        return min(times)

    return {
        "matmul_gflops": round(2 * 1024**3 / best(lambda: a @ a, 20) / 1e9),
        "read_gb_per_s": round(big.numel() * 4 / best(big.sum, 5) / 1e9, 1),
    }


def floor_seconds(limits: dict, prompt: int, branches: int, new_tokens: int) -> float:
    """Least time of a run that computes the prompt once, by products or by reads of weights."""
    parameters = 134.5e6
    prefill = 2 * parameters * prompt / (limits["matmul_gflops"] * 1e9)
    step = max(
        2 * parameters * branches / (limits["matmul_gflops"] * 1e9),
        4 * parameters / (limits["read_gb_per_s"] * 1e9),
    )
    return prefill + step * new_tokens


def measure(kind: str, *sizes: int) -> dict:
    """Run one case in a fresh process."""
    command = [sys.executable, __file__, "--child", kind, *map(str, sizes)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(result.stderr[-2000:])
    return json.loads(result.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, nargs="+", default=[200, 1000])
    parser.add_argument("--branches", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cpu_generate.json"))
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        kind, *sizes = options.child
        print(json.dumps(run_once(kind, *map(int, sizes))))
        return
    limits = ceilings()
    print(f"ceilings: {limits}; floor: prompt once, then max(weights read, products) a step")
    print(f"{'prompt':>6} {'N':>3} {'floor s':>8} {'dynamic s':>10} {'tree s':>7} {'times':>6} "
          f"{'KV MB':>12} {'peak MB':>12} tokens")  # fmt: skip
    results = []
    for prompt in options.prompts:
        for branches in options.branches:
            sizes = (prompt, branches, options.new_tokens)
            dynamic, tree = measure("dynamic", *sizes), measure("tree", *sizes)
            same = dynamic.pop("tokens") == tree.pop("tokens")
            floor = round(floor_seconds(limits, *sizes), 2)
            results.append(
                {
                    "prompt": prompt,
                    "branches": branches,
                    "new_tokens": options.new_tokens,
                    "floor_seconds": floor,
                    "dynamic": dynamic,
                    "tree": tree,
                    "same_tokens": same,
                }
            )
            print(
                f"{prompt:>6} {branches:>3} {floor:>8} {dynamic['seconds']:>10} "
                f"{tree['seconds']:>7} {dynamic['seconds'] / tree['seconds']:>6.2f} "
                f"{dynamic['kv_bytes'] / 1e6:>6.0f}{tree['kv_bytes'] / 1e6:>6.0f} "
                f"{dynamic['peak_rss_mb']:>6}{tree['peak_rss_mb']:>6} "
                f"{'same' if same else 'DIFFERENT'}",
                flush=True,
            )
    report = {"environment": environment(), "ceilings": limits, "results": results}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
