"""Crops, resets, copies and selections of a cache, and branches that are held."""

from __future__ import annotations

import copy
import pickle
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from copies import WAYS
from generating import (
    HYBRIDS,
    TOLERANCE,
    assert_continues,
    forward,
    llama,
    prefill,
    tree,
    tree_cache,
    tree_llama,
)
from models import COLUMNS, PAD, assert_same, generate, model, one_thread, prompts
from transformers import (
    DynamicCache,
    PreTrainedModel,
)

from hf_tree_cache import (
    InvalidArgument,
    UnsupportedModel,
    enable_tree_attention,
)

__all__ = ["llama", "one_thread", "tree", "tree_llama"]  # fixtures
pytestmark = pytest.mark.core


@pytest.mark.parametrize("removed", [0, 1, 6, 20], ids=lambda n: f"{n} tokens")
@pytest.mark.parametrize("kind", [int, torch.tensor], ids=["int", "tensor"])
def test_crop(llama: PreTrainedModel, removed: int, kind: Any) -> None:
    cache, inputs = tree_cache(), prompts()
    prefill(llama, cache, inputs)
    cache.crop(kind(-removed))
    kept = COLUMNS - removed
    ids, mask = inputs["input_ids"][:, :kept], inputs["attention_mask"][:, :kept]
    assert_continues(llama, cache, ids, mask)


def test_crop_of_forked_rows_leaves_the_others_alone(tree_llama: PreTrainedModel) -> None:
    cache, inputs = tree_cache(), prompts(num_rows=1)
    prefill(tree_llama, cache, inputs)
    cache.batch_repeat_interleave(3)
    (held,) = cache.fork(cache.rows[1])
    ids = inputs["input_ids"].repeat(3, 1)
    cache.crop(-7)
    assert_continues(tree_llama, cache, ids[:, :-7])
    cache.set_rows([held])
    assert_continues(tree_llama, cache, inputs["input_ids"])


def test_crop_refuses_what_it_cannot_do(llama: PreTrainedModel) -> None:
    cache, inputs = tree_cache(), prompts()
    prefill(llama, cache, inputs)
    with pytest.raises(InvalidArgument, match=r"from -45 to 0"):
        cache.crop(3)
    with pytest.raises(InvalidArgument):
        cache.crop(-COLUMNS - 1)
    assert_continues(llama, cache, inputs["input_ids"], inputs["attention_mask"])
    cache.crop(-cache.get_seq_length())
    assert cache.stats().unique_tokens == 0


def test_reset_makes_room_for_another_batch(llama: PreTrainedModel) -> None:
    cache, inputs = tree_cache(), prompts(num_rows=3)
    generate(llama, inputs, past_key_values=cache)
    cache.reset()
    cache.check_integrity()
    assert (cache.stats().blocks, cache.get_seq_length(), cache.batch_size) == (0, 0, -1)
    allocated = cache.stats().allocated_bytes
    inputs = prompts(num_rows=2)
    assert_same(generate(llama, inputs, past_key_values=cache), generate(llama, inputs))
    assert cache.stats().allocated_bytes == allocated


def test_what_is_pickled_is_what_is_held(llama: PreTrainedModel) -> None:
    cache = tree_cache()
    prefill(llama, cache, prompts())
    stats = cache.stats()
    assert len(pickle.dumps(cache)) < stats.kv_bytes + 30_000 < stats.allocated_bytes


@pytest.mark.parametrize("duplicate", WAYS)
def test_copies_live_apart(llama: PreTrainedModel, duplicate: Any) -> None:
    cache, inputs = tree_cache(), prompts()
    prefill(llama, cache, inputs)
    twin = duplicate(cache)
    for each, extra in ((cache, 11), (twin, 12)):
        new = torch.full((2, 1), extra)
        longer = {
            "input_ids": torch.cat([inputs["input_ids"], new], 1),
            "attention_mask": torch.cat([inputs["attention_mask"], torch.ones_like(new)], 1),
        }
        assert_same(generate(llama, longer, past_key_values=each), generate(llama, longer))
        each.check_integrity()
    cache.reset()
    ids = torch.cat([inputs["input_ids"], torch.full((2, 1), 12)], 1)
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.int64)], 1)
    twin.crop(-(twin.get_seq_length() - ids.shape[1]))
    assert_continues(llama, twin, ids, mask)


def test_batch_surgery_of_the_cache_interface(llama: PreTrainedModel) -> None:
    cache, inputs = tree_cache(), prompts(num_rows=3)
    prefill(llama, cache, inputs)
    rows = torch.arange(3)

    def check() -> None:
        ids, mask = (inputs[key][rows] for key in ("input_ids", "attention_mask"))
        assert cache.batch_size == len(rows)
        assert_continues(llama, cache, ids, mask)
        cache.crop(-4)

    cache.batch_repeat_interleave(2)
    rows = rows.repeat_interleave(2)
    check()
    cache.batch_select_indices(torch.tensor([0, 5, 2, 3]))
    rows = rows[[0, 5, 2, 3]]
    check()
    cache.batch_select_indices(torch.tensor([True, False, True, True]))
    rows = rows[[0, 2, 3]]
    check()
    cache.reorder_cache(torch.tensor([2, 2, 0]))
    rows = rows[[2, 2, 0]]
    check()
    cache.select([1])
    rows = rows[[1]]
    check()
    for call, argument in (
        (cache.select, [1]),
        (cache.reorder_cache, torch.tensor([-1])),
        (cache.batch_repeat_interleave, 0),
        (cache.batch_select_indices, torch.tensor([0.0])),
    ):
        with pytest.raises(InvalidArgument):
            call(argument)
    check()


def test_layers_show_the_keys_and_values_of_a_dynamic_cache(llama: PreTrainedModel) -> None:
    cache, dense, inputs = tree_cache(), DynamicCache(), prompts(num_rows=3)
    new = torch.full((3, 1), 8)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(new)], 1)
    for each in (cache, dense):
        prefill(llama, each, inputs)
        forward(llama, each, new, mask)
    assert len(cache.layers) == len(dense.layers)
    for ours, theirs in zip(cache.layers, dense.layers, strict=True):
        for got, want in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
            assert got.shape == want.shape and got.dtype == want.dtype
            real = mask.bool()[:, None, :, None].expand_as(want)
            torch.testing.assert_close(got[real], want[real], rtol=0, atol=TOLERANCE)
    # Padding is never stored where the mask is known before the forward.
    stored = cache.stats().logical_tokens
    if stored == int(mask.sum()):
        assert (cache.layers[0].keys[~mask.bool()[:, None, :, None].expand_as(want)] == 0).all()


def test_branches_of_different_lengths_become_rows(llama: PreTrainedModel) -> None:
    """Shorter rows are left-padded in the caller's view, and one of them is empty."""
    cache, inputs = tree_cache(), prompts(num_rows=1)
    ids = inputs["input_ids"]
    forward(llama, cache, ids)
    whole = cache.rows[0]
    short, empty = cache.fork(whole, at=-19)[0], cache.fork(whole, at=0)[0]
    cache.set_rows([short, whole, empty])
    padded = torch.full((3, COLUMNS), PAD)
    padded[0, 19:], padded[1] = ids[0, :-19], ids[0]
    mask = torch.zeros_like(padded)
    mask[0, 19:] = mask[1] = 1
    assert_continues(llama, cache, padded, mask)


@pytest.mark.parametrize("name", HYBRIDS)
def test_held_branches_keep_their_linear_attention_states(name: str, tree: bool) -> None:
    each, inputs = model(name), prompts(name)
    cache = tree_cache(config=each.config)
    with enable_tree_attention(each) if tree else nullcontext():
        prefill(each, cache, inputs)
        first, second = cache.rows
        (held,) = cache.fork(first)
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        assert_continues(each, cache, ids, mask)
        cache.set_rows([second, held])
        with pytest.raises(UnsupportedModel, match="only at the tip"):
            cache.fork(held, at=-1)
        more = torch.randint(3, 90, (2, 4), generator=torch.Generator().manual_seed(11))
        columns = cache.get_seq_length()
        # Padding that was left out leaves the longest row 45 tokens, else it has 45 + 4 columns.
        assert columns == (COLUMNS if tree else COLUMNS + 4)
        longer, seen = torch.full((2, columns), PAD), torch.zeros(2, columns, dtype=torch.int64)
        texts = torch.cat([ids[1][mask[1] == 1], more[1]]), ids[0]
        for row, text in enumerate(texts):
            longer[row, -len(text) :], seen[row, -len(text) :] = text, 1
        assert_continues(each, cache, longer, seen)
        twin = copy.deepcopy(cache)
        cache.reset()
        prefill(each, cache, inputs)
        assert_continues(each, cache, ids, mask)
    assert len(twin.rows) == 2
    twin.check_integrity()
