"""Layers that cache latents (MLA): they expand them where they are read, not for every branch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..attention.latents import Expansion
from .handles import PagedKV
from .step import UNKNOWN_READER, LayerKV

NAME = "expand_kv"
"""What transformers calls the method that makes K and V of latents."""


class ExpandedKV:
    """K and V of one layer in one forward, not expanded from the latents that ``kv`` holds.

    Args:
        kv: latents ``[B, 1, L, R]`` as keys, rotary parts ``[B, 1, L, P]`` as values.
        deferred: of the layer.
    """

    def __init__(self, kv: LayerKV, deferred: DeferredExpansion) -> None:
        self.kv = kv
        self._deferred = deferred
        self._dense: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def weights(self) -> list[nn.Parameter]:
        """Parameters that make K and V of the latents."""
        return list(self._deferred.projection.parameters())

    def expansion(self, num_heads: int) -> Expansion:
        return self._deferred.expansion(self.kv, num_heads)

    def dense(self, reason: str) -> tuple[torch.Tensor, torch.Tensor]:
        """K ``[B, H, L, N + P]`` and V ``[B, H, L, Dv]``, expanded for every row."""
        if self._dense is None:
            self._dense = self._deferred.expand(*self.kv.dense(reason))
        return self._dense


class LatentKV(PagedKV):
    """The keys (``which`` 0) or values (1) that a layer would have expanded."""

    def __init__(self, expanded: ExpandedKV, which: int) -> None:
        super().__init__(expanded.kv, which)
        self.expanded = expanded

    @property
    def shape(self) -> torch.Size:
        return self.dense().shape

    def operand(self) -> torch.Tensor:
        return self.dense()

    def both(self, reason: str) -> tuple[torch.Tensor, torch.Tensor]:
        return self.expanded.dense(reason)

    def dense(self) -> torch.Tensor:
        return self.both(UNKNOWN_READER)[self.which]

    def __repr__(self) -> str:
        return f"LatentKV({'values' if self.which else 'keys'})"


class DeferredExpansion:
    """Stands in for the ``expand_kv`` of one attention layer: over a past it waits.

    Args:
        module: an attention layer that :func:`defer_expansions` chose.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._is_product: bool | None = None

    def __call__(self, latents: Any, rotary: Any) -> tuple[Any, Any]:
        if isinstance(latents, PagedKV) and isinstance(rotary, PagedKV):
            kv = latents.source
            if kv is rotary.source and not kv.step.fresh:
                expanded = ExpandedKV(kv, self)
                return LatentKV(expanded, 0), LatentKV(expanded, 1)
        return self.expand(latents, rotary)

    @property
    def projection(self) -> Any:
        """The layer's linear map from a latent to K and V of all heads."""
        return self._module.kv_b_proj

    def expand(self, latents: Any, rotary: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """As the layer does: latents ``[X, 1, L, R]`` and rotary parts ``[X, 1, L, P]``."""
        method: Any = getattr(type(self._module), NAME)
        k, v = method(self._module, latents, rotary)
        return k, v

    def expansion(self, kv: LayerKV, num_heads: int) -> Expansion:
        """How this layer expands, for attention over ``kv``."""
        module: Any = self._module
        sizes = module.qk_nope_head_dim, module.v_head_dim, num_heads
        with_calls = Expansion(self.expand, *sizes)
        weight = self._weight(kv.storage.spec.dtype, kv.storage.spec.device)
        if weight is None or self._is_product is False:
            return with_calls
        shape = (num_heads, sum(sizes[:2]), kv.storage.spec.k_head_dim)
        if weight.numel() != shape[0] * shape[1] * shape[2]:
            return with_calls
        with_weight = replace(with_calls, weight=weight.view(shape))
        if self._is_product is None:
            self._is_product = _is_product(with_weight, kv.storage.spec.v_head_dim)
        return with_weight if self._is_product else with_calls

    def _weight(self, dtype: torch.dtype, device: torch.device) -> torch.Tensor | None:
        """Of the projection, if it is a plain one: no adapter, no quantised weights, no hooks."""
        linear = self.projection
        if type(linear) is not nn.Linear or linear.bias is not None or "forward" in vars(linear):
            return None
        if linear._forward_hooks or linear._forward_pre_hooks:
            return None
        weight = linear.weight
        if type(weight) is not nn.Parameter or (weight.dtype, weight.device) != (dtype, device):
            return None
        return weight.detach()


def defer_expansions(model: PreTrainedModel) -> list[nn.Module]:
    """Let every layer of ``model`` that caches latents wait with expanding them.

    Returns:
        The layers, for :func:`undo`.
    """
    found = []
    for module in model.modules():
        wanted = (NAME, "kv_b_proj", "qk_nope_head_dim", "v_head_dim")
        if all(hasattr(module, name) for name in wanted) and NAME not in vars(module):
            setattr(module, NAME, DeferredExpansion(module))
            found.append(module)
    return found


def undo(modules: list[nn.Module]) -> None:
    """Give the layers that :func:`defer_expansions` returned their own method back."""
    for module in modules:
        vars(module).pop(NAME, None)


def _is_product(expansion: Expansion, rotary_dim: int) -> bool:
    """Whether ``expand`` of a made-up token is what its weight says: asked once a layer."""
    assert expansion.weight is not None
    rank = expansion.weight.shape[2]
    token = torch.linspace(-1, 1, rank + rotary_dim).to(expansion.weight)
    latent, rotary = token[None, None, None].split([rank, rotary_dim], 3)
    k, v = expansion.expand(latent, rotary)
    want = torch.einsum("bltr,hdr->bhtd", latent, expansion.weight)
    keys = torch.cat([want[..., : expansion.k_dim], rotary.expand(-1, want.shape[1], -1, -1)], 3)
    pairs = ((k, keys), (v, want[..., expansion.k_dim :]))
    # Rows in the wrong order would be off by as much as the numbers are large.
    return all(
        a.shape == b.shape and bool((a - b).abs().max() <= 0.05 * b.abs().max()) for a, b in pairs
    )
