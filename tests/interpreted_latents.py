"""Runs the kernel over latents in Triton's interpreter, on a CPU, beside the oracle.

A script, for a process of its own: whether a kernel is interpreted is decided when it is imported.

TRITON_INTERPRET=1 python tests/interpreted_latents.py
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from interpreter import quicken

from hf_tree_cache.attention.latent_launch import serves, tree_attention_absorbed
from hf_tree_cache.attention.plan import build_plan
from hf_tree_cache.attention.reference import tree_attention_reference
from hf_tree_cache.memory.allocator import PhysicalKVAllocator
from hf_tree_cache.memory.storage import KVReader, KVSpec, KVStorage, SlabIndex
from hf_tree_cache.memory.tree import BranchTree

SCALE = 0.1


class Joined:
    """The latents as K of R + P and V of R, for the oracle."""

    def __init__(self, storage: KVStorage) -> None:
        spec = storage.spec
        width = spec.k_head_dim + spec.v_head_dim
        self.spec = KVSpec(1, width, spec.k_head_dim, spec.dtype, spec.device)
        self.block_size, self.forgets = storage.block_size, storage.forgets
        self.index_blocks, self.index_slots = storage.index_blocks, storage.index_slots
        self.index_stretches = storage.index_stretches
        self.index_key = storage.index_key
        self.storage = storage

    def gather_blocks(self, layer: int, blocks: SlabIndex) -> tuple[torch.Tensor, torch.Tensor]:
        latents, rotary = self.storage.gather_blocks(layer, blocks)
        return torch.cat([latents, rotary], -1), latents

    def gather_slots(self, layer: int, slots: SlabIndex) -> tuple[torch.Tensor, torch.Tensor]:
        latents, rotary = self.storage.gather_slots(layer, slots)
        return torch.cat([latents, rotary], -1), latents


def check(
    block_size: int,
    prompt: int,
    tails: list[int],
    heads: int,
    rank: int,
    *,
    rotary: int = 16,
    dtype: torch.dtype = torch.float16,
    device: str = "cpu",
) -> float:
    """One tree: a prompt, rows of their own lengths, two of which fork once more; the error."""
    tree = BranchTree(block_size, PhysicalKVAllocator())
    tree.add_rows(1)
    tree.append([prompt])
    tree.select([0] * len(tails))
    tree.append(tails)
    tree.select([0, *range(len(tails)), len(tails) - 1])
    rows = len(tree.rows)
    tree.append([1] * rows)
    spec = KVSpec(1, rank, rotary, dtype, torch.device(device))
    storage = KVStorage(spec, 2, block_size, 8, poison=True)
    storage.ensure(tree.allocator.num_blocks)
    storage.add_layer()
    storage.add_layer()
    layer, size = 1, block_size
    for branch in tree.rows:
        table = tree.block_table(branch)
        slots = [table[i // size] * size + i % size for i in range(tree.length(branch))]
        index = SlabIndex.of(slots, storage.slab_blocks * size, spec.device)
        made = (torch.randn(1, 1, len(slots), dim).to(device, dtype) for dim in (rank, rotary))
        storage.write(layer, index, None, *made)
    plan = build_plan(tree, [1] * rows, 1)
    q = torch.randn(rows, heads, 1, rank + rotary).to(device, dtype)
    assert serves(q, storage, plan)
    out, lse = tree_attention_absorbed(q, storage, layer, plan, scale=SCALE)
    reader: KVReader = Joined(storage)
    want, want_lse = tree_attention_reference(q, reader, layer, plan, scale=SCALE)
    assert out.dtype == q.dtype and out.shape == want.shape
    assert float((lse - want_lse).abs().max()) < 1e-2
    return float((out.double() - want.double()).norm() / want.double().norm())


def main() -> None:
    quicken()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for shape in (
        (16, 100, [3, 17, 1], 16, 32),
        (16, 33, [40, 1, 16, 15, 31], 32, 16),
        (64, 130, [1, 70], 128, 32),
        (4, 5, [1], 16, 16),
        (16, 600, [530, 2], 16, 16),
    ):
        error = check(*shape)
        assert error < 4e-3, (shape, error)
    print("agrees")


if __name__ == "__main__":
    main()
