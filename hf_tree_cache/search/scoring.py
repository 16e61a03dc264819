"""Scorers: how good a branch is, said by its log-prob, a callable or a reward model."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch

from ..errors import InvalidArgument, NonFiniteScores


@dataclass(frozen=True, slots=True)
class Candidate:
    """What a scorer judges: a branch from its question to the end of a step.

    Attributes:
        question: as it was asked: text, chat messages or token ids.
        text: everything generated so far.
        step: the part of it that the last step added.
        tokens: generated token ids.
        logprobs: of each of them, under the model, in nats.
        done: the sequence is complete; otherwise this is a partial solution.
        answer: found in ``text`` when done, else None.
    """

    question: Any
    text: str
    step: str
    tokens: Sequence[int]
    logprobs: Sequence[float]
    done: bool
    answer: Hashable | None = None


@runtime_checkable
class Scorer(Protocol):
    """Judges candidates; higher is better. Strategies pass all that wait in one call."""

    def score(self, candidates: Sequence[Candidate]) -> Sequence[float]:
        """One finite number for each candidate."""
        ...


ScoreLike = str | Scorer | Callable[[Candidate], float]
"""What strategies accept: "mean_logprob", "logprob", a callable or a :class:`Scorer`."""


@dataclass(frozen=True, slots=True)
class LogProbScorer:
    """The model's own log-prob of what it generated.

    Attributes:
        mean: by the token, so that long branches are not punished; else the sum.
    """

    mean: bool = True

    def score(self, candidates: Sequence[Candidate]) -> Sequence[float]:
        """Nats, 0 at most; 0 for a branch without tokens."""
        return [sum(c.logprobs) / (max(1, len(c.logprobs)) if self.mean else 1) for c in candidates]


@dataclass(frozen=True, slots=True)
class CallableScorer:
    """A function of one :class:`Candidate`, called for each."""

    function: Callable[[Candidate], float]

    def score(self, candidates: Sequence[Candidate]) -> Sequence[float]:
        return [float(self.function(candidate)) for candidate in candidates]


class RewardModel:
    """A sequence-classification model of transformers as a scorer.

    It reads each candidate from its first token again: it is another model, so no K/V are shared
    with the search.

    Args:
        model: of ``AutoModelForSequenceClassification``.
        tokenizer: its tokenizer; needs a padding token.
        template: text to judge, made of a candidate. Default: the tokenizer's chat template with
            the question as user and the text as assistant, else question and text in one.
        label: which logit is the reward; its probability is taken. Default: the only logit as it
            is, or the last label's probability where there are several.
        batch_size: candidates of a forward.

    Raises:
        InvalidArgument: no padding token, an unknown label, a batch size below 1.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        template: Callable[[Candidate], str] | None = None,
        label: int | None = None,
        batch_size: int = 16,
    ) -> None:
        num_labels = model.config.num_labels
        if tokenizer.pad_token_id is None or model.config.pad_token_id is None:
            raise InvalidArgument(
                "RewardModel needs a padding token: set tokenizer.pad_token and "
                "model.config.pad_token_id."
            )
        if batch_size < 1 or not (label is None or 0 <= label < num_labels):
            raise InvalidArgument(
                f"RewardModel(label={label}, batch_size={batch_size}): the model has {num_labels} "
                "labels, numbered from 0, and a batch needs at least one candidate."
            )
        self.model = model
        self.tokenizer = tokenizer
        self.template = template or self._text
        self.label = label
        self.batch_size = batch_size

    def score(self, candidates: Sequence[Candidate]) -> Sequence[float]:
        """The reward of each candidate: a logit, or a probability (see ``label``)."""
        texts = [self.template(candidate) for candidate in candidates]
        scores: list[float] = []
        for start in range(0, len(texts), self.batch_size):
            batch = self.tokenizer(
                texts[start : start + self.batch_size],
                return_tensors="pt",
                padding=True,
                truncation=True,
            ).to(self.model.device)
            with torch.no_grad():
                logits = self.model(**batch).logits.float()
            scores += self._reward(logits).tolist()
        return scores

    def _reward(self, logits: torch.Tensor) -> torch.Tensor:
        """``[B, labels]`` to ``[B]``."""
        if logits.shape[1] == 1:
            return logits[:, 0] if self.label is None else logits[:, 0].sigmoid()
        return logits.softmax(-1)[:, -1 if self.label is None else self.label]

    def _text(self, candidate: Candidate) -> str:
        question = candidate.question
        if getattr(self.tokenizer, "chat_template", None):
            chat = (
                [{"role": "user", "content": question}] if isinstance(question, str) else question
            )
            chat = [*chat, {"role": "assistant", "content": candidate.text}]
            return str(self.tokenizer.apply_chat_template(chat, tokenize=False))
        if not isinstance(question, str):
            raise InvalidArgument(
                "RewardModel: this tokenizer has no chat template, and the question is not a "
                "string. Pass template=, a function of the candidate."
            )
        return question + candidate.text


def make_scorer(score: ScoreLike | None) -> Scorer | None:
    """A :class:`Scorer` of whatever a strategy was given; None stays None.

    Raises:
        InvalidArgument: an unknown name, or a model that was not wrapped.
    """
    if score is None or (isinstance(score, Scorer) and not isinstance(score, type)):
        return score
    if score in ("mean_logprob", "logprob"):
        return LogProbScorer(mean=score == "mean_logprob")
    if isinstance(score, torch.nn.Module):
        raise InvalidArgument(
            f"score={type(score).__name__}: wrap a model with its tokenizer, "
            "score=RewardModel(model, tokenizer)."
        )
    if not callable(score):
        raise InvalidArgument(
            f"score={score!r}: known are 'mean_logprob' and 'logprob', a function of a Candidate "
            "(its question, text, tokens), or an object with score(candidates), such as "
            "RewardModel(model, tokenizer)."
        )
    return CallableScorer(score)


def check_scores(scorer: Scorer, scores: Sequence[float], count: int) -> list[float]:
    """The scores as floats, once they are known to be one finite number for each candidate.

    Raises:
        NonFiniteScores: they are not.
    """
    found = [float(score) for score in scores]
    if len(found) != count or not all(map(math.isfinite, found)):
        raise NonFiniteScores(
            f"{type(scorer).__name__} gave {found[:8]} for {count} candidates: return one finite "
            "number for each."
        )
    return found
