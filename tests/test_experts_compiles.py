"""The kernels of sparse experts, compiled without a GPU: they fit, nothing spills."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from test_kernel_compiles import OVERLAPPING
from test_sampling_compiles import Kernel, check

from hf_tree_cache.attention.tiles import LIMITS
from hf_tree_cache.forward import experts
from hf_tree_cache.forward.linear import MOST_SHARED, Gpu

NAMES = ("route_kernel", "list_items_kernel", "experts_kernel", "add_up_kernel")
SHAPES = {
    # rows, experts, width, inner size, chosen of each row
    "30B": (64, 128, 2048, 768, 8),
    "a few large ones": (64, 8, 4096, 14_336, 2),
}


@pytest.mark.parametrize(
    ("name", "arch"),
    [
        ("30B", "sm_90"),
        ("a few large ones", "sm_90"),
        ("30B", "sm_86"),
        pytest.param("30B", "sm_80", marks=pytest.mark.slow),
        pytest.param("a few large ones", "sm_86", marks=pytest.mark.slow),
        pytest.param("30B", "sm_89", marks=pytest.mark.slow),
        ("30B", "sm_100"),
        pytest.param("a few large ones", "sm_100", marks=pytest.mark.slow),
        pytest.param("30B", "sm_120", marks=pytest.mark.slow),
    ],
)
def test_all_kernels_fit(
    name: str, arch: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    launches: list[tuple[Any, Kernel]] = []

    class Launcher:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            launches.append((self.kernel, Kernel()))
            return launches[-1][1]._launch

    for each in NAMES:
        monkeypatch.setattr(experts, each, Launcher(getattr(experts, each)))
    room = min(MOST_SHARED, LIMITS[arch].shared_block)
    monkeypatch.setattr(experts, "gpu_of", lambda device: Gpu(132, room))
    monkeypatch.setattr(experts, "can_overlap", lambda device: arch in OVERLAPPING)
    rows, num_experts, width, size, top = SHAPES[name]
    bf16 = torch.bfloat16
    experts.route(torch.empty(rows, num_experts, dtype=bf16), top, True, False)
    experts.few_rows_experts(
        torch.empty(rows, width, dtype=bf16),
        torch.empty(num_experts, 2 * size, width, dtype=bf16),
        torch.empty(num_experts, width, size, dtype=bf16),
        torch.empty(rows, top, dtype=torch.int64),
        torch.empty(rows, top, dtype=bf16),
    )
    assert [launched.options.get("GATED") for _, launched in launches] == [
        None,
        None,
        True,
        False,
        None,
    ]
    for kernel, launched in launches:
        check(arch, kernel, launched, tmp_path)
