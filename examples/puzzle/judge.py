"""Process reward for the puzzle: the checker where it can tell, the verifier where it cannot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from hf_tree_cache.search.scoring import Candidate

from .task import Puzzle, check, reachable


class Judge:
    """Scores steps from 0 to 1: 0 behind an invalid line, for a complete solution whether it makes
    the target, with two numbers left whether one of the four operations would, and before that the
    verifier's probability that the target can still be made.

    So it knows no more than a reader who checks sums and looks one move ahead.

    Attributes:
        tokens: tokens that went through the verifier, padding not counted.
    """

    def __init__(self, verifier: Any, tokenizer: Any, batch_size: int = 256) -> None:
        self.verifier, self.tokenizer, self.batch_size = verifier, tokenizer, batch_size
        self.tokens = 0

    def score(self, candidates: Sequence[Candidate]) -> list[float]:
        scores = []
        unsure: list[tuple[int, str]] = []
        for i, candidate in enumerate(candidates):
            puzzle = Puzzle.parse(candidate.question)
            found = check(puzzle, candidate.text)
            complete = candidate.done or len(found.left) == 1
            scores.append(float(found.solved))
            if found.error or complete:
                continue
            if len(found.left) == 2:
                scores[i] = float(puzzle.target in reachable(found.left))
            else:
                unsure.append((i, candidate.question + candidate.text))
        for first in range(0, len(unsure), self.batch_size):
            part = unsure[first : first + self.batch_size]
            for (i, _), chance in zip(part, self._chances([text for _, text in part]), strict=True):
                scores[i] = chance
        return scores

    def _chances(self, texts: list[str]) -> list[float]:
        inputs = self.tokenizer(texts, return_tensors="pt", padding=True)
        self.tokens += int(inputs["attention_mask"].sum())
        with torch.inference_mode():
            logits = self.verifier(
                input_ids=inputs["input_ids"].to(self.verifier.device),
                attention_mask=inputs["attention_mask"].to(self.verifier.device),
            ).logits
        return logits[:, 0].float().sigmoid().tolist()
