"""Random branch trees beside a naive model of them, and storages filled with their tokens.

The model is a list of token numbers for each branch, every token ever appended having a number of
its own. `ShadowTree.memory` says which number each slot holds, moved by the same intents (copies,
slots) that a cache would carry out on tensors.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hf_tree_cache.memory.allocator import PhysicalKVAllocator
from hf_tree_cache.memory.growth import AppendPlan
from hf_tree_cache.memory.storage import KVSpec, KVStorage, SlabIndex
from hf_tree_cache.memory.tree import Branch, BranchTree


class ShadowTree:
    """A `BranchTree` and what it should hold.

    Attributes:
        tree: the real one.
        tokens: of each live branch, oldest first.
        memory: token number in each slot of a block in use, stale ones included.
        num_tokens: appended so far.
    """

    def __init__(self, block_size: int, max_blocks: int | None = None) -> None:
        self.tree = BranchTree(block_size, PhysicalKVAllocator(max_blocks, track_freed=True))
        self.tokens: dict[Branch, list[int]] = {}
        self.memory: dict[int, int] = {}
        self.num_tokens = 0

    @property
    def rows(self) -> list[Branch]:
        return list(self.tree.rows)

    def add_rows(self, count: int) -> list[Branch]:
        new = self.tree.add_rows(count)
        self.tokens |= {branch: [] for branch in new}
        return new

    def append(self, counts: Sequence[int]) -> AppendPlan:
        done = self.tree.append(counts)
        size = self.tree.block_size
        for source, target in done.copies:
            for offset in range(size):
                if source * size + offset in self.memory:
                    self.memory[target * size + offset] = self.memory[source * size + offset]
        for branch, slots, count in zip(self.rows, done.slots, counts, strict=True):
            assert len(slots) == count
            for slot in slots:
                self.memory[slot] = self.num_tokens
                self.tokens[branch].append(self.num_tokens)
                self.num_tokens += 1
        self._forget_freed()
        return done

    def fork(self, branch: Branch, count: int = 1, *, at: int | None = None) -> list[Branch]:
        new = self.tree.fork(branch, count, at=at)
        self.tokens |= {fork: self.tokens[branch][:at] for fork in new}
        return new

    def prune(self, branch: Branch) -> None:
        self.tree.prune(branch)
        del self.tokens[branch]
        self._forget_freed()

    def select(self, indices: Sequence[int]) -> None:
        old = self.rows
        taken = [self.tokens[old[index]] for index in indices]
        self.tree.select(indices)
        self.tokens = {branch: self.tokens[branch] for branch in self.tree.held} | {
            branch: list(tokens) for branch, tokens in zip(self.rows, taken, strict=True)
        }
        self._forget_freed()

    def truncate(self, branch: Branch, length: int) -> None:
        self.tree.truncate(branch, length)
        del self.tokens[branch][length:]
        self._forget_freed()

    def slots(self, branch: Branch) -> list[int]:
        """Slots of the tokens of ``branch`` in order, from its block table."""
        size, table = self.tree.block_size, self.tree.block_table(branch)
        return [table[i // size] * size + i % size for i in range(self.tree.length(branch))]

    def unique_tokens(self) -> int:
        return len(set().union(*self.tokens.values())) if self.tokens else 0

    def check(self) -> None:
        """The tree is sound, and every branch finds its own tokens in memory."""
        tree = self.tree
        tree.check_integrity()
        assert sorted(tree.branches) == sorted(self.tokens)
        assert sorted(tree.held + tree.rows) == sorted(self.tokens)
        for branch, tokens in self.tokens.items():
            assert tree.length(branch) == len(tokens)
            assert [self.memory.get(slot) for slot in self.slots(branch)] == tokens
        assert tree.row_lengths() == [len(self.tokens[row]) for row in self.rows]
        assert tree.num_unique_tokens() == self.unique_tokens()
        assert tree.num_logical_tokens() == sum(map(len, self.tokens.values()))

    def state(self) -> tuple[object, ...]:
        """Everything that a refused operation must leave alone."""
        tree, allocator = self.tree, self.tree.allocator
        return (
            self.rows,
            tree.branches,
            [tree.block_table(branch) for branch in tree.branches],
            [tree.length(branch) for branch in tree.branches],
            sorted((node.start, node.end, node.refs, tuple(node.blocks)) for node in tree.nodes()),
            [allocator.ref_count(block) for block in range(allocator.num_blocks)],
            (tree.num_forks, tree.num_prunes, tree.num_copies, tree.topology_version),
        )

    def _forget_freed(self) -> None:
        size = self.tree.block_size
        for block in self.tree.allocator.take_freed():
            for offset in range(size):
                self.memory.pop(block * size + offset, None)


SHAPES = (
    "a single row",
    "a prompt with many branches",
    "several prompts with branches",
    "rows that share nothing",
    "a beam with one-token nodes",
    "a deep chain with held branches",
    "branches from earlier tokens",
    "anything at all",
)


@dataclass(frozen=True)
class Grown:
    """A random tree to whose rows the tokens of one forward were just appended.

    Attributes:
        shadow: the tree and its model.
        counts: new tokens of each row, the last of them.
        num_new: T, at least the most of ``counts``.
    """

    shadow: ShadowTree
    counts: list[int]
    num_new: int


def grow_randomly(
    rng: random.Random, shape: str, block_size: int, num_new: int, *, scale: int = 12
) -> Grown:
    """A tree of one of `SHAPES`, of some ``scale`` tokens a node, after its last forward."""
    shadow = ShadowTree(block_size)

    def some() -> int:
        return rng.randint(1, scale)

    if shape == "a single row":
        shadow.add_rows(1)
        shadow.append([rng.choice([1, scale, 3 * scale])])
    elif shape == "a prompt with many branches":
        shadow.add_rows(1)
        shadow.append([2 * scale + some()])
        shadow.select([0] * rng.choice([2, 3, 17]))
        for _ in range(rng.randint(0, 3)):
            shadow.append([rng.randint(0, 3) for _ in shadow.rows])
    elif shape == "several prompts with branches":
        shadow.add_rows(3)
        shadow.append([some(), 3 * scale, some()])
        shadow.select([0, 0, 1, 1, 1, 2])
        shadow.append([some() for _ in shadow.rows])
        shadow.select(rng.choices(range(6), k=7))
    elif shape == "rows that share nothing":
        shadow.add_rows(5)
        shadow.append([some() for _ in shadow.rows])
    elif shape == "a beam with one-token nodes":
        shadow.add_rows(1)
        shadow.append([some()])
        shadow.select([0, 0, 0, 0])
        for _ in range(rng.randint(1, 2 * scale)):
            shadow.append([1] * 4)
            shadow.select(rng.choices(range(4), k=4))
    elif shape == "a deep chain with held branches":
        shadow.add_rows(1)
        for _ in range(rng.randint(3, 3 + scale)):
            shadow.append([rng.randint(1, 4)])
            shadow.fork(shadow.rows[0])
        shadow.tree.set_rows(rng.sample(shadow.tree.branches, rng.randint(1, 3)))
    elif shape == "branches from earlier tokens":
        shadow.add_rows(1)
        shadow.append([3 * scale])
        for _ in range(4):
            branch = rng.choice(shadow.tree.branches)
            shadow.fork(branch, 2, at=rng.randint(0, shadow.tree.length(branch)))
            shadow.tree.set_rows(rng.sample(shadow.tree.branches, 2))
            shadow.append([some(), some()])
        shadow.tree.set_rows(rng.sample(shadow.tree.branches, rng.randint(1, 6)))
    else:
        shadow.add_rows(rng.randint(1, 3))
        for _ in range(rng.randint(5, 30)):
            step_randomly(rng, shadow, scale)
        if not shadow.rows:
            shadow.add_rows(1)
    counts = [num_new] * len(shadow.rows)
    if rng.random() < 0.4:
        counts = [rng.randint(0, num_new) for _ in counts]
    if not any(shadow.tokens[row] or count for row, count in zip(shadow.rows, counts, strict=True)):
        counts[0] = num_new
    shadow.append(counts)
    return Grown(shadow, counts, num_new)


def step_randomly(rng: random.Random, shadow: ShadowTree, scale: int = 6) -> str:
    """Do one random thing to ``shadow``; its name."""
    tree = shadow.tree
    rows, branches = shadow.rows, tree.branches
    names = ["append", "append", "add", "fork", "fork at", "prune", "select", "hold", "truncate"]
    name = rng.choice(names) if branches else "add"
    branch = rng.choice(branches) if branches else None
    if name == "add":
        shadow.add_rows(rng.randint(1, 2))
    elif name == "append":
        shadow.append([rng.choice([0, 1, 1, 2, scale]) for _ in rows])
    elif branch is None:
        pass
    elif name == "fork":
        shadow.fork(branch, rng.randint(0, 2))
    elif name == "fork at":
        length = tree.length(branch)
        shadow.fork(branch, rng.randint(1, 2), at=rng.randint(-length, length))
    elif name == "prune" and len(branches) > 2:
        shadow.prune(branch)
    elif name == "select" and rows:
        shadow.select(rng.choices(range(len(rows)), k=rng.randint(1, 5)))
    elif name == "hold":
        tree.set_rows(rng.sample(branches, rng.randint(1, min(6, len(branches)))))
    elif name == "truncate":
        shadow.truncate(branch, rng.randint(0, tree.length(branch)))
    return name


def fill(
    shadow: ShadowTree, spec: KVSpec, *, slab_blocks: int = 4, num_layers: int = 1
) -> tuple[KVStorage, torch.Tensor, torch.Tensor]:
    """A storage that holds the tokens of all live branches, and NaN in every other slot.

    Returns:
        The storage, and K ``[num_tokens, Hkv, Dk]`` and V ``[num_tokens, Hkv, Dv]`` of its last
        layer by token number. Other layers hold NaN.
    """
    storage = KVStorage(spec, num_layers, shadow.tree.block_size, slab_blocks, poison=True)
    for _ in range(num_layers):
        layer = storage.add_layer()
    storage.ensure(shadow.tree.allocator.num_blocks)

    def draw(head_dim: int) -> torch.Tensor:
        shape = (shadow.num_tokens, spec.num_kv_heads, head_dim)
        return torch.randn(shape, dtype=torch.float64).to(spec.dtype).to(spec.device)

    keys, values = draw(spec.k_head_dim), draw(spec.v_head_dim)
    held = {
        slot: token
        for branch, tokens in shadow.tokens.items()
        for slot, token in zip(shadow.slots(branch), tokens, strict=True)
    }
    slots = SlabIndex.of(list(held), slab_blocks * shadow.tree.block_size, spec.device)
    chosen = torch.tensor(list(held.values()), dtype=torch.int64, device=spec.device)
    new_keys, new_values = (x[chosen].transpose(0, 1)[None] for x in (keys, values))
    storage.write(layer, slots, None, new_keys, new_values)
    return storage, keys, values
