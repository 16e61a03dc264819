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
from .generation.loop import tree_generate
from .generation.options import RunnerStats, Sampling, Stop, Turn
from .generation.output import BranchEvent, TreeGenerateOutput, TreeGenerateStats
from .generation.processors import (
    BranchBatch,
    BranchingProcessor,
    ForkAtDelimiter,
    ForkAtFirstToken,
    ForkAtPositions,
    ForkOnEntropy,
    ForkOnVarentropy,
    PruneBelow,
    PruneByRank,
)
from .generation.record import GenerationTree
from .generation.runner import BranchRunner
from .integration.cache import TreeCache
from .integration.disk import load_cache, save_cache
from .integration.enable import EnabledTreeAttention, enable_tree_attention
from .integration.stats import TreeCacheStats

__version__ = "0.1.0"

__all__ = [
    "BatchMismatch",
    "BranchBatch",
    "BranchEvent",
    "BranchRunner",
    "BranchingProcessor",
    "EnabledTreeAttention",
    "ForkAtDelimiter",
    "ForkAtFirstToken",
    "ForkAtPositions",
    "ForkOnEntropy",
    "ForkOnVarentropy",
    "GenerationTree",
    "IntegrityError",
    "InvalidArgument",
    "NonFiniteScores",
    "OutOfBlocks",
    "PruneBelow",
    "PruneByRank",
    "RunnerStats",
    "Sampling",
    "StaleBranch",
    "StaleHandle",
    "Stop",
    "StorageMismatch",
    "TreeCache",
    "TreeCacheError",
    "TreeCacheStats",
    "TreeGenerateOutput",
    "TreeGenerateStats",
    "Turn",
    "UnsupportedModel",
    "enable_tree_attention",
    "load_cache",
    "save_cache",
    "tree_generate",
]
