"""StoragePool: every storage of a cache, grown, copied and bounded together."""

from __future__ import annotations

from collections.abc import Sequence

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

    @property
    def max_blocks(self) -> int | None:
        """Blocks that ``max_memory`` has room for; None when there is no bound yet."""
        planned = sum(storage.num_layers * storage.layer_block_bytes for storage in self.storages)
        return self.max_memory // planned if self.max_memory and planned else None

    def attach(self, spec: KVSpec, num_alike: int, num_blocks: int) -> tuple[KVStorage, int]:
        """A place for a new layer: its storage, and its position there.

        Args:
            spec: the layer's heads, dims, dtype and device.
            num_alike: layers, this one included, that will probably need a place of the same kind.
            num_blocks: blocks that must have room at once.

        Raises:
            OutOfBlocks: ``max_memory`` or the device does not have it; nothing has changed.
        """
        for storage in self.storages:
            if storage.spec == spec and storage.has_room:
                return storage, storage.add_layer()
        if not self._slab_blocks:
            block_bytes = num_alike * spec.block_bytes(self.block_size)
            fitting = max(16, min(1024, SLAB_BYTES // block_bytes))
            self._slab_blocks = 1 << (fitting.bit_length() - 1)
        storage = KVStorage(
            spec, num_alike, self.block_size, self._slab_blocks, poison=self._poison
        )
        self.storages.append(storage)
        try:
            self._check_bound(num_blocks)
            self._ensure(storage, num_blocks)
        except OutOfBlocks:
            self.storages.pop()
            raise
        return storage, storage.add_layer()

    def ensure(self, num_blocks: int) -> None:
        """Make room for blocks ``0 .. num_blocks - 1`` everywhere.

        Raises:
            OutOfBlocks: a device has no memory left; what was stored is untouched.
        """
        for storage in self.storages:
            self._ensure(storage, num_blocks)

    def copy(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy blocks, ``(source, destination)``, in all layers."""
        if copies:
            for storage in self.storages:
                storage.copy(copies)

    def poison(self, blocks: Sequence[int]) -> None:
        if blocks:
            for storage in self.storages:
                storage.poison(blocks)

    def _check_bound(self, num_blocks: int) -> None:
        bound = self.max_blocks
        if bound is not None and num_blocks > bound:
            raise OutOfBlocks(
                f"max_memory={self.max_memory} has room for {bound} blocks of {self.block_size} "
                f"tokens, but this forward needs {num_blocks}. The cache is unchanged: raise "
                "max_memory, or shorten the prompt.",
                num_blocks,
                bound,
            )

    @staticmethod
    def _ensure(storage: KVStorage, num_blocks: int) -> None:
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
