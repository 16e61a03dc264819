"""Routers of sparse experts as decode steps compute them: a product, and one launch to choose."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import nn

from ..forward.experts import MOST_ROUTED, MOST_TOP, route
from ..forward.linear import MOST_ROWS, few_rows_linear, find_weight_obstacle
from .trial import WITHIN, agree, is_untouched, made_up, twin
from .units import Forward, Units

TRIAL_ROWS, TRIAL_WIDTH = 3, 16


class Style(NamedTuple):
    """As of :func:`..forward.experts.route`."""

    normed: bool
    wide: bool


STYLES = [Style(normed, wide) for normed in (True, False) for wide in (False, True)]


class Routers(Units):
    """Those among ``parts`` that choose experts by softmax; tried, not read.

    They return logits, shares and experts.
    """

    def __init__(self, parts: Iterable[nn.Module]) -> None:
        styles = ((part, _find_style(part)) for part in dict.fromkeys(parts))
        super().__init__([found for found in styles if found[1] is not None], _make_forward)


def _make_forward(kind: type[nn.Module], style: Style) -> Forward:
    """That of ``kind`` with the kernels in it."""

    def forward(self: Any, hidden_states: torch.Tensor) -> Any:
        x, weight = hidden_states.reshape(-1, hidden_states.shape[-1]), self.weight
        if x.dtype != weight.dtype:
            return kind.forward(self, hidden_states)
        if len(x) <= MOST_ROWS:
            logits = few_rows_linear(x, [weight], [])
        else:
            logits = nn.functional.linear(x, weight)
        return logits, *route(logits, self.top_k, *style)

    return forward


def _find_style(module: Any) -> Style | None:
    """How the kernel would do what ``module`` does; None if it would not."""
    weights = dict(module.named_parameters())
    top = getattr(module, "top_k", None)
    if set(weights) != {"weight"} or type(top) is not int:
        return None
    weight = weights["weight"]
    if weight.ndim != 2 or find_weight_obstacle(weight) is not None:
        return None
    if not (0 < top <= min(MOST_TOP, len(weight)) and len(weight) <= MOST_ROUTED):
        return None
    if not is_untouched(module) or len(inspect.signature(module.forward).parameters) != 1:
        return None
    return next((style for style in STYLES if _computes_so(module, len(weight), top, style)), None)


def _computes_so(module: nn.Module, num_experts: int, top: int, style: Style) -> bool:
    """With a weight of another size, in float64."""
    like = next(module.parameters())
    weight = made_up(num_experts, TRIAL_WIDTH, like=like, dtype=torch.float64).sin()
    x = made_up(TRIAL_ROWS, TRIAL_WIDTH, like=like, dtype=torch.float64)
    theirs = twin(module, weight=weight)
    if hasattr(theirs, "hidden_dim"):  # which they reshape to
        theirs.hidden_dim = TRIAL_WIDTH

    def ours(x: torch.Tensor) -> object:
        logits = x @ weight.T
        shares, chosen = logits.softmax(-1).topk(top)
        if style.normed:
            shares = shares / shares.sum(-1, keepdim=True)
        return logits, shares.float() if style.wide else shares, chosen

    return all(agree(theirs, ours, scale * x, within=WITHIN) for scale in (0.1, 1))
