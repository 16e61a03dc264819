"""Joined linears: projections of the same input as one matrix product, for compiled layers.

A product with few rows is bound by reading its weight, and a small weight does not fill the GPU:
Q, K and V in one product take two thirds of the time that they take apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of neighbours that models apply to one input."""


class JoinedLinears:
    """The linears within ``modules`` that can be joined, joined.

    Their weights become views of one tensor, with the values they have. Nothing else changes, and
    nothing is computed together outside of :meth:`together`.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._groups = [
            _Group(children)
            for module in modules
            for part in module.modules()
            for names in TOGETHER
            if (children := _joinable(part, names))
        ]

    def __len__(self) -> int:
        return len(self._groups)

    @property
    def intact(self) -> bool:
        """Whether all weights are still the views that were made."""
        return all(group.intact for group in self._groups)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Within, the first of a group to meet an input computes for the others."""
        for group in self._groups:
            group.switch(_JoinedLinear)
        try:
            yield
        finally:
            for group in self._groups:
                group.switch(nn.Linear)

    def release(self) -> None:
        """Give every weight memory of its own again."""
        for group in self._groups:
            group.release()
        self._groups = []

    def forget(self) -> None:
        """Drop what was kept of the last inputs."""
        for group in self._groups:
            group.shared.forget()


class _Shared:
    """The last input of a group, and its product with the joined weight."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.weight = weight
        self.bias = bias
        self.forget()

    def forget(self) -> None:
        self.x: torch.Tensor | None = None
        self.y: torch.Tensor | None = None


class _JoinedLinear(nn.Linear):
    shared: Any
    first: int
    last: int

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        shared = self.shared
        if shared.x is not input:
            shared.x = input
            shared.y = nn.functional.linear(input, shared.weight, shared.bias)
        return shared.y[..., self.first : self.last]


class _Group:
    def __init__(self, children: Sequence[nn.Linear]) -> None:
        self.children = list(children)
        bias = None
        with torch.no_grad(), torch.inference_mode(False):
            weight = torch.cat([child.weight for child in children])
            if children[0].bias is not None:
                bias = torch.cat([child.bias for child in children])
        self.shared = _Shared(weight, bias)
        self.spans = []
        end = 0
        for child in children:
            first, end = end, end + child.out_features
            self.spans.append((first, end))
            child.weight.data = weight[first:end]
            if bias is not None:
                child.bias.data = bias[first:end]

    @property
    def intact(self) -> bool:
        pairs = [(self.shared.weight, [child.weight for child in self.children])]
        if self.shared.bias is not None:
            pairs.append((self.shared.bias, [child.bias for child in self.children]))
        return all(
            view.data_ptr() == joined[first:].data_ptr()
            for joined, views in pairs
            for view, (first, _) in zip(views, self.spans, strict=True)
        )

    def release(self) -> None:
        for child in self.children:
            for parameter in child.parameters(recurse=False):
                parameter.data = parameter.data.clone()

    def switch(self, kind: type[nn.Linear]) -> None:
        for child, (first, last) in zip(self.children, self.spans, strict=True):
            child.__class__ = kind
            values = {"shared": self.shared, "first": first, "last": last}
            for name, value in values.items():
                if kind is _JoinedLinear:
                    vars(child)[name] = value
                else:
                    vars(child).pop(name, None)


def _joinable(module: nn.Module, names: Sequence[str]) -> list[nn.Linear] | None:
    """The children of ``module`` called ``names``, if their products can be one."""
    children = [module._modules.get(name) for name in names]
    linears = [child for child in children if type(child) is nn.Linear]
    if len(linears) != len(names):
        return None
    kinds = {
        (x.in_features, x.weight.dtype, x.weight.device, x.bias is None, x.weight.is_contiguous())
        for x in linears
    }
    plain = not any(
        "forward" in vars(x) or x._forward_hooks or x._forward_pre_hooks for x in linears
    )
    return linears if plain and len(kinds) == 1 else None
