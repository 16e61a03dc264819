"""Mistakes of callers, and forwards that fail: what is said, and what is left."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from generating import (
    HYBRIDS,
    Broken,
    FailsOnce,
    assert_continues,
    extended,
    forward,
    llama,
    prefill,
    tree_cache,
    tree_llama,
)
from models import COLUMNS, assert_same, generate, model, one_thread, prompts
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
)

from hf_tree_cache import (
    BatchMismatch,
    InvalidArgument,
    OutOfBlocks,
    StaleHandle,
    StorageMismatch,
    TreeCacheError,
    enable_tree_attention,
)

__all__ = ["llama", "one_thread", "tree_llama"]  # fixtures
pytestmark = pytest.mark.core


def test_prompt_that_is_cached_already_is_refused(tree_llama: PreTrainedModel) -> None:
    cache, inputs = tree_cache(), prompts(num_rows=1)
    prefill(tree_llama, cache, inputs)
    with pytest.raises(InvalidArgument, match=r"cached already.*crop\(-1\)"):
        generate(tree_llama, inputs, past_key_values=cache)
    cache.check_integrity()
    cache.crop(-1)
    ours = generate(tree_llama, inputs, past_key_values=cache)
    assert_same(ours, generate(tree_llama, inputs))


def test_padded_prompt_that_is_cached_already_is_refused(tree_llama: PreTrainedModel) -> None:
    cache, inputs = tree_cache(), prompts(num_rows=3)
    prefill(tree_llama, cache, inputs)
    with pytest.raises(InvalidArgument, match="cached already"):
        generate(tree_llama, inputs, past_key_values=cache)
    cache.crop(-1)
    ours = generate(tree_llama, inputs, past_key_values=cache)
    assert_same(ours, generate(tree_llama, inputs))


def test_prompt_shorter_than_the_cache_is_refused(tree_llama: PreTrainedModel) -> None:
    """The same call twice: `generate` would run a piece of the prompt behind the first answer."""
    for rows in (1, 2):
        cache, inputs = tree_cache(), prompts(num_rows=rows)
        generate(tree_llama, inputs, past_key_values=cache)
        with pytest.raises(InvalidArgument, match="reset"):
            generate(tree_llama, inputs, past_key_values=cache)
        cache.check_integrity()
        cache.reset()
        ours = generate(tree_llama, inputs, past_key_values=cache)
        assert_same(ours, generate(tree_llama, inputs))


def test_empty_prompt_is_refused(tree_llama: PreTrainedModel) -> None:
    cache = tree_cache()
    with pytest.raises(InvalidArgument, match="no tokens"):
        tree_llama(input_ids=torch.zeros(1, 0, dtype=torch.int64), past_key_values=cache)
    prefill(tree_llama, cache, prompts())
    cache.check_integrity()


@pytest.mark.parametrize("rows", [1, 3, 5])
def test_batch_that_does_not_fit_is_refused(llama: PreTrainedModel, rows: int) -> None:
    cache, inputs = tree_cache(), prompts(num_rows=2)
    prefill(llama, cache, inputs)
    with pytest.raises(BatchMismatch, match=rf"batch of {rows} .* 2 rows with 45 columns.*reset"):
        forward(llama, cache, torch.full((rows, 2), 9))
    assert_continues(llama, cache, inputs["input_ids"], inputs["attention_mask"])


@pytest.mark.parametrize("other", ["qwen3", "llama in float64"])
def test_cache_of_another_model_is_refused(other: str) -> None:
    inputs, cache = prompts(num_rows=1), tree_cache()
    stranger = model("qwen3") if other == "qwen3" else model("llama", torch.float64)
    prefill(model("llama"), cache, inputs)
    with pytest.raises(StorageMismatch, match="belongs to one model"):
        forward(stranger, cache, torch.full((1, 2), 9))
    assert_continues(model("llama"), cache, inputs["input_ids"])


def test_running_out_of_blocks_in_the_middle(llama: PreTrainedModel) -> None:
    inputs = prompts(num_rows=3)
    cache = tree_cache(max_blocks=42)
    seen: list[torch.Tensor] = []

    class Watch(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            seen.append(input_ids)
            return scores

    watch = LogitsProcessorList([Watch()])
    with pytest.raises(OutOfBlocks, match=r"of 42 are free.*max_blocks") as caught:
        generate(llama, inputs, past_key_values=cache, max_new_tokens=40, logits_processor=watch)
    assert caught.value.requested > caught.value.free >= 0
    cache.check_integrity()
    ids = seen[-1]
    assert COLUMNS < ids.shape[1] == cache.get_seq_length()
    mask = torch.ones_like(ids)
    mask[:, :COLUMNS] = inputs["attention_mask"]
    cache.select([0, 2])
    rows = {"input_ids": ids[[0, 2]], "attention_mask": mask[[0, 2]]}
    cache.crop(-1)
    ours = generate(llama, rows, past_key_values=cache)
    assert_same(ours, generate(llama, rows))
    cache.check_integrity()
    assert cache.stats().blocks <= 42


def test_prompt_that_does_not_fit_leaves_an_empty_cache(llama: PreTrainedModel) -> None:
    cache, inputs = tree_cache(max_blocks=13), prompts()
    with pytest.raises(OutOfBlocks):
        generate(llama, inputs, past_key_values=cache, do_sample=True, num_return_sequences=3)
    cache.check_integrity()
    assert cache.stats().blocks == 0
    short = {key: value[:, -9:] for key, value in inputs.items()}
    options = {"max_new_tokens": 3}
    ours = generate(llama, short, past_key_values=cache, **options)
    assert_same(ours, generate(llama, short, **options))


def test_failing_processor_leaves_the_cache_usable(llama: PreTrainedModel) -> None:
    cache, inputs = tree_cache(), prompts()
    seen: list[torch.Tensor] = []

    class Fails(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            seen.append(input_ids)
            if len(seen) == 4:
                raise Broken
            return scores

    with pytest.raises(Broken):
        generate(
            llama,
            inputs,
            past_key_values=cache,
            logits_processor=LogitsProcessorList([Fails()]),
            do_sample=True,
            num_return_sequences=3,
        )
    ids, mask = seen[-1], inputs["attention_mask"].repeat_interleave(3, 0)
    mask = torch.cat([mask, mask.new_ones(6, ids.shape[1] - COLUMNS)], 1)
    assert_continues(llama, cache, ids, mask)


@pytest.mark.parametrize("call", [1, 2, 5], ids=["in the prompt", "at a fork", "while decoding"])
def test_failure_inside_a_layer_undoes_the_forward(tree_llama: PreTrainedModel, call: int) -> None:
    inputs, cache = prompts(), tree_cache()
    options = {"do_sample": True, "num_return_sequences": 3}
    with FailsOnce(tree_llama.model.layers[1].mlp, call), pytest.raises(Broken):
        generate(tree_llama, inputs, past_key_values=cache, **options)
    cache.check_integrity()
    if call == 1:
        assert cache.stats().blocks == 0
        ours = generate(tree_llama, inputs, past_key_values=cache, **options)
        assert_same(ours, generate(tree_llama, inputs, **options))
        return
    theirs = generate(tree_llama, inputs, **options)
    kept = COLUMNS + call - 2
    mask = extended(theirs, inputs, 0)["attention_mask"][:, :kept]
    assert_continues(tree_llama, cache, theirs.sequences[:, :kept], mask)


def test_failure_in_a_chunk_with_collapsed_rows(tree_llama: PreTrainedModel) -> None:
    """The second chunk runs on rows that were collapsed with their past, and must come back."""
    inputs, cache = prompts(), tree_cache()
    options = {"do_sample": True, "num_return_sequences": 3, "prefill_chunk_size": 20}
    with FailsOnce(tree_llama.model.layers[1].mlp, 2), pytest.raises(Broken):
        generate(tree_llama, inputs, past_key_values=cache, **options)
    ids, mask = (inputs[key].repeat_interleave(3, 0)[:, :20] for key in inputs)
    assert_continues(tree_llama, cache, ids, mask)


def test_without_tree_attention_a_failed_forward_asks_for_rollback() -> None:
    llama, inputs, cache = model("llama"), prompts(), tree_cache()
    prefill(llama, cache, inputs)
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.int64)], 1)
    with FailsOnce(llama.model.layers[1].mlp, 1), pytest.raises(Broken):
        forward(llama, cache, torch.full((2, 1), 9), mask)
    with pytest.raises(TreeCacheError, match=r"wrote 2 of 3 layers.*rollback\(\)"):
        forward(llama, cache, torch.full((2, 1), 9), mask)
    cache.rollback()
    assert_continues(llama, cache, inputs["input_ids"], inputs["attention_mask"])
    cache.rollback()
    cache.check_integrity()


def test_rollback_leaves_a_complete_forward_alone() -> None:
    """The failed forward had not come to its first layer, so there is nothing to undo."""
    llama, inputs = model("llama"), prompts()
    cache = tree_cache(config=llama.config)
    prefill(llama, cache, inputs)
    with FailsOnce(llama.model.layers[0], 1), pytest.raises(Broken):
        forward(llama, cache, torch.full((2, 1), 9))
    cache.rollback()
    assert_continues(llama, cache, inputs["input_ids"], inputs["attention_mask"])


def test_failure_behind_the_last_layer_undoes_the_forward(tree_llama: PreTrainedModel) -> None:
    cache, inputs = tree_cache(), prompts()
    prefill(tree_llama, cache, inputs)
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.int64)], 1)
    with FailsOnce(tree_llama.lm_head, 1), pytest.raises(Broken):
        forward(tree_llama, cache, torch.full((2, 1), 9), mask)
    assert_continues(tree_llama, cache, inputs["input_ids"], inputs["attention_mask"])


def test_failure_of_a_fan_out_leaves_one_row(tree_llama: PreTrainedModel) -> None:
    cache, inputs = tree_cache(), prompts(num_rows=1)
    prefill(tree_llama, cache, inputs)
    for more in (torch.full((4, 3), 9), torch.arange(12).view(4, 3) + 3):
        with FailsOnce(tree_llama.model.layers[1].mlp, 1), pytest.raises(Broken):
            forward(tree_llama, cache, more)
        assert cache.batch_size == 1
    assert_continues(tree_llama, cache, inputs["input_ids"])


def test_handles_of_an_earlier_forward_are_stale(llama: PreTrainedModel) -> None:
    cache, inputs = tree_cache(), prompts(num_rows=1)
    prefill(llama, cache, inputs)
    handles = []
    layer = cache.layers[0]
    original = layer.update

    def update(*args: Any, **kwargs: Any) -> Any:
        handles.append(original(*args, **kwargs))
        return handles[-1]

    layer.update = update
    forward(llama, cache, torch.full((1, 1), 9))
    del layer.update
    forward(llama, cache, torch.full((1, 1), 9))
    keys, _ = handles[0]
    assert keys.shape == (1, 1, COLUMNS + 1, 12)
    if cache.dense_reads:
        return  # it was gathered while it was good, and stays so
    with pytest.raises(StaleHandle, match=re.escape("cache.layers[i].keys")):
        keys + 1


@pytest.mark.parametrize("name", HYBRIDS)
def test_failure_of_a_model_with_linear_attention(name: str) -> None:
    """Its states cannot be taken back, so the cache asks for a reset instead of going on wrong."""
    each, cache, inputs = model(name), tree_cache(), prompts(name)
    layer = each.model.layers[1]
    layer = layer.feed_forward if hasattr(layer, "feed_forward") else layer.mlp
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.int64)], 1)
    with enable_tree_attention(each):
        with FailsOnce(layer, 1), pytest.raises(Broken):
            prefill(each, cache, inputs)
        prefill(each, cache, inputs)
        with FailsOnce(layer, 1), pytest.raises(Broken):
            forward(each, cache, torch.full((2, 1), 9), mask)
        with pytest.raises(TreeCacheError, match=r"reset\(\)"):
            forward(each, cache, torch.full((2, 1), 9), mask)
        cache.reset()
        prefill(each, cache, inputs)
        assert_continues(each, cache, inputs["input_ids"], inputs["attention_mask"])
