"""Drawing the next tokens on a GPU: our one kernel beside transformers' processors and multinomial.

    python benchmarks/sampling.py --out benchmarks/results/sampling.json

Logits of 128,256 tokens in bfloat16, peaked as a language model's are (one row in eight has a token
of nearly all the probability) or flat. First the ceiling, then what is kept and drawn is compared
with transformers' own, then microseconds on the device and on the host. Under a minute.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from ceilings import linear_read

from hf_tree_cache import Sampling
from hf_tree_cache.env import environment
from hf_tree_cache.generation import draw_launch
from hf_tree_cache.generation.sampling import draw_tokens
from hf_tree_cache.generation.uncertainty import measure

VOCABULARY = 128_256
ROWS = (16, 64, 256)
SAMPLINGS = {
    "temperature 0.8": Sampling(temperature=0.8),
    "top-k 50": Sampling(top_k=50),
    "top-p 0.9": Sampling(top_p=0.9),
    "top-k 50, top-p 0.9": Sampling(top_k=50, top_p=0.9),
    "min-p 0.05": Sampling(min_p=0.05),
}
COPIES = 3
"""Tensors of logits in turn, so that none is in L2 because it was drawn from just before."""

REPEATS = 15
HEAD_START = 4_000_000
"""Cycles for which the GPU is kept busy while the host goes ahead."""

CHI_SQUARE = 80.0
"""19 degrees of freedom exceed it once in 10^8."""


def make_logits(kind: str, rows: int, seed: int = 0, device: str = "cuda") -> torch.Tensor:
    """``[rows, VOCABULARY]`` bfloat16."""
    made = torch.Generator(device).manual_seed(seed)
    shape = (rows, VOCABULARY)
    if kind == "flat":
        return torch.randn(shape, generator=made, device=device).to(torch.bfloat16)
    logits = 2.5 * torch.randn(shape, generator=made, device=device)
    # A few dozen tokens stand out, as what may follow a text does; in some rows only one.
    ids = torch.randint(0, VOCABULARY, (rows, 40), generator=made, device=device)
    steps = torch.linspace(20, 8, 40, device=device)
    logits.scatter_(1, ids, steps + torch.randn(rows, 40, generator=made, device=device))
    logits[::8].scatter_(1, ids[::8, :1], 30.0)
    return logits.to(torch.bfloat16)


def by_transformers(logits: torch.Tensor, sampling: Sampling, logprobs: bool) -> torch.Tensor:
    """As the loop of ``generate``; log-probs under the model, which it does not offer, on top."""
    raw = logits.to(copy=True, dtype=torch.float32)
    tokens = torch.multinomial(sampling.process(raw).softmax(-1), 1)
    return raw.log_softmax(-1).gather(1, tokens) if logprobs else tokens


def microseconds(run: Callable[[int], object], calls: int) -> dict[str, float]:
    """Of one call: median on the device, p20 and p80, and median on the host."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    device, host = [], []
    for repeat in range(REPEATS + 2):
        torch.cuda.synchronize()
        torch.cuda._sleep(HEAD_START)
        begin.record()
        started = time.perf_counter()
        for call in range(calls):
            run(call % COPIES)
        seconds = time.perf_counter() - started
        end.record()
        torch.cuda.synchronize()
        if repeat >= 2:
            device.append(1e3 * begin.elapsed_time(end) / calls)
            host.append(1e6 * seconds / calls)
    low, *_, high = statistics.quantiles(device, n=5)
    return {
        "us": statistics.median(device),
        "p20": low,
        "p80": high,
        "host_us": statistics.median(host),
    }


def floor_us(rows: int, sampling: Sampling, bandwidth: float) -> float:
    """Logits read once; noise written, and read where every token may be drawn."""
    count = rows * VOCABULARY
    filtered = sampling.top_k or sampling.top_p < 1 or sampling.min_p
    return (2 * count + 4 * count + (0 if filtered else 4 * count)) / bandwidth / 1e6


def complaints() -> list[str]:
    """What is kept otherwise than by transformers, or drawn more or less often than it should."""
    wrong = []
    for kind in ("peaked", "flat"):
        logits = make_logits(kind, 32, seed=1)
        logits[::4] = logits[::4].float().round().to(torch.bfloat16)  # more ties
        logits[3::4, ::5] = -torch.inf
        noise = torch.empty(logits.shape, device="cuda").exponential_()
        ids = torch.arange(VOCABULARY, device="cuda")
        for name, sampling in SAMPLINGS.items():
            options = {k: getattr(sampling, k) for k in ("temperature", "top_k", "top_p", "min_p")}
            tokens, _, numbers, cut = draw_launch.draw(logits, noise, **options)
            scores = sampling.process(logits.float())
            scaled = logits.float() / sampling.temperature
            top, floor = numbers[:, 1:2], numbers[:, 3:4]
            kept = (scaled > floor) | ((scaled == floor) & (ids >= cut[:, None]))
            if sampling.min_p:
                kept &= scaled - top >= torch.tensor(sampling.min_p).log()
            kept &= scaled > -torch.inf
            different = (kept != (scores > -torch.inf)).sum(1)
            # In float32 a sum may end on either side of the border of top-p.
            if different.max() > (1 if sampling.top_p < 1 else 0):
                wrong.append(f"{kind}, {name}: kept differs by {different.tolist()}")
            print(f"  {kind}, {name}: {int((different > 0).sum())} of 32 rows differ by a token")
            want = (scores.softmax(-1) / noise).argmax(-1)
            if (tokens != want).any():
                wrong.append(f"{kind}, {name}: {int((tokens != want).sum())} tokens differ")
    count, logits = 200_000, torch.linspace(-2, 2, 20, device="cuda")
    many = logits.expand(count, 20).contiguous()
    for name, sampling in SAMPLINGS.items():
        probs = sampling.process(logits[None].clone())[0].softmax(-1).double()
        seen = draw_tokens(many, many, sampling).tokens.bincount(minlength=20).double()
        expected = count * probs[probs > 0]
        chi_square = float(((seen[probs > 0] - expected) ** 2 / expected).sum())
        if chi_square > CHI_SQUARE or seen[probs == 0].any():
            wrong.append(f"{name}: frequencies are off, chi-square {chi_square:.0f}")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this benchmark needs a CUDA GPU")
    started = time.perf_counter()
    bandwidth = linear_read()
    print(f"ceiling: linear read {bandwidth:.2f} TB/s", flush=True)
    wrong = complaints()
    if wrong:
        print("\n".join(["not as transformers:", *wrong]))
        return 1
    result: dict[str, Any] = {
        "environment": environment(),
        "linear_read_tb_s": bandwidth,
        "vocabulary": VOCABULARY,
        "rows": [],
    }
    for kind in ("peaked", "flat"):
        for rows in ROWS:
            logits = [make_logits(kind, rows, seed) for seed in range(COPIES)]
            for name, sampling in SAMPLINGS.items():

                def ours(i: int, logits: Any = logits, sampling: Any = sampling) -> object:
                    return draw_tokens(logits[i], logits[i], sampling)

                def theirs(i: int, logits: Any = logits, sampling: Any = sampling) -> object:
                    return by_transformers(logits[i], sampling, False)

                def known(i: int, logits: Any = logits, sampling: Any = sampling) -> object:
                    return by_transformers(logits[i], sampling, True)

                row = {
                    "kind": kind,
                    "num_rows": rows,
                    "sampling": name,
                    "floor_us": floor_us(rows, sampling, bandwidth),
                    "ours": microseconds(ours, 6),
                    "transformers": microseconds(theirs, 3),
                    "transformers_with_logprobs": microseconds(known, 3),
                }
                result["rows"].append(row)
                print(
                    f"{kind}, {rows} rows, {name}: floor {row['floor_us']:.0f} µs, ours "
                    f"{row['ours']['us']:.0f} (host {row['ours']['host_us']:.0f}), transformers "
                    f"{row['transformers']['us']:.0f}, with log-probs "
                    f"{row['transformers_with_logprobs']['us']:.0f}",
                    flush=True,
                )
            noise = torch.empty(rows, VOCABULARY, device="cuda")
            parts = {
                "noise": microseconds(lambda i, noise=noise: noise.exponential_(), 6),
                "uncertainty": microseconds(lambda i, logits=logits: measure(logits[i]), 6),
            }
            result["rows"].append({"kind": kind, "num_rows": rows, "parts": parts})
            print(
                f"{kind}, {rows} rows: noise alone {parts['noise']['us']:.0f} µs, entropy and "
                f"varentropy {parts['uncertainty']['us']:.0f}",
                flush=True,
            )
    result["seconds"] = time.perf_counter() - started
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({"environment": result["environment"], "seconds": result["seconds"]}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
