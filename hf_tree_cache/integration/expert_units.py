"""Sparse experts of a model as decode steps compute them: few rows in four launches."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..forward.experts import few_rows_experts, find_obstacle, is_small
from .experts import EQUAL_IMPLEMENTATIONS
from .trial import WITHIN, agree, is_untouched, made_up, twin
from .units import Forward, Units

PARTS = {"gate_up_proj", "down_proj"}
"""Names of the parameters, as transformers' decorator of experts expects them."""

UNUSUAL = ("has_bias", "is_transposed", "has_post_expert_norm", "_is_expert_parallel")
"""Marks of that decorator for experts that compute something else."""

TRIAL_WIDTH, TRIAL_SIZE, TRIAL_ROWS = 16, 24, 3
TRIAL_SCALES = (0.1, 1, 64)
"""As for gated units."""


class ExpertUnits(Units):
    """Those among ``parts`` that add up shares of down(silu(gate(x)) * up(x)); tried, not read."""

    def __init__(self, parts: Iterable[nn.Module]) -> None:
        found = [(part, None) for part in dict.fromkeys(parts) if _is_served(part)]
        super().__init__(found, _make_forward)


def _make_forward(kind: type[nn.Module], _: None) -> Forward:
    """That of ``kind`` with the kernels in it."""

    def forward(
        self: Any,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        x, chosen, shares = hidden_states, top_k_index, top_k_weights
        is_theirs = self.config._experts_implementation in EQUAL_IMPLEMENTATIONS
        same = x.dtype == self.down_proj.dtype and chosen.shape == shares.shape
        are_few = x.ndim == chosen.ndim == 2 and is_small(chosen.numel(), len(self.down_proj))
        if is_theirs and same and are_few:
            return few_rows_experts(x, self.gate_up_proj, self.down_proj, chosen, shares)
        return kind.forward(self, x, chosen, shares)

    return forward


def _is_served(module: nn.Module) -> bool:
    if getattr(module, "has_gate", None) is not True or not is_untouched(module):
        return False
    if any(getattr(module, mark, False) for mark in UNUSUAL):
        return False
    weights = dict(module.named_parameters())
    if set(weights) != PARTS or any(type(x) is not nn.Parameter for x in weights.values()):
        return False
    gate_up, down = weights["gate_up_proj"], weights["down_proj"]
    if find_obstacle(gate_up, down) is not None:
        return False
    return _computes_as_ours(module, len(down), like=down)


def _computes_as_ours(module: Any, num_experts: int, *, like: torch.Tensor) -> bool:
    """With weights of another size, in float64: activation, order of halves, use of shares."""
    top = min(2, num_experts)

    def draw(*shape: int) -> torch.Tensor:
        return made_up(*shape, like=like, dtype=torch.float64)

    gate_up = draw(num_experts, 2 * TRIAL_SIZE, TRIAL_WIDTH) / 8
    down = draw(num_experts, TRIAL_WIDTH, TRIAL_SIZE) / 8
    chosen = torch.arange(TRIAL_ROWS * top, device=like.device).view(-1, top) % num_experts
    shares = draw(TRIAL_ROWS, top) / 8
    # The model's own loop over experts: not all implementations take float64.
    loop = inspect.unwrap(type(module).forward)
    other = twin(module, gate_up_proj=gate_up, down_proj=down)

    def theirs(x: torch.Tensor) -> object:
        return loop(other, x, chosen, shares)

    def ours(x: torch.Tensor) -> torch.Tensor:
        gate, up = torch.einsum("rk,rtnk->rtn", x, gate_up[chosen]).chunk(2, -1)
        parts = torch.einsum("rtn,rtkn->rtk", nn.functional.silu(gate) * up, down[chosen])
        return (parts * shares[..., None]).sum(1)

    x = draw(TRIAL_ROWS, TRIAL_WIDTH)
    return all(agree(theirs, ours, scale * x, within=WITHIN) for scale in TRIAL_SCALES)
