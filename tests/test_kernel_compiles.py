"""Every kernel that would be launched, compiled without a GPU: it fits, and nothing spills."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_calls import Family, call_over, grow
from trees import ShadowTree

from hf_tree_cache.attention.plan import Window
from hf_tree_cache.attention.tiles import LIMITS, TILES_VARIABLE, Tiles

triton = pytest.importorskip("triton")
launch = pytest.importorskip("hf_tree_cache.attention.launch")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
NAMES = {BF16: "bf16", FP16: "fp16", FP32: "fp32", torch.float64: "fp64"}
NAMES |= {torch.int32: "i32", torch.int64: "i64"}
HEAD_DIMS = [(64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256), (512, 512)]
KINDS = {
    # what the list holds: SMALL, LARGE, MERGES
    "mixed": (True, True, True),
    "small": (True, False, False),
    "small with merges": (True, False, True),
    "deterministic": (False, True, True),
}
MANY_MERGES = "many merges"
FEATURES: dict[str, dict[str, Any]] = {
    "a sliding window": {"window": Window("sliding", 300)},
    "a chunked window": {"window": Window("chunked", 300)},
    "softcap": {"softcap": 30.0},
    "sinks": {"sinks": True},
    "window, softcap and sinks": {"window": Window("sliding", 300), "softcap": 9.0, "sinks": True},
    "group 1": {"group": 1},
    "group 7": {"group": 7},
    "blocks of 64": {"block_size": 64},
    "group 16": {"group": 16},
    "blocks of 4": {"block_size": 4},
    "3 new tokens": {"num_new": (3,)},
    MANY_MERGES: {},
}
OVERLAPPING = ("sm_90", "sm_100", "sm_120")
VERSION = tuple(map(int, triton.__version__.split(".")[:2]))
IS_TABLES_OWN = VERSION < (3, 7)
"""The table was made with Triton 3.6; later ones need more registers, above all for merges."""

MAX_STACK = 32 if IS_TABLES_OWN else 256
"""Bytes of a thread that may wait in local memory while a loop over K and V runs."""

SPILLING = {
    "sm_90 bf16 128 mixed group 1": (MAX_STACK, 1),
    "sm_90 bf16 128 mixed group 7": (264, 0),
}
"""Triton from 3.7 on: bytes of a thread, and instructions of such a loop that use them, at most."""

if VERSION < (3, 9):
    SPILLING["sm_90 bf16 128 mixed a sliding window"] = (MAX_STACK, 2)

PADDED_SPILLS = (384, 160) if VERSION == (3, 8) else (96, 40)
"""As much for float32 whose heads are padded: masks and halves of numbers take registers."""


@dataclass(frozen=True)
class Variant:
    """A launch on an architecture."""

    arch: str
    kind: str
    family: Family
    feature: str = ""

    def __str__(self) -> str:
        family = self.family
        dims = "/".join(map(str, dict.fromkeys(family.head_dims)))
        words = [self.arch, NAMES[family.dtype], dims, self.kind, self.feature]
        return " ".join(filter(None, words))


def make(
    arch: str, dtype: torch.dtype, dims: tuple[int, int], kind: str, feature: str = ""
) -> Variant:
    options = {"group": 4, "block_size": 16, **FEATURES.get(feature, {})}
    deterministic = kind == "deterministic"
    family = Family(
        dtype, dims, num_kv_heads=8, deterministic=deterministic, fixed=False, **options
    )
    return Variant(arch, kind, family, feature)


def matrix() -> Iterator[Variant]:
    """All architectures, dtypes, head dims and kinds; then each feature."""
    for arch in LIMITS:
        for dtype in (BF16, FP16, FP32):
            for dims in HEAD_DIMS if dtype != FP32 else HEAD_DIMS[:-1]:
                for kind in KINDS:
                    yield make(arch, dtype, dims, kind)
        for feature in FEATURES:
            for kind in KINDS:
                yield make(arch, BF16, (128, 128), kind, feature)


def sample() -> Iterator[Variant]:
    """Each architecture, dtype, head dim, kind and feature at least once."""
    dtypes, kinds = (BF16, FP16, FP32), list(KINDS)
    # The others' largest kernel comes below; sm_86 and sm_89 have the tiles of sm_120.
    for arch in ("sm_80", "sm_100", "gfx942"):
        yield make(arch, BF16, (128, 128), "mixed")
    for i, arch in enumerate(LIMITS):
        for j, dims in enumerate(HEAD_DIMS):
            if (i + j) % 5 == 1:
                dtype = BF16 if dims == (512, 512) else dtypes[(i + 2 * j) % 3]
                yield make(arch, dtype, dims, kinds[(i + j // 2) % 4])
    for i, feature in enumerate(FEATURES):
        yield make(list(LIMITS)[(2 * i + 3) % 7], BF16, (128, 128), kinds[i % 4], feature)


@dataclass(frozen=True)
class Facts:
    """What the compiler made of a variant.

    Attributes:
        stack: bytes of a thread in local memory.
        loop_spills: instructions in loops over K and V that use it.
        programs: that an SM holds at a time.
        async_copies: cp.async instructions of 16 bytes.
    """

    tiles: Tiles
    shared: int
    registers: int
    stack: int
    loop_spills: int
    programs: int
    async_copies: int = 0


def arguments_of(
    variant: Variant, patch: pytest.MonkeyPatch
) -> tuple[Tiles, list[Any], dict[str, Any]]:
    """What the product passes to the kernel."""
    family = variant.family
    shadow = ShadowTree(family.block_size)
    num_new = family.num_new[0]
    if variant.kind == "small":
        grown = grow(shadow, [40, 40], [num_new] * 2)
    elif variant.kind == "small with merges" and variant.feature == MANY_MERGES:
        grown = grow(shadow, [1_024], "0 0 0 0", [num_new] * 4)  # nothing is cut for one SM
    elif variant.kind == "small with merges":
        grown = grow(shadow, [2_048], [num_new])
    else:
        grown = grow(shadow, [1_024], " ".join("0" * 40), [num_new] * 40)
    # What the user of this machine tuned is another matter.
    patch.setenv(TILES_VARIABLE, os.devnull + "/none")
    patch.setattr(launch, "_arch", lambda device: variant.arch)
    num_sms = 1 if variant.feature == MANY_MERGES else 132
    patch.setattr(launch, "_num_sms", lambda device: num_sms)
    workspace = family.workspace("cpu")
    workspace.overlap = variant.arch in OVERLAPPING
    call = call_over(family, grown, "cpu")
    workspace.prepare(call.plan, call.storage)
    got: list[Any] = []

    class Kernel:
        def __getitem__(self, grid: tuple[int]) -> Any:
            return lambda *args, **options: got.extend([list(args), options])

    patch.setattr(launch, "tree_attention_kernel", Kernel())
    call.launch(workspace)
    return workspace.tiles, *got


def compile_for(variant: Variant, patch: pytest.MonkeyPatch, folder: Path) -> Facts:
    kernel = launch.tree_attention_kernel
    tiles, args, options = arguments_of(variant, patch)
    flags = tuple(options[name] for name in ("SMALL", "LARGE", "MERGES"))
    assert flags == KINDS[variant.kind], "not the kernel that was meant"
    source = source_of(kernel, args, options)
    arch = variant.arch
    if arch.startswith("gfx"):
        compiled = triton.compile(source, target=GPUTarget("hip", arch, 64), options=options)
        return read_amd(arch, tiles, compiled)
    compiled = triton.compile(source, target=GPUTarget("cuda", int(arch[3:]), 32), options=options)
    return read_nvidia(arch, tiles, compiled, folder / "kernel.cubin")


def source_of(kernel: Any, args: list[Any], options: dict[str, Any]) -> ASTSource:
    """What a launch would compile; constants are taken out of ``options``."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes = {}
    for i, parameter in enumerate(kernel.params):
        name = parameter.name
        value = options.pop(name) if parameter.is_constexpr else args[i]
        special = isinstance(value, int) and not parameter.do_not_specialize
        if parameter.is_constexpr or (special and value == 1):
            signature[name], constants[i,] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = f"*{NAMES[value.dtype]}"
            if value.data_ptr() % 16 == 0:
                attributes[i,] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if special and value % 16 == 0:
                attributes[i,] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


def read_amd(arch: str, tiles: Tiles, compiled: Any) -> Facts:
    text, shared = compiled.asm["amdgcn"], compiled.metadata.shared

    def field(name: str) -> int:
        (value,) = re.findall(rf"\.{name}:\s+(\d+)", text)
        return int(value)

    registers = field("vgpr_count")
    # Scalars spill to lanes of vector registers, without a way to memory.
    stack = field("private_segment_fixed_size") + 4 * field("vgpr_spill_count")
    programs = LIMITS[arch].resident(registers, shared, tiles.num_warps)
    return Facts(tiles, shared, registers, stack, 0, programs)


def read_nvidia(arch: str, tiles: Tiles, compiled: Any, path: Path) -> Facts:
    path.write_bytes(compiled.asm["cubin"])
    tools = triton.knobs.nvidia
    usage = run(tools.cuobjdump.path, "-res-usage", path)
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())  # type: ignore[union-attr]
    code = run(tools.nvdisasm.path, "-c", path).splitlines()
    shared = compiled.metadata.shared
    programs = LIMITS[arch].resident(registers, shared, tiles.num_warps)
    copies = sum("LDGSTS.E.BYPASS" in line and ".128" in line for line in code)
    return Facts(tiles, shared, registers, stack, spills_in_loops(code), programs, copies)


def spills_in_loops(code: list[str]) -> int:
    """Instructions that use local memory between a backward branch and its label, near K or V."""
    labels = {line.rstrip(":"): i for i, line in enumerate(code) if line.startswith(".L_x_")}
    inside: set[int] = set()
    for i, line in enumerate(code):
        target = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", line)
        if target is None or labels[target[1]] > i:
            continue
        loop = range(labels[target[1]], i)
        if any("LDGSTS" in code[j] for j in loop):
            inside.update(loop)
    assert inside, "no loop that loads K and V was found"
    return sum(bool(re.search(r"\b(LDL|STL)\b", code[j])) for j in inside)


def run(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def check(variant: Variant, facts: Facts) -> None:
    limits, tiles = LIMITS[variant.arch], facts.tiles
    known = {} if IS_TABLES_OWN else SPILLING
    most_stack, most_spills = known.get(str(variant), (MAX_STACK, 0))
    family = variant.family
    if family.dtype == FP32 and family.head_dims[0] in (80, 96):
        most_stack, most_spills = max(most_stack, PADDED_SPILLS[0]), PADDED_SPILLS[1]
    assert facts.loop_spills <= most_spills
    assert facts.stack <= most_stack
    # Shared memory has room for all programs, registers at least where they were counted.
    registers = facts.registers if IS_TABLES_OWN and not variant.feature else 1
    resident = limits.resident(registers, facts.shared, tiles.num_warps)
    assert resident >= tiles.programs_per_sm
    if variant.arch.startswith("sm_"):
        assert facts.async_copies
        assert facts.shared >= staged_bytes(variant, tiles)


def staged_bytes(variant: Variant, tiles: Tiles) -> int:
    """Of K and V that are on their way while a tile is worked on: all stages but its own."""
    family = variant.family
    row = sum(1 << (dim - 1).bit_length() for dim in family.head_dims) * family.dtype.itemsize
    _, large, _ = KINDS[variant.kind]
    tokens = (tiles.stages_large - 1) * tiles.kv_large if large else 0
    if variant.kind != "deterministic":
        tokens = max(tokens, (tiles.stages_small - 1) * tiles.kv_small)
    return tokens * row


SAMPLE = list(sample())
REST = [variant for variant in matrix() if variant not in SAMPLE]


@pytest.mark.parametrize("variant", SAMPLE, ids=str)
def test_a_kernel_fits_and_its_loops_do_not_spill(
    variant: Variant, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    check(variant, compile_for(variant, monkeypatch, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("variant", REST, ids=str)
def test_every_other_kernel_fits_and_its_loops_do_not_spill(
    variant: Variant, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    check(variant, compile_for(variant, monkeypatch, tmp_path))


def test_on_an_h200_three_programs_of_a_mixed_list_share_an_sm(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    variant = make("sm_90", BF16, (128, 128), "mixed")
    facts = compile_for(variant, monkeypatch, tmp_path)
    # All loads of K and V are cp.async: two stages of 32 KB each for the small class, and queries.
    assert (facts.programs, facts.shared, facts.async_copies) == (3, 71_168, 96)


def test_float32_takes_the_products_that_all_architectures_have(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With Hopper's own, of 64 rows, a kernel in three products gave wrong results on an H200."""
    texts: list[str] = []
    known = read_nvidia

    def read(arch: str, tiles: Tiles, compiled: Any, path: Path) -> Facts:
        texts.append(compiled.asm["ptx"])
        return known(arch, tiles, compiled, path)

    monkeypatch.setattr(sys.modules[__name__], "read_nvidia", read)
    compile_for(make("sm_90", FP32, (128, 128), "mixed"), monkeypatch, tmp_path)
    (text,) = texts
    assert "mma.sync.aligned.m16n8k8.row.col.f32.tf32" in text and "wgmma" not in text
