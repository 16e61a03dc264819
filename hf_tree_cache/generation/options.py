"""How a branch is extended: sampling, when to stop; and what came of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, NewType

import torch
from transformers import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ..errors import InvalidArgument

Branch = NewType("Branch", int)
"""A branch of a :class:`~.runner.BranchRunner`: an int that is never used twice. Not a branch of
its cache, which holds one for all branches that have not parted yet."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is drawn from the logits.

    Attributes:
        temperature: divides the logits; above 0.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the likeliest tokens that make up this probability (nucleus sampling, Holtzman
            et al., 2020).
        min_p: keep tokens at least this fraction as likely as the likeliest; 0 keeps all.
        do_sample: False takes the likeliest token, whatever the rest says.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    do_sample: bool = True

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise InvalidArgument(
                f"Sampling(temperature={self.temperature}): give more than 0; for the likeliest "
                "token pass do_sample=False."
            )
        if self.top_k < 0 or not 0 < self.top_p <= 1:
            raise InvalidArgument(
                f"Sampling(top_k={self.top_k}, top_p={self.top_p}): top_k is 0 (all) or more, "
                "top_p above 0 and at most 1."
            )
        if not 0 <= self.min_p <= 1:
            raise InvalidArgument(
                f"Sampling(min_p={self.min_p}): give 0 (keep all) to 1 (only the likeliest)."
            )

    @classmethod
    def greedy(cls) -> Sampling:
        """Always the likeliest token."""
        return cls(do_sample=False)

    @classmethod
    def of(cls, config: Any) -> Sampling:
        """What ``generate`` would do under a ``GenerationConfig``."""
        if not config.do_sample:
            return cls.greedy()
        values = {f.name: getattr(config, f.name, None) for f in fields(cls)}
        return cls(**{name: value for name, value in values.items() if value is not None})

    def process(self, scores: torch.Tensor) -> torch.Tensor:
        """``[R, V]`` logits to draw from, what is ruled out at -inf."""
        if not self.do_sample:
            return scores
        nothing: Any = None  # the warpers do not look at the tokens
        if self.temperature != 1:
            scores = TemperatureLogitsWarper(self.temperature)(nothing, scores)
        if self.top_k:
            scores = TopKLogitsWarper(self.top_k)(nothing, scores)
        if self.top_p < 1:
            scores = TopPLogitsWarper(self.top_p)(nothing, scores)
        if self.min_p:
            scores = MinPLogitsWarper(self.min_p)(nothing, scores)
        return scores

    @classmethod
    def behind(cls, processors: Sequence[Any]) -> tuple[list[Any], Sampling]:
        """What the last of some logits processors do, and those before them that do more.

        Only transformers' own temperature, top-k, top-p and min-p, each at most once and in this
        order, with nothing but their first argument changed.
        """
        rest, found, place = list(processors), {}, len(_WARPERS)
        while rest:
            kind = type(rest[-1])
            if kind not in _WARPERS or list(_WARPERS).index(kind) >= place:
                break
            place, name = list(_WARPERS).index(kind), _WARPERS[kind]
            settings = vars(rest[-1])
            # A top-k has the larger of both as its k.
            at_least = 1 if name == "top_k" else settings.get("min_tokens_to_keep", 1)
            if settings.get("filter_value", -math.inf) != -math.inf or at_least != 1:
                break
            if name == "top_p" and not settings[name]:
                break
            found[name] = settings[name]
            rest.pop()
        return rest, cls(**found)


_WARPERS: dict[type, str] = {
    TemperatureLogitsWarper: "temperature",
    TopKLogitsWarper: "top_k",
    TopPLogitsWarper: "top_p",
    MinPLogitsWarper: "min_p",
}
"""In the order in which transformers applies them, with the option that each stands for."""


@dataclass(frozen=True, slots=True)
class Stop:
    """When a branch stops before its length. What stops it stays part of the turn.

    Attributes:
        strings: texts, also across tokens; only text of this turn counts.
        tokens: token ids.
        eos: also the end-of-sequence tokens of the model's generation config.
    """

    strings: Sequence[str] = ()
    tokens: Sequence[int] = ()
    eos: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.strings, str) or not all(
            isinstance(text, str) and text for text in self.strings
        ):
            raise InvalidArgument(
                f"Stop(strings={self.strings!r}): give a list of texts that are not empty."
            )

    def find(self, text: str, new: int) -> str | None:
        """The first stop string of ``text`` that ends within its last ``new`` characters."""
        for string in self.strings:
            if text.find(string, max(0, len(text) - new - len(string) + 1)) >= 0:
                return string
        return None


@dataclass(frozen=True, slots=True)
class Turn:
    """What one branch got in one ``extend``.

    Attributes:
        branch: whose it is.
        tokens: new tokens, one that stopped it included.
        logprobs: their log-probs under the model: log-softmax of its raw logits.
        text: the new text; empty without a tokenizer.
        reason: "eos", "stop" (a stop token or string) or "length".
        stop: the stop string that was met.
    """

    branch: Branch
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    reason: str
    stop: str | None = None

    @property
    def logprob(self) -> float:
        """Sum of the log-probs."""
        return sum(self.logprobs)

    @property
    def mean_logprob(self) -> float:
        """Mean log-prob of a token; 0 without tokens."""
        return self.logprob / len(self.logprobs) if self.logprobs else 0.0


@dataclass(slots=True)
class RunnerStats:
    """What a runner did so far.

    Attributes:
        prompt_tokens: tokens of all prompts as they were passed.
        tokens_generated: tokens drawn, over all branches.
        tokens_forced: tokens appended.
        tokens_computed: tokens that went through the model, prompts included, padding not; on a
            GPU also last tokens of branches that were then seen to stop.
        forwards: calls of the model.
        forks, prunes: branches made by ``fork``, ended by ``prune``.
        peak_branches: most live branches at a time.
        peak_kv_bytes: most bytes of K/V in use at a time.
        seconds: wall time within the runner's calls.
    """

    prompt_tokens: int = 0
    tokens_generated: int = 0
    tokens_forced: int = 0
    tokens_computed: int = 0
    forwards: int = 0
    forks: int = 0
    prunes: int = 0
    peak_branches: int = 0
    peak_kv_bytes: int = 0
    seconds: float = 0.0
