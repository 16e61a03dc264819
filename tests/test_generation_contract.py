"""What transformers asks of any attention and any cache, over one architecture of each mechanism.

After test_modeling_common.py and generation/test_utils.py of transformers. Greedy, sampled
and beam decoding of these and other architectures are in test_models.py. Logits are compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from models import COLUMNS, PAD, TINY, assert_same, build, generate, model, one_thread, prompts
from transformers import DynamicCache, PreTrainedModel

from hf_tree_cache import TreeCache, enable_tree_attention

__all__ = ["one_thread"]  # a fixture for all of this file
pytestmark = pytest.mark.core

MECHANISMS = {
    "llama": "plain",
    "gemma2": "window and softcap",
    "gpt2": "learned positions",
    "qwen3_moe": "experts",
    "qwen3_next": "linear-attention states",
    "deepseek_v3": "latents",
}
SIX = [pytest.param(name, id=f"{name}: {what}") for name, what in MECHANISMS.items()]
TOLERANCE = 1e-4


@pytest.fixture(params=["tree attention", "stock attention"])
def how(request: pytest.FixtureRequest) -> str:
    return request.param


def enabled(each: PreTrainedModel, how: str) -> Any:
    return enable_tree_attention(each) if how == "tree attention" else nullcontext()


def tree_cache(name: str, **options: Any) -> TreeCache:
    return TreeCache(model(name).config, block_size=4, poison=True, **options)


def positions(mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(1) - 1).clamp_min(0)


@torch.no_grad()
def forward(
    each: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, cache: Any = None, **options: Any
) -> torch.Tensor:
    """Float32 logits of ``ids``, the last columns of ``mask``."""
    where = positions(mask)[:, -ids.shape[1] :]
    options |= {"past_key_values": cache, "use_cache": cache is not None}
    return each(ids, attention_mask=mask, position_ids=where, **options).logits.float()


# Attention (test_modeling_common: eager matches the other implementations)

PADDINGS = {"none": (0, 0, 0), "left": (0, 7, 16), "right": (0, 7, 16)}


def padded(side: str) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(3, 90, (3, COLUMNS), generator=torch.Generator().manual_seed(7))
    mask = torch.ones_like(ids)
    for row, count in enumerate(PADDINGS[side]):
        hidden = slice(count) if side == "left" else slice(COLUMNS - count, None)
        ids[row, hidden], mask[row, hidden] = PAD, 0
    return ids, mask


def on_eager(name: str, dtype: torch.dtype) -> PreTrainedModel:
    return build(name, dtype, attn_implementation="eager")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("side", PADDINGS)
@pytest.mark.parametrize("name", SIX)
def test_our_attention_matches_eager(name: str, side: str, dtype: torch.dtype) -> None:
    """A whole forward, and one over a past, at every token that is not padding."""
    ids, mask = padded(side)
    exact = forward(on_eager(name, torch.float32), ids, mask)
    eager, ours = on_eager(name, dtype), build(name, dtype)
    want = forward(eager, ids, mask)
    first, rest = ids[:, :31], ids[:, 31:]
    with enable_tree_attention(ours):
        got = [forward(ours, ids, mask)]
        cache = tree_cache(name)
        parts = [forward(ours, first, mask[:, :31], cache), forward(ours, rest, mask, cache)]
        got.append(torch.cat(parts, 1))
        cache.check_integrity()
    dense = DynamicCache(config=eager.config)
    parts = [forward(eager, first, mask[:, :31], dense), forward(eager, rest, mask, dense)]
    for ours_logits, theirs in zip(got, (want, torch.cat(parts, 1)), strict=True):
        real = mask.bool()
        if dtype == torch.float32:
            torch.testing.assert_close(ours_logits[real], theirs[real], rtol=0, atol=TOLERANCE)
        else:
            noise = (theirs - exact)[real].abs()
            stray = (ours_logits - exact)[real].abs()
            assert stray.mean() < 1.2 * noise.mean()
            # Of two experts as good as each other rounding picks one, at a token here and there.
            worst = 0.95 if "moe" in name or name == "deepseek_v3" else 1.0
            assert stray.amax(1).quantile(worst) < 2 * noise.amax(1).quantile(worst)
    assert bool(cache.dense_reads) == (side == "right")


# Generation (GenerationTesterMixin)


@pytest.mark.parametrize("name", SIX)
def test_left_padding_changes_nothing(name: str, how: str) -> None:
    """test_left_padding_compatibility: a row among padded ones, and alone."""
    each, inputs = model(name), prompts(name, num_rows=3)
    more = torch.randint(3, 90, (3, 3), generator=torch.Generator().manual_seed(3))
    with enabled(each, how):
        cache, mask = tree_cache(name), inputs["attention_mask"]
        together = [forward(each, inputs["input_ids"], mask, cache)[:, -1:]]
        for column in more.split(1, 1):
            mask = torch.cat([mask, torch.ones_like(column)], 1)
            together.append(forward(each, column, mask, cache))
        for row, tokens in enumerate(inputs["attention_mask"].sum(1).tolist()):
            ids = torch.cat([inputs["input_ids"][row, -tokens:], more[row]])[None]
            alone, cache = [], tree_cache(name)
            for end in range(tokens, tokens + 4):
                new = ids[:, end - 1 : end] if alone else ids[:, :end]
                alone.append(forward(each, new, torch.ones_like(ids[:, :end]), cache)[:, -1:])
            got = torch.cat(together, 1)[row]
            torch.testing.assert_close(got, torch.cat(alone, 1)[0], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("fan", [1, 3])
@pytest.mark.parametrize("name", SIX)
def test_generation_continues_from_its_past(name: str, fan: int, how: str) -> None:
    """test_generate_continue_from_past_key_values: nine tokens at once, and four and then five."""
    each, inputs = model(name), prompts(name)
    options = {"do_sample": False} if fan == 1 else {"do_sample": True, "top_k": 1}
    options["num_return_sequences"] = fan
    whole = generate(each, inputs, **options)
    cache = tree_cache(name)
    with enabled(each, how):
        first = generate(each, inputs, past_key_values=cache, max_new_tokens=4, **options)
        mask = inputs["attention_mask"].repeat_interleave(fan, 0)
        ids = first.sequences
        mask = torch.cat([mask, mask.new_ones(len(ids), ids.shape[1] - mask.shape[1])], 1)
        longer = {"input_ids": ids, "attention_mask": mask}
        options["num_return_sequences"] = 1
        second = generate(each, longer, past_key_values=cache, max_new_tokens=5, **options)
    assert second.sequences.tolist() == whole.sequences.tolist()
    logits = torch.stack([*first.logits, *second.logits])
    torch.testing.assert_close(logits, torch.stack(whole.logits), rtol=0, atol=TOLERANCE)
    cache.check_integrity()


@pytest.mark.parametrize("name", SIX)
def test_embeddings_in_place_of_tokens(name: str, how: str) -> None:
    """test_generate_from_inputs_embeds: as from tokens, and other embeddings give other logits."""
    each, inputs = model(name), prompts(name)
    options = {"do_sample": True, "num_return_sequences": 2}
    embeds = each.get_input_embeddings()(inputs["input_ids"]).detach()
    given = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}
    theirs = generate(each, given, **options)
    with enabled(each, how):
        ours = generate(each, given, past_key_values=tree_cache(name), **options)
        assert_same(ours, theirs)
        tokens = generate(each, inputs, past_key_values=tree_cache(name), **options)
        other = generate(each, {**given, "inputs_embeds": 2 * embeds.roll(1, 0)}, **options)
    assert ours.sequences.tolist() == tokens.sequences[:, COLUMNS:].tolist()
    torch.testing.assert_close(ours.logits[0], tokens.logits[0], rtol=0, atol=TOLERANCE)
    assert (other.logits[0] - ours.logits[0]).abs().max() > 0.01


@pytest.fixture
def crops(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Tokens that each crop of a TreeCache took back."""
    removed: list[int] = []
    original = TreeCache.crop

    def crop(self: TreeCache, tokens_to_remove: Any) -> None:
        removed.append(-int(tokens_to_remove))
        original(self, tokens_to_remove)

    monkeypatch.setattr(TreeCache, "crop", crop)
    yield removed


ASSISTED = [name for name in MECHANISMS if name not in ("llama", "gemma2")]  # in test_models.py


@pytest.mark.parametrize("kind", ["prompt lookup", "assistant"])
@pytest.mark.parametrize("name", ASSISTED)
def test_speculation(name: str, kind: str, how: str, crops: list[int]) -> None:
    """test_assisted_decoding_matches_greedy_search, test_prompt_lookup_decoding_matches_..."""
    each, inputs = model(name), prompts(name, num_rows=1)
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 14}
    if kind == "prompt lookup":
        inputs["input_ids"][:, 30:] = inputs["input_ids"][:, :15]
        options["prompt_lookup_num_tokens"] = 4
    else:
        assistant = build(name)
        torch.manual_seed(4)
        for weight in assistant.parameters():
            weight.data.add_(torch.randn_like(weight), alpha=0.1 * float(weight.detach().std()))
        options["assistant_model"] = assistant
    try:
        theirs = generate(each, inputs, **options)
    except (ValueError, RuntimeError) as error:
        assert TINY[name].states, error
        pytest.skip(f"transformers itself refuses: {error}")
    # A draft is taken back at once, so windows need keep nothing for it.
    for backtrack in (256, 0):
        crops.clear()
        with enabled(each, how):
            cache = tree_cache(name, backtrack=backtrack)
            ours = generate(each, inputs, past_key_values=cache, **options)
        assert_same(ours, theirs)
        assert max(crops) > 0
