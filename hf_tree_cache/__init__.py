"""A KV cache that is a tree: what branches share is computed, stored and read once."""

from .errors import (
    BatchMismatch,
    IntegrityError,
    InvalidArgument,
    NonFiniteScores,
    OutOfBlocks,
    StaleBranch,
    StaleHandle,
    StorageMismatch,
    TreeCacheError,
    UnsupportedModel,
)
from .integration.cache import TreeCache, TreeCacheStats
from .integration.enable import EnabledTreeAttention, enable_tree_attention

__version__ = "0.1.0"

__all__ = [
    "BatchMismatch",
    "EnabledTreeAttention",
    "IntegrityError",
    "InvalidArgument",
    "NonFiniteScores",
    "OutOfBlocks",
    "StaleBranch",
    "StaleHandle",
    "StorageMismatch",
    "TreeCache",
    "TreeCacheError",
    "TreeCacheStats",
    "UnsupportedModel",
    "enable_tree_attention",
]
