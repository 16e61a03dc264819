"""Masks and positions of the caller's own, and what attention must not read in place."""

from __future__ import annotations

import functools
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from generating import (
    TOLERANCE,
    forward,
    llama,
    positions,
    prefill,
    tree,
    tree_cache,
    tree_llama,
)
from models import COLUMNS, model, one_thread, prompts
from transformers import (
    DynamicCache,
    PreTrainedModel,
    masking_utils,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama import modeling_llama

from hf_tree_cache import (
    UnsupportedModel,
    enable_tree_attention,
)
from hf_tree_cache.integration.attention import tree_attention_forward

__all__ = ["llama", "one_thread", "tree", "tree_llama"]  # fixtures
pytestmark = pytest.mark.core


# Masks


HOLES = {
    "holes": lambda mask: mask.index_fill(1, torch.tensor([20, 21, 30]), 0),
    "right padding": lambda mask: mask.flip(1),
    "left padding and holes": lambda mask: mask * (torch.arange(COLUMNS) % 9 > 0),
    "a row of padding only at its end": lambda mask: torch.cat([mask[:, :-2], 0 * mask[:, -2:]], 1),
}


@pytest.mark.parametrize("hide", HOLES.values(), ids=HOLES)
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_masks_that_hide_more_than_left_padding(name: str, hide: Any, tree: bool) -> None:
    each, inputs = model(name), prompts(name)
    inputs["attention_mask"] = hide(inputs["attention_mask"])
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 4, dtype=torch.int64)], 1)
    more = torch.randint(3, 90, (2, 4))

    def logits(cache: Any) -> list[torch.Tensor]:
        steps = [prefill(each, cache, inputs)]
        steps.append(forward(each, cache, more[:, :3], mask[:, :-1]))
        return [*steps, forward(each, cache, more[:, 3:], mask)]

    cache = tree_cache()
    theirs = logits(DynamicCache(config=each.config))
    with enable_tree_attention(each) if tree else nullcontext():
        ours = logits(cache)
    cache.check_integrity()
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(ours[0][real], theirs[0][real], rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(ours[1:], theirs[1:], rtol=0, atol=TOLERANCE)


def test_mask_that_changes_while_decoding(llama: PreTrainedModel) -> None:
    """As experiments do that drop tokens from a long past."""
    ids = prompts(num_rows=1)["input_ids"]
    cache, dense = tree_cache(), DynamicCache()
    mask = torch.ones(1, COLUMNS + 1, dtype=torch.int64)
    mask[:, 3:20] = 0
    logits = []
    for each in (cache, dense):
        forward(llama, each, ids)
        logits.append(forward(llama, each, torch.full((1, 1), 9), mask))
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=TOLERANCE)


PATTERNS = {
    "more": {"or_mask_function": lambda batch, head, query, key: (key > 43) & (key < 47)},
    "less": {"and_mask_function": lambda batch, head, query, key: key % 7 != 3},
}


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_mask_patterns_that_we_do_not_know(
    llama: PreTrainedModel, pattern: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Models make masks from functions: one that shows more than causal, one that shows less."""
    create = functools.partial(masking_utils.create_causal_mask, **pattern)
    monkeypatch.setattr(modeling_llama, "create_causal_mask", create)
    inputs, more = prompts(num_rows=1), torch.randint(3, 90, (1, 6))
    cache, logits = tree_cache(), []
    for each in (cache, DynamicCache()):
        parts = [prefill(llama, each, inputs)]
        parts += [forward(llama, each, more[:, :5]), forward(llama, each, more[:, 5:])]
        logits.append(torch.cat(parts, 1))
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=TOLERANCE)
    assert len(cache.dense_reads) == 1


def test_holes_in_a_later_turn(llama: PreTrainedModel) -> None:
    """Turns of different lengths, padded in the middle of the conversation."""
    inputs, more = prompts(), torch.randint(3, 90, (2, 9))
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 9, dtype=torch.int64)], 1)
    mask[0, COLUMNS : COLUMNS + 4] = 0
    mask[1, -3:-1] = 0
    cache, dense = tree_cache(), DynamicCache()
    logits = []
    for each in (cache, dense):
        prefill(llama, each, inputs)
        turn = forward(llama, each, more[:, :-1], mask[:, :-1])
        logits.append([turn[mask[:, COLUMNS:-1] == 1], forward(llama, each, more[:, -1:], mask)])
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("cache_by_name", [False, True], ids=["all", "all but the cache"])
def test_arguments_by_position(llama: PreTrainedModel, cache_by_name: bool) -> None:
    inputs, more = prompts(), torch.full((2, 2), 9)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(more)], 1)

    def call(cache: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        args = ids, mask, positions(mask, ids.shape[1])
        with torch.no_grad():
            if cache_by_name:
                return llama(*args, past_key_values=cache).logits
            return llama(*args, cache).logits

    logits = []
    for cache in (tree_cache(), DynamicCache()):
        call(cache, inputs["input_ids"], inputs["attention_mask"])
        logits.append(call(cache, more, mask))
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=TOLERANCE)


def test_positions_of_the_callers_own(llama: PreTrainedModel) -> None:
    """Two documents side by side behind a prefix: the second begins where the prefix ended."""
    ids = prompts(num_rows=1)["input_ids"]
    visible = torch.ones(COLUMNS, COLUMNS).tril().bool()
    visible[30:, 15:30] = False
    where = torch.cat([torch.arange(30), torch.arange(15, 30)])[None]

    def logits(cache: Any) -> torch.Tensor:
        parts = []
        with torch.no_grad():
            for part in (slice(0, 15), slice(15, 30), slice(30, 45)):
                parts.append(
                    llama(
                        input_ids=ids[:, part],
                        attention_mask=visible[None, None, part, : part.stop],
                        position_ids=where[:, part],
                        past_key_values=cache,
                    ).logits
                )
        return torch.cat(parts, 1)

    ours, theirs = logits(tree_cache()), logits(DynamicCache())
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_mask_of_the_callers_own(llama: PreTrainedModel, kind: str) -> None:
    """Prefix-LM style: the first ten tokens see each other, and some pairs do not."""
    ids = prompts(num_rows=2)["input_ids"].clamp_min(3)
    more = torch.randint(3, 90, (2, 3))
    total = COLUMNS + 3
    visible = torch.ones(total, total).tril().bool()
    visible[:10, :10] = True
    visible[:, 15:18] = torch.eye(total, dtype=torch.bool)[:, 15:18]
    visible = visible.expand(2, 1, -1, -1).clone()
    visible[1, :, 20:, 3] = False

    def part(rows: slice, columns: int) -> torch.Tensor:
        mask = visible[:, :, rows, :columns]
        if kind == "bool":
            return mask
        return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)

    def logits(cache: Any) -> torch.Tensor:
        with torch.no_grad():
            first = llama(
                input_ids=ids,
                attention_mask=part(slice(COLUMNS), COLUMNS),
                past_key_values=cache,
            ).logits
            second = llama(
                input_ids=more,
                attention_mask=part(slice(COLUMNS, total), total),
                past_key_values=cache,
            ).logits
        return torch.cat([first, second], 1)

    cache = tree_cache()
    ours, theirs = logits(cache), logits(DynamicCache())
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)
    cache.check_integrity()


# What attention must not read in place


class Layer(torch.nn.Module):
    """As much of an attention layer as attention functions look at."""

    is_causal, num_key_value_groups = True, 2


OBSTACLES: dict[str, dict[str, Any]] = {
    "dropout": {"dropout": 0.4},
    "not causal": {"is_causal": False},
    "unknown keyword position_bias": {"position_bias": torch.arange(264.0).view(3, 4, 2, 11).sin()},
    "query of another kind": {"dtype": torch.float64},
    "query of another shape": {"columns": 1},
}


@pytest.mark.parametrize("reason", OBSTACLES)
def test_attention_reads_densely_when_it_must(reason: str) -> None:
    options = dict(OBSTACLES[reason])
    cache, layer = tree_cache(), Layer().train()
    keys, values = torch.randn(2, 3, 2, 11, 8)
    cache.update(keys[:, :, :9], values[:, :, :9], 0)
    handles = cache.update(keys[:, :, 9:], values[:, :, 9:], 0)
    query = torch.randn(3, 4, options.pop("columns", 2), 8)
    dtype = options.pop("dtype", torch.float32)
    if dtype != torch.float32:
        # Nobody can attend to float32 keys with a float64 query; we must not pretend to.
        with pytest.raises(RuntimeError, match="dtype"):
            tree_attention_forward(layer, query.to(dtype), *handles, None)
    else:
        hidden = torch.ones(query.shape[2], 11, dtype=torch.bool).tril(11 - query.shape[2])
        mask = None if reason == "not causal" else hidden.expand(3, 1, -1, -1)
        outputs = []
        for function, kv in (
            (tree_attention_forward, handles),
            (sdpa_attention_forward, (keys, values)),
        ):
            torch.manual_seed(1)
            outputs.append(function(layer, query, *kv, mask, **options)[0])
        torch.testing.assert_close(*outputs)
    assert set(cache.dense_reads) == {reason}


def test_losses_are_those_of_all_rows(tree_llama: PreTrainedModel) -> None:
    """Equal rows count as often as they are there."""
    inputs = {key: value[[0, 0, 0, 1]] for key, value in prompts().items()}
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"].cumsum(1) < 2, -100)
    with torch.no_grad():
        ours = tree_llama(**inputs, labels=labels, past_key_values=tree_cache())
        theirs = tree_llama(**inputs, labels=labels)
    torch.testing.assert_close(ours.loss, theirs.loss)


def test_a_keyword_that_nobody_heeds_is_refused() -> None:
    query, keys, values = torch.randn(1, 4, 2, 8), *torch.randn(2, 1, 2, 2, 8)
    with pytest.raises(UnsupportedModel, match=r"'indices'.*disable\(\)"):
        tree_attention_forward(Layer(), query, keys, values, None, indices=torch.zeros(1))
    tree_attention_forward(Layer(), query, keys, values, None, indices=None)


@pytest.mark.parametrize("softcap", [None, 5.0], ids=["sdpa", "softcap"])
def test_the_last_queries_of_a_prompt_see_no_future(softcap: float | None) -> None:
    """Gemma 4 drops all queries but the last ones, where none needed a mask."""
    query, (keys, values) = torch.randn(1, 4, 9, 8), torch.randn(2, 1, 2, 9, 8)
    layer = Layer().eval()
    whole, _ = tree_attention_forward(layer, query, keys, values, None, softcap=softcap)
    last, _ = tree_attention_forward(layer, query[:, :, 6:], keys, values, None, softcap=softcap)
    torch.testing.assert_close(last, whole[:, 6:])
