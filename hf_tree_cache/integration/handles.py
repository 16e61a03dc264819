"""PagedKV and TreeMask: what travels through a model in place of dense K/V and 4-D masks.

Both are plain Python objects that our attention function recognises. Anything else that touches one
gets the dense tensor, made on the spot, so a model that works on K/V itself is slower, not wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from transformers.masking_utils import causal_mask_function, sdpa_mask

from ..attention.plan import Window
from .materialising import Materialising
from .operands import Multiplied, Operand
from .step import UNKNOWN_READER, LayerKV


class PagedKV(Multiplied):
    """The keys (``which`` 0) or values (1) of one layer, not gathered. ``[B, Hkv, L, D]``."""

    def __init__(self, source: LayerKV, which: int) -> None:
        self.source = source
        self.which = which

    @property
    def shape(self) -> torch.Size:
        new = self.source.new[self.which].shape
        return torch.Size((new[0], new[1], self.source.step.columns, new[3]))

    @property
    def dtype(self) -> torch.dtype:
        return self.source.storage.spec.dtype

    @property
    def device(self) -> torch.device:
        return self.source.storage.spec.device

    @property
    def ndim(self) -> int:
        return 4

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Itself when it is there already: shared-KV layers pass handles on."""
        devices = [a for a in (*args, *kwargs.values()) if isinstance(a, (torch.device, str))]
        if len(devices) == len(args) + len(kwargs) and torch.device(devices[0]) == self.device:
            return self
        if len(args) == 1 and not kwargs and isinstance(args[0], torch.dtype):
            return self.operand().to(args[0])
        return self.dense().to(*args, **kwargs)

    def operand(self) -> Any:
        """What a model that attends by itself multiplies with: an :class:`Operand`, or a tensor."""
        step = self.source.step
        if self.source.attend is not None or step.fresh or not step.alive:
            return self.dense()
        if torch.is_autocast_enabled(self.device.type):
            return self.dense()
        self.source.note_read(None)
        return Operand(self, self.dtype)

    def transpose(self, dim0: int, dim1: int) -> Any:
        return self.operand().transpose(dim0, dim1)

    def reshape(self, *shape: Any) -> Any:
        return self.operand().reshape(*shape)

    view = reshape

    def both(self, reason: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Dense keys and values, gathered for ``reason``."""
        return self.source.dense(reason)

    def dense(self) -> torch.Tensor:
        return self.both(UNKNOWN_READER)[self.which]

    def __repr__(self) -> str:
        return f"PagedKV({'values' if self.which else 'keys'}, shape={tuple(self.shape)})"


class CompiledKV:
    """The new K and V of a layer within a compiled forward: the operator behind does the rest.

    Attributes:
        keys, values: ``[B, Hkv, 1, D]``.
        place: int64 ``[]`` on the CPU: which :class:`.compiled.CompiledLayers`, and which layer.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, place: torch.Tensor) -> None:
        self.keys = keys
        self.values = values
        self.place = place


class TreeMask(Materialising):
    """A mask that nobody has needed as a tensor yet.

    Args:
        arguments: what transformers passed to the mask function.
    """

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.arguments = arguments

    @property
    def padding(self) -> torch.Tensor | None:
        """The 2-D mask, bool ``[B, L]``, true on tokens; None where there is none."""
        return self.arguments.get("attention_mask")

    @cached_property
    def all_tokens(self) -> bool:
        """Whether no column is padding. Reads the mask: a synchronisation on a GPU."""
        return self.padding is None or bool(self.padding.all())

    @cached_property
    def pattern(self) -> tuple[bool, Window | None]:
        """(recognised, window): causal, perhaps within a window, is; nothing else."""
        if self.arguments.get("use_vmap"):
            return False, None
        return _read_pattern(self.arguments["mask_function"])

    @cached_property
    def _dense(self) -> torch.Tensor:
        arguments = {**self.arguments, "allow_is_causal_skip": False}
        arguments["allow_is_bidirectional_skip"] = False
        mask = sdpa_mask(**arguments)
        assert mask is not None
        return mask

    def dense(self) -> torch.Tensor:
        """``[B, 1, T, L]`` bool, true where a query may look."""
        return self._dense

    def to(self, *args: Any, **kwargs: Any) -> TreeMask:
        """The same mask with its 2-D part moved; accelerate calls this on every argument."""
        moved = dict(self.arguments)
        if self.padding is not None:
            moved["attention_mask"] = self.padding.to(*args, **kwargs)
        for device in (*args, *kwargs.values()):
            if isinstance(device, (torch.device, str, int)) and not isinstance(device, bool):
                moved["device"] = torch.device(device)
        return TreeMask(moved)

    def contiguous(self) -> torch.Tensor:
        """The tensor: ``generate`` asks so for the mask of a static cache."""
        return self.dense().contiguous()

    def __repr__(self) -> str:
        recognised, window = self.pattern
        return f"TreeMask({window or 'causal' if recognised else 'unrecognised'})"


def _read_pattern(function: Callable[..., Any]) -> tuple[bool, Window | None]:
    """Recognise causal, sliding and chunked mask functions by what they close over."""
    if function is causal_mask_function:
        return True, None
    parts = _closure(function).get("mask_functions")
    if not function.__qualname__.startswith("and_masks") or parts is None or len(parts) != 2:
        return False, None
    overlay, base = parts
    if base is not causal_mask_function:
        return False, None
    variables = _closure(overlay)
    if overlay.__qualname__.startswith("sliding_window_overlay"):
        return True, Window("sliding", int(variables["sliding_window"]))
    if overlay.__qualname__.startswith("chunked_overlay"):
        return True, Window("chunked", int(variables["chunk_size"]))
    return False, None


def _closure(function: Callable[..., Any]) -> dict[str, Any]:
    names = function.__code__.co_freevars
    return {
        name: cell.cell_contents
        for name, cell in zip(names, function.__closure__ or (), strict=True)
    }
