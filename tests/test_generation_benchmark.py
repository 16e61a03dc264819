"""The benchmark of generation, tried with a tiny model on a CPU; its times need a GPU."""

from __future__ import annotations

import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import modeling_flash_attention_utils as flash_utils

pytest.importorskip("triton")

import capacity
import generate
import models
import prompts
import shapes
import steps
import ways

from hf_tree_cache import TreeCache, enable_tree_attention

# Other people's ways to generate warn of what they please.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def model() -> Any:
    torch.set_num_threads(1)
    return shapes.build("tiny", "cuda" if torch.cuda.is_available() else "cpu")


def test_a_step_is_the_time_from_a_quarter_of_the_tokens_to_the_last() -> None:
    timeline = steps.Timeline([1.0, 2.0, 2.1, 2.2, 2.3, 2.4, 2.5, 2.6], 3.0)
    assert timeline.ms_per_step == pytest.approx(100)


@pytest.mark.core
def test_each_token_is_marked_and_each_wait_seen(model: Any) -> None:
    work = ways.Workload(40, 3, 12)
    with enable_tree_attention(model):
        for run in (ways.with_tree, ways.with_tree_generate, ways.with_runner):
            with steps.watched() as watch:
                timeline = run(model, work, 12)
            assert len(timeline.tokens) == 12
            assert timeline.tokens == sorted(timeline.tokens)
            assert timeline.tokens[0] > 0 and timeline.tokens[-1] <= timeline.total
            profile = watch.profile()
            if profile or run is not ways.with_tree:
                assert len(watch.waits) == 12
                assert profile["host"] + profile["waiting"] == pytest.approx(profile["step"])


def test_watching_puts_everything_back() -> None:
    before = [steps.loop.Arriving.read, steps.DecodeGraphs.run, torch.cuda.CUDAGraph.replay]
    with pytest.raises(ZeroDivisionError), steps.watched():
        assert steps.DecodeGraphs.run is not before[1]
        raise ZeroDivisionError
    after = [steps.loop.Arriving.read, steps.DecodeGraphs.run, torch.cuda.CUDAGraph.replay]
    assert after == before


@pytest.mark.core
def test_continuous_batching_returns_every_branch_and_leaves_the_model(model: Any) -> None:
    model.set_attn_implementation("sdpa")
    timeline = ways.with_batching(model, ways.Workload(300, 5, 9), 9, graphs=False, ahead=False)
    assert len(timeline.tokens) == 9
    assert timeline.notes["attention"].removeprefix("paged|") == "sdpa"
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.core
@pytest.mark.skipif(torch.cuda.is_available(), reason="stands in for a kernel")
def test_continuous_batching_takes_flash_attention_where_it_is_installed(
    model: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    longest = []

    def flash_attn_varlen_func(
        q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: int,
        max_seqlen_k: int, softmax_scale: Any = None, causal: bool = False,
        window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
    ) -> Any:  # fmt: skip
        longest.append(int(max_seqlen_k))
        assert causal and tuple(window_size) == (-1, -1)
        ends_q, ends_k = cu_seqlens_q, cu_seqlens_k
        out = torch.empty_like(q)
        for i in range(len(ends_q) - 1):
            ours, theirs = (slice(int(ends[i]), int(ends[i + 1])) for ends in (ends_q, ends_k))
            new, old = ours.stop - ours.start, theirs.stop - theirs.start
            out[ours] = torch.nn.functional.scaled_dot_product_attention(
                *(x.transpose(0, 1) for x in (q[ours], k[theirs], v[theirs])),
                attn_mask=torch.ones(new, old, dtype=torch.bool).tril(old - new),
                scale=softmax_scale,
                enable_gqa=True,
            ).transpose(0, 1)
        return out

    flash = ModuleType("fa3_fwd_interface")
    flash.__spec__ = ModuleSpec("fa3_fwd_interface", None)
    flash.flash_attn_varlen_func = flash_attn_varlen_func
    flash.flash_attn_func = flash.flash_attn_with_kvcache = flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "fa3_fwd_interface", flash)
    work = ways.Workload(300, 5, 9)
    timeline = ways.with_batching(model, work, 9, graphs=False, ahead=False)
    assert capsys.readouterr().out == ""
    assert timeline.notes["attention"].removeprefix("paged|") == "flash_attention_3"
    assert max(longest) == 308
    assert "flash_attn_interface" not in sys.modules

    del flash.flash_attn_varlen_func
    monkeypatch.setattr(flash_utils, "_loaded_implementation", None)
    timeline = ways.with_batching(model, work, 9, graphs=False, ahead=False)
    assert "flash_attention_3: " in capsys.readouterr().out
    assert timeline.notes["attention"].removeprefix("paged|") == "sdpa"


def test_different_prompts_are_stored_without_padding(model: Any) -> None:
    ours, dense = prompts.different_prompts(model, "tiny")
    assert ours["stored"] == ours["expected"] == 5 + 17 + 40 + 6 * 8
    assert ours["dense_reads"] == {}
    assert "left_out" not in dense


def test_the_most_branches_are_found_below_a_bound_and_the_cache_stays_sound(model: Any) -> None:
    blocks = 5 + 2 * 20  # of the prompt, and two for each of 20 branches
    found = capacity.most_branches(
        model,
        ways.Workload(70, 4, 8, chunk=32),
        seconds=60,
        make_cache=lambda: TreeCache(block_size=16, max_blocks=blocks),
    )
    assert 20 <= found["tree_rows"] < found["too_many"] <= blocks
    failures = [one for one in found["tries"] if "failed" in one]
    assert failures and all("OutOfBlocks" in one["failed"] for one in failures)
    assert all(one["usable_after"] is True for one in failures)


def test_running_out_of_memory_in_a_forward_leaves_the_cache_sound(model: Any) -> None:
    def fail(module: Any, arguments: tuple[torch.Tensor, ...]) -> None:
        if len(arguments[0]) > 9:
            raise torch.OutOfMemoryError("CUDA out of memory (not really)")

    hook = model.model.layers[1].mlp.register_forward_pre_hook(fail)
    try:
        found = capacity.most_branches(model, ways.Workload(40, 4, 6), seconds=60)
    finally:
        hook.remove()
    assert (found["tree_rows"], found["too_many"]) == (9, 10)
    failures = [one for one in found["tries"] if "failed" in one]
    assert failures and all(one["usable_after"] is True for one in failures)


def test_the_search_for_the_most_branches_ends_with_its_time(model: Any) -> None:
    found = capacity.most_branches(model, ways.Workload(40, 2, 4), seconds=0)
    assert [one["rows"] for one in found["tries"]] == [2]
    assert found["too_many"] is None


def test_the_whole_program_leaves_its_results_behind(tmp_path: Path) -> None:
    only = ["tree_generate", "prefill", "stock generate, static cache, compiled"]
    generate.main(["--tiny", "--out", str(tmp_path), "--only", *only])
    (path,) = tmp_path.glob("generate_*.json")
    result = json.loads(path.read_text(encoding="utf-8"))
    assert [row["method"] for row in result["rows"]] == [only[0]] * 3 + [only[2]] * 2
    assert [row for row in result["rows"] if "left_out" in row] == []
    assert all(row["ms_per_step"] > 0 for row in result["rows"])
    assert [row for row in result["prefill"] if "seconds" not in row] == []
    generate.main(["--tiny", "--out", str(tmp_path), "--only", only[0], "--seconds", "0"])
    cut = json.loads(path.read_text(encoding="utf-8"))
    assert [row["left_out"] for row in cut["rows"]] == ["time"] * 3


def test_earlier_results_are_kept_for_the_same_card_only(tmp_path: Path) -> None:
    where = {"gpu": "NVIDIA H100 80GB HBM3", "commit": "a"}
    work = {"shape": "8B", "method": "m", "prompt": 1, "rows": 2, "churn": False}
    first = generate.Results(tmp_path, where, 3.0)
    first.put(work | {"ms_per_step": 1.0})
    first.put(work | {"rows": 3, "ms_per_step": 1.0})
    path = tmp_path / "generate_h100.json"
    assert first.path == path

    again = generate.Results(tmp_path, where | {"commit": "b"}, 3.1, keep=path)
    again.put(work | {"ms_per_step": 2.0})
    again.put(work | {"rows": 3, "left_out": "time"})
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert {(row["rows"], row["ms_per_step"], row["commit"]) for row in rows} == {
        (2, 2.0, "b"),
        (3, 1.0, "a"),
    }
    other = generate.Results(tmp_path, {"gpu": "NVIDIA H200", "commit": "b"}, 4.5, keep=path)
    assert other.data["rows"] == []
    assert other.path == tmp_path / "generate_h200.json"


def test_experts_are_counted_that_the_rows_of_a_step_hit(model: Any) -> None:
    work = ways.Workload(9, 3, 8)
    assert generate.share_of_experts(model, work) == 1.0
    sparse = models.build("qwen3_moe", num_experts=64)
    share = generate.share_of_experts(sparse, work)
    assert 2 / 64 <= share <= 6 / 64
    assert shapes.bytes_read(sparse, share) < shapes.bytes_read(sparse)


def test_order_names_every_way_and_section_once() -> None:
    assert sorted(generate.ORDER) == sorted([*ways.WAYS, *generate.SECTIONS])
    assert set(generate.WORKLOADS) == set(shapes.SHAPES)
    assert set(capacity.LARGEST) == set(prompts.PROMPTS)
