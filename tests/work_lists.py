"""Random work lists, read as the fused kernel does: who meets which token, and where it lies."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from trees import SHAPES, Grown, ShadowTree, grow_randomly

from hf_tree_cache.attention.outline import UNLIMITED
from hf_tree_cache.attention.plan import TreeAttentionPlan, Window, build_plan
from hf_tree_cache.attention.schedule import FIELDS, LARGE, MERGE, SMALL, WorkList, schedule
from hf_tree_cache.attention.tiles import Tiles, TileSet
from hf_tree_cache.memory.storage import KVSpec, KVStorage

SEEDS = 240
CORE_SEEDS = range(0, SEEDS, 21)
GROUPS = [1, 4, 7, 16]
TILES = {
    "default tiles": Tiles(),
    "tiny items": Tiles(min_chunk=16, item_cost=0, waves=4, kv_small=16, kv_large=16),
    "small items": Tiles(min_chunk=32, item_cost=20, waves=1, kv_small=32),
    "one tile size": Tiles(m_large=16, min_chunk=64, item_cost=20),
    "wide tiles": Tiles(m_small=32, m_large=128, kv_large=64, min_chunk=64, large_cost=2.5),
}
WINDOWS = [
    None,
    None,
    *(Window(kind, size) for kind in ("sliding", "chunked") for size in (1, 7, 64, 600)),  # type: ignore[arg-type]
]


@dataclass(frozen=True)
class Item:
    """A record as the kernel reads it.

    Attributes:
        kind: SMALL, LARGE or MERGE.
        start: position of its first token.
        tokens: how many it has.
        slot: of its first query's part, or -1.
        full: tokens that all its queries see.
        lanes: leaves whose blocks take turns.
        queries, limits: one of each a member; limits of lanes are also there again and again.
        blocks: ids, of as many as its tokens fill.
    """

    kind: int
    start: int
    tokens: int
    slot: int
    full: int
    lanes: int
    queries: list[int]
    limits: list[int]
    blocks: npt.NDArray[np.int64]


def read_items(work: WorkList, block_size: int) -> list[Item]:
    """The records of ``work``; a Workspace's buffers are read by :func:`read_buffers`."""
    columns = work.items[:, 1], work.items[:, 6], work.tokens
    records = zip(*(column.tolist() for column in columns), strict=True)
    blocks = [
        work.blocks[at : at + (-(-tokens // block_size) << lane_bits)].astype(np.int64)
        for at, lane_bits, tokens in records
    ]
    return _parse(work.items, work.tokens, blocks)


def read_buffers(workspace: Any, storage: KVStorage) -> list[Item]:
    """What lies in the device buffers of a Workspace, block numbers turned into ids."""
    ints, work, size = workspace._ints, workspace.work, storage.block_size
    width, first = workspace._record_shape(size)
    num_items = int(ints["sizes"][0])
    assert int(ints["sizes"][1]) == work.num_work
    record = FIELDS + 2 * width + first
    records = ints["items"][: num_items * record].numpy().reshape(num_items, record)
    numbers, tokens = ints["list"].numpy(), ints["tokens"][:num_items].numpy()
    ids = {int(number): block for block, number in enumerate(storage.block_numbers()[0])}
    blocks = []
    for row, count in zip(records, tokens.tolist(), strict=True):
        kv = workspace.tiles.kv_large if row[0] == LARGE else workspace.tiles.kv_small
        at, needed = int(row[1]), -(-count // size) << int(row[6])
        mine = numbers[at : at + needed].copy()
        if workspace.key.window is None:
            # The first tile finds its blocks in the record.
            inside = min(needed, max(1, kv // size))
            mine[:inside] = row[FIELDS + 2 * width :][:inside]
        blocks.append(np.array([ids[int(number)] for number in mine], np.int64))
    return _parse(records[:, : FIELDS + 2 * width], tokens, blocks)


def _parse(records: Any, tokens: Any, blocks: list[npt.NDArray[np.int64]]) -> list[Item]:
    width = (records.shape[1] - FIELDS) // 2
    return [
        Item(
            kind=row[0],
            start=row[2],
            tokens=count,
            slot=row[4],
            full=row[5],
            lanes=1 << row[6],
            queries=row[FIELDS : FIELDS + row[3]],
            limits=row[FIELDS + width : FIELDS + width + row[3]],
            blocks=mine,
        )
        for row, count, mine in zip(records.tolist(), tokens.tolist(), blocks, strict=True)
    ]


def visible(item: Item, member: int, plan: TreeAttentionPlan, window: Window | None) -> range:
    """Tokens of ``item`` that one of its queries sees, as the kernel masks them."""
    row, column = divmod(item.queries[member], plan.num_new)
    limit = item.limits[member]
    if limit > UNLIMITED // 2:
        limit = item.tokens - (UNLIMITED - limit) - (plan.num_new - 1 - column)
    lower = 0
    if window is not None:
        own = plan.lengths[row] - plan.num_new + column + 1
        first = own - window.size if window.kind == "sliding" else (own - 1) // window.size
        first *= 1 if window.kind == "sliding" else window.size
        lower = max(0, first - item.start)
    return range(lower, max(lower, min(limit, item.tokens)))


def check_items(
    items: Sequence[Item],
    work: WorkList,
    shadow: ShadowTree,
    plan: TreeAttentionPlan,
    tiles: Tiles,
    group: int,
    window: Window | None,
) -> None:
    """Every query meets each token that it sees once, and its parts are merged."""
    size, num_new = plan.block_size, plan.num_new
    kinds = [item.kind for item in items]
    assert set(kinds[: work.num_work]) <= {SMALL, LARGE}
    assert set(kinds[work.num_work :]) <= {MERGE}
    most = {SMALL: tiles.m_small, LARGE: tiles.m_large, MERGE: work.merge_rows}
    memory = np.full(1 + max(shadow.memory, default=0), -1)
    memory[list(shadow.memory)] = list(shadow.memory.values())

    met: dict[int, list[tuple[int, npt.NDArray[np.int64]]]] = {}
    parts: dict[int, list[tuple[int, int]]] = {}
    blanks: list[int] = []
    for item in items[: work.num_work]:
        assert 1 <= len(item.queries) <= most[item.kind] // group
        assert len(set(item.queries)) == len(item.queries)
        if not item.tokens:
            assert item.slot == -1 and item.full == 0
            blanks += item.queries
            continue
        assert item.start % size == 0 and 0 <= item.full <= item.tokens
        assert item.lanes in (1, len(item.queries)) and work.lanes % item.lanes == 0
        for member, query in enumerate(item.queries):
            seen = visible(item, member, plan, window)
            if window is None:
                assert item.full <= seen.stop, "tokens that a query does not see have no mask"
            at = np.arange(seen.start, seen.stop)
            lane, start = 0, item.start
            if item.lanes > 1:
                # Each leaf begins where it likes, and ends with its own token.
                lane, start = member, plan.lengths[query // num_new] - seen.stop
            slots = item.blocks[at // size * item.lanes + lane] * size + at % size
            met.setdefault(query, []).append((start + seen.start, memory[slots]))
            if item.slot >= 0:
                parts.setdefault(query, []).append((start, item.slot + member))

    empty = []
    for row, branch in enumerate(shadow.rows):
        tokens = shadow.tokens[branch]
        for column in range(num_new):
            query, position = row * num_new + column, len(tokens) - num_new + column
            if column < num_new - plan.counts[row]:
                empty.append(query)
                assert query not in met
                continue
            first = 0 if window is None else max(0, window.first_visible(position))
            pieces = sorted(met[query], key=lambda piece: piece[0])
            got = np.concatenate([piece for _, piece in pieces])
            assert got.tolist() == tokens[first : position + 1], f"row {row}, column {column}"
            assert len(pieces) == 1 or query in parts
            assert len(parts.get(query, pieces)) == len(pieces)
    assert sorted(blanks) == empty

    used = [slot for mine in parts.values() for _, slot in mine]
    assert sorted(used) == list(range(work.num_slots))
    for query in range(plan.num_rows * num_new):
        begin, end = work.part_ptr[query : query + 2].tolist()
        in_order = [slot for _, slot in sorted(parts.get(query, []))]
        assert work.part_slots[begin:end].tolist() == in_order
    merged = [query for item in items[work.num_work :] for query in item.queries]
    assert all(len(i.queries) <= work.merge_rows // group for i in items[work.num_work :])
    assert sorted(merged) == sorted(parts)
    assert work.num_large == kinds.count(LARGE)


@dataclass
class Case:
    """A random tree, and how its attention is cut."""

    grown: Grown
    plan: TreeAttentionPlan
    tiles: Tiles
    group: int
    num_kv_heads: int
    num_sms: int
    window: Window | None

    def schedule(self) -> WorkList:
        return schedule(
            self.plan,
            self.tiles,
            group_size=self.group,
            num_kv_heads=self.num_kv_heads,
            num_sms=self.num_sms,
            window=self.window,
        )

    def check(self, work: WorkList) -> None:
        items = read_items(work, self.plan.block_size)
        shadow, plan = self.grown.shadow, self.plan
        check_items(items, work, shadow, plan, self.tiles, self.group, self.window)


def make_case(seed: int, *, num_new: int | None = None, scale: int | None = None) -> Case:
    rng = random.Random(seed)
    grown = grow_randomly(
        rng,
        SHAPES[seed % len(SHAPES)],
        rng.choice([1, 2, 4, 16, 16, 32, 64]),
        rng.choice([1, 1, 1, 2, 3, 5, 17]) if num_new is None else num_new,
        scale=rng.choice([2, 12, 40, 150]) if scale is None else scale,
    )
    deterministic = rng.random() < 0.25
    shadow = grown.shadow
    return Case(
        grown=grown,
        plan=build_plan(shadow.tree, grown.counts, grown.num_new, deterministic=deterministic),
        tiles=replace(rng.choice(list(TILES.values())), deterministic=deterministic),
        group=rng.choice(GROUPS),
        num_kv_heads=rng.choice([1, 2, 8]),
        num_sms=rng.choice([1, 4, 132]),
        window=rng.choice(WINDOWS),
    )


def seeds(step: int = 1) -> Any:
    return pytest.mark.parametrize(
        "seed",
        [
            pytest.param(
                seed,
                id=f"{SHAPES[seed % len(SHAPES)]}, tree {seed}",
                marks=[pytest.mark.core] if seed in CORE_SEEDS else [],
            )
            for seed in range(0, SEEDS, step)
        ],
    )


def make_workspace(case: Case) -> tuple[Any, KVStorage]:
    launch = pytest.importorskip("hf_tree_cache.attention.launch")
    spec = KVSpec(case.num_kv_heads, 4, 4, torch.float32, torch.device("cpu"))
    storage = KVStorage(spec, 1, case.plan.block_size, 8)
    storage.add_layer()
    storage.ensure(case.plan.tree.allocator.num_blocks)
    tiles = TileSet(case.tiles, replace(case.tiles, stages_small=2))
    key = launch.WorkspaceKey(spec, case.group, case.window, case.plan.deterministic, tiles)
    return launch.Workspace(key), storage


def step(
    workspace: Any, case: Case, storage: KVStorage, counts: list[int], num_new: int = 1
) -> Case:
    """The next forward, prepared; the buffers must say what a list cut anew would."""
    shadow, last = case.grown.shadow, case.plan
    shadow.append(counts)
    storage.ensure(shadow.tree.allocator.num_blocks)
    plan = build_plan(shadow.tree, counts, num_new, last, deterministic=last.deterministic)
    workspace.prepare(plan, storage)
    items, tiles = read_buffers(workspace, storage), workspace.tiles
    check_items(items, workspace.work, shadow, plan, tiles, case.group, case.window)
    return replace(case, plan=plan)


def grow_in_place(case: Case, steps: int) -> Iterator[tuple[Any, Case, KVStorage]]:
    """One token more for each row, again and again; the workspace after each."""
    workspace, storage = make_workspace(case)
    workspace.prepare(case.plan, storage)
    counts = [1] * len(case.grown.shadow.rows)
    for _ in range(steps):
        case = step(workspace, case, storage, counts)
        yield workspace, case, storage
