"""A KV cache that is a tree: what branches share is computed, stored and read once."""

from .errors import (
    AdapterMismatch,
    BatchMismatch,
    HistoryFreed,
    IntegrityError,
    InvalidArgument,
    NonFiniteScores,
    OutOfBlocks,
    ScatteredStorage,
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
from .notebook.session import SessionBranch, TreeSession
from .search.ask_tell import treequest_search
from .search.best_of_n import best_of_n
from .search.budget import Budget
from .search.driver import SearchDriver
from .search.entropy_branching import entropy_branching
from .search.mcts import mcts
from .search.result import SearchResult
from .search.scoring import Candidate, RewardModel
from .search.self_consistency import self_consistency
from .search.step_beam import dvts, step_beam
from .search.strategy import run_search
from .search.tree_of_thoughts import tree_of_thoughts

__version__ = "0.1.0"

__all__ = [
    "AdapterMismatch",
    "BatchMismatch",
    "BranchBatch",
    "BranchEvent",
    "BranchRunner",
    "BranchingProcessor",
    "Budget",
    "Candidate",
    "EnabledTreeAttention",
    "ForkAtDelimiter",
    "ForkAtFirstToken",
    "ForkAtPositions",
    "ForkOnEntropy",
    "ForkOnVarentropy",
    "GenerationTree",
    "HistoryFreed",
    "IntegrityError",
    "InvalidArgument",
    "NonFiniteScores",
    "OutOfBlocks",
    "PruneBelow",
    "PruneByRank",
    "RewardModel",
    "RunnerStats",
    "Sampling",
    "ScatteredStorage",
    "SearchDriver",
    "SearchResult",
    "SessionBranch",
    "StaleBranch",
    "StaleHandle",
    "Stop",
    "StorageMismatch",
    "TreeCache",
    "TreeCacheError",
    "TreeCacheStats",
    "TreeGenerateOutput",
    "TreeGenerateStats",
    "TreeSession",
    "Turn",
    "UnsupportedModel",
    "best_of_n",
    "dvts",
    "enable_tree_attention",
    "entropy_branching",
    "load_cache",
    "mcts",
    "run_search",
    "save_cache",
    "self_consistency",
    "step_beam",
    "tree_generate",
    "tree_of_thoughts",
    "treequest_search",
]
