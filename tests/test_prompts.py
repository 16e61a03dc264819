"""First forwards: no mask becomes a tensor that nobody needs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import build, prompts
from transformers import DynamicCache

from hf_tree_cache import TreeCache, enable_tree_attention
from hf_tree_cache.integration.handles import TreeMask


def last_logits(model, cache, **inputs):
    with torch.no_grad():
        return model(**inputs, past_key_values=cache, logits_to_keep=1).logits


@pytest.fixture
def refuses_masks(monkeypatch):
    def refused(mask):
        raise AssertionError(f"{mask} became a tensor")

    monkeypatch.setattr(TreeMask, "dense", refused)


@pytest.mark.core
@pytest.mark.parametrize("options", [{}, {"sliding_window": 45}], ids=["", "window"])
def test_a_prompt_without_padding_needs_no_mask(options, refuses_masks):
    model = build("mistral", **{"sliding_window": None, **options})
    inputs = prompts("mistral", num_rows=1)
    assert inputs["input_ids"].shape[1] == 45 and inputs["attention_mask"].all()
    model.set_attn_implementation("sdpa")
    expected = last_logits(model, DynamicCache(config=model.config), **inputs)
    with enable_tree_attention(model):
        got = last_logits(model, TreeCache(poison=True), **inputs)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("why", ["padding", "window"])
def test_a_prompt_with_more_to_hide_has_its_mask(why, refuses_masks):
    model = build("mistral", sliding_window=44 if why == "window" else None)
    inputs = prompts("mistral", num_rows=1 if why == "window" else 2)
    with enable_tree_attention(model), pytest.raises(AssertionError, match="became a tensor"):
        last_logits(model, TreeCache(), **inputs)


@pytest.mark.skipif(sys.platform != "linux", reason="needs Triton")
@pytest.mark.timeout(300)
def test_prompts_in_the_interpreted_kernel():
    script = Path(__file__).with_name("interpreted_prompts.py")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-W", "ignore", str(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("what", ["plain", "padded", "window", "sinks", "softcap"])
def test_a_long_prompt_takes_no_memory_for_a_mask(what, dtype):
    length, rows = 12_288, 2 if what == "padded" else 1
    name = {"window": "mistral", "sinks": "gpt_oss", "softcap": "gemma2"}.get(what, "llama")
    model = build(name, dtype, max_position_embeddings=length).cuda()
    ids = torch.arange(rows * length, device="cuda").view(rows, -1) * 7 % 90 + 3
    mask = torch.ones_like(ids)
    if rows == 2:
        mask[1, : length // 3] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    with enable_tree_attention(model):
        last_logits(model, TreeCache(), input_ids=ids[:, :64], attention_mask=mask[:, :64] | 1)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        got = last_logits(model, TreeCache(poison=True), **inputs)
        # A mask has 151 MB a row, scores of one head twice as many or more.
        assert torch.cuda.max_memory_allocated() - before < 145e6
    if what in ("plain", "padded"):
        expected = last_logits(model, DynamicCache(), **inputs)
        assert (got - expected).abs().max() < (1e-4 if dtype == torch.float32 else 0.2)
