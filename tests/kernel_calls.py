"""Random calls of the fused kernel, and how far its results are from the reference.

Shared by test_kernel.py and by the scripts that it runs in processes of their own.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from trees import SHAPES, Grown, ShadowTree, fill, grow_randomly

from hf_tree_cache.attention.launch import Workspace, WorkspaceKey
from hf_tree_cache.attention.plan import TreeAttentionPlan, Window, build_plan
from hf_tree_cache.attention.reference import tree_attention_reference
from hf_tree_cache.attention.tiles import TileSet
from hf_tree_cache.memory.growth import AppendPlan
from hf_tree_cache.memory.storage import KVSpec, KVStorage, SlabIndex

OUT_TOLERANCES = {torch.bfloat16: 3e-3, torch.float16: 1e-3, torch.float32: 1e-5}
"""Of the Frobenius norm, relative to float64 on the same rounded inputs."""

LSE_TOLERANCES = {torch.bfloat16: 2**-8, torch.float16: 1e-3, torch.float32: 1e-5}
"""Of each value, relative where it exceeds 1. In bfloat16 large items sum weights as they were
rounded, each by up to 2**-8 of itself."""

NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Family:
    """Calls that are served by few compilations of the kernel.

    Attributes:
        head_dims: of K and V.
        num_new: T is drawn from these.
        fixed: the workspace always launches the same kernel, and one while the other ends.
        tiles: instead of those of the table.
        spread: standard deviation of the scores of every other query; of all others it is 1.
    """

    dtype: torch.dtype
    head_dims: tuple[int, int]
    group: int
    block_size: int
    num_new: tuple[int, ...] = (1,)
    num_kv_heads: int = 2
    window: Window | None = None
    softcap: float | None = None
    sinks: bool = False
    deterministic: bool = False
    fixed: bool = True
    tiles: TileSet | None = None
    spread: float = 1.0

    def __str__(self) -> str:
        window = self.window
        words = [
            f"{NAMES[self.dtype]} {self.head_dims[0]}",
            *([f"and {self.head_dims[1]}"] if len(set(self.head_dims)) > 1 else []),
            f"group {self.group}",
            f"blocks of {self.block_size}",
            "T " + " ".join(map(str, self.num_new)),
            *([f"{window.kind} {window.size}"] if window is not None else []),
            *(["softcap"] if self.softcap is not None else []),
            *(["sinks"] if self.sinks else []),
            *(["deterministic"] if self.deterministic else []),
            *([f"spread {self.spread:g}"] if self.spread != 1 else []),
            *([] if self.fixed else ["any kernel"]),
        ]
        return ", ".join(words)

    def spec(self, device: str) -> KVSpec:
        return KVSpec(self.num_kv_heads, *self.head_dims, self.dtype, torch.device(device))

    def key(self, device: str) -> WorkspaceKey:
        spec = self.spec(device)
        return WorkspaceKey(spec, self.group, self.window, self.deterministic, self.tiles)

    def workspace(self, device: str) -> Workspace:
        return Workspace(self.key(device), fixed=self.fixed, overlap=self.fixed)


@dataclass
class Call:
    """Random queries over a random tree.

    Attributes:
        layer: the one that is filled.
        q: ``[B, Hq, T, Dk]``, with the strides that a model's have.
        options: keyword arguments of a launch.
    """

    family: Family
    grown: Grown
    plan: TreeAttentionPlan
    storage: KVStorage
    layer: int
    q: torch.Tensor
    options: dict[str, Any]
    keys: torch.Tensor = field(repr=False)
    values: torch.Tensor = field(repr=False)

    def attend(
        self, workspace: Workspace, *, reverse: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``out [B, T, Hq, Dv]`` and ``lse [B, T, Hq]``: NaN where nothing was written."""
        workspace.prepare(self.plan, self.storage)
        workspace._parts.fill_(math.nan)
        workspace._part_lse.fill_(math.nan)
        return self.launch(workspace, reverse=reverse)

    def launch(
        self, workspace: Workspace, *, reverse: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """:meth:`attend` with the buffers as they are."""
        out, lse = outputs(self.q, self.family.head_dims[1])
        workspace.launch(
            self.q, self.storage, self.layer, out, lse, reverse=reverse, **self.options
        )
        return out, lse

    def reference(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The same in float64."""
        options = {**self.options, "window": self.family.window}
        out, lse = tree_attention_reference(
            self.q.double(), self.storage, self.layer, self.plan, **options
        )
        return out.transpose(1, 2), lse.transpose(1, 2)

    def complain(
        self,
        got: tuple[torch.Tensor, torch.Tensor],
        want: tuple[torch.Tensor, torch.Tensor] | None = None,
        factor: float = 1.0,
    ) -> str | None:
        """What is wrong with a result, if anything."""
        out_error, lse_error = errors(got, self.reference() if want is None else want)
        # Products of float32 are exact to some 2e-7 of a score.
        out_most = factor * max(OUT_TOLERANCES[self.family.dtype], 2e-6 * self.family.spread)
        lse_most = factor * LSE_TOLERANCES[self.family.dtype]
        if out_error <= out_most and lse_error <= lse_most:
            return None
        return f"{self.family}: out off by {out_error:.1e}, lse by {lse_error:.1e}"


def draw_tree(family: Family, seed: int, *, scale: int | None = None) -> Grown:
    """A tree of ``SHAPES[seed % 8]`` for a call of ``family``."""
    rng = random.Random(seed)
    num_new = rng.choice(family.num_new)
    scale = rng.choice([2, 12, 40]) if scale is None else scale
    return grow_randomly(rng, SHAPES[seed % len(SHAPES)], family.block_size, num_new, scale=scale)


def make_call(
    family: Family, seed: int, device: str, *, scale: int | None = None, slab_blocks: int = 64
) -> Call:
    """A call of ``family`` over a random tree."""
    torch.manual_seed(seed)
    return call_over(family, draw_tree(family, seed, scale=scale), device, slab_blocks=slab_blocks)


def call_over(family: Family, grown: Grown, device: str, *, slab_blocks: int = 64) -> Call:
    storage, keys, values = fill(
        grown.shadow, family.spec(device), slab_blocks=slab_blocks, num_layers=2
    )
    plan = build_plan(
        grown.shadow.tree, grown.counts, grown.num_new, deterministic=family.deterministic
    )
    q = draw_queries(family, len(grown.counts), grown.num_new, device)
    return Call(family, grown, plan, storage, 1, q, draw_options(family, device), keys, values)


def grow(shadow: ShadowTree, *forwards: Sequence[int] | str) -> Grown:
    """A tree after ``forwards``: new tokens of each row; or, as in "0 0 1", rows to go on with."""
    counts: list[int] = []
    for forward in forwards:
        if isinstance(forward, str):
            shadow.select([int(row) for row in forward.split()])
        else:
            counts = list(forward)
            shadow.add_rows(len(counts) - len(shadow.rows))
            shadow.append(counts)
    return Grown(shadow, counts, max(counts))


def draw_queries(family: Family, num_rows: int, num_new: int, device: str) -> torch.Tensor:
    num_q_heads = family.num_kv_heads * family.group
    q = torch.randn(num_rows, num_new, num_q_heads, family.head_dims[0], dtype=torch.float64)
    q[:, :, ::2] *= family.spread
    return q.to(family.dtype).to(device).transpose(1, 2)


def draw_options(family: Family, device: str) -> dict[str, Any]:
    sinks = None
    if family.sinks:
        sinks = (3 * torch.randn(family.num_kv_heads * family.group)).to(family.dtype).to(device)
    scale = family.head_dims[0] ** -0.5
    return {"scale": scale, "softcap": family.softcap, "sinks": sinks}


def outputs(q: torch.Tensor, v_head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    num_rows, num_q_heads, num_new, _ = q.shape
    out = q.new_full((num_rows, num_new, num_q_heads, v_head_dim), math.nan)
    lse = torch.full((num_rows, num_new, num_q_heads), math.nan, device=q.device)
    return out, lse


def errors(
    got: tuple[torch.Tensor, torch.Tensor], want: tuple[torch.Tensor, torch.Tensor]
) -> tuple[float, float]:
    """Relative error of ``out`` by its norm; largest error of ``lse``. NaN counts as infinite."""
    difference = float((got[0].double() - want[0].double()).norm())
    norm = float(want[0].double().norm())
    out_error = difference / norm if norm else difference
    blank = want[1] == -math.inf
    if not torch.equal(blank, got[1] == -math.inf) or bool(got[0][blank].any()):
        return out_error, math.inf
    apart = (got[1].double() - want[1].double())[~blank] / want[1].double().abs().clamp(1)[~blank]
    lse_error = float(apart.abs().max()) if apart.numel() else 0.0
    return tuple(math.inf if math.isnan(error) else error for error in (out_error, lse_error))  # type: ignore[return-value]


def store_new(storage: KVStorage, shadow: ShadowTree, appended: AppendPlan) -> None:
    """Copy and write, with random K and V in all layers, what an append decided."""
    slots = [slot for row in appended.slots for slot in row]
    spec, size = storage.spec, storage.slab_blocks * storage.block_size
    storage.ensure(shadow.tree.allocator.num_blocks)
    storage.copy(appended.copies)
    index = SlabIndex.of(slots, size, spec.device)
    for layer in range(storage.num_layers):
        k, v = (
            torch.randn(1, spec.num_kv_heads, len(slots), head_dim, device=spec.device)
            for head_dim in (spec.k_head_dim, spec.v_head_dim)
        )
        storage.write(layer, index, None, k.to(spec.dtype), v.to(spec.dtype))


def append(call: Call, counts: Sequence[int], num_new: int = 1) -> Call:
    """The next forward of a call: its tokens are stored, its queries new."""
    shadow, family = call.grown.shadow, call.family
    store_new(call.storage, shadow, shadow.append(counts))
    plan = build_plan(shadow.tree, counts, num_new, call.plan, deterministic=family.deterministic)
    q = draw_queries(family, len(counts), num_new, call.storage.spec.device.type)
    grown = Grown(shadow, list(counts), num_new)
    return Call(
        family, grown, plan, call.storage, call.layer, q, call.options, call.keys, call.values
    )
