"""Attention over latents (MLA) on a GPU: absorbed, each run expanded once, and what others do.

    python benchmarks/latent_attention.py --out benchmarks/results/latents.json

One decode step over the trees of benchmarks/workloads.py with the attention of DeepSeek-V2-Lite (16
heads) and DeepSeek-V3 (128 heads) in bfloat16, from queries to the heads' results, without the
projections around them. Ways: "absorbed" (by a kernel, and by torch) and "expanded once" are
ours; "dense" gathers the latents of every row and expands them for sdpa, as a TreeCache did before;
"DynamicCache" has them in rows already, appends the new token and expands. Every way must agree
with float64 first. A time is a CUDA graph over several layers with data of their own, divided by
the layers; "host" is that of launching a layer without one, as decode steps over latents run.
Floor: the unique latents at the speed of a linear read, or the products of the absorbed way at that
of a large matrix product. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import workloads
from ceilings import linear_read, matmul, time_layers

from hf_tree_cache.attention.latents import Expansion, tree_attention_latents
from hf_tree_cache.attention.plan import TreeAttentionPlan, build_plan
from hf_tree_cache.env import environment
from hf_tree_cache.memory.storage import KVSpec, KVStorage, SlabIndex

RANK, ROTARY, K_DIM, V_DIM = 512, 64, 128, 128
HEADS = {"DeepSeek-V2-Lite": 16, "DeepSeek-V3": 128}
TREES = ("W1_16", "W1_64", "W3", "W2")
SCALE = (K_DIM + ROTARY) ** -0.5
NUM_LAYERS = 6
TOLERANCE = {
    "absorbed": 4e-3,
    "absorbed, torch": 4e-3,
    "expanded once": 4e-3,
    "dense": 1e-2,
    "DynamicCache": 1e-2,
}
"""Relative, Frobenius. Ours round to bfloat16 three times, each worth some 1.7e-3."""


class Chosen(Expansion):
    """An expansion that is told whether to absorb."""

    __slots__ = ("choice",)
    choice: bool

    def absorbs(self, spec: KVSpec, plan: TreeAttentionPlan) -> bool:
        return self.choice


@dataclass
class Case:
    """A tree with latents in several layers, queries and weights for each."""

    storage: KVStorage
    plan: TreeAttentionPlan
    slots: list[torch.Tensor]
    q: list[torch.Tensor]
    weights: list[torch.Tensor]

    @classmethod
    def of(cls, tree_name: str, heads: int, device: str, num_layers: int = NUM_LAYERS) -> Case:
        torch.manual_seed(0)
        spec = KVSpec(1, RANK, ROTARY, torch.bfloat16, torch.device(device))
        tree = workloads.build(tree_name)
        storage = workloads.fill(tree, spec, num_layers)
        rows = len(tree.rows)
        slots = []
        for branch in tree.rows:
            table = torch.tensor(tree.block_table(branch))[:, None] * tree.block_size
            own = (table + torch.arange(tree.block_size)).flatten()
            slots.append(own[: tree.length(branch)].to(device))

        def random(*shape: int, scale: float = 1.0) -> list[torch.Tensor]:
            made = (torch.randn(shape, device=device) * scale for _ in range(num_layers))
            return [x.to(torch.bfloat16) for x in made]

        return cls(
            storage,
            build_plan(tree, [1] * rows, 1),
            slots,
            random(rows, heads, 1, K_DIM + ROTARY),
            random(heads, K_DIM + V_DIM, RANK, scale=RANK**-0.5),
        )

    def expand(
        self, layer: int, latents: torch.Tensor, rotary: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As DeepSeek's layers do: ``[X, 1, L, R]`` and ``[X, 1, L, P]`` to K and V."""
        weight = self.weights[layer]
        both = torch.nn.functional.linear(latents[:, 0], weight.flatten(0, 1))
        k, v = both.unflatten(2, weight.shape[:2]).transpose(1, 2).split([K_DIM, V_DIM], 3)
        return torch.cat([k, rotary.expand(-1, len(weight), -1, -1)], 3), v

    def ours(self, absorb: bool, backend: str = "auto") -> Callable[[int], torch.Tensor]:
        def run(layer: int) -> torch.Tensor:
            weight = self.weights[layer]

            def expand(*held: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
                return self.expand(layer, *held)

            chosen = Chosen(expand, K_DIM, V_DIM, len(weight), weight)
            object.__setattr__(chosen, "choice", absorb)
            where = self.q[layer], self.storage, layer, self.plan
            return tree_attention_latents(*where, chosen, scale=SCALE, backend=backend)[0]

        return run

    def attend(self, layer: int, latents: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
        k, v = self.expand(layer, latents, rotary)
        return torch.nn.functional.scaled_dot_product_attention(self.q[layer], k, v, scale=SCALE)

    def dense(self) -> Callable[[int], torch.Tensor]:
        index = self._every_slot()

        def run(layer: int) -> torch.Tensor:
            return self.attend(layer, *self._rows(layer, index))

        return run

    def dynamic(self) -> Callable[[int], torch.Tensor]:
        index = self._every_slot()
        held = [self._rows(layer, index) for layer in range(self.storage.num_layers)]
        past = [[(x[:, :, :-1].clone(), x[:, :, -1:].clone()) for x in both] for both in held]
        del held

        def run(layer: int) -> torch.Tensor:
            return self.attend(layer, *(torch.cat(parts, 2) for parts in past[layer]))

        return run

    def _every_slot(self) -> SlabIndex:
        device = self.storage.spec.device
        return SlabIndex.of(torch.cat(self.slots).cpu(), self.storage.num_blocks * 16, device)

    def _rows(self, layer: int, index: SlabIndex) -> list[torch.Tensor]:
        """Latents ``[B, 1, L, R]`` and rotary parts of all rows, which are equally long here."""
        rows = len(self.slots)
        gathered = self.storage.gather_slots(layer, index)
        return [x.unflatten(0, (rows, -1)).transpose(1, 2) for x in gathered]

    def exact(self, layer: int) -> torch.Tensor:
        """``[B, H, 1, Dv]`` in float64, row by row."""
        latents, rotary = (plane[:, 0] for plane in self.storage.first_planes(layer))
        for_k, for_v = self.weights[layer].double().split([K_DIM, V_DIM], 1)
        outs = []
        for slots, q in zip(self.slots, self.q[layer][:, :, 0].double(), strict=True):
            own, turned = latents[slots].double(), rotary[slots].double()
            absorbed = torch.einsum("hn,hnr->hr", q[:, :K_DIM], for_k)
            scores = absorbed @ own.T + q[:, K_DIM:] @ turned.T
            seen = (scores * SCALE).softmax(1) @ own
            outs.append(torch.einsum("hr,hdr->hd", seen, for_v))
        return torch.stack(outs)[:, :, None]

    def unique_bytes(self) -> int:
        return workloads.unique_bytes(self.plan.tree, self.storage.spec)

    def flop(self, heads: int) -> int:
        """Of the absorbed way."""
        pairs = sum(self.plan.lengths) * heads
        return 2 * (
            pairs * (2 * RANK + ROTARY) + self.plan.num_rows * heads * RANK * (K_DIM + V_DIM)
        )


def error_of(out: torch.Tensor, want: torch.Tensor) -> float:
    return float((out.double() - want).norm() / want.norm())


def host_us(run: Callable[[int], Any], num_layers: int) -> float:
    """Of launching one layer, its results not waited for."""
    times = []
    for _ in range(5):
        torch.cuda.synchronize()
        started = time.perf_counter()
        for layer in range(num_layers):
            run(layer)
        times.append((time.perf_counter() - started) / num_layers * 1e6)
    return min(times)


def measure(tree_name: str, model: str, limits: dict[str, float]) -> dict[str, Any]:
    case = Case.of(tree_name, HEADS[model], "cuda")
    reading = case.unique_bytes() / limits["read_tb_per_s"] / 1e6
    products = case.flop(HEADS[model]) / limits["matmul_tflops"] / 1e6
    row: dict[str, Any] = {
        "tree": tree_name,
        "model": model,
        "unique_bytes": case.unique_bytes(),
        "gflop": case.flop(HEADS[model]) / 1e9,
        "floor_us": max(reading, products),
        "read_us": reading,
        "ways": {},
    }
    print(f"{model} {tree_name}: floor {row['floor_us']:.1f} us", flush=True)
    want = case.exact(0)
    makers: dict[str, Callable[[], Callable[[int], torch.Tensor]]] = {
        "absorbed": lambda: case.ours(True),
        "absorbed, torch": lambda: case.ours(True, "torch"),
        "expanded once": lambda: case.ours(False),
        "dense": case.dense,
        "DynamicCache": case.dynamic,
    }
    for way, make in makers.items():
        try:
            run = make()
            error = error_of(run(0), want)
            if not error <= TOLERANCE[way]:
                row["ways"][way] = {"failed": f"error {error:.1e}"}
            else:
                run(1)
                host = host_us(run, case.storage.num_layers)
                times = time_layers(run, case.storage.num_layers, replays=5)
                row["ways"][way] = {
                    "us": statistics.median(times),
                    "p20": min(times),
                    "p80": max(times),
                    "host_us": host,
                    "error": error,
                }
        except torch.OutOfMemoryError:
            row["ways"][way] = {"failed": "does not fit"}
        run = None
        torch.cuda.empty_cache()
        print(f"  {way:14}", row["ways"][way], flush=True)
    return row


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="write the results here, too")
    parser.add_argument("--seconds", type=float, default=80, help="begin nothing after these")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("latent_attention.py: torch sees no CUDA GPU; latents.py runs on a CPU.")
    started = time.perf_counter()
    limits = {"read_tb_per_s": linear_read(), "matmul_tflops": matmul()}
    print(limits, flush=True)
    result: dict[str, Any] = {"ceilings": limits, "environment": environment(), "rows": []}
    for model in HEADS:
        for tree_name in TREES:
            if time.perf_counter() - started > options.seconds:
                print(f"no time left for {model} {tree_name}", flush=True)
                continue
            result["rows"].append(measure(tree_name, model, limits))
            if options.out is not None:
                options.out.parent.mkdir(parents=True, exist_ok=True)
                options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
