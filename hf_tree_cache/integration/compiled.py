"""CompiledLayers: a model's decoder layers as torch.compile makes them, for decode steps.

Compiling one layer serves all layers of its class (regional compilation): what differs from layer
to layer, and everything about the cache, is behind one operator that the compiler does not look
into. Needs Triton.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ..attention.plan import Window
from ..naming import cache_name
from .handles import CompiledKV, TreeMask
from .layers import PagedLayer
from .static import StaticDecode
from .step import NotCapturable

_RUNNING: weakref.WeakValueDictionary[int, CompiledLayers] = weakref.WeakValueDictionary()
"""An operator takes tensors and numbers only: the numbers here stand for objects."""

_NUMBERS = itertools.count()

MOST_LAYERS = 1 << 16
"""The number of an object and that of a layer travel as one."""


class CompiledLayers:
    """Compiled forwards for the decoder layers of ``model``.

    Args:
        model: a transformers model; its ``_no_split_modules`` are compiled.

    Raises:
        NotCapturable: it has no such modules, or they do not run their own forward.
    """

    def __init__(self, model: nn.Module) -> None:
        names = set(getattr(model, "_no_split_modules", None) or ())
        self.layers = [m for m in model.modules() if type(m).__name__ in names and _attends(m)]
        if not self.layers:
            raise NotCapturable("the model does not say what its decoder layers are")
        if any("forward" in vars(layer) for layer in self.layers):
            raise NotCapturable("the forward of its layers was replaced")
        self._compiled: dict[Callable[..., Any], Callable[..., Any]] = {}
        self._number = next(_NUMBERS)
        _RUNNING[self._number] = self
        self._proxies = [
            _Proxy(_layer_index(x, i), self._number) for i, x in enumerate(self.layers)
        ]
        self._windows: dict[int, Window | None] = {}
        self._static: StaticDecode | None = None
        self._paged: list[PagedLayer] = []

    @contextmanager
    def swapped(self, static: StaticDecode, paged: list[PagedLayer]) -> Iterator[None]:
        """Within, the model runs its compiled layers over what ``static`` was prepared for.

        Args:
            paged: layers of the cache.
        """
        self._static, self._paged = static, paged
        names = sorted({type(layer).__name__ for layer in self.layers})
        with tqdm(
            total=len(self.layers), desc=f"compiling {', '.join(names)}", unit="layer", delay=1.0
        ) as bar:
            try:
                for layer, proxy in zip(self.layers, self._proxies, strict=True):
                    layer.forward = self._forward_of(layer, proxy, bar)
                yield
            finally:
                for layer in self.layers:
                    vars(layer).pop("forward", None)
                self._static, self._paged = None, []

    def attend(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        layer: int,
        scale: float,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """Store a layer's new K and V, and attend: ``[bucket, 1, Hq, Dv]``, padding zero."""
        static, paged = self._static, self._paged[layer]
        assert static is not None and paged.storage is not None
        kv = static.write(paged.storage, paged.position, keys, values)
        # Fresh memory: the compiler may reuse it for what follows.
        out = query.new_zeros(query.shape[0], 1, query.shape[1], values.shape[3])
        static.attend(
            kv,
            query,
            scale=scale,
            window=self._windows[layer],
            softcap=softcap,
            sinks=sinks,
            out=out,
        )
        return out

    def _forward_of(self, layer: nn.Module, proxy: _Proxy, bar: Any) -> Callable[..., Any]:
        plain = type(layer).forward
        if plain not in self._compiled:
            self._compiled[plain] = torch.compile(plain, fullgraph=True)
        compiled = self._compiled[plain]

        def forward(*args: Any, **kwargs: Any) -> Any:
            name = cache_name(kwargs)
            if name not in kwargs or "attention_mask" not in kwargs:
                raise NotCapturable(f"{type(layer).__name__} takes its arguments in another way")
            mask = kwargs["attention_mask"]
            recognised, window = (
                mask.pattern if isinstance(mask, TreeMask) else (mask is None, None)
            )
            if not recognised:
                raise NotCapturable("unrecognised mask")
            self._windows[proxy.index] = window
            kwargs.update({name: proxy, "attention_mask": None})
            result = compiled(layer, *args, **kwargs)
            bar.update()
            return result

        return forward


class _Proxy:
    """What a compiled layer sees in the place of the cache."""

    def __init__(self, index: int, number: int) -> None:
        self.index = index
        # A tensor, since the compiler would make one forward for each value of an int.
        self.place = torch.tensor(number * MOST_LAYERS + index)

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[CompiledKV, CompiledKV]:
        kv = CompiledKV(keys, values, self.place)
        return kv, kv


def _attends(module: nn.Module) -> bool:
    return any(hasattr(child, "layer_idx") for child in module.modules())


def _layer_index(module: nn.Module, default: int) -> int:
    """The number of a layer in the cache."""
    found = {vars(child)["layer_idx"] for child in module.modules() if "layer_idx" in vars(child)}
    return found.pop() if len(found) == 1 else default


@torch.library.custom_op("hf_tree_cache::decode_attention", mutates_args=())
def decode_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    place: torch.Tensor,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """:meth:`CompiledLayers.attend`; ``place`` is int64 ``[]`` on the CPU: object and layer."""
    number, layer = divmod(int(place), MOST_LAYERS)
    return _RUNNING[number].attend(query, keys, values, layer, scale, softcap, sinks)


@decode_attention.register_fake
def _(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    place: torch.Tensor,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    return query.new_empty(query.shape[0], 1, query.shape[1], values.shape[3])
