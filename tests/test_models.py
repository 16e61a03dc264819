"""Every architecture generates with a TreeCache what it generates with transformers' own cache.

Logits are compared, not only tokens: a wrong read often leaves the tokens of a step as they were.
"""

from __future__ import annotations

import copy
import functools
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from models import (
    COLUMNS,
    DECODERS,
    ENCODER_DECODERS,
    TINY,
    VOCAB,
    assert_same,
    build,
    generate,
    model,
    one_thread,
    prompts,
)
from packaging.version import Version
from transformers import EncoderDecoderCache, PreTrainedModel, __version__

from hf_tree_cache import TreeCache, enable_tree_attention
from hf_tree_cache.integration import attention

__all__ = ["one_thread"]  # a fixture for all of this file

MODES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "num_return_sequences": 3},
    "beam search": {"do_sample": False, "num_beams": 3},
    "beam sampling": {"do_sample": True, "num_beams": 4},
}
BLOCK_SIZES = {"greedy": 4, "sampling": 16, "beam search": 16, "beam sampling": 4}
HOWS = ("tree attention", "stock attention")

CORE = {"llama", "gemma2", "gpt_oss", "mistral", "llama4", "deepseek_v3", "qwen3_next", "falcon_h1"}
CORE |= {"bart", "t5", "llava"}
VARIED = ("llama", "gemma2", "gpt_oss", "mistral", "llama4")

ARCHITECTURES = [
    pytest.param(name, marks=[pytest.mark.core] if name in CORE else []) for name in TINY
]


def varied(test: Any) -> Any:
    """Run a test with tree attention and without, on architectures that mask differently."""
    test = pytest.mark.parametrize("how", HOWS)(test)
    return pytest.mark.core(pytest.mark.parametrize("name", VARIED)(test))


def new_cache(name: str, how: str, block_size: int) -> Any:
    """The cache a user would pass: with tree attention a bare one will do."""
    config = model(name).config if TINY[name].states and how == "stock attention" else None

    def tree_cache() -> TreeCache:
        return TreeCache(config, block_size=block_size, poison=True)

    if name in ENCODER_DECODERS:
        return EncoderDecoderCache(tree_cache(), tree_cache())
    return tree_cache()


def run_with_tree(
    name: str, model: PreTrainedModel, how: str, inputs: dict[str, Any], **options: Any
) -> tuple[Any, TreeCache]:
    cache = new_cache(name, how, options.pop("block_size", 4))
    with enable_tree_attention(model) if how == "tree attention" else nullcontext():
        output = generate(model, inputs, past_key_values=cache, **options)
    caches = [cache]
    if isinstance(cache, EncoderDecoderCache):
        caches = [cache.self_attention_cache, cache.cross_attention_cache]
    for each in caches:
        each.check_integrity()
    return output, caches[0]


def precision(name: str, mode: str) -> tuple[torch.dtype, float]:
    """Beams compare sums of logits of all rows: in float64, where no two come near each other.

    Norms and rotary embeddings stay float32 inside of a float64 model, hence not 1e-12.
    """
    if "beam" in mode and TINY[name].double:
        return torch.float64, 5e-6
    return torch.float32, 1e-4


def ends_a_row(generated: torch.Tensor) -> int:
    """A token that ends a row early; other rows go on if there is such a token."""
    tokens = generated[:, 2:-1].flatten().tolist()
    rows = {token: int((generated == token).any(1).sum()) for token in tokens}
    return next((token for token in tokens if rows[token] < len(generated)), tokens[0])


@functools.cache
def expected(name: str, mode: str) -> tuple[Any, dict[str, Any]]:
    """What transformers' own cache gives, and the options that gave it."""
    dtype, _ = precision(name, mode)
    inputs = prompts(name, dtype)
    options = dict(MODES[mode])
    if "beam" in mode:
        options["eos_token_id"] = list(range(5, VOCAB, 12))
    else:
        first = generate(model(name, dtype), inputs, **options)
        start = 1 if name in ENCODER_DECODERS else COLUMNS
        options["eos_token_id"] = ends_a_row(first.sequences[:, start:])
    return generate(model(name, dtype), inputs, **options), options


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_generates_the_same(name: str, mode: str, how: str) -> None:
    dtype, tolerance = precision(name, mode)
    theirs, options = expected(name, mode)
    ours, cache = run_with_tree(
        name,
        model(name, dtype),
        how,
        prompts(name, dtype),
        block_size=BLOCK_SIZES[mode],
        **options,
    )
    assert_same(ours, theirs, tolerance)

    fan = max(options.get("num_return_sequences", 1), options.get("num_beams", 1))
    columns = 1 if name in ENCODER_DECODERS else COLUMNS
    once = how == "tree attention" and name in DECODERS
    stats = cache.stats()
    assert stats.prefill_tokens_asked == 2 * fan * columns
    assert stats.prefill_tokens_computed == (2 if once else 2 * fan) * columns
    if how == "tree attention":
        assert set(stats.dense_reads) <= TINY[name].dense
        assert bool(stats.dense_reads) == bool(TINY[name].dense)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_depend_on_the_past(name: str) -> None:
    """Else the comparisons above would prove nothing."""
    inputs = prompts(name, num_rows=1)
    tail = {**inputs, "input_ids": inputs["input_ids"].clone()}
    tail["input_ids"][:, 25:-1] = 4
    whole, other = (generate(model(name), i, max_new_tokens=1).logits[0] for i in (inputs, tail))
    assert (whole - other).abs().max() > 0.05


@varied
def test_wide_beams(name: str, how: str) -> None:
    dtype, tolerance = precision(name, "beam search")
    inputs = prompts(name, dtype)
    options = {"num_beams": 16, "num_return_sequences": 5, "do_sample": False}
    theirs = generate(model(name, dtype), inputs, **options)
    ours, cache = run_with_tree(name, model(name, dtype), how, inputs, **options)
    assert_same(ours, theirs, tolerance)
    assert cache.stats().num_rows == 32
    # Independent rows of layers with a window hold no more than that: 11 of 53 tokens here.
    slides = all(kind.window is not None for kind in cache.stats().kinds)
    assert cache.stats().saving > (0.2 if slides else 0.5)


@varied
def test_prefill_in_chunks(name: str, how: str) -> None:
    inputs = prompts(name, num_rows=3)
    options = {"do_sample": True, "num_return_sequences": 3}
    theirs = generate(model(name), inputs, **options)
    ours, cache = run_with_tree(name, model(name), how, inputs, prefill_chunk_size=7, **options)
    assert_same(ours, theirs)
    assert not set(cache.dense_reads) or how == "stock attention"
    stats = cache.stats()
    assert stats.prefill_tokens_asked == 9 * COLUMNS
    if how == "tree attention":
        # The first chunk of two prompts is nothing but padding, and so the same.
        assert stats.prefill_tokens_computed == 3 * COLUMNS - 7


def crops(cache_class: type, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Records how many columns every crop of a cache takes away."""
    removed: list[int] = []
    original = cache_class.crop

    def crop(self: Any, tokens_to_remove: Any) -> None:
        removed.append(-int(tokens_to_remove))
        original(self, tokens_to_remove)

    monkeypatch.setattr(cache_class, "crop", crop)
    return removed


@varied
def test_prompt_lookup(name: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = prompts(name, num_rows=1)
    inputs["input_ids"][:, 30:] = inputs["input_ids"][:, :15]
    options = {"prompt_lookup_num_tokens": 4, "do_sample": False, "max_new_tokens": 14}
    theirs = generate(model(name), inputs, **options)
    removed = crops(TreeCache, monkeypatch)
    ours, _ = run_with_tree(name, model(name), how, inputs, **options)
    assert_same(ours, theirs)
    assert max(removed) > 0


@varied
def test_assisted_decoding(name: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The assistant is the model with a little noise: some of its tokens are right, some wrong."""
    if name == "gemma2" and Version(__version__) < Version("5.23"):
        pytest.skip(
            f"transformers {__version__} cannot have a gemma2 as the assistant of any model"
        )
    assistant = build(name)
    for weight in assistant.parameters():
        weight.data.add_(torch.randn_like(weight), alpha=0.1 * float(weight.detach().std()))
    inputs = prompts(name, num_rows=1)
    options = {"assistant_model": assistant, "do_sample": False, "max_new_tokens": 14}
    try:
        theirs = generate(model(name), inputs, **options)
    except RuntimeError as error:
        # The assistant's own windowed DynamicCache cannot be cropped at some numbers of tokens.
        if Version(__version__) >= Version("5.23"):
            raise
        pytest.skip(f"transformers {__version__} cannot run this by itself: {error}")
    removed = crops(TreeCache, monkeypatch)
    ours, _ = run_with_tree(name, model(name), how, inputs, **options)
    assert_same(ours, theirs)
    assert max(removed) > 0 and len(removed) < 14


@pytest.mark.parametrize("block_size", [1, 3, 16, 64])
@pytest.mark.parametrize("name", VARIED)
def test_block_size_changes_nothing(name: str, block_size: int) -> None:
    dtype, tolerance = precision(name, "beam search")
    theirs, options = expected(name, "beam search")
    ours, cache = run_with_tree(
        name,
        model(name, dtype),
        "tree attention",
        prompts(name, dtype),
        block_size=block_size,
        **options,
    )
    assert_same(ours, theirs, tolerance)
    assert not cache.dense_reads


@pytest.mark.core
@pytest.mark.parametrize("name", ["llama", "mistral", "falcon"])
def test_repeated_prompts_of_a_batch_are_computed_once(name: str) -> None:
    inputs = {key: value[[0, 1, 1, 0, 2, 1]] for key, value in prompts(name, num_rows=3).items()}
    theirs = generate(model(name), inputs, do_sample=True)
    ours, cache = run_with_tree(name, model(name), "tree attention", inputs, do_sample=True)
    assert_same(ours, theirs)
    stats = cache.stats()
    assert (stats.prefill_tokens_asked, stats.prefill_tokens_computed) == (6 * 45, 3 * 45)


@pytest.mark.core
def test_a_shared_prompt_is_read_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    plans = []
    original = attention.run_tree_attention

    def spy(query: Any, storage: Any, layer: int, plan: Any, **options: Any) -> Any:
        plans.append(plan)
        return original(query, storage, layer, plan, **options)

    monkeypatch.setattr(attention, "run_tree_attention", spy)
    inputs = prompts("llama")
    options = {"do_sample": True, "num_return_sequences": 3}
    run_with_tree("llama", model("llama"), "tree attention", inputs, **options)
    assert len(plans) == 3 * 8
    # Of 44 and 36 prompt tokens in full blocks, two of three reads are saved.
    for plan in plans:
        assert plan.tokens_read() == sum(plan.lengths) - 2 * (44 + 36)


@pytest.mark.core
@pytest.mark.parametrize("how", HOWS)
def test_equal_prompts_with_different_pictures_stay_apart(how: str) -> None:
    inputs = prompts("llava")
    inputs["input_ids"] = inputs["input_ids"][[0, 0]]
    inputs["attention_mask"] = inputs["attention_mask"][[0, 0]]
    theirs = generate(model("llava"), inputs)
    assert not torch.equal(theirs.logits[0][0], theirs.logits[0][1])
    ours, _ = run_with_tree("llava", model("llava"), how, inputs)
    assert_same(ours, theirs)


@pytest.mark.core
def test_two_models_with_one_config_class_do_not_disturb_each_other() -> None:
    """Enabling one model leaves another of the same class on its own attention."""
    inputs = prompts("llama")
    theirs = generate(model("llama"), inputs)
    other = copy.deepcopy(model("llama"))
    with enable_tree_attention(other):
        assert model("llama").config._attn_implementation == "sdpa"
        assert_same(generate(model("llama"), inputs, past_key_values=TreeCache()), theirs)
        assert_same(generate(other, inputs, past_key_values=TreeCache()), theirs)
