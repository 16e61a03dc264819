"""Step: what one forward decided once, and the K/V that its handles stand for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from ..attention.plan import TreeAttentionPlan
from ..errors import HistoryFreed, StaleHandle, UnsupportedModel
from ..memory.growth import AppendPlan
from ..memory.storage import KVStorage, SlabIndex
from ..sending import send, to_device

UNKNOWN_READER = "read outside of tree attention"
"""Why K/V were gathered when it was not our attention that asked."""


@dataclass(eq=False)
class DenseView:
    """Rows as transformers sees them: ``columns`` of equal number, shorter rows padded on the left.

    Attributes:
        tables: block table of each row.
        lengths: tokens of each row.
        columns: L.
    """

    tables: list[list[int]]
    lengths: Sequence[int]
    columns: int
    _indices: dict[Any, tuple[SlabIndex, torch.Tensor | None]] = field(default_factory=dict)

    def index(self, storage: KVStorage) -> tuple[SlabIndex, torch.Tensor | None]:
        """Slots of every column of every row, and ``[B, L]`` bool of padding (None: no padding)."""
        key, device = storage.index_key, storage.spec.device
        if key not in self._indices:
            size = storage.block_size
            width = max((len(table) for table in self.tables), default=0) or 1
            padded = [table + [0] * (width - len(table)) for table in self.tables]
            pads = self.columns - torch.tensor(self.lengths, dtype=torch.int64)
            positions = torch.arange(self.columns) - pads[:, None]
            padding = positions < 0
            positions = positions.clamp_min(0)
            tables = torch.tensor(padded, dtype=torch.int64).view(-1, width)
            blocks = tables.gather(1, positions // size)
            slots = (blocks * size + positions % size).flatten()
            index = storage.index_slots(slots)
            self._indices[key] = index, send(padding, device) if bool(padding.any()) else None
        return self._indices[key]


def gather_dense(
    view: DenseView, storage: KVStorage, layer: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense K ``[B, Hkv, L, Dk]`` and V ``[B, Hkv, L, Dv]``; padding, and what the layer's window
    let go, as zeros."""
    slots, padding = view.index(storage)
    dense = []
    for flat in storage.gather_slots(layer, slots):
        rows = flat.unflatten(0, (len(view.lengths), view.columns))
        if padding is not None:
            rows = rows.masked_fill(padding[:, :, None, None], 0)
        # Contiguous, as DynamicCache's are: some models take views of them.
        dense.append(rows.transpose(1, 2).contiguous())
    return dense[0], dense[1]


@dataclass(eq=False)
class Step:
    """One forward of one cache: what was decided once and serves every layer.

    Attributes:
        before: columns of the cache before this forward.
        num_new: T, columns that this forward adds.
        counts: tokens that it adds to each row; fewer than T where a row begins with padding.
        plan: the attention work list.
        appended: where the new tokens go.
        read_tables: gives the block table of each row while the step is alive.
        forked_from: rows before an automatic fork, else None.
        padding_known: padding is exactly what the cache left out, so a 2-D mask says nothing new.
        prefill_asked, prefill_computed: tokens for the books, 0 when decoding.
        alive: false once the cache has moved on; handles of this forward are then stale.
        finished: every layer has been written.
        written: ``id`` of every layer already written.
    """

    before: int
    num_new: int
    counts: Sequence[int]
    plan: TreeAttentionPlan
    appended: AppendPlan
    read_tables: Callable[[], list[list[int]]]
    forked_from: int | None
    padding_known: bool
    prefill_asked: int
    prefill_computed: int
    alive: bool = True
    finished: bool = False
    written: set[int] = field(default_factory=set)
    _write_indices: dict[Any, tuple[SlabIndex, torch.Tensor | None]] = field(default_factory=dict)

    @property
    def columns(self) -> int:
        return self.before + self.num_new

    @cached_property
    def fresh(self) -> bool:
        """The new K/V are all there is."""
        return self.before == 0

    @cached_property
    def dense_view(self) -> DenseView:
        return DenseView(self.read_tables(), self.plan.lengths, self.columns)

    def write_index(self, storage: KVStorage) -> tuple[SlabIndex, torch.Tensor | None]:
        """Where new tokens go, and which of the B * T they are (None: all)."""
        key, device = storage.index_key, storage.spec.device
        if key not in self._write_indices:
            written = self.appended.flat_slots()
            kept_all = storage.places is None or not storage.places.lack(
                written // storage.block_size
            )
            assert kept_all
            slots = storage.index_slots(torch.from_numpy(written))
            source = None
            steady = self.num_new == 1 and self.plan.grown is not None
            if not steady and min(self.counts, default=0) < self.num_new:
                kept = [
                    row * self.num_new + column
                    for row, count in enumerate(self.counts)
                    for column in range(self.num_new - count, self.num_new)
                ]
                source = to_device(kept, device)
            self._write_indices[key] = slots, source
        return self._write_indices[key]


class NotCapturable(Exception):
    """A decode step does something that a CUDA graph could not repeat; the message says what."""


@dataclass(eq=False)
class LayerKV:
    """K and V of one layer in one forward, behind both of its handles.

    Attributes:
        step: the forward.
        storage: holds this forward's tokens already.
        layer: position of the layer in ``storage``.
        new: the new K ``[B, Hkv, T, Dk]`` and V ``[B, Hkv, T, Dv]`` as the model made them.
        backend: attends when the fast path serves.
        on_dense: told why, when somebody asks for the dense tensors of a layer with a past.
        attend: attends in the place of ``backend``, see :meth:`.static.StaticDecode.attend`.
    """

    step: Step
    storage: KVStorage
    layer: int
    new: tuple[torch.Tensor, torch.Tensor]
    backend: str
    on_dense: Callable[[str], None]
    attend: Callable[..., torch.Tensor] | None = None
    _dense: tuple[torch.Tensor, torch.Tensor] | None = None

    def dense(self, reason: str) -> tuple[torch.Tensor, torch.Tensor]:
        """K ``[B, Hkv, L, Dk]`` and V ``[B, Hkv, L, Dv]``, left-padded with zeros.

        Raises:
            StaleHandle: the cache has moved on.
            HistoryFreed: nobody knows how far ``reason`` looks back, and tokens were let go.
        """
        if self.step.fresh:
            return self.new
        if reason == UNKNOWN_READER:
            self.note_read(None)
        if self._dense is None:
            if not self.step.alive:
                raise StaleHandle(
                    "K/V of an earlier forward were used after the cache had moved on (a forward, "
                    "select, crop or reset). Use them within the forward, or read "
                    "cache.layers[i].keys."
                )
            self.on_dense(reason)
            keys, values = gather_dense(self.step.dense_view, self.storage, self.layer)
            self._dense = self.guard(keys), self.guard(values)
        return self._dense

    def note_read(self, reach: int | None) -> None:
        """The layer is read at most ``reach`` tokens back (None: all).

        Raises:
            HistoryFreed: that is further than its window, and tokens were let go.
        """
        storage = self.storage
        if storage.note_read(self.layer, reach) or storage.places is None:
            return
        if any(storage.places.lack(table) for table in self.step.read_tables()):
            raise HistoryFreed(
                f"A layer whose window is {storage.window} tokens by the model's config is read "
                f"{'all the way' if reach is None else f'{reach} tokens'} back, where its tokens "
                "were let go. Leave tree attention enabled while the cache is in use and pass no "
                "4-D mask of your own, or keep everything: TreeCache(backtrack=None)."
            )

    def guard(self, tensor: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        """``tensor``, made of stored K/V: a backward through it says why there is no gradient.

        Args:
            others: what else it was made of without a gradient.
        """
        if torch.is_grad_enabled():
            for source in (*self.new, *others):
                if source.requires_grad:
                    return _WithoutGradient.apply(tensor, source)
        return tensor


class _WithoutGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        raise UnsupportedModel(
            "backward through a TreeCache with a past: stored K/V have no gradient. Use a "
            "DynamicCache to train through a cache, or torch.no_grad() to generate."
        )
