"""Choosing next tokens: for each row its own, for the children of a fork different ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from types import ModuleType

import torch

from ..errors import NonFiniteScores
from ..sending import to_device
from .options import Sampling
from .uncertainty import Uncertainty

HAS_TRITON = find_spec("triton") is not None


@dataclass(frozen=True, slots=True)
class Drawn:
    """Next tokens, on the device.

    Attributes:
        tokens: int64 ``[R]``.
        table: float64 ``[3, R]``, to be copied to the host at once: the tokens, which it holds
            exactly; 1 for a row whose scores hold NaN, +inf or nothing but -inf, whose token says
            nothing; log-probs of the tokens under the model's own logits.
    """

    tokens: torch.Tensor
    table: torch.Tensor

    @classmethod
    def of(cls, tokens: torch.Tensor, broken: torch.Tensor, logprobs: torch.Tensor) -> Drawn:
        """All of them ``[R]``."""
        return cls(tokens, torch.stack([x.double() for x in (tokens, broken, logprobs)]))

    @property
    def broken(self) -> torch.Tensor:
        """bool ``[R]``."""
        return self.table[1] > 0

    @property
    def logprobs(self) -> torch.Tensor:
        """float32 ``[R]``."""
        return self.table[2].float()


def check_drawn(broken: Sequence[float], branches: Sequence[int]) -> None:
    """Every row had scores to draw from.

    Args:
        broken: second row of :attr:`Drawn.table`, on the host.
        branches: of each row.

    Raises:
        NonFiniteScores: one had not.
    """
    if any(broken):
        raise NonFiniteScores(
            f"Branch {branches[broken.index(1)]} has scores with NaN, +inf or nothing but -inf. A "
            "processor masked every token, or the model overflowed (try bfloat16 or float32)."
        )


def draw_tokens(
    logits: torch.Tensor,
    scores: torch.Tensor,
    samplings: Sampling | Sequence[Sampling],
    distinct: Sequence[Sequence[int]] = (),
    generator: torch.Generator | None = None,
    uncertainty: Uncertainty | None = None,
) -> Drawn:
    """The next token of each row, with what a loop wants to know of it. The host does not wait.

    Rows of one sampling draw as transformers' ``generate`` does, number for number, from the noise
    that ``torch.multinomial`` would draw, as far as float32 tells the best two apart. On a GPU that
    is one kernel after the noise, elsewhere transformers' own processors.

    Args:
        logits: ``[R, V]`` of the model.
        scores: ``[R, V]`` to draw from, the same tensor where nothing was changed.
        samplings: of all rows, or of each.
        distinct: groups of rows with equal scores that get different tokens: sampled without
            replacement, or the best, second best and so on. Where fewer tokens are possible than
            rows ask, the rest repeat the first.
        generator: draws the noise, default torch's global one.
        uncertainty: of ``logits``, where somebody may have measured it.
    """
    uncertainty = uncertainty or Uncertainty()
    if isinstance(samplings, Sampling):
        return _draw(logits, scores, samplings, distinct, generator, uncertainty)
    # Hashing them takes longer than to see that they are one object, as they mostly are.
    kinds = samplings[:1] if all(s is samplings[0] for s in samplings) else dict.fromkeys(samplings)
    if len(kinds) == 1:
        return _draw(logits, scores, next(iter(kinds)), distinct, generator, uncertainty)
    order, parts = [], []
    for sampling in kinds:
        here = [row for row, each in enumerate(samplings) if each == sampling]
        place = {row: i for i, row in enumerate(here)}
        index = to_device(here, logits.device)
        apart = [[place[row] for row in group if row in place] for group in distinct]
        part = scores[index]
        raw = part if scores is logits else logits[index]
        apart = [group for group in apart if len(group) > 1]
        parts.append(_draw(raw, part, sampling, apart, generator, Uncertainty()))
        order += here
    back = to_device(sorted(range(len(order)), key=order.__getitem__), logits.device)
    return Drawn(
        torch.cat([part.tokens for part in parts])[back],
        torch.cat([part.table for part in parts], 1)[:, back],
    )


def _draw(
    logits: torch.Tensor,
    scores: torch.Tensor,
    sampling: Sampling,
    distinct: Sequence[Sequence[int]],
    generator: torch.Generator | None,
    uncertainty: Uncertainty,
) -> Drawn:
    kernels = _kernels(scores)
    if kernels is not None:
        return _draw_by_kernel(kernels, logits, scores, sampling, distinct, generator, uncertainty)
    raw = logits.float()
    scores = raw if scores is logits else scores.float()
    changed = sampling.process(scores)
    if sampling.do_sample:
        weights, nothing = changed.softmax(-1), 0.0
        # The largest of p / Exp(1) is a sample (the exponential race, as good as Gumbel's), and
        # the next ones are samples without replacement (Kool et al., 2019).
        race = torch.empty_like(weights).exponential_(generator=generator)
        torch.div(weights, race, out=race)
    else:
        weights, nothing = changed, -torch.inf
        race = weights
    tokens = race.argmax(-1)
    for group in distinct:
        count = min(len(group), race.shape[1])
        ranked = race[group[0]].topk(count)
        chosen = torch.where(ranked.values > nothing, ranked.indices, ranked.indices[0])
        rows = to_device(group[:count], tokens.device)
        tokens = tokens.index_copy(0, rows, chosen)
    picked = tokens[:, None]
    # Softmax makes a whole row NaN where anything in it is not finite from above.
    broken = ~weights.gather(1, picked).squeeze(1).isfinite()
    if sampling.do_sample and changed is raw:
        logprobs = weights.gather(1, picked).squeeze(1).log()
    else:
        logprobs = raw.log_softmax(-1).gather(1, picked).squeeze(1)
    return Drawn.of(tokens, broken, logprobs)


def _draw_by_kernel(
    kernels: ModuleType,
    logits: torch.Tensor,
    scores: torch.Tensor,
    sampling: Sampling,
    distinct: Sequence[Sequence[int]],
    generator: torch.Generator | None,
    uncertainty: Uncertainty,
) -> Drawn:
    noise = None
    if sampling.do_sample:
        noise = torch.empty(scores.shape, device=scores.device)
        noise.exponential_(generator=generator)
    leaders = ranks = None
    if distinct:
        leaders, ranks = list(range(len(scores))), [0] * len(scores)
        for group in distinct:
            for rank, row in enumerate(group):
                leaders[row], ranks[row] = group[0], rank
    filters = {
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
    }
    tokens, table, _, _ = kernels.draw(
        scores,
        noise,
        leaders=leaders,
        ranks=ranks,
        **(filters if sampling.do_sample else {}),
    )
    if scores is not logits:
        total = uncertainty.measured(logits)[:, 0]
        table[2] = logits.gather(1, tokens[:, None]).squeeze(1).float() - total
    return Drawn(tokens, table)


def _kernels(scores: torch.Tensor) -> ModuleType | None:
    """The module of the fused kernel, where it can draw from ``scores``."""
    if not (HAS_TRITON and scores.is_cuda and scores.stride(1) == 1):
        return None
    from . import draw_launch

    fits = scores.dtype in draw_launch.DTYPES and scores.shape[1] <= draw_launch.MAX_VOCABULARY
    return draw_launch if fits else None
