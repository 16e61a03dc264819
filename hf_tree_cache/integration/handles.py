"""PagedKV and TreeMask: what travels through a model in place of dense K/V and 4-D masks.

Both are plain Python objects that our attention function recognises. Anything else that touches one
gets the dense tensor, made on the spot, so a model that works on K/V itself is slower, not wrong.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from transformers.masking_utils import causal_mask_function, sdpa_mask

from ..attention.plan import TreeAttentionPlan, Window
from ..errors import StaleHandle
from ..memory.storage import KVStorage, SlabIndex

UNKNOWN_READER = "read outside of tree attention"
"""Why K/V were gathered when it was not our attention that asked."""


class _Materialising:
    """Becomes its :meth:`dense` tensor as soon as anyone uses it as one."""

    def dense(self) -> torch.Tensor:
        raise NotImplementedError

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        def unwrap(value: Any) -> Any:
            if isinstance(value, _Materialising):
                return value.dense()
            if isinstance(value, (list, tuple)):
                return type(value)(unwrap(item) for item in value)
            return value

        return func(*unwrap(args), **{key: unwrap(value) for key, value in (kwargs or {}).items()})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.dense(), name)

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self.dense()[index]

    def __len__(self) -> int:
        return len(self.dense())


def _forward_operator(name: str) -> Callable[..., Any]:
    apply = getattr(operator, name)

    def method(self: _Materialising, *others: Any) -> Any:
        others = tuple(o.dense() if isinstance(o, _Materialising) else o for o in others)
        return apply(self.dense(), *others)

    return method


def _reflected_operator(name: str) -> Callable[..., Any]:
    apply = getattr(operator, name)
    return lambda self, other: apply(other, self.dense())


for _name in ("add", "sub", "mul", "truediv", "matmul", "and_", "or_"):
    setattr(_Materialising, f"__{_name.strip('_')}__", _forward_operator(_name))
    setattr(_Materialising, f"__r{_name.strip('_')}__", _reflected_operator(_name))
for _name in ("neg", "invert", "lt", "le", "gt", "ge"):
    setattr(_Materialising, f"__{_name}__", _forward_operator(_name))


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
    _indices: dict[torch.device, tuple[SlabIndex, torch.Tensor | None]] = field(
        default_factory=dict
    )

    def index(self, storage: KVStorage) -> tuple[SlabIndex, torch.Tensor | None]:
        """Slots of every column of every row, and ``[B, L]`` bool of padding (None: there is none)."""
        device = storage.spec.device
        if device not in self._indices:
            size = storage.block_size
            width = max(1, *(len(table) for table in self.tables))
            padded = [table + [0] * (width - len(table)) for table in self.tables]
            pads = self.columns - torch.tensor(self.lengths)
            positions = torch.arange(self.columns) - pads[:, None]
            padding = positions < 0
            positions = positions.clamp_min(0)
            blocks = torch.tensor(padded).gather(1, positions // size)
            slots = (blocks * size + positions % size).flatten()
            index = SlabIndex.of(slots, storage.slab_blocks * size, device)
            self._indices[device] = index, padding.to(device) if bool(padding.any()) else None
        return self._indices[device]


def gather_dense(
    view: DenseView, storage: KVStorage, layer: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense K ``[B, Hkv, L, Dk]`` and V ``[B, Hkv, L, Dv]``, padding as zeros."""
    slots, padding = view.index(storage)
    dense = []
    for flat in storage.gather_slots(layer, slots):
        rows = flat.unflatten(0, (len(view.lengths), view.columns))
        if padding is not None:
            rows = rows.masked_fill(padding[:, :, None, None], 0)
        dense.append(rows.transpose(1, 2))
    return dense[0], dense[1]


@dataclass(eq=False)
class Step:
    """One forward of one cache: what was decided once and serves every layer.

    Attributes:
        before: columns of the cache before this forward.
        num_new: T, columns that this forward adds.
        counts: tokens that it adds to each row; fewer than T where a row begins with padding.
        plan: the attention work list.
        slots: slots of the new tokens, row by row.
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
    counts: list[int]
    plan: TreeAttentionPlan
    slots: list[list[int]]
    read_tables: Callable[[], list[list[int]]]
    forked_from: int | None
    padding_known: bool
    prefill_asked: int
    prefill_computed: int
    alive: bool = True
    finished: bool = False
    written: set[int] = field(default_factory=set)
    _write_indices: dict[torch.device, tuple[SlabIndex, torch.Tensor | None]] = field(
        default_factory=dict
    )

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
        device = storage.spec.device
        if device not in self._write_indices:
            slab = storage.slab_blocks * storage.block_size
            slots = SlabIndex.of([slot for row in self.slots for slot in row], slab, device)
            source = None
            if min(self.counts, default=0) < self.num_new:
                kept = [
                    row * self.num_new + column
                    for row, count in enumerate(self.counts)
                    for column in range(self.num_new - count, self.num_new)
                ]
                source = torch.tensor(kept, dtype=torch.int64, device=device)
            self._write_indices[device] = slots, source
        return self._write_indices[device]


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
    """

    step: Step
    storage: KVStorage
    layer: int
    new: tuple[torch.Tensor, torch.Tensor]
    backend: str
    on_dense: Callable[[str], None]
    _dense: tuple[torch.Tensor, torch.Tensor] | None = None

    def dense(self, reason: str) -> tuple[torch.Tensor, torch.Tensor]:
        """K ``[B, Hkv, L, Dk]`` and V ``[B, Hkv, L, Dv]``, left-padded with zeros.

        Raises:
            StaleHandle: the cache has moved on.
        """
        if self.step.fresh:
            return self.new
        if self._dense is None:
            if not self.step.alive:
                raise StaleHandle(
                    "K/V of an earlier forward were used after the cache had moved on (a forward, "
                    "select, crop or reset). Use them within the forward, or read "
                    "cache.layers[i].keys."
                )
            self.on_dense(reason)
            self._dense = gather_dense(self.step.dense_view, self.storage, self.layer)
        return self._dense


class PagedKV(_Materialising):
    """The keys (``which`` 0) or values (1) of one layer, not gathered. ``[B, Hkv, L, D]``."""

    def __init__(self, source: LayerKV, which: int) -> None:
        self.source = source
        self.which = which

    @property
    def shape(self) -> torch.Size:
        new = self.source.new[self.which].shape
        return torch.Size((new[0], new[1], self.source.step.columns, new[3]))

    @property
    def dtype(self) -> torch.dtype:
        return self.source.storage.spec.dtype

    @property
    def device(self) -> torch.device:
        return self.source.storage.spec.device

    @property
    def ndim(self) -> int:
        return 4

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Itself when it is there already (shared-KV layers pass handles on), else the dense tensor."""
        devices = [a for a in (*args, *kwargs.values()) if isinstance(a, (torch.device, str))]
        if len(devices) == len(args) + len(kwargs) and torch.device(devices[0]) == self.device:
            return self
        return self.dense().to(*args, **kwargs)

    def dense(self) -> torch.Tensor:
        return self.source.dense(UNKNOWN_READER)[self.which]

    def __repr__(self) -> str:
        return f"PagedKV({'values' if self.which else 'keys'}, shape={tuple(self.shape)})"


class TreeMask(_Materialising):
    """A mask that nobody has needed as a tensor yet.

    Args:
        arguments: what transformers passed to the mask function.
    """

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.arguments = arguments

    @property
    def padding(self) -> torch.Tensor | None:
        """The 2-D mask, bool ``[B, L]``, true on tokens; None where there is none."""
        return self.arguments.get("attention_mask")

    @cached_property
    def all_tokens(self) -> bool:
        """Whether no column is padding. Reads the mask: a synchronisation on a GPU."""
        return self.padding is None or bool(self.padding.all())

    @cached_property
    def pattern(self) -> tuple[bool, Window | None]:
        """(recognised, window): causal, perhaps within a window; anything else is not recognised."""
        if self.arguments.get("use_vmap"):
            return False, None
        return _read_pattern(self.arguments["mask_function"])

    @cached_property
    def _dense(self) -> torch.Tensor:
        arguments = {**self.arguments, "allow_is_causal_skip": False}
        arguments["allow_is_bidirectional_skip"] = False
        mask = sdpa_mask(**arguments)
        assert mask is not None
        return mask

    def dense(self) -> torch.Tensor:
        """``[B, 1, T, L]`` bool, true where a query may look."""
        return self._dense

    def to(self, *args: Any, **kwargs: Any) -> TreeMask:
        """The same mask with its 2-D part moved; accelerate calls this on every argument."""
        moved = dict(self.arguments)
        if self.padding is not None:
            moved["attention_mask"] = self.padding.to(*args, **kwargs)
        for device in (*args, *kwargs.values()):
            if isinstance(device, (torch.device, str, int)) and not isinstance(device, bool):
                moved["device"] = torch.device(device)
        return TreeMask(moved)

    def contiguous(self) -> TreeMask:
        return self

    def __repr__(self) -> str:
        recognised, window = self.pattern
        return f"TreeMask({window or 'causal' if recognised else 'unrecognised'})"


def _read_pattern(function: Callable[..., Any]) -> tuple[bool, Window | None]:
    """Recognise causal, sliding-causal and chunked-causal mask functions by what they close over."""
    if function is causal_mask_function:
        return True, None
    parts = _closure(function).get("mask_functions")
    if not function.__qualname__.startswith("and_masks") or parts is None or len(parts) != 2:
        return False, None
    overlay, base = parts
    if base is not causal_mask_function:
        return False, None
    variables = _closure(overlay)
    if overlay.__qualname__.startswith("sliding_window_overlay"):
        return True, Window("sliding", int(variables["sliding_window"]))
    if overlay.__qualname__.startswith("chunked_overlay"):
        return True, Window("chunked", int(variables["chunk_size"]))
    return False, None


def _closure(function: Callable[..., Any]) -> dict[str, Any]:
    names = function.__code__.co_freevars
    return {
        name: cell.cell_contents
        for name, cell in zip(names, function.__closure__ or (), strict=True)
    }
