"""What drawing has to keep, in the plainest words: by sorting, as transformers does."""

from __future__ import annotations

import torch

from hf_tree_cache.generation.options import Sampling

SAMPLINGS = {
    "as it is": Sampling(),
    "temperature": Sampling(temperature=0.5),
    "top-k": Sampling(top_k=5),
    "wide top-k": Sampling(top_k=200, temperature=2.0),
    "top-p": Sampling(top_p=0.9),
    "narrow top-p": Sampling(top_p=0.05),
    "wide top-p": Sampling(top_p=0.999, temperature=2.0),
    "min-p": Sampling(min_p=0.05),
    "only the likeliest": Sampling(min_p=1.0),
    "top-k and top-p": Sampling(temperature=0.5, top_k=50, top_p=0.9),
    "all": Sampling(temperature=2.0, top_k=20, top_p=0.7, min_p=0.1),
}


def kept_by_sorting(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """bool ``[R, V]``: transformers' processors with a stable sort, as their sort on a GPU is.

    On a CPU equal logits are sorted in any order, so which of them top-p drops is chance.
    """
    scores = logits.float()
    if sampling.temperature != 1:
        scores = scores / sampling.temperature
    if sampling.top_k:
        least = scores.topk(min(sampling.top_k, scores.shape[1])).values[:, -1:]
        scores = scores.masked_fill(scores < least, -torch.inf)
    if sampling.top_p < 1:
        values, order = scores.sort(dim=-1, stable=True)
        drop = values.softmax(-1).cumsum(-1) <= 1 - sampling.top_p
        drop[:, -1] = False
        scores = scores.masked_fill(drop.scatter(1, order, drop), -torch.inf)
    if sampling.min_p:
        probs = scores.softmax(-1)
        least = sampling.min_p * probs.amax(-1, keepdim=True)
        scores = scores.masked_fill(probs < least, -torch.inf)
    return scores > -torch.inf


def kept_by_kernel(
    logits: torch.Tensor, sampling: Sampling, numbers: torch.Tensor, cut: torch.Tensor
) -> torch.Tensor:
    """bool ``[R, V]``: what :func:`draw_launch.draw` says that it kept."""
    from hf_tree_cache.generation.draw_launch import reciprocal

    scores = logits.float() * reciprocal(sampling.temperature)
    top, floor = numbers[:, 1:2], numbers[:, 3:4]
    ids = torch.arange(logits.shape[1], device=logits.device)
    kept = (scores > floor) | ((scores == floor) & (ids >= cut[:, None]))
    if sampling.min_p:
        kept &= scores - top >= torch.tensor(sampling.min_p).log()
    return kept & (scores > -torch.inf)


def rows(vocab: int, dtype: torch.dtype, device: str = "cpu") -> torch.Tensor:
    """Five rows: peaked, flat, with many ties, with -inf, with one token left."""
    logits = torch.randn(5, vocab, device=device) * 3
    logits[1] /= 30
    logits[2] = logits[2].round()
    logits[3, ::3] = -torch.inf
    logits[4, 1:] = -torch.inf
    return logits.to(dtype)
