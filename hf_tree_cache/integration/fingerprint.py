"""fingerprint: what of a model a captured forward has taken for granted."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch import nn

from .experts import EQUAL_IMPLEMENTATIONS


def fingerprint(model: nn.Module) -> Hashable:
    """Equal as long as nothing has moved that a captured forward reads.

    Covers the addresses of parameters, buffers and other tensors that modules hold, their modes,
    adapters (PEFT), and experts implementations other than transformers' own; values may change
    in place.
    """
    return tuple(_facts(model))


def find_hook(model: nn.Module) -> str | None:
    """The name of a module within ``model`` whose forward hooks a replay would not run."""
    for name, module in model.named_modules():
        if name and (module._forward_hooks or module._forward_pre_hooks):
            return name
    return None


def _facts(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        yield module.training
        for held in (module._parameters, module._buffers, vars(module)):
            for value in held.values():
                if isinstance(value, torch.Tensor):
                    yield from _addresses(value)
        # PEFT's layers choose by attributes what their forward does.
        for name in ("active_adapters", "disable_adapters", "merged_adapters"):
            chosen = getattr(module, name, None) if "base_layer" in module._modules else None
            if chosen is not None:
                yield tuple(chosen) if isinstance(chosen, list) else str(chosen)
        if "has_gate" in vars(module):
            chosen = getattr(vars(module).get("config"), "_experts_implementation", None)
            yield None if chosen in EQUAL_IMPLEMENTATIONS else chosen


def _addresses(tensor: torch.Tensor) -> Iterator[int]:
    """Of the memory of ``tensor``; quantised weights and DTensors wrap others and have none."""
    inner = getattr(tensor, "__tensor_flatten__", None)
    if inner is None:
        yield tensor.data_ptr()
        return
    for name in inner()[0]:
        part = getattr(tensor, name)
        if isinstance(part, torch.Tensor):  # a DTensor also names its mesh
            yield from _addresses(part)
