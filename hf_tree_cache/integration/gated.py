"""Gated units of a model as decode steps compute them: few rows in one launch, more in three."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.func import functional_call

from ..forward.linear import ACTIVATIONS, MOST_ROWS, few_rows_gated, find_obstacle
from ..forward.small import activate, gated_product
from .linears import is_plain
from .trial import agree, is_untouched, made_up
from .units import Forward, Units

APART, JOINED = ("gate_proj", "up_proj", "down_proj"), ("gate_up_proj", "down_proj")
"""Names of the layers; gate first where they share a weight."""

TRIAL_ROWS, TRIAL_WIDTH, TRIAL_SIZE = 2, 24, 16
TRIAL_SCALES = (0.1, 1, 64)
"""Small gates tell activations apart, large ones show where a model bounds them."""

NEAR = 1e-6
"""Of the largest: far less than from gelu to its formula with tanh."""


class Style(NamedTuple):
    """How a unit computes.

    Attributes:
        activation: as of :func:`..forward.linear.few_rows_gated`.
        joined: gate and up share a weight.
    """

    activation: str
    joined: bool


class GatedUnits(Units):
    """Those among ``parts`` that are down(activation(gate(x)) * up(x)); tried, not read."""

    def __init__(self, parts: Iterable[nn.Module]) -> None:
        styles = ((part, find_style(part)) for part in dict.fromkeys(parts))
        super().__init__([found for found in styles if found[1] is not None], _make_forward)


def _make_forward(kind: type[nn.Module], style: Style) -> Forward:
    """That of ``kind`` with the kernel in it."""
    activation, joined = style

    def forward(self: Any, *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        (x,) = args or kwargs.values()
        if x.numel() <= MOST_ROWS * x.shape[-1]:
            if joined:
                gate, up = self.gate_up_proj.weight.chunk(2)
            else:
                gate, up = self.gate_proj.weight, self.up_proj.weight
            hidden = few_rows_gated(x, gate, up, activation)
        elif torch.compiler.is_compiling():  # it joins activation and product by itself
            return kind.forward(self, x)
        else:
            if joined:
                gate, up = self.gate_up_proj(x).chunk(2, -1)
            else:
                gate, up = self.gate_proj(x), self.up_proj(x)
            hidden = gated_product(gate, up, activation)
        return self.down_proj(hidden)

    return forward


def find_style(module: nn.Module) -> Style | None:
    """How the kernel would do what ``module`` does; None if it would not."""
    joined = JOINED[0] in module._modules
    names = JOINED if joined else APART
    layers = [module._modules.get(name) for name in names]
    linears = [x for x in layers if isinstance(x, nn.Linear) and is_plain(x)]
    if len(linears) < len(names) or not is_untouched(module):
        return None
    *first, down = linears
    width = down.in_features * (1 + joined)
    if len({(x.weight.shape, x.weight.dtype) for x in first}) > 1 or len(first[0].weight) != width:
        return None
    if any(find_obstacle(x) is not None or x.bias is not None for x in first):
        return None
    if len(inspect.signature(module.forward).parameters) != 1:
        return None
    return next((style for style in _styles(joined) if _computes_so(module, style)), None)


def _styles(joined: bool) -> list[Style]:
    return [Style(activation, joined) for activation in ACTIVATIONS]


def _computes_so(module: nn.Module, style: Style) -> bool:
    """With weights of another size, in float64: what is multiplied with what is as with its own."""
    like = next(module.parameters())

    def draw(*shape: int) -> torch.Tensor:
        return made_up(*shape, like=like, dtype=torch.float64)

    gate_up = draw(2 * TRIAL_WIDTH, TRIAL_SIZE) / 8
    down = draw(TRIAL_SIZE, TRIAL_WIDTH) / 8
    gate, up = gate_up.chunk(2)
    parts = (gate_up, down) if style.joined else (gate, up, down)
    names = JOINED if style.joined else APART
    weights = {f"{name}.weight": part for name, part in zip(names, parts, strict=True)}

    def theirs(x: torch.Tensor) -> object:
        return functional_call(module, weights, (x,))

    def ours(x: torch.Tensor) -> torch.Tensor:
        return (activate(x @ gate.T, style.activation) * (x @ up.T)) @ down.T

    x = draw(TRIAL_ROWS, TRIAL_SIZE)
    return all(agree(theirs, ours, scale * x, within=NEAR) for scale in TRIAL_SCALES)
