"""Materialising: a Python object that becomes a tensor where somebody uses it as one."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch


class Materialising:
    """Becomes its :meth:`dense` tensor as soon as anyone uses it as one."""

    def dense(self) -> torch.Tensor:
        raise NotImplementedError

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        def unwrap(value: Any) -> Any:
            if isinstance(value, Materialising):
                return value.dense()
            if isinstance(value, (list, tuple)):
                return type(value)(unwrap(item) for item in value)
            return value

        return func(*unwrap(args), **{key: unwrap(value) for key, value in (kwargs or {}).items()})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.dense(), name)

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self.dense()[index]

    def __len__(self) -> int:
        return len(self.dense())


def _forward_operator(name: str) -> Callable[..., Any]:
    apply = getattr(operator, name)

    def method(self: Materialising, *others: Any) -> Any:
        others = tuple(o.dense() if isinstance(o, Materialising) else o for o in others)
        return apply(self.dense(), *others)

    return method


def _reflected_operator(name: str) -> Callable[..., Any]:
    apply = getattr(operator, name)
    return lambda self, other: apply(other, self.dense())


for _name in ("add", "sub", "mul", "truediv", "matmul", "and_", "or_"):
    setattr(Materialising, f"__{_name.strip('_')}__", _forward_operator(_name))
    setattr(Materialising, f"__r{_name.strip('_')}__", _reflected_operator(_name))
for _name in ("neg", "invert", "lt", "le", "gt", "ge"):
    setattr(Materialising, f"__{_name}__", _forward_operator(_name))
