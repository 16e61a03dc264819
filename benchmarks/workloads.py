"""Trees to time attention on: one decode step, one query token a row (the forward's own)."""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable

import torch

from hf_tree_cache.memory.allocator import PhysicalKVAllocator
from hf_tree_cache.memory.storage import KVSpec, KVStorage
from hf_tree_cache.memory.tree import BranchTree


def prompt_with_branches(tree: BranchTree, prompt: int, branches: int, private: int) -> None:
    tree.add_rows(1)
    tree.append([prompt])
    tree.select([0] * branches)
    tree.append([private] * branches)


def even_tree(tree: BranchTree, levels: list[tuple[int, int]]) -> None:
    """``levels``: (branching factor, tokens of a node), the root's first."""
    tree.add_rows(1)
    for factor, tokens in levels:
        tree.select([row for row in range(len(tree.rows)) for _ in range(factor)])
        tree.append([tokens] * len(tree.rows))


def chain_with_leaves(tree: BranchTree, root: int, links: int, link: int, leaf: int) -> None:
    """A chain of nodes below a root, one leaf of ``leaf`` tokens at each."""
    (tip,) = tree.add_rows(1)
    tree.append([root])
    leaves = []
    for _ in range(links):
        tree.set_rows([tip])
        tree.append([link])
        leaves += tree.fork(tip)
    tree.prune(tip)
    tree.set_rows(leaves)
    tree.append([leaf] * links)


WORKLOADS: dict[str, Callable[[BranchTree], None]] = {
    "W1_16": lambda tree: prompt_with_branches(tree, 2_000, 16, 256),
    "W1_64": lambda tree: prompt_with_branches(tree, 2_000, 64, 256),
    "W1_256": lambda tree: prompt_with_branches(tree, 2_000, 256, 256),
    "W2": lambda tree: prompt_with_branches(tree, 32_768, 32, 512),
    "W3": lambda tree: even_tree(tree, [(1, 4_096), (4, 1_024), (4, 512), (4, 256)]),
    "W4": lambda tree: chain_with_leaves(tree, 1_024, 32, 256, 64),
    "W5": lambda tree: even_tree(tree, [(64, 4_096)]),
}


def build(name: str, block_size: int = 16, *, seed: int | None = 0) -> BranchTree:
    """The tree of a workload; with a seed, its blocks lie anywhere, else as they were allocated."""
    tree = BranchTree(block_size, PhysicalKVAllocator())
    WORKLOADS[name](tree)
    if seed is not None:
        places = list(range(tree.allocator.num_blocks))
        random.Random(seed).shuffle(places)
        for node in tree.nodes():
            node.blocks = array("i", [places[block] for block in node.blocks])
        tree.set_rows(tree.rows)  # what is known of growing rows is void
    return tree


def fill(tree: BranchTree, spec: KVSpec, num_layers: int) -> KVStorage:
    """Random K and V for ``tree`` in one slab, NaN in every slot that no row holds."""
    num_blocks = tree.allocator.num_blocks
    storage = KVStorage(spec, num_layers, tree.block_size, num_blocks)
    storage.ensure(num_blocks)
    for layer in range(num_layers):
        storage.add_layer()
        for plane in storage.first_planes(layer):
            plane.normal_()
    unwritten = []
    for node in tree.nodes():
        end = node.end % tree.block_size
        if end and not any(child.blocks[0] == node.blocks[-1] for child in node.children):
            first = node.blocks[-1] * tree.block_size
            unwritten += range(first + end, first + tree.block_size)
    slots = torch.tensor(unwritten, dtype=torch.int64, device=spec.device)
    for layer in range(num_layers):
        for plane in storage.first_planes(layer):
            plane.index_fill_(0, slots, float("nan"))
    return storage


def unique_bytes(tree: BranchTree, spec: KVSpec) -> int:
    """Bytes of K and V of one layer that any row reads."""
    slot = spec.num_kv_heads * (spec.k_head_dim + spec.v_head_dim) * spec.dtype.itemsize
    return tree.num_unique_tokens() * slot
