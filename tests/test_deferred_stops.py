"""`generate` that looks for ends a token late, as transformers does on Apple's GPUs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import build, prompts
from transformers import DynamicCache
from transformers.generation import utils as stock

from hf_tree_cache import TreeCache, enable_tree_attention

pytestmark = pytest.mark.skipif(
    not hasattr(stock, "DeferredStopCheck"), reason="transformers looks for ends at once"
)


class NoEvent:
    """What a CPU has in the place of events: nothing is ever under way."""

    def __init__(self, **options: Any) -> None:
        pass

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        pass


@pytest.fixture
def late(monkeypatch):
    """Has every device treated so from here on; counts the loops."""
    loops = []

    def is_supported(device, cache, cache_is_returned, is_assistant):
        loops.append(cache)
        return not is_assistant and cache.is_croppable

    def use():
        monkeypatch.setattr(stock.DeferredStopCheck, "is_supported", staticmethod(is_supported))
        monkeypatch.setattr(torch, "Event", NoEvent)
        return loops

    return use


def run(model, inputs, cache, **options):
    torch.manual_seed(3)
    defaults = {
        "max_new_tokens": 30,
        "do_sample": True,
        "num_return_sequences": 2,
        "eos_token_id": list(range(3, 24)),
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    return model.generate(**inputs, past_key_values=cache, **{**defaults, **options})


def state(cache):
    return cache.tree.row_lengths(), cache.get_seq_length(), cache.tree.allocator.num_used


@pytest.mark.parametrize("enabled", [True, False], ids=["tree attention", "plain"])
@pytest.mark.parametrize(
    ("name", "backtrack"), [("llama", 256), ("mistral", 256), ("mistral", 0), ("gemma2", 256)]
)
def test_it_gives_the_same_and_leaves_the_cache_the_same(name, backtrack, enabled, late):
    model, inputs = build(name), prompts(name)
    handle = enable_tree_attention(model) if enabled else None
    dense = run(model, inputs, DynamicCache())
    caches = [TreeCache(poison=True, block_size=4, backtrack=backtrack) for _ in range(2)]
    at_once = run(model, inputs, caches[0])
    loops = late()
    afterwards = run(model, inputs, caches[1])
    assert loops == [caches[1]]
    columns = at_once.sequences.shape[1]
    assert columns < inputs["input_ids"].shape[1] + 30  # all rows ended by themselves
    for out in (at_once, afterwards):
        assert out.sequences.tolist() == dense.sequences.tolist()
        assert (torch.stack(out.logits) - torch.stack(dense.logits)).abs().max() < 1e-4
    assert state(caches[0]) == state(caches[1])
    # Both go on.
    more = {"input_ids": at_once.sequences}
    turns = [run(model, more, cache, num_return_sequences=1, eos_token_id=None) for cache in caches]
    assert turns[0].sequences.tolist() == turns[1].sequences.tolist()
    for cache in caches:
        cache.check_integrity()
    if handle is not None:
        handle.disable()
