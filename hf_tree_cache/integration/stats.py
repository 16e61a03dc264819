"""TreeCacheStats: what a cache holds and what it saved."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class KindStats:
    """What layers of one kind hold.

    Attributes:
        window: tokens behind which they let go what no branch sees any more; None if they keep all.
        num_layers: how many they are.
        blocks: that they keep, of those in use.
        kv_bytes: bytes of these.
    """

    window: int | None
    num_layers: int
    blocks: int
    kv_bytes: int


@dataclass(frozen=True, slots=True)
class TreeCacheStats:
    """What a cache holds and what it saved.

    Attributes:
        num_rows: branches in the batch.
        num_held: branches outside of it.
        logical_tokens: tokens of all branches, as independent sequences would store them.
        unique_tokens: tokens stored.
        blocks: blocks in use.
        block_size: token slots of a block.
        kv_bytes: bytes of what all layers keep of the blocks in use.
        kinds: the same for each kind of layer.
        dense_bytes: bytes of the same branches as independent sequences of equal length (columns),
            of which layers with a window hold no more than that.
        allocated_bytes: bytes of the slabs that the blocks live in.
        forks, prunes, copies: branches made and ended, partial blocks copied on write.
        prefill_tokens_asked: tokens of multi-token forwards as the caller passed them (rows x
            columns).
        prefill_tokens_computed: how many of them went through the model.
        dense_reads: layer reads that had to gather dense K/V, by reason.
    """

    num_rows: int
    num_held: int
    logical_tokens: int
    unique_tokens: int
    blocks: int
    block_size: int
    kv_bytes: int
    kinds: tuple[KindStats, ...]
    dense_bytes: int
    allocated_bytes: int
    forks: int
    prunes: int
    copies: int
    prefill_tokens_asked: int
    prefill_tokens_computed: int
    dense_reads: dict[str, int]

    @property
    def saving(self) -> float:
        """Share of the dense bytes that is not stored, 0 to 1."""
        return 1 - self.kv_bytes / self.dense_bytes if self.dense_bytes else 0.0
