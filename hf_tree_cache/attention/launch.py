"""One launch of the fused kernel: what it serves, its buffers, its arguments."""

from __future__ import annotations

import math
import operator
import weakref
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import triton
from triton import knobs

from ..memory.growth import Grown
from ..memory.storage import KVSpec, KVStorage
from ..overlap import can_overlap, launch_options
from .buffers import IntBuffer, rounded
from .kernel import tree_attention_kernel
from .plan import TreeAttentionPlan, Window
from .schedule import FIELDS, WorkList, schedule
from .tiles import Key, TileSet, tiles_for, tune_once

LOG2E = math.log2(math.e)
WINDOW_KINDS = {"sliding": 1, "chunked": 2}
TENSOR_MEMORY = {"sm_100", "sm_101", "sm_103", "sm_110"}
"""Architectures whose products add up in memory of their own."""

SYNC_HEAD = 3
"""Counters before the flags, see ``p_sync`` of the kernel."""


def longest_heads(dtype: torch.dtype) -> int:
    """The largest head dim that the kernel serves: products in float32 take more registers."""
    return 256 if dtype == torch.float32 else 512


def find_obstacle(q: torch.Tensor, storage: KVStorage, scale: float) -> str | None:
    """Why the kernel cannot serve a call; None if it can."""
    spec, size = storage.spec, storage.block_size
    if not (q.is_cuda or knobs.runtime.interpret):
        return f"a device without Triton: {q.device}"
    if spec.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"dtype {spec.dtype}"
    if size & (size - 1) or size > 64:
        return f"block size {size}, not a power of two up to 64"
    longest = longest_heads(spec.dtype)
    if max(spec.k_head_dim, spec.v_head_dim) > longest:
        return f"head dims {spec.k_head_dim} and {spec.v_head_dim}, more than {longest}"
    if q.shape[1] > 16 * spec.num_kv_heads:
        return f"{q.shape[1] // spec.num_kv_heads} query heads for each K/V head, more than 16"
    return None if scale > 0 else f"scale {scale}"


@dataclass(frozen=True, slots=True)
class WorkspaceKey:
    """What a workspace is made for.

    Attributes:
        spec: of the storage.
        group_size: query heads of a K/V head.
        window: of the layer.
        deterministic: see :class:`~.plan.TreeAttentionPlan`.
        tiles: instead of those of the table.
    """

    spec: KVSpec
    group_size: int
    window: Window | None = None
    deterministic: bool = False
    tiles: TileSet | None = None


@dataclass(frozen=True, slots=True)
class _PlanMark:
    """What a workspace remembers of the plan that it was prepared for."""

    plan: weakref.ref[TreeAttentionPlan]
    growth: object | None  # the mark of its rows, if they grow together
    tokens: int  # of their clock

    @classmethod
    def of(cls, plan: TreeAttentionPlan) -> _PlanMark:
        grown = plan.grown if plan.num_new == 1 else None
        if grown is None:
            return cls(weakref.ref(plan), None, 0)
        return cls(weakref.ref(plan), grown.growth.mark, grown.tokens)


class Workspace:
    """Device buffers of one kind of launch, kept from forward to forward at fixed addresses.

    The work list is cut anew when the tree changes. While rows only grow, their lengths change,
    and block numbers where a row reaches a new block. Launches share the buffers, so they must
    follow each other on one stream. No plan or storage is kept alive.

    Args:
        key: what it is for.
        fixed: always launch the same kernel on the same grid, so that a captured CUDA graph stays
            valid until ``generation`` changes.
        overlap: a launch may start while the one ahead of it ends, on GPUs that can; of the
            buffers that it reads, the one ahead must not write any, see :mod:`..overlap`.

    Attributes:
        generation: changes when buffers had to move.
        work: the list that is in the buffers.
        tokens: of the rows' clock, for which the lengths were left by :meth:`advance`; None where
            that is not known.
        grid: items that a fixed launch has programs for, at least those of ``work``; None for as
            many as there is room for.
    """

    def __init__(self, key: WorkspaceKey, *, fixed: bool = False, overlap: bool = False) -> None:
        self.key = key
        self.fixed = fixed
        self.overlap = overlap and can_overlap(key.spec.device)
        self.generation = 0
        self.work: WorkList | None = None
        self.grid: int | None = None
        self._last: _PlanMark | None = None
        self._index_key: tuple[Any, ...] = ()
        self._begun = self._room = 0  # of the clock, at the last rebuild, and as far as it may run
        self.tokens: int | None = None
        tiles = key.tiles or find_tiles(key)
        self._set = TileSet(
            *(replace(t, deterministic=key.deterministic) for t in (tiles.mixed, tiles.small))
        )
        self.tiles = self._set.mixed
        self._ints = IntBuffer(key.spec.device)
        heads = key.spec.num_kv_heads * key.group_size
        wide = key.spec.dtype == torch.float32
        self._part_shape = (heads, key.spec.v_head_dim)
        self._part_dtype = torch.float32 if wide else torch.float16
        self._make_parts(1, 1, 1)

    def prepare(
        self,
        plan: TreeAttentionPlan,
        storage: KVStorage,
        *,
        num_merged: int = 0,
        reset: bool = True,
    ) -> None:
        """Make the buffers those of ``plan``; does nothing the second time.

        Args:
            num_merged: of a fixed launch, queries that its merges are shaped for. What was captured
                for one number is launched for the same.
            reset: also :meth:`reset`, which may as well be captured with the launches.
        """
        if self._last is not None and self._last.plan() is plan:
            return
        now, last = _PlanMark.of(plan), self._last
        steps = now.tokens - last.tokens if last is not None else 0
        same = last is not None and now.growth is not None and now.growth is last.growth
        if same and 0 <= steps <= plan.block_size and now.tokens <= self._room:
            assert plan.grown is not None
            self._grow(plan.grown, steps, storage)
        else:
            self._rebuild(plan, storage, num_merged)
        self.tokens = None
        if reset:
            self.reset()
        self._last = now

    def reset(self) -> None:
        """Counters to 0, where launches leave them unless they are aborted. Can be captured."""
        self._sync.zero_()
        self._arrived.zero_()

    def advance(self) -> None:
        """Take all lengths on by a token, once rows grow together. Can be captured."""
        now, _, each = self._growing
        now.add_(each)

    def launch(
        self,
        q: torch.Tensor,
        storage: KVStorage,
        layer: int,
        out: torch.Tensor,
        lse: torch.Tensor,
        *,
        scale: float,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
        reverse: bool = False,
    ) -> Any:
        """Run the kernel for one layer.

        Args:
            q: ``[B, Hq, T, Dk]``, last stride 1.
            out: ``[B, T, Hq, Dv]`` contiguous, written.
            lse: ``[B, T, Hq]`` float32 contiguous, written.
            reverse: start programs from the last to the first, as no GPU does.

        Returns:
            Triton's compiled kernel.
        """
        key, spec, tiles, work, ints = self.key, self.key.spec, self.tiles, self.work, self._ints
        assert work is not None
        k, v = storage.first_planes(layer)
        num_items = (self.grid or ints.capacity("tokens")) if self.fixed else work.num_items
        assert num_items >= work.num_items
        width, first = self._record_shape(storage.block_size)
        window = key.window
        return tree_attention_kernel[(num_items * spec.num_kv_heads,)](
            q,
            k,
            v,
            out,
            lse,
            lse if sinks is None else sinks,
            ints["items"],
            ints["list"],
            ints["tokens"],
            ints["lengths"],
            ints["sizes"],
            self._parts,
            self._part_lse,
            self._arrived,
            self._sync,
            ints["part_ptr"],
            ints["part_slots"],
            q.shape[2],
            q.stride(0),
            q.stride(1),
            q.stride(2),
            ints.capacity("list") // 2,
            (scale if softcap is None else softcap) * LOG2E,
            0.0 if softcap is None else 2 * LOG2E * scale / softcap,
            0 if window is None else window.size,
            HKV=spec.num_kv_heads,
            G=key.group_size,
            DK=spec.k_head_dim,
            DV=spec.v_head_dim,
            DKP=rounded(spec.k_head_dim),
            DVP=rounded(spec.v_head_dim),
            S=storage.block_size,
            RECORD=FIELDS + 2 * width + first,
            QUERIES=width,
            M_SMALL=tiles.m_small,
            KV_SMALL=tiles.kv_small,
            STAGES_SMALL=tiles.stages_small,
            M_LARGE=tiles.m_large,
            KV_LARGE=tiles.kv_large,
            STAGES_LARGE=tiles.stages_large,
            MERGE_ROWS=work.merge_rows,
            MERGE_PARTS=work.merge_parts,
            LANES=work.lanes,
            SMALL=self.fixed or work.num_large < work.num_work,
            LARGE=self.fixed or work.num_large > 0,
            MERGES=self.fixed or work.num_work < work.num_items,
            REVERSED=reverse,
            PEEL=window is None and not key.deterministic,
            WINDOW=0 if window is None else WINDOW_KINDS[window.kind],
            FIXED=self._is_fixed,
            SOFTCAP=softcap is not None,
            SINKS=sinks is not None,
            SPLIT_LIST=spec.k_head_dim != spec.v_head_dim,
            PRECISION=self._precision,
            OVERLAP=self.overlap,
            **launch_options(self.overlap),
            **tiles.options(_arch(spec.device)),
        )

    def _record_shape(self, block_size: int) -> tuple[int, int]:
        """Queries, and first block numbers, of a record."""
        tiles = self.tiles
        tokens = max(tiles.kv_small, tiles.kv_large)
        return tiles.m_large // self.key.group_size, max(1, tokens // block_size)

    def _records(self, block_size: int) -> npt.NDArray[np.int32]:
        """The records of all items, on the host."""
        assert self.work is not None
        width, first = self._record_shape(block_size)
        shape = self.work.num_items, FIELDS + 2 * width + first
        return self._ints.host("items")[: shape[0] * shape[1]].reshape(shape)

    def _grow(self, grown: Grown, steps: int, storage: KVStorage) -> None:
        """Bring the buffers up to date after rows grew by ``steps`` tokens each."""
        work, ints, size = self.work, self._ints, storage.block_size
        assert work is not None
        rows = grown.rows_with_new_blocks(grown.tokens - steps)
        if len(rows):
            block = (grown.growth.base[rows] + grown.tokens - 1) // size
            places = work.tails.base[rows] + work.tails.step[rows] * block
            work.blocks[places] = grown.blocks[rows]
            numbers = self._put_numbers(storage, places, grown.blocks[rows])
            half = ints.capacity("list") // 2
            for offset in (0, half) if self._split else (0,):
                ints.send_part("list", int(places.min()) + offset, int(places.max()) + 1 + offset)
            # Records hold the first numbers of their items.
            items = work.tails.item[rows]
            offsets = places - work.items[items, 1]
            records = self._records(size)
            early = offsets < records.shape[1] - work.items.shape[1]
            if early.any():
                records[items[early], work.items.shape[1] + offsets[early]] = numbers[early]
                ints.send("items", "items")
        if storage.index_key != self._index_key:
            # Blocks before the window were let go: their places may be written anew.
            self._put_all_numbers(storage)
            ints.send("list", "items")
        if self.tokens != grown.tokens:
            now, then, each = self._growing
            torch.add(then, each, alpha=grown.tokens - self._begun, out=now)

    def _rebuild(self, plan: TreeAttentionPlan, storage: KVStorage, num_merged: int) -> None:
        plan.check_fresh()
        one_class = self.fixed or self.key.deterministic
        work = schedule(
            plan,
            self._set.mixed,
            group_size=self.key.group_size,
            num_kv_heads=self.key.spec.num_kv_heads,
            num_sms=_num_sms(self.key.spec.device),
            window=self.key.window,
            num_merged=num_merged if self.fixed else None,
            small_tiles=None if one_class else self._set.small,
        )
        self.work, self.tiles = work, work.tiles
        width, first = self._record_shape(plan.block_size)
        record = FIELDS + 2 * width + first
        num_items, num_queries = work.num_items, plan.num_rows * plan.num_new
        moved = self._ints.ensure(
            sizes=2,
            lengths=plan.num_rows,
            tokens=num_items,
            lengths_then=plan.num_rows,
            tokens_then=num_items,
            steps=plan.num_rows,
            grows=num_items,
            part_ptr=num_queries + 1,
            part_slots=work.num_slots,
            list=len(work.blocks) * (2 if self._split else 1),
            items=rounded(num_items) * record,
        )
        arrived = num_queries * self.key.spec.num_kv_heads
        flags = (num_items - work.num_work) * self.key.spec.num_kv_heads
        needed = (work.num_slots, arrived, flags + SYNC_HEAD)
        ints = self._ints
        if moved:
            # Lengths, and tokens of items that grow: now, at this rebuild, and what a step adds.
            self._growing = (
                ints.span("lengths", "tokens"),
                ints.span("lengths_then", "tokens_then"),
                ints.span("steps", "grows"),
            )
        if any(map(operator.gt, needed, self._capacities)):
            self._make_parts(*map(max, needed, self._capacities))
            moved = True
        self.generation += moved
        ints.host("sizes")[:2] = num_items, work.num_work
        ends = plan.ends
        self._begun = 0 if plan.grown is None else plan.grown.tokens
        self._room = self._begun + work.room_after(ends)
        for name, values in (("lengths", ends), ("tokens", work.tokens)):
            ints.host(name)[: len(values)] = values
            ints.host(name + "_then")[: len(values)] = values
        ints.host("steps")[:] = 0
        ints.host("steps")[: plan.num_rows] = 1
        ints.host("grows")[:] = 0
        ints.host("grows")[:num_items] = work.grows
        ints.host("part_ptr")[: num_queries + 1] = work.part_ptr
        ints.host("part_slots")[: work.num_slots] = work.part_slots
        self._records(plan.block_size)[:, : FIELDS + 2 * width] = work.items
        self._put_all_numbers(storage)
        ints.send("sizes", "items")

    @property
    def _is_fixed(self) -> bool:
        """Whether softmax of large items has no running maximum.

        Powers of 2 that are relative to the first tile may not fit in float16; in float32, whose
        products take three times as long, nobody has timed it, but in the interpreter it stands for
        bfloat16. Where a query has to be done again, so are those beside it, which is not
        deterministic. Triton before 3.8 fails to compile it for Blackwell's data centre GPUs.
        """
        dtype, arch = self.key.spec.dtype, _arch(self.key.spec.device)
        fits = dtype == torch.bfloat16 or (arch == "interpreter" and dtype == torch.float32)
        fails = arch in TENSOR_MEMORY and _triton_version() < (3, 8)
        return fits and not fails and not self.key.deterministic

    @property
    def _precision(self) -> str:
        """How float32 is multiplied: by tensor cores, from an upper and a lower half of each number
        in tf32, which is as exact; where they cannot, or registers do not suffice, without them."""
        spec, arch = self.key.spec, _arch(self.key.spec.device)
        is_short = rounded(max(spec.k_head_dim, spec.v_head_dim)) <= 128
        in_halves = spec.dtype == torch.float32 and is_short and arch.startswith("sm_")
        return "tf32x3" if in_halves and int(arch[3:]) >= 80 else "ieee"

    @property
    def _split(self) -> bool:
        """K and V have numbers of their own, those of V in the list's second half."""
        return self.key.spec.k_head_dim != self.key.spec.v_head_dim

    def _put_numbers(
        self, storage: KVStorage, places: npt.NDArray[np.int64] | slice, blocks: npt.NDArray[Any]
    ) -> npt.NDArray[np.int32]:
        """Write the numbers of ``blocks`` to ``places`` of the list on the host; those of K."""
        numbers = self._ints.host("list")
        if self._split:
            taken, v_numbers = storage.numbers_of(blocks)
            numbers[len(numbers) // 2 :][places] = v_numbers
        else:
            (taken,) = storage.numbers_of(blocks, 1)
        numbers[places] = taken
        return taken

    def _put_all_numbers(self, storage: KVStorage) -> None:
        """The numbers of all blocks, on the host: in the list, and the first ones in records."""
        work = self.work
        assert work is not None
        width, first = self._record_shape(storage.block_size)
        numbers = self._put_numbers(storage, slice(len(work.blocks)), work.blocks)
        records = self._records(storage.block_size)
        records[:, FIELDS + 2 * width :] = numbers.take(work.items[:, 1:2] + np.arange(first))
        self._index_key = storage.index_key

    def _make_parts(self, num_slots: int, arrived: int, sync: int) -> None:
        device = self.key.spec.device
        self._capacities = tuple(map(rounded, (num_slots, arrived, sync)))
        shape = (self._capacities[0], *self._part_shape)
        with torch.inference_mode(False):  # they outlive the block that they may be made in
            self._parts = torch.empty(shape, dtype=self._part_dtype, device=device)
            self._part_lse = torch.empty((*shape[:2], 2), device=device)
            self._arrived, self._sync = (
                torch.zeros(count, dtype=torch.int32, device=device)
                for count in self._capacities[1:]
            )


def tree_attention_triton(
    q: torch.Tensor,
    storage: KVStorage,
    layer: int,
    plan: TreeAttentionPlan,
    *,
    scale: float,
    window: Window | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`~.reference.tree_attention_reference`, in one launch of the fused kernel.

    :func:`find_obstacle` says what it does not serve.
    """
    spec = storage.spec
    num_rows, num_q_heads, num_new, _ = q.shape
    key = WorkspaceKey(spec, num_q_heads // spec.num_kv_heads, window, plan.deterministic)
    workspace = plan.buffers.get((storage, key))
    if workspace is None:
        workspace = plan.buffers[storage, key] = Workspace(key)
    if q.stride(3) != 1:
        q = q.contiguous()
    out = q.new_empty((num_rows, num_new, num_q_heads, spec.v_head_dim))
    lse = torch.empty((num_rows, num_new, num_q_heads), dtype=torch.float32, device=q.device)
    # Triton launches on the current device, which need not be the layer's.
    with torch.cuda.device(q.device) if q.is_cuda else nullcontext():
        workspace.prepare(plan, storage)
        workspace.launch(q, storage, layer, out, lse, scale=scale, softcap=softcap, sinks=sinks)
    return out.transpose(1, 2), lse.transpose(1, 2)


def tiles_key(spec: KVSpec) -> Key:
    """Where the tiles for ``spec`` stand in the table."""
    head_dim = rounded(max(spec.k_head_dim, spec.v_head_dim))
    return _arch(spec.device), spec.dtype.itemsize, head_dim


def find_tiles(key: WorkspaceKey) -> TileSet:
    """The tiles to use where ``key`` names none."""
    spec, entry = key.spec, tiles_key(key.spec)
    tune_once(
        entry,
        f"--head-dim={max(spec.k_head_dim, spec.v_head_dim)}",
        f"--dtype={str(spec.dtype).removeprefix('torch.')}",
        f"--group={key.group_size}",
        f"--kv-heads={spec.num_kv_heads}",
        f"--device={spec.device.index or 0}",
    )
    return tiles_for(*entry, shared_bytes=_shared_bytes(spec.device))


@cache
def _arch(device: torch.device) -> str:
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


@cache
def _triton_version() -> tuple[int, int]:
    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)


@cache
def _shared_bytes(device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    # AMD has no larger size to opt in to.
    least = properties.shared_memory_per_block
    return getattr(properties, "shared_memory_per_block_optin", least)


@cache
def _num_sms(device: torch.device) -> int:
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count
