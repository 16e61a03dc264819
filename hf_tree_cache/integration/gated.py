"""Gated units of a model as decode steps compute them: few rows in one launch, more in three."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from ..forward.linear import MOST_ROWS, few_rows_gated, find_obstacle
from ..forward.small import gated_product
from .linears import is_plain
from .trial import WITHIN, agree, is_untouched, made_up
from .units import Forward, Units

NAMES = ("gate_proj", "up_proj", "down_proj")
TRIAL_ROWS = 2
TRIAL_SHAPES = ((24, 16), (24, 16), (16, 24))
TRIAL_SCALES = (0.1, 1, 64)
"""Small gates tell activations apart, large ones show where a model bounds them."""


class GatedUnits(Units):
    """Those among ``parts`` whose forward is down(silu(gate(x)) * up(x)); tried, not read."""

    def __init__(self, parts: Iterable[nn.Module]) -> None:
        found = [(part, None) for part in dict.fromkeys(parts) if _is_gated(part)]
        super().__init__(found, _make_forward)


def _make_forward(kind: type[nn.Module], _: None) -> Forward:
    """That of ``kind`` with the kernel in it."""

    def forward(self: Any, *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        (x,) = args or kwargs.values()
        if x.numel() <= MOST_ROWS * x.shape[-1]:
            hidden = few_rows_gated(x, self.gate_proj.weight, self.up_proj.weight)
        elif torch.compiler.is_compiling():  # it joins activation and product by itself
            return kind.forward(self, x)
        else:
            hidden = gated_product(self.gate_proj(x), self.up_proj(x))
        return self.down_proj(hidden)

    return forward


def _is_gated(module: nn.Module) -> bool:
    layers = [module._modules.get(name) for name in NAMES]
    linears = [x for x in layers if isinstance(x, nn.Linear) and is_plain(x)]
    if len(linears) < len(NAMES) or not is_untouched(module):
        return False
    gate, up, _ = linears
    if gate.weight.shape != up.weight.shape or gate.weight.dtype != up.weight.dtype:
        return False
    if any(find_obstacle(x) is not None or x.bias is not None for x in (gate, up)):
        return False
    if len(inspect.signature(module.forward).parameters) != 1:
        return False
    # Weights of another size, in float64: what is multiplied with what does not depend on them.
    weights = {
        f"{name}.weight": made_up(*shape, like=gate.weight, dtype=torch.float64) / 8
        for name, shape in zip(NAMES, TRIAL_SHAPES, strict=True)
    }

    def theirs(x: torch.Tensor) -> object:
        return functional_call(module, weights, (x,))

    def ours(x: torch.Tensor) -> torch.Tensor:
        gate, up, down = weights.values()
        return (nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T

    x = made_up(TRIAL_ROWS, TRIAL_SHAPES[0][1], like=gate.weight, dtype=torch.float64)
    return all(agree(theirs, ours, scale * x, within=WITHIN) for scale in TRIAL_SCALES)
