from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from copies import WAYS
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from hf_tree_cache import TreeCache
from hf_tree_cache.errors import (
    BatchMismatch,
    InvalidArgument,
    OutOfBlocks,
    StaleBranch,
    TreeCacheError,
)
from hf_tree_cache.memory.storage import KVStorage, SlabIndex
from hf_tree_cache.memory.tree import Branch

LAYERS = [(2, 8, 8), (1, 5, 3)]
"""Heads and head dims of K and V of each layer: two kinds, hence two storages."""

SLAB_BLOCKS = 2
MAX_BRANCHES = 12


class Failing:
    """A growth of storages that fails from its `calls`-th slab on."""

    def __init__(self, calls: int) -> None:
        self.calls, self.failed = calls, False
        self._real = KVStorage._new_slab

    def __enter__(self) -> Failing:
        def new_slab(storage: KVStorage) -> Any:
            self.calls -= 1
            if self.calls > 0:
                return self._real(storage)
            self.failed = True
            raise torch.OutOfMemoryError("injected")

        self._patch = patch.object(KVStorage, "_new_slab", new_slab)
        self._patch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._patch.stop()


class CacheAgainstLists(RuleBasedStateMachine):
    """A TreeCache beside lists of token numbers, one for each branch, and dense K/V by number."""

    def __init__(self) -> None:
        super().__init__()
        real = KVStorage.__init__

        def small_slabs(
            storage: KVStorage, spec: Any, layers: int, size: int, _: int, **options: Any
        ) -> None:
            real(storage, spec, layers, size, SLAB_BLOCKS, **options)

        self.small_slabs = patch.object(KVStorage, "__init__", small_slabs)
        self.small_slabs.start()
        self.tokens: dict[Branch, list[int]] = {}
        self.columns = 0
        self.left_behind: list[tuple[TreeCache, tuple[object, ...]]] = []

    def teardown(self) -> None:
        try:
            for cache, before in self.left_behind:
                cache.check_integrity()
                assert same(observe(cache), before)
        finally:
            self.small_slabs.stop()

    @initialize(block_size=st.sampled_from([1, 3, 4, 16]), seed=st.integers(0, 2**16))
    def make(self, block_size: int, seed: int) -> None:
        self.cache = TreeCache(block_size=block_size, poison=True)
        self.random = torch.Generator().manual_seed(seed)
        self.banks = [[torch.zeros(0, heads, dim) for dim in dims] for heads, *dims in LAYERS]

    # The naive model

    @property
    def rows(self) -> list[Branch]:
        return self.cache.rows

    @property
    def num_tokens(self) -> int:
        return len(self.banks[0][0])

    def expected(self, layer: int) -> list[torch.Tensor]:
        """Dense K and V of a layer, left-padded with zeros."""
        dense = []
        for bank in self.banks[layer]:
            padded = torch.zeros(len(self.rows), bank.shape[1], self.columns, bank.shape[2])
            for row, branch in enumerate(self.rows):
                tokens = self.tokens[branch]
                if tokens:
                    padded[row, :, -len(tokens) :] = bank[tokens].transpose(0, 1)
            dense.append(padded)
        return dense

    def rename(self, old: list[Branch], indices: list[int]) -> None:
        """The model's part of a `select`."""
        held = {branch: tokens for branch, tokens in self.tokens.items() if branch not in old}
        rows = {
            branch: list(self.tokens[old[index]])
            for branch, index in zip(self.rows, indices, strict=True)
        }
        self.tokens = held | rows

    # One forward

    def draw_forward(self, data: st.DataObject) -> tuple[int, int, list[int] | None]:
        """B, T and, for a batch with padding, the new tokens of each row."""
        have = len(self.rows)
        num_new = data.draw(st.integers(1, 5), "T")
        num_rows = data.draw(st.integers(1, 3), "B")
        if have:
            num_rows = have * data.draw(st.sampled_from([1, 1, 1, 1, 2]), "forks")
        if len(self.tokens) + num_rows - have > MAX_BRANCHES:
            num_rows = have or 1
        counts = None
        if data.draw(st.booleans(), "padding"):
            counts = data.draw(
                st.lists(st.integers(0, num_new), min_size=num_rows, max_size=num_rows), "counts"
            )
            counts[0] = max(counts[0], 1)
        return num_rows, num_new, counts

    def run(
        self, num_rows: int, num_new: int, counts: list[int] | None, *, layers: int = len(LAYERS)
    ) -> None:
        """One forward through the first `layers` layers; the model follows when all ran."""
        old, first = self.rows, self.num_tokens
        fed = [num_new] * num_rows if counts is None else counts
        numbers: list[list[int]] = []
        for count in fed:
            numbers.append(list(range(first, first + count)))
            first += count
        if counts is not None:
            self.cache.begin(num_rows, num_new, counts=counts)
        returned, drawn = [], []
        for layer, (heads, *dims) in enumerate(LAYERS[:layers]):
            fresh = [
                torch.randn(first - self.num_tokens, heads, dim, generator=self.random)
                for dim in dims
            ]
            drawn.append(fresh)
            batch = []
            for new in fresh:
                # Padding is never stored, so it may be anything.
                states = torch.full((num_rows, heads, num_new, new.shape[2]), torch.nan)
                for row, tokens in enumerate(numbers):
                    if tokens:
                        local = [token - self.num_tokens for token in tokens]
                        states[row, :, -len(tokens) :] = new[local].transpose(0, 1)
                batch.append(states)
            returned.append(self.cache.update(*batch, layer))
        if layers < len(LAYERS):
            return
        for bank, fresh in zip(self.banks, drawn, strict=True):
            bank[:] = [torch.cat([was, new]) for was, new in zip(bank, fresh, strict=True)]
        if len(old) != num_rows:
            times = num_rows // len(old) if old else 0
            if old:
                self.rename(old, [row for row in range(len(old)) for _ in range(times)])
            else:
                self.tokens |= {branch: [] for branch in self.rows}
        for branch, tokens in zip(self.rows, numbers, strict=True):
            self.tokens[branch] += tokens
        self.columns += num_new
        self.check_handles(returned)

    def check_handles(self, returned: list[Any]) -> None:
        """What `update` returned becomes the dense tensors as soon as torch touches it."""
        for layer, handles in enumerate(returned):
            for handle, want in zip(handles, self.expected(layer), strict=True):
                got = torch.add(handle, 0)
                if bool(got.isnan().any()):
                    got = torch.where(padding(self, want), 0, got)
                assert torch.equal(got, want)

    @rule(data=st.data())
    def append(self, data: st.DataObject) -> None:
        self.run(*self.draw_forward(data))

    def refused(self, refusal: AbstractContextManager[Any], data: st.DataObject) -> None:
        """A forward that may be refused, and then must leave no trace."""
        before = self.trace()
        try:
            with refusal:
                self.run(*self.draw_forward(data))
        except OutOfBlocks:
            assert same(self.trace(), before)
        self.cache.check_integrity()

    def trace(self) -> tuple[object, ...]:
        """What a forward that is refused or taken back must leave alone."""
        return observe(self.cache)

    @rule(data=st.data(), spare=st.integers(0, 2))
    def append_with_few_blocks_left(self, data: st.DataObject, spare: int) -> None:
        allocator = self.cache.tree.allocator
        # Layers that find their first storage look at the bound, and would forget this one.
        if len(self.cache.layers) < len(LAYERS):
            return
        allocator.max_blocks = max(1, allocator.num_used + spare)
        try:
            self.refused(nullcontext(), data)
        finally:
            allocator.max_blocks = None

    @rule(data=st.data(), calls=st.integers(1, 4))
    def append_when_a_storage_cannot_grow(self, data: st.DataObject, calls: int) -> None:
        failing = Failing(calls)
        before = self.num_tokens
        self.refused(failing, data)
        assert failing.failed == (self.num_tokens == before)

    @rule(data=st.data())
    def forward_that_dies(self, data: st.DataObject) -> None:
        before = self.trace()
        self.run(*self.draw_forward(data), layers=1)
        if len(self.cache.layers) == len(LAYERS):
            with pytest.raises(TreeCacheError, match=r"wrote 1 of 2 layers.*rollback"):
                data.draw(st.sampled_from(AFTER_A_DEATH), "next call")(self.cache)
        self.cache.rollback()
        self.cache.rollback()
        assert same(self.trace(), before)

    # Branches

    @precondition(lambda self: self.tokens)
    @rule(data=st.data(), count=st.integers(0, 3))
    def fork(self, data: st.DataObject, count: int) -> None:
        branch = data.draw(st.sampled_from(sorted(self.tokens)), "branch")
        tokens = self.tokens[branch]
        at = data.draw(st.none() | st.integers(-len(tokens), len(tokens)), "at")
        count = min(count, MAX_BRANCHES - len(self.tokens))
        used = self.cache.stats().blocks
        new = self.cache.fork(branch, max(0, count), at=at)
        assert self.cache.stats().blocks == used
        self.tokens |= {fork: tokens[:at] for fork in new}

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def prune(self, data: st.DataObject) -> None:
        branch = data.draw(st.sampled_from(sorted(self.tokens)), "branch")
        self.cache.prune(branch)
        del self.tokens[branch]
        if not self.rows:
            self.columns = 0

    @precondition(lambda self: self.rows)
    @rule(data=st.data(), as_tensor=st.booleans())
    def select(self, data: st.DataObject, as_tensor: bool) -> None:
        old = self.rows
        indices = data.draw(
            st.lists(st.integers(0, len(old) - 1), min_size=0, max_size=5), "indices"
        )
        self.cache.select(torch.tensor(indices, dtype=torch.int64) if as_tensor else indices)
        self.rename(old, indices)
        if not indices:
            self.columns = 0

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def set_rows(self, data: st.DataObject) -> None:
        rows = data.draw(
            st.lists(st.sampled_from(sorted(self.tokens)), unique=True, max_size=5), "rows"
        )
        self.cache.set_rows(rows)
        assert self.rows == rows
        self.columns = max((len(self.tokens[row]) for row in rows), default=0)

    @rule(data=st.data())
    def crop(self, data: st.DataObject) -> None:
        removed = data.draw(st.integers(0, min(self.columns, 9)), "removed")
        self.cache.crop(-removed)
        for row in self.rows:
            del self.tokens[row][max(0, len(self.tokens[row]) - removed) :]
        self.columns -= removed

    @rule()
    def reset(self) -> None:
        self.cache.reset()
        self.tokens, self.columns = {}, 0

    @rule(keep_the_copy=st.booleans(), how=st.sampled_from(WAYS))
    def duplicate(self, keep_the_copy: bool, how: Any) -> None:
        twin = how(self.cache)
        before = observe(self.cache)
        assert same(observe(twin), before)
        if keep_the_copy:
            self.cache, twin = twin, self.cache
        self.left_behind = [*self.left_behind[-1:], (twin, before)]

    @rule(data=st.data())
    def bad_call(self, data: st.DataObject) -> None:
        what, error = data.draw(st.sampled_from(BAD_CALLS), "call")
        before = observe(self.cache)
        with pytest.raises(error):
            what(self)
        assert same(observe(self.cache), before)

    # What must always hold

    @invariant()
    def the_books_add_up(self) -> None:
        cache = self.cache
        cache.check_integrity()
        stats = cache.stats()
        unique = set().union(*self.tokens.values()) if self.tokens else set()
        lengths = {branch: len(tokens) for branch, tokens in self.tokens.items()}
        assert sorted(cache.tree.branches) == sorted(self.tokens)
        assert {branch: cache.tree.length(branch) for branch in self.tokens} == lengths
        assert stats.num_rows == len(self.rows)
        assert stats.num_held == len(self.tokens) - len(self.rows)
        assert stats.logical_tokens == sum(lengths.values())
        assert stats.unique_tokens == len(unique)
        assert stats.blocks * stats.block_size >= len(unique)
        assert stats.prefill_tokens_asked >= stats.prefill_tokens_computed >= 0
        assert cache.get_seq_length() == self.columns
        if len(cache.layers) == len(LAYERS):
            token_bytes = sum(4 * heads * (dk + dv) for heads, dk, dv in LAYERS)
            dense = self.columns * len(self.rows) + sum(
                length for branch, length in lengths.items() if branch not in self.rows
            )
            assert stats.kv_bytes == stats.blocks * stats.block_size * token_bytes
            assert stats.dense_bytes == dense * token_bytes
            assert stats.kv_bytes <= stats.allocated_bytes

    @invariant()
    def every_layer_holds_what_the_lists_say(self) -> None:
        for layer, shown in enumerate(self.cache.layers):
            if shown.storage is None:
                assert shown.keys is None and shown.values is None
                continue
            keys, values = self.expected(layer)
            assert torch.equal(shown.keys, keys)
            assert torch.equal(shown.values, values)

    @invariant()
    def free_blocks_are_poisoned(self) -> None:
        allocator = self.cache.tree.allocator
        free = [b for b in range(allocator.num_blocks) if not allocator.ref_count(b)]
        for layer in self.cache.layers:
            if free and layer.storage is not None:
                index = SlabIndex.of(free, SLAB_BLOCKS, torch.device("cpu"))
                for held in layer.storage.gather_blocks(layer.position, index):
                    assert bool(held.isnan().all())


def padding(machine: CacheAgainstLists, like: torch.Tensor) -> torch.Tensor:
    """``[B, H, L, D]`` bool, true where a row has no token."""
    lengths = torch.tensor([len(machine.tokens[row]) for row in machine.rows])
    empty = torch.arange(machine.columns) < machine.columns - lengths[:, None]
    return empty[:, None, :, None].expand_as(like)


def observe(cache: TreeCache) -> tuple[object, ...]:
    """Everything that a refused call must leave alone; K/V of the layers last."""
    tree = cache.tree
    stats = cache.stats()
    # What was tried and taken back stays counted, slabs once made stay, and a prefill counts as
    # soon as the next call finds it complete.
    stats = replace(stats, forks=0, prunes=0, copies=0, allocated_bytes=0, dense_reads={})
    stats = replace(stats, prefill_tokens_asked=0, prefill_tokens_computed=0)
    # A first forward that fails leaves the layers that it met, with nothing in them.
    stats = replace(stats, kinds=stats.kinds if stats.blocks else ())
    known = [layer for layer in cache.layers if layer.storage is not None and stats.blocks]
    return (
        cache.rows,
        tree.branches,
        [tree.block_table(branch) for branch in tree.branches],
        [tree.length(branch) for branch in tree.branches],
        cache.get_seq_length(),
        stats,
        [(layer.keys.clone(), layer.values.clone()) for layer in known],
    )


def same(one: tuple[object, ...], other: tuple[object, ...]) -> bool:
    *rest, dense = one
    *other_rest, other_dense = other
    assert isinstance(dense, list) and isinstance(other_dense, list)
    return (
        rest == other_rest
        and len(dense) == len(other_dense)
        and all(
            torch.equal(mine, yours)
            for pair, other_pair in zip(dense, other_dense, strict=True)
            for mine, yours in zip(pair, other_pair, strict=True)
        )
    )


AFTER_A_DEATH: list[Callable[[TreeCache], object]] = [
    lambda cache: cache.select([]),
    lambda cache: cache.crop(-1),
    lambda cache: cache.set_rows([]),
    lambda cache: cache.fork(cache.rows[0]),
    lambda cache: copy.deepcopy(cache),
    lambda cache: cache.begin(len(cache.rows), 1),
]

BAD_CALLS: list[tuple[Callable[[CacheAgainstLists], object], type[Exception]]] = [
    (lambda it: it.cache.select([len(it.rows)]), InvalidArgument),
    (lambda it: it.cache.select([-1]), InvalidArgument),
    (lambda it: it.cache.select([0.5]), InvalidArgument),
    (lambda it: it.cache.crop(1), InvalidArgument),
    (lambda it: it.cache.crop(-it.columns - 1), InvalidArgument),
    (lambda it: it.cache.batch_repeat_interleave(0), InvalidArgument),
    (lambda it: it.cache.fork(Branch(10**6)), StaleBranch),
    (lambda it: it.cache.prune(Branch(10**6)), StaleBranch),
    (lambda it: it.cache.set_rows([*it.rows, Branch(10**6)]), StaleBranch),
]


@pytest.mark.core
def test_a_batch_that_fits_no_rows_is_refused() -> None:
    cache = TreeCache(poison=True)
    cache.update(torch.zeros(2, 1, 3, 4), torch.zeros(2, 1, 3, 4), 0)
    before = observe(cache)
    for num_rows in (1, 3, 5):
        wrong = torch.zeros(num_rows, 1, 1, 4)
        with pytest.raises(BatchMismatch, match=f"batch of {num_rows} met a cache of 2 rows"):
            cache.update(wrong, wrong, 0)
        assert same(observe(cache), before)
    cache.check_integrity()


@pytest.mark.core
@pytest.mark.parametrize("num_rows", [1, 2])
def test_dense_keys_and_values_are_copies(num_rows: int) -> None:
    cache = TreeCache(poison=True)
    k, v = torch.randn(num_rows, 2, 16, 4), torch.randn(num_rows, 2, 16, 4)
    cache.update(k, v, 0)
    keys, values = cache.layers[0].keys, cache.layers[0].values
    cache.reset()
    assert torch.equal(keys, k) and torch.equal(values, v)
    cache.update(k, v, 0)
    cache.layers[0].keys.zero_()
    assert torch.equal(cache.layers[0].keys, k)


@pytest.mark.core
def test_a_cache_without_rows_has_dense_keys_of_no_rows() -> None:
    cache = TreeCache(poison=True)
    k = torch.randn(2, 3, 5, 4)
    cache.update(k, k, 0)
    cache.fork(cache.rows[0])
    cache.select([])
    assert cache.layers[0].keys.shape == (0, 3, 0, 4)
    cache.reset()
    assert cache.layers[0].values.shape == (0, 3, 0, 4)


CacheAgainstLists.TestCase.settings = settings(
    max_examples=120,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
TestCacheAgainstLists = CacheAgainstLists.TestCase
