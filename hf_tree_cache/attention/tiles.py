"""Tiles: the sizes that a launch of the fused kernel is compiled for, and planned with.

They come from the user's file, which `python -m hf_tree_cache.attention.tune` writes, else from
:data:`TABLE`, else from the entry of the nearest GPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any


@dataclass(frozen=True, slots=True)
class Tiles:
    """One compilation of the kernel, and how work is cut for it.

    Attributes:
        m_small, m_large: rows (queries x heads of a group) of the two tile classes.
        kv_small, kv_large: tokens of a step of their loops.
        stages_small, stages_large: how many steps are loaded ahead.
        num_warps: warps of a program.
        max_registers: of a thread; 0 leaves it to the compiler.
        programs_per_sm: resident at a time, with these registers and stages.
        merge_rows, merge_parts: queries x heads, and parts, that a merge loads at a time; more rows
            and fewer parts where there are many queries, or a group has more heads than that.
        waves: about how many times over the programs of split work should fill the GPU.
        min_chunk: tokens below which work is not split.
        item_cost: what starting an item costs, in tokens of the small class.
        large_cost: a token of the large class, in tokens of the small class.
        lanes: leaves that may share an item of the small class, see :mod:`.braids`.
        deterministic: cuts and arithmetic of a row do not depend on what else is in the batch.
    """

    m_small: int = 16
    m_large: int = 64
    kv_small: int = 64
    kv_large: int = 32
    stages_small: int = 3
    stages_large: int = 3
    num_warps: int = 4
    max_registers: int = 0
    programs_per_sm: int = 2
    merge_rows: int = 8
    merge_parts: int = 8
    waves: float = 1.0
    min_chunk: int = 128
    item_cost: int = 200
    large_cost: float = 1.25
    lanes: int = 4
    deterministic: bool = False

    def options(self, arch: str) -> dict[str, Any]:
        """Triton's options for a launch on ``arch``."""
        options: dict[str, Any] = {"num_warps": self.num_warps, "enable_fp_fusion": True}
        if self.max_registers and arch.startswith("sm_"):
            options["maxnreg"] = self.max_registers
        elif self.max_registers and arch.startswith("gfx"):
            # So many waves are to share the 512 registers of a lane.
            options["waves_per_eu"] = 512 // self.max_registers
        return options

    def find_fault(self) -> str | None:
        """What keeps the kernel from being compiled for these sizes, on any GPU."""
        tiles = (self.m_small, self.m_large, self.kv_small, self.kv_large)
        loads = (self.merge_rows, self.merge_parts, self.num_warps)
        if any(size < 16 or size & (size - 1) for size in tiles):
            return "m_* and kv_* must be powers of two from 16 on"
        if self.m_small > self.m_large:
            return "m_small must not exceed m_large"
        if any(size < 1 or size & (size - 1) for size in loads) or self.merge_parts < 2:
            return "merge_rows, merge_parts and num_warps must be powers of two, merge_parts not 1"
        positive = (self.stages_small, self.stages_large, self.programs_per_sm, self.min_chunk)
        if min(*positive, self.waves, self.large_cost) <= 0 or self.max_registers < 0:
            return "stages, programs, chunks, waves and costs must be positive"
        return None


@dataclass(frozen=True, slots=True)
class TileSet:
    """Tiles of one GPU, dtype and head size.

    Attributes:
        mixed: for lists with both classes of items.
        small: for lists without large ones: nothing is shared by more than a small tile.
    """

    mixed: Tiles
    small: Tiles


Key = tuple[str, int, int]
"""Architecture, bytes of an element, and the larger head dim, padded to a power of two."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What programs share.

    Attributes:
        shared_block, shared_sm: bytes of shared memory for one program, and for all of an SM's.
        reserved: bytes that each program takes besides.
        registers: of an SM, 32 bits each.
        warp: threads of a warp; registers are given to warps, eight for each thread at a time.
    """

    shared_block: int
    shared_sm: int
    reserved: int = 1024
    registers: int = 65536
    warp: int = 32

    def resident(self, registers: int, shared: int, num_warps: int) -> int:
        """Programs of ``registers`` a thread and ``shared`` bytes that an SM holds at a time."""
        if shared > self.shared_block:
            return 0
        per_program = num_warps * self.warp * max(8, -(-registers // 8) * 8)
        return min(self.registers // per_program, self.shared_sm // max(1, shared + self.reserved))


LIMITS = {
    "sm_80": Limits(163 << 10, 164 << 10),
    "sm_86": Limits(99 << 10, 100 << 10),
    "sm_89": Limits(99 << 10, 100 << 10),
    "sm_90": Limits(227 << 10, 228 << 10),
    "sm_100": Limits(227 << 10, 228 << 10),
    "sm_120": Limits(99 << 10, 100 << 10),
    "gfx942": Limits(64 << 10, 64 << 10, reserved=0, registers=4 * 512 * 64, warp=64),
}
"""By architecture."""

# Rows of the table: architectures, bytes of an element, head dims, tiles of both sets.
#
# Registers and shared memory decide. A large tile keeps M x D sums in registers, a merge its rows x
# parts x D values; a stage of 64 tokens takes 32 KB with two bytes and D = 128. In float32 halves
# of numbers take registers, too; heads of 256 have none left, and use no tensor cores.
_EASY = (16, 32, 64)
_ROOMY = ("sm_80", "sm_90", "sm_100")  # shared memory for several large tiles
_TIGHT = ("sm_86", "sm_89", "sm_120")
_FLOAT = Tiles(
    m_large=32, kv_small=64, kv_large=32, stages_small=2, stages_large=2, merge_rows=4,
    merge_parts=2,
)  # fmt: skip
_FLOAT_64 = replace(_FLOAT, max_registers=168, programs_per_sm=3)
_FLOAT_256 = Tiles(
    m_large=32, kv_small=16, kv_large=16, stages_small=2, stages_large=2, num_warps=8,
    merge_parts=2, programs_per_sm=1,
)  # fmt: skip
_FLOAT_256_SMALL = Tiles(kv_small=16, stages_small=2, merge_parts=2, max_registers=168)
_AMD = Tiles(kv_small=32, stages_small=2, stages_large=2, merge_parts=4)
_AMD_16 = replace(_AMD, m_large=32, kv_small=16, kv_large=16, merge_parts=2)
_WIDE_MERGES = Tiles(max_registers=168, merge_rows=16, merge_parts=4, programs_per_sm=3)
_LONG = Tiles(
    m_large=32, kv_small=16, kv_large=16, stages_small=2, stages_large=2, num_warps=8,
    merge_rows=4, merge_parts=2, programs_per_sm=1,
)  # fmt: skip
_LONG_4 = replace(_LONG, num_warps=4, programs_per_sm=2)
_ROWS: tuple[tuple[tuple[str, ...], int, tuple[int, ...], Tiles, Tiles], ...] = (
    # bfloat16 and float16
    (_ROOMY, 2, _EASY, Tiles(kv_large=64, max_registers=168, programs_per_sm=3),
     Tiles(max_registers=128, programs_per_sm=4)),
    # Measured on an H200.
    (("sm_90",), 2, (64,), replace(_WIDE_MERGES, kv_large=64), _WIDE_MERGES),
    (_TIGHT, 2, _EASY, Tiles(kv_large=64),
     Tiles(stages_small=2, max_registers=128, programs_per_sm=4)),
    # Measured on an H200, merges of lists without large items excepted.
    (("sm_90",), 2, (128,),
     Tiles(max_registers=168, programs_per_sm=3, item_cost=140, large_cost=1.2),
     Tiles(stages_small=2, merge_parts=4, programs_per_sm=4)),
    (("sm_100",), 2, (128,), Tiles(merge_parts=4, max_registers=168, programs_per_sm=3),
     Tiles(stages_small=2, merge_parts=4, programs_per_sm=4)),
    (("sm_80",), 2, (128,), Tiles(merge_parts=4),
     Tiles(stages_small=2, merge_parts=4, programs_per_sm=3)),
    (_TIGHT, 2, (128,), Tiles(kv_small=32, stages_large=2, merge_parts=4),
     Tiles(kv_small=32, merge_parts=4, max_registers=168)),
    (_ROOMY, 2, (256,), Tiles(kv_small=32, kv_large=16, merge_parts=2),
     Tiles(kv_small=32, stages_small=2, merge_parts=2, programs_per_sm=3)),
    (_TIGHT, 2, (256,), Tiles(kv_small=32, kv_large=16, merge_parts=2, programs_per_sm=1),
     Tiles(kv_small=32, stages_small=2, merge_parts=2, max_registers=168)),
    # Measured on an H200, but for 16 tokens in large items: 32 were faster there, and spill now.
    (("sm_90",), 2, (512,),
     replace(_LONG_4, kv_small=32, merge_parts=8),
     replace(_LONG_4, kv_small=32, stages_small=3, merge_parts=8, programs_per_sm=1)),
    (("sm_100",), 2, (512,), _LONG_4, replace(_LONG_4, programs_per_sm=4)),
    (("sm_80",), 2, (512,), _LONG, replace(_LONG_4, programs_per_sm=3)),
    (_TIGHT, 2, (512,), _LONG, _LONG_4),
    # float32
    (_ROOMY, 4, _EASY, _FLOAT_64, _FLOAT_64),
    (_TIGHT, 4, _EASY, replace(_FLOAT_64, programs_per_sm=2),
     replace(_FLOAT_64, programs_per_sm=2)),
    # Measured on an H200.
    (("sm_90", "sm_100"), 4, (128,), _FLOAT, replace(_FLOAT, merge_rows=8)),
    (("sm_80",), 4, (128,), replace(_FLOAT, kv_small=32),
     replace(_FLOAT, kv_small=32, merge_rows=8)),
    (_TIGHT, 4, (128,), replace(_FLOAT, kv_small=32, programs_per_sm=1),
     replace(_FLOAT, merge_rows=8, programs_per_sm=1)),
    (_ROOMY, 4, (256,), _FLOAT_256, replace(_FLOAT_256_SMALL, programs_per_sm=3)),
    (_TIGHT, 4, (256,), _FLOAT_256, replace(_FLOAT_256_SMALL, programs_per_sm=1)),
    # AMD
    (("gfx942",), 2, _EASY, replace(_AMD, kv_small=64, kv_large=64, max_registers=256),
     replace(_AMD, stages_small=3, merge_parts=8, programs_per_sm=4)),
    (("gfx942",), 2, (128,), replace(_AMD, max_registers=256),
     replace(_AMD, max_registers=128, programs_per_sm=4)),
    (("gfx942",), 2, (256,), replace(_AMD_16, max_registers=256),
     replace(_AMD_16, programs_per_sm=3)),
    (("gfx942",), 2, (512,), replace(_LONG_4, programs_per_sm=1),
     replace(_LONG_4, programs_per_sm=1)),
    (("gfx942",), 4, _EASY, replace(_AMD, m_large=32, kv_large=16, programs_per_sm=3),
     replace(_AMD, programs_per_sm=3)),
    (("gfx942",), 4, (128,), _AMD_16, replace(_AMD_16, programs_per_sm=3)),
    (("gfx942",), 4, (256,), replace(_AMD_16, num_warps=8, programs_per_sm=1),
     replace(_AMD_16, num_warps=8, programs_per_sm=1)),
    # On a CPU
    (("interpreter",), 2, (*_EASY, 128, 256, 512), Tiles(), Tiles(stages_small=2)),
    (("interpreter",), 4, (*_EASY, 128, 256), Tiles(), Tiles(stages_small=2)),
)  # fmt: skip

TABLE: dict[Key, TileSet] = {
    (arch, itemsize, head_dim): TileSet(mixed, small)
    for archs, itemsize, head_dims, mixed, small in _ROWS
    for arch in archs
    for head_dim in head_dims
}
"""The built-in tiles."""

MEASURED = {("sm_90", 2, head_dim) for head_dim in (64, 128, 512)} | {("sm_90", 4, 128)}
"""Entries of the table that were chosen by time; the others are what fits without spills."""

TILES_VARIABLE = "HF_TREE_CACHE_TILES"
TUNE_VARIABLE = "HF_TREE_CACHE_TUNE"
TUNER = "python -m hf_tree_cache.attention.tune"


def tiles_for(
    arch: str, itemsize: int, head_dim: int, *, shared_bytes: int | None = None
) -> TileSet:
    """The tiles that the user tuned, those of the table, or those of the nearest GPU.

    Args:
        itemsize: bytes of an element of K and V.
        head_dim: the larger head dim, padded to a power of two.
        shared_bytes: shared memory that one program can have, for a GPU that is not in the table.
    """
    key = (arch, itemsize, head_dim)
    return read_tuned().get(key) or TABLE.get(key) or _nearest(*key, shared_bytes)


def _nearest(arch: str, itemsize: int, head_dim: int, shared_bytes: int | None) -> TileSet:
    """The tiles of the GPU with the most shared memory that ``arch`` has too, of its vendor."""
    maker = "gfx" if arch.startswith("gfx") else "sm_"
    needed = {known: at.shared_block for known, at in LIMITS.items() if known.startswith(maker)}
    most = shared_bytes or 0
    fitting = [known for known in needed if needed[known] <= most]

    def likeness(known: str) -> tuple[int, int]:
        return needed[known], -abs(_number(known) - _number(arch))

    if fitting:
        return TABLE[max(fitting, key=likeness), itemsize, head_dim]
    least = min(needed.values())
    known = max((known for known in needed if needed[known] == least), key=likeness)
    tiles = TABLE[known, itemsize, head_dim]
    if not most:
        return tiles
    spare = {"kv_small": 16, "kv_large": 16, "stages_small": 2, "stages_large": 2}
    return TileSet(replace(tiles.mixed, **spare), replace(tiles.small, **spare))  # type: ignore[arg-type]


def _number(arch: str) -> int:
    digits = "".join(c for c in arch if c in "0123456789")
    return int(digits or 0)


def tuned_path() -> Path:
    """The user's file: `$HF_TREE_CACHE_TILES`, or tiles.json in the user's cache folder."""
    if chosen := os.environ.get(TILES_VARIABLE):
        return Path(chosen)
    home = os.environ.get("HF_TREE_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache" / "hf_tree_cache") / "tiles.json"


def read_tuned() -> Mapping[Key, TileSet]:
    """What the user tuned; nothing, and a warning, if the file is broken."""
    path = tuned_path()
    try:
        return _read(path, path.stat().st_mtime_ns)
    except OSError:
        return {}


@cache
def _read(path: Path, changed: int) -> Mapping[Key, TileSet]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        tuned = {}
        for name, entry in entries.items():
            arch, itemsize, head_dim = name.split("/")
            sets = [Tiles(**entry[kind]) for kind in ("mixed", "small")]
            for tiles in sets:
                if fault := tiles.find_fault():
                    raise ValueError(f"entry {name}: {fault}")
            tuned[arch, int(itemsize), int(head_dim)] = TileSet(*sets)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        warnings.warn(
            f"{path} is not a file of tuned tiles ({type(error).__name__}: {error}). It is ignored "
            f"and the built-in tiles are used. Delete it, or run {TUNER} again.",
            stacklevel=2,
        )
        return {}
    return tuned


def write_tuned(key: Key, tiles: TileSet, note: str) -> Path:
    """Add or replace one entry of the user's file; ``note`` says where it was measured."""
    path = tuned_path()
    # A broken file begins anew.
    entries = json.loads(path.read_text(encoding="utf-8")) if read_tuned() else {}
    entries["/".join(map(str, key))] = {"note": note, **asdict(tiles)}
    path.parent.mkdir(parents=True, exist_ok=True)
    # Others may read it at any time.
    with NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
        file.write(json.dumps(entries, indent=1) + "\n")
    os.replace(file.name, path)
    return path


@cache
def tune_once(key: Key, *arguments: str) -> None:
    """With HF_TREE_CACHE_TUNE=1, tune what nobody has measured, in a process of its own.

    So a candidate that fails cannot take this process's GPU context with it.

    Args:
        arguments: of the tuner, which say what to tune for.
    """
    if os.environ.get(TUNE_VARIABLE) != "1" or key[0] == "interpreter":
        return
    if key in MEASURED or key in read_tuned():
        return
    command = [sys.executable, "-m", "hf_tree_cache.attention.tune", "--quick", *arguments]
    done = subprocess.run(command, env={**os.environ, TUNE_VARIABLE: "0"}, check=False)
    if done.returncode:
        warnings.warn(
            f"{TUNE_VARIABLE}=1: the tuner failed with exit status {done.returncode}, see above. "
            f"The built-in tiles are used. To try again: {' '.join([TUNER, *arguments])}",
            stacklevel=2,
        )
