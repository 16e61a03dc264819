"""The cache layers that transformers sees, and the states that cannot be shared."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import PretrainedConfig
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

from ..errors import StaleHandle, UnsupportedModel
from ..memory.storage import KVSpec, KVStorage

if TYPE_CHECKING:
    from .cache import TreeCache


STATES_IN_MODULES = frozenset({"recurrent_gemma"})
"""Model types whose recurrent states are not in the cache."""


class PagedLayer(CacheLayerMixin):
    """The cache's face towards one attention layer; everything else is shared by all layers.

    Attributes:
        sliding_window: tokens that the layer looks back to at most, by the model's config (those of
            a chunk, where it attends by chunks); None for all.
        storage: where the layer's K/V are, None before its first update.
        position: of the layer in ``storage``.
        spec: heads, dims, dtype and device, as its first update had them.
    """

    is_compileable = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, cache: TreeCache, sliding_window: int | None = None) -> None:
        self.join(cache)
        self.sliding_window = sliding_window
        self.is_sliding = sliding_window is not None
        self.storage: KVStorage | None = None
        self.position = 0
        self.spec: KVSpec | None = None

    def join(self, cache: TreeCache) -> None:
        """Belong to ``cache``, without keeping it alive: gigabytes should go when it goes."""
        self._cache = weakref.ref(cache)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": None}  # until it joins the copy

    @property
    def cache(self) -> TreeCache:
        cache = self._cache()
        if cache is None:
            raise StaleHandle("The TreeCache that this layer belongs to is gone; keep the cache.")
        return cache

    @property
    def is_initialized(self) -> bool:
        return self.storage is not None

    @property
    def keys(self) -> torch.Tensor | None:
        """Dense ``[B, Hkv, L, Dk]`` copy of the stored keys, left-padded with zeros.

        What the layer's window has let go is zeros, too.
        """
        return self.cache.dense(self, 0)

    @property
    def values(self) -> torch.Tensor | None:
        """Dense ``[B, Hkv, L, Dv]`` copy of the stored values, as :attr:`keys`."""
        return self.cache.dense(self, 1)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        return self.cache.write(self, key_states, value_states)

    def get_seq_length(self) -> int:
        return self.cache.columns_of(self)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.columns_of(self) + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        raise UnsupportedModel("TreeCache layers take their shapes from their first update.")

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        raise UnsupportedModel("Reorder the whole TreeCache: its layers share one tree.")


class HybridPagedLayer(LinearAttentionLayer, PagedLayer):
    """A layer with both attention and a linear-attention state (falcon_h1)."""

    is_compileable = False

    def __init__(
        self, cache: TreeCache, sliding_window: int | None = None, number_of_states: int = 1
    ) -> None:
        PagedLayer.__init__(self, cache, sliding_window)
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)


def make_layers(cache: TreeCache, config: PretrainedConfig) -> list[Any]:
    """The layers of a cache for the model that ``config`` describes.

    Raises:
        UnsupportedModel: the model keeps no K/V that could be shared.
    """
    if config.model_type in STATES_IN_MODULES:
        raise UnsupportedModel(
            f"{config.model_type} keeps states in its modules, where no cache can fork or "
            "select them: use the cache that transformers makes for it."
        )
    layers = [_translate(cache, layer) for layer in DynamicCache(config=config).layers]
    unknown = {type(layer).__name__ for layer in layers if not _is_known(layer)}
    if unknown:
        raise UnsupportedModel(
            f"{config.model_type} has cache layers that TreeCache does not know "
            f"({', '.join(sorted(unknown))}): use the cache that transformers makes for it."
        )
    if not any(isinstance(layer, PagedLayer) for layer in layers):
        raise UnsupportedModel(
            f"{config.model_type} has no attention layer with a K/V cache, so there is nothing "
            "to share: use the cache that transformers makes for it."
        )
    return layers


def _translate(cache: TreeCache, layer: Any) -> Any:
    """Our layer in place of one of transformers', which stays where it is not attention."""
    window = getattr(layer, "sliding_window", None)
    if isinstance(layer, DynamicLayer) and isinstance(layer, LinearAttentionLayer):
        return HybridPagedLayer(cache, window, number_of_states=layer.number_of_states)
    if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):
        return PagedLayer(cache, window)
    return layer


def _is_known(layer: Any) -> bool:
    """Whether all that ``layer`` keeps is in blocks, or states that :class:`OtherLayers` knows."""
    return isinstance(layer, PagedLayer) or not isinstance(layer, CacheLayerMixin)


class OtherLayers:
    """Everything in a cache that is not K/V in blocks: fixed-size states, one a row.

    A fork copies such a state where K/V are shared. States of held branches are kept here.

    Args:
        layers: the cache's layers; paged ones without a linear-attention state are passed over.
    """

    def __init__(self, layers: Iterable[Any]) -> None:
        self._linear = [x for x in layers if isinstance(x, LinearAttentionCacheLayerMixin)]
        self._rest = [
            x for x in layers if not isinstance(x, (PagedLayer, LinearAttentionCacheLayerMixin))
        ]

    @property
    def has_state(self) -> bool:
        """Whether a forward has left linear-attention states."""
        return bool(self._with_state())

    def select(self, rows: Sequence[int]) -> None:
        if not (self._linear or self._rest):
            return
        order = torch.tensor(rows, dtype=torch.int64)
        for layer in self._linear:
            LinearAttentionLayer.reorder_cache(layer, order)
        for layer in self._rest:
            layer.reorder_cache(order)

    def crop(self, tokens_to_remove: int) -> None:
        for layer in self._linear:
            if tokens_to_remove or layer.record_past:
                LinearAttentionLayer.crop(layer, tokens_to_remove)
        for layer in self._rest:
            layer.crop(tokens_to_remove)

    def clear(self) -> None:
        for layer in self._linear:
            LinearAttentionCacheLayerMixin.__init__(layer, layer.number_of_states)
        for layer in self._rest:
            layer.reset()

    def take(self, row: int) -> list[torch.Tensor]:
        """Copies of all states of ``row``."""
        return [states[i][row].clone() for states, i in self._states()]

    def put(self, rows: Sequence[list[torch.Tensor]]) -> None:
        """Make the batch of states from what :meth:`take` gave for each row."""
        for (states, i), column in zip(self._states(), zip(*rows, strict=True), strict=True):
            states[i] = torch.stack(column)

    def _with_state(self) -> list[LinearAttentionCacheLayerMixin]:
        return [layer for layer in self._linear if any(layer.has_previous_state.values())]

    def _states(self) -> list[tuple[dict[int, torch.Tensor], int]]:
        return [
            (states, i)
            for layer in self._with_state()
            for states in (layer.conv_states, layer.recurrent_states)
            for i in states
            if states[i] is not None
        ]
