"""What the GPU benchmark asks for, checked without a GPU; its times need one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import cases
import kernel
import latent_attention
import latent_tables
import linear
import linear_tables
import workloads
from test_kernel import run_script
from torch.nn import functional as F

from hf_tree_cache.env import COMMIT_VARIABLE, environment

FIGURES = {
    # megabytes stored, megabytes that rows read one by one, GFLOP with 32 heads
    "W1_16": (25, 148, 0.59),
    "W1_64": (75, 591, 2.37),
    "W1_256": (277, 2366, 9.46),
    "W2": (201, 4362, 17.45),
    "W3": (134, 1544, 6.17),
    "W4": (46, 696, 2.79),
    "W5": (1074, 1074, 4.29),
}
LIMITS = {"read_tb_per_s": 4.63, "matmul_tflops": 780.0}


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "DEVICE", torch.device("cpu"))


def small(case: cases.Case) -> cases.Case:
    return replace(case, num_q_heads=2, num_kv_heads=1, head_dim=8, dtype="float32")


@pytest.mark.parametrize("name", FIGURES)
def test_workloads_have_the_bytes_and_products_they_are_known_by(name: str) -> None:
    case = cases.Case(name)
    tree = case.build()
    visible = cases.Visible.of(tree, 1, None)
    slot_bytes = case.spec.block_bytes(1)
    assert visible.unique * slot_bytes == workloads.unique_bytes(tree, case.spec)
    flop = 4 * case.num_q_heads * case.head_dim * visible.pairs
    shown = (round(visible.unique * slot_bytes / 1e6), round(visible.logical * slot_bytes / 1e6))
    assert (*shown, round(flop / 1e9, 2)) == FIGURES[name]


@pytest.mark.parametrize("num_new, window", [(1, None), (1, 300), (4, None), (3, 7)])
def test_visible_tokens_are_those_of_each_row_together(num_new: int, window: int | None) -> None:
    case = cases.Case("W4", num_new=num_new, window=window)
    tree = case.build()
    slots, pairs, logical = set(), 0, 0
    for branch in tree.rows:
        table, length = tree.block_table(branch), tree.length(branch)
        seen = [
            range(max(0, position + 1 - window) if window else 0, position + 1)
            for position in range(length - num_new, length)
        ]
        pairs += sum(map(len, seen))
        logical += length - seen[0].start
        slots |= {(table[i // 16], i % 16) for i in range(seen[0].start, length)}
    visible = cases.Visible.of(tree, num_new, case.look_back)
    assert (visible.unique, visible.logical, visible.pairs) == (len(slots), logical, pairs)
    assert set(visible.blocks) == {block for block, _ in slots}


@pytest.mark.parametrize("name", FIGURES)
def test_peers_get_levels_that_add_up_to_each_row(name: str, on_cpu: None) -> None:
    case = small(cases.Case(name))
    step = cases.Step(case, cases.Data.of(case, num_layers=1))
    step.problem().check()


def test_the_exact_results_are_those_of_the_reference(on_cpu: None) -> None:
    from hf_tree_cache.attention.reference import tree_attention_reference

    case = replace(small(cases.Case("W1_16")), num_new=3, window=700)
    step = cases.Step(case, cases.Data.of(case, num_layers=1))
    out, lse = step.exact(0)
    want, want_lse = tree_attention_reference(
        step.q[0], step.data.storage, 0, step.plan, scale=case.scale, window=case.look_back
    )
    torch.testing.assert_close(out.transpose(1, 2).float(), want)
    torch.testing.assert_close(lse.transpose(1, 2).float(), want_lse)


def test_names_are_unique_and_only_main_cases_have_targets() -> None:
    every = [*cases.MAIN_CASES, *cases.OTHER_CASES]
    assert len({case.name for case in every}) == len(every)
    assert [case for case in every if case.is_main] == cases.MAIN_CASES
    assert {case.workload for case in kernel.chosen_cases("W2,W5")} == {"W2", "W5"}
    with pytest.raises(ValueError, match="W9; the workloads are W1_16"):
        kernel.chosen_cases("W2,W9")


def test_results_survive_from_one_run_to_the_next(tmp_path: Path) -> None:
    path = tmp_path / "results" / "kernel.json"
    first = kernel.Results(path, {"ceilings": LIMITS}, keep=False)
    first.put({"name": "W2, 32/8 heads", "ok": True})
    first.put({"name": "W1_16, 32/8 heads", "ok": False})
    assert list(kernel.Results(path, {}, keep=True).rows) == ["W1_16, 32/8 heads", "W2, 32/8 heads"]
    assert kernel.Results(path, {}, keep=False).rows == {}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert kernel.main([]) == 2
    assert "sees no CUDA GPU" in capsys.readouterr().err


def test_a_copy_without_history_names_the_commit_that_it_was_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(COMMIT_VARIABLE, "0123abc")
    assert environment()["commit"] == "0123abc"


def test_all_ways_over_latents_are_the_same_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        workloads.WORKLOADS, "small", lambda tree: workloads.prompt_with_branches(tree, 700, 3, 70)
    )
    case = latent_attention.Case.of("small", 2, "cpu", num_layers=2)
    assert case.unique_bytes() == (700 + 3 * 70) * 2 * (512 + 64)
    ways = {
        "absorbed": case.ours(True),
        "absorbed, torch": case.ours(True, "torch"),
        "expanded once": case.ours(False),
        "dense": case.dense(),
        "DynamicCache": case.dynamic(),
    }
    assert set(ways) == set(latent_attention.TOLERANCE)
    for layer in range(2):
        want = case.exact(layer)
        for way, run in ways.items():
            error = latent_attention.error_of(run(layer), want)
            assert error < latent_attention.TOLERANCE[way], (way, error)
    assert latent_attention.error_of(ways["absorbed"](0), want) > 0.1  # layers differ


def test_the_table_of_latents_says_what_failed() -> None:
    row = {"model": "m", "tree": "W2", "unique_bytes": 2e6, "read_us": 1.0, "floor_us": 2.5}
    row["ways"] = {"ours": {"us": 1234.4, "host_us": 56.0}, "dense": {"failed": "does not fit"}}
    limits = {"read_tb_per_s": 3.0, "matmul_tflops": 700.0}
    result = {"rows": [row], "ceilings": limits, "environment": {"torch": "2"}}
    last = latent_tables.docs_text(result).splitlines()[-1]
    assert last == "| m | W2 | 2 | 1.0 | 2.5 | 1,234 (56) | does not fit |"


def test_linear_layers_weigh_what_they_are_known_by() -> None:
    layers = {each.name: each for each in linear.Layer.of("8B")}
    assert {name: each.bytes(0, 2) for name, each in layers.items()} == {
        "qkv": 2 * 6_144 * 4_096,
        "o": 2 * 4_096 * 4_096,
        "gate_up": 2 * 28_672 * 4_096,
        "gated": 2 * 28_672 * 4_096,
        "down": 2 * 4_096 * 14_336,
        "head": 2 * 128_256 * 4_096,
    }
    assert [each.count for each in layers.values()] == [32, 32, 32, 32, 32, 1]
    assert layers["gated"].bytes(1, 2) == 2 * (28_672 * 4_096 + 4_096 + 14_336)
    qkv, *others = linear.Layer.of("32B")
    assert qkv.widths == (5_120, 1_024, 1_024) and qkv.has_bias
    assert not any(each.has_bias for each in others)
    assert qkv.bytes(3, 2) == 2 * (7_168 * 5_121 + 3 * (5_120 + 7_168))


def test_linear_layers_are_measured_with_the_kernel_in_the_interpreter(tmp_path: Path) -> None:
    options = ["--tiny", "--only", "qkv", "down", "--rows", "1", "5", "--out", str(tmp_path)]
    found = run_script("../benchmarks/linear.py", *options, timeout=120, TRITON_INTERPRET="1")
    assert [(row["layer"], row["rows"]) for row in found["rows"]] == [
        ("qkv", 1), ("qkv", 5), ("down", 1), ("down", 5)
    ]  # fmt: skip
    for row in found["rows"]:
        assert 0 < row["error"] < 1e-6 and row["ours"]["us"] > row["ours"]["p20"] > 0
        assert row["copies"] == linear.LEAST_COPIES
    (path,) = tmp_path.glob("linear_*.json")
    assert len(json.loads(path.read_text(encoding="utf-8"))["rows"]) == 4


@pytest.mark.parametrize("seconds", [60.0, 0.0], ids=["a wrong kernel", "no time"])
def test_what_is_not_measured_has_no_times(
    seconds: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def off(x: torch.Tensor, weights: list[torch.Tensor], biases: list[torch.Tensor]) -> Any:
        return F.linear(x, 1.001 * torch.cat(weights), torch.cat(biases) if biases else None)

    monkeypatch.setattr(linear.linear, "few_rows_linear", off)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    options = ["--tiny", "--only", "o", "--rows", "2", "--seconds", str(seconds)]
    assert linear.main(options) == (1 if seconds else 0)
    (row,) = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert row["left_out"].startswith("wrong: 1.0e-03" if seconds else "no time left")
    assert "ours" not in row


def test_the_table_of_linear_layers_says_where_we_lose_and_what_is_missing() -> None:
    def row(layer: str, ours: float, count: int) -> dict[str, Any]:
        times = {"ours": {"us": ours}, "torch": {"us": 20.0}}
        work = {"shape": "8B", "layer": layer, "rows": 16, "count": count, "floor_us": 10.0}
        return work | times

    rows = [row(name, 16.0, 32) for name in ("qkv", "o", "gate_up", "gated")]
    rows.append(row("head", 25.0, 1))
    left_out = {"shape": "8B", "layer": "down", "rows": 16, "left_out": "no time left"}
    where = {"gpu": "NVIDIA H200", "gpu_driver": "580", "torch": "2", "triton": "3", "commit": "c"}
    result = {"rows": rows, "environment": where, "linear_read_tb_s": 4.5}
    text = linear_tables.docs_text([result | {"rows": [*rows, left_out]}])
    ours = "**16.0** (1.25 ×)"
    lost = "**25.0** (**we lose: 1.25 × longer**)"
    assert (
        f"| 8B | 16 | ours | {ours} | {ours} | {ours} | {ours} | no time left | {lost} |  |" in text
    )
    text = linear_tables.docs_text([result | {"rows": [*rows, row("down", 16.0, 32)]}])
    assert text.splitlines()[-3].endswith("| 10.0 | 1.29 |")
    assert text.splitlines()[-1].endswith(f"| {lost} | 2.07 |")
