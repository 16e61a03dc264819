"""Linears of a model as decode steps compute them.

A product with few rows is bound by reading its weight. It goes through a kernel made for that, and
projections of the same input (Q, K and V; gate and up) go through it together: a small weight does
not fill the GPU by itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from ..forward.linear import MOST_ROWS, few_rows_linear, find_obstacle
from .trial import is_untouched

TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of neighbours that models apply to one input."""

NARROW = 8192
"""Outputs of the narrowest neighbour, below which products fill a large GPU only together."""


class DecodeLinears:
    """The plain linears among ``parts``; outside of :meth:`switched` they compute as ever.

    Args:
        parts: modules; what they hold is not looked at.
        join: neighbours also share one weight for batches of any size: their parameters become
            views of it, with the values they have.
    """

    def __init__(self, parts: Iterable[nn.Module], *, join: bool) -> None:
        parts = list(dict.fromkeys(parts))
        groups = [
            found for part in parts for names in TOGETHER if (found := _neighbours(part, names))
        ]
        grouped = {child for children in groups for child in children}
        groups += [
            [part]
            for part in parts
            if isinstance(part, nn.Linear) and is_plain(part) and part not in grouped
        ]
        self._groups = [
            group
            for children in groups
            if (group := _Group(children, join=join and len(children) > 1)).is_of_use
        ]
        self._to_join = [group for group in self._groups if group.gains_if_joined]

    def __len__(self) -> int:
        return len(self._groups)

    @property
    def layers(self) -> list[nn.Linear]:
        """Those that have a way of ours."""
        return [child for group in self._groups for child in group.children]

    @property
    def intact(self) -> bool:
        """Whether the weights are still those that were found or made."""
        return all(group.intact for group in self._groups)

    @property
    def gain_if_joined(self) -> bool:
        """Whether :meth:`join` would make batches of many rows faster."""
        return bool(self._to_join)

    def join(self) -> None:
        """Narrow neighbours share one weight from now on, as far as there is memory."""
        joining, self._to_join = self._to_join, []
        try:
            for group in joining:
                group.join()
        except torch.OutOfMemoryError:  # for a moment a weight is there twice
            return

    @contextmanager
    def switched(self) -> Iterator[None]:
        """Within, few rows take the kernel, and neighbours are computed together."""
        for group in self._groups:
            group.switch(_DecodeLinear)
        try:
            yield
        finally:
            for group in self._groups:
                group.switch(nn.Linear)
                group.forget()

    def release(self) -> None:
        """Give every weight memory of its own again."""
        for group in self._groups:
            group.release()
        self._groups, self._to_join = [], []


class _DecodeLinear(nn.Linear):
    group: _Group
    place: int

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        group = self.group
        is_small = group.takes_few and input.numel() <= MOST_ROWS * self.in_features
        if group.count == 1 or not (is_small or group.joined is not None):
            if is_small:
                return few_rows_linear(input, group.weights, group.biases)
            return nn.functional.linear(input, self.weight, self.bias)
        if group.x is not input:
            group.left = group.count
            group.x = input
            if is_small:
                group.y = few_rows_linear(input, group.weights, group.biases)
            else:
                assert group.joined is not None
                group.y = nn.functional.linear(input, group.joined, group.joined_bias)
        first, last = group.spans[self.place]
        assert group.y is not None
        y = group.y[..., first:last]
        group.left -= 1
        if group.left == 0:
            group.forget()
        return y


class _Group:
    """Linears with the same input, and what was last computed for all of them.

    Attributes:
        takes_few: the kernel serves them.
        joined: the weight that they share, if they do.
        left: how many have not taken their part of ``y`` yet.
    """

    def __init__(self, children: Sequence[nn.Linear], *, join: bool) -> None:
        self.children = list(children)
        self.joined: torch.Tensor | None = None
        self.joined_bias: torch.Tensor | None = None
        ends = [0]
        for child in children:
            ends.append(ends[-1] + child.out_features)
        self.spans = list(itertools.pairwise(ends))
        self.count = len(children)
        # The parameters themselves: memory that a model moves away from is not held here.
        self.weights: list[torch.Tensor] = [child.weight for child in children]
        self.biases: list[torch.Tensor] = [x.bias for x in children if x.bias is not None]
        self.takes_few = all(find_obstacle(child) is None for child in children)
        self._places = self._look()
        if join:
            self.join()
        self.forget()

    @property
    def is_of_use(self) -> bool:
        return self.takes_few or self.joined is not None

    @property
    def gains_if_joined(self) -> bool:
        # In float32 a product of another width may differ in its last digits.
        is_narrow = min(child.out_features for child in self.children) < NARROW
        return self.count > 1 and self.takes_few and self.joined is None and is_narrow

    @property
    def intact(self) -> bool:
        return self._look() == self._places

    def forget(self) -> None:
        self.x: torch.Tensor | None = None
        self.y: torch.Tensor | None = None
        self.left = 0

    def join(self) -> None:
        has_bias = self.children[0].bias is not None
        with torch.no_grad(), torch.inference_mode(False):
            weight = torch.cat([child.weight for child in self.children])
            bias = torch.cat([child.bias for child in self.children]) if has_bias else None
        self.joined, self.joined_bias = weight, bias
        for child, (first, last) in zip(self.children, self.spans, strict=True):
            child.weight.data = weight[first:last]
            if bias is not None:
                child.bias.data = bias[first:last]
        self._places = self._look()

    def release(self) -> None:
        if self.joined is not None:
            for child in self.children:
                for parameter in child.parameters(recurse=False):
                    parameter.data = parameter.data.clone()

    def switch(self, kind: type[nn.Linear]) -> None:
        for place, child in enumerate(self.children):
            child.__class__ = kind
            for name, value in (("group", self), ("place", place)):
                if kind is _DecodeLinear:
                    vars(child)[name] = value
                else:
                    vars(child).pop(name, None)

    def _look(self) -> list[tuple[int, int]]:
        """Which tensors the layers have now, and where."""
        now: list[torch.Tensor] = [child.weight for child in self.children]
        now += [child.bias for child in self.children if child.bias is not None]
        return [(id(x), x.data_ptr()) for x in now]


def is_plain(module: nn.Linear) -> bool:
    """Whether it is a linear layer that does nothing but its product."""
    if type(module) is not nn.Linear or type(module.weight) is not nn.Parameter:
        return False
    return is_untouched(module)


def _neighbours(module: nn.Module, names: Sequence[str]) -> list[nn.Linear] | None:
    """The children of ``module`` called ``names``, if their products can be one."""
    children = [module._modules.get(name) for name in names]
    linears = [child for child in children if isinstance(child, nn.Linear) and is_plain(child)]
    if len(linears) != len(names):
        return None
    kinds = {
        (x.in_features, x.weight.dtype, x.weight.device, x.bias is None, x.weight.is_contiguous())
        for x in linears
    }
    return linears if len(kinds) == 1 else None
