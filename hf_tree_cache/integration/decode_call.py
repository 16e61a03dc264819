"""What goes into a captured decode step, and what comes out of it."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from transformers.utils import ModelOutput

from ..naming import NAMES, batch_dim
from .cache import TreeCache
from .step import NotCapturable, Step

CACHE = object()
"""Stands in a kept output for the cache, which must not live as long."""


@dataclass(frozen=True)
class Call:
    """The arguments of a decode step, but for the number of rows and what tensors hold.

    Attributes:
        tensors: name, batch dimension, shape of one row and dtype.
        constants: name and value.
    """

    tensors: tuple[tuple[str, int, tuple[int, ...], torch.dtype], ...]
    constants: tuple[tuple[str, Hashable], ...]

    def make_inputs(self, bucket: int, device: torch.device) -> dict[str, torch.Tensor]:
        """Zeros of ``bucket`` rows for every tensor."""
        with torch.inference_mode(False):  # they outlive the block that they may be made in
            return {
                name: torch.zeros((*shape[:dim], bucket, *shape[dim:]), dtype=dtype, device=device)
                for name, dim, shape, dtype in self.tensors
            }

    def fill(self, inputs: dict[str, torch.Tensor], kwargs: dict[str, Any]) -> None:
        """Copy the tensors of ``kwargs`` to the first rows of ``inputs``."""
        for name, dim, _, _ in self.tensors:
            value, place = kwargs[name], inputs[name]
            if len(value) < len(place) or dim:
                place = place.narrow(dim, 0, value.shape[dim])
            place.copy_(value)


def read_call(step: Step, kwargs: dict[str, Any]) -> Call:
    """What the arguments of a decode step are.

    Raises:
        NotCapturable: something that cannot be read from a fixed address.
    """
    rows = len(step.counts)
    tensors: list[tuple[str, int, tuple[int, ...], torch.dtype]] = []
    constants: list[tuple[str, Hashable]] = []
    for name, value in sorted(kwargs.items()):  # in whatever order a loop passes them
        if name in NAMES:
            continue
        if name == "attention_mask":
            # What it hides was never stored: a forward without one is the same.
            if value is not None and not step.padding_known:
                raise NotCapturable("the attention mask hides more than padding")
        elif isinstance(value, torch.Tensor):
            shape = tuple(value.shape)
            dim = batch_dim(name, len(shape))
            if value.is_floating_point() or len(shape) <= dim or shape[dim] != rows:
                raise NotCapturable(f"{name} is a tensor of {shape}, {value.dtype}")
            tensors.append((name, dim, (*shape[:dim], *shape[dim + 1 :]), value.dtype))
        elif value is None or isinstance(value, (bool, int, float, str)):
            constants.append((name, value))
        else:
            raise NotCapturable(f"{name} is a {type(value).__name__}")
    if not {"input_ids", "position_ids"} <= {tensor[0] for tensor in tensors}:
        raise NotCapturable("the step comes without input_ids or without position_ids")
    return Call(tuple(tensors), tuple(constants))


def without_cache(output: Any) -> Any:
    """``output`` to be kept: the cache in it replaced by :data:`CACHE`."""
    return _map(output, lambda x: CACHE if isinstance(x, TreeCache) else x)


def outward(output: Any, bucket: int, rows: int, cache: TreeCache, *, copy: bool) -> Any:
    """The output for the caller's rows and cache.

    Args:
        copy: take tensors out of the memory that the next replay overwrites.
    """

    def change(value: Any) -> Any:
        if value is CACHE:
            return cache
        if not isinstance(value, torch.Tensor):
            return value
        if rows < bucket and value.ndim and value.shape[0] == bucket:
            value = value[:rows]
        return value.clone() if copy else value

    return _map(output, change)


def _map(value: Any, change: Callable[[Any], Any]) -> Any:
    """``value`` with ``change`` applied to what its containers hold."""
    if isinstance(value, ModelOutput):
        return type(value)(**{key: _map(item, change) for key, item in value.items()})
    if type(value) in (tuple, list):
        return type(value)(_map(item, change) for item in value)
    return change(value)
