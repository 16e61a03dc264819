"""The cases of benchmarks/kernel.py: trees with data, and what attention over them must give."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import workloads
from peers import Group, Problem, Unavailable

from hf_tree_cache.attention.launch import WorkspaceKey
from hf_tree_cache.attention.plan import Window, build_plan
from hf_tree_cache.memory.storage import KVSpec, KVStorage
from hf_tree_cache.memory.tree import BranchTree

DEVICE = torch.device("cuda", 0)
BLOCK_SIZE = 16
SMALL_TREE_BYTES = 100_000_000
"""Trees with fewer bytes a layer have more layers, to be several times the L2."""

AIM_US = {"W1_16": 10, "W1_64": 26, "W1_256": 80, "W2": 61, "W3": 42, "W4": 18, "W5": 245}
MUST_US = {
    32: {"W1_16": 12, "W1_64": 30, "W1_256": 90, "W2": 70, "W3": 48, "W4": 25, "W5": 250},
    64: {"W1_16": 13, "W1_64": 35, "W1_256": 105, "W2": 90, "W3": 60, "W4": 32, "W5": 250},
}


@dataclass(frozen=True)
class Case:
    """A tree and the attention over it.

    Attributes:
        window: tokens of a sliding window.
        num_new: the last tokens of each row that are new.
        allocated: blocks lie as the allocator placed them, not anywhere.
        shift: about how far from 0 all scores are, as biases of queries and keys put them.
    """

    workload: str
    num_q_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    dtype: str = "bfloat16"
    window: int | None = None
    num_new: int = 1
    deterministic: bool = False
    allocated: bool = False
    shift: int = 0

    @property
    def name(self) -> str:
        said = [self.workload, f"{self.num_q_heads}/{self.num_kv_heads} heads"]
        said += [f"head dim {self.head_dim}"] * (self.head_dim != 128)
        said += [self.dtype] * (self.dtype != "bfloat16")
        said += [f"window {self.window:,}"] if self.window else []
        said += [f"{self.num_new} new tokens"] * (self.num_new > 1)
        said += [f"scores around {self.shift}"] * bool(self.shift)
        said += ["deterministic"] * self.deterministic + ["as allocated"] * self.allocated
        return ", ".join(said)

    @property
    def is_main(self) -> bool:
        """Whether it is one of the cases that targets and peers are for."""
        return self == Case(self.workload, self.num_q_heads) and self.num_q_heads in MUST_US

    @property
    def look_back(self) -> Window | None:
        return None if self.window is None else Window("sliding", self.window)

    @property
    def group_size(self) -> int:
        return self.num_q_heads // self.num_kv_heads

    @property
    def scale(self) -> float:
        return float(self.head_dim**-0.5)

    @property
    def bias(self) -> float:
        """Of every number of queries and keys."""
        return float((self.shift / self.scale / self.head_dim) ** 0.5)

    @property
    def spec(self) -> KVSpec:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return KVSpec(self.num_kv_heads, self.head_dim, self.head_dim, dtype, DEVICE)

    @property
    def key(self) -> WorkspaceKey:
        return WorkspaceKey(self.spec, self.group_size, self.look_back, self.deterministic)

    def build(self) -> BranchTree:
        return workloads.build(self.workload, BLOCK_SIZE, seed=None if self.allocated else 0)


MAIN_CASES = [Case(name, heads) for name in workloads.WORKLOADS for heads in MUST_US]
OTHER_CASES = [
    *(Case(name, heads, allocated=True) for name in ("W1_64", "W2") for heads in MUST_US),
    *(Case(name, deterministic=True) for name in ("W1_64", "W3")),
    *(Case("W3", num_new=num_new) for num_new in (4, 16)),
    *(Case(name, window=1_024) for name in ("W3", "W2")),
    *(Case(name, dtype="float16") for name in ("W1_64", "W3")),
    *(Case(name, head_dim=head_dim) for head_dim in (64, 256, 512) for name in ("W1_64", "W3")),
    *(Case(name, 28, 4) for name in ("W1_64", "W3")),
    *(Case(name, shift=100) for name in ("W1_64", "W2")),
    Case("W1_64", dtype="float32"),
]


@dataclass(frozen=True)
class Visible:
    """What the new tokens of a tree's rows see.

    Attributes:
        unique, logical: tokens, counted once, and once for each row.
        pairs: of a new token and a token that it sees.
        blocks: that hold any such token.
    """

    unique: int
    logical: int
    pairs: int
    blocks: list[int]

    @classmethod
    def of(cls, tree: BranchTree, num_new: int, window: Window | None) -> Visible:
        logical = pairs = 0
        nearest: dict[Any, int] = {}  # node to the first of its tokens that is seen
        for branch in tree.rows:
            length = tree.length(branch)
            firsts = [
                max(0, window.first_visible(position)) if window else 0
                for position in range(length - num_new, length)
            ]
            logical += length - firsts[0]
            pairs += sum(length - num_new + i + 1 - first for i, first in enumerate(firsts))
            for node in tree.path(branch):
                first = max(node.start, firsts[0])
                nearest[node] = min(first, nearest.get(node, first))
        size = tree.block_size
        seen = {node: first for node, first in nearest.items() if first < node.end}
        blocks = {
            block
            for node, first in seen.items()
            for block in node.blocks[first // size - node.start // size :]
        }
        unique = sum(node.end - first for node, first in seen.items())
        return cls(unique, logical, pairs, sorted(blocks))


@dataclass(frozen=True)
class Data:
    """K and V of a tree over several layers, random, NaN where nobody wrote."""

    tree: BranchTree
    storage: KVStorage

    @classmethod
    def of(cls, case: Case, num_layers: int | None = None) -> Data:
        torch.manual_seed(0)
        tree = case.build()
        if num_layers is None:
            is_small = workloads.unique_bytes(tree, case.spec) < SMALL_TREE_BYTES
            num_layers = 12 if is_small else 8
        storage = workloads.fill(tree, case.spec, num_layers)
        for layer in range(num_layers):
            storage.first_planes(layer)[0].add_(case.bias)
        return cls(tree, storage)

    @property
    def num_layers(self) -> int:
        return self.storage.num_layers

    def blocks(self, plane: int) -> list[torch.Tensor]:
        """K (plane 0) or V of each layer, ``[num_blocks, S, Hkv, D]``."""
        return [
            self.storage.first_planes(layer)[plane].unflatten(0, (-1, BLOCK_SIZE))
            for layer in range(self.num_layers)
        ]


class Step:
    """One forward of a case: queries for each layer, and what they must give."""

    def __init__(self, case: Case, data: Data) -> None:
        self.case, self.data, self.tree = case, data, data.tree
        self.num_rows = len(data.tree.rows)
        counts = [case.num_new] * self.num_rows
        self.plan = build_plan(data.tree, counts, case.num_new, deterministic=case.deterministic)
        torch.manual_seed(1)
        shape = (self.num_rows, case.num_q_heads, case.num_new, case.head_dim)
        self.q = [
            torch.randn(shape, device=DEVICE).add_(case.bias).to(case.spec.dtype)
            for _ in range(data.num_layers)
        ]

    @cached_property
    def checked(self) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        """The right results of the first and the last layer."""
        return {layer: self.exact(layer) for layer in (0, self.data.num_layers - 1)}

    def exact(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """``out [B, T, Hq, D]`` and ``lse [B, T, Hq]`` in float64, from each row's block table."""
        case, tree = self.case, self.tree
        planes = [plane.double() for plane in self.data.storage.first_planes(layer)]
        outs, lses = [], []
        for row, branch in enumerate(tree.rows):
            length = tree.length(branch)
            table = torch.tensor(tree.block_table(branch), device=DEVICE)
            slots = table[:, None] * BLOCK_SIZE + torch.arange(BLOCK_SIZE, device=DEVICE)
            k, v = (plane[slots.flatten()[:length]].transpose(0, 1) for plane in planes)
            q = self.q[layer][row].double().unflatten(0, (case.num_kv_heads, case.group_size))
            scores = torch.einsum("hgtd,hld->hgtl", q, k) * case.scale
            own = torch.arange(length - case.num_new, length, device=DEVICE)[:, None]
            token = torch.arange(length, device=DEVICE)
            hidden = token > own
            if case.look_back is not None:
                hidden |= token < case.look_back.first_visible(own)
            scores.masked_fill_(hidden, -math.inf)
            lses.append(scores.logsumexp(3).flatten(0, 1).T)
            outs.append(torch.einsum("hgtl,hld->thgd", scores.softmax(3), v).flatten(1, 2))
        return torch.stack(outs), torch.stack(lses)

    def problem(self) -> Problem:
        """The same for a peer."""
        return Problem(
            q=[q[:, :, 0] for q in self.q],
            k_blocks=self.data.blocks(0),
            v_blocks=self.data.blocks(1),
            tables=[self.tree.block_table(branch) for branch in self.tree.rows],
            lengths=self.tree.row_lengths(),
            levels=find_levels(self.tree),
            scale=self.case.scale,
        )


def find_levels(tree: BranchTree) -> list[list[Group]]:
    """The nodes at each depth as groups of rows; rows that ended above have an empty one."""
    paths = [tree.path(branch) for branch in tree.rows]
    levels = []
    for depth in range(max(map(len, paths))):
        level: list[Group] = []
        last = None
        for row, path in enumerate(paths):
            node = path[depth] if depth < len(path) else None
            if level and node is last:
                level[-1].rows.append(row)
            elif node is None:
                level.append(Group([row], [], 0))
            else:
                if node.start % tree.block_size:
                    raise Unavailable(f"{node} starts inside a block")
                level.append(Group([row], list(node.blocks), node.end - node.start))
            last = node
        levels.append(level)
    return levels
