"""Every exception a user can meet. A message says what was called, what was found, what to do."""

from __future__ import annotations


class TreeCacheError(Exception):
    """Base of all errors of this package."""


class InvalidArgument(TreeCacheError, ValueError):
    """An argument that no state of the cache could accept (negative count, index out of range)."""


class BatchMismatch(TreeCacheError, ValueError):
    """A forward whose batch does not fit the rows that the cache holds."""


class StorageMismatch(TreeCacheError, ValueError):
    """Keys or values whose dtype, device or head shape differ from what the cache stores."""


class AdapterMismatch(TreeCacheError, ValueError):
    """A forward under other PEFT adapters than those that filled the cache."""


class StaleBranch(TreeCacheError, LookupError):
    """A branch that was pruned, or that belongs to another tree."""


class StaleHandle(TreeCacheError, RuntimeError):
    """A K/V handle used after the forward that made it."""


class OutOfBlocks(TreeCacheError, RuntimeError):
    """An allocation beyond ``max_blocks``. Nothing was allocated and the cache is as it was.

    Attributes:
        requested: blocks asked for.
        free: blocks that could have been had.
    """

    def __init__(self, message: str, requested: int, free: int) -> None:
        super().__init__(message)
        self.requested = requested
        self.free = free


class HistoryFreed(TreeCacheError, LookupError):
    """Tokens that layers with a window have let go were asked for: by a fork at an earlier token, a
    crop, or a reader that looks further back than the window. The cache is as it was."""


class ScatteredStorage(TreeCacheError, RuntimeError):
    """K/V that the device put too far apart for the fused kernel to reach from one address."""


class UnsupportedModel(TreeCacheError, NotImplementedError):
    """A model or a mode that this cache cannot serve, not even slowly."""


class NonFiniteScores(TreeCacheError, ValueError):
    """Logits or scores with NaN, or with nothing left to choose from."""


class IntegrityError(TreeCacheError, AssertionError):
    """The books do not add up: a bug of ours, never of the caller."""
