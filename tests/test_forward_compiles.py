"""Kernels of a decode step besides attention, compiled without a GPU: they fit, nothing spills."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from test_kernel_compiles import OVERLAPPING
from test_sampling_compiles import Kernel, check

from hf_tree_cache.attention.tiles import LIMITS
from hf_tree_cache.forward import linear, rotary, small
from hf_tree_cache.memory.scatter import Slots

NVIDIA = [arch for arch in LIMITS if arch.startswith("sm_")]
SHAPES = {
    # rows, widths of the outputs, inputs
    "Q, K and V of an 8B model": (16, (4096, 1024, 1024), 4096),
    "gate and up of a 0.5B model": (64, (4864, 4864), 896),
    "a head": (64, (128_256,), 4096),
    "down of an 8B model": (32, (4096,), 14_336),
    "down of a 9B model of GLM": (16, (4096,), 13_696),
    "gated, of an 8B model": (33, (14_336, 14_336), 4096),
}


@pytest.mark.parametrize(
    ("name", "arch"),
    [
        pytest.param(
            name,
            arch,
            marks=[] if arch in ("sm_86", "sm_90") or i % len(SHAPES) == j else [pytest.mark.slow],
        )
        for j, name in enumerate(SHAPES)
        for i, arch in enumerate(NVIDIA)
    ],
)
def test_few_rows_fit(
    name: str, arch: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    kernel, launched = linear.few_rows_kernel, Kernel()
    monkeypatch.setattr(linear, "few_rows_kernel", launched)
    room = min(linear.MOST_SHARED, LIMITS[arch].shared_block)
    monkeypatch.setattr(linear, "gpu_of", lambda device: linear.Gpu(132, room))
    monkeypatch.setattr(linear, "can_overlap", lambda device: arch in OVERLAPPING)
    rows, widths, size = SHAPES[name]
    bf16 = torch.bfloat16
    weights = [torch.empty(width, size, dtype=bf16) for width in widths]
    biases = [torch.empty(width, dtype=bf16) for width in widths if rows == 16]
    x = torch.empty(rows, 1, size, dtype=bf16)
    if name.startswith("gated"):
        activations = linear.ACTIVATIONS if arch == "sm_90" else linear.ACTIVATIONS[:1]
        launches = [partial(linear.few_rows_gated, x, *weights, each) for each in activations]
    else:
        launches = [partial(linear.few_rows_linear, x, weights, biases)]
    for launch in launches:
        launch()
        assert launched.options["STAGES"] >= 3
        check(arch, kernel, launched, tmp_path)


@pytest.mark.parametrize("arch", ["sm_90", "sm_80", "gfx942"])
def test_small_steps_fit(arch: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(small, "serves", lambda x: True)
    monkeypatch.setattr(small, "can_overlap", lambda device: arch in OVERLAPPING)
    kernel, launched = small.rms_norm_kernel, Kernel()
    monkeypatch.setattr(small, "rms_norm_kernel", launched)
    x = torch.empty(3, 1, small.MOST_SIZE, dtype=torch.bfloat16)
    small.rms_norm(x, torch.empty(small.MOST_SIZE, dtype=x.dtype), 1e-6)
    check(arch, kernel, launched, tmp_path)
    added = small.Sum(x, x, torch.empty_like(x))
    small.rms_norm(x, torch.empty(small.MOST_SIZE, dtype=x.dtype), 1e-6, added=added)
    assert launched.options["ADD"]
    check(arch, kernel, launched, tmp_path)
    weight = torch.empty(small.MOST_SIZE, dtype=x.dtype)
    added = small.Sum(x, x, torch.empty_like(x), small.make_norm(x, weight, 1e-6, 1.0))
    for norm in (None, small.make_norm(x, weight, 1e-6, 0.0)):
        added.write() if norm is None else norm.write(added)
        assert launched.options["FIRST"] and launched.options["LAST"] == (norm is not None)
        check(arch, kernel, launched, tmp_path)
        scaled = replace(added, factor=weight[:1])
        scaled.write() if norm is None else norm.write(scaled)
        assert launched.options["SCALED"]
        check(arch, kernel, launched, tmp_path)
    kernel, launched = small.gated_product_kernel, Kernel()
    monkeypatch.setattr(small, "gated_product_kernel", launched)
    for activation in linear.ACTIVATIONS:
        small.gated_product(x, x, activation)
        check(arch, kernel, launched, tmp_path)
        small.Activated(x, activation, torch.empty_like(x)).times(x)
        assert launched.options["KEPT"]
        check(arch, kernel, launched, tmp_path)


@pytest.mark.parametrize("arch", ["sm_90", "sm_80", "gfx942"])
def test_rotary_fits(arch: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for module in (rotary, small):
        monkeypatch.setattr(module, "serves", lambda x: True)
        monkeypatch.setattr(module, "can_overlap", lambda device: arch in OVERLAPPING)
    kernel, launched = rotary.rotary_kernel, Kernel()
    monkeypatch.setattr(rotary, "rotary_kernel", launched)
    bf16 = torch.bfloat16
    q, k = (torch.empty(3, heads, 1, 128, dtype=bf16) for heads in (64, 8))
    ints = torch.empty(4, 3, dtype=torch.int32)
    slots = Slots(*torch.empty(2, 9, 16, 8, 128, dtype=bf16), *ints, 16)

    def refused(*args: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        pytest.fail("not served")

    for turn, num_angles in (
        (rotary.HALVES, 128),
        (rotary.Turn(False, "pair"), 64),
        (rotary.Turn(True, "first", partial=True), 64),
    ):
        cos, sin = torch.empty(2, 3, 1, num_angles, dtype=bf16)
        rotary.make_rotary(refused, turn=turn)(q, k, cos, sin)
        check(arch, kernel, launched, tmp_path)
        rotary.make_rotary(refused, lambda rotation: rotation.write(k, slots), turn)(q, k, cos, sin)
        assert launched.options["STORE"]
        check(arch, kernel, launched, tmp_path)
        norms = [small.make_norm(x, x.new_empty(128), 1e-6, 1.0) for x in (q, k)]

        def behind(rotation: rotary.Rotation, norms: Sequence[small.Norm | None] = norms) -> None:
            fused = rotation.behind([norm for norm in norms if norm is not None])
            assert fused is not None
            fused.write(k, slots)

        normed = [norm.out for norm in norms if norm is not None]
        rotary.make_rotary(refused, behind, turn)(*normed, cos, sin)
        assert launched.options["NORMED"]
        check(arch, kernel, launched, tmp_path)
