"""Few rows through the linear layers of known models on a GPU: our kernel beside cuBLAS.

    python benchmarks/linear.py --out benchmarks/results

The layers of benchmarks/shapes.py in bfloat16; those with the same input are one, as decode steps
compute them: torch multiplies by their joined weight, ours reads its parts. A gated unit is both
products and what joins them: ours is one launch. One CUDA graph goes
through copies of a weight that are several times as large as L2, so that it is always read from
memory; a time is a replay divided by the copies. First the ceiling; then both are compared with
float64, and ours may be no further from it than torch's. Floor: weights, biases and rows, read and
written once at the speed of a linear read. Under a minute; what is left out for ``--seconds`` is
said. Last line: one JSON object.

The results of a card are in a file of their own, ``linear_<card>.json``, written after each row.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cards import card_of
from ceilings import linear_read, time_layers
from shapes import SHAPES, outline

from hf_tree_cache.env import environment
from hf_tree_cache.forward import linear

CHOSEN_SHAPES = ("8B", "0.5B", "32B")
LAYERS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "gated": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
    "head": ("lm_head",),
}
ROWS = (1, 4, 16, 32, 64)
OVER_L2 = 4
"""How many times as large as L2 the copies of a weight are together, at the least."""

LEAST_COPIES = 4
OVER_TORCH = 1.25
"""What our error may be of torch's: both are mostly the rounding of the results."""

LEAST_ERROR = 1e-6
"""Relative, Frobenius. In float32, as without a GPU, sums in another order differ by less."""

COMPILE_SECONDS = 60


@dataclass(frozen=True)
class Layer:
    """Linear layers of a model that have the same input.

    Attributes:
        widths: outputs of each.
        size: inputs.
        count: how many a decode step goes through.
    """

    shape: str
    name: str
    widths: tuple[int, ...]
    size: int
    has_bias: bool
    count: int

    @classmethod
    def of(cls, shape: str) -> list[Layer]:
        """The layers of a shape of :data:`SHAPES`, one of each kind."""
        model = outline(shape)
        found = []
        for name, parts in LAYERS.items():
            path = "" if name == "head" else "model.layers.0."
            linears = [model.get_submodule(path + part) for part in parts]
            widths = tuple(each.out_features for each in linears)
            count = 1 if name == "head" else model.config.num_hidden_layers
            has_bias = linears[0].bias is not None
            found.append(cls(shape, name, widths, linears[0].in_features, has_bias, count))
        return found

    @property
    def is_gated(self) -> bool:
        return self.name == "gated"

    def bytes(self, rows: int, itemsize: int) -> int:
        """Read or written by a product."""
        width = sum(self.widths)
        made = self.widths[0] if self.is_gated else width
        return itemsize * (width * (self.size + self.has_bias) + rows * (self.size + made))


@dataclass
class Copies:
    """A layer with random weights, as often as it takes to leave L2.

    Attributes:
        x: ``[rows, size]``.
        weights: each ``[sum of widths, size]``.
        biases: each ``[sum of widths]``; empty where the layer has none.
    """

    layer: Layer
    x: torch.Tensor
    weights: list[torch.Tensor]
    biases: list[torch.Tensor]
    exact: torch.Tensor = field(init=False)

    @classmethod
    def of(cls, layer: Layer, rows: int, device: str, dtype: torch.dtype) -> Copies:
        width = sum(layer.widths)
        l2 = torch.cuda.get_device_properties(0).L2_cache_size if device == "cuda" else 0
        count = max(LEAST_COPIES, math.ceil(OVER_L2 * l2 / (width * layer.size * dtype.itemsize)))
        made = torch.Generator(device).manual_seed(0)
        options: Any = {"device": device, "dtype": dtype}
        x = torch.empty(rows, layer.size, **options).normal_(generator=made)
        weights, biases = [], []
        for _ in range(count):
            weight = torch.empty(width, layer.size, **options)
            weights.append(weight.normal_(0, layer.size**-0.5, generator=made))
            if layer.has_bias:
                biases.append(torch.empty(width, **options).normal_(generator=made))
        return cls(layer, x, weights, biases)

    def __post_init__(self) -> None:
        self.exact = self.x.double() @ self.weights[0].double().T
        if self.biases:
            self.exact += self.biases[0].double()
        if self.layer.is_gated:
            self.exact = gate(self.exact)

    def ours(self, rows: int) -> Callable[[int], torch.Tensor]:
        x, widths = self.x[:rows], self.layer.widths
        weights = [list(weight.split(widths)) for weight in self.weights]
        biases = [list(bias.split(widths)) for bias in self.biases] or [[]] * len(weights)
        if self.layer.is_gated:
            return lambda i: linear.few_rows_gated(x, *weights[i])
        return lambda i: linear.few_rows_linear(x, weights[i], biases[i])

    def theirs(self, rows: int) -> Callable[[int], torch.Tensor]:
        x = self.x[:rows]
        biases = self.biases or [None] * len(self.weights)
        if self.layer.is_gated:
            return lambda i: gate(F.linear(x, self.weights[i]))
        return lambda i: F.linear(x, self.weights[i], biases[i])

    def error_of(self, y: torch.Tensor) -> float:
        """Of the first copy's results."""
        exact = self.exact[: len(y)]
        return float((y.double() - exact).norm() / exact.norm())


def gate(y: torch.Tensor) -> torch.Tensor:
    """silu(first half) * second half."""
    first, second = y.chunk(2, -1)
    return F.silu(first) * second


def microseconds(run: Callable[[int], object], copies: int) -> dict[str, float]:
    """Of a product: median, p20 and p80. Without a GPU of calls, which says nothing of a GPU's."""
    if torch.cuda.is_available():
        times = time_layers(run, copies)
    else:
        times = []
        for i in range(copies):
            started = time.perf_counter()
            run(i)
            times.append(1e6 * (time.perf_counter() - started))
    low, *_, high = statistics.quantiles(times, n=5)
    return {"us": statistics.median(times), "p20": low, "p80": high}


def measure(copies: Copies, rows: int, bandwidth: float) -> dict[str, Any]:
    """One row of the results; without times where ours is wrong."""
    layer, count = copies.layer, len(copies.weights)
    ours, theirs = copies.ours(rows), copies.theirs(rows)
    error, torch_error = copies.error_of(ours(0)), copies.error_of(theirs(0))
    size = layer.bytes(rows, copies.x.element_size())
    row = {
        "bytes": size,
        "floor_us": size / bandwidth / 1e6,
        "copies": count,
        "error": error,
        "torch_error": torch_error,
    }
    # Written so that a NaN fails, too.
    if not error <= OVER_TORCH * torch_error + LEAST_ERROR:
        return row | {"left_out": f"wrong: {error:.1e} from float64, torch {torch_error:.1e}"}
    return row | {"ours": microseconds(ours, count), "torch": microseconds(theirs, count)}


def compile_layer(layer: Layer, rows: Sequence[int], dtype: torch.dtype) -> None:
    """In a process of its own: launch once, so that Triton's cache on the disk has the kernels."""
    width, options = sum(layer.widths), {"device": "cuda", "dtype": dtype}
    weights = list(torch.empty(width, layer.size, **options).split(layer.widths))
    biases = list(torch.empty(width, **options).split(layer.widths)) if layer.has_bias else []
    for count in rows:
        x = torch.empty(count, layer.size, **options)
        if layer.is_gated:
            linear.few_rows_gated(x, *weights)
        else:
            linear.few_rows_linear(x, weights, biases)
    torch.cuda.synchronize()


def compile_all(
    layers: Sequence[Layer], rows: Sequence[int], dtype: torch.dtype, workers: int
) -> None:
    """What takes long, or fails, is left to the run itself."""
    with multiprocessing.get_context("spawn").Pool(min(workers, len(layers))) as pool:
        jobs = [pool.apply_async(compile_layer, (layer, rows, dtype)) for layer in layers]
        deadline = time.perf_counter() + COMPILE_SECONDS
        for layer, job in zip(layers, jobs, strict=True):
            try:
                job.get(max(1.0, deadline - time.perf_counter()))
            except Exception as error:
                print(f"{layer.shape}, {layer.name}: not compiled ahead, {error!r:.300}")


def line_of(row: dict[str, Any]) -> str:
    name = f"{row['shape']:>5} {row['layer']:<8} {row['rows']:>3} rows"
    if "left_out" in row:
        return f"{name}: {row['left_out']}"
    ours, theirs = row["ours"]["us"], row["torch"]["us"]
    return (
        f"{name}: floor {row['floor_us']:7.1f} µs, ours {ours:7.1f} "
        f"({ours / row['floor_us']:.2f} x), torch {theirs:7.1f} ({theirs / row['floor_us']:.2f} x)"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="folder for linear_<card>.json")
    parser.add_argument("--shapes", nargs="*", choices=list(SHAPES), default=CHOSEN_SHAPES)
    parser.add_argument("--only", nargs="*", choices=list(LAYERS), default=list(LAYERS))
    parser.add_argument("--rows", nargs="*", type=int, default=ROWS)
    parser.add_argument("--seconds", type=float, default=600, help="begin nothing after these")
    parser.add_argument("--compile-workers", type=int, default=15)
    parser.add_argument(
        "--tiny", action="store_true",
        help="try the benchmark itself; without a GPU it needs TRITON_INTERPRET=1",
    )  # fmt: skip
    options = parser.parse_args(argv)
    on_gpu = torch.cuda.is_available()
    if not (on_gpu or options.tiny):
        parser.error("this benchmark needs a CUDA GPU")
    if any(not 1 <= rows <= linear.MOST_ROWS for rows in options.rows):
        parser.error(f"--rows {options.rows}: the kernel takes 1 to {linear.MOST_ROWS}")
    started = time.perf_counter()
    # Triton's interpreter rounds products of half precision more coarsely than a GPU.
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    bandwidth = linear_read() if on_gpu else 1.0
    print(f"ceiling: linear read {bandwidth:.2f} TB/s", flush=True)
    result: dict[str, Any] = {
        "environment": environment(),
        "linear_read_tb_s": bandwidth,
        "dtype": str(dtype).removeprefix("torch."),
        "rows": [],
    }
    path = options.out and options.out / f"linear_{card_of(result['environment'])}.json"
    shapes = ["tiny"] if options.tiny else options.shapes
    layers = [each for shape in shapes for each in Layer.of(shape) if each.name in options.only]
    if on_gpu and options.compile_workers > 1:
        compile_all(layers, options.rows, dtype, options.compile_workers)
        print(f"{time.perf_counter() - started:.0f} s; compiled", flush=True)
    for layer in layers:
        copies = None
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()
        for rows in options.rows:
            row: dict[str, Any] = {
                "shape": layer.shape,
                "layer": layer.name,
                "widths": layer.widths,
                "size": layer.size,
                "count": layer.count,
                "rows": rows,
            }
            if time.perf_counter() - started > options.seconds:
                row["left_out"] = "no time left"
            else:
                copies = copies or Copies.of(layer, max(options.rows), device, dtype)
                row |= measure(copies, rows, bandwidth)
            result["rows"].append(row)
            result["seconds"] = time.perf_counter() - started
            print(line_of(row), flush=True)
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                part = path.with_suffix(".part")
                part.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
                part.replace(path)
    print(json.dumps(result))
    return 1 if any(row.get("left_out", "").startswith("wrong") for row in result["rows"]) else 0


if __name__ == "__main__":
    raise SystemExit(main())
