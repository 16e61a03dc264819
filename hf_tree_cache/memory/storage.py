"""KVStorage: the tensors behind the blocks, for all layers of one kind."""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from ..errors import ScatteredStorage, StorageMismatch
from ..sending import send, to_device
from .places import BLANK, BlockPlaces

MAX_NUMBER = 1 << 30
"""Distance between blocks, in blocks, up to which the kernel's int32 arithmetic holds."""


@dataclass(frozen=True, slots=True)
class KVSpec:
    """What the K/V of a layer look like. Layers with equal specs share slabs."""

    num_kv_heads: int
    k_head_dim: int
    v_head_dim: int
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, keys: torch.Tensor, values: torch.Tensor) -> KVSpec:
        """The spec of ``keys`` ``[B, Hkv, T, Dk]`` and ``values`` ``[B, Hkv, T, Dv]``.

        Both are stored in the wider of their dtypes: under autocast they may differ.
        """
        if keys.ndim != 4 or values.ndim != 4 or keys.shape[:3] != values.shape[:3]:
            raise StorageMismatch(
                f"update got keys {tuple(keys.shape)} and values {tuple(values.shape)}; expected "
                "[batch, kv heads, tokens, head dim] for both, equal in the first three."
            )
        if keys.device != values.device:
            raise StorageMismatch(
                f"update got keys on {keys.device} and values on {values.device}; they must agree."
            )
        dtype = torch.promote_types(keys.dtype, values.dtype)
        return cls(keys.shape[1], keys.shape[3], values.shape[3], dtype, keys.device)

    def block_bytes(self, block_size: int) -> int:
        """Bytes of K and V of one block in one layer."""
        width = self.num_kv_heads * (self.k_head_dim + self.v_head_dim)
        return block_size * width * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class SlabIndex:
    """Positions in slabs, ready for one device: made once per forward, used by every layer.

    Attributes:
        parts: for each slab concerned, its number, the positions inside it (int64) and where these
            stand in the whole list (int64, None when one slab holds them all).
        size: how many positions there are.
        run: (slab, first position) when all positions follow each other in one slab.
    """

    parts: tuple[tuple[int, torch.Tensor, torch.Tensor | None], ...]
    size: int
    run: tuple[int, int] | None = None

    @classmethod
    def of(
        cls, positions: Sequence[int] | torch.Tensor, slab_size: int, device: torch.device
    ) -> SlabIndex:
        """Split global ``positions`` (blocks, or slots) among slabs of ``slab_size`` of them."""
        whole = torch.as_tensor(positions, dtype=torch.int64)
        count = len(whole)
        if not count:
            return cls((), 0)
        low, high = int(whole.min()), int(whole.max())
        slab = low // slab_size
        if slab == high // slab_size:
            local = whole - slab * slab_size
            follows = high - low == count - 1 and bool((local.diff() == 1).all())
            part = (slab, send(local, device), None)
            return cls((part,), count, (slab, low - slab * slab_size) if follows else None)
        slabs = whole // slab_size
        parts = []
        for number in slabs.unique().tolist():
            where = (slabs == number).nonzero().squeeze(1)
            local = whole[where] - number * slab_size
            parts.append((number, send(local, device), send(where, device)))
        return cls(tuple(parts), count)


class KVReader(Protocol):
    """What an attention backend in torch needs of a :class:`KVStorage`, which documents it."""

    spec: KVSpec
    block_size: int

    @property
    def index_key(self) -> tuple[Any, ...]: ...

    @property
    def forgets(self) -> bool: ...

    def index_blocks(self, blocks: Sequence[int]) -> SlabIndex: ...

    def index_stretches(
        self, positions: Sequence[int] | npt.NDArray[np.int64], least: int, *, slots: bool = False
    ) -> tuple[SlabIndex, ...]: ...

    def index_slots(self, slots: Sequence[int] | torch.Tensor) -> SlabIndex: ...

    def gather_blocks(self, layer: int, blocks: SlabIndex) -> tuple[torch.Tensor, torch.Tensor]: ...

    def gather_slots(self, layer: int, slots: SlabIndex) -> tuple[torch.Tensor, torch.Tensor]: ...


class KVStorage:
    """K and V of ``num_layers`` layers of one kind, in slabs that are never moved.

    A slab holds ``slab_blocks`` blocks of every layer, as planes: for each layer all its K blocks,
    then all its V blocks, so that blocks with neighbouring numbers are neighbours in memory::

        slab 0 | layer 0: K of blocks 0..n-1 | V of blocks 0..n-1 | layer 1: K ... | V ... | ...
        slab 1 | layer 0: K of blocks n..2n-1 | ...

    Slabs are equal in size and aligned so that the distance between any two is a whole number of
    blocks: :meth:`block_numbers` gives one int32 a block that serves every layer, relative to that
    layer's base in the first slab, and growing changes none of them.

    Callers name blocks by the ids of a tree. Without a window these are the storage's own; with
    one, the storage has ``places`` for those it still keeps, and reads zeros for the others.

    Args:
        spec: heads, head dims, dtype and device.
        num_layers: layers that share the slabs.
        block_size: token slots of a block.
        slab_blocks: blocks of a slab.
        window: tokens that a query of these layers looks back to at most, itself included; None
            where that is not known, or where all tokens are kept.
        poison: fill new slabs with NaN, to make a read of unwritten slots visible.

    Attributes:
        places: where blocks lie; None where they lie where their ids say.
    """

    def __init__(
        self,
        spec: KVSpec,
        num_layers: int,
        block_size: int,
        slab_blocks: int,
        *,
        window: int | None = None,
        poison: bool = False,
    ) -> None:
        self.spec = spec
        self.num_layers = num_layers
        self.block_size = block_size
        self.slab_blocks = slab_blocks
        self.window = window
        self.places = None if window is None else BlockPlaces()
        self._within: set[int] = set()  # layers that were read within the window
        self._needs_all = False
        self._poison = poison
        self._attached = 0
        self._most_blocks = 0  # that room was asked for
        self._numbers: tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]] | None = None
        self._k_slabs: list[torch.Tensor] = []  # [num_layers, slab_blocks * block_size, Hkv, Dk]
        self._v_slabs: list[torch.Tensor] = []
        self._k_blocks: list[torch.Tensor] = []  # [num_layers, slab_blocks, block_size, Hkv, Dk]
        self._v_blocks: list[torch.Tensor] = []

    @property
    def _slab_slots(self) -> int:
        return self.slab_blocks * self.block_size

    @property
    def num_blocks(self) -> int:
        """Blocks that there is room for."""
        return len(self._k_slabs) * self.slab_blocks

    @property
    def has_room(self) -> bool:
        """Whether :meth:`add_layer` can be called once more."""
        return self._attached < self.num_layers

    @property
    def num_attached(self) -> int:
        """Layers that were added."""
        return self._attached

    @property
    def layer_block_bytes(self) -> int:
        """Bytes of K and V of one block in one layer."""
        return self.spec.block_bytes(self.block_size)

    @property
    def attached_block_bytes(self) -> int:
        """Bytes of one block over the layers that were added."""
        return self._attached * self.layer_block_bytes

    @property
    def slab_bytes(self) -> int:
        return self.slab_blocks * self.num_layers * self.layer_block_bytes

    @property
    def allocated_bytes(self) -> int:
        return len(self._k_slabs) * self.slab_bytes

    @property
    def forgets(self) -> bool:
        """Whether blocks may have no place any more."""
        return self.places is not None

    @property
    def may_forget(self) -> bool:
        """Whether every layer is known to read within the window, and nobody read more."""
        return self.forgets and not self._needs_all and len(self._within) == self._attached > 0

    @property
    def index_key(self) -> tuple[Any, ...]:
        """A :class:`SlabIndex` serves every storage with this key, for as long as it has it."""
        places = self.places
        return self.spec.device, places, 0 if places is None else places.version

    def note_read(self, layer: int, reach: int | None) -> bool:
        """``layer`` is read ``reach`` tokens back at most (None: all); whether that is foreseen.

        From the first read on that is not, nothing is forgotten any more.
        """
        if self.window is not None and (reach is None or reach > self.window):
            self._needs_all = True
            return False
        self._within.add(layer)
        return True

    def num_kept(self, num_used: int) -> int:
        """Blocks kept, of ``num_used`` that the tree has."""
        return num_used if self.places is None else self.places.num_used

    def keeps(self, block: int) -> bool:
        """Whether ``block``, of the tree, was not let go."""
        return self.places is None or not self.places.lack([block])

    def room_for(self, num_blocks: int) -> int:
        """Blocks of this storage that must have room, for ``num_blocks`` ids of the tree."""
        return num_blocks if self.places is None else self.places.num_blocks

    def take(self, blocks: Sequence[int]) -> None:
        """Keep ``blocks``, new ones of the tree; :meth:`ensure` makes room for them."""
        if self.places is not None:
            self.places.take(blocks)

    def release(self, blocks: Sequence[int]) -> bool:
        """Nobody reads ``blocks`` any more; whether any of them was kept in a place."""
        freed = blocks if self.places is None else self.places.release(blocks)
        if self._poison and freed:
            self._fill(freed, float("nan"))
        return self.places is not None and len(freed) > 0

    def index_blocks(self, blocks: Sequence[int]) -> SlabIndex:
        """Where ``blocks`` are; forgotten ones are zeros."""
        places = torch.from_numpy(self._places_of(blocks))
        return SlabIndex.of(places, self.slab_blocks, self.spec.device)

    def index_stretches(
        self, positions: Sequence[int] | npt.NDArray[np.int64], least: int, *, slots: bool = False
    ) -> tuple[SlabIndex, ...]:
        """As :meth:`index_blocks`, or :meth:`index_slots`, one for each stretch that lies in one
        piece: what is gathered is then a view. One for all where stretches have less than ``least``
        positions on average."""
        places = self._slots_of(positions) if slots else self._places_of(positions)
        slab_size = self._slab_slots if slots else self.slab_blocks
        begins = (np.diff(places) != 1) | (places[1:] % slab_size == 0)
        borders = np.flatnonzero(begins) + 1
        if len(places) < least * (len(borders) + 1):
            borders = borders[:0]
        pieces = map(torch.from_numpy, np.split(places, borders))
        return tuple(SlabIndex.of(x, slab_size, self.spec.device) for x in pieces)

    def index_slots(self, slots: Sequence[int] | torch.Tensor) -> SlabIndex:
        """Where ``slots`` are, ``block * block_size + offset``; those of forgotten blocks are 0."""
        if self.places is not None:
            slots = torch.from_numpy(self._slots_of(slots))
        return SlabIndex.of(slots, self._slab_slots, self.spec.device)

    def numbers_of(
        self, blocks: npt.NDArray[Any], planes: int = 2
    ) -> tuple[npt.NDArray[np.int32], ...]:
        """:meth:`block_numbers` of ``blocks``, for K and, with two ``planes``, for V."""
        if self.places is not None:
            blocks = self.places.of(blocks)
        return tuple(numbers.take(blocks) for numbers in self._all_numbers()[:planes])

    def add_layer(self) -> int:
        """Give the next layer its position."""
        assert self.has_room
        self._attached += 1
        return self._attached - 1

    def ensure(self, num_blocks: int) -> None:
        """Grow until blocks ``0 .. num_blocks - 1`` have room. Nothing stored is moved."""
        self._most_blocks = max(self._most_blocks, num_blocks)
        if num_blocks <= self.num_blocks:
            return
        # Slabs outlive an inference_mode block in which a first prompt may have been read.
        with torch.inference_mode(False):
            while self.num_blocks < num_blocks:
                keys, values = self._new_slab()
                self._k_slabs.append(keys)
                self._v_slabs.append(values)
                self._k_blocks.append(keys.unflatten(1, (self.slab_blocks, self.block_size)))
                self._v_blocks.append(values.unflatten(1, (self.slab_blocks, self.block_size)))
                if self.forgets and len(self._k_slabs) == 1:
                    self._fill([BLANK], 0.0)

    def __deepcopy__(self, memo: dict[int, object]) -> KVStorage:
        twin = KVStorage.__new__(KVStorage)
        twin.__setstate__({**self._state(), "places": deepcopy(self.places, memo)})
        return twin

    def __getstate__(self) -> dict[str, Any]:
        """To be pickled: a view would take all of its slab along."""
        state = self._state()
        return {**state, "kv": [[part.clone() for part in parts] for parts in state["kv"]]}

    def _state(self) -> dict[str, Any]:
        """All there is; of the slabs views, of what room was ever asked for."""
        slots = self._most_blocks * self.block_size
        ends = [max(0, slots - i * self._slab_slots) for i in range(len(self._k_slabs))]
        return {
            "spec": self.spec,
            "sizes": (self.num_layers, self.block_size, self.slab_blocks),
            "options": {"window": self.window, "poison": self._poison},
            "places": self.places,
            "attached": self._attached,
            "reads": (set(self._within), self._needs_all),
            "most_blocks": self._most_blocks,
            "kv": [
                [slab[:, :end] for slab, end in zip(slabs, ends, strict=True)]
                for slabs in (self._k_slabs, self._v_slabs)
            ],
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        k_slabs, v_slabs = state["kv"]
        spec = state["spec"]
        if k_slabs:  # they may have been mapped to another device
            spec = replace(spec, device=k_slabs[0].device)
        self.__init__(spec, *state["sizes"], **state["options"])  # type: ignore[misc]
        self.places = state["places"]
        self._attached = state["attached"]
        self._within, self._needs_all = state["reads"]
        self.ensure(len(k_slabs) * self.slab_blocks)
        self._most_blocks = state["most_blocks"]
        pairs = zip(self._k_slabs + self._v_slabs, k_slabs + v_slabs, strict=True)
        for slab, kept in pairs:
            slab[:, : kept.shape[1]].copy_(kept)

    def write(
        self,
        layer: int,
        slots: SlabIndex,
        source: torch.Tensor | None,
        k: torch.Tensor,
        v: torch.Tensor,
    ) -> None:
        """Store new tokens of one layer.

        Args:
            layer: position of the layer in this storage.
            slots: where the tokens go.
            source: which of the B * T tokens these are, int64; None for all of them in order.
            k: ``[B, Hkv, T, Dk]``.
            v: ``[B, Hkv, T, Dv]``.
        """
        for new, slabs in ((k, self._k_slabs), (v, self._v_slabs)):
            tokens = new.transpose(1, 2).flatten(0, 1)
            if source is not None:
                tokens = tokens.index_select(0, source)
            for slab, local, where in slots.parts:
                part = tokens if where is None else tokens.index_select(0, where)
                slabs[slab][layer].index_copy_(0, local, part)

    def load(self, layer: int, blocks: Sequence[int], k: torch.Tensor, v: torch.Tensor) -> None:
        """Fill ``blocks`` of one layer with ``k [n, S, Hkv, Dk]`` and ``v``."""
        size = self.block_size
        slots = self.index_slots([block * size + i for block in blocks for i in range(size)])
        self.write(layer, slots, None, *(x.flatten(0, 1).transpose(0, 1)[None] for x in (k, v)))

    def copy(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks, ``(source, destination)``, in all layers at once."""
        if self.places is not None:
            places = self.places.of(np.array(copies, np.int64).reshape(-1, 2))
            copies = [(source, destination) for source, destination in places.tolist()]
        groups: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for source, destination in copies:
            key = (source // self.slab_blocks, destination // self.slab_blocks)
            groups.setdefault(key, []).append(
                (source % self.slab_blocks, destination % self.slab_blocks)
            )
        for (from_slab, to_slab), pairs in groups.items():
            index = to_device(pairs, self.spec.device)
            for slabs in (self._k_blocks, self._v_blocks):
                taken = slabs[from_slab].index_select(1, index[:, 0])
                slabs[to_slab].index_copy_(1, index[:, 1], taken)

    def _places_of(self, blocks: Sequence[int] | npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        given = np.asarray(blocks, np.int64)
        return given if self.places is None else self.places.of(given)

    def _slots_of(
        self, slots: Sequence[int] | torch.Tensor | npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        given = np.asarray(slots, np.int64)
        if self.places is None:
            return given
        blocks, offsets = np.divmod(given, self.block_size)
        return self.places.of(blocks) * self.block_size + offsets

    def _fill(self, blocks: Sequence[int], value: float) -> None:
        """Fill ``blocks``, by their places, with ``value`` in all layers."""
        for slab, local, _ in SlabIndex.of(blocks, self.slab_blocks, self.spec.device).parts:
            for slabs in (self._k_blocks, self._v_blocks):
                if slab < len(slabs):
                    slabs[slab].index_fill_(1, local, value)

    def gather_blocks(self, layer: int, blocks: SlabIndex) -> tuple[torch.Tensor, torch.Tensor]:
        """K ``[n, block_size, Hkv, Dk]`` and V ``[n, block_size, Hkv, Dv]`` of n blocks.

        A view where the blocks follow each other in one slab, else a copy. Slots that were never
        written hold anything, NaN included.
        """
        return self._gather(self._k_blocks, layer, blocks), self._gather(
            self._v_blocks, layer, blocks
        )

    def gather_slots(self, layer: int, slots: SlabIndex) -> tuple[torch.Tensor, torch.Tensor]:
        """K ``[n, Hkv, Dk]`` and V ``[n, Hkv, Dv]`` of n slots."""
        return self._gather(self._k_slabs, layer, slots), self._gather(self._v_slabs, layer, slots)

    def block_numbers(self) -> tuple[torch.Tensor, torch.Tensor]:
        """For every place, its distance from the layer's block 0 in units of one K (one V) block.

        Returns:
            int32 ``[num_blocks]`` on the CPU, for K and for V (equal where the head dims are). The
            address of block b of layer l is ``first_planes(l) + numbers[b] * block bytes``.

        Raises:
            ScatteredStorage: slabs lie too far apart for such numbers.
        """
        k_numbers, v_numbers = map(torch.from_numpy, self._all_numbers())
        return k_numbers, v_numbers

    def _all_numbers(self) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        if self._numbers is None or len(self._numbers[0]) != self.num_blocks:
            inside = np.arange(self.slab_blocks)
            numbers = []
            for slabs in (self._k_slabs, self._v_slabs):
                unit = slabs[0].stride(1) * self.block_size * self.spec.dtype.itemsize
                steps = [(slab.data_ptr() - slabs[0].data_ptr()) // unit for slab in slabs]
                furthest = max(map(abs, steps))
                if furthest >= MAX_NUMBER:
                    raise ScatteredStorage(
                        f"Slabs of this cache lie {furthest * unit >> 30} GiB apart on "
                        f"{self.spec.device}. The fused kernel reaches {MAX_NUMBER * unit >> 30} "
                        f"GiB with blocks of {unit} bytes. Use TreeCache(backend='torch'), or a "
                        "larger block_size."
                    )
                numbers.append(np.concatenate([inside + step for step in steps]).astype(np.int32))
            self._numbers = numbers[0], numbers[1]
        return self._numbers

    def first_planes(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K ``[slots, Hkv, Dk]`` and V ``[slots, Hkv, Dv]`` of one layer in the first slab."""
        return self._k_slabs[0][layer], self._v_slabs[0][layer]

    def _new_slab(self) -> tuple[torch.Tensor, torch.Tensor]:
        spec, slots = self.spec, self.slab_blocks * self.block_size
        k_row, v_row = spec.num_kv_heads * spec.k_head_dim, spec.num_kv_heads * spec.v_head_dim
        layer = slots * (k_row + v_row)
        unit = math.lcm(k_row, v_row) * self.block_size
        size = self.num_layers * layer
        flat = _allocate(size + unit, spec)
        offset = 0
        if self._k_slabs:
            distance = (flat.data_ptr() - self._k_slabs[0].data_ptr()) // spec.dtype.itemsize
            offset = -distance % unit
        if self._poison:
            flat.fill_(float("nan"))

        def plane(start: int, head_dim: int) -> torch.Tensor:
            return flat.as_strided(
                (self.num_layers, slots, spec.num_kv_heads, head_dim),
                (layer, spec.num_kv_heads * head_dim, head_dim, 1),
                offset + start,
            )

        return plane(0, spec.k_head_dim), plane(slots * k_row, spec.v_head_dim)

    @staticmethod
    def _gather(slabs: list[torch.Tensor], layer: int, index: SlabIndex) -> torch.Tensor:
        if index.run is not None:
            slab, first = index.run
            return slabs[slab][layer, first : first + index.size]
        if len(index.parts) == 1:
            slab, local, _ = index.parts[0]
            return slabs[slab][layer].index_select(0, local)
        out = slabs[0].new_empty((index.size, *slabs[0].shape[2:]))
        for slab, local, where in index.parts:
            assert where is not None
            out.index_copy_(0, where, slabs[slab][layer].index_select(0, local))
        return out


def _allocate(count: int, spec: KVSpec) -> torch.Tensor:
    """``count`` uninitialised elements.

    On a CPU in a mapping of their own: malloc serves some slabs from the heap and others from
    mappings, terabytes away, where block numbers do not reach.
    """
    if spec.device.type != "cpu":
        return torch.empty(count, dtype=spec.dtype, device=spec.device)
    # Shared mappings, the default, would let forked processes write to each other's K/V.
    flags = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if os.name == "posix" else {}
    size = count * spec.dtype.itemsize
    try:
        memory = mmap.mmap(-1, size, **flags)
    except OSError as error:
        raise MemoryError(f"no {size} bytes for a slab: {error}") from error
    return torch.frombuffer(memory, dtype=spec.dtype)
