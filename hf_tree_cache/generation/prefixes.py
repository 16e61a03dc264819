"""What prompts have in common: runs of tokens to compute once, level by level. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PromptRun:
    """Tokens that follow another run.

    Attributes:
        parent: index of the run before, None at the start of a prompt.
        tokens: at least one.
        level: runs before it; runs of one level can be computed together.
    """

    parent: int | None
    tokens: tuple[int, ...]
    level: int


def find_shared_runs(
    prompts: Sequence[Sequence[int]], minimum: int = 32
) -> tuple[list[PromptRun], list[int]]:
    """Cut prompts where they part, so that a shared beginning is computed once.

    Args:
        prompts: token ids, none empty.
        minimum: shorter shared runs are not worth a forward of their own.

    Returns:
        The runs, parents before children; and for each prompt the run that it ends with. Equal
        prompts end with one run.
    """
    runs: list[PromptRun] = []
    end_of: dict[tuple[int, ...], int] = {}
    distinct = sorted({tuple(prompt) for prompt in prompts})
    # (prompts of one beginning in order, tokens of them that are in runs, the last of these runs)
    pending: list[tuple[list[tuple[int, ...]], int, int | None]] = [(distinct, 0, None)]
    while pending:
        group, start, parent = pending.pop()
        if not group:
            continue
        shared = _common_length(group[0], group[-1])
        level = 0 if parent is None else runs[parent].level + 1
        if len(group) == 1 or shared - start >= minimum:
            runs.append(PromptRun(parent, group[0][start:shared], level))
            start, parent = shared, len(runs) - 1
            if len(group[0]) == shared:
                end_of[group.pop(0)] = parent
        elif len(group[0]) == shared:
            pending.append(([group.pop(0)], start, parent))
        by_next: dict[int, list[tuple[int, ...]]] = {}
        for prompt in group:
            by_next.setdefault(prompt[shared], []).append(prompt)
        pending += [(part, start, parent) for part in by_next.values()]
    return runs, [end_of[tuple(prompt)] for prompt in prompts]


def _common_length(a: Sequence[int], b: Sequence[int]) -> int:
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))
