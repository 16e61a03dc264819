"""Choosing next tokens: for each row its own, for the children of a fork different ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Drawn:
    """Next tokens, on the device.

    Attributes:
        tokens: int64 ``[R]``.
        logprobs: ``[R]`` log-probs of the tokens under the model's own logits.
        broken: bool ``[R]``, rows whose scores hold NaN, +inf or nothing but -inf; their token says
            nothing.
    """

    tokens: torch.Tensor
    logprobs: torch.Tensor
    broken: torch.Tensor


def draw_tokens(
    logits: torch.Tensor,
    scores: torch.Tensor,
    do_sample: bool,
    distinct: Sequence[Sequence[int]] = (),
) -> Drawn:
    """:func:`choose_tokens` with what a loop wants to know of them, in as few passes as it takes.

    Args:
        logits: ``[R, V]`` of the model.
        scores: ``[R, V]`` processed logits, the same tensor where nothing was changed.
    """
    probs = scores.softmax(-1) if do_sample else None
    tokens = choose_tokens(scores, do_sample, distinct, probs=probs)
    picked = tokens[:, None]
    # Softmax makes a whole row NaN where anything in it is not finite from above.
    weights = (scores if probs is None else probs).gather(1, picked).squeeze(1)
    if probs is not None and scores is logits:
        logprobs = weights.log()
    else:
        logprobs = logits.log_softmax(-1).gather(1, picked).squeeze(1)
    return Drawn(tokens, logprobs, ~weights.isfinite())


def choose_tokens(
    scores: torch.Tensor,
    do_sample: bool,
    distinct: Sequence[Sequence[int]] = (),
    generator: torch.Generator | None = None,
    probs: torch.Tensor | None = None,
) -> torch.Tensor:
    """The next token of each row.

    Without ``distinct`` groups this draws as transformers' ``generate`` does, number for number.

    Args:
        scores: ``[R, V]`` processed logits; each row has something finite.
        do_sample: sample, else take the best.
        distinct: groups of rows with equal scores that get different tokens: sampled without
            replacement, or the best, second best and so on. Where fewer tokens are possible than
            rows ask, the rest repeat the first.
        generator: draws the samples, default torch's global one.
        probs: softmax of ``scores``, where it is known already.

    Returns:
        ``[R]`` int64.
    """
    if do_sample and probs is None:
        probs = scores.softmax(-1)
    tokens = scores.argmax(-1) if probs is None else _draw(probs, generator)
    for group in distinct:
        count = min(len(group), scores.shape[1])
        if probs is None:
            ranked = scores[group[0]].topk(count)
            possible, chosen = ranked.values > -torch.inf, ranked.indices
        else:
            # Gumbel top-k: as sampling one after the other without replacement (Kool et al., 2019).
            noise = torch.empty_like(probs[group[0]]).exponential_(generator=generator).log().neg()
            ranked = (probs[group[0]].log() + noise).topk(count)
            possible, chosen = ranked.values > -torch.inf, ranked.indices
        chosen = torch.where(possible, chosen, chosen[0])
        rows = torch.tensor(group[:count], device=tokens.device)
        tokens = tokens.index_copy(0, rows, chosen)
    return tokens


def _draw(probs: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """One sample of each row of ``probs [R, V]``: what ``torch.multinomial(probs, 1)`` draws.

    A row with NaN gives some token, where multinomial would stop the device.
    """
    # The largest of p / Exp(1) is a sample (the exponential race, as good as Gumbel's).
    race = torch.empty_like(probs).exponential_(generator=generator)
    return torch.div(probs, race, out=race).argmax(-1)
