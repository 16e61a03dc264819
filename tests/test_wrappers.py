"""Models inside of something: adapters, quantised weights, two devices, checkpointing, pictures."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate import cpu_offload, disk_offload
from copies import WAYS
from generating import Eager
from models import (
    COLUMNS,
    GROUPED,
    IMAGE,
    PAD,
    TEXT,
    assert_same,
    build,
    generate,
    model,
    one_thread,
    prompts,
)
from transformers import DynamicCache, EncoderDecoderCache

from hf_tree_cache import TreeCache, UnsupportedModel, enable_tree_attention
from hf_tree_cache.integration import enable

__all__ = ["one_thread"]  # a fixture for all of this file

MODES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "num_return_sequences": 3},
    "beam search": {"do_sample": False, "num_beams": 3},
}


def assert_tree_agrees(
    wrapped: Any, name: str, mode: str, inputs: dict[str, Any] | None = None, **options: Any
) -> TreeCache:
    """Same tokens and logits with a TreeCache, nothing read densely; the cache."""
    inputs = prompts(name) if inputs is None else inputs
    options = {**MODES[mode], **options}
    theirs = generate(wrapped, inputs, **options)
    cache = TreeCache(poison=True)
    with enable_tree_attention(wrapped):
        ours = generate(wrapped, inputs, past_key_values=cache, **options)
    assert_same(ours, theirs)
    cache.check_integrity()
    assert not cache.dense_reads
    return cache


# Adapters


def adapted(name: str, targets: list[str]) -> Any:
    """The model with LoRA, its weights random so that they change the logits."""
    peft = pytest.importorskip("peft", reason="LoRA: pip install peft")
    with warnings.catch_warnings():
        # peft asks transformers 5.23 by a name that it has renamed.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
        torch.manual_seed(2)
        return peft.get_peft_model(build(name), config).eval()


@pytest.mark.parametrize("mode", MODES)
def test_lora(mode: str) -> None:
    lora = adapted("llama", ["q_proj", "k_proj", "v_proj", "down_proj"])
    cache = assert_tree_agrees(lora, "llama", mode)
    rows = {"greedy": 2, "sampling": 6, "beam search": 6}[mode]
    stats = cache.stats()
    assert stats.prefill_tokens_asked == rows * COLUMNS
    assert stats.prefill_tokens_computed == 2 * COLUMNS
    base = generate(model("llama"), prompts(), do_sample=False)
    assert (generate(lora, prompts()).logits[0] - base.logits[0]).abs().max() > 0.01


def test_lora_of_the_projection_that_expands_latents() -> None:
    lora = adapted("deepseek_v3", ["kv_b_proj"])
    assert_tree_agrees(lora, "deepseek_v3", "sampling")


def test_an_adapter_that_is_switched_off_and_merged() -> None:
    lora = adapted("llama", ["q_proj", "v_proj"])
    with lora.disable_adapter():
        assert_tree_agrees(lora, "llama", "sampling")
    merged = lora.merge_and_unload()
    assert_tree_agrees(merged, "llama", "sampling")


def test_lora_trains_while_enabled() -> None:
    gradients = []
    for enabled in (False, True):
        lora = adapted("llama", ["q_proj", "v_proj"]).train()
        inputs = prompts()
        with enable_tree_attention(lora) if enabled else nullcontext():
            if enabled:
                lora.eval()
                generate(lora, inputs, past_key_values=TreeCache(), max_new_tokens=2)
                lora.train()
            lora(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
        gradients.append([p.grad for p in lora.parameters() if p.requires_grad])
    assert gradients[0]
    for want, got in zip(*gradients, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("trained", ["q_proj", "v_proj"])
def test_no_gradient_of_an_adapter_is_lost_in_silence(trained: str) -> None:
    """Keys need no gradient here, and queries or values do."""
    lora = adapted("llama", [trained])
    lora.requires_grad_(False)
    for name, weight in lora.named_parameters():
        weight.requires_grad_("layers.2" in name and "lora_" in name)
    ids = prompts()["input_ids"]
    with enable_tree_attention(lora):
        cache = TreeCache()
        with torch.no_grad():
            lora(ids, past_key_values=cache)
        logits = lora(ids[:, :1], past_key_values=cache).logits
        with pytest.raises(UnsupportedModel, match="backward through a TreeCache"):
            logits.sum().backward()


# Quantised weights


@pytest.mark.core
@pytest.mark.parametrize("name", ["llama", "deepseek_v3", "qwen3_next"])
def test_int8_weights(name: str) -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="the extra 'quantised'")
    quantised = build(name)
    quantization.quantize_(quantised, quantization.Int8WeightOnlyConfig())
    kinds = {type(weight).__name__ for weight in quantised.parameters()}
    assert len(kinds) > 1, "nothing was quantised"
    assert_tree_agrees(quantised, name, "sampling")


# Devices


@pytest.mark.core
def test_layers_on_two_devices() -> None:
    """With accelerate's hooks, in a process that has a second device: see two_devices.py."""
    pytest.importorskip("torch.utils.backend_registration")
    if not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip(f"torch {torch.__version__} cannot have a device made in Python")
    script = Path(__file__).with_name("two_devices.py")
    path = os.pathsep.join([str(script.parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(script), "llama", "deepseek_v3"],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines() == [
        "llama agrees",
        "deepseek_v3 agrees",
        "devices do not mix",
    ]


@pytest.mark.parametrize("where", ["memory", "disk"])
@pytest.mark.parametrize("name", ["llama", "deepseek_v3"])
def test_weights_that_come_for_each_forward(name: str, where: str, tmp_path: Path) -> None:
    """accelerate's offloading: between two forwards of a layer its weights are on "meta"."""
    inputs = prompts(name)
    theirs = generate(model(name), inputs, **MODES["sampling"])
    away = build(name)
    if where == "disk":
        disk_offload(away, str(tmp_path), execution_device=torch.device("cpu"))
    else:
        cpu_offload(away, torch.device("cpu"))
    assert {weight.device.type for weight in away.parameters()} == {"meta"}
    cache = TreeCache(poison=True)
    with enable_tree_attention(away), warnings.catch_warnings():
        # transformers 5.17 takes "meta" for the device that the model runs on.
        warnings.filterwarnings("ignore", "You are calling .generate", UserWarning)
        ours = generate(away, inputs, past_key_values=cache, **MODES["sampling"])
    assert_same(ours, theirs)
    assert not cache.dense_reads


# Encoder-decoders


@pytest.mark.parametrize("halves", ["tree and tree", "tree and dense", "dense and tree"])
@pytest.mark.parametrize("name", ["bart", "t5"])
def test_halves_of_an_encoder_decoder_cache_are_free(name: str, halves: str) -> None:
    """Beams, so that both halves are reordered; and a second call after a reset.

    A DynamicCache of transformers 5.17 keeps its length when it is reset.
    """
    inputs, each = prompts(name), model(name)
    theirs = generate(each, inputs, **MODES["beam search"])
    made = [
        TreeCache(poison=True) if h == "tree" else DynamicCache() for h in halves.split(" and ")
    ]
    cache = EncoderDecoderCache(*made)
    with enable_tree_attention(each):
        for _ in range(2 if halves == "tree and tree" else 1):
            ours = generate(each, inputs, past_key_values=cache, **MODES["beam search"])
            assert_same(ours, theirs)
            cache.reset()
    for half in made:
        if isinstance(half, TreeCache):
            half.check_integrity()
            assert half.stats().blocks == 0


# Pictures


def picture_model(name: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """A tiny vision-language model and one prompt with one picture."""
    if name == "llava":
        return build("llava"), prompts("llava", num_rows=1)
    text = {"model_type": "qwen2_vl_text", **GROUPED, "hidden_size": 48}
    text["rope_parameters"] = {
        "rope_type": "default",
        "mrope_section": [2, 2, 2],
        "rope_theta": 10000.0,
    }
    del text["head_dim"]
    vision = {"depth": 2, "embed_dim": 24, "hidden_size": 48, "num_heads": 3, "patch_size": 4}
    config = transformers.Qwen2VLConfig(
        text_config=text,
        vision_config={**vision, "mlp_ratio": 2},
        image_token_id=IMAGE,
        vision_start_token_id=92,
        vision_end_token_id=93,
        video_token_id=94,
        **{key: value for key, value in TEXT.items() if key != "vocab_size"},
    )
    torch.manual_seed(1)
    qwen = transformers.Qwen2VLForConditionalGeneration(config).eval()
    for weight in qwen.parameters():
        if weight.ndim > 1:
            weight.data.normal_(0, 1.5 * weight.shape[-1] ** -0.5)
    qwen.generation_config.pad_token_id, qwen.generation_config.eos_token_id = PAD, None
    ids = prompts(num_rows=1)["input_ids"]
    ids[:, 4], ids[:, 5:11], ids[:, 11] = 92, IMAGE, 93
    return qwen, {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == IMAGE).long(),
        "image_grid_thw": torch.tensor([[1, 4, 6]]),
        "pixel_values": torch.randn(24, 3 * 2 * 4 * 4),
    }


@pytest.mark.core
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_one_picture_and_many_branches(name: str, mode: str) -> None:
    each, inputs = picture_model(name)
    stats = assert_tree_agrees(each, name, mode, inputs).stats()
    rows = 1 if mode == "greedy" else 3
    assert stats.prefill_tokens_asked == rows * COLUMNS
    assert stats.prefill_tokens_computed == COLUMNS
    whole = generate(each, inputs, do_sample=False).logits[0]
    inputs["pixel_values"] = -inputs["pixel_values"]
    assert (generate(each, inputs, do_sample=False).logits[0] - whole).abs().max() > 0.01


def test_a_prompt_with_two_pictures() -> None:
    each, inputs = picture_model("qwen2_vl")
    inputs["input_ids"][:, 20], inputs["input_ids"][:, 21:25] = 92, IMAGE
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).long()
    inputs["image_grid_thw"] = torch.tensor([[1, 4, 6], [1, 4, 4]])
    inputs["pixel_values"] = torch.randn(24 + 16, 3 * 2 * 4 * 4)
    stats = assert_tree_agrees(each, "qwen2_vl", "sampling", inputs).stats()
    assert stats.prefill_tokens_computed == COLUMNS


@pytest.mark.parametrize("same", [True, False], ids=["one prompt twice", "two prompts"])
def test_pictures_of_a_batch(same: bool) -> None:
    """Two prompts with a picture each, three branches of each: whose it is only the model knows."""
    each, inputs = build("llava"), prompts("llava")
    if same:
        inputs = {key: value[[0, 0]] for key, value in inputs.items()}
    stats = assert_tree_agrees(each, "llava", "sampling", inputs).stats()
    assert stats.prefill_tokens_computed == (1 if same else 6) * COLUMNS


def test_branches_of_a_conversation_about_a_picture() -> None:
    """The picture is in the cache like any other past; the next question comes without it."""
    each, inputs = picture_model("llava")
    more = torch.randint(3, 90, (1, 6), generator=torch.Generator().manual_seed(3))
    longer = {
        "input_ids": torch.cat([inputs["input_ids"], more], 1),
        "attention_mask": torch.cat([inputs["attention_mask"], torch.ones_like(more)], 1),
    }
    theirs = generate(each, {**longer, "pixel_values": inputs["pixel_values"]}, **MODES["sampling"])
    cache = TreeCache(poison=True)
    with enable_tree_attention(each):
        with torch.no_grad():
            each(**inputs, past_key_values=cache)
        ours = generate(each, longer, past_key_values=cache, **MODES["sampling"])
    assert_same(ours, theirs)
    stats = cache.stats()
    assert stats.prefill_tokens_computed == COLUMNS + 6
    assert stats.unique_tokens < COLUMNS + 6 + 3 * 9 + 1 and not stats.dense_reads


# Training


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "deepseek_v3"])
def test_checkpointed_training_is_untouched(name: str, reentrant: bool) -> None:
    """Loss and gradients of the stock implementation, with enable and without."""
    inputs = prompts(name)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"].cumsum(1) < 2, -100)
    losses, gradients = [], []
    first = build(name).train()
    for enabled in (False, True):
        student = copy.deepcopy(first)
        with warnings.catch_warnings():
            # transformers 5.23 gave it another name, which 5.17 does not have.
            warnings.filterwarnings("ignore", ".*gradient_checkpointing_enable", FutureWarning)
            student.gradient_checkpointing_enable({"use_reentrant": reentrant})
        with enable_tree_attention(student) if enabled else nullcontext():
            loss = student(**inputs, labels=labels, use_cache=False).loss
            loss.backward()
        losses.append(loss.detach())
        gradients.append({key: weight.grad for key, weight in student.named_parameters()})
    torch.testing.assert_close(losses[0], losses[1])
    assert any(gradient is not None for gradient in gradients[0].values())
    for key, want in gradients[0].items():
        got = gradients[1][key]
        assert (got is None) == (want is None), key
        if want is not None:
            scale = float(want.abs().max())
            torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * scale + 1e-7)


# Copies


@pytest.mark.core
@pytest.mark.parametrize("duplicate", WAYS)
@pytest.mark.parametrize("around", ["the model", "a module", "a PEFT model"])
@pytest.mark.parametrize("name", ["llama", "deepseek_v3"])
def test_a_copy_runs_by_itself(
    name: str, around: str, duplicate: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As reference models of training and moving averages of weights are made."""
    monkeypatch.setattr(enable, "_make_graphs", lambda *arguments: Eager())
    if around == "a PEFT model":
        whole = adapted(name, ["o_proj"])
        first = enable.base_of(whole)
    else:
        first = build(name).eval()
        whole = first if around == "the model" else torch.nn.ModuleList([first])
    before = dict(vars(first))
    handle = enable_tree_attention(first)
    attached = set(vars(first))
    second = duplicate(whole)
    second = second[0] if around == "a module" else enable.base_of(second)
    assert set(vars(first)) == attached and set(vars(second)) == set(before)
    assert enable.is_enabled(first) and not enable.is_enabled(second)
    second.lm_head.weight.data.mul_(3)
    inputs = prompts(name)
    want = generate(second, inputs)
    with torch.no_grad():
        assert not torch.equal(first(**inputs).logits, second(**inputs).logits)
    with enable_tree_attention(second):
        assert_same(generate(second, inputs, past_key_values=TreeCache()), want)
    cache = TreeCache(poison=True)
    ours = generate(first, inputs, past_key_values=cache)
    assert not cache.dense_reads
    with pytest.raises(TypeError, match="Pickle the model"):
        pickle.dumps(handle)
    handle.disable()
    assert set(vars(first)) == set(before)
    assert_same(ours, generate(first, inputs))
