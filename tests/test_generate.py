"""What users do around `generate`: go on, fork, crop, fail, pass odd masks, train."""

from __future__ import annotations

import copy
import functools
import gc
import random
import re
import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from models import COLUMNS, PAD, assert_same, build, generate, model, one_thread, prompts
from search_fakes import letters
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    masking_utils,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama import modeling_llama

from hf_tree_cache import (
    BatchMismatch,
    InvalidArgument,
    OutOfBlocks,
    StaleHandle,
    StorageMismatch,
    TreeCache,
    TreeCacheError,
    UnsupportedModel,
    enable_tree_attention,
)
from hf_tree_cache.integration.attention import tree_attention_forward
from hf_tree_cache.naming import CACHE

__all__ = ["one_thread"]  # a fixture for all of this file
pytestmark = pytest.mark.core

TOLERANCE = 1e-4


@pytest.fixture(params=["tree attention", "stock attention"])
def llama(request: pytest.FixtureRequest) -> Iterator[PreTrainedModel]:
    """A tiny llama, once with tree attention and once without."""
    with enabled(model("llama")) if request.param == "tree attention" else nullcontext():
        yield model("llama")


@pytest.fixture(params=[True, False], ids=["tree attention", "stock attention"])
def tree(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.fixture
def tree_llama() -> Iterator[PreTrainedModel]:
    with enabled(model("llama")):
        yield model("llama")


enabled = enable_tree_attention


def tree_cache(**options: Any) -> TreeCache:
    return TreeCache(**{"block_size": 4, "poison": True, **options})


def positions(mask: torch.Tensor, num_new: int) -> torch.Tensor:
    return (mask.cumsum(1) - 1).clamp_min(0)[:, -num_new:]


@torch.no_grad()
def forward(
    model: PreTrainedModel, cache: Any, ids: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Logits of ``ids`` behind what ``cache`` holds; ``mask`` covers both."""
    if mask is None:
        past = 0 if cache is None else cache.get_seq_length()
        mask = torch.ones(len(ids), past + ids.shape[1], dtype=torch.int64)
    return model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions(mask, ids.shape[1]),
        past_key_values=cache,
        use_cache=cache is not None,
    ).logits


def prefill(model: PreTrainedModel, cache: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return forward(model, cache, inputs["input_ids"], inputs["attention_mask"])


def assert_continues(
    model: PreTrainedModel, cache: TreeCache, ids: torch.Tensor, mask: torch.Tensor | None = None
) -> None:
    """``cache`` holds ``ids``: three tokens more, and then one, give the logits of all at once.

    Leaves these four tokens in the cache. transformers' jamba is wrong where several tokens meet a
    past, whatever the cache, so it goes one by one.
    """
    cache.check_integrity()
    assert cache.get_seq_length() == ids.shape[1]
    more = torch.randint(3, 90, (len(ids), 4), generator=torch.Generator().manual_seed(11))
    mask = torch.ones_like(ids) if mask is None else mask
    mask = torch.cat([mask, torch.ones_like(more)], 1)
    whole = forward(model, None, torch.cat([ids, more], 1), mask)
    sizes, got, end = ([1] * 4 if model.config.model_type == "jamba" else [3, 1]), [], 0
    for size in sizes:
        end += size
        seen = mask[:, : ids.shape[1] + end]
        got.append(forward(model, cache, more[:, end - size : end], seen))
    cache.check_integrity()
    got = torch.cat(got, 1)
    torch.testing.assert_close(got, whole[:, -4:], rtol=0, atol=TOLERANCE)


def extended(output: Any, inputs: dict[str, torch.Tensor], count: int = 5) -> dict[str, Any]:
    """The conversation so far with ``count`` new tokens of the user, and its mask."""
    rows = len(output.sequences)
    new = torch.randint(3, 90, (rows, count), generator=torch.Generator().manual_seed(3))
    ids = torch.cat([output.sequences, new], 1)
    mask = inputs["attention_mask"].repeat_interleave(rows // len(inputs["attention_mask"]), 0)
    mask = torch.cat([mask, mask.new_ones(rows, ids.shape[1] - mask.shape[1])], 1)
    return {"input_ids": ids, "attention_mask": mask}


class Broken(RuntimeError):
    pass


class FailsOnce:
    """Makes a module fail at one of its calls."""

    def __init__(self, module: torch.nn.Module, call: int) -> None:
        self.left = call
        self.handle = module.register_forward_pre_hook(self)

    def __call__(self, module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        self.left -= 1
        if self.left == 0:
            raise Broken

    def __enter__(self) -> FailsOnce:
        return self

    def __exit__(self, *error: object) -> None:
        self.handle.remove()


# Going on


def test_conversation_continues_on_the_same_cache(llama: PreTrainedModel) -> None:
    cache, inputs = tree_cache(), prompts()
    first = generate(llama, inputs, past_key_values=cache)
    assert_same(first, generate(llama, inputs))
    longer = extended(first, inputs)
    assert_same(generate(llama, longer, past_key_values=cache), generate(llama, longer))
    # 9 generated, 5 new, 9 generated: the last token of each turn is not in the cache yet.
    assert cache.get_seq_length() == COLUMNS + 9 + 5 + 9 - 1
    cache.check_integrity()


def test_conversation_goes_on_after_sampling_and_beams(tree_llama: PreTrainedModel) -> None:
    cache, inputs = tree_cache(), prompts()
    options = {"do_sample": True, "num_return_sequences": 3}
    first = generate(tree_llama, inputs, past_key_values=cache, **options)
    longer = extended(first, inputs)
    second = generate(tree_llama, longer, past_key_values=cache)
    assert_same(second, generate(tree_llama, longer))
    last = extended(second, longer)
    cache.select([0, 4])
    last = {key: value[[0, 4]] for key, value in last.items()}
    beams = {"num_beams": 3, "do_sample": False}
    assert_same(
        generate(tree_llama, last, past_key_values=cache, **beams),
        generate(tree_llama, last, **beams),
    )
    cache.check_integrity()


@pytest.mark.parametrize("cached", [COLUMNS - 1, COLUMNS - 6], ids=["all but one", "all but six"])
def test_one_cached_prompt_fans_out(llama: PreTrainedModel, cached: int) -> None:
    cache, inputs = tree_cache(), prompts(num_rows=1)
    forward(llama, cache, inputs["input_ids"][:, :cached])
    blocks = cache.stats().blocks
    options = {"do_sample": True, "num_return_sequences": 4}
    ours = generate(llama, inputs, past_key_values=cache, **options)
    assert_same(ours, generate(llama, inputs, **options))
    if llama.config._attn_implementation == "tree_attention" and cached < COLUMNS - 1:
        assert cache.stats().prefill_tokens_computed == COLUMNS
    assert cache.stats().num_rows == 4
    # The prompt's 11 full blocks are there once.
    assert cache.stats().blocks < blocks + 4 * 5
    cache.check_integrity()


def test_cache_outlives_inference_mode(llama: PreTrainedModel) -> None:
    cache, inputs = tree_cache(block_size=16), prompts()
    with torch.inference_mode():
        prefill(llama, cache, inputs)
    assert_continues(llama, cache, inputs["input_ids"], inputs["attention_mask"])
    ids = inputs["input_ids"][:, :3]
    cache.reset()
    with torch.inference_mode():
        forward(llama, cache, ids)
    assert_continues(llama, cache, ids)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precision_is_as_close_as_transformers(dtype: torch.dtype) -> None:
    """Tokens of a random model may differ in half precision; logits must not stray further."""
    half, exact = build("llama", dtype), build("llama")
    exact.load_state_dict(half.state_dict())
    inputs = prompts()
    theirs = generate(half, inputs)
    tokens, mask = theirs.sequences, extended(theirs, inputs, 0)["attention_mask"]
    real = inputs["attention_mask"].bool()
    want = forward(exact, None, tokens, mask)
    cache, dense = tree_cache(), DynamicCache()
    with enabled(half):
        worst = {}
        for name, kv in (("tree", cache), ("dense", dense)):
            start = prefill(half, kv, inputs).float() - want[:, :COLUMNS]
            steps = [
                forward(half, kv, tokens[:, [i]], mask[:, : i + 1]).float() - want[:, [i]]
                for i in range(COLUMNS, COLUMNS + 8)
            ]
            worst[name] = max(
                float(start[real].abs().max()), float(torch.cat(steps, 1).abs().max())
            )
        ours = generate(half, inputs, past_key_values=tree_cache())
    assert not cache.dense_reads
    assert worst["tree"] < 1.5 * worst["dense"] + torch.finfo(dtype).eps

    noise = 4 * worst["dense"]
    for row in range(2):
        for step, (a, b) in enumerate(zip(ours.logits, theirs.logits, strict=True)):
            torch.testing.assert_close(a[row], b[row], rtol=0, atol=noise)
            if ours.sequences[row, COLUMNS + step] != theirs.sequences[row, COLUMNS + step]:
                best = b[row].float().topk(2).values
                assert best[0] - best[1] < noise
                break


def test_generates_under_autocast(llama: PreTrainedModel) -> None:
    """Mixed precision makes float32 keys (rotary) and bfloat16 values."""
    inputs = prompts()
    with torch.autocast("cpu", torch.bfloat16):
        theirs = generate(llama, inputs, max_new_tokens=4)
        ours = generate(llama, inputs, max_new_tokens=4, past_key_values=tree_cache())
    exact = generate(llama, inputs, max_new_tokens=1).logits[0]
    noise = float((theirs.logits[0] - exact).abs().max())
    assert ours.logits[0].dtype == theirs.logits[0].dtype
    torch.testing.assert_close(ours.logits[0], exact, rtol=0, atol=1.5 * noise)
    torch.testing.assert_close(ours.logits[1], theirs.logits[1], rtol=0, atol=3 * noise)


def test_embeddings_instead_of_tokens(llama: PreTrainedModel) -> None:
    inputs, options = prompts(), {"do_sample": True, "num_return_sequences": 3}
    embeds = {
        "inputs_embeds": llama.get_input_embeddings()(inputs["input_ids"]).detach(),
        "attention_mask": inputs["attention_mask"],
    }
    cache = tree_cache()
    ours = generate(llama, embeds, past_key_values=cache, **options)
    assert_same(ours, generate(llama, embeds, **options))
    cache.check_integrity()


# Surgery


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


def test_deep_copies_live_apart(llama: PreTrainedModel) -> None:
    cache, inputs = tree_cache(), prompts()
    prefill(llama, cache, inputs)
    twin = copy.deepcopy(cache)
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


HYBRIDS = ["qwen3_next", "falcon_h1", "jamba"]


@pytest.mark.parametrize("name", HYBRIDS)
def test_held_branches_keep_their_linear_attention_states(name: str, tree: bool) -> None:
    each, inputs = model(name), prompts(name)
    cache = tree_cache(config=each.config)
    with enabled(each) if tree else nullcontext():
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


@pytest.mark.parametrize("name", HYBRIDS)
def test_failure_of_a_model_with_linear_attention(name: str) -> None:
    """Its states cannot be taken back, so the cache asks for a reset instead of going on wrong."""
    each, cache, inputs = model(name), tree_cache(), prompts(name)
    layer = each.model.layers[1]
    layer = layer.feed_forward if hasattr(layer, "feed_forward") else layer.mlp
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.int64)], 1)
    with enabled(each):
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


# Mistakes


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


# Switching tree attention on and off


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


# Outputs and books


def test_hidden_states_of_collapsed_rows_have_the_callers_batch(
    tree_llama: PreTrainedModel,
) -> None:
    inputs, options = prompts(), {"do_sample": True, "num_return_sequences": 3}
    options |= {"output_hidden_states": True, "max_new_tokens": 3}
    theirs = generate(tree_llama, inputs, **options)
    cache = tree_cache()
    ours = generate(tree_llama, inputs, past_key_values=cache, **options)
    assert cache.stats().prefill_tokens_computed == 2 * COLUMNS
    real = inputs["attention_mask"].bool().repeat_interleave(3, 0)
    for step, (got, want) in enumerate(zip(ours.hidden_states, theirs.hidden_states, strict=True)):
        assert len(got) == len(want) == 4
        for a, b in zip(got, want, strict=True):
            assert a.shape == b.shape == (6, 1 if step else COLUMNS, 40)
            where = real if step == 0 else ...
            torch.testing.assert_close(a[where], b[where], rtol=0, atol=TOLERANCE)


def test_finished_rows_can_be_dropped(llama: PreTrainedModel) -> None:
    inputs, cache = prompts(num_rows=3), tree_cache()
    plain = generate(llama, inputs)
    eos = plain.sequences[1, COLUMNS + 3].item()
    output = generate(llama, inputs, past_key_values=cache, eos_token_id=eos)
    assert_same(output, generate(llama, inputs, eos_token_id=eos))
    generated = output.sequences[:, COLUMNS:]
    going = [row for row in range(3) if eos not in generated[row].tolist()]
    assert 1 not in going and going
    assert (generated[1, -3:] == PAD).all()
    longer = extended(output, inputs)
    blocks = cache.stats().blocks
    cache.select(going)
    assert cache.stats().blocks < blocks
    longer = {key: value[going] for key, value in longer.items()}
    assert_same(generate(llama, longer, past_key_values=cache), generate(llama, longer))


def test_prefill_books(tree_llama: PreTrainedModel) -> None:
    cache = tree_cache()
    inputs = prompts()
    prefill(tree_llama, cache, inputs)
    assert cache.stats().prefill_tokens_asked == 2 * COLUMNS
    cache = tree_cache()
    generate(tree_llama, inputs, past_key_values=cache, num_beams=5, do_sample=False)
    stats = cache.stats()
    assert stats.prefill_tokens_asked == 2 * 5 * COLUMNS
    assert stats.prefill_tokens_computed == 2 * COLUMNS
    assert (stats.num_rows, stats.num_held) == (10, 0)
    assert stats.unique_tokens < stats.logical_tokens == 5 * (45 + 38) + 10 * 8
    assert stats.kv_bytes == stats.blocks * 4 * 3 * 2 * 12 * 4
    assert stats.dense_bytes == 10 * (COLUMNS + 8) * 3 * 2 * 12 * 4
    assert stats.saving == 1 - stats.kv_bytes / stats.dense_bytes > 0.4
    assert stats.dense_reads == {}


def test_memory_cap_holds_until_it_is_hit(tree_llama: PreTrainedModel) -> None:
    block = 4 * 3 * 2 * 12 * 4
    cache = tree_cache(max_memory=30 * block + block // 2)
    inputs = prompts()
    with pytest.raises(OutOfBlocks, match="max_memory"):
        generate(tree_llama, inputs, past_key_values=cache, max_new_tokens=60)
    assert 28 * block <= cache.stats().kv_bytes <= 30 * block
    cache.check_integrity()
    cache.reset()
    ours = generate(tree_llama, inputs, past_key_values=cache)
    assert_same(ours, generate(tree_llama, inputs))

    with pytest.raises(InvalidArgument, match=r"model\.config"), torch.no_grad():
        build("llama")(**inputs, past_key_values=tree_cache(max_memory=block))
    short = tree_cache(max_memory=2 * block)
    with pytest.raises(OutOfBlocks, match="max_memory"):
        prefill(tree_llama, short, inputs)
    short.check_integrity()
    assert short.stats().blocks == 0


# Everything together


class Walk:
    """Random operations on a cache, and the tokens that its branches should hold by now."""

    def __init__(self, model: PreTrainedModel, seed: int) -> None:
        self.model = model
        self.random = random.Random(seed)
        self.cache = tree_cache(block_size=self.random.choice([1, 3, 4, 16]))
        self.rows: list[list[int]] = [[] for _ in range(self.random.choice([1, 2, 3]))]
        self.held: dict[int, list[int]] = {}
        self.columns = 0

    def forward(self, fails: bool = False, fan_out: int = 1) -> None:
        """Some tokens for every row, often equal ones, with left padding where rows are empty."""
        rows = [list(row) for row in self.rows for _ in range(fan_out)]
        size = self.random.choice([1, 1, 1, 2, 3, 6, 17])
        common = [self.random.randrange(3, 90) for _ in range(size)]
        new = [common] * len(rows)
        if self.random.random() < 0.4:
            new = [[self.random.randrange(3, 90) for _ in range(size)] for _ in rows]
        pads = [
            0 if row or self.columns else self.random.choice([0, 0, 1, size // 2]) for row in rows
        ]
        pads[-1] = 0
        ids = torch.tensor([[PAD] * p + t[p:] for p, t in zip(pads, new, strict=True)])
        after = [row + t[p:] for row, p, t in zip(rows, pads, new, strict=True)]
        mask = torch.zeros(len(rows), self.columns + size, dtype=torch.int64)
        for row, tokens in enumerate(after):
            mask[row, mask.shape[1] - len(tokens) :] = 1
        if fails:
            layer = self.random.choice([*self.model.model.layers, self.model.lm_head])
            with FailsOnce(layer, 1), pytest.raises(Broken):
                forward(self.model, self.cache, ids, mask)
            return
        logits = forward(self.model, self.cache, ids, mask)
        self.rows, self.columns = after, mask.shape[1]
        for row, tokens in enumerate(after):
            count = size - pads[row]
            want = forward(self.model, None, torch.tensor([tokens]))[0, len(tokens) - count :]
            torch.testing.assert_close(logits[row, pads[row] :], want, rtol=0, atol=2 * TOLERANCE)

    def select(self) -> None:
        chosen = self.random.choices(range(len(self.rows)), k=self.random.randrange(1, 6))
        self.cache.select(chosen)
        self.rows = [list(self.rows[row]) for row in chosen]

    def crop(self) -> None:
        removed = self.random.randrange(min(self.columns, 9) + 1)
        self.cache.crop(-removed)
        self.columns -= removed
        self.rows = [row[: max(0, len(row) - removed)] for row in self.rows]

    def fork(self) -> None:
        row = self.random.randrange(len(self.rows))
        at = self.random.randrange(len(self.rows[row]) + 1)
        for branch in self.cache.fork(self.cache.rows[row], 2, at=at):
            self.held[branch] = self.rows[row][:at]

    def set_rows(self) -> None:
        known = dict(zip(self.cache.rows, self.rows, strict=True)) | self.held
        chosen = self.random.sample(list(known), self.random.randrange(1, min(len(known), 5) + 1))
        self.cache.set_rows(chosen)
        self.rows = [list(known[branch]) for branch in chosen]
        self.held = {branch: known[branch] for branch in known if branch not in chosen}
        self.columns = max(len(row) for row in self.rows)

    def prune(self) -> None:
        if self.held:
            branch = self.random.choice(list(self.held))
            self.cache.prune(branch)
            del self.held[branch]

    def copy(self) -> None:
        self.cache = copy.deepcopy(self.cache)

    def step(self) -> None:
        operations = [self.select, self.crop, self.fork, self.set_rows, self.prune, self.copy]
        operations += [self.forward] * 5 + [lambda: self.forward(fails=True)]
        if len(self.rows) < 4:
            operations.append(lambda: self.forward(fan_out=2))
        (self.random.choice(operations) if self.columns else self.forward)()
        self.cache.check_integrity()
        assert self.cache.get_seq_length() == self.columns
        assert self.cache.tree.row_lengths() == [len(row) for row in self.rows]


@pytest.mark.parametrize(
    ("size", "held"), [("1MB", 10**6), ("2MiB", 2 << 20), ("0.5 GB", 5 * 10**8), (12345, 12345)]
)
def test_memory_is_bounded_by_a_number_or_a_text(size: int | str, held: int) -> None:
    assert TreeCache(max_memory=size)._memory.pool.max_memory == held


@pytest.mark.parametrize("size", ["much", "1XB", "", "-1GB", 0])
def test_senseless_bounds_of_memory_are_refused(size: int | str) -> None:
    with pytest.raises(InvalidArgument, match=r"max_memory=.*give bytes"):
        TreeCache(max_memory=size)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", ["llama", "mistral", "deepseek_v3"])
def test_random_walk(name: str, seed: int) -> None:
    with enabled(model(name)):
        walk = Walk(model(name), seed)
        for _ in range(25):
            walk.step()
    assert not walk.cache.dense_reads


def test_a_keyword_that_nobody_heeds_is_refused() -> None:
    query, keys, values = torch.randn(1, 4, 2, 8), *torch.randn(2, 1, 2, 2, 8)
    with pytest.raises(UnsupportedModel, match=r"'indices'.*disable\(\)"):
        tree_attention_forward(Layer(), query, keys, values, None, indices=torch.zeros(1))
    tree_attention_forward(Layer(), query, keys, values, None, indices=None)


@pytest.mark.parametrize("num_beams", [1, 2])
@pytest.mark.parametrize("cached", [True, False], ids=["TreeCache", "DynamicCache"])
def test_stop_strings_end_rows(cached: bool, num_beams: int) -> None:
    """``generate`` hands their tokenizer on to every forward."""
    llama, tokenizer = model("llama"), letters()
    options = {"max_new_tokens": 12, "pad_token_id": 0, "num_beams": num_beams}
    options["num_return_sequences"] = num_beams
    ids = torch.arange(5, 12)[None]
    free = llama.generate(ids, **options)
    stop = {"stop_strings": [tokenizer.decode(free[0, 10])], "tokenizer": tokenizer}
    want = llama.generate(ids, **options, **stop)
    assert not torch.equal(want, free)
    with enabled(llama):
        cache = {CACHE: TreeCache()} if cached else {}
        got = llama.generate(ids, **options, **stop, **cache)
    assert got.tolist() == want.tolist()


@pytest.mark.parametrize("softcap", [None, 5.0], ids=["sdpa", "softcap"])
def test_the_last_queries_of_a_prompt_see_no_future(softcap: float | None) -> None:
    """Gemma 4 drops all queries but the last ones, where none needed a mask."""
    query, (keys, values) = torch.randn(1, 4, 9, 8), torch.randn(2, 1, 2, 9, 8)
    layer = Layer().eval()
    whole, _ = tree_attention_forward(layer, query, keys, values, None, softcap=softcap)
    last, _ = tree_attention_forward(layer, query[:, :, 6:], keys, values, None, softcap=softcap)
    torch.testing.assert_close(last, whole[:, 6:])


@pytest.mark.core
def test_memory_goes_with_the_cache_at_once(tree_llama: PreTrainedModel) -> None:
    cache = TreeCache()
    gc.disable()
    try:
        tree_llama.generate(
            torch.arange(3, 9)[None],
            past_key_values=cache,
            num_return_sequences=2,
            do_sample=True,
            max_new_tokens=4,
            pad_token_id=0,
        )
        kept, storage, layer = weakref.ref(cache), weakref.ref(cache.storages[0]), cache.layers[0]
        del cache
        assert kept() is None
        with pytest.raises(StaleHandle, match="keep the cache"):
            layer.get_seq_length()
        del layer
        assert storage() is None
    finally:
        gc.enable()
