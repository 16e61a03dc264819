"""StaticDecode: one decode step after the other through buffers that stay where they are.

What a captured CUDA graph replays must read lengths, block numbers and slots from fixed addresses.
Needs Triton.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from ..attention.buffers import IntBuffer
from ..attention.launch import Workspace, WorkspaceKey, find_obstacle
from ..attention.plan import Window
from ..memory.growth import Grown, Longs
from ..memory.scatter import Slots, scatter_tokens
from ..memory.storage import KVStorage
from .pending import Pending
from .step import LayerKV, NotCapturable, Step


class StaticDecode:
    """The buffers of decode steps over caches of one kind: equal specs, block size and settings.

    A forward runs on ``bucket`` rows, of which the step's own come first; the others are padding
    that is computed and never stored.

    Attributes:
        pending: what waits for the next operator, which launches of ours are not.
    """

    def __init__(self) -> None:
        self.pending: Pending | None = None
        self._targets: list[_Target] = []
        self._readers: dict[tuple[int, WorkspaceKey], _Reader] = {}
        self._current: _Current | None = None
        self._moves = 0

    @property
    def moves(self) -> int:
        """Changes whenever an address did; what was captured before is then void."""
        return self._moves + sum(r.workspace.generation for r in self._readers.values())

    def prepare(self, step: Step, storages: Sequence[KVStorage], bucket: int) -> None:
        """Bring all buffers up to date for ``step``, which must be a decode step."""
        for i, storage in enumerate(storages):
            if i == len(self._targets):
                self._targets.append(_Target(storage.spec.device))
            self._moves += self._targets[i].load(step.plan.grown, storage, bucket)
        self._current = _Current(step, list(storages), bucket)
        for (i, _), reader in self._readers.items():
            reader.workspace.prepare(step.plan, storages[i], num_merged=bucket, reset=False)
            self._moves += reader.room_for(bucket)

    def reset(self) -> None:
        """Counters to 0, for the case that a launch was aborted. Can be captured."""
        for reader in self._readers.values():
            reader.workspace.reset()

    def advance(self) -> None:
        """Take lengths and slots on by a token, for a step like this one. Can be captured."""
        for target in self._targets:
            target.advance()
        for reader in self._readers.values():
            reader.workspace.advance()

    def advanced(self) -> None:
        """What :meth:`advance` launched, or captured, has run once since :meth:`prepare`.

        Until this is said, as after an exception, nobody knows what the buffers are for.
        """
        now = self._current
        assert now is not None and now.step.plan.grown is not None
        tokens = now.step.plan.grown.tokens + 1
        for target in self._targets:
            target.tokens = tokens
        for reader in self._readers.values():
            reader.workspace.tokens = tokens

    def release(self) -> None:
        """Forget the step; nothing of its cache is kept alive."""
        self._current = self.pending = None

    def items(self) -> tuple[int, ...]:
        """Work items of each launch kind, for which a grid must have programs."""
        works = (reader.workspace.work for reader in self._readers.values())
        return tuple(0 if work is None else work.num_items for work in works)

    def fit(self, grids: Sequence[int]) -> None:
        """Launch on ``grids``, in the order of :meth:`items`; with (), on any that are enough."""
        for i, reader in enumerate(self._readers.values()):
            reader.workspace.grid = grids[i] if grids else None

    def write(
        self, storage: KVStorage, layer: int, keys: torch.Tensor, values: torch.Tensor
    ) -> LayerKV:
        """Store one layer's new K and V ``[bucket, Hkv, 1, D]``; what to attend to.

        Raises:
            NotCapturable: more than the decoding rows is written.
        """
        now = self._current
        assert now is not None
        if keys.shape[0] != now.bucket or keys.shape[2] != 1:
            raise NotCapturable(f"a layer writes K of {tuple(keys.shape)}")
        # First of all: the next operator, be it to find the slots, would write it.
        dtype, rotation = storage.spec.dtype, None
        if self.pending is not None and keys.dtype == values.dtype == dtype:
            rotation = self.pending.take_rotation(keys)
        slots = self._targets[now.index(storage)].slots(storage, layer)
        if rotation is not None:
            rotation.write(values, slots)
        else:
            scatter_tokens(keys.to(dtype), values.to(dtype), slots)
        return LayerKV(now.padded, storage, layer, (keys, values), "triton", _refuse, self.attend)

    def attend(
        self,
        kv: LayerKV,
        query: torch.Tensor,
        *,
        scale: float,
        window: Window | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of ``query [bucket, Hq, 1, Dk]``: ``[bucket, Hq, 1, Dv]``, padding finite.

        Args:
            out: ``[bucket, 1, Hq, Dv]`` contiguous, where to put it; default a buffer that the next
                call overwrites.

        Raises:
            NotCapturable: the fused kernel cannot serve the layer.
        """
        now, storage = self._current, kv.storage
        assert now is not None
        if self.pending is not None:
            self.pending.write()
        obstacle = find_obstacle(query, storage, scale)
        if obstacle is not None:
            raise NotCapturable(obstacle)
        group = query.shape[1] // storage.spec.num_kv_heads
        key = WorkspaceKey(storage.spec, group, window, now.step.plan.deterministic)
        reader = self._reader(now, now.index(storage), key)
        out = reader.out[: now.bucket] if out is None else out
        lse = reader.lse[: now.bucket]
        query = query if query.stride(3) == 1 else query.contiguous()
        reader.workspace.launch(
            query, storage, kv.layer, out, lse, scale=scale, softcap=softcap, sinks=sinks
        )
        return out.transpose(1, 2)

    def _reader(self, now: _Current, index: int, key: WorkspaceKey) -> _Reader:
        reader = self._readers.get((index, key))
        if reader is None:
            if key.spec.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                raise NotCapturable("a layer attends in a way that it did not before")
            reader = self._readers[index, key] = _Reader(key)
            plan, storage = now.step.plan, now.storages[index]
            reader.workspace.prepare(plan, storage, num_merged=now.bucket)
            reader.room_for(now.bucket)
        return reader


def _refuse(reason: str) -> Any:
    raise NotCapturable(f"a layer reads dense K/V ({reason})")


@dataclass
class _Current:
    """The step that the buffers are for."""

    step: Step
    storages: list[KVStorage]
    bucket: int

    @cached_property
    def padded(self) -> Step:
        """As layers see it; a replay needs none."""
        return replace(self.step, counts=[1] * self.bucket, padding_known=True)

    def index(self, storage: KVStorage) -> int:
        return next(i for i, other in enumerate(self.storages) if other is storage)


class _Target:
    """Where the new tokens of a step go in one storage.

    Attributes:
        tokens: of the rows' clock, for which the buffer is right; None where that is not known.
    """

    def __init__(self, device: torch.device) -> None:
        self.tokens: int | None = None
        self._ints = IntBuffer(device)
        self._last: tuple[object, Longs] | None = None

    def advance(self) -> None:
        """Take each row on by a slot, as is right where none needs a new block."""
        self._ints["offsets"].add_(1)

    def load(self, grown: Grown | None, storage: KVStorage, bucket: int) -> bool:
        """Have the places of one new token a row; whether the buffer had to move."""
        assert grown is not None
        ints, rows = self._ints, len(grown.blocks)
        moved = ints.ensure(rows=1, k_blocks=bucket, v_blocks=bucket, offsets=bucket)
        last, self._last = self._last, (grown.growth.mark, grown.blocks)
        tokens, self.tokens = self.tokens, None
        same = last is not None and last[0] is grown.growth.mark and last[1] is grown.blocks
        if same and tokens == grown.tokens and not moved:
            return False  # all rows are within the blocks they were in
        k_numbers, v_numbers = storage.numbers_of(grown.blocks)
        ints.host("rows")[0] = rows
        ints.host("k_blocks")[:rows] = k_numbers
        ints.host("v_blocks")[:rows] = v_numbers
        ints.host("offsets")[:rows] = grown.offsets
        ints.send("rows", "offsets")
        return moved

    def slots(self, storage: KVStorage, layer: int) -> Slots:
        k, v = storage.first_planes(layer)
        ints, size = self._ints, storage.block_size
        return Slots(k, v, ints["rows"], ints["k_blocks"], ints["v_blocks"], ints["offsets"], size)


class _Reader:
    """One kind of launch, and where it puts its results."""

    def __init__(self, key: WorkspaceKey) -> None:
        self.workspace = Workspace(key, fixed=True, overlap=True)
        self.out = self.lse = torch.empty(0, device=key.spec.device)

    def room_for(self, bucket: int) -> bool:
        """Have results of ``bucket`` rows; whether they had to move."""
        if self.out.shape[0] >= bucket:
            return False
        key = self.workspace.key
        heads = key.spec.num_kv_heads * key.group_size
        shape = (bucket, 1, heads, key.spec.v_head_dim)
        with torch.inference_mode(False):
            # Zeros: no item writes the rows of padding, and what follows must stay finite there.
            self.out = torch.zeros(shape, dtype=key.spec.dtype, device=key.spec.device)
            self.lse = torch.zeros(shape[:3], device=key.spec.device)
        return True


def layouts(storages: Sequence[KVStorage]) -> tuple[Hashable, Hashable]:
    """What a captured graph relies on of the shape of ``storages``, and their addresses."""
    shapes = tuple((s.spec, s.window, s.block_size, s.slab_blocks, s.num_layers) for s in storages)
    return shapes, tuple(s.first_planes(0)[0].data_ptr() for s in storages)
