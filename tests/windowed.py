"""Random lives of a tree whose K/V are let go behind windows, attended to at every step.

Shared by test_windows.py and interpreted_windows.py.
"""

from __future__ import annotations

import random
from typing import Any

import torch

from hf_tree_cache.attention.dispatch import run_tree_attention
from hf_tree_cache.attention.plan import TreeAttentionPlan, Window, build_plan
from hf_tree_cache.memory.storage import KVSpec
from hf_tree_cache.memory.tree import Branch
from hf_tree_cache.memory.tree_memory import TreeMemory


class WindowedLife:
    """A tree and a storage for each window, beside lists of tokens and dense K/V by number.

    Args:
        seed: decides everything.
        backend: attends.
        deterministic: as the fused kernel has it.
        scale: of all lengths.
        tight: blocks go as soon as a window has passed them, within tiles that are still read.
    """

    def __init__(
        self,
        seed: int,
        backend: str,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        head_dims: tuple[int, int] = (16, 16),
        *,
        deterministic: bool = False,
        scale: int = 1,
        tight: bool = False,
    ) -> None:
        self.rng = rng = random.Random(seed)
        torch.manual_seed(seed)
        self.backend, self.deterministic, self.scale = backend, deterministic, scale
        self.group, self.block_size = rng.choice([1, 2]), rng.choice([4, 16])
        self.backtrack = scale * rng.choice([0, 5, 16])
        kind = rng.choice(["sliding", "chunked"])
        if tight:
            self.block_size, self.backtrack, kind = 4, 0, "sliding"
        self.windows: list[Window | None] = [None, Window(kind, scale * rng.choice([1, 7, 24]))]
        self.memory = TreeMemory(
            self.block_size, max_blocks=None, max_memory=None, backtrack=self.backtrack, poison=True
        )
        self.spec = KVSpec(1, *head_dims, dtype, torch.device(device))
        self.tokens: dict[Branch, list[int]] = {}
        self.keys, self.values = (torch.zeros(0, 1, dim, dtype=dtype) for dim in head_dims)
        self.plan: TreeAttentionPlan | None = None
        self.places: list[tuple[Any, int]] = []
        self.seen: set[str] = set()

    def start(self, num_rows: int, length: int) -> None:
        branches = self.memory.tree.add_rows(num_rows)
        self.tokens = {branch: [] for branch in branches}
        self.forward([length] * num_rows)

    def forward(self, counts: list[int]) -> None:
        """Append, store, attend, compare."""
        tree = self.memory.tree
        appended = self.memory.append(counts)
        self.memory.make_room(appended)
        if not self.places:
            self.places = [
                self.memory.attach(self.spec, 1, window and window.size) for window in self.windows
            ]
        first, total = len(self.keys), sum(counts)
        fresh = [
            torch.randn(total, 1, d, dtype=torch.float64).to(self.spec.dtype)
            for d in (self.spec.k_head_dim, self.spec.v_head_dim)
        ]
        self.keys, self.values = (
            torch.cat([self.keys, fresh[0]]),
            torch.cat([self.values, fresh[1]]),
        )
        for branch, count in zip(tree.rows, counts, strict=True):
            self.tokens[branch] += range(first, first + count)
            first += count
        slots = [slot for row in appended.slots for slot in row]
        new = [x.transpose(0, 1)[None].to(self.spec.device) for x in fresh]
        self.plan = build_plan(
            tree, counts, max(counts), self.plan, deterministic=self.deterministic
        )
        for window, (storage, layer) in zip(self.windows, self.places, strict=True):
            storage.write(layer, storage.index_slots(slots), None, *new)
            storage.note_read(layer, window and window.size)
            self.compare(window, storage, layer)
            if storage.places is not None and storage.places.version:
                self.seen.add("let go")

    def compare(self, window: Window | None, storage: Any, layer: int) -> None:
        plan = self.plan
        assert plan is not None
        heads, dim = self.group, self.spec.k_head_dim
        q = torch.randn(plan.num_rows, heads, plan.num_new, dim, dtype=torch.float64)
        q = q.to(self.spec.dtype)
        out, lse = run_tree_attention(
            q.to(self.spec.device),
            storage,
            layer,
            plan,
            backend=self.backend,
            scale=dim**-0.5,
            window=window,
        )
        out, lse = out.double().cpu(), lse.double().cpu()
        exact = self.spec.dtype in (torch.float32, torch.float64)
        most = 2e-5 if exact else 1.2e-2
        for row, branch in enumerate(self.memory.tree.rows):
            tokens = self.tokens[branch]
            keys, values = self.keys[tokens, 0].double(), self.values[tokens, 0].double()
            for back in range(plan.counts[row], 0, -1):
                at, column = len(tokens) - back, plan.num_new - back
                begin = 0 if window is None else max(0, window.first_visible(at))
                seen = slice(begin, at + 1)
                scores = q[row, :, column].double() @ keys[seen].T * dim**-0.5
                want = scores.softmax(1) @ values[seen]
                got = out[row, :, column], lse[row, :, column]
                errors = [
                    float((a - b).abs().max())
                    for a, b in zip(got, (want, scores.logsumexp(1)), strict=True)
                ]
                # NaN compares false.
                assert errors[0] <= most and errors[1] <= most, (window, row, back, errors)

    def grow(self, steps: int) -> None:
        """Decode steps without anything between them: work lists are kept."""
        for _ in range(steps):
            self.forward([1] * len(self.memory.tree.rows))

    def change(self) -> str:
        """One random thing to the tree, never further back than what is promised."""
        memory, rng = self.memory, self.rng
        tree = memory.tree
        rows, branches = list(tree.rows), tree.branches
        name = rng.choice(["fork", "fork back", "prune", "select", "hold", "crop", "several"])
        branch = rng.choice(branches)
        length = tree.length(branch)
        back = rng.randint(0, min(length - 1, self.backtrack))
        if name == "fork" and len(branches) < 7:
            (fork,) = tree.fork(branch)
            self.tokens[fork] = list(self.tokens[branch])
            tree.set_rows([*rows, fork][-4:])
        elif name == "fork back" and len(branches) < 7:
            try:
                memory.check_history("fork", branch, length - back)
            except LookupError:
                return "refused"
            (fork,) = tree.fork(branch, at=length - back)
            self.tokens[fork] = self.tokens[branch][: length - back]
            tree.set_rows([*rows[:2], fork])
        elif name == "prune" and len(branches) > 2 and (branch not in rows or len(rows) > 1):
            tree.prune(branch)
            del self.tokens[branch]
        elif name == "select":
            chosen = rng.choices(range(len(rows)), k=rng.randint(1, 4))
            taken = [self.tokens[rows[i]] for i in chosen]
            tree.select(chosen)
            held = {b: self.tokens[b] for b in tree.held}
            self.tokens = held | {b: list(t) for b, t in zip(tree.rows, taken, strict=True)}
        elif name == "hold":
            tree.set_rows(rng.sample(branches, rng.randint(1, min(3, len(branches)))))
        elif name == "crop" and branch in rows:
            try:
                memory.check_history("crop", branch, length - back)
            except LookupError:
                return "refused"
            tree.truncate(branch, length - back)
            del self.tokens[branch][length - back :]
        elif name == "several":
            self.forward([rng.randint(0, 5) for _ in rows[1:]] + [rng.randint(1, 9)])
        memory.let_go()
        return name

    def live(self, changes: int, steps: int) -> set[str]:
        """All of it; what happened."""
        self.start(self.rng.choice([1, 2]), self.scale * self.rng.choice([3, 40]))
        for _ in range(changes):
            self.seen.add(self.change())
            self.grow(self.rng.randint(1, steps))
            self.memory.check_integrity()
        return self.seen


def lives(
    backend: str, seeds: range, changes: int, steps: int, **options: Any
) -> tuple[list[str], set[str]]:
    """What went wrong in the lives of ``seeds``, and what was seen in them."""
    failures, seen = [], set()
    for seed in seeds:
        life = WindowedLife(seed, backend, **options)
        try:
            seen |= life.live(changes, steps)
        except Exception as error:
            failures.append(f"{backend} {seed}: {type(error).__name__}: {error}")
    return failures, seen
