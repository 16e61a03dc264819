"""Tree attention switched on and off: around `generate`, caches of others, and training."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from generating import (
    assert_continues,
    forward,
    prefill,
    tree_cache,
)
from models import COLUMNS, assert_same, build, generate, model, one_thread, prompts
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    PreTrainedModel,
)

from hf_tree_cache import (
    InvalidArgument,
    TreeCache,
    TreeCacheError,
    UnsupportedModel,
    enable_tree_attention,
)
from hf_tree_cache.naming import CACHE

__all__ = ["one_thread"]  # fixtures
pytestmark = pytest.mark.core


def implementations(model: PreTrainedModel) -> list[str]:
    parts = [m for m in model.modules() if isinstance(m, PreTrainedModel)]
    return [part.config._attn_implementation for part in parts]


@pytest.mark.parametrize("name", ["llama", "gemma2", "llava", "bart", "falcon"])
def test_disable_gives_the_model_back_as_it_was(name: str) -> None:
    each = model(name)
    config, before = copy.deepcopy(each.config), implementations(each)
    handle = enable_tree_attention(each)
    assert len(each._forward_pre_hooks) == len(each._forward_hooks) == 1
    assert (implementations(each) == before) == (name == "falcon")
    with pytest.raises(InvalidArgument, match="enabled already"):
        enable_tree_attention(each)
    handle.disable()
    handle.disable()
    assert implementations(each) == before
    assert each.config.to_dict() == config.to_dict()
    assert not each._forward_pre_hooks and not each._forward_hooks
    assert not any(flag for flag in each._forward_hooks_always_called.values())
    with enable_tree_attention(each):
        pass
    assert implementations(each) == before


@pytest.mark.core
def test_continuous_batching_is_refused_until_disabled() -> None:
    model = build("llama")
    with enable_tree_attention(model), pytest.raises(InvalidArgument, match=r"Call disable\(\)"):
        model.generate_batch(inputs=[[3, 4, 5], [6, 7]])
    assert "init_continuous_batching" not in vars(model)


def test_disabled_in_the_middle_the_cache_goes_on() -> None:
    llama, cache, inputs = model("llama"), tree_cache(), prompts()
    with enable_tree_attention(llama):
        prefill(llama, cache, inputs)
    assert_continues(llama, cache, inputs["input_ids"], inputs["attention_mask"])
    assert cache.dense_reads


def test_enabled_in_the_middle_the_cache_goes_on() -> None:
    llama, cache, inputs = model("llama"), tree_cache(), prompts(num_rows=1)
    prefill(llama, cache, inputs)
    cache.batch_repeat_interleave(2)
    with enable_tree_attention(llama):
        assert_continues(llama, cache, inputs["input_ids"].repeat(2, 1))
    assert not cache.dense_reads


def test_only_models_of_transformers_can_be_enabled() -> None:
    with pytest.raises(InvalidArgument, match="Linear"):
        enable_tree_attention(torch.nn.Linear(2, 2))


def test_a_class_in_the_place_of_a_cache_is_refused() -> None:
    llama, inputs = model("llama"), prompts()
    with enable_tree_attention(llama):
        for call in (functools.partial(llama.generate, max_new_tokens=2), llama):
            with pytest.raises(InvalidArgument, match=r"pass an object, .*TreeCache\(\)\."):
                call(**inputs, **{CACHE: TreeCache})
    assert "_prepare_cache_for_generation" not in vars(llama)


@pytest.mark.parametrize(
    "options", [{"do_sample": True}, {"do_sample": False, "num_beams": 3}], ids=["sample", "beams"]
)
def test_default_cache_is_replaced_and_repeated_prompts_run_once(options: dict[str, Any]) -> None:
    """As GRPO trainers call it: equal rows in the batch, no cache in sight."""
    llama, inputs = model("llama"), prompts()
    inputs = {key: value[[0, 0, 0, 1, 1, 1]] for key, value in inputs.items()}
    theirs = generate(llama, inputs, **options)
    shapes: list[torch.Size] = []
    spy = llama.model.layers[0].register_forward_pre_hook(
        lambda module, args: shapes.append(args[0].shape[:2])
    )
    with enable_tree_attention(llama, replace_default_cache=True):
        ours = generate(llama, inputs, **options)
    spy.remove()
    assert_same(ours, theirs)
    assert isinstance(ours.past_key_values, TreeCache)
    assert shapes[0] == (2, COLUMNS)
    assert set(shapes[1:]) == {(6 * options.get("num_beams", 1), 1)}


def test_replacing_leaves_other_caches_alone() -> None:
    llama, inputs = model("llama"), prompts(num_rows=1)
    with enable_tree_attention(llama, replace_default_cache=True):
        used = DynamicCache()
        forward(llama, used, inputs["input_ids"][:, :9])
        longer = generate(llama, inputs, past_key_values=used)
        assert longer.past_key_values is used
    with enable_tree_attention(llama):
        assert type(generate(llama, inputs).past_key_values) is DynamicCache


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_static_cache_while_enabled(name: str) -> None:
    """`generate` makes the masks of such caches itself and passes them to every forward."""
    each, inputs = model(name), prompts(name)
    theirs = generate(each, inputs)
    with enable_tree_attention(each, replace_default_cache=True):
        ours = generate(each, inputs, cache_implementation="static")
    assert type(ours.past_key_values).__name__ == "StaticCache"
    assert_same(ours, theirs)


def test_encoder_decoders_are_told_which_cache_they_need() -> None:
    bart = model("bart")
    with (
        enable_tree_attention(bart),
        pytest.raises(UnsupportedModel, match=r"EncoderDecoderCache\(TreeCache\(\), TreeCache\(\)"),
    ):
        generate(bart, prompts("bart"), past_key_values=tree_cache())
    cache = EncoderDecoderCache(tree_cache(), DynamicCache())
    with enable_tree_attention(bart):
        ours = generate(bart, prompts("bart"), past_key_values=cache, num_beams=3)
    theirs = generate(bart, prompts("bart"), num_beams=3)
    assert_same(ours, theirs)


def test_linear_attention_models_need_a_config() -> None:
    """Without it the cache cannot know which layers keep a state instead of K/V."""
    hybrid, inputs = model("qwen3_next"), prompts("qwen3_next")
    with pytest.raises((TreeCacheError, IndexError, ValueError)):
        generate(hybrid, inputs, past_key_values=tree_cache())


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("padded", [False, True], ids=["no padding", "left padding"])
def test_gradients_are_those_of_the_stock_attention(name: str, padded: bool) -> None:
    inputs = prompts(name)
    labels = inputs["input_ids"].clone()
    if padded:
        # Nor is a row's first token asked for: the padding before it would have to predict it.
        hidden = inputs["attention_mask"].cumsum(1) < 2
        labels[hidden] = -100
    else:
        del inputs["attention_mask"]
    losses, gradients = [], []
    for implementation in (None, "tree_attention"):
        student = build(name).train()
        if implementation is not None:
            student.set_attn_implementation(implementation)
        loss = student(**inputs, labels=labels, use_cache=False).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append({n: p.grad for n, p in student.named_parameters()})
    torch.testing.assert_close(losses[0], losses[1])
    for key, want in gradients[0].items():
        if want is None:
            assert gradients[1][key] is None
            continue
        scale = float(want.abs().max())
        torch.testing.assert_close(gradients[1][key], want, rtol=0, atol=1e-5 * scale + 1e-7)


def test_training_while_enabled() -> None:
    """Enabled for good, as a trainer may: the training step in between is an ordinary one."""
    student, stock = build("llama").train(), build("llama").train()
    inputs = prompts()
    stock(**inputs, labels=inputs["input_ids"]).loss.backward()
    with enable_tree_attention(student, replace_default_cache=True):
        student.eval()
        generate(student, inputs, max_new_tokens=3)
        student.train()
        student(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
    for ours, theirs in zip(student.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt_oss"])
def test_implementation_set_by_hand_is_right_too(name: str) -> None:
    each = build(name)
    theirs = generate(each, prompts(name))
    each.set_attn_implementation("tree_attention")
    assert_same(generate(each, prompts(name)), theirs)
    cache = tree_cache()
    assert_same(generate(each, prompts(name), past_key_values=cache), theirs)
    assert set(cache.dense_reads) == {"padding"}
    one = prompts(name, num_rows=1)
    cache = tree_cache()
    ours = generate(each, one, past_key_values=cache)
    assert_same(ours, generate(model(name), one))
    assert not cache.dense_reads
