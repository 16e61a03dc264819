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


def takes_kernel(backend: str, q: torch.Tensor, storage: KVStorage, scale: float) -> bool:
    """Whether :func:`run_tree_attention` would take the fused kernel for such a call."""
    if backend == "auto" and not q.is_cuda:
        return False
    return backend in ("auto", "triton") and _find_kernel_obstacle(q, storage, scale) is None


def _find_backend(
    name: str, q: torch.Tensor, storage: KVStorage, plan: TreeAttentionPlan, scale: float
) -> Backend:
    if name == "reference":
        return tree_attention_reference
    wanted = name == "triton" or plan.deterministic
    if not wanted and (name == "torch" or not q.is_cuda):
        return tree_attention_torch
    if name == "torch":
        obstacle: str | None = "backend 'torch' was chosen"
    else:
        obstacle = _find_kernel_obstacle(q, storage, scale)
    if obstacle is None:
        from .launch import tree_attention_triton

        return tree_attention_triton
    if wanted:
        asker = "deterministic=True" if plan.deterministic else f"backend {name!r}"
        raise InvalidArgument(
            f"{asker} needs the fused kernel, which cannot serve this call: {obstacle}. "
            "Without it, backend 'auto' falls back to torch."
        )
    return tree_attention_torch


def _find_kernel_obstacle(q: torch.Tensor, storage: KVStorage, scale: float) -> str | None:
    """Why the fused kernel cannot serve a call; None if it can."""
    try:
        # Triton is optional, and slow to import.
        from .launch import find_obstacle
    except ImportError as error:
        return f"Triton is missing ({error})"
    return find_obstacle(q, storage, scale)
