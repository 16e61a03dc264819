"""The kernels of sampling as they would be launched, compiled without a GPU: nothing spills."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from draws import SAMPLINGS
from test_kernel_compiles import run, source_of

from hf_tree_cache.attention.tiles import LIMITS

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402

from hf_tree_cache.generation import draw_launch, uncertainty_kernel  # noqa: E402

VOCABULARY = 128_256
WITH_ROOM = ("sm_80", "sm_90", "sm_100")
CASES = [
    ("sm_90", torch.bfloat16, "as it is", False),
    ("sm_90", torch.float32, "all", True),
    ("sm_80", torch.float16, "likeliest", True),
    ("sm_86", torch.float32, "top-p", False),
    ("gfx942", torch.bfloat16, "top-k and top-p", False),
]


class Kernel:
    """Keeps what a kernel would be launched with."""

    def __init__(self) -> None:
        self.args: list[Any] = []
        self.options: dict[str, Any] = {}

    def __getitem__(self, grid: tuple[int]) -> Any:
        return self._launch

    def _launch(self, *args: Any, **options: Any) -> None:
        self.args, self.options = list(args), options


def check(arch: str, kernel: Any, launched: Kernel, folder: Path) -> None:
    source = source_of(kernel, launched.args, launched.options)
    num_warps = launched.options["num_warps"]
    # Its default changes with Triton 3.10, of which 3.9 warns.
    options = {**launched.options, "enable_fp_fusion": True}
    if arch.startswith("gfx"):
        target = GPUTarget("hip", arch, 64)
        compiled = triton.compile(source, target=target, options=options)
        text = compiled.asm["amdgcn"]
        (registers,) = re.findall(r"\.vgpr_count:\s+(\d+)", text)
        stack = re.findall(r"\.vgpr_spill_count:\s+(\d+)", text)
    else:
        target = GPUTarget("cuda", int(arch[3:]), 32)
        compiled = triton.compile(source, target=target, options=options)
        path = folder / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        usage = run(triton.knobs.nvidia.cuobjdump.path, "-res-usage", path)
        registers, *stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()  # type: ignore[union-attr]
    assert max(map(int, stack)) <= 32
    assert LIMITS[arch].resident(int(registers), compiled.metadata.shared, num_warps) >= 1


@pytest.mark.parametrize("arch, dtype, name, ranked", CASES, ids=lambda value: str(value))
def test_a_drawing_kernel_fits(
    arch: str,
    dtype: torch.dtype,
    name: str,
    ranked: bool,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    kernel, launched = draw_launch.draw_kernel, Kernel()
    monkeypatch.setattr(draw_launch, "draw_kernel", launched)
    monkeypatch.setattr(draw_launch, "has_room", lambda device: arch in WITH_ROOM)
    logits, options = torch.empty(2, VOCABULARY, dtype=dtype), {}
    if name in SAMPLINGS:
        names = ("temperature", "top_k", "top_p", "min_p")
        options = {each: getattr(SAMPLINGS[name], each) for each in names}
    noise = torch.empty(logits.shape) if options else None
    places = [0, 0] if ranked else None
    draw_launch.draw(logits, noise, leaders=places, ranks=places, **options)
    check(arch, kernel, launched, tmp_path)


@pytest.mark.parametrize("arch, dtype", [("sm_90", torch.bfloat16), ("gfx942", torch.float32)])
def test_the_kernel_of_uncertainty_fits(
    arch: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    kernel, launched = uncertainty_kernel.uncertainty_kernel, Kernel()
    monkeypatch.setattr(uncertainty_kernel, "uncertainty_kernel", launched)
    uncertainty_kernel.measure(torch.empty(2, VOCABULARY, dtype=dtype))
    check(arch, kernel, launched, tmp_path)
