"""When branches stop: what the host knows by itself, and what criteria are asked."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import EosTokenCriteria, MaxLengthCriteria, StoppingCriteria


class Stopping:
    """The stopping criteria of one run.

    Once tokens are on the host, it knows by itself whether one ends a sequence and whether the
    length is reached: nothing is launched for those two of transformers. All others are called as
    ``generate`` calls them.
    """

    def __init__(self, criteria: Sequence[StoppingCriteria]) -> None:
        self._ends: set[int] = set()
        self._length: int | None = None
        self._others: list[StoppingCriteria] = []
        for criterion in criteria:
            if type(criterion) is EosTokenCriteria:
                self._ends.update(criterion.eos_token_id.tolist())
            elif type(criterion) is MaxLengthCriteria and not _may_warn(criterion):
                limits = [self._length, criterion.max_length]
                self._length = min(limit for limit in limits if limit is not None)
            else:
                self._others.append(criterion)

    def ask(self, input_ids: torch.Tensor, scores: torch.Tensor | None) -> torch.Tensor | None:
        """bool ``[R]`` on the device, rows that the others stop; None if there are no others."""
        done = None
        for criterion in self._others:
            asked = torch.as_tensor(criterion(input_ids, scores), device=input_ids.device)
            done = asked if done is None else done | asked
        return None if done is None else done.expand(len(input_ids))

    def known(self, tokens: Sequence[int], length: int) -> list[bool]:
        """Which rows the host stops: their last tokens, and the columns that all have now."""
        if self._length is not None and length >= self._length:
            return [True] * len(tokens)
        return [token in self._ends for token in tokens]


def _may_warn(criterion: MaxLengthCriteria) -> bool:
    """Whether it may have something to say before it stops anything."""
    most = criterion.max_position_embeddings
    return most is not None and criterion.max_length > most
