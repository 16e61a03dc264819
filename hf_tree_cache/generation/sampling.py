"""Choosing next tokens: for each row its own, for the children of a fork different ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def choose_tokens(
    scores: torch.Tensor,
    do_sample: bool,
    distinct: Sequence[Sequence[int]] = (),
    generator: torch.Generator | None = None,
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

    Returns:
        ``[R]`` int64.
    """
    probs = scores.softmax(-1) if do_sample else None
    if probs is None:
        tokens = scores.argmax(-1)
    else:
        tokens = torch.multinomial(probs, 1, generator=generator).squeeze(1)
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
