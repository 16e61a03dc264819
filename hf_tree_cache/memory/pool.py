"""StoragePool: every storage of a cache, grown, copied and bounded together."""

from __future__ import annotations

from collections.abc import Sequence
from operator import mul

import torch

from ..errors import InvalidArgument, OutOfBlocks
from .storage import KVSpec, KVStorage

SLAB_BYTES = 128 << 20
"""Aim for the size of a slab, over all layers that share it."""


class StoragePool:
    """The storages behind one range of block ids: one for each kind of layer and device.

    Args:
        block_size: token slots of a block.
        max_memory: most bytes of K/V in use, over all layers; None for no bound.
        poison: fill free slots with NaN.
    """

    def __init__(
        self, block_size: int, *, max_memory: int | None = None, poison: bool = False
    ) -> None:
        if max_memory is not None and max_memory < 1:
            raise InvalidArgument(f"max_memory={max_memory}: give bytes, or None for no bound.")
        self.block_size = block_size
        self.max_memory = max_memory
        self._poison = poison
        self._slab_blocks = 0
        self.storages: list[KVStorage] = []

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers that are there."""
        return sum(storage.attached_block_bytes for storage in self.storages)

    @property
    def allocated_bytes(self) -> int:
        return sum(storage.allocated_bytes for storage in self.storages)

    def room(self, num_used: int) -> int | None:
        """Blocks that ``max_memory`` has room for beside ``num_used`` of the tree.

        None when there is no bound yet. Negative where layers that came late do not fit.
        """
        whole = [storage.num_layers * storage.layer_block_bytes for storage in self.storages]
        if self.max_memory is None or not whole:
            return None
        kept = [storage.num_kept(num_used) for storage in self.storages]
        held = sum(map(mul, kept, whole))
        return (self.max_memory - held) // sum(whole)

    def attach(
        self,
        spec: KVSpec,
        num_alike: int,
        blocks: Sequence[int],
        num_blocks: int,
        window: int | None = None,
    ) -> tuple[KVStorage, int]:
        """A place for a new layer: its storage, and its position there.

        Args:
            spec: the layer's heads, dims, dtype and device.
            num_alike: layers, this one included, that will probably need a place of the same kind.
            blocks: of the tree, to be kept from the start.
            num_blocks: ids of the tree that must have room at once.
            window: of the layer, where its storage is to forget what is behind it.

        Raises:
            OutOfBlocks: ``max_memory`` or the device does not have it; nothing has changed.
        """
        for storage in self.storages:
            if (storage.spec, storage.window) == (spec, window) and storage.has_room:
                return storage, storage.add_layer()
        if not self._slab_blocks:
            block_bytes = num_alike * spec.block_bytes(self.block_size)
            fitting = max(16, min(1024, SLAB_BYTES // block_bytes))
            self._slab_blocks = 1 << (fitting.bit_length() - 1)
        storage = KVStorage(
            spec,
            num_alike,
            self.block_size,
            self._slab_blocks,
            window=window,
            poison=self._poison,
        )
        storage.take(blocks)
        self.storages.append(storage)
        try:
            self._check_bound(num_blocks)
            self._ensure(storage, num_blocks)
        except OutOfBlocks:
            self.storages.pop()
            raise
        return storage, storage.add_layer()

    def ensure(self, blocks: Sequence[int], num_blocks: int) -> None:
        """Make room for ``blocks``, the new ones of the ids ``0 .. num_blocks - 1``, everywhere.

        Raises:
            OutOfBlocks: a device has no memory left; what was stored is untouched.
        """
        for storage in self.storages:
            storage.take(blocks)
            self._ensure(storage, num_blocks)

    def copy(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy blocks, ``(source, destination)``, in all layers."""
        if copies:
            for storage in self.storages:
                storage.copy(copies)

    def release(self, blocks: Sequence[int]) -> None:
        """The tree has freed ``blocks``."""
        if blocks:
            for storage in self.storages:
                storage.release(blocks)

    def _check_bound(self, num_blocks: int) -> None:
        """As if the tree used all of ``num_blocks``."""
        room = self.room(num_blocks)
        if room is not None and room < 0:
            bound = num_blocks + room
            raise OutOfBlocks(
                f"max_memory={self.max_memory} has room for {bound} blocks of {self.block_size} "
                f"tokens, but this forward needs {num_blocks}. The cache is unchanged: raise "
                "max_memory, or shorten the prompt.",
                num_blocks,
                bound,
            )

    @staticmethod
    def _ensure(storage: KVStorage, num_blocks: int) -> None:
        num_blocks = storage.room_for(num_blocks)
        try:
            storage.ensure(num_blocks)
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            raise OutOfBlocks(
                f"{storage.spec.device} has no memory for another slab of "
                f"{storage.slab_bytes >> 20} MiB, with room for {storage.num_blocks} blocks where "
                f"{num_blocks} are needed. The cache is unchanged: prune branches, or set "
                "max_memory to be stopped earlier.",
                num_blocks - storage.num_blocks,
                0,
            ) from error


def _is_out_of_memory(error: BaseException) -> bool:
    # The CPU allocator raises a plain RuntimeError.
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(
        error
    )
