"""Other kernels that a user can install, each doing one decode step over a tree of branches.

A peer's ``prepare`` plans, gathers and compiles, none of it timed, and returns what runs one layer.
A peer that can work in several ways gets the one that is fastest on the problem.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from typing import Any, NamedTuple

import torch
from ceilings import time_layers
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

Forward = Callable[[int], torch.Tensor]

MASK_BLOCK = 128
WORKSPACE_BYTES = 512 << 20
FUSED_BACKENDS = [
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
]


class Unavailable(RuntimeError):
    """A peer cannot run here, or cannot run this problem; the message says why."""


class Group(NamedTuple):
    """Rows that read the same tokens at one level."""

    rows: list[int]
    blocks: list[int]
    tokens: int


@dataclass(frozen=True)
class Problem:
    """One new query token a row over block tables, for some layers.

    Attributes:
        q: for each layer ``[B, Hq, D]``.
        k_blocks: for each layer ``[num_blocks, S, Hkv, D]``, the last three dims contiguous.
        v_blocks: likewise.
        tables: for each row, the numbers of its blocks, in order.
        lengths: for each row, its tokens.
        levels: groups from the root down. Each row is in one group of every level, which may be
            empty; its groups one after the other are its table. The rows of a group follow each
            other, the groups of a level too.
        scale: what scores are multiplied with.
    """

    q: list[torch.Tensor]
    k_blocks: list[torch.Tensor]
    v_blocks: list[torch.Tensor]
    tables: list[list[int]]
    lengths: list[int]
    levels: list[list[Group]]
    scale: float

    @property
    def num_layers(self) -> int:
        return len(self.q)

    @property
    def num_rows(self) -> int:
        return len(self.tables)

    @property
    def num_q_heads(self) -> int:
        return self.q[0].shape[1]

    @property
    def num_kv_heads(self) -> int:
        return self.k_blocks[0].shape[2]

    @property
    def group_size(self) -> int:
        return self.num_q_heads // self.num_kv_heads

    @property
    def block_size(self) -> int:
        return self.k_blocks[0].shape[1]

    @property
    def head_dim(self) -> int:
        return self.q[0].shape[2]

    @property
    def dtype(self) -> torch.dtype:
        return self.q[0].dtype

    @property
    def device(self) -> torch.device:
        return self.q[0].device

    def first_layers(self, num_layers: int) -> Problem:
        """The same step over fewer layers, for a peer that needs much memory a layer."""
        return dataclasses.replace(
            self,
            q=self.q[:num_layers],
            k_blocks=self.k_blocks[:num_layers],
            v_blocks=self.v_blocks[:num_layers],
        )

    def check(self) -> None:
        """Raises ValueError where tables, lengths and levels do not agree."""
        for row, (table, length) in enumerate(zip(self.tables, self.lengths, strict=True)):
            if len(table) != math.ceil(length / self.block_size):
                raise ValueError(f"row {row} has {length} tokens in {len(table)} blocks")
        for number, level in enumerate(self.levels):
            rows = [row for group in level for row in group.rows]
            if rows != list(range(self.num_rows)):
                raise ValueError(f"level {number} lists rows {rows}, not each once and in order")
            for group in level:
                if len(group.blocks) != math.ceil(group.tokens / self.block_size):
                    raise ValueError(
                        f"level {number}: {group.tokens} tokens in {len(group.blocks)} blocks"
                    )
        folded = fold_levels(self.levels, 1)[0]
        for group, table, length in zip(folded, self.tables, self.lengths, strict=True):
            if group.blocks != table or group.tokens != length:
                raise ValueError(f"the groups of row {group.rows[0]} are not its table")


@dataclass(frozen=True)
class Run:
    """One layer of a peer: ``run(layer)`` returns ``[B, Hq, D]``; ``way`` says how it works."""

    forward: Forward
    way: str = ""

    def __call__(self, layer: int) -> torch.Tensor:
        return self.forward(layer)


@dataclass(frozen=True)
class Peer:
    """A kernel to compare with. ``prepare`` raises :class:`Unavailable` with the reason."""

    name: str
    package: str
    prepare: Callable[[Problem], Run]

    @property
    def version(self) -> str:
        try:
            return f"{self.package} {metadata.version(self.package)}"
        except metadata.PackageNotFoundError:
            return f"{self.package} not installed"


def sdpa_dense(problem: Problem) -> Run:
    """Standard attention: every row has a dense copy of its own context, padded to the longest.

    Ways: all backends of torch, each with ``enable_gqa`` and with the query heads of a K/V head as
    a sequence of queries, which is the same where nothing is causal.
    """
    rows, heads, width = problem.num_rows, problem.num_kv_heads, problem.head_dim
    lengths = torch.tensor(problem.lengths)
    longest = max(problem.lengths)
    if min(problem.lengths) < longest:
        # Backends that take a bias want it aligned.
        longest = max(map(len, problem.tables)) * problem.block_size
    copy_bytes = 2 * rows * heads * longest * width * problem.dtype.itemsize
    _require_memory(problem, copy_bytes * (problem.num_layers + 2))
    most = max(map(len, problem.tables))
    table = torch.tensor([blocks + blocks[-1:] * (most - len(blocks)) for blocks in problem.tables])
    table = table.to(problem.device)
    hidden = (torch.arange(longest) >= lengths[:, None]).to(problem.device)  # [B, L]

    def dense(blocks: torch.Tensor) -> torch.Tensor:
        tokens = blocks[table].flatten(1, 2)[:, :longest]
        return tokens.masked_fill_(hidden[:, :, None, None], 0).transpose(1, 2).contiguous()

    k, v = ([dense(x) for x in blocks] for blocks in (problem.k_blocks, problem.v_blocks))
    bias = None
    if hidden.any():
        bias = torch.zeros(hidden.shape, dtype=problem.dtype, device=problem.device)
        bias = bias.masked_fill_(hidden, float("-inf"))[:, None, None]

    def attend(q: torch.Tensor, layer: int, gqa: bool) -> torch.Tensor:
        mask = bias if bias is None else bias.expand(-1, q.shape[1], q.shape[2], -1)
        return scaled_dot_product_attention(
            q, k[layer], v[layer], attn_mask=mask, scale=problem.scale, enable_gqa=gqa
        )

    def grouped(layer: int) -> torch.Tensor:
        return attend(problem.q[layer][:, :, None], layer, problem.group_size > 1)[:, :, 0]

    def packed(layer: int) -> torch.Tensor:
        q = problem.q[layer].unflatten(1, (heads, problem.group_size))
        return attend(q, layer, False).flatten(1, 2)

    def using(backend: SDPBackend, forward: Forward) -> Forward:
        def run(layer: int) -> torch.Tensor:
            with sdpa_kernel(backend):
                return forward(layer)

        return run

    backends = [SDPBackend.MATH] if problem.device.type == "cpu" else FUSED_BACKENDS
    return _fastest(
        problem,
        {
            f"{backend.name.lower()}, {forward.__name__} heads": partial(using, backend, forward)
            for backend in backends
            for forward in (grouped, packed)
        },
    )


def flex(problem: Problem, *, autotune: bool = False) -> Run:
    """torch's flex_attention over every stored token once, with the tree as its mask.

    The tokens stand in the order in which the rows first meet them, so that those which a row sees
    lie in few tiles.
    """
    block_list, offset_list, first_row, last_row = _stored_tokens(problem)
    padding = -len(block_list) % MASK_BLOCK
    # Padding repeats the first token and is seen by nobody.
    blocks, offsets = (
        torch.tensor(x + x[:1] * padding, device=problem.device) for x in (block_list, offset_list)
    )
    first = torch.tensor(first_row + [problem.num_rows] * padding, device=problem.device)
    last = torch.tensor(last_row + [-1] * padding, device=problem.device)

    def sees(_batch: Any, _head: Any, row: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
        return (first[token] <= row) & (row <= last[token])

    mask = create_block_mask(
        sees, None, None, problem.num_rows, len(blocks), problem.device, BLOCK_SIZE=MASK_BLOCK
    )
    k, v = (
        [x[blocks, offsets].transpose(0, 1).contiguous()[None] for x in layers]
        for layers in (problem.k_blocks, problem.v_blocks)
    )
    # Every problem has new constants; the compiler gives up after a few on one function.
    torch.compiler.reset()
    mode = "max-autotune-no-cudagraphs" if autotune else None
    compiled = torch.compile(flex_attention, dynamic=False, mode=mode)

    def forward(layer: int) -> torch.Tensor:
        out = compiled(
            problem.q[layer].transpose(0, 1)[None],
            k[layer],
            v[layer],
            block_mask=mask,
            scale=problem.scale,
            enable_gqa=problem.group_size > 1,
        )
        return out[0].transpose(0, 1)

    return _fastest(problem, {mode or "default": lambda: forward})


def flashinfer_decode(problem: Problem) -> Run:
    """FlashInfer's decode over block tables, with tensor cores; it knows of no sharing."""
    flashinfer = _import_flashinfer(problem)
    (level,) = fold_levels(problem.levels, 1)
    kv_indptr, indices, last_lengths = _csr(level, problem.block_size)

    def prepare() -> Forward:
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            _workspace(problem), "NHD", use_tensor_cores=True
        )
        wrapper.plan(
            kv_indptr,
            indices.to(problem.device),
            last_lengths,
            problem.num_q_heads,
            problem.num_kv_heads,
            problem.head_dim,
            problem.block_size,
            sm_scale=problem.scale,
            q_data_type=problem.dtype,
            kv_data_type=problem.dtype,
        )
        return partial(_run_wrapper, wrapper, problem)

    return _fastest(problem, {"fa2": prepare})


def flashinfer_cascade(problem: Problem) -> Run:
    """FlashInfer's cascade: one launch a level and a merge after each.

    Ways: the levels as they are and folded to fewer, with both of its attention kernels.
    """
    flashinfer = _import_flashinfer(problem)
    depths = sorted({min(len(problem.levels), depth) for depth in (2, 3, 4, 8, 64)})

    def prepare(depth: int, backend: str) -> Forward:
        levels = fold_levels(problem.levels, depth)
        wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(
            len(levels), _workspace(problem), "NHD"
        )
        # The class offers no choice and takes fa3 on Hopper, which does not split long contexts.
        for inner in wrapper._batch_prefill_wrappers:
            inner._backend = backend
        tables = [_csr(level, problem.block_size) for level in levels]
        wrapper.plan(
            [_indptr(len(group.rows) for group in level) for level in levels],
            [kv_indptr for kv_indptr, _, _ in tables],
            [indices.to(problem.device) for _, indices, _ in tables],
            [last_lengths for _, _, last_lengths in tables],
            problem.num_q_heads,
            problem.num_kv_heads,
            problem.head_dim,
            problem.block_size,
            sm_scale=problem.scale,
            q_data_type=problem.dtype,
            kv_data_type=problem.dtype,
        )
        return partial(_run_wrapper, wrapper, problem)

    return _fastest(
        problem,
        {
            f"{depth} levels, {backend}": partial(prepare, depth, backend)
            for depth in depths
            for backend in ("fa2", "fa3")
        },
    )


PEERS = (
    Peer("SDPA on dense copies", "torch", sdpa_dense),
    Peer("flex_attention with a tree mask", "torch", flex),
    Peer("FlashInfer paged decode", "flashinfer-python", flashinfer_decode),
    Peer("FlashInfer multi-level cascade", "flashinfer-python", flashinfer_cascade),
)


def fold_levels(levels: list[list[Group]], num_levels: int) -> list[list[Group]]:
    """At most ``num_levels`` levels: the last one holds what each row has from there on, alone."""
    if len(levels) <= num_levels and num_levels > 1:
        return levels
    kept, folded = levels[: num_levels - 1], levels[num_levels - 1 :]
    rows: dict[int, Group] = {}
    for level in folded:
        for group in level:
            for row in group.rows:
                above = rows.get(row, Group([row], [], 0))
                rows[row] = Group([row], above.blocks + group.blocks, above.tokens + group.tokens)
    return [*kept, [rows[row] for row in sorted(rows)]]


def _stored_tokens(problem: Problem) -> tuple[list[int], list[int], list[int], list[int]]:
    """Block, offset, first and last reading row of every stored token."""
    readers: dict[int, list[tuple[int, int]]] = {}
    for row, (table, length) in enumerate(zip(problem.tables, problem.lengths, strict=True)):
        for i, block in enumerate(table):
            used = min(problem.block_size, length - i * problem.block_size)
            readers.setdefault(block, []).append((row, used))
    tokens = []
    for block, users in readers.items():
        for offset in range(max(used for _, used in users)):
            rows = [row for row, used in users if used > offset]
            if rows[-1] - rows[0] + 1 != len(rows):
                raise Unavailable(f"the rows {rows} of block {block} do not follow each other")
            tokens.append((block, offset, rows[0], rows[-1]))
    blocks, offsets, first, last = (list(column) for column in zip(*tokens, strict=True))
    return blocks, offsets, first, last


def _indptr(counts: Iterable[int]) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32)


def _csr(level: list[Group], block_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """int32 kv_indptr ``[groups + 1]``, block indices, tokens in each group's last block."""
    last = [
        group.tokens - (len(group.blocks) - 1) * block_size if group.blocks else 0
        for group in level
    ]
    indices = [block for group in level for block in group.blocks]
    return (
        _indptr(len(group.blocks) for group in level),
        torch.tensor(indices, dtype=torch.int32),
        torch.tensor(last, dtype=torch.int32),
    )


def _run_wrapper(wrapper: Any, problem: Problem, layer: int) -> torch.Tensor:
    return wrapper.run(problem.q[layer], (problem.k_blocks[layer], problem.v_blocks[layer]))


def _workspace(problem: Problem) -> torch.Tensor:
    return torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=problem.device)


def _import_flashinfer(problem: Problem) -> Any:
    if problem.device.type != "cuda":
        raise Unavailable(f"FlashInfer needs an NVIDIA GPU; the problem is on {problem.device}")
    try:
        import flashinfer
    except Exception as error:
        raise Unavailable(f"flashinfer does not import: {error}") from error
    return flashinfer


def _require_memory(problem: Problem, num_bytes: int) -> None:
    if problem.device.type != "cuda":
        return
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if num_bytes > free:
        raise Unavailable(
            f"needs {num_bytes / 1e9:.0f} GB for dense copies of {problem.num_layers} layers, "
            f"{free / 1e9:.0f} GB are free: try problem.first_layers"
        )


def _fastest(problem: Problem, ways: Mapping[str, Callable[[], Forward]]) -> Run:
    """The fastest of the ways that work; on a CPU the first one."""
    best: Run | None = None
    best_time = math.inf
    reasons = []
    for way, prepare in ways.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                forward = prepare()
                forward(0)
                time = 0.0
                if problem.device.type == "cuda":
                    time = statistics.median(time_layers(forward, problem.num_layers, replays=3))
        except Exception as error:
            reasons.append(f"{way}: {type(error).__name__} {str(error).strip()[:200]}")
            continue
        if time < best_time:
            best, best_time = Run(forward, way), time
    if best is None:
        raise Unavailable("; ".join(reasons))
    return best
