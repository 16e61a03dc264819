"""A policy around a policy: equal partial solutions go on once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hf_tree_cache.search.policy import Action, Conclusion, Policy, Prune, SearchTree


@dataclass(frozen=True)
class MergeEqual:
    """Prunes steps that another branch has taken from the same place, then asks ``policy``.

    Samples of short steps are often the same. A beam that keeps its best four would keep the best
    one four times.
    """

    policy: Policy

    def decide(self, search: SearchTree) -> Sequence[Action]:
        first: dict[str, int] = {}
        same = [n.id for n in search.open if first.setdefault(n.text, n.id) != n.id]
        return [Prune(node, "as another") for node in same] or self.policy.decide(search)

    def conclude(self, search: SearchTree) -> Conclusion:
        return self.policy.conclude(search)
