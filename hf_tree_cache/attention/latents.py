"""Attention over latents (MLA): absorbed into queries and results, or each run expanded once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..memory.storage import KVReader, KVSpec, KVStorage, SlabIndex
from .plan import TreeAttentionPlan, Window
from .reference import tree_attention_reference
from .torch_backend import tree_attention_torch


@dataclass(frozen=True, slots=True)
class Expansion:
    """How a layer makes K and V for each of its H heads from what its cache holds of a token.

    A token has one latent of R numbers and one rotary part of P numbers, which all heads share. Its
    K is N numbers from the latent followed by the rotary part, its V is Dv numbers from the latent.

    Attributes:
        expand: the layer's own function, from latents ``[X, 1, L, R]`` and rotary parts
            ``[X, 1, L, P]`` to K ``[X, H, L, N + P]`` and V ``[X, H, L, Dv]``.
        k_dim: N.
        v_dim: Dv.
        num_heads: H.
        weight: ``[H, N + Dv, R]`` when all that ``expand`` does to a latent is a product with it,
            first the rows of K, then those of V; else None.
    """

    expand: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    k_dim: int
    v_dim: int
    num_heads: int
    weight: torch.Tensor | None = None

    def absorbs(self, spec: KVSpec, plan: TreeAttentionPlan) -> bool:
        """Whether products with the latents are fewer than expanding each run and tail once."""
        if self.weight is None:
            return False
        key = "absorbs", spec, self.k_dim, self.v_dim
        if key not in plan.scratch:
            rank, rotary, both = spec.k_head_dim, spec.v_head_dim, self.k_dim + self.v_dim
            pairs = plan.num_new * sum(plan.lengths)
            absorbed = pairs * 2 * (rank + rotary) + plan.num_rows * plan.num_new * rank * both
            expanded = pairs * (both + rotary) + plan.tokens_read() * rank * both
            plan.scratch[key] = absorbed < expanded
        absorbs: bool = plan.scratch[key]
        return absorbs


def tree_attention_latents(
    q: torch.Tensor,
    storage: KVReader,
    layer: int,
    plan: TreeAttentionPlan,
    expansion: Expansion,
    *,
    scale: float,
    window: Window | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`~.reference.tree_attention_reference`, over latents that are stored as K and V.

    Few queries to a token, as in decoding, read the latents themselves: what would make K of them
    is absorbed into the queries, what would make V into the results (DeepSeek-V2, 2024, section
    2.1). With many, each run of blocks is expanded once for all its rows, and each tail.

    Args:
        q: ``[B, H, T, N + P]``.
        storage: holds latents ``[.., 1, R]`` as K and rotary parts ``[.., 1, P]`` as V.
        expansion: of this layer.
        backend: "reference" expands, and attends with the oracle; "torch" does without the kernel
            that "auto" takes for decode steps on a GPU, where it serves them.

    Returns:
        ``out [B, H, T, Dv]`` and ``lse [B, H, T]``.
    """
    reference = backend == "reference"
    attend = tree_attention_reference if reference else tree_attention_torch
    weight = expansion.weight
    if reference or weight is None or not expansion.absorbs(storage.spec, plan):
        expanded = _Expanded(storage, expansion)
        return attend(
            q, expanded, layer, plan, scale=scale, window=window, softcap=softcap, sinks=sinks
        )
    for_k, for_v = weight.split([expansion.k_dim, expansion.v_dim], 1)
    nope, rotary = q.split([expansion.k_dim, storage.spec.v_head_dim], 3)
    q = torch.cat([torch.einsum("bhtn,hnr->bhtr", nope, for_k), rotary], 3)
    kernel = None
    if window is None and softcap is None and sinks is None:
        kernel = _find_kernel(backend, q, storage, plan)
    if kernel is not None:
        out, lse = kernel(q, storage, layer, plan, scale=scale)
        return torch.einsum("bhtr,hdr->bhtd", out, for_v), lse
    out, lse = attend(
        q, _Joined(storage), layer, plan, scale=scale, window=window, softcap=softcap, sinks=sinks
    )
    latent = out[..., : storage.spec.k_head_dim]
    return torch.einsum("bhtr,hdr->bhtd", latent, for_v), lse


def _find_kernel(
    backend: str, q: torch.Tensor, storage: KVReader, plan: TreeAttentionPlan
) -> Callable[..., tuple[torch.Tensor, torch.Tensor]] | None:
    """The kernel over latents; None where torch has to do."""
    if backend == "torch" or not (q.is_cuda or backend == "triton"):
        return None
    if not isinstance(storage, KVStorage):
        return None
    try:
        # Triton is optional, and slow to import.
        from .latent_launch import serves, tree_attention_absorbed
    except ImportError:
        return None
    return tree_attention_absorbed if serves(q, storage, plan) else None


class _View:
    """A storage of latents, seen as one of K and V."""

    def __init__(self, storage: KVReader, spec: KVSpec) -> None:
        self.spec = spec
        self.block_size = storage.block_size
        self._storage = storage

    @property
    def index_key(self) -> tuple[Any, ...]:
        return self._storage.index_key

    @property
    def forgets(self) -> bool:
        return self._storage.forgets

    def index_blocks(self, blocks: Sequence[int]) -> SlabIndex:
        return self._storage.index_blocks(blocks)

    def index_stretches(
        self, positions: Sequence[int] | npt.NDArray[np.int64], least: int, *, slots: bool = False
    ) -> tuple[SlabIndex, ...]:
        return self._storage.index_stretches(positions, least, slots=slots)

    def index_slots(self, slots: Sequence[int] | torch.Tensor) -> SlabIndex:
        return self._storage.index_slots(slots)

    def gather_blocks(self, layer: int, blocks: SlabIndex) -> tuple[torch.Tensor, torch.Tensor]:
        return self._make(*self._storage.gather_blocks(layer, blocks))

    def gather_slots(self, layer: int, slots: SlabIndex) -> tuple[torch.Tensor, torch.Tensor]:
        return self._make(*self._storage.gather_slots(layer, slots))

    def _make(
        self, latents: torch.Tensor, rotary: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        raise NotImplementedError


class _Joined(_View):
    """K is ``[.., 1, R + P]`` and V its first R.

    On a CPU, where equal dims are fast, V is all of K, and nobody wants its last P.
    """

    def __init__(self, storage: KVReader) -> None:
        rank = storage.spec.k_head_dim
        width = rank + storage.spec.v_head_dim
        self._v_dim = width if storage.spec.device.type == "cpu" else rank
        super().__init__(storage, replace(storage.spec, k_head_dim=width, v_head_dim=self._v_dim))

    def _make(
        self, latents: torch.Tensor, rotary: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        both = torch.cat([latents, rotary], -1)
        return both, both[..., : self._v_dim]


class _Expanded(_View):
    """K ``[.., H, N + P]`` and V ``[.., H, Dv]`` of whatever is gathered, by the layer itself."""

    def __init__(self, storage: KVReader, expansion: Expansion) -> None:
        spec = replace(
            storage.spec,
            num_kv_heads=expansion.num_heads,
            k_head_dim=expansion.k_dim + storage.spec.v_head_dim,
            v_head_dim=expansion.v_dim,
        )
        super().__init__(storage, spec)
        self._expand = expansion.expand

    def _make(
        self, latents: torch.Tensor, rotary: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        shape = latents.shape[:-2]
        flat = (x.reshape(1, 1, -1, x.shape[-1]) for x in (latents, rotary))
        k, v = (x[0].transpose(0, 1).unflatten(0, shape) for x in self._expand(*flat))
        return k, v
