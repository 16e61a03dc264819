"""Gated units of a model as decode steps compute them: few rows in one launch, more in three."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..forward.linear import MOST_ROWS, few_rows_gated, find_obstacle
from ..forward.small import gated_product
from .linears import is_plain
from .trial import agree, made_up

NAMES = ("gate_proj", "up_proj", "down_proj")
ACTIVATIONS = ("act_fn", "act", "activation_fn")
TRIAL_ROWS = 2
TRIAL_SCALES = (1, 16)
"""Gates of some tens show where a model bounds them."""


class GatedUnits:
    """Those among ``parts`` whose forward is down(silu(gate(x)) * up(x)); tried, not read.

    Outside of :meth:`switched` they compute as ever.
    """

    def __init__(self, parts: Iterable[nn.Module]) -> None:
        ours: dict[type[nn.Module], type[nn.Module]] = {}
        self.units = [
            (part, type(part), ours.setdefault(type(part), _fuse(type(part))))
            for part in dict.fromkeys(parts)
            if _is_gated(part)
        ]

    @contextmanager
    def switched(self) -> Iterator[None]:
        """Within, few rows take the kernel."""
        # Classes, not forwards: a compiler makes one forward for all units of a class.
        for unit, _, ours in self.units:
            unit.__class__ = ours
        try:
            yield
        finally:
            for unit, theirs, _ in self.units:
                unit.__class__ = theirs


def _fuse(kind: type[nn.Module]) -> type[nn.Module]:
    """``kind`` with the kernel in its forward."""

    def forward(self: Any, *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        (x,) = args or kwargs.values()
        if x.numel() <= MOST_ROWS * x.shape[-1]:
            hidden = few_rows_gated(x, self.gate_proj.weight, self.up_proj.weight)
        elif torch.compiler.is_compiling():  # it joins activation and product by itself
            return kind.forward(self, x)
        else:
            hidden = gated_product(self.gate_proj(x), self.up_proj(x))
        return self.down_proj(hidden)

    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})


def _is_gated(module: nn.Module) -> bool:
    layers = [module._modules.get(name) for name in NAMES]
    linears = [x for x in layers if isinstance(x, nn.Linear) and is_plain(x)]
    if len(linears) < len(NAMES) or "forward" in vars(module):
        return False
    gate, up, _ = linears
    if gate.weight.shape != up.weight.shape or gate.weight.dtype != up.weight.dtype:
        return False
    if any(find_obstacle(x) is not None or x.bias is not None for x in (gate, up)):
        return False
    if module._forward_hooks or module._forward_pre_hooks:
        return False
    if len(inspect.signature(module.forward).parameters) != 1:
        return False
    # By itself: behind two products in half precision a gelu passes for a silu.
    activation = next(
        (getattr(module, name) for name in ACTIVATIONS if hasattr(module, name)), None
    )
    points = torch.linspace(-8, 8, 65, device=gate.weight.device)
    if activation is None or not agree(activation, nn.functional.silu, points):
        return False
    kind = type(module)

    def fused(x: torch.Tensor) -> torch.Tensor:
        return _fuse(kind).forward(module, x)

    x = made_up(TRIAL_ROWS, gate.in_features, like=gate.weight)
    return all(agree(module, fused, scale * x) for scale in TRIAL_SCALES)
