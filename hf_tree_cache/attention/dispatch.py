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


BACKENDS = ("auto", "triton", "torch", "reference")

BACKEND_VARIABLE = "HF_TREE_CACHE_BACKEND"


def choose_backend(name: str | None = None) -> str:
    """The backend to use: ``name``, else ``$HF_TREE_CACHE_BACKEND``, else "auto".

    Raises:
        InvalidArgument: an unknown name.
    """
    chosen = name or os.environ.get(BACKEND_VARIABLE) or "auto"
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
    """Attend with ``backend``; other arguments and results as in :func:`tree_attention_reference`.

    Args:
        backend: "auto" is the fused kernel where it serves the call, else torch.

    Raises:
        InvalidArgument: the kernel was asked for by name, or is needed for
            ``plan.deterministic``, and cannot serve the call.
    """
    run = _find_backend(backend, q, storage, plan, scale)
    return run(q, storage, layer, plan, scale=scale, window=window, softcap=softcap, sinks=sinks)


def _find_backend(
    name: str, q: torch.Tensor, storage: KVStorage, plan: TreeAttentionPlan, scale: float
) -> Backend:
    if name == "reference":
        return tree_attention_reference
    wanted = name == "triton" or plan.deterministic
    if not wanted and (name == "torch" or not q.is_cuda):
        return tree_attention_torch
    obstacle: str | None = None
    if name == "torch":
        obstacle = "backend 'torch' was chosen"
    else:
        try:
            # Triton is optional, and slow to import.
            from .launch import find_obstacle, tree_attention_triton
        except ImportError as error:
            obstacle = f"Triton is missing ({error})"
        else:
            obstacle = find_obstacle(q, storage, scale)
            if obstacle is None:
                return tree_attention_triton
    if wanted:
        asker = "deterministic=True" if plan.deterministic else f"backend {name!r}"
        raise InvalidArgument(
            f"{asker} needs the fused kernel, which cannot serve this call: {obstacle}. "
            "Without it, backend 'auto' falls back to torch."
        )
    return tree_attention_torch
