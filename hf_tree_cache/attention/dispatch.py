"""run_tree_attention: one entry for all backends, chosen by argument, then by environment."""

from __future__ import annotations

import os
from typing import Protocol

import torch

from ..errors import InvalidArgument
from ..memory.storage import KVStorage
from .plan import TreeAttentionPlan, Window
from .reference import tree_attention_reference
from .torch_backend import tree_attention_torch


class Backend(Protocol):
    """The signature of :func:`tree_attention_reference`, which documents it."""

    def __call__(
        self,
        q: torch.Tensor,
        storage: KVStorage,
        layer: int,
        plan: TreeAttentionPlan,
        *,
        scale: float,
        window: Window | None = None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]: ...


BACKENDS: dict[str, Backend] = {
    "torch": tree_attention_torch,
    "reference": tree_attention_reference,
}

BACKEND_VARIABLE = "HF_TREE_CACHE_BACKEND"


def choose_backend(name: str | None = None) -> str:
    """The backend to use: ``name``, else ``$HF_TREE_CACHE_BACKEND``, else "torch".

    Raises:
        InvalidArgument: an unknown name.
    """
    chosen = name or os.environ.get(BACKEND_VARIABLE) or "torch"
    if chosen not in BACKENDS:
        raise InvalidArgument(f"backend {chosen!r} is unknown; choose from {', '.join(BACKENDS)}.")
    return chosen


def run_tree_attention(
    q: torch.Tensor,
    storage: KVStorage,
    layer: int,
    plan: TreeAttentionPlan,
    *,
    backend: str,
    scale: float,
    window: Window | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend with ``backend``; arguments and results as in :func:`tree_attention_reference`."""
    return BACKENDS[backend](
        q, storage, layer, plan, scale=scale, window=window, softcap=softcap, sinks=sinks
    )
