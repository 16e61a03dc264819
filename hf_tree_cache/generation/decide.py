"""From queued actions to the next batch: who goes on, who is forked, who is refused. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .processors import Action, Fork, Prune


@dataclass(frozen=True, slots=True)
class NextRows:
    """The batch after the actions of one step.

    Attributes:
        parents: old row of each new row: survivors in their order, then children.
        forks: (new row of the parent, new rows of its children, distinct tokens, reason).
        pruned: (old row, reason).
        refused: branches that were asked for and not granted.
    """

    parents: list[int]
    forks: list[tuple[int, list[int], bool, str]]
    pruned: list[tuple[int, str]]
    refused: int


def decide(actions: Sequence[Action], num_rows: int, budget: int) -> NextRows:
    """Apply prunes first, then grant forks by priority while ``budget`` lasts.

    A row that is asked to fork several times is forked once, as widely as the widest asks.

    Args:
        actions: of all processors, in their order.
        num_rows: rows before.
        budget: branches that may be added besides those that prunes make room for.
    """
    reasons: dict[int, str] = {}
    wanted: dict[int, Fork] = {}
    for action in actions:
        if isinstance(action, Prune):
            reasons.setdefault(action.row, action.reason)
        elif action.row not in wanted or wanted[action.row].count < action.count:
            wanted[action.row] = action
    survivors = [row for row in range(num_rows) if row not in reasons]
    new_row = {row: i for i, row in enumerate(survivors)}
    budget += len(reasons)

    parents, forks, refused = list(survivors), [], 0
    asked = [fork for row, fork in wanted.items() if row in new_row]
    for fork in sorted(asked, key=lambda fork: (-fork.priority, fork.row)):
        granted = max(0, min(fork.count, budget))
        refused += fork.count - granted
        budget -= granted
        if granted:
            children = list(range(len(parents), len(parents) + granted))
            parents.extend([fork.row] * granted)
            forks.append((new_row[fork.row], children, fork.distinct, fork.reason))
    return NextRows(parents, forks, sorted(reasons.items()), refused)
