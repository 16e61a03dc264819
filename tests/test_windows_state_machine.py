"""The cache against lists, with layers that let go what lies before their windows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule
from test_state_machine import LAYERS, MAX_BRANCHES, CacheAgainstLists, observe, same

from hf_tree_cache import HistoryFreed, TreeCache
from hf_tree_cache.integration.layers import PagedLayer
from hf_tree_cache.memory.tree import Branch


class WindowsAgainstLists(CacheAgainstLists):
    """As its base, whose layers now have windows and read through them."""

    @initialize(
        block_size=st.sampled_from([1, 3, 4]),
        seed=st.integers(0, 2**16),
        windows=st.sampled_from([(1, 5), (4, None), (6, 6), (3, 9)]),
        backtrack=st.sampled_from([0, 2, 7, None]),
    )
    def make(
        self,
        block_size: int,
        seed: int,
        windows: tuple[int | None, ...],
        backtrack: int | None,
    ) -> None:
        super().make(block_size, seed)
        self.cache = TreeCache(block_size=block_size, poison=True, backtrack=backtrack)
        self.cache.layers = [PagedLayer(self.cache, window) for window in windows]
        self.windows, self.backtrack = windows, backtrack
        self.forgets = [window is not None and backtrack is not None for window in windows]
        self.furthest: dict[Branch, int] = {}

    def trace(self) -> tuple[object, ...]:
        # A forward that is about to be refused lets go first.
        *rest, stats, _ = observe(self.cache)
        assert not isinstance(stats, (list, tuple))
        return (*rest, replace(stats, kinds=(), kv_bytes=0), [])  # type: ignore[type-var]

    def run(self, *args: Any, **options: Any) -> None:
        self.note_lengths()
        super().run(*args, **options)

    def note_lengths(self) -> None:
        """How long branches are when what they cannot see may go."""
        lengths = {branch: len(tokens) for branch, tokens in self.tokens.items()}
        most = max(self.furthest.values(), default=0)
        self.furthest = {b: max(n, self.furthest.get(b, most)) for b, n in lengths.items()}

    def visible(self, layer: int, new: list[int] | None = None) -> torch.Tensor:
        """``[B, 1, L, 1]`` bool, what the layer's next queries (or the last ``new`` ones) see."""
        window = self.windows[layer] or self.columns + 1
        lengths = torch.tensor([len(self.tokens[row]) for row in self.rows])
        first = lengths - (0 if new is None else torch.tensor(new)) - window + 1
        positions = torch.arange(self.columns) - (self.columns - lengths[:, None])
        return (positions >= first[:, None])[:, None, :, None]

    def compare(self, got: torch.Tensor, want: torch.Tensor, visible: torch.Tensor) -> None:
        assert torch.equal(torch.where(visible, got, 0), torch.where(visible, want, 0))
        assert bool((got[got != want] == 0).all())

    def check_handles(self, returned: list[Any]) -> None:
        step = self.cache.step
        assert step is not None
        for layer, handles in enumerate(returned):
            for which, want in enumerate(self.expected(layer)):
                if not self.forgets[layer]:
                    self.check_whole(handles[which], want)
                    continue
                handles[which].source.note_read(self.windows[layer])
                got = handles[which].source.dense("a test")[which]
                if step.fresh:
                    lengths = torch.tensor([len(self.tokens[row]) for row in self.rows])
                    stored = torch.arange(self.columns) >= self.columns - lengths[:, None]
                    got = torch.where(stored[:, None, :, None], got, 0)
                self.compare(got, want, self.visible(layer, step.counts))

    def check_whole(self, handle: Any, want: torch.Tensor) -> None:
        got = handle + 0
        stored = torch.tensor([len(self.tokens[row]) for row in self.rows])
        shown = torch.arange(self.columns) >= self.columns - stored[:, None]
        assert torch.equal(torch.where(shown[:, None, :, None], got, 0), want)

    @precondition(lambda self: self.tokens and len(self.tokens) < MAX_BRANCHES)
    @rule(data=st.data(), count=st.integers(1, 3))
    def fork(self, data: st.DataObject, count: int) -> None:
        branch = data.draw(st.sampled_from(sorted(self.tokens)), "branch")
        tokens = self.tokens[branch]
        at = data.draw(st.integers(0, len(tokens)), "at")
        count = min(count, MAX_BRANCHES - len(self.tokens))
        before = observe(self.cache)
        try:
            new = self.cache.fork(branch, count, at=at)
        except HistoryFreed as refusal:
            self.refuse(refusal, before, {branch: at})
            return
        self.tokens |= {fork: tokens[:at] for fork in new}
        self.furthest |= {fork: self.furthest[branch] for fork in new if branch in self.furthest}

    @rule(data=st.data())
    def crop(self, data: st.DataObject) -> None:
        removed = data.draw(st.integers(0, self.columns), "removed")
        before = observe(self.cache)
        try:
            self.cache.crop(-removed)
        except HistoryFreed as refusal:
            shorter = {row: max(0, len(self.tokens[row]) - removed) for row in self.rows}
            self.refuse(refusal, before, shorter)
            return
        for row in self.rows:
            del self.tokens[row][max(0, len(self.tokens[row]) - removed) :]
        self.columns -= removed

    def refuse(
        self, refusal: HistoryFreed, before: tuple[object, ...], asked: dict[Branch, int]
    ) -> None:
        """Nothing changed, and so far back was never promised."""
        assert same(observe(self.cache), before)
        assert self.backtrack is not None
        most = max(self.furthest.values())
        assert any(
            0 < length < self.furthest.get(branch, most) - self.backtrack
            for branch, length in asked.items()
        )
        assert "can go back to" in str(refusal)

    @rule()
    def forget(self) -> None:
        """All at once what else goes from time to time."""
        self.note_lengths()
        memory = self.cache._memory
        memory.let_go()
        memory._history.forget(self.cache.tree, memory.pool.storages)
        size = self.cache.block_size
        for layer, window in zip(self.cache.layers, self.windows, strict=True):
            if layer.storage is None or layer.storage.places is None:
                continue
            if not layer.storage.may_forget:
                continue
            assert window is not None and self.backtrack is not None
            near: set[int] = set()
            for branch in self.tokens:
                first = self.cache.tree.length(branch) - window + 1 - self.backtrack
                # A block that was copied on write may stay beside its copy.
                for node in self.cache.tree.path(branch):
                    near.update(node.blocks[max(0, first // size - node.start // size) :])
            held = {b for b in self.cache.tree.allocator.used if layer.storage.keeps(b)}
            assert held <= near

    @invariant()
    def the_books_add_up(self) -> None:
        self.cache.check_integrity()
        stats = self.cache.stats()
        unique = set().union(*self.tokens.values()) if self.tokens else set()
        assert stats.unique_tokens == len(unique)
        assert stats.kv_bytes == sum(kind.kv_bytes for kind in stats.kinds) <= stats.allocated_bytes
        for (heads, dk, dv), layer in zip(LAYERS, self.cache.layers, strict=True):
            if layer.storage is not None and not layer.storage.forgets:
                size = 4 * heads * (dk + dv) * stats.block_size
                assert any(k.kv_bytes == stats.blocks * size for k in stats.kinds)

    @invariant()
    def every_layer_holds_what_the_lists_say(self) -> None:
        for layer, shown in enumerate(self.cache.layers):
            if shown.storage is not None:
                for got, want in zip((shown.keys, shown.values), self.expected(layer), strict=True):
                    self.compare(got, want, self.visible(layer))

    @invariant()
    def free_blocks_are_poisoned(self) -> None:
        for layer in self.cache.layers:
            storage = layer.storage
            if storage is None or storage.places is None:
                continue
            assert not storage._k_blocks[0][:, 0].any() and not storage._v_blocks[0][:, 0].any()
            for place in storage.places._free:
                slab, inside = divmod(place, storage.slab_blocks)
                assert bool(storage._k_blocks[slab][:, inside].isnan().all())


WindowsAgainstLists.TestCase.settings = settings(
    max_examples=80,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


class TestWindowsAgainstLists(WindowsAgainstLists.TestCase):  # type: ignore[name-defined, misc]
    """That blocks go and calls are refused is seen to by test_windows.py, in lives that repeat."""
